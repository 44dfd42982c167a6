//! The tokens in which keys of callers live. A token that is away is asked all the same: its own queue
//! and deadlines hold up nobody else.

use std::time::Duration;

use polykey_hsm::pkcs11::{Pkcs11Token, ResidentError, ResidentKey};
use polykey_hsm::work::{SignInput, SignatureScheme, WorkError};
use polykey_hsm::{Algorithm, Deadline, Purpose, WrapError};
use zeroize::Zeroizing;

use super::NamedWrapper;
use super::backends::section;
use crate::config::Hardened;
use crate::error::{Error, Reason};

/// The longest that a use takes.
const USE: Duration = Duration::from_secs(5);
/// The longest that a key takes to be made: tokens make RSA keys slowly, and no call lasts longer.
const MAKE: Duration = Duration::from_secs(50);

/// What keys live in.
#[derive(Debug, Default)]
pub struct Tokens {
    /// The NAME of `[hardened] wrapper`: new keys are made there, if it is a token.
    wanted: Option<String>,
    known: Vec<(String, Pkcs11Token)>,
}

impl Tokens {
    /// Those of the wrappers of a node.
    #[must_use]
    pub fn new(config: Option<&Hardened>, wrappers: &[NamedWrapper]) -> Self {
        let token = |named: &NamedWrapper| Some((named.name.clone(), named.token.clone()?));
        Self {
            wanted: config.map(|config| config.wrapper.clone()),
            known: wrappers.iter().filter_map(token).collect(),
        }
    }

    /// One token, for new keys too.
    #[cfg(test)]
    pub(crate) fn of(name: &str, token: Pkcs11Token) -> Self {
        Self { wanted: Some(name.to_owned()), known: vec![(name.to_owned(), token)] }
    }

    /// Where new keys are made.
    ///
    /// # Errors
    /// [`Reason::ProfileUnavailable`] where that is no token.
    pub fn wanted(&self) -> Result<(&str, &Pkcs11Token), Error> {
        let wanted = self.known.iter().find(|(name, _)| Some(name) == self.wanted.as_ref());
        wanted.map(|(name, token)| (name.as_str(), token)).ok_or_else(unavailable)
    }

    /// Makes a key.
    ///
    /// # Errors
    /// Whatever the token says; then there is none, unless its answer was lost.
    pub async fn make(
        &self,
        id: &[u8],
        algorithm: Algorithm,
        purpose: Purpose,
    ) -> Result<ResidentKey, Error> {
        let (name, token) = self.wanted()?;
        let made = token.generate_resident(id, algorithm, purpose, Deadline::after(MAKE)).await;
        made.map_err(|error| failed(name, token, error))
    }

    /// Signs.
    ///
    /// # Errors
    /// Whatever the token says.
    pub async fn sign(
        &self,
        key: &ResidentKey,
        scheme: SignatureScheme,
        input: SignInput<'_>,
    ) -> Result<Vec<u8>, Error> {
        for (name, token) in &self.known {
            let input = match &input {
                SignInput::Message(message) => SignInput::Message(message),
                SignInput::Digest(digest) => SignInput::Digest(digest),
            };
            match token.sign_resident(key, scheme, input, Deadline::after(USE)).await {
                Err(ResidentError::NotThere) => {}
                done => return done.map_err(|error| failed(name, token, error)),
            }
        }
        Err(nowhere(key))
    }

    /// Decrypts RSA-OAEP.
    ///
    /// # Errors
    /// Whatever the token says; [`Error::Crypto`] if it does not open.
    pub async fn decrypt(
        &self,
        key: &ResidentKey,
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        for (name, token) in &self.known {
            match token.decrypt_resident(key, ciphertext, Deadline::after(USE)).await {
                Err(ResidentError::NotThere) => {}
                done => return done.map_err(|error| failed(name, token, error)),
            }
        }
        Err(nowhere(key))
    }

    /// Destroys a key wherever it is; that it is nowhere is no failure.
    ///
    /// # Errors
    /// Whatever a token says.
    pub async fn destroy(&self, key: &ResidentKey) -> Result<(), Error> {
        for (name, token) in &self.known {
            match token.destroy_resident(key, Deadline::after(USE)).await {
                Ok(()) | Err(ResidentError::NotThere) => {}
                Err(error) => return Err(failed(name, token, error)),
            }
        }
        Ok(())
    }
}

fn unavailable() -> Error {
    Error::State(Reason::ProfileUnavailable)
}

fn nowhere(key: &ResidentKey) -> Error {
    let id = data_encoding::HEXLOWER.encode(&key.id);
    tracing::error!(id, "no configured token has this key: configure the one that had it");
    unavailable()
}

fn failed(name: &str, token: &Pkcs11Token, error: ResidentError) -> Error {
    let reason = token.last_failure().unwrap_or_default();
    let text = format!("{}: {error}", section(name));
    match error {
        ResidentError::Work(WorkError::Failed) => Error::Crypto,
        ResidentError::Work(WorkError::Input { field, problem }) => Error::invalid(field, problem),
        ResidentError::Token(WrapError::Unavailable { .. } | WrapError::DeadlineExceeded) => {
            tracing::warn!(error = text, reason, "a token does not answer");
            Error::unavailable(text)
        }
        ResidentError::Unsupported(_) => {
            tracing::error!(error = text, "a token cannot make or use a key");
            unavailable()
        }
        _ => {
            tracing::error!(error = text, reason, "a token refuses");
            Error::State(Reason::BackendRefused)
        }
    }
}
