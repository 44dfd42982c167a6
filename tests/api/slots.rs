//! Several ways to open the root key: configured wrappers, recovery keys and their shares.

use std::fs;
use std::path::Path;

use serde_json::json;
use tonic::Code;

use crate::common::client::refused;
use crate::common::steps::{cli, secret};
use crate::common::{Options, POLYKEY, Server};

/// A node with two further wrappers in its configuration, and what they need.
fn prepared() -> Server {
    Server::dev_configured(|text| {
        format!(
            "{text}\n[wrappers.spare]\nsource = {{ file = \"spare.key\" }}\n\n\
             [wrappers.words]\npassphrase = {{ file = \"words.txt\" }}\n\
             argon2 = {{ memory_kib = 19456, passes = 2, lanes = 1 }}\n"
        )
    })
}

fn config(state: &Path) -> String {
    state.join("polykey.toml").display().to_string()
}

fn hide(path: &Path) {
    fs::rename(path, path.with_extension("hidden")).unwrap();
}

fn show(path: &Path) {
    fs::rename(path.with_extension("hidden"), path).unwrap();
}

/// The node again, with what is in its directory now.
fn serve(state: &Path) -> Result<Server, crate::common::Ended> {
    Server::serve(state, &config(state), &Options::default())
}

#[tokio::test(flavor = "multi_thread")]
async fn any_one_wrapper_alone_opens_the_store_and_none_fails_clearly() {
    // Both are written after the node has started: it finds them when they are asked for.
    let mut server = prepared();
    let state = server.state.clone();
    let spare = secret(&state, "spare.key", &polykey_hsm::generate_master_key().unwrap());
    let words = secret(&state, "words.txt", "correct horse battery staple\n");
    let main = state.join("master.key");
    assert!(main.exists());
    let admin = server.admin().await;
    let key = admin.create(json!({"description": "kept", "exportable": true})).await;
    for name in ["spare", "words"] {
        let added =
            cli(&server, &["root", "slot", "add", &format!("by-{name}"), "--wrapper", name]);
        assert_eq!(added["slot"]["label"], format!("by-{name}"));
    }
    let listed = cli(&server, &["root", "slot", "list"]);
    assert_eq!(listed["slots"].as_array().unwrap().len(), 3, "{listed}");
    for slot in ["main", "by-spare", "by-words"] {
        assert_eq!(cli(&server, &["root", "slot", "test", slot])["opens"], true, "{slot}");
    }
    // Rotation keeps every slot.
    cli(&server, &["root", "rotate"]);
    let directory = server.stop().2;

    for alone in [&main, &spare, &words] {
        for file in [&main, &spare, &words] {
            if file != alone {
                hide(file);
            }
        }
        server = serve(&state).unwrap_or_else(|ended| panic!("{alone:?}: {}", ended.output));
        let admin = server.admin().await;
        admin.call("GetKey", json!({"key_id": key})).await.unwrap();
        let (status, output, _) = server.stop();
        assert!(status.success(), "{status}: {output}");
        for file in [&main, &spare, &words] {
            if file != alone {
                show(file);
            }
        }
    }
    for file in [&main, &spare, &words] {
        hide(file);
    }
    let ended = serve(&state).err().unwrap();
    assert_eq!(ended.status.code(), Some(2), "{}", ended.output);
    for named in ["[master_key]", "[wrappers.spare]", "[wrappers.words]"] {
        assert!(ended.output.contains(named), "{named}: {}", ended.output);
    }
    // Another secret in one's place: that slot's own trouble is told.
    secret(&state, "spare.key", &polykey_hsm::generate_master_key().unwrap());
    let ended = serve(&state).err().unwrap();
    assert_eq!(ended.status.code(), Some(7), "{}", ended.output);
    assert!(
        ended.output.contains("by-spare") && ended.output.contains("words.txt"),
        "{}",
        ended.output
    );
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_bring_a_copy_back_on_a_blank_machine() {
    let server = Server::dev();
    let state = server.state.clone();
    let admin = server.admin().await;
    let key = admin.create(json!({"description": "kept", "alias": "kept"})).await;
    let away = tempfile::tempdir().unwrap();
    let out = away.path().display().to_string();
    let add = ["root", "slot", "add", "safe", "--shares", "3", "--threshold", "2", "--out", &out];
    let added = cli(&server, &add);
    let shares: Vec<String> = added["shares"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(shares.len(), 3);
    // Nothing on the node opens it, and the test of it says what does.
    let (code, out, _) = server.cli(&["root", "slot", "test", "safe"]);
    assert_eq!(code, 7, "{out}");
    assert!(out.contains("polykey recover"), "{out}");
    // A new root needs nobody's share.
    cli(&server, &["root", "rotate"]);
    admin.call("UpdateKeyMetadata", json!({"key_id": key, "description": "later"})).await.unwrap();
    let directory = server.stop().2;

    // All that is left: a copy of the store, the configuration, and two of the shares.
    let blank = tempfile::tempdir().unwrap();
    let place = blank.path().join("state");
    fs::create_dir(&place).unwrap();
    let copied = fs::read_dir(&state).unwrap().map(Result::unwrap);
    for entry in copied.filter(|entry| entry.file_type().unwrap().is_file()) {
        if entry.file_name() != "master.key" {
            fs::copy(entry.path(), place.join(entry.file_name())).unwrap();
        }
    }
    drop(directory);
    let text = fs::read_to_string(place.join("polykey.toml")).unwrap();
    let moved = text.replace(&state.display().to_string(), &place.display().to_string());
    fs::write(place.join("polykey.toml"), moved).unwrap();
    let file = config(&place);
    let recover = |args: &[&str]| {
        let mut command = std::process::Command::new(POLYKEY);
        command.args(["recover", "--config", &file, "--generate-master-key"]);
        let output = command.args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        (output.status.code().unwrap(), text)
    };
    // One share, one share twice, a share with a slip of the pen.
    let (code, said) = recover(&["--share", &shares[0], "--share", &shares[0]]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("2 different shares are needed, and there are 1"), "{said}");
    let slip = away.path().join("slip");
    let written = fs::read_to_string(&shares[1]).unwrap();
    let at = written.len() - 9;
    let other = if &written[at..=at] == "A" { "B" } else { "A" };
    fs::write(&slip, format!("{}{other}{}", &written[..at], &written[at + 1..])).unwrap();
    let (code, said) = recover(&["--share", &shares[0], "--share", slip.to_str().unwrap()]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("checksum") && !said.contains(written.trim()), "{said}");

    let (code, said) = recover(&["--share", &shares[2], "--share", &shares[0]]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = recover(&["--share", &shares[2], "--share", &shares[1]]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    let server = serve(&place).unwrap_or_else(|ended| panic!("{}", ended.output));
    let admin = server.admin().await;
    let got = admin.call("GetKeyMetadata", json!({"key_id": "alias/kept"})).await.unwrap();
    assert_eq!(got["metadata"]["description"], "later", "{got}");
    let events = admin.call("ListAuditEvents", json!({"page_size": 100})).await.unwrap();
    assert!(events.to_string().contains("\"Recover\""), "{events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_key_kept_whole_recovers_too_and_another_one_does_not() {
    let server = Server::dev();
    let state = server.state.clone();
    let away = tempfile::tempdir().unwrap();
    let file = |name: &str| away.path().join(name).display().to_string();
    let (kept, other) = (file("kept"), file("other"));
    let made = cli(&server, &["root", "recovery-key", "--out", &kept]);
    cli(&server, &["root", "recovery-key", "--out", &other]);
    let (code, _, said) = server.cli(&["root", "recovery-key", "--out", &kept]);
    assert_ne!(code, 0, "{said}");
    let public = made["public_key"].as_str().unwrap();
    cli(&server, &["root", "slot", "add", "offline", "--recovery-key", public]);
    let directory = server.stop().2;
    fs::remove_file(state.join("master.key")).unwrap();
    let recover = |key: &str| {
        let args = ["recover", "--config", &config(&state), "--generate-master-key", "--key", key];
        let output = std::process::Command::new(POLYKEY).args(args).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = recover(&other);
    assert_ne!(code, 0);
    assert!(said.contains("of no slot of the store"), "{said}");
    assert_eq!(recover(&kept).0, 0);
    let server = serve(&state).unwrap_or_else(|ended| panic!("{}", ended.output));
    server.admin().await.call("WhoAmI", json!({})).await.unwrap();
    drop((server, directory));
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_slots_are_guarded() {
    let server = prepared();
    let admin = server.admin().await;
    secret(&server.state, "spare.key", &polykey_hsm::generate_master_key().unwrap());
    let add = |label: &str, wrapper: &str| json!({"label": label, "wrapper": wrapper});
    for (body, field) in [
        (add("", "spare"), "label"),
        (add("a b", "spare"), "label"),
        (add("x", ""), "wrapper"),
        (add("x", "nobody"), "wrapper"),
        // Its file is not there.
        (add("x", "words"), "wrapper"),
        (
            json!({"label": "x", "recovery_public_key": "polykey-recovery-public-AAAA"}),
            "recovery_public_key",
        ),
        (json!({"label": "x", "wrapper": "spare", "recovery_public_key": "p"}), "wrapper"),
    ] {
        let fail = refused(admin.call("AddSlot", body.clone()).await, Code::InvalidArgument);
        assert!(fail.violations.iter().any(|(name, _)| name == field), "{body}: {fail:?}");
    }
    // The last usable slot stays, also beside one that only a recovery key opens.
    let away = tempfile::tempdir().unwrap();
    let out = away.path().display().to_string();
    cli(
        &server,
        &["root", "slot", "add", "safe", "--shares", "2", "--threshold", "2", "--out", &out],
    );
    refused(admin.call("RemoveSlot", json!({"slot_id": "main"})).await, Code::FailedPrecondition);
    // Asked for again with its idempotency key, a slot is added once.
    let key: crate::common::client::Meta<'_> = &[("idempotency-key", b"once")];
    let first = admin.call_with("AddSlot", add("spare", "spare"), key).await.unwrap().body;
    let again = admin.call_with("AddSlot", add("spare", "spare"), key).await.unwrap().body;
    assert_eq!(first["slot"]["slot_id"], again["slot"]["slot_id"]);
    refused(admin.call("AddSlot", add("spare", "spare")).await, Code::AlreadyExists);
    let stale = json!({"slot_id": "main", "expected_generation": 1});
    refused(admin.call("RemoveSlot", stale).await, Code::Aborted);
    admin.call("RemoveSlot", json!({"slot_id": "main"})).await.unwrap();
    refused(admin.call("RemoveSlot", json!({"slot_id": "spare"})).await, Code::FailedPrecondition);
    refused(admin.call("RemoveSlot", json!({"slot_id": "main"})).await, Code::NotFound);
    refused(admin.call("TestSlot", json!({"slot_id": "main"})).await, Code::NotFound);
    // The removed master key opens nothing now, and the node says by which it may.
    let state = server.state.clone();
    let directory = server.stop().2;
    fs::remove_file(state.join("spare.key")).unwrap();
    let ended = serve(&state).err().unwrap();
    assert_eq!(ended.status.code(), Some(7), "{}", ended.output);
    assert!(ended.output.contains("polykey recover"), "{}", ended.output);
    drop(directory);
}
