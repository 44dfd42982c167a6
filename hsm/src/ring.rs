//! The ring of a node: its storage keys by epoch, and the keys that outlive every rotation.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

use crate::cipher::{self, Cipher, Key};
use crate::codec::Reader;
use crate::mac::MacKeys;
use crate::{Algorithm, CryptoFailure, Hex, KeyMaterial, Purpose, RootKey, WorkingKey, random};

const FORMAT: u8 = 1;
const MAX_EPOCHS: usize = 1024;
const RECORD_LABEL: &str = "polykey/ring/record/v1";
const MATERIAL_LABEL: &str = "polykey/ring/material/v1";
const BACKUP_LABEL: &str = "polykey/ring/backup/v1";

/// Why a ring does not open or change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a sealed ring.
    #[error("malformed ring")]
    Malformed,
    /// A newer version wrote it.
    #[error("ring format {0} is not known to this version")]
    UnknownFormat(u8),
    /// Another root key seals it.
    #[error("the ring is sealed under another root key")]
    OtherRoot,
    /// This root key seals it, and it has been changed.
    #[error("the ring does not authenticate")]
    Broken,
    /// No such epoch.
    #[error("the ring has no epoch {0}")]
    UnknownEpoch(u32),
    /// The newest epoch seals new records and cannot be retired.
    #[error("epoch {0} is the primary one")]
    PrimaryEpoch(u32),
    /// Every epoch number, or all the room for epochs, is used up.
    #[error("the ring is full: retire epochs that nothing is sealed under")]
    Full,
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

/// One storage key and what is derived from it, expanded once.
pub(crate) struct Epoch {
    pub(crate) number: u32,
    key: Key,
    pub(crate) record: Cipher,
    pub(crate) material: Key,
}

impl Epoch {
    fn new(node_id: &[u8; 16], number: u32, key: Key) -> Result<Arc<Self>, CryptoFailure> {
        let at = number.to_be_bytes();
        let record = cipher::subkey(&key, RECORD_LABEL, &[node_id, &at])?;
        let material = cipher::subkey(&key, MATERIAL_LABEL, &[node_id, &at])?;
        Ok(Arc::new(Self { number, key, record: Cipher::new(&record), material }))
    }
}

struct NodeKeys {
    node_id: [u8; 16],
    index: Key,
    mac: Key,
    macs: MacKeys,
}

impl NodeKeys {
    fn new(node_id: [u8; 16], index: Key, mac: Key) -> Result<Arc<Self>, CryptoFailure> {
        let macs = MacKeys::derive(&node_id, &index, &mac)?;
        Ok(Arc::new(Self { node_id, index, mac, macs }))
    }
}

pub(crate) struct RingInner {
    node: Arc<NodeKeys>,
    /// Ascending by number and never empty; the last one is primary.
    epochs: Vec<Arc<Epoch>>,
    primary: Arc<Epoch>,
}

/// The keys of an unlocked node. A clone shares them; a changed ring is a new value, so that
/// whoever holds the old one keeps a consistent view.
#[derive(Clone)]
pub struct Ring(Arc<RingInner>);

impl Ring {
    /// A new ring with one epoch, number 1.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn generate(node_id: [u8; 16]) -> Result<Self, CryptoFailure> {
        let node = NodeKeys::new(node_id, random::secret()?, random::secret()?)?;
        let primary = Epoch::new(&node_id, 1, random::secret()?)?;
        Ok(Self(Arc::new(RingInner { node, epochs: vec![primary.clone()], primary })))
    }

    /// Seals the ring under a root key:
    /// format 1 ‖ root id 16 ‖ node id 16 ‖ salt 32 ‖ commitment 32 ‖ ciphertext ‖ tag.
    ///
    /// # Errors
    /// When the cryptographic library fails.
    pub fn seal(&self, root: &RootKey) -> Result<Vec<u8>, CryptoFailure> {
        let RingInner { node, epochs, primary: _ } = &*self.0;
        let mut contents = Zeroizing::new(Vec::with_capacity(68 + 36 * epochs.len()));
        contents.extend_from_slice(node.index.as_slice());
        contents.extend_from_slice(node.mac.as_slice());
        for epoch in epochs {
            contents.extend_from_slice(&epoch.number.to_be_bytes());
            contents.extend_from_slice(epoch.key.as_slice());
        }
        let mut out = Vec::with_capacity(33 + cipher::COMMITTED_OVERHEAD + contents.len());
        out.push(FORMAT);
        out.extend_from_slice(&root.id());
        out.extend_from_slice(&node.node_id);
        let sealed = root.seal_ring(&out, &contents)?;
        out.extend_from_slice(&sealed);
        Ok(out)
    }

    /// Opens a sealed ring.
    ///
    /// # Errors
    /// See [`RingError`].
    pub fn open(root: &RootKey, sealed: &[u8]) -> Result<Self, RingError> {
        let Some((header, body)) = sealed.split_at_checked(33) else {
            return Err(match sealed.first() {
                None | Some(&FORMAT) => RingError::Malformed,
                Some(&other) => RingError::UnknownFormat(other),
            });
        };
        let mut r = Reader::new(header);
        match r.u8().ok_or(RingError::Malformed)? {
            FORMAT => {}
            other => return Err(RingError::UnknownFormat(other)),
        }
        if r.array() != Some(root.id()) {
            return Err(RingError::OtherRoot);
        }
        let node_id: [u8; 16] = r.array().ok_or(RingError::Malformed)?;
        let contents = root.open_ring(header, body).map_err(|_| RingError::Broken)?;
        Self::read(node_id, &contents)
    }

    fn read(node_id: [u8; 16], contents: &[u8]) -> Result<Self, RingError> {
        let mut r = Reader::new(contents);
        let node = NodeKeys::new(node_id, key(&mut r)?, key(&mut r)?)?;
        let mut epochs: Vec<Arc<Epoch>> = Vec::new();
        while let Some(number) = r.u32() {
            if epochs.len() >= MAX_EPOCHS || epochs.last().is_some_and(|e| e.number >= number) {
                return Err(RingError::Malformed);
            }
            epochs.push(Epoch::new(&node_id, number, key(&mut r)?)?);
        }
        r.finish().ok_or(RingError::Malformed)?;
        let primary = epochs.last().cloned().ok_or(RingError::Malformed)?;
        Ok(Self(Arc::new(RingInner { node, epochs, primary })))
    }

    /// Which node's ring it is.
    #[must_use]
    pub fn node_id(&self) -> [u8; 16] {
        self.0.node.node_id
    }

    /// The epoch under which new records are sealed.
    #[must_use]
    pub fn primary_epoch(&self) -> u32 {
        self.0.primary.number
    }

    /// Every epoch, oldest first.
    #[must_use]
    pub fn epochs(&self) -> Vec<u32> {
        self.0.epochs.iter().map(|e| e.number).collect()
    }

    /// Adds an epoch with a new key and makes it primary; gives its number, one more than the
    /// last. Clones made before do not see it.
    ///
    /// # Errors
    /// [`RingError::Full`] or [`RingError::Crypto`]; the ring is unchanged then.
    pub fn add_epoch(&mut self) -> Result<u32, RingError> {
        let RingInner { node, epochs, primary } = &*self.0;
        if epochs.len() >= MAX_EPOCHS {
            return Err(RingError::Full);
        }
        let number = primary.number.checked_add(1).ok_or(RingError::Full)?;
        let primary = Epoch::new(&node.node_id, number, random::secret()?)?;
        let mut epochs = epochs.clone();
        epochs.push(primary.clone());
        self.0 = Arc::new(RingInner { node: node.clone(), epochs, primary });
        Ok(number)
    }

    /// Forgets an epoch. Whatever is still sealed under it is lost: reseal first.
    ///
    /// # Errors
    /// [`RingError::PrimaryEpoch`] or [`RingError::UnknownEpoch`]; the ring is unchanged then.
    pub fn retire_epoch(&mut self, number: u32) -> Result<(), RingError> {
        let RingInner { node, epochs, primary } = &*self.0;
        if primary.number == number {
            return Err(RingError::PrimaryEpoch(number));
        }
        let kept: Vec<_> = epochs.iter().filter(|e| e.number != number).cloned().collect();
        if kept.len() == epochs.len() {
            return Err(RingError::UnknownEpoch(number));
        }
        self.0 = Arc::new(RingInner { node: node.clone(), epochs: kept, primary: primary.clone() });
        Ok(())
    }

    /// The key of backups that are made under an epoch. It is derived when it is asked for, and good for
    /// streams ([`WorkingKey::seal_stream`]) of any number.
    ///
    /// # Errors
    /// [`RingError::UnknownEpoch`]; [`RingError::Crypto`].
    pub fn backup_key(&self, epoch: u32) -> Result<WorkingKey, RingError> {
        let of = self.epoch(epoch).ok_or(RingError::UnknownEpoch(epoch))?;
        let at = epoch.to_be_bytes();
        let key = cipher::subkey(&of.key, BACKUP_LABEL, &[&self.node_id(), &at])?;
        let failed = CryptoFailure("the key of backups cannot be made");
        let material = KeyMaterial::from_secret(key.to_vec()).map_err(|_| failed)?;
        let key = WorkingKey::new(Algorithm::Aes256, Purpose::Encrypt, &material);
        Ok(key.map_err(|_| failed)?)
    }

    pub(crate) fn primary(&self) -> &Epoch {
        &self.0.primary
    }

    pub(crate) fn epoch(&self, number: u32) -> Option<&Epoch> {
        // Nearly everything is sealed under the last epoch or the one before.
        self.0.epochs.iter().rev().find(|e| e.number == number).map(|e| &**e)
    }

    pub(crate) fn macs(&self) -> &MacKeys {
        &self.0.node.macs
    }
}

fn key(r: &mut Reader<'_>) -> Result<Key, RingError> {
    let mut key = Zeroizing::new([0; 32]);
    key.copy_from_slice(r.take(32).ok_or(RingError::Malformed)?);
    Ok(key)
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("node", &Hex(&self.0.node.node_id))
            .field("epochs", &self.epochs())
            .finish_non_exhaustive()
    }
}
