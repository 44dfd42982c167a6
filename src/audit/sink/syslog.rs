//! A copy of the log at a syslog collector: RFC 5424 messages as datagrams of a Unix socket, or with
//! octet counting (RFC 6587 section 3.4.1) over a Unix stream, TCP or TLS (RFC 5425).
//!
//! Syslog acknowledges nothing: what the system has taken may be lost with the connection. So what was
//! sent in the last [`OVERLAP`] before a connection ended is sent again over the next one.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream, UnixDatagram, UnixStream};
use tokio_rustls::TlsConnector;

use super::place::{Cursor, Place};
use super::{Batch, Record};
use crate::config::sinks::{SyslogTarget, Way};
use crate::net::tls::{provider, read_certificates, read_key, read_roots};
use crate::time::Time;

/// How long what was sent is remembered as possibly lost.
const OVERLAP: Duration = Duration::from_secs(10);
/// For a connection, TLS included.
const CONNECT: Duration = Duration::from_secs(5);
/// A peer that takes nothing for so long is given up; a shorter stall ends by itself.
const GIVE_UP: Duration = Duration::from_secs(60);
/// A write that took longer tells of a peer that did not read.
const STALL: Duration = Duration::from_secs(1);
/// How often it is kept how far the sink has come.
const SAVE: Duration = Duration::from_secs(1);
/// Bytes that the system holds for a connection: with less of them, a peer that hangs shows sooner.
const SEND_BUFFER: usize = 16 * 1024;
/// The severity "informational".
const SEVERITY: u16 = 6;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

enum Connection {
    Datagrams(UnixDatagram),
    Stream(Box<dyn Stream>),
}

pub(super) struct Outlet {
    target: SyslogTarget,
    /// Where `sure` is kept.
    saved: PathBuf,
    /// How far it was sent.
    sent: Place,
    /// How far that is taken to have arrived.
    sure: Place,
    kept: Place,
    kept_at: Instant,
    /// When what was sent, younger than [`OVERLAP`].
    young: VecDeque<(Instant, Place)>,
    connection: Option<Connection>,
    host: String,
}

impl Outlet {
    pub(super) fn new(target: SyslogTarget, place: Place, saved: PathBuf) -> Self {
        Self {
            target,
            saved,
            sent: place.clone(),
            sure: place.clone(),
            kept: place,
            kept_at: Instant::now(),
            young: VecDeque::new(),
            connection: None,
            host: hostname(),
        }
    }

    pub(super) fn next(&self) -> Cursor {
        self.sent.next
    }

    pub(super) async fn put(&mut self, batch: Batch) -> Result<(), String> {
        if self.connection.as_mut().is_some_and(closed) {
            self.disconnect();
        }
        if self.connection.is_none() {
            let place = self.place();
            let connected = tokio::time::timeout(CONNECT, connect(&self.target.way)).await;
            let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let connected =
                connected.map_err(|error| format!("{place} cannot be reached: {error}"))?;
            self.connection = Some(connected);
        }
        if !batch.records.is_empty() && batch.from == self.sent.next {
            let begun = Instant::now();
            let sent = tokio::time::timeout(GIVE_UP, self.send(&batch.records)).await;
            if let Err(error) = sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                self.disconnect();
                return Err(format!("{} takes nothing: {error}", self.place()));
            }
            if begun.elapsed() >= STALL {
                // The peer did not read meanwhile: none of it is any older for that.
                self.young.iter_mut().for_each(|(at, _)| *at = Instant::now());
            }
            self.sent.advance(batch.next, batch.last);
            self.young.push_back((Instant::now(), self.sent.clone()));
        }
        while self.young.front().is_some_and(|(at, _)| at.elapsed() >= OVERLAP) {
            if let Some((_, place)) = self.young.pop_front() {
                self.sure = place;
            }
        }
        if batch.flush
            && let Some(Connection::Stream(stream)) = &mut self.connection
        {
            // So that what is on its way is not cut off with the process.
            stream.shutdown().await.ok();
        }
        if self.sure != self.kept && (batch.flush || self.kept_at.elapsed() >= SAVE) {
            let (place, path) = (self.sure.clone(), self.saved.clone());
            let saved = tokio::task::spawn_blocking(move || place.save(&path)).await;
            saved.map_err(|error| error.to_string())??;
            self.kept = self.sure.clone();
            self.kept_at = Instant::now();
        }
        Ok(())
    }

    /// Forgets the connection; what it may not have delivered is sent again.
    fn disconnect(&mut self) {
        self.connection = None;
        self.young.clear();
        self.sent = self.sure.clone();
    }

    fn place(&self) -> String {
        match &self.target.way {
            Way::Unix(socket) => socket.display().to_string(),
            Way::Tcp(address) | Way::Tls { address, .. } => address.clone(),
        }
    }

    async fn send(&mut self, records: &[Record]) -> io::Result<()> {
        let priority = u16::from(self.target.facility) * 8 + SEVERITY;
        let host = &self.host;
        let message = |record: &Record| message(priority, host, record);
        match &mut self.connection {
            Some(Connection::Datagrams(socket)) => {
                for record in records {
                    let message = message(record);
                    let length = message.len();
                    if let Err(error) = socket.send(&message).await {
                        let too_long = rustix::io::Errno::MSGSIZE.raw_os_error();
                        return Err(if error.raw_os_error() == Some(too_long) {
                            io::Error::other(format!(
                                "a message of {length} bytes is too long for a datagram; write \
                                 content = \"events\", or use a stream"
                            ))
                        } else {
                            error
                        });
                    }
                }
                Ok(())
            }
            Some(Connection::Stream(stream)) => {
                let mut bytes = Vec::new();
                for message in records.iter().map(message) {
                    bytes.extend_from_slice(format!("{} ", message.len()).as_bytes());
                    bytes.extend_from_slice(&message);
                }
                stream.write_all(&bytes).await?;
                stream.flush().await
            }
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// An RFC 5424 message without structured data. The text is JSON.
fn message(priority: u16, host: &str, record: &Record) -> Vec<u8> {
    let (time, process) = (record.time, std::process::id());
    let time = if time == Time::default() { "-".to_owned() } else { time.to_string() };
    let mut message =
        format!("<{priority}>1 {time} {host} polykey {process} audit - ").into_bytes();
    message.extend_from_slice(&record.line);
    message
}

/// The name of the machine, as a message may have it.
fn hostname() -> String {
    let name = rustix::system::uname();
    let name = name.nodename().to_string_lossy();
    let name: String = name.chars().filter(char::is_ascii_graphic).take(255).collect();
    if name.is_empty() { "-".to_owned() } else { name }
}

/// Whether the peer has closed a stream. A collector says nothing, so what it says is passed over.
fn closed(connection: &mut Connection) -> bool {
    let Connection::Stream(stream) = connection else { return false };
    let mut context = Context::from_waker(futures::task::noop_waker_ref());
    let mut buffer = [0; 512];
    loop {
        let mut buffer = ReadBuf::new(&mut buffer);
        match Pin::new(&mut **stream).poll_read(&mut context, &mut buffer) {
            Poll::Pending => return false,
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
            Poll::Ready(_) => return true,
        }
    }
}

async fn connect(way: &Way) -> io::Result<Connection> {
    match way {
        Way::Unix(path) => {
            let socket = UnixDatagram::unbound()?;
            match socket.connect(path) {
                Ok(()) => Ok(Connection::Datagrams(socket)),
                // It is one of the other type.
                Err(error)
                    if error.raw_os_error()
                        == Some(rustix::io::Errno::PROTOTYPE.raw_os_error()) =>
                {
                    let stream = UnixStream::connect(path).await?;
                    rustix::net::sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER)?;
                    Ok(Connection::Stream(Box::new(stream)))
                }
                Err(error) => Err(error),
            }
        }
        Way::Tcp(address) => Ok(Connection::Stream(Box::new(tcp(address).await?))),
        Way::Tls { address, ca, client } => {
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            // Read anew each time, so that a certificate that was renewed is taken up.
            let config = tls(ca, client.as_ref())?;
            let stream = tcp(address).await?;
            let stream = TlsConnector::from(config).connect(name, stream).await?;
            Ok(Connection::Stream(Box::new(stream)))
        }
    }
}

async fn tcp(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in tokio::net::lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_send_buffer_size(u32::try_from(SEND_BUFFER).unwrap_or(u32::MAX))?;
        socket.set_keepalive(true)?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn tls(ca: &std::path::Path, client: Option<&(PathBuf, PathBuf)>) -> io::Result<Arc<ClientConfig>> {
    let roots = read_roots(ca).map_err(io::Error::other)?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .with_root_certificates(roots);
    let config = match client {
        None => config.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = read_certificates(certificate).map_err(io::Error::other)?;
            let key = read_key(key).map_err(io::Error::other)?;
            config.with_client_auth_cert(chain, key).map_err(io::Error::other)?
        }
    };
    Ok(Arc::new(config))
}
