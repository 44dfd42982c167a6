//! Every algorithm, one file a family: the only place where key bytes do work.

mod ecdsa;
mod rsa;
mod symmetric;
mod table;

pub use table::{Algorithm, Purpose};

use crate::{CryptoFailure, KeyMaterial, MaterialError};

/// How to make a key.
#[derive(Debug, Default)]
pub struct GenerationParams {
    /// The value of an API key that exists already, 1 byte to 64 KiB; no other algorithm takes one
    /// here (see [`import`]).
    pub supplied: Option<KeyMaterial>,
    /// What a generated API key begins with, 1 to 16 lower-case letters and digits; `pk` unless
    /// set. No other algorithm takes one.
    pub prefix: Option<String>,
}

/// The public part of an asymmetric key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    /// A DER SubjectPublicKeyInfo (RFC 5280).
    pub spki_der: Vec<u8>,
}

/// A new key.
#[derive(Debug)]
pub struct Generated {
    /// The secret.
    pub material: KeyMaterial,
    /// Its public part, if the algorithm has one.
    pub public: Option<PublicKey>,
}

/// Why a key is not made or not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AlgorithmError {
    /// Only API keys are created from a supplied value.
    #[error("a key of type {0} is not created from a supplied value")]
    SuppliedValue(Algorithm),
    /// Only generated API keys have a prefix.
    #[error("only a generated API key has a prefix")]
    PrefixNotTaken,
    /// Not 1 to 16 lower-case letters and digits.
    #[error("the prefix of an API key is 1 to 16 lower-case letters and digits")]
    BadPrefix,
    /// The bytes are not a valid key of this algorithm.
    #[error("not a valid key of type {0}")]
    NotAKey(Algorithm),
    /// Of a wrong length.
    #[error(transparent)]
    Material(#[from] MaterialError),
    /// A new pair did not verify its own signature and was thrown away (FIPS 140-3 IG 10.3.A).
    #[error("a new key pair failed its consistency check")]
    Inconsistent,
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

/// Makes a key. RSA-4096 takes 0.7 s of CPU, up to 1.5 s: run it off the threads of requests.
///
/// # Errors
/// See [`AlgorithmError`].
pub fn generate(
    algorithm: Algorithm,
    params: GenerationParams,
) -> Result<Generated, AlgorithmError> {
    let GenerationParams { supplied, prefix } = params;
    if algorithm != Algorithm::ApiKey && supplied.is_some() {
        return Err(AlgorithmError::SuppliedValue(algorithm));
    }
    if prefix.is_some() && (algorithm != Algorithm::ApiKey || supplied.is_some()) {
        return Err(AlgorithmError::PrefixNotTaken);
    }
    let material = match (algorithm, supplied) {
        (Algorithm::ApiKey, Some(value)) => value,
        (Algorithm::ApiKey, None) => symmetric::api_key(prefix.as_deref())?,
        (Algorithm::EcdsaP384, _) => ecdsa::generate()?,
        (Algorithm::Rsa4096, _) => rsa::generate()?,
        (other, _) => symmetric::generate(other)?,
    };
    // Read back from the form that will be stored, as one from outside would be.
    import(algorithm, material)
}

/// Takes over a key from outside after checking that it is one: 32 bytes for AES-256, PKCS#8 for
/// the asymmetric ones, any bytes for an API key. A PKCS#8 key is written anew, so that attributes
/// and stray bytes around it are not kept.
///
/// # Errors
/// [`AlgorithmError::NotAKey`], or [`AlgorithmError::Inconsistent`] for a pair whose halves do not
/// belong together.
pub fn import(algorithm: Algorithm, material: KeyMaterial) -> Result<Generated, AlgorithmError> {
    let material = match algorithm {
        Algorithm::EcdsaP384 => ecdsa::canonical(&material)?,
        Algorithm::Rsa4096 => rsa::canonical(&material)?,
        _ => material,
    };
    let public = public_key(algorithm, &material)?;
    check_pair(algorithm, &material, public.as_ref())?;
    Ok(Generated { material, public })
}

/// The public part of a key, or `None` where there is none.
///
/// # Errors
/// [`AlgorithmError::NotAKey`].
pub fn public_key(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<Option<PublicKey>, AlgorithmError> {
    match algorithm {
        Algorithm::ApiKey => Ok(None),
        Algorithm::EcdsaP384 => ecdsa::public_key(material).map(Some),
        Algorithm::Rsa4096 => rsa::public_key(material).map(Some),
        other => symmetric::check(other, material).map(|()| None),
    }
}

/// Signs a constant with the private half and verifies it with the public one.
fn check_pair(
    algorithm: Algorithm,
    material: &KeyMaterial,
    public: Option<&PublicKey>,
) -> Result<(), AlgorithmError> {
    const MESSAGE: &[u8] = b"polykey pairwise consistency";
    let consistent = match (algorithm, public) {
        (Algorithm::EcdsaP384, Some(public)) => ecdsa::check_pair(material, public, MESSAGE)?,
        (Algorithm::Rsa4096, Some(public)) => rsa::check_pair(material, public, MESSAGE)?,
        (other, public) => public.is_some() == other.is_asymmetric(),
    };
    if consistent { Ok(()) } else { Err(AlgorithmError::Inconsistent) }
}
