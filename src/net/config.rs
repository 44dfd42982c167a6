//! The limits and times of the network layer.

use std::time::Duration;

/// Limits and times. [`NetConfig::default`] suits a server with a few thousand clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConfig {
    /// Worker threads; `None` = one a core.
    pub workers: Option<usize>,
    /// Blocking threads (`spawn_blocking`) each worker may start.
    pub blocking_threads: usize,
    /// Sockets open at once, those in their handshake included; more are closed as soon as they are accepted.
    pub max_connections: usize,
    /// Handshakes at once; one more cuts off the oldest, so that peers which stall cannot keep others out.
    pub max_handshakes: usize,
    /// Sockets open at once per IPv4 address or IPv6 /64; `None` = no such limit.
    pub max_connections_per_address: Option<usize>,
    /// Time for a TLS handshake and the HTTP/2 preface together.
    pub handshake_timeout: Duration,
    /// Requests in flight at once, over all connections; more get RESOURCE_EXHAUSTED at once.
    pub max_requests: usize,
    /// Streams open at once on one connection.
    pub max_streams: u32,
    /// Largest header list of a request in bytes, as HTTP/2 counts them (RFC 9113 §10.5.1).
    pub max_header_bytes: u32,
    /// Streams a peer may reset before they were accepted; more close the connection (CVE-2023-44487).
    pub max_pending_resets: usize,
    /// How often an idle peer is asked whether it lives.
    pub keepalive_interval: Duration,
    /// How long its answer may take.
    pub keepalive_timeout: Duration,
    /// Age at which a connection is asked to go (GOAWAY), give or take a tenth; `None` = never.
    pub max_age: Option<Duration>,
    /// Time for the requests of a connection that was asked to go.
    pub max_age_grace: Duration,
    /// How often the chains of all open connections are looked at, so that idle connections and long streams of an
    /// expired or revoked certificate end too: they are asked to go, and cut off after five seconds.
    pub recheck_interval: Duration,
    /// Time for requests in flight when the server stops; then they are aborted.
    pub drain_timeout: Duration,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            workers: None,
            blocking_threads: 32,
            max_connections: 16_384,
            max_handshakes: 1_024,
            max_connections_per_address: None,
            handshake_timeout: Duration::from_secs(10),
            max_requests: 16_384,
            max_streams: 256,
            max_header_bytes: 32 * 1024,
            max_pending_resets: 20,
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(20),
            max_age: Some(Duration::from_secs(3600)),
            max_age_grace: Duration::from_secs(600),
            recheck_interval: Duration::from_secs(5),
            drain_timeout: Duration::from_secs(20),
        }
    }
}

/// A limit that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetConfigError {
    /// A number or time that must be positive is zero.
    #[error("{0} must be greater than zero")]
    Zero(&'static str),
    /// The handshake limit must leave room under the connection limit.
    #[error("max_handshakes must not be greater than max_connections")]
    Handshakes,
}

impl NetConfig {
    /// Checks the values against each other.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn validate(&self) -> Result<(), NetConfigError> {
        let zeros = [
            ("workers", self.workers == Some(0)),
            ("blocking_threads", self.blocking_threads == 0),
            ("max_connections", self.max_connections == 0),
            ("max_handshakes", self.max_handshakes == 0),
            ("max_connections_per_address", self.max_connections_per_address == Some(0)),
            ("handshake_timeout", self.handshake_timeout.is_zero()),
            ("max_requests", self.max_requests == 0),
            ("max_streams", self.max_streams == 0),
            ("max_header_bytes", self.max_header_bytes == 0),
            ("keepalive_interval", self.keepalive_interval.is_zero()),
            ("keepalive_timeout", self.keepalive_timeout.is_zero()),
            ("recheck_interval", self.recheck_interval.is_zero()),
            ("max_age", self.max_age.is_some_and(|age| age.is_zero())),
        ];
        if let Some((name, _)) = zeros.iter().find(|(_, zero)| *zero) {
            return Err(NetConfigError::Zero(name));
        }
        if self.max_handshakes > self.max_connections {
            return Err(NetConfigError::Handshakes);
        }
        Ok(())
    }
}
