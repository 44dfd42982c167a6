//! Changes of the slots and of the root.
//!
//! Devices take their time, up to 30 s a call: they work on the table as it was read, with nothing
//! locked, and what comes of it is committed if the table is still the same. Otherwise the change
//! begins again.

use std::sync::Arc;

use futures::future::try_join_all;
use polykey_hsm::{KeyWrapper, Ring, RootKey, random};
use polykey_proto::polykey::record::v1::{AuditEvent, ResealRecord, SlotTable};
use polykey_storage::Revision;
use tokio::sync::MutexGuard;

use super::error::ChangeError;
use super::slots::{self, SlotSpec};
use super::{Change, Custody, State};
use crate::error::Error;
use crate::keyring::Remember;
use crate::vault::Vault;

/// More slots than anybody needs; opening tries each in turn.
pub(super) const MAX_SLOTS: usize = 32;
/// How often a change begins again when another one was faster.
const ATTEMPTS: usize = 8;

/// What a change of the slots depends on, and who may ask for it again.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The generation that the slot table is believed to have.
    pub expected: Option<u64>,
    /// What is written down with it for whoever repeats the request.
    pub remember: Option<Remember>,
}

impl Terms {
    fn meet(&self, table: &SlotTable) -> Result<(), ChangeError> {
        match self.expected {
            Some(expected) if expected != table.generation => Err(Error::Conflict.into()),
            _ => Ok(()),
        }
    }
}

/// A slot that goes; see [`Custody::remove_slot`].
pub struct Removal {
    /// The slot, by label or id.
    pub slot: String,
    /// The wrappers of this node: one of them must open one of the slots that stay.
    pub wrappers: Vec<Arc<dyn KeyWrapper>>,
    /// Under which it goes.
    pub terms: Terms,
}

impl std::fmt::Debug for Removal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Removal").field("slot", &self.slot).finish_non_exhaustive()
    }
}

/// What a slot's wrapping becomes; see [`Custody::rewrap_slot`].
#[derive(Clone, Debug)]
pub struct Rewrap {
    /// The slot, by label or id.
    pub slot: String,
    /// What kind of wrapper it is for from now on.
    pub kind: String,
    /// Where the wrapper's secret is found from now on.
    pub source: String,
    /// The new label; `None` = as before.
    pub label: Option<String>,
    /// Under which it is made.
    pub terms: Terms,
}

/// The slot table in force at one moment, and the root that opens it.
struct Seen {
    table: SlotTable,
    at: Revision,
    root: Arc<RootKey>,
}

impl Custody {
    /// Looks at the slot table, for a change that is to be made of it.
    async fn see(&self) -> Result<Seen, Error> {
        let mut state = self.state.lock().await;
        let (table, at) = self.reconciled(&mut state).await?;
        Ok(Seen { table, at, root: Arc::clone(&state.root) })
    }

    /// The right to commit a change of the table that was seen, unless another change was faster.
    async fn unchanged(&self, mac: &[u8]) -> Result<Option<MutexGuard<'_, State>>, Error> {
        let mut state = self.state.lock().await;
        let (table, _) = self.reconciled(&mut state).await?;
        Ok((table.mac == mac).then_some(state))
    }

    /// Wraps the root of one slot, named by label or id, under another wrapper: the replacement of
    /// a master key. The other slots stay. An old copy of the store still opens with the old
    /// master key, whose holder then knows this root: follow with [`Self::rotate_root`] where
    /// that matters.
    ///
    /// # Errors
    /// See [`ChangeError`]; nothing has changed then, unless the outcome is unknown.
    pub async fn rewrap(
        self: &Arc<Self>,
        slot: &str,
        wrapper: Arc<dyn KeyWrapper>,
        kind: &str,
        source: &str,
        event: AuditEvent,
    ) -> Result<(), ChangeError> {
        let rewrap = Rewrap {
            slot: slot.to_owned(),
            kind: kind.to_owned(),
            source: source.to_owned(),
            label: None,
            terms: Terms::default(),
        };
        self.rewrap_slot(rewrap, wrapper, event).await.map(drop)
    }

    /// As [`Self::rewrap`], with a new label and an expected generation. Returns the index of the
    /// event's leaf, if it is known.
    ///
    /// # Errors
    /// As [`Self::rewrap`]; [`Error::Conflict`] if the table has another generation,
    /// [`ChangeError::LabelTaken`] if another slot has the new label.
    pub async fn rewrap_slot(
        self: &Arc<Self>,
        rewrap: Rewrap,
        wrapper: Arc<dyn KeyWrapper>,
        event: AuditEvent,
    ) -> Result<Option<u64>, ChangeError> {
        let this = Arc::clone(self);
        detached(Arc::clone(&self.vault), async move {
            let Rewrap { slot: name, kind, source, label, terms } = rewrap;
            let node_id = this.vault.node_id();
            for _ in 0..ATTEMPTS {
                let Seen { mut table, at, root } = this.see().await?;
                let seen = table.mac.clone();
                terms.meet(&table)?;
                let id = slots::id(slots::find(&mut table, &name)?)?;
                if let Some(label) = &label
                    && table.slots.iter().any(|s| s.label == *label && s.slot_id != id.as_slice())
                {
                    return Err(ChangeError::LabelTaken(label.clone()));
                }
                let slot = slots::find(&mut table, &name)?;
                let label = label.clone().unwrap_or_else(|| slot.label.clone());
                let spec = SlotSpec { label, kind: kind.clone(), source: source.clone() };
                spec.check()?;
                let wrapped = slots::wrap(&root, &wrapper, node_id, id).await;
                let wrapped =
                    wrapped.map_err(|error| ChangeError::Wrap { slot: spec.clone(), error })?;
                let Some(mut state) = this.unchanged(&seen).await? else { continue };
                let event = slots::describe(event, &spec);
                *slot = spec.record(id, wrapped, this.vault.clock().now());
                return this.apply_slots(&mut state, table, at, event, terms.remember).await;
            }
            Err(Error::Conflict.into())
        })
        .await
    }

    /// Adds a slot that opens the same root through another wrapper. Returns its id and the index of
    /// the event's leaf, if it is known.
    ///
    /// # Errors
    /// As [`Self::rewrap`]; [`ChangeError::LabelTaken`] if there is one of that label,
    /// [`Error::Conflict`] if the table has another generation than expected.
    pub async fn add_slot(
        self: &Arc<Self>,
        wrapper: Arc<dyn KeyWrapper>,
        spec: SlotSpec,
        terms: Terms,
        event: AuditEvent,
    ) -> Result<([u8; 16], Option<u64>), ChangeError> {
        spec.check()?;
        let this = Arc::clone(self);
        detached(Arc::clone(&self.vault), async move {
            let id = random::array().map_err(|e| Error::internal(e.to_string()))?;
            for _ in 0..ATTEMPTS {
                let Seen { mut table, at, root } = this.see().await?;
                let seen = table.mac.clone();
                terms.meet(&table)?;
                if table.slots.iter().any(|slot| slot.label == spec.label) {
                    return Err(ChangeError::LabelTaken(spec.label));
                }
                if table.slots.len() >= MAX_SLOTS {
                    return Err(ChangeError::TooManySlots);
                }
                let wrapped = slots::wrap(&root, &wrapper, this.vault.node_id(), id).await;
                let wrapped =
                    wrapped.map_err(|error| ChangeError::Wrap { slot: spec.clone(), error })?;
                let Some(mut state) = this.unchanged(&seen).await? else { continue };
                table.slots.push(spec.record(id, wrapped, this.vault.clock().now()));
                let event = slots::describe(event, &spec);
                let leaf = this.apply_slots(&mut state, table, at, event, terms.remember).await?;
                return Ok((id, leaf));
            }
            Err(Error::Conflict.into())
        })
        .await
    }

    /// Removes a slot. What stays must open: one of the other slots, by one of the wrappers in
    /// `removal`. The removed slot's wrapper still opens old copies of the store; see
    /// [`Self::rewrap`]. Returns the slot's id and the index of the event's leaf, if it is known.
    ///
    /// # Errors
    /// [`ChangeError::LastSlot`]; see [`ChangeError`].
    pub async fn remove_slot(
        self: &Arc<Self>,
        removal: Removal,
        event: AuditEvent,
    ) -> Result<([u8; 16], Option<u64>), ChangeError> {
        let this = Arc::clone(self);
        detached(Arc::clone(&self.vault), async move {
            let Removal { slot: name, wrappers, terms } = removal;
            for _ in 0..ATTEMPTS {
                let Seen { mut table, at, root } = this.see().await?;
                let seen = table.mac.clone();
                terms.meet(&table)?;
                let slot = slots::find(&mut table, &name)?.clone();
                table.slots.retain(|other| other.slot_id != slot.slot_id);
                let node_id = this.vault.node_id();
                let usable = slots::any_opens(&table.slots, &wrappers, node_id, &root).await;
                let usable = usable.map_err(ChangeError::LastSlot)?;
                let Some(mut state) = this.unchanged(&seen).await? else { continue };
                let event = slots::describe(event, &SlotSpec::of(&slot));
                let id = slots::id(&slot)?;
                let leaf = this.apply_slots(&mut state, table, at, event, terms.remember).await?;
                let mut opened_by = this.opened_by.lock();
                if *opened_by == id {
                    *opened_by = usable;
                }
                return Ok((id, leaf));
            }
            Err(Error::Conflict.into())
        })
        .await
    }

    /// Proves that a slot opens as the root in force, and changes nothing.
    ///
    /// # Errors
    /// [`ChangeError::SlotUnavailable`] with the reason if it does not; see [`ChangeError`].
    pub async fn test_slot(
        self: &Arc<Self>,
        slot: &str,
        wrappers: &[Arc<dyn KeyWrapper>],
    ) -> Result<SlotSpec, ChangeError> {
        let Seen { mut table, root, .. } = self.see().await?;
        let slot = slots::find(&mut table, slot)?.clone();
        let tried = slots::opens(&slot, wrappers, self.vault.node_id(), &root).await;
        tried.map_err(ChangeError::SlotUnavailable)?;
        Ok(SlotSpec::of(&slot))
    }

    /// Makes a new root key and a new storage-key epoch, wraps the root for every slot by that of
    /// `wrappers` which opens the slot now, and proves each new wrapping, all before the one
    /// commit. Resealing what older epochs sealed is left to [`Self::run_reseal`].
    ///
    /// # Errors
    /// [`ChangeError::SlotUnavailable`] if a slot opens with none of `wrappers`; see
    /// [`ChangeError`].
    pub async fn rotate_root(
        self: &Arc<Self>,
        wrappers: Vec<Arc<dyn KeyWrapper>>,
        event: AuditEvent,
    ) -> Result<(), ChangeError> {
        self.rotate_root_from(None, wrappers, event, None).await.map(drop)
    }

    /// As [`Self::rotate_root`], if the root has the expected id. Returns the new id, the new epoch
    /// and the index of the event's leaf, if it is known.
    ///
    /// # Errors
    /// As [`Self::rotate_root`]; [`Error::Conflict`] if the root is another one.
    pub async fn rotate_root_from(
        self: &Arc<Self>,
        expected: Option<[u8; 16]>,
        wrappers: Vec<Arc<dyn KeyWrapper>>,
        event: AuditEvent,
        remember: Option<Remember>,
    ) -> Result<([u8; 16], u32, Option<u64>), ChangeError> {
        let this = Arc::clone(self);
        detached(Arc::clone(&self.vault), async move {
            let node_id = this.vault.node_id();
            for _ in 0..ATTEMPTS {
                let Seen { mut table, at, root: old } = this.see().await?;
                let seen = table.mac.clone();
                if expected.is_some_and(|expected| expected != old.id()) {
                    return Err(Error::Conflict.into());
                }
                let crypto = |e: polykey_hsm::CryptoFailure| Error::internal(e.to_string());
                let root = Arc::new(RootKey::generate().map_err(crypto)?);
                let anew = |slot| slots::rewrapped(slot, &wrappers, node_id, (&old, &root));
                let wrapped = try_join_all(table.slots.iter().map(anew)).await?;
                for (slot, wrapped) in table.slots.iter_mut().zip(wrapped) {
                    slot.wrapped = wrapped.into();
                }
                let Some(mut state) = this.unchanged(&seen).await? else { continue };
                // Read under the lock: nobody else adds an epoch or retires one meanwhile.
                let mut ring = Ring::clone(&this.vault.ring());
                let epoch = ring.add_epoch().map_err(|e| Error::internal(e.to_string()))?;
                let mut event = event;
                event.details.insert("epoch".into(), epoch.to_string());
                event.details.insert("root_id".into(), slots::hex(&root.id()));
                let reseal = ResealRecord {
                    target_epoch: epoch,
                    started_at: this.vault.clock().now().micros(),
                    ..ResealRecord::default()
                };
                let root_id = root.id();
                let change = Change { table, at, root, ring, reseal: Some(reseal), remember };
                let leaf = this.apply(&mut state, change, event).await?;
                this.wake.notify_one();
                return Ok((root_id, epoch, leaf));
            }
            Err(Error::Conflict.into())
        })
        .await
    }
}

/// Runs a change to its end even if whoever asked for it goes away. Witnesses hear of it when nothing
/// is locked any more: another node that is to know of it may have to open its own way to the root.
async fn detached<T: Send + 'static>(
    vault: Arc<Vault>,
    change: impl Future<Output = Result<T, ChangeError>> + Send + 'static,
) -> Result<T, ChangeError> {
    let witnessed = async move {
        let changed = change.await?;
        vault.witnessed(vault.store().status().revision, true).await?;
        Ok(changed)
    };
    match tokio::spawn(witnessed).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(format!("a change of slots: {error}")).into()),
    }
}
