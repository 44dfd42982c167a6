//! The root key of a node: what slots wrap, and what seals the ring.

use std::fmt;

use aws_lc_rs::hmac;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::cipher::{self, Key};
use crate::codec::Reader;
use crate::{
    CryptoFailure, Deadline, Hex, KeyMaterial, KeyWrapper, WrapContext, WrapError, WrappedKey,
    random,
};

const FORMAT: u8 = 1;
const SLOTS_LABEL: &str = "polykey/root/slots/v1";
const RING_LABEL: &str = "polykey/root/ring/v1";

/// The key under which a node's ring is sealed: 32 random bytes and a public id.
///
/// It lives in memory while the node is unlocked, and at rest only wrapped in slots.
pub struct RootKey {
    id: [u8; 16],
    key: Box<Key>,
}

/// Why a slot does not give a root key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// The wrapper did not open it.
    #[error(transparent)]
    Wrap(#[from] WrapError),
    /// It opened, and what was inside is not a root key.
    #[error("the slot holds something other than a root key")]
    NotARoot,
}

impl RootKey {
    /// A new root key with a new id.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn generate() -> Result<Self, CryptoFailure> {
        Ok(Self { id: random::array()?, key: Box::new(random::secret()?) })
    }

    /// Its id: random, public, never reused.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Wraps this root for one slot.
    ///
    /// # Errors
    /// Whatever the wrapper says.
    pub async fn slot_wrap(
        &self,
        wrapper: &dyn KeyWrapper,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<WrappedKey, WrapError> {
        let mut payload = Vec::with_capacity(49);
        payload.push(FORMAT);
        payload.extend_from_slice(&self.id);
        payload.extend_from_slice(self.key.as_slice());
        let payload =
            KeyMaterial::from_secret(payload).map_err(|e| WrapError::Config(e.to_string()))?;
        wrapper.wrap_key(&payload, cx, deadline).await
    }

    /// Opens a slot.
    ///
    /// # Errors
    /// See [`RootError`]; [`WrapError::NotMine`] says to try another wrapper.
    pub async fn slot_open(
        wrapper: &dyn KeyWrapper,
        wrapped: &WrappedKey,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<Self, RootError> {
        let payload = wrapper.unwrap_key(wrapped, cx, deadline).await?;
        Self::read(payload.bytes()).ok_or(RootError::NotARoot)
    }

    fn read(payload: &[u8]) -> Option<Self> {
        let mut r = Reader::new(payload);
        if r.u8()? != FORMAT {
            return None;
        }
        let id = r.array()?;
        let mut key = Box::new(Zeroizing::new([0; 32]));
        key.copy_from_slice(r.take(32)?);
        r.finish()?;
        Some(Self { id, key })
    }

    /// A MAC over the encoded slot list, which stands in the clear beside the sealed ring: once
    /// the root is open, a slot that was added, removed or changed behind its back shows.
    ///
    /// # Errors
    /// When key derivation fails.
    pub fn mac_slots(&self, encoded: &[u8]) -> Result<[u8; 32], CryptoFailure> {
        let key = cipher::subkey(&self.key, SLOTS_LABEL, &[&self.id])?;
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()), encoded);
        let mut out = [0; 32];
        out.copy_from_slice(tag.as_ref());
        Ok(out)
    }

    /// Whether `mac` is [`Self::mac_slots`] of `encoded`, compared in constant time.
    #[must_use]
    pub fn verify_slots(&self, encoded: &[u8], mac: &[u8]) -> bool {
        self.mac_slots(encoded).is_ok_and(|expected| bool::from(expected.ct_eq(mac)))
    }

    /// Seals a ring's contents; `header` is bound.
    pub(crate) fn seal_ring(
        &self,
        header: &[u8],
        contents: &[u8],
    ) -> Result<Vec<u8>, CryptoFailure> {
        cipher::seal_committed(self.key.as_slice(), RING_LABEL, &[&self.id, header], contents)
    }

    pub(crate) fn open_ring(
        &self,
        header: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, cipher::Broken> {
        cipher::open_committed(self.key.as_slice(), RING_LABEL, &[&self.id, header], sealed)
    }
}

impl fmt::Debug for RootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootKey").field("id", &Hex(&self.id)).finish_non_exhaustive()
    }
}
