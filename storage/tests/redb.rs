//! The redb store against the conformance suite, and what is its own: files, locks, snapshots.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use bytes::Bytes;
use futures::executor::block_on;
use polykey_storage::{
    Abort, Applied, ChangesError, Commit, CommitError, Direction, Health, NoFinish, OpenError,
    ReadError, Require, Revision, RowKey, Space, Store, StoreStatus, Write, all, conformance,
    redb::{FORMAT, Options, Redb},
    simulation::{Disk, Honesty},
};
use redb::{Database, TableDefinition};

#[test]
fn conforms() {
    let directory = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    block_on(conformance::suite(|| {
        count.set(count.get() + 1);
        let path = directory.path().join(count.get().to_string());
        let options = Options { changes: 300, ..Options::default() };
        Redb::create(path, options).unwrap()
    }));
}

const SPACE: Space = Space(7);

fn put(key: impl Into<Vec<u8>>, value: impl Into<Bytes>) -> Commit {
    Commit::new().put(SPACE, key, value)
}

fn commit(store: &dyn Store, commit: Commit) -> Revision {
    block_on(store.commit(vec![commit], &mut NoFinish)).unwrap().revision
}

fn value(store: &dyn Store, key: &[u8]) -> Option<Bytes> {
    block_on(store.get(SPACE, key)).unwrap().map(|entry| entry.value)
}

#[test]
fn rows_outlive_the_process_that_wrote_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let missing = Redb::open(&path, Options::default()).unwrap_err();
    assert_eq!(missing, OpenError::NotFound { path: path.clone() });
    let store = Redb::open_or_create(&path, Options::default()).unwrap();
    assert_eq!(commit(&store, put("a", "1")), Revision(1));
    let before = store.status();
    assert_eq!(before.path.as_ref(), Some(&path));
    assert_eq!(before.bytes, Some(fs::metadata(&path).unwrap().len()));
    assert_eq!(before.generation, 1);
    drop(store);

    let store = Redb::open_or_create(&path, Options::default()).unwrap();
    assert_eq!(value(&store, b"a").unwrap(), "1");
    let bytes = store.status().bytes;
    assert_eq!(store.status(), StoreStatus { bytes, ..before.clone() });
    assert_ne!(before.id, [0; 16]);
    assert_eq!(commit(&store, put("a", "2")), Revision(2));

    // The old snapshot must not keep the file locked, nor show what is newer.
    let old = block_on(store.snapshot()).unwrap();
    assert_eq!(block_on(store.reopen()).unwrap(), Revision(2));
    assert_eq!(store.status().generation, 2);
    commit(&store, put("a", "3"));
    match block_on(old.get(SPACE, b"a")) {
        Ok(entry) => assert_eq!(entry.unwrap().value, "2"),
        Err(error) => assert_eq!(error, ReadError::NeedsReopen),
    }
    // What the old snapshot met says nothing about the store.
    assert_eq!(store.status().health, Health::Ready);
    assert_eq!(value(&store, b"a").unwrap(), "3");

    let exists = Redb::create(&path, Options::default()).unwrap_err();
    assert_eq!(exists, OpenError::Exists { path });
}

#[test]
fn a_file_is_private_and_leaves_nothing_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    // What a crash during an earlier creation left.
    fs::write(directory.path().join(".store.new"), "half a store").unwrap();
    drop(Redb::create(&path, Options::default()).unwrap());
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let names = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["store"]);
}

// Run by the next test as a process of its own.
#[test]
fn open_from_another_process() {
    if let Ok(path) = std::env::var("POLYKEY_TEST_STORE") {
        let error = Redb::open(&path, Options::default()).unwrap_err();
        assert_eq!(error, OpenError::InUse { path: path.into() });
        println!("refused");
    }
}

#[test]
fn a_store_is_opened_once_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = Redb::create(&path, Options::default()).unwrap();
    let error = Redb::open(&path, Options::default()).unwrap_err();
    assert_eq!(error, OpenError::InUse { path: path.clone() });
    assert!(error.to_string().contains("in use"));
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "open_from_another_process", "--nocapture"])
        .env("POLYKEY_TEST_STORE", &path)
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    assert!(String::from_utf8_lossy(&child.stdout).contains("refused"));
    commit(&store, put("a", "1"));
    drop(store);
    assert!(Redb::open(&path, Options::default()).is_ok());
}

#[test]
fn what_is_not_a_store_of_this_version_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let refusal = || Redb::open(&path, Options::default()).unwrap_err();
    for content in [&b""[..], b"x", b"redb\x1a\x0a\xa9\x0d\x0a", &[7; 100_000]] {
        fs::write(&path, content).unwrap();
        let error = refusal();
        assert!(error.to_string().contains("store"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), content, "it is as it was: {error}");
    }
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(refusal(), OpenError::NotAStore { .. }));
    fs::remove_dir(&path).unwrap();

    // A redb database of another program, with and without a table of the same name.
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.commit().unwrap();
    drop(database);
    assert!(matches!(refusal(), OpenError::NotAStore { .. }));
    let database = Database::create(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let table = TableDefinition::<u64, u64>::new("meta");
    drop(transaction.open_table(table).unwrap());
    transaction.commit().unwrap();
    drop(database);
    assert!(matches!(refusal(), OpenError::NotAStore { .. }));
    fs::remove_file(&path).unwrap();

    // A later version of the format.
    drop(Redb::create(&path, Options::default()).unwrap());
    let database = Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let table = TableDefinition::<&str, &[u8]>::new("meta");
    let mut meta = transaction.open_table(table).unwrap();
    meta.insert("format", &[0, 0, 0, 9][..]).unwrap();
    drop(meta);
    transaction.commit().unwrap();
    drop(database);
    let error = refusal();
    assert!(matches!(error, OpenError::NewerFormat { found: 9, supported: FORMAT, .. }));
    let text = error.to_string();
    assert!(text.contains('9') && text.contains(&FORMAT.to_string()), "{text}");
}

#[test]
fn damaged_files_never_panic() {
    conformance::in_a_process("damaged_files_never_panic", || {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let store = Redb::create(&path, Options::default()).unwrap();
        for n in 0..40_u8 {
            commit(&store, put([n], vec![n; 200]));
        }
        drop(store);
        let whole = fs::read(&path).unwrap();
        let mut rng = conformance::Rng::new(conformance::seed());
        let mut refused = 0;
        for round in 0..300 {
            let mut bytes = whole.clone();
            if round % 3 == 0 {
                bytes.truncate(rng.below(whole.len()));
            } else {
                // Anywhere, or in the header.
                let within = if round % 3 == 1 { whole.len() } else { 512 };
                for _ in 0..=rng.below(8) {
                    let at = rng.below(within);
                    bytes[at] ^= 1 << rng.below(8);
                }
            }
            // A file of its own: one that redb gave up stays locked.
            let path = directory.path().join(format!("damaged-{round}"));
            fs::write(&path, &bytes).unwrap();
            let Ok(store) = Redb::open(&path, Options::default()) else {
                refused += 1;
                continue;
            };
            drop(block_on(store.scan(SPACE, all(), Direction::Forward, 100)));
            drop(block_on(store.changes(Revision::EMPTY, 100)));
            drop(block_on(store.commit(vec![put("new", "row")], &mut NoFinish)));
            // What fails once goes on to fail, in words.
            let health = store.status().health;
            if let Health::NeedsReopen(failure) = health {
                let outcome = block_on(store.commit(vec![put("new", "row")], &mut NoFinish));
                assert!(matches!(outcome, Err(CommitError::ReadOnly)), "{failure}: {outcome:?}");
            }
            drop(store);
            fs::remove_file(&path).unwrap();
        }
        assert!(refused > 0);
    });
}

#[test]
fn changes_are_kept_for_the_configured_number_of_revisions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let options = |changes| Options { changes, ..Options::default() };
    let store = Redb::create(&path, options(50)).unwrap();
    for _ in 0..60 {
        commit(&store, put("a", "1"));
    }
    let trimmed = |oldest| Err(ChangesError::Trimmed { oldest: Revision(oldest) });
    assert_eq!(block_on(store.changes(Revision(9), 1)), trimmed(11));
    let listed = block_on(store.changes(Revision(10), 1000)).unwrap();
    assert_eq!(listed.len(), 50);
    assert_eq!(listed[0], (Revision(11), vec![RowKey::new(SPACE, "a")]));
    drop(store);

    // A lowered retention is reached in steps.
    let store = Redb::open(&path, options(10)).unwrap();
    commit(&store, put("a", "1"));
    let Err(ChangesError::Trimmed { oldest }) = block_on(store.changes(Revision(0), 1)) else {
        panic!("trimmed")
    };
    assert!(oldest > Revision(11) && oldest < Revision(52), "{oldest}");
    for _ in 0..9 {
        commit(&store, put("a", "1"));
    }
    assert_eq!(block_on(store.changes(Revision(0), 1)), trimmed(61));
    drop(store);

    let store = Redb::open(&path, options(0)).unwrap();
    commit(&store, put("a", "1"));
    assert_eq!(block_on(store.changes(Revision(70), 1)), trimmed(72));
    assert_eq!(block_on(store.changes(Revision(71), 1)), Ok(vec![]));
}

#[test]
fn compaction_gives_space_back_and_keeps_the_rows() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = Redb::create(&path, Options::default()).unwrap();
    for n in 0..100_u8 {
        commit(&store, put([n], vec![n; 50_000]));
    }
    for n in 0..99_u8 {
        commit(&store, Commit::new().delete(SPACE, [n]));
    }
    let in_use = Redb::compact(&path, Options::default()).unwrap_err();
    assert!(matches!(in_use, OpenError::InUse { .. }));
    drop(store);
    let compacted = Redb::compact(&path, Options::default()).unwrap();
    assert!(compacted.after < compacted.before / 4, "{compacted:?}");
    let store = Redb::open(&path, Options::default()).unwrap();
    assert_eq!(store.status().rows, Some(1));
    assert_eq!(store.status().revision, Revision(199));
    assert_eq!(value(&store, &[99]).unwrap(), vec![99; 50_000]);
}

#[test]
fn a_panic_in_finish_leaves_the_store_recoverable() {
    let directory = tempfile::tempdir().unwrap();
    let store = Redb::create(directory.path().join("store"), Options::default()).unwrap();
    commit(&store, put("a", "1"));
    let mut finish = |_: &Applied<'_>| -> Result<Vec<Write>, Abort> { panic!("on purpose") };
    let outcome = block_on(store.commit(vec![put("a", "2")], &mut finish));
    assert!(matches!(outcome, Err(CommitError::OutcomeUnknown(_))));
    let outcome = block_on(store.commit(vec![put("a", "3")], &mut NoFinish));
    assert!(matches!(outcome, Err(CommitError::ReadOnly)));
    assert_eq!(block_on(store.reopen()).unwrap(), Revision(1));
    assert_eq!(value(&store, b"a").unwrap(), "1");
    assert_eq!(commit(&store, put("a", "2")), Revision(2));
}

#[test]
fn a_group_costs_as_many_syncs_as_one_commit() {
    let disk = Disk::new(1);
    let store = {
        let (database, journal) = (disk.clone(), disk.clone());
        let (database, journal) = (move || database.open(), move || journal.open_journal());
        Redb::with_journal("simulated", Options::default(), database, journal).unwrap()
    };
    let syncs = |commits: u8| {
        let before = disk.syncs();
        let group = (0..commits).map(|n| put([n], vec![n; 300])).collect();
        let committed = block_on(store.commit(group, &mut NoFinish)).unwrap();
        assert!(committed.outcomes.iter().all(Result::is_ok));
        disk.syncs() - before
    };
    // At times the file grows or shrinks, which costs a sync of its own; hence the least of ten.
    let least = |commits| (0..10).map(|_| syncs(commits)).min();
    assert_eq!(least(64), Some(1));
    assert_eq!(least(1), Some(1));
    // A group of which nothing is accepted costs none.
    let before = disk.syncs();
    let refused = put([0], "x").require(SPACE, [0], Require::Absent);
    let committed = block_on(store.commit(vec![refused], &mut NoFinish)).unwrap();
    assert!(!committed.any());
    assert_eq!(disk.syncs(), before);
}

#[test]
fn reopening_notices_a_file_put_in_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let other = directory.path().join("other");
    let store = Redb::create(&path, Options::default()).unwrap();
    commit(&store, put("a", "1"));
    drop(store);
    fs::copy(&path, &other).unwrap();
    let store = Redb::open(&path, Options::default()).unwrap();
    commit(&store, put("a", "2"));

    // An older copy.
    fs::rename(&other, &path).unwrap();
    let error = block_on(store.reopen()).unwrap_err();
    assert!(error.to_string().contains("back at revision 1"), "{error}");
    let read = block_on(store.get(SPACE, b"a"));
    assert_eq!(read, Err(ReadError::NeedsReopen));

    // Another store.
    drop(Redb::create(&other, Options::default()).unwrap());
    fs::rename(&other, &path).unwrap();
    let error = block_on(store.reopen()).unwrap_err();
    assert!(error.to_string().contains("another store"), "{error}");

    // None.
    fs::remove_file(&path).unwrap();
    let error = block_on(store.reopen()).unwrap_err();
    assert_eq!(error, OpenError::NotFound { path });
}

#[test]
fn reopening_notices_that_the_disk_has_lied() {
    conformance::in_a_process("reopening_notices_that_the_disk_has_lied", || {
        let disk = Disk::new(2);
        let store = {
            let disk = disk.clone();
            Redb::with_backend("simulated", Options::default(), move || disk.open()).unwrap()
        };
        commit(&store, put("a", "1"));
        disk.set_honesty(Honesty::SyncsNothing);
        for _ in 0..5 {
            commit(&store, put("a", "2"));
        }
        disk.power_cycle();
        assert!(block_on(store.reopen()).is_err());
        let outcome = block_on(store.commit(vec![put("a", "3")], &mut NoFinish));
        assert!(matches!(outcome, Err(CommitError::ReadOnly)));
    });
}

#[test]
fn a_copy_of_an_open_store_takes_its_journal_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let journal = directory.path().join("store-journal");
    let store = Redb::create(&path, Options::default()).unwrap();
    for n in 0..20_u8 {
        commit(&store, put([n], vec![n; 300]));
    }
    // What a crash leaves: both files as they are, while the store is open.
    let copy = directory.path().join("copy");
    let journal_of_copy = directory.path().join("copy-journal");
    fs::copy(&path, &copy).unwrap();
    let mode = fs::metadata(&journal).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // Without the journal the last changes are missing, which is said.
    let error = Redb::open(&copy, Options::default()).unwrap_err();
    assert!(error.to_string().contains("copy-journal is missing"), "{error}");
    fs::copy(&journal, &journal_of_copy).unwrap();
    let copied = Redb::open(&copy, Options::default()).unwrap();
    assert_eq!(copied.status().revision, Revision(20));
    assert_eq!(copied.status().rows, Some(20));
    for n in 0..20_u8 {
        assert_eq!(value(&copied, &[n]).unwrap(), vec![n; 300]);
    }
    assert_eq!(block_on(copied.changes(Revision(0), 100)).unwrap().len(), 20);
    assert_eq!(commit(&copied, put("more", "1")), Revision(21));
    drop(copied);
    assert!(!journal_of_copy.exists(), "a closed store is one file");

    // The journal of another time is none: its changes are in the file, or belong elsewhere.
    fs::copy(&journal, &journal_of_copy).unwrap();
    let copied = Redb::open(&copy, Options::default()).unwrap();
    assert_eq!(copied.status().revision, Revision(21));
    drop(copied);
    drop(store);
    assert!(!journal.exists());

    // An operator may give the last changes up.
    let store = Redb::open(&path, Options::default()).unwrap();
    commit(&store, put("a", "1"));
    commit(&store, put("a", "2"));
    fs::copy(&path, &copy).unwrap();
    fs::write(&journal_of_copy, "").unwrap();
    let copied = Redb::open(&copy, Options::default()).unwrap();
    assert_eq!(copied.status().revision, Revision(21));
    assert_eq!(value(&copied, b"a").unwrap(), "1");
}

#[test]
fn a_symbolic_link_is_no_store() {
    let directory = tempfile::tempdir().unwrap();
    let (real, link) = (directory.path().join("real"), directory.path().join("link"));
    symlink(&real, &link).unwrap();
    let refused = |opened: Result<Redb, OpenError>| {
        let error = opened.unwrap_err();
        assert!(matches!(error, OpenError::NotAStore { .. }), "{error:?}");
        assert!(error.to_string().contains("symbolic link"), "{error}");
    };
    // One that leads nowhere makes no store where it leads to.
    refused(Redb::open_or_create(&link, Options::default()));
    assert!(!real.exists());
    let store = Redb::create(&real, Options::default()).unwrap();
    commit(&store, put("a", "1"));
    refused(Redb::open(&link, Options::default()));
    refused(Redb::open_or_create(&link, Options::default()));
    drop(store);
    let error = Redb::compact(&link, Options::default()).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    // A link in the place of the file while it is open shows when it is opened again.
    let store = Redb::open(&real, Options::default()).unwrap();
    let moved = directory.path().join("moved");
    fs::rename(&real, &moved).unwrap();
    symlink(&moved, &real).unwrap();
    let error = block_on(store.reopen()).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    drop(store);
    // A directory on the way may be one: it holds the journal as well.
    let beside = tempfile::tempdir().unwrap();
    let way = beside.path().join("way");
    symlink(directory.path(), &way).unwrap();
    let store = Redb::open(way.join("moved"), Options::default()).unwrap();
    assert_eq!(value(&store, b"a").unwrap(), "1");
}

type Harm = fn(&Path);

#[test]
fn a_journal_that_loses_its_name_is_noticed_and_takes_nothing_with_it() {
    let harms: [(&str, Harm); 3] = [
        ("was removed or renamed", |journal| fs::remove_file(journal).unwrap()),
        ("was removed or renamed", |journal| {
            fs::rename(journal, journal.with_extension("old")).unwrap();
        }),
        ("another file was put", |journal| {
            fs::copy(journal, journal.with_extension("new")).unwrap();
            fs::rename(journal.with_extension("new"), journal).unwrap();
        }),
    ];
    for (words, harm) in harms {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let journal = directory.path().join("store-journal");
        let store = Redb::create(&path, Options::default()).unwrap();
        for n in 1..=5_u8 {
            assert_eq!(commit(&store, put([n], vec![n; 300])), Revision(u64::from(n)));
        }
        harm(&journal);
        // What is acknowledged from here on is in the file, with all that only the journal had.
        assert_eq!(commit(&store, put([6], vec![6; 300])), Revision(6));
        let copy = directory.path().join("copy");
        fs::copy(&path, &copy).unwrap();
        let copied = Redb::open(&copy, Options::default()).unwrap();
        for n in 1..=6_u8 {
            assert_eq!(value(&copied, &[n]).unwrap(), vec![n; 300], "{words}");
        }
        // And nothing goes on as if nothing had been.
        let Health::NeedsReopen(failure) = store.status().health else { panic!("{words}") };
        let text = failure.to_string();
        assert!(text.contains(words) && text.contains("store-journal"), "{text}");
        let outcome = block_on(store.commit(vec![put("a", "1")], &mut NoFinish));
        assert!(matches!(outcome, Err(CommitError::ReadOnly)), "{outcome:?}");
        assert!(matches!(block_on(store.get(SPACE, &[1])), Err(ReadError::NeedsReopen)));
        assert_eq!(block_on(store.reopen()).unwrap(), Revision(6));
        // With a journal that is there to be found again.
        assert_eq!(commit(&store, put("a", "1")), Revision(7));
        assert_eq!(commit(&store, put("a", "2")), Revision(8));
        let second = directory.path().join("second");
        fs::copy(&path, &second).unwrap();
        fs::copy(&journal, directory.path().join("second-journal")).unwrap();
        let copied = Redb::open(&second, Options::default()).unwrap();
        assert_eq!(value(&copied, b"a").unwrap(), "2");
        assert_eq!(store.status().health, Health::Ready);
    }
}

#[test]
fn a_symbolic_link_is_no_journal() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let elsewhere = directory.path().join("elsewhere");
    fs::write(&elsewhere, "precious").unwrap();
    let store = Redb::create(&path, Options::default()).unwrap();
    symlink(&elsewhere, directory.path().join("store-journal")).unwrap();
    let outcome = block_on(store.commit(vec![put("a", "1")], &mut NoFinish));
    let Err(CommitError::Store(error)) = outcome else { panic!("{outcome:?}") };
    assert!(error.to_string().contains("is a symbolic link"), "{error}");
    assert_eq!(fs::read(&elsewhere).unwrap(), b"precious");
    fs::remove_file(directory.path().join("store-journal")).unwrap();
    block_on(store.reopen()).unwrap();
    assert_eq!(commit(&store, put("a", "1")), Revision(1));
}
