//! I/O errors at every early operation: nothing acknowledged is lost, an outcome that is reported
//! as certain is, and reopening recovers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use futures::executor::block_on;
use polykey_storage::{
    Applied, Commit, CommitError, Health, NoFinish, ReadError, Revision, RowKey, Space, Store,
    Write,
    conformance::{self, Model, Rng},
    redb::{Options, Redb},
    simulation::Disk,
};

// Room for a few groups: failures hit the journal, and the database when it is full.
const OPTIONS: Options = Options { cache_bytes: 64 * 1024, changes: 20, journal_bytes: 16 * 1024 };

fn open(disk: &Disk) -> Redb {
    let (database, journal) = (disk.clone(), disk.clone());
    let (database, journal) = (move || database.open(), move || journal.open_journal());
    Redb::with_journal("simulated", OPTIONS, database, journal).unwrap()
}

// Commits a random group; the model afterwards if the group succeeded.
fn commit(rng: &mut Rng, store: &Redb, model: &Model) -> (Model, Result<(), CommitError>) {
    let group = conformance::group(rng, model);
    let mut appended = conformance::appended(rng);
    if rng.chance(20) {
        // More than the cache holds: it is written before the commit of the transaction.
        appended.push(Write::Put {
            row: RowKey::new(Space(0), b"large"),
            value: vec![7; 150_000].into(),
        });
    }
    let mut next = model.clone();
    next.commit(&group, &appended);
    let mut finish = |_: &Applied<'_>| Ok(appended.clone());
    let outcome = block_on(store.commit(group, &mut finish));
    (next, outcome.map(drop))
}

#[derive(Debug, Default)]
struct Seen {
    absorbed: usize,
    certain: usize,
    unknown_done: usize,
    unknown_undone: usize,
    reopen_failed: usize,
}

fn one(seed: u64, operation: u64, sticky: bool, power_cut: bool, seen: &mut Seen) {
    let mut rng = Rng::new(seed);
    let disk = Disk::new(rng.number());
    let store = open(&disk);
    let mut model = Model::default();
    for _ in 0..5 {
        let (next, outcome) = commit(&mut rng, &store, &model);
        outcome.unwrap();
        model = next;
    }

    disk.fail_after(operation, sticky);
    let unknown = loop {
        let (next, outcome) = commit(&mut rng, &store, &model);
        match outcome {
            Ok(()) => {
                model = next;
                // A write that redb tried early, and made good before it committed.
                if disk.has_failed() {
                    seen.absorbed += 1;
                    disk.heal();
                    disk.power_cycle();
                    block_on(store.reopen()).unwrap();
                    block_on(model.compare(&store)).unwrap();
                    return;
                }
            }
            Err(CommitError::OutcomeUnknown(_)) => break Some(next),
            Err(CommitError::Store(_)) => break None,
            Err(other) => panic!("{other}"),
        }
    };
    assert!(disk.has_failed());

    // Nothing is served until the store is opened again.
    assert!(matches!(store.status().health, Health::NeedsReopen(_)));
    let again = block_on(store.commit(vec![Commit::new()], &mut NoFinish));
    assert!(matches!(again, Err(CommitError::ReadOnly)), "{again:?}");
    let read = block_on(store.get(Space(0), b"key"));
    assert_eq!(read, Err(ReadError::NeedsReopen));
    let changes = block_on(store.changes(Revision(0), 1));
    assert_eq!(changes, Err(ReadError::NeedsReopen.into()));

    if sticky && block_on(store.reopen()).is_err() {
        seen.reopen_failed += 1;
        assert!(matches!(store.status().health, Health::NeedsReopen(_)));
        let again = block_on(store.commit(vec![Commit::new()], &mut NoFinish));
        assert!(matches!(again, Err(CommitError::ReadOnly)), "{again:?}");
    }
    disk.heal();
    if power_cut {
        disk.power_cycle();
    }
    let revision = block_on(store.reopen()).unwrap();
    assert_eq!(store.status().health, Health::Ready);
    assert_eq!(store.status().revision, revision);
    match unknown {
        None => seen.certain += 1,
        Some(next) => match block_on(model.compare(&store)) {
            Ok(()) => seen.unknown_undone += 1,
            Err(_) => {
                model = next;
                seen.unknown_done += 1;
            }
        },
    }
    block_on(model.compare(&store)).unwrap();

    // It works on, and what it now acknowledges survives.
    for _ in 0..5 {
        let (next, outcome) = commit(&mut rng, &store, &model);
        outcome.unwrap();
        model = next;
    }
    drop(store);
    disk.power_cycle();
    block_on(model.compare(&open(&disk))).unwrap();
}

#[test]
fn every_early_operation_may_fail() {
    conformance::in_a_process("every_early_operation_may_fail", || {
        let seed = conformance::seed();
        let mut seen = Seen::default();
        for operation in 0..120 {
            for sticky in [false, true] {
                for power_cut in [false, true] {
                    one(seed ^ operation, operation, sticky, power_cut, &mut seen);
                }
            }
        }
        println!("{seen:?}");
        assert!(seen.certain > 0, "{seen:?}");
        assert!(seen.unknown_done > 0 && seen.unknown_undone > 0, "{seen:?}");
    });
}
