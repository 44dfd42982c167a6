//! Two servers on one database, of which something fails each round: no acknowledged key is lost, nothing is
//! written to two primaries, no call outlives its deadline, and both serve again by themselves.
//!
//! 25 rounds; 500 with `POLYKEY_NODE_FAULTS=500`. `POLYKEY_SEED` repeats a run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::common::client::Client;
use crate::common::cluster::{Cluster, postgres};
use crate::common::gateway::Gateway;
use crate::support::{Random, full};

/// What a call may take.
const DEADLINE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
enum Fault {
    DatabaseHangs(Duration),
    DatabaseCrashes,
    SessionsEnd,
    NodeKilled(usize),
    NodeHangs(usize, Duration),
    NodeCutOff(usize, Duration),
    AllCutOff(Duration),
    /// A synchronous standby takes the place of a primary that hangs, which comes back later.
    StandbyPromoted,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::DatabaseHangs(_) => "the database hangs",
            Self::DatabaseCrashes => "the database is killed",
            Self::SessionsEnd => "its sessions are ended",
            Self::NodeKilled(_) => "a node is killed",
            Self::NodeHangs(..) => "a node hangs",
            Self::NodeCutOff(..) => "a node is cut off",
            Self::AllCutOff(_) => "both are cut off",
            Self::StandbyPromoted => "a standby is promoted, the old primary returns",
        }
    }
}

fn choose(random: &mut Random) -> Fault {
    let longest = if full() { 8_000 } else { 2_000 };
    let pause = Duration::from_millis(u64::try_from(200 + random.below(longest)).unwrap());
    let node = random.below(2);
    match random.below(8) {
        0 => Fault::DatabaseHangs(pause),
        1 => Fault::DatabaseCrashes,
        2 => Fault::SessionsEnd,
        3 => Fault::NodeKilled(node),
        4 => Fault::NodeHangs(node, pause),
        5 => Fault::NodeCutOff(node, pause),
        6 => Fault::AllCutOff(pause),
        _ => Fault::StandbyPromoted,
    }
}

const REQUIRE: &str = "ALTER SYSTEM SET synchronous_standby_names = '*'";
const RELEASE: &str = "ALTER SYSTEM SET synchronous_standby_names = ''";
const RELOAD: &str = "SELECT pg_reload_conf()";
const IN_STEP: &str = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";

/// A standby that has whatever the database acknowledges from now on.
fn synchronous_standby(database: &postgres::Server) -> postgres::Server {
    let standby = database.standby();
    database.sql(REQUIRE);
    database.sql(RELOAD);
    let until = Instant::now() + Duration::from_secs(30);
    while database.sql(IN_STEP) != "1" {
        assert!(Instant::now() < until, "the standby does not follow");
        std::thread::sleep(Duration::from_millis(20));
    }
    standby
}

/// Fences the primary, promotes the standby, and leads everybody to it.
fn fail_over(cluster: &mut Cluster, standby: postgres::Server) -> postgres::Server {
    cluster.database.signal_all(Signal::STOP);
    standby.promote();
    for gateway in &cluster.gateways {
        gateway.lead_to(standby.port);
    }
    std::mem::replace(&mut cluster.database, standby)
}

/// The old primary takes writes again and a node is led to it, which must write nothing there.
async fn old_primary_returns(
    old: &postgres::Server,
    cluster: &Cluster,
    node: usize,
    admin: &Client,
) {
    old.signal_all(Signal::CONT);
    old.sql(RELEASE);
    old.sql(RELOAD);
    let head = "SELECT revision FROM polykey.head";
    let before = old.sql(head);
    cluster.gateways[node].lead_to(old.port);
    for _ in 0..3 {
        let body = json!({"key_type": "KEY_TYPE_AES_256"});
        let refused = admin.call_with("CreateKey", body, &[("grpc-timeout", b"1S")]).await;
        assert!(refused.is_err(), "a node wrote to a primary that another had replaced");
    }
    assert_eq!(old.sql(head), before, "a primary that was replaced has been written to");
    cluster.gateways[node].lead_to(cluster.database.port);
}

/// Makes keys until `done`; those that were acknowledged, and the longest that a call took. A task of its own:
/// whoever strikes blocks his.
fn load(client: Client, done: &Arc<AtomicBool>) -> JoinHandle<(Vec<String>, Duration)> {
    tokio::spawn(loading(client, Arc::clone(done)))
}

async fn loading(client: Client, done: Arc<AtomicBool>) -> (Vec<String>, Duration) {
    let (mut made, mut longest) = (Vec::new(), Duration::ZERO);
    while !done.load(Ordering::SeqCst) {
        let begun = Instant::now();
        let body = json!({"key_type": "KEY_TYPE_AES_256"});
        let result = client.call_with("CreateKey", body, &[("grpc-timeout", b"2S")]).await;
        longest = longest.max(begun.elapsed());
        match result {
            Ok(reply) => made.push(reply.body["key_id"].as_str().unwrap().to_owned()),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
        // A few hundred a second: each of them is looked for afterwards, on both nodes.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (made, longest)
}

async fn works(client: &Client, bound: Duration) -> Duration {
    let begun = Instant::now();
    loop {
        let body = json!({"key_type": "KEY_TYPE_AES_256"});
        match client.call_with("CreateKey", body, &[("grpc-timeout", b"2S")]).await {
            Ok(_) => return begun.elapsed(),
            Err(fail) => assert!(begun.elapsed() < bound, "it does not come back: {fail:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_and_their_database_fail_and_lose_nothing() {
    let rounds = std::env::var("POLYKEY_NODE_FAULTS").map_or(25, |n| n.parse().unwrap());
    let mut random = Random::seeded("nodes");
    let slack = if full() { 1 } else { 5 };
    let mut cluster = Cluster::behind_gateways(2, "call_timeout = \"1s\"\n");
    let mut admins = cluster.admins().await;
    let (mut all, mut slowest, mut back) = (Vec::new(), Duration::ZERO, Duration::ZERO);
    let mut kinds: BTreeMap<&str, (u32, Duration)> = BTreeMap::new();
    for round in 0..rounds {
        let began = Instant::now();
        let fault = choose(&mut random);
        let done = Arc::new(AtomicBool::new(false));
        let mut standby = matches!(fault, Fault::StandbyPromoted)
            .then(|| tokio::task::block_in_place(|| synchronous_standby(&cluster.database)));
        let mut replaced = None;
        let strike = async {
            tokio::time::sleep(Duration::from_millis(150)).await;
            match fault {
                Fault::DatabaseHangs(pause) => {
                    cluster.database.signal_all(Signal::STOP);
                    tokio::time::sleep(pause).await;
                    cluster.database.signal_all(Signal::CONT);
                }
                Fault::DatabaseCrashes => {
                    tokio::task::block_in_place(|| {
                        cluster.database.crash();
                        cluster.database.restart(&[]);
                    });
                }
                Fault::SessionsEnd => {
                    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                               WHERE usename = 'polykey'";
                    tokio::task::block_in_place(|| drop(cluster.database.sql(end)));
                }
                Fault::NodeKilled(node) => tokio::task::block_in_place(|| cluster.kill(node)),
                Fault::NodeHangs(node, pause) => {
                    let pid = i32::try_from(cluster.servers[node].pid()).unwrap();
                    let pid = Pid::from_raw(pid).unwrap();
                    kill_process(pid, Signal::STOP).unwrap();
                    tokio::time::sleep(pause).await;
                    kill_process(pid, Signal::CONT).unwrap();
                }
                Fault::NodeCutOff(node, pause) => {
                    cluster.gateways[node].cut();
                    tokio::time::sleep(pause).await;
                    cluster.gateways[node].mend();
                }
                Fault::AllCutOff(pause) => {
                    cluster.gateways.iter().for_each(Gateway::cut);
                    tokio::time::sleep(pause).await;
                    cluster.gateways.iter().for_each(Gateway::mend);
                }
                Fault::StandbyPromoted => {
                    let standby = standby.take().unwrap();
                    replaced =
                        Some(tokio::task::block_in_place(|| fail_over(&mut cluster, standby)));
                }
            }
            tokio::time::sleep(Duration::from_millis(150)).await;
            done.store(true, Ordering::SeqCst);
        };
        let (one, two) = (load(admins[0].clone(), &done), load(admins[1].clone(), &done));
        strike.await;
        let (one, two) = (one.await.unwrap(), two.await.unwrap());
        if let Fault::NodeKilled(node) = fault {
            admins[node] = cluster.servers[node].admin().await;
        }
        let bound = Duration::from_secs(5) * slack;
        for admin in &admins {
            back = back.max(works(admin, bound).await);
        }
        if let Some(old) = replaced {
            old_primary_returns(&old, &cluster, round % 2, &admins[round % 2]).await;
            back = back.max(works(&admins[round % 2], bound).await);
        }
        for (made, longest) in [one, two] {
            // Who hangs keeps no deadline.
            if !matches!(fault, Fault::NodeHangs(..)) {
                slowest = slowest.max(longest);
                let limit = DEADLINE + Duration::from_millis(250) * slack;
                assert!(longest <= limit, "round {round}, {fault:?}: a call took {longest:?}");
            }
            for key in &made {
                for admin in &admins {
                    let found = admin.call("GetKeyMetadata", json!({"key_id": key})).await;
                    found.unwrap_or_else(|fail| {
                        panic!("round {round}, {fault:?}: {key} is lost: {fail:?}")
                    });
                }
            }
            all.extend(made);
        }
        // What one revokes, the other refuses.
        if let Some(key) = all.last() {
            let request = json!({"key_id": key, "immediate": true});
            admins[round % 2].call("RevokeKey", request).await.unwrap();
            let use_it = json!({"key_id": key, "plaintext": "aGVsbG8="});
            admins[1 - round % 2].call("Encrypt", use_it).await.unwrap_err();
        }
        let kind = kinds.entry(fault.name()).or_default();
        *kind = (kind.0 + 1, kind.1 + began.elapsed());
        if round % 50 == 49 {
            println!("{} faults, longest call {slowest:?}, back within {back:?}", round + 1);
        }
    }
    for key in &all {
        admins[0].call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
    }
    for server in &cluster.servers {
        let (code, out, err) = server.cli(&["store", "verify"]);
        assert_eq!(code, 0, "{out}{err}");
    }
    println!(
        "{rounds} faults, {} keys acknowledged and none lost; longest call {slowest:?}, back within \
         {back:?}",
        all.len()
    );
    for (kind, (count, took)) in kinds {
        println!("{count} × {kind} in {took:.1?}");
    }
}
