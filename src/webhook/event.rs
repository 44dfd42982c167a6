//! Which events of the log a webhook is told, and the message that each becomes.
//!
//! A message has what the log says of an event to anybody who may read it: ids, versions, times, who did it
//! and why. No secrets, no key material.

use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use serde::Serialize;

use crate::key::KeyId;
use crate::time::Time;

/// The action of a notice that a key is about to expire.
pub const KEY_EXPIRES: &str = "NotifyKeyExpiry";
/// The action of a notice that a key has expired.
pub const KEY_EXPIRED: &str = "ExpireKey";
/// The action of a notice that an API key is about to expire.
pub const API_KEY_EXPIRES: &str = "NotifyApiKeyExpiry";
/// The action of a notice that an API key has expired.
pub const API_KEY_EXPIRED: &str = "ExpireApiKey";
/// The detail of a revocation whose caller has asked that the operator's systems be told.
pub const NOTIFIES: &str = "notify";
/// The detail of a revocation that is still to come.
pub const EFFECTIVE_AT: &str = "effective_at";
/// The detail of a rotation that has made another version primary.
pub const PREVIOUS: &str = "previous_version";

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal),* $(,)?) => {
        /// What a webhook can be told.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind { $($(#[$doc])* $kind),* }

        impl Kind {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// Its name in the configuration, and the `type` of its messages.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$kind => $name),* }
            }

            /// The kind of this name.
            #[must_use]
            pub fn parse(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$kind),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Another version is primary.
    KeyRotated = "key.rotated",
    /// A key is revoked, and whoever revoked it has asked that it be told.
    KeyRevoked = "key.revoked",
    /// The grace of an old version is over.
    VersionRevoked = "key.version_revoked",
    /// A key expires in 30, 7 or 1 days.
    KeyExpiring = "key.expiring",
    /// A key has expired.
    KeyExpired = "key.expired",
    /// A key is disabled.
    KeyDisabled = "key.disabled",
    /// A key is enabled again.
    KeyEnabled = "key.enabled",
    /// The window before a destruction has begun.
    DestructionScheduled = "key.destruction_scheduled",
    /// A destruction was called off.
    DestructionCancelled = "key.destruction_cancelled",
    /// The material of a key is erased.
    KeyDestroyed = "key.destroyed",
    /// A client's API key expires in 30, 7 or 1 days.
    ApiKeyExpiring = "api_key.expiring",
    /// A client's API key has expired.
    ApiKeyExpired = "api_key.expired",
}

impl Kind {
    /// What an event of the log is to a webhook.
    #[must_use]
    pub fn of(event: &AuditEvent) -> Option<Self> {
        if event.outcome() != Outcome::Success {
            return None;
        }
        let has = |name: &str| event.details.contains_key(name);
        Some(match event.action.as_str() {
            // A staged version and a new period rotate nothing yet.
            "RotateKey" | "PromoteVersion" if has(PREVIOUS) => Self::KeyRotated,
            "RevokeKey" if has(NOTIFIES) && !has(EFFECTIVE_AT) => Self::KeyRevoked,
            "EndGrace" => Self::VersionRevoked,
            KEY_EXPIRES => Self::KeyExpiring,
            KEY_EXPIRED => Self::KeyExpired,
            "DisableKey" => Self::KeyDisabled,
            "EnableKey" => Self::KeyEnabled,
            "ScheduleKeyDestruction" => Self::DestructionScheduled,
            "CancelKeyDestruction" => Self::DestructionCancelled,
            "DestroyKey" => Self::KeyDestroyed,
            API_KEY_EXPIRES => Self::ApiKeyExpiring,
            API_KEY_EXPIRED => Self::ApiKeyExpired,
            _ => return None,
        })
    }
}

#[derive(Serialize)]
struct Message<'a> {
    r#type: &'static str,
    timestamp: String,
    data: Data<'a>,
}

#[derive(Serialize)]
struct Data<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous_version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    days: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destroy_at: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    due: Option<&'a str>,
    /// Whose API key.
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    api_key: Option<&'a str>,
    /// Who did it.
    by: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    request_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    correlation_id: &'a str,
    leaf: u64,
}

/// The body of the message about an event, JSON.
///
/// # Errors
/// None that is known of: the values are texts and numbers.
pub(super) fn body(
    kind: Kind,
    event: &AuditEvent,
    leaf: u64,
) -> Result<Vec<u8>, serde_json::Error> {
    let text = |name: &str| event.details.get(name).map(String::as_str);
    let number = |name: &str| text(name).and_then(|text| text.parse().ok());
    serde_json::to_vec(&Message {
        r#type: kind.name(),
        timestamp: Time::from_micros(event.time).to_string(),
        data: Data {
            key_id: KeyId::from_slice(&event.key_id).map(|id| id.to_string()),
            version: (event.version != 0).then_some(event.version),
            previous_version: number(PREVIOUS),
            reason: text("reason").filter(|reason| !reason.is_empty()),
            days: number("days"),
            expires_at: text("expires_at"),
            destroy_at: text("destroy_at"),
            due: text("due"),
            client: text("client"),
            api_key: text("api_key"),
            by: &event.client_id,
            request_id: &event.request_id,
            correlation_id: &event.correlation_id,
            leaf,
        },
    })
}
