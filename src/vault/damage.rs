//! Rows that were met and did not open: each is named in the log once, and health tells that there are some.
//!
//! Nothing of such a row is served, and nothing deletes it: whoever walks over many rows leaves it out
//! and goes on with the others, whoever needs this one is told of the loss.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use polykey_storage::RowKey;

use crate::error::Error;

/// Rows that are remembered; beyond them there is nothing new to tell.
const MOST: usize = 1000;

#[derive(Debug, Default)]
pub(super) struct Damage(Mutex<BTreeSet<RowKey>>);

impl Damage {
    /// A row did not open.
    pub(super) fn note(&self, row: RowKey, error: &Error) {
        let mut rows = self.0.lock();
        if rows.len() >= MOST || rows.contains(&row) {
            return;
        }
        let detail = error.internal_text().unwrap_or_default();
        tracing::error!(
            ?row,
            detail,
            "a stored row is damaged and is left out; `polykey store verify` names all of them"
        );
        rows.insert(row);
    }

    /// What a pass over every row has found to be damaged.
    pub(super) fn settle(&self, found: BTreeSet<RowKey>) {
        *self.0.lock() = found;
    }

    /// How many are known, at most 1,000.
    pub(super) fn count(&self) -> usize {
        self.0.lock().len()
    }
}
