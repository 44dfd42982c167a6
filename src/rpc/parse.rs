//! Protobuf requests to commands: every field is looked at, and all that is wrong is said at once.

use std::collections::BTreeMap;

use polykey_hsm::{Algorithm, Purpose};
use polykey_proto::polykey::v2 as pb;
use tonic::metadata::MetadataMap;
use zeroize::Zeroizing;

use super::admit::{binary, text};
use super::twins::exportable_twin;
use crate::command::{
    CreateKey, Expiry, Export, GetKey, GetMetadata, ListKeys, ListStatus, Profile, RevokeKey,
    RotateKey, Strategy, UpdateKey, Value,
};
use crate::error::Error;
use crate::key::{KeyId, KeyName};
use crate::limits::{self, Violations};
use crate::time::Time;

const PERIOD: &str = "rotation_period_seconds";
const PREFIX: &str = "prefix";
const POLICY_NAME: &str = "must match ^[a-zA-Z][a-zA-Z0-9_-]{0,63}$";

/// Checks policies that a change sets, one by one: what they come to with those that the key has
/// already is checked once the key may be seen. An empty text removes a policy.
pub(crate) fn policies(v: &mut Violations, field: &str, texts: &BTreeMap<String, String>) {
    use crate::authz::KeyPolicies;
    for (name, text) in texts.iter().take(limits::POLICIES) {
        let field = format!("{field}[{}]", limits::shown(name));
        if text.is_empty() {
            v.check(crate::authz::is_policy_name(name), &field, POLICY_NAME);
            continue;
        }
        let one = BTreeMap::from([(name.clone(), text.clone())]);
        if let Err(errors) = KeyPolicies::compile(uuid::Uuid::nil(), &one) {
            v.add(field, limits::shown_text(&errors.to_string()));
        }
    }
}

/// A time, if it is one that can be kept.
pub(crate) fn time(
    v: &mut Violations,
    field: &str,
    value: Option<&prost_types::Timestamp>,
) -> Option<Time> {
    let value = value?;
    let ok =
        (0..1_000_000_000).contains(&value.nanos) && (0..=253_402_207_199).contains(&value.seconds);
    if !ok {
        v.add(field, "must be a time between 1970 and 9999");
        return None;
    }
    let micros = value.seconds * 1_000_000 + i64::from(value.nanos) / 1000;
    Some(Time::from_micros(micros))
}

/// A time in the future.
pub(crate) fn future(
    v: &mut Violations,
    field: &str,
    value: Option<&prost_types::Timestamp>,
    now: Time,
) -> Option<Time> {
    let at = time(v, field, value)?;
    v.check(at > now, field, "must be in the future");
    Some(at)
}

/// A key's id or alias.
pub(crate) fn key_name(v: &mut Violations, field: &str, value: &str) -> KeyName {
    let nothing = KeyName::Alias(String::new());
    if let Some(alias) = value.strip_prefix("alias/") {
        limits::alias(v, field, alias);
        return KeyName::Alias(alias.to_owned());
    }
    match KeyId::parse(value) {
        Some(id) => KeyName::Id(id),
        None => {
            v.add(
                field,
                "must be a UUID such as 01890a5d-ac96-774b-bcce-b302099a8057, or alias/NAME",
            );
            nothing
        }
    }
}

/// A version number of a request; 0 = the primary.
pub(crate) fn version(v: &mut Violations, field: &str, value: i32) -> u32 {
    v.check(value >= 0, field, "must not be negative");
    u32::try_from(value).unwrap_or(0)
}

fn algorithm(v: &mut Violations, field: &str, value: i32) -> Algorithm {
    super::convert::algorithm(value).unwrap_or_else(|| {
        v.add(field, "must be one of the key types, such as KEY_TYPE_AES_256");
        Algorithm::Aes256
    })
}

/// What a key is for: the first purpose of its type unless another one is asked for.
fn purpose(v: &mut Violations, algorithm: Algorithm, value: i32) -> Purpose {
    if value == pb::KeyPurpose::Unspecified as i32 {
        return algorithm.default_purpose();
    }
    let asked = Purpose::ALL.into_iter().find(|p| super::convert::purpose(*p) as i32 == value);
    match asked {
        Some(purpose) if algorithm.serves(purpose) => purpose,
        _ => {
            let names: Vec<&str> = algorithm.purposes().iter().map(|p| p.name()).collect();
            let text = format!("a key of type {algorithm} is made to {}", names.join(" or "));
            v.add("purpose", text);
            algorithm.default_purpose()
        }
    }
}

fn uses(v: &mut Violations, field: &str, value: i64, sealing: bool) -> u64 {
    v.check(value >= 0, field, "must not be negative");
    v.check(value <= 0 || sealing, field, "is for keys that encrypt, sign, mac or wrap");
    u64::try_from(value).unwrap_or(0)
}

fn value(
    v: &mut Violations,
    field: &str,
    bytes: &[u8],
    algorithm: Option<Algorithm>,
) -> Option<Value> {
    if bytes.is_empty() {
        return None;
    }
    v.check(bytes.len() <= limits::VALUE, field, "must have 1 to 4096 bytes");
    if algorithm.is_some_and(|a| a != Algorithm::ApiKey) {
        v.add(field, "only a key of type KEY_TYPE_API_KEY takes a value");
    }
    Some(Value(Zeroizing::new(bytes.to_vec())))
}

/// The parameters that both the field of that name and `generation_params` can carry.
fn params(
    v: &mut Violations,
    map: &BTreeMap<String, String>,
    allowed: &[&str],
) -> (Option<i64>, Option<String>) {
    v.check(map.len() <= limits::PARAMS, "generation_params", "must have at most 16 entries");
    for name in map.keys().take(limits::PARAMS + 1) {
        if !allowed.contains(&name.as_str()) {
            v.add(format!("generation_params[{}]", limits::shown(name)), "is not known here");
        }
    }
    let field = "generation_params[rotation_period_seconds]";
    let period = map.get(PERIOD).filter(|_| allowed.contains(&PERIOD)).and_then(|text| {
        let parsed = text.parse().ok();
        v.check(parsed.is_some(), field, "must be a whole number of seconds");
        parsed
    });
    let period = period.inspect(|p| check_period(v, field, *p));
    let prefix = map.get(PREFIX).filter(|_| allowed.contains(&PREFIX)).cloned();
    (period, prefix)
}

fn check_period(v: &mut Violations, field: &str, seconds: i64) {
    v.check(limits::ROTATION_PERIOD.contains(&seconds), field, "must be 3600 to 315576000 seconds");
}

/// Merges the metadata twins into a creation.
pub(crate) fn create_twins(
    request: &mut pb::CreateKeyRequest,
    metadata: &MetadataMap,
) -> Result<(), Error> {
    let mut v = Violations::new();
    if let Some(exportable) = exportable_twin(&mut v, metadata) {
        request.exportable = Some(exportable);
    }
    if let Some(bytes) = binary(&mut v, metadata, "polykey-value-bin") {
        request.value = bytes.into();
    }
    if let Some(alias) = text(&mut v, metadata, "polykey-alias") {
        request.alias = alias.strip_prefix("alias/").unwrap_or(alias).to_owned();
    }
    v.finish()
}

fn expected_twin(v: &mut Violations, metadata: &MetadataMap) -> Option<u64> {
    let text = text(v, metadata, "polykey-expected-revision")?;
    let revision = text.parse().ok();
    v.check(revision.is_some(), "polykey-expected-revision", "must be a whole number");
    revision
}

/// Merges the metadata twins into a rotation.
pub(crate) fn rotate_twins(
    request: &mut pb::RotateKeyRequest,
    metadata: &MetadataMap,
) -> Result<(), Error> {
    let mut v = Violations::new();
    if let Some(bytes) = binary(&mut v, metadata, "polykey-value-bin") {
        request.value = bytes.into();
    }
    if let Some(revision) = expected_twin(&mut v, metadata) {
        request.expected_revision = Some(revision);
    }
    v.finish()
}

/// Merges the metadata twin of the expected revision into an optional field.
pub(crate) fn revision_twin(field: &mut Option<u64>, metadata: &MetadataMap) -> Result<(), Error> {
    let mut v = Violations::new();
    if let Some(revision) = expected_twin(&mut v, metadata) {
        *field = Some(revision);
    }
    v.finish()
}

/// Reads the metadata twins of an export: mode and recipient.
pub(crate) fn export_twins(
    mode: &mut i32,
    recipient: &mut bytes::Bytes,
    metadata: &MetadataMap,
) -> Result<(), Error> {
    let mut v = Violations::new();
    if let Some(text) = text(&mut v, metadata, "polykey-export") {
        match text {
            "plain" => *mode = pb::ExportMode::Plain.into(),
            "hpke" => *mode = pb::ExportMode::Hpke.into(),
            _ => v.add("polykey-export", "must be plain or hpke"),
        }
    }
    if let Some(bytes) = binary(&mut v, metadata, "polykey-recipient-bin") {
        *recipient = bytes.into();
    }
    v.finish()
}

pub(crate) fn create(request: pb::CreateKeyRequest, now: Time) -> Result<CreateKey, Error> {
    let pb::CreateKeyRequest {
        key_type,
        requester_context: _,
        description,
        tags,
        expires_at,
        initial_authorized_contexts,
        access_policies,
        data_classification,
        generation_params,
        exportable,
        value: bytes,
        alias,
        read_after_expiry,
        rotation_period_seconds,
        storage_profile,
        purpose: asked_purpose,
        convergent,
        rotate_after_uses,
        max_uses,
        in_token,
    } = request;
    let mut v = Violations::new();
    let algorithm = algorithm(&mut v, "key_type", key_type);
    let purpose = purpose(&mut v, algorithm, asked_purpose);
    let deterministic = purpose == Purpose::Encrypt && !algorithm.is_asymmetric();
    v.check(!convergent || deterministic, "convergent", "is for symmetric keys that encrypt");
    let sealing =
        matches!(purpose, Purpose::Encrypt | Purpose::Sign | Purpose::Mac | Purpose::Wrap);
    let rotate_after_uses = uses(&mut v, "rotate_after_uses", rotate_after_uses, sealing);
    let max_uses = uses(&mut v, "max_uses", max_uses, sealing);
    v.check(
        max_uses == 0 || rotate_after_uses <= max_uses,
        "rotate_after_uses",
        "must not be above max_uses",
    );
    limits::description(&mut v, "description", &description);
    limits::tags(&mut v, "tags", &tags);
    limits::contexts(&mut v, "initial_authorized_contexts", &initial_authorized_contexts);
    v.check(
        access_policies.len() <= limits::POLICIES,
        "access_policies",
        "must have at most 50 entries",
    );
    limits::classification(&mut v, "data_classification", &data_classification);
    let expires_at = future(&mut v, "expires_at", expires_at.as_ref(), now);
    let value = value(&mut v, "value", &bytes, Some(algorithm));
    let (period, prefix) = params(&mut v, &generation_params, &[PERIOD, PREFIX]);
    let prefix_field = "generation_params[prefix]";
    let prefix_ok = prefix.is_none() || (algorithm == Algorithm::ApiKey && value.is_none());
    v.check(prefix_ok, prefix_field, "only a generated API key has a prefix");
    if rotation_period_seconds != 0 {
        check_period(&mut v, PERIOD, rotation_period_seconds);
        v.check(
            period.is_none_or(|p| p == rotation_period_seconds),
            PERIOD,
            "generation_params says otherwise",
        );
    }
    let rotation_period =
        period.or((rotation_period_seconds != 0).then_some(rotation_period_seconds));
    v.check(
        rotation_period.is_none() || value.is_none(),
        PERIOD,
        "a supplied value cannot be rotated by the server itself",
    );
    v.check(
        rotate_after_uses == 0 || value.is_none(),
        "rotate_after_uses",
        "a supplied value cannot be rotated by the server itself",
    );
    let alias = match alias.strip_prefix("alias/") {
        Some(name) => name.to_owned(),
        None => alias,
    };
    if !alias.is_empty() {
        limits::alias(&mut v, "alias", &alias);
    }
    let profile = match pb::StorageProfile::try_from(storage_profile) {
        Ok(pb::StorageProfile::Unspecified) => None,
        Ok(pb::StorageProfile::Standard) => Some(Profile::Standard),
        Ok(pb::StorageProfile::Hardened) => Some(Profile::Hardened),
        Err(_) => {
            v.add("storage_profile", "must be STORAGE_PROFILE_STANDARD or HARDENED");
            None
        }
    };
    let generated = value.is_none() && exportable != Some(true);
    v.check(!in_token || generated, "in_token", "is for keys that are made there and stay there");
    let hardened = profile != Some(Profile::Standard);
    v.check(!in_token || hardened, "in_token", "does not go with STORAGE_PROFILE_STANDARD");
    v.finish()?;
    Ok(CreateKey {
        algorithm,
        purpose,
        convergent,
        rotate_after_uses,
        max_uses,
        import: None,
        description,
        tags,
        expires_at,
        contexts: initial_authorized_contexts,
        policies: access_policies,
        classification: data_classification,
        exportable,
        value,
        alias: (!alias.is_empty()).then_some(alias),
        read_after_expiry,
        rotation_period,
        profile,
        in_token,
        prefix,
    })
}

pub(crate) fn rotate(request: pb::RotateKeyRequest, now: Time) -> Result<RotateKey, Error> {
    let pb::RotateKeyRequest {
        key_id,
        requester_context: _,
        strategy,
        grace_period_seconds,
        generation_params,
        // Always so: policies belong to the key. Clearing them has a field of its own.
        preserve_access_policies: _,
        expected_revision,
        clear_access_policies,
        value: bytes,
        effective_at,
    } = request;
    let mut v = Violations::new();
    let key = key_name(&mut v, "key_id", &key_id);
    v.check(
        (0..=limits::GRACE).contains(&grace_period_seconds),
        "grace_period_seconds",
        "must be 0 (no limit) to 315576000",
    );
    let (period, _) = params(&mut v, &generation_params, &[PERIOD]);
    let at = future(&mut v, "effective_at", effective_at.as_ref(), now);
    let value = value(&mut v, "value", &bytes, None);
    let strategy = match pb::RotationStrategy::try_from(strategy) {
        Ok(pb::RotationStrategy::Unspecified | pb::RotationStrategy::Hot) => Strategy::Hot,
        Ok(pb::RotationStrategy::Staged) => Strategy::Staged { at },
        Ok(pb::RotationStrategy::Scheduled) => {
            v.check(
                period.is_some(),
                "generation_params[rotation_period_seconds]",
                "is needed with ROTATION_STRATEGY_SCHEDULED: 3600 to 315576000 seconds",
            );
            v.check(value.is_none(), "value", "a scheduled rotation takes none");
            v.check(
                grace_period_seconds == 0,
                "grace_period_seconds",
                "a scheduled rotation takes none",
            );
            Strategy::Scheduled { period: period.unwrap_or(0) }
        }
        Err(_) => {
            v.add("strategy", "must be ROTATION_STRATEGY_HOT, STAGED or SCHEDULED");
            Strategy::Hot
        }
    };
    let staged = matches!(strategy, Strategy::Staged { .. });
    v.check(at.is_none() || staged, "effective_at", "goes with ROTATION_STRATEGY_STAGED only");
    let scheduled = matches!(strategy, Strategy::Scheduled { .. });
    v.check(
        period.is_none() || scheduled,
        "generation_params[rotation_period_seconds]",
        "goes with ROTATION_STRATEGY_SCHEDULED only",
    );
    v.finish()?;
    Ok(RotateKey {
        key,
        strategy,
        grace: i64::from(grace_period_seconds),
        expected: expected_revision,
        clear_policies: clear_access_policies,
        value,
    })
}

pub(crate) fn revoke(request: pb::RevokeKeyRequest, now: Time) -> Result<RevokeKey, Error> {
    let pb::RevokeKeyRequest {
        key_id,
        requester_context: _,
        revocation_reason,
        immediate,
        effective_at,
        notify_external_systems: notify,
        expected_revision,
    } = request;
    let mut v = Violations::new();
    let key = key_name(&mut v, "key_id", &key_id);
    limits::reason(&mut v, "revocation_reason", &revocation_reason);
    let at = future(&mut v, "effective_at", effective_at.as_ref(), now);
    v.check(!(immediate && at.is_some()), "effective_at", "contradicts immediate");
    v.finish()?;
    Ok(RevokeKey { key, reason: revocation_reason, at, notify, expected: expected_revision })
}

pub(crate) fn update(request: pb::UpdateKeyMetadataRequest, now: Time) -> Result<UpdateKey, Error> {
    let pb::UpdateKeyMetadataRequest {
        key_id,
        requester_context: _,
        description,
        tags_to_add,
        tags_to_remove,
        contexts_to_add,
        contexts_to_remove,
        policies_to_update,
        expires_at,
        data_classification,
        expected_revision,
        policies_to_remove,
        clear_expires_at,
        rotation_period_seconds,
    } = request;
    let mut v = Violations::new();
    let key = key_name(&mut v, "key_id", &key_id);
    if let Some(description) = &description {
        limits::description(&mut v, "description", description);
    }
    limits::tags(&mut v, "tags_to_add", &tags_to_add);
    for (i, name) in tags_to_remove.iter().enumerate().take(limits::TAGS + 1) {
        let field = format!("tags_to_remove[{i}]");
        v.check(limits::is_tag_key(name), &field, "must match ^[a-zA-Z][a-zA-Z0-9_.:/-]{0,127}$");
        v.check(!tags_to_add.contains_key(name), &field, "is in tags_to_add as well");
    }
    v.check(tags_to_remove.len() <= limits::TAGS, "tags_to_remove", "must have at most 50 entries");
    limits::contexts(&mut v, "contexts_to_add", &contexts_to_add);
    limits::contexts(&mut v, "contexts_to_remove", &contexts_to_remove);
    for (i, context) in contexts_to_remove.iter().enumerate().take(limits::CONTEXTS) {
        let both = contexts_to_add.contains(context);
        v.check(!both, &format!("contexts_to_remove[{i}]"), "is in contexts_to_add as well");
    }
    v.check(
        policies_to_update.len() <= limits::POLICIES,
        "policies_to_update",
        "must have at most 50 entries",
    );
    v.check(
        policies_to_remove.len() <= limits::POLICIES,
        "policies_to_remove",
        "must have at most 50 entries",
    );
    policies(&mut v, "policies_to_update", &policies_to_update);
    for (i, name) in policies_to_remove.iter().enumerate().take(limits::POLICIES) {
        let field = format!("policies_to_remove[{i}]");
        v.check(crate::authz::is_policy_name(name), &field, POLICY_NAME);
        let both = policies_to_update.contains_key(name);
        v.check(!both, &format!("policies_to_remove[{i}]"), "is in policies_to_update as well");
    }
    if let Some(classification) = &data_classification {
        limits::classification(&mut v, "data_classification", classification);
    }
    let expires = future(&mut v, "expires_at", expires_at.as_ref(), now);
    v.check(!(clear_expires_at && expires.is_some()), "clear_expires_at", "contradicts expires_at");
    if let Some(period) = rotation_period_seconds.filter(|p| *p != 0) {
        check_period(&mut v, PERIOD, period);
    }
    v.finish()?;
    let (gone, set): (BTreeMap<_, _>, BTreeMap<_, _>) =
        policies_to_update.into_iter().partition(|(_, text)| text.is_empty());
    let mut policies_removed = policies_to_remove;
    policies_removed.extend(gone.into_keys());
    Ok(UpdateKey {
        key: Some(key),
        description,
        tags_set: tags_to_add,
        tags_removed: tags_to_remove,
        contexts_added: contexts_to_add,
        contexts_removed: contexts_to_remove,
        policies_set: set,
        policies_removed,
        expires_at: match expires {
            Some(at) => Some(Expiry::At(at)),
            None => clear_expires_at.then_some(Expiry::Never),
        },
        classification: data_classification,
        rotation_period: rotation_period_seconds,
        expected: expected_revision,
    })
}

/// The mode of an export and the recipient it goes with.
pub(crate) fn export(v: &mut Violations, mode: i32, recipient: &[u8]) -> Export {
    let export = match pb::ExportMode::try_from(mode) {
        Ok(pb::ExportMode::None) => Export::None,
        Ok(pb::ExportMode::Plain) => Export::Plain,
        Ok(pb::ExportMode::Hpke) => {
            let ok = polykey_hsm::recipient_key_sha256(recipient).is_ok();
            v.check(
                ok,
                "recipient_public_key",
                "must be an X25519 public key: 32 bytes, or DER SubjectPublicKeyInfo",
            );
            return Export::Hpke(recipient.to_vec());
        }
        Err(_) => {
            v.add("export", "must be EXPORT_MODE_NONE, PLAIN or HPKE");
            Export::None
        }
    };
    v.check(recipient.is_empty(), "recipient_public_key", "goes with EXPORT_MODE_HPKE only");
    export
}

pub(crate) fn get(key_id: &str, number: i32, mode: i32, recipient: &[u8]) -> Result<GetKey, Error> {
    let mut v = Violations::new();
    let key = key_name(&mut v, "key_id", key_id);
    let version = version(&mut v, "version", number);
    let export = export(&mut v, mode, recipient);
    v.finish()?;
    Ok(GetKey { key, version, export })
}

pub(crate) fn get_metadata(
    key_id: &str,
    number: i32,
    history: bool,
    policies: bool,
) -> Result<GetMetadata, Error> {
    let mut v = Violations::new();
    let key = key_name(&mut v, "key_id", key_id);
    let version = version(&mut v, "version", number);
    v.finish()?;
    Ok(GetMetadata { key, version, history, policies })
}

pub(crate) fn list(request: pb::ListKeysRequest) -> Result<ListKeys, Error> {
    let pb::ListKeysRequest {
        requester_context: _,
        attributes: _,
        page_size,
        page_token,
        key_types,
        statuses,
        tag_filters,
        created_after,
        created_before,
    } = request;
    let mut v = Violations::new();
    let page_size = u32::try_from(page_size).unwrap_or(u32::MAX);
    v.check(page_size <= limits::PAGE, "page_size", "must be 0 (100) to 1000");
    v.check(page_token.len() <= 512, "page_token", "is not one of ours");
    v.check(key_types.len() <= 64, "key_types", "must have at most 64 entries");
    v.check(statuses.len() <= 16, "statuses", "must have at most 16 entries");
    let algorithms = key_types
        .iter()
        .take(64)
        .enumerate()
        .map(|(i, value)| algorithm(&mut v, &format!("key_types[{i}]"), *value))
        .collect();
    let mut wanted = Vec::new();
    for (i, value) in statuses.iter().take(16).enumerate() {
        match pb::KeyStatus::try_from(*value) {
            Ok(pb::KeyStatus::Active) => wanted.push(ListStatus::Active),
            Ok(pb::KeyStatus::Rotating) => wanted.push(ListStatus::Rotating),
            Ok(pb::KeyStatus::Deprecated) => wanted.push(ListStatus::Deprecated),
            Ok(pb::KeyStatus::Revoked) => wanted.push(ListStatus::Revoked),
            Ok(pb::KeyStatus::Unspecified) | Err(_) => v.add(
                format!("statuses[{i}]"),
                "must be KEY_STATUS_ACTIVE, ROTATING, DEPRECATED or REVOKED",
            ),
        }
    }
    limits::tags(&mut v, "tag_filters", &tag_filters);
    let created_after = time(&mut v, "created_after", created_after.as_ref());
    let created_before = time(&mut v, "created_before", created_before.as_ref());
    v.finish()?;
    Ok(ListKeys {
        page_size,
        page_token,
        algorithms,
        statuses: wanted,
        tags: tag_filters,
        created_after,
        created_before,
    })
}
