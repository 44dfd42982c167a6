//! Custody of the root key: how a store is founded and opened, and how its slots and root change.
//!
//! A *slot* wraps the root key under one wrapper (a master key, a passphrase). The *slot table*
//! stands in the clear in one row, with a MAC under the root key, and carries the ring of storage
//! keys sealed under the same root, so that slots, root and ring change at once or not at all. The
//! canary, a sealed row, names the table in force: a table that is put back from an older copy of
//! the store does not match it. Whoever puts back both is found out by the head's set hash, when
//! the store is next verified.
//!
//! The root is opened once and kept for the life of the process, because wrapping it anew needs it.

pub mod backends;
pub mod breaker;
mod change;
#[cfg(test)]
pub(crate) mod device;
mod error;
mod follow;
mod reseal;
pub mod signing;
mod slots;
#[cfg(test)]
mod tests;
mod tokens;
mod wrappers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use polykey_hsm::{KeyWrapper, Ring, RootKey, random};
use polykey_proto::polykey::record::v1::{
    AuditEvent, CanaryRecord, NodeRecord, ResealRecord, Slot, SlotTable,
};
use polykey_storage::{Revision, Store};
use prost::Message;
use tokio::sync::{Mutex, Notify};

pub use backends::{BackendError, Backends, section};
pub use change::{Removal, Rewrap, Terms};
pub use error::{ChangeError, InitError, OpenError, Trial, TrialOutcome};
pub use reseal::Pace;
pub use slots::{RECOVERY, SlotSpec};
pub use tokens::{Placed, Tokens};
pub use wrappers::{MASTER_KEY, NamedWrapper, Unusable, WrapperError, open_token};

use crate::error::Error;
use crate::keyring::Remember;
use crate::time::{Clock, Time};
use crate::vault::space::{META, meta};
use crate::vault::{Founding, Invalidate, Vault};
use slots::Sealed;

/// The layout of the rows that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// One slot, as operators see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotStatus {
    /// Its id, 16 random bytes.
    pub id: [u8; 16],
    /// The operator's name for it.
    pub label: String,
    /// What kind of wrapper it is for.
    pub kind: String,
    /// Where the wrapper's secret is found.
    pub source: String,
    /// When its wrapper was last set.
    pub created_at: Time,
    /// Whether this process opened the root through it; if that slot is gone, whether it is the one
    /// that was proven to open instead.
    pub opened: bool,
}

/// How far the resealing after a rotation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResealStatus {
    /// The epoch that everything moves to.
    pub target_epoch: u32,
    /// Rows written so far.
    pub resealed: u64,
    /// Walks over all rows that have ended.
    pub passes: u32,
    /// When the rotation was.
    pub started_at: Time,
    /// When the older epochs were forgotten.
    pub finished_at: Option<Time>,
}

/// What there is to know of a store's root and slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The node.
    pub node_id: [u8; 16],
    /// When it was initialised.
    pub created_at: Time,
    /// The public id of the root key.
    pub root_id: [u8; 16],
    /// How often the slot table has changed, from 1.
    pub generation: u64,
    /// The slots, in the order in which they are tried.
    pub slots: Vec<SlotStatus>,
    /// Storage-key epochs in the ring, oldest first; the last one is primary.
    pub epochs: Vec<u32>,
    /// The last resealing, if there was one.
    pub reseal: Option<ResealStatus>,
}

/// A root and ring that may or may not have become durable.
struct Candidate {
    generation: u64,
    mac: Vec<u8>,
    root: Arc<RootKey>,
    ring: Ring,
}

struct State {
    root: Arc<RootKey>,
    candidate: Option<Candidate>,
}

/// A change of the slot table that waits to be made.
struct Change {
    table: SlotTable,
    at: Revision,
    root: Arc<RootKey>,
    ring: Ring,
    reseal: Option<ResealRecord>,
    /// What is written down with it for whoever repeats the request.
    remember: Option<Remember>,
}

/// An open store and its root key.
pub struct Custody {
    vault: Arc<Vault>,
    created_at: Time,
    /// The slot that opened the root; when that is removed, the one that was proven to open then.
    opened_by: parking_lot::Mutex<[u8; 16]>,
    /// The slot that opened the root at the start, and how long that took; `None` in a store just founded.
    opened_in: Option<([u8; 16], Duration)>,
    /// One commit of slots or root at a time. Nobody waits for a device while holding it.
    state: Mutex<State>,
    resealing: Mutex<()>,
    wake: Notify,
}

impl Custody {
    /// Founds a store: node, root key, ring, slot table with one slot, canary, head and `event`,
    /// all in one commit, so that a crash leaves either an empty store or a whole one.
    ///
    /// # Errors
    /// See [`InitError`]; [`InitError::AlreadyInitialised`] if the store is not empty.
    pub async fn init(
        store: Arc<dyn Store>,
        wrapper: Arc<dyn KeyWrapper>,
        slot: SlotSpec,
        event: AuditEvent,
        caches: Arc<dyn Invalidate>,
        clock: Clock,
    ) -> Result<Arc<Self>, InitError> {
        slot.check()?;
        if store.status().revision != Revision::EMPTY {
            return Err(InitError::AlreadyInitialised);
        }
        let crypto = |e: polykey_hsm::CryptoFailure| Error::internal(e.to_string());
        let node_id = random::array().map_err(crypto)?;
        let slot_id = random::array().map_err(crypto)?;
        let now = clock.now();
        let root = Arc::new(RootKey::generate().map_err(crypto)?);
        let ring = Ring::generate(node_id).map_err(crypto)?;
        let wrapped = slots::wrap(&root, &wrapper, node_id, slot_id).await;
        let wrapped = wrapped.map_err(|error| InitError::Wrap { slot: slot.clone(), error })?;
        let mut table = SlotTable::default();
        table.slots.push(slot.record(slot_id, wrapped, now));
        let sealed = Sealed::new(table, &root, &ring).map_err(InitError::Store)?;
        let node = NodeRecord {
            format: FORMAT,
            node_id: node_id.to_vec().into(),
            created_at: now.micros(),
        };
        let founding = Founding {
            clear: vec![
                (META, meta::NODE.to_vec(), node.encode_to_vec()),
                (META, meta::SLOTS.to_vec(), sealed.bytes),
            ],
            slots_generation: sealed.generation,
            slots_mac: sealed.mac,
            events: vec![event],
        };
        let vault = Vault::found(store, ring, node_id, founding, caches, clock).await;
        let vault = vault.map_err(|error| match error {
            Error::Conflict => InitError::AlreadyInitialised,
            error => InitError::Store(error),
        })?;
        Ok(Arc::new(Self::new(vault, now, root, slot_id)))
    }

    /// Opens a store: tries every wrapper on every slot, and proves root, slots, ring, canary and
    /// head before it returns.
    ///
    /// # Errors
    /// See [`OpenError`]. None of them carries a secret.
    pub async fn open(
        store: Arc<dyn Store>,
        wrappers: &[Arc<dyn KeyWrapper>],
        caches: Arc<dyn Invalidate>,
        clock: Clock,
    ) -> Result<Arc<Self>, OpenError> {
        let row = |key| {
            let store = &store;
            async move { store.get(META, key).await.map_err(|e| OpenError::Store(e.into())) }
        };
        let node = row(meta::NODE).await?.ok_or(OpenError::NotInitialised)?;
        let node = NodeRecord::decode(node.value.as_ref())
            .map_err(|_| OpenError::Damaged("the node's record is malformed".into()))?;
        // Before anything else is believed: what follows may look different.
        if node.format > FORMAT {
            return Err(OpenError::NewerFormat { found: node.format, supported: FORMAT });
        }
        let node_id: [u8; 16] = (node.node_id.as_ref().try_into())
            .map_err(|_| OpenError::Damaged("the node's record has no node id".into()))?;
        let slots = row(meta::SLOTS).await?;
        let slots = slots.ok_or_else(|| OpenError::Damaged("the slot table is missing".into()))?;
        let table = SlotTable::decode(slots.value.as_ref())
            .map_err(|_| OpenError::Damaged("the slot table is malformed".into()))?;

        // Each is tried, and nothing proves them before one has opened.
        if table.slots.len() > change::MAX_SLOTS {
            return Err(OpenError::Damaged(
                "the slot table has more slots than there can be".into(),
            ));
        }
        let began = Instant::now();
        let (root, opened_by) = slots::open_any(&table, wrappers, node_id).await?;
        let opened_in = began.elapsed();
        let ring = Ring::open(&root, &table.ring)
            .map_err(|e| OpenError::Damaged(format!("the ring of storage keys: {e}")))?;
        if ring.node_id() != node_id {
            return Err(OpenError::Damaged("the ring is of another node".into()));
        }
        let sealed = |error: Error| match error {
            Error::DataLoss { internal } => OpenError::Damaged(internal),
            error => OpenError::Store(error),
        };
        let vault = Vault::open(store, ring, node_id, caches, clock).await.map_err(sealed)?;
        let canary = vault.get::<CanaryRecord>(meta::CANARY).await.map_err(sealed)?;
        let canary = canary.map(|c| c.record).unwrap_or_default();
        if canary.slots_generation != table.generation || canary.slots_mac != table.mac {
            return Err(OpenError::Replayed {
                found: table.generation,
                expected: canary.slots_generation,
            });
        }
        let behind = vault.head().last_time.since(vault.clock().now());
        if !behind.is_zero() {
            tracing::warn!(
                seconds = behind.as_secs(),
                "the clock is behind the last commit of the store: check the time of this machine"
            );
        }
        let mut custody = Self::new(vault, Time::from_micros(node.created_at), root, opened_by);
        custody.opened_in = Some((opened_by, opened_in));
        Ok(Arc::new(custody))
    }

    fn new(vault: Vault, created_at: Time, root: Arc<RootKey>, opened_by: [u8; 16]) -> Self {
        Self {
            vault: Arc::new(vault),
            created_at,
            opened_by: parking_lot::Mutex::new(opened_by),
            opened_in: None,
            state: Mutex::new(State { root, candidate: None }),
            resealing: Mutex::new(()),
            wake: Notify::new(),
        }
    }

    /// The id of the slot that opened the root at the start, and how long that took, slots that did not
    /// open included.
    #[must_use]
    pub fn opened_in(&self) -> Option<([u8; 16], Duration)> {
        self.opened_in
    }

    /// The sealed store.
    #[must_use]
    pub fn vault(&self) -> &Arc<Vault> {
        &self.vault
    }

    /// Root, slots, epochs and resealing as they are stored now.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read, [`Error::DataLoss`] if it is damaged.
    pub async fn status(&self) -> Result<Status, Error> {
        let (table, _) = self.table().await?;
        let opened_by = *self.opened_by.lock();
        let slot = |slot: Slot| {
            let id = slots::id(&slot).unwrap_or_default();
            SlotStatus {
                id,
                label: slot.label,
                kind: slot.kind,
                source: slot.source,
                created_at: Time::from_micros(slot.created_at),
                opened: id == opened_by,
            }
        };
        let reseal = self.vault.get::<ResealRecord>(meta::RESEAL).await?;
        Ok(Status {
            node_id: self.vault.node_id(),
            created_at: self.created_at,
            root_id: table.root_id.as_ref().try_into().unwrap_or_default(),
            generation: table.generation,
            slots: table.slots.into_iter().map(slot).collect(),
            epochs: self.vault.ring().epochs(),
            reseal: reseal.map(|loaded| reseal::status(&loaded.record)),
        })
    }

    /// The slot table as it is stored, not yet authenticated.
    async fn table(&self) -> Result<(SlotTable, Revision), Error> {
        let row = self.vault.get_clear(META, meta::SLOTS).await?;
        let (bytes, at) = row.ok_or_else(|| Error::data_loss("the slot table is missing"))?;
        let table = SlotTable::decode(bytes.as_slice())
            .map_err(|_| Error::data_loss("the slot table is malformed"))?;
        Ok((table, at))
    }

    /// The slot table, authentic, with what became of a change whose outcome was not known.
    async fn reconciled(&self, state: &mut State) -> Result<(SlotTable, Revision), Error> {
        let (table, at) = self.table().await?;
        if let Some(candidate) = state.candidate.take()
            && candidate.generation == table.generation
            && candidate.mac == table.mac
        {
            self.adopt(state, candidate);
        }
        if !slots::authentic(&table, &state.root) {
            if self.vault.is_shared() {
                // Another node has rotated the root, a moment ago: what was read is of yesterday.
                return Err(Error::Conflict);
            }
            return Err(Error::data_loss("the slot table does not authenticate"));
        }
        Ok((table, at))
    }

    fn adopt(&self, state: &mut State, candidate: Candidate) {
        state.root = candidate.root;
        // Durable by now: nothing is sealed under an epoch that a restart would not find.
        match self.vault.is_shared() {
            true => self.vault.follow_ring(candidate.ring),
            false => self.vault.replace_ring(candidate.ring),
        }
    }

    async fn apply_slots(
        &self,
        state: &mut State,
        table: SlotTable,
        at: Revision,
        event: AuditEvent,
        remember: Option<Remember>,
    ) -> Result<Option<u64>, ChangeError> {
        let (root, ring) = (Arc::clone(&state.root), Ring::clone(&self.vault.ring()));
        let change = Change { table, at, root, ring, reseal: None, remember };
        Ok(self.apply(state, change, event).await?)
    }

    /// Commits a slot table, the canary that names it and the event, and then puts root and ring
    /// in force.
    async fn apply(
        &self,
        state: &mut State,
        change: Change,
        mut event: AuditEvent,
    ) -> Result<Option<u64>, Error> {
        let Change { table, at, root, ring, reseal, remember } = change;
        let sealed = Sealed::new(table, &root, &ring)?;
        event.details.insert("generation".into(), sealed.generation.to_string());
        // Resealing may rewrite the canary between reading and writing it here.
        for _ in 0..16 {
            let mut tx = self.vault.begin().await?;
            let canary = tx.get::<CanaryRecord>(meta::CANARY).await?;
            let canary = canary.ok_or_else(|| Error::data_loss("the store has no canary"))?;
            let canary = CanaryRecord {
                slots_generation: sealed.generation,
                slots_mac: sealed.mac.clone().into(),
                written_at: self.vault.clock().now().micros(),
                ..canary.record
            };
            tx.put(meta::CANARY, &canary)?;
            tx.replace_clear(META, meta::SLOTS.to_vec(), sealed.bytes.clone(), at);
            if let Some(reseal) = &reseal {
                tx.set(meta::RESEAL, reseal)?;
            }
            if let Some(remember) = &remember {
                remember.write(&mut tx).await?;
            }
            tx.event(event.clone());
            state.candidate = Some(Candidate {
                generation: sealed.generation,
                mac: sealed.mac.clone(),
                root: Arc::clone(&root),
                ring: ring.clone(),
            });
            match tx.commit().await {
                Ok(receipt) => {
                    if let Some(candidate) = state.candidate.take() {
                        self.adopt(state, candidate);
                    }
                    return Ok(receipt.leaf);
                }
                Err(Error::Conflict) => state.candidate = None,
                Err(Error::OutcomeUnknown { internal }) => {
                    return self.settle(state, &sealed.mac, internal).await.map(|()| None);
                }
                Err(error) => {
                    state.candidate = None;
                    return Err(error);
                }
            }
        }
        Err(Error::Conflict)
    }

    /// Waits for the store to come back and looks whether the change was made. If it does not come
    /// back in time, the next change looks again.
    async fn settle(&self, state: &mut State, mac: &[u8], cause: String) -> Result<(), Error> {
        for _ in 0..500 {
            if self.vault.writable() {
                let (table, _) = self.reconciled(state).await?;
                if table.mac == mac {
                    return Ok(());
                }
                return Err(Error::unavailable(format!("the change was not made: {cause}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(Error::OutcomeUnknown { internal: cause })
    }
}

impl std::fmt::Debug for Custody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Custody").field("vault", &self.vault).finish_non_exhaustive()
    }
}
