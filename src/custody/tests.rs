//! Founding, opening, changing slots and root, resealing; with faults at every commit.

mod waiting;

use std::path::Path;

use polykey_hsm::recovery::{self, RecoveryKey, RecoveryWrapper};
use polykey_hsm::{
    Algorithm, BlobKey, GenerationParams, LocalWrapper, MasterKeySource, MaterialContext,
    generate_master_key, header,
};
use polykey_proto::polykey::record::v1::key_record::State as KeyState;
use polykey_proto::polykey::record::v1::{
    AliasRecord, AuditLeaf, KeyRecord, ListRow, VersionRecord,
};
use polykey_storage::memory::Memory;
use polykey_storage::redb::{Options, Redb};
use polykey_storage::{Commit, Direction, NoFinish, RowKey, Space, all};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::key::{KeyId, Version, version_row};
use crate::vault::faulty::{Dies, Faulty};
use crate::vault::space::{self, Record};

const FAST: Pace = Pace { batch: 16, look: 50, pause: Duration::ZERO };

fn nobody() -> Arc<dyn Invalidate> {
    Arc::new(Vec::<Arc<dyn Invalidate>>::new())
}

fn clock() -> Clock {
    Clock::manual(Time::from_seconds(1_700_000_000))
}

fn event(action: &str) -> AuditEvent {
    AuditEvent { action: action.into(), ..AuditEvent::default() }
}

/// A new master key in a file.
fn master(dir: &Path, name: &str) -> (Arc<dyn KeyWrapper>, SlotSpec) {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(name);
    std::fs::write(&path, generate_master_key().unwrap().as_bytes()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let source = MasterKeySource::File(path);
    (Arc::new(LocalWrapper::open(&source).unwrap()), SlotSpec::local(name, &source))
}

async fn init(
    store: Arc<dyn Store>,
    wrapper: &Arc<dyn KeyWrapper>,
    slot: &SlotSpec,
) -> Arc<Custody> {
    let (wrapper, slot) = (Arc::clone(wrapper), slot.clone());
    Custody::init(store, wrapper, slot, event("Init"), nobody(), clock()).await.unwrap()
}

async fn open(
    store: &Arc<dyn Store>,
    wrappers: &[&Arc<dyn KeyWrapper>],
) -> Result<Arc<Custody>, OpenError> {
    let wrappers: Vec<_> = wrappers.iter().map(|w| Arc::clone(w)).collect();
    Custody::open(Arc::clone(store), &wrappers, nobody(), clock()).await
}

fn memory() -> Arc<dyn Store> {
    Arc::new(Memory::new().unwrap())
}

fn context(vault: &Vault, id: KeyId) -> MaterialContext {
    MaterialContext {
        node: vault.node_id(),
        key_id: id.bytes(),
        version: 1,
        algorithm: Algorithm::Aes256,
        exportable: true,
    }
}

/// A key with one version; gives its id and its checksum, by which its material is known again.
async fn create_key(vault: &Vault) -> Result<(KeyId, String), Error> {
    let id = KeyId::mint(vault.clock().now());
    let generated =
        polykey_hsm::algorithm::generate(Algorithm::Aes256, GenerationParams::default()).unwrap();
    let blob_key = BlobKey::generate().unwrap();
    let checksum = polykey_hsm::key_checksum(&blob_key, &generated.material).unwrap();
    let ring = vault.ring();
    let material = ring.wrap_material(&context(vault, id), &generated.material, &blob_key).unwrap();
    let mut key = KeyRecord {
        key_id: id.bytes().to_vec().into(),
        algorithm: u32::from(Algorithm::Aes256.code()),
        exportable: true,
        primary_version: 1,
        latest_version: 1,
        ..KeyRecord::default()
    };
    key.set_state(KeyState::Enabled);
    let version = VersionRecord {
        key_id: id.bytes().to_vec().into(),
        version: 1,
        material: material.into(),
        checksum: checksum.clone(),
        ..VersionRecord::default()
    };
    let mut tx = vault.begin().await?;
    tx.insert(&id.bytes(), &key)?;
    tx.insert(&version_row(id, Version::FIRST), &version)?;
    let mut list = vault.row_name("test", "principal").to_vec();
    list.extend_from_slice(&id.bytes());
    tx.insert(&list, &ListRow::default())?;
    tx.event(event("CreateKey"));
    tx.commit().await?;
    Ok((id, checksum))
}

/// Every key's material opens and is what it was; the store is whole.
async fn check(vault: &Vault, keys: &[(KeyId, String)]) {
    let ring = vault.ring();
    for (id, checksum) in keys {
        let row = version_row(*id, Version::FIRST);
        let version = vault.get::<VersionRecord>(&row).await.unwrap().unwrap().record;
        let opened = ring.unwrap_material(&context(vault, *id), &version.material).unwrap();
        let found = polykey_hsm::key_checksum(&opened.blob_key, &opened.material).unwrap();
        assert_eq!(&found, checksum);
        assert_eq!(&version.checksum, checksum);
        vault.get::<KeyRecord>(&id.bytes()).await.unwrap().unwrap();
    }
    let report = vault.verify(true, |_| ()).await.unwrap();
    assert_eq!(report.findings, Vec::<String>::new());
}

/// The epochs of all sealed rows.
async fn epochs(store: &dyn Store) -> std::collections::BTreeSet<u32> {
    let mut found = std::collections::BTreeSet::new();
    for &space in space::ALL {
        for entry in store.scan(space, all(), Direction::Forward, usize::MAX).await.unwrap() {
            let row = RowKey::new(space, entry.key);
            if space::counted(&row) || row.key == meta::HEAD {
                let sealed = entry.value.get(space::clear_prefix(space)..).unwrap();
                found.insert(header(sealed).unwrap().epoch);
            }
        }
    }
    found
}

async fn raw(store: &dyn Store, space: Space, key: &[u8]) -> Vec<u8> {
    store.get(space, key).await.unwrap().unwrap().value.to_vec()
}

async fn overwrite(store: &dyn Store, space: Space, key: &[u8], value: Vec<u8>) {
    let commit = Commit::new().put(space, key, value);
    store.commit(vec![commit], &mut NoFinish).await.unwrap();
}

#[tokio::test]
async fn what_is_founded_opens_again_and_only_once_founded() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let store: Arc<dyn Store> =
        Arc::new(Redb::create(dir.path().join("store"), Options::default()).unwrap());
    assert!(matches!(open(&store, &[&wrapper]).await, Err(OpenError::NotInitialised)));
    let custody = init(Arc::clone(&store), &wrapper, &slot).await;
    let before = custody.status().await.unwrap();
    assert_eq!((before.generation, &*before.epochs), (1, &[1][..]));
    assert_eq!(before.slots.len(), 1);
    assert_eq!(custody.vault().head().leaves, 1, "the founding is audited");
    let again = Custody::init(
        Arc::clone(&store),
        Arc::clone(&wrapper),
        slot,
        event("Init"),
        nobody(),
        clock(),
    );
    assert!(matches!(again.await, Err(InitError::AlreadyInitialised)));
    let keys = vec![create_key(custody.vault()).await.unwrap()];
    drop(custody);
    store.reopen().await.unwrap();
    let custody = open(&store, &[&wrapper]).await.unwrap();
    assert_eq!(custody.status().await.unwrap(), before);
    check(custody.vault(), &keys).await;
}

#[tokio::test]
async fn a_wrong_master_key_is_named_by_slot_and_source_and_never_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let (other, _) = master(dir.path(), "other");
    let store = memory();
    init(Arc::clone(&store), &wrapper, &slot).await;
    for wrappers in [vec![], vec![&other]] {
        let error = open(&store, &wrappers).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, OpenError::NoSlotOpened(trials) if trials.len() == 1));
        assert!(text.contains("slot `main`") && text.contains(&slot.source), "{text}");
        let secret = std::fs::read_to_string(dir.path().join("main")).unwrap();
        assert!(!text.contains(secret.trim()));
    }
    open(&store, &[&other, &wrapper]).await.unwrap();
}

#[tokio::test]
async fn a_store_without_its_canary_or_of_a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let store = memory();
    init(Arc::clone(&store), &wrapper, &slot).await;
    let node = raw(&*store, META, meta::NODE).await;
    let mut newer = NodeRecord::decode(node.as_slice()).unwrap();
    newer.format = FORMAT + 1;
    overwrite(&*store, META, meta::NODE, newer.encode_to_vec()).await;
    let error = open(&store, &[&wrapper]).await.unwrap_err();
    assert!(matches!(error, OpenError::NewerFormat { .. }));
    assert!(error.to_string().contains("format 2") && error.to_string().contains("up to 1"));
    overwrite(&*store, META, meta::NODE, node).await;
    open(&store, &[&wrapper]).await.unwrap();

    let commit = Commit::new().delete(META, meta::CANARY);
    store.commit(vec![commit], &mut NoFinish).await.unwrap();
    assert!(matches!(open(&store, &[&wrapper]).await, Err(OpenError::Damaged(_))));
}

#[tokio::test]
async fn foreign_and_changed_slot_tables_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let (store, foreign) = (memory(), memory());
    init(Arc::clone(&store), &wrapper, &slot).await;
    init(Arc::clone(&foreign), &wrapper, &slot).await;
    let own = raw(&*store, META, meta::SLOTS).await;

    // The same master key, another node: its slots are bound to that node.
    let theirs = raw(&*foreign, META, meta::SLOTS).await;
    overwrite(&*store, META, meta::SLOTS, theirs).await;
    let error = open(&store, &[&wrapper]).await.unwrap_err();
    assert!(matches!(error, OpenError::NoSlotOpened(_)), "{error}");
    // Node and slots of another node: root and ring open, and nothing else.
    let node = raw(&*store, META, meta::NODE).await;
    overwrite(&*store, META, meta::NODE, raw(&*foreign, META, meta::NODE).await).await;
    let error = open(&store, &[&wrapper]).await.unwrap_err();
    assert!(matches!(error, OpenError::Damaged(_)), "{error}");
    overwrite(&*store, META, meta::NODE, node).await;

    // Any change of a slot shows, even of what the wrapper does not see.
    let mut table = SlotTable::decode(own.as_slice()).unwrap();
    table.slots[0].label = "mine".into();
    overwrite(&*store, META, meta::SLOTS, table.encode_to_vec()).await;
    let error = open(&store, &[&wrapper]).await.unwrap_err();
    assert!(matches!(error, OpenError::SlotsChanged { .. }), "{error}");
    // Flipped bits: never a panic, never an opened store.
    for at in (0..own.len()).step_by(7) {
        let mut flipped = own.clone();
        flipped[at] ^= 1 << (at % 8);
        overwrite(&*store, META, meta::SLOTS, flipped).await;
        assert!(open(&store, &[&wrapper]).await.is_err(), "byte {at}");
    }
    overwrite(&*store, META, meta::SLOTS, own).await;
    open(&store, &[&wrapper]).await.unwrap();
}

#[tokio::test]
async fn a_rewrapped_slot_opens_with_the_new_master_key_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (old, slot) = master(dir.path(), "main");
    let (new, spec) = master(dir.path(), "new");
    let (second, second_spec) = master(dir.path(), "second");
    let store = memory();
    let custody = init(Arc::clone(&store), &old, &slot).await;
    custody
        .add_slot(Arc::clone(&second), second_spec.clone(), Terms::default(), event("AddSlot"))
        .await
        .unwrap();
    let taken = custody
        .add_slot(Arc::clone(&second), second_spec, Terms::default(), event("AddSlot"))
        .await;
    assert!(matches!(taken, Err(ChangeError::LabelTaken(_))));
    let keys = vec![create_key(custody.vault()).await.unwrap()];
    let replaced = raw(&*store, META, meta::SLOTS).await;
    custody
        .rewrap("main", Arc::clone(&new), &spec.kind, &spec.source, event("RewrapSlot"))
        .await
        .unwrap();
    let status = custody.status().await.unwrap();
    assert_eq!(status.generation, 3);
    assert_eq!((&*status.slots[0].label, &status.slots[0].source), ("main", &spec.source));
    drop(custody);

    assert!(matches!(open(&store, &[&old]).await, Err(OpenError::NoSlotOpened(_))));
    for wrapper in [&new, &second] {
        let custody = open(&store, &[wrapper]).await.unwrap();
        check(custody.vault(), &keys).await;
    }
    // The table of before, put back: authentic, and not the one the canary names.
    let current = raw(&*store, META, meta::SLOTS).await;
    overwrite(&*store, META, meta::SLOTS, replaced).await;
    let error = open(&store, &[&old]).await.unwrap_err();
    assert!(matches!(error, OpenError::Replayed { found: 2, expected: 3 }), "{error}");
    overwrite(&*store, META, meta::SLOTS, current).await;

    let custody = open(&store, &[&second]).await.unwrap();
    let removal = |slot: &str, by: &[&Arc<dyn KeyWrapper>]| Removal {
        slot: slot.to_owned(),
        wrappers: by.iter().map(|wrapper| Arc::clone(wrapper)).collect(),
        terms: Terms::default(),
    };
    // What would stay is a slot that no wrapper of this node opens.
    let locked_out = custody.remove_slot(removal("second", &[&second]), event("RemoveSlot")).await;
    assert!(matches!(locked_out, Err(ChangeError::LastSlot(tried)) if tried.len() == 1));
    custody.remove_slot(removal("main", &[&second]), event("RemoveSlot")).await.unwrap();
    let last = custody.remove_slot(removal("second", &[&second]), event("RemoveSlot")).await;
    assert!(matches!(last, Err(ChangeError::LastSlot(tried)) if tried.is_empty()));
    let none = custody.remove_slot(removal("main", &[&second]), event("RemoveSlot")).await;
    assert!(matches!(none, Err(ChangeError::NoSuchSlot(_))));
    drop(custody);
    assert!(matches!(open(&store, &[&new]).await, Err(OpenError::NoSlotOpened(_))));
    check(open(&store, &[&second]).await.unwrap().vault(), &keys).await;
}

#[tokio::test]
async fn a_recovery_key_opens_what_no_node_can_and_survives_rotations() {
    let dir = tempfile::tempdir().unwrap();
    let (main, slot) = master(dir.path(), "main");
    let store = memory();
    let custody = init(Arc::clone(&store), &main, &slot).await;
    let keys = vec![create_key(custody.vault()).await.unwrap()];
    let private = RecoveryKey::generate().unwrap();
    let public = private.public().unwrap();
    let shares = recovery::split(&private, 2, 3).unwrap();
    drop(private);
    let node: Arc<dyn KeyWrapper> = Arc::new(RecoveryWrapper::to(public).unwrap());
    let spec = SlotSpec::recovery("shares", &public);
    custody.add_slot(Arc::clone(&node), spec, Terms::default(), event("AddSlot")).await.unwrap();
    let before = raw(&*store, META, meta::SLOTS).await;

    // It does not count as what opens the store, and a test of it says why.
    let removal = Removal {
        slot: "main".into(),
        wrappers: vec![Arc::clone(&main), Arc::clone(&node)],
        terms: Terms::default(),
    };
    let last = custody.remove_slot(removal, event("RemoveSlot")).await.unwrap_err();
    assert!(last.to_string().contains("polykey recover"), "{last}");
    let tested = custody.test_slot("shares", &[Arc::clone(&main), node]).await.unwrap_err();
    assert!(tested.to_string().contains("polykey recover"), "{tested}");
    custody.test_slot("main", &[Arc::clone(&main)]).await.unwrap();

    // A new root is wrapped for it without anybody's help.
    custody.rotate_root(vec![Arc::clone(&main)], event("RotateRoot")).await.unwrap();
    drop(custody);
    let none = open(&store, &[]).await.unwrap_err();
    assert!(none.to_string().contains("polykey recover"), "{none}");
    let key = || recovery::combine(&shares[1..]).unwrap();
    let recovering = || -> Arc<dyn KeyWrapper> { Arc::new(RecoveryWrapper::with(key()).unwrap()) };
    let custody = open(&store, &[&recovering()]).await.unwrap();
    check(custody.vault(), &keys).await;
    custody.test_slot("shares", &[recovering()]).await.unwrap();
    drop(custody);
    // The old root's slots give the old root, which opens nothing that is there now.
    overwrite(&*store, META, meta::SLOTS, before).await;
    assert!(open(&store, &[&recovering()]).await.is_err());
}

#[tokio::test]
async fn table_and_canary_of_before_are_found_by_verification() {
    let dir = tempfile::tempdir().unwrap();
    let (old, slot) = master(dir.path(), "main");
    let (new, spec) = master(dir.path(), "new");
    let store = memory();
    let custody = init(Arc::clone(&store), &old, &slot).await;
    let slots = raw(&*store, META, meta::SLOTS).await;
    let canary = raw(&*store, META, meta::CANARY).await;
    custody.rewrap("main", new, &spec.kind, &spec.source, event("RewrapSlot")).await.unwrap();
    drop(custody);
    overwrite(&*store, META, meta::SLOTS, slots).await;
    overwrite(&*store, META, meta::CANARY, canary).await;
    let custody = open(&store, &[&old]).await.unwrap();
    let report = custody.vault().verify(false, |_| ()).await.unwrap();
    assert!(!report.findings.is_empty());
    assert!(matches!(create_key(custody.vault()).await, Err(Error::DataLoss { .. })));
}

#[tokio::test]
async fn rotation_needs_every_wrapper_and_leaves_the_old_root_with_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (first, slot) = master(dir.path(), "first");
    let (second, second_spec) = master(dir.path(), "second");
    let store: Arc<dyn Store> =
        Arc::new(Redb::create(dir.path().join("store"), Options::default()).unwrap());
    let custody = init(Arc::clone(&store), &first, &slot).await;
    custody
        .add_slot(Arc::clone(&second), second_spec, Terms::default(), event("AddSlot"))
        .await
        .unwrap();
    let mut keys = Vec::new();
    for _ in 0..500 {
        keys.push(create_key(custody.vault()).await.unwrap());
    }
    let before = custody.status().await.unwrap();
    let old_table = SlotTable::decode(&*raw(&*store, META, meta::SLOTS).await).unwrap();
    let (old_root, _) =
        slots::open_any(&old_table, &[Arc::clone(&first)], before.node_id).await.unwrap();

    let missing = custody.rotate_root(vec![Arc::clone(&first)], event("RotateRoot")).await;
    let text = missing.unwrap_err().to_string();
    assert!(text.contains("slot `second`"), "{text}");
    assert_eq!(custody.status().await.unwrap(), before, "nothing has changed");

    let both = vec![Arc::clone(&second), Arc::clone(&first)];
    custody.rotate_root(both, event("RotateRoot")).await.unwrap();
    let rotated = custody.status().await.unwrap();
    assert_ne!(rotated.root_id, before.root_id);
    assert_eq!(rotated.epochs, [1, 2]);
    assert_eq!(rotated.slots, before.slots);
    check(custody.vault(), &keys).await;
    keys.push(create_key(custody.vault()).await.unwrap());

    let hashes = leaf_hashes(&*store).await;
    custody.reseal(FAST).await.unwrap();
    let done = custody.status().await.unwrap();
    assert_eq!(done.epochs, [2]);
    let reseal = done.reseal.unwrap();
    assert!(reseal.resealed >= 2_000 && reseal.finished_at.is_some(), "{reseal:?}");
    assert_eq!(epochs(&*store).await, [2].into());
    let now = leaf_hashes(&*store).await;
    assert_eq!(now[..hashes.len()], hashes, "resealing leaves leaf hashes as they are");
    check(custody.vault(), &keys).await;
    drop(custody);

    // Who holds the old root and an old copy of the table opens nothing that is there now.
    let old_ring = Ring::open(&old_root, &old_table.ring).unwrap();
    let new_table = SlotTable::decode(&*raw(&*store, META, meta::SLOTS).await).unwrap();
    assert!(Ring::open(&old_root, &new_table.ring).is_err());
    assert_eq!(old_ring.epochs(), [1]);
    // The old table, put back, does not open the store.
    overwrite(&*store, META, meta::SLOTS, old_table.encode_to_vec()).await;
    assert!(matches!(open(&store, &[&first]).await, Err(OpenError::Damaged(_))));
    overwrite(&*store, META, meta::SLOTS, new_table.encode_to_vec()).await;
    for wrapper in [&first, &second] {
        check(open(&store, &[wrapper]).await.unwrap().vault(), &keys).await;
    }
}

async fn leaf_hashes(store: &dyn Store) -> Vec<Vec<u8>> {
    let rows = store.scan(AuditLeaf::SPACE, all(), Direction::Forward, usize::MAX).await.unwrap();
    rows.iter().map(|entry| entry.value[..32].to_vec()).collect()
}

/// Rotates and reseals until it works or the medium has died.
async fn rotate_and_reseal(custody: &Arc<Custody>, wrapper: &Arc<dyn KeyWrapper>) -> bool {
    let rotated = custody.rotate_root(vec![Arc::clone(wrapper)], event("RotateRoot"));
    tokio::select! {
        // A medium that stays away would be waited for.
        result = async {
            rotated.await.is_ok() && custody.reseal(FAST).await.is_ok()
        } => result,
        () = async {
            while custody.vault().writable() {
                tokio::task::yield_now().await;
            }
        } => false,
    }
}

#[tokio::test]
async fn a_crash_at_any_commit_of_rotation_and_resealing_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let mut total = u64::MAX;
    for dies in [Dies::Before, Dies::After] {
        let mut last = 0;
        while last <= total {
            let path = dir.path().join(format!("store-{dies:?}-{last}"));
            let file: Arc<dyn Store> = Arc::new(Redb::create(&path, Options::default()).unwrap());
            let custody = init(Arc::clone(&file), &wrapper, &slot).await;
            let mut keys = Vec::new();
            for _ in 0..20 {
                keys.push(create_key(custody.vault()).await.unwrap());
            }
            drop(custody);
            let failing = Arc::new(Faulty::new(Arc::clone(&file), last, dies, false));
            let store: Arc<dyn Store> = Arc::clone(&failing) as _;
            let custody = open(&store, &[&wrapper]).await.unwrap();
            let finished = rotate_and_reseal(&custody, &wrapper).await;
            if finished {
                total = failing.commits();
            }
            drop((custody, store));

            file.reopen().await.unwrap();
            let custody = open(&file, &[&wrapper])
                .await
                .unwrap_or_else(|e| panic!("{dies:?} after {last}: {e}"));
            check(custody.vault(), &keys).await;
            keys.push(create_key(custody.vault()).await.unwrap());
            // What was begun resumes; what was not begun can be.
            if custody.vault().ring().epochs() == [1] {
                assert!(last == 0, "{dies:?} after {last}");
                assert!(rotate_and_reseal(&custody, &wrapper).await);
            } else {
                custody.reseal(FAST).await.unwrap();
            }
            assert_eq!(custody.status().await.unwrap().epochs, [2]);
            assert_eq!(epochs(&*file).await, [2].into());
            check(custody.vault(), &keys).await;
            last += 1;
        }
        assert!(total > 5 && total < 100, "{total} commits");
    }
}

#[tokio::test]
async fn a_change_whose_outcome_was_unknown_is_known_when_the_medium_is_back() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    for (dies, rotated) in [(Dies::Before, false), (Dies::After, true)] {
        let inner = memory();
        drop(init(Arc::clone(&inner), &wrapper, &slot).await);
        let store: Arc<dyn Store> = Arc::new(Faulty::new(inner, 0, dies, true));
        let custody = open(&store, &[&wrapper]).await.unwrap();
        let result = custody.rotate_root(vec![Arc::clone(&wrapper)], event("RotateRoot")).await;
        assert_eq!(result.is_ok(), rotated, "{dies:?} {result:?}");
        assert_eq!(custody.vault().ring().epochs().len(), if rotated { 2 } else { 1 });
        let keys = vec![create_key(custody.vault()).await.unwrap()];
        custody.rotate_root(vec![Arc::clone(&wrapper)], event("RotateRoot")).await.unwrap();
        custody.reseal(FAST).await.unwrap();
        check(custody.vault(), &keys).await;
        drop(custody);
        check(open(&store, &[&wrapper]).await.unwrap().vault(), &keys).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_during_rotation_and_resealing_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let store = memory();
    let custody = init(Arc::clone(&store), &wrapper, &slot).await;
    let vault = Arc::clone(custody.vault());
    let mut tx = vault.begin().await.unwrap();
    tx.insert(b"counter", &AliasRecord::default()).unwrap();
    tx.commit().await.unwrap();
    let stop = CancellationToken::new();
    let writers: Vec<_> = (0..4)
        .map(|_| {
            let (vault, stop) = (Arc::clone(&vault), stop.clone());
            tokio::spawn(async move {
                let (mut keys, mut counted) = (Vec::new(), 0_i64);
                while !stop.is_cancelled() {
                    match create_key(&vault).await {
                        Ok(key) => keys.push(key),
                        Err(Error::Conflict) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                    let mut tx = vault.begin().await.unwrap();
                    let mut row = tx.get::<AliasRecord>(b"counter").await.unwrap().unwrap().record;
                    row.created_at += 1;
                    tx.put(b"counter", &row).unwrap();
                    match tx.commit().await {
                        Ok(_) => counted += 1,
                        Err(Error::Conflict) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                }
                (keys, counted)
            })
        })
        .collect();
    for round in 2..5 {
        custody.rotate_root(vec![Arc::clone(&wrapper)], event("RotateRoot")).await.unwrap();
        custody.reseal(FAST).await.unwrap();
        assert_eq!(vault.ring().epochs(), [round]);
    }
    stop.cancel();
    let (mut keys, mut counted) = (Vec::new(), 0);
    for writer in writers {
        let (its_keys, its_count) = writer.await.unwrap();
        keys.extend(its_keys);
        counted += its_count;
    }
    assert!(!keys.is_empty() && counted > 0);
    let counter = vault.get::<AliasRecord>(b"counter").await.unwrap().unwrap().record;
    assert_eq!(counter.created_at, counted);
    assert_eq!(epochs(&*store).await, [4].into());
    check(&vault, &keys).await;
}

#[tokio::test]
async fn what_was_sealed_or_wrapped_before_a_rotation_does_not_outlive_it() {
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let store = memory();
    let custody = init(Arc::clone(&store), &wrapper, &slot).await;
    let vault = custody.vault();
    let mut late = vault.begin().await.unwrap();
    late.insert(b"late", &AliasRecord::default()).unwrap();
    // Only the material is of before; its row is sealed afterwards.
    let id = KeyId::mint(vault.clock().now());
    let generated =
        polykey_hsm::algorithm::generate(Algorithm::Aes256, GenerationParams::default()).unwrap();
    let blob_key = BlobKey::generate().unwrap();
    let material =
        vault.ring().wrap_material(&context(vault, id), &generated.material, &blob_key).unwrap();

    custody.rotate_root(vec![Arc::clone(&wrapper)], event("RotateRoot")).await.unwrap();
    custody.reseal(FAST).await.unwrap();
    assert!(matches!(late.commit().await, Err(Error::Conflict)));
    let mut tx = vault.begin().await.unwrap();
    let version = VersionRecord { material: material.into(), ..VersionRecord::default() };
    tx.insert(&version_row(id, Version::FIRST), &version).unwrap();
    assert!(matches!(tx.commit().await, Err(Error::Conflict)));
    check(vault, &[]).await;
}

#[tokio::test]
async fn signing_keys_roll_over_and_old_ones_verify_for_a_while() {
    use super::signing::{self, Purpose};
    let dir = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(dir.path(), "main");
    let custody = init(memory(), &wrapper, &slot).await;
    let vault = custody.vault();
    let first = signing::ensure(vault, Purpose::Token, event("EnsureKey")).await.unwrap();
    let same = signing::ensure(vault, Purpose::Token, event("EnsureKey")).await.unwrap();
    assert_eq!(first.id(), same.id());
    assert_eq!(&first.secret()[32..], first.public());
    let signature = first.sign(b"message").unwrap();
    assert!(first.verify(b"message", &signature) && !first.verify(b"massage", &signature));
    let note = signing::ensure(vault, Purpose::Checkpoint, event("EnsureKey")).await.unwrap();
    assert_ne!(note.public(), first.public());
    assert!(!note.verify(b"message", &signature));

    let hour = Duration::from_secs(3600);
    vault.clock().advance(hour);
    let second = signing::roll_over(vault, Purpose::Token, hour, event("RollOver")).await.unwrap();
    let now = vault.clock().now();
    let keys = signing::list(vault, Purpose::Token).await.unwrap();
    assert_eq!(
        keys.iter().map(signing::SigningKey::id).collect::<Vec<_>>(),
        [second.id(), first.id()]
    );
    assert!(keys[0].signs(now) && !keys[1].signs(now) && keys[1].verifies(now));
    assert!(!keys[1].verifies(now.plus(hour)) && keys[0].verifies(now.plus(hour)));
    assert!(signing::list(vault, Purpose::Checkpoint).await.unwrap()[0].signs(now));

    let seed = [7_u8; 32];
    let token = Purpose::Token;
    let imported = signing::import(vault, token, &seed, hour, event("Import")).await.unwrap();
    let pair = *imported.secret();
    let twice = signing::import(vault, token, &pair, hour, event("Import")).await;
    assert!(matches!(twice, Err(Error::Conflict)));
    let mut wrong = pair;
    wrong[40] ^= 1;
    for bad in [&wrong[..], &seed[..31], &[]] {
        let refused = signing::import(vault, token, bad, hour, event("Import")).await;
        assert!(matches!(refused, Err(Error::Invalid(_))));
    }
    custody.rotate_root(vec![wrapper], event("RotateRoot")).await.unwrap();
    custody.reseal(FAST).await.unwrap();
    let kept = signing::ensure(custody.vault(), token, event("EnsureKey")).await.unwrap();
    assert_eq!(kept.secret(), &pair);
}
