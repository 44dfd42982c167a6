//! Inclusion and consistency proofs over the leaf hashes (RFC 9162 sections 2.1.3 and 2.1.4).

use std::ops::Range;

use polykey_storage::{Direction, Store};

use crate::error::Error;
use crate::vault::space;
use crate::vault::tree::{Frontier, Hash, node_hash};

/// The largest power of two smaller than `n`, for `n` > 1.
fn split(n: u64) -> u64 {
    1 << (n - 1).ilog2()
}

/// The subtrees whose roots prove that leaf `index` is in the tree of `size` leaves, lowest first;
/// `None` if it is not.
#[must_use]
pub fn inclusion_ranges(index: u64, size: u64) -> Option<Vec<Range<u64>>> {
    if index >= size {
        return None;
    }
    let mut ranges = Vec::new();
    let (mut start, mut end) = (0, size);
    while end - start > 1 {
        let middle = start + split(end - start);
        if index < middle {
            ranges.push(middle..end);
            end = middle;
        } else {
            ranges.push(start..middle);
            start = middle;
        }
    }
    ranges.reverse();
    Some(ranges)
}

/// The subtrees whose roots prove that the tree of `old` leaves is a prefix of the tree of `new`
/// leaves, lowest first; `None` unless 0 < `old` ≤ `new`.
#[must_use]
pub fn consistency_ranges(old: u64, new: u64) -> Option<Vec<Range<u64>>> {
    if old == 0 || old > new {
        return None;
    }
    let mut ranges = Vec::new();
    let (mut start, mut end) = (0, new);
    while end > old {
        let middle = start + split(end - start);
        if old <= middle {
            ranges.push(middle..end);
            end = middle;
        } else {
            ranges.push(start..middle);
            start = middle;
        }
    }
    // The old tree itself needs no proof where it is a complete subtree of the new one.
    if start > 0 {
        ranges.push(start..end);
    }
    ranges.reverse();
    Some(ranges)
}

/// Whether `proof` shows that `leaf` is leaf `index` of the tree of `size` leaves with this root
/// (section 2.1.3.2).
#[must_use]
pub fn verify_inclusion(leaf: &Hash, index: u64, size: u64, proof: &[Hash], root: &Hash) -> bool {
    if index >= size {
        return false;
    }
    let (mut fn_, mut sn) = (index, size - 1);
    let mut hash = *leaf;
    for node in proof {
        if sn == 0 {
            return false;
        }
        if fn_ & 1 == 1 || fn_ == sn {
            hash = node_hash(node, &hash);
            while fn_ & 1 == 0 && fn_ != 0 {
                fn_ >>= 1;
                sn >>= 1;
            }
        } else {
            hash = node_hash(&hash, node);
        }
        fn_ >>= 1;
        sn >>= 1;
    }
    sn == 0 && hash == *root
}

/// Whether `proof` shows that the tree of `old` leaves with root `old_root` is a prefix of the tree
/// of `new` leaves with root `new_root` (section 2.1.4.2).
#[must_use]
pub fn verify_consistency(
    old: u64,
    new: u64,
    proof: &[Hash],
    old_root: &Hash,
    new_root: &Hash,
) -> bool {
    if old == 0 || old > new {
        return false;
    }
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    let mut nodes = proof.iter();
    let first = if old.is_power_of_two() { Some(old_root) } else { nodes.next() };
    let Some(first) = first else { return false };
    let (mut fn_, mut sn) = (old - 1, new - 1);
    while fn_ & 1 == 1 {
        fn_ >>= 1;
        sn >>= 1;
    }
    let (mut fr, mut sr) = (*first, *first);
    for node in nodes {
        if sn == 0 {
            return false;
        }
        if fn_ & 1 == 1 || fn_ == sn {
            fr = node_hash(node, &fr);
            sr = node_hash(node, &sr);
            while fn_ & 1 == 0 && fn_ != 0 {
                fn_ >>= 1;
                sn >>= 1;
            }
        } else {
            sr = node_hash(&sr, node);
        }
        fn_ >>= 1;
        sn >>= 1;
    }
    sn == 0 && fr == *old_root && sr == *new_root
}

/// Walks the leaf hashes of a store from leaf `from` on, in order and without gaps.
pub(super) struct LeafHashes<'s> {
    store: &'s dyn Store,
    next: u64,
}

impl<'s> LeafHashes<'s> {
    pub(super) fn new(store: &'s dyn Store, from: u64) -> Self {
        Self { store, next: from }
    }

    /// The next hashes, at most `limit`; none at the end. Nothing is opened.
    pub(super) async fn step(&mut self, limit: usize) -> Result<Vec<Hash>, Error> {
        let range = polykey_storage::from(self.next.to_be_bytes().to_vec());
        let rows = self.store.scan(space::AUDIT, range, Direction::Forward, limit).await?;
        let mut hashes = Vec::with_capacity(rows.len());
        for row in &rows {
            if row.key != self.next.to_be_bytes() {
                return Err(Error::data_loss(format!("audit leaf {} is missing", self.next)));
            }
            let hash = row.value.first_chunk::<32>();
            hashes.push(*hash.ok_or_else(|| Error::data_loss("an audit row is too short"))?);
            self.next += 1;
        }
        Ok(hashes)
    }
}

/// The roots of subtrees, in the order asked, from one walk over the leaf hashes in the clear.
///
/// # Errors
/// [`Error::DataLoss`] if a leaf is missing, [`Error::Unavailable`] if the store cannot be read.
pub async fn roots(store: &dyn Store, ranges: &[Range<u64>]) -> Result<Vec<Hash>, Error> {
    let mut trees = vec![Frontier::default(); ranges.len()];
    let from = ranges.iter().map(|r| r.start).min().unwrap_or(0);
    let to = ranges.iter().map(|r| r.end).max().unwrap_or(0);
    let mut hashes = LeafHashes::new(store, from);
    let mut index = from;
    while index < to {
        let step = hashes.step(64).await?;
        if step.is_empty() {
            return Err(Error::data_loss(format!("audit leaf {index} is missing")));
        }
        for hash in step {
            for (tree, range) in trees.iter_mut().zip(ranges) {
                if range.contains(&index) {
                    tree.push(hash);
                }
            }
            index += 1;
        }
        tokio::task::yield_now().await;
    }
    Ok(trees.iter().map(Frontier::root).collect())
}

/// The proof that leaf `index` is in the first `size` leaves of the log.
///
/// # Errors
/// [`Error::Invalid`] unless `index` < `size` ≤ the length of the log; as [`roots`].
pub async fn inclusion(store: &dyn Store, index: u64, size: u64) -> Result<Vec<Hash>, Error> {
    let ranges = inclusion_ranges(index, size)
        .ok_or_else(|| Error::invalid("index", "must be less than the size of the tree"))?;
    roots(store, &ranges).await
}

/// The proof that the first `old` leaves of the log are a prefix of its first `new` leaves.
///
/// # Errors
/// [`Error::Invalid`] unless 0 < `old` ≤ `new`; as [`roots`].
pub async fn consistency(store: &dyn Store, old: u64, new: u64) -> Result<Vec<Hash>, Error> {
    let ranges = consistency_ranges(old, new)
        .ok_or_else(|| Error::invalid("old_size", "must be at least 1 and at most the new size"))?;
    roots(store, &ranges).await
}
