//! Places of which no holder gets more than a share, so that there are some left for the others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many places each holder has.
type Held<K> = Arc<Mutex<HashMap<K, usize>>>;

/// A number of places, and how many of them one holder may have.
#[derive(Debug)]
pub(crate) struct Places<K> {
    free: Arc<Semaphore>,
    count: usize,
    share: usize,
    held: Held<K>,
}

impl<K> Clone for Places<K> {
    fn clone(&self) -> Self {
        let (free, held) = (Arc::clone(&self.free), Arc::clone(&self.held));
        Self { free, count: self.count, share: self.share, held }
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place<K: Eq + Hash> {
    _free: OwnedSemaphorePermit,
    holder: Option<(K, Held<K>)>,
}

impl<K: Eq + Hash + Clone> Places<K> {
    /// `count` places, half of them at most for one holder.
    pub(crate) fn new(count: usize) -> Self {
        let free = Arc::new(Semaphore::new(count));
        Self { free, count, share: count.div_ceil(2), held: Arc::default() }
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.count.saturating_sub(self.free.available_permits())
    }

    /// A place for `holder`; `None` stands for the node itself, which has no share. No place if all are
    /// taken or the holder has its share.
    pub(crate) fn take(&self, holder: Option<&K>) -> Option<Place<K>> {
        let free = Arc::clone(&self.free).try_acquire_owned().ok()?;
        let Some(holder) = holder else { return Some(Place { _free: free, holder: None }) };
        {
            let mut held = self.held.lock();
            let count = held.entry(holder.clone()).or_default();
            if *count >= self.share {
                return None;
            }
            *count += 1;
        }
        Some(Place { _free: free, holder: Some((holder.clone(), Arc::clone(&self.held))) })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let Some((holder, held)) = self.holder.take() else { return };
        let mut held = held.lock();
        if let Some(count) = held.get_mut(&holder) {
            *count -= 1;
            if *count == 0 {
                held.remove(&holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_leaves_places_for_the_others() {
        let places = Places::new(5);
        let mut mine: Vec<_> = (0..9).filter_map(|_| places.take(Some(&"a"))).collect();
        assert_eq!((mine.len(), places.taken()), (3, 3));
        let other: Vec<_> = (0..9).filter_map(|_| places.take(Some(&"b"))).collect();
        assert_eq!(other.len(), 2, "no more than there are");
        assert!(places.take(None).is_none());
        mine.pop();
        assert!(places.take(None).is_some());
        assert!(places.take(Some(&"a")).is_some());
        drop((mine, other));
        assert!(places.held.lock().is_empty(), "nobody is remembered");
    }
}
