//! The published vectors of `docs/ciphertext-format.md`: they open, or do not, as they say; and sealing with their
//! salts gives them again.

use std::path::PathBuf;

use data_encoding::HEXLOWER;
use serde_json::{Value, json};

use super::super::cipher::Bound;
use super::super::format::MessageHeader;
use super::*;

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/ciphertext-v1.json")
}

/// One vector: what a reader is given, and what must come of it.
#[derive(Clone)]
struct Vector {
    name: String,
    algorithm: Algorithm,
    key: Vec<u8>,
    key_id: [u8; 16],
    version: u32,
    context: Vec<(&'static str, &'static str)>,
    aad: &'static [u8],
    plaintext: Option<Vec<u8>>,
    ciphertext: Vec<u8>,
    reason: &'static str,
}

impl Vector {
    fn new(name: &str, algorithm: Algorithm) -> Self {
        Self {
            name: format!("{algorithm}: {name}"),
            algorithm,
            key: (0..key_len(algorithm)).map(|n| 0x40 + n as u8).collect(),
            key_id: std::array::from_fn(|n| n as u8),
            version: 1,
            context: vec![],
            aad: b"",
            plaintext: None,
            ciphertext: vec![],
            reason: "",
        }
    }

    fn with<T>(&self, work: impl FnOnce(&WorkingKey, &Binding<'_>) -> T) -> T {
        let context = canonical_context(
            &self.context.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        );
        let binding = Binding {
            key_id: self.key_id,
            version: self.version,
            context: &context,
            aad: self.aad,
        };
        let material = KeyMaterial::from_secret(self.key.clone()).unwrap();
        let key = WorkingKey::new(self.algorithm, Purpose::Encrypt, &material).unwrap();
        work(&key, &binding)
    }

    fn message(mut self, salt: [u8; 32], plaintext: &[u8]) -> Self {
        self.ciphertext = self.with(|key, binding| {
            let header = MessageHeader::new(binding, key.algorithm());
            inside(key).seal_with(&header, &Bound::of(binding), &salt, plaintext).unwrap()
        });
        self.plaintext = Some(plaintext.to_vec());
        self
    }

    fn stream(mut self, salt: [u8; 32], len: usize) -> Self {
        let plaintext: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
        self.ciphertext = self.with(|key, binding| {
            let stream = inside(key).seal_stream_with(binding, ChunkSize::MIN, &salt).unwrap();
            [stream.0, stream.1.finish(&plaintext).unwrap()].concat()
        });
        self.plaintext = Some(plaintext);
        self
    }

    /// The same with something changed, so that it must not open.
    fn bad(&self, reason: &'static str, change: impl FnOnce(&mut Self)) -> Self {
        let mut bad = self.clone();
        change(&mut bad);
        bad.name = format!("{}: {reason}", self.name);
        bad.plaintext = None;
        bad.reason = reason;
        bad
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "algorithm": self.algorithm.name(),
            "key": HEXLOWER.encode(&self.key),
            "key_id": HEXLOWER.encode(&self.key_id),
            "version": self.version,
            "context": self.context.iter().map(|(n, v)| ((*n).to_owned(), json!(v)))
                .collect::<serde_json::Map<_, _>>(),
            "aad": HEXLOWER.encode(self.aad),
            "ciphertext": to_text(&self.ciphertext),
            "opens": self.plaintext.is_some(),
            "plaintext": self.plaintext.as_ref().map(|p| HEXLOWER.encode(p)),
            "reason": self.reason,
        })
    }
}

fn salt(first: u8) -> [u8; 32] {
    std::array::from_fn(|n| first.wrapping_add(n as u8))
}

fn bound(name: &str, algorithm: Algorithm) -> Vector {
    Vector {
        version: 7,
        context: vec![("tenant", "acme"), ("purpose", "backup"), ("Ångström", "")],
        aad: b"invoice 4711",
        ..Vector::new(name, algorithm)
    }
}

fn messages() -> Vec<Vector> {
    let mut all = Vec::new();
    for algorithm in CIPHERS {
        all.push(Vector::new("empty message", algorithm).message(salt(0x80), b""));
        all.push(bound("message", algorithm).message(salt(0x90), b"The quick brown fox"));
        let mut convergent = bound("convergent message", algorithm);
        let plaintext = b"a name to be found again";
        convergent.ciphertext =
            convergent.with(|key, binding| key.seal_convergent(binding, plaintext).unwrap());
        convergent.plaintext = Some(plaintext.to_vec());
        all.push(convergent);
        let good = bound("message", algorithm).message(salt(0xa0), b"jumps over the lazy dog");
        all.push(good.bad("a bit of the commitment changed", |v| v.ciphertext[58] ^= 1));
        all.push(good.bad("a bit of the ciphertext changed", |v| v.ciphertext[90] ^= 0x80));
        all.push(good.bad("another context", |v| v.context[0].1 = "acmf"));
    }
    let good = bound("message", Algorithm::Aes256).message(salt(0xb0), b"jumps over the lazy dog");
    all.extend([
        good.bad("another key", |v| v.key[31] ^= 1),
        good.bad("another key id than in the header", |v| v.key_id[0] ^= 1),
        good.bad("another key id, in the header too", |v| {
            v.key_id[0] ^= 1;
            v.ciphertext[4] ^= 1;
        }),
        good.bad("another version than in the header", |v| v.version = 8),
        good.bad("another version, in the header too", |v| {
            v.version = 8;
            v.ciphertext[23] = 8;
        }),
        good.bad("another algorithm than the key's", |v| v.algorithm = Algorithm::Aes256Gcm),
        good.bad("another algorithm, in the header too", |v| {
            v.algorithm = Algorithm::Aes256Gcm;
            v.ciphertext[25] = 17;
        }),
        good.bad("a name and its value exchanged", |v| v.context[0] = ("acme", "tenant")),
        good.bad("a byte moved from a name to its value", |v| v.context[0] = ("tenan", "tacme")),
        good.bad("a pair left out", |v| v.context.truncate(2)),
        good.bad("other additional data", |v| v.aad = b"invoice 4712"),
        good.bad("no additional data", |v| v.aad = b""),
        good.bad("a bit of the salt changed", |v| v.ciphertext[57] ^= 1),
        good.bad("a bit of the tag changed", |v| *v.ciphertext.last_mut().unwrap() ^= 1),
        good.bad("the last byte missing", |v| v.ciphertext.truncate(v.ciphertext.len() - 1)),
        good.bad("nothing behind the commitment", |v| v.ciphertext.truncate(90)),
        good.bad("a byte appended", |v| v.ciphertext.push(0)),
        good.bad("format 2", |v| v.ciphertext[3] = 2),
        good.bad("the magic of a stream", |v| v.ciphertext[2] = b'S'),
    ]);
    all.push(two_keys());
    all
}

/// The ciphertext alone opens under this key: only whoever checks the commitment refuses it.
fn two_keys() -> Vector {
    let vector = bound("message", Algorithm::Aes256Gcm);
    let other = Vector { key: vec![0x77; 32], ..vector.clone() };
    let salt = salt(0xc0);
    let blob = other.clone().message(salt, b"").ciphertext;
    let keys = [&vector.key, &other.key].map(|key| {
        let bound = other.with(|_, binding| Bound::of(binding).bytes().to_vec());
        let info = codec::join(&[b"polykey/message/v1", &blob[..26], &bound]);
        let mut okm = [0; 64];
        kdf::hkdf_sha256(key, &salt, &info, &mut okm).unwrap();
        *okm.first_chunk().unwrap()
    });
    let sealed = salamander::for_two_keys(&keys, &[1 << 100, 2, 3]);
    vector.bad("made for two keys, with the commitment to the other", |v| {
        v.ciphertext = [&blob[..90], &sealed].concat();
    })
}

fn streams() -> Vec<Vector> {
    const HEAD: usize = STREAM_HEADER_LEN;
    const SEALED: usize = 4096 + 16;
    let mut all = Vec::new();
    for algorithm in CIPHERS {
        all.push(Vector::new("empty stream", algorithm).stream(salt(0x10), 0));
        all.push(bound("short stream", algorithm).stream(salt(0x20), 40));
    }
    all.push(bound("stream of one chunk", Algorithm::Aes256).stream(salt(0x30), 4096));
    all.push(bound("stream of two", Algorithm::XChaCha20Poly1305).stream(salt(0x40), 4097));
    let good = bound("stream", Algorithm::Aes256).stream(salt(0x50), 4096 + 30);
    let two = bound("stream", Algorithm::Aes256).stream(salt(0x60), 4096 + 30);
    all.push(good.clone());
    all.extend([
        good.bad("cut off after the first chunk", |v| v.ciphertext.truncate(HEAD + SEALED)),
        good.bad("cut off before the first chunk", |v| v.ciphertext.truncate(HEAD)),
        good.bad("the first chunk missing", |v| drop(v.ciphertext.drain(HEAD..HEAD + SEALED))),
        good.bad("the first chunk twice", |v| {
            let first = v.ciphertext[HEAD..HEAD + SEALED].to_vec();
            v.ciphertext.splice(HEAD..HEAD, first);
        }),
        good.bad("the last chunk of another stream", |v| {
            v.ciphertext.truncate(HEAD + SEALED);
            v.ciphertext.extend_from_slice(&two.ciphertext[HEAD + SEALED..]);
        }),
        good.bad("a byte appended", |v| v.ciphertext.push(0)),
    ]);
    let short = bound("short stream", Algorithm::Aes256).stream(salt(0x70), 40);
    all.extend([
        short.bad("another chunk size", |v| v.ciphertext[26] = 13),
        short.bad("a chunk size out of bounds", |v| v.ciphertext[26] = 11),
        short.bad("another key", |v| v.key[0] ^= 1),
        short.bad("another context", |v| v.context.truncate(1)),
        short.bad("a bit of the commitment changed", |v| v.ciphertext[HEAD - 1] ^= 1),
        short.bad("the magic of a message", |v| v.ciphertext[2] = b'C'),
    ]);
    // Sealed by somebody who ends a full chunk with an empty one.
    let mut ended = bound("stream", Algorithm::Aes256);
    ended.ciphertext = ended.with(|key, binding| {
        let key = inside(key);
        let (mut out, mut sealer) =
            key.seal_stream_with(binding, ChunkSize::MIN, &salt(0xd0)).unwrap();
        sealer.seal_for_test(&mut out, &[0x61; 4096], false);
        sealer.seal_for_test(&mut out, &[], true);
        out
    });
    all.push(ended.bad("an empty chunk behind a full one", |_| {}));
    all
}

fn published() -> Value {
    let vectors: Vec<Value> = messages().iter().chain(&streams()).map(Vector::json).collect();
    let about = "Ciphertexts of Polykey, format 1: see docs/ciphertext-format.md. Keys, ids, additional data \
                 and plaintexts in hexadecimal.";
    json!({ "about": about, "vectors": vectors })
}

#[test]
fn sealing_gives_the_published_vectors() {
    // Published once: they are made where there are none, and never again.
    if !path().exists() && std::env::var_os("POLYKEY_REGENERATE").is_some() {
        let text = serde_json::to_string_pretty(&published()).unwrap();
        std::fs::write(path(), text + "\n").unwrap();
    }
    assert!(read() == published(), "{} is not what is sealed now", path().display());
}

fn read() -> Value {
    serde_json::from_slice(&std::fs::read(path()).unwrap()).unwrap()
}

fn hex(value: &Value) -> Vec<u8> {
    HEXLOWER.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

/// Reads a vector as somebody would who has the file alone.
fn replay(vector: &Value) -> Option<Vec<u8>> {
    let algorithm = Algorithm::from_name(vector["algorithm"].as_str().unwrap()).unwrap();
    let material = KeyMaterial::from_secret(hex(&vector["key"])).unwrap();
    let key = WorkingKey::new(algorithm, Purpose::Encrypt, &material).unwrap();
    let pairs = vector["context"].as_object().unwrap().iter();
    let pairs = pairs.map(|(n, v)| (n.clone(), v.as_str().unwrap().to_owned())).collect();
    let (context, aad) = (canonical_context(&pairs), hex(&vector["aad"]));
    let binding = Binding {
        key_id: hex(&vector["key_id"]).try_into().unwrap(),
        version: vector["version"].as_u64().unwrap() as u32,
        context: &context,
        aad: &aad,
    };
    let ciphertext = from_text(vector["ciphertext"].as_str().unwrap()).unwrap();
    let opened = match header(&ciphertext).ok()?.kind {
        CiphertextKind::Message => key.open(&binding, &ciphertext),
        CiphertextKind::Stream => ciphertext
            .split_at_checked(STREAM_HEADER_LEN)
            .ok_or(WorkError::Failed)
            .and_then(|(header, body)| key.open_stream(&binding, header)?.finish(body)),
    };
    opened.ok().map(|plaintext| plaintext.to_vec())
}

#[test]
fn the_published_vectors_do_as_they_say() {
    let file = read();
    let vectors = file["vectors"].as_array().unwrap();
    let mut good = 0;
    for vector in vectors {
        let expected = vector["opens"].as_bool().unwrap().then(|| hex(&vector["plaintext"]));
        assert_eq!(replay(vector), expected, "{}", vector["name"]);
        good += usize::from(expected.is_some());
    }
    println!("{good} that open, {} that do not", vectors.len() - good);
    assert!(good >= 30 && vectors.len() - good >= 40);
}
