//! Checkpoints: signed statements of the log's size and root, as C2SP `tlog-checkpoint` notes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, ML_DSA_65, UnparsedPublicKey};
use data_encoding::{BASE64, HEXLOWER};
use polykey_proto::polykey::record::v1::CheckpointRecord;
use polykey_storage::{Direction, Store};
use prost::Message;
use serde::Serialize;

use super::trail::{Inner, Trail};
use crate::error::Error;
use crate::time::Time;
use crate::vault::tree::Hash;
use crate::vault::{Vault, space};

/// What signs checkpoints: an Ed25519 key of the node. It may roll over; the keys before it are
/// needed to verify older checkpoints.
pub trait Signer: Send + Sync + 'static {
    /// The public key, as RFC 8032 encodes it.
    fn public_key(&self) -> [u8; 32];
    /// The signature of `message` under it.
    ///
    /// # Errors
    /// [`Error::Internal`] if the cryptographic library fails, [`Error::Unavailable`] if the key is
    /// away.
    fn sign(&self, message: &[u8]) -> Result<[u8; 64], Error>;
    /// The public key of a second signature, if there is to be one.
    fn ml_dsa_key(&self) -> Option<MlDsaKey> {
        None
    }
    /// The second signature of `message`, if there is to be one.
    ///
    /// # Errors
    /// As [`Self::sign`].
    fn sign_ml_dsa(&self, _message: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(None)
    }
}

/// A key that verifies checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyingKey(pub [u8; 32]);

/// The signature type of Ed25519 in C2SP `signed-note`.
const ED25519_NOTE: u8 = 1;

impl VerifyingKey {
    /// From the text of [`std::fmt::Display`]: base64 of 32 bytes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        BASE64.decode(text.trim().as_bytes()).ok()?.try_into().ok().map(Self)
    }

    /// The hint by which a signature line names its key: the first 4 bytes of
    /// SHA-256(name ‖ 0x0a ‖ 0x01 ‖ key).
    #[must_use]
    pub fn hint(&self, name: &str) -> [u8; 4] {
        let input = [name.as_bytes(), b"\n", &[ED25519_NOTE], &self.0].concat();
        let hash = digest(&SHA256, &input);
        hash.as_ref().first_chunk().copied().unwrap_or_default()
    }
}

impl std::fmt::Display for VerifyingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

/// What C2SP `signed-note` leaves to others, and what this one is named.
const ML_DSA_NOTE: &[u8] = b"\xffML-DSA-65";
/// Bytes of an ML-DSA-65 public key.
const ML_DSA_KEY: usize = 1952;

/// A key that verifies the second signature of a checkpoint: ML-DSA-65 (FIPS 204), with an empty context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlDsaKey(Vec<u8>);

impl MlDsaKey {
    /// From 1,952 bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        (bytes.len() == ML_DSA_KEY).then(|| Self(bytes.to_vec()))
    }

    /// From base64.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::new(&BASE64.decode(text.trim().as_bytes()).ok()?)
    }

    /// As FIPS 204 encodes it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The hint by which a signature line names its key: the first 4 bytes of
    /// SHA-256(name ‖ 0x0a ‖ 0xff ‖ "ML-DSA-65" ‖ key).
    #[must_use]
    pub fn hint(&self, name: &str) -> [u8; 4] {
        let hash = digest(&SHA256, &[name.as_bytes(), b"\n", ML_DSA_NOTE, &self.0].concat());
        hash.as_ref().first_chunk().copied().unwrap_or_default()
    }
}

impl std::fmt::Display for MlDsaKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

/// Whose signatures count. With ML-DSA keys, a checkpoint vouches for leaves only if it has a signature of
/// one of those as well.
#[derive(Clone, Copy, Debug)]
pub struct Trusted<'k> {
    /// Ed25519.
    pub ed25519: &'k [VerifyingKey],
    /// ML-DSA-65.
    pub ml_dsa: &'k [MlDsaKey],
}

impl<'k, T: AsRef<[VerifyingKey]> + ?Sized> From<&'k T> for Trusted<'k> {
    fn from(keys: &'k T) -> Self {
        Self { ed25519: keys.as_ref(), ml_dsa: &[] }
    }
}

/// The name of a node's log: what its checkpoints begin with.
#[must_use]
pub fn origin(node_id: &[u8; 16]) -> String {
    format!("polykey/{}", HEXLOWER.encode(node_id))
}

/// A checkpoint that has been read, and verified if [`Self::verify`] said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The name of the log.
    pub origin: String,
    /// How many leaves it covers.
    pub size: u64,
    /// The root of the tree over them.
    pub root: Hash,
    /// When it was signed, as the signer says.
    pub time: Time,
    /// The whole note.
    pub note: String,
}

const SEPARATOR: &str = "\n\n";

fn body(origin: &str, size: u64, root: &Hash, time: Time) -> String {
    format!("{origin}\n{size}\n{}\ntime {}\n", BASE64.encode(root), time.micros())
}

impl Checkpoint {
    /// Makes and signs one.
    ///
    /// # Errors
    /// As [`Signer::sign`]; [`Error::Internal`] if the signature does not verify.
    pub fn sign(
        origin: String,
        size: u64,
        root: Hash,
        time: Time,
        signer: &dyn Signer,
    ) -> Result<Self, Error> {
        let body = body(&origin, size, &root, time);
        // A key that rolls over between the two calls, or a fault while signing, shows at once.
        for _ in 0..2 {
            let key = VerifyingKey(signer.public_key());
            let mut signed = key.hint(&origin).to_vec();
            signed.extend_from_slice(&signer.sign(body.as_bytes())?);
            let mut note = format!("{body}\n\u{2014} {origin} {}\n", BASE64.encode(&signed));
            let second = signer.ml_dsa_key();
            if let Some((key, signature)) =
                second.as_ref().zip(signer.sign_ml_dsa(body.as_bytes())?)
            {
                let signed = [&key.hint(&origin)[..], &signature].concat();
                note.push_str(&format!("\u{2014} {origin} {}\n", BASE64.encode(&signed)));
            }
            let checkpoint = Self { origin: origin.clone(), size, root, time, note };
            let second = second.is_none_or(|key| {
                checkpoint.verify_ml_dsa(std::slice::from_ref(&key)) == Some(true)
            });
            if second && checkpoint.verify(&[key]).is_some() {
                return Ok(checkpoint);
            }
        }
        Err(Error::internal("a checkpoint does not verify under the key that signed it"))
    }

    /// Reads a note; `None` unless it is exactly one that [`Self::sign`] could have written, the
    /// signature aside.
    #[must_use]
    pub fn parse(note: &str) -> Option<Self> {
        let (text, _) = note.split_once(SEPARATOR)?;
        let mut lines = text.split('\n');
        let origin = lines.next()?.to_owned();
        let size = lines.next()?.parse().ok()?;
        let root = BASE64.decode(lines.next()?.as_bytes()).ok()?.try_into().ok()?;
        let time = lines.next()?.strip_prefix("time ")?.parse().ok()?;
        let time = Time::from_micros(time);
        let canonical = body(&origin, size, &root, time);
        let exact = lines.next().is_none()
            && !origin.is_empty()
            && !origin.contains([' ', '+'])
            && note.strip_prefix(&canonical).is_some_and(|rest| rest.starts_with('\n'));
        exact.then(|| Self { origin, size, root, time, note: note.to_owned() })
    }

    /// Which of `keys` has signed it.
    #[must_use]
    pub fn verify(&self, keys: &[VerifyingKey]) -> Option<VerifyingKey> {
        let (body, signatures) = self.signatures()?;
        let signed_by = |key: &&VerifyingKey| {
            signatures.iter().any(|signature| {
                signature.strip_prefix(&key.hint(&self.origin)).is_some_and(|signature| {
                    UnparsedPublicKey::new(&ED25519, key.0)
                        .verify(body.as_bytes(), signature)
                        .is_ok()
                })
            })
        };
        keys.iter().find(signed_by).copied()
    }
}

impl Checkpoint {
    /// What was signed, and each signature behind the hint of its key.
    fn signatures(&self) -> Option<(String, Vec<Vec<u8>>)> {
        let (text, signatures) = self.note.split_once(SEPARATOR)?;
        let prefix = format!("\u{2014} {} ", self.origin);
        let signatures = signatures.strip_suffix('\n')?.split('\n');
        let signatures: Option<_> = signatures
            .map(|line| BASE64.decode(line.strip_prefix(&prefix)?.as_bytes()).ok())
            .collect();
        Some((format!("{text}\n"), signatures?))
    }

    /// Whether more than one signature stands under it.
    pub(super) fn has_second_signature(&self) -> bool {
        self.signatures().is_some_and(|(_, signatures)| signatures.len() > 1)
    }

    /// Whether a signature that names one of `keys` is that key's; `None` if it has none.
    #[must_use]
    pub fn verify_ml_dsa(&self, keys: &[MlDsaKey]) -> Option<bool> {
        let (body, signatures) = self.signatures()?;
        let mut found = None;
        for key in keys {
            let hint = key.hint(&self.origin);
            for signature in signatures.iter().filter_map(|s| s.strip_prefix(&hint)) {
                let holds = UnparsedPublicKey::new(&ML_DSA_65, key.bytes())
                    .verify(body.as_bytes(), signature)
                    .is_ok();
                found = Some(found.unwrap_or(false) || holds);
            }
        }
        found
    }
}

/// A checkpoint as it is shown.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct CheckpointView {
    /// The name of the log.
    pub origin: String,
    /// Leaves it covers.
    pub size: u64,
    /// The root, base64.
    pub root: String,
    /// When it was signed, RFC 3339.
    pub time: String,
    /// The note, for offline verification.
    pub note: String,
}

impl From<&Checkpoint> for CheckpointView {
    fn from(checkpoint: &Checkpoint) -> Self {
        Self {
            origin: checkpoint.origin.clone(),
            size: checkpoint.size,
            root: BASE64.encode(&checkpoint.root),
            time: checkpoint.time.to_string(),
            note: checkpoint.note.clone(),
        }
    }
}

/// What a row of the checkpoint space holds.
pub(super) fn decode(key: &[u8], value: &[u8]) -> Result<Checkpoint, String> {
    let size = key.try_into().map(u64::from_be_bytes).map_err(|_| "its row key is malformed")?;
    let record = CheckpointRecord::decode(value).map_err(|_| "its row is malformed")?;
    let checkpoint = Checkpoint::parse(&record.note).ok_or("its note is malformed")?;
    if checkpoint.size != size {
        return Err(format!("it stands at {size} and is of size {}", checkpoint.size));
    }
    Ok(checkpoint)
}

/// The newest checkpoint in the store.
pub(super) async fn latest(vault: &Vault) -> Result<Option<Checkpoint>, Error> {
    let rows = vault
        .store()
        .scan(space::CHECKPOINTS, polykey_storage::all(), Direction::Backward, 1)
        .await?;
    let decoded = rows.first().map(|row| decode(&row.key, &row.value));
    decoded.transpose().map_err(|e| Error::data_loss(format!("the last checkpoint: {e}")))
}

/// All checkpoints in the store, smallest first; a row that is none is told apart by its error.
pub(super) async fn all(
    store: &dyn Store,
) -> Result<Vec<Result<Checkpoint, String>>, polykey_storage::ReadError> {
    let mut range = polykey_storage::all();
    let mut found = Vec::new();
    loop {
        let rows = store.scan(space::CHECKPOINTS, range, Direction::Forward, 1024).await?;
        let Some(last) = rows.last() else { return Ok(found) };
        range = (std::ops::Bound::Excluded(last.key.clone()), std::ops::Bound::Unbounded);
        found.extend(rows.iter().map(|row| decode(&row.key, &row.value)));
    }
}

impl Inner {
    pub(super) async fn checkpoint(&self) -> Result<Option<Checkpoint>, Error> {
        let _one = self.signing.lock().await;
        let Some(signer) = &self.signer else { return latest(&self.vault).await };
        let head = self.vault.head();
        let last = latest(&self.vault).await?;
        if head.leaves == 0 || last.as_ref().is_some_and(|last| last.size >= head.leaves) {
            return Ok(last);
        }
        let checkpoint = Checkpoint::sign(
            origin(&self.vault.node_id()),
            head.leaves,
            head.root,
            self.vault.clock().now(),
            &**signer,
        )?;
        let record = CheckpointRecord { note: checkpoint.note.clone() };
        let mut tx = self.vault.begin().await?;
        let key = checkpoint.size.to_be_bytes().to_vec();
        tx.insert_clear(space::CHECKPOINTS, key, record.encode_to_vec());
        match tx.commit().await {
            // Another node has signed the same log at the same moment.
            Err(Error::Conflict) if self.vault.is_shared() => return latest(&self.vault).await,
            result => result?,
        };
        self.checkpointed.store(checkpoint.size, Ordering::Relaxed);
        self.checkpointed_at.store(checkpoint.time.micros(), Ordering::Relaxed);
        Ok(Some(checkpoint))
    }
}

impl Trail {
    /// Signs the log as it is now, unless that has been done already, and returns the newest
    /// checkpoint; `None` for an empty log. Without a signer it is the newest stored one.
    ///
    /// # Errors
    /// As [`Signer::sign`] and [`crate::vault::Tx::commit`].
    pub async fn checkpoint(&self) -> Result<Option<Checkpoint>, Error> {
        self.inner.checkpoint().await
    }

    /// The newest stored checkpoint.
    ///
    /// # Errors
    /// [`Error::DataLoss`] if it is malformed, [`Error::Unavailable`] if the store cannot be read.
    pub async fn latest_checkpoint(&self) -> Result<Option<Checkpoint>, Error> {
        latest(&self.inner.vault).await
    }

    /// The key that verifies new checkpoints, if the trail signs any.
    #[must_use]
    pub fn verifying_key(&self) -> Option<VerifyingKey> {
        let signer: &Arc<dyn Signer> = self.inner.signer.as_ref()?;
        Some(VerifyingKey(signer.public_key()))
    }

    /// The key that verifies the second signature of new checkpoints, if they have one.
    #[must_use]
    pub fn ml_dsa_key(&self) -> Option<MlDsaKey> {
        self.inner.signer.as_ref()?.ml_dsa_key()
    }
}
