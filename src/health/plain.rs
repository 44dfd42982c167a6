//! The health port without TLS, for probes that speak none: HTTP/1.1 on loopback, one word, and no
//! other path; and the probe that asks it.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Health;

/// The one path.
pub const PATH: &str = "/healthz";
/// For one connection, all of it.
const PATIENCE: Duration = Duration::from_secs(5);
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
        let health = Arc::clone(&health);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&health, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .max_buf_size(8 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // A probe that breaks off is no concern of ours.
            drop(tokio::time::timeout(PATIENCE, connection).await);
            drop(place);
        });
    }
}

fn answer(health: &Health, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, PATH) if health.state().serves() => (StatusCode::OK, "ok\n"),
        (&Method::GET | &Method::HEAD, PATH) => (StatusCode::SERVICE_UNAVAILABLE, "not serving\n"),
        _ => (StatusCode::NOT_FOUND, "not found\n"),
    };
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

/// Asks the health port of a node: whether it serves.
///
/// # Errors
/// When nobody answers, or not within 5 s, or not as a health port does.
pub async fn probe(address: SocketAddr) -> io::Result<bool> {
    let ask = async {
        let stream = TcpStream::connect(address).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let request = Request::get(PATH)
            .header(http::header::HOST, address.to_string())
            .body(Empty::<Bytes>::new())
            .map_err(io::Error::other)?;
        let driving = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), 1024);
        body.collect().await.map_err(io::Error::other)?;
        driving.abort();
        match status {
            StatusCode::OK => Ok(true),
            StatusCode::SERVICE_UNAVAILABLE => Ok(false),
            other => Err(io::Error::other(format!("answers {other}: no health port"))),
        }
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no answer within 5 s");
    tokio::time::timeout(PATIENCE, ask).await.unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::health::State;

    #[tokio::test]
    async fn the_port_tells_what_is_true() {
        let serves = Arc::new(AtomicBool::new(true));
        let look = Arc::clone(&serves);
        let health = Health::new(vec![Box::new(move || {
            if look.load(Ordering::Relaxed) { State::Serving } else { State::NotServing("x") }
        })]);
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, health, stop.clone()));
        assert!(probe(address).await.unwrap());
        serves.store(false, Ordering::Relaxed);
        assert!(!probe(address).await.unwrap());
        stop.cancel();
        task.await.unwrap();
        assert!(probe(address).await.is_err());
    }

    #[tokio::test]
    async fn only_loopback_is_bound() {
        assert!(bind("0.0.0.0:0".parse().unwrap()).await.is_err());
    }
}
