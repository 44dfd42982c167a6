//! Times and counts every request around all services.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::Code;
use tonic::body::Body;
use tower_service::Service;

use crate::metrics::RequestMetrics;
use crate::metrics::calls::{Call, Calls, Face, code};
use crate::net::RequestId;
use crate::rpc::methods;
use crate::telemetry::otlp::Telemetry;
use crate::telemetry::trace::{About, Running};

/// Whether a code is the node's own fault.
fn ours(code: Code) -> bool {
    use Code::{DataLoss, DeadlineExceeded, Internal, Unavailable, Unknown};
    matches!(code, Unknown | DeadlineExceeded | Internal | Unavailable | DataLoss)
}

/// A service whose answers are counted, from the call to the head of the answer, or to the end of a
/// stream.
#[derive(Clone, Debug)]
pub(super) struct Measured<S> {
    inner: S,
    metrics: Arc<RequestMetrics>,
    calls: Arc<Calls>,
    telemetry: Arc<Telemetry>,
}

impl<S> Measured<S> {
    pub(super) fn new(
        inner: S,
        metrics: Arc<RequestMetrics>,
        calls: Arc<Calls>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        Self { inner, metrics, calls, telemetry }
    }
}

/// What a span tells of a request.
fn about(request: &Request<Body>) -> About {
    let method = methods::find(request.uri().path());
    let method = method.map_or("other", |method| method.path.trim_start_matches('/'));
    let id = request.extensions().get::<RequestId>().map(|id| id.as_str().into());
    About { method, code: None, id }
}

impl<S> Service<Request<Body>> for Measured<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let metrics = Arc::clone(&self.metrics);
        let started = Instant::now();
        let call = self.calls.begin(Face::Grpc, request.uri().path());
        let mut span = self.telemetry.begin(request.headers(), || about(&request));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = match &span {
                None => answer.await?,
                Some(span) => span.around(answer).await?,
            };
            // The head of an answer that is an error from the start tells its code.
            let code = code(answer.headers());
            metrics.record(started.elapsed(), code.is_some_and(ours));
            if code.is_none() && call.lasts() {
                let call = Some(call);
                return Ok(answer.map(|body| Body::new(Counted { body, call, span })));
            }
            let code = code.unwrap_or(Code::Ok);
            call.end(code);
            if let Some(span) = &mut span {
                span.ended(code);
            }
            Ok(answer)
        })
    }
}

/// The body of a stream, which counts when it ends.
struct Counted {
    body: Body,
    call: Option<Call>,
    span: Option<Running>,
}

impl Counted {
    fn ended(&mut self, code: Code) {
        if let Some(call) = self.call.take() {
            call.end(code);
        }
        if let Some(mut span) = self.span.take() {
            span.ended(code);
        }
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.ended(code(trailers).unwrap_or(Code::Unknown));
                }
            }
            Some(Err(status)) => self.ended(status.code()),
            None => self.ended(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
