//! Export of key material to a recipient's public key: HPKE (RFC 9180), base mode.

use std::fmt;

use aws_lc_rs::digest;
use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
use zeroize::Zeroizing;

use crate::{CryptoFailure, KeyMaterial, random};

const LABEL: &[u8] = b"polykey-export-v1";
/// SubjectPublicKeyInfo of an X25519 key up to the key itself (RFC 8410).
const X25519_SPKI: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x6e, 0x03, 0x21, 0x00];

/// What an export is bound to, besides the recipient's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The node that exports.
    pub node: [u8; 16],
    /// The key.
    pub key_id: [u8; 16],
    /// The version, from 1.
    pub version: u32,
    /// Who asked for it.
    pub principal: String,
}

impl ExportInfo {
    /// HPKE's `info`: `"polykey-export-v1"` ‖ node 16 ‖ key id 16 ‖ version u32 ‖ length of the
    /// principal u32 ‖ principal ‖ SHA-256 of the recipient's raw public key, integers big-endian.
    /// A recipient that does not use this crate rebuilds it from what it asked for.
    #[must_use]
    pub fn encode(&self, recipient_key_sha256: &[u8; 32]) -> Vec<u8> {
        let Self { node, key_id, version, principal } = self;
        let mut out = Vec::with_capacity(LABEL.len() + 72 + principal.len());
        out.extend_from_slice(LABEL);
        out.extend_from_slice(node);
        out.extend_from_slice(key_id);
        out.extend_from_slice(&version.to_be_bytes());
        // Principals are far below 4 GiB.
        out.extend_from_slice(&u32::try_from(principal.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend_from_slice(principal.as_bytes());
        out.extend_from_slice(recipient_key_sha256);
        out
    }
}

/// Key material that only the recipient opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HpkeExport {
    /// The encapsulated key, 32 bytes.
    pub enc: Vec<u8>,
    /// Ciphertext ‖ tag 16; `aad` is empty.
    pub ciphertext: Vec<u8>,
    /// SHA-256 of the recipient's raw public key, for the audit trail.
    pub recipient_key_sha256: [u8; 32],
}

impl HpkeExport {
    /// The suite, in the words of RFC 9180.
    pub const SUITE: &'static str = "DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM";
}

/// Why there is no export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Neither 32 raw bytes nor a SubjectPublicKeyInfo of X25519, or a point of low order.
    #[error("the recipient's key is not a valid X25519 public key")]
    RecipientKey,
    /// It does not open with this private key and this information.
    #[error("the export does not open")]
    Broken,
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

/// The private key of a recipient: 32 bytes, erased when dropped.
pub struct RecipientPrivateKey(Zeroizing<[u8; 32]>);

impl RecipientPrivateKey {
    /// Takes over a raw X25519 private key (RFC 7748).
    #[must_use]
    pub fn from_bytes(bytes: Zeroizing<[u8; 32]>) -> Self {
        Self(bytes)
    }

    /// The raw private key, for a client to keep.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for RecipientPrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecipientPrivateKey(..)")
    }
}

/// A new private key, and its raw public key.
///
/// # Errors
/// When the random generator fails.
pub fn generate_recipient_keypair() -> Result<(RecipientPrivateKey, [u8; 32]), CryptoFailure> {
    let seed = random::secret::<32>()?;
    let (private, public) = X25519HkdfSha256::derive_keypair(seed.as_slice());
    let mut bytes = Zeroizing::new([0; 32]);
    private.write_exact(bytes.as_mut_slice());
    let mut raw = [0; 32];
    public.write_exact(&mut raw);
    Ok((RecipientPrivateKey(bytes), raw))
}

/// The raw key of 32 raw bytes or a SubjectPublicKeyInfo.
fn raw_public_key(recipient: &[u8]) -> Result<&[u8; 32], ExportError> {
    let raw = if recipient.len() == 32 {
        recipient
    } else {
        recipient.strip_prefix(&X25519_SPKI).ok_or(ExportError::RecipientKey)?
    };
    raw.try_into().map_err(|_| ExportError::RecipientKey)
}

/// SHA-256 of a recipient's raw public key, given raw or as SubjectPublicKeyInfo.
///
/// # Errors
/// [`ExportError::RecipientKey`].
pub fn recipient_key_sha256(recipient: &[u8]) -> Result<[u8; 32], ExportError> {
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, raw_public_key(recipient)?).as_ref());
    Ok(out)
}

/// Encrypts a key to a recipient's X25519 public key, 32 raw bytes or DER SubjectPublicKeyInfo.
///
/// # Errors
/// [`ExportError::RecipientKey`] for anything else, low-order points included (RFC 9180, 7.1.4).
pub fn export_hpke(
    recipient: &[u8],
    info: &ExportInfo,
    material: &KeyMaterial,
) -> Result<HpkeExport, ExportError> {
    let raw = raw_public_key(recipient)?;
    let recipient_key_sha256 = recipient_key_sha256(raw)?;
    let public = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(raw)
        .map_err(|_| ExportError::RecipientKey)?;
    let (enc, ciphertext) = hpke::single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeS::Base,
        &public,
        &info.encode(&recipient_key_sha256),
        material.bytes(),
        &[],
    )
    // All that can fail is the Diffie-Hellman with a key of low order.
    .map_err(|_| ExportError::RecipientKey)?;
    Ok(HpkeExport { enc: enc.to_bytes().to_vec(), ciphertext, recipient_key_sha256 })
}

/// Opens an export, on the recipient's side.
///
/// # Errors
/// [`ExportError::Broken`].
pub fn open_hpke_export(
    private: &RecipientPrivateKey,
    info: &ExportInfo,
    enc: &[u8],
    ciphertext: &[u8],
) -> Result<KeyMaterial, ExportError> {
    let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(private.0.as_slice())
        .map_err(|_| ExportError::Broken)?;
    let mut raw = [0; 32];
    X25519HkdfSha256::sk_to_pk(&private).write_exact(&mut raw);
    let enc =
        <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(enc).map_err(|_| ExportError::Broken)?;
    let secret = hpke::single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
        &OpModeR::Base,
        &private,
        &enc,
        &info.encode(&recipient_key_sha256(&raw)?),
        ciphertext,
        &[],
    )
    .map_err(|_| ExportError::Broken)?;
    KeyMaterial::from_secret(secret).map_err(|_| ExportError::Broken)
}
