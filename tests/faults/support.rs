//! Sizes, seeds, typed calls, and what an answer tells about its call.

use std::time::Duration;

use polykey_proto::polykey::v2::admin_service_client::AdminServiceClient;
use polykey_proto::polykey::v2::crypto_service_client::CryptoServiceClient;
use polykey_proto::polykey::v2::key_lifecycle_service_client::KeyLifecycleServiceClient;
use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::common::client::Client;

/// Whether this is the long run.
pub(crate) fn full() -> bool {
    std::env::var("POLYKEY_FAULTS").is_ok_and(|v| v == "full")
}

/// `ci` or `long`, unless the environment variable `name` says otherwise.
pub(crate) fn size(name: &str, ci: usize, long: usize) -> usize {
    let given = std::env::var(name).ok().and_then(|v| v.parse().ok());
    given.unwrap_or(if full() { long } else { ci })
}

/// A stated deadline: exact in the long run, five times as long on a shared CI machine.
pub(crate) fn deadline(stated: Duration) -> Duration {
    if full() { stated } else { stated * 5 }
}

/// SplitMix64: repeatable choices, nothing secret.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// Seeded by `POLYKEY_SEED` or anew; the seed is printed.
    pub(crate) fn seeded(test: &str) -> Self {
        let given = std::env::var("POLYKEY_SEED").ok().and_then(|v| v.parse().ok());
        let seed = given.unwrap_or_else(|| {
            let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
            u64::try_from(since.as_micros()).unwrap_or_default()
        });
        println!("{test}: POLYKEY_SEED={seed}");
        Self(seed)
    }

    /// An independent one.
    pub(crate) fn fork(&mut self) -> Self {
        Self(self.next())
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }
}

/// A connection and the token that goes with it.
#[derive(Clone)]
pub(crate) struct Wire {
    pub(crate) channel: Channel,
    pub(crate) token: String,
}

impl Wire {
    pub(crate) fn of(client: &Client) -> Self {
        Self { channel: client.channel.clone(), token: client.token.clone() }
    }

    /// The same caller over a connection of its own.
    pub(crate) fn another(client: &Client) -> Self {
        Self::of(&client.at(&client.address))
    }

    pub(crate) fn keys(&self) -> PolykeyServiceClient<Channel> {
        PolykeyServiceClient::new(self.channel.clone())
    }

    pub(crate) fn work(&self) -> CryptoServiceClient<Channel> {
        CryptoServiceClient::new(self.channel.clone())
    }

    pub(crate) fn lifecycle(&self) -> KeyLifecycleServiceClient<Channel> {
        KeyLifecycleServiceClient::new(self.channel.clone())
    }

    pub(crate) fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel.clone())
    }

    /// With the token.
    pub(crate) fn with<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        let value = format!("Bearer {}", self.token).parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        request
    }

    /// With the token and an idempotency key, which is also the id of the request.
    pub(crate) fn once<T>(&self, body: T, key: &str) -> Request<T> {
        let mut request = named(self.with(body), key);
        request.metadata_mut().insert("idempotency-key", key.parse().unwrap());
        request
    }
}

/// A request by this id.
pub(crate) fn named<T>(mut request: Request<T>, id: &str) -> Request<T> {
    request.metadata_mut().insert("polykey-request-id", id.parse().unwrap());
    request
}

/// What is known of a mutation after its call.
#[derive(Debug)]
pub(crate) enum Outcome<T> {
    /// Acknowledged.
    Done(T),
    /// It may or may not have happened.
    Unknown,
}

/// An answer, or that there is none. Any other refusal of what the model allows is a contradiction.
#[track_caller]
pub(crate) fn outcome<T>(what: &str, result: Result<Response<T>, Status>) -> Outcome<T> {
    match result {
        Ok(response) => Outcome::Done(response.into_inner()),
        Err(status) if lost(&status) => Outcome::Unknown,
        Err(status) => panic!("{what}: {status:?}"),
    }
}

/// Whether a status says that the answer was lost or cannot be given.
pub(crate) fn lost(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unknown
            | Code::Unavailable
            | Code::Cancelled
            | Code::Internal
            | Code::DeadlineExceeded
    )
}

/// Fails if a server wrote that it panicked. Where redb meets a page that makes no sense it may panic; the storage
/// crate takes that for what it is, a damaged file, so it does not count.
#[track_caller]
pub(crate) fn no_panic(output: &str) {
    let ours = |line: &&str| line.contains("panicked") && !line.contains("/redb-");
    assert!(output.lines().find(ours).is_none(), "the server panicked:\n{output}");
}
