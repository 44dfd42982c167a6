//! What the node measures of itself: requests, and the process they run in.

pub mod calls;
pub mod family;
pub mod histogram;
pub mod port;

use std::collections::VecDeque;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::time::ClockId;

/// How far back rates and averages look.
pub const WINDOW: Duration = Duration::from_secs(60);
/// The shortest time between two samples.
const STEP: Duration = Duration::from_secs(1);

/// The sums at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    requests: u64,
    errors: u64,
    micros: u64,
    cpu: Duration,
}

/// Counts requests and what became of them. Recording is three additions.
#[derive(Debug)]
pub struct RequestMetrics {
    requests: AtomicU64,
    errors: AtomicU64,
    micros: AtomicU64,
    /// Memory in use at the last sample, as the bits of a percentage: reading it takes longer than a request.
    memory: AtomicU64,
    samples: Mutex<VecDeque<Sample>>,
}

/// Figures over the last [`WINDOW`], or since the start if that is shorter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Requests answered since the start.
    pub requests: u64,
    /// Of them, the node's own failures.
    pub errors: u64,
    /// Requests a second.
    pub per_second: f64,
    /// Share of requests that failed by the node's fault, 0 to 100.
    pub error_percent: f64,
    /// Mean time to answer a request, in milliseconds.
    pub mean_ms: f64,
    /// Processor time this process took, of all cores, 0 to 100.
    pub cpu_percent: f64,
    /// Resident memory of this process, of all memory, 0 to 100; 0 where the system does not tell.
    pub memory_percent: f64,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        Self::starting(Instant::now(), process_time())
    }
}

impl RequestMetrics {
    fn starting(at: Instant, cpu: Duration) -> Self {
        let zero = AtomicU64::default;
        let first = Sample { at, requests: 0, errors: 0, micros: 0, cpu };
        let samples = Mutex::new(VecDeque::from([first]));
        let memory = AtomicU64::new(memory_percent().unwrap_or(0.0).to_bits());
        Self { requests: zero(), errors: zero(), micros: zero(), memory, samples }
    }

    /// Counts a request that was answered after `took`. `failed`: by the node's own fault, not by a
    /// refusal of what was asked.
    pub fn record(&self, took: Duration, failed: bool) {
        self.requests.fetch_add(1, Relaxed);
        self.errors.fetch_add(u64::from(failed), Relaxed);
        self.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Requests answered since the start.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Remembers the sums as they are; to be called about once a second.
    pub fn sample(&self) {
        self.memory.store(memory_percent().unwrap_or(0.0).to_bits(), Relaxed);
        self.sample_at(Instant::now(), process_time());
    }

    fn now(&self, at: Instant, cpu: Duration) -> Sample {
        Sample {
            at,
            requests: self.requests.load(Relaxed),
            errors: self.errors.load(Relaxed),
            micros: self.micros.load(Relaxed),
            cpu,
        }
    }

    fn sample_at(&self, at: Instant, cpu: Duration) {
        let mut samples = self.samples.lock();
        if samples.back().is_some_and(|last| at.duration_since(last.at) < STEP / 2) {
            return;
        }
        samples.push_back(self.now(at, cpu));
        // The oldest one kept is the last that is at least a window old.
        while samples.get(1).is_some_and(|next| at.duration_since(next.at) >= WINDOW) {
            samples.pop_front();
        }
    }

    /// The figures now.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let mut figures = self.figures_at(Instant::now(), process_time());
        figures.memory_percent = f64::from_bits(self.memory.load(Relaxed));
        figures
    }

    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    fn figures_at(&self, at: Instant, cpu: Duration) -> Figures {
        let now = self.now(at, cpu);
        let then = {
            let samples = self.samples.lock();
            let inside = samples.iter().find(|s| at.duration_since(s.at) <= WINDOW + STEP);
            inside.or(samples.back()).copied().unwrap_or(now)
        };
        let seconds = at.duration_since(then.at).as_secs_f64();
        let requests = now.requests.saturating_sub(then.requests) as f64;
        let errors = now.errors.saturating_sub(then.errors) as f64;
        let micros = now.micros.saturating_sub(then.micros) as f64;
        let of = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let cores = cores() as f64;
        let busy = now.cpu.saturating_sub(then.cpu).as_secs_f64();
        Figures {
            requests: now.requests,
            errors: now.errors,
            per_second: of(requests, seconds),
            error_percent: (100.0 * of(errors, requests)).min(100.0),
            mean_ms: of(micros, requests) / 1000.0,
            cpu_percent: (100.0 * of(busy, seconds * cores)).clamp(0.0, 100.0),
            memory_percent: 0.0,
        }
    }
}

/// The cores of this process, asked for once: the system answers from files.
fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Processor time of this process since its start.
pub(crate) fn process_time() -> Duration {
    let time = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Resident memory of this process in bytes, where the system tells.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

/// Open file descriptors of this process, where the system tells.
#[must_use]
pub fn open_descriptors() -> Option<u64> {
    let entries = std::fs::read_dir("/proc/self/fd").ok()?;
    // The one that reads the directory is among them.
    u64::try_from(entries.count().saturating_sub(1)).ok()
}

/// Threads of this process, where the system tells.
#[must_use]
pub fn threads() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    text.lines().find_map(|line| line.strip_prefix("Threads:"))?.trim().parse().ok()
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn memory_percent() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let total: u64 = total.split_whitespace().next()?.parse().ok()?;
    let total = total.checked_mul(1024).filter(|total| *total > 0)?;
    Some((100.0 * resident_bytes()? as f64 / total as f64).min(100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_cover_the_window_and_no_more() {
        let start = Instant::now();
        let metrics = RequestMetrics::starting(start, Duration::ZERO);
        let second = |n: u64| start + Duration::from_secs(n);
        // 100 slow failures long ago, then 10 good ones a second for more than a window.
        for _ in 0..100 {
            metrics.record(Duration::from_secs(1), true);
        }
        let early = metrics.figures_at(second(2), Duration::ZERO);
        assert_eq!((early.requests, early.errors), (100, 100));
        assert!((early.per_second - 50.0).abs() < 1e-9);
        assert!((early.error_percent - 100.0).abs() < 1e-9);
        assert!((early.mean_ms - 1000.0).abs() < 1e-9);
        for n in 1..=120 {
            metrics.sample_at(second(n), Duration::from_millis(n * 10));
            for _ in 0..10 {
                metrics.record(Duration::from_millis(2), false);
            }
        }
        let figures = metrics.figures_at(second(121), Duration::from_millis(1210));
        assert_eq!(figures.requests, 1300);
        assert!((figures.per_second - 10.0).abs() < 1.0, "{figures:?}");
        assert!(figures.error_percent.abs() < 1e-9, "{figures:?}");
        assert!((figures.mean_ms - 2.0).abs() < 1e-9, "{figures:?}");
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        assert!((figures.cpu_percent - 1.0 / cores).abs() < 1e-6, "{figures:?}");
        assert!(metrics.samples.lock().len() <= 62);
    }

    #[test]
    fn nothing_is_invented_before_the_first_request() {
        let metrics = RequestMetrics::starting(Instant::now(), Duration::ZERO);
        let figures = metrics.figures_at(Instant::now(), Duration::ZERO);
        assert_eq!(figures, Figures::default());
    }

    #[test]
    fn an_idle_stretch_without_samples_does_not_revive_old_figures() {
        let start = Instant::now();
        let metrics = RequestMetrics::starting(start, Duration::ZERO);
        metrics.record(Duration::from_secs(1), true);
        metrics.sample_at(start + Duration::from_secs(1), Duration::ZERO);
        let later = metrics.figures_at(start + Duration::from_secs(500), Duration::ZERO);
        assert!(later.error_percent.abs() < 1e-9 && later.mean_ms.abs() < 1e-9, "{later:?}");
    }

    #[test]
    fn the_process_is_measured() {
        assert!(resident_bytes().unwrap() > 1 << 20);
        assert!(open_descriptors().unwrap() >= 3 && threads().unwrap() >= 1);
        let figures = RequestMetrics::default().figures();
        assert!(figures.memory_percent > 0.0 && figures.memory_percent <= 100.0);
        assert!(process_time() > Duration::ZERO);
    }
}
