//! The wrapped form of a key version that a client holds: opaque to it, opened here alone.

use std::fmt;

use aws_lc_rs::hmac;
use zeroize::Zeroizing;

use crate::cipher::{self, SALT_LEN};
use crate::codec::Reader;
use crate::{Algorithm, CryptoFailure, KeyMaterial, OpenError, random};

const MAGIC: [u8; 3] = *b"PKB";
const FORMAT: u8 = 1;
const HEADER_LEN: usize = 26;
const SEAL_LABEL: &str = "polykey/blob/v1";
const SALT_LABEL: &str = "polykey/blob/salt/v1";
const CHECKSUM_LABEL: &str = "polykey/blob/checksum/v1";

/// The random key of one version's blobs. It lives only inside that version's record: blobs
/// survive every rotation of the root, and die with the version.
pub struct BlobKey(Box<Zeroizing<[u8; 32]>>);

impl BlobKey {
    /// A new key.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn generate() -> Result<Self, CryptoFailure> {
        random::secret().map(Box::new).map(Self)
    }

    pub(crate) fn from_opened(bytes: &[u8; 32]) -> Self {
        let mut key = Box::new(Zeroizing::new([0; 32]));
        key.copy_from_slice(bytes);
        Self(key)
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    fn prf(&self, label: &str, parts: &[&[u8]]) -> Result<[u8; 32], CryptoFailure> {
        let key = cipher::subkey(&self.0, label, &[])?;
        let mut cx = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()));
        for part in parts {
            cx.update(&(part.len() as u64).to_be_bytes());
            cx.update(part);
        }
        let mut out = [0; 32];
        out.copy_from_slice(cx.sign().as_ref());
        Ok(out)
    }
}

impl fmt::Debug for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlobKey(..)")
    }
}

/// What a blob says of itself; authentic once it has been opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobHeader {
    /// The key.
    pub key_id: [u8; 16],
    /// The version, from 1.
    pub version: u32,
    /// What the material is for.
    pub algorithm: Algorithm,
}

impl BlobHeader {
    fn encode(&self) -> Vec<u8> {
        let Self { key_id, version, algorithm } = self;
        let mut out = Vec::with_capacity(HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.push(FORMAT);
        out.extend_from_slice(key_id);
        out.extend_from_slice(&version.to_be_bytes());
        out.extend_from_slice(&algorithm.code().to_be_bytes());
        out
    }
}

/// The wrapped blob. Bytes: `"PKB"` ‖ format 1 ‖ key id 16 ‖ version u32 ‖ algorithm u16 ‖ salt 32
/// ‖ commitment 32 ‖ ciphertext ‖ tag 16, integers big-endian.
#[derive(Debug)]
pub enum WrappedBlob {}

impl WrappedBlob {
    /// What `KeyMaterial.encryption_algorithm` calls it.
    pub const ALGORITHM: &'static str = "polykey-blob-v1:AES-256-GCM-SIV:HKDF-SHA256-commitment";

    /// Wraps a version for a client. The same version gives the same bytes each time: the salt is
    /// a PRF, under the blob key, of all that is sealed.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn seal(
        blob_key: &BlobKey,
        header: &BlobHeader,
        material: &KeyMaterial,
    ) -> Result<Vec<u8>, CryptoFailure> {
        let mut out = header.encode();
        let salt: [u8; SALT_LEN] = blob_key.prf(SALT_LABEL, &[&out, material.bytes()])?;
        let sealed = cipher::seal_committed_with(
            blob_key.bytes(),
            salt,
            SEAL_LABEL,
            &[&out],
            material.bytes(),
        )?;
        out.extend_from_slice(&sealed);
        Ok(out)
    }

    /// Reads which version a blob claims to be, so as to find the blob key that opens it.
    ///
    /// # Errors
    /// [`OpenError::Malformed`] or [`OpenError::UnknownFormat`].
    pub fn header(blob: &[u8]) -> Result<BlobHeader, OpenError> {
        let mut r = Reader::new(blob);
        if r.array() != Some(MAGIC) {
            return Err(OpenError::Malformed);
        }
        match r.u8().ok_or(OpenError::Malformed)? {
            FORMAT => {}
            other => return Err(OpenError::UnknownFormat(other)),
        }
        let mut read = || {
            let key_id = r.array()?;
            let version = r.u32()?;
            let algorithm = Algorithm::from_code(r.u16()?)?;
            (r.rest().len() > cipher::COMMITTED_OVERHEAD).then_some((key_id, version, algorithm))
        };
        let (key_id, version, algorithm) = read().ok_or(OpenError::Malformed)?;
        Ok(BlobHeader { key_id, version, algorithm })
    }

    /// Opens a blob with the key of the version that it names.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(blob_key: &BlobKey, blob: &[u8]) -> Result<(BlobHeader, KeyMaterial), OpenError> {
        let header = Self::header(blob)?;
        let (bound, sealed) = blob.split_at_checked(HEADER_LEN).ok_or(OpenError::Malformed)?;
        let secret = cipher::open_committed(blob_key.bytes(), SEAL_LABEL, &[bound], sealed)
            .map_err(|_| OpenError::Broken)?;
        let material = KeyMaterial::from_opened(secret).map_err(|_| OpenError::Malformed)?;
        Ok((header, material))
    }
}

/// A check value of a key: 16 bytes in hexadecimal, an HMAC under the version's blob key. It tells
/// nothing about the key to whoever lacks the blob key.
///
/// # Errors
/// When the cryptographic library fails.
pub fn key_checksum(blob_key: &BlobKey, material: &KeyMaterial) -> Result<String, CryptoFailure> {
    let mac = blob_key.prf(CHECKSUM_LABEL, &[material.bytes()])?;
    Ok(data_encoding::HEXLOWER.encode(mac.first_chunk::<16>().map_or(&[], |c| c.as_slice())))
}
