//! Export to a recipient's key, opened by this crate and by an HPKE receiver built on aws-lc that
//! shares no code with the one under test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::{digest, hmac};
use data_encoding::HEXLOWER;
use polykey_hsm::{
    ExportError, ExportInfo, HpkeExport, KeyMaterial, RecipientPrivateKey, export_hpke,
    generate_recipient_keypair, open_hpke_export, recipient_key_sha256,
};
use zeroize::Zeroizing;

fn hex(text: &str) -> Vec<u8> {
    HEXLOWER.decode(text.as_bytes()).unwrap()
}

fn material() -> KeyMaterial {
    KeyMaterial::from_secret(b"the exported secret".to_vec()).unwrap()
}

fn info() -> ExportInfo {
    ExportInfo { node: [1; 16], key_id: [2; 16], version: 3, principal: "client-a".to_owned() }
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), &parts.concat()).as_ref().to_vec()
}

/// RFC 9180, 4: LabeledExtract.
fn extract(suite: &[u8], salt: &[u8], label: &[u8], ikm: &[u8]) -> Vec<u8> {
    mac(salt, &[b"HPKE-v1", suite, label, ikm])
}

/// RFC 9180, 4: LabeledExpand, for at most one block of output.
fn expand(suite: &[u8], prk: &[u8], label: &[u8], info: &[u8], len: u8) -> Vec<u8> {
    assert!(len <= 32);
    let mut out = mac(prk, &[&[0, len], b"HPKE-v1", suite, label, info, &[1]]);
    out.truncate(len.into());
    out
}

/// RFC 9180 base mode with DHKEM(X25519, HKDF-SHA256), HKDF-SHA256 and AES-GCM: key and nonce of
/// the first message.
fn key_schedule(
    private: &[u8],
    enc: &[u8],
    info: &[u8],
    aead_id: u8,
    key_len: u8,
) -> (Vec<u8>, Vec<u8>) {
    let private = PrivateKey::from_private_key(&X25519, private).unwrap();
    let public = private.compute_public_key().unwrap();
    let shared = agreement::agree(&private, UnparsedPublicKey::new(&X25519, enc), (), |dh| {
        let kem = b"KEM\0\x20";
        let prk = extract(kem, b"", b"eae_prk", dh);
        Ok(expand(kem, &prk, b"shared_secret", &[enc, public.as_ref()].concat(), 32))
    })
    .unwrap();
    let suite = [&b"HPKE\0\x20\0\x01\0"[..], &[aead_id]].concat();
    let context = [
        &[0][..],
        &extract(&suite, b"", b"psk_id_hash", b""),
        &extract(&suite, b"", b"info_hash", info),
    ]
    .concat();
    let secret = extract(&suite, &shared, b"secret", b"");
    let key = expand(&suite, &secret, b"key", &context, key_len);
    (key, expand(&suite, &secret, b"base_nonce", &context, 12))
}

fn open(
    algorithm: &'static aead::Algorithm,
    (key, nonce): (Vec<u8>, Vec<u8>),
    aad: &[u8],
    ciphertext: &[u8],
) -> Vec<u8> {
    let key = LessSafeKey::new(UnboundKey::new(algorithm, &key).unwrap());
    let nonce = Nonce::try_assume_unique_for_key(&nonce).unwrap();
    let mut buffer = ciphertext.to_vec();
    key.open_in_place(nonce, Aad::from(aad), &mut buffer).unwrap().to_vec()
}

/// The receiver below is right: RFC 9180, A.1.1.
#[test]
fn the_reference_receiver_follows_rfc_9180() {
    let (key, nonce) = key_schedule(
        &hex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8"),
        &hex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431"),
        &hex("4f6465206f6e2061204772656369616e2055726e"),
        1,
        16,
    );
    assert_eq!(HEXLOWER.encode(&key), "4531685d41d65f03dc48f6b8302c05b0");
    assert_eq!(HEXLOWER.encode(&nonce), "56d890e5accaaf011cff4b7d");
    let ciphertext = hex(
        "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a",
    );
    let opened = open(&aead::AES_128_GCM, (key, nonce), b"Count-0", &ciphertext);
    assert_eq!(opened, b"Beauty is truth, truth beauty");
}

#[test]
fn an_independent_receiver_opens_an_export() {
    let (private, public) = generate_recipient_keypair().unwrap();
    let HpkeExport { enc, ciphertext, recipient_key_sha256 } =
        export_hpke(&public, &info(), &material()).unwrap();
    assert_eq!(recipient_key_sha256, digest::digest(&digest::SHA256, &public).as_ref());
    let documented = [
        &b"polykey-export-v1"[..],
        &[1; 16],
        &[2; 16],
        &[0, 0, 0, 3],
        &[0, 0, 0, 8],
        b"client-a",
        &recipient_key_sha256,
    ]
    .concat();
    let schedule = key_schedule(private.expose(), &enc, &documented, 2, 32);
    assert_eq!(open(&aead::AES_256_GCM, schedule, b"", &ciphertext), b"the exported secret");
}

#[test]
fn an_export_opens_for_its_recipient_and_purpose_alone() {
    let (private, public) = generate_recipient_keypair().unwrap();
    let export = export_hpke(&public, &info(), &material()).unwrap();
    let try_open = |private: &RecipientPrivateKey, info: &ExportInfo, enc: &[u8], text: &[u8]| {
        open_hpke_export(private, info, enc, text).map(|m| m.expose_for_export().to_vec())
    };
    let HpkeExport { enc, ciphertext, .. } = &export;
    assert_eq!(try_open(&private, &info(), enc, ciphertext).unwrap(), b"the exported secret");
    let kept = RecipientPrivateKey::from_bytes(Zeroizing::new(*private.expose()));
    assert!(try_open(&kept, &info(), enc, ciphertext).is_ok());

    let (stranger, _) = generate_recipient_keypair().unwrap();
    assert_eq!(try_open(&stranger, &info(), enc, ciphertext), Err(ExportError::Broken));
    for other in [
        ExportInfo { node: [0; 16], ..info() },
        ExportInfo { key_id: [0; 16], ..info() },
        ExportInfo { version: 4, ..info() },
        ExportInfo { principal: "client-b".to_owned(), ..info() },
        ExportInfo { principal: String::new(), ..info() },
    ] {
        assert_eq!(try_open(&private, &other, enc, ciphertext), Err(ExportError::Broken));
    }
    for at in 0..ciphertext.len() {
        let mut changed = ciphertext.clone();
        changed[at] ^= 0x80;
        assert_eq!(try_open(&private, &info(), enc, &changed), Err(ExportError::Broken));
        assert_eq!(try_open(&private, &info(), enc, &ciphertext[..at]), Err(ExportError::Broken));
    }
    for len in 0..enc.len() {
        assert_eq!(try_open(&private, &info(), &enc[..len], ciphertext), Err(ExportError::Broken));
    }
    // The same key twice looks like two keys.
    assert_ne!(export_hpke(&public, &info(), &material()).unwrap(), export);
}

#[test]
fn a_recipient_is_given_raw_or_as_spki() {
    let (private, public) = generate_recipient_keypair().unwrap();
    let spki = [&hex("302a300506032b656e032100")[..], &public].concat();
    let export = export_hpke(&spki, &info(), &material()).unwrap();
    assert!(open_hpke_export(&private, &info(), &export.enc, &export.ciphertext).is_ok());
    assert_eq!(recipient_key_sha256(&spki), recipient_key_sha256(&public));
    // Made by another library.
    let theirs = PrivateKey::generate(&X25519).unwrap();
    let export = export_hpke(theirs.compute_public_key().unwrap().as_ref(), &info(), &material());
    assert!(export.is_ok());

    let mut ed25519 = spki.clone();
    ed25519[8] = 0x70;
    let longer = [&spki[..], &[0]].concat();
    for bad in [&[][..], &public[..31], &spki[..43], &longer, &ed25519, &[0; 33], &[0; 44]] {
        let refused = export_hpke(bad, &info(), &material());
        assert_eq!(refused.unwrap_err(), ExportError::RecipientKey, "{} bytes", bad.len());
    }
}

/// The points whose multiples by the cofactor vanish, canonical and not (RFC 7748, 6.1).
#[test]
fn low_order_recipients_are_refused() {
    for point in [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "0000000000000000000000000000000000000000000000000000000000000080",
        "0100000000000000000000000000000000000000000000000000000000000080",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    ] {
        let refused = export_hpke(&hex(point), &info(), &material());
        assert_eq!(refused.unwrap_err(), ExportError::RecipientKey, "{point}");
        let (private, _) = generate_recipient_keypair().unwrap();
        let refused = open_hpke_export(&private, &info(), &hex(point), &[0; 32]);
        assert_eq!(refused.unwrap_err(), ExportError::Broken, "{point}");
    }
}
