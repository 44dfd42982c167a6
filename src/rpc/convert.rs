//! Domain values to protobuf messages: the only file that names both for answers.

use polykey_hsm::{Algorithm, Purpose, WrappedBlob};
use polykey_proto::polykey::record::v1 as record;
use polykey_proto::polykey::v2 as pb;

use crate::audit::read::Entry;
use crate::authz::PolicyEntry;
use crate::key::{KeyId, KeyState, VersionState};
use crate::keyring::{Done, Got, KeyMaterialView, KeyVersion, MetadataView};
use crate::time::Time;

pub(crate) fn timestamp(time: Time) -> prost_types::Timestamp {
    let micros = time.micros();
    prost_types::Timestamp {
        seconds: micros.div_euclid(1_000_000),
        nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap_or(0),
    }
}

/// A stored time: 0 = none.
pub(crate) fn stored_time(micros: i64) -> Option<prost_types::Timestamp> {
    Time::optional(micros).map(timestamp)
}

fn number(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

pub(crate) fn key_type(algorithm: Algorithm) -> pb::KeyType {
    match algorithm {
        Algorithm::ApiKey => pb::KeyType::ApiKey,
        Algorithm::Aes256 => pb::KeyType::Aes256,
        Algorithm::Rsa4096 => pb::KeyType::Rsa4096,
        Algorithm::EcdsaP384 => pb::KeyType::EcdsaP384,
        Algorithm::Aes128 => pb::KeyType::Aes128,
        Algorithm::Aes256Gcm => pb::KeyType::Aes256Gcm,
        Algorithm::Aes128Gcm => pb::KeyType::Aes128Gcm,
        Algorithm::ChaCha20Poly1305 => pb::KeyType::Chacha20Poly1305,
        Algorithm::XChaCha20Poly1305 => pb::KeyType::Xchacha20Poly1305,
        Algorithm::HmacSha256 => pb::KeyType::HmacSha256,
        Algorithm::HmacSha384 => pb::KeyType::HmacSha384,
        Algorithm::HmacSha512 => pb::KeyType::HmacSha512,
        Algorithm::HkdfSha256 => pb::KeyType::HkdfSha256,
        Algorithm::Rsa2048 => pb::KeyType::Rsa2048,
        Algorithm::Rsa3072 => pb::KeyType::Rsa3072,
        Algorithm::EcdsaP256 => pb::KeyType::EcdsaP256,
        Algorithm::EcdsaP521 => pb::KeyType::EcdsaP521,
        Algorithm::EcdsaSecp256k1 => pb::KeyType::EcdsaSecp256k1,
        Algorithm::Ed25519 => pb::KeyType::Ed25519,
        Algorithm::X25519 => pb::KeyType::X25519,
        Algorithm::EcdhP256 => pb::KeyType::EcdhP256,
        Algorithm::EcdhP384 => pb::KeyType::EcdhP384,
        Algorithm::EcdhP521 => pb::KeyType::EcdhP521,
        Algorithm::MlKem768 => pb::KeyType::MlKem768,
        Algorithm::MlKem1024 => pb::KeyType::MlKem1024,
        Algorithm::X25519MlKem768 => pb::KeyType::X25519MlKem768,
        Algorithm::MlDsa44 => pb::KeyType::MlDsa44,
        Algorithm::MlDsa65 => pb::KeyType::MlDsa65,
        Algorithm::MlDsa87 => pb::KeyType::MlDsa87,
    }
}

/// The algorithm of a key type on the wire.
pub(crate) fn algorithm(value: i32) -> Option<Algorithm> {
    Algorithm::ALL.iter().copied().find(|a| key_type(*a) as i32 == value)
}

pub(crate) fn purpose(purpose: Purpose) -> pb::KeyPurpose {
    match purpose {
        Purpose::Credential => pb::KeyPurpose::Credential,
        Purpose::Encrypt => pb::KeyPurpose::Encrypt,
        Purpose::Sign => pb::KeyPurpose::Sign,
        Purpose::Mac => pb::KeyPurpose::Mac,
        Purpose::Derive => pb::KeyPurpose::Derive,
        Purpose::Wrap => pb::KeyPurpose::Wrap,
        Purpose::Agree => pb::KeyPurpose::Agree,
        Purpose::Encapsulate => pb::KeyPurpose::Encapsulate,
    }
}

pub(crate) fn key_state(state: KeyState) -> pb::KeyState {
    match state {
        KeyState::Enabled => pb::KeyState::Enabled,
        KeyState::Expired => pb::KeyState::Expired,
        KeyState::Disabled => pb::KeyState::Disabled,
        KeyState::Revoked => pb::KeyState::Revoked,
        KeyState::PendingDestruction => pb::KeyState::PendingDestruction,
        KeyState::Destroyed => pb::KeyState::Destroyed,
    }
}

pub(crate) fn version_state(key: KeyState, version: VersionState) -> pb::KeyVersionState {
    match (key, version) {
        (KeyState::Destroyed, _) => pb::KeyVersionState::Destroyed,
        (KeyState::Revoked, _) | (_, VersionState::Revoked) => pb::KeyVersionState::Revoked,
        (_, VersionState::Primary) => pb::KeyVersionState::Primary,
        (_, VersionState::Staged) => pb::KeyVersionState::Staged,
        (_, VersionState::Readable | VersionState::TooOld) => pb::KeyVersionState::Deprecated,
    }
}

/// The coarse status of a version of a key.
pub(crate) fn status(
    key: KeyState,
    version: VersionState,
    read_after_expiry: bool,
) -> pb::KeyStatus {
    match (key, version) {
        (KeyState::Enabled, VersionState::Primary) => pb::KeyStatus::Active,
        (KeyState::Enabled, VersionState::Staged) => pb::KeyStatus::Rotating,
        (KeyState::Enabled, VersionState::Readable) => pb::KeyStatus::Deprecated,
        // It opens and seals nothing: what DEPRECATED says.
        (KeyState::Expired, VersionState::Primary | VersionState::Readable)
            if read_after_expiry =>
        {
            pb::KeyStatus::Deprecated
        }
        (
            KeyState::Enabled
            | KeyState::Expired
            | KeyState::Disabled
            | KeyState::Revoked
            | KeyState::PendingDestruction
            | KeyState::Destroyed,
            _,
        ) => pb::KeyStatus::Revoked,
    }
}

pub(crate) fn origin(code: u32) -> pb::KeyOrigin {
    match code {
        1 => pb::KeyOrigin::Generated,
        2 => pb::KeyOrigin::Imported,
        _ => pb::KeyOrigin::Unspecified,
    }
}

pub(crate) fn metadata(view: &MetadataView) -> pb::KeyMetadata {
    let MetadataView { key, version, shown, usage, checksum, history: _, policies: _ } = view;
    let (k, v) = (&key.record, &version.record);
    pb::KeyMetadata {
        key_id: key.id.to_string(),
        key_type: key_type(key.algorithm).into(),
        status: status(shown.key, shown.version, k.read_after_expiry).into(),
        version: number(v.version),
        created_at: stored_time(k.created_at),
        updated_at: stored_time(k.updated_at),
        expires_at: stored_time(k.expires_at),
        last_accessed_at: usage.last.map(timestamp),
        creator_identity: k.creator.clone(),
        authorized_contexts: k.authorized_contexts.clone(),
        access_policies: k.access_policies.clone(),
        description: k.description.clone(),
        tags: k.tags.clone(),
        data_classification: k.data_classification.clone(),
        metadata_checksum: checksum.clone(),
        access_count: i64::try_from(usage.count).unwrap_or(i64::MAX),
        // A key in a token is under the hardware module more than any other.
        storage_type: i32::try_from(k.storage_profile.min(2)).unwrap_or(0),
        in_token: crate::keyring::is_resident(k),
        key_state: key_state(shown.key).into(),
        revision: k.revision,
        exportable: k.exportable,
        aliases: k.aliases.clone(),
        primary_version: number(k.primary_version),
        latest_version: number(k.latest_version),
        destroy_at: stored_time(k.destroy_at),
        revocation_reason: k.revocation_reason.clone(),
        revoke_at: stored_time(k.revoke_at),
        version_expires_at: stored_time(v.grace_until),
        min_decryption_version: number(k.min_decryption_version),
        min_encryption_version: number(k.min_encryption_version),
        rotation_period_seconds: k.rotation_period_seconds,
        next_rotation_at: stored_time(k.next_rotation_at),
        read_after_expiry: k.read_after_expiry,
        public_key_der: v.public_key.clone(),
        origin: origin(k.origin).into(),
        version_state: version_state(shown.key, shown.version).into(),
        min_available_version: number(k.min_available_version),
        staged_version: number(k.staged_version),
        staged_effective_at: stored_time(k.staged_promote_at),
        version_created_at: stored_time(v.created_at),
        revoked_at: stored_time(if v.revoked_at != 0 { v.revoked_at } else { k.revoked_at }),
        purpose: purpose(crate::keyring::work::purpose(k, key.algorithm)).into(),
        convergent: k.convergent,
        rotate_after_uses: i64::try_from(k.rotate_after_uses).unwrap_or(i64::MAX),
        max_uses: i64::try_from(k.max_uses).unwrap_or(i64::MAX),
    }
}

/// The wrapped form.
pub(crate) fn wrapped(version: &KeyVersion) -> pb::KeyMaterial {
    pb::KeyMaterial {
        encrypted_key_data: version.blob.clone(),
        encryption_algorithm: WrappedBlob::ALGORITHM.to_owned(),
        key_derivation_params: String::new(),
        key_checksum: version.record.checksum.clone(),
        wrapping: pb::MaterialWrapping::Wrapped.into(),
        ..Default::default()
    }
}

pub(crate) fn material(got: &Got) -> pb::KeyMaterial {
    let mut material = wrapped(&got.metadata.version);
    match &got.material {
        KeyMaterialView::Wrapped => {}
        KeyMaterialView::Plain(bytes) => {
            material.plaintext = bytes.to_vec().into();
            material.set_wrapping(pb::MaterialWrapping::Plain);
        }
        KeyMaterialView::Hpke(sealed) => {
            let mut both = sealed.enc.clone();
            both.extend_from_slice(&sealed.ciphertext);
            material.encrypted_key_data = both.into();
            material.encryption_algorithm = format!("hpke-v1: {}", polykey_hsm::HpkeExport::SUITE);
            material.hpke_enc = sealed.enc.clone().into();
            material.recipient_key_sha256 = sealed.recipient_key_sha256.to_vec().into();
            material.set_wrapping(pb::MaterialWrapping::Hpke);
        }
    }
    material
}

pub(crate) fn get_response(got: &Got, skip_metadata: bool, now: Time) -> pb::GetKeyResponse {
    pb::GetKeyResponse {
        key_material: Some(material(got)),
        metadata: (!skip_metadata).then(|| metadata(&got.metadata)),
        response_timestamp: Some(timestamp(now)),
        authorization_decision_id: got.decision_id.to_string(),
        audit_index: got.leaf.unwrap_or(0),
    }
}

pub(crate) fn create_response(
    done: &Done,
    view: &MetadataView,
    now: Time,
) -> pb::CreateKeyResponse {
    pb::CreateKeyResponse {
        key_id: done.key.id.to_string(),
        metadata: Some(metadata(view)),
        key_material: done.version.as_deref().map(wrapped),
        response_timestamp: Some(timestamp(now)),
        audit_index: done.leaf.unwrap_or(0),
    }
}

pub(crate) fn rotate_response(done: &Done, view: &MetadataView) -> pb::RotateKeyResponse {
    pb::RotateKeyResponse {
        key_id: done.key.id.to_string(),
        new_version: done.version.as_ref().map_or(0, |v| number(v.record.version)),
        previous_version: number(done.previous),
        new_key_material: done.version.as_deref().map(wrapped),
        metadata: Some(metadata(view)),
        rotation_timestamp: Some(timestamp(done.at)),
        old_version_expires_at: done.grace_until.map(timestamp),
        audit_index: done.leaf.unwrap_or(0),
    }
}

pub(crate) fn metadata_response(view: &MetadataView, now: Time) -> pb::GetKeyMetadataResponse {
    pb::GetKeyMetadataResponse {
        metadata: Some(metadata(view)),
        access_history: view.history.iter().map(history).collect(),
        policy_details: view.policies.iter().map(|p| (p.id.to_string(), policy(p))).collect(),
        response_timestamp: Some(timestamp(now)),
    }
}

fn history(entry: &record::HistoryEntry) -> pb::AccessHistoryEntry {
    pb::AccessHistoryEntry {
        timestamp: stored_time(entry.time),
        client_identity: entry.client_id.clone(),
        operation: entry.action.clone(),
        success: entry.success,
        correlation_id: entry.correlation_id.clone(),
        // An event that waits for its block has no place in the log yet.
        audit_index: if entry.leaf == u64::MAX { 0 } else { entry.leaf },
    }
}

fn policy(entry: &PolicyEntry) -> pb::PolicyDetail {
    pb::PolicyDetail {
        policy_id: entry.id.to_string(),
        policy_type: entry.kind.name().to_owned(),
        policy_params: entry.params.clone(),
        effective_from: None,
        effective_until: None,
    }
}

/// An event of the audit trail.
pub(crate) fn audit_event(entry: &Entry) -> pb::AuditEvent {
    let Entry { index, position, data_plane: _, event } = entry;
    let outcome = match event.outcome() {
        record::audit_event::Outcome::Success => pb::AuditOutcome::Success,
        record::audit_event::Outcome::Denied => pb::AuditOutcome::Denied,
        record::audit_event::Outcome::Failed => pb::AuditOutcome::Failed,
        record::audit_event::Outcome::Unspecified => pb::AuditOutcome::Unspecified,
    };
    pb::AuditEvent {
        index: *index,
        time: stored_time(event.time),
        request_id: event.request_id.clone(),
        client_id: event.client_id.clone(),
        certificate_sha256: event.certificate_sha256.clone(),
        peer_address: event.peer_address.clone(),
        action: event.action.clone(),
        outcome: outcome.into(),
        code: event.code,
        key_id: KeyId::from_slice(&event.key_id).map(|id| id.to_string()).unwrap_or_default(),
        version: number(event.version),
        decision_id: event.decision_id.clone(),
        details: event.details.clone(),
        correlation_id: event.correlation_id.clone(),
        count: number(event.count.max(1)),
        position: number(*position),
    }
}
