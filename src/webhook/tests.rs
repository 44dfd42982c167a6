//! A webhook against a receiver of the test's own, on a store in memory and a clock set by hand.

use std::net::SocketAddr;

use polykey_hsm::{Ring, SecretSource};
use polykey_proto::polykey::record::v1::audit_event::Outcome as Ended;
use polykey_proto::polykey::record::v1::{AuditBody, AuditEvent, AuditLeaf};
use polykey_storage::Direction;
use polykey_storage::memory::Memory;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::courier::{GIVE_UP, back_off};
use super::*;
use crate::config::Webhook;
use crate::jobs::Alarm;
use crate::time::Clock;

/// The bodies that came, each answered with the next of `answers`, the last for ever.
async fn receiver(
    answers: &'static [&'static str],
) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut answers =
            answers.iter().copied().chain(std::iter::repeat(answers[answers.len() - 1]));
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut text = Vec::new();
            let body = loop {
                let mut piece = [0; 4096];
                let read = stream.read(&mut piece).await.unwrap();
                text.extend_from_slice(&piece[..read]);
                let whole = String::from_utf8_lossy(&text).into_owned();
                // A message's body ends with its last brace.
                if whole.ends_with("}}") || read == 0 {
                    break whole.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
                }
            };
            let status = answers.next().unwrap();
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
            if let Some(body) = body {
                tell.send(body).unwrap();
            }
        }
    });
    (address, told)
}

async fn vault() -> Arc<Vault> {
    let ring = Ring::generate([7; 16]).unwrap();
    let store = Arc::new(Memory::new().unwrap());
    let clock = Clock::manual(Time::from_seconds(1_700_000_000));
    Arc::new(
        Vault::create(store, ring, [7; 16], vec![], Arc::new(Alarm::default()), clock)
            .await
            .unwrap(),
    )
}

async fn webhooks(vault: &Arc<Vault>, address: SocketAddr) -> Arc<Webhooks> {
    let settings = Webhook {
        url: format!("http://{address}/hook").parse().unwrap(),
        events: Kind::ALL.to_vec(),
        secret: SecretSource::Env("UNUSED".into()),
        ca: None,
        headers: std::collections::BTreeMap::new(),
        timeout: Duration::from_secs(10),
    };
    let secrets = Secrets { secret: zeroize::Zeroizing::new(vec![7; 32]), ..Secrets::default() };
    let sender = Sender::new("ops", &settings, secrets).unwrap();
    Webhooks::new(vault, vec![("ops".into(), settings.events, sender)]).await.unwrap()
}

fn disabled(vault: &Vault, version: u32) -> AuditEvent {
    let mut event = AuditEvent {
        time: vault.clock().now().micros(),
        client_id: "somebody".into(),
        action: "DisableKey".into(),
        key_id: vec![9; 16].into(),
        version,
        ..AuditEvent::default()
    };
    event.set_outcome(Ended::Success);
    event
}

async fn until(is: impl Fn() -> bool) {
    while !is() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn actions(vault: &Vault) -> Vec<String> {
    let all = polykey_storage::all();
    let rows = vault.scan::<AuditLeaf>(all, Direction::Forward, 1000).await.unwrap();
    let events = rows
        .iter()
        .flat_map(|(_, leaf)| AuditBody::decode(leaf.record.body.as_ref()).unwrap().events);
    events.map(|event| event.action).collect()
}

#[tokio::test]
async fn what_was_refused_for_three_days_is_given_up_and_the_next_goes_on() {
    let (address, mut told) = receiver(&["500 No", "500 No", "200 OK"]).await;
    let vault = vault().await;
    // What was before it is not told.
    vault.record([disabled(&vault, 1)]).await.unwrap();
    let all = webhooks(&vault, address).await;
    vault.record([disabled(&vault, 2)]).await.unwrap();
    all.start();
    assert!(told.recv().await.unwrap().contains("\"version\":2"));
    until(|| all.status()[0].failed == 1).await;
    vault.clock().advance(GIVE_UP);
    vault.record([disabled(&vault, 3)]).await.unwrap();
    assert!(told.recv().await.unwrap().contains("\"version\":2"));
    assert!(told.recv().await.unwrap().contains("\"version\":3"));
    until(|| all.status()[0].delivered == 1).await;
    all.shutdown(Duration::from_secs(30)).await;
    let status = all.status().remove(0);
    assert_eq!((status.delivered, status.failed, status.given_up), (1, 2, 1));
    assert_eq!((status.trouble, all.state()), (None, State::Serving));
    assert_eq!(actions(&vault).await.last().unwrap(), "GiveUpWebhook");
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_left_in_peace_until_a_start_and_loses_nothing() {
    let (address, mut told) = receiver(&["410 Gone", "204 No Content"]).await;
    let vault = vault().await;
    let all = webhooks(&vault, address).await;
    all.start();
    vault.record([disabled(&vault, 1)]).await.unwrap();
    assert!(told.recv().await.unwrap().contains("\"version\":1"));
    until(|| all.state() != State::Serving).await;
    assert!(all.state().reason().unwrap().contains("[webhooks.ops]"));
    vault.record([disabled(&vault, 2)]).await.unwrap();
    all.shutdown(Duration::from_secs(30)).await;
    assert!(told.try_recv().is_err());
    let again = webhooks(&vault, address).await;
    again.start();
    for version in ["\"version\":1", "\"version\":2"] {
        assert!(told.recv().await.unwrap().contains(version));
    }
    again.shutdown(Duration::from_secs(30)).await;
    assert_eq!(again.state(), State::Serving);
    assert!(actions(&vault).await.contains(&"PauseWebhook".to_owned()));
}

#[test]
fn pauses_double_up_to_five_minutes() {
    let around = |failures, seconds: u64| {
        let (pause, full) = (back_off(failures), Duration::from_secs(seconds));
        assert!(pause >= full * 3 / 4 && pause <= full * 5 / 4, "{failures}: {pause:?}");
    };
    for (n, s) in [(1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (u32::MAX, 300)] {
        around(n, s);
    }
}

#[test]
fn only_what_is_done_is_told_and_a_revocation_only_where_that_was_asked() {
    let event = |action: &str, details: &[&str]| {
        let mut event = AuditEvent { action: action.into(), ..AuditEvent::default() };
        event.set_outcome(Ended::Success);
        event.details.extend(details.iter().map(|name| ((*name).to_owned(), "1".to_owned())));
        event
    };
    for (action, details, kind) in [
        ("RotateKey", &[PREVIOUS][..], Some(Kind::KeyRotated)),
        ("RotateKey", &[], None),
        ("RevokeKey", &[NOTIFIES], Some(Kind::KeyRevoked)),
        ("RevokeKey", &[], None),
        ("RevokeKey", &[NOTIFIES, EFFECTIVE_AT], None),
        ("Encrypt", &[], None),
    ] {
        assert_eq!(Kind::of(&event(action, details)), kind, "{action} {details:?}");
    }
    let mut denied = event("DestroyKey", &[]);
    assert_eq!(Kind::of(&denied), Some(Kind::KeyDestroyed));
    denied.set_outcome(Ended::Denied);
    assert_eq!(Kind::of(&denied), None);
    assert!(Kind::ALL.iter().all(|kind| Kind::parse(kind.name()) == Some(*kind)));
    assert!(Kind::ALL.is_sorted());
}
