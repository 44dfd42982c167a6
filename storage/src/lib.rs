//! Ordered, revisioned, opaque values: the storage contract and its adapters.
//!
//! A store maps `(space, key)` to a value and never knows what is in one. Rows of a space are
//! ordered by the bytes of their key. All changes arrive as [`Commit`] values: requirements on
//! rows, and writes that happen if and only if all of them hold. Several commits travel as one
//! group; the accepted ones of a group, and what the caller appends to them through [`Finish`],
//! are one atomic and durable transaction that carries one [`Revision`].
//!
//! * [`memory::Memory`] is the reference, and the model other stores are compared with.
//! * [`redb::Redb`] keeps everything in one file, with a journal beside it while it is open.
//! * `postgres::Postgres` keeps it in PostgreSQL or CockroachDB, where several nodes may share it; in
//!   builds with the feature `postgres`.
//!
//! [`replica`] keeps one store equal to another, of whatever kind the two are, and
//! [`replicated::Replicated`] is a store that does so by itself while it is written to.
//!
//! Futures of the first two are ready when first polled. Polling `commit` of a store on disk blocks
//! the thread until the disk has synced, so callers give commits a thread of their own. Futures of a
//! store in a database wait for it, on any executor.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod commit;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod memory;
mod notes;
mod peers;
#[cfg(feature = "postgres")]
pub mod postgres;
mod range;
pub mod redb;
pub mod replica;
pub mod replicated;
#[cfg(feature = "conformance")]
pub mod simulation;

use std::path::PathBuf;

use bytes::Bytes;
use futures::future::BoxFuture;

pub use commit::{
    Applied, Commit, Committed, Conflict, Finish, MAX_GROUP_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES,
    NoFinish, Replaced, Require, Write,
};
pub use error::{
    Abort, ChangesError, CommitError, OpenError, ReadError, ReopenError, StoreError, TooLarge,
};
pub use notes::Notes;
pub use peers::{Look, Peer, Peers};
pub use range::{KeyRange, all, from, prefix};

/// A namespace of rows. What the numbers mean is the caller's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Space(pub u8);

/// The number of a committed group: 1 for the first, one more for each that follows, and 0 for
/// a store to which nothing has been committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision of a store to which nothing has been committed.
    pub const EMPTY: Self = Self(0);
}

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a row is: its space and its key, 0 to [`MAX_KEY_BYTES`] bytes long.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// The namespace.
    pub space: Space,
    /// The key within it.
    pub key: Vec<u8>,
}

impl RowKey {
    /// The row `key` of `space`.
    pub fn new(space: Space, key: impl Into<Vec<u8>>) -> Self {
        Self { space, key: key.into() }
    }
}

impl std::fmt::Debug for RowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/", self.space.0)?;
        self.key.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A row as it was read.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key within the space that was asked.
    pub key: Vec<u8>,
    /// The value, exactly as it was put.
    pub value: Bytes,
    /// The revision that last wrote the row.
    pub revision: Revision,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("key_len", &self.key.len())
            .field("value_len", &self.value.len())
            .field("revision", &self.revision)
            .finish()
    }
}

/// Revisions, oldest first, and the rows that each wrote.
pub type Changes = Vec<(Revision, Vec<RowKey>)>;

/// The order in which a scan walks the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Smallest key first.
    Forward,
    /// Largest key first.
    Backward,
}

/// Whether a store takes commits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Reads and commits are served.
    Ready,
    /// An operation on the medium failed, for this reason. Nothing is served until
    /// [`Store::reopen`] succeeds.
    NeedsReopen(StoreError),
}

/// What a store says about itself. Taken without waiting for the medium, so that it answers
/// when nothing else does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreStatus {
    /// The adapter: `memory`, `redb`, `postgres`, `cockroachdb`.
    pub kind: &'static str,
    /// The file, where there is one.
    pub path: Option<PathBuf>,
    /// Drawn at random when the store was created; copies of a file share it.
    pub id: [u8; 16],
    /// Size on disk, where it is known.
    pub bytes: Option<u64>,
    /// Number of rows in all spaces, where it is known.
    pub rows: Option<u64>,
    /// The last revision known to be durable.
    pub revision: Revision,
    /// 1 after the first opening, and greater after each call of [`Store::reopen`].
    pub generation: u64,
    /// Whether it serves.
    pub health: Health,
}

/// One consistent revision of a store.
///
/// Short-lived: a store on disk cannot reuse the space of anything a snapshot can still see.
pub trait Snapshot: Send + Sync {
    /// The last group this snapshot contains, whole; of any later one it contains nothing.
    fn revision(&self) -> Revision;

    /// The row `key` of `space`, or `None` if there is no such row.
    ///
    /// # Errors
    /// [`ReadError`], after which the snapshot is of no further use.
    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>>;

    /// At most `limit` rows of `space` whose keys lie in `range`, in order. A range that ends
    /// before it starts is empty.
    ///
    /// # Errors
    /// [`ReadError`]; never a part of the answer.
    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>>;

    /// How many rows of `space` have keys that lie in `range`, at most `limit`.
    ///
    /// # Errors
    /// [`ReadError`].
    fn count(
        &self,
        space: Space,
        range: KeyRange,
        limit: usize,
    ) -> BoxFuture<'_, Result<usize, ReadError>> {
        Box::pin(async move { Ok(self.scan(space, range, Direction::Forward, limit).await?.len()) })
    }
}

/// Rows, and the one way to change them.
pub trait Store: Send + Sync + 'static {
    /// The rows as they are now. It sees every commit acknowledged before the call, and only
    /// what is durable.
    ///
    /// # Errors
    /// [`ReadError`].
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>>;

    /// Commits a group.
    ///
    /// The requirements of each commit are checked in the order of the group, against the rows
    /// as the accepted commits before it have left them. A row written earlier in the same group
    /// satisfies [`Require::Present`] and fails the other two; a row deleted earlier in it
    /// satisfies [`Require::Absent`] alone. A commit with a requirement that fails is left out by
    /// itself; its [`Conflict`] is its outcome.
    ///
    /// All accepted commits, and then the writes that `finish` returns, become one transaction
    /// and one revision, durable when the future resolves. Of several writes to one row the last
    /// counts. If no commit is accepted there is no transaction: `finish` is not called and the
    /// revision stays what it was.
    ///
    /// A call that has begun is not undone by dropping its future.
    ///
    /// # Errors
    /// Every [`CommitError`] but [`CommitError::OutcomeUnknown`] means that nothing was applied.
    /// After `OutcomeUnknown` all of the group is durable or none of it, and only
    /// [`Store::reopen`] can tell.
    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>>;

    /// The rows written by each revision after `after`, oldest revision first, at most `limit`
    /// revisions. Rows are listed once each, in order of space and key, deleted ones included;
    /// the values are to be read from a snapshot.
    ///
    /// # Errors
    /// [`ChangesError::Trimmed`] if a revision after `after` is no longer listed,
    /// [`ChangesError::Ahead`] if `after` has never been committed here.
    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>>;

    /// Closes the medium and opens it again, and returns the revision that is durable there.
    /// Required after [`CommitError::OutcomeUnknown`], allowed at any time. Snapshots taken
    /// before may fail from then on.
    ///
    /// # Errors
    /// [`ReopenError`]; the store goes on refusing, and the call may be repeated.
    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>>;

    /// What the store says about itself.
    fn status(&self) -> StoreStatus;

    /// The other nodes that have the store open, where several may.
    fn peers(&self) -> Option<&dyn Peers> {
        None
    }

    /// [`Snapshot::get`] on a fresh snapshot.
    ///
    /// # Errors
    /// [`ReadError`].
    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        Box::pin(async move { self.snapshot().await?.get(space, key).await })
    }

    /// [`Snapshot::scan`] on a fresh snapshot.
    ///
    /// # Errors
    /// [`ReadError`].
    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>> {
        Box::pin(async move {
            let snapshot = self.snapshot().await?;
            snapshot.scan(space, range, direction, limit).await
        })
    }
}
