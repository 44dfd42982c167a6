//! What the Go service got wrong, items 6 to 8 of the contract: promises that were accepted and ignored, binding, checksums.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tonic::Code;

use crate::common::client::{Client, Fail, refused};
use crate::common::{Options, PATIENCE, Server};

/// A time so many seconds from now, as JSON.
pub(crate) fn after(seconds: u64) -> String {
    let at = SystemTime::now() + Duration::from_secs(seconds);
    jiff::Timestamp::try_from(at).unwrap().to_string()
}

/// Calls until the call is refused, and gives the refusal.
async fn until_refused(client: &Client, method: &str, body: Value) -> Fail {
    let begin = tokio::time::Instant::now();
    loop {
        match client.call(method, body.clone()).await {
            Err(fail) => return fail,
            Ok(_) => assert!(begin.elapsed() < PATIENCE, "{method} {body} still succeeds"),
        }
        // The event is the passing of the server's own clock; there is nothing else to wait for.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn go_06_grace_expiry_and_effective_times_are_enforced_across_restarts() {
    let server = Server::dev();
    let admin = server.admin().await;
    let graced = admin.create(json!({})).await;
    let rotated = admin
        .call("RotateKey", json!({"key_id": graced, "grace_period_seconds": 4}))
        .await
        .unwrap();
    assert!(rotated["old_version_expires_at"].is_string(), "{rotated}");
    let expiring = admin.create(json!({"expires_at": after(4)})).await;
    let doomed = admin.create(json!({})).await;
    admin.call("RevokeKey", json!({"key_id": doomed, "effective_at": after(4)})).await.unwrap();
    let staged = admin.create(json!({})).await;
    let stage =
        json!({"key_id": staged, "strategy": "ROTATION_STRATEGY_STAGED", "effective_at": after(4)});
    admin.call("RotateKey", stage).await.unwrap();
    let about = admin.call("GetKeyMetadata", json!({"key_id": staged})).await.unwrap();
    assert_eq!(about["metadata"]["primary_version"], 1, "{about}");
    assert_eq!(about["metadata"]["staged_version"], 2, "{about}");

    let server = server.restart(true, &Options::default());
    let admin = server.admin().await;
    let fail = until_refused(&admin, "GetKey", json!({"key_id": graced, "version": 1})).await;
    assert_eq!((fail.code, fail.reason.as_str()), (Code::FailedPrecondition, "VERSION_REVOKED"));
    admin.call("GetKey", json!({"key_id": graced})).await.unwrap();
    let fail = until_refused(&admin, "GetKey", json!({"key_id": expiring})).await;
    assert_eq!((fail.code, fail.reason.as_str()), (Code::FailedPrecondition, "KEY_EXPIRED"));
    let fail = until_refused(&admin, "GetKey", json!({"key_id": doomed})).await;
    assert_eq!((fail.code, fail.reason.as_str()), (Code::FailedPrecondition, "KEY_REVOKED"));
    let begin = tokio::time::Instant::now();
    while admin.call("GetKeyMetadata", json!({"key_id": staged})).await.unwrap()["metadata"]["primary_version"]
        != 2
    {
        assert!(begin.elapsed() < PATIENCE, "the staged version was not promoted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let past = json!({"key_type": "KEY_TYPE_AES_256", "expires_at": "2001-01-01T00:00:00Z"});
    let fail = refused(admin.call("CreateKey", past).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "expires_at");
    let grace = json!({"key_id": graced, "grace_period_seconds": -1});
    let fail = refused(admin.call("RotateKey", grace).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "grace_period_seconds");
}

#[tokio::test(flavor = "multi_thread")]
async fn go_06_strategies_filters_counts_contexts_and_history_do_what_they_say() {
    let server = Server::dev();
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let b = server.client(&admin, "user-b", &["user"]).await;

    // SCHEDULED keeps its period, STAGED waits for the second call.
    let key = a.create(json!({})).await;
    let schedule = json!({"key_id": key, "strategy": "ROTATION_STRATEGY_SCHEDULED", "generation_params": {"rotation_period_seconds": "7200"}});
    let reply = a.call("RotateKey", schedule).await.unwrap();
    assert_eq!(reply["metadata"]["rotation_period_seconds"], 7200, "{reply}");
    let jobs = admin.call("ListJobs", json!({"key_id": key})).await.unwrap();
    assert_eq!(jobs["jobs"][0]["kind"], "JOB_KIND_ROTATE", "{jobs}");
    for primary in [1, 2] {
        let stage = json!({"key_id": key, "strategy": "ROTATION_STRATEGY_STAGED"});
        a.call("RotateKey", stage).await.unwrap();
        let about = a.call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
        assert_eq!(about["metadata"]["primary_version"], primary, "{about}");
    }

    // Filters combine and the counts are right.
    for i in 0..6 {
        a.create(json!({"tags": {"parity": (i % 2).to_string(), "all": "x"}})).await;
    }
    let list = |filters: Value| {
        let a = a.clone();
        async move { a.call("ListKeys", filters).await.unwrap() }
    };
    let page = list(json!({"tag_filters": {"parity": "1"}, "page_size": 2})).await;
    assert_eq!(page["keys"].as_array().unwrap().len(), 2, "{page}");
    assert_eq!((&page["total_count"], &page["filtered_count"]), (&json!(7), &json!(3)));
    let page = list(json!({"tag_filters": {"all": ""}, "key_types": ["KEY_TYPE_AES_256"]})).await;
    assert_eq!(page["filtered_count"], 6, "an empty value stands for any");
    let page = list(json!({"statuses": ["KEY_STATUS_REVOKED"]})).await;
    assert_eq!(page["filtered_count"], 0);

    // Contexts grant use, and nothing beyond.
    refused(b.call("GetKey", json!({"key_id": key})).await, Code::NotFound);
    let share = json!({"key_id": key, "contexts_to_add": ["user-b"]});
    a.call("UpdateKeyMetadata", share).await.unwrap();
    b.call("GetKey", json!({"key_id": key})).await.unwrap();
    for (method, body) in [
        ("RotateKey", json!({"key_id": key})),
        ("RevokeKey", json!({"key_id": key})),
        ("UpdateKeyMetadata", json!({"key_id": key, "contexts_to_add": ["user-c"]})),
        ("UpdateKeyMetadata", json!({"key_id": key, "description": "b's"})),
        ("ScheduleKeyDestruction", json!({"key_id": key})),
    ] {
        refused(b.call(method, body).await, Code::PermissionDenied);
    }
    assert!(crate::go_batch::listed(&b).await.contains(&key));

    // History and counts are what happened. Reads get there in blocks, moments later.
    let history = json!({"key_id": key, "include_access_history": true});
    let begin = tokio::time::Instant::now();
    loop {
        let about = a.call("GetKeyMetadata", history.clone()).await.unwrap();
        let entries = about["access_history"].as_array().unwrap().clone();
        let read = |h: &Value| h["client_identity"] == "user-b" && h["operation"] == "GetKey";
        if entries.iter().any(read) {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "{entries:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let about = a
        .call(
            "GetKeyMetadata",
            json!({"key_id": key, "include_access_history": true, "include_policy_details": true}),
        )
        .await
        .unwrap();
    let history = about["access_history"].as_array().unwrap();
    let seen = |client: &str, operation: &str, success: bool| {
        history.iter().any(|h| {
            h["client_identity"] == client && h["operation"] == operation && h["success"] == success
        })
    };
    assert!(seen("user-a", "CreateKey", true), "{history:#?}");
    assert!(seen("user-a", "RotateKey", true), "{history:#?}");
    assert!(seen("user-b", "GetKey", true), "{history:#?}");
    assert!(seen("user-b", "RevokeKey", false), "{history:#?}");
    assert!(about["metadata"]["access_count"].as_i64().unwrap() >= 1, "{about}");
    assert!(about["metadata"]["last_accessed_at"].is_string(), "{about}");
    let details = about["policy_details"].as_object().unwrap();
    assert!(
        !details.is_empty() && details.values().all(|d| d["policy_params"]["text"].is_string())
    );

    a.call("UpdateKeyMetadata", json!({"key_id": key, "contexts_to_remove": ["user-b"]}))
        .await
        .unwrap();
    refused(b.call("GetKey", json!({"key_id": key})).await, Code::NotFound);
    assert!(!crate::go_batch::listed(&b).await.contains(&key));

    // Atomic is all or nothing.
    let count = crate::go_batch::listed(&a).await.len();
    let items = json!([{"key_type": "KEY_TYPE_AES_256"}, {"key_type": "KEY_TYPE_AES_256", "data_classification": "?"}]);
    let reply = a.call("BatchCreateKeys", json!({"keys": items, "atomic": true})).await.unwrap();
    assert_eq!((&reply["successful_count"], &reply["failed_count"]), (&json!(0), &json!(2)));
    assert_eq!(crate::go_batch::listed(&a).await.len(), count);
    let reply =
        a.call("BatchCreateKeys", json!({"keys": items, "continue_on_error": true})).await.unwrap();
    assert_eq!((&reply["successful_count"], &reply["failed_count"]), (&json!(1), &json!(1)));
    assert_eq!(crate::go_batch::listed(&a).await.len(), count + 1);
}

/// Swaps the version rows of two keys in a closed store.
async fn swap_versions(store: &std::path::Path, first: &str, second: &str) {
    use polykey_storage::redb::{Options, Redb};
    use polykey_storage::{Commit, NoFinish, Store};
    let row = |id: &str| {
        let mut row = uuid::Uuid::parse_str(id).unwrap().as_bytes().to_vec();
        row.extend(1_u32.to_be_bytes());
        row
    };
    let space = polykey::vault::space::VERSIONS;
    let store = Redb::open(store, Options::default()).unwrap();
    let (a, b) = (row(first), row(second));
    let of_a = store.get(space, &a).await.unwrap().unwrap().value;
    let of_b = store.get(space, &b).await.unwrap().unwrap().value;
    let commit = Commit::new().put(space, a, of_b).put(space, b, of_a);
    store.commit(vec![commit], &mut NoFinish).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn go_07_a_wrapped_key_opens_under_its_own_root_and_in_its_own_row_only() {
    let server = Server::dev();
    let admin = server.admin().await;
    let (a, b) = (admin.create(json!({})).await, admin.create(json!({})).await);
    let checksum =
        |reply: &Value| reply["key_material"]["key_checksum"].as_str().unwrap().to_owned();
    let before = checksum(&admin.call("GetKey", json!({"key_id": b})).await.unwrap());
    let (status, _, directory) = server.stop();
    assert!(status.success());
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    // Another master key: nothing falls back to anything.
    let key = find(&state, "master.key");
    let original = std::fs::read(&key).unwrap();
    let mut other = original.clone();
    other[0] = if other[0] == b'0' { b'1' } else { b'0' };
    std::fs::write(&key, &other).unwrap();
    let output = std::process::Command::new(crate::common::POLYKEY)
        .args(["dev", "--listen", "127.0.0.1:0", "--dir"])
        .arg(&state)
        .output()
        .unwrap();
    assert!(!output.status.success(), "it started under another master key");
    let text = String::from_utf8_lossy(&output.stderr).to_lowercase();
    assert!(text.contains("master key") || text.contains("master.key"), "{text}");
    assert!(!text.contains("panicked"), "{text}");

    // Rows that changed places: refused at the start, or on the first use, and never the other key.
    std::fs::write(&key, &original).unwrap();
    swap_versions(&find(&state, ".redb"), &a, &b).await;
    let output = Server::try_again(&state);
    let Ok(server) = output else { return };
    let (files, id, api_key) = server.profile_files();
    let mut admin = Client::new(&server.address, files, &id, &api_key);
    if let Err(fail) = admin.login().await {
        // The check of the whole store came first and stopped writing.
        assert!(matches!(fail.code, Code::DataLoss | Code::Unavailable), "{fail:?}");
        return;
    }
    match admin.call("GetKey", json!({"key_id": b})).await {
        Err(fail) => assert!(matches!(fail.code, Code::DataLoss | Code::Unavailable), "{fail:?}"),
        Ok(reply) => panic!("{} was {before}", checksum(&reply)),
    }
}

/// The one file below `directory` whose name ends so.
pub(crate) fn find(directory: &std::path::Path, ends: &str) -> std::path::PathBuf {
    let mut rest = vec![directory.to_owned()];
    while let Some(next) = rest.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else if path.to_string_lossy().ends_with(ends) {
                return path;
            }
        }
    }
    panic!("no {ends} in {}", directory.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn go_08_checksums_tell_nothing_of_the_plaintext() {
    let server = Server::dev();
    let admin = server.admin().await;
    let secret = b"sk_live_4eC39HqLyjWDarjtT1zdp7dc";
    let encoded = data_encoding::BASE64.encode(secret);
    let request = json!({"key_type": "KEY_TYPE_API_KEY", "value": encoded});
    let one = admin.call("CreateKey", request.clone()).await.unwrap();
    let two = admin.call("CreateKey", request).await.unwrap();
    let hash = |data: &[u8], algorithm| {
        data_encoding::HEXLOWER.encode(aws_lc_rs::digest::digest(algorithm, data).as_ref())
    };
    use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA384, SHA512};
    for reply in [&one, &two] {
        for checksum in [
            reply["key_material"]["key_checksum"].as_str().unwrap(),
            reply["metadata"]["metadata_checksum"].as_str().unwrap(),
        ] {
            assert!(checksum.len() >= 6, "{checksum:?}");
            for algorithm in [&SHA1_FOR_LEGACY_USE_ONLY, &SHA256, &SHA384, &SHA512] {
                let plain = hash(secret, algorithm);
                assert!(!plain.starts_with(checksum) && !plain.ends_with(checksum), "{checksum}");
            }
        }
    }
    assert_ne!(
        one["key_material"]["key_checksum"], two["key_material"]["key_checksum"],
        "equal checksums tell that two keys are equal"
    );
    let key = json!({"key_id": one["key_id"]});
    let again = admin.call("GetKey", key).await.unwrap();
    assert_eq!(again["key_material"]["key_checksum"], one["key_material"]["key_checksum"]);
    assert_eq!(again["key_material"]["plaintext"], "");
}
