//! Logging in and exchanging refresh tokens.

use std::sync::Arc;
use std::time::Duration;

use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::{AuditLeaf, SigningKeyRecord};
use polykey_storage::{Direction, all};

use super::fixture::{Node, START, certificate, peer};
use crate::authn::certificate::PeerCertificate;
use crate::authn::limiter::Allowance;
use crate::authn::login::Credentials;
use crate::authn::session::Settings;
use crate::directory::{Logins, NewClient};
use crate::error::Error;
use crate::vault::space;

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Unauthenticated))
}

#[tokio::test]
async fn every_bad_login_gets_the_same_answer_and_is_recorded() {
    let allowance = Allowance { burst: 100, interval: Duration::from_secs(1) };
    let settings = Settings {
        login_per_address: allowance,
        login_per_client: allowance,
        ..Settings::default()
    };
    let node = Node::with(settings).await;
    node.admin().await;
    let key = node.client("a").await;
    let other = node.client("b").await;
    let off = node.client("off").await;
    node.directory.disable_client("off", &node.change()).await.unwrap();
    let gone = node.client("gone").await;
    node.directory.remove_client("gone", &node.change()).await.unwrap();
    let a = peer("a");
    let b = peer("b");
    let wrong = crate::authn::api_key::ApiKey::generate().unwrap();
    let mut answers = Vec::new();
    for (id, key, peer) in [
        ("nobody", key.as_str(), &a),
        ("a", wrong.reveal(), &a),
        ("a", "x", &a),
        ("a", other.as_str(), &a),
        ("a", key.as_str(), &b),
        ("A", key.as_str(), &a),
        (" a", key.as_str(), &a),
        ("off", off.as_str(), &certificate(&["off.example"], None)),
        ("gone", gone.as_str(), &certificate(&["gone.example"], None)),
        ("a\0", key.as_str(), &a),
    ] {
        let error = node.login(id, key, peer).await.unwrap_err();
        answers.push(format!("{error:?} {error}"));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");
    let events = node.refusals.0.lock().clone();
    assert_eq!(events.len(), 10);
    for event in &events {
        assert_eq!((event.outcome(), event.code), (Outcome::Denied, 16));
        assert_eq!(event.action, "Authenticate");
        assert!(event.client_id.is_empty(), "an unproven name is no identity");
        let text = format!("{event:?}");
        assert!(!text.contains(&key[12..]) && !text.contains(wrong.reveal()), "{text}");
    }
    assert!(node.login("a", &key, &a).await.is_ok());
}

#[tokio::test]
async fn fields_out_of_range_are_named() {
    let node = Node::new().await;
    let a = peer("a");
    let long = "x".repeat(600);
    for (client_id, api_key, grant_type, field) in [
        ("", "k", "", "client_id"),
        ("a", "", "api_key", "api_key"),
        ("a", "k", "password", "grant_type"),
        (long.as_str(), "k", "", "client_id"),
        ("a", long.as_str(), "", "api_key"),
    ] {
        let credentials = Credentials { client_id, api_key, grant_type };
        let error = node.authenticator.login(&credentials, &node.attempt(&a)).await.unwrap_err();
        let Error::Invalid(fields) = error else { panic!("{error:?}") };
        assert_eq!(fields[0].field, field);
    }
}

#[tokio::test]
async fn a_certificate_alone_is_enough_where_it_proves_one_client() {
    let node = Node::new().await;
    node.client("a").await;
    node.client("b").await;
    let mtls = async |client_id: &str, peer: &Arc<PeerCertificate>| {
        let credentials = Credentials { client_id, api_key: "", grant_type: "mtls" };
        let tokens = node.authenticator.login(&credentials, &node.attempt(peer)).await?;
        Ok::<_, Error>(tokens.client_id)
    };
    assert_eq!(mtls("", &peer("a")).await.unwrap(), "a");
    assert_eq!(mtls("a", &peer("a")).await.unwrap(), "a");
    assert!(refused(mtls("b", &peer("a")).await));
    assert!(refused(mtls("", &peer("c")).await));
    let both = certificate(&["a.example", "b.example"], None);
    assert!(refused(mtls("", &both).await));
    assert_eq!(mtls("b", &both).await.unwrap(), "b");
    let new = NewClient {
        id: "spiffe".into(),
        identities: vec!["spiffe://example.org/svc".parse().unwrap()],
        without_api_key: true,
        ..NewClient::default()
    };
    node.directory.create_client(&new, &node.change()).await.unwrap();
    let svid = certificate(&["spiffe://example.org/svc"], None);
    assert_eq!(mtls("", &svid).await.unwrap(), "spiffe");
    assert!(refused(node.login("spiffe", "pk_", &svid).await));
}

#[tokio::test]
async fn guessing_is_limited_by_client_only_for_those_with_its_certificate() {
    let generous = Allowance { burst: 1000, interval: Duration::from_secs(1) };
    let strict = Allowance { burst: 3, interval: Duration::from_secs(10) };
    let settings =
        Settings { login_per_address: generous, login_per_client: strict, ..Settings::default() };
    let node = Node::with(settings).await;
    let key = node.client("a").await;
    node.client("b").await;
    let (a, b) = (peer("a"), peer("b"));
    // Whoever has another certificate cannot lock the client out.
    for _ in 0..20 {
        assert!(refused(node.login("a", "wrong", &b).await));
    }
    assert!(node.login("a", &key, &a).await.is_ok());
    for _ in 0..3 {
        assert!(refused(node.login("a", "wrong", &a).await));
    }
    let error = node.login("a", &key, &a).await.unwrap_err();
    let Error::Exhausted { retry_after } = error else { panic!("{error:?}") };
    assert_eq!(retry_after, Duration::from_secs(10));
    assert_eq!(node.refusals.0.lock().last().unwrap().code, 8);
    node.clock.advance(retry_after);
    assert!(node.login("a", &key, &a).await.is_ok());
}

#[tokio::test]
async fn an_address_is_limited_by_its_failures() {
    let strict = Allowance { burst: 3, interval: Duration::from_secs(10) };
    let node = Node::with(Settings { login_per_address: strict, ..Settings::default() }).await;
    let key = node.client("a").await;
    let a = peer("a");
    for _ in 0..10 {
        assert!(node.login("a", &key, &a).await.is_ok(), "success costs nothing");
    }
    for _ in 0..3 {
        assert!(refused(node.login("nobody", "wrong", &a).await));
    }
    assert!(matches!(node.login("a", &key, &a).await, Err(Error::Exhausted { .. })));
    let refresh = node.authenticator.refresh("x", &node.attempt(&a)).await;
    assert!(matches!(refresh, Err(Error::Exhausted { .. })));
}

#[tokio::test]
async fn api_keys_overlap_while_they_are_rotated() {
    let node = Node::new().await;
    let one = node.client("a").await;
    let a = peer("a");
    let hour = Duration::from_secs(3600);
    let rotated = node.directory.rotate_api_key("a", hour, None, &node.change()).await.unwrap();
    assert_eq!(rotated.old_keys_expire_at, Some(START.plus(hour)));
    let two = rotated.api_key.reveal().to_owned();
    assert!(node.login("a", &one, &a).await.is_ok());
    assert!(node.login("a", &two, &a).await.is_ok());
    node.clock.advance(hour);
    assert!(refused(node.login("a", &one, &a).await));
    assert!(node.login("a", &two, &a).await.is_ok());
    let rotated =
        node.directory.rotate_api_key("a", Duration::ZERO, None, &node.change()).await.unwrap();
    assert_eq!(rotated.old_keys_expire_at, None);
    assert_eq!(rotated.changed.client.api_keys.len(), 1);
    assert!(refused(node.login("a", &two, &a).await));
    assert!(node.login("a", rotated.api_key.reveal(), &a).await.is_ok());
    let soon = Some(node.now().plus_seconds(5));
    let rotated =
        node.directory.rotate_api_key("a", Duration::ZERO, soon, &node.change()).await.unwrap();
    assert!(node.login("a", rotated.api_key.reveal(), &a).await.is_ok());
    node.clock.advance(Duration::from_secs(5));
    assert!(refused(node.login("a", rotated.api_key.reveal(), &a).await));
    let long = Duration::from_secs(31 * 24 * 3600);
    let result = node.directory.rotate_api_key("a", long, None, &node.change()).await;
    assert!(matches!(result, Err(Error::Invalid(_))));
    assert!(!format!("{rotated:?}").contains(&rotated.api_key.reveal()[12..]));
}

#[tokio::test]
async fn it_is_known_when_a_client_last_logged_in_and_with_which_key() {
    let node = Node::new().await;
    let one = node.client("a").await;
    let a = peer("a");
    let known = async || {
        let client = node.directory.client("a").await.unwrap().unwrap();
        (node.directory.logins(&client).await.unwrap(), client.revision)
    };
    let (never, revision) = known().await;
    assert_eq!(never, Logins { last: None, by_api_key: vec![None] });
    assert!(refused(node.login("a", "wrong", &a).await));
    assert!(refused(node.login("a", &one, &peer("b")).await));
    assert_eq!(known().await.0, never);
    let tokens = node.login("a", &one, &a).await.unwrap();
    let first = Logins { last: Some(START), by_api_key: vec![Some(START)] };
    assert_eq!(known().await, (first.clone(), revision), "the record does not change");
    // An exchange of tokens is no login.
    node.clock.advance(Duration::from_secs(10));
    node.authenticator.refresh(&tokens.refresh, &node.attempt(&a)).await.unwrap();
    assert_eq!(known().await.0, first);
    // The new of two keys, then none.
    let hour = Duration::from_secs(3600);
    let rotated = node.directory.rotate_api_key("a", hour, None, &node.change()).await.unwrap();
    let second = node.now();
    node.login("a", rotated.api_key.reveal(), &a).await.unwrap();
    let by_api_key = vec![Some(START), Some(second)];
    assert_eq!(known().await.0, Logins { last: Some(second), by_api_key: by_api_key.clone() });
    node.clock.advance(Duration::from_secs(10));
    let by_certificate = Credentials { client_id: "", api_key: "", grant_type: "mtls" };
    node.authenticator.login(&by_certificate, &node.attempt(&a)).await.unwrap();
    assert_eq!(known().await.0, Logins { last: Some(node.now()), by_api_key });
    // Nothing is kept of keys that are gone.
    let rows = async || node.vault.scan_keys(space::USAGE, all(), 10).await.unwrap().len();
    assert_eq!(rows().await, 3);
    node.directory.rotate_api_key("a", Duration::ZERO, None, &node.change()).await.unwrap();
    assert_eq!(known().await.0, Logins { last: Some(node.now()), by_api_key: vec![None] });
    assert_eq!(rows().await, 1);
    // All of it is of the set of rows that the head counts.
    assert_eq!(node.vault.verify(true, |_| ()).await.unwrap().findings, Vec::<String>::new());
}

#[tokio::test]
async fn a_refresh_token_gives_one_successor() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let first = node.login("a", &key, &a).await.unwrap();
    let refresh = async |token: &str| node.authenticator.refresh(token, &node.attempt(&a)).await;
    let second = refresh(&first.refresh).await.unwrap();
    assert_ne!(second.refresh, first.refresh);
    assert_ne!(second.access, first.access);
    // A lost answer: the same tokens again, to the byte.
    node.clock.advance(Duration::from_secs(10));
    let again = refresh(&first.refresh).await.unwrap();
    assert_eq!(
        (again.access.as_str(), again.refresh.as_str()),
        (second.access.as_str(), second.refresh.as_str())
    );
    assert_eq!(again.expires_in, 890);
    assert_eq!(again.issued_at, second.issued_at);
    assert!(node.who(&first.access, &a).await.is_ok());
    assert!(node.who(&second.access, &a).await.is_ok());
    // Another certificate of the same client has no part in it.
    let elsewhere = peer("a");
    assert!(refused(node.authenticator.refresh(&second.refresh, &node.attempt(&elsewhere)).await));
    let third = refresh(&second.refresh).await.unwrap();
    // Two behind, even at once: that is no lost answer.
    assert!(refused(refresh(&first.refresh).await));
    for token in [&first.access, &second.access, &third.access] {
        assert!(refused(node.who(token, &a).await));
    }
    assert!(refused(refresh(&third.refresh).await));
}

#[tokio::test]
async fn a_refresh_token_used_again_later_revokes_its_login() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let first = node.login("a", &key, &a).await.unwrap();
    let other = node.login("a", &key, &a).await.unwrap();
    let refresh = async |token: &str| node.authenticator.refresh(token, &node.attempt(&a)).await;
    let second = refresh(&first.refresh).await.unwrap();
    node.clock.advance(Duration::from_millis(10_001));
    assert!(node.who(&second.access, &a).await.is_ok());
    let leaves = node.vault.head().leaves;
    assert!(refused(refresh(&first.refresh).await));
    assert_eq!(node.vault.head().leaves, leaves + 1, "one event, with the revocation");
    assert!(node.refusals.0.lock().is_empty());
    assert!(refused(node.who(&second.access, &a).await));
    assert!(refused(refresh(&second.refresh).await));
    assert!(node.who(&other.access, &a).await.is_ok(), "another login goes on");
    node.clock.advance(Duration::from_secs(86_400));
    assert!(refused(refresh(&other.refresh).await), "it has run out");
}

/// Two processes with one refresh token: both get the same successors, and nothing is revoked.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn simultaneous_exchanges_agree() {
    let node = Arc::new(Node::new().await);
    let key = node.client("a").await;
    let a = peer("a");
    for _ in 0..20 {
        let first = node.login("a", &key, &a).await.unwrap();
        let tasks: Vec<_> = (0..6)
            .map(|_| {
                let (node, a, token) = (Arc::clone(&node), Arc::clone(&a), first.refresh.clone());
                tokio::spawn(async move {
                    let attempt = node.attempt(&a);
                    node.authenticator.refresh(&token, &attempt).await.unwrap().refresh
                })
            })
            .collect();
        let mut successors = Vec::new();
        for task in tasks {
            successors.push(task.await.unwrap());
        }
        successors.dedup();
        assert_eq!(successors.len(), 1);
        assert!(node.authenticator.refresh(&successors[0], &node.attempt(&a)).await.is_ok());
    }
}

#[tokio::test]
async fn keys_roll_over_under_live_logins() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let old = node.login("a", &key, &a).await.unwrap();
    node.who(&old.access, &a).await.unwrap();
    node.clock.advance(Duration::from_secs(1));
    node.add_token_key(node.now(), None).await;
    let new = node.login("a", &key, &a).await.unwrap();
    for tokens in [&old, &new] {
        assert!(node.who(&tokens.access, &a).await.is_ok());
        assert!(node.authenticator.refresh(&tokens.refresh, &node.attempt(&a)).await.is_ok());
    }
}

/// Logins are in the log, in the transaction of their family, and no token or key is.
#[tokio::test]
async fn logins_are_audited_without_their_secrets() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let a = peer("a");
    let before = node.vault.head().leaves;
    let tokens = node.login("a", &key, &a).await.unwrap();
    node.authenticator.refresh(&tokens.refresh, &node.attempt(&a)).await.unwrap();
    assert_eq!(node.vault.head().leaves, before + 2);
    let leaves = node.vault.scan::<AuditLeaf>(all(), Direction::Forward, 100).await.unwrap();
    let mut logins = 0;
    for (_, leaf) in leaves {
        let body = String::from_utf8_lossy(&leaf.record.body).into_owned();
        logins += usize::from(body.contains("Authenticate") || body.contains("RefreshToken"));
        for secret in [&key[12..], &tokens.access, &tokens.refresh] {
            assert!(!body.contains(secret));
        }
    }
    assert_eq!(logins, 2);
    let shown =
        format!("{tokens:?} {:?}", Credentials { client_id: "a", api_key: &key, grant_type: "" });
    assert!(!shown.contains(&tokens.access) && !shown.contains(&key));
}

#[tokio::test]
async fn without_a_key_in_force_nobody_logs_in() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let mut tx = node.vault.begin().await.unwrap();
    let rows = tx.scan::<SigningKeyRecord>(all(), Direction::Forward, 10).await.unwrap();
    for (row, _) in &rows {
        tx.delete::<SigningKeyRecord>(row);
    }
    tx.commit().await.unwrap();
    let result = node.login("a", &key, &peer("a")).await;
    assert!(matches!(result, Err(Error::Internal { .. })));
}
