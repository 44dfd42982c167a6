//! Committing a group.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use bytes::Bytes;
use futures::future::join3;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};
use tokio_postgres::{Row, error::SqlState, types::FromSql};

use super::{
    Head, InDoubt, Inner, Overtaken,
    connection::{Connection, Purpose},
    failure::{Backoff, Failure, Kind, within},
    opening,
    statements::{Query, TRIM_EVERY},
};
use crate::{
    Abort, Commit, CommitError, Committed, Replaced, Revision, RowKey, StoreError, Write, commit,
    memory,
};

/// What [`crate::Finish`] is to be asked, on the caller's thread.
pub(super) struct Question {
    pub(super) revision: Revision,
    pub(super) accepted: Vec<usize>,
    pub(super) replaced: Vec<Replaced>,
    pub(super) beneath: Vec<Option<Bytes>>,
    pub(super) reply: oneshot::Sender<Result<Vec<Write>, CommitError>>,
}

/// Commits a group, asking `ask` at most once, and then with the values of the rows `beneath`.
pub(super) async fn commit(
    inner: Arc<Inner>,
    (group, beneath): (Vec<Commit>, Vec<RowKey>),
    ask: oneshot::Sender<Question>,
) -> Result<Committed, CommitError> {
    let deadline = inner.deadline();
    let Ok(mut writer) = timeout_at(deadline, inner.writer.lock()).await else {
        let why = "an earlier group of this node is still being committed";
        return Err(CommitError::Store(StoreError::Contended(why.into())));
    };
    let (generation, floor) = inner.serving().ok_or(CommitError::ReadOnly)?;
    if inner.known.lock().fenced_by.is_some() {
        return Err(CommitError::ReadOnly);
    }
    let ask = Some(ask);
    let mut work = Work { inner: &inner, group, beneath, ask, plan: None, floor, deadline };
    let mut backoff = Backoff::new();
    loop {
        let failed = match connection(&inner, &mut writer, deadline).await {
            Err(failure) => Failed::Certain(failure),
            Ok((connection, reused)) => match Box::pin(work.attempt(&connection)).await {
                Ok(committed) => {
                    *writer = Some(connection);
                    return Ok(committed);
                }
                Err(failed) => {
                    let known = !matches!(failed, Failed::Unknown(..));
                    let usable = known
                        && connection.is_usable()
                        && within(deadline, connection.batch("ROLLBACK")).await.is_ok();
                    *writer = usable.then_some(connection);
                    match failed {
                        // The other side closed it while it was idle.
                        Failed::Certain(failure)
                            if failure.kind == Kind::Lost && reused && !usable =>
                        {
                            Failed::Certain(Failure { kind: Kind::Serialization, ..failure })
                        }
                        failed => failed,
                    }
                }
            },
        };
        let failure = match failed {
            Failed::Because(error) => return Err(error),
            Failed::Unknown(failure, in_doubt) => {
                inner.known.lock().in_doubt = Some(in_doubt);
                inner.latch(generation, &failure.error);
                return Err(CommitError::OutcomeUnknown(failure.error));
            }
            Failed::Certain(failure) => failure,
        };
        if failure.kind == Kind::Serialization && backoff.pause(deadline).await {
            continue;
        }
        if failure.latches() {
            inner.latch(generation, &failure.error);
        }
        return Err(CommitError::Store(failure.error));
    }
}

/// The connection that commits, or a new one if it is not there; and whether it has served before.
pub(super) async fn connection(
    inner: &Arc<Inner>,
    writer: &mut Option<Connection>,
    deadline: Instant,
) -> Result<(Connection, bool), Failure> {
    let generation = inner.known.lock().generation;
    if let Some(connection) = writer.take().filter(Connection::is_usable) {
        return Ok((connection, true));
    }
    let connection =
        Connection::open(&inner.context, Purpose::Writing, generation, deadline).await?;
    opening::check(inner, &connection, deadline).await?;
    within(deadline, connection.prepare_all(Purpose::Writing)).await?;
    Ok((connection, false))
}

enum Failed {
    // The caller's affair, or the fence's. Nothing was applied.
    Because(CommitError),
    // Nothing was applied.
    Certain(Failure),
    Unknown(Failure, InDoubt),
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self::Certain(failure)
    }
}

struct Work<'a> {
    inner: &'a Inner,
    group: Vec<Commit>,
    // What is asked about besides the rows of the group.
    beneath: Vec<RowKey>,
    // None once it was asked.
    ask: Option<oneshot::Sender<Question>>,
    // What is written, once that is settled.
    plan: Option<Plan>,
    // No answer may be from an earlier revision.
    floor: Revision,
    deadline: Instant,
}

// What a group writes, and on top of which revision.
struct Plan {
    before: Revision,
    committed: Committed,
    group_id: [u8; 16],
    written: BTreeMap<RowKey, Option<Bytes>>,
    // How many rows there are more (or less), but for those in `unread` that were there.
    added: i64,
    unread: Vec<RowKey>,
}

// A row as it was before the group: its revision, and its value if that is of interest.
type Old = (Revision, Option<Bytes>);

impl Work<'_> {
    async fn attempt(&mut self, connection: &Connection) -> Result<Committed, Failed> {
        let lookup = match self.plan {
            None => Lookup::of(&self.group, &self.beneath),
            Some(_) => Lookup::default(),
        };
        let begin = connection.begin_writing();
        let (begun, head, old) = within(self.deadline, async {
            Ok(join3(
                connection.batch(&begin),
                connection.query(Query::LockHead, &[]),
                lookup.run(connection),
            )
            .await)
        })
        .await?;
        begun?;
        let head = self::head(&head?)?;
        let old = old?;
        self.inner.check_head(&head, self.floor)?;
        if self.inner.known.lock().fenced_by.is_some() {
            return Err(Failed::Because(CommitError::ReadOnly));
        }
        let plan = match self.plan.take() {
            Some(plan) if plan.before == head.revision => plan,
            Some(plan) => {
                let overtaken = Overtaken { expected: plan.before, current: head.revision };
                return Err(Failed::Because(CommitError::Aborted(Abort::new(overtaken))));
            }
            None => match self.decide(head.revision, &old).await? {
                Ok(plan) => plan,
                Err(nothing) => {
                    within(self.deadline, connection.batch("ROLLBACK")).await?;
                    return Ok(nothing);
                }
            },
        };
        let write = Box::pin(plan.write(self.inner, connection, head.epoch));
        let written = within(self.deadline, async { Ok(write.await) });
        match written.await {
            Ok(Ok(rows)) => {
                let mut known = self.inner.known.lock();
                // A reader may have seen what followed already.
                if plan.committed.revision > known.revision {
                    known.revision = plan.committed.revision;
                    known.rows = rows;
                }
                Ok(plan.committed)
            }
            Ok(Err((failure, true))) => {
                self.plan = Some(plan);
                Err(Failed::Certain(failure))
            }
            Ok(Err((failure, false))) | Err(failure) => {
                let in_doubt = InDoubt { revision: plan.committed.revision, group: plan.group_id };
                Err(Failed::Unknown(failure, in_doubt))
            }
        }
    }

    // What the group comes to on top of `before`, or that it comes to nothing.
    async fn decide(
        &mut self,
        before: Revision,
        old: &HashMap<RowKey, Old>,
    ) -> Result<Result<Plan, Committed>, Failed> {
        let found = |row: &RowKey| Ok(old.get(row).map(|(revision, _)| *revision));
        let admitted = commit::admit::<Failure>(&self.group, found)?;
        let outcomes = admitted.outcomes;
        if admitted.accepted.is_empty() {
            return Ok(Err(Committed { revision: before, outcomes }));
        }
        let revision = Revision(before.0.saturating_add(1));
        let mut written: BTreeMap<RowKey, Option<Bytes>> = BTreeMap::new();
        let mut replaced = Vec::new();
        for commit in admitted.accepted.iter().filter_map(|&index| self.group.get(index)) {
            for write in &commit.writes {
                let (row, new) = (write.row().clone(), write.value().cloned());
                let old = match written.insert(row.clone(), new.clone()) {
                    Some(earlier) => earlier,
                    None => old.get(&row).and_then(|(_, value)| value.clone()),
                };
                replaced.push(Replaced { row, old, new });
            }
        }
        let (reply, answer) = oneshot::channel();
        let value = |row| old.get(row).and_then(|(_, value): &Old| value.clone());
        let beneath = self.beneath.iter().map(value).collect();
        let accepted = admitted.accepted;
        let question = Question { revision, accepted, replaced, beneath, reply };
        let gone = || Failed::Certain(Failure::answer(super::interrupted()));
        let asked = self.ask.take().is_some_and(|ask| ask.send(question).is_ok());
        if !asked {
            return Err(gone());
        }
        let late = |_| Failure::answer(StoreError::Contended("the group was late itself".into()));
        let answer = timeout_at(self.deadline, answer).await.map_err(late)?;
        let appended = answer.map_err(|_| gone())?.map_err(Failed::Because)?;
        for write in appended {
            let (row, new) = match write {
                Write::Put { row, value } => (row, Some(value)),
                Write::Delete { row } => (row, None),
            };
            written.insert(row, new);
        }
        let looked_up = Lookup::rows(&self.group, &self.beneath);
        let (mut added, mut unread) = (0_i64, Vec::new());
        for (row, new) in &written {
            added += i64::from(new.is_some());
            if looked_up.contains_key(row) {
                added -= i64::from(old.contains_key(row));
            } else {
                unread.push(row.clone());
            }
        }
        let group_id =
            memory::random_id().map_err(|error| Failed::Certain(Failure::answer(error)))?;
        let committed = Committed { revision, outcomes };
        Ok(Ok(Plan { before, committed, group_id, written, added, unread }))
    }
}

// The rows that a group is decided on.
#[derive(Default)]
struct Lookup {
    rows: Vec<(RowKey, bool)>,
}

impl Lookup {
    // Every row, and whether its value is of interest: it is where it is replaced.
    fn rows<'a>(group: &'a [Commit], beneath: &'a [RowKey]) -> BTreeMap<&'a RowKey, bool> {
        let mut rows = BTreeMap::new();
        for commit in group {
            for (row, _) in &commit.requires {
                rows.entry(row).or_insert(false);
            }
            for write in &commit.writes {
                rows.insert(write.row(), true);
            }
        }
        rows.extend(beneath.iter().map(|row| (row, true)));
        rows
    }

    fn of(group: &[Commit], beneath: &[RowKey]) -> Self {
        let rows = Self::rows(group, beneath).into_iter();
        Self { rows: rows.map(|(row, value)| (row.clone(), value)).collect() }
    }

    async fn run(&self, connection: &Connection) -> Result<HashMap<RowKey, Old>, Failure> {
        if self.rows.is_empty() {
            return Ok(HashMap::new());
        }
        let numbers: Vec<i32> = (0..).take(self.rows.len()).collect();
        let (spaces, keys) = arrays(self.rows.iter().map(|(row, _)| row));
        let values: Vec<bool> = self.rows.iter().map(|(_, value)| *value).collect();
        let found = connection.query(Query::Old, &[&numbers, &spaces, &keys, &values]).await?;
        let old = found.iter().map(|row| {
            let index = usize::try_from(column::<i32>(row, 0)?).ok();
            let (key, _) = index
                .and_then(|index| self.rows.get(index))
                .ok_or_else(|| Failure::damaged("a row that was not asked for"))?;
            let value = column::<Option<&[u8]>>(row, 2)?.map(Bytes::copy_from_slice);
            Ok((key.clone(), (Revision(number(Some(row), 1)?), value)))
        });
        old.collect()
    }
}

impl Plan {
    // Sends everything and the COMMIT in one go. The number of rows afterwards; or what failed, and
    // whether it is certain that nothing was applied.
    async fn write(
        &self,
        inner: &Inner,
        connection: &Connection,
        epoch: u64,
    ) -> Result<u64, (Failure, bool)> {
        let revision = self.committed.revision;
        let numbers = || Ok((big(epoch)?, big(self.before.0)?, big(revision.0)?));
        let (epoch, before, number) = numbers().map_err(|failure| (failure, true))?;
        let (unread_spaces, unread_keys) = arrays(&self.unread);
        let puts = self.written.iter().filter_map(|(row, new)| Some((row, new.as_deref()?)));
        let (put_spaces, put_keys) = arrays(puts.clone().map(|(row, _)| row));
        let values: Vec<&[u8]> = puts.map(|(_, value)| value).collect();
        let gone = self.written.iter().filter(|(_, new)| new.is_none()).map(|(row, _)| row);
        let (gone_spaces, gone_keys) = arrays(gone);
        let (spaces, keys) = arrays(self.written.keys());
        let group_id = self.group_id.as_slice();

        let bump = async {
            let rows = connection
                .query(Query::Bump, &[&epoch, &before, &self.added, &unread_spaces, &unread_keys])
                .await?;
            self::number(rows.first(), 0)
        };
        let put = async {
            if !values.is_empty() {
                connection
                    .query(Query::Upsert, &[&put_spaces, &put_keys, &values, &number])
                    .await?;
            }
            Ok(())
        };
        let delete = async {
            if !gone_keys.is_empty() {
                connection.query(Query::Delete, &[&gone_spaces, &gone_keys]).await?;
            }
            Ok(())
        };
        let change = async {
            connection.query(Query::Change, &[&number, &group_id, &spaces, &keys]).await?;
            Ok(())
        };
        let trim = async {
            let trim_to = revision.0.saturating_sub(inner.options().changes);
            if trim_to > 0 && revision.0.is_multiple_of(TRIM_EVERY) {
                connection.query(Query::Trim, &[&big(trim_to)?]).await?;
            }
            Ok(())
        };
        // Polled in this order, which is that of the wire.
        let (rows, put, delete, change, trim, committed) =
            futures::join!(bump, put, delete, change, trim, connection.commit());
        let earlier = rows.and_then(|rows| put.and(delete).and(change).and(trim).map(|()| rows));
        match (earlier, committed) {
            (Ok(rows), Ok(())) => Ok(rows),
            // A statement that the server has refused makes a rollback of every COMMIT after it. Word of
            // a lost connection is no such refusal: a pooler may say it for all that was sent.
            (Err(failure), _) => {
                let certain = failure.code.is_some() && failure.kind != Kind::Lost;
                Err((failure, certain))
            }
            (Ok(_), Err(failure)) => {
                let certain = failure.code.as_ref().is_some_and(is_rollback);
                Err((failure, certain))
            }
        }
    }
}

// Whether a COMMIT with this answer has rolled back: nothing else is proof of that.
fn is_rollback(code: &SqlState) -> bool {
    let known = *code != SqlState::T_R_STATEMENT_COMPLETION_UNKNOWN;
    known && ["23", "40"].iter().any(|class| code.code().starts_with(class))
}

/// Rows as parameters.
pub(super) fn arrays<'a>(rows: impl IntoIterator<Item = &'a RowKey>) -> (Vec<i16>, Vec<&'a [u8]>) {
    rows.into_iter().map(|row| (i16::from(row.space.0), row.key.as_slice())).unzip()
}

/// A number as the database keeps it.
pub(super) fn big(number: u64) -> Result<i64, Failure> {
    i64::try_from(number).map_err(|_| Failure::damaged(format!("{number} is beyond its numbers")))
}

/// A column of a row.
pub(super) fn column<'a, T: FromSql<'a>>(row: &'a Row, index: usize) -> Result<T, Failure> {
    row.try_get(index).map_err(|error| Failure::damaged(error.to_string()))
}

/// A column that holds a number that is not negative.
pub(super) fn number(row: Option<&Row>, index: usize) -> Result<u64, Failure> {
    let row = row.ok_or_else(|| Failure::damaged("the row of the head is missing"))?;
    let found: i64 = column(row, index)?;
    u64::try_from(found).map_err(|_| Failure::damaged(format!("{found} is negative")))
}

/// The head as it was read.
pub(super) fn head(rows: &[Row]) -> Result<Head, Failure> {
    let row = rows.first();
    let id = match row {
        Some(row) => column::<&[u8]>(row, 0)?.try_into().ok(),
        None => None,
    };
    Ok(Head {
        id: id.ok_or_else(|| Failure::damaged("the id of the store"))?,
        epoch: number(row, 1)?,
        revision: Revision(number(row, 2)?),
        rows: number(row, 3)?,
    })
}
