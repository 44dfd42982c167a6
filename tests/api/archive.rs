//! Old leaves of the audit log go into archives, by command and by themselves, and everything can still be
//! proved; values that may not stand in the log are found by their hashes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use data_encoding::BASE64;
use serde_json::{Value, json};
use tonic::Code;

use crate::common::client::refused;
use crate::common::{Options, PATIENCE, Server};

/// The standalone verifier: whether it is content, and what it said.
fn python(args: &[&str]) -> (bool, String) {
    let python = std::env::var("POLYKEY_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/verify-audit.py");
    let output = std::process::Command::new(python).arg(script).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn ok(server: &Server, args: &[&str]) -> Value {
    let all = [&["-o", "json"], args].concat();
    let (code, out, err) = server.cli(&all);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    serde_json::from_str(&out).unwrap()
}

/// A node whose configuration, once made, was given a section, and whose directory was prepared.
fn prepared(section: &str, prepare: impl FnOnce(&Path)) -> Server {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let state = directory.as_ref().unwrap().path().join("state");
    let path = state.join("polykey.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text + section).unwrap();
    prepare(&state);
    Server::dev_in(&state, &Options::default(), directory)
}

/// Leaves and events of the files, as a reader of the files finds them.
fn holds(files: &[PathBuf], word: &str) -> (u64, usize) {
    let (mut next, mut found) = (0, 0);
    for file in files {
        for line in std::fs::read_to_string(file).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            if let Some(leaf) = line["leaf"].as_u64() {
                assert_eq!(leaf, next, "{}", file.display());
                next += 1;
                let data = BASE64.decode(line["data"].as_str().unwrap().as_bytes()).unwrap();
                found += data.windows(word.len()).filter(|w| *w == word.as_bytes()).count();
            }
        }
    }
    (next, found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_archived_by_command_verifies_alone_and_with_what_follows() {
    let mut server = Server::dev();
    let admin = server.admin().await;
    let at = |name: &str| server.state.join(name).display().to_string();
    let (one, two, rest, older) = (at("one"), at("two"), at("rest"), at("older.json"));
    for _ in 0..30 {
        admin.create(json!({})).await;
    }
    let kept = ok(&server, &["audit", "checkpoint"]);
    std::fs::write(&older, kept.to_string()).unwrap();
    let (size, key) = (kept["tree_size"].as_u64().unwrap(), kept["public_key"].as_str().unwrap());
    for _ in 0..20 {
        admin.create(json!({})).await;
    }
    ok(&server, &["audit", "checkpoint"]);

    // With fewer leaves than the first checkpoint covers it says how many it takes.
    let (code, _, err) = server.cli(&["audit", "archive", "--to", &one, "--leaves", "1"]);
    let least = err.split("must be at least ").nth(1).and_then(|rest| rest.split(':').next());
    let least = least.unwrap_or_else(|| panic!("{err}")).parse::<u64>().unwrap();
    assert!(code == 2 && err.contains("--leaves 1: ") && (2..=size).contains(&least), "{err}");
    let fewer = (least - 1).to_string();
    assert_eq!(server.cli(&["audit", "archive", "--to", &one, "--leaves", &fewer]).0, 2);
    let first = ok(&server, &["audit", "archive", "--to", &one, "--leaves", &size.to_string()]);
    assert_eq!((&first["first_leaf"], &first["end_leaf"]), (&json!(0), &json!(size)));
    assert_eq!(first["root_hash"], kept["root_hash"]);
    let (code, _, err) = server.cli(&["audit", "archive", "--to", &one]);
    assert!(code != 0 && err.contains("there is something already"), "{err}");
    // A file that is not the log's is no reason to take anything out.
    let root = BASE64.encode(&[7; 32]);
    let false_claim = json!({"archive": {"first_index": size, "end_index": size + 1, "file": "f",
        "sha256": root, "root_hash": root}});
    refused(admin.call("ArchiveAuditLog", false_claim).await, Code::InvalidArgument);
    let second = ok(&server, &["audit", "archive", "--to", &two]);
    let end = second["end_leaf"].as_u64().unwrap();
    assert!(second["first_leaf"] == json!(size) && end > size + 20, "{second}");

    // What the list lacks, it names.
    let listed = ok(&server, &["audit", "list", "--from", "0", "--limit", "1000"]);
    let files: Vec<&str> = listed["archives"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| a["file"].as_str().unwrap())
        .collect();
    assert_eq!(files, [one.as_str(), two.as_str()]);
    let events = listed["events"].as_array().unwrap();
    assert!(events.iter().all(|event| event["index"].as_u64().unwrap() >= end));
    // Trimming is itself in the log: the first time is in the second archive by now.
    let mut trims = events.iter().filter(|event| event["action"] == "ArchiveAudit");
    assert_eq!(trims.next().unwrap()["details"]["file"], two.as_str());
    assert!(trims.next().is_none());
    let (_, _, err) = server.cli(&["audit", "list", "--limit", "1000"]);
    assert!(err.contains(&format!("leaves 0 to {}", size - 1)) && err.contains(&one), "{err}");

    for _ in 0..5 {
        admin.create(json!({})).await;
    }
    ok(&server, &["audit", "export", &rest]);
    let (leaves, created) =
        holds(&[one.clone().into(), two.clone().into(), rest.clone().into()], "CreateKey");
    assert_eq!(created, 55);
    let both: [PathBuf; 2] = [one.clone().into(), two.clone().into()];
    assert_eq!(holds(&both, "ArchiveAudit").1, 1);
    let check = |server: &Server, files: &[&str], kept: bool| {
        let mut args = vec!["audit", "verify", "--public-key", key, "--export"];
        let mut others = files.to_vec();
        others.extend(["--public-key", key]);
        args.extend(files);
        if kept {
            args.extend(["--checkpoint", &older]);
            others.extend(["--checkpoint", &older]);
        }
        let (code, out, err) = server.cli(&args);
        let (whole, said) = python(&others);
        assert_eq!(code == 0, whole, "{files:?}: {out}{err}{said}");
        whole
    };
    // Each alone, and all of them together.
    for files in [&[&*one][..], &[&*two], &[&*rest], &[&*one, &*two], &[&*one, &*two, &*rest]] {
        assert!(check(&server, files, false), "{files:?}");
    }
    assert!(check(&server, &[&one, &two, &rest], true) && check(&server, &[&one], true));
    for files in [&[&*one, &*rest][..], &[&*two, &*one], &[&*one, &*one]] {
        assert!(!check(&server, files, false), "{files:?}");
    }
    // What begins where a kept checkpoint ends names the roots of what was before, and is held to it.
    assert!(check(&server, &[&two, &rest], true));
    // Another root before the first leaf is another log.
    let text = std::fs::read_to_string(&two).unwrap();
    let from = text.find("\"subtrees\":[\"").unwrap() + 13;
    let other = if text[from..].starts_with('A') { "B" } else { "A" };
    let forged = at("forged");
    std::fs::write(&forged, format!("{}{other}{}", &text[..from], &text[from + 1..])).unwrap();
    assert!(!check(&server, &[&forged], false));

    // The server, which has the hashes, with and without the archives; and again after a kill.
    for kill in [false, true] {
        for args in [
            &["audit", "verify"][..],
            &["audit", "verify", "--archive", &one, &two, "--checkpoint", &older],
            &["store", "verify"],
        ] {
            let (code, out, err) = server.cli(args);
            assert_eq!(code, 0, "{args:?}: {out}{err}");
        }
        let now = ok(&server, &["audit", "checkpoint"])["tree_size"].as_u64().unwrap();
        assert!(now >= leaves);
        server = server.restart(kill, &Options::default());
    }
    let store = server.state.join("data/polykey.redb");
    let store = if store.exists() { store } else { find(&server.state, "redb").unwrap() };
    let (status, output, _directory) = server.stop();
    assert!(status.success(), "{output}");
    let store = store.display().to_string();
    let args = ["audit", "verify", "--store", &store, "--public-key", key, "--checkpoint", &older];
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_polykey")).args(args).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn find(directory: &Path, end: &str) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.find_map(|path| match path.is_dir() {
        true => find(&path, end),
        false => path.extension().is_some_and(|e| e == end).then_some(path),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_leaves_go_into_files_by_themselves_and_kills_lose_none() {
    let section = "\n[audit]\ncheckpoint_interval = \"1s\"\nkeep = \"3s\"\narchive = \"archive\"\n";
    let mut server = prepared(section, |state| {
        std::fs::create_dir_all(state.join("archive/.archive.partial")).unwrap();
    });
    let directory = server.state.join("archive");
    let mut created = 0;
    // Where a file cannot be written nothing is archived, and health says so.
    server.says("the audit log cannot be archived", 1).await;
    std::fs::remove_dir(directory.join(".archive.partial")).unwrap();
    let files = || {
        let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
            .collect();
        files.sort();
        files
    };
    let begun = Instant::now();
    let mut kills = 0_u64;
    while files().len() < 4 {
        assert!(begun.elapsed() < PATIENCE * 4, "{}", server.output());
        let admin = server.admin().await;
        let until = Instant::now() + Duration::from_millis(700 + 977 * (kills % 4));
        while Instant::now() < until {
            admin.create(json!({})).await;
            created += 1;
        }
        kills += 1;
        server = server.restart(true, &Options::default());
    }
    for args in [["audit", "verify"], ["store", "verify"]] {
        let (code, out, err) = server.cli(&args);
        assert_eq!(code, 0, "{args:?}: {out}{err}");
    }
    let key = ok(&server, &["audit", "checkpoint"])["public_key"].as_str().unwrap().to_owned();
    let rest = server.state.join("rest");
    ok(&server, &["audit", "export", &rest.display().to_string()]);
    let listed = ok(&server, &["audit", "list", "--from", "0", "--limit", "1"]);
    let end = listed["archives"].as_array().unwrap().last().unwrap()["end_leaf"].clone();
    let recorded: Vec<PathBuf> = listed["archives"]
        .as_array()
        .unwrap()
        .iter()
        .map(|archive| archive["file"].as_str().unwrap().into())
        .collect();
    // The export may have been taken after another one.
    let first_of_rest = std::fs::read_to_string(&rest).unwrap();
    let first: Value = serde_json::from_str(first_of_rest.lines().next().unwrap()).unwrap();
    let before = recorded.iter().filter(|file| {
        let name = file.file_stem().unwrap().to_str().unwrap();
        name.rsplit('-').next().unwrap().parse::<u64>().unwrap() <= first["first"].as_u64().unwrap()
    });
    let all: Vec<PathBuf> = before.cloned().chain([rest]).collect();
    assert!(end.as_u64().unwrap() > 0);
    let (_, found) = holds(&all, "CreateKey");
    assert!(found >= created, "{found} of {created}, after {kills} kills");
    let mut args: Vec<String> = all.iter().map(|file| file.display().to_string()).collect();
    args.extend(["--public-key".into(), key]);
    let (whole, said) = python(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(whole, "{said}");
    println!("{created} keys, {kills} kills, {} archives", recorded.len());
    let (status, output, _directory) = server.stop();
    assert!(status.success(), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_made_after_the_start_is_told_to_need_another() {
    let away = tempfile::tempdir().unwrap();
    let directory = away.path().join("archive");
    let section = format!(
        "\n[audit]\ncheckpoint_interval = \"1s\"\nkeep = \"1s\"\narchive = \"{}\"\n",
        directory.display()
    );
    let server = prepared(&section, |_| {});
    server.says("It must be there before the node starts", 1).await;
    std::fs::create_dir(&directory).unwrap();
    let work = || {
        let jobs = ok(&server, &["jobs"]);
        let all = jobs["work"].as_array().unwrap().clone();
        all.into_iter().find(|work| work["name"] == "archive").unwrap()
    };
    let begun = Instant::now();
    let refused = |work: &Value| work["last_error"].as_str().unwrap_or_default().contains("denied");
    while !refused(&work()) {
        assert!(begun.elapsed() < PATIENCE, "{}", work());
    }
    let failed = work();
    let why = failed["last_error"].as_str().unwrap();
    assert!(why.contains("restart the node"), "{failed}");
    assert!(failed["failed"].as_u64() > Some(0) && failed["next_due_at"].is_string(), "{failed}");
    let server = server.restart(false, &Options::default());
    let begun = Instant::now();
    while !std::fs::read_dir(&directory).unwrap().any(|entry| {
        entry.unwrap().path().extension().is_some_and(|extension| extension == "jsonl")
    }) {
        assert!(begun.elapsed() < PATIENCE, "{}", server.output());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_archived_that_a_sink_has_not_had() {
    let sink = "\n[audit.sinks.disk]\nkind = \"file\"\npath = \"later/audit.jsonl\"\n";
    let server = prepared(sink, |state| {
        std::fs::create_dir_all(state.join("later/audit.jsonl")).unwrap();
    });
    let admin = server.admin().await;
    for _ in 0..10 {
        admin.create(json!({})).await;
    }
    let size = ok(&server, &["audit", "checkpoint"])["tree_size"].as_u64().unwrap();
    let file = server.state.join("archive").display().to_string();
    let (code, _, err) = server.cli(&["audit", "archive", "--to", &file]);
    assert!(code != 0 && err.contains("nothing that may be archived"), "{err}");
    assert!(!Path::new(&file).exists());
    std::fs::remove_dir(server.state.join("later/audit.jsonl")).unwrap();
    let begun = Instant::now();
    loop {
        let (code, _, err) = server.cli(&["audit", "archive", "--to", &file]);
        if code == 0 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{err}");
    }
    // The sink has all of it, though the store has not.
    let copied = std::fs::read_to_string(server.state.join("later/audit.jsonl")).unwrap();
    let leaves = copied.lines().filter(|line| line.starts_with("{\"leaf\":")).count() as u64;
    assert!(leaves >= size, "{leaves} of {size}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_logins_of_a_key_that_has_leaked_are_found_by_its_hash_and_by_nothing_else() {
    let server = Server::dev();
    let admin = server.admin().await;
    let leaked = server.client(&admin, "leaked", &["user"]).await;
    let file = server.state.join("value");
    std::fs::write(&file, format!("{}\n", leaked.api_key)).unwrap();
    let file = file.display().to_string();
    let hash = ok(&server, &["audit", "hash", "--value-file", &file]);
    let hash = hash["hash"].as_str().unwrap();
    assert!(hash.starts_with("hmac:") && hash.len() == 37, "{hash}");
    let listed = ok(&server, &["audit", "list", "--value-hash", hash, "--action", "Authenticate"]);
    let events = listed["events"].as_array().unwrap();
    assert_eq!(events.len(), 1, "{events:#?}");
    assert_eq!(events[0]["details"]["api_key"], hash);
    assert!(events[0].to_string().contains("\"leaked\""), "{events:#?}");
    let all = ok(&server, &["audit", "list", "--limit", "1000"]).to_string();
    assert!(!all.contains(&leaked.api_key) && !server.output().contains(&leaked.api_key));
    // That somebody asked is in the log, with what he asked for; and he cannot ask for long.
    let asked = ok(&server, &["audit", "list", "--action", "HashAuditValue"]);
    assert_eq!(asked["events"][0]["details"]["hash"], hash);
    let guess = |n: i32| {
        admin.call("HashAuditValue", json!({"value": BASE64.encode(n.to_string().as_bytes())}))
    };
    let mut answered = 0;
    let last = loop {
        match guess(answered).await {
            Ok(_) => answered += 1,
            Err(fail) => break fail,
        }
        assert!(answered <= 10);
    };
    assert_eq!(last.code, Code::ResourceExhausted);
    refused(admin.call("HashAuditValue", json!({})).await, Code::InvalidArgument);
}

/// An export with the note of its checkpoints changed.
fn changed(file: &Path, change: impl Fn(&str) -> String) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    let line =
        |line: &str| match serde_json::from_str::<Value>(line).unwrap()["checkpoint"].as_str() {
            Some(note) => json!({"checkpoint": change(note)}).to_string() + "\n",
            None => format!("{line}\n"),
        };
    text.lines().map(line).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoints_have_two_signatures_where_that_is_configured() {
    let server = Server::dev();
    let older = server.state.join("older.json").display().to_string();
    server.admin().await.create(json!({})).await;
    let first = ok(&server, &["audit", "checkpoint"]);
    assert!(first.get("ml_dsa_public_key").is_none(), "{first}");
    std::fs::write(&older, first.to_string()).unwrap();
    let path = server.state.join("polykey.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let section = "\n[audit]\ncheckpoint_signatures = [\"ed25519\", \"ml-dsa-65\"]\n";
    std::fs::write(&path, text + section).unwrap();
    let server = server.restart(false, &Options::default());
    server.admin().await.create(json!({})).await;
    let newer = ok(&server, &["audit", "checkpoint"]);
    let word = |name: &str| newer[name].as_str().unwrap().to_owned();
    let (key, second) = (word("public_key"), word("ml_dsa_public_key"));
    assert_eq!(BASE64.decode(second.as_bytes()).unwrap().len(), 1952);
    assert_eq!(
        (word("note").matches('\u{2014}').count(), &key),
        (2, &first["public_key"].as_str().unwrap().to_owned())
    );
    let file = server.state.join("export");
    let export = file.display().to_string();
    ok(&server, &["audit", "export", &export]);
    let keys = server.state.join("ml-dsa.pub").display().to_string();
    std::fs::write(&keys, format!("{second}\n")).unwrap();

    let both = ["--public-key", &key, "--public-key", &keys];
    let verify = |args: &[&str]| server.cli(&[&["audit", "verify"], args].concat());
    for (args, second) in [
        (&[&["--export", &*export][..], &both, &["--checkpoint", &older]].concat()[..], true),
        (&["--export", &export, "--public-key", &key], false),
        (&both, true),
        (&[], false),
    ] {
        let (code, out, err) = verify(args);
        assert_eq!(code, 0, "{args:?}: {out}{err}");
        let line = out.lines().find(|line| line.starts_with("ML-DSA-65 "));
        let line = line.unwrap_or_else(|| panic!("{args:?}: {out}"));
        assert_eq!(!line.contains("not checked"), second, "{args:?}: {line}");
    }
    // A key that is not the log's is told from damage.
    let other = BASE64.encode(&[7; 32]);
    for args in [&["--export", &*export, "--public-key", &other][..], &["--public-key", &other]] {
        let (code, out, _) = verify(args);
        assert!(code == 7 && !out.contains("DAMAGED"), "{args:?}: {out}");
        assert!(out.contains("not the one that signed"), "{args:?}: {out}");
        assert!(out.contains("`polykey audit checkpoint`"), "{args:?}: {out}");
    }
    // One without the second signature holds, and vouches for nothing where that is asked for.
    let (_, out, _) =
        verify(&[&["--export", &*export][..], &both, &["--checkpoint", &older]].concat());
    assert!(out.contains("1 checkpoints have no signature of a given ML-DSA key"), "{out}");
    let (whole, said) = python(&[&export, "--public-key", &key, "--checkpoint", &older]);
    assert!(whole && said.contains("is of ML-DSA-65: not checked here"), "{said}");

    let single = |note: &str| note[..note.rfind('\u{2014}').unwrap()].to_owned();
    let forged = |note: &str| {
        let at = note.len() - 100;
        let other = if note[at..].starts_with('A') { "B" } else { "A" };
        format!("{}{other}{}", &note[..at], &note[at + 1..])
    };
    let stripped = server.state.join("stripped").display().to_string();
    std::fs::write(&stripped, changed(&file, single)).unwrap();
    let broken = server.state.join("broken").display().to_string();
    std::fs::write(&broken, changed(&file, forged)).unwrap();
    for (file, ed25519_is_enough, said) in
        [(&stripped, true, "vouch for nothing"), (&broken, true, "is not its key's")]
    {
        let (code, out, err) = verify(&["--export", file, "--public-key", &key]);
        assert_eq!(code == 0, ed25519_is_enough, "{out}{err}");
        let (code, out, err) = verify(&[&["--export", &**file][..], &both].concat());
        assert!(code != 0 && out.contains(said), "{file}: {out}{err}");
    }
    // The key stays the same.
    let server = server.restart(true, &Options::default());
    assert_eq!(ok(&server, &["audit", "checkpoint"])["ml_dsa_public_key"], second.as_str());
}
