//! Limits one below, at and one above, through the whole server.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tonic::Code;

use crate::common::Server;
use crate::go_lifecycle::after;

fn many(n: usize) -> BTreeMap<String, String> {
    (0..n).map(|i| (format!("k{i}"), String::new())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_at_one_below_at_and_one_above() {
    let server = Server::dev();
    let admin = server.admin().await;
    let api = |bytes: usize| json!({"key_type": "KEY_TYPE_API_KEY", "value": data_encoding::BASE64.encode(&vec![7; bytes])});
    let list = |n: usize| (0..n).map(|i| format!("c{i}")).collect::<Vec<_>>();
    let policies = |n: usize| {
        let text = "permit (principal, action, resource == ?resource);";
        (0..n).map(|i| (format!("p{i}"), text.to_owned())).collect::<BTreeMap<_, _>>()
    };
    let sized = |bytes: usize| {
        let text = "permit (principal, action, resource == ?resource); //";
        json!({"p": format!("{text}{}", "x".repeat(bytes - text.len()))})
    };
    type Case<'a> = (&'a str, &'a str, Box<dyn Fn(usize) -> Value + 'a>, usize);
    let cases: Vec<Case<'_>> = vec![
        ("CreateKey", "description", Box::new(|n| json!({"description": "x".repeat(n)})), 1024),
        ("CreateKey", "tags", Box::new(|n| json!({"tags": many(n)})), 50),
        ("CreateKey", "tags", Box::new(|n| json!({"tags": {"k".repeat(n): ""}})), 128),
        ("CreateKey", "tags", Box::new(|n| json!({"tags": {"k": "v".repeat(n)}})), 256),
        (
            "CreateKey",
            "initial_authorized_contexts",
            Box::new(|n| json!({"initial_authorized_contexts": list(n)})),
            100,
        ),
        (
            "CreateKey",
            "initial_authorized_contexts",
            Box::new(|n| json!({"initial_authorized_contexts": ["c".repeat(n)]})),
            256,
        ),
        ("CreateKey", "access_policies", Box::new(|n| json!({"access_policies": policies(n)})), 50),
        ("CreateKey", "access_policies", Box::new(|n| json!({"access_policies": sized(n)})), 4096),
        ("CreateKey", "value", Box::new(api), 4096),
        (
            "CreateKey",
            "rotation_period_seconds",
            Box::new(|n| json!({"rotation_period_seconds": n})),
            315_576_000,
        ),
        ("CreateKey", "alias", Box::new(|n| json!({"alias": "a".repeat(n)})), 250),
        ("ListKeys", "page_size", Box::new(|n| json!({"page_size": n})), 1000),
        (
            "RotateKey",
            "grace_period_seconds",
            Box::new(|n| json!({"grace_period_seconds": n})),
            315_576_000,
        ),
        (
            "RevokeKey",
            "revocation_reason",
            Box::new(|n| json!({"revocation_reason": "r".repeat(n), "effective_at": after(9000)})),
            1024,
        ),
        ("ScheduleKeyDestruction", "window_days", Box::new(|n| json!({"window_days": n})), 30),
    ];
    for (method, field, body, limit) in &cases {
        for (n, good) in [(limit - 1, true), (*limit, true), (limit + 1, false)] {
            let mut request = body(n);
            if *method == "CreateKey" {
                if request["key_type"].is_null() {
                    request["key_type"] = "KEY_TYPE_AES_256".into();
                }
            } else if *method != "ListKeys" {
                request["key_id"] = admin.create(json!({})).await.into();
            }
            match (admin.call(method, request).await, good) {
                (Ok(_), true) => {}
                (Err(fail), false) => {
                    assert_eq!(fail.code, Code::InvalidArgument, "{method} {field} {n}: {fail:?}");
                    let named = fail.violations.iter().any(|(f, _)| f.starts_with(field));
                    assert!(named, "{method} {field} {n}: {:?}", fail.violations);
                }
                (result, _) => panic!("{method} {field} of {n}: {:?}", result.map(|_| "accepted")),
            }
        }
    }
    for (n, good) in [(0, false), (1, true), (999, true), (1000, true), (1001, false)] {
        let items = vec![json!({"key_id": "01890a5d-ac96-774b-bcce-b302099a8057"}); n];
        let batch = json!({"keys": items, "continue_on_error": true});
        match (admin.call("BatchGetKeys", batch).await, good) {
            (Ok(reply), true) => assert_eq!(reply["results"].as_array().unwrap().len(), n),
            (Err(fail), false) => {
                assert_eq!(
                    (fail.code, fail.violations[0].0.as_str()),
                    (Code::InvalidArgument, "keys")
                );
            }
            (result, _) => panic!("a batch of {n}: {:?}", result.map(|_| "accepted")),
        }
    }
    for (n, good) in [(1, true), (128, true), (129, false)] {
        let key = "i".repeat(n);
        let body = json!({"key_type": "KEY_TYPE_AES_256"});
        let reply =
            admin.call_with("CreateKey", body, &[("idempotency-key", key.as_bytes())]).await;
        match (reply, good) {
            (Ok(_), true) => {}
            (Err(fail), false) => assert_eq!(fail.code, Code::InvalidArgument, "{fail:?}"),
            (result, _) => panic!("an idempotency key of {n}: {:?}", result.map(|_| "accepted")),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_over_the_message_limit_is_out_of_range() {
    let server = Server::dev();
    let admin = server.admin().await;
    // Text of ValidatePolicy is one string field of the message: 4 bytes of length and a tag around it.
    const LIMIT: usize = 4 * 1024 * 1024 + 64 * 1024;
    for (n, code) in [
        (LIMIT - 5, Code::InvalidArgument),
        (LIMIT - 4, Code::OutOfRange),
        (LIMIT, Code::OutOfRange),
    ] {
        let fail = admin.call("ValidatePolicy", json!({"text": " ".repeat(n)})).await.unwrap_err();
        assert_eq!(fail.code, code, "{n}: {}", fail.text);
    }
    admin.call("ListKeys", json!({})).await.unwrap();
}
