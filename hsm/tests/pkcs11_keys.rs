//! Keys that live in a PKCS#11 token: made there once, used through it, never outside it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, reason = "figures")]

#[path = "pkcs11/lab.rs"]
#[allow(dead_code, unreachable_pub, reason = "shared with tests/pkcs11.rs")]
mod lab;

use std::time::{Duration, Instant};

use aws_lc_rs::digest;
use futures::executor::block_on;
use lab::{Lab, kryoptic, soon};
use polykey_hsm::pkcs11::{Pkcs11Token, ResidentError, ResidentKey};
use polykey_hsm::work::{SignInput, SignatureScheme, WorkError, encrypt_to, verify};
use polykey_hsm::{Algorithm, Deadline, Purpose, WrapError};

const ID: [u8; 16] = [0x1d; 16];
const OTHER: [u8; 16] = [0x1e; 16];
const MESSAGE: &[u8] = b"a message";

fn generate(
    token: &Pkcs11Token,
    id: [u8; 16],
    algorithm: Algorithm,
    purpose: Purpose,
) -> Result<ResidentKey, ResidentError> {
    let deadline = Deadline::after(Duration::from_secs(120));
    block_on(token.generate_resident(&id, algorithm, purpose, deadline))
}

fn sign(
    token: &Pkcs11Token,
    key: &ResidentKey,
    scheme: SignatureScheme,
) -> Result<Vec<u8>, ResidentError> {
    block_on(token.sign_resident(key, scheme, SignInput::Message(MESSAGE), soon()))
}

/// Signs with every scheme that such a key has in a token, and verifies without it.
fn signs(token: &Pkcs11Token, key: &ResidentKey) {
    let public = key.public.as_ref().unwrap();
    let mut schemes = 0;
    for &scheme in SignatureScheme::ALL {
        if !scheme.serves(key.algorithm) || scheme.name().ends_with("p1363") {
            continue;
        }
        schemes += 1;
        let by = match scheme.digest_len() {
            Some(32) => &digest::SHA256,
            Some(48) => &digest::SHA384,
            _ => &digest::SHA512,
        };
        let digest = digest::digest(by, MESSAGE);
        for input in [SignInput::Message(MESSAGE), SignInput::Digest(digest.as_ref())] {
            let signature = block_on(token.sign_resident(key, scheme, input, soon())).unwrap();
            let message = SignInput::Message(MESSAGE);
            assert_eq!(verify(key.algorithm, scheme, public, message, &signature), Ok(true));
            let other = SignInput::Message(b"another");
            assert_eq!(verify(key.algorithm, scheme, public, other, &signature), Ok(false));
        }
        let short = SignInput::Digest(&digest.as_ref()[1..]);
        let refused = block_on(token.sign_resident(key, scheme, short, soon())).unwrap_err();
        assert!(matches!(refused, ResidentError::Work(WorkError::Input { .. })), "{refused:?}");
    }
    assert!(schemes > 0);
}

#[test]
fn keys_that_sign_are_made_once_and_survive_a_restart() {
    for algorithm in
        [Algorithm::EcdsaP256, Algorithm::EcdsaP384, Algorithm::Rsa2048, Algorithm::Rsa3072]
    {
        let lab = Lab::empty();
        let token = lab.token();
        let key = generate(&token, ID, algorithm, Purpose::Sign).unwrap();
        assert_eq!((key.algorithm, key.purpose), (algorithm, Purpose::Sign));
        signs(&token, &key);
        let again = generate(&token, ID, algorithm, Purpose::Sign).unwrap_err();
        assert_eq!(again, ResidentError::AlreadyThere);
        let again = generate(&token, ID, Algorithm::Aes256Gcm, Purpose::Encrypt).unwrap_err();
        assert_eq!(again, ResidentError::AlreadyThere);
        assert_eq!(lab.minted(), 1);

        drop(token);
        let token = lab.token();
        let found = block_on(token.find_resident(&ID, algorithm, Purpose::Sign, soon())).unwrap();
        assert_eq!(found, key);
        signs(&token, &key);
    }
}

#[test]
fn rsa_4096_takes_longer_than_a_call_may() {
    let mut lab = Lab::empty();
    lab.config.call_timeout = Duration::from_millis(100);
    let token = lab.token();
    // Only what is known to take long has until its deadline.
    let began = Instant::now();
    let key = generate(&token, ID, Algorithm::Rsa4096, Purpose::Sign).unwrap();
    println!("made in {:?}", began.elapsed());
    lab.config.call_timeout = Duration::from_secs(5);
    sign(&lab.token(), &key, SignatureScheme::RsaPssSha256).unwrap();
}

#[test]
fn an_aes_key_encrypts_in_the_token() {
    let lab = Lab::empty();
    for rules in ["", "C_EncryptInit 1 0 own-iv 0"] {
        lab.rules(rules);
        let token = lab.token();
        let key = generate(&token, ID, Algorithm::Aes256Gcm, Purpose::Encrypt).unwrap();
        assert_eq!(key.public, None);
        for len in [0, 1, 1000, ResidentKey::MAX_DATA] {
            let plaintext = vec![7; len];
            let sealed = block_on(token.seal_resident(&key, b"aad", &plaintext, soon())).unwrap();
            assert_eq!(sealed.len(), len + 28);
            let again = block_on(token.seal_resident(&key, b"aad", &plaintext, soon())).unwrap();
            assert_ne!(sealed[..12], again[..12], "one IV twice");
            let open = |aad: &[u8], sealed: &[u8]| {
                block_on(token.open_resident(&key, aad, sealed, soon()))
            };
            assert_eq!(*open(b"aad", &sealed).unwrap(), plaintext);
            let failed = Err(ResidentError::Work(WorkError::Failed));
            assert_eq!(open(b"", &sealed), failed);
            assert_eq!(open(b"aad", &sealed[..sealed.len() - 1]), failed);
            assert_eq!(open(b"aad", &[]), failed);
            for at in [0, 12, sealed.len() - 1] {
                let mut changed = sealed.clone();
                changed[at] ^= 1;
                assert_eq!(open(b"aad", &changed), failed, "byte {at}");
            }
        }
        let long = vec![0; ResidentKey::MAX_DATA + 1];
        let refused = block_on(token.seal_resident(&key, b"", &long, soon())).unwrap_err();
        assert!(matches!(refused, ResidentError::Work(WorkError::Input { .. })), "{refused:?}");
        block_on(token.destroy_resident(&key, soon())).unwrap();
    }
}

#[test]
fn what_a_token_cannot_do_leaves_nothing_in_it() {
    let lab = Lab::empty();
    let token = lab.token();
    // SoftHSM has RSA-OAEP with SHA-1 alone.
    let refused = generate(&token, ID, Algorithm::Rsa2048, Purpose::Encrypt).unwrap_err();
    assert!(matches!(&refused, ResidentError::Unsupported(text) if text.contains("C_DecryptInit")));
    let found = block_on(token.find_resident(&ID, Algorithm::Rsa2048, Purpose::Encrypt, soon()));
    assert_eq!(found, Err(ResidentError::NotThere));
    generate(&token, ID, Algorithm::EcdsaP256, Purpose::Sign).unwrap();

    for algorithm in [Algorithm::Ed25519, Algorithm::MlDsa65, Algorithm::ApiKey] {
        let refused = generate(&token, OTHER, algorithm, algorithm.default_purpose());
        assert!(matches!(refused, Err(ResidentError::Unsupported(_))), "{refused:?}");
    }
    let refused = generate(&token, OTHER, Algorithm::EcdsaP256, Purpose::Encrypt);
    assert!(matches!(refused, Err(ResidentError::Work(WorkError::WrongPurpose { .. }))));
    let deadline = soon();
    let short = token.generate_resident(&[1; 15], Algorithm::EcdsaP256, Purpose::Sign, deadline);
    assert!(matches!(block_on(short), Err(ResidentError::Work(WorkError::Input { .. }))));
}

#[test]
fn a_key_that_is_destroyed_is_gone_and_no_other() {
    let lab = Lab::new();
    let wrapper = lab.wrapper();
    let wrapped = lab::wrap(&wrapper).unwrap();
    let token = wrapper.token();
    let key = generate(token, ID, Algorithm::EcdsaP256, Purpose::Sign).unwrap();
    let other = generate(token, OTHER, Algorithm::EcdsaP384, Purpose::Sign).unwrap();
    block_on(token.destroy_resident(&key, soon())).unwrap();
    assert_eq!(sign(token, &key, SignatureScheme::EcdsaSha256), Err(ResidentError::NotThere));
    let again = block_on(token.destroy_resident(&key, soon()));
    assert_eq!(again, Err(ResidentError::NotThere));
    sign(token, &other, SignatureScheme::EcdsaSha384).unwrap();
    lab::opens(&wrapper, &wrapped).unwrap();

    // The wrapping key is not one of these, whatever its id.
    let [_, _, name] = wrapped.wrapper().as_str().split(':').collect::<Vec<_>>()[..] else {
        panic!()
    };
    let id = data_encoding::HEXLOWER.decode(name.strip_prefix("id-").unwrap().as_bytes()).unwrap();
    let kek = ResidentKey {
        id,
        algorithm: Algorithm::Aes256Gcm,
        purpose: Purpose::Encrypt,
        public: None,
    };
    let refused = block_on(token.destroy_resident(&kek, soon()));
    assert_eq!(refused, Err(ResidentError::NotThere));
    let refused = block_on(token.seal_resident(&kek, b"", b"", soon()));
    assert_eq!(refused, Err(ResidentError::NotThere));
    lab::opens(&wrapper, &wrapped).unwrap();
}

#[test]
fn another_tokens_key_of_the_same_id_does_not_sign_for_the_recorded_one() {
    let (first, second) = (Lab::empty(), Lab::empty());
    let key = generate(&first.token(), ID, Algorithm::EcdsaP256, Purpose::Sign).unwrap();
    let token = second.token();
    generate(&token, ID, Algorithm::EcdsaP256, Purpose::Sign).unwrap();
    let refused = sign(&token, &key, SignatureScheme::EcdsaSha256).unwrap_err();
    assert!(
        matches!(&refused, ResidentError::Token(WrapError::Config(text)) if text.contains("not one by the key")),
        "{refused:?}"
    );
}

#[test]
fn faults_while_a_key_is_made_leave_one_or_none() {
    let lab = Lab::empty();
    let token = lab.token();
    for function in [
        "C_OpenSession",
        "C_FindObjectsInit",
        "C_FindObjects",
        "C_GenerateKeyPair",
        "C_GetAttributeValue",
        "C_SignInit",
        "C_Sign",
    ] {
        for code in [0x05, 0x11, 0x30, 0x70, 0xb3, 0xd1, 0x101] {
            for (first, times) in [(1, 1), (2, 1), (3, 2), (1, 0)] {
                let what = format!("{function} answers {code:#x}, calls {first} and {times}");
                lab.rules(&format!("{function} {first} {times} return {code:#x}"));
                let made = generate(&token, ID, Algorithm::EcdsaP256, Purpose::Sign);
                lab.heal();
                let key =
                    made.or_else(|_| generate(&token, ID, Algorithm::EcdsaP256, Purpose::Sign));
                let key = key.or_else(|e| match e {
                    ResidentError::AlreadyThere => block_on(token.find_resident(
                        &ID,
                        Algorithm::EcdsaP256,
                        Purpose::Sign,
                        soon(),
                    )),
                    other => Err(other),
                });
                let key = key.unwrap_or_else(|e| panic!("{what}: {e}"));
                sign(&token, &key, SignatureScheme::EcdsaSha256).expect(&what);
                block_on(token.destroy_resident(&key, soon())).expect(&what);
                let gone = block_on(token.destroy_resident(&key, soon()));
                assert_eq!(gone, Err(ResidentError::NotThere), "{what}");
            }
        }
    }
}

#[test]
fn faults_while_a_key_works_give_no_wrong_answer() {
    let lab = Lab::empty();
    let token = lab.token();
    let key = generate(&token, ID, Algorithm::EcdsaP256, Purpose::Sign).unwrap();
    let aes = generate(&token, OTHER, Algorithm::Aes256Gcm, Purpose::Encrypt).unwrap();
    let sealed = block_on(token.seal_resident(&aes, b"aad", MESSAGE, soon())).unwrap();
    for function in [
        "C_FindObjects",
        "C_GetAttributeValue",
        "C_SignInit",
        "C_Sign",
        "C_DecryptInit",
        "C_Decrypt",
    ] {
        for code in [0x05, 0x11, 0x30, 0x32, 0x40, 0x70, 0x90, 0xb3, 0xe0, 0x101, 0x150] {
            for (first, times) in [(1, 1), (2, 1), (1, 0)] {
                let what = format!("{function} answers {code:#x}, calls {first} and {times}");
                lab.rules(&format!("{function} {first} {times} return {code:#x}"));
                let signed = sign(&token, &key, SignatureScheme::EcdsaSha256).map(drop);
                lab.rules(&format!("{function} {first} {times} return {code:#x}"));
                let opened = block_on(token.open_resident(&aes, b"aad", &sealed, soon()));
                lab.heal();
                if let Ok(plaintext) = &opened {
                    assert_eq!(plaintext.as_slice(), MESSAGE, "{what}");
                }
                for result in [signed, opened.map(drop)] {
                    let fine = matches!(
                        result,
                        Ok(())
                            | Err(ResidentError::Token(WrapError::Unavailable { retryable: true }))
                    );
                    assert!(fine, "{what}: {result:?}");
                }
                sign(&token, &key, SignatureScheme::EcdsaSha256).expect(&what);
                let opened = block_on(token.open_resident(&aes, b"aad", &sealed, soon()));
                assert_eq!(opened.unwrap().as_slice(), MESSAGE, "{what}");
            }
        }
    }
    assert_eq!(lab.minted(), 2);
}

#[test]
fn kryoptic_keeps_keys_too() {
    let Some((_dir, config)) = kryoptic("kryoptic_keeps_keys_too") else { return };
    let token = Pkcs11Token::new(config, lab::worker()).unwrap();
    for algorithm in [Algorithm::EcdsaP256, Algorithm::EcdsaP384, Algorithm::Rsa2048] {
        let key = generate(&token, ID, algorithm, Purpose::Sign).unwrap();
        signs(&token, &key);
        block_on(token.destroy_resident(&key, soon())).unwrap();
    }
    let key = generate(&token, ID, Algorithm::Rsa2048, Purpose::Encrypt).unwrap();
    let public = key.public.as_ref().unwrap();
    let sealed = encrypt_to(key.algorithm, public, MESSAGE).unwrap();
    let open = |sealed: &[u8]| block_on(token.decrypt_resident(&key, sealed, soon()));
    assert_eq!(open(&sealed).unwrap().as_slice(), MESSAGE);
    let mut changed = sealed.clone();
    changed[9] ^= 1;
    let failed = Err(ResidentError::Work(WorkError::Failed));
    assert_eq!(open(&changed), failed);
    assert_eq!(open(&sealed[1..]), failed);
    let refused = sign(&token, &key, SignatureScheme::RsaPssSha256).unwrap_err();
    assert!(matches!(refused, ResidentError::Work(WorkError::WrongPurpose { .. })), "{refused:?}");

    let aes = generate(&token, OTHER, Algorithm::Aes256Gcm, Purpose::Encrypt).unwrap();
    let sealed = block_on(token.seal_resident(&aes, b"aad", MESSAGE, soon())).unwrap();
    let opened = block_on(token.open_resident(&aes, b"aad", &sealed, soon())).unwrap();
    assert_eq!(opened.as_slice(), MESSAGE);
}

#[test]
fn a_data_object_is_the_old_or_the_new_one_whatever_breaks_off() {
    const LABEL: &str = "polykey-anchor";
    let lab = Lab::empty();
    let token = lab.token();
    let read = || block_on(token.data(LABEL, soon())).unwrap();
    let put = |value: &[u8]| block_on(token.put_data(LABEL, value, soon()));
    assert!(read().is_empty());
    put(b"one").unwrap();
    assert_eq!(read(), [b"one"]);
    // As long as can be, and longer.
    let long = vec![7; Pkcs11Token::MAX_DATA];
    put(&long).unwrap();
    assert_eq!(read(), std::slice::from_ref(&long));
    assert!(matches!(put(&[&long[..], &[7]].concat()), Err(WrapError::Config(_))));
    // Nothing is made: the old one stays. On every rung the call fails.
    lab.rules("C_CreateObject 1 0 return 0x30");
    put(b"two").unwrap_err();
    lab.heal();
    assert_eq!(read(), std::slice::from_ref(&long));
    // The new one is made and the old one does not go: both are there, until the next one goes through.
    lab.rules("C_DestroyObject 1 0 return 0x30");
    put(b"two").unwrap_err();
    lab.heal();
    let both = read();
    assert!(both.len() == 2 && both.contains(&b"two".to_vec()), "{}", both.len());
    put(b"three").unwrap();
    assert_eq!(read(), [b"three"]);
    // Another label is another object; without the PIN nobody sees either.
    assert!(block_on(token.data("another", soon())).unwrap().is_empty());
}
