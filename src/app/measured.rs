//! Times every request around all services.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use tonic::body::Body;
use tower_service::Service;

use crate::metrics::RequestMetrics;

/// The codes that are the node's own fault: UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE and
/// DATA_LOSS as they stand in the header of an answer that is an error from the start.
const OUR_FAULT: [&[u8]; 5] = [b"2", b"4", b"13", b"14", b"15"];

/// A service whose answers are counted, from the call to the head of the answer.
#[derive(Clone, Debug)]
pub(super) struct Measured<S> {
    inner: S,
    metrics: Arc<RequestMetrics>,
}

impl<S> Measured<S> {
    pub(super) fn new(inner: S, metrics: Arc<RequestMetrics>) -> Self {
        Self { inner, metrics }
    }
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
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let code = answer.headers().get("grpc-status").map(http::HeaderValue::as_bytes);
            let failed = code.is_some_and(|code| OUR_FAULT.contains(&code));
            metrics.record(started.elapsed(), failed);
            Ok(answer)
        })
    }
}
