//! Ed25519 (RFC 8032) and X25519 (RFC 7748) keys, through aws-lc; stored as PKCS#8 (RFC 8410).

use aws_lc_rs::agreement;
use aws_lc_rs::encoding::{AsBigEndian, Curve25519SeedBin};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use zeroize::Zeroizing;

use super::layout::{X25519_PKCS8, X25519_PKCS8_V2, X25519_PUBLIC};
use super::{Algorithm, AlgorithmError, PublicKey};
use crate::{CryptoFailure, KeyMaterial};

const NOT_ED25519: AlgorithmError = AlgorithmError::NotAKey(Algorithm::Ed25519);
const NOT_X25519: AlgorithmError = AlgorithmError::NotAKey(Algorithm::X25519);

pub(super) fn generate_ed25519() -> Result<KeyMaterial, AlgorithmError> {
    let pair =
        Ed25519KeyPair::generate().map_err(|_| CryptoFailure("Ed25519 key generation failed"))?;
    encode_ed25519(&pair)
}

fn encode_ed25519(pair: &Ed25519KeyPair) -> Result<KeyMaterial, AlgorithmError> {
    let pkcs8 = pair.to_pkcs8v1().map_err(|_| CryptoFailure("Ed25519 key encoding failed"))?;
    Ok(KeyMaterial::from_secret(pkcs8.as_ref().to_vec())?)
}

/// The same key in this library's own PKCS#8.
pub(super) fn canonical_ed25519(material: &KeyMaterial) -> Result<KeyMaterial, AlgorithmError> {
    encode_ed25519(&parse_ed25519(material)?)
}

/// The key of a seed and its public key, if they belong together.
pub(super) fn ed25519_from_parts(
    seed: &[u8],
    public: &[u8],
) -> Result<KeyMaterial, AlgorithmError> {
    // A longer seed would be cut.
    if seed.len() != 32 {
        return Err(NOT_ED25519);
    }
    encode_ed25519(
        &Ed25519KeyPair::from_seed_and_public_key(seed, public).map_err(|_| NOT_ED25519)?,
    )
}

pub(crate) fn parse_ed25519(material: &KeyMaterial) -> Result<Ed25519KeyPair, AlgorithmError> {
    Ed25519KeyPair::from_pkcs8(material.bytes()).map_err(|_| NOT_ED25519)
}

pub(super) fn public_ed25519(material: &KeyMaterial) -> Result<PublicKey, AlgorithmError> {
    let pair = parse_ed25519(material)?;
    PublicKey::from_raw(Algorithm::Ed25519, pair.public_key().as_ref()).ok_or(NOT_ED25519)
}

/// The private bytes of a new X25519 key.
pub(super) fn random_x25519() -> Result<Zeroizing<Vec<u8>>, CryptoFailure> {
    const FAILED: CryptoFailure = CryptoFailure("X25519 key generation failed");
    let key = agreement::PrivateKey::generate(&agreement::X25519).map_err(|_| FAILED)?;
    let bytes: Curve25519SeedBin<'_> = key.as_be_bytes().map_err(|_| FAILED)?;
    Ok(Zeroizing::new(bytes.as_ref().to_vec()))
}

pub(super) fn generate_x25519() -> Result<KeyMaterial, AlgorithmError> {
    encode_x25519(&random_x25519()?)
}

fn encode_x25519(private: &[u8]) -> Result<KeyMaterial, AlgorithmError> {
    Ok(KeyMaterial::from_secret([X25519_PKCS8, private].concat())?)
}

/// The private bytes of version 1, or of version 2 when its public key is the right one.
fn private_x25519(pkcs8: &[u8]) -> Option<&[u8; 32]> {
    if let Some(private) = pkcs8.strip_prefix(X25519_PKCS8) {
        return private.try_into().ok();
    }
    let (private, rest) = pkcs8.strip_prefix(X25519_PKCS8_V2)?.split_first_chunk::<32>()?;
    let claimed = rest.strip_prefix(X25519_PUBLIC)?;
    let own = public_of(&load_x25519(private).ok()?).ok()?;
    (own.as_ref() == claimed).then_some(private)
}

/// The same key in this library's own PKCS#8.
pub(super) fn canonical_x25519(material: &KeyMaterial) -> Result<KeyMaterial, AlgorithmError> {
    encode_x25519(private_x25519(material.bytes()).ok_or(NOT_X25519)?)
}

/// The key of its private and public bytes, if they belong together.
pub(super) fn x25519_from_parts(
    private: &[u8],
    public: &[u8],
) -> Result<KeyMaterial, AlgorithmError> {
    let private: &[u8; 32] = private.try_into().map_err(|_| NOT_X25519)?;
    if public_of(&load_x25519(private)?)?.as_ref() == public {
        encode_x25519(private)
    } else {
        Err(NOT_X25519)
    }
}

/// The key of its private bytes.
pub(crate) fn load_x25519(private: &[u8; 32]) -> Result<agreement::PrivateKey, AlgorithmError> {
    agreement::PrivateKey::from_private_key(&agreement::X25519, private).map_err(|_| NOT_X25519)
}

pub(crate) fn parse_x25519(
    material: &KeyMaterial,
) -> Result<agreement::PrivateKey, AlgorithmError> {
    load_x25519(private_x25519(material.bytes()).ok_or(NOT_X25519)?)
}

/// The private bytes of the stored form, for HPKE.
pub(crate) fn bytes_x25519(material: &KeyMaterial) -> Result<&[u8; 32], AlgorithmError> {
    private_x25519(material.bytes()).ok_or(NOT_X25519)
}

pub(super) fn public_of(
    key: &agreement::PrivateKey,
) -> Result<agreement::PublicKey, AlgorithmError> {
    key.compute_public_key().map_err(|_| NOT_X25519)
}

pub(super) fn public_x25519(material: &KeyMaterial) -> Result<PublicKey, AlgorithmError> {
    let public = public_of(&parse_x25519(material)?)?;
    PublicKey::from_raw(Algorithm::X25519, public.as_ref()).ok_or(NOT_X25519)
}
