//! An open connection, the registry of all of them, and the limits on how many there are.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio_util::sync::CancellationToken;

use super::metrics::{NetMetrics, decrement, increment};
use super::tls::{Loaded, TlsState};
use crate::authn::certificate::PeerCertificate;

/// A connection whose client certificate has been verified. Every request carries it in its extensions.
pub struct Connection {
    id: u64,
    peer: SocketAddr,
    certificate: Arc<PeerCertificate>,
    chain: Vec<CertificateDer<'static>>,
    resumed: bool,
    tls: Arc<TlsState>,
    verified: Mutex<Verified>,
    pub(crate) closed: CancellationToken,
    pub(crate) retired: CancellationToken,
    pub(crate) requests: AtomicUsize,
}

/// What the last verification of the chain was made with, and until which second it stands.
#[derive(Debug, Clone, Copy)]
struct Verified {
    generation: u64,
    until: u64,
}

impl Connection {
    /// Reads the chain of a finished handshake; `None` when it may not be used (any more).
    pub(crate) fn new(
        id: u64,
        peer: SocketAddr,
        chain: Vec<CertificateDer<'static>>,
        resumed: bool,
        tls: &Arc<TlsState>,
        loaded: &Loaded,
    ) -> Option<Self> {
        let certificate = PeerCertificate::parse(&chain).ok()?;
        let now = tls.now();
        let until = if resumed {
            loaded.verify(&chain, &certificate, now)?
        } else {
            loaded.stands_until(&certificate, now.as_secs())
        };
        Some(Self {
            id,
            peer,
            certificate: Arc::new(certificate),
            chain,
            resumed,
            tls: Arc::clone(tls),
            verified: Mutex::new(Verified { generation: loaded.generation, until }),
            closed: CancellationToken::new(),
            retired: CancellationToken::new(),
            requests: AtomicUsize::new(0),
        })
    }

    /// A number no other connection of this process has.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The peer's address.
    #[must_use]
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// The verified client certificate.
    #[must_use]
    pub fn certificate(&self) -> &Arc<PeerCertificate> {
        &self.certificate
    }

    /// Whether the TLS session resumed an earlier one.
    #[must_use]
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// Requests in flight on this connection.
    #[must_use]
    pub fn requests_in_flight(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether the chain would be accepted at `now` by the authorities and revocation lists now loaded.
    ///
    /// Costs a comparison; the chain is verified again only after a reload or when something in it has run out.
    /// Once false it stays false: the connection is then asked to go. Long streams call it with every message.
    #[must_use]
    pub fn certificate_still_valid(&self, now: UnixTime) -> bool {
        if self.closed.is_cancelled() || self.retired.is_cancelled() {
            return false;
        }
        let generation = self.tls.generation();
        let known = *self.verified.lock();
        if known.generation == generation && now.as_secs() < known.until {
            return true;
        }
        let loaded = self.tls.current();
        match loaded.verify(&self.chain, &self.certificate, now) {
            Some(until) => {
                let mut verified = self.verified.lock();
                if verified.generation <= loaded.generation {
                    *verified = Verified { generation: loaded.generation, until };
                }
                true
            }
            None => {
                self.retired.cancel();
                false
            }
        }
    }

    /// Closes the connection at once, with whatever is in flight on it.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("id", &self.id)
            .field("peer", &self.peer)
            .field("certificate", &self.certificate)
            .field("resumed", &self.resumed)
            .finish_non_exhaustive()
    }
}

/// All open connections.
#[derive(Debug, Default)]
pub struct Connections {
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    next_id: AtomicU64,
}

impl Connections {
    /// Closes at once every connection for which `which` holds, and tells how many. Used when a client or its
    /// certificate is revoked.
    pub fn close_matching(&self, which: impl Fn(&Connection) -> bool) -> usize {
        let matching: Vec<_> =
            self.open.lock().values().filter(|connection| which(connection)).cloned().collect();
        for connection in &matching {
            connection.close();
        }
        matching.len()
    }

    /// Closes every connection whose chain is no longer accepted at `now`, idle ones included: to be called after
    /// [`TlsState::reload`].
    pub fn close_invalid(&self, now: UnixTime) -> usize {
        // Verification is not cheap: outside the lock.
        let all: Vec<_> = self.open.lock().values().cloned().collect();
        let invalid = all.iter().filter(|connection| !connection.certificate_still_valid(now));
        invalid.map(|connection| connection.close()).count()
    }

    /// Asks those connections to go whose chain is no longer accepted, and tells how many are going. Yields between
    /// verifications, of which there is one for each connection after a reload.
    pub(crate) async fn retire_invalid(&self, tls: &TlsState) -> usize {
        let all: Vec<_> = self.open.lock().values().cloned().collect();
        let mut going = 0;
        for connection in all {
            if !connection.certificate_still_valid(tls.now()) {
                going += 1;
            }
            tokio::task::yield_now().await;
        }
        going
    }

    /// How many connections are open whose handshake is done.
    #[must_use]
    pub fn len(&self) -> usize {
        self.open.lock().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed).saturating_add(1)
    }

    /// Registers a connection for as long as the returned value lives.
    pub(crate) fn register(self: &Arc<Self>, connection: &Arc<Connection>) -> Registered {
        self.open.lock().insert(connection.id, Arc::clone(connection));
        Registered { connections: Arc::clone(self), id: connection.id }
    }
}

/// Removes a connection from the registry when dropped.
pub(crate) struct Registered {
    connections: Arc<Connections>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.open.lock().remove(&self.id);
    }
}

/// Counts sockets in total and per address.
pub(crate) struct Sockets {
    metrics: Arc<NetMetrics>,
    max: usize,
    max_per_address: Option<usize>,
    state: Mutex<SocketCounts>,
}

#[derive(Default)]
struct SocketCounts {
    total: usize,
    per_address: HashMap<IpAddr, usize>,
}

impl Sockets {
    pub(crate) fn new(
        metrics: Arc<NetMetrics>,
        max: usize,
        max_per_address: Option<usize>,
    ) -> Arc<Self> {
        Arc::new(Self { metrics, max, max_per_address, state: Mutex::default() })
    }

    /// Room for one more socket from `peer`, or none.
    pub(crate) fn admit(self: &Arc<Self>, peer: SocketAddr) -> Option<SocketPermit> {
        let network = network(peer.ip());
        let mut state = self.state.lock();
        if state.total >= self.max {
            return None;
        }
        if let Some(max) = self.max_per_address {
            let count = state.per_address.entry(network).or_default();
            if *count >= max {
                return None;
            }
            *count += 1;
        }
        state.total += 1;
        drop(state);
        increment(&self.metrics.connections_open);
        increment(&self.metrics.connections_total);
        Some(SocketPermit { sockets: Arc::clone(self), network })
    }
}

/// One admitted socket; gives its room back when dropped.
pub(crate) struct SocketPermit {
    sockets: Arc<Sockets>,
    network: IpAddr,
}

impl Drop for SocketPermit {
    fn drop(&mut self) {
        let mut state = self.sockets.state.lock();
        state.total = state.total.saturating_sub(1);
        if self.sockets.max_per_address.is_some()
            && let Some(count) = state.per_address.get_mut(&self.network)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.per_address.remove(&self.network);
            }
        }
        drop(state);
        decrement(&self.sockets.metrics.connections_open);
    }
}

/// What counts as one address: an IPv4 address, or the /64 that an IPv6 host has to itself.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

/// Handshakes in flight, oldest first. Past the limit the oldest goes: an honest handshake takes milliseconds, a
/// stalled one its whole deadline, so the oldest is the one that stalls.
pub(crate) struct Handshakes {
    metrics: Arc<NetMetrics>,
    max: usize,
    queue: Mutex<VecDeque<(u64, CancellationToken)>>,
}

impl Handshakes {
    pub(crate) fn new(metrics: Arc<NetMetrics>, max: usize) -> Arc<Self> {
        Arc::new(Self { metrics, max, queue: Mutex::default() })
    }

    pub(crate) fn begin(self: &Arc<Self>, id: u64) -> Handshake {
        let evicted = CancellationToken::new();
        let mut queue = self.queue.lock();
        let oldest = if queue.len() >= self.max { queue.pop_front() } else { None };
        queue.push_back((id, evicted.clone()));
        drop(queue);
        if let Some((_, token)) = oldest {
            token.cancel();
        }
        increment(&self.metrics.handshakes_in_flight);
        Handshake { handshakes: Arc::clone(self), id, evicted }
    }
}

/// A handshake in flight.
pub(crate) struct Handshake {
    handshakes: Arc<Handshakes>,
    id: u64,
    pub(crate) evicted: CancellationToken,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut queue = self.handshakes.queue.lock();
        if let Some(position) = queue.iter().position(|(id, _)| *id == self.id) {
            queue.remove(position);
        }
        drop(queue);
        decrement(&self.handshakes.metrics.handshakes_in_flight);
    }
}
