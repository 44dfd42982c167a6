//! Slots and root that another node has changed.

use std::sync::Arc;

use polykey_hsm::{KeyWrapper, Ring};
use polykey_proto::polykey::record::v1::CanaryRecord;

use super::{Custody, OpenError, slots};
use crate::error::Error;
use crate::vault::space::meta;

impl Custody {
    /// Puts in force what the stored slot table says: another root, opened through a slot that one of
    /// `wrappers` opens, or another ring under the same one. Nothing else is sealed or opened by this
    /// node meanwhile.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if no slot opens now, [`Error::DataLoss`] if the table is not one that
    /// follows the one in force.
    pub async fn follow(&self, wrappers: &[Arc<dyn KeyWrapper>]) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        let (table, _) = self.table().await?;
        let in_force = self.vault.ring();
        if !slots::authentic(&table, &state.root) {
            let opened = slots::open_any(&table, wrappers, self.vault.node_id()).await;
            let (root, opened_by) = opened.map_err(|error| match error {
                OpenError::SlotsChanged { .. } => {
                    Error::data_loss("the slot table does not authenticate")
                }
                error => Error::unavailable(format!(
                    "the root key was rotated by another node, and no slot opens here: {error}"
                )),
            })?;
            state.root = root;
            state.candidate = None;
            *self.opened_by.lock() = opened_by;
        }
        let ring = Ring::open(&state.root, &table.ring)
            .map_err(|e| Error::data_loss(format!("the ring of storage keys: {e}")))?;
        if ring.node_id() != self.vault.node_id() || ring.primary_epoch() < in_force.primary_epoch()
        {
            return Err(Error::data_loss("the ring of storage keys is an earlier one, or foreign"));
        }
        if ring.epochs() != in_force.epochs() {
            self.vault.follow_ring(ring);
            self.wake.notify_one();
        }
        // A table from an older copy of the store does not match the canary, unless both are.
        let canary = self.vault.get::<CanaryRecord>(meta::CANARY).await?;
        let canary = canary.map(|c| c.record).unwrap_or_default();
        let (now, _) = self.table().await?;
        if now.generation == table.generation
            && (canary.slots_generation != table.generation || canary.slots_mac != table.mac)
        {
            // Unless yet another change came in between.
            let (again, _) = self.table().await?;
            if again.generation == table.generation {
                return Err(Error::data_loss("the slot table is not the one the canary names"));
            }
        }
        Ok(())
    }
}
