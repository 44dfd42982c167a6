//! The cipher of everything Polykey seals for itself: AES-256-GCM-SIV (RFC 8452), with a key
//! commitment where a key could be chosen by somebody else.

use aes_gcm_siv::aead::KeyInit;
use aes_gcm_siv::{AeadInOut, Aes256GcmSiv};
use aws_lc_rs::hkdf;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::{CryptoFailure, codec, random};

pub(crate) const NONCE_LEN: usize = 12;
pub(crate) const TAG_LEN: usize = 16;
pub(crate) const SALT_LEN: usize = 32;
const COMMITMENT_LEN: usize = 32;

/// What [`seal_committed`] adds to a plaintext: salt ‖ commitment ‖ … ‖ tag.
pub(crate) const COMMITTED_OVERHEAD: usize = SALT_LEN + COMMITMENT_LEN + TAG_LEN;

pub(crate) type Key = Zeroizing<[u8; 32]>;

/// The bytes are not what was sealed under this key for this purpose. No more is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken;

/// An expanded AES-256-GCM-SIV key; erased when dropped.
pub(crate) struct Cipher(Box<Aes256GcmSiv>);

impl Cipher {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        Self(Box::new(Aes256GcmSiv::new(key.into())))
    }

    /// Appends ciphertext ‖ tag of `plaintext` to `out`.
    pub(crate) fn seal_onto(
        &self,
        out: &mut Vec<u8>,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        plaintext: &[u8],
    ) -> Result<(), CryptoFailure> {
        let start = out.len();
        out.reserve_exact(plaintext.len() + TAG_LEN);
        out.extend_from_slice(plaintext);
        let body = out.get_mut(start..).unwrap_or_default();
        match self.0.encrypt_inout_detached(nonce.into(), aad, body.into()) {
            Ok(tag) => {
                out.extend_from_slice(&tag);
                Ok(())
            }
            Err(_) => {
                // Only a plaintext above 64 GiB gets here; it must not stay behind in `out`.
                Zeroizing::new(out.split_off(start));
                Err(CryptoFailure("the plaintext is too long to seal"))
            }
        }
    }

    /// Opens ciphertext ‖ tag.
    pub(crate) fn open(
        &self,
        nonce: &[u8; NONCE_LEN],
        aad: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Broken> {
        let at = sealed.len().checked_sub(TAG_LEN).ok_or(Broken)?;
        let (body, tag) = sealed.split_at_checked(at).ok_or(Broken)?;
        let tag: &[u8; TAG_LEN] = tag.try_into().map_err(|_| Broken)?;
        let mut plaintext = Zeroizing::new(body.to_vec());
        self.0
            .decrypt_inout_detached(nonce.into(), aad, plaintext.as_mut_slice().into(), tag.into())
            .map_err(|_| Broken)?;
        Ok(plaintext)
    }
}

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-SHA-256 (RFC 5869): `N` bytes from a secret, a salt and labelled, length-prefixed parts.
pub(crate) fn derive<const N: usize>(
    secret: &[u8],
    salt: &[u8],
    label: &str,
    parts: &[&[u8]],
) -> Result<Zeroizing<[u8; N]>, CryptoFailure> {
    let parts = codec::join(parts);
    let info = codec::join(&[label.as_bytes(), &parts]);
    let mut out = Zeroizing::new([0; N]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(&[&info], Len(N))
        .and_then(|okm| okm.fill(out.as_mut_slice()))
        .map_err(|_| CryptoFailure("key derivation failed"))?;
    Ok(out)
}

/// A sub-key of a uniformly random key.
pub(crate) fn subkey(key: &[u8; 32], label: &str, parts: &[&[u8]]) -> Result<Key, CryptoFailure> {
    derive(key, &[], label, parts)
}

fn split(okm: &[u8; 64]) -> (Key, [u8; COMMITMENT_LEN]) {
    let mut key = Zeroizing::new([0; 32]);
    let mut commitment = [0; COMMITMENT_LEN];
    for (to, from) in key.iter_mut().chain(commitment.iter_mut()).zip(okm) {
        *to = *from;
    }
    (key, commitment)
}

/// Seals under a key derived for this one message, and commits to it:
/// salt 32 ‖ commitment 32 ‖ ciphertext ‖ tag 16.
///
/// One sealed text opens under one key only, although AES-GCM-SIV alone does not promise that
/// (as the AWS Encryption SDK does it: HKDF yields the AEAD key and a commitment).
pub(crate) fn seal_committed(
    key: &[u8],
    label: &str,
    context: &[&[u8]],
    plaintext: &[u8],
) -> Result<Vec<u8>, CryptoFailure> {
    seal_committed_with(key, random::array()?, label, context, plaintext)
}

/// [`seal_committed`] with a salt of the caller's, which may repeat only with the same plaintext.
pub(crate) fn seal_committed_with(
    key: &[u8],
    salt: [u8; SALT_LEN],
    label: &str,
    context: &[&[u8]],
    plaintext: &[u8],
) -> Result<Vec<u8>, CryptoFailure> {
    let okm = derive::<64>(key, &salt, label, context)?;
    let (aead_key, commitment) = split(&okm);
    let mut out = Vec::with_capacity(COMMITTED_OVERHEAD + plaintext.len());
    out.extend_from_slice(&salt);
    out.extend_from_slice(&commitment);
    // The key serves this message alone, so its nonce need not vary.
    let aad = codec::join(context);
    Cipher::new(&aead_key).seal_onto(&mut out, &[0; NONCE_LEN], &aad, plaintext)?;
    Ok(out)
}

/// Opens what [`seal_committed`] made, comparing the commitment first, in constant time.
pub(crate) fn open_committed(
    key: &[u8],
    label: &str,
    context: &[&[u8]],
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, Broken> {
    let mut reader = codec::Reader::new(sealed);
    let salt: [u8; SALT_LEN] = reader.array().ok_or(Broken)?;
    let stated: [u8; COMMITMENT_LEN] = reader.array().ok_or(Broken)?;
    let okm = derive::<64>(key, &salt, label, context).map_err(|_| Broken)?;
    let (aead_key, commitment) = split(&okm);
    if !bool::from(commitment.ct_eq(&stated)) {
        return Err(Broken);
    }
    let aad = codec::join(context);
    Cipher::new(&aead_key).open(&[0; NONCE_LEN], &aad, reader.rest())
}

#[cfg(test)]
mod tests;
