//! Lost connections, terminated sessions, stopped and killed servers.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use futures::executor::block_on;
use polykey_storage::{
    Applied, Commit, CommitError, Health, NoFinish, ReadError, Require, Revision, Space, Store,
    conformance::{self, Model, Rng},
    postgres::{Options, Postgres},
};
use rustix::process::Signal;

use crate::{
    proxy::{Cut, Proxy},
    server::{Server, schema},
};

// Commits a random group; the model afterwards if the group succeeded.
fn commit(rng: &mut Rng, store: &Postgres, model: &Model) -> (Model, Result<(), CommitError>) {
    let group = conformance::group(rng, model);
    let appended = conformance::appended(rng);
    let mut next = model.clone();
    next.commit(&group, &appended);
    let mut calls = 0;
    let mut finish = |_: &Applied<'_>| {
        calls += 1;
        Ok(appended.clone())
    };
    let outcome = block_on(store.commit(group, &mut finish));
    assert!(calls <= 1);
    (next, outcome.map(drop))
}

#[derive(Debug, Default)]
struct Seen {
    committed: usize,
    done: usize,
    undone: usize,
}

#[test]
fn no_acknowledged_group_is_lost_and_no_outcome_is_guessed() {
    lose_connections(false);
}

#[test]
fn the_same_while_a_tenth_of_the_statements_is_rolled_back() {
    lose_connections(true);
}

fn lose_connections(rollbacks: bool) {
    let server = Server::shared();
    let proxy = Proxy::before(server.port);
    let store = Postgres::open(server.options_at(proxy.port, &schema())).unwrap();
    let seed = conformance::seed();
    let mut rng = Rng::new(seed);
    let mut strikes = Rng::new(seed ^ 1);
    store.inject(move || rollbacks && strikes.chance(10));
    let (mut model, mut seen) = (Model::default(), Seen::default());
    for _ in 0..150 {
        let cut = *rng.pick(&[Cut::Never, Cut::BeforeCommit, Cut::AfterCommit]);
        proxy.plan(cut);
        let (next, outcome) = commit(&mut rng, &store, &model);
        match outcome {
            Ok(()) => {
                // A group of which nothing was accepted has no COMMIT. One that was rolled back before
                // its connection was lost is committed over the next.
                assert!(rollbacks || cut == Cut::Never || next == model, "{cut:?}");
                seen.committed += 1;
                model = next;
            }
            Err(CommitError::OutcomeUnknown(_)) => {
                assert_ne!(cut, Cut::Never);
                assert!(matches!(store.status().health, Health::NeedsReopen(_)));
                let again = block_on(store.commit(vec![Commit::new()], &mut NoFinish));
                assert!(matches!(again, Err(CommitError::ReadOnly)), "{again:?}");
                assert_eq!(block_on(store.get(Space(0), b"")), Err(ReadError::NeedsReopen));
                let revision = block_on(store.reopen()).unwrap();
                let outcome = store.outcome().unwrap();
                assert_eq!(outcome.revision, next.revision);
                assert!(cut == Cut::AfterCommit || !outcome.durable);
                // A COMMIT after a statement that was rolled back commits nothing.
                assert!(rollbacks || cut == Cut::BeforeCommit || outcome.durable);
                if outcome.durable {
                    model = next;
                    seen.done += 1;
                } else {
                    seen.undone += 1;
                }
                assert_eq!(revision, model.revision);
                assert_eq!(store.status().health, Health::Ready);
                block_on(model.compare(&store)).unwrap();
            }
            Err(other) => panic!("{other}"),
        }
        proxy.plan(Cut::Never);
    }
    block_on(model.compare(&store)).unwrap();
    println!("{seen:?}");
    assert!(seen.committed > 15 && seen.done > 15 && seen.undone > 15, "{seen:?}");
}

#[test]
fn a_terminated_session_is_replaced() {
    let server = Server::shared();
    let schema = schema();
    let store = server.open(&schema);
    let put = || vec![Commit::new().put(Space(1), *b"k", "v")];
    block_on(store.commit(put(), &mut NoFinish)).unwrap();
    let snapshot = block_on(store.snapshot()).unwrap();
    for _ in 0..3 {
        block_on(store.get(Space(1), b"k")).unwrap().unwrap();
        // Sessions of other tests have other queries.
        server.sql(&format!(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = \
             (SELECT application_name FROM pg_stat_activity WHERE query LIKE '%{schema}\"%' \
             AND usename = 'polykey' LIMIT 1)"
        ));
        // Idle sessions alone tell nothing of the database: nobody hears of them.
        block_on(store.commit(put(), &mut NoFinish)).unwrap();
        block_on(store.get(Space(1), b"k")).unwrap().unwrap();
        assert_eq!(store.status().health, Health::Ready);
    }
    // A snapshot is its session.
    let gone = block_on(snapshot.get(Space(1), b"k"));
    assert!(matches!(gone, Err(ReadError::Store(_))), "{gone:?}");
    assert_eq!(store.status().health, Health::Ready);
}

#[test]
fn a_stopped_server_holds_nobody_beyond_the_deadline() {
    let server = Server::start(&["fsync=off"]);
    let limit = Duration::from_millis(400);
    let options = Options {
        call_timeout: limit,
        connect_timeout: Duration::from_millis(300),
        ..server.options("stopped")
    };
    let store = Arc::new(Postgres::open(options).unwrap());
    let put = || vec![Commit::new().put(Space(1), *b"k", "v")];
    block_on(store.commit(put(), &mut NoFinish)).unwrap();
    let snapshot = block_on(store.snapshot()).unwrap();

    server.signal_all(Signal::STOP);
    let timed = |what: &str, work: &dyn Fn()| {
        let started = Instant::now();
        work();
        let took = started.elapsed();
        // The promise is 250 ms beyond the deadline.
        assert!(took < limit + 5 * Duration::from_millis(250), "{what} took {took:?}");
    };
    timed("a read", &|| {
        let read = block_on(snapshot.get(Space(1), b"k"));
        assert!(matches!(read, Err(ReadError::Store(_))), "{read:?}");
    });
    timed("the next read", &|| {
        assert_eq!(block_on(store.get(Space(1), b"k")), Err(ReadError::NeedsReopen));
    });
    timed("a reopening", &|| assert!(block_on(store.reopen()).is_err()));
    timed("a commit", &|| {
        let commit = block_on(store.commit(put(), &mut NoFinish));
        assert!(matches!(commit, Err(CommitError::ReadOnly)), "{commit:?}");
    });
    server.signal_all(Signal::CONT);
    let back = Instant::now();
    while block_on(store.reopen()).is_err() {
        assert!(back.elapsed() < 5 * Duration::from_secs(5), "the store does not come back");
    }
    block_on(store.commit(put(), &mut NoFinish)).unwrap();

    // Stopped in the middle of a group: after it was decided, before it is committed.
    let server = &server;
    let mut finish = |_: &Applied<'_>| {
        server.signal_all(Signal::STOP);
        Ok(vec![])
    };
    let started = Instant::now();
    let stopped = block_on(store.commit(put(), &mut finish));
    assert!(matches!(stopped, Err(CommitError::OutcomeUnknown(_))), "{stopped:?}");
    assert!(started.elapsed() < limit + 5 * Duration::from_millis(250));
    thread::sleep(Duration::from_secs(1));
    server.signal_all(Signal::CONT);
    while block_on(store.reopen()).is_err() {}
    let outcome = store.outcome().unwrap();
    assert_eq!(outcome.revision, Revision(3));
    let revision = store.status().revision;
    assert_eq!(revision, Revision(if outcome.durable { 3 } else { 2 }));
    // It stays what it was found to be.
    let committed = block_on(store.commit(put(), &mut NoFinish)).unwrap();
    assert_eq!(committed.revision.0, revision.0 + 1);
}

#[test]
fn a_killed_server_loses_nothing_acknowledged() {
    let mut server = Server::start(&[]);
    let options = Options { durable: true, ..server.options("killed") };
    let store = Arc::new(Postgres::open(options).unwrap());
    assert_eq!(store.durability().weaknesses(), Vec::<&str>::new());
    for round in 0..2 {
        let writer = Arc::clone(&store);
        let (first, begun) = std::sync::mpsc::channel();
        let writing = thread::spawn(move || {
            let mut acknowledged = writer.status().revision;
            loop {
                let put = Commit::new().put(Space(1), *b"k", acknowledged.0.to_be_bytes().to_vec());
                match block_on(writer.commit(vec![put], &mut NoFinish)) {
                    Ok(committed) => acknowledged = committed.revision,
                    Err(_) => return acknowledged,
                }
                let _ = first.send(());
            }
        });
        for _ in 0..20 {
            begun.recv().unwrap();
        }
        server.crash();
        let acknowledged = writing.join().unwrap();
        assert!(acknowledged >= Revision(20), "{round}");
        server.restart(&[]);
        let back = Instant::now();
        let revision = loop {
            match block_on(store.reopen()) {
                Ok(revision) => break revision,
                Err(error) => {
                    let took = back.elapsed();
                    assert!(took < 5 * Duration::from_secs(5), "{took:?}: {error}");
                }
            }
        };
        // The one that was not acknowledged may be there.
        assert!(revision.0 - acknowledged.0 <= 1, "{revision} {acknowledged}");
        let row = block_on(store.get(Space(1), b"k")).unwrap().unwrap();
        assert_eq!(row.revision, revision);
    }
}

#[test]
fn a_snapshot_ends_by_itself() {
    let server = Server::shared();
    let options =
        Options { snapshot_life: Duration::from_millis(200), ..server.options(&schema()) };
    let store = Postgres::open(options).unwrap();
    let snapshot = block_on(store.snapshot()).unwrap();
    assert_eq!(block_on(snapshot.get(Space(1), b"k")), Ok(None));
    let until = Instant::now() + Duration::from_secs(10);
    while block_on(snapshot.get(Space(1), b"k")).is_ok() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(store.status().health, Health::Ready);
    assert_eq!(block_on(store.get(Space(1), b"k")), Ok(None));
}

#[test]
fn a_call_that_is_dropped_leaves_the_store_usable() {
    let server = Server::shared();
    let store = server.open(&schema());
    let put =
        |require| vec![Commit::new().require(Space(1), *b"k", require).put(Space(1), *b"k", "v")];
    for _ in 0..20 {
        let mut finish = |_: &Applied<'_>| Ok(vec![]);
        let mut commit = store.commit(put(Require::Absent), &mut finish);
        // Begun, and not waited for.
        let polled = futures::future::poll_immediate(&mut commit);
        assert!(block_on(polled).is_none());
        drop(commit);
    }
    // Nothing was applied: nobody has answered for the group.
    let committed = block_on(store.commit(put(Require::Absent), &mut NoFinish)).unwrap();
    assert!(committed.any());
    assert_eq!(committed.revision, Revision(1));
    assert_eq!(store.status().health, Health::Ready);
}
