//! A server with a tiny service, and a raw HTTP/2 client that says exactly what a test wants said.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Request, Response};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use polykey::net::client::{ClientFiles, ClientTls};
use polykey::net::tls::{TlsFiles, TlsState};
use polykey::net::{Connection, Listener, NetConfig, RequestId, Served, serve};
use polykey::pki::{Authority, Issued, KeyKind, Validity, write_file};
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::client::ResolvesClientCert;
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::time_provider::TimeProvider;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

/// Where the tests' clock starts: 28 December 2027.
pub(crate) const NOW: u64 = 1_830_000_000;
/// Longer than anything here takes on a loaded machine; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A clock that stands where it is put.
#[derive(Debug)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn set(&self, seconds: u64) {
        self.0.store(seconds, Ordering::SeqCst);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.load(Ordering::SeqCst))))
    }
}

pub(crate) fn validity(from: u64, until: u64) -> Validity {
    Validity::between(Duration::from_secs(from), Duration::from_secs(until))
}

/// Good on the tests' clock and on any real one until 2033.
pub(crate) fn good() -> Validity {
    validity(1_700_000_000, 2_000_000_000)
}

/// An authority whose key the tests can use for anything.
pub(crate) struct TestCa {
    pub(crate) authority: Authority,
    pub(crate) certificate: String,
    key: String,
}

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let (authority, issued) = Authority::create(name, KeyKind::P256, good()).unwrap();
        Self {
            authority,
            certificate: issued.certificate.clone(),
            key: issued.key.unwrap().to_string(),
        }
    }

    pub(crate) fn issuer(&self) -> Issuer<'static, KeyPair> {
        Issuer::from_ca_cert_pem(&self.certificate, KeyPair::from_pem(&self.key).unwrap()).unwrap()
    }

    pub(crate) fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap()
    }

    pub(crate) fn sign(&self, params: &CertificateParams) -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer()).unwrap();
        Identity::new(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
    }

    pub(crate) fn client(&self, id: &str) -> Identity {
        Identity::issued(&self.authority.client(id, KeyKind::P256, good()).unwrap())
    }
}

/// What a client presents, whether it makes sense or not.
#[derive(Debug, Clone)]
pub(crate) struct Identity(pub(crate) Option<Arc<CertifiedKey>>);

impl Identity {
    pub(crate) fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Self {
        let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
        Self::with_signer(chain, key)
    }

    pub(crate) fn with_signer(
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
    ) -> Self {
        Self(Some(Arc::new(CertifiedKey::new(chain, key))))
    }

    pub(crate) fn issued(issued: &Issued) -> Self {
        let chain = CertificateDer::pem_slice_iter(issued.certificate.as_bytes())
            .map(Result::unwrap)
            .collect();
        let key = PrivateKeyDer::from_pem_slice(issued.key.as_ref().unwrap().as_bytes()).unwrap();
        Self::new(chain, key)
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.0.as_ref().unwrap().cert.clone()
    }

    /// The same key behind another chain.
    pub(crate) fn with_chain(&self, chain: Vec<CertificateDer<'static>>) -> Self {
        Self::with_signer(chain, Arc::clone(&self.0.as_ref().unwrap().key))
    }
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

/// What the service saw and how it is steered.
pub(crate) struct Seen {
    pub(crate) paths: Mutex<Vec<String>>,
    pub(crate) peers: Mutex<HashMap<u64, Arc<Connection>>>,
    /// `/test/wait` takes one permit before it answers.
    pub(crate) gate: Semaphore,
    /// One permit for each `/test/wait` that has begun.
    pub(crate) waiting: Semaphore,
}

pub(crate) struct TestServer {
    pub(crate) address: SocketAddr,
    pub(crate) ca: TestCa,
    pub(crate) clock: Arc<Clock>,
    pub(crate) tls: Arc<TlsState>,
    pub(crate) served: Option<Served>,
    pub(crate) seen: Arc<Seen>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) directory: TempDir,
    crl_number: AtomicU64,
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl TestServer {
    pub(crate) fn start(config: NetConfig) -> Self {
        Self::start_with(config, &[], false)
    }

    /// With further authorities in PEM, and with an empty revocation list if `crl`.
    pub(crate) fn start_with(config: NetConfig, more: &[&str], crl: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ca = TestCa::new("Test authority");
        let path = |name: &str| directory.path().join(name);
        ca.authority
            .server(&["localhost", "127.0.0.1"], KeyKind::P256, good())
            .unwrap()
            .write(&path("server.pem"), &path("server.key"))
            .unwrap();
        fs::write(path("ca.pem"), format!("{}{}", ca.certificate, more.concat())).unwrap();
        if crl {
            let list =
                ca.authority.revocation_list(&[], 1, validity(NOW - 1000, NOW + 500_000)).unwrap();
            fs::write(path("crl.pem"), list).unwrap();
        }
        let files = TlsFiles {
            certificate: path("server.pem"),
            key: path("server.key"),
            client_ca: path("ca.pem"),
            crl: crl.then(|| path("crl.pem")),
        };
        let clock = Arc::new(Clock(AtomicU64::new(NOW)));
        let tls = Arc::new(
            TlsState::load_with_clock(files, Arc::clone(&clock) as Arc<dyn TimeProvider>).unwrap(),
        );
        let seen = Arc::new(Seen {
            paths: Mutex::default(),
            peers: Mutex::default(),
            gate: Semaphore::new(0),
            waiting: Semaphore::new(0),
        });
        let service = {
            let seen = Arc::clone(&seen);
            tower::service_fn(move |request| answer(Arc::clone(&seen), request))
        };
        let shutdown = CancellationToken::new();
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let served = serve(listener, config, Arc::clone(&tls), service, shutdown.clone()).unwrap();
        let address = served.local_addr();
        Self {
            address,
            ca,
            clock,
            tls,
            served: Some(served),
            seen,
            shutdown,
            directory,
            crl_number: AtomicU64::new(1),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn metrics(&self) -> polykey::net::NetSnapshot {
        self.served.as_ref().unwrap().metrics().snapshot()
    }

    /// Writes a revocation list and loads it.
    pub(crate) fn revoke(&self, serials: &[Vec<u8>]) {
        let number = self.crl_number.fetch_add(1, Ordering::SeqCst) + 1;
        let list = self
            .ca
            .authority
            .revocation_list(serials, number, validity(NOW - 1000, NOW + 500_000))
            .unwrap();
        fs::write(self.path("crl.pem"), list).unwrap();
        self.tls.reload().unwrap();
    }

    /// A client as the command line builds it.
    pub(crate) fn client_tls(&self, id: &str) -> ClientTls {
        let issued = self.ca.authority.client(id, KeyKind::P256, good()).unwrap();
        let (certificate, key) = (self.path(&format!("{id}.pem")), self.path(&format!("{id}.key")));
        issued.write(&certificate, &key).unwrap();
        let server_ca = self.path("server-ca.pem");
        write_file(&server_ca, self.ca.certificate.as_bytes(), 0o644).unwrap();
        ClientTls::load(&ClientFiles { server_ca, certificate, key }).unwrap()
    }

    /// A rustls configuration that presents `identity`.
    pub(crate) fn config(&self, identity: Identity) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca.der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_details(
            provider,
            Arc::clone(&self.clock) as Arc<dyn TimeProvider>,
        )
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_cert_resolver(Arc::new(identity));
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    pub(crate) async fn tls(
        &self,
        config: &Arc<rustls::ClientConfig>,
    ) -> Option<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = "localhost".try_into().unwrap();
        TlsConnector::from(Arc::clone(config)).connect(name, stream).await.ok()
    }

    pub(crate) async fn connect(&self, config: &Arc<rustls::ClientConfig>) -> Option<Client> {
        let stream = self.tls(config).await?;
        let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        let (executor, io) =
            (hyper_util::rt::TokioExecutor::new(), hyper_util::rt::TokioIo::new(stream));
        let (sender, connection) =
            hyper::client::conn::http2::handshake(executor, io).await.ok()?;
        let connection = tokio::spawn(async move {
            connection.await.ok();
        });
        Some(Client { sender, connection, resumed })
    }

    pub(crate) async fn raw(&self, config: &Arc<rustls::ClientConfig>) -> Raw {
        let mut stream = self.tls(config).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
        Raw { stream, next_stream: 1 }
    }

    /// A connected client with a certificate of its own.
    pub(crate) async fn client(&self, id: &str) -> Client {
        self.connect(&Arc::new(self.config(self.ca.client(id)))).await.unwrap()
    }

    /// Whether a client with this identity gets a request answered.
    pub(crate) async fn serves(&self, identity: Identity) -> bool {
        let config = Arc::new(self.config(identity));
        match self.connect(&config).await {
            Some(mut client) => client.status("/test/echo").await.as_deref() == Some("0"),
            None => false,
        }
    }

    /// Waits until the counters say `done`.
    pub(crate) async fn until(&self, done: impl Fn(&polykey::net::NetSnapshot) -> bool) {
        let wait = async {
            while !done(&self.metrics()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            panic!("never reached; counters: {:?}", self.metrics());
        }
    }
}

async fn answer(seen: Arc<Seen>, request: Request<Body>) -> Result<Response<Body>, Infallible> {
    let connection =
        request.extensions().get::<Arc<Connection>>().expect("every request has its connection");
    assert!(request.extensions().get::<RequestId>().is_some());
    let path = request.uri().path().to_owned();
    seen.peers.lock().insert(connection.id(), Arc::clone(connection));
    seen.paths.lock().push(path.clone());
    match path.as_str() {
        "/test/panic" => panic!("planted: {path}"),
        "/test/panic-body" => {
            let body = http_body_util::StreamBody::new(futures::stream::poll_fn(
                |_| -> std::task::Poll<
                    Option<Result<http_body::Frame<bytes::Bytes>, tonic::Status>>,
                > { panic!("planted in the body") },
            ));
            let mut response = Response::new(Body::new(body));
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            return Ok(response);
        }
        "/test/wait" => {
            seen.waiting.add_permits(1);
            seen.gate.acquire().await.unwrap().forget();
        }
        _ => {}
    }
    let mut response = Response::new(Body::empty());
    response.headers_mut().insert("grpc-status", "0".parse().unwrap());
    Ok(response)
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// grpc-status, from the headers or the trailers, and the request id if there was one.
    Replied(String, Option<String>),
    /// The stream or connection ended without one.
    Cut,
}

/// A plain HTTP/2 client over one TLS connection.
pub(crate) struct Client {
    sender: hyper::client::conn::http2::SendRequest<http_body_util::Empty<bytes::Bytes>>,
    connection: tokio::task::JoinHandle<()>,
    pub(crate) resumed: bool,
}

impl Client {
    /// Sends at once; the reply is awaited by the returned future.
    pub(crate) fn ask(&mut self, path: &str) -> impl Future<Output = Answer> + Send + use<> {
        let request = Request::post(format!("https://localhost{path}"))
            .header("polykey-request-id", "from-the-test")
            .body(http_body_util::Empty::new())
            .unwrap();
        let reply = self.sender.send_request(request);
        async move {
            let read = async {
                let Ok(response) = reply.await else { return Answer::Cut };
                let (parts, body) = response.into_parts();
                let Ok(body) = body.collect().await else { return Answer::Cut };
                let none = http::HeaderMap::new();
                let trailers = body.trailers().unwrap_or(&none);
                let text = |name| {
                    parts
                        .headers
                        .get(name)
                        .or(trailers.get(name))
                        .map(|value| value.to_str().unwrap().to_owned())
                };
                text("grpc-status").map_or(Answer::Cut, |status| {
                    Answer::Replied(status, text("polykey-request-id"))
                })
            };
            tokio::time::timeout(PATIENCE, read)
                .await
                .expect("the server neither answers nor closes")
        }
    }

    /// The grpc-status of the reply, or nothing.
    pub(crate) async fn status(&mut self, path: &str) -> Option<String> {
        match self.ask(path).await {
            Answer::Replied(status, _) => Some(status),
            Answer::Cut => None,
        }
    }

    /// Waits until the server has closed the connection.
    pub(crate) async fn closed(&mut self) {
        tokio::time::timeout(PATIENCE, &mut self.connection)
            .await
            .expect("the server does not close")
            .unwrap();
    }
}

/// An HTTP/2 client that writes its own frames.
pub(crate) struct Raw {
    pub(crate) stream: TlsStream<TcpStream>,
    pub(crate) next_stream: u32,
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::from(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

/// Header fields as HPACK literals without indexing and without Huffman coding (RFC 7541 §6.2.2).
pub(crate) fn hpack(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        assert!(name.len() < 127 && value.len() < 127);
        out.extend([0, name.len() as u8]);
        out.extend(*name);
        out.push(value.len() as u8);
        out.extend(*value);
    }
    out
}

impl Raw {
    pub(crate) async fn send(&mut self, path: &[u8]) -> u32 {
        let stream = self.next_stream;
        self.next_stream += 2;
        let block = hpack(&[
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", b"localhost"),
            (b":path", path),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        ]);
        // END_STREAM | END_HEADERS; a connection that is closing already shows when it is read.
        self.stream.write_all(&frame(1, 5, stream, &block)).await.ok();
        stream
    }

    /// Waits for the headers of a reply (true), or for the reset of the stream or the end of the connection (false).
    pub(crate) async fn replied(&mut self, stream: u32) -> bool {
        loop {
            match self.frame().await {
                Some((1, _, id, _)) if id == stream => return true,
                Some((3, _, id, _)) if id == stream => return false,
                None => return false,
                Some(_) => {}
            }
        }
    }

    /// The next frame; SETTINGS and PING are acknowledged on the way.
    pub(crate) async fn frame(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let read = async {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; length];
            self.stream.read_exact(&mut payload).await.ok()?;
            let (kind, flags) = (head[3], head[4]);
            let id = u32::from_be_bytes(head[5..9].try_into().unwrap()) & 0x7fff_ffff;
            match kind {
                4 if flags & 1 == 0 => {
                    self.stream.write_all(&frame(4, 1, 0, &[])).await.unwrap_or(())
                }
                6 if flags & 1 == 0 => {
                    self.stream.write_all(&frame(6, 1, 0, &payload)).await.unwrap_or(())
                }
                _ => {}
            }
            Some((kind, flags, id, payload))
        };
        tokio::time::timeout(PATIENCE, read).await.expect("the server neither answers nor closes")
    }

    /// Reads until the connection ends, and tells whether a GOAWAY came.
    pub(crate) async fn closed(&mut self) -> bool {
        let mut goaway = false;
        while let Some((kind, ..)) = self.frame().await {
            goaway |= kind == 7;
        }
        goaway
    }
}
