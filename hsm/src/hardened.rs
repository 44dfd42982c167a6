//! Hardened material: the key of a version's wrapped blob lies under a hardware or cloud wrapper, so
//! that neither store nor root key gives the material without that wrapper.
//!
//! ```text
//! wrapper (a token, a cloud service)
//!    └─ blob key 32        one call of the wrapper, bound to node and key
//!         └─ wrapped blob  the material; committed, bound to key, version, algorithm
//! ```
//! What is wrapped is always 32 bytes, so any wrapper takes a key of any length, and what a client
//! holds of the key (the blob) is known without asking the wrapper.

use std::fmt;

use subtle::ConstantTimeEq;

use crate::{
    BlobKey, CryptoFailure, Deadline, KeyMaterial, KeyWrapper, MaterialContext, OpenError,
    WrapContext, WrapError, WrappedBlob, WrappedKey, key_checksum,
};

fn as_material(key: &BlobKey) -> Result<KeyMaterial, CryptoFailure> {
    let bytes = key.bytes().to_vec();
    KeyMaterial::from_secret(bytes).map_err(|_| CryptoFailure("a blob key of no length"))
}

/// A new blob key and what a wrapper made of it: good for one version of one key.
pub struct HardenedBlobKey {
    pub(crate) blob_key: BlobKey,
    pub(crate) wrapped: WrappedKey,
    place: WrapContext,
}

impl HardenedBlobKey {
    /// Makes one for a version of this key. The wrapper is asked twice: what it wrapped counts once
    /// it has opened again, because a key that nobody opens is a lost one.
    ///
    /// # Errors
    /// What the wrapper says; [`WrapError::Broken`] if what it wrapped does not open.
    pub async fn make(
        wrapper: &dyn KeyWrapper,
        node: [u8; 16],
        key_id: [u8; 16],
        deadline: Deadline,
    ) -> Result<Self, WrapError> {
        let place = WrapContext::hardened_key(node, key_id);
        let blob_key = BlobKey::generate()?;
        let material = as_material(&blob_key)?;
        let wrapped = wrapper.wrap_key(&material, &place, deadline).await?;
        let opened = wrapper.unwrap_key(&wrapped, &place, deadline).await?;
        if !bool::from(opened.bytes().ct_eq(material.bytes())) {
            return Err(WrapError::Broken);
        }
        Ok(Self { blob_key, wrapped, place })
    }

    /// Whether it was wrapped for versions of this key.
    #[must_use]
    pub fn is_of(&self, cx: &MaterialContext) -> bool {
        self.place == WrapContext::hardened_key(cx.node, cx.key_id)
    }

    /// As [`key_checksum`], of material under this key.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn checksum(&self, material: &KeyMaterial) -> Result<String, CryptoFailure> {
        key_checksum(&self.blob_key, material)
    }
}

impl fmt::Debug for HardenedBlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HardenedBlobKey").field("wrapped", &self.wrapped).finish_non_exhaustive()
    }
}

/// What is stored of a hardened version's material. Not secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HardenedMaterial {
    /// The blob key, as the wrapper wrapped it.
    pub wrapped: WrappedKey,
    /// The wrapped blob, which has the material.
    pub blob: Vec<u8>,
}

impl HardenedMaterial {
    /// Has the wrapper open the blob key, and proves it on the blob.
    ///
    /// # Errors
    /// What the wrapper says; [`WrapError::Broken`] if what it gives does not open the blob.
    pub async fn open(
        &self,
        wrapper: &dyn KeyWrapper,
        cx: &MaterialContext,
        deadline: Deadline,
    ) -> Result<BlobKey, WrapError> {
        let place = WrapContext::hardened_key(cx.node, cx.key_id);
        let secret = wrapper.unwrap_key(&self.wrapped, &place, deadline).await?;
        let bytes = secret.bytes().first_chunk::<32>().filter(|_| secret.len() == 32);
        let blob_key = BlobKey::from_opened(bytes.ok_or(WrapError::Broken)?);
        cx.open_blob(&blob_key, &self.blob).map_err(|_| WrapError::Broken)?;
        Ok(blob_key)
    }
}

impl MaterialContext {
    /// The material in the wrapped blob of this version, by its blob key.
    ///
    /// # Errors
    /// [`OpenError::Broken`] if it is not the key of this blob, or the blob not of this version.
    pub fn open_blob(&self, blob_key: &BlobKey, blob: &[u8]) -> Result<KeyMaterial, OpenError> {
        match WrappedBlob::open(blob_key, blob)? {
            (header, material) if header == self.blob() => Ok(material),
            _ => Err(OpenError::Broken),
        }
    }
}
