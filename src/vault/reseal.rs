//! Moving rows to the primary epoch: finding those that are behind, and writing them again.

use std::ops::Bound;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use polykey_hsm::{MaterialContext, MaterialState, RecordBinding, Ring};
use polykey_proto::polykey::record::v1::{KeyRecord, ResealRecord, VersionRecord};
use polykey_storage::{Commit, Direction, Require, Revision, RowKey, Space, Write};
use prost::Message;
use zeroize::Zeroizing;

use super::space::{self, Record, clear_prefix, meta};
use super::{Vault, seal};
use crate::error::Error;
use crate::key;

/// How far a walk over every sealed row has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position(Option<RowKey>);

impl Position {
    /// Before the first row.
    pub const START: Self = Self(None);

    /// As it is stored: empty, or space ‖ row key.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Some(row) = &self.0 else { return Vec::new() };
        let mut bytes = vec![row.space.0];
        bytes.extend_from_slice(&row.key);
        bytes
    }

    /// From its stored form; every sequence of bytes is a position.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Self {
        Self(bytes.split_first().map(|(space, key)| RowKey::new(Space(*space), key)))
    }
}

/// A row that depends on an epoch behind the primary one.
#[derive(Clone, Debug)]
pub struct Stale {
    row: RowKey,
    value: Bytes,
    revision: Revision,
}

impl Vault {
    /// Looks at the next `limit` rows after `from`, in order of space and key. Gives those that
    /// depend on an epoch behind the primary one, and how far it came; `None` at the end.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read, [`Error::DataLoss`] if a row is damaged.
    pub async fn stale(
        &self,
        from: &Position,
        limit: usize,
    ) -> Result<(Vec<Stale>, Option<Position>), Error> {
        let (snapshot, ring) = self.steady().await?;
        let mut found = Vec::new();
        let mut left = limit.max(1);
        let mut at = from.0.clone();
        for &space in space::ALL {
            let start = match &at {
                Some(row) if row.space.0 > space.0 => continue,
                Some(row) if row.space == space => Bound::Excluded(row.key.clone()),
                _ => Bound::Unbounded,
            };
            if space == space::CHECKPOINTS {
                continue;
            }
            let range = (start, Bound::Unbounded);
            for entry in snapshot.scan(space, range, Direction::Forward, left).await? {
                left -= 1;
                let row = RowKey::new(space, entry.key);
                at = Some(row.clone());
                if space::counted(&row) && behind(&ring, &row, &entry.value)? {
                    found.push(Stale { row, value: entry.value, revision: entry.revision });
                }
            }
            if left == 0 {
                return Ok((found, Some(Position(at))));
            }
        }
        Ok((found, None))
    }

    /// Writes rows again under the primary epoch, with the progress that goes with them, unless
    /// they have changed since they were found. Gives how many were written.
    ///
    /// # Errors
    /// As [`super::Tx::commit`]; never [`Error::Conflict`].
    pub async fn reseal(&self, rows: &[Stale], progress: &ResealRecord) -> Result<usize, Error> {
        let ring = self.ring();
        let mut writes = Vec::with_capacity(rows.len());
        for stale in rows {
            let value = self.resealed(&ring, stale).await?;
            writes.push((stale, Write::Put { row: stale.row.clone(), value: value.into() }));
        }
        let counter = self.next_counter();
        let mark = seal::seal(&ring.sealer(), progress, meta::RESEAL, counter)?;
        let epoch = ring.primary_epoch();
        let mut commit = Commit::new().put(ResealRecord::SPACE, meta::RESEAL, mark);
        for (stale, write) in &writes {
            commit.requires.push((stale.row.clone(), Require::At(stale.revision)));
            commit.writes.push(write.clone());
        }
        match self.submit(commit, Vec::new(), 0, epoch).await {
            Ok(_) => return Ok(rows.len()),
            Err(Error::Conflict) => {}
            Err(error) => return Err(error),
        }
        // Someone wrote one of them meanwhile: each for itself, and whoever was faster has won.
        let mut written = 0;
        for (stale, write) in writes {
            let mut commit = Commit::new();
            commit.requires.push((stale.row.clone(), Require::At(stale.revision)));
            commit.writes.push(write);
            match self.submit(commit, Vec::new(), 0, epoch).await {
                Ok(_) => written += 1,
                Err(Error::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    /// From the return of this on, no commit is accepted that has sealed or wrapped anything under
    /// an epoch below `epoch`, and whatever was accepted before is durable.
    ///
    /// # Errors
    /// As [`super::Tx::commit`].
    pub async fn fence(&self, epoch: u32) -> Result<(), Error> {
        self.fence.fetch_max(epoch, Ordering::SeqCst);
        // Groups are committed one after the other: once this one is, none before it is left.
        self.submit(Commit::new(), Vec::new(), 0, u32::MAX).await.map(drop)
    }

    async fn resealed(&self, ring: &Ring, stale: &Stale) -> Result<Vec<u8>, Error> {
        let Stale { row, value, .. } = stale;
        let lost = |e| Error::data_loss(format!("resealing row {row:?}: {e}"));
        let kind = space::kind(row).ok_or_else(|| lost("no record belongs there".to_owned()))?;
        let binding = RecordBinding { space: row.space.0, kind, row_key: &row.key };
        let sealer = ring.sealer();
        let split = value.split_at_checked(clear_prefix(row.space));
        let (prefix, sealed) = split.ok_or_else(|| lost("too short".to_owned()))?;
        let opened = sealer.open_record(&binding, sealed).map_err(|e| lost(e.to_string()))?;
        let mut plaintext = opened.plaintext;
        if row.space == space::VERSIONS {
            plaintext = self.rewrapped(ring, &plaintext).await?;
        }
        let counter = self.next_counter();
        let sealed = sealer
            .seal_record(&binding, counter, &plaintext)
            .map_err(|e| Error::internal(format!("resealing row {row:?}: {e}")))?;
        let mut value = prefix.to_vec();
        value.extend_from_slice(&sealed);
        Ok(value)
    }

    /// A version with its material under the primary epoch.
    async fn rewrapped(&self, ring: &Ring, plaintext: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        let mut version = VersionRecord::decode(plaintext)
            .map_err(|e| Error::data_loss(format!("a VersionRecord failed to decode: {e}")))?;
        if !version.material.is_empty() {
            let orphan = || Error::data_loss("a version has no key of a known algorithm");
            let key = self.get::<KeyRecord>(&version.key_id).await?.ok_or_else(orphan)?.record;
            let context = MaterialContext {
                node: self.node_id,
                key_id: version.key_id.as_ref().try_into().map_err(|_| orphan())?,
                version: version.version,
                algorithm: key::algorithm(&key).ok_or_else(orphan)?,
                exportable: key.exportable,
            };
            let material = ring.rewrap_material(&context, &version.material);
            let material = material.map_err(|e| {
                Error::data_loss(format!("the material of a version does not open: {e}"))
            })?;
            version.material = material.into();
        }
        Ok(Zeroizing::new(version.encode_to_vec()))
    }
}

fn behind(ring: &Ring, row: &RowKey, value: &[u8]) -> Result<bool, Error> {
    let primary = ring.primary_epoch();
    if seal::epoch_of(row.space, value)? < primary {
        return Ok(true);
    }
    if row.space != space::VERSIONS {
        return Ok(false);
    }
    // A version that was written since may still hold material of before.
    let (version, _) = seal::open::<VersionRecord>(&ring.sealer(), &row.key, value)?;
    if version.material.is_empty() {
        return Ok(false);
    }
    let state = MaterialState::decode(&version.material)
        .map_err(|e| Error::data_loss(format!("the material of a version is malformed: {e}")))?;
    Ok(state.epoch() < primary)
}
