//! AES-KWP (RFC 5649, NIST SP 800-38F): a key wraps other keys.

use aws_lc_rs::key_wrap::{AES_128, AES_256, AesBlockCipher, AesKek, KeyWrapPadded};
use zeroize::Zeroizing;

use super::WorkError;
use crate::{Algorithm, CryptoFailure, KeyMaterial};

/// What wrapping adds at most: 8 bytes of integrity check and 7 of padding.
const MAX_OVERHEAD: usize = 15;
const BLOCK: usize = 8;

/// A key that wraps keys.
pub(super) struct Kek {
    cipher: &'static AesBlockCipher,
    key: Zeroizing<Vec<u8>>,
}

impl Kek {
    pub(super) fn new(algorithm: Algorithm, material: &KeyMaterial) -> Option<Self> {
        let cipher = match algorithm {
            Algorithm::Aes256 => &AES_256,
            Algorithm::Aes128 => &AES_128,
            _ => return None,
        };
        Some(Self { cipher, key: Zeroizing::new(material.bytes().to_vec()) })
    }

    fn kek(&self) -> Result<AesKek, CryptoFailure> {
        AesKek::new(self.cipher, &self.key).map_err(|_| CryptoFailure("key wrapping failed"))
    }

    pub(super) fn wrap(&self, key: &KeyMaterial) -> Result<Vec<u8>, CryptoFailure> {
        let mut out = vec![0; key.len() + MAX_OVERHEAD];
        let len = self
            .kek()?
            .wrap_with_padding(key.bytes(), &mut out)
            .map_err(|_| CryptoFailure("key wrapping failed"))?
            .len();
        out.truncate(len);
        Ok(out)
    }

    pub(super) fn unwrap(&self, wrapped: &[u8]) -> Result<KeyMaterial, WorkError> {
        if wrapped.len() > KeyMaterial::MAX_LEN + BLOCK {
            return Err(WorkError::Failed);
        }
        let mut out = Zeroizing::new(vec![0; wrapped.len()]);
        let len = self
            .kek()?
            .unwrap_with_padding(wrapped, &mut out)
            .map_err(|_| WorkError::Failed)?
            .len();
        out.truncate(len);
        KeyMaterial::from_opened(out).map_err(|_| WorkError::Failed)
    }
}
