//! The epoch under which this node writes to a database, kept beside it: a node that was fenced stays so when
//! it is started again.

use std::path::{Path, PathBuf};

use polykey_storage::Store;
use polykey_storage::postgres::Postgres;

use super::AppError;
use crate::pki;

/// The file in the data directory.
const FILE: &str = "database-epoch";

/// Where the epoch is written.
pub(super) fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

/// What is written there: of which store, and the epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pin {
    store: String,
    pub(super) epoch: u64,
}

impl Pin {
    fn parse(text: &str) -> Option<Self> {
        let (store, epoch) = text.trim().split_once(' ')?;
        Some(Self { store: store.to_owned(), epoch: epoch.parse().ok()? })
    }

    /// What was written, if anything was.
    pub(super) fn read(directory: &Path) -> Result<Option<Self>, AppError> {
        let path = path(directory);
        let failed = |source| AppError::Unreadable { path: path.clone(), source };
        match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(error)),
            Ok(text) => match Self::parse(&text) {
                Some(pin) => Ok(Some(pin)),
                None => {
                    let what = "not an epoch: remove it if this node is to write";
                    Err(failed(std::io::Error::new(std::io::ErrorKind::InvalidData, what)))
                }
            },
        }
    }

    /// Writes down the epoch of a store that was opened without one, and refuses one of another store.
    pub(super) fn settle(
        pin: Option<Self>,
        directory: &Path,
        store: &Postgres,
    ) -> Result<(), AppError> {
        let id = data_encoding::HEXLOWER.encode(&store.status().id);
        let path = path(directory);
        match pin {
            Some(pin) if pin.store == id => Ok(()),
            Some(_) => {
                let what =
                    "the epoch of another store: remove it if this node is to serve this one";
                let source = std::io::Error::new(std::io::ErrorKind::InvalidData, what);
                Err(AppError::Unreadable { path, source })
            }
            None => {
                let text = format!("{id} {}\n", store.epoch());
                let failed = |source| AppError::Unreadable { path: directory.to_owned(), source };
                std::fs::create_dir_all(directory).map_err(failed)?;
                Ok(pki::write_file(&path, text.as_bytes(), 0o600)?)
            }
        }
    }
}
