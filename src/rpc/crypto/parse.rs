//! Protobuf requests about work with keys to commands: every field is looked at.

use std::collections::BTreeMap;

use bytes::Bytes;
use polykey_hsm::Algorithm;
use polykey_hsm::work::{ChunkSize, SignatureScheme};
use polykey_proto::polykey::v2 as pb;
use zeroize::Zeroizing;

use super::super::convert;
use super::super::parse::{create, key_name, policies, version};
use crate::command::crypto::{
    Agree, Bound, DataKey, Decapsulate, Decrypt, DecryptStream, Derivation, DeriveKey, Encapsulate,
    Encrypt, EncryptStream, Form, GenerateDataKey, GenerateMac, GenerateRandom,
    GetImportParameters, GetPublicKey, Hidden, Import, Protection, PublicForm, Rewrap, Sealed,
    Sign, ToSign, ToWrap, UnwrapKey, Verify, VerifyMac, WrapKey,
};
use crate::command::{CreateKey, Export, GetKey};
use crate::error::Error;
use crate::key::KeyName;
use crate::limits::{self, Violations};
use crate::time::Time;

fn context(v: &mut Violations, field: &str, context: &BTreeMap<String, String>) {
    let pairs = context.len() <= limits::BOUND_PAIRS;
    v.check(pairs, field, "must have at most 32 pairs");
    let bytes: usize = context.iter().map(|(name, value)| name.len() + value.len()).sum();
    v.check(bytes <= limits::BOUND_BYTES, field, "must have at most 8 KiB in all");
    v.check(!context.contains_key(""), field, "must have no pair without a name");
}

fn bound(
    v: &mut Violations,
    (context_field, context_pairs): (&str, BTreeMap<String, String>),
    (aad_field, aad): (&str, Bytes),
) -> Bound {
    context(v, context_field, &context_pairs);
    v.check(aad.len() <= limits::ADDITIONAL_DATA, aad_field, "must have at most 64 KiB");
    Bound { context: context_pairs, aad: Hidden(aad) }
}

fn message(v: &mut Violations, field: &str, bytes: Bytes) -> Hidden {
    v.check(bytes.len() <= limits::PLAINTEXT, field, "must have at most 4 MiB");
    Hidden(bytes)
}

/// Bytes that must be there.
fn some(v: &mut Violations, field: &str, bytes: Bytes) -> Bytes {
    v.check(!bytes.is_empty(), field, "must be set");
    bytes
}

/// The form of a new ciphertext.
fn form(v: &mut Violations, value: i32) -> Form {
    match pb::CiphertextFormat::try_from(value) {
        Ok(pb::CiphertextFormat::Unspecified | pb::CiphertextFormat::Blob) => Form::Blob,
        Ok(pb::CiphertextFormat::Text) => Form::Text,
        Ok(pb::CiphertextFormat::Raw) => Form::Raw,
        Err(_) => {
            v.add("format", "must be CIPHERTEXT_FORMAT_BLOB, TEXT or RAW");
            Form::Blob
        }
    }
}

fn optional_key(v: &mut Violations, field: &str, value: &str) -> Option<KeyName> {
    (!value.is_empty()).then(|| key_name(v, field, value))
}

pub(super) fn encrypt(m: pb::EncryptRequest) -> Result<Encrypt, Error> {
    let pb::EncryptRequest { key_id, version: asked, plaintext, context, additional_data, format } =
        m;
    let mut v = Violations::new();
    let command = Encrypt {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        plaintext: message(&mut v, "plaintext", plaintext),
        bound: bound(&mut v, ("context", context), ("additional_data", additional_data)),
        form: form(&mut v, format),
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn decrypt(m: pb::DecryptRequest) -> Result<Decrypt, Error> {
    let pb::DecryptRequest { key_id, ciphertext, context, additional_data, format, version: asked } =
        m;
    let mut v = Violations::new();
    let key = optional_key(&mut v, "key_id", &key_id);
    let ciphertext = some(&mut v, "ciphertext", ciphertext);
    let bound = bound(&mut v, ("context", context), ("additional_data", additional_data));
    let asked = version(&mut v, "version", asked);
    let ciphertext = if form(&mut v, format) == Form::Raw {
        v.check(key.is_some(), "key_id", "must be set: a RAW ciphertext names no key");
        Sealed::Raw(ciphertext, asked)
    } else {
        v.check(asked == 0, "version", "must be 0: the ciphertext names its version");
        Sealed::Blob(ciphertext)
    };
    v.finish()?;
    Ok(Decrypt { key, ciphertext, bound })
}

pub(super) fn rewrap(m: pb::RewrapRequest) -> Result<Rewrap, Error> {
    let pb::RewrapRequest {
        ciphertext,
        context,
        additional_data,
        destination_key_id,
        destination_version,
        change_binding,
        destination_context,
        destination_additional_data,
        format,
    } = m;
    let mut v = Violations::new();
    let to_bound = bound(
        &mut v,
        ("destination_context", destination_context),
        ("destination_additional_data", destination_additional_data),
    );
    v.check(
        change_binding || to_bound.context.is_empty(),
        "destination_context",
        "has no effect without change_binding",
    );
    v.check(
        change_binding || to_bound.aad.0.is_empty(),
        "destination_additional_data",
        "has no effect without change_binding",
    );
    let command = Rewrap {
        ciphertext: some(&mut v, "ciphertext", ciphertext),
        bound: bound(&mut v, ("context", context), ("additional_data", additional_data)),
        to: optional_key(&mut v, "destination_key_id", &destination_key_id),
        to_version: version(&mut v, "destination_version", destination_version),
        to_bound: change_binding.then_some(to_bound),
        form: form(&mut v, format),
    };
    v.finish()?;
    Ok(command)
}

/// A data key, and whether it is shown.
pub(super) fn data_key(m: pb::GenerateDataKeyRequest) -> Result<(GenerateDataKey, bool), Error> {
    let pb::GenerateDataKeyRequest {
        key_id,
        version: asked,
        context,
        additional_data,
        bits,
        without_plaintext,
        key_pair_type,
        format,
    } = m;
    let mut v = Violations::new();
    let what = if key_pair_type == 0 {
        let bits = if bits == 0 { 256 } else { bits };
        v.check(matches!(bits, 128 | 256 | 512), "bits", "must be 128, 256 or 512");
        DataKey::Symmetric(usize::try_from(bits / 8).unwrap_or(32))
    } else {
        v.check(bits == 0, "bits", "has no effect on a key pair");
        match convert::algorithm(key_pair_type).filter(|a| a.is_asymmetric()) {
            Some(algorithm) => DataKey::Pair(algorithm),
            None => {
                v.add("key_pair_type", "must be the type of a key pair");
                DataKey::Pair(Algorithm::EcdsaP256)
            }
        }
    };
    let command = GenerateDataKey {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        bound: bound(&mut v, ("context", context), ("additional_data", additional_data)),
        what,
        form: form(&mut v, format),
    };
    v.finish()?;
    Ok((command, !without_plaintext))
}

/// A signature scheme of the wire; unspecified is none.
fn scheme(v: &mut Violations, value: i32) -> Option<SignatureScheme> {
    if value == pb::SignatureScheme::Unspecified as i32 {
        return None;
    }
    let found = SignatureScheme::ALL.iter().copied().find(|s| wire_scheme(*s) as i32 == value);
    if found.is_none() {
        v.add("scheme", "must be one of the signature schemes");
    }
    found
}

pub(crate) fn wire_scheme(scheme: SignatureScheme) -> pb::SignatureScheme {
    match scheme {
        SignatureScheme::EcdsaSha256 => pb::SignatureScheme::EcdsaSha256,
        SignatureScheme::EcdsaSha384 => pb::SignatureScheme::EcdsaSha384,
        SignatureScheme::EcdsaSha512 => pb::SignatureScheme::EcdsaSha512,
        SignatureScheme::EcdsaSha256P1363 => pb::SignatureScheme::EcdsaSha256P1363,
        SignatureScheme::EcdsaSha384P1363 => pb::SignatureScheme::EcdsaSha384P1363,
        SignatureScheme::EcdsaSha512P1363 => pb::SignatureScheme::EcdsaSha512P1363,
        SignatureScheme::RsaPssSha256 => pb::SignatureScheme::RsaPssSha256,
        SignatureScheme::RsaPssSha384 => pb::SignatureScheme::RsaPssSha384,
        SignatureScheme::RsaPssSha512 => pb::SignatureScheme::RsaPssSha512,
        SignatureScheme::RsaPkcs1Sha256 => pb::SignatureScheme::RsaPkcs1Sha256,
        SignatureScheme::RsaPkcs1Sha384 => pb::SignatureScheme::RsaPkcs1Sha384,
        SignatureScheme::RsaPkcs1Sha512 => pb::SignatureScheme::RsaPkcs1Sha512,
        SignatureScheme::Ed25519 => pb::SignatureScheme::Ed25519,
        SignatureScheme::MlDsa => pb::SignatureScheme::MlDsa,
    }
}

fn to_sign(v: &mut Violations, digest: Option<(bool, Bytes)>) -> ToSign {
    match digest {
        Some((false, bytes)) => ToSign::Message(message(v, "message", bytes)),
        Some((true, bytes)) => {
            v.check(matches!(bytes.len(), 32 | 48 | 64), "digest", "must have 32, 48 or 64 bytes");
            ToSign::Digest(Hidden(bytes))
        }
        None => {
            v.add("input", "must be a message or a digest");
            ToSign::Message(Hidden::default())
        }
    }
}

pub(super) fn sign(m: pb::SignRequest) -> Result<Sign, Error> {
    use pb::sign_request::Input;
    let pb::SignRequest { key_id, version: asked, scheme: how, input } = m;
    let input = input.map(|input| match input {
        Input::Message(bytes) => (false, bytes),
        Input::Digest(bytes) => (true, bytes),
    });
    let mut v = Violations::new();
    let command = Sign {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        input: to_sign(&mut v, input),
        scheme: scheme(&mut v, how),
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn verify(m: pb::VerifyRequest) -> Result<Verify, Error> {
    use pb::verify_request::Input;
    let pb::VerifyRequest { key_id, version: asked, signature, scheme: how, input } = m;
    let input = input.map(|input| match input {
        Input::Message(bytes) => (false, bytes),
        Input::Digest(bytes) => (true, bytes),
    });
    let mut v = Violations::new();
    let command = Verify {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        input: to_sign(&mut v, input),
        signature,
        scheme: scheme(&mut v, how),
    };
    v.check(command.signature.len() <= limits::SIGNATURE, "signature", "must have at most 8 KiB");
    v.finish()?;
    Ok(command)
}

pub(super) fn generate_mac(m: pb::GenerateMacRequest) -> Result<GenerateMac, Error> {
    let pb::GenerateMacRequest { key_id, version: asked, message: bytes } = m;
    let mut v = Violations::new();
    let command = GenerateMac {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        message: message(&mut v, "message", bytes),
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn verify_mac(m: pb::VerifyMacRequest) -> Result<VerifyMac, Error> {
    let pb::VerifyMacRequest { key_id, version: asked, message: bytes, mac } = m;
    let mut v = Violations::new();
    let command = VerifyMac {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        message: message(&mut v, "message", bytes),
        mac,
    };
    v.check(command.mac.len() <= limits::SIGNATURE, "mac", "must have at most 8 KiB");
    v.finish()?;
    Ok(command)
}

/// A length to derive, 32 if nothing is said.
fn length(v: &mut Violations, value: i32) -> usize {
    let value = if value == 0 { 32 } else { value };
    v.check((16..=8160).contains(&value), "length", "must be 16 to 8160, or 0 for 32");
    usize::try_from(value).unwrap_or(32)
}

fn salt(v: &mut Violations, bytes: Bytes) -> Bytes {
    v.check(bytes.len() <= limits::SALT, "salt", "must have at most 1024 bytes");
    bytes
}

pub(super) fn derive(m: pb::DeriveKeyRequest) -> Result<DeriveKey, Error> {
    let pb::DeriveKeyRequest { key_id, version: asked, context: pairs, salt: bytes, length: len } =
        m;
    let mut v = Violations::new();
    context(&mut v, "context", &pairs);
    v.check(!pairs.is_empty(), "context", "must have a pair: it says what the derived key is for");
    let command = DeriveKey {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        context: pairs,
        salt: salt(&mut v, bytes),
        length: length(&mut v, len),
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn agree(m: pb::AgreeRequest) -> Result<Agree, Error> {
    let pb::AgreeRequest {
        key_id,
        version: asked,
        peer_public_key,
        derivation,
        salt: bytes,
        info,
        length: len,
    } = m;
    let mut v = Violations::new();
    let derivation = match pb::KeyDerivation::try_from(derivation) {
        Ok(pb::KeyDerivation::HkdfSha256) => {
            v.check(info.len() <= limits::BOUND_BYTES, "info", "must have at most 8 KiB");
            let (salt, length) = (salt(&mut v, bytes), length(&mut v, len));
            Derivation::Hkdf { salt, info, length }
        }
        Ok(pb::KeyDerivation::Unspecified | pb::KeyDerivation::None) => {
            v.check(bytes.is_empty(), "salt", "has no effect without a derivation");
            v.check(info.is_empty(), "info", "has no effect without a derivation");
            v.check(len == 0, "length", "has no effect without a derivation");
            Derivation::None
        }
        Err(_) => {
            v.add("derivation", "must be KEY_DERIVATION_NONE or HKDF_SHA256");
            Derivation::None
        }
    };
    let command = Agree {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        peer: some(&mut v, "peer_public_key", peer_public_key),
        derivation,
    };
    v.check(command.peer.len() <= limits::PUBLIC_KEY, "peer_public_key", "must have at most 8 KiB");
    v.finish()?;
    Ok(command)
}

pub(super) fn encapsulate(m: pb::EncapsulateRequest) -> Result<Encapsulate, Error> {
    let pb::EncapsulateRequest { key_id, version: asked } = m;
    let mut v = Violations::new();
    let command = Encapsulate {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn decapsulate(m: pb::DecapsulateRequest) -> Result<Decapsulate, Error> {
    let pb::DecapsulateRequest { key_id, version: asked, ciphertext } = m;
    let mut v = Violations::new();
    let command = Decapsulate {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        ciphertext: some(&mut v, "ciphertext", ciphertext),
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn wrap(m: pb::WrapKeyRequest) -> Result<WrapKey, Error> {
    use pb::wrap_key_request::Target;
    let pb::WrapKeyRequest { key_id, version: asked, target_version, target } = m;
    let mut v = Violations::new();
    let of_target = version(&mut v, "target_version", target_version);
    let target = match target {
        Some(Target::KeyMaterial(bytes)) => {
            v.check(of_target == 0, "target_version", "has no effect on key_material");
            let fits = (1..=limits::VALUE).contains(&bytes.len());
            v.check(fits, "key_material", "must have 1 to 4096 bytes");
            ToWrap::Material(Hidden(bytes))
        }
        Some(Target::TargetKeyId(id)) => ToWrap::Key(GetKey {
            key: key_name(&mut v, "target_key_id", &id),
            version: of_target,
            export: Export::Plain,
        }),
        None => {
            v.add("target", "must be key_material or target_key_id");
            ToWrap::Material(Hidden::default())
        }
    };
    let command = WrapKey {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        target,
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn unwrap(m: pb::UnwrapKeyRequest) -> Result<UnwrapKey, Error> {
    let pb::UnwrapKeyRequest { key_id, version: asked, wrapped_key } = m;
    let mut v = Violations::new();
    let command = UnwrapKey {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        wrapped: some(&mut v, "wrapped_key", wrapped_key),
    };
    v.check(command.wrapped.len() <= limits::PUBLIC_KEY, "wrapped_key", "must have at most 8 KiB");
    v.finish()?;
    Ok(command)
}

pub(super) fn random(m: pb::GenerateRandomRequest) -> Result<GenerateRandom, Error> {
    let mut v = Violations::new();
    v.check((1..=65_536).contains(&m.length), "length", "must be 1 to 65536");
    v.finish()?;
    Ok(GenerateRandom { length: usize::try_from(m.length).unwrap_or(1) })
}

pub(super) fn public_key(m: pb::GetPublicKeyRequest) -> Result<GetPublicKey, Error> {
    let pb::GetPublicKeyRequest { key_id, version: asked, format } = m;
    let mut v = Violations::new();
    let form = match pb::PublicKeyFormat::try_from(format) {
        Ok(pb::PublicKeyFormat::Unspecified | pb::PublicKeyFormat::Der) => PublicForm::Der,
        Ok(pb::PublicKeyFormat::Pem) => PublicForm::Pem,
        Ok(pb::PublicKeyFormat::Jwk) => PublicForm::Jwk,
        Err(_) => {
            v.add("format", "must be PUBLIC_KEY_FORMAT_DER, PEM or JWK");
            PublicForm::Der
        }
    };
    let command = GetPublicKey {
        key: key_name(&mut v, "key_id", &key_id),
        version: version(&mut v, "version", asked),
        form,
    };
    v.finish()?;
    Ok(command)
}

pub(super) fn import_parameters(
    m: pb::GetImportParametersRequest,
) -> Result<GetImportParameters, Error> {
    let protection = match pb::ImportWrapping::try_from(m.wrapping) {
        Ok(pb::ImportWrapping::RsaAes) => Protection::RsaAes,
        Ok(pb::ImportWrapping::Hpke) => Protection::Hpke,
        Ok(pb::ImportWrapping::Unspecified | pb::ImportWrapping::Plain) | Err(_) => {
            let text = "must be IMPORT_WRAPPING_RSA_AES or HPKE; PLAIN needs no parameters";
            return Err(Error::invalid("wrapping", text));
        }
    };
    Ok(GetImportParameters { protection })
}

/// The text of an import token.
pub(super) fn token(id: &[u8; 24]) -> String {
    format!("pki_{}", data_encoding::BASE64URL_NOPAD.encode(id))
}

fn token_id(text: &str) -> Option<[u8; 24]> {
    let bytes =
        data_encoding::BASE64URL_NOPAD.decode(text.strip_prefix("pki_")?.as_bytes()).ok()?;
    bytes.try_into().ok()
}

/// An import as the creation that it is.
pub(super) fn import(m: pb::ImportKeyRequest, now: Time) -> Result<CreateKey, Error> {
    let pb::ImportKeyRequest { key, wrapping, import_token, material } = m;
    let mut v = Violations::new();
    let command = match key {
        None => Err(Error::invalid("key", "must be set")),
        Some(key) => {
            policies(&mut v, "key.access_policies", &key.access_policies);
            create(key, now).map_err(|error| within("key", error))
        }
    };
    match &command {
        Ok(command) => {
            let text = "must not be set: the material is in its field";
            v.check(command.value.is_none(), "key.value", text);
            let text = "have no effect on an import";
            v.check(command.prefix.is_none(), "key.generation_params", text);
            let scheduled = command.rotation_period.is_some() || command.rotate_after_uses != 0;
            v.check(!scheduled, "key", "imported material cannot be rotated by the server itself");
        }
        // All that is wrong is said at once.
        Err(Error::Invalid(violations)) => {
            for violation in violations {
                v.add(&violation.field, &violation.description);
            }
        }
        Err(_) => {}
    }
    let fits = (1..=limits::MATERIAL).contains(&material.len());
    v.check(fits, "material", "must have 1 to 16384 bytes");
    let wrapped = |v: &mut Violations, protection| match token_id(&import_token) {
        Some(id) => Some(Import::Wrapped { protection, id, bytes: material.clone() }),
        None => {
            v.add("import_token", "must be a token of GetImportParameters");
            None
        }
    };
    let import = match pb::ImportWrapping::try_from(wrapping) {
        Ok(pb::ImportWrapping::RsaAes) => wrapped(&mut v, Protection::RsaAes),
        Ok(pb::ImportWrapping::Hpke) => wrapped(&mut v, Protection::Hpke),
        Ok(pb::ImportWrapping::Plain) => {
            v.check(import_token.is_empty(), "import_token", "has no effect with PLAIN");
            Some(Import::Plain(Zeroizing::new(material.to_vec())))
        }
        Ok(pb::ImportWrapping::Unspecified) | Err(_) => {
            v.add("wrapping", "must be IMPORT_WRAPPING_RSA_AES, HPKE or PLAIN");
            None
        }
    };
    v.finish()?;
    Ok(CreateKey { import, ..command? })
}

/// Puts a path in front of the fields of an error's violations.
pub(super) fn within(path: &str, error: Error) -> Error {
    match error {
        Error::Invalid(mut violations) => {
            for v in &mut violations {
                v.field = format!("{path}.{}", v.field);
            }
            Error::Invalid(violations)
        }
        other => other,
    }
}

pub(super) fn encrypt_stream(m: pb::EncryptStreamHeader) -> Result<EncryptStream, Error> {
    let pb::EncryptStreamHeader { key_id, version: asked, context, additional_data, chunk_size } =
        m;
    let mut v = Violations::new();
    let chunk = match chunk_size {
        0 => Some(ChunkSize::default()),
        bytes => usize::try_from(bytes).ok().and_then(ChunkSize::from_bytes),
    };
    let text = "must be a power of two from 4096 to 4194304, or 0";
    v.check(chunk.is_some(), "header.chunk_size", text);
    let command = EncryptStream {
        key: key_name(&mut v, "header.key_id", &key_id),
        version: version(&mut v, "header.version", asked),
        bound: bound(
            &mut v,
            ("header.context", context),
            ("header.additional_data", additional_data),
        ),
        chunk: chunk.unwrap_or_default(),
    };
    v.finish()?;
    Ok(command)
}

/// The header of a large ciphertext goes in later.
pub(super) fn decrypt_stream(m: pb::DecryptStreamHeader) -> Result<DecryptStream, Error> {
    let pb::DecryptStreamHeader { key_id, context, additional_data } = m;
    let mut v = Violations::new();
    let command = DecryptStream {
        key: optional_key(&mut v, "header.key_id", &key_id),
        header: Bytes::new(),
        bound: bound(
            &mut v,
            ("header.context", context),
            ("header.additional_data", additional_data),
        ),
    };
    v.finish()?;
    Ok(command)
}
