//! Keys as the command line prints them. Names and forms in JSON are ours and only grow.

use std::collections::BTreeMap;

use polykey_proto::polykey::v2 as pb;
use prost_types::Timestamp;
use serde::Serialize;

use super::output::{Human, View};
use crate::time::Time;

/// RFC 3339 in UTC with microseconds; `None` stays `null`.
pub(super) fn time(timestamp: Option<&Timestamp>) -> Option<String> {
    let t = timestamp?;
    let micros = t.seconds.saturating_mul(1_000_000).saturating_add(i64::from(t.nanos) / 1_000);
    Some(Time::from_micros(micros).to_string())
}

/// A time for people: to the second.
pub(super) fn short(time: Option<&String>) -> String {
    time.map(|t| t.split_once('.').map_or_else(|| t.clone(), |(head, _)| format!("{head}Z")))
        .unwrap_or_default()
}

/// The last part of a protobuf enum's name in lower case with hyphens, "" for the unspecified value.
pub(super) fn word(name: &str, prefix: &str) -> String {
    match name.strip_prefix(prefix).unwrap_or(name) {
        "UNSPECIFIED" => String::new(),
        word => word.to_ascii_lowercase().replace('_', "-"),
    }
}

/// The word for a value of an enum; a value that is newer than this command shows as its number.
macro_rules! enum_word {
    ($kind:ident, $prefix:literal, $value:expr) => {
        match polykey_proto::polykey::v2::$kind::try_from($value) {
            Ok(value) => $crate::cli::view::word(value.as_str_name(), $prefix),
            Err(_) => $value.to_string(),
        }
    };
}
pub(super) use enum_word;

pub(super) fn key_type(value: i32) -> String {
    enum_word!(KeyType, "KEY_TYPE_", value)
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

pub(super) fn base64(bytes: &[u8]) -> String {
    data_encoding::BASE64.encode(bytes)
}

/// A PEM text (RFC 7468).
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    let encoded = base64(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for (i, c) in encoded.chars().enumerate() {
        if i > 0 && i % 64 == 0 {
            text.push('\n');
        }
        text.push(c);
    }
    text.push_str(&format!("\n-----END {label}-----\n"));
    text
}

pub(super) fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// Name=value pairs on one line.
pub(super) fn pairs(map: &BTreeMap<String, String>) -> String {
    map.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
}

/// Everything about a key except material.
#[derive(Serialize)]
pub(super) struct KeyView {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) key_type: String,
    pub(super) purpose: String,
    pub(super) convergent: bool,
    pub(super) rotate_after_uses: Option<i64>,
    pub(super) max_uses: Option<i64>,
    pub(super) state: String,
    pub(super) version: i32,
    pub(super) version_state: String,
    pub(super) primary_version: i32,
    pub(super) latest_version: i32,
    pub(super) staged_version: Option<i32>,
    pub(super) staged_effective_at: Option<String>,
    pub(super) aliases: Vec<String>,
    pub(super) description: String,
    pub(super) tags: BTreeMap<String, String>,
    pub(super) classification: String,
    pub(super) creator: String,
    pub(super) authorized_contexts: Vec<String>,
    pub(super) access_policies: BTreeMap<String, String>,
    pub(super) exportable: bool,
    pub(super) read_after_expiry: bool,
    pub(super) origin: String,
    pub(super) storage: String,
    pub(super) created_at: Option<String>,
    pub(super) updated_at: Option<String>,
    pub(super) expires_at: Option<String>,
    pub(super) last_accessed_at: Option<String>,
    pub(super) access_count: i64,
    pub(super) rotation_period_seconds: Option<i64>,
    pub(super) next_rotation_at: Option<String>,
    pub(super) version_created_at: Option<String>,
    pub(super) version_expires_at: Option<String>,
    pub(super) min_decryption_version: i32,
    pub(super) min_encryption_version: i32,
    pub(super) min_available_version: i32,
    pub(super) revoke_at: Option<String>,
    pub(super) revoked_at: Option<String>,
    pub(super) revocation_reason: Option<String>,
    pub(super) destroy_at: Option<String>,
    pub(super) public_key_pem: Option<String>,
    pub(super) checksum: String,
    pub(super) revision: u64,
}

impl From<pb::KeyMetadata> for KeyView {
    fn from(m: pb::KeyMetadata) -> Self {
        let t = |timestamp: &Option<Timestamp>| time(timestamp.as_ref());
        Self {
            key_type: key_type(m.key_type),
            purpose: enum_word!(KeyPurpose, "KEY_PURPOSE_", m.purpose),
            convergent: m.convergent,
            rotate_after_uses: (m.rotate_after_uses != 0).then_some(m.rotate_after_uses),
            max_uses: (m.max_uses != 0).then_some(m.max_uses),
            state: enum_word!(KeyState, "KEY_STATE_", m.key_state),
            version: m.version,
            version_state: enum_word!(KeyVersionState, "KEY_VERSION_STATE_", m.version_state),
            primary_version: m.primary_version,
            latest_version: m.latest_version,
            staged_version: (m.staged_version != 0).then_some(m.staged_version),
            staged_effective_at: t(&m.staged_effective_at),
            exportable: m.exportable,
            read_after_expiry: m.read_after_expiry,
            origin: enum_word!(KeyOrigin, "KEY_ORIGIN_", m.origin),
            storage: match m.in_token {
                true => "token".to_owned(),
                false => enum_word!(StorageProfile, "STORAGE_PROFILE_", m.storage_type),
            },
            created_at: t(&m.created_at),
            updated_at: t(&m.updated_at),
            expires_at: t(&m.expires_at),
            last_accessed_at: t(&m.last_accessed_at),
            access_count: m.access_count,
            rotation_period_seconds: (m.rotation_period_seconds != 0)
                .then_some(m.rotation_period_seconds),
            next_rotation_at: t(&m.next_rotation_at),
            version_created_at: t(&m.version_created_at),
            version_expires_at: t(&m.version_expires_at),
            min_decryption_version: m.min_decryption_version,
            min_encryption_version: m.min_encryption_version,
            min_available_version: m.min_available_version,
            revoke_at: t(&m.revoke_at),
            revoked_at: t(&m.revoked_at),
            revocation_reason: some(&m.revocation_reason),
            destroy_at: t(&m.destroy_at),
            // The hybrid has no registered form: what stands there is no SubjectPublicKeyInfo.
            public_key_pem: m
                .public_key_der
                .starts_with(&[0x30])
                .then(|| pem("PUBLIC KEY", &m.public_key_der)),
            revision: m.revision,
            id: m.key_id,
            aliases: m.aliases,
            description: m.description,
            tags: m.tags.into_iter().collect(),
            classification: m.data_classification,
            creator: m.creator_identity,
            authorized_contexts: m.authorized_contexts,
            access_policies: m.access_policies.into_iter().collect(),
            checksum: m.metadata_checksum,
        }
    }
}

impl KeyView {
    pub(super) fn of(metadata: Option<pb::KeyMetadata>) -> Self {
        metadata.unwrap_or_default().into()
    }

    pub(super) fn fields(&self) -> Vec<(&'static str, String)> {
        let number = |n: i32| if n == 0 { String::new() } else { n.to_string() };
        let flag = |f: bool| if f { yes(true) } else { String::new() };
        vec![
            ("id", self.id.clone()),
            ("type", self.key_type.clone()),
            ("state", self.state.clone()),
            ("version", format!("{} ({})", self.version, self.version_state)),
            (
                "latest version",
                if self.latest_version == self.version {
                    String::new()
                } else {
                    self.latest_version.to_string()
                },
            ),
            ("staged version", self.staged_version.map(|v| v.to_string()).unwrap_or_default()),
            ("staged until", short(self.staged_effective_at.as_ref())),
            (
                "aliases",
                self.aliases.iter().map(|a| format!("alias/{a}")).collect::<Vec<_>>().join(", "),
            ),
            ("description", self.description.clone()),
            ("tags", pairs(&self.tags)),
            ("classification", self.classification.clone()),
            ("creator", self.creator.clone()),
            ("contexts", self.authorized_contexts.join(", ")),
            ("policies", self.access_policies.keys().cloned().collect::<Vec<_>>().join(", ")),
            ("purpose", self.purpose.clone()),
            ("convergent", flag(self.convergent)),
            ("exportable", yes(self.exportable)),
            (
                "storage",
                if self.storage == "standard" { String::new() } else { self.storage.clone() },
            ),
            ("read after expiry", flag(self.read_after_expiry)),
            ("origin", self.origin.clone()),
            ("created", short(self.created_at.as_ref())),
            ("updated", short(self.updated_at.as_ref())),
            ("expires", short(self.expires_at.as_ref())),
            ("last used", short(self.last_accessed_at.as_ref())),
            ("uses", self.access_count.to_string()),
            ("rotates after", self.rotate_after_uses.map(uses).unwrap_or_default()),
            ("seals at most", self.max_uses.map(uses).unwrap_or_default()),
            ("rotates every", self.rotation_period_seconds.map(period).unwrap_or_default()),
            ("next rotation", short(self.next_rotation_at.as_ref())),
            ("version ends", short(self.version_expires_at.as_ref())),
            ("min decryption", number(self.min_decryption_version)),
            ("min encryption", number(self.min_encryption_version)),
            ("revoked", short(self.revoked_at.as_ref())),
            ("to be revoked", short(self.revoke_at.as_ref())),
            ("reason", self.revocation_reason.clone().unwrap_or_default()),
            ("destruction", short(self.destroy_at.as_ref())),
            ("revision", self.revision.to_string()),
        ]
    }
}

fn uses(n: i64) -> String {
    format!("{n} uses a version")
}

fn period(seconds: i64) -> String {
    if seconds % 86_400 == 0 { format!("{}d", seconds / 86_400) } else { format!("{seconds}s") }
}

impl View for KeyView {
    fn human(&self) -> Human {
        Human::Record(self.fields())
    }
}

/// A list of keys.
#[derive(Serialize)]
pub(super) struct KeysView {
    pub(super) keys: Vec<KeyView>,
    /// Keys that the client may see; 10,000 means at least that.
    pub(super) total_count: i32,
    /// Those of them that pass the filters; 10,000 means at least that.
    pub(super) filtered_count: i32,
}

impl View for KeysView {
    fn human(&self) -> Human {
        Human::Rows(
            &["ID", "TYPE", "STATE", "VERSION", "ALIASES", "CREATED", "EXPIRES", "DESCRIPTION"],
            self.keys
                .iter()
                .map(|k| {
                    vec![
                        k.id.clone(),
                        k.key_type.clone(),
                        k.state.clone(),
                        k.version.to_string(),
                        k.aliases.join(","),
                        short(k.created_at.as_ref()),
                        short(k.expires_at.as_ref()),
                        k.description.clone(),
                    ]
                })
                .collect(),
        )
    }
}

/// Wrapped material, which the server alone can open.
#[derive(Serialize)]
pub(super) struct WrappedView {
    pub(super) id: String,
    pub(super) version: i32,
    /// Base64.
    pub(super) wrapped_material: String,
    pub(super) algorithm: String,
    pub(super) checksum: String,
    pub(super) decision_id: String,
    pub(super) key: KeyView,
}

impl From<pb::GetKeyResponse> for WrappedView {
    fn from(answer: pb::GetKeyResponse) -> Self {
        let key = KeyView::of(answer.metadata);
        let material = answer.key_material.unwrap_or_default();
        Self {
            id: key.id.clone(),
            version: key.version,
            wrapped_material: base64(&material.encrypted_key_data),
            algorithm: material.encryption_algorithm,
            checksum: material.key_checksum,
            decision_id: answer.authorization_decision_id,
            key,
        }
    }
}

impl View for WrappedView {
    fn human(&self) -> Human {
        let mut fields = self.key.fields();
        fields.extend([
            ("wrapped", self.wrapped_material.clone()),
            ("algorithm", self.algorithm.clone()),
            ("checksum", self.checksum.clone()),
            ("decision", self.decision_id.clone()),
        ]);
        Human::Record(fields)
    }
}

/// What a rotation did.
#[derive(Serialize)]
pub(super) struct RotatedView {
    pub(super) id: String,
    pub(super) new_version: i32,
    pub(super) previous_version: i32,
    pub(super) rotated_at: Option<String>,
    pub(super) old_version_expires_at: Option<String>,
    pub(super) audit_index: u64,
    pub(super) key: KeyView,
}

impl From<pb::RotateKeyResponse> for RotatedView {
    fn from(answer: pb::RotateKeyResponse) -> Self {
        Self {
            id: answer.key_id,
            new_version: answer.new_version,
            previous_version: answer.previous_version,
            rotated_at: time(answer.rotation_timestamp.as_ref()),
            old_version_expires_at: time(answer.old_version_expires_at.as_ref()),
            audit_index: answer.audit_index,
            key: KeyView::of(answer.metadata),
        }
    }
}

impl View for RotatedView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("id", self.id.clone()),
            ("new version", format!("{} ({})", self.new_version, self.key.version_state)),
            ("previous version", self.previous_version.to_string()),
            ("rotated", short(self.rotated_at.as_ref())),
            ("previous ends", short(self.old_version_expires_at.as_ref())),
            ("rotates every", self.key.rotation_period_seconds.map(period).unwrap_or_default()),
            ("next rotation", short(self.key.next_rotation_at.as_ref())),
        ])
    }
}

/// One version of a key.
#[derive(Serialize)]
pub(super) struct VersionView {
    pub(super) version: i32,
    pub(super) state: String,
    pub(super) origin: String,
    pub(super) created_at: Option<String>,
    pub(super) expires_at: Option<String>,
    pub(super) effective_at: Option<String>,
    pub(super) checksum: Option<String>,
    pub(super) public_key_pem: Option<String>,
}

/// The versions of a key.
#[derive(Serialize)]
pub(super) struct VersionsView {
    pub(super) versions: Vec<VersionView>,
}

impl From<Vec<pb::KeyVersion>> for VersionsView {
    fn from(versions: Vec<pb::KeyVersion>) -> Self {
        let versions = versions
            .into_iter()
            .map(|v| VersionView {
                version: v.version,
                state: enum_word!(KeyVersionState, "KEY_VERSION_STATE_", v.state),
                origin: enum_word!(KeyOrigin, "KEY_ORIGIN_", v.origin),
                created_at: time(v.created_at.as_ref()),
                expires_at: time(v.expires_at.as_ref()),
                effective_at: time(v.effective_at.as_ref()),
                checksum: some(&v.key_checksum),
                public_key_pem: (!v.public_key_der.is_empty())
                    .then(|| pem("PUBLIC KEY", &v.public_key_der)),
            })
            .collect();
        Self { versions }
    }
}

impl View for VersionsView {
    fn human(&self) -> Human {
        Human::Rows(
            &["VERSION", "STATE", "ORIGIN", "CREATED", "ENDS", "EFFECTIVE"],
            self.versions
                .iter()
                .map(|v| {
                    vec![
                        v.version.to_string(),
                        v.state.clone(),
                        v.origin.clone(),
                        short(v.created_at.as_ref()),
                        short(v.expires_at.as_ref()),
                        short(v.effective_at.as_ref()),
                    ]
                })
                .collect(),
        )
    }
}

/// A name of a key.
#[derive(Serialize)]
pub(super) struct AliasView {
    pub(super) alias: String,
    pub(super) key_id: String,
    pub(super) created_at: Option<String>,
    pub(super) updated_at: Option<String>,
}

impl From<pb::KeyAlias> for AliasView {
    fn from(alias: pb::KeyAlias) -> Self {
        Self {
            alias: alias.alias,
            key_id: alias.key_id,
            created_at: time(alias.created_at.as_ref()),
            updated_at: time(alias.updated_at.as_ref()),
        }
    }
}

impl View for AliasView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("alias", format!("alias/{}", self.alias)),
            ("key", self.key_id.clone()),
            ("created", short(self.created_at.as_ref())),
            ("updated", short(self.updated_at.as_ref())),
        ])
    }
}

/// Names of keys.
#[derive(Serialize)]
pub(super) struct AliasesView {
    pub(super) aliases: Vec<AliasView>,
}

impl View for AliasesView {
    fn human(&self) -> Human {
        Human::Rows(
            &["ALIAS", "KEY", "CREATED", "UPDATED"],
            self.aliases
                .iter()
                .map(|a| {
                    vec![
                        format!("alias/{}", a.alias),
                        a.key_id.clone(),
                        short(a.created_at.as_ref()),
                        short(a.updated_at.as_ref()),
                    ]
                })
                .collect(),
        )
    }
}

/// An answer that says only that something was done.
#[derive(Serialize)]
pub(super) struct DoneView {
    /// What was done, for people.
    #[serde(skip)]
    pub(super) text: String,
    pub(super) done: bool,
    pub(super) audit_index: Option<u64>,
}

impl DoneView {
    pub(super) fn new(text: impl Into<String>, audit_index: Option<u64>) -> Self {
        Self { text: text.into(), done: true, audit_index }
    }
}

impl View for DoneView {
    fn human(&self) -> Human {
        Human::Text(self.text.clone())
    }
}
