//! Sealed records: what the store keeps, bound to the row where it stands.

use std::fmt;

use zeroize::Zeroizing;

use crate::cipher::{NONCE_LEN, TAG_LEN};
use crate::codec::Reader;
use crate::{CryptoFailure, Ring, random};

const FORMAT: u8 = 1;
const LABEL: &[u8] = b"polykey/record/v1";
const HEADER_LEN: usize = 1 + 4 + 8;

/// Where a record stands. It opens there and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordBinding<'a> {
    /// The space of the store.
    pub space: u8,
    /// The type of the record.
    pub kind: u8,
    /// The key of its row.
    pub row_key: &'a [u8],
}

/// What a sealed record says of itself. Authentic only once the record has been opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// The version of the envelope.
    pub format: u8,
    /// The storage-key epoch it is sealed under.
    pub epoch: u32,
    /// The counter it was sealed with.
    pub counter: u64,
}

/// An opened record.
pub struct OpenedRecord {
    /// The counter it was sealed with.
    pub counter: u64,
    /// The storage-key epoch it is sealed under.
    pub epoch: u32,
    /// What was sealed.
    pub plaintext: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for OpenedRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenedRecord")
            .field("counter", &self.counter)
            .field("epoch", &self.epoch)
            .field("len", &self.plaintext.len())
            .finish()
    }
}

/// Why something sealed does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Too short or not of this type.
    #[error("malformed")]
    Malformed,
    /// A newer version wrote it.
    #[error("format {0} is not known to this version")]
    UnknownFormat(u8),
    /// Sealed under an epoch that the ring does not hold.
    #[error("sealed under epoch {0}, which this ring does not hold")]
    UnknownEpoch(u32),
    /// Changed, or moved from where it was sealed for, or sealed under another key.
    #[error("does not authenticate")]
    Broken,
}

/// Reads a record's header without opening it.
///
/// # Errors
/// [`OpenError::Malformed`] or [`OpenError::UnknownFormat`].
pub fn header(sealed: &[u8]) -> Result<RecordHeader, OpenError> {
    let mut r = Reader::new(sealed);
    let format = r.u8().ok_or(OpenError::Malformed)?;
    if format != FORMAT {
        return Err(OpenError::UnknownFormat(format));
    }
    let epoch = r.u32().ok_or(OpenError::Malformed)?;
    let counter = r.u64().ok_or(OpenError::Malformed)?;
    if r.rest().len() < NONCE_LEN + TAG_LEN {
        return Err(OpenError::Malformed);
    }
    Ok(RecordHeader { format, epoch, counter })
}

/// Seals and opens records under the ring it was made from; cheap to clone.
#[derive(Debug, Clone)]
pub struct Sealer(Ring);

impl Ring {
    /// A sealer over this ring as it is now.
    #[must_use]
    pub fn sealer(&self) -> Sealer {
        Sealer(self.clone())
    }
}

impl Sealer {
    /// What [`Self::seal_record`] adds to a plaintext, in bytes.
    pub const OVERHEAD: usize = HEADER_LEN + NONCE_LEN + TAG_LEN;

    /// Whether the ring holds this epoch.
    #[must_use]
    pub fn holds(&self, epoch: u32) -> bool {
        self.0.epoch(epoch).is_some()
    }

    /// Seals a record under the primary epoch:
    /// format 1 ‖ epoch u32 ‖ counter u64 ‖ nonce 12 ‖ AES-256-GCM-SIV ciphertext ‖ tag 16.
    /// 1 to 2 µs for 256 bytes.
    ///
    /// # Errors
    /// When the random generator fails or the plaintext exceeds 64 GiB.
    pub fn seal_record(
        &self,
        binding: &RecordBinding<'_>,
        counter: u64,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, CryptoFailure> {
        let epoch = self.0.primary();
        let nonce = random::nonce()?;
        let mut out = Vec::with_capacity(Self::OVERHEAD + plaintext.len());
        out.push(FORMAT);
        out.extend_from_slice(&epoch.number.to_be_bytes());
        out.extend_from_slice(&counter.to_be_bytes());
        out.extend_from_slice(&nonce);
        let aad = associated_data(binding, epoch.number, counter);
        epoch.record.seal_onto(&mut out, &nonce, &aad, plaintext)?;
        Ok(out)
    }

    /// Opens a record at the place it was sealed for, under whichever epoch it names.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_record(
        &self,
        binding: &RecordBinding<'_>,
        sealed: &[u8],
    ) -> Result<OpenedRecord, OpenError> {
        let RecordHeader { format: _, epoch: number, counter } = header(sealed)?;
        let epoch = self.0.epoch(number).ok_or(OpenError::UnknownEpoch(number))?;
        let mut r = Reader::new(sealed.get(HEADER_LEN..).unwrap_or_default());
        let nonce: [u8; NONCE_LEN] = r.array().ok_or(OpenError::Malformed)?;
        let aad = associated_data(binding, number, counter);
        let plaintext = epoch.record.open(&nonce, &aad, r.rest()).map_err(|_| OpenError::Broken)?;
        Ok(OpenedRecord { counter, epoch: number, plaintext })
    }
}

/// Label ‖ space ‖ kind ‖ length of the row key ‖ row key ‖ epoch ‖ counter: fixed widths around
/// one length-prefixed part, so that no two places share one encoding.
fn associated_data(binding: &RecordBinding<'_>, epoch: u32, counter: u64) -> Vec<u8> {
    let RecordBinding { space, kind, row_key } = *binding;
    let mut aad = Vec::with_capacity(LABEL.len() + 3 + 8 + row_key.len() + 12);
    aad.extend_from_slice(LABEL);
    aad.extend_from_slice(&[FORMAT, space, kind]);
    aad.extend_from_slice(&(row_key.len() as u64).to_be_bytes());
    aad.extend_from_slice(row_key);
    aad.extend_from_slice(&epoch.to_be_bytes());
    aad.extend_from_slice(&counter.to_be_bytes());
    aad
}
