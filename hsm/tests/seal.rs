//! Nothing sealed opens anywhere but where it was sealed for, and nothing malformed does harm.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use polykey_hsm::{
    Algorithm, BlobHeader, BlobKey, KeyMaterial, MaterialContext, MaterialState, OpenError,
    RecordBinding, RecordHeader, Ring, RingError, RootKey, Sealer, UnwrapMaterialError,
    WrappedBlob, WrappedKey, header, key_checksum,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

fn ring() -> Ring {
    Ring::generate([0xa1; 16]).unwrap()
}

const BINDING: RecordBinding<'_> = RecordBinding { space: 3, kind: 7, row_key: b"row" };

const CONTEXT: MaterialContext = MaterialContext {
    node: [0xa1; 16],
    key_id: [0xb2; 16],
    version: 4,
    algorithm: Algorithm::Aes256,
    exportable: false,
};

/// Applies `check` to every text that differs from `sealed` in one bit or lacks its end.
fn each_damage(sealed: &[u8], mut check: impl FnMut(&[u8], String)) {
    for bit in 0..sealed.len() * 8 {
        let mut changed = sealed.to_vec();
        changed[bit / 8] ^= 1 << (bit % 8);
        check(&changed, format!("bit {bit} changed"));
    }
    for len in 0..sealed.len() {
        check(&sealed[..len], format!("cut to {len}"));
    }
    let longer: Vec<u8> = sealed.iter().copied().chain([0]).collect();
    check(&longer, "one byte more".to_owned());
}

#[test]
fn a_record_round_trips_with_its_counter_and_epoch() {
    let mut ring = ring();
    let old = ring.sealer().seal_record(&BINDING, 41, b"old").unwrap();
    assert_eq!(ring.add_epoch().unwrap(), 2);
    let sealer = ring.sealer();
    let new = sealer.seal_record(&BINDING, u64::MAX, b"").unwrap();
    assert_eq!(new.len(), Sealer::OVERHEAD);
    assert_eq!(header(&new).unwrap(), RecordHeader { format: 1, epoch: 2, counter: u64::MAX });
    let opened = sealer.open_record(&BINDING, &old).unwrap();
    assert_eq!((opened.counter, opened.epoch, opened.plaintext.as_slice()), (41, 1, &b"old"[..]));
    let opened = sealer.open_record(&BINDING, &new).unwrap();
    assert_eq!((opened.counter, opened.epoch, opened.plaintext.len()), (u64::MAX, 2, 0));
    assert_ne!(new, sealer.seal_record(&BINDING, u64::MAX, b"").unwrap());
}

#[test]
fn a_record_shows_every_change() {
    let sealer = ring().sealer();
    let sealed = sealer.seal_record(&BINDING, 5, b"some plaintext").unwrap();
    each_damage(&sealed, |bytes, what| {
        assert!(sealer.open_record(&BINDING, bytes).is_err(), "{what}");
    });
    assert_eq!(sealer.open_record(&BINDING, &[]).unwrap_err(), OpenError::Malformed);
    assert_eq!(header(&[2]).unwrap_err(), OpenError::UnknownFormat(2));
}

#[test]
fn a_record_does_not_move() {
    let ring = ring();
    let sealer = ring.sealer();
    let sealed = sealer.seal_record(&BINDING, 5, b"x").unwrap();
    for elsewhere in [
        RecordBinding { space: 4, ..BINDING },
        RecordBinding { kind: 8, ..BINDING },
        RecordBinding { space: 7, kind: 3, ..BINDING },
        RecordBinding { row_key: b"rov", ..BINDING },
        RecordBinding { row_key: b"ro", ..BINDING },
        RecordBinding { row_key: b"row\0", ..BINDING },
        RecordBinding { row_key: b"", ..BINDING },
    ] {
        let opened = sealer.open_record(&elsewhere, &sealed);
        assert_eq!(opened.unwrap_err(), OpenError::Broken, "{elsewhere:?}");
    }
    let stranger = Ring::generate([0xa1; 16]).unwrap().sealer();
    assert_eq!(stranger.open_record(&BINDING, &sealed).unwrap_err(), OpenError::Broken);
}

#[test]
fn a_record_keeps_its_epoch_and_dies_with_it() {
    let mut ring = ring();
    let sealed = ring.sealer().seal_record(&BINDING, 5, b"x").unwrap();
    ring.add_epoch().unwrap();
    let mut moved = sealed.clone();
    moved[4] = 2;
    assert_eq!(header(&moved).unwrap().epoch, 2);
    assert_eq!(ring.sealer().open_record(&BINDING, &moved).unwrap_err(), OpenError::Broken);
    let before = ring.clone();
    ring.retire_epoch(1).unwrap();
    let opened = ring.sealer().open_record(&BINDING, &sealed);
    assert_eq!(opened.unwrap_err(), OpenError::UnknownEpoch(1));
    assert!(before.sealer().open_record(&BINDING, &sealed).is_ok());
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_record_opens_only_under_an_equal_binding(
        (space, kind) in any::<(u8, u8)>(),
        row in vec(any::<u8>(), 0..40),
        counter: u64,
        plaintext in vec(any::<u8>(), 0..600),
        (other_space, other_kind) in any::<(u8, u8)>(),
        other_row in vec(any::<u8>(), 0..40),
    ) {
        let sealer = ring().sealer();
        let binding = RecordBinding { space, kind, row_key: &row };
        let other = RecordBinding { space: other_space, kind: other_kind, row_key: &other_row };
        let sealed = sealer.seal_record(&binding, counter, &plaintext).unwrap();
        let opened = sealer.open_record(&binding, &sealed).unwrap();
        prop_assert_eq!(opened.counter, counter);
        prop_assert_eq!(&*opened.plaintext, &plaintext);
        prop_assert_eq!(sealer.open_record(&other, &sealed).is_ok(), other == binding);
        let mut recounted = sealed.clone();
        recounted[5..13].copy_from_slice(&counter.wrapping_add(1).to_be_bytes());
        prop_assert_eq!(header(&recounted).unwrap().counter, counter.wrapping_add(1));
        prop_assert_eq!(
            sealer.open_record(&binding, &recounted).unwrap_err(),
            OpenError::Broken
        );
    }

    /// Text of anybody's making, with and without a plausible beginning.
    #[test]
    fn arbitrary_bytes_never_panic_and_never_open(
        mut bytes in vec(any::<u8>(), 0..300),
        magic in prop::sample::select(vec![
            &b""[..], b"\x01", b"\x01\0\0\0\x01", b"\x01\x01\0\0\0\x01", b"\x01\x02\0\0\0\x01\x01a",
            b"PKW\x01\0\x01", b"PKW\x01\0\x02\x0apassphrase", b"PKB\x01",
        ]),
    ) {
        bytes.splice(..0, magic.iter().copied());
        let ring = ring();
        prop_assert!(ring.sealer().open_record(&BINDING, &bytes).is_err());
        prop_assert!(Ring::open(&RootKey::generate().unwrap(), &bytes).is_err());
        prop_assert!(ring.unwrap_material(&CONTEXT, &bytes).is_err());
        prop_assert!(WrappedBlob::open(&BlobKey::generate().unwrap(), &bytes).is_err());
        let _ = header(&bytes);
        let _ = WrappedBlob::header(&bytes);
        let _ = MaterialState::decode(&bytes);
        if let Ok(decoded) = WrappedKey::decode(&bytes) {
            prop_assert_eq!(decoded.encode(), bytes, "one value, one encoding");
        }
    }

    #[test]
    fn a_version_opens_only_in_its_own_context(
        secret in vec(any::<u8>(), 1..200),
        flip in 0_usize..6,
        algorithm in prop::sample::select(Algorithm::ALL.to_vec()),
        exportable: bool,
        version: u32,
        byte in 0_usize..16,
    ) {
        let ring = ring();
        let blob_key = BlobKey::generate().unwrap();
        let cx = MaterialContext { algorithm, exportable, version, ..CONTEXT };
        let stored = ring.wrap_material(&cx, &material(&secret), &blob_key).unwrap();
        prop_assert_eq!(MaterialState::decode(&stored).unwrap(), MaterialState::Wrapped { epoch: 1 });
        let opened = ring.unwrap_material(&cx, &stored).unwrap();
        prop_assert_eq!(&*opened.material.expose_for_export(), &secret);
        let mut other = cx;
        match flip {
            0 => other.node[byte] ^= 1,
            1 => other.key_id[byte] ^= 1,
            2 => other.version ^= 1 << byte,
            3 => other.algorithm = Algorithm::ALL.iter().copied().find(|a| *a != algorithm).unwrap(),
            4 => other.exportable = !exportable,
            _ => (other.node, other.key_id) = (cx.key_id, cx.node),
        }
        let refused = ring.unwrap_material(&other, &stored).unwrap_err();
        prop_assert_eq!(refused, UnwrapMaterialError::Open(OpenError::Broken));
    }
}

#[test]
fn stored_material_shows_every_change() {
    let ring = ring();
    let blob_key = BlobKey::generate().unwrap();
    let stored = ring.wrap_material(&CONTEXT, &material(&[5; 32]), &blob_key).unwrap();
    each_damage(&stored, |bytes, what| {
        assert!(ring.unwrap_material(&CONTEXT, bytes).is_err(), "{what}");
    });
    // A record cannot stand in for material, nor the reverse.
    let record = ring.sealer().seal_record(&BINDING, 1, &[5; 200]).unwrap();
    assert!(ring.unwrap_material(&CONTEXT, &record).is_err());
    assert!(ring.sealer().open_record(&BINDING, &stored).is_err());
}

#[test]
fn resident_material_is_told_from_wrapped() {
    let mut stored = b"\x01\x02\0\0\0\x09\x05token\0\x03obj".to_vec();
    stored.extend([0; 112]);
    let state = MaterialState::decode(&stored).unwrap();
    let MaterialState::Resident { epoch: 9, wrapper, object } = &state else { panic!("{state:?}") };
    assert_eq!((wrapper.as_str(), &object[..]), ("token", &b"obj"[..]));
    assert_eq!(state.epoch(), 9);
    let refused = ring().unwrap_material(&CONTEXT, &stored).unwrap_err();
    // Nothing that is not authentic is believed, be it where a key resides.
    assert_eq!(refused, UnwrapMaterialError::Open(OpenError::UnknownEpoch(9)));
    stored[1] = 4;
    assert_eq!(MaterialState::decode(&stored).unwrap_err(), OpenError::Malformed);
}

#[test]
fn blobs_and_checksums_outlive_a_rewrap() {
    let mut ring = ring();
    let blob_key = BlobKey::generate().unwrap();
    let key = material(b"secret of one version");
    let head = BlobHeader { key_id: [1; 16], version: 2, algorithm: Algorithm::ApiKey };
    let blob = WrappedBlob::seal(&blob_key, &head, &key).unwrap();
    let checksum = key_checksum(&blob_key, &key).unwrap();
    let stored = ring.wrap_material(&CONTEXT, &key, &blob_key).unwrap();

    ring.add_epoch().unwrap();
    let moved = ring.rewrap_material(&CONTEXT, &stored).unwrap();
    assert_eq!(MaterialState::decode(&moved).unwrap().epoch(), 2);
    ring.retire_epoch(1).unwrap();
    assert!(ring.unwrap_material(&CONTEXT, &stored).is_err());
    let opened = ring.unwrap_material(&CONTEXT, &moved).unwrap();
    assert_eq!(WrappedBlob::seal(&opened.blob_key, &head, &opened.material).unwrap(), blob);
    assert_eq!(key_checksum(&opened.blob_key, &opened.material).unwrap(), checksum);
    let (found, inside) = WrappedBlob::open(&opened.blob_key, &blob).unwrap();
    assert_eq!(found, head);
    assert_eq!(inside.expose_for_export().as_slice(), b"secret of one version");
}

#[test]
fn a_blob_shows_every_change_and_opens_under_one_key() {
    let blob_key = BlobKey::generate().unwrap();
    let head = BlobHeader { key_id: [1; 16], version: 2, algorithm: Algorithm::Aes256 };
    let blob = WrappedBlob::seal(&blob_key, &head, &material(&[6; 32])).unwrap();
    assert_eq!(WrappedBlob::header(&blob).unwrap(), head);
    each_damage(&blob, |bytes, what| {
        assert!(WrappedBlob::open(&blob_key, bytes).is_err(), "{what}");
    });
    let other = BlobKey::generate().unwrap();
    assert_eq!(WrappedBlob::open(&other, &blob).unwrap_err(), OpenError::Broken);
    // Deterministic within a version, unrelated between versions and keys.
    let again =
        |k: &BlobKey, h: BlobHeader, m: u8| WrappedBlob::seal(k, &h, &material(&[m; 32])).unwrap();
    assert_eq!(again(&blob_key, head, 6), blob);
    for unlike in [
        again(&other, head, 6),
        again(&blob_key, BlobHeader { version: 3, ..head }, 6),
        again(&blob_key, head, 7),
    ] {
        assert_ne!(unlike[26..58], blob[26..58], "the salt repeats");
    }
}

#[test]
fn checksums_are_keyed() {
    let (one, two) = (BlobKey::generate().unwrap(), BlobKey::generate().unwrap());
    let sum = key_checksum(&one, &material(b"k")).unwrap();
    assert_eq!(sum.len(), 32);
    assert!(sum.bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(sum, key_checksum(&one, &material(b"k")).unwrap());
    assert_ne!(sum, key_checksum(&two, &material(b"k")).unwrap());
    assert_ne!(sum, key_checksum(&one, &material(b"l")).unwrap());
}

#[test]
fn a_ring_opens_under_its_root_alone() {
    let (root, other) = (RootKey::generate().unwrap(), RootKey::generate().unwrap());
    let mut ring = ring();
    let before = ring.mac(polykey_hsm::MacPurpose::RowName, &[b"name"]);
    ring.add_epoch().unwrap();
    ring.add_epoch().unwrap();
    ring.retire_epoch(2).unwrap();
    let record = ring.sealer().seal_record(&BINDING, 9, b"kept").unwrap();
    let sealed = ring.seal(&root).unwrap();
    let opened = Ring::open(&root, &sealed).unwrap();
    assert_eq!(
        (opened.node_id(), opened.epochs(), opened.primary_epoch()),
        ([0xa1; 16], vec![1, 3], 3)
    );
    assert_eq!(opened.sealer().open_record(&BINDING, &record).unwrap().counter, 9);
    assert_eq!(opened.mac(polykey_hsm::MacPurpose::RowName, &[b"name"]), before);
    assert_eq!(Ring::open(&other, &sealed).unwrap_err(), RingError::OtherRoot);
    // A forged root id does not make another root's ring one's own.
    let mut forged = sealed.clone();
    forged[1..17].copy_from_slice(&other.id());
    assert_eq!(Ring::open(&other, &forged).unwrap_err(), RingError::Broken);
    each_damage(&sealed, |bytes, what| {
        assert!(Ring::open(&root, bytes).is_err(), "{what}");
    });
    assert_eq!(Ring::open(&root, &[]).unwrap_err(), RingError::Malformed);
    assert_eq!(Ring::open(&root, &[9]).unwrap_err(), RingError::UnknownFormat(9));
}

#[test]
fn epochs_come_and_go_in_order() {
    let mut ring = ring();
    assert_eq!(ring.primary_epoch(), 1);
    assert_eq!(ring.retire_epoch(1).unwrap_err(), RingError::PrimaryEpoch(1));
    assert_eq!(ring.retire_epoch(2).unwrap_err(), RingError::UnknownEpoch(2));
    let shared = ring.clone();
    assert_eq!((ring.add_epoch().unwrap(), ring.add_epoch().unwrap()), (2, 3));
    assert_eq!(shared.epochs(), [1]);
    ring.retire_epoch(1).unwrap();
    assert_eq!(ring.epochs(), [2, 3]);
    assert_eq!(ring.add_epoch().unwrap(), 4, "a number is never used twice");
    for _ in 3..1024 {
        ring.add_epoch().unwrap();
    }
    assert_eq!(ring.add_epoch().unwrap_err(), RingError::Full);
}

#[test]
fn the_slot_list_is_authenticated_by_the_root() {
    let root = RootKey::generate().unwrap();
    let mac = root.mac_slots(b"slots").unwrap();
    assert!(root.verify_slots(b"slots", &mac));
    assert!(!root.verify_slots(b"slot", &mac));
    assert!(!root.verify_slots(b"slots", &mac[..31]));
    assert!(!RootKey::generate().unwrap().verify_slots(b"slots", &mac));
}

#[test]
fn debug_of_what_holds_secrets_shows_none() {
    let secret = material(b"\xde\xad\xbe\xef and then some");
    let ring = ring();
    let blob_key = BlobKey::generate().unwrap();
    let stored = ring.wrap_material(&CONTEXT, &secret, &blob_key).unwrap();
    let unwrapped = ring.unwrap_material(&CONTEXT, &stored).unwrap();
    let record = ring.sealer().seal_record(&BINDING, 1, b"\xde\xad\xbe\xef").unwrap();
    let opened = ring.sealer().open_record(&BINDING, &record).unwrap();
    let root = RootKey::generate().unwrap();
    let id: String = root.id().iter().map(|b| format!("{b:02x}")).collect();
    let (private, _) = polykey_hsm::generate_recipient_keypair().unwrap();
    let params = polykey_hsm::GenerationParams { supplied: Some(secret), prefix: None };
    for (shown, expected) in [
        (
            format!("{params:?}"),
            "GenerationParams { supplied: Some(KeyMaterial(18 bytes)), prefix: None }".to_owned(),
        ),
        (
            format!("{unwrapped:?}"),
            "UnwrappedMaterial { material: KeyMaterial(18 bytes), .. }".to_owned(),
        ),
        (format!("{opened:?}"), "OpenedRecord { counter: 1, epoch: 1, len: 4 }".to_owned()),
        (format!("{blob_key:?}"), "BlobKey(..)".to_owned()),
        (format!("{private:?}"), "RecipientPrivateKey(..)".to_owned()),
        (format!("{root:?}"), format!("RootKey {{ id: {id}, .. }}")),
        (format!("{ring:?}"), format!("Ring {{ node: {}, epochs: [1], .. }}", "a1".repeat(16))),
        (
            format!("{:?}", ring.sealer()),
            format!("Sealer(Ring {{ node: {}, epochs: [1], .. }})", "a1".repeat(16)),
        ),
    ] {
        assert_eq!(shown, expected);
    }
}
