//! kill -9 at random under a mixed load: what was acknowledged is there and stands in the audit log once, what was not
//! is settled by asking again.

mod records;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use polykey_proto::polykey::v2 as pb;
use records::recorded_once;
use tokio::sync::Notify;
use tonic::{Code, Request};

use crate::common::client::Client;
use crate::common::{Options, Server};
use crate::support::{Outcome, Random, Wire, deadline, lost, named, no_panic, outcome, size};

const WORKERS: usize = 8;
const READY: Duration = Duration::from_secs(1);

/// What a key must look like.
#[derive(Clone, Debug)]
struct Key {
    id: String,
    version: i32,
    description: String,
    revoked: bool,
}

#[derive(Clone, Debug)]
enum Op {
    Create,
    Batch(usize),
    Rotate(usize),
    RotateBoth(usize, usize),
    Update(usize),
    Revoke(usize),
    // These change nothing, and are asked once.
    DataKey(usize),
    Login,
    Denied,
}

impl Op {
    /// What the audit log calls it, and how it ends there.
    fn recorded(&self) -> (&'static str, pb::AuditOutcome) {
        let action = match self {
            Self::Create | Self::Batch(_) | Self::Denied => "CreateKey",
            Self::Rotate(_) | Self::RotateBoth(..) => "RotateKey",
            Self::Update(_) => "UpdateKeyMetadata",
            Self::Revoke(_) => "RevokeKey",
            Self::DataKey(_) => "GenerateDataKey",
            Self::Login => "Authenticate",
        };
        match self {
            Self::Denied => (action, pb::AuditOutcome::Denied),
            _ => (action, pb::AuditOutcome::Success),
        }
    }

    fn changes(&self) -> bool {
        !matches!(self, Self::DataKey(_) | Self::Login | Self::Denied)
    }
}

/// A key that an operation was about: its id, its version after it, and the leaf that the answer named, or 0.
type Made = (String, i32, u64);

/// An operation under way: its name is its idempotency key, the id of its request, and the tag or text it leaves.
#[derive(Clone, Debug)]
struct Pending {
    name: String,
    op: Op,
}

/// One caller, which alone changes its keys, so that their history is a sequence.
struct Worker {
    number: usize,
    keys: Vec<Key>,
    pending: Option<Pending>,
    sent: u64,
    touched: BTreeSet<usize>,
    /// What was acknowledged, to be looked for in the audit log.
    acknowledged: Vec<(Pending, Vec<Made>)>,
    /// Somebody who may not make keys.
    nobody: Client,
    random: Random,
}

fn item(name: &str) -> pb::CreateKeyItem {
    pb::CreateKeyItem {
        key_type: pb::KeyType::Aes256 as i32,
        tags: [("op".to_owned(), name.to_owned())].into(),
        ..Default::default()
    }
}

impl Worker {
    fn new(number: usize, nobody: Client, random: Random) -> Self {
        let (keys, touched, acknowledged) = (Vec::new(), BTreeSet::new(), Vec::new());
        Self { number, keys, pending: None, sent: 0, touched, acknowledged, nobody, random }
    }

    fn choose(&mut self) -> Pending {
        self.sent += 1;
        let name = format!("w{}-{}", self.number, self.sent);
        let live: Vec<usize> = (0..self.keys.len()).filter(|&k| !self.keys[k].revoked).collect();
        let op = match self.random.below(12) {
            _ if live.len() < 3 => Op::Create,
            0 | 1 => Op::Create,
            2 => Op::Batch(2 + self.random.below(4)),
            3..=5 => Op::Rotate(live[self.random.below(live.len())]),
            6 => Op::RotateBoth(live[0], live[1 + self.random.below(live.len() - 1)]),
            7 | 8 => Op::Update(live[self.random.below(live.len())]),
            9 => Op::Revoke(live[self.random.below(live.len())]),
            10 => Op::DataKey(live[self.random.below(live.len())]),
            // So seldom that each denial is within the burst that is recorded by itself.
            _ if self.random.below(5) == 0 => Op::Denied,
            _ => Op::Login,
        };
        Pending { name, op }
    }

    /// Sends it; what it came to.
    async fn send(&self, wire: &Wire, pending: &Pending) -> Outcome<Vec<Made>> {
        let what = format!("{pending:?}");
        let mut keys = wire.keys();
        let id = |k: usize| self.keys[k].id.clone();
        let name = &pending.name;
        match pending.op {
            Op::Create => {
                let pb::CreateKeyItem { key_type, tags, .. } = item(name);
                let body = pb::CreateKeyRequest { key_type, tags, ..Default::default() };
                match outcome(&what, keys.create_key(wire.once(body, name)).await) {
                    Outcome::Done(reply) => {
                        Outcome::Done(vec![(reply.key_id, 1, reply.audit_index)])
                    }
                    Outcome::Unknown => Outcome::Unknown,
                }
            }
            Op::Batch(count) => {
                let items = (0..count).map(|_| item(name)).collect();
                let body =
                    pb::BatchCreateKeysRequest { keys: items, atomic: true, ..Default::default() };
                let reply = outcome(&what, keys.batch_create_keys(wire.once(body, name)).await);
                let Outcome::Done(reply) = reply else { return Outcome::Unknown };
                let mut made = Vec::new();
                for result in reply.results {
                    match result.result {
                        Some(pb::batch_create_keys_result::Result::Success(key)) => {
                            made.push((key.key_id, 1, key.audit_index));
                        }
                        other => return unsettled(&what, result.error_code, &other),
                    }
                }
                assert_eq!(made.len(), count, "{what}");
                Outcome::Done(made)
            }
            Op::Rotate(k) => {
                let body = pb::RotateKeyRequest { key_id: id(k), ..Default::default() };
                match outcome(&what, keys.rotate_key(wire.once(body, name)).await) {
                    Outcome::Done(reply) => {
                        Outcome::Done(vec![(reply.key_id, reply.new_version, reply.audit_index)])
                    }
                    Outcome::Unknown => Outcome::Unknown,
                }
            }
            Op::RotateBoth(a, b) => {
                let items = [a, b]
                    .map(|k| pb::RotateKeyItem { key_id: id(k), ..Default::default() })
                    .to_vec();
                let body =
                    pb::BatchRotateKeysRequest { keys: items, atomic: true, ..Default::default() };
                let reply = outcome(&what, keys.batch_rotate_keys(wire.once(body, name)).await);
                let Outcome::Done(reply) = reply else { return Outcome::Unknown };
                let mut made = Vec::new();
                for result in reply.results {
                    match result.result {
                        Some(pb::batch_rotate_keys_result::Result::Success(key)) => {
                            made.push((key.key_id, key.new_version, key.audit_index));
                        }
                        other => return unsettled(&what, result.error_code, &other),
                    }
                }
                Outcome::Done(made)
            }
            Op::Update(k) => {
                let body = pb::UpdateKeyMetadataRequest {
                    key_id: id(k),
                    description: Some(name.clone()),
                    ..Default::default()
                };
                match outcome(&what, keys.update_key_metadata(wire.once(body, name)).await) {
                    Outcome::Done(()) => Outcome::Done(vec![(id(k), 0, 0)]),
                    Outcome::Unknown => Outcome::Unknown,
                }
            }
            Op::Revoke(k) => {
                let body =
                    pb::RevokeKeyRequest { key_id: id(k), immediate: true, ..Default::default() };
                match outcome(&what, keys.revoke_key(wire.once(body, name)).await) {
                    Outcome::Done(()) => Outcome::Done(vec![(id(k), 0, 0)]),
                    Outcome::Unknown => Outcome::Unknown,
                }
            }
            Op::DataKey(k) => {
                let body = pb::GenerateDataKeyRequest { key_id: id(k), ..Default::default() };
                let reply = wire.work().generate_data_key(named(wire.with(body), name)).await;
                match outcome(&what, reply) {
                    Outcome::Done(reply) => {
                        Outcome::Done(vec![(reply.key_id, reply.version, reply.audit_index)])
                    }
                    Outcome::Unknown => Outcome::Unknown,
                }
            }
            Op::Login => {
                let body = pb::AuthenticateRequest {
                    client_id: self.nobody.id.clone(),
                    api_key: self.nobody.api_key.clone(),
                    ..Default::default()
                };
                let there = Wire::of(&self.nobody);
                let reply = there.keys().authenticate(named(Request::new(body), name)).await;
                match outcome(&what, reply) {
                    Outcome::Done(_) => Outcome::Done(vec![(String::new(), 0, 0)]),
                    Outcome::Unknown => Outcome::Unknown,
                }
            }
            Op::Denied => {
                let there = Wire::of(&self.nobody);
                let body =
                    pb::CreateKeyRequest { key_type: item(name).key_type, ..Default::default() };
                let refused =
                    there.keys().create_key(named(there.with(body), name)).await.unwrap_err();
                if lost(&refused) {
                    return Outcome::Unknown;
                }
                assert_eq!(refused.code(), Code::PermissionDenied, "{what}: {refused:?}");
                Outcome::Done(vec![(String::new(), 0, 0)])
            }
        }
    }

    /// It has happened, once.
    fn apply(&mut self, pending: &Pending, made: Vec<Made>) {
        self.acknowledged.push((pending.clone(), made.clone()));
        match pending.op {
            Op::DataKey(_) | Op::Login | Op::Denied => {}
            Op::Create | Op::Batch(_) => {
                for (id, version, _) in made {
                    assert!(self.keys.iter().all(|k| k.id != id), "{pending:?}: a second {id}");
                    self.touched.insert(self.keys.len());
                    self.keys.push(Key { id, version, description: String::new(), revoked: false });
                }
            }
            Op::Rotate(k) => self.rotated(pending, k, &made[0]),
            Op::RotateBoth(a, b) => {
                self.rotated(pending, a, &made[0]);
                self.rotated(pending, b, &made[1]);
            }
            Op::Update(k) => {
                self.touched.insert(k);
                self.keys[k].description.clone_from(&pending.name);
            }
            Op::Revoke(k) => {
                self.touched.insert(k);
                self.keys[k].revoked = true;
            }
        }
    }

    fn rotated(&mut self, pending: &Pending, k: usize, made: &Made) {
        self.touched.insert(k);
        let key = &mut self.keys[k];
        key.version += 1;
        assert_eq!((&key.id, key.version), (&made.0, made.1), "{pending:?}: versions");
    }

    /// Sends until an answer is lost.
    async fn load(mut self, wire: Wire, done: Arc<AtomicUsize>, more: Arc<Notify>) -> Self {
        loop {
            let pending = self.choose();
            match self.send(&wire, &pending).await {
                Outcome::Done(made) => {
                    self.apply(&pending, made);
                    done.fetch_add(1, Ordering::SeqCst);
                    more.notify_one();
                }
                Outcome::Unknown => {
                    self.pending = Some(pending);
                    return self;
                }
            }
        }
    }

    /// Asks again for what was lost, twice: one and the same result.
    async fn settle(&mut self, wire: &Wire) {
        let Some(pending) = self.pending.take().filter(|p| p.op.changes()) else { return };
        let Outcome::Done(first) = self.send(wire, &pending).await else {
            panic!("{pending:?}: unknown again")
        };
        let Outcome::Done(second) = self.send(wire, &pending).await else {
            panic!("{pending:?}: unknown again")
        };
        let result = |made: &[Made]| -> Vec<_> {
            made.iter().map(|(id, version, _)| (id.clone(), *version)).collect()
        };
        assert_eq!(result(&first), result(&second), "{pending:?}: two results");
        let count = match pending.op {
            Op::Create => Some(1),
            Op::Batch(count) => Some(count),
            _ => None,
        };
        if let Some(count) = count {
            let body = pb::ListKeysRequest {
                tag_filters: [("op".to_owned(), pending.name.clone())].into(),
                ..Default::default()
            };
            let mut found = 0;
            let mut page_token = String::new();
            loop {
                let body = pb::ListKeysRequest { page_token, ..body.clone() };
                let page = wire.keys().list_keys(wire.with(body)).await.unwrap().into_inner();
                found += page.keys.len();
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            assert_eq!(found, count, "{pending:?}: made more than once, or in part");
        }
        self.apply(&pending, first);
    }

    /// Compares keys with the model.
    async fn check(&self, wire: &Wire, which: impl Iterator<Item = usize>) {
        let which: Vec<usize> = which.collect();
        for part in which.chunks(500) {
            let keys = part
                .iter()
                .map(|&k| pb::GetKeyMetadataItem {
                    key_id: self.keys[k].id.clone(),
                    ..Default::default()
                })
                .collect();
            let body = pb::BatchGetKeyMetadataRequest {
                keys,
                continue_on_error: true,
                ..Default::default()
            };
            let reply = wire.keys().batch_get_key_metadata(wire.with(body)).await.unwrap();
            let results = reply.into_inner().results;
            assert_eq!(results.len(), part.len());
            for (&k, result) in part.iter().zip(results) {
                let key = &self.keys[k];
                let Some(pb::batch_get_key_metadata_result::Result::Success(found)) = result.result
                else {
                    panic!("{key:?} is lost: {result:?}")
                };
                let found = found.metadata.unwrap();
                assert_eq!(found.description, key.description, "{key:?}");
                let revoked = found.status == pb::KeyStatus::Revoked as i32;
                assert_eq!(revoked, key.revoked, "{key:?}: {found:?}");
                if !revoked {
                    assert_eq!(found.version, key.version, "{key:?}: {found:?}");
                }
            }
        }
        if let Some(key) = which.iter().map(|&k| &self.keys[k]).find(|key| key.revoked) {
            let body = pb::GetKeyRequest { key_id: key.id.clone(), ..Default::default() };
            let refused = wire.keys().get_key(wire.with(body)).await.unwrap_err();
            assert_eq!(refused.code(), Code::FailedPrecondition, "{key:?} serves again");
        }
    }
}

fn unsettled<T>(what: &str, code: i32, result: &impl std::fmt::Debug) -> Outcome<T> {
    let code = Code::from_i32(code);
    assert!(matches!(code, Code::Unknown | Code::Unavailable), "{what}: {result:?}");
    Outcome::Unknown
}

async fn healthy(wire: &Wire) {
    let reply = wire.keys().health_check(()).await.unwrap().into_inner();
    assert_eq!(reply.status, pb::HealthStatus::Healthy as i32, "{reply:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kill_nine() {
    let kills = size("POLYKEY_KILLS", 100, 1000);
    let (_, slowest) = killed("kill", kills, |random| random.below(60)).await;
    assert!(slowest <= deadline(READY), "ready after {slowest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_operations_between_kills_have_one_record_each() {
    let kills = size("POLYKEY_LONG_KILLS", 2, 20);
    let operations = size("POLYKEY_OPERATIONS", 600, 50_000);
    let each = operations.div_ceil(kills);
    let (acknowledged, _) = killed("long_kill", kills, |_| each).await;
    assert!(acknowledged >= operations);
}

/// Kills a server so often, each time after so many operations; how many were acknowledged, and the slowest start.
async fn killed(
    test: &str,
    kills: usize,
    enough: impl Fn(&mut Random) -> usize,
) -> (usize, Duration) {
    let mut random = Random::seeded(test);
    let options = Options::default();
    let mut server = Server::dev();
    let mut admin = server.admin().await;
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        let nobody = server.client(&admin, &format!("nobody-{number}"), &[]).await;
        workers.push(Worker::new(number, nobody, random.fork()));
    }
    let mut slowest = Duration::ZERO;
    // Tokens last a quarter of an hour.
    let mut begun = Instant::now();
    let mut unknown = 0;
    let mut acknowledged = 0;
    for _ in 0..kills {
        let done = Arc::new(AtomicUsize::new(0));
        let more = Arc::new(Notify::new());
        let running: Vec<_> = workers
            .drain(..)
            .map(|worker| {
                let wire = Wire::another(&admin);
                tokio::spawn(worker.load(wire, Arc::clone(&done), Arc::clone(&more)))
            })
            .collect();
        let enough = enough(&mut random);
        while done.load(Ordering::SeqCst) < enough {
            tokio::time::timeout(crate::common::PATIENCE, more.notified()).await.unwrap();
        }
        tokio::time::sleep(Duration::from_micros(random.below(3000) as u64)).await;
        no_panic(&server.output());
        let started = Instant::now();
        server = tokio::task::block_in_place(|| server.restart(true, &options));
        admin = admin.at(&server.address);
        let wire = Wire::of(&admin);
        healthy(&wire).await;
        let ready = started.elapsed();
        slowest = slowest.max(ready);
        let often = begun.elapsed() > Duration::from_secs(5 * 60);
        if often {
            (begun, admin) = (Instant::now(), server.admin().await);
        }
        let wire = Wire::of(&admin);
        for worker in running {
            let mut worker = worker.await.unwrap();
            worker.nobody = worker.nobody.at(&server.address);
            if often {
                worker.nobody.login().await.unwrap();
            }
            unknown += usize::from(worker.pending.is_some());
            worker.settle(&wire).await;
            let mut which = std::mem::take(&mut worker.touched);
            if !worker.keys.is_empty() {
                which.extend((0..5).map(|_| worker.random.below(worker.keys.len())));
            }
            worker.check(&wire, which.into_iter()).await;
            workers.push(worker);
        }
        acknowledged += done.load(Ordering::SeqCst);
    }
    let wire = Wire::of(&admin);
    let mut keys = 0;
    for worker in &workers {
        worker.check(&wire, 0..worker.keys.len()).await;
        keys += worker.keys.len();
    }
    println!(
        "{test}: {kills} kills, {acknowledged} acknowledged, {unknown} unknown and settled, {keys} keys, \
         slowest start {slowest:?}"
    );
    let (operations, records) = recorded_once(&wire, &workers).await;
    println!("{test}: {operations} operations acknowledged, {records} records, each once");
    assert!(acknowledged > kills && unknown > kills, "the load was no load");
    for command in [["store", "verify"], ["audit", "verify"]] {
        let (code, out, err) = tokio::task::block_in_place(|| server.cli(&command));
        assert_eq!(code, 0, "{command:?}: {out}{err}");
    }
    no_panic(&server.output());
    (acknowledged, slowest)
}
