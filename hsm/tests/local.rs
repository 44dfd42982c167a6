//! The local wrapper over every source it reads, and what it refuses to read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use futures::executor::block_on;
use polykey_hsm::conformance::{self, Subject};
use polykey_hsm::{
    Deadline, KeyMaterial, KeyWrapper, LocalError, LocalWrapper, MasterKeySource, PassphraseParams,
    RootError, RootKey, SecretSource, SlotKind, WrapContext, WrapError, generate_master_key,
};

const CHEAP: PassphraseParams = PassphraseParams::MIN;
const CONTEXT: WrapContext = WrapContext::root_slot([1; 16], [2; 16]);

fn secret_file(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

fn open(source: &MasterKeySource) -> LocalWrapper {
    LocalWrapper::open(source).unwrap()
}

fn passphrase(from: SecretSource) -> MasterKeySource {
    MasterKeySource::Passphrase { from, params: CHEAP }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn conforms(source: &MasterKeySource, other: &MasterKeySource, tamper_every: usize) {
    let (wrapper, reopened, other) = (open(source), open(source), open(other));
    let subject = Subject {
        wrapper: &wrapper,
        reopened: &reopened,
        other: &other,
        max_key: KeyMaterial::MAX_LEN,
        tamper_every,
    };
    block_on(conformance::run(&subject));
}

#[test]
fn a_master_key_file_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name| {
        let text = generate_master_key().unwrap();
        MasterKeySource::File(secret_file(dir.path(), name, text.as_bytes()))
    };
    conforms(&file("a"), &file("b"), 1);
}

#[test]
fn a_passphrase_file_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let file = |text| passphrase(SecretSource::File(secret_file(dir.path(), text, text)));
    conforms(&file("correct horse"), &file("battery staple"), 1);
}

/// What reads the environment is tried in a process that has one made for it.
fn in_child(test: &str, variables: &[(&str, &str)]) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
fn environment_variables_conform() {
    let (one, two) = (generate_master_key().unwrap(), generate_master_key().unwrap());
    in_child(
        "environment_child",
        &[
            ("PK_ONE", one.as_str()),
            ("PK_TWO", two.as_str()),
            ("PK_PASS_ONE", "correct horse"),
            ("PK_PASS_TWO", "battery staple"),
            ("PK_LONG", &"x".repeat(4097)),
        ],
    );
}

#[test]
#[ignore = "run by environment_variables_conform"]
fn environment_child() {
    let env = |name: &str| MasterKeySource::Env(name.to_owned());
    let phrase = |name: &str| passphrase(SecretSource::Env(name.to_owned()));
    conforms(&env("PK_ONE"), &env("PK_TWO"), 1);
    conforms(&phrase("PK_PASS_ONE"), &phrase("PK_PASS_TWO"), 11);
    for (name, reason) in [("PK_NONE", "not set"), ("PK_LONG", "longer"), ("A=B", "not the name")] {
        let text = LocalWrapper::open(&env(name)).unwrap_err().to_string();
        assert!(text.contains(name) && text.contains(reason), "{text}");
    }
}

#[test]
fn credentials_conform() {
    let dir = tempfile::tempdir().unwrap();
    secret_file(dir.path(), "one", generate_master_key().unwrap().as_bytes());
    let two = secret_file(dir.path(), "two", generate_master_key().unwrap().as_bytes());
    // The directory's owner decides who reads a credential, so the mode is not looked at.
    fs::set_permissions(two, Permissions::from_mode(0o444)).unwrap();
    secret_file(dir.path(), "pass-one", "correct horse\n");
    secret_file(dir.path(), "pass-two", "battery staple\n");
    in_child("credentials_child", &[("CREDENTIALS_DIRECTORY", dir.path().to_str().unwrap())]);
}

#[test]
#[ignore = "run by credentials_conform"]
fn credentials_child() {
    let credential = |name: &str| MasterKeySource::Credential(name.to_owned());
    let phrase = |name: &str| passphrase(SecretSource::Credential(name.to_owned()));
    conforms(&credential("one"), &credential("two"), 1);
    conforms(&phrase("pass-one"), &phrase("pass-two"), 11);
    for name in ["", ".", "..", "../one", "a/b", ".hidden"] {
        let text = LocalWrapper::open(&credential(name)).unwrap_err().to_string();
        assert!(text.contains("not the name of a credential"), "{name:?}: {text}");
    }
    let text = LocalWrapper::open(&credential("three")).unwrap_err().to_string();
    assert!(text.starts_with("credential three cannot be read"), "{text}");
}

#[test]
fn a_master_key_is_the_same_key_in_every_spelling() {
    let dir = tempfile::tempdir().unwrap();
    let key: Vec<u8> = (200..232).collect();
    let spellings: Vec<Vec<u8>> = [
        data_encoding::HEXLOWER.encode(&key),
        data_encoding::HEXUPPER.encode(&key),
        data_encoding::BASE64.encode(&key),
        data_encoding::BASE64_NOPAD.encode(&key),
        data_encoding::BASE64URL.encode(&key),
        data_encoding::BASE64URL_NOPAD.encode(&key),
    ]
    .iter()
    .flat_map(|text| ["", "\n", "\r\n"].map(|end| format!("{text}{end}").into_bytes()))
    .chain([key.clone()])
    .collect();
    let wrappers: Vec<_> = (0..)
        .zip(&spellings)
        .map(|(n, s): (u32, _)| {
            open(&MasterKeySource::File(secret_file(dir.path(), &n.to_string(), s)))
        })
        .collect();
    let root = RootKey::generate().unwrap();
    let wrapped = block_on(root.slot_wrap(&wrappers[0], &CONTEXT, soon())).unwrap();
    for wrapper in &wrappers {
        let opened = block_on(RootKey::slot_open(wrapper, &wrapped, &CONTEXT, soon())).unwrap();
        assert_eq!(opened.id(), root.id());
        assert_eq!(opened.mac_slots(b"x"), root.mac_slots(b"x"));
    }
}

#[test]
fn what_is_no_master_key_is_refused_without_showing_it() {
    let dir = tempfile::tempdir().unwrap();
    let hex = "0123456789abcdef".repeat(4);
    for bad in [
        String::new(),
        "\n".to_owned(),
        "secret-of-31-bytes-0123456789abc".chars().take(31).collect(),
        "secret-of-33-bytes-0123456789abcd".to_owned(),
        hex.chars().take(63).collect(),
        format!("{hex}0"),
        format!("{}g", &hex[..63]),
        format!("{hex}\n\n"),
        format!(" {hex}"),
        "secret not base64 at all, but of 44 bytes ok".to_owned(),
    ] {
        let source = MasterKeySource::File(secret_file(dir.path(), "key", &bad));
        let error = LocalWrapper::open(&source).unwrap_err();
        assert!(matches!(error, LocalError::NotAMasterKey { .. }), "{bad:?}: {error}");
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains("secret") && !shown.contains(&hex[..16]), "{shown}");
    }
    for placeholder in ["0".repeat(64), "A".repeat(43) + "=", "x".repeat(32)] {
        let source = MasterKeySource::File(secret_file(dir.path(), "key", &placeholder));
        let error = LocalWrapper::open(&source).unwrap_err();
        assert!(matches!(error, LocalError::Placeholder { .. }), "{placeholder:?}: {error}");
    }
}

#[test]
fn a_file_that_others_read_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = secret_file(dir.path(), "key", generate_master_key().unwrap().as_bytes());
    let source = MasterKeySource::File(path.clone());
    for (mode, accepted) in [
        (0o600, true),
        (0o400, true),
        (0o640, false),
        (0o604, false),
        (0o610, false),
        (0o644, false),
    ] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        match LocalWrapper::open(&source) {
            Ok(_) => assert!(accepted, "{mode:o}"),
            Err(e) => {
                assert!(!accepted, "{mode:o}: {e}");
                let expected = format!(
                    "{0} can be read by others (mode {mode:04o}): run `chmod 600 {0}`",
                    path.display()
                );
                assert_eq!(e.to_string(), expected);
            }
        }
    }
    for (bad, reason) in [
        (dir.path().to_owned(), "not a regular file"),
        (dir.path().join("none"), "No such file"),
        (secret_file(dir.path(), "long", [b'a'; 4097]), "longer than 4 KiB"),
    ] {
        let text = LocalWrapper::open(&MasterKeySource::File(bad)).unwrap_err().to_string();
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn short_passphrases_and_extreme_costs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (text, accepted) in [
        (&b"1234567"[..], false),
        (b"1234567\n", false),
        (b"12345678", true),
        ("äöüß".as_bytes(), false),
        ("äöüßäöüß".as_bytes(), true),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff", false),
    ] {
        let from = SecretSource::File(secret_file(dir.path(), "pass", text));
        match LocalWrapper::open(&passphrase(from)) {
            Ok(wrapper) => {
                assert!(accepted, "{text:?}");
                assert_eq!(wrapper.kind(), SlotKind::Passphrase);
                assert_eq!(format!("{wrapper:?}"), "LocalWrapper { id: \"passphrase\", .. }");
            }
            Err(e) => {
                assert!(
                    !accepted && matches!(e, LocalError::NotAPassphrase { .. }),
                    "{text:?} {e}"
                );
            }
        }
    }
    let from = SecretSource::File(secret_file(dir.path(), "pass", "long enough"));
    for (memory_kib, passes, lanes, accepted) in [
        (19_456, 2, 1, true),
        (19_455, 2, 1, false),
        (1_048_576, 16, 16, true),
        (1_048_577, 2, 1, false),
        (65_536, 1, 4, false),
        (65_536, 17, 4, false),
        (65_536, 3, 0, false),
        (65_536, 3, 17, false),
    ] {
        let params = PassphraseParams { memory_kib, passes, lanes };
        let source = MasterKeySource::Passphrase { from: from.clone(), params };
        assert_eq!(LocalWrapper::open(&source).is_ok(), accepted, "{params:?}");
    }
    assert!(PassphraseParams::default().is_acceptable());
}

#[test]
fn the_cost_is_read_from_the_wrapped_key() {
    let dir = tempfile::tempdir().unwrap();
    let from = SecretSource::File(secret_file(dir.path(), "pass", "correct horse"));
    let cheap = open(&passphrase(from.clone()));
    let dear = open(&MasterKeySource::Passphrase {
        from,
        params: PassphraseParams { memory_kib: 32_768, passes: 3, lanes: 2 },
    });
    let root = RootKey::generate().unwrap();
    let wrapped = block_on(root.slot_wrap(&dear, &CONTEXT, soon())).unwrap();
    let opened = block_on(RootKey::slot_open(&cheap, &wrapped, &CONTEXT, soon())).unwrap();
    assert_eq!(opened.id(), root.id());
}

#[test]
fn a_slot_holds_a_root_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name| {
        let text = generate_master_key().unwrap();
        open(&MasterKeySource::File(secret_file(dir.path(), name, text.as_bytes())))
    };
    let (mine, other) = (file("a"), file("b"));
    let root = RootKey::generate().unwrap();
    let wrapped = block_on(root.slot_wrap(&mine, &CONTEXT, soon())).unwrap();
    let refused = block_on(RootKey::slot_open(&other, &wrapped, &CONTEXT, soon())).unwrap_err();
    assert_eq!(refused, RootError::Wrap(WrapError::NotMine));
    let elsewhere = WrapContext::root_slot([1; 16], [3; 16]);
    let refused = block_on(RootKey::slot_open(&mine, &wrapped, &elsewhere, soon())).unwrap_err();
    assert_eq!(refused, RootError::Wrap(WrapError::Broken));
    for len in [1, 32, 48, 49, 50] {
        let stray = KeyMaterial::from_secret(vec![9; len]).unwrap();
        let wrapped = block_on(mine.wrap_key(&stray, &CONTEXT, soon())).unwrap();
        let refused = block_on(RootKey::slot_open(&mine, &wrapped, &CONTEXT, soon())).unwrap_err();
        assert_eq!(refused, RootError::NotARoot, "{len}");
    }
}

#[test]
fn debug_shows_the_wrapper_and_not_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = secret_file(dir.path(), "key", "0123456789abcdef".repeat(4));
    let wrapper = open(&MasterKeySource::File(path));
    let shown = format!("{wrapper:?}");
    assert!(shown.starts_with("LocalWrapper { id: \"master-key:"), "{shown}");
    assert!(!shown.contains("0123456789abcdef"), "{shown}");
    assert!(!shown.contains("1, 35, 69"), "{shown}");
    let secret = KeyMaterial::from_secret(b"hunter2hunter2hunter2".to_vec()).unwrap();
    let wrapped = block_on(wrapper.wrap_key(&secret, &CONTEXT, soon())).unwrap();
    assert!(!format!("{wrapped:?}").contains("hunter2"));
}
