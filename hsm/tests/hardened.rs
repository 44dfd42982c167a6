//! Hardened material: nothing without the wrapper, everything that is not secret without asking it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::executor::block_on;
use polykey_hsm::{
    Algorithm, BlobKey, BoxFuture, Deadline, HardenedBlobKey, KeyMaterial, KeyWrapper,
    LocalWrapper, MasterKeySource, MaterialContext, MaterialState, OpenError, Ring, RootKey,
    SlotKind, UnwrapMaterialError, WrapContext, WrapError, WrappedBlob, WrappedKey, WrapperId,
    generate_master_key,
};

const NODE: [u8; 16] = [0x0a; 16];
const VERSION: MaterialContext = MaterialContext {
    node: NODE,
    key_id: [0x0b; 16],
    version: 2,
    algorithm: Algorithm::ApiKey,
    exportable: true,
};
const SECRET: &[u8] = b"the secret of a hardened version";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// Stands for a device: the real wrapper over a key file, and how often it was asked.
struct Counted {
    inner: LocalWrapper,
    asked: AtomicUsize,
}

impl Counted {
    fn of(key: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, key).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let inner = LocalWrapper::open(&MasterKeySource::File(path)).unwrap();
        Self { inner, asked: AtomicUsize::new(0) }
    }

    fn new() -> Self {
        Self::of(generate_master_key().unwrap().as_bytes())
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl KeyWrapper for Counted {
    fn id(&self) -> &WrapperId {
        self.inner.id()
    }
    fn kind(&self) -> SlotKind {
        self.inner.kind()
    }
    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.inner.wrap_key(key, cx, deadline)
    }
    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.inner.unwrap_key(wrapped, cx, deadline)
    }
}

fn secret() -> KeyMaterial {
    KeyMaterial::from_secret(SECRET.to_vec()).unwrap()
}

/// What is stored, and the blob in it.
fn harden(ring: &Ring, wrapper: &Counted) -> (Vec<u8>, Vec<u8>) {
    let key =
        block_on(HardenedBlobKey::make(wrapper, VERSION.node, VERSION.key_id, soon())).unwrap();
    ring.harden_material(&VERSION, &secret(), &key).unwrap()
}

fn opened(ring: &Ring, wrapper: &dyn KeyWrapper, stored: &[u8]) -> Result<Vec<u8>, WrapError> {
    let hardened = ring.hardened_material(&VERSION, stored).unwrap();
    let key = block_on(hardened.open(wrapper, &VERSION, soon()))?;
    Ok(VERSION.open_blob(&key, &hardened.blob).unwrap().expose_for_export().to_vec())
}

#[test]
fn the_material_comes_back_by_one_call_and_never_without_the_wrapper() {
    let (ring, wrapper) = (Ring::generate(NODE).unwrap(), Counted::new());
    let (stored, blob) = harden(&ring, &wrapper);
    assert_eq!(wrapper.asked(), 2, "wrapped, and opened once to be sure");
    assert_eq!(MaterialState::decode(&stored).unwrap(), MaterialState::Hardened { epoch: 1 });
    // The ring gives what clients hold, and not the key.
    let hardened = ring.hardened_material(&VERSION, &stored).unwrap();
    assert_eq!(hardened.blob, blob);
    assert_eq!(WrappedBlob::header(&blob).unwrap().version, 2);
    let refused = ring.unwrap_material(&VERSION, &stored).unwrap_err();
    assert_eq!(refused, UnwrapMaterialError::OtherState);
    for bytes in [&stored[..], &blob, &hardened.wrapped.encode()] {
        assert!(!bytes.windows(8).any(|w| w == &SECRET[..8]));
    }
    assert_eq!(wrapper.asked(), 2);
    assert_eq!(opened(&ring, &wrapper, &stored).unwrap(), SECRET);
    assert_eq!(wrapper.asked(), 3);
    // Another device, or none that made it.
    assert!(opened(&ring, &Counted::new(), &stored).is_err());
}

#[test]
fn a_rotation_moves_it_without_a_call() {
    let (mut ring, wrapper) = (Ring::generate(NODE).unwrap(), Counted::new());
    let (stored, blob) = harden(&ring, &wrapper);
    let before = wrapper.asked();
    ring.add_epoch().unwrap();
    let moved = ring.rewrap_material(&VERSION, &stored).unwrap();
    assert_eq!(MaterialState::decode(&moved).unwrap(), MaterialState::Hardened { epoch: 2 });
    ring.retire_epoch(1).unwrap();
    assert!(ring.hardened_material(&VERSION, &stored).is_err());
    assert_eq!(ring.hardened_material(&VERSION, &moved).unwrap().blob, blob);
    assert_eq!(wrapper.asked(), before);
    assert_eq!(opened(&ring, &wrapper, &moved).unwrap(), SECRET);
}

#[test]
fn it_opens_only_where_it_was_made_and_shows_every_change() {
    let (ring, wrapper) = (Ring::generate(NODE).unwrap(), Counted::new());
    let (stored, _) = harden(&ring, &wrapper);
    for (what, other) in [
        ("node", MaterialContext { node: [1; 16], ..VERSION }),
        ("key", MaterialContext { key_id: [1; 16], ..VERSION }),
        ("version", MaterialContext { version: 3, ..VERSION }),
        ("algorithm", MaterialContext { algorithm: Algorithm::Aes256, ..VERSION }),
        ("exportable", MaterialContext { exportable: false, ..VERSION }),
    ] {
        let refused = ring.hardened_material(&other, &stored).unwrap_err();
        assert_eq!(refused, UnwrapMaterialError::Open(OpenError::Broken), "{what}");
    }
    for bit in 0..stored.len() * 8 {
        let mut changed = stored.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(ring.hardened_material(&VERSION, &changed).is_err(), "bit {bit}");
    }
    for len in 0..stored.len() {
        assert!(ring.hardened_material(&VERSION, &stored[..len]).is_err(), "cut to {len}");
    }
    // The states do not stand in for one another.
    let mut as_wrapped = stored.clone();
    as_wrapped[1] = 1;
    let refused = ring.unwrap_material(&VERSION, &as_wrapped).unwrap_err();
    assert_eq!(refused, UnwrapMaterialError::Open(OpenError::Broken));
}

/// Whoever has the root key can write envelopes; the wrapper's binding is then what is left.
#[test]
fn a_blob_key_serves_no_other_key_and_no_other_blob() {
    let (ring, wrapper) = (Ring::generate(NODE).unwrap(), Counted::new());
    let make = |key_id| block_on(HardenedBlobKey::make(&wrapper, NODE, key_id, soon())).unwrap();
    let stranger = make([0x0c; 16]);
    assert!(ring.harden_material(&VERSION, &secret(), &stranger).is_err());
    let other = MaterialContext { key_id: [0x0c; 16], ..VERSION };
    let (moved, _) = ring.harden_material(&other, &secret(), &stranger).unwrap();
    let theirs = ring.hardened_material(&other, &moved).unwrap();
    let (stored, _) = harden(&ring, &wrapper);
    let ours = ring.hardened_material(&VERSION, &stored).unwrap();
    let mixed = polykey_hsm::HardenedMaterial { wrapped: theirs.wrapped, blob: ours.blob.clone() };
    let refused = block_on(mixed.open(&wrapper, &VERSION, soon())).unwrap_err();
    assert_eq!(refused, WrapError::Broken, "bound to its key");
    let (again, _) = harden(&ring, &wrapper);
    let again = ring.hardened_material(&VERSION, &again).unwrap();
    let mixed = polykey_hsm::HardenedMaterial { wrapped: again.wrapped, blob: ours.blob };
    let refused = block_on(mixed.open(&wrapper, &VERSION, soon())).unwrap_err();
    assert_eq!(refused, WrapError::Broken, "the key of another blob");
}

/// A device that gives something else than it was given.
struct Forgetful(Counted);

impl KeyWrapper for Forgetful {
    fn id(&self) -> &WrapperId {
        self.0.id()
    }
    fn kind(&self) -> SlotKind {
        self.0.kind()
    }
    fn wrap_key<'a>(
        &'a self,
        _: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(async move {
            let other = KeyMaterial::from_secret(vec![9; 32]).unwrap();
            self.0.wrap_key(&other, cx, deadline).await
        })
    }
    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        self.0.unwrap_key(wrapped, cx, deadline)
    }
}

#[test]
fn what_does_not_open_again_is_not_kept() {
    let made = block_on(HardenedBlobKey::make(&Forgetful(Counted::new()), NODE, [1; 16], soon()));
    assert_eq!(made.unwrap_err(), WrapError::Broken);
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/hardened-v1")
}

const ROOT_SLOT: WrapContext = WrapContext::root_slot(NODE, [1; 16]);

#[test]
fn format_1_opens() {
    let read = |name: &str| fs::read(fixtures().join(name)).unwrap();
    let wrapper = Counted::of(&read("wrapper.key"));
    let slot = WrappedKey::decode(&read("slot")).unwrap();
    let root = block_on(RootKey::slot_open(&wrapper.inner, &slot, &ROOT_SLOT, soon())).unwrap();
    let ring = Ring::open(&root, &read("ring")).unwrap();
    let stored = read("material");
    assert_eq!(ring.hardened_material(&VERSION, &stored).unwrap().blob, read("blob"));
    assert_eq!(opened(&ring, &wrapper, &stored).unwrap(), SECRET);
}

/// How the files came to be: once, when the format was new.
#[test]
#[ignore = "writes the files of a new format into POLYKEY_COMPAT_DIR"]
fn write_the_files_of_a_new_format() {
    let dir = PathBuf::from(std::env::var_os("POLYKEY_COMPAT_DIR").unwrap());
    fs::create_dir(&dir).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();
    let key = generate_master_key().unwrap();
    write("wrapper.key", key.as_bytes());
    let wrapper = Counted::of(key.as_bytes());
    let root = RootKey::generate().unwrap();
    write("slot", &block_on(root.slot_wrap(&wrapper.inner, &ROOT_SLOT, soon())).unwrap().encode());
    let ring = Ring::generate(NODE).unwrap();
    let (stored, blob) = harden(&ring, &wrapper);
    write("material", &stored);
    write("blob", &blob);
    write("ring", &ring.seal(&root).unwrap());
}

#[test]
fn where_a_resident_key_is_stands_and_falls_with_its_record() {
    let (old, blob_key) = (Ring::generate(NODE).unwrap(), BlobKey::generate().unwrap());
    let wrapper = WrapperId::new("pkcs11").unwrap();
    let stored = old.place_material(&VERSION, &wrapper, b"object", &blob_key).unwrap();
    let mut ring = old.clone();
    ring.add_epoch().unwrap();
    let moved = ring.rewrap_material(&VERSION, &stored).unwrap();
    assert_ne!(moved, stored);
    for (ring, stored) in [(&old, &stored), (&ring, &moved)] {
        let resident = ring.resident_material(&VERSION, stored).unwrap();
        assert_eq!((resident.wrapper.as_str(), &resident.object[..]), ("pkcs11", &b"object"[..]));
        // Nobody takes it for material.
        let taken = ring.unwrap_material(&VERSION, stored).err();
        assert_eq!(taken, Some(UnwrapMaterialError::Resident));
        assert_eq!(
            ring.hardened_material(&VERSION, stored).err(),
            Some(UnwrapMaterialError::OtherState)
        );
        for at in 0..stored.len() {
            let mut changed = stored.clone();
            changed[at] ^= 1;
            assert!(ring.resident_material(&VERSION, &changed).is_err(), "byte {at}");
        }
        let other = MaterialContext { version: 3, ..VERSION };
        assert!(ring.resident_material(&other, stored).is_err());
    }
    assert!(matches!(
        MaterialState::decode(&stored),
        Ok(MaterialState::Resident { object, .. }) if object == b"object"
    ));
    let long = vec![0; 65_536];
    assert!(old.place_material(&VERSION, &wrapper, &long, &blob_key).is_err());
}
