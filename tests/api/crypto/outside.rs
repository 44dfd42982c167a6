//! What comes from outside: imported material, and signatures and keys that OpenSSL shares with us.

use serde_json::{Value, json};
use tonic::Code;

use super::{b64, bytes, says_nothing};
use crate::common::Server;
use crate::common::client::{Client, refused};

#[tokio::test(flavor = "multi_thread")]
async fn material_from_outside_works_here_and_its_one_time_key_works_once() {
    let server = Server::dev();
    let admin = server.admin().await;
    let user = server.client(&admin, "user-a", &["user"]).await;
    let secret = [9u8; 32];
    let import = |kind: &str, wrapping: &str, token: &Value, material: &[u8]| json!({"key": {"key_type": kind}, "wrapping": wrapping, "import_token": token, "material": b64(material)});
    let none = json!("");
    let plain = import("KEY_TYPE_HMAC_SHA256", "IMPORT_WRAPPING_PLAIN", &none, &secret);
    refused(user.call("ImportKey", plain.clone()).await, Code::PermissionDenied);
    let made = admin.call("ImportKey", plain).await.unwrap();
    assert_eq!(made["key"]["metadata"]["origin"], "KEY_ORIGIN_IMPORTED");
    let key = made["key"]["key_id"].clone();
    let mac =
        admin.call("GenerateMac", json!({"key_id": key, "message": b64(b"m")})).await.unwrap();
    let expected = {
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &secret);
        aws_lc_rs::hmac::sign(&key, b"m").as_ref().to_vec()
    };
    assert_eq!(bytes(&mac["mac"]), expected);

    // With HPKE, by a user.
    let body = json!({"wrapping": "IMPORT_WRAPPING_HPKE"});
    let one_time = user.call("GetImportParameters", body.clone()).await.unwrap();
    let to: [u8; 32] = bytes(&one_time["public_key"]).try_into().unwrap();
    let material = polykey_hsm::KeyMaterial::from_secret(secret.to_vec()).unwrap();
    let info = bytes(&one_time["hpke_info"]);
    let wrapped = polykey_hsm::import::wrap_hpke_to(&to, &info, &material).unwrap();
    let token = &one_time["import_token"];
    let good = import("KEY_TYPE_HMAC_SHA256", "IMPORT_WRAPPING_HPKE", token, &wrapped);
    // Of another client, or for something else, the token is none.
    let fail = refused(admin.call("ImportKey", good.clone()).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "import_token");
    let mut changed = wrapped.clone();
    *changed.last_mut().unwrap() ^= 1;
    let bad = import("KEY_TYPE_HMAC_SHA256", "IMPORT_WRAPPING_HPKE", token, &changed);
    says_nothing(&refused(user.call("ImportKey", bad).await, Code::InvalidArgument));
    let bad = import("KEY_TYPE_AES_128", "IMPORT_WRAPPING_HPKE", token, &wrapped);
    let fail = refused(user.call("ImportKey", bad).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "material");
    let made = user.call("ImportKey", good.clone()).await.unwrap();
    let id = made["key"]["key_id"].clone();
    let mac = user.call("GenerateMac", json!({"key_id": id, "message": b64(b"m")})).await.unwrap();
    assert_eq!(bytes(&mac["mac"]), expected);
    let fail = refused(user.call("ImportKey", good).await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "import_token", "used twice");
    refused(user.call("RotateKey", json!({"key_id": id, "strategy": "ROTATION_STRATEGY_SCHEDULED", "generation_params": {"rotation_period_seconds": "3600"}})).await, Code::InvalidArgument);

    // With RSA and AES, at once by many: one wins.
    let body = json!({"wrapping": "IMPORT_WRAPPING_RSA_AES"});
    let one_time = user.call("GetImportParameters", body).await.unwrap();
    let rsa = polykey_hsm::Algorithm::Rsa4096;
    let public = polykey_hsm::PublicKey::from_spki(rsa, &bytes(&one_time["public_key"])).unwrap();
    let material = polykey_hsm::KeyMaterial::from_secret(secret.to_vec()).unwrap();
    let wrapped = polykey_hsm::import::wrap_rsa_aes(&public, &material).unwrap();
    let token = &one_time["import_token"];
    let good = import("KEY_TYPE_HMAC_SHA256", "IMPORT_WRAPPING_RSA_AES", token, &wrapped);
    let calls = (0..8).map(|_| user.call("ImportKey", good.clone()));
    let results = futures::future::join_all(calls).await;
    assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1, "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_a_one_time_key_that_is_repeated_gets_the_same_one() {
    let server = Server::dev();
    let admin = server.admin().await;
    let user = server.client(&admin, "user-a", &["user"]).await;
    let once = async |client: &Client, key: &str, wrapping: &str| {
        let body = json!({"wrapping": format!("IMPORT_WRAPPING_{wrapping}")});
        let meta = [("idempotency-key", key.as_bytes())];
        client.call_with("GetImportParameters", body, &meta).await.map(|reply| reply.body)
    };
    for (key, wrapping) in [("one", "HPKE"), ("two", "RSA_AES")] {
        let both = futures::join!(once(&user, key, wrapping), once(&user, key, wrapping));
        let (first, same) = (both.0.unwrap(), both.1.unwrap());
        assert_eq!(first, same, "at the same time");
        assert_eq!(once(&user, key, wrapping).await.unwrap(), first, "later");
        // Another caller's keys are its own, and a request without a key is always a new one.
        let theirs = once(&admin, key, wrapping).await.unwrap();
        assert_ne!(theirs["import_token"], first["import_token"]);
    }
    let body = json!({"wrapping": "IMPORT_WRAPPING_HPKE"});
    let another = user.call("GetImportParameters", body).await.unwrap();
    let first = once(&user, "one", "HPKE").await.unwrap();
    assert_ne!(another["import_token"], first["import_token"]);
    let fail = refused(once(&user, "one", "RSA_AES").await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "idempotency-key", "a different request");
    // It serves one import, and is not given again after that.
    let to: [u8; 32] = bytes(&first["public_key"]).try_into().unwrap();
    let material = polykey_hsm::KeyMaterial::from_secret(vec![9; 32]).unwrap();
    let wrapped =
        polykey_hsm::import::wrap_hpke_to(&to, &bytes(&first["hpke_info"]), &material).unwrap();
    let import = json!({
        "key": {"key_type": "KEY_TYPE_HMAC_SHA256"},
        "wrapping": "IMPORT_WRAPPING_HPKE",
        "import_token": first["import_token"],
        "material": b64(&wrapped),
    });
    user.call("ImportKey", import).await.unwrap();
    let fail = refused(once(&user, "one", "HPKE").await, Code::InvalidArgument);
    assert_eq!(fail.violations[0].0, "idempotency-key");
    assert!(fail.violations[0].1.contains("used up"), "{fail:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn openssl_and_the_command_line_agree() {
    let openssl = |args: &[&str]| std::process::Command::new("openssl").args(args).output();
    if openssl(&["version"]).is_err() {
        crate::common::skip("openssl_and_the_command_line_agree", "there is no openssl");
        return;
    }
    let server = Server::dev();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(path("message"), b"what is signed").unwrap();
    let run = |args: &[&str]| {
        let (code, out, err) = server.cli(args);
        assert_eq!(code, 0, "{args:?}: {err}");
        out
    };
    for (kind, digest) in
        [("ecdsa-p256", "-sha256"), ("rsa-2048", "-sha256"), ("ecdsa-p384", "-sha384")]
    {
        let alias = format!("alias/{kind}");
        run(&["key", "create", "--type", kind, "--alias", kind]);
        run(&["sign", "--key", &alias, "--in", &path("message"), "--out", &path("signature")]);
        run(&["public-key", "--key", &alias, "--out", &path("public.pem")]);
        let mut args = vec!["dgst", digest, "-verify"];
        let (public, signature, message) = (path("public.pem"), path("signature"), path("message"));
        args.extend([public.as_str(), "-signature", &signature]);
        if kind.starts_with("rsa") {
            args.extend(["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"]);
        }
        args.push(&message);
        let verified = openssl(&args).unwrap();
        assert!(verified.status.success(), "{kind}: {verified:?}");
        let out = run(&["verify", "--key", &alias, "--in", &message, "--signature", &signature]);
        assert!(out.contains("valid"), "{out}");
        std::fs::write(path("other"), b"something else").unwrap();
        let (code, out, _) = server.cli(&[
            "verify",
            "--key",
            &alias,
            "--in",
            &path("other"),
            "--signature",
            &signature,
        ]);
        assert_eq!((code, out.contains("NOT VALID")), (7, true));
    }
    // A key of OpenSSL's, taken over.
    let made = openssl(&[
        "genpkey",
        "-algorithm",
        "EC",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-out",
        &path("own.pem"),
    ])
    .unwrap();
    assert!(made.status.success(), "{made:?}");
    run(&["import", "--type", "ecdsa-p256", "--alias", "taken", "--in", &path("own.pem")]);
    run(&["sign", "--key", "alias/taken", "--in", &path("message"), "--out", &path("signature")]);
    let public =
        openssl(&["pkey", "-in", &path("own.pem"), "-pubout", "-out", &path("own.pub")]).unwrap();
    assert!(public.status.success());
    let verified = openssl(&[
        "dgst",
        "-sha256",
        "-verify",
        &path("own.pub"),
        "-signature",
        &path("signature"),
        &path("message"),
    ])
    .unwrap();
    assert!(verified.status.success(), "{verified:?}");
}
