//! The default store: one redb file, one group at a time, one transaction and one sync per group.
//!
//! A table for each space, `rows/XX`, maps a key to the revision (8 bytes, big endian) and the
//! value: tables that grow at their end stay packed. `changes` maps a revision to the rows it wrote;
//! `meta` holds the format version, the store's id, the last revision and the salt of the journal.
//!
//! A group is made durable in the [`journal`] beside the file, and taken by redb in memory. Only the
//! group for which the journal has no room is committed durably by redb, with all before it. That
//! commit has redb's quick repair: it syncs twice and saves the allocator state, and in return a
//! store opens in milliseconds after a crash, whatever its size, but for the few groups of the
//! journal, which are then committed once more. While a store is closed it is one file.

mod apart;
mod encode;
mod failure;
mod file;
mod journal;
mod opening;
mod snapshot;
mod upgrade;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use ::redb::{
    Builder, Database, DatabaseError, Durability, ReadableTable, StorageBackend, StorageError,
    Table, TableDefinition, WriteTransaction,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::{Mutex, RwLock};

use self::{
    failure::{Failed, Failure, Latch},
    journal::{Journal, Medium, Salt},
    opening::begin_write,
    snapshot::{RedbSnapshot, View},
};
use crate::{
    Applied, Changes, ChangesError, Commit, CommitError, Committed, Entry, Finish, Health,
    OpenError, ReadError, ReopenError, Replaced, Revision, RowKey, Snapshot, Space, Store,
    StoreError, StoreStatus, Write, commit, memory,
};

pub use file::Compacted;
pub use journal::path_of as journal_path;

/// The version of the tables and their encoding that this program writes, and the newest it
/// reads.
pub const FORMAT: u32 = 2;

/// The largest number of old revisions a commit removes from `changes`, so that a retention
/// lowered by the operator makes no commit slow.
const TRIM_STEP: usize = 16;

const CHANGES: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("changes");
const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");

const META_FORMAT: &str = "format";
const META_ID: &str = "id";
const META_REVISION: &str = "revision";
const META_JOURNAL: &str = "journal";

// The table of a space, by its name.
fn table(name: &str) -> TableDefinition<'_, &'static [u8], &'static [u8]> {
    TableDefinition::new(name)
}

fn table_name(space: Space) -> String {
    format!("{TABLES}{:02x}", space.0)
}

const TABLES: &str = "rows/";

/// How a store is opened. None of it is part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The most memory for cached pages, in bytes. Default 32 MiB.
    pub cache_bytes: usize,
    /// How many revisions [`Store::changes`] goes back. Default 100,000.
    pub changes: u64,
    /// The size at which the journal is emptied into the file, in bytes: the more, the less is
    /// written in all, and the longer an opening after a crash takes. Default 4 MiB. With 0 there is
    /// none, and each group is written into the file at once.
    pub journal_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 32 * 1024 * 1024,
            changes: memory::DEFAULT_CHANGES,
            journal_bytes: 4 * 1024 * 1024,
        }
    }
}

type Opener = Box<dyn Fn(&Builder) -> Result<Database, DatabaseError> + Send + Sync>;
// Opens the journal, or creates it if asked to.
type JournalOpener = Box<dyn Fn(bool) -> std::io::Result<Option<Medium>> + Send + Sync>;

/// A store in one file, or on any other [`StorageBackend`].
///
/// Reopening refuses a medium on which an acknowledged revision is gone.
///
/// After a failure of the medium it serves nothing until [`Store::reopen`] succeeds: what redb
/// holds in memory may then differ from what is durable. Snapshots taken before may still answer,
/// from the revision they were taken at. That the journal has lost its name while the store was open
/// is such a failure, too: the next group finds it out, and goes into the file with all before it.
///
/// The file is named by a path that is no symbolic link, because the journal stands beside the name.
pub struct Redb {
    // The file, or what stands for it in messages.
    path: PathBuf,
    on_file: bool,
    options: Options,
    opener: Opener,
    // None where no journal is kept.
    journal_opener: Option<JournalOpener>,
    // One group at a time, and no reopening meanwhile. Taken before the other locks. Holds the
    // journal once it is in force.
    writer: Mutex<Option<Journal>>,
    // None after a reopening that failed.
    database: RwLock<Option<Database>>,
    known: Arc<Mutex<Known>>,
}

// What is known without asking the medium.
struct Known {
    id: [u8; 16],
    revision: Revision,
    rows: u64,
    generation: u64,
    failure: Option<StoreError>,
}

impl Known {
    // What was acknowledged and is no longer there.
    fn loss(&self, found: &file::Identity) -> Option<String> {
        if found.id != self.id {
            Some("another store stands in its place".into())
        } else if found.revision < self.revision {
            let (found, last) = (found.revision, self.revision);
            Some(format!("it is back at revision {found}, and {last} was acknowledged"))
        } else {
            None
        }
    }
}

impl fmt::Debug for Redb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redb").field("path", &self.path).finish()
    }
}

impl Redb {
    /// Creates the file `path`, mode 0600, with an empty store in it, and opens it.
    ///
    /// It appears under its name only when it is complete and durable, so that a crash at any
    /// point leaves either no store or an empty one.
    ///
    /// # Errors
    /// [`OpenError::Exists`] if there is anything at `path`.
    pub fn create(path: impl AsRef<Path>, options: Options) -> Result<Self, OpenError> {
        file::create(path.as_ref(), options)?;
        Self::open(path, options)
    }

    /// Opens the store in the file `path`, which must not be a symbolic link.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self, OpenError> {
        let path = path.as_ref().to_path_buf();
        let opener: Opener = {
            let path = path.clone();
            Box::new(move |builder| builder.open(&path))
        };
        let journal: JournalOpener = {
            let path = path.clone();
            Box::new(move |create| journal::open_file(&path, create))
        };
        Self::start(path, true, options, opener, Some(journal))
    }

    /// Opens the store in the file `path`, which is created if there is nothing there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_or_create(path: impl AsRef<Path>, options: Options) -> Result<Self, OpenError> {
        match Self::open(&path, options) {
            Err(OpenError::NotFound { .. }) => match Self::create(&path, options) {
                // Someone else was faster.
                Err(OpenError::Exists { .. }) => Self::open(&path, options),
                other => other,
            },
            other => other,
        }
    }

    /// Opens the store on the medium that `backend` hands out, once now and once for every
    /// reopening, and creates an empty one in an empty medium. For simulations: a medium that
    /// fails during this creation may be left unreadable, against which [`Redb::create`] guards.
    /// There is no journal.
    ///
    /// # Errors
    /// [`OpenError`], with `name` for a path.
    pub fn with_backend<B: StorageBackend>(
        name: &str,
        options: Options,
        backend: impl Fn() -> B + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        let opener: Opener = Box::new(move |builder| builder.create_with_backend(backend()));
        Self::start(PathBuf::from(name), false, options, opener, None)
    }

    /// As [`Self::with_backend`], with a journal on the medium that `journal` hands out.
    ///
    /// # Errors
    /// [`OpenError`], with `name` for a path.
    pub fn with_journal<B: StorageBackend, J: StorageBackend>(
        name: &str,
        options: Options,
        backend: impl Fn() -> B + Send + Sync + 'static,
        journal: impl Fn() -> J + Send + Sync + 'static,
    ) -> Result<Self, OpenError> {
        let opener: Opener = Box::new(move |builder| builder.create_with_backend(backend()));
        let journal: JournalOpener =
            Box::new(move |_| Ok(Some(Medium { backend: Box::new(journal()), name: None })));
        Self::start(PathBuf::from(name), false, options, opener, Some(journal))
    }

    fn start(
        path: PathBuf,
        on_file: bool,
        options: Options,
        opener: Opener,
        journal_opener: Option<JournalOpener>,
    ) -> Result<Self, OpenError> {
        let store = Self {
            path,
            on_file,
            options,
            opener,
            journal_opener,
            writer: Mutex::new(None),
            database: RwLock::new(None),
            known: Arc::new(Mutex::new(Known {
                id: [0; 16],
                revision: Revision::EMPTY,
                rows: 0,
                generation: 0,
                failure: None,
            })),
        };
        store.reopen_now()?;
        Ok(store)
    }

    // The last durable revision, unless nothing is served.
    fn serving(&self) -> Option<Revision> {
        let known = self.known.lock();
        known.failure.is_none().then_some(known.revision)
    }

    // What is read under one revision, and where failures of that are reported.
    fn view(&self) -> Result<(View, Latch), ReadError> {
        let database = self.database.read();
        let generation = {
            let known = self.known.lock();
            if known.failure.is_some() {
                return Err(ReadError::NeedsReopen);
            }
            known.generation
        };
        let latch = Latch { known: Arc::clone(&self.known), generation };
        let database = database.as_ref().ok_or(ReadError::NeedsReopen)?;
        let view = latch.read(|| View::new(database))?;
        Ok((view, latch))
    }

    fn begin(&self) -> Result<RedbSnapshot, ReadError> {
        let (view, latch) = self.view()?;
        let revision = latch.read(|| view.revision())?;
        Ok(RedbSnapshot { view, revision, latch })
    }

    fn commit_now(
        &self,
        group: Vec<Commit>,
        finish: &mut dyn Finish,
    ) -> Result<Committed, CommitError> {
        commit::check_group(&group)?;
        let mut journal = self.writer.lock();
        let database = self.database.read();
        let (Some(database), Some(before)) = (database.as_ref(), self.serving()) else {
            return Err(CommitError::ReadOnly);
        };
        // A panic in redb or in `finish` leaves behind what only opening again can sort out.
        let result = catch_unwind(AssertUnwindSafe(|| {
            self.commit_on((database, &mut journal), before, group, finish)
        }))
        .unwrap_or_else(|_| Err(Failed::During(Failure::panicked())));

        let mut known = self.known.lock();
        match result {
            Ok((committed, rows)) => {
                known.revision = committed.revision;
                known.rows = known.rows.saturating_add_signed(rows);
                Ok(committed)
            }
            Err(Failed::Aborted(abort)) => Err(CommitError::Aborted(abort)),
            Err(Failed::TooLarge(error)) => Err(CommitError::TooLarge(error)),
            Err(Failed::Before(failure)) => {
                if failure.needs_reopen {
                    known.failure = Some(failure.error.clone());
                }
                Err(CommitError::Store(failure.error))
            }
            Err(Failed::During(failure)) => {
                known.failure = Some(failure.error.clone());
                Err(CommitError::OutcomeUnknown(failure.error))
            }
        }
    }

    // What came of a group, and how many rows there are more (or less).
    fn commit_on(
        &self,
        (database, journal): (&Database, &mut Option<Journal>),
        before: Revision,
        group: Vec<Commit>,
        finish: &mut dyn Finish,
    ) -> Result<(Committed, i64), Failed> {
        let admitted = if group.iter().all(|commit| commit.requires.is_empty()) {
            commit::admit::<Failure>(&group, |_| Ok(None))?
        } else {
            let view = View::new(database)?;
            commit::admit(&group, |row| view.revision_of(row.space, &row.key))?
        };
        if admitted.accepted.is_empty() {
            let committed = Committed { revision: before, outcomes: admitted.outcomes };
            return Ok((committed, 0));
        }

        let revision = Revision(before.0.saturating_add(1));
        let beneath = finish.beneath();
        let beneath = match beneath.is_empty() {
            true => Vec::new(),
            false => {
                let view = View::new(database)?;
                let value = |row: &RowKey| {
                    let entry = view.get(row.space, &row.key)?;
                    Ok(entry.map(|entry| entry.value))
                };
                beneath.iter().map(value).collect::<Result<_, Failure>>()?
            }
        };
        let mut transaction = begin_write(database)?;
        let mut accepted = admitted.accepted.iter().copied().peekable();
        let writes = group.into_iter().enumerate().filter_map(|(index, commit)| {
            accepted.next_if_eq(&index).map(|_| commit.writes.into_iter())
        });
        let filled = self.fill(&transaction, (before, revision), writes.flatten(), |replaced| {
            let accepted = &admitted.accepted;
            finish.finish(&Applied { revision, accepted, replaced, beneath: &beneath })
        });
        let filled = filled.and_then(|filled| {
            let kept = self.make_durable(&mut transaction, journal, revision, &filled)?;
            Ok((filled.rows, kept))
        });
        let (rows, kept) = match filled {
            Ok(filled) => filled,
            Err(failed) => {
                // Nothing has been made current, so the database keeps nothing, even if this fails.
                if let Err(error) = transaction.abort() {
                    self.known.lock().failure = Some(Failure::from(error).error);
                }
                return Err(failed);
            }
        };
        let committed = match kept {
            Kept::InJournal => transaction.commit().map_err(Failure::from),
            Kept::Nowhere | Kept::JournalLost(_) => opening::commit(transaction),
        };
        committed.map_err(Failed::During)?;
        if let Kept::JournalLost(why) = kept {
            // The group is durable, and everything before it: its callers hear of no failure.
            let text = format!(
                "{why} while the store was open; nothing is lost, but what was written in between \
                 would have been by a crash. Find out what removes files of the store"
            );
            self.known.lock().failure = Some(StoreError::Other(text));
        }
        Ok((Committed { revision, outcomes: admitted.outcomes }, rows))
    }

    // Appends a group to the journal, so that its transaction need not be durable; or leaves it to
    // the transaction to be so, with all that the journal has had until then.
    fn make_durable(
        &self,
        transaction: &mut WriteTransaction,
        journal: &mut Option<Journal>,
        revision: Revision,
        filled: &Filled,
    ) -> Result<Kept, Failed> {
        let Some(opener) = self.journal_opener.as_ref().filter(|_| self.options.journal_bytes > 0)
        else {
            return Ok(Kept::Nowhere);
        };
        // Once a group: next to the sync of a group it costs nothing.
        let lost = journal.as_ref().map_or(Ok(None), Journal::lost).map_err(StorageError::from)?;
        if let Some(why) = lost {
            transaction.open_table(META)?.remove(META_JOURNAL)?;
            *journal = None;
            return Ok(Kept::JournalLost(why));
        }
        let replaced = filled.replaced.iter().map(|write| (&write.row, write.new.as_ref()));
        let appended = filled.appended.iter().map(|write| (write.row(), write.value()));
        let entry = journal.as_ref().and_then(|j| j.entry(revision, replaced.chain(appended)));
        if let (Some(journal), Some(entry)) = (journal.as_mut(), entry) {
            transaction
                .set_durability(Durability::None)
                .map_err(|error| Failure::latching(StoreError::Other(error.to_string())))?;
            transaction.set_quick_repair(false);
            let appended = journal.append(&entry).map_err(StorageError::from);
            return appended
                .map(|()| Kept::InJournal)
                .map_err(|error| Failed::During(error.into()));
        }
        // The entries up to here count until this transaction is durable: none is overwritten
        // before the next group.
        let salt: Salt = memory::random_id().map_err(Failure::latching)?;
        transaction.open_table(META)?.insert(META_JOURNAL, salt.as_slice())?;
        match journal {
            Some(journal) => journal.restart(salt),
            None => {
                let medium = opener(true).map_err(StorageError::from)?;
                let medium = medium.ok_or_else(|| Failure::damaged("no journal was created"))?;
                let started = Journal::begin(medium, salt, self.options.journal_bytes);
                *journal = Some(started.map_err(StorageError::from)?);
            }
        }
        Ok(Kept::Nowhere)
    }

    // Everything a transaction writes.
    fn fill(
        &self,
        transaction: &WriteTransaction,
        (before, revision): (Revision, Revision),
        writes: impl Iterator<Item = Write>,
        finish: impl FnOnce(&[Replaced]) -> Result<Vec<Write>, crate::Abort>,
    ) -> Result<Filled, Failed> {
        let mut meta = transaction.open_table(META)?;
        if encode::revision_of(meta.get(META_REVISION)?)? != before {
            return Err(Failure::damaged("the last revision is not the expected one").into());
        }
        let mut rows = Rows { transaction, tables: BTreeMap::new(), added: 0 };
        let mut written = BTreeSet::new();
        let mut replaced = Vec::new();
        for write in writes {
            let (row, new) = match write {
                Write::Put { row, value } => (row, Some(value)),
                Write::Delete { row } => (row, None),
            };
            replaced.push(Replaced { row, old: None, new });
        }
        // In the order of the rows, and of the group where it writes one twice: neighbours meet the
        // same pages, and what is appended to a table finds its end.
        let mut in_order: Vec<&mut Replaced> = replaced.iter_mut().collect();
        in_order.sort_by(|a, b| a.row.cmp(&b.row));
        for write in in_order {
            write.old = rows.apply(revision, &write.row, write.new.as_ref())?;
            written.insert(encode::row(&write.row));
        }
        let appended = finish(&replaced).map_err(Failed::Aborted)?;
        commit::writes_size(&appended).map_err(Failed::TooLarge)?;
        for write in &appended {
            rows.apply(revision, write.row(), write.value())?;
            written.insert(encode::row(write.row()));
        }
        meta.insert(META_REVISION, revision.0.to_be_bytes().as_slice())?;

        let mut changes = transaction.open_table(CHANGES)?;
        changes.insert(revision.0, encode::changed(&written).as_slice())?;
        let trim_to = revision.0.saturating_sub(self.options.changes);
        for _ in 0..TRIM_STEP {
            match changes.first()? {
                Some((oldest, _)) if oldest.value() <= trim_to => {}
                _ => break,
            }
            changes.pop_first()?;
        }
        Ok(Filled { replaced, appended, rows: rows.added })
    }

    fn changes_now(&self, after: Revision, limit: usize) -> Result<Changes, ChangesError> {
        let snapshot = self.begin()?;
        let current = snapshot.revision;
        if after > current {
            return Err(ChangesError::Ahead { current });
        }
        let listed = || -> Result<_, Failure> {
            let changes = snapshot.view.transaction.open_table(CHANGES)?;
            let oldest = match changes.first()? {
                Some((oldest, _)) => oldest.value(),
                None => current.0.saturating_add(1),
            };
            let next = after.0.saturating_add(1);
            if next < oldest {
                return Ok(Err(Revision(oldest)));
            }
            let mut listed = Vec::new();
            for change in changes.range(next..)?.take(limit) {
                let (revision, rows) = change?;
                listed.push((Revision(revision.value()), encode::changed_rows(rows.value())?));
            }
            Ok(Ok(listed))
        };
        let listed = snapshot.latch.read(listed)?;
        listed.map_err(|oldest| ChangesError::Trimmed { oldest })
    }
}

// Where a group is durable before its transaction is committed.
enum Kept {
    // The transaction need not be durable.
    InJournal,
    // The transaction must be.
    Nowhere,
    // As before, because of this; and the store must be opened again.
    JournalLost(String),
}

// What a transaction has written.
struct Filled {
    replaced: Vec<Replaced>,
    appended: Vec<Write>,
    // How many rows there are more (or less).
    rows: i64,
}

// The tables of a transaction, opened when they are first written.
struct Rows<'t> {
    transaction: &'t WriteTransaction,
    tables: BTreeMap<Space, Table<'t, &'static [u8], &'static [u8]>>,
    added: i64,
}

impl Rows<'_> {
    // Applies one write; the old value.
    fn apply(
        &mut self,
        revision: Revision,
        row: &RowKey,
        new: Option<&Bytes>,
    ) -> Result<Option<Bytes>, Failure> {
        let rows = match self.tables.entry(row.space) {
            btree_map::Entry::Occupied(open) => open.into_mut(),
            btree_map::Entry::Vacant(vacant) => {
                vacant.insert(self.transaction.open_table(table(&table_name(row.space)))?)
            }
        };
        let old = match new {
            Some(value) => {
                rows.insert(row.key.as_slice(), encode::join(revision, value).as_slice())?
            }
            None => rows.remove(row.key.as_slice())?,
        };
        let old = match old {
            Some(stored) => Some(Bytes::copy_from_slice(encode::split(stored.value())?.1)),
            None => None,
        };
        self.added += i64::from(new.is_some()) - i64::from(old.is_some());
        Ok(old)
    }
}

impl Store for Redb {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        Box::pin(async move { Ok(Box::new(self.begin()?) as Box<dyn Snapshot>) })
    }

    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move { self.commit_now(group, finish) })
    }

    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>> {
        Box::pin(async move { self.changes_now(after, limit) })
    }

    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        Box::pin(async move { self.reopen_now() })
    }

    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        Box::pin(async move {
            let (view, latch) = self.view()?;
            latch.read(|| view.get(space, key))
        })
    }

    fn status(&self) -> StoreStatus {
        let bytes = std::fs::metadata(&self.path).ok().map(|file| file.len());
        let known = self.known.lock();
        StoreStatus {
            kind: "redb",
            path: self.on_file.then(|| self.path.clone()),
            id: known.id,
            bytes: bytes.filter(|_| self.on_file),
            rows: Some(known.rows),
            revision: known.revision,
            generation: known.generation,
            health: match known.failure.clone() {
                None => Health::Ready,
                Some(failure) => Health::NeedsReopen(failure),
            },
        }
    }
}
