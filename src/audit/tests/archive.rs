//! Archives: what is refused, what stays provable, and that a leaf is archived by nobody else.

use std::sync::Arc;
use std::time::Duration;

use polykey_storage::{Direction, Revision, all};

use super::{Key, event, id, in_memory, make, quick, start};
use crate::audit::proof::{consistency, inclusion, verify_consistency, verify_inclusion};
use crate::audit::read::{Filter, Order};
use crate::audit::{Claim, Had, Outcome, Trail, verify_store};
use crate::error::Error;
use crate::vault::space;
use crate::vault::tree::Hash;

fn claim(first: u64, end: u64, root: Hash) -> Claim {
    let (file, host) = ("/archive/1".to_owned(), "here".to_owned());
    Claim { first, end, root, file, host, sha256: [3; 32] }
}

async fn fill(trail: &Trail, numbers: std::ops::Range<u64>) {
    for n in numbers {
        trail.record(event(n, Some(id(1)), "RotateKey", Outcome::Success)).await.unwrap();
    }
}

fn field(error: Error) -> String {
    match error {
        Error::Invalid(violations) => violations[0].field.clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn hashes_stay_and_so_does_every_proof() {
    let vault = in_memory().await;
    let trail = Arc::new(start(&vault, quick()).await);
    make(&vault, id(1)).await;
    fill(&trail, 1..20).await;
    let older = trail.checkpoint().await.unwrap().unwrap();
    fill(&trail, 20..33).await;
    let newer = trail.checkpoint().await.unwrap().unwrap();
    let had = Had::default();

    // As far as everybody has it, up to a checkpoint, and no younger than asked.
    let may = async |had: &Had, most, before| {
        trail.archivable(had, most, before).await.unwrap().map(|checkpoint| checkpoint.size)
    };
    assert_eq!(may(&had, None, None).await, Some(newer.size));
    assert_eq!(may(&had, Some(newer.size - 1), None).await, Some(older.size));
    assert_eq!(may(&had, Some(older.size - 1), None).await, None);
    assert_eq!(may(&had, None, Some(older.time)).await, None);
    let late = newer.time.plus(Duration::from_secs(1));
    assert_eq!(may(&had, None, Some(late)).await, Some(newer.size));
    let lagging = Had { least: Some(("disk".into(), newer.size - 1)), shipped: None };
    assert_eq!(may(&lagging, None, None).await, Some(older.size));
    let unshipped = Had { least: None, shipped: Some(Revision(1)) };
    assert_eq!(may(&unshipped, None, None).await, None);

    // What is not so is refused, and nothing is gone.
    for (wrong, had, named) in [
        (claim(1, older.size, older.root), &had, "archive.first_index"),
        (claim(0, older.size - 1, older.root), &had, "archive.end_index"),
        (claim(0, newer.size + 1, newer.root), &had, "archive.end_index"),
        (claim(0, 0, newer.root), &had, "archive.end_index"),
        (claim(0, older.size, newer.root), &had, "archive.root_hash"),
        (claim(0, newer.size, newer.root), &lagging, "archive.end_index"),
        (claim(0, older.size, older.root), &unshipped, "archive.end_index"),
    ] {
        let note = event(99, None, "ArchiveAudit", Outcome::Success);
        assert_eq!(field(trail.archive(wrong, had, note).await.unwrap_err()), named);
    }
    assert!(trail.archives().await.unwrap().is_empty());

    let note = || event(100, None, "ArchiveAudit", Outcome::Success);
    let first = claim(0, older.size, older.root);
    let archive = trail.archive(first.clone(), &had, note()).await.unwrap();
    assert_eq!((archive.end, archive.log.root()), (older.size, older.root));
    // Said again, it is the same one; and the next begins where it ends.
    let leaves = vault.leaves();
    assert_eq!(trail.archive(first, &had, note()).await.unwrap(), archive);
    assert_eq!(vault.leaves(), leaves);
    let next = claim(older.size, newer.size, newer.root);
    trail.archive(next, &had, note()).await.unwrap();
    assert_eq!(trail.kept().await.unwrap().0, newer.size);

    fill(&trail, 33..40).await;
    let now = trail.checkpoint().await.unwrap().unwrap();
    let store = &**vault.store();
    let rows = store.scan(space::AUDIT, all(), Direction::Forward, usize::MAX).await.unwrap();
    assert_eq!(rows.len() as u64, now.size);
    for (index, row) in (0..).zip(&rows) {
        let hash = row.value.first_chunk::<32>().unwrap();
        let proof = inclusion(store, index, now.size).await.unwrap();
        assert!(verify_inclusion(hash, index, now.size, &proof, &now.root), "{index}");
        assert_eq!(row.value.len() < 100, index < newer.size, "{index}");
    }
    for old in [&older, &newer] {
        let proof = consistency(store, old.size, now.size).await.unwrap();
        assert!(verify_consistency(old.size, now.size, &proof, &old.root, &now.root));
    }
    let keys = [Key::new(1).verifying()];
    let report = verify_store(&vault, &keys, &[older.clone(), newer.clone()]).await.unwrap();
    assert!(report.ok() && report.covered == now.size, "{report:?}");
    assert!(report.notes.iter().any(|note| note.contains("are in archives")), "{report:?}");
    let rows = vault.verify(true, |_| {}).await.unwrap();
    assert!(rows.findings.is_empty(), "{:?}", rows.findings);

    // Lists go back as far as the store, and name what has the rest.
    for order in [Order::NewestFirst, Order::OldestFirst] {
        let page = trail.list(&Filter::default(), order, 0, 1000, "").await.unwrap();
        assert!(page.events.iter().all(|entry| entry.index >= newer.size));
        let named: Vec<(u64, u64)> = page.archives.iter().map(|a| (a.first, a.end)).collect();
        assert_eq!(named, [(0, older.size), (older.size, newer.size)], "{order:?}");
    }
    let since = Filter { since: Some(late), ..Filter::default() };
    let page = trail.list(&since, Order::NewestFirst, 0, 1000, "").await.unwrap();
    assert!(page.archives.is_empty());
    let page = trail.history(&id(1), 1000, "").await.unwrap();
    assert!(page.events.iter().all(|entry| entry.index >= newer.size));
    assert!(!page.events.is_empty() && page.next.is_empty());
}

#[tokio::test]
async fn a_leaf_that_no_archive_has_is_missed() {
    let vault = in_memory().await;
    let trail = Arc::new(start(&vault, quick()).await);
    make(&vault, id(1)).await;
    fill(&trail, 1..9).await;
    trail.checkpoint().await.unwrap();
    vault.trim_leaves(2..3, 1).await.unwrap();
    let report = verify_store(&vault, &[Key::new(1).verifying()], &[]).await.unwrap();
    assert_eq!(report.findings, ["leaf 2 is archived, and no archive has it"]);
    let listed = trail.list(&Filter::default(), Order::NewestFirst, 0, 1000, "").await;
    assert!(matches!(listed, Err(Error::DataLoss { .. })), "{listed:?}");
}
