//! ML-KEM-768 and ML-KEM-1024 (FIPS 203) and the hybrid X25519MLKEM768 (draft-ietf-tls-ecdhe-mlkem), through aws-lc.
//!
//! An ML-KEM key is stored as PKCS#8 with the expanded decapsulation key (RFC 9935, `expandedKey`): aws-lc-rs makes and
//! takes that form alone. The seed of a key from outside is expanded on import and not kept. The hybrid has no
//! registered PKCS#8; its own form is the decapsulation key of ML-KEM-768 (2400 bytes) ‖ the X25519 private key (32).

use aws_lc_rs::agreement;
use aws_lc_rs::kem::{self, DecapsulationKey, EncapsulationKey};
#[expect(deprecated, reason = "the expanded form is what aws-lc-rs takes")]
use ml_kem::ExpandedKeyEncoding;
use ml_kem::{MlKem768, MlKem1024};
use zeroize::Zeroizing;

use super::{Algorithm, AlgorithmError, PublicKey, curve25519, layout};
use crate::{CryptoFailure, KeyMaterial};

/// ML-KEM's part of the hybrid's private form.
const HYBRID_KEM: usize = 2400;

const fn parameters(algorithm: Algorithm) -> Option<&'static kem::Algorithm> {
    match algorithm {
        Algorithm::MlKem768 | Algorithm::X25519MlKem768 => Some(&kem::ML_KEM_768),
        Algorithm::MlKem1024 => Some(&kem::ML_KEM_1024),
        _ => None,
    }
}

/// The lengths of a decapsulation key and of the encapsulation key within it (FIPS 203, table 3).
const fn lengths(algorithm: Algorithm) -> (usize, usize) {
    match algorithm {
        Algorithm::MlKem1024 => (3168, 1568),
        _ => (HYBRID_KEM, 1184),
    }
}

/// A new decapsulation key, expanded.
fn random(algorithm: Algorithm) -> Result<Zeroizing<Vec<u8>>, AlgorithmError> {
    const FAILED: CryptoFailure = CryptoFailure("ML-KEM key generation failed");
    let parameters = parameters(algorithm).ok_or(AlgorithmError::NotAKey(algorithm))?;
    let key = DecapsulationKey::generate(parameters).map_err(|_| FAILED)?;
    let bytes = key.key_bytes().map_err(|_| FAILED)?;
    Ok(Zeroizing::new(bytes.as_ref().to_vec()))
}

pub(super) fn generate(algorithm: Algorithm) -> Result<KeyMaterial, AlgorithmError> {
    let expanded = random(algorithm)?;
    if algorithm == Algorithm::X25519MlKem768 {
        let curve = curve25519::random_x25519()?;
        return Ok(KeyMaterial::from_secret([&expanded[..], &curve].concat())?);
    }
    encode(algorithm, &expanded)
}

fn encode(algorithm: Algorithm, expanded: &[u8]) -> Result<KeyMaterial, AlgorithmError> {
    let prefix = layout::expanded_prefix(algorithm, expanded.len());
    Ok(KeyMaterial::from_secret([&prefix[..], expanded].concat())?)
}

/// The same key in the stored form, from any of the three of RFC 9935 (one with both must be of one key).
pub(super) fn canonical(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<KeyMaterial, AlgorithmError> {
    let pkcs8 = material.bytes();
    if algorithm != Algorithm::X25519MlKem768 {
        if let Some(seed) = layout::read_seed(algorithm, pkcs8) {
            return encode(algorithm, &expand(algorithm, seed));
        }
        if let Some((seed, claimed)) = layout::read_both(algorithm, lengths(algorithm).0, pkcs8) {
            let expanded = expand(algorithm, seed);
            return if bool::from(subtle::ConstantTimeEq::ct_eq(&expanded[..], claimed)) {
                encode(algorithm, &expanded)
            } else {
                Err(AlgorithmError::NotAKey(algorithm))
            };
        }
    }
    // The hash within (FIPS 203, 7.3) is checked by aws-lc whenever it decapsulates, first for the pair's consistency.
    expanded(algorithm, material)?;
    Ok(KeyMaterial::from_secret(pkcs8.to_vec())?)
}

/// The decapsulation key of a seed (FIPS 203, algorithm 16).
fn expand(algorithm: Algorithm, seed: &[u8; 64]) -> Zeroizing<Vec<u8>> {
    let seed = Zeroizing::new(ml_kem::Seed::from(*seed));
    #[expect(deprecated, reason = "the expanded form is what aws-lc-rs takes")]
    let expanded = if algorithm == Algorithm::MlKem1024 {
        let key = ml_kem::DecapsulationKey::<MlKem1024>::from_seed(*seed);
        key.to_expanded_bytes().to_vec()
    } else {
        ml_kem::DecapsulationKey::<MlKem768>::from_seed(*seed).to_expanded_bytes().to_vec()
    };
    Zeroizing::new(expanded)
}

/// The decapsulation key within the stored form.
fn expanded(algorithm: Algorithm, material: &KeyMaterial) -> Result<&[u8], AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let (len, _) = lengths(algorithm);
    if algorithm == Algorithm::X25519MlKem768 {
        return Ok(split_hybrid(material)?.0);
    }
    material
        .bytes()
        .strip_prefix(&layout::expanded_prefix(algorithm, len)[..])
        .filter(|expanded| expanded.len() == len)
        .ok_or(wrong)
}

fn split_hybrid(material: &KeyMaterial) -> Result<(&[u8], &[u8; 32]), AlgorithmError> {
    const WRONG: AlgorithmError = AlgorithmError::NotAKey(Algorithm::X25519MlKem768);
    let (kem, curve) = material.bytes().split_at_checked(HYBRID_KEM).ok_or(WRONG)?;
    Ok((kem, curve.try_into().map_err(|_| WRONG)?))
}

/// The encapsulation key within a decapsulation key: its hash and the rejection value follow it, 32 bytes each.
fn public_within(algorithm: Algorithm, expanded: &[u8]) -> Option<&[u8]> {
    let (len, public) = lengths(algorithm);
    expanded.get(len.checked_sub(64 + public)?..len.checked_sub(64)?)
}

/// Whether aws-lc encapsulates to a bare encapsulation key: it does when all coefficients are below the modulus (FIPS
/// 203, 7.2).
pub(super) fn takes_encapsulation(algorithm: Algorithm, public: &[u8]) -> bool {
    parameters(algorithm)
        .and_then(|parameters| EncapsulationKey::new(parameters, public).ok())
        .is_some_and(|key| key.encapsulate().is_ok())
}

/// The key that encapsulates to bare bytes.
pub(crate) fn encapsulation_key(algorithm: Algorithm, public: &[u8]) -> Option<EncapsulationKey> {
    EncapsulationKey::new(parameters(algorithm)?, public).ok()
}

pub(crate) fn parse(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<DecapsulationKey, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let parameters = parameters(algorithm).ok_or(wrong)?;
    DecapsulationKey::new(parameters, expanded(algorithm, material)?).map_err(|_| wrong)
}

/// The X25519 half of the hybrid.
pub(crate) fn parse_curve(material: &KeyMaterial) -> Result<agreement::PrivateKey, AlgorithmError> {
    curve25519::load_x25519(split_hybrid(material)?.1)
}

pub(super) fn public_key(
    algorithm: Algorithm,
    material: &KeyMaterial,
) -> Result<PublicKey, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let expanded = expanded(algorithm, material)?;
    let public = public_within(algorithm, expanded).ok_or(wrong)?;
    if algorithm == Algorithm::X25519MlKem768 {
        let curve = curve25519::public_of(&parse_curve(material)?)?;
        return PublicKey::from_raw(algorithm, &[public, curve.as_ref()].concat()).ok_or(wrong);
    }
    PublicKey::from_raw(algorithm, public).ok_or(wrong)
}
