//! Figures of the writer.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::metrics::histogram::{Distribution, Histogram};

/// Figures of the writer, for health and metrics.
#[derive(Debug)]
pub struct Metrics {
    groups: AtomicU64,
    commits: AtomicU64,
    failed: AtomicU64,
    latency: Histogram,
    sizes: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let zero = AtomicU64::default;
        let (latency, sizes) = (Histogram::of_time(), Histogram::of_groups());
        Self { groups: zero(), commits: zero(), failed: zero(), latency, sizes }
    }
}

impl Metrics {
    pub(super) fn group(&self, commits: usize, took: std::time::Duration) {
        self.latency.took(took);
        self.sizes.record(commits as u64);
        self.groups.fetch_add(1, Ordering::Relaxed);
        self.commits.fetch_add(commits as u64, Ordering::Relaxed);
    }
    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }
    /// (groups, commits in them, failed groups) since the start.
    #[must_use]
    pub fn read(&self) -> (u64, u64, u64) {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (load(&self.groups), load(&self.commits), load(&self.failed))
    }
    /// How long the store took for each group, and how many commits were in it.
    #[must_use]
    pub fn distributions(&self) -> (Distribution, Distribution) {
        (self.latency.read(), self.sizes.read())
    }
}
