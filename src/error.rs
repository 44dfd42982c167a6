//! What can go wrong with a request, in words for strangers; what operators need goes to the log.

use std::time::Duration;

/// One field that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// Path of the field as in the protobuf, e.g. `tags["a b"]` or `keys[3].key_id`.
    pub field: String,
    /// What is wrong and what would be right.
    pub description: String,
}

impl FieldViolation {
    /// Of texts that are cut where they are too long for an answer: 256 and 512 bytes.
    #[must_use]
    pub fn new(mut field: String, mut description: String) -> Self {
        for (text, most) in [(&mut field, 256), (&mut description, 512)] {
            if text.len() > most {
                text.truncate(text.floor_char_boundary(most - '…'.len_utf8()));
                text.push('…');
            }
        }
        Self { field, description }
    }
}

/// Why the state of a key, version, client or node forbids what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The key is revoked.
    KeyRevoked,
    /// The key is disabled.
    KeyDisabled,
    /// The key has expired.
    KeyExpired,
    /// The key waits for its destruction.
    KeyPendingDestruction,
    /// The key's material has been destroyed.
    KeyDestroyed,
    /// The key is not in a state in which this makes sense (e.g. enabling an enabled key).
    KeyWrongState,
    /// The version is below the key's minimum.
    VersionTooOld,
    /// The key has no such version.
    VersionNotFound,
    /// The version has been revoked, or its grace period is over.
    VersionRevoked,
    /// The version is staged and seals nothing yet.
    VersionStaged,
    /// The version has sealed as often as the key allows.
    UsesExhausted,
    /// The version has been trimmed for ever.
    VersionTrimmed,
    /// The key was created not to be exported.
    NotExportable,
    /// The node has no backend for this storage profile.
    ProfileUnavailable,
    /// The backend that a hardened key lies under answers, and refuses.
    BackendRefused,
    /// The bounds asked for contradict each other or the versions there are.
    BoundsInvalid,
    /// Something of the same name exists.
    AlreadyExists,
    /// A client with this state cannot do that.
    ClientState,
    /// The node is not set up for this.
    NotConfigured,
    /// It is still referred to.
    InUse,
    /// Without it the node could not open its store.
    LastSlot,
    /// Nobody would be left who may administer the node.
    LastAdministrator,
    /// Irreversible work is held back until the clock is confirmed.
    ClockUnconfirmed,
    /// The key is to be revoked at an earlier time already.
    RevocationScheduled,
}

impl Reason {
    /// The `reason` of google.rpc.ErrorInfo: stable, for programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::KeyRevoked => "KEY_REVOKED",
            Self::KeyDisabled => "KEY_DISABLED",
            Self::KeyExpired => "KEY_EXPIRED",
            Self::KeyPendingDestruction => "KEY_PENDING_DESTRUCTION",
            Self::KeyDestroyed => "KEY_DESTROYED",
            Self::KeyWrongState => "KEY_WRONG_STATE",
            Self::VersionTooOld => "VERSION_TOO_OLD",
            Self::VersionNotFound => "VERSION_NOT_FOUND",
            Self::VersionRevoked => "VERSION_REVOKED",
            Self::VersionStaged => "VERSION_STAGED",
            Self::UsesExhausted => "USES_EXHAUSTED",
            Self::VersionTrimmed => "VERSION_TRIMMED",
            Self::NotExportable => "NOT_EXPORTABLE",
            Self::ProfileUnavailable => "PROFILE_UNAVAILABLE",
            Self::BackendRefused => "BACKEND_REFUSED",
            Self::BoundsInvalid => "BOUNDS_INVALID",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::ClientState => "CLIENT_STATE",
            Self::NotConfigured => "NOT_CONFIGURED",
            Self::InUse => "IN_USE",
            Self::LastSlot => "LAST_SLOT",
            Self::LastAdministrator => "LAST_ADMINISTRATOR",
            Self::ClockUnconfirmed => "CLOCK_UNCONFIRMED",
            Self::RevocationScheduled => "REVOCATION_SCHEDULED",
        }
    }

    /// One sentence fit for strangers.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::KeyRevoked => "the key is revoked",
            Self::KeyDisabled => "the key is disabled; enable it first",
            Self::KeyExpired => "the key has expired",
            Self::KeyPendingDestruction => "the key waits for its destruction; cancel that first",
            Self::KeyDestroyed => "the key has been destroyed",
            Self::KeyWrongState => "the key is not in a state that allows this",
            Self::VersionTooOld => "the version is below the key's minimum version",
            Self::VersionNotFound => "the key has no such version",
            Self::VersionRevoked => "the version is revoked",
            Self::VersionStaged => "the version is staged; it seals once it is the primary",
            Self::UsesExhausted => {
                "the version has been used as often as the key allows; rotate it"
            }
            Self::VersionTrimmed => "the version has been trimmed",
            Self::NotExportable => "the key was created not to be exported",
            Self::ProfileUnavailable => {
                "this node has no backend for that: an operator has to name a wrapper of kind \
                 \"pkcs11\" or \"aws\" in [hardened] (for keys in a token \"pkcs11\", with a token that \
                 can make them), or to put back the one that the key was made with"
            }
            Self::BackendRefused => {
                "the hardware or cloud service that protects the key refuses; an operator finds the \
                 reason in the node's log"
            }
            Self::BoundsInvalid => "the version bounds are out of order",
            Self::AlreadyExists => "the name is taken",
            Self::ClientState => "the client is not in a state that allows this",
            Self::NotConfigured => "this node is not configured for that",
            Self::InUse => "it is still in use",
            Self::LastSlot => {
                "it is the last slot by which this node can open its store: add another one first, and \
                 test that it opens"
            }
            Self::LastAdministrator => {
                "it is the last enabled administrator; appoint another one first"
            }
            Self::ClockUnconfirmed => "the node's clock has jumped; an operator must confirm it",
            Self::RevocationScheduled => {
                "the key is to be revoked earlier than that already, which cannot be put off"
            }
        }
    }
}

/// Why a request was not carried out. The mapping to status codes is in `rpc::status` alone.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No identity, or a bad one; one text for all causes.
    #[error("authentication required or failed")]
    Unauthenticated,
    /// Fields that are malformed or out of range.
    #[error("{}", describe(.0))]
    Invalid(Vec<FieldViolation>),
    /// There is no such thing, or the caller may not know that there is.
    #[error("not found")]
    NotFound,
    /// The caller may know of it, but not do this.
    #[error("permission denied")]
    Denied {
        /// Under which the decision is found in the audit trail.
        decision_id: String,
    },
    /// The state forbids it.
    #[error("{}", .0.text())]
    State(Reason),
    /// Anything cryptographic failed, whatever it was.
    #[error("decryption failed")]
    Crypto,
    /// It was changed meanwhile; read again and retry.
    #[error("changed concurrently; read it again and retry")]
    Conflict,
    /// Over a limit; retry later.
    #[error("too many requests; retry later")]
    Exhausted {
        /// When it makes sense to try again.
        retry_after: Duration,
    },
    /// The caller has as many keys as it may have.
    #[error(
        "the quota {name:?} is used up: it gives a client {keys} keys, and keys that wait for their \
         destruction count; ask an operator for more, or destroy some, which helps when their window is over"
    )]
    Quota {
        /// The rule that refuses.
        name: String,
        /// How many keys it gives a client.
        keys: u32,
    },
    /// The disk under the store is full, or so nearly that changes are refused.
    #[error(
        "the disk of this node is full: changes are refused until an operator has made room, and \
         what can be read or used without being recorded goes on"
    )]
    NoRoom,
    /// Something this node depends on is away.
    #[error("temporarily unavailable; retry later")]
    Unavailable {
        /// When it makes sense to try again.
        retry_after: Duration,
        /// For the log.
        internal: String,
    },
    /// The change may or may not have been made: ask again with the same idempotency key.
    #[error("the outcome is unknown; repeat the call with the same idempotency key")]
    OutcomeUnknown {
        /// For the log.
        internal: String,
    },
    /// The request's deadline passed, or it was given up.
    #[error(
        "deadline exceeded; a change may have been made: repeat it with the same idempotency key"
    )]
    DeadlineExceeded,
    /// A stored record failed authentication.
    #[error("stored data failed authentication")]
    DataLoss {
        /// For the log.
        internal: String,
    },
    /// A bug of ours.
    #[error("internal error")]
    Internal {
        /// For the log.
        internal: String,
    },
}

impl Error {
    /// One malformed field.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::Invalid(vec![FieldViolation::new(field.into(), description.into())])
    }

    /// A bug of ours, described for the log.
    pub fn internal(text: impl Into<String>) -> Self {
        Self::Internal { internal: text.into() }
    }

    /// A record that failed authentication, described for the log.
    pub fn data_loss(text: impl Into<String>) -> Self {
        Self::DataLoss { internal: text.into() }
    }

    /// Something is away, described for the log.
    pub fn unavailable(text: impl Into<String>) -> Self {
        Self::Unavailable { retry_after: Duration::from_secs(1), internal: text.into() }
    }

    /// What operators should read and strangers should not, where there is any.
    #[must_use]
    pub fn internal_text(&self) -> Option<&str> {
        match self {
            Self::Unavailable { internal, .. }
            | Self::OutcomeUnknown { internal }
            | Self::DataLoss { internal }
            | Self::Internal { internal } => Some(internal),
            _ => None,
        }
    }
}

fn describe(violations: &[FieldViolation]) -> String {
    /// What is left out stands in the details as far as it fits there.
    const LONGEST: usize = 1024;
    let mut text = String::from("invalid argument");
    for (i, violation) in violations.iter().enumerate() {
        let more = violation.field.len() + violation.description.len();
        if i > 0 && text.len() + more > LONGEST {
            text.push_str("; and more");
            break;
        }
        text.push_str(if i == 0 { ": " } else { "; " });
        text.push_str(&violation.field);
        text.push_str(": ");
        text.push_str(&violation.description);
    }
    text
}

impl From<polykey_storage::ReadError> for Error {
    fn from(error: polykey_storage::ReadError) -> Self {
        use polykey_storage::{ReadError, StoreError};
        let text = format!("reading the store: {error}");
        match error {
            // It will be no better the next time.
            ReadError::Store(StoreError::Damaged(_)) => Self::data_loss(text),
            _ => Self::unavailable(text),
        }
    }
}
