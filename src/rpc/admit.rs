//! From a gRPC request to a [`Context`]: who asks is already known; what it claims of itself is
//! compared with that and never grants anything.

use std::sync::Arc;

use http::Extensions;
use polykey_proto::polykey::v2 as pb;
use tonic::metadata::MetadataMap;

use super::Deps;
use crate::audit::event::CLAIMED;
use crate::audit::{Outcome, Trail};
use crate::authn::api_key::claimed_id;
use crate::authn::layer::Peer;
use crate::authn::session::Session;
use crate::authz::{Claimed, Permission, PermissionSet};
use crate::context::Context;
use crate::error::Error;
use crate::keyring::Idempotency;
use crate::limits::{CLAIM, CLAIMS, CORRELATION_ID, IDEMPOTENCY_KEY, Violations, is_context};
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

    /// What a request is remembered by, if its caller gave it a key. Item 0 is that of single calls.
    pub(crate) fn once(
        &self,
        method: &'static str,
        item: u32,
        request: Vec<u8>,
    ) -> Option<Idempotency> {
        let key = self.idempotency_key.clone()?;
        Some(Idempotency { key, method, item, request: request.into() })
    }

    /// The context of one request message. The claims are compared here.
    pub(crate) fn context(
        &self,
        requester: Option<&pb::RequesterContext>,
        attributes: Option<&pb::AccessAttributes>,
    ) -> Result<Context, Error> {
        let session = self.session.as_ref().ok_or(Error::Unauthenticated)?;
        let caller = Arc::clone(&session.caller);
        check_claims(requester, attributes)?;
        let cx = Context {
            correlation_id: requester.map(|r| r.correlation_id.clone()).unwrap_or_default(),
            request_id: self.request_id.to_string(),
            peer: self.peer.address,
            now: self.now,
            claimed: claimed(requester, attributes),
            caller,
        };
        self.compare(&cx, requester, attributes)?;
        Ok(cx)
    }

    /// Claims that contradict what was verified are refused, and that is recorded.
    fn compare(
        &self,
        cx: &Context,
        requester: Option<&pb::RequesterContext>,
        attributes: Option<&pb::AccessAttributes>,
    ) -> Result<(), Error> {
        if requester.is_none_or(|claims| agrees(cx, claims))
            && attributes.is_none_or(|claims| attributes_agree(cx, claims))
        {
            return Ok(());
        }
        let decision_id = cx.facts().decision_id.to_string();
        if let Some(trail) = &self.trail {
            let event =
                cx.origin().event("ClaimIdentity", None, Outcome::Denied, 7, &decision_id).detail(
                    CLAIMED,
                    requester.map_or("", |claims| claimed_id(&claims.client_identity)),
                );
            trail.data_plane(event)?;
        }
        Err(Error::Denied { decision_id })
    }

    /// The same call a message later: the clock is read again and the token looked at again.
    pub(crate) async fn again(&self, deps: &Deps) -> Result<Self, Error> {
        let now = deps.now();
        let mut next = Self { now, ..self.clone() };
        if let Some(session) = &mut next.session {
            session.caller = deps.authenticator.recheck(session, now).await?;
        }
        Ok(next)
    }
}

impl Admitted {
    /// As [`Self::again`], for one answer that may take longer than the token lasts.
    pub(crate) async fn still(&self, deps: &Deps) -> Result<Self, Error> {
        let mut next = Self { now: deps.now(), ..self.clone() };
        if let Some(session) = &mut next.session {
            session.caller = deps.authenticator.recheck_begun(session).await?;
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

/// Every claim has a bound: they go into audit events, and policies read them.
fn check_claims(
    requester: Option<&pb::RequesterContext>,
    attributes: Option<&pb::AccessAttributes>,
) -> Result<(), Error> {
    let mut v = Violations::new();
    if let Some(requester) = requester {
        let pb::RequesterContext {
            client_identity,
            certificate_fingerprint,
            application_id,
            correlation_id,
            client_tier,
        } = requester;
        let mut check = |ok: bool, name: &str, text: &str| {
            v.check(ok, &format!("requester_context.{name}"), text);
        };
        let identity = client_identity.is_empty() || is_context(client_identity);
        check(identity, "client_identity", "must match ^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,255}$");
        let digits = fingerprint_digits(certificate_fingerprint);
        let hex = digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let fingerprint = certificate_fingerprint.is_empty() || hex;
        check(fingerprint, "certificate_fingerprint", "must be 64 hexadecimal digits");
        let application = application_id.len() <= CLAIM;
        check(application, "application_id", "must have at most 256 bytes");
        let correlation = correlation_id.len() <= CORRELATION_ID;
        check(correlation, "correlation_id", "must have at most 128 bytes");
        let tier = polykey_proto::common::v2::ClientTier::try_from(*client_tier).is_ok();
        check(tier, "client_tier", "must be CLIENT_TIER_FREE, PRO or ENTERPRISE");
    }
    if let Some(attributes) = attributes {
        check_attributes(&mut v, attributes);
    }
    v.finish()
}

/// Checks attributes as a request carries them in the field `attributes`.
pub(crate) fn check_attributes(v: &mut Violations, attributes: &pb::AccessAttributes) {
    let pb::AccessAttributes {
        environment,
        network_zone,
        geographic_region,
        request_time,
        time_window,
        roles,
        permissions,
        custom_attributes,
    } = attributes;
    for (name, text) in [
        ("environment", environment),
        ("network_zone", network_zone),
        ("geographic_region", geographic_region),
        ("time_window", time_window),
    ] {
        let field = format!("attributes.{name}");
        v.check(text.len() <= CLAIM, &field, "must have at most 256 bytes");
    }
    super::parse::time(v, "attributes.request_time", request_time.as_ref());
    for (name, list) in [("roles", roles), ("permissions", permissions)] {
        let ok = list.len() <= CLAIMS && list.iter().all(|text| (1..=CLAIM).contains(&text.len()));
        let field = format!("attributes.{name}");
        v.check(ok, &field, "must have at most 50 entries of 1 to 256 bytes");
    }
    let short = |text: &String| text.len() <= CLAIM;
    let ok = custom_attributes.len() <= CLAIMS
        && custom_attributes.iter().all(|(name, value)| short(name) && short(value));
    let bounds = "must have at most 50 entries of 256 bytes each";
    v.check(ok, "attributes.custom_attributes", bounds);
}

fn fingerprint_digits(text: &str) -> String {
    let digits: String =
        text.chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect();
    digits.strip_prefix("sha256").map(str::to_owned).unwrap_or(digits)
}

/// Roles and permissions that the client does not have are false claims like any other.
fn attributes_agree(cx: &Context, attributes: &pb::AccessAttributes) -> bool {
    let facts = &cx.caller.facts;
    attributes.roles.iter().all(|role| facts.roles.contains(role))
        && attributes.permissions.iter().all(|name| match name.as_str() {
            "*" => facts.permissions.contains_all(PermissionSet::all()),
            name => Permission::parse(name).is_some_and(|p| facts.permissions.contains(p)),
        })
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
    let fingerprint = fingerprint_digits(certificate_fingerprint);
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
