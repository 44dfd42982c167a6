//! The published Python stubs against the real binary: all 23 RPCs, in tests/python/conformance.py.

use std::path::PathBuf;

use serde_json::json;

use crate::common::Server;

/// The Python of the virtual environment, and the unzipped stubs beside it.
fn python() -> (PathBuf, PathBuf) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("POLYKEY_PYTHON")
        .map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    let stubs = std::env::var_os("POLYKEY_STUBS").map_or_else(
        || python.parent().and_then(|bin| bin.parent()).unwrap_or(&root).join("stubs"),
        PathBuf::from,
    );
    let remedy = "`make deps` makes it; or set POLYKEY_PYTHON to a Python with grpcio \
                  and protobuf and POLYKEY_STUBS to the directory that holds spounge/";
    assert!(python.exists(), "{} is missing: {remedy}", python.display());
    assert!(stubs.join("spounge").is_dir(), "{} has no spounge/: {remedy}", stubs.display());
    (python, stubs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_published_python_stubs_drive_all_23_methods() {
    let (python, stubs) = python();
    let server = Server::dev();
    let admin = server.admin().await;
    let fields = json!({"roles": ["user"], "tier": "CLIENT_TIER_PRO"});
    let user = server.stranger(&admin, "user-a", fields).await;
    let who = |client: &crate::common::client::Client| {
        json!({
            "id": client.id,
            "api_key": client.api_key,
            "certificate": client.files.certificate,
            "key": client.files.key,
        })
    };
    let settings = json!({
        "stubs": stubs,
        "address": server.address,
        "ca": admin.files.server_ca,
        "admin": who(&admin),
        "user": who(&user),
    });
    let file = server.state.parent().unwrap().join("settings.json");
    polykey::pki::write_file(&file, settings.to_string().as_bytes(), 0o600).unwrap();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/python/conformance.py");
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new(python)
            .arg("-B")
            .arg(script)
            .arg(file)
            .env("GRPC_VERBOSITY", "ERROR")
            .output()
            .unwrap()
    })
    .await
    .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    assert!(text.contains("23 of 23 methods called"), "{text}");
}
