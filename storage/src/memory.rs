//! The reference: a `BTreeMap` behind a lock, gone with the process.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use parking_lot::{Mutex, RwLock};

use crate::{
    Applied, Changes, ChangesError, Commit, CommitError, Committed, Direction, Entry, Finish,
    Health, KeyRange, ReadError, ReopenError, Replaced, Revision, RowKey, Snapshot, Space, Store,
    StoreError, StoreStatus, commit, range,
};

/// How many revisions [`Store::changes`] remembers unless told otherwise.
pub const DEFAULT_CHANGES: u64 = 100_000;

/// Rows in memory. "Durable" means: until the last handle is dropped.
#[derive(Debug)]
pub struct Memory {
    id: [u8; 16],
    changes: u64,
    // One group at a time; readers are never behind this lock.
    writer: Mutex<()>,
    state: RwLock<Arc<State>>,
}

// Shared with snapshots and copied by the first commit after one was taken.
#[derive(Clone, Debug, Default)]
struct State {
    revision: Revision,
    generation: u64,
    rows: BTreeMap<RowKey, (Revision, Bytes)>,
    changes: BTreeMap<Revision, Vec<RowKey>>,
}

impl Memory {
    /// An empty store.
    ///
    /// # Errors
    /// The system has no random bytes for the store's id.
    pub fn new() -> Result<Self, StoreError> {
        Self::with_changes(DEFAULT_CHANGES)
    }

    /// An empty store that remembers the changes of the last `changes` revisions.
    ///
    /// # Errors
    /// The system has no random bytes for the store's id.
    pub fn with_changes(changes: u64) -> Result<Self, StoreError> {
        Ok(Self {
            id: random_id()?,
            changes,
            writer: Mutex::new(()),
            state: RwLock::new(Arc::new(State { generation: 1, ..State::default() })),
        })
    }

    fn commit_now(
        &self,
        group: Vec<Commit>,
        finish: &mut dyn Finish,
    ) -> Result<Committed, CommitError> {
        commit::check_group(&group)?;
        let _one_at_a_time = self.writer.lock();
        let state = Arc::clone(&self.state.read());

        let found = |row: &RowKey| Ok(state.rows.get(row).map(|(revision, _)| *revision));
        let admitted = commit::admit::<CommitError>(&group, found)?;
        if admitted.accepted.is_empty() {
            return Ok(Committed { revision: state.revision, outcomes: admitted.outcomes });
        }

        let revision = Revision(state.revision.0.saturating_add(1));
        let mut written: HashMap<RowKey, Option<Bytes>> = HashMap::new();
        let mut replaced = Vec::new();
        for commit in admitted.accepted.iter().filter_map(|&at| group.get(at)) {
            for write in &commit.writes {
                let (row, new) = (write.row(), write.value().cloned());
                let old = match written.insert(row.clone(), new.clone()) {
                    Some(earlier) => earlier,
                    None => state.rows.get(row).map(|(_, value)| value.clone()),
                };
                replaced.push(Replaced { row: row.clone(), old, new });
            }
        }
        let beneath = finish.beneath();
        let beneath: Vec<_> =
            beneath.iter().map(|row| state.rows.get(row).map(|(_, value)| value.clone())).collect();
        let accepted = &admitted.accepted;
        let appended = finish
            .finish(&Applied { revision, accepted, replaced: &replaced, beneath: &beneath })
            .map_err(CommitError::Aborted)?;
        commit::writes_size(&appended)?;
        for write in appended {
            written.insert(write.row().clone(), write.value().cloned());
        }

        drop(state);
        let mut state = self.state.write();
        let state = Arc::make_mut(&mut state);
        let rows: BTreeSet<RowKey> = written.keys().cloned().collect();
        state.revision = revision;
        state.changes.insert(revision, rows.into_iter().collect());
        while u64::try_from(state.changes.len()).is_ok_and(|kept| kept > self.changes) {
            state.changes.pop_first();
        }
        for (row, value) in written {
            match value {
                Some(value) => state.rows.insert(row, (revision, value)),
                None => state.rows.remove(&row),
            };
        }
        Ok(Committed { revision, outcomes: admitted.outcomes })
    }

    fn changes_now(&self, after: Revision, limit: usize) -> Result<Changes, ChangesError> {
        let state = Arc::clone(&self.state.read());
        if after > state.revision {
            return Err(ChangesError::Ahead { current: state.revision });
        }
        let next = Revision(after.0.saturating_add(1));
        let oldest = match state.changes.first_key_value() {
            Some((oldest, _)) => *oldest,
            None => Revision(state.revision.0.saturating_add(1)),
        };
        if next < oldest {
            return Err(ChangesError::Trimmed { oldest });
        }
        let changes = state.changes.range(next..).take(limit);
        Ok(changes.map(|(revision, rows)| (*revision, rows.clone())).collect())
    }
}

/// A store id.
pub(crate) fn random_id() -> Result<[u8; 16], StoreError> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| StoreError::Other(format!("no random bytes: {error}")))?;
    Ok(id)
}

impl Store for Memory {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        let snapshot = MemorySnapshot(Arc::clone(&self.state.read()));
        Box::pin(ready(Ok(Box::new(snapshot) as Box<dyn Snapshot>)))
    }

    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move { self.commit_now(group, finish) })
    }

    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>> {
        Box::pin(async move { self.changes_now(after, limit) })
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        Box::pin(async move {
            let _one_at_a_time = self.writer.lock();
            let mut state = self.state.write();
            let state = Arc::make_mut(&mut state);
            state.generation = state.generation.saturating_add(1);
            Ok(state.revision)
        })
    }

    fn status(&self) -> StoreStatus {
        let state = self.state.read();
        StoreStatus {
            kind: "memory",
            path: None,
            id: self.id,
            bytes: None,
            rows: u64::try_from(state.rows.len()).ok(),
            revision: state.revision,
            generation: state.generation,
            health: Health::Ready,
        }
    }
}

struct MemorySnapshot(Arc<State>);

impl MemorySnapshot {
    fn scan_now(
        &self,
        space: Space,
        keys: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> Vec<Entry> {
        if range::is_empty(&keys) {
            return Vec::new();
        }
        let row = |key: Vec<u8>| RowKey { space, key };
        let start = match keys.0 {
            Bound::Included(key) => Bound::Included(row(key)),
            Bound::Excluded(key) => Bound::Excluded(row(key)),
            Bound::Unbounded => Bound::Included(row(Vec::new())),
        };
        let end = match keys.1 {
            Bound::Included(key) => Bound::Included(row(key)),
            Bound::Excluded(key) => Bound::Excluded(row(key)),
            Bound::Unbounded => match space.0.checked_add(1) {
                Some(next) => Bound::Excluded(RowKey::new(Space(next), [])),
                None => Bound::Unbounded,
            },
        };
        let entry = |(row, (revision, value)): (&RowKey, &(Revision, Bytes))| Entry {
            key: row.key.clone(),
            value: value.clone(),
            revision: *revision,
        };
        let rows = self.0.rows.range((start, end));
        match direction {
            Direction::Forward => rows.take(limit).map(entry).collect(),
            Direction::Backward => rows.rev().take(limit).map(entry).collect(),
        }
    }
}

impl Snapshot for MemorySnapshot {
    fn revision(&self) -> Revision {
        self.0.revision
    }

    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        let found = self.0.rows.get(&RowKey::new(space, key));
        let entry = found.map(|(revision, value)| Entry {
            key: key.to_vec(),
            value: value.clone(),
            revision: *revision,
        });
        Box::pin(ready(Ok(entry)))
    }

    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>> {
        Box::pin(async move { Ok(self.scan_now(space, range, direction, limit)) })
    }
}
