//! HKDF-SHA-256 (RFC 5869), for callers and for the formats here.

use aws_lc_rs::hkdf;
use zeroize::Zeroizing;

use super::WorkError;
use crate::{CryptoFailure, KeyMaterial};

/// 255 blocks of SHA-256 (RFC 5869, 2.3).
const MAX_LEN: usize = 255 * 32;

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// Fills `out`, at most 8160 bytes; an empty salt is the RFC's string of zeros.
pub(super) fn hkdf_sha256(
    secret: &[u8],
    salt: &[u8],
    info: &[u8],
    out: &mut [u8],
) -> Result<(), CryptoFailure> {
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(&[info], Len(out.len()))
        .and_then(|okm| okm.fill(out))
        .map_err(|_| CryptoFailure("key derivation failed"))
}

/// A secret that keys are derived from.
pub(super) struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    pub(super) fn new(material: &KeyMaterial) -> Self {
        Self(Zeroizing::new(material.bytes().to_vec()))
    }

    pub(super) fn derive(
        &self,
        salt: &[u8],
        info: &[u8],
        len: usize,
    ) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        derive(&self.0, salt, info, len)
    }
}

/// Derives 1 to 8160 bytes.
pub(super) fn derive(
    secret: &[u8],
    salt: &[u8],
    info: &[u8],
    len: usize,
) -> Result<Zeroizing<Vec<u8>>, WorkError> {
    if !(1..=MAX_LEN).contains(&len) {
        return Err(WorkError::input("length", "1 to 8160 bytes are derived at once"));
    }
    let mut out = Zeroizing::new(vec![0; len]);
    hkdf_sha256(secret, salt, info, &mut out)?;
    Ok(out)
}
