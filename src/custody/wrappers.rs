//! The wrappers that a configuration names, opened.

use std::sync::Arc;

use polykey_hsm::{KeyWrapper, LocalError, LocalWrapper};

use super::slots::SlotSpec;
use crate::config::{Config, Wrapper};

/// The name of the wrapper of `[master_key]`; those of `[wrappers.NAME]` cannot have it.
pub const MASTER_KEY: &str = "master_key";

/// A wrapper of the configuration.
#[derive(Clone)]
pub struct NamedWrapper {
    /// [`MASTER_KEY`], or the NAME of `[wrappers.NAME]`.
    pub name: String,
    /// What the configuration says of it.
    pub config: Wrapper,
    /// It.
    pub wrapper: Arc<dyn KeyWrapper>,
}

/// A wrapper that cannot be used, and why. No secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unusable {
    /// As in [`NamedWrapper`].
    pub name: String,
    /// Why.
    pub error: LocalError,
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let prefix = if self.name == MASTER_KEY { "" } else { "wrappers." };
        write!(f, "[{prefix}{}]: {}", self.name, self.error)
    }
}

impl NamedWrapper {
    /// Opens one: reads its secret, and computes for 0.2 s if that is a passphrase.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn open(name: &str, config: &Wrapper) -> Result<Self, Unusable> {
        let Wrapper::Local(source) = config;
        let opened = LocalWrapper::open(source);
        let wrapper = opened.map_err(|error| Unusable { name: name.to_owned(), error })?;
        Ok(Self { name: name.to_owned(), config: config.clone(), wrapper: Arc::new(wrapper) })
    }

    /// Opens all that a configuration names, [`MASTER_KEY`] first, and tells what it could not.
    #[must_use]
    pub fn open_all(config: &Config) -> (Vec<Self>, Vec<Unusable>) {
        let (mut opened, mut unusable) = (Vec::new(), Vec::new());
        let master_key = Wrapper::Local(config.master_key.clone());
        let first = std::iter::once((MASTER_KEY, &master_key));
        let others = config.wrappers.iter().map(|(name, wrapper)| (name.as_str(), wrapper));
        for (name, wrapper) in first.chain(others) {
            match Self::open(name, wrapper) {
                Ok(wrapper) => opened.push(wrapper),
                Err(error) => unusable.push(error),
            }
        }
        (opened, unusable)
    }

    /// What a slot of it is recorded as.
    #[must_use]
    pub fn slot(&self, label: &str) -> SlotSpec {
        let Wrapper::Local(source) = &self.config;
        SlotSpec::local(label, source)
    }
}

impl std::fmt::Debug for NamedWrapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NamedWrapper").field("name", &self.name).finish_non_exhaustive()
    }
}
