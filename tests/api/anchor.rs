//! Anchors: an older copy of a store, or one of another history, is refused; acknowledged revocations are
//! anchored; the anchor is never ahead of the store.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use polykey_storage::conformance::Rng;
use serde_json::{Value, json};

use crate::common::client::Client;
use crate::common::softhsm::SoftHsm;
use crate::common::{Ended, Options, PATIENCE, POLYKEY, Server};

/// How often the node is killed.
const KILLS: usize = 12;

fn accepting() -> Options {
    Options { args: vec!["--accept-rollback".into()], ..Options::default() }
}

/// A node with an anchor on what stands for another medium.
fn anchored(medium: &Path) -> Server {
    let section = format!("\n[anchor]\nfile = \"{}\"\n", medium.join("polykey.anchor").display());
    Server::dev_configured_with(&accepting(), |text| text + &section)
}

fn polykey(args: &[&str]) -> (i32, String) {
    let output = std::process::Command::new(POLYKEY).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    (output.status.code().unwrap(), text)
}

fn refused(state: &Path, code: i32, words: &[&str]) {
    let Err(Ended { status, output }) = Server::attempt(state, &Options::default()) else {
        panic!("it serves, and should not: {words:?}");
    };
    assert_eq!(status.code(), Some(code), "{output}");
    for word in words {
        assert!(output.contains(word), "{word:?} is not in: {output}");
    }
    assert!(!output.contains("panicked"), "{output}");
}

/// What `polykey store status` says.
fn status(server: &Server) -> Value {
    let (code, out, err) = server.cli(&["-o", "json", "store", "status"]);
    assert_eq!(code, 0, "{out}{err}");
    serde_json::from_str(&out).unwrap()
}

/// A number that the anchor claims.
fn claimed(medium: &Path, name: &str) -> u64 {
    let text = fs::read_to_string(medium.join("polykey.anchor")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap().parse().unwrap()
}

async fn health(client: &Client) -> String {
    let told = client.call("HealthCheck", json!({})).await.unwrap();
    told["status"].as_str().unwrap().to_owned()
}

async fn accepted(server: &Server, why: &str) {
    let admin = server.admin().await;
    let events = admin.call("ListAuditEvents", json!({"page_size": 50})).await.unwrap();
    let events = events["events"].as_array().unwrap().clone();
    let found = events.iter().find(|event| event["action"] == "AcceptRollback").unwrap();
    assert!(found.to_string().contains(why), "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_is_refused_by_its_anchor_and_served_only_when_that_is_accepted() {
    let medium = tempfile::tempdir().unwrap();
    let server = anchored(medium.path());
    accepted(&server, "missing").await;
    let state = server.state.clone();
    let store = state.join("polykey.redb");
    let key = server.admin().await.create(json!({"description": "revoked later"})).await;
    let _directory = server.stop().2;
    let old = fs::read(&store).unwrap();
    let older = claimed(medium.path(), "revision");

    let server = Server::attempt(&state, &Options::default()).unwrap();
    let admin = server.admin().await;
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    let told = status(&server);
    let at = told["anchor"]["revision"].as_u64().unwrap();
    assert!(at > older && at <= told["revision"].as_u64().unwrap(), "{told}");
    assert!(told["anchor"]["trouble"].is_null(), "{told}");
    server.stop();
    let newer = claimed(medium.path(), "revision");
    let new = fs::read(&store).unwrap();

    fs::write(&store, &old).unwrap();
    let both = [format!("revision {older} "), format!("revision {newer} ")];
    for _ in 0..2 {
        refused(&state, 7, &["older than what node", &both[0], &both[1], "--accept-rollback"]);
    }
    // The newest store is served as before, and so is the old one if that is meant.
    fs::write(&store, &new).unwrap();
    Server::attempt(&state, &Options::default()).unwrap().stop();
    fs::write(&store, &old).unwrap();
    let server = Server::attempt(&state, &accepting()).unwrap();
    accepted(&server, "older").await;
    let sealed = json!({"key_id": key, "plaintext": "aGVsbG8="});
    server.admin().await.call("Encrypt", sealed).await.unwrap();
    server.stop();
    Server::attempt(&state, &Options::default()).unwrap().stop();
    // From now on it is the other one that does not belong.
    fs::write(&store, &new).unwrap();
    let Err(ended) = Server::attempt(&state, &Options::default()) else { panic!("it serves") };
    assert_eq!(ended.status.code(), Some(7), "{}", ended.output);
}

/// Where the store's own disk and every file system can be put back, a token cannot.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_is_refused_by_the_anchor_in_a_token() {
    let token = SoftHsm::new();
    let section = "\n[anchor]\nwrapper = \"hsm\"\n".to_owned() + &token.section("wrappers.hsm");
    let server = Server::dev_configured_with(&accepting(), |text| text + &section);
    accepted(&server, "missing").await;
    let state = server.state.clone();
    let store = state.join("polykey.redb");
    let key = server.admin().await.create(json!({})).await;
    let _directory = server.stop().2;
    let old = fs::read(&store).unwrap();

    let server = Server::attempt(&state, &Options::default()).unwrap();
    let admin = server.admin().await;
    let before = status(&server)["revision"].as_u64().unwrap();
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    let told = status(&server);
    let place = "`polykey-anchor` in the token of [wrappers.hsm]";
    assert_eq!(told["anchor"]["file"], place, "{told}");
    assert!(told["anchor"]["revision"].as_u64().unwrap() > before, "{told}");
    // One object of the token, however often it changed.
    assert_eq!(token.objects(), 1);
    // While the token is away a revocation is not held up for long, and health says what is missing.
    token.pull();
    let key = admin.create(json!({})).await;
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    let trouble = status(&server)["anchor"]["trouble"].clone();
    assert!(trouble.is_string(), "{trouble}");
    token.insert();
    let until = std::time::Instant::now() + PATIENCE;
    while !status(&server)["anchor"]["trouble"].is_null() {
        assert!(std::time::Instant::now() < until, "the anchor is not written again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    server.stop();
    let new = fs::read(&store).unwrap();

    fs::write(&store, &old).unwrap();
    refused(&state, 7, &["older than what node", place, "--accept-rollback"]);
    // Without the token nothing is known of the newest store either: another start may find it.
    fs::write(&store, &new).unwrap();
    token.pull();
    refused(&state, 6, &[place, "cannot be read", "hsm list"]);
    token.insert();
    Server::attempt(&state, &Options::default()).unwrap().stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_went_on_elsewhere_is_refused_however_long_it_is() {
    let medium = tempfile::tempdir().unwrap();
    let server = anchored(medium.path());
    let state = server.state.clone();
    let (store, config) = (state.join("polykey.redb"), state.join("polykey.toml"));
    let _directory = server.stop().2;
    let before = fs::read(&store).unwrap();
    let server = Server::attempt(&state, &Options::default()).unwrap();
    server.admin().await.create(json!({"description": "here"})).await;
    server.stop();
    let leaves = claimed(medium.path(), "leaves");
    // The same node without its anchor, from the older copy on.
    let with = fs::read_to_string(&config).unwrap();
    fs::write(&config, with.split("\n[anchor]").next().unwrap()).unwrap();
    fs::write(&store, before).unwrap();
    let server = Server::attempt(&state, &Options::default()).unwrap();
    let admin = server.admin().await;
    while status(&server)["audit_leaves"].as_u64().unwrap() < leaves + 40 {
        admin.create(json!({"description": "there"})).await;
    }
    assert!(status(&server)["anchor"].is_null());
    server.stop();
    fs::write(&config, with).unwrap();
    refused(&state, 7, &["another history", "served elsewhere", "--accept-rollback"]);
    let server = Server::attempt(&state, &accepting()).unwrap();
    accepted(&server, "forked").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_anchor_that_is_missing_damaged_or_of_another_node_vouches_for_nothing() {
    let medium = tempfile::tempdir().unwrap();
    let place = medium.path().join("polykey.anchor");
    let server = anchored(medium.path());
    let state = server.state.clone();
    let config = state.join("polykey.toml").display().to_string();
    let _directory = server.stop().2;
    let (code, said) = polykey(&["check", "--config", &config]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("anchor: ") && said.contains("stands at revision"), "{said}");
    let good = fs::read_to_string(&place).unwrap();

    fs::remove_file(&place).unwrap();
    refused(&state, 2, &["there is no anchor at", "--accept-rollback"]);
    let (code, said) = polykey(&["check", "--config", &config]);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("WRONG  anchor: there is no anchor at"), "{said}");
    fs::write(&place, good.replace("leaves ", "leaves 1")).unwrap();
    refused(&state, 7, &["is damaged, or was not written by this node", "--accept-rollback"]);
    let lowered: String =
        good.lines()
            .map(|line| {
                if line.starts_with("counter ") {
                    "counter 1\n".into()
                } else {
                    format!("{line}\n")
                }
            })
            .collect();
    fs::write(&place, lowered).unwrap();
    refused(&state, 7, &["does not authenticate"]);
    fs::remove_file(&place).unwrap();
    fs::create_dir(&place).unwrap();
    refused(&state, 1, &["cannot be read"]);
    fs::remove_dir(&place).unwrap();

    let other_medium = tempfile::tempdir().unwrap();
    let other = anchored(other_medium.path());
    let _other = other.stop().2;
    fs::copy(other_medium.path().join("polykey.anchor"), &place).unwrap();
    refused(&state, 2, &["is of node", "the store is of node", "Correct [anchor]"]);

    // A store that is gone is not made anew where an anchor tells of it.
    fs::write(&place, &good).unwrap();
    let aside = state.join("aside");
    fs::rename(state.join("polykey.redb"), &aside).unwrap();
    refused(&state, 5, &["and there is no store", "Restore the newest backup"]);
    assert!(!state.join("polykey.redb").exists());
    fs::rename(&aside, state.join("polykey.redb")).unwrap();
    let server = Server::attempt(&state, &Options::default()).unwrap();

    // A medium that is away stops nothing, is told, and is written again when it is back.
    let key = server.admin().await.create(json!({"description": "revoked unanchored"})).await;
    let away = medium.path().with_extension("away");
    fs::rename(medium.path(), &away).unwrap();
    let admin = server.admin().await;
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    assert_eq!(health(&admin).await, "HEALTH_STATUS_DEGRADED");
    assert!(status(&server)["anchor"]["trouble"].is_string());
    let (code, out, _) = server.cli(&["store", "status"]);
    assert!(code == 0 && out.contains("CANNOT BE WRITTEN"), "{out}");
    fs::rename(&away, medium.path()).unwrap();
    let began = std::time::Instant::now();
    while health(&admin).await != "HEALTH_STATUS_HEALTHY" {
        assert!(began.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(
        claimed(medium.path(), "revision")
            >= status(&server)["anchor"]["revision"].as_u64().unwrap()
    );

    let (code, said) = polykey(&["serve", "--config", "/dev/null", "--accept-rollback"]);
    assert_eq!(code, 2, "{said}");
    let plain = Server::dev();
    let config = plain.state.join("polykey.toml").display().to_string();
    let (code, said) = polykey(&["serve", "--config", &config, "--accept-rollback"]);
    assert!(code == 2 && said.contains("no [anchor]"), "{code} {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_never_leaves_an_anchor_ahead_of_the_store_or_behind_an_answered_revocation() {
    let medium = tempfile::tempdir().unwrap();
    let seed = u64::from_be_bytes(polykey_hsm::random::array::<8>().unwrap());
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let mut server = anchored(medium.path());
    let mut answered = 0;
    for n in 0..KILLS {
        let admin = Arc::new(server.admin().await);
        let load: Vec<_> = (0..3)
            .map(|_| {
                let admin = Arc::clone(&admin);
                tokio::spawn(async move {
                    let mut last = 0;
                    loop {
                        let created =
                            admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await;
                        let Ok(created) = created else { return last };
                        let key = created["key_id"].as_str().unwrap().to_owned();
                        let disable = json!({"key_id": key});
                        let Ok(disabled) = admin.call("DisableKey", disable).await else {
                            return last;
                        };
                        let index = disabled["audit_index"].as_u64().unwrap();
                        last = std::cmp::max(last, index);
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(rng.below(400) as u64)).await;
        // Nothing is accepted: an anchor ahead of the store would end the next start.
        server = tokio::task::block_in_place(|| {
            let pid = rustix::process::Pid::from_raw(server.pid().cast_signed()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
            let mut last = 0_u64;
            for task in load {
                last = last.max(futures::executor::block_on(task).unwrap());
            }
            answered += usize::from(last > 0);
            let leaves = claimed(medium.path(), "leaves");
            assert!(leaves > last, "{n}: leaf {last} is answered, the anchor has {leaves}");
            server.restart(true, &Options::default())
        });
    }
    assert!(answered > 0, "nothing was disabled before a kill");
    let (code, out, err) = server.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
}

fn backup(server: &Server, path: &Path) -> String {
    let path = path.display().to_string();
    let (code, out, err) = server.cli(&["-o", "json", "backup", "create", "--out", &path]);
    assert_eq!(code, 0, "{out}{err}");
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn restoring_an_older_file_is_refused_by_the_anchor() {
    let medium = tempfile::tempdir().unwrap();
    let server = anchored(medium.path());
    let state = server.state.clone();
    let config = state.join("polykey.toml").display().to_string();
    let admin = server.admin().await;
    let key = admin.create(json!({"description": "revoked later"})).await;
    let from = backup(&server, &medium.path().join("backup"));
    let revision = status(&server)["revision"].as_u64().unwrap();
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    let _directory = server.stop().2;
    let (store, gone) = (state.join("polykey.redb"), state.join("gone"));
    fs::rename(&store, &gone).unwrap();
    let restore = ["restore", "--config", &config, "--from", &from];
    let (code, said) = polykey(&restore);
    assert_eq!(code, 7, "{said}");
    let newer = claimed(medium.path(), "revision");
    assert!(newer > revision, "{newer} {revision}");
    for word in ["older than what node", &format!("revision {newer} "), "--accept-rollback"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    let found = said.split("it stands at revision ").nth(1).unwrap();
    let found: u64 = found.split(' ').next().unwrap().parse().unwrap();
    assert!(found > 3 && found <= revision, "{found} {revision}: {said}");
    let left: Vec<PathBuf> = fs::read_dir(&state)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.display().to_string().contains("redb"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // It is still of the newest state: the refusal has not touched it.
    assert_eq!(claimed(medium.path(), "revision"), newer);

    let (code, said) = polykey(&[&restore[..], &["--accept-rollback"]].concat());
    assert_eq!(code, 0, "{said}");
    let server = Server::attempt(&state, &Options::default()).unwrap();
    accepted(&server, "older").await;
    server.stop();
    // The store that was restored is the node's now: that from before has another history.
    fs::rename(&store, state.join("restored")).unwrap();
    fs::rename(&gone, &store).unwrap();
    let Err(ended) = Server::attempt(&state, &Options::default()) else { panic!("it serves") };
    assert_eq!(ended.status.code(), Some(7), "{}", ended.output);
    // On a machine where nothing is known, a backup is what there is; it is anchored.
    fs::remove_file(&store).unwrap();
    fs::remove_file(medium.path().join("polykey.anchor")).unwrap();
    let (code, said) = polykey(&restore);
    assert_eq!(code, 0, "{said}");
    assert!(claimed(medium.path(), "leaves") > 0);
    Server::attempt(&state, &Options::default()).unwrap().stop();
}
