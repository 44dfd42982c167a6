//! Anchors as text, against stores of the same, an older and another history, and on a medium that is away.

use std::sync::Arc;

use polykey_proto::polykey::record::v1::{AliasRecord, AuditEvent};
use polykey_storage::memory::Memory;
use polykey_storage::{Store, replica};

use super::*;
use crate::health::State;
use crate::time::Clock;
use crate::vault::{Invalidate, Witness};

const NODE: [u8; 16] = [3; 16];

fn nobody() -> Arc<dyn Invalidate> {
    Arc::new(Vec::<Arc<dyn Invalidate>>::new())
}

fn clock() -> Clock {
    Clock::manual(Time::from_seconds(1_700_000_000))
}

async fn create(ring: &Ring) -> Arc<Vault> {
    let store: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    let vault = Vault::create(store, ring.clone(), NODE, vec![], nobody(), clock()).await;
    Arc::new(vault.unwrap())
}

/// The same records in another store, opened.
async fn copied(vault: &Vault, ring: &Ring) -> Arc<Vault> {
    let store: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    replica::copy(Arc::clone(vault.store()), Arc::clone(&store), |_| {}).await.unwrap();
    Arc::new(Vault::open(store, ring.clone(), NODE, nobody(), clock()).await.unwrap())
}

async fn event(vault: &Vault, action: &str) {
    let event = AuditEvent { action: action.into(), ..AuditEvent::default() };
    vault.record([event]).await.unwrap();
}

fn anchor(medium: &Medium, vault: &Vault) {
    medium.replace(&Anchored::now(vault).encode(&vault.ring())).unwrap();
}

#[tokio::test]
async fn an_anchor_reads_as_it_was_written_and_not_when_a_bit_of_it_has_changed() {
    let ring = Ring::generate(NODE).unwrap();
    let vault = create(&ring).await;
    for n in 0..5 {
        event(&vault, &n.to_string()).await;
    }
    let path = "anchor";
    let anchored = Anchored::now(&vault);
    let text = anchored.encode(&ring);
    assert_eq!(Anchored::authentic(path, &text, &ring).unwrap(), anchored);
    assert_eq!(Anchored::claimed(&text), Some(anchored));
    for at in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[at] ^= 1;
        let changed = String::from_utf8(bytes).unwrap();
        assert!(Anchored::authentic(path, &changed, &ring).is_err(), "{changed}");
        assert!(Anchored::authentic(path, &text[..at], &ring).is_err(), "{at}");
    }
    for more in [format!("{text}\n"), format!("{text}{text}"), format!("\n{text}")] {
        assert!(Anchored::authentic(path, &more, &ring).is_err(), "{more}");
    }
    let later = text.replace("polykey anchor 1", "polykey anchor 2");
    let said = Anchored::authentic(path, &later, &ring).unwrap_err().to_string();
    assert!(said.contains("`polykey anchor 2` is not known"), "{said}");
    // Another node's, and another ring of a node that says it is this one.
    let theirs = Ring::generate([4; 16]).unwrap();
    let refused = Anchored::authentic(path, &text, &theirs).unwrap_err();
    assert!(matches!(refused, Unanchored::OtherNode { .. }), "{refused}");
    let forged = Ring::generate(NODE).unwrap();
    let refused = Anchored::authentic(path, &text, &forged).unwrap_err();
    assert!(matches!(refused, Unanchored::Damaged { .. }), "{refused}");
}

#[tokio::test]
async fn a_store_is_told_from_an_older_one_and_from_one_of_another_history() {
    let ring = Ring::generate(NODE).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = Medium::File(dir.path().join("anchor"));
    let vault = create(&ring).await;
    event(&vault, "first").await;
    let refused = compare(&path, &vault).await.unwrap().unwrap_err();
    assert!(matches!(refused, Unanchored::Missing(_)), "{refused}");
    anchor(&path, &vault);
    compare(&path, &vault).await.unwrap().unwrap();
    let old = copied(&vault, &ring).await;
    compare(&path, &old).await.unwrap().unwrap();
    // Changes without an event are told as well, by the counter.
    let mut tx = vault.begin().await.unwrap();
    tx.insert(b"row", &AliasRecord { name: "alias".into(), ..AliasRecord::default() }).unwrap();
    tx.commit().await.unwrap();
    anchor(&path, &vault);
    let refused = compare(&path, &old).await.unwrap().unwrap_err();
    assert!(matches!(refused, Unanchored::Older { .. }), "{refused}");
    // More leaves than are read at a time, beyond the anchor.
    for n in 0..100 {
        event(&vault, &n.to_string()).await;
    }
    compare(&path, &vault).await.unwrap().unwrap();
    let copy = copied(&vault, &ring).await;
    compare(&path, &copy).await.unwrap().unwrap();
    anchor(&path, &vault);
    let refused = compare(&path, &old).await.unwrap().unwrap_err();
    let Unanchored::Older { anchored, found, .. } = &refused else { panic!("{refused}") };
    assert_eq!((anchored.leaves, found.leaves), (101, 1));
    // As long as it, and longer, but another one.
    for n in 0..100 {
        event(&old, &format!("other {n}")).await;
    }
    for _ in 0..2 {
        let refused = compare(&path, &old).await.unwrap().unwrap_err();
        assert!(matches!(refused, Unanchored::Forked { .. }), "{refused}");
        event(&old, "and more").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_urgent_is_anchored_when_it_is_answered_and_a_medium_that_is_away_is_told() {
    let ring = Ring::generate(NODE).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("medium");
    std::fs::create_dir(&place).unwrap();
    let path = Medium::File(place.join("anchor"));
    let vault = create(&ring).await;
    let keeper = Keeper::start(path.clone(), &vault).unwrap();
    let stands = || {
        let text = path.read().unwrap().unwrap();
        Anchored::authentic("anchor", &text, &ring).unwrap().mark
    };
    for n in 0..20 {
        event(&vault, &n.to_string()).await;
        keeper.witness(vault.mark().revision, true).await.unwrap();
        assert_eq!(stands(), vault.mark());
    }
    // Others follow by themselves.
    event(&vault, "later").await;
    let began = std::time::Instant::now();
    while stands() != vault.mark() {
        assert!(began.elapsed().as_secs() < 5);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    std::fs::rename(&place, dir.path().join("away")).unwrap();
    event(&vault, "unanchored").await;
    keeper.witness(vault.mark().revision, true).await.unwrap();
    assert!(matches!(keeper.state(), State::Degraded(_)), "{keeper:?}");
    assert!(keeper.settle().await.is_err());
    std::fs::rename(dir.path().join("away"), &place).unwrap();
    // It comes back without a change.
    let began = std::time::Instant::now();
    while keeper.state() != State::Serving {
        assert!(began.elapsed().as_secs() < 10);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(stands(), vault.mark());
    assert_eq!(keeper.status().anchored.unwrap().0, vault.mark().revision);
    let left: Vec<_> = std::fs::read_dir(&place).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["anchor"]);
}
