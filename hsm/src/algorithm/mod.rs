//! Every algorithm, one file a family: the only place where key bytes do work.

pub(crate) mod curve25519;
pub(crate) mod ec;
pub(crate) mod jwk;
mod layout;
pub(crate) mod ml_dsa;
pub(crate) mod ml_kem;
mod public;
pub(crate) mod rsa;
mod symmetric;
mod table;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use layout::X25519_PKCS8;
pub use public::{PublicKey, PublicKeyError};
pub use table::{Algorithm, Purpose};

use crate::work::WorkError;
use crate::work::asymmetric::Pair;
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
    /// A new pair's halves do not work together, and it was thrown away (FIPS 140-3 IG 10.3.A).
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
    let material = match (Family::of(algorithm), supplied) {
        (Family::Credential, Some(value)) => value,
        (Family::Credential, None) => symmetric::api_key(prefix.as_deref())?,
        (Family::Symmetric, _) => symmetric::generate(algorithm)?,
        (Family::Rsa, _) => rsa::generate(algorithm)?,
        (Family::Ec, _) => ec::generate(algorithm)?,
        (Family::Ed25519, _) => curve25519::generate_ed25519()?,
        (Family::X25519, _) => curve25519::generate_x25519()?,
        (Family::MlKem, _) => ml_kem::generate(algorithm)?,
        (Family::MlDsa, _) => ml_dsa::generate(algorithm)?,
    };
    // Read back from the form that will be stored, as one from outside would be.
    import(algorithm, material)
}

/// Takes over a key from outside after checking that it is one: as many bytes as its type has for a symmetric key,
/// PKCS#8 for an asymmetric one (the hybrid has a form of its own, see `ml_kem`), any bytes for an API key. PKCS#8 is
/// written anew in the one form that is stored, so that attributes and stray bytes around the key are not kept.
///
/// # Errors
/// [`AlgorithmError::NotAKey`], or [`AlgorithmError::Inconsistent`] for a pair whose halves do not
/// belong together.
pub fn import(algorithm: Algorithm, material: KeyMaterial) -> Result<Generated, AlgorithmError> {
    let material = match Family::of(algorithm) {
        Family::Credential | Family::Symmetric => material,
        Family::Rsa => rsa::canonical(algorithm, &material)?,
        Family::Ec => ec::canonical(algorithm, &material)?,
        Family::Ed25519 => curve25519::canonical_ed25519(&material)?,
        Family::X25519 => curve25519::canonical_x25519(&material)?,
        Family::MlKem => ml_kem::canonical(algorithm, &material)?,
        Family::MlDsa => ml_dsa::canonical(algorithm, &material)?,
    };
    let public = public_key(algorithm, &material)?;
    if let Some(public) = &public {
        check_pair(algorithm, &material, public)?;
    }
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
    match Family::of(algorithm) {
        Family::Credential => Ok(None),
        Family::Symmetric => symmetric::check(algorithm, material).map(|()| None),
        Family::Rsa => rsa::public_key(algorithm, material).map(Some),
        Family::Ec => ec::public_key(algorithm, material).map(Some),
        Family::Ed25519 => curve25519::public_ed25519(material).map(Some),
        Family::X25519 => curve25519::public_x25519(material).map(Some),
        Family::MlKem => ml_kem::public_key(algorithm, material).map(Some),
        Family::MlDsa => ml_dsa::public_key(algorithm, material).map(Some),
    }
}

/// Where an algorithm's code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Credential,
    Symmetric,
    Rsa,
    Ec,
    Ed25519,
    X25519,
    /// With the hybrid.
    MlKem,
    MlDsa,
}

impl Family {
    pub(crate) const fn of(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::ApiKey => Self::Credential,
            Algorithm::Aes128
            | Algorithm::Aes256
            | Algorithm::Aes128Gcm
            | Algorithm::Aes256Gcm
            | Algorithm::ChaCha20Poly1305
            | Algorithm::XChaCha20Poly1305
            | Algorithm::HmacSha256
            | Algorithm::HmacSha384
            | Algorithm::HmacSha512
            | Algorithm::HkdfSha256 => Self::Symmetric,
            Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096 => Self::Rsa,
            Algorithm::EcdsaP256
            | Algorithm::EcdsaP384
            | Algorithm::EcdsaP521
            | Algorithm::EcdsaSecp256k1
            | Algorithm::EcdhP256
            | Algorithm::EcdhP384
            | Algorithm::EcdhP521 => Self::Ec,
            Algorithm::Ed25519 => Self::Ed25519,
            Algorithm::X25519 => Self::X25519,
            Algorithm::MlKem768 | Algorithm::MlKem1024 | Algorithm::X25519MlKem768 => Self::MlKem,
            Algorithm::MlDsa44 | Algorithm::MlDsa65 | Algorithm::MlDsa87 => Self::MlDsa,
        }
    }
}

/// Lets both halves work on the same thing: a signature verifies, both sides come to the same secret (FIPS 140-3 IG
/// 10.3.A).
fn check_pair(
    algorithm: Algorithm,
    material: &KeyMaterial,
    public: &PublicKey,
) -> Result<(), AlgorithmError> {
    let consistent = Pair::new(algorithm, algorithm.default_purpose(), material)
        .and_then(|pair| pair.belongs_to(public));
    match consistent {
        Ok(true) => Ok(()),
        Ok(false) | Err(WorkError::Failed | WorkError::Input { .. }) => {
            Err(AlgorithmError::Inconsistent)
        }
        Err(WorkError::Crypto(failure)) => Err(failure.into()),
        Err(_) => Err(AlgorithmError::NotAKey(algorithm)),
    }
}
