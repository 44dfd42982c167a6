//! The way to a collector: OTLP over gRPC or HTTP, in the clear or over TLS.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_client::LogsServiceClient;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use polykey_proto::google::rpc;
use prost::Message;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;
use zeroize::Zeroizing;

use crate::config::telemetry::{Collector, Protocol};
use crate::metrics::calls::word;
use crate::net::tls::{ALPN_H2, provider, roots_in};
use crate::telemetry::TelemetryError;

/// Largest answer that is read.
const ANSWER: usize = 64 * 1024;
/// Longest text of a collector's that goes into the log.
const WORDS: usize = 200;

/// What came from references, in their place.
#[derive(Default)]
pub struct Secrets {
    /// The authorities of the collector, PEM.
    pub ca: Option<Zeroizing<Vec<u8>>>,
    /// Values of headers, by their names.
    pub headers: Vec<(String, Zeroizing<String>)>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Secrets").field("headers", &names).finish_non_exhaustive()
    }
}

/// What is sent at once.
#[derive(Clone, Debug)]
pub enum Batch {
    /// Spans.
    Traces(ExportTraceServiceRequest),
    /// Figures.
    Metrics(ExportMetricsServiceRequest),
    /// Lines of the log.
    Logs(ExportLogsServiceRequest),
}

/// Why a batch was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It may be, later: when the collector says, if it says so.
    Later(String, Option<Duration>),
    /// It never will be.
    Never(String),
}

/// What connections are made with.
#[derive(Clone)]
struct Connector {
    tls: Option<(TlsConnector, ServerName<'static>)>,
    host: String,
    port: u16,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type Connected = TokioIo<Box<dyn Stream>>;

impl Connector {
    async fn connect(&self) -> io::Result<Connected> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(stream),
            Some((tls, name)) => Box::new(tls.connect(name.clone(), stream).await?),
        };
        Ok(TokioIo::new(stream))
    }
}

impl Service<Uri> for Connector {
    type Response = Connected;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Connected>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect().await })
    }
}

#[derive(Clone)]
enum Way {
    Grpc(Channel),
    Http { connector: Connector, endpoint: Uri },
}

/// The way to a collector, for one signal.
pub struct Sender {
    way: Way,
    /// The open connection of OTLP/HTTP.
    open: Option<SendRequest<Full<Bytes>>>,
    headers: Arc<Vec<(HeaderName, Zeroizing<String>)>>,
    timeout: Duration,
}

impl Clone for Sender {
    fn clone(&self) -> Self {
        let (way, headers) = (self.way.clone(), Arc::clone(&self.headers));
        Self { way, open: None, headers, timeout: self.timeout }
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

fn tls(settings: &Collector, secrets: &Secrets) -> Result<TlsConnector, TelemetryError> {
    let roots = match (&settings.ca, &secrets.ca) {
        (Some((path, _)), Some(text)) => roots_in(path, text)?,
        _ => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err(TelemetryError::NoAuthorities);
            }
            roots
        }
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TelemetryError::Unusable { what: "TLS", why: error.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = match settings.protocol {
        Protocol::Grpc => vec![ALPN_H2.to_vec()],
        Protocol::Http => vec![b"http/1.1".to_vec()],
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

impl Sender {
    /// A way that connects when it is first used. Needs a runtime.
    ///
    /// # Errors
    /// [`TelemetryError`] if the authorities or a header cannot be used.
    pub fn new(settings: &Collector, secrets: Secrets) -> Result<Self, TelemetryError> {
        let unusable = |what, why: &str| TelemetryError::Unusable { what, why: why.to_owned() };
        let endpoint = &settings.endpoint;
        let host = endpoint.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = endpoint.port_u16().unwrap_or(4317);
        let tls = if settings.tls() {
            let name = ServerName::try_from(host.clone())
                .map_err(|_| unusable("endpoint", "its host is neither a name nor an address"))?;
            Some((tls(settings, &secrets)?, name))
        } else {
            None
        };
        let mut headers = Vec::new();
        for (name, value) in secrets.headers {
            let name = HeaderName::from_bytes(name.as_bytes());
            let name = name.map_err(|_| unusable("headers", "not the name of a header"))?;
            if HeaderValue::from_str(&value).is_err() {
                return Err(unusable(
                    "headers",
                    "a value has characters that a header cannot have",
                ));
            }
            headers.push((name, value));
        }
        let connector = Connector { tls, host, port };
        let way = match settings.protocol {
            Protocol::Grpc => {
                let endpoint = Endpoint::from(endpoint.clone()).connect_timeout(settings.timeout);
                Way::Grpc(endpoint.connect_with_connector_lazy(connector))
            }
            Protocol::Http => Way::Http { connector, endpoint: endpoint.clone() },
        };
        Ok(Self { way, open: None, headers: Arc::new(headers), timeout: settings.timeout })
    }

    /// Sends a batch; how much of it the collector did not take.
    ///
    /// # Errors
    /// Why it was not taken.
    pub async fn send(&mut self, batch: &Batch) -> Result<u64, Refusal> {
        let limit = self.timeout;
        let sent = match &self.way {
            Way::Grpc(channel) => {
                let channel = channel.clone();
                tokio::time::timeout(limit, self.by_grpc(channel, batch)).await
            }
            Way::Http { .. } => tokio::time::timeout(limit, self.by_http(batch)).await,
        };
        sent.unwrap_or_else(|_| {
            // An answer that comes late would be taken for that of the next request.
            self.open = None;
            Err(Refusal::Later("no answer in time".into(), None))
        })
    }

    fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut headers = HeaderMap::new();
        self.put_headers(&mut headers);
        let metadata = tonic::metadata::MetadataMap::from_headers(headers);
        tonic::Request::from_parts(metadata, tonic::Extensions::default(), message)
    }

    fn put_headers(&self, headers: &mut HeaderMap) {
        for (name, value) in self.headers.iter() {
            // It was tried when it was read.
            if let Ok(mut value) = HeaderValue::from_str(value) {
                value.set_sensitive(true);
                headers.insert(name.clone(), value);
            }
        }
    }

    async fn by_grpc(&self, channel: Channel, batch: &Batch) -> Result<u64, Refusal> {
        let rejected = match batch.clone() {
            Batch::Traces(spans) => {
                let answer = TraceServiceClient::new(channel).export(self.request(spans)).await;
                answer.map(|a| a.into_inner().partial_success.map_or(0, |p| p.rejected_spans))
            }
            Batch::Metrics(figures) => {
                let answer = MetricsServiceClient::new(channel).export(self.request(figures)).await;
                answer.map(|a| a.into_inner().partial_success.map_or(0, |p| p.rejected_data_points))
            }
            Batch::Logs(lines) => {
                let answer = LogsServiceClient::new(channel).export(self.request(lines)).await;
                answer.map(|a| a.into_inner().partial_success.map_or(0, |p| p.rejected_log_records))
            }
        };
        match rejected {
            Ok(rejected) => Ok(u64::try_from(rejected).unwrap_or(0)),
            Err(status) => Err(refused(&status)),
        }
    }

    async fn by_http(&mut self, batch: &Batch) -> Result<u64, Refusal> {
        let Way::Http { connector, endpoint } = &self.way else {
            return Err(Refusal::Never("not over HTTP".into()));
        };
        let (signal, body) = match batch {
            Batch::Traces(spans) => ("traces", spans.encode_to_vec()),
            Batch::Metrics(figures) => ("metrics", figures.encode_to_vec()),
            Batch::Logs(lines) => ("logs", lines.encode_to_vec()),
        };
        let away = |error: &dyn std::fmt::Display| Refusal::Later(shown(&error.to_string()), None);
        let mut open = match self.open.take().filter(|open| !open.is_closed()) {
            Some(open) => open,
            None => {
                let stream = connector.connect().await.map_err(|error| away(&error))?;
                let (open, connection) = handshake(stream).await.map_err(|error| away(&error))?;
                // It ends with the sender, or when the collector closes it.
                tokio::spawn(async move { drop(connection.await) });
                open
            }
        };
        open.ready().await.map_err(|error| away(&error))?;
        let path = format!("{}/v1/{signal}", endpoint.path().trim_end_matches('/'));
        let authority = endpoint.authority().map_or("", |authority| authority.as_str());
        let mut request = Request::post(path)
            .header(HOST, authority)
            .header(CONTENT_TYPE, "application/x-protobuf")
            .body(Full::from(body))
            .map_err(|error| Refusal::Never(shown(&error.to_string())))?;
        self.put_headers(request.headers_mut());
        let answer = open.send_request(request).await.map_err(|error| away(&error))?;
        let wait = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let wait = wait.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let (status, body) = (answer.status(), answer.into_body());
        let body = Limited::new(body, ANSWER).collect().await.map_err(|error| away(&error))?;
        self.open = Some(open);
        match status {
            // The answers of all signals have the same fields.
            StatusCode::OK => Ok(ExportTraceServiceResponse::decode(body.to_bytes())
                .ok()
                .and_then(|answer| u64::try_from(answer.partial_success?.rejected_spans).ok())
                .unwrap_or(0)),
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Err(Refusal::Later(format!("HTTP {status}"), wait)),
            _ => Err(Refusal::Never(format!("HTTP {status}"))),
        }
    }
}

/// What a status means for a batch (the OTLP specification, "Failures").
fn refused(status: &tonic::Status) -> Refusal {
    let code = status.code();
    let text = format!("{}: {}", word(code), shown(status.message()));
    if std::error::Error::source(status).is_some() {
        // Not the collector's answer: the connection broke.
        return Refusal::Later(text, None);
    }
    let wait = retry_info(status.details());
    match code {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => Refusal::Later(text, wait),
        // It recovers only where the collector says so.
        Code::ResourceExhausted if wait.is_some() => Refusal::Later(text, wait),
        _ => Refusal::Never(text),
    }
}

/// How long a collector wants to be left alone: the `RetryInfo` among the details of a status.
fn retry_info(details: &[u8]) -> Option<Duration> {
    const TYPE: &str = "type.googleapis.com/google.rpc.RetryInfo";
    let status = rpc::Status::decode(details).ok()?;
    let info = status.details.iter().find(|any| any.type_url == TYPE)?;
    let delay = rpc::RetryInfo::decode(info.value.as_slice()).ok()?.retry_delay?;
    Duration::try_from(delay).ok()
}

/// A stranger's words, cut and without what would not stand in a line.
fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(WORDS).collect()
}
