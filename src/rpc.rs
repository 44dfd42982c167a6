//! The gRPC face: admit, parse, authorize, act, render. It has no rules of its own.

pub mod admin;
pub(crate) mod admit;
pub(crate) mod batch;
pub(crate) mod convert;
pub(crate) mod crypto;
mod deadline;
#[cfg(test)]
mod instructions;
mod key_service;
mod lifecycle;
pub mod methods;
pub(crate) mod parse;
pub mod status;
mod stream;
mod trailers;
mod twins;

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use pb::admin_service_server::AdminServiceServer;
use pb::crypto_service_server::CryptoServiceServer;
use pb::key_lifecycle_service_server::KeyLifecycleServiceServer;
use pb::polykey_service_server::PolykeyServiceServer;
use polykey_proto::polykey::v2 as pb;
use tonic::body::Body;
use tonic::service::Routes;
use tower::{Layer, Service};

use crate::audit::Trail;
use crate::authn::layer::{AuthenticationLayer, peer_of_connection};
use crate::authn::session::Authenticator;
use crate::keyring::Keyring;
use crate::limits::MESSAGE;
use crate::time::{Clock, Time};

/// Where HealthCheck's answer comes from.
pub trait Health: Send + Sync + 'static {
    /// The health of the node and its figures, as they are.
    fn report(&self, now: Time) -> pb::HealthCheckResponse;
    /// All that is wrong, worst first.
    fn problems(&self) -> Vec<String>;
}

/// What the services work with.
pub struct Deps {
    /// The keys.
    pub keyring: Arc<Keyring>,
    /// The audit trail.
    pub trail: Arc<Trail>,
    /// Who callers are.
    pub authenticator: Arc<Authenticator>,
    /// The clock, read once a message.
    pub clock: Clock,
    /// The node's health.
    pub health: Arc<dyn Health>,
    /// Longest time that a call which is not a stream may take.
    pub longest_call: Duration,
}

impl Deps {
    /// The time of a request: the clock, but never before what has been seen already, so that
    /// nothing that has ended begins again when the clock is set back.
    #[must_use]
    pub fn now(&self) -> Time {
        self.authenticator.directory().time(self.clock.now())
    }
}

/// Every service behind authentication, deadline and trailers, ready for the listener.
pub fn service(
    deps: Arc<Deps>,
    admin: admin::AdminDeps,
    more: impl FnOnce(Routes) -> Routes,
) -> impl Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
+ Clone
+ Send
+ 'static {
    let keys = key_service::KeyService(Arc::clone(&deps));
    let lifecycle = lifecycle::LifecycleService(keys.clone());
    let work = crypto::CryptoService::new(keys.clone());
    let work = CryptoServiceServer::new(work).max_decoding_message_size(MESSAGE);
    let keys = PolykeyServiceServer::new(keys).max_decoding_message_size(MESSAGE);
    let routes =
        Routes::new(KeyLifecycleServiceServer::new(lifecycle).max_decoding_message_size(MESSAGE));
    let admin = admin::AdminService::new(Arc::clone(&deps), admin);
    let routes =
        routes.add_service(AdminServiceServer::new(admin).max_decoding_message_size(MESSAGE));
    let routes = more(routes).prepare();
    let authentication = AuthenticationLayer::new(
        Arc::clone(&deps.authenticator),
        peer_of_connection,
        status::status,
    );
    deadline::WithDeadline {
        inner: authentication.layer(trailers::WithTrailers(Direct { keys, work, routes })),
        longest: deps.longest_call,
        streams: deadline::StreamSlots::default(),
    }
}

/// The services that most calls are of, past the router, which costs a tenth of such a call.
#[derive(Clone)]
struct Direct {
    keys: PolykeyServiceServer<key_service::KeyService>,
    work: CryptoServiceServer<crypto::CryptoService>,
    routes: Routes,
}

const KEYS: &str = "/polykey.v2.PolykeyService/";
const WORK: &str = "/polykey.v2.CryptoService/";

impl Service<Request<Body>> for Direct {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.routes, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path().starts_with(KEYS) {
            self.keys.call(request)
        } else if request.uri().path().starts_with(WORK) {
            self.work.call(request)
        } else {
            Box::pin(self.routes.call(request))
        }
    }
}
