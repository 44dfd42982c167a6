//! One change of the sealed store: what it read, what it writes, and the events that go with it.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use polykey_hsm::{MaterialState, Ring, Sealer};
use polykey_proto::polykey::record::v1::{AuditEvent, VersionRecord};
use polykey_storage::{
    Commit, Direction, KeyRange, Require, Revision, RowKey, Snapshot, Space, Write,
};

use super::head::LeafEvents;
use super::space::Record;
use super::{Loaded, Receipt, Vault, seal, witness};
use crate::error::Error;

enum Pending {
    Put { value: Vec<u8> },
    Deleted,
}

/// A transaction. Every row it writes is required to be as it was when it was read here (or
/// absent, for an insert), so two changes of one row never both succeed. Dropped without
/// [`Self::commit`], it leaves no trace.
pub struct Tx<'v> {
    vault: &'v Vault,
    snapshot: Box<dyn Snapshot>,
    read: BTreeMap<RowKey, Option<Revision>>,
    requires: BTreeMap<RowKey, Require>,
    pending: BTreeMap<RowKey, Pending>,
    events: Vec<LeafEvents>,
    enabled: i64,
    ring: Arc<Ring>,
    oldest_epoch: u32,
}

impl<'v> Tx<'v> {
    pub(super) fn new(vault: &'v Vault, snapshot: Box<dyn Snapshot>, ring: Arc<Ring>) -> Self {
        Self {
            vault,
            snapshot,
            read: BTreeMap::new(),
            requires: BTreeMap::new(),
            pending: BTreeMap::new(),
            events: Vec::new(),
            enabled: 0,
            ring,
            oldest_epoch: u32::MAX,
        }
    }

    /// What opens `value`: the ring of the snapshot, or that in force for what was written since.
    fn sealer(&self, space: Space, value: &[u8]) -> Sealer {
        let sealer = self.ring.sealer();
        if seal::known(&sealer, space, value) { sealer } else { self.vault.ring.load().sealer() }
    }

    /// The vault it changes.
    #[must_use]
    pub fn vault(&self) -> &'v Vault {
        self.vault
    }

    /// Reads a record, with what this transaction has already written.
    ///
    /// # Errors
    /// As [`Vault::get`].
    pub async fn get<R: Record>(&mut self, key: &[u8]) -> Result<Option<Loaded<R>>, Error> {
        let row = RowKey::new(R::SPACE, key);
        match self.pending.get(&row) {
            Some(Pending::Deleted) => return Ok(None),
            Some(Pending::Put { value, .. }) => {
                let (record, _) = seal::open::<R>(&self.sealer(R::SPACE, value), key, value)?;
                let revision = self.read.get(&row).copied().flatten().unwrap_or_default();
                return Ok(Some(Loaded { record, revision }));
            }
            None => {}
        }
        let entry = self.snapshot.get(R::SPACE, key).await?;
        self.read.insert(row, entry.as_ref().map(|e| e.revision));
        let Some(entry) = entry else { return Ok(None) };
        let sealer = self.sealer(R::SPACE, &entry.value);
        let record = self.vault.opened::<R>(&sealer, key, &entry.value)?;
        Ok(Some(Loaded { record, revision: entry.revision }))
    }

    /// Whether the row is written here, so that what [`Self::get`] gives may never come to be.
    #[must_use]
    pub fn is_pending<R: Record>(&self, key: &[u8]) -> bool {
        self.pending.contains_key(&RowKey::new(R::SPACE, key))
    }

    /// Reads at most `limit` records of a range as they were when the transaction began; its own
    /// writes are not seen.
    ///
    /// # Errors
    /// As [`Vault::get`].
    pub async fn scan<R: Record>(
        &mut self,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Loaded<R>)>, Error> {
        let sealer = self.ring.sealer();
        let entries = self.snapshot.scan(R::SPACE, range, direction, limit).await?;
        let mut records = Vec::with_capacity(entries.len());
        for entry in entries {
            let record = self.vault.opened::<R>(&sealer, &entry.key, &entry.value)?;
            self.read.insert(RowKey::new(R::SPACE, entry.key.clone()), Some(entry.revision));
            records.push((entry.key, Loaded { record, revision: entry.revision }));
        }
        Ok(records)
    }

    /// The commit will be refused if the row has changed since it was read here, although it is
    /// not written.
    pub fn pin<R: Record>(&mut self, key: &[u8]) {
        self.require_as_read(RowKey::new(R::SPACE, key));
    }

    /// As [`Self::pin`], for a row read elsewhere at `revision`.
    pub fn pin_at<R: Record>(&mut self, key: &[u8], revision: Revision) {
        let row = RowKey::new(R::SPACE, key);
        self.requires.entry(row).or_insert(Require::At(revision));
    }

    fn require_as_read(&mut self, row: RowKey) {
        if let Some(read) = self.read.get(&row) {
            let require = read.map_or(Require::Absent, Require::At);
            self.requires.entry(row).or_insert(require);
        }
    }

    /// Writes a record over the one that was read here (or where none was found).
    ///
    /// # Errors
    /// [`Error::Internal`] if the row was never read: that would be a blind write.
    pub fn put<R: Record>(&mut self, key: &[u8], record: &R) -> Result<(), Error> {
        let row = RowKey::new(R::SPACE, key);
        if !self.read.contains_key(&row) && !self.pending.contains_key(&row) {
            return Err(Error::internal(format!("blind write of a {}", R::NAME)));
        }
        self.write(row, key, record)
    }

    /// Writes a record where there must be none.
    ///
    /// # Errors
    /// [`Error::Conflict`] if one was read or written here.
    pub fn insert<R: Record>(&mut self, key: &[u8], record: &R) -> Result<(), Error> {
        let row = RowKey::new(R::SPACE, key);
        match self.pending.get(&row) {
            Some(Pending::Put { .. }) => return Err(Error::Conflict),
            Some(Pending::Deleted) => {}
            None => {
                if matches!(self.read.get(&row), Some(Some(_))) {
                    return Err(Error::Conflict);
                }
                self.requires.entry(row.clone()).or_insert(Require::Absent);
            }
        }
        self.write(row, key, record)
    }

    /// Writes a record whatever was there. Only for rows whose content does not depend on what
    /// they held (list rows, jobs).
    ///
    /// # Errors
    /// [`Error::Internal`] if sealing fails.
    pub fn set<R: Record>(&mut self, key: &[u8], record: &R) -> Result<(), Error> {
        self.write(RowKey::new(R::SPACE, key), key, record)
    }

    fn write<R: Record>(&mut self, row: RowKey, key: &[u8], record: &R) -> Result<(), Error> {
        let counter = self.vault.next_counter();
        let ring = self.vault.ring.load();
        let value = seal::seal(&ring.sealer(), record, key, counter)?;
        self.oldest_epoch = self.oldest_epoch.min(ring.primary_epoch());
        if let Some(version) = (record as &dyn Any).downcast_ref::<VersionRecord>()
            && !version.material.is_empty()
        {
            let state = MaterialState::decode(&version.material)
                .map_err(|e| Error::internal(format!("writing material: {e}")))?;
            self.oldest_epoch = self.oldest_epoch.min(state.epoch());
        }
        self.require_as_read(row.clone());
        self.pending.insert(row, Pending::Put { value });
        Ok(())
    }

    /// Deletes a record, if it is there.
    pub fn delete<R: Record>(&mut self, key: &[u8]) {
        let row = RowKey::new(R::SPACE, key);
        self.require_as_read(row.clone());
        self.pending.insert(row, Pending::Deleted);
    }

    /// Writes a row in the clear where there must be none.
    pub fn insert_clear(&mut self, space: Space, key: Vec<u8>, value: Vec<u8>) {
        let row = RowKey::new(space, key);
        self.requires.insert(row.clone(), Require::Absent);
        self.pending.insert(row, Pending::Put { value });
    }

    /// Replaces a row in the clear that was read at `revision`.
    pub fn replace_clear(&mut self, space: Space, key: Vec<u8>, value: Vec<u8>, at: Revision) {
        let row = RowKey::new(space, key);
        self.requires.insert(row.clone(), Require::At(at));
        self.pending.insert(row, Pending::Put { value });
    }

    /// Adds an event that becomes durable with the change, or not at all.
    pub fn event(&mut self, event: AuditEvent) {
        self.note(&event);
    }

    /// As [`Self::event`].
    pub(crate) fn note(&mut self, event: &AuditEvent) {
        self.events.push(LeafEvents::one(event));
    }

    /// Counts keys that become enabled (positive) or stop being so (negative).
    pub fn count_enabled(&mut self, delta: i64) {
        self.enabled += delta;
    }

    /// Whether nothing would be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.events.is_empty()
    }

    /// Commits: durable when this returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] if a row has changed since it was read here, [`Error::OutcomeUnknown`]
    /// if the medium failed at the wrong moment, [`Error::Unavailable`] and [`Error::Exhausted`]
    /// with nothing changed.
    pub async fn commit(self) -> Result<Receipt, Error> {
        let Self { vault, snapshot, requires, pending, events, enabled, oldest_epoch, .. } = self;
        // A store on disk cannot reuse pages that a snapshot sees.
        drop(snapshot);
        let urgent = pending.keys().any(|row| witness::urgent(row, requires.get(row).copied()));
        let mut commit = Commit::new();
        commit.requires = requires.into_iter().collect();
        commit.writes = pending
            .into_iter()
            .map(|(row, pending)| match pending {
                Pending::Put { value } => Write::Put { row, value: value.into() },
                Pending::Deleted => Write::Delete { row },
            })
            .collect();
        let receipt = vault.submit(commit, events, enabled, oldest_epoch).await?;
        vault.witnessed(receipt.revision, urgent).await?;
        Ok(receipt)
    }
}

impl std::fmt::Debug for Tx<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tx").field("writes", &self.pending.len()).finish_non_exhaustive()
    }
}
