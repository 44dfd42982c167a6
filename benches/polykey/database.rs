//! A node that keeps its state in PostgreSQL, beside one with a file and beside bare INSERTs, in one run.
//! The database syncs every commit, and shares the machine.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_postgres::{Client, NoTls};

use crate::common::cluster::{Cluster, postgres};
use crate::common::{Options, Server};
use crate::load::{self, Calls, Figures, Kind};

/// What one round gave.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Round {
    /// Rows of about a key's size a second, 16 connections, a commit each.
    pub(crate) insert: f64,
    pub(crate) create: Figures,
    pub(crate) create_embedded: Figures,
    pub(crate) encrypt: Figures,
    pub(crate) encrypt_embedded: Figures,
    pub(crate) get: Figures,
}

const CONNECTIONS: usize = 16;

async fn connect(port: u16) -> Client {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).user(postgres::ROLE).password(postgres::PASSWORD);
    let (client, connection) = config.dbname("keys").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn inserts(clients: &[Client], round: usize, window: Duration) -> f64 {
    let (done, started) = (AtomicU64::new(0), Instant::now());
    let each = clients.iter().enumerate().map(|(n, client)| {
        let done = &done;
        async move {
            let insert = client.prepare("INSERT INTO bare VALUES ($1, $2)").await.unwrap();
            for row in 0_u64.. {
                if started.elapsed() >= window {
                    break;
                }
                let (key, value) = (format!("{round}/{n}/{row}").into_bytes(), vec![7_u8; 700]);
                client.execute(&insert, &[&key, &value]).await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    futures::future::join_all(each).await;
    done.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64()
}

/// Measures it, in so many rounds.
pub(crate) async fn measure(
    state: &std::path::Path,
    window: Duration,
    rounds: usize,
) -> Vec<Round> {
    let cluster = tokio::task::block_in_place(|| Cluster::start(1, ""));
    let embedded =
        tokio::task::block_in_place(|| Server::attempt(state, &Options::default())).unwrap();
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(connect(cluster.database.port).await);
    }
    let table = "CREATE TABLE bare (key bytea PRIMARY KEY, value bytea NOT NULL)";
    clients[0].batch_execute(table).await.unwrap();
    let (node, file) = (&cluster.servers[0], &embedded);
    let mut all = Vec::new();
    for round in 0..rounds {
        let (database, plain) = (Calls::login(node).await, Calls::login(file).await);
        let here = async |kind, c| load::measure(&database, kind, c, 4, window, node.pid()).await;
        let there = async |kind, c| load::measure(&plain, kind, c, 4, window, file.pid()).await;
        let one = Round {
            insert: inserts(&clients, round, window).await,
            create: here(Kind::Create, 16).await,
            create_embedded: there(Kind::Create, 16).await,
            encrypt: here(Kind::Encrypt, 64).await,
            encrypt_embedded: there(Kind::Encrypt, 64).await,
            get: here(Kind::GetKey, 64).await,
        };
        println!("database, round {round}: {one:?}");
        all.push(one);
    }
    all
}
