//! Coming expiries are told once each, whatever the clock and the owner do.

use polykey_proto::polykey::record::v1::{AuditBody, AuditLeaf};
use polykey_storage::Direction;
use prost::Message;

use super::*;
use crate::command::Expiry;

const DAY: i64 = 86_400;

fn expiring(at: Time) -> Mutation {
    Mutation::Create(Box::new(CreateKey { expires_at: Some(at), ..creation() }))
}

fn moved(id: KeyId, expiry: Expiry) -> Mutation {
    Mutation::Update(Box::new(UpdateKey {
        key: Some(KeyName::Id(id)),
        expires_at: Some(expiry),
        ..UpdateKey::default()
    }))
}

impl Node {
    /// Lets days pass, and the schedule run.
    async fn after(&self, days: i64) {
        self.clock.advance(Duration::from_secs(u64::try_from(days * DAY).unwrap()));
        self.run_due().await;
    }

    /// How many days ahead the expiry of a key was told, in their order; 0 = that it has expired.
    async fn told(&self, id: KeyId) -> Vec<u32> {
        let all = polykey_storage::all();
        let rows =
            self.keyring.vault.scan::<AuditLeaf>(all, Direction::Forward, 10_000).await.unwrap();
        let events = rows
            .iter()
            .flat_map(|(_, leaf)| AuditBody::decode(leaf.record.body.as_ref()).unwrap().events);
        events
            .filter(|event| event.key_id.as_ref() == id.bytes())
            .filter_map(|event| match event.action.as_str() {
                "NotifyKeyExpiry" => Some(event.details["days"].parse().unwrap()),
                "ExpireKey" => Some(0),
                _ => None,
            })
            .collect()
    }

    async fn scheduled(&self) -> usize {
        let all = polykey_storage::all();
        self.keyring.vault.scan::<JobRecord>(all, Direction::Forward, 100).await.unwrap().len()
    }
}

#[tokio::test]
async fn each_threshold_is_told_once_and_after_a_sleep_only_the_nearest() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let at = START.plus_seconds(100 * DAY);
    let every = node.do_it(&cx, expiring(at)).await.unwrap().key.id;
    let short = node.do_it(&cx, expiring(START.plus_seconds(5 * DAY))).await.unwrap().key.id;
    let never = node.key(&cx).await;
    assert_eq!(node.scheduled().await, 2, "one job a key");
    node.after(3).await;
    assert_eq!((node.told(every).await, node.told(short).await), (vec![], vec![]));
    node.after(1).await;
    node.run_due().await;
    node.after(1).await;
    assert_eq!(node.told(short).await, [1, 0]);
    node.after(65).await;
    assert_eq!(node.told(every).await, [30]);
    let asleep = node.do_it(&node.cx("a", "user"), expiring(at)).await.unwrap().key.id;
    assert_eq!(node.told(asleep).await, [] as [u32; 0]);
    // Over two thresholds.
    node.after(29).await;
    assert_eq!((node.told(every).await, node.told(asleep).await), (vec![30, 1], vec![1]));
    node.after(400).await;
    assert_eq!(node.told(every).await, [30, 1, 0]);
    assert_eq!(node.told(never).await, [] as [u32; 0]);
    assert_eq!(node.scheduled().await, 0);
}

#[tokio::test]
async fn a_changed_expiry_is_told_anew_and_what_ends_otherwise_is_not() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let at = |days: i64| node.clock.now().plus_seconds(days * DAY);
    let [changed, freed, revoked] = {
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(node.do_it(&cx, expiring(at(10))).await.unwrap().key.id);
        }
        <[KeyId; 3]>::try_from(ids).unwrap()
    };
    node.after(3).await;
    assert_eq!(node.told(changed).await, [7]);
    let cx = node.cx("a", "user");
    let later = node.clock.now().plus_seconds(10 * DAY);
    node.do_it(&cx, moved(changed, Expiry::At(later))).await.unwrap();
    node.do_it(&cx, moved(freed, Expiry::Never)).await.unwrap();
    node.do_it(&cx, revoke(revoked, None)).await.unwrap();
    for _ in 0..12 {
        node.after(1).await;
    }
    assert_eq!(node.told(changed).await, [7, 7, 1, 0]);
    assert_eq!((node.told(freed).await, node.told(revoked).await), (vec![7], vec![7]));
    assert_eq!(node.scheduled().await, 0);
}

#[tokio::test]
async fn keys_from_before_there_were_notices_get_theirs() {
    let node = Node::new().await;
    let cx = node.cx("a", "user");
    let at = START.plus_seconds(10 * DAY);
    let id = node.do_it(&cx, expiring(at)).await.unwrap().key.id;
    node.key(&cx).await;
    // As it was written before.
    let mut tx = node.keyring.vault.begin().await.unwrap();
    for (row, _) in
        tx.scan::<JobRecord>(polykey_storage::all(), Direction::Forward, 9).await.unwrap()
    {
        tx.delete::<JobRecord>(&row);
    }
    tx.commit().await.unwrap();
    node.after(1).await;
    while node.keyring.arm_notices(node.clock.now()).await.unwrap() {}
    assert_eq!(node.scheduled().await, 1);
    assert!(!node.keyring.arm_notices(node.clock.now()).await.unwrap(), "once for a store");
    node.after(2).await;
    assert_eq!(node.told(id).await, [7]);
}
