//! Pages, following and histories, against a plain list of the events.

use std::sync::Arc;

use futures::StreamExt;
use proptest::prelude::*;

use super::super::read::{EventView, Filter, Order};
use super::{event, id, in_memory, make, quick, start};
use crate::audit::{Outcome, Trail};
use crate::time::Time;

fn at(n: u64) -> Time {
    Time::from_micros(1_800_000_000_000_000 + i64::try_from(n).unwrap())
}

async fn pages(trail: &Trail, filter: &Filter, order: Order, size: usize) -> Vec<String> {
    let mut token = String::new();
    let mut found = Vec::new();
    loop {
        let page = trail.list(filter, order, 0, size, &token).await.unwrap();
        assert!(page.events.len() <= size);
        found.extend(page.events.into_iter().map(|e| e.event.request_id));
        if page.next.is_empty() {
            return found;
        }
        token = page.next;
    }
}

const ACTIONS: [&str; 3] = ["GetKey", "RotateKey", "login"];
const OUTCOMES: [Outcome; 3] = [Outcome::Success, Outcome::Denied, Outcome::Failed];

fn filters() -> impl Strategy<Value = Filter> {
    (
        proptest::option::of(0_u64..60),
        proptest::option::of(0_u64..60),
        proptest::sample::select(vec!["", "client-a", "nobody"]),
        proptest::sample::select(vec!["", "Get*", "GetKey", "login"]),
        proptest::option::of(0_u128..3),
        proptest::option::of(proptest::sample::select(OUTCOMES.to_vec())),
    )
        .prop_map(|(since, until, client, action, key, outcome)| Filter {
            since: since.map(at),
            until: until.map(at),
            client: client.into(),
            action: action.into(),
            key: key.map(|k| id(k + 1)),
            outcome,
            value_hash: String::new(),
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Blocks and single events, any filter, any page size, both orders.
    #[test]
    fn pages_are_the_events_that_pass(
        shape in proptest::collection::vec((any::<bool>(), 1_usize..12, 0_usize..3, 0_usize..3, 0_u128..3), 1..12),
        filter in filters(),
        size in 1_usize..20,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let vault = in_memory().await;
            let trail = start(&vault, quick()).await;
            let mut all = Vec::new();
            for (block, events, action, outcome, key) in shape {
                let first = all.len() as u64;
                let made: Vec<_> = (first..first + events as u64)
                    .map(|n| event(n, Some(id(key + 1)), ACTIONS[action], OUTCOMES[outcome]))
                    .collect();
                all.extend(made.clone());
                if block {
                    vault.record_block(super::super::line::encode(&made).into()).await.unwrap();
                } else {
                    vault.record(made).await.unwrap();
                }
            }
            let mut expected: Vec<String> = all
                .iter()
                .filter(|e| filter.passes(e))
                .map(|e| e.request_id.clone())
                .collect();
            assert_eq!(pages(&trail, &filter, Order::OldestFirst, size).await, expected);
            expected.reverse();
            assert_eq!(pages(&trail, &filter, Order::NewestFirst, size).await, expected);
        });
    }
}

#[tokio::test]
async fn tokens_are_of_their_list() {
    let vault = in_memory().await;
    let trail = start(&vault, quick()).await;
    for n in 0..9 {
        trail.record(event(n, None, "login", Outcome::Success)).await.unwrap();
    }
    let filter = Filter { action: "login".into(), ..Filter::default() };
    let page = trail.list(&filter, Order::OldestFirst, 2, 3, "").await.unwrap();
    let ids: Vec<_> = page.events.iter().map(|e| e.index).collect();
    assert_eq!(ids, [2, 3, 4]);
    let again = trail.list(&filter, Order::OldestFirst, 0, 3, &page.next).await.unwrap();
    assert_eq!(again.events[0].index, 5);
    let other = Filter::default();
    assert!(trail.list(&other, Order::OldestFirst, 0, 3, &page.next).await.is_err());
    assert!(trail.list(&filter, Order::NewestFirst, 0, 3, &page.next).await.is_err());
    for bad in ["x", "!", "AAAA", &page.next[1..], &format!("{}A", page.next)] {
        assert!(trail.list(&filter, Order::OldestFirst, 0, 3, bad).await.is_err(), "{bad}");
    }
    let empty = in_memory().await;
    let trail = start(&empty, quick()).await;
    let page = trail.list(&other, Order::NewestFirst, 0, 3, "").await.unwrap();
    assert!(page.events.is_empty() && page.next.is_empty());
}

#[tokio::test]
async fn followers_get_what_comes() {
    let vault = in_memory().await;
    let trail = Arc::new(start(&vault, quick()).await);
    let record = |n| trail.record(event(n, None, "login", Outcome::Success));
    record(0).await.unwrap();
    let mut new = Box::pin(trail.follow(None, Filter::default()));
    let mut all = Box::pin(trail.follow(Some(0), Filter::default()));
    let first = all.next().await.unwrap().unwrap();
    assert_eq!((first.events.len(), first.next_index), (1, 1));
    trail.record(event(1, None, "other", Outcome::Failed)).await.unwrap();
    let next = new.next().await.unwrap().unwrap();
    assert_eq!(next.events[0].event.request_id, "request-1");
    let mut seen = 0;
    while seen < 1 {
        seen += all.next().await.unwrap().unwrap().events.len();
    }
    trail.shutdown(std::time::Duration::from_secs(30)).await.unwrap();
    assert!(new.next().await.is_none(), "it ends with the trail");
}

#[tokio::test]
async fn a_history_goes_back_to_the_making() {
    let vault = in_memory().await;
    let trail = start(&vault, quick()).await;
    trail.record(event(900, None, "login", Outcome::Success)).await.unwrap();
    make(&vault, id(1)).await;
    let mut expected = vec!["request-0".to_owned()];
    for n in 1..=200 {
        let key = id(u128::from(n % 4) + 1);
        let event = event(n, Some(key), "RotateKey", Outcome::Success);
        if key == id(1) {
            expected.push(event.request_id.clone());
        }
        if n % 3 == 0 {
            trail.data_plane_durable(event).await.unwrap();
        } else {
            trail.record(event).await.unwrap();
        }
    }
    expected.reverse();
    for size in [1, 7, 1000] {
        let mut token = String::new();
        let mut found = Vec::new();
        loop {
            let page = trail.history(&id(1), size, &token).await.unwrap();
            assert!(page.events.len() <= size);
            found.extend(page.events.into_iter().map(|e| e.event.request_id));
            if page.next.is_empty() {
                break;
            }
            token = page.next;
        }
        assert_eq!(found, expected, "pages of {size}");
    }
    let page = trail.history(&id(77), 10, "").await.unwrap();
    assert!(page.events.is_empty());
}

#[tokio::test]
async fn views_are_readable() {
    let vault = in_memory().await;
    let trail = start(&vault, quick()).await;
    trail.record(event(5, Some(id(9)), "ExportKey", Outcome::Success)).await.unwrap();
    let page = trail.list(&Filter::default(), Order::NewestFirst, 0, 1, "").await.unwrap();
    let view = serde_json::to_value(EventView::from(&page.events[0])).unwrap();
    assert_eq!(view["outcome"], "success");
    assert_eq!(view["time"], "2027-01-15T08:00:00.000005Z");
    assert_eq!(view["key_id"], id(9).to_string());
    assert_eq!(view["peer_address"], "192.0.2.7");
    assert_eq!(view["count"], 1);
}
