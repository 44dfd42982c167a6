//! Whether the node serves, and if not, why.
//!
//! The answer is computed from what is true at the moment of asking: the writer, the last
//! verification, the audit queue, the certificates. Nobody sets it to "healthy".

pub mod grpc;
pub mod plain;

use std::borrow::Cow;
use std::sync::Arc;

use tokio::sync::watch;

/// Why a node that was told to stop does not serve: no fault.
pub const STOPPING: &str = "the node is stopping";

/// What the node can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Everything.
    Serving,
    /// Everything now, and somebody should look.
    Degraded(Cow<'static, str>),
    /// Not what it is there for.
    NotServing(&'static str),
}

impl State {
    /// Whether requests are answered.
    #[must_use]
    pub fn serves(&self) -> bool {
        !matches!(self, Self::NotServing(_))
    }

    /// What is wrong, in words for operators.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Serving => None,
            Self::Degraded(reason) => Some(reason),
            Self::NotServing(reason) => Some(reason),
        }
    }

    /// The worse of two.
    #[must_use]
    fn worse(self, other: Self) -> Self {
        match (&self, &other) {
            (Self::NotServing(_), _) | (_, Self::Serving) => self,
            (_, Self::NotServing(_)) | (Self::Serving, _) => other,
            _ => self,
        }
    }
}

/// What is looked at.
pub type Check = Box<dyn Fn() -> State + Send + Sync>;

/// The state of the node, computed when asked and told to those who watch.
pub struct Health {
    checks: Vec<Check>,
    told: watch::Sender<State>,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health").field("told", &*self.told.borrow()).finish_non_exhaustive()
    }
}

impl Health {
    /// Health as these checks see it; the first of equally bad ones is told.
    #[must_use]
    pub fn new(checks: Vec<Check>) -> Arc<Self> {
        let told = watch::Sender::new(State::NotServing("the node is starting"));
        let health = Self { checks, told };
        health.refresh();
        Arc::new(health)
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> State {
        self.checks.iter().fold(State::Serving, |worst, check| worst.worse(check()))
    }

    /// All that is wrong, worst first.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let states =
            self.checks.iter().map(|check| check()).filter(|state| *state != State::Serving);
        let (degraded, down): (Vec<State>, Vec<State>) = states.partition(State::serves);
        let all = down.into_iter().chain(degraded);
        all.filter_map(|state| state.reason().map(str::to_owned)).collect()
    }

    /// Computes the state, and tells and logs it if it has changed.
    pub fn refresh(&self) -> State {
        let state = self.state();
        self.told.send_if_modified(|told| {
            if *told == state {
                return false;
            }
            match &state {
                State::Serving => tracing::info!("the node serves"),
                State::Degraded(reason) => tracing::warn!(%reason, "the node serves, degraded"),
                State::NotServing(reason) if *reason == STOPPING => {
                    tracing::info!("the node stops serving");
                }
                State::NotServing(reason) => tracing::error!(reason, "the node does not serve"),
            }
            *told = state.clone();
            true
        });
        state
    }

    /// Follows the state from what was told last; changes show within a second.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<State> {
        self.told.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn the_worst_check_decides_and_the_first_of_equals() {
        let fixed = |state: State| -> Check { Box::new(move || state.clone()) };
        let of =
            |states: &[State]| Health::new(states.iter().cloned().map(fixed).collect()).state();
        use State::{Degraded, NotServing, Serving};
        assert_eq!(of(&[]), Serving);
        let degraded = |text: &'static str| Degraded(text.into());
        assert_eq!(of(&[Serving, degraded("a"), degraded("b"), Serving]), degraded("a"));
        assert_eq!(of(&[degraded("a"), NotServing("b"), NotServing("c")]), NotServing("b"));
        let all =
            Health::new([degraded("a"), NotServing("b"), Serving, degraded("c")].map(fixed).into());
        assert_eq!(all.problems(), ["b", "a", "c"]);
    }

    #[tokio::test]
    async fn watchers_are_told_of_changes_only() {
        let bad = Arc::new(AtomicBool::new(false));
        let look = Arc::clone(&bad);
        let health = Health::new(vec![Box::new(move || {
            if look.load(Ordering::Relaxed) { State::NotServing("x") } else { State::Serving }
        })]);
        let mut watch = health.watch();
        assert_eq!(*watch.borrow_and_update(), State::Serving);
        health.refresh();
        assert!(!watch.has_changed().unwrap());
        bad.store(true, Ordering::Relaxed);
        assert_eq!(health.refresh(), State::NotServing("x"));
        watch.changed().await.unwrap();
        assert!(!watch.borrow().serves());
    }
}
