//! Requests, panics, limits, closing and the drain.

use std::sync::Arc;
use std::time::Duration;

use polykey::net::client::ConnectOptions;
use polykey::net::{NetConfig, UNAUTHENTICATED_TEXT};
use tonic::client::Grpc;

use crate::support::{Answer, PATIENCE, TestServer};

fn small() -> NetConfig {
    NetConfig { workers: Some(2), ..NetConfig::default() }
}

#[tokio::test]
async fn the_channel_of_the_command_line_gets_through() {
    let server = TestServer::start(small());
    let address = format!("https://localhost:{}", server.address.port());
    let channel =
        server.client_tls("alice").connect(&address, &ConnectOptions::default()).await.unwrap();
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/test/panic");
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let status = grpc.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::Internal, "internal error"));
    let peers: Vec<_> = server.seen.peers.lock().values().cloned().collect();
    assert_eq!(peers[0].certificate().spiffe_id(), Some("spiffe://polykey.local/client/alice"));
    assert!(peers[0].peer().ip().is_loopback());
    assert_eq!(UNAUTHENTICATED_TEXT, "authentication required or failed");
}

#[tokio::test]
async fn a_panic_costs_one_request() {
    let server = TestServer::start(small());
    let mut client = server.client("alice").await;
    let waiting = client.ask("/test/wait");
    for (n, path) in ["/test/panic", "/test/panic-body", "/test/panic"].into_iter().enumerate() {
        let id = Some("from-the-test".to_owned());
        assert_eq!(client.ask(path).await, Answer::Replied("13".into(), id), "{path}");
        assert_eq!(server.metrics().panics, n as u64 + 1);
    }
    assert_eq!(client.status("/test/echo").await.as_deref(), Some("0"), "the connection lives on");
    server.seen.gate.add_permits(1);
    assert!(
        matches!(waiting.await, Answer::Replied(status, _) if status == "0"),
        "so do the others on it"
    );
    server.until(|m| m.requests_in_flight == 0).await;
}

#[tokio::test]
async fn requests_past_the_limit_are_refused_at_once() {
    let server = TestServer::start(NetConfig { max_requests: 2, ..small() });
    let mut client = server.client("alice").await;
    let waiting = [client.ask("/test/wait"), client.ask("/test/wait")];
    server.seen.waiting.acquire_many(2).await.unwrap().forget();
    assert_eq!(client.status("/test/echo").await.as_deref(), Some("8"));
    assert_eq!(
        server.client("bob").await.status("/test/echo").await.as_deref(),
        Some("8"),
        "the limit is global"
    );
    server.seen.gate.add_permits(2);
    for one in waiting {
        assert!(matches!(one.await, Answer::Replied(status, _) if status == "0"));
    }
    server.until(|m| m.requests_in_flight == 0).await;
    assert_eq!(client.status("/test/echo").await.as_deref(), Some("0"));
    assert_eq!(server.metrics().requests_refused, 2);
}

#[tokio::test]
async fn connections_past_the_limit_are_closed_and_counted() {
    let server = TestServer::start(NetConfig { max_connections: 2, max_handshakes: 2, ..small() });
    let mut first = server.client("a").await;
    let mut second = server.client("b").await;
    assert_eq!(first.status("/test/echo").await.as_deref(), Some("0"));
    assert_eq!(second.status("/test/echo").await.as_deref(), Some("0"));
    assert!(!server.serves(server.ca.client("c")).await);
    assert_eq!(server.metrics().connections_refused, 1);
    drop(first);
    server.until(|m| m.connections_open < 2).await;
    assert!(server.serves(server.ca.client("c")).await);
    assert_eq!(second.status("/test/echo").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn connections_of_one_address_have_a_limit_of_their_own() {
    let server = TestServer::start(NetConfig { max_connections_per_address: Some(1), ..small() });
    let mut first = server.client("a").await;
    assert_eq!(first.status("/test/echo").await.as_deref(), Some("0"));
    assert!(!server.serves(server.ca.client("b")).await);
    drop(first);
    server.until(|m| m.connections_open == 0).await;
    assert!(server.serves(server.ca.client("b")).await);
}

#[tokio::test]
async fn matching_connections_are_closed_with_what_is_in_flight() {
    let server = TestServer::start(small());
    let mut alice = server.client("alice").await;
    let mut bob = server.client("bob").await;
    assert_eq!(bob.status("/test/echo").await.as_deref(), Some("0"));
    let in_flight = alice.ask("/test/wait");
    server.seen.waiting.acquire().await.unwrap().forget();
    let connections = server.served.as_ref().unwrap().connections();
    let closed = connections.close_matching(|c| {
        c.certificate().spiffe_id() == Some("spiffe://polykey.local/client/alice")
    });
    assert_eq!(closed, 1);
    assert_eq!(in_flight.await, Answer::Cut);
    alice.closed().await;
    server.until(|m| m.requests_in_flight == 0).await;
    assert_eq!(bob.status("/test/echo").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn the_drain_waits_for_requests_in_flight() {
    let mut server = TestServer::start(NetConfig { drain_timeout: PATIENCE, ..small() });
    let mut busy = server.client("busy").await;
    let mut idle = server.client("idle").await;
    assert_eq!(idle.status("/test/echo").await.as_deref(), Some("0"));
    let in_flight = busy.ask("/test/wait");
    server.seen.waiting.acquire().await.unwrap().forget();
    let drained = server.served.take().unwrap().drained();
    server.shutdown.cancel();
    idle.closed().await;
    assert!(tokio::net::TcpStream::connect(server.address).await.is_err(), "no new connections");
    server.seen.gate.add_permits(1);
    assert!(matches!(in_flight.await, Answer::Replied(status, _) if status == "0"));
    let report = drained.await;
    assert_eq!(
        (report.connections_aborted, report.requests_aborted, report.workers_stuck),
        (0, 0, 0)
    );
    assert!(report.elapsed < PATIENCE);
}

#[tokio::test]
async fn the_drain_does_not_wait_for_a_peer_that_is_silent() {
    let mut server = TestServer::start(NetConfig { drain_timeout: PATIENCE, ..small() });
    // It reads nothing any more: its process is stopped, or its machine asleep.
    let mut silent = server.raw(&Arc::new(server.config(server.ca.client("silent")))).await;
    let stream = silent.send(b"/test/echo").await;
    assert!(silent.replied(stream).await);
    let drained = server.served.take().unwrap().drained();
    server.shutdown.cancel();
    let report = drained.await;
    assert_eq!((report.connections_aborted, report.requests_aborted), (0, 0));
}

#[tokio::test]
async fn the_drain_ends_at_its_deadline_and_tells_what_it_cut() {
    let mut server =
        TestServer::start(NetConfig { drain_timeout: Duration::from_millis(50), ..small() });
    let mut busy = server.client("busy").await;
    let in_flight = [busy.ask("/test/wait"), busy.ask("/test/wait")];
    server.seen.waiting.acquire_many(2).await.unwrap().forget();
    server.shutdown.cancel();
    let report = server.served.take().unwrap().drained().await;
    assert_eq!(
        (report.connections_aborted, report.requests_aborted, report.workers_stuck),
        (1, 2, 0)
    );
    for one in in_flight {
        assert_eq!(one.await, Answer::Cut);
    }
}

#[tokio::test]
async fn an_old_connection_is_asked_to_go() {
    let server =
        TestServer::start(NetConfig { max_age: Some(Duration::from_millis(50)), ..small() });
    let mut client = server.client("alice").await;
    let in_flight = client.ask("/test/wait");
    server.seen.waiting.acquire().await.unwrap().forget();
    server.seen.gate.add_permits(1);
    assert!(
        matches!(in_flight.await, Answer::Replied(status, _) if status == "0"),
        "what is in flight is answered"
    );
    client.closed().await;
}

#[test]
fn it_works_without_a_runtime_of_the_callers() {
    let mut server = TestServer::start(small());
    let client = tokio::runtime::Runtime::new().unwrap();
    assert!(client.block_on(server.serves(server.ca.client("alice"))));
    server.shutdown.cancel();
    let served = server.served.take().unwrap();
    assert_eq!(client.block_on(served.drained()).workers_stuck, 0);
}
