//! Keys of every algorithm: made, read back, taken over and refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_ASN1_SIGNING,
    EcdsaKeyPair, RSA_PSS_2048_8192_SHA384, RSA_PSS_SHA384, RsaKeyPair, UnparsedPublicKey,
};
use polykey_hsm::algorithm::{AlgorithmError, generate, import, public_key};
use polykey_hsm::{Algorithm, GenerationParams, KeyMaterial};

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

/// In the order of the table.
const CODES: [(u16, &str); 29] = [
    (1, "aes-256"),
    (2, "api-key"),
    (3, "ecdsa-p384"),
    (4, "rsa-4096"),
    (16, "aes-128"),
    (17, "aes-256-gcm"),
    (18, "aes-128-gcm"),
    (19, "chacha20-poly1305"),
    (20, "xchacha20-poly1305"),
    (32, "hmac-sha256"),
    (33, "hmac-sha384"),
    (34, "hmac-sha512"),
    (40, "hkdf-sha256"),
    (48, "rsa-2048"),
    (49, "rsa-3072"),
    (56, "ecdsa-p256"),
    (57, "ecdsa-p521"),
    (58, "ecdsa-secp256k1"),
    (59, "ed25519"),
    (64, "x25519"),
    (65, "ecdh-p256"),
    (66, "ecdh-p384"),
    (67, "ecdh-p521"),
    (72, "ml-kem-768"),
    (73, "ml-kem-1024"),
    (74, "x25519-ml-kem-768"),
    (80, "ml-dsa-44"),
    (81, "ml-dsa-65"),
    (82, "ml-dsa-87"),
];

#[test]
fn codes_and_names_never_change() {
    let table: Vec<_> = Algorithm::ALL.iter().map(|a| (a.code(), a.name())).collect();
    assert_eq!(table, CODES);
    for (code, name) in table {
        assert_eq!(Algorithm::from_code(code), Algorithm::from_name(name));
    }
    assert_eq!((Algorithm::from_code(0), Algorithm::from_code(5)), (None, None));
    assert_eq!(Algorithm::from_name("AES-256"), None);
}

#[test]
fn an_ecdsa_key_signs_what_its_public_part_verifies() {
    let made = generate(Algorithm::EcdsaP384, GenerationParams::default()).unwrap();
    let public = made.public.unwrap();
    assert_eq!(public_key(Algorithm::EcdsaP384, &made.material).unwrap().unwrap(), public);
    let pkcs8 = made.material.expose_for_export();
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &pkcs8).unwrap();
    let signature = pair.sign(&SystemRandom::new(), b"message").unwrap();
    let verifier = UnparsedPublicKey::new(&ECDSA_P384_SHA384_ASN1, &public.spki_der);
    verifier.verify(b"message", signature.as_ref()).unwrap();
    assert!(verifier.verify(b"massage", signature.as_ref()).is_err());
    // SubjectPublicKeyInfo of secp384r1 (RFC 5480), uncompressed.
    assert_eq!(public.spki_der.len(), 120);
    assert!(public.spki_der.starts_with(&[0x30, 0x76, 0x30, 0x10, 0x06, 0x07]));
}

#[test]
fn an_rsa_key_signs_what_its_public_part_verifies() {
    let made = generate(Algorithm::Rsa4096, GenerationParams::default()).unwrap();
    let public = made.public.unwrap();
    assert_eq!(public_key(Algorithm::Rsa4096, &made.material).unwrap().unwrap(), public);
    let pair = RsaKeyPair::from_pkcs8(&made.material.expose_for_export()).unwrap();
    assert_eq!(pair.public_modulus_len(), 512);
    let mut signature = vec![0; 512];
    pair.sign(&RSA_PSS_SHA384, &SystemRandom::new(), b"message", &mut signature).unwrap();
    let verifier = UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA384, &public.spki_der);
    verifier.verify(b"message", &signature).unwrap();
}

#[test]
fn symmetric_keys_have_no_public_part() {
    for algorithm in [Algorithm::Aes256, Algorithm::ApiKey] {
        let made = generate(algorithm, GenerationParams::default()).unwrap();
        assert_eq!(made.public, None);
        assert!(!algorithm.is_asymmetric());
    }
    let prefix = Some("acme".to_owned());
    let made = generate(Algorithm::ApiKey, GenerationParams { prefix, supplied: None }).unwrap();
    assert!(made.material.expose_for_export().starts_with(b"acme_"));
}

#[test]
fn only_an_api_key_takes_a_value_or_a_prefix() {
    for len in [1, 65_536] {
        let supplied = Some(material(&vec![b'v'; len]));
        let made =
            generate(Algorithm::ApiKey, GenerationParams { supplied, prefix: None }).unwrap();
        assert_eq!(made.material.expose_for_export().len(), len);
    }
    for &algorithm in Algorithm::ALL {
        let supplied = || Some(material(&[1; 32]));
        let prefix = || Some("pk".to_owned());
        let both = GenerationParams { supplied: supplied(), prefix: prefix() };
        assert!(generate(algorithm, both).is_err());
        if algorithm != Algorithm::ApiKey {
            let refused =
                generate(algorithm, GenerationParams { supplied: supplied(), prefix: None });
            assert_eq!(refused.unwrap_err(), AlgorithmError::SuppliedValue(algorithm));
            let refused =
                generate(algorithm, GenerationParams { supplied: None, prefix: prefix() });
            assert_eq!(refused.unwrap_err(), AlgorithmError::PrefixNotTaken);
        }
    }
}

#[test]
fn only_keys_are_taken_over() {
    let p256 = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
    let p256 = p256.to_pkcs8v1().unwrap();
    let rsa_2048: Pkcs8V1Der<'_> =
        RsaKeyPair::generate(KeySize::Rsa2048).unwrap().as_der().unwrap();
    let p384 = generate(Algorithm::EcdsaP384, GenerationParams::default()).unwrap();
    let p384 = p384.material.expose_for_export();
    let longer: Vec<u8> = p384.iter().copied().chain([0]).collect();
    for (algorithm, bytes) in [
        (Algorithm::Aes256, &[1; 31][..]),
        (Algorithm::Aes256, &[1; 33]),
        (Algorithm::EcdsaP384, &[1; 32]),
        (Algorithm::EcdsaP384, p256.as_ref()),
        (Algorithm::EcdsaP384, &p384[..p384.len() - 1]),
        (Algorithm::EcdsaP384, rsa_2048.as_ref()),
        (Algorithm::Rsa4096, rsa_2048.as_ref()),
        (Algorithm::Rsa4096, &p384),
        (Algorithm::Rsa4096, b"-----BEGIN PRIVATE KEY-----"),
    ] {
        let refused = import(algorithm, material(bytes)).unwrap_err();
        assert_eq!(refused, AlgorithmError::NotAKey(algorithm), "{} bytes", bytes.len());
    }
    assert!(import(Algorithm::Aes256, material(&[1; 32])).is_ok());
    assert!(import(Algorithm::EcdsaP384, material(&p384)).unwrap().public.is_some());
    assert!(import(Algorithm::ApiKey, material(b"\0")).is_ok());
    // The private half of one pair with the public half of another, which ends the encoding.
    let other = generate(Algorithm::EcdsaP384, GenerationParams::default()).unwrap();
    let other = other.material.expose_for_export();
    let at = p384.len() - 97;
    assert_eq!((p384[at], other[at]), (4, 4), "uncompressed points");
    let mixed = [&p384[..at], &other[at..]].concat();
    assert!(import(Algorithm::EcdsaP384, material(&mixed)).is_err());
    // Stray bytes behind a key are not kept.
    let trimmed = import(Algorithm::EcdsaP384, material(&longer)).unwrap();
    assert_eq!(trimmed.material.expose_for_export(), p384);
}
