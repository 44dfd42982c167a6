//! Key material, its algorithms and its wrappers: the only code of Polykey that sees key bytes.
//!
//! It never sees a caller and never writes to a disk; the one thing it reads is a master key. What
//! it hands out is sealed, keyed or public, except through [`KeyMaterial::expose_for_export`].
//!
//! From the outside in: a [`KeyWrapper`] (a master key, a passphrase, a device) wraps the
//! [`RootKey`] in a slot; the root seals one [`Ring`] of storage keys; the ring seals records
//! ([`Sealer`]), keys MACs ([`MacPurpose`]) and wraps the material of key versions
//! ([`MaterialContext`]); a version's [`BlobKey`] seals what a client holds ([`WrappedBlob`]). The
//! blob key of a hardened version lies under a wrapper of its own as well ([`HardenedBlobKey`]).
//!
//! Memory is not locked here: locking one value needs `unsafe`, while `mlockall` at the start of a
//! process is safe and covers the copies that no type knows of. What is secret is erased on drop.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

use std::fmt;
use std::time::{Duration, Instant};

pub use futures::future::BoxFuture;

pub mod algorithm;
pub mod aws;
mod blob;
pub mod bootstrap;
mod cipher;
mod codec;
#[doc(hidden)]
pub mod conformance;
mod export;
mod hardened;
pub mod import;
mod local;
mod mac;
mod material;
pub mod pkcs11;
mod quorum;
pub mod random;
pub mod recovery;
mod ring;
mod root;
mod sealer;
mod version_material;
pub mod work;
mod wrapped;

pub use algorithm::{Algorithm, Generated, GenerationParams, PublicKey, PublicKeyError, Purpose};
pub use blob::{BlobHeader, BlobKey, WrappedBlob, key_checksum};
pub use export::{
    ExportError, ExportInfo, HpkeExport, RecipientPrivateKey, export_hpke,
    generate_recipient_keypair, open_hpke_export, recipient_key_sha256,
};
pub use hardened::{HardenedBlobKey, HardenedMaterial};
pub use local::{
    LocalError, LocalWrapper, MasterKeySource, PassphraseParams, SecretSource, decode_key,
    generate_master_key,
};
pub use mac::MacPurpose;
pub use material::{KeyMaterial, MaterialError};
pub use quorum::QuorumWrapper;
pub use ring::{Ring, RingError};
pub use root::{RootError, RootKey};
pub use sealer::{OpenError, OpenedRecord, RecordBinding, RecordHeader, Sealer, header};
pub use version_material::{
    MaterialContext, MaterialState, ResidentMaterial, UnwrapMaterialError, UnwrappedMaterial,
};
pub use work::WorkingKey;
pub use wrapped::{DecodeError, SlotKind, WrappedKey, WrapperId};

/// Something that turns a key into bytes which it alone turns back: a master key, a passphrase, a
/// security module, a cloud service.
///
/// Every implementation passes the suite in `conformance`. Implementations may compute for long
/// (a passphrase takes some 200 ms) or wait for a device: poll them off the threads of requests.
pub trait KeyWrapper: Send + Sync {
    /// Names this wrapper in what it wraps, the same across restarts and renames of its
    /// configuration.
    fn id(&self) -> &WrapperId;

    /// What kind of wrapper this is.
    fn kind(&self) -> SlotKind;

    /// Whether it opens what it wraps. The public half of a recovery key does not.
    fn opens(&self) -> bool {
        true
    }

    /// What last went wrong with a device or service, in words for operators; no secrets.
    fn last_failure(&self) -> Option<String> {
        None
    }

    /// Wraps `key` so that it opens only for the same `cx`.
    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>>;

    /// Opens what this wrapper wrapped for the same `cx`.
    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>>;
}

/// Where a wrapped key belongs; bound into it, so that it opens nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrapContext {
    /// The node whose key it is.
    pub node_id: [u8; 16],
    /// What the key is for, one word per use.
    pub purpose: &'static str,
    /// The slot that holds it.
    pub slot_id: [u8; 16],
}

impl WrapContext {
    /// The context of a slot that holds a node's root key.
    #[must_use]
    pub const fn root_slot(node_id: [u8; 16], slot_id: [u8; 16]) -> Self {
        Self { node_id, purpose: "root", slot_id }
    }

    /// The context of what a hardened key's versions lie under: the slot is the key.
    #[must_use]
    pub const fn hardened_key(node_id: [u8; 16], key_id: [u8; 16]) -> Self {
        Self { node_id, purpose: "hardened-key", slot_id: key_id }
    }
}

/// The moment by which a wrapper must have answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// So long from now; a century at most.
    #[must_use]
    pub fn after(duration: Duration) -> Self {
        let duration = duration.min(Duration::from_secs(100 * 366 * 86_400));
        let now = Instant::now();
        Self(now.checked_add(duration).unwrap_or(now))
    }

    /// The time that is left; zero when it has passed.
    #[must_use]
    pub fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// Fails when the deadline has passed.
    ///
    /// # Errors
    /// [`WrapError::DeadlineExceeded`].
    pub fn check(self) -> Result<(), WrapError> {
        if self.remaining().is_zero() { Err(WrapError::DeadlineExceeded) } else { Ok(()) }
    }
}

/// Why a wrapper did not wrap or unwrap. None of these carries a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrapError {
    /// Another wrapper made it: try that one.
    #[error("wrapped by something else")]
    NotMine,
    /// This wrapper should open it and cannot: a wrong passphrase, another context, or tampering.
    #[error("it does not open: wrong secret, wrong place or changed bytes")]
    Broken,
    /// The device or service does not answer.
    #[error("the wrapper is unavailable")]
    Unavailable {
        /// Whether asking again later can help.
        retryable: bool,
    },
    /// The deadline passed first.
    #[error("the wrapper's deadline passed")]
    DeadlineExceeded,
    /// The service answered and refused: a disabled key, a missing permission, expired
    /// credentials. The text says what to do, for operators; asking again changes nothing.
    #[error("{0}")]
    Refused(String),
    /// It can never work as configured; the text says why, for operators.
    #[error("{0}")]
    Config(String),
}

impl From<CryptoFailure> for WrapError {
    fn from(failure: CryptoFailure) -> Self {
        Self::Config(failure.to_string())
    }
}

/// The cryptographic library failed where it must not: no entropy, no memory. Nothing was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CryptoFailure(pub(crate) &'static str);

/// Prints a 16-byte public id in hexadecimal.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Debug for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(self.0))
    }
}
