//! Ranges of keys.

use std::ops::Bound;

/// From where to where a scan walks, by the bytes of the key.
pub type KeyRange = (Bound<Vec<u8>>, Bound<Vec<u8>>);

/// Every key.
#[must_use]
pub fn all() -> KeyRange {
    (Bound::Unbounded, Bound::Unbounded)
}

/// `start` and every key after it.
pub fn from(start: impl Into<Vec<u8>>) -> KeyRange {
    (Bound::Included(start.into()), Bound::Unbounded)
}

/// Every key that starts with `prefix`.
pub fn prefix(prefix: impl Into<Vec<u8>>) -> KeyRange {
    let prefix = prefix.into();
    let end = match successor(&prefix) {
        Some(end) => Bound::Excluded(end),
        None => Bound::Unbounded,
    };
    (Bound::Included(prefix), end)
}

/// The smallest key greater than every key that starts with `prefix`; `None` if there is none,
/// which is so for the empty prefix and for runs of 0xff.
fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|&byte| byte != u8::MAX)?;
    let mut end = prefix.get(..=last)?.to_vec();
    if let Some(byte) = end.last_mut() {
        *byte = byte.checked_add(1)?;
    }
    Some(end)
}

/// Whether no key can lie in `range`. `BTreeMap::range` panics on some of these.
pub(crate) fn is_empty(range: &KeyRange) -> bool {
    match range {
        (Bound::Included(start), Bound::Included(end)) => start > end,
        (
            Bound::Included(start) | Bound::Excluded(start),
            Bound::Included(end) | Bound::Excluded(end),
        ) => start >= end,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_end_where_no_key_can_start_with_them() {
        let included = |key: &[u8]| Bound::Included(key.to_vec());
        let excluded = |key: &[u8]| Bound::Excluded(key.to_vec());
        assert_eq!(prefix(*b"ab"), (included(b"ab"), excluded(b"ac")));
        assert_eq!(prefix([1, 255, 255]), (included(&[1, 255, 255]), excluded(&[2])));
        assert_eq!(prefix([255]), (included(&[255]), Bound::Unbounded));
        assert_eq!(prefix([]), (included(&[]), Bound::Unbounded));
    }

    #[test]
    fn empty_ranges_are_recognised() {
        let key = |byte: u8| vec![byte];
        assert!(is_empty(&(Bound::Included(key(2)), Bound::Included(key(1)))));
        assert!(is_empty(&(Bound::Excluded(key(1)), Bound::Excluded(key(1)))));
        assert!(is_empty(&(Bound::Included(key(1)), Bound::Excluded(key(1)))));
        assert!(!is_empty(&(Bound::Included(key(1)), Bound::Included(key(1)))));
        assert!(!is_empty(&all()));
        assert!(!is_empty(&from(key(1))));
    }
}
