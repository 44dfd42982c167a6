//! Every asymmetric key in all its forms, there and back, and with every byte changed.

use std::sync::OnceLock;

use aws_lc_rs::encoding::{AsBigEndian, AsRawBytes, EcPrivateKeyBin};
use aws_lc_rs::signature::{KeyPair, PqdsaKeyPair};
use data_encoding::BASE64URL_NOPAD;
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use serde_json::{Value, json};

use super::*;
use crate::import::import_jwk;
use crate::work::{SignInput, SignatureScheme, encapsulate, verify};

fn asymmetric() -> impl Iterator<Item = Algorithm> {
    Algorithm::ALL.iter().copied().filter(|a| a.is_asymmetric())
}

/// One key of each type for all the tests, as making an RSA key takes a second; its stored form and its public part.
fn key(algorithm: Algorithm) -> (KeyMaterial, PublicKey) {
    static KEYS: OnceLock<Vec<(Algorithm, Vec<u8>, PublicKey)>> = OnceLock::new();
    let keys = KEYS.get_or_init(|| {
        asymmetric()
            .map(|algorithm| {
                let made = generate(algorithm, GenerationParams::default()).unwrap();
                (algorithm, made.material.bytes().to_vec(), made.public.unwrap())
            })
            .collect()
    });
    let (_, bytes, public) = keys.iter().find(|(a, ..)| *a == algorithm).unwrap();
    (material(bytes), public.clone())
}

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

fn text(bytes: &[u8]) -> String {
    BASE64URL_NOPAD.encode(bytes)
}

/// The private key as a JSON Web Key, where it has one and this library's parts suffice to write it.
fn private_jwk(algorithm: Algorithm, stored: &KeyMaterial, public: &PublicKey) -> Option<Value> {
    let mut jwk = public.to_jwk().ok()?;
    match Family::of(algorithm) {
        Family::Ec => {
            let pair = ec::parse(algorithm, stored).unwrap();
            let scalar: EcPrivateKeyBin<'_> = pair.private_key().as_be_bytes().unwrap();
            jwk["d"] = json!(text(scalar.as_ref()));
        }
        Family::Ed25519 => jwk["d"] = json!(text(&stored.bytes()[16..])),
        Family::X25519 => jwk["d"] = json!(text(curve25519::bytes_x25519(stored).unwrap())),
        Family::MlDsa => jwk["priv"] = json!(text(&stored.bytes()[stored.len() - 32..])),
        Family::Rsa => {
            for (name, number) in
                ["d", "p", "q", "dp", "dq", "qi"].iter().zip(rsa_numbers(stored.bytes()))
            {
                jwk[name] = json!(text(&number));
            }
        }
        _ => return None,
    }
    Some(jwk)
}

/// d, p, q and the rest of an RSAPrivateKey in PKCS#8 (RFC 8017, A.1.2).
fn rsa_numbers(pkcs8: &[u8]) -> Vec<Vec<u8>> {
    // 33 bytes up to n, e and then these.
    let mut rest = &pkcs8[33..];
    let mut numbers = Vec::new();
    while let [2, head @ ..] = rest {
        let (len, tail) = match head {
            [0x82, a, b, tail @ ..] => (usize::from(*a) << 8 | usize::from(*b), tail),
            [0x81, a, tail @ ..] => (usize::from(*a), tail),
            [a, tail @ ..] => (usize::from(*a), tail),
            [] => panic!("cut"),
        };
        let (number, tail) = tail.split_at(len);
        numbers.push(number.iter().copied().skip_while(|b| *b == 0).collect());
        rest = tail;
    }
    assert_eq!(numbers.len(), 8);
    numbers.split_off(2)
}

#[test]
fn every_key_goes_round_in_every_form() {
    for algorithm in asymmetric() {
        let (stored, public) = key(algorithm);
        assert_eq!(public.algorithm, algorithm);
        assert_eq!(public_key(algorithm, &stored).unwrap().unwrap(), public, "{algorithm}");
        let again = import(algorithm, material(stored.bytes())).unwrap();
        assert_eq!(again.material.bytes(), stored.bytes(), "{algorithm} is stored in one form");
        assert_eq!(again.public.unwrap(), public);
        assert_eq!(PublicKey::from_spki(algorithm, &public.spki_der).unwrap(), public);
        assert_eq!(PublicKey::from_record(algorithm, &public.spki_der).unwrap(), public);

        if algorithm == Algorithm::X25519MlKem768 {
            assert_eq!((public.spki_der.len(), stored.len()), (1216, 2432));
            assert!(matches!(public.to_pem(), Err(PublicKeyError::NoSuchForm { .. })));
            let refused = PublicKey::from_pem(algorithm, "");
            assert!(matches!(refused, Err(PublicKeyError::NoSuchForm { .. })));
        } else {
            let pem = public.to_pem().unwrap();
            assert!(
                pem.starts_with("-----BEGIN PUBLIC KEY-----\n")
                    && pem.ends_with("-----END PUBLIC KEY-----\n")
            );
            assert!(pem.lines().all(|line| line.len() <= 64));
            assert_eq!(PublicKey::from_pem(algorithm, &pem).unwrap(), public);
            assert_eq!(PublicKey::from_pem(algorithm, &pem.replace('\n', "\r\n")).unwrap(), public);
            for wrong in
                [pem.replace("PUBLIC", "RSA PUBLIC"), pem.replace('M', "-"), pem[1..].to_owned()]
            {
                assert!(PublicKey::from_pem(algorithm, &wrong).is_err());
            }
            let private = pem.replace("PUBLIC", "PRIVATE");
            assert_eq!(PublicKey::from_pem(algorithm, &private), Err(PublicKeyError::Private));
        }

        let Ok(jwk) = public.to_jwk() else {
            assert!(matches!(Family::of(algorithm), Family::MlKem));
            assert!(matches!(
                PublicKey::from_jwk(algorithm, "{}"),
                Err(PublicKeyError::NoSuchForm { .. })
            ));
            assert!(
                import_jwk(algorithm, r#"{"kty":"AKP","alg":"ML-KEM-768","priv":"AA","pub":"AA"}"#)
                    .is_err()
            );
            continue;
        };
        assert_eq!(PublicKey::from_jwk(algorithm, &jwk.to_string()).unwrap(), public);
        let private = private_jwk(algorithm, &stored, &public).unwrap();
        let made = import_jwk(algorithm, &private.to_string()).unwrap();
        assert_eq!(made.material.bytes(), stored.bytes(), "{algorithm} by JWK");
        assert_eq!(made.public.unwrap(), public);
        let refused = PublicKey::from_jwk(algorithm, &private.to_string());
        assert_eq!(refused, Err(PublicKeyError::Private), "{algorithm}");
    }
}

#[test]
fn a_key_is_of_its_own_type_alone() {
    // The same curve serves signatures and agreement, with one encoding (RFC 5480).
    let curve = |a: Algorithm| match a {
        Algorithm::EcdhP256 => Algorithm::EcdsaP256,
        Algorithm::EcdhP384 => Algorithm::EcdsaP384,
        Algorithm::EcdhP521 => Algorithm::EcdsaP521,
        other => other,
    };
    for algorithm in asymmetric() {
        let (stored, public) = key(algorithm);
        for other in asymmetric().filter(|other| curve(*other) != curve(algorithm)) {
            let refused = import(other, material(stored.bytes())).unwrap_err();
            assert_eq!(refused, AlgorithmError::NotAKey(other), "{algorithm} as {other}");
            assert!(public_key(other, &stored).is_err(), "{algorithm} as {other}");
            let refused = PublicKey::from_spki(other, &public.spki_der).unwrap_err();
            assert_eq!(refused, PublicKeyError::Malformed(other), "{algorithm} as {other}");
            if let Ok(jwk) = public.to_jwk() {
                assert!(PublicKey::from_jwk(other, &jwk.to_string()).is_err());
                let jwk = private_jwk(algorithm, &stored, &public).unwrap();
                assert!(import_jwk(other, &jwk.to_string()).is_err(), "{algorithm} as {other}");
            }
        }
    }
}

/// Random bytes whose seed is printed, or given in POLYKEY_TEST_SEED.
fn randomness() -> TestRng {
    let seed = std::env::var("POLYKEY_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from_le_bytes(crate::random::array().unwrap()));
    println!("POLYKEY_TEST_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

/// Whether what one half makes, the other half takes.
fn halves_belong(algorithm: Algorithm, stored: &KeyMaterial, public: &PublicKey) -> bool {
    let purpose = algorithm.default_purpose();
    let pair = Pair::new(algorithm, purpose, stored).unwrap();
    match purpose {
        Purpose::Sign => {
            let scheme = SignatureScheme::default_for(algorithm).unwrap();
            let input = SignInput::Message(b"a message");
            let signature = pair.sign(scheme, input).unwrap();
            verify(algorithm, scheme, public, input, &signature).unwrap()
        }
        Purpose::Agree => {
            let (other, other_public) = key(algorithm);
            let other = Pair::new(algorithm, purpose, &other).unwrap();
            pair.agree(&other_public.spki_der) == other.agree(&public.spki_der)
        }
        _ => {
            let (ciphertext, secret) = encapsulate(algorithm, public).unwrap();
            pair.decapsulate(&ciphertext) == Ok(secret)
        }
    }
}

/// With every byte of a stored key changed there is no panic, and what is still a key is one of the same type whose
/// halves belong together.
#[test]
fn changed_pkcs8_is_no_key_of_another_type() {
    let mut rng = randomness();
    // The RSA types share their code; a check of a pair of 4096 bits takes milliseconds.
    for algorithm in asymmetric().filter(|a| !matches!(a, Algorithm::Rsa3072 | Algorithm::Rsa4096))
    {
        let (stored, public) = key(algorithm);
        let (mut refused, mut other) = (0, 0);
        for at in 0..stored.len() {
            let mut changed = stored.bytes().to_vec();
            changed[at] ^= 1 << (rng.next_u32() % 8);
            match import(algorithm, material(&changed)) {
                Err(_) => refused += 1,
                Ok(made) => {
                    other += 1;
                    let made_public = made.public.unwrap();
                    assert_eq!(made_public.algorithm, algorithm);
                    // These hold their public part too, to which the private one is held.
                    if matches!(Family::of(algorithm), Family::Rsa | Family::Ec) {
                        assert_eq!(made_public, public, "{algorithm} at {at}");
                    }
                    assert!(
                        PublicKey::from_spki(algorithm, &made_public.spki_der).is_ok(),
                        "{algorithm} at {at}"
                    );
                    assert!(
                        halves_belong(algorithm, &made.material, &made_public),
                        "{algorithm} at {at}"
                    );
                    let again = import(algorithm, made.material).unwrap().public.unwrap();
                    assert_eq!(again, made_public);
                }
            }
            let cut = stored.bytes()[..at].to_vec();
            if at > 0 {
                assert!(import(algorithm, material(&cut)).is_err(), "{algorithm} cut at {at}");
            }
        }
        println!("{algorithm}: {refused} changes refused, {other} left or made a key of its type");
    }
}

#[test]
fn changed_public_keys_are_refused_or_sound() {
    let mut rng = randomness();
    for algorithm in asymmetric() {
        let (_, public) = key(algorithm);
        let (mut refused, mut other) = (0, 0);
        for at in 0..public.spki_der.len() {
            let mut changed = public.spki_der.clone();
            changed[at] ^= 1 << (rng.next_u32() % 8);
            match PublicKey::from_spki(algorithm, &changed) {
                Ok(key) => {
                    other += 1;
                    assert_eq!((key.algorithm, &key.spki_der), (algorithm, &changed));
                    // Nothing of the frame around the key has changed.
                    assert_eq!(PublicKey::from_raw(algorithm, key.raw().unwrap()).unwrap(), key);
                }
                Err(e) => {
                    refused += 1;
                    assert_eq!(e, PublicKeyError::Malformed(algorithm));
                }
            }
            assert!(PublicKey::from_spki(algorithm, &public.spki_der[..at]).is_err());
        }
        let longer = [&public.spki_der[..], &[0]].concat();
        assert!(PublicKey::from_spki(algorithm, &longer).is_err());
        println!("{algorithm}: {refused} changes refused, {other} gave another sound key");
    }
}

#[test]
fn changed_json_web_keys_are_refused_or_whole() {
    let mut rng = randomness();
    for algorithm in asymmetric().filter(|a| !matches!(a, Algorithm::Rsa3072 | Algorithm::Rsa4096))
    {
        let (stored, public) = key(algorithm);
        let Some(jwk) = private_jwk(algorithm, &stored, &public) else { continue };
        let (jwk, public_jwk) = (jwk.to_string(), public.to_jwk().unwrap().to_string());
        for at in 0..jwk.len() {
            let mut changed = jwk.clone().into_bytes();
            changed[at] ^= 1 << (rng.next_u32() % 7);
            if let Ok(text) = std::str::from_utf8(&changed)
                && let Ok(made) = import_jwk(algorithm, text)
            {
                assert_eq!(made.public.unwrap(), public, "{algorithm} at {at}: {text}");
                // X25519 has five bits of a private key that do not count (RFC 7748, 5).
                if algorithm != Algorithm::X25519 {
                    assert_eq!(made.material.bytes(), stored.bytes(), "{algorithm} at {at}");
                }
            }
            let _ = import_jwk(algorithm, &jwk[..at]).map(|_| panic!("cut at {at}"));
        }
        for at in 0..public_jwk.len() {
            let mut changed = public_jwk.clone().into_bytes();
            changed[at] ^= 1 << (rng.next_u32() % 7);
            if let Ok(text) = std::str::from_utf8(&changed)
                && let Ok(key) = PublicKey::from_jwk(algorithm, text)
            {
                assert_eq!(PublicKey::from_spki(algorithm, &key.spki_der).unwrap(), key);
            }
        }
    }
}

#[test]
fn json_web_keys_are_strict() {
    let (stored, public) = key(Algorithm::EcdsaP256);
    let good = private_jwk(Algorithm::EcdsaP256, &stored, &public).unwrap();
    let with = |name: &str, value: Value| {
        let mut jwk = good.clone();
        jwk[name] = value;
        jwk.to_string()
    };
    let import = |jwk: &str| import_jwk(Algorithm::EcdsaP256, jwk);
    for fine in [
        with("kid", json!("2026-\u{e9}\n")),
        with("key_ops", json!(["sign"])),
        with("ext", json!(true)),
    ] {
        assert!(import(&fine).is_ok(), "{fine}");
    }
    let (other, _) = key(Algorithm::EcdhP256);
    let other = text(&other.bytes()[36..68]);
    let d = good["d"].as_str().unwrap();
    for wrong in [
        with("kty", json!("OKP")),
        with("crv", json!("P-384")),
        with("d", json!(other)),
        with("d", json!(format!("{d}="))),
        with("d", json!(format!("AA{d}"))),
        with("d", json!(&d[2..])),
        with("d", json!(text(&[0; 32]))),
        with("d", json!(text(&[0xff; 32]))),
        with("d", Value::Null),
        with("d", json!(1)),
        with("x", json!(format!(" {}", good["x"].as_str().unwrap()))),
        good.to_string().replacen("\"d\":\"", "\"d\":\"\\u0041", 1),
        good.to_string().replacen('{', &format!("{{\"d\":\"{d}\","), 1),
        format!("{good} x"),
        "[]".to_owned(),
        String::new(),
        "[".repeat(100_000),
    ] {
        assert_eq!(import(&wrong).unwrap_err(), AlgorithmError::NotAKey(Algorithm::EcdsaP256));
    }
    // Base64url has one text for each value: unused bits are zero.
    let last = if d.ends_with('A') { 'B' } else { char::from(d.as_bytes()[42] + 1) };
    assert!(import(&with("d", json!(format!("{}{last}", &d[..42])))).is_err());

    for algorithm in Algorithm::ALL.iter().copied().filter(|a| !a.is_asymmetric()) {
        let made = generate(algorithm, GenerationParams::default()).unwrap();
        let jwk = json!({ "kty": "oct", "k": text(made.material.bytes()) }).to_string();
        let again = import_jwk(algorithm, &jwk).unwrap();
        assert_eq!(again.material.bytes(), made.material.bytes());
        if algorithm != Algorithm::ApiKey {
            let longer = [made.material.bytes(), &[0]].concat();
            let jwk = json!({ "kty": "oct", "k": text(&longer) }).to_string();
            assert_eq!(
                import_jwk(algorithm, &jwk).unwrap_err(),
                AlgorithmError::NotAKey(algorithm)
            );
        }
        assert!(import_jwk(algorithm, r#"{"kty":"oct","k":""}"#).is_err());
    }

    // X25519 has five bits of a private key that do not count (RFC 7748, 5): the same key.
    let (stored, public) = key(Algorithm::X25519);
    let mut private = *curve25519::bytes_x25519(&stored).unwrap();
    private[0] ^= 7;
    private[31] ^= 0xc0;
    let mut jwk = public.to_jwk().unwrap();
    jwk["d"] = json!(text(&private));
    assert_eq!(import_jwk(Algorithm::X25519, &jwk.to_string()).unwrap().public.unwrap(), public);

    // An RSA key must be whole.
    let (stored, public) = key(Algorithm::Rsa2048);
    let good = private_jwk(Algorithm::Rsa2048, &stored, &public).unwrap();
    for name in ["n", "e", "d", "p", "q", "dp", "dq", "qi"] {
        let mut jwk = good.clone();
        jwk.as_object_mut().unwrap().remove(name);
        assert!(import_jwk(Algorithm::Rsa2048, &jwk.to_string()).is_err(), "without {name}");
    }
    let mut jwk = good.clone();
    jwk["oth"] = json!([]);
    assert!(import_jwk(Algorithm::Rsa2048, &jwk.to_string()).is_err());
    let mut jwk = public.to_jwk().unwrap();
    jwk["e"] = json!("AAEAAQ");
    assert!(PublicKey::from_jwk(Algorithm::Rsa2048, &jwk.to_string()).is_err());
}

/// The other forms of RFC 9935, RFC 9881 and RFC 5958 lead to the stored one.
#[test]
fn every_standard_private_form_is_taken() {
    let seed = [7; 64];
    for (algorithm, arc) in [(Algorithm::MlKem768, 2), (Algorithm::MlKem1024, 3)] {
        let oid = [0x30, 0x0b, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 4, arc];
        let from_seed = [&[0x30, 84, 2, 1, 0][..], &oid, &[4, 66, 0x80, 64], &seed].concat();
        let made = import(algorithm, material(&from_seed)).unwrap();
        let expanded = made.material.bytes();
        let key = &expanded[28..];
        let head = |tag: u8, len: usize| [tag, 0x82, (len >> 8) as u8, len as u8];
        let both = |seed: &[u8]| {
            [
                &head(0x30, key.len() + 94)[..],
                &[2, 1, 0],
                &oid,
                &head(4, key.len() + 74),
                &head(0x30, key.len() + 70),
                &[4, 64],
                seed,
                &head(4, key.len()),
                key,
            ]
            .concat()
        };
        let again = import(algorithm, material(&both(&seed))).unwrap();
        assert_eq!(again.material.bytes(), expanded);
        assert!(import(algorithm, material(&both(&[8; 64]))).is_err(), "a seed of another key");
        // The hash of the encapsulation key (FIPS 203, 7.3).
        let mut changed = expanded.to_vec();
        let at = changed.len() - 40;
        changed[at] ^= 1;
        assert!(import(algorithm, material(&changed)).is_err());
    }

    for algorithm in [Algorithm::MlDsa44, Algorithm::MlDsa65, Algorithm::MlDsa87] {
        let (stored, public) = key(algorithm);
        let pair = ml_dsa::parse(algorithm, &stored).unwrap();
        let raw = pair.private_key().as_raw_bytes().unwrap();
        let raw = raw.as_ref();
        let expanded = [&layout::expanded_prefix(algorithm, raw.len())[..], raw].concat();
        let made = import(algorithm, material(&expanded)).unwrap();
        assert_eq!(made.public.unwrap(), public);
        assert_eq!(made.material.bytes(), expanded, "kept without its seed");
        let pair = PqdsaKeyPair::from_pkcs8(pair.algorithm(), &expanded).unwrap();
        assert_eq!(pair.public_key().as_ref(), public.raw().unwrap());
    }

    let (stored, public) = key(Algorithm::X25519);
    let private = curve25519::bytes_x25519(&stored).unwrap();
    let version_2 =
        |public: &[u8]| [layout::X25519_PKCS8_V2, private, layout::X25519_PUBLIC, public].concat();
    let made = import(Algorithm::X25519, material(&version_2(public.raw().unwrap()))).unwrap();
    assert_eq!(made.material.bytes(), stored.bytes());
    assert!(import(Algorithm::X25519, material(&version_2(&[9; 32]))).is_err());
}

#[test]
fn unsound_public_keys_are_refused() {
    let spki = |algorithm, raw: &[u8]| PublicKey::from_raw(algorithm, raw).unwrap().spki_der;
    let refused = |algorithm, raw: &[u8]| {
        let refused = PublicKey::from_spki(algorithm, &spki(algorithm, raw));
        assert_eq!(refused, Err(PublicKeyError::Malformed(algorithm)), "{algorithm} {raw:?}");
    };
    // Points of small order, among them a non-canonical one: 0, 1, p - 1, p, and two of order 8 (RFC 7748, 6.1).
    for point in [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ] {
        let point = data_encoding::HEXLOWER.decode(point.as_bytes()).unwrap();
        refused(Algorithm::X25519, &point);
        let (_, hybrid) = key(Algorithm::X25519MlKem768);
        refused(Algorithm::X25519MlKem768, &[&hybrid.raw().unwrap()[..1184], &point].concat());
    }
    // The neutral point, one of order 4, and no point at all (RFC 8032).
    let mut neutral = [0; 32];
    neutral[0] = 1;
    refused(Algorithm::Ed25519, &neutral);
    refused(Algorithm::Ed25519, &[0; 32]);
    let mut none = [0; 32];
    none[0] = 2;
    refused(Algorithm::Ed25519, &none);
    for (algorithm, len) in [
        (Algorithm::EcdsaP256, 64),
        (Algorithm::EcdsaP384, 96),
        (Algorithm::EcdsaP521, 132),
        (Algorithm::EcdsaSecp256k1, 64),
        (Algorithm::EcdhP256, 64),
        (Algorithm::EcdhP384, 96),
        (Algorithm::EcdhP521, 132),
    ] {
        refused(algorithm, &vec![0; len]);
        refused(algorithm, &vec![1; len]);
        refused(algorithm, &vec![0xff; len]);
    }
    // An even modulus, and one of fewer bits in as many bytes.
    let (_, public) = key(Algorithm::Rsa2048);
    let mut even = public.raw().unwrap().to_vec();
    even[255] &= 0xfe;
    refused(Algorithm::Rsa2048, &even);
    let mut small = public.raw().unwrap().to_vec();
    small[0] &= 0x7f;
    refused(Algorithm::Rsa2048, &small);
    // Coefficients that are not below the modulus (FIPS 203, 7.2).
    for (algorithm, len) in [(Algorithm::MlKem768, 1184), (Algorithm::MlKem1024, 1568)] {
        refused(algorithm, &vec![0xff; len]);
    }
}

#[test]
fn rsa_takes_its_own_lengths_and_exponent_alone() {
    use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
    let larger = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa3072).unwrap();
    let pkcs8: Pkcs8V1Der<'_> = larger.as_der().unwrap();
    assert!(import(Algorithm::Rsa3072, material(pkcs8.as_ref())).is_ok());
    for other in [Algorithm::Rsa2048, Algorithm::Rsa4096] {
        let refused = import(other, material(pkcs8.as_ref())).unwrap_err();
        assert_eq!(refused, AlgorithmError::NotAKey(other));
    }
    // A sound key of 2048 bits whose public exponent is 3 (made with OpenSSL).
    let three = include_bytes!("../../tests/vectors/rsa-2048-e3.pkcs8.der");
    assert!(aws_lc_rs::rsa::KeyPair::from_pkcs8(three).is_ok());
    let refused = import(Algorithm::Rsa2048, material(three)).unwrap_err();
    assert_eq!(refused, AlgorithmError::NotAKey(Algorithm::Rsa2048));
}
