//! A deadline for every call that is not a stream: the caller's own, or ours, its body included; and
//! a bound on how many streams are open, so that idle ones cannot take the place of calls.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::body::Body;
use tower::Service;

use super::{methods, status};
use crate::authn::layer::REQUEST_ID;
use crate::error::Error;
use crate::net::{Connection, RequestId};
use crate::share::{Place, Places};

/// Ends what takes longer than it may.
#[derive(Clone, Debug)]
pub(crate) struct WithDeadline<S> {
    pub(crate) inner: S,
    pub(crate) longest: Duration,
    pub(crate) streams: StreamSlots,
}

/// Streams open at a time in all, and those among them that need no token.
const STREAMS: usize = 4096;
const WATCHES: usize = 256;
const WATCH: &str = "/grpc.health.v1.Health/Watch";

/// Who holds the places of streams: a certificate, since they are taken before any token is read.
type Holder = [u8; 32];

/// Places for streams, half of them at most for one certificate. What watches health without a token has
/// few of its own.
#[derive(Clone, Debug)]
pub(crate) struct StreamSlots {
    streams: Places<Holder>,
    watches: Places<Holder>,
}

impl Default for StreamSlots {
    fn default() -> Self {
        Self { streams: Places::new(STREAMS), watches: Places::new(WATCHES) }
    }
}

impl StreamSlots {
    fn take(&self, path: &str, holder: Option<Holder>) -> Option<Place<Holder>> {
        let places = if path == WATCH { &self.watches } else { &self.streams };
        places.take(holder.as_ref())
    }
}

/// A body that keeps a stream's place until it has ended or is dropped.
struct Held {
    body: Body,
    _place: Place<Holder>,
}

impl HttpBody for Held {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// `grpc-timeout`: at most 8 digits and a unit; what is malformed is ignored, as gRPC has it.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n.saturating_mul(3600)),
        "M" => Duration::from_secs(n.saturating_mul(60)),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

impl<S, B> Service<Request<B>> for WithDeadline<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let asked = asked(request.headers());
        // What nobody has entered into the table, nobody has decided who may call.
        let Some(method) = methods::find(request.uri().path()) else {
            let unknown = tonic::Status::unimplemented("there is no such method");
            let id = request.extensions().get::<RequestId>().cloned();
            return Box::pin(async move { Ok(named(unknown, id.as_ref())) });
        };
        let limit = match (method.lasts, asked) {
            (true, asked) => asked,
            (false, asked) => Some(asked.map_or(self.longest, |a| a.min(self.longest))),
        };
        let id = request.extensions().get::<RequestId>().cloned();
        let place = if method.lasts {
            let connection = request.extensions().get::<Arc<Connection>>();
            let holder = connection.map(|c| *c.certificate().thumbprint());
            let Some(place) = self.streams.take(request.uri().path(), holder) else {
                let full =
                    status::status(&Error::Exhausted { retry_after: Duration::from_secs(1) });
                return Box::pin(async move { Ok(named(full, id.as_ref())) });
            };
            Some(place)
        } else {
            None
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            let answered = match limit {
                None => response.await,
                Some(limit) => match tokio::time::timeout(limit, response).await {
                    Ok(response) => response,
                    Err(_) => Ok(named(status::status(&Error::DeadlineExceeded), id.as_ref())),
                },
            };
            match place {
                None => answered,
                Some(place) => {
                    answered.map(|r| r.map(|body| Body::new(Held { body, _place: place })))
                }
            }
        })
    }
}

/// An answer with the request id: this stands outside of what puts it into the others.
fn named(status: tonic::Status, id: Option<&RequestId>) -> Response<Body> {
    let mut response: Response<Body> = status.into_http();
    if let Some(id) = id.and_then(|id| HeaderValue::from_str(id.as_str()).ok()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_that_took_too_long_names_its_request_and_says_what_is_not_known() {
        let never = tower::service_fn(|_: Request<()>| {
            std::future::pending::<Result<Response<Body>, Infallible>>()
        });
        let mut service = WithDeadline {
            inner: never,
            longest: Duration::from_millis(1),
            streams: StreamSlots::default(),
        };
        let mut request = Request::new(());
        *request.uri_mut() = "/polykey.v2.PolykeyService/GetKey".parse().unwrap();
        let id = RequestId::of(&HeaderMap::new());
        request.extensions_mut().insert(id.clone());
        let response = service.call(request).await.unwrap();
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(response.headers()[REQUEST_ID], id.as_str());
        let text = response.headers()["grpc-message"].to_str().unwrap();
        assert!(text.contains("idempotency"), "{text}");
    }

    #[tokio::test]
    async fn streams_beyond_the_places_there_are_are_refused_and_a_place_comes_free_again() {
        // A body that goes on; one that has ended keeps no place.
        let open = tower::service_fn(|_: Request<()>| async {
            let frames = futures::stream::pending::<Result<Frame<bytes::Bytes>, tonic::Status>>();
            let body = Body::new(http_body_util::StreamBody::new(frames));
            Ok::<_, Infallible>(Response::new(body))
        });
        let mut service = WithDeadline {
            inner: open,
            longest: Duration::from_secs(1),
            streams: StreamSlots::default(),
        };
        let watch = || {
            let mut request = Request::new(());
            *request.uri_mut() = WATCH.parse().unwrap();
            request
        };
        let mut held = Vec::new();
        for _ in 0..WATCHES {
            held.push(service.call(watch()).await.unwrap());
        }
        let refused = service.call(watch()).await.unwrap();
        assert_eq!(refused.headers()["grpc-status"], "8");
        held.pop();
        assert!(!service.call(watch()).await.unwrap().headers().contains_key("grpc-status"));
    }

    #[test]
    fn timeouts_parse_as_grpc_writes_them() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            asked(&headers)
        };
        assert_eq!(of("100m"), Some(Duration::from_millis(100)));
        assert_eq!(of("1S"), Some(Duration::from_secs(1)));
        assert_eq!(of("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "S", "1", "-1S", "1x", "999999999S", "1.5S", "+1S"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
