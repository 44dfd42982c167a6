//! How a store is opened, brought up to date, and closed.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ::redb::{Builder, Database, Durability, ReadableDatabase, StorageError, WriteTransaction};

use super::{
    CHANGES, FORMAT, META, META_FORMAT, META_ID, META_JOURNAL, META_REVISION, Redb, apart,
    failure::{Failed, Failure},
    file, journal, upgrade,
};
use crate::{OpenError, Revision, StoreError, memory};

impl Redb {
    pub(super) fn reopen_now(&self) -> Result<Revision, OpenError> {
        let mut journal = self.writer.lock();
        // What holds the file now lets go of it with the process only.
        let given_up = Failure::given_up().error;
        if self.known.lock().failure.as_ref() == Some(&given_up) {
            return Err(self.open_failed(given_up));
        }
        *journal = None;
        let mut slot = self.database.write();
        let again = {
            let mut known = self.known.lock();
            known.failure.get_or_insert_with(|| {
                StoreError::Other("the store has not been opened again yet".into())
            });
            // Snapshots of the generation before no longer speak for this store.
            known.generation = known.generation.saturating_add(1);
            known.generation > 1
        };
        if let Some(database) = slot.take() {
            close(database);
        }
        if self.on_file {
            file::check(&self.path)?;
            // A process before this one may have died of a sync that failed.
            file::forget_cached(&self.path).map_err(|error| self.open_failed(error.into()))?;
        }
        let (database, found) = self.open_database()?;
        let mut known = self.known.lock();
        if let Some(loss) = known.loss(&found).filter(|_| again) {
            close(database);
            return Err(self.open_failed(StoreError::Damaged(loss)));
        }
        *slot = Some(database);
        known.id = found.id;
        known.revision = found.revision;
        known.rows = found.rows;
        known.failure = None;
        Ok(found.revision)
    }

    fn open_database(&self) -> Result<(Database, file::Identity), OpenError> {
        let mut builder = Builder::new();
        builder.set_cache_size(self.options.cache_bytes);
        // redb asserts on some files it has not written.
        let opened = catch_unwind(AssertUnwindSafe(|| (self.opener)(&builder)));
        let database = match opened {
            Ok(Ok(database)) => database,
            Ok(Err(error)) => return Err(file::open_error(&self.path, error)),
            Err(_) => return Err(file::not_a_store(&self.path, "its pages make no sense")),
        };
        let identified = catch_unwind(AssertUnwindSafe(|| {
            if !self.on_file {
                initialise_if_empty(&database).map_err(|error| self.open_failed(error))?;
            }
            let found = file::identify(&self.path, &database)?;
            let upgraded = upgrade::run(&database, found.format)
                .map_err(|failure| self.open_failed(failure.error))?;
            let recovered = self
                .recover(&database, &found)
                .map_err(|failure| self.open_failed(failure.error))?;
            if upgraded || recovered { file::identify(&self.path, &database) } else { Ok(found) }
        }))
        .unwrap_or_else(|_| Err(file::not_a_store(&self.path, "its pages make no sense")));
        match identified {
            Ok(found) => Ok((database, found)),
            Err(error) => {
                close(database);
                Err(error)
            }
        }
    }

    // Commits what only the journal has; whether there was anything.
    fn recover(&self, database: &Database, found: &file::Identity) -> Result<bool, Failure> {
        let (Some(salt), Some(open)) = (found.journal, &self.journal_opener) else {
            return Ok(false);
        };
        let Some(medium) = open(false).map_err(StorageError::from)? else {
            let journal = journal::path_of(&self.path);
            return Err(Failure::damaged(format!(
                "its journal {} is missing, and with it what was acknowledged after {}; put it \
                 back, or restore a backup",
                journal.display(),
                found.revision
            )));
        };
        let entries = match journal::entries(&*medium.backend, &salt, found.revision) {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Err(Failure::damaged(error.to_string()));
            }
            read => read.map_err(StorageError::from)?,
        };
        let mut before = found.revision;
        let transaction = begin_write(database)?;
        for journal::Entry { revision, writes } in entries {
            let filled =
                self.fill(&transaction, (before, revision), writes.into_iter(), |_| Ok(vec![]));
            match filled {
                Ok(_) => before = revision,
                Err(Failed::Before(failure) | Failed::During(failure)) => return Err(failure),
                Err(other) => return Err(Failure::damaged(format!("its journal: {other:?}"))),
            }
        }
        transaction.open_table(META)?.remove(META_JOURNAL)?;
        commit(transaction)?;
        if self.on_file {
            journal::remove_file(&self.path).map_err(StorageError::from)?;
        }
        Ok(true)
    }

    // Has the database hold everything by itself, so that the journal is of no more use.
    fn retire_journal(&self, database: &Database) -> Result<(), Failure> {
        let transaction = begin_write(database)?;
        transaction.open_table(META)?.remove(META_JOURNAL)?;
        commit(transaction)?;
        if self.on_file {
            journal::remove_file(&self.path).map_err(StorageError::from)?;
        }
        Ok(())
    }

    fn open_failed(&self, error: StoreError) -> OpenError {
        OpenError::Store { path: self.path.clone(), error }
    }
}

impl Drop for Redb {
    fn drop(&mut self) {
        let Some(database) = self.database.get_mut().take() else { return };
        if self.writer.get_mut().take().is_some() && self.known.lock().failure.is_none() {
            // If this fails, the journal stays and counts.
            drop(catch_unwind(AssertUnwindSafe(|| self.retire_journal(&database))));
        }
        close(database);
    }
}

// Closes without a panic, which dropping does not promise for a damaged file. A failure says
// nothing new: recovery follows with the next opening.
fn close(database: Database) {
    drop(apart::run(move || database.close()));
}

/// Makes `transaction` durable, with all before it.
pub(super) fn commit(transaction: WriteTransaction) -> Result<(), Failure> {
    match apart::run(move || transaction.commit()) {
        Ok(Ok(committed)) => Ok(committed?),
        Ok(Err(apart::GivenUp)) => Err(Failure::given_up()),
        Err(no_thread) => Err(Failure::latching(no_thread.into())),
    }
}

pub(super) fn begin_write(database: &Database) -> Result<WriteTransaction, Failure> {
    let mut transaction = database.begin_write()?;
    transaction
        .set_durability(Durability::Immediate)
        .map_err(|error| Failure::latching(StoreError::Other(error.to_string())))?;
    transaction.set_quick_repair(true);
    Ok(transaction)
}

// Makes an empty database a store at revision 0.
fn initialise_if_empty(database: &Database) -> Result<(), StoreError> {
    let initialise = || -> Result<(), Failure> {
        if database.begin_read()?.list_tables()?.next().is_some() {
            return Ok(());
        }
        let transaction = begin_write(database)?;
        initialise(&transaction)?;
        commit(transaction)?;
        Ok(())
    };
    initialise().map_err(|failure| failure.error)
}

pub(super) fn initialise(transaction: &WriteTransaction) -> Result<(), Failure> {
    transaction.open_table(CHANGES)?;
    let mut meta = transaction.open_table(META)?;
    let id = memory::random_id().map_err(Failure::latching)?;
    meta.insert(META_FORMAT, FORMAT.to_be_bytes().as_slice())?;
    meta.insert(META_ID, id.as_slice())?;
    meta.insert(META_REVISION, 0_u64.to_be_bytes().as_slice())?;
    Ok(())
}
