//! Clients: who they are, and adding, changing and removing them.

use std::sync::Arc;

use polykey_proto::polykey::v2 as pb;
use tonic::Request;

use super::{AdminService, commands, event, page, parse, settled};
use crate::authn::certificate::{self, CertificateIdentity};
use crate::authz::{Action, ClientFacts, Command, PermissionSet, PrincipalFacts, Resource};
use crate::context::Context;
use crate::directory::{ApiKeyInfo, Changed, Client, ClientState, Logins};
use crate::error::{Error, Reason};
use crate::keyring::Idempotency;
use crate::limits::Violations;
use crate::rpc::convert::timestamp;
use crate::time::Time;

/// A client that is acted on: its record, if there is one, and what decisions see of it.
pub(super) struct Subject {
    pub(super) client: Option<Arc<Client>>,
    pub(super) facts: ClientFacts,
}

impl Subject {
    /// The client. Asked only after authorization: whoever may not know of clients gets the same
    /// refusal for one that does not exist.
    pub(super) fn known(&self) -> Result<&Arc<Client>, Error> {
        self.client.as_ref().ok_or(Error::NotFound)
    }
}

enum Edit {
    Disable,
    Enable,
    Remove,
}

impl AdminService {
    pub(super) async fn subject(&self, id: &str) -> Result<Subject, Error> {
        let client = self.directory().client(id).await?;
        let facts = match &client {
            None => ClientFacts {
                client: id.to_owned(),
                roles: Vec::new(),
                permissions: PermissionSet::EMPTY,
                tier: String::new(),
                environment: String::new(),
            },
            Some(client) => {
                let PrincipalFacts { client, revision: _, roles, permissions, tier, environment } =
                    self.directory().facts(client).await?;
                ClientFacts { client: client.to_string(), roles, permissions, tier, environment }
            }
        };
        Ok(Subject { client, facts })
    }

    /// What roles and permissions of these names come to. Unknown roles give nothing: the change
    /// itself refuses them.
    async fn granted(&self, roles: &[String], names: &[String]) -> Result<PermissionSet, Error> {
        let mut set = PermissionSet::parse(names.iter().map(String::as_str))
            .map_err(|unknown| Error::invalid("permissions", unknown.to_string()))?;
        for name in roles {
            if let Some(role) = self.directory().role(name).await? {
                set = set.union(role.set);
            }
        }
        Ok(set)
    }

    pub(super) async fn who_am_i(
        &self,
        request: Request<pb::WhoAmIRequest>,
    ) -> Result<pb::WhoAmIResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        let caller = &cx.caller;
        let client = self.directory().client(caller.client_id()).await?;
        let client = client.ok_or(Error::Unauthenticated)?;
        let common_name = self.0.admin.config.listen.allow_common_name;
        let identity = certificate::matches(&client.identities, &caller.certificate, common_name);
        let mut roles = caller.facts.roles.clone();
        roles.sort_unstable();
        let mut permissions: Vec<String> =
            caller.facts.permissions.iter().map(|p| p.name().to_owned()).collect();
        permissions.sort_unstable();
        let expires = i64::try_from(caller.certificate.not_after()).unwrap_or(i64::MAX);
        Ok(pb::WhoAmIResponse {
            client_id: client.id.clone(),
            name: client.name.clone(),
            tier: caller.tier,
            roles,
            permissions,
            environment: caller.facts.environment.clone(),
            certificate_sha256: caller.certificate.thumbprint_hex(),
            certificate_expires_at: Some(timestamp(Time::from_seconds(expires))),
            token_expires_at: Some(timestamp(caller.token_expires_at)),
            identity: identity.map(shown_identity),
            node_id: data_encoding::HEXLOWER.encode(&self.directory().vault().node_id()),
        })
    }

    pub(super) async fn create_client(
        &self,
        request: Request<pb::CreateClientRequest>,
    ) -> Result<pb::CreateClientResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "CreateClient", &m);
        let new = parse::new_client(m, cx.now)?;
        let tier = if new.tier == 0 { 1 } else { new.tier };
        let facts = ClientFacts {
            client: new.id.clone(),
            roles: new.roles.clone(),
            permissions: self.granted(&new.roles, &new.permissions).await?,
            tier: tier_name(tier).to_owned(),
            environment: new.environment.clone(),
        };
        let assigns = !(new.roles.is_empty() && new.permissions.is_empty());
        let command = commands::CreateClient { assigns };
        let decision = self.authorize(&cx, Resource::Client(&facts), command).await?;
        if self.repeated(&cx, key.as_ref()).await? {
            // Its API key was shown once and is not known any more.
            let client = self.directory().client(&new.id).await?.ok_or(Error::NotFound)?;
            let client = Some(self.record(&client, cx.now).await?);
            return Ok(pb::CreateClientResponse { client, ..Default::default() });
        }
        let event = event(&cx, Action::CreateClient, decision, &[("client", &new.id)]);
        let mut change = self.change(&cx, event, 0, key.as_ref(), &new.id);
        change.expected = None;
        let (changed, api_key) = self.directory().create_client(&new, &change).await?;
        Ok(pb::CreateClientResponse {
            client: Some(self.changed_record(&changed, cx.now).await),
            api_key: api_key.map(|key| key.reveal().to_owned()).unwrap_or_default(),
            audit_index: changed.receipt.leaf.unwrap_or(0),
        })
    }

    pub(super) async fn get_client(
        &self,
        request: Request<pb::GetClientRequest>,
    ) -> Result<pb::GetClientResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        parse::client_id(&mut v, &m.client_id);
        v.finish()?;
        let subject = self.subject(&m.client_id).await?;
        let resource = Resource::Client(&subject.facts);
        let decision = self.authorize(&cx, resource, commands::ReadClient).await?;
        let client = Some(self.record(subject.known()?, cx.now).await?);
        self.seen(&cx, Action::ReadClient, decision, &[("client", &m.client_id)]).await?;
        Ok(pb::GetClientResponse { client })
    }

    pub(super) async fn list_clients(
        &self,
        request: Request<pb::ListClientsRequest>,
    ) -> Result<pb::ListClientsResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let size = parse::page_size(&mut v, m.page_size);
        let same = format!("{} {}", m.state, m.role);
        let filter = parse::client_filter(&mut v, m.role, m.state);
        v.finish()?;
        let vault = self.directory().vault();
        let after = page::last_name(vault, "clients", &same, &m.page_token)?;
        self.look(&cx, commands::ListClients, &[]).await?;
        let mut clients = self.directory().clients(&filter, after.as_deref(), size + 1).await?;
        let more = clients.len() > size;
        clients.truncate(size);
        let next_page_token = match clients.last() {
            Some(last) if more => page::token(vault, "clients", &same, last.id.as_bytes()),
            _ => String::new(),
        };
        let mut records = Vec::with_capacity(clients.len());
        for client in &clients {
            records.push(self.record(client, cx.now).await?);
        }
        Ok(pb::ListClientsResponse { clients: records, next_page_token })
    }

    pub(super) async fn update_client(
        &self,
        request: Request<pb::UpdateClientRequest>,
    ) -> Result<pb::UpdateClientResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "UpdateClient", &m);
        let expected = m.expected_revision;
        let (client, audit_index) =
            settled!(expected, self.try_update(&cx, m.clone(), key.as_ref()))?;
        Ok(pb::UpdateClientResponse { client: Some(client), audit_index })
    }

    async fn try_update(
        &self,
        cx: &Context,
        m: pb::UpdateClientRequest,
        key: Option<&Idempotency>,
    ) -> Result<(pb::ClientRecord, u64), Error> {
        let (id, expected) = (m.client_id.clone(), m.expected_revision);
        let update = parse::client_update(m)?;
        let mut subject = self.subject(&id).await?;
        let authority = [
            &update.roles_to_add,
            &update.roles_to_remove,
            &update.permissions_to_add,
            &update.permissions_to_remove,
        ];
        let assigns = authority.iter().any(|names| !names.is_empty());
        let describes = update.name.is_some()
            || update.description.is_some()
            || update.environment.is_some()
            || update.tier.is_some()
            || !update.identities_to_add.is_empty()
            || !update.identities_to_remove.is_empty();
        // What it had and what it gets: taking from somebody mightier is refused as well.
        let gained = self.granted(&update.roles_to_add, &update.permissions_to_add).await?;
        subject.facts.permissions = subject.facts.permissions.union(gained);
        let resource = Resource::Client(&subject.facts);
        let (action, decision) = if assigns && !describes {
            let command = commands::AssignRoles;
            (Action::AssignRoles, self.authorize(cx, resource, command).await?)
        } else {
            let command = commands::UpdateClient { assigns };
            (Action::UpdateClient, self.authorize(cx, resource, command).await?)
        };
        let client = subject.known()?;
        if self.repeated(cx, key).await? {
            return Ok((self.record(client, cx.now).await?, 0));
        }
        let joined = |names: &[String]| names.join(",");
        let mut details = vec![("client", id.clone())];
        let names = ["roles_added", "roles_removed", "permissions_added", "permissions_removed"];
        for (name, list) in names.iter().zip(authority) {
            if !list.is_empty() {
                details.push((name, joined(list)));
            }
        }
        let details: Vec<(&str, &str)> = details.iter().map(|(k, v)| (*k, v.as_str())).collect();
        let event = event(cx, action, decision, &details);
        let change = self.change(cx, event, expected.unwrap_or(client.revision), key, &id);
        let changed = self.directory().update_client(&id, &update, &change).await?;
        Ok(self.done(cx, &changed).await)
    }

    pub(super) async fn disable_client(
        &self,
        request: Request<pb::DisableClientRequest>,
    ) -> Result<pb::DisableClientResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "DisableClient", &m);
        let (id, expected) = (m.client_id, m.expected_revision);
        let command = || commands::DisableClient;
        let (client, audit_index) =
            self.edit(&cx, &id, expected, &Edit::Disable, command, key).await?;
        Ok(pb::DisableClientResponse { client: Some(client), audit_index })
    }

    pub(super) async fn enable_client(
        &self,
        request: Request<pb::EnableClientRequest>,
    ) -> Result<pb::EnableClientResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "EnableClient", &m);
        let (id, expected) = (m.client_id, m.expected_revision);
        let command = || commands::EnableClient;
        let (client, audit_index) =
            self.edit(&cx, &id, expected, &Edit::Enable, command, key).await?;
        Ok(pb::EnableClientResponse { client: Some(client), audit_index })
    }

    pub(super) async fn remove_client(
        &self,
        request: Request<pb::RemoveClientRequest>,
    ) -> Result<pb::RemoveClientResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "RemoveClient", &m);
        let (id, expected) = (m.client_id, m.expected_revision);
        let command = || commands::RemoveClient;
        let (client, audit_index) =
            self.edit(&cx, &id, expected, &Edit::Remove, command, key).await?;
        Ok(pb::RemoveClientResponse { client: Some(client), audit_index })
    }

    async fn edit<C: Command>(
        &self,
        cx: &Context,
        id: &str,
        expected: Option<u64>,
        edit: &Edit,
        command: impl Fn() -> C,
        key: Option<Idempotency>,
    ) -> Result<(pb::ClientRecord, u64), Error> {
        let mut v = Violations::new();
        parse::client_id(&mut v, id);
        v.finish()?;
        settled!(expected, self.try_edit(cx, id, expected, edit, command(), key.as_ref()))
    }

    async fn try_edit<C: Command>(
        &self,
        cx: &Context,
        id: &str,
        expected: Option<u64>,
        edit: &Edit,
        command: C,
        key: Option<&Idempotency>,
    ) -> Result<(pb::ClientRecord, u64), Error> {
        let subject = self.subject(id).await?;
        let decision = self.authorize(cx, Resource::Client(&subject.facts), command).await?;
        let client = subject.known()?;
        if self.repeated(cx, key).await? {
            return Ok((self.record(client, cx.now).await?, 0));
        }
        let event = event(cx, C::ACTION, decision, &[("client", id)]);
        let change = self.change(cx, event, expected.unwrap_or(client.revision), key, id);
        let directory = self.directory();
        let changed = match edit {
            Edit::Disable => directory.disable_client(id, &change).await?,
            Edit::Enable => directory.enable_client(id, &change).await?,
            Edit::Remove => directory.remove_client(id, &change).await?,
        };
        Ok(self.done(cx, &changed).await)
    }

    pub(super) async fn rotate_client_api_key(
        &self,
        request: Request<pb::RotateClientApiKeyRequest>,
    ) -> Result<pb::RotateClientApiKeyResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "RotateClientApiKey", &m);
        settled!(None::<u64>, self.try_rotate(&cx, &m, key.as_ref()))
    }

    async fn try_rotate(
        &self,
        cx: &Context,
        m: &pb::RotateClientApiKeyRequest,
        key: Option<&Idempotency>,
    ) -> Result<pb::RotateClientApiKeyResponse, Error> {
        let (overlap, expires) = parse::rotation(m, cx.now)?;
        let id = m.client_id.as_str();
        let subject = self.subject(id).await?;
        let resource = Resource::Client(&subject.facts);
        let decision = self.authorize(cx, resource, commands::RotateApiKey).await?;
        let client = subject.known()?;
        if self.repeated(cx, key).await? {
            // The new key was shown once and is not known any more: what is known of it is told.
            let logins = self.directory().logins(client).await?;
            let last = logins.by_api_key.last().copied().flatten();
            let info = client.api_keys.last().map(|key| shown_key(key, last));
            return Ok(pb::RotateClientApiKeyResponse { info, ..Default::default() });
        }
        let event = event(cx, Action::RotateApiKey, decision, &[("client", id)]);
        let change = self.change(cx, event, client.revision, key, id);
        let rotated = self.directory().rotate_api_key(id, overlap, expires, &change).await?;
        let prefix = rotated.api_key.prefix();
        let info = rotated.changed.client.api_keys.iter().find(|key| key.prefix == prefix);
        Ok(pb::RotateClientApiKeyResponse {
            api_key: rotated.api_key.reveal().to_owned(),
            info: info.map(|key| shown_key(key, None)),
            old_keys_expire_at: rotated.old_keys_expire_at.map(timestamp),
            audit_index: rotated.changed.receipt.leaf.unwrap_or(0),
        })
    }

    pub(super) async fn revoke_client_tokens(
        &self,
        request: Request<pb::RevokeClientTokensRequest>,
    ) -> Result<pb::RevokeClientTokensResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "RevokeClientTokens", &m);
        let mut v = Violations::new();
        parse::client_id(&mut v, &m.client_id);
        v.finish()?;
        settled!(None::<u64>, self.try_revoke(&cx, &m.client_id, key.as_ref()))
    }

    async fn try_revoke(
        &self,
        cx: &Context,
        id: &str,
        key: Option<&Idempotency>,
    ) -> Result<pb::RevokeClientTokensResponse, Error> {
        let subject = self.subject(id).await?;
        let resource = Resource::Client(&subject.facts);
        let decision = self.authorize(cx, resource, commands::RevokeTokens).await?;
        let client = subject.known()?;
        if client.state == ClientState::Removed {
            return Err(Error::State(Reason::ClientState));
        }
        if self.repeated(cx, key).await? {
            return Ok(pb::RevokeClientTokensResponse {
                revoked_before: Some(timestamp(client.tokens_valid_from)),
                audit_index: 0,
            });
        }
        let event = event(cx, Action::RevokeToken, decision, &[("client", id)]);
        let change = self.change(cx, event, client.revision, key, id);
        let (changed, from) = self.directory().revoke_client_tokens(id, &change).await?;
        Ok(pb::RevokeClientTokensResponse {
            revoked_before: Some(timestamp(from)),
            audit_index: changed.receipt.leaf.unwrap_or(0),
        })
    }
    async fn done(&self, cx: &Context, changed: &Changed) -> (pb::ClientRecord, u64) {
        let record = self.changed_record(changed, cx.now).await;
        (record, changed.receipt.leaf.unwrap_or(0))
    }

    /// A client as it is shown.
    async fn record(&self, client: &Client, now: Time) -> Result<pb::ClientRecord, Error> {
        Ok(record(client, &self.directory().logins(client).await?, now))
    }

    /// As [`Self::record`], after a change: what is done must not look as if it had failed.
    async fn changed_record(&self, changed: &Changed, now: Time) -> pb::ClientRecord {
        let client = &changed.client;
        let logins = self.directory().logins(client).await.unwrap_or_else(|error| {
            tracing::warn!(client_id = client.id, %error, "cannot tell when the client logged in");
            Logins::default()
        });
        record(client, &logins, now)
    }
}

fn tier_name(tier: i32) -> &'static str {
    match tier {
        1 => "free",
        2 => "pro",
        3 => "enterprise",
        _ => "",
    }
}

/// An identity as it is shown.
pub(super) fn shown_identity(identity: &CertificateIdentity) -> pb::CertificateIdentity {
    use pb::CertificateIdentityKind as Kind;
    let (kind, value) = match identity {
        CertificateIdentity::SpiffeUri(uri) => (Kind::SpiffeUri, uri.clone()),
        CertificateIdentity::Dns(name) => (Kind::Dns, name.clone()),
        CertificateIdentity::CommonName(name) => (Kind::CommonName, name.clone()),
        CertificateIdentity::SpkiSha256(hash) => {
            (Kind::SpkiSha256, data_encoding::HEXLOWER.encode(hash))
        }
    };
    pb::CertificateIdentity { kind: kind.into(), value }
}

fn shown_key(key: &ApiKeyInfo, last: Option<Time>) -> pb::ApiKeyInfo {
    pb::ApiKeyInfo {
        key_prefix: key.prefix.clone(),
        created_at: Some(timestamp(key.created_at)),
        expires_at: key.expires_at.map(timestamp),
        last_used_at: last.map(timestamp),
    }
}

fn record(client: &Client, logins: &Logins, now: Time) -> pb::ClientRecord {
    let state = match client.state {
        ClientState::Enabled => pb::ClientState::Enabled,
        ClientState::Disabled => pb::ClientState::Disabled,
        ClientState::Removed => pb::ClientState::Removed,
    };
    let last = logins.by_api_key.iter().copied().chain(std::iter::repeat(None));
    let keys = client.api_keys.iter().zip(last);
    let works = keys.filter(|(key, _)| key.expires_at.is_none_or(|at| at > now));
    pb::ClientRecord {
        client_id: client.id.clone(),
        name: client.name.clone(),
        description: client.description.clone(),
        environment: client.environment.clone(),
        tier: client.tier,
        roles: client.roles.clone(),
        permissions: client.permissions.clone(),
        identities: client.identities.iter().map(shown_identity).collect(),
        state: state.into(),
        created_at: Some(timestamp(client.created_at)),
        updated_at: Some(timestamp(client.updated_at)),
        last_used_at: logins.last.map(timestamp),
        api_keys: works.map(|(key, last)| shown_key(key, last)).collect(),
        revision: client.revision,
        created_by: client.created_by.clone(),
    }
}
