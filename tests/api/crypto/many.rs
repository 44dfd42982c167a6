//! Much work: many operations in one call, limits on use, and large data.

use serde_json::{Value, json};
use tonic::Code;

use super::{b64, bytes, decrypt, encrypt, says_nothing};
use crate::common::Server;
use crate::common::client::refused;

#[tokio::test(flavor = "multi_thread")]
async fn many_operations_in_one_call_are_each_as_if_they_came_alone() {
    let server = Server::dev();
    let admin = server.admin().await;
    let user = server.client(&admin, "user-a", &["user"]).await;
    let key = user.create(json!({})).await;
    let signer = user.create(json!({"key_type": "KEY_TYPE_ECDSA_P256"})).await;
    let hidden = admin.create(json!({})).await;
    let operations = vec![
        json!({"encrypt": {"key_id": key, "plaintext": b64(b"one")}, "reference": "first"}),
        json!({"sign": {"key_id": signer, "message": b64(b"m")}}),
        json!({"encrypt": {"key_id": hidden, "plaintext": b64(b"two")}}),
        json!({"encrypt": {"key_id": signer, "plaintext": b64(b"two")}}),
        json!({}),
        json!({"generate_random": {"length": 16}, "reference": "last"}),
    ];
    let body = json!({"operations": operations, "continue_on_error": true});
    let reply = user.call("BatchCrypto", body).await.unwrap();
    assert_eq!((&reply["successful_count"], &reply["failed_count"]), (&json!(3), &json!(3)));
    let streamed = user.stream("StreamCrypto", operations.clone()).await.unwrap();
    let error =
        |result: &Value| (result["error"]["code"].clone(), result["error"]["message"].to_string());
    for results in [reply["results"].as_array().unwrap(), &streamed] {
        assert_eq!(results.len(), 6);
        for (i, result) in results.iter().enumerate() {
            assert_eq!(result["index"], i);
        }
        assert_eq!(
            (&results[0]["reference"], &results[5]["reference"]),
            (&json!("first"), &json!("last"))
        );
        let sealed = results[0]["encrypt"]["ciphertext"].as_str().unwrap();
        let opened = user.call("Decrypt", json!({"ciphertext": sealed})).await.unwrap();
        assert_eq!(bytes(&opened["plaintext"]), b"one");
        assert!(results[1]["sign"]["signature"].is_string());
        assert_eq!(error(&results[2]), (json!(5), "\"not found\"".into()));
        assert!(error(&results[3]).1.contains("encrypt.key_id"), "{}", results[3]);
        assert!(error(&results[4]).1.contains("operation"), "{}", results[4]);
    }
    let reply = user.call("BatchCrypto", json!({"operations": operations})).await.unwrap();
    let codes: Vec<i64> = reply["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["error"]["code"].as_i64().unwrap_or(0))
        .collect();
    assert_eq!(codes, [0, 0, 5, 10, 10, 10], "what follows a failure is not tried");
    for count in [0, 1001] {
        let many = vec![json!({"generate_random": {"length": 1}}); count];
        let fail = refused(
            user.call("BatchCrypto", json!({"operations": many})).await,
            Code::InvalidArgument,
        );
        assert_eq!(fail.violations[0].0, "operations");
    }
    let all: Vec<Value> = (0..1000).map(|i| json!({"encrypt": {"key_id": key, "plaintext": b64(&[u8::try_from(i % 251).unwrap()])}})).collect();
    let reply = user
        .call("BatchCrypto", json!({"operations": all, "continue_on_error": true}))
        .await
        .unwrap();
    assert_eq!(reply["successful_count"], 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_on_use_hold_across_a_kill() {
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({"max_uses": 40})).await;
    let mut used = 0;
    for _ in 0..10 {
        encrypt(&admin, &key, b"x").await.unwrap();
        used += 1;
    }
    let rotating = admin.create(json!({"rotate_after_uses": 16})).await;
    let first = encrypt(&admin, &rotating, b"first").await.unwrap();
    let server = server.restart(true, &crate::common::Options::default());
    let admin = server.admin().await;
    let exhausted = loop {
        match encrypt(&admin, &key, b"x").await {
            Ok(_) => used += 1,
            Err(fail) => break fail,
        }
        assert!(used <= 40, "{used} uses of 40");
    };
    assert_eq!(exhausted.reason, "USES_EXHAUSTED");
    assert!(used >= 36, "a kill cost {} uses", 40 - used);
    // What was sealed opens without limit; a new version has its own.
    admin.call("RotateKey", json!({"key_id": key})).await.unwrap();
    encrypt(&admin, &key, b"x").await.unwrap();
    // The other one rotates by itself.
    for _ in 0..400 {
        encrypt(&admin, &rotating, b"x").await.unwrap();
        let shown = admin.call("GetKeyMetadata", json!({"key_id": rotating})).await.unwrap();
        if shown["metadata"]["primary_version"].as_i64().unwrap() > 1 {
            assert_eq!(decrypt(&admin, &first).await.unwrap(), b"first");
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("it did not rotate");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_data_goes_through_whole_or_not_at_all() {
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({"alias": "big"})).await;
    let data: Vec<u8> = (0..3_000_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    let mut messages =
        vec![json!({"header": {"key_id": key, "chunk_size": 4096, "context": {"a": "b"}}})];
    messages.extend(data.chunks(700_000).map(|c| json!({"plaintext": b64(c)})));
    let sealed = admin.stream("EncryptStream", messages).await.unwrap();
    assert_eq!(sealed[0]["key_id"], key.as_str());
    let sealed: Vec<u8> = sealed.iter().flat_map(|m| bytes(&m["ciphertext"])).collect();
    let open = async |sealed: &[u8], context: Value, piece: usize| {
        let mut messages = vec![json!({"header": {"context": context}})];
        messages.extend(sealed.chunks(piece).map(|c| json!({"ciphertext": b64(c)})));
        admin.stream("DecryptStream", messages).await
    };
    let right = json!({"a": "b"});
    for piece in [50, 1_000_000] {
        let sealed = if piece == 50 { &sealed[..91] } else { &sealed[..] };
        let opened = open(sealed, right.clone(), piece).await;
        if piece == 50 {
            says_nothing(&opened.unwrap_err());
            continue;
        }
        let opened: Vec<u8> = opened.unwrap().iter().flat_map(|m| bytes(&m["plaintext"])).collect();
        assert!(opened == data);
    }
    for cut in [1, 16, 17, 4112, 4113, 100_000] {
        says_nothing(
            &open(&sealed[..sealed.len() - cut], right.clone(), 1_000_000).await.unwrap_err(),
        );
    }
    says_nothing(&open(&sealed, json!({"a": "c"}), 1_000_000).await.unwrap_err());
    let mut swapped = sealed.clone();
    swapped[91..91 + 2 * 4112].rotate_left(4112);
    says_nothing(&open(&swapped, right.clone(), 1_000_000).await.unwrap_err());

    // The same from the command line, with nothing left behind where it fails.
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(path("plain"), &data).unwrap();
    let run = |args: &[&str]| server.cli(args);
    let (code, _, err) =
        run(&["encrypt", "--key", "alias/big", "--in", &path("plain"), "--out", &path("sealed")]);
    assert_eq!(code, 0, "{err}");
    let (code, shown, err) = run(&["inspect", "--in", &path("sealed"), "-o", "json"]);
    assert_eq!(code, 0, "{err}");
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        (&shown["kind"], &shown["key_id"], &shown["plaintext_bytes"]),
        (&json!("stream"), &json!(key), &json!(3_000_000))
    );
    let (code, _, err) = run(&["decrypt", "--in", &path("sealed"), "--out", &path("back")]);
    assert_eq!(code, 0, "{err}");
    assert!(std::fs::read(path("back")).unwrap() == data);
    let cut = std::fs::read(path("sealed")).unwrap();
    std::fs::write(path("cut"), &cut[..cut.len() - 65_552]).unwrap();
    let (code, _, err) = run(&["decrypt", "--in", &path("cut"), "--out", &path("none")]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("decryption failed") && err.contains("--context"), "{err}");
    let left: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
}
