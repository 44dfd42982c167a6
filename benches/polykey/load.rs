//! The load: so many requests in flight on so many connections, for a window after a warm-up.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use polykey::net::client::{ClientFiles, ClientTls, ConnectOptions};
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::admin_service_client::AdminServiceClient;
use polykey_proto::polykey::v2::crypto_service_client::CryptoServiceClient;
use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::common::Server;
use crate::{echo, process};

const WARM_UP: Duration = Duration::from_secs(1);
const PAYLOAD: usize = 256;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 256 bytes there and back, over our listener.
    Echo,
    /// The same over gRPC as it comes.
    StockEcho,
    Health,
    /// The wrapped form, from the cache.
    GetKey,
    /// AES-256, durable.
    Create,
    /// 256 bytes under AES-256-GCM-SIV.
    Encrypt,
    Decrypt,
    Encrypt4KiB,
    Encrypt64KiB,
    /// 100 encryptions of 256 bytes in one call.
    EncryptBatch,
    /// Shown, and so recorded durably before the answer.
    DataKey,
    SignEd25519,
    SignP256,
    SignRsa2048,
    SignMlDsa65,
}

/// The keys that sign.
const SIGNERS: [(Kind, pb::KeyType); 4] = [
    (Kind::SignEd25519, pb::KeyType::Ed25519),
    (Kind::SignP256, pb::KeyType::EcdsaP256),
    (Kind::SignRsa2048, pb::KeyType::Rsa2048),
    (Kind::SignMlDsa65, pb::KeyType::MlDsa65),
];
/// Operations of a batch.
pub(crate) const BATCH: usize = 100;

/// What a window gave.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Requests answered.
    pub(crate) count: u64,
    /// A second.
    pub(crate) rate: f64,
    /// Microseconds.
    pub(crate) p50: f64,
    /// Microseconds.
    pub(crate) p99: f64,
    /// The server's CPU time a request, in microseconds.
    pub(crate) cpu: f64,
    /// Requests that failed.
    pub(crate) errors: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rate, p50, p99, cpu, errors, .. } = self;
        write!(f, "{rate:.0}/s, p50 {p50:.0} µs, p99 {p99:.0} µs, CPU {cpu:.1} µs, {errors} errors")
    }
}

/// Whom to ask, and as whom.
#[derive(Clone)]
pub(crate) struct Calls {
    tls: ClientTls,
    address: String,
    token: String,
    key: String,
    ciphertext: Bytes,
    signers: Vec<(Kind, String)>,
}

/// One connection.
#[derive(Clone)]
struct Line {
    channel: Channel,
    calls: Arc<Calls>,
}

impl Calls {
    /// Someone without a token.
    pub(crate) fn bare(address: &str, files: ClientFiles) -> Self {
        let tls = ClientTls::load(&files).unwrap();
        let (token, key) = (String::new(), String::new());
        let (ciphertext, signers) = (Bytes::new(), Vec::new());
        Self { tls, address: address.to_owned(), token, key, ciphertext, signers }
    }

    /// The administrator of a node, with a key to read.
    pub(crate) async fn login(server: &Server) -> Self {
        let (files, client_id, api_key) = server.profile_files();
        let mut calls = Self::bare(&server.address, files);
        let body = pb::AuthenticateRequest { client_id, api_key, ..Default::default() };
        let reply = PolykeyServiceClient::new(calls.channel()).authenticate(body).await.unwrap();
        calls.token = reply.into_inner().access_token;
        let mut client = PolykeyServiceClient::new(calls.channel());
        let made = client.create_key(calls.with(create())).await.unwrap();
        calls.key = made.into_inner().key_id;
        let mut work = CryptoServiceClient::new(calls.channel());
        let sealed = work.encrypt(calls.with(encrypt(&calls.key, PAYLOAD))).await.unwrap();
        calls.ciphertext = sealed.into_inner().ciphertext;
        for (kind, key_type) in SIGNERS {
            let body = pb::CreateKeyRequest { key_type: key_type.into(), ..Default::default() };
            let made = client.create_key(calls.with(body)).await.unwrap();
            calls.signers.push((kind, made.into_inner().key_id));
        }
        calls
    }

    pub(crate) fn channel(&self) -> Channel {
        let address = format!("https://{}", self.address);
        self.tls.connect_lazy(&address, &ConnectOptions::default()).unwrap()
    }

    pub(crate) fn with<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        let value = format!("Bearer {}", self.token).parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        request
    }

    /// Commits so far.
    pub(crate) async fn revision(&self) -> u64 {
        let mut admin = AdminServiceClient::new(self.channel());
        let reply = admin.get_store_status(self.with(pb::GetStoreStatusRequest {})).await;
        reply.unwrap().into_inner().revision
    }
}

fn create() -> pb::CreateKeyRequest {
    pb::CreateKeyRequest { key_type: pb::KeyType::Aes256 as i32, ..Default::default() }
}

fn encrypt(key: &str, length: usize) -> pb::EncryptRequest {
    let plaintext = Bytes::from(vec![7; length]);
    pb::EncryptRequest { key_id: key.to_owned(), plaintext, ..Default::default() }
}

impl Line {
    async fn call(&self, kind: Kind) -> Result<(), Status> {
        let calls = &self.calls;
        let mut keys = PolykeyServiceClient::new(self.channel.clone());
        match kind {
            Kind::Echo | Kind::StockEcho => {
                let mut grpc = tonic::client::Grpc::new(self.channel.clone());
                grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
                let body = pb::KeyMaterial {
                    encrypted_key_data: Bytes::from_static(&[7; PAYLOAD]),
                    ..Default::default()
                };
                let codec = polykey_proto::Codec::<pb::KeyMaterial, pb::KeyMaterial>::default();
                let path = PathAndQuery::from_static(echo::PATH);
                let reply = grpc.unary(Request::new(body), path, codec).await?.into_inner();
                assert_eq!(reply.encrypted_key_data.len(), PAYLOAD);
            }
            Kind::Health => drop(keys.health_check(()).await?),
            Kind::GetKey => {
                let body = pb::GetKeyRequest { key_id: calls.key.clone(), ..Default::default() };
                drop(keys.get_key(calls.with(body)).await?);
            }
            Kind::Create => drop(keys.create_key(calls.with(create())).await?),
            _ => self.work(kind).await?,
        }
        Ok(())
    }

    async fn work(&self, kind: Kind) -> Result<(), Status> {
        let calls = &self.calls;
        let mut work = CryptoServiceClient::new(self.channel.clone());
        let mut seal = async |length| work.encrypt(calls.with(encrypt(&calls.key, length))).await;
        match kind {
            Kind::Encrypt => drop(seal(PAYLOAD).await?),
            Kind::Encrypt4KiB => drop(seal(4096).await?),
            Kind::Encrypt64KiB => drop(seal(65_536).await?),
            Kind::Decrypt => {
                let ciphertext = calls.ciphertext.clone();
                let body = pb::DecryptRequest { ciphertext, ..Default::default() };
                let opened = work.decrypt(calls.with(body)).await?.into_inner();
                assert_eq!(opened.plaintext.len(), PAYLOAD);
            }
            Kind::EncryptBatch => {
                let one = encrypt(&calls.key, PAYLOAD);
                let operation = pb::CryptoOperation {
                    operation: Some(pb::crypto_operation::Operation::Encrypt(one)),
                    ..Default::default()
                };
                let operations = vec![operation; BATCH];
                let body = pb::BatchCryptoRequest { operations, continue_on_error: true };
                let done = work.batch_crypto(calls.with(body)).await?.into_inner();
                assert_eq!(done.failed_count, 0);
            }
            Kind::DataKey => {
                let key_id = calls.key.clone();
                let body = pb::GenerateDataKeyRequest { key_id, ..Default::default() };
                drop(work.generate_data_key(calls.with(body)).await?);
            }
            _ => {
                let signer = calls.signers.iter().find(|(of, _)| *of == kind);
                let body = pb::SignRequest {
                    key_id: signer.unwrap().1.clone(),
                    input: Some(pb::sign_request::Input::Message(Bytes::from_static(&[7; 32]))),
                    ..Default::default()
                };
                drop(work.sign(calls.with(body)).await?);
            }
        }
        Ok(())
    }
}

/// Runs `c` requests at a time over `n` connections. `pid` is the process whose CPU counts.
pub(crate) async fn measure(
    calls: &Calls,
    kind: Kind,
    c: usize,
    n: usize,
    window: Duration,
    pid: u32,
) -> Figures {
    let calls = Arc::new(calls.clone());
    let lines: Vec<Line> =
        (0..n).map(|_| Line { channel: calls.channel(), calls: Arc::clone(&calls) }).collect();
    let counting = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..c)
        .map(|task| {
            let line = lines[task % n].clone();
            let (counting, stop) = (Arc::clone(&counting), Arc::clone(&stop));
            tokio::spawn(async move {
                let (mut times, mut errors) = (Vec::new(), 0_u64);
                while !stop.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    let result = line.call(kind).await;
                    if counting.load(Ordering::Relaxed) {
                        match result {
                            Ok(()) => times.push(started.elapsed().as_micros() as u32),
                            Err(status) => {
                                if errors == 0 {
                                    println!("{kind:?}: {status}");
                                }
                                errors += 1;
                            }
                        }
                    }
                }
                (times, errors)
            })
        })
        .collect();
    tokio::time::sleep(WARM_UP).await;
    let (cpu, started) = (process::cpu(pid), Instant::now());
    counting.store(true, Ordering::Relaxed);
    tokio::time::sleep(window).await;
    counting.store(false, Ordering::Relaxed);
    let (cpu, elapsed) = (process::cpu(pid) - cpu, started.elapsed());
    stop.store(true, Ordering::Relaxed);
    let (mut times, mut errors) = (Vec::new(), 0);
    for task in tasks {
        let (mut more, failed) = task.await.unwrap();
        times.append(&mut more);
        errors += failed;
    }
    times.sort_unstable();
    let at = |share: f64| {
        let index = ((times.len() as f64) * share) as usize;
        times.get(index.min(times.len().saturating_sub(1))).map_or(f64::NAN, |t| f64::from(*t))
    };
    let count = times.len() as u64;
    Figures {
        count,
        rate: count as f64 / elapsed.as_secs_f64(),
        p50: at(0.50),
        p99: at(0.99),
        cpu: cpu as f64 / count.max(1) as f64,
        errors,
    }
}
