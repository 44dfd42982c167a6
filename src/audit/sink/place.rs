//! How far a sink has come.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use data_encoding::BASE64;
use serde::{Deserialize, Serialize};

use crate::anchor::file;
use crate::vault::tree::Hash;

/// A place in the log: what comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cursor {
    /// The next leaf.
    pub(super) leaf: u64,
    /// The size of the last checkpoint before.
    pub(super) checkpoint: u64,
}

/// The file that is being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Current {
    /// Where it begins.
    pub(super) first: Cursor,
    /// Its bytes.
    pub(super) size: u64,
    pub(super) inode: u64,
}

/// How far a sink has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// The name of the log.
    pub(super) log: String,
    pub(super) next: Cursor,
    /// The hash of the leaf before `next`, in base64; empty where it is not known.
    last: String,
    /// Of a file.
    #[serde(default)]
    pub(super) current: Current,
}

impl Place {
    /// The beginning of a log.
    pub(super) fn new(log: String) -> Self {
        Self { log, next: Cursor::default(), last: String::new(), current: Current::default() }
    }

    /// The hash of the leaf before `next`.
    pub(super) fn last(&self) -> Option<Hash> {
        BASE64.decode(self.last.as_bytes()).ok()?.try_into().ok()
    }

    /// Goes on to `next`; `last` is the hash of the leaf before it, if that is another one.
    pub(super) fn advance(&mut self, next: Cursor, last: Option<Hash>) {
        self.next = next;
        if let Some(last) = last {
            self.last = BASE64.encode(&last);
        }
    }

    /// Goes back to where the current file begins.
    pub(super) fn rewind(&mut self) {
        if self.next != self.current.first {
            self.next = self.current.first;
            self.last = String::new();
        }
    }

    /// What was saved, if anything was.
    pub(super) fn load(path: &Path) -> io::Result<Option<Self>> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text?,
        };
        serde_json::from_str(&text).map(Some).map_err(|error| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{error}; to copy the log anew, delete it"),
            )
        })
    }

    /// Saves it, durable when this returns.
    pub(super) fn save(&self, path: &Path) -> Result<(), String> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let made = match std::fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        let text = serde_json::to_string(self).map_err(io::Error::from);
        made.and(text).and_then(|text| file::replace(path, &text)).map_err(|error| {
            format!("how far it has come cannot be kept in {}: {error}", path.display())
        })
    }
}
