use proptest::prelude::*;

use super::*;
use crate::work::SignatureScheme;
use crate::{Algorithm, Purpose};

fn frames() -> Vec<Frame> {
    let key = KeySelector { label: Some("kek".to_owned()), id: Some(vec![1, 2]) };
    let choice = MechanismChoice::Auto;
    let sealed = Sealed { mechanism: WrapMechanism::AesGcm, iv: vec![3; 12], wrapped: vec![4; 48] };
    let id = || "pkcs11:1:id-01".to_owned();
    let token = TokenListing {
        label: "a".to_owned(),
        serial: "b".to_owned(),
        manufacturer: "c".to_owned(),
        model: "d".to_owned(),
        initialized: true,
        pin_low: false,
        pin_locked: true,
    };
    let slot = |token| SlotListing { slot: 7, description: "x".to_owned(), token };
    let pin = Some(Zeroizing::new(b"1234".to_vec()));
    vec![
        Hello {
            module: "/m.so".into(),
            token: TokenSelector::Slot(3),
            pin,
            refused_by: vec!["a/b/1".to_owned(), "a/b/2".to_owned()],
        }
        .encode(),
        Hello {
            module: "/m.so".into(),
            token: TokenSelector::Label("polykey".to_owned()),
            pin: None,
            refused_by: Vec::new(),
        }
        .encode(),
        Request::List.encode(),
        Request::Find { key: key.clone(), choice }.encode(),
        Request::Wrap { key: key.clone(), choice, aad: [5; 32], secret: Key::default() }.encode(),
        Request::Unwrap {
            key: key.clone(),
            choice,
            expected: id(),
            aad: [5; 32],
            sealed: sealed.clone(),
        }
        .encode(),
        Request::Create { key, choice }.encode(),
        Request::Data { label: "d".to_owned(), value: None }.encode(),
        Request::Data { label: "d".to_owned(), value: Some(vec![7; 9]) }.encode(),
        Reply::Data(vec![vec![7; 9], Vec::new()]).encode(),
        Reply::Slots(vec![slot(None), slot(Some(token))]).encode(),
        Reply::Found { id: id(), mechanism: WrapMechanism::AesKw, locked_in: true }.encode(),
        Reply::Wrapped { id: id(), sealed }.encode(),
        Reply::Secret { id: id(), secret: Key::default() }.encode(),
        Reply::Broken { id: id() }.encode(),
        Reply::NotMine { id: id() }.encode(),
        Reply::Refused(id()).encode(),
        Reply::PinRefused { token: id(), text: id() }.encode(),
        Reply::Unavailable(id()).encode(),
    ]
    .into_iter()
    .chain(key_frames())
    .collect()
}

fn key_frames() -> Vec<Frame> {
    let secret = || Zeroizing::new(vec![6; 9]);
    let works = [
        KeyWork::Generate,
        KeyWork::Find,
        KeyWork::Destroy,
        KeyWork::Sign { scheme: SignatureScheme::EcdsaSha256, digest: vec![1; 32] },
        KeyWork::Decrypt { ciphertext: vec![2; 256] },
        KeyWork::Seal { aad: vec![3; 5], plaintext: secret() },
        KeyWork::Open { aad: vec![], sealed: vec![4; 28] },
    ];
    let request = |work| {
        let (algorithm, purpose) = (Algorithm::EcdsaP256, Purpose::Sign);
        Request::Key(KeyRequest { id: vec![9; 16], algorithm, purpose, work }).encode()
    };
    let replies = [
        KeyReply::There(Some(vec![5; 91])),
        KeyReply::There(None),
        KeyReply::Public(vec![5; 70]),
        KeyReply::Secret(secret()),
        KeyReply::Destroyed,
        KeyReply::AlreadyThere,
        KeyReply::NotThere,
        KeyReply::Failed,
        KeyReply::Unsupported("x".to_owned()),
    ];
    let replies = replies.into_iter().map(|reply| Reply::Key(reply).encode());
    works.into_iter().map(request).chain(replies).collect()
}

/// Reads a frame as whatever it is, and writes it again.
fn again(frame: &[u8]) -> Option<Frame> {
    let hello = Hello::decode(frame).map(|m| m.encode());
    let request = Request::decode(frame).map(|m| m.encode());
    let reply = Reply::decode(frame).map(|m| m.encode());
    hello.or(request).or(reply).ok()
}

#[test]
fn frames_are_read_whole_or_not_at_all() {
    for frame in frames() {
        assert_eq!(again(&frame).as_deref(), Some(&*frame));
        for cut in 0..frame.len() {
            // A list of slots may end after any of them.
            let shorter = again(&frame[..cut]);
            assert!(shorter.is_none_or(|f| f[1] == 32 && f.len() == cut), "{frame:?} at {cut}");
        }
        let longer = [&frame[..], &[0]].concat();
        assert!(again(&longer).is_none(), "{frame:?}");
        let mut newer = frame.to_vec();
        newer[0] = VERSION + 1;
        assert!(again(&newer).is_none());
    }
}

#[test]
fn frames_pass_through_a_pipe_and_long_ones_do_not() {
    let mut pipe = Vec::new();
    for frame in frames() {
        write(&mut pipe, &frame).unwrap();
    }
    let mut reader = &pipe[..];
    for frame in frames() {
        assert_eq!(read(&mut reader).unwrap().unwrap(), frame);
    }
    assert!(read(&mut reader).unwrap().is_none());
    assert!(read(&mut &pipe[..3]).is_err());
    assert!(read(&mut &[0xff; 8][..]).is_err());
    assert!(write(&mut Vec::new(), &[0; MAX_FRAME + 1]).is_err());
}

proptest! {
    #[test]
    fn no_bytes_panic(frame in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..43) {
        let mut frame = frame;
        frame.splice(0..0, [VERSION, kind]);
        if let Some(written) = again(&frame) {
            prop_assert_eq!(&written[..], &frame[..]);
        }
    }
}
