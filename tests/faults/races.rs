//! Many callers at once for one name, and for one key: one winner, and everyone gets their own answer.

use std::collections::BTreeSet;

use polykey_proto::polykey::v2 as pb;
use tokio::task::JoinSet;
use tonic::Code;

use crate::common::Server;
use crate::support::{Wire, no_panic, size};

const CALLERS: usize = 32;

async fn connections(admin: &crate::common::client::Client) -> Vec<Wire> {
    let mut all = Vec::new();
    for _ in 0..CALLERS {
        let wire = Wire::another(admin);
        wire.keys().health_check(()).await.unwrap();
        all.push(wire);
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_has_one_winner_whoever_else_wants_it() {
    let server = Server::dev();
    let admin = server.admin().await;
    let wires = connections(&admin).await;
    let mut seen = BTreeSet::new();
    for round in 0..size("POLYKEY_ALIAS_ROUNDS", 20, 2000) {
        let mut callers = JoinSet::new();
        for wire in &wires {
            let wire = wire.clone();
            callers.spawn(async move {
                let body = pb::CreateKeyRequest {
                    key_type: pb::KeyType::Aes256 as i32,
                    alias: "wanted".into(),
                    ..Default::default()
                };
                wire.keys().create_key(wire.with(body)).await
            });
        }
        let mut winners = Vec::new();
        for result in callers.join_all().await {
            match result {
                Ok(reply) => winners.push(reply.into_inner().key_id),
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status:?}"),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
        assert!(seen.insert(winners[0].clone()), "an id came back");
        let body = pb::GetKeyRequest { key_id: "alias/wanted".into(), ..Default::default() };
        let named = wires[0].keys().get_key(wires[0].with(body)).await.unwrap().into_inner();
        assert_eq!(named.metadata.unwrap().key_id, winners[0]);

        let mut callers = JoinSet::new();
        for wire in &wires {
            let wire = wire.clone();
            callers.spawn(async move {
                let body = pb::DeleteAliasRequest { alias: "alias/wanted".into() };
                wire.lifecycle().delete_alias(wire.with(body)).await
            });
        }
        let mut winners = 0;
        for result in callers.join_all().await {
            match result {
                Ok(_) => winners += 1,
                Err(status) => {
                    assert!(matches!(status.code(), Code::NotFound | Code::Aborted), "{status:?}")
                }
            }
        }
        assert_eq!(winners, 1, "round {round}");
    }
    no_panic(&server.output());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everyone_who_rotates_gets_the_version_they_made() {
    let server = Server::dev();
    let admin = server.admin().await;
    let wires = connections(&admin).await;
    let key = admin.create(serde_json::json!({})).await;
    let rounds = size("POLYKEY_ROTATE_ROUNDS", 4, 30);
    let mut versions = Vec::new();
    for _ in 0..rounds {
        let mut callers = JoinSet::new();
        for wire in &wires {
            let (wire, key_id) = (wire.clone(), key.clone());
            callers.spawn(async move {
                let body = pb::RotateKeyRequest { key_id: key_id.clone(), ..Default::default() };
                let made = wire.keys().rotate_key(wire.with(body)).await.unwrap().into_inner();
                let version = made.new_version;
                let body = pb::GetKeyRequest { key_id, version, ..Default::default() };
                let read = wire.keys().get_key(wire.with(body)).await.unwrap().into_inner();
                (made, read)
            });
        }
        for (made, read) in callers.join_all().await {
            assert_eq!(made.previous_version, made.new_version - 1);
            let (mine, there) = (made.new_key_material.unwrap(), read.key_material.unwrap());
            assert!(!mine.key_checksum.is_empty());
            assert_eq!(mine.key_checksum, there.key_checksum, "someone else's material");
            versions.push((made.new_version, mine.key_checksum));
        }
    }
    versions.sort();
    let numbers: Vec<i32> = versions.iter().map(|(n, _)| *n).collect();
    let last = i32::try_from(1 + CALLERS * rounds).unwrap();
    assert_eq!(numbers, (2..=last).collect::<Vec<_>>(), "versions are unique and without gaps");
    let materials: BTreeSet<&str> = versions.iter().map(|(_, sum)| sum.as_str()).collect();
    assert_eq!(materials.len(), versions.len(), "two versions have one material");
    no_panic(&server.output());
}
