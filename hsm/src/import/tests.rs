//! Wrapped keys open for whom and what they were wrapped, and fail alike otherwise.

use super::*;

fn material(bytes: &[u8]) -> KeyMaterial {
    KeyMaterial::from_secret(bytes.to_vec()).unwrap()
}

fn pkcs8() -> KeyMaterial {
    algorithm::generate(Algorithm::EcdsaP256, GenerationParams::default()).unwrap().material
}

#[test]
fn names_never_change() {
    assert_eq!(ImportWrapping::ALL.map(ImportWrapping::name), ["rsa-aes-key-wrap-sha256", "hpke"]);
    for wrapping in ImportWrapping::ALL {
        assert_eq!(ImportWrapping::from_name(wrapping.name()), Some(wrapping));
    }
    assert_eq!(ImportWrapping::from_name("rsa"), None);
}

#[test]
fn rsa_and_aes_wrap_what_opens_for_its_key_alone() {
    let one = generate_one_time_key(ImportWrapping::RsaAes).unwrap();
    let public = one.public.unwrap();
    for key in
        [material(&[7]), material(&[7; 16]), material(&[7; 32]), pkcs8(), material(&[7; 65_536])]
    {
        let wrapped = wrap_rsa_aes(&public, &key).unwrap();
        assert_eq!(wrapped.len(), 512 + key.len().next_multiple_of(8) + 8);
        assert_eq!(unwrap_rsa_aes(&one.material, &wrapped).unwrap().bytes(), key.bytes());
    }
    let wrapped = wrap_rsa_aes(&public, &material(&[7; 32])).unwrap();
    for at in (0..512).step_by(37).chain(512..wrapped.len()) {
        let mut changed = wrapped.clone();
        changed[at] ^= 1;
        let refused = unwrap_rsa_aes(&one.material, &changed).unwrap_err();
        assert_eq!(refused, ImportError::Unwrap, "changed at {at}");
    }
    let longer = [&wrapped[..], &[0; 8]].concat();
    for broken in
        [&b""[..], &wrapped[..511], &wrapped[..512], &wrapped[..520], &wrapped[1..], &longer]
    {
        assert_eq!(unwrap_rsa_aes(&one.material, broken).unwrap_err(), ImportError::Unwrap);
    }
    // An ephemeral key of another length.
    let kek = [9; 16];
    let mut tail = [0; 40];
    let tail = AesKek::new(&aws_lc_rs::key_wrap::AES_128, &kek)
        .unwrap()
        .wrap_with_padding(&[7; 16], &mut tail)
        .unwrap();
    let head = encrypt_to(Algorithm::Rsa4096, &public, &kek).unwrap();
    let wrapped = [&head[..], tail].concat();
    assert_eq!(unwrap_rsa_aes(&one.material, &wrapped).unwrap_err(), ImportError::Unwrap);
    // To another key, and with the wrong kind of key.
    let (hpke, other) =
        (ImportWrapping::Hpke, generate_one_time_key(ImportWrapping::RsaAes).unwrap());
    let wrapped = wrap_rsa_aes(&other.public.unwrap(), &material(&[7; 32])).unwrap();
    assert_eq!(unwrap_rsa_aes(&one.material, &wrapped).unwrap_err(), ImportError::Unwrap);
    let hpke = generate_one_time_key(hpke).unwrap();
    assert_eq!(unwrap_rsa_aes(&hpke.material, &wrapped).unwrap_err(), ImportError::Unwrap);
    let refused = wrap_rsa_aes(&hpke.public.unwrap(), &material(&[7])).unwrap_err();
    assert_eq!(refused, ImportError::PublicKey(Algorithm::Rsa4096));
}

#[test]
fn hpke_wraps_what_opens_for_its_key_and_information_alone() {
    let one = generate_one_time_key(ImportWrapping::Hpke).unwrap();
    let public = one.public.unwrap();
    let info = ImportInfo { node: [3; 16], token: b"token".to_vec() };
    for key in [material(&[7]), pkcs8(), material(&[7; 65_536])] {
        let wrapped = wrap_hpke(&public, &info, &key).unwrap();
        assert_eq!(wrapped.len(), 32 + key.len() + 16);
        assert_eq!(unwrap_hpke(&one.material, &info, &wrapped).unwrap().bytes(), key.bytes());
    }
    let wrapped = wrap_hpke(&public, &info, &material(&[7; 32])).unwrap();
    let refused = |info: &ImportInfo, wrapped: &[u8]| {
        assert_eq!(unwrap_hpke(&one.material, info, wrapped).unwrap_err(), ImportError::Unwrap);
    };
    for at in 0..wrapped.len() {
        let mut changed = wrapped.clone();
        changed[at] ^= 1;
        refused(&info, &changed);
        refused(&info, &wrapped[..at]);
    }
    refused(&ImportInfo { node: [4; 16], ..info.clone() }, &wrapped);
    refused(&ImportInfo { token: b"tokem".to_vec(), ..info.clone() }, &wrapped);
    refused(&info, &[&[0; 32][..], &wrapped[32..]].concat());
    let other = generate_one_time_key(ImportWrapping::Hpke).unwrap();
    assert!(unwrap_hpke(&other.material, &info, &wrapped).is_err());
    let rsa = algorithm::generate(Algorithm::Rsa2048, GenerationParams::default()).unwrap();
    assert_eq!(unwrap_hpke(&rsa.material, &info, &wrapped).unwrap_err(), ImportError::Unwrap);
    let refused = wrap_hpke(&rsa.public.unwrap(), &info, &material(&[7])).unwrap_err();
    assert_eq!(refused, ImportError::PublicKey(Algorithm::X25519));
    let zero = PublicKey::from_raw(Algorithm::X25519, &[0; 32]).unwrap();
    assert!(wrap_hpke(&zero, &info, &material(&[7])).is_err());
}

/// What a sender rebuilds who does not use this crate.
#[test]
fn the_information_is_laid_out_as_documented() {
    let info = ImportInfo { node: [3; 16], token: b"tok".to_vec() }.encode(&[5; 32]);
    let hash = digest::digest(&digest::SHA256, &[5; 32]);
    let expected =
        [b"polykey-import-v1", &[3; 16][..], &[0, 0, 0, 3], b"tok", hash.as_ref()].concat();
    assert_eq!(info, expected);
}
