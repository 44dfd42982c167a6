//! API keys: 256 random bits behind a recognisable prefix, a public id and a checksum.
//!
//! Form: `pk_` ‖ id (8 characters, 40 bits) ‖ `_` ‖ base32(secret ‖ checksum) (56 characters), RFC 4648
//! alphabet without padding. The checksum tells a typing error from a wrong key; it protects nothing.
//! With 256 random bits a plain MAC is stored: a slow hash would only make logins a way to exhaust
//! the node.

use std::fmt;

use aws_lc_rs::digest::{Context, SHA256};
use data_encoding::BASE32_NOPAD;
use polykey_hsm::{MacPurpose, Ring};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use zeroize::{Zeroize, Zeroizing};

use crate::error::Error;

const PREFIX: &str = "pk_";
const ID: usize = 5;
const SECRET: usize = 32;
const CHECKSUM: usize = 3;
/// Characters of an API key.
pub const LENGTH: usize = 3 + 8 + 1 + 56;

/// An API key in the clear: shown once to whoever asked for it, never stored.
pub struct ApiKey {
    text: Zeroizing<String>,
}

impl ApiKey {
    /// A new key from the system's generator.
    ///
    /// # Errors
    /// [`Error::Internal`] if the generator fails.
    pub fn generate() -> Result<Self, Error> {
        let fault = |e| Error::internal(format!("making an API key: {e}"));
        let id: [u8; ID] = polykey_hsm::random::array().map_err(fault)?;
        let secret = polykey_hsm::random::secret::<SECRET>().map_err(fault)?;
        let mut body = Zeroizing::new([0; SECRET + CHECKSUM]);
        let (front, back) = body.split_at_mut(SECRET);
        front.copy_from_slice(secret.as_slice());
        back.copy_from_slice(&checksum(&id, secret.as_slice()));
        let mut text = Zeroizing::new(String::with_capacity(LENGTH));
        text.push_str(PREFIX);
        BASE32_NOPAD.encode_append(&id, &mut text);
        text.push('_');
        BASE32_NOPAD.encode_append(body.as_slice(), &mut text);
        Ok(Self { text })
    }

    /// Reads exactly the form above; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() != LENGTH {
            return None;
        }
        let (id, body) = text.strip_prefix(PREFIX)?.split_once('_')?;
        let id: [u8; ID] = BASE32_NOPAD.decode(id.as_bytes()).ok()?.try_into().ok()?;
        let body = Zeroizing::new(BASE32_NOPAD.decode(body.as_bytes()).ok()?);
        let (secret, sum) = body.split_at_checked(SECRET)?;
        (sum == checksum(&id, secret)).then(|| Self { text: Zeroizing::new(text.to_owned()) })
    }

    /// The key itself.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// The public part, by which people tell keys apart: 11 characters.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.text.get(..PREFIX.len() + 8).unwrap_or_default()
    }

    /// What is stored: HMAC-SHA-256 under the node's key, bound to the client.
    #[must_use]
    pub fn mac(&self, ring: &Ring, client_id: &str) -> [u8; 32] {
        mac(ring, client_id, &self.text)
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({}…)", self.prefix())
    }
}

fn mac(ring: &Ring, client_id: &str, text: &str) -> [u8; 32] {
    ring.mac(MacPurpose::ApiKey, &[client_id.as_bytes(), text.as_bytes()])
}

/// What is written down of a text that should have been a client id: one that begins like an API key
/// was put into the wrong field, and must not stand in the audit trail.
#[must_use]
pub fn claimed_id(text: &str) -> &str {
    if text.trim_start().starts_with(PREFIX) { "(an API key)" } else { text }
}

/// Which of the keys with these MACs `presented` is. Every MAC is compared, in constant time; a text
/// that is no API key at all costs the same as a wrong one.
#[must_use]
pub(crate) fn position<'a>(
    ring: &Ring,
    client_id: &str,
    presented: &str,
    macs: impl IntoIterator<Item = &'a [u8]>,
) -> Option<usize> {
    let mut presented_mac = mac(ring, client_id, presented);
    let mut found = subtle::Choice::from(0);
    let mut at = 0_u64;
    for (i, stored) in (0_u64..).zip(macs) {
        let same = stored.ct_eq(presented_mac.as_slice());
        at.conditional_assign(&i, same);
        found |= same;
    }
    presented_mac.zeroize();
    // A stored MAC is of a well-formed key, so the form need not be looked at.
    bool::from(found).then_some(usize::try_from(at).ok()).flatten()
}

fn checksum(id: &[u8], secret: &[u8]) -> [u8; CHECKSUM] {
    let mut cx = Context::new(&SHA256);
    cx.update(b"polykey/api-key/checksum/v1");
    cx.update(id);
    cx.update(secret);
    let digest = cx.finish();
    let mut out = [0; CHECKSUM];
    for (to, from) in out.iter_mut().zip(digest.as_ref()) {
        *to = *from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_key_reads_back_and_nothing_else_does() {
        let key = ApiKey::generate().unwrap();
        let text = key.reveal().to_owned();
        assert_eq!(text.len(), LENGTH);
        assert!(text.starts_with("pk_"));
        assert_eq!(ApiKey::parse(&text).unwrap().reveal(), text);
        for i in 0..text.len() {
            for other in ["A", "b", "7", "_", " ", "=", "\0"] {
                let mut changed = text.clone();
                changed.replace_range(i..=i, other);
                assert_eq!(ApiKey::parse(&changed).is_some(), changed == text, "{i} {other:?}");
            }
        }
        for bad in ["", "pk_", &text.to_lowercase(), &format!("{text}A"), &text[1..], "pk_é"] {
            assert!(ApiKey::parse(bad).is_none(), "{bad:?}");
        }
        assert_ne!(ApiKey::generate().unwrap().reveal(), text);
    }

    #[test]
    fn debug_shows_the_public_part_alone() {
        let key = ApiKey::generate().unwrap();
        let shown = format!("{key:?}");
        assert!(!shown.contains(&key.reveal()[12..]), "{shown}");
        assert!(shown.contains(key.prefix()));
    }

    #[test]
    fn a_mac_is_of_one_client_and_one_key() {
        let ring = Ring::generate([7; 16]).unwrap();
        let (one, two) = (ApiKey::generate().unwrap(), ApiKey::generate().unwrap());
        let macs = [one.mac(&ring, "a"), two.mac(&ring, "a")];
        let known = |client: &str, key: &str| {
            position(&ring, client, key, macs.iter().map(<[u8; 32]>::as_slice))
        };
        assert_eq!((known("a", one.reveal()), known("a", two.reveal())), (Some(0), Some(1)));
        assert_eq!(known("b", one.reveal()), None);
        assert_eq!(known("a", ApiKey::generate().unwrap().reveal()), None);
        assert_eq!(known("a", ""), None);
        assert_eq!(position(&ring, "a", one.reveal(), [&[][..]]), None);
    }
}
