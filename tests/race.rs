//! Random schedules over the cache and the epoch check, with the real cache on locks that the
//! scheduler decides.
//!
//! The promise: a read that begins after a change was acknowledged sees that change. It rests on
//! two rules. A ticket taken before an invalidation inserts nothing, so no reader puts the old row
//! back. And a reader that decided on a state lets its answer go only when the epoch has not moved
//! since it began, or after looking again. Each rule has a negative control here: the same model
//! without the rule must fail.
//!
//! `POLYKEY_SCHEDULES` sets how many schedules are tried. A failing schedule is printed
//! by shuttle and runs again with `shuttle::replay`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::panic::{AssertUnwindSafe, catch_unwind};

use polykey::cache::{Cache, Locks};
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;

/// Locks that yield to the scheduler.
struct Scheduled;

impl Locks for Scheduled {
    type Lock<T> = Mutex<T>;

    fn new<T>(value: T) -> Mutex<T> {
        Mutex::new(value)
    }

    fn with<T, R>(lock: &Mutex<T>, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut lock.lock().unwrap())
    }
}

const KEY: u32 = 7;

/// Which rules a run keeps.
#[derive(Clone, Copy)]
struct Rules {
    ticket: bool,
    epoch: bool,
}

const BOTH: Rules = Rules { ticket: true, epoch: true };

/// A key whose only state is the number of the change that last wrote it.
struct Node {
    rules: Rules,
    /// The row in the store. Committing is atomic; reading it is, too.
    row: Mutex<u64>,
    cache: Cache<u32, u64, Scheduled>,
    epoch: AtomicU64,
    /// The last change whose caller has its acknowledgement.
    acknowledged: AtomicU64,
}

impl Node {
    fn new(rules: Rules) -> Arc<Self> {
        Arc::new(Self {
            rules,
            row: Mutex::new(0),
            cache: Cache::with_locks(16),
            epoch: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
        })
    }

    /// Commit, invalidate, move the epoch, acknowledge: the order of the server's sequencer.
    fn change(&self, to: u64, everything: bool) {
        *self.row.lock().unwrap() = to;
        if everything {
            self.cache.clear();
        } else {
            self.cache.invalidate(&KEY);
        }
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.acknowledged.fetch_max(to, Ordering::SeqCst);
    }

    /// Reads through the cache, as the keyring and the directory do.
    fn load(&self) -> u64 {
        if let Some(known) = self.cache.get(&KEY) {
            return known;
        }
        let early = self.cache.ticket(&KEY);
        let row = *self.row.lock().unwrap();
        // Without the rule: permission as of the insertion, which is what no ticket comes to.
        let ticket = if self.rules.ticket { early } else { self.cache.ticket(&KEY) };
        self.cache.insert(ticket, KEY, row);
        row
    }

    /// Decides on the state, works, and releases the answer only if the state still stands. Gives
    /// what was released and the last change acknowledged by then.
    fn use_key(&self) -> Option<(u64, u64)> {
        for _ in 0..3 {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let state = self.load();
            thread::yield_now();
            let acknowledged = self.acknowledged.load(Ordering::SeqCst);
            let stands = || self.epoch.load(Ordering::SeqCst) == epoch || self.load() == state;
            if !self.rules.epoch || stands() {
                return Some((state, acknowledged));
            }
        }
        None
    }
}

/// Two readers against two changes: no read that begins after an acknowledgement sees older state.
fn stale_reads(rules: Rules, everything: bool) {
    let node = Node::new(rules);
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let node = Arc::clone(&node);
            thread::spawn(move || {
                for _ in 0..2 {
                    let before = node.acknowledged.load(Ordering::SeqCst);
                    let seen = node.load();
                    assert!(seen >= before, "change {before} was acknowledged, {seen} was read");
                }
            })
        })
        .collect();
    for change in 1..=2 {
        node.change(change, everything);
    }
    let last = node.load();
    assert_eq!(last, 2, "the last change is not what is read");
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(node.load(), 2, "an old row came back into the cache");
}

/// A use that began before a revocation releases nothing once the revocation is acknowledged.
fn late_release(rules: Rules) {
    let node = Node::new(rules);
    let users: Vec<_> = (0..2)
        .map(|_| {
            let node = Arc::clone(&node);
            thread::spawn(move || {
                if let Some((state, acknowledged)) = node.use_key() {
                    assert!(
                        state >= acknowledged,
                        "released on state {state} after change {acknowledged} was acknowledged"
                    );
                }
            })
        })
        .collect();
    for change in 1..=2 {
        node.change(change, false);
    }
    for user in users {
        user.join().unwrap();
    }
}

fn schedules() -> usize {
    std::env::var("POLYKEY_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(2000)
}

/// Whether schedules with a few preemptions find a failure of `model`.
fn breaks(model: impl Fn() + Send + Sync + 'static) -> bool {
    catch_unwind(AssertUnwindSafe(|| shuttle::check_pct(model, 20_000, 3))).is_err()
}

#[test]
fn no_read_after_an_acknowledgement_sees_the_state_before_it() {
    shuttle::check_random(|| stale_reads(BOTH, false), schedules());
    shuttle::check_random(|| stale_reads(BOTH, true), schedules());
    // Few preemptions in the worst places, which uniform choice seldom finds.
    shuttle::check_pct(|| stale_reads(BOTH, false), schedules(), 3);
}

#[test]
fn nothing_decided_on_a_passed_state_is_released() {
    shuttle::check_random(|| late_release(BOTH), schedules());
    shuttle::check_pct(|| late_release(BOTH), schedules(), 3);
}

/// The models can fail: without either rule they do.
#[test]
fn without_its_rules_the_model_breaks() {
    let no_ticket = Rules { ticket: false, epoch: true };
    let no_epoch = Rules { ticket: true, epoch: false };
    assert!(breaks(move || stale_reads(no_ticket, false)), "the ticket rule is not tested");
    assert!(
        breaks(move || stale_reads(no_ticket, true)),
        "the ticket rule is not tested for clear"
    );
    assert!(breaks(move || late_release(no_epoch)), "the epoch rule is not tested");
}
