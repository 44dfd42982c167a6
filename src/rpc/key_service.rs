//! `polykey.v2.PolykeyService`: the 23 calls of the public contract.

use std::sync::Arc;

use futures::Stream;
use polykey_proto::polykey::v2 as pb;
use prost::Message;
use std::pin::Pin;
use tonic::{Request, Response, Status, Streaming};

use super::admit::Admitted;
use super::trailers::{PLAINTEXT, REFRESH_TOKEN, REVISION, Trailers};
use super::{Deps, batch, convert, parse, stream};
use crate::audit::Outcome;
use crate::authn::login::Credentials;
use crate::authn::session::Attempt;
use crate::authz::{Action, ClientFacts, Command, PrincipalFacts, Resource};
use crate::command::Mutation;
use crate::context::Context;
use crate::error::Error;
use crate::keyring::{Done, KeyMaterialView, MetadataView};

/// A stream of answers.
pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The service.
#[derive(Clone)]
pub(crate) struct KeyService(pub(crate) Arc<Deps>);

/// Revoking the tokens of a client.
pub(crate) struct RevokeTokens;

impl Command for RevokeTokens {
    const ACTION: Action = Action::RevokeToken;
}

/// The result of a change, and what is shown of the key after it.
type Changed = (Done, MetadataView);

impl KeyService {
    pub(crate) fn admit<T>(&self, request: &Request<T>) -> Result<Admitted, Error> {
        let admitted = Admitted::of(request.extensions(), request.metadata(), &self.0)?;
        Ok(Admitted { trail: Some(Arc::clone(&self.0.trail)), ..admitted })
    }

    /// Counts the items of a batch, in this field, in the rates of its caller.
    pub(crate) fn count_items(
        &self,
        admitted: &Admitted,
        method: &str,
        items: (&str, usize),
    ) -> Result<(), Error> {
        let session = admitted.session.as_ref().ok_or(Error::Unauthenticated)?;
        self.0.authenticator.rates().admit_items(&session.caller, method, items)
    }

    /// Reads what a request means: a `slow` one (it has policies to compile) on a thread for that.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        cx: &Context,
        slow: bool,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        if slow { self.0.keyring.apart(cx.caller.client_id(), read).await } else { Ok(read()) }
    }

    /// One change, as every single call does it.
    pub(crate) async fn change(
        &self,
        cx: &Context,
        admitted: &Admitted,
        mutation: &Mutation,
        method: &'static str,
        encoded: Vec<u8>,
    ) -> Result<Changed, Error> {
        self.change_item(cx, admitted, mutation, (method, 0), encoded).await
    }

    /// As [`Self::change`], of one item of a batch or stream.
    pub(crate) async fn change_item(
        &self,
        cx: &Context,
        admitted: &Admitted,
        mutation: &Mutation,
        (method, item): (&'static str, u32),
        encoded: Vec<u8>,
    ) -> Result<Changed, Error> {
        let idempotency = admitted.once(method, item, encoded);
        let done = self.0.keyring.mutate(cx, mutation, idempotency.as_ref()).await?;
        let view = self.0.keyring.view_done(cx, &done).await.map_err(after_commit)?;
        Ok((done, view))
    }
}

/// A failure to show what has been done must not look as if it had not been.
pub(crate) fn after_commit(error: Error) -> Error {
    Error::OutcomeUnknown {
        internal: format!("done, and then: {error}: {:?}", error.internal_text()),
    }
}

/// A request as it is remembered: without what identifies only the call.
fn encoded<M: Message + Clone>(message: &M, strip: impl FnOnce(&mut M)) -> Vec<u8> {
    let mut copy = message.clone();
    strip(&mut copy);
    copy.encode_to_vec()
}

/// An answer with the revision of the key in its trailers.
fn with_revision<T>(answer: T, view: &MetadataView) -> Response<T> {
    let mut response = Response::new(answer);
    let revision = view.key.record.revision.to_string();
    response.extensions_mut().insert(Trailers::default().text(REVISION, &revision));
    response
}

#[tonic::async_trait]
impl pb::polykey_service_server::PolykeyService for KeyService {
    async fn health_check(
        &self,
        _request: Request<()>,
    ) -> Result<Response<pb::HealthCheckResponse>, Status> {
        Ok(Response::new(self.0.health.report(self.0.clock.now())))
    }

    async fn get_key(
        &self,
        request: Request<pb::GetKeyRequest>,
    ) -> Result<Response<pb::GetKeyResponse>, Status> {
        let admitted = self.admit(&request)?;
        let (metadata, _, mut m) = request.into_parts();
        let cx = admitted.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
        parse::export_twins(&mut m.export, &mut m.recipient_public_key, &metadata)?;
        let command = parse::get(&m.key_id, m.version, m.export, &m.recipient_public_key)?;
        let got = self.0.keyring.get(&cx, &command).await?;
        let answer = convert::get_response(&got, m.skip_metadata.unwrap_or(false), cx.now);
        let mut response = Response::new(answer);
        let revision = got.metadata.key.record.revision.to_string();
        let mut trailers = Trailers::default().text(REVISION, &revision);
        // Old stubs cannot read the field, and ask for an export by metadata.
        if let KeyMaterialView::Plain(bytes) = &got.material
            && metadata.contains_key("polykey-export")
        {
            trailers = trailers.binary(PLAINTEXT, bytes);
        }
        response.extensions_mut().insert(trailers);
        Ok(response)
    }

    async fn list_keys(
        &self,
        request: Request<pb::ListKeysRequest>,
    ) -> Result<Response<pb::ListKeysResponse>, Status> {
        let admitted = self.admit(&request)?;
        let m = request.into_inner();
        let cx = admitted.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
        let query = parse::list(m)?;
        let page = self.0.keyring.list(&cx, &query).await?;
        Ok(Response::new(pb::ListKeysResponse {
            keys: page.keys.iter().map(convert::metadata).collect(),
            next_page_token: page.next,
            total_count: i32::try_from(page.total).unwrap_or(i32::MAX),
            filtered_count: i32::try_from(page.filtered).unwrap_or(i32::MAX),
            damaged_count: i32::try_from(page.damaged).unwrap_or(i32::MAX),
            response_timestamp: Some(convert::timestamp(cx.now)),
        }))
    }

    async fn create_key(
        &self,
        request: Request<pb::CreateKeyRequest>,
    ) -> Result<Response<pb::CreateKeyResponse>, Status> {
        let admitted = self.admit(&request)?;
        let (metadata, _, mut m) = request.into_parts();
        let cx = admitted.context(m.requester_context.as_ref(), None)?;
        parse::create_twins(&mut m, &metadata)?;
        let bytes = encoded(&m, |m| m.requester_context = None);
        let mutation = Mutation::Create(Box::new(parse::create(m, admitted.times_from())?));
        let (done, view) = self.change(&cx, &admitted, &mutation, "CreateKey", bytes).await?;
        Ok(with_revision(convert::create_response(&done, &view, cx.now), &view))
    }

    async fn rotate_key(
        &self,
        request: Request<pb::RotateKeyRequest>,
    ) -> Result<Response<pb::RotateKeyResponse>, Status> {
        let admitted = self.admit(&request)?;
        let (metadata, _, mut m) = request.into_parts();
        let cx = admitted.context(m.requester_context.as_ref(), None)?;
        parse::rotate_twins(&mut m, &metadata)?;
        let bytes = encoded(&m, |m| m.requester_context = None);
        let mutation = Mutation::Rotate(parse::rotate(m, admitted.times_from())?);
        let (done, view) = self.change(&cx, &admitted, &mutation, "RotateKey", bytes).await?;
        Ok(with_revision(convert::rotate_response(&done, &view), &view))
    }

    async fn revoke_key(
        &self,
        request: Request<pb::RevokeKeyRequest>,
    ) -> Result<Response<()>, Status> {
        let admitted = self.admit(&request)?;
        let (metadata, _, mut m) = request.into_parts();
        let cx = admitted.context(m.requester_context.as_ref(), None)?;
        parse::revision_twin(&mut m.expected_revision, &metadata)?;
        let bytes = encoded(&m, |m| m.requester_context = None);
        let mutation = Mutation::Revoke(parse::revoke(m, admitted.times_from())?);
        let (_, view) = self.change(&cx, &admitted, &mutation, "RevokeKey", bytes).await?;
        Ok(with_revision((), &view))
    }

    async fn update_key_metadata(
        &self,
        request: Request<pb::UpdateKeyMetadataRequest>,
    ) -> Result<Response<()>, Status> {
        let admitted = self.admit(&request)?;
        let (metadata, _, mut m) = request.into_parts();
        let cx = admitted.context(m.requester_context.as_ref(), None)?;
        parse::revision_twin(&mut m.expected_revision, &metadata)?;
        let bytes = encoded(&m, |m| m.requester_context = None);
        let (slow, from) = (!m.policies_to_update.is_empty(), admitted.times_from());
        let update = self.read(&cx, slow, move || parse::update(m, from)).await??;
        let mutation = Mutation::Update(Box::new(update));
        let (_, view) = self.change(&cx, &admitted, &mutation, "UpdateKeyMetadata", bytes).await?;
        Ok(with_revision((), &view))
    }

    async fn get_key_metadata(
        &self,
        request: Request<pb::GetKeyMetadataRequest>,
    ) -> Result<Response<pb::GetKeyMetadataResponse>, Status> {
        let admitted = self.admit(&request)?;
        let m = request.into_inner();
        let cx = admitted.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
        let (history, policies) = (m.include_access_history, m.include_policy_details);
        let command = parse::get_metadata(&m.key_id, m.version, history, policies)?;
        let view = self.0.keyring.metadata(&cx, &command).await?;
        Ok(with_revision(convert::metadata_response(&view, cx.now), &view))
    }

    async fn batch_get_keys(
        &self,
        request: Request<pb::BatchGetKeysRequest>,
    ) -> Result<Response<pb::BatchGetKeysResponse>, Status> {
        batch::get_keys(self, request).await.map_err(Status::from)
    }

    async fn batch_create_keys(
        &self,
        request: Request<pb::BatchCreateKeysRequest>,
    ) -> Result<Response<pb::BatchCreateKeysResponse>, Status> {
        batch::create_keys(self, request).await.map_err(Status::from)
    }

    async fn batch_rotate_keys(
        &self,
        request: Request<pb::BatchRotateKeysRequest>,
    ) -> Result<Response<pb::BatchRotateKeysResponse>, Status> {
        batch::rotate_keys(self, request).await.map_err(Status::from)
    }

    async fn batch_revoke_keys(
        &self,
        request: Request<pb::BatchRevokeKeysRequest>,
    ) -> Result<Response<pb::BatchRevokeKeysResponse>, Status> {
        batch::revoke_keys(self, request).await.map_err(Status::from)
    }

    async fn batch_update_key_metadata(
        &self,
        request: Request<pb::BatchUpdateKeyMetadataRequest>,
    ) -> Result<Response<pb::BatchUpdateKeyMetadataResponse>, Status> {
        batch::update_metadata(self, request).await.map_err(Status::from)
    }

    async fn batch_get_key_metadata(
        &self,
        request: Request<pb::BatchGetKeyMetadataRequest>,
    ) -> Result<Response<pb::BatchGetKeyMetadataResponse>, Status> {
        batch::get_metadata(self, request).await.map_err(Status::from)
    }

    type StreamGetKeysStream = Answers<pb::StreamGetKeysResponse>;

    async fn stream_get_keys(
        &self,
        request: Request<pb::StreamGetKeysRequest>,
    ) -> Result<Response<Self::StreamGetKeysStream>, Status> {
        stream::get_keys(self, request).await.map_err(Status::from)
    }

    type StreamCreateKeysStream = Answers<pb::StreamCreateKeysResponse>;

    async fn stream_create_keys(
        &self,
        request: Request<Streaming<pb::StreamCreateKeysRequest>>,
    ) -> Result<Response<Self::StreamCreateKeysStream>, Status> {
        stream::run::<stream::Create>(self, request).map_err(Status::from)
    }

    type StreamRotateKeysStream = Answers<pb::StreamRotateKeysResponse>;

    async fn stream_rotate_keys(
        &self,
        request: Request<Streaming<pb::StreamRotateKeysRequest>>,
    ) -> Result<Response<Self::StreamRotateKeysStream>, Status> {
        stream::run::<stream::Rotate>(self, request).map_err(Status::from)
    }

    type StreamRevokeKeysStream = Answers<pb::StreamRevokeKeysResponse>;

    async fn stream_revoke_keys(
        &self,
        request: Request<Streaming<pb::StreamRevokeKeysRequest>>,
    ) -> Result<Response<Self::StreamRevokeKeysStream>, Status> {
        stream::run::<stream::Revoke>(self, request).map_err(Status::from)
    }

    type StreamUpdateKeyMetadataStream = Answers<pb::StreamUpdateKeyMetadataResponse>;

    async fn stream_update_key_metadata(
        &self,
        request: Request<Streaming<pb::StreamUpdateKeyMetadataRequest>>,
    ) -> Result<Response<Self::StreamUpdateKeyMetadataStream>, Status> {
        stream::run::<stream::Update>(self, request).map_err(Status::from)
    }

    type StreamGetKeyMetadataStream = Answers<pb::StreamGetKeyMetadataResponse>;

    async fn stream_get_key_metadata(
        &self,
        request: Request<Streaming<pb::StreamGetKeyMetadataRequest>>,
    ) -> Result<Response<Self::StreamGetKeyMetadataStream>, Status> {
        stream::run::<stream::Metadata>(self, request).map_err(Status::from)
    }

    async fn authenticate(
        &self,
        request: Request<pb::AuthenticateRequest>,
    ) -> Result<Response<pb::AuthenticateResponse>, Status> {
        let admitted = self.admit(&request)?;
        let m = request.into_inner();
        let credentials =
            Credentials { client_id: &m.client_id, api_key: &m.api_key, grant_type: &m.grant_type };
        let tokens = self.0.authenticator.login(&credentials, &attempt(&admitted)).await?;
        let mut response = Response::new(pb::AuthenticateResponse {
            access_token: tokens.access,
            token_type: "Bearer".into(),
            expires_in: tokens.expires_in,
            permissions: tokens.permissions.iter().map(ToString::to_string).collect(),
            issued_at: Some(convert::timestamp(tokens.issued_at)),
            client_tier: tokens.tier,
            refresh_token: tokens.refresh.clone(),
            refresh_expires_in: tokens.refresh_expires_in,
        });
        let trailers = Trailers::default().text(REFRESH_TOKEN, &tokens.refresh);
        response.extensions_mut().insert(trailers);
        Ok(response)
    }

    async fn refresh_token(
        &self,
        request: Request<pb::RefreshTokenRequest>,
    ) -> Result<Response<pb::RefreshTokenResponse>, Status> {
        let admitted = self.admit(&request)?;
        let m = request.into_inner();
        let tokens = self.0.authenticator.refresh(&m.refresh_token, &attempt(&admitted)).await?;
        let mut response = Response::new(pb::RefreshTokenResponse {
            access_token: tokens.access,
            token_type: "Bearer".into(),
            expires_in: tokens.expires_in,
            issued_at: Some(convert::timestamp(tokens.issued_at)),
            refresh_token: tokens.refresh.clone(),
            refresh_expires_in: tokens.refresh_expires_in,
        });
        let trailers = Trailers::default().text(REFRESH_TOKEN, &tokens.refresh);
        response.extensions_mut().insert(trailers);
        Ok(response)
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenResponse>, Status> {
        let admitted = self.admit(&request)?;
        let m = request.into_inner();
        let cx = admitted.context(None, None)?;
        let token = self.0.authenticator.genuine(&m.access_token, cx.now).await?;
        if !m.client_id.is_empty() && m.client_id != token.client_id() {
            let error = Error::invalid("client_id", "the token is of another client");
            return Err(error.into());
        }
        let directory = self.0.authenticator.directory();
        let facts = match directory.client(token.client_id()).await? {
            None => return Err(Error::NotFound.into()),
            Some(client) => {
                let PrincipalFacts { client, revision: _, roles, permissions, tier, environment } =
                    directory.facts(&client).await?;
                let client = client.to_string();
                ClientFacts { client, roles, permissions, tier, environment }
            }
        };
        let permit = self.0.keyring.authorize(&cx, Resource::Client(&facts), RevokeTokens).await?;
        let decision = permit.decision_id().to_string();
        let event = cx
            .origin()
            .event(RevokeTokens::ACTION.name(), None, Outcome::Success, 0, &decision)
            .detail("client", token.client_id())
            .build();
        let revocation = self.0.authenticator.revoke(&token, event, cx.now).await?;
        Ok(Response::new(pb::RevokeTokenResponse {
            revoked: true,
            revoked_at: Some(convert::timestamp(revocation.revoked_at)),
            audit_index: revocation.receipt.leaf.unwrap_or(0),
        }))
    }
}

fn attempt(admitted: &Admitted) -> Attempt<'_> {
    Attempt {
        peer: &admitted.peer.certificate,
        address: admitted.peer.address,
        request_id: &admitted.request_id,
        now: admitted.now,
    }
}
