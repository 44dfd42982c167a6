//! A bounded cache that can never be refilled with a row that has changed meanwhile.
//!
//! Whoever wants to fill it takes a [`Ticket`] *before* reading the store; a ticket taken before an
//! invalidation of the same shard inserts nothing. So a value read before a commit cannot come back
//! after that commit has invalidated it.

use std::hash::{BuildHasher, Hash, RandomState};
use std::num::NonZeroUsize;

use lru::LruCache;

const SHARDS: usize = 16;

/// Permission to insert what is read from now on, while nothing is invalidated.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    shard: usize,
    generation: u64,
}

/// One shard, behind its lock.
pub struct Shard<K, V> {
    map: LruCache<K, V>,
    generation: u64,
    hits: u64,
    misses: u64,
}

/// How well a cache does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Questions that were answered from it.
    pub hits: u64,
    /// Questions that were not.
    pub misses: u64,
    /// What it holds.
    pub entries: usize,
}

/// What guards a shard. There is one choice in the server; the test of the ticket rule puts a lock
/// here whose schedule it decides (`tests/race.rs`).
pub trait Locks {
    /// A lock around `T`.
    type Lock<T>;
    /// Puts `value` behind a lock.
    fn new<T>(value: T) -> Self::Lock<T>;
    /// Runs `f` while holding the lock.
    fn with<T, R>(lock: &Self::Lock<T>, f: impl FnOnce(&mut T) -> R) -> R;
}

/// The locks of the server.
#[derive(Clone, Copy, Debug)]
pub struct ParkingLot;

impl Locks for ParkingLot {
    type Lock<T> = parking_lot::Mutex<T>;

    fn new<T>(value: T) -> Self::Lock<T> {
        parking_lot::Mutex::new(value)
    }

    fn with<T, R>(lock: &Self::Lock<T>, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut lock.lock())
    }
}

/// A sharded least-recently-used map. `V` is cheap to clone (an `Arc`).
pub struct Cache<K, V, L: Locks = ParkingLot> {
    shards: Vec<L::Lock<Shard<K, V>>>,
    hasher: RandomState,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    /// A cache of about `capacity` entries, at least one a shard.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self::with_locks(capacity)
    }
}

impl<K: Hash + Eq + Clone, V: Clone, L: Locks> Cache<K, V, L> {
    /// As [`Cache::new`], with other locks.
    #[must_use]
    pub fn with_locks(capacity: usize) -> Self {
        let each = NonZeroUsize::new(capacity.div_ceil(SHARDS)).unwrap_or(NonZeroUsize::MIN);
        let shard =
            || L::new(Shard { map: LruCache::new(each), generation: 0, hits: 0, misses: 0 });
        Self { shards: (0..SHARDS).map(|_| shard()).collect(), hasher: RandomState::new() }
    }

    fn index<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "only the low bits matter")]
        let hash = self.hasher.hash_one(key) as usize;
        hash % SHARDS
    }

    /// What is known of `key`.
    pub fn get(&self, key: &K) -> Option<V> {
        L::with(self.shards.get(self.index(key))?, |shard| {
            let found = shard.map.get(key).cloned();
            // Under the lock that is held anyway.
            if found.is_some() {
                shard.hits += 1;
            } else {
                shard.misses += 1;
            }
            found
        })
    }

    /// To be taken before the value of `key` is read from the store.
    pub fn ticket(&self, key: &K) -> Ticket {
        let shard = self.index(key);
        let generation = self.shards.get(shard).map_or(0, |s| L::with(s, |s| s.generation));
        Ticket { shard, generation }
    }

    /// Remembers `value` unless anything of the shard was invalidated since the ticket was taken.
    /// Returns whether it did.
    pub fn insert(&self, ticket: Ticket, key: K, value: V) -> bool {
        let Some(shard) = self.shards.get(ticket.shard) else { return false };
        L::with(shard, |shard| {
            let fresh = shard.generation == ticket.generation;
            if fresh {
                shard.map.put(key, value);
            }
            fresh
        })
    }

    /// What is known of `key`, and what `make` gives where nothing is: for values that begin empty
    /// and so cannot be of yesterday.
    pub fn get_or_insert(&self, key: &K, make: impl FnOnce() -> V) -> V {
        match self.shards.get(self.index(key)) {
            Some(shard) => L::with(shard, |shard| shard.map.get_or_insert_ref(key, make).clone()),
            None => make(),
        }
    }

    /// Keeps only what `keep` wants kept.
    pub fn retain(&self, mut keep: impl FnMut(&V) -> bool) {
        for shard in &self.shards {
            L::with(shard, |shard| shard.map.retain(|_, value| keep(value)));
        }
    }

    /// Shows each value, in no order.
    pub fn each(&self, mut look: impl FnMut(&V)) {
        for shard in &self.shards {
            L::with(shard, |shard| shard.map.iter().for_each(|(_, value)| look(value)));
        }
    }

    /// Forgets `key`, and voids every ticket of its shard.
    pub fn invalidate(&self, key: &K) {
        if let Some(shard) = self.shards.get(self.index(key)) {
            L::with(shard, |shard| {
                shard.generation += 1;
                shard.map.pop(key);
            });
        }
    }

    /// Forgets everything, and voids every ticket.
    pub fn clear(&self) {
        for shard in &self.shards {
            L::with(shard, |shard| {
                shard.generation += 1;
                shard.map.clear();
            });
        }
    }

    /// How well it has done since it was made.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let each = self.shards.iter().map(|shard| {
            L::with(shard, |shard| Counts {
                hits: shard.hits,
                misses: shard.misses,
                entries: shard.map.len(),
            })
        });
        each.fold(Counts::default(), |sum, one| Counts {
            hits: sum.hits + one.hits,
            misses: sum.misses + one.misses,
            entries: sum.entries + one.entries,
        })
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| L::with(s, |s| s.map.len())).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K, V> std::fmt::Debug for Shard<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl<K, V, L: Locks> std::fmt::Debug for Cache<K, V, L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hits_and_misses_are_counted() {
        let cache = Cache::new(64);
        assert_eq!(cache.get(&1), None);
        cache.insert(cache.ticket(&1), 1, "a");
        assert_eq!((cache.get(&1), cache.get(&1), cache.get(&2)), (Some("a"), Some("a"), None));
        assert_eq!(cache.counts(), Counts { hits: 2, misses: 2, entries: 1 });
    }

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
