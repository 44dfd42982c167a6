//! What the record of a key version holds: its material under the ring, its material under a
//! wrapper as well, or where the material resides.

use std::fmt;

use zeroize::Zeroizing;

use crate::cipher;
use crate::codec::Reader;
use crate::hardened::{HardenedBlobKey, HardenedMaterial};
use crate::ring::Epoch;
use crate::{
    Algorithm, BlobHeader, BlobKey, CryptoFailure, KeyMaterial, OpenError, Ring, WrappedBlob,
    WrappedKey, WrapperId,
};

const FORMAT: u8 = 1;
const WRAPPED: u8 = 1;
const RESIDENT: u8 = 2;
const HARDENED: u8 = 3;
const LABEL: &str = "polykey/material/v1";

/// What a version's material is bound to. It opens for exactly this and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaterialContext {
    /// The node that holds the key.
    pub node: [u8; 16],
    /// The key.
    pub key_id: [u8; 16],
    /// The version, from 1.
    pub version: u32,
    /// What the material is for.
    pub algorithm: Algorithm,
    /// Whether the material may ever leave; fixed when the key is made.
    pub exportable: bool,
}

impl MaterialContext {
    /// What the version's wrapped blob says of itself.
    pub(crate) fn blob(&self) -> BlobHeader {
        let Self { node: _, key_id, version, algorithm, exportable: _ } = *self;
        BlobHeader { key_id, version, algorithm }
    }
}

/// Where a version's material is, as its stored bytes say without being opened.
///
/// Bytes: format 1 ‖ state u8 ‖ epoch u32 ‖ …; after the epoch, `Wrapped` (1) has salt 32 ‖
/// commitment 32 ‖ ciphertext of (blob key 32 ‖ material) ‖ tag 16, and `Resident` (2) has id
/// length u8 ‖ wrapper id ‖ object length u16 ‖ object, then the same envelope around the blob key
/// alone. `Hardened` (3) has the envelope around length u32 ‖ [`WrappedKey`] of the blob key ‖
/// wrapped blob: the blob holds the material, and the wrapper alone gives the key of the blob.
/// Integers are big-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MaterialState {
    /// Here, wrapped under a storage-key epoch.
    Wrapped {
        /// The epoch.
        epoch: u32,
    },
    /// In the device behind a wrapper, which it never leaves.
    Resident {
        /// The epoch that seals the blob key.
        epoch: u32,
        /// The device's wrapper.
        wrapper: WrapperId,
        /// The device's handle of the key, opaque.
        object: Vec<u8>,
    },
    /// Here, wrapped under a storage-key epoch, and inside that by a hardware or cloud wrapper.
    Hardened {
        /// The epoch.
        epoch: u32,
    },
}

impl MaterialState {
    /// Reads the state of stored material.
    ///
    /// # Errors
    /// [`OpenError::Malformed`] or [`OpenError::UnknownFormat`].
    pub fn decode(stored: &[u8]) -> Result<Self, OpenError> {
        split(stored).map(|(state, _, _)| state)
    }

    /// The storage-key epoch it depends on.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        match self {
            Self::Wrapped { epoch } | Self::Resident { epoch, .. } | Self::Hardened { epoch } => {
                *epoch
            }
        }
    }
}

/// State, header bytes, sealed bytes.
fn split(stored: &[u8]) -> Result<(MaterialState, &[u8], &[u8]), OpenError> {
    let mut r = Reader::new(stored);
    match r.u8().ok_or(OpenError::Malformed)? {
        FORMAT => {}
        other => return Err(OpenError::UnknownFormat(other)),
    }
    let state = read_state(&mut r).ok_or(OpenError::Malformed)?;
    let sealed = r.rest();
    let header = stored.len().checked_sub(sealed.len()).and_then(|at| stored.get(..at));
    match header {
        Some(header) if sealed.len() > cipher::COMMITTED_OVERHEAD => Ok((state, header, sealed)),
        _ => Err(OpenError::Malformed),
    }
}

fn read_state(r: &mut Reader<'_>) -> Option<MaterialState> {
    match (r.u8()?, r.u32()?) {
        (WRAPPED, epoch) => Some(MaterialState::Wrapped { epoch }),
        (HARDENED, epoch) => Some(MaterialState::Hardened { epoch }),
        (RESIDENT, epoch) => {
            let len = usize::from(r.u8()?);
            let wrapper = WrapperId::new(std::str::from_utf8(r.take(len)?).ok()?)?;
            let len = usize::from(r.u16()?);
            Some(MaterialState::Resident { epoch, wrapper, object: r.take(len)?.to_vec() })
        }
        _ => None,
    }
}

/// A version's material and the key of the blobs made from it.
pub struct UnwrappedMaterial {
    /// The material.
    pub material: KeyMaterial,
    /// The key under which clients hold this version wrapped.
    pub blob_key: BlobKey,
}

impl fmt::Debug for UnwrappedMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnwrappedMaterial")
            .field("material", &self.material)
            .finish_non_exhaustive()
    }
}

/// Where a version's material resides, and the key of the blobs made for it.
#[derive(Debug)]
pub struct ResidentMaterial {
    /// The device's wrapper.
    pub wrapper: WrapperId,
    /// The device's handle of the key.
    pub object: Vec<u8>,
    /// The key under which clients hold the handle wrapped.
    pub blob_key: BlobKey,
}

/// Why stored material gives no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnwrapMaterialError {
    /// It does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It resides in a device: ask that.
    #[error("the material resides in a device")]
    Resident,
    /// The ring alone does not give it, or the ring alone does: the other call is for it.
    #[error("the material is wrapped in another way than its key says")]
    OtherState,
}

fn bind<T>(cx: &MaterialContext, header: &[u8], f: impl FnOnce(&[&[u8]]) -> T) -> T {
    let MaterialContext { node, key_id, version, algorithm, exportable } = cx;
    f(&[
        node,
        key_id,
        &version.to_be_bytes(),
        &algorithm.code().to_be_bytes(),
        &[u8::from(*exportable)],
        header,
    ])
}

/// The plaintext of a hardened version's envelope.
fn read_hardened(contents: &[u8]) -> Option<HardenedMaterial> {
    let mut r = Reader::new(contents);
    let len = usize::try_from(r.u32()?).ok()?;
    let wrapped = WrappedKey::decode(r.take(len)?).ok()?;
    let blob = r.rest().to_vec();
    (!blob.is_empty()).then_some(HardenedMaterial { wrapped, blob })
}

impl Ring {
    /// Wraps a version's material, with its blob key, under the primary epoch.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn wrap_material(
        &self,
        cx: &MaterialContext,
        material: &KeyMaterial,
        blob_key: &BlobKey,
    ) -> Result<Vec<u8>, CryptoFailure> {
        let mut secret = Zeroizing::new(Vec::with_capacity(32 + material.len()));
        secret.extend_from_slice(blob_key.bytes());
        secret.extend_from_slice(material.bytes());
        envelope(self.primary(), WRAPPED, cx, &secret)
    }

    /// Puts a version's material under a blob key that a wrapper has wrapped, and both under the
    /// primary epoch. Gives what is stored, and the wrapped blob in it.
    ///
    /// # Errors
    /// When the cryptographic library fails, or the blob key was wrapped for another key.
    pub fn harden_material(
        &self,
        cx: &MaterialContext,
        material: &KeyMaterial,
        key: &HardenedBlobKey,
    ) -> Result<(Vec<u8>, Vec<u8>), CryptoFailure> {
        if !key.is_of(cx) {
            return Err(CryptoFailure("a blob key that was wrapped for another key"));
        }
        let blob = WrappedBlob::seal(&key.blob_key, &cx.blob(), material)?;
        let wrapped = key.wrapped.encode();
        let len = u32::try_from(wrapped.len()).map_err(|_| CryptoFailure("a wrapped key"))?;
        let mut contents = Vec::with_capacity(4 + wrapped.len() + blob.len());
        contents.extend_from_slice(&len.to_be_bytes());
        contents.extend_from_slice(&wrapped);
        contents.extend_from_slice(&blob);
        Ok((envelope(self.primary(), HARDENED, cx, &contents)?, blob))
    }

    /// Records where a version's material resides, with its blob key, under the primary epoch.
    ///
    /// # Errors
    /// When the cryptographic library fails, or the handle has more than 65,535 bytes.
    pub fn place_material(
        &self,
        cx: &MaterialContext,
        wrapper: &WrapperId,
        object: &[u8],
        blob_key: &BlobKey,
    ) -> Result<Vec<u8>, CryptoFailure> {
        let place = place(wrapper, object).ok_or(CryptoFailure("a long handle"))?;
        envelope_with(self.primary(), RESIDENT, &place, cx, blob_key.bytes())
    }

    /// Where a version's material resides.
    ///
    /// # Errors
    /// See [`UnwrapMaterialError`].
    pub fn resident_material(
        &self,
        cx: &MaterialContext,
        stored: &[u8],
    ) -> Result<ResidentMaterial, UnwrapMaterialError> {
        let (state, secret) = self.opened(cx, stored)?;
        let MaterialState::Resident { wrapper, object, .. } = state else {
            return Err(UnwrapMaterialError::OtherState);
        };
        let blob_key: &[u8; 32] = secret.as_slice().try_into().map_err(|_| OpenError::Malformed)?;
        Ok(ResidentMaterial { wrapper, object, blob_key: BlobKey::from_opened(blob_key) })
    }

    /// Opens a version's material, under whichever epoch it names.
    ///
    /// # Errors
    /// See [`UnwrapMaterialError`].
    pub fn unwrap_material(
        &self,
        cx: &MaterialContext,
        stored: &[u8],
    ) -> Result<UnwrappedMaterial, UnwrapMaterialError> {
        let (state, secret) = self.opened(cx, stored)?;
        match state {
            MaterialState::Wrapped { .. } => {}
            MaterialState::Resident { .. } => return Err(UnwrapMaterialError::Resident),
            MaterialState::Hardened { .. } => return Err(UnwrapMaterialError::OtherState),
        }
        let (blob_key, material) = secret.split_first_chunk::<32>().ok_or(OpenError::Malformed)?;
        Ok(UnwrappedMaterial {
            material: KeyMaterial::from_secret(material.to_vec())
                .map_err(|_| OpenError::Malformed)?,
            blob_key: BlobKey::from_opened(blob_key),
        })
    }

    /// What is stored of a hardened version's material: the wrapped blob, and the wrapped key that
    /// opens it. Nothing of it is secret, and no wrapper is asked.
    ///
    /// # Errors
    /// See [`UnwrapMaterialError`].
    pub fn hardened_material(
        &self,
        cx: &MaterialContext,
        stored: &[u8],
    ) -> Result<HardenedMaterial, UnwrapMaterialError> {
        let (state, contents) = self.opened(cx, stored)?;
        if !matches!(state, MaterialState::Hardened { .. }) {
            return Err(UnwrapMaterialError::OtherState);
        }
        let hardened = read_hardened(&contents).ok_or(OpenError::Malformed)?;
        match WrappedBlob::header(&hardened.blob) {
            Ok(header) if header == cx.blob() => Ok(hardened),
            _ => Err(OpenError::Malformed.into()),
        }
    }

    /// The plaintext of the envelope.
    fn opened(
        &self,
        cx: &MaterialContext,
        stored: &[u8],
    ) -> Result<(MaterialState, Zeroizing<Vec<u8>>), UnwrapMaterialError> {
        let (state, header, sealed) = split(stored)?;
        let number = state.epoch();
        let epoch = self.epoch(number).ok_or(OpenError::UnknownEpoch(number))?;
        let plaintext = bind(cx, header, |context| {
            cipher::open_committed(epoch.material.as_slice(), LABEL, context, sealed)
        })
        .map_err(|_| OpenError::Broken)?;
        Ok((state, plaintext))
    }

    /// Moves a version's material to the primary epoch; blobs that clients hold stay valid. No
    /// wrapper is asked: what one has wrapped stays as it is.
    ///
    /// # Errors
    /// See [`UnwrapMaterialError`]; a failure of the library counts as
    /// [`OpenError::Broken`].
    pub fn rewrap_material(
        &self,
        cx: &MaterialContext,
        stored: &[u8],
    ) -> Result<Vec<u8>, UnwrapMaterialError> {
        let (state, plaintext) = self.opened(cx, stored)?;
        let (state, place) = match &state {
            MaterialState::Wrapped { .. } => (WRAPPED, Vec::new()),
            MaterialState::Hardened { .. } => (HARDENED, Vec::new()),
            MaterialState::Resident { wrapper, object, .. } => {
                (RESIDENT, place(wrapper, object).ok_or(OpenError::Malformed)?)
            }
        };
        let sealed = envelope_with(self.primary(), state, &place, cx, &plaintext);
        Ok(sealed.map_err(|_| OpenError::Broken)?)
    }
}

/// Which device, and which of its keys, as the header has it.
fn place(wrapper: &WrapperId, object: &[u8]) -> Option<Vec<u8>> {
    let id = wrapper.as_str().as_bytes();
    let mut out = vec![u8::try_from(id.len()).ok()?];
    out.extend_from_slice(id);
    out.extend_from_slice(&u16::try_from(object.len()).ok()?.to_be_bytes());
    out.extend_from_slice(object);
    Some(out)
}

/// Format, state and epoch, and the plaintext sealed under them.
fn envelope(
    epoch: &Epoch,
    state: u8,
    cx: &MaterialContext,
    plaintext: &[u8],
) -> Result<Vec<u8>, CryptoFailure> {
    envelope_with(epoch, state, &[], cx, plaintext)
}

/// The same, with the place of a resident key behind the epoch.
fn envelope_with(
    epoch: &Epoch,
    state: u8,
    place: &[u8],
    cx: &MaterialContext,
    plaintext: &[u8],
) -> Result<Vec<u8>, CryptoFailure> {
    let len = 6 + place.len() + cipher::COMMITTED_OVERHEAD + plaintext.len();
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(&[FORMAT, state]);
    out.extend_from_slice(&epoch.number.to_be_bytes());
    out.extend_from_slice(place);
    let sealed = bind(cx, &out, |context| {
        cipher::seal_committed(epoch.material.as_slice(), LABEL, context, plaintext)
    })?;
    out.extend_from_slice(&sealed);
    Ok(out)
}
