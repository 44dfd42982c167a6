//! Traces, figures and log lines to an OpenTelemetry collector (OTLP), when one is configured.
//!
//! ```text
//! request ─ span ─▶ bounded queue ─▶ batch ─▶ sender ─▶ collector
//! log line ───────▶ bounded queue ─▶ batch ─▶ sender ─▶
//! every interval: the figures of `GET /metrics` ────▶
//! ```
//! Each signal has a task, a queue and a connection of its own. Nobody ever waits for one of them: what
//! finds no room is counted and gone, as is what a collector will never take. While it is away one batch
//! of each signal is kept and tried again; that is said once in the log, and once when it is back.
//!
//! The messages are those of `opentelemetry-proto`. The SDK is not used: its figures cannot be made of
//! counters that exist, so that each request would be counted twice, under its locks; and it does not
//! tell what it drops.

pub mod encode;
pub mod send;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::HeaderMap;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::lines::{self, Line};
use super::trace::{self, About, Running, Sampler, Span};
use crate::config::telemetry::Telemetry as Settings;
use crate::metrics::family::Figures;
use crate::metrics::port::Gather;
use encode::Source;
use send::{Batch, Refusal, Sender};

/// Spans, or lines, that wait; and how many go at once.
const QUEUE: usize = 4096;
const BATCH: usize = 512;
/// How long the first of a batch waits for others.
const LINGER: Duration = Duration::from_secs(1);
/// Between two tries: the first pause, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// For what is left when the node stops.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    const ALL: [Self; 3] = [Self::Traces, Self::Metrics, Self::Logs];

    const fn name(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
        }
    }
}

/// What became of one signal's batches.
#[derive(Debug, Default)]
struct Fate {
    exported: AtomicU64,
    failed: AtomicU64,
    /// Spans, lines or figures, not batches.
    dropped: Arc<AtomicU64>,
}

/// What became of everything, for as long as the node runs.
#[derive(Debug, Default)]
struct Fates {
    each: [Fate; 3],
    /// A bit for each signal that is not taken just now.
    failing: AtomicU8,
}

impl Fates {
    fn of(&self, signal: Signal) -> &Fate {
        let [traces, metrics, logs] = &self.each;
        match signal {
            Signal::Traces => traces,
            Signal::Metrics => metrics,
            Signal::Logs => logs,
        }
    }

    fn taken(&self, signal: Signal, rejected: u64) {
        let fate = self.of(signal);
        fate.exported.fetch_add(1, Relaxed);
        fate.dropped.fetch_add(rejected, Relaxed);
        let bit = 1 << signal as u8;
        let before = self.failing.fetch_and(!bit, Relaxed);
        if before != 0 && before & !bit == 0 {
            tracing::info!("the collector takes telemetry again");
        }
    }

    /// Said once for all signals, until all of them are taken again.
    fn failed(&self, signal: Signal, why: &str) {
        self.of(signal).failed.fetch_add(1, Relaxed);
        let before = self.failing.fetch_or(1 << signal as u8, Relaxed);
        if before == 0 {
            tracing::warn!(
                signal = signal.name(),
                why,
                "the collector does not take telemetry: what finds no room until it does is dropped and counted"
            );
        }
    }
}

/// The tasks that lead to one collector.
struct Exporter {
    settings: Settings,
    sampler: Option<Sampler>,
    spans: Option<mpsc::Sender<Span>>,
    lines: Option<Arc<lines::Outlet>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Where telemetry goes, if anywhere; it can be led elsewhere while the node runs.
pub struct Telemetry {
    source: Source,
    fates: Arc<Fates>,
    current: ArcSwapOption<Exporter>,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let current = self.current.load();
        let endpoint = current.as_ref().map(|exporter| &exporter.settings.collector.endpoint);
        f.debug_struct("Telemetry").field("endpoint", &endpoint).finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Nowhere yet.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self { source, fates: Arc::default(), current: ArcSwapOption::empty() }
    }

    /// Leads everything to a collector from now on, or nowhere. What waited for the one before is sent
    /// there still, for two seconds.
    pub fn lead_to(&self, to: Option<(Settings, Sender)>, gather: &Gather) {
        let next = to.map(|(settings, sender)| self.start(settings, &sender, gather));
        let lines = next.as_ref().and_then(|next| next.lines.clone());
        let before = self.current.swap(next.map(Arc::new));
        // The log is the process's: who never had it does not take it from another.
        if lines.is_some() || before.as_ref().is_some_and(|before| before.lines.is_some()) {
            lines::lead_to(lines);
        }
        if let Some(before) = before {
            tokio::spawn(async move { before.end().await });
        }
    }

    fn start(&self, settings: Settings, sender: &Sender, gather: &Gather) -> Exporter {
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let line = |signal| Pipe {
            signal,
            sender: sender.clone(),
            source: self.source.clone(),
            fates: Arc::clone(&self.fates),
            stop: stop.clone(),
        };
        let dropped = |signal| Arc::clone(&self.fates.of(signal).dropped);
        let mut exporter = Exporter {
            sampler: None,
            spans: None,
            lines: None,
            stop: stop.clone(),
            tasks: tasks.clone(),
            settings,
        };
        let signals = exporter.settings.signals;
        if signals.traces {
            let (queue, spans) = mpsc::channel(QUEUE);
            let encode = |source: &Source, spans: &[Span]| Batch::Traces(source.traces(spans));
            tasks.spawn(line(Signal::Traces).queued(spans, encode));
            exporter.spans = Some(queue.clone());
            let outlet = trace::Outlet { queue, dropped: dropped(Signal::Traces) };
            exporter.sampler = Some(Sampler::new(exporter.settings.sample, outlet));
        }
        if signals.logs {
            let (queue, lines) = mpsc::channel(QUEUE);
            let encode = |source: &Source, lines: &[Line]| Batch::Logs(source.lines(lines));
            tasks.spawn(line(Signal::Logs).queued(lines, encode));
            exporter.lines =
                Some(Arc::new(lines::Outlet { queue, dropped: dropped(Signal::Logs) }));
        }
        if signals.metrics {
            let (interval, gather) = (exporter.settings.interval, Arc::clone(gather));
            tasks.spawn(line(Signal::Metrics).regularly(interval, gather));
        }
        tasks.close();
        exporter
    }

    /// Sends what is left, for two seconds at most, and no more after that.
    pub async fn end(&self) {
        let before = self.current.swap(None);
        if let Some(before) = before {
            if before.lines.is_some() {
                lines::lead_to(None);
            }
            before.end().await;
        }
    }

    /// The span of a request, if it is traced.
    #[must_use]
    pub fn begin(&self, headers: &HeaderMap, about: impl FnOnce() -> About) -> Option<Running> {
        let current = self.current.load();
        current.as_ref()?.sampler.as_ref()?.begin(headers, about)
    }

    /// What became of what was sent. No figures where nothing ever was.
    pub fn gather(&self, all: &mut Figures) {
        let current = self.current.load();
        let used = |fate: &Fate| {
            [&fate.exported, &fate.failed, &*fate.dropped].iter().any(|n| n.load(Relaxed) > 0)
        };
        let ever = current.is_some() || self.fates.each.iter().any(used);
        let signals = Signal::ALL.into_iter().filter(|_| ever);
        let mut exports = all.counter(
            "polykey_telemetry_exports_total",
            "Batches that went to the collector, by whether it took them.",
        );
        for signal in signals.clone() {
            let (fate, word) = (self.fates.of(signal), ("signal", signal.name()));
            exports.at([word, ("result", "taken")], fate.exported.load(Relaxed));
            exports.at([word, ("result", "failed")], fate.failed.load(Relaxed));
        }
        let mut dropped = all.counter(
            "polykey_telemetry_dropped_total",
            "Spans, log lines and figures that never reached the collector.",
        );
        for signal in signals {
            let count = self.fates.of(signal).dropped.load(Relaxed);
            dropped.at([("signal", signal.name())], count);
        }
        let mut waiting =
            all.gauge("polykey_telemetry_queue_depth", "Spans and log lines that wait.");
        if let Some(queue) = current.as_ref().and_then(|exporter| exporter.spans.as_ref()) {
            waiting.at([("signal", "traces")], queue.max_capacity() - queue.capacity());
        }
        if let Some(lines) = current.as_ref().and_then(|exporter| exporter.lines.as_ref()) {
            let queue = &lines.queue;
            waiting.at([("signal", "logs")], queue.max_capacity() - queue.capacity());
        }
    }
}

impl Exporter {
    async fn end(&self) {
        self.stop.cancel();
        if tokio::time::timeout(LAST_WORDS, self.tasks.wait()).await.is_err() {
            tracing::debug!("the collector did not take the last telemetry in time");
        }
    }
}

/// One signal's way to the collector.
struct Pipe {
    signal: Signal,
    sender: Sender,
    source: Source,
    fates: Arc<Fates>,
    stop: CancellationToken,
}

impl Pipe {
    /// Sends what comes in batches, until the stop and the queue is empty.
    async fn queued<T>(
        mut self,
        mut queue: mpsc::Receiver<T>,
        encode: impl Fn(&Source, &[T]) -> Batch + Send,
    ) where
        T: Send + Sync,
    {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            batch.clear();
            let stopping = tokio::select! {
                // What waits goes first.
                biased;
                count = queue.recv_many(&mut batch, BATCH) => count == 0,
                () = self.stop.cancelled() => true,
            };
            if stopping {
                return;
            }
            let full = Instant::now() + LINGER;
            while batch.len() < BATCH {
                let room = BATCH - batch.len();
                tokio::select! {
                    biased;
                    count = queue.recv_many(&mut batch, room) => if count == 0 { break },
                    () = self.stop.cancelled() => break,
                    () = tokio::time::sleep_until(full) => break,
                }
            }
            let encoded = encode(&self.source, &batch);
            if !self.deliver(&encoded, batch.len() as u64, true).await {
                return;
            }
        }
    }

    /// Sends the figures, each time as they are then, until the stop; and once more then.
    async fn regularly(mut self, interval: Duration, gather: Gather) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let stopping = tokio::select! {
                _ = ticks.tick() => false,
                () = self.stop.cancelled() => true,
            };
            let Some(figures) = gather() else { return };
            let count = figures.0.iter().map(|family| family.points.len() as u64).sum();
            let batch = Batch::Metrics(self.source.figures(&figures));
            // Old figures are of no use: the next ones say more.
            let goes_on = self.deliver(&batch, count, false).await;
            if stopping || !goes_on {
                return;
            }
        }
    }

    /// Sends one batch, again and again if that may help. False: the end has come meanwhile.
    async fn deliver(&mut self, batch: &Batch, count: u64, again: bool) -> bool {
        let mut pause = PAUSE;
        loop {
            let why = match self.sender.send(batch).await {
                Ok(rejected) => {
                    self.fates.taken(self.signal, rejected);
                    return true;
                }
                Err(Refusal::Later(why, wait)) if again && !self.stop.is_cancelled() => {
                    pause = pause.max(wait.unwrap_or_default()).min(LONGEST_PAUSE);
                    why
                }
                Err(Refusal::Later(why, _) | Refusal::Never(why)) => {
                    self.fates.failed(self.signal, &why);
                    self.fates.of(self.signal).dropped.fetch_add(count, Relaxed);
                    return !(again && self.stop.is_cancelled());
                }
            };
            self.fates.failed(self.signal, &why);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // One more try, the last.
                () = self.stop.cancelled() => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}
