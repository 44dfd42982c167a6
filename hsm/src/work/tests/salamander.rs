//! One AES-GCM ciphertext that opens under two keys (Dodis, Grubbs, Ristenpart, Woodage: Fast Message Franking: From
//! Invisible Salamanders to Encryptment, 2018), and that the commitment keeps from doing so here.

use aes::cipher::{BlockCipherEncrypt, KeyInit};

use super::super::aead::{ChunkNonce, Suite};
use super::super::cipher::Bound;
use super::super::format::MessageHeader;
use super::*;

/// GF(2^128) as GHASH has it: the first bit of a block is the coefficient of x^0 (NIST SP 800-38D, 6.3).
fn multiply(x: u128, y: u128) -> u128 {
    let (mut z, mut v) = (0, y);
    for i in (0..128).rev() {
        if x >> i & 1 == 1 {
            z ^= v;
        }
        v = if v & 1 == 1 { v >> 1 ^ 0xe1 << 120 } else { v >> 1 };
    }
    z
}

fn power(x: u128, mut exponent: u128) -> u128 {
    let (mut result, mut base) = (1 << 127, x);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = multiply(result, base);
        }
        base = multiply(base, base);
        exponent >>= 1;
    }
    result
}

fn inverse(x: u128) -> u128 {
    power(x, u128::MAX - 1)
}

fn encrypt_block(key: &[u8; 32], block: u128) -> u128 {
    let mut bytes = block.to_be_bytes().into();
    aes::Aes256::new(key.into()).encrypt_block(&mut bytes);
    u128::from_be_bytes(bytes.into())
}

/// The tag of whole blocks under an all-zero nonce, without additional data.
fn tag(key: &[u8; 32], blocks: &[u128]) -> u128 {
    let h = encrypt_block(key, 0);
    let lengths = blocks.len() as u128 * 128;
    let hash = blocks.iter().chain([&lengths]).fold(0, |hash, b| multiply(hash ^ b, h));
    hash ^ encrypt_block(key, 1)
}

/// A block to follow `blocks` such that the tags under both keys are the same. Tags are linear in the block: it
/// counts H² times, so the difference that it must make is divided by H₁² + H₂².
fn collide(one: &[u8; 32], two: &[u8; 32], blocks: &[u128]) -> u128 {
    let difference = |block| {
        let blocks = [blocks, &[block]].concat();
        tag(one, &blocks) ^ tag(two, &blocks)
    };
    let squares = [one, two].map(|key| power(encrypt_block(key, 0), 2));
    multiply(difference(0), inverse(squares[0] ^ squares[1]))
}

/// Ciphertext ‖ tag that opens under both keys and an all-zero nonce.
pub(super) fn for_two_keys(keys: &[[u8; 32]; 2], blocks: &[u128]) -> Vec<u8> {
    let [one, two] = keys;
    let blocks = [blocks, &[collide(one, two, blocks)]].concat();
    assert_eq!(tag(one, &blocks), tag(two, &blocks));
    blocks.iter().chain([&tag(one, &blocks)]).flat_map(|b| b.to_be_bytes()).collect()
}

#[test]
fn the_field_is_one() {
    let (x, y, z) = (0x0388_dace_60b6_a392_f328_c2b9_71b2_fe78, 7 << 90, 0x1234_5678 << 40);
    assert_eq!(multiply(x, inverse(x)), 1 << 127);
    assert_eq!(multiply(x ^ y, z), multiply(x, z) ^ multiply(y, z));
    // NIST, The Galois/Counter Mode of Operation, test case 2.
    let h = 0x66e9_4bd4_ef8a_2c3b_884c_fa59_ca34_2b2e;
    assert_eq!(multiply(x, h), 0x5e2e_c746_9170_6288_2c85_b068_5353_deb7);
}

#[test]
fn a_ciphertext_for_two_keys_opens_under_one() {
    let material = |byte| KeyMaterial::from_secret(vec![byte; 32]).unwrap();
    let algorithm = Algorithm::Aes256Gcm;
    let keys = [1, 2].map(|b| WorkingKey::new(algorithm, Purpose::Encrypt, &material(b)).unwrap());
    let (header, bound) = (MessageHeader::new(&BINDING, algorithm), Bound::of(&BINDING));
    let salt = [9; 32];
    // The keys that the format derives, as whoever knows both secrets does.
    let derived = |byte: u8| {
        let info = codec::join(&[b"polykey/message/v1", header.bytes(), bound.bytes()]);
        let mut okm = [0; 64];
        kdf::hkdf_sha256(&[byte; 32], &salt, &info, &mut okm).unwrap();
        let (key, commitment) = okm.split_first_chunk::<32>().unwrap();
        (*key, commitment.to_vec())
    };
    let [(one, commitment_one), (two, commitment_two)] = [1, 2].map(derived);
    let sealed = for_two_keys(&[one, two], &[0x6b_6b6b << 64, 42, u128::MAX]);

    // The cipher alone opens it under both keys, to different plaintexts.
    let plaintexts = [one, two].map(|key| {
        let mut out = vec![0; 64];
        let key = Suite::of(algorithm).unwrap().key(&key).unwrap();
        key.open_chunk(&ChunkNonce::new(0, false), &sealed, &mut out).unwrap();
        out
    });
    assert_ne!(plaintexts[0], plaintexts[1]);

    // With the commitment to either, it opens under that one alone.
    for (mine, commitment) in [(0, commitment_one), (1, commitment_two)] {
        let blob = [header.bytes(), &salt, &commitment, &sealed].concat();
        assert_eq!(*keys[mine].open(&BINDING, &blob).unwrap(), plaintexts[mine]);
        assert_eq!(keys[1 - mine].open(&BINDING, &blob).unwrap_err(), WorkError::Failed);
    }
}
