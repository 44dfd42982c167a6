//! The PKCS#11 wrapper over real tokens: that it conforms, and what operators meet.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, reason = "says what was skipped")]

#[path = "pkcs11/lab.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with tests/pkcs11_faults.rs")]
mod lab;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use futures::executor::block_on;
use lab::{
    CONTEXT, KEK, Lab, PIN, kryoptic, kryoptic_tool, only, opens, run, secret_file, softhsm, soon,
    worker, wrap,
};
use polykey_hsm::conformance::{self, Subject};
use polykey_hsm::pkcs11::{
    KeySelector, MechanismChoice, Pkcs11Config, Pkcs11Token, Pkcs11Wrapper, TokenSelector,
    WrapMechanism,
};
use polykey_hsm::{
    Deadline, KeyMaterial, KeyWrapper, RootKey, SecretSource, SlotKind, WrapContext, WrapError,
    WrappedKey, WrapperId,
};

/// Runs the suite over two keys that are made in a token for this mechanism.
fn conforms(config: &Pkcs11Config, mechanism: &str, tamper_every: usize) {
    let config = Pkcs11Config { mechanism: only(mechanism), ..config.clone() };
    let token = || Pkcs11Token::new(config.clone(), worker()).unwrap();
    let first = token();
    let wrapper = |token: Pkcs11Token, label: &str| {
        token.wrapper(KeySelector::label(format!("{label} {mechanism}"))).unwrap()
    };
    let (one, two) = (wrapper(first.clone(), "one"), wrapper(first.clone(), "two"));
    let infos = [&one, &two].map(|wrapper| {
        let info = block_on(first.create_kek(wrapper.key(), soon())).unwrap();
        assert!(info.locked_in, "{info:?}");
        assert_eq!(only(info.mechanism.name()), only(mechanism));
        info
    });
    // Each knows its id before it is asked, as after a first contact.
    assert_eq!(block_on(one.contact(soon())).unwrap(), infos[0]);
    assert_eq!(block_on(two.contact(soon())).unwrap(), infos[1]);
    let subject = Subject {
        wrapper: &one,
        reopened: &wrapper(token(), "one"),
        other: &two,
        max_key: KeyMaterial::MAX_LEN,
        tamper_every,
    };
    block_on(conformance::run(&subject));
}

#[test]
fn softhsm_conforms_with_aes_gcm() {
    conforms(&Lab::empty().config, "aes-gcm", 1);
}

#[test]
fn a_token_that_draws_its_own_iv_conforms() {
    let lab = Lab::empty();
    lab.rules("C_EncryptInit 1 0 own-iv 0");
    conforms(&lab.config, "aes-gcm", 7);
}

#[test]
fn softhsm_conforms_with_aes_kw() {
    conforms(&Lab::empty().config, "aes-kw", 3);
}

#[test]
fn softhsm_conforms_with_aes_kwp() {
    conforms(&Lab::empty().config, "aes-kwp", 3);
}

#[test]
fn softhsm_conforms_with_rsa_oaep() {
    conforms(&Lab::empty().config, "rsa-oaep-sha1", 7);
}

#[test]
fn kryoptic_conforms() {
    let Some((_dir, config)) = kryoptic("kryoptic_conforms") else { return };
    // Made by somebody else's tool, without a CKA_ID.
    run(kryoptic_tool(&config)
        .args(["--login", "--pin", PIN, "--keygen", "--key-type", "AES:32", "--label", "bare"])
        .args(["--sensitive", "--usage-decrypt"]));
    let token = Pkcs11Token::new(config.clone(), worker()).unwrap();
    let bare = token.wrapper(KeySelector::label("bare")).unwrap();
    let wrapped = wrap(&bare).unwrap();
    assert!(wrapped.wrapper().as_str().ends_with(":label-62617265"), "{wrapped:?}");
    opens(&bare, &wrapped).unwrap();
    for (mechanism, tamper_every) in [("aes-gcm", 1), ("aes-kw", 3), ("rsa-oaep-sha256", 7)] {
        conforms(&config, mechanism, tamper_every);
    }
}

#[test]
fn the_token_may_be_away_when_the_wrapper_is_made() {
    let lab = Lab::new();
    fs::rename(lab.path("tokens"), lab.path("drawer")).unwrap();
    fs::create_dir(lab.path("tokens")).unwrap();
    let wrapper = lab.wrapper();
    assert_eq!((wrapper.id().as_str(), wrapper.kind()), (Pkcs11Wrapper::UNKNOWN, SlotKind::Pkcs11));
    assert_eq!(wrapper.token().worker_pid(), None, "nothing was asked yet");
    let refused = wrap(&wrapper).unwrap_err();
    assert_eq!(refused, WrapError::Unavailable { retryable: true });
    let said = wrapper.token().last_failure().unwrap();
    assert!(said.contains("no token labelled \"polykey\" is present"), "{said}");

    fs::remove_dir(lab.path("tokens")).unwrap();
    fs::rename(lab.path("drawer"), lab.path("tokens")).unwrap();
    let wrapped = wrap(&wrapper).unwrap();
    assert_eq!(wrapped.wrapper(), wrapper.id());
    assert!(wrapper.id().as_str().starts_with("pkcs11:"), "{:?}", wrapper.id());
    opens(&wrapper, &wrapped).unwrap();
    assert_eq!(lab.minted(), 0);
}

#[test]
fn a_root_survives_a_restart_and_a_renamed_configuration() {
    let lab = Lab::new();
    let root = RootKey::generate().unwrap();
    let wrapped = block_on(root.slot_wrap(&lab.wrapper(), &CONTEXT, soon())).unwrap();
    let stored = WrappedKey::decode(&wrapped.encode()).unwrap();
    assert_eq!(Pkcs11Wrapper::mechanism_of(&stored), Some(WrapMechanism::AesGcm));
    let id = stored.wrapper().as_str().to_owned();
    let [_, serial, key] = id.split(':').collect::<Vec<_>>()[..] else { panic!("{id}") };
    let key = key.strip_prefix("id-").unwrap();
    let key = KeySelector::id(data_encoding::HEXLOWER.decode(key.as_bytes()).unwrap());
    let config =
        Pkcs11Config { token: TokenSelector::Serial(serial.to_owned()), ..lab.config.clone() };
    let wrapper = Pkcs11Token::new(config, worker()).unwrap().wrapper(key).unwrap();
    let opened = block_on(RootKey::slot_open(&wrapper, &stored, &CONTEXT, soon())).unwrap();
    assert_eq!(opened.id(), root.id());
    let shown = format!("{wrapper:?} {wrapped:?} {:?}", lab.config);
    assert!(!shown.contains(PIN), "{shown}");
}

#[test]
fn only_the_explicit_command_makes_a_key_and_only_one() {
    let lab = Lab::empty();
    let wrapper = lab.wrapper();
    let refused = wrap(&wrapper).unwrap_err();
    let WrapError::Config(text) = &refused else { panic!("{refused:?}") };
    assert!(text.contains("the token has no key labelled \"kek\""), "{text}");
    let refused = block_on(wrapper.contact(soon())).unwrap_err();
    assert!(matches!(refused, WrapError::Config(_)), "{refused:?}");
    assert_eq!(lab.minted(), 0);

    let key = KeySelector { label: Some(KEK.to_owned()), id: Some(vec![7]) };
    let made = block_on(wrapper.token().create_kek(&key, soon())).unwrap();
    assert!(made.locked_in && made.id.as_str().ends_with(":id-07"), "{made:?}");
    for same in [key, KeySelector::label(KEK), KeySelector::id([7])] {
        let refused = block_on(wrapper.token().create_kek(&same, soon())).unwrap_err();
        let WrapError::Config(text) = &refused else { panic!("{refused:?}") };
        assert!(text.contains("already; nothing was made"), "{text}");
    }
    assert_eq!(lab.minted(), 1);
    opens(&wrapper, &wrap(&wrapper).unwrap()).unwrap();
}

#[test]
fn a_copy_of_the_key_in_another_token_opens_and_another_key_does_not() {
    let (first, second) = (Lab::empty(), Lab::empty());
    let pair = |file: &Path| {
        let made = Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(file)
            .output()
            .expect("openssl is missing: make deps, or apt-get install openssl");
        assert!(made.status.success());
    };
    let (same, other) = (first.path("same.pem"), first.path("other.pem"));
    pair(&same);
    pair(&other);
    let import = |lab: &Lab, file: &Path, label: &str| {
        let token = ["--token", "polykey", "--pin", PIN, "--label", label, "--id", "0a"];
        run(lab.util().arg("--import").arg(file).args(token));
    };
    let wrapper = |lab: &Lab, label: &str| {
        let config = Pkcs11Config { mechanism: only("rsa-oaep-sha1"), ..lab.config.clone() };
        let token = Pkcs11Token::new(config, worker()).unwrap();
        token.wrapper(KeySelector::label(label)).unwrap()
    };
    import(&first, &same, "kek");
    import(&second, &same, "copy");
    let wrapped = wrap(&wrapper(&first, "kek")).unwrap();
    let copy = wrapper(&second, "copy");
    opens(&copy, &wrapped).unwrap();
    assert_ne!(copy.id(), wrapped.wrapper(), "the serial numbers differ");

    let third = Lab::empty();
    import(&third, &other, "kek");
    let refused = opens(&wrapper(&third, "kek"), &wrapped).unwrap_err();
    assert_eq!(refused, WrapError::NotMine);
}

#[test]
fn a_wrong_pin_is_tried_once_and_never_locks_the_token() {
    let lab = Lab::new();
    secret_file(&lab.path("pin"), "4321\n");
    let wrapper = lab.wrapper();
    for _ in 0..10 {
        let refused = wrap(&wrapper).unwrap_err();
        let WrapError::Config(text) = &refused else { panic!("{refused:?}") };
        assert!(text.contains("the token refused the PIN of file "), "{text}");
        assert!(!text.contains("4321"), "{text}");
    }
    assert_eq!(lab.calls("C_Login"), 1);
    wrapper.token().retry_pin();
    assert!(wrap(&wrapper).is_err());
    assert_eq!(lab.calls("C_Login"), 2);

    secret_file(&lab.path("pin"), PIN);
    let wrapped = wrap(&wrapper).unwrap();
    opens(&wrapper, &wrapped).unwrap();
    let slots = list(&lab);
    let token = slots.iter().filter_map(|slot| slot.token.as_ref()).find(|t| t.label == "polykey");
    assert!(token.is_some_and(|token| !token.pin_locked), "{slots:?}");
}

#[test]
fn a_wrong_pin_is_tried_once_by_the_whole_process_however_the_token_is_named() {
    let lab = Lab::new();
    secret_file(&lab.path("pin"), "87654321\n");
    let refuses = |wrapper: &Pkcs11Wrapper| {
        let refused = wrap(wrapper).unwrap_err();
        let WrapError::Config(text) = &refused else { panic!("{refused:?}") };
        assert!(text.contains("the token refused the PIN of file "), "{text}");
    };
    refuses(&lab.wrapper());
    let serial =
        list(&lab).into_iter().filter_map(|slot| slot.token).find(|t| t.label == "polykey");
    let by_serial =
        Pkcs11Config { token: TokenSelector::Serial(serial.unwrap().serial), ..lab.config.clone() };
    let by_serial = Pkcs11Token::new(by_serial, worker()).unwrap();
    let other = by_serial.wrapper(KeySelector::label(KEK)).unwrap();
    for _ in 0..3 {
        refuses(&other);
        refuses(&lab.wrapper());
    }
    assert_eq!(lab.calls("C_Login"), 1);
    // Another PIN is tried, and once more the first one after somebody's word.
    secret_file(&lab.path("pin"), "12345678\n");
    refuses(&other);
    refuses(&lab.wrapper());
    assert_eq!(lab.calls("C_Login"), 2);
    secret_file(&lab.path("pin"), PIN);
    let wrapped = wrap(&other).unwrap();
    opens(&lab.wrapper(), &wrapped).unwrap();
}

fn list(lab: &Lab) -> Vec<polykey_hsm::pkcs11::SlotListing> {
    let environment = lab.config.environment.clone();
    block_on(Pkcs11Token::list(softhsm(), environment, worker(), soon())).unwrap()
}

#[test]
fn slots_are_listed_without_a_pin() {
    let lab = Lab::empty();
    let slots = list(&lab);
    let tokens: Vec<_> = slots.iter().filter_map(|slot| slot.token.as_ref()).collect();
    let mine = tokens.iter().find(|token| token.label == "polykey").unwrap();
    assert!(mine.initialized && !mine.serial.is_empty() && mine.model.contains("SoftHSM"));
    assert!(tokens.iter().any(|token| !token.initialized), "SoftHSM has a free slot");

    let nothing = Pkcs11Token::list("/nowhere/module.so", vec![], worker(), soon());
    let WrapError::Config(text) = block_on(nothing).unwrap_err() else { panic!() };
    assert!(text.contains("/nowhere/module.so cannot be loaded"), "{text}");
    let here = std::env::current_exe().unwrap();
    let refused = block_on(Pkcs11Token::list(here, vec![], worker(), soon()));
    assert!(refused.is_err(), "a program is no module");
}

#[test]
fn what_is_configured_wrongly_is_said_in_words() {
    let lab = Lab::new();
    let refusal = |config: &Pkcs11Config, key: KeySelector| {
        let token = Pkcs11Token::new(config.clone(), worker()).unwrap();
        match wrap(&token.wrapper(key).unwrap()).unwrap_err() {
            WrapError::Config(text) => text,
            other => panic!("{other:?}: {:?}", token.last_failure()),
        }
    };
    let kek = || KeySelector::label(KEK);
    let oaep = Pkcs11Config { mechanism: only("rsa-oaep-sha256"), ..lab.config.clone() };
    let text = refusal(&oaep, kek());
    assert!(text.contains("does not work with an AES key"), "{text}");
    let wrong = KeySelector { id: Some(vec![9]), ..kek() };
    let text = refusal(&lab.config, wrong);
    assert!(text.contains("no key labelled \"kek\" with id 09"), "{text}");
    let missing = SecretSource::File(lab.path("none"));
    let text = refusal(&Pkcs11Config { pin: missing, ..lab.config.clone() }, kek());
    assert!(text.contains("cannot be read"), "{text}");
    secret_file(&lab.path("empty"), "\n");
    let empty = SecretSource::File(lab.path("empty"));
    let text = refusal(&Pkcs11Config { pin: empty, ..lab.config.clone() }, kek());
    assert!(text.contains("holds no PIN"), "{text}");

    // SoftHSM knows OAEP with SHA-1 alone, which it is never given unasked.
    let rsa = Lab::empty();
    let sha1 = Pkcs11Config { mechanism: only("rsa-oaep-sha1"), ..rsa.config.clone() };
    let token = Pkcs11Token::new(sha1, worker()).unwrap();
    block_on(token.create_kek(&kek(), soon())).unwrap();
    let auto = Pkcs11Config { mechanism: MechanismChoice::Auto, ..rsa.config.clone() };
    let text = refusal(&auto, kek());
    assert!(text.contains("rsa-oaep-sha256: C_DecryptInit answered ArgumentsBad"), "{text}");

    run(lab
        .util()
        .args(["--init-token", "--free", "--label", "polykey"])
        .args(["--so-pin", "12345678", "--pin", PIN]));
    let text = refusal(&lab.config, kek());
    assert!(text.contains("name it by its serial number"), "{text}");
}

/// The files in `compat/pkcs11-v1` are a SoftHSM token and a slot that its key wrapped.
#[test]
fn a_slot_of_format_1_opens() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/pkcs11-v1");
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture.join("token")).unwrap() {
        let entry = entry.unwrap();
        let token = dir.path().join("tokens/token");
        fs::create_dir_all(&token).unwrap();
        fs::copy(entry.path(), token.join(entry.file_name())).unwrap();
    }
    let lab = Lab::around(dir);
    let wrapped = WrappedKey::decode(&fs::read(fixture.join("slot")).unwrap()).unwrap();
    assert_eq!(Pkcs11Wrapper::mechanism_of(&wrapped), Some(WrapMechanism::AesGcm));
    let wrapper = lab.wrapper();
    opens(&wrapper, &wrapped).unwrap();
    assert_eq!(wrapper.id(), &WrapperId::new(wrapped.wrapper().as_str()).unwrap());
    let elsewhere = WrapContext { slot_id: [3; 16], ..CONTEXT };
    let refused = block_on(wrapper.unwrap_key(&wrapped, &elsewhere, soon())).unwrap_err();
    assert_eq!(refused, WrapError::Broken);
}

/// How the files of a format come to be, once, when the format is new.
#[test]
#[ignore = "writes the files of a new format into POLYKEY_COMPAT_DIR"]
fn write_the_files_of_a_new_format() {
    let to = std::path::PathBuf::from(std::env::var_os("POLYKEY_COMPAT_DIR").unwrap());
    let lab = Lab::new();
    fs::create_dir_all(to.join("token")).unwrap();
    fs::write(to.join("slot"), wrap(&lab.wrapper()).unwrap().encode()).unwrap();
    let token = fs::read_dir(lab.path("tokens")).unwrap().next().unwrap().unwrap().path();
    for file in fs::read_dir(token).unwrap() {
        let file = file.unwrap();
        if file.path().extension().is_none_or(|extension| extension != "lock") {
            fs::copy(file.path(), to.join("token").join(file.file_name())).unwrap();
        }
    }
}

#[test]
fn a_deadline_is_kept_and_does_not_end_the_process() {
    let lab = Lab::new();
    let wrapper = lab.wrapper();
    let wrapped = wrap(&wrapper).unwrap();
    let process = wrapper.token().worker_pid();
    lab.rules("C_Decrypt 1 1 hang 1000");
    let deadline = Deadline::after(Duration::from_millis(100));
    let refused = block_on(wrapper.unwrap_key(&wrapped, &CONTEXT, deadline)).unwrap_err();
    assert_eq!(refused, WrapError::DeadlineExceeded);
    opens(&wrapper, &wrapped).unwrap();
    assert_eq!(wrapper.token().worker_pid(), process, "it was slow, not stuck");
}
