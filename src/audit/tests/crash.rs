//! What is durable survives, and the use of keys is exact after a stop at any point.

use std::time::Duration;

use polykey_hsm::Ring;

use super::{NODE, event, id, make, on_disk, quick, read, requests, start};
use crate::audit::{Options, Outcome};

/// Dropped without shutdown: the tasks die where they are, as in a killed process. What was
/// acknowledged as durable is there, once, and the use of each key is what the log says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn use_is_exact_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let ring = Ring::generate(NODE).unwrap();
    {
        let vault = on_disk(&path, &ring).await;
        for key in 1..=3 {
            make(&vault, id(key)).await;
        }
    }
    let mut number = 0;
    let mut durable: Vec<String> = Vec::new();
    for round in 0_u64..12 {
        let vault = on_disk(&path, &ring).await;
        let options = Options {
            // Some rounds write the use all the time, some never.
            usage_interval: Duration::from_millis(if round % 3 == 0 { 3_600_000 } else { round }),
            ..quick()
        };
        let trail = start(&vault, options).await;
        // What the log said when the trail began.
        for key in 1..=3 {
            check(&trail, &vault, id(key)).await;
        }
        for _ in 0..40 {
            number += 1;
            let key = id(u128::from(number % 3) + 1);
            match number % 4 {
                0 => {
                    let event = read(number, key);
                    durable.push(event.request_id.clone());
                    trail.data_plane_durable(event).await.unwrap();
                }
                1 => trail.data_plane(read(number, key)).unwrap(),
                2 => {
                    let event = event(number, Some(key), "ExportKey", Outcome::Success);
                    durable.push(event.request_id.clone());
                    trail.record(event).await.unwrap();
                }
                _ => {
                    // A mutation whose process died before it told the trail.
                    let mut tx = vault.begin().await.unwrap();
                    let event = event(number, Some(key), "UpdateKeyMetadata", Outcome::Success);
                    durable.push(event.request_id.clone());
                    tx.event(event);
                    tx.commit().await.unwrap();
                }
            }
        }
        drop(trail);
    }
    let vault = on_disk(&path, &ring).await;
    let found = requests(&vault).await;
    for request in &durable {
        assert_eq!(found.iter().filter(|f| *f == request).count(), 1, "{request}");
    }
    let mut distinct = found.clone();
    distinct.sort();
    distinct.dedup();
    // The three creations share a request id.
    assert_eq!(distinct.len(), found.len() - 2);
    let trail = start(&vault, quick()).await;
    trail.shutdown(Duration::from_secs(30)).await.unwrap();
    for key in 1..=3 {
        check(&trail, &vault, id(key)).await;
    }
    assert!(vault.verify(true, |_| {}).await.unwrap().findings.is_empty());
}

/// Compares the use of a key with a count over the whole log.
async fn check(trail: &crate::audit::Trail, vault: &crate::vault::Vault, key: crate::key::KeyId) {
    let leaves = vault.head().leaves;
    let bodies = super::super::usage::read_bodies(vault, 0, leaves, usize::MAX).await.unwrap();
    let of_key: Vec<_> = bodies
        .into_iter()
        .flat_map(|(leaf, body)| body.events.into_iter().map(move |event| (leaf, event)))
        .filter(|(_, e)| e.key_id.as_ref() == key.bytes() && e.action != "CreateKey")
        .collect();
    let uses = of_key.iter().filter(|(_, e)| e.action != "UpdateKeyMetadata");
    let usage = trail.usage(&key).await.unwrap();
    assert_eq!(usage.access_count, uses.clone().count() as u64);
    assert_eq!(usage.last_accessed_at, uses.map(|(_, e)| e.time).max().unwrap_or(0));
    let recent: Vec<_> = usage.recent.iter().map(|e| (e.leaf, e.time)).collect();
    let last = of_key.len().saturating_sub(32);
    let expected: Vec<_> = of_key[last..].iter().map(|(leaf, e)| (*leaf, e.time)).collect();
    assert_eq!(recent, expected);
    assert_eq!(trail.access(&key).await.unwrap().count, usage.access_count);
}

#[tokio::test]
async fn a_shutdown_keeps_everything_and_signs_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let ring = Ring::generate(NODE).unwrap();
    let root = {
        let vault = on_disk(&path, &ring).await;
        let trail = start(&vault, quick()).await;
        for n in 0..100 {
            trail.data_plane(read(n, id(1))).unwrap();
        }
        trail.shutdown(Duration::from_secs(30)).await.unwrap();
        vault.head().root
    };
    let vault = on_disk(&path, &ring).await;
    assert_eq!(requests(&vault).await.len(), 100);
    let trail = start(&vault, quick()).await;
    let checkpoint = trail.latest_checkpoint().await.unwrap().unwrap();
    assert_eq!((checkpoint.size, checkpoint.root), (vault.head().leaves, root));
    assert!(checkpoint.verify(&[trail.verifying_key().unwrap()]).is_some());
}
