//! What each kind of background work does, for people: how much of it runs, when it last ran, how long that
//! took and what went wrong.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polykey_proto::polykey::record::v1::job_record::Kind;

use crate::error::Error;
use crate::time::{Clock, Time};

/// Longest text of a failure, in characters.
const WORDS: usize = 512;

/// One kind of work.
#[derive(Debug)]
pub struct Work {
    /// What it is called.
    pub name: &'static str,
    /// What may run at once.
    pub workers: u32,
    running: AtomicU32,
    done: AtomicU64,
    failed: AtomicU64,
    last: Mutex<Last>,
    next: Mutex<Option<Time>>,
}

/// How work ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Last {
    /// When; none: it never ran.
    pub at: Option<Time>,
    /// How long it took.
    pub took: Duration,
    /// Why it last failed, if it has not succeeded since.
    pub error: Option<String>,
}

/// Figures of one kind of work, since the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// What runs just now.
    pub running: u32,
    /// How often it was done.
    pub done: u64,
    /// How often it failed.
    pub failed: u64,
    /// How it last ended.
    pub last: Last,
    /// When it is looked at next, where that is not in the schedule.
    pub next: Option<Time>,
}

struct Running<'a>(&'a Work);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Relaxed);
    }
}

impl Work {
    fn new(name: &'static str, workers: usize) -> Self {
        Self {
            name,
            workers: u32::try_from(workers).unwrap_or(u32::MAX),
            running: AtomicU32::new(0),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            last: Mutex::default(),
            next: Mutex::default(),
        }
    }

    /// Carries out work, and notes how it went.
    ///
    /// # Errors
    /// Those of the work.
    pub async fn track<T>(
        &self,
        clock: &Clock,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let words = |error: &Error| match error.internal_text() {
            Some(internal) => format!("{error}: {internal}"),
            None => error.to_string(),
        };
        self.track_as(clock, work, words).await
    }

    /// As [`Self::track`], of work with errors of its own, in these words.
    ///
    /// # Errors
    /// Those of the work.
    pub async fn track_as<T, E>(
        &self,
        clock: &Clock,
        work: impl Future<Output = Result<T, E>>,
        words: impl FnOnce(&E) -> String,
    ) -> Result<T, E> {
        self.running.fetch_add(1, Relaxed);
        let running = Running(self);
        let begun = Instant::now();
        let result = work.await;
        drop(running);
        let error = result.as_ref().err().map(|error| words(error).chars().take(WORDS).collect());
        let count = if error.is_none() { &self.done } else { &self.failed };
        count.fetch_add(1, Relaxed);
        *self.last.lock() = Last { at: Some(clock.now()), took: begun.elapsed(), error };
        result
    }

    /// Notes when it is looked at next.
    pub fn expect(&self, next: Option<Time>) {
        *self.next.lock() = next;
    }

    /// Its figures.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            running: self.running.load(Relaxed),
            done: self.done.load(Relaxed),
            failed: self.failed.load(Relaxed),
            last: self.last.lock().clone(),
            next: *self.next.lock(),
        }
    }
}

/// All kinds of work.
#[derive(Debug)]
pub struct Ledger {
    jobs: [(Kind, Work); 6],
    other: Work,
    /// Forgetting what has expired.
    pub sweep: Work,
    /// Comparing every row with the head after opening.
    pub verify: Work,
    /// Bringing old leaves of the audit log into archives.
    pub archive: Work,
}

impl Ledger {
    pub(super) fn new(workers: usize) -> Self {
        let job = |kind, name| (kind, Work::new(name, workers));
        Self {
            jobs: [
                job(Kind::Rotate, "rotate"),
                job(Kind::Promote, "promote"),
                job(Kind::EndGrace, "end-grace"),
                job(Kind::Revoke, "revoke"),
                job(Kind::Destroy, "destroy"),
                job(Kind::NotifyExpiry, "notify-expiry"),
            ],
            other: Work::new("other", workers),
            sweep: Work::new("sweep", 1),
            verify: Work::new("verify", 1),
            archive: Work::new("archive", 1),
        }
    }

    /// The work of a kind of job.
    #[must_use]
    pub fn of(&self, kind: Kind) -> &Work {
        let found = self.jobs.iter().find(|(known, _)| *known == kind);
        found.map_or(&self.other, |(_, work)| work)
    }

    /// All of it, and the kind of job that it is, if it is one.
    pub fn all(&self) -> impl Iterator<Item = (Option<Kind>, &Work)> {
        let jobs = self.jobs.iter().map(|(kind, work)| (Some(*kind), work));
        jobs.chain([(None, &self.sweep), (None, &self.verify), (None, &self.archive)])
    }
}
