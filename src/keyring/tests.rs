//! The keyring over a real vault, in one process: lifecycle, concurrency, idempotency, lists.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use polykey_hsm::{Algorithm, Ring, WrappedBlob};
use polykey_proto::polykey::record::v1::{JobRecord, job_record::Kind};
use polykey_storage::memory::Memory;
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

use super::*;
use crate::audit::Options;
use crate::authn::certificate::PeerCertificate;
use crate::authz::{Claimed, PermissionSet, PrincipalFacts, built_in};
use crate::command::{
    CreateKey, DeleteAlias, Export, GetKey, GetMetadata, ListKeys, ListStatus, Mutation, OnKey,
    Profile, RevokeKey, RotateKey, ScheduleDestruction, SetAlias, SetBounds, Strategy,
    TrimVersions, UpdateKey, Value,
};
use crate::context::Caller;
use crate::time::Clock;
use crate::vault::faulty::{Dies, Faulty};

mod edges;
mod hardened;
mod hostile;
mod notices;
mod quotas;
mod resident;

const START: Time = Time::from_seconds(1_800_000_000);

struct Node {
    keyring: Arc<Keyring>,
    clock: Clock,
    certificate: Arc<PeerCertificate>,
}

impl Node {
    async fn new() -> Self {
        Self::over(|keyring| keyring).await
    }

    /// Over a store in memory, with a keyring as `finish` wants it.
    async fn over(finish: impl FnOnce(Keyring) -> Keyring) -> Self {
        let clock = Clock::manual(START);
        let caches = Arc::new(KeyCaches::new(1024));
        let vault = Vault::create(
            Arc::new(Memory::new().unwrap()),
            Ring::generate([7; 16]).unwrap(),
            [7; 16],
            Vec::new(),
            Arc::clone(&caches) as _,
            clock.clone(),
        );
        Self::of(Arc::new(vault.await.unwrap()), caches, clock, finish).await
    }

    /// Over a store that fails or is slow when it is told to.
    async fn over_faulty(finish: impl FnOnce(Keyring) -> Keyring) -> (Self, Arc<Faulty>) {
        let clock = Clock::manual(START);
        let caches = Arc::new(KeyCaches::new(1024));
        let memory: Arc<dyn polykey_storage::Store> = Arc::new(Memory::new().unwrap());
        let faulty = Arc::new(Faulty::new(memory, u64::MAX, Dies::Before, false));
        let vault = Vault::create(
            Arc::clone(&faulty) as _,
            Ring::generate([7; 16]).unwrap(),
            [7; 16],
            Vec::new(),
            Arc::clone(&caches) as _,
            clock.clone(),
        );
        (Self::of(Arc::new(vault.await.unwrap()), caches, clock, finish).await, faulty)
    }

    async fn of(
        vault: Arc<Vault>,
        caches: Arc<KeyCaches>,
        clock: Clock,
        finish: impl FnOnce(Keyring) -> Keyring,
    ) -> Self {
        let trail = Trail::start(Arc::clone(&vault), Options::default(), None).await.unwrap();
        let authorizer = Authorizer::default_only().unwrap();
        let keyring = Keyring::new(
            vault,
            caches,
            Arc::new(ArcSwap::from_pointee(authorizer)),
            Arc::new(trail),
            Forge::new(1, 4),
        );
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["a.example".to_owned()])
            .unwrap()
            .self_signed(&key)
            .unwrap();
        let der = CertificateDer::from(certificate.der().to_vec());
        let certificate = Arc::new(PeerCertificate::parse(&[der]).unwrap());
        Self { keyring: Arc::new(finish(keyring)), clock, certificate }
    }

    fn cx(&self, client: &str, role: &str) -> Context {
        let facts = PrincipalFacts {
            client: client.into(),
            revision: 1,
            roles: vec![role.to_owned()],
            permissions: built_in(role).map_or(PermissionSet::EMPTY, |r| r.permissions),
            tier: "free".into(),
            environment: String::new(),
        };
        Context {
            caller: Arc::new(Caller {
                facts: Arc::new(facts),
                tier: 1,
                certificate: Arc::clone(&self.certificate),
                token_id: [0; 16],
                token_expires_at: Time::MAX,
                epoch: 0,
            }),
            request_id: "r".into(),
            correlation_id: String::new(),
            peer: "127.0.0.1:1".parse().unwrap(),
            now: self.clock.now(),
            claimed: Claimed::default(),
        }
    }

    async fn do_it(&self, cx: &Context, mutation: Mutation) -> Result<Done, Error> {
        self.keyring.mutate(cx, &mutation, None).await
    }

    async fn key(&self, cx: &Context) -> KeyId {
        self.do_it(cx, create()).await.unwrap().key.id
    }

    async fn get(&self, cx: &Context, id: KeyId, version: u32) -> Result<Got, Error> {
        let command = GetKey { key: KeyName::Id(id), version, export: Export::None };
        self.keyring.get(cx, &command).await
    }

    /// Runs every job that is due, as the schedule would.
    async fn run_due(&self) {
        let now = self.clock.now();
        loop {
            let jobs = self
                .keyring
                .vault
                .scan::<JobRecord>(polykey_storage::all(), polykey_storage::Direction::Forward, 100)
                .await
                .unwrap();
            let due: Vec<_> =
                jobs.into_iter().filter(|(_, j)| j.record.due <= now.micros()).collect();
            if due.is_empty() {
                return;
            }
            for (row, job) in due {
                self.keyring.run_job(&job.record, &row, now).await.unwrap();
            }
        }
    }
}

fn creation() -> CreateKey {
    CreateKey {
        algorithm: Algorithm::Aes256,
        purpose: polykey_hsm::Purpose::Encrypt,
        convergent: false,
        rotate_after_uses: 0,
        max_uses: 0,
        import: None,
        description: String::new(),
        tags: Default::default(),
        expires_at: None,
        contexts: Vec::new(),
        policies: Default::default(),
        classification: String::new(),
        exportable: None,
        value: None,
        alias: None,
        read_after_expiry: false,
        rotation_period: None,
        in_token: false,
        profile: Some(Profile::Standard),
        prefix: None,
    }
}

fn create() -> Mutation {
    Mutation::Create(Box::new(creation()))
}

fn rotate(id: KeyId, strategy: Strategy, grace: i64) -> Mutation {
    Mutation::Rotate(RotateKey {
        key: KeyName::Id(id),
        strategy,
        grace,
        expected: None,
        clear_policies: false,
        value: None,
    })
}

fn revoke(id: KeyId, at: Option<Time>) -> Mutation {
    let key = KeyName::Id(id);
    Mutation::Revoke(RevokeKey { key, reason: "test".into(), at, notify: false, expected: None })
}

fn on(id: KeyId) -> OnKey {
    OnKey { key: KeyName::Id(id), expected: None }
}

#[tokio::test]
async fn a_version_gives_the_same_blob_each_time_and_hides_the_material() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let value = b"hunter2-hunter2".to_vec();
    let command = CreateKey {
        algorithm: Algorithm::ApiKey,
        value: Some(Value(Zeroizing::new(value.clone()))),
        ..creation()
    };
    let done = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap();
    let id = done.key.id;
    let first = node.get(&cx, id, 0).await.unwrap();
    let again = node.get(&cx, id, 1).await.unwrap();
    assert_eq!(first.metadata.version.blob, again.metadata.version.blob);
    assert_eq!(first.metadata.version.blob, done.version.unwrap().blob);
    let header = WrappedBlob::header(&first.metadata.version.blob).unwrap();
    assert_eq!((header.key_id, header.version), (id.bytes(), 1));
    assert!(!first.metadata.version.blob.windows(7).any(|w| w == &value[..7]));
    let command = GetKey { key: KeyName::Id(id), version: 0, export: Export::Plain };
    match node.keyring.get(&cx, &command).await.unwrap().material {
        KeyMaterialView::Plain(bytes) => assert_eq!(*bytes, value),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_not_exportable_is_not_exported_to_anyone() {
    let node = Node::new().await;
    let id = node.key(&node.cx("a", "user")).await;
    for export in [Export::Plain, Export::Hpke(vec![9; 32])] {
        let command = GetKey { key: KeyName::Id(id), version: 0, export };
        let result = node.keyring.get(&node.cx("root", "admin"), &command).await;
        assert!(matches!(result, Err(Error::State(Reason::NotExportable))), "{result:?}");
    }
}

#[tokio::test]
async fn strangers_are_told_what_they_are_told_of_keys_that_do_not_exist() {
    let node = Node::new().await;
    let id = node.key(&node.cx("a", "user")).await;
    let stranger = node.cx("b", "user");
    let nothing = KeyId::mint(START);
    for mutation in [
        |id| rotate(id, Strategy::Hot, 0),
        |id| revoke(id, None),
        |id| Mutation::Disable(on(id)),
        |id| {
            Mutation::Trim(TrimVersions { key: KeyName::Id(id), min_available: 1, expected: None })
        },
    ] {
        for id in [id, nothing] {
            let result = node.do_it(&stranger, mutation(id)).await;
            assert!(matches!(result, Err(Error::NotFound)), "{result:?}");
        }
    }
    assert!(matches!(node.get(&stranger, id, 0).await, Err(Error::NotFound)));
    // An auditor sees every key, and may not read its material.
    let auditor = node.cx("c", "auditor");
    assert!(matches!(node.get(&auditor, id, 0).await, Err(Error::Denied { .. })));
}

#[tokio::test]
async fn strategies_and_grace_do_what_they_say_across_time() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    let hot = node.do_it(&cx, rotate(id, Strategy::Hot, 3600)).await.unwrap();
    assert_eq!(hot.previous, 1);
    assert_eq!(hot.grace_until, Some(START.plus_seconds(3600)));
    assert!(node.get(&cx, id, 1).await.is_ok());
    node.clock.advance(Duration::from_secs(3600));
    let cx = node.cx("a", "user");
    // Enforced at use, before the schedule has got round to it, and after.
    let over = node.get(&cx, id, 1).await;
    assert!(matches!(over, Err(Error::State(Reason::VersionRevoked))), "{over:?}");
    node.run_due().await;
    let over = node.get(&cx, id, 1).await;
    assert!(matches!(over, Err(Error::State(Reason::VersionRevoked))), "{over:?}");
    assert_eq!(node.get(&cx, id, 0).await.unwrap().metadata.version.record.version, 2);

    let staged = node.do_it(&cx, rotate(id, Strategy::Staged { at: None }, 0)).await.unwrap();
    assert_eq!(staged.version.unwrap().record.version, 3);
    assert_eq!(node.get(&cx, id, 0).await.unwrap().metadata.version.record.version, 2);
    let promoted = node.do_it(&cx, rotate(id, Strategy::Staged { at: None }, 0)).await.unwrap();
    assert_eq!((promoted.previous, promoted.key.record.primary_version), (2, 3));

    let at = node.clock.now().plus_seconds(60);
    node.do_it(&cx, rotate(id, Strategy::Staged { at: Some(at) }, 0)).await.unwrap();
    node.clock.advance(Duration::from_secs(60));
    node.run_due().await;
    let cx = node.cx("a", "user");
    assert_eq!(node.get(&cx, id, 0).await.unwrap().metadata.version.record.version, 4);
}

#[tokio::test]
async fn a_scheduled_key_rotates_once_after_a_long_sleep_and_not_while_disabled() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    node.do_it(&cx, rotate(id, Strategy::Scheduled { period: 3600 }, 0)).await.unwrap();
    node.clock.advance(Duration::from_secs(10 * 3600));
    node.run_due().await;
    let cx = node.cx("a", "user");
    assert_eq!(node.get(&cx, id, 0).await.unwrap().metadata.version.record.version, 2);
    node.do_it(&cx, Mutation::Disable(on(id))).await.unwrap();
    node.clock.advance(Duration::from_secs(3600));
    node.run_due().await;
    let cx = node.cx("a", "user");
    let key = node.do_it(&cx, Mutation::Enable(on(id))).await.unwrap().key;
    assert_eq!(key.record.latest_version, 2);
    assert!(key.record.next_rotation_at > cx.now.micros());
}

#[tokio::test]
async fn revocation_is_final_now_and_later() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let (now, later) = (node.key(&cx).await, node.key(&cx).await);
    node.do_it(&cx, revoke(now, None)).await.unwrap();
    let at = START.plus_seconds(50);
    node.do_it(&cx, revoke(later, Some(at))).await.unwrap();
    assert!(node.get(&cx, later, 0).await.is_ok());
    node.clock.advance(Duration::from_secs(50));
    let cx = node.cx("root", "admin");
    for _ in 0..2 {
        for id in [now, later] {
            assert!(matches!(node.get(&cx, id, 0).await, Err(Error::State(Reason::KeyRevoked))));
            for mutation in [
                rotate(id, Strategy::Hot, 0),
                Mutation::Enable(on(id)),
                Mutation::Disable(on(id)),
                revoke(id, None),
                Mutation::Update(Box::new(UpdateKey {
                    key: Some(KeyName::Id(id)),
                    description: Some("x".into()),
                    ..UpdateKey::default()
                })),
            ] {
                let result = node.do_it(&cx, mutation).await;
                assert!(matches!(result, Err(Error::State(Reason::KeyRevoked))), "{result:?}");
            }
        }
        node.run_due().await;
    }
}

#[tokio::test]
async fn destruction_erases_material_and_leaves_a_record() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let command = CreateKey { alias: Some("doomed".into()), ..creation() };
    let id = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    let destroy = |days| {
        let key = KeyName::Id(id);
        Mutation::Destroy(ScheduleDestruction { key, days, expected: None })
    };
    node.do_it(&cx, destroy(7)).await.unwrap();
    assert!(matches!(node.get(&cx, id, 0).await, Err(Error::State(Reason::KeyPendingDestruction))));
    let back = node.do_it(&cx, Mutation::CancelDestroy(on(id))).await.unwrap();
    assert_eq!(state_name(&back.key.record), "disabled");
    node.do_it(&cx, destroy(7)).await.unwrap();
    node.clock.advance(Duration::from_secs(7 * 86_400));
    let cx = node.cx("a", "user");
    let late = node.do_it(&cx, Mutation::CancelDestroy(on(id))).await;
    assert!(matches!(late, Err(Error::State(Reason::KeyDestroyed))), "{late:?}");
    node.run_due().await;
    let versions = node
        .keyring
        .vault
        .scan_keys(space::VERSIONS, polykey_storage::prefix(id.bytes()), 10)
        .await
        .unwrap();
    assert!(versions.is_empty());
    let command = GetMetadata { key: KeyName::Id(id), version: 0, history: true, policies: true };
    let view = node.keyring.metadata(&cx, &command).await.unwrap();
    assert_eq!(view.shown.key, KeyState::Destroyed);
    assert!(!view.history.is_empty());
    // The name is free again, for another key; the id is not.
    let command = CreateKey { alias: Some("doomed".into()), ..creation() };
    assert!(node.do_it(&cx, Mutation::Create(Box::new(command))).await.is_ok());
}

#[tokio::test]
async fn bounds_and_trim_tell_too_old_from_trimmed_from_never_there() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    for _ in 0..3 {
        node.do_it(&cx, rotate(id, Strategy::Hot, 0)).await.unwrap();
    }
    let bounds = |decryption, encryption| {
        let key = KeyName::Id(id);
        Mutation::SetBounds(SetBounds { key, decryption, encryption, expected: None })
    };
    node.do_it(&cx, bounds(Some(3), Some(3))).await.unwrap();
    let why = |result: Result<Got, Error>| match result {
        Err(Error::State(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(why(node.get(&cx, id, 2).await), Reason::VersionTooOld);
    assert_eq!(why(node.get(&cx, id, 5).await), Reason::VersionNotFound);
    let trim = |to| {
        let key = KeyName::Id(id);
        Mutation::Trim(TrimVersions { key, min_available: to, expected: None })
    };
    assert!(node.do_it(&cx, trim(4)).await.is_err());
    assert_eq!(node.do_it(&cx, trim(3)).await.unwrap().erased, 2);
    assert_eq!(why(node.get(&cx, id, 2).await), Reason::VersionTrimmed);
    assert!(node.do_it(&cx, bounds(Some(1), None)).await.is_err());
    assert!(node.get(&cx, id, 3).await.is_ok());
}

#[tokio::test]
async fn concurrent_rotations_each_get_their_own_version() {
    let node = Arc::new(Node::new().await);
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    let mut tasks = Vec::new();
    for _ in 0..12 {
        let (node, cx) = (Arc::clone(&node), cx.clone());
        tasks.push(tokio::spawn(async move {
            let mutation = rotate(id, Strategy::Hot, 0);
            loop {
                match node.do_it(&cx, rotate(id, Strategy::Hot, 0)).await {
                    Err(Error::Conflict) => {}
                    other => break (mutation, other).1.unwrap().version.unwrap().record.version,
                }
            }
        }));
    }
    let mut versions = BTreeSet::new();
    for task in tasks {
        versions.insert(task.await.unwrap());
    }
    assert_eq!(versions, (2..=13).collect());
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_result_and_another_one_is_refused() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let key = |request: &'static [u8]| Idempotency {
        key: "k".into(),
        method: "CreateKey",
        item: 0,
        request: bytes::Bytes::from_static(request),
    };
    let first = node.keyring.mutate(&cx, &create(), Some(&key(b"1"))).await.unwrap();
    let again = node.keyring.mutate(&cx, &create(), Some(&key(b"1"))).await.unwrap();
    assert_eq!(first.key.id, again.key.id);
    assert_eq!(first.version.unwrap().blob, again.version.unwrap().blob);
    let other = node.keyring.mutate(&cx, &create(), Some(&key(b"2"))).await;
    assert!(matches!(other, Err(Error::Invalid(_))), "{other:?}");
    // Another client's keys are its own.
    let theirs = node.cx("b", "user");
    let theirs = node.keyring.mutate(&theirs, &create(), Some(&key(b"2"))).await.unwrap();
    assert_ne!(theirs.key.id, first.key.id);
    // After a day it is forgotten.
    node.clock.advance(Duration::from_secs(86_400));
    let cx = node.cx("a", "user");
    let next = node.keyring.mutate(&cx, &create(), Some(&key(b"1"))).await.unwrap();
    assert_ne!(next.key.id, first.key.id);
}

#[tokio::test]
async fn one_failure_leaves_nothing_of_an_atomic_batch() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let (good, gone) = (node.key(&cx).await, node.key(&cx).await);
    node.do_it(&cx, revoke(gone, None)).await.unwrap();
    let before = node.keyring.vault.head().leaves;
    let batch = [rotate(good, Strategy::Hot, 0), rotate(gone, Strategy::Hot, 0)];
    let result = node.keyring.mutate_all(&cx, &batch, &[None, None]).await;
    assert!(matches!(result, Err((1, Error::State(Reason::KeyRevoked)))), "{result:?}");
    assert_eq!(node.get(&cx, good, 0).await.unwrap().metadata.version.record.version, 1);
    let _ = before;
    // The same key twice in one batch is two steps of one change.
    let batch = [rotate(good, Strategy::Hot, 0), rotate(good, Strategy::Hot, 0)];
    let done = node.keyring.mutate_all(&cx, &batch, &[None, None]).await.unwrap();
    assert_eq!(done[1].version.as_ref().unwrap().record.version, 3);
    assert_eq!(done[0].leaf.unwrap() + 1, done[1].leaf.unwrap());
}

#[tokio::test]
async fn an_expected_revision_that_has_passed_is_a_conflict() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    let update = |expected| {
        Mutation::Update(Box::new(UpdateKey {
            key: Some(KeyName::Id(id)),
            description: Some("d".into()),
            expected,
            ..UpdateKey::default()
        }))
    };
    let done = node.do_it(&cx, update(Some(1))).await.unwrap();
    assert_eq!(done.key.record.revision, 2);
    assert!(matches!(node.do_it(&cx, update(Some(1))).await, Err(Error::Conflict)));
}

#[tokio::test]
async fn a_scheduled_revocation_can_come_earlier_and_not_later() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    let (soon, late) = (START.plus_seconds(3600), START.plus_seconds(7200));
    node.do_it(&cx, revoke(id, Some(late))).await.unwrap();
    let done = node.do_it(&cx, revoke(id, Some(soon))).await.unwrap();
    assert_eq!(done.key.record.revoke_at, soon.micros());
    let put_off = node.do_it(&cx, revoke(id, Some(late))).await;
    assert!(matches!(put_off, Err(Error::State(Reason::RevocationScheduled))), "{put_off:?}");
    // The same once more is no change of its mind.
    node.do_it(&cx, revoke(id, Some(soon))).await.unwrap();
    assert_eq!(node.keyring.load(id).await.unwrap().record.revoke_at, soon.micros());
    node.clock.advance(Duration::from_secs(3601));
    node.run_due().await;
    let cx = node.cx("a", "user");
    assert!(matches!(node.get(&cx, id, 0).await, Err(Error::State(Reason::KeyRevoked))));
}

#[tokio::test]
async fn aliases_have_one_key_and_move_only_when_asked() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let (one, two) = (node.key(&cx).await, node.key(&cx).await);
    let set = |id, moves| {
        let key = KeyName::Id(id);
        Mutation::SetAlias(SetAlias { key, alias: "x".into(), moves, from: None })
    };
    assert!(matches!(node.do_it(&cx, set(one, true)).await, Err(Error::NotFound)));
    node.do_it(&cx, set(one, false)).await.unwrap();
    let taken = node.do_it(&cx, set(two, false)).await;
    assert!(matches!(taken, Err(Error::State(Reason::AlreadyExists))), "{taken:?}");
    node.do_it(&cx, set(two, true)).await.unwrap();
    let by_alias = GetKey { key: KeyName::Alias("x".into()), version: 0, export: Export::None };
    assert_eq!(node.keyring.get(&cx, &by_alias).await.unwrap().metadata.key.id, two);
    assert!(node.keyring.load(one).await.unwrap().record.aliases.is_empty());
    // The move stands in the history of both keys.
    let last = async |id| {
        let recent = node.keyring.trail.usage(&id).await.unwrap().recent;
        recent.iter().rev().map(|e| e.action.clone()).find(|action| action != "GetKey").unwrap()
    };
    assert_eq!((last(one).await.as_str(), last(two).await.as_str()), ("DeleteAlias", "SetAlias"));
    let delete = Mutation::DeleteAlias(DeleteAlias { alias: "x".into() });
    node.do_it(&cx, delete).await.unwrap();
    assert!(matches!(node.keyring.get(&cx, &by_alias).await, Err(Error::NotFound)));
}

#[tokio::test]
async fn lists_show_what_may_be_seen_and_pages_stay_stable() {
    let node = Node::new().await;
    let (a, b) = (node.cx("a", "user"), node.cx("b", "user"));
    let mut mine = Vec::new();
    for i in 0..25 {
        let command = CreateKey {
            tags: [("n".to_owned(), (i % 5).to_string())].into(),
            contexts: if i < 3 { vec!["b".into()] } else { Vec::new() },
            ..creation()
        };
        node.clock.advance(Duration::from_millis(2));
        let cx = node.cx("a", "user");
        mine.push(node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id);
    }
    let theirs = node.key(&node.cx("b", "user")).await;
    let all = ListKeys { page_size: 1000, ..ListKeys::default() };
    let ids = |page: &Page| page.keys.iter().map(|k| k.key.id).collect::<Vec<_>>();
    let page = node.keyring.list(&a, &all).await.unwrap();
    assert_eq!(ids(&page), mine);
    let page = node.keyring.list(&b, &all).await.unwrap();
    assert_eq!(ids(&page), [&mine[..3], &[theirs]].concat());
    let page = node.keyring.list(&node.cx("c", "auditor"), &all).await.unwrap();
    assert_eq!((page.total, page.filtered), (26, 26));

    let mut query = ListKeys {
        page_size: 2,
        tags: [("n".to_owned(), "1".to_owned())].into(),
        ..ListKeys::default()
    };
    let mut seen = Vec::new();
    loop {
        let page = node.keyring.list(&a, &query).await.unwrap();
        assert_eq!((page.total, page.filtered), (25, 5));
        seen.extend(ids(&page));
        // Creating and rotating between pages does not disturb them.
        node.key(&node.cx("a", "user")).await;
        if page.next.is_empty() {
            break;
        }
        query.page_token = page.next;
    }
    assert_eq!(seen, [mine[1], mine[6], mine[11], mine[16], mine[21]]);
    // A token is of one query and one caller.
    let first = ListKeys { page_token: String::new(), ..query.clone() };
    let token = node.keyring.list(&a, &first).await.unwrap().next;
    let other = ListKeys { page_token: token.clone(), page_size: 2, ..ListKeys::default() };
    assert!(matches!(node.keyring.list(&a, &other).await, Err(Error::Invalid(_))));
    let stolen = ListKeys { page_token: token, ..query };
    assert!(matches!(node.keyring.list(&b, &stolen).await, Err(Error::Invalid(_))));

    node.do_it(&a, revoke(mine[0], None)).await.unwrap();
    let revoked = ListKeys { statuses: vec![ListStatus::Revoked], ..all };
    assert_eq!(ids(&node.keyring.list(&b, &revoked).await.unwrap()), [mine[0]]);
}

#[tokio::test]
async fn sharing_takes_sharing_and_stops_at_once() {
    let node = Node::new().await;
    let (a, b) = (node.cx("a", "user"), node.cx("b", "user"));
    let id = node.key(&a).await;
    let share = |added: &[&str], removed: &[&str]| {
        Mutation::Update(Box::new(UpdateKey {
            key: Some(KeyName::Id(id)),
            contexts_added: added.iter().map(ToString::to_string).collect(),
            contexts_removed: removed.iter().map(ToString::to_string).collect(),
            ..UpdateKey::default()
        }))
    };
    node.do_it(&a, share(&["b"], &[])).await.unwrap();
    assert!(node.get(&b, id, 0).await.is_ok());
    for mutation in [share(&["c"], &[]), rotate(id, Strategy::Hot, 0), revoke(id, None)] {
        assert!(matches!(node.do_it(&b, mutation).await, Err(Error::Denied { .. })));
    }
    node.do_it(&a, share(&[], &["b"])).await.unwrap();
    assert!(matches!(node.get(&b, id, 0).await, Err(Error::NotFound)));
    assert!(node.keyring.list(&b, &ListKeys::default()).await.unwrap().keys.is_empty());
}

#[tokio::test]
async fn the_number_of_enabled_keys_is_true() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(node.key(&cx).await);
    }
    node.do_it(&cx, revoke(ids[0], None)).await.unwrap();
    node.do_it(&cx, Mutation::Disable(on(ids[1]))).await.unwrap();
    assert_eq!(node.keyring.vault.head().keys, 2);
    node.do_it(&cx, Mutation::Enable(on(ids[1]))).await.unwrap();
    assert_eq!(node.keyring.vault.head().keys, 3);
    let report = node.keyring.vault.verify(true, |_| {}).await.unwrap();
    assert!(report.findings.is_empty(), "{report:?}");
}
