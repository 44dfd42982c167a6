//! Keys without a public part.

use zeroize::Zeroizing;

use super::{Algorithm, AlgorithmError};
use crate::{KeyMaterial, random};

const DEFAULT_PREFIX: &str = "pk";

/// The number of bytes of a key, or `None` where the algorithm is not symmetric or has no length of its own.
const fn length(algorithm: Algorithm) -> Option<usize> {
    match algorithm {
        Algorithm::Aes128 | Algorithm::Aes128Gcm => Some(16),
        Algorithm::Aes256
        | Algorithm::Aes256Gcm
        | Algorithm::ChaCha20Poly1305
        | Algorithm::XChaCha20Poly1305
        | Algorithm::HmacSha256
        | Algorithm::HkdfSha256 => Some(32),
        Algorithm::HmacSha384 => Some(48),
        Algorithm::HmacSha512 => Some(64),
        _ => None,
    }
}

/// Random bytes of the right number.
pub(super) fn generate(algorithm: Algorithm) -> Result<KeyMaterial, AlgorithmError> {
    let length = length(algorithm).ok_or(AlgorithmError::NotAKey(algorithm))?;
    Ok(KeyMaterial::random(length)?)
}

pub(super) fn check(algorithm: Algorithm, material: &KeyMaterial) -> Result<(), AlgorithmError> {
    match length(algorithm) {
        Some(length) if length == material.len() => Ok(()),
        _ => Err(AlgorithmError::NotAKey(algorithm)),
    }
}

/// A printable token: prefix, `_`, and 256 random bits in 43 characters of base64url (RFC 4648).
pub(super) fn api_key(prefix: Option<&str>) -> Result<KeyMaterial, AlgorithmError> {
    let prefix = prefix.unwrap_or(DEFAULT_PREFIX);
    let valid = prefix.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !valid || !(1..=16).contains(&prefix.len()) {
        return Err(AlgorithmError::BadPrefix);
    }
    let random = random::secret::<32>()?;
    let mut token = Zeroizing::new(String::with_capacity(prefix.len() + 1 + 44));
    token.push_str(prefix);
    token.push('_');
    data_encoding::BASE64URL_NOPAD.encode_append(random.as_slice(), &mut token);
    Ok(KeyMaterial::from_secret(std::mem::take(&mut *token).into_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn api_keys_are_printable_and_carry_256_bits() {
        let text = |prefix| {
            let bytes = api_key(prefix).unwrap().expose_for_export();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        for (prefix, start) in
            [(None, "pk_"), (Some("a"), "a_"), (Some("acme4567890123ab"), "acme4567890123ab_")]
        {
            let (one, two) = (text(prefix), text(prefix));
            assert_ne!(one, two);
            let secret = one.strip_prefix(start).unwrap();
            assert_eq!(data_encoding::BASE64URL_NOPAD.decode(secret.as_bytes()).unwrap().len(), 32);
        }
        for bad in ["", "Pk", "p_k", "ä", "acme4567890123abc", "p\n"] {
            assert_eq!(api_key(Some(bad)).unwrap_err(), AlgorithmError::BadPrefix, "{bad:?}");
        }
    }

    #[test]
    fn keys_have_the_length_of_their_algorithm() {
        for &algorithm in Algorithm::ALL.iter().filter(|a| length(**a).is_some()) {
            let key = generate(algorithm).unwrap();
            assert!(check(algorithm, &key).is_ok());
            for wrong in [1, key.len() - 1, key.len() + 1, 2 * key.len()] {
                let key = KeyMaterial::from_secret(vec![1; wrong]).unwrap();
                assert!(check(algorithm, &key).is_err());
            }
            let (a, b) = (generate(algorithm).unwrap(), generate(algorithm).unwrap());
            assert_ne!(a.bytes(), b.bytes());
        }
    }
}
