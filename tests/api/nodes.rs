//! Several servers on one PostgreSQL.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::client::{Client, refused};
use crate::common::cluster::{Cluster, at};

async fn encrypt(client: &Client, key: &str) -> Result<Value, crate::common::client::Fail> {
    client.call("Encrypt", json!({"key_id": key, "plaintext": "aGVsbG8="})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_node_does_the_others_know() {
    let mut cluster = Cluster::start(2, "");
    let admins = cluster.admins().await;
    let key = admins[0].create(json!({"alias": "shared"})).await;
    let sealed = encrypt(&admins[1], &key).await.unwrap()["ciphertext"].clone();
    let opened = json!({"key_id": "alias/shared", "ciphertext": sealed});
    assert_eq!(admins[0].call("Decrypt", opened.clone()).await.unwrap()["plaintext"], "aGVsbG8=");
    // A client that one node makes logs in at another.
    let client = cluster.servers[0].client(&admins[0], "worker", &["operator"]).await;
    let mut client = at(&client, &cluster.servers[1]);
    client.login().await.unwrap();
    client.call("ListKeys", json!({})).await.unwrap();
    // The token of one holds at the other, until one of them revokes it.
    let home = cluster.servers[1].admin().await;
    let roaming = at(&home, &cluster.servers[0]);
    roaming.call("ListKeys", json!({})).await.unwrap();
    roaming.call("RevokeToken", json!({"access_token": roaming.token})).await.unwrap();
    refused(home.call("ListKeys", json!({})).await, Code::Unauthenticated);
    // A rotation of the root on one: the others go on, reading and writing.
    let (code, out, err) = cluster.servers[0].cli(&["root", "rotate"]);
    assert_eq!(code, 0, "{out}{err}");
    // One that has not opened the new root within a lease serves nothing until it has.
    let until = Instant::now() + Duration::from_secs(25);
    let found = loop {
        match admins[1].call("Decrypt", opened.clone()).await {
            Err(fail) if fail.code == Code::Unavailable && Instant::now() < until => {}
            result => break result.unwrap(),
        }
    };
    assert_eq!(found["plaintext"], "aGVsbG8=");
    let after = admins[1].create(json!({"alias": "after"})).await;
    encrypt(&admins[0], &after).await.unwrap();
    // A third joins, one leaves.
    cluster.join();
    let third = cluster.servers[2].admin().await;
    assert_eq!(third.call("Decrypt", opened).await.unwrap()["plaintext"], "aGVsbG8=");
    let gone = cluster.servers.remove(0);
    drop(gone.stop());
    third.call("RevokeKey", json!({"key_id": after, "immediate": true})).await.unwrap();
    for server in &cluster.servers {
        let (code, out, err) = server.cli(&["store", "verify"]);
        assert_eq!(code, 0, "{out}{err}");
    }
}

// Callers use a key on the other nodes without a pause; whatever begins after the acknowledgement of
// its revocation is refused.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_revocation_no_node_lets_a_use_through() {
    let cluster = Cluster::start(3, "");
    let admins = cluster.admins().await;
    for round in 0..8 {
        let key = admins[0].create(json!({})).await;
        let revoked = AtomicBool::new(false);
        let later = AtomicU64::new(0);
        let hammer = |client: &Client| {
            let (client, key) = (client.clone(), key.clone());
            let (revoked, later) = (&revoked, &later);
            async move {
                let mut used = 0_u64;
                loop {
                    let begun_after = revoked.load(Ordering::SeqCst);
                    let result = encrypt(&client, &key).await;
                    used += u64::from(result.is_ok());
                    if begun_after {
                        assert!(result.is_err(), "round {round}: used after its revocation");
                        if later.fetch_add(1, Ordering::SeqCst) > 60 {
                            return used;
                        }
                    }
                }
            }
        };
        let revoke = async {
            let until = Instant::now() + Duration::from_millis(300);
            while Instant::now() < until {
                encrypt(&admins[0], &key).await.unwrap();
            }
            let request = json!({"key_id": key, "immediate": true});
            admins[0].call("RevokeKey", request).await.unwrap();
            revoked.store(true, Ordering::SeqCst);
        };
        let ((), one, two) = tokio::join!(revoke, hammer(&admins[1]), hammer(&admins[2]));
        assert!(one > 0 && two > 0, "round {round}: {one} and {two} uses before");
    }
}

// A node that hangs holds up a revocation for no longer than its lease, and honours nothing when it
// comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hung_serves_nothing_that_was_revoked_meanwhile() {
    let cluster = Cluster::start(2, "");
    let admins = cluster.admins().await;
    let key = admins[0].create(json!({})).await;
    encrypt(&admins[1], &key).await.unwrap();
    let hung =
        rustix::process::Pid::from_raw(cluster.servers[1].pid().try_into().unwrap()).unwrap();
    kill_process(hung, Signal::STOP).unwrap();
    admins[0].call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    // Sent while it hangs, and read when it goes on.
    let early: Vec<_> = (0..16)
        .map(|_| {
            let (client, key) = (admins[1].clone(), key.clone());
            tokio::spawn(async move { encrypt(&client, &key).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    kill_process(hung, Signal::CONT).unwrap();
    for call in early {
        call.await.unwrap().unwrap_err();
    }
    // It comes back by itself.
    let until = Instant::now() + Duration::from_secs(25);
    while admins[1].call("ListKeys", json!({})).await.is_err() {
        assert!(Instant::now() < until, "it does not come back");
    }
    refused(encrypt(&admins[1], &key).await, Code::FailedPrecondition);
}

// Writers on three nodes: nothing acknowledged is lost, no key has two primaries, no use is counted
// twice or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn writers_on_three_nodes_lose_nothing() {
    let cluster = Cluster::start(3, "");
    let admins = cluster.admins().await;
    let shared = admins[0].create(json!({})).await;
    let limited = admins[0].create(json!({"max_uses": 500})).await;
    let work = |client: Client| {
        let (shared, limited) = (shared.clone(), limited.clone());
        async move {
            let (mut made, mut rotated, mut used) = (Vec::new(), 0, 0);
            for n in 0..30 {
                made.push(client.create(json!({})).await);
                match client.call("RotateKey", json!({"key_id": shared})).await {
                    Ok(_) => rotated += 1,
                    Err(fail) => assert_eq!(fail.code, Code::Aborted, "{fail:?}"),
                }
                for _ in 0..10 {
                    match encrypt(&client, &limited).await {
                        Ok(_) => used += 1,
                        Err(fail) => {
                            assert_eq!(fail.code, Code::FailedPrecondition, "{n}: {fail:?}");
                        }
                    }
                }
            }
            (made, rotated, used)
        }
    };
    let (a, b, c) =
        tokio::join!(work(admins[0].clone()), work(admins[1].clone()), work(admins[2].clone()));
    let rotated = a.1 + b.1 + c.1;
    assert!(rotated > 0);
    assert!(a.2 + b.2 + c.2 <= 500, "{} uses of 500", a.2 + b.2 + c.2);
    for admin in &admins {
        for key in a.0.iter().chain(&b.0).chain(&c.0) {
            admin.call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
        }
        let versions = admin.call("ListKeyVersions", json!({"key_id": shared})).await.unwrap();
        let versions = versions["versions"].as_array().unwrap().clone();
        assert_eq!(versions.len(), rotated + 1, "{versions:?}");
        let primaries =
            versions.iter().filter(|v| v["state"] == "KEY_VERSION_STATE_PRIMARY").count();
        assert_eq!(primaries, 1, "{versions:?}");
    }
    for server in &cluster.servers {
        let (code, out, err) = server.cli(&["store", "verify"]);
        assert_eq!(code, 0, "{out}{err}");
    }
}

// Without its database a node serves for as long as its lease, says why it does not any more, and is
// back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_waited_for() {
    let mut cluster = Cluster::start(2, "");
    let admins = cluster.admins().await;
    let key = admins[0].create(json!({})).await;
    encrypt(&admins[1], &key).await.unwrap();
    cluster.database.crash();
    let until = Instant::now() + Duration::from_secs(25);
    let fail = loop {
        match encrypt(&admins[1], &key).await {
            Ok(_) => assert!(Instant::now() < until, "it serves without its database"),
            Err(fail) => break fail,
        }
    };
    assert_eq!(fail.code, Code::Unavailable, "{fail:?}");
    cluster.database.restart(&[]);
    let until = Instant::now() + Duration::from_secs(25);
    for admin in &admins {
        while encrypt(admin, &key).await.is_err() {
            assert!(Instant::now() < until, "it does not come back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        admin.create(json!({})).await;
    }
}
