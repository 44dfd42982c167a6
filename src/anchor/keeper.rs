//! Keeps the anchor of an open store up to date, on a thread of its own: its medium may be slow, or away.
//!
//! A change that takes a right away waits for its anchor, for at most 2 s; any other is anchored within a
//! second in a file, and within 10 s in a token. Where the anchor cannot be written, changes go on without it and health says so: a revocation
//! that an older store would undo is worth more than none.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use polykey_hsm::BoxFuture;
use polykey_storage::Revision;
use tokio::sync::oneshot;

use super::{Anchored, Medium};
use crate::error::Error;
use crate::health::State;
use crate::time::Time;
use crate::vault::{Vault, Witness};

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
    pub medium: String,
    /// The revision that it is known to hold, and when it was written.
    pub anchored: Option<(Revision, Time)>,
    /// Why it cannot be written.
    pub trouble: Option<String>,
}

#[derive(Default)]
struct Work {
    waiting: Vec<oneshot::Sender<()>>,
    /// When the write began that goes on.
    writing: Option<Instant>,
    anchored: Option<(Revision, Time)>,
    /// The counter of the head that is anchored, and when it was written.
    counter: Option<(u64, Instant)>,
    trouble: Option<String>,
    stop: bool,
}

struct Shared {
    medium: Medium,
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
    /// One that writes the anchor of a vault. Needs a runtime.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(medium: Medium, vault: &Arc<Vault>) -> std::io::Result<Arc<Self>> {
        let shared = Shared { medium, work: Mutex::default(), wake: Condvar::new() };
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
        Status { medium: self.shared.medium.to_string(), anchored: work.anchored, trouble }
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

    /// Waits until the store is anchored as it is now, or until it is known that it cannot be for now.
    pub async fn now(&self) {
        let answer = {
            let mut work = self.shared.work.lock();
            // Nobody waits for a medium that does not answer already.
            if work.writing.is_some_and(|began| began.elapsed() >= PATIENCE) {
                return;
            }
            let (tell, answer) = oneshot::channel();
            work.waiting.push(tell);
            answer
        };
        self.shared.wake.notify_all();
        let timer = self.runtime.spawn(tokio::time::sleep(PATIENCE));
        let stop = timer.abort_handle();
        futures::future::select(answer, timer).await;
        stop.abort();
    }

    /// As [`Self::now`], and tells of a failure.
    ///
    /// # Errors
    /// [`Error::Unavailable`] with the reason.
    pub async fn settle(&self) -> Result<(), Error> {
        self.now().await;
        match self.status().trouble {
            None => Ok(()),
            Some(trouble) => {
                let medium = &self.shared.medium;
                Err(Error::unavailable(format!("the anchor {medium} cannot be written: {trouble}")))
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

impl Witness for Keeper {
    fn witness(&self, _: Revision, urgent: bool) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            // Whatever else changes is found by looking.
            if urgent {
                self.now().await;
            }
            Ok(())
        })
    }
}

impl Shared {
    fn run(&self, vault: &Weak<Vault>) {
        while let Some(waiting) = self.next() {
            let Some(vault) = vault.upgrade() else { return };
            // After whoever asked: what is published is durable, so this is never ahead.
            let anchored = Anchored::now(&vault);
            let written = if self.begin(anchored.mark.counter) {
                let text = anchored.encode(&vault.ring());
                // The store may be closed while the medium takes its time.
                drop(vault);
                Some(self.medium.replace(&text))
            } else {
                None
            };
            if let Some(written) = written {
                self.done(&anchored, written);
            }
            // Whoever has gone away has its anchor all the same.
            for waiter in waiting {
                let _ = waiter.send(());
            }
        }
    }

    /// Waits until it is time to look, or until somebody asks; `None` at the end.
    fn next(&self) -> Option<Vec<oneshot::Sender<()>>> {
        let mut work = self.work.lock();
        let pause = if work.trouble.is_some() { AGAIN } else { self.medium.rest() };
        let until = Instant::now() + pause;
        while !work.stop && work.waiting.is_empty() {
            if self.wake.wait_until(&mut work, until).timed_out() {
                break;
            }
        }
        (!work.stop).then(|| std::mem::take(&mut work.waiting))
    }

    /// Whether there is anything to write.
    fn begin(&self, counter: u64) -> bool {
        let mut work = self.work.lock();
        let there = work.counter.is_some_and(|(anchored, written)| {
            let lasts = self.medium.refreshed().is_none_or(|after| written.elapsed() < after);
            anchored == counter && lasts
        });
        if there && work.trouble.is_none() {
            return false;
        }
        work.writing = Some(Instant::now());
        true
    }

    fn done(&self, anchored: &Anchored, written: std::io::Result<()>) {
        let medium = &self.medium;
        let mut work = self.work.lock();
        work.writing = None;
        match written {
            Ok(()) => {
                work.anchored = Some((anchored.mark.revision, anchored.at));
                work.counter = Some((anchored.mark.counter, Instant::now()));
                if work.trouble.take().is_some() {
                    let revision = anchored.mark.revision.0;
                    tracing::info!(%medium, revision, "the anchor is written again");
                }
            }
            Err(error) => {
                if work.trouble.is_none() {
                    tracing::error!(%medium, %error, "the anchor cannot be written; changes go on without it");
                }
                work.trouble = Some(error.to_string());
            }
        }
    }
}
