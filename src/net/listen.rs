//! The listening socket, the acceptor that deals connections out, and the drain.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

use super::config::{NetConfig, NetConfigError};
use super::connection::{Connections, Handshakes, Sockets};
use super::metrics::{NetMetrics, increment};
use super::request::Gate;
use super::tls::TlsState;
use super::worker::{self, Dealt, Shared};

/// Connections the kernel completes before they are accepted.
const BACKLOG: i32 = 1024;
/// Waits after an error of `accept` that is not the peer's: doubled from the first to the last.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// Time for a worker to drop what was aborted.
const ABORT_GRACE: Duration = Duration::from_secs(2);

/// Why the network layer does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The limits contradict each other.
    #[error(transparent)]
    Config(#[from] NetConfigError),
    /// The system gives no thread or event queue.
    #[error("cannot start the network threads: {0}")]
    Threads(#[source] io::Error),
}

/// A bound socket that does not accept yet. Peers that connect wait in the kernel's queue.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// [`NetError::Bind`] with what the system said.
    pub fn bind(address: SocketAddr) -> Result<Self, NetError> {
        let bind = || {
            let socket = TcpListener::bind(address)?;
            // std listens with a short queue; a second listen(2) lengthens it.
            rustix::net::listen(&socket, BACKLOG)?;
            Self::from_std(socket)
        };
        bind().map_err(|source| NetError::Bind { address, source })
    }

    /// Takes over a socket that listens already, for instance one inherited from the service manager.
    ///
    /// # Errors
    /// What the system says when it is no listening socket.
    pub fn from_std(socket: TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address })
    }

    /// The address actually bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }
}

/// A running server side. Dropping it stops nothing: that is what the shutdown token is for.
#[derive(Debug)]
pub struct Served {
    address: SocketAddr,
    metrics: Arc<NetMetrics>,
    connections: Arc<Connections>,
    report: oneshot::Receiver<DrainReport>,
}

/// How the drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DrainReport {
    /// Connections cut off at the deadline.
    pub connections_aborted: usize,
    /// Requests in flight on them.
    pub requests_aborted: usize,
    /// Workers that did not come back even then: a service blocks its thread.
    pub workers_stuck: usize,
    /// From the shutdown to the end.
    pub elapsed: Duration,
}

impl Served {
    /// The address being served.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// The live counters.
    #[must_use]
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.metrics
    }

    /// The open connections.
    #[must_use]
    pub fn connections(&self) -> &Arc<Connections> {
        &self.connections
    }

    /// Waits until the server has stopped, which the shutdown token starts.
    pub async fn drained(self) -> DrainReport {
        self.report.await.unwrap_or_default()
    }
}

/// Starts the threads and serves `service` until `shutdown` is cancelled and the drain is over.
///
/// Needs no runtime of the caller's: acceptor and workers have their own. Each clone of `service` answers one request,
/// on the worker that has the connection.
///
/// # Errors
/// Limits that contradict each other, or a system without threads to give.
pub fn serve<S, E>(
    listener: Listener,
    config: NetConfig,
    tls: Arc<TlsState>,
    service: S,
    shutdown: CancellationToken,
) -> Result<Served, NetError>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = E>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    config.validate()?;
    let metrics = Arc::new(NetMetrics::default());
    let connections = Arc::new(Connections::default());
    let sockets = Sockets::new(
        Arc::clone(&metrics),
        config.max_connections,
        config.max_connections_per_address,
    );
    let shared = Arc::new(Shared {
        gate: Arc::new(Gate::new(Arc::clone(&metrics), tls, config.max_requests)),
        connections: Arc::clone(&connections),
        handshakes: Handshakes::new(Arc::clone(&metrics), config.max_handshakes),
        drain: CancellationToken::new(),
        abort: CancellationToken::new(),
        aborted_connections: AtomicUsize::new(0),
        aborted_requests: AtomicUsize::new(0),
        config,
    });

    let count = shared
        .config
        .workers
        .unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let mut workers = Vec::with_capacity(count);
    for index in 0..count {
        workers.push(start_worker(index, &shared, service.clone()).map_err(NetError::Threads)?);
    }

    let (reply, report) = oneshot::channel();
    let address = listener.address;
    let acceptor = Acceptor { sockets, metrics: Arc::clone(&metrics), workers, next: 0 };
    let runtime = runtime(1).map_err(NetError::Threads)?;
    let body = move || {
        let report = runtime
            .block_on(async move { accept_until(acceptor, listener, shared, shutdown).await });
        // The caller may have lost interest in the report.
        reply.send(report).ok();
    };
    thread::Builder::new().name("polykey-accept".into()).spawn(body).map_err(NetError::Threads)?;
    Ok(Served { address, metrics, connections, report })
}

struct Worker {
    sockets: mpsc::UnboundedSender<Dealt>,
    ended: oneshot::Receiver<()>,
}

fn runtime(blocking_threads: usize) -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(blocking_threads)
        .build()
}

fn start_worker<S, E>(index: usize, shared: &Arc<Shared>, service: S) -> io::Result<Worker>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = E>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let (sockets, dealt) = mpsc::unbounded_channel();
    let (end, ended) = oneshot::channel();
    let runtime = runtime(shared.config.blocking_threads)?;
    let shared = Arc::clone(shared);
    thread::Builder::new().name(format!("polykey-net-{index}")).spawn(move || {
        runtime.block_on(worker::run(shared, dealt, service));
        // Drops every future that is left, and gives blocking work a moment to finish.
        runtime.shutdown_timeout(ABORT_GRACE / 4);
        end.send(()).ok();
    })?;
    Ok(Worker { sockets, ended })
}

struct Acceptor {
    sockets: Arc<Sockets>,
    metrics: Arc<NetMetrics>,
    workers: Vec<Worker>,
    next: usize,
}

impl Acceptor {
    /// Hands a socket to the next worker in turn, or closes it when there is no room.
    fn deal(&mut self, stream: tokio::net::TcpStream, peer: SocketAddr) {
        let Some(permit) = self.sockets.admit(peer) else {
            increment(&self.metrics.connections_refused);
            return;
        };
        let stream = stream.set_nodelay(true).and_then(|()| stream.into_std());
        let Ok(stream) = stream else { return };
        let mut dealt = Dealt { stream, peer, permit };
        // A worker that ended (it cannot, short of a bug) is passed over.
        for _ in 0..self.workers.len() {
            self.next = (self.next + 1) % self.workers.len().max(1);
            let Some(worker) = self.workers.get(self.next) else { return };
            match worker.sockets.send(dealt) {
                Ok(()) => return,
                Err(returned) => dealt = returned.0,
            }
        }
    }
}

async fn accept_until(
    mut acceptor: Acceptor,
    listener: Listener,
    shared: Arc<Shared>,
    shutdown: CancellationToken,
) -> DrainReport {
    match tokio::net::TcpListener::from_std(listener.socket) {
        Ok(socket) => {
            let metrics = Arc::clone(&acceptor.metrics);
            let accept = async || socket.accept().await;
            let dealing = accept_loop(accept, &metrics, |stream, peer| acceptor.deal(stream, peer));
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {}
                () = dealing => {}
                () = recheck(&shared) => {}
            }
        }
        Err(error) => {
            tracing::error!(%error, "the listening socket cannot be used");
        }
    }
    drain(acceptor, &shared).await
}

/// Looks at the chains of all connections, for ever.
async fn recheck(shared: &Shared) {
    let mut interval = tokio::time::interval(shared.config.recheck_interval);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let going = shared.connections.retire_invalid(&shared.gate.tls).await;
        if going > 0 {
            tracing::info!(connections = going, "client certificates are no longer accepted");
        }
    }
}

/// Accepts for ever: no error ends it. An error that belongs to one peer is skipped, any other (no descriptors, no
/// memory) is followed by a growing wait.
async fn accept_loop<T, F>(
    mut accept: impl AsyncFnMut() -> io::Result<(T, SocketAddr)>,
    metrics: &NetMetrics,
    mut deal: F,
) where
    F: FnMut(T, SocketAddr),
{
    use io::ErrorKind::{
        ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, PermissionDenied,
        WouldBlock,
    };

    let mut wait = BACKOFF.0;
    loop {
        match accept().await {
            Ok((stream, peer)) => {
                wait = BACKOFF.0;
                deal(stream, peer);
            }
            Err(error) => {
                increment(&metrics.accept_errors);
                let the_peers = [
                    ConnectionAborted,
                    ConnectionRefused,
                    ConnectionReset,
                    Interrupted,
                    PermissionDenied,
                    WouldBlock,
                ];
                if the_peers.contains(&error.kind()) {
                    tokio::task::yield_now().await;
                    continue;
                }
                tracing::warn!(%error, wait_ms = wait.as_millis() as u64, "cannot accept connections");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(BACKOFF.1);
            }
        }
    }
}

async fn drain(acceptor: Acceptor, shared: &Shared) -> DrainReport {
    let started = Instant::now();
    shared.drain.cancel();
    // Dropping the senders tells the workers that no more sockets will come.
    let mut ended: Vec<_> = acceptor.workers.into_iter().map(|worker| worker.ended).collect();
    wait_for(&mut ended, tokio::time::sleep(shared.config.drain_timeout)).await;
    shared.abort.cancel();
    wait_for(&mut ended, tokio::time::sleep(ABORT_GRACE)).await;
    DrainReport {
        connections_aborted: shared.aborted_connections.load(Ordering::Relaxed),
        requests_aborted: shared.aborted_requests.load(Ordering::Relaxed),
        workers_stuck: ended.len(),
        elapsed: started.elapsed(),
    }
}

/// Waits until all workers have ended or `deadline` is over; those that have not stay in the list.
async fn wait_for(workers: &mut Vec<oneshot::Receiver<()>>, deadline: impl Future<Output = ()>) {
    let mut deadline = std::pin::pin!(deadline);
    while let Some(worker) = workers.last_mut() {
        tokio::select! {
            _ = worker => {
                workers.pop();
            }
            () = &mut deadline => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_error_of_accept_ends_the_loop() {
        let metrics = NetMetrics::default();
        let peer: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let mut script = vec![
            Err(io::Error::from_raw_os_error(24)), // EMFILE
            Err(io::Error::from_raw_os_error(23)), // ENFILE
            Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(1),
            Err(io::Error::from_raw_os_error(12)), // ENOMEM
            Err(io::Error::other("unheard of")),
            Ok(2),
        ]
        .into_iter();
        let (sender, mut dealt) = mpsc::unbounded_channel();
        let accept = async || match script.next() {
            Some(step) => step.map(|value| (value, peer)),
            None => std::future::pending().await,
        };
        let both = async {
            assert_eq!(dealt.recv().await, Some(1));
            assert_eq!(dealt.recv().await, Some(2));
        };
        tokio::select! {
            () = accept_loop(accept, &metrics, |value, _| sender.send(value).unwrap()) => unreachable!(),
            () = both => {}
        }
        assert_eq!(metrics.snapshot().accept_errors, 5);
    }
}
