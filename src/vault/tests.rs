//! The sealed store under concurrency, faults and tampering.

use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;
use polykey_proto::polykey::record::v1::{AliasRecord, AuditLeaf, RoleRecord};
use polykey_storage::memory::Memory;
use polykey_storage::{Health, NoFinish, ReadError, Snapshot, all};

use super::faulty::{Dies, Faulty};
use super::*;

const NODE: [u8; 16] = [3; 16];

fn nobody() -> Arc<dyn Invalidate> {
    Arc::new(Vec::<Arc<dyn Invalidate>>::new())
}

fn clock() -> Clock {
    Clock::manual(Time::from_seconds(1_700_000_000))
}

fn event() -> AuditEvent {
    AuditEvent { action: "Test".into(), ..AuditEvent::default() }
}

async fn create(store: Arc<dyn Store>) -> (Arc<Vault>, Ring) {
    let ring = Ring::generate(NODE).unwrap();
    let vault = Vault::create(store, ring.clone(), NODE, vec![], nobody(), clock()).await.unwrap();
    (Arc::new(vault), ring)
}

async fn reopen(store: &Arc<dyn Store>, ring: &Ring) -> Result<Vault, Error> {
    Vault::open(Arc::clone(store), ring.clone(), NODE, nobody(), clock()).await
}

fn alias(text: &str) -> AliasRecord {
    AliasRecord { name: text.into(), ..AliasRecord::default() }
}

async fn write(vault: &Vault, key: &[u8], text: &str) -> Result<Receipt, Error> {
    let mut tx = vault.begin().await?;
    tx.get::<AliasRecord>(key).await?;
    tx.put(key, &alias(text))?;
    tx.event(event());
    tx.commit().await
}

async fn findings(vault: &Vault) -> Vec<String> {
    vault.verify(true, |_| ()).await.unwrap().findings
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_concurrent_changes_of_one_row_exactly_one_wins_each_revision() {
    let (vault, _) = create(Arc::new(Memory::new().unwrap())).await;
    write(&vault, b"row", "0").await.unwrap();
    let barrier = Arc::new(tokio::sync::Barrier::new(64));
    for round in 0..5 {
        let tasks: Vec<_> = (0..64)
            .map(|i| {
                let (vault, barrier) = (Arc::clone(&vault), Arc::clone(&barrier));
                tokio::spawn(async move {
                    let mut tx = vault.begin().await.unwrap();
                    tx.get::<AliasRecord>(b"row").await.unwrap().unwrap();
                    tx.put(b"row", &alias(&format!("{round}/{i}"))).unwrap();
                    tx.event(event());
                    barrier.wait().await;
                    (i, tx.commit().await)
                })
            })
            .collect();
        let mut won = Vec::new();
        for task in tasks {
            match task.await.unwrap() {
                (i, Ok(receipt)) => won.push((i, receipt)),
                (_, Err(Error::Conflict)) => {}
                (_, Err(error)) => panic!("{error:?}"),
            }
        }
        assert_eq!(won.len(), 1);
        let row = vault.get::<AliasRecord>(b"row").await.unwrap().unwrap();
        assert_eq!(row.record.name, format!("{round}/{}", won[0].0));
        assert_eq!(row.revision, won[0].1.revision);
    }
    assert_eq!(vault.head().leaves, 6, "losers leave no leaf");
    assert_eq!(findings(&vault).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn audit_leaves_are_contiguous_and_each_receipt_names_its_own() {
    let (vault, ring) = create(Arc::new(Memory::new().unwrap())).await;
    let tasks: Vec<_> = (0..100_u32)
        .map(|i| {
            let vault = Arc::clone(&vault);
            tokio::spawn(async move {
                let mut tx = vault.begin().await.unwrap();
                tx.insert(&i.to_be_bytes(), &alias("x")).unwrap();
                for part in 0..=i % 3 {
                    tx.event(AuditEvent { version: i, code: part as i32, ..event() });
                }
                (i, tx.commit().await.unwrap())
            })
        })
        .collect();
    let mut expected = std::collections::BTreeMap::new();
    for task in tasks {
        let (i, receipt) = task.await.unwrap();
        for part in 0..=i % 3 {
            assert!(expected.insert(receipt.leaf.unwrap() + u64::from(part), (i, part)).is_none());
        }
    }
    let leaves = vault.scan::<AuditLeaf>(all(), Direction::Forward, 1000).await.unwrap();
    assert_eq!(leaves.len(), expected.len());
    for (number, (key, leaf)) in leaves.iter().enumerate() {
        assert_eq!(key.as_slice(), (number as u64).to_be_bytes());
        let body: polykey_proto::polykey::record::v1::AuditBody =
            prost::Message::decode(leaf.record.body.clone()).unwrap();
        let (i, part) = expected[&(number as u64)];
        assert_eq!((body.events[0].version, body.events[0].code), (i, part as i32));
    }
    let head = vault.head();
    let store = Arc::clone(vault.store());
    drop(vault);
    let vault = reopen(&store, &ring).await.unwrap();
    assert_eq!((vault.head().leaves, vault.head().root), (head.leaves, head.root));
    assert_eq!(findings(&vault).await, Vec::<String>::new());
}

/// Remembers what it was told, and when: before or after the commit was answered.
#[derive(Default)]
struct Watch {
    told: Mutex<Vec<Vec<u8>>>,
    cleared: AtomicUsize,
}

impl Invalidate for Watch {
    fn invalidate(&self, rows: &[&RowKey]) {
        self.told.lock().extend(rows.iter().map(|row| row.key.clone()));
    }
    fn clear(&self) {
        self.cleared.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn caches_are_told_before_the_answer_and_cleared_after_a_failure() {
    for dies in [Dies::Before, Dies::After] {
        let watch = Arc::new(Watch::default());
        // Founding is the first commit and "a" the second.
        let inner: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
        let store = Arc::new(Faulty::new(inner, 2, dies, true));
        let ring = Ring::generate(NODE).unwrap();
        let caches: Arc<dyn Invalidate> = Arc::clone(&watch) as _;
        let vault = Vault::create(store, ring, NODE, vec![], caches, clock()).await.unwrap();
        write(&vault, b"a", "1").await.unwrap();
        assert!(watch.told.lock().contains(&b"a".to_vec()));
        assert_eq!(watch.cleared.load(Ordering::SeqCst), 0);

        let unknown = write(&vault, b"a", "2").await;
        assert!(matches!(unknown, Err(Error::OutcomeUnknown { .. })), "{unknown:?}");
        while !vault.writable() {
            tokio::task::yield_now().await;
        }
        assert_eq!(watch.cleared.load(Ordering::SeqCst), 1);
        let found = vault.get::<AliasRecord>(b"a").await.unwrap().unwrap().record.name;
        let (expected, leaves) = if dies == Dies::After { ("2", 2) } else { ("1", 1) };
        assert_eq!(found, expected);
        assert_eq!(vault.head().leaves, leaves, "the head is the one that is durable");
        write(&vault, b"a", "3").await.unwrap();
        assert_eq!(findings(&vault).await, Vec::<String>::new());
    }
}

async fn raw(store: &dyn Store, key: &[u8]) -> Vec<u8> {
    store.get(space::ALIASES, key).await.unwrap().unwrap().value.to_vec()
}

async fn overwrite(store: &dyn Store, space: Space, key: &[u8], value: Vec<u8>) {
    let commit = Commit::new().put(space, key, value);
    store.commit(vec![commit], &mut NoFinish).await.unwrap();
}

async fn is_lost(vault: &Vault, key: &[u8]) -> bool {
    matches!(vault.get::<AliasRecord>(key).await, Err(Error::DataLoss { .. }))
}

/// Verification finds something, and nothing is written after it.
async fn stops(vault: &Vault, what: &str) {
    assert!(!findings(vault).await.is_empty(), "{what}");
    assert!(matches!(write(vault, b"new", "x").await, Err(Error::DataLoss { .. })), "{what}");
    assert!(!vault.writable());
}

#[tokio::test]
async fn rows_that_are_swapped_moved_dropped_or_replayed_are_found_out() {
    let store: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    let (vault, ring) = create(Arc::clone(&store)).await;
    write(&vault, b"a", "old").await.unwrap();
    let old = raw(&*store, b"a").await;
    write(&vault, b"a", "new").await.unwrap();
    write(&vault, b"b", "other").await.unwrap();
    assert_eq!(findings(&vault).await, Vec::<String>::new());
    let (a, b) = (raw(&*store, b"a").await, raw(&*store, b"b").await);
    drop(vault);

    // Swapped: neither opens where it stands now.
    overwrite(&*store, space::ALIASES, b"a", b.clone()).await;
    overwrite(&*store, space::ALIASES, b"b", a.clone()).await;
    let vault = reopen(&store, &ring).await.unwrap();
    assert!(is_lost(&vault, b"a").await && is_lost(&vault, b"b").await);
    stops(&vault, "swapped").await;
    overwrite(&*store, space::ALIASES, b"b", b.clone()).await;

    // Replayed: it opens, because it was once true; the set of rows tells.
    overwrite(&*store, space::ALIASES, b"a", old).await;
    let vault = reopen(&store, &ring).await.unwrap();
    assert_eq!(vault.get::<AliasRecord>(b"a").await.unwrap().unwrap().record.name, "old");
    stops(&vault, "replayed").await;

    // Replayed and then written over: the set hash does not forget.
    let vault = reopen(&store, &ring).await.unwrap();
    write(&vault, b"a", "newer").await.unwrap();
    stops(&vault, "replayed and written over").await;

    // Dropped.
    overwrite(&*store, space::ALIASES, b"a", a.clone()).await;
    let commit = Commit::new().delete(space::ALIASES, *b"b");
    store.commit(vec![commit], &mut NoFinish).await.unwrap();
    let vault = reopen(&store, &ring).await.unwrap();
    stops(&vault, "dropped").await;

    // Moved to another kind of record, and an audit leaf replaced by another.
    overwrite(&*store, space::ROLES, b"b", b.clone()).await;
    let vault = reopen(&store, &ring).await.unwrap();
    assert!(matches!(vault.get::<RoleRecord>(b"b").await, Err(Error::DataLoss { .. })));
    stops(&vault, "moved").await;
    let leaf = store.get(space::AUDIT, &0_u64.to_be_bytes()).await.unwrap().unwrap().value;
    overwrite(&*store, space::AUDIT, &1_u64.to_be_bytes(), leaf.to_vec()).await;
    stops(&reopen(&store, &ring).await.unwrap(), "leaf").await;
}

#[tokio::test]
async fn every_flipped_bit_of_a_record_is_found_out() {
    let store: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    let (vault, ring) = create(Arc::clone(&store)).await;
    write(&vault, b"a", "value").await.unwrap();
    let value = raw(&*store, b"a").await;
    drop(vault);
    let vault = reopen(&store, &ring).await.unwrap();
    for at in 0..value.len() {
        for bit in 0..8 {
            let mut flipped = value.clone();
            flipped[at] ^= 1 << bit;
            overwrite(&*store, space::ALIASES, b"a", flipped).await;
            assert!(is_lost(&vault, b"a").await, "byte {at} bit {bit}");
        }
        let cut = value[..at].to_vec();
        overwrite(&*store, space::ALIASES, b"a", cut).await;
        assert!(is_lost(&vault, b"a").await, "cut at {at}");
    }
    // Its counter is the right one: this row is lost, and known to be; the others are as they were.
    assert_eq!(findings(&vault).await.len(), 1);
    assert_eq!(vault.damaged(), 1);
    write(&vault, b"other", "value").await.unwrap();
    assert!(is_lost(&vault, b"a").await);
    // An audit leaf: hash in the clear, salt and body sealed.
    overwrite(&*store, space::ALIASES, b"a", value).await;
    let key = 0_u64.to_be_bytes();
    let leaf = store.get(space::AUDIT, &key).await.unwrap().unwrap().value.to_vec();
    for at in 0..leaf.len() {
        let mut flipped = leaf.clone();
        flipped[at] ^= 0x10;
        overwrite(&*store, space::AUDIT, &key, flipped).await;
        stops(&reopen(&store, &ring).await.unwrap(), &format!("leaf byte {at}")).await;
    }
    overwrite(&*store, space::AUDIT, &key, leaf).await;
    assert_eq!(findings(&reopen(&store, &ring).await.unwrap()).await, Vec::<String>::new());
}

#[tokio::test]
async fn damage_is_counted_beyond_what_is_named() {
    let store: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    let (vault, ring) = create(Arc::clone(&store)).await;
    let names: Vec<[u8; 4]> = (0..1_200_u32).map(u32::to_be_bytes).collect();
    let mut tx = vault.begin().await.unwrap();
    for name in &names {
        tx.insert(name, &alias("value")).unwrap();
    }
    tx.commit().await.unwrap();
    for name in &names {
        let mut value = raw(&*store, name).await;
        *value.last_mut().unwrap() ^= 1;
        overwrite(&*store, space::ALIASES, name, value).await;
    }
    drop(vault);
    let vault = reopen(&store, &ring).await.unwrap();
    assert!(is_lost(&vault, &names[0]).await);
    assert_eq!(vault.damaged(), 1);
    let report = vault.verify(true, |_| ()).await.unwrap();
    assert_eq!((report.found, report.damaged, report.findings.len()), (1_200, 1_200, 100));
    assert_eq!(vault.damaged(), 1_200);
    // What is met again is not counted again.
    assert!(is_lost(&vault, &names[0]).await && is_lost(&vault, &names[1_199]).await);
    assert_eq!(vault.damaged(), 1_200);
    // One record that is damaged in two ways is one.
    for name in &names[1..] {
        store
            .commit(vec![Commit::new().delete(space::ALIASES, *name)], &mut NoFinish)
            .await
            .unwrap();
    }
    overwrite(&*store, space::ALIASES, &names[0], b"x".to_vec()).await;
    assert_eq!(reopen(&store, &ring).await.unwrap().verify(true, |_| ()).await.unwrap().damaged, 1);
}

/// A store whose reads fail until it is reopened, once told so.
struct Blind {
    inner: Arc<dyn Store>,
    blind: AtomicBool,
}

impl Store for Blind {
    fn snapshot(&self) -> futures::future::BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        Box::pin(async {
            if self.blind.load(Ordering::SeqCst) {
                return Err(ReadError::NeedsReopen);
            }
            self.inner.snapshot().await
        })
    }
    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn polykey_storage::Finish,
    ) -> futures::future::BoxFuture<
        'a,
        Result<polykey_storage::Committed, polykey_storage::CommitError>,
    > {
        Box::pin(async {
            if self.blind.load(Ordering::SeqCst) {
                return Err(polykey_storage::CommitError::ReadOnly);
            }
            self.inner.commit(group, finish).await
        })
    }
    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> futures::future::BoxFuture<
        '_,
        Result<polykey_storage::Changes, polykey_storage::ChangesError>,
    > {
        self.inner.changes(after, limit)
    }
    fn reopen(
        &self,
    ) -> futures::future::BoxFuture<'_, Result<Revision, polykey_storage::ReopenError>> {
        Box::pin(async {
            self.blind.store(false, Ordering::SeqCst);
            self.inner.reopen().await
        })
    }
    fn status(&self) -> polykey_storage::StoreStatus {
        let mut status = self.inner.status();
        if self.blind.load(Ordering::SeqCst) {
            let cause = StoreError::Other("injected".into());
            status.health = Health::NeedsReopen(cause);
        }
        status
    }
}

#[tokio::test]
async fn a_store_whose_reads_failed_is_reopened_though_nobody_commits() {
    let inner: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    let store = Arc::new(Blind { inner, blind: AtomicBool::new(false) });
    let (vault, _) = create(Arc::clone(&store) as _).await;
    write(&vault, b"row", "0").await.unwrap();
    for read in [true, false] {
        store.blind.store(true, Ordering::SeqCst);
        let failed = match read {
            true => vault.get::<AliasRecord>(b"row").await.is_err(),
            false => vault.begin().await.is_err(),
        };
        assert!(failed);
        let reopened = async {
            while store.blind.load(Ordering::SeqCst) || !vault.writable() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), reopened).await.unwrap();
        write(&vault, b"row", "1").await.unwrap();
    }
}
