//! Where keys are made: off the threads of requests, a few at a time, with a bounded queue.

use std::sync::Arc;
use std::time::Duration;

use polykey_hsm::{Algorithm, Generated, GenerationParams, algorithm};
use tokio::sync::Semaphore;

use crate::error::Error;
use crate::share::Places;

/// A bounded place for slow key generation.
#[derive(Clone, Debug)]
pub struct Forge {
    running: Arc<Semaphore>,
    /// Of those that run and those that wait.
    places: Places<String>,
}

impl Forge {
    /// At most `running` generations at a time and `waiting` more in the queue.
    #[must_use]
    pub fn new(running: usize, waiting: usize) -> Self {
        let running = running.max(1);
        Self { running: Arc::new(Semaphore::new(running)), places: Places::new(running + waiting) }
    }

    /// Makes a key: symmetric ones at once, the others on a thread of their own. One client has half of
    /// the places at most; the node's own work, without a client, has no such limit.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if the queue or the client's share of it is full, [`Error::Invalid`] if the
    /// parameters do not fit.
    pub async fn make(
        &self,
        client: Option<&str>,
        algorithm: Algorithm,
        params: GenerationParams,
    ) -> Result<Generated, Error> {
        if !algorithm.is_asymmetric() {
            return generate(algorithm, params);
        }
        self.run(client, move || generate(algorithm, params)).await?
    }

    /// Has something slow done on a thread of its own.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if the queue is full.
    pub async fn run<T: Send + 'static>(
        &self,
        client: Option<&str>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        let place = self.places.take(client.map(str::to_owned).as_ref());
        let _place = place.ok_or(Error::Exhausted { retry_after: Duration::from_secs(1) })?;
        let turn = self
            .running
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| Error::unavailable("the forge is closed"))?;
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        done.await.map_err(|e| Error::internal(format!("slow work: {e}")))
    }
}

fn generate(algorithm: Algorithm, params: GenerationParams) -> Result<Generated, Error> {
    algorithm::generate(algorithm, params).map_err(|e| match e {
        algorithm::AlgorithmError::SuppliedValue(_) => Error::invalid("value", e.to_string()),
        algorithm::AlgorithmError::Material(_) => Error::invalid("value", e.to_string()),
        algorithm::AlgorithmError::PrefixNotTaken | algorithm::AlgorithmError::BadPrefix => {
            Error::invalid("generation_params[\"prefix\"]", e.to_string())
        }
        algorithm::AlgorithmError::NotAKey(_)
        | algorithm::AlgorithmError::Inconsistent
        | algorithm::AlgorithmError::Crypto(_) => Error::internal(format!("generating a key: {e}")),
    })
}
