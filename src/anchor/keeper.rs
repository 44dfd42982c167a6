//! Keeps the anchor of an open store up to date, on a thread of its own: its medium may be slow, or away.
//!
//! A change that takes a right away waits for its anchor, for at most 2 s; any other is anchored within a
//! second. Where the anchor cannot be written, changes go on without it and health says so: a revocation
//! that an older store would undo is worth more than none.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use polykey_storage::Revision;
use tokio::sync::oneshot;

use super::{Anchored, file};
use crate::error::Error;
use crate::health::State;
use crate::time::Time;
use crate::vault::Vault;

/// How long the first change without an anchor waits for others that go into the same one.
const GATHER: Duration = Duration::from_millis(500);
/// How long a change that takes a right away waits.
const PATIENCE: Duration = Duration::from_secs(2);
/// A write that takes longer than this is told in health.
const SLOW: Duration = Duration::from_secs(5);
/// How soon a write that has failed is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// What is known of the anchor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Where it is.
    pub path: PathBuf,
    /// The revision that it is known to hold, and when it was written.
    pub anchored: Option<(Revision, Time)>,
    /// Why it cannot be written.
    pub trouble: Option<String>,
}

#[derive(Default)]
struct Work {
    /// Since when there has been a change without an anchor.
    since: Option<Instant>,
    waiting: Vec<oneshot::Sender<()>>,
    /// When the write began that goes on.
    writing: Option<Instant>,
    anchored: Option<(Revision, Time)>,
    trouble: Option<String>,
    stop: bool,
}

struct Shared {
    path: PathBuf,
    work: Mutex<Work>,
    wake: Condvar,
}

/// Whoever writes the anchor. Dropped, its thread ends.
pub struct Keeper {
    shared: Arc<Shared>,
    /// Where the timer of those who wait runs: the writer's thread has none.
    runtime: tokio::runtime::Handle,
}

impl Keeper {
    /// One that writes the anchor of a vault at `path`. Needs a runtime.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(path: &Path, vault: &Arc<Vault>) -> std::io::Result<Arc<Self>> {
        let shared = Shared { path: path.to_owned(), work: Mutex::default(), wake: Condvar::new() };
        let shared = Arc::new(shared);
        let (working, vault) = (Arc::clone(&shared), Arc::downgrade(vault));
        std::thread::Builder::new()
            .name("polykey-anchor".into())
            .spawn(move || working.run(&vault))?;
        Ok(Arc::new(Self { shared, runtime: tokio::runtime::Handle::current() }))
    }

    /// What is known of the anchor.
    #[must_use]
    pub fn status(&self) -> Status {
        let work = self.shared.work.lock();
        let slow = work.writing.is_some_and(|began| began.elapsed() >= SLOW);
        let trouble = work.trouble.clone();
        let trouble = trouble.or_else(|| slow.then(|| "its medium does not answer".to_owned()));
        Status { path: self.shared.path.clone(), anchored: work.anchored, trouble }
    }

    /// As health tells it.
    #[must_use]
    pub fn state(&self) -> State {
        match self.status().trouble {
            None => State::Serving,
            Some(_) => State::Degraded(
                "the anchor cannot be written (`polykey store status` says why): if an older copy of the \
                 store is put back, what has changed since would not be missed"
                    .into(),
            ),
        }
    }

    /// Notes that the store has changed. With `urgent`, waits until that is anchored, or until it is known
    /// that it cannot be for now.
    pub async fn changed(&self, urgent: bool) {
        let answer = {
            let mut work = self.shared.work.lock();
            work.since.get_or_insert_with(Instant::now);
            // Nobody waits for a medium that does not answer already.
            let hangs = work.writing.is_some_and(|began| began.elapsed() >= PATIENCE);
            (urgent && !hangs).then(|| {
                let (tell, answer) = oneshot::channel();
                work.waiting.push(tell);
                answer
            })
        };
        self.shared.wake.notify_all();
        if let Some(answer) = answer {
            let timer = self.runtime.spawn(tokio::time::sleep(PATIENCE));
            let stop = timer.abort_handle();
            futures::future::select(answer, timer).await;
            stop.abort();
        }
    }

    /// Anchors the store as it is.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with the reason.
    pub async fn settle(&self) -> Result<(), Error> {
        self.changed(true).await;
        match self.status().trouble {
            None => Ok(()),
            Some(trouble) => {
                let path = self.shared.path.display();
                Err(Error::unavailable(format!("the anchor {path} cannot be written: {trouble}")))
            }
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.shared.work.lock().stop = true;
        self.shared.wake.notify_all();
    }
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Shared {
    fn run(&self, vault: &Weak<Vault>) {
        while let Some(waiting) = self.next() {
            let Some(vault) = vault.upgrade() else { return };
            // After whoever asked: what is published is durable, so this is never ahead.
            let anchored = Anchored::now(&vault);
            let text = anchored.encode(&vault.ring());
            // The store may be closed while the medium takes its time.
            drop(vault);
            let written = file::replace(&self.path, &text);
            self.done(&anchored, written);
            // Whoever has gone away has its anchor all the same.
            waiting.into_iter().for_each(|waiter| drop(waiter.send(())));
        }
    }

    /// Waits until something is to be written; `None` at the end.
    fn next(&self) -> Option<Vec<oneshot::Sender<()>>> {
        let mut work = self.work.lock();
        loop {
            if work.stop {
                return None;
            }
            let pause = if work.trouble.is_some() { AGAIN } else { GATHER };
            match work.since {
                Some(_) if !work.waiting.is_empty() => break,
                Some(since) if since.elapsed() >= pause => break,
                Some(since) => {
                    let rest = pause.saturating_sub(since.elapsed());
                    self.wake.wait_for(&mut work, rest);
                }
                None => self.wake.wait(&mut work),
            }
        }
        work.since = None;
        work.writing = Some(Instant::now());
        Some(std::mem::take(&mut work.waiting))
    }

    fn done(&self, anchored: &Anchored, written: std::io::Result<()>) {
        let path = self.path.display();
        let mut work = self.work.lock();
        work.writing = None;
        match written {
            Ok(()) => {
                work.anchored = Some((anchored.mark.revision, anchored.at));
                if work.trouble.take().is_some() {
                    tracing::info!(%path, revision = anchored.mark.revision.0, "the anchor is written again");
                }
            }
            Err(error) => {
                if work.trouble.is_none() {
                    tracing::error!(%path, %error, "the anchor cannot be written; changes go on without it");
                }
                work.trouble = Some(error.to_string());
                work.since.get_or_insert_with(Instant::now);
            }
        }
    }
}
