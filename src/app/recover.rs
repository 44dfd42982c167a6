//! Recovery: the root key from a recovery key or its shares, put under the node's own master key again.

use std::sync::Arc;

use polykey_hsm::recovery::{RecoveryKey, RecoveryWrapper};
use polykey_hsm::{KeyWrapper, MasterKeySource};

use super::{AppError, event, store};
use crate::config::{Config, Wrapper};
use crate::custody::{self, Custody, NamedWrapper, RECOVERY, Rewrap, SlotSpec, Terms};
use crate::setup;
use crate::time::Clock;

/// Why nothing was recovered, besides what keeps a node from opening.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RecoveryFailure {
    /// Not a key.
    #[error("the recovery key: {0}")]
    Key(#[from] polykey_hsm::recovery::RecoveryError),
    /// Its public half is that of no slot.
    #[error(
        "this recovery key is of no slot of the store, or of a root key from before the last \
         rotation: its public half is {0}"
    )]
    OfNoSlot(String),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The node.
    pub node_id: [u8; 16],
    /// The slot that the master key opens from now on.
    pub slot: SlotSpec,
    /// Whether it did before, so that nothing was changed.
    pub unchanged: bool,
    /// Whether the master key's file was made.
    pub master_key_made: bool,
}

/// Opens the store with a recovery key and wraps its root key under the configuration's master key, so
/// that the node starts by itself again. No server may have the store open. The recovery slot stays.
/// With `make_master_key`, a master key is made in the file that the configuration names, if there is
/// none, once the recovery key has opened the store.
///
/// # Errors
/// See [`AppError`]; nothing has changed then.
pub async fn recover(
    config: &Config,
    key: RecoveryKey,
    make_master_key: bool,
    clock: Clock,
) -> Result<Recovered, AppError> {
    let recovery = RecoveryWrapper::with(key).map_err(RecoveryFailure::from)?;
    let public = recovery.public().to_string();
    let (store, _replication) = store::open(config, false).await?;
    let recovery: Arc<dyn KeyWrapper> = Arc::new(recovery);
    let nobody = Arc::new(Vec::<Arc<dyn crate::vault::Invalidate>>::new());
    let opened = Custody::open(store, &[recovery], nobody, clock.clone()).await;
    let custody = opened.map_err(|error| match error {
        custody::OpenError::NoSlotOpened(_) => RecoveryFailure::OfNoSlot(public).into(),
        error => AppError::from(error),
    })?;
    let recovered = give_back(&custody, config, make_master_key, clock).await;
    drop(custody);
    store::closed(config).await;
    recovered
}

pub(super) async fn give_back(
    custody: &Arc<Custody>,
    config: &Config,
    make_master_key: bool,
    clock: Clock,
) -> Result<Recovered, AppError> {
    let master_key_made = match &config.master_key {
        Wrapper::Local(MasterKeySource::File(path)) if make_master_key && !path.exists() => {
            setup::master_key(path)?;
            true
        }
        _ => false,
    };
    let opened = NamedWrapper::open_master(config).await;
    let master = opened.map_err(|unusable| AppError::MasterKey(unusable.error))?;
    let (slot, unchanged) = rewrap(custody, &master, clock).await?;
    let node_id = custody.vault().node_id();
    Ok(Recovered { node_id, slot, unchanged, master_key_made })
}

/// Gives the slot, and whether it opened by the master key already.
async fn rewrap(
    custody: &Arc<Custody>,
    master: &NamedWrapper,
    clock: Clock,
) -> Result<(SlotSpec, bool), AppError> {
    let status = custody.status().await?;
    for slot in status.slots.iter().filter(|slot| slot.kind != RECOVERY) {
        let tried = custody.test_slot(&slot.label, &[Arc::clone(&master.wrapper)]).await;
        if let Ok(slot) = tried {
            return Ok((slot, true));
        }
    }
    // The slot whose secret stood where the new one stands is of no use to anybody now.
    let place = master.slot("");
    let same = |slot: &&custody::SlotStatus| slot.kind == place.kind && slot.source == place.source;
    let event = |action| event(action, clock.now());
    let slot = match status.slots.iter().find(same) {
        Some(old) => {
            let rewrap = Rewrap {
                slot: old.label.clone(),
                kind: place.kind,
                source: place.source,
                label: None,
                terms: Terms::default(),
            };
            let spec = master.slot(&old.label);
            let wrapper = Arc::clone(&master.wrapper);
            custody.rewrap_slot(rewrap, wrapper, event("Recover")).await.map(|_| spec)
        }
        None => {
            let taken = |label: &str| status.slots.iter().any(|slot| slot.label == label);
            let label = std::iter::once("recovered".to_owned())
                .chain((2..=u32::MAX).map(|n| format!("recovered-{n}")))
                .find(|label| !taken(label))
                .unwrap_or_default();
            let spec = master.slot(&label);
            let wrapper = Arc::clone(&master.wrapper);
            let added =
                custody.add_slot(wrapper, spec.clone(), Terms::default(), event("Recover")).await;
            added.map(|_| spec)
        }
    };
    let slot = slot.map_err(crate::error::Error::from)?;
    Ok((slot, false))
}
