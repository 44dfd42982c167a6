//! An anchor beside the replica of a store, in the database that it is shipped to.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use polykey_storage::{Notes, OpenError, ReadError, StoreError};

/// The name of the note.
const NAME: &str = "anchor";

/// Opens the database.
pub type Open = Box<dyn Fn() -> Result<Box<dyn Notes>, OpenError> + Send + Sync>;

/// The database. Not that of the shipping: whether the anchor is written does not depend on how far that is.
#[derive(Clone)]
pub struct Target(Arc<Inner>);

struct Inner {
    name: String,
    open: Open,
    opened: Mutex<Option<Box<dyn Notes>>>,
}

impl Target {
    /// One that is opened when it is first asked, and again after a failure.
    #[must_use]
    pub fn new(name: String, open: Open) -> Self {
        Self(Arc::new(Inner { name, open, opened: Mutex::new(None) }))
    }

    pub(super) fn read(&self) -> io::Result<Option<String>> {
        self.with(|notes| futures::executor::block_on(notes.note(NAME)))
    }

    pub(super) fn replace(&self, text: &str) -> io::Result<()> {
        self.with(|notes| futures::executor::block_on(notes.put_note(NAME, text)))
    }

    fn with<T>(&self, work: impl Fn(&dyn Notes) -> Result<T, ReadError>) -> io::Result<T> {
        let mut opened = self.0.opened.lock();
        if let Some(notes) = opened.as_deref() {
            // It may have been away meanwhile, and be back.
            match work(notes) {
                Ok(done) => return Ok(done),
                Err(_) => *opened = None,
            }
        }
        let notes = (self.0.open)().map_err(unopened)?;
        let done = work(notes.as_ref()).map_err(failed)?;
        *opened = Some(notes);
        Ok(done)
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.name)
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("name", &self.0.name).finish_non_exhaustive()
    }
}

/// What another version, a right or a setting has to mend is not what another try may find.
fn of_database(error: &StoreError, said: String) -> io::Error {
    let away = matches!(error, StoreError::Unreachable(_) | StoreError::Contended(_));
    io::Error::new(if away { io::ErrorKind::NotConnected } else { io::ErrorKind::Other }, said)
}

fn unopened(error: OpenError) -> io::Error {
    match &error {
        OpenError::Store { error: why, .. } => of_database(why, error.to_string()),
        _ => io::Error::other(error.to_string()),
    }
}

fn failed(error: ReadError) -> io::Error {
    match &error {
        ReadError::Store(why) => of_database(why, error.to_string()),
        _ => io::Error::new(io::ErrorKind::NotConnected, error.to_string()),
    }
}
