//! The redb store against the conformance suite, and what is its own: files, locks, snapshots.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use futures::executor::block_on;
use polykey_storage::{
    conformance,
    redb::{Options, Redb},
};

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
