//! Bad, expired, foreign and mismatched certificates, keys and tokens: UNAUTHENTICATED, in one text.

use std::collections::BTreeSet;
use std::time::Duration;

use polykey::net::client::ClientFiles;
use polykey::pki::{Authority, KeyKind, Validity};
use rcgen::{CertificateParams, SanType};
use serde_json::{Value, json};
use tonic::Code;

use crate::common::client::{Client, Fail, Meta, refused};
use crate::common::{PATIENCE, Server};
use crate::go_lifecycle::after;
use crate::go_node::{forge, keep};

/// Collects refusals and what was not one.
#[derive(Default)]
struct Cases {
    tried: usize,
    texts: BTreeSet<String>,
    problems: Vec<String>,
}

impl Cases {
    fn saw(&mut self, what: &str, fail: Result<Value, Fail>) {
        self.tried += 1;
        match fail {
            Ok(reply) => self.problems.push(format!("{what}: accepted: {reply}")),
            Err(fail) if fail.code == Code::Unauthenticated => {
                self.texts.insert(fail.text.clone());
                if !fail.violations.is_empty() || !fail.reason.is_empty() {
                    self.problems.push(format!("{what}: details {fail:?}"));
                }
            }
            Err(fail) => self.problems.push(format!("{what}: {:?} {}", fail.code, fail.text)),
        }
    }

    /// A connection that must not come about.
    fn shut(&mut self, what: &str, fail: Result<Value, Fail>) {
        self.tried += 1;
        match fail {
            Ok(reply) => self.problems.push(format!("{what}: accepted: {reply}")),
            Err(fail)
                if matches!(
                    fail.code,
                    Code::Unauthenticated | Code::Unavailable | Code::Unknown | Code::Cancelled
                ) => {}
            Err(fail) => self.problems.push(format!("{what}: {fail:?}")),
        }
    }

    async fn header(&mut self, what: &str, client: &Client, headers: &[&[u8]]) {
        let meta: Vec<(&str, &[u8])> = headers.iter().map(|h| ("authorization", *h)).collect();
        let meta: Meta<'_> = &meta;
        let client = client.with_token("");
        for method in ["ListKeys", "WhoAmI"] {
            let reply = client.call_with(method, json!({}), meta).await;
            self.saw(&format!("{what} ({method})"), reply.map(|r| r.body));
        }
    }

    async fn token(&mut self, what: &str, client: &Client, token: &str) {
        self.header(what, client, &[format!("Bearer {token}").as_bytes()]).await;
    }

    fn finish(self, at_least: usize) {
        assert!(
            self.problems.is_empty(),
            "{} of {}:\n{}",
            self.problems.len(),
            self.tried,
            self.problems.join("\n")
        );
        assert_eq!(self.texts.len(), 1, "{:?}", self.texts);
        assert!(self.tried >= at_least, "only {} cases", self.tried);
    }
}

fn unlimited(config: String) -> String {
    format!("{config}\n[login]\naddress_burst = 10000\nclient_burst = 10000\n")
}

/// `v4.public.PAYLOAD.FOOTER` with one bit of the payload and signature, or of the footer, changed.
fn flipped(token: &str, footer: bool, at: f64) -> String {
    use data_encoding::BASE64URL_NOPAD as B64;
    let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
    let part = if footer { &mut parts[3] } else { &mut parts[2] };
    let mut bytes = B64.decode(part.as_bytes()).unwrap();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "0 to 1 of a length"
    )]
    let index = ((bytes.len() - 1) as f64 * at) as usize;
    bytes[index] ^= 1;
    *part = B64.encode(&bytes);
    parts.join(".")
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_not_good_are_refused_in_one_text() {
    let server = Server::dev_configured(unlimited);
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let b = server.client(&admin, "user-b", &["user"]).await;
    let mut cases = Cases::default();
    let good = a.token.clone();
    let bearer = format!("Bearer {good}");

    cases.header("no header", &a, &[]).await;
    cases.header("an empty header", &a, &[b""]).await;
    cases.header("the scheme alone", &a, &[b"Bearer"]).await;
    cases.header("the scheme and a blank", &a, &[b"Bearer "]).await;
    cases.header("two good headers", &a, &[bearer.as_bytes(), bearer.as_bytes()]).await;
    cases.header("good and bad", &a, &[bearer.as_bytes(), b"Bearer x"]).await;
    cases.header("bad and good", &a, &[b"Bearer x", bearer.as_bytes()]).await;
    cases.header("two in one header", &a, &[format!("{bearer}, {bearer}").as_bytes()]).await;
    cases.header("no scheme", &a, &[good.as_bytes()]).await;
    cases.header("not ASCII", &a, &[b"Bearer \xff\xfe\x80"]).await;
    cases.header("not ASCII before it", &a, &[format!("\u{e4}{bearer}").as_bytes()]).await;
    for scheme in ["Basic", "Token", "PASETO", "Bearer:", "Bea rer"] {
        cases.header(scheme, &a, &[format!("{scheme} {good}").as_bytes()]).await;
    }
    cases.token("too long", &a, &"x".repeat(20_000)).await;
    for cut in [1, 9, 10, good.len() / 3, good.len() / 2, good.len() - 40, good.len() - 1] {
        cases.token(&format!("truncated to {cut}"), &a, &good[..cut]).await;
    }
    cases.token("longer", &a, &format!("{good}A")).await;
    cases.token("padded", &a, &format!("{good}=")).await;
    for version in
        ["v4.local.", "v3.public.", "v2.public.", "v1.public.", "V4.PUBLIC.", "k4.public."]
    {
        cases.token(version, &a, &good.replacen("v4.public.", version, 1)).await;
    }
    for at in [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0] {
        cases
            .token(&format!("payload or signature flipped at {at}"), &a, &flipped(&good, false, at))
            .await;
        cases.token(&format!("footer flipped at {at}"), &a, &flipped(&good, true, at)).await;
    }
    let parts: Vec<&str> = good.split('.').collect();
    cases.token("no footer", &a, &parts[..3].join(".")).await;
    cases.token("a footer of nothing", &a, &format!("{}.", parts[..3].join("."))).await;
    cases.token("a fifth part", &a, &format!("{good}.x")).await;
    let jwt = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.";
    cases.token("a JWT without a signature", &a, jwt).await;
    cases.token("the refresh token", &a, &a.refresh).await;
    cases.token("the API key", &a, &a.api_key).await;
    cases.token("another's over this connection", &a, &b.token).await;
    cases.token("this one's over another's", &b, &good).await;
    cases.token("an administrator's", &a, &admin.token).await;

    // The same client with a renewed certificate is not whom the token was given to.
    let renewed = a.with_files(server.certificate(&admin, "user-a", "user-a-2").await);
    cases.token("with a renewed certificate", &renewed, &good).await;
    // Another node's, of a client of the same name.
    let elsewhere = Server::dev();
    let other = elsewhere.client(&elsewhere.admin().await, "user-a", &["user"]).await;
    cases.token("another node's", &a, &other.token).await;
    let refresh =
        a.with_token("").call("RefreshToken", json!({"refresh_token": other.refresh})).await;
    cases.saw("another node's refresh token", refresh);
    let refresh = a.with_token("").call("RefreshToken", json!({"refresh_token": good})).await;
    cases.saw("an access token as refresh token", refresh);
    let refresh = b.with_token("").call("RefreshToken", json!({"refresh_token": a.refresh})).await;
    cases.saw("another's refresh token", refresh);
    a.call("ListKeys", json!({})).await.unwrap();

    // What was good until something was revoked, disabled, changed or removed.
    a.call("RevokeToken", json!({"access_token": good})).await.unwrap();
    cases.token("revoked", &a, &good).await;
    let mut a = a;
    a.login().await.unwrap();
    a.call("RevokeToken", json!({"access_token": a.refresh})).await.unwrap();
    cases.token("its login was revoked", &a, &a.token).await;
    let reply = a.with_token("").call("RefreshToken", json!({"refresh_token": a.refresh})).await;
    cases.saw("a revoked refresh token", reply);
    a.login().await.unwrap();
    admin.call("RevokeClientTokens", json!({"client_id": "user-a"})).await.unwrap();
    cases.token("all of the client's were revoked", &a, &a.token).await;
    a.login().await.unwrap();
    admin.call("DisableClient", json!({"client_id": "user-a"})).await.unwrap();
    cases.token("the client is disabled", &a, &a.token).await;
    cases.saw("login of a disabled client", a.clone().login().await);
    let reply = a.with_token("").call("RefreshToken", json!({"refresh_token": a.refresh})).await;
    cases.saw("refresh of a disabled client", reply);
    admin.call("EnableClient", json!({"client_id": "user-a"})).await.unwrap();
    a.login().await.unwrap();
    let identity = json!({"kind": "CERTIFICATE_IDENTITY_KIND_SPIFFE_URI", "value": polykey::pki::client_identity("user-a").unwrap().to_string()});
    let another = json!({"kind": "CERTIFICATE_IDENTITY_KIND_DNS", "value": "a.example.org"});
    let change = json!({"client_id": "user-a", "identities_to_remove": [identity], "identities_to_add": [another]});
    admin.call("UpdateClient", change).await.unwrap();
    cases.token("its certificate is the client's no more", &a, &a.token).await;
    cases.saw("login with a certificate that is the client's no more", a.clone().login().await);
    admin.call("RemoveClient", json!({"client_id": "user-b"})).await.unwrap();
    cases.token("the client is removed", &b, &b.token).await;
    cases.saw("login of a removed client", b.clone().login().await);
    cases.finish(110);
    assert!(!server.output().contains("panicked"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_certificates_that_are_not_good_are_refused_in_one_text() {
    let server = Server::dev_configured(unlimited);
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let b = server.client(&admin, "user-b", &["user"]).await;
    let mut cases = Cases::default();
    let login = |client: &Client, id: &str, key: &str, grant: &str| {
        let client = client.with_token("");
        let body = json!({"client_id": id, "api_key": key, "grant_type": grant});
        async move { client.call("Authenticate", body).await }
    };
    let key = a.api_key.clone();
    let mut swapped = key.clone().into_bytes();
    let last = swapped.len() - 1;
    swapped[last] = if swapped[last] == b'a' { b'b' } else { b'a' };
    let swapped = String::from_utf8(swapped).unwrap();
    for (what, id, api_key, grant) in [
        ("a wrong key", "user-a", "wrong", ""),
        ("a truncated key", "user-a", &key[..key.len() - 1], ""),
        ("a longer key", "user-a", &format!("{key}a"), ""),
        ("a key with a blank", "user-a", &format!("{key} "), ""),
        ("a changed key", "user-a", &swapped, ""),
        ("another's key", "user-a", &b.api_key, ""),
        ("an upper-case key", "user-a", &key.to_uppercase(), ""),
        ("a prefix", "user-a", &key[..8], ""),
        ("an unknown client", "user-x", &key, ""),
        ("an upper-case client", "USER-A", &key, ""),
        ("a client with a blank", "user-a ", &key, ""),
        ("a client with a NUL", "user-a\0", &key, ""),
        ("another client, its own key", "user-b", &b.api_key, ""),
        ("another client by certificate", "user-b", "", "mtls"),
        ("an administrator by certificate", "admin", "", "mtls"),
        ("an administrator by key", "admin", &admin.api_key, ""),
    ] {
        let reply = login(&a, id, api_key, grant).await;
        cases.saw(what, reply);
    }
    for (id, api_key, field) in [("user-a", "", "api_key"), ("", key.as_str(), "client_id")] {
        let fail = refused(login(&a, id, api_key, "").await, Code::InvalidArgument);
        assert_eq!(fail.violations[0].0, field);
    }
    login(&a, "user-a", &key, "").await.unwrap();
    login(&a, "user-a", "", "mtls").await.unwrap();

    // Rotation: at once without an overlap, later with one.
    let rotate = json!({"client_id": "user-a", "overlap_seconds": 3});
    let fresh = admin.call("RotateClientApiKey", rotate).await.unwrap();
    let fresh = fresh["api_key"].as_str().unwrap().to_owned();
    login(&a, "user-a", &fresh, "").await.unwrap();
    let begin = tokio::time::Instant::now();
    while login(&a, "user-a", &key, "").await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "the old key still works");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cases.saw("a rotated key after its overlap", login(&a, "user-a", &key, "").await);
    login(&a, "user-a", &fresh, "").await.unwrap();
    admin.call("RotateClientApiKey", json!({"client_id": "user-a"})).await.unwrap();
    cases.saw("a rotated key without an overlap", login(&a, "user-a", &fresh, "").await);
    let short = json!({"roles": ["user"], "api_key_expires_at": after(3)});
    let short = server.stranger(&admin, "short", short).await;
    let begin = tokio::time::Instant::now();
    while login(&short, "short", &short.api_key, "").await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "the key never expires");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    cases.saw("an expired key", login(&short, "short", &short.api_key, "").await);

    // Certificates of the right authority that are nobody's, or another's.
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    type Shape = Box<dyn FnOnce(&mut CertificateParams)>;
    let shapes: Vec<(&str, Shape)> = vec![
        ("no names", Box::new(|_| ())),
        (
            "a client that does not exist",
            Box::new(move |p| {
                p.subject_alt_names.push(uri("spiffe://polykey.local/client/nobody"))
            }),
        ),
        (
            "another trust domain",
            Box::new(move |p| p.subject_alt_names.push(uri("spiffe://example.org/client/user-a"))),
        ),
        (
            "not a SPIFFE ID",
            Box::new(move |p| p.subject_alt_names.push(uri("https://polykey.local/client/user-a"))),
        ),
        (
            "a mail address",
            Box::new(|p| {
                p.subject_alt_names
                    .push(SanType::Rfc822Name("user-a@polykey.local".try_into().unwrap()))
            }),
        ),
        (
            "a DNS name",
            Box::new(|p| p.subject_alt_names.push(SanType::DnsName("user-a".try_into().unwrap()))),
        ),
        (
            "two SPIFFE IDs",
            Box::new(move |p| {
                p.subject_alt_names.extend([
                    uri("spiffe://polykey.local/client/user-a"),
                    uri("spiffe://polykey.local/client/admin"),
                ])
            }),
        ),
    ];
    for (what, shape) in shapes {
        let files = forge(&server, &what.replace(' ', "-"), shape);
        let client = a.with_files(files);
        cases.shut(&format!("{what}, token"), client.call("ListKeys", json!({})).await);
        cases.shut(&format!("{what}, key"), login(&client, "user-a", &fresh, "").await);
        cases.shut(&format!("{what}, mtls"), login(&client, "user-a", "", "mtls").await);
    }

    // Certificates that the handshake refuses.
    let now = std::time::SystemTime::now();
    let day = |n: u64| Duration::from_secs(n * 86_400);
    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    let read = |file: &str| server.state.join(file);
    let authority = Authority::load(&read("ca.pem"), &read("ca.key")).unwrap();
    let good = Validity::days(now, 30).unwrap();
    let (foreign, _) = Authority::create("Foreign", KeyKind::P256, good).unwrap();
    for (what, issuer, validity) in [
        (
            "expired",
            &authority,
            Validity::between(
                since.checked_sub(day(9)).unwrap(),
                since.checked_sub(day(2)).unwrap(),
            ),
        ),
        ("not valid yet", &authority, Validity::between(since + day(2), since + day(9))),
        ("a foreign authority's", &foreign, good),
    ] {
        let issued = issuer.client("user-a", KeyKind::P256, validity).unwrap();
        let files = keep(
            &server,
            &what.replace(' ', "-"),
            &issued.certificate,
            issued.key.as_ref().unwrap(),
        );
        cases.shut(what, a.with_files(files).call("HealthCheck", json!({})).await);
    }
    let no_client = forge(&server, "server-usage", move |p| {
        p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        p.subject_alt_names.push(uri("spiffe://polykey.local/client/user-a"));
    });
    cases.shut(
        "a server's certificate",
        a.with_files(no_client).call("HealthCheck", json!({})).await,
    );
    let own = rcgen::generate_simple_self_signed(vec!["user-a".to_owned()]).unwrap();
    let files: ClientFiles =
        keep(&server, "own", &own.cert.pem(), &own.signing_key.serialize_pem());
    cases.shut("self-signed", a.with_files(files).call("HealthCheck", json!({})).await);
    cases.shut("none at all", without_certificate(&server).await);
    cases.finish(40);
    assert!(!server.output().contains("panicked"));
}

/// HealthCheck over TLS without a client certificate.
async fn without_certificate(server: &Server) -> Result<Value, Fail> {
    use polykey::net::client::{ClientTls, ConnectOptions};
    use rustls_pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    let pem = std::fs::read(server.state.join("ca.pem")).unwrap();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let channel = ClientTls::from_config(std::sync::Arc::new(config))
        .connect_lazy(&format!("https://{}", server.address), &ConnectOptions::default())
        .unwrap();
    let admin = server.admin().await;
    Client { channel, token: String::new(), ..admin }.call("HealthCheck", json!({})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_expire_by_the_configuration_and_refresh_tokens_work_once() {
    let server = Server::dev_configured(|text| {
        format!("{text}\n[tokens]\naccess_ttl = \"1m\"\nrefresh_ttl = \"5m\"\n")
    });
    let admin = server.admin().await;
    let a = server.client(&admin, "user-a", &["user"]).await;
    let refresh = |token: &str| {
        let (client, body) = (a.with_token(""), json!({"refresh_token": token}));
        async move { client.call("RefreshToken", body).await }
    };
    let text = |reply: &Value, name: &str| reply[name].as_str().unwrap().to_owned();
    // A lost reply: the same successor, twice.
    let one = refresh(&a.refresh).await.unwrap();
    let two = refresh(&a.refresh).await.unwrap();
    assert_eq!(text(&one, "refresh_token"), text(&two, "refresh_token"));
    let alive = a.with_token(&text(&one, "access_token"));
    alive.call("ListKeys", json!({})).await.unwrap();
    // Later, the same again is theft: every token of that login dies.
    let begin = tokio::time::Instant::now();
    while refresh(&a.refresh).await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "a refresh token works for ever");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!(begin.elapsed() > Duration::from_secs(5), "refused while a reply may have been lost");
    refused(refresh(&text(&one, "refresh_token")).await, Code::Unauthenticated);
    refused(alive.call("ListKeys", json!({})).await, Code::Unauthenticated);
    // Another login of the client is another family, and ends by the clock.
    let mut again = a.clone();
    let login = again.login().await.unwrap();
    assert_eq!(login["expires_in"], 60);
    let begin = tokio::time::Instant::now();
    while again.call("ListKeys", json!({})).await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "the token never expires");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert!(begin.elapsed() > Duration::from_secs(50), "it expired after {:?}", begin.elapsed());
    refused(again.call("ListKeys", json!({})).await, Code::Unauthenticated);
}
