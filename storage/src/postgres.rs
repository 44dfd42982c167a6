//! The store on PostgreSQL 14 and later, and on CockroachDB: a few tables, and one serializable
//! transaction a group.
//!
//! `head` is one row: whose store this is, the epoch that may write, the last revision. Each group
//! locks it first, so that writers on any number of nodes queue there and [`Finish`] is asked when
//! nobody can be faster any more; and each group advances it, under its epoch and revision or not at
//! all. `rows` holds the rows, `changes` what each of the last revisions wrote. Everything goes over
//! the wire in two round trips a group: what is required and replaced, then what is written and the
//! `COMMIT`.
//!
//! **Retries.** A transaction that the database rolled back for the sake of another is run again
//! until the deadline. [`Finish`] is asked once all the same: what it returned still fits if the
//! revision is what it was, for every change changes it. If another writer was faster, the group
//! comes back as [`CommitError::Aborted`] with [`Overtaken`]: nothing was applied, and whoever formed
//! it reads again and forms another.
//!
//! **Outcomes.** A group whose `COMMIT` was not answered is
//! [`OutcomeUnknown`](CommitError::OutcomeUnknown). Each leaves a random id beside its revision, by
//! which [`Store::reopen`] finds out what became of it, after a write of its own that no earlier
//! transaction can outlive.
//!
//! **Fencing.** [`Postgres::take_over`] raises the epoch; whoever opened the store under an earlier
//! one commits nothing from then on, and reads on.
//!
//! Connections live in two threads of the adapter's own, so that its futures may be polled anywhere.
//! Every call ends by [`Options::call_timeout`]. A connection is only used if the same cluster
//! answers, on no earlier timeline and at no earlier revision than this process has seen.
//!
//! What the tables are, and why each statement is CockroachDB's too, is in `docs/storage.md`.

mod connection;
mod failure;
#[cfg(feature = "conformance")]
mod faults;
mod group;
mod notes;
mod opening;
mod options;
mod peers;
mod pool;
mod schema;
mod snapshot;
mod statements;
mod target;
mod tls;

use std::{fmt, sync::Arc};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{
    runtime::{Handle, Runtime},
    sync::oneshot,
    task::JoinHandle,
    time::Instant,
};

use self::{
    connection::{Cluster, Connection},
    failure::Failure,
    group::Question,
    pool::Pool,
    target::Target,
};
use crate::{
    Applied, Changes, ChangesError, Commit, CommitError, Committed, Direction, Entry, Finish,
    Health, KeyRange, OpenError, Peers, ReadError, ReopenError, Revision, Snapshot, Space, Store,
    StoreError, StoreStatus, commit, memory,
};

pub use options::{Durability, Options};
pub use target::PasswordSource;

/// The version of the tables that this program makes, and the newest it works with.
pub const SCHEMA: u32 = 2;

/// Threads that drive the connections.
const THREADS: usize = 2;

/// What became of a group whose outcome had been unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The revision the group would have had.
    pub revision: Revision,
    /// Whether it is durable.
    pub durable: bool,
}

/// Another node committed while a group was being committed here, so that what [`Finish`] had
/// returned fits no more. Nothing was applied: read again, and commit anew.
///
/// The reason within [`CommitError::Aborted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another node committed revision {current} while this group was to follow {expected}")]
pub struct Overtaken {
    /// The revision that the group was decided on.
    pub expected: Revision,
    /// The revision of the store now.
    pub current: Revision,
}

/// A store in a database.
///
/// [`StoreStatus::kind`] is `postgres` or `cockroachdb`. A store that was fenced says so in its
/// health, refuses commits as [`CommitError::ReadOnly`], and goes on reading.
pub struct Postgres {
    inner: Arc<Inner>,
    // None once it is being dropped.
    runtime: Option<Runtime>,
}

// What connections need to know.
struct Context {
    options: Options,
    target: Target,
    // Drawn at random: tells the sessions of this store from others.
    instance: String,
    #[cfg(feature = "conformance")]
    faults: faults::Faults,
}

impl Context {
    fn application(&self, generation: u64) -> String {
        format!("polykey {}/{generation}", self.instance)
    }
}

struct Inner {
    context: Arc<Context>,
    handle: Handle,
    // One group at a time, and no reopening meanwhile.
    writer: tokio::sync::Mutex<Option<Connection>>,
    readers: Pool,
    // What tells this node of others does not queue behind what it does for callers.
    watchers: Pool,
    known: Mutex<Known>,
}

// What is known without asking the database.
struct Known {
    kind: &'static str,
    id: [u8; 16],
    // The epoch that this node writes under.
    epoch: u64,
    revision: Revision,
    rows: u64,
    generation: u64,
    failure: Option<StoreError>,
    // The epoch by which this node is fenced.
    fenced_by: Option<u64>,
    cluster: Option<Cluster>,
    durability: Durability,
    in_doubt: Option<InDoubt>,
    outcome: Option<Outcome>,
}

// A group whose COMMIT was not answered.
#[derive(Clone, Copy)]
struct InDoubt {
    revision: Revision,
    group: [u8; 16],
}

// The row `head`.
#[derive(Clone, Copy, Debug)]
struct Head {
    id: [u8; 16],
    epoch: u64,
    revision: Revision,
    rows: u64,
}

impl Inner {
    fn options(&self) -> &Options {
        &self.context.options
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.options().call_timeout
    }

    // The generation, unless nothing is served; and the revision that no answer may be behind.
    fn serving(&self) -> Option<(u64, Revision)> {
        let known = self.known.lock();
        known.failure.is_none().then_some((known.generation, known.revision))
    }

    // Serves nothing until a reopening has succeeded, if this is about the opening in force.
    fn latch(&self, generation: u64, error: &StoreError) {
        let mut known = self.known.lock();
        if known.generation == generation && known.failure.is_none() {
            known.failure = Some(error.clone());
        }
    }

    // Notes what a failure means for the store, and translates it for a reader.
    fn read_error(&self, generation: u64, failure: Failure) -> ReadError {
        if failure.latches() {
            self.latch(generation, &failure.error);
        }
        ReadError::Store(failure.error)
    }

    // Compares what a connection has read with what this node has seen before.
    fn check_head(&self, head: &Head, floor: Revision) -> Result<(), Failure> {
        let mut known = self.known.lock();
        if head.id != known.id {
            return Err(Failure::foreign("another store stands in the schema"));
        }
        if head.revision < floor {
            let found = head.revision;
            return Err(Failure::foreign(format!(
                "it is back at revision {found}, and {floor} was acknowledged: a standby that \
                 lagged was promoted, or a backup restored"
            )));
        }
        if head.revision > known.revision {
            known.revision = head.revision;
            known.rows = head.rows;
        }
        if head.epoch != known.epoch {
            known.fenced_by = Some(head.epoch);
        }
        Ok(())
    }

    fn open_error(&self, error: StoreError) -> OpenError {
        OpenError::Store { path: self.context.target.name.clone().into(), error }
    }
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres")
            .field("database", &self.inner.context.target.name)
            .field("schema", &self.inner.options().schema)
            .finish_non_exhaustive()
    }
}

impl Postgres {
    /// Opens the store in a database, and makes the tables if there are none or they are of an
    /// earlier version. Blocks, at most for [`Options::call_timeout`] and some.
    ///
    /// # Errors
    /// [`OpenError`], with the connection string for a path.
    pub fn open(options: Options) -> Result<Self, OpenError> {
        let unusable =
            |why| OpenError::Store { path: "postgres".into(), error: StoreError::Other(why) };
        options.check().map_err(unusable)?;
        let target = Target::parse(&options.url, options.password.clone(), options.connect_timeout);
        let target = target.map_err(unusable)?;
        let name = target.name.clone();
        let failed = |error| OpenError::Store { path: name.clone().into(), error };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("polykey-postgres")
            .enable_all()
            .build()
            .map_err(|error| failed(error.into()))?;
        let instance = memory::random_id().map_err(failed)?;
        let inner = Arc::new(Inner {
            handle: runtime.handle().clone(),
            writer: tokio::sync::Mutex::new(None),
            readers: Pool::new(options.connections),
            watchers: Pool::new(2),
            known: Mutex::new(Known {
                kind: "postgres",
                id: [0; 16],
                epoch: 0,
                revision: Revision::EMPTY,
                rows: 0,
                generation: 0,
                failure: None,
                fenced_by: None,
                cluster: None,
                durability: Durability::default(),
                in_doubt: None,
                outcome: None,
            }),
            context: Arc::new(Context {
                options,
                target,
                instance: instance.iter().take(8).map(|byte| format!("{byte:02x}")).collect(),
                #[cfg(feature = "conformance")]
                faults: faults::Faults::default(),
            }),
        });
        let store = Self { inner: Arc::clone(&inner), runtime: Some(runtime) };
        // Works within any runtime, and without one.
        let (done, opened) = std::sync::mpsc::sync_channel(1);
        store.inner.handle.spawn(async move {
            let _ = done.send(opening::reopen(&inner).await);
        });
        match opened.recv() {
            Ok(Ok(_)) => Ok(store),
            // To read from it, nobody has to be allowed to write.
            Ok(Err(OpenError::Store { error: StoreError::Fenced { .. }, .. })) => Ok(store),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(store.inner.open_error(interrupted())),
        }
    }

    /// What the database does for the durability of commits, as it was when the store was opened
    /// last.
    #[must_use]
    pub fn durability(&self) -> Durability {
        self.inner.known.lock().durability.clone()
    }

    /// The epoch that this node writes under.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.inner.known.lock().epoch
    }

    /// What the last reopening found out about the group whose outcome was unknown before it, if
    /// there was one.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.inner.known.lock().outcome
    }

    /// Raises the epoch and goes on writing under it, and returns it: every other node that has the
    /// store open commits nothing from then on. For a promotion.
    ///
    /// # Errors
    /// [`StoreError`]; whether the epoch was raised is then unknown, and the call may be repeated.
    pub fn take_over(&self) -> BoxFuture<'_, Result<u64, StoreError>> {
        let inner = Arc::clone(&self.inner);
        let task = self.inner.handle.spawn(async move { opening::take_over(&inner).await });
        Box::pin(async move { task.await.unwrap_or_else(|_| Err(interrupted())) })
    }

    /// Has the server fail statements with a serialization failure: those for which `strikes` says
    /// so, which is asked for each that can be run again.
    #[cfg(feature = "conformance")]
    pub fn inject(&self, strikes: impl FnMut() -> bool + Send + 'static) {
        self.inner.context.faults.set(strikes);
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ReadError>> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, ReadError>> {
        joined(self.inner.handle.spawn(work))
    }
}

fn interrupted() -> StoreError {
    StoreError::Other("interrupted: the store was closed, or by a panic".into())
}

// The answer of a task, wherever it is awaited.
fn joined<'a, T: Send + 'a>(
    task: JoinHandle<Result<T, ReadError>>,
) -> BoxFuture<'a, Result<T, ReadError>> {
    Box::pin(async move { task.await.unwrap_or_else(|_| Err(ReadError::Store(interrupted()))) })
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waits for nothing, and may be called within another runtime.
            runtime.shutdown_background();
        }
    }
}

impl Store for Postgres {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        let inner = Arc::clone(&self.inner);
        self.run(async move {
            let snapshot = snapshot::begin(&inner).await?;
            Ok(Box::new(snapshot) as Box<dyn Snapshot>)
        })
    }

    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move {
            commit::check_group(&group)?;
            let (ask, asked) = oneshot::channel::<Question>();
            let inner = Arc::clone(&self.inner);
            let beneath = finish.beneath();
            let task = self.inner.handle.spawn(group::commit(inner, (group, beneath), ask));
            // Asked here, because it may borrow anything of the caller's.
            if let Ok(Question { revision, accepted, replaced, beneath, reply }) = asked.await {
                let (accepted, replaced) = (&accepted, &replaced);
                let applied = Applied { revision, accepted, replaced, beneath: &beneath };
                let answer = finish.finish(&applied).map_err(CommitError::Aborted);
                let answer = answer.and_then(|writes| {
                    commit::writes_size(&writes)?;
                    Ok(writes)
                });
                // If nobody waits any more, the task says why.
                let _ = reply.send(answer);
            }
            match task.await {
                Ok(committed) => committed,
                Err(_) => {
                    let error = interrupted();
                    self.inner.known.lock().failure.get_or_insert(error.clone());
                    Err(CommitError::OutcomeUnknown(error))
                }
            }
        })
    }

    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>> {
        let inner = Arc::clone(&self.inner);
        let task = self
            .run(async move { Ok(snapshot::changes(&inner, &inner.readers, after, limit).await) });
        Box::pin(async move { task.await? })
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        let inner = Arc::clone(&self.inner);
        let task = self.inner.handle.spawn(async move { opening::reopen(&inner).await });
        Box::pin(
            async move { task.await.unwrap_or_else(|_| Err(self.inner.open_error(interrupted()))) },
        )
    }

    fn status(&self) -> StoreStatus {
        let known = self.inner.known.lock();
        let fenced =
            known.fenced_by.map(|current| StoreError::Fenced { own: known.epoch, current });
        StoreStatus {
            kind: known.kind,
            path: None,
            id: known.id,
            bytes: None,
            rows: Some(known.rows),
            revision: known.revision,
            generation: known.generation,
            health: match known.failure.clone().or(fenced) {
                None => Health::Ready,
                Some(failure) => Health::NeedsReopen(failure),
            },
        }
    }

    fn peers(&self) -> Option<&dyn Peers> {
        Some(self)
    }

    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        let (inner, key) = (Arc::clone(&self.inner), key.to_vec());
        self.run(async move { snapshot::get(&inner, space, &key).await })
    }

    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>> {
        let inner = Arc::clone(&self.inner);
        self.run(async move { snapshot::scan(&inner, space, range, direction, limit).await })
    }
}
