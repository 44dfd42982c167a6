//! 32 connections hammer while keys, versions, tokens, clients and roles are taken away or expire: after the
//! acknowledgement nothing that starts later succeeds, alone, in batches or in streams. One process, one monotonic
//! clock; for expiry, the node's own.

mod calls;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use calls::{Does, Form, Streams, Target};
use jiff::{SignedDuration, Timestamp};
use parking_lot::{Mutex, RwLock};
use serde_json::json;

use crate::common::client::Client;
use crate::common::{PATIENCE, Server};
use crate::support::{Random, Wire, full, no_panic, size};

const VICTIMS: usize = 4;
const CONNECTIONS: usize = 32;
const ROLE: &str = "reader-for-now";

/// One call that was made.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    round: usize,
    victim: usize,
    form: Form,
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
    RaiseDecryption,
    RaiseEncryption,
    /// Of a key that is not read after its expiry, and of one that is.
    Expire,
    ExpireForSealing,
}

impl Blow {
    /// Whether it takes this use of the key away from this victim.
    fn hits(self, victim: usize, form: Form) -> bool {
        let does = form.does();
        match self {
            // Metadata alone is still shown.
            Self::RevokeKey | Self::BatchRevoke | Self::DisableKey | Self::Expire => {
                does != Does::Describe
            }
            Self::RaiseDecryption => matches!(does, Does::SealUnderOld | Does::OpenOld),
            Self::RaiseEncryption => does == Does::SealUnderOld,
            Self::ExpireForSealing => matches!(does, Does::Seal | Does::SealUnderOld),
            Self::EmptyRole => true,
            Self::RemoveContext(v)
            | Self::RevokeToken(v)
            | Self::RevokeTokens(v)
            | Self::DisableClient(v)
            | Self::TakeRole(v)
            | Self::RemoveClient(v) => v == victim,
        }
    }
}

async fn hammer(field: Arc<Field>, wire: Wire, number: usize) {
    let victim = number % VICTIMS;
    let mut streams = Streams::default();
    // Few large streams find a place at a time: half of the connections of each victim hold one that
    // seals, and half one that opens.
    let other = if (number / VICTIMS).is_multiple_of(2) {
        Form::DecryptStream
    } else {
        Form::EncryptStream
    };
    let forms: Vec<Form> = Form::ALL.into_iter().filter(|form| *form != other).collect();
    let mut turn = number;
    while !field.stop.load(Ordering::Relaxed) {
        turn += 1;
        let form = forms[turn % forms.len()];
        let target = field.target.read().clone();
        if target.tokens[victim].is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        }
        let wire = Wire { token: target.tokens[victim].clone(), ..wire.clone() };
        let started = Instant::now();
        let call = streams.call(form, &wire, &target);
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
        a.round == round && a.started > acknowledged && a.succeeded && blow.hits(a.victim, a.form)
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

    /// A key of two versions that all victims may use, by their role or by the key's contexts, and a fresh
    /// token for each.
    async fn prepare(&mut self, round: usize, blow: Option<Blow>) -> Target {
        let by_context = matches!(blow, Some(Blow::RemoveContext(_)));
        self.role(!by_context).await;
        let contexts: Vec<String> =
            if by_context { (0..VICTIMS).map(Self::id).collect() } else { Vec::new() };
        let read_after_expiry = matches!(blow, Some(Blow::ExpireForSealing));
        let fields = json!({
            "initial_authorized_contexts": contexts,
            "read_after_expiry": read_after_expiry,
        });
        let key = self.admin.create(fields).await;
        let (sealed, large) = calls::sealed(&Wire::of(&self.admin), &key).await;
        self.admin.call("RotateKey", json!({"key_id": key})).await.unwrap();
        let bounds = json!({"key_id": key, "min_encryption_version": 1});
        self.admin.call("UpdateKeyVersionBounds", bounds).await.unwrap();
        for victim in &mut self.victims {
            // One that was removed stays out.
            if victim.login().await.is_err() {
                victim.token.clear();
            }
        }
        let tokens = self.victims.iter().map(|v| v.token.clone()).collect();
        Target { round, key, sealed, large, tokens }
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
            Blow::RaiseDecryption => {
                let body = json!({"key_id": key, "min_decryption_version": 2, "min_encryption_version": 2});
                admin.call("UpdateKeyVersionBounds", body).await
            }
            Blow::RaiseEncryption => {
                let body = json!({"key_id": key, "min_encryption_version": 2});
                admin.call("UpdateKeyVersionBounds", body).await
            }
            Blow::Expire | Blow::ExpireForSealing => {
                let at = Timestamp::now() + SignedDuration::from_millis(250);
                let body = json!({"key_id": key, "expires_at": at.to_string()});
                let done = admin.call("UpdateKeyMetadata", body).await;
                self.until_the_node_has(at).await;
                done
            }
        };
        done.unwrap_or_else(|fail| panic!("{blow:?}: {fail:?}"));
    }

    /// Until it is `at` by the node's clock.
    async fn until_the_node_has(&self, at: Timestamp) {
        loop {
            let health = self.admin.call("HealthCheck", json!({})).await.unwrap();
            let now: Timestamp = health["timestamp"].as_str().unwrap().parse().unwrap();
            if now >= at {
                return;
            }
            tokio::time::sleep((at - now).try_into().unwrap()).await;
        }
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
            json!(["keys:read", "keys:list", "keys:all", "crypto:encrypt", "crypto:decrypt"])
        } else {
            json!(["keys:list", "crypto:encrypt", "crypto:decrypt"])
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
    // A round of its own, which is none of those that are judged.
    *field.target.write() = attacker.prepare(rounds, None).await;
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
        let blow = match round % 13 {
            _ if round + VICTIMS > rounds => Blow::RemoveClient(rounds - 1 - round),
            0 => Blow::RevokeKey,
            1 => Blow::RevokeToken(victim),
            2 => Blow::DisableClient(victim),
            3 => Blow::TakeRole(victim),
            4 => Blow::BatchRevoke,
            5 => Blow::DisableKey,
            6 => Blow::EmptyRole,
            7 => Blow::RevokeTokens(victim),
            8 => Blow::RemoveContext(victim),
            9 => Blow::RaiseDecryption,
            10 => Blow::RaiseEncryption,
            11 => Blow::Expire,
            _ => Blow::ExpireForSealing,
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
        if matches!(blow, Blow::ExpireForSealing) {
            let opens = |a: &Attempt| a.succeeded && a.form.does() == Does::OpenOld;
            assert!(attempts.iter().filter(after_it).any(opens), "what may still be opened is not");
        }
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
    let which: BTreeSet<String> =
        late.iter().map(|(blow, a)| format!("{:?} after {blow:?}", a.form)).collect();
    assert!(late.is_empty(), "{} later calls succeeded: {which:?}, e.g. {:?}", late.len(), late[0]);
    assert_eq!(worked.len(), Form::ALL.len(), "only these ever succeeded: {worked:?}");
    assert_eq!(control, rounds, "in some round nothing succeeded before: the test saw nothing");
    assert!(
        later >= rounds * after / 2 && refused * 4 >= later,
        "too few calls: {refused} of {later}"
    );
    no_panic(&attacker.server.output());
}
