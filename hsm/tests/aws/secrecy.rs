//! What KMS gets to see, and what the log does.

use std::io::Write;
use std::sync::{Arc, Mutex};

use data_encoding::BASE64;
use polykey_hsm::{KeyWrapper, WrapError};
use serde_json::json;
use tracing_subscriber::filter::LevelFilter;

use super::fake::{Fake, Fault};
use super::support::{CONTEXT, SECRET_KEY, alone, material, open, soon};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn kms_sees_node_purpose_and_slot_and_never_the_key() {
    alone("secrecy::kms_sees_node_purpose_and_slot_and_never_the_key", &[], async || {
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let secret = [0xc3; 32];
        wrapper.wrap_key(&material(&secret), &CONTEXT, soon()).await.unwrap();
        let expected = json!({
            "polykey:node": "01010101010101010101010101010101",
            "polykey:purpose": "root",
            "polykey:slot": "02020202020202020202020202020202",
        });
        assert_eq!(fake.contexts(), [expected]);
        assert!(!fake.seen().contains(&BASE64.encode(&secret)));
    });
}

/// At the most talkative level, of every crate.
#[test]
fn the_log_holds_reasons_and_no_secrets() {
    alone("secrecy::the_log_holds_reasons_and_no_secrets", &[], async || {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(LevelFilter::TRACE)
            .with_writer(move || writer.clone())
            .init();
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let secret = [0xc3; 32];
        let wrapped = wrapper.wrap_key(&material(&secret), &CONTEXT, soon()).await.unwrap();
        wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await.unwrap();
        fake.always(Fault::Error(400, "ThrottlingException", "Rate exceeded"));
        let away = wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await;
        assert!(matches!(away, Err(WrapError::Unavailable { retryable: true })), "{away:?}");

        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert!(log.contains("AWS KMS gave no answer"), "{log}");
        assert!(log.contains("ThrottlingException, HTTP 400 (AWS says: Rate exceeded)"), "{log}");
        assert!(log.contains("TRACE"), "the control: nothing was filtered");
        let mut secrets = fake.seen();
        secrets.push(SECRET_KEY.to_owned());
        secrets.push(BASE64.encode(&secret));
        for secret in secrets {
            let bytes = BASE64.decode(secret.as_bytes()).unwrap_or_default();
            let debug = format!("{bytes:?}");
            assert!(!log.contains(&secret), "{secret} is in the log");
            assert!(bytes.is_empty() || !log.contains(debug.trim_matches(['[', ']'])), "{secret}");
        }
    });
}
