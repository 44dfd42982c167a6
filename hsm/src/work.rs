//! A key at work: what each purpose does with a version's material, for callers who never see it.
//!
//! A [`WorkingKey`] is parsed once and used often; it can be remembered where parsing is dear, and is
//! erased when dropped. Public parts work without one: see `verify`.

use std::collections::BTreeMap;

use crate::codec;
use crate::{Algorithm, CryptoFailure, Purpose};

pub mod asymmetric;
mod scheme;
#[cfg(test)]
mod wycheproof;

pub use asymmetric::{encapsulate, encrypt_to, verify};
pub use scheme::{SignInput, SignatureScheme};

/// Why a key did not do its work. None of these carries a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// It does not open or verify: another key, version or context, changed bytes. No more is told.
    #[error("decryption failed")]
    Failed,
    /// The key was made for something else.
    #[error("a key of type {algorithm} made to {purpose} does not do this")]
    WrongPurpose {
        /// What the key is.
        algorithm: Algorithm,
        /// What it was made for.
        purpose: Purpose,
    },
    /// Something about the request, and not about any secret, is not as it must be.
    #[error("{field}: {problem}")]
    Input {
        /// The field of the request, as `plaintext`.
        field: &'static str,
        /// What is wrong and what would be right.
        problem: &'static str,
    },
    /// The stored material is not a key of its algorithm.
    #[error("the stored material is not a key of type {0}")]
    Material(Algorithm),
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

impl WorkError {
    pub(crate) const fn input(field: &'static str, problem: &'static str) -> Self {
        Self::Input { field, problem }
    }
}

/// What a ciphertext is bound to, besides the key itself: it opens for exactly this and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding<'a> {
    /// The key.
    pub key_id: [u8; 16],
    /// The version, from 1.
    pub version: u32,
    /// The caller's context, from [`canonical_context`].
    pub context: &'a [u8],
    /// The caller's additional authenticated data.
    pub aad: &'a [u8],
}

/// A context as it is bound: its pairs in order of their names, each name and value preceded by its length as a
/// u64, big-endian; no bytes for an empty context.
#[must_use]
pub fn canonical_context(context: &BTreeMap<String, String>) -> Vec<u8> {
    let parts: Vec<&[u8]> =
        context.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]).collect();
    codec::join(&parts)
}
