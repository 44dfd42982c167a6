//! Streams: whatever is done to the chunks, the opener releases a beginning of the plaintext at most, and never says
//! that a stream is whole when it is not.

use super::super::aead::TAG_LEN;
use super::*;

const SIZE: ChunkSize = ChunkSize::MIN;
const CHUNK: usize = SIZE.bytes();
const SEALED: usize = CHUNK + TAG_LEN;

fn plaintext(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 251) as u8 ^ n as u8).collect()
}

fn seal(key: &WorkingKey, binding: &Binding<'_>, plaintext: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (header, sealer) = key.seal_stream(binding, SIZE).unwrap();
    (header, sealer.finish(plaintext).unwrap())
}

/// Opens in pieces of `step` bytes: what was released, and whether the stream was whole.
fn open_in(
    key: &WorkingKey,
    binding: &Binding<'_>,
    header: &[u8],
    body: &[u8],
    step: usize,
) -> (Vec<u8>, bool) {
    let mut released = Vec::new();
    let Ok(mut opener) = key.open_stream(binding, header) else { return (released, false) };
    for piece in body.chunks(step) {
        match opener.push(piece) {
            Ok(plaintext) => released.extend_from_slice(&plaintext),
            Err(error) => {
                assert_eq!(error, WorkError::Failed);
                assert!(opener.push(&[]).is_err(), "a broken stream goes on");
                assert!(opener.finish(&[]).is_err(), "a broken stream ends well");
                return (released, false);
            }
        }
    }
    match opener.finish(&[]) {
        Ok(plaintext) => {
            released.extend_from_slice(&plaintext);
            (released, true)
        }
        Err(error) => {
            assert_eq!(error, WorkError::Failed);
            (released, false)
        }
    }
}

fn open(key: &WorkingKey, header: &[u8], body: &[u8]) -> (Vec<u8>, bool) {
    open_in(key, &BINDING, header, body, SEALED)
}

#[test]
fn streams_come_back_at_every_length_in_whatever_pieces() {
    for algorithm in CIPHERS {
        let key = cipher_of(algorithm);
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7, 5 * CHUNK] {
            let plaintext = plaintext(len);
            let (header, body) = seal(&key, &BINDING, &plaintext);
            assert_eq!(header.len(), STREAM_HEADER_LEN);
            // The last chunk is full where the length is a multiple, and empty only in an empty stream.
            assert_eq!(body.len(), len + len.div_ceil(CHUNK).max(1) * TAG_LEN);
            let whole = [&header[..], &body].concat();
            assert_eq!(super::header(&whole).unwrap().plaintext_len, Some(len));
            for step in [1, 100, CHUNK, SEALED, SEALED + 1, 10 * SEALED] {
                if step == 1 && len > CHUNK + 1 {
                    continue;
                }
                let opened = open_in(&key, &BINDING, &header, &body, step);
                assert!(opened == (plaintext.clone(), true), "{algorithm}, {len}, {step}");
            }
            let opener = key.open_stream(&BINDING, &header).unwrap();
            assert_eq!(*opener.finish(&body).unwrap(), plaintext);
        }
    }
}

#[test]
fn how_the_plaintext_is_cut_does_not_show() {
    let key = cipher_of(Algorithm::Aes256);
    let plaintext = plaintext(3 * CHUNK);
    let seal_in = |step: usize, held: usize| {
        let (_, mut sealer) = inside(&key).seal_stream_with(&BINDING, SIZE, &[5; 32]).unwrap();
        let mut body = Vec::new();
        let (first, last) = plaintext.split_at(plaintext.len() - held);
        for piece in first.chunks(step) {
            body.extend(sealer.push(piece).unwrap());
        }
        body.extend(sealer.finish(last).unwrap());
        body
    };
    let whole = seal_in(usize::MAX, plaintext.len());
    for step in [1, 77, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK] {
        for held in [0, 1, CHUNK, CHUNK + 1] {
            assert!(seal_in(step, held) == whole, "{step}, {held}");
        }
    }
}

/// Neither side holds more than a chunk, however much goes through in small pieces.
#[test]
fn memory_is_bounded_by_the_chunk() {
    let key = cipher_of(Algorithm::ChaCha20Poly1305);
    let (header, mut sealer) = key.seal_stream(&BINDING, SIZE).unwrap();
    let mut opener = key.open_stream(&BINDING, &header).unwrap();
    let held = (sealer.held(), opener.held());
    assert_eq!(held, (CHUNK, SEALED));
    let (mut given, mut released) = (0, 0);
    for n in 0..3000 {
        let piece = vec![n as u8; n % 700];
        given += piece.len();
        let sealed = sealer.push(&piece).unwrap();
        assert!(sealed.len() <= SEALED);
        released += opener.push(&sealed).unwrap().len();
        assert!(given - released <= 2 * CHUNK);
        assert_eq!((sealer.held(), opener.held()), held);
    }
    released += opener.finish(&sealer.finish(&[]).unwrap()).unwrap().len();
    assert_eq!(given, released);
}

#[test]
fn chunks_stay_where_they_were_sealed() {
    for algorithm in CIPHERS {
        let key = cipher_of(algorithm);
        let whole = plaintext(4 * CHUNK + 100);
        let (header, body) = seal(&key, &BINDING, &whole);
        let chunks: Vec<&[u8]> = body.chunks(SEALED).collect();
        assert_eq!(chunks.len(), 5);
        let (_, other) = seal(&key, &BINDING, &whole);
        let others: Vec<&[u8]> = other.chunks(SEALED).collect();
        let attack = |what: &str, chunks: &[&[u8]]| {
            for step in [SEALED, 1000, body.len() * 2] {
                let (released, complete) = open_in(&key, &BINDING, &header, &chunks.concat(), step);
                assert!(!complete, "{algorithm}: {what}");
                assert!(whole.starts_with(&released), "{algorithm}: {what}");
            }
        };
        assert!(open(&key, &header, &chunks.concat()) == (whole.clone(), true));
        for n in 0..5 {
            attack("cut off at a chunk", &chunks[..n]);
            attack("a chunk dropped", &[&chunks[..n], &chunks[n + 1..]].concat());
            attack("a chunk repeated", &[&chunks[..=n], &chunks[n..]].concat());
            let mut moved = chunks.clone();
            moved.swap(n, (n + 1) % 5);
            attack("chunks exchanged", &moved);
            let mut spliced = chunks.clone();
            spliced[n] = others[n];
            attack("a chunk of another stream", &spliced);
            attack("two streams joined", &[&chunks[..n], &others[n..]].concat());
        }
        attack("reversed", &chunks.iter().rev().copied().collect::<Vec<_>>());
        attack("a byte appended", &[&chunks[..], &[&[0]]].concat());
        attack("a tag's worth appended", &[&chunks[..], &[&[0; TAG_LEN]]].concat());
        attack("itself appended", &[&chunks[..], &chunks[..]].concat());
        attack("another stream appended", &[&chunks[..], &others[..]].concat());
    }
}

#[test]
fn cut_anywhere_or_changed_anywhere_a_stream_is_not_whole() {
    for algorithm in CIPHERS {
        let key = cipher_of(algorithm);
        let whole = plaintext(CHUNK + 40);
        let (header, body) = seal(&key, &BINDING, &whole);
        for len in (0..body.len()).filter(|n| n % 61 == 0 || n.abs_diff(SEALED) < 20 || *n < 20) {
            let (released, complete) = open(&key, &header, &body[..len]);
            assert!(!complete && whole.starts_with(&released), "{algorithm}: cut at {len}");
        }
        for at in (0..body.len()).filter(|n| n % 61 == 0 || n.abs_diff(SEALED) < 60) {
            let mut changed = body.clone();
            changed[at] ^= 1 << (at % 8);
            let (released, complete) = open(&key, &header, &changed);
            assert!(!complete && whole.starts_with(&released), "{algorithm}: byte {at}");
            // Nothing of the chunk that was changed.
            assert!(released.len() <= at / SEALED * CHUNK);
        }
        for at in 0..header.len() {
            for bit in 0..8 {
                let mut changed = header.clone();
                changed[at] ^= 1 << bit;
                let opener = key.open_stream(&BINDING, &changed);
                assert_eq!(opener.unwrap_err(), WorkError::Failed, "{algorithm}: byte {at}");
            }
            assert!(key.open_stream(&BINDING, &header[..at]).is_err());
        }
        let longer = [&header[..], &[0]].concat();
        assert!(key.open_stream(&BINDING, &longer).is_err());
    }
}

#[test]
fn a_stream_has_one_chunk_size() {
    let key = cipher_of(Algorithm::Aes256Gcm);
    let (header, _) = seal(&key, &BINDING, &plaintext(10));
    for log2 in 0..=255 {
        let mut changed = header.clone();
        changed[26] = log2;
        assert_eq!(key.open_stream(&BINDING, &changed).is_ok(), log2 == SIZE.log2());
    }
}

#[test]
fn an_empty_last_chunk_ends_only_the_empty_stream() {
    let key = cipher_of(Algorithm::Aes256);
    let (header, sealer) = key.seal_stream(&BINDING, SIZE).unwrap();
    let empty = sealer.finish(&[]).unwrap();
    assert_eq!(empty.len(), TAG_LEN);
    assert_eq!(open(&key, &header, &empty), (vec![], true));
    assert_eq!(open(&key, &header, &[]), (vec![], false));
    // A sealer that does not hold the last full chunk back, and ends with an empty one.
    let (header, mut sealer) = key.seal_stream(&BINDING, SIZE).unwrap();
    let mut body = Vec::new();
    sealer.seal_for_test(&mut body, &plaintext(CHUNK), false);
    sealer.seal_for_test(&mut body, &[], true);
    assert_eq!(open(&key, &header, &body), (plaintext(CHUNK), false));
}

#[test]
fn streams_open_under_their_key_and_binding_alone() {
    let key = cipher_of(Algorithm::Aes256);
    let (header, body) = seal(&key, &BINDING, b"plain");
    for binding in [
        Binding { key_id: [0x12; 16], ..BINDING },
        Binding { version: 4, ..BINDING },
        Binding { context: b"contexu", ..BINDING },
        Binding { aad: b"", ..BINDING },
        Binding { context: b"aad", aad: b"context", ..BINDING },
        Binding { context: b"contexta", aad: b"ad", ..BINDING },
    ] {
        assert_eq!(key.open_stream(&binding, &header).unwrap_err(), WorkError::Failed);
    }
    let other = key_of(Algorithm::Aes256, Purpose::Encrypt, 2);
    assert_eq!(other.open_stream(&BINDING, &header).unwrap_err(), WorkError::Failed);
    let gcm = cipher_of(Algorithm::Aes256Gcm);
    assert_eq!(gcm.open_stream(&BINDING, &header).unwrap_err(), WorkError::Failed);
    // A stream is not a message, nor the other way round, even with the other's magic.
    let mut as_message = [&header[..], &body].concat();
    assert!(key.open(&BINDING, &as_message).is_err());
    as_message[..3].copy_from_slice(b"PKC");
    assert!(key.open(&BINDING, &as_message).is_err());
    let message = key.seal(&BINDING, &[12; 40]).unwrap();
    assert!(key.open_stream(&BINDING, &message[..STREAM_HEADER_LEN]).is_err());
}

#[test]
fn a_stream_ends_before_its_numbers_do() {
    let key = cipher_of(Algorithm::Aes256);
    let (header, mut sealer) = key.seal_stream(&BINDING, SIZE).unwrap();
    sealer.skip_to(u32::MAX - 2);
    let mut body = sealer.push(&plaintext(CHUNK + 1)).unwrap();
    body.extend(sealer.finish(&plaintext(CHUNK)[1..]).unwrap());
    let mut opener = key.open_stream(&BINDING, &header).unwrap();
    opener.skip_to(u32::MAX - 2);
    assert_eq!(opener.finish(&body).unwrap().len(), 2 * CHUNK);
    let (_, mut sealer) = key.seal_stream(&BINDING, SIZE).unwrap();
    sealer.skip_to(u32::MAX - 2);
    for _ in 0..2 {
        let refused = sealer.push(&plaintext(3 * CHUNK + 1)).unwrap_err();
        assert!(matches!(refused, WorkError::Input { field: "plaintext", .. }), "{refused}");
    }
    assert!(sealer.finish(&[]).is_err());
}
