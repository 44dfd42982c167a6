//! Every kind of client certificate, as a table: whether a request of its holder is served.

use std::sync::Arc;
use std::time::Duration;

use polykey::net::NetConfig;
use polykey::pki::KeyKind;
use rcgen::string::{BmpString, TeletexString};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, DnValue,
    ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    NameConstraints, SanType, date_time_ymd,
};
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::support::{Identity, NOW, TestCa, TestServer, good, validity};

const FIXTURE_CA: &str = include_str!("data/ca.pem");
const URI: &str = "spiffe://polykey.local/client/alice";

/// Without the periodic look at open connections, so that it is the request that finds out.
fn quiet() -> NetConfig {
    NetConfig { recheck_interval: Duration::from_secs(3600), ..NetConfig::default() }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

/// A sound client certificate, to be spoiled in one respect.
fn sound(from: u64, until: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(from);
    params.not_after = epoch + Duration::from_secs(until);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "alice");
    params.subject_alt_names = vec![uri(URI)];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params
}

fn with(spoil: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = sound(NOW - 1000, NOW + 1000);
    spoil(&mut params);
    params
}

fn named(value: impl Into<DnValue>) -> CertificateParams {
    with(|params| {
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, value);
    })
}

fn intermediate(
    limit: BasicConstraints,
    spoil: impl FnOnce(&mut CertificateParams),
) -> CertificateParams {
    with(|params| {
        params.is_ca = IsCa::Ca(limit);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.extended_key_usages = Vec::new();
        params.subject_alt_names = Vec::new();
        params.distinguished_name.push(DnType::CommonName, "intermediate");
        spoil(params);
    })
}

/// A leaf below `cas`, the first of which is below `root`; the presented chain is leaf first.
fn below(root: &TestCa, cas: Vec<CertificateParams>, leaf: CertificateParams) -> Identity {
    let mut issuer = root.issuer();
    let mut chain = Vec::new();
    for (depth, mut params) in cas.into_iter().enumerate() {
        params.distinguished_name.push(DnType::OrganizationName, format!("level {depth}"));
        let key = KeyPair::generate().unwrap();
        chain.insert(0, params.signed_by(&key, &issuer).unwrap().der().clone());
        issuer = Issuer::new(params, key);
    }
    let key = KeyPair::generate().unwrap();
    chain.insert(0, leaf.signed_by(&key, &issuer).unwrap().der().clone());
    Identity::new(chain, PrivateKeyDer::try_from(key.serialize_der()).unwrap())
}

fn with_key(root: &TestCa, key: &KeyPair) -> Identity {
    let certificate = with(|_| {}).signed_by(key, &root.issuer()).unwrap();
    Identity::new(
        vec![certificate.der().clone()],
        PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    )
}

fn self_signed(params: &CertificateParams) -> Identity {
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    Identity::new(
        vec![certificate.der().clone()],
        PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    )
}

fn fixture(pem: &str) -> Identity {
    let chain = vec![CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).unwrap();
    match rustls::crypto::aws_lc_rs::sign::any_supported_type(&key) {
        Ok(key) => Identity::with_signer(chain, key),
        Err(_) => Identity::with_signer(chain, Arc::new(Pretender)),
    }
}

/// Signs nonsense in the name of RSA-PSS, for keys that no library here would use.
#[derive(Debug)]
struct Pretender;

impl SigningKey for Pretender {
    fn choose_scheme(&self, _: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        Some(Box::new(Self))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::RSA
    }
}

impl Signer for Pretender {
    fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        Ok(vec![0x5a; 128])
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::RSA_PSS_SHA256
    }
}

fn damaged(identity: &Identity, damage: impl FnOnce(&mut Vec<u8>)) -> Identity {
    let mut chain = identity.chain();
    let mut der = chain[0].to_vec();
    damage(&mut der);
    chain[0] = CertificateDer::from(der);
    identity.with_chain(chain)
}

/// A subject alternative name extension with these raw bytes as its value.
fn raw_names(value: &[u8]) -> CustomExtension {
    CustomExtension::from_oid_content(&[2, 5, 29, 17], value.to_vec())
}

fn sound_cases(ca: &TestCa) -> Vec<(&'static str, Identity)> {
    let free = BasicConstraints::Unconstrained;
    vec![
        ("P-256", ca.client("alice")),
        ("P-384", Identity::issued(&ca.authority.client("alice", KeyKind::P384, good()).unwrap())),
        ("Ed25519", with_key(ca, &KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap())),
        ("RSA-2048 with SHA-256", fixture(include_str!("data/sha256.pem"))),
        ("DNS name only", ca.sign(&with(|p| p.subject_alt_names = vec![dns("alice.example.org")]))),
        ("common name only", ca.sign(&with(|p| p.subject_alt_names = Vec::new()))),
        (
            "IP address name",
            ca.sign(&with(|p| {
                p.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())]
            })),
        ),
        ("no extended key usage", ca.sign(&with(|p| p.extended_key_usages = Vec::new()))),
        ("no key usage", ca.sign(&with(|p| p.key_usages = Vec::new()))),
        (
            "client and server usage",
            ca.sign(&with(|p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth))),
        ),
        ("last second", ca.sign(&sound(NOW - 1000, NOW))),
        ("first second", ca.sign(&sound(NOW, NOW + 1000))),
        ("intermediate", below(ca, vec![intermediate(free, |_| {})], with(|_| {}))),
        (
            "two intermediates",
            below(ca, vec![intermediate(free, |_| {}), intermediate(free, |_| {})], with(|_| {})),
        ),
        (
            "64 names",
            ca.sign(&with(|p| {
                p.subject_alt_names = (0..64).map(|n| dns(&format!("h{n}"))).collect()
            })),
        ),
        (
            "name constraints kept",
            below(
                ca,
                vec![constrained(true, "example.org")],
                with(|p| p.subject_alt_names = vec![dns("a.example.org")]),
            ),
        ),
    ]
}

fn constrained(permit: bool, domain: &str) -> CertificateParams {
    let subtree = vec![GeneralSubtree::DnsName(domain.to_owned())];
    let none = Vec::new();
    let (permitted_subtrees, excluded_subtrees) =
        if permit { (subtree, none) } else { (none, subtree) };
    intermediate(BasicConstraints::Unconstrained, |p| {
        p.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees });
    })
}

fn unsound_cases(ca: &TestCa, server: &TestServer) -> Vec<(&'static str, Identity)> {
    let free = BasicConstraints::Unconstrained;
    let (foreign, namesake) = (TestCa::new("Foreign authority"), TestCa::new("Test authority"));
    let alice = ca.client("alice");
    let mut doubled = DistinguishedName::new();
    doubled.push(DnType::CommonName, "alice");
    doubled.push(DnType::CustomDnType(vec![2, 5, 4, 3]), "root");
    let mut unknown = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 55555, 1], vec![5, 0]);
    unknown.set_criticality(true);
    let through = |params: CertificateParams| below(ca, vec![intermediate(free, |_| {})], params);
    let mut reversed = through(with(|_| {})).chain();
    reversed.reverse();
    let server_pem = std::fs::read_to_string(server.path("server.pem")).unwrap();
    let server_key = std::fs::read_to_string(server.path("server.key")).unwrap();
    let leaf_issuer = with(|_| {});
    let mut garbage_after = alice.chain();
    garbage_after.push(CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]));
    let mut with_stranger = alice.chain();
    with_stranger.extend(std::iter::repeat_n(foreign.der(), 12));
    vec![
        ("no certificate", Identity(None)),
        ("foreign authority", foreign.client("alice")),
        ("foreign authority of the same name", namesake.client("alice")),
        (
            "foreign certificate, our authority sent along",
            foreign
                .client("alice")
                .with_chain([foreign.client("alice").chain(), vec![ca.der()]].concat()),
        ),
        ("self-signed", self_signed(&with(|_| {}))),
        ("self-signed under the authority's name", self_signed(&named("Test authority"))),
        ("self-signed authority", self_signed(&intermediate(free, |_| {}))),
        ("expired", ca.sign(&sound(NOW - 2000, NOW - 1000))),
        ("expired a second ago", ca.sign(&sound(NOW - 2000, NOW - 1))),
        ("not valid yet", ca.sign(&sound(NOW + 1000, NOW + 2000))),
        ("valid in a second", ca.sign(&sound(NOW + 1, NOW + 2000))),
        ("ends before it begins", ca.sign(&sound(NOW + 1000, NOW - 1000))),
        (
            "server usage only",
            ca.sign(&with(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth])),
        ),
        (
            "code signing usage only",
            ca.sign(&with(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning])),
        ),
        (
            "any usage only",
            ca.sign(&with(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any])),
        ),
        (
            "the server's own certificate",
            Identity::new(
                vec![CertificateDer::from_pem_slice(server_pem.as_bytes()).unwrap()],
                PrivateKeyDer::from_pem_slice(server_key.as_bytes()).unwrap(),
            ),
        ),
        (
            "key agreement only",
            ca.sign(&with(|p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement])),
        ),
        ("the authority itself", Identity::new(vec![ca.der()], ca.key())),
        ("a leaf that is an authority", ca.sign(&with(|p| p.is_ca = IsCa::Ca(free)))),
        ("intermediate left out", {
            let full = through(with(|_| {}));
            full.with_chain(full.chain()[..1].to_vec())
        }),
        (
            "intermediate expired",
            below(
                ca,
                vec![intermediate(free, |p| p.not_after = date_time_ymd(2027, 1, 1))],
                with(|_| {}),
            ),
        ),
        (
            "intermediate not valid yet",
            below(
                ca,
                vec![intermediate(free, |p| p.not_before = date_time_ymd(2028, 6, 1))],
                with(|_| {}),
            ),
        ),
        ("issued by a leaf", below(ca, vec![leaf_issuer], with(|_| {}))),
        (
            "intermediate for servers only",
            below(
                ca,
                vec![intermediate(free, |p| {
                    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]
                })],
                with(|_| {}),
            ),
        ),
        (
            "path length exceeded",
            below(
                ca,
                vec![
                    intermediate(BasicConstraints::Constrained(0), |_| {}),
                    intermediate(free, |_| {}),
                ],
                with(|_| {}),
            ),
        ),
        (
            "ten intermediates",
            below(ca, (0..10).map(|_| intermediate(free, |_| {})).collect(), with(|_| {})),
        ),
        ("chain in reverse", through(with(|_| {})).with_chain(reversed)),
        (
            "name not permitted",
            below(
                ca,
                vec![constrained(true, "example.org")],
                with(|p| p.subject_alt_names = vec![dns("a.example.com")]),
            ),
        ),
        (
            "name excluded",
            below(
                ca,
                vec![constrained(false, "example.org")],
                with(|p| p.subject_alt_names = vec![dns("a.example.org")]),
            ),
        ),
        ("unknown critical extension", ca.sign(&with(|p| p.custom_extensions = vec![unknown]))),
        ("SHA-1 signature", fixture(include_str!("data/sha1.pem"))),
        ("RSA-1024", fixture(include_str!("data/rsa1024.pem"))),
        ("somebody else's key", ca.client("mallory").with_chain(alice.chain())),
        ("NUL in the common name", ca.sign(&named("alice\0.evil"))),
        ("line feed in the common name", ca.sign(&named("alice\nroot"))),
        ("empty common name", ca.sign(&named(""))),
        ("common name of 257 bytes", ca.sign(&named("a".repeat(257)))),
        ("two common names", ca.sign(&with(|p| p.distinguished_name = doubled))),
        (
            "BMP common name",
            ca.sign(&named(DnValue::BmpString(BmpString::try_from("alice").unwrap()))),
        ),
        (
            "teletex common name",
            ca.sign(&named(DnValue::TeletexString(TeletexString::try_from("alice").unwrap()))),
        ),
        (
            "NUL in a DNS name",
            ca.sign(&with(|p| p.subject_alt_names = vec![dns("alice\0.evil.org")])),
        ),
        ("empty DNS name", ca.sign(&with(|p| p.subject_alt_names = vec![dns("")]))),
        (
            "DNS name of 254 bytes",
            ca.sign(&with(|p| p.subject_alt_names = vec![dns(&"a.".repeat(127))])),
        ),
        (
            "space in a URI",
            ca.sign(&with(|p| {
                p.subject_alt_names = vec![uri("spiffe://polykey.local/client/alice root")]
            })),
        ),
        (
            "NUL in a URI",
            ca.sign(&with(|p| {
                p.subject_alt_names = vec![uri("spiffe://polykey.local/client/alice\0")]
            })),
        ),
        ("empty URI", ca.sign(&with(|p| p.subject_alt_names = vec![uri("")]))),
        (
            "URI of 2,049 bytes",
            ca.sign(&with(|p| {
                p.subject_alt_names = vec![uri(&format!("spiffe://a/{}", "a".repeat(2038)))]
            })),
        ),
        (
            "URI in UTF-8",
            ca.sign(&with(|p| {
                p.subject_alt_names = Vec::new();
                p.custom_extensions = vec![raw_names(b"\x30\x06\x86\x04a:\xc3\xa9")];
            })),
        ),
        (
            "65 names",
            ca.sign(&with(|p| {
                p.subject_alt_names = (0..65).map(|n| dns(&format!("h{n}"))).collect()
            })),
        ),
        (
            "names twice",
            ca.sign(&with(|p| p.custom_extensions = vec![raw_names(b"\x30\x06\x82\x04root")])),
        ),
        (
            "names that are no sequence",
            ca.sign(&with(|p| {
                p.subject_alt_names = Vec::new();
                p.custom_extensions = vec![raw_names(b"\x04\x02hi")];
            })),
        ),
        (
            "20 KB certificate",
            ca.sign(&with(|p| {
                p.custom_extensions = vec![CustomExtension::from_oid_content(
                    &[1, 3, 6, 1, 4, 1, 55555, 2],
                    vec![4; 20_000],
                )]
            })),
        ),
        ("not DER", alice.with_chain(vec![CertificateDer::from(b"hello".to_vec())])),
        ("empty certificate", alice.with_chain(vec![CertificateDer::from(Vec::new())])),
        ("truncated", damaged(&alice, |der| der.truncate(der.len() - 5))),
        ("a byte too many", damaged(&alice, |der| der.push(0))),
        (
            "signature changed",
            damaged(&alice, |der| {
                let last = der.len() - 1;
                der[last] ^= 1;
            }),
        ),
        (
            "name changed",
            damaged(&alice, |der| {
                let at = der.windows(5).rposition(|w| w == b"alice").unwrap();
                der[at] = b'b';
            }),
        ),
        ("garbage as second certificate", alice.with_chain(garbage_after)),
        ("thirteen certificates", alice.with_chain(with_stranger)),
    ]
}

#[tokio::test]
async fn every_sound_certificate_is_served_and_no_other() {
    let server = TestServer::start_with(quiet(), &[FIXTURE_CA], false);
    let sound = sound_cases(&server.ca);
    let unsound = unsound_cases(&server.ca, &server);
    assert!(unsound.len() >= 60, "{} cases", unsound.len());
    let mut wrong = Vec::new();
    for (name, identity) in &sound {
        if !server.serves(identity.clone()).await {
            wrong.push(format!("refused: {name}"));
        }
    }
    let (served, failed) = (server.seen.paths.lock().len(), server.metrics().handshakes_failed);
    assert_eq!((served, failed), (sound.len(), 0), "{wrong:?}");
    for (name, identity) in &unsound {
        if server.serves(identity.clone()).await {
            wrong.push(format!("served: {name}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(
        server.seen.paths.lock().len(),
        served,
        "a request of a refused client reached the service"
    );
    server.until(|m| m.handshakes_failed == unsound.len() as u64).await;
    assert!(server.serves(server.ca.client("alice")).await, "the server has to live on");
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_from_the_first_request_on_every_path() {
    let server = TestServer::start_with(quiet(), &[], true);
    let revoked = server.ca.authority.client("revoked", KeyKind::P256, good()).unwrap();
    let open = Arc::new(server.config(Identity::issued(&revoked)));
    let other = Arc::new(server.config(server.ca.client("other")));
    let mut before = server.connect(&open).await.unwrap();
    let mut bystander = server.connect(&other).await.unwrap();
    assert_eq!(before.status("/test/echo").await.as_deref(), Some("0"));
    assert_eq!(bystander.status("/test/echo").await.as_deref(), Some("0"));

    server.revoke(std::slice::from_ref(&revoked.serial));

    assert_eq!(before.status("/test/echo").await.as_deref(), Some("16"), "open connection");
    before.closed().await;
    // Its session tickets: new ticket keys make it a full handshake, which refuses.
    let again = server.connect(&open).await;
    let status = match again {
        Some(mut client) => client.status("/test/echo").await,
        None => None,
    };
    assert_eq!(status, None, "resumption");
    assert!(!server.serves(Identity::issued(&revoked)).await, "full handshake");
    assert_eq!(bystander.status("/test/echo").await.as_deref(), Some("0"), "others stay");
}

#[tokio::test]
async fn idle_connections_of_a_revoked_certificate_are_closed() {
    let server = TestServer::start_with(quiet(), &[], true);
    let revoked = server.ca.authority.client("revoked", KeyKind::P256, good()).unwrap();
    let mut idle =
        server.connect(&Arc::new(server.config(Identity::issued(&revoked)))).await.unwrap();
    let mut other = server.client("other").await;
    assert_eq!(idle.status("/test/echo").await.as_deref(), Some("0"));
    assert_eq!(other.status("/test/echo").await.as_deref(), Some("0"));
    server.revoke(std::slice::from_ref(&revoked.serial));
    assert_eq!(server.served.as_ref().unwrap().connections().close_invalid(server.tls.now()), 1);
    idle.closed().await;
    assert_eq!(other.status("/test/echo").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn idle_connections_of_an_expired_certificate_end_by_themselves() {
    let config = NetConfig { recheck_interval: Duration::from_millis(10), ..NetConfig::default() };
    let server = TestServer::start(config);
    let short =
        server.ca.authority.client("short", KeyKind::P256, validity(NOW - 10, NOW + 10)).unwrap();
    let mut idle =
        server.connect(&Arc::new(server.config(Identity::issued(&short)))).await.unwrap();
    let mut other = server.client("other").await;
    assert_eq!(idle.status("/test/echo").await.as_deref(), Some("0"));
    assert_eq!(other.status("/test/echo").await.as_deref(), Some("0"));
    server.clock.set(NOW + 11);
    idle.closed().await;
    assert_eq!(other.status("/test/echo").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn a_revocation_list_that_ran_out_refuses_everybody() {
    let server = TestServer::start_with(quiet(), &[], true);
    let mut client = server.client("alice").await;
    assert_eq!(client.status("/test/echo").await.as_deref(), Some("0"));
    server.clock.set(NOW + 500_000);
    assert_eq!(client.status("/test/echo").await.as_deref(), Some("16"));
    assert!(!server.serves(server.ca.client("bob")).await);
}

#[tokio::test]
async fn a_certificate_that_expires_is_refused_on_open_connections_and_on_resumption() {
    let server = TestServer::start(quiet());
    let short =
        server.ca.authority.client("short", KeyKind::P256, validity(NOW - 10, NOW + 10)).unwrap();
    let config = Arc::new(server.config(Identity::issued(&short)));
    let mut first = server.connect(&config).await.unwrap();
    assert_eq!(first.status("/test/echo").await.as_deref(), Some("0"));
    let mut second = server.connect(&config).await.unwrap();
    assert!(second.resumed, "sessions have to resume, or this test shows nothing");
    server.clock.set(NOW + 10);
    assert_eq!(second.status("/test/echo").await.as_deref(), Some("0"), "the last second counts");

    server.clock.set(NOW + 11);
    assert_eq!(second.status("/test/echo").await.as_deref(), Some("16"));
    let before = server.metrics();
    let third = server.connect(&config).await;
    if let Some(mut third) = third {
        assert!(third.resumed);
        assert_eq!(third.status("/test/echo").await, None);
    }
    server.until(|m| m.handshakes_failed > before.handshakes_failed).await;
    assert!(
        server.metrics().certificates_refused > before.certificates_refused,
        "it was the check of the resumed chain"
    );
}

#[tokio::test]
async fn a_broken_file_keeps_the_old_material_and_names_the_file() {
    let server = TestServer::start(quiet());
    std::fs::write(server.path("ca.pem"), "-----BEGIN CERTIFICATE-----\nnonsense").unwrap();
    let error = server.tls.reload().unwrap_err().to_string();
    assert!(error.contains("ca.pem"), "{error}");
    assert_eq!(server.tls.generation(), 1);
    assert!(server.serves(server.ca.client("alice")).await);

    // An authority that is no longer trusted takes its open connections with it.
    let mut open = server.client("bob").await;
    assert_eq!(open.status("/test/echo").await.as_deref(), Some("0"));
    let successor = TestCa::new("Next authority");
    std::fs::write(server.path("ca.pem"), &successor.certificate).unwrap();
    server.tls.reload().unwrap();
    assert_eq!(open.status("/test/echo").await.as_deref(), Some("16"));
    assert!(!server.serves(server.ca.client("alice")).await);
    assert!(server.serves(successor.client("alice")).await);
}
