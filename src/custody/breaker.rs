//! A circuit breaker around a wrapper: what does not answer is not asked by everybody, one after the
//! other, each until its deadline.
//!
//! Only infrastructure counts: no answer, or none in time. Whatever is an answer (a refusal, a wrong
//! key, changed bytes) says that the backend is there. While the breaker is open, callers are
//! refused at once, and the breaker asks the backend itself, with a key of its own, about once a
//! second; the first answer closes it.
//!
//! A backend that refuses (a disabled key, a withdrawn right, a key that is not there) is asked all the
//! same, since it costs nobody time; but somebody should look, so that it is noted, and asked now and
//! then whether it still does.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use parking_lot::Mutex;
use polykey_hsm::{
    BoxFuture, Deadline, KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError, WrappedKey,
    WrapperId, random,
};
use tokio::runtime::Handle;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use crate::metrics::histogram::{Distribution, Histogram};

/// When a breaker opens, and how it looks whether it may close.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Failures in a row that open it.
    pub failures: u32,
    /// The time between two looks while it is open.
    pub look: Duration,
    /// The deadline of one look. A look that takes longer than `look` does not keep the next one
    /// waiting: a connection that hangs must not hide a backend that is back.
    pub patience: Duration,
    /// The time between two looks while the backend refuses.
    pub again: Duration,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            failures: 3,
            look: Duration::from_secs(1),
            patience: Duration::from_secs(5),
            again: Duration::from_secs(30),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    /// Failures in a row while it is closed.
    failures: u32,
    /// How often it has opened or closed: what began before does not count after.
    generation: u64,
    /// Whether its last answer that tells was a refusal.
    refuses: bool,
    /// How often it began to refuse: one task at a time looks whether it still does.
    refusals: u64,
}

/// What callers ask of a wrapper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// To wrap a key.
    Wrap,
    /// To open one.
    Unwrap,
}

impl Ask {
    /// Both, in their order.
    pub const ALL: [Self; 2] = [Self::Wrap, Self::Unwrap];

    /// Its word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wrap => "wrap",
            Self::Unwrap => "unwrap",
        }
    }
}

/// How a wrapper did what was asked of it.
#[derive(Debug)]
pub struct Asked {
    /// The time to an answer, or to the deadline.
    latency: Histogram,
    /// Calls that ended in anything but what was asked.
    failed: AtomicU64,
    /// Calls that were refused at once, because the breaker was open.
    refused: AtomicU64,
}

impl Default for Asked {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self { latency: Histogram::of_time(), failed: zero(), refused: zero() }
    }
}

impl Asked {
    /// (time of each call that was made, how many of them failed, how many were not made).
    #[must_use]
    pub fn read(&self) -> (Distribution, u64, u64) {
        (self.latency.read(), self.failed.load(Relaxed), self.refused.load(Relaxed))
    }
}

/// A wrapper behind a breaker. Deadlines of its callers must be the server's: those of clients would
/// let one of them open it for all.
pub struct Breaker {
    name: String,
    inner: Arc<dyn KeyWrapper>,
    terms: Terms,
    /// What its own questions are bound to.
    place: WrapContext,
    runtime: Handle,
    state: Mutex<State>,
    asked: [Asked; 2],
    me: Weak<Self>,
}

impl std::fmt::Debug for Breaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Breaker")
            .field("name", &self.name)
            .field("state", &*self.state.lock())
            .finish_non_exhaustive()
    }
}

/// Whether it is a failure of infrastructure.
fn away(error: &WrapError) -> bool {
    match error {
        WrapError::Unavailable { .. } | WrapError::DeadlineExceeded => true,
        WrapError::NotMine | WrapError::Broken | WrapError::Refused(_) | WrapError::Config(_) => {
            false
        }
    }
}

/// Whether the backend refuses; `None`: the answer does not tell.
fn refuses<T>(answer: &Result<T, WrapError>) -> Option<bool> {
    match answer {
        Err(WrapError::Refused(_) | WrapError::Config(_)) => Some(true),
        // What it says of some bytes, or of a key that is not its own.
        Err(WrapError::NotMine | WrapError::Broken) => None,
        Err(WrapError::Unavailable { .. } | WrapError::DeadlineExceeded) => None,
        Ok(_) => Some(false),
    }
}

impl Breaker {
    /// A closed breaker; `name` is for the log. Its own questions are bound to this node and to no
    /// key, so that a service which checks that answers them as it answers others, and run on
    /// `runtime`.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        inner: Arc<dyn KeyWrapper>,
        terms: Terms,
        node: [u8; 16],
        runtime: Handle,
    ) -> Arc<Self> {
        let (name, place) = (name.into(), WrapContext::hardened_key(node, [0; 16]));
        Arc::new_cyclic(|me| {
            let (state, me) = (Mutex::default(), Weak::clone(me));
            Self { name, inner, terms, place, runtime, state, asked: Default::default(), me }
        })
    }

    /// What it is called in the log.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the backend is away, as far as is known.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state.lock().open
    }

    /// How it did what callers asked, by [`Ask`].
    #[must_use]
    pub fn asked(&self) -> &[Asked; 2] {
        &self.asked
    }

    /// Whether the backend refuses, as far as is known.
    #[must_use]
    pub fn refuses(&self) -> bool {
        self.state.lock().refuses
    }

    /// Asks the backend once, and opens if it does not answer: so that a node knows at its start.
    pub async fn look(&self) {
        let generation = self.state.lock().generation;
        let answer = self.question().await;
        self.looked(generation, &answer);
    }

    /// Learns from a look while it is closed: one failure is enough.
    fn looked(&self, generation: u64, answer: &Result<(), WrapError>) {
        match answer {
            Err(error) if away(error) => self.failed(generation, self.terms.failures, error),
            answer => self.answered(answer),
        }
    }

    /// One question of our own, which needs nothing of the breaker: wraps a key that nobody keeps, and
    /// opens it, for a backend may allow the one and not the other.
    fn question(&self) -> impl Future<Output = Result<(), WrapError>> + Send + 'static + use<> {
        let (inner, place, patience) =
            (Arc::clone(&self.inner), self.place.clone(), self.terms.patience);
        async move {
            let bytes: [u8; 32] = random::array()?;
            let key = KeyMaterial::from_secret(bytes.to_vec())
                .map_err(|error| WrapError::Config(error.to_string()))?;
            let deadline = Deadline::after(patience);
            let call = async {
                let wrapped = inner.wrap_key(&key, &place, deadline).await?;
                inner.unwrap_key(&wrapped, &place, deadline).await.map(drop)
            };
            let answer = tokio::time::timeout_at(deadline.0.into(), call).await;
            answer.unwrap_or(Err(WrapError::DeadlineExceeded))
        }
    }

    /// Lets a call through unless it is open, and learns from its end.
    async fn through<T>(
        &self,
        ask: Ask,
        deadline: Deadline,
        call: BoxFuture<'_, Result<T, WrapError>>,
    ) -> Result<T, WrapError> {
        let [wrap, unwrap] = &self.asked;
        let asked = match ask {
            Ask::Wrap => wrap,
            Ask::Unwrap => unwrap,
        };
        let generation = {
            let state = self.state.lock();
            if state.open {
                asked.refused.fetch_add(1, Relaxed);
                return Err(WrapError::Unavailable { retryable: true });
            }
            state.generation
        };
        let began = Instant::now();
        // Whoever forgets its deadline is held to it here.
        let answer = tokio::time::timeout_at(deadline.0.into(), call).await;
        let answer = answer.unwrap_or(Err(WrapError::DeadlineExceeded));
        asked.latency.took(began.elapsed());
        if answer.is_err() {
            asked.failed.fetch_add(1, Relaxed);
        }
        match &answer {
            Err(error) if away(error) => self.failed(generation, 1, error),
            answer => self.answered(answer),
        }
        answer
    }

    fn answered<T>(&self, answer: &Result<T, WrapError>) {
        let mut state = self.state.lock();
        state.failures = 0;
        let was_open = std::mem::take(&mut state.open);
        if was_open {
            state.generation += 1;
        }
        let did = state.refuses;
        state.refuses = refuses(answer).unwrap_or(did);
        let begins = state.refuses && !did;
        state.refusals += u64::from(begins);
        let (does, refusals) = (state.refuses, state.refusals);
        drop(state);
        if was_open {
            tracing::info!(wrapper = self.name, "the backend answers again");
        }
        match answer {
            Err(error) if begins => {
                tracing::warn!(wrapper = self.name, %error, "the backend answers, and refuses");
                self.runtime.spawn(until_taken(Weak::clone(&self.me), refusals));
            }
            _ if did && !does => tracing::info!(wrapper = self.name, "the backend refuses no more"),
            _ => {}
        }
    }

    fn failed(&self, generation: u64, count: u32, error: &WrapError) {
        let mut state = self.state.lock();
        if state.open || state.generation != generation {
            return;
        }
        state.failures = state.failures.saturating_add(count);
        if state.failures < self.terms.failures {
            return;
        }
        let refusals = state.refusals;
        // Whether it still refuses shows when it is back.
        *state =
            State { open: true, failures: 0, generation: generation + 1, refuses: false, refusals };
        drop(state);
        tracing::warn!(
            wrapper = self.name,
            %error,
            "the backend does not answer: it is not asked until it does"
        );
        self.runtime.spawn(until_back(Weak::clone(&self.me)));
    }
}

/// Looks until the breaker is closed or gone.
async fn until_back(breaker: Weak<Breaker>) {
    let Some(terms) = breaker.upgrade().map(|breaker| breaker.terms) else { return };
    let mut looks = FuturesUnordered::new();
    let mut turns = interval_at(Instant::now() + terms.look, terms.look);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let seen = tokio::select! {
            Some(answer) = looks.next(), if !looks.is_empty() => Some(answer),
            _ = turns.tick() => None,
        };
        // Only for a moment: nobody waits for the backend to let go of the breaker.
        let Some(breaker) = breaker.upgrade().filter(|breaker| breaker.is_open()) else { return };
        match seen {
            Some(Err(error)) if away(&error) => {}
            Some(answer) => return breaker.answered(&answer),
            None => looks.push(breaker.question()),
        }
    }
}

/// Looks now and then until the backend refuses no more, or is away or gone.
async fn until_taken(breaker: Weak<Breaker>, refusals: u64) {
    let Some(again) = breaker.upgrade().map(|breaker| breaker.terms.again) else { return };
    // Only for a moment, as above.
    let asked = || {
        let breaker = breaker.upgrade()?;
        let (still, generation) = {
            let state = breaker.state.lock();
            (state.refuses && state.refusals == refusals, state.generation)
        };
        if still { Some((generation, breaker.question())) } else { None }
    };
    loop {
        tokio::time::sleep(again).await;
        let Some((generation, question)) = asked() else { return };
        let answer = question.await;
        let Some(breaker) = breaker.upgrade() else { return };
        breaker.looked(generation, &answer);
    }
}

impl KeyWrapper for Breaker {
    fn id(&self) -> &WrapperId {
        self.inner.id()
    }

    fn kind(&self) -> SlotKind {
        self.inner.kind()
    }

    fn opens(&self) -> bool {
        self.inner.opens()
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(self.through(Ask::Wrap, deadline, self.inner.wrap_key(key, cx, deadline)))
    }

    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        Box::pin(self.through(Ask::Unwrap, deadline, self.inner.unwrap_key(wrapped, cx, deadline)))
    }
}
