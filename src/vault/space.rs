//! Where each kind of record stands in the store.
//!
//! Row keys show nothing but UUIDs, counters and MACs: names, tags and client ids never stand in one.

use polykey_proto::polykey::record::v1 as record;
use polykey_storage::{RowKey, Space};

/// A kind of record: which space it stands in and the number that its seal is bound to.
pub trait Record: prost::Message + Default + 'static {
    /// The space.
    const SPACE: Space;
    /// Bound into the seal, so that no record of one kind passes for another. Never reused.
    const KIND: u8;
    /// For messages.
    const NAME: &'static str;
}

macro_rules! records {
    ($($(#[$doc:meta])* $konst:ident = $space:literal { $($record:ident = $kind:literal),* $(,)? })*) => {
        $($(#[$doc])* pub const $konst: Space = Space($space);)*
        $($(impl Record for record::$record {
            const SPACE: Space = $konst;
            const KIND: u8 = $kind;
            const NAME: &'static str = stringify!($record);
        })*)*
        /// Every space that is in use.
        pub const ALL: &[Space] = &[$($konst),*];
        fn kinds(space: Space) -> &'static [u8] {
            match space.0 {
                $($space => &[$($kind),*],)*
                _ => &[],
            }
        }
    };
}

records! {
    /// Single rows of the node: see the constants of [`meta`].
    META = 0 { CanaryRecord = 1, HeadRecord = 2, UsageMark = 3, ResealRecord = 4, ClockRecord = 5, LaneRecord = 6, NoticesRecord = 7 }
    /// Keys: `key id`.
    KEYS = 1 { KeyRecord = 10 }
    /// Versions: `key id ‖ version (u32 BE)`.
    VERSIONS = 2 { VersionRecord = 11 }
    /// Who sees which key: `MAC(principal) ‖ key id`.
    LIST = 3 { ListRow = 12 }
    /// Aliases: `MAC(name)`.
    ALIASES = 4 { AliasRecord = 13 }
    /// Clients: `MAC(client id)`.
    CLIENTS = 5 { ClientRecord = 20 }
    /// Certificate identities: `MAC(kind, value)`.
    IDENTITIES = 6 { IdentityRecord = 21 }
    /// Roles: `MAC(name)`.
    ROLES = 7 { RoleRecord = 22 }
    /// Refresh-token families: `family id`.
    TOKEN_FAMILIES = 8 { TokenFamilyRecord = 23 }
    /// Access tokens revoked before their end: `token id`.
    REVOKED_TOKENS = 9 { RevokedTokenRecord = 24 }
    /// Keys that sign tokens and checkpoints: `key id`.
    SIGNING_KEYS = 10 { SigningKeyRecord = 25 }
    /// The audit log: `index (u64 BE)`; value = leaf hash (32 bytes) ‖ sealed leaf.
    AUDIT = 11 { AuditLeaf = 30 }
    /// Signed checkpoints, in the clear: `size (u64 BE)`.
    CHECKPOINTS = 12 {}
    /// The durable schedule: `due (u64 BE, µs) ‖ kind ‖ key id ‖ version (u32 BE)`.
    JOBS = 13 { JobRecord = 31 }
    /// Idempotency: `day (u32 BE) ‖ MAC(client, key, item)`.
    IDEMPOTENCY = 14 { IdempotencyRecord = 32 }
    /// Use of keys: `key id`. Last logins: `MAC(client id)`, `MAC(client id, API key prefix)`.
    USAGE = 15 { UsageRecord = 33 }
    /// One-time keys for imports: `expires at (u64 BE, µs) ‖ 16 random bytes`.
    IMPORTS = 16 { ImportRecord = 34 }
    /// How often versions with a limit have sealed: `key id ‖ version (u32 BE)`.
    COUNTS = 17 { UseCountRecord = 35 }
    /// Archives of the audit log: `first leaf (u64 BE)`.
    AUDIT_ARCHIVES = 18 { AuditArchiveRecord = 36 }
    /// How far webhooks have come: `MAC(name)`.
    WEBHOOKS = 19 { WebhookRecord = 37 }
}

/// The rows of [`META`].
pub mod meta {
    /// [`super::record::NodeRecord`], in the clear.
    pub const NODE: &[u8] = b"node";
    /// [`super::record::SlotTable`], in the clear.
    pub const SLOTS: &[u8] = b"slots";
    /// [`super::record::CanaryRecord`].
    pub const CANARY: &[u8] = b"canary";
    /// [`super::record::HeadRecord`].
    pub const HEAD: &[u8] = b"head";
    /// [`super::record::UsageMark`].
    pub const USAGE_MARK: &[u8] = b"usage-mark";
    /// [`super::record::ResealRecord`].
    pub const RESEAL: &[u8] = b"reseal";
    /// [`super::record::ClockRecord`].
    pub const CLOCK: &[u8] = b"clock";
    /// [`super::record::LaneRecord`].
    pub const LANES: &[u8] = b"lanes";
    /// [`super::record::NoticesRecord`].
    pub const NOTICES: &[u8] = b"notices";
}

/// Whether a row is sealed and counted in the set hash. The others stand in the clear and carry
/// their own authentication (slots: a MAC; checkpoints: a signature), or belong to replication and are each
/// store's own. The head cannot count itself.
#[must_use]
pub fn counted(row: &RowKey) -> bool {
    if row.space == META {
        return row.key != meta::NODE && row.key != meta::SLOTS && row.key != meta::HEAD;
    }
    row.space != CHECKPOINTS && row.space != polykey_storage::replica::SPACE
}

/// The kind of the record that stands in a sealed row; `None` where none belongs.
#[must_use]
pub fn kind(row: &RowKey) -> Option<u8> {
    if row.space == META {
        return match row.key.as_slice() {
            meta::CANARY => Some(record::CanaryRecord::KIND),
            meta::HEAD => Some(record::HeadRecord::KIND),
            meta::USAGE_MARK => Some(record::UsageMark::KIND),
            meta::RESEAL => Some(record::ResealRecord::KIND),
            meta::CLOCK => Some(record::ClockRecord::KIND),
            meta::LANES => Some(record::LaneRecord::KIND),
            meta::NOTICES => Some(record::NoticesRecord::KIND),
            _ => None,
        };
    }
    match kinds(row.space) {
        [kind] => Some(*kind),
        _ => None,
    }
}

/// The clear prefix of a row's value in front of its seal, in bytes.
#[must_use]
pub fn clear_prefix(space: Space) -> usize {
    if space == AUDIT { 32 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_are_distinct() {
        let mut numbers: Vec<u8> = ALL.iter().map(|s| s.0).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), ALL.len());
        assert_eq!(numbers, ALL.iter().map(|s| s.0).collect::<Vec<_>>(), "walked in order");
    }

    #[test]
    fn every_sealed_space_but_meta_has_one_kind() {
        for &space in ALL {
            let kind = kind(&RowKey::new(space, *b"x"));
            assert_eq!(kind.is_some(), space != META && space != CHECKPOINTS, "{space:?}");
        }
        assert_eq!(kind(&RowKey::new(META, meta::RESEAL)), Some(4));
    }
}
