//! The one place where something secret is compared.

use subtle::{Choice, ConstantTimeEq};

/// Whether two values are the same, in time that depends on their lengths alone.
pub(super) fn same(one: &[u8], other: &[u8]) -> bool {
    decide(one.ct_eq(other))
}

/// The outcome, and nothing else, may show in which way the caller goes. A function of its own, because
/// `tests/constant_time.rs` admits a branch on a secret here and nowhere else.
#[inline(never)]
#[expect(clippy::needless_bool, reason = "the branch is taken here, and not by whoever is told")]
fn decide(choice: Choice) -> bool {
    if choice.into() { true } else { false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_and_the_length_count() {
        assert!(same(b"", b""));
        assert!(same(&[7; 32], &[7; 32]));
        assert!(!same(&[7; 32], &[7; 31]));
        for bit in 0..256 {
            let mut other = [7; 32];
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(!same(&[7; 32], &other));
        }
    }
}
