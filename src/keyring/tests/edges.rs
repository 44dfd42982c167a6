//! Where several rules meet: many versions, schedules of keys that cannot be used, repeated calls
//! across midnight and after a revocation.

use super::*;

const DAY: u64 = 86_400;

fn destroy(id: KeyId) -> Mutation {
    Mutation::Destroy(ScheduleDestruction { key: KeyName::Id(id), days: 7, expected: None })
}

fn expire(id: KeyId, at: Time) -> Mutation {
    Mutation::Update(Box::new(UpdateKey {
        key: Some(KeyName::Id(id)),
        expires_at: Some(crate::command::Expiry::At(at)),
        ..UpdateKey::default()
    }))
}

fn idempotency() -> Idempotency {
    Idempotency {
        key: "k".into(),
        method: "CreateKey",
        item: 0,
        request: bytes::Bytes::from_static(b"1"),
    }
}

#[tokio::test]
async fn a_key_of_many_versions_is_erased_whole_by_one_run_of_its_job() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    // More than two transactions' worth, and the last one empty.
    for _ in 0..511 {
        node.do_it(&cx, rotate(id, Strategy::Hot, 0)).await.unwrap();
    }
    node.do_it(&cx, destroy(id)).await.unwrap();
    node.clock.advance(Duration::from_secs(7 * DAY));
    node.run_due().await;
    let left = polykey_storage::prefix(id.bytes());
    let left = node.keyring.vault.scan_keys(space::VERSIONS, left, 1).await.unwrap();
    assert!(left.is_empty());
    let key = node.keyring.load(id).await.unwrap();
    assert_eq!(state_name(&key.record), "destroyed");
}

#[tokio::test]
async fn a_key_that_is_half_erased_can_still_be_listed_and_described() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    node.do_it(&cx, destroy(id)).await.unwrap();
    let mut tx = node.keyring.vault.begin().await.unwrap();
    tx.delete::<VersionRecord>(&version_row(id, Version::FIRST));
    tx.commit().await.unwrap();
    let page = node.keyring.list(&cx, &ListKeys::default()).await.unwrap();
    assert_eq!(page.keys.len(), 1);
    let command = GetMetadata { key: KeyName::Id(id), version: 0, history: false, policies: false };
    let view = node.keyring.metadata(&cx, &command).await.unwrap();
    assert_eq!(view.shown.version, VersionState::Revoked);
}

#[tokio::test]
async fn a_promotion_that_came_due_while_the_key_was_off_is_made_up_for() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let (off, expired) = (node.key(&cx).await, node.key(&cx).await);
    let at = START.plus_seconds(60);
    for id in [off, expired] {
        node.do_it(&cx, rotate(id, Strategy::Staged { at: Some(at) }, 0)).await.unwrap();
    }
    node.do_it(&cx, Mutation::Disable(on(off))).await.unwrap();
    node.do_it(&cx, expire(expired, START.plus_seconds(30))).await.unwrap();
    node.clock.advance(Duration::from_secs(120));
    node.run_due().await;
    let cx = node.cx("a", "user");
    node.do_it(&cx, Mutation::Enable(on(off))).await.unwrap();
    node.do_it(&cx, expire(expired, cx.now.plus_seconds(3600))).await.unwrap();
    node.run_due().await;
    for id in [off, expired] {
        let got = node.get(&cx, id, 0).await.unwrap();
        assert_eq!(got.metadata.version.record.version, 2);
    }
}

#[tokio::test]
async fn a_key_whose_expiry_is_put_off_rotates_again() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    node.do_it(&cx, rotate(id, Strategy::Scheduled { period: 3600 }, 0)).await.unwrap();
    node.do_it(&cx, expire(id, START.plus_seconds(60))).await.unwrap();
    node.clock.advance(Duration::from_secs(7200));
    node.run_due().await;
    let cx = node.cx("a", "user");
    node.do_it(&cx, expire(id, cx.now.plus_seconds(1_000_000))).await.unwrap();
    node.clock.advance(Duration::from_secs(3600));
    node.run_due().await;
    let cx = node.cx("a", "user");
    assert_eq!(node.get(&cx, id, 0).await.unwrap().metadata.version.record.version, 2);
}

#[tokio::test]
async fn what_a_staged_rotation_cannot_honour_is_refused() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let command = CreateKey { algorithm: Algorithm::ApiKey, ..creation() };
    let id = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    let staged = |at, value: Option<&[u8]>| {
        Mutation::Rotate(RotateKey {
            key: KeyName::Id(id),
            strategy: Strategy::Staged { at },
            grace: 0,
            expected: None,
            clear_policies: false,
            value: value.map(|v| Value(Zeroizing::new(v.to_vec()))),
        })
    };
    node.do_it(&cx, staged(None, Some(b"first"))).await.unwrap();
    let later = node.do_it(&cx, staged(Some(START.plus_seconds(60)), None)).await;
    assert!(matches!(later, Err(Error::Invalid(_))), "{later:?}");
    let value = node.do_it(&cx, staged(None, Some(b"second"))).await;
    assert!(matches!(value, Err(Error::Invalid(_))), "{value:?}");
    let key = node.keyring.load(id).await.unwrap();
    assert_eq!((key.record.primary_version, key.record.staged_version), (1, 2));
    node.do_it(&cx, staged(None, None)).await.unwrap();
}

#[tokio::test]
async fn a_supplied_value_is_never_replaced_by_the_schedule() {
    let node = Node::new().await;
    let cx = node.cx("root", "admin");
    let value = || Some(Value(Zeroizing::new(b"theirs".to_vec())));
    let command = CreateKey { algorithm: Algorithm::ApiKey, value: value(), ..creation() };
    let id = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    let scheduled = node.do_it(&cx, rotate(id, Strategy::Scheduled { period: 3600 }, 0)).await;
    assert!(matches!(scheduled, Err(Error::Invalid(_))), "{scheduled:?}");
    let update = UpdateKey {
        key: Some(KeyName::Id(id)),
        rotation_period: Some(3600),
        ..UpdateKey::default()
    };
    let scheduled = node.do_it(&cx, Mutation::Update(Box::new(update))).await;
    assert!(matches!(scheduled, Err(Error::Invalid(_))), "{scheduled:?}");

    let command =
        CreateKey { algorithm: Algorithm::ApiKey, rotation_period: Some(3600), ..creation() };
    let id = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    let Mutation::Rotate(mut command) = rotate(id, Strategy::Hot, 0) else { unreachable!() };
    command.value = value();
    let supplied = node.do_it(&cx, Mutation::Rotate(command)).await;
    assert!(matches!(supplied, Err(Error::Invalid(_))), "{supplied:?}");
}

#[tokio::test]
async fn of_one_request_on_both_sides_of_midnight_one_is_carried_out() {
    let node = Node::new().await;
    let midnight = START.plus_seconds(86_400 - START.seconds() % 86_400);
    let done = node.do_it(&node.cx("a", "user"), create()).await.unwrap();
    let before = Context { now: midnight.plus_seconds(-1), ..node.cx("a", "user") };
    let after = Context { now: midnight.plus_seconds(1), ..node.cx("a", "user") };
    for (key, [first, second]) in [("x", [&before, &after]), ("y", [&after, &before])] {
        let key = Idempotency { key: key.into(), ..idempotency() };
        let mut one = node.keyring.vault.begin().await.unwrap();
        let mut two = node.keyring.vault.begin().await.unwrap();
        key.remember(&mut one, first, &done).await.unwrap();
        key.remember(&mut two, second, &done).await.unwrap();
        one.commit().await.unwrap();
        let two = two.commit().await;
        assert!(matches!(two, Err(Error::Conflict)), "{two:?}");
        // And whichever came second finds what the first has done.
        let found = node.keyring.recall(second, &create(), &key).await.unwrap();
        assert_eq!(found.unwrap().key.id, done.key.id);
    }
}

#[tokio::test]
async fn a_repeated_call_gives_no_material_of_what_is_revoked_by_now() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let first = node.keyring.mutate(&cx, &create(), Some(&idempotency())).await.unwrap();
    assert!(!first.version.unwrap().blob.is_empty());
    node.do_it(&cx, revoke(first.key.id, None)).await.unwrap();
    let again = node.keyring.mutate(&cx, &create(), Some(&idempotency())).await.unwrap();
    assert_eq!(again.key.id, first.key.id);
    assert!(again.version.unwrap().blob.is_empty());
}

#[tokio::test]
async fn a_job_that_was_overtaken_does_nothing() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    node.do_it(&cx, revoke(id, Some(START.plus_seconds(99)))).await.unwrap();
    let row = crate::jobs::row(&JobRecord {
        kind: Kind::Revoke.into(),
        due: START.plus_seconds(99).micros(),
        key_id: id.bytes().to_vec().into(),
        ..JobRecord::default()
    });
    assert!(node.keyring.vault.get::<JobRecord>(&row).await.unwrap().is_some());
    node.do_it(&cx, revoke(id, Some(START.plus_seconds(50)))).await.unwrap();
    assert!(node.keyring.vault.get::<JobRecord>(&row).await.unwrap().is_none());
    node.clock.advance(Duration::from_secs(20));
    node.run_due().await;
    assert!(node.get(&node.cx("a", "user"), id, 0).await.is_ok());
}

#[tokio::test]
async fn a_call_that_named_a_time_is_repeated_after_that_time() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let id = node.key(&cx).await;
    let later = revoke(id, Some(START.plus_seconds(10)));
    let key = Idempotency { method: "RevokeKey", ..idempotency() };
    node.keyring.mutate(&cx, &later, Some(&key)).await.unwrap();
    node.clock.advance(Duration::from_secs(20));
    let cx = node.cx("a", "user");
    let again = node.keyring.mutate(&cx, &later, Some(&key)).await.unwrap();
    assert_eq!((again.key.id, again.at), (id, START));
    // One that was not carried out then is not carried out now.
    let other = node.key(&cx).await;
    let late = revoke(other, Some(START.plus_seconds(10)));
    let key = Idempotency { key: "other".into(), ..key };
    let late = node.keyring.mutate(&cx, &late, Some(&key)).await;
    assert!(matches!(late, Err(Error::Invalid(_))), "{late:?}");
}
