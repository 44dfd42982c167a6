//! The layer in front of every service: no token, no method, before a byte of the body is decoded.
//!
//! It identifies and never authorizes. What it puts into a request's extensions: [`RequestId`],
//! [`Peer`], and, except for the methods that need no token, [`Session`] and its `Arc<Caller>`.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::AUTHORIZATION;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use rustls_pki_types::UnixTime;
use tonic::body::Body;
use tower::Service;

use super::certificate::PeerCertificate;
use super::login::event;
use super::session::{Attempt, Authenticator, Session};
use crate::error::Error;
use crate::limits::shown;
use crate::net::{Connection, RequestId};
use crate::telemetry::trace::{self, Stage};
use crate::time::{Clock, Time};

const BEARER: &[u8] = b"Bearer ";

/// Carries the request id, both ways.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("polykey-request-id");
/// Also taken from callers.
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The methods that answer without a token; a certificate is needed all the same.
pub const WITHOUT_TOKEN: [&str; 5] = [
    "/polykey.v2.PolykeyService/HealthCheck",
    "/polykey.v2.PolykeyService/Authenticate",
    "/polykey.v2.PolykeyService/RefreshToken",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
];

/// Who is at the other end of the connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The verified certificate.
    pub certificate: Arc<PeerCertificate>,
    /// Its address.
    pub address: SocketAddr,
}

/// How the layer learns who is at the other end; `None` if the certificate may not be used any more.
pub type PeerOf = fn(&Extensions, Time) -> Option<Peer>;

/// From the connection that the acceptor put there.
#[must_use]
pub fn peer_of_connection(extensions: &Extensions, now: Time) -> Option<Peer> {
    let connection = extensions.get::<Arc<Connection>>()?;
    let since = Duration::from_micros(u64::try_from(now.micros()).ok()?);
    let valid = connection.certificate_still_valid(UnixTime::since_unix_epoch(since));
    valid.then(|| Peer {
        certificate: Arc::clone(connection.certificate()),
        address: connection.peer(),
    })
}

/// Wraps a service in authentication.
#[derive(Clone, Debug)]
pub struct AuthenticationLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    authenticator: Arc<Authenticator>,
    clock: Clock,
    peer_of: PeerOf,
    status: fn(&Error) -> tonic::Status,
}

impl AuthenticationLayer {
    /// `status` renders refusals: the one mapping from errors to codes.
    #[must_use]
    pub fn new(
        authenticator: Arc<Authenticator>,
        peer_of: PeerOf,
        status: fn(&Error) -> tonic::Status,
    ) -> Self {
        let clock = authenticator.directory().vault().clock().clone();
        Self { shared: Arc::new(Shared { authenticator, clock, peer_of, status }) }
    }
}

impl<S> tower::Layer<S> for AuthenticationLayer {
    type Service = Authentication<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Authentication { shared: Arc::clone(&self.shared), inner }
    }
}

/// See [`AuthenticationLayer`].
#[derive(Clone, Debug)]
pub struct Authentication<S> {
    shared: Arc<Shared>,
    inner: S,
}

impl<S, B> Service<Request<B>> for Authentication<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        // The service that was found ready is the one that is called.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Box::pin(async move {
            let id = request_id(&mut request);
            let stage = trace::begin(Stage::Authenticate);
            let admitted = shared.admit(&mut request, id.as_str()).await;
            drop(stage);
            let response = match admitted {
                Ok(()) => {
                    request.extensions_mut().insert(id.clone());
                    match trace::begin(Stage::Operation) {
                        None => inner.call(request).await?,
                        Some(stage) => stage.around(inner.call(request)).await?,
                    }
                }
                Err(error) => (shared.status)(&error).into_http(),
            };
            Ok(with_request_id(response, &id))
        })
    }
}

impl Shared {
    /// Identifies the caller and puts what is known of it into the request.
    async fn admit<B>(&self, request: &mut Request<B>, id: &str) -> Result<(), Error> {
        let now = self.clock.now();
        let peer = (self.peer_of)(request.extensions(), now).ok_or(Error::Unauthenticated)?;
        // Out of the request, so that nothing behind can write it anywhere.
        let token = take_bearer(request.headers_mut());
        if WITHOUT_TOKEN.contains(&request.uri().path()) {
            request.extensions_mut().insert(peer);
            return Ok(());
        }
        let attempt =
            Attempt { peer: &peer.certificate, address: peer.address, request_id: id, now };
        let result = match &token {
            Some(token) => self.authenticator.authenticate_request(token, &attempt).await,
            None => Err(Error::Unauthenticated),
        };
        match result {
            Ok(session) => {
                self.authenticator.rates().admit(&session.caller, request.uri().path())?;
                request.extensions_mut().insert(Arc::clone(&session.caller));
                request.extensions_mut().insert::<Session>(session);
                request.extensions_mut().insert(peer);
                Ok(())
            }
            Err(error) => {
                Box::pin(self.record(&error, request.uri().path(), &attempt)).await?;
                Err(error)
            }
        }
    }

    async fn record(&self, error: &Error, path: &str, attempt: &Attempt<'_>) -> Result<(), Error> {
        if !matches!(error, Error::Unauthenticated | Error::Exhausted { .. }) {
            return Ok(());
        }
        let mut event = event("Authenticate", attempt);
        event.details.insert("method".into(), shown(path));
        event.set_outcome(Outcome::Denied);
        event.code = i32::from((self.status)(error).code());
        self.authenticator.audit().denied(event).await
    }
}

/// The token of the only `authorization` header, if that is `Bearer` and visible ASCII. The header is
/// taken out in any case.
pub(crate) fn take_bearer(headers: &mut HeaderMap) -> Option<String> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let token = match (values.next(), values.next()) {
        (Some(value), None) => bearer(value),
        _ => None,
    };
    headers.remove(AUTHORIZATION);
    token
}

fn bearer(value: &HeaderValue) -> Option<String> {
    let (scheme, token) = value.as_bytes().split_at_checked(BEARER.len())?;
    // Without a way out in the middle, so that many bytes are looked at together.
    let visible = token.iter().fold(true, |ok, byte| ok & byte.is_ascii_graphic());
    if !scheme.eq_ignore_ascii_case(BEARER) || token.is_empty() || !visible {
        return None;
    }
    String::from_utf8(token.to_vec()).ok()
}

/// The id that the acceptor gave the request, unless the caller has named it by the other header.
fn request_id<B>(request: &mut Request<B>) -> RequestId {
    let headers = request.headers_mut();
    let other = headers.get(&X_REQUEST_ID).cloned();
    if !headers.contains_key(&REQUEST_ID)
        && let Some(other) = other
    {
        headers.insert(REQUEST_ID, other.clone());
        let id = RequestId::of(request.headers());
        if id.as_str().as_bytes() == other.as_bytes() {
            return id;
        }
    }
    match request.extensions().get::<RequestId>() {
        Some(id) => id.clone(),
        None => RequestId::of(request.headers()),
    }
}

/// Puts the request id into the headers and, where the response has them, the trailers.
fn with_request_id(response: Response<Body>, id: &RequestId) -> Response<Body> {
    // Never refused: well-formed ids are visible ASCII.
    let Ok(mut id) = HeaderValue::from_str(id.as_str()) else { return response };
    // No two answers have the same: in the table of HPACK (RFC 7541 §7.1.3) it would only push out
    // what is sent again.
    id.set_sensitive(true);
    let (mut parts, body) = response.into_parts();
    parts.headers.insert(REQUEST_ID, id.clone());
    let body = if body.is_end_stream() { body } else { Body::new(Traced { body, id }) };
    Response::from_parts(parts, body)
}

/// A body whose trailers name the request.
struct Traced {
    body: Body,
    id: HeaderValue,
}

impl HttpBody for Traced {
    type Data = bytes::Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
        {
            trailers.insert(REQUEST_ID, self.id.clone());
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
