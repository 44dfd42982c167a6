//! Streams: a plaintext of any length, sealed and opened in constant memory, chunk by authenticated chunk.
//!
//! STREAM (Hoang, Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and its Nonce-Reuse
//! Misuse-Resistance, 2015): each chunk is sealed with its number, and the last one with a flag, so that chunks
//! cannot be dropped, repeated, moved or cut off.

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

use super::aead::{AeadKey, ChunkNonce, TAG_LEN};
use super::cipher::{Bound, CipherKey};
use super::format::{COMMITMENT_LEN, SALT_LEN, STREAM_HEADER_LEN, StreamHeader};
use super::{Binding, WorkError};
use crate::codec::Reader;
use crate::{CryptoFailure, random};

const LABEL: &str = "polykey/stream/v1";

/// The size of a stream's chunks of plaintext: a power of two, 4 KiB to 4 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkSize(u8);

impl ChunkSize {
    /// 4 KiB.
    pub const MIN: Self = Self(12);
    /// 4 MiB.
    pub const MAX: Self = Self(22);

    /// The size of a stored logarithm, 12 to 22.
    #[must_use]
    pub fn from_log2(log2: u8) -> Option<Self> {
        (Self::MIN.0..=Self::MAX.0).contains(&log2).then_some(Self(log2))
    }

    /// The size of so many bytes.
    #[must_use]
    pub fn from_bytes(bytes: usize) -> Option<Self> {
        let log2 = u8::try_from(bytes.checked_ilog2()?).ok()?;
        Self::from_log2(log2).filter(|size| size.bytes() == bytes)
    }

    /// Its logarithm to base 2.
    #[must_use]
    pub const fn log2(self) -> u8 {
        self.0
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        1 << self.0
    }
}

impl Default for ChunkSize {
    /// 64 KiB.
    fn default() -> Self {
        Self(16)
    }
}

impl fmt::Debug for ChunkSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.bytes())
    }
}

/// The position in a stream; chunks are numbered from 0.
struct Position {
    key: AeadKey,
    next: u32,
}

impl Position {
    /// The number of the next chunk, which it has used up.
    fn advance(&mut self, last: bool) -> Result<ChunkNonce, WorkError> {
        let nonce = ChunkNonce::new(self.next, last);
        self.next = self
            .next
            .checked_add(1)
            .ok_or(WorkError::input("plaintext", "a stream has at most 4,294,967,295 chunks"))?;
        Ok(nonce)
    }
}

/// What has come and fills no whole piece yet, or one of which it is not known whether it is the last.
struct Pending {
    bytes: Zeroizing<Vec<u8>>,
    piece: usize,
}

impl Pending {
    fn new(piece: usize) -> Self {
        // Never grows, and so leaves no copies behind.
        Self { bytes: Zeroizing::new(Vec::with_capacity(piece)), piece }
    }

    /// Hands each piece that another byte follows to `each`, and keeps the rest.
    fn feed<E>(
        &mut self,
        mut input: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.bytes.len() + input.len() > self.piece {
            let (head, rest) =
                input.split_at_checked(self.piece - self.bytes.len()).unwrap_or((input, &[]));
            input = rest;
            if self.bytes.is_empty() {
                each(head)?;
            } else {
                self.bytes.extend_from_slice(head);
                each(&self.bytes)?;
                self.bytes.zeroize();
            }
        }
        self.bytes.extend_from_slice(input);
        Ok(())
    }

    /// How many pieces [`Self::feed`] would hand on.
    fn pieces(&self, input: usize) -> usize {
        (self.bytes.len() + input).saturating_sub(1) / self.piece
    }
}

/// Seals a stream. It holds one chunk at most.
pub struct StreamSealer {
    position: Position,
    pending: Pending,
}

impl StreamSealer {
    fn new(key: AeadKey, chunk_size: ChunkSize) -> Self {
        Self { position: Position { key, next: 0 }, pending: Pending::new(chunk_size.bytes()) }
    }

    /// Takes the next bytes of plaintext, as many as there are, and gives the chunks that they complete.
    ///
    /// # Errors
    /// [`WorkError::Input`] after 2³² − 1 chunks; the stream cannot go on then.
    pub fn push(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, WorkError> {
        let Self { position, pending } = self;
        let chunks = pending.pieces(plaintext.len());
        let mut out = Vec::with_capacity(chunks * (pending.piece + TAG_LEN));
        pending.feed(plaintext, |chunk| seal_onto(&mut out, position, chunk, false))?;
        Ok(out)
    }

    /// Takes the last bytes and gives the rest of the stream. Without this the stream does not open to its end.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(mut self, plaintext: &[u8]) -> Result<Vec<u8>, WorkError> {
        let mut out = self.push(plaintext)?;
        seal_onto(&mut out, &mut self.position, &self.pending.bytes, true)?;
        Ok(out)
    }
}

fn seal_onto(
    out: &mut Vec<u8>,
    position: &mut Position,
    chunk: &[u8],
    last: bool,
) -> Result<(), WorkError> {
    let nonce = position.advance(last)?;
    out.reserve_exact(chunk.len() + TAG_LEN);
    let start = out.len();
    out.extend_from_slice(chunk);
    let tag = position.key.seal_chunk(&nonce, out.get_mut(start..).unwrap_or_default())?;
    out.extend_from_slice(&tag);
    Ok(())
}

/// Opens a stream. It holds one chunk at most, and releases only what has been authenticated; that the stream is
/// whole is known only when [`Self::finish`] succeeds.
pub struct StreamOpener {
    position: Position,
    pending: Pending,
    broken: bool,
}

impl StreamOpener {
    fn new(key: AeadKey, chunk_size: ChunkSize) -> Self {
        let pending = Pending::new(chunk_size.bytes() + TAG_LEN);
        Self { position: Position { key, next: 0 }, pending, broken: false }
    }

    /// Takes the next bytes after the header, as many as there are, and gives the plaintext of the chunks that
    /// they complete.
    ///
    /// # Errors
    /// [`WorkError::Failed`], from then on always; the plaintext of this call is not released.
    pub fn push(&mut self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        if self.broken {
            return Err(WorkError::Failed);
        }
        let Self { position, pending, broken } = self;
        let chunks = pending.pieces(sealed.len());
        let mut out = Zeroizing::new(Vec::with_capacity(chunks * pending.piece));
        let opened = pending.feed(sealed, |chunk| open_onto(&mut out, position, chunk, false));
        *broken = opened.is_err();
        opened.map(|()| out)
    }

    /// Takes the last bytes and gives the rest of the plaintext.
    ///
    /// # Errors
    /// [`WorkError::Failed`], also where the stream was cut off.
    pub fn finish(mut self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        // One allocation for both parts, so that no copy of the plaintext is left behind.
        let whole = self.pending.bytes.len() + sealed.len();
        let pushed = self.push(sealed)?;
        let mut out = Zeroizing::new(Vec::with_capacity(whole));
        out.extend_from_slice(&pushed);
        // An empty chunk ends nothing but the empty stream: one plaintext has one length.
        let empty = self.pending.bytes.len() <= TAG_LEN;
        if empty && self.position.next > 0 {
            return Err(WorkError::Failed);
        }
        open_onto(&mut out, &mut self.position, &self.pending.bytes, true)?;
        Ok(out)
    }
}

fn open_onto(
    out: &mut Vec<u8>,
    position: &mut Position,
    sealed: &[u8],
    last: bool,
) -> Result<(), WorkError> {
    let nonce = position.advance(last).map_err(|_| WorkError::Failed)?;
    let len = sealed.len().checked_sub(TAG_LEN).ok_or(WorkError::Failed)?;
    let start = out.len();
    out.resize(start + len, 0);
    let place = out.get_mut(start..).unwrap_or_default();
    position.key.open_chunk(&nonce, sealed, place).map_err(|_| WorkError::Failed)
}

impl fmt::Debug for StreamSealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamSealer").field("chunks", &self.position.next).finish_non_exhaustive()
    }
}

impl fmt::Debug for StreamOpener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamOpener").field("chunks", &self.position.next).finish_non_exhaustive()
    }
}

impl CipherKey {
    pub(super) fn seal_stream(
        &self,
        binding: &Binding<'_>,
        chunk_size: ChunkSize,
    ) -> Result<(Vec<u8>, StreamSealer), CryptoFailure> {
        self.seal_stream_with(binding, chunk_size, &random::salt()?)
    }

    /// The salt must never repeat.
    pub(super) fn seal_stream_with(
        &self,
        binding: &Binding<'_>,
        chunk_size: ChunkSize,
        salt: &[u8; SALT_LEN],
    ) -> Result<(Vec<u8>, StreamSealer), CryptoFailure> {
        let header = StreamHeader::new(binding, self.algorithm, chunk_size);
        let (key, commitment) = self.derive(LABEL, header.bytes(), salt, &Bound::of(binding))?;
        let mut out = Vec::with_capacity(STREAM_HEADER_LEN);
        out.extend_from_slice(header.bytes());
        out.extend_from_slice(salt);
        out.extend_from_slice(&commitment);
        Ok((out, StreamSealer::new(key, chunk_size)))
    }

    pub(super) fn open_stream(
        &self,
        binding: &Binding<'_>,
        header: &[u8],
    ) -> Result<StreamOpener, WorkError> {
        let (fixed, rest) =
            header.split_last_chunk::<{ SALT_LEN + COMMITMENT_LEN }>().ok_or(WorkError::Failed)?;
        let chunk_size = fixed.last().and_then(|log2| ChunkSize::from_log2(*log2));
        let chunk_size = chunk_size.ok_or(WorkError::Failed)?;
        let expected = StreamHeader::new(binding, self.algorithm, chunk_size);
        if fixed != expected.bytes() {
            return Err(WorkError::Failed);
        }
        let mut r = Reader::new(rest);
        let salt: [u8; SALT_LEN] = r.array().ok_or(WorkError::Failed)?;
        let stated: [u8; COMMITMENT_LEN] = r.array().ok_or(WorkError::Failed)?;
        let key = self
            .derive_committed(LABEL, expected.bytes(), &salt, &Bound::of(binding), &stated)?
            .ok_or(WorkError::Failed)?;
        Ok(StreamOpener::new(key, chunk_size))
    }
}

#[cfg(test)]
impl StreamSealer {
    /// The bytes of plaintext that it may hold.
    pub(super) fn held(&self) -> usize {
        self.pending.bytes.capacity()
    }

    pub(super) fn skip_to(&mut self, chunk: u32) {
        self.position.next = chunk;
    }

    /// Seals a chunk that the API would not.
    pub(super) fn seal_for_test(&mut self, out: &mut Vec<u8>, chunk: &[u8], last: bool) {
        seal_onto(out, &mut self.position, chunk, last).unwrap();
    }
}

#[cfg(test)]
impl StreamOpener {
    /// The bytes of ciphertext that it may hold.
    pub(super) fn held(&self) -> usize {
        self.pending.bytes.capacity()
    }

    pub(super) fn skip_to(&mut self, chunk: u32) {
        self.position.next = chunk;
    }
}
