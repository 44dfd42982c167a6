//! What the real binary tells the operator's systems: once it is acknowledged it comes, in its order, signed, whatever
//! becomes of the receiver or the node, and nobody waits for it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::common::client::Client;
use crate::common::cluster::Cluster;
use crate::common::receiver::{Message, Mood, Receiver};
use crate::common::steps::{cli, secret, until};
use crate::common::{Options, PATIENCE, Server};
use crate::metrics::{scrape, value, with_port};

/// 32 bytes; the text in front of them says that they are base64.
const SECRET: &str = "whsec_Q0FOQVJZLXdlYmhvb2stc2VjcmV0LTMyLWJ5dGVzISE=";
const CANARY: &str = "CANARY-webhook-hunter2";
const DAY: u64 = 86_400;

/// A node whose configuration, once made, has these sections; `SECRET` stands in the file `webhook.secret`.
fn node(sections: &str) -> Server {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    secret(&state, "webhook.secret", &format!("{SECRET}\n"));
    secret(&state, "webhook.header", &format!("{CANARY}\n"));
    configure(&state, sections);
    Server::dev_in(&state, &Options::default(), Some(directory))
}

fn configure(state: &Path, sections: &str) {
    let path = state.join("polykey.toml");
    let text = with_port(std::fs::read_to_string(&path).unwrap());
    std::fs::write(&path, text + sections).unwrap();
}

fn section(name: &str, receiver: &Receiver, more: &str) -> String {
    format!(
        "\n[webhooks.{name}]\nurl = \"http://{}/hook?a=b\"\nsecret = {{ file = \"webhook.secret\" }}\n{more}\n",
        receiver.address
    )
}

fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("POLYKEY_PYTHON")
        .map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{}: `make deps` makes it", python.display());
    python
}

/// Whether code that is not ours finds these signatures right.
fn verified(messages: &[Message], secret: &str) -> bool {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/webhook_signatures.py");
    let mut child = Command::new(python())
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    for message in messages {
        let line = json!({
            "secret": secret,
            "id": message.id(),
            "timestamp": message.header("webhook-timestamp"),
            "signature": message.header("webhook-signature"),
            "body": BASE64.encode(&message.raw),
        });
        // It may have ended at the first that is wrong.
        drop(writeln!(input, "{line}"));
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    output.status.success()
        && String::from_utf8(output.stdout).unwrap().trim() == messages.len().to_string()
}

/// What a receiver knows that drops what comes again.
fn distinct(messages: &[Message]) -> Vec<Message> {
    let mut ids = BTreeSet::new();
    messages.iter().filter(|message| ids.insert(message.id().to_owned())).cloned().collect()
}

/// The versions that a key was rotated to, in the order in which they were taken.
fn rotations(messages: &[Message], key: &str) -> Vec<u64> {
    let taken: Vec<Message> = messages.iter().filter(|message| message.taken).cloned().collect();
    let of = |message: &&Message| message.about() == ("key.rotated".to_owned(), key.to_owned());
    let all = distinct(&taken);
    all.iter().filter(of).map(|m| m.body()["data"]["version"].as_u64().unwrap()).collect()
}

/// Waits until a webhook has delivered all there is, as the node knows.
async fn settled(server: &Server, name: &str) {
    let begun = Instant::now();
    let level = |work: &Value| {
        work["name"] == format!("webhook/{name}")
            && work["queued"] == 0
            && work["last_error"].is_null()
    };
    while !cli(server, &["jobs"])["work"].as_array().unwrap().iter().any(level) {
        assert!(begun.elapsed() < PATIENCE, "{name} is not level");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn rotate(client: &Client, key: &str) {
    let body = json!({"key_id": key, "strategy": "ROTATION_STRATEGY_HOT"});
    client.call("RotateKey", body).await.unwrap();
}

fn in_future(seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    jiff::Timestamp::from_second(i64::try_from(now + seconds).unwrap()).unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_is_told_over_tls_signed_and_without_secrets() {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    let receiver = Receiver::with_tls(&state).await;
    let port = receiver.address.port();
    secret(&state, "webhook.secret", &format!("{SECRET}\n"));
    secret(&state, "webhook.header", &format!("{CANARY}\n"));
    configure(
        &state,
        &format!(
            "\n[webhooks.ops]\nurl = \"https://localhost:{port}/hook\"\nca = \"ca.pem\"\n\
             secret = {{ file = \"webhook.secret\" }}\n\
             headers = {{ authorization = {{ file = \"webhook.header\" }} }}\n"
        ),
    );
    let config = state.join("polykey.toml").display().to_string();
    let server = Server::dev_in(&state, &Options::default(), Some(directory));
    let admin = server.admin().await;
    let (key, quiet) = (admin.create(json!({})).await, admin.create(json!({})).await);
    rotate(&admin, &key).await;
    // Nobody has asked that this be told.
    admin.call("RevokeKey", json!({"key_id": quiet, "immediate": true})).await.unwrap();
    // A new period and a staged version rotate nothing yet; the promotion does.
    let scheduled = json!({"key_id": key, "strategy": "ROTATION_STRATEGY_SCHEDULED",
        "generation_params": {"rotation_period_seconds": "86400"}});
    admin.call("RotateKey", scheduled).await.unwrap();
    let staged = json!({"key_id": key, "strategy": "ROTATION_STRATEGY_STAGED"});
    admin.call("RotateKey", staged.clone()).await.unwrap();
    admin.call("RotateKey", staged).await.unwrap();
    admin.call("DisableKey", json!({"key_id": key})).await.unwrap();
    let revoke = json!({"key_id": key, "immediate": true, "revocation_reason": "left on a train",
        "notify_external_systems": true});
    admin.call("RevokeKey", revoke).await.unwrap();
    admin.call("ScheduleKeyDestruction", json!({"key_id": key, "window_days": 7})).await.unwrap();
    let last = |seen: &[Message]| seen.iter().any(|m| m.about().0 == "key.destruction_scheduled");
    let seen = receiver.until("the destruction", last).await;

    let told: Vec<_> = seen.iter().map(Message::about).collect();
    let of = |kind: &str| (kind.to_owned(), key.clone());
    assert_eq!(
        told,
        [
            of("key.rotated"),
            of("key.rotated"),
            of("key.disabled"),
            of("key.revoked"),
            of("key.destruction_scheduled")
        ]
    );
    let data = |at: usize| seen[at].body()["data"].clone();
    assert_eq!((&data(0)["version"], &data(0)["previous_version"]), (&json!(2), &json!(1)));
    assert_eq!((&data(1)["version"], &data(1)["previous_version"]), (&json!(3), &json!(2)));
    assert_eq!(data(3)["reason"], "left on a train");
    assert_eq!(data(3)["by"], admin.id.as_str());
    assert!(data(4)["destroy_at"].is_string() && seen[3].body()["timestamp"].is_string());

    assert!(verified(&seen, SECRET));
    assert!(!verified(&seen, "whsec_b3RoZXItc2VjcmV0LW9mLTMyLWJ5dGVzLWxvbmcuLi4="));
    for message in &seen {
        assert_eq!((message.path.as_str(), message.header("authorization")), ("/hook", CANARY));
        assert_eq!(message.header("content-type"), "application/json");
        let mut cut = message.clone();
        cut.raw = cut.raw.slice(..cut.raw.len() - 1);
        assert!(!verified(&[cut], SECRET));
    }
    assert_eq!(distinct(&seen).len(), seen.len());
    let shown = admin.call("GetConfiguration", json!({})).await.unwrap().to_string();
    assert!(shown.contains("webhooks.ops.url") && !shown.contains(CANARY), "{shown}");
    let checked =
        Command::new(crate::common::POLYKEY).args(["check", "--config", &config]).output();
    let checked = String::from_utf8(checked.unwrap().stdout).unwrap();
    assert!(checked.contains("webhooks"), "{checked}");
    let output = server.output();
    assert!(!output.contains(CANARY) && !output.contains(SECRET.trim_start_matches("whsec_")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_fails_gets_everything_later_in_order_and_nobody_waits() {
    let (bad, good) = (Receiver::start().await, Receiver::start().await);
    let more = "timeout = \"500ms\"\nevents = [\"key.rotated\"]";
    let server = node(&(section("bad", &bad, more) + &section("good", &good, "")));
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    bad.becomes(Mood::Hangs);
    let mut version = 1;
    for mood in [Mood::Hangs, Mood::Status(500), Mood::BreaksOff, Mood::Status(302)] {
        let before = bad.seen().len();
        bad.becomes(mood);
        let begun = Instant::now();
        rotate(&admin, &key).await;
        version += 1;
        assert!(begun.elapsed() < Duration::from_secs(20), "waited for a receiver");
        good.until("a rotation", |seen| rotations(seen, &key).last() == Some(&version)).await;
        bad.until("a try", |seen| seen.len() > before).await;
    }
    until(&admin, "HEALTH_STATUS_DEGRADED").await;
    let status = cli(&server, &["status"]).to_string();
    assert!(status.contains("[webhooks.bad]"), "{status}");
    let waits = |work: &Value| {
        let next =
            work["next_due_at"].as_str().map(|text| text.parse::<jiff::Timestamp>().unwrap());
        work["name"] == "webhook/bad" && next.is_some_and(|next| next > jiff::Timestamp::now())
    };
    let begun = Instant::now();
    while !cli(&server, &["jobs"])["work"].as_array().unwrap().iter().any(waits) {
        assert!(begun.elapsed() < PATIENCE, "it is not told when it is tried again");
    }
    // What it was not told stays in the store, whatever else may go into an archive.
    cli(&server, &["audit", "checkpoint"]);
    let archive = server.state.join("archive.jsonl").display().to_string();
    let (code, out, err) = server.cli(&["-o", "json", "audit", "archive", "--to", &archive]);
    let first = cli(&server, &["audit", "list", "--action", "RotateKey", "--from", "0"]);
    let first = first["events"][0]["index"].as_u64().unwrap();
    if code == 0 {
        let archived: Value = serde_json::from_str(&out).unwrap();
        assert!(archived["end_leaf"].as_u64().unwrap() <= first, "{archived}");
    } else {
        assert!(err.contains("nothing that may be archived"), "{err}");
    }
    bad.becomes(Mood::Status(204));
    let seen = bad.until("all", |seen| rotations(seen, &key).last() == Some(&version)).await;
    assert_eq!(rotations(&seen, &key), (2..=version).collect::<Vec<_>>());
    assert!(verified(&seen, SECRET));
    // Each try of an event has its id and its body.
    let first: Vec<_> = seen.iter().filter(|message| message.id() == seen[0].id()).collect();
    assert!(first.len() > 1 && first.iter().all(|message| message.raw == seen[0].raw));
    until(&admin, "HEALTH_STATUS_HEALTHY").await;
    let work = cli(&server, &["jobs"])["work"].clone();
    let of = |name: &str| {
        let all = work.as_array().unwrap();
        all.iter().find(|work| work["name"] == name).unwrap_or_else(|| panic!("{work}")).clone()
    };
    assert!(of("webhook/bad")["failed"].as_u64().unwrap() >= 3);
    assert_eq!(of("webhook/bad")["done"], of("webhook/good")["done"]);
    assert!(of("webhook/bad")["next_due_at"].is_null(), "{work}");
    assert_eq!(of("verify")["done"], 1);
    let samples = scrape(&server.port("metrics"));
    let labels = [("webhook", "good"), ("result", "delivered")];
    let delivered = value(&samples, "polykey_webhook_deliveries_total", &labels);
    assert!((delivered - 4.0).abs() < f64::EPSILON, "{delivered}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_killed_while_nobody_listens_loses_nothing() {
    let receiver = Receiver::start().await;
    let mut server = node(&section("ops", &receiver, "timeout = \"500ms\""));
    let key = server.admin().await.create(json!({})).await;
    let moods = [Mood::Hangs, Mood::Status(200), Mood::Status(503)];
    let mut rotated = 1;
    for mood in moods {
        receiver.becomes(mood);
        let admin = server.admin().await;
        for _ in 0..5 {
            rotate(&admin, &key).await;
            rotated += 1;
        }
        drop(admin);
        server = server.restart(true, &Options::default());
    }
    receiver.becomes(Mood::Status(200));
    let whole = |seen: &[Message]| rotations(seen, &key).last() == Some(&rotated);
    let seen = receiver.until("the last rotation", whole).await;
    // What comes again has the id of the first time, and is dropped by it.
    assert_eq!(rotations(&seen, &key), (2..=rotated).collect::<Vec<_>>());
    assert!(verified(&seen, SECRET));
    // What was delivered before an orderly end does not come again.
    let ids =
        |seen: &[Message]| seen.iter().map(|message| message.id().to_owned()).collect::<Vec<_>>();
    settled(&server, "ops").await;
    let before = receiver.seen().len();
    server = server.restart(false, &Options::default());
    let admin = server.admin().await;
    rotate(&admin, &key).await;
    let seen = receiver.until("one more", |seen| seen.len() > before).await;
    assert!(!ids(&seen[..before]).contains(&ids(&seen)[before]), "it came again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_says_gone_is_left_in_peace_until_the_node_starts_again() {
    let receiver = Receiver::start().await;
    let server = node(&section("ops", &receiver, ""));
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    receiver.becomes(Mood::Status(410));
    rotate(&admin, &key).await;
    until(&admin, "HEALTH_STATUS_DEGRADED").await;
    rotate(&admin, &key).await;
    let events = cli(&server, &["audit", "list", "--action", "PauseWebhook"]).to_string();
    assert!(events.contains("\"ops\""), "{events}");
    assert_eq!(receiver.seen().len(), 1, "it was left in peace");
    receiver.becomes(Mood::Status(200));
    let server = server.restart(false, &Options::default());
    let seen = receiver.until("both", |seen| rotations(seen, &key).len() == 2).await;
    assert_eq!(rotations(&seen, &key), [2, 3]);
    until(&server.admin().await, "HEALTH_STATUS_HEALTHY").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coming_expiries_and_revocations_of_the_schedule_are_told() {
    let receiver = Receiver::start().await;
    let server = node(&section("ops", &receiver, ""));
    let admin = server.admin().await;
    let soon = admin.create(json!({"expires_at": in_future(7 * DAY + 15)})).await;
    let ends = admin.create(json!({"expires_at": in_future(20)})).await;
    let changed = admin.create(json!({"expires_at": in_future(20)})).await;
    let later = json!({"key_id": changed, "expires_at": in_future(40 * DAY)});
    admin.call("UpdateKeyMetadata", later).await.unwrap();
    let (told, untold) = (admin.create(json!({})).await, admin.create(json!({})).await);
    for (key, notify) in [(&told, true), (&untold, false)] {
        let body = json!({"key_id": key, "effective_at": in_future(15),
            "notify_external_systems": notify, "revocation_reason": "planned"});
        admin.call("RevokeKey", body).await.unwrap();
    }
    let client = json!({"roles": ["user"], "api_key_expires_at": in_future(DAY + 15)});
    server.stranger(&admin, "reporter", client).await;
    let of = |seen: &[Message], kind: &str| -> Vec<Value> {
        let all = distinct(seen);
        all.iter().map(Message::body).filter(|body| body["type"] == kind).collect()
    };
    let kinds = ["key.expiring", "key.expired", "key.revoked", "api_key.expiring"];
    let seen = receiver
        .until("all four", |seen| kinds.iter().all(|kind| !of(seen, kind).is_empty()))
        .await;
    let expiring = &of(&seen, "key.expiring")[0]["data"];
    assert_eq!((&expiring["key_id"], &expiring["days"]), (&json!(soon), &json!(7)));
    assert_eq!(expiring["by"], "polykey");
    assert_eq!(of(&seen, "key.expired")[0]["data"]["key_id"], json!(ends));
    let revoked = &of(&seen, "key.revoked")[0]["data"];
    assert_eq!((&revoked["key_id"], &revoked["reason"]), (&json!(told), &json!("planned")));
    let api_key = &of(&seen, "api_key.expiring")[0]["data"];
    assert_eq!((&api_key["client"], &api_key["days"]), (&json!("reporter"), &json!(1)));
    assert!(api_key["api_key"].is_string());
    for kind in kinds {
        assert_eq!(of(&seen, kind).len(), 1, "{kind}: {seen:#?}");
    }
    let jobs = cli(&server, &["jobs", "--kind", "notify-expiry"]);
    let next: Vec<_> =
        jobs["jobs"].as_array().unwrap().iter().map(|j| j["version"].as_i64()).collect();
    // The expiry of the API key in a day, the last day of one key, thirty before the other's end.
    assert_eq!(next.len(), 3, "{jobs}");
    assert!(verified(&seen, SECRET));
}

/// How many events a node has delivered to a webhook.
fn delivered(server: &Server, name: &str) -> u64 {
    let jobs = cli(server, &["jobs"]);
    let all = jobs["work"].as_array().unwrap();
    let work = all.iter().find(|work| work["name"] == format!("webhook/{name}"));
    work.unwrap_or_else(|| panic!("{jobs}"))["done"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_one_delivers_and_the_other_takes_over_when_it_is_killed() {
    let receiver = Receiver::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = secret(directory.path(), "webhook.secret", &format!("{SECRET}\n"));
    let section = section("ops", &receiver, "timeout = \"2s\"");
    let section = section.replace("webhook.secret", &file.display().to_string());
    let mut cluster = Cluster::start(2, &section);
    let admins = cluster.admins().await;
    let key = admins[0].create(json!({})).await;
    let mut version = 1;
    for admin in [0, 1, 1, 0, 1, 0] {
        rotate(&admins[admin], &key).await;
        version += 1;
    }
    let all = |seen: &[Message]| rotations(seen, &key).last() == Some(&version);
    let seen = receiver.until("what both have done", all).await;
    assert_eq!(rotations(&seen, &key), (2..=version).collect::<Vec<_>>());
    assert_eq!(distinct(&seen).len(), seen.len(), "nothing comes twice while both are well");
    let counts: Vec<u64> = cluster.servers.iter().map(|server| delivered(server, "ops")).collect();
    let courier = counts.iter().position(|count| *count > 0).unwrap();
    let other = 1 - courier;
    assert_eq!(counts[other], 0, "one delivers: {counts:?}");

    // It dies with one event on its way and more behind it, made on either node.
    receiver.becomes(Mood::Hangs);
    let before = receiver.seen().len();
    for admin in [courier, other, courier, other] {
        rotate(&admins[admin], &key).await;
        version += 1;
    }
    receiver.until("an event on its way", |seen| seen.len() > before).await;
    cluster.lose(courier);
    receiver.becomes(Mood::Status(500));
    for _ in 0..3 {
        rotate(&admins[other], &key).await;
        version += 1;
    }
    receiver.becomes(Mood::Status(200));
    let all = |seen: &[Message]| rotations(seen, &key).last() == Some(&version);
    let seen = receiver.until("what the dead one has left", all).await;
    assert_eq!(rotations(&seen, &key), (2..=version).collect::<Vec<_>>());
    assert!(verified(&seen, SECRET));
    settled(&cluster.servers[0], "ops").await;
    assert!(delivered(&cluster.servers[0], "ops") >= 6);
}
