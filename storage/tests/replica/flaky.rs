//! A store that fails before and after commits.

use std::sync::Arc;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use polykey_storage::{
    Changes, ChangesError, Commit, CommitError, Committed, Finish, ReadError, ReopenError,
    Revision, Snapshot, Store, StoreError, StoreStatus, conformance::Rng,
};

/// How often commits failed, by whether they were done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) done: usize,
    pub(crate) undone: usize,
}

/// A store that fails a third of its commits, in one way or the other, and then wants to be reopened.
pub(crate) struct Flaky {
    store: Arc<dyn Store>,
    state: Mutex<State>,
}

struct State {
    rng: Rng,
    seen: Seen,
    calm: bool,
    closed: bool,
    // Fails the commit after so many, and no other.
    after: Option<usize>,
}

impl Flaky {
    pub(crate) fn new(store: Arc<dyn Store>, seed: u64) -> Self {
        let rng = Rng::new(seed);
        let (seen, calm, closed, after) = (Seen::default(), false, false, None);
        Self { store, state: Mutex::new(State { rng, seen, calm, closed, after }) }
    }

    /// No failures meanwhile.
    pub(crate) fn calm(&self, work: impl FnOnce()) {
        self.state.lock().calm = true;
        work();
        self.state.lock().calm = false;
    }

    /// The commit after so many fails, and none before.
    pub(crate) fn fail_after(&self, commits: usize) {
        self.state.lock().after = Some(commits);
    }

    pub(crate) fn seen(&self) -> Seen {
        self.state.lock().seen
    }

    fn fails(&self) -> Result<Option<bool>, CommitError> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(CommitError::ReadOnly);
        }
        let strikes = match &mut state.after {
            Some(0) => true,
            Some(after) => {
                *after -= 1;
                false
            }
            None => !state.calm && state.rng.chance(35),
        };
        let done = strikes.then(|| state.rng.chance(50));
        if let Some(done) = done {
            state.closed = true;
            state.seen.done += usize::from(done);
            state.seen.undone += usize::from(!done);
        }
        Ok(done)
    }
}

impl Store for Flaky {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        self.store.snapshot()
    }

    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move {
            let lost = || CommitError::OutcomeUnknown(injected());
            match self.fails()? {
                None => self.store.commit(group, finish).await,
                Some(true) => {
                    self.store.commit(group, finish).await?;
                    Err(lost())
                }
                Some(false) => Err(lost()),
            }
        })
    }

    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>> {
        self.store.changes(after, limit)
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        self.state.lock().closed = false;
        self.store.reopen()
    }

    fn status(&self) -> StoreStatus {
        self.store.status()
    }
}

/// What the failures are.
pub(crate) fn injected() -> StoreError {
    StoreError::Other("injected".into())
}
