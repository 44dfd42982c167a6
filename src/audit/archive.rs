//! Archives: leaves that are safe in a file go out of the store. Their hashes stay, so that the root goes
//! on and every proof can still be made, of what is kept and of what is not.
//!
//! ```text
//! file written ─▶ synced ─▶ verified ─▶ recorded, with an event ─▶ leaves trimmed, some at a time
//! ```
//! A crash before the record leaves a file that is found again, one after it leaves leaves that are
//! trimmed at the next start: at any moment a leaf is in the store or in a file that was verified.

use std::ops::Bound;
use std::sync::atomic::Ordering;

use data_encoding::HEXLOWER;
use polykey_proto::polykey::record::v1::{AuditArchiveRecord, AuditEvent, AuditLeaf};
use polykey_storage::{Direction, Revision, all};

use super::checkpoint::{self, Checkpoint};
use super::flush;
use super::trail::{Inner, Trail};
use super::usage::{Held, load_mark, open_body};
use crate::error::Error;
use crate::time::Time;
use crate::vault::tree::{Frontier, Hash};
use crate::vault::{Vault, space};

/// Checkpoints read at a time.
const STEP: usize = 1024;
/// Leaves trimmed in one commit; each may be a block of a MiB.
const TRIM: usize = 16;

/// Leaves that were archived, and where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// The first one.
    pub first: u64,
    /// The one after the last.
    pub end: u64,
    /// The tree over all leaves before `end`.
    pub log: Frontier,
    /// The file.
    pub file: String,
    /// The machine on which it was written.
    pub host: String,
    /// SHA-256 of the file.
    pub sha256: Hash,
    /// When the checkpoint at its end was signed: no leaf in it is younger.
    pub until: Time,
    /// When it was recorded.
    pub archived_at: Time,
}

impl Archive {
    fn read(key: &[u8], record: &AuditArchiveRecord) -> Result<Self, Error> {
        let broken = || Error::data_loss("the record of an audit archive is malformed");
        let hash = |bytes: &[u8]| Hash::try_from(bytes).map_err(|_| broken());
        let roots = record.subtrees.iter().map(|root| hash(root)).collect::<Result<_, _>>()?;
        if key != record.first.to_be_bytes() || record.first >= record.end {
            return Err(broken());
        }
        Ok(Self {
            first: record.first,
            end: record.end,
            log: Frontier::from_parts(record.end, roots).ok_or_else(broken)?,
            file: record.file.clone(),
            host: record.host.clone(),
            sha256: hash(&record.sha256)?,
            until: Time::from_micros(record.until),
            archived_at: Time::from_micros(record.archived_at),
        })
    }

    fn to_record(&self) -> AuditArchiveRecord {
        AuditArchiveRecord {
            first: self.first,
            end: self.end,
            subtrees: self.log.roots().iter().map(|root| root.to_vec().into()).collect(),
            sha256: self.sha256.to_vec().into(),
            file: self.file.clone(),
            host: self.host.clone(),
            until: self.until.micros(),
            archived_at: self.archived_at.micros(),
        }
    }
}

/// What is said of a file by whoever has written and verified it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Its first leaf.
    pub first: u64,
    /// The one after its last.
    pub end: u64,
    /// The root of the log over all leaves before `end`.
    pub root: Hash,
    /// Its name.
    pub file: String,
    /// The machine on which it was written.
    pub host: String,
    /// Its SHA-256.
    pub sha256: Hash,
}

impl Claim {
    /// What its event says.
    #[must_use]
    pub fn details(&self) -> [(&'static str, String); 6] {
        [
            ("first", self.first.to_string()),
            ("end", self.end.to_string()),
            ("file", self.file.clone()),
            ("host", self.host.clone()),
            ("sha256", HEXLOWER.encode(&self.sha256)),
            ("root", HEXLOWER.encode(&self.root)),
        ]
    }
}

/// How far others have the log, who are to have all that is trimmed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Had {
    /// The sink or webhook that has the least, by its section, and how many leaves that is.
    pub least: Option<(String, u64)>,
    /// The revision up to which the replication target has everything.
    pub shipped: Option<Revision>,
}

/// Every archive, the oldest first.
pub(super) async fn list(vault: &Vault) -> Result<Vec<Archive>, Error> {
    let rows = vault.scan::<AuditArchiveRecord>(all(), Direction::Forward, usize::MAX).await?;
    rows.iter().map(|(key, loaded)| Archive::read(key, &loaded.record)).collect()
}

/// The newest archive.
pub(super) async fn latest(vault: &Vault) -> Result<Option<Archive>, Error> {
    let rows = vault.scan::<AuditArchiveRecord>(all(), Direction::Backward, 1).await?;
    rows.first().map(|(key, loaded)| Archive::read(key, &loaded.record)).transpose()
}

/// The first leaf that has not been archived, and the tree over those before it.
pub(crate) async fn kept(vault: &Vault) -> Result<(u64, Frontier), Error> {
    let latest = latest(vault).await?;
    Ok(latest.map_or_else(Default::default, |latest| (latest.end, latest.log)))
}

/// When a leaf was made, as its first event says.
async fn made(vault: &Vault, leaf: u64) -> Result<Option<Time>, Error> {
    let key = leaf.to_be_bytes();
    let Some(loaded) = vault.get::<AuditLeaf>(&key).await? else { return Ok(None) };
    // Another node has been faster.
    if loaded.record.archived {
        return Ok(None);
    }
    let (_, body) = open_body(&key, &loaded.record)?;
    Ok(body.events.first().map(|event| Time::from_micros(event.time)))
}

impl Had {
    /// What is had where others have to have it as well.
    #[must_use]
    pub fn and(mut self, other: Option<(String, u64)>) -> Self {
        self.least = [self.least, other].into_iter().flatten().min_by_key(|(_, has)| *has);
        self
    }
}

impl Inner {
    /// The leaf before which everything may be archived.
    async fn bound(&self, had: &Had) -> Result<u64, Error> {
        // Where nothing touched a key, the mark lags.
        flush::usage(self, true).await?;
        let mark = load_mark(&self.vault).await?;
        let own = mark.min(self.limit());
        Ok(had.least.as_ref().map_or(own, |(_, has)| own.min(*has)))
    }

    /// At most `limit` checkpoints of more than `after` leaves and no more than `bound`.
    async fn between(
        &self,
        after: u64,
        bound: u64,
        limit: usize,
    ) -> Result<Vec<Checkpoint>, Error> {
        if after >= bound {
            return Ok(Vec::new());
        }
        let range = (
            Bound::Excluded(after.to_be_bytes().to_vec()),
            Bound::Included(bound.to_be_bytes().to_vec()),
        );
        let store = self.vault.store();
        let rows = store.scan(space::CHECKPOINTS, range, Direction::Forward, limit).await?;
        let read = rows.iter().map(|row| checkpoint::decode(&row.key, &row.value));
        read.collect::<Result<_, _>>()
            .map_err(|why| Error::data_loss(format!("a stored checkpoint: {why}")))
    }

    /// Whether an archive may end at a checkpoint.
    async fn may_end(
        &self,
        checkpoint: &Checkpoint,
        had: &Had,
        before: Option<Time>,
    ) -> Result<bool, Error> {
        let old = before.is_none_or(|before| checkpoint.time < before);
        Ok(old && self.shipped(checkpoint.size - 1, had).await?)
    }

    /// Whether the replication target has a leaf.
    async fn shipped(&self, leaf: u64, had: &Had) -> Result<bool, Error> {
        let Some(shipped) = had.shipped else { return Ok(true) };
        let row = self.vault.store().get(space::AUDIT, &leaf.to_be_bytes()).await?;
        Ok(row.is_some_and(|row| row.revision <= shipped))
    }
}

impl Trail {
    /// Every archive, the oldest first.
    ///
    /// # Errors
    /// [`Error::DataLoss`] if a record is damaged, [`Error::Unavailable`] if the store cannot be read.
    pub async fn archives(&self) -> Result<Vec<Archive>, Error> {
        list(self.vault()).await
    }

    /// The first leaf that has not been archived, and the tree over those before it.
    ///
    /// # Errors
    /// As [`Self::archives`].
    pub async fn kept(&self) -> Result<(u64, Frontier), Error> {
        kept(self.vault()).await
    }

    /// When the first leaf that has not been archived was made.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn oldest(&self) -> Result<Option<Time>, Error> {
        let (first, _) = self.kept().await?;
        made(self.vault(), first).await
    }

    /// Where an archive may end: the newest checkpoint that covers nothing which `had` lacks, at most
    /// `most` leaves more than are archived, and was signed before `before`.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn archivable(
        &self,
        had: &Had,
        most: Option<u64>,
        before: Option<Time>,
    ) -> Result<Option<Checkpoint>, Error> {
        let (first, _) = self.kept().await?;
        let mut bound = self.inner.bound(had).await?;
        if let Some(most) = most {
            bound = bound.min(first.saturating_add(most));
        }
        let mut found: Option<Checkpoint> = None;
        let mut after = first;
        loop {
            let step = self.inner.between(after, bound, STEP).await?;
            if step.is_empty() {
                break;
            }
            for checkpoint in step {
                after = checkpoint.size;
                if self.inner.may_end(&checkpoint, had, before).await? {
                    found = Some(checkpoint);
                } else {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }

    /// How many leaves the smallest archive has that may be made now.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn smallest(&self, had: &Had, before: Option<Time>) -> Result<Option<u64>, Error> {
        let (first, _) = self.kept().await?;
        let bound = self.inner.bound(had).await?;
        let next = self.inner.between(first, bound, 1).await?.into_iter().next();
        match next {
            Some(next) if self.inner.may_end(&next, had, before).await? => {
                Ok(Some(next.size - first))
            }
            _ => Ok(None),
        }
    }

    /// Records that leaves are safe in a file, with an event, and takes them out of the store. What was
    /// recorded already is so again.
    ///
    /// # Errors
    /// [`Error::Invalid`] if these are not the leaves of this log that are next, or somebody lacks them;
    /// [`Error::Conflict`] if another node has archived them; as [`crate::vault::Tx::commit`].
    pub async fn archive(
        &self,
        claim: Claim,
        had: &Had,
        event: impl Into<AuditEvent> + Send,
    ) -> Result<Archive, Error> {
        let event = event.into();
        let vault = self.vault();
        let known = latest(vault).await?;
        if let Some(known) = &known
            && (known.first, known.end, known.sha256) == (claim.first, claim.end, claim.sha256)
        {
            self.trim_or_later().await;
            return Ok(known.clone());
        }
        // Nothing is recorded before what was recorded earlier is trimmed: trimming knows the newest alone.
        self.trim().await?;
        let (first, mut log) = known.map_or_else(Default::default, |known| (known.end, known.log));
        let invalid = |field: &str, text: String| Error::invalid(format!("archive.{field}"), text);
        if claim.first != first {
            let text = format!("must be {first}, the first leaf that has not been archived");
            return Err(invalid("first_index", text));
        }
        let bound = self.inner.bound(had).await?;
        if let Some((section, has)) = &had.least
            && claim.end > *has
        {
            let text = format!("{section} has the first {has} leaves alone so far");
            return Err(invalid("end_index", text));
        }
        if claim.end <= first || claim.end > bound {
            return Err(invalid("end_index", format!("must be from {} to {bound}", first + 1)));
        }
        if !self.inner.shipped(claim.end - 1, had).await? {
            return Err(invalid("end_index", "the replication target lacks some of them".into()));
        }
        let key = claim.end.to_be_bytes();
        let row = vault.store().get(space::CHECKPOINTS, &key).await?;
        let checkpoint = row.map(|row| checkpoint::decode(&key, &row.value)).transpose();
        let checkpoint = checkpoint.map_err(|why| Error::data_loss(format!("a checkpoint: {why}")));
        let Some(checkpoint) = checkpoint? else {
            return Err(invalid("end_index", "must be the size of a checkpoint".into()));
        };
        vault.grow(&mut log, claim.end).await?;
        if log.root() != checkpoint.root {
            return Err(Error::data_loss("the log is not the one that its checkpoint signed"));
        }
        if claim.root != checkpoint.root {
            return Err(invalid("root_hash", "is not that of the log".into()));
        }
        let archive = Archive {
            first,
            end: claim.end,
            log,
            file: claim.file,
            host: claim.host,
            sha256: claim.sha256,
            until: checkpoint.time,
            archived_at: vault.clock().now(),
        };
        let mut tx = vault.begin().await?;
        tx.insert(&first.to_be_bytes(), &archive.to_record())?;
        tx.event(event.clone());
        let receipt = tx.commit().await?;
        if let Some(leaf) = receipt.leaf {
            self.observed(leaf, &event);
        }
        self.trim_or_later().await;
        Ok(archive)
    }

    /// Trims what is recorded. That it is recorded is no failure because this is one: it goes on later.
    async fn trim_or_later(&self) {
        if let Err(error) = self.trim().await {
            tracing::warn!(%error, "what is archived is taken out of the store later");
        }
    }

    /// Takes what was archived out of the store, as far as that has not been done.
    ///
    /// # Errors
    /// As [`crate::vault::Tx::commit`].
    pub async fn trim(&self) -> Result<(), Error> {
        let _one = self.inner.trimming.lock().await;
        let vault = self.vault();
        let Some(latest) = latest(vault).await? else { return Ok(()) };
        if self.inner.trimmed.load(Ordering::Relaxed) >= latest.end {
            return Ok(());
        }
        // Nothing is archived before what was archived earlier is trimmed.
        let mut next = latest.first;
        while next < latest.end {
            next = match vault.trim_leaves(next..latest.end, TRIM).await {
                // Another node trims as well, or moves rows to another root.
                Err(Error::Conflict) => next,
                result => result?,
            };
            tokio::task::yield_now().await;
        }
        self.inner.trimmed.store(latest.end, Ordering::Relaxed);
        Ok(())
    }
}
