//! `docs/algorithms.md` is what the table of algorithms says; `POLYKEY_REGENERATE=1` makes it so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fmt::Write as _;

use polykey_hsm::Algorithm;
use polykey_hsm::work::SignatureScheme;

const HEAD: &str = "\
# Algorithms

Generated from the table in `hsm/src/algorithm/table.rs`; edit that and run
`POLYKEY_REGENERATE=1 cargo test -p polykey-hsm --test reference`.

A key is made for one purpose, the first of its type unless another one is asked for, and does nothing
else. In the API a type is `KEY_TYPE_` and its name in capitals with underscores. Everything is aws-lc's
work, except HChaCha20 in XChaCha20-Poly1305 (RustCrypto), which aws-lc lacks, and the expansion of an imported
ML-KEM seed. What takes more than 100 µs of CPU runs off the threads of requests, except that large
streams are sealed and opened there, a message at a time.

| type | purposes | off those threads | what it is |
|---|---|---|---|
";

const SCHEMES: &str = "
## Signature schemes

The first that serves a type is used unless another one is asked for. ECDSA and RSA sign a message or its
digest; Ed25519 and ML-DSA a message.

| scheme | types | what it is |
|---|---|---|
";

const LIMITS: &str = "
## Limits on use

Each message and each stream is sealed under a key of its own, derived with a random salt of 256 bits, so
the limits that NIST SP 800-38D and RFC 8439 put on one AES-GCM or ChaCha20-Poly1305 key are not reached
by any number of messages: no type has a hard limit by itself. A key can be given limits of its own:
`rotate_after_uses` rotates it, `max_uses` ends the sealing of a version. They are counted per version,
in blocks that are durable before they are used: a crash can cost up to a sixteenth of the limit, and
never gives a use back.
";

fn reference() -> String {
    let mut text = HEAD.to_owned();
    for algorithm in Algorithm::ALL {
        let purposes: Vec<&str> = algorithm.purposes().iter().map(|p| p.name()).collect();
        let slow = if algorithm.is_slow() { "yes" } else { "" };
        let (name, about) = (algorithm.name(), algorithm.about());
        writeln!(text, "| `{name}` | {} | {slow} | {about} |", purposes.join(", ")).unwrap();
    }
    text += SCHEMES;
    for scheme in SignatureScheme::ALL {
        let types: Vec<String> = Algorithm::ALL
            .iter()
            .filter(|a| scheme.serves(**a))
            .map(|a| format!("`{}`", a.name()))
            .collect();
        writeln!(text, "| `{}` | {} | {} |", scheme.name(), types.join(", "), scheme.about())
            .unwrap();
    }
    text + LIMITS
}

#[test]
fn the_reference_is_the_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/algorithms.md");
    let text = reference();
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    assert!(std::fs::read_to_string(path).unwrap() == text, "docs/algorithms.md: regenerate it");
}
