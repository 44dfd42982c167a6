//! HMAC (FIPS 198-1) for callers.

use aws_lc_rs::hmac;

use super::compare;
use crate::{Algorithm, KeyMaterial};

/// An expanded key; aws-lc erases it when it is dropped.
pub(super) struct MacKey(Box<hmac::Key>);

pub(super) fn hash_of(algorithm: Algorithm) -> Option<hmac::Algorithm> {
    match algorithm {
        Algorithm::HmacSha256 => Some(hmac::HMAC_SHA256),
        Algorithm::HmacSha384 => Some(hmac::HMAC_SHA384),
        Algorithm::HmacSha512 => Some(hmac::HMAC_SHA512),
        _ => None,
    }
}

impl MacKey {
    pub(super) fn new(algorithm: Algorithm, material: &KeyMaterial) -> Option<Self> {
        Some(Self::with(hash_of(algorithm)?, material.bytes()))
    }

    pub(super) fn with(hash: hmac::Algorithm, key: &[u8]) -> Self {
        Self(Box::new(hmac::Key::new(hash, key)))
    }

    pub(super) fn mac(&self, message: &[u8]) -> Vec<u8> {
        hmac::sign(&self.0, message).as_ref().to_vec()
    }

    pub(super) fn verify(&self, message: &[u8], tag: &[u8]) -> bool {
        compare::same(hmac::sign(&self.0, message).as_ref(), tag)
    }
}
