//! Spans: what a sampled request did, stage by stage, and where it belongs in a trace that its caller
//! began (W3C Trace Context).
//!
//! A request that is not sampled has no [`Span`] anywhere, and each stage costs a look at a variable of
//! its task. Spans carry words of the code, numbers and the request's id, and nothing of its contents.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use polykey_hsm::random;
use tokio::sync::mpsc;
use tonic::Code;

use crate::config::telemetry::WHOLE;

tokio::task_local! {
    /// The innermost span around what runs in this task.
    static INNERMOST: Place;
}

/// A stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From token and certificate to a caller.
    Authenticate,
    /// Asking the policies.
    Authorize,
    /// The work itself, whatever it asks of the others included.
    Operation,
    /// Waiting until a change is durable.
    Commit,
}

impl Stage {
    /// Its word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Authenticate => "authenticate",
            Self::Authorize => "authorize",
            Self::Operation => "operation",
            Self::Commit => "commit",
        }
    }
}

/// The ids of a trace and a span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// Of the trace; not all zero.
    pub trace: [u8; 16],
    /// Of the span; not all zero.
    pub span: [u8; 8],
}

/// A `traceparent`: where a request stands in its caller's trace, and whether that is recorded.
fn parent(headers: &HeaderMap) -> Option<(Ids, bool)> {
    let mut values = headers.get_all("traceparent").iter();
    let (value, None) = (values.next()?, values.next()) else { return None };
    let mut parts = value.to_str().ok()?.split('-');
    let mut part = |digits: usize| {
        let text = parts.next().filter(|text| text.len() == digits)?;
        data_encoding::HEXLOWER.decode(text.as_bytes()).ok()
    };
    let version = *part(2)?.first()?;
    let trace: [u8; 16] = part(32)?.try_into().ok()?;
    let span: [u8; 8] = part(16)?.try_into().ok()?;
    let flags = *part(2)?.first()?;
    // Later versions may say more at the end; this one may not, and 255 is none.
    let more = parts.next().is_some();
    let bad = version == 0xff || (version == 0 && more) || trace == [0; 16] || span == [0; 8];
    (!bad).then_some((Ids { trace, span }, flags & 1 == 1))
}

/// A span that has ended.
#[derive(Clone, Debug)]
pub struct Span {
    /// What it is called.
    pub name: &'static str,
    /// What it is.
    pub ids: Ids,
    /// The span around it, of this node or of the caller.
    pub parent: Option<[u8; 8]>,
    /// Since the Unix epoch.
    pub began: Duration,
    /// How long it took.
    pub took: Duration,
    /// Of a whole request: what is known of it.
    pub request: Option<About>,
}

/// What is known of a request.
#[derive(Clone, Debug)]
pub struct About {
    /// `service/Method`, without the first slash.
    pub method: &'static str,
    /// How it ended; `None`: it was given up.
    pub code: Option<Code>,
    /// Its id.
    pub id: Option<Arc<str>>,
}

/// Where spans go: a bounded queue that never makes anybody wait.
#[derive(Debug)]
pub struct Outlet {
    /// The queue.
    pub queue: mpsc::Sender<Span>,
    /// Spans for which there was no room.
    pub dropped: Arc<AtomicU64>,
}

impl Outlet {
    fn put(&self, span: Span) {
        if self.queue.try_send(span).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// A place in a trace.
#[derive(Clone, Debug)]
struct Place {
    ids: Ids,
    outlet: Arc<Outlet>,
}

/// A span that has not ended. It ends when it is dropped.
#[derive(Debug)]
pub struct Running {
    place: Place,
    name: &'static str,
    parent: Option<[u8; 8]>,
    at: SystemTime,
    began: Instant,
    request: Option<About>,
}

/// Decides which requests are traced.
#[derive(Debug)]
pub struct Sampler {
    /// How many of [`WHOLE`].
    share: u32,
    outlet: Arc<Outlet>,
}

impl Sampler {
    /// One that traces `share` of [`WHOLE`] of the requests whose callers do not say.
    #[must_use]
    pub fn new(share: u32, outlet: Outlet) -> Self {
        Self { share, outlet: Arc::new(outlet) }
    }

    /// The span of a request, if it is traced. Its caller decides, or else chance.
    #[must_use]
    pub fn begin(&self, headers: &HeaderMap, about: impl FnOnce() -> About) -> Option<Running> {
        let (trace, parent) = match parent(headers) {
            Some((_, false)) => return None,
            Some((ids, true)) => (ids.trace, Some(ids.span)),
            None => {
                let trace: [u8; 16] = random::array().ok()?;
                let [.., a, b, c, d] = trace;
                let chance = u64::from(u32::from_be_bytes([a, b, c, d]));
                // Of 2^32 equally likely values; a share of one is all of them.
                if chance * u64::from(WHOLE) >= u64::from(self.share) << 32 {
                    return None;
                }
                (trace, None)
            }
        };
        let ids = Ids { trace, span: random::array().ok()? };
        let (about, outlet) = (about(), Arc::clone(&self.outlet));
        Some(Running::new(Place { ids, outlet }, about.method, parent, Some(about)))
    }
}

impl Running {
    fn new(
        place: Place,
        name: &'static str,
        parent: Option<[u8; 8]>,
        request: Option<About>,
    ) -> Self {
        Self { place, name, parent, at: SystemTime::now(), began: Instant::now(), request }
    }

    /// Does work inside this span.
    pub async fn around<T>(&self, work: impl Future<Output = T>) -> T {
        INNERMOST.scope(self.place.clone(), work).await
    }

    /// How the request ended.
    pub fn ended(&mut self, code: Code) {
        if let Some(request) = &mut self.request {
            request.code = Some(code);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.place.outlet.put(Span {
            name: self.name,
            ids: self.place.ids,
            parent: self.parent,
            began: self.at.duration_since(UNIX_EPOCH).unwrap_or_default(),
            took: self.began.elapsed(),
            request: self.request.take(),
        });
    }
}

/// A stage begins, if what runs in this task is traced. It ends when this is dropped.
#[must_use]
pub fn begin(stage: Stage) -> Option<Running> {
    let around = INNERMOST.try_with(Clone::clone).ok()?;
    let ids = Ids { span: random::array().ok()?, ..around.ids };
    let place = Place { ids, outlet: around.outlet };
    Some(Running::new(place, stage.name(), Some(around.ids.span), None))
}

/// The ids of the innermost span around what runs in this task.
#[must_use]
pub fn here() -> Option<Ids> {
    INNERMOST.try_with(|place| place.ids).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("traceparent", value.parse().unwrap());
        }
        headers
    }

    fn about() -> About {
        About { method: "s/M", code: None, id: Some("r1".into()) }
    }

    fn sampler(share: u32, room: usize) -> (Sampler, mpsc::Receiver<Span>, Arc<AtomicU64>) {
        let (queue, spans) = mpsc::channel(room);
        let dropped = Arc::new(AtomicU64::new(0));
        (Sampler::new(share, Outlet { queue, dropped: Arc::clone(&dropped) }), spans, dropped)
    }

    #[test]
    fn a_parent_is_read_as_the_specification_has_it() {
        let (ids, sampled) = parent(&headers(&[GOOD])).unwrap();
        assert_eq!((ids.trace[0], ids.span[7], sampled), (0x4b, 0xb7, true));
        assert!(!parent(&headers(&[&GOOD.replace("-01", "-00")])).unwrap().1);
        assert!(
            parent(&headers(&[&GOOD.replace("00-4b", "01-4b").replace("-01", "-01-x")])).is_some()
        );
        for bad in [
            "",
            "00",
            &GOOD.to_uppercase(),
            &GOOD.replace("00-4b", "ff-4b"),
            &format!("{GOOD}-x"),
            &GOOD.replace("00f067aa0ba902b7", "0000000000000000"),
            &GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &GOOD.replace("-01", "-1"),
            &GOOD.replace('-', "_"),
        ] {
            assert!(parent(&headers(&[bad])).is_none(), "{bad}");
        }
        assert!(parent(&headers(&[GOOD, GOOD])).is_none());
    }

    #[test]
    fn the_caller_decides_or_else_chance() {
        let none = headers(&[]);
        let (never, ..) = sampler(0, 1);
        let (always, ..) = sampler(WHOLE, 1);
        let (half, ..) = sampler(WHOLE / 2, 1);
        let count = |sampler: &Sampler, headers: &HeaderMap| {
            (0..1000).filter(|_| sampler.begin(headers, about).is_some()).count()
        };
        assert_eq!((count(&never, &none), count(&always, &none)), (0, 1000));
        let some = count(&half, &none);
        assert!((350..650).contains(&some), "{some}");
        assert_eq!(count(&never, &headers(&[GOOD])), 1000);
        assert_eq!(count(&always, &headers(&[&GOOD.replace("-01", "-00")])), 0);
    }

    #[tokio::test]
    async fn stages_are_inside_their_request_and_nothing_waits_for_room() {
        assert!(begin(Stage::Commit).is_none(), "outside every request");
        let (sampler, mut spans, dropped) = sampler(0, 3);
        let mut request = sampler.begin(&headers(&[GOOD]), about).unwrap();
        request
            .around(async {
                let operation = begin(Stage::Operation).unwrap();
                operation.around(async { drop(begin(Stage::Commit).unwrap()) }).await;
                drop(operation);
                assert_eq!(here().unwrap().trace[0], 0x4b);
            })
            .await;
        request.ended(Code::NotFound);
        drop(request);
        let commit = spans.try_recv().unwrap();
        let operation = spans.try_recv().unwrap();
        let request = spans.try_recv().unwrap();
        assert_eq!((commit.name, operation.name, request.name), ("commit", "operation", "s/M"));
        assert_eq!(commit.parent, Some(operation.ids.span));
        assert_eq!(operation.parent, Some(request.ids.span));
        assert_eq!(request.parent.unwrap()[0], 0);
        assert!([commit.ids, operation.ids].iter().all(|ids| ids.trace == request.ids.trace));
        let told = request.request.unwrap();
        assert_eq!((told.code, told.id.as_deref()), (Some(Code::NotFound), Some("r1")));
        for _ in 0..5 {
            drop(sampler.begin(&headers(&[GOOD]), about));
        }
        assert_eq!(dropped.load(Relaxed), 2);
    }
}
