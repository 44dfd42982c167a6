//! The Prometheus endpoint of the real binary, read by the reference parser of Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;
use serde_json::json;
use tonic::Code;

use crate::common::Server;
use crate::common::client::refused;

/// One sample.
#[derive(Debug, Deserialize)]
pub(crate) struct Sample {
    pub(crate) name: String,
    labels: BTreeMap<String, String>,
    value: f64,
    #[serde(rename = "type")]
    kind: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn python() -> PathBuf {
    let python = std::env::var_os("POLYKEY_PYTHON")
        .map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{}: `make deps` makes it", python.display());
    python
}

/// What the endpoint answers to a request.
pub(crate) fn get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: text/plain\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// All samples, as the reference parser reads them.
pub(crate) fn scrape(address: &str) -> Vec<Sample> {
    let (head, body) = get(address, "/metrics");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    let mut parser = Command::new(python())
        .arg(root().join("tests/python/prometheus_samples.py"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    parser.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
    let output = parser.wait_with_output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}\n{body}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The sample of this name with these labels; zero if there is none.
pub(crate) fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let has = |sample: &&Sample| {
        sample.name == name
            && labels.iter().all(|(n, v)| sample.labels.get(*n).is_some_and(|found| found == v))
    };
    samples.iter().filter(has).map(|sample| sample.value).sum()
}

/// The configuration with a metrics port of the system's choice.
pub(crate) fn with_port(text: String) -> String {
    text.replace("[listen]\n", "[listen]\nmetrics = \"127.0.0.1:0\"\n")
}

fn ended(samples: &[Sample], method: &str, code: &str) -> u64 {
    let labels = [("face", "grpc"), ("method", method), ("code", code)];
    value(samples, "polykey_requests_total", &labels) as u64
}

/// The names of figures in a text, without what a histogram adds to its own.
fn names(text: &str, known: &BTreeMap<String, String>) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_lowercase() || c == '_';
    let all = text.match_indices("polykey_").map(|(at, _)| {
        let name: String = text[at..].chars().take_while(|c| word(*c)).collect();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        match base.filter(|base| known.get(*base).is_some_and(|kind| kind == "histogram")) {
            Some(base) => base.to_owned(),
            None => name,
        }
    });
    all.collect()
}

#[test]
fn dashboard_and_alerts_name_what_there_is() {
    let server = Server::dev_configured(with_port);
    let (_, body) = get(&server.port("metrics"), "/metrics");
    // Every family is announced, those without a figure as well.
    let types = body.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let known: BTreeMap<String, String> =
        types.filter_map(|line| line.split_once(' ')).map(|(n, k)| (n.into(), k.into())).collect();
    assert!(known.len() > 40, "{known:?}");
    let file = |name: &str| std::fs::read_to_string(root().join("packaging").join(name)).unwrap();
    let dashboard: serde_json::Value =
        serde_json::from_str(&file("grafana-dashboard.json")).unwrap();
    let shown: String = (dashboard["panels"].as_array().unwrap().iter())
        .flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default())
        .map(|target| format!("{}\n", target["expr"].as_str().unwrap()))
        .collect();
    let (shown, alerts) = (names(&shown, &known), names(&file("alerts.yaml"), &known));
    for name in shown.iter().chain(&alerts) {
        assert!(known.contains_key(name), "{name} is not among the figures of a node");
    }
    for name in known.keys() {
        assert!(shown.contains(name), "{name} is on no panel of the dashboard");
    }
    assert!(alerts.len() > 15, "{alerts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_tells_what_was_done_and_how_it_ended() {
    let server = Server::dev_configured(with_port);
    let address = server.port("metrics");
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    for _ in 0..3 {
        let body = json!({"key_id": key, "plaintext": "AAAA"});
        admin.call("Encrypt", body).await.unwrap();
    }
    let nobody = json!({"key_id": "0198a2f0-0000-7000-8000-000000000000"});
    refused(admin.call("GetKey", nobody).await, Code::NotFound);
    let user = server.client(&admin, "user", &[]).await;
    refused(
        user.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await,
        Code::PermissionDenied,
    );
    refused(admin.with_token("").call("ListKeys", json!({})).await, Code::Unauthenticated);
    admin.stream("VerifyStore", vec![json!({})]).await.unwrap();
    refused(user.stream("VerifyStore", vec![json!({})]).await, Code::PermissionDenied);

    let seen = scrape(&address);
    for (method, code, count) in [
        ("CreateKey", "OK", 1),
        ("CreateKey", "PERMISSION_DENIED", 1),
        ("Encrypt", "OK", 3),
        ("GetKey", "NOT_FOUND", 1),
        ("GetKey", "OK", 0),
        ("ListKeys", "UNAUTHENTICATED", 1),
        ("VerifyStore", "OK", 1),
        ("VerifyStore", "PERMISSION_DENIED", 1),
        ("Authenticate", "OK", 2),
    ] {
        assert_eq!(ended(&seen, method, code), count, "{method} {code}");
    }
    // A histogram is cumulative, ends in all of them, and agrees with the counter.
    let buckets: Vec<f64> = (seen.iter())
        .filter(|s| s.name == "polykey_request_duration_seconds_bucket")
        .filter(|s| {
            s.labels["method"] == "Encrypt" && s.labels["service"] == "polykey.v2.CryptoService"
        })
        .map(|s| s.value)
        .collect();
    assert!(buckets.len() > 10 && buckets.is_sorted(), "{buckets:?}");
    let encrypt = [("method", "Encrypt")];
    let of = |name: &str, labels: &[(&str, &str)]| value(&seen, name, labels);
    assert_eq!(
        (of("polykey_request_duration_seconds_count", &encrypt), buckets.last()),
        (3.0, Some(&3.0))
    );
    assert!(of("polykey_request_duration_seconds_sum", &encrypt) > 0.0);
    assert_eq!(of("polykey_requests_in_flight", &[]), 0.0);

    // The rest of the node.
    assert_eq!(of("polykey_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    assert_eq!(of("polykey_health", &[("state", "serving")]), 1.0);
    assert_eq!(of("polykey_keys_enabled", &[]), 1.0);
    assert!(of("polykey_commits_total", &[]) >= 2.0);
    let groups = of("polykey_commit_duration_seconds_count", &[]);
    assert!(groups >= 2.0 && of("polykey_commit_group_size_count", &[]) == groups);
    assert_eq!(of("polykey_commit_group_size_sum", &[]), of("polykey_commits_total", &[]));
    assert!(of("polykey_cache_lookups_total", &[("cache", "keys"), ("result", "hit")]) >= 2.0);
    assert!(of("polykey_cache_lookups_total", &[("cache", "decisions")]) >= 3.0);
    assert!(of("polykey_audit_leaves_total", &[]) >= 3.0);
    assert!(of("polykey_queue_capacity", &[("queue", "audit")]) > 0.0);
    assert!(of("polykey_store_size_bytes", &[("file", "store")]) > 4096.0);
    assert!(of("polykey_process_resident_memory_bytes", &[]) > 1e6);
    assert!(of("polykey_process_open_fds", &[]) > 5.0);
    assert!(of("polykey_connections_total", &[]) >= 2.0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let days = |at: f64| (at - now.as_secs_f64()) / 86_400.0;
    let ends = "polykey_certificate_not_after_timestamp_seconds";
    let server_ends = days(of(ends, &[("certificate", "server")]));
    assert!((360.0..=366.0).contains(&server_ends), "{server_ends}");
    assert!(days(of(ends, &[("certificate", "client_ca")])) > server_ends);
    let token_key = days(of("polykey_token_key_not_after_timestamp_seconds", &[]));
    assert!((29.0..=30.1).contains(&token_key), "{token_key}");

    // Names say what they are, and labels are words.
    for sample in &seen {
        let total = sample.name.ends_with("_total");
        assert!(
            sample.name.starts_with("polykey_") && (sample.kind == "counter") == total,
            "{sample:?}"
        );
        for value in sample.labels.values() {
            assert!(value.len() <= 64 && !value.contains(&key), "{sample:?}");
        }
    }

    // More of the same counts on, and nothing else is answered.
    admin.call("Encrypt", json!({"key_id": key, "plaintext": "AAAA"})).await.unwrap();
    assert_eq!(ended(&scrape(&address), "Encrypt", "OK"), 4);
    assert!(get(&address, "/healthz").0.starts_with("HTTP/1.1 404 "));
    let (status, output, _directory) = server.stop();
    assert!(status.success(), "{output}");
    assert!(TcpStream::connect(&address).is_err());
}
