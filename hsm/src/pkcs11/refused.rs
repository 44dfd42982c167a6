//! PINs that tokens have refused, for the life of this process: a token that counts wrong PINs is not
//! asked twice, whoever asks. What is kept are tags under a key of this process, not the PINs.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::hmac;

use crate::random;

/// The tag of the PIN that was refused last, by token.
static REFUSED: Mutex<BTreeMap<String, [u8; 32]>> = Mutex::new(BTreeMap::new());
static KEY: LazyLock<Option<hmac::Key>> =
    LazyLock::new(|| Some(hmac::Key::new(hmac::HMAC_SHA256, &random::array::<32>().ok()?)));

fn lock() -> MutexGuard<'static, BTreeMap<String, [u8; 32]>> {
    REFUSED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tag(pin: &[u8]) -> Option<[u8; 32]> {
    hmac::sign(KEY.as_ref()?, pin).as_ref().try_into().ok()
}

/// Notes that a token refused a PIN.
pub(super) fn note(token: String, pin: &[u8]) {
    if let Some(tag) = tag(pin) {
        lock().insert(token, tag);
    }
}

/// The tokens that refused this PIN last, as [`super::device`] names them.
pub(super) fn by(pin: &[u8]) -> Vec<String> {
    let Some(tag) = tag(pin) else { return Vec::new() };
    lock().iter().filter(|(_, refused)| **refused == tag).map(|(token, _)| token.clone()).collect()
}

/// Lets this PIN be tried once more, wherever it was refused.
pub(super) fn forget(pin: &[u8]) {
    if let Some(tag) = tag(pin) {
        lock().retain(|_, refused| *refused != tag);
    }
}

/// Lets every PIN be tried once more.
pub(super) fn forget_all() {
    lock().clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_pin_is_known_by_its_token_until_another_one_is_refused_there() {
        note("maker/model/1".into(), b"1111");
        note("maker/model/2".into(), b"1111");
        assert_eq!(by(b"1111"), ["maker/model/1", "maker/model/2"]);
        assert_eq!(by(b"2222"), [""; 0]);
        note("maker/model/1".into(), b"2222");
        assert_eq!(by(b"1111"), ["maker/model/2"]);
        forget(b"1111");
        assert_eq!((by(b"1111").len(), by(b"2222").len()), (0, 1));
        forget(b"2222");
    }
}
