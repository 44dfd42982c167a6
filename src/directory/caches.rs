//! What is remembered of the rows that identity and authority hang on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use polykey_storage::RowKey;

use super::{Client, Family, Role};
use crate::authn::token::KeySet;
use crate::cache::{Cache, Counts};
use crate::vault::Invalidate;
use crate::vault::space::{
    CLIENTS, IDENTITIES, REVOKED_TOKENS, ROLES, SIGNING_KEYS, TOKEN_FAMILIES,
};
use crate::vault::tree::Hash;

/// Made before the vault, and given to it. A remembered "there is none" counts as much as a row.
pub struct SecurityCaches {
    epoch: AtomicU64,
    pub(super) clients: Cache<Hash, Option<Arc<Client>>>,
    pub(super) roles: Cache<Hash, Option<Arc<Role>>>,
    pub(super) families: Cache<[u8; 16], Option<Family>>,
    pub(super) revoked: Cache<[u8; 16], bool>,
    pub(super) keys: Cache<(), Arc<KeySet>>,
}

impl SecurityCaches {
    /// For about `entries` clients and as many live tokens.
    #[must_use]
    pub fn new(entries: usize) -> Self {
        Self {
            epoch: AtomicU64::new(1),
            clients: Cache::new(entries),
            roles: Cache::new(1024),
            families: Cache::new(entries),
            revoked: Cache::new(entries),
            keys: Cache::new(1),
        }
    }

    /// How well each does, by name.
    #[must_use]
    pub fn counts(&self) -> [(&'static str, Counts); 4] {
        [
            ("clients", self.clients.counts()),
            ("roles", self.roles.counts()),
            ("token_families", self.families.counts()),
            ("revoked_tokens", self.revoked.counts()),
        ]
    }

    /// See [`super::Directory::epoch`].
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }
}

impl Invalidate for SecurityCaches {
    fn invalidate(&self, rows: &[&RowKey]) {
        let mut ours = false;
        for row in rows {
            match row.space {
                CLIENTS => forget(&self.clients, &row.key),
                ROLES => forget(&self.roles, &row.key),
                TOKEN_FAMILIES => forget(&self.families, &row.key),
                REVOKED_TOKENS => forget(&self.revoked, &row.key),
                SIGNING_KEYS => self.keys.clear(),
                IDENTITIES => {}
                _ => continue,
            }
            ours = true;
        }
        // After the rows are forgotten: whoever reads the new epoch reads the new rows.
        if ours {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn clear(&self) {
        self.clients.clear();
        self.roles.clear();
        self.families.clear();
        self.revoked.clear();
        self.keys.clear();
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }
}

fn forget<const N: usize, V: Clone>(cache: &Cache<[u8; N], V>, key: &[u8]) {
    match key.try_into() {
        Ok(key) => cache.invalidate(&key),
        // No row of ours has such a key; if one had, nothing remembered could be trusted.
        Err(_) => cache.clear(),
    }
}

impl std::fmt::Debug for SecurityCaches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecurityCaches")
            .field("epoch", &self.epoch())
            .field("clients", &self.clients.len())
            .field("families", &self.families.len())
            .finish_non_exhaustive()
    }
}
