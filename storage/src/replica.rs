//! One store kept equal to another: copied once, followed by its changes from then on.
//!
//! All that is known of a replica stands in it, in one row of [`SPACE`] that every group of its
//! writes: which store it is of, and up to which revision. So whatever interrupts a step, the next one
//! goes on from what is durable, and doing a part twice changes nothing. A group is only applied if
//! that row is as it was read: of two that ship to one replica, one is refused.
//!
//! A replica is *whole* at the revisions that [`Replica::step`] reports as applied: all rows are
//! those of one revision of the source. While it is copied, and while a backlog is applied that is
//! too large for one group, it is not, and says so ([`Watermark::whole`]).
//!
//! Revisions of the replica are its own. Rows of [`SPACE`] in the source are not copied.

mod promotion;

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use crate::{
    Abort, Applied, ChangesError, Commit, CommitError, Direction, Entry, KeyRange, ReadError,
    Require, Revision, RowKey, Snapshot, Space, Store, Write,
};

pub use promotion::{Promotion, promote, promotion};

/// The space that belongs to replication, in every store.
pub const SPACE: Space = Space(240);

const WATERMARK: &[u8] = b"watermark";
/// The version of the row's encoding.
const FORMAT: u8 = 1;

/// How many rows are looked at together.
const PAGE: usize = 1_000;
/// How many values are read at a time.
const READS: usize = 64;
/// How many revisions are listed at a time.
const LISTED: usize = 200;
/// How many changed rows are followed at most in one pass: what bounds the memory of a long backlog.
const FOLLOWED: usize = 100_000;
/// The size at which a group is closed, in bytes, unless told otherwise.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

/// How far a replica is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watermark {
    /// The id of the store that it is a replica of.
    pub source: [u8; 16],
    /// Everything up to this revision of the source is in it.
    pub revision: Revision,
    /// Whether it is exactly that revision.
    pub whole: bool,
    // Where to go on with what was begun.
    resume: Option<Resume>,
}

// A pass over many rows, in their order, that takes several groups. What changes meanwhile in the rows
// behind it is listed later than the revision it is a pass to, and followed afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Resume {
    // The revision up to which changes are followed. None if all rows are copied.
    until: Option<Revision>,
    // The first row that is still to be done.
    from: RowKey,
}

const TORN: u8 = 0;
const WHOLE: u8 = 1;
const COPYING: u8 = 2;
const FOLLOWING: u8 = 3;

impl Watermark {
    fn encode(&self) -> Vec<u8> {
        let mut encoded = vec![FORMAT];
        encoded.extend_from_slice(&self.source);
        encoded.extend_from_slice(&self.revision.0.to_be_bytes());
        match &self.resume {
            None => encoded.push(if self.whole { WHOLE } else { TORN }),
            Some(Resume { until, from }) => {
                encoded.push(if until.is_some() { FOLLOWING } else { COPYING });
                encoded.extend_from_slice(&until.map_or(0, |until| until.0).to_be_bytes());
                encoded.push(from.space.0);
                encoded.extend_from_slice(&from.key);
            }
        }
        encoded
    }

    fn decode(encoded: &[u8]) -> Option<Self> {
        let (&[FORMAT], rest) = encoded.split_first_chunk::<1>()? else { return None };
        let (source, rest) = rest.split_first_chunk::<16>()?;
        let (revision, rest) = rest.split_first_chunk::<8>()?;
        let (&state, rest) = rest.split_first()?;
        let resume = match state {
            TORN | WHOLE if rest.is_empty() => None,
            COPYING | FOLLOWING => {
                let (until, rest) = rest.split_first_chunk::<8>()?;
                let (&space, key) = rest.split_first()?;
                let until = Revision(u64::from_be_bytes(*until));
                let until = (state == FOLLOWING).then_some(until);
                Some(Resume { until, from: RowKey::new(Space(space), key) })
            }
            _ => return None,
        };
        let revision = Revision(u64::from_be_bytes(*revision));
        Some(Self { source: *source, revision, whole: state == WHOLE, resume })
    }
}

/// Why a replica was not brought on. Unless it says otherwise, the step may be repeated.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The target holds rows, and is no replica.
    #[error("the target is not empty, and no replica of anything: name an empty one")]
    NotEmpty,
    /// The target is a replica of another store.
    #[error("the target is a replica of another store than this source")]
    OfAnother,
    /// Something else has written to the target since: it has a history of its own now.
    #[error(
        "the target is at its revision {current}, and was left at {left}: something else has \
         written to it, and following its source would mix the two"
    )]
    Diverged {
        /// The revision at which the last step left it.
        left: Revision,
        /// The revision it has now.
        current: Revision,
    },
    /// No replica at all.
    #[error("it is no replica: nothing has ever been shipped to it")]
    NotAReplica,
    /// A replica that stands between two revisions of its source.
    #[error(
        "it stands between two revisions of its source, which was shipping a backlog or a first copy: \
         let the source finish"
    )]
    Torn,
    /// The source has gone back behind what the target has of it.
    #[error("the source is at revision {current}, and the target has its revision {applied}")]
    SourceWentBack {
        /// What the target has.
        applied: Revision,
        /// What the source has.
        current: Revision,
    },
    /// Another replication wrote to the target meanwhile.
    #[error("another replication is writing to the target")]
    Contended,
    /// A row differs where none may.
    #[error("row {0:?} of the target is not that of the source")]
    Differs(RowKey),
    /// The target's watermark is not one of this program.
    #[error("the target's record of its replication is malformed")]
    Damaged,
    /// The source was not read.
    #[error("the source: {0}")]
    Source(ReadError),
    /// The target was not read.
    #[error("the target: {0}")]
    Target(ReadError),
    /// The target took no group. After an unknown outcome it is to be reopened, and the step repeated.
    #[error("the target: {0}")]
    Commit(CommitError),
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the replica has everything up to this revision of the source, which is its last.
    CaughtUp(Revision),
    /// The replica is this revision of the source now.
    Applied {
        /// The revision.
        revision: Revision,
        /// How many rows were written.
        rows: usize,
    },
    /// Part of the source was copied, and the rest is still to come.
    Copied {
        /// How many rows were looked at.
        rows: usize,
    },
}

/// The watermark of a store, if it is a replica.
///
/// # Errors
/// [`ReplicaError::Target`], [`ReplicaError::Damaged`].
pub async fn watermark(store: &dyn Store) -> Result<Option<Watermark>, ReplicaError> {
    let found = store.get(SPACE, WATERMARK).await.map_err(ReplicaError::Target)?;
    found.map(|row| Watermark::decode(&row.value).ok_or(ReplicaError::Damaged)).transpose()
}

/// The change by which a store stops being a replica.
#[must_use]
pub fn apart() -> Commit {
    Commit::new().delete(SPACE, WATERMARK)
}

/// A store that is kept equal to another.
pub struct Replica {
    source: Arc<dyn Store>,
    target: Arc<dyn Store>,
    batch_bytes: usize,
    // What the target said last, if that is remembered.
    remembered: Option<Mutex<Option<State>>>,
}

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Replica").finish_non_exhaustive()
    }
}

impl Replica {
    /// `target` as a replica of `source`. Nothing is read yet.
    #[must_use]
    pub fn new(source: Arc<dyn Store>, target: Arc<dyn Store>) -> Self {
        Self { source, target, batch_bytes: BATCH_BYTES, remembered: None }
    }

    /// Asks the target where it stands at the first step and after a failure only. What it would say
    /// differently meanwhile is found out inside the next transaction.
    #[must_use]
    pub fn remembering(mut self) -> Self {
        self.remembered = Some(Mutex::default());
        self
    }

    /// Has the next step ask the target where it stands.
    pub fn forget(&self) {
        if let Some(remembered) = &self.remembered {
            *remembered.lock() = None;
        }
    }

    /// Closes a group at `bytes`, one row at least and 8 MiB by default.
    #[must_use]
    pub fn with_batch_bytes(mut self, bytes: usize) -> Self {
        self.batch_bytes = bytes;
        self
    }

    /// Brings the replica on by some groups: by all that the source has changed, or by a part of a
    /// copy.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub async fn step(&self) -> Result<Step, ReplicaError> {
        let remembered = self.remembered.as_ref().and_then(|state| state.lock().take());
        let mut state = match remembered {
            Some(state) => state,
            None => self.state().await?,
        };
        let step = self.step_from(&mut state).await?;
        if let Some(remembered) = &self.remembered {
            *remembered.lock() = Some(state);
        }
        Ok(step)
    }

    async fn step_from(&self, state: &mut State) -> Result<Step, ReplicaError> {
        let snapshot = self.source.snapshot().await.map_err(ReplicaError::Source)?;
        let current = snapshot.revision();
        let Some(mark) = state.mark.clone() else {
            return self.copy_part(state, snapshot.as_ref(), self.first_mark(current)).await;
        };
        if mark.source != self.source.status().id {
            return Err(ReplicaError::OfAnother);
        }
        if mark.revision > current {
            return Err(ReplicaError::SourceWentBack { applied: mark.revision, current });
        }
        let (until, from) = match mark.resume.clone() {
            Some(Resume { until: None, .. }) => {
                return self.copy_part(state, snapshot.as_ref(), mark).await;
            }
            Some(Resume { until: Some(until), from }) => (until, from),
            None if mark.whole && mark.revision == current => return Ok(Step::CaughtUp(current)),
            None => (current, RowKey::new(Space(0), [])),
        };
        match self.changed(mark.revision, until).await? {
            Some((mut rows, until)) => {
                let rows = rows.split_off(&from);
                self.follow(state, snapshot.as_ref(), (mark, until), rows).await
            }
            // Too far behind: once more from the beginning, over what is there.
            None => self.copy_part(state, snapshot.as_ref(), self.first_mark(current)).await,
        }
    }

    /// Steps until the replica is the last revision of the source, and returns that. `progress` hears
    /// of each step.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub async fn catch_up(
        &self,
        mut progress: impl FnMut(Step) + Send,
    ) -> Result<Revision, ReplicaError> {
        loop {
            let step = self.step().await?;
            progress(step);
            if let Step::CaughtUp(revision) = step {
                return Ok(revision);
            }
        }
    }

    /// Whether the target is a replica of this source and nothing but: read anew.
    ///
    /// # Errors
    /// [`ReplicaError`].
    pub async fn look(&self) -> Result<Option<Watermark>, ReplicaError> {
        self.forget();
        Ok(self.state().await?.mark)
    }

    /// Compares every row of the replica with the source, at one revision, and returns how many there
    /// are; or None if the source has moved on since the last step.
    ///
    /// # Errors
    /// [`ReplicaError::Differs`], or that something could not be read.
    pub async fn verify(&self) -> Result<Option<u64>, ReplicaError> {
        let target = self.target.snapshot().await.map_err(ReplicaError::Target)?;
        let source = self.source.snapshot().await.map_err(ReplicaError::Source)?;
        let mark = target.get(SPACE, WATERMARK).await.map_err(ReplicaError::Target)?;
        let mark = mark.and_then(|row| Watermark::decode(&row.value));
        if !mark.is_some_and(|mark| mark.whole && mark.revision == source.revision()) {
            return Ok(None);
        }
        let mut rows = 0_u64;
        for space in (0..=u8::MAX).map(Space).filter(|space| *space != SPACE) {
            let mut range = crate::all();
            loop {
                let here = page(source.as_ref(), space, &range);
                let here = here.await.map_err(ReplicaError::Source)?;
                let there = page(target.as_ref(), space, &range);
                let there = there.await.map_err(ReplicaError::Target)?;
                let key = |row: Option<&Entry>| row.map(|row| row.key.clone()).unwrap_or_default();
                for index in 0..here.len().max(there.len()) {
                    let (here, there) = (here.get(index), there.get(index));
                    let same = |one: &Entry, other: &Entry| {
                        one.key == other.key && one.value == other.value
                    };
                    if !here.zip(there).is_some_and(|(here, there)| same(here, there)) {
                        return Err(ReplicaError::Differs(RowKey::new(space, key(here.or(there)))));
                    }
                    rows = rows.saturating_add(1);
                }
                let Some(last) = here.last().filter(|_| here.len() == PAGE) else { break };
                range = (Bound::Excluded(last.key.clone()), Bound::Unbounded);
            }
        }
        Ok(Some(rows))
    }

    fn first_mark(&self, revision: Revision) -> Watermark {
        let source = self.source.status().id;
        let resume = Some(copying(RowKey::new(Space(0), [])));
        Watermark { source, revision, whole: false, resume }
    }

    // How far the target is, and by what that would be changed.
    async fn state(&self) -> Result<State, ReplicaError> {
        let snapshot = self.target.snapshot().await.map_err(ReplicaError::Target)?;
        let current = snapshot.revision();
        match snapshot.get(SPACE, WATERMARK).await.map_err(ReplicaError::Target)? {
            None if current == Revision::EMPTY => Ok(State { mark: None, left: None }),
            None => Err(ReplicaError::NotEmpty),
            Some(row) if row.revision != current => {
                Err(ReplicaError::Diverged { left: row.revision, current })
            }
            Some(row) => {
                let mark = Watermark::decode(&row.value).ok_or(ReplicaError::Damaged)?;
                Ok(State { mark: Some(mark), left: Some(current) })
            }
        }
    }

    // The rows that were written after one revision up to another, or up to an earlier one where they
    // are many, and that one; None if that is not known.
    async fn changed(
        &self,
        after: Revision,
        until: Revision,
    ) -> Result<Option<(BTreeSet<RowKey>, Revision)>, ReplicaError> {
        let (mut rows, mut reached) = (BTreeSet::new(), after);
        while reached < until && rows.len() < FOLLOWED {
            let listed = match self.source.changes(reached, LISTED).await {
                Ok(listed) => listed,
                Err(ChangesError::Trimmed { .. }) => return Ok(None),
                Err(ChangesError::Ahead { current }) => {
                    return Err(ReplicaError::SourceWentBack { applied: after, current });
                }
                Err(ChangesError::Read(error)) => return Err(ReplicaError::Source(error)),
            };
            // Nothing more of what the snapshot has: it was trimmed meanwhile.
            let Some((last, _)) = listed.last() else { return Ok(None) };
            reached = until.min(*last);
            let of_snapshot = listed.into_iter().filter(|(revision, _)| *revision <= until);
            rows.extend(of_snapshot.flat_map(|(_, rows)| rows).filter(|row| row.space != SPACE));
        }
        Ok(Some((rows, reached)))
    }

    // Writes the rows as they are in `snapshot`: those that were changed until a revision, which may be
    // that of the snapshot, or an earlier one at which this was begun.
    async fn follow(
        &self,
        state: &mut State,
        snapshot: &dyn Snapshot,
        (mark, until): (Watermark, Revision),
        rows: BTreeSet<RowKey>,
    ) -> Result<Step, ReplicaError> {
        let rows: Vec<RowKey> = rows.into_iter().collect();
        let mut batch = Batch::default();
        for some in rows.chunks(READS) {
            let reads = some.iter().map(|row| snapshot.get(row.space, &row.key));
            let found = futures::future::try_join_all(reads).await.map_err(ReplicaError::Source)?;
            for (row, found) in some.iter().zip(found) {
                if batch.bytes >= self.batch_bytes {
                    let resume = Some(Resume { until: Some(until), from: row.clone() });
                    let torn = Watermark { whole: false, resume, ..mark.clone() };
                    self.commit(state, std::mem::take(&mut batch), torn).await?;
                }
                batch.write(row.clone(), found.map(|row| row.value));
            }
        }
        let whole = snapshot.revision() == until;
        let done = Watermark { revision: until, whole, resume: None, ..mark };
        self.commit(state, batch, done).await?;
        let rows = rows.len();
        Ok(if whole { Step::Applied { revision: until, rows } } else { Step::Copied { rows } })
    }

    // Copies from where `mark` says on, until a group is full or all has been looked at. What changes in
    // the source behind that place is listed after `mark.revision`, and followed at the end.
    async fn copy_part(
        &self,
        state: &mut State,
        source: &dyn Snapshot,
        mut mark: Watermark,
    ) -> Result<Step, ReplicaError> {
        let target = self.target.snapshot().await.map_err(ReplicaError::Target)?;
        let (mut batch, mut looked_at) = (Batch::default(), 0_usize);
        while let Some(Resume { from, .. }) = mark.resume.take() {
            let space = from.space;
            if space == SPACE {
                mark.resume = next_space(space).map(copying);
                continue;
            }
            let range = (Bound::Included(from.key), Bound::Unbounded);
            let here = page(source, space, &range).await.map_err(ReplicaError::Source)?;
            let there = page(target.as_ref(), space, &range).await;
            let there = there.map_err(ReplicaError::Target)?;
            // As far as both pages reach.
            let end = |page: &[Entry]| {
                page.last().filter(|_| page.len() == PAGE).map(|last| last.key.clone())
            };
            let until = match (end(&here), end(&there)) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
            let mut rows: BTreeMap<Vec<u8>, (Option<Bytes>, Option<Bytes>)> = BTreeMap::new();
            for row in here {
                rows.entry(row.key).or_default().0 = Some(row.value);
            }
            for row in there {
                rows.entry(row.key).or_default().1 = Some(row.value);
            }
            let mut next = match &until {
                Some(until) => Some(RowKey::new(space, after(until))),
                None => next_space(space),
            };
            for (key, (here, there)) in rows {
                if until.as_ref().is_some_and(|until| key > *until) {
                    break;
                }
                if batch.bytes >= self.batch_bytes {
                    next = Some(RowKey::new(space, key));
                    break;
                }
                looked_at = looked_at.saturating_add(1);
                if here != there {
                    batch.write(RowKey::new(space, key), here);
                }
            }
            mark.resume = next.map(copying);
            if batch.bytes >= self.batch_bytes {
                break;
            }
        }
        self.commit(state, batch, mark).await?;
        Ok(Step::Copied { rows: looked_at })
    }

    async fn commit(
        &self,
        state: &mut State,
        batch: Batch,
        mark: Watermark,
    ) -> Result<(), ReplicaError> {
        let require = state.left.map_or(Require::Absent, Require::At);
        let mut commit = batch.commit.require(SPACE, WATERMARK, require);
        commit = commit.put(SPACE, WATERMARK, mark.encode());
        let left = state.left.unwrap_or(Revision::EMPTY);
        let mut next = Elsewhere::after(left);
        let mut check = |applied: &Applied<'_>| next.check(applied);
        let committed = self.target.commit(vec![commit], &mut check).await;
        if next.found() != left {
            return Err(match state.left {
                Some(left) => ReplicaError::Diverged { left, current: next.found() },
                None => ReplicaError::NotEmpty,
            });
        }
        let committed = committed.map_err(ReplicaError::Commit)?;
        if !committed.any() {
            return Err(ReplicaError::Contended);
        }
        *state = State { mark: Some(mark), left: Some(committed.revision) };
        Ok(())
    }
}

// Whether somebody else has written to a store: known for certain only within the next transaction.
struct Elsewhere {
    left: Revision,
    found: Revision,
}

impl Elsewhere {
    fn after(left: Revision) -> Self {
        Self { left, found: left }
    }

    fn check(&mut self, applied: &Applied<'_>) -> Result<Vec<Write>, Abort> {
        self.found = Revision(applied.revision.0.saturating_sub(1));
        if self.found == self.left {
            Ok(Vec::new())
        } else {
            Err(Abort::new("written to by others"))
        }
    }

    // The revision that was met.
    fn found(&self) -> Revision {
        self.found
    }
}

// What the target says of itself, and the revision at which it does.
struct State {
    mark: Option<Watermark>,
    left: Option<Revision>,
}

// The writes of a group.
#[derive(Default)]
struct Batch {
    commit: Commit,
    bytes: usize,
}

impl Batch {
    fn write(&mut self, row: RowKey, value: Option<Bytes>) {
        let value_bytes = value.as_ref().map_or(0, Bytes::len);
        self.bytes = self.bytes.saturating_add(row.key.len()).saturating_add(value_bytes).max(1);
        self.commit.writes.push(match value {
            Some(value) => Write::Put { row, value },
            None => Write::Delete { row },
        });
    }
}

fn page<'a>(
    snapshot: &'a dyn Snapshot,
    space: Space,
    range: &KeyRange,
) -> BoxFuture<'a, Result<Vec<Entry>, ReadError>> {
    snapshot.scan(space, range.clone(), Direction::Forward, PAGE)
}

fn copying(from: RowKey) -> Resume {
    Resume { until: None, from }
}

fn next_space(space: Space) -> Option<RowKey> {
    space.0.checked_add(1).map(|next| RowKey::new(Space(next), []))
}

// The key that follows `key` at once.
fn after(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

/// Copies one store into another that is empty, or into which an earlier copy of the same store was
/// interrupted, and compares every row afterwards. Returns the number of rows. A source that goes on
/// changing is followed until it rests for as long as the comparison takes.
///
/// # Errors
/// [`ReplicaError`]; the copy may be taken up again.
pub async fn copy(
    from: Arc<dyn Store>,
    to: Arc<dyn Store>,
    mut progress: impl FnMut(Step) + Send,
) -> Result<u64, ReplicaError> {
    let replica = Replica::new(from, to);
    loop {
        replica.catch_up(&mut progress).await?;
        if let Some(rows) = replica.verify().await? {
            return Ok(rows);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watermarks_are_read_as_they_were_written() {
        let resumes = [Some((None, 0)), Some((Some(Revision(9)), 240)), None, None];
        for (index, resume) in resumes.into_iter().enumerate() {
            let from = |space| RowKey::new(Space(space), [7, 0]);
            let resume = resume.map(|(until, space)| Resume { until, from: from(space) });
            let (revision, whole) = (Revision(u64::MAX - 1), index == 3);
            let mark = Watermark { source: [3; 16], revision, whole, resume };
            assert_eq!(Watermark::decode(&mark.encode()), Some(mark));
        }
        for malformed in [&[][..], &[1; 25], &[2; 26], &[1; 27]] {
            assert_eq!(Watermark::decode(malformed), None);
        }
    }
}
