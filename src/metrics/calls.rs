//! Requests by face and method: how many ended with which code, how long they took, how many run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use tonic::Code;

use super::family::Figures;
use super::histogram::Histogram;

/// The codes of gRPC, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Service and method of whatever is not in the table.
const OTHER: &str = "other";

/// By which way a request came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Face {
    /// gRPC over mutual TLS.
    Grpc,
}

/// All faces, in their order.
const FACES: [Face; 1] = [Face::Grpc];

impl Face {
    /// Its word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
        }
    }
}

#[derive(Debug)]
struct Method {
    codes: [AtomicU64; CODES.len()],
    latency: Histogram,
    running: AtomicU64,
}

impl Method {
    fn new() -> Self {
        let codes = std::array::from_fn(|_| AtomicU64::new(0));
        Self { codes, latency: Histogram::of_time(), running: AtomicU64::new(0) }
    }
}

/// The table of all methods.
#[derive(Debug)]
pub struct Calls {
    /// `/service/Method`, ascending, and whether its calls are streams.
    paths: Vec<(&'static str, bool)>,
    /// For each face one for each path, and one for what is none of them.
    methods: Vec<Method>,
}

/// The code of a header or trailer of gRPC.
#[must_use]
pub fn code(headers: &http::HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

/// The word of a code.
#[must_use]
pub fn word(code: Code) -> &'static str {
    let at = usize::try_from(code as i32).unwrap_or(2);
    CODES.get(at).copied().unwrap_or("UNKNOWN")
}

impl Calls {
    /// Nothing counted yet, of these paths (`/service/Method`), each with whether it is a stream.
    #[must_use]
    pub fn new(paths: impl IntoIterator<Item = (&'static str, bool)>) -> Self {
        let mut paths: Vec<_> = paths.into_iter().collect();
        paths.sort_unstable();
        let methods = FACES.iter().flat_map(|_| (0..=paths.len()).map(|_| Method::new())).collect();
        Self { paths, methods }
    }

    /// A request begins.
    #[must_use]
    pub fn begin(self: &Arc<Self>, face: Face, path: &str) -> Call {
        let at = self.paths.binary_search_by(|(known, _)| (*known).cmp(path));
        let at = at.unwrap_or(self.paths.len());
        let lasts = self.paths.get(at).is_some_and(|(_, lasts)| *lasts);
        let at = face as usize * (self.paths.len() + 1) + at;
        if let Some(method) = self.methods.get(at) {
            method.running.fetch_add(1, Relaxed);
        }
        Call { calls: Arc::clone(self), at, lasts, began: Instant::now(), code: None }
    }

    /// Puts all of it into `figures`. Methods that were never called are left out.
    pub fn gather(&self, figures: &mut Figures) {
        let named = || {
            let rows = self.methods.chunks(self.paths.len() + 1).zip(FACES);
            rows.flat_map(|(methods, face)| {
                let paths = self.paths.iter().map(|(path, _)| *path).chain(["/other/other"]);
                methods.iter().zip(paths).map(move |(method, path)| {
                    let name = path.trim_start_matches('/');
                    let (service, name) = name.split_once('/').unwrap_or((OTHER, OTHER));
                    (method, [("face", face.name()), ("service", service), ("method", name)])
                })
            })
        };
        let mut all =
            figures.counter("polykey_requests_total", "Requests that have ended, by code of gRPC.");
        for (method, [face, service, name]) in named() {
            for (count, code) in method.codes.iter().zip(CODES) {
                let count = count.load(Relaxed);
                if count > 0 {
                    all.at([face, service, name, ("code", code)], count);
                }
            }
        }
        let mut latency = figures.histogram(
            "polykey_request_duration_seconds",
            "Time from the head of a request to the head of its answer; of a stream, to its end.",
        );
        for (method, labels) in named() {
            let seen = method.latency.read();
            if seen.count() > 0 {
                latency.at(labels, seen);
            }
        }
        let mut running =
            figures.gauge("polykey_requests_in_flight", "Requests that have not ended.");
        for (method, labels) in named() {
            let now = method.running.load(Relaxed);
            if now > 0 || method.codes.iter().any(|count| count.load(Relaxed) > 0) {
                running.at(labels, now);
            }
        }
    }
}

/// A request in flight. Dropped before it has ended it counts as cancelled, or as INTERNAL when it
/// panics.
#[derive(Debug)]
pub struct Call {
    calls: Arc<Calls>,
    at: usize,
    lasts: bool,
    began: Instant,
    code: Option<Code>,
}

impl Call {
    /// Whether it is a stream, whose answer has begun when its head is there.
    #[must_use]
    pub fn lasts(&self) -> bool {
        self.lasts
    }

    /// How it ended.
    pub fn end(mut self, code: Code) {
        self.code = Some(code);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let given_up = || if std::thread::panicking() { Code::Internal } else { Code::Cancelled };
        let code = self.code.unwrap_or_else(given_up) as i32;
        let Some(method) = self.calls.methods.get(self.at) else { return };
        method.running.fetch_sub(1, Relaxed);
        method.latency.took(self.began.elapsed());
        if let Some(count) = usize::try_from(code).ok().and_then(|at| method.codes.get(at)) {
            count.fetch_add(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::family::Value;
    use super::*;

    fn count(calls: &Calls, method: &str, code: &str) -> f64 {
        let mut figures = Figures::default();
        calls.gather(&mut figures);
        let of = |point: &&super::super::family::Point| {
            let has = |name, value| point.labels.iter().any(|(n, v)| *n == name && v == value);
            has("method", method) && has("code", code)
        };
        match figures.0[0].points.iter().find(of).map(|point| &point.value) {
            Some(Value::Number(number)) => *number,
            _ => 0.0,
        }
    }

    #[test]
    fn a_call_counts_once_under_its_code_whatever_ends_it() {
        let calls = Arc::new(Calls::new([("/s/B", true), ("/s/A", false)]));
        calls.begin(Face::Grpc, "/s/A").end(Code::Ok);
        calls.begin(Face::Grpc, "/s/A").end(Code::PermissionDenied);
        calls.begin(Face::Grpc, "/s/Nobody").end(Code::Unimplemented);
        drop(calls.begin(Face::Grpc, "/s/B"));
        let panics = Arc::clone(&calls);
        let panicked = std::thread::spawn(move || {
            let _call = panics.begin(Face::Grpc, "/s/B");
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(panicked.join().is_err());
        for (method, code, expected) in [
            ("A", "OK", 1.0),
            ("A", "PERMISSION_DENIED", 1.0),
            ("B", "CANCELLED", 1.0),
            ("B", "INTERNAL", 1.0),
            ("B", "OK", 0.0),
            ("other", "UNIMPLEMENTED", 1.0),
        ] {
            let seen = count(&calls, method, code);
            assert!((seen - expected).abs() < 1e-9, "{method} {code}: {seen}");
        }
        let running = calls.begin(Face::Grpc, "/s/B");
        assert!(running.lasts());
        let mut figures = Figures::default();
        calls.gather(&mut figures);
        assert!(
            figures.text().contains(
                "polykey_requests_in_flight{face=\"grpc\",service=\"s\",method=\"B\"} 1\n"
            )
        );
        drop(running);
    }

    #[test]
    fn every_code_has_its_word() {
        for (number, word_of) in CODES.iter().enumerate() {
            let number = i32::try_from(number).unwrap();
            assert_eq!(word(Code::from(number)), *word_of);
        }
    }
}
