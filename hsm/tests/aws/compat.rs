//! What earlier versions wrapped opens for ever: tests/compat/aws-v1, made once by this very file.

use std::fs;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use polykey_hsm::{KeyWrapper, WrappedKey};
use serde_json::{Value, json};

use super::fake::Fake;
use super::support::{CONTEXT, alone, bytes, material, open, soon};

const SECRET: &[u8] = b"the secret of a key version";

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/aws-v1")
}

fn context() -> Value {
    json!({
        "polykey:node": "01010101010101010101010101010101",
        "polykey:purpose": "root",
        "polykey:slot": "02020202020202020202020202020202",
    })
}

#[test]
fn format_1_opens() {
    alone("compat::format_1_opens", &[], async || {
        let read = |name: &str| fs::read(directory().join(name)).unwrap();
        let fake = Fake::start().await;
        fake.made(&read("kms.ciphertext"), &read("kms.plaintext"), context());
        let wrapper = open(&fake.url, &fake.key).await;
        let stored = read("wrapped");
        let wrapped = WrappedKey::decode(&stored).unwrap();
        assert_eq!(wrapped.encode(), stored);
        let opened = wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await.unwrap();
        assert_eq!(bytes(opened), SECRET);
    });
}

#[test]
#[ignore = "wrote tests/compat/aws-v1, once"]
fn write_format_1() {
    alone("compat::write_format_1", &[], async || {
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let wrapped = wrapper.wrap_key(&material(SECRET), &CONTEXT, soon()).await.unwrap();
        assert_eq!(fake.contexts(), [context()]);
        fs::create_dir(directory()).expect("written already");
        let write = |name: &str, bytes: &[u8]| fs::write(directory().join(name), bytes).unwrap();
        write("wrapped", &wrapped.encode());
        write("kms.plaintext", &BASE64.decode(fake.seen()[0].as_bytes()).unwrap());
        write("kms.ciphertext", b"ciphertext 1");
    });
}
