//! Two servers on one database, of which something fails each round: no acknowledged key is lost, no call
//! outlives its deadline, and both serve again by themselves.
//!
//! 25 rounds; 500 with `POLYKEY_NODE_FAULTS=500`. `POLYKEY_SEED` repeats a run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::common::client::Client;
use crate::common::cluster::Cluster;
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
}

fn choose(random: &mut Random) -> Fault {
    let longest = if full() { 8_000 } else { 2_000 };
    let pause = Duration::from_millis(u64::try_from(200 + random.below(longest)).unwrap());
    let node = random.below(2);
    match random.below(5) {
        0 => Fault::DatabaseHangs(pause),
        1 => Fault::DatabaseCrashes,
        2 => Fault::SessionsEnd,
        3 => Fault::NodeKilled(node),
        _ => Fault::NodeHangs(node, pause),
    }
}

/// Makes keys until `done`; those that were acknowledged, and the longest that a call took.
async fn load(client: Client, done: &AtomicBool) -> (Vec<String>, Duration) {
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
    let mut cluster = Cluster::start(2, "call_timeout = \"1s\"\n");
    let mut admins = cluster.admins().await;
    let (mut all, mut slowest, mut back) = (Vec::new(), Duration::ZERO, Duration::ZERO);
    for round in 0..rounds {
        let fault = choose(&mut random);
        let done = AtomicBool::new(false);
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
            }
            tokio::time::sleep(Duration::from_millis(150)).await;
            done.store(true, Ordering::SeqCst);
        };
        let (one, two) = (load(admins[0].clone(), &done), load(admins[1].clone(), &done));
        let ((), one, two) = tokio::join!(strike, one, two);
        if let Fault::NodeKilled(node) = fault {
            admins[node] = cluster.servers[node].admin().await;
        }
        let bound = Duration::from_secs(5) * slack;
        for admin in &admins {
            back = back.max(works(admin, bound).await);
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
}
