//! One revision of a redb store: a read transaction.

use std::ops::{Bound, RangeBounds};

use ::redb::{Database, ReadOnlyTable, ReadTransaction, ReadableDatabase};
use bytes::Bytes;
use futures::future::{BoxFuture, ready};

use super::{
    META, META_REVISION, ROWS, encode,
    failure::{Failure, Latch},
};
use crate::{Direction, Entry, KeyRange, ReadError, Revision, Snapshot, Space, range};

/// What a read transaction sees.
pub(super) struct View {
    pub(super) revision: Revision,
    pub(super) rows: ReadOnlyTable<&'static [u8], &'static [u8]>,
    pub(super) transaction: ReadTransaction,
}

impl View {
    pub(super) fn new(database: &Database) -> Result<Self, Failure> {
        let transaction = database.begin_read()?;
        let revision = {
            let meta = transaction.open_table(META)?;
            encode::revision_of(meta.get(META_REVISION)?)?
        };
        Ok(Self { revision, rows: transaction.open_table(ROWS)?, transaction })
    }

    fn get(&self, space: Space, key: &[u8]) -> Result<Option<Entry>, Failure> {
        match self.rows.get(encode::key(space, key).as_slice())? {
            Some(stored) => Ok(Some(entry(key, stored.value())?)),
            None => Ok(None),
        }
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
        let encoded = |bound: &Bound<Vec<u8>>| match bound {
            Bound::Included(key) => Some(Bound::Included(encode::key(space, key))),
            Bound::Excluded(key) => Some(Bound::Excluded(encode::key(space, key))),
            Bound::Unbounded => None,
        };
        // Without bounds of its own, a scan ends where its space does.
        let start = encoded(&keys.0).unwrap_or_else(|| Bound::Included(vec![space.0]));
        let end = encoded(&keys.1).unwrap_or_else(|| match space.0.checked_add(1) {
            Some(next) => Bound::Excluded(vec![next]),
            None => Bound::Unbounded,
        });
        let bounds = (start.as_ref().map(Vec::as_slice), end.as_ref().map(Vec::as_slice));
        let mut rows = self.rows.range::<&[u8]>(bounds)?;
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
            let key = key.get(1..).unwrap_or_default();
            if found.last().is_some_and(|last| !follows(direction, &last.key, key)) {
                return Err(Failure::damaged("rows are out of order"));
            }
            found.push(entry(key, stored.value())?);
        }
        Ok(found)
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
    pub(super) latch: Latch,
}

impl Snapshot for RedbSnapshot {
    fn revision(&self) -> Revision {
        self.view.revision
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
}
