//! A store made from a database: what `polykey restore --from postgres://…` does.

use std::path::PathBuf;
use std::sync::Arc;

use polykey_hsm::{BoxFuture, KeyWrapper};
use polykey_storage::replica::{self, Replica, ReplicaError, Step};
use polykey_storage::{
    Changes, ChangesError, Commit, CommitError, Committed, Finish, NoFinish, ReadError,
    ReopenError, Revision, Snapshot, Store, StoreStatus, redb,
};

use super::restore::{BackupView, RestoreFailure, Unfinished, foreign, opened};
use super::{AppError, store};
use crate::audit::{self, VerifyingKey};
use crate::backup::Contents;
use crate::config::Config;
use crate::custody::Custody;
use crate::time::Clock;

/// A store in a database, and what messages call it.
#[derive(Clone)]
pub struct Database {
    /// The connection string without its parameters.
    pub name: String,
    /// The store.
    pub store: Arc<dyn Store>,
}

/// A store that is read and never written: a node may be shipping to it, and would find that it diverged.
struct Untouched(Arc<dyn Store>);

impl Store for Untouched {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        self.0.snapshot()
    }
    fn commit<'a>(
        &'a self,
        _: Vec<Commit>,
        _: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async { Err(CommitError::ReadOnly) })
    }
    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>> {
        self.0.changes(after, limit)
    }
    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        self.0.reopen()
    }
    fn status(&self) -> StoreStatus {
        self.0.status()
    }
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The store of a database as of one revision, whole and verified, and what is in it. What is written
/// there meanwhile may or may not be in it.
pub(super) async fn drawn(
    config: &Config,
    from: &Database,
    target: &Unfinished,
    wrappers: &[Arc<dyn KeyWrapper>],
    signers: Option<&[VerifyingKey]>,
    clock: Clock,
) -> Result<(Arc<Custody>, BackupView), AppError> {
    let name = || PathBuf::from(&from.name);
    let failed = |error| RestoreFailure::Database { name: from.name.clone(), error };
    let source = &from.store;
    let mark = replica::watermark(source.as_ref()).await.map_err(failed)?;
    let promoted = replica::promotion(source.as_ref()).await.map_err(failed)?;
    if promoted.is_none() && mark.as_ref().is_some_and(|mark| !mark.whole) {
        return Err(failed(ReplicaError::Torn).into());
    }
    // Before much is read: whether anything opens it.
    drop(opened(Arc::new(Untouched(Arc::clone(source))), wrappers, clock.clone()).await?);
    let options = redb::Options { journal_bytes: 0, ..store::file_options(config) };
    let store: Arc<dyn Store> = Arc::new(redb::Redb::create(&target.path, options)?);
    let replica = Replica::new(Arc::clone(source), Arc::clone(&store));
    // A source that goes on changing is followed to a revision that it was.
    let revision = loop {
        match replica.step().await.map_err(failed)? {
            Step::Applied { revision, .. } | Step::CaughtUp(revision) => break revision,
            Step::Copied { .. } => {}
        }
    };
    // It is a store of its own.
    let apart = replica::apart();
    store.commit(vec![apart], &mut NoFinish).await.map_err(|e| failed(ReplicaError::Commit(e)))?;
    drop((replica, store));
    store::closed_at(&target.path).await;
    let store: Arc<dyn Store> = Arc::new(redb::Redb::open(&target.path, options)?);
    let status = store.status();
    let custody = opened(store, wrappers, clock).await?;
    let report = custody.vault().verify(true, |_| {}).await?;
    if let Some(finding) = foreign(&report) {
        return Err(RestoreFailure::Records { path: name(), finding }.into());
    }
    if let Some(signers) = signers {
        let log = audit::verify_store(custody.vault(), signers, &[]).await?;
        if !log.ok() || log.checkpoints == 0 {
            return Err(RestoreFailure::Unproven(name()).into());
        }
    }
    let head = custody.vault().head();
    // A replica's revisions are those of its source, which is what was acknowledged.
    let revision = match (mark, promoted) {
        (Some(_), None) => {
            let mark = replica::watermark(source.as_ref()).await.map_err(failed)?;
            mark.map_or(revision, |mark| mark.revision)
        }
        _ => revision,
    };
    let view = BackupView {
        node_id: custody.vault().node_id(),
        created_at: head.last_time,
        contents: Contents {
            revision: revision.0,
            rows: status.rows.unwrap_or(0),
            bytes: status.bytes.unwrap_or(0),
        },
        keys: head.keys,
        leaves: head.leaves,
        damaged: report.damaged,
    };
    Ok((custody, view))
}
