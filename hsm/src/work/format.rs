//! How ciphertexts begin: which key, version and algorithm they are of; and their printable form.

use super::aead::TAG_LEN;
use super::{Binding, ChunkSize};
use crate::codec::Reader;
use crate::{Algorithm, DecodeError, Hex};

const MESSAGE_MAGIC: [u8; 3] = *b"PKC";
const STREAM_MAGIC: [u8; 3] = *b"PKS";
const FORMAT: u8 = 1;
pub(super) const SALT_LEN: usize = 32;
pub(super) const COMMITMENT_LEN: usize = 32;
const MESSAGE_FIXED: usize = 26;
const STREAM_FIXED: usize = MESSAGE_FIXED + 1;
pub(super) const TEXT_PREFIX: &str = "polykey:c1:";

/// What a symmetric message blob is longer than its plaintext, in bytes: header 26 ‖ salt 32 ‖ commitment 32 ‖ … ‖
/// tag 16.
pub const MESSAGE_OVERHEAD: usize = MESSAGE_FIXED + SALT_LEN + COMMITMENT_LEN + TAG_LEN;

/// The length of what precedes the chunks of a stream, in bytes: header 27 ‖ salt 32 ‖ commitment 32.
pub const STREAM_HEADER_LEN: usize = STREAM_FIXED + SALT_LEN + COMMITMENT_LEN;

/// Magic ‖ format 1 ‖ key id 16 ‖ version u32 ‖ algorithm u16, integers big-endian.
fn fixed(magic: [u8; 3], binding: &Binding<'_>, algorithm: Algorithm) -> [u8; MESSAGE_FIXED] {
    let mut out = [0; MESSAGE_FIXED];
    let parts: [&[u8]; 5] = [
        &magic,
        &[FORMAT],
        &binding.key_id,
        &binding.version.to_be_bytes(),
        &algorithm.code().to_be_bytes(),
    ];
    for (to, from) in out.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    out
}

/// The header of a message blob, as its key is bound to it.
pub(crate) struct MessageHeader([u8; MESSAGE_FIXED]);

impl MessageHeader {
    pub(crate) fn new(binding: &Binding<'_>, algorithm: Algorithm) -> Self {
        Self(fixed(MESSAGE_MAGIC, binding, algorithm))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The header of a stream, as its key is bound to it: that of a message with another magic, and log₂ of the chunk
/// size u8.
pub(super) struct StreamHeader([u8; STREAM_FIXED]);

impl StreamHeader {
    pub(super) fn new(binding: &Binding<'_>, algorithm: Algorithm, chunk_size: ChunkSize) -> Self {
        let mut out = [chunk_size.log2(); STREAM_FIXED];
        let fixed = fixed(STREAM_MAGIC, binding, algorithm);
        for (to, from) in out.iter_mut().zip(fixed) {
            *to = from;
        }
        Self(out)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Which of the two formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CiphertextKind {
    /// One plaintext, sealed whole.
    Message,
    /// Chunks.
    Stream,
}

/// What a ciphertext says of itself. Nothing of it is authentic before the ciphertext has been opened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CiphertextHeader {
    /// Which of the two formats.
    pub kind: CiphertextKind,
    /// Its version: 1.
    pub format: u8,
    /// The key.
    pub key_id: [u8; 16],
    /// The version of the key, from 1.
    pub version: u32,
    /// What the key is.
    pub algorithm: Algorithm,
    /// The size of a stream's chunks.
    pub chunk_size: Option<ChunkSize>,
    /// The bytes before the sealed part, salt and commitment included.
    pub header_len: usize,
    /// The bytes of the sealed part, tags included; as far as it was given.
    pub body_len: usize,
    /// The bytes of the plaintext, where they follow from the length.
    pub plaintext_len: Option<usize>,
}

impl std::fmt::Debug for CiphertextHeader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CiphertextHeader")
            .field("kind", &self.kind)
            .field("format", &self.format)
            .field("key_id", &Hex(&self.key_id))
            .field("version", &self.version)
            .field("algorithm", &self.algorithm)
            .field("chunk_size", &self.chunk_size)
            .field("header_len", &self.header_len)
            .field("body_len", &self.body_len)
            .field("plaintext_len", &self.plaintext_len)
            .finish()
    }
}

/// Reads which key a ciphertext claims to be of: a whole message blob, or a stream of which at least the first
/// [`STREAM_HEADER_LEN`] bytes are there.
///
/// # Errors
/// [`DecodeError::Malformed`], for an unknown algorithm too, or [`DecodeError::UnknownFormat`].
pub fn header(blob: &[u8]) -> Result<CiphertextHeader, DecodeError> {
    let mut r = Reader::new(blob);
    let kind = match r.array().ok_or(DecodeError::Malformed)? {
        MESSAGE_MAGIC => CiphertextKind::Message,
        STREAM_MAGIC => CiphertextKind::Stream,
        _ => return Err(DecodeError::Malformed),
    };
    match r.u8().ok_or(DecodeError::Malformed)? {
        FORMAT => {}
        other => return Err(DecodeError::UnknownFormat(other)),
    }
    read(kind, blob.len(), r).ok_or(DecodeError::Malformed)
}

fn read(kind: CiphertextKind, len: usize, mut r: Reader<'_>) -> Option<CiphertextHeader> {
    let key_id = r.array()?;
    let version = r.u32().filter(|version| *version > 0)?;
    let algorithm = Algorithm::from_code(r.u16()?)?;
    let mut chunk_size = None;
    if kind == CiphertextKind::Stream {
        chunk_size = Some(ChunkSize::from_log2(r.u8()?)?);
    }
    let symmetric = !algorithm.is_asymmetric();
    if symmetric {
        r.take(SALT_LEN + COMMITMENT_LEN)?;
    }
    let body_len = r.rest().len();
    let plaintext_len = match (kind, chunk_size) {
        (CiphertextKind::Message, _) if symmetric => Some(body_len.checked_sub(TAG_LEN)?),
        // RSA: a ciphertext as long as the modulus.
        (CiphertextKind::Message, _) => None,
        (CiphertextKind::Stream, Some(chunk_size)) if symmetric => {
            let chunks = body_len.div_ceil(chunk_size.bytes() + TAG_LEN);
            (chunks > 0).then(|| body_len.checked_sub(chunks * TAG_LEN)).flatten()
        }
        (CiphertextKind::Stream, _) => return None,
    };
    Some(CiphertextHeader {
        kind,
        format: FORMAT,
        key_id,
        version,
        algorithm,
        chunk_size,
        header_len: len.checked_sub(body_len)?,
        body_len,
        plaintext_len,
    })
}

/// The printable form: `polykey:c1:` and base64url without padding (RFC 4648).
#[must_use]
pub fn to_text(blob: &[u8]) -> String {
    let mut text = TEXT_PREFIX.to_owned();
    data_encoding::BASE64URL_NOPAD.encode_append(blob, &mut text);
    text
}

/// The ciphertext of a printable form. There is one spelling of each: no padding, no white space, no stray bits.
///
/// # Errors
/// [`DecodeError::Malformed`].
pub fn from_text(text: &str) -> Result<Vec<u8>, DecodeError> {
    text.strip_prefix(TEXT_PREFIX)
        .and_then(|rest| data_encoding::BASE64URL_NOPAD.decode(rest.as_bytes()).ok())
        .ok_or(DecodeError::Malformed)
}
