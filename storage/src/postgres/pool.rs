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
    // Fewer: what reads within a snapshot may need one more connection for a single statement.
    snapshots: Arc<Semaphore>,
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
        let snapshots = limit.saturating_sub(limit.div_ceil(4)).max(1);
        let semaphore = |n| Arc::new(Semaphore::new(n));
        Self {
            idle: Mutex::default(),
            permits: semaphore(limit),
            snapshots: semaphore(snapshots),
            limit,
        }
    }

    /// The right to hold one of the connections for a snapshot.
    pub(super) async fn snapshot(
        &self,
        deadline: Instant,
    ) -> Result<OwnedSemaphorePermit, Failure> {
        match timeout_at(deadline, Arc::clone(&self.snapshots).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(self.all_in_use()),
        }
    }

    fn all_in_use(&self) -> Failure {
        let why = format!("all {} connections that read are in use", self.limit);
        Failure::answer(StoreError::Other(why))
    }

    /// A connection of the opening `generation`.
    pub(super) async fn lease(
        &self,
        inner: &Arc<Inner>,
        generation: u64,
        deadline: Instant,
    ) -> Result<Lease, Failure> {
        let pool = self;
        let permit = timeout_at(deadline, Arc::clone(&pool.permits).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            return Err(pool.all_in_use());
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
