//! A change as a value: requirements and writes, and the rules by which a group is admitted.

use std::collections::HashMap;

use bytes::Bytes;

use crate::{Abort, Revision, RowKey, Space, TooLarge};

/// The longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 1024;
/// The longest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 8 * 1024 * 1024;
/// All keys and values of a group together, in bytes; those of [`Finish`] count for themselves.
pub const MAX_GROUP_BYTES: usize = 64 * 1024 * 1024;

/// What must be true of a row for a commit to be accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Require {
    /// There is no such row.
    Absent,
    /// There is one, whatever its revision.
    Present,
    /// There is one, and this revision wrote it last.
    At(Revision),
}

/// One change of one row.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// The row has this value from now on.
    Put {
        /// Which row.
        row: RowKey,
        /// Its value.
        value: Bytes,
    },
    /// The row is gone. A row that was not there stays so.
    Delete {
        /// Which row.
        row: RowKey,
    },
}

impl Write {
    /// The row that is written.
    #[must_use]
    pub fn row(&self) -> &RowKey {
        match self {
            Self::Put { row, .. } | Self::Delete { row } => row,
        }
    }

    /// The value of the row afterwards.
    #[must_use]
    pub fn value(&self) -> Option<&Bytes> {
        match self {
            Self::Put { value, .. } => Some(value),
            Self::Delete { .. } => None,
        }
    }
}

impl std::fmt::Debug for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Put { row, value } => write!(f, "Put({row:?}, {} bytes)", value.len()),
            Self::Delete { row } => write!(f, "Delete({row:?})"),
        }
    }
}

/// A change that happens whole or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commit {
    /// What must hold, checked in order; the first that fails is reported.
    pub requires: Vec<(RowKey, Require)>,
    /// What is written, in order.
    pub writes: Vec<Write>,
}

impl Commit {
    /// A commit that requires and writes nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a requirement.
    #[must_use]
    pub fn require(mut self, space: Space, key: impl Into<Vec<u8>>, require: Require) -> Self {
        self.requires.push((RowKey::new(space, key), require));
        self
    }

    /// Adds a row to write.
    #[must_use]
    pub fn put(mut self, space: Space, key: impl Into<Vec<u8>>, value: impl Into<Bytes>) -> Self {
        self.writes.push(Write::Put { row: RowKey::new(space, key), value: value.into() });
        self
    }

    /// Adds a row to delete.
    #[must_use]
    pub fn delete(mut self, space: Space, key: impl Into<Vec<u8>>) -> Self {
        self.writes.push(Write::Delete { row: RowKey::new(space, key) });
        self
    }

    /// The bytes of its keys and values, which is what it adds to [`MAX_GROUP_BYTES`].
    ///
    /// A commit that is refused here would take its whole group with it, so whoever forms
    /// groups asks first.
    ///
    /// # Errors
    /// [`TooLarge`] if this commit exceeds a limit by itself.
    pub fn size(&self) -> Result<usize, TooLarge> {
        let mut bytes = 0_usize;
        for (row, _) in &self.requires {
            bytes = bytes.saturating_add(key_size(row)?);
        }
        bytes = bytes.saturating_add(writes_size(&self.writes)?);
        within_group(bytes)
    }
}

/// A write that was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The row.
    pub row: RowKey,
    /// Its value before this write, which an earlier write of the same group may have put there.
    pub old: Option<Bytes>,
    /// Its value after this write.
    pub new: Option<Bytes>,
}

/// What a group is about to become.
#[derive(Clone, Copy, Debug)]
pub struct Applied<'a> {
    /// The revision the group will have.
    pub revision: Revision,
    /// The indexes of the accepted commits, ascending.
    pub accepted: &'a [usize],
    /// Every write of the accepted commits, in order.
    pub replaced: &'a [Replaced],
    /// The values of [`Finish::beneath`], in its order.
    pub beneath: &'a [Option<Bytes>],
}

/// Appends rows that depend on what a group turned out to be: its revision, its head, its audit
/// records.
pub trait Finish: Send {
    /// Rows whose values [`Self::finish`] asks for: those that the group is about to be put on top
    /// of, which another node may have written a moment ago. Asked once a group, before it.
    fn beneath(&self) -> Vec<RowKey> {
        Vec::new()
    }

    /// Called at most once a group, after the accepted commits are applied and before anything
    /// is durable. What it returns is written after them, in order. It must not call the store.
    ///
    /// # Errors
    /// [`Abort`] leaves the store as it was.
    fn finish(&mut self, applied: &Applied<'_>) -> Result<Vec<Write>, Abort>;
}

impl<F> Finish for F
where
    F: FnMut(&Applied<'_>) -> Result<Vec<Write>, Abort> + Send,
{
    fn finish(&mut self, applied: &Applied<'_>) -> Result<Vec<Write>, Abort> {
        self(applied)
    }
}

/// Appends nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFinish;

impl Finish for NoFinish {
    fn finish(&mut self, _applied: &Applied<'_>) -> Result<Vec<Write>, Abort> {
        Ok(Vec::new())
    }
}

/// A requirement that did not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("row {row:?} is not {require:?}")]
pub struct Conflict {
    /// The row.
    pub row: RowKey,
    /// What was required of it.
    pub require: Require,
}

/// What became of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// The revision of the group; that of the store if no commit was accepted.
    pub revision: Revision,
    /// The outcome of each commit, in the order of the group.
    pub outcomes: Vec<Result<(), Conflict>>,
}

impl Committed {
    /// Whether anything was committed.
    #[must_use]
    pub fn any(&self) -> bool {
        self.outcomes.iter().any(Result::is_ok)
    }
}

/// Checks a group against the limits.
pub(crate) fn check_group(group: &[Commit]) -> Result<(), TooLarge> {
    let mut bytes = 0_usize;
    for commit in group {
        bytes = bytes.saturating_add(commit.size()?);
    }
    within_group(bytes).map(drop)
}

/// Checks the writes of [`Finish`] against the limits, and returns their bytes.
pub(crate) fn writes_size(writes: &[Write]) -> Result<usize, TooLarge> {
    let mut bytes = 0_usize;
    for write in writes {
        let value = write.value().map_or(0, Bytes::len);
        if value > MAX_VALUE_BYTES {
            return Err(TooLarge::Value(value));
        }
        bytes = bytes.saturating_add(key_size(write.row())?.saturating_add(value));
    }
    within_group(bytes)
}

fn key_size(row: &RowKey) -> Result<usize, TooLarge> {
    let bytes = row.key.len();
    if bytes > MAX_KEY_BYTES {
        return Err(TooLarge::Key(bytes));
    }
    Ok(bytes)
}

fn within_group(bytes: usize) -> Result<usize, TooLarge> {
    if bytes > MAX_GROUP_BYTES {
        return Err(TooLarge::Group(bytes));
    }
    Ok(bytes)
}

/// Which commits of a group are accepted.
pub(crate) struct Admitted {
    pub(crate) accepted: Vec<usize>,
    pub(crate) outcomes: Vec<Result<(), Conflict>>,
}

/// Decides a group in order. `committed` tells the revision of a row in the store, to which
/// nothing of the group has been applied.
pub(crate) fn admit<E>(
    group: &[Commit],
    mut committed: impl FnMut(&RowKey) -> Result<Option<Revision>, E>,
) -> Result<Admitted, E> {
    // Rows that accepted commits of this group have put (true) or deleted (false).
    let mut written: HashMap<&RowKey, bool> = HashMap::new();
    let mut admitted = Admitted {
        accepted: Vec::with_capacity(group.len()),
        outcomes: Vec::with_capacity(group.len()),
    };
    for (index, commit) in group.iter().enumerate() {
        let mut outcome = Ok(());
        for (row, require) in &commit.requires {
            let holds = match written.get(row) {
                Some(&present) => match require {
                    Require::Absent => !present,
                    Require::Present => present,
                    Require::At(_) => false,
                },
                None => {
                    let found = committed(row)?;
                    match require {
                        Require::Absent => found.is_none(),
                        Require::Present => found.is_some(),
                        Require::At(revision) => found == Some(*revision),
                    }
                }
            };
            if !holds {
                outcome = Err(Conflict { row: row.clone(), require: *require });
                break;
            }
        }
        if outcome.is_ok() {
            for write in &commit.writes {
                written.insert(write.row(), write.value().is_some());
            }
            admitted.accepted.push(index);
        }
        admitted.outcomes.push(outcome);
    }
    Ok(admitted)
}
