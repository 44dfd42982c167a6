//! What an error of redb means for the store.

use std::{
    fmt::Display,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use ::redb::{CommitError, DatabaseError, StorageError, TableError, TransactionError};
use parking_lot::Mutex;

use super::Known;
use crate::{Abort, ReadError, StoreError, TooLarge};

/// An error of redb, translated.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: StoreError,
    /// redb refuses everything from here on, or has to be assumed to.
    pub(super) needs_reopen: bool,
}

impl Failure {
    /// Something unreadable. It stays so after a reopening, and what is readable stays readable.
    pub(super) fn damaged(what: impl Into<String>) -> Self {
        Self { error: StoreError::Damaged(what.into()), needs_reopen: false }
    }

    /// A failure after which nothing in memory is trusted.
    pub(super) fn latching(error: StoreError) -> Self {
        Self { error, needs_reopen: true }
    }

    /// A panic that was caught.
    pub(super) fn panicked() -> Self {
        Self::latching(StoreError::Other("interrupted by a panic".into()))
    }

    /// A panic of redb's after which its thread keeps the file: see [`super::apart`].
    pub(super) fn given_up() -> Self {
        Self::latching(StoreError::Damaged(
            "redb stopped at a page that makes no sense; nothing is written or read until the \
             process is started again. If this comes back, restore a backup"
                .into(),
        ))
    }

    fn other(error: impl Display) -> Self {
        Self::latching(StoreError::Other(error.to_string()))
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Io(error) => Self::latching(error.into()),
            StorageError::Corrupted(what) => Self::damaged(what),
            other => Self::other(other),
        }
    }
}

impl From<TableError> for Failure {
    fn from(error: TableError) -> Self {
        match error {
            TableError::Storage(error) => error.into(),
            other => Self::damaged(other.to_string()),
        }
    }
}

impl From<TransactionError> for Failure {
    fn from(error: TransactionError) -> Self {
        match error {
            TransactionError::Storage(error) => error.into(),
            other => Self::other(other),
        }
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Storage(error) => error.into(),
            other => Self::other(other),
        }
    }
}

impl From<DatabaseError> for Failure {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::Storage(error) => error.into(),
            other => Self::other(other),
        }
    }
}

/// Why a group was not committed, by what is known of it.
#[derive(Debug)]
pub(super) enum Failed {
    /// The caller refused.
    Aborted(Abort),
    /// The caller appended too much.
    TooLarge(TooLarge),
    /// Before the commit of the transaction began: nothing is durable.
    Before(Failure),
    /// Afterwards: anything may be.
    During(Failure),
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self::Before(failure)
    }
}

impl From<StorageError> for Failed {
    fn from(error: StorageError) -> Self {
        Self::Before(error.into())
    }
}

impl From<TableError> for Failed {
    fn from(error: TableError) -> Self {
        Self::Before(error.into())
    }
}

/// Where a snapshot reports that its medium has failed.
pub(super) struct Latch {
    pub(super) known: Arc<Mutex<Known>>,
    /// The opening the snapshot belongs to; it has no say about a later one.
    pub(super) generation: u64,
}

impl Latch {
    /// Runs a read. redb asserts on some damaged pages, hence the net.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce() -> Result<T, Failure>,
    ) -> Result<T, ReadError> {
        let failure = match catch_unwind(AssertUnwindSafe(read)) {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(failure)) => failure,
            Err(_) => Failure::latching(StoreError::Damaged("a page makes no sense".into())),
        };
        Err(self.read_error(failure))
    }

    /// Notes what `failure` means for the store, and translates it for a reader.
    fn read_error(&self, failure: Failure) -> ReadError {
        let mut known = self.known.lock();
        if known.generation != self.generation || known.failure.is_some() {
            return ReadError::NeedsReopen;
        }
        if failure.needs_reopen {
            known.failure = Some(failure.error.clone());
        }
        ReadError::Store(failure.error)
    }
}
