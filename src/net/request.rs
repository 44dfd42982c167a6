//! One request: its id, the checks before the service, and what keeps its failure to itself.

use std::any::Any;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::FutureExt;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use prost::Message;
use tonic::body::Body;
use tower::{Service, ServiceExt};

use super::connection::Connection;
use super::metrics::{NetMetrics, decrement, increment};
use super::tls::TlsState;

/// The one text for a missing, bad or expired token or certificate.
pub const UNAUTHENTICATED_TEXT: &str = "authentication required or failed";

const REQUEST_ID: HeaderName = HeaderName::from_static("polykey-request-id");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");
const LONGEST_REQUEST_ID: usize = 64;

/// The id of a request, in its extensions: the caller's `polykey-request-id` when that is 1 to 64 characters of
/// `[A-Za-z0-9._:-]`, else a new UUIDv7. Error replies made here carry it, as do the log lines about them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RequestId(Arc<str>);

impl RequestId {
    /// The id for a request with these headers.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(&REQUEST_ID).and_then(|value| value.to_str().ok()).filter(|text| {
            (1..=LONGEST_REQUEST_ID).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte))
        });
        match given {
            Some(text) => Self(text.into()),
            None => {
                let mut text = uuid::Uuid::encode_buffer();
                let id: &str = crate::ids::now().hyphenated().encode_lower(&mut text);
                Self(id.into())
            }
        }
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What every request needs, one for all connections.
pub(crate) struct Gate {
    pub(crate) metrics: Arc<NetMetrics>,
    pub(crate) tls: Arc<TlsState>,
    max_requests: u64,
    retry_info: Option<HeaderValue>,
}

impl Gate {
    pub(crate) fn new(metrics: Arc<NetMetrics>, tls: Arc<TlsState>, max_requests: usize) -> Self {
        Self { metrics, tls, max_requests: max_requests as u64, retry_info: retry_info() }
    }
}

/// The numbers of gRPC's canonical codes that this layer answers with.
#[derive(Clone, Copy)]
enum Refusal {
    ResourceExhausted,
    Unimplemented,
    Internal,
    Unauthenticated,
}

impl Refusal {
    fn code(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::ResourceExhausted => "8",
            Self::Unimplemented => "12",
            Self::Internal => "13",
            Self::Unauthenticated => "16",
        })
    }

    fn text(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::ResourceExhausted => "the server is busy",
            Self::Unimplemented => "unknown method",
            Self::Internal => "internal error",
            Self::Unauthenticated => UNAUTHENTICATED_TEXT,
        })
    }

    /// The headers of a trailers-only reply, or the trailers of one that has begun.
    fn headers(self, id: &RequestId) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(5);
        headers.insert(GRPC_STATUS, self.code());
        headers.insert(GRPC_MESSAGE, self.text());
        if let Ok(id) = HeaderValue::from_str(id.as_str()) {
            headers.insert(REQUEST_ID, id);
        }
        headers
    }

    fn reply(self, id: &RequestId) -> Response<Guarded> {
        let mut response = Response::new(Guarded::empty());
        *response.headers_mut() = self.headers(id);
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        response
    }
}

/// `google.rpc.Status` with a `RetryInfo` of 100 ms, as `grpc-status-details-bin` carries it.
fn retry_info() -> Option<HeaderValue> {
    #[derive(Clone, PartialEq, Message)]
    struct RetryInfo {
        #[prost(message, optional, tag = "1")]
        retry_delay: Option<prost_types::Duration>,
    }
    #[derive(Clone, PartialEq, Message)]
    struct Status {
        #[prost(int32, tag = "1")]
        code: i32,
        #[prost(string, tag = "2")]
        message: String,
        #[prost(message, repeated, tag = "3")]
        details: Vec<prost_types::Any>,
    }
    let info =
        RetryInfo { retry_delay: Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }) };
    let status = Status {
        code: 8,
        message: "the server is busy".to_owned(),
        details: vec![prost_types::Any {
            type_url: "type.googleapis.com/google.rpc.RetryInfo".to_owned(),
            value: info.encode_to_vec(),
        }],
    };
    HeaderValue::from_str(&data_encoding::BASE64_NOPAD.encode(&status.encode_to_vec())).ok()
}

/// Counts a request as in flight until its response has ended or was given up.
struct InFlight {
    metrics: Arc<NetMetrics>,
    connection: Arc<Connection>,
}

impl InFlight {
    fn enter(gate: &Gate, connection: &Arc<Connection>) -> Option<Self> {
        let before = gate.metrics.requests_in_flight.fetch_add(1, Ordering::Relaxed);
        connection.requests.fetch_add(1, Ordering::Relaxed);
        let entered =
            Self { metrics: Arc::clone(&gate.metrics), connection: Arc::clone(connection) };
        (before < gate.max_requests).then_some(entered)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.connection.requests.fetch_sub(1, Ordering::Relaxed);
        decrement(&self.metrics.requests_in_flight);
    }
}

/// Takes one request through the checks and the service. Never fails: whatever happens becomes a reply.
pub(crate) async fn handle<S, E>(
    gate: Arc<Gate>,
    connection: Arc<Connection>,
    service: S,
    request: Request<Incoming>,
) -> Result<Response<Guarded>, std::convert::Infallible>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = E>,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let id = RequestId::of(request.headers());
    increment(&gate.metrics.requests_total);
    if !connection.certificate_still_valid(gate.tls.now()) {
        increment(&gate.metrics.certificates_refused);
        tracing::info!(request_id = %id, connection = connection.id(), peer = %connection.peer(), "the client certificate is no longer accepted");
        return Ok(Refusal::Unauthenticated.reply(&id));
    }
    // A router and a policy may read `*` or a missing slash differently (CVE-2026-33186): neither gets to see one.
    if !request.uri().path().starts_with('/') {
        return Ok(Refusal::Unimplemented.reply(&id));
    }
    let Some(in_flight) = InFlight::enter(&gate, &connection) else {
        increment(&gate.metrics.requests_refused);
        let mut reply = Refusal::ResourceExhausted.reply(&id);
        if let Some(details) = &gate.retry_info {
            reply.headers_mut().insert(GRPC_DETAILS, details.clone());
        }
        return Ok(reply);
    };
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(connection);
    request.extensions_mut().insert(id.clone());

    // Unwind safety: nothing of the request outlives it but state behind locks that do not poison and stores that
    // commit whole changes.
    match AssertUnwindSafe(service.oneshot(request)).catch_unwind().await {
        Ok(Ok(response)) => {
            Ok(response.map(|body| Guarded { inner: Some(body), guard: Some((id, in_flight)) }))
        }
        Ok(Err(error)) => {
            let error: Box<dyn std::error::Error + Send + Sync> = error.into();
            tracing::error!(request_id = %id, %error, "a request failed outside its service");
            Ok(Refusal::Internal.reply(&id))
        }
        Err(panic) => {
            report_panic(&in_flight.metrics, &id, panic);
            Ok(Refusal::Internal.reply(&id))
        }
    }
}

/// The payload is dropped unread: it can quote a request. The process's panic hook tells the place.
fn report_panic(metrics: &NetMetrics, id: &RequestId, panic: Box<dyn Any + Send>) {
    increment(&metrics.panics);
    tracing::error!(request_id = %id, "a request panicked; only this request was given up");
    // A payload whose own drop panics must not get further than this.
    if let Err(second) = std::panic::catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(second);
    }
}

/// A response body that counts as in flight until it ends, and whose panic becomes its trailers.
pub(crate) struct Guarded {
    inner: Option<Body>,
    guard: Option<(RequestId, InFlight)>,
}

impl Guarded {
    fn empty() -> Self {
        Self { inner: None, guard: None }
    }
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        let Some(body) = this.inner.as_mut() else { return Poll::Ready(None) };
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx)));
        match polled {
            Ok(poll) => {
                let frame = ready!(poll);
                if frame.is_none() {
                    this.guard = None;
                }
                Poll::Ready(frame)
            }
            Err(panic) => {
                this.inner = None;
                let Some((id, in_flight)) = this.guard.take() else { return Poll::Ready(None) };
                report_panic(&in_flight.metrics, &id, panic);
                Poll::Ready(Some(Ok(Frame::trailers(Refusal::Internal.headers(&id)))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), |body| body.size_hint())
    }
}
