//! Keyed names, checksums and lookups: HMAC-SHA-256 with an independent key for each purpose.

use aws_lc_rs::hmac;
use subtle::ConstantTimeEq;

use crate::cipher::{self, Key};
use crate::{CryptoFailure, Ring};

/// What a MAC is for; each purpose has a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MacPurpose {
    /// Names, tags and client ids in row keys.
    RowName,
    /// A grantee in list rows.
    Principal,
    /// A stored API key.
    ApiKey,
    /// A page token.
    PageToken,
    /// A key's metadata checksum.
    MetadataChecksum,
    /// A remembered request.
    Idempotency,
    /// An element of the set hash over rows.
    SetHash,
    /// Salts of audit leaves.
    AuditSalt,
    /// The stand-in for a client that does not exist, so that refusing it costs the same.
    LoginDummy,
    /// What a node is known to have served, kept outside its store.
    Anchor,
    /// What stands in the audit log for a value that may not.
    AuditValue,
}

impl MacPurpose {
    /// In the order of their declaration.
    pub(crate) const ALL: [Self; 11] = [
        Self::RowName,
        Self::Principal,
        Self::ApiKey,
        Self::PageToken,
        Self::MetadataChecksum,
        Self::Idempotency,
        Self::SetHash,
        Self::AuditSalt,
        Self::LoginDummy,
        Self::Anchor,
        Self::AuditValue,
    ];

    /// Stored MACs depend on these: they never change.
    const fn label(self) -> &'static str {
        match self {
            Self::RowName => "polykey/mac/row-name/v1",
            Self::Principal => "polykey/mac/principal/v1",
            Self::ApiKey => "polykey/mac/api-key/v1",
            Self::PageToken => "polykey/mac/page-token/v1",
            Self::MetadataChecksum => "polykey/mac/metadata-checksum/v1",
            Self::Idempotency => "polykey/mac/idempotency/v1",
            Self::SetHash => "polykey/mac/set-hash/v1",
            Self::AuditSalt => "polykey/mac/audit-salt/v1",
            Self::LoginDummy => "polykey/mac/login-dummy/v1",
            Self::Anchor => "polykey/mac/anchor/v1",
            Self::AuditValue => "polykey/mac/audit-value/v1",
        }
    }

    /// Row keys are found again through the index key; all else hangs on the MAC key.
    const fn is_index(self) -> bool {
        matches!(self, Self::RowName | Self::Principal)
    }
}

/// One expanded HMAC key per purpose.
pub(crate) struct MacKeys([hmac::Key; 11]);

impl MacKeys {
    pub(crate) fn derive(
        node_id: &[u8; 16],
        index_key: &Key,
        mac_key: &Key,
    ) -> Result<Self, CryptoFailure> {
        let mut failure = None;
        let keys = MacPurpose::ALL.map(|purpose| {
            let from = if purpose.is_index() { index_key } else { mac_key };
            let key = cipher::subkey(from, purpose.label(), &[node_id]).unwrap_or_else(|e| {
                failure = Some(e);
                Key::default()
            });
            hmac::Key::new(hmac::HMAC_SHA256, key.as_slice())
        });
        failure.map_or(Ok(Self(keys)), Err)
    }

    fn key(&self, purpose: MacPurpose) -> &hmac::Key {
        let Self(
            [row, principal, api, page, metadata, idempotency, set, audit, login, anchor, value],
        ) = self;
        match purpose {
            MacPurpose::RowName => row,
            MacPurpose::Principal => principal,
            MacPurpose::ApiKey => api,
            MacPurpose::PageToken => page,
            MacPurpose::MetadataChecksum => metadata,
            MacPurpose::Idempotency => idempotency,
            MacPurpose::SetHash => set,
            MacPurpose::AuditSalt => audit,
            MacPurpose::LoginDummy => login,
            MacPurpose::Anchor => anchor,
            MacPurpose::AuditValue => value,
        }
    }

    pub(crate) fn mac(&self, purpose: MacPurpose, parts: &[&[u8]]) -> [u8; 32] {
        let mut cx = hmac::Context::with_key(self.key(purpose));
        for part in parts {
            cx.update(&(part.len() as u64).to_be_bytes());
            cx.update(part);
        }
        let mut out = [0; 32];
        out.copy_from_slice(cx.sign().as_ref());
        out
    }
}

impl Ring {
    /// HMAC-SHA-256 over the parts, each preceded by its length, under the key of `purpose`. The
    /// same for as long as the node exists: rotation does not change it.
    #[must_use]
    pub fn mac(&self, purpose: MacPurpose, parts: &[&[u8]]) -> [u8; 32] {
        self.macs().mac(purpose, parts)
    }

    /// Whether `mac` is [`Self::mac`] of the parts, in constant time. A truncated one is not.
    #[must_use]
    pub fn verify_mac(&self, purpose: MacPurpose, parts: &[&[u8]], mac: &[u8]) -> bool {
        self.mac(purpose, parts).ct_eq(mac).into()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn purposes_parts_and_nodes_are_independent() {
        let ring = Ring::generate([1; 16]).unwrap();
        let other = Ring::generate([1; 16]).unwrap();
        let mut seen = HashSet::new();
        for purpose in MacPurpose::ALL {
            assert!(seen.insert(ring.mac(purpose, &[b"a", b"b"])));
            assert!(seen.insert(ring.mac(purpose, &[b"ab"])));
            assert!(seen.insert(ring.mac(purpose, &[b"", b"ab"])));
            assert!(seen.insert(ring.mac(purpose, &[])));
            assert!(seen.insert(ring.mac(purpose, &[b""])));
            assert!(seen.insert(other.mac(purpose, &[b"a", b"b"])));
            assert_eq!(ring.mac(purpose, &[b"ab"]), ring.clone().mac(purpose, &[b"ab"]));
        }
    }

    #[test]
    fn labels_are_distinct() {
        let labels: HashSet<_> = MacPurpose::ALL.iter().map(|p| p.label()).collect();
        assert_eq!(labels.len(), MacPurpose::ALL.len());
    }

    #[test]
    fn verification_takes_the_whole_mac() {
        let ring = Ring::generate([1; 16]).unwrap();
        let mac = ring.mac(MacPurpose::ApiKey, &[b"k"]);
        assert!(ring.verify_mac(MacPurpose::ApiKey, &[b"k"], &mac));
        assert!(!ring.verify_mac(MacPurpose::ApiKey, &[b"j"], &mac));
        assert!(!ring.verify_mac(MacPurpose::RowName, &[b"k"], &mac));
        assert!(!ring.verify_mac(MacPurpose::ApiKey, &[b"k"], &mac[..31]));
        assert!(!ring.verify_mac(MacPurpose::ApiKey, &[b"k"], &[]));
        for bit in 0..256 {
            let mut changed = mac;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!ring.verify_mac(MacPurpose::ApiKey, &[b"k"], &changed));
        }
    }
}
