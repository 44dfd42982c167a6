//! The audit log at an OpenTelemetry collector: every leaf, over gRPC and HTTP, whatever the collector answers
//! and whenever it is away.

use std::collections::BTreeSet;

use polykey_proto::google::rpc;
use prost::Message;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::common::collector::{Answered, Collector, Seen, attribute};
use crate::common::steps::secret;
use crate::common::{Options, PATIENCE, Server};

/// The value of a header that the collector wants.
const CANARY: &str = "CANARY-sink-hunter2";

fn size(server: &Server) -> u64 {
    let (code, out, err) = server.cli(&["-o", "json", "audit", "checkpoint"]);
    assert_eq!(code, 0, "{err}");
    serde_json::from_str::<Value>(&out).unwrap()["tree_size"].as_u64().unwrap()
}

/// The leaves of all records that came.
fn leaves(seen: &Seen) -> BTreeSet<u64> {
    let of = seen.lines.iter().filter_map(|l| attribute(&l.attributes, "polykey.audit.leaf"));
    of.map(|leaf| leaf.parse().unwrap()).collect()
}

fn has(seen: &Seen, size: u64) -> bool {
    let leaves = leaves(seen);
    (0..size).all(|leaf| leaves.contains(&leaf))
}

fn exhausted(wait: Option<i64>) -> Status {
    let info = wait.map(|seconds| rpc::RetryInfo {
        retry_delay: Some(prost_types::Duration { seconds, nanos: 0 }),
    });
    let details = info.iter().map(|info| prost_types::Any {
        type_url: "type.googleapis.com/google.rpc.RetryInfo".into(),
        value: info.encode_to_vec(),
    });
    let status = rpc::Status { code: 8, message: String::new(), details: details.collect() };
    Status::with_details(Code::ResourceExhausted, "full", status.encode_to_vec().into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_over_grpc_and_tls_gets_every_leaf_across_restarts() {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let state = directory.as_ref().unwrap().path().join("state");
    let collector = Collector::with_tls(&state).await;
    secret(&state, "sink.key", &format!("{CANARY}\n"));
    let path = state.join("polykey.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let section = format!(
        "\n[audit.sinks.otel]\nkind = \"otlp\"\nendpoint = \"https://localhost:{}\"\nca = \"ca.pem\"\n\
         headers = {{ x-sink-key = {{ file = \"sink.key\" }} }}\n",
        collector.address.port()
    );
    std::fs::write(&path, text + &section).unwrap();
    // What can be tried again is, and what is rejected of a batch is told.
    let away = Answered::Status(Status::unavailable("starting"));
    collector.will([away, Answered::Status(exhausted(Some(1))), Answered::Without(1)]);
    let server = Server::dev_in(&state, &Options::default(), directory);
    let admin = server.admin().await;
    admin.create(json!({})).await;
    let all = size(&server);
    let seen = collector.until("leaves", |seen| has(seen, all)).await;
    server.says("has rejected records", 1).await;
    assert!(server.output().contains("an audit sink fails"), "{}", server.output());
    let line =
        seen.lines.iter().find(|line| attribute(&line.attributes, "polykey.audit.leaf").is_some());
    let body = format!("{:?}", line.unwrap().body);
    assert!(body.contains("{\\\"leaf\\\":0,"), "{body}");
    for (_, headers) in &seen.requests {
        assert_eq!(headers["x-sink-key"], CANARY);
    }
    let resource = &seen.resources[0].attributes;
    assert_eq!(attribute(resource, "service.instance.id").unwrap().len(), 32);

    // It goes on where it stopped: what was acknowledged and kept does not come again.
    let server = server.restart(false, &Options::default());
    let before = collector.seen().lines.len();
    let admin = server.admin().await;
    for _ in 0..5 {
        admin.create(json!({})).await;
    }
    let all = size(&server);
    let seen = collector.until("more leaves", |seen| has(seen, all)).await;
    let again = seen.lines[before..]
        .iter()
        .filter_map(|line| attribute(&line.attributes, "polykey.audit.leaf"))
        .any(|leaf| leaf == "0");
    assert!(!again, "the whole log came twice");
    // A kill may bring some twice, and leaves none out.
    let server = server.restart(true, &Options::default());
    server.admin().await.create(json!({})).await;
    let all = size(&server);
    let seen = collector.until("all leaves", |seen| has(seen, all)).await;
    assert!(!format!("{:?}", seen.lines).contains(CANARY) && !server.output().contains(CANARY));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_over_http_that_is_away_or_refuses_misses_nothing() {
    let collector = Collector::start().await;
    let address = collector.address;
    // An overload that says when it is over, and one that does not.
    collector.will([Answered::Http(429, Some(1)), Answered::Http(503, None)]);
    let section = format!(
        "\n[audit.sinks.otel]\nkind = \"otlp\"\nendpoint = \"http://{address}/audit\"\n\
         protocol = \"http\"\ncontent = \"events\"\ntimeout = \"1s\"\n"
    );
    let server = Server::dev_configured(|text| text + &section);
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let all = size(&server);
    let seen = collector.until("leaves", |seen| has(seen, all)).await;
    assert!(seen.requests.iter().all(|(path, _)| path == "/audit/v1/logs"), "{:?}", seen.requests);
    let record = seen.lines.iter().find(|line| format!("{:?}", line.body).contains("CreateKey"));
    let body = format!("{:?}", record.unwrap().body);
    assert!(body.contains(&key), "{body}");
    // Gone: requests do not notice, health does, and afterwards it gets what it missed.
    drop(collector);
    for _ in 0..20 {
        admin.create(json!({})).await;
    }
    server.says("takes nothing", 1).await;
    let began = std::time::Instant::now();
    loop {
        let health = admin.call("HealthCheck", json!({})).await.unwrap();
        if health["status"] == "HEALTH_STATUS_DEGRADED" {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{health} {}", server.output());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let collector = Collector::at(address, None).await;
    let all = size(&server);
    let missed = |seen: &Seen| (all - 15..all).all(|leaf| leaves(seen).contains(&leaf));
    collector.until("what was missed", missed).await;
    server.says("an audit sink works again", 1).await;
}
