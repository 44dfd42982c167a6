//! Tokens on requests: binding, time, revocation under load, restarts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polykey_hsm::{Ring, RootKey};
use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_storage::Store;
use polykey_storage::redb::{Options, Redb};
use tokio::sync::Barrier;

use super::fixture::{NODE, Node, START, address, attempt, certificate, dns, peer};
use crate::authn::limiter::Allowance;
use crate::authn::session::{Attempt, Settings};
use crate::directory::ClientUpdate;
use crate::error::Error;

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Unauthenticated))
}

#[tokio::test]
async fn a_token_works_with_its_certificate_alone() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let tokens = node.login("a", &key, &a).await.unwrap();
    assert_eq!(tokens.expires_in, 900);
    assert_eq!(tokens.refresh_expires_in, 86_400);
    assert_eq!(tokens.issued_at, START);
    assert!(tokens.permissions.contains(&"keys:create"));
    assert!(tokens.permissions.is_sorted());
    assert_eq!(tokens.tier, 1);
    assert_eq!(node.who(&tokens.access, &a).await.unwrap(), "a");
    // Remembered or not, of the same client or not: another certificate is refused.
    assert!(refused(node.who(&tokens.access, &peer("a")).await));
    assert!(refused(node.who(&tokens.access, &peer("b")).await));
    assert!(refused(node.who(&tokens.refresh, &a).await));
    assert!(refused(node.authenticator.refresh(&tokens.access, &node.attempt(&a)).await));
    let other = Node::new().await;
    other.client("a").await;
    assert!(refused(other.who(&tokens.access, &a).await));
}

#[tokio::test]
async fn a_token_ends_and_stays_ended_when_the_clock_goes_back() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let tokens = node.login("a", &key, &a).await.unwrap();
    for (seconds, ok) in
        [(0, true), (899, true), (900, false), (899, false), (0, false), (-1000, false)]
    {
        let attempt = attempt(&a, START.plus_seconds(seconds));
        let result = node.authenticator.authenticate_request(&tokens.access, &attempt).await;
        assert_eq!(result.is_ok(), ok, "{seconds}");
    }
    // Nor does a new process, whose clock is behind the last commit, take what had ended.
    node.clock.advance(Duration::from_secs(5000));
    node.client("b").await;
    let again = crate::directory::Directory::new(
        Arc::clone(&node.vault),
        Arc::new(crate::directory::SecurityCaches::new(16)),
    );
    assert_eq!(again.time(START), START.plus_seconds(5000));
}

#[tokio::test]
async fn what_changes_about_a_client_counts_at_the_next_request() {
    let node = Node::new().await;
    node.admin().await;
    let key = node.client("a").await;
    let a = peer("a");
    let token = node.login("a", &key, &a).await.unwrap().access;
    let session = node.authenticator.authenticate_request(&token, &node.attempt(&a)).await.unwrap();
    let update = ClientUpdate {
        roles_to_remove: vec!["user".into()],
        tier: Some(3),
        ..ClientUpdate::default()
    };
    node.directory.update_client("a", &update, &node.change()).await.unwrap();
    assert_ne!(session.caller.epoch, node.directory.epoch());
    let caller = node.authenticator.recheck(&session, node.now()).await.unwrap();
    assert!(caller.facts.roles.is_empty());
    assert_eq!((caller.tier, caller.facts.tier.as_str()), (3, "enterprise"));
    assert_eq!(caller.facts.permissions, crate::authz::PermissionSet::EMPTY);

    // The identity goes: the certificate proves nothing any more.
    let update = ClientUpdate {
        identities_to_add: vec![dns("new.example")],
        identities_to_remove: vec![dns("a.example")],
        ..ClientUpdate::default()
    };
    node.directory.update_client("a", &update, &node.change()).await.unwrap();
    assert!(refused(node.who(&token, &a).await));
    assert!(refused(node.authenticator.recheck(&session, node.now()).await));
    let update =
        ClientUpdate { identities_to_add: vec![dns("a.example")], ..ClientUpdate::default() };
    node.directory.update_client("a", &update, &node.change()).await.unwrap();
    assert!(node.who(&token, &a).await.is_ok());

    node.directory.disable_client("a", &node.change()).await.unwrap();
    assert!(refused(node.who(&token, &a).await));
    assert!(refused(node.login("a", &key, &a).await));
    node.directory.enable_client("a", &node.change()).await.unwrap();
    assert!(refused(node.who(&token, &a).await), "enabling revives no token");
    let token = node.login("a", &key, &a).await.unwrap().access;
    assert!(node.who(&token, &a).await.is_ok());

    let (_, from) = node.directory.revoke_client_tokens("a", &node.change()).await.unwrap();
    assert!(from > node.now());
    assert!(refused(node.who(&token, &a).await));
    let token = node.login("a", &key, &a).await.unwrap().access;
    assert!(node.who(&token, &a).await.is_ok(), "a login right after counts");
    node.directory.remove_client("a", &node.change()).await.unwrap();
    assert!(refused(node.who(&token, &a).await));
}

#[tokio::test]
async fn a_revoked_token_takes_its_login_with_it() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let one = node.login("a", &key, &a).await.unwrap();
    let two = node.login("a", &key, &a).await.unwrap();
    let revoke = async |token: &str| {
        let genuine = node.authenticator.genuine(token, node.now()).await.unwrap();
        assert_eq!(genuine.client_id(), "a");
        node.authenticator.revoke(&genuine, AuditEvent::default(), node.now()).await.unwrap()
    };
    let first = revoke(&one.access).await;
    node.clock.advance(Duration::from_secs(5));
    assert_eq!(revoke(&one.access).await.revoked_at, first.revoked_at);
    assert!(refused(node.who(&one.access, &a).await));
    assert!(refused(node.authenticator.refresh(&one.refresh, &node.attempt(&a)).await));
    assert!(node.who(&two.access, &a).await.is_ok());
    revoke(&two.refresh).await;
    assert!(refused(node.who(&two.access, &a).await));
    for bad in ["", "v4.public.AAAA", &format!("{}x", one.access), &key] {
        let result = node.authenticator.genuine(bad, node.now()).await;
        assert!(matches!(result, Err(Error::Invalid(_))), "{bad}");
    }
}

#[tokio::test]
async fn sweeping_takes_what_is_over_and_nothing_else() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    for _ in 0..3 {
        let token = node.login("a", &key, &a).await.unwrap().access;
        let genuine = node.authenticator.genuine(&token, node.now()).await.unwrap();
        node.authenticator.revoke(&genuine, AuditEvent::default(), node.now()).await.unwrap();
    }
    assert_eq!(node.directory.sweep(node.now(), 100).await.unwrap(), 0);
    node.clock.advance(Duration::from_secs(900));
    let live = node.login("a", &key, &a).await.unwrap().access;
    assert_eq!(node.directory.sweep(node.now(), 2).await.unwrap(), 2);
    assert_eq!(node.directory.sweep(node.now(), 100).await.unwrap(), 1);
    node.clock.advance(Duration::from_secs(86_400 - 900));
    assert_eq!(node.directory.sweep(node.now(), 100).await.unwrap(), 3);
    assert!(refused(node.who(&live, &a).await));
}

#[tokio::test]
async fn revocations_and_logins_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let root = RootKey::generate().unwrap();
    let ring = Ring::generate(NODE).unwrap();
    let sealed = ring.seal(&root).unwrap();
    let a = peer("a");
    let store: Arc<dyn Store> = Arc::new(Redb::create(&path, Options::default()).unwrap());
    let node = Node::create(store, ring, Settings::default()).await;
    let key = node.client("a").await;
    let gone = node.login("a", &key, &a).await.unwrap();
    let kept = node.login("a", &key, &a).await.unwrap();
    let reused = node.login("a", &key, &a).await.unwrap();
    let genuine = node.authenticator.genuine(&gone.access, node.now()).await.unwrap();
    node.authenticator.revoke(&genuine, AuditEvent::default(), node.now()).await.unwrap();
    node.authenticator.refresh(&reused.refresh, &node.attempt(&a)).await.unwrap();
    node.clock.advance(Duration::from_secs(11));
    assert!(refused(node.authenticator.refresh(&reused.refresh, &node.attempt(&a)).await));
    let clock = node.clock.clone();
    let Node { store, vault, directory, authenticator, .. } = node;
    drop((authenticator, directory, vault));
    while Arc::strong_count(&store) > 1 {
        tokio::task::yield_now().await;
    }
    drop(store);

    let store: Arc<dyn Store> = Arc::new(Redb::open(&path, Options::default()).unwrap());
    let node = Node::open(store, Ring::open(&root, &sealed).unwrap(), clock).await;
    assert!(refused(node.who(&gone.access, &a).await));
    assert!(refused(node.who(&reused.access, &a).await));
    assert!(node.who(&kept.access, &a).await.is_ok());
    assert!(refused(node.authenticator.refresh(&gone.refresh, &node.attempt(&a)).await));
    assert!(node.authenticator.refresh(&kept.refresh, &node.attempt(&a)).await.is_ok());
    assert!(node.login("a", &key, &a).await.is_ok());
}

/// 32 tasks use tokens while they are revoked: none that began after the acknowledgement succeeds.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_acknowledged_as_revoked_is_accepted() {
    let node = Arc::new(Node::new().await);
    node.admin().await;
    let key = node.client("a").await;
    let a = peer("a");
    for round in 0..40 {
        let token: Arc<str> = node.login("a", &key, &a).await.unwrap().access.into();
        let acknowledged = Arc::new(AtomicBool::new(false));
        let start = Arc::new(Barrier::new(33));
        let tasks: Vec<_> = (0..32)
            .map(|_| {
                let (node, token, a) = (Arc::clone(&node), Arc::clone(&token), Arc::clone(&a));
                let (acknowledged, start) = (Arc::clone(&acknowledged), Arc::clone(&start));
                tokio::spawn(async move {
                    start.wait().await;
                    let (mut before, mut after) = (0_u32, 0_u32);
                    while after < 20 {
                        let late = acknowledged.load(Ordering::SeqCst);
                        let ok = node.who(&token, &a).await.is_ok();
                        assert!(!(late && ok), "accepted after the acknowledgement");
                        before += u32::from(ok);
                        after += u32::from(late);
                        tokio::task::yield_now().await;
                    }
                    before
                })
            })
            .collect();
        start.wait().await;
        match round % 3 {
            0 => {
                let genuine = node.authenticator.genuine(&token, node.now()).await.unwrap();
                let event = AuditEvent::default();
                node.authenticator.revoke(&genuine, event, node.now()).await.unwrap();
            }
            1 => {
                node.directory.revoke_client_tokens("a", &node.change()).await.unwrap();
            }
            _ => {
                node.directory.disable_client("a", &node.change()).await.unwrap();
            }
        }
        acknowledged.store(true, Ordering::SeqCst);
        for task in tasks {
            task.await.unwrap();
        }
        if round % 3 == 2 {
            node.directory.enable_client("a", &node.change()).await.unwrap();
        }
    }
}

/// 64 tasks, half with bad tokens: each is told who it is, or nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn callers_are_never_mixed_up() {
    let allowance = Allowance { burst: 1_000_000, interval: Duration::from_millis(1) };
    let settings = Settings { tokens_per_address: allowance, ..Settings::default() };
    let node = Arc::new(Node::with(settings).await);
    let mut logins = Vec::new();
    for i in 0..8 {
        let name = format!("c{i}");
        let key = node.client(&name).await;
        let peer = peer(&name);
        let token = node.login(&name, &key, &peer).await.unwrap().access;
        logins.push((name, token, peer));
    }
    let logins = Arc::new(logins);
    let start = Arc::new(Barrier::new(64));
    let tasks: Vec<_> = (0..64_usize)
        .map(|i| {
            let (node, logins, start) =
                (Arc::clone(&node), Arc::clone(&logins), Arc::clone(&start));
            tokio::spawn(async move {
                start.wait().await;
                for n in 0..200 {
                    let (name, token, peer) = &logins[(i + n) % 8];
                    let (_, _, stranger) = &logins[(i + n + 1) % 8];
                    match (i + n) % 4 {
                        0 => assert!(refused(node.who(token, stranger).await)),
                        1 => {
                            let mut bad = token.clone();
                            bad.replace_range(40..41, if &bad[40..41] == "A" { "B" } else { "A" });
                            assert!(refused(node.who(&bad, peer).await));
                        }
                        _ => assert_eq!(&node.who(token, peer).await.unwrap(), name),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn floods_of_bad_tokens_are_stopped_before_the_signature() {
    let allowance = Allowance { burst: 3, interval: Duration::from_secs(1) };
    let settings = Settings { tokens_per_address: allowance, ..Settings::default() };
    let node = Node::with(settings).await;
    let key = node.client("a").await;
    let a = peer("a");
    let known = node.login("a", &key, &a).await.unwrap().access;
    let new = node.login("a", &key, &a).await.unwrap().access;
    node.who(&known, &a).await.unwrap();
    for _ in 0..3 {
        assert!(refused(node.who("v4.public.AAAA", &a).await));
    }
    assert!(matches!(node.who("v4.public.AAAA", &a).await, Err(Error::Exhausted { .. })));
    assert!(matches!(node.who(&new, &a).await, Err(Error::Exhausted { .. })));
    assert!(node.who(&known, &a).await.is_ok(), "what is known already is not held up");
    let elsewhere = Attempt { address: address(2), ..node.attempt(&a) };
    assert!(node.authenticator.authenticate_request(&new, &elsewhere).await.is_ok());
    node.clock.advance(Duration::from_secs(3));
    assert!(refused(node.who("v4.public.AAAA", &a).await));
    // Tokens that have run out are not counted.
    node.clock.advance(Duration::from_secs(3600));
    for _ in 0..10 {
        assert!(refused(node.who(&new, &a).await));
    }
}

#[tokio::test]
async fn common_names_count_only_where_switched_on() {
    for on in [false, true] {
        let node = Node::with(Settings { common_name: on, ..Settings::default() }).await;
        let new = crate::directory::NewClient {
            id: "old".into(),
            identities: vec!["cn:old".parse().unwrap()],
            ..Default::default()
        };
        let (_, key) = node.directory.create_client(&new, &node.change()).await.unwrap();
        let key = key.unwrap();
        let nameless = certificate(&[], Some("old"));
        assert_eq!(node.login("old", key.reveal(), &nameless).await.is_ok(), on);
        let named = certificate(&["x.example"], Some("old"));
        assert!(refused(node.login("old", key.reveal(), &named).await));
    }
}
