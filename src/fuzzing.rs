//! What the fuzz targets run (`tests/fuzz`), and `tests/fuzz_replay.rs` with them: one function for
//! each kind of bytes that comes from outside. None may panic, and none may take forged bytes.
//!
//! Forgeries of what this module makes itself are driven by the input: it is read as a list of
//! changes to something genuine, so that a fuzzer need not find a MAC before it gets anywhere.
#![expect(clippy::expect_used, clippy::panic, reason = "a broken promise must stop the fuzzer")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use http::{HeaderMap, HeaderName, HeaderValue};
use polykey_hsm::work::{self, Binding, ChunkSize, STREAM_HEADER_LEN};
use polykey_hsm::{
    Algorithm, BlobHeader, BlobKey, KeyMaterial, MaterialContext, MaterialState, PublicKey,
    Purpose, RecordBinding, Ring, RootKey, WorkingKey, WrappedBlob, WrappedKey, algorithm, import,
};
use polykey_proto::polykey::record::v1 as record;
use polykey_proto::polykey::v2 as pb;
use prost::Message;
use rustls_pki_types::CertificateDer;
use tonic::metadata::MetadataMap;
use uuid::Uuid;

use crate::audit::{Checkpoint, VerifyingKey, export::verify_export, read};
use crate::authn::api_key::ApiKey;
use crate::authn::certificate::PeerCertificate;
use crate::authn::layer::take_bearer;
use crate::authn::token::{Claims, KeySet, Kind};
use crate::authz::KeyPolicies;
use crate::client::ProfileText;
use crate::config::Config;
use crate::key::KeyId;
use crate::keyring::list::Cursor;
use crate::net::RequestId;
use crate::rpc::{admit, parse};
use crate::time::Time;

/// A fuzz target: its name, which is that of its corpus, and what it runs.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("token", token),
    ("record", record),
    ("blob", blob),
    ("wrapped", wrapped),
    ("ciphertext", ciphertext),
    ("page_token", page_token),
    ("config", config),
    ("metadata", metadata),
    ("certificate", certificate),
    ("policy", policy),
    ("audit_export", audit_export),
    ("request", request),
    ("key", key),
];

const NODE: [u8; 16] = [7; 16];
const CERTIFICATE: [u8; 32] = [9; 32];

fn now() -> Time {
    Time::from_seconds(1_800_000_000)
}

fn ring() -> &'static Ring {
    static RING: OnceLock<Ring> = OnceLock::new();
    RING.get_or_init(|| Ring::generate(NODE).expect("a ring"))
}

/// Applies the changes that `script` lists, three bytes each (position, value xor 1..=255), to
/// something genuine; also what is left of the script, spliced in or cut off, by its first byte.
fn forged(genuine: &[u8], script: &[u8]) -> Vec<u8> {
    let mut bytes = genuine.to_vec();
    let Some((kind, script)) = script.split_first() else { return bytes };
    match kind % 4 {
        0 => bytes.truncate(script.first().map_or(0, |n| usize::from(*n) % (genuine.len() + 1))),
        1 => bytes.extend_from_slice(script),
        _ => {
            for change in script.chunks_exact(3) {
                if let [high, low, xor] = *change {
                    let at = usize::from(u16::from_be_bytes([high, low])) % genuine.len().max(1);
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= xor;
                    }
                }
            }
        }
    }
    bytes
}

/// The seed and public key of RFC 8032 section 7.1, test 1.
const SIGNING_KEY: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60\
                           d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

fn token_keys() -> &'static (KeySet, String) {
    static KEYS: OnceLock<(KeySet, String)> = OnceLock::new();
    KEYS.get_or_init(|| {
        let secret = data_encoding::HEXLOWER.decode(SIGNING_KEY.as_bytes()).expect("hexadecimal");
        let public = secret.get(32..).unwrap_or_default().to_vec();
        let key = record::SigningKeyRecord {
            id: vec![1; 16].into(),
            secret: secret.into(),
            public: public.into(),
            purpose: crate::authn::token::PURPOSE.into(),
            ..Default::default()
        };
        let keys = KeySet::from_records([&key]).expect("a key set");
        let claims = Claims {
            kind: Kind::Access,
            issuer: "node".into(),
            subject: "client".into(),
            token_id: [2; 16],
            family: [3; 16],
            generation: 0,
            issued_at: now(),
            not_before: now(),
            expires_at: now().plus_seconds(900),
            roles: vec!["user".into()],
            tier: 1,
            certificate: CERTIFICATE,
        };
        let token = keys.issue(&claims, now()).expect("a token");
        (keys, token)
    })
}

/// Access tokens, as they come in a header; and API keys.
pub fn token(data: &[u8]) {
    let (keys, genuine) = token_keys();
    let changed = forged(genuine.as_bytes(), data);
    for bytes in [data, &changed] {
        let Ok(text) = std::str::from_utf8(bytes) else { continue };
        let accepted = keys.verify(text, Kind::Access, "node", &CERTIFICATE, now()).is_ok();
        assert_eq!(accepted, text == genuine, "a token that was not issued: {text:?}");
        assert!(keys.verify(text, Kind::Refresh, "node", &CERTIFICATE, now()).is_err());
        assert!(keys.verify(text, Kind::Access, "node", &[8; 32], now()).is_err());
        let _ = keys.inspect(text, "node", now());
        if let Some(key) = ApiKey::parse(text) {
            assert_eq!(key.reveal(), text, "two spellings of one API key");
        }
    }
}

/// Sealed records, and the messages in them.
pub fn record(data: &[u8]) {
    let sealer = ring().sealer();
    let binding = RecordBinding { space: 1, kind: 10, row_key: &NODE };
    static SEALED: OnceLock<Vec<u8>> = OnceLock::new();
    let genuine = SEALED.get_or_init(|| {
        sealer.seal_record(&binding, 5, b"the plaintext of a record").expect("a record")
    });
    let changed = forged(genuine, data);
    for bytes in [data, &changed] {
        let _ = polykey_hsm::header(bytes);
        let opens = sealer.open_record(&binding, bytes).is_ok();
        assert_eq!(opens, bytes == genuine.as_slice(), "a record that was not sealed");
        let other = RecordBinding { row_key: b"another row", ..binding };
        assert!(sealer.open_record(&other, bytes).is_err(), "a record opened in another row");
    }
    same_after_decoding::<record::KeyRecord>(data);
    same_after_decoding::<record::VersionRecord>(data);
    same_after_decoding::<record::ClientRecord>(data);
    same_after_decoding::<record::HeadRecord>(data);
    same_after_decoding::<record::SlotTable>(data);
    same_after_decoding::<record::AuditBody>(data);
    same_after_decoding::<record::JobRecord>(data);
    if let Ok(key) = record::KeyRecord::decode(data) {
        let _ = (crate::key::key_state(&key, now()), crate::key::pick_version(&key, 0));
    }
}

fn same_after_decoding<M: Message + Default + PartialEq>(data: &[u8]) {
    if let Ok(message) = M::decode(data) {
        let bytes = message.encode_to_vec();
        let again = M::decode(bytes.as_slice()).expect("what was encoded decodes");
        assert_eq!(again.encode_to_vec(), bytes, "encoding is not stable");
    }
}

/// The wrapped blobs that clients hold, and stored key material.
pub fn blob(data: &[u8]) {
    struct Genuine {
        key: BlobKey,
        blob: Vec<u8>,
        stored: Vec<u8>,
    }
    let context = MaterialContext {
        node: NODE,
        key_id: NODE,
        version: 1,
        algorithm: Algorithm::Aes256,
        exportable: false,
    };
    static GENUINE: OnceLock<Genuine> = OnceLock::new();
    let genuine = GENUINE.get_or_init(|| {
        let key = BlobKey::generate().expect("a blob key");
        let material = KeyMaterial::from_secret(vec![4; 32]).expect("material");
        let header = BlobHeader { key_id: NODE, version: 1, algorithm: Algorithm::Aes256 };
        let blob = WrappedBlob::seal(&key, &header, &material).expect("a blob");
        let stored = ring().wrap_material(&context, &material, &key).expect("wrapped material");
        Genuine { key, blob, stored }
    });
    for bytes in [data, &forged(&genuine.blob, data)] {
        let _ = WrappedBlob::header(bytes);
        let opens = WrappedBlob::open(&genuine.key, bytes).is_ok();
        assert_eq!(opens, bytes == genuine.blob.as_slice(), "a blob that was not sealed");
    }
    for bytes in [data, &forged(&genuine.stored, data)] {
        let _ = MaterialState::decode(bytes);
        let opens = ring().unwrap_material(&context, bytes).is_ok();
        assert_eq!(opens, bytes == genuine.stored.as_slice(), "material that was not wrapped");
        assert!(ring().hardened_material(&context, bytes).is_err(), "material that no device has");
        let exportable = MaterialContext { exportable: true, ..context };
        assert!(ring().unwrap_material(&exportable, bytes).is_err(), "exportable switched on");
    }
}

/// Wrapped keys as slots hold them, and sealed rings.
pub fn wrapped(data: &[u8]) {
    if let Ok(key) = WrappedKey::decode(data) {
        assert_eq!(key.encode(), data, "two encodings of one wrapped key");
    }
    static GENUINE: OnceLock<(RootKey, Vec<u8>)> = OnceLock::new();
    let (root, sealed) = GENUINE.get_or_init(|| {
        let root = RootKey::generate().expect("a root key");
        let sealed = ring().seal(&root).expect("a sealed ring");
        (root, sealed)
    });
    for bytes in [data, &forged(sealed, data)] {
        let opens = Ring::open(root, bytes).is_ok();
        assert_eq!(opens, bytes == sealed.as_slice(), "a ring that was not sealed");
    }
}

/// Ciphertexts of messages and of streams, and their printable form.
pub fn ciphertext(data: &[u8]) {
    struct Genuine {
        key: WorkingKey,
        message: Vec<u8>,
        stream: Vec<u8>,
    }
    let binding = Binding { key_id: NODE, version: 1, context: b"context", aad: b"aad" };
    let elsewhere = Binding { context: b"aad", aad: b"context", ..binding };
    static GENUINE: OnceLock<Genuine> = OnceLock::new();
    let Genuine { key, message, stream } = GENUINE.get_or_init(|| {
        let material = KeyMaterial::from_secret(vec![4; 32]).expect("material");
        let key = WorkingKey::new(Algorithm::Aes256, Purpose::Encrypt, &material).expect("a key");
        let message = key.seal(&binding, b"the plaintext of a message").expect("a message");
        let (mut stream, sealer) = key.seal_stream(&binding, ChunkSize::MIN).expect("a stream");
        stream.extend(sealer.finish(&[5; 4100]).expect("two chunks"));
        Genuine { key, message, stream }
    });
    for bytes in [data, &forged(message, data)] {
        if let Ok(header) = work::header(bytes) {
            assert_eq!(header.header_len + header.body_len, bytes.len());
        }
        let opens = key.open(&binding, bytes).is_ok();
        assert_eq!(opens, bytes == message.as_slice(), "a message that was not sealed");
        assert!(key.open(&elsewhere, bytes).is_err(), "a message opened in another context");
    }
    let opens = |binding, bytes: &[u8]| {
        bytes.split_at_checked(STREAM_HEADER_LEN).is_some_and(|(header, body)| {
            key.open_stream(binding, header).and_then(|opener| opener.finish(body)).is_ok()
        })
    };
    for bytes in [data, &forged(stream, data)] {
        let genuine = bytes == stream.as_slice();
        assert_eq!(opens(&binding, bytes), genuine, "a stream that was not sealed");
        assert!(!opens(&elsewhere, bytes), "a stream opened in another context");
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(blob) = work::from_text(text)
    {
        assert_eq!(work::to_text(&blob), text, "two spellings of one ciphertext");
    }
}

/// The page tokens of key lists and of the audit log.
pub fn page_token(data: &[u8]) {
    let digest = [6; 32];
    let cursor =
        Cursor { last: KeyId::from_slice(&NODE).expect("16 bytes"), total: 10, filtered: 3 };
    static TOKEN: OnceLock<String> = OnceLock::new();
    let genuine = TOKEN.get_or_init(|| cursor.seal(ring(), &digest));
    for bytes in [data, &forged(genuine.as_bytes(), data)] {
        let Ok(text) = std::str::from_utf8(bytes) else { continue };
        match Cursor::open(ring(), text, &digest) {
            Ok(opened) => assert!(text == genuine && opened == cursor, "{text:?}"),
            Err(_) => assert_ne!(text, genuine),
        }
        assert!(Cursor::open(ring(), text, &[5; 32]).is_err(), "taken for another query");
        assert!(!read::is_token(ring(), text), "taken for a token of the audit log");
    }
}

/// Configuration files and profiles.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(errors) = Config::parse(Path::new("/etc/polykey/polykey.toml"), text) {
        assert!(!errors.to_string().is_empty());
    }
    let _ = toml::from_str::<ProfileText>(text);
}

/// Metadata: one `name: value` a line, as the headers of one request.
pub fn metadata(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|b| *b == b'\n').take(64) {
        let mut parts = line.splitn(2, |b| *b == b':');
        let (Some(name), Some(value)) = (parts.next(), parts.next()) else { continue };
        let value = value.strip_prefix(b" ").unwrap_or(value);
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }
    let id = RequestId::of(&headers);
    assert!((1..=64).contains(&id.as_str().len()), "{id}");
    let token = take_bearer(&mut headers);
    assert!(token.is_none() || !headers.contains_key("authorization"), "a token stays behind");
    let metadata = MetadataMap::from_headers(headers);
    if let Ok(Some(key)) = admit::idempotency_key(&metadata) {
        assert!((1..=128).contains(&key.len()));
    }
    let _ = parse::create_twins(&mut pb::CreateKeyRequest::default(), &metadata);
    let _ = parse::rotate_twins(&mut pb::RotateKeyRequest::default(), &metadata);
    let _ = parse::revision_twin(&mut None, &metadata);
    let _ = parse::export_twins(&mut 0, &mut bytes::Bytes::new(), &metadata);
}

/// Certificate chains of clients: one certificate, DER.
pub fn certificate(data: &[u8]) {
    let chain = [CertificateDer::from(data)];
    if let Ok(certificate) = PeerCertificate::parse(&chain) {
        assert!(certificate.not_before() <= certificate.not_after() || data.len() > 64);
        let _ = (certificate.spiffe_id(), certificate.next_expiry(0));
    }
}

/// The access policies of a key.
pub fn policy(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let texts = BTreeMap::from([("policy".to_owned(), text.to_owned())]);
    if let Err(errors) = KeyPolicies::compile(Uuid::from_bytes(NODE), &texts) {
        assert!(!errors.to_string().is_empty());
    }
}

/// Exports of the audit log and signed checkpoints.
pub fn audit_export(data: &[u8]) {
    let keys = [VerifyingKey([3; 32])];
    let report = verify_export(data, &keys, &[]).expect("reading memory");
    assert_eq!(report.covered, 0, "vouched for by a key that signed nothing");
    if let Some(checkpoint) = std::str::from_utf8(data).ok().and_then(Checkpoint::parse) {
        assert!(checkpoint.verify(&keys).is_none());
    }
}

/// Keys from outside: the first byte chooses the type, the rest is read as PKCS#8 (or what the type has), as a public
/// key in each of its forms, and as a JSON Web Key.
pub fn key(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else { return };
    let choice = usize::from(*choice) % Algorithm::ALL.len();
    let Some(&algorithm) = Algorithm::ALL.get(choice) else { return };
    let made = |made: algorithm::Generated| {
        assert_eq!(made.public.is_some(), algorithm.is_asymmetric());
        if let Some(public) = made.public {
            let again = PublicKey::from_spki(algorithm, &public.spki_der);
            assert_eq!(again.as_ref(), Ok(&public), "a public key that is refused");
            if let Ok(pem) = public.to_pem() {
                assert_eq!(PublicKey::from_pem(algorithm, &pem).as_ref(), Ok(&public));
            }
            if let Ok(jwk) = public.to_jwk() {
                assert_eq!(PublicKey::from_jwk(algorithm, &jwk.to_string()).as_ref(), Ok(&public));
            }
        }
    };
    if let Ok(material) = KeyMaterial::from_secret(data.to_vec())
        && let Ok(key) = algorithm::import(algorithm, material)
    {
        made(key);
    }
    if let Ok(public) = PublicKey::from_spki(algorithm, data) {
        assert_eq!(public.spki_der, data, "one encoding");
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    for public in [PublicKey::from_pem(algorithm, text), PublicKey::from_jwk(algorithm, text)] {
        assert!(public.is_err() || algorithm.is_asymmetric());
    }
    if let Ok(key) = import::import_jwk(algorithm, text) {
        made(key);
    }
}

/// Request messages: parsed into commands, whatever the fields.
pub fn request(data: &[u8]) {
    same_after_decoding::<pb::CreateKeyRequest>(data);
    same_after_decoding::<pb::BatchCreateKeysRequest>(data);
    same_after_decoding::<pb::UpdateKeyMetadataRequest>(data);
    same_after_decoding::<pb::ListKeysRequest>(data);
    if let Ok(message) = pb::AuthenticateRequest::decode(data) {
        let shown = format!("{message:?}");
        if message.api_key.len() > 16 {
            assert!(!shown.contains(&message.api_key), "an API key is printed");
        }
    } else if data.is_empty() {
        panic!("the empty message is one");
    }
}
