//! Bare echoes over mutual TLS: our own listener, and gRPC as it comes out of the box.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use polykey::net::tls::{TlsFiles, TlsState};
use polykey::net::{Listener, NetConfig};
use polykey::pki::{Authority, KeyKind, Validity, write_file};
use polykey_proto::polykey::v2::KeyMaterial;
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_util::sync::CancellationToken;
use tonic::codec::Codec;
use tonic::server::{Grpc, UnaryService};
use tonic::{Request, Response, Status};

/// The method that echoes.
pub(crate) const PATH: &str = "/bench.Echo/Echo";

#[derive(Clone)]
struct Echo;

impl UnaryService<KeyMaterial> for Echo {
    type Response = KeyMaterial;
    type Future = Ready<Result<Response<KeyMaterial>, Status>>;

    fn call(&mut self, request: Request<KeyMaterial>) -> Self::Future {
        ready(Ok(Response::new(request.into_inner())))
    }
}

fn files(directory: &Path) {
    let now = SystemTime::now();
    let valid = || Validity::days(now, 30).unwrap();
    let (authority, issued) = Authority::create("Benchmark", KeyKind::P256, valid()).unwrap();
    let path = |name: &str| directory.join(name);
    write_file(&path("ca.pem"), issued.certificate.as_bytes(), 0o644).unwrap();
    let server = authority.server(&["localhost", "127.0.0.1"], KeyKind::P256, valid()).unwrap();
    server.write(&path("server.pem"), &path("server.key")).unwrap();
    let client = authority.client("bench", KeyKind::P256, valid()).unwrap();
    client.write(&path("client.pem"), &path("client.key")).unwrap();
}

/// Serves until it is killed; its address goes to standard output.
pub(crate) fn serve(kind: &str, directory: &Path) {
    files(directory);
    if kind == "stock" { stock(directory) } else { tuned(directory) }
}

fn say(address: std::net::SocketAddr) {
    println!("{address}");
    std::io::stdout().flush().unwrap();
}

fn tuned(directory: &Path) {
    let path = |name: &str| directory.join(name);
    let tls = TlsState::load(TlsFiles {
        certificate: path("server.pem"),
        key: path("server.key"),
        client_ca: path("ca.pem"),
        crl: None,
    });
    let service = tower::service_fn(|request: http::Request<tonic::body::Body>| async {
        let codec = polykey_proto::Codec::<KeyMaterial, KeyMaterial>::default();
        Ok::<_, Infallible>(Grpc::new(codec).unary(Echo, request).await)
    });
    let listener = Listener::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let stop = CancellationToken::new();
    let served =
        polykey::net::serve(listener, NetConfig::default(), Arc::new(tls.unwrap()), service, stop)
            .unwrap();
    say(served.local_addr());
    futures::executor::block_on(served.drained());
}

fn stock(directory: &Path) {
    let read = |name: &str| std::fs::read(directory.join(name)).unwrap();
    let certificates = |name: &str| -> Vec<_> {
        CertificateDer::pem_slice_iter(&read(name)).map(Result::unwrap).collect()
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates("ca.pem"));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            certificates("server.pem"),
            PrivateKeyDer::from_pem_slice(&read("server.key")).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        say(listener.local_addr().unwrap());
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let service = service_fn(|request: http::Request<hyper::body::Incoming>| async {
                    let codec = stock_codec();
                    let request = request.map(tonic::body::Body::new);
                    Ok::<_, Infallible>(Grpc::new(codec).unary(Echo, request).await)
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
}

fn stock_codec() -> impl Codec<Encode = KeyMaterial, Decode = KeyMaterial> {
    tonic_prost::ProstCodec::default()
}
