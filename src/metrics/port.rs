//! The port of figures: on loopback, `GET /metrics` over HTTP/1.1 in the text format of Prometheus, and
//! nothing else.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::family::Figures;

/// The one path.
pub const PATH: &str = "/metrics";
/// The format of the text.
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
/// For the head of a request.
const PATIENCE: Duration = Duration::from_secs(5);
/// For one connection, all of it.
const LONGEST: Duration = Duration::from_secs(30);
/// Connections at once.
const CONNECTIONS: usize = 8;

/// What gathers the figures; `None` once the node has gone.
pub type Gather = Arc<dyn Fn() -> Option<Figures> + Send + Sync>;

/// Answers until `stop`. The listener is on loopback: [`crate::health::plain::bind`] sees to that.
pub async fn serve(listener: TcpListener, gather: Gather, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the metrics port cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else { continue };
        let (gather, stop) = (Arc::clone(&gather), stop.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let gather = Arc::clone(&gather);
                async move { Ok::<_, Infallible>(answer(&request, &*gather)) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false)
                .max_buf_size(8 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // Who breaks off asks again.
            tokio::select! {
                _ = connection => {}
                () = stop.cancelled() => {}
                () = tokio::time::sleep(LONGEST) => {}
            }
            drop(place);
        });
    }
}

fn answer<B>(request: &Request<B>, gather: &dyn Fn() -> Option<Figures>) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != PATH {
        return plain(StatusCode::NOT_FOUND, "not found\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "ask with GET\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let Some(figures) = gather() else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
    };
    let mut response = Response::new(Full::from(figures.text()));
    response.headers_mut().insert(CONTENT_TYPE, TEXT);
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn ask(address: std::net::SocketAddr, line: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn figures_and_nothing_else_are_given_until_the_stop() {
        let listener = crate::health::plain::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let gather: Gather = Arc::new(|| {
            let mut figures = Figures::default();
            figures.gauge("a", "A.").is(1u64);
            Some(figures)
        });
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, gather, stop.clone()));
        let text = ask(address, "GET /metrics").await;
        assert!(
            text.starts_with("HTTP/1.1 200 ")
                && text.ends_with("\r\n\r\n# HELP a A.\n# TYPE a gauge\na 1\n")
        );
        assert!(text.contains("content-type: text/plain; version=0.0.4"), "{text}");
        assert!(ask(address, "GET /").await.contains(" 404 "));
        assert!(ask(address, "POST /metrics").await.contains(" 405 "));
        assert!(ask(address, "GET /polykey.v2.PolykeyService/HealthCheck").await.contains(" 404 "));
        // Connections that say nothing leave room again, and never more than there is.
        let silent: Vec<_> =
            futures::future::join_all((0..CONNECTIONS).map(|_| TcpStream::connect(address))).await;
        assert!(silent.iter().all(Result::is_ok));
        drop(silent);
        stop.cancel();
        task.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err());
    }
}
