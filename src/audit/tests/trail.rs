//! The trail: bounds, waiting, aggregation, unknown outcomes, use.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::super::event::{CLAIMED, DETAILS, Origin, Outcome, TEXT, anonymous, bounded};
use super::{
    HEALTHY, LOST_ANSWER, LOST_COMMIT, REFUSING, event, faulty, id, in_memory, make, quick, read,
    requests, start,
};
use crate::audit::{DataPlane, Options};
use crate::error::Error;
use crate::time::Time;

const LIMIT: Duration = Duration::from_secs(60);

fn numbered(range: std::ops::Range<u64>) -> Vec<String> {
    range.map(|n| format!("request-{n}")).collect()
}

#[test]
fn claimed_text_is_bounded_and_printable() {
    let hostile = format!("a\r\nb\u{1b}[31m\u{202e}{}", "x".repeat(100_000));
    let text = bounded(&hostile);
    assert!(text.len() <= TEXT, "{}", text.len());
    assert!(text.starts_with("a\\u{d}\\u{a}b\\u{1b}[31m\\u{202e}x"), "{text}");
    assert!(text.ends_with('…'));
    assert_eq!(bounded("plain é"), "plain é");
    for n in 0..600 {
        assert!(bounded(&"é".repeat(n)).len() <= TEXT);
        assert!(bounded(&"\u{0}".repeat(n)).len() <= TEXT);
    }

    // A secret put where a name belongs is cut: it never stands there whole.
    let secret = "canary-".repeat(200);
    let origin = Origin {
        time: Time::from_seconds(1),
        request_id: &secret,
        correlation_id: &secret,
        client_id: "",
        certificate: Some(&[0xab; 32]),
        peer: None,
    };
    let mut draft = anonymous(&origin, &secret, "login", 16);
    for n in 0..100 {
        draft = draft.detail(&format!("{n}{secret}"), &secret);
    }
    let event = draft.build();
    assert_eq!(event.client_id, "", "what is claimed is never the client");
    assert!(event.details[CLAIMED].starts_with("canary-"));
    assert_eq!(event.certificate_sha256, "ab".repeat(32));
    assert!(event.details.len() <= DETAILS + 1);
    assert_eq!(event.details["more"], "85");
    let shown = format!("{event:?}");
    assert!(!shown.contains(&secret));
    assert!(shown.len() < 2 * TEXT * (DETAILS + 6), "{}", shown.len());
}

#[tokio::test]
async fn events_are_durable_once_and_in_order() {
    let vault = in_memory().await;
    let trail = start(&vault, quick()).await;
    for n in 0..5_000 {
        trail.data_plane(read(n, id(1))).unwrap();
    }
    trail.shutdown(LIMIT).await.unwrap();
    assert_eq!(requests(&vault).await, numbered(0..5_000));
    assert!(vault.head().leaves < 100, "blocks, not events, are leaves");
    assert!(matches!(trail.data_plane(read(1, id(1))), Err(Error::Unavailable { .. })));
    assert!(trail.denied(read(1, id(1))).await.is_err());
}

#[tokio::test]
async fn a_full_queue_refuses_and_drops_nothing() {
    let (vault, mode) = faulty().await;
    let trail = start(&vault, Options { queue: 100, ..quick() }).await;
    mode.store(REFUSING, Ordering::SeqCst);
    let mut accepted = Vec::new();
    for n in 0..300 {
        match trail.data_plane(read(n, id(1))) {
            Ok(()) => accepted.push(format!("request-{n}")),
            Err(Error::Exhausted { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(accepted.len(), 100);
    assert_eq!(trail.status().queued, 100);
    mode.store(HEALTHY, Ordering::SeqCst);
    trail.shutdown(LIMIT).await.unwrap();
    assert_eq!(requests(&vault).await, accepted);
    assert_eq!(trail.status().queued, 0);
    assert!(!trail.status().failing);
}

#[tokio::test]
async fn a_trail_that_cannot_write_says_so() {
    let (vault, mode) = faulty().await;
    let trail = start(&vault, quick()).await;
    mode.store(REFUSING, Ordering::SeqCst);
    assert!(trail.record(read(0, id(1))).await.is_err());
    trail.data_plane(read(1, id(1))).unwrap();
    while !trail.status().failing {
        tokio::task::yield_now().await;
    }
    let short = Duration::from_millis(50);
    assert!(matches!(trail.shutdown(short).await, Err(Error::DeadlineExceeded)));
}

#[tokio::test]
async fn after_an_unknown_outcome_there_is_exactly_one_record() {
    for (lost, seed) in [(LOST_ANSWER, 0), (LOST_COMMIT, 1)] {
        let (vault, mode) = faulty().await;
        make(&vault, id(1)).await;
        let trail = start(&vault, Options { denial_burst: 0, ..quick() }).await;
        mode.store(lost, Ordering::SeqCst);
        let leaf = trail.data_plane_durable(read(10 + seed, id(1))).await.unwrap();
        assert_eq!(leaf, vault.head().leaves - 1);
        assert_eq!(mode.load(Ordering::SeqCst), HEALTHY, "the fault was met");
        let denied = event(20, Some(id(1)), "GetKey", Outcome::Denied);
        trail.denied(denied).await.unwrap();
        mode.store(lost, Ordering::SeqCst);
        trail.shutdown(LIMIT).await.unwrap();
        assert_eq!(mode.load(Ordering::SeqCst), HEALTHY, "the fault was met");
        let expected = ["request-0".into(), format!("request-{}", 10 + seed), "request-20".into()];
        assert_eq!(requests(&vault).await, expected);
        let usage = trail.usage(&id(1)).await.unwrap();
        assert_eq!((usage.access_count, usage.recent.len()), (1, 2));
    }
}

#[tokio::test]
async fn waiting_means_durable() {
    let vault = in_memory().await;
    let options = Options { data_plane: DataPlane::Durable, ..quick() };
    let trail = Arc::new(start(&vault, options).await);
    trail.used(read(0, id(1))).await.unwrap();
    assert_eq!(requests(&vault).await, numbered(0..1));
    let leaf = trail.record(event(1, None, "login", Outcome::Success)).await.unwrap();
    assert_eq!(leaf, 1);
    assert_eq!(requests(&vault).await, numbered(0..2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaves_are_contiguous_under_64_writers() {
    let vault = in_memory().await;
    let trail = Arc::new(start(&vault, quick()).await);
    let writers: Vec<_> = (0..64_u64)
        .map(|w| {
            let trail = Arc::clone(&trail);
            tokio::spawn(async move {
                for i in 0..30 {
                    let n = w * 100 + i * 3;
                    trail.data_plane(read(n, id(1))).unwrap();
                    trail.data_plane_durable(read(n + 1, id(1))).await.unwrap();
                    trail.record(event(n + 2, None, "login", Outcome::Success)).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    trail.shutdown(LIMIT).await.unwrap();
    let mut found = requests(&vault).await;
    let mut expected: Vec<String> = (0..64).flat_map(|w| numbered(w * 100..w * 100 + 90)).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn denials_beyond_the_burst_are_counted_exactly() {
    let vault = in_memory().await;
    let trail = start(&vault, quick()).await;
    for n in 0..1_000 {
        let action = if n % 2 == 0 { "GetKey" } else { "RotateKey" };
        let mut denied = event(n, Some(id(u128::from(n) + 1)), action, Outcome::Denied);
        // Strangers: one address, whatever they claim to be.
        if n >= 500 {
            denied.client_id.clear();
            denied.details.insert(CLAIMED.into(), format!("guess-{n}"));
        }
        trail.denied(denied).await.unwrap();
    }
    trail.shutdown(LIMIT).await.unwrap();
    let leaves = vault.head().leaves;
    let bodies = super::super::usage::read_bodies(&vault, 0, leaves, usize::MAX).await.unwrap();
    let mut counts: BTreeMap<(String, String), u32> = BTreeMap::new();
    for event in bodies.into_iter().flat_map(|(_, body)| body.events) {
        assert_eq!(event.outcome(), Outcome::Denied);
        if event.count > 1 {
            assert!(event.key_id.is_empty(), "it stands for several keys");
            assert!(!event.details.contains_key(CLAIMED));
        }
        *counts.entry((event.client_id, event.action)).or_default() += event.count.max(1);
    }
    let expected = ["", "client-a"].into_iter().flat_map(|client| {
        ["GetKey", "RotateKey"].map(|action| ((client.into(), action.into()), 250))
    });
    assert_eq!(counts, expected.collect());
    // Each second has a burst of its own.
    assert!(leaves < 500, "{leaves}");
    // Keys that do not exist get no rows.
    let (rows, keys) = (vault.head().rows, vault.head().keys);
    assert_eq!((rows, keys), (leaves + 2, 0), "canary, mark and leaves");
}

#[tokio::test]
async fn a_caller_sees_its_own_use_at_once() {
    let vault = in_memory().await;
    make(&vault, id(1)).await;
    // Nothing is flushed but by hand.
    let hour = Duration::from_secs(3600);
    let trail = start(&vault, Options { usage_interval: hour, ..Options::default() }).await;
    for n in 1..=40 {
        trail.data_plane(read(n, id(1))).unwrap();
        let access = trail.access(&id(1)).await.unwrap();
        assert_eq!(access.count, n);
        assert_eq!(
            access.last.unwrap().micros(),
            1_800_000_000_000_000 + i64::try_from(n).unwrap()
        );
        let usage = trail.usage(&id(1)).await.unwrap();
        assert_eq!(usage.access_count, n);
        assert_eq!(usage.recent.len() as u64, n.min(32));
        assert_eq!(usage.recent.last().unwrap().time, usage.last_accessed_at);
    }
    // A mutation is history, and no use. The log gives the order: first let the uses into it.
    while trail.status().queued > 0 {
        tokio::task::yield_now().await;
    }
    let mut tx = vault.begin().await.unwrap();
    let rotate = event(41, Some(id(1)), "RotateKey", Outcome::Success);
    tx.event(rotate.clone());
    let leaf = tx.commit().await.unwrap().leaf.unwrap();
    trail.observed(leaf, &rotate);
    trail.observed(leaf, &rotate);
    for _ in 0..3 {
        let usage = trail.usage(&id(1)).await.unwrap();
        assert_eq!(usage.access_count, 40);
        assert_eq!(usage.recent.len(), 32);
        assert_eq!(usage.recent.iter().filter(|e| e.action == "RotateKey").count(), 1);
        super::super::flush::usage(&trail.inner, true).await.unwrap();
    }
    assert_eq!(trail.status().usage_backlog, 0);
    assert_eq!(trail.access(&id(1)).await.unwrap().count, 40);
    assert_eq!(trail.access(&id(2)).await.unwrap().count, 0);
}

#[tokio::test]
async fn checkpoints_come_by_themselves() {
    for (leaves, interval) in [(5, 3_600_000), (1_000_000, 1)] {
        let vault = in_memory().await;
        let options = Options {
            usage_interval: Duration::from_millis(1),
            checkpoint_leaves: leaves,
            checkpoint_interval: Duration::from_millis(interval),
            ..Options::default()
        };
        let trail = start(&vault, options).await;
        assert_eq!(trail.checkpoint().await.unwrap(), None, "an empty log has none");
        for n in 0..5 {
            trail.record(event(n, None, "login", Outcome::Success)).await.unwrap();
        }
        while trail.latest_checkpoint().await.unwrap().is_none_or(|c| c.size < 5) {
            tokio::task::yield_now().await;
        }
        let asked = trail.checkpoint().await.unwrap().unwrap();
        assert_eq!((asked.size, asked.root), (5, vault.head().root));
    }
}

#[tokio::test]
async fn leaves_that_touch_no_key_move_the_mark_in_the_end() {
    let vault = in_memory().await;
    for n in 0..1_500 {
        vault.record(vec![event(n, None, "login", Outcome::Success)]).await.unwrap();
    }
    // None of them was told to the trail: all are read from the log.
    let trail = start(&vault, quick()).await;
    let backlog = trail.status().usage_backlog;
    assert_eq!(backlog, 0, "{backlog}");
    for n in 0..10 {
        vault.record(vec![event(n, None, "login", Outcome::Success)]).await.unwrap();
    }
    super::super::flush::usage(&trail.inner, false).await.unwrap();
    assert_eq!(trail.status().usage_backlog, 10, "known, and not written for");
    trail.shutdown(LIMIT).await.unwrap();
    assert_eq!(trail.status().usage_backlog, 0);
}

#[tokio::test]
async fn only_work_with_a_key_is_its_use() {
    let vault = in_memory().await;
    make(&vault, id(1)).await;
    let trail = start(&vault, quick()).await;
    let cases = [
        ("GetKey", Outcome::Success, 1),
        ("GetKey", Outcome::Denied, 1),
        ("GetKeyMetadata", Outcome::Success, 1),
        ("RotateKey", Outcome::Success, 1),
        ("ExportKey", Outcome::Success, 2),
        ("ExportKey", Outcome::Failed, 2),
        ("NoSuchAction", Outcome::Success, 2),
    ];
    for (n, (action, outcome, count)) in (1..).zip(cases) {
        let event = event(n, Some(id(1)), action, outcome);
        // Either way of recording counts alike.
        if n % 2 == 0 {
            trail.record(event).await.unwrap();
        } else {
            trail.data_plane_durable(event).await.unwrap();
        }
        assert_eq!(trail.access(&id(1)).await.unwrap().count, count, "{action} {outcome:?}");
    }
    assert_eq!(trail.usage(&id(1)).await.unwrap().recent.len(), cases.len());
}
