//! Backups read back: into a store that stands where the configuration says, or into one that is thrown
//! away once it has been verified.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polykey_hsm::recovery::{RecoveryKey, RecoveryWrapper};
use polykey_hsm::{KeyWrapper, MasterKeySource};
use polykey_storage::replica::ReplicaError;
use polykey_storage::{Store, redb};
use rustix::fs::FlockOperation;

use super::draw::{self, Database};
use super::recover::{Recovered, RecoveryFailure, give_back};
use super::{AppError, anchor, event, store, wrappers};
use crate::audit::{self, VerifyingKey};
use crate::backup::{Backup, BackupError, Contents};
use crate::config::{AnchorPlace, Config, Wrapper};
use crate::custody::{self, Custody, NamedWrapper};
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
    /// The database.
    #[error("{name}: {error}")]
    Database {
        /// Its place.
        name: String,
        /// What is wrong with it.
        error: ReplicaError,
    },
    /// There is a store already, or the journal of one.
    #[error("there is a store, or what is left of one, at {}; nothing was changed", .0.display())]
    Exists(PathBuf),
    /// The configuration's store is in a database.
    #[error(
        "a backup becomes a store in a file, and the configuration has its store in a database"
    )]
    IntoDatabase,
    /// It is not shown to be of the node that the operator means.
    #[error(
        "{}: no checkpoint in it is signed by the key that was given: it may be anybody's", .0.display()
    )]
    Unproven(PathBuf),
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

/// A recovery key, and what shows that a backup is of its node: the public half of a recovery key is all it
/// takes to make one that the private half opens.
#[derive(Debug)]
pub struct Recovery {
    /// The private half.
    pub key: RecoveryKey,
    /// The keys that sign the checkpoints of the node's log, one of which must have signed one in it.
    pub signers: Vec<VerifyingKey>,
}

/// What a store is made of.
#[derive(Clone, Copy, Debug)]
pub enum Origin<'a> {
    /// A backup.
    File(&'a Path),
    /// A database.
    Database(&'a Database),
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
    recovery: Option<Recovery>,
    clock: Clock,
) -> Result<BackupView, AppError> {
    let Opening { wrappers, signers, named: _ } = opening(config, recovery).await?;
    let target = Unfinished::at(scratch, ".polykey-backup-verify")?;
    let (custody, view) =
        unpacked(config, from, &target, &wrappers, signers.as_deref(), clock).await?;
    drop(custody);
    store::closed_at(&target.path).await;
    Ok(view)
}

/// Makes a store of a backup or of a database where the configuration has its store, where there must be none. It stands
/// there only once every record has been verified. With a recovery key, the root key is wrapped under the
/// master key of the configuration before, as [`super::recover`] does.
///
/// # Errors
/// See [`AppError`]; there is no store then.
pub async fn restore(
    config: &Config,
    from: Origin<'_>,
    recovery: Option<Recovery>,
    make_master_key: bool,
    clock: Clock,
) -> Result<(BackupView, Option<Recovered>), AppError> {
    if config.storage.database.is_some() {
        return Err(RestoreFailure::IntoDatabase.into());
    }
    let path = &config.storage.path;
    let mut journal = path.clone().into_os_string();
    journal.push("-journal");
    // What a store that was moved away has left behind is a part of it.
    for path in [path, &PathBuf::from(journal)] {
        if path.symlink_metadata().is_ok() {
            return Err(RestoreFailure::Exists(path.clone()).into());
        }
    }
    let recovering = recovery.is_some();
    if recovering {
        master_key(config, make_master_key).await?;
    }
    let Opening { wrappers, signers, named: of_config } = opening(config, recovery).await?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(place(directory))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let target = Unfinished::at(directory, &format!(".{name}.restoring"))?;
    let signers = signers.as_deref();
    let (custody, view) = match from {
        Origin::File(from) => {
            Box::pin(unpacked(config, from, &target, &wrappers, signers, clock.clone())).await?
        }
        Origin::Database(from) => {
            Box::pin(draw::drawn(config, from, &target, &wrappers, signers, clock.clone())).await?
        }
    };
    let mut done = event("Restore", clock.now());
    done.details.insert("revision".into(), view.contents.revision.to_string());
    done.details.insert("created_at".into(), view.created_at.to_string());
    if let Origin::Database(from) = from {
        done.details.insert("from".into(), from.name.clone());
    }
    let accepted =
        anchor::restoring(config, &of_config, custody.vault(), &clock, view.contents.revision)
            .await?;
    let events: Vec<_> = [done].into_iter().chain(accepted).collect();
    custody.vault().record(events).await?;
    let recovered = match recovering {
        true => Some(give_back(&custody, config, make_master_key, clock).await?),
        false => None,
    };
    let anchor = anchor::anew(config, &of_config, custody.vault()).await?;
    drop(custody);
    store::closed_at(&target.path).await;
    named(&target.path, path).map_err(|source| match source.kind() {
        std::io::ErrorKind::AlreadyExists => RestoreFailure::Exists(path.clone()),
        _ => place(path)(source),
    })?;
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(place(directory))?;
    // Never before the store is there.
    anchor.map_or(Ok(()), |anew| anew())?;
    Ok((view, recovered))
}

fn place(path: &Path) -> impl FnOnce(std::io::Error) -> RestoreFailure {
    let path = path.to_owned();
    move |source| RestoreFailure::Place { path, source }
}

/// Gives a file its name, never over what another process has put there meanwhile.
fn named(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system knows of that.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => std::fs::hard_link(from, to),
        done => Ok(done?),
    }
}

/// Fails before any work where the master key is needed at the end and not to be had.
async fn master_key(config: &Config, make: bool) -> Result<(), AppError> {
    if let Wrapper::Local(MasterKeySource::File(path)) = &config.master_key
        && make
        && !path.exists()
    {
        return Ok(());
    }
    let opened = NamedWrapper::open_master(config).await;
    opened.map(drop).map_err(|unusable| AppError::MasterKey(unusable.error))
}

/// What opens a store that is given back.
struct Opening {
    wrappers: Vec<Arc<dyn KeyWrapper>>,
    /// Whose checkpoints count, where a recovery key opens it.
    signers: Option<Vec<VerifyingKey>>,
    /// Those of the configuration, of which one may be the anchor's.
    named: Vec<NamedWrapper>,
}

/// What opens the root key, what was given, or else what the configuration names; and who must have signed
/// the log.
async fn opening(config: &Config, recovery: Option<Recovery>) -> Result<Opening, AppError> {
    let place = config.anchor.as_ref().map(|anchor| &anchor.place);
    let in_token = matches!(place, Some(AnchorPlace::Token { .. }));
    let named = match recovery.is_none() || in_token {
        true => wrappers(config, Vec::new()).await?.0,
        false => Vec::new(),
    };
    match recovery {
        Some(Recovery { key, signers }) => {
            let recovery = RecoveryWrapper::with(key).map_err(RecoveryFailure::from)?;
            Ok(Opening { wrappers: vec![Arc::new(recovery)], signers: Some(signers), named })
        }
        None => {
            let wrappers = named.iter().map(|named| Arc::clone(&named.wrapper)).collect();
            Ok(Opening { wrappers, signers: None, named })
        }
    }
}

pub(super) async fn opened(
    store: Arc<dyn Store>,
    wrappers: &[Arc<dyn KeyWrapper>],
    clock: Clock,
) -> Result<Arc<Custody>, custody::OpenError> {
    let nobody = Arc::new(Vec::<Arc<dyn Invalidate>>::new());
    Custody::open(store, wrappers, nobody, clock).await
}

/// A store that is not whole yet, in a directory of its own. Dropped, both are gone.
pub(super) struct Unfinished {
    directory: PathBuf,
    pub(super) path: PathBuf,
    lock: PathBuf,
    // Locked for as long as this is there.
    _held: File,
}

impl Unfinished {
    fn at(parent: &Path, name: &str) -> Result<Self, RestoreFailure> {
        let directory = parent.join(name);
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(place(&directory)(error));
            }
            // What a process left that was killed, or another one's.
            _ => {}
        }
        let (path, lock) = (directory.join("store"), directory.join("lock"));
        let held = File::create(&lock).map_err(place(&lock))?;
        let busy = || place(&directory)(std::io::ErrorKind::ResourceBusy.into());
        rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).map_err(|_| busy())?;
        if !lock.exists() {
            // It ended just now and took the directory with it.
            return Err(busy());
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(place(&path)(error)),
            _ => Ok(Self { directory, path, lock, _held: held }),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.path));
        drop(std::fs::remove_file(&self.lock));
        drop(std::fs::remove_dir(&self.directory));
    }
}

/// The store of a backup, whole and verified, and what is in it.
async fn unpacked(
    config: &Config,
    from: &Path,
    target: &Unfinished,
    wrappers: &[Arc<dyn KeyWrapper>],
    signers: Option<&[VerifyingKey]>,
    clock: Clock,
) -> Result<(Arc<Custody>, BackupView), AppError> {
    let failed = |error| RestoreFailure::File { path: from.to_owned(), error };
    let file = File::open(from).map_err(|error| failed(error.into()))?;
    let backup = Backup::open(BufReader::new(file)).map_err(failed)?;
    let created_at = backup.created_at();
    let bare = backup.root_rows().await.map_err(failed)?;
    let ring = opened(bare, wrappers, clock.clone()).await?.vault().ring();
    // One commit after the other, of many rows each: a journal would only write them twice.
    let options = redb::Options { journal_bytes: 0, ..store::file_options(config) };
    let store = redb::Redb::create(&target.path, options)?;
    let contents = backup.unpack(&ring, &store).await.map_err(failed)?;
    drop(store);
    store::closed_at(&target.path).await;
    let store: Arc<dyn Store> = Arc::new(redb::Redb::open(&target.path, options)?);
    let custody = opened(store, wrappers, clock).await?;
    let report = custody.vault().verify(true, |_| {}).await?;
    if let Some(finding) = foreign(&report) {
        return Err(RestoreFailure::Records { path: from.to_owned(), finding }.into());
    }
    if let Some(signers) = signers {
        let log = audit::verify_store(custody.vault(), signers, &[]).await?;
        if !log.ok() || log.checkpoints == 0 {
            return Err(RestoreFailure::Unproven(from.to_owned()).into());
        }
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
pub(super) fn foreign(report: &VerifyReport) -> Option<String> {
    let foreign = report.foreign_rows || report.foreign_log;
    foreign.then(|| report.findings.first().cloned().unwrap_or_default())
}
