//! What the Go service got wrong, items 1 to 5 of the contract: batches, concurrent callers, revocation, tiers.

use std::collections::BTreeSet;

use futures::future::join_all;
use serde_json::{Value, json};
use tonic::Code;

use crate::common::Server;
use crate::common::client::refused;

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The ids of all keys that a client lists.
pub(crate) async fn listed(client: &crate::common::client::Client) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    let mut token = String::new();
    loop {
        let page =
            client.call("ListKeys", json!({"page_size": 1000, "page_token": token})).await.unwrap();
        ids.extend(page["keys"].as_array().unwrap().iter().map(|k| text(&k["key_id"])));
        token = text(&page["next_page_token"]);
        if token.is_empty() {
            return ids;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn go_01_every_path_authorizes_every_key_and_lists_show_only_ones_own() {
    let server = Server::dev();
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let b = server.client(&admin, "user-b", &["user"]).await;
    let secret = a.create(json!({"description": "a's own"})).await;
    let own = b.create(json!({})).await;
    let nil = "00000000-0000-0000-0000-000000000000";

    let mut singles = Vec::new();
    for (method, fields) in [
        ("GetKey", json!({})),
        ("RotateKey", json!({})),
        ("UpdateKeyMetadata", json!({"description": "mine now"})),
        ("GetKeyMetadata", json!({"include_access_history": true})),
        ("RevokeKey", json!({"immediate": true})),
    ] {
        let mut request = fields.clone();
        request["key_id"] = secret.clone().into();
        let fail = refused(b.call(method, request.clone()).await, Code::NotFound);
        request["key_id"] = nil.into();
        let missing = refused(b.call(method, request.clone()).await, Code::NotFound);
        assert_eq!(fail.text, missing.text, "{method} tells a hidden key from a missing one");
        singles.push((method, fields));
    }
    for (method, fields) in singles {
        let plural = method.replace("Key", "Keys").replace("KeysMetadata", "KeyMetadata");
        let items: Vec<Value> = [&own, &secret, &nil.to_owned()]
            .iter()
            .map(|id| {
                let mut item = fields.clone();
                item["key_id"] = (*id).clone().into();
                item
            })
            .collect();
        let batch = json!({"keys": items, "continue_on_error": true});
        let reply = b.call(&format!("Batch{plural}"), batch).await.unwrap();
        let revoked = method == "RevokeKey";
        for (i, expected) in [(0, 0), (1, 5), (2, 5)] {
            assert_eq!(reply["results"][i]["error_code"], expected, "{plural} {i}: {reply}");
        }
        assert_eq!(reply["results"][1]["error"], reply["results"][2]["error"], "{plural}");
        if revoked {
            continue;
        }
        let request = |id: &str| {
            let mut item = fields.clone();
            item["key_id"] = id.into();
            if method == "GetKey" { item } else { json!({"request": item}) }
        };
        let stream = format!("Stream{plural}");
        if method == "GetKey" {
            match b.stream(&stream, vec![request(&secret)]).await {
                Ok(replies) => assert_eq!(replies[0]["error_code"], 5, "{replies:?}"),
                Err(fail) => assert_eq!(fail.code, Code::NotFound),
            }
        } else {
            let replies = b.stream(&stream, vec![request(&own), request(&secret)]).await.unwrap();
            assert_eq!(replies[0]["error_code"], 0, "{stream}: {replies:?}");
            assert_eq!(replies[1]["error_code"], 5, "{stream}: {replies:?}");
        }
    }
    let revoke = json!({"request": {"key_id": secret, "immediate": true}});
    let replies = b.stream("StreamRevokeKeys", vec![revoke]).await.unwrap();
    assert_eq!(replies[0]["error_code"], 5, "{replies:?}");

    assert_eq!(listed(&b).await, BTreeSet::from([own.clone()]));
    assert_eq!(listed(&a).await, BTreeSet::from([secret.clone()]));
    let page = b.call("ListKeys", json!({})).await.unwrap();
    assert_eq!((&page["total_count"], &page["filtered_count"]), (&json!(1), &json!(1)));
    let about = a.call("GetKeyMetadata", json!({"key_id": secret})).await.unwrap();
    assert_eq!(about["metadata"]["description"], "a's own");
    assert_eq!(about["metadata"]["version"], 1);
    assert_eq!(about["metadata"]["status"], "KEY_STATUS_ACTIVE");
}

#[tokio::test(flavor = "multi_thread")]
async fn go_02_concurrent_rotations_each_get_their_own_result() {
    let server = Server::dev();
    let admin = server.admin().await;
    let keys = [admin.create(json!({})).await, admin.create(json!({})).await];
    let calls = (0..48).map(|i| {
        let (admin, key) = (&admin, &keys[i % 2]);
        async move { (key, admin.call("RotateKey", json!({"key_id": key})).await.unwrap()) }
    });
    let mut seen = BTreeSet::new();
    for (key, reply) in join_all(calls).await {
        assert_eq!(&text(&reply["key_id"]), key);
        let version = reply["new_version"].as_i64().unwrap();
        assert_eq!(reply["previous_version"], version - 1);
        assert_eq!(reply["metadata"]["version"], version);
        assert!(seen.insert((key.clone(), version)), "version {version} was given twice");
        let got = admin.call("GetKey", json!({"key_id": key, "version": version})).await.unwrap();
        assert_eq!(
            got["key_material"]["key_checksum"], reply["new_key_material"]["key_checksum"],
            "version {version} came with another's material"
        );
    }
    assert_eq!(seen.len(), 48);
    for key in &keys {
        let about = admin.call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
        assert_eq!(about["metadata"]["version"], 25);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn go_03_a_revoked_key_stays_revoked_on_every_path() {
    let server = Server::dev();
    let admin = server.admin().await;
    let mut keys = Vec::new();
    for _ in 0..24 {
        keys.push(admin.create(json!({})).await);
    }
    // Readers keep every cache warm, and try to fill it with the old rows, while the revocation runs.
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let readers: Vec<_> = (0..8)
        .map(|n| {
            let (admin, keys, stopped) = (admin.clone(), keys.clone(), stopped.clone());
            tokio::spawn(async move {
                for key in keys.iter().cycle().skip(n * 3) {
                    if *stopped.borrow() {
                        break;
                    }
                    let _ = admin.call("GetKey", json!({"key_id": key})).await;
                }
            })
        })
        .collect();
    let items: Vec<Value> = keys
        .iter()
        .map(|k| json!({"key_id": k, "immediate": true, "revocation_reason": "test"}))
        .collect();
    let reply = admin.call("BatchRevokeKeys", json!({"keys": items})).await.unwrap();
    assert_eq!(reply["successful_count"], 24, "{reply}");
    for round in 0..5 {
        for key in &keys {
            let fail = refused(
                admin.call("GetKey", json!({"key_id": key})).await,
                Code::FailedPrecondition,
            );
            assert_eq!(fail.reason, "KEY_REVOKED", "round {round}");
        }
        let batch: Vec<Value> = keys.iter().map(|k| json!({"key_id": k})).collect();
        let reply = admin
            .call("BatchGetKeys", json!({"keys": batch, "continue_on_error": true}))
            .await
            .unwrap();
        assert_eq!(reply["failed_count"], 24, "round {round}");
    }
    stop.send(true).unwrap();
    for reader in readers {
        reader.await.unwrap();
    }
    let key = &keys[0];
    for (method, request) in [
        ("RotateKey", json!({"key_id": key})),
        ("RotateKey", json!({"key_id": key, "strategy": "ROTATION_STRATEGY_STAGED"})),
        ("UpdateKeyMetadata", json!({"key_id": key, "description": "back"})),
        ("EnableKey", json!({"key_id": key})),
        ("DisableKey", json!({"key_id": key})),
    ] {
        refused(admin.call(method, request).await, Code::FailedPrecondition);
    }
    match admin.stream("StreamGetKeys", vec![json!({"key_id": key})]).await {
        Ok(replies) => assert!(replies.iter().all(|r| r["error_code"] == 9), "{replies:?}"),
        Err(fail) => assert_eq!(fail.code, Code::FailedPrecondition),
    }
    let rotate = json!({"request": {"key_id": key}});
    let replies = admin.stream("StreamRotateKeys", vec![rotate]).await.unwrap();
    assert_eq!(replies[0]["error_code"], 9, "{replies:?}");
    let about = admin.call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
    assert_eq!(about["metadata"]["status"], "KEY_STATUS_REVOKED");
    assert_eq!(about["metadata"]["key_state"], "KEY_STATE_REVOKED");
    assert_eq!(about["metadata"]["revocation_reason"], "test");

    let server = server.restart(true, &crate::common::Options::default());
    let admin = server.admin().await;
    for key in &keys {
        refused(admin.call("GetKey", json!({"key_id": key})).await, Code::FailedPrecondition);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn go_04_batches_read_the_primary_and_report_each_item_once() {
    let server = Server::dev();
    let admin = server.admin().await;
    let (key, other) = (admin.create(json!({})).await, admin.create(json!({})).await);
    let missing = "01890a5d-ac96-774b-bcce-b302099a8057";
    for _ in 0..3 {
        admin.call("RotateKey", json!({"key_id": key})).await.unwrap();
    }
    let reply = admin
        .call("BatchGetKeys", json!({"keys": [{"key_id": key}, {"key_id": key, "version": 2}]}))
        .await
        .unwrap();
    assert_eq!(reply["results"][0]["success"]["metadata"]["version"], 4, "{reply}");
    assert_eq!(reply["results"][1]["success"]["metadata"]["version"], 2, "{reply}");

    let three = |fields: Value| {
        let item = |id: &str| {
            let mut item = fields.clone();
            item["key_id"] = id.into();
            item
        };
        json!({"keys": [item(&key), item(missing), item(&other)], "continue_on_error": true})
    };
    for (method, fields) in [
        ("BatchUpdateKeyMetadata", json!({"description": "x"})),
        ("BatchRotateKeys", json!({})),
        ("BatchGetKeyMetadata", json!({})),
        ("BatchRevokeKeys", json!({"immediate": true})),
    ] {
        let reply = admin.call(method, three(fields)).await.unwrap();
        let results = reply["results"].as_array().unwrap();
        assert_eq!(results.len(), 3, "{method}: {reply}");
        assert_eq!(reply["successful_count"], 2, "{method}: {reply}");
        assert_eq!(reply["failed_count"], 1, "{method}: {reply}");
        for (i, (result, id)) in results.iter().zip([key.as_str(), missing, &other]).enumerate() {
            assert_eq!(result["key_id"], id, "{method}");
            assert_eq!(result["index"], i, "{method}");
            assert_eq!(result["error_code"], if i == 1 { 5 } else { 0 }, "{method}: {result}");
            assert_eq!(
                result["success"].is_null() || result["success"] == false,
                i == 1,
                "{method}: {result}"
            );
        }
    }
    // What stops at the first failure says which items it did not try, and did not do them.
    let fresh = admin.create(json!({})).await;
    let stop = json!({"keys": [{"key_id": missing}, {"key_id": fresh}]});
    let reply = admin.call("BatchRevokeKeys", stop).await.unwrap();
    assert_eq!(reply["results"][1]["error_code"], 10, "{reply}");
    admin.call("GetKey", json!({"key_id": fresh})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn go_05_the_tier_is_the_servers_record() {
    let server = Server::dev();
    let admin = server.admin().await;
    let mut a = server
        .stranger(&admin, "user-a", json!({"roles": ["user"], "tier": "CLIENT_TIER_PRO"}))
        .await;
    let login = a.login().await.unwrap();
    assert_eq!(login["client_tier"], "CLIENT_TIER_PRO");
    let key = a.create(json!({})).await;
    for tier in ["CLIENT_TIER_FREE", "CLIENT_TIER_ENTERPRISE"] {
        let claim = json!({"key_id": key, "requester_context": {"client_tier": tier}});
        refused(a.call("GetKey", claim.clone()).await, Code::PermissionDenied);
        let claim =
            json!({"key_type": "KEY_TYPE_AES_256", "requester_context": {"client_tier": tier}});
        refused(a.call("CreateKey", claim).await, Code::PermissionDenied);
        let claim = json!({"keys": [{"key_id": key}], "requester_context": {"client_tier": tier}});
        refused(a.call("BatchGetKeys", claim).await, Code::PermissionDenied);
    }
    let claim = json!({"key_id": key, "requester_context": {"client_tier": "CLIENT_TIER_PRO", "client_identity": "user-a"}});
    a.call("GetKey", claim).await.unwrap();
    for claim in
        [json!({"client_identity": "admin"}), json!({"certificate_fingerprint": "00".repeat(32)})]
    {
        let request = json!({"key_id": key, "requester_context": claim});
        refused(a.call("GetKey", request).await, Code::PermissionDenied);
    }
    // A change of the record counts at once, for the token that is out already.
    admin
        .call("UpdateClient", json!({"client_id": "user-a", "tier": "CLIENT_TIER_FREE"}))
        .await
        .unwrap();
    let claim = json!({"key_id": key, "requester_context": {"client_tier": "CLIENT_TIER_PRO"}});
    refused(a.call("GetKey", claim).await, Code::PermissionDenied);
    assert_eq!(a.call("WhoAmI", json!({})).await.unwrap()["tier"], "CLIENT_TIER_FREE");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_of_a_batch_of_reads_has_a_bound_and_the_rest_is_not_read() {
    let server = Server::dev();
    let admin = server.admin().await;
    let tags: serde_json::Map<String, Value> =
        (0..50).map(|n| (format!("t{n}"), Value::from("x".repeat(256)))).collect();
    let contexts: Vec<String> = (0..100).map(|n| format!("{n:0>255}")).collect();
    let fields = json!({"tags": tags, "initial_authorized_contexts": contexts});
    let key = admin.create(fields).await;
    let items = vec![json!({"key_id": key}); 300];
    for method in ["BatchGetKeys", "BatchGetKeyMetadata"] {
        for go_on in [true, false] {
            let body = json!({"keys": items, "continue_on_error": go_on});
            let reply = admin.call(method, body).await.unwrap();
            let results = reply["results"].as_array().unwrap();
            assert_eq!(results.len(), 300, "{method}");
            let done = results.iter().take_while(|r| r.get("success").is_some()).count();
            // Some 40 KiB each, and 4 MiB are what a client takes.
            assert!((50..110).contains(&done), "{method}: {done}");
            assert_eq!(reply["successful_count"], done);
            assert_eq!(results[done]["error_reason"], "ANSWER_FULL", "{method}");
            assert_eq!(results[done]["error_code"], Code::ResourceExhausted as i32);
            let last = if go_on { "ANSWER_FULL" } else { "NOT_ATTEMPTED" };
            assert_eq!(results[299]["error_reason"], last, "{method}");
        }
    }
    let history = json!({"key_id": key, "include_access_history": true});
    let found = admin.call("GetKeyMetadata", history).await.unwrap();
    let count: u64 = found["metadata"]["access_count"].as_u64().unwrap();
    assert!(count < 300, "what did not fit was not read: {count}");
}
