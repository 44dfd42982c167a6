//! Bits turned over in a page of a closed file: whatever a scan then gives is in order and within its bounds, so that
//! whoever walks a space page by page comes to an end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests"
)]

use std::io;
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex};

use futures::executor::block_on;
use polykey_storage::{
    Commit, Direction, KeyRange, NoFinish, ReadError, Snapshot, Space, Store, conformance,
    redb::{Options, Redb},
};
use redb::StorageBackend;

const OPTIONS: Options = Options { cache_bytes: 1024 * 1024, changes: 20, journal_bytes: 0 };
const SPACES: [u8; 3] = [13, 14, 15];
/// Rows of each space.
const ROWS: u8 = 6;

#[derive(Clone, Debug, Default)]
struct Medium(Arc<Mutex<Vec<u8>>>);

impl Medium {
    fn holding(bytes: &[u8]) -> Self {
        Self(Arc::new(Mutex::new(bytes.to_vec())))
    }

    fn store(&self) -> Option<Redb> {
        let medium = self.clone();
        Redb::with_backend("in memory", OPTIONS, move || medium.clone()).ok()
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl StorageBackend for Medium {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().len() as u64)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let found = bytes.get(at(offset)..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().resize(at(len), 0);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let end = at(offset) + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at(offset)..end].copy_from_slice(data);
        Ok(())
    }
}

fn key(space: u8, n: u8) -> Vec<u8> {
    // Of the lengths that keys of jobs, idempotency and use have.
    let length = [29, 36, 16][usize::from(space - 13)];
    let mut key = vec![n; length];
    key[length - 1] = space;
    key
}

/// A file with a leaf for each of three spaces, and where the last one is in it.
fn file() -> (Vec<u8>, Range<usize>) {
    let medium = Medium::default();
    let store = medium.store().unwrap();
    let mut commit = Commit::new();
    for space in SPACES {
        for n in 0..ROWS {
            commit = commit.put(Space(space), key(space, n + 1), vec![1; 40]);
        }
    }
    let done = block_on(store.commit(vec![commit], &mut NoFinish)).unwrap();
    assert!(done.any());
    drop(store);
    let bytes = medium.0.lock().unwrap().clone();
    let last = key(15, ROWS);
    // The list of changes names it too, behind its length and its space.
    let named = |i: usize| bytes[..i].ends_with(&[0, 17, 15]);
    let mut places = (0..bytes.len()).filter(|&i| bytes[i..].starts_with(&last) && !named(i));
    let (Some(place), None) = (places.next(), places.next()) else { panic!("not one place") };
    let page = place / 4096 * 4096;
    (bytes, page..place + last.len())
}

/// Walks a space page by page; whether that came to an end, in more steps than there are rows.
fn walk(
    snapshot: &dyn Snapshot,
    space: Space,
    direction: Direction,
    page: usize,
) -> Result<bool, ReadError> {
    let mut range: KeyRange = polykey_storage::all();
    for _ in 0..200 {
        let rows = block_on(snapshot.scan(space, range, direction, page))?;
        let Some(last) = rows.last() else { return Ok(true) };
        range = match direction {
            Direction::Forward => (Bound::Excluded(last.key.clone()), Bound::Unbounded),
            Direction::Backward => (Bound::Unbounded, Bound::Excluded(last.key.clone())),
        };
    }
    Ok(false)
}

#[test]
fn a_walk_over_damaged_pages_ends() {
    conformance::in_a_process("a_walk_over_damaged_pages_ends", || {
        let (bytes, places) = file();
        let (mut damaged, mut refused, mut unseen) = (0, 0, 0);
        let mut endless = Vec::new();
        for place in places {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[place] ^= 1 << bit;
                let Some(store) = Medium::holding(&changed).store() else {
                    refused += 1;
                    continue;
                };
                let Ok(snapshot) = block_on(store.snapshot()) else {
                    refused += 1;
                    continue;
                };
                let mut seen = false;
                for space in SPACES {
                    for direction in [Direction::Forward, Direction::Backward] {
                        for page in [1, 1024] {
                            match walk(&*snapshot, Space(space), direction, page) {
                                Ok(true) => {}
                                Ok(false) => endless.push((place, bit, space, direction, page)),
                                Err(_) => seen = true,
                            }
                        }
                    }
                }
                if seen { damaged += 1 } else { unseen += 1 }
            }
        }
        println!(
            "{damaged} damaged, {refused} refused, {unseen} unseen; endless: {}",
            endless.len()
        );
        assert!(endless.is_empty(), "{endless:?}");
        assert!(damaged > 100, "hardly anything was seen: {damaged}");
    });
}
