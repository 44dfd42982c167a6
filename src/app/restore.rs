//! Backups read back: into a store that stands where the configuration says, or into one that is thrown
//! away once it has been verified.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polykey_hsm::KeyWrapper;
use polykey_hsm::recovery::{RecoveryKey, RecoveryWrapper};
use polykey_storage::{OpenError, Store, redb};

use super::recover::{Recovered, RecoveryFailure, give_back};
use super::{AppError, closed, event, store_options, wrappers};
use crate::backup::{Backup, BackupError, Contents};
use crate::config::Config;
use crate::custody::{self, Custody};
use crate::time::{Clock, Time};
use crate::vault::{Invalidate, VerifyReport};

/// Why a backup gives nothing back, besides what keeps a node from opening.
#[derive(Debug, thiserror::Error)]
pub enum RestoreFailure {
    /// The file.
    #[error("{}: {error}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        error: BackupError,
    },
    /// Its records are not those of a whole store.
    #[error("{}: its records are not those that its node had: {finding}", path.display())]
    Records {
        /// The path of the backup.
        path: PathBuf,
        /// The first thing that was found.
        finding: String,
    },
    /// There is a store already.
    #[error("there is a store at {} already; nothing was changed", .0.display())]
    Exists(PathBuf),
    /// The place of the store cannot be used.
    #[error("{}: {source}", path.display())]
    Place {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What a backup was found to hold.
#[derive(Debug)]
pub struct BackupView {
    /// The node.
    pub node_id: [u8; 16],
    /// When it was made.
    pub created_at: Time,
    /// How much there is in it.
    pub contents: Contents,
    /// Keys that are enabled.
    pub keys: u64,
    /// Leaves of the audit log.
    pub leaves: u64,
    /// Records that were damaged when it was made. They are in it as they were.
    pub damaged: u64,
}

/// Opens a backup with what the configuration names, or a recovery key, writes its records into a store in
/// `scratch`, verifies every one of them there, and throws that store away.
///
/// # Errors
/// See [`AppError`].
pub async fn verify_backup(
    config: &Config,
    from: &Path,
    scratch: &Path,
    key: Option<RecoveryKey>,
    clock: Clock,
) -> Result<BackupView, AppError> {
    let wrappers = opening(config, key).await?;
    let target = Unfinished::at(scratch, ".polykey-backup-verify")?;
    let (custody, view) = unpacked(config, from, &target, &wrappers, clock).await?;
    drop(custody);
    closed(&target.0).await;
    Ok(view)
}

/// Makes a store of a backup where the configuration has its store, where there must be none. It stands
/// there only once every record has been verified. With a recovery key, the root key is then wrapped under
/// the master key of the configuration, as [`super::recover`] does.
///
/// # Errors
/// See [`AppError`]; there is no store then, unless the last step alone failed.
pub async fn restore(
    config: &Config,
    from: &Path,
    key: Option<RecoveryKey>,
    make_master_key: bool,
    clock: Clock,
) -> Result<(BackupView, Option<Recovered>), AppError> {
    let path = &config.storage.path;
    let exists = || RestoreFailure::Exists(path.clone());
    if path.symlink_metadata().is_ok() {
        return Err(exists().into());
    }
    let recovering = key.is_some();
    let wrappers = opening(config, key).await?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| RestoreFailure::Place { path, source }
    };
    std::fs::create_dir_all(directory).map_err(failed(directory))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let target = Unfinished::at(directory, &format!(".{name}.restoring"))?;
    let (custody, view) = unpacked(config, from, &target, &wrappers, clock.clone()).await?;
    drop(custody);
    closed(&target.0).await;
    // Never over a store that another process has made meanwhile.
    std::fs::hard_link(&target.0, path).map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => exists(),
        _ => failed(path)(source),
    })?;
    drop(target);
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(failed(directory))?;

    let store: Arc<dyn Store> = Arc::new(redb::Redb::open(path, store_options(config))?);
    let custody = opened(store, &wrappers, clock.clone()).await?;
    let mut done = event("Restore", clock.now());
    done.details.insert("revision".into(), view.contents.revision.to_string());
    done.details.insert("created_at".into(), view.created_at.to_string());
    custody.vault().record([done]).await?;
    let recovered = match recovering {
        true => Some(give_back(&custody, config, make_master_key, clock).await?),
        false => None,
    };
    drop(custody);
    closed(path).await;
    Ok((view, recovered))
}

/// What opens the root key: what was given, or else what the configuration names.
async fn opening(
    config: &Config,
    key: Option<RecoveryKey>,
) -> Result<Vec<Arc<dyn KeyWrapper>>, AppError> {
    match key {
        Some(key) => {
            let recovery = RecoveryWrapper::with(key).map_err(RecoveryFailure::from)?;
            Ok(vec![Arc::new(recovery)])
        }
        None => {
            let (named, _) = wrappers(config, Vec::new()).await?;
            Ok(named.into_iter().map(|named| named.wrapper).collect())
        }
    }
}

async fn opened(
    store: Arc<dyn Store>,
    wrappers: &[Arc<dyn KeyWrapper>],
    clock: Clock,
) -> Result<Arc<Custody>, custody::OpenError> {
    let nobody = Arc::new(Vec::<Arc<dyn Invalidate>>::new());
    Custody::open(store, wrappers, nobody, clock).await
}

/// A store that is not whole yet. Dropped, it is gone.
struct Unfinished(PathBuf);

impl Unfinished {
    fn at(directory: &Path, name: &str) -> Result<Self, RestoreFailure> {
        let path = directory.join(name);
        // Left by a process that was killed; one that still writes it holds its lock.
        match redb::Redb::open(&path, redb::Options::default()) {
            Err(OpenError::NotFound { .. }) => return Ok(Self(path)),
            Err(OpenError::InUse { .. }) => {
                let source = std::io::ErrorKind::ResourceBusy.into();
                return Err(RestoreFailure::Place { path, source });
            }
            Ok(_) | Err(_) => {}
        }
        std::fs::remove_file(&path)
            .map_err(|source| RestoreFailure::Place { path: path.clone(), source })?;
        Ok(Self(path))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// The store of a backup, whole and verified, and what is in it.
async fn unpacked(
    config: &Config,
    from: &Path,
    target: &Unfinished,
    wrappers: &[Arc<dyn KeyWrapper>],
    clock: Clock,
) -> Result<(Arc<Custody>, BackupView), AppError> {
    let failed = |error| RestoreFailure::File { path: from.to_owned(), error };
    let file = File::open(from).map_err(|error| failed(error.into()))?;
    let backup = Backup::open(BufReader::new(file)).map_err(failed)?;
    let created_at = backup.created_at();
    let bare = backup.root_rows().await.map_err(failed)?;
    let ring = opened(bare, wrappers, clock.clone()).await?.vault().ring();
    // One commit after the other, of many rows each: a journal would only write them twice.
    let options = redb::Options { journal_bytes: 0, ..store_options(config) };
    let store = redb::Redb::create(&target.0, options)?;
    let contents = backup.unpack(&ring, &store).await.map_err(failed)?;
    drop(store);
    closed(&target.0).await;
    let store: Arc<dyn Store> = Arc::new(redb::Redb::open(&target.0, options)?);
    let custody = opened(store, wrappers, clock).await?;
    let report = custody.vault().verify(true, |_| {}).await?;
    if let Some(finding) = foreign(&report) {
        return Err(RestoreFailure::Records { path: from.to_owned(), finding }.into());
    }
    let head = custody.vault().head();
    let view = BackupView {
        node_id: custody.vault().node_id(),
        created_at,
        contents,
        keys: head.keys,
        leaves: head.leaves,
        damaged: report.damaged,
    };
    Ok((custody, view))
}

/// What shows that these are not the rows of one revision of one store.
fn foreign(report: &VerifyReport) -> Option<String> {
    let foreign = report.foreign_rows || report.foreign_log;
    foreign.then(|| report.findings.first().cloned().unwrap_or_default())
}
