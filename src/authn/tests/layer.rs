//! The layer: which requests get through, and what they carry when they do.

use std::convert::Infallible;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::BodyExt;
use tonic::body::Body;
use tower::{Layer, ServiceExt, service_fn};

use super::fixture::{Node, address, peer};
use crate::authn::layer::{AuthenticationLayer, Peer, REQUEST_ID, WITHOUT_TOKEN};
use crate::context::Caller;
use crate::error::Error;
use crate::net::RequestId;

fn status(error: &Error) -> tonic::Status {
    match error {
        Error::Unauthenticated => tonic::Status::unauthenticated("authentication failed"),
        Error::Exhausted { .. } => tonic::Status::resource_exhausted("later"),
        _ => tonic::Status::internal("internal"),
    }
}

fn request(path: &str, peer: Option<Peer>) -> Request<()> {
    let mut request = Request::new(());
    *request.uri_mut() = path.parse().unwrap();
    if let Some(peer) = peer {
        request.extensions_mut().insert(peer);
    }
    request
}

/// Answers with what the layer put into the request.
async fn inner(request: Request<()>) -> Result<Response<Body>, Infallible> {
    let caller = request.extensions().get::<Arc<Caller>>();
    let mut headers = HeaderMap::new();
    let name = caller.map_or("-", |c| c.client_id()).to_owned();
    headers.insert("who", HeaderValue::from_str(&name).unwrap());
    assert!(request.extensions().get::<Peer>().is_some());
    assert!(request.extensions().get::<RequestId>().is_some());
    assert!(!request.headers().contains_key("authorization"));
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = http_body_util::Full::new(bytes::Bytes::from_static(b"body"))
        .map_err(|never| match never {})
        .with_trailers(async move { Some(Ok(trailers)) });
    let mut response = Response::new(Body::new(body));
    *response.headers_mut() = headers;
    Ok(response)
}

async fn call(node: &Node, request: Request<()>) -> Response<Body> {
    let layer = AuthenticationLayer::new(
        Arc::clone(&node.authenticator),
        |extensions, _| extensions.get::<Peer>().cloned(),
        status,
    );
    layer.layer(service_fn(inner)).oneshot(request).await.unwrap()
}

fn code(response: &Response<Body>) -> Option<&str> {
    response.headers().get("grpc-status").and_then(|v| v.to_str().ok())
}

const METHOD: &str = "/polykey.v2.PolykeyService/GetKey";

#[tokio::test]
async fn only_the_methods_of_the_table_answer_without_a_token() {
    use prost::Message;
    let node = Node::new().await;
    let peer = Peer { certificate: peer("a"), address: address(1) };
    let set = prost_types::FileDescriptorSet::decode(polykey_proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut open = Vec::new();
    let mut all = 0;
    for file in &set.file {
        for service in &file.service {
            for method in &service.method {
                let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                all += 1;
                let response = call(&node, request(&path, Some(peer.clone()))).await;
                match code(&response) {
                    None => open.push(path.clone()),
                    Some(code) => assert_eq!(code, "16", "{path}"),
                }
                // Without a usable certificate nothing answers.
                let response = call(&node, request(&path, None)).await;
                assert_eq!(code(&response), Some("16"), "{path}");
            }
        }
    }
    assert!(all > 25, "{all}");
    let mut expected: Vec<_> = WITHOUT_TOKEN.map(str::to_owned).to_vec();
    expected.sort();
    open.sort();
    assert_eq!(open, expected);
}

#[tokio::test]
async fn variants_of_an_open_path_are_not_open() {
    let node = Node::new().await;
    let peer = Peer { certificate: peer("a"), address: address(1) };
    for path in [
        "/polykey.v2.PolykeyService/HealthCheck/",
        "//polykey.v2.PolykeyService/HealthCheck",
        "/polykey.v2.PolykeyService//HealthCheck",
        "/polykey.v2.PolykeyService/healthcheck",
        "/polykey.v2.PolykeyService/HealthCheck%20",
        "/polykey.v2.PolykeyService/%48ealthCheck",
        "/polykey.v2.PolykeyService/../polykey.v2.PolykeyService/HealthCheck",
        "/polykey.v2.PolykeyService/HealthCheck;x",
        "/polykey.v2.PolykeyService/Nothing",
        "/grpc.health.v1.Health/List",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/",
        "/x",
    ] {
        let response = call(&node, request(path, Some(peer.clone()))).await;
        assert_eq!(code(&response), Some("16"), "{path}");
    }
}

#[tokio::test]
async fn exactly_one_well_formed_bearer_token_is_taken() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let certificate = peer("a");
    let token = node.login("a", &key, &certificate).await.unwrap().access;
    let peer = Peer { certificate, address: address(1) };
    let with = |values: &[&[u8]]| {
        let mut request = request(METHOD, Some(peer.clone()));
        for value in values {
            let value = HeaderValue::from_bytes(value).unwrap();
            request.headers_mut().append("authorization", value);
        }
        request
    };
    let good = format!("Bearer {token}");
    let lower = format!("bearer {token}");
    for header in [&good, &lower] {
        let response = call(&node, with(&[header.as_bytes()])).await;
        assert_eq!(code(&response), None);
        assert_eq!(response.headers()["who"], "a");
    }
    let twice = format!("Bearer  {token}");
    let trailing = format!("Bearer {token} ");
    let tab = format!("Bearer\t{token}");
    let umlaut = format!("Bearer {token}\u{e4}");
    let bad: Vec<Vec<&[u8]>> = vec![
        vec![],
        vec![b""],
        vec![b"Bearer"],
        vec![b"Bearer "],
        vec![token.as_bytes()],
        vec![b"Basic YTpi"],
        vec![good.as_bytes(), good.as_bytes()],
        vec![b"Basic YTpi", good.as_bytes()],
        vec![twice.as_bytes()],
        vec![trailing.as_bytes()],
        vec![tab.as_bytes()],
        vec![umlaut.as_bytes()],
        vec![b"Bearer \xff\xfe"],
        vec![b"\x80"],
    ];
    for values in bad {
        let response = call(&node, with(&values)).await;
        assert_eq!(code(&response), Some("16"), "{values:?}");
        assert_eq!(response.headers()["grpc-message"], "authentication%20failed");
        assert!(!response.headers().contains_key("who"));
    }
    let refusals = node.refusals.0.lock();
    assert!(refusals.iter().all(|e| e.details["method"] == METHOD && e.code == 16));
    assert_eq!(refusals.len(), 14);
}

#[tokio::test]
async fn every_response_names_its_request() {
    let node = Node::new().await;
    let peer = Peer { certificate: peer("a"), address: address(1) };
    for path in [METHOD, WITHOUT_TOKEN[0]] {
        for (name, value, echoed) in [
            ("polykey-request-id", "abc.DEF-1_2", true),
            ("x-request-id", "abc.DEF-1_2", true),
            ("x-request-id", "not good", false),
            ("polykey-request-id", "", false),
            ("polykey-request-id", "a b", false),
            ("polykey-request-id", &"x".repeat(65), false),
            ("other", "abc", false),
        ] {
            let mut request = request(path, Some(peer.clone()));
            request
                .headers_mut()
                .insert(http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
            let response = call(&node, request).await;
            let id = response.headers()[REQUEST_ID].clone();
            assert_eq!(id == value, echoed, "{name}: {value}");
            assert!(!id.is_empty());
            if code(&response).is_none() {
                let collected = response.into_body().collect().await.unwrap();
                assert_eq!(collected.trailers().unwrap()[REQUEST_ID], id);
                assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
                assert_eq!(collected.to_bytes(), "body");
            }
        }
    }
}
