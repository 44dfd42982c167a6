//! The cipher against RFC 8452, against aws-lc, and against whoever changes a byte.

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, Nonce, UnboundKey};
use data_encoding::HEXLOWER;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const VECTORS: &str = include_str!("../../tests/vectors/rfc8452-aes-256-gcm-siv.txt");

fn seal(key: &[u8; 32], nonce: &[u8; 12], aad: &[u8], plaintext: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Cipher::new(key).seal_onto(&mut out, nonce, aad, plaintext).unwrap();
    out
}

#[test]
fn rfc_8452_vectors() {
    let mut count = 0;
    for line in VECTORS.lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<Vec<u8>> = line
            .split(' ')
            .map(|f| if f == "-" { vec![] } else { HEXLOWER.decode(f.as_bytes()).unwrap() })
            .collect();
        let [key, nonce, aad, plaintext, sealed] = fields.try_into().unwrap();
        let key = key.try_into().unwrap();
        let nonce = nonce.try_into().unwrap();
        assert_eq!(seal(&key, &nonce, &aad, &plaintext), sealed, "{line}");
        let opened = Cipher::new(&key).open(&nonce, &aad, &sealed).unwrap();
        assert_eq!(*opened, plaintext, "{line}");
        count += 1;
    }
    assert_eq!(count, 26);
}

#[test]
fn seals_behind_what_is_there() {
    let mut out = b"header".to_vec();
    Cipher::new(&[1; 32]).seal_onto(&mut out, &[2; 12], b"a", b"plain").unwrap();
    assert_eq!(out[..6], *b"header");
    assert_eq!(out[6..], seal(&[1; 32], &[2; 12], b"a", b"plain"));
}

#[test]
fn every_bit_matters() {
    let sealed = seal(&[1; 32], &[2; 12], b"aad", b"plaintext");
    let cipher = Cipher::new(&[1; 32]);
    for bit in 0..sealed.len() * 8 {
        let mut changed = sealed.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(cipher.open(&[2; 12], b"aad", &changed).unwrap_err(), Broken);
    }
    for len in 0..sealed.len() {
        assert!(cipher.open(&[2; 12], b"aad", &sealed[..len]).is_err());
    }
    assert!(cipher.open(&[3; 12], b"aad", &sealed).is_err());
    assert!(cipher.open(&[2; 12], b"aae", &sealed).is_err());
    assert!(Cipher::new(&[9; 32]).open(&[2; 12], b"aad", &sealed).is_err());
}

/// AES-256-GCM-SIV alone opens one text under two keys, with work; committed text never reaches
/// the cipher with a key other than its own.
#[test]
fn the_commitment_decides_before_the_cipher_does() {
    let key = [7; 32];
    let sealed = seal_committed(&key, "label", &[b"cx"], b"plain").unwrap();
    let okm = derive::<64>(&key, &sealed[..32], "label", &[b"cx"]).unwrap();
    let (aead_key, commitment) = split(&okm);
    assert_eq!(sealed[32..64], commitment);
    // The ciphertext opens under the derived key; with the commitment of another it must not.
    let aad = codec::join(&[b"cx"]);
    assert!(Cipher::new(&aead_key).open(&[0; 12], &aad, &sealed[64..]).is_ok());
    let mut other = sealed.clone();
    let foreign = derive::<64>(&[8; 32], &sealed[..32], "label", &[b"cx"]).unwrap();
    other[32..64].copy_from_slice(&split(&foreign).1);
    assert!(open_committed(&key, "label", &[b"cx"], &other).is_err());
    assert!(open_committed(&key, "label", &[b"cx"], &sealed).is_ok());
}

#[test]
fn derivation_separates_labels_parts_salts_and_secrets() {
    let base = derive::<32>(b"secret", b"salt", "label", &[b"a", b"b"]).unwrap();
    for other in [
        derive::<32>(b"secres", b"salt", "label", &[b"a", b"b"]).unwrap(),
        derive::<32>(b"secret", b"sale", "label", &[b"a", b"b"]).unwrap(),
        derive::<32>(b"secret", b"salt", "lab", &[b"ela", b"b"]).unwrap(),
        derive::<32>(b"secret", b"salt", "label", &[b"ab", b""]).unwrap(),
        derive::<32>(b"secret", b"salt", "label", &[b"ab"]).unwrap(),
    ] {
        assert_ne!(*base, *other);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Two implementations that share no code agree in both directions.
    #[test]
    fn agrees_with_aws_lc(
        key: [u8; 32],
        nonce: [u8; 12],
        aad in vec(any::<u8>(), 0..80),
        plaintext in vec(any::<u8>(), 0..300),
    ) {
        let theirs = LessSafeKey::new(UnboundKey::new(&AES_256_GCM_SIV, &key).unwrap());
        let ours = seal(&key, &nonce, &aad, &plaintext);
        let mut sealed = plaintext.clone();
        theirs
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(&aad),
                &mut sealed,
            )
            .unwrap();
        prop_assert_eq!(&ours, &sealed);
        let mut buffer = ours.clone();
        let opened = theirs
            .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(&aad), &mut buffer)
            .unwrap();
        prop_assert_eq!(&*opened, &plaintext[..]);
        prop_assert_eq!(&*Cipher::new(&key).open(&nonce, &aad, &sealed).unwrap(), &plaintext);
    }

    #[test]
    fn committed_text_opens_in_its_context_alone(
        key: [u8; 32],
        context in vec(vec(any::<u8>(), 0..8), 0..4),
        other in vec(vec(any::<u8>(), 0..8), 0..4),
        plaintext in vec(any::<u8>(), 0..100),
        flip: prop::sample::Index,
    ) {
        let refs: Vec<&[u8]> = context.iter().map(Vec::as_slice).collect();
        let others: Vec<&[u8]> = other.iter().map(Vec::as_slice).collect();
        let sealed = seal_committed(&key, "l", &refs, &plaintext).unwrap();
        prop_assert_eq!(sealed.len(), plaintext.len() + COMMITTED_OVERHEAD);
        prop_assert_eq!(&*open_committed(&key, "l", &refs, &sealed).unwrap(), &plaintext);
        prop_assert_eq!(open_committed(&key, "l", &others, &sealed).is_ok(), context == other);
        prop_assert!(open_committed(&key, "m", &refs, &sealed).is_err());
        let mut changed = sealed.clone();
        changed[flip.index(sealed.len())] ^= 0x40;
        prop_assert!(open_committed(&key, "l", &refs, &changed).is_err());
        prop_assert!(open_committed(&key, "l", &refs, &sealed[..flip.index(sealed.len())]).is_err());
    }
}
