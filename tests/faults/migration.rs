//! Slots added, removed, wrapped anew and the root rotated, over a file, a token and KMS, and the node
//! killed at any moment of it: every key stays readable, and none is on the disk in the clear.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::support::{Random, no_panic, size};
use crate::common::Server;
use crate::common::aws::Moto;
use crate::common::client::Client;
use crate::common::softhsm::SoftHsm;

const TEXT: &str = "bWVldCBtZQ==";
const WRAPPERS: [&str; 4] = ["master_key", "hsm", "cloud", "both"];

/// Changes slots and root until the node is gone; answers may be lost.
async fn change(client: Client, mut random: Random, begun: Arc<Notify>) -> u32 {
    let mut done = 0;
    loop {
        let name = WRAPPERS[random.below(WRAPPERS.len())];
        let label = if name == "master_key" { "main" } else { name };
        let (rpc, body) = match random.below(4) {
            0 => ("RotateRoot", json!({})),
            1 => ("RemoveSlot", json!({"slot_id": label})),
            _ => ("AddSlot", json!({"label": label, "wrapper": name})),
        };
        begun.notify_one();
        match client.call(rpc, body).await {
            Ok(_) => done += 1,
            Err(fail) => match fail.code {
                tonic::Code::AlreadyExists
                | tonic::Code::NotFound
                | tonic::Code::FailedPrecondition
                // A wrapper that does not answer at the moment.
                | tonic::Code::InvalidArgument => {}
                _ => return done,
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_key_survives_kills_during_changes_of_slots_and_root() {
    let kills = size("POLYKEY_MIGRATIONS", 20, 300);
    let mut random = Random::seeded("migration");
    let (moto, token, home) = (Moto::start(), SoftHsm::new(), tempfile::tempdir().unwrap());
    let options = Moto::options(home.path());
    let key = moto.key();
    let mut server = Server::dev_configured_with(&options, |text| {
        let (hsm, cloud) = (token.section("wrappers.hsm"), moto.section("wrappers.cloud", &key));
        let both = "\n[wrappers.both]\nkind = \"quorum\"\nof = [\"hsm\", \"cloud\", \"master_key\"]\n\
                    threshold = 2\n";
        format!("{text}{hsm}{cloud}{both}")
    });
    token.create_kek(&server.state.join("polykey.toml"), "hsm");
    let mut admin = server.admin().await;
    let mut sealed: Vec<Value> = Vec::new();
    let mut plain: Vec<Vec<u8>> = Vec::new();
    let (mut changes, mut slots) = (0, 0);
    for round in 0..kills {
        // A key more each time, whose bytes are known.
        let id = admin.create(json!({"exportable": true})).await;
        let body = json!({"key_id": id, "mode": "EXPORT_MODE_PLAIN"});
        let out = admin.call("ExportKey", body).await.unwrap();
        let text = out["key_material"]["plaintext"].as_str().unwrap();
        plain.push(data_encoding::BASE64.decode(text.as_bytes()).unwrap());
        let body = json!({"key_id": id, "plaintext": TEXT});
        sealed.push(admin.call("Encrypt", body).await.unwrap()["ciphertext"].clone());

        let begun = Arc::new(Notify::new());
        let changing = tokio::spawn(change(admin, random.fork(), Arc::clone(&begun)));
        for _ in 0..=random.below(4) {
            tokio::time::timeout(crate::common::PATIENCE, begun.notified()).await.unwrap();
        }
        tokio::time::sleep(Duration::from_micros(random.below(30_000) as u64)).await;
        no_panic(&server.output());
        server = tokio::task::block_in_place(|| server.restart(true, &options));
        changes += changing.await.unwrap();
        admin = server.admin().await;
        for sealed in &sealed {
            let opened = admin.call("Decrypt", json!({"ciphertext": sealed})).await.unwrap();
            assert_eq!(opened["plaintext"], TEXT, "round {round}");
        }
        // Every slot of the table opens, whichever opened it this time.
        let status = admin.call("GetRootStatus", json!({})).await.unwrap();
        let all = status["slots"].as_array().unwrap().clone();
        assert!(!all.is_empty(), "{status}");
        slots += all.len();
        for slot in all {
            let told = admin.call("TestSlot", json!({"slot_id": slot["slot_id"]})).await.unwrap();
            assert_eq!(told["opens"], true, "round {round}: {told}");
        }
    }
    for command in [["store", "verify"], ["audit", "verify"]] {
        let (code, out, err) = tokio::task::block_in_place(|| server.cli(&command));
        assert_eq!(code, 0, "{command:?}: {out}{err}");
    }
    let state = server.state.clone();
    let (_, output, directory) = server.stop();
    no_panic(&output);
    for entry in fs::read_dir(&state).unwrap().map(Result::unwrap) {
        let bytes = fs::read(entry.path()).unwrap_or_default();
        for plain in &plain {
            let found = bytes.windows(plain.len()).any(|window| window == plain.as_slice());
            assert!(!found, "a key is in {} in the clear", entry.path().display());
        }
    }
    println!("migration: {kills} kills, {changes} changes acknowledged, {slots} slots opened");
    assert!(changes as usize > kills / 4, "the load was no load");
    drop(directory);
}
