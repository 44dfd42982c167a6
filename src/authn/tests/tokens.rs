//! Tokens by themselves: official vectors, mutations and confusions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pasetors::Local;
use pasetors::keys::{AsymmetricPublicKey, AsymmetricSecretKey, SymmetricKey};
use pasetors::token::UntrustedToken;
use pasetors::version4::{LocalToken, V4};
use proptest::prelude::*;

use super::fixture::{START, token_key};
use crate::authn::token::{Claims, KeySet, Kind, MAX_TOKEN, TokenError, parse, sign, verified};
use crate::time::Time;

const ISSUER: &str = "09090909090909090909090909090909";
const CERTIFICATE: [u8; 32] = [5; 32];

fn keys() -> KeySet {
    KeySet::from_records(&[token_key(START, None)]).unwrap()
}

fn claims(kind: Kind) -> Claims {
    Claims {
        kind,
        issuer: ISSUER.into(),
        subject: "a".into(),
        token_id: [1; 16],
        family: [2; 16],
        generation: 3,
        issued_at: START,
        not_before: START,
        expires_at: START.plus_seconds(900),
        roles: vec!["user".into()],
        tier: 2,
        certificate: CERTIFICATE,
    }
}

fn verify(keys: &KeySet, token: &str, kind: Kind) -> Result<Claims, TokenError> {
    keys.verify(token, kind, ISSUER, &CERTIFICATE, START)
}

/// <https://github.com/paseto-standard/test-vectors> v4, ISC licence.
#[test]
fn the_official_vectors_hold() {
    let file: serde_json::Value = serde_json::from_str(include_str!("paseto-v4.json")).unwrap();
    let hex = |v: &serde_json::Value| {
        data_encoding::HEXLOWER.decode(v.as_str().unwrap().as_bytes()).unwrap()
    };
    let mut ran = 0;
    for test in file["tests"].as_array().unwrap() {
        let name = test["name"].as_str().unwrap();
        let token = test["token"].as_str().unwrap();
        let footer = test["footer"].as_str().unwrap();
        let assertion = test["implicit-assertion"].as_str().unwrap().as_bytes();
        ran += 1;
        if let Some(key) = test.get("key") {
            // Local tokens: the library opens them, our parser takes none of them.
            let key = SymmetricKey::<V4>::from(&hex(key)).unwrap();
            let footer = (!footer.is_empty()).then_some(footer.as_bytes());
            let opened = UntrustedToken::<Local, V4>::try_from(token)
                .ok()
                .and_then(|token| LocalToken::decrypt(&key, &token, footer, Some(assertion)).ok());
            assert_eq!(opened.as_ref().map(|t| t.payload()), test["payload"].as_str(), "{name}");
            let public = name == "4-F-2";
            assert_eq!(parse(token).is_ok(), public, "{name}");
            continue;
        }
        let public = AsymmetricPublicKey::<V4>::from(&hex(&test["public-key"])).unwrap();
        let payload = parse(token).ok().and_then(|t| verified(&public, &t, assertion).ok());
        assert_eq!(payload.as_deref(), test["payload"].as_str(), "{name}");
        if test["expect-fail"] == false {
            let secret = AsymmetricSecretKey::<V4>::from(&hex(&test["secret-key"])).unwrap();
            let payload = test["payload"].as_str().unwrap().as_bytes();
            let ours = sign(&secret, payload, footer.as_bytes(), assertion).unwrap();
            assert_eq!(ours, token, "{name}");
            assert!(verified(&public, &parse(token).unwrap(), b"other").is_err(), "{name}");
        }
    }
    assert_eq!(ran, 18);
}

#[test]
fn a_token_says_what_was_issued() {
    let keys = keys();
    for kind in [Kind::Access, Kind::Refresh] {
        let token = keys.issue(&claims(kind), START).unwrap();
        assert!(token.starts_with("v4.public."));
        assert_eq!(verify(&keys, &token, kind), Ok(claims(kind)));
        assert_eq!(keys.inspect(&token, ISSUER, START), Ok(claims(kind)));
    }
}

#[test]
fn a_token_is_refused_for_each_thing_that_is_not_as_it_must_be() {
    let keys = keys();
    let access = keys.issue(&claims(Kind::Access), START).unwrap();
    let refresh = keys.issue(&claims(Kind::Refresh), START).unwrap();
    assert_eq!(verify(&keys, &access, Kind::Refresh), Err(TokenError::Signature));
    assert_eq!(verify(&keys, &refresh, Kind::Access), Err(TokenError::Signature));
    let at = |seconds| {
        keys.verify(
            &access,
            Kind::Access,
            ISSUER,
            &CERTIFICATE,
            Time::from_seconds(START.seconds() + seconds),
        )
    };
    assert!(at(0).is_ok() && at(899).is_ok());
    assert_eq!(at(900), Err(TokenError::Expired));
    assert_eq!(at(-1), Err(TokenError::NotYet));
    let other = keys.verify(&access, Kind::Access, ISSUER, &[6; 32], START);
    assert_eq!(other, Err(TokenError::Signature));
    let other = keys.verify(&access, Kind::Access, "other", &CERTIFICATE, START);
    assert_eq!(other, Err(TokenError::WrongIssuer));
    let stranger = self::keys();
    assert_eq!(verify(&stranger, &access, Kind::Access), Err(TokenError::UnknownKey));
    let long = format!("v4.public.{}", "A".repeat(MAX_TOKEN));
    assert_eq!(verify(&keys, &long, Kind::Access), Err(TokenError::TooLong));
    let mut later = claims(Kind::Access);
    later.not_before = START.plus_seconds(5);
    let later = keys.issue(&later, START).unwrap();
    assert_eq!(verify(&keys, &later, Kind::Access), Err(TokenError::NotYet));
}

/// Payloads that a holder of the key could sign, and we never would.
#[test]
fn a_genuine_signature_does_not_excuse_wrong_claims() {
    let record = token_key(START, None);
    let keys = KeySet::from_records([&record]).unwrap();
    let secret = AsymmetricSecretKey::<V4>::from(&record.secret).unwrap();
    let kid = data_encoding::HEXLOWER.encode(&record.id);
    let footer = format!("{{\"kid\":\"{kid}\"}}");
    let assertion = [&b"polykey/token/access/v1"[..], &CERTIFICATE].concat();
    let good = keys.issue(&claims(Kind::Access), START).unwrap();
    let payload = verified(
        &AsymmetricPublicKey::from(&record.public).unwrap(),
        &parse(&good).unwrap(),
        &assertion,
    )
    .unwrap();
    let good: serde_json::Value = serde_json::from_str(&payload).unwrap();
    let changed = |field: &str, value: serde_json::Value| {
        let mut payload = good.clone();
        payload[field] = value;
        let payload = serde_json::to_vec(&payload).unwrap();
        let token = sign(&secret, &payload, footer.as_bytes(), &assertion).unwrap();
        verify(&keys, &token, Kind::Access)
    };
    assert!(changed("sub", "b".into()).is_ok());
    assert_eq!(changed("aud", "other".into()), Err(TokenError::WrongAudience));
    assert_eq!(changed("typ", "refresh".into()), Err(TokenError::WrongKind));
    let thumbprint = data_encoding::BASE64URL_NOPAD.encode(&[6; 32]);
    let cnf = serde_json::json!({ "x5t#S256": thumbprint });
    assert_eq!(changed("cnf", cnf), Err(TokenError::WrongCertificate));
    for (field, value) in [
        ("jti", serde_json::json!("xyz")),
        ("jti", serde_json::json!("AB".repeat(16))),
        ("fam", serde_json::json!(7)),
        ("exp", serde_json::json!(1)),
        ("exp", serde_json::json!("tomorrow")),
        ("iat", serde_json::Value::Null),
        ("roles", serde_json::json!("admin")),
        ("gen", serde_json::json!(-1)),
    ] {
        assert_eq!(changed(field, value.clone()), Err(TokenError::Malformed), "{field} {value}");
    }
    for payload in ["null", "[]", "{}", "7", "{\"sub\":"] {
        let token = sign(&secret, payload.as_bytes(), footer.as_bytes(), &assertion).unwrap();
        assert_eq!(verify(&keys, &token, Kind::Access), Err(TokenError::Malformed), "{payload}");
        assert_eq!(keys.inspect(&token, ISSUER, START), Err(TokenError::Malformed), "{payload}");
    }
    for footer in ["", "{}", "[]", "{\"kid\":\"\"}", "{\"kid\":\"00\"}", &"x".repeat(500)] {
        let token = sign(&secret, payload.as_bytes(), footer.as_bytes(), &assertion).unwrap();
        assert_eq!(verify(&keys, &token, Kind::Access), Err(TokenError::Malformed), "{footer}");
    }
}

#[test]
fn no_other_kind_of_token_is_taken() {
    let keys = keys();
    let token = keys.issue(&claims(Kind::Access), START).unwrap();
    let body = token.strip_prefix("v4.public.").unwrap();
    for header in [
        "v4.local.",
        "v3.public.",
        "v3.local.",
        "v2.public.",
        "v2.local.",
        "v1.public.",
        "v5.public.",
        "V4.public.",
        "v4.Public.",
        "v4.public",
        "v4.public..",
        "k4.secret.",
        "k4.public.",
        "k4.local.",
        "k4.lid.",
        " v4.public.",
        "",
    ] {
        let confused = format!("{header}{body}");
        assert!(verify(&keys, &confused, Kind::Access).is_err(), "{header}");
        assert!(keys.inspect(&confused, ISSUER, START).is_err(), "{header}");
    }
    let (front, footer) = token.rsplit_once('.').unwrap();
    for changed in [
        front.to_owned(),
        format!("{front}."),
        format!("{token}."),
        format!("{token}.{footer}"),
        format!("{token}="),
        format!("{token}\n"),
        format!(" {token}"),
        format!("{front}={footer}"),
        token.to_uppercase(),
    ] {
        assert!(verify(&keys, &changed, Kind::Access).is_err(), "{changed}");
    }
}

#[test]
fn keys_roll_over_without_dropping_live_tokens() {
    let old = token_key(START, Some(START.plus_seconds(2000)));
    let mut ending = old.clone();
    ending.active_until = START.plus_seconds(1000).micros();
    let new = token_key(START.plus_seconds(1000), None);
    let both = KeySet::from_records([&ending, &new]).unwrap();
    let token = both.issue(&claims(Kind::Access), START).unwrap();
    let at = |seconds| {
        both.verify(&token, Kind::Access, ISSUER, &CERTIFICATE, START.plus_seconds(seconds))
    };
    assert!(at(0).is_ok());
    assert_eq!(both.signer(START).unwrap().id().as_slice(), old.id.as_ref());
    assert_eq!(both.signer(START.plus_seconds(999)).unwrap().id().as_slice(), old.id.as_ref());
    assert_eq!(both.signer(START.plus_seconds(1000)).unwrap().id().as_slice(), new.id.as_ref());
    let mut long = claims(Kind::Access);
    long.expires_at = START.plus_seconds(5000);
    let token = both.issue(&long, START).unwrap();
    let at = |seconds| {
        both.verify(&token, Kind::Access, ISSUER, &CERTIFICATE, START.plus_seconds(seconds))
    };
    assert!(at(1999).is_ok());
    assert_eq!(at(2000), Err(TokenError::UnknownKey));
    // Nobody has rolled over in time: the last key goes on.
    let alone = KeySet::from_records([&ending]).unwrap();
    assert!(alone.signer(START.plus_seconds(1500)).is_some());
    assert!(alone.signer(START.plus_seconds(2000)).is_none());
    let mut other = token_key(START, None);
    other.purpose = "checkpoint".into();
    assert!(KeySet::from_records([&other]).unwrap().signer(START).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_it_panic(text in "\\PC{0,200}", tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let keys = keys();
        let encoded = data_encoding::BASE64URL_NOPAD.encode(&tail);
        for token in [text.clone(), format!("v4.public.{text}"), format!("v4.public.{encoded}.{encoded}")] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                (verify(&keys, &token, Kind::Access).is_err(), keys.inspect(&token, ISSUER, START).is_err())
            }));
            prop_assert_eq!(result.ok(), Some((true, true)));
        }
    }
}

/// Every position with several other characters, and every pair of neighbours swapped or dropped:
/// about 20,000 mutants of each kind of token.
#[test]
fn no_mutant_is_accepted() {
    let keys = keys();
    let alphabet = b"ABMYZabmyz019-_.=+/ \n";
    for kind in [Kind::Access, Kind::Refresh] {
        let token = keys.issue(&claims(kind), START).unwrap();
        let mut mutants = 0;
        let mut refuse = |mutant: Vec<u8>| {
            if mutant == token.as_bytes() {
                return;
            }
            let Ok(mutant) = String::from_utf8(mutant) else { return };
            mutants += 1;
            assert!(verify(&keys, &mutant, kind).is_err(), "{mutant}");
            assert!(keys.inspect(&mutant, ISSUER, START).is_err(), "{mutant}");
        };
        for i in 0..token.len() {
            for other in alphabet {
                let mut mutant = token.clone().into_bytes();
                mutant[i] = *other;
                refuse(mutant);
            }
            for bit in 0..7 {
                let mut mutant = token.clone().into_bytes();
                mutant[i] ^= 1 << bit;
                refuse(mutant);
            }
            let mut dropped = token.clone().into_bytes();
            dropped.remove(i);
            refuse(dropped);
            refuse(token.as_bytes()[..i].to_vec());
            if i > 0 {
                let mut swapped = token.clone().into_bytes();
                swapped.swap(i - 1, i);
                refuse(swapped);
            }
        }
        assert!(mutants > 15_000, "{mutants}");
    }
}
