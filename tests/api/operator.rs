//! What an operator asks of a node: `doctor`, `status`, `top`, `reload`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use tonic::Code;

use crate::common::client::{Client, refused};
use crate::common::{Options, POLYKEY, Server};
use crate::metrics::{scrape, value, with_port};

/// Code, findings by subject and level, everything printed.
fn doctor(server: &Server, more: &[&str]) -> (Option<i32>, Vec<(String, String)>, String) {
    let mut command = Command::new(POLYKEY);
    command.args(["doctor", "-o", "json"]).args(more).env("POLYKEY_PROFILE", server.profile());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let view: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}{said}"));
    let one =
        |f: &Value| (f["subject"].as_str().unwrap().into(), f["level"].as_str().unwrap().into());
    let all: Vec<_> = view["findings"].as_array().unwrap().iter().map(one).collect();
    (output.status.code(), all, text)
}

fn level<'a>(found: &'a [(String, String)], subject: &str) -> Vec<&'a str> {
    found.iter().filter(|(of, _)| of == subject).map(|(_, level)| level.as_str()).collect()
}

#[test]
fn the_doctor_finds_what_is_wrong_and_nothing_else() {
    let server = Server::dev();
    let config = server.state.join("polykey.toml");
    let file = config.display().to_string();
    let (code, found, text) = doctor(&server, &["--config", &file]);
    // A new node has one slot and no backup, and that is worth a word.
    assert_eq!(code, Some(1), "{text}");
    assert_eq!(level(&found, "slots"), ["warning"], "{text}");
    assert_eq!(level(&found, "backup"), ["warning"], "{text}");
    for subject in ["configuration", "certificates", "wrapper", "permissions", "clock", "entropy"] {
        assert_eq!(level(&found, subject), ["ok"], "{subject}: {text}");
    }
    for subject in ["health", "jobs", "audit", "store", "records", "confinement"] {
        assert_eq!(level(&found, subject), ["ok"], "{subject}: {text}");
    }
    assert_eq!(level(&found, "fsync").len(), 1, "{text}");
    let backup = server.state.join("backup");
    let out = backup.display().to_string();
    assert_eq!(server.cli(&["backup", "create", "--out", &out]).0, 0);
    let (_, found, text) = doctor(&server, &[]);
    assert_eq!(level(&found, "backup"), ["ok"], "{text}");
    assert!(level(&found, "fsync").is_empty(), "the machine was not asked for: {text}");

    fs::set_permissions(&config, fs::Permissions::from_mode(0o622)).unwrap();
    let key = server.state.join("master.key");
    fs::rename(&key, server.state.join("away")).unwrap();
    let (code, found, text) = doctor(&server, &["--config", &file, "--offline"]);
    assert_eq!(code, Some(2), "{text}");
    assert_eq!(level(&found, "permissions"), ["error"], "{text}");
    assert_eq!(level(&found, "master key"), ["error"], "{text}");
    assert!(level(&found, "health").is_empty(), "{text}");
    assert!(text.contains("chmod go-w"), "{text}");
    fs::rename(server.state.join("away"), &key).unwrap();

    let profile = server.profile();
    let (status, _, directory) = server.stop();
    assert!(status.success());
    let mut command = Command::new(POLYKEY);
    command.arg("doctor").env("POLYKEY_PROFILE", profile);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.code() == Some(2) && text.contains("ERROR    node:"), "{text}");
    drop(directory);
}

#[test]
fn the_status_fits_a_screen_and_top_shows_it_again() {
    let server = Server::dev();
    let (code, text, said) = server.cli(&["status"]);
    assert_eq!(code, 0, "{said}");
    assert!(text.contains("healthy") && text.contains("certificate until"), "{text}");
    assert!(text.lines().count() <= 24, "{text}");
    let (code, text, said) =
        server.cli(&["top", "--count", "2", "--interval", "10ms", "-o", "json"]);
    assert_eq!(code, 0, "{said}");
    let screens: Vec<Value> =
        serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect();
    assert_eq!(screens.len(), 2);
    let requests = |n: usize| screens[n]["metrics"]["requests_total"].as_i64().unwrap();
    assert!(requests(1) > requests(0), "{text}");
}

/// A node with a policy file of its own, and where that is.
fn with_a_policy_file() -> (Server, PathBuf, TempDir) {
    let (_, _, directory) = Server::dev().stop();
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    let config = state.join("polykey.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}\n[policies]\nfiles = [\"own.cedar\"]\n")).unwrap();
    let policy = state.join("own.cedar");
    fs::write(&policy, "").unwrap();
    (Server::attempt(&state, &Options::default()).unwrap(), policy, directory)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_by_command_tells_what_was_wrong_and_keeps_what_was_in_force() {
    let (server, policy, _directory) = with_a_policy_file();
    let admin = server.admin().await;
    let makes = async || admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await;
    makes().await.unwrap();
    fs::write(&policy, "forbid (principal, action == Action::\"CreateKey\", resource);").unwrap();
    let (code, text, said) = server.cli(&["reload"]);
    assert_eq!(code, 0, "{said}");
    assert!(text.contains("ok     certificates\nok     policies\nok     settings"), "{text}");
    refused(makes().await, Code::PermissionDenied);
    fs::write(&policy, "forbid (principal").unwrap();
    let (code, text, _) = server.cli(&["reload"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("WRONG  policies: ") && text.contains("own.cedar"), "{text}");
    makes().await.unwrap_err();
    fs::write(&policy, "").unwrap();
    assert_eq!(server.cli(&["reload"]).0, 0);
    makes().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_has_the_keys_that_its_quota_gives_it() {
    let rules = "\n[quotas.few]\nkeys = 3\nclient = \"a\"\n\
                 [quotas.paid]\nkeys = 1\ntier = \"pro\"\n";
    let server = Server::dev_configured(|text| with_port(text) + rules);
    let admin = server.admin().await;
    let a = server.client(&admin, "a", &["user"]).await;
    a.create(json!({})).await;
    // Of a batch that goes on, what has room is made; of one that does not, nothing.
    let batch = async |client: &Client, more: &str| {
        let request = json!({"keys": vec![json!({"key_type": "KEY_TYPE_AES_256"}); 4], more: true});
        client.call("BatchCreateKeys", request).await.unwrap()
    };
    let none = batch(&a, "atomic").await;
    assert_eq!(none["failed_count"], 4, "{none}");
    let some = batch(&a, "continue_on_error").await;
    let counts = (some["successful_count"].as_i64(), some["failed_count"].as_i64());
    assert_eq!(counts, (Some(2), Some(2)), "{some}");
    let reasons = some["results"].as_array().unwrap().iter().filter(|result| {
        result["error_code"] == json!(Code::ResourceExhausted as i32)
            && result["error_reason"] == "KEY_QUOTA"
    });
    assert_eq!(reasons.count(), 2, "{some}");
    let makes = async |client: &Client| {
        client.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await
    };
    let refusal = refused(makes(&a).await, Code::ResourceExhausted);
    assert!(refusal.reason == "KEY_QUOTA" && !refusal.retry, "{refusal:?}");
    let [(quota, text)] = &refusal.violations[..] else { panic!("{refusal:?}") };
    assert!(quota == "few" && text.contains("3 keys"), "{refusal:?}");
    let supplied = data_encoding::BASE64.encode(b"hunter2-hunter2");
    let import = json!({"key_type": "KEY_TYPE_API_KEY", "value": supplied});
    refused(a.call("CreateKey", import).await, Code::ResourceExhausted);
    let item = json!({"request": {"key_type": "KEY_TYPE_AES_256"}});
    let answers = a.stream("StreamCreateKeys", vec![item]).await.unwrap();
    assert_eq!(answers[0]["error_reason"], "KEY_QUOTA", "{answers:?}");
    admin.create(json!({})).await;
    let samples = scrape(&server.port("metrics"));
    let figure = |quota| value(&samples, "polykey_quota_refused_total", &[("quota", quota)]);
    assert!(figure("few") >= 4.0 && figure("paid").abs() < f64::EPSILON);

    // A start changes nothing; what the rule gives does so without one.
    let server = server.restart(false, &Options::default());
    let mut a = a.at(&server.address);
    a.login().await.unwrap();
    refused(makes(&a).await, Code::ResourceExhausted);
    let config = server.state.join("polykey.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("keys = 3", "keys = 4")).unwrap();
    assert_eq!(server.cli(&["reload"]).0, 0);
    makes(&a).await.unwrap();
    let refusal = refused(makes(&a).await, Code::ResourceExhausted);
    assert!(refusal.text.contains("4 keys"), "{refusal:?}");
    // Whoever has no quota has no limit.
    server.admin().await.create(json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_has_the_calls_that_its_rule_gives_it() {
    let rules = "\n[rates.lists]\nper_second = 1\nburst = 3\nmethods = [\"ListKeys\"]\n\
                 [rates.one]\nper_second = 1\nclient = \"b\"\nmethods = [\"GetKeyMetadata\"]\n\
                 [rates.batches]\nper_second = 1\nburst = 50\nclient = \"b\"\n\
                 methods = [\"BatchGetKeyMetadata\", \"BatchCrypto\"]\n";
    let server = Server::dev_configured(|text| text + rules);
    let admin = server.admin().await;
    let (a, b) =
        (server.client(&admin, "a", &["user"]).await, server.client(&admin, "b", &["user"]).await);
    let list = async |client: &Client| client.call("ListKeys", json!({})).await;
    // More than the bucket gives at once, and less than a second's worth besides.
    let mut refusal = None;
    for _ in 0..50 {
        refusal = list(&a).await.err().or(refusal);
    }
    let refusal = refusal.unwrap();
    assert!(refusal.code == Code::ResourceExhausted && refusal.retry, "{refusal:?}");
    list(&b).await.unwrap();
    let key = admin.create(json!({})).await;
    let read = async |client: &Client| {
        client.call("GetKeyMetadata", json!({"key_id": key})).await.err().map(|fail| fail.code)
    };
    for _ in 0..5 {
        assert_ne!(read(&a).await, Some(Code::ResourceExhausted));
    }
    let mut often = 0;
    for _ in 0..20 {
        often += usize::from(read(&b).await == Some(Code::ResourceExhausted));
    }
    assert!(often > 0);
    // A batch counts as its items do, and says when they have room.
    let items = |n: usize| json!({"keys": vec![json!({"key_id": key}); n]});
    let batch = async |n: usize| b.call("BatchGetKeyMetadata", items(n)).await;
    batch(45).await.unwrap();
    let refusal = refused(batch(45).await, Code::ResourceExhausted);
    assert!(refusal.retry, "{refusal:?}");
    let random = json!({"generate_random": {"length": 1}});
    let operations = json!({"operations": vec![random; 45]});
    refused(b.call("BatchCrypto", operations).await, Code::ResourceExhausted);
    let refusal = refused(batch(51).await, Code::InvalidArgument);
    assert!(refusal.violations.iter().any(|(field, why)| field == "keys" && why.contains("50")));
    a.call("BatchGetKeyMetadata", items(51)).await.unwrap();
}
