//! The health port without TLS, for probes that speak none: on loopback, `GET /healthz` over HTTP/1.1
//! and `grpc.health.v1` over HTTP/2, and nothing else.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use polykey_proto::grpc::health::v1::health_server::HealthServer;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::service::Routes;
use tower_service::Service;

use super::Health;
use super::grpc::HealthService;

/// The one path.
pub const PATH: &str = "/healthz";
/// For the head of a request.
const PATIENCE: Duration = Duration::from_secs(5);
/// For one connection, all of it: who watches comes again.
const LONGEST: Duration = Duration::from_secs(600);
/// Largest request.
const MESSAGE: usize = 4096;
/// Connections at once.
const CONNECTIONS: usize = 32;

/// Binds the port. Loopback only, which the configuration has seen to and is seen to again.
///
/// # Errors
/// What the system said.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    if !address.ip().is_loopback() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a loopback address"));
    }
    TcpListener::bind(address).await
}

/// Answers until `stop`.
pub async fn serve(listener: TcpListener, health: Arc<Health>, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let service = HealthServer::new(HealthService(Arc::clone(&health)));
    let grpc = Routes::new(service.max_decoding_message_size(MESSAGE)).prepare();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the health port cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else { continue };
        let (health, grpc, stop) = (Arc::clone(&health), grpc.clone(), stop.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let (health, mut grpc) = (Arc::clone(&health), grpc.clone());
                async move {
                    if request.uri().path().starts_with("/grpc.") {
                        return grpc.call(request.map(Body::new)).await;
                    }
                    Ok::<_, Infallible>(answer(&health, &request))
                }
            });
            let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .max_buf_size(8 * 1024);
            builder
                .http2()
                .timer(TokioTimer::new())
                .max_concurrent_streams(8)
                .keep_alive_interval(PATIENCE)
                .keep_alive_timeout(PATIENCE)
                .max_header_list_size(8 * 1024);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            // A probe that breaks off is no concern of ours.
            tokio::select! {
                _ = connection => {}
                () = stop.cancelled() => {}
                () = tokio::time::sleep(LONGEST) => {}
            }
            drop(place);
        });
    }
}

fn answer(health: &Health, request: &Request<Incoming>) -> Response<Body> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, PATH) if health.state().serves() => (StatusCode::OK, "ok\n"),
        (&Method::GET | &Method::HEAD, PATH) => (StatusCode::SERVICE_UNAVAILABLE, "not serving\n"),
        _ => (StatusCode::NOT_FOUND, "not found\n"),
    };
    let mut response = Response::new(Body::new(text.to_owned()));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use polykey_proto::grpc::health::v1::HealthCheckRequest;
    use polykey_proto::grpc::health::v1::health_client::HealthClient;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tonic::transport::Endpoint;

    use super::*;
    use crate::health::State;

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_port_tells_what_is_true_and_nothing_else() {
        let serves = Arc::new(AtomicBool::new(true));
        let look = Arc::clone(&serves);
        let health = Health::new(vec![Box::new(move || {
            if look.load(Ordering::Relaxed) { State::Serving } else { State::NotServing("x") }
        })]);
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, health, stop.clone()));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let mut client = HealthClient::new(endpoint.connect().await.unwrap());
        for (serving, code, status) in [(true, " 200 ", 1), (false, " 503 ", 2)] {
            serves.store(serving, Ordering::Relaxed);
            let answer = get(address, PATH).await;
            assert!(answer.contains(code), "{answer}");
            let told = client.check(HealthCheckRequest::default()).await.unwrap().into_inner();
            assert_eq!(told.status, status);
        }
        assert!(get(address, "/").await.contains(" 404 "));
        let other = get(address, "/polykey.v2.PolykeyService/HealthCheck").await;
        assert!(other.contains(" 404 "), "{other}");
        stop.cancel();
        task.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn only_loopback_is_bound() {
        assert!(bind("0.0.0.0:0".parse().unwrap()).await.is_err());
    }
}
