//! The suite that every key wrapper passes. It panics where one does not.
#![expect(clippy::panic, reason = "assertions of a test suite")]

use std::time::{Duration, Instant};

use crate::{Deadline, KeyMaterial, KeyWrapper, WrapContext, WrapError, WrappedKey};

const CONTEXT: WrapContext =
    WrapContext { node_id: [0x11; 16], purpose: "conformance", slot_id: [0x22; 16] };

/// What a suite is run over.
pub struct Subject<'a> {
    /// The wrapper.
    pub wrapper: &'a dyn KeyWrapper,
    /// The same secret or device, opened once more, as after a restart.
    pub reopened: &'a dyn KeyWrapper,
    /// One of the same kind that holds another secret.
    pub other: &'a dyn KeyWrapper,
    /// The longest key it wraps, in bytes; a device may do with few.
    pub max_key: usize,
    /// Tamper with each n-th byte; 1 unless unwrapping is slow and another run does them all.
    pub tamper_every: usize,
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn key(len: usize) -> KeyMaterial {
    match KeyMaterial::random(len) {
        Ok(key) => key,
        Err(e) => panic!("{e}"),
    }
}

async fn wrap(wrapper: &dyn KeyWrapper, key: &KeyMaterial, cx: &WrapContext) -> WrappedKey {
    match wrapper.wrap_key(key, cx, soon()).await {
        Ok(wrapped) => wrapped,
        Err(e) => panic!("a key of {} bytes does not wrap: {e}", key.len()),
    }
}

async fn open(
    wrapper: &dyn KeyWrapper,
    wrapped: &WrappedKey,
    cx: &WrapContext,
) -> Result<KeyMaterial, WrapError> {
    wrapper.unwrap_key(wrapped, cx, soon()).await
}

/// Runs everything.
///
/// # Panics
/// At the first thing that does not hold.
pub async fn run(subject: &Subject<'_>) {
    round_trips(subject).await;
    wrong_context(subject).await;
    wrong_wrapper(subject).await;
    tampering(subject).await;
    deadlines(subject).await;
}

async fn round_trips(s: &Subject<'_>) {
    for len in [1, 16, 32, 49, s.max_key] {
        let secret = key(len);
        let wrapped = wrap(s.wrapper, &secret, &CONTEXT).await;
        assert_eq!(wrapped.kind(), s.wrapper.kind());
        assert_eq!(wrapped.wrapper(), s.wrapper.id());
        let stored = wrapped.encode();
        let found = len >= 16 && stored.windows(len).any(|w| w == secret.bytes());
        assert!(!found, "the wrapped form shows the key");
        let decoded = WrappedKey::decode(&stored);
        assert_eq!(decoded.as_ref(), Ok(&wrapped));
        for wrapper in [s.wrapper, s.reopened] {
            match open(wrapper, &wrapped, &CONTEXT).await {
                Ok(opened) => assert!(opened.bytes() == secret.bytes(), "another key came back"),
                Err(e) => panic!("a key of {len} bytes does not unwrap: {e}"),
            }
        }
        let again = wrap(s.wrapper, &secret, &CONTEXT).await;
        assert_ne!(again.encode(), stored, "wrapping twice shows that the key is the same");
    }
    if let Ok(too_long) = KeyMaterial::random(s.max_key + 1)
        && s.max_key < KeyMaterial::MAX_LEN
    {
        let refused = s.wrapper.wrap_key(&too_long, &CONTEXT, soon()).await;
        assert!(matches!(refused, Err(WrapError::Config(_))), "{refused:?}");
    }
}

async fn wrong_context(s: &Subject<'_>) {
    let wrapped = wrap(s.wrapper, &key(32), &CONTEXT).await;
    for cx in [
        WrapContext { node_id: [0x12; 16], ..CONTEXT },
        WrapContext { purpose: "conformancf", ..CONTEXT },
        WrapContext { purpose: "", ..CONTEXT },
        WrapContext { slot_id: [0x21; 16], ..CONTEXT },
        WrapContext { node_id: CONTEXT.slot_id, slot_id: CONTEXT.node_id, ..CONTEXT },
    ] {
        let opened = open(s.wrapper, &wrapped, &cx).await;
        assert!(matches!(opened, Err(WrapError::Broken)), "{cx:?}: {opened:?}");
    }
}

async fn wrong_wrapper(s: &Subject<'_>) {
    let wrapped = wrap(s.wrapper, &key(32), &CONTEXT).await;
    // "Not mine" where the ids tell the two apart, "mine and broken" where they cannot.
    let opened = open(s.other, &wrapped, &CONTEXT).await;
    let told_apart = s.other.id() != s.wrapper.id();
    match opened {
        Err(WrapError::NotMine) if told_apart => {}
        Err(WrapError::Broken) if !told_apart => {}
        other => panic!("another secret gave {other:?}"),
    }
    // A forged name must not turn one into the other.
    let forged = WrappedKey { wrapper: s.other.id().clone(), ..wrapped };
    let opened = open(s.other, &forged, &CONTEXT).await;
    assert!(matches!(opened, Err(WrapError::Broken)), "{opened:?}");
}

async fn tampering(s: &Subject<'_>) {
    let wrapped = wrap(s.wrapper, &key(32), &CONTEXT).await;
    let stored = wrapped.encode();
    for at in 0..stored.len() {
        let mut changed = stored.clone();
        if let Some(byte) = changed.get_mut(at) {
            *byte ^= 1 << (at % 8);
        }
        if at % s.tamper_every == 0
            && let Ok(decoded) = WrappedKey::decode(&changed)
        {
            let opened = open(s.wrapper, &decoded, &CONTEXT).await;
            assert!(
                matches!(opened, Err(WrapError::Broken | WrapError::NotMine)),
                "byte {at} changed: {opened:?}"
            );
        }
        assert!(
            stored.get(..at).is_some_and(|cut| WrappedKey::decode(cut).is_err()),
            "cut at {at}"
        );
    }
    // Cuts inside the parts, which their lengths then admit.
    for cut in 0..wrapped.ciphertext.len() {
        let short = WrappedKey {
            ciphertext: wrapped.ciphertext.iter().copied().take(cut).collect(),
            ..wrapped.clone()
        };
        if cut % s.tamper_every == 0 || cut + 1 == wrapped.ciphertext.len() {
            let opened = open(s.wrapper, &short, &CONTEXT).await;
            assert!(matches!(opened, Err(WrapError::Broken)), "{opened:?}");
        }
    }
    for cut in 0..wrapped.parameters.len() {
        let short = WrappedKey {
            parameters: wrapped.parameters.iter().copied().take(cut).collect(),
            ..wrapped.clone()
        };
        let opened = open(s.wrapper, &short, &CONTEXT).await;
        assert!(matches!(opened, Err(WrapError::Broken)), "{opened:?}");
    }
}

async fn deadlines(s: &Subject<'_>) {
    let past = Deadline(Instant::now());
    let secret = key(32);
    let refused = s.wrapper.wrap_key(&secret, &CONTEXT, past).await;
    assert!(matches!(refused, Err(WrapError::DeadlineExceeded)), "{refused:?}");
    let wrapped = wrap(s.wrapper, &secret, &CONTEXT).await;
    let refused = s.wrapper.unwrap_key(&wrapped, &CONTEXT, past).await;
    assert!(matches!(refused, Err(WrapError::DeadlineExceeded)), "{refused:?}");
}
