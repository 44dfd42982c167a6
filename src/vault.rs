//! The sealed store: typed records over opaque rows, changed only by transactions that carry their
//! audit events.
//!
//! It knows the ring and the store, and no rule of any key's life.

mod damage;
#[cfg(test)]
pub(crate) mod faulty;
pub mod freshness;
mod head;
mod lane;
mod metrics;
mod read;
mod reseal;
pub mod room;
mod seal;
mod sequencer;
pub mod space;
#[cfg(test)]
mod tests;
pub mod tree;
mod trim;
mod tx;
mod verify;
mod witness;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use bytes::Bytes;
use polykey_hsm::{MacPurpose, Ring, Sealer};
use polykey_proto::polykey::record::v1::{AuditEvent, CanaryRecord, HeadRecord};
use polykey_storage::{Commit, Direction, Revision, RowKey, Space, Store, StoreError};

use crate::error::Error;
use crate::telemetry::trace::{self, Stage};
use crate::time::{Clock, Time};
use damage::Damage;
pub use freshness::Freshness;
use head::{Head, LeafEvents};
pub use metrics::Metrics;
pub use read::Loaded;
pub use reseal::{Position, Stale};
pub use room::Room;
pub use sequencer::Receipt;
use sequencer::{Sequencer, Writer};
use space::{Record, meta};
use tree::{Frontier, Hash};
pub use tx::Tx;
pub use verify::{Progress, VerifyReport};
pub use witness::Witness;

/// Audit leaves read at a time; each may have a MiB.
const LEAVES: usize = 32;

/// Whoever remembers rows and must forget them before a change is acknowledged.
pub trait Invalidate: Send + Sync + 'static {
    /// These rows have changed.
    fn invalidate(&self, rows: &[&RowKey]);
    /// Anything may have changed.
    fn clear(&self);
}

/// Tells everyone in turn; an empty list is nobody.
impl Invalidate for Vec<Arc<dyn Invalidate>> {
    fn invalidate(&self, rows: &[&RowKey]) {
        self.iter().for_each(|cache| cache.invalidate(rows));
    }
    fn clear(&self) {
        self.iter().for_each(|cache| cache.clear());
    }
}

/// Why a change is refused before it reaches the writer, if it is.
pub(crate) type Refuses = Box<dyn Fn(&Commit) -> Option<StoreError> + Send + Sync>;

/// Waits until a durable change may be acknowledged.
pub(crate) type Confirms =
    Box<dyn Fn(Revision) -> polykey_hsm::BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// What is known of the log and the set of rows at one moment.
#[derive(Clone, Debug)]
pub struct HeadView {
    /// Number of audit leaves.
    pub leaves: u64,
    /// Root of the audit tree.
    pub root: Hash,
    /// Number of sealed rows.
    pub rows: u64,
    /// Number of enabled keys.
    pub keys: u64,
    /// The latest time a commit carried.
    pub last_time: Time,
}

/// One moment of a store's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The store's id: copies of a file share it, a store that was restored or copied has its own.
    pub store_id: [u8; 16],
    /// The revision, which counts anew in a store that was restored or copied.
    pub revision: Revision,
    /// The record counter of the head. It grows with every group, in each lane for itself, and goes on
    /// wherever the records go.
    pub counter: u64,
    /// The audit tree.
    pub log: Frontier,
}

impl Mark {
    /// Whether the counters show that it is before `other`. Those of two lanes show nothing.
    #[must_use]
    pub fn precedes(&self, other: &Self) -> bool {
        let lane = |mark: &Self| mark.counter >> lane::LANE_BITS;
        lane(self) == lane(other) && self.counter < other.counter
    }
}

/// What the first group of a new store holds besides the head.
#[derive(Debug, Default)]
pub struct Founding {
    /// Rows in the clear: node and slots.
    pub clear: Vec<(Space, Vec<u8>, Vec<u8>)>,
    /// Generation of the slot table among them.
    pub slots_generation: u64,
    /// Its MAC.
    pub slots_mac: Vec<u8>,
    /// What becomes the first audit leaves.
    pub events: Vec<AuditEvent>,
}

/// What another node has sealed is read a moment later.
const ROOT_MOVED: &str = "another node has rotated the root key; it is being opened here";

/// The sealed store.
pub struct Vault {
    store: Arc<dyn Store>,
    ring: Arc<ArcSwap<Ring>>,
    node_id: [u8; 16],
    counter: Arc<AtomicU64>,
    head: Arc<ArcSwap<Head>>,
    writable: Arc<AtomicBool>,
    fence: Arc<AtomicU32>,
    intact: AtomicBool,
    unread: AtomicBool,
    damage: Damage,
    metrics: Arc<Metrics>,
    sequencer: Sequencer,
    witnesses: OnceLock<Vec<Arc<dyn Witness>>>,
    /// None where no other node can change what this one remembers.
    freshness: OnceLock<Arc<Freshness>>,
    refuses: OnceLock<Refuses>,
    confirms: OnceLock<Confirms>,
    room: room::Gauge,
    clock: Clock,
}

async fn load_head(store: &dyn Store, sealer: &Sealer) -> Result<Head, Error> {
    let entry = store.get(HeadRecord::SPACE, meta::HEAD).await?;
    let entry = entry.ok_or_else(|| Error::data_loss("the store has no head"))?;
    Head::open(sealer, &entry.value)
}

/// Shows a head to readers, unless they have seen a later one.
fn publish(published: &ArcSwap<Head>, head: &Head) {
    let head = Arc::new(head.clone());
    published.rcu(|shown| {
        let later = shown.frontier.size() > head.frontier.size();
        if later { Arc::clone(shown) } else { Arc::clone(&head) }
    });
}

impl Vault {
    /// Writes the first group of a new store: `clear` rows (node and slots), canary and head.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the store is not empty.
    pub async fn create(
        store: Arc<dyn Store>,
        ring: Ring,
        node_id: [u8; 16],
        clear: Vec<(Space, Vec<u8>, Vec<u8>)>,
        caches: Arc<dyn Invalidate>,
        clock: Clock,
    ) -> Result<Self, Error> {
        let founding = Founding { clear, ..Founding::default() };
        Self::found(store, ring, node_id, founding, caches, clock).await
    }

    /// As [`Self::create`], with all that the first group may hold.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the store is not empty.
    pub async fn found(
        store: Arc<dyn Store>,
        ring: Ring,
        node_id: [u8; 16],
        founding: Founding,
        caches: Arc<dyn Invalidate>,
        clock: Clock,
    ) -> Result<Self, Error> {
        if store.status().revision != Revision::EMPTY {
            return Err(Error::Conflict);
        }
        let vault = Self::assemble(store, ring, node_id, Head::default(), caches, clock)?;
        let mut tx = vault.begin().await?;
        for (space, key, value) in founding.clear {
            tx.insert_clear(space, key, value);
        }
        let canary = CanaryRecord {
            node_id: node_id.to_vec().into(),
            written_at: vault.clock.now().micros(),
            slots_generation: founding.slots_generation,
            slots_mac: founding.slots_mac.into(),
        };
        tx.insert(meta::CANARY, &canary)?;
        for event in founding.events {
            tx.event(event);
        }
        tx.commit().await?;
        Ok(vault)
    }

    /// Opens a store that has been created: the canary and the head must open under the ring.
    ///
    /// # Errors
    /// [`Error::DataLoss`] if they do not.
    pub async fn open(
        store: Arc<dyn Store>,
        ring: Ring,
        node_id: [u8; 16],
        caches: Arc<dyn Invalidate>,
        clock: Clock,
    ) -> Result<Self, Error> {
        let sealer = ring.sealer();
        let canary = store.get(CanaryRecord::SPACE, meta::CANARY).await?;
        let canary = canary.ok_or_else(|| Error::data_loss("the store has no canary"))?;
        let (canary, _) = seal::open::<CanaryRecord>(&sealer, meta::CANARY, &canary.value)?;
        if canary.node_id.as_ref() != node_id.as_slice() {
            return Err(Error::data_loss("the canary is of another node"));
        }
        let head = load_head(&*store, &sealer).await?;
        let vault = Self::assemble(store, ring, node_id, head, caches, clock)?;
        if vault.store.peers().is_some() {
            lane::take(&vault).await?;
        }
        Ok(vault)
    }

    fn assemble(
        store: Arc<dyn Store>,
        ring: Ring,
        node_id: [u8; 16],
        head: Head,
        caches: Arc<dyn Invalidate>,
        clock: Clock,
    ) -> Result<Self, Error> {
        let ring = Arc::new(ArcSwap::from_pointee(ring));
        let counter = Arc::new(AtomicU64::new(head.counter));
        let published = Arc::new(ArcSwap::from_pointee(head.clone()));
        let writable = Arc::new(AtomicBool::new(true));
        let metrics = Arc::new(Metrics::default());
        let fence = Arc::new(AtomicU32::new(0));
        let (sequencer, _thread) = Sequencer::start(Writer {
            store: Arc::clone(&store),
            ring: Arc::clone(&ring),
            node_id,
            counter: Arc::clone(&counter),
            head,
            published: Arc::clone(&published),
            caches,
            writable: Arc::clone(&writable),
            fence: Arc::clone(&fence),
            metrics: Arc::clone(&metrics),
            clock: clock.clone(),
            nudged: Arc::default(),
            shared: store.peers().is_some(),
        })
        .map_err(|e| Error::internal(format!("starting the writer thread: {e}")))?;
        Ok(Self {
            store,
            ring,
            node_id,
            counter,
            head: published,
            writable,
            fence,
            intact: AtomicBool::new(true),
            unread: AtomicBool::new(false),
            damage: Damage::default(),
            metrics,
            sequencer,
            witnesses: OnceLock::new(),
            freshness: OnceLock::new(),
            refuses: OnceLock::new(),
            confirms: OnceLock::new(),
            room: room::Gauge::default(),
            clock,
        })
    }

    /// The node's id, 16 bytes.
    #[must_use]
    pub fn node_id(&self) -> [u8; 16] {
        self.node_id
    }

    /// The clock everything here goes by.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The ring in force.
    #[must_use]
    pub fn ring(&self) -> Arc<Ring> {
        self.ring.load_full()
    }

    /// Puts another ring in force; its slot table must be durable already.
    pub fn replace_ring(&self, ring: Ring) {
        self.ring.store(Arc::new(ring));
    }

    /// The store underneath.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Whether commits are taken.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.writable.load(Ordering::Acquire) && self.intact.load(Ordering::Acquire)
    }

    /// Whether no verification has found a row that does not belong.
    #[must_use]
    pub fn intact(&self) -> bool {
        self.intact.load(Ordering::Acquire)
    }

    /// Whether the last verification could not read all rows.
    #[must_use]
    pub fn unread(&self) -> bool {
        self.unread.load(Ordering::Acquire)
    }

    /// Rows that do not open: all that the last whole verification has found, and those met since, of
    /// which at most 1,000 are counted.
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.damage.count()
    }

    /// How much room there is for what is written, as whoever watches the disk has last said.
    #[must_use]
    pub fn room(&self) -> Room {
        self.room.read()
    }

    /// Says how much room there is for what is written.
    pub fn set_room(&self, room: Room) {
        self.room.set(room);
    }

    /// Has every change asked first; the first call counts.
    pub(crate) fn refuse_by(&self, refuses: Refuses) {
        drop(self.refuses.set(refuses));
    }

    /// Has every change that a request finds made confirmed first; the first call counts.
    pub(crate) fn confirm_by(&self, confirms: Confirms) {
        drop(self.confirms.set(confirms));
    }

    /// Figures of the writer.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The log and the set of rows, as of the last commit.
    #[must_use]
    pub fn head(&self) -> HeadView {
        let head = self.head.load();
        HeadView {
            leaves: head.frontier.size(),
            root: head.frontier.root(),
            rows: head.rows,
            keys: head.keys,
            last_time: head.last_time,
        }
    }

    /// Where the store stands. All of it is durable.
    #[must_use]
    pub fn mark(&self) -> Mark {
        let head = self.head.load_full();
        let status = self.store.status();
        let (counter, log) = (head.counter, head.frontier.clone());
        Mark { store_id: status.id, revision: status.revision, counter, log }
    }

    /// Appends to `log` the hashes of the leaves from its size up to `size`, as they stand in the store.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read, [`Error::DataLoss`] if a leaf is missing.
    pub async fn grow(&self, log: &mut Frontier, size: u64) -> Result<(), Error> {
        while log.size() < size {
            let range = polykey_storage::from(log.size().to_be_bytes());
            let step = usize::try_from(size - log.size()).unwrap_or(LEAVES).min(LEAVES);
            let scanned = self.store.scan(space::AUDIT, range, Direction::Forward, step).await;
            let entries = self.read(scanned)?;
            let before = log.size();
            for entry in entries {
                let hash = entry.value.first_chunk::<32>();
                let (Some(hash), true) = (hash, entry.key == log.size().to_be_bytes()) else {
                    break;
                };
                log.push(*hash);
            }
            if log.size() == before {
                return Err(Error::data_loss(format!("leaf {before} of the audit log is missing")));
            }
        }
        Ok(())
    }

    /// Number of audit leaves: [`HeadView::leaves`] without the root, which takes hashing.
    #[must_use]
    pub fn leaves(&self) -> u64 {
        self.head.load().frontier.size()
    }

    /// Number of enabled keys: [`HeadView::keys`] without the rest.
    #[must_use]
    pub fn enabled_keys(&self) -> u64 {
        self.head.load().keys
    }

    /// The latest time a commit carried: [`HeadView::last_time`] without the rest.
    #[must_use]
    pub fn last_time(&self) -> Time {
        self.head.load().last_time
    }

    /// A keyed name for what must not stand in a row key.
    #[must_use]
    pub fn row_name(&self, kind: &str, name: &str) -> Hash {
        self.ring.load().mac(MacPurpose::RowName, &[kind.as_bytes(), name.as_bytes()])
    }

    /// Begins a transaction on the rows as they are now.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn begin(&self) -> Result<Tx<'_>, Error> {
        let (snapshot, ring) = self.steady().await?;
        Ok(Tx::new(self, snapshot, ring))
    }

    /// Makes events durable that change nothing: logins, denials, exports.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn record(&self, events: impl AsRef<[AuditEvent]> + Send) -> Result<Receipt, Error> {
        let each = events.as_ref().iter();
        let events = each.map(LeafEvents::one).collect();
        self.submit(Commit::new(), events, 0, u32::MAX).await
    }

    /// Makes one block of data-plane events durable, as one leaf. They are encoded as they stand in
    /// an [`AuditBody`](polykey_proto::polykey::record::v1::AuditBody).
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn record_block(&self, events: Bytes) -> Result<Receipt, Error> {
        let events = vec![LeafEvents::block(events)];
        self.submit(Commit::new(), events, 0, u32::MAX).await
    }

    /// Waits until every change that was on its way is decided, whoever has gone away from it.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub(crate) async fn decided(&self) -> Result<(), Error> {
        // The writer takes them in turn.
        self.sequencer.submit(Commit::new(), Vec::new(), 0, u32::MAX).await.map(drop)
    }

    /// Has requests wait for, or be refused by, the freshness of what is remembered here. Once, before
    /// anything is served.
    pub fn set_freshness(&self, freshness: Arc<Freshness>) {
        if self.freshness.set(freshness).is_err() {
            tracing::error!("the freshness of a store is set once");
        }
    }

    /// Whether what is remembered here holds: nothing of it was revoked on another node, with an
    /// acknowledgement, before this call.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if that cannot be told.
    pub async fn fresh(&self) -> Result<(), Error> {
        match self.freshness.get() {
            None => Ok(()),
            Some(freshness) => freshness.require().await,
        }
    }

    /// Whether other nodes may have the store open.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.store.peers().is_some()
    }

    /// Changes that wait for the writer, and how many may.
    #[must_use]
    pub fn queued(&self) -> (usize, usize) {
        self.sequencer.queued()
    }

    /// How long this node may go on serving what it remembers; `None` where no other node changes
    /// the store.
    #[must_use]
    pub fn lease_left(&self) -> Option<std::time::Duration> {
        self.freshness.get().map(|freshness| freshness.left())
    }

    /// Why this node may not be fresh, if it is not.
    #[must_use]
    pub fn behind(&self) -> Option<String> {
        self.freshness.get()?.stale()
    }

    /// Shows the head that other nodes have written.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::DataLoss`] if it cannot be read.
    pub(crate) async fn follow_head(&self) -> Result<(), Error> {
        let head = load_head(&*self.store, &self.ring.load().sealer()).await?;
        publish(&self.head, &head);
        Ok(())
    }

    /// Puts the ring of another node's rotation in force. What was sealed under older epochs and is
    /// not committed yet will not be.
    pub(crate) fn follow_ring(&self, ring: Ring) {
        self.fence.fetch_max(ring.primary_epoch(), Ordering::SeqCst);
        self.ring.store(Arc::new(ring));
    }

    /// Has these know of every change before it is acknowledged. Once, before anything is served.
    pub fn set_witnesses(&self, witnesses: Vec<Arc<dyn Witness>>) {
        if self.witnesses.set(witnesses).is_err() {
            tracing::error!("the witnesses of a store are set once");
        }
    }

    /// Returns when every witness knows of whatever is durable now: for a request that finds its change
    /// made, by a call whose acknowledgement may not have come to its end.
    pub(crate) async fn rewitnessed(&self) -> Result<(), Error> {
        if self.confirms.get().is_none() && self.witnesses.get().is_none_or(Vec::is_empty) {
            return Ok(());
        }
        let revision = self.read(self.store.snapshot().await)?.revision();
        if let Some(confirms) = self.confirms.get() {
            confirms(revision).await?;
        }
        self.witnessed(revision, true).await
    }

    /// Returns when every witness knows of a change.
    pub(crate) async fn witnessed(&self, revision: Revision, urgent: bool) -> Result<(), Error> {
        for witness in self.witnesses.get().into_iter().flatten() {
            witness.witness(revision, urgent).await.map_err(|error| {
                let cause = error.internal_text().map_or_else(|| error.to_string(), str::to_owned);
                Error::OutcomeUnknown {
                    internal: format!(
                        "revision {revision} is durable and not yet witnessed: {cause}"
                    ),
                }
            })?;
        }
        Ok(())
    }

    async fn submit(
        &self,
        commit: Commit,
        events: Vec<LeafEvents>,
        enabled: i64,
        oldest_epoch: u32,
    ) -> Result<Receipt, Error> {
        if !self.intact() {
            return Err(Error::data_loss("the store failed its verification; writing has stopped"));
        }
        if let Some(why) = self.refuses.get().and_then(|refuses| refuses(&commit)) {
            return Err(Error::unavailable(why.to_string()));
        }
        if !self.writable() {
            return Err(Error::unavailable("the store takes no commits just now"));
        }
        if self.room() == Room::None {
            return Err(Error::NoRoom);
        }
        let _stage = trace::begin(Stage::Commit);
        self.sequencer.submit(commit, events, enabled, oldest_epoch).await
    }

    fn next_counter(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vault").field("store", &self.store.status()).finish_non_exhaustive()
    }
}
