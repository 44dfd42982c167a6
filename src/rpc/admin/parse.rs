//! Requests of the administration to domain values: every field is checked, and all that is wrong
//! is said at once.

use std::time::Duration;

use polykey_proto::polykey::v2 as pb;

use crate::authn::certificate::CertificateIdentity;
use crate::authz::PermissionSet;
use crate::directory::{
    ClientFilter, ClientState, ClientUpdate, MAX_IDENTITIES, MAX_PERMISSIONS, MAX_ROLES, NewClient,
    is_client_id, is_role_name,
};
use crate::error::Error;
use crate::limits::{self, Violations};
use crate::rpc::parse::{future, key_name, time};
use crate::time::Time;

const NAME: usize = 256;
const ENVIRONMENT: usize = 128;
/// Longest that old API keys work beside a new one, in seconds: 30 days.
const OVERLAP: i32 = 2_592_000;
/// Validity of a certificate, in seconds: a minute to 400 days, and 30 days if nothing is said.
const VALIDITY: std::ops::RangeInclusive<i64> = 60..=34_560_000;
const VALIDITY_DEFAULT: i64 = 2_592_000;
/// Bytes of a signing request.
const REQUEST: usize = 16 * 1024;

/// The id of a client.
pub(super) fn client_id(v: &mut Violations, id: &str) {
    v.check(is_client_id(id), "client_id", "must match ^[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,127}$");
}

fn plain(v: &mut Violations, field: &str, text: &str, longest: usize) {
    if text.len() > longest || text.chars().any(char::is_control) {
        v.add(field, format!("must have at most {longest} bytes, no control characters"));
    }
}

fn roles(v: &mut Violations, field: &str, names: &[String]) {
    v.check(names.len() <= MAX_ROLES, field, "must have at most 20 entries");
    for (i, name) in names.iter().enumerate().take(MAX_ROLES) {
        if !is_role_name(name) {
            v.add(format!("{field}[{i}]"), "must match ^[a-z][a-z0-9_-]{0,63}$");
        }
    }
}

/// Names of permissions.
pub(super) fn permissions(v: &mut Violations, field: &str, names: &[String]) {
    v.check(names.len() <= MAX_PERMISSIONS, field, "must have at most 100 entries");
    for (i, name) in names.iter().enumerate().take(MAX_PERMISSIONS) {
        if PermissionSet::parse([name.as_str()]).is_err() {
            let text = format!("there is no permission {}", limits::shown(name));
            v.add(format!("{field}[{i}]"), text);
        }
    }
}

/// Certificate identities.
fn identities(
    v: &mut Violations,
    field: &str,
    list: &[pb::CertificateIdentity],
) -> Vec<CertificateIdentity> {
    v.check(list.len() <= MAX_IDENTITIES, field, "must have at most 20 entries");
    let mut found = Vec::new();
    for (i, identity) in list.iter().enumerate().take(MAX_IDENTITIES) {
        use pb::CertificateIdentityKind as Kind;
        let value = identity.value.as_str();
        let parsed = match identity.kind() {
            Kind::SpiffeUri => CertificateIdentity::spiffe(value),
            Kind::Dns => CertificateIdentity::dns(value),
            Kind::CommonName => CertificateIdentity::common_name(value),
            Kind::SpkiSha256 => CertificateIdentity::spki_sha256(value),
            Kind::Unspecified => {
                v.add(format!("{field}[{i}].kind"), "must be one of the kinds there are");
                continue;
            }
        };
        match parsed {
            Ok(identity) if found.contains(&identity) => {
                v.add(format!("{field}[{i}]"), "stands there twice");
            }
            Ok(identity) => found.push(identity),
            Err(error) => v.add(format!("{field}[{i}].value"), error.to_string()),
        }
    }
    found
}

/// A client to be added.
pub(super) fn new_client(m: pb::CreateClientRequest, now: Time) -> Result<NewClient, Error> {
    let mut v = Violations::new();
    client_id(&mut v, &m.client_id);
    plain(&mut v, "name", &m.name, NAME);
    limits::description(&mut v, "description", &m.description);
    plain(&mut v, "environment", &m.environment, ENVIRONMENT);
    v.check((0..=3).contains(&m.tier), "tier", "must be FREE, PRO or ENTERPRISE");
    roles(&mut v, "roles", &m.roles);
    permissions(&mut v, "permissions", &m.permissions);
    v.check(!m.identities.is_empty(), "identities", "must have 1 to 20 entries");
    let identities = identities(&mut v, "identities", &m.identities);
    let expires = future(&mut v, "api_key_expires_at", m.api_key_expires_at.as_ref(), now);
    if m.without_api_key && m.api_key_expires_at.is_some() {
        v.add("api_key_expires_at", "must be absent when no API key is made");
    }
    v.finish()?;
    Ok(NewClient {
        id: m.client_id,
        name: m.name,
        description: m.description,
        environment: m.environment,
        tier: m.tier,
        roles: m.roles,
        permissions: m.permissions,
        identities,
        without_api_key: m.without_api_key,
        api_key_expires_at: expires,
    })
}

/// A change of a client.
pub(super) fn client_update(m: pb::UpdateClientRequest) -> Result<ClientUpdate, Error> {
    let mut v = Violations::new();
    client_id(&mut v, &m.client_id);
    if let Some(name) = &m.name {
        plain(&mut v, "name", name, NAME);
    }
    if let Some(text) = &m.description {
        limits::description(&mut v, "description", text);
    }
    if let Some(text) = &m.environment {
        plain(&mut v, "environment", text, ENVIRONMENT);
    }
    let tier_ok = m.tier.is_none_or(|tier| (1..=3).contains(&tier));
    v.check(tier_ok, "tier", "must be FREE, PRO or ENTERPRISE");
    roles(&mut v, "roles_to_add", &m.roles_to_add);
    roles(&mut v, "roles_to_remove", &m.roles_to_remove);
    permissions(&mut v, "permissions_to_add", &m.permissions_to_add);
    permissions(&mut v, "permissions_to_remove", &m.permissions_to_remove);
    let both = |add: &[String], remove: &[String]| add.iter().any(|name| remove.contains(name));
    let twice = "adds and removes the same entry";
    v.check(!both(&m.roles_to_add, &m.roles_to_remove), "roles_to_add", twice);
    v.check(!both(&m.permissions_to_add, &m.permissions_to_remove), "permissions_to_add", twice);
    let identities_to_add = identities(&mut v, "identities_to_add", &m.identities_to_add);
    let identities_to_remove = identities(&mut v, "identities_to_remove", &m.identities_to_remove);
    let twice_identity = identities_to_add.iter().any(|i| identities_to_remove.contains(i));
    v.check(!twice_identity, "identities_to_add", twice);
    v.finish()?;
    Ok(ClientUpdate {
        name: m.name,
        description: m.description,
        environment: m.environment,
        tier: m.tier,
        roles_to_add: m.roles_to_add,
        roles_to_remove: m.roles_to_remove,
        permissions_to_add: m.permissions_to_add,
        permissions_to_remove: m.permissions_to_remove,
        identities_to_add,
        identities_to_remove,
    })
}

/// Which clients a list shows.
pub(super) fn client_filter(v: &mut Violations, role: String, state: i32) -> ClientFilter {
    v.check(role.is_empty() || is_role_name(&role), "role", "must match ^[a-z][a-z0-9_-]{0,63}$");
    let state = match pb::ClientState::try_from(state) {
        Ok(pb::ClientState::Unspecified) => None,
        Ok(pb::ClientState::Enabled) => Some(ClientState::Enabled),
        Ok(pb::ClientState::Disabled) => Some(ClientState::Disabled),
        Ok(pb::ClientState::Removed) => Some(ClientState::Removed),
        Err(_) => {
            v.add("state", "must be one of the states there are");
            None
        }
    };
    ClientFilter { role: (!role.is_empty()).then_some(role), state }
}

/// The overlap of API keys and the end of the new one.
pub(super) fn rotation(
    m: &pb::RotateClientApiKeyRequest,
    now: Time,
) -> Result<(Duration, Option<Time>), Error> {
    let mut v = Violations::new();
    client_id(&mut v, &m.client_id);
    let overlap = u64::try_from(m.overlap_seconds).unwrap_or(u64::MAX);
    let ok = (0..=OVERLAP).contains(&m.overlap_seconds);
    v.check(ok, "overlap_seconds", "must be 0 to 2592000");
    let expires = future(&mut v, "expires_at", m.expires_at.as_ref(), now);
    v.finish()?;
    Ok((Duration::from_secs(overlap), expires))
}

/// How long a certificate is valid, in seconds.
pub(super) fn certificate(m: &pb::IssueCertificateRequest) -> Result<u64, Error> {
    let mut v = Violations::new();
    client_id(&mut v, &m.client_id);
    v.check(m.csr_pem.len() <= REQUEST, "csr_pem", "must have at most 16384 bytes");
    let seconds = if m.validity_seconds == 0 { VALIDITY_DEFAULT } else { m.validity_seconds };
    v.check(VALIDITY.contains(&seconds), "validity_seconds", "must be 60 to 34560000, or 0");
    v.finish()?;
    Ok(u64::try_from(seconds).unwrap_or_default())
}

/// A role's name.
pub(super) fn role_name(v: &mut Violations, name: &str) {
    v.check(is_role_name(name), "name", "must match ^[a-z][a-z0-9_-]{0,63}$");
    v.check(crate::authz::built_in(name).is_none(), "name", "is the name of a built-in role");
}

/// The number of entries of a page.
pub(super) fn page_size(v: &mut Violations, size: i32) -> usize {
    let size = u32::try_from(size).unwrap_or(u32::MAX);
    v.check(size <= limits::PAGE, "page_size", "must be 0 (100) to 1000");
    (if size == 0 { limits::PAGE_DEFAULT } else { size.min(limits::PAGE) }) as usize
}

/// Which audit events, and the key they must be of, which is still to be resolved.
pub(super) fn audit_filter(
    v: &mut Violations,
    filter: Option<&pb::AuditFilter>,
) -> (crate::audit::Filter, Option<crate::key::KeyName>) {
    use crate::audit::{Filter, Outcome};
    let Some(m) = filter else { return (Filter::default(), None) };
    let since = time(v, "filter.since", m.since.as_ref());
    let until = time(v, "filter.until", m.until.as_ref());
    v.check(m.client_id.len() <= 256, "filter.client_id", "must have at most 256 bytes");
    v.check(m.action.len() <= 128, "filter.action", "must have at most 128 bytes");
    let star = m.action.strip_suffix('*').unwrap_or(&m.action);
    v.check(!star.contains('*'), "filter.action", "may have `*` at its end only");
    let key = (!m.key_id.is_empty()).then(|| key_name(v, "filter.key_id", &m.key_id));
    let outcome = match pb::AuditOutcome::try_from(m.outcome) {
        Ok(pb::AuditOutcome::Unspecified) => None,
        Ok(pb::AuditOutcome::Success) => Some(Outcome::Success),
        Ok(pb::AuditOutcome::Denied) => Some(Outcome::Denied),
        Ok(pb::AuditOutcome::Failed) => Some(Outcome::Failed),
        Err(_) => {
            v.add("filter.outcome", "must be one of the outcomes there are");
            None
        }
    };
    let (client, action) = (m.client_id.clone(), m.action.clone());
    v.check(m.value_hash.len() <= 256, "filter.value_hash", "must have at most 256 bytes");
    let value_hash = m.value_hash.clone();
    (Filter { since, until, client, action, key: None, outcome, value_hash }, key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(error: Error) -> Vec<String> {
        let Error::Invalid(violations) = error else { panic!("{error:?}") };
        violations.into_iter().map(|v| v.field).collect()
    }

    #[test]
    fn every_bad_field_of_a_new_client_is_named() {
        let bad = pb::CreateClientRequest {
            client_id: "a/b".into(),
            name: "x".repeat(257),
            description: "x".repeat(1025),
            environment: "a\nb".into(),
            tier: 9,
            roles: vec!["Admin".into()],
            permissions: vec!["keys:read".into(), "keys:fly".into()],
            identities: vec![
                pb::CertificateIdentity { kind: 0, value: "x".into() },
                pb::CertificateIdentity { kind: 2, value: "*.x".into() },
            ],
            without_api_key: true,
            api_key_expires_at: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
        };
        let found = fields(new_client(bad, Time::from_seconds(100)).unwrap_err());
        let expected = [
            "client_id",
            "name",
            "description",
            "environment",
            "tier",
            "roles[0]",
            "permissions[1]",
            "identities[0].kind",
            "identities[1].value",
            "api_key_expires_at",
            "api_key_expires_at",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn limits_hold_at_their_edges() {
        let seconds = |validity_seconds| {
            let client_id = "a".into();
            certificate(&pb::IssueCertificateRequest {
                client_id,
                validity_seconds,
                ..Default::default()
            })
        };
        assert_eq!(seconds(0).unwrap(), 2_592_000);
        for (n, ok) in
            [(59, false), (60, true), (34_560_000, true), (34_560_001, false), (-1, false)]
        {
            assert_eq!(seconds(n).is_ok(), ok, "{n}");
        }
        let size = |n| {
            let mut v = Violations::new();
            let size = page_size(&mut v, n);
            v.finish().map(|()| size)
        };
        assert_eq!(size(0).unwrap(), 100);
        for (n, ok) in [(-1, false), (1, true), (1000, true), (1001, false)] {
            assert_eq!(size(n).is_ok(), ok, "{n}");
        }
        let overlap = |overlap_seconds| {
            let client_id = "a".into();
            let m = pb::RotateClientApiKeyRequest { client_id, overlap_seconds, expires_at: None };
            rotation(&m, Time::from_seconds(0))
        };
        for (n, ok) in [(-1, false), (0, true), (2_592_000, true), (2_592_001, false)] {
            assert_eq!(overlap(n).is_ok(), ok, "{n}");
        }
    }
}
