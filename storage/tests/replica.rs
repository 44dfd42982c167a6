//! Replicas over stores that fail: whatever happens between, the target becomes the source.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

#[path = "replica/flaky.rs"]
mod flaky;
#[path = "replica/growth.rs"]
mod growth;
#[path = "replica/shipped.rs"]
mod shipped;

use std::sync::Arc;

use futures::executor::block_on;
use polykey_storage::{
    Commit, CommitError, NoFinish, Revision, Space, Store,
    conformance::{self, Model, Rng},
    memory::Memory,
    redb::{Options, Redb},
    replica::{self, Replica, ReplicaError, SPACE, Step},
};

use self::{
    flaky::Flaky,
    growth::{equal, grow},
};

fn redb(directory: &tempfile::TempDir, name: &str, changes: u64) -> Arc<dyn Store> {
    let options = Options { changes, ..Options::default() };
    Arc::new(Redb::create(directory.path().join(name), options).unwrap())
}

fn memory(changes: u64) -> Arc<dyn Store> {
    Arc::new(Memory::with_changes(changes).unwrap())
}

// Grows the source and ships it, turn by turn, with failures of the target between.
fn pair(source: &Arc<dyn Store>, target: Arc<dyn Store>, rounds: usize) {
    let seed = conformance::seed();
    let mut rng = Rng::new(seed);
    let mut model = Model::default();
    let flaky = Arc::new(Flaky::new(target, rng.number()));
    for round in 0..rounds {
        // Small groups: much is torn between them.
        let bytes = *rng.pick(&[50, 2_000, 20_000, 1 << 20]);
        let replica = Replica::new(Arc::clone(source), flaky.clone()).with_batch_bytes(bytes);
        let commits = rng.below(20);
        grow(&mut rng, source.as_ref(), &mut model, commits);
        let mut turns = 0;
        while let Err(error) = block_on(replica.catch_up(drop)) {
            let unknown = CommitError::OutcomeUnknown(flaky::injected());
            assert_eq!(error.to_string(), ReplicaError::Commit(unknown).to_string());
            block_on(flaky.reopen()).unwrap();
            // The source goes on meanwhile.
            turns += 1;
            if turns < 5 {
                grow(&mut rng, source.as_ref(), &mut model, 1);
            }
        }
        flaky.calm(|| {
            block_on(equal(source.as_ref(), flaky.as_ref()));
            let rows = block_on(replica.verify()).unwrap().unwrap();
            assert_eq!(rows, u64::try_from(model.rows.len()).unwrap(), "{round}");
        });
    }
    println!("{:?}", flaky.seen());
    assert!(flaky.seen().done > 0 && flaky.seen().undone > 0);
}

#[test]
fn memory_to_memory() {
    pair(&memory(100_000), memory(10), 20);
}

#[test]
fn with_a_source_that_forgets_soon() {
    pair(&memory(3), memory(10), 20);
}

#[test]
fn redb_to_memory_and_back() {
    let directory = tempfile::tempdir().unwrap();
    pair(&redb(&directory, "source", 100), memory(10), 10);
    pair(&memory(100), redb(&directory, "target", 10), 10);
}

#[test]
fn a_backlog_becomes_one_revision() {
    let (source, target) = (memory(1_000), memory(1_000));
    let put = |n: u8| vec![Commit::new().put(Space(1), [n], vec![n; 10])];
    let replica = Replica::new(Arc::clone(&source), Arc::clone(&target));
    block_on(source.commit(put(0), &mut NoFinish)).unwrap();
    block_on(replica.catch_up(drop)).unwrap();
    let before = target.status().revision;
    for n in 0..50 {
        block_on(source.commit(put(n), &mut NoFinish)).unwrap();
    }
    let step = block_on(replica.step()).unwrap();
    assert_eq!(step, Step::Applied { revision: Revision(51), rows: 50 });
    assert_eq!(target.status().revision, Revision(before.0 + 1));
    assert_eq!(block_on(replica.step()).unwrap(), Step::CaughtUp(Revision(51)));
    let mark = block_on(replica::watermark(target.as_ref())).unwrap().unwrap();
    assert_eq!((mark.source, mark.revision, mark.whole), (source.status().id, Revision(51), true));

    // In several groups it is whole only after the last.
    for n in 0..50 {
        block_on(source.commit(put(n), &mut NoFinish)).unwrap();
    }
    let flaky = Arc::new(Flaky::new(Arc::clone(&target), 1));
    flaky.fail_after(2);
    let small = Replica::new(Arc::clone(&source), flaky.clone()).with_batch_bytes(100);
    assert!(matches!(block_on(small.step()), Err(ReplicaError::Commit(_))));
    let mark = block_on(replica::watermark(target.as_ref())).unwrap().unwrap();
    assert_eq!((mark.revision, mark.whole), (Revision(51), false));
    // Two groups were done, and are not done again.
    let done = block_on(target.changes(before, 100)).unwrap();
    let done: usize = done[1..].iter().map(|(_, rows)| rows.len() - 1).sum();
    assert!(done > 10 && done < 50, "{done}");
    assert_eq!(block_on(replica.verify()).unwrap(), None);
    let step = block_on(replica.step()).unwrap();
    assert_eq!(step, Step::Applied { revision: Revision(101), rows: 50 - done });
    assert_eq!(block_on(replica.verify()).unwrap(), Some(50));
}

#[test]
fn what_is_no_replica_of_the_source_is_left_alone() {
    let (source, target) = (memory(10), memory(10));
    let put = || vec![Commit::new().put(Space(1), *b"k", "v")];
    block_on(source.commit(put(), &mut NoFinish)).unwrap();
    let refused = |source: &Arc<dyn Store>, target: &Arc<dyn Store>| {
        let replica = Replica::new(Arc::clone(source), Arc::clone(target));
        block_on(replica.catch_up(drop)).unwrap_err()
    };

    let used = memory(10);
    block_on(used.commit(put(), &mut NoFinish)).unwrap();
    assert!(matches!(refused(&source, &used), ReplicaError::NotEmpty));

    block_on(replica::copy(Arc::clone(&source), Arc::clone(&target), drop)).unwrap();
    let other = memory(10);
    block_on(other.commit(put(), &mut NoFinish)).unwrap();
    assert!(matches!(refused(&other, &target), ReplicaError::OfAnother));

    // Once it is written to, it has a life of its own.
    block_on(target.commit(put(), &mut NoFinish)).unwrap();
    let left = target.status().revision;
    match refused(&source, &target) {
        ReplicaError::Diverged { current, .. } => assert_eq!(current, left),
        other => panic!("{other}"),
    }
}

#[test]
fn a_copy_is_compared_row_by_row() {
    let directory = tempfile::tempdir().unwrap();
    let source = redb(&directory, "source", 10);
    let mut rng = Rng::new(conformance::seed());
    let mut model = Model::default();
    grow(&mut rng, source.as_ref(), &mut model, 300);
    // A replica's own rows are not part of it.
    let own = vec![Commit::new().put(SPACE, *b"own", "not to be copied")];
    block_on(source.commit(own, &mut NoFinish)).unwrap();
    let target = memory(10);
    let mut steps = 0;
    let rows = block_on(replica::copy(Arc::clone(&source), Arc::clone(&target), |_| steps += 1));
    assert_eq!(rows.unwrap(), u64::try_from(model.rows.len()).unwrap());
    assert!(steps >= 2);
    block_on(equal(source.as_ref(), target.as_ref()));
    assert_eq!(block_on(target.get(SPACE, b"own")), Ok(None));

    // A difference that no change accounts for.
    let row = model.rows.keys().next().unwrap().clone();
    let mark = block_on(target.get(SPACE, b"watermark")).unwrap().unwrap();
    let damage = Commit::new().put(row.space, row.key.clone(), "another value").put(
        SPACE,
        *b"watermark",
        mark.value,
    );
    block_on(target.commit(vec![damage], &mut NoFinish)).unwrap();
    match block_on(Replica::new(source, target).verify()) {
        Err(ReplicaError::Differs(found)) => assert_eq!(found, row),
        other => panic!("{other:?}"),
    }
}
