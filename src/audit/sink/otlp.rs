//! A copy of the log at an OpenTelemetry collector: each line is a log record, with the leaf's index as an
//! attribute.
//!
//! A collector acknowledges what it has taken, so what was not acknowledged is sent again, and some of it may
//! come twice. What it says it has rejected of a batch is not sent again, as the OTLP specification demands
//! ("Partial Success"): it is told in the log, and the leaves are in the store. A batch that it refuses for
//! good is not dropped as telemetry would be, but tried again after a while: a copy of the log has no gaps.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::place::{Cursor, Place};
use super::{Batch, Record, What};
use crate::telemetry::otlp::encode::Source;
use crate::telemetry::otlp::send::{self, Refusal, Sender};
use crate::time::Time;

/// Bytes of lines in one request; collectors take 4 MiB, and a block of events may have one by itself.
const REQUEST: usize = 1024 * 1024;
/// How often it is kept how far the sink has come.
const SAVE: Duration = Duration::from_secs(1);
/// The longest pause before the next try, unless the collector asks for more.
const PAUSE: Duration = Duration::from_millis(1600);
/// The longest that it may ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Before what was refused for good is tried again.
const REFUSED: Duration = Duration::from_secs(30);

pub(super) struct Outlet {
    /// For messages.
    at: String,
    sender: Option<Sender>,
    source: Source,
    /// Where `place` is kept.
    saved: PathBuf,
    place: Place,
    kept: Place,
    kept_at: Instant,
    /// Nothing is sent before.
    rests: Option<(Instant, String)>,
    pause: Duration,
}

impl Outlet {
    pub(super) fn new(
        at: String,
        sender: Option<Sender>,
        source: Source,
        place: Place,
        saved: PathBuf,
    ) -> Self {
        let (kept, kept_at) = (place.clone(), Instant::now());
        let pause = Duration::ZERO;
        Self { at, sender, source, saved, place, kept, kept_at, rests: None, pause }
    }

    pub(super) fn next(&self) -> Cursor {
        self.place.next
    }

    pub(super) async fn put(&mut self, batch: Batch) -> Result<(), String> {
        if let Some((until, why)) = &self.rests
            && Instant::now() < *until
            && !batch.flush
        {
            return Err(why.clone());
        }
        self.rests = None;
        if !batch.records.is_empty() && batch.from == self.place.next {
            let mut rest = batch.records.as_slice();
            while !rest.is_empty() {
                let (some, others) = rest.split_at(fitting(rest));
                self.send(some).await?;
                rest = others;
            }
            self.place.advance(batch.next, batch.last);
        }
        if self.place != self.kept && (batch.flush || self.kept_at.elapsed() >= SAVE) {
            let (place, path) = (self.place.clone(), self.saved.clone());
            let saved = tokio::task::spawn_blocking(move || place.save(&path)).await;
            saved.map_err(|error| error.to_string())??;
            self.kept = self.place.clone();
            self.kept_at = Instant::now();
        }
        Ok(())
    }

    async fn send(&mut self, records: &[Record]) -> Result<(), String> {
        let Some(sender) = &mut self.sender else {
            return Err(format!("{} has no way to it, which is a bug", self.at));
        };
        let record = |record: &Record| (since_epoch(record.time), numbers(record.what));
        let lines: Vec<_> =
            records.iter().map(|r| (record(r), String::from_utf8_lossy(&r.line))).collect();
        let records = lines.iter().map(|((time, numbers), line)| (*time, &**line, numbers.clone()));
        let request = send::Batch::Logs(self.source.audit(records));
        let (why, wait) = match sender.send(&request).await {
            Ok(rejected) => {
                self.pause = Duration::ZERO;
                if rejected > 0 {
                    let (sink, of) = (self.at.as_str(), lines.len());
                    tracing::warn!(
                        sink,
                        rejected,
                        of,
                        "a collector has rejected records of the audit log, which it does not get again"
                    );
                }
                return Ok(());
            }
            Err(Refusal::Later(why, wait)) => {
                self.pause = (self.pause * 2).clamp(Duration::from_millis(200), PAUSE);
                let wait = self.pause.max(wait.unwrap_or_default()).min(LONGEST_PAUSE);
                (why, wait)
            }
            Err(Refusal::Never(why)) => (format!("refused for good: {why}"), REFUSED),
        };
        let why = format!("{} takes nothing: {why}", self.at);
        self.rests = Some((Instant::now() + wait, why.clone()));
        Err(why)
    }
}

/// How many of the records go into one request: at least one.
fn fitting(records: &[Record]) -> usize {
    let mut bytes = 0;
    let fit = records.iter().take_while(|record| {
        bytes += record.line.len();
        bytes <= REQUEST
    });
    fit.count().max(1)
}

fn since_epoch(time: Time) -> Duration {
    Duration::from_micros(u64::try_from(time.micros()).unwrap_or(0))
}

fn numbers(what: What) -> Vec<(&'static str, u64)> {
    match what {
        What::Leaf(leaf) => vec![("polykey.audit.leaf", leaf)],
        What::Event(leaf, position) => {
            vec![("polykey.audit.leaf", leaf), ("polykey.audit.position", u64::from(position))]
        }
        What::Checkpoint(size) => vec![("polykey.audit.checkpoint", size)],
    }
}
