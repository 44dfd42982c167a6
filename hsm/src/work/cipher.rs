//! A key that encrypts: from it, each message and each stream gets a cipher key of its own and a commitment.

use aws_lc_rs::{digest, hmac};
use zeroize::Zeroizing;

use super::aead::{AeadKey, Suite};
use super::format::{COMMITMENT_LEN, SALT_LEN};
use super::{Binding, compare, kdf};
use crate::{Algorithm, CryptoFailure, KeyMaterial, codec};

const CONVERGENT_LABEL: &[u8] = b"polykey/convergent/v1";

/// The key and the algorithm that every blob of it names.
pub(super) struct CipherKey {
    pub(super) algorithm: Algorithm,
    suite: Suite,
    secret: Zeroizing<Vec<u8>>,
}

pub(super) type Commitment = [u8; COMMITMENT_LEN];

/// What a blob is bound to besides its header: SHA-256 of context and additional data, each preceded by its length.
pub(super) struct Bound([u8; 32]);

impl Bound {
    pub(super) fn of(binding: &Binding<'_>) -> Self {
        let mut cx = digest::Context::new(&digest::SHA256);
        for part in [binding.context, binding.aad] {
            cx.update(&(part.len() as u64).to_be_bytes());
            cx.update(part);
        }
        let mut out = [0; 32];
        out.copy_from_slice(cx.finish().as_ref());
        Self(out)
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl CipherKey {
    pub(super) fn new(algorithm: Algorithm, material: &KeyMaterial) -> Option<Self> {
        let suite = Suite::of(algorithm)?;
        Some(Self { algorithm, suite, secret: Zeroizing::new(material.bytes().to_vec()) })
    }

    /// HKDF-SHA-256 over the key, with the salt, and label, header and what is bound as `info`: a cipher key and
    /// the commitment to it and to all of these.
    pub(super) fn derive(
        &self,
        label: &str,
        header: &[u8],
        salt: &[u8; SALT_LEN],
        bound: &Bound,
    ) -> Result<(AeadKey, Commitment), CryptoFailure> {
        let info = codec::join(&[label.as_bytes(), header, &bound.0]);
        let mut okm = Zeroizing::new([0; 32 + COMMITMENT_LEN]);
        let len = self.suite.key_len() + COMMITMENT_LEN;
        let okm = okm.get_mut(..len).unwrap_or_default();
        kdf::hkdf_sha256(&self.secret, salt, &info, okm)?;
        let (key, commitment) =
            okm.split_last_chunk().ok_or(CryptoFailure("key derivation failed"))?;
        Ok((self.suite.key(key)?, *commitment))
    }

    /// [`Self::derive`] for what says that it commits to the same.
    pub(super) fn derive_committed(
        &self,
        label: &str,
        header: &[u8],
        salt: &[u8; SALT_LEN],
        bound: &Bound,
        stated: &Commitment,
    ) -> Result<Option<AeadKey>, CryptoFailure> {
        let (key, commitment) = self.derive(label, header, salt, bound)?;
        Ok(compare::same(&commitment, stated).then_some(key))
    }

    /// The salt of a convergent blob: a PRF, under a key of its own, of all that is sealed and bound.
    pub(super) fn convergent_salt(
        &self,
        header: &[u8],
        bound: &Bound,
        plaintext: &[u8],
    ) -> Result<[u8; SALT_LEN], CryptoFailure> {
        let mut key = Zeroizing::new([0; 32]);
        kdf::hkdf_sha256(&self.secret, &[], &codec::join(&[CONVERGENT_LABEL]), key.as_mut_slice())?;
        let mut cx = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()));
        for part in [header, &bound.0, plaintext] {
            cx.update(&(part.len() as u64).to_be_bytes());
            cx.update(part);
        }
        let mut salt = [0; SALT_LEN];
        salt.copy_from_slice(cx.sign().as_ref());
        Ok(salt)
    }
}
