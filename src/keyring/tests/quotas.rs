//! Quotas of keys: exact for whoever creates at once, in the middle of being read, or gives up.

use std::num::NonZeroU32;
use std::ops::Bound;

use futures::future::join_all;
use futures::poll;
use polykey_proto::polykey::record::v1::ListRow;

use super::*;
use crate::quotas::Quota;

const DAY: u64 = 86_400;

fn quota(name: &str, keys: u32) -> Quota {
    let keys = NonZeroU32::new(keys).unwrap();
    Quota { name: name.into(), tier: None, client: None, keys }
}

fn refused(result: Result<Done, Error>) -> (String, u32) {
    match result {
        Err(Error::Quota { name, keys }) => (name, keys),
        other => panic!("{other:?}"),
    }
}

impl Node {
    async fn limited(keys: u32) -> Self {
        let node = Self::new().await;
        node.keyring.limit(&[quota("few", keys)]);
        node
    }

    async fn destroy(&self, client: &str, id: KeyId) {
        let destroy = ScheduleDestruction { key: KeyName::Id(id), days: 7, expected: None };
        self.do_it(&self.cx(client, "user"), Mutation::Destroy(destroy)).await.unwrap();
        self.clock.advance(Duration::from_secs(7 * DAY));
        self.run_due().await;
    }

    /// How many keys there are.
    async fn keys(&self) -> usize {
        let range = (Bound::Unbounded, Bound::Unbounded);
        self.keyring.vault.scan_keys(space::KEYS, range, 10_000).await.unwrap().len()
    }

    /// Creates until it is refused.
    async fn fill(&self, client: &str) -> usize {
        let cx = self.cx(client, "user");
        let mut made = 0;
        loop {
            match self.do_it(&cx, create()).await {
                Ok(_) => made += 1,
                Err(Error::Quota { .. }) => return made,
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_create_at_once_get_exactly_what_the_quota_gives() {
    let node = Arc::new(Node::new().await);
    // Some are there before anybody counts.
    for _ in 0..3 {
        node.key(&node.cx("a", "user")).await;
    }
    node.keyring.limit(&[quota("many", 100), quota("few", 20)]);
    let creators = (0..32).map(|_| {
        let node = Arc::clone(&node);
        tokio::spawn(async move { node.fill("a").await })
    });
    let made: usize = join_all(creators).await.into_iter().map(Result::unwrap).sum();
    assert_eq!((made, node.keys().await), (17, 20));
    // The one that gives fewer is named, and counted.
    let (name, keys) = refused(node.do_it(&node.cx("a", "user"), create()).await);
    assert_eq!((name.as_str(), keys), ("few", 20));
    let counted = node.keyring.quotas().refused();
    assert_eq!((counted["few"], counted["many"]), (33, 0));
    assert_eq!(node.fill("b").await, 20, "each client has keys of its own");
}

#[tokio::test]
async fn a_key_counts_until_it_is_destroyed() {
    let node = Node::limited(2).await;
    let cx = node.cx("a", "user");
    let (first, second) = (node.key(&cx).await, node.key(&cx).await);
    node.do_it(&cx, rotate(first, Strategy::Hot, 0)).await.unwrap();
    node.do_it(&cx, revoke(first, None)).await.unwrap();
    refused(node.do_it(&cx, create()).await);
    let destroy = ScheduleDestruction { key: KeyName::Id(first), days: 7, expected: None };
    node.do_it(&cx, Mutation::Destroy(destroy)).await.unwrap();
    refused(node.do_it(&cx, create()).await);
    node.clock.advance(Duration::from_secs(7 * DAY));
    node.run_due().await;
    assert_eq!(node.fill("a").await, 1);
    node.destroy("a", second).await;
    assert_eq!(node.fill("a").await, 1);
}

#[tokio::test]
async fn what_is_read_anew_is_what_was_counted() {
    let node = Node::limited(3).await;
    let shared = CreateKey { contexts: vec!["a".into()], ..creation() };
    // What others share with a client is theirs.
    let shared = Mutation::Create(Box::new(shared));
    node.do_it(&node.cx("b", "user"), shared).await.unwrap();
    let gone = node.key(&node.cx("a", "user")).await;
    node.key(&node.cx("a", "user")).await;
    node.destroy("a", gone).await;
    node.keyring.caches.clear();
    assert_eq!(node.fill("a").await, 2);
    node.keyring.caches.clear();
    assert_eq!(node.fill("a").await, 0);
}

#[tokio::test]
async fn what_other_nodes_do_is_counted_once_it_is_told() {
    let node = Node::limited(2).await;
    let first = node.key(&node.cx("a", "user")).await;
    node.keyring.limit(&[]);
    let other = node.key(&node.cx("a", "user")).await;
    node.keyring.limit(&[quota("few", 2)]);
    // Told again, and of a key that is not there: nothing counts twice.
    let prefix = rows::list_prefix(&node.keyring.vault, "a");
    for id in [first, other, other, KeyId::mint(START)] {
        let row = RowKey::new(space::LIST, [prefix, id.bytes()].concat());
        node.keyring.caches.invalidate(&[&row]);
    }
    refused(node.do_it(&node.cx("a", "user"), create()).await);
    node.destroy("a", other).await;
    assert_eq!(node.fill("a").await, 1);
}

#[tokio::test]
async fn a_repeated_creation_counts_once_and_a_change_of_several_counts_whole_or_not() {
    let node = Node::limited(3).await;
    let cx = node.cx("a", "user");
    let once = Idempotency {
        key: "k".into(),
        method: "CreateKey",
        item: 0,
        request: bytes::Bytes::from_static(b"1"),
    };
    let first = node.keyring.mutate(&cx, &create(), Some(&once)).await.unwrap();
    for _ in 0..5 {
        let again = node.keyring.mutate(&cx, &create(), Some(&once)).await.unwrap();
        assert_eq!(again.key.id, first.key.id);
    }
    let three = [create(), create(), create()];
    let (index, error) = node.keyring.mutate_all(&cx, &three, &[None; 3]).await.unwrap_err();
    assert!(index == 2 && matches!(error, Error::Quota { .. }), "{index}: {error:?}");
    assert_eq!(node.keys().await, 1);
    node.keyring.mutate_all(&cx, &three[..2], &[None; 2]).await.unwrap();
    refused(node.do_it(&cx, create()).await);
    // Full or not, it is found again.
    let again = node.keyring.mutate(&cx, &create(), Some(&once)).await.unwrap();
    assert_eq!(again.key.id, first.key.id);
}

#[tokio::test]
async fn a_creation_that_is_given_up_counts_if_it_was_made() {
    let node = Node::limited(40).await;
    let cx = node.cx("a", "user");
    for steps in 0..30 {
        let mut creation = Box::pin(node.do_it(&cx, create()));
        for _ in 0..steps {
            if poll!(&mut creation).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    node.fill("a").await;
    assert_eq!(node.keys().await, 40);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_that_is_given_up_counts_before_it_is_durable() {
    let (node, store) = Node::over_faulty(|keyring| keyring).await;
    let node = Arc::new(node);
    node.keyring.limit(&[quota("few", 1)]);
    let create_one = || {
        let node = Arc::clone(&node);
        tokio::spawn(async move { node.do_it(&node.cx("a", "user"), create()).await })
    };
    store.hold(true);
    let commits = store.commits();
    let given_up = create_one();
    while store.commits() == commits {
        tokio::task::yield_now().await;
    }
    given_up.abort();
    assert!(given_up.await.unwrap_err().is_cancelled());
    let next = create_one();
    // Whatever it waits for, it waits behind the one before.
    while node.keyring.vault.queued().0 == 0 && !next.is_finished() {
        tokio::task::yield_now().await;
    }
    store.hold(false);
    refused(next.await.unwrap());
    assert_eq!(node.keys().await, 1);
}

#[tokio::test]
async fn what_others_share_with_a_client_is_not_counted_however_much_it_is() {
    let node = Node::new().await;
    node.keyring.limit(&[Quota { client: Some("a".into()), ..quota("few", 2) }]);
    node.do_it(&node.cx("a", "user"), create()).await.unwrap();
    let shared = || {
        let contexts = vec!["a".to_owned()];
        Mutation::Create(Box::new(CreateKey { contexts, ..creation() }))
    };
    for _ in 0..20 {
        node.do_it(&node.cx("b", "user"), shared()).await.unwrap();
    }
    assert_eq!(node.fill("a").await, 1);
    assert_eq!(node.fill("a").await, 0);
}

#[tokio::test]
async fn a_key_whose_commit_fails_gives_its_place_back() {
    let node = Node::limited(1).await;
    let cx = node.cx("a", "user");
    let named = |alias: &str| {
        Mutation::Create(Box::new(CreateKey { alias: Some(alias.into()), ..creation() }))
    };
    node.do_it(&node.cx("b", "user"), named("taken")).await.unwrap();
    for _ in 0..3 {
        let result = node.do_it(&cx, named("taken")).await;
        assert!(matches!(result, Err(Error::State(Reason::AlreadyExists))), "{result:?}");
    }
    assert_eq!(node.fill("a").await, 1);
}

#[tokio::test]
async fn a_client_with_more_keys_than_are_read_at_a_time_has_them_all_counted() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let many: Vec<Mutation> = (0..600).map(|_| create()).collect();
    node.keyring.mutate_all(&cx, &many, &[]).await.unwrap();
    let prefix = polykey_storage::prefix(rows::list_prefix(&node.keyring.vault, "a"));
    let listed = node.keyring.vault.scan_keys(<ListRow as space::Record>::SPACE, prefix, 1000);
    assert_eq!(listed.await.unwrap().len(), 600);
    node.keyring.limit(&[quota("few", 602)]);
    assert_eq!(node.fill("a").await, 2);
}
