//! A store moved into PostgreSQL and back: the node serves from what came back.

#[allow(dead_code, reason = "shared with the tests of the store")]
#[path = "../../storage/tests/postgres/server.rs"]
pub(crate) mod postgres;

use std::fs;

use serde_json::{Value, json};

use crate::common::{Options, POLYKEY, Server};

fn copy(args: &[&str]) -> (i32, String) {
    let output = std::process::Command::new(POLYKEY)
        .args(["-o", "json", "store", "copy"])
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_goes_into_a_database_and_comes_back_whole() {
    let server = Server::dev();
    let state = server.state.clone();
    let file = state.join("polykey.redb").display().to_string();
    let admin = server.admin().await;
    let key = admin.create(json!({"description": "kept", "alias": "kept"})).await;
    let sealed = json!({"key_id": key, "plaintext": "aGVsbG8="});
    let sealed = admin.call("Encrypt", sealed).await.unwrap()["ciphertext"].clone();

    let database = postgres::Server::start(&[]);
    let away = tempfile::tempdir().unwrap();
    let password = away.path().join("password").display().to_string();
    fs::write(&password, format!("{}\n", postgres::PASSWORD)).unwrap();
    let url = format!(
        "postgres://{}@localhost:{}/keys?sslrootcert={}",
        postgres::ROLE,
        database.port,
        database.authority().display(),
    );
    let to = ["--from", &file, "--to", &url, "--to-password", &password, "--schema", "moved"];
    // While the server has it, nobody else opens it.
    let (code, said) = copy(&to);
    assert_eq!(code, 5, "{said}");
    let directory = server.stop().2;
    let (code, said) = copy(&to);
    assert_eq!(code, 0, "{said}");
    let copied: Value = serde_json::from_str(&said).unwrap();
    assert!(copied["records"].as_u64().unwrap() > 20, "{copied}");
    assert!(!said.contains(postgres::PASSWORD));
    // Again: there is nothing left to do.
    let (code, said) = copy(&to);
    assert_eq!(code, 0, "{said}");
    // Another store does not go there.
    let other = Server::dev();
    let theirs = other.state.join("polykey.redb").display().to_string();
    let _kept = other.stop().2;
    let mut wrong = to;
    wrong[1] = &theirs;
    let (code, said) = copy(&wrong);
    assert_eq!(code, 5, "{said}");
    // A wrong password is told apart, and not shown.
    let bad = away.path().join("bad").display().to_string();
    fs::write(&bad, "swordfish").unwrap();
    let mut wrong = to;
    wrong[5] = &bad;
    let (code, said) = copy(&wrong);
    assert_ne!(code, 0, "{said}");
    assert!(said.contains("password") && !said.contains("swordfish"), "{said}");

    fs::remove_file(&file).unwrap();
    let back = ["--from", &url, "--to", &file, "--from-password", &password, "--schema", "moved"];
    let (code, said) = copy(&back);
    assert_eq!(code, 0, "{said}");
    let config = state.join("polykey.toml").display().to_string();
    let server = Server::serve(&state, &config, &Options::default())
        .unwrap_or_else(|ended| panic!("{}", ended.output));
    let admin = server.admin().await;
    let opened = admin.call("Decrypt", json!({"key_id": "alias/kept", "ciphertext": sealed})).await;
    assert_eq!(opened.unwrap()["plaintext"], "aGVsbG8=");
    let (code, out, err) = server.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
    drop(directory);
}
