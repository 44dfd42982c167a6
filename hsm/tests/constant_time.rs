//! Comparisons with secrets take the same way whatever the secret is.
//!
//! Memcheck follows values that it calls undefined and reports each branch and each address that depends on one (as
//! ctgrind does it: Langley, 2010). Here the undefined values are the secrets. This test runs its own binary under
//! valgrind; what a report may show is the outcome of a comparison and nothing else.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::Command;

use polykey_hsm::work::{Binding, STREAM_HEADER_LEN, WorkError, WorkingKey};
use polykey_hsm::{Algorithm, KeyMaterial, Purpose};

const CASE: &str = "POLYKEY_CONSTANT_TIME_CASE";

/// The functions, by a part of their names, in which the outcome of a comparison decides how to go on: one bit, in
/// one place each.
const OUTCOMES: [&str; 5] = [
    // Commitments and MACs: the one place of this crate.
    "work::compare::decide",
    // Tags: what is done with the result of `CRYPTO_memcmp` (aws-lc).
    "aead_aes_gcm_open_gather_impl",
    "aead_aes_gcm_siv_asm_open_gather",
    "aead_aes_gcm_siv_open_gather",
    "chacha20_poly1305_open_gather",
];

/// Assertions, in unoptimised builds, that a `Choice` is 0 or 1.
const ASSERTIONS: &str = "subtle::";

const BINDING: Binding<'static> =
    Binding { key_id: [1; 16], version: 1, context: b"context", aad: b"aad" };

const CIPHERS: [Algorithm; 6] = [
    Algorithm::Aes256,
    Algorithm::Aes128,
    Algorithm::Aes256Gcm,
    Algorithm::Aes128Gcm,
    Algorithm::ChaCha20Poly1305,
    Algorithm::XChaCha20Poly1305,
];

/// Tells memcheck that these bytes are secret; a no-op when it is not there.
#[cfg(target_arch = "x86_64")]
fn make_secret(bytes: &[u8]) {
    const MAKE_MEM_UNDEFINED: usize = 0x4d43_0001;
    let request = [MAKE_MEM_UNDEFINED, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0];
    #[expect(unsafe_code, reason = "valgrind's client request: rotations that amount to nothing")]
    unsafe {
        std::arch::asm!(
            "rol rdi, 3", "rol rdi, 13", "rol rdi, 61", "rol rdi, 51", "xchg rbx, rbx",
            in("rax") request.as_ptr(), inout("rdx") 0_usize => _,
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn make_secret(_: &[u8]) {}

fn key(algorithm: Algorithm, purpose: Purpose, secret: bool) -> WorkingKey {
    let len = match algorithm {
        Algorithm::Aes128 | Algorithm::Aes128Gcm => 16,
        Algorithm::HmacSha384 => 48,
        Algorithm::HmacSha512 => 64,
        _ => 32,
    };
    let bytes = vec![7; len];
    if secret {
        make_secret(&bytes);
    }
    WorkingKey::new(algorithm, purpose, &KeyMaterial::from_secret(bytes).unwrap()).unwrap()
}

/// Opens and verifies what is genuine, and what is wrong at its first, its last and every byte between.
fn compare_everything() {
    for algorithm in CIPHERS {
        let blob = key(algorithm, Purpose::Encrypt, false).seal(&BINDING, b"plaintext").unwrap();
        let secret = key(algorithm, Purpose::Encrypt, true);
        assert_eq!(secret.open(&BINDING, &blob).map(drop), Ok(()));
        let wrong = [&(58..90).collect::<Vec<_>>()[..], &[90, blob.len() - 16, blob.len() - 1]];
        for at in wrong.concat() {
            let mut changed = blob.clone();
            changed[at] ^= 1;
            assert_eq!(secret.open(&BINDING, &changed).map(drop), Err(WorkError::Failed));
        }
        let clear = key(algorithm, Purpose::Encrypt, false);
        let (header, sealer) = clear.seal_stream(&BINDING, Default::default()).unwrap();
        let body = sealer.finish(b"plaintext").unwrap();
        let opened = secret.open_stream(&BINDING, &header).unwrap().finish(&body);
        assert_eq!(opened.map(drop), Ok(()));
        let mut changed = header.clone();
        changed[STREAM_HEADER_LEN - 1] ^= 1;
        assert!(secret.open_stream(&BINDING, &changed).is_err());
    }
    for algorithm in [Algorithm::HmacSha256, Algorithm::HmacSha384, Algorithm::HmacSha512] {
        let tag = key(algorithm, Purpose::Mac, false).mac(b"message").unwrap();
        let secret = key(algorithm, Purpose::Mac, true);
        assert_eq!(secret.verify_mac(b"message", &tag), Ok(true));
        for at in 0..tag.len() {
            let mut changed = tag.clone();
            changed[at] ^= 1;
            assert_eq!(secret.verify_mac(b"message", &changed), Ok(false));
        }
    }
}

/// The bug that all this is there to find: a tag compared with `==`.
#[inline(never)]
fn planted() {
    let tag = key(Algorithm::HmacSha256, Purpose::Mac, false).mac(b"message").unwrap();
    let computed = key(Algorithm::HmacSha256, Purpose::Mac, true).mac(b"message").unwrap();
    assert!(std::hint::black_box(computed) == std::hint::black_box(tag));
}

/// What valgrind runs; nothing otherwise.
#[test]
fn under_valgrind() {
    match std::env::var(CASE).as_deref() {
        Ok("compare") => compare_everything(),
        Ok("planted") => planted(),
        Ok(other) => panic!("{other}"),
        Err(_) => {}
    }
}

/// Runs a case under memcheck: the innermost functions that depend on a secret, and in how many places.
fn reports(case: &str) -> BTreeMap<String, usize> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new("valgrind")
        .args(["--tool=memcheck", "--xml=yes", "--error-limit=no", "--undef-value-errors=yes"])
        .arg(format!("--xml-file={}", file.path().display()))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "under_valgrind", "--test-threads", "1"])
        .env(CASE, case)
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{case}: {stdout}\n{shown}");
    let xml = std::fs::read_to_string(file.path()).unwrap();
    assert!(xml.contains("</valgrindoutput>"), "{shown}");
    let field = |text: &str, name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once(&format!("</{name}>"))?.0.replace("&lt;", "<").replace("&gt;", ">"))
    };
    let places: BTreeSet<(String, String)> = xml
        .split("<error>")
        .skip(1)
        .filter(|error| field(error, "kind").is_some_and(|kind| kind.starts_with("Uninit")))
        .map(|error| (field(error, "fn").unwrap_or_default(), field(error, "ip").unwrap()))
        .collect();
    let mut functions = BTreeMap::new();
    for (function, _) in places {
        *functions.entry(function).or_default() += 1;
    }
    functions
}

fn skip(reason: &str) {
    println!("skipped: {reason}");
    if let Some(path) = std::env::var_os("POLYKEY_TEST_SKIPS") {
        let mut skips = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(skips, "comparisons_show_their_outcome_alone: {reason}").unwrap();
    }
}

#[test]
fn comparisons_show_their_outcome_alone() {
    if !cfg!(target_arch = "x86_64") {
        return skip("written for x86-64");
    }
    if !cfg!(debug_assertions) {
        return skip("an optimised build moves the branches; run it unoptimised");
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        return skip("valgrind is not installed");
    }
    let outcome = |function: &str| OUTCOMES.iter().any(|part| function.contains(part));
    let admitted = |function: &str, places: usize| {
        outcome(function) && places == 1 || function.contains(ASSERTIONS)
    };
    let found = reports("compare");
    // The outcomes are seen, so the secrets were followed as far as there.
    for function in
        ["work::compare::decide", "aead_aes_gcm_open", "aes_gcm_siv", "chacha20_poly1305"]
    {
        assert!(found.keys().any(|f| f.contains(function)), "{function}: {found:#?}");
    }
    let leaks: Vec<_> = found.iter().filter(|(f, places)| !admitted(f, **places)).collect();
    assert!(leaks.is_empty(), "these depend on a secret: {leaks:#?}");
    let planted = reports("planted");
    let seen = planted.iter().any(|(f, places)| !admitted(f, *places));
    assert!(seen, "the planted comparison was not found: {planted:#?}");
    println!("{found:#?}\nplanted: {planted:#?}");
}
