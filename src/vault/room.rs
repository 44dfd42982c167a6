//! How much room there is on the disk under the store.

use std::sync::atomic::{AtomicU8, Ordering};

/// How much room there is for what is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Room {
    /// Enough.
    #[default]
    Enough,
    /// What is left is for the audit log and for what takes away.
    Short,
    /// Nothing is written any more, before the disk refuses it in the middle of a commit.
    None,
}

/// What was said last.
#[derive(Debug, Default)]
pub(super) struct Gauge(AtomicU8);

impl Gauge {
    pub(super) fn read(&self) -> Room {
        match self.0.load(Ordering::Relaxed) {
            0 => Room::Enough,
            1 => Room::Short,
            _ => Room::None,
        }
    }

    pub(super) fn set(&self, room: Room) {
        self.0.store(room as u8, Ordering::Relaxed);
    }
}
