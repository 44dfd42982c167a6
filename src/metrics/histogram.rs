//! How often something took how long, or was how large: counts in buckets whose bounds never change.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds for the time of a request or a commit, in nanoseconds: 100 µs to 60 s.
pub const LATENCY: &[u64] = &[
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    60_000_000_000,
];

/// Upper bounds for how many commits are in a group.
pub const GROUP: &[u64] = &[1, 2, 4, 8, 16, 32, 64, 128, 256];

/// A live histogram. Recording is three relaxed additions and a search among the bounds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One more than there are bounds: what is larger than all of them comes last.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
    /// What one of its units is in those that are shown.
    unit: f64,
}

/// A histogram at one moment, in the units that are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Upper bounds, ascending, each of them inside its bucket.
    pub bounds: Vec<f64>,
    /// How much is in each bucket, one more than there are bounds. Not cumulative.
    pub counts: Vec<u64>,
    /// Of all values.
    pub sum: f64,
}

impl Distribution {
    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

impl Histogram {
    /// Of times, shown in seconds.
    #[must_use]
    pub fn of_time() -> Self {
        Self::new(LATENCY, 1e-9)
    }

    /// Of how many commits are in a group.
    #[must_use]
    pub fn of_groups() -> Self {
        Self::new(GROUP, 1.0)
    }

    fn new(bounds: &'static [u64], unit: f64) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0), unit }
    }

    /// Counts one value, in the units of the bounds.
    pub fn record(&self, value: u64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get(at) {
            count.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(value, Relaxed);
    }

    /// Counts one time.
    pub fn took(&self, time: Duration) {
        self.record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// What it holds now. Each figure is exact, together they are not one instant.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn read(&self) -> Distribution {
        Distribution {
            bounds: self.bounds.iter().map(|bound| *bound as f64 * self.unit).collect(),
            counts: self.counts.iter().map(|count| count.load(Relaxed)).collect(),
            sum: self.sum.load(Relaxed) as f64 * self.unit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::of_groups();
        [0, 1, 2, 3, 256, 257, u64::from(u32::MAX)].iter().for_each(|n| histogram.record(*n));
        let seen = histogram.read();
        assert_eq!(seen.counts, [2, 1, 1, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(seen.count(), 7);
        let times = Histogram::of_time();
        times.took(Duration::from_millis(1));
        times.took(Duration::from_secs(3600));
        let seen = times.read();
        assert_eq!((seen.counts[3], seen.counts[LATENCY.len()]), (1, 1));
        assert!((seen.sum - 3600.001).abs() < 1e-6 && (seen.bounds[3] - 0.001).abs() < 1e-12);
        assert!(LATENCY.is_sorted() && GROUP.is_sorted());
    }
}
