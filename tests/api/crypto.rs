//! Keys at work, over the wire: every type and purpose, versions and states, bindings.

mod many;
mod outside;

use data_encoding::BASE64;
use serde_json::{Value, json};
use tonic::Code;

use crate::common::Server;
use crate::common::client::{Client, Fail, refused};

fn b64(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

fn bytes(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

async fn made(client: &Client, kind: &str, purpose: &str) -> String {
    let body = json!({"key_type": kind, "purpose": purpose, "exportable": true});
    client.create(body).await
}

async fn encrypt(client: &Client, key: &str, text: &[u8]) -> Result<String, Fail> {
    let body = json!({"key_id": key, "plaintext": b64(text), "context": {"a": "b"}});
    Ok(client.call("Encrypt", body).await?["ciphertext"].as_str().unwrap().to_owned())
}

async fn decrypt(client: &Client, ciphertext: &str) -> Result<Vec<u8>, Fail> {
    let body = json!({"ciphertext": ciphertext, "context": {"a": "b"}});
    Ok(bytes(&client.call("Decrypt", body).await?["plaintext"]))
}

#[track_caller]
fn says_nothing(fail: &Fail) {
    assert_eq!((fail.code, fail.text.as_str()), (Code::InvalidArgument, "decryption failed"));
    assert!(fail.violations.is_empty() && fail.reason.is_empty(), "{fail:?}");
}

const SYMMETRIC: [&str; 6] = [
    "KEY_TYPE_AES_256",
    "KEY_TYPE_AES_128",
    "KEY_TYPE_AES_256_GCM",
    "KEY_TYPE_AES_128_GCM",
    "KEY_TYPE_CHACHA20_POLY1305",
    "KEY_TYPE_XCHACHA20_POLY1305",
];

#[tokio::test(flavor = "multi_thread")]
async fn every_type_does_what_it_was_made_for_and_nothing_else() {
    let server = Server::dev();
    let admin = server.admin().await;
    let mut keys = Vec::new();
    for kind in SYMMETRIC {
        let key = made(&admin, kind, "KEY_PURPOSE_ENCRYPT").await;
        for size in [0, 1, 4096] {
            let text = vec![7; size];
            let sealed = encrypt(&admin, &key, &text).await.unwrap();
            assert_eq!(decrypt(&admin, &sealed).await.unwrap(), text, "{kind}");
            assert_ne!(encrypt(&admin, &key, &text).await.unwrap(), sealed, "{kind} repeats");
        }
        keys.push((key, "encrypt"));
    }
    let rsa = made(&admin, "KEY_TYPE_RSA_2048", "KEY_PURPOSE_ENCRYPT").await;
    for format in ["CIPHERTEXT_FORMAT_BLOB", "CIPHERTEXT_FORMAT_TEXT", "CIPHERTEXT_FORMAT_RAW"] {
        let body = json!({"key_id": rsa, "plaintext": b64(b"short"), "format": format});
        let sealed = admin.call("Encrypt", body).await.unwrap();
        let raw = if format.ends_with("RAW") { format } else { "CIPHERTEXT_FORMAT_UNSPECIFIED" };
        let body = json!({"key_id": rsa, "ciphertext": sealed["ciphertext"], "format": raw});
        let opened = admin.call("Decrypt", body).await.unwrap();
        assert_eq!(bytes(&opened["plaintext"]), b"short", "{format}");
    }
    let long = json!({"key_id": rsa, "plaintext": b64(&[1; 191])});
    let fail = refused(admin.call("Encrypt", long).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "plaintext");
    keys.push((rsa, "encrypt"));

    for kind in [
        "ECDSA_P256",
        "ECDSA_P384",
        "ECDSA_P521",
        "ECDSA_SECP256K1",
        "ED25519",
        "RSA_2048",
        "ML_DSA_44",
        "ML_DSA_65",
        "ML_DSA_87",
    ] {
        let key = made(&admin, &format!("KEY_TYPE_{kind}"), "KEY_PURPOSE_SIGN").await;
        let public = admin.call("GetPublicKey", json!({"key_id": key})).await.unwrap();
        let schemes = public["schemes"].as_array().unwrap().clone();
        assert!(!schemes.is_empty(), "{kind}");
        for scheme in schemes {
            let sign = json!({"key_id": key, "message": b64(b"m"), "scheme": scheme});
            let signed = admin.call("Sign", sign).await.unwrap();
            let mut signature = bytes(&signed["signature"]);
            let check = |message: &[u8], signature: &[u8]| {
                let body = json!({"key_id": key, "message": b64(message), "scheme": scheme, "signature": b64(signature)});
                admin.call("Verify", body)
            };
            assert_eq!(check(b"m", &signature).await.unwrap()["valid"], true, "{kind} {scheme}");
            assert_eq!(check(b"n", &signature).await.unwrap()["valid"], false, "{kind} {scheme}");
            signature[10] ^= 1;
            assert_eq!(check(b"m", &signature).await.unwrap()["valid"], false, "{kind} {scheme}");
            assert_eq!(check(b"m", b"").await.unwrap()["valid"], false, "{kind} {scheme}");
        }
        keys.push((key, "sign"));
    }
    let digest = json!({"key_id": keys.last().unwrap().0, "digest": b64(&[1; 32])});
    let fail = refused(admin.call("Sign", digest).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "digest", "{fail:?}");

    for (kind, length) in [("SHA256", 32), ("SHA384", 48), ("SHA512", 64)] {
        let key = made(&admin, &format!("KEY_TYPE_HMAC_{kind}"), "KEY_PURPOSE_MAC").await;
        let body = json!({"key_id": key, "message": b64(b"m")});
        let mac = bytes(&admin.call("GenerateMac", body).await.unwrap()["mac"]);
        assert_eq!(mac.len(), length);
        for (message, mac, valid) in [
            (b"m", mac.clone(), true),
            (b"n", mac.clone(), false),
            (b"m", mac[1..].to_vec(), false),
        ] {
            let body = json!({"key_id": key, "message": b64(message), "mac": b64(&mac)});
            assert_eq!(admin.call("VerifyMac", body).await.unwrap()["valid"], valid);
        }
        keys.push((key, "mac"));
    }

    let hkdf = made(&admin, "KEY_TYPE_HKDF_SHA256", "KEY_PURPOSE_DERIVE").await;
    let derive = |context: Value, length: i32| {
        let body = json!({"key_id": hkdf, "context": context, "length": length});
        admin.call("DeriveKey", body)
    };
    let one = bytes(&derive(json!({"for": "a"}), 48).await.unwrap()["derived_key"]);
    assert_eq!(one.len(), 48);
    assert_eq!(one, bytes(&derive(json!({"for": "a"}), 48).await.unwrap()["derived_key"]));
    assert_ne!(one, bytes(&derive(json!({"for": "b"}), 48).await.unwrap()["derived_key"]));
    keys.push((hkdf, "derive"));

    for kind in ["X25519", "ECDH_P256", "ECDH_P384", "ECDH_P521"] {
        let kind = format!("KEY_TYPE_{kind}");
        let (a, b) = (
            made(&admin, &kind, "KEY_PURPOSE_AGREE").await,
            made(&admin, &kind, "KEY_PURPOSE_AGREE").await,
        );
        let agree = async |mine: &str, theirs: &str, form: &str| {
            let format = format!("PUBLIC_KEY_FORMAT_{form}");
            let body = json!({"key_id": theirs, "format": format});
            let peer = admin.call("GetPublicKey", body).await.unwrap();
            let body = json!({"key_id": mine, "peer_public_key": peer["public_key"], "derivation": "KEY_DERIVATION_HKDF_SHA256", "info": b64(b"i")});
            bytes(&admin.call("Agree", body).await.unwrap()["shared_secret"])
        };
        let secret = agree(&a, &b, "DER").await;
        assert_eq!(secret.len(), 32);
        assert_eq!(secret, agree(&b, &a, "PEM").await, "{kind}");
        assert_eq!(secret, agree(&b, &a, "JWK").await, "{kind}");
        keys.push((a, "agree"));
    }

    for (kind, length) in [("ML_KEM_768", 32), ("ML_KEM_1024", 32), ("X25519_ML_KEM_768", 64)] {
        let key = made(&admin, &format!("KEY_TYPE_{kind}"), "KEY_PURPOSE_ENCAPSULATE").await;
        let made = admin.call("Encapsulate", json!({"key_id": key})).await.unwrap();
        assert_eq!(bytes(&made["shared_secret"]).len(), length);
        let body = json!({"key_id": key, "ciphertext": made["ciphertext"]});
        let got = admin.call("Decapsulate", body).await.unwrap();
        assert_eq!(got["shared_secret"], made["shared_secret"], "{kind}");
        let body = json!({"key_id": key, "ciphertext": b64(b"short")});
        assert!(admin.call("Decapsulate", body).await.is_err());
        keys.push((key, "encapsulate"));
    }

    for kind in ["AES_256", "AES_128", "RSA_2048"] {
        let kek = made(&admin, &format!("KEY_TYPE_{kind}"), "KEY_PURPOSE_WRAP").await;
        let body = json!({"key_id": kek, "key_material": b64(&[5; 33])});
        let wrapped = admin.call("WrapKey", body).await.unwrap();
        let body = json!({"key_id": kek, "wrapped_key": wrapped["wrapped_key"]});
        let back = admin.call("UnwrapKey", body).await.unwrap();
        assert_eq!(bytes(&back["key_material"]), [5; 33], "{kind}");
        let mut changed = bytes(&wrapped["wrapped_key"]);
        changed[0] ^= 1;
        let body = json!({"key_id": kek, "wrapped_key": b64(&changed)});
        says_nothing(&refused(admin.call("UnwrapKey", body).await, Code::InvalidArgument));
        keys.push((kek, "wrap"));
    }

    // Everything else is refused, and the answer says what the key was made for.
    for (key, purpose) in &keys {
        for (method, does, more) in [
            ("Encrypt", "encrypt", json!({"plaintext": "eA=="})),
            ("Sign", "sign", json!({"message": "eA=="})),
            ("GenerateMac", "mac", json!({"message": "eA=="})),
            ("DeriveKey", "derive", json!({"context": {"a": "b"}})),
            ("Agree", "agree", json!({"peer_public_key": "eA=="})),
            ("Encapsulate", "encapsulate", json!({})),
            ("UnwrapKey", "wrap", json!({"wrapped_key": "eA=="})),
        ] {
            if does == *purpose {
                continue;
            }
            let mut body = more;
            body["key_id"] = key.clone().into();
            let fail = refused(admin.call(method, body).await, Code::InvalidArgument);
            let (field, text) = &fail.violations[0];
            assert_eq!(field, "key_id");
            assert!(text.contains(&format!("made to {purpose}")), "{method}: {text}");
        }
    }
    let fail = refused(
        admin
            .call(
                "CreateKey",
                json!({"key_type": "KEY_TYPE_ED25519", "purpose": "KEY_PURPOSE_ENCRYPT"}),
            )
            .await,
        Code::InvalidArgument,
    );
    assert_eq!(fail.violations[0].0, "purpose");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ciphertext_opens_for_its_key_version_context_and_data_alone() {
    let server = Server::dev();
    let admin = server.admin().await;
    let (key, other) = (admin.create(json!({})).await, admin.create(json!({})).await);
    let body = json!({"key_id": key, "plaintext": b64(b"secret"), "context": {"a": "1", "b": "2"}, "additional_data": b64(b"d")});
    let sealed = admin.call("Encrypt", body).await.unwrap();
    let blob = bytes(&sealed["ciphertext"]);
    let open = |blob: &[u8], context: Value, data: &[u8], key: &str| {
        let body = json!({"ciphertext": b64(blob), "context": context, "additional_data": b64(data), "key_id": key});
        admin.call("Decrypt", body)
    };
    let right = json!({"b": "2", "a": "1"});
    let opened = open(&blob, right.clone(), b"d", "").await.unwrap();
    assert_eq!(bytes(&opened["plaintext"]), b"secret");
    assert_eq!((&opened["key_id"], &opened["version"]), (&sealed["key_id"], &json!(1)));
    for (context, data) in [
        (json!({"a": "1"}), &b"d"[..]),
        (json!({"a": "2", "b": "1"}), b"d"),
        (json!({"a": "1", "b": "2", "c": ""}), b"d"),
        (json!({"A": "1", "b": "2"}), b"d"),
        (json!({}), b"d"),
        (right.clone(), b"e"),
        (right.clone(), b""),
    ] {
        says_nothing(&open(&blob, context, data, "").await.unwrap_err());
    }
    // A key that is named must be the one.
    says_nothing(&open(&blob, right.clone(), b"d", &other).await.unwrap_err());
    // The header may name what it likes.
    let mut moved = blob.clone();
    moved[4..20].copy_from_slice(uuid::Uuid::parse_str(&other).unwrap().as_bytes());
    says_nothing(&open(&moved, right.clone(), b"d", "").await.unwrap_err());
    for at in 26..blob.len() {
        let mut changed = blob.clone();
        changed[at] ^= 0x80;
        says_nothing(&open(&changed, right.clone(), b"d", "").await.unwrap_err());
    }
    for (text, field) in [("garbage", "ciphertext"), ("polykey:c1:!!!", "ciphertext")] {
        let fail = open(text.as_bytes(), right.clone(), b"d", "").await.unwrap_err();
        assert_eq!((fail.code, fail.violations[0].0.as_str()), (Code::InvalidArgument, field));
    }
    // The printable form is the same thing.
    let body = json!({"key_id": key, "plaintext": b64(b"x"), "format": "CIPHERTEXT_FORMAT_TEXT"});
    let text = bytes(&admin.call("Encrypt", body).await.unwrap()["ciphertext"]);
    assert!(text.starts_with(b"polykey:c1:") && text.is_ascii());
    assert_eq!(bytes(&open(&text, json!({}), b"", "").await.unwrap()["plaintext"]), b"x");
    // Equal only where asked for.
    let convergent = admin.create(json!({"convergent": true})).await;
    let (one, two) = (
        encrypt(&admin, &convergent, b"same").await.unwrap(),
        encrypt(&admin, &convergent, b"same").await.unwrap(),
    );
    assert_eq!(one, two);
    assert_ne!(one, encrypt(&admin, &convergent, b"other").await.unwrap());
    assert_eq!(decrypt(&admin, &one).await.unwrap(), b"same");
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_and_states_decide_what_seals_and_what_opens() {
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let old = encrypt(&admin, &key, b"old").await.unwrap();
    admin.call("RotateKey", json!({"key_id": key})).await.unwrap();
    let new = encrypt(&admin, &key, b"new").await.unwrap();
    assert_eq!(decrypt(&admin, &old).await.unwrap(), b"old");
    let at = |version: i32| json!({"key_id": key, "plaintext": "eA==", "version": version});
    let reason = async |body: Value| admin.call("Encrypt", body).await.unwrap_err().reason;
    assert_eq!(reason(at(1)).await, "VERSION_TOO_OLD");
    assert_eq!(reason(at(3)).await, "VERSION_NOT_FOUND");
    let bounds = json!({"key_id": key, "min_encryption_version": 1});
    admin.call("UpdateKeyVersionBounds", bounds).await.unwrap();
    assert_eq!(admin.call("Encrypt", at(1)).await.unwrap()["version"], 1);

    // Moved to the newest version without anybody seeing it.
    let body = json!({"ciphertext": old, "context": {"a": "b"}});
    let moved = admin.call("Rewrap", body).await.unwrap();
    assert_eq!((&moved["source_version"], &moved["version"]), (&json!(1), &json!(2)));
    let moved = moved["ciphertext"].as_str().unwrap().to_owned();
    let bounds = json!({"key_id": key, "min_decryption_version": 2, "min_encryption_version": 2});
    admin.call("UpdateKeyVersionBounds", bounds).await.unwrap();
    assert_eq!(decrypt(&admin, &old).await.unwrap_err().reason, "VERSION_TOO_OLD");
    assert_eq!(decrypt(&admin, &moved).await.unwrap(), b"old");
    // To another key, and bound to something else.
    let other = admin.create(json!({"key_type": "KEY_TYPE_CHACHA20_POLY1305"})).await;
    let body = json!({"ciphertext": moved, "context": {"a": "b"}, "destination_key_id": other, "change_binding": true, "destination_context": {"c": "d"}});
    let moved = admin.call("Rewrap", body).await.unwrap();
    let body = json!({"ciphertext": moved["ciphertext"], "context": {"c": "d"}});
    let opened = admin.call("Decrypt", body).await.unwrap();
    assert_eq!((bytes(&opened["plaintext"]), &opened["key_id"]), (b"old".to_vec(), &json!(other)));

    admin.call("DisableKey", json!({"key_id": key})).await.unwrap();
    assert_eq!(encrypt(&admin, &key, b"x").await.unwrap_err().reason, "KEY_DISABLED");
    assert_eq!(decrypt(&admin, &new).await.unwrap_err().reason, "KEY_DISABLED");
    admin.call("EnableKey", json!({"key_id": key})).await.unwrap();
    assert_eq!(decrypt(&admin, &new).await.unwrap(), b"new");
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    assert_eq!(encrypt(&admin, &key, b"x").await.unwrap_err().reason, "KEY_REVOKED");
    assert_eq!(decrypt(&admin, &new).await.unwrap_err().reason, "KEY_REVOKED");

    // A staged version waits.
    let staged = admin.create(json!({})).await;
    let body = json!({"key_id": staged, "strategy": "ROTATION_STRATEGY_STAGED"});
    admin.call("RotateKey", body).await.unwrap();
    let body = json!({"key_id": staged, "plaintext": "eA==", "version": 2});
    assert_eq!(admin.call("Encrypt", body).await.unwrap_err().reason, "VERSION_STAGED");
    let body = json!({"key_id": staged, "plaintext": "eA=="});
    assert_eq!(admin.call("Encrypt", body).await.unwrap()["version"], 1);

    // Signatures of an old version stay verifiable.
    let signer = admin.create(json!({"key_type": "KEY_TYPE_ED25519"})).await;
    let body = json!({"key_id": signer, "message": "eA=="});
    let signed = admin.call("Sign", body).await.unwrap();
    admin.call("RotateKey", json!({"key_id": signer})).await.unwrap();
    for (version, valid) in [(1, true), (0, false), (2, false)] {
        let body = json!({"key_id": signer, "message": "eA==", "signature": signed["signature"], "version": version});
        assert_eq!(admin.call("Verify", body).await.unwrap()["valid"], valid, "{version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn others_use_a_key_that_is_shared_with_them_and_do_not_see_any_other() {
    let server = Server::dev();
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let b = server.client(&admin, "user-b", &["user"]).await;
    let operator = server.client(&admin, "op", &["operator"]).await;
    let key = a.create(json!({"exportable": true})).await;
    let sealed = encrypt(&a, &key, b"mine").await.unwrap();
    refused(encrypt(&b, &key, b"x").await, Code::NotFound);
    refused(decrypt(&b, &sealed).await, Code::NotFound);
    // Whoever keeps keys alive does not work with them.
    refused(encrypt(&operator, &key, b"x").await, Code::PermissionDenied);
    refused(decrypt(&operator, &sealed).await, Code::PermissionDenied);
    a.call("UpdateKeyMetadata", json!({"key_id": key, "contexts_to_add": ["user-b"]}))
        .await
        .unwrap();
    assert_eq!(decrypt(&b, &sealed).await.unwrap(), b"mine");
    // To use is not to export: not even wrapped under a key of one's own.
    let kek = b.create(json!({"purpose": "KEY_PURPOSE_WRAP"})).await;
    let wrap = json!({"key_id": kek, "target_key_id": key});
    refused(b.call("WrapKey", wrap).await, Code::PermissionDenied);
    let own = a.create(json!({"purpose": "KEY_PURPOSE_WRAP"})).await;
    let wrapped = a.call("WrapKey", json!({"key_id": own, "target_key_id": key})).await.unwrap();
    assert!(wrapped["audit_index"].as_u64().unwrap() > 0);
    let closed = a.create(json!({})).await;
    let fail =
        a.call("WrapKey", json!({"key_id": own, "target_key_id": closed})).await.unwrap_err();
    assert_eq!(fail.reason, "NOT_EXPORTABLE");
    // A policy can take one right away and leave the others.
    let policy = "forbid (principal, action == Action::\"Decrypt\", resource == ?resource) when { principal.id == \"user-b\" };";
    let body = json!({"key_id": key, "policies_to_update": {"seal-only": policy}});
    a.call("UpdateKeyMetadata", body).await.unwrap();
    refused(decrypt(&b, &sealed).await, Code::PermissionDenied);
    encrypt(&b, &key, b"x").await.unwrap();
    // A way round would be to move the plaintext under a key of one's own.
    let mine = b.create(json!({})).await;
    let body = json!({"ciphertext": sealed, "context": {"a": "b"}, "destination_key_id": mine});
    refused(b.call("Rewrap", body).await, Code::PermissionDenied);
    // Who did what is on record, with the context, and with failures.
    let wrong = json!({"ciphertext": sealed, "context": {"a": "c"}});
    refused(a.call("Decrypt", wrong).await, Code::InvalidArgument);
    let used = async || {
        let body = json!({"key_id": key, "page_size": 100});
        admin.call("GetKeyHistory", body).await.unwrap()["events"].as_array().unwrap().clone()
    };
    let mut events = used().await;
    for _ in 0..200 {
        if events.iter().any(|e| e["outcome"] == "AUDIT_OUTCOME_FAILED") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        events = used().await;
    }
    let found = |action: &str, outcome: &str| {
        let outcome = format!("AUDIT_OUTCOME_{outcome}");
        events.iter().find(|e| e["action"] == action && e["outcome"] == outcome.as_str())
    };
    assert_eq!(found("Encrypt", "SUCCESS").unwrap()["details"]["context.a"], "b", "{events:#?}");
    assert!(found("Decrypt", "FAILED").is_some(), "{events:#?}");
    assert!(found("Decrypt", "DENIED").is_some(), "{events:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn data_keys_are_shown_only_when_asked_for() {
    let server = Server::dev();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    for bits in [128, 256, 512] {
        let body = json!({"key_id": key, "bits": bits, "context": {"a": "b"}});
        let made = admin.call("GenerateDataKey", body).await.unwrap();
        assert_eq!(bytes(&made["plaintext"]).len() * 8, bits);
        assert!(made["audit_index"].as_u64().unwrap() > 0);
        let opened = decrypt(&admin, made["ciphertext"].as_str().unwrap()).await.unwrap();
        assert_eq!(opened, bytes(&made["plaintext"]));
    }
    let body = json!({"key_id": key, "without_plaintext": true, "context": {"a": "b"}});
    let made = admin.call("GenerateDataKey", body).await.unwrap();
    assert_eq!(made["plaintext"], "");
    assert_eq!(decrypt(&admin, made["ciphertext"].as_str().unwrap()).await.unwrap().len(), 32);
    let body = json!({"key_id": key, "key_pair_type": "KEY_TYPE_ED25519", "context": {"a": "b"}});
    let pair = admin.call("GenerateDataKey", body).await.unwrap();
    let opened = decrypt(&admin, pair["ciphertext"].as_str().unwrap()).await.unwrap();
    assert_eq!(opened, bytes(&pair["plaintext"]));
    assert!(bytes(&pair["public_key_der"]).len() > 32);
    let random = admin.call("GenerateRandom", json!({"length": 100})).await.unwrap();
    assert_eq!(bytes(&random["random"]).len(), 100);
}
