//! Files that hold a redb store: how they come to be, and what is checked before they are opened.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use ::redb::{Builder, WriteTransaction};
use rustix::fs::{Advice, FlockOperation, fadvise, flock};

use super::{Options, begin_write, failure::Failure, identify, initialise, open_error};
use crate::{OpenError, StoreError};

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
pub(super) fn check(path: &Path) -> Result<(), OpenError> {
    let not_a_store = |reason: &str| super::not_a_store(path, reason);
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => Err(not_a_store("it is not a regular file")),
        Ok(found) if found.len() == 0 => Err(not_a_store("it is empty")),
        Ok(_) => match starts_like_redb(path) {
            Ok(true) => Ok(()),
            Ok(false) => Err(not_a_store("it does not start as a redb file does")),
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

/// Creates an empty store, lets `fill` write to it, and gives it its name when it is durable.
///
/// redb's own creation is not atomic: a crash in the middle of it leaves a file that never opens
/// again. Hence a temporary file, synced, renamed, and the directory synced.
pub(super) fn create(
    path: &Path,
    options: Options,
    fill: impl FnOnce(&WriteTransaction) -> Result<(), Failure>,
) -> Result<(), OpenError> {
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
        fill(&transaction)?;
        transaction.commit()?;
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
        return Err(super::not_a_store(path, "it is a directory"));
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
