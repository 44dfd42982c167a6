//! RSA-4096 (RFC 8017), through aws-lc.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    KeyPair, RSA_PSS_2048_8192_SHA384, RSA_PSS_SHA384, RsaKeyPair, UnparsedPublicKey,
};

use super::{Algorithm, AlgorithmError, PublicKey};
use crate::{CryptoFailure, KeyMaterial};

const MODULUS_LEN: usize = 512;

/// A new key as PKCS#8 (RFC 5208). Takes 0.7 s of CPU, up to 1.5 s.
pub(super) fn generate() -> Result<KeyMaterial, AlgorithmError> {
    let pair = RsaKeyPair::generate(KeySize::Rsa4096)
        .map_err(|_| CryptoFailure("RSA key generation failed"))?;
    encode(&pair)
}

fn encode(pair: &RsaKeyPair) -> Result<KeyMaterial, AlgorithmError> {
    let pkcs8: Pkcs8V1Der<'_> =
        pair.as_der().map_err(|_| CryptoFailure("RSA key encoding failed"))?;
    Ok(KeyMaterial::from_secret(pkcs8.as_ref().to_vec())?)
}

/// The same key in this library's own PKCS#8.
pub(super) fn canonical(material: &KeyMaterial) -> Result<KeyMaterial, AlgorithmError> {
    encode(&parse(material)?)
}

fn parse(material: &KeyMaterial) -> Result<RsaKeyPair, AlgorithmError> {
    let pair = RsaKeyPair::from_pkcs8(material.bytes())
        .map_err(|_| AlgorithmError::NotAKey(Algorithm::Rsa4096))?;
    match pair.public_modulus_len() {
        MODULUS_LEN => Ok(pair),
        _ => Err(AlgorithmError::NotAKey(Algorithm::Rsa4096)),
    }
}

pub(super) fn public_key(material: &KeyMaterial) -> Result<PublicKey, AlgorithmError> {
    let pair = parse(material)?;
    let der: PublicKeyX509Der<'_> =
        pair.public_key().as_der().map_err(|_| AlgorithmError::NotAKey(Algorithm::Rsa4096))?;
    Ok(PublicKey { spki_der: der.as_ref().to_vec() })
}

pub(super) fn check_pair(
    material: &KeyMaterial,
    public: &PublicKey,
    message: &[u8],
) -> Result<bool, AlgorithmError> {
    let mut signature = vec![0; MODULUS_LEN];
    parse(material)?
        .sign(&RSA_PSS_SHA384, &SystemRandom::new(), message, &mut signature)
        .map_err(|_| CryptoFailure("RSA signing failed"))?;
    let public = UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA384, &public.spki_der);
    Ok(public.verify(message, &signature).is_ok())
}
