//! Files that hold a redb store: how they come to be, and what is checked before they are opened.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ::redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTableMetadata, StorageError,
    TableError, TableHandle,
};
use rustix::fs::{Advice, FlockOperation, fadvise, flock};

use super::{
    CHANGES, FORMAT, META, META_FORMAT, META_ID, META_JOURNAL, META_REVISION, Options, TABLES,
    encode,
    failure::Failure,
    journal::Salt,
    opening::{begin_write, commit, initialise},
    table,
};
use crate::{OpenError, Revision, StoreError};

/// The first bytes of every redb file, from redb's design document.
const MAGIC: &[u8] = b"redb\x1a\x0a\xa9\x0d\x0a";

/// What [`super::Redb::compact`] achieved. Sizes of the file in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Before.
    pub before: u64,
    /// Afterwards.
    pub after: u64,
}

impl super::Redb {
    /// Gives the free space of the file `path` back to the file system. The store must not be
    /// open; a crash meanwhile loses nothing.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn compact(path: impl AsRef<Path>, options: Options) -> Result<Compacted, OpenError> {
        let path = path.as_ref();
        let failed = |error: StoreError| OpenError::Store { path: path.to_path_buf(), error };
        let size = || Ok(fs::metadata(path).map_err(|e| failed(e.into()))?.len());
        check(path)?;
        let before = size()?;
        // In the newest format, and with what a crash left in the journal.
        drop(Self::open(path, options)?);
        let mut database = Builder::new()
            .set_cache_size(options.cache_bytes)
            .open(path)
            .map_err(|error| open_error(path, error))?;
        identify(path, &database)?;
        database.compact().map_err(|error| failed(StoreError::Other(error.to_string())))?;
        database.close().map_err(|error| open_error(path, error))?;
        Ok(Compacted { before, after: size()? })
    }
}

/// Refuses what redb would only refuse obscurely, or take for an empty database.
///
/// A symbolic link is refused and not followed: the journal stands beside the name that the store is
/// opened by, so that a store with two names would have two journals. Directories on the way may be
/// links: they hold both.
pub(super) fn check(path: &Path) -> Result<(), OpenError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => Err(not_a_store(
            path,
            "it is a symbolic link, and the journal stands beside the file itself; name the file \
             that it leads to, and move a journal from beside the link to beside that file",
        )),
        Ok(found) if !found.is_file() => Err(not_a_store(path, "it is not a regular file")),
        Ok(found) if found.len() == 0 => Err(not_a_store(path, "it is empty")),
        Ok(_) => match starts_like_redb(path) {
            Ok(true) => Ok(()),
            Ok(false) => Err(not_a_store(path, "it does not start as a redb file does")),
            Err(error) => Err(OpenError::Store { path: path.to_path_buf(), error: error.into() }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(OpenError::NotFound { path: path.to_path_buf() })
        }
        Err(error) => Err(OpenError::Store { path: path.to_path_buf(), error: error.into() }),
    }
}

/// Has the next reads of the file come from the disk.
///
/// After a sync that failed, the page cache may go on showing what never reached the disk: the
/// store would build on a state that the next power cut takes away.
pub(super) fn forget_cached(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

fn starts_like_redb(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?
        .take(u64::try_from(MAGIC.len()).unwrap_or(u64::MAX))
        .read_to_end(&mut start)?;
    Ok(start == MAGIC)
}

/// Creates an empty store, and gives it its name when it is durable.
///
/// redb's own creation is not atomic: a crash in the middle of it leaves a file that never opens
/// again. Hence a temporary file, synced, renamed, and the directory synced.
pub(super) fn create(path: &Path, options: Options) -> Result<(), OpenError> {
    let failed = |error: StoreError| OpenError::Store { path: path.to_path_buf(), error };
    let io_failed = |error: io::Error| failed(error.into());
    let (directory, temporary) = places(path)?;
    let directory = File::open(directory).map_err(io_failed)?;
    // Two creators in one directory would share the temporary file. Released with the descriptor.
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(OpenError::InUse { path: path.to_path_buf() });
        }
        Err(error) => return Err(io_failed(error.into())),
    }
    if fs::symlink_metadata(path).is_ok() {
        return Err(OpenError::Exists { path: path.to_path_buf() });
    }
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_failed(error)),
        _ => {}
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_failed)?;
    let database = Builder::new()
        .set_cache_size(options.cache_bytes)
        .create(&temporary)
        .map_err(|error| open_error(&temporary, error))?;
    let filled = || -> Result<(), Failure> {
        let transaction = begin_write(&database)?;
        initialise(&transaction)?;
        commit(transaction)?;
        Ok(())
    };
    filled().map_err(|failure| failed(failure.error))?;
    database.close().map_err(|error| open_error(&temporary, error))?;
    file.sync_all().map_err(io_failed)?;
    fs::rename(&temporary, path).map_err(io_failed)?;
    directory.sync_all().map_err(io_failed)
}

// The directory of `path`, and the temporary file in it.
fn places(path: &Path) -> Result<(PathBuf, PathBuf), OpenError> {
    let Some(name) = path.file_name() else {
        return Err(not_a_store(path, "it is a directory"));
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    let temporary = directory.join(temporary);
    Ok((directory, temporary))
}

/// What a file says about itself.
pub(super) struct Identity {
    pub(super) format: u32,
    pub(super) id: [u8; 16],
    /// The salt of the journal, if one is in force.
    pub(super) journal: Option<Salt>,
    pub(super) revision: Revision,
    pub(super) rows: u64,
}

/// Tells a store of this format from anything else.
pub(super) fn identify(path: &Path, database: &Database) -> Result<Identity, OpenError> {
    let read = || -> Result<Result<Identity, OpenError>, Failure> {
        let refuse = |reason| Ok(Err(not_a_store(path, reason)));
        let transaction = database.begin_read()?;
        let meta = match transaction.open_table(META) {
            Ok(meta) => meta,
            Err(TableError::Storage(error)) => return Err(error.into()),
            Err(_) => return refuse("it is a redb database of another program"),
        };
        let format = match encode::format_of(meta.get(META_FORMAT)?) {
            Some(found @ 1..=FORMAT) => found,
            Some(found) if found > FORMAT => {
                return Ok(Err(OpenError::NewerFormat {
                    path: path.to_path_buf(),
                    found,
                    supported: FORMAT,
                }));
            }
            _ => return refuse("it has no format version that ever was"),
        };
        let Some(id) = encode::id_of(meta.get(META_ID)?) else {
            return refuse("it has no id");
        };
        transaction.open_table(CHANGES)?;
        let mut rows = 0_u64;
        for of_space in transaction.list_tables()? {
            if of_space.name().starts_with(TABLES) {
                let stored = transaction.open_table(table(of_space.name()))?.len()?;
                rows = rows.saturating_add(stored);
            }
        }
        let revision = encode::revision_of(meta.get(META_REVISION)?)?;
        let journal = encode::id_of(meta.get(META_JOURNAL)?);
        Ok(Ok(Identity { format, id, journal, revision, rows }))
    };
    read().unwrap_or_else(|failure| {
        Err(OpenError::Store { path: path.to_path_buf(), error: failure.error })
    })
}

pub(super) fn not_a_store(path: &Path, reason: &str) -> OpenError {
    OpenError::NotAStore { path: path.to_path_buf(), reason: reason.into() }
}

pub(super) fn open_error(path: &Path, error: DatabaseError) -> OpenError {
    let path = path.to_path_buf();
    match error {
        DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
            OpenError::InUse { path }
        }
        DatabaseError::UpgradeRequired(version) => OpenError::NotAStore {
            path,
            reason: format!("its redb file format is version {version}"),
        },
        DatabaseError::Storage(StorageError::Io(error))
            if error.kind() == io::ErrorKind::InvalidData =>
        {
            OpenError::NotAStore { path, reason: error.to_string() }
        }
        other => OpenError::Store { path, error: Failure::from(other).error },
    }
}
