//! A recovery key in shares: Shamir's scheme over GF(256), k of n (crate `blahaj`).
//!
//! A share is `"polykey-recovery-share-"` and the base64url form of: format 1 ‖ k ‖ n ‖ fingerprint of
//! the public key 8 ‖ x ‖ y 32, and a checksum of 4 bytes. Fewer than k tell nothing of the key. What k
//! shares give is the key if its public half has the fingerprint; a wrong share is found out so, and
//! not which one it is.

use std::fmt;

use zeroize::Zeroizing;

use super::{RecoveryError, RecoveryKey, checked, unchecked};
use crate::CryptoFailure;

const SHARE: &str = "polykey-recovery-share-";
const FORMAT: u8 = 1;
const LEN: usize = 44;

/// One share, erased when dropped.
#[derive(Clone)]
pub struct Share {
    threshold: u8,
    count: u8,
    key: [u8; 8],
    x: u8,
    y: Zeroizing<[u8; 32]>,
}

/// Why shares do not give a recovery key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// Not 2 ≤ k ≤ n ≤ 255.
    #[error("shares are 2 to 255, and 2 to all of them are needed to recover")]
    Numbers,
    /// They are of several keys.
    #[error("share {0} is of another recovery key than the first one")]
    Another(u8),
    /// More are needed.
    #[error("{needed} different shares are needed, and there are {found}")]
    TooFew {
        /// k.
        needed: u8,
        /// Different shares among those given.
        found: usize,
    },
    /// They give something else than the key.
    #[error("these shares do not give their recovery key: at least one of them is not genuine")]
    Wrong,
    /// The random generator failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

impl Share {
    /// Reads what [`Self::to_text`] wrote.
    ///
    /// # Errors
    /// [`RecoveryError`].
    pub fn parse(text: &str) -> Result<Self, RecoveryError> {
        let bytes = unchecked(SHARE, text)?;
        let [format, threshold, count, rest @ ..] = bytes.as_slice() else {
            return Err(RecoveryError::Mistyped);
        };
        if *format != FORMAT {
            return Err(RecoveryError::Newer);
        }
        let (key, rest) = rest.split_first_chunk::<8>().ok_or(RecoveryError::Mistyped)?;
        let (x, rest) = rest.split_first().ok_or(RecoveryError::Mistyped)?;
        let mut y = Zeroizing::new([0; 32]);
        let sound = rest.len() == y.len() && *x != 0 && numbers(*threshold, *count);
        if !sound {
            return Err(RecoveryError::Mistyped);
        }
        y.copy_from_slice(rest);
        Ok(Self { threshold: *threshold, count: *count, key: *key, x: *x, y })
    }

    /// The share with a checksum, for a person or a file to keep.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(LEN));
        bytes.extend_from_slice(&[FORMAT, self.threshold, self.count]);
        bytes.extend_from_slice(&self.key);
        bytes.push(self.x);
        bytes.extend_from_slice(self.y.as_slice());
        checked(SHARE, &bytes)
    }

    /// Which of the shares it is, from 1.
    #[must_use]
    pub const fn number(&self) -> u8 {
        self.x
    }

    /// How many are needed.
    #[must_use]
    pub const fn threshold(&self) -> u8 {
        self.threshold
    }

    /// How many there are.
    #[must_use]
    pub const fn count(&self) -> u8 {
        self.count
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { threshold, count, x, .. } = self;
        write!(f, "Share({x} of {count}, {threshold} needed)")
    }
}

fn numbers(threshold: u8, count: u8) -> bool {
    2 <= threshold && threshold <= count
}

/// Splits a key into `count` shares of which any `threshold` give it back.
///
/// # Errors
/// [`ShareError::Numbers`], [`ShareError::Crypto`].
pub fn split(key: &RecoveryKey, threshold: u8, count: u8) -> Result<Vec<Share>, ShareError> {
    if !numbers(threshold, count) {
        return Err(ShareError::Numbers);
    }
    let name = key.public().map_err(|_| ShareError::Wrong)?.fingerprint();
    let mut shares = Vec::with_capacity(usize::from(count));
    for dealt in blahaj::Sharks(threshold).dealer(key.bytes()).take(usize::from(count)) {
        let bytes = Zeroizing::new(Vec::from(&dealt));
        let (x, rest) = bytes.split_first().ok_or(ShareError::Wrong)?;
        let mut y = Zeroizing::new([0; 32]);
        if rest.len() != y.len() {
            return Err(ShareError::Wrong);
        }
        y.copy_from_slice(rest);
        shares.push(Share { threshold, count, key: name, x: *x, y });
    }
    Ok(shares)
}

/// The key of some of its shares, in any order; one given twice counts once.
///
/// # Errors
/// See [`ShareError`].
pub fn combine(shares: &[Share]) -> Result<RecoveryKey, ShareError> {
    let Some(first) = shares.first() else {
        return Err(ShareError::TooFew { needed: 2, found: 0 });
    };
    let mut different: Vec<&Share> = Vec::new();
    for share in shares {
        let of_one = share.key == first.key
            && share.threshold == first.threshold
            && share.count == first.count;
        if !of_one {
            return Err(ShareError::Another(share.x));
        }
        if different.iter().all(|known| known.x != share.x) {
            different.push(share);
        }
    }
    if different.len() < usize::from(first.threshold) {
        let found = different.len();
        return Err(ShareError::TooFew { needed: first.threshold, found });
    }
    let mut points = Vec::with_capacity(different.len());
    for share in different {
        let mut bytes = Zeroizing::new(Vec::with_capacity(33));
        bytes.push(share.x);
        bytes.extend_from_slice(share.y.as_slice());
        points.push(blahaj::Share::try_from(bytes.as_slice()).map_err(|_| ShareError::Wrong)?);
    }
    let scheme = blahaj::Sharks(first.threshold);
    let found = scheme.recover(points.iter());
    let found = Zeroizing::new(found.map_err(|_| ShareError::Wrong)?);
    let mut raw = Zeroizing::new([0; 32]);
    if found.len() != raw.len() {
        return Err(ShareError::Wrong);
    }
    raw.copy_from_slice(&found);
    let key = RecoveryKey::from_bytes(raw);
    let genuine = key.public().is_ok_and(|public| public.fingerprint() == first.key);
    if genuine { Ok(key) } else { Err(ShareError::Wrong) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_k_of_n_give_the_key_and_fewer_do_not() {
        let key = RecoveryKey::generate().unwrap();
        for (k, n) in [(2, 2), (2, 3), (3, 5), (5, 5), (200, 255)] {
            let shares = split(&key, k, n).unwrap();
            assert_eq!(shares.len(), usize::from(n));
            let mut some: Vec<Share> = shares.iter().rev().take(usize::from(k)).cloned().collect();
            assert!(combine(&some).unwrap().bytes() == key.bytes(), "{k} of {n}");
            some.pop();
            // One given twice is one.
            some.push(some[0].clone());
            let found = usize::from(k) - 1;
            assert_eq!(combine(&some).err(), Some(ShareError::TooFew { needed: k, found }));
            // More than are needed, and one of them twice.
            let mut all = shares.clone();
            all.push(shares[0].clone());
            assert!(combine(&all).unwrap().bytes() == key.bytes());
        }
        for (k, n) in [(0, 0), (1, 1), (1, 5), (3, 2)] {
            assert_eq!(split(&key, k, n).err(), Some(ShareError::Numbers));
        }
    }

    #[test]
    fn every_three_of_five_give_the_key() {
        let key = RecoveryKey::generate().unwrap();
        let shares = split(&key, 3, 5).unwrap();
        for a in 0..5 {
            for b in a + 1..5 {
                for c in b + 1..5 {
                    let some = [shares[c].clone(), shares[a].clone(), shares[b].clone()];
                    assert!(combine(&some).unwrap().bytes() == key.bytes());
                }
            }
        }
    }

    #[test]
    fn shares_survive_paper() {
        let key = RecoveryKey::generate().unwrap();
        for share in split(&key, 2, 3).unwrap() {
            let text = share.to_text();
            let read = Share::parse(&format!("{}\n", text.as_str())).unwrap();
            assert_eq!((read.number(), read.threshold(), read.count()), (share.x, 2, 3));
            assert!(read.y.as_slice() == share.y.as_slice());
            assert!(Share::parse(&text[..text.len() - 1]).is_err());
            assert!(RecoveryKey::parse(&text).is_err());
        }
    }

    #[test]
    fn shares_of_another_key_and_forged_ones_are_found_out() {
        let key = RecoveryKey::generate().unwrap();
        let shares = split(&key, 2, 3).unwrap();
        let other = split(&RecoveryKey::generate().unwrap(), 2, 3).unwrap();
        let mixed = [shares[0].clone(), other[1].clone()];
        assert_eq!(combine(&mixed).err(), Some(ShareError::Another(2)));
        let forged = Share { key: shares[0].key, ..other[1].clone() };
        assert_eq!(combine(&[shares[0].clone(), forged]).err(), Some(ShareError::Wrong));
        assert_eq!(combine(&[]).err(), Some(ShareError::TooFew { needed: 2, found: 0 }));
    }
}
