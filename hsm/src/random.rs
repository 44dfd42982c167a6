//! Random bytes, all from the generator of aws-lc.

use std::cell::RefCell;

use zeroize::{Zeroize, Zeroizing};

use crate::CryptoFailure;

/// Fills `out` with secret-grade random bytes.
///
/// # Errors
/// When the generator fails; nothing may be made with `out` then.
pub fn fill(out: &mut [u8]) -> Result<(), CryptoFailure> {
    aws_lc_rs::rand::fill(out).map_err(|_| CryptoFailure("the random generator failed"))
}

/// `N` random bytes for a public value (an id, a salt).
///
/// # Errors
/// When the generator fails.
pub fn array<const N: usize>() -> Result<[u8; N], CryptoFailure> {
    let mut out = [0; N];
    fill(&mut out)?;
    Ok(out)
}

/// `N` random bytes for a secret.
///
/// # Errors
/// When the generator fails.
pub fn secret<const N: usize>() -> Result<Zeroizing<[u8; N]>, CryptoFailure> {
    let mut out = Zeroizing::new([0; N]);
    fill(out.as_mut_slice())?;
    Ok(out)
}

/// Makes the first draw, which costs some 40 ms of entropy gathering; call it early, off the path
/// of requests.
///
/// # Errors
/// When the generator fails.
pub fn warm_up() -> Result<(), CryptoFailure> {
    array::<1>().map(drop)
}

const BLOCK: usize = 1024;

/// Unused random bytes of this thread. The process that filled the block is part of it: a forked child
/// must not repeat its parent's.
struct Block {
    bytes: [u8; BLOCK],
    used: usize,
    pid: u32,
}

thread_local! {
    static BLOCKS: RefCell<Block> =
        const { RefCell::new(Block { bytes: [0; BLOCK], used: BLOCK, pid: 0 }) };
}

/// A random nonce: 12 bytes of [`public`].
pub(crate) fn nonce() -> Result<[u8; 12], CryptoFailure> {
    public()
}

/// A random salt: 32 bytes of [`public`].
pub(crate) fn salt() -> Result<[u8; 32], CryptoFailure> {
    public()
}

/// `N` random bytes, at most 32, drawn in blocks per thread: a draw of its own costs more than a seal.
///
/// Only for values that become public (nonces, salts); keys are drawn with [`fill`].
///
/// # Errors
/// When the generator fails.
pub fn public<const N: usize>() -> Result<[u8; N], CryptoFailure> {
    draw(Some(std::process::id()))
}

/// As [`public`], for ids alone, and without the system call that tells a forked child from its parent: the
/// child's first ids may be those that its parent gives.
///
/// # Errors
/// When the generator fails.
pub fn id<const N: usize>() -> Result<[u8; N], CryptoFailure> {
    draw(None)
}

fn draw<const N: usize>(pid: Option<u32>) -> Result<[u8; N], CryptoFailure> {
    const { assert!(N <= 32) };
    BLOCKS.with_borrow_mut(|block| {
        if block.used + N > BLOCK || pid.is_some_and(|pid| pid != block.pid) {
            block.used = BLOCK;
            fill(&mut block.bytes)?;
            block.used = 0;
            block.pid = pid.unwrap_or_else(std::process::id);
        }
        let mut out = [0; N];
        if let Some(fresh) = block.bytes.get_mut(block.used..block.used + N) {
            out.copy_from_slice(fresh);
            fresh.zeroize();
        }
        block.used += N;
        Ok(out)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn nonces_are_fresh_across_blocks_and_threads() {
        let draw = || (0..500).map(|_| nonce().unwrap()).collect::<Vec<_>>();
        let other = std::thread::spawn(draw);
        let mut seen: HashSet<_> = draw().into_iter().collect();
        seen.extend(other.join().unwrap());
        assert_eq!(seen.len(), 1000);
        assert!(!seen.contains(&[0; 12]));
    }

    #[test]
    fn draws_of_any_length_share_a_block_without_overlap() {
        let mut seen = HashSet::new();
        for _ in 0..2_000 {
            let (a, b) = (public::<32>().unwrap(), public::<10>().unwrap());
            assert!(seen.insert(a[..10].to_vec()) && seen.insert(a[22..].to_vec()));
            assert!(seen.insert(b.to_vec()));
        }
    }

    #[test]
    fn fills_what_it_is_given() {
        warm_up().unwrap();
        assert_ne!(array::<32>().unwrap(), array::<32>().unwrap());
        assert_ne!(*secret::<32>().unwrap(), [0; 32]);
        fill(&mut []).unwrap();
    }
}
