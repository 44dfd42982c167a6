//! From a gRPC request to a [`Context`]: who asks is already known; what it claims of itself is
//! compared with that and never grants anything.

use std::sync::Arc;

use http::Extensions;
use polykey_proto::polykey::v2 as pb;
use tonic::metadata::MetadataMap;

use crate::audit::event::CLAIMED;
use crate::audit::{Outcome, Trail};
use super::Deps;
use crate::authn::layer::Peer;
use crate::authn::session::Session;
use crate::authz::Claimed;
use crate::context::Context;
use crate::error::Error;
use crate::limits::{IDEMPOTENCY_KEY, Violations};
use crate::net::RequestId;
use crate::time::Time;

/// What the layers in front have put into a request.
#[derive(Clone)]
pub(crate) struct Admitted {
    pub(crate) session: Option<Session>,
    pub(crate) peer: Peer,
    pub(crate) request_id: Arc<str>,
    pub(crate) now: Time,
    pub(crate) idempotency_key: Option<String>,
    /// Where claims that contradict what was verified are written down.
    pub(crate) trail: Option<Arc<Trail>>,
}

impl Admitted {
    pub(crate) fn of(
        extensions: &Extensions,
        metadata: &MetadataMap,
        deps: &Deps,
    ) -> Result<Self, Error> {
        let peer = extensions.get::<Peer>().cloned().ok_or(Error::Unauthenticated)?;
        let request_id = extensions.get::<RequestId>().map_or("-", RequestId::as_str).into();
        Ok(Self {
            session: extensions.get::<Session>().cloned(),
            peer,
            request_id,
            now: deps.now(),
            idempotency_key: idempotency_key(metadata)?,
            trail: None,
        })
    }

    /// The time by which times in a request must be in the future. A repeated request may name one
    /// that has come since; the keyring checks it where the first result is not found.
    pub(crate) fn times_from(&self) -> Time {
        match self.idempotency_key {
            Some(_) => Time::default(),
            None => self.now,
        }
    }

    /// The context of one request message. The claims are compared here.
    pub(crate) fn context(
        &self,
        requester: Option<&pb::RequesterContext>,
        attributes: Option<&pb::AccessAttributes>,
    ) -> Result<Context, Error> {
        let session = self.session.as_ref().ok_or(Error::Unauthenticated)?;
        let caller = Arc::clone(&session.caller);
        let cx = Context {
            correlation_id: requester.map(|r| r.correlation_id.clone()).unwrap_or_default(),
            request_id: self.request_id.to_string(),
            peer: self.peer.address,
            now: self.now,
            claimed: claimed(requester, attributes),
            caller,
        };
        if let Some(requester) = requester {
            self.compare(&cx, requester)?;
        }
        Ok(cx)
    }

    /// Claims that contradict what was verified are refused, and that is recorded.
    fn compare(&self, cx: &Context, requester: &pb::RequesterContext) -> Result<(), Error> {
        if agrees(cx, requester) {
            return Ok(());
        }
        let decision_id = cx.facts().decision_id.to_string();
        if let Some(trail) = &self.trail {
            let event = cx
                .origin()
                .event("ClaimIdentity", None, Outcome::Denied, 7, &decision_id)
                .detail(CLAIMED, &requester.client_identity);
            trail.data_plane(event)?;
        }
        Err(Error::Denied { decision_id })
    }

    /// The same call a message later: the clock is read again and the token looked at again.
    pub(crate) async fn again(
        &self,
        deps: &Deps,
    ) -> Result<Self, Error> {
        let now = deps.now();
        let mut next = Self { now, ..self.clone() };
        if let Some(session) = &mut next.session {
            session.caller = deps.authenticator.recheck(session, now).await?;
        }
        Ok(next)
    }
}

pub(crate) fn idempotency_key(metadata: &MetadataMap) -> Result<Option<String>, Error> {
    let mut values = metadata.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    let bad = || {
        Error::invalid("idempotency-key", "must be given once, 1 to 128 printable ASCII characters")
    };
    if values.next().is_some() {
        return Err(bad());
    }
    let text = value.to_str().map_err(|_| bad())?;
    let ok = (1..=IDEMPOTENCY_KEY).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    if ok { Ok(Some(text.to_owned())) } else { Err(bad()) }
}

pub(crate) fn claimed(
    requester: Option<&pb::RequesterContext>,
    attributes: Option<&pb::AccessAttributes>,
) -> Claimed {
    let application = requester.map(|r| r.application_id.clone()).unwrap_or_default();
    match attributes {
        None => Claimed { application, ..Claimed::default() },
        Some(a) => Claimed {
            environment: a.environment.clone(),
            network_zone: a.network_zone.clone(),
            geographic_region: a.geographic_region.clone(),
            time_window: a.time_window.clone(),
            application,
            roles: a.roles.clone(),
            permissions: a.permissions.clone(),
            custom: a.custom_attributes.clone(),
        },
    }
}

/// Whether the claims agree with what was verified.
fn agrees(cx: &Context, requester: &pb::RequesterContext) -> bool {
    let pb::RequesterContext {
        client_identity,
        certificate_fingerprint,
        application_id: _,
        correlation_id: _,
        client_tier,
    } = requester;
    let fingerprint: String = certificate_fingerprint
        .chars()
        .filter(|c| *c != ':')
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let fingerprint = fingerprint.strip_prefix("sha256").unwrap_or(&fingerprint);
    (client_identity.is_empty() || client_identity == cx.caller.client_id())
        && (fingerprint.is_empty() || fingerprint == cx.caller.certificate.thumbprint_hex())
        && (*client_tier == 0 || *client_tier == cx.caller.tier)
}

/// One value of a metadata twin, text.
pub(crate) fn text<'a>(
    v: &mut Violations,
    metadata: &'a MetadataMap,
    name: &str,
) -> Option<&'a str> {
    let mut values = metadata.get_all(name).iter();
    let value = values.next()?;
    if values.next().is_some() {
        v.add(name, "must be given once");
        return None;
    }
    let text = value.to_str().ok();
    if text.is_none() {
        v.add(name, "must be printable ASCII");
    }
    text
}

/// One value of a metadata twin, bytes.
pub(crate) fn binary(v: &mut Violations, metadata: &MetadataMap, name: &str) -> Option<Vec<u8>> {
    let mut values = metadata.get_all_bin(name).iter();
    let value = values.next()?;
    if values.next().is_some() {
        v.add(name, "must be given once");
        return None;
    }
    match value.to_bytes() {
        Ok(bytes) => Some(bytes.to_vec()),
        Err(_) => {
            v.add(name, "must be base64");
            None
        }
    }
}
