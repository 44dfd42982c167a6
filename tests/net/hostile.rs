//! Peers that do not play by the rules: none harms another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use polykey::net::NetConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{PATIENCE, TestServer, frame, hpack};

/// Reads until the server closes, and returns what it said.
async fn until_closed(mut stream: TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    // A reset closes as well as an end.
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said))
        .await
        .expect("the server does not close")
        .ok();
    said
}

async fn say(server: &TestServer, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    until_closed(stream).await
}

/// A ClientHello of TLS 1.2 at most: no supported_versions extension (RFC 8446 §4.2.1).
fn client_hello_tls12(version: [u8; 2]) -> Vec<u8> {
    let mut hello = Vec::from(version);
    hello.extend([7; 32]);
    hello.push(0);
    hello.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2f]);
    hello.extend([1, 0]);
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups: secp256r1
        0, 11, 0, 2, 1, 0, // ec_point_formats
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms: ecdsa_secp256r1_sha256
        0, 23, 0, 0, // extended_master_secret
    ];
    hello.extend((extensions.len() as u16).to_be_bytes());
    hello.extend(extensions);
    let mut handshake = vec![1, 0];
    handshake.extend((hello.len() as u16).to_be_bytes());
    handshake.extend(hello);
    let mut record = vec![22, 3, 1];
    record.extend((handshake.len() as u16).to_be_bytes());
    record.extend(handshake);
    record
}

#[tokio::test]
async fn older_versions_of_tls_are_refused() {
    let server = TestServer::start(NetConfig::default());
    for version in [[3, 1], [3, 2], [3, 3]] {
        let said = say(&server, &client_hello_tls12(version)).await;
        // A fatal alert: protocol_version (RFC 8446 §6).
        assert_eq!(said, [21, 3, 3, 0, 2, 2, 70], "version {version:?}");
    }
    assert!(server.serves(server.ca.client("alice")).await);
}

#[tokio::test]
async fn what_is_no_tls_is_closed_without_harm() {
    let server =
        TestServer::start(NetConfig { handshake_timeout: PATIENCE, ..NetConfig::default() });
    let mut good = server.client("alice").await;
    let mut plain_h2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    plain_h2.extend(frame(4, 0, 0, &[]));
    let cases: [&[u8]; 7] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        &plain_h2,
        &[0; 4096],
        &[0xff; 4096],
        &[22, 3, 1, 0xff, 0xff, 1, 2, 3],
        &[21, 3, 3, 0, 2, 2, 0],
        &[23, 3, 3, 0, 5, 1, 2, 3, 4, 5],
    ];
    for bytes in cases {
        say(&server, bytes).await;
        assert_eq!(good.status("/test/echo").await.as_deref(), Some("0"));
    }
    let count = cases.len() as u64;
    server
        .until(|m| {
            m.handshakes_failed == count && m.handshakes_in_flight == 0 && m.connections_open == 1
        })
        .await;
    assert_eq!(server.metrics().handshakes_timed_out, 0, "each was closed for what it said");
}

#[tokio::test]
async fn a_slow_handshake_ends_at_its_deadline() {
    let server = TestServer::start(NetConfig {
        handshake_timeout: Duration::from_millis(50),
        ..NetConfig::default()
    });
    let silent = TcpStream::connect(server.address).await.unwrap();
    until_closed(silent).await;
    let mut half = TcpStream::connect(server.address).await.unwrap();
    half.write_all(&client_hello_tls12([3, 3])[..20]).await.unwrap();
    until_closed(half).await;
    server.until(|m| m.handshakes_timed_out == 2 && m.connections_open == 0).await;
}

#[tokio::test]
async fn a_peer_that_never_speaks_http2_ends_at_the_same_deadline() {
    // Long enough for a handshake on a busy machine; the test waits for the event, not for the time.
    let server = TestServer::start(NetConfig {
        handshake_timeout: Duration::from_secs(2),
        ..NetConfig::default()
    });
    let config = Arc::new(server.config(server.ca.client("mute")));
    let mut stream = server.tls(&config).await.unwrap();
    stream.write_all(b"PRI * HTTP").await.unwrap();
    let mut said = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("never closed").ok();
    server.until(|m| m.handshakes_timed_out == 1).await;
}

#[tokio::test]
async fn http1_and_other_protocols_inside_tls_are_refused() {
    let server = TestServer::start(NetConfig::default());
    for (alpn, preface) in [
        (vec![b"h2".to_vec()], &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..]),
        (Vec::new(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ] {
        let mut config = server.config(server.ca.client("alice"));
        config.alpn_protocols = alpn;
        let mut stream = server.tls(&Arc::new(config)).await.unwrap();
        stream.write_all(preface).await.unwrap();
        let mut said = Vec::new();
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said))
            .await
            .expect("never closed")
            .ok();
        assert!(said.is_empty(), "{said:?}");
    }
    let mut config = server.config(server.ca.client("alice"));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert!(server.tls(&Arc::new(config)).await.is_none(), "no common protocol");
    server.until(|m| m.handshakes_failed == 3).await;
}

#[tokio::test]
async fn stalled_handshakes_make_room_for_honest_ones() {
    let config = NetConfig {
        max_connections: 64,
        max_handshakes: 8,
        handshake_timeout: PATIENCE,
        ..NetConfig::default()
    };
    let server = TestServer::start(config);
    let mut stalled = Vec::new();
    for _ in 0..40 {
        stalled.push(TcpStream::connect(server.address).await.unwrap());
    }
    server.until(|m| m.handshakes_evicted == 32).await;
    for n in 0..4 {
        assert!(server.serves(server.ca.client(&format!("honest{n}"))).await);
    }
    assert!(server.metrics().handshakes_in_flight <= 8);
}

#[tokio::test]
async fn paths_reach_the_service_as_they_stand_or_not_at_all() {
    let server = TestServer::start(NetConfig::default());
    let config = Arc::new(server.config(server.ca.client("alice")));
    let variants: [&[u8]; 16] = [
        b"/test/echo",
        b"test/echo",
        b"//test/echo",
        b"/test//echo",
        b"/test/./echo",
        b"/test/../test/echo",
        b"/test/echo/",
        b"/TEST/echo",
        b"/test/%65cho",
        b"/test%2fecho",
        b"*",
        b"",
        b" /test/echo",
        b"/test/echo\0",
        b"/test/echo\r\nx: y",
        b"/test/\xff",
    ];
    for path in variants {
        server.seen.paths.lock().clear();
        let mut raw = server.raw(&config).await;
        let stream = raw.send(path).await;
        let replied = raw.replied(stream).await;
        let seen = server.seen.paths.lock().clone();
        match seen.as_slice() {
            [] => {}
            [only] => assert_eq!(only.as_bytes(), path, "changed on the way"),
            more => panic!("one request became {more:?}"),
        }
        let expected = path.starts_with(b"/") && path.iter().all(|b| b.is_ascii_graphic());
        assert_eq!(
            !seen.is_empty(),
            expected,
            "{:?}, replied: {replied}",
            String::from_utf8_lossy(path)
        );
    }
    assert!(server.serves(server.ca.client("alice")).await);
}

#[tokio::test]
async fn broken_http2_ends_its_connection_only() {
    let server = TestServer::start(NetConfig::default());
    let config = Arc::new(server.config(server.ca.client("mallory")));
    let mut good = server.client("alice").await;
    let huge_table: Vec<u8> =
        std::iter::repeat_n([0x40, 1, b'a', 1, b'b'], 3000).flatten().collect();
    let cases: [Vec<u8>; 8] = [
        frame(0, 0, 0, b"data on stream 0"),
        frame(1, 5, 2, &[0x82]),
        frame(9, 4, 1, &[0x82]),
        frame(8, 0, 0, &[0, 0, 0, 0]),
        frame(4, 0, 0, &[1, 2, 3]),
        frame(6, 0, 0, &[1, 2, 3]),
        frame(1, 5, 1, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        [
            frame(1, 1, 1, &[0x82]),
            std::iter::repeat_n(frame(9, 0, 1, &huge_table), 200).flatten().collect(),
        ]
        .concat(),
    ];
    for (n, bytes) in cases.iter().enumerate() {
        let mut raw = server.raw(&config).await;
        // The server may close while this is still being written.
        raw.stream.write_all(bytes).await.ok();
        raw.closed().await;
        assert_eq!(good.status("/test/echo").await.as_deref(), Some("0"), "case {n}");
    }
    server.until(|m| m.connections_open == 1).await;
}

#[tokio::test]
async fn rapid_resets_end_the_connection() {
    let server = TestServer::start(NetConfig::default());
    let mut good = server.client("alice").await;
    let mut raw = server.raw(&Arc::new(server.config(server.ca.client("mallory")))).await;
    for _ in 0..5_000 {
        let stream = raw.send(b"/test/wait").await;
        if raw.stream.write_all(&frame(3, 0, stream, &8u32.to_be_bytes())).await.is_err() {
            break;
        }
    }
    assert!(
        raw.closed().await || server.metrics().connections_open == 1,
        "told to go away, or cut off"
    );
    assert_eq!(good.status("/test/echo").await.as_deref(), Some("0"));
    server.until(|m| m.requests_in_flight == 0 && m.connections_open == 1).await;
}

/// Calls of good clients for as long as `while_` takes: how many, and the 99th percentile.
async fn good_calls(
    server: &Arc<TestServer>,
    while_: impl Future<Output = ()>,
) -> (usize, Duration) {
    let done = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for n in 0..4 {
        let (mut client, done) = (server.client(&format!("good{n}")).await, Arc::clone(&done));
        clients.push(tokio::spawn(async move {
            let mut times = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let asked = Instant::now();
                assert_eq!(client.status("/test/echo").await.as_deref(), Some("0"));
                times.push(asked.elapsed());
            }
            times
        }));
    }
    while_.await;
    done.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for client in clients {
        times.extend(client.await.unwrap());
    }
    times.sort_unstable();
    (times.len(), times[times.len() * 99 / 100])
}

async fn hostile(server: &TestServer, config: &Arc<rustls::ClientConfig>, kind: usize) {
    let raw = async || server.raw(config).await;
    match kind {
        // Half a handshake, and what is no TLS.
        0 => {
            let mut half = TcpStream::connect(server.address).await.unwrap();
            half.write_all(&client_hello_tls12([3, 3])[..20]).await.ok();
        }
        1 => drop(say(server, b"GET / HTTP/1.1\r\n\r\n").await),
        // A header block that never ends.
        2 => {
            let mut raw = raw().await;
            let more = frame(9, 0, 1, &[0; 1024]);
            let flood = [frame(1, 1, 1, &[0x82]), more.repeat(200)].concat();
            raw.stream.write_all(&flood).await.ok();
            raw.closed().await;
        }
        // Streams opened and reset.
        3 => {
            let mut raw = raw().await;
            for _ in 0..200 {
                let stream = raw.send(b"/test/wait").await;
                raw.stream.write_all(&frame(3, 0, stream, &8u32.to_be_bytes())).await.ok();
            }
        }
        // Odd paths, and metadata that is none.
        4 => {
            let mut raw = raw().await;
            let stream = raw.send(b"/test/\xff\r\n").await;
            raw.replied(stream).await;
        }
        5 => {
            let mut raw = raw().await;
            let block = hpack(&[(b":method", b"POST"), (b"bad\nname", b"\0")]);
            raw.stream.write_all(&frame(1, 5, 1, &block)).await.ok();
            raw.replied(1).await;
        }
        // A length that nobody believes.
        _ => {
            let mut raw = raw().await;
            raw.stream.write_all(&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]).await.ok();
            raw.closed().await;
        }
    }
}

/// `POLYKEY_HOSTILE` connections, 500 unless it says otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_hostile_connections_fails_no_good_client() {
    let count = std::env::var("POLYKEY_HOSTILE").map_or(500, |n| n.parse().unwrap());
    let config = NetConfig { handshake_timeout: Duration::from_secs(2), ..NetConfig::default() };
    let server = Arc::new(TestServer::start(config));
    let (before, usual) = good_calls(&server, tokio::time::sleep(Duration::from_millis(500))).await;
    let mallory = Arc::new(server.config(server.ca.client("mallory")));
    let crowd = futures::stream::iter(0..count)
        .for_each_concurrent(32, |n| hostile(&server, &mallory, n % 7));
    let (during, worst) = good_calls(&server, crowd).await;
    println!("p99 {usual:?} of {before} calls before, {worst:?} of {during} during {count}");
    assert!(before > 0 && during > 0);
    server.until(|m| m.connections_open == 0 && m.requests_in_flight == 0).await;
}
