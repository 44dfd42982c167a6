//! Webhooks: the operator's systems are told what became of keys.
//!
//! A webhook follows the audit log, as a sink does: the log is the authority and the only buffer, and each
//! webhook has a place in it, in the store. An event is in the log before its change is acknowledged, so none
//! is lost, and the place moves once the receiver has answered, so that each comes at least once and in its
//! order. The `webhook-id` of a message is that of its event: a receiver drops by it what comes again.
//!
//! A receiver that hangs, refuses or is slow holds up neither requests nor other webhooks. It is tried again
//! after 1 s to 5 min; what it has not taken for three days is given up, one event after the other, and each is
//! in the audit log. One that answers 410 is left in peace until a node starts.
//!
//! Where several nodes share a store, one of them delivers for a webhook, and another takes over when that one
//! is gone.

mod courier;
mod event;
mod place;
mod send;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use polykey_hsm::random;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::health::State;
use crate::time::Time;
use crate::vault::Vault;

use courier::Courier;
pub use event::{
    API_KEY_EXPIRED, API_KEY_EXPIRES, EFFECTIVE_AT, KEY_EXPIRED, KEY_EXPIRES, Kind, NOTIFIES,
    PREVIOUS,
};
pub use send::{Secrets, Sender, Unusable};

/// What is to be known of a webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its name in the configuration.
    pub name: String,
    /// Events that were delivered, since the start.
    pub delivered: u64,
    /// Tries that failed.
    pub failed: u64,
    /// Events that were given up.
    pub given_up: u64,
    /// Events that are read and not delivered.
    pub queued: usize,
    /// How old the event is that comes next; zero where none waits.
    pub behind: Duration,
    /// When the last try ended, and how long it took.
    pub last: Option<(Time, Duration)>,
    /// Why the last try failed.
    pub trouble: Option<String>,
    /// When it is tried again, while it waits for that.
    pub next: Option<Time>,
}

/// All webhooks of a node.
pub struct Webhooks {
    each: Vec<Arc<Courier>>,
    closing: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Webhooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Webhooks").field(&self.status()).finish()
    }
}

impl Webhooks {
    /// Those of the configuration, at rest: name, what each is told, and the way to it. Where one that is new
    /// begins is written down, so that nothing that is acknowledged from now on is left out.
    ///
    /// # Errors
    /// [`Error::Internal`] if the system's generator fails, [`Error::Unavailable`] or [`Error::DataLoss`] if
    /// the store cannot be read or written.
    pub async fn new(
        vault: &Arc<Vault>,
        each: Vec<(String, Vec<Kind>, Sender)>,
    ) -> Result<Arc<Self>, Error> {
        let closing = CancellationToken::new();
        let process = random::array::<16>()
            .map_err(|error| Error::internal(format!("naming this process: {error}")))?;
        let begin = vault.leaves();
        let courier = |(name, events, sender): (String, Vec<Kind>, Sender)| {
            let way = (events, sender);
            Arc::new(Courier::new(vault, name, way, (process, begin), closing.clone()))
        };
        let each: Vec<_> = each.into_iter().map(courier).collect();
        for courier in &each {
            courier.begin().await?;
        }
        Ok(Arc::new(Self { each, closing, tasks: Mutex::default() }))
    }

    /// Starts to deliver, on the current runtime.
    pub fn start(&self) {
        let tasks = self.each.iter().map(|courier| tokio::spawn(Arc::clone(courier).run()));
        self.tasks.lock().extend(tasks);
    }

    /// What is to be known of each.
    #[must_use]
    pub fn status(&self) -> Vec<Status> {
        self.each.iter().map(|courier| courier.status()).collect()
    }

    /// The webhook whose receiver has least of the log, by its section, and how many leaves that is.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn least(&self) -> Result<Option<(String, u64)>, Error> {
        let mut least: Option<(String, u64)> = None;
        for courier in &self.each {
            let (section, has) = courier.has().await?;
            if least.as_ref().is_none_or(|(_, least)| has < *least) {
                least = Some((section, has));
            }
        }
        Ok(least)
    }

    /// For health: the first one that fails.
    #[must_use]
    pub fn state(&self) -> State {
        let states = self.each.iter().map(|courier| courier.state());
        states.into_iter().find(|state| *state != State::Serving).unwrap_or(State::Serving)
    }

    /// Writes down how far each has come, within `limit`. What is not delivered follows after the next
    /// start.
    pub async fn shutdown(&self, limit: Duration) {
        self.closing.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let ended = tokio::time::timeout(limit, futures::future::join_all(tasks)).await;
        for abort in aborts {
            abort.abort();
        }
        if ended.is_err() {
            tracing::warn!("where a webhook stands was not written: some events come again");
        }
    }
}
