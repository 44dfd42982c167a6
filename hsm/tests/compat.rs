//! Files that earlier versions wrote open for ever. They are added with each format and never
//! written again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::executor::block_on;
use polykey_hsm::{
    Algorithm, BlobHeader, BlobKey, Deadline, KeyMaterial, LocalWrapper, MacPurpose,
    MasterKeySource, MaterialContext, PassphraseParams, RecordBinding, Ring, RootKey, SecretSource,
    WrapContext, WrappedBlob, WrappedKey, generate_master_key, key_checksum,
};

const SECRET: &[u8] = b"the secret of a key version";
const PASSPHRASE: &str = "correct horse battery staple\n";
const RECORD: RecordBinding<'_> = RecordBinding { space: 3, kind: 7, row_key: b"row key" };
const VERSION: MaterialContext = MaterialContext {
    node: [0x0a; 16],
    key_id: [0x0b; 16],
    version: 2,
    algorithm: Algorithm::ApiKey,
    exportable: true,
};
const BLOB: BlobHeader =
    BlobHeader { key_id: [0x0b; 16], version: 2, algorithm: Algorithm::ApiKey };
const KEY_SLOT: WrapContext = WrapContext::root_slot([0x0a; 16], [1; 16]);
const PASS_SLOT: WrapContext = WrapContext::root_slot([0x0a; 16], [2; 16]);

fn directory(format: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat").join(format)
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// The wrapper over a secret, read from where secrets may stand: a checkout's modes are anyone's.
fn wrapper(secret: &[u8], passphrase: bool) -> LocalWrapper {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    fs::write(&path, secret).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let source = if passphrase {
        let params = PassphraseParams::MIN;
        MasterKeySource::Passphrase { from: SecretSource::File(path), params }
    } else {
        MasterKeySource::File(path)
    };
    LocalWrapper::open(&source).unwrap()
}

#[test]
fn format_1_opens() {
    let read = |name: &str| fs::read(directory("v1").join(name)).unwrap();
    let mut roots = Vec::new();
    for (slot, cx, wrapper) in [
        ("slot.master-key", KEY_SLOT, wrapper(&read("master.key"), false)),
        ("slot.passphrase", PASS_SLOT, wrapper(PASSPHRASE.as_bytes(), true)),
    ] {
        let stored = read(slot);
        let wrapped = WrappedKey::decode(&stored).unwrap();
        assert_eq!(wrapped.encode(), stored, "{slot}");
        roots.push(block_on(RootKey::slot_open(&wrapper, &wrapped, &cx, soon())).unwrap());
    }
    for root in roots {
        let ring = Ring::open(&root, &read("ring")).unwrap();
        assert_eq!((ring.node_id(), ring.epochs()), ([0x0a; 16], vec![2, 3]));
        assert!(root.verify_slots(&read("slot.master-key"), &read("slots.mac")));

        let record = ring.sealer().open_record(&RECORD, &read("record")).unwrap();
        assert_eq!((record.counter, record.epoch), (77, 2));
        assert_eq!(record.plaintext.as_slice(), b"a record");

        let version = ring.unwrap_material(&VERSION, &read("material")).unwrap();
        let checksum = key_checksum(&version.blob_key, &version.material).unwrap();
        assert_eq!(checksum.as_bytes(), read("checksum"));
        let blob = WrappedBlob::seal(&version.blob_key, &BLOB, &version.material).unwrap();
        assert_eq!(blob, read("blob"), "a blob is the same bytes each time");
        let (header, inside) = WrappedBlob::open(&version.blob_key, &blob).unwrap();
        assert_eq!(header, BLOB);
        assert_eq!(inside.expose_for_export().as_slice(), SECRET);
        assert_eq!(version.material.expose_for_export().as_slice(), SECRET);

        for (purpose, name) in MACS {
            assert_eq!(ring.mac(purpose, &[b"a", b"bc"]), *read(&format!("mac.{name}")), "{name}");
        }
    }
}

const MACS: [(MacPurpose, &str); 10] = [
    (MacPurpose::RowName, "row-name"),
    (MacPurpose::Principal, "principal"),
    (MacPurpose::ApiKey, "api-key"),
    (MacPurpose::PageToken, "page-token"),
    (MacPurpose::MetadataChecksum, "metadata-checksum"),
    (MacPurpose::Idempotency, "idempotency"),
    (MacPurpose::SetHash, "set-hash"),
    (MacPurpose::AuditSalt, "audit-salt"),
    (MacPurpose::LoginDummy, "login-dummy"),
    (MacPurpose::Anchor, "anchor"),
];

/// How the files of a format come to be: name a directory that does not exist yet, once, when the
/// format is new.
#[test]
#[ignore = "writes the files of a new format into POLYKEY_COMPAT_DIR"]
fn write_the_files_of_a_new_format() {
    let dir = PathBuf::from(std::env::var_os("POLYKEY_COMPAT_DIR").unwrap());
    fs::create_dir(&dir).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.join(name), bytes).unwrap();

    let key = generate_master_key().unwrap();
    let root = RootKey::generate().unwrap();
    write("master.key", key.as_bytes());
    let slot = |cx, wrapper: LocalWrapper| {
        block_on(root.slot_wrap(&wrapper, cx, soon())).unwrap().encode()
    };
    let slots = slot(&KEY_SLOT, wrapper(key.as_bytes(), false));
    write("slots.mac", &root.mac_slots(&slots).unwrap());
    write("slot.master-key", &slots);
    write("slot.passphrase", &slot(&PASS_SLOT, wrapper(PASSPHRASE.as_bytes(), true)));

    let mut ring = Ring::generate([0x0a; 16]).unwrap();
    ring.add_epoch().unwrap();
    ring.retire_epoch(1).unwrap();
    write("record", &ring.sealer().seal_record(&RECORD, 77, b"a record").unwrap());
    let blob_key = BlobKey::generate().unwrap();
    let material = KeyMaterial::from_secret(SECRET.to_vec()).unwrap();
    write("material", &ring.wrap_material(&VERSION, &material, &blob_key).unwrap());
    write("blob", &WrappedBlob::seal(&blob_key, &BLOB, &material).unwrap());
    write("checksum", key_checksum(&blob_key, &material).unwrap().as_bytes());
    ring.add_epoch().unwrap();
    write("ring", &ring.seal(&root).unwrap());
    for (purpose, name) in MACS {
        write(&format!("mac.{name}"), &ring.mac(purpose, &[b"a", b"bc"]));
    }
}
