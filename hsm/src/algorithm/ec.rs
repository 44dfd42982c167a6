//! Keys on the curves P-256, P-384, P-521 (FIPS 186-5, NIST SP 800-56A) and secp256k1 (SEC 2), for signatures and for
//! agreement, through aws-lc; stored as PKCS#8 (RFC 5208) around an ECPrivateKey (RFC 5915).

use aws_lc_rs::agreement;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256K1_SHA256_ASN1_SIGNING,
    ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair,
    EcdsaSigningAlgorithm, KeyPair,
};

use super::{Algorithm, AlgorithmError, PublicKey};
use crate::{CryptoFailure, KeyMaterial};

const fn curve(algorithm: Algorithm) -> Option<&'static EcdsaSigningAlgorithm> {
    match algorithm {
        Algorithm::EcdsaP256 | Algorithm::EcdhP256 => Some(&ECDSA_P256_SHA256_ASN1_SIGNING),
        Algorithm::EcdsaP384 | Algorithm::EcdhP384 => Some(&ECDSA_P384_SHA384_ASN1_SIGNING),
        Algorithm::EcdsaP521 | Algorithm::EcdhP521 => Some(&ECDSA_P521_SHA512_ASN1_SIGNING),
        Algorithm::EcdsaSecp256k1 => Some(&ECDSA_P256K1_SHA256_ASN1_SIGNING),
        _ => None,
    }
}

const fn agreement(algorithm: Algorithm) -> Option<&'static agreement::Algorithm> {
    match algorithm {
        Algorithm::EcdhP256 => Some(&agreement::ECDH_P256),
        Algorithm::EcdhP384 => Some(&agreement::ECDH_P384),
        Algorithm::EcdhP521 => Some(&agreement::ECDH_P521),
        _ => None,
    }
}

pub(super) fn generate(algorithm: Algorithm) -> Result<KeyMaterial, AlgorithmError> {
    let curve = curve(algorithm).ok_or(AlgorithmError::NotAKey(algorithm))?;
    let pair = EcdsaKeyPair::generate(curve)
        .map_err(|_| CryptoFailure("generation of a key on an elliptic curve failed"))?;
    encode(&pair)
}

fn encode(pair: &EcdsaKeyPair) -> Result<KeyMaterial, AlgorithmError> {
    let pkcs8 = pair
        .to_pkcs8v1()
        .map_err(|_| CryptoFailure("encoding of a key on an elliptic curve failed"))?;
    Ok(KeyMaterial::from_secret(pkcs8.as_ref().to_vec())?)
}

/// The same key in this library's own PKCS#8.
pub(super) fn canonical(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<KeyMaterial, AlgorithmError> {
    encode(&parse(algorithm, material)?)
}

/// The key of a private scalar and x ‖ y, both at the full length of the field, if they belong together.
pub(super) fn from_parts(
    algorithm: Algorithm,
    scalar: &[u8],
    point: &[u8],
) -> Result<KeyMaterial, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let curve = curve(algorithm).ok_or(wrong)?;
    if 2 * scalar.len() != point.len() {
        return Err(wrong);
    }
    let public = [&[4], point].concat();
    let pair =
        EcdsaKeyPair::from_private_key_and_public_key(curve, scalar, &public).map_err(|_| wrong)?;
    encode(&pair)
}

pub(crate) fn parse(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<EcdsaKeyPair, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    EcdsaKeyPair::from_pkcs8(curve(algorithm).ok_or(wrong)?, material.bytes()).map_err(|_| wrong)
}

/// The same for agreement, from the stored form.
pub(crate) fn parse_agreement(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<agreement::PrivateKey, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let by = agreement(algorithm).ok_or(wrong)?;
    agreement::PrivateKey::from_private_key_der(by, material.bytes()).map_err(|_| wrong)
}

pub(super) fn public_key(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<PublicKey, AlgorithmError> {
    let pair = parse(algorithm, material)?;
    // An uncompressed point (SEC 1): 4 ‖ x ‖ y.
    pair.public_key()
        .as_ref()
        .strip_prefix(&[4])
        .and_then(|point| PublicKey::from_raw(algorithm, point))
        .ok_or(AlgorithmError::NotAKey(algorithm))
}
