//! Secrets told in every field of every call that can hold one.

use std::collections::BTreeSet;

use aws_lc_rs::digest::SHA256;
use data_encoding::{BASE64, HEXLOWER};
use prost_reflect::{Kind, MessageDescriptor};
use serde_json::{Value, json};

use crate::common::client::{Client, message, pool};

/// Secrets without end, each of 32 bytes, as a key may have, that begin with digits of its own.
#[derive(Default)]
pub(super) struct Canaries(pub(super) Vec<(String, Vec<u8>)>);

impl Canaries {
    fn next(&mut self, place: &str) -> String {
        let number = self.0.len();
        let digest = aws_lc_rs::digest::digest(&SHA256, format!("canary {number}").as_bytes());
        let text = format!("{}{number:08}", HEXLOWER.encode(&digest.as_ref()[..12]));
        self.0.push((format!("{place}, {number}"), text.clone().into_bytes()));
        text
    }

    /// A message with a secret in every field that can hold one, and with this key in it. Of alternatives, each round
    /// takes another.
    fn message(&mut self, of: &MessageDescriptor, place: &str, key: &str, round: usize) -> Value {
        let mut body = json!({});
        for field in of.fields() {
            let alternatives: Vec<_> =
                field.containing_oneof().map(|one| one.fields().collect()).unwrap_or_default();
            let real = alternatives.len() > 1;
            if real && alternatives[round % alternatives.len()] != field {
                continue;
            }
            let at = format!("{place}.{}", field.name());
            let value = match (field.name(), field.kind()) {
                ("requester_context" | "attributes", _) => continue,
                (_, Kind::Bytes) => json!(BASE64.encode(self.next(&at).as_bytes())),
                ("api_key" | "access_token" | "refresh_token" | "import_token", Kind::String) => {
                    json!(self.next(&at))
                }
                ("key_id", Kind::String) => json!(key),
                ("client_id", Kind::String) => json!("user-a"),
                ("key_type", _) => json!("KEY_TYPE_API_KEY"),
                (_, Kind::Message(inner)) if inner.full_name().starts_with("polykey.") => {
                    self.message(&inner, &at, key, round)
                }
                _ => continue,
            };
            let value = if field.is_list() { json!([value]) } else { value };
            if !field.is_map() {
                body[field.name()] = value;
            }
        }
        body
    }
}

/// A key for each kind of work.
struct Keys {
    credential: String,
    seals: String,
    signs: String,
    authenticates: String,
    derives: String,
    wraps: String,
    agrees: String,
    decapsulates: String,
}

impl Keys {
    async fn new(admin: &Client) -> Self {
        let of = async |kind: &str| admin.create(json!({"key_type": kind})).await;
        Self {
            credential: of("KEY_TYPE_API_KEY").await,
            seals: of("KEY_TYPE_AES_256").await,
            signs: of("KEY_TYPE_ED25519").await,
            authenticates: of("KEY_TYPE_HMAC_SHA256").await,
            derives: of("KEY_TYPE_HKDF_SHA256").await,
            wraps: admin.create(json!({"purpose": "KEY_PURPOSE_WRAP"})).await,
            agrees: of("KEY_TYPE_X25519").await,
            decapsulates: of("KEY_TYPE_ML_KEM_768").await,
        }
    }

    fn of(&self, method: &str) -> &str {
        match method {
            "Sign" | "Verify" => &self.signs,
            "GenerateMac" | "VerifyMac" => &self.authenticates,
            "DeriveKey" => &self.derives,
            "WrapKey" | "UnwrapKey" => &self.wraps,
            "Agree" => &self.agrees,
            "Encapsulate" | "Decapsulate" => &self.decapsulates,
            "Encrypt" | "Decrypt" | "Rewrap" | "GenerateDataKey" | "BatchCrypto"
            | "StreamCrypto" | "EncryptStream" | "DecryptStream" => &self.seals,
            _ => &self.credential,
        }
    }
}

/// Calls every method that can be told a secret, with secrets, until so many have been told; the refusals.
pub(super) async fn tell(
    admin: &Client,
    canaries: &mut Canaries,
    count: usize,
) -> (String, Vec<String>) {
    let keys = Keys::new(admin).await;
    let (mut errors, mut kept, mut served) = (String::new(), Vec::new(), BTreeSet::new());
    let services = || pool().services().filter(|s| s.full_name().starts_with("polykey.v2."));
    let methods: Vec<_> = services().flat_map(|s| s.methods().collect::<Vec<_>>()).collect();
    for round in 0.. {
        if canaries.0.len() >= count {
            break;
        }
        for method in &methods {
            let (name, before) = (method.name(), canaries.0.len());
            let mut body = canaries.message(&method.input(), name, keys.of(name), round);
            if canaries.0.len() == before {
                continue;
            }
            if name == "ImportKey" {
                body["key"] = json!({"key_type": "KEY_TYPE_HMAC_SHA256"});
                body["wrapping"] = "IMPORT_WRAPPING_PLAIN".into();
                body["import_token"] = "".into();
            }
            let body = message(method.input(), &body);
            match admin.send(method, vec![body], &[]).await {
                Ok(reply) => {
                    served.insert(name.to_owned());
                    let made = [&reply.body["key_id"], &reply.body["key"]["key_id"]];
                    kept.extend(made.iter().filter_map(|id| id.as_str()).map(str::to_owned));
                }
                Err(fail) => errors += &format!("{fail:?}"),
            }
        }
        let value = canaries.next("polykey-value-bin");
        let recipient = canaries.next("polykey-recipient-bin");
        let twins: [(&str, &str, &[u8], Value); 2] = [
            (
                "CreateKey",
                "polykey-value-bin",
                value.as_bytes(),
                json!({"key_type": "KEY_TYPE_API_KEY"}),
            ),
            (
                "GetKey",
                "polykey-recipient-bin",
                recipient.as_bytes(),
                json!({"key_id": keys.credential}),
            ),
        ];
        for (name, twin, secret, body) in twins {
            if let Err(fail) = admin.call_with(name, body, &[(twin, secret)]).await {
                errors += &format!("{fail:?}");
            }
        }
        if round < 10 {
            let token = canaries.next("authorization");
            let fail = admin.with_token(&token).call("ListKeys", json!({})).await.unwrap_err();
            errors += &format!("{fail:?}");
        }
    }
    for name in ["CreateKey", "RotateKey", "Encrypt", "Sign", "GenerateMac", "ImportKey", "WrapKey"]
    {
        assert!(served.contains(name), "{name} was never served: {served:?}");
    }
    (errors, kept)
}
