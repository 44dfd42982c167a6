//! What each kind of key does, and what it refuses.

use aws_lc_rs::digest;

use super::*;
use crate::{GenerationParams, algorithm};

fn pair(algorithm: Algorithm, purpose: Purpose) -> (Pair, PublicKey) {
    let made = algorithm::generate(algorithm, GenerationParams::default()).unwrap();
    (Pair::new(algorithm, purpose, &made.material).unwrap(), made.public.unwrap())
}

fn of_purpose(purpose: Purpose) -> impl Iterator<Item = Algorithm> {
    Algorithm::ALL.iter().copied().filter(move |a| a.is_asymmetric() && a.serves(purpose))
}

fn is_input(result: Result<impl Sized, WorkError>, wanted: &str) {
    match result {
        Err(WorkError::Input { field, .. }) => assert_eq!(field, wanted),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("taken"),
    }
}

#[test]
fn names_of_schemes_never_change() {
    let names: Vec<_> = SignatureScheme::ALL.iter().map(|scheme| scheme.name()).collect();
    assert_eq!(
        names,
        [
            "ecdsa-sha256",
            "ecdsa-sha384",
            "ecdsa-sha512",
            "ecdsa-sha256-p1363",
            "ecdsa-sha384-p1363",
            "ecdsa-sha512-p1363",
            "rsa-pss-sha256",
            "rsa-pss-sha384",
            "rsa-pss-sha512",
            "rsa-pkcs1-sha256",
            "rsa-pkcs1-sha384",
            "rsa-pkcs1-sha512",
            "ed25519",
            "ml-dsa",
        ]
    );
    for &scheme in SignatureScheme::ALL {
        assert_eq!(SignatureScheme::from_name(scheme.name()), Some(scheme));
        assert!(of_purpose(Purpose::Sign).any(|a| scheme.serves(a)), "{scheme} serves nothing");
    }
    for &algorithm in Algorithm::ALL {
        let default = SignatureScheme::default_for(algorithm);
        assert_eq!(default.is_some(), algorithm.serves(Purpose::Sign), "{algorithm}");
        assert!(default.is_none_or(|scheme| scheme.serves(algorithm)), "{algorithm}");
    }
}

#[test]
fn signatures_verify_and_nothing_else_does() {
    // The length of a signature, or the longest of DER.
    let length = |algorithm, scheme| match (algorithm, scheme) {
        (_, SignatureScheme::EcdsaSha256) => 72,
        (_, SignatureScheme::EcdsaSha384) => 104,
        (_, SignatureScheme::EcdsaSha512) => 139,
        (_, SignatureScheme::EcdsaSha256P1363) => 64,
        (_, SignatureScheme::EcdsaSha384P1363) => 96,
        (_, SignatureScheme::EcdsaSha512P1363) => 132,
        (Algorithm::Rsa2048, _) => 256,
        (Algorithm::Rsa3072, _) => 384,
        (Algorithm::Rsa4096, _) => 512,
        (Algorithm::Ed25519, _) => 64,
        (Algorithm::MlDsa44, _) => 2420,
        (Algorithm::MlDsa65, _) => 3309,
        _ => 4627,
    };
    for algorithm in of_purpose(Purpose::Sign) {
        let (pair, public) = pair(algorithm, Purpose::Sign);
        let (_, other) = self::pair(algorithm, Purpose::Sign);
        for &scheme in SignatureScheme::ALL {
            let message = SignInput::Message(b"message");
            if !scheme.serves(algorithm) {
                is_input(pair.sign(scheme, message), "scheme");
                is_input(verify(algorithm, scheme, &public, message, b""), "scheme");
                continue;
            }
            let check = |public: &PublicKey, input: SignInput<'_>, signature: &[u8]| {
                verify(algorithm, scheme, public, input, signature).unwrap()
            };
            let signature = pair.sign(scheme, message).unwrap();
            let long = length(algorithm, scheme);
            if matches!(
                scheme,
                SignatureScheme::EcdsaSha256
                    | SignatureScheme::EcdsaSha384
                    | SignatureScheme::EcdsaSha512
            ) {
                assert!((long - 12..=long).contains(&signature.len()), "{algorithm} {scheme}");
            } else {
                assert_eq!(signature.len(), long, "{algorithm} {scheme}");
            }
            assert!(check(&public, message, &signature));
            assert!(!check(&other, message, &signature));
            assert!(!check(&public, SignInput::Message(b"massage"), &signature));
            assert!(!check(&public, SignInput::Message(b""), &signature));
            for at in (0..signature.len()).step_by(signature.len().div_ceil(150)) {
                let mut changed = signature.clone();
                changed[at] ^= 1;
                assert!(!check(&public, message, &changed), "{algorithm} {scheme} changed at {at}");
                assert!(
                    !check(&public, message, &signature[..at]),
                    "{algorithm} {scheme} cut at {at}"
                );
            }
            let longer = [&signature[..], &[0]].concat();
            for malformed in [&b""[..], b"\0", &[0x30], &[0xff; 5000], &longer] {
                assert!(!check(&public, message, malformed), "{algorithm} {scheme}");
            }
            // A digest stands for the message that it is of.
            if let Some(by) = scheme.digest() {
                let digest = digest::digest(by, b"message");
                assert_eq!(scheme.digest_len(), Some(digest.as_ref().len()));
                let digest = SignInput::Digest(digest.as_ref());
                assert!(check(&public, digest, &signature));
                let signature = pair.sign(scheme, digest).unwrap();
                assert!(check(&public, message, &signature) && check(&public, digest, &signature));
            } else {
                assert_eq!(scheme.digest_len(), None);
            }
            for len in [0, 20, 31, 32, 33, 48, 64, 128] {
                if scheme.digest_len() != Some(len) {
                    let digest = vec![1; len];
                    is_input(pair.sign(scheme, SignInput::Digest(&digest)), "digest");
                    is_input(
                        verify(algorithm, scheme, &public, SignInput::Digest(&digest), &signature),
                        "digest",
                    );
                }
            }
            let empty = pair.sign(scheme, SignInput::Message(b"")).unwrap();
            assert!(check(&public, SignInput::Message(b""), &empty));
        }
    }
}

/// r and s with leading zeros keep their place.
#[test]
fn fixed_length_signatures_are_padded() {
    let der = |r: &[u8], s: &[u8]| {
        let body = [&[2, r.len() as u8][..], r, &[2, s.len() as u8], s].concat();
        [&[0x30, body.len() as u8][..], &body].concat()
    };
    let expected = [&[0, 0, 0, 0x80][..], &[0, 0, 1, 2]].concat();
    assert_eq!(to_p1363(&der(&[0, 0x80], &[1, 2]), 4).unwrap(), expected);
    assert_eq!(to_p1363(&der(&[1, 2, 3, 4, 5], &[1]), 4), None);
    assert_eq!(to_p1363(&der(&[1], &[1])[..5], 4), None);
    assert_eq!(to_p1363(&[], 4), None);
    // Every 256th signature has a shorter r, and so has every 256th a shorter s.
    let (pair, public) = pair(Algorithm::EcdsaP256, Purpose::Sign);
    for count in 0u32..700 {
        let message = count.to_be_bytes();
        let input = SignInput::Message(&message);
        let scheme = SignatureScheme::EcdsaSha256P1363;
        let signature = pair.sign(scheme, input).unwrap();
        assert_eq!(verify(Algorithm::EcdsaP256, scheme, &public, input, &signature), Ok(true));
    }
}

#[test]
fn a_key_does_what_it_is_made_for() {
    for algorithm in Algorithm::ALL.iter().copied().filter(|a| a.is_asymmetric()) {
        let made = algorithm::generate(algorithm, GenerationParams::default()).unwrap();
        for purpose in Purpose::ALL {
            let pair = Pair::new(algorithm, purpose, &made.material);
            if !algorithm.serves(purpose) {
                assert_eq!(pair.unwrap_err(), WorkError::WrongPurpose { algorithm, purpose });
                continue;
            }
            let pair = pair.unwrap();
            assert_eq!((pair.algorithm(), pair.purpose()), (algorithm, purpose));
            assert_eq!(format!("{pair:?}"), format!("Pair({algorithm} to {purpose})"));
            let wrong = WorkError::WrongPurpose { algorithm, purpose };
            let scheme =
                SignatureScheme::default_for(algorithm).unwrap_or(SignatureScheme::Ed25519);
            let material = KeyMaterial::from_secret(vec![1]).unwrap();
            if purpose != Purpose::Sign {
                assert_eq!(pair.sign(scheme, SignInput::Message(b"")).unwrap_err(), wrong);
            }
            if purpose != Purpose::Encrypt {
                assert_eq!(pair.seal_raw(b"").unwrap_err(), wrong);
                assert_eq!(pair.open_raw(b"").unwrap_err(), wrong);
            }
            if purpose != Purpose::Wrap {
                assert_eq!(pair.wrap(&material).unwrap_err(), wrong);
                assert_eq!(pair.unwrap(b"").unwrap_err(), wrong);
            }
            if purpose != Purpose::Agree {
                assert_eq!(pair.agree(b"").unwrap_err(), wrong);
            }
            if purpose != Purpose::Encapsulate {
                assert_eq!(pair.decapsulate(b"").unwrap_err(), wrong);
            }
        }
        let junk = KeyMaterial::from_secret(vec![0x30; 100]).unwrap();
        let refused = Pair::new(algorithm, algorithm.default_purpose(), &junk).unwrap_err();
        assert_eq!(refused, WorkError::Material(algorithm));
    }
}

#[test]
fn rsa_encrypts_up_to_its_limit() {
    for (algorithm, modulus) in
        [(Algorithm::Rsa2048, 256), (Algorithm::Rsa3072, 384), (Algorithm::Rsa4096, 512)]
    {
        let made = algorithm::generate(algorithm, GenerationParams::default()).unwrap();
        let public = made.public.unwrap();
        let encrypt = Pair::new(algorithm, Purpose::Encrypt, &made.material).unwrap();
        let wrap = Pair::new(algorithm, Purpose::Wrap, &made.material).unwrap();
        for len in [0, 1, modulus - 66] {
            let plaintext = vec![7; len];
            for sealed in [
                encrypt.seal_raw(&plaintext).unwrap(),
                encrypt_to(algorithm, &public, &plaintext).unwrap(),
            ] {
                assert_eq!(sealed.len(), modulus);
                assert_eq!(encrypt.open_raw(&sealed).unwrap().as_slice(), plaintext);
            }
            if len > 0 {
                let key = KeyMaterial::from_secret(plaintext.clone()).unwrap();
                let wrapped = wrap.wrap(&key).unwrap();
                assert_eq!(wrap.unwrap(&wrapped).unwrap().bytes(), plaintext);
            }
        }
        let long = vec![7; modulus - 65];
        is_input(encrypt.seal_raw(&long), "plaintext");
        is_input(encrypt_to(algorithm, &public, &long), "plaintext");
        is_input(wrap.wrap(&KeyMaterial::from_secret(long).unwrap()), "key_material");
        // One error for whatever does not open.
        let sealed = encrypt.seal_raw(b"plaintext").unwrap();
        let mut changed = sealed.clone();
        changed[modulus - 1] ^= 1;
        let other = pair(algorithm, Purpose::Encrypt).0.seal_raw(b"plaintext").unwrap();
        for broken in [&b""[..], &[0; 10], &changed, &other, &sealed[1..], &vec![0xff; modulus]] {
            assert_eq!(encrypt.open_raw(broken).unwrap_err(), WorkError::Failed);
            assert_eq!(wrap.unwrap(broken).unwrap_err(), WorkError::Failed);
        }
        // An empty secret is not a key.
        assert_eq!(wrap.unwrap(&encrypt.seal_raw(b"").unwrap()).unwrap_err(), WorkError::Failed);
    }
}

#[test]
fn both_sides_agree() {
    for algorithm in of_purpose(Purpose::Agree) {
        let (one, one_public) = pair(algorithm, Purpose::Agree);
        let (two, two_public) = pair(algorithm, Purpose::Agree);
        let secret = one.agree(&two_public.spki_der).unwrap();
        let length = match algorithm {
            Algorithm::EcdhP384 => 48,
            Algorithm::EcdhP521 => 66,
            _ => 32,
        };
        assert_eq!(secret.len(), length);
        assert_eq!(secret, two.agree(&one_public.spki_der).unwrap());
        assert_ne!(secret, one.agree(&one_public.spki_der).unwrap());
        for wrong in [&b""[..], &two_public.spki_der[1..], two_public.raw().unwrap()] {
            is_input(one.agree(wrong), "public_key");
        }
        for other in of_purpose(Purpose::Agree).filter(|other| *other != algorithm) {
            is_input(one.agree(&pair(other, Purpose::Agree).1.spki_der), "public_key");
        }
    }
    // A point of small order (RFC 7748, 6.1).
    let (pair, _) = pair(Algorithm::X25519, Purpose::Agree);
    let zero = PublicKey::from_raw(Algorithm::X25519, &[0; 32]).unwrap();
    is_input(pair.agree(&zero.spki_der), "public_key");
}

#[test]
fn what_is_encapsulated_is_decapsulated() {
    for algorithm in of_purpose(Purpose::Encapsulate) {
        let (one, public) = pair(algorithm, Purpose::Encapsulate);
        let (two, _) = pair(algorithm, Purpose::Encapsulate);
        let (ciphertext, secret) = encapsulate(algorithm, &public).unwrap();
        let lengths = match algorithm {
            Algorithm::MlKem768 => (1088, 32),
            Algorithm::MlKem1024 => (1568, 32),
            _ => (1120, 64),
        };
        assert_eq!((ciphertext.len(), secret.len()), lengths);
        assert_eq!(one.decapsulate(&ciphertext).unwrap(), secret);
        assert_ne!(two.decapsulate(&ciphertext).unwrap(), secret);
        assert_ne!(encapsulate(algorithm, &public).unwrap().1, secret);
        for at in (0..ciphertext.len()).step_by(41).chain([ciphertext.len() - 32]) {
            let mut changed = ciphertext.clone();
            changed[at] ^= 1;
            assert_ne!(one.decapsulate(&changed).unwrap(), secret, "{algorithm} changed at {at}");
        }
        let longer = [&ciphertext[..], &[0]].concat();
        for wrong in [&b""[..], &ciphertext[1..], &longer, &ciphertext[..31]] {
            is_input(one.decapsulate(wrong), "ciphertext");
        }
        for other in of_purpose(Purpose::Encapsulate).filter(|other| *other != algorithm) {
            is_input(encapsulate(other, &public), "public_key");
        }
    }
    // The hybrid is ML-KEM-768 first, then X25519, in keys, ciphertexts and secrets.
    let made = algorithm::generate(Algorithm::X25519MlKem768, GenerationParams::default()).unwrap();
    let public = made.public.unwrap();
    let (kem, curve) = public.raw().unwrap().split_at(1184);
    let kem = PublicKey::from_raw(Algorithm::MlKem768, kem).unwrap();
    let (ciphertext, lattice) = encapsulate(Algorithm::MlKem768, &kem).unwrap();
    let (other, other_public) = pair(Algorithm::X25519, Purpose::Agree);
    let curve =
        other.agree(&PublicKey::from_raw(Algorithm::X25519, curve).unwrap().spki_der).unwrap();
    let pair = Pair::new(Algorithm::X25519MlKem768, Purpose::Encapsulate, &made.material).unwrap();
    let ciphertext = [&ciphertext[..], other_public.raw().unwrap()].concat();
    assert_eq!(pair.decapsulate(&ciphertext).unwrap().as_slice(), [&lattice[..], &curve].concat());
    let small = [&ciphertext[..1088], &[0; 32]].concat();
    assert_eq!(pair.decapsulate(&small).unwrap_err(), WorkError::Failed);
}

#[test]
fn a_public_key_of_another_type_does_nothing() {
    let (pair, public) = pair(Algorithm::EcdsaP256, Purpose::Sign);
    let scheme = SignatureScheme::EcdsaSha256;
    let input = SignInput::Message(b"message");
    let signature = pair.sign(scheme, input).unwrap();
    is_input(verify(Algorithm::EcdsaSecp256k1, scheme, &public, input, &signature), "public_key");
    // The same bytes as a key for agreement.
    let agreement = PublicKey::from_spki(Algorithm::EcdhP256, &public.spki_der).unwrap();
    is_input(verify(Algorithm::EcdsaP256, scheme, &agreement, input, &signature), "public_key");
    let claimed =
        PublicKey { algorithm: Algorithm::EcdsaSecp256k1, spki_der: public.spki_der.clone() };
    is_input(verify(Algorithm::EcdsaSecp256k1, scheme, &claimed, input, &signature), "public_key");
    let nothing = PublicKey { algorithm: Algorithm::EcdsaP256, spki_der: Vec::new() };
    is_input(verify(Algorithm::EcdsaP256, scheme, &nothing, input, &signature), "public_key");
    is_input(encrypt_to(Algorithm::EcdsaP256, &public, b""), "public_key");
    is_input(encapsulate(Algorithm::EcdsaP256, &public), "public_key");
    is_input(verify(Algorithm::Aes256, scheme, &public, input, &signature), "scheme");
}
