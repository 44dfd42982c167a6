//! The lines of the log on their way to a collector.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use super::trace::{self, Ids};

/// Longest text of a field, in bytes, and most fields of a line.
const TEXT: usize = 1024;
const FIELDS: usize = 32;

/// What a field of a line is worth.
#[derive(Clone, Debug, PartialEq)]
pub enum Worth {
    /// Text, cut at 1,024 bytes.
    Text(String),
    /// A whole number.
    Whole(i64),
    /// Another number.
    Number(f64),
    /// Yes or no.
    Flag(bool),
}

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    /// Since the Unix epoch.
    pub at: Duration,
    /// How bad it is.
    pub level: Level,
    /// The module that says it.
    pub target: &'static str,
    /// What it says.
    pub message: String,
    /// Its fields, by their names in the code.
    pub fields: Vec<(&'static str, Worth)>,
    /// The span in which it was said.
    pub ids: Option<Ids>,
}

/// Where lines go: a bounded queue that never makes anybody wait.
#[derive(Debug)]
pub struct Outlet {
    /// The queue.
    pub queue: mpsc::Sender<Line>,
    /// Lines for which there was no room.
    pub dropped: Arc<AtomicU64>,
}

/// The outlet in force. The log belongs to the process, and so does this.
static OUTLET: ArcSwapOption<Outlet> = ArcSwapOption::const_empty();

/// Sends lines there from now on, or nowhere.
pub fn lead_to(outlet: Option<Arc<Outlet>>) {
    OUTLET.store(outlet);
}

/// Takes lines to the outlet in force.
#[derive(Clone, Copy, Debug)]
pub struct Lines;

/// Whether lines of a module are sent: ours, and of ours not those about the sending, which would feed
/// on themselves.
fn sent(target: &str) -> bool {
    target.starts_with("polykey") && !target.starts_with("polykey::telemetry")
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let outlet = OUTLET.load();
        let Some(outlet) = &*outlet else { return };
        let metadata = event.metadata();
        if !sent(metadata.target()) {
            return;
        }
        let mut line = Line {
            at: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            level: *metadata.level(),
            target: metadata.target(),
            message: String::new(),
            fields: Vec::new(),
            ids: trace::here(),
        };
        event.record(&mut line);
        if outlet.queue.try_send(line).is_err() {
            outlet.dropped.fetch_add(1, Relaxed);
        }
    }
}

fn cut(mut text: String) -> String {
    if text.len() > TEXT {
        let end = (0..=TEXT).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

impl Line {
    fn put(&mut self, field: &Field, worth: Worth) {
        match worth {
            Worth::Text(text) if field.name() == "message" => self.message = text,
            worth if self.fields.len() < FIELDS => self.fields.push((field.name(), worth)),
            _ => {}
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field, Worth::Text(cut(format!("{value:?}"))));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Worth::Text(cut(value.to_owned())));
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, Worth::Whole(value));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, Worth::Whole(i64::try_from(value).unwrap_or(i64::MAX)));
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, Worth::Number(value));
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, Worth::Flag(value));
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::Registry;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn a_line_has_its_fields_and_none_is_about_the_sending() {
        let (queue, mut lines) = mpsc::channel(2);
        let dropped = Arc::new(AtomicU64::new(0));
        lead_to(Some(Arc::new(Outlet { queue, dropped: Arc::clone(&dropped) })));
        tracing::subscriber::with_default(Registry::default().with(Lines), || {
            tracing::warn!(target: "h2::codec", "frame");
            tracing::warn!(target: "polykey::telemetry::otlp", "away");
            let long = "ä".repeat(TEXT);
            tracing::warn!(target: "polykey::net", count = 3u64, ok = true, long, "said {}", 1);
            tracing::info!(target: "polykey::net", "second");
            tracing::info!(target: "polykey::net", "third");
        });
        lead_to(None);
        let line = lines.try_recv().unwrap();
        assert_eq!(
            (line.level, line.target, line.message.as_str()),
            (Level::WARN, "polykey::net", "said 1")
        );
        assert_eq!(line.fields[..2], [("count", Worth::Whole(3)), ("ok", Worth::Flag(true))]);
        assert!(matches!(&line.fields[2].1, Worth::Text(text) if text.len() == TEXT));
        assert_eq!(lines.try_recv().unwrap().message, "second");
        assert!(lines.try_recv().is_err() && dropped.load(Relaxed) == 1);
    }
}
