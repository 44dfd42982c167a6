//! Page tokens: where to go on, authentic, and of one list with one filter.

use data_encoding::BASE64URL_NOPAD;
use polykey_hsm::MacPurpose;

use crate::error::Error;
use crate::vault::Vault;

const MAC: usize = 32;
/// Longest token that is looked at.
const LONGEST: usize = 2048;

/// The token of what comes after `last`.
pub(super) fn token(vault: &Vault, list: &str, filter: &str, last: &[u8]) -> String {
    let parts: [&[u8]; 3] = [list.as_bytes(), filter.as_bytes(), last];
    let mac = vault.ring().mac(MacPurpose::PageToken, &parts);
    BASE64URL_NOPAD.encode(&[&mac, last].concat())
}

/// What the token says; `None` for the first page.
pub(super) fn last(
    vault: &Vault,
    list: &str,
    filter: &str,
    token: &str,
) -> Result<Option<Vec<u8>>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let read = || {
        let bytes =
            BASE64URL_NOPAD.decode(token.get(..token.len().min(LONGEST))?.as_bytes()).ok()?;
        let (mac, last) = bytes.split_at_checked(MAC)?;
        let parts: [&[u8]; 3] = [list.as_bytes(), filter.as_bytes(), last];
        let authentic = vault.ring().verify_mac(MacPurpose::PageToken, &parts, mac);
        authentic.then(|| last.to_vec())
    };
    let refused = || Error::invalid("page_token", "is not a token of this list with these filters");
    read().map(Some).ok_or_else(refused)
}

/// As [`last`], where it is a name.
pub(super) fn last_name(
    vault: &Vault,
    list: &str,
    filter: &str,
    token: &str,
) -> Result<Option<String>, Error> {
    let bytes = last(vault, list, filter, token)?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}
