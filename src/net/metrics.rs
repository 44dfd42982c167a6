//! Counters of the network layer.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Live counters, shared by the acceptor and all workers. Gauges go up and down; the others only grow.
#[derive(Debug, Default)]
pub struct NetMetrics {
    pub(crate) connections_open: AtomicU64,
    pub(crate) connections_total: AtomicU64,
    pub(crate) connections_refused: AtomicU64,
    pub(crate) accept_errors: AtomicU64,
    pub(crate) handshakes_in_flight: AtomicU64,
    pub(crate) handshakes_failed: AtomicU64,
    pub(crate) handshakes_timed_out: AtomicU64,
    pub(crate) handshakes_evicted: AtomicU64,
    pub(crate) handshakes_resumed: AtomicU64,
    pub(crate) certificates_refused: AtomicU64,
    pub(crate) requests_total: AtomicU64,
    pub(crate) requests_in_flight: AtomicU64,
    pub(crate) requests_refused: AtomicU64,
    pub(crate) panics: AtomicU64,
}

/// The counters at one moment. Each is exact, together they are not one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetSnapshot {
    /// Gauge: sockets open, those still in their handshake included.
    pub connections_open: u64,
    /// Sockets accepted and kept.
    pub connections_total: u64,
    /// Sockets closed at once because a limit was reached.
    pub connections_refused: u64,
    /// Errors of `accept` itself (no descriptors, no memory).
    pub accept_errors: u64,
    /// Gauge: handshakes running.
    pub handshakes_in_flight: u64,
    /// Handshakes that failed for whatever reason, the next two included.
    pub handshakes_failed: u64,
    /// Handshakes cut off by their deadline.
    pub handshakes_timed_out: u64,
    /// Handshakes cut off because newer ones needed the room.
    pub handshakes_evicted: u64,
    /// Handshakes that resumed an earlier session.
    pub handshakes_resumed: u64,
    /// Chains that were refused after their handshake: expired, revoked or no longer trusted.
    pub certificates_refused: u64,
    /// Requests received.
    pub requests_total: u64,
    /// Gauge: requests whose response has not ended.
    pub requests_in_flight: u64,
    /// Requests refused because too many were in flight.
    pub requests_refused: u64,
    /// Requests that panicked.
    pub panics: u64,
}

impl NetMetrics {
    /// Reads all counters.
    #[must_use]
    pub fn snapshot(&self) -> NetSnapshot {
        NetSnapshot {
            connections_open: self.connections_open.load(Relaxed),
            connections_total: self.connections_total.load(Relaxed),
            connections_refused: self.connections_refused.load(Relaxed),
            accept_errors: self.accept_errors.load(Relaxed),
            handshakes_in_flight: self.handshakes_in_flight.load(Relaxed),
            handshakes_failed: self.handshakes_failed.load(Relaxed),
            handshakes_timed_out: self.handshakes_timed_out.load(Relaxed),
            handshakes_evicted: self.handshakes_evicted.load(Relaxed),
            handshakes_resumed: self.handshakes_resumed.load(Relaxed),
            certificates_refused: self.certificates_refused.load(Relaxed),
            requests_total: self.requests_total.load(Relaxed),
            requests_in_flight: self.requests_in_flight.load(Relaxed),
            requests_refused: self.requests_refused.load(Relaxed),
            panics: self.panics.load(Relaxed),
        }
    }
}

pub(crate) fn increment(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

pub(crate) fn decrement(counter: &AtomicU64) {
    counter.fetch_sub(1, Relaxed);
}
