//! What an anchor is kept on.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use polykey_hsm::pkcs11::Pkcs11Token;
use polykey_hsm::{Deadline, WrapError};

use super::target::Target;
use super::{Anchored, file};
use crate::custody::section;

/// How long a token is waited for.
const CALL: Duration = Duration::from_secs(5);
/// How often it is looked whether the store has changed: a file or a row may be written as often.
const FILE_REST: Duration = Duration::from_millis(500);
/// The same for a token, whose memory wears out.
const TOKEN_REST: Duration = Duration::from_secs(10);
/// A standby that lagged, or a backup, may have taken the place of the database.
const TARGET_REFRESH: Duration = Duration::from_secs(30);

/// Where an anchor is kept.
#[derive(Clone, Debug)]
pub enum Medium {
    /// In a file.
    File(PathBuf),
    /// In a data object of a PKCS#11 token.
    Token {
        /// Of which wrapper the token is.
        wrapper: String,
        /// `CKA_LABEL` of the object.
        label: String,
        /// The token.
        token: Pkcs11Token,
    },
    /// Beside the replica, in the database that the store is shipped to.
    Target(Target),
}

impl std::fmt::Display for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Token { wrapper, label, .. } => {
                write!(f, "`{label}` in the token of {}", section(wrapper))
            }
            Self::Target(target) => write!(f, "in the replication target {target}"),
        }
    }
}

impl Medium {
    /// The text of the anchor, if there is one. Waits for a token or a database.
    ///
    /// # Errors
    /// What the system, the token or the database says; [`io::ErrorKind::NotConnected`] if it is away.
    pub fn read(&self) -> io::Result<Option<String>> {
        match self {
            Self::File(path) => file::read(path),
            Self::Token { label, token, .. } => {
                let found = token.data(label, Deadline::after(CALL));
                let found = futures::executor::block_on(found).map_err(|e| of_token(token, e))?;
                // Two where a change broke off: the later one.
                let later = |text: &String| {
                    Anchored::claimed(text).map(|it| (it.mark.log.size(), it.mark.counter))
                };
                let invalid = || io::Error::new(io::ErrorKind::InvalidData, "it is no anchor");
                let texts = found.into_iter().map(String::from_utf8).collect::<Result<Vec<_>, _>>();
                Ok(texts.map_err(|_| invalid())?.into_iter().max_by_key(later))
            }
            Self::Target(target) => target.read(),
        }
    }

    /// Puts the anchor there, durable when this returns. At every moment there is the old one or the new
    /// one, whole. Waits for a token or a database.
    ///
    /// # Errors
    /// As [`Self::read`]; the old one may be there still.
    pub fn replace(&self, text: &str) -> io::Result<()> {
        match self {
            Self::File(path) => file::replace(path, text),
            Self::Token { label, token, .. } => {
                let put = token.put_data(label, text.as_bytes(), Deadline::after(CALL));
                futures::executor::block_on(put).map_err(|error| of_token(token, error))
            }
            Self::Target(target) => target.replace(text),
        }
    }

    /// After how long it is written once more, though nothing has changed: a database may be another one by then.
    pub(super) fn refreshed(&self) -> Option<Duration> {
        matches!(self, Self::Target(_)).then_some(TARGET_REFRESH)
    }

    /// How often it is looked whether there is something new to write, where nobody waits for it.
    pub(super) fn rest(&self) -> Duration {
        match self {
            Self::File(_) | Self::Target(_) => FILE_REST,
            Self::Token { .. } => TOKEN_REST,
        }
    }
}

fn of_token(token: &Pkcs11Token, error: WrapError) -> io::Error {
    let kind = match error {
        WrapError::Unavailable { .. } | WrapError::DeadlineExceeded => io::ErrorKind::NotConnected,
        _ => io::ErrorKind::Other,
    };
    let said = token.last_failure().unwrap_or_else(|| error.to_string());
    io::Error::new(kind, said)
}
