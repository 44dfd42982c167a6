//! The connections that read.
//!
//! Not a pool crate: a connection belongs to one opening of the store and to the cluster that was
//! found then, and none of that fits the hooks of one; the rest is a vector and a semaphore.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use super::{
    Inner,
    connection::{Connection, Purpose},
    failure::{Failure, within},
    opening,
};
use crate::StoreError;

/// At most so many connections, kept while they are idle.
pub(super) struct Pool {
    idle: Mutex<Vec<Connection>>,
    permits: Arc<Semaphore>,
    limit: usize,
}

/// A connection and the right to have one.
pub(super) struct Lease {
    pub(super) connection: Connection,
    permit: OwnedSemaphorePermit,
    /// It has served before, and may have been closed by the other side since.
    pub(super) reused: bool,
}

impl Pool {
    pub(super) fn new(limit: usize) -> Self {
        Self { idle: Mutex::default(), permits: Arc::new(Semaphore::new(limit)), limit }
    }

    /// A connection of the opening `generation`.
    pub(super) async fn lease(
        inner: &Arc<Inner>,
        generation: u64,
        deadline: Instant,
    ) -> Result<Lease, Failure> {
        let pool = &inner.readers;
        let permit = timeout_at(deadline, Arc::clone(&pool.permits).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            let why = format!("all {} connections that read are in use", pool.limit);
            return Err(Failure::answer(StoreError::Other(why)));
        };
        let idle = pool.take(generation);
        if let Some(connection) = idle {
            return Ok(Lease { connection, permit, reused: true });
        }
        let purpose = Purpose::Reading;
        let connection = Connection::open(&inner.context, purpose, generation, deadline).await?;
        within(deadline, async {
            opening::check_cluster(inner, &connection.cluster)?;
            connection.prepare_all(purpose).await
        })
        .await?;
        Ok(Lease { connection, permit, reused: false })
    }

    fn take(&self, generation: u64) -> Option<Connection> {
        let mut idle = self.idle.lock();
        idle.retain(|idle| idle.is_usable() && idle.generation == generation);
        idle.pop()
    }

    /// Takes back a connection in which nothing is running.
    pub(super) fn put(&self, lease: Lease) {
        let Lease { connection, permit, .. } = lease;
        if connection.is_usable() {
            self.idle.lock().push(connection);
        }
        drop(permit);
    }

    /// Closes what is idle.
    pub(super) fn close(&self) {
        self.idle.lock().clear();
    }
}
