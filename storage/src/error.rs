//! What can go wrong with a store, by what the caller may conclude from it.

use std::{io, path::PathBuf, sync::Arc};

use crate::{MAX_GROUP_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES, Revision};

/// What the medium said. `Clone`, because one failure answers every caller of a group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused an operation.
    #[error("I/O error: {message}")]
    Io {
        /// The kind of the original error.
        kind: io::ErrorKind,
        /// Its text.
        message: String,
    },
    /// What was read is not what this program writes.
    #[error("the store is damaged: {0}")]
    Damaged(String),
    /// A database was not reached, or gave no answer in time.
    #[error("the database does not answer: {0}")]
    Unreachable(String),
    /// A database knows no such login, or grants it too little.
    #[error("the database refuses this node: {0}")]
    Refused(String),
    /// The connection to a database was not encrypted and verified as it has to be.
    #[error("no verified TLS connection to the database: {0}")]
    Tls(String),
    /// Other writers were in the way until there was no time left. Nothing was applied.
    #[error("other writers were in the way until the time was up: {0}")]
    Contended(String),
    /// Another node has taken over the writing. Reads go on.
    #[error(
        "this node is fenced: it writes under epoch {own}, and a promotion has raised the epoch to \
         {current}. Nothing it writes is taken any more; it goes on reading"
    )]
    Fenced {
        /// The epoch of this node.
        own: u64,
        /// The epoch of the store.
        current: u64,
    },
    /// A database would lose what it has acknowledged.
    #[error("the database does not keep what it acknowledges: {0}")]
    NotDurable(String),
    /// Any other failure of the medium.
    #[error("{0}")]
    Other(String),
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        Self::Io { kind: error.kind(), message: error.to_string() }
    }
}

/// Why a read gave no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// An earlier operation failed; [`crate::Store::reopen`] comes first.
    #[error("the store must be reopened after an earlier failure")]
    NeedsReopen,
    /// The medium failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a group was not committed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommitError {
    /// The store takes no commits after an earlier failure, until [`crate::Store::reopen`]
    /// succeeds. Nothing was applied.
    #[error("the store takes no commits until it is reopened")]
    ReadOnly,
    /// The medium failed while the group was being made durable: all of it is, or nothing.
    #[error("whether the group was committed is unknown: {0}")]
    OutcomeUnknown(StoreError),
    /// A key, a value or the group exceeds its limit. Nothing was applied.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// [`crate::Finish`] refused. Nothing was applied.
    #[error("the group was aborted: {0}")]
    Aborted(Abort),
    /// The medium failed before anything could become durable. Nothing was applied.
    #[error(transparent)]
    Store(StoreError),
}

/// A size limit that was exceeded. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// A key.
    #[error("a key of {0} bytes is longer than {MAX_KEY_BYTES}")]
    Key(usize),
    /// A value.
    #[error("a value of {0} bytes is longer than {MAX_VALUE_BYTES}")]
    Value(usize),
    /// All keys and values of a group together, or of a commit alone.
    #[error("a group of {0} bytes is larger than {MAX_GROUP_BYTES}")]
    Group(usize),
}

/// Why [`crate::Finish`] refused: any error of the caller's.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub struct Abort(Arc<dyn std::error::Error + Send + Sync>);

impl Abort {
    /// Wraps the caller's own error, or a text.
    pub fn new(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(Arc::from(reason.into()))
    }

    /// The caller's own error, if it is an `E`.
    pub fn downcast_ref<E: std::error::Error + 'static>(&self) -> Option<&E> {
        self.0.downcast_ref()
    }
}

/// Why the changes after a revision cannot be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// Some of them are no longer kept: the reader must take a snapshot and start from there.
    #[error("changes are kept from revision {oldest} on")]
    Trimmed {
        /// The oldest revision that is still listed; one more than the current revision if
        /// none is.
        oldest: Revision,
    },
    /// The revision asked for has never been committed here: the reader has seen another
    /// history.
    #[error("this store is only at revision {current}")]
    Ahead {
        /// The last revision of this store.
        current: Revision,
    },
    /// The read failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Why a store did not open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Another process, or this one, has it open.
    #[error("{path} is in use by another process or by this one", path = path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// There is no such file, and none was to be created.
    #[error("there is no store at {path}", path = path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
    },
    /// A store already stands where one was to be created.
    #[error("{path} already exists", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Something else than a store.
    #[error("{path} is not a Polykey store: {reason}", path = path.display())]
    NotAStore {
        /// The file.
        path: PathBuf,
        /// What gave it away.
        reason: String,
    },
    /// Written by a later version of this program.
    #[error(
        "{path} has format version {found}, and this program reads versions up to {supported}",
        path = path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// The version of the file.
        found: u32,
        /// The newest version this program reads.
        supported: u32,
    },
    /// The medium failed.
    #[error("{path}: {error}", path = path.display())]
    Store {
        /// The file.
        path: PathBuf,
        /// What it said.
        error: StoreError,
    },
}

/// Why a store did not open again.
pub type ReopenError = OpenError;
