//! Reading records: opened under the epoch that they were sealed under, whatever moves meanwhile.

use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use polykey_hsm::{Ring, Sealer};
use polykey_storage::{
    Direction, Entry, Health, KeyRange, ReadError, Revision, RowKey, Snapshot, Space,
};

use super::space::Record;
use super::{ROOT_MOVED, Vault, seal};
use crate::error::Error;

/// A record as it was read.
#[derive(Clone, Debug)]
pub struct Loaded<R> {
    /// The record.
    pub record: R,
    /// The revision that last wrote its row.
    pub revision: Revision,
}

impl Vault {
    /// What was read. A failure that only reopening mends is brought before the writer.
    pub(super) fn read<T>(&self, result: Result<T, ReadError>) -> Result<T, Error> {
        result.map_err(|error| {
            let closed = matches!(self.store.status().health, Health::NeedsReopen(_));
            if closed && self.writable.load(Ordering::Acquire) {
                self.sequencer.nudge();
            }
            error.into()
        })
    }

    /// Reads one record.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read, [`Error::DataLoss`] if the row fails
    /// authentication.
    pub async fn get<R: Record>(&self, key: &[u8]) -> Result<Option<Loaded<R>>, Error> {
        let read = self.store.get(R::SPACE, key).await;
        let Some(mut entry) = self.read(read)? else { return Ok(None) };
        // After the row: an epoch is in force before anything is sealed under it.
        let mut sealer = self.ring.load().sealer();
        if !seal::known(&sealer, R::SPACE, &entry.value) {
            // Unless its epoch was retired in between, which the row as it is now has survived.
            let read = self.store.get(R::SPACE, key).await;
            let Some(again) = self.read(read)? else { return Ok(None) };
            entry = again;
            sealer = self.ring.load().sealer();
        }
        let record = self.opened::<R>(&sealer, key, &entry.value)?;
        Ok(Some(Loaded { record, revision: entry.revision }))
    }

    /// The record of a row. One that does not open is noted.
    pub(super) fn opened<R: Record>(
        &self,
        sealer: &Sealer,
        key: &[u8],
        value: &[u8],
    ) -> Result<R, Error> {
        if self.is_shared() && !seal::known(sealer, R::SPACE, value) {
            return Err(Error::unavailable(ROOT_MOVED));
        }
        seal::open::<R>(sealer, key, value)
            .map(|(record, _)| record)
            .inspect_err(|error| self.damage.note(RowKey::new(R::SPACE, key), error))
    }

    /// Refuses what another node has sealed under an epoch that is not in force here yet.
    pub(super) fn not_ahead(&self, space: Space, value: &[u8]) -> Result<(), Error> {
        let ahead = || {
            let epoch = seal::epoch_of(space, value);
            epoch.is_ok_and(|epoch| epoch > self.ring.load().primary_epoch())
        };
        if self.is_shared() && ahead() {
            return Err(Error::unavailable(ROOT_MOVED));
        }
        Ok(())
    }

    /// A snapshot, and a ring that holds every epoch in it.
    pub(crate) async fn steady(&self) -> Result<(Box<dyn Snapshot>, Arc<Ring>), Error> {
        loop {
            let before = self.ring.load_full();
            let snapshot = self.read(self.store.snapshot().await)?;
            // A row is sealed under an epoch of the ring in force, and an epoch is retired from it
            // when no row is left: while the ring stays, it fits.
            if Arc::ptr_eq(&before, &self.ring.load()) {
                return Ok((snapshot, before));
            }
        }
    }

    /// Reads a row that stands in the clear.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn get_clear(
        &self,
        space: Space,
        key: &[u8],
    ) -> Result<Option<(Vec<u8>, Revision)>, Error> {
        let entry = self.read(self.store.get(space, key).await)?;
        Ok(entry.map(|e| (e.value.to_vec(), e.revision)))
    }

    /// Reads at most `limit` records of a range, in order of their row keys.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub async fn scan<R: Record>(
        &self,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Loaded<R>)>, Error> {
        let rows = self.scan_each(range, direction, limit).await?;
        rows.into_iter().map(|(key, loaded)| Ok((key, loaded?))).collect()
    }

    /// As [`Self::scan`], with each record for itself, for walks that one damaged row must not stop: it
    /// stands in its place with its error, and is noted.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::DataLoss`] if the rows cannot be read.
    pub async fn scan_each<R: Record>(
        &self,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Result<Loaded<R>, Error>)>, Error> {
        let (snapshot, ring) = self.steady().await?;
        let sealer = ring.sealer();
        let entries = self.read(snapshot.scan(R::SPACE, range, direction, limit).await)?;
        drop(snapshot);
        let open = |entry: Entry| {
            let opened = self.opened::<R>(&sealer, &entry.key, &entry.value);
            (entry.key, opened.map(|record| Loaded { record, revision: entry.revision }))
        };
        Ok(entries.into_iter().map(open).collect())
    }

    /// Reads the records of several rows, whose keys ascend, from one snapshot and with the ring
    /// that goes with it ([`Self::steady`]), each for itself. Rows that lie close together are read
    /// in one go.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub(crate) async fn get_many<R: Record>(
        &self,
        (snapshot, ring): &(Box<dyn Snapshot>, Arc<Ring>),
        keys: &[Vec<u8>],
    ) -> Result<Vec<Result<Option<Loaded<R>>, Error>>, Error> {
        let (Some(first), Some(last)) = (keys.first(), keys.last()) else { return Ok(vec![]) };
        let sealer = ring.sealer();
        let limit = keys.len().saturating_mul(2);
        let range = (Bound::Included(first.clone()), Bound::Included(last.clone()));
        let scanned = snapshot.scan(R::SPACE, range, Direction::Forward, limit).await;
        let scanned = self.read(scanned)?;
        // Behind the last row of a scan that stopped early nothing is known.
        let until =
            if scanned.len() < limit { None } else { scanned.last().map(|e| e.key.clone()) };
        let mut scanned = scanned.into_iter().peekable();
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            while scanned.next_if(|entry| entry.key < *key).is_some() {}
            let entry = match scanned.next_if(|entry| entry.key == *key) {
                Some(entry) => Some(entry),
                None if until.as_ref().is_some_and(|until| key > until) => {
                    self.read(snapshot.get(R::SPACE, key).await)?
                }
                None => None,
            };
            let open = |entry: Entry| {
                let record = self.opened::<R>(&sealer, key, &entry.value)?;
                Ok::<_, Error>(Loaded { record, revision: entry.revision })
            };
            found.push(entry.map(open).transpose());
        }
        Ok(found)
    }

    /// How many rows a range has, at most `limit`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn count(&self, space: Space, range: KeyRange, limit: usize) -> Result<usize, Error> {
        let snapshot = self.read(self.store.snapshot().await)?;
        self.read(snapshot.count(space, range, limit).await)
    }

    /// Reads at most `limit` row keys of a range, in order, opening nothing.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn scan_keys(
        &self,
        space: Space,
        range: KeyRange,
        limit: usize,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let entries = self.read(self.store.scan(space, range, Direction::Forward, limit).await)?;
        Ok(entries.into_iter().map(|entry| entry.key).collect())
    }
}
