//! An exported audit log is changed in thousands of ways, and docs/verify-audit.py, which depends on nothing of ours,
//! finds each one.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::Server;
use crate::support::{Random, size};

fn root(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string()
}

/// Exit code and output of a Python program.
pub(crate) fn python(args: &[String]) -> (i32, String) {
    let output = Command::new("python3").args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// The verifier of docs/.
pub(crate) fn verifier() -> String {
    root("docs/verify-audit.py")
}

/// The newest checkpoint as the command line prints it, in a file.
pub(crate) fn checkpoint(server: &Server, file: &Path) -> Value {
    let (code, out, err) = server.cli(&["-o", "json", "audit", "checkpoint"]);
    assert_eq!(code, 0, "{err}");
    std::fs::write(file, &out).unwrap();
    serde_json::from_str(&out).unwrap()
}

/// Exports the log: the leaves by their index, and the checkpoint at the end.
pub(crate) fn export(server: &Server, file: &Path) -> (Vec<String>, String) {
    let (code, _, err) = server.cli(&["audit", "export", &file.display().to_string()]);
    assert_eq!(code, 0, "{err}");
    let text = std::fs::read_to_string(file).unwrap();
    let of = |kind: &'static str| text.lines().filter(move |line| line.starts_with(kind));
    let leaves = of("{\"leaf\":").map(str::to_owned).collect();
    let note: Value = serde_json::from_str(of("{\"checkpoint\":").next_back().unwrap()).unwrap();
    (leaves, note["checkpoint"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_change_to_an_exported_log_is_found_by_the_standalone_verifier() {
    let mut random = Random::seeded("log_mutations");
    let server = Server::dev();
    let admin = server.admin().await;
    let path = |name: &str| -> PathBuf { server.state.join(name) };
    let key = admin.create(json!({})).await;
    for _ in 0..70 {
        admin.create(json!({})).await;
    }
    let older = checkpoint(&server, &path("older.json"));
    for _ in 0..20 {
        // Blocks of the data plane stand between the others.
        admin.call("GetKey", json!({"key_id": key})).await.unwrap();
        for _ in 0..4 {
            admin.create(json!({})).await;
        }
    }
    let (leaves, newer) = export(&server, &path("export"));
    assert!(leaves.len() > 150, "{}", leaves.len());
    std::fs::write(path("older.note"), older["note"].as_str().unwrap()).unwrap();
    std::fs::write(path("newer.note"), newer).unwrap();
    let public_key = older["public_key"].as_str().unwrap().to_owned();
    let text = |name: &str| path(name).display().to_string();

    // As an auditor runs it.
    let run = |export: &str, kept: &str| {
        let options =
            ["--public-key".into(), public_key.clone(), "--checkpoint".into(), text(kept)];
        python(&[&[verifier(), text(export)][..], &options].concat())
    };
    for kept in ["older.json", "newer.note"] {
        let (code, out) = run("export", kept);
        assert_eq!(code, 0, "{out}");
        assert!(out.contains("the log is whole and signed") && !out.contains("finding"), "{out}");
    }
    let whole = std::fs::read_to_string(path("export")).unwrap();
    let cut: Vec<&str> = whole.lines().take(leaves.len() / 3).collect();
    std::fs::write(path("cut"), cut.join("\n")).unwrap();
    let (code, out) = run("cut", "older.json");
    assert!(code == 1 && out.contains("the end was cut off") && out.contains("DAMAGED"), "{out}");
    let stranger = older["root_hash"].as_str().unwrap();
    let (code, out) = python(&[verifier(), text("export"), "--public-key".into(), stranger.into()]);
    assert!(code == 1 && out.contains("signed by no given key"), "{out}");
    let (code, out) = run("missing", "older.json");
    assert!(code == 2 && out.contains("No such file"), "{out}");

    let count = size("POLYKEY_LOG_MUTATIONS", 10_000, 100_000);
    let (code, out) = python(&[
        root("tests/python/audit_mutations.py"),
        verifier(),
        text("export"),
        public_key.clone(),
        text("older.note"),
        text("newer.note"),
        count.to_string(),
        (random.next() >> 1).to_string(),
    ]);
    println!("log_mutations: {out}");
    assert_eq!(code, 0, "{out}");
    assert!(
        out.contains(&format!("{count} mutations")) && out.contains("\n0 not detected"),
        "{out}"
    );
}
