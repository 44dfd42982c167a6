//! Files written by released versions, read back. A file in `compat/` is never regenerated: it
//! stands for those that users have.
//!
//! A new format version gets a file of its own: `POLYKEY_WRITE_FIXTURE=v3.redb cargo test -p
//! polykey-storage --test compat`, which refuses to replace one that exists.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{fs, path::PathBuf};

use futures::executor::block_on;
use polykey_storage::{
    Applied, Commit, NoFinish, Revision, RowKey, Space, Store, Write,
    conformance::Model,
    redb::{Options, Redb},
};

fn fixture(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "compat", name].iter().collect()
}

// The groups that were committed to each file, with what was appended to each.
fn groups_of_v1() -> Vec<(Vec<Commit>, Vec<Write>)> {
    let head = |revision: u8| Write::Put {
        row: RowKey::new(Space(0), "head"),
        value: vec![revision; 8].into(),
    };
    let rows = (0..60_u8)
        .map(|n| {
            let (space, len) = (Space(n % 4 * 85), usize::from(n) * 9);
            Commit::new().put(space, [n, 255 - n], vec![n; len])
        })
        .collect();
    let edges = vec![
        Commit::new().put(Space(1), [], "the empty key"),
        Commit::new().put(Space(1), vec![0xff; 1024], "the longest key"),
        Commit::new().put(Space(255), [0xff], ""),
        Commit::new().put(Space(9), "large", vec![9; 10_000]),
    ];
    let changed = vec![
        Commit::new().delete(Space(0), [4, 251]),
        Commit::new().put(Space(0), [8, 247], "replaced"),
        Commit::new().delete(Space(3), "never there"),
    ];
    vec![
        (rows, vec![head(1)]),
        (edges, vec![head(2)]),
        (changed, vec![head(3)]),
        (vec![Commit::new()], vec![]),
    ]
}

fn model_of_v1() -> Model {
    let mut model = Model::default();
    for (group, appended) in groups_of_v1() {
        model.commit(&group, &appended);
    }
    model
}

fn is_read_and_written(name: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    fs::copy(fixture(&format!("{name}.redb")), &path).unwrap();
    let store = Redb::open(&path, Options::default()).unwrap();
    let id = fs::read(fixture(&format!("{name}.id"))).unwrap();
    assert_eq!(store.status().id[..], id[..]);
    let mut model = model_of_v1();
    block_on(model.compare(&store)).unwrap();

    let group = vec![Commit::new().put(Space(0), "new", "row")];
    let committed = block_on(store.commit(group.clone(), &mut NoFinish)).unwrap();
    assert_eq!(committed.revision, Revision(5));
    model.commit(&group, &[]);
    drop(store);
    let store = Redb::open(&path, Options::default()).unwrap();
    block_on(model.compare(&store)).unwrap();
}

/// One table for the rows of all spaces.
#[test]
fn v1_is_read_and_written() {
    is_read_and_written("v1");
}

/// A table for each space, and a journal while it is open.
#[test]
fn v2_is_read_and_written() {
    is_read_and_written("v2");
}

#[test]
fn write_a_fixture_when_asked() {
    let Ok(name) = std::env::var("POLYKEY_WRITE_FIXTURE") else {
        return;
    };
    let path = fixture(&name);
    let store = Redb::create(&path, Options::default()).expect("a file that is there stays");
    for (group, appended) in groups_of_v1() {
        let mut finish = |_: &Applied<'_>| Ok(appended.clone());
        block_on(store.commit(group, &mut finish)).unwrap();
    }
    fs::write(path.with_extension("id"), store.status().id).unwrap();
    drop(store);
    Redb::compact(&path, Options::default()).unwrap();
}
