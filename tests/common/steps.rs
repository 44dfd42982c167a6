//! Steps that several tests of one node take.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::Client;
use super::{Ended, Options, PATIENCE, Server};

/// "meet me", in base64.
pub(crate) const TEXT: &str = "bWVldCBtZQ==";

/// What `polykey -o json ARGS` prints; it must succeed.
#[track_caller]
pub(crate) fn cli(server: &Server, args: &[&str]) -> Value {
    let mut all = vec!["-o", "json"];
    all.extend(args);
    let (code, out, err) = server.cli(&all);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    serde_json::from_str(&out).unwrap()
}

/// The node again, with what is in its directory now.
pub(crate) fn serve(state: &Path, options: &Options) -> Result<Server, Ended> {
    Server::serve(state, &state.join("polykey.toml").display().to_string(), options)
}

/// A file with a secret, in the directory of a node.
pub(crate) fn secret(state: &Path, name: &str, text: &str) -> PathBuf {
    let path = state.join(name);
    polykey::pki::write_file(&path, text.as_bytes(), 0o600).unwrap();
    path
}

/// Encrypts [`TEXT`].
pub(crate) async fn seal(client: &Client, key: &str) -> Value {
    let body = json!({"key_id": key, "plaintext": TEXT});
    client.call("Encrypt", body).await.unwrap()["ciphertext"].clone()
}

/// Decrypts it again.
pub(crate) async fn opens(client: &Client, sealed: &Value) {
    let opened = client.call("Decrypt", json!({"ciphertext": sealed})).await.unwrap();
    assert_eq!(opened["plaintext"], TEXT);
}

/// Waits until the node says so of its health.
pub(crate) async fn until(client: &Client, status: &str) {
    let begun = Instant::now();
    loop {
        let answer = client.call("PolykeyService/HealthCheck", json!({})).await.unwrap();
        if answer["status"] == status {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "still {}", answer["status"]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the server has written this.
pub(crate) async fn says(server: &Server, text: &str) {
    let begun = Instant::now();
    while !server.output().contains(text) {
        assert!(begun.elapsed() < PATIENCE, "{text} is not said");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
