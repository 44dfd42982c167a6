//! Whether what a node remembers may be served, where other nodes change the same store.
//!
//! A node that looks at the store and forgets what others have changed may go on serving for a while
//! from the moment *before* it looked: its lease. Whoever revokes something waits until every node has
//! looked since, or its lease must have ended. So a request that begins after the acknowledgement meets
//! the revocation, or no answer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, watch};

use crate::error::Error;

/// The longest lease, and therefore the longest that a revocation waits for a node that does not
/// answer.
pub const LONGEST_LEASE: Duration = Duration::from_secs(1);
/// The longest that a request of a strict node waits for a look.
const PATIENCE: Duration = Duration::from_secs(1);

/// A moment, in nanoseconds by two clocks: one that goes on while the machine sleeps, and that of the
/// day, which goes on while a virtual machine is stopped if its host sets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    boot: u64,
    day: u64,
}

fn nanos(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(now.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec))
}

fn count(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Moment {
    /// Now.
    #[must_use]
    pub fn now() -> Self {
        Self { boot: nanos(ClockId::Boottime), day: nanos(ClockId::Realtime) }
    }

    /// How long ago it was.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(nanos(ClockId::Boottime).saturating_sub(self.boot))
    }
}

/// The lease of this node.
#[derive(Debug)]
pub struct Freshness {
    /// How long it is, counted from the start of a look.
    lease: Duration,
    /// Whether every request has a look of its own.
    strict: bool,
    until: AtomicU64,
    /// By the clock of the day, which may end a lease and never prolongs one.
    until_day: AtomicU64,
    looked: watch::Sender<u64>,
    asked: Notify,
    why: Mutex<String>,
}

impl Freshness {
    /// A node that has not looked yet. `lease` is at most [`LONGEST_LEASE`].
    #[must_use]
    pub fn new(lease: Duration, strict: bool) -> Self {
        Self {
            lease: lease.min(LONGEST_LEASE),
            strict,
            until: AtomicU64::new(0),
            until_day: AtomicU64::new(0),
            looked: watch::Sender::new(0),
            asked: Notify::new(),
            why: Mutex::new("it has not looked at the store yet".into()),
        }
    }

    /// Nothing remembered here is older than the store was at `began`.
    pub(crate) fn looked(&self, began: Moment) {
        let lease = count(self.lease);
        let until = began.boot.saturating_add(lease);
        if self.until.fetch_max(until, Ordering::SeqCst) < until {
            self.until_day.store(began.day.saturating_add(lease), Ordering::SeqCst);
        }
        self.looked.send_if_modified(|at| {
            let later = *at < began.boot;
            *at = began.boot.max(*at);
            later
        });
    }

    /// A look came to nothing.
    pub(crate) fn failed(&self, why: String) {
        *self.why.lock() = why;
    }

    /// The lease ends now.
    pub(crate) fn end(&self, why: &str) {
        self.until.store(0, Ordering::SeqCst);
        why.clone_into(&mut self.why.lock());
    }

    /// Returns after the first look.
    pub(crate) async fn first_look(&self) {
        let mut looks = self.looked.subscribe();
        // The sender is this one: it is there.
        let _ = looks.wait_for(|began| *began > 0).await;
    }

    /// Returns when a look is asked for.
    pub(crate) async fn wanted(&self) {
        self.asked.notified().await;
    }

    fn holds(&self) -> bool {
        let now = Moment::now();
        now.boot < self.until.load(Ordering::SeqCst)
            && now.day < self.until_day.load(Ordering::SeqCst)
    }

    /// How much of the lease is left.
    pub(crate) fn left(&self) -> Duration {
        let left = |until: &AtomicU64, now: u64| until.load(Ordering::SeqCst).saturating_sub(now);
        let now = Moment::now();
        let by_both = left(&self.until, now.boot).min(left(&self.until_day, now.day));
        Duration::from_nanos(by_both)
    }

    /// Why nothing may be served, if so.
    pub(crate) fn stale(&self) -> Option<String> {
        (!self.holds()).then(|| self.why.lock().clone())
    }

    /// Whether what is remembered may be served to a request that begins now.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if that cannot be told.
    pub async fn require(&self) -> Result<(), Error> {
        if self.strict {
            let now = Moment::now().boot;
            let mut looks = self.looked.subscribe();
            self.asked.notify_one();
            let look = looks.wait_for(|began| *began >= now);
            if tokio::time::timeout(PATIENCE, look).await.is_err() {
                return Err(self.refusal());
            }
        }
        if self.holds() { Ok(()) } else { Err(self.refusal()) }
    }

    fn refusal(&self) -> Error {
        let why = self.why.lock().clone();
        Error::unavailable(format!("this node cannot tell what others have revoked: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lease_counts_from_the_start_of_a_look_and_ends() {
        let freshness = Freshness::new(Duration::from_secs(600), false);
        assert!(freshness.require().await.is_err(), "before the first look");
        let began = Moment::now();
        freshness.looked(began);
        freshness.require().await.unwrap();
        assert!(!freshness.left().is_zero() && freshness.left() <= LONGEST_LEASE);
        assert!(freshness.until.load(Ordering::SeqCst) <= began.boot + count(LONGEST_LEASE));
        // A look that took longer than the lease gives none.
        let late = Freshness::new(LONGEST_LEASE, false);
        late.looked(Moment { boot: began.boot.saturating_sub(2_000_000_000), ..began });
        late.failed("the database does not answer".into());
        assert!(late.require().await.is_err() && late.left().is_zero());
        assert_eq!(late.stale().as_deref(), Some("the database does not answer"));
        // Nor does one whose machine was stopped while its own clocks stood.
        let stopped = Freshness::new(LONGEST_LEASE, false);
        stopped.looked(Moment { day: began.day.saturating_sub(2_000_000_000), ..began });
        assert!(stopped.require().await.is_err());
        freshness.end("this node has left");
        let refused = freshness.require().await.unwrap_err();
        assert!(refused.internal_text().unwrap().contains("this node has left"), "{refused:?}");
    }

    #[tokio::test]
    async fn a_strict_node_answers_no_request_from_a_look_before_it() {
        let freshness = std::sync::Arc::new(Freshness::new(LONGEST_LEASE, true));
        freshness.looked(Moment::now());
        let asking = tokio::spawn({
            let freshness = std::sync::Arc::clone(&freshness);
            async move { freshness.require().await }
        });
        freshness.wanted().await;
        assert!(!asking.is_finished());
        freshness.looked(Moment::now());
        asking.await.unwrap().unwrap();
    }
}
