//! Power cuts on a simulated disk: nothing acknowledged is lost, nothing is half done, the store
//! always opens.
//!
//! Cuts fall into commits, into those of them that empty the journal, into the growth of the file, and into the recovery from the cut before,
//! up to three in a row. One place is left out: redb's own creation of a file, which a cut can
//! leave unreadable for ever. [`Redb::create`] never shows such a file under its name, and the
//! cuts during creation below follow its protocol.
//!
//! `POLYKEY_CUTS` sets the number of cuts (10,000), `POLYKEY_SEED` the seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

use std::thread;

use futures::executor::block_on;
use polykey_storage::{
    Applied, CommitError, Store,
    conformance::{self, Model, Rng},
    redb::{Options, Redb},
    simulation::{Disk, Honesty},
};

// The journal is small, so that it is often full.
const OPTIONS: Options = Options { cache_bytes: 256 * 1024, changes: 20, journal_bytes: 16 * 1024 };

/// The cuts that one disk and its store live through.
const CUTS_PER_DISK: usize = 40;

#[derive(Debug, Default)]
struct Seen {
    cuts: usize,
    during_recovery: usize,
    during_creation: usize,
    commits: u64,
    // Outcomes that were unknown, and turned out to be.
    unknown_done: usize,
    unknown_undone: usize,
}

fn open(disk: &Disk) -> Result<Redb, String> {
    let (database, journal) = (disk.clone(), disk.clone());
    let (database, journal) = (move || database.open(), move || journal.open_journal());
    Redb::with_journal("simulated", OPTIONS, database, journal).map_err(|e| e.to_string())
}

// As `Redb::create` does it: the file has its name only after it was closed and synced.
fn create(rng: &mut Rng, honesty: Honesty, seen: &mut Seen) -> Result<Disk, String> {
    loop {
        let disk = Disk::new(rng.number());
        disk.set_honesty(honesty);
        if rng.chance(50) {
            disk.cut_after(u64::try_from(rng.below(40)).unwrap());
        }
        let created = open(&disk).and_then(|store| {
            drop(store);
            let handle = disk.open();
            redb::StorageBackend::sync_data(&handle).map_err(|e| e.to_string())
        });
        if created.is_ok() {
            disk.power_cycle();
            return Ok(disk);
        }
        // The file never got its name. The next start removes it and begins anew.
        seen.cuts += 1;
        seen.during_creation += 1;
    }
}

// Runs until `cuts` cuts have been survived.
fn run(seed: u64, cuts: usize, honesty: Honesty) -> Result<Seen, String> {
    let mut rng = Rng::new(seed);
    let mut seen = Seen::default();
    while seen.cuts < cuts {
        let disk = create(&mut rng, honesty, &mut seen)?;
        let mut model = Model::default();
        let end = seen.cuts + CUTS_PER_DISK;
        while seen.cuts < end {
            life(&mut rng, &disk, &mut model, &mut seen)
                .map_err(|e| format!("seed {seed}, cut {}: {e}", seen.cuts))?;
        }
    }
    Ok(seen)
}

// From one opening to the next cut, and through its recovery.
fn life(rng: &mut Rng, disk: &Disk, model: &mut Model, seen: &mut Seen) -> Result<(), String> {
    let store = open(disk)?;
    block_on(model.compare(&store))?;
    disk.cut_after(u64::try_from(rng.below(120)).unwrap());
    let unknown = loop {
        let group = conformance::group(rng, model);
        let appended = conformance::appended(rng);
        let mut next = model.clone();
        next.commit(&group, &appended);
        let mut finish = |_: &Applied<'_>| Ok(appended.clone());
        match block_on(store.commit(group, &mut finish)) {
            Ok(_) => *model = next,
            Err(CommitError::OutcomeUnknown(_)) => break Some(next),
            // Certain: it must not turn up later.
            Err(CommitError::Store(_)) => break None,
            Err(other) => return Err(format!("unexpected: {other}")),
        }
        seen.commits += 1;
    };
    drop(store);
    seen.cuts += 1;

    let mut in_a_row = 1;
    let store = loop {
        disk.power_cycle();
        let again = in_a_row < 3 && rng.chance(40);
        if again {
            disk.cut_after(u64::try_from(rng.below(6)).unwrap());
        }
        match open(disk) {
            Ok(store) if !again => break store,
            Ok(store) => {
                // The cut may come while the store is being closed.
                drop(store);
                disk.power_cycle();
            }
            Err(error) if !again => return Err(format!("it does not open: {error}")),
            Err(_) => {}
        }
        seen.cuts += 1;
        seen.during_recovery += 1;
        in_a_row += 1;
    };
    let lost = block_on(model.compare(&store));
    match (lost, unknown) {
        (Ok(()), unknown) => seen.unknown_undone += usize::from(unknown.is_some()),
        (Err(error), None) => return Err(error),
        (Err(error), Some(next)) => match block_on(next.compare(&store)) {
            Ok(()) => {
                *model = next;
                seen.unknown_done += 1;
            }
            Err(other) => return Err(format!("neither before ({error}) nor after ({other})")),
        },
    }
    Ok(())
}

#[test]
fn nothing_is_lost() {
    conformance::in_a_process("nothing_is_lost", || {
        let seed = conformance::seed();
        let cuts: usize = match std::env::var("POLYKEY_CUTS") {
            Ok(cuts) => cuts.parse().expect("POLYKEY_CUTS is a number"),
            Err(_) => 10_000,
        };
        let runs = [seed, seed ^ 1]
            .map(|seed| thread::spawn(move || run(seed, cuts.div_ceil(2), Honesty::Honest)));
        let mut total = 0;
        for run in runs {
            let seen = run.join().unwrap().unwrap();
            println!("{seen:?}");
            total += seen.cuts;
            // The test has seen what it is about.
            assert!(cuts < 1000 || seen.during_recovery > 0 && seen.during_creation > 0);
            assert!(cuts < 1000 || seen.unknown_done > 0 && seen.unknown_undone > 0);
        }
        assert!(total >= cuts);
    });
}

/// Negative control: the same run notices a disk that does not sync.
#[test]
fn a_lying_disk_is_noticed() {
    conformance::in_a_process("a_lying_disk_is_noticed", || {
        let seed = conformance::seed();
        for honesty in [Honesty::SyncsNothing, Honesty::SyncsAllButOne] {
            let error = run(seed, 2000, honesty).unwrap_err();
            println!("{honesty:?}: {error}");
        }
    });
}
