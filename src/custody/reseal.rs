//! Resealing: after a rotation every row moves to the new storage-key epoch, little by little, and
//! then the older epochs are forgotten.

use std::sync::Arc;
use std::time::Duration;

use polykey_hsm::Ring;
use polykey_proto::polykey::record::v1::{AuditEvent, ResealRecord, audit_event::Outcome};
use tokio_util::sync::CancellationToken;

use super::{Change, Custody, ResealStatus};
use crate::error::Error;
use crate::time::Time;
use crate::vault::Position;
use crate::vault::space::meta;

/// How fast resealing goes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Most rows in one commit, 1 to 64.
    pub batch: usize,
    /// Rows looked at before it lets others work.
    pub look: usize,
    /// The pause after that, and after each commit.
    pub pause: Duration,
}

impl Default for Pace {
    /// At most some 6,000 rows written and 25,000 looked at in a second.
    fn default() -> Self {
        Self { batch: 64, look: 256, pause: Duration::from_millis(10) }
    }
}

impl Pace {
    async fn rest(&self) {
        if self.pause.is_zero() {
            tokio::task::yield_now().await;
        } else {
            tokio::time::sleep(self.pause).await;
        }
    }
}

pub(super) fn status(record: &ResealRecord) -> ResealStatus {
    ResealStatus {
        target_epoch: record.target_epoch,
        resealed: record.resealed,
        passes: record.passes,
        started_at: Time::from_micros(record.started_at),
        finished_at: Time::optional(record.finished_at),
    }
}

impl Custody {
    /// Whether anything may still depend on an epoch behind the primary one.
    #[must_use]
    pub fn needs_reseal(&self) -> bool {
        self.vault.ring().epochs().len() > 1
    }

    /// Reseals whenever there is something to reseal, until `stop`.
    pub async fn run_reseal(self: Arc<Self>, pace: Pace, stop: CancellationToken) {
        let work = async {
            loop {
                let woken = self.wake.notified();
                match self.reseal(pace).await {
                    Ok(()) => woken.await,
                    Err(error) => {
                        let detail = error.internal_text().unwrap_or_default();
                        tracing::error!(%error, detail, "resealing stopped; trying again");
                        tokio::time::sleep(Duration::from_secs(30)).await;
                    }
                }
            }
        };
        // Dropped between two commits it resumes at its cursor, like after a crash.
        tokio::select! {
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    /// Reseals everything that is behind the primary epoch and forgets the older epochs.
    ///
    /// # Errors
    /// As [`crate::vault::Tx::commit`]; [`Error::DataLoss`] if a row does not open. Calling again
    /// resumes.
    pub async fn reseal(&self, pace: Pace) -> Result<(), Error> {
        let _only_one = self.resealing.lock().await;
        loop {
            let ring = self.vault.ring();
            if ring.epochs().len() <= 1 {
                return Ok(());
            }
            let target = ring.primary_epoch();
            if let Some(record) = self.walk(pace, target).await?
                && self.retire(target, record).await?
            {
                tracing::info!(epoch = target, "resealing is complete; older epochs are retired");
                return Ok(());
            }
        }
    }

    /// Walks over all rows until one whole walk, begun after nothing older can be written, has
    /// found nothing old. `None` if another rotation overtook it.
    async fn walk(&self, pace: Pace, target: u32) -> Result<Option<ResealRecord>, Error> {
        let stored = self.vault.get::<ResealRecord>(meta::RESEAL).await?.map(|r| r.record);
        let ours = stored.filter(|r| r.target_epoch == target && r.finished_at == 0);
        let mut record = ours.unwrap_or_else(|| ResealRecord {
            target_epoch: target,
            started_at: self.vault.clock().now().micros(),
            ..ResealRecord::default()
        });
        let mut fenced = false;
        loop {
            let mut from = Position::decode(&record.cursor);
            let mut clean = from == Position::START;
            loop {
                if self.vault.ring().primary_epoch() != target {
                    return Ok(None);
                }
                let (stale, next) = self.vault.stale(&from, pace.look).await?;
                clean &= stale.is_empty();
                for rows in stale.chunks(pace.batch.clamp(1, 64)) {
                    record.resealed += self.vault.reseal(rows, &record).await? as u64;
                    pace.rest().await;
                }
                let Some(next) = next else { break };
                record.cursor = next.encode().into();
                from = next;
                pace.rest().await;
            }
            record.passes += 1;
            record.cursor = Vec::new().into();
            if clean && fenced {
                return Ok(Some(record));
            }
            if clean {
                // A transaction that began before the rotation may still come: no longer.
                self.vault.fence(target).await?;
                fenced = true;
            }
        }
    }

    /// Forgets the epochs before `target`; false if another rotation overtook it.
    async fn retire(&self, target: u32, mut record: ResealRecord) -> Result<bool, Error> {
        let mut state = self.state.lock().await;
        let (table, at) = self.reconciled(&mut state).await?;
        let mut ring = Ring::clone(&self.vault.ring());
        if ring.primary_epoch() != target {
            return Ok(false);
        }
        let old: Vec<u32> = ring.epochs().into_iter().filter(|&epoch| epoch < target).collect();
        for &epoch in &old {
            ring.retire_epoch(epoch).map_err(|e| Error::internal(e.to_string()))?;
        }
        let now = self.vault.clock().now();
        record.finished_at = now.micros();
        let mut event = AuditEvent {
            time: now.micros(),
            action: "RetireEpochs".into(),
            ..AuditEvent::default()
        };
        event.set_outcome(Outcome::Success);
        let epochs: Vec<String> = old.iter().map(u32::to_string).collect();
        event.details.insert("retired".into(), epochs.join(","));
        event.details.insert("resealed".into(), record.resealed.to_string());
        let root = Arc::clone(&state.root);
        let change = Change { table, at, root, ring, reseal: Some(record), remember: None };
        self.apply(&mut state, change, event).await?;
        Ok(true)
    }
}
