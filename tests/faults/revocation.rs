//! 32 connections hammer while keys, tokens, clients and roles are taken away: after the acknowledgement nothing
//! that starts later succeeds, alone, in batches or in streams. One process, one monotonic clock.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use parking_lot::{Mutex, RwLock};
use polykey_proto::polykey::v2 as pb;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::common::client::Client;
use crate::common::{PATIENCE, Server};
use crate::support::{Random, Wire, full, no_panic, size};

const VICTIMS: usize = 4;
const CONNECTIONS: usize = 32;
const FORMS: [&str; 7] =
    ["single", "batch", "stream", "message", "encrypt", "encrypt batch", "encrypt message"];
const ROLE: &str = "reader-for-now";

/// What is used at the moment, and by which token.
#[derive(Clone, Default)]
struct Target {
    round: usize,
    key: String,
    tokens: Vec<String>,
}

/// One call that was made.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    round: usize,
    victim: usize,
    form: &'static str,
    started: Instant,
    succeeded: bool,
}

#[derive(Default)]
struct Field {
    target: RwLock<Target>,
    attempts: Mutex<Vec<Attempt>>,
    made: AtomicUsize,
    stop: AtomicBool,
}

/// What is taken away, and from whom; the number is a victim.
#[derive(Clone, Copy, Debug)]
enum Blow {
    RevokeKey,
    BatchRevoke,
    DisableKey,
    RemoveContext(usize),
    RevokeToken(usize),
    RevokeTokens(usize),
    DisableClient(usize),
    TakeRole(usize),
    EmptyRole,
    RemoveClient(usize),
}

impl Blow {
    /// Whether it takes this victim's use of the key away.
    fn hits(self, victim: usize) -> bool {
        match self {
            Self::RevokeKey | Self::BatchRevoke | Self::DisableKey | Self::EmptyRole => true,
            Self::RemoveContext(v)
            | Self::RevokeToken(v)
            | Self::RevokeTokens(v)
            | Self::DisableClient(v)
            | Self::TakeRole(v)
            | Self::RemoveClient(v) => v == victim,
        }
    }

    /// Whether it reaches calls that read metadata alone, which a revoked key still answers.
    fn of_the_caller(self) -> bool {
        !matches!(self, Self::RevokeKey | Self::BatchRevoke | Self::DisableKey)
    }
}

/// A stream that stays open while it is asked one thing after another.
struct Open {
    ask: mpsc::Sender<pb::StreamGetKeyMetadataRequest>,
    answers: tonic::Streaming<pb::StreamGetKeyMetadataResponse>,
    round: usize,
}

async fn open(wire: &Wire, round: usize) -> Result<Open, Status> {
    let (ask, asked) = mpsc::channel(1);
    let request = wire.with(ReceiverStream::new(asked));
    let answers = wire.keys().stream_get_key_metadata(request).await?.into_inner();
    Ok(Open { ask, answers, round })
}

/// A stream of operations that stays open likewise.
struct Working {
    ask: mpsc::Sender<pb::CryptoOperation>,
    answers: tonic::Streaming<pb::CryptoResult>,
    round: usize,
}

fn encrypting(key: String) -> pb::EncryptRequest {
    pb::EncryptRequest { key_id: key, plaintext: b"x".as_slice().into(), ..Default::default() }
}

fn operation(key: String) -> pb::CryptoOperation {
    let operation = Some(pb::crypto_operation::Operation::Encrypt(encrypting(key)));
    pb::CryptoOperation { operation, ..Default::default() }
}

fn encrypted(result: &pb::CryptoResult) -> bool {
    matches!(result.result, Some(pb::crypto_result::Result::Encrypt(_)))
}

async fn encrypt(wire: &Wire, key: String) -> bool {
    judged(wire.work().encrypt(wire.with(encrypting(key))).await.map(drop))
}

async fn encrypt_batch(wire: &Wire, key: String) -> bool {
    let operations = vec![operation(key); 3];
    let body = pb::BatchCryptoRequest { operations, continue_on_error: true };
    match wire.work().batch_crypto(wire.with(body)).await {
        Ok(reply) => reply.into_inner().results.iter().any(encrypted),
        Err(status) => judged(Err(status)),
    }
}

async fn encrypt_message(
    held: &mut Option<Working>,
    wire: &Wire,
    round: usize,
    key: String,
) -> bool {
    if held.as_ref().is_none_or(|open| open.round != round) {
        let (ask, asked) = mpsc::channel(1);
        match wire.work().stream_crypto(wire.with(ReceiverStream::new(asked))).await {
            Ok(answers) => *held = Some(Working { ask, answers: answers.into_inner(), round }),
            Err(status) => return judged(Err(status)),
        }
    }
    let Some(stream) = held else { return false };
    let answer = match stream.ask.send(operation(key)).await {
        Ok(()) => stream.answers.next().await,
        Err(_) => None,
    };
    match answer {
        Some(Ok(result)) => encrypted(&result),
        Some(Err(status)) => {
            *held = None;
            judged(Err(status))
        }
        None => {
            *held = None;
            false
        }
    }
}

async fn single(wire: &Wire, key: String) -> bool {
    let body = pb::GetKeyRequest { key_id: key, ..Default::default() };
    judged(wire.keys().get_key(wire.with(body)).await.map(drop))
}

async fn batch(wire: &Wire, key: String) -> bool {
    let item = pb::KeyRequestItem { key_id: key, ..Default::default() };
    let keys = vec![item; 3];
    let body = pb::BatchGetKeysRequest { keys, continue_on_error: true, ..Default::default() };
    match wire.keys().batch_get_keys(wire.with(body)).await {
        Ok(reply) => reply
            .into_inner()
            .results
            .iter()
            .any(|r| matches!(r.result, Some(pb::batch_get_keys_result::Result::Success(_)))),
        Err(status) => judged(Err(status)),
    }
}

async fn stream(wire: &Wire, key: String) -> bool {
    let body = pb::StreamGetKeysRequest { key_id: key, ..Default::default() };
    let mut answers = match wire.keys().stream_get_keys(wire.with(body)).await {
        Ok(reply) => reply.into_inner(),
        Err(status) => return judged(Err(status)),
    };
    let mut any = false;
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(answer) => {
                any |=
                    matches!(answer.result, Some(pb::stream_get_keys_response::Result::Success(_)))
            }
            Err(status) => return judged(Err(status)) || any,
        }
    }
    any
}

async fn message(held: &mut Option<Open>, wire: &Wire, round: usize, key: String) -> bool {
    if held.as_ref().is_none_or(|open| open.round != round) {
        match open(wire, round).await {
            Ok(fresh) => *held = Some(fresh),
            Err(status) => return judged(Err(status)),
        }
    }
    let Some(stream) = held else { return false };
    let request = pb::GetKeyMetadataRequest { key_id: key, ..Default::default() };
    let request = pb::StreamGetKeyMetadataRequest { request: Some(request) };
    if stream.ask.send(request).await.is_err() {
        *held = None;
        return false;
    }
    match stream.answers.next().await {
        Some(Ok(answer)) => {
            matches!(answer.result, Some(pb::stream_get_key_metadata_response::Result::Success(_)))
        }
        Some(Err(status)) => {
            *held = None;
            judged(Err(status))
        }
        None => {
            *held = None;
            false
        }
    }
}

/// A refusal must be one that was meant, not a server that is out of order.
fn judged(result: Result<(), Status>) -> bool {
    match result {
        Ok(()) => true,
        Err(status) => {
            assert!(
                matches!(
                    status.code(),
                    Code::NotFound
                        | Code::PermissionDenied
                        | Code::FailedPrecondition
                        | Code::Unauthenticated
                ),
                "{status:?}"
            );
            false
        }
    }
}

async fn hammer(field: Arc<Field>, wire: Wire, number: usize) {
    let victim = number % VICTIMS;
    let (mut held, mut working) = (None, None);
    let mut turn = number;
    while !field.stop.load(Ordering::Relaxed) {
        turn += 1;
        let form = FORMS[turn % FORMS.len()];
        let target = field.target.read().clone();
        if target.tokens[victim].is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        }
        let wire = Wire { token: target.tokens[victim].clone(), ..wire.clone() };
        let started = Instant::now();
        let call = async {
            match form {
                "single" => single(&wire, target.key).await,
                "batch" => batch(&wire, target.key).await,
                "stream" => stream(&wire, target.key).await,
                "encrypt" => encrypt(&wire, target.key).await,
                "encrypt batch" => encrypt_batch(&wire, target.key).await,
                "encrypt message" => {
                    encrypt_message(&mut working, &wire, target.round, target.key).await
                }
                _ => message(&mut held, &wire, target.round, target.key).await,
            }
        };
        let succeeded = tokio::time::timeout(PATIENCE, call).await.unwrap();
        let attempt = Attempt { round: target.round, victim, form, started, succeeded };
        field.attempts.lock().push(attempt);
        field.made.fetch_add(1, Ordering::SeqCst);
    }
}

/// Calls that started after `acknowledged` and succeeded although the blow had hit them.
fn violations(
    attempts: &[Attempt],
    round: usize,
    blow: Blow,
    acknowledged: Instant,
) -> Vec<Attempt> {
    let late = |a: &&Attempt| {
        a.round == round
            && a.started > acknowledged
            && a.succeeded
            && blow.hits(a.victim)
            && (a.form != "message" || blow.of_the_caller())
    };
    attempts.iter().filter(late).copied().collect()
}

struct Attacker {
    server: Server,
    admin: Client,
    victims: Vec<Client>,
}

impl Attacker {
    fn id(v: usize) -> String {
        format!("victim-{v}")
    }

    /// A key that all victims may use, by their role or by the key's contexts, and a fresh token for each.
    async fn prepare(&mut self, round: usize, blow: Option<Blow>) -> Target {
        let by_context = matches!(blow, Some(Blow::RemoveContext(_)));
        self.role(!by_context).await;
        let contexts: Vec<String> =
            if by_context { (0..VICTIMS).map(Self::id).collect() } else { Vec::new() };
        let key = self.admin.create(json!({"initial_authorized_contexts": contexts})).await;
        for victim in &mut self.victims {
            // One that was removed stays out.
            if victim.login().await.is_err() {
                victim.token.clear();
            }
        }
        let tokens = self.victims.iter().map(|v| v.token.clone()).collect();
        Target { round, key, tokens }
    }

    async fn strike(&self, blow: Blow, target: &Target) {
        let key = &target.key;
        let admin = &self.admin;
        let client = |v: usize| json!({"client_id": Self::id(v)});
        let done = match blow {
            Blow::RevokeKey => admin.call("RevokeKey", json!({"key_id": key})).await,
            Blow::BatchRevoke => {
                admin.call("BatchRevokeKeys", json!({"keys": [{"key_id": key}]})).await
            }
            Blow::DisableKey => admin.call("DisableKey", json!({"key_id": key})).await,
            Blow::RemoveContext(v) => {
                let body = json!({"key_id": key, "contexts_to_remove": [Self::id(v)]});
                admin.call("UpdateKeyMetadata", body).await
            }
            Blow::RevokeToken(v) => {
                admin.call("RevokeToken", json!({"access_token": target.tokens[v]})).await
            }
            Blow::RevokeTokens(v) => admin.call("RevokeClientTokens", client(v)).await,
            Blow::DisableClient(v) => admin.call("DisableClient", client(v)).await,
            Blow::TakeRole(v) => {
                let body = json!({"client_id": Self::id(v), "roles_to_remove": [ROLE]});
                admin.call("UpdateClient", body).await
            }
            Blow::EmptyRole => {
                let body = json!({"name": ROLE, "permissions": ["keys:list"]});
                admin.call("PutRole", body).await
            }
            Blow::RemoveClient(v) => admin.call("RemoveClient", client(v)).await,
        };
        done.unwrap_or_else(|fail| panic!("{blow:?}: {fail:?}"));
    }

    /// Gives back what can be given back.
    async fn mend(&self, blow: Blow) {
        let admin = &self.admin;
        match blow {
            Blow::DisableClient(v) => {
                admin.call("EnableClient", json!({"client_id": Self::id(v)})).await.unwrap();
            }
            Blow::TakeRole(v) => {
                let body = json!({"client_id": Self::id(v), "roles_to_add": [ROLE]});
                admin.call("UpdateClient", body).await.unwrap();
            }
            _ => {}
        }
    }

    async fn role(&self, over_all_keys: bool) {
        let permissions = if over_all_keys {
            json!(["keys:read", "keys:describe", "keys:list", "keys:all", "crypto:encrypt"])
        } else {
            json!(["keys:list", "crypto:encrypt"])
        };
        let body = json!({"name": ROLE, "permissions": permissions});
        self.admin.call("PutRole", body).await.unwrap();
    }
}

async fn until(field: &Field, more: usize) {
    let goal = field.made.load(Ordering::SeqCst) + more;
    let since = Instant::now();
    while field.made.load(Ordering::SeqCst) < goal {
        assert!(since.elapsed() < PATIENCE, "the load has come to a halt");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_starts_after_the_acknowledgement_succeeds() {
    let rounds = size("POLYKEY_REVOCATIONS", 40, 2000);
    let after = if full() { 2000 } else { 320 };
    let mut random = Random::seeded("revocation");
    let server = Server::dev();
    let admin = server.admin().await;
    let mut attacker = Attacker { server, admin, victims: Vec::new() };
    attacker.role(true).await;
    for v in 0..VICTIMS {
        let client = attacker.server.client(&attacker.admin, &Attacker::id(v), &[ROLE]).await;
        attacker.victims.push(client);
    }
    let field = Arc::new(Field::default());
    *field.target.write() = attacker.prepare(0, None).await;
    let hammers: Vec<_> = (0..CONNECTIONS)
        .map(|n| {
            let wire = Wire::another(&attacker.victims[n % VICTIMS]);
            tokio::spawn(hammer(Arc::clone(&field), wire, n))
        })
        .collect();
    let (mut late, mut control, mut refused, mut later) = (Vec::new(), 0, 0, 0);
    let mut worked = BTreeSet::new();
    for round in 0..rounds {
        let victim = random.below(VICTIMS);
        let blow = match round % 9 {
            _ if round + VICTIMS > rounds => Blow::RemoveClient(rounds - 1 - round),
            0 => Blow::RevokeKey,
            1 => Blow::RevokeToken(victim),
            2 => Blow::DisableClient(victim),
            3 => Blow::TakeRole(victim),
            4 => Blow::BatchRevoke,
            5 => Blow::DisableKey,
            6 => Blow::EmptyRole,
            7 => Blow::RevokeTokens(victim),
            _ => Blow::RemoveContext(victim),
        };
        let target = attacker.prepare(round, Some(blow)).await;
        *field.target.write() = target.clone();
        let fresh = Instant::now();
        // Under way, so that caches are warm and calls overlap the change.
        until(&field, CONNECTIONS * 3 + random.below(CONNECTIONS)).await;
        attacker.strike(blow, &target).await;
        let acknowledged = Instant::now();
        until(&field, after).await;
        let attempts = std::mem::take(&mut *field.attempts.lock());
        late.extend(
            violations(&attempts, round, blow, acknowledged).into_iter().map(|a| (blow, a)),
        );
        // The checker, given an acknowledgement that came too early, must object.
        control += usize::from(!violations(&attempts, round, blow, fresh).is_empty());
        worked.extend(attempts.iter().filter(|a| a.succeeded).map(|a| a.form));
        let after_it = |a: &&Attempt| a.round == round && a.started > acknowledged;
        later += attempts.iter().filter(after_it).count();
        refused += attempts.iter().filter(after_it).filter(|a| !a.succeeded).count();
        attacker.mend(blow).await;
    }
    field.stop.store(true, Ordering::SeqCst);
    for hammer in hammers {
        hammer.await.unwrap();
    }
    println!(
        "revocation: {rounds} rounds, {later} later calls, {refused} refused, {} succeeded although hit",
        late.len()
    );
    assert!(late.is_empty(), "{} later calls succeeded, e.g. {:?}", late.len(), late[0]);
    assert_eq!(worked.len(), FORMS.len(), "only these ever succeeded: {worked:?}");
    assert_eq!(control, rounds, "in some round nothing succeeded before: the test saw nothing");
    assert!(
        later >= rounds * after / 2 && refused * 4 >= later,
        "too few calls: {refused} of {later}"
    );
    no_panic(&attacker.server.output());
}
