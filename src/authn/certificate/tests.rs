//! Tests of reading certificates and matching identities.

use proptest::prelude::*;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};
use rustls_pki_types::pem::PemObject;

use super::*;

fn peer(common_name: Option<&str>, names: Vec<SanType>) -> PeerCertificate {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(name) = common_name {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    params.subject_alt_names = names;
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2030, 1, 1);
    let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    PeerCertificate::parse(&[certificate.der().clone()]).unwrap()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

fn ids(texts: &[&str]) -> Vec<CertificateIdentity> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

const A: &str = "spiffe://polykey.local/client/a";

#[test]
fn identities_have_one_spelling() {
    for text in [
        A,
        "spiffe://d/p",
        "spiffe://a-b_c.d/x/Y.z-1_",
        "dns:a",
        "dns:a.example-1.org",
        "cn:Alice Example",
    ] {
        assert_eq!(text.parse::<CertificateIdentity>().unwrap().to_string(), text);
    }
    assert_eq!(
        "dns:A.Example.ORG.".parse::<CertificateIdentity>().unwrap().to_string(),
        "dns:a.example.org"
    );
    let pin = format!("spki-sha256:{}", "aB".repeat(32));
    assert_eq!(pin.parse::<CertificateIdentity>().unwrap().to_string(), pin.to_lowercase());
    let long = format!("spiffe://d/{}", "a".repeat(MAX_URI_BYTES));
    for text in [
        "",
        "a",
        "spiffe://",
        "spiffe://d",
        "spiffe://d/",
        "spiffe:///p",
        "SPIFFE://d/p",
        "spiffe://D/p",
        "spiffe://d/p/",
        "spiffe://d//p",
        "spiffe://d/../p",
        "spiffe://d/./p",
        "spiffe://d/p?q",
        "spiffe://d/p#f",
        "spiffe://d/%61",
        "spiffe://d:1/p",
        "spiffe://u@d/p",
        "spiffe://d/é",
        " spiffe://d/p",
        "spiffe://d/p ",
        "spiffe://d/a*",
        &long,
        "dns:",
        "dns:*.example.org",
        "dns:-a",
        "dns:a-",
        "dns:a..b",
        "dns:.a",
        "dns:a_b",
        "dns:a b",
        "dns:é",
        "dns:a\0",
        "cn:",
        "cn: a",
        "cn:a ",
        "cn:a\n",
        "cn:é",
        "spki-sha256:",
        "spki-sha256:ab",
        "DNS:a",
        "other:a",
    ] {
        assert!(text.parse::<CertificateIdentity>().is_err(), "{text:?}");
    }
}

#[test]
fn uri_comes_before_dns_and_both_before_the_common_name() {
    let all = ids(&["cn:a", "dns:a.org", A]);
    let names = || vec![dns("A.org"), uri(A)];
    assert_eq!(matches(&all, &peer(Some("a"), names()), true), Some(&all[2]));
    assert_eq!(matches(&all[..2], &peer(Some("a"), names()), true), Some(&all[1]));
    assert_eq!(
        matches(&all[..1], &peer(Some("a"), names()), true),
        None,
        "names there outrank the common name"
    );
    assert_eq!(matches(&all[..1], &peer(Some("a"), Vec::new()), true), Some(&all[0]));
    assert_eq!(matches(&all[..1], &peer(Some("a"), Vec::new()), false), None);
    assert_eq!(matches(&all[..1], &peer(Some("A"), Vec::new()), true), None);
    assert_eq!(
        matches(&all[..1], &peer(Some("a"), vec![uri("https://x/")]), true),
        None,
        "any URI counts as a name"
    );
    assert_eq!(matches(&[], &peer(Some("a"), names()), true), None);
}

#[test]
fn nothing_matches_but_the_whole_name() {
    let registered = ids(&[A, "dns:a.org"]);
    for name in [
        uri("spiffe://polykey.local/client/a/b"),
        uri("spiffe://polykey.local/client"),
        uri("spiffe://polykey.local/client/A"),
        uri("SPIFFE://polykey.local/client/a"),
        uri("spiffe://POLYKEY.local/client/a"),
        uri("spiffe://polykey.local/client/%61"),
        uri("spiffe://polykey.local/client/a?x"),
        uri("spiffe://polykey.local//client/a"),
        uri("https://polykey.local/client/a"),
        dns("*.org"),
        dns("*"),
        dns("a.org."),
        dns("b.a.org"),
        dns("a.or"),
        dns("xa.org"),
    ] {
        assert_eq!(matches(&registered, &peer(None, vec![name.clone()]), true), None, "{name:?}");
    }
    let two = peer(None, vec![uri(A), uri("spiffe://polykey.local/client/b")]);
    assert_eq!(
        (two.spiffe_id(), matches(&registered, &two, true)),
        (None, None),
        "two URIs are no SPIFFE identity"
    );
}

#[test]
fn a_pin_is_a_condition_on_top_of_the_names() {
    let own = peer(None, vec![uri(A)]);
    let other = peer(None, vec![uri(A)]);
    let pin = CertificateIdentity::SpkiSha256(*own.spki_sha256());
    let both = [pin.clone(), A.parse().unwrap()];
    assert_eq!(matches(&both, &own, false), Some(&both[1]));
    assert_eq!(matches(&both, &other, false), None, "the name with another key");
    let stranger = [pin.clone(), "spiffe://polykey.local/client/b".parse().unwrap()];
    assert_eq!(matches(&stranger, &own, false), None, "the key under another name");
    assert_eq!(matches(std::slice::from_ref(&pin), &own, false), Some(&pin));
}

#[test]
fn the_fields_are_those_of_the_certificate() {
    let peer = peer(Some("Jörg"), vec![dns("X.org"), uri(A)]);
    assert_eq!(
        (peer.common_name(), peer.dns_names(), peer.spiffe_id()),
        (Some("Jörg"), &["x.org".to_owned()][..], Some(A))
    );
    assert_eq!((peer.not_before(), peer.not_after()), (1_577_836_800, 1_893_456_000));
    assert_eq!(peer.next_expiry(0), Some(1_893_456_001));
    assert_eq!(peer.next_expiry(1_893_456_001), None);
    assert_eq!(peer.thumbprint_hex().len(), 64);
}

#[test]
fn short_rsa_keys_are_refused_by_their_length() {
    let read = |pem: &str| {
        PeerCertificate::parse(&[CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()])
    };
    assert_eq!(
        read(include_str!("../../../tests/net/data/rsa1024.pem")),
        Err(CertificateError::WeakKey)
    );
    assert!(read(include_str!("../../../tests/net/data/sha256.pem")).is_ok());
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        prop_assert!(PeerCertificate::parse(&[CertificateDer::from(bytes)]).is_err());
    }

    #[test]
    fn no_damage_panics(at in 0usize..600, bit in 0u8..8) {
        let pem = include_str!("../../../tests/net/data/sha256.pem");
        let mut der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec();
        let at = at % der.len();
        der[at] ^= 1 << bit;
        // Either outcome is right: signatures are not this module's business.
        let _ = PeerCertificate::parse(&[CertificateDer::from(der)]);
    }

    #[test]
    fn identities_survive_their_text(text in "(spiffe://[a-z.]{1,8}/[a-zA-Z0-9._-]{1,8}|dns:[a-z0-9.-]{1,12}|cn:[ -~]{1,12})") {
        if let Ok(identity) = text.parse::<CertificateIdentity>() {
            prop_assert_eq!(identity.to_string().parse::<CertificateIdentity>(), Ok(identity));
        }
    }
}
