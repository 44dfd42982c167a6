//! What can be asked of keys at work, parsed.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use polykey_hsm::Algorithm;
use polykey_hsm::work::{ChunkSize, SignInput, SignatureScheme};
use zeroize::Zeroizing;

use super::GetKey;
use crate::authz::{Action, ActionSet, Command};
use crate::key::KeyName;

/// Bytes of a caller's that are nobody else's business; `Debug` shows their length.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Hidden(pub Bytes);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}

/// What a ciphertext is bound to besides its key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bound {
    /// Public, and recorded.
    pub context: BTreeMap<String, String>,
    /// Not recorded.
    pub aad: Hidden,
}

impl Bound {
    /// Whether it binds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.context.is_empty() && self.aad.0.is_empty()
    }
}

/// The form of a ciphertext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// Self-describing bytes.
    #[default]
    Blob,
    /// The same, printable.
    Text,
    /// What the algorithm's standard says.
    Raw,
}

/// Encrypt.
#[derive(Clone, Debug)]
pub struct Encrypt {
    /// Under which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// What.
    pub plaintext: Hidden,
    /// Bound to what.
    pub bound: Bound,
    /// The form of the result.
    pub form: Form,
}

/// Where a ciphertext says that it belongs, or where the caller says so.
#[derive(Clone, Debug)]
pub enum Sealed {
    /// Bytes that name their key and version.
    Blob(Bytes),
    /// Bytes that name nothing: the version is the caller's, 0 = the primary.
    Raw(Bytes, u32),
}

/// Decrypt.
#[derive(Clone, Debug)]
pub struct Decrypt {
    /// Under which key; none = the one that the ciphertext names.
    pub key: Option<KeyName>,
    /// What.
    pub ciphertext: Sealed,
    /// Bound to what.
    pub bound: Bound,
}

/// Encrypt a ciphertext anew.
#[derive(Clone, Debug)]
pub struct Rewrap {
    /// What.
    pub ciphertext: Bytes,
    /// What it is bound to.
    pub bound: Bound,
    /// Under which key; none = its own.
    pub to: Option<KeyName>,
    /// Which version of that; 0 = the primary.
    pub to_version: u32,
    /// What it is to be bound to; none = the same.
    pub to_bound: Option<Bound>,
    /// The form of the result.
    pub form: Form,
}

/// What a data key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataKey {
    /// So many random bytes.
    Symmetric(usize),
    /// A key pair.
    Pair(Algorithm),
}

/// Make a data key.
#[derive(Clone, Debug)]
pub struct GenerateDataKey {
    /// Under which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// Bound to what.
    pub bound: Bound,
    /// What it is.
    pub what: DataKey,
    /// The form of the ciphertext.
    pub form: Form,
}

/// What is signed.
#[derive(Clone, Debug)]
pub enum ToSign {
    /// A message.
    Message(Hidden),
    /// Its digest.
    Digest(Hidden),
}

impl ToSign {
    /// Its bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an empty message is one")]
    pub fn len(&self) -> usize {
        let (Self::Message(bytes) | Self::Digest(bytes)) = self;
        bytes.0.len()
    }

    /// As the algorithms take it.
    #[must_use]
    pub fn input(&self) -> SignInput<'_> {
        match self {
            Self::Message(bytes) => SignInput::Message(&bytes.0),
            Self::Digest(bytes) => SignInput::Digest(&bytes.0),
        }
    }
}

/// Sign.
#[derive(Clone, Debug)]
pub struct Sign {
    /// With which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// What.
    pub input: ToSign,
    /// How; none = the first scheme of the key's algorithm.
    pub scheme: Option<SignatureScheme>,
}

/// Verify a signature.
#[derive(Clone, Debug)]
pub struct Verify {
    /// Of which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// Over what.
    pub input: ToSign,
    /// The signature.
    pub signature: Bytes,
    /// How it was made; none = the first scheme of the key's algorithm.
    pub scheme: Option<SignatureScheme>,
}

/// Make a message authentication code.
#[derive(Clone, Debug)]
pub struct GenerateMac {
    /// With which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// Over what.
    pub message: Hidden,
}

/// Verify a message authentication code.
#[derive(Clone, Debug)]
pub struct VerifyMac {
    /// Of which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// Over what.
    pub message: Hidden,
    /// The code.
    pub mac: Bytes,
}

/// Derive a key.
#[derive(Clone, Debug)]
pub struct DeriveKey {
    /// From which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// For what.
    pub context: BTreeMap<String, String>,
    /// Salt of the extraction.
    pub salt: Bytes,
    /// Bytes of it.
    pub length: usize,
}

/// How a shared secret becomes a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Derivation {
    /// Not at all.
    None,
    /// With HKDF-SHA-256.
    Hkdf {
        /// Salt of the extraction.
        salt: Bytes,
        /// For what.
        info: Bytes,
        /// Bytes of it.
        length: usize,
    },
}

/// Agree on a shared secret.
#[derive(Clone, Debug)]
pub struct Agree {
    /// With which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// The other side's public key: DER, PEM or JWK.
    pub peer: Bytes,
    /// What becomes of the secret.
    pub derivation: Derivation,
}

/// Make a shared secret for a key.
#[derive(Clone, Debug)]
pub struct Encapsulate {
    /// Which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
}

/// Get a shared secret.
#[derive(Clone, Debug)]
pub struct Decapsulate {
    /// With which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// What Encapsulate made.
    pub ciphertext: Bytes,
}

/// What is wrapped.
#[derive(Clone, Debug)]
pub enum ToWrap {
    /// Material of the caller's.
    Material(Hidden),
    /// An exportable key.
    Key(GetKey),
}

/// Wrap key material.
#[derive(Clone, Debug)]
pub struct WrapKey {
    /// With which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// What.
    pub target: ToWrap,
}

/// Unwrap key material.
#[derive(Clone, Debug)]
pub struct UnwrapKey {
    /// With which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// What.
    pub wrapped: Bytes,
}

/// Get a public key.
#[derive(Clone, Debug)]
pub struct GetPublicKey {
    /// Of which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// In which form.
    pub form: PublicForm,
}

/// The form of a public key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PublicForm {
    /// SubjectPublicKeyInfo.
    #[default]
    Der,
    /// The same in PEM.
    Pem,
    /// A JSON Web Key.
    Jwk,
}

/// How imported material is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// CKM_RSA_AES_KEY_WRAP under a one-time RSA key.
    RsaAes,
    /// HPKE to a one-time X25519 key.
    Hpke,
}

/// Material that a key is made from.
pub enum Import {
    /// As it is.
    Plain(Zeroizing<Vec<u8>>),
    /// Protected by a one-time key of the node's.
    Wrapped {
        /// How.
        protection: Protection,
        /// Names the one-time key.
        id: [u8; 24],
        /// The material under it.
        bytes: Bytes,
    },
}

impl fmt::Debug for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(bytes) => write!(f, "Plain([{} bytes])", bytes.len()),
            Self::Wrapped { protection, bytes, .. } => {
                write!(f, "Wrapped({protection:?}, [{} bytes])", bytes.len())
            }
        }
    }
}

/// Get a one-time key for an import.
#[derive(Clone, Copy, Debug)]
pub struct GetImportParameters {
    /// How the material will be protected.
    pub protection: Protection,
}

/// Get random bytes.
#[derive(Clone, Copy, Debug)]
pub struct GenerateRandom {
    /// How many.
    pub length: usize,
}

/// The first half of large encryption: what it is bound to.
#[derive(Clone, Debug)]
pub struct EncryptStream {
    /// Under which key.
    pub key: KeyName,
    /// Which version; 0 = the primary.
    pub version: u32,
    /// Bound to what.
    pub bound: Bound,
    /// How much plaintext a chunk has.
    pub chunk: ChunkSize,
}

/// The first half of large decryption.
#[derive(Clone, Debug)]
pub struct DecryptStream {
    /// Under which key; none = the one that the ciphertext names.
    pub key: Option<KeyName>,
    /// The header of the ciphertext.
    pub header: Bytes,
    /// Bound to what.
    pub bound: Bound,
}

/// The parts of commands that take a permit of their own.
pub mod part {
    /// A data key whose plaintext is not asked for.
    #[derive(Debug)]
    pub struct WrappedDataKey<'a>(pub &'a super::GenerateDataKey);
    /// Encrypting under another key.
    #[derive(Debug)]
    pub struct EncryptRewrapped<'a>(pub &'a super::Rewrap);
    /// Reading a public key.
    #[derive(Debug)]
    pub struct PublicKey<'a>(pub &'a super::GetPublicKey);
}

impl Command for &Rewrap {
    const ACTION: Action = Action::Rewrap;

    /// Under another key or another binding, whoever asks could open what comes out: that is to decrypt.
    fn also(&self) -> ActionSet {
        let set = ActionSet::EMPTY;
        if self.to.is_some() || self.to_bound.is_some() { set.with(Action::Decrypt) } else { set }
    }
}

macro_rules! commands {
    ($($command:ty => $action:ident),* $(,)?) => {
        $(impl Command for $command { const ACTION: Action = Action::$action; })*
    };
}

commands! {
    &Encrypt => Encrypt,
    &Decrypt => Decrypt,
    &GenerateDataKey => GenerateDataKey,
    &Sign => Sign,
    &Verify => Verify,
    &GenerateMac => GenerateMac,
    &VerifyMac => VerifyMac,
    &DeriveKey => DeriveKey,
    &Agree => Agree,
    &Encapsulate => Encapsulate,
    &Decapsulate => Decapsulate,
    &WrapKey => WrapKey,
    &UnwrapKey => UnwrapKey,
    &EncryptStream => Encrypt,
    &DecryptStream => Decrypt,
    &GetImportParameters => GetImportParameters,
    &GenerateRandom => GenerateRandom,
    part::WrappedDataKey<'_> => GenerateWrappedDataKey,
    part::EncryptRewrapped<'_> => Encrypt,
    part::PublicKey<'_> => GetKeyMetadata,
}
