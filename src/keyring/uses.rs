//! How often a version has sealed, for keys with a limit: counted in memory, reserved ahead in blocks in
//! the store, so that no crash makes the count go backwards. It may count uses that never happened.

use std::collections::HashMap;
use std::sync::Arc;

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
    /// The uses that are this node's to make.
    block: Mutex<Block>,
    /// One reservation at a time.
    reserving: tokio::sync::Mutex<()>,
}

/// Numbers that the store knows of, and no other node has.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// The last one that was used.
    used: u64,
    /// The last one there is.
    end: u64,
}

impl Counter {
    /// The next number, if there is one.
    fn draw(&self) -> Option<u64> {
        let mut block = self.block.lock();
        let next = block.used.saturating_add(1);
        (next <= block.end).then(|| {
            block.used = next;
            next
        })
    }
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
        let number = match counter.draw() {
            Some(number) => number,
            None => self.reserve(key, version, &counter).await?,
        };
        if limit != 0 && number > limit {
            return Err(Error::State(Reason::UsesExhausted));
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
            block: Mutex::new(Block { used: reserved, end: reserved }),
            reserving: tokio::sync::Mutex::new(()),
        };
        // Whoever was first has the one that counts.
        let mut counters = self.uses.0.lock();
        Ok(Arc::clone(counters.entry((id, version)).or_insert_with(|| Arc::new(counter))))
    }

    async fn reserve(&self, key: &Key, version: u32, counter: &Counter) -> Result<u64, Error> {
        let _turn = counter.reserving.lock().await;
        for _ in 0..ATTEMPTS {
            if let Some(number) = counter.draw() {
                return Ok(number);
            }
            match self.reserve_block(key, version).await {
                Ok(block) => *counter.block.lock() = block,
                // Another node has reserved one.
                Err(Error::Conflict) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::unavailable("other nodes reserve uses of the key again and again"))
    }

    /// The numbers that follow all that any node has reserved.
    async fn reserve_block(&self, key: &Key, version: u32) -> Result<Block, Error> {
        let number = Version::new(version).ok_or_else(|| Error::internal("version 0 in use"))?;
        let row = version_row(key.id, number);
        let mut tx = self.vault.begin().await?;
        let stored = tx.get::<UseCountRecord>(&row).await?.map_or(0, |l| l.record.reserved);
        let limit = key.record.max_uses;
        if limit != 0 && stored >= limit {
            return Err(Error::State(Reason::UsesExhausted));
        }
        let most = if limit == 0 { u64::MAX } else { limit };
        let next = stored.saturating_add(block(&key.record)).min(most);
        tx.put(&row, &UseCountRecord { reserved: next })?;
        let soft = key.record.rotate_after_uses;
        // Again with each block, because a key that was disabled did not rotate the first time.
        if soft != 0 && next >= soft && version == key.record.primary_version {
            let now = self.vault.clock().now();
            schedule(&mut tx, Kind::Rotate, now, key.id, version)?;
        }
        tx.commit().await?;
        Ok(Block { used: stored, end: next })
    }
}
