//! Protection of keys on their way in: they are wrapped to a one-time public key of this node, or come as a JSON Web
//! Key over the connection's own protection.
//!
//! A one-time key pair is ordinary material (RSA-4096 or X25519), so that it is stored, bound and destroyed like any.
//! What unwraps is bytes from outside still: [`crate::algorithm::import`] decides whether they are a key.

use aws_lc_rs::digest;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded};
use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
use zeroize::Zeroizing;

use crate::algorithm::{self, AlgorithmError, curve25519, jwk};
use crate::work::asymmetric::{Pair, encrypt_to};
use crate::{
    Algorithm, CryptoFailure, Generated, GenerationParams, KeyMaterial, PublicKey, Purpose, random,
};

const LABEL: &[u8] = b"polykey-import-v1";
const HPKE_ENC: usize = 32;

/// How a key is wrapped on its way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImportWrapping {
    /// RSA-OAEP with SHA-256 of an ephemeral AES-256 key (512 bytes) ‖ the key under it with AES-KWP (RFC 5649), as
    /// CKM_RSA_AES_KEY_WRAP of PKCS#11 3.0 (2.1.21) with SHA-256 and MGF1 with SHA-256 does.
    RsaAes,
    /// HPKE (RFC 9180) in base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, with [`ImportInfo`] as
    /// `info` and no `aad`: the encapsulated key (32 bytes) ‖ ciphertext ‖ tag.
    Hpke,
}

impl ImportWrapping {
    /// Both.
    pub const ALL: [Self; 2] = [Self::RsaAes, Self::Hpke];

    /// The word for it, which never changes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::RsaAes => "rsa-aes-key-wrap-sha256",
            Self::Hpke => "hpke",
        }
    }

    /// The wrapping of a word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|wrapping| wrapping.name() == name)
    }

    /// What its one-time key is.
    #[must_use]
    pub const fn algorithm(self) -> Algorithm {
        match self {
            Self::RsaAes => Algorithm::Rsa4096,
            Self::Hpke => Algorithm::X25519,
        }
    }
}

/// What an import with HPKE is bound to, besides the one-time key itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportInfo {
    /// The node that takes the key.
    pub node: [u8; 16],
    /// The token that names the one-time key.
    pub token: Vec<u8>,
}

impl ImportInfo {
    /// HPKE's `info`: `"polykey-import-v1"` ‖ node 16 ‖ length of the token u32, big-endian ‖ token ‖ SHA-256 of the
    /// raw one-time public key. A sender that does not use this crate rebuilds it from what it was given.
    #[must_use]
    pub fn encode(&self, public_key: &[u8; 32]) -> Vec<u8> {
        // Tokens are far below 4 GiB.
        let len = u32::try_from(self.token.len()).unwrap_or(u32::MAX).to_be_bytes();
        let hash = digest::digest(&digest::SHA256, public_key);
        [LABEL, &self.node, &len, &self.token, hash.as_ref()].concat()
    }
}

/// Why a wrapped key is not made or not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// It does not unwrap: wrapped to another key, for another token or node, or changed. No more is told.
    #[error("the wrapped key does not open")]
    Unwrap,
    /// Not a one-time public key for this wrapping.
    #[error("not a valid public key of type {0}")]
    PublicKey(Algorithm),
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

/// A new one-time key pair. RSA-4096 takes 0.7 s of CPU, up to 1.5 s: run it off the threads of requests.
///
/// # Errors
/// See [`AlgorithmError`].
pub fn generate_one_time_key(wrapping: ImportWrapping) -> Result<Generated, AlgorithmError> {
    algorithm::generate(wrapping.algorithm(), GenerationParams::default())
}

/// Unwraps what was wrapped with [`ImportWrapping::RsaAes`].
///
/// # Errors
/// [`ImportError::Unwrap`], whatever the reason; [`ImportError::Crypto`].
pub fn unwrap_rsa_aes(private: &KeyMaterial, wrapped: &[u8]) -> Result<KeyMaterial, ImportError> {
    let pair = Pair::new(Algorithm::Rsa4096, Purpose::Encrypt, private)
        .map_err(|_| ImportError::Unwrap)?;
    // Where RSA opens nothing, a random key goes on in its place, so that both failures do the same work.
    let substitute = random::secret::<32>()?;
    let (head, tail) = wrapped.split_at_checked(512).ok_or(ImportError::Unwrap)?;
    let opened = pair.open_raw(head).ok();
    let kek: &[u8; 32] =
        opened.as_ref().and_then(|kek| kek.as_slice().try_into().ok()).unwrap_or(&substitute);
    let mut out = Zeroizing::new(vec![0; tail.len()]);
    let len = AesKek::new(&AES_256, kek)
        .and_then(|kek| kek.unwrap_with_padding(tail, &mut out).map(|key| key.len()))
        .map_err(|_| ImportError::Unwrap)?;
    out.truncate(len);
    KeyMaterial::from_opened(out).map_err(|_| ImportError::Unwrap)
}

/// Wraps with [`ImportWrapping::RsaAes`], on the sender's side.
///
/// # Errors
/// [`ImportError::PublicKey`], [`ImportError::Crypto`].
pub fn wrap_rsa_aes(public: &PublicKey, key: &KeyMaterial) -> Result<Vec<u8>, ImportError> {
    const FAILED: CryptoFailure = CryptoFailure("AES key wrapping failed");
    let kek = random::secret::<32>()?;
    let mut out = encrypt_to(Algorithm::Rsa4096, public, kek.as_slice())
        .map_err(|_| ImportError::PublicKey(Algorithm::Rsa4096))?;
    let mut wrapped = vec![0; key.len() + 15];
    let wrapped = AesKek::new(&AES_256, kek.as_slice())
        .and_then(|kek| kek.wrap_with_padding(key.bytes(), &mut wrapped))
        .map_err(|_| FAILED)?;
    out.extend_from_slice(wrapped);
    Ok(out)
}

/// Unwraps what was wrapped with [`ImportWrapping::Hpke`] for the same `info`.
///
/// # Errors
/// [`ImportError::Unwrap`], whatever the reason.
pub fn unwrap_hpke(
    private: &KeyMaterial,
    info: &ImportInfo,
    wrapped: &[u8],
) -> Result<KeyMaterial, ImportError> {
    let broken = |_| ImportError::Unwrap;
    let private = curve25519::bytes_x25519(private).map_err(|_| ImportError::Unwrap)?;
    let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(private).map_err(broken)?;
    let mut public = [0; 32];
    X25519HkdfSha256::sk_to_pk(&private).write_exact(&mut public);
    let (enc, ciphertext) = wrapped.split_at_checked(HPKE_ENC).ok_or(ImportError::Unwrap)?;
    let enc = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(enc).map_err(broken)?;
    let key = hpke::single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &private,
        &enc,
        &info.encode(&public),
        ciphertext,
        &[],
    )
    .map_err(broken)?;
    KeyMaterial::from_secret(key).map_err(|_| ImportError::Unwrap)
}

/// Wraps with [`ImportWrapping::Hpke`], on the sender's side.
///
/// # Errors
/// [`ImportError::PublicKey`].
pub fn wrap_hpke(
    public: &PublicKey,
    info: &ImportInfo,
    key: &KeyMaterial,
) -> Result<Vec<u8>, ImportError> {
    const WRONG: ImportError = ImportError::PublicKey(Algorithm::X25519);
    if public.algorithm != Algorithm::X25519 {
        return Err(WRONG);
    }
    let raw: &[u8; 32] = public.raw().and_then(|raw| raw.try_into().ok()).ok_or(WRONG)?;
    wrap_hpke_to(raw, &info.encode(raw), key)
}

/// The same for an encoded `info`, as a node hands it out with its one-time key.
///
/// # Errors
/// [`ImportError::PublicKey`].
pub fn wrap_hpke_to(
    recipient: &[u8; 32],
    info: &[u8],
    key: &KeyMaterial,
) -> Result<Vec<u8>, ImportError> {
    const WRONG: ImportError = ImportError::PublicKey(Algorithm::X25519);
    let recipient =
        <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(recipient).map_err(|_| WRONG)?;
    let (enc, ciphertext) = hpke::single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeS::Base,
        &recipient,
        info,
        key.bytes(),
        &[],
    )
    // All that can fail is the Diffie-Hellman with a key of low order.
    .map_err(|_| WRONG)?;
    Ok([&enc.to_bytes()[..], &ciphertext].concat())
}

/// Takes over a private or symmetric key given as a JSON Web Key: `oct` (RFC 7518) of exactly the bytes of the type;
/// `EC` (RFC 7518, 8812); `RSA` (RFC 7518) with all the components of a key of two primes; `OKP` (RFC 8037); `AKP` (RFC
/// 9964) with the seed. Private and public members must belong together.
///
/// # Errors
/// As [`crate::algorithm::import`]; [`AlgorithmError::NotAKey`] for what is no JSON Web Key of this type.
pub fn import_jwk(algorithm: Algorithm, jwk: &str) -> Result<Generated, AlgorithmError> {
    algorithm::import(algorithm, jwk::private(algorithm, jwk)?)
}

#[cfg(test)]
mod tests;
