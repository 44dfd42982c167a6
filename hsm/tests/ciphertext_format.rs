//! The published vectors through an independent reader: tests/python/ciphertext_format.py.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(vectors: &Path) -> Output {
    let python = std::env::var_os("POLYKEY_PYTHON")
        .map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    let remedy = "`make deps` makes it; or set POLYKEY_PYTHON to a Python with cryptography";
    assert!(python.exists(), "{} is missing: {remedy}", python.display());
    Command::new(python)
        .arg("-B")
        .arg(root().join("tests/python/ciphertext_format.py"))
        .arg(vectors)
        .output()
        .unwrap()
}

#[test]
fn another_implementation_agrees_on_the_published_vectors() {
    let published = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/ciphertext-v1.json");
    let output = read(&published);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("vectors do as they say"), "{text}");

    // The control: a vector that says something else than it does.
    let text = std::fs::read_to_string(published).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in
        [("\"opens\": false", "\"opens\": true"), ("\"opens\": true", "\"opens\": false")]
    {
        let changed = folder.path().join("changed.json");
        std::fs::write(&changed, text.replacen(from, to, 1)).unwrap();
        let output = read(&changed);
        assert!(!output.status.success());
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("AssertionError: aes-256: "), "{told}");
    }
}
