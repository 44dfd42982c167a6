//! Groups a second in PostgreSQL, against a bare `INSERT` through the same driver, in one run:
//! `cargo bench -p polykey-storage --bench postgres`. The server is the tests' own, and syncs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing
)]

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/postgres/server.rs"]
mod server;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::executor::block_on;
use polykey_storage::{
    Applied, Commit, NoFinish, RowKey, Space, Store, Write,
    postgres::Postgres,
    redb::{self, Redb},
    replicated::{Mode, Opened, Options, Replicated, WhenAway},
};
use tokio_postgres::NoTls;

use self::server::{PASSWORD, ROLE, Server, schema};

const WINDOW: Duration = Duration::from_secs(3);

// How often a second `once` gets done, after a warm-up.
fn rate(mut once: impl FnMut()) -> f64 {
    for window in [Duration::from_millis(300), WINDOW] {
        let started = Instant::now();
        let mut done = 0_u32;
        while started.elapsed() < window {
            once();
            done += 1;
        }
        if window == WINDOW {
            return f64::from(done) / started.elapsed().as_secs_f64();
        }
    }
    unreachable!("the last window returns")
}

// An embedded store that is shipped: what waiting for the target costs a group, and how far the target is
// behind one that does not wait.
fn shipped(server: &Server, mode: Mode) {
    let directory = tempfile::tempdir().unwrap();
    let source = Redb::create(directory.path().join("source"), redb::Options::default()).unwrap();
    let target = server.options(&schema());
    let opener = Box::new(move |epoch| {
        let store = Postgres::open(polykey_storage::postgres::Options { epoch, ..target.clone() })?;
        let epoch = store.epoch();
        Ok(Opened { store: Arc::new(store), epoch })
    });
    let options = Options {
        target: "bench".into(),
        mode,
        timeout: Duration::from_secs(5),
        probe: Duration::from_secs(1),
        goes_on: None,
    };
    let store = Replicated::start(Arc::new(source), options, opener).unwrap();
    store.ready().unwrap();
    let (mut next, mut lags) = (0_u64, Vec::new());
    let groups = rate(|| {
        let group = (0..16).map(|_| {
            next += 1;
            Commit::new().put(Space(1), next.to_be_bytes(), vec![7; 700])
        });
        block_on(store.commit(group.collect(), &mut NoFinish)).unwrap();
        let shipping = store.shipping();
        lags.push((shipping.lag(), shipping.behind));
    });
    let ended = Instant::now();
    store.settle(Duration::from_secs(60));
    lags.sort();
    let (middle, most) = (lags[lags.len() / 2], lags[lags.len() - 1]);
    println!(
        "redb to PostgreSQL, {mode:?}, groups of 16: {groups:.0}/s; behind by {} revisions and {:?} (median), \
         {} and {:?} (most); at the end caught up in {:?}",
        middle.0,
        middle.1,
        most.0,
        most.1,
        ended.elapsed()
    );
}

fn main() {
    let server = Server::start(&[]);
    shipped(&server, Mode::Async);
    shipped(&server, Mode::Sync(WhenAway::Refuse));
    let store = Postgres::open(server.options(&schema())).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(server.port).user(ROLE).password(PASSWORD).dbname("keys");
    let (client, connection) = runtime.block_on(config.connect(NoTls)).unwrap();
    runtime.spawn(connection);
    let table = "CREATE TABLE bare (key bytea PRIMARY KEY, value bytea NOT NULL)";
    runtime.block_on(client.batch_execute(table)).unwrap();
    let insert = runtime.block_on(client.prepare("INSERT INTO bare VALUES ($1, $2)")).unwrap();

    // A record of 300 bytes for each commit, an audit leaf of 400, and one head of 300 for the group.
    let mut next = 0_u64;
    for round in 1..=2 {
        let mut key = 0_u64;
        let bare = rate(|| {
            key += 1;
            let (key, value) = ((round, key), vec![7_u8; 700]);
            let key = format!("{key:?}").into_bytes();
            runtime.block_on(client.execute(&insert, &[&key, &value])).unwrap();
        });
        println!("bare INSERT of 700 bytes: {bare:.0}/s");
        for size in [1_u64, 16, 64] {
            let groups = rate(|| {
                let group: Vec<Commit> = (0..size)
                    .map(|_| {
                        next += 1;
                        Commit::new().put(Space(1), next.to_be_bytes(), vec![7; 300])
                    })
                    .collect();
                let mut finish = |applied: &Applied<'_>| {
                    let leaf = |row: &RowKey| Write::Put {
                        row: RowKey::new(Space(2), row.key.clone()),
                        value: vec![7; 400].into(),
                    };
                    let mut writes: Vec<Write> =
                        applied.replaced.iter().map(|replaced| leaf(&replaced.row)).collect();
                    let head = RowKey::new(Space(0), *b"head");
                    writes.push(Write::Put { row: head, value: vec![7; 300].into() });
                    Ok(writes)
                };
                block_on(store.commit(group, &mut finish)).unwrap();
            });
            let commits = groups * f64::from(u32::try_from(size).unwrap());
            println!(
                "groups of {size:2}: {groups:.0}/s, {commits:.0} commits/s, {:.2} of a bare INSERT each",
                commits / bare
            );
        }
    }
}
