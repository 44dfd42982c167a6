//! ML-DSA-44, ML-DSA-65 and ML-DSA-87 (FIPS 204), through aws-lc; stored as PKCS#8 with the seed (RFC 9881, `seed`), or
//! with the expanded key (`expandedKey`) where the key came from outside without its seed.

use aws_lc_rs::encoding::AsRawBytes;
use aws_lc_rs::signature::{
    KeyPair, ML_DSA_44_SIGNING, ML_DSA_65_SIGNING, ML_DSA_87_SIGNING, PqdsaKeyPair,
    PqdsaSigningAlgorithm,
};

use super::{Algorithm, AlgorithmError, PublicKey, layout};
use crate::{CryptoFailure, KeyMaterial};

const fn parameters(algorithm: Algorithm) -> Option<&'static PqdsaSigningAlgorithm> {
    match algorithm {
        Algorithm::MlDsa44 => Some(&ML_DSA_44_SIGNING),
        Algorithm::MlDsa65 => Some(&ML_DSA_65_SIGNING),
        Algorithm::MlDsa87 => Some(&ML_DSA_87_SIGNING),
        _ => None,
    }
}

pub(super) fn generate(algorithm: Algorithm) -> Result<KeyMaterial, AlgorithmError> {
    let parameters = parameters(algorithm).ok_or(AlgorithmError::NotAKey(algorithm))?;
    let pair = PqdsaKeyPair::generate(parameters)
        .map_err(|_| CryptoFailure("ML-DSA key generation failed"))?;
    encode(algorithm, &pair)
}

fn encode(algorithm: Algorithm, pair: &PqdsaKeyPair) -> Result<KeyMaterial, AlgorithmError> {
    if let Ok(pkcs8) = pair.to_pkcs8v1() {
        return Ok(KeyMaterial::from_secret(pkcs8.as_ref().to_vec())?);
    }
    // No seed is known.
    let expanded = pair
        .private_key()
        .as_raw_bytes()
        .map_err(|_| CryptoFailure("ML-DSA key encoding failed"))?;
    let prefix = layout::expanded_prefix(algorithm, expanded.as_ref().len());
    Ok(KeyMaterial::from_secret([&prefix[..], expanded.as_ref()].concat())?)
}

/// The same key in the stored form, from any of the three of RFC 9881 (one with both must be of one key).
pub(super) fn canonical(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<KeyMaterial, AlgorithmError> {
    encode(algorithm, &parse(algorithm, material)?)
}

/// The key of a seed of 32 bytes and its public key, if they belong together.
pub(super) fn from_parts(
    algorithm: Algorithm,
    seed: &[u8],
    public: &[u8],
) -> Result<KeyMaterial, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let pair =
        PqdsaKeyPair::from_seed(parameters(algorithm).ok_or(wrong)?, seed).map_err(|_| wrong)?;
    if pair.public_key().as_ref() == public { encode(algorithm, &pair) } else { Err(wrong) }
}

pub(crate) fn parse(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<PqdsaKeyPair, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    PqdsaKeyPair::from_pkcs8(parameters(algorithm).ok_or(wrong)?, material.bytes())
        .map_err(|_| wrong)
}

pub(super) fn public_key(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<PublicKey, AlgorithmError> {
    let pair = parse(algorithm, material)?;
    PublicKey::from_raw(algorithm, pair.public_key().as_ref())
        .ok_or(AlgorithmError::NotAKey(algorithm))
}
