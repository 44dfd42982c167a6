//! What the Go service got wrong, items 9 to 15 of the contract: logins, breakers, audit, health, start, identity, panics.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use polykey::net::client::ClientFiles;
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, SanType};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::client::{Client, method, path, pool, refused};
use crate::common::{Options, PATIENCE, POLYKEY, Server};

/// Issues a certificate of any shape from the node's own authority.
pub(crate) fn forge(
    server: &Server,
    name: &str,
    shape: impl FnOnce(&mut CertificateParams),
) -> ClientFiles {
    let read = |file: &str| std::fs::read_to_string(server.state.join(file)).unwrap();
    let issuer =
        Issuer::from_ca_cert_pem(&read("ca.pem"), KeyPair::from_pem(&read("ca.key")).unwrap())
            .unwrap();
    let mut params = CertificateParams::default();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    params.distinguished_name = rcgen::DistinguishedName::new();
    shape(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    keep(server, name, &certificate.pem(), &key.serialize_pem())
}

/// Writes a certificate and its key where a client finds them.
pub(crate) fn keep(server: &Server, name: &str, certificate: &str, key: &str) -> ClientFiles {
    let directory = server.state.parent().unwrap().join("certificates");
    std::fs::create_dir_all(&directory).unwrap();
    let files = ClientFiles {
        server_ca: server.state.join("ca.pem"),
        certificate: directory.join(format!("{name}.pem")),
        key: directory.join(format!("{name}.key")),
    };
    polykey::pki::write_file(&files.certificate, certificate.as_bytes(), 0o644).unwrap();
    polykey::pki::write_file(&files.key, key.as_bytes(), 0o600).unwrap();
    files
}

/// All audit events of a filter.
pub(crate) async fn audited(auditor: &Client, filter: Value) -> Vec<Value> {
    let (mut events, mut token) = (Vec::new(), String::new());
    loop {
        let request = json!({"filter": filter, "page_size": 1000, "page_token": token});
        let page = auditor.call("ListAuditEvents", request).await.unwrap();
        events.extend(page["events"].as_array().unwrap().iter().cloned());
        token = page["next_page_token"].as_str().unwrap().to_owned();
        if token.is_empty() {
            return events;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn go_09_logins_are_limited_audited_and_alike_and_tokens_are_bound() {
    let server = Server::dev();
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let b = server.client(&admin, "user-b", &["user"]).await;

    // A token works with its own certificate alone.
    let stolen = b.with_token(&a.token);
    let other = refused(stolen.call("ListKeys", json!({})).await, Code::Unauthenticated);
    let stolen = admin.with_token(&a.token);
    refused(stolen.call("ListKeys", json!({})).await, Code::Unauthenticated);
    let mut refresh = b.clone();
    refresh.token.clear();
    let fail = refused(
        refresh.call("RefreshToken", json!({"refresh_token": a.refresh})).await,
        Code::Unauthenticated,
    );
    assert_eq!(fail.text, other.text);
    a.call("ListKeys", json!({})).await.unwrap();

    // Another's token takes the permission; a forged one is nobody's; a revoked one stays so.
    let fail = b
        .call("RevokeToken", json!({"access_token": a.token, "client_id": "user-a"}))
        .await
        .unwrap_err();
    assert_ne!(fail.code, Code::Ok);
    a.call("ListKeys", json!({})).await.unwrap();
    let revoked = a.call("RevokeToken", json!({"access_token": a.token})).await.unwrap();
    assert_eq!(revoked["revoked"], true);
    refused(a.call("ListKeys", json!({})).await, Code::Unauthenticated);
    let server = server.restart(true, &Options::default());
    refused(a.at(&server.address).call("ListKeys", json!({})).await, Code::Unauthenticated);
    let admin = server.admin().await;
    let b = b.at(&server.address);
    b.call("ListKeys", json!({})).await.unwrap();

    // Unknown client and wrong key look the same, and both are limited.
    let login = |id: &str, key: &str| {
        let (anonymous, body) = (b.with_token(""), json!({"client_id": id, "api_key": key}));
        async move { anonymous.call("Authenticate", body).await.unwrap_err() }
    };
    let (wrong, unknown) = (login("user-b", "wrong").await, login("nobody", "wrong").await);
    assert_eq!((wrong.code, &wrong.text), (Code::Unauthenticated, &unknown.text));
    assert_eq!((wrong.code, wrong.status.details()), (unknown.code, unknown.status.details()));
    let mut limited = false;
    for _ in 0..60 {
        let fail = login("user-b", "wrong").await;
        if fail.code == Code::ResourceExhausted {
            assert!(fail.retry, "no RetryInfo");
            limited = true;
            break;
        }
        assert_eq!(fail.code, Code::Unauthenticated);
    }
    assert!(limited, "sixty wrong keys in a row and no limit");

    let events = audited(&admin, json!({"outcome": "AUDIT_OUTCOME_DENIED"})).await;
    let denied: i64 = events
        .iter()
        .filter(|e| e["action"].as_str().unwrap_or("").contains("Authenticate"))
        .map(|e| e["count"].as_i64().unwrap().max(1))
        .sum();
    assert!(denied >= 3, "{events:#?}");
}

#[tokio::test]
async fn go_10_failures_of_callers_stop_nobody() {
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let missing = json!({"key_id": "01890a5d-ac96-774b-bcce-b302099a8057"});
    for fail in join_all((0..300).map(|_| admin.call("GetKey", missing.clone()))).await {
        refused(fail, Code::NotFound);
    }
    let mut cancelled = 0;
    for i in 0..200 {
        let call = admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"}));
        if tokio::time::timeout(Duration::from_micros(i * 20), call).await.is_err() {
            cancelled += 1;
        }
    }
    assert!(cancelled > 20, "{cancelled} calls were cancelled");
    for _ in 0..20 {
        admin.call("GetKey", json!({"key_id": key})).await.unwrap();
        admin.create(json!({})).await;
    }
    let health = admin.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(health["status"], "HEALTH_STATUS_HEALTHY");
    assert_eq!(
        health["metrics"]["error_rate_percent"], 0.0,
        "a caller's failure is not the server's"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn go_11_every_mutation_is_audited_exactly_once() {
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let mut expected: BTreeMap<String, &str> = BTreeMap::new();
    let mut bodies = Vec::new();
    for i in 0..200 {
        let (name, body, action) = match i % 4 {
            0 => ("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"}), "CreateKey"),
            1 => ("RotateKey", json!({"key_id": key}), "RotateKey"),
            2 => (
                "UpdateKeyMetadata",
                json!({"key_id": key, "description": i.to_string()}),
                "UpdateKeyMetadata",
            ),
            _ => ("CreateAlias", json!({"key_id": key, "alias": format!("a{i}")}), "SetAlias"),
        };
        if i % 4 == 3 && i > 100 {
            continue;
        }
        let id = format!("go-11-{i}");
        expected.insert(id.clone(), action);
        bodies.push((name, body, id));
    }
    let calls = bodies.iter().map(|(name, body, id)| {
        let meta = [("polykey-request-id", id.clone())];
        let admin = &admin;
        async move {
            let meta: Vec<(&str, &[u8])> = meta.iter().map(|(k, v)| (*k, v.as_bytes())).collect();
            admin.call_with(name, body.clone(), &meta).await.unwrap();
        }
    });
    join_all(calls).await;
    let server = server.restart(true, &Options::default());
    let admin = server.admin().await;
    let mut found: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for event in audited(&admin, json!({})).await {
        let id = event["request_id"].as_str().unwrap().to_owned();
        if id.starts_with("go-11-") {
            found.entry(id).or_default().push(event);
        }
    }
    assert_eq!(found.keys().collect::<BTreeSet<_>>(), expected.keys().collect::<BTreeSet<_>>());
    for (id, action) in expected {
        let events = &found[&id];
        assert_eq!(events.len(), 1, "{id}: {events:#?}");
        assert_eq!(events[0]["action"], action, "{id}: {:#?}", events[0]);
        assert_eq!(events[0]["outcome"], "AUDIT_OUTCOME_SUCCESS");
        assert_eq!(events[0]["client_id"], "admin");
    }
    let (code, out, err) = server.cli(&["audit", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn go_12_health_is_measured_and_probes_need_no_token() {
    let server = Server::dev();
    let admin = server.admin().await;
    let anonymous = admin.with_token("");
    let before = anonymous.call("HealthCheck", json!({})).await.unwrap();
    let figure = |health: &Value, name: &str| health["metrics"][name].as_i64().unwrap();
    assert_eq!(figure(&before, "active_keys_count"), 0);
    let mut keys = Vec::new();
    for _ in 0..5 {
        keys.push(admin.create(json!({})).await);
    }
    admin.call("RevokeKey", json!({"key_id": keys[0]})).await.unwrap();
    admin.call("DisableKey", json!({"key_id": keys[1]})).await.unwrap();
    let after = anonymous.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(figure(&after, "active_keys_count"), 3);
    let requests =
        figure(&after, "total_requests_handled") - figure(&before, "total_requests_handled");
    assert!((7..=8).contains(&requests), "{requests} requests were counted, not 7 or 8");
    assert!(after["metrics"]["memory_usage_percent"].as_f64().unwrap() > 0.0);
    assert_eq!(after["service_version"], env!("CARGO_PKG_VERSION"));
    let started: jiff::Timestamp =
        after["metrics"]["uptime_since"].as_str().unwrap().parse().unwrap();
    assert!(jiff::Timestamp::now().duration_since(started) < jiff::SignedDuration::from_secs(600));
    for service in ["", "polykey.v2.PolykeyService"] {
        let reply = anonymous.call("Health/Check", json!({"service": service})).await.unwrap();
        assert_eq!(reply["status"], "SERVING", "{service:?}");
    }
    refused(anonymous.call("Health/Check", json!({"service": "no.Such"})).await, Code::NotFound);
    let (code, out, err) = server.cli(&["health"]);
    assert_eq!(code, 0, "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn go_13_it_starts_with_nothing_but_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = std::process::Command::new(POLYKEY)
        .args(["dev", "--listen", "127.0.0.1:0"])
        .current_dir(directory.path())
        .env_clear()
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let profile = directory.path().join(".polykey/profile.toml");
    let begin = std::time::Instant::now();
    let health = |path: &std::path::Path| {
        std::process::Command::new(POLYKEY)
            .args(["health"])
            .env_clear()
            .env("POLYKEY_PROFILE", path)
            .output()
            .unwrap()
            .status
            .success()
    };
    while !(profile.exists() && health(&profile)) {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        assert!(begin.elapsed() < PATIENCE, "it is not healthy");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn go_14_certificates_are_matched_by_their_alternative_names_first() {
    let server = Server::dev();
    let admin = server.admin().await;
    let identity = |kind: &str, value: &str| json!({"identities": [{"kind": format!("CERTIFICATE_IDENTITY_KIND_{kind}"), "value": value}], "roles": ["user"]});
    let uri = "spiffe://example.org/billing";
    for (id, fields) in [
        ("by-uri", identity("SPIFFE_URI", uri)),
        ("by-dns", identity("DNS", "billing.example.org")),
    ] {
        let mut request = fields;
        request["client_id"] = id.into();
        request["name"] = id.into();
        let created = admin.call("CreateClient", request).await.unwrap();
        let key = created["api_key"].as_str().unwrap().to_owned();
        let attempt = |name: String, shape: Box<dyn FnOnce(&mut CertificateParams)>| {
            let files = forge(&server, &format!("{id}-{name}"), shape);
            let client = Client::new(&server.address, files, id, &key);
            async move {
                client
                    .call(
                        "Authenticate",
                        json!({"client_id": client.id, "api_key": client.api_key}),
                    )
                    .await
            }
        };
        let cn = |params: &mut CertificateParams, text: &str| {
            params.distinguished_name.push(DnType::CommonName, text);
        };
        let san = move |params: &mut CertificateParams, uri: &str, dns: &str| {
            if !uri.is_empty() {
                params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
            }
            if !dns.is_empty() {
                params.subject_alt_names.push(SanType::DnsName(dns.try_into().unwrap()));
            }
        };
        let good: &[(&str, &str)] = if id == "by-uri" {
            &[(uri, ""), (uri, "other.example.org")]
        } else {
            &[("", "billing.example.org")]
        };
        for (i, (u, d)) in good.iter().enumerate() {
            let (u, d) = ((*u).to_owned(), (*d).to_owned());
            let shape = Box::new(move |p: &mut CertificateParams| {
                san(p, &u, &d);
                cn(p, "somebody-else");
            });
            attempt(format!("good{i}"), shape).await.unwrap();
        }
        // The common name alone, and names that are nearly right.
        let bad: Vec<(&str, &str, &str)> = vec![
            (id, "", ""),
            ("billing.example.org", "", ""),
            (uri, "", ""),
            (id, "spiffe://example.org/billin", ""),
            (id, "spiffe://example.org/billing/x", ""),
            (id, "spiffe://other.org/billing", ""),
            (id, "", "billing.example.com"),
            (id, "", "x.billing.example.org"),
            (id, "", "*.example.org"),
            (id, "spiffe://polykey.local/client/admin", ""),
        ];
        for (i, (name, u, d)) in bad.into_iter().enumerate() {
            let shape = Box::new(move |p: &mut CertificateParams| {
                san(p, u, d);
                cn(p, name);
            });
            let result = attempt(format!("bad{i}"), shape).await;
            match result {
                Err(fail) => assert!(
                    matches!(fail.code, Code::Unauthenticated | Code::Unavailable | Code::Unknown),
                    "{name} {u} {d}: {fail:?}"
                ),
                Ok(_) => panic!("{id} logged in with cn={name} uri={u} dns={d}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn go_15_a_request_that_breaks_ends_alone() {
    use prost_reflect::{DynamicMessage, Value as Field};
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    // Extremes of every scalar of every message, and messages nested where strings are expected.
    let numbers = [i64::MIN, -1, i64::MAX];
    for service in pool().services().filter(|s| s.full_name().starts_with("polykey.v2.")) {
        for method in service.methods() {
            for number in numbers {
                let mut request = DynamicMessage::new(method.input());
                for field in method.input().fields() {
                    let value = match field.kind() {
                        _ if field.is_list() || field.is_map() => continue,
                        prost_reflect::Kind::Int32 => {
                            Field::I32(i32::try_from(number).unwrap_or(i32::MIN))
                        }
                        prost_reflect::Kind::Int64 => Field::I64(number),
                        prost_reflect::Kind::Uint64 => Field::U64(number.cast_unsigned()),
                        prost_reflect::Kind::Enum(_) => {
                            Field::EnumNumber(i32::try_from(number).unwrap_or(i32::MAX))
                        }
                        prost_reflect::Kind::String => {
                            Field::String("\u{0}\u{feff}ä\u{10ffff}%s%n".repeat(9))
                        }
                        prost_reflect::Kind::Bytes => Field::Bytes(vec![0xff; 40].into()),
                        prost_reflect::Kind::Message(m)
                            if m.full_name() == "google.protobuf.Timestamp" =>
                        {
                            let mut stamp = DynamicMessage::new(m);
                            stamp.set_field_by_name("seconds", Field::I64(number));
                            stamp.set_field_by_name(
                                "nanos",
                                Field::I32(i32::try_from(number).unwrap_or(i32::MIN)),
                            );
                            Field::Message(stamp)
                        }
                        _ => continue,
                    };
                    request.set_field(&field, value);
                }
                if matches!(method.name(), "RotateRoot" | "RewrapSlot" | "FollowAudit") {
                    continue;
                }
                if let Err(fail) = admin.send(&method, vec![request], &[]).await {
                    assert!(
                        !matches!(fail.code, Code::Internal | Code::Unknown | Code::DataLoss),
                        "{} {number}: {fail:?}",
                        path(&method)
                    );
                }
            }
        }
    }
    admin.call("GetKey", json!({"key_id": key})).await.unwrap();
    let _ = method("GetKey");
    assert!(!server.output().contains("panicked"), "{}", server.output());
}
