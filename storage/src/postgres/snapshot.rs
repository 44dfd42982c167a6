//! Reading: one revision for a while, or one statement.

use std::{
    ops::Bound,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use futures::future::{BoxFuture, join, join3};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_postgres::Row;

use super::{
    Inner,
    failure::{Backoff, Failure, Kind, within},
    group::{column, head, number},
    joined,
    pool::{Lease, Pool},
    statements::Query,
};
use crate::{
    Changes, ChangesError, Direction, Entry, KeyRange, ReadError, Revision, RowKey, Snapshot,
    Space, StoreError, range,
};

/// How many rows one statement reads at most, so that a scan of any length keeps its deadlines.
const PAGE: usize = 1_000;

/// One revision: a transaction that only reads.
pub(super) struct PostgresSnapshot {
    inner: Arc<Inner>,
    generation: u64,
    revision: Revision,
    // None once its time is up.
    open: Arc<Mutex<Option<Arc<Open>>>>,
}

// A connection in a transaction. Dropping it ends the transaction, and gives the connection back.
struct Open {
    inner: Arc<Inner>,
    lease: Option<Lease>,
}

impl Drop for Open {
    fn drop(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        if !lease.connection.is_usable() {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let deadline = inner.deadline();
        self.inner.handle.spawn(async move {
            let ended = within(deadline, lease.connection.batch("COMMIT")).await;
            if ended.is_ok() {
                inner.readers.put(lease);
            }
        });
    }
}

/// Begins a snapshot.
pub(super) async fn begin(inner: &Arc<Inner>) -> Result<PostgresSnapshot, ReadError> {
    let (generation, floor) = inner.serving().ok_or(ReadError::NeedsReopen)?;
    let deadline = inner.deadline();
    let mut backoff = Backoff::new();
    loop {
        let failure = match open(inner, generation, floor, deadline).await {
            Ok((open, revision)) => {
                let open = Arc::new(Mutex::new(Some(Arc::new(open))));
                let end = expire(Arc::downgrade(&open), inner.options().snapshot_life);
                inner.handle.spawn(end);
                return Ok(PostgresSnapshot {
                    inner: Arc::clone(inner),
                    generation,
                    revision,
                    open,
                });
            }
            Err(failure) => failure,
        };
        if failure.kind != Kind::Serialization || !backoff.pause(deadline).await {
            return Err(inner.read_error(generation, failure));
        }
    }
}

async fn expire(open: Weak<Mutex<Option<Arc<Open>>>>, life: std::time::Duration) {
    tokio::time::sleep(life).await;
    let expired = open.upgrade().and_then(|open| open.lock().take());
    drop(expired);
}

async fn open(
    inner: &Arc<Inner>,
    generation: u64,
    floor: Revision,
    deadline: Instant,
) -> Result<(Open, Revision), Failure> {
    let lease = Pool::lease(inner, generation, deadline).await?;
    let open = Open { inner: Arc::clone(inner), lease: Some(lease) };
    let Some(Lease { connection, reused, .. }) = &open.lease else {
        return Err(Failure::damaged("no connection"));
    };
    let begin = connection.begin_reading();
    let begun = within(deadline, async {
        let (begun, head) =
            join(connection.batch(&begin), connection.query(Query::Head, &[])).await;
        begun?;
        self::head(&head?)
    });
    let head = again_if_closed(begun.await, *reused && connection.is_closed())?;
    inner.check_head(&head, floor)?;
    Ok((open, head.revision))
}

// A connection that the other side has closed while it was idle says nothing about the database.
fn again_if_closed<T>(result: Result<T, Failure>, closed: bool) -> Result<T, Failure> {
    match result {
        Err(failure) if failure.kind == Kind::Lost && closed => {
            Err(Failure { kind: Kind::Serialization, ..failure })
        }
        other => other,
    }
}

impl PostgresSnapshot {
    fn run<T, F>(
        &self,
        read: impl FnOnce(Arc<Open>, Instant) -> F + Send + 'static,
    ) -> BoxFuture<'_, Result<T, ReadError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send,
    {
        let open = self.open.lock().clone();
        let (inner, generation) = (Arc::clone(&self.inner), self.generation);
        joined(self.inner.handle.spawn(async move {
            let Some(open) = open else {
                let life = inner.options().snapshot_life.as_secs_f64();
                let why = format!("the snapshot is older than {life} s: take a new one");
                return Err(ReadError::Store(StoreError::Other(why)));
            };
            let result = read(Arc::clone(&open), inner.deadline()).await;
            // Its connection alone was closed, unless a new one cannot be had either.
            let alone = open.lease.as_ref().is_some_and(|lease| lease.connection.is_closed());
            again_if_closed(result, alone).map_err(|failure| inner.read_error(generation, failure))
        }))
    }
}

impl Snapshot for PostgresSnapshot {
    fn revision(&self) -> Revision {
        self.revision
    }

    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        let key = key.to_vec();
        self.run(move |open, deadline| async move {
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] =
                [&i16::from(space.0), &key];
            let rows = open.read(Query::Get, &parameters, deadline).await?;
            rows.first().map(entry).transpose()
        })
    }

    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>> {
        let inner = Arc::clone(&self.inner);
        self.run(move |open, _| async move {
            let mut scan = Scan::new(space, range, direction, limit);
            while let Some(query) = scan.next() {
                // Each page has the time of a call.
                let parameters = scan.parameters();
                let rows = open.read(query, &parameters, inner.deadline()).await?;
                scan.add(&rows)?;
            }
            Ok(scan.found)
        })
    }

    fn count(
        &self,
        space: Space,
        range: KeyRange,
        limit: usize,
    ) -> BoxFuture<'_, Result<usize, ReadError>> {
        self.run(move |open, deadline| async move {
            let mut scan = Scan::new(space, range, Direction::Forward, limit);
            if scan.next().is_none() {
                return Ok(0);
            }
            scan.page = i64::try_from(limit).unwrap_or(i64::MAX);
            let query = Query::Count { bounded: scan.end.is_some() };
            let rows = open.read(query, &scan.parameters(), deadline).await?;
            Ok(usize::try_from(number(rows.first(), 0)?).unwrap_or(usize::MAX))
        })
    }
}

impl Open {
    async fn read(
        &self,
        query: Query,
        parameters: super::connection::Parameters<'_>,
        deadline: Instant,
    ) -> Result<Vec<Row>, Failure> {
        let Some(lease) = &self.lease else { return Err(Failure::damaged("no connection")) };
        within(deadline, lease.connection.read(query, parameters)).await
    }
}

fn entry(row: &Row) -> Result<Entry, Failure> {
    Ok(Entry {
        key: column(row, 0)?,
        value: Bytes::copy_from_slice(column(row, 1)?),
        revision: Revision(number(Some(row), 2)?),
    })
}

// A scan, page by page: from `start` on, up to and without `end`.
struct Scan {
    space: i16,
    start: Vec<u8>,
    end: Option<Vec<u8>>,
    direction: Direction,
    left: usize,
    page: i64,
    found: Vec<Entry>,
}

impl Scan {
    fn new(space: Space, keys: KeyRange, direction: Direction, limit: usize) -> Self {
        let left = if range::is_empty(&keys) { 0 } else { limit };
        let start = match keys.0 {
            Bound::Included(key) => key,
            Bound::Excluded(key) => after(key),
            Bound::Unbounded => Vec::new(),
        };
        let end = match keys.1 {
            Bound::Included(key) => Some(after(key)),
            Bound::Excluded(key) => Some(key),
            Bound::Unbounded => None,
        };
        let space = i16::from(space.0);
        Self { space, start, end, direction, left, page: 0, found: Vec::new() }
    }

    // The statement for the next page, if there may be one.
    fn next(&mut self) -> Option<Query> {
        let page = self.left.min(PAGE);
        self.page = i64::try_from(page).ok().filter(|page| *page > 0)?;
        let backward = self.direction == Direction::Backward;
        Some(Query::Scan { bounded: self.end.is_some(), backward })
    }

    fn parameters(&self) -> Vec<&(dyn tokio_postgres::types::ToSql + Sync)> {
        let mut parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> =
            vec![&self.space, &self.start, &self.page];
        if let Some(end) = &self.end {
            parameters.push(end);
        }
        parameters
    }

    fn add(&mut self, rows: &[Row]) -> Result<(), Failure> {
        for row in rows {
            self.found.push(entry(row)?);
        }
        let whole = usize::try_from(self.page).is_ok_and(|page| rows.len() >= page);
        self.left = if whole { self.left.saturating_sub(rows.len()) } else { 0 };
        if let Some(last) = self.found.last() {
            match self.direction {
                Direction::Forward => self.start = after(last.key.clone()),
                Direction::Backward => self.end = Some(last.key.clone()),
            }
        }
        Ok(())
    }
}

// The key that follows `key` at once.
fn after(mut key: Vec<u8>) -> Vec<u8> {
    key.push(0);
    key
}

// Runs statements that need no transaction, as often as it takes.
pub(super) async fn alone<T, F>(
    inner: &Arc<Inner>,
    read: impl Fn(Arc<Lease>) -> F,
) -> Result<T, ReadError>
where
    F: Future<Output = Result<T, Failure>>,
{
    let (generation, _) = inner.serving().ok_or(ReadError::NeedsReopen)?;
    let deadline = inner.deadline();
    let mut backoff = Backoff::new();
    loop {
        let result = match Pool::lease(inner, generation, deadline).await {
            Err(failure) => Err(failure),
            Ok(lease) => {
                let lease = Arc::new(lease);
                let result = within(deadline, read(Arc::clone(&lease))).await;
                let closed = lease.reused && lease.connection.is_closed();
                if let Some(lease) = Arc::into_inner(lease) {
                    inner.readers.put(lease);
                }
                again_if_closed(result, closed)
            }
        };
        match result {
            Ok(found) => return Ok(found),
            Err(failure)
                if failure.kind == Kind::Serialization && backoff.pause(deadline).await => {}
            Err(failure) => return Err(inner.read_error(generation, failure)),
        }
    }
}

/// One row, in one statement.
pub(super) async fn get(
    inner: &Arc<Inner>,
    space: Space,
    key: &[u8],
) -> Result<Option<Entry>, ReadError> {
    alone(inner, |lease| async move {
        let rows = lease.connection.query(Query::Get, &[&i16::from(space.0), &key]).await?;
        rows.first().map(entry).transpose()
    })
    .await
}

/// A scan: in one statement if it is short.
pub(super) async fn scan(
    inner: &Arc<Inner>,
    space: Space,
    range: KeyRange,
    direction: Direction,
    limit: usize,
) -> Result<Vec<Entry>, ReadError> {
    if limit > PAGE {
        return begin(inner).await?.scan(space, range, direction, limit).await;
    }
    alone(inner, |lease| {
        let mut scan = Scan::new(space, range.clone(), direction, limit);
        async move {
            if let Some(query) = scan.next() {
                let rows = lease.connection.query(query, &scan.parameters()).await?;
                scan.add(&rows)?;
            }
            Ok(scan.found)
        }
    })
    .await
}

/// What was written after a revision, all of it seen at one revision.
pub(super) async fn changes(
    inner: &Arc<Inner>,
    after: Revision,
    limit: usize,
) -> Result<Changes, ChangesError> {
    let floor = inner.serving().ok_or(ReadError::NeedsReopen)?.1;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    // No store comes so far.
    let from = i64::try_from(after.0).unwrap_or(i64::MAX);
    let read = alone(inner, |lease| async move {
        let begin = lease.connection.begin_reading();
        let read = async {
            let (begun, (head, oldest, changes)) = join(
                lease.connection.batch(&begin),
                join3(
                    lease.connection.query(Query::Head, &[]),
                    lease.connection.query(Query::OldestChange, &[]),
                    lease.connection.query(Query::Changes, &[&from, &limit]),
                ),
            )
            .await;
            begun?;
            let head = self::head(&head?)?;
            let oldest: Option<i64> = match oldest?.first() {
                Some(row) => column(row, 0)?,
                None => None,
            };
            let changes = changes?.iter().map(change).collect::<Result<Changes, _>>()?;
            Ok((head, oldest, changes))
        };
        let result = read.await;
        lease.connection.batch("COMMIT").await?;
        result
    });
    let (head, oldest, changes) = read.await?;
    if let Err(failure) = inner.check_head(&head, floor) {
        let generation = inner.known.lock().generation;
        return Err(inner.read_error(generation, failure).into());
    }
    let current = head.revision;
    if after > current {
        return Err(ChangesError::Ahead { current });
    }
    let oldest = match oldest.and_then(|oldest| u64::try_from(oldest).ok()) {
        Some(oldest) => Revision(oldest),
        None => Revision(current.0.saturating_add(1)),
    };
    if after.0.saturating_add(1) < oldest.0 {
        return Err(ChangesError::Trimmed { oldest });
    }
    Ok(changes)
}

fn change(row: &Row) -> Result<(Revision, Vec<RowKey>), Failure> {
    let spaces: Vec<i16> = column(row, 1)?;
    let keys: Vec<Vec<u8>> = column(row, 2)?;
    if spaces.len() != keys.len() {
        return Err(Failure::damaged("a list of changes"));
    }
    let rows = spaces.into_iter().zip(keys).map(|(space, key)| {
        let space = u8::try_from(space).map_err(|_| Failure::damaged(format!("space {space}")))?;
        Ok(RowKey::new(Space(space), key))
    });
    Ok((Revision(number(Some(row), 0)?), rows.collect::<Result<_, Failure>>()?))
}
