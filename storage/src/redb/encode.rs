//! The bytes of keys and values in the tables of a redb store.

use std::collections::BTreeSet;

use ::redb::AccessGuard;

use super::failure::Failure;
use crate::{Revision, RowKey, Space};

const REVISION_BYTES: usize = 8;

/// The key of a row: its space, then its key, so that rows sort by both.
pub(super) fn row(row: &RowKey) -> Vec<u8> {
    key(row.space, &row.key)
}

/// As [`row`], for a borrowed key.
pub(super) fn key(space: Space, key: &[u8]) -> Vec<u8> {
    let mut encoded = Vec::with_capacity(key.len().saturating_add(1));
    encoded.push(space.0);
    encoded.extend_from_slice(key);
    encoded
}

/// What is stored for a row.
pub(super) fn join(revision: Revision, value: &[u8]) -> Vec<u8> {
    let mut stored = Vec::with_capacity(value.len().saturating_add(REVISION_BYTES));
    stored.extend_from_slice(&revision.0.to_be_bytes());
    stored.extend_from_slice(value);
    stored
}

/// The inverse of [`join`].
pub(super) fn split(stored: &[u8]) -> Result<(Revision, &[u8]), Failure> {
    match stored.split_first_chunk::<REVISION_BYTES>() {
        Some((revision, value)) => Ok((Revision(u64::from_be_bytes(*revision)), value)),
        None => Err(Failure::damaged("a row is shorter than its revision")),
    }
}

/// The rows of a revision: for each the length of its encoded key in two bytes, big endian, and
/// that key.
pub(super) fn changed(keys: &BTreeSet<Vec<u8>>) -> Vec<u8> {
    let mut encoded = Vec::new();
    for key in keys {
        // Keys were checked against MAX_KEY_BYTES, which two bytes hold.
        let length = u16::try_from(key.len()).unwrap_or(u16::MAX);
        encoded.extend_from_slice(&length.to_be_bytes());
        encoded.extend_from_slice(key);
    }
    encoded
}

/// The inverse of [`changed`].
pub(super) fn changed_rows(mut encoded: &[u8]) -> Result<Vec<RowKey>, Failure> {
    let mut rows = Vec::new();
    while !encoded.is_empty() {
        let (row, rest) =
            changed_row(encoded).ok_or_else(|| Failure::damaged("a list of changes"))?;
        rows.push(row);
        encoded = rest;
    }
    Ok(rows)
}

fn changed_row(encoded: &[u8]) -> Option<(RowKey, &[u8])> {
    let (length, rest) = encoded.split_first_chunk::<2>()?;
    let (row, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let (space, key) = row.split_first()?;
    Some((RowKey::new(Space(*space), key), rest))
}

/// The format version in `meta`.
pub(super) fn format_of(stored: Option<AccessGuard<'_, &'static [u8]>>) -> Option<u32> {
    Some(u32::from_be_bytes(stored?.value().try_into().ok()?))
}

/// The store's id in `meta`.
pub(super) fn id_of(stored: Option<AccessGuard<'_, &'static [u8]>>) -> Option<[u8; 16]> {
    stored?.value().try_into().ok()
}

/// The last revision in `meta`.
pub(super) fn revision_of(
    stored: Option<AccessGuard<'_, &'static [u8]>>,
) -> Result<Revision, Failure> {
    stored
        .and_then(|stored| Some(u64::from_be_bytes(stored.value().try_into().ok()?)))
        .map(Revision)
        .ok_or_else(|| Failure::damaged("the last revision is missing"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn changes_come_back_as_they_went(
            rows in proptest::collection::btree_set((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..20)
        ) {
            let rows: Vec<RowKey> =
                rows.into_iter().map(|(space, key)| RowKey::new(Space(space), key)).collect();
            let keys = rows.iter().map(row).collect();
            prop_assert_eq!(changed_rows(&changed(&keys)).ok(), Some(rows));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            drop(changed_rows(&bytes));
            drop(split(&bytes).map(drop));
        }
    }
}
