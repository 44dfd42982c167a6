//! The tokens in which keys of callers live. A token that is away is asked all the same: its own queue
//! and deadlines hold up nobody else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polykey_hsm::pkcs11::{Pkcs11Token, ResidentError, ResidentKey};
use polykey_hsm::work::{SignInput, SignatureScheme, WorkError};
use polykey_hsm::{Algorithm, Deadline, Purpose, WrapError};
use tokio::runtime::Handle;
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

    /// Makes a key, which goes again unless it is kept.
    ///
    /// # Errors
    /// Whatever the token says; then there is none, or will be none.
    pub async fn make(
        &self,
        id: &[u8],
        algorithm: Algorithm,
        purpose: Purpose,
    ) -> Result<(ResidentKey, Placed), Error> {
        let (name, token) = self.wanted()?;
        let placed = Placed {
            key: ResidentKey { id: id.to_vec(), algorithm, purpose, public: None },
            name: name.to_owned(),
            token: token.clone(),
            runtime: Handle::current(),
            kept: AtomicBool::new(false),
        };
        let made = token.generate_resident(id, algorithm, purpose, Deadline::after(MAKE)).await;
        match made {
            Ok(made) => Ok((made, placed)),
            Err(error) => {
                let error = failed(name, token, error);
                // Only where its answer was lost may there be something.
                placed.keep(!matches!(error, Error::Unavailable { .. }));
                Err(error)
            }
        }
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

/// An object in a token that no row of the store names yet. Unless it is kept, it is destroyed when this is
/// dropped, wherever its call broke off.
pub struct Placed {
    key: ResidentKey,
    name: String,
    token: Pkcs11Token,
    runtime: Handle,
    kept: AtomicBool,
}

impl Placed {
    /// Its id in the token.
    #[must_use]
    pub fn id(&self) -> &[u8] {
        &self.key.id
    }

    /// Whether it stays from now on.
    pub fn keep(&self, kept: bool) {
        self.kept.store(kept, Ordering::SeqCst);
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if *self.kept.get_mut() {
            return;
        }
        let (token, key) = (self.token.clone(), self.key.clone());
        let section = section(&self.name);
        self.runtime.spawn(async move {
            let id = data_encoding::HEXLOWER.encode(&key.id);
            match token.destroy_resident(&key, Deadline::after(MAKE + USE)).await {
                Ok(()) => {
                    tracing::info!(id, "an object that no key uses was taken out of its token")
                }
                Err(ResidentError::NotThere) => {}
                Err(error) => {
                    let label = String::from_utf8_lossy(ResidentKey::LABEL).into_owned();
                    tracing::error!(
                        %error, section, label, id,
                        "an object that no key uses may be in the token: destroy the one of this \
                         label and CKA_ID with the vendor's tool"
                    );
                }
            }
        });
    }
}

impl std::fmt::Debug for Placed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Placed").field("name", &self.name).finish_non_exhaustive()
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
