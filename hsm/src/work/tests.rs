//! Symmetric keys at work.
#![allow(clippy::print_stdout, reason = "counts and seeds, for whoever runs them")]

use super::*;

mod boundary;
mod salamander;
mod streams;
mod transplants;
mod vectors;
mod wycheproof;

/// Every algorithm that encrypts without a public part.
const CIPHERS: [Algorithm; 6] = [
    Algorithm::Aes256,
    Algorithm::Aes128,
    Algorithm::Aes256Gcm,
    Algorithm::Aes128Gcm,
    Algorithm::ChaCha20Poly1305,
    Algorithm::XChaCha20Poly1305,
];

const BINDING: Binding<'static> =
    Binding { key_id: [0x11; 16], version: 3, context: b"context", aad: b"aad" };

fn key_len(algorithm: Algorithm) -> usize {
    match algorithm {
        Algorithm::Aes128 | Algorithm::Aes128Gcm => 16,
        Algorithm::HmacSha384 => 48,
        Algorithm::HmacSha512 => 64,
        _ => 32,
    }
}

fn key_of(algorithm: Algorithm, purpose: Purpose, byte: u8) -> WorkingKey {
    let material = KeyMaterial::from_secret(vec![byte; key_len(algorithm)]).unwrap();
    WorkingKey::new(algorithm, purpose, &material).unwrap()
}

fn cipher_of(algorithm: Algorithm) -> WorkingKey {
    key_of(algorithm, Purpose::Encrypt, 1)
}

/// The key beneath, for salts of the test's own.
fn inside(key: &WorkingKey) -> &cipher::CipherKey {
    match &key.inner {
        Inner::Cipher(key) => key,
        _ => panic!("not a cipher"),
    }
}

/// SplitMix64: enough to choose cases that a seed repeats.
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn bytes(&mut self, below: usize) -> Vec<u8> {
        (0..self.below(below)).map(|_| self.next() as u8).collect()
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect(name))
}
