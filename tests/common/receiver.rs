//! A receiver of webhooks of the tests' own: keeps what it was sent, and answers, hangs or breaks off as it is told.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::PATIENCE;

/// How it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    /// With this status.
    Status(u16),
    /// Not at all.
    Hangs,
    /// By closing the connection.
    BreaksOff,
}

/// A message that came.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) raw: Bytes,
    /// Whether it was answered with success.
    pub(crate) taken: bool,
}

impl Message {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }

    pub(crate) fn id(&self) -> &str {
        self.header("webhook-id")
    }

    pub(crate) fn body(&self) -> Value {
        serde_json::from_slice(&self.raw).unwrap()
    }

    /// Its type and the key it is about.
    pub(crate) fn about(&self) -> (String, String) {
        let body = self.body();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&body["type"]), text(&body["data"]["key_id"]))
    }
}

/// A running receiver; it ends when it is dropped.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Message>>>,
    changed: Arc<tokio::sync::Notify>,
    mood: watch::Sender<Mood>,
    task: JoinHandle<()>,
}

impl Receiver {
    /// In the clear, at any port.
    pub(crate) async fn start() -> Self {
        Self::with(None).await
    }

    /// Over TLS, with the certificate of `polykey dev` in this directory.
    pub(crate) async fn with_tls(state: &Path) -> Self {
        let chain: Vec<_> = CertificateDer::pem_file_iter(state.join("server.pem"))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        let key = PrivateKeyDer::from_pem_file(state.join("server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Self::with(Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn with(tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Message>>> = Arc::default();
        let changed: Arc<tokio::sync::Notify> = Arc::default();
        let mood = watch::Sender::new(Mood::Status(200));
        let (messages, notify, moods) = (Arc::clone(&seen), Arc::clone(&changed), mood.clone());
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (seen, changed) = (Arc::clone(&messages), Arc::clone(&notify));
                let (mood, tls) = (moods.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, seen, changed, mood).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, seen, changed, mood).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, seen, changed, mood, task }
    }

    /// How it answers from now on; those who hang are answered so.
    pub(crate) fn becomes(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    /// What came so far, in its order.
    pub(crate) fn seen(&self) -> Vec<Message> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until what came is enough.
    #[track_caller]
    pub(crate) fn until<'a>(
        &'a self,
        what: &'a str,
        enough: impl Fn(&[Message]) -> bool + 'a,
    ) -> impl Future<Output = Vec<Message>> + 'a {
        let wait = async move {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let seen = self.seen();
                if enough(&seen) {
                    return seen;
                }
                changed.await;
            }
        };
        async move {
            match tokio::time::timeout(PATIENCE, wait).await {
                Ok(seen) => seen,
                Err(_) => panic!("{what}: did not come: {:#?}", self.seen()),
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    seen: Arc<Mutex<Vec<Message>>>,
    changed: Arc<tokio::sync::Notify>,
    mood: watch::Sender<Mood>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (seen, changed, mut mood) = (Arc::clone(&seen), Arc::clone(&changed), mood.subscribe());
        async move {
            let (path, headers) = (request.uri().path().to_owned(), request.headers().clone());
            let raw = request.into_body().collect().await.unwrap().to_bytes();
            let first = *mood.borrow();
            let keep = |taken| {
                let message = Message {
                    path: path.clone(),
                    headers: headers.clone(),
                    raw: raw.clone(),
                    taken,
                };
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(message);
                changed.notify_waiters();
            };
            if first == Mood::Hangs {
                keep(false);
                mood.wait_for(|mood| *mood != Mood::Hangs).await.unwrap();
            }
            let now = *mood.borrow();
            match now {
                Mood::Status(status) => {
                    let taken = (200..300).contains(&status);
                    // One that hung was kept when it came.
                    if taken || first != Mood::Hangs {
                        keep(taken);
                    }
                    let answer = Response::builder().status(status);
                    let answer = answer.header("location", "http://127.0.0.1:1/elsewhere");
                    Ok::<_, std::io::Error>(answer.body(Full::<Bytes>::default()).unwrap())
                }
                Mood::Hangs | Mood::BreaksOff => {
                    keep(false);
                    Err(std::io::Error::other("broken off, as told"))
                }
            }
        }
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    drop(builder.serve_connection(TokioIo::new(stream), service).await);
}
