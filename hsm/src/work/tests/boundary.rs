//! What the surface promises: purposes, round trips, forms, and that failure shows nothing.

use std::collections::HashSet;

use aes_gcm_siv::aead::KeyInit;
use aes_gcm_siv::{AeadInOut, Aes128GcmSiv, Aes256GcmSiv};
use data_encoding::HEXLOWER;

use super::super::aead::{Broken, Suite};
use super::*;
use crate::DecodeError;

fn refused<T: fmt::Debug>(result: Result<T, WorkError>, key: &WorkingKey) -> bool {
    let (algorithm, purpose) = (key.algorithm(), key.purpose());
    match result {
        Ok(_) => false,
        Err(error) => {
            assert_eq!(error, WorkError::WrongPurpose { algorithm, purpose });
            true
        }
    }
}

#[test]
fn a_key_does_what_it_was_made_for_and_nothing_else() {
    let other = KeyMaterial::from_secret(vec![9; 32]).unwrap();
    for &algorithm in Algorithm::ALL.iter().filter(|a| !a.is_asymmetric()) {
        for purpose in Purpose::ALL {
            let material = KeyMaterial::from_secret(vec![1; key_len(algorithm)]).unwrap();
            let key = match WorkingKey::new(algorithm, purpose, &material) {
                Ok(key) => key,
                Err(error) => {
                    assert!(!algorithm.serves(purpose) || purpose == Purpose::Credential);
                    assert_eq!(error, WorkError::WrongPurpose { algorithm, purpose });
                    continue;
                }
            };
            assert!(algorithm.serves(purpose));
            assert_eq!((key.algorithm(), key.purpose()), (algorithm, purpose));
            let encrypts = purpose == Purpose::Encrypt;
            assert_ne!(refused(key.seal(&BINDING, b""), &key), encrypts);
            assert_ne!(refused(key.seal_convergent(&BINDING, b""), &key), encrypts);
            assert_ne!(refused(key.seal_stream(&BINDING, ChunkSize::MIN), &key), encrypts);
            if !encrypts {
                assert!(refused(key.open(&BINDING, b""), &key));
                assert!(refused(key.open_stream(&BINDING, b""), &key));
            }
            let macs = purpose == Purpose::Mac;
            assert_ne!(refused(key.mac(b""), &key), macs);
            assert_ne!(refused(key.verify_mac(b"", b""), &key), macs);
            assert_ne!(refused(key.derive(b"", b"", 1), &key), purpose == Purpose::Derive);
            let wraps = purpose == Purpose::Wrap;
            assert_ne!(refused(key.wrap(&other), &key), wraps);
            if !wraps {
                assert!(refused(key.unwrap(b""), &key));
            }
        }
    }
}

#[test]
fn material_of_another_length_is_not_a_key() {
    for &algorithm in Algorithm::ALL.iter().filter(|a| !a.is_asymmetric()) {
        for &purpose in algorithm.purposes().iter().filter(|p| **p != Purpose::Credential) {
            let right = key_len(algorithm);
            for len in [1, right - 1, right + 1, 2 * right] {
                let material = KeyMaterial::from_secret(vec![1; len]).unwrap();
                let refused = WorkingKey::new(algorithm, purpose, &material).unwrap_err();
                assert_eq!(refused, WorkError::Material(algorithm), "{len}");
            }
        }
    }
}

#[test]
fn keys_go_between_threads_and_print_nothing_of_themselves() {
    fn shared<T: Send + Sync>() {}
    shared::<WorkingKey>();
    shared::<StreamSealer>();
    shared::<StreamOpener>();
    let material = KeyMaterial::from_secret(b"hunter2hunter2hunter2hunter2hunt".to_vec()).unwrap();
    let key = WorkingKey::new(Algorithm::Aes256, Purpose::Encrypt, &material).unwrap();
    let shown = "WorkingKey { algorithm: Aes256, purpose: Encrypt, .. }";
    assert_eq!(format!("{key:?}"), shown);
    let (header, mut sealer) = key.seal_stream(&BINDING, ChunkSize::MIN).unwrap();
    sealer.push(b"secret").unwrap();
    assert_eq!(format!("{sealer:?}"), "StreamSealer { chunks: 0, .. }");
    let opener = key.open_stream(&BINDING, &header).unwrap();
    assert_eq!(format!("{opener:?}"), "StreamOpener { chunks: 0, .. }");
}

#[test]
fn messages_come_back_at_every_length() {
    for algorithm in CIPHERS {
        let key = cipher_of(algorithm);
        for len in (0..100).chain([255, 256, 4095, 4096, 4097, 100_000]) {
            let plaintext: Vec<u8> = (0..len).map(|n| n as u8).collect();
            for blob in [
                key.seal(&BINDING, &plaintext).unwrap(),
                key.seal_convergent(&BINDING, &plaintext).unwrap(),
            ] {
                assert_eq!(blob.len(), len + MESSAGE_OVERHEAD);
                assert_eq!(*key.open(&BINDING, &blob).unwrap(), plaintext);
                let header = header(&blob).unwrap();
                assert_eq!(
                    header,
                    CiphertextHeader {
                        kind: CiphertextKind::Message,
                        format: 1,
                        key_id: BINDING.key_id,
                        version: BINDING.version,
                        algorithm,
                        chunk_size: None,
                        header_len: 90,
                        body_len: len + 16,
                        plaintext_len: Some(len),
                    }
                );
            }
        }
    }
}

/// 10,000 blobs of one plaintext: no salt, commitment or ciphertext comes twice.
#[test]
fn sealing_never_repeats_itself() {
    let key = cipher_of(Algorithm::Aes256);
    let mut seen = HashSet::new();
    for _ in 0..10_000 {
        let blob = key.seal(&BINDING, b"the same sixteen").unwrap();
        for part in [&blob[26..58], &blob[58..90], &blob[90..106]] {
            assert!(seen.insert(part.to_vec()));
        }
    }
}

#[test]
fn convergent_blobs_are_equal_where_everything_is_equal() {
    for algorithm in CIPHERS {
        let key = cipher_of(algorithm);
        let blob = key.seal_convergent(&BINDING, b"plaintext").unwrap();
        assert_eq!(key.seal_convergent(&BINDING, b"plaintext").unwrap(), blob);
        assert_eq!(cipher_of(algorithm).seal_convergent(&BINDING, b"plaintext").unwrap(), blob);
        let mut parts = HashSet::from([blob[26..58].to_vec()]);
        let mut differs = |blob: Vec<u8>| assert!(parts.insert(blob[26..58].to_vec()), "a salt");
        differs(key.seal_convergent(&BINDING, b"plaintexu").unwrap());
        differs(key.seal_convergent(&BINDING, b"plaintex").unwrap());
        differs(key.seal_convergent(&BINDING, b"").unwrap());
        for binding in [
            Binding { key_id: [0x12; 16], ..BINDING },
            Binding { version: 4, ..BINDING },
            Binding { context: b"contexu", ..BINDING },
            Binding { aad: b"aae", ..BINDING },
            Binding { context: b"contexta", aad: b"ad", ..BINDING },
            Binding { context: b"aad", aad: b"context", ..BINDING },
            Binding { context: b"", aad: b"contextaad", ..BINDING },
        ] {
            differs(key.seal_convergent(&binding, b"plaintext").unwrap());
        }
        let other = key_of(algorithm, Purpose::Encrypt, 2);
        differs(other.seal_convergent(&BINDING, b"plaintext").unwrap());
        differs(key.seal(&BINDING, b"plaintext").unwrap());
    }
}

/// What a failed opening leaves in the buffer, for each cipher and for each way in which it fails.
#[test]
fn no_byte_is_released_on_failure() {
    for algorithm in CIPHERS {
        let suite = Suite::of(algorithm).unwrap();
        let key = suite.key(&vec![7; suite.key_len()]).unwrap();
        let nonce = vec![3; suite.nonce_len()];
        let plaintext = [0x5a; 300];
        let mut body = plaintext.to_vec();
        let tag = key.seal(&nonce, b"aad", &mut body).unwrap();
        let sealed = [&body[..], &tag].concat();
        let mut out = [0xaa; 300];
        key.open(&nonce, b"aad", &sealed, &mut out).unwrap();
        assert_eq!(out, plaintext);
        let attempts = |sealed: &[u8], nonce: &[u8], aad: &[u8], len: usize| {
            let mut out = vec![0xaa; len];
            assert_eq!(key.open(nonce, aad, sealed, &mut out), Err(Broken));
            assert!(out.iter().all(|b| *b == 0), "{algorithm}: {out:02x?}");
        };
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            attempts(&changed, &nonce, b"aad", 300);
        }
        attempts(&sealed, &nonce, b"aae", 300);
        attempts(&sealed, &vec![4; suite.nonce_len()], b"aad", 300);
        attempts(&sealed, &nonce[1..], b"aad", 300);
        attempts(&sealed[..299], &nonce, b"aad", 283);
        attempts(&sealed[..15], &nonce, b"aad", 300);
        for len in [0, 299, 301] {
            attempts(&sealed, &nonce, b"aad", len);
        }
    }
}

/// A plaintext that cannot be sealed does not stay in the buffer of the ciphertext.
#[test]
fn no_byte_stays_where_sealing_fails() {
    for algorithm in CIPHERS {
        let suite = Suite::of(algorithm).unwrap();
        let key = suite.key(&vec![7; suite.key_len()]).unwrap();
        let mut body = [0x5a; 40];
        assert!(key.seal(&[0; 11], b"", &mut body).is_err());
        assert_eq!(body, [0; 40]);
    }
}

/// RFC 8452 appendix C through the library that serves callers; `cipher/tests.rs` has it for the sealer.
#[test]
fn rfc_8452_vectors_through_aws_lc() {
    const VECTORS: &str = include_str!("../../../tests/vectors/rfc8452-aes-256-gcm-siv.txt");
    let mut count = 0;
    for line in VECTORS.lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<Vec<u8>> = line
            .split(' ')
            .map(|f| if f == "-" { vec![] } else { HEXLOWER.decode(f.as_bytes()).unwrap() })
            .collect();
        let [key, nonce, aad, plaintext, sealed] = fields.try_into().unwrap();
        let key = Suite::of(Algorithm::Aes256).unwrap().key(&key).unwrap();
        let mut body = plaintext.clone();
        let tag = key.seal(&nonce, &aad, &mut body).unwrap();
        assert_eq!([&body[..], &tag].concat(), sealed, "{line}");
        let mut out = vec![0; plaintext.len()];
        key.open(&nonce, &aad, &sealed, &mut out).unwrap();
        assert_eq!(out, plaintext, "{line}");
        count += 1;
    }
    assert_eq!(count, 26);
}

/// Two implementations of AES-GCM-SIV that share no code: what one seals the other opens, and what one refuses the
/// other refuses.
#[test]
fn aws_lc_agrees_with_rust_crypto_on_aes_gcm_siv() {
    let seed = number("POLYKEY_SEED", 1);
    println!("seed {seed}");
    let mut choices = Choices(seed);
    for n in 0..2000 {
        let long = n % 2 == 0;
        let algorithm = if long { Algorithm::Aes256 } else { Algorithm::Aes128 };
        let suite = Suite::of(algorithm).unwrap();
        let key: Vec<u8> = (0..suite.key_len()).map(|_| choices.next() as u8).collect();
        let nonce: [u8; 12] = std::array::from_fn(|_| choices.next() as u8);
        let (aad, plaintext) = (choices.bytes(80), choices.bytes(400));
        let mut sealed = plaintext.clone();
        let tag = suite.key(&key).unwrap().seal(&nonce, &aad, &mut sealed).unwrap();
        let mut theirs = plaintext.clone();
        let nonce_ref = (&nonce).into();
        let their_tag = if long {
            let cipher = Aes256GcmSiv::new_from_slice(&key).unwrap();
            cipher.encrypt_inout_detached(nonce_ref, &aad, theirs.as_mut_slice().into())
        } else {
            let cipher = Aes128GcmSiv::new_from_slice(&key).unwrap();
            cipher.encrypt_inout_detached(nonce_ref, &aad, theirs.as_mut_slice().into())
        };
        assert_eq!((&sealed, tag), (&theirs, their_tag.unwrap().into()), "case {n} of seed {seed}");
        let mut out = vec![0; plaintext.len()];
        let whole = [&sealed[..], &tag].concat();
        suite.key(&key).unwrap().open(&nonce, &aad, &whole, &mut out).unwrap();
        assert_eq!(out, plaintext);
        let mut changed = whole.clone();
        changed[choices.below(whole.len())] ^= 1 << choices.below(8);
        assert!(suite.key(&key).unwrap().open(&nonce, &aad, &changed, &mut out).is_err());
        let (body, tag) = changed.split_last_chunk::<16>().unwrap();
        let mut body = body.to_vec();
        let opened = if long {
            let cipher = Aes256GcmSiv::new_from_slice(&key).unwrap();
            let body = body.as_mut_slice().into();
            cipher.decrypt_inout_detached(nonce_ref, &aad, body, tag.into())
        } else {
            let cipher = Aes128GcmSiv::new_from_slice(&key).unwrap();
            let body = body.as_mut_slice().into();
            cipher.decrypt_inout_detached(nonce_ref, &aad, body, tag.into())
        };
        assert!(opened.is_err(), "case {n} of seed {seed}");
    }
}

#[test]
fn macs_are_compared_whole() {
    for algorithm in [Algorithm::HmacSha256, Algorithm::HmacSha384, Algorithm::HmacSha512] {
        let key = key_of(algorithm, Purpose::Mac, 1);
        let tag = key.mac(b"message").unwrap();
        assert_eq!(tag.len(), key_len(algorithm));
        assert!(key.verify_mac(b"message", &tag).unwrap());
        assert!(!key.verify_mac(b"messagf", &tag).unwrap());
        assert!(!key_of(algorithm, Purpose::Mac, 2).verify_mac(b"message", &tag).unwrap());
        for len in 0..tag.len() {
            assert!(!key.verify_mac(b"message", &tag[..len]).unwrap());
        }
        assert!(!key.verify_mac(b"message", &[&tag[..], &[0]].concat()).unwrap());
        for bit in 0..tag.len() * 8 {
            let mut changed = tag.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(!key.verify_mac(b"message", &changed).unwrap());
        }
    }
}

#[test]
fn derivation_is_bounded_and_depends_on_everything() {
    let key = key_of(Algorithm::HkdfSha256, Purpose::Derive, 1);
    for len in [1, 31, 32, 33, 8159, 8160] {
        assert_eq!(key.derive(b"salt", b"info", len).unwrap().len(), len);
    }
    for len in [0, 8161, usize::MAX] {
        let refused = key.derive(b"salt", b"info", len).unwrap_err();
        assert!(matches!(refused, WorkError::Input { field: "length", .. }), "{refused}");
    }
    let base = key.derive(b"salt", b"info", 32).unwrap();
    assert_eq!(key.derive(b"salt", b"info", 64).unwrap()[..32], base[..]);
    let other = key_of(Algorithm::HkdfSha256, Purpose::Derive, 2);
    for different in [
        key.derive(b"sals", b"info", 32).unwrap(),
        key.derive(b"salti", b"nfo", 32).unwrap(),
        key.derive(b"", b"info", 32).unwrap(),
        key.derive(b"salt", b"", 32).unwrap(),
        other.derive(b"salt", b"info", 32).unwrap(),
    ] {
        assert_ne!(different, base);
    }
}

#[test]
fn wrapped_keys_come_back_and_changed_ones_do_not() {
    for algorithm in [Algorithm::Aes128, Algorithm::Aes256] {
        let kek = key_of(algorithm, Purpose::Wrap, 1);
        for len in (1_usize..=50).chain([65_535, 65_536]) {
            let key = KeyMaterial::from_secret((0..len).map(|n| n as u8).collect()).unwrap();
            let wrapped = kek.wrap(&key).unwrap();
            assert_eq!(wrapped.len(), len.div_ceil(8) * 8 + 8);
            assert_eq!(kek.unwrap(&wrapped).unwrap().bytes(), key.bytes());
        }
        let wrapped = kek.wrap(&KeyMaterial::from_secret(vec![7; 21]).unwrap()).unwrap();
        for bit in 0..wrapped.len() * 8 {
            let mut changed = wrapped.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(kek.unwrap(&changed).unwrap_err(), WorkError::Failed);
        }
        for len in 0..wrapped.len() {
            assert_eq!(kek.unwrap(&wrapped[..len]).unwrap_err(), WorkError::Failed);
        }
        for extra in [1, 8, 70_000] {
            let longer = [&wrapped[..], &vec![0; extra]].concat();
            assert_eq!(kek.unwrap(&longer).unwrap_err(), WorkError::Failed);
        }
        let other = key_of(algorithm, Purpose::Wrap, 2);
        assert_eq!(other.unwrap(&wrapped).unwrap_err(), WorkError::Failed);
    }
}

#[test]
fn headers_are_read_strictly() {
    let key = cipher_of(Algorithm::Aes256);
    let message = key.seal(&BINDING, b"").unwrap();
    let (mut stream, sealer) = key.seal_stream(&BINDING, ChunkSize::MIN).unwrap();
    assert_eq!(header(&stream).unwrap().plaintext_len, None);
    stream.extend(sealer.finish(b"four").unwrap());
    let read = header(&stream).unwrap();
    assert_eq!((read.kind, read.header_len), (CiphertextKind::Stream, STREAM_HEADER_LEN));
    assert_eq!((read.chunk_size, read.plaintext_len), (Some(ChunkSize::MIN), Some(4)));
    for len in 0..message.len() {
        assert_eq!(header(&message[..len]), Err(DecodeError::Malformed), "{len}");
    }
    for len in 0..STREAM_HEADER_LEN {
        assert_eq!(header(&stream[..len]), Err(DecodeError::Malformed), "{len}");
    }
    let changed = |blob: &[u8], at: usize, bytes: &[u8]| {
        let mut blob = blob.to_vec();
        blob[at..at + bytes.len()].copy_from_slice(bytes);
        header(&blob)
    };
    for blob in [&message, &stream] {
        assert_eq!(changed(blob, 2, b"B"), Err(DecodeError::Malformed));
        assert_eq!(changed(blob, 3, &[0]), Err(DecodeError::UnknownFormat(0)));
        assert_eq!(changed(blob, 3, &[2]), Err(DecodeError::UnknownFormat(2)));
        assert_eq!(changed(blob, 20, &[0; 4]), Err(DecodeError::Malformed), "version 0");
        assert_eq!(changed(blob, 24, &[0xff, 0xff]), Err(DecodeError::Malformed), "algorithm");
    }
    for log2 in [0, 11, 23, 255] {
        assert_eq!(changed(&stream, 26, &[log2]), Err(DecodeError::Malformed), "chunk size");
    }
    let rsa = Algorithm::Rsa4096.code().to_be_bytes();
    assert_eq!(changed(&stream, 24, &rsa), Err(DecodeError::Malformed), "a stream under RSA");
    assert_eq!(changed(&message, 24, &rsa).unwrap().header_len, 26);
}

#[test]
fn a_ciphertext_has_one_spelling() {
    let blob = cipher_of(Algorithm::Aes256).seal(&BINDING, b"plain").unwrap();
    let text = to_text(&blob);
    assert!(text.starts_with("polykey:c1:UEtDAR"), "{text}");
    assert_eq!(from_text(&text).unwrap(), blob);
    let last = text.len() - 1;
    for other in [
        text[1..].to_owned(),
        text.to_uppercase(),
        text.replacen("c1", "c2", 1),
        text.replacen("polykey:", "polykey: ", 1),
        format!("{text}="),
        format!("{text}\n"),
        format!(" {text}"),
        format!("{}+", &text[..last]),
        format!("{}/", &text[..last]),
        format!("{}\n{}", &text[..50], &text[50..]),
        text[..last].to_owned(),
    ] {
        assert!(from_text(&other).is_ok_and(|b| b != blob) || from_text(&other).is_err());
        assert_ne!(from_text(&other).ok(), Some(blob.clone()), "{other}");
    }
    // Bits that do not count must be zero.
    let five = to_text(&[0xff; 1]);
    assert_eq!(five, "polykey:c1:_w");
    assert_eq!(from_text("polykey:c1:_x"), Err(DecodeError::Malformed));
    assert_eq!(from_text("polykey:c1:").unwrap(), [0; 0]);
}

#[test]
fn chunk_sizes_are_powers_of_two_within_bounds() {
    assert_eq!(ChunkSize::default().bytes(), 65_536);
    for log2 in 0..=255 {
        match ChunkSize::from_log2(log2) {
            Some(size) => {
                assert!((12..=22).contains(&log2));
                assert_eq!((size.log2(), size.bytes()), (log2, 1 << log2));
                assert_eq!(ChunkSize::from_bytes(1 << log2), Some(size));
            }
            None => assert!(!(12..=22).contains(&log2)),
        }
    }
    for bytes in [0, 1, 2048, 4095, 4097, 65_537, 8 << 20, usize::MAX] {
        assert_eq!(ChunkSize::from_bytes(bytes), None);
    }
}
