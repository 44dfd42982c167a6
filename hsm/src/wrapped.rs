//! A wrapped key as bytes: versioned, self-describing, strictly decoded.

use std::fmt;

use crate::codec::Reader;

const MAGIC: [u8; 3] = *b"PKW";
const FORMAT: u8 = 1;

/// A kind of wrapper. The codes are stored, so none is ever used for another kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SlotKind {
    /// A random 32-byte key from a file, the environment or a credential.
    MasterKey,
    /// A passphrase, stretched with Argon2id.
    Passphrase,
    /// A key in a token that a PKCS#11 module drives.
    Pkcs11,
    /// A key of AWS KMS.
    Aws,
    /// A recovery key whose private half is kept off the node.
    Recovery,
    /// Several wrappers together.
    Quorum,
}

impl SlotKind {
    /// The stored code.
    #[must_use]
    pub const fn code(self) -> u16 {
        match self {
            Self::MasterKey => 1,
            Self::Passphrase => 2,
            Self::Pkcs11 => 3,
            Self::Aws => 4,
            Self::Recovery => 5,
            Self::Quorum => 6,
        }
    }

    /// The kind of a stored code, if this build knows it.
    #[must_use]
    pub const fn from_code(code: u16) -> Option<Self> {
        match code {
            1 => Some(Self::MasterKey),
            2 => Some(Self::Passphrase),
            3 => Some(Self::Pkcs11),
            4 => Some(Self::Aws),
            5 => Some(Self::Recovery),
            6 => Some(Self::Quorum),
            _ => None,
        }
    }

    /// The word for it in configuration and output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MasterKey => "master-key",
            Self::Passphrase => "passphrase",
            Self::Pkcs11 => "pkcs11",
            Self::Aws => "aws",
            Self::Recovery => "recovery",
            Self::Quorum => "quorum",
        }
    }
}

impl fmt::Display for SlotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Names a wrapper inside what it wrapped: 1 to 255 printable ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WrapperId(String);

impl WrapperId {
    /// `None` unless `text` is 1 to 255 printable ASCII characters.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        let printable = text.bytes().all(|b| (0x20..0x7f).contains(&b));
        (printable && (1..=255).contains(&text.len())).then_some(Self(text))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WrapperId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why bytes do not decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They are too short, too long or not of this type at all.
    #[error("malformed")]
    Malformed,
    /// A newer version wrote them.
    #[error("format {0} is not known to this version")]
    UnknownFormat(u8),
    /// A wrapper of a kind that this version lacks made them.
    #[error("slot kind {0} is not known to this version")]
    UnknownKind(u16),
}

/// A key wrapped by a [`crate::KeyWrapper`]. Not secret.
///
/// Bytes: `"PKW"` ‖ format 1 ‖ kind u16 ‖ id length u8 ‖ wrapper id ‖ parameter length u16 ‖
/// parameters ‖ ciphertext length u32 ‖ ciphertext, integers big-endian, nothing after it.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappedKey {
    pub(crate) kind: SlotKind,
    pub(crate) wrapper: WrapperId,
    /// What the wrapper needs besides its secret, public: costs, a key's version.
    pub(crate) parameters: Vec<u8>,
    pub(crate) ciphertext: Vec<u8>,
}

impl WrappedKey {
    /// The longest parameters, in bytes.
    pub const MAX_PARAMETERS: usize = 4096;
    /// The longest ciphertext, in bytes: the longest key with room for what a service adds.
    pub const MAX_CIPHERTEXT: usize = 128 * 1024;

    /// What kind of wrapper made it.
    #[must_use]
    pub fn kind(&self) -> SlotKind {
        self.kind
    }

    /// Which wrapper made it.
    #[must_use]
    pub fn wrapper(&self) -> &WrapperId {
        &self.wrapper
    }

    /// The stored form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let id = self.wrapper.as_str().as_bytes();
        let mut out =
            Vec::with_capacity(13 + id.len() + self.parameters.len() + self.ciphertext.len());
        out.extend_from_slice(&MAGIC);
        out.push(FORMAT);
        out.extend_from_slice(&self.kind.code().to_be_bytes());
        // Both are bounded by construction.
        out.push(u8::try_from(id.len()).unwrap_or(u8::MAX));
        out.extend_from_slice(id);
        out.extend_from_slice(
            &u16::try_from(self.parameters.len()).unwrap_or(u16::MAX).to_be_bytes(),
        );
        out.extend_from_slice(&self.parameters);
        out.extend_from_slice(
            &u32::try_from(self.ciphertext.len()).unwrap_or(u32::MAX).to_be_bytes(),
        );
        out.extend_from_slice(&self.ciphertext);
        out
    }

    /// Reads the stored form. What decodes need not open.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        if r.array() != Some(MAGIC) {
            return Err(DecodeError::Malformed);
        }
        match r.u8() {
            Some(FORMAT) => {}
            Some(other) => return Err(DecodeError::UnknownFormat(other)),
            None => return Err(DecodeError::Malformed),
        }
        let code = r.u16().ok_or(DecodeError::Malformed)?;
        let kind = SlotKind::from_code(code).ok_or(DecodeError::UnknownKind(code))?;
        Self::decode_body(kind, r).ok_or(DecodeError::Malformed)
    }

    fn decode_body(kind: SlotKind, mut r: Reader<'_>) -> Option<Self> {
        let len = usize::from(r.u8()?);
        let wrapper = WrapperId::new(std::str::from_utf8(r.take(len)?).ok()?)?;
        let len = usize::from(r.u16()?);
        let parameters = r.take(len)?.to_vec();
        let len = usize::try_from(r.u32()?).ok()?;
        let ciphertext = r.take(len)?.to_vec();
        r.finish()?;
        let bounded = parameters.len() <= Self::MAX_PARAMETERS
            && (1..=Self::MAX_CIPHERTEXT).contains(&ciphertext.len());
        bounded.then_some(Self { kind, wrapper, parameters, ciphertext })
    }
}

impl fmt::Debug for WrappedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrappedKey")
            .field("kind", &self.kind)
            .field("wrapper", &self.wrapper.as_str())
            .field("len", &self.ciphertext.len())
            .finish_non_exhaustive()
    }
}
