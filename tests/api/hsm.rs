//! The root key in a PKCS#11 token, beside a passphrase, AWS KMS and recovery shares: the real binary
//! with SoftHSM and moto.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::aws::Moto;
use crate::common::client::refused;
use crate::common::softhsm::{Kryoptic, PIN, SoftHsm, workers};
use crate::common::steps::{TEXT, cli, opens, seal, secret, serve};
use crate::common::{Options, PATIENCE, POLYKEY, Server, skip};

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
    let listed = token.list();
    assert!(listed.contains("polykey"), "{listed}");
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
async fn while_a_token_hangs_other_slots_change_and_the_status_answers() {
    let token = SoftHsm::new();
    let server = Server::dev_configured(|text| {
        let patient = token.section("wrappers.hsm").replace("\"2s\"", "\"25s\"");
        format!("{text}{patient}\n[wrappers.spare]\nsource = {{ file = \"spare.key\" }}\n")
    });
    secret(&server.state, "spare.key", &polykey_hsm::generate_master_key().unwrap());
    token.create_kek(&server.state.join("polykey.toml"), "hsm");
    cli(&server, &["root", "slot", "add", "token", "--wrapper", "hsm"]);
    let admin = server.admin().await;
    let before = admin.call("GetRootStatus", json!({})).await.unwrap();
    for pid in workers(&server) {
        kill_process(pid, Signal::STOP).unwrap();
    }
    let hanging = |name: &'static str, body: Value| {
        let admin = admin.clone();
        tokio::spawn(async move { admin.call(name, body).await })
    };
    let rotating = hanging("RotateRoot", json!({}));
    let testing = hanging("TestSlot", json!({"slot_id": "token"}));
    let others = async {
        let status = admin.call("GetRootStatus", json!({})).await.unwrap();
        assert_eq!(status["root_id"], before["root_id"]);
        let spare = json!({"label": "spare", "wrapper": "spare"});
        admin.call("AddSlot", spare).await.unwrap();
        for slot in ["main", "spare"] {
            let told = admin.call("TestSlot", json!({"slot_id": slot})).await.unwrap();
            assert_eq!(told["opens"], true, "{told}");
        }
        admin.call("RemoveSlot", json!({"slot_id": "main"})).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(15), others).await.expect("somebody waits");
    assert!(!rotating.is_finished() && !testing.is_finished());
    // When it answers again, what waited for it is done.
    for pid in workers(&server) {
        kill_process(pid, Signal::CONT).unwrap();
    }
    assert_eq!(testing.await.unwrap().unwrap()["opens"], true);
    rotating.await.unwrap().unwrap();
    let after = admin.call("GetRootStatus", json!({})).await.unwrap();
    assert_ne!(after["root_id"], before["root_id"]);
    let tested = cli(&server, &["root", "slot", "test", "token", "spare"]);
    assert_eq!(tested["tests"].as_array().unwrap().len(), 2, "{tested}");
    // What opened the node is gone, so that another slot is marked.
    let listed = cli(&server, &["root", "slot", "list"]);
    let used = |slot: &&Value| slot["in_use"] == true;
    let used: Vec<_> = listed["slots"].as_array().unwrap().iter().filter(used).collect();
    assert!(matches!(used.as_slice(), [one] if one["label"] == "spare"), "{listed}");
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
    for pid in workers(&server) {
        kill_process(pid, Signal::KILL).unwrap();
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

/// An RSA key to decrypt with.
fn decrypts() -> Value {
    json!({"key_type": "KEY_TYPE_RSA_2048", "purpose": "KEY_PURPOSE_ENCRYPT", "in_token": true})
}

#[tokio::test(flavor = "multi_thread")]
async fn an_rsa_key_decrypts_in_its_token() {
    let Some(token) = Kryoptic::new() else {
        return skip(
            "an_rsa_key_decrypts_in_its_token",
            "POLYKEY_KRYOPTIC names no module (make kryoptic builds one and runs this)",
        );
    };
    let server = Server::dev_configured(|text| {
        format!("{text}{}\n[hardened]\nwrapper = \"hsm\"\n", token.section("wrappers.hsm"))
    });
    let admin = server.admin().await;
    let made = admin.call("CreateKey", decrypts()).await.unwrap();
    let key = made["key_id"].as_str().unwrap();
    let raw = |field: &str, value: &Value| {
        let mut body = json!({"key_id": key, "format": "CIPHERTEXT_FORMAT_RAW"});
        body[field] = value.clone();
        body
    };
    let sealed = admin.call("Encrypt", raw("plaintext", &json!(TEXT))).await.unwrap();
    let sealed = &sealed["ciphertext"];
    let opened = admin.call("Decrypt", raw("ciphertext", sealed)).await.unwrap();
    assert_eq!(opened["plaintext"], TEXT);
    // Another key's ciphertext, and changed bytes: one text, whatever it is.
    let mut changed = data_encoding::BASE64.decode(sealed.as_str().unwrap().as_bytes()).unwrap();
    changed[7] ^= 1;
    let changed = json!(data_encoding::BASE64.encode(&changed));
    let fail = admin.call("Decrypt", raw("ciphertext", &changed)).await;
    assert_eq!(refused(fail, Code::InvalidArgument).text, "decryption failed");
    let opened = admin.call("Decrypt", raw("ciphertext", sealed)).await.unwrap();
    assert_eq!(opened["plaintext"], TEXT);
    let signs = json!({"key_id": key, "message": TEXT});
    assert!(admin.call("Sign", signs).await.is_err(), "a key has one purpose");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_token_cannot_make_is_refused_in_words_and_not_left_there() {
    let token = SoftHsm::new();
    let server = Server::dev_configured(|text| {
        format!("{text}{}\n[hardened]\nwrapper = \"hsm\"\n", token.section("wrappers.hsm"))
    });
    let admin = server.admin().await;
    // SoftHSM knows RSA-OAEP with SHA-1 alone.
    let fail = refused(admin.call("CreateKey", decrypts()).await, Code::FailedPrecondition);
    assert_eq!(fail.reason, "PROFILE_UNAVAILABLE");
    assert!(fail.text.contains("[hardened]") && fail.text.contains("token"), "{fail:?}");
    assert_eq!(token.objects(), 0);
    // A name that is taken is seen after the object was made.
    let named = json!({"key_type": "KEY_TYPE_ECDSA_P256", "in_token": true, "alias": "one"});
    admin.call("CreateKey", named.clone()).await.unwrap();
    refused(admin.call("CreateKey", named).await, Code::AlreadyExists);
    let until = Instant::now() + PATIENCE;
    while token.objects() != 2 {
        assert!(Instant::now() < until, "{} objects", token.objects());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
