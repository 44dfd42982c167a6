//! `polykey store compact`: smaller, the same records, and whole after a kill at any moment.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use polykey_storage::conformance::Rng;
use serde_json::{Value, json};

use crate::common::{Options, POLYKEY, Server};

const KILLS: usize = 15;

fn compact(store: &str) -> (i32, String) {
    let output = Command::new(POLYKEY)
        .args(["-o", "json", "store", "compact", "--store", store])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_at_rest_is_compacted_and_is_whole_after_kills() {
    let server = Server::dev();
    let state = server.state.clone();
    let store = state.join("polykey.redb").display().to_string();
    let admin = server.admin().await;
    let mut keys = Vec::new();
    for n in 0..60 {
        keys.push(admin.create(json!({"description": format!("{n} {}", "d".repeat(180))})).await);
    }
    let (code, said) = compact(&store);
    assert_eq!(code, 5, "{said}");
    let _directory = server.stop().2;
    let whole = fs::read(&store).unwrap();

    let seed = u64::from_be_bytes(polykey_hsm::random::array::<8>().unwrap());
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let mut cut_short = 0;
    for n in 0..KILLS {
        fs::write(&store, &whole).unwrap();
        let mut child = Command::new(POLYKEY)
            .args(["store", "compact", "--store", &store])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::sleep(Duration::from_micros(rng.below(60_000) as u64)).await;
        child.kill().unwrap();
        cut_short += usize::from(!child.wait().unwrap().success());
        let options = polykey_storage::redb::Options::default();
        let opened = polykey_storage::redb::Redb::open(&store, options);
        drop(opened.unwrap_or_else(|error| panic!("{n}: {error}")));
    }
    assert!(cut_short > 0, "every compaction came to its end before its kill");
    let (code, said) = compact(&store);
    assert_eq!(code, 0, "{said}");
    let done: Value = serde_json::from_str(&said).unwrap();
    let (before, after) = (&done["bytes_before"], &done["bytes_after"]);
    assert!(after.as_u64() < before.as_u64(), "{done}");
    assert_eq!(after.as_u64().unwrap(), fs::metadata(&store).unwrap().len());

    let server = Server::attempt(&state, &Options::default()).unwrap();
    let admin = server.admin().await;
    for key in keys {
        admin.call("Encrypt", json!({"key_id": key, "plaintext": "aGVsbG8="})).await.unwrap();
    }
    let (code, out, err) = server.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, said) = compact("postgres://db/keys");
    assert!(code == 2 && said.contains("VACUUM"), "{said}");
    let (code, said) = compact(&state.join("none").display().to_string());
    assert_eq!(code, 2, "{said}");
}
