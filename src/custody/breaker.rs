//! A circuit breaker around a wrapper: what does not answer is not asked by everybody, one after the
//! other, each until its deadline.
//!
//! Only infrastructure counts: no answer, or none in time. Whatever is an answer (a refusal, a wrong
//! key, changed bytes) says that the backend is there. While the breaker is open, callers are
//! refused at once, and the breaker asks the backend itself, with a key of its own, about once a
//! second; the first answer closes it.

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
}

impl Default for Terms {
    fn default() -> Self {
        Self { failures: 3, look: Duration::from_secs(1), patience: Duration::from_secs(5) }
    }
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    /// Failures in a row while it is closed.
    failures: u32,
    /// How often it has opened or closed: what began before does not count after.
    generation: u64,
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
            Self { name, inner, terms, place, runtime, state, me }
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

    /// Asks the backend once, and opens if it does not answer: so that a node knows at its start.
    pub async fn look(&self) {
        let generation = self.state.lock().generation;
        match self.question().await {
            Err(error) if away(&error) => self.failed(generation, self.terms.failures, &error),
            answer => self.answered(answer.err().as_ref()),
        }
    }

    /// One question of our own, which needs nothing of the breaker: wraps a key that nobody keeps.
    fn question(&self) -> impl Future<Output = Result<(), WrapError>> + Send + 'static {
        let (inner, place, patience) =
            (Arc::clone(&self.inner), self.place.clone(), self.terms.patience);
        async move {
            let bytes: [u8; 32] = random::array()?;
            let key = KeyMaterial::from_secret(bytes.to_vec())
                .map_err(|error| WrapError::Config(error.to_string()))?;
            let deadline = Deadline::after(patience);
            let call = inner.wrap_key(&key, &place, deadline);
            let answer = tokio::time::timeout_at(deadline.0.into(), call).await;
            answer.unwrap_or(Err(WrapError::DeadlineExceeded)).map(drop)
        }
    }

    /// Lets a call through unless it is open, and learns from its end.
    async fn through<T>(
        &self,
        deadline: Deadline,
        call: BoxFuture<'_, Result<T, WrapError>>,
    ) -> Result<T, WrapError> {
        let generation = {
            let state = self.state.lock();
            if state.open {
                return Err(WrapError::Unavailable { retryable: true });
            }
            state.generation
        };
        // Whoever forgets its deadline is held to it here.
        let answer = tokio::time::timeout_at(deadline.0.into(), call).await;
        let answer = answer.unwrap_or(Err(WrapError::DeadlineExceeded));
        match &answer {
            Err(error) if away(error) => self.failed(generation, 1, error),
            _ => self.answered(None),
        }
        answer
    }

    fn answered(&self, refused: Option<&WrapError>) {
        let mut state = self.state.lock();
        state.failures = 0;
        let was_open = std::mem::take(&mut state.open);
        if was_open {
            state.generation += 1;
        }
        drop(state);
        if was_open {
            tracing::info!(wrapper = self.name, "the backend answers again");
        }
        if let Some(error) = refused {
            tracing::warn!(wrapper = self.name, %error, "the backend answers, and refuses");
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
        *state = State { open: true, failures: 0, generation: generation + 1 };
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
            Some(answer) => return breaker.answered(answer.err().as_ref()),
            None => looks.push(breaker.question()),
        }
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
        Box::pin(self.through(deadline, self.inner.wrap_key(key, cx, deadline)))
    }

    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        Box::pin(self.through(deadline, self.inner.unwrap_key(wrapped, cx, deadline)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::custody::device::{Device, Mode};

    const PLACE: WrapContext = WrapContext { node_id: [1; 16], purpose: "test", slot_id: [2; 16] };

    /// Looks so seldom that no test sees one, unless it says otherwise.
    const SELDOM: Terms =
        Terms { failures: 3, look: Duration::from_secs(3600), patience: Duration::from_secs(3600) };
    const OFTEN: Terms = Terms { look: Duration::from_millis(10), ..SELDOM };

    fn of(device: &Arc<Device>, terms: Terms) -> Arc<Breaker> {
        Breaker::new("dev", Arc::clone(device) as _, terms, [1; 16], Handle::current())
    }

    async fn ask_within(breaker: &Breaker, time: Duration) -> Result<(), WrapError> {
        let key = KeyMaterial::from_secret(vec![7; 32]).unwrap();
        breaker.wrap_key(&key, &PLACE, Deadline::after(time)).await.map(drop)
    }

    async fn ask(breaker: &Breaker) -> Result<(), WrapError> {
        ask_within(breaker, Duration::from_secs(60)).await
    }

    /// Waits for the breaker to close by itself.
    async fn closed(breaker: &Breaker) {
        let wait = async {
            while breaker.is_open() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
    }

    #[tokio::test]
    async fn it_opens_after_failures_in_a_row_and_then_asks_nobody() {
        let device = Device::new();
        let breaker = of(&device, SELDOM);
        device.away();
        for _ in 0..2 {
            ask(&breaker).await.unwrap_err();
        }
        // An answer in between begins the count again.
        device.set(Mode::Up);
        ask(&breaker).await.unwrap();
        device.away();
        for _ in 0..3 {
            assert!(!breaker.is_open());
            ask(&breaker).await.unwrap_err();
        }
        assert!(breaker.is_open());
        let asked = device.asked();
        for _ in 0..5 {
            let refused = ask(&breaker).await.unwrap_err();
            assert_eq!(refused, WrapError::Unavailable { retryable: true });
        }
        assert_eq!(device.asked(), asked, "nobody is asked");
    }

    #[tokio::test]
    async fn answers_that_are_refusals_never_open_it() {
        let device = Device::new();
        let breaker = of(&device, SELDOM);
        for answer in [
            WrapError::NotMine,
            WrapError::Broken,
            WrapError::Refused("disabled".into()),
            WrapError::Config("none".into()),
        ] {
            device.set(Mode::Fails(answer.clone()));
            for _ in 0..10 {
                assert_eq!(ask(&breaker).await.unwrap_err(), answer);
            }
            assert!(!breaker.is_open(), "{answer:?}");
        }
    }

    #[tokio::test]
    async fn it_closes_by_itself_when_the_backend_is_back() {
        for (gone, back) in [
            (WrapError::Unavailable { retryable: false }, Mode::Up),
            // A refusal is an answer.
            (WrapError::DeadlineExceeded, Mode::Fails(WrapError::Refused("disabled".into()))),
        ] {
            let device = Device::new();
            let breaker = of(&device, OFTEN);
            device.set(Mode::Fails(gone));
            for _ in 0..3 {
                ask(&breaker).await.unwrap_err();
            }
            assert!(breaker.is_open());
            let asked = device.asked();
            device.asked_for(asked + 2).await;
            assert!(breaker.is_open(), "it has looked in vain");
            device.set(back);
            closed(&breaker).await;
        }
    }

    #[tokio::test]
    async fn a_backend_that_hangs_is_away_and_a_look_that_hangs_hides_nothing() {
        let device = Device::new();
        let breaker = of(&device, OFTEN);
        device.set(Mode::Hangs);
        for _ in 0..3 {
            let late = ask_within(&breaker, Duration::from_millis(1)).await.unwrap_err();
            assert_eq!(late, WrapError::DeadlineExceeded);
        }
        assert!(breaker.is_open());
        // Each look hangs for an hour, and others follow all the same.
        device.asked_for(device.asked() + 3).await;
        device.set(Mode::Up);
        closed(&breaker).await;
        ask(&breaker).await.unwrap();
    }

    #[tokio::test]
    async fn what_began_before_it_opened_does_not_open_it_again() {
        let device = Device::new();
        let breaker = of(&device, OFTEN);
        device.set(Mode::Hangs);
        let late: Vec<_> = (0..4)
            .map(|_| {
                let breaker = Arc::clone(&breaker);
                tokio::spawn(async move { ask_within(&breaker, Duration::from_millis(300)).await })
            })
            .collect();
        device.asked_for(4).await;
        for _ in 0..3 {
            ask_within(&breaker, Duration::from_millis(1)).await.unwrap_err();
        }
        assert!(breaker.is_open());
        // The looks are answered, and the calls of before fail after that.
        breaker.answered(None);
        for call in late {
            assert_eq!(call.await.unwrap(), Err(WrapError::DeadlineExceeded));
        }
        assert!(!breaker.is_open());
    }

    #[tokio::test]
    async fn one_look_at_the_start_tells() {
        let device = Device::new();
        let breaker = of(&device, SELDOM);
        breaker.look().await;
        assert!(!breaker.is_open());
        device.away();
        breaker.look().await;
        assert!(breaker.is_open());
    }
}
