//! Rows that were met and did not open: each is named in the log once, and health tells that there are some.
//!
//! Nothing of such a row is served, and nothing deletes it: whoever walks over many rows leaves it out
//! and goes on with the others, whoever needs this one is told of the loss.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use polykey_storage::RowKey;

use crate::error::Error;

/// Rows that are remembered; beyond them there is nothing new to tell.
pub(super) const MOST: usize = 1000;

#[derive(Debug, Default)]
pub(super) struct Damage(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    rows: BTreeSet<RowKey>,
    /// What a pass over every row has counted beyond them.
    beyond: u64,
}

impl Damage {
    /// A row did not open.
    pub(super) fn note(&self, row: RowKey, error: &Error) {
        let rows = &mut self.0.lock().rows;
        if rows.len() >= MOST || rows.contains(&row) {
            return;
        }
        let detail = error.internal_text().unwrap_or_default();
        tracing::error!(
            ?row,
            detail,
            "a stored row is damaged and is left out; `polykey store verify` counts all of them"
        );
        rows.insert(row);
    }

    /// What a pass over every row has found to be damaged: the first of them, at most [`MOST`], and
    /// how many there are.
    pub(super) fn settle(&self, rows: BTreeSet<RowKey>, count: u64) {
        let beyond = count.saturating_sub(rows.len() as u64);
        *self.0.lock() = Known { rows, beyond };
    }

    /// How many are known: all that the last pass over every row has found, and those met since while
    /// fewer than [`MOST`] are remembered.
    pub(super) fn count(&self) -> u64 {
        let known = self.0.lock();
        (known.rows.len() as u64).saturating_add(known.beyond)
    }
}
