//! Secrets planted everywhere, the whole suite of calls at TRACE level, and then a search for them in all that is left.
//!
//! Beside those that the test plants by hand, every field of every call that can hold a secret gets one of its own, until
//! there are `POLYKEY_CANARIES` of them (100).

mod tell;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use data_encoding::{BASE64, HEXLOWER};
use serde_json::json;
use tell::{Canaries, tell};

use crate::common::client::{message, pool};
use crate::common::collector::Collector;
use crate::common::{Options, Server, skip};
use crate::lock::each_mapping;
use crate::metrics::{get, with_port};

/// What a secret looks like where it must not be: raw, hexadecimal, base64 at each of its three alignments.
fn shapes(secret: &[u8]) -> Vec<Vec<u8>> {
    use data_encoding::{BASE64_NOPAD, BASE64URL_NOPAD, HEXUPPER};
    let mut shapes = vec![
        secret.to_vec(),
        HEXLOWER.encode(secret).into_bytes(),
        HEXUPPER.encode(secret).into_bytes(),
        format!("{secret:?}").trim_matches(['[', ']']).as_bytes().to_vec(),
    ];
    for skip in 0..3 {
        // Whole groups of three only: their text does not depend on what stands around them.
        let aligned = &secret[skip..];
        let aligned = &aligned[..aligned.len() / 3 * 3];
        shapes.push(BASE64_NOPAD.encode(aligned).into_bytes());
        shapes.push(BASE64URL_NOPAD.encode(aligned).into_bytes());
    }
    shapes
}

/// Finds secrets in one pass: by their first four bytes, their first eight, then by all of them.
struct Search {
    maybe: Vec<bool>,
    heads: HashMap<[u8; 8], Vec<(String, Vec<u8>)>>,
}

impl Search {
    fn of<S: AsRef<str>>(secrets: &[(S, Vec<u8>)]) -> Self {
        let mut search = Self { maybe: vec![false; 1 << 20], heads: HashMap::new() };
        for (name, secret) in secrets {
            for (i, shape) in shapes(secret).into_iter().enumerate() {
                let head: [u8; 8] = shape[..8].try_into().unwrap();
                search.maybe[Self::slot(head)] = true;
                let name = format!("{} (shape {i})", name.as_ref());
                search.heads.entry(head).or_default().push((name, shape));
            }
        }
        search
    }

    fn slot(head: [u8; 8]) -> usize {
        let [a, b, c, d, ..] = head;
        (u32::from_le_bytes([a, b, c, d]).wrapping_mul(0x9e37_79b1) >> 12) as usize
    }

    fn hits(&self, hay: &[u8]) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        for (at, window) in hay.windows(8).enumerate() {
            let head: [u8; 8] = window.try_into().unwrap();
            if !self.maybe[Self::slot(head)] {
                continue;
            }
            for (name, shape) in self.heads.get(&head).into_iter().flatten() {
                if hay[at..].starts_with(shape) {
                    found.insert(name.clone());
                }
            }
        }
        found
    }
}

/// Where secrets are in `hay`.
fn hits(hay: &[u8], secrets: &[(&str, Vec<u8>)]) -> BTreeSet<String> {
    Search::of(secrets).hits(hay)
}

fn files(directory: &Path, all: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, all) } else { all.push(path) }
    }
}

#[test]
fn the_search_finds_what_it_is_for() {
    let secret = b"a canary of thirty-two bytes!!!!".to_vec();
    let secrets = [("canary", secret.clone())];
    for around in 0..4 {
        let mut text = vec![b'.'; around];
        text.extend(&secret);
        text.extend(b"...");
        assert!(!hits(&text, &secrets).is_empty());
        assert!(!hits(BASE64.encode(&text).as_bytes(), &secrets).is_empty());
        assert!(!hits(HEXLOWER.encode(&text).as_bytes(), &secrets).is_empty());
        assert!(!hits(format!("{text:?}").as_bytes(), &secrets).is_empty());
    }
    assert!(hits(b"nothing of the sort", &secrets).is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planted_secrets_are_in_no_log_no_error_no_audit_row_no_telemetry_and_no_store() {
    let trace = Options {
        env: vec![("POLYKEY_LOG".into(), "trace".into()), ("RUST_LOG".into(), "trace".into())],
        ..Options::default()
    };
    let (status, mut logs, directory) = Server::dev_with(&trace).stop();
    assert!(status.success());
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    let config = state.join("polykey.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("format = \"pretty\"", "format = \"json\"\nlevel = \"trace\"");
    assert!(text.contains("json"));
    let collector = Collector::start().await;
    let text = with_port(text)
        + &format!(
            "\n[login]\naddress_burst = 10000\nclient_burst = 10000\n[telemetry]\nendpoint = \"http://{}\"\nprotocol = \"http\"\nsample = 1\n",
            collector.address
        );
    std::fs::write(&config, text).unwrap();
    let server = Server::dev_in(&state, &trace, None);
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;

    let planted = b"sk_live_CANARY-51H8vExAmPlE+/0123456789-plant".to_vec();
    let rotated = b"sk_live_CANARY-rotated-77c1d4f0aa52-plant-two".to_vec();
    let refused = b"sk_live_CANARY-refused-9913bb7710cd-plant-333".to_vec();
    let mut secrets: Vec<(&str, Vec<u8>)> = vec![
        ("value", planted.clone()),
        ("rotated value", rotated.clone()),
        ("refused value", refused.clone()),
        ("admin's API key", admin.api_key.clone().into_bytes()),
        ("user's API key", a.api_key.clone().into_bytes()),
    ];
    let mut errors = String::new();
    let base64 = |bytes: &[u8]| BASE64.encode(bytes);

    // Supplied material, by field and by metadata twin, in calls that succeed and calls that do not.
    let made = a
        .call("CreateKey", json!({"key_type": "KEY_TYPE_API_KEY", "value": base64(&planted)}))
        .await
        .unwrap();
    let key = made["key_id"].as_str().unwrap().to_owned();
    let twin: &[(&str, &[u8])] = &[("polykey-value-bin", &planted)];
    a.call_with("CreateKey", json!({"key_type": "KEY_TYPE_API_KEY"}), twin).await.unwrap();
    a.call("RotateKey", json!({"key_id": key, "value": base64(&rotated)})).await.unwrap();
    let batch = json!({"keys": [{"key_type": "KEY_TYPE_API_KEY", "value": base64(&planted)}, {"key_type": "KEY_TYPE_AES_256", "value": base64(&refused)}]});
    errors += &a.call("BatchCreateKeys", batch).await.unwrap()["results"][1]["error"].to_string();
    for body in [
        json!({"key_type": "KEY_TYPE_AES_256", "value": base64(&refused)}),
        json!({"key_type": "KEY_TYPE_API_KEY", "value": base64(&refused), "data_classification": "?"}),
        json!({"key_type": "KEY_TYPE_API_KEY", "value": base64(&refused.repeat(100))}),
    ] {
        errors += &format!("{:?}", a.call("CreateKey", body).await.unwrap_err());
    }
    let twin: &[(&str, &[u8])] = &[("polykey-value-bin", &refused)];
    errors += &format!(
        "{:?}",
        a.call_with("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"}), twin).await.unwrap_err()
    );

    // Generated material, taken out so that it can be looked for.
    let generated = admin.create(json!({"key_type": "KEY_TYPE_AES_256", "exportable": true})).await;
    let out = admin
        .call("ExportKey", json!({"key_id": generated, "mode": "EXPORT_MODE_PLAIN"}))
        .await
        .unwrap();
    let plain = out["key_material"]["plaintext"].as_str().unwrap();
    secrets.push(("generated AES key", BASE64.decode(plain.as_bytes()).unwrap()));
    let pair = admin.create(json!({"key_type": "KEY_TYPE_ECDSA_P384", "exportable": true})).await;
    let out = admin
        .call("ExportKey", json!({"key_id": pair, "mode": "EXPORT_MODE_PLAIN"}))
        .await
        .unwrap();
    let plain =
        BASE64.decode(out["key_material"]["plaintext"].as_str().unwrap().as_bytes()).unwrap();
    // The private scalar of the PKCS #8 structure, not the public half that follows it.
    let at = plain.windows(2).position(|w| w == [0x04, 0x30]).unwrap();
    secrets.push(("generated private key", plain[at + 2..at + 50].to_vec()));
    let out = a
        .call_with("GetKey", json!({"key_id": key}), &[("polykey-export", b"plain")])
        .await
        .unwrap();
    assert_eq!(out.header_bin("polykey-plaintext-bin").unwrap(), rotated);

    // What keys work on, and what they give out.
    let plaintext = b"CANARY-plaintext-5b1d0c7e9a3f-of-an-encryption".to_vec();
    let aad = b"CANARY-additional-data-0f8e7d6c5b4a-unrecorded".to_vec();
    let outside = b"CANARY-imported-hmac-key-9f8e7d6".to_vec();
    secrets.push(("plaintext", plaintext.clone()));
    secrets.push(("additional data", aad.clone()));
    secrets.push(("imported material", outside.clone()));
    let worker = admin.create(json!({})).await;
    let body =
        json!({"key_id": worker, "plaintext": base64(&plaintext), "additional_data": base64(&aad)});
    let sealed = admin.call("Encrypt", body.clone()).await.unwrap();
    let open = json!({"ciphertext": sealed["ciphertext"], "additional_data": base64(&aad)});
    admin.call("Decrypt", open).await.unwrap();
    let mut wrong = body;
    wrong["version"] = 9.into();
    errors += &format!("{:?}", admin.call("Encrypt", wrong).await.unwrap_err());
    let open = json!({"ciphertext": sealed["ciphertext"], "additional_data": base64(&plaintext)});
    errors += &format!("{:?}", admin.call("Decrypt", open).await.unwrap_err());
    let made = admin.call("GenerateDataKey", json!({"key_id": worker})).await.unwrap();
    let plain = made["plaintext"].as_str().unwrap();
    secrets.push(("data key", BASE64.decode(plain.as_bytes()).unwrap()));
    let import = json!({"key": {"key_type": "KEY_TYPE_HMAC_SHA256"}, "wrapping": "IMPORT_WRAPPING_PLAIN", "material": base64(&outside)});
    let imported = admin.call("ImportKey", import.clone()).await.unwrap();
    let mut wrong = import;
    wrong["key"]["key_type"] = "KEY_TYPE_AES_128".into();
    errors += &format!("{:?}", admin.call("ImportKey", wrong).await.unwrap_err());
    let body = json!({"key_id": imported["key"]["key_id"], "message": base64(&plaintext)});
    let mac = admin.call("GenerateMac", body).await.unwrap();
    assert!(mac["mac"].is_string());
    let batch = json!({"operations": [{"encrypt": {"key_id": worker, "plaintext": base64(&plaintext)}}, {"sign": {"key_id": worker, "message": base64(&plaintext)}}], "continue_on_error": true});
    errors += &admin.call("BatchCrypto", batch).await.unwrap()["results"][1]["error"].to_string();

    // Tokens and logins, good and bad.
    secrets.push(("access token", a.token.clone().into_bytes()));
    secrets.push(("refresh token", a.refresh.clone().into_bytes()));
    let again =
        a.with_token("").call("RefreshToken", json!({"refresh_token": a.refresh})).await.unwrap();
    secrets.push((
        "second refresh token",
        again["refresh_token"].as_str().unwrap().as_bytes().to_vec(),
    ));
    for body in [
        json!({"client_id": "admin", "api_key": a.api_key}),
        json!({"client_id": a.api_key, "api_key": "x"}),
        json!({"client_id": "user-a", "api_key": format!("{}x", a.api_key)}),
        json!({"client_id": "user-a", "api_key": "x", "grant_type": a.api_key}),
    ] {
        errors += &format!("{:?}", a.with_token("").call("Authenticate", body).await.unwrap_err());
    }
    errors +=
        &format!("{:?}", admin.with_token(&a.token).call("ListKeys", json!({})).await.unwrap_err());
    errors += &format!(
        "{:?}",
        a.with_token("").call("RefreshToken", json!({"refresh_token": a.token})).await.unwrap_err()
    );

    // Every method once more, with little in it.
    for service in pool().services().filter(|s| s.full_name().starts_with("polykey.v2.")) {
        for method in service.methods() {
            if matches!(method.name(), "FollowAudit") {
                continue;
            }
            let mut body = json!({});
            if method.input().get_field_by_name("key_id").is_some() {
                body["key_id"] = key.clone().into();
            }
            if method.input().get_field_by_name("keys").is_some() {
                body["keys"] = if method.name() == "BatchCreateKeys" {
                    json!([{"key_type": "KEY_TYPE_AES_256"}])
                } else {
                    json!([{"key_id": key}])
                };
            }
            if method.input().get_field_by_name("request").is_some() {
                body["request"] = if method.name() == "StreamCreateKeys" {
                    json!({"key_type": "KEY_TYPE_AES_256"})
                } else {
                    json!({"key_id": key})
                };
            }
            let body = message(method.input(), &body);
            if let Err(fail) = admin.send(&method, vec![body], &[]).await {
                errors += &format!("{fail:?}");
            }
        }
    }
    let count = std::env::var("POLYKEY_CANARIES").map_or(100, |n| n.parse().unwrap());
    let mut canaries = Canaries::default();
    let (refusals, kept) = tell(&admin, &mut canaries, count).await;
    errors += &refusals;
    let (code, audit, err) =
        server.cli(&["audit", "list", "-o", "json", "--limit", &(1000 + 10 * count).to_string()]);
    assert_eq!(code, 0, "{err}");
    assert!(audit.contains("CreateKey"), "{audit}");
    let (_, figures) = get(&server.port("metrics"), "/metrics");
    let (status, output, _) = server.stop();
    assert!(status.success(), "{output}");
    logs += &output;
    let sent = collector.seen();
    let counts = (sent.spans.len(), sent.lines.len(), sent.metrics.len());
    assert!(counts.0 > 100 && counts.1 > 5 && counts.2 > 30, "{counts:?}");
    assert!(logs.contains("TRACE") || logs.contains("trace"), "the logs are not at TRACE level");
    let json_lines = output.lines().filter(|l| l.starts_with('{')).count();
    assert!(json_lines > 50, "only {json_lines} lines of JSON:\n{output}");

    let master = std::fs::read(state.join("master.key")).unwrap();
    let master = String::from_utf8(master).unwrap().trim().to_owned();
    secrets.push((
        "master key",
        data_encoding::HEXLOWER_PERMISSIVE
            .decode(master.as_bytes())
            .unwrap_or_else(|_| master.into_bytes()),
    ));
    let planted: Vec<(String, Vec<u8>)> = secrets
        .iter()
        .map(|(name, secret)| ((*name).to_owned(), secret.clone()))
        .chain(canaries.0.iter().cloned())
        .collect();
    let search = Search::of(&planted);
    let mut found = Vec::new();
    for (place, text) in [
        ("logs", logs.as_bytes()),
        ("errors", errors.as_bytes()),
        ("audit", audit.as_bytes()),
        ("figures", figures.as_bytes()),
        ("collector", sent.raw.as_slice()),
    ] {
        found.extend(search.hits(text).into_iter().map(|hit| format!("{place}: {hit}")));
    }
    let mut all = Vec::new();
    files(&state, &mut all);
    assert!(all.iter().any(|f| f.ends_with("polykey.redb")), "{all:?}");
    for file in all {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        // The files that are there to hold a secret.
        if matches!(name.as_str(), "master.key" | "admin.api-key" | "token.json") {
            continue;
        }
        let bytes = std::fs::read(&file).unwrap();
        found.extend(search.hits(&bytes).into_iter().map(|hit| format!("{name}: {hit}")));
    }
    println!(
        "canary: {} secrets planted, {} MiB searched, {} hits",
        planted.len(),
        (logs.len() + errors.len() + audit.len() + figures.len() + sent.raw.len()) >> 20,
        found.len()
    );
    assert!(found.is_empty(), "{found:#?}");
    let material = ["value", "rotated value", "refused value", "plaintext", "imported material"];
    let told =
        planted.into_iter().filter(|(name, _)| name.contains(", ") || material.contains(&&**name));
    let searched = in_no_core(&state, &trace, &told.collect::<Vec<_>>(), &kept).await;
    println!(
        "canary: {} keys opened, {searched:?} bytes of memory searched",
        kept.len().min(OPENED)
    );
}

/// Keys that a process opens before its memory is looked into.
const OPENED: usize = 200;

/// A process that has opened keys with secrets in them, and has let go of them, has no secret in its memory. How much of
/// it was searched, where it can be.
async fn in_no_core(
    state: &Path,
    options: &Options,
    secrets: &[(String, Vec<u8>)],
    kept: &[String],
) -> Option<usize> {
    const TEST: &str =
        "planted_secrets_are_in_no_log_no_error_no_audit_row_no_telemetry_and_no_store";
    let server = Server::dev_in(state, options, None);
    let admin = server.admin().await;
    let mut opened = 0;
    for key in kept.iter().take(OPENED) {
        let mac = json!({"key_id": key, "message": "AAAA"});
        admin.call("GetKey", json!({"key_id": key})).await.unwrap();
        opened += usize::from(admin.call("GenerateMac", mac).await.is_ok());
    }
    assert!(opened > 0, "no secret was opened");
    // What must be there, so that the search is none in vain.
    let there = state.display().to_string().into_bytes();
    let (search, control) = (Search::of(secrets), Search::of(&[("state", there)]));
    let (mut found, mut controlled, mut bytes) = (BTreeSet::new(), false, 0);
    let read = each_mapping(server.pid(), |mapping| {
        bytes += mapping.len();
        found.extend(search.hits(mapping));
        controlled |= !controlled && !control.hits(mapping).is_empty();
    });
    if read.is_none() {
        skip(TEST, "needs root: the memory of a hardened process is private");
        return None;
    }
    assert!(controlled, "the search finds nothing at all");
    assert!(found.is_empty(), "{found:#?}");
    Some(bytes)
}
