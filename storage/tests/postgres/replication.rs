//! Replicas in PostgreSQL and of it, over lost connections and rolled back statements.

use std::{sync::Arc, thread, time::Duration};

use futures::executor::block_on;
use polykey_storage::{
    CommitError, Store,
    conformance::{self, Model, Rng},
    postgres::{Options, Postgres},
    redb::{self, Redb},
    replica::{self, Replica, ReplicaError, Step},
};

use crate::{
    growth::{equal, grow},
    proxy::{Cut, Proxy},
    server::{Server, schema},
};

#[test]
fn redb_to_postgres_and_back_over_lost_connections() {
    let server = Server::shared();
    let proxy = Proxy::before(server.port);
    let target = Postgres::open(server.options_at(proxy.port, &schema())).unwrap();
    let mut strikes = Rng::new(conformance::seed());
    target.inject(move || strikes.chance(10));
    let target = Arc::new(target);
    let directory = tempfile::tempdir().unwrap();
    let create = |name, changes| {
        let options = redb::Options { changes, ..redb::Options::default() };
        Arc::new(Redb::create(directory.path().join(name), options).unwrap())
    };
    // Forgets at times what was not shipped yet.
    let source = create("source", 30);
    let replica = Replica::new(source.clone(), target.clone()).with_batch_bytes(4_000);
    let mut rng = Rng::new(conformance::seed());
    let (mut model, mut lost) = (Model::default(), 0);
    for round in 0..20 {
        let commits = rng.below(60);
        grow(&mut rng, source.as_ref(), &mut model, commits);
        let mut cuts = 5;
        loop {
            if cuts > 0 {
                cuts -= 1;
                proxy.plan(*rng.pick(&[Cut::Never, Cut::BeforeCommit, Cut::AfterCommit]));
            }
            match block_on(replica.step()) {
                Ok(Step::CaughtUp(revision)) => {
                    assert_eq!(revision, model.revision);
                    break;
                }
                Ok(_) => {}
                Err(ReplicaError::Commit(CommitError::OutcomeUnknown(_))) => {
                    lost += 1;
                    proxy.plan(Cut::Never);
                    block_on(target.reopen()).unwrap();
                }
                Err(other) => panic!("{other}"),
            }
        }
        proxy.plan(Cut::Never);
        let rows = block_on(replica.verify()).unwrap().unwrap();
        assert_eq!(rows, u64::try_from(model.rows.len()).unwrap(), "{round}");
    }
    block_on(equal(source.as_ref(), target.as_ref()));
    println!("{lost} connections lost");
    assert!(lost > 10, "{lost}");

    // A restore: from the database to a file on another machine.
    let restored = create("restored", 10);
    let rows = block_on(replica::copy(target, restored.clone(), drop)).unwrap();
    assert_eq!(rows, u64::try_from(model.rows.len()).unwrap());
    block_on(equal(source.as_ref(), restored.as_ref()));
}

#[test]
fn a_replica_survives_kills_of_its_server() {
    let mut server = Server::start(&[]);
    let options = Options { call_timeout: Duration::from_secs(2), ..server.options("killed") };
    let target = Arc::new(Postgres::open(options).unwrap());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("source");
    let source = Arc::new(Redb::create(path, redb::Options::default()).unwrap());
    let mut rng = Rng::new(conformance::seed());
    let mut model = Model::default();
    for _ in 0..3 {
        grow(&mut rng, source.as_ref(), &mut model, 200);
        let replica = Replica::new(source.clone(), target.clone()).with_batch_bytes(300);
        let (told, hear) = std::sync::mpsc::channel();
        let reopened = Arc::clone(&target);
        let shipping = thread::spawn(move || {
            loop {
                match block_on(replica.step()) {
                    Ok(Step::CaughtUp(_)) => return replica,
                    Ok(_) => {}
                    Err(_) => while block_on(reopened.reopen()).is_err() {},
                }
                let _ = told.send(());
            }
        });
        // Somewhere in the middle, if there is one.
        let _ = hear.recv();
        server.crash();
        server.restart(&[]);
        let replica = shipping.join().unwrap();
        assert!(block_on(replica.verify()).unwrap().is_some());
    }
    block_on(equal(source.as_ref(), target.as_ref()));
}
