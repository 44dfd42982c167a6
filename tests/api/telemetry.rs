//! What the real binary sends to an OpenTelemetry collector, and that nobody waits for one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::number_data_point::Value as Number;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tonic::Code;

use crate::common::client::{Client, refused};
use crate::common::collector::{Collector, Seen, attribute};
use crate::common::steps::secret;
use crate::common::{Options, Server};
use crate::metrics::{scrape, value, with_port};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
/// The value of a header that the collector wants.
const CANARY: &str = "CANARY-collector-hunter2";

fn parent(sampled: bool) -> String {
    format!("00-{TRACE}-{CALLER}-0{}", u8::from(sampled))
}

fn hex(id: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(id)
}

/// A node whose configuration, once made, was given a section of telemetry by `section`.
fn node(section: impl FnOnce(String) -> String) -> Server {
    Server::dev_configured(section)
}

fn to(collector: &Collector, more: &str) -> String {
    format!(
        "\n[telemetry]\nendpoint = \"http://{}\"\ninterval = \"1s\"\n{more}\n",
        collector.address
    )
}

async fn traced(client: &Client, name: &str, body: serde_json::Value) {
    let meta = parent(true);
    client.call_with(name, body, &[("traceparent", meta.as_bytes())]).await.unwrap();
}

/// The span of this name.
fn span<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:#?}"))
}

/// Whether the whole span of a call of this method has come, which comes last.
fn has(seen: &Seen, method: &str) -> bool {
    seen.spans.iter().any(|span| span.name.ends_with(method))
}

/// How often a call ended with OK, as the collector knows.
fn ended(seen: &Seen, method: &str) -> f64 {
    let requests = seen.metrics.iter().find(|metric| metric.name == "polykey_requests_total");
    let Some(Data::Sum(sum)) = requests.and_then(|metric| metric.data.as_ref()) else { return 0.0 };
    assert!(sum.is_monotonic && sum.aggregation_temporality == 2);
    let of = sum.data_points.iter().filter(|point| {
        attribute(&point.attributes, "method").as_deref() == Some(method)
            && attribute(&point.attributes, "code").as_deref() == Some("OK")
    });
    of.map(|point| match point.value {
        Some(Number::AsDouble(number)) => number,
        _ => 0.0,
    })
    .sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_over_grpc_and_tls_gets_the_stages_the_figures_and_the_lines() {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let state = directory.as_ref().unwrap().path().join("state");
    let collector = Collector::with_tls(&state).await;
    secret(&state, "collector.key", &format!("{CANARY}\n"));
    let path = state.join("polykey.toml");
    let text = with_port(std::fs::read_to_string(&path).unwrap());
    let section = format!(
        "\n[telemetry]\nendpoint = \"https://localhost:{}\"\nca = \"ca.pem\"\ninterval = \"1s\"\nsample = 0\n\
         headers = {{ x-collector-key = {{ file = \"collector.key\" }} }}\n",
        collector.address.port()
    );
    std::fs::write(&path, text + &section).unwrap();
    let server = Server::dev_in(&state, &Options::default(), directory);
    let admin = server.admin().await;

    let key = admin.create(json!({})).await;
    let meta = parent(false);
    let encrypt = json!({"key_id": key, "plaintext": "AAAA"});
    let unsampled = [("traceparent", meta.as_bytes())];
    admin.call_with("Encrypt", encrypt.clone(), &unsampled).await.unwrap();
    traced(&admin, "CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await;
    let meta = parent(true);
    let sampled = [("traceparent", meta.as_bytes()), ("polykey-request-id", b"r-1".as_slice())];
    let nobody = json!({"key_id": "0198a2f0-0000-7000-8000-000000000000"});
    refused(admin.call_with("GetKey", nobody, &sampled).await, Code::NotFound);
    let seen = collector.until("spans", |seen| has(seen, "CreateKey") && has(seen, "GetKey")).await;

    // Only what a caller had sampled, in its trace, stage in stage.
    assert!(seen.spans.iter().all(|span| hex(&span.trace_id) == TRACE), "{:#?}", seen.spans);
    let create = span(&seen.spans, "polykey.v2.PolykeyService/CreateKey");
    assert_eq!(
        (create.kind, hex(&create.parent_span_id).as_str()),
        (SpanKind::Server.into(), CALLER)
    );
    let of = |name: &str| attribute(&create.attributes, name).unwrap_or_default();
    assert_eq!(
        (of("rpc.system").as_str(), of("rpc.service").as_str()),
        ("grpc", "polykey.v2.PolykeyService")
    );
    assert_eq!(
        (of("rpc.method").as_str(), of("rpc.grpc.status_code").as_str()),
        ("CreateKey", "0")
    );
    let inside = |id: &[u8]| -> BTreeSet<&str> {
        let inside = seen.spans.iter().filter(|span| span.parent_span_id == id);
        inside.map(|span| span.name.as_str()).collect()
    };
    assert_eq!(inside(&create.span_id), BTreeSet::from(["authenticate", "operation"]));
    let operation =
        seen.spans.iter().find(|s| s.name == "operation" && s.parent_span_id == create.span_id);
    let operation = operation.unwrap();
    assert_eq!(inside(&operation.span_id), BTreeSet::from(["authorize", "commit"]));
    let within = |inner: &Span, outer: &Span| {
        // Begin and length come from two clocks.
        let slack = 2_000_000;
        inner.start_time_unix_nano + slack >= outer.start_time_unix_nano
            && inner.end_time_unix_nano <= outer.end_time_unix_nano + slack
    };
    assert!(within(span(&seen.spans, "commit"), operation) && within(operation, create));
    let get = span(&seen.spans, "polykey.v2.PolykeyService/GetKey");
    assert_eq!(attribute(&get.attributes, "rpc.grpc.status_code").unwrap(), "5");
    assert_eq!(attribute(&get.attributes, "polykey.request_id").unwrap(), "r-1");
    assert!(get.status.is_none(), "the caller's mistake is no error of the server's");

    // The figures of the endpoint, with their values.
    let seen = collector.until("figures", |seen| ended(seen, "CreateKey") >= 2.0).await;
    assert!((ended(&seen, "Encrypt") - 1.0).abs() < 1e-9 && ended(&seen, "GetKey").abs() < 1e-9);
    let shown = scrape(&server.port("metrics"));
    let family = |name: &str| {
        let name = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end))
            .unwrap_or(name);
        name.to_owned()
    };
    let shown: BTreeSet<String> = shown.iter().map(|sample| family(&sample.name)).collect();
    let sent: BTreeSet<String> = seen.metrics.iter().map(|metric| metric.name.clone()).collect();
    assert_eq!(shown, sent);
    let latency =
        seen.metrics.iter().find(|m| m.name == "polykey_request_duration_seconds").unwrap();
    let Some(Data::Histogram(latency)) = &latency.data else { panic!("{latency:?}") };
    for point in &latency.data_points {
        assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
        assert_eq!(point.bucket_counts.iter().sum::<u64>(), point.count);
    }

    // The lines, and who sends all this.
    let says = |seen: &Seen, start: &str| {
        seen.lines.iter().any(|line| {
            let body = line.body.as_ref().and_then(|body| body.value.clone());
            matches!(body, Some(opentelemetry_proto::tonic::common::v1::any_value::Value::StringValue(text)) if text.starts_with(start))
        })
    };
    let seen = collector.until("lines", |seen| says(seen, "listening on")).await;
    for resource in &seen.resources {
        assert_eq!(attribute(&resource.attributes, "service.name").unwrap(), "polykey");
        assert_eq!(attribute(&resource.attributes, "service.instance.id").unwrap().len(), 32);
    }
    for (path, headers) in &seen.requests {
        assert!(path.starts_with("/opentelemetry.proto.collector."), "{path}");
        assert_eq!(headers["x-collector-key"], CANARY);
    }
    let told = format!("{:?}{:?}{:?}{:?}", seen.spans, seen.metrics, seen.lines, seen.resources);
    let (status, output, _directory) = server.stop();
    assert!(status.success(), "{output}");
    for secret in [CANARY, admin.token.as_str(), admin.api_key.as_str()] {
        assert!(!told.contains(secret) && !output.contains(secret));
    }
    // What was said at the very end went as well.
    collector.until("last lines", |seen| says(seen, "stopping")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_over_http_gets_what_was_asked_for() {
    let collector = Collector::start().await;
    let section =
        to(&collector, "protocol = \"http\"\nsample = 1\nsignals = [\"traces\", \"metrics\"]")
            .replace("\"\ninterval", "/otlp/\"\ninterval");
    let server = node(|text| text + &section);
    let admin = server.admin().await;
    admin.create(json!({})).await;
    let seen = collector
        .until("both", |seen| has(seen, "CreateKey") && ended(seen, "CreateKey") >= 1.0)
        .await;
    let create = span(&seen.spans, "polykey.v2.PolykeyService/CreateKey");
    assert!(create.parent_span_id.is_empty() && hex(&create.trace_id) != TRACE);
    let paths: BTreeSet<&str> = seen.requests.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, BTreeSet::from(["/otlp/v1/traces", "/otlp/v1/metrics"]));
    // Each call that nobody traces further is a trace of its own.
    admin.create(json!({})).await;
    let seen = collector
        .until("two", |seen| {
            seen.spans.iter().filter(|span| span.name.ends_with("/CreateKey")).count() == 2
        })
        .await;
    let traces: BTreeSet<&[u8]> = seen
        .spans
        .iter()
        .filter(|span| span.name.ends_with("/CreateKey"))
        .map(|span| span.trace_id.as_slice())
        .collect();
    assert_eq!(traces.len(), 2);
    let (status, output, _directory) = server.stop();
    assert!(status.success() && !output.contains("does not take telemetry"), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_others_vouch_for_is_sent_nothing() {
    let (status, output, theirs) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let theirs = theirs.unwrap();
    let collector = Collector::with_tls(&theirs.path().join("state")).await;
    let section = format!(
        "\n[telemetry]\nendpoint = \"https://localhost:{}\"\nca = \"ca.pem\"\nprotocol = \"http\"\nsample = 1\n",
        collector.address.port()
    );
    let server = node(|text| text + &section);
    let admin = server.admin().await;
    admin.create(json!({})).await;
    server.says("does not take telemetry", 1).await;
    let (status, output, _directory) = server.stop();
    assert!(status.success() && output.contains("certificate"), "{output}");
    assert!(collector.seen().requests.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_collector_that_is_away_or_hangs() {
    // One that accepts, and says nothing.
    let hanging = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = hanging.local_addr().unwrap();
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        loop {
            held.push(hanging.accept().await);
        }
    });
    let section = format!(
        "\n[telemetry]\nendpoint = \"http://{address}\"\ninterval = \"1s\"\ntimeout = \"500ms\"\nsample = 1\n"
    );
    let server = node(|text| with_port(text) + &section);
    let port = server.port("metrics");
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    server.says("does not take telemetry", 1).await;
    let dropped = |samples: &[crate::metrics::Sample]| {
        value(samples, "polykey_telemetry_dropped_total", &[("signal", "traces")])
    };
    // Four spans each: more than there is room for.
    let began = Instant::now();
    for _ in 0..1500 {
        admin.call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
    }
    let took = began.elapsed();
    let seen = scrape(&port);
    assert!(dropped(&seen) >= 1.0, "{seen:?}");
    let of = |name: &str, labels: &[(&str, &str)]| value(&seen, name, labels);
    let waiting = of("polykey_telemetry_queue_depth", &[("signal", "traces")]);
    assert!((1.0..=4096.0).contains(&waiting), "{waiting}");
    let result = |signal, result| {
        of("polykey_telemetry_exports_total", &[("signal", signal), ("result", result)])
    };
    assert!(result("traces", "failed") >= 1.0 && result("metrics", "failed") >= 1.0);
    assert!(result("traces", "taken").abs() < 1e-9);
    assert_eq!(
        of("polykey_requests_total", &[("method", "GetKeyMetadata"), ("code", "OK")]),
        1500.0
    );
    // Once for all of it.
    assert_eq!(server.output().matches("does not take telemetry").count(), 1);
    eprintln!("1,500 calls beside a collector that hangs: {took:?}");

    // Gone altogether, and back: it gets what was kept, and that is said.
    held.abort();
    assert!(held.await.unwrap_err().is_cancelled());
    let collector = Collector::at(address, None).await;
    collector.until("spans", |seen| has(seen, "GetKeyMetadata")).await;
    server.says("takes telemetry again", 1).await;
    drop(collector);
    let began = Instant::now();
    let (status, output, _directory) = server.stop();
    assert!(status.success(), "{output}");
    assert!(began.elapsed() < Duration::from_secs(15), "the last words took {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn level_sampling_and_collector_change_while_it_runs() {
    let collector = Collector::start().await;
    let server = node(|text| with_port(text) + &to(&collector, "sample = 0"));
    let port = server.port("metrics");
    let admin = server.admin().await;
    let path = server.state.join("polykey.toml");
    let first = std::fs::read_to_string(&path).unwrap();
    let reload = async |text: &str, done: &str, times: usize| {
        std::fs::write(&path, text).unwrap();
        let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap()).unwrap();
        kill_process(pid, Signal::HUP).unwrap();
        server.says(done, times).await;
    };
    // A peer that speaks no TLS is worth a line at the level debug alone.
    let nonsense = || {
        use std::io::Write as _;
        let mut stream = std::net::TcpStream::connect(&server.address).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    };
    nonsense();
    admin.create(json!({})).await;
    assert!(!server.output().contains("handshake failed"));
    let debug =
        first.replace("[log]\n", "[log]\nlevel = \"debug\"\n").replace("sample = 0", "sample = 1");
    reload(&debug, "ReloadSettings", 1).await;
    nonsense();
    server.says("handshake failed", 1).await;
    admin.create(json!({})).await;
    let seen = collector.until("a span", |seen| has(seen, "CreateKey")).await;
    let calls = seen.spans.iter().filter(|span| span.name.ends_with("/CreateKey"));
    assert_eq!(calls.count(), 1, "the one before was not sampled");

    // What is broken changes nothing: neither syntax, nor a reference that leads nowhere.
    reload(&debug.replace("sample = 1", "sample = 7\nendpoint ="), "kept what was in force", 1)
        .await;
    let nowhere = debug.replace("sample = 1", "sample = 0\nheaders = { a = { file = \"none\" } }");
    reload(&nowhere.replace("debug", "error"), "kept what was in force", 2).await;
    assert!(server.output().contains("[telemetry] headers"), "{}", server.output());
    let before = server.output().matches("handshake failed").count();
    nonsense();
    server.says("handshake failed", before + 1).await;
    admin.create(json!({})).await;
    let two =
        |seen: &Seen| seen.spans.iter().filter(|s| s.name.ends_with("/CreateKey")).count() == 2;
    collector.until("still sampled", two).await;

    // Another collector, by the same way, and in the end none.
    let other = Collector::start().await;
    let there = debug.replace(&collector.address.to_string(), &other.address.to_string());
    reload(&there, "ReloadSettings", 4).await;
    admin.create(json!({})).await;
    let seen = other.until("a span", |seen| has(seen, "CreateKey")).await;
    assert_eq!(seen.spans.iter().filter(|span| span.name.ends_with("/CreateKey")).count(), 1);
    let none = first.split("\n[telemetry]").next().unwrap().to_owned();
    reload(&none, "ReloadSettings", 5).await;
    let seen = scrape(&port);
    assert!(!seen.iter().any(|sample| sample.name == "polykey_telemetry_queue_depth"));
    assert!(value(&seen, "polykey_telemetry_exports_total", &[("result", "taken")]) >= 2.0);
    let calls = |collector: &Collector| {
        collector.seen().spans.iter().filter(|span| span.name.ends_with("/CreateKey")).count()
    };
    admin.create(json!({})).await;
    let (status, output, _directory) = server.stop();
    assert!(status.success(), "{output}");
    assert_eq!((calls(&collector), calls(&other)), (2, 1));
}
