//! The root key in AWS KMS, and secrets from Parameter Store: the real binary against moto.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::json;

use crate::common::aws::Moto;
use crate::common::client::Client;
use crate::common::steps::{cli, opens, seal, serve};
use crate::common::{POLYKEY, Server};

/// Seals with a key over and over until it is told to stop; counts.
fn load(client: Client, key: String) -> (Arc<AtomicBool>, tokio::task::JoinHandle<u64>) {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let done = AtomicU64::new(0);
    let task = tokio::spawn(async move {
        while !stopped.load(Ordering::Relaxed) {
            let sealed = seal(&client, &key).await;
            opens(&client, &sealed).await;
            done.fetch_add(1, Ordering::Relaxed);
        }
        done.into_inner()
    });
    (stop, task)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_root_moves_from_a_file_to_kms_and_back_while_the_node_serves() {
    let (moto, home) = (Moto::start(), tempfile::tempdir().unwrap());
    let options = Moto::options(home.path());
    let (key, second) = (moto.key(), moto.key());
    let server = Server::dev_configured_with(&options, |text| {
        let (cloud, other) =
            (moto.section("wrappers.cloud", &key), moto.section("wrappers.other", &second));
        format!("{text}{cloud}{other}\n[wrappers.back]\nsource = {{ file = \"back.key\" }}\n")
    });
    let state = server.state.clone();
    let admin = server.admin().await;
    let kept = admin.create(json!({"description": "kept"})).await;
    let sealed = seal(&admin, &kept).await;
    let (stop, busy) = load(server.admin().await, kept.clone());

    // To KMS: a slot more, proof that it opens, and the old one less.
    let added = cli(&server, &["root", "slot", "add", "kms", "--wrapper", "cloud"]);
    assert_eq!(added["slot"]["kind"], "aws", "{added}");
    assert_eq!(added["slot"]["source"], key, "{added}");
    assert_eq!(cli(&server, &["root", "slot", "test", "kms"])["opens"], true);
    cli(&server, &["root", "slot", "remove", "main"]);
    cli(&server, &["root", "rotate"]);
    stop.store(true, Ordering::Relaxed);
    let calls = busy.await.unwrap();
    assert!(calls > 0);
    let directory = server.stop().2;

    // The file is provably not needed.
    fs::remove_file(state.join("master.key")).unwrap();
    let server = serve(&state, &options).unwrap_or_else(|ended| panic!("{}", ended.output));
    let admin = server.admin().await;
    opens(&admin, &sealed).await;
    // To another KMS key, wrapped anew under the same one meanwhile, and back to a file.
    cli(&server, &["root", "slot", "rotate", "kms"]);
    cli(&server, &["root", "slot", "add", "kms-2", "--wrapper", "other"]);
    cli(&server, &["root", "slot", "remove", "kms"]);
    moto.ask("TrentService.DisableKey", &json!({"KeyId": key.rsplit('/').next()}));
    let made = polykey_hsm::generate_master_key().unwrap();
    polykey::pki::write_file(&state.join("back.key"), made.as_bytes(), 0o600).unwrap();
    cli(&server, &["root", "slot", "add", "back", "--wrapper", "back"]);
    cli(&server, &["root", "slot", "remove", "kms-2"]);
    opens(&admin, &sealed).await;
    let (status, output, _) = server.stop();
    assert!(status.success(), "{output}");

    // KMS is provably not needed either.
    drop(moto);
    let server = serve(&state, &options).unwrap_or_else(|ended| panic!("{}", ended.output));
    opens(&server.admin().await, &sealed).await;
    let written = server.stop().1 + &output;
    for secret in ["a-secret-access-key-of-the-tests", made.trim()] {
        assert!(!written.contains(secret), "a secret is in the log");
    }
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_open_goes_on_without_kms_and_one_that_starts_says_what_it_misses() {
    let (moto, home) = (Moto::start(), tempfile::tempdir().unwrap());
    let options = Moto::options(home.path());
    let key = moto.key();
    let server = Server::dev_configured_with(&options, |text| {
        format!("{text}{}", moto.section("wrappers.cloud", &key))
    });
    let state = server.state.clone();
    cli(&server, &["root", "slot", "add", "kms", "--wrapper", "cloud"]);
    cli(&server, &["root", "slot", "remove", "main"]);
    let admin = server.admin().await;
    let kept = admin.create(json!({})).await;
    let sealed = seal(&admin, &kept).await;
    drop(moto);
    opens(&admin, &sealed).await;
    admin.create(json!({})).await;
    let (code, out, _) = server.cli(&["root", "slot", "test", "kms"]);
    assert_eq!(code, 7, "{out}");
    assert!(out.contains("does not answer"), "{out}");
    // What needs it says so, and changes nothing.
    let (code, _, said) = server.cli(&["root", "rotate"]);
    assert_ne!(code, 0);
    assert!(said.contains("kms"), "{said}");
    opens(&admin, &sealed).await;
    let directory = server.stop().2;
    let ended = serve(&state, &options).err().unwrap();
    assert!(!ended.status.success());
    assert!(
        ended.output.contains(&key) && ended.output.contains("does not answer"),
        "{}",
        ended.output
    );
    assert!(
        ended.output.contains("Connection refused"),
        "the reason is in the log: {}",
        ended.output
    );
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_founded_on_kms_and_parameters_with_no_secret_on_its_disk() {
    let (moto, home) = (Moto::start(), tempfile::tempdir().unwrap());
    let options = Moto::options(home.path());
    // A development node makes the certificates.
    let (_, _, directory) = Server::dev().stop();
    let directory = directory.unwrap();
    let old = directory.path().join("state");
    let read = |name: &str| fs::read_to_string(old.join(name)).unwrap();
    for (name, file) in [("certificate", "server.pem"), ("key", "server.key"), ("ca", "ca.pem")] {
        moto.put(&format!("/edge/{name}"), &read(file));
    }
    moto.put("/edge/signing", &"5a".repeat(32));
    let state = directory.path().join("node");
    fs::create_dir(&state).unwrap();
    let config = |master: &str, signing: &str| {
        format!(
            "[node]\ndata_dir = \"data\"\n[listen]\naddress = \"127.0.0.1:0\"\n\
             certificate = {{ ssm = \"/edge/certificate\" }}\nkey = {{ ssm = \"/edge/key\" }}\n\
             client_ca = {{ ssm = \"/edge/ca\" }}\n[bootstrap]\nregion = \"eu-west-1\"\n\
             endpoint_url = \"{}\"\n[tokens]\nsigning_key = {{ ssm = \"{signing}\" }}\n{master}",
            moto.url()
        )
    };
    let file = state.join("polykey.toml");
    let run = |args: &[&str]| {
        let mut command = Command::new(POLYKEY);
        command.args(args).env_remove("AWS_PROFILE").envs(options.env.iter().cloned());
        let output = command.output().unwrap();
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap_or(-1), text.into_owned())
    };
    let init = ["init", "--config", file.to_str().unwrap(), "--admin-identity"];
    let identity = polykey::pki::client_identity("admin").unwrap().to_string();
    let identity = format!("spiffe-uri:{identity}");

    // What is missing or malformed is named, all of it, and nothing is made.
    moto.put("/edge/short", "not a seed");
    let master = "[master_key]\nsource = { ssm = \"/edge/none\" }\n";
    fs::write(&file, config(master, "/edge/short")).unwrap();
    let (code, said) = run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(code, 2, "{said}");
    for part in ["/edge/none", "no such parameter", "[tokens] signing_key", "/edge/short"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!said.contains("not a seed of the"), "{said}");
    let (code, said) = run(&[&init[..], &[identity.as_str()]].concat());
    assert_eq!(code, 2, "{said}");

    // A master key in a parameter.
    let made = polykey_hsm::generate_master_key().unwrap();
    moto.put("/edge/none", made.trim());
    fs::write(&file, config(master, "/edge/signing")).unwrap();
    let (code, said) = run(&["check", "--config", file.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = run(&[&init[..], &[identity.as_str()]].concat());
    assert_eq!(code, 0, "{said}");
    fs::remove_dir_all(state.join("data")).unwrap();

    // And a node whose master key is a key of KMS.
    let key = moto.key();
    let master = moto.section("master_key", &key);
    fs::write(&file, config(&master, "/edge/signing")).unwrap();
    let (code, said) = run(&[&init[..], &[identity.as_str()]].concat());
    assert_eq!(code, 0, "{said}");
    let server = serve(&state, &options).unwrap_or_else(|ended| panic!("{}", ended.output));
    let files = polykey::net::client::ClientFiles {
        server_ca: old.join("ca.pem"),
        certificate: old.join("admin.pem"),
        key: old.join("admin.key"),
    };
    let api_key = fs::read_to_string(state.join("data/admin.api-key")).unwrap();
    let mut admin = Client::new(&server.address, files, "admin", api_key.trim());
    admin.login().await.unwrap();
    let kept = admin.create(json!({})).await;
    let sealed = seal(&admin, &kept).await;
    opens(&admin, &sealed).await;
    // The seed was taken once, by the start of `init`.
    let imported = json!({"filter": {"action": "ImportSigningKey"}});
    let events = admin.call("ListAuditEvents", imported).await.unwrap();
    assert_eq!(events["events"].as_array().unwrap().len(), 1, "{events}");
    moto.put("/edge/key", "no key at all");
    let (_, output, _) = server.stop();
    for secret in [made.trim(), "5a5a5a5a5a5a5a5a", "PRIVATE KEY"] {
        assert!(!output.contains(secret), "a secret is in the log");
        for entry in fs::read_dir(state.join("data")).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap_or_default();
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "a secret is in {}", path.display());
        }
    }
    let ended = serve(&state, &options).err().unwrap();
    assert_eq!(ended.status.code(), Some(2), "{}", ended.output);
    assert!(ended.output.contains("SSM parameter /edge/key"), "{}", ended.output);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parameter_that_is_away_is_for_another_start_and_one_that_is_not_there_for_an_operator() {
    let (moto, home) = (Moto::start(), tempfile::tempdir().unwrap());
    let options = Moto::options(home.path());
    moto.put("/edge/master", polykey_hsm::generate_master_key().unwrap().trim());
    let server = Server::dev_configured_with(&options, |text| {
        format!(
            "{text}\n[bootstrap]\nregion = \"eu-west-1\"\nendpoint_url = \"{}\"\n\
             attempt_timeout = \"1s\"\n\n[wrappers.parameter]\nsource = {{ ssm = \"/edge/master\" }}\n",
            moto.url()
        )
    });
    let state = server.state.clone();
    cli(&server, &["root", "slot", "add", "parameter", "--wrapper", "parameter"]);
    cli(&server, &["root", "slot", "remove", "main"]);
    let directory = server.stop().2;
    fs::remove_file(state.join("master.key")).unwrap();
    drop(serve(&state, &options).unwrap_or_else(|ended| panic!("{}", ended.output)));
    let file = state.join("polykey.toml");
    let here = fs::read_to_string(&file).unwrap();
    let nobody = here.replace(&moto.url(), "http://127.0.0.1:9");
    let ends = |text: &str, code: i32, words: &str| {
        fs::write(&file, text).unwrap();
        let ended = serve(&state, &options).err().unwrap();
        assert_eq!(ended.status.code(), Some(code), "{words}: {}", ended.output);
        assert!(ended.output.contains(words), "{words}: {}", ended.output);
    };
    // What opens the root key.
    ends(&nobody, 6, "AWS gave no answer");
    ends(&here.replace("/edge/master", "/edge/none"), 2, "there is no such parameter");
    // What it serves with.
    let key = "key = { ssm = \"/edge/key\" }";
    ends(&nobody.replacen("key = \"server.key\"", key, 1), 6, "[listen] key");
    ends(&here.replacen("key = \"server.key\"", key, 1), 2, "[listen] key");
    drop(directory);
}
