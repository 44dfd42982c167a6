//! Remembered verdicts: a bounded, sharded LRU. Only what the revisions in its key cover comes in.

use std::hash::{BuildHasher as _, RandomState};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use lru::LruCache;
use parking_lot::Mutex;
use uuid::Uuid;

use super::Verdict;
use super::action::{Action, PermissionSet};
use crate::cache::Counts;

/// What a remembered verdict holds for. The generation of the policies is not in it because a
/// memo lives inside its [`Authorizer`](super::Authorizer): new policies start with an empty one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct MemoKey {
    pub(super) client: Arc<str>,
    pub(super) client_revision: u64,
    /// Roles are defined apart from clients: with the permissions in the key, a changed role needs no revision.
    pub(super) permissions: PermissionSet,
    pub(super) action: Action,
    pub(super) about: About,
}

/// What a remembered verdict is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum About {
    Node,
    /// A key and its revision.
    Key(Uuid, u64),
    /// A key that is about to be created: a digest of all that is known of it but its id, which no
    /// policy can know.
    New([u8; 32]),
}

const SHARDS: usize = 16;

/// See the module.
pub(super) struct Memo {
    shards: Vec<Mutex<LruCache<MemoKey, Arc<Verdict>>>>,
    hasher: RandomState,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl Memo {
    /// Holds about `capacity` verdicts; 0 remembers nothing.
    pub(super) fn new(capacity: usize) -> Self {
        let shards = NonZeroUsize::new(capacity.div_ceil(SHARDS)).map_or_else(Vec::new, |each| {
            (0..SHARDS).map(|_| Mutex::new(LruCache::new(each))).collect()
        });
        let zero = AtomicU64::default;
        Self { shards, hasher: RandomState::new(), hits: zero(), misses: zero() }
    }

    pub(super) fn get(&self, key: &MemoKey) -> Option<Arc<Verdict>> {
        let found = self.shard(key)?.lock().get(key).map(Arc::clone);
        let counter = if found.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Relaxed);
        found
    }

    pub(super) fn counts(&self) -> Counts {
        let (hits, misses) = (self.hits.load(Relaxed), self.misses.load(Relaxed));
        Counts { hits, misses, entries: self.len() }
    }

    pub(super) fn put(&self, key: MemoKey, verdict: Arc<Verdict>) {
        if let Some(shard) = self.shard(&key) {
            shard.lock().put(key, verdict);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    fn shard(&self, key: &MemoKey) -> Option<&Mutex<LruCache<MemoKey, Arc<Verdict>>>> {
        let at = self.hasher.hash_one(key) % SHARDS as u64;
        self.shards.get(usize::try_from(at).ok()?)
    }
}
