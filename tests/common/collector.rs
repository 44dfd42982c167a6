//! A collector of the tests' own: takes OTLP over gRPC and HTTP, in the clear or over TLS, and keeps what it was sent.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{
    LogsService, LogsServiceServer,
};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::Metric;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Response as Answer, Status};
use tower::Service;

use super::PATIENCE;

/// What a collector was sent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) spans: Vec<Span>,
    /// The figures of the last batch.
    pub(crate) metrics: Vec<Metric>,
    pub(crate) lines: Vec<LogRecord>,
    pub(crate) resources: Vec<Resource>,
    /// The path and the headers of each request.
    pub(crate) requests: Vec<(String, HeaderMap)>,
    /// The bodies that came over HTTP, one after the other.
    pub(crate) raw: Vec<u8>,
}

#[derive(Clone, Default)]
struct Sink {
    seen: Arc<Mutex<Seen>>,
    changed: Arc<tokio::sync::Notify>,
    /// What the next batches of lines are answered with.
    answers: Arc<Mutex<VecDeque<Answered>>>,
}

/// An answer to a batch of lines.
#[derive(Clone, Debug)]
pub(crate) enum Answered {
    /// Taken, but for so many records.
    Without(i64),
    /// Refused by gRPC.
    Status(Status),
    /// Refused over HTTP, with `Retry-After` if there is one.
    Http(u16, Option<u64>),
}

impl Sink {
    fn answer(&self) -> Option<Answered> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn with<T>(&self, f: impl FnOnce(&mut Seen) -> T) -> T {
        let out = f(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_waiters();
        out
    }

    fn traces(&self, request: ExportTraceServiceRequest) {
        self.with(|seen| {
            for all in request.resource_spans {
                seen.resources.extend(all.resource);
                seen.spans.extend(all.scope_spans.into_iter().flat_map(|scope| scope.spans));
            }
        });
    }

    fn metrics(&self, request: ExportMetricsServiceRequest) {
        self.with(|seen| {
            for all in request.resource_metrics {
                seen.resources.extend(all.resource);
                seen.metrics =
                    all.scope_metrics.into_iter().flat_map(|scope| scope.metrics).collect();
            }
        });
    }

    fn logs(&self, request: ExportLogsServiceRequest) {
        self.with(|seen| {
            for all in request.resource_logs {
                seen.resources.extend(all.resource);
                seen.lines.extend(all.scope_logs.into_iter().flat_map(|scope| scope.log_records));
            }
        });
    }
}

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<Answer<ExportTraceServiceResponse>, Status> {
        self.traces(request.into_inner());
        Ok(Answer::new(Default::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        request: tonic::Request<ExportMetricsServiceRequest>,
    ) -> Result<Answer<ExportMetricsServiceResponse>, Status> {
        self.metrics(request.into_inner());
        Ok(Answer::new(Default::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Sink {
    async fn export(
        &self,
        request: tonic::Request<ExportLogsServiceRequest>,
    ) -> Result<Answer<ExportLogsServiceResponse>, Status> {
        let mut answer = ExportLogsServiceResponse::default();
        match self.answer() {
            Some(Answered::Status(status)) => return Err(status),
            Some(Answered::Without(rejected_log_records)) => {
                let error_message = "rejected".into();
                let rejected = ExportLogsPartialSuccess { rejected_log_records, error_message };
                answer.partial_success = Some(rejected);
            }
            _ => {}
        }
        self.logs(request.into_inner());
        Ok(Answer::new(answer))
    }
}

async fn answer(
    sink: Sink,
    mut grpc: Routes,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let headers = request.headers().clone();
    sink.with(|seen| seen.requests.push((path.clone(), headers)));
    let Some((_, signal)) = path.split_once("/v1/") else {
        return grpc.call(request.map(Body::new)).await;
    };
    assert_eq!(request.headers()["content-type"], "application/x-protobuf");
    let body = request.into_body().collect().await.unwrap().to_bytes();
    sink.with(|seen| seen.raw.extend_from_slice(&body));
    match signal {
        "traces" => sink.traces(ExportTraceServiceRequest::decode(body).unwrap()),
        "metrics" => sink.metrics(ExportMetricsServiceRequest::decode(body).unwrap()),
        "logs" => {
            if let Some(Answered::Http(status, wait)) = sink.answer() {
                let mut answer = Response::new(Body::new(Full::<Bytes>::default()));
                *answer.status_mut() = status.try_into().unwrap();
                if let Some(wait) = wait {
                    answer.headers_mut().insert("retry-after", wait.into());
                }
                return Ok(answer);
            }
            sink.logs(ExportLogsServiceRequest::decode(body).unwrap());
        }
        other => panic!("{other}"),
    }
    Ok(Response::new(Body::new(Full::<Bytes>::default())))
}

/// A running collector; it ends when it is dropped.
pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    sink: Sink,
    task: JoinHandle<()>,
}

impl Collector {
    /// In the clear, at any port.
    pub(crate) async fn start() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), None).await
    }

    /// Over TLS, with the certificate of `polykey dev` in this directory.
    pub(crate) async fn with_tls(state: &Path) -> Self {
        let chain: Vec<_> = CertificateDer::pem_file_iter(state.join("server.pem"))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        let key = PrivateKeyDer::from_pem_file(state.join("server.key")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::at("127.0.0.1:0".parse().unwrap(), Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    /// At this address.
    pub(crate) async fn at(address: SocketAddr, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let sink = Sink::default();
        let grpc = Routes::new(TraceServiceServer::new(sink.clone()))
            .add_service(MetricsServiceServer::new(sink.clone()))
            .add_service(LogsServiceServer::new(sink.clone()))
            .prepare();
        let shared = sink.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (sink, grpc, tls) = (shared.clone(), grpc.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, sink, grpc).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, sink, grpc).await;
                            }
                        }
                    }
                });
            }
        });
        Self { address, sink, task }
    }

    /// Answers the next batches of lines so.
    pub(crate) fn will(&self, answers: impl IntoIterator<Item = Answered>) {
        let mut queue = self.sink.answers.lock().unwrap_or_else(PoisonError::into_inner);
        queue.extend(answers);
    }

    /// What it was sent so far.
    pub(crate) fn seen(&self) -> Seen {
        self.sink.with(|seen| seen.clone())
    }

    /// Waits until what it was sent is enough.
    #[track_caller]
    pub(crate) fn until<'a>(
        &'a self,
        what: &'a str,
        enough: impl Fn(&Seen) -> bool + 'a,
    ) -> impl Future<Output = Seen> + 'a {
        let wait = async move {
            loop {
                let changed = self.sink.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                let seen = self.sink.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if enough(&seen) {
                    return seen;
                }
                changed.await;
            }
        };
        async move {
            match tokio::time::timeout(PATIENCE, wait).await {
                Ok(seen) => seen,
                Err(_) => panic!("{what}: not sent: {:#?}", self.seen()),
            }
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    sink: Sink,
    grpc: Routes,
) {
    let service = service_fn(move |request| answer(sink.clone(), grpc.clone(), request));
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    // A node that ends breaks off.
    drop(builder.serve_connection(TokioIo::new(stream), service).await);
}

/// The text or number of an attribute.
pub(crate) fn attribute(all: &[KeyValue], name: &str) -> Option<String> {
    let found = all.iter().find(|attribute| attribute.key == name)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        other => panic!("{name}: {other:?}"),
    })
}
