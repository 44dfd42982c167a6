//! Makes what a node needs before it first serves: directories, keys, certificates, a configuration.
//!
//! Every step looks at what is there and makes only what is missing, whole or not at all, so that
//! a crash anywhere leaves something that the next run completes.

pub mod dev;
mod leaf;
pub mod profile;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::config::ConfigErrors;
use crate::pki::{self, PkiError};

/// Why something was not made. Names files and remedies, never contents.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// A file or directory cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory holds something else.
    #[error("{} holds something else; name another directory with --dir", .0.display())]
    Foreign(PathBuf),
    /// Somebody else's directory.
    #[error("{} belongs to another user (uid {owner}); name another directory with --dir", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Another process is at it.
    #[error("{} is in use by another process; stop it, or name another directory with --dir", .0.display())]
    InUse(PathBuf),
    /// The store is there and the key that opens it is not.
    #[error(
        "{} is missing and {} cannot be opened without it; put it back, or remove the directory to \
         start anew", key.display(), store.display()
    )]
    MasterKeyLost {
        /// Where the key should be.
        key: PathBuf,
        /// The store.
        store: PathBuf,
    },
    /// A certificate was not made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A master key was not made.
    #[error("{0}")]
    Random(#[from] polykey_hsm::CryptoFailure),
    /// The configuration is not as it must be.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The caller broke off.
    #[error("broken off before: {0}")]
    BrokenOff(&'static str),
}

impl SetupError {
    fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::File { path, source }
    }
}

/// Told before each step that makes something; an error breaks the setup off there.
pub type Step<'a> = &'a mut (dyn FnMut(&'static str) -> Result<(), SetupError> + Send);

/// Goes through with every step.
///
/// # Errors
/// None.
pub fn every_step(_: &'static str) -> Result<(), SetupError> {
    Ok(())
}

/// Makes a directory of mode 0700, parents included, or closes one that is ours and open to others.
///
/// # Errors
/// [`SetupError::File`], or [`SetupError::Owner`] for one that belongs to somebody else.
pub fn private_directory(path: &Path) -> Result<(), SetupError> {
    let failed = || SetupError::file(path);
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed())?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed())
        }
        Err(error) => Err(failed()(error)),
        Ok(found) if !found.is_dir() => {
            Err(failed()(io::Error::new(io::ErrorKind::NotADirectory, "not a directory")))
        }
        Ok(found) if found.uid() != rustix::process::geteuid().as_raw() => {
            Err(SetupError::Owner { path: path.to_owned(), owner: found.uid() })
        }
        Ok(found) if found.mode() & 0o077 != 0 => {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed())
        }
        Ok(_) => Ok(()),
    }
}

/// Takes the lock file `path`, made if need be, for as long as the result lives.
///
/// # Errors
/// [`SetupError::InUse`] if another process has it.
pub fn lock(path: &Path) -> Result<File, SetupError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(SetupError::file(path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Err(SetupError::InUse(path.parent().unwrap_or(path).to_owned()))
        }
        Err(error) => Err(SetupError::file(path)(error.into())),
    }
}

/// Makes a master key in `path`, mode 0600. Never replaces one.
///
/// # Errors
/// [`SetupError::File`], among others if there is a file already.
pub fn master_key(path: &Path) -> Result<(), SetupError> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(SetupError::file(path)(io::ErrorKind::AlreadyExists.into()));
    }
    let text = polykey_hsm::generate_master_key()?;
    Ok(pki::write_file(path, text.as_bytes(), 0o600)?)
}

/// Removes a file that may be there.
fn remove(path: &Path) -> Result<(), SetupError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SetupError::file(path)(error)),
        _ => Ok(()),
    }
}
