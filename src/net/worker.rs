//! A worker: one thread, one runtime, the connections dealt to it, from the TLS handshake to the last reply.

use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::HandshakeKind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tower::Service;

use super::config::NetConfig;
use super::connection::{Connection, Connections, Handshakes, SocketPermit};
use super::metrics::increment;
use super::request::{Gate, handle};
use super::tls::ALPN_H2;

/// The client connection preface (RFC 9113 §3.4).
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Time for what is in flight on a connection whose certificate is no longer accepted.
const RETIRE_GRACE: Duration = Duration::from_secs(5);
/// How long a peer with nothing in flight may take to answer the goodbye of a drain.
const SILENCE: Duration = Duration::from_secs(2);

/// A socket on its way from the acceptor to a worker.
pub(crate) struct Dealt {
    pub(crate) stream: std::net::TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) permit: SocketPermit,
}

/// What all workers share.
pub(crate) struct Shared {
    pub(crate) config: NetConfig,
    pub(crate) gate: Arc<Gate>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) handshakes: Arc<Handshakes>,
    /// Cancelled when the server stops: no new connections, GOAWAY on the open ones.
    pub(crate) drain: CancellationToken,
    /// Cancelled at the deadline of the drain.
    pub(crate) abort: CancellationToken,
    pub(crate) aborted_connections: AtomicUsize,
    pub(crate) aborted_requests: AtomicUsize,
}

/// Serves what is dealt until the acceptor has gone and the last connection is closed or aborted.
pub(crate) async fn run<S, E>(
    shared: Arc<Shared>,
    mut sockets: mpsc::UnboundedReceiver<Dealt>,
    service: S,
) where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = E>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            dealt = sockets.recv() => match dealt {
                Some(dealt) => {
                    open.spawn(serve_socket(Arc::clone(&shared), dealt, service.clone()));
                }
                None => break,
            },
            Some(_) = open.join_next() => {}
        }
    }
    while open.join_next().await.is_some() {}
}

async fn serve_socket<S, E>(shared: Arc<Shared>, dealt: Dealt, service: S)
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = E>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let Dealt { stream, peer, permit } = dealt;
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    if let Some((connection, stream)) = establish(&shared, stream, peer).await {
        serve_connection(&shared, Arc::new(connection), stream, service).await;
    }
    drop(permit);
}

/// TLS and the HTTP/2 preface, under one deadline and one right to be cut off for newer peers.
async fn establish(
    shared: &Shared,
    stream: TcpStream,
    peer: SocketAddr,
) -> Option<(Connection, Prefaced)> {
    let metrics = &shared.gate.metrics;
    let id = shared.connections.next_id();
    let handshake = shared.handshakes.begin(id);
    let deadline = Instant::now() + shared.config.handshake_timeout;
    let outcome = tokio::select! {
        biased;
        () = shared.drain.cancelled() => return None,
        () = handshake.evicted.cancelled() => {
            increment(&metrics.handshakes_evicted);
            Err("cut off for newer connections")
        }
        done = shake_hands(shared, id, stream, peer) => done,
        () = sleep_until(deadline) => {
            increment(&metrics.handshakes_timed_out);
            Err("timed out")
        }
    };
    match outcome {
        Ok(established) => Some(established),
        Err(reason) => {
            increment(&metrics.handshakes_failed);
            tracing::debug!(connection = id, %peer, reason, "handshake failed");
            None
        }
    }
}

async fn shake_hands(
    shared: &Shared,
    id: u64,
    stream: TcpStream,
    peer: SocketAddr,
) -> Result<(Connection, Prefaced), &'static str> {
    let metrics = &shared.gate.metrics;
    let tls = &shared.gate.tls;
    let loaded = tls.current();
    let acceptor = TlsAcceptor::from(Arc::clone(&loaded.server));
    // rustls sends the alert that names the reason before this returns.
    let mut stream = acceptor.accept(stream).await.map_err(|_| "TLS")?;
    let session = stream.get_ref().1;
    if session.alpn_protocol() != Some(ALPN_H2) {
        return Err("the peer did not offer h2");
    }
    let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let chain = session.peer_certificates().ok_or("no client certificate")?;
    let chain = chain.iter().map(|der| der.clone().into_owned()).collect();
    let Some(connection) = Connection::new(id, peer, chain, resumed, tls, &loaded) else {
        increment(&metrics.certificates_refused);
        return Err("the resumed certificate is no longer accepted");
    };
    if resumed {
        increment(&metrics.handshakes_resumed);
    }
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await.map_err(|_| "closed before the HTTP/2 preface")?;
    if preface != PREFACE {
        return Err("not HTTP/2");
    }
    Ok((connection, Prefaced { stream, given: 0 }))
}

/// Serves one connection until it ends, is asked to go and goes, or is cut off.
async fn serve_connection<S, E>(
    shared: &Arc<Shared>,
    connection: Arc<Connection>,
    stream: Prefaced,
    service: S,
) where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = E>
        + Clone
        + Send
        + 'static,
    S::Future: Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let config = &shared.config;
    let _registered = shared.connections.register(&connection);
    // The material may have been reloaded between the handshake and the registration, which `close_invalid` walks.
    if !connection.certificate_still_valid(shared.gate.tls.now()) {
        increment(&shared.gate.metrics.certificates_refused);
        return;
    }
    let requests = {
        let (gate, connection) = (Arc::clone(&shared.gate), Arc::clone(&connection));
        service_fn(move |request| {
            handle(Arc::clone(&gate), Arc::clone(&connection), service.clone(), request)
        })
    };
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.max_streams)
        .max_header_list_size(config.max_header_bytes)
        .max_pending_accept_reset_streams(config.max_pending_resets)
        .keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), requests));

    let forever = Instant::now() + Duration::from_secs(86_400 * 365 * 30);
    let mut age =
        pin!(sleep_until(config.max_age.map_or(forever, |age| Instant::now() + jittered(age))));
    let mut end = pin!(sleep_until(forever));
    let mut silence = pin!(sleep_until(forever));
    let (mut leaving, mut draining) = (false, false);
    loop {
        let grace = tokio::select! {
            biased;
            () = connection.closed.cancelled() => break,
            () = shared.abort.cancelled() => {
                shared.aborted_connections.fetch_add(1, Ordering::Relaxed);
                shared.aborted_requests.fetch_add(connection.requests_in_flight(), Ordering::Relaxed);
                break;
            }
            () = &mut end => break,
            _ = serving.as_mut() => break,
            () = &mut silence => {
                // What has just been read is counted once it has begun.
                tokio::task::yield_now().await;
                let ended = serving.as_mut().now_or_never().is_some();
                tokio::task::yield_now().await;
                // Whoever has asked for nothing and does not answer the goodbye is suspended, or gone.
                if ended || connection.requests_in_flight() == 0 {
                    break;
                }
                silence.as_mut().reset(Instant::now() + SILENCE);
                continue;
            }
            // The drain's own deadline is `abort`.
            () = shared.drain.cancelled(), if !draining => {
                draining = true;
                silence.as_mut().reset(Instant::now() + SILENCE);
                None
            }
            () = connection.retired.cancelled(), if !leaving => Some(RETIRE_GRACE),
            () = &mut age, if !leaving => Some(config.max_age_grace),
        };
        if !std::mem::replace(&mut leaving, true) {
            serving.as_mut().graceful_shutdown();
        }
        if let Some(grace) = grace {
            end.as_mut().reset(Instant::now() + grace);
        }
    }
    // Requests still running on this connection see themselves cut off.
    connection.close();
}

/// `age` give or take a tenth, so that connections made together do not all return together.
fn jittered(age: Duration) -> Duration {
    let mut random = [0; 2];
    if aws_lc_rs::rand::fill(&mut random).is_err() {
        return age;
    }
    let share = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX);
    age.mul_f64(0.9 + 0.2 * share)
}

/// A TLS stream whose preface has been read already, and is read once more by the HTTP/2 layer.
pub(crate) struct Prefaced {
    stream: TlsStream<TcpStream>,
    given: usize,
}

impl AsyncRead for Prefaced {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match PREFACE.get(this.given..) {
            Some(rest) if !rest.is_empty() => {
                let n = rest.len().min(buf.remaining());
                buf.put_slice(rest.get(..n).unwrap_or_default());
                this.given += n;
                Poll::Ready(Ok(()))
            }
            _ => Pin::new(&mut this.stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Prefaced {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
