//! RSA with a modulus of exactly 2048, 3072 or 4096 bits and the public exponent 65537 (RFC 8017, FIPS 186-5), through
//! aws-lc; stored as PKCS#8 (RFC 5208).

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa::{KeyPairComponents, KeySize, PrivateDecryptingKey};
use aws_lc_rs::signature::{KeyPair, RsaKeyPair};

use super::{Algorithm, AlgorithmError, PublicKey};
use crate::{CryptoFailure, KeyMaterial};

const fn size(algorithm: Algorithm) -> Option<KeySize> {
    match algorithm {
        Algorithm::Rsa2048 => Some(KeySize::Rsa2048),
        Algorithm::Rsa3072 => Some(KeySize::Rsa3072),
        Algorithm::Rsa4096 => Some(KeySize::Rsa4096),
        _ => None,
    }
}

pub(super) fn generate(algorithm: Algorithm) -> Result<KeyMaterial, AlgorithmError> {
    let size = size(algorithm).ok_or(AlgorithmError::NotAKey(algorithm))?;
    let pair =
        RsaKeyPair::generate(size).map_err(|_| CryptoFailure("RSA key generation failed"))?;
    encode(&pair)
}

fn encode(pair: &RsaKeyPair) -> Result<KeyMaterial, AlgorithmError> {
    let pkcs8: Pkcs8V1Der<'_> =
        pair.as_der().map_err(|_| CryptoFailure("RSA key encoding failed"))?;
    Ok(KeyMaterial::from_secret(pkcs8.as_ref().to_vec())?)
}

/// The same key in this library's own PKCS#8.
pub(super) fn canonical(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<KeyMaterial, AlgorithmError> {
    encode(&parse(algorithm, material)?)
}

/// The key of its components, if they belong together.
pub(super) fn from_components(
    algorithm: Algorithm,
    components: &KeyPairComponents<&[u8]>,
) -> Result<KeyMaterial, AlgorithmError> {
    let pair =
        RsaKeyPair::from_components(components).map_err(|_| AlgorithmError::NotAKey(algorithm))?;
    encode(&pair)
}

pub(crate) fn parse(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<RsaKeyPair, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let pair = RsaKeyPair::from_pkcs8(material.bytes()).map_err(|_| wrong)?;
    if size(algorithm).is_some_and(|size| size.len() == pair.public_modulus_len()) {
        Ok(pair)
    } else {
        Err(wrong)
    }
}

/// The same for decryption.
pub(crate) fn parse_decrypting(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<PrivateDecryptingKey, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let key = PrivateDecryptingKey::from_pkcs8(material.bytes()).map_err(|_| wrong)?;
    if size(algorithm).is_some_and(|size| size.len() * 8 == key.key_size_bits()) {
        Ok(key)
    } else {
        Err(wrong)
    }
}

/// The public part, whose layout admits only a modulus of the right length and 65537.
fn public(algorithm: Algorithm, pair: &RsaKeyPair) -> Result<PublicKey, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let der: PublicKeyX509Der<'_> = pair.public_key().as_der().map_err(|_| wrong)?;
    PublicKey::from_spki(algorithm, der.as_ref()).map_err(|_| wrong)
}

pub(super) fn public_key(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<PublicKey, AlgorithmError> {
    public(algorithm, &parse(algorithm, material)?)
}
