//! ECDSA over P-384 with SHA-384 (FIPS 186-5), through aws-lc.

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair,
    UnparsedPublicKey,
};

use super::{Algorithm, AlgorithmError, PublicKey};
use crate::{CryptoFailure, KeyMaterial};

/// A new key as PKCS#8 (RFC 5208).
pub(super) fn generate() -> Result<KeyMaterial, AlgorithmError> {
    let pair = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_ASN1_SIGNING)
        .map_err(|_| CryptoFailure("ECDSA key generation failed"))?;
    encode(&pair)
}

fn encode(pair: &EcdsaKeyPair) -> Result<KeyMaterial, AlgorithmError> {
    let pkcs8 = pair.to_pkcs8v1().map_err(|_| CryptoFailure("ECDSA key encoding failed"))?;
    Ok(KeyMaterial::from_secret(pkcs8.as_ref().to_vec())?)
}

/// The same key in this library's own PKCS#8.
pub(super) fn canonical(material: &KeyMaterial) -> Result<KeyMaterial, AlgorithmError> {
    encode(&parse(material)?)
}

fn parse(material: &KeyMaterial) -> Result<EcdsaKeyPair, AlgorithmError> {
    EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, material.bytes())
        .map_err(|_| AlgorithmError::NotAKey(Algorithm::EcdsaP384))
}

pub(super) fn public_key(material: &KeyMaterial) -> Result<PublicKey, AlgorithmError> {
    let pair = parse(material)?;
    let der: PublicKeyX509Der<'_> =
        pair.public_key().as_der().map_err(|_| AlgorithmError::NotAKey(Algorithm::EcdsaP384))?;
    Ok(PublicKey { spki_der: der.as_ref().to_vec() })
}

pub(super) fn check_pair(
    material: &KeyMaterial,
    public: &PublicKey,
    message: &[u8],
) -> Result<bool, AlgorithmError> {
    let signature = parse(material)?
        .sign(&SystemRandom::new(), message)
        .map_err(|_| CryptoFailure("ECDSA signing failed"))?;
    let public = UnparsedPublicKey::new(&ECDSA_P384_SHA384_ASN1, &public.spki_der);
    Ok(public.verify(message, signature.as_ref()).is_ok())
}
