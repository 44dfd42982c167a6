//! Proofs against the recursive definitions of RFC 9162, for every size up to 128.

use std::ops::Range;

use super::super::proof::{
    consistency, consistency_ranges, inclusion, inclusion_ranges, verify_consistency,
    verify_inclusion,
};
use super::{event, in_memory};
use crate::audit::Outcome;
use crate::vault::tree::{Frontier, Hash, leaf_hash, node_hash};

fn mth(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => Frontier::default().root(),
        [one] => *one,
        many => {
            let k = many.len().next_power_of_two() / 2;
            node_hash(&mth(&many[..k]), &mth(&many[k..]))
        }
    }
}

/// PATH of section 2.1.3.1.
fn path(m: usize, leaves: &[Hash]) -> Vec<Hash> {
    if leaves.len() <= 1 {
        return Vec::new();
    }
    let k = leaves.len().next_power_of_two() / 2;
    let (mut proof, other) = if m < k {
        (path(m, &leaves[..k]), mth(&leaves[k..]))
    } else {
        (path(m - k, &leaves[k..]), mth(&leaves[..k]))
    };
    proof.push(other);
    proof
}

/// SUBPROOF of section 2.1.4.1.
fn subproof(m: usize, leaves: &[Hash], known: bool) -> Vec<Hash> {
    if m == leaves.len() {
        return if known { Vec::new() } else { vec![mth(leaves)] };
    }
    let k = leaves.len().next_power_of_two() / 2;
    let (mut proof, other) = if m <= k {
        (subproof(m, &leaves[..k], known), mth(&leaves[k..]))
    } else {
        (subproof(m - k, &leaves[k..], false), mth(&leaves[..k]))
    };
    proof.push(other);
    proof
}

fn leaves(n: usize) -> Vec<Hash> {
    (0..n).map(|i| leaf_hash(b"salt", &i.to_be_bytes())).collect()
}

fn hashes(leaves: &[Hash], ranges: Vec<Range<u64>>) -> Vec<Hash> {
    let part = |r: Range<u64>| mth(&leaves[r.start as usize..r.end as usize]);
    ranges.into_iter().map(part).collect()
}

#[test]
fn inclusion_proofs_are_those_of_the_definition() {
    let all = leaves(128);
    for n in 1..=128 {
        let tree = &all[..n];
        let root = mth(tree);
        for m in 0..n {
            let (index, size) = (m as u64, n as u64);
            let proof = hashes(tree, inclusion_ranges(index, size).unwrap());
            assert_eq!(proof, path(m, tree), "{m} in {n}");
            assert!(verify_inclusion(&tree[m], index, size, &proof, &root));
            let other = (m + 1) % n;
            if n > 1 {
                assert!(!verify_inclusion(&tree[other], index, size, &proof, &root));
                assert!(!verify_inclusion(&tree[m], other as u64, size, &proof, &root));
                assert!(!verify_inclusion(&tree[m], index, size, &proof[1..], &root));
            }
            let mut longer = proof.clone();
            longer.push([0; 32]);
            assert!(!verify_inclusion(&tree[m], index, size, &longer, &root));
        }
        assert!(inclusion_ranges(n as u64, n as u64).is_none());
    }
}

#[test]
fn consistency_proofs_are_those_of_the_definition() {
    let all = leaves(128);
    for n in 1..=128 {
        let new_root = mth(&all[..n]);
        for m in 1..=n {
            let (old, new) = (m as u64, n as u64);
            let proof = hashes(&all[..n], consistency_ranges(old, new).unwrap());
            assert_eq!(proof, subproof(m, &all[..n], true), "{m} to {n}");
            let old_root = mth(&all[..m]);
            assert!(verify_consistency(old, new, &proof, &old_root, &new_root));
            assert!(!verify_consistency(old, new, &proof, &[1; 32], &new_root));
            assert!(!verify_consistency(old, new, &proof, &old_root, &[1; 32]));
            if !proof.is_empty() {
                let shorter = &proof[..proof.len() - 1];
                assert!(!verify_consistency(old, new, shorter, &old_root, &new_root));
            }
        }
        assert!(consistency_ranges(0, n as u64).is_none());
        assert!(consistency_ranges(n as u64 + 1, n as u64).is_none());
    }
}

#[tokio::test]
async fn proofs_come_from_the_hashes_in_the_clear() {
    let vault = in_memory().await;
    let mut roots = Vec::new();
    for n in 0..70 {
        vault.record(vec![event(n, None, "login", Outcome::Success)]).await.unwrap();
        roots.push(vault.head().root);
    }
    let store = &**vault.store();
    let root = |n: u64| &roots[usize::try_from(n).unwrap() - 1];
    for (old, new) in [(1, 70), (33, 64), (64, 70), (69, 70), (70, 70)] {
        let proof = consistency(store, old, new).await.unwrap();
        assert!(verify_consistency(old, new, &proof, root(old), root(new)));
    }
    let mut walk = super::super::proof::LeafHashes::new(store, 0);
    let hashes = walk.step(100).await.unwrap();
    for index in [0, 1, 31, 63, 69] {
        let proof = inclusion(store, index, 70).await.unwrap();
        let leaf = &hashes[usize::try_from(index).unwrap()];
        assert!(verify_inclusion(leaf, index, 70, &proof, root(70)));
    }
    assert!(inclusion(store, 3, 71).await.is_err());
    assert!(inclusion(store, 71, 71).await.is_err());
}
