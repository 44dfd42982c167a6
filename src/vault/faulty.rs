//! A store that fails for ever from its N-th commit on, for tests of what a crash leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::BoxFuture;
use parking_lot::{Condvar, Mutex};
use polykey_storage::{
    ChangesError, Commit, CommitError, Committed, Finish, OpenError, ReadError, Revision, RowKey,
    Snapshot, Store, StoreError, StoreStatus,
};

/// When the medium dies within the commit that kills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dies {
    /// Before anything is durable.
    Before,
    /// After everything is, and before anyone hears of it.
    After,
}

/// See the module.
pub(crate) struct Faulty {
    inner: Arc<dyn Store>,
    commits: AtomicU64,
    last: AtomicU64,
    dies: Dies,
    /// Whether reopening works, once; the commits after it do too.
    heals: bool,
    /// While it is set, a commit lasts.
    held: (Mutex<bool>, Condvar),
}

impl Faulty {
    pub(crate) fn new(inner: Arc<dyn Store>, last: u64, dies: Dies, heals: bool) -> Self {
        let (commits, last) = (AtomicU64::new(0), AtomicU64::new(last));
        Self { inner, commits, last, dies, heals, held: Default::default() }
    }

    pub(crate) fn commits(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }

    /// Has each commit last until this is taken back.
    pub(crate) fn hold(&self, held: bool) {
        *self.held.0.lock() = held;
        self.held.1.notify_all();
    }

    fn wait(&self) {
        let (held, changed) = &self.held;
        changed.wait_while(&mut held.lock(), |held| *held);
    }

    /// Dies within the next commit.
    pub(crate) fn kill(&self) {
        self.last.store(self.commits(), Ordering::SeqCst);
    }

    fn dead(&self) -> bool {
        self.commits() > self.last.load(Ordering::SeqCst)
    }

    fn error() -> StoreError {
        StoreError::Other("injected".into())
    }
}

impl Store for Faulty {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        Box::pin(async {
            if self.dead() { Err(ReadError::NeedsReopen) } else { self.inner.snapshot().await }
        })
    }

    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move {
            if self.dead() {
                return Err(CommitError::ReadOnly);
            }
            let number = self.commits.fetch_add(1, Ordering::SeqCst) + 1;
            self.wait();
            let last = self.last.load(Ordering::SeqCst);
            if number > last && self.dies == Dies::Before {
                return Err(CommitError::OutcomeUnknown(Self::error()));
            }
            let committed = self.inner.commit(group, finish).await?;
            if number > last {
                return Err(CommitError::OutcomeUnknown(Self::error()));
            }
            Ok(committed)
        })
    }

    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(Revision, Vec<RowKey>)>, ChangesError>> {
        self.inner.changes(after, limit)
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, OpenError>> {
        Box::pin(async {
            if self.dead() && !self.heals {
                return Err(OpenError::NotFound { path: "injected".into() });
            }
            self.last.store(u64::MAX, Ordering::SeqCst);
            self.inner.reopen().await
        })
    }

    fn status(&self) -> StoreStatus {
        self.inner.status()
    }
}
