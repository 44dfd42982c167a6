//! The wrappers that a configuration names, opened.

use std::sync::Arc;

use futures::future::join_all;
use polykey_hsm::pkcs11::{Pkcs11Token, WorkerCommand};
use polykey_hsm::{
    Deadline, KeyWrapper, LocalError, LocalWrapper, MasterKeySource, QuorumWrapper, SecretSource,
    WrapError, bootstrap,
};

use zeroize::Zeroizing;

use super::slots::SlotSpec;
use crate::config::{Bootstrap, Config, Pkcs11, Quorum, Wrapper};

/// The name of the wrapper of `[master_key]`; those of `[wrappers.NAME]` cannot have it.
pub const MASTER_KEY: &str = "master_key";

/// A wrapper of the configuration.
#[derive(Clone)]
pub struct NamedWrapper {
    /// [`MASTER_KEY`], or the NAME of `[wrappers.NAME]`; empty if an operator gave it.
    pub name: String,
    /// What the configuration says of it; nothing if an operator gave it.
    pub config: Option<Wrapper>,
    /// It.
    pub wrapper: Arc<dyn KeyWrapper>,
    /// Whether no member is missing, if it is a quorum.
    pub complete: bool,
    /// The token that it is of, in which keys may live.
    pub token: Option<Pkcs11Token>,
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

impl WrapperError {
    /// Whether something did not answer.
    #[must_use]
    pub fn is_away(&self) -> bool {
        match self {
            Self::Wrapper(error) => {
                matches!(error, WrapError::Unavailable { .. } | WrapError::DeadlineExceeded)
            }
            Self::Secret(problem) => problem.away,
            Self::Local(_) => false,
        }
    }
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
    /// Opens one that is no quorum: reads its secret, and computes for 0.2 s if that is a passphrase.
    /// Devices and services are not asked yet.
    ///
    /// # Errors
    /// [`Unusable`].
    pub async fn open(
        name: &str,
        config: &Wrapper,
        bootstrap: &Bootstrap,
    ) -> Result<Self, Unusable> {
        let mut token = None;
        let opened = match config {
            Wrapper::Local(source) => local(source, bootstrap).await,
            Wrapper::Pkcs11(settings) => match pkcs11(settings, bootstrap).await {
                Ok((wrapper, of)) => {
                    token = Some(of);
                    Ok(wrapper)
                }
                Err(error) => Err(error),
            },
            Wrapper::Aws(settings) => aws(settings, Deadline::after(bootstrap.deadline)).await,
            Wrapper::Quorum(_) => {
                Err(WrapError::Config("a quorum opens with its members".to_owned()).into())
            }
        };
        let wrapper = opened.map_err(|error| Unusable { name: name.to_owned(), error })?;
        Ok(Self {
            name: name.to_owned(),
            config: Some(config.clone()),
            wrapper,
            complete: true,
            token,
        })
    }

    /// What a configuration says of a wrapper of this name.
    #[must_use]
    pub fn wanted<'c>(config: &'c Config, name: &str) -> Option<&'c Wrapper> {
        wrapper_of(config, name)
    }

    /// All names in a configuration, quorums last.
    #[must_use]
    pub fn names(config: &Config) -> Vec<String> {
        let first = std::iter::once((MASTER_KEY, &config.master_key));
        let others = config.wrappers.iter().map(|(name, wrapper)| (name.as_str(), wrapper));
        let (quorums, single): (Vec<_>, Vec<_>) =
            first.chain(others).partition(|(_, wrapper)| matches!(wrapper, Wrapper::Quorum(_)));
        single.into_iter().chain(quorums).map(|(name, _)| name.to_owned()).collect()
    }

    /// Makes every quorum anew of the members that are known now.
    pub fn rebuild_quorums(known: &mut Vec<Self>) {
        let quorums: Vec<(String, Wrapper)> = known
            .iter()
            .filter_map(|named| match &named.config {
                Some(config @ Wrapper::Quorum(_)) => Some((named.name.clone(), config.clone())),
                _ => None,
            })
            .collect();
        for (name, config) in quorums {
            let Wrapper::Quorum(quorum) = &config else { continue };
            let rebuilt = Self::quorum(&name, &config, quorum, known);
            known.retain(|named| named.name != name);
            known.extend(rebuilt);
        }
    }

    /// Opens one of a configuration, if it names it; of a quorum, the members first.
    ///
    /// # Errors
    /// [`Unusable`].
    pub async fn open_one(config: &Config, name: &str) -> Option<Result<Self, Unusable>> {
        let wrapper = wrapper_of(config, name)?;
        Some(Self::open_in(config, name, wrapper).await)
    }

    /// Opens the one of `[master_key]`.
    ///
    /// # Errors
    /// [`Unusable`].
    pub async fn open_master(config: &Config) -> Result<Self, Unusable> {
        Self::open_in(config, MASTER_KEY, &config.master_key).await
    }

    async fn open_in(config: &Config, name: &str, wrapper: &Wrapper) -> Result<Self, Unusable> {
        let Wrapper::Quorum(quorum) = wrapper else {
            return Self::open(name, wrapper, &config.bootstrap).await;
        };
        let members = quorum.of.iter().filter_map(|name| Some((name, wrapper_of(config, name)?)));
        let open = |(name, wrapper): (&String, _)| {
            let name = name.clone();
            async move { Self::open(&name, wrapper, &config.bootstrap).await }
        };
        let members = join_all(members.map(open)).await;
        let opened: Vec<Self> = members.into_iter().filter_map(Result::ok).collect();
        Self::quorum(name, wrapper, quorum, &opened)
    }

    fn quorum(
        name: &str,
        config: &Wrapper,
        quorum: &Quorum,
        opened: &[Self],
    ) -> Result<Self, Unusable> {
        let members = quorum.of.iter().map(|name| opened.iter().find(|known| known.name == *name));
        let members: Vec<_> = members.flatten().map(|known| Arc::clone(&known.wrapper)).collect();
        let (found, wanted) = (members.len(), quorum.of.len());
        let wrapper = match QuorumWrapper::new(quorum.threshold, members) {
            Ok(wrapper) if found == wanted => wrapper,
            Ok(wrapper) => wrapper.incomplete(),
            Err(_) if found < usize::from(quorum.threshold) => {
                let text = format!("{found} of its {wanted} members can be used");
                let error = WrapError::Config(text).into();
                return Err(Unusable { name: name.to_owned(), error });
            }
            Err(error) => return Err(Unusable { name: name.to_owned(), error: error.into() }),
        };
        let wrapper = Arc::new(wrapper);
        let complete = found == wanted;
        let config = Some(config.clone());
        Ok(Self { name: name.to_owned(), config, wrapper, complete, token: None })
    }

    /// One that an operator gave.
    #[must_use]
    pub fn given(wrapper: Arc<dyn KeyWrapper>) -> Self {
        Self { name: String::new(), config: None, wrapper, complete: true, token: None }
    }

    /// Opens all that a configuration names, at once; gives [`MASTER_KEY`] first, and tells what it
    /// could not open.
    pub async fn open_all(config: &Config) -> (Vec<Self>, Vec<Unusable>) {
        let first = std::iter::once((MASTER_KEY, &config.master_key));
        let others = config.wrappers.iter().map(|(name, wrapper)| (name.as_str(), wrapper));
        let (quorums, single): (Vec<_>, Vec<_>) =
            first.chain(others).partition(|(_, wrapper)| matches!(wrapper, Wrapper::Quorum(_)));
        let open = |(name, wrapper)| Self::open(name, wrapper, &config.bootstrap);
        let (mut opened, mut unusable) = (Vec::new(), Vec::new());
        for result in join_all(single.into_iter().map(open)).await {
            match result {
                Ok(wrapper) => opened.push(wrapper),
                Err(error) => unusable.push(error),
            }
        }
        for (name, wrapper) in quorums {
            let Wrapper::Quorum(quorum) = wrapper else { continue };
            match Self::quorum(name, wrapper, quorum, &opened) {
                Ok(wrapper) if name == MASTER_KEY => opened.insert(0, wrapper),
                Ok(wrapper) => opened.push(wrapper),
                Err(error) => unusable.push(error),
            }
        }
        (opened, unusable)
    }

    /// What a slot of it is recorded as.
    #[must_use]
    pub fn slot(&self, label: &str) -> SlotSpec {
        match &self.config {
            Some(config) => SlotSpec::of_wrapper(label, config),
            None => SlotSpec {
                label: label.to_owned(),
                kind: self.wrapper.kind().name().to_owned(),
                source: "an operator".to_owned(),
            },
        }
    }
}

fn wrapper_of<'c>(config: &'c Config, name: &str) -> Option<&'c Wrapper> {
    match name {
        MASTER_KEY => Some(&config.master_key),
        _ => config.wrappers.get(name),
    }
}

/// A secret that lies in Parameter Store; the other places are read by whoever needs it.
async fn resolved(
    source: SecretSource,
    bootstrap: &Bootstrap,
) -> Result<Option<Zeroizing<Vec<u8>>>, WrapperError> {
    if !matches!(source, SecretSource::Ssm(_)) {
        return Ok(None);
    }
    let Bootstrap { aws, deadline } = bootstrap;
    match bootstrap::resolve(&[source], aws, Deadline::after(*deadline)).await {
        Ok(found) => Ok(found.into_iter().next()),
        Err(problems) => Err(match problems.into_iter().next() {
            Some(problem) => problem.into(),
            None => WrapError::Unavailable { retryable: true }.into(),
        }),
    }
}

/// A token that may be away: nothing is asked of it yet.
async fn pkcs11(
    settings: &Pkcs11,
    bootstrap: &Bootstrap,
) -> Result<(Arc<dyn KeyWrapper>, Pkcs11Token), WrapperError> {
    let token = open_token(settings, bootstrap).await?;
    let wrapper = token.wrapper(settings.key.clone()).map_err(WrapError::from)?;
    Ok((Arc::new(wrapper), token))
}

/// The token of a wrapper.
///
/// # Errors
/// [`WrapperError`] if its PIN is not to be had, or its settings are of no use.
pub async fn open_token(
    settings: &Pkcs11,
    bootstrap: &Bootstrap,
) -> Result<Pkcs11Token, WrapperError> {
    let (config, worker) = (settings.token.clone(), WorkerCommand::default());
    let token = match resolved(config.pin.clone(), bootstrap).await? {
        Some(pin) => Pkcs11Token::with_pin(config, pin, worker),
        None => Pkcs11Token::new(config, worker),
    };
    Ok(token.map_err(WrapError::from)?)
}

async fn local(
    source: &MasterKeySource,
    bootstrap: &Bootstrap,
) -> Result<Arc<dyn KeyWrapper>, WrapperError> {
    let resolved = resolved(source.origin(), bootstrap).await?;
    let source = source.clone();
    // Files may be slow, and Argon2id is meant to be.
    let opened = tokio::task::spawn_blocking(move || match resolved {
        Some(value) => LocalWrapper::of(&source, &value),
        None => LocalWrapper::open(&source),
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
