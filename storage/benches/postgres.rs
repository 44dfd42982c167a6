//! Groups a second in PostgreSQL, against a bare `INSERT` through the same driver, in one run:
//! `cargo bench -p polykey-storage --bench postgres`. The server is the tests' own, and syncs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[allow(dead_code, reason = "the tests use the rest")]
#[path = "../tests/postgres/server.rs"]
mod server;

use std::time::{Duration, Instant};

use futures::executor::block_on;
use polykey_storage::{Applied, Commit, RowKey, Space, Store, Write, postgres::Postgres};
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

fn main() {
    let server = Server::start(&[]);
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
