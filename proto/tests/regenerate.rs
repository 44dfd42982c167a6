//! The checked-in generated code is what the `.proto` files say; `POLYKEY_REGENERATE=1` makes it so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod sources;

use std::{collections::BTreeMap, fs};

use prost::Message;
use sources::{ON_DISK, compile, root};

/// Messages with a secret in them: `src/redact.rs` writes their `Debug`.
const SECRET: &[&str] = &[
    "AuthenticateRequest",
    "AuthenticateResponse",
    "RefreshTokenRequest",
    "RefreshTokenResponse",
    "RevokeTokenRequest",
    "KeyMaterial",
    "CreateKeyRequest",
    "CreateKeyItem",
    "RotateKeyRequest",
    "RotateKeyItem",
    "CreateClientResponse",
    "RotateClientApiKeyResponse",
    "IssueCertificateResponse",
    "EncryptRequest",
    "DecryptRequest",
    "DecryptResponse",
    "GenerateDataKeyResponse",
    "SignRequest",
    "VerifyRequest",
    "GenerateMacRequest",
    "VerifyMacRequest",
    "DeriveKeyResponse",
    "AgreeResponse",
    "EncapsulateResponse",
    "DecapsulateResponse",
    "WrapKeyRequest",
    "UnwrapKeyResponse",
    "GenerateRandomResponse",
    "ImportKeyRequest",
    "HashAuditValueRequest",
    "GetImportParametersResponse",
    "EncryptStreamRequest",
    "DecryptStreamResponse",
];

/// What `src/gen` has to hold, by file name.
fn generate() -> BTreeMap<String, Vec<u8>> {
    let full = compile();

    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .out_dir(out.path())
        .include_file("mod.rs")
        .codec_path("crate::Codec")
        .bytes(".")
        // Maps in order: MACs over encoded messages and records must not depend on a hash seed.
        .btree_map(".")
        .skip_debug(SECRET.iter().map(|m| format!(".polykey.v2.{m}")))
        .skip_debug([".polykey.record.v1.SigningKeyRecord", ".polykey.record.v1.ImportRecord"])
        .compile_fds(full.clone())
        .unwrap();

    let mut files = BTreeMap::new();
    for entry in fs::read_dir(out.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut text = fs::read_to_string(&path).unwrap();
        if name == "mod.rs" {
            // The generator writes where it wrote; the files stand side by side.
            text = text.replace(&format!("{}/", out.path().display()), "");
        }
        files.insert(name, text.into_bytes());
    }

    let mut wire = full;
    wire.file.retain(|f| !f.package().starts_with(ON_DISK));
    for file in &mut wire.file {
        file.source_code_info = None;
    }
    files.insert("descriptors.bin".to_owned(), wire.encode_to_vec());
    files
}

#[test]
fn generated_code_is_current() {
    let dir = root().join("src/gen");
    let fresh = generate();
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        fs::create_dir_all(&dir).unwrap();
        for entry in fs::read_dir(&dir).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for (name, bytes) in &fresh {
            fs::write(dir.join(name), bytes).unwrap();
        }
        return;
    }
    let mut stale: Vec<String> = fresh
        .iter()
        .filter(|(name, bytes)| fs::read(dir.join(name)).ok().as_ref() != Some(*bytes))
        .map(|(name, _)| name.clone())
        .collect();
    for entry in fs::read_dir(&dir).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !fresh.contains_key(&name) {
            stale.push(name);
        }
    }
    assert!(
        stale.is_empty(),
        "src/gen differs from the .proto files in {stale:?}; \
         run POLYKEY_REGENERATE=1 cargo test -p polykey-proto --test regenerate"
    );
}
