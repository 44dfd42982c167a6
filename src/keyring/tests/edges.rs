//! Where several rules meet: many versions, schedules of keys that cannot be used, repeated calls
//! across midnight and after a revocation.

use polykey_proto::polykey::record::v1::HistoryEntry;

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
async fn of_one_change_of_the_node_on_both_sides_of_midnight_one_is_carried_out() {
    let node = Node::new().await;
    let vault = &node.keyring.vault;
    let midnight = START.plus_seconds(86_400 - START.seconds() % 86_400);
    node.clock.advance(midnight.plus_seconds(-1).since(START));
    let before = node.cx("a", "admin");
    node.clock.advance(Duration::from_secs(2));
    let after = node.cx("a", "admin");
    for (key, [first, second]) in [("x", [&before, &after]), ("y", [&after, &before])] {
        let key = Idempotency { key: key.into(), method: "PutRole", ..idempotency() };
        // Both found nothing when they looked, and begin.
        assert!(key.recorded(vault, first).await.unwrap().is_none());
        assert!(key.recorded(vault, second).await.unwrap().is_none());
        let mut one = vault.begin().await.unwrap();
        let mut two = vault.begin().await.unwrap();
        key.noted(vault, first, "role").write(&mut one).await.unwrap();
        key.noted(vault, second, "role").write(&mut two).await.unwrap();
        one.commit().await.unwrap();
        let two = two.commit().await;
        assert!(matches!(two, Err(Error::Conflict)), "{two:?}");
        // One that begins later meets the record of the other day, too.
        let mut three = vault.begin().await.unwrap();
        let late = key.noted(vault, second, "role").write(&mut three).await;
        assert!(matches!(late, Err(Error::Conflict)), "{late:?}");
        assert_eq!(key.recorded(vault, second).await.unwrap().unwrap().text, "role");
    }
    // A day later the key is free again.
    node.clock.advance(Duration::from_secs(DAY));
    let later = node.cx("a", "admin");
    let key = Idempotency { key: "x".into(), method: "PutRole", ..idempotency() };
    let mut tx = vault.begin().await.unwrap();
    key.noted(vault, &later, "role").write(&mut tx).await.unwrap();
    tx.commit().await.unwrap();
}

#[tokio::test]
async fn the_making_of_a_key_is_the_first_of_its_history() {
    let node = Node::new().await;
    let cx = Context { correlation_id: "mine".into(), ..node.cx("a", "user") };
    let imported = CreateKey {
        algorithm: Algorithm::ApiKey,
        value: Some(Value(Zeroizing::new(vec![7; 20]))),
        ..creation()
    };
    let id = node.key(&cx).await;
    let other = node.do_it(&cx, Mutation::Create(Box::new(imported))).await.unwrap().key.id;
    node.clock.advance(Duration::from_secs(1));
    let cx = node.cx("a", "user");
    let history = async |id: KeyId| {
        let key = KeyName::Id(id);
        let command = GetMetadata { key, version: 0, history: true, policies: false };
        node.keyring.metadata(&cx, &command).await.unwrap().history
    };
    let made = |entries: &[HistoryEntry]| {
        let HistoryEntry { time, client_id, action, success, correlation_id, .. } =
            entries.last().unwrap().clone();
        assert_eq!((time, client_id.as_str(), success), (START.micros(), "a", true));
        (action, correlation_id)
    };
    let entries = history(id).await;
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert_eq!(made(&entries), ("CreateKey".into(), "mine".into()));
    assert_eq!(made(&history(other).await), ("ImportKey".into(), "mine".into()));
    node.get(&cx, id, 0).await.unwrap();
    let entries = history(id).await;
    let actions: Vec<&str> = entries.iter().map(|e| e.action.as_str()).collect();
    assert_eq!(actions, ["GetKey", "GetKeyMetadata", "CreateKey"]);
    // Of more than the last 32 things it is none.
    for _ in 0..40 {
        node.get(&cx, id, 0).await.unwrap();
    }
    let entries = history(id).await;
    assert_eq!(entries.len(), 32);
    assert!(entries.iter().all(|e| e.action == "GetKey"), "{entries:?}");
}

#[tokio::test]
async fn policies_are_compiled_away_from_the_threads_of_requests_and_once() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let plain = node.key(&cx).await;
    let text = r#"forbid(principal, action == Action::"GetKey", resource) when { principal == Client::"b" };"#;
    let command = CreateKey { policies: [("p".to_owned(), text.to_owned())].into(), ..creation() };
    let id = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    let before = node.keyring.load(id).await.unwrap();
    let update = UpdateKey {
        key: Some(KeyName::Id(id)),
        description: Some("other".into()),
        ..UpdateKey::default()
    };
    node.do_it(&cx, Mutation::Update(Box::new(update))).await.unwrap();
    let after = node.keyring.load(id).await.unwrap();
    assert_eq!(after.record.description, "other");
    assert!(Arc::ptr_eq(&before.policies, &after.policies), "the texts are the same");

    node.keyring.caches.clear();
    // Every thread for slow work is held up, and this one, which all requests share here, is not.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut held = Vec::new();
    for _ in 0..cores {
        let (hold, wait) = std::sync::mpsc::channel::<()>();
        let slow = node.keyring.slow.clone();
        tokio::spawn(async move { slow.run(None, move || wait.recv().is_err()).await });
        held.push(hold);
    }
    tokio::task::yield_now().await;
    let (keyring, other) = (Arc::clone(&node.keyring), cx.clone());
    let waiting = tokio::spawn(async move {
        let command = GetKey { key: KeyName::Id(id), version: 0, export: Export::None };
        keyring.get(&other, &command).await
    });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!waiting.is_finished(), "compiled on the thread of a request");
    node.get(&cx, plain, 0).await.unwrap();
    drop(held);
    assert!(waiting.await.unwrap().is_ok());

    // What is wrong with the policies of an update is still what is told of it.
    let update = UpdateKey {
        key: Some(KeyName::Id(id)),
        policies_set: [("q".to_owned(), "permit(".to_owned())].into(),
        ..UpdateKey::default()
    };
    let error = node.do_it(&cx, Mutation::Update(Box::new(update))).await.unwrap_err();
    let Error::Invalid(fields) = error else { panic!("{error:?}") };
    assert!(fields[0].field.starts_with("policies_to_update["), "{fields:?}");
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
