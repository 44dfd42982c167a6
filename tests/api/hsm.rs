//! The root key in a PKCS#11 token, beside a passphrase, AWS KMS and recovery shares: the real binary
//! with SoftHSM and moto.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tonic::Code;

use crate::common::aws::Moto;
use crate::common::client::{Client, refused};
use crate::common::softhsm::{PIN, SoftHsm};
use crate::common::{Ended, Options, PATIENCE, POLYKEY, Server};

const TEXT: &str = "bWVldCBtZQ==";

fn cli(server: &Server, args: &[&str]) -> Value {
    let mut all = vec!["-o", "json"];
    all.extend(args);
    let (code, out, err) = server.cli(&all);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    serde_json::from_str(&out).unwrap()
}

fn serve(state: &Path, options: &Options) -> Result<Server, Ended> {
    Server::serve(state, &state.join("polykey.toml").display().to_string(), options)
}

async fn seal(client: &Client, key: &str) -> Value {
    let body = json!({"key_id": key, "plaintext": TEXT});
    client.call("Encrypt", body).await.unwrap()["ciphertext"].clone()
}

async fn opens(client: &Client, sealed: &Value) {
    let opened = client.call("Decrypt", json!({"ciphertext": sealed})).await.unwrap();
    assert_eq!(opened["plaintext"], TEXT);
}

#[tokio::test(flavor = "multi_thread")]
async fn passphrase_token_kms_and_shares_each_open_it_alone_and_without_any_it_says_so() {
    let (moto, token, home) = (Moto::start(), SoftHsm::new(), tempfile::tempdir().unwrap());
    let options = Moto::options(home.path());
    let key = moto.key();
    let (hsm, cloud) = (token.section("wrappers.hsm"), moto.section("wrappers.cloud", &key));
    let words = "\n[wrappers.words]\npassphrase = { file = \"words.txt\" }\n\
                 argon2 = { memory_kib = 19456, passes = 2, lanes = 1 }\n";
    let server = Server::dev_configured_with(&options, |text| format!("{text}{words}{hsm}{cloud}"));
    let state = server.state.clone();
    let file = state.join("words.txt");
    polykey::pki::write_file(&file, b"correct horse battery staple\n", 0o600).unwrap();
    assert!(token.list().contains("polykey"), "{}", token.list());
    // A key that is not there is not made by anything but the command for it.
    let (code, _, said) = server.cli(&["root", "slot", "add", "token", "--wrapper", "hsm"]);
    assert_ne!(code, 0);
    assert!(said.contains("kek"), "{said}");
    let made = token.create_kek(&state.join("polykey.toml"), "hsm");
    assert!(made.contains("pkcs11:") && made.contains("never leaves the token"), "{made}");
    for (label, wrapper) in [("words", "words"), ("token", "hsm"), ("kms", "cloud")] {
        cli(&server, &["root", "slot", "add", label, "--wrapper", wrapper]);
    }
    let away = tempfile::tempdir().unwrap();
    let out = away.path().display().to_string();
    let add = ["root", "slot", "add", "safe", "--shares", "3", "--threshold", "2", "--out", &out];
    let shares = cli(&server, &add);
    let share = |n: usize| shares["shares"][n].as_str().unwrap().to_owned();
    cli(&server, &["root", "slot", "remove", "main"]);
    cli(&server, &["root", "rotate"]);
    let admin = server.admin().await;
    let kept = admin.create(json!({})).await;
    let sealed = seal(&admin, &kept).await;
    let directory = server.stop().2;
    fs::remove_file(state.join("master.key")).unwrap();

    // Everything but one is away: the passphrase's file, the token, AWS (behind a wrong port).
    let text = fs::read_to_string(state.join("polykey.toml")).unwrap();
    let nobody = text.replace(&moto.url(), "http://127.0.0.1:9");
    assert_ne!(text, nobody);
    let alone = |which: &str| {
        if which != "words" {
            fs::rename(&file, file.with_extension("hidden")).unwrap();
        }
        if which != "token" {
            token.pull();
        }
        let config = if which == "kms" { &text } else { &nobody };
        fs::write(state.join("polykey.toml"), config).unwrap();
    };
    let back = |which: &str| {
        if which != "words" {
            fs::rename(file.with_extension("hidden"), &file).unwrap();
        }
        if which != "token" {
            token.insert();
        }
    };
    for which in ["words", "token", "kms"] {
        alone(which);
        let server = serve(&state, &options);
        let server = server.unwrap_or_else(|ended| panic!("{which}: {}", ended.output));
        opens(&server.admin().await, &sealed).await;
        let (status, output, _) = server.stop();
        assert!(status.success() && !output.contains(PIN), "{which}: {output}");
        back(which);
    }
    alone("nothing");
    let ended = serve(&state, &options).err().unwrap();
    // Another start may find what does not answer now.
    assert_eq!(ended.status.code(), Some(6), "{}", ended.output);
    for part in ["`words`", "`token`", "`kms`", "polykey recover", "does not answer"] {
        assert!(ended.output.contains(part), "{part}: {}", ended.output);
    }

    // Shares bring a copy of the store back on a blank machine, where nothing else of it is.
    let blank = tempfile::tempdir().unwrap();
    let place = blank.path().join("state");
    fs::create_dir(&place).unwrap();
    for entry in fs::read_dir(&state).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), place.join(entry.file_name())).unwrap();
        }
    }
    let bare = text.split("\n[wrappers.words]").next().unwrap();
    fs::write(place.join("polykey.toml"), bare).unwrap();
    drop((directory, token, moto));
    let file = place.join("polykey.toml").display().to_string();
    let mut command = Command::new(POLYKEY);
    command.args(["recover", "--config", &file, "--generate-master-key"]);
    let output = command.args(["--share", &share(2), "--share", &share(0)]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let server = serve(&place, &options).unwrap_or_else(|ended| panic!("{}", ended.output));
    opens(&server.admin().await, &sealed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_pulled_out_and_put_back_needs_no_restart() {
    let token = SoftHsm::new();
    let server = Server::dev_configured(|text| format!("{text}{}", token.section("wrappers.hsm")));
    token.create_kek(&server.state.join("polykey.toml"), "hsm");
    cli(&server, &["root", "slot", "add", "token", "--wrapper", "hsm"]);
    cli(&server, &["root", "slot", "remove", "main"]);
    let admin = server.admin().await;
    let kept = admin.create(json!({})).await;
    let sealed = seal(&admin, &kept).await;
    let test = json!({"slot_id": "token"});
    for round in 0..3 {
        token.pull();
        let told = admin.call("TestSlot", test.clone()).await.unwrap();
        assert_ne!(told["opens"], json!(true), "{told}");
        assert!(told["problem"].as_str().unwrap().contains("does not answer"), "{told}");
        // What is open stays open.
        opens(&admin, &sealed).await;
        token.insert();
        let until = Instant::now() + PATIENCE;
        while admin.call("TestSlot", test.clone()).await.unwrap()["opens"] != json!(true) {
            assert!(Instant::now() < until, "round {round}: not back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    // The process that had the module loaded may die as it likes.
    let children = format!("/proc/{0}/task/{0}/children", server.pid());
    let workers: Vec<u32> = fs::read_dir(format!("/proc/{}/task", server.pid()))
        .unwrap()
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().map(|p| p.parse().unwrap()).collect::<Vec<_>>())
        .collect();
    assert!(!workers.is_empty(), "{children}");
    for pid in workers {
        let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    let until = Instant::now() + PATIENCE;
    while admin.call("TestSlot", test.clone()).await.unwrap()["opens"] != json!(true) {
        assert!(Instant::now() < until, "not back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cli(&server, &["root", "rotate"]);
    opens(&admin, &sealed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_live_in_the_token_and_die_there() {
    let token = SoftHsm::new();
    let server = Server::dev_configured(|text| {
        format!("{text}{}\n[hardened]\nwrapper = \"hsm\"\n", token.section("wrappers.hsm"))
    });
    let admin = server.admin().await;
    let in_token = |kind: &str| json!({"key_type": kind, "in_token": true});
    let made = admin.call("CreateKey", in_token("KEY_TYPE_ECDSA_P256")).await.unwrap();
    assert_eq!(made["metadata"]["in_token"], true, "{made}");
    assert_eq!(made["metadata"]["storage_type"], "STORAGE_PROFILE_HARDENED", "{made}");
    let key = made["key_id"].as_str().unwrap().to_owned();
    let sign = |version: u32| json!({"key_id": key, "message": TEXT, "version": version});
    let first = admin.call("Sign", sign(0)).await.unwrap();
    let verify = |signature: &Value, version: u32| json!({"key_id": key, "message": TEXT, "signature": signature, "version": version});
    let told = admin.call("Verify", verify(&first["signature"], 1)).await.unwrap();
    assert_eq!(told["valid"], true, "{told}");
    // RSA, and what a token does not keep, and what must not be asked for.
    let rsa = admin.call("CreateKey", in_token("KEY_TYPE_RSA_2048")).await.unwrap();
    let body = json!({"key_id": rsa["key_id"], "message": TEXT});
    admin.call("Sign", body).await.unwrap();
    for (body, field) in [
        (in_token("KEY_TYPE_ED25519"), "in_token"),
        (in_token("KEY_TYPE_AES_256"), "in_token"),
        (
            json!({"key_type": "KEY_TYPE_ECDSA_P256", "in_token": true, "exportable": true}),
            "in_token",
        ),
        (
            json!({"key_type": "KEY_TYPE_ECDSA_P256", "in_token": true,
                   "storage_profile": "STORAGE_PROFILE_STANDARD"}),
            "in_token",
        ),
    ] {
        let fail = refused(admin.call("CreateKey", body.clone()).await, Code::InvalidArgument);
        assert!(fail.violations.iter().any(|(name, _)| name == field), "{body}: {fail:?}");
    }
    let export = json!({"key_id": key, "mode": "EXPORT_MODE_PLAIN"});
    refused(admin.call("ExportKey", export).await, Code::FailedPrecondition);
    // Only who may harden keys puts any there.
    let user = server.client(&admin, "plain", &["user"]).await;
    refused(user.call("CreateKey", in_token("KEY_TYPE_ECDSA_P256")).await, Code::PermissionDenied);

    // A rotation makes another there, the root's touches none, and a restart finds all.
    admin.call("RotateKey", json!({"key_id": key})).await.unwrap();
    cli(&server, &["root", "rotate"]);
    let server = server.restart(true, &Options::default());
    let admin = server.admin().await;
    let second = admin.call("Sign", sign(0)).await.unwrap();
    for (signed, version) in [(&first, 1), (&second, 2)] {
        let told = admin.call("Verify", verify(&signed["signature"], version)).await.unwrap();
        assert_eq!(told["valid"], true, "{version}: {told}");
    }
    let told = admin.call("Verify", verify(&first["signature"], 2)).await.unwrap();
    assert_ne!(told["valid"], json!(true), "{told}");
    // Out of its slot, keys in it wait and others do not.
    let other = admin.create(json!({"storage_profile": "STORAGE_PROFILE_STANDARD"})).await;
    token.pull();
    let fail = refused(admin.call("Sign", sign(0)).await, Code::Unavailable);
    assert!(fail.retry, "{fail:?}");
    let sealed = seal(&admin, &other).await;
    opens(&admin, &sealed).await;
    token.insert();
    let until = Instant::now() + PATIENCE;
    while let Err(fail) = admin.call("Sign", sign(0)).await {
        assert_eq!(fail.code, Code::Unavailable, "{fail:?}");
        assert!(Instant::now() < until, "not back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let events =
        admin.call("ListAuditEvents", json!({"filter": {"action": "Sign"}})).await.unwrap();
    assert!(events["events"].as_array().unwrap().len() > 2, "{events}");
}
