//! A bounded cache that can never be refilled with a row that has changed meanwhile.
//!
//! Whoever wants to fill it takes a [`Ticket`] *before* reading the store; a ticket taken before an
//! invalidation of the same shard inserts nothing. So a value read before a commit cannot come back
//! after that commit has invalidated it.

use std::hash::{BuildHasher, Hash, RandomState};
use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

const SHARDS: usize = 16;

/// Permission to insert what is read from now on, while nothing is invalidated.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    shard: usize,
    generation: u64,
}

struct Shard<K, V> {
    map: LruCache<K, V>,
    generation: u64,
}

/// A sharded least-recently-used map. `V` is cheap to clone (an `Arc`).
pub struct Cache<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    hasher: RandomState,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    /// A cache of about `capacity` entries, at least one a shard.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let each = NonZeroUsize::new(capacity.div_ceil(SHARDS)).unwrap_or(NonZeroUsize::MIN);
        let shard = || Mutex::new(Shard { map: LruCache::new(each), generation: 0 });
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), hasher: RandomState::new() }
    }

    fn index<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "only the low bits matter")]
        let hash = self.hasher.hash_one(key) as usize;
        hash % SHARDS
    }

    /// What is known of `key`.
    pub fn get(&self, key: &K) -> Option<V> {
        self.shards.get(self.index(key))?.lock().map.get(key).cloned()
    }

    /// To be taken before the value of `key` is read from the store.
    pub fn ticket(&self, key: &K) -> Ticket {
        let shard = self.index(key);
        let generation = self.shards.get(shard).map_or(0, |s| s.lock().generation);
        Ticket { shard, generation }
    }

    /// Remembers `value` unless anything of the shard was invalidated since the ticket was taken.
    /// Returns whether it did.
    pub fn insert(&self, ticket: Ticket, key: K, value: V) -> bool {
        let Some(shard) = self.shards.get(ticket.shard) else { return false };
        let mut shard = shard.lock();
        let fresh = shard.generation == ticket.generation;
        if fresh {
            shard.map.put(key, value);
        }
        fresh
    }

    /// Forgets `key`, and voids every ticket of its shard.
    pub fn invalidate(&self, key: &K) {
        if let Some(shard) = self.shards.get(self.index(key)) {
            let mut shard = shard.lock();
            shard.generation += 1;
            shard.map.pop(key);
        }
    }

    /// Forgets everything, and voids every ticket.
    pub fn clear(&self) {
        for shard in &self.shards {
            let mut shard = shard.lock();
            shard.generation += 1;
            shard.map.clear();
        }
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| s.lock().map.len()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K, V> std::fmt::Debug for Cache<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_read_before_an_invalidation_is_not_inserted_after_it() {
        let cache = Cache::new(64);
        let ticket = cache.ticket(&1);
        cache.invalidate(&1);
        assert!(!cache.insert(ticket, 1, "old"));
        assert_eq!(cache.get(&1), None);
        let ticket = cache.ticket(&1);
        assert!(cache.insert(ticket, 1, "new"));
        assert_eq!(cache.get(&1), Some("new"));
        cache.clear();
        assert!(!cache.insert(ticket, 1, "new"));
        assert!(cache.is_empty());
    }
}
