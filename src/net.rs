//! Sockets, TLS and HTTP/2: everything between a TCP connection and a request with a verified client certificate.
//!
//! ```text
//!  acceptor thread ──deals──▶ worker 0 ─ TLS ─ HTTP/2 ─▶ service     one current-thread runtime a worker
//!                      └────▶ worker 1 ─ TLS ─ HTTP/2 ─▶ service
//! ```
//! No request reaches the service without an [`Arc<Connection>`](Connection) in its extensions, and a connection
//! cannot be built without a [`PeerCertificate`](crate::authn::certificate::PeerCertificate): an anonymous peer has
//! no representation. Services run on current-thread runtimes: blocking work belongs into
//! `tokio::task::spawn_blocking`, and `block_in_place` is not available.

mod config;
mod connection;
mod listen;
mod metrics;
mod request;
mod worker;

pub mod client;
pub mod tls;

pub use config::{NetConfig, NetConfigError};
pub use connection::{Connection, Connections};
pub use listen::{DrainReport, Listener, NetError, Served, serve};
pub use metrics::{NetMetrics, NetSnapshot};
pub use request::{RequestId, UNAUTHENTICATED_TEXT};
