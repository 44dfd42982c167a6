//! Where a webhook stands in the log, and which process delivers for it.
//!
//! On a store that several nodes share the one that delivers counts a number up. Another takes over once it
//! has not seen that number change for a while by its own monotonic clock, so that no two clocks are ever
//! compared. A process that was thought gone finds at its next write that it is not the one any more.

use std::time::{Duration, Instant};

use polykey_proto::polykey::record::v1::{AuditEvent, WebhookRecord};

use crate::error::Error;
use crate::time::Time;
use crate::vault::Vault;

/// How often the process that delivers shows itself to others.
const BEAT: Duration = Duration::from_secs(5);
/// One that has not shown itself for so long is gone.
const GONE: Duration = Duration::from_secs(20);

/// A place, and what of it is not written down yet.
#[derive(Clone, Debug)]
pub(super) struct Place {
    record: WebhookRecord,
    saved: (u64, u32),
    saved_at: Instant,
    unsaved: u32,
}

impl Place {
    fn new(record: WebhookRecord) -> Self {
        let saved = (record.next_leaf, record.next_event);
        Self { record, saved, saved_at: Instant::now(), unsaved: 0 }
    }

    /// Where the log goes on: a leaf, and a place in it.
    pub(super) fn next(&self) -> (u64, u32) {
        (self.record.next_leaf, self.record.next_event)
    }

    /// What is written down of it.
    pub(super) fn saved(&self) -> (u64, u32) {
        self.saved
    }

    /// Events delivered since.
    pub(super) fn unsaved(&self) -> u32 {
        self.unsaved
    }

    pub(super) fn since_saved(&self) -> Duration {
        self.saved_at.elapsed()
    }

    /// It could not be written.
    pub(super) fn try_later(&mut self) {
        self.saved_at = Instant::now();
    }

    pub(super) fn is_paused(&self) -> bool {
        self.record.paused_at != 0
    }

    pub(super) fn move_to(&mut self, next: (u64, u32)) {
        (self.record.next_leaf, self.record.next_event) = next;
    }

    pub(super) fn delivered(&mut self, next: (u64, u32)) {
        self.move_to(next);
        self.record.failing_since = 0;
        self.unsaved = self.unsaved.saturating_add(1);
    }

    /// Notes a failure; whether it is the first after a success.
    pub(super) fn fails(&mut self, now: Time) -> bool {
        let first = self.record.failing_since == 0;
        if first {
            self.record.failing_since = now.micros();
        }
        first
    }

    /// How long the receiver has taken nothing.
    pub(super) fn failing(&self, now: Time) -> Duration {
        let since = Time::optional(self.record.failing_since);
        since.map_or(Duration::ZERO, |since| now.since(since))
    }

    pub(super) fn pause(&mut self, now: Time) {
        self.record.paused_at = now.micros();
    }
}

/// What was last seen of the process that delivers.
#[derive(Debug, Default)]
pub(super) struct Watch(Option<(Vec<u8>, u64, Instant)>);

/// A webhook's row, as this process holds it or does not.
#[derive(Debug)]
pub(super) struct Held {
    name: String,
    row: Vec<u8>,
    process: [u8; 16],
    begin: u64,
    shared: bool,
}

impl Held {
    pub(super) fn new(vault: &Vault, name: &str, process: [u8; 16], begin: u64) -> Self {
        Self {
            name: name.to_owned(),
            row: vault.row_name("webhook", name).to_vec(),
            process,
            begin,
            shared: vault.is_shared(),
        }
    }

    /// Makes the row where there is none.
    pub(super) async fn begin(&self, vault: &Vault) -> Result<(), Error> {
        let mut tx = vault.begin().await?;
        if tx.get::<WebhookRecord>(&self.row).await?.is_some() {
            return Ok(());
        }
        let (name, next_leaf) = (self.name.clone(), self.begin);
        tx.insert(&self.row, &WebhookRecord { name, next_leaf, ..WebhookRecord::default() })?;
        match tx.commit().await {
            // Another node was faster.
            Ok(_) | Err(Error::Conflict) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The leaf up to which everything is delivered, as it is written down.
    pub(super) async fn has(&self, vault: &Vault) -> Result<u64, Error> {
        let found = vault.get::<WebhookRecord>(&self.row).await?;
        Ok(found.map_or(self.begin, |found| found.record.next_leaf))
    }

    /// Becomes the one that delivers, unless another process is. A pause ends with that.
    pub(super) async fn take(
        &self,
        vault: &Vault,
        watch: &mut Watch,
    ) -> Result<Option<Place>, Error> {
        let mut tx = vault.begin().await?;
        let found = tx.get::<WebhookRecord>(&self.row).await?.map(|loaded| loaded.record);
        let Some(mut record) = found else {
            drop(tx);
            self.begin(vault).await?;
            return Ok(None);
        };
        let own = record.holder.is_empty() || record.holder.as_ref() == self.process;
        if self.shared && !own {
            let now = (record.holder.to_vec(), record.beat);
            let gone = match &watch.0 {
                Some((holder, beat, at)) if (holder, beat) == (&now.0, &now.1) => {
                    at.elapsed() >= GONE
                }
                _ => {
                    watch.0 = Some((now.0, now.1, Instant::now()));
                    false
                }
            };
            if !gone {
                return Ok(None);
            }
        }
        record.holder = self.process.to_vec().into();
        record.beat = record.beat.wrapping_add(1);
        record.paused_at = 0;
        // Nobody has tried meanwhile.
        record.failing_since = 0;
        tx.put(&self.row, &record)?;
        tx.commit().await?;
        Ok(Some(Place::new(record)))
    }

    /// Writes the place down, and an event with it.
    ///
    /// # Errors
    /// [`Error::Conflict`] if another process has taken over.
    pub(super) async fn save(
        &self,
        vault: &Vault,
        place: &mut Place,
        event: Option<AuditEvent>,
    ) -> Result<(), Error> {
        let mut tx = vault.begin().await?;
        let found = tx.get::<WebhookRecord>(&self.row).await?;
        if found.is_none_or(|found| found.record.holder != place.record.holder) {
            return Err(Error::Conflict);
        }
        place.record.beat = place.record.beat.wrapping_add(1);
        tx.put(&self.row, &place.record)?;
        if let Some(event) = event {
            tx.event(event);
        }
        tx.commit().await?;
        *place = Place::new(place.record.clone());
        Ok(())
    }

    /// Shows other nodes that this process is there.
    pub(super) async fn keep(&self, vault: &Vault, place: &mut Place) -> Result<(), Error> {
        if self.shared && place.since_saved() >= BEAT {
            match self.save(vault, place, None).await {
                Err(Error::Conflict) => return Err(Error::Conflict),
                Err(_) => place.try_later(),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Writes the place down, and lets others deliver.
    pub(super) async fn release(&self, vault: &Vault, place: &mut Place) -> Result<(), Error> {
        let mut tx = vault.begin().await?;
        let found = tx.get::<WebhookRecord>(&self.row).await?;
        if found.is_none_or(|found| found.record.holder != place.record.holder) {
            return Ok(());
        }
        place.record.holder = Vec::new().into();
        tx.put(&self.row, &place.record)?;
        tx.commit().await.map(drop)
    }
}
