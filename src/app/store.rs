//! The store of a configuration: a file, or a database.

use std::path::Path;
use std::sync::Arc;

use polykey_storage::replica::{self, ReplicaError};
use polykey_storage::replicated::Replicated;
use polykey_storage::{Revision, Store, redb};
use rustix::fs::FlockOperation;

use super::restore::RestoreFailure;
use super::running::LAST_WORDS;
use super::{AppError, replication};
#[cfg(feature = "postgres")]
use crate::app::epoch;
use crate::config::Config;

/// How a store file of this configuration is opened.
pub(super) fn file_options(config: &Config) -> redb::Options {
    redb::Options {
        cache_bytes: config.storage.cache_mib.saturating_mul(1024 * 1024),
        changes: config.storage.changes,
        ..redb::Options::default()
    }
}

/// Opens the store; makes an empty one where there is none, if `found`. In a database the tables are
/// made in any case.
/// A file is shipped from now on, if the configuration says so.
pub(super) async fn open(
    config: &Config,
    found: bool,
) -> Result<(Arc<dyn Store>, Option<Arc<Replicated>>), AppError> {
    if let Some(database) = &config.storage.database {
        return Ok((Box::pin(in_database(config, database)).await?, None));
    }
    let (path, options) = (&config.storage.path, file_options(config));
    let store = match found {
        true => redb::Redb::open_or_create(path, options)?,
        false => redb::Redb::open(path, options)?,
    };
    Box::pin(replication::start(config, Arc::new(store))).await
}

#[cfg(feature = "postgres")]
async fn in_database(
    config: &Config,
    database: &crate::config::Database,
) -> Result<Arc<dyn Store>, AppError> {
    use polykey_storage::postgres::{Options, Postgres};

    use crate::config::WhenFenced;

    let mut options = Options::new(&database.url);
    if let Some(source) = &database.password {
        let password = super::secrets::password(config, source, "[storage] password");
        options.password = Some(password.await?);
    }
    options.schema.clone_from(&database.schema);
    options.connections = database.connections;
    options.changes = config.storage.changes;
    options.call_timeout = database.call_timeout;
    options.connect_timeout = options.connect_timeout.min(database.call_timeout);
    options.transaction_pooler = database.transaction_pooler;
    options.durable = database.durable;
    // Long enough for a verification of everything.
    options.snapshot_life = std::time::Duration::from_secs(1800);
    let pin = epoch::Pin::read(&config.node.data_dir)?;
    options.epoch = pin.as_ref().map(|pin| pin.epoch);
    let opened = tokio::task::spawn_blocking(move || Postgres::open(options));
    let store = opened
        .await
        .map_err(|e| crate::error::Error::internal(format!("opening the database: {e}")))??;
    epoch::Pin::settle(pin, &config.node.data_dir, &store)?;
    let durability = store.durability();
    let weak = durability.weaknesses().join(", ");
    let standbys = durability.synchronous_standby_names.unwrap_or_default();
    let kind = store.status().kind;
    if weak.is_empty() {
        tracing::info!(
            kind,
            epoch = store.epoch(),
            synchronous_commit = durability.synchronous_commit.unwrap_or_default(),
            synchronous_standby_names = standbys,
            "commits of the database are durable"
        );
    } else {
        tracing::warn!(kind, weak, "the database may lose acknowledged commits, as was allowed");
    }
    if matches!(store.status().health, polykey_storage::Health::NeedsReopen(_)) {
        let does = match database.when_fenced {
            WhenFenced::Read => "only reads",
            WhenFenced::Refuse => "serves nothing",
        };
        let file = epoch::path(&config.node.data_dir);
        tracing::error!(
            file = %file.display(),
            "another node was promoted, and this one {does}: if it is to write again, remove the file"
        );
    }
    Ok(Arc::new(store))
}

#[cfg(not(feature = "postgres"))]
async fn in_database(_: &Config, _: &crate::config::Database) -> Result<Arc<dyn Store>, AppError> {
    // Its configuration is refused before.
    Err(crate::error::Error::internal("this build knows no databases").into())
}

/// Refuses a copy of a store in a database that stands between two revisions, and names one that may be
/// shipped to by another node.
pub(super) async fn whole(config: &Config, store: &dyn Store) -> Result<(), AppError> {
    if config.storage.database.is_none() {
        return Ok(());
    }
    let failed = |error| RestoreFailure::Database { name: name(config), error };
    let mark = replica::watermark(store).await.map_err(failed)?;
    let Some(mark) = mark else { return Ok(()) };
    if replica::promotion(store).await.map_err(failed)?.is_some() {
        return Ok(());
    }
    if !mark.whole {
        return Err(failed(ReplicaError::Torn).into());
    }
    tracing::warn!(
        "this store is a copy of another one and was never promoted: if a node still ships to it, that \
         node will not be stopped; `polykey promote` is what fences it"
    );
    Ok(())
}

/// What the store is called in messages.
#[must_use]
pub fn name(config: &Config) -> String {
    match &config.storage.database {
        Some(database) => database.url.split('?').next().unwrap_or_default().to_owned(),
        None => config.storage.path.display().to_string(),
    }
}

/// Whether there is a store in which something has been written.
///
/// # Errors
/// [`AppError`] if a database cannot be asked.
pub async fn exists(config: &Config) -> Result<bool, AppError> {
    if config.storage.database.is_none() {
        return Ok(config.storage.path.exists());
    }
    Ok(open(config, false).await?.0.status().revision != Revision::EMPTY)
}

/// Removes a store that was just made, with its journal. Empty tables of a database stay.
pub(super) fn unmake(config: &Config) {
    if config.storage.database.is_some() {
        return;
    }
    let path = &config.storage.path;
    for path in [path.to_owned(), redb::journal_path(path)] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "an empty store could not be removed");
            }
            _ => {}
        }
    }
}

/// Waits until nobody has the store file any more: its writer's thread ends by itself.
pub(super) async fn closed(config: &Config) {
    if config.storage.database.is_none() {
        closed_at(&config.storage.path).await;
    }
}

/// As [`closed`], for the store file at `path`.
pub(super) async fn closed_at(path: &Path) {
    let free = || {
        let Ok(file) = std::fs::File::open(path) else { return true };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok()
    };
    let wait = async {
        while !free() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    if tokio::time::timeout(LAST_WORDS, wait).await.is_err() {
        tracing::warn!(path = %path.display(), "the store is still open");
    }
}
