//! Several nodes on one store.

use std::{thread, time::Duration};

use futures::executor::block_on;
use polykey_storage::{
    Abort, Applied, Commit, CommitError, Direction, Health, NoFinish, Notes, OpenError, Peer,
    Require, Revision, Space, Store, StoreError, all,
    postgres::{Options, Overtaken, Postgres},
};

use crate::server::{Server, schema};

const SPACE: Space = Space(1);

// `block_on` cannot be nested.
fn elsewhere(work: impl FnOnce() + Send) {
    thread::scope(|scope| scope.spawn(work).join().unwrap());
}

#[test]
fn eight_nodes_make_the_tables_at_once() {
    let server = Server::shared();
    let schema = schema();
    let stores: Vec<Postgres> = thread::scope(|scope| {
        let open = || {
            scope.spawn(|| Postgres::open(Options { connections: 1, ..server.options(&schema) }))
        };
        let opening: Vec<_> = (0..8).map(|_| open()).collect();
        opening.into_iter().map(|store| store.join().unwrap().unwrap()).collect()
    });
    let ids: Vec<[u8; 16]> = stores.iter().map(|store| store.status().id).collect();
    assert!(ids.iter().all(|id| *id == ids[0] && *id != [0; 16]), "{ids:?}");
    assert_eq!(server.sql(&format!("SELECT count(*) FROM {schema}.head")), "1");
    assert_eq!(server.sql(&format!("SELECT max(version) FROM {schema}.migrations")), "2");
    for (count, store) in stores.iter().enumerate() {
        let put = Commit::new().put(SPACE, [u8::try_from(count).unwrap()], "v");
        block_on(store.commit(vec![put], &mut NoFinish)).unwrap();
    }
    for store in &stores {
        assert_eq!(block_on(store.scan(SPACE, all(), Direction::Forward, 100)).unwrap().len(), 8);
        assert_eq!(block_on(store.snapshot()).unwrap().revision(), Revision(8));
        assert_eq!(store.status().rows, Some(8));
    }
}

// The counter of several writers: no increment is lost, and nobody waits for ever.
#[test]
fn writers_on_several_nodes_lose_no_increment() {
    let server = Server::shared();
    let schema = schema();
    let each = 60_u64;
    let stores = [server.open(&schema), server.open(&schema), server.open(&schema)];
    thread::scope(|scope| {
        for store in &stores {
            scope.spawn(move || {
                let mut done = 0;
                while done < each {
                    let found = block_on(store.get(SPACE, b"counter")).unwrap();
                    let (require, count) = match found {
                        None => (Require::Absent, 0),
                        Some(entry) => (
                            Require::At(entry.revision),
                            u64::from_be_bytes(entry.value.as_ref().try_into().unwrap()),
                        ),
                    };
                    let commit = Commit::new().require(SPACE, *b"counter", require).put(
                        SPACE,
                        *b"counter",
                        (count + 1).to_be_bytes().to_vec(),
                    );
                    let committed = block_on(store.commit(vec![commit], &mut NoFinish)).unwrap();
                    done += u64::from(committed.any());
                }
            });
        }
    });
    for store in &stores {
        let entry = block_on(store.get(SPACE, b"counter")).unwrap().unwrap();
        assert_eq!(entry.value.as_ref(), (3 * each).to_be_bytes());
        assert_eq!(block_on(store.snapshot()).unwrap().revision(), Revision(3 * each));
    }
}

#[test]
fn one_conflict_does_not_take_the_group_with_it() {
    let server = Server::shared();
    let schema = schema();
    let (here, there) = (server.open(&schema), server.open(&schema));
    let put =
        |key: u8, require| Commit::new().require(SPACE, [key], require).put(SPACE, [key], "v");
    block_on(there.commit(vec![put(1, Require::Absent)], &mut NoFinish)).unwrap();
    let group =
        vec![put(1, Require::Absent), put(2, Require::Absent), put(1, Require::At(Revision(1)))];
    let committed = block_on(here.commit(group, &mut NoFinish)).unwrap();
    let outcomes: Vec<bool> = committed.outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(outcomes, [false, true, true]);
    assert_eq!(committed.revision, Revision(2));
}

#[test]
fn a_group_that_was_overtaken_says_so() {
    let server = Server::shared();
    let schema = schema();
    let (here, there) = (server.open(&schema), server.open(&schema));
    let put = || vec![Commit::new().put(SPACE, *b"k", "v")];
    // After it was decided the session is lost, and another node is faster than the next attempt.
    let mut calls = 0;
    let mut finish = |applied: &Applied<'_>| {
        calls += 1;
        assert_eq!(applied.revision, Revision(1));
        here.inject({
            let mut first = true;
            move || std::mem::take(&mut first)
        });
        server.sql(&format!(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = 'idle in \
             transaction' AND query LIKE '%{schema}\"%'"
        ));
        elsewhere(|| drop(block_on(there.commit(put(), &mut NoFinish)).unwrap()));
        Ok(vec![])
    };
    match block_on(here.commit(put(), &mut finish)) {
        Err(CommitError::Aborted(abort)) => {
            let overtaken: &Overtaken = abort.downcast_ref().unwrap();
            let (expected, current) = (Revision(0), Revision(1));
            assert_eq!(*overtaken, Overtaken { expected, current });
        }
        // The loss was noticed only when all had been sent.
        Err(CommitError::OutcomeUnknown(_)) => {
            assert_eq!(block_on(here.reopen()).unwrap(), Revision(1));
            assert!(!here.outcome().unwrap().durable);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(calls, 1);
    let committed = block_on(here.commit(put(), &mut NoFinish)).unwrap();
    assert_eq!(committed.revision, Revision(2));
}

#[test]
fn a_fenced_node_reads_and_does_not_write() {
    let server = Server::shared();
    let schema = schema();
    let (old, new) = (server.open(&schema), server.open(&schema));
    let put = |value: &'static str| vec![Commit::new().put(SPACE, *b"k", value)];
    block_on(old.commit(put("old"), &mut NoFinish)).unwrap();
    assert_eq!((old.epoch(), new.epoch()), (1, 1));
    assert_eq!(block_on(new.take_over()), Ok(2));
    assert_eq!(new.epoch(), 2);

    let mut asked = |_: &Applied<'_>| -> Result<_, Abort> { panic!("not to be called") };
    for _ in 0..2 {
        let refused = block_on(old.commit(put("old"), &mut asked));
        assert!(matches!(refused, Err(CommitError::ReadOnly)), "{refused:?}");
    }
    let fenced = StoreError::Fenced { own: 1, current: 2 };
    assert_eq!(old.status().health, Health::NeedsReopen(fenced.clone()));
    assert!(fenced.to_string().contains("fenced"));
    block_on(new.commit(put("new"), &mut NoFinish)).unwrap();
    let read = |store: &Postgres| block_on(store.get(SPACE, b"k")).unwrap().unwrap().value;
    assert_eq!(read(&old), "new");
    assert_eq!(block_on(old.snapshot()).unwrap().revision(), Revision(2));

    // Opening again lifts no fence, and keeps the reading.
    let refused = block_on(old.reopen());
    assert!(
        matches!(&refused, Err(OpenError::Store { error, .. }) if *error == fenced),
        "{refused:?}"
    );
    assert_eq!(read(&old), "new");
    let refused = block_on(old.commit(put("old"), &mut asked));
    assert!(matches!(refused, Err(CommitError::ReadOnly)), "{refused:?}");
    drop(old);

    // Nor does a restart of a node that remembers its epoch.
    let old = Postgres::open(Options { epoch: Some(1), ..server.options(&schema) }).unwrap();
    let refused = block_on(old.commit(put("old"), &mut asked));
    assert!(matches!(refused, Err(CommitError::ReadOnly)), "{refused:?}");
    assert_eq!(read(&old), "new");
}

// The fence is the database's, not the node's: a transaction that was decided before the promotion
// leaves no revision after it.
#[test]
fn a_group_that_was_decided_before_a_promotion_is_not_committed_after_it() {
    let server = Server::shared();
    let schema = schema();
    let options = Options { call_timeout: Duration::from_secs(20), ..server.options(&schema) };
    let (old, new) = (Postgres::open(options).unwrap(), server.open(&schema));
    let put = || vec![Commit::new().put(SPACE, *b"k", "v")];
    let mut finish = |_: &Applied<'_>| {
        server.sql(&format!(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = 'idle in \
             transaction' AND query LIKE '%{schema}\"%'"
        ));
        elsewhere(|| assert_eq!(block_on(new.take_over()), Ok(2)));
        Ok(vec![])
    };
    let refused = block_on(old.commit(put(), &mut finish));
    assert!(
        matches!(refused, Err(CommitError::ReadOnly | CommitError::OutcomeUnknown(_))),
        "{refused:?}"
    );
    assert!(matches!(
        block_on(old.reopen()),
        Err(OpenError::Store { error: StoreError::Fenced { .. }, .. })
    ));
    assert_eq!(block_on(new.snapshot()).unwrap().revision(), Revision::EMPTY);

    // The same, with the statement itself.
    let told = server.sql(&format!(
        "DO $$ BEGIN UPDATE {schema}.head SET revision = CASE WHEN epoch = 1 AND revision = 0 THEN \
         revision + 1 END; EXCEPTION WHEN not_null_violation THEN NULL; END $$; \
         SELECT revision FROM {schema}.head"
    ));
    assert_eq!(told, "0");
}

#[test]
fn nodes_see_what_others_have_changed_and_who_they_are() {
    let server = Server::shared();
    let schema = schema();
    let stores = [server.open(&schema), server.open(&schema)];
    let [one, other] = stores.each_ref().map(|store| store.peers().unwrap());
    assert_ne!(one.id(), other.id());
    // Nobody is there before it is announced, and twice is once.
    assert!(!block_on(one.beat(Revision(0))).unwrap());
    block_on(one.announce("berlin-1")).unwrap();
    block_on(other.announce("berlin-2")).unwrap();
    block_on(one.announce("another name")).unwrap();

    let put = |key: &[u8]| Commit::new().put(SPACE, key, "v");
    block_on(stores[0].commit(vec![put(b"a")], &mut NoFinish)).unwrap();
    block_on(stores[0].commit(vec![put(b"b"), put(b"c")], &mut NoFinish)).unwrap();
    let look = block_on(other.look(Revision(1), 10)).unwrap();
    let changes = look.changes.unwrap();
    assert_eq!(changes.len(), 1);
    let (revision, rows) = &changes[0];
    assert_eq!(*revision, Revision(2));
    let rows: Vec<&[u8]> = rows.iter().map(|row| row.key.as_slice()).collect();
    assert_eq!(rows, [b"b", b"c"]);

    assert!(block_on(other.beat(Revision(2))).unwrap());
    let found = |nodes: &[Peer], id| nodes.iter().find(|node| node.id == id).cloned();
    let nodes = block_on(one.look(Revision(2), 10)).unwrap().nodes;
    let first = found(&nodes, one.id()).unwrap();
    let second = found(&nodes, other.id()).unwrap();
    assert_eq!((first.name.as_str(), first.seen, first.beats), ("berlin-1", Revision(0), 0));
    assert_eq!((second.name.as_str(), second.seen, second.beats), ("berlin-2", Revision(2), 1));

    // Struck out only as it was read: one that has shown itself since stays.
    assert!(block_on(other.beat(Revision(2))).unwrap());
    block_on(one.strike(&second)).unwrap();
    assert!(block_on(other.beat(Revision(2))).unwrap());
    let nodes = block_on(one.look(Revision(2), 10)).unwrap().nodes;
    block_on(one.strike(&found(&nodes, other.id()).unwrap())).unwrap();
    assert!(!block_on(other.beat(Revision(2))).unwrap());
    assert_eq!(block_on(other.look(Revision(2), 10)).unwrap().nodes.len(), 1);
}

#[test]
fn notes_stand_beside_the_store_and_their_table_is_made_once() {
    let server = Server::shared();
    let schema = schema();
    let pooled = Options { transaction_pooler: true, ..server.options(&schema) };
    let mut stores: Vec<Postgres> = (0..4).map(|_| server.open(&schema)).collect();
    stores.push(Postgres::open(pooled).unwrap());
    for store in &stores {
        assert_eq!(block_on(store.note("a")).unwrap(), None);
    }
    thread::scope(|scope| {
        for (at, store) in stores.iter().enumerate() {
            scope.spawn(move || {
                block_on(store.put_note("a", "first")).unwrap();
                block_on(store.put_note(&format!("of {at}"), "its own")).unwrap();
            });
        }
    });
    block_on(stores[4].put_note("a", "'second'; --")).unwrap();
    for (at, store) in stores.iter().enumerate() {
        assert_eq!(block_on(store.note("a")).unwrap().as_deref(), Some("'second'; --"));
        assert_eq!(block_on(store.note(&format!("of {at}"))).unwrap().as_deref(), Some("its own"));
        // The store knows nothing of it.
        assert_eq!((store.status().rows, store.status().revision), (Some(0), Revision::EMPTY));
    }
    assert_eq!(server.sql(&format!("SELECT max(version) FROM {schema}.migrations")), "2");
}
