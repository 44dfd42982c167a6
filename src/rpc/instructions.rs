//! What nearly every call does, in instructions: a figure that does not depend on how busy the machine is, so that CI
//! can hold it.
//!
//! Callgrind counts what happens inside [`counted`] while this test binary runs a case. A figure more than a tenth
//! above the recorded one is a failure.

use std::collections::BTreeMap;
use std::io::Write;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use polykey_hsm::Ring;
use polykey_proto::polykey::v2 as pb;
use polykey_storage::memory::Memory;
use prost::Message;
use tokio::runtime::Runtime;
use tonic::body::Body;
use tower::{Layer, Service};

use super::crypto::CryptoService;
use super::key_service::KeyService;
use super::trailers::WithTrailers;
use super::{Deps, Health, status};
use crate::audit::{Options, Trail};
use crate::authn::certificate::PeerCertificate;
use crate::authn::layer::{Authentication, AuthenticationLayer, Peer};
use crate::authn::tests::fixture;
use crate::authz::Authorizer;
use crate::keyring::{Forge, KeyCaches, Keyring};
use crate::time::Time;
use crate::vault::Vault;
use pb::crypto_service_server::CryptoServiceServer;
use pb::polykey_service_server::PolykeyServiceServer;

const CASE: &str = "POLYKEY_INSTRUCTIONS_CASE";
const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/instructions.txt");
/// The profiles differ by an order of magnitude.
const BUILD: &str = if cfg!(debug_assertions) { "debug" } else { "release" };
/// Calls over which a figure is the mean.
const CALLS: u64 = 100;
/// Calls that fill what is remembered.
const FIRST: u64 = 10;

struct Unknown;

impl Health for Unknown {
    fn report(&self, _: Time) -> pb::HealthCheckResponse {
        pb::HealthCheckResponse::default()
    }
    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

type Served<S> = Authentication<WithTrailers<S>>;

/// The services as they are served, from the token on: no network, a store in memory.
struct Node {
    fixture: fixture::Node,
    keys: Served<PolykeyServiceServer<KeyService>>,
    work: Served<CryptoServiceServer<CryptoService>>,
    peer: Arc<PeerCertificate>,
    token: String,
}

impl Node {
    async fn new() -> Self {
        let fixture = fixture::Node::new().await;
        let (api_key, peer) = (fixture.client("a").await, fixture::peer("a"));
        let token = fixture.login("a", &api_key, &peer).await.unwrap().access;
        let caches = Arc::new(KeyCaches::new(1024));
        let (store, ring) = (Memory::new().unwrap(), Ring::generate([7; 16]).unwrap());
        let clock = fixture.clock.clone();
        let watched = Arc::clone(&caches) as _;
        let vault =
            Vault::create(Arc::new(store), ring, [7; 16], Vec::new(), watched, clock.clone());
        let vault = Arc::new(vault.await.unwrap());
        let trail = Trail::start(Arc::clone(&vault), Options::default(), None).await.unwrap();
        let trail = Arc::new(trail);
        let authorizer = Arc::new(ArcSwap::from_pointee(Authorizer::default_only().unwrap()));
        let forge = Forge::new(1, 4);
        let keyring = Keyring::new(vault, caches, authorizer, Arc::clone(&trail), forge);
        let keys = KeyService(Arc::new(Deps {
            keyring: Arc::new(keyring),
            trail,
            authenticator: Arc::clone(&fixture.authenticator),
            clock,
            health: Arc::new(Unknown),
            longest_call: Duration::from_secs(30),
        }));
        let layer = AuthenticationLayer::new(
            Arc::clone(&fixture.authenticator),
            |extensions, _| extensions.get::<Peer>().cloned(),
            status::status,
        );
        let work = CryptoServiceServer::new(CryptoService::new(keys.clone()));
        let work = layer.layer(WithTrailers(work));
        let keys = layer.layer(WithTrailers(PolykeyServiceServer::new(keys)));
        Self { fixture, keys, work, peer, token }
    }

    /// A call as HTTP/2 hands it on; its answer.
    async fn call<S, A: Message + Default>(
        &self,
        service: &Served<S>,
        path: &str,
        body: &impl Message,
    ) -> A
    where
        Served<S>: Service<http::Request<Body>, Response = http::Response<Body>> + Clone,
        <Served<S> as Service<http::Request<Body>>>::Error: std::fmt::Debug,
    {
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(body.encoded_len()).unwrap());
        body.encode(&mut frame).unwrap();
        let peer = Peer { certificate: Arc::clone(&self.peer), address: fixture::address(1) };
        let request = http::Request::post(path)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("authorization", format!("Bearer {}", self.token))
            .extension(peer)
            .body(Body::new(Full::new(frame.freeze())))
            .unwrap();
        let response = service.clone().call(request).await.unwrap();
        assert!(!response.headers().contains_key("grpc-status"), "{:?}", response.headers());
        let body = response.into_body().collect().await.unwrap();
        assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
        A::decode(body.to_bytes().slice(5..)).unwrap()
    }

    async fn create(&self, calls: u64) -> String {
        let path = "/polykey.v2.PolykeyService/CreateKey";
        let key_type = pb::KeyType::Aes256.into();
        let request = pb::CreateKeyRequest { key_type, ..Default::default() };
        let mut key = String::new();
        for _ in 0..calls {
            let made: pb::CreateKeyResponse = self.call(&self.keys, path, &request).await;
            key = made.key_id;
        }
        key
    }

    async fn get(&self, key: &str, calls: u64) {
        let request = pb::GetKeyRequest { key_id: key.to_owned(), ..Default::default() };
        for _ in 0..calls {
            let path = "/polykey.v2.PolykeyService/GetKey";
            let answer: pb::GetKeyResponse = self.call(&self.keys, path, &request).await;
            assert!(answer.key_material.is_some());
        }
    }

    async fn encrypt(&self, key: &str, calls: u64) {
        let request = pb::EncryptRequest {
            key_id: key.to_owned(),
            plaintext: Bytes::from_static(&[7; 256]),
            ..Default::default()
        };
        for _ in 0..calls {
            let path = "/polykey.v2.CryptoService/Encrypt";
            let answer: pb::EncryptResponse = self.call(&self.work, path, &request).await;
            assert!(answer.ciphertext.len() > 256);
        }
    }

    async fn authenticate(&self, calls: u64) {
        let attempt = self.fixture.attempt(&self.peer);
        for _ in 0..calls {
            let session =
                self.fixture.authenticator.authenticate_request(&self.token, &attempt).await;
            assert!(std::hint::black_box(session).is_ok());
        }
    }
}

/// The only place where callgrind counts.
#[inline(never)]
fn counted(runtime: &Runtime, work: Pin<Box<dyn Future<Output = ()> + '_>>) {
    runtime.block_on(work);
    std::hint::black_box(runtime);
}

/// What callgrind runs; nothing otherwise.
#[test]
fn under_callgrind() {
    let Ok(case) = std::env::var(CASE) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let node = runtime.block_on(Node::new());
    match case.as_str() {
        "encrypt-256" => {
            let key = runtime.block_on(node.create(1));
            runtime.block_on(node.encrypt(&key, FIRST));
            counted(&runtime, Box::pin(node.encrypt(&key, CALLS)));
        }
        "get-key" => {
            let key = runtime.block_on(node.create(1));
            runtime.block_on(node.get(&key, FIRST));
            counted(&runtime, Box::pin(node.get(&key, CALLS)));
        }
        "create-key" => {
            runtime.block_on(node.create(FIRST));
            counted(&runtime, Box::pin(async { drop(node.create(CALLS).await) }));
        }
        "remembered-token" => {
            runtime.block_on(node.authenticate(FIRST));
            counted(&runtime, Box::pin(node.authenticate(CALLS)));
        }
        other => panic!("{other}"),
    }
}

/// Instructions of one call; none if this build has no symbols.
fn instructions(case: &str) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*rpc::instructions::counted*")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "rpc::instructions::under_callgrind", "--test-threads", "1"])
        .env(CASE, case)
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{case}: {stdout}\n{shown}");
    let counted = shown.lines().find_map(|line| line.split_once("Collected : ")).unwrap().1;
    counted.trim().parse::<u64>().unwrap() / CALLS
}

/// Of every build and case.
fn recorded() -> BTreeMap<(String, String), u64> {
    let text = std::fs::read_to_string(RECORDED).unwrap_or_default();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let figure = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        let name = (words.next().unwrap(), words.next().unwrap());
        (name, words.next().unwrap().parse().unwrap())
    };
    lines.map(figure).collect()
}

fn record(figures: &BTreeMap<(String, String), u64>) {
    let mut text = String::from(
        "# Instructions of one call, as callgrind counts them: build, case, figure. A tenth more is a failure.\n\
         # Written by: POLYKEY_REGENERATE=1 cargo test --workspace --lib instructions\n",
    );
    for ((build, case), figure) in figures {
        text.push_str(&format!("{build} {case} {figure}\n"));
    }
    std::fs::write(RECORDED, text).unwrap();
}

fn skip(reason: &str) {
    println!("skipped: {reason}");
    if let Some(path) = std::env::var_os("POLYKEY_TEST_SKIPS") {
        let mut skips = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(skips, "no_call_takes_a_tenth_more_instructions: {reason}").unwrap();
    }
}

#[test]
fn no_call_takes_a_tenth_more_instructions() {
    if !cfg!(target_arch = "x86_64") {
        return skip("recorded on x86-64");
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        return skip("valgrind is not installed");
    }
    let mut figures = recorded();
    let mut grown = Vec::new();
    for case in ["encrypt-256", "get-key", "create-key", "remembered-token"] {
        let now = instructions(case);
        println!("{case}: {now} instructions, {BUILD}");
        if now == 0 {
            return skip("this build has no symbols: CARGO_PROFILE_RELEASE_STRIP=none keeps them");
        }
        let name = (BUILD.to_owned(), case.to_owned());
        if std::env::var_os("POLYKEY_REGENERATE").is_some() {
            let before = figures.get(&name).copied().unwrap_or_default();
            // What is the same but for a hundredth is not written anew.
            if now.abs_diff(before) > now / 100 {
                figures.insert(name, now);
                record(&figures);
            }
            continue;
        }
        let Some(before) = figures.get(&name).copied() else {
            return skip("no figure is recorded for this build: POLYKEY_REGENERATE=1 records it");
        };
        if now > before + before / 10 {
            grown.push(format!("{case}: {now} instructions, recorded are {before}"));
        }
    }
    assert!(
        grown.is_empty(),
        "{grown:#?}; if that must be: POLYKEY_REGENERATE=1 cargo test --workspace --lib instructions"
    );
}
