//! Changes of slots whose device takes its time.

use std::time::Duration;

use polykey_hsm::WrapError;

use super::*;
use crate::custody::device::{Device, Mode};

/// Far less than a device may take, far more than anything else needs.
const SOON: Duration = Duration::from_secs(10);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("it waits for the device")
}

fn spec(label: &str) -> SlotSpec {
    SlotSpec { label: label.into(), kind: "pkcs11".into(), source: "a device".into() }
}

/// A store with a slot `main` and a slot `device`.
async fn with_device(
    dir: &Path,
) -> (Arc<dyn Store>, Arc<Custody>, Arc<dyn KeyWrapper>, Arc<Device>) {
    let (main, slot) = master(dir, "main");
    let store = memory();
    let custody = init(Arc::clone(&store), &main, &slot).await;
    let device = Device::new();
    let wrapper: Arc<dyn KeyWrapper> = Arc::clone(&device) as _;
    custody.add_slot(wrapper, spec("device"), Terms::default(), event("AddSlot")).await.unwrap();
    (store, custody, main, device)
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_device_hangs_other_changes_are_made_and_its_own_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let (store, custody, main, device) = with_device(dir.path()).await;
    let keys = vec![create_key(custody.vault()).await.unwrap()];
    let both: Vec<Arc<dyn KeyWrapper>> = vec![Arc::clone(&main), Arc::clone(&device) as _];
    let before = custody.status().await.unwrap();

    device.set(Mode::Hangs);
    let asked = device.asked();
    let rotation = {
        let (custody, both) = (Arc::clone(&custody), both.clone());
        tokio::spawn(async move { custody.rotate_root(both, event("RotateRoot")).await })
    };
    device.asked_for(asked + 1).await;
    assert_eq!(soon(custody.status()).await.unwrap(), before);
    soon(custody.test_slot("main", &both)).await.unwrap();
    let (spare, spare_spec) = master(dir.path(), "spare");
    let added =
        custody.add_slot(Arc::clone(&spare), spare_spec, Terms::default(), event("AddSlot"));
    soon(added).await.unwrap();
    // `spare` opens, so that nobody waits for `device`.
    let removal = Removal {
        slot: "main".into(),
        wrappers: [both.clone(), vec![Arc::clone(&spare)]].concat(),
        terms: Terms::default(),
    };
    soon(custody.remove_slot(removal, event("RemoveSlot"))).await.unwrap();
    let status = custody.status().await.unwrap();
    let marked: Vec<_> = status.slots.iter().filter(|slot| slot.opened).collect();
    assert!(matches!(marked.as_slice(), [one] if one.label == "spare"), "{marked:?}");
    assert_eq!(status.root_id, before.root_id);

    // The rotation has no wrapper of the slot that came meanwhile, and says so; the next one has.
    device.set(Mode::Up);
    let refused = rotation.await.unwrap().unwrap_err();
    assert!(refused.to_string().contains("slot `spare`"), "{refused}");
    let wrappers = vec![Arc::clone(&device) as _, Arc::clone(&spare)];
    custody.rotate_root(wrappers, event("RotateRoot")).await.unwrap();
    assert_ne!(custody.status().await.unwrap().root_id, before.root_id);
    drop(custody);
    for wrapper in [&spare, &(Arc::clone(&device) as Arc<dyn KeyWrapper>)] {
        check(open(&store, &[wrapper]).await.unwrap().vault(), &keys).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_another_one_overtook_begins_again_or_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (store, custody, main, device) = with_device(dir.path()).await;
    for told in [false, true] {
        let expected = match told {
            true => Some(custody.status().await.unwrap().generation),
            false => None,
        };
        device.set(Mode::Hangs);
        let (asked, label) = (device.asked(), format!("again-{told}"));
        let terms = Terms { expected, remember: None };
        let adding = {
            let (custody, spec) = (Arc::clone(&custody), spec(&label));
            let wrapper: Arc<dyn KeyWrapper> = Arc::clone(&device) as _;
            tokio::spawn(
                async move { custody.add_slot(wrapper, spec, terms, event("AddSlot")).await },
            )
        };
        device.asked_for(asked + 1).await;
        let generation = custody.status().await.unwrap().generation;
        let elsewhere = format!("elsewhere-{label}");
        let event = event("RewrapSlot");
        let rewrap = custody.rewrap("main", Arc::clone(&main), "local-file", &elsewhere, event);
        soon(rewrap).await.unwrap();
        device.set(Mode::Up);
        let added = adding.await.unwrap();
        let status = custody.status().await.unwrap();
        let there = status.slots.iter().any(|slot| slot.label == label);
        match expected {
            None => {
                added.unwrap();
                assert_eq!((there, status.generation), (true, generation + 2));
            }
            Some(_) => {
                let refused = added.unwrap_err();
                assert!(matches!(refused, ChangeError::Store(Error::Conflict)), "{refused}");
                assert_eq!((there, status.generation), (false, generation + 1));
            }
        }
        // What was changed meanwhile is not lost.
        assert!(status.slots.iter().any(|slot| slot.source == elsewhere));
    }
    drop(custody);
    open(&store, &[&(device as Arc<dyn KeyWrapper>)]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_wrapper_that_hangs_hides_no_other_of_its_kind() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, custody, _, device) = with_device(dir.path()).await;
    let (_, other) = (device, Device::new());
    let own = Device::new();
    custody
        .add_slot(Arc::clone(&own) as _, spec("own"), Terms::default(), event("AddSlot"))
        .await
        .unwrap();
    other.set(Mode::Hangs);
    let wrappers: Vec<Arc<dyn KeyWrapper>> = vec![Arc::clone(&other) as _, Arc::clone(&own) as _];
    soon(custody.test_slot("own", &wrappers)).await.unwrap();
    // Without an answer the test says so.
    own.set(Mode::Fails(WrapError::Unavailable { retryable: true }));
    other.set(Mode::Up);
    let tested = custody.test_slot("own", &wrappers).await.unwrap_err();
    assert!(tested.to_string().contains("does not answer"), "{tested}");
}
