//! One revision of a redb store: a read transaction.

use std::ops::RangeBounds;

use ::redb::{Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, TableError};
use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;

use super::{
    META, META_REVISION, encode,
    failure::{Failure, Latch},
    table, table_name,
};
use crate::{Direction, Entry, KeyRange, ReadError, Revision, Snapshot, Space, range};

type Rows = ReadOnlyTable<&'static [u8], &'static [u8]>;

/// What a read transaction sees.
pub(super) struct View {
    // Opened when they are first read; None where nothing was ever written.
    tables: Mutex<Vec<(Space, Option<Rows>)>>,
    pub(super) transaction: ReadTransaction,
}

impl View {
    pub(super) fn new(database: &Database) -> Result<Self, Failure> {
        Ok(Self { tables: Mutex::default(), transaction: database.begin_read()? })
    }

    pub(super) fn revision(&self) -> Result<Revision, Failure> {
        let meta = self.transaction.open_table(META)?;
        encode::revision_of(meta.get(META_REVISION)?)
    }

    fn rows<T>(
        &self,
        space: Space,
        read: impl FnOnce(&Rows) -> Result<T, Failure>,
    ) -> Result<Option<T>, Failure> {
        let mut tables = self.tables.lock();
        let at = match tables.iter().position(|(of, _)| *of == space) {
            Some(at) => at,
            None => {
                let rows = match self.transaction.open_table(table(&table_name(space))) {
                    Ok(rows) => Some(rows),
                    Err(TableError::TableDoesNotExist(_)) => None,
                    Err(error) => return Err(error.into()),
                };
                tables.push((space, rows));
                tables.len() - 1
            }
        };
        tables.get(at).and_then(|(_, rows)| rows.as_ref()).map(read).transpose()
    }

    /// The revision of a row, if there is one.
    pub(super) fn revision_of(
        &self,
        space: Space,
        key: &[u8],
    ) -> Result<Option<Revision>, Failure> {
        let found = self.rows(space, |rows| match rows.get(key)? {
            Some(stored) => Ok(Some(encode::split(stored.value())?.0)),
            None => Ok(None),
        })?;
        Ok(found.flatten())
    }

    pub(super) fn get(&self, space: Space, key: &[u8]) -> Result<Option<Entry>, Failure> {
        let found = self.rows(space, |rows| match rows.get(key)? {
            Some(stored) => Ok(Some(entry(key, stored.value())?)),
            None => Ok(None),
        })?;
        Ok(found.flatten())
    }

    fn count(&self, space: Space, keys: &KeyRange, limit: usize) -> Result<usize, Failure> {
        if range::is_empty(keys) {
            return Ok(0);
        }
        let bounds = (keys.0.as_ref().map(Vec::as_slice), keys.1.as_ref().map(Vec::as_slice));
        let counted = self.rows(space, |rows| {
            let mut counted = 0;
            for row in rows.range::<&[u8]>(bounds)?.take(limit) {
                row?;
                counted += 1;
            }
            Ok(counted)
        })?;
        Ok(counted.unwrap_or_default())
    }

    fn scan(
        &self,
        space: Space,
        keys: &KeyRange,
        direction: Direction,
        limit: usize,
    ) -> Result<Vec<Entry>, Failure> {
        if range::is_empty(keys) {
            return Ok(Vec::new());
        }
        let bounds = (keys.0.as_ref().map(Vec::as_slice), keys.1.as_ref().map(Vec::as_slice));
        let found = self.rows(space, |rows| {
            let mut rows = rows.range::<&[u8]>(bounds)?;
            let mut found: Vec<Entry> = Vec::new();
            while found.len() < limit {
                let next = match direction {
                    Direction::Forward => rows.next(),
                    Direction::Backward => rows.next_back(),
                };
                // The first error ends the scan: what follows it may be incomplete.
                let Some((key, stored)) = next.transpose()? else {
                    break;
                };
                let key = key.value();
                // redb believes a damaged page. What is out of place or out of order would send whoever
                // goes on behind the last row back to where he was before.
                if !RangeBounds::<&[u8]>::contains(&bounds, &key) {
                    return Err(Failure::damaged("a row stands out of place"));
                }
                if found.last().is_some_and(|last| !follows(direction, &last.key, key)) {
                    return Err(Failure::damaged("rows are out of order"));
                }
                found.push(entry(key, stored.value())?);
            }
            Ok(found)
        })?;
        Ok(found.unwrap_or_default())
    }
}

/// Whether a scan may come to `next` after `last`.
fn follows(direction: Direction, last: &[u8], next: &[u8]) -> bool {
    match direction {
        Direction::Forward => last < next,
        Direction::Backward => last > next,
    }
}

fn entry(key: &[u8], stored: &[u8]) -> Result<Entry, Failure> {
    let (revision, value) = encode::split(stored)?;
    Ok(Entry { key: key.to_vec(), value: Bytes::copy_from_slice(value), revision })
}

/// A [`View`], and where to report its failures.
pub(super) struct RedbSnapshot {
    pub(super) view: View,
    pub(super) revision: Revision,
    pub(super) latch: Latch,
}

impl Snapshot for RedbSnapshot {
    fn revision(&self) -> Revision {
        self.revision
    }

    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        Box::pin(ready(self.latch.read(|| self.view.get(space, key))))
    }

    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>> {
        Box::pin(async move { self.latch.read(|| self.view.scan(space, &range, direction, limit)) })
    }

    fn count(
        &self,
        space: Space,
        range: KeyRange,
        limit: usize,
    ) -> BoxFuture<'_, Result<usize, ReadError>> {
        Box::pin(async move { self.latch.read(|| self.view.count(space, &range, limit)) })
    }
}
