//! What the tests of the audit log share: vaults on every store, a signer, and a store that fails.

mod archive;
mod crash;
mod proofs;
mod reading;
mod tamper;
mod trail;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use futures::future::BoxFuture;
use polykey_hsm::Ring;
use polykey_proto::polykey::record::v1::{AuditEvent, KeyRecord};
use polykey_storage::memory::Memory;
use polykey_storage::redb::Redb;
use polykey_storage::{
    ChangesError, Commit, CommitError, Committed, Finish, ReadError, ReopenError, Revision, RowKey,
    Snapshot, Store, StoreError, StoreStatus,
};

use super::event::{Origin, Outcome};
use super::trail::{Options, Trail};
use super::{Signer, VerifyingKey};
use crate::error::Error;
use crate::key::KeyId;
use crate::time::{Clock, Time};
use crate::vault::{Invalidate, Vault};

const NODE: [u8; 16] = [7; 16];

struct Nothing;

impl Invalidate for Nothing {
    fn invalidate(&self, _: &[&RowKey]) {}
    fn clear(&self) {}
}

pub(super) struct Key(Ed25519KeyPair);

impl Key {
    pub(super) fn new(seed: u8) -> Arc<Self> {
        Arc::new(Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()))
    }

    pub(super) fn verifying(&self) -> VerifyingKey {
        VerifyingKey(self.public_key())
    }
}

impl Signer for Key {
    fn public_key(&self) -> [u8; 32] {
        self.0.public_key().as_ref().try_into().unwrap()
    }
    fn sign(&self, message: &[u8]) -> Result<[u8; 64], Error> {
        Ok(self.0.sign(message).as_ref().try_into().unwrap())
    }
}

fn clock() -> Clock {
    Clock::manual(Time::from_seconds(1_800_000_000))
}

async fn create_on(store: Arc<dyn Store>, ring: Ring) -> Arc<Vault> {
    let caches = Arc::new(Nothing);
    Arc::new(Vault::create(store, ring, NODE, Vec::new(), caches, clock()).await.unwrap())
}

pub(super) async fn in_memory() -> Arc<Vault> {
    create_on(Arc::new(Memory::new().unwrap()), Ring::generate(NODE).unwrap()).await
}

pub(super) async fn on_disk(path: &Path, ring: &Ring) -> Arc<Vault> {
    let options = polykey_storage::redb::Options::default();
    if !path.exists() {
        let store = Redb::create(path, options).unwrap();
        return create_on(Arc::new(store), ring.clone()).await;
    }
    // The writer of the vault before may still be letting the file go.
    let mut tries = 0;
    let store = loop {
        match Redb::open(path, options) {
            Ok(store) => break store,
            Err(error) => assert!(tries < 500, "{error}"),
        }
        tries += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let opened = Vault::open(Arc::new(store), ring.clone(), NODE, Arc::new(Nothing), clock());
    Arc::new(opened.await.unwrap())
}

pub(super) fn quick() -> Options {
    Options { usage_interval: Duration::from_millis(20), ..Options::default() }
}

pub(super) fn id(n: u128) -> KeyId {
    KeyId::from_slice(&uuid::Uuid::from_u128(n).into_bytes()).unwrap()
}

/// Event `n` on a key: the request id is its own.
pub(super) fn event(n: u64, key: Option<KeyId>, action: &str, outcome: Outcome) -> AuditEvent {
    let request_id = format!("request-{n}");
    let origin = Origin {
        time: Time::from_micros(1_800_000_000_000_000 + i64::try_from(n).unwrap()),
        request_id: &request_id,
        correlation_id: "",
        client_id: "client-a",
        certificate: None,
        peer: Some("[::ffff:192.0.2.7]:4711".parse().unwrap()),
    };
    origin.event(action, key.map(|k| (k, Some(1))), outcome, 0, "").build()
}

pub(super) fn read(n: u64, key: KeyId) -> AuditEvent {
    event(n, Some(key), "GetKey", Outcome::Success)
}

/// Makes the row of a key, so that its use is kept.
pub(super) async fn make(vault: &Vault, key: KeyId) {
    let mut tx = vault.begin().await.unwrap();
    let record = KeyRecord { key_id: key.bytes().to_vec().into(), ..Default::default() };
    tx.insert(&key.bytes(), &record).unwrap();
    tx.event(event(0, Some(key), "CreateKey", Outcome::Success));
    tx.commit().await.unwrap();
}

/// Request ids of all events of the log, in order, and whether leaf indexes are contiguous.
pub(super) async fn requests(vault: &Vault) -> Vec<String> {
    let leaves = vault.head().leaves;
    let bodies = super::usage::read_bodies(vault, 0, leaves, usize::MAX).await.unwrap();
    assert_eq!(bodies.len() as u64, leaves);
    let mut ids = Vec::new();
    for (expected, (index, body)) in (0..).zip(bodies) {
        assert_eq!(index, expected);
        ids.extend(body.events.into_iter().map(|e| e.request_id));
    }
    ids
}

pub(super) async fn start(vault: &Arc<Vault>, options: Options) -> Trail {
    Trail::start(Arc::clone(vault), options, Some(Key::new(1))).await.unwrap()
}

/// What becomes of the next commits of a [`Faulty`] store.
pub(super) const HEALTHY: u8 = 0;
/// Applied, and the answer lost. Once.
pub(super) const LOST_ANSWER: u8 = 1;
/// Not applied, and the answer lost. Once.
pub(super) const LOST_COMMIT: u8 = 2;
/// Refused, until it is healthy again.
pub(super) const REFUSING: u8 = 3;

pub(super) struct Faulty {
    inner: Memory,
    pub(super) mode: Arc<AtomicU8>,
}

pub(super) async fn faulty() -> (Arc<Vault>, Arc<AtomicU8>) {
    let mode = Arc::new(AtomicU8::new(HEALTHY));
    let store = Faulty { inner: Memory::new().unwrap(), mode: Arc::clone(&mode) };
    (create_on(Arc::new(store), Ring::generate(NODE).unwrap()).await, mode)
}

impl Store for Faulty {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        self.inner.snapshot()
    }
    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move {
            let failure = || StoreError::Other("injected".into());
            match self.mode.load(Ordering::SeqCst) {
                LOST_ANSWER => {
                    self.mode.store(HEALTHY, Ordering::SeqCst);
                    self.inner.commit(group, finish).await?;
                    Err(CommitError::OutcomeUnknown(failure()))
                }
                LOST_COMMIT => {
                    self.mode.store(HEALTHY, Ordering::SeqCst);
                    Err(CommitError::OutcomeUnknown(failure()))
                }
                REFUSING => Err(CommitError::Store(failure())),
                _ => self.inner.commit(group, finish).await,
            }
        })
    }
    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(Revision, Vec<RowKey>)>, ChangesError>> {
        self.inner.changes(after, limit)
    }
    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        self.inner.reopen()
    }
    fn status(&self) -> StoreStatus {
        self.inner.status()
    }
}
