//! Secret bytes that can be used and wrapped, but not looked at, copied or written down.

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

use crate::{CryptoFailure, random};

/// The secret bytes of a key: 1 byte to 64 KiB, erased when dropped.
///
/// Algorithms and wrappers of this crate alone see the bytes. It cannot be copied:
/// ```compile_fail
/// fn copy(key: &polykey_hsm::KeyMaterial) -> polykey_hsm::KeyMaterial { key.clone() }
/// ```
/// it cannot be serialised:
/// ```compile_fail
/// fn write(key: &polykey_hsm::KeyMaterial) -> String { serde_json::to_string(key).unwrap() }
/// ```
/// and its bytes cannot be borrowed, by trait or by method:
/// ```compile_fail
/// fn look(key: &polykey_hsm::KeyMaterial) -> &[u8] { key.as_ref() }
/// ```
/// ```compile_fail
/// fn look(key: &polykey_hsm::KeyMaterial) -> &[u8] { key.bytes() }
/// ```
/// ```compile_fail
/// fn look(key: &polykey_hsm::KeyMaterial) -> &[u8] { &*key }
/// ```
/// (This much compiles, so that the lines above fail for the reason they state.)
/// ```
/// fn length(key: &polykey_hsm::KeyMaterial) -> usize { key.len() }
/// fn json(text: &str) -> String { serde_json::to_string(text).unwrap() }
/// ```
pub struct KeyMaterial(Zeroizing<Vec<u8>>);

/// Why bytes are not key material.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MaterialError {
    /// There are none.
    #[error("key material is empty")]
    Empty,
    /// There are more than [`KeyMaterial::MAX_LEN`].
    #[error("key material is longer than 64 KiB")]
    TooLong,
}

impl KeyMaterial {
    /// The longest key material, in bytes.
    pub const MAX_LEN: usize = 64 * 1024;

    /// Takes over secret bytes; they are erased when the value is dropped, and at once when they
    /// are refused.
    ///
    /// # Errors
    /// When there are no bytes or more than [`Self::MAX_LEN`].
    pub fn from_secret(mut bytes: Vec<u8>) -> Result<Self, MaterialError> {
        let refusal = match bytes.len() {
            0 => MaterialError::Empty,
            1..=Self::MAX_LEN => return Ok(Self(Zeroizing::new(bytes))),
            _ => MaterialError::TooLong,
        };
        bytes.zeroize();
        Err(refusal)
    }

    /// As many random bytes as asked for; 1 to [`Self::MAX_LEN`].
    pub(crate) fn random(len: usize) -> Result<Self, CryptoFailure> {
        let mut bytes = Zeroizing::new(vec![0; len]);
        random::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Takes over what was opened under authentication, and so was valid when it was sealed.
    pub(crate) fn from_opened(mut bytes: Zeroizing<Vec<u8>>) -> Result<Self, MaterialError> {
        Self::from_secret(std::mem::take(&mut bytes))
    }

    /// The number of secret bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Hands the secret out, for an export that policy has allowed: the only way that bytes leave
    /// this crate in the clear.
    #[must_use]
    pub fn expose_for_export(self) -> Zeroizing<Vec<u8>> {
        self.0
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyMaterial({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_is_bounded_at_both_ends() {
        assert_eq!(KeyMaterial::from_secret(vec![]).unwrap_err(), MaterialError::Empty);
        assert_eq!(KeyMaterial::from_secret(vec![7]).unwrap().len(), 1);
        assert_eq!(KeyMaterial::from_secret(vec![7; 65_536]).unwrap().len(), 65_536);
        assert_eq!(KeyMaterial::from_secret(vec![7; 65_537]).unwrap_err(), MaterialError::TooLong);
    }

    #[test]
    fn debug_shows_the_length_alone() {
        let key = KeyMaterial::from_secret(b"hunter2hunter2".to_vec()).unwrap();
        assert_eq!(format!("{key:?}"), "KeyMaterial(14 bytes)");
        assert_eq!(format!("{key:#?}"), "KeyMaterial(14 bytes)");
    }

    #[test]
    fn export_gives_the_bytes() {
        let key = KeyMaterial::from_secret(vec![1, 2, 3]).unwrap();
        assert_eq!(key.expose_for_export().as_slice(), [1, 2, 3]);
    }
}
