//! A key at work: what each purpose does with a version's material, for callers who never see it.
//!
//! A [`WorkingKey`] is parsed once and used often; it can be remembered where parsing is dear, and is
//! erased when dropped. Public parts work without one: see `verify`.

use std::collections::BTreeMap;
use std::fmt;

use zeroize::Zeroizing;

use crate::{Algorithm, CryptoFailure, KeyMaterial, PublicKey, Purpose, algorithm, codec};

mod aead;
mod cipher;
mod compare;
mod format;
mod kdf;
mod kek;
mod mac;
mod message;
mod stream;
#[cfg(test)]
mod tests;

pub use format::{
    CiphertextHeader, CiphertextKind, MESSAGE_OVERHEAD, STREAM_HEADER_LEN, from_text, header,
    to_text,
};
pub use stream::{ChunkSize, StreamOpener, StreamSealer};

pub mod asymmetric;
mod scheme;
#[cfg(test)]
mod wycheproof;

pub use asymmetric::{encapsulate, encrypt_to, verify};
use format::MessageHeader;
pub use scheme::{SignInput, SignatureScheme};

/// Why a key did not do its work. None of these carries a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// It does not open or verify: another key, version or context, changed bytes. No more is told.
    #[error("decryption failed")]
    Failed,
    /// The key was made for something else.
    #[error("a key of type {algorithm} made to {purpose} does not do this")]
    WrongPurpose {
        /// What the key is.
        algorithm: Algorithm,
        /// What it was made for.
        purpose: Purpose,
    },
    /// Something about the request, and not about any secret, is not as it must be.
    #[error("{field}: {problem}")]
    Input {
        /// The field of the request, as `plaintext`.
        field: &'static str,
        /// What is wrong and what would be right.
        problem: &'static str,
    },
    /// The stored material is not a key of its algorithm.
    #[error("the stored material is not a key of type {0}")]
    Material(Algorithm),
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

impl WorkError {
    pub(crate) const fn input(field: &'static str, problem: &'static str) -> Self {
        Self::Input { field, problem }
    }
}

/// What a ciphertext is bound to, besides the key itself: it opens for exactly this and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding<'a> {
    /// The key.
    pub key_id: [u8; 16],
    /// The version, from 1.
    pub version: u32,
    /// The caller's context, from [`canonical_context`].
    pub context: &'a [u8],
    /// The caller's additional authenticated data.
    pub aad: &'a [u8],
}

/// A context as it is bound: its pairs in order of their names, each name and value preceded by its length as a
/// u64, big-endian; no bytes for an empty context.
#[must_use]
pub fn canonical_context(context: &BTreeMap<String, String>) -> Vec<u8> {
    let parts: Vec<&[u8]> =
        context.iter().flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()]).collect();
    codec::join(&parts)
}

/// Encrypts a message to an RSA public key in a blob of ours, which [`WorkingKey::open`] opens: the header names key
/// and version, and binds nothing.
///
/// # Errors
/// As [`encrypt_to`].
pub fn seal_to(
    algorithm: Algorithm,
    public: &PublicKey,
    binding: &Binding<'_>,
    plaintext: &[u8],
) -> Result<Vec<u8>, WorkError> {
    let mut blob = MessageHeader::new(binding, algorithm).bytes().to_vec();
    blob.extend_from_slice(&encrypt_to(algorithm, public, plaintext)?);
    Ok(blob)
}

/// Wraps key material to an RSA public key: RSA-OAEP with SHA-256, as [`WorkingKey::unwrap`] opens it.
///
/// # Errors
/// As [`encrypt_to`].
pub fn wrap_to(
    algorithm: Algorithm,
    public: &PublicKey,
    key: &KeyMaterial,
) -> Result<Vec<u8>, WorkError> {
    match encrypt_to(algorithm, public, key.bytes()) {
        Err(WorkError::Input { field: "plaintext", problem }) => {
            Err(WorkError::Input { field: "key_material", problem })
        }
        other => other,
    }
}

/// Derives 1 to 8160 bytes from a shared secret with HKDF-SHA-256 (RFC 5869).
///
/// # Errors
/// [`WorkError::Input`] for another length.
pub fn hkdf_sha256(
    secret: &[u8],
    salt: &[u8],
    info: &[u8],
    len: usize,
) -> Result<Zeroizing<Vec<u8>>, WorkError> {
    kdf::derive(secret, salt, info, len)
}

/// Whether a ciphertext is in its printable form.
#[must_use]
pub fn is_text(ciphertext: &[u8]) -> bool {
    ciphertext.starts_with(format::TEXT_PREFIX.as_bytes())
}

/// A key that is ready for the one thing it was made for. Erased when dropped.
pub struct WorkingKey {
    algorithm: Algorithm,
    purpose: Purpose,
    inner: Inner,
}

/// The key as its purpose needs it, a file each.
enum Inner {
    Cipher(cipher::CipherKey),
    Mac(mac::MacKey),
    Kdf(kdf::Secret),
    Kek(kek::Kek),
    Pair(Box<asymmetric::Pair>),
}

impl WorkingKey {
    /// Parses the material of a key that was made for `purpose`. Under a microsecond for the symmetric ones.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`] where the algorithm does not serve the purpose, or the purpose is no work
    /// at all; [`WorkError::Material`] where the bytes are not a key of the algorithm.
    pub fn new(
        algorithm: Algorithm,
        purpose: Purpose,
        material: &KeyMaterial,
    ) -> Result<Self, WorkError> {
        let wrong = WorkError::WrongPurpose { algorithm, purpose };
        if !algorithm.serves(purpose) || purpose == Purpose::Credential {
            return Err(wrong);
        }
        let inner = if algorithm.is_asymmetric() {
            Inner::Pair(Box::new(asymmetric::Pair::new(algorithm, purpose, material)?))
        } else {
            algorithm::public_key(algorithm, material)
                .map_err(|_| WorkError::Material(algorithm))?;
            match purpose {
                Purpose::Encrypt => cipher::CipherKey::new(algorithm, material).map(Inner::Cipher),
                Purpose::Mac => mac::MacKey::new(algorithm, material).map(Inner::Mac),
                Purpose::Derive => Some(Inner::Kdf(kdf::Secret::new(material))),
                Purpose::Wrap => kek::Kek::new(algorithm, material).map(Inner::Kek),
                _ => None,
            }
            .ok_or(wrong)?
        };
        Ok(Self { algorithm, purpose, inner })
    }

    /// What the key is.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// What it was made for.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    fn wrong_purpose<T>(&self) -> Result<T, WorkError> {
        Err(WorkError::WrongPurpose { algorithm: self.algorithm, purpose: self.purpose })
    }

    /// Encrypts a message, bound to key, version, context and additional data; two calls never give the same blob.
    /// The blob is [`MESSAGE_OVERHEAD`] bytes longer than the plaintext: `docs/ciphertext-format.md` has it byte
    /// by byte. 2 µs for 256 bytes.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`], or [`WorkError::Crypto`] when the random generator fails or the plaintext
    /// exceeds 64 GiB.
    pub fn seal(&self, binding: &Binding<'_>, plaintext: &[u8]) -> Result<Vec<u8>, WorkError> {
        match &self.inner {
            Inner::Cipher(key) => Ok(key.seal(binding, plaintext)?),
            _ => self.wrong_purpose(),
        }
    }

    /// Decrypts what stands in no blob of ours: RSA-OAEP with SHA-256 (RFC 8017).
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Failed`] for everything that does not open.
    pub fn open_raw(&self, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        match &self.inner {
            Inner::Pair(pair) => pair.open_raw(ciphertext),
            _ => self.wrong_purpose(),
        }
    }

    /// Signs a message or its digest.
    ///
    /// # Errors
    /// As [`asymmetric::Pair::sign`].
    pub fn sign(
        &self,
        scheme: SignatureScheme,
        input: SignInput<'_>,
    ) -> Result<Vec<u8>, WorkError> {
        match &self.inner {
            Inner::Pair(pair) => pair.sign(scheme, input),
            _ => self.wrong_purpose(),
        }
    }

    /// The secret shared with the holder of another key pair of the same curve.
    ///
    /// # Errors
    /// As [`asymmetric::Pair::agree`].
    pub fn agree(&self, peer_spki: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        match &self.inner {
            Inner::Pair(pair) => pair.agree(peer_spki),
            _ => self.wrong_purpose(),
        }
    }

    /// The secret that [`encapsulate`] made together with this ciphertext.
    ///
    /// # Errors
    /// As [`asymmetric::Pair::decapsulate`].
    pub fn decapsulate(&self, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        match &self.inner {
            Inner::Pair(pair) => pair.decapsulate(ciphertext),
            _ => self.wrong_purpose(),
        }
    }

    /// Encrypts a message so that equal plaintexts with equal bindings give equal blobs, which shows everybody
    /// who sees them that they are equal, and nothing else.
    ///
    /// # Errors
    /// As [`Self::seal`].
    pub fn seal_convergent(
        &self,
        binding: &Binding<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, WorkError> {
        match &self.inner {
            Inner::Cipher(key) => Ok(key.seal_convergent(binding, plaintext)?),
            _ => self.wrong_purpose(),
        }
    }

    /// Decrypts what [`Self::seal`] or [`Self::seal_convergent`] made for the same binding.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Failed`] for everything else that is not exactly so.
    pub fn open(
        &self,
        binding: &Binding<'_>,
        blob: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        match &self.inner {
            Inner::Cipher(key) => key.open(binding, blob),
            // RSA: the header, and then what the standard says.
            Inner::Pair(pair) => {
                let header = MessageHeader::new(binding, self.algorithm);
                pair.open_raw(blob.strip_prefix(header.bytes()).ok_or(WorkError::Failed)?)
            }
            _ => self.wrong_purpose(),
        }
    }

    /// Begins to encrypt a stream: gives its header, [`STREAM_HEADER_LEN`] bytes, and what seals the rest.
    ///
    /// # Errors
    /// As [`Self::seal`].
    pub fn seal_stream(
        &self,
        binding: &Binding<'_>,
        chunk_size: ChunkSize,
    ) -> Result<(Vec<u8>, StreamSealer), WorkError> {
        match &self.inner {
            Inner::Cipher(key) => Ok(key.seal_stream(binding, chunk_size)?),
            _ => self.wrong_purpose(),
        }
    }

    /// Begins to decrypt a stream from its header, exactly [`STREAM_HEADER_LEN`] bytes.
    ///
    /// # Errors
    /// As [`Self::open`]; a wrong key or binding is refused here, before any chunk.
    pub fn open_stream(
        &self,
        binding: &Binding<'_>,
        header: &[u8],
    ) -> Result<StreamOpener, WorkError> {
        match &self.inner {
            Inner::Cipher(key) => key.open_stream(binding, header),
            _ => self.wrong_purpose(),
        }
    }

    /// The HMAC (FIPS 198-1) of a message: 32, 48 or 64 bytes.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`].
    pub fn mac(&self, message: &[u8]) -> Result<Vec<u8>, WorkError> {
        match &self.inner {
            Inner::Mac(key) => Ok(key.mac(message)),
            _ => self.wrong_purpose(),
        }
    }

    /// Whether `tag` is [`Self::mac`] of the message, in constant time. A truncated one is not.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`].
    pub fn verify_mac(&self, message: &[u8], tag: &[u8]) -> Result<bool, WorkError> {
        match &self.inner {
            Inner::Mac(key) => Ok(key.verify(message, tag)),
            _ => self.wrong_purpose(),
        }
    }

    /// Derives 1 to 8160 bytes with HKDF-SHA-256 (RFC 5869). Equal arguments give equal bytes.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`], or [`WorkError::Input`] for another length.
    pub fn derive(
        &self,
        salt: &[u8],
        info: &[u8],
        len: usize,
    ) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        match &self.inner {
            Inner::Kdf(secret) => secret.derive(salt, info, len),
            _ => self.wrong_purpose(),
        }
    }

    /// Wraps a key with AES-KWP (RFC 5649, NIST SP 800-38F): 16 to 65,544 bytes, the same each time.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`], or [`WorkError::Crypto`].
    pub fn wrap(&self, key: &KeyMaterial) -> Result<Vec<u8>, WorkError> {
        match &self.inner {
            Inner::Kek(kek) => Ok(kek.wrap(key)?),
            Inner::Pair(pair) => pair.wrap(key),
            _ => self.wrong_purpose(),
        }
    }

    /// Unwraps what [`Self::wrap`] made, here or elsewhere.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`], or [`WorkError::Failed`] where it was not wrapped with this key or changed.
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<KeyMaterial, WorkError> {
        match &self.inner {
            Inner::Kek(kek) => kek.unwrap(wrapped),
            Inner::Pair(pair) => pair.unwrap(wrapped),
            _ => self.wrong_purpose(),
        }
    }
}

impl fmt::Debug for WorkingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkingKey")
            .field("algorithm", &self.algorithm)
            .field("purpose", &self.purpose)
            .finish_non_exhaustive()
    }
}
