//! The wrappers that a configuration names, opened.

use std::sync::Arc;

use futures::future::join_all;
use polykey_hsm::{
    Deadline, KeyWrapper, LocalError, LocalWrapper, MasterKeySource, SecretSource, WrapError,
    bootstrap,
};

use super::slots::SlotSpec;
use crate::config::{Bootstrap, Config, Wrapper};

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

/// Why a wrapper cannot be used. No secrets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WrapperError {
    /// Its secret is not to be had, or is none.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// Its secret is not to be had from AWS.
    #[error(transparent)]
    Secret(#[from] bootstrap::Problem),
    /// Its settings are of no use.
    #[error(transparent)]
    Wrapper(#[from] WrapError),
}

/// A wrapper that cannot be used, and why. No secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unusable {
    /// As in [`NamedWrapper`].
    pub name: String,
    /// Why.
    pub error: WrapperError,
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let prefix = if self.name == MASTER_KEY { "" } else { "wrappers." };
        write!(f, "[{prefix}{}]: {}", self.name, self.error)
    }
}

impl NamedWrapper {
    /// Opens one: reads its secret, and computes for 0.2 s if that is a passphrase. Devices and
    /// services are not asked yet.
    ///
    /// # Errors
    /// [`Unusable`].
    pub async fn open(
        name: &str,
        config: &Wrapper,
        bootstrap: &Bootstrap,
    ) -> Result<Self, Unusable> {
        let opened = match config {
            Wrapper::Local(source) => local(source, bootstrap).await,
            Wrapper::Aws(settings) => aws(settings, Deadline::after(bootstrap.deadline)).await,
        };
        let wrapper = opened.map_err(|error| Unusable { name: name.to_owned(), error })?;
        Ok(Self { name: name.to_owned(), config: config.clone(), wrapper })
    }

    /// Opens all that a configuration names, at once; gives [`MASTER_KEY`] first, and tells what it
    /// could not open.
    pub async fn open_all(config: &Config) -> (Vec<Self>, Vec<Unusable>) {
        let first = std::iter::once((MASTER_KEY, &config.master_key));
        let others = config.wrappers.iter().map(|(name, wrapper)| (name.as_str(), wrapper));
        let open = |(name, wrapper)| Self::open(name, wrapper, &config.bootstrap);
        let (mut opened, mut unusable) = (Vec::new(), Vec::new());
        for result in join_all(first.chain(others).map(open)).await {
            match result {
                Ok(wrapper) => opened.push(wrapper),
                Err(error) => unusable.push(error),
            }
        }
        (opened, unusable)
    }

    /// What a slot of it is recorded as.
    #[must_use]
    pub fn slot(&self, label: &str) -> SlotSpec {
        SlotSpec::of_wrapper(label, &self.config)
    }
}

async fn local(
    source: &MasterKeySource,
    bootstrap: &Bootstrap,
) -> Result<Arc<dyn KeyWrapper>, WrapperError> {
    let from = source.origin();
    let resolved = match &from {
        SecretSource::Ssm(_) => {
            let Bootstrap { aws, deadline } = bootstrap;
            let found = bootstrap::resolve(&[from], aws, Deadline::after(*deadline)).await;
            let found = found.map_err(|problems| problems.into_iter().next());
            Some(found.map_err(|problem| match problem {
                Some(problem) => WrapperError::from(problem),
                None => WrapError::Unavailable { retryable: true }.into(),
            })?)
        }
        _ => None,
    };
    let source = source.clone();
    // Files may be slow, and Argon2id is meant to be.
    let opened = tokio::task::spawn_blocking(move || match resolved.as_deref() {
        Some([value, ..]) => LocalWrapper::of(&source, value),
        _ => LocalWrapper::open(&source),
    });
    let opened =
        opened.await.map_err(|e| WrapError::Config(format!("reading a secret: {e}")))??;
    Ok(Arc::new(opened))
}

#[cfg(feature = "aws")]
async fn aws(
    settings: &polykey_hsm::aws::AwsKms,
    deadline: Deadline,
) -> Result<Arc<dyn KeyWrapper>, WrapperError> {
    Ok(Arc::new(polykey_hsm::aws::AwsWrapper::open(settings, deadline).await?))
}

#[cfg(not(feature = "aws"))]
#[expect(clippy::unused_async, reason = "as the build with AWS")]
async fn aws(
    _: &polykey_hsm::aws::AwsKms,
    _: Deadline,
) -> Result<Arc<dyn KeyWrapper>, WrapperError> {
    let text = "this build has no AWS KMS backend: build it with the cargo feature `aws`";
    Err(WrapError::Config(text.to_owned()).into())
}

impl std::fmt::Debug for NamedWrapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NamedWrapper").field("name", &self.name).finish_non_exhaustive()
    }
}
