//! The authenticated ciphers, one call a message: what both ciphertext formats stand on.

use aws_lc_rs::aead::{
    AES_128_GCM, AES_128_GCM_SIV, AES_256_GCM, AES_256_GCM_SIV, Aad, CHACHA20_POLY1305,
    LessSafeKey, Nonce, UnboundKey,
};
use chacha20::R20;
use zeroize::{Zeroize, Zeroizing};

use crate::{Algorithm, CryptoFailure};

pub(super) const TAG_LEN: usize = 16;
const MAX_NONCE_LEN: usize = 24;
const TOO_LONG: CryptoFailure = CryptoFailure("the plaintext is too long to seal");

/// It does not authenticate. No more is known, and nothing of it was released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// A cipher, without a key.
#[derive(Clone, Copy)]
pub(super) enum Suite {
    /// Through aws-lc, with nonces of 12 bytes.
    Aws(&'static aws_lc_rs::aead::Algorithm),
    /// With nonces of 24 bytes: aws-lc's ChaCha20-Poly1305 under a sub-key of HChaCha20, which aws-lc does
    /// not have (draft-irtf-cfrg-xchacha-03, section 2.3).
    XChaCha,
}

impl Suite {
    /// The cipher that a key of this algorithm encrypts with.
    pub(super) fn of(algorithm: Algorithm) -> Option<Self> {
        Some(match algorithm {
            Algorithm::Aes256 => Self::Aws(&AES_256_GCM_SIV),
            Algorithm::Aes128 => Self::Aws(&AES_128_GCM_SIV),
            Algorithm::Aes256Gcm => Self::Aws(&AES_256_GCM),
            Algorithm::Aes128Gcm => Self::Aws(&AES_128_GCM),
            Algorithm::ChaCha20Poly1305 => Self::Aws(&CHACHA20_POLY1305),
            Algorithm::XChaCha20Poly1305 => Self::XChaCha,
            _ => return None,
        })
    }

    /// In bytes: 16 or 32.
    pub(super) fn key_len(self) -> usize {
        match self {
            Self::Aws(algorithm) => algorithm.key_len(),
            Self::XChaCha => 32,
        }
    }

    /// In bytes: 12 or 24.
    pub(super) fn nonce_len(self) -> usize {
        match self {
            Self::Aws(algorithm) => algorithm.nonce_len(),
            Self::XChaCha => MAX_NONCE_LEN,
        }
    }

    /// Expands a key of [`Self::key_len`] bytes.
    pub(super) fn key(self, key: &[u8]) -> Result<AeadKey, CryptoFailure> {
        let failure = CryptoFailure("a cipher key is of the wrong length");
        let inner = match self {
            Self::Aws(algorithm) => {
                let key = UnboundKey::new(algorithm, key).map_err(|_| failure)?;
                Inner::Aws(LessSafeKey::new(key))
            }
            Self::XChaCha => {
                let mut copy = Box::new(Zeroizing::new([0; 32]));
                let key: &[u8; 32] = key.try_into().map_err(|_| failure)?;
                copy.copy_from_slice(key);
                Inner::XChaCha(copy)
            }
        };
        Ok(AeadKey { inner, nonce_len: self.nonce_len() })
    }
}

/// An expanded key; erased when dropped (aws-lc erases what it frees).
pub(super) struct AeadKey {
    inner: Inner,
    nonce_len: usize,
}

enum Inner {
    Aws(LessSafeKey),
    XChaCha(Box<Zeroizing<[u8; 32]>>),
}

/// The key and nonce of ChaCha20-Poly1305 that stand for a key and a nonce of 24 bytes.
fn xchacha(key: &[u8; 32], nonce: &[u8]) -> Option<(LessSafeKey, Nonce)> {
    let (head, tail) = nonce.split_first_chunk::<16>()?;
    let mut subkey = chacha20::hchacha::<R20>(key.into(), head.into());
    let unbound = UnboundKey::new(&CHACHA20_POLY1305, &subkey);
    subkey.zeroize();
    let mut short = [0; 12];
    short.get_mut(4..)?.copy_from_slice(<&[u8; 8]>::try_from(tail).ok()?);
    Some((LessSafeKey::new(unbound.ok()?), Nonce::assume_unique_for_key(short)))
}

/// The nonce of a chunk of a stream, for each length of nonce: zeros ‖ counter u32 ‖ 1 for the last chunk, 0 for
/// the others. A key that serves one message alone uses number 0, not the last: all zeros.
pub(super) struct ChunkNonce([u8; MAX_NONCE_LEN]);

impl ChunkNonce {
    pub(super) fn new(counter: u32, last: bool) -> Self {
        let [a, b, c, d] = counter.to_be_bytes();
        let mut bytes = [0; MAX_NONCE_LEN];
        for (to, from) in bytes.iter_mut().rev().zip([u8::from(last), d, c, b, a]) {
            *to = from;
        }
        Self(bytes)
    }

    fn of_len(&self, len: usize) -> &[u8] {
        self.0.get(MAX_NONCE_LEN.saturating_sub(len)..).unwrap_or_default()
    }
}

impl AeadKey {
    /// Encrypts a chunk in place and gives its tag; no additional data, which the key is bound to already.
    pub(super) fn seal_chunk(
        &self,
        nonce: &ChunkNonce,
        body: &mut [u8],
    ) -> Result<[u8; TAG_LEN], CryptoFailure> {
        self.seal(nonce.of_len(self.nonce_len), &[], body)
    }

    /// Decrypts ciphertext ‖ tag of a chunk into `out`.
    pub(super) fn open_chunk(
        &self,
        nonce: &ChunkNonce,
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Broken> {
        self.open(nonce.of_len(self.nonce_len), &[], sealed, out)
    }

    /// Encrypts `body` in place and gives its tag. On failure `body` is erased.
    pub(super) fn seal(
        &self,
        nonce: &[u8],
        aad: &[u8],
        body: &mut [u8],
    ) -> Result<[u8; TAG_LEN], CryptoFailure> {
        let tag = match &self.inner {
            Inner::Aws(key) => Nonce::try_assume_unique_for_key(nonce)
                .and_then(|nonce| key.seal_in_place_separate_tag(nonce, Aad::from(aad), body))
                .ok()
                .and_then(|tag| tag.as_ref().try_into().ok()),
            Inner::XChaCha(key) => xchacha(key, nonce)
                .and_then(|(key, nonce)| {
                    key.seal_in_place_separate_tag(nonce, Aad::from(aad), body).ok()
                })
                .and_then(|tag| tag.as_ref().try_into().ok()),
        };
        tag.ok_or_else(|| {
            body.zeroize();
            TOO_LONG
        })
    }

    /// Decrypts ciphertext ‖ tag into `out`, which is as long as the ciphertext. On failure `out` is all zeros.
    pub(super) fn open(
        &self,
        nonce: &[u8],
        aad: &[u8],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Broken> {
        let opened = self.open_unerased(nonce, aad, sealed, out);
        if opened.is_none() {
            out.zeroize();
        }
        opened.ok_or(Broken)
    }

    fn open_unerased(&self, nonce: &[u8], aad: &[u8], sealed: &[u8], out: &mut [u8]) -> Option<()> {
        let (body, tag) = sealed.split_last_chunk::<TAG_LEN>()?;
        match &self.inner {
            Inner::Aws(key) => {
                let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
                key.open_separate_gather(nonce, Aad::from(aad), body, tag, out).ok()
            }
            Inner::XChaCha(key) => {
                let (key, nonce) = xchacha(key, nonce)?;
                key.open_separate_gather(nonce, Aad::from(aad), body, tag, out).ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use chacha20poly1305::{AeadInOut, KeyInit, XChaCha20Poly1305};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn xchacha_is_what_another_implementation_makes_of_it(
            key in any::<[u8; 32]>(),
            nonce in any::<[u8; 24]>(),
            aad in prop::collection::vec(any::<u8>(), 0..70),
            plaintext in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let theirs = XChaCha20Poly1305::new(&key.into());
            let mut expected = plaintext.clone();
            let expected_tag = theirs
                .encrypt_inout_detached(&nonce.into(), &aad, expected.as_mut_slice().into())
                .unwrap();
            let ours = Suite::XChaCha.key(&key).unwrap();
            let mut sealed = plaintext.clone();
            let tag = ours.seal(&nonce, &aad, &mut sealed).unwrap();
            prop_assert_eq!(&sealed, &expected);
            prop_assert_eq!(tag.as_slice(), expected_tag.as_slice());
            sealed.extend_from_slice(&tag);
            let mut opened = vec![0; plaintext.len()];
            prop_assert_eq!(ours.open(&nonce, &aad, &sealed, &mut opened), Ok(()));
            prop_assert_eq!(opened, plaintext);
            sealed[usize::from(key[0]) % (tag.len())] ^= 1;
            let mut opened = vec![1; sealed.len() - TAG_LEN];
            prop_assert_eq!(ours.open(&nonce, &aad, &sealed, &mut opened), Err(Broken));
            prop_assert!(opened.iter().all(|byte| *byte == 0));
        }
    }
}
