//! How often a version has sealed, for keys with a limit: counted in memory, reserved ahead in blocks in
//! the store, so that no crash makes the count go backwards. It may count uses that never happened.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use polykey_proto::polykey::record::v1::{KeyRecord, UseCountRecord, job_record::Kind};

use super::rows::schedule;
use super::{Key, Keyring};
use crate::error::{Error, Reason};
use crate::key::{KeyId, Version, version_row};

/// Most uses reserved at a time: what a crash can cost.
const BLOCK: u64 = 65_536;
/// A block is at most this part of the limits, so that a crash costs little of them.
const PART: u64 = 16;

/// How often a block is reserved anew because another node was faster.
const ATTEMPTS: usize = 16;

/// The count of one version.
#[derive(Debug)]
struct Counter {
    /// Uses begun.
    used: AtomicU64,
    /// Uses that the store knows of.
    reserved: AtomicU64,
    /// One reservation at a time.
    reserving: tokio::sync::Mutex<()>,
}

/// The counts of the versions in use.
#[derive(Debug, Default)]
pub(super) struct Uses(Mutex<HashMap<(KeyId, u32), Arc<Counter>>>);

fn block(record: &KeyRecord) -> u64 {
    let limits = [record.max_uses, record.rotate_after_uses].into_iter().filter(|n| *n > 0);
    limits.min().map_or(BLOCK, |least| (least / PART).clamp(1, BLOCK))
}

impl Keyring {
    /// Counts a use of a version that seals.
    ///
    /// # Errors
    /// [`Reason::UsesExhausted`] beyond the key's limit; as a commit where a block is reserved.
    pub(super) async fn count_use(&self, key: &Key, version: u32) -> Result<(), Error> {
        let (limit, soft) = (key.record.max_uses, key.record.rotate_after_uses);
        if limit == 0 && soft == 0 {
            return Ok(());
        }
        Box::pin(self.count_limited(key, version, limit)).await
    }

    async fn count_limited(&self, key: &Key, version: u32, limit: u64) -> Result<(), Error> {
        let counter = self.counter(key.id, version).await?;
        let use_number = counter.used.fetch_add(1, Ordering::SeqCst).saturating_add(1);
        if limit != 0 && use_number > limit {
            return Err(Error::State(Reason::UsesExhausted));
        }
        if use_number > counter.reserved.load(Ordering::SeqCst) {
            self.reserve(key, version, &counter, use_number).await?;
        }
        Ok(())
    }

    async fn counter(&self, id: KeyId, version: u32) -> Result<Arc<Counter>, Error> {
        if let Some(found) = self.uses.0.lock().get(&(id, version)) {
            return Ok(Arc::clone(found));
        }
        let number = Version::new(version).ok_or_else(|| Error::internal("version 0 in use"))?;
        let row = version_row(id, number);
        let stored = self.vault.get::<UseCountRecord>(&row).await?;
        let reserved = stored.map_or(0, |l| l.record.reserved);
        let counter = Counter {
            used: AtomicU64::new(reserved),
            reserved: AtomicU64::new(reserved),
            reserving: tokio::sync::Mutex::new(()),
        };
        // Whoever was first has the one that counts.
        let mut counters = self.uses.0.lock();
        Ok(Arc::clone(counters.entry((id, version)).or_insert_with(|| Arc::new(counter))))
    }

    async fn reserve(
        &self,
        key: &Key,
        version: u32,
        counter: &Counter,
        wanted: u64,
    ) -> Result<(), Error> {
        let _turn = counter.reserving.lock().await;
        for _ in 0..ATTEMPTS {
            let reserved = counter.reserved.load(Ordering::SeqCst);
            if wanted <= reserved {
                return Ok(());
            }
            match self.reserve_block(key, version, counter, (wanted, reserved)).await {
                // Another node has reserved a block.
                Err(Error::Conflict) => {}
                result => return result,
            }
        }
        Err(Error::unavailable("other nodes reserve uses of the key again and again"))
    }

    async fn reserve_block(
        &self,
        key: &Key,
        version: u32,
        counter: &Counter,
        (wanted, reserved): (u64, u64),
    ) -> Result<(), Error> {
        let number = Version::new(version).ok_or_else(|| Error::internal("version 0 in use"))?;
        let row = version_row(key.id, number);
        let mut tx = self.vault.begin().await?;
        let stored = tx.get::<UseCountRecord>(&row).await?.map_or(0, |l| l.record.reserved);
        // What other nodes have reserved lies in between: uses begun here come after it.
        let others = stored.saturating_sub(reserved);
        let wanted = wanted.saturating_add(others);
        if key.record.max_uses != 0 && wanted > key.record.max_uses {
            return Err(Error::State(Reason::UsesExhausted));
        }
        let next = wanted.saturating_add(block(&key.record) - 1);
        tx.put(&row, &UseCountRecord { reserved: next })?;
        let soft = key.record.rotate_after_uses;
        // Again with each block, because a key that was disabled did not rotate the first time.
        if soft != 0 && next >= soft && version == key.record.primary_version {
            let now = self.vault.clock().now();
            schedule(&mut tx, Kind::Rotate, now, key.id, version)?;
        }
        tx.commit().await?;
        counter.used.fetch_add(others, Ordering::SeqCst);
        counter.reserved.store(next, Ordering::SeqCst);
        Ok(())
    }
}
