//! Keys without a public part: AES-256 and API keys.

use zeroize::Zeroizing;

use super::{Algorithm, AlgorithmError};
use crate::{KeyMaterial, random};

const AES_256_LEN: usize = 32;
const DEFAULT_PREFIX: &str = "pk";

/// 32 random bytes.
pub(super) fn aes_256() -> Result<KeyMaterial, AlgorithmError> {
    Ok(KeyMaterial::random(AES_256_LEN)?)
}

pub(super) fn check_aes_256(material: &KeyMaterial) -> Result<(), AlgorithmError> {
    match material.len() {
        AES_256_LEN => Ok(()),
        _ => Err(AlgorithmError::NotAKey(Algorithm::Aes256)),
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
    fn aes_keys_have_32_bytes() {
        assert!(check_aes_256(&aes_256().unwrap()).is_ok());
        for len in [1, 16, 31, 33, 64] {
            let key = KeyMaterial::from_secret(vec![1; len]).unwrap();
            assert!(check_aes_256(&key).is_err());
        }
        let (a, b) = (aes_256().unwrap(), aes_256().unwrap());
        assert_ne!(a.bytes(), b.bytes());
    }
}
