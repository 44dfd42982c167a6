//! Version floors of known advisories, and what must not be linked, asserted from Cargo.lock.

use std::collections::BTreeMap;

use super::root;

/// A crate, the lowest version that is taken, and why.
const FLOORS: &[(&str, [u64; 3], &str)] = &[
    ("redb", [4, 5, 0], "commits lost after two crashes in a row; a file that does not open"),
    ("h2", [0, 4, 16], "RUSTSEC-2026-0258: a flood of empty DATA frames"),
    ("tonic", [0, 12, 3], "RUSTSEC-2024-0376: an accept loop that ends"),
    ("rustls", [0, 23, 18], "a panic while accepting"),
    ("aws-lc-sys", [0, 39, 0], "RUSTSEC-2026-0044 and -0048: certificate checks"),
    ("aes-gcm", [0, 10, 3], "RUSTSEC-2023-0096: plaintext left behind after a failed tag"),
    ("tokio-postgres", [0, 7, 18], "RUSTSEC-2026-0178"),
    ("sqlx", [0, 8, 1], "RUSTSEC-2024-0363: protocol confusion"),
];

/// The crates that must be there: a floor on something that is not used guards nothing.
const USED: &[&str] = &["redb", "h2", "tonic", "rustls", "aws-lc-sys", "tokio-postgres"];

/// Crates that must not be there, and why. (`ring` is in the lock file as an option of others that nobody
/// takes; `.deny.toml` looks at what is linked.)
const BANNED: &[(&str, &str)] = &[
    ("openssl-sys", "one TLS and one cryptographic library: rustls over aws-lc"),
    ("native-tls", "see openssl-sys"),
    ("rsa", "RUSTSEC-2023-0071: its decryption leaks through time"),
    ("sharks", "RUSTSEC-2024-0398: biased shares"),
];

fn locked() -> BTreeMap<String, Vec<[u64; 3]>> {
    let text = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let lock: toml::Table = toml::from_str(&text).unwrap();
    let mut found: BTreeMap<String, Vec<[u64; 3]>> = BTreeMap::new();
    for package in lock["package"].as_array().unwrap() {
        let version = package["version"].as_str().unwrap();
        let release = version.split(['-', '+']).next().unwrap();
        let parts: Vec<u64> = release.split('.').map(|n| n.parse().unwrap()).collect();
        let name = package["name"].as_str().unwrap().to_owned();
        found.entry(name).or_default().push(parts.try_into().unwrap());
    }
    found
}

fn below(
    locked: &BTreeMap<String, Vec<[u64; 3]>>,
    floors: &[(&str, [u64; 3], &str)],
) -> Vec<String> {
    let mut found = Vec::new();
    for (name, floor, why) in floors {
        for version in locked.get(*name).into_iter().flatten().filter(|v| *v < floor) {
            found.push(format!("{name} {version:?} is below {floor:?}: {why}"));
        }
    }
    found
}

#[test]
fn no_dependency_is_below_the_floor_of_an_advisory() {
    let locked = locked();
    for name in USED {
        assert!(locked.contains_key(*name), "{name} is not used: take its floor out");
    }
    let found = below(&locked, FLOORS);
    assert!(found.is_empty(), "{}", found.join("\n"));
    // It does compare: a floor above everything is missed by everything.
    assert!(!below(&locked, &[("redb", [999, 0, 0], "")]).is_empty());
}

#[test]
fn nothing_that_is_banned_is_linked() {
    let locked = locked();
    let found: Vec<_> = BANNED.iter().filter(|(name, _)| locked.contains_key(*name)).collect();
    assert!(found.is_empty(), "{found:?}");
    let text = std::fs::read_to_string(root().join(".deny.toml")).unwrap();
    let deny: toml::Table = toml::from_str(&text).unwrap();
    let listed: Vec<&str> = deny["bans"]["deny"]
        .as_array()
        .unwrap()
        .iter()
        .map(|ban| ban["crate"].as_str().unwrap())
        .collect();
    for (name, _) in BANNED {
        assert!(listed.contains(name), "{name} is not banned in .deny.toml");
    }
}

#[test]
fn every_dependency_comes_from_the_registry_or_is_our_own() {
    let text = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let lock: toml::Table = toml::from_str(&text).unwrap();
    for package in lock["package"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        match package.get("source") {
            None => assert!(name.starts_with("polykey"), "{name} is a path dependency"),
            Some(source) => {
                let source = source.as_str().unwrap();
                assert!(source.starts_with("registry+"), "{name} comes from {source}");
                assert!(package.get("checksum").is_some(), "{name} has no checksum");
            }
        }
    }
}

#[test]
fn crates_are_of_one_version_and_licence() {
    let text = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = toml::from_str(&text).unwrap();
    assert_eq!(manifest["workspace"]["package"]["license"].as_str(), Some("MIT"));
    for member in manifest["workspace"]["members"].as_array().unwrap() {
        let path = root().join(member.as_str().unwrap()).join("Cargo.toml");
        let member: toml::Table = toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for field in ["version", "license", "edition", "rust-version"] {
            assert_eq!(member["package"][field]["workspace"].as_bool(), Some(true), "{field}");
        }
    }
}
