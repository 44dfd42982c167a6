//! The hardware and cloud wrappers that hardened keys lie under, each behind a circuit breaker and with
//! a bounded number of calls, on the node's own runtime: a backend that hangs holds up nobody else.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures::FutureExt;
use polykey_hsm::{
    BlobKey, BoxFuture, Deadline, HardenedBlobKey, HardenedMaterial, KeyWrapper, MaterialContext,
    SlotKind, WrapError,
};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::breaker::{Breaker, Terms};
use super::{MASTER_KEY, NamedWrapper};
use crate::config::Hardened;
use crate::error::{Error, Reason};
use crate::share::{Place, Places};

/// Calls of one backend at a time, and those that wait for their turn besides.
const RUNNING: usize = 32;
const WAITING: usize = 992;
/// The longest that a call takes, the wait for its turn apart. The deadline of the caller ends that
/// one's wait; the call goes on, for others may wait for it too.
const CALL: Duration = Duration::from_secs(5);
/// The wait for a turn.
const QUEUE: Duration = Duration::from_secs(5);
/// How long opened keys are remembered unless the configuration says otherwise.
const REMEMBERED: Duration = Duration::from_secs(300);

/// Whether hardened keys may lie under this wrapper: its secret is not on this machine.
#[must_use]
pub fn is_hardware(named: &NamedWrapper) -> bool {
    match named.wrapper.kind() {
        SlotKind::Aws | SlotKind::Pkcs11 => true,
        // A quorum may have members of this machine alone, and its calls are many.
        SlotKind::MasterKey | SlotKind::Passphrase | SlotKind::Recovery | SlotKind::Quorum => false,
    }
}

/// Where a wrapper of this name stands in the configuration.
#[must_use]
pub fn section(name: &str) -> String {
    if name == MASTER_KEY { format!("[{name}]") } else { format!("[wrappers.{name}]") }
}

/// Why a backend did not make or open a hardened key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The configuration has no `[hardened]`.
    #[error("no wrapper is configured for hardened keys")]
    NotOffered,
    /// None of the configured wrappers made it.
    #[error("no configured wrapper opens what {0} wrapped: configure it again")]
    Unknown(String),
    /// The wrapper of `[hardened]` could not be opened at the start, nor since.
    #[error("{} cannot be opened", section(.0))]
    Unusable(String),
    /// Too many wait.
    #[error("{}: too many calls wait", section(.0))]
    Busy(String),
    /// The wrapper says so.
    #[error("{}: {error}", section(name))]
    Wrap {
        /// The name of the wrapper.
        name: String,
        /// What it says.
        error: WrapError,
    },
    /// The call came to no end.
    #[error("a call of a wrapper failed: {0}")]
    Failed(String),
}

impl From<BackendError> for Error {
    fn from(error: BackendError) -> Self {
        let text = error.to_string();
        match error {
            BackendError::NotOffered => Self::State(Reason::ProfileUnavailable),
            BackendError::Unknown(_) => {
                tracing::error!(error = text, "a hardened key cannot be opened");
                Self::State(Reason::ProfileUnavailable)
            }
            BackendError::Unusable(_) => Self::unavailable(text),
            BackendError::Busy(_) => Self::Exhausted { retry_after: Duration::from_secs(1) },
            BackendError::Wrap { error, .. } => match error {
                WrapError::Unavailable { .. } | WrapError::DeadlineExceeded => {
                    Self::unavailable(text)
                }
                WrapError::Broken => Self::data_loss(text),
                // An answer, which asking again does not change: an operator has to.
                WrapError::Refused(_) | WrapError::Config(_) | WrapError::NotMine => {
                    tracing::error!(error = text, "the backend of a hardened key refuses");
                    Self::State(Reason::BackendRefused)
                }
            },
            BackendError::Failed(_) => Self::internal(text),
        }
    }
}

/// What somebody should look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It does not answer.
    Away,
    /// It answers, and says no.
    Refuses,
}

/// One wrapper and the calls it is asked.
#[derive(Clone)]
struct Backend {
    breaker: Arc<Breaker>,
    running: Arc<Semaphore>,
    /// Of calls that run and that wait; one client has half of them at most.
    places: Places<String>,
}

/// A right to a call.
struct Turn {
    backend: Backend,
    _place: Place<String>,
}

impl Backend {
    fn new(breaker: Arc<Breaker>) -> Self {
        let running = Arc::new(Semaphore::new(RUNNING));
        Self { breaker, running, places: Places::new(RUNNING + WAITING) }
    }

    fn name(&self) -> String {
        self.breaker.name().to_owned()
    }

    fn turn(&self, client: Option<&str>) -> Result<Turn, BackendError> {
        let place = self.places.take(client.map(str::to_owned).as_ref());
        let place = place.ok_or_else(|| BackendError::Busy(self.name()))?;
        Ok(Turn { backend: self.clone(), _place: place })
    }
}

impl Turn {
    /// Waits for it, and makes the call.
    async fn call<T>(
        &self,
        call: impl FnOnce(Arc<Breaker>, Deadline) -> BoxFuture<'static, Result<T, WrapError>>,
    ) -> Result<T, BackendError> {
        let Backend { breaker, running, .. } = &self.backend;
        let wrap = |error| BackendError::Wrap { name: self.backend.name(), error };
        let running = tokio::time::timeout(QUEUE, running.acquire()).await;
        // Its own queue is no failure of the backend, and so not for the breaker to see.
        let _running = match running {
            Ok(Ok(running)) => running,
            Ok(Err(_)) | Err(_) => return Err(BackendError::Busy(self.backend.name())),
        };
        call(Arc::clone(breaker), Deadline::after(CALL)).await.map_err(wrap)
    }
}

/// What hardened keys lie under.
pub struct Backends {
    /// The NAME of `[hardened] wrapper`.
    wanted: Option<String>,
    remembered: Duration,
    known: ArcSwap<Vec<Backend>>,
    node: [u8; 16],
    runtime: Handle,
}

impl std::fmt::Debug for Backends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known: Vec<String> = self.known.load().iter().map(Backend::name).collect();
        f.debug_struct("Backends")
            .field("wanted", &self.wanted)
            .field("known", &known)
            .finish_non_exhaustive()
    }
}

impl Backends {
    /// What the configuration of a node names, as far as it is open. Every hardware or cloud wrapper opens what it
    /// wrapped, whether new keys lie under it or not. Calls run on the runtime that calls this.
    #[must_use]
    pub fn new(config: Option<&Hardened>, wrappers: &[NamedWrapper], node: [u8; 16]) -> Self {
        let backends = Self {
            wanted: config.map(|config| config.wrapper.clone()),
            remembered: config.map_or(REMEMBERED, |config| config.cache),
            known: ArcSwap::default(),
            node,
            runtime: Handle::current(),
        };
        for named in wrappers.iter().filter(|named| is_hardware(named)) {
            backends.add(&named.name, Arc::clone(&named.wrapper), Terms::default());
        }
        backends
    }

    /// One more wrapper, in the place of what had its name.
    pub fn add(&self, name: &str, wrapper: Arc<dyn KeyWrapper>, terms: Terms) {
        let breaker = Breaker::new(name, wrapper, terms, self.node, self.runtime.clone());
        let backend = Backend::new(breaker);
        self.known.rcu(|known| {
            let others = known.iter().filter(|known| known.breaker.name() != name).cloned();
            others.chain([backend.clone()]).collect::<Vec<_>>()
        });
    }

    /// The name of the wrapper of `[hardened]` while it is not open.
    #[must_use]
    pub fn missing(&self) -> Option<&str> {
        let wanted = self.wanted.as_deref()?;
        let known = self.known.load();
        (!known.iter().any(|known| known.breaker.name() == wanted)).then_some(wanted)
    }

    /// Whether keys can be asked to be hardened here, if not at this moment.
    #[must_use]
    pub fn offered(&self) -> bool {
        self.wanted.is_some()
    }

    /// How long an opened key is remembered; zero: not at all.
    #[must_use]
    pub fn remembered(&self) -> Duration {
        self.remembered
    }

    /// The backend of new keys.
    fn primary(&self) -> Result<Backend, BackendError> {
        let wanted = self.wanted.as_ref().ok_or(BackendError::NotOffered)?;
        let known = self.known.load();
        let found = known.iter().find(|known| known.breaker.name() == wanted);
        found.cloned().ok_or_else(|| BackendError::Unusable(wanted.clone()))
    }

    /// Whether a new key could lie under the backend now, as far as is known without asking it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), BackendError> {
        let backend = self.primary()?;
        if backend.breaker.is_open() {
            let error = WrapError::Unavailable { retryable: true };
            return Err(BackendError::Wrap { name: backend.name(), error });
        }
        Ok(())
    }

    /// Has a task done on the node's own runtime.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, BackendError>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, BackendError>> {
        let task = self.runtime.spawn(work);
        task.map(|joined| joined.unwrap_or_else(|e| Err(BackendError::Failed(e.to_string()))))
            .boxed()
    }

    /// A new blob key under the backend, for a version of this key.
    ///
    /// # Errors
    /// See [`BackendError`].
    pub async fn make(
        &self,
        client: Option<&str>,
        key_id: [u8; 16],
    ) -> Result<HardenedBlobKey, BackendError> {
        let (turn, node) = (self.primary()?.turn(client)?, self.node);
        self.spawn(async move {
            turn.call(|breaker, deadline| {
                async move { HardenedBlobKey::make(&*breaker, node, key_id, deadline).await }
                    .boxed()
            })
            .await
        })
        .await
    }

    /// What opens a hardened version, once it is polled: on the runtime of [`Self::spawn`].
    ///
    /// # Errors
    /// [`BackendError::Busy`], and that there is no backend for it.
    pub(crate) fn opening(
        &self,
        client: Option<&str>,
        hardened: HardenedMaterial,
        cx: MaterialContext,
    ) -> Result<BoxFuture<'static, Result<BlobKey, BackendError>>, BackendError> {
        let made_by = hardened.wrapped.wrapper().clone();
        let known = self.known.load();
        // That of the same name first; an alias or a replica may have another.
        let (same, others): (Vec<_>, Vec<_>) =
            known.iter().cloned().partition(|known| *known.breaker.id() == made_by);
        let (kind, hardened) = (hardened.wrapped.kind(), Arc::new(hardened));
        let candidates =
            same.into_iter().chain(others.into_iter().filter(|o| o.breaker.kind() == kind));
        let turns = candidates.map(|known| known.turn(client)).collect::<Result<Vec<_>, _>>()?;
        let unusable = self.primary().err();
        Ok(Box::pin(async move {
            for turn in turns {
                let hardened = Arc::clone(&hardened);
                let open = |breaker: Arc<Breaker>, deadline| {
                    async move { hardened.open(&*breaker, &cx, deadline).await }.boxed()
                };
                match turn.call(open).await {
                    Err(BackendError::Wrap { error: WrapError::NotMine, .. }) => {}
                    other => return other,
                }
            }
            match unusable {
                Some(error @ BackendError::Unusable(_)) => Err(error),
                _ => Err(BackendError::Unknown(made_by.to_string())),
            }
        }))
    }

    /// The breakers of all that is known, each with how many calls are running or waiting there.
    #[must_use]
    pub fn breakers(&self) -> Vec<(Arc<Breaker>, usize)> {
        let known = self.known.load();
        known.iter().map(|known| (Arc::clone(&known.breaker), known.places.taken())).collect()
    }

    /// Asks each backend once, so that a node knows at its start which of them are away.
    pub async fn look(&self) {
        let known = self.known.load_full();
        futures::future::join_all(known.iter().map(|known| known.breaker.look())).await;
    }

    /// The first backend that is away or was never there, or else the first that refuses.
    #[must_use]
    pub fn trouble(&self) -> Option<(String, Trouble)> {
        let known = self.known.load();
        let first = |is: fn(&Breaker) -> bool| {
            known.iter().find(|known| is(&known.breaker)).map(Backend::name)
        };
        let away = first(Breaker::is_open).or_else(|| self.missing().map(str::to_owned));
        let away = away.map(|name| (name, Trouble::Away));
        away.or_else(|| first(Breaker::refuses).map(|name| (name, Trouble::Refuses)))
    }
}
