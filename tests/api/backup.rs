//! Backups: of a node that serves, opened and verified, restored on a machine where nothing else is left.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::common::{Options, POLYKEY, Server};

/// Restorations of backups made under load.
const TIMES: usize = 10;

fn cli(server: &Server, args: &[&str]) -> (i32, String) {
    let mut all = vec!["-o", "json"];
    all.extend(args);
    let (code, out, err) = server.cli(&all);
    (code, out + &err)
}

fn polykey(args: &[&str]) -> (i32, String) {
    let output = std::process::Command::new(POLYKEY).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout);
    (output.status.code().unwrap(), text)
}

/// A directory with everything of a node's but its store, and with its paths in the configuration; and that.
fn without_store(state: &Path, place: &Path) -> String {
    fs::create_dir(place).unwrap();
    let text = fs::read_to_string(state.join("polykey.toml")).unwrap();
    for entry in fs::read_dir(state).unwrap().map(Result::unwrap) {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().unwrap().is_file() && !name.contains("redb") && !name.ends_with("sock")
        {
            fs::copy(entry.path(), place.join(name)).unwrap();
        }
    }
    let config = place.join("polykey.toml");
    let moved = text.replace(&state.display().to_string(), &place.display().to_string());
    fs::write(&config, moved).unwrap();
    config.display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_gives_back_every_key_that_was_acknowledged_before_it() {
    let server = Server::dev();
    let state = server.state.clone();
    let away = tempfile::tempdir().unwrap();
    let admin = Arc::new(server.admin().await);
    let stop = Arc::new(AtomicBool::new(false));
    let made = Arc::new(std::sync::Mutex::new(Vec::<(String, Value)>::new()));
    let load: Vec<_> = (0..4)
        .map(|_| {
            let (admin, stop, made) = (Arc::clone(&admin), Arc::clone(&stop), Arc::clone(&made));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let key = admin.create(json!({"description": "kept"})).await;
                    let sealed = json!({"key_id": key, "plaintext": "aGVsbG8="});
                    let sealed = admin.call("Encrypt", sealed).await.unwrap();
                    made.lock().unwrap().push((key, sealed["ciphertext"].clone()));
                }
            })
        })
        .collect();
    let mut before = Vec::new();
    for n in 0..TIMES {
        while made.lock().unwrap().len() < (n + 1) * 20 {
            tokio::task::yield_now().await;
        }
        before.push(made.lock().unwrap().clone());
        let out = away.path().join(format!("{n}.backup")).display().to_string();
        let (code, said) =
            tokio::task::block_in_place(|| cli(&server, &["backup", "create", "--out", &out]));
        assert_eq!(code, 0, "{said}");
    }
    stop.store(true, Ordering::Relaxed);
    for task in load {
        task.await.unwrap();
    }
    drop(admin);
    let directory = server.stop().2;
    for (n, kept) in before.iter().enumerate() {
        let place = away.path().join(format!("restored-{n}"));
        let config = without_store(&state, &place);
        let from = away.path().join(format!("{n}.backup")).display().to_string();
        let (code, said) = polykey(&["backup", "verify", "--config", &config, "--from", &from]);
        assert_eq!(code, 0, "{said}");
        let (code, said) = polykey(&["restore", "--config", &config, "--from", &from]);
        assert_eq!(code, 0, "{said}");
        let server = Server::serve(&place, &config, &Options::default())
            .unwrap_or_else(|ended| panic!("{}", ended.output));
        let admin = server.admin().await;
        let events = admin.call("ListAuditEvents", json!({"page_size": 20})).await.unwrap();
        let events: Vec<_> = events["events"].as_array().unwrap().iter().collect();
        assert!(events.iter().any(|event| event["action"] == "Restore"), "{n}");
        for (key, sealed) in kept {
            let request = json!({"key_id": key, "ciphertext": sealed});
            let opened = admin.call("Decrypt", request).await;
            assert_eq!(
                opened.unwrap_or_else(|e| panic!("{n} {key}: {e:?}"))["plaintext"],
                "aGVsbG8="
            );
        }
        let (code, said) = cli(&server, &["store", "verify"]);
        assert_eq!(code, 0, "{said}");
        assert!(!place.join(".polykey.redb.restoring").exists());
        server.stop();
    }
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_was_changed_or_cut_short_gives_nothing_back() {
    let server = Server::dev();
    let state = server.state.clone();
    let admin = server.admin().await;
    for _ in 0..20 {
        admin.create(json!({"description": "d".repeat(200)})).await;
    }
    let away = tempfile::tempdir().unwrap();
    let file = away.path().join("whole");
    let out = file.display().to_string();
    let (code, said) = cli(&server, &["backup", "create", "--out", &out]);
    assert_eq!(code, 0, "{said}");
    let _directory = server.stop().2;
    let whole = fs::read(&file).unwrap();
    // Nobody who has the file alone learns what is in it.
    assert!(!whole.windows(8).any(|w| w == b"dddddddd"));
    let place = away.path().join("restored");
    let config = without_store(&state, &place);
    let seed: u64 = rand_seed();
    println!("seed {seed}");
    let mut rng = polykey_storage::conformance::Rng::new(seed);
    let header = 9 + u32::from_be_bytes(whole[5..9].try_into().unwrap()) as usize;
    let mut damaged: Vec<Vec<u8>> = vec![
        Vec::new(),
        whole[..5].to_vec(),
        whole[..header].to_vec(),
        whole[..whole.len() - 1].to_vec(),
        [&whole[..], &whole[whole.len() - 40..]].concat(),
    ];
    for _ in 0..12 {
        damaged.push(whole[..rng.below(whole.len())].to_vec());
    }
    for n in 0..24 {
        // Half of them in the header, which holds the slots and the proof of the root key.
        let at = if n % 2 == 0 { 9 + rng.below(header - 9) } else { rng.below(whole.len()) };
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << rng.below(8);
        damaged.push(bytes);
    }
    for (n, bytes) in damaged.iter().enumerate() {
        let from = away.path().join("damaged");
        fs::write(&from, bytes).unwrap();
        let from = from.display().to_string();
        let (code, said) = polykey(&["restore", "--config", &config, "--from", &from]);
        assert!([2, 7].contains(&code), "{n}: {code} {said}");
        assert!(!said.contains("panicked"), "{n}: {said}");
        let left: Vec<_> = fs::read_dir(&place)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("redb"))
            .collect();
        assert!(left.is_empty(), "{n}: {left:?}");
    }
    let (code, said) = polykey(&["restore", "--config", &config, "--from", &out]);
    assert_eq!(code, 0, "{said}");
    // There is a store now, and it stays.
    let (code, said) = polykey(&["restore", "--config", &config, "--from", &out]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
}

fn rand_seed() -> u64 {
    let bytes = polykey_hsm::random::array::<8>().unwrap();
    u64::from_be_bytes(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_key_opens_a_backup_where_the_master_key_is_lost() {
    let server = Server::dev();
    let state = server.state.clone();
    let admin = server.admin().await;
    let key = admin.create(json!({"description": "kept", "alias": "kept"})).await;
    let away = tempfile::tempdir().unwrap();
    let file = |name: &str| away.path().join(name).display().to_string();
    let (kept, out) = (file("recovery"), file("backup"));
    let (code, made) = cli(&server, &["root", "recovery-key", "--out", &kept]);
    assert_eq!(code, 0, "{made}");
    let made: Value = serde_json::from_str(&made).unwrap();
    let public = made["public_key"].as_str().unwrap();
    let (code, said) = cli(&server, &["root", "slot", "add", "offline", "--recovery-key", public]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = cli(&server, &["backup", "create", "--out", &out]);
    assert_eq!(code, 0, "{said}");
    let (code, signer) = cli(&server, &["audit", "checkpoint"]);
    assert_eq!(code, 0, "{signer}");
    let signer: Value = serde_json::from_str(&signer).unwrap();
    let signer = signer["public_key"].as_str().unwrap().to_owned();
    // A stranger needs no more than the public half to make a backup that the private half opens.
    let stranger = Server::dev();
    let forged = file("forged");
    let (code, said) = cli(&stranger, &["root", "slot", "add", "off", "--recovery-key", public]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = cli(&stranger, &["backup", "create", "--out", &forged]);
    assert_eq!(code, 0, "{said}");
    stranger.stop();
    let _directory = server.stop().2;
    let place = away.path().join("restored");
    let config = without_store(&state, &place);
    fs::remove_file(place.join("master.key")).unwrap();
    let (code, said) = polykey(&["restore", "--config", &config, "--from", &out]);
    assert_eq!(code, 2, "{said}");
    // It is asked for before any work, and so is the proof.
    let with = ["restore", "--config", &config, "--from", &out, "--key", &kept];
    let (code, said) = polykey(&with);
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("--public-key"), "{said}");
    let proven = [&with[..], &["--public-key", &signer]].concat();
    let (code, said) = polykey(&proven);
    assert_eq!(code, 2, "{said}");
    let whole = [&proven[..], &["--generate-master-key"]].concat();
    let mut stranger = whole.clone();
    stranger[4] = &forged;
    let (code, said) = polykey(&stranger);
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("anybody's"), "{said}");
    assert!(fs::read_dir(&place).unwrap().all(|e| {
        let name = e.unwrap().file_name().into_string().unwrap();
        !name.contains("redb") && name != "master.key"
    }));
    // The journal of the store that stood there belongs to that one.
    fs::write(place.join("polykey.redb-journal"), "changes").unwrap();
    let (code, said) = polykey(&whole);
    assert_eq!(code, 5, "{said}");
    fs::remove_file(place.join("polykey.redb-journal")).unwrap();
    let (code, said) = polykey(&whole);
    assert_eq!(code, 0, "{said}");
    let server = Server::serve(&place, &config, &Options::default())
        .unwrap_or_else(|ended| panic!("{}", ended.output));
    let got = server.admin().await.call("GetKeyMetadata", json!({"key_id": key})).await.unwrap();
    assert_eq!(got["metadata"]["description"], "kept", "{got}");
}
