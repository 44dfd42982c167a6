//! Who must know of a change before it is acknowledged.

use polykey_hsm::BoxFuture;
use polykey_storage::{Require, Revision, RowKey};

use super::space::{
    CLIENTS, IDENTITIES, KEYS, REVOKED_TOKENS, ROLES, SIGNING_KEYS, TOKEN_FAMILIES, VERSIONS,
};
use crate::error::Error;

/// Something outside this process that is to know of changes: other nodes, an anchor.
pub trait Witness: Send + Sync + 'static {
    /// Returns when the change of `revision`, which is durable, may be acknowledged. `urgent` are
    /// those that change a right which somebody may hold: what they revoke is not to be honoured
    /// anywhere from the acknowledgement on.
    ///
    /// # Errors
    /// The caller hears of an unknown outcome: the change is durable, and not known everywhere.
    fn witness(&self, revision: Revision, urgent: bool) -> BoxFuture<'_, Result<(), Error>>;
}

/// Whether a change of this row, which was required to be so, changes a right that somebody may hold.
/// A row that nobody can have met grants and denies nothing anywhere.
pub(super) fn urgent(row: &RowKey, require: Option<Require>) -> bool {
    match row.space {
        // Whoever was not a client, had no role or no key to sign with may be remembered as such.
        CLIENTS | IDENTITIES | ROLES | REVOKED_TOKENS | SIGNING_KEYS => true,
        KEYS | VERSIONS | TOKEN_FAMILIES => require != Some(Require::Absent),
        // That of slots has them witnessed when its lock is free again.
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::space::{AUDIT, IDEMPOTENCY, JOBS, LIST, META, USAGE, meta};

    #[test]
    fn what_takes_a_right_away_is_urgent_and_what_makes_a_key_is_not() {
        let row = |space, key: &[u8]| RowKey::new(space, key);
        let at = Some(Require::At(Revision(1)));
        for space in [KEYS, VERSIONS, TOKEN_FAMILIES] {
            assert!(!urgent(&row(space, b"k"), Some(Require::Absent)), "{space:?}");
            assert!(urgent(&row(space, b"k"), at), "{space:?}");
            assert!(urgent(&row(space, b"k"), None), "{space:?}");
        }
        for space in [CLIENTS, ROLES, REVOKED_TOKENS, SIGNING_KEYS] {
            assert!(urgent(&row(space, b"k"), Some(Require::Absent)), "{space:?}");
        }
        for key in [meta::SLOTS, meta::HEAD, meta::USAGE_MARK, meta::CANARY, meta::CLOCK] {
            assert!(!urgent(&row(META, key), at));
        }
        for space in [AUDIT, USAGE, LIST, JOBS, IDEMPOTENCY] {
            assert!(!urgent(&row(space, b"k"), at), "{space:?}");
        }
    }
}
