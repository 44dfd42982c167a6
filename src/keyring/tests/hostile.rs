//! What callers try who want more than they are given.

use std::collections::BTreeMap;

use super::*;

fn update(id: KeyId, change: UpdateKey) -> Mutation {
    Mutation::Update(Box::new(UpdateKey { key: Some(KeyName::Id(id)), ..change }))
}

fn described(id: KeyId) -> Mutation {
    update(id, UpdateKey { description: Some("mine".into()), ..UpdateKey::default() })
}

fn policies(id: KeyId, set: &[(&str, &str)], removed: &[&str]) -> Mutation {
    let policies_set = set.iter().map(|(n, t)| ((*n).to_owned(), (*t).to_owned())).collect();
    let policies_removed = removed.iter().map(|n| (*n).to_owned()).collect();
    update(id, UpdateKey { policies_set, policies_removed, ..UpdateKey::default() })
}

#[tokio::test]
async fn a_decision_on_what_was_never_committed_is_not_remembered() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let freeze = "forbid (principal, action == Action::\"UpdateKeyMetadata\", resource);";
    let command = CreateKey {
        policies: BTreeMap::from([("freeze".to_owned(), freeze.to_owned())]),
        ..creation()
    };
    let id = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    let gone = node.key(&cx).await;
    node.do_it(&cx, revoke(gone, None)).await.unwrap();
    // The second step is allowed by what the first would have made of revision 2.
    let batch = [policies(id, &[], &["freeze"]), described(id), rotate(gone, Strategy::Hot, 0)];
    let result = node.keyring.mutate_all(&cx, &batch, &[None; 3]).await;
    assert!(matches!(result, Err((2, Error::State(Reason::KeyRevoked)))), "{result:?}");
    let other = "forbid (principal == Client::\"x\", action == Action::\"GetKey\", resource);";
    let done = node.do_it(&cx, policies(id, &[("other", other)], &[])).await.unwrap();
    assert_eq!(done.key.record.revision, 2);
    let result = node.do_it(&cx, described(id)).await;
    assert!(matches!(result, Err(Error::Denied { .. })), "{result:?}");
}

#[tokio::test]
async fn a_key_that_is_hidden_and_one_that_is_not_there_leave_the_same_traces() {
    let node = Node::new().await;
    let owner = node.cx("a", "user");
    let (hidden, nothing) = (node.key(&owner).await, KeyId::mint(START));
    let leaves = || node.keyring.vault.head().leaves;
    let mut made = Vec::new();
    for (client, id) in [("b", hidden), ("c", nothing)] {
        let cx = node.cx(client, "user");
        let name = KeyName::Id(id);
        let before = leaves();
        let mut traces = Vec::new();
        let metadata = GetMetadata { key: name.clone(), version: 0, history: true, policies: true };
        let results = [
            node.get(&cx, id, 0).await.map(drop),
            node.keyring.metadata(&cx, &metadata).await.map(drop),
            node.keyring.describe(&cx, &name).await.map(drop),
            node.keyring.for_history(&cx, &name).await.map(drop),
            node.keyring.list_versions(&cx, &name, 0, 10).await.map(drop),
            node.do_it(&cx, rotate(id, Strategy::Hot, 0)).await.map(drop),
            node.do_it(&cx, revoke(id, None)).await.map(drop),
            node.do_it(&cx, described(id)).await.map(drop),
        ];
        for result in results {
            assert!(matches!(result, Err(Error::NotFound)), "{result:?}");
        }
        traces.push(leaves() - before);
        made.push(traces);
    }
    assert_eq!(made[0], made[1]);
    assert_eq!(made[0], [8], "each refusal is recorded");
}

#[tokio::test]
async fn moving_an_alias_does_not_tell_which_keys_exist() {
    let node = Node::new().await;
    let (owner, cx) = (node.cx("a", "user"), node.cx("b", "user"));
    let hidden = node.key(&owner).await;
    let (one, two) = (node.key(&cx).await, node.key(&cx).await);
    let set = |key, moves, from| {
        let key = KeyName::Id(key);
        Mutation::SetAlias(SetAlias { key, alias: "mine".into(), moves, from })
    };
    node.do_it(&cx, set(one, false, None)).await.unwrap();
    for from in
        [KeyName::Id(hidden), KeyName::Id(KeyId::mint(START)), KeyName::Alias("nothing".into())]
    {
        let result = node.do_it(&cx, set(two, true, Some(from))).await;
        assert!(matches!(result, Err(Error::Conflict)), "{result:?}");
    }
    node.do_it(&cx, set(two, true, Some(KeyName::Id(one)))).await.unwrap();
    node.do_it(&cx, set(one, true, Some(KeyName::Alias("mine".into())))).await.unwrap();
}

#[tokio::test]
async fn whoever_may_not_export_or_audit_learns_no_state_by_asking() {
    let node = Node::new().await;
    let owner = node.cx("a", "user");
    let command = CreateKey { contexts: vec!["b".into()], ..creation() };
    let id = node.do_it(&owner, Mutation::Create(Box::new(command))).await.unwrap().key.id;
    node.do_it(&owner, revoke(id, None)).await.unwrap();
    let cx = node.cx("b", "user");
    let key = KeyName::Id(id);
    let command = GetKey { key: key.clone(), version: 0, export: Export::Plain };
    let result = node.keyring.get(&cx, &command).await;
    assert!(matches!(result, Err(Error::Denied { .. })), "{result:?}");
    let command = GetMetadata { key, version: 9, history: true, policies: false };
    let result = node.keyring.metadata(&cx, &command).await;
    assert!(matches!(result, Err(Error::Denied { .. })), "{result:?}");
}

#[tokio::test]
async fn the_same_request_twice_at_once_is_one_change() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let key = Idempotency {
        key: "k".into(),
        method: "CreateKey",
        item: 0,
        request: bytes::Bytes::from_static(b"1"),
    };
    let make = || {
        Mutation::Create(Box::new(CreateKey {
            algorithm: Algorithm::EcdsaP384,
            alias: Some("one".into()),
            ..creation()
        }))
    };
    let (one, two) = (make(), make());
    // On either side of midnight, too.
    let late = Context {
        now: Time::from_micros((START.seconds() / 86_400 + 1) * 86_400_000_000),
        ..cx.clone()
    };
    let early = Context { now: Time::from_micros(late.now.micros() - 1), ..cx };
    let (one, two) = tokio::join!(
        node.keyring.mutate(&early, &one, Some(&key)),
        node.keyring.mutate(&late, &two, Some(&key)),
    );
    assert_eq!(one.unwrap().key.id, two.unwrap().key.id);
}

#[tokio::test]
async fn a_page_of_large_keys_is_short_and_the_next_one_goes_on() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let mut made = BTreeSet::new();
    for _ in 0..130 {
        let tags = (0..50).map(|i| (format!("k{i:0127}"), "v".repeat(256))).collect();
        let command = CreateKey { tags, ..creation() };
        let done = node.do_it(&cx, Mutation::Create(Box::new(command))).await.unwrap();
        made.insert(done.key.id);
    }
    let (mut listed, mut pages, mut token) = (BTreeSet::new(), 0, String::new());
    loop {
        let query = ListKeys { page_size: 1000, page_token: token, ..ListKeys::default() };
        let page = node.keyring.list(&cx, &query).await.unwrap();
        assert!(page.keys.len() < 120, "{}", page.keys.len());
        listed.extend(page.keys.iter().map(|view| view.key.id));
        assert_eq!((page.total, page.filtered), (130, 130));
        pages += 1;
        token = page.next;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!((listed, pages), (made, 2));
}
