//! Readers during commits see whole groups, in order, and everything acknowledged before they
//! asked.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use futures::executor::block_on;
use polykey_storage::{
    Applied, Commit, Direction, Require, Revision, RowKey, Space, Store, Write, all,
    memory::Memory,
    redb::{Options, Redb},
};

const SPACE: Space = Space(1);
const ROWS: u64 = 20;

// Every group writes its number to all rows, one commit a row, and the last through `finish`.
fn whole_groups(store: &dyn Store, groups: u64) {
    let acknowledged = AtomicU64::new(0);
    let done = AtomicBool::new(false);
    let reader = || {
        let mut last = Revision::EMPTY;
        let mut seen = 0_u64;
        while !done.load(Ordering::Acquire) || seen == 0 {
            let floor = acknowledged.load(Ordering::Acquire);
            let snapshot = block_on(store.snapshot()).unwrap();
            let revision = snapshot.revision();
            assert!(revision.0 >= floor && revision >= last);
            last = revision;
            let rows =
                block_on(snapshot.scan(SPACE, all(), Direction::Forward, usize::MAX)).unwrap();
            if revision == Revision::EMPTY {
                assert!(rows.is_empty());
                continue;
            }
            assert_eq!(rows.len(), usize::try_from(ROWS).unwrap());
            for row in rows {
                assert_eq!(row.revision, revision);
                assert_eq!(row.value.as_ref(), revision.0.to_be_bytes());
                let again = block_on(snapshot.get(SPACE, &row.key)).unwrap();
                assert_eq!(again, Some(row));
            }
            seen += 1;
        }
        seen
    };
    thread::scope(|scope| {
        let readers = [scope.spawn(reader), scope.spawn(reader)];
        for number in 1..=groups {
            let value = number.to_be_bytes().to_vec();
            let group = (1..ROWS)
                .map(|row| Commit::new().put(SPACE, row.to_be_bytes(), value.clone()))
                .collect();
            let mut finish = |_: &Applied<'_>| {
                Ok(vec![Write::Put {
                    row: RowKey::new(SPACE, 0_u64.to_be_bytes()),
                    value: value.clone().into(),
                }])
            };
            let committed = block_on(store.commit(group, &mut finish)).unwrap();
            acknowledged.store(committed.revision.0, Ordering::Release);
        }
        done.store(true, Ordering::Release);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
}

// Several committers of a counter: no increment is lost.
fn exact_increments(store: &dyn Store, each: u64) {
    let key = b"counter";
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut done = 0;
                while done < each {
                    let found = block_on(store.get(SPACE, key)).unwrap();
                    let (require, count) = match found {
                        None => (Require::Absent, 0),
                        Some(entry) => (
                            Require::At(entry.revision),
                            u64::from_be_bytes(entry.value.as_ref().try_into().unwrap()),
                        ),
                    };
                    let commit = Commit::new().require(SPACE, key, require).put(
                        SPACE,
                        key,
                        (count + 1).to_be_bytes().to_vec(),
                    );
                    let mut finish = |_: &Applied<'_>| Ok(Vec::new());
                    let committed = block_on(store.commit(vec![commit], &mut finish)).unwrap();
                    done += u64::from(committed.any());
                }
            });
        }
    });
    let entry = block_on(store.get(SPACE, key)).unwrap().unwrap();
    assert_eq!(entry.value.as_ref(), (3 * each).to_be_bytes());
}

#[test]
fn memory() {
    whole_groups(&Memory::new().unwrap(), 2000);
    exact_increments(&Memory::new().unwrap(), 1000);
}

#[test]
fn redb() {
    let directory = tempfile::tempdir().unwrap();
    let create = |name| Redb::create(directory.path().join(name), Options::default()).unwrap();
    whole_groups(&create("groups"), 300);
    exact_increments(&create("increments"), 100);
}
