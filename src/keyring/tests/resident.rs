//! Keys that live in a token: SoftHSM, through the binary's own worker process.

use std::path::PathBuf;
use std::process::Command;

use polykey_hsm::SecretSource;
use polykey_hsm::pkcs11::{Pkcs11Config, Pkcs11Token, TokenSelector, WorkerCommand};
use polykey_hsm::work::{SignInput, SignatureScheme};

use super::*;
use crate::command::crypto::{Hidden, Sign, ToSign};
use crate::custody::Tokens;

const MODULES: [&str; 3] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
];

/// A token of its own; `None` without the binary, which `cargo test --lib` alone does not build.
fn token(dir: &std::path::Path) -> Option<Pkcs11Token> {
    let exe = std::env::current_exe().unwrap();
    let program = exe.parent()?.parent()?.join("polykey");
    if !program.exists() {
        return None;
    }
    let module = MODULES.iter().map(PathBuf::from).find(|path| path.exists());
    let module = module.expect("SoftHSM 2 is missing: make deps, or apt-get install softhsm2");
    let conf = dir.join("softhsm2.conf");
    std::fs::create_dir(dir.join("tokens")).unwrap();
    let tokens = dir.join("tokens");
    let text = format!("directories.tokendir = {}\nlog.level = ERROR\n", tokens.display());
    std::fs::write(&conf, text).unwrap();
    crate::pki::write_file(&dir.join("pin"), b"1234", 0o600).unwrap();
    let made = Command::new("softhsm2-util")
        .env("SOFTHSM2_CONF", &conf)
        .args(["--init-token", "--free", "--label", "t", "--so-pin", "12345678", "--pin", "1234"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let pin = SecretSource::File(dir.join("pin"));
    let mut config = Pkcs11Config::new(module, TokenSelector::Label("t".into()), pin);
    config.environment = vec![("SOFTHSM2_CONF".into(), conf.display().to_string())];
    let worker = WorkerCommand { program, args: vec!["pkcs11-worker".into()] };
    Some(Pkcs11Token::new(config, worker).unwrap())
}

/// Files of the token, its own apart.
fn objects(dir: &std::path::Path) -> usize {
    let mut count = 0;
    for token in std::fs::read_dir(dir.join("tokens")).unwrap() {
        let files = std::fs::read_dir(token.unwrap().path()).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.unwrap().file_name().to_string_lossy().into_owned()
        };
        let object = |name: &String| name.ends_with(".object") && name != "token.object";
        count += files.map(name).filter(object).count();
    }
    count
}

/// Waits until the token has so many.
async fn until_objects(dir: &std::path::Path, wanted: usize) {
    let wait = async {
        while objects(dir) != wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), wait).await;
    assert!(waited.is_ok(), "{} objects and not {wanted}", objects(dir));
}

fn in_token() -> CreateKey {
    CreateKey {
        algorithm: Algorithm::EcdsaP256,
        purpose: polykey_hsm::Purpose::Sign,
        in_token: true,
        profile: None,
        ..creation()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_made_in_a_token_for_a_change_that_failed_goes_again() {
    let dir = tempfile::tempdir().unwrap();
    let Some(token) = token(dir.path()) else {
        println!("SKIPPED: the polykey binary is not built");
        return;
    };
    // Refused in the transaction, when the object is there.
    let tokens = || Tokens::of("hsm", token.clone());
    let node = Node::over(|keyring| keyring.with_tokens(tokens())).await;
    let cx = node.cx("a", "admin");
    let named = || CreateKey { alias: Some("one".into()), ..in_token() };
    let id = node.do_it(&cx, Mutation::Create(Box::new(named()))).await.unwrap().key.id;
    until_objects(dir.path(), 2).await;
    let again = node.do_it(&cx, Mutation::Create(Box::new(named()))).await;
    assert!(again.is_err(), "{again:?}");
    until_objects(dir.path(), 2).await;
    // All of a batch, where one of them is refused.
    let batch = [in_token(), in_token(), named()].map(|c| Mutation::Create(Box::new(c)));
    node.keyring.mutate_all(&cx, &batch, &[None, None, None]).await.unwrap_err();
    until_objects(dir.path(), 2).await;
    node.do_it(&cx, rotate(id, Strategy::Hot, 0)).await.unwrap();
    until_objects(dir.path(), 4).await;
    let mut late = rotate(id, Strategy::Hot, 0);
    if let Mutation::Rotate(rotation) = &mut late {
        rotation.expected = Some(1);
    }
    let late = node.do_it(&cx, late).await.unwrap_err();
    assert!(matches!(late, Error::Conflict), "{late:?}");
    until_objects(dir.path(), 4).await;

    // A store that dies within the commit: nobody knows, and nothing is taken away. One that takes
    // no commit: it goes.
    let (node, faulty) = Node::over_faulty(|keyring| keyring.with_tokens(tokens())).await;
    faulty.kill();
    let unknown = node.do_it(&cx, Mutation::Create(Box::new(in_token()))).await.unwrap_err();
    assert!(matches!(unknown, Error::OutcomeUnknown { .. }), "{unknown:?}");
    let refused = node.do_it(&cx, Mutation::Create(Box::new(in_token()))).await.unwrap_err();
    assert!(!matches!(refused, Error::OutcomeUnknown { .. }), "{refused:?}");
    until_objects(dir.path(), 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_key_is_destroyed_in_its_token_and_not_before_its_window_ends() {
    let dir = tempfile::tempdir().unwrap();
    let Some(token) = token(dir.path()) else {
        println!("SKIPPED: the polykey binary is not built");
        return;
    };
    let tokens = || Tokens::of("hsm", token.clone());
    let node = Node::over(|keyring| keyring.with_tokens(tokens())).await;
    let cx = node.cx("a", "admin");
    let id = node.do_it(&cx, Mutation::Create(Box::new(in_token()))).await.unwrap().key.id;
    node.do_it(&cx, rotate(id, Strategy::Hot, 0)).await.unwrap();
    // A private and a public part of each version.
    assert_eq!(objects(dir.path()), 4);
    let sign = Sign {
        key: KeyName::Id(id),
        version: 1,
        input: ToSign::Message(Hidden(bytes::Bytes::from_static(b"text"))),
        scheme: None,
    };
    let signed = node.keyring.sign(&cx, &sign).await;
    // An old version signs nothing, in a token as elsewhere.
    assert!(signed.is_err(), "{signed:?}");
    let signed = node.keyring.sign(&cx, &Sign { version: 0, ..sign }).await.unwrap();
    let key = node.keyring.load(id).await.unwrap();
    let version = node.keyring.load_version(&key, Version::new(2).unwrap());
    let public = version.await.unwrap().record.public_key.clone();
    let public = polykey_hsm::PublicKey::from_record(Algorithm::EcdsaP256, &public).unwrap();
    let scheme = SignatureScheme::default_for(Algorithm::EcdsaP256).unwrap();
    let input = SignInput::Message(b"text");
    let valid =
        polykey_hsm::work::verify(Algorithm::EcdsaP256, scheme, &public, input, &signed.signature);
    assert_eq!(valid, Ok(true));
    // Trimming would leave objects behind.
    let trim = TrimVersions { key: KeyName::Id(id), min_available: 2, expected: None };
    assert!(node.do_it(&cx, Mutation::Trim(trim)).await.is_err());

    let destroy = ScheduleDestruction { key: KeyName::Id(id), days: 7, expected: None };
    node.do_it(&cx, Mutation::Destroy(destroy)).await.unwrap();
    node.clock.advance(Duration::from_secs(6 * 86_400));
    node.run_due().await;
    assert_eq!(objects(dir.path()), 4);
    node.clock.advance(Duration::from_secs(86_400));
    node.run_due().await;
    assert_eq!(objects(dir.path()), 0);
    let left = polykey_storage::prefix(id.bytes());
    assert!(node.keyring.vault.scan_keys(space::VERSIONS, left, 1).await.unwrap().is_empty());
    let key = node.keyring.load(id).await.unwrap();
    assert_eq!(state_name(&key.record), "destroyed");
}
