//! What the process says of itself: one line an event, JSON or for people, to standard error.
//!
//! Nothing secret reaches a line because nothing secret implements `Display` or shows itself in
//! `Debug`; a panic is logged by its place alone, since its message may quote a value.

pub mod lines;
pub mod otlp;
pub mod trace;

use std::io;
use std::panic::PanicHookInfo;
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::{EnvFilter, ParseError};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{Log, LogFormat};
use crate::net::tls::TlsConfigError;

/// The environment variable that wins over the configured level: a level, or directives such as
/// `info,polykey::net=debug`.
pub const VARIABLE: &str = "POLYKEY_LOG";

/// The filter in force, once there is a log: that belongs to the process.
static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Why there is no log, or no way to a collector.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The variable cannot be understood.
    #[error(
        "{VARIABLE}: {0}; write a level such as `debug`, or directives such as `info,polykey::net=debug`"
    )]
    Directives(#[from] ParseError),
    /// It is not text.
    #[error("{VARIABLE}: not UTF-8 text; write a level such as `debug`")]
    NotText,
    /// The collector's authorities cannot be used.
    #[error("`ca` of a collector: {0}")]
    Authorities(#[from] TlsConfigError),
    /// The system knows no authorities.
    #[error("this system has no certificate authorities; name the collector's in `ca`")]
    NoAuthorities,
    /// Something else of the section cannot be used.
    #[error("`{what}` of a collector: {why}")]
    Unusable {
        /// Which setting.
        what: &'static str,
        /// What is wrong with it. No values.
        why: String,
    },
}

/// Which events are logged: `directives` if there are any, else those of `level` and above. What
/// libraries say of every frame and handshake shows only when directives ask for it.
fn filter(level: LevelFilter, directives: Option<&str>) -> Result<EnvFilter, TelemetryError> {
    match directives.map(str::trim).filter(|text| !text.is_empty()) {
        Some(text) => Ok(EnvFilter::builder().parse(text)?),
        None => {
            let libraries = level.min(LevelFilter::WARN);
            Ok(EnvFilter::builder().parse(format!("{libraries},polykey={level}"))?)
        }
    }
}

fn printed<W>(format: LogFormat, ansi: bool, writer: W) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Json => layer.json().flatten_event(true).with_ansi(false).boxed(),
        LogFormat::Pretty => layer.compact().with_ansi(ansi).boxed(),
    }
}

/// Starts logging, and logs panics from now on. A second call in one process only checks the
/// directives: the first one's log goes on.
///
/// # Errors
/// [`TelemetryError`] when [`VARIABLE`] cannot be understood.
pub fn start(log: &Log) -> Result<(), TelemetryError> {
    let filter = filter(log.level, directives()?.as_deref())?;
    let ansi = io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let (filter, handle) = reload::Layer::new(filter);
    // One filter for both ways out, so that a level that is off costs nothing.
    let both = printed(log.format, ansi, io::stderr).and_then(lines::Lines).with_filter(filter);
    if tracing::subscriber::set_global_default(Registry::default().with(both)).is_ok() {
        std::panic::set_hook(Box::new(on_panic));
        FILTER.get_or_init(|| handle);
    }
    Ok(())
}

fn directives() -> Result<Option<String>, TelemetryError> {
    match std::env::var(VARIABLE) {
        Ok(text) => Ok(Some(text)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(TelemetryError::NotText),
    }
}

/// Logs from this level on from now on, unless [`VARIABLE`] says otherwise. Nothing where no log was
/// started.
///
/// # Errors
/// [`TelemetryError`] when the variable cannot be understood, which the start has excluded.
pub fn set_level(level: LevelFilter) -> Result<(), TelemetryError> {
    let filter = filter(level, directives()?.as_deref())?;
    if let Some(handle) = FILTER.get() {
        // It fails only once the log is gone, with the process.
        let _ = handle.reload(filter);
    }
    Ok(())
}

/// Logs where it happened, not what was said.
fn on_panic(panic: &PanicHookInfo<'_>) {
    let place = panic.location().map(ToString::to_string);
    let thread = std::thread::current();
    tracing::error!(
        place = place.as_deref().unwrap_or("unknown"),
        thread = thread.name().unwrap_or("unnamed"),
        "a bug: this code panicked"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, level: LevelFilter, directives: Option<&str>) -> String {
        let memory = Memory::default();
        let writer = memory.clone();
        let layer = printed(format, false, move || writer.clone());
        let layer = layer.with_filter(filter(level, directives).unwrap());
        tracing::subscriber::with_default(Registry::default().with(layer), || {
            tracing::info!(target: "polykey::net", request_id = "r1", "served");
            tracing::info!(target: "h2::codec", "frame");
            tracing::debug!(target: "polykey::net", "detail");
        });
        let bytes = memory.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_are_json_objects() {
        let text = logged(LogFormat::Json, LevelFilter::INFO, None);
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
        assert_eq!(line["message"], "served");
        assert_eq!(line["request_id"], "r1");
        assert_eq!(line["level"], "INFO");
        assert!(line["timestamp"].is_string());
    }

    #[test]
    fn libraries_are_quiet_unless_asked() {
        let text = logged(LogFormat::Pretty, LevelFilter::TRACE, None);
        assert!(text.contains("served") && text.contains("detail") && !text.contains("frame"));
        let text = logged(LogFormat::Pretty, LevelFilter::ERROR, Some("h2=info"));
        assert!(text.contains("frame") && !text.contains("served"), "{text}");
        assert_eq!(logged(LogFormat::Json, LevelFilter::OFF, None), "");
    }

    #[test]
    fn directives_are_checked() {
        let error = filter(LevelFilter::INFO, Some("polykey=loud")).unwrap_err().to_string();
        assert!(error.contains(VARIABLE) && error.contains("debug"), "{error}");
    }

    #[test]
    fn a_panic_is_logged_without_its_message() {
        let memory = Memory::default();
        let writer = memory.clone();
        let layer = printed(LogFormat::Json, false, move || writer.clone());
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(on_panic));
        tracing::subscriber::with_default(Registry::default().with(layer), || {
            drop(std::panic::catch_unwind(|| panic!("CANARY-{}", 7)));
        });
        std::panic::set_hook(before);
        let text = String::from_utf8(memory.0.lock().clone()).unwrap();
        assert!(text.contains("telemetry.rs:") && !text.contains("CANARY"), "{text}");
    }
}
