//! The stored form of every asymmetric key stays readable for ever, and its results stay the same. The files are added
//! with each form and never written again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};

use polykey_hsm::algorithm::{generate, import, public_key};
use polykey_hsm::work::asymmetric::Pair;
use polykey_hsm::work::{SignInput, SignatureScheme, encapsulate, encrypt_to, verify};
use polykey_hsm::{Algorithm, GenerationParams, KeyMaterial, PublicKey, Purpose};

const MESSAGE: &[u8] = b"a message";

fn asymmetric() -> impl Iterator<Item = Algorithm> {
    Algorithm::ALL.iter().copied().filter(|a| a.is_asymmetric())
}

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

#[test]
fn stored_keys_of_form_1_are_read_and_work() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/keys-v1");
    for algorithm in asymmetric() {
        let read = |kind: &str| fs::read(dir.join(format!("{algorithm}.{kind}"))).unwrap();
        let stored = read("key");
        let public = PublicKey::from_spki(algorithm, &read("public")).unwrap();
        assert_eq!(public_key(algorithm, &material(&stored)).unwrap(), Some(public.clone()));
        let again = import(algorithm, material(&stored)).unwrap();
        assert_eq!(again.public.as_ref(), Some(&public));
        let purpose = algorithm.default_purpose();
        let pair = Pair::new(algorithm, purpose, &again.material).unwrap();
        assert_eq!(again.material.expose_for_export().as_slice(), stored, "{algorithm}");
        match purpose {
            Purpose::Sign => {
                let scheme = SignatureScheme::default_for(algorithm).unwrap();
                let input = SignInput::Message(MESSAGE);
                let by = |signature: &[u8]| verify(algorithm, scheme, &public, input, signature);
                assert_eq!(by(&read("signature")), Ok(true), "{algorithm}");
                assert_eq!(by(&pair.sign(scheme, input).unwrap()), Ok(true), "{algorithm}");
            }
            Purpose::Agree => assert_eq!(*pair.agree(&read("peer")).unwrap(), read("secret")),
            _ => assert_eq!(*pair.decapsulate(&read("ciphertext")).unwrap(), read("secret")),
        }
        if algorithm.serves(Purpose::Encrypt) {
            let pair = Pair::new(algorithm, Purpose::Encrypt, &material(&stored)).unwrap();
            assert_eq!(pair.open_raw(&read("ciphertext")).unwrap().as_slice(), MESSAGE);
        }
    }
}

/// How the files of a form come to be: name a directory that does not exist yet, once, when the form is new.
#[test]
#[ignore = "writes the files of a new form into POLYKEY_COMPAT_DIR"]
fn write_the_files_of_a_new_form() {
    let dir = PathBuf::from(std::env::var_os("POLYKEY_COMPAT_DIR").unwrap());
    fs::create_dir(&dir).unwrap();
    for algorithm in asymmetric() {
        let write = |kind: &str, bytes: &[u8]| {
            fs::write(dir.join(format!("{algorithm}.{kind}")), bytes).unwrap();
        };
        let made = generate(algorithm, GenerationParams::default()).unwrap();
        let public = made.public.unwrap();
        let purpose = algorithm.default_purpose();
        let pair = Pair::new(algorithm, purpose, &made.material).unwrap();
        write("key", &made.material.expose_for_export());
        write("public", &public.spki_der);
        match purpose {
            Purpose::Sign => {
                let scheme = SignatureScheme::default_for(algorithm).unwrap();
                write("signature", &pair.sign(scheme, SignInput::Message(MESSAGE)).unwrap());
            }
            Purpose::Agree => {
                let peer =
                    generate(algorithm, GenerationParams::default()).unwrap().public.unwrap();
                write("peer", &peer.spki_der);
                write("secret", &pair.agree(&peer.spki_der).unwrap());
            }
            _ => {
                let (ciphertext, secret) = encapsulate(algorithm, &public).unwrap();
                write("ciphertext", &ciphertext);
                write("secret", &secret);
            }
        }
        if algorithm.serves(Purpose::Encrypt) {
            write("ciphertext", &encrypt_to(algorithm, &public, MESSAGE).unwrap());
        }
    }
}
