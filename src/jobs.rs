//! The durable schedule: what must happen at a time, across restarts.
//!
//! A job is a row whose key begins with the time it is due, so the next one is the first row. It is
//! written by the transaction that makes it necessary and deleted by the one that carries it out;
//! whatever the schedule does late or twice, the state of a key decides, so handlers look at the
//! key and do what is still to be done.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use parking_lot::Mutex;
use polykey_hsm::random;
use polykey_proto::polykey::record::v1::job_record::Kind;
use polykey_proto::polykey::record::v1::{AuditEvent, ClockRecord, JobRecord};
use polykey_storage::{Direction, KeyRange, RowKey};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Reason};
use crate::keyring::Remember;
use crate::time::Time;
use crate::vault::space::{JOBS, meta};
use crate::vault::{Invalidate, Loaded, Receipt, Tx, Vault};

mod clock;
mod notice;
#[cfg(test)]
mod tests;
pub mod work;

pub use clock::Doubt;
use clock::{Guard, Moment};
pub use notice::{due_notice, next_notice};
use work::Ledger;

/// Jobs that run at once.
const CONCURRENCY: usize = 4;
/// Rows read at a time.
const PAGE: usize = 256;
/// Longest sleep, so that a changed clock is noticed.
const NAP: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(3600);

/// A job as it stands in the schedule.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its row key in [`JOBS`]; a handler deletes it in the transaction of its effect.
    pub row: Vec<u8>,
    /// What is to be done; its `due` stays what it was, however often the job is put off.
    pub record: JobRecord,
}

impl Job {
    /// When it is tried next: at first its `due`.
    #[must_use]
    pub fn at(&self) -> Time {
        tried_at(&self.row)
    }
}

/// When the job of a row is tried next.
fn tried_at(row: &[u8]) -> Time {
    let micros = row.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    Time::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// What a row key alone tells of its job, for one whose record does not open: it is shown, and nothing
/// is done by it. `None` for what is no row of the schedule.
#[must_use]
pub fn from_row(row: &[u8]) -> Option<JobRecord> {
    let (due, rest) = row.split_first_chunk::<8>()?;
    let (&kind, rest) = rest.split_first()?;
    let (id, version) = rest.split_first_chunk::<16>()?;
    let key_id = if *id == [0; 16] { Vec::new() } else { id.to_vec() };
    Some(JobRecord {
        kind: kind.into(),
        due: i64::try_from(u64::from_be_bytes(*due)).ok()?,
        key_id: key_id.into(),
        version: u32::from_be_bytes(version.try_into().ok()?),
        ..JobRecord::default()
    })
}

/// The row key of a job that has not been tried: due (u64 BE, µs) ‖ kind u8 ‖ key id (16 bytes, zeros for none) ‖ version
/// (u32 BE).
#[must_use]
pub fn row(job: &JobRecord) -> Vec<u8> {
    row_at(job, Time::from_micros(job.due))
}

fn row_at(job: &JobRecord, at: Time) -> Vec<u8> {
    let mut row = Vec::with_capacity(29);
    row.extend_from_slice(&u64::try_from(at.micros()).unwrap_or(0).to_be_bytes());
    row.push(u8::try_from(job.kind).unwrap_or(0));
    let mut id = [0; 16];
    if job.key_id.len() == id.len() {
        id.copy_from_slice(&job.key_id);
    }
    row.extend_from_slice(&id);
    row.extend_from_slice(&job.version.to_be_bytes());
    row
}

/// Puts a job on the schedule with the transaction's change.
///
/// # Errors
/// [`Error::Internal`] for a kind or key id that is none.
pub fn schedule(tx: &mut Tx<'_>, job: &JobRecord) -> Result<(), Error> {
    if job.kind() == Kind::Unspecified || !matches!(job.key_id.len(), 0 | 16) {
        return Err(Error::internal("scheduling a job of no kind or with a malformed key id"));
    }
    tx.set(&row(job), job)
}

/// Takes a job off the schedule, if it is still there at this time. One that has been tried and put
/// off stands elsewhere and finds nothing left to do.
pub fn cancel(tx: &mut Tx<'_>, job: &JobRecord) {
    tx.delete::<JobRecord>(&row(job));
}

/// Wakes the runner when the schedule changes; one of those whom the store tells of changed rows.
#[derive(Debug, Default)]
pub struct Alarm(Notify);

impl Invalidate for Alarm {
    fn invalidate(&self, rows: &[&RowKey]) {
        if rows.iter().any(|row| row.space == JOBS) {
            self.0.notify_one();
        }
    }
    fn clear(&self) {
        self.0.notify_one();
    }
}

/// Carries out one job. What it returns an error for is tried again later.
pub type Handler = Arc<dyn Fn(Job) -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// What became of the jobs that were due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Carried out.
    pub done: usize,
    /// Failed and put off.
    pub failed: usize,
    /// Held back because the clock is in doubt.
    pub held: usize,
    /// Due by their row keys, but the records do not open: left as they are.
    pub damaged: usize,
}

/// Carries out what is due.
pub struct Runner {
    vault: Arc<Vault>,
    alarm: Arc<Alarm>,
    handler: Handler,
    guard: Mutex<Guard>,
    running: tokio::sync::Mutex<()>,
    stop: CancellationToken,
    work: Ledger,
}

/// What waits of a kind of job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Jobs that are due.
    pub due: u32,
    /// Since when the first of them is.
    pub since: Option<Time>,
    /// When the next one is tried.
    pub next: Option<Time>,
}

/// What cannot be undone.
fn irreversible(job: &JobRecord) -> bool {
    matches!(job.kind(), Kind::Destroy | Kind::EndGrace | Kind::Revoke)
}

impl Runner {
    /// A runner over the schedule of `vault`, which tells `alarm` of changes. It believes the clock
    /// until [`Self::resume`].
    #[must_use]
    pub fn new(vault: Arc<Vault>, alarm: Arc<Alarm>, handler: Handler) -> Arc<Self> {
        let now = vault.clock().now();
        let behind = vault.head().last_time.since(now);
        if !behind.is_zero() {
            tracing::warn!(
                seconds = behind.as_secs(),
                "the clock is behind the last commit of the store: nothing comes due until it has \
                 caught up"
            );
        }
        let guard = Mutex::new(Guard::believing(Moment::now(now)));
        Arc::new(Self {
            vault,
            alarm,
            handler,
            guard,
            running: tokio::sync::Mutex::new(()),
            work: Ledger::new(CONCURRENCY),
            stop: CancellationToken::new(),
        })
    }

    /// Judges the clock by what the store knows of it from before, and writes down where it stands.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::DataLoss`] if the store cannot be read.
    pub async fn resume(&self) -> Result<(), Error> {
        let stored = self.vault.get::<ClockRecord>(meta::CLOCK).await?.map(|l| l.record);
        let now = Moment::now(self.vault.clock().now());
        let guard = Guard::resume(stored.as_ref(), self.vault.last_time(), now);
        *self.guard.lock() = guard;
        self.note_clock().await;
        Ok(())
    }

    /// Writes down how far the clock is believed, for the next start. What cannot be written now is
    /// written the next time; the older note is the more cautious one.
    pub async fn note_clock(&self) {
        self.note_clock_at(Moment::now(self.vault.clock().now())).await;
    }

    async fn note_clock_at(&self, now: Moment) {
        let record = {
            let mut guard = self.guard.lock();
            guard.check(now);
            guard.record(now)
        };
        let Some(record) = record else { return };
        let write = async {
            let mut tx = self.vault.begin().await?;
            tx.get::<ClockRecord>(meta::CLOCK).await?;
            tx.put(meta::CLOCK, &record)?;
            tx.commit().await
        };
        if let Err(error) = write.await {
            let detail = error.internal_text().unwrap_or_default();
            tracing::debug!(%error, detail, "where the clock stands was not written");
        }
    }

    /// Runs until [`Self::shutdown`]; the jobs that have begun by then are finished.
    pub async fn run(self: Arc<Self>) {
        while !self.stop.is_cancelled() {
            let woken = self.alarm.0.notified();
            let nap = match self.turn().await {
                Ok(nap) => nap,
                Err(error) => {
                    let detail = error.internal_text().unwrap_or_default();
                    tracing::warn!(%error, detail, "the schedule cannot be read; trying again");
                    FIRST_RETRY
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = woken => {}
                () = tokio::time::sleep(nap) => {}
            }
        }
    }

    /// Takes no more jobs.
    pub fn shutdown(&self) {
        self.stop.cancel();
    }

    /// One turn: carries out what is due, and gives how long there is nothing to do.
    async fn turn(&self) -> Result<Duration, Error> {
        let begun = self.vault.clock().now();
        self.run_due(begun).await?;
        // What came due meanwhile is next.
        let after = u64::try_from(begun.micros()).unwrap_or(0).saturating_add(1);
        let range = polykey_storage::from(after.to_be_bytes());
        let next = self.scan(range, 1).await?;
        let now = self.vault.clock().now();
        let next = next.first().map(|(row, _)| tried_at(row).since(now));
        Ok(next.unwrap_or(NAP).min(NAP))
    }

    /// Carries out everything that is due at `now`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::DataLoss`] if the schedule cannot be read. Failures of
    /// jobs are not errors: they are stored with the job, which is tried again later.
    pub async fn run_due(&self, now: Time) -> Result<Report, Error> {
        self.run_due_at(now, Moment::now(now)).await
    }

    async fn run_due_at(&self, now: Time, moment: Moment) -> Result<Report, Error> {
        let _only_one = self.running.lock().await;
        let (before, held) = {
            let mut guard = self.guard.lock();
            (guard.doubt(), guard.check(moment))
        };
        if held != before.is_some() {
            self.note_clock_at(moment).await;
        }
        let end = u64::try_from(now.micros()).unwrap_or(0).saturating_add(1);
        let end = std::ops::Bound::Excluded(end.to_be_bytes().to_vec());
        let mut start = std::ops::Bound::Unbounded;
        let mut report = Report::default();
        while !self.stop.is_cancelled() {
            let range = (start, end.clone());
            let rows = self.scan(range, PAGE).await?;
            let Some((last, _)) = rows.last() else { break };
            start = std::ops::Bound::Excluded(last.clone());
            let found = rows.len();
            let jobs: Vec<Job> = rows.into_iter().filter_map(|(_, job)| job).collect();
            report.damaged += found - jobs.len();
            let (wait, go): (Vec<_>, Vec<_>) =
                jobs.into_iter().partition(|job| held && irreversible(&job.record));
            report.held += wait.len();
            let mut results =
                stream::iter(go).map(|job| self.carry_out(job, now)).buffer_unordered(CONCURRENCY);
            while let Some(result) = results.next().await {
                match result {
                    Some(true) => report.done += 1,
                    Some(false) => report.failed += 1,
                    None => {}
                }
            }
        }
        Ok(report)
    }

    /// Whether the job was carried out; `None` if it was not begun.
    async fn carry_out(&self, job: Job, now: Time) -> Option<bool> {
        if self.stop.is_cancelled() {
            return None;
        }
        // A task of its own: a panic is this job's failure alone.
        let work = async {
            match tokio::spawn((self.handler)(job.clone())).await {
                Ok(result) => result,
                Err(error) => Err(Error::internal(format!("the job failed: {error}"))),
            }
        };
        let result = self.work.of(job.record.kind()).track(self.vault.clock(), work).await;
        let kind = job.record.kind().as_str_name();
        let (done, after) = match result {
            Ok(()) => (true, self.finish(&job).await),
            Err(error) => {
                let detail = error.internal_text().unwrap_or_default();
                tracing::warn!(kind, attempts = job.record.attempts, %error, detail, "job failed");
                (false, self.put_off(&job, &error, now).await)
            }
        };
        // Otherwise it is still there, and comes up again: handlers bear that.
        if let Err(error) = after {
            tracing::warn!(kind, %error, "the schedule could not be brought up to date");
        }
        Some(done)
    }

    /// Deletes the row of a job that its handler left.
    async fn finish(&self, job: &Job) -> Result<(), Error> {
        let mut tx = self.vault.begin().await?;
        match tx.get::<JobRecord>(&job.row).await? {
            Some(found) if found.record == job.record => {
                tx.delete::<JobRecord>(&job.row);
                tx.commit().await.map(drop)
            }
            // Gone, or scheduled anew.
            _ => Ok(()),
        }
    }

    async fn put_off(&self, job: &Job, error: &Error, now: Time) -> Result<(), Error> {
        let mut tx = self.vault.begin().await?;
        match tx.get::<JobRecord>(&job.row).await? {
            Some(found) if found.record == job.record => {}
            _ => return Ok(()),
        }
        let mut record = job.record.clone();
        record.attempts = record.attempts.saturating_add(1);
        let text = match error.internal_text() {
            Some(internal) => format!("{error}: {internal}"),
            None => error.to_string(),
        };
        record.last_error = text.chars().take(512).collect();
        // The record keeps its `due`, by which a handler tells whether the job is still meant.
        let row = row_at(&record, now.plus(back_off(record.attempts)));
        tx.delete::<JobRecord>(&job.row);
        tx.set(&row, &record)?;
        tx.commit().await.map(drop)
    }

    /// The first `limit` jobs, the next one first, without those whose records do not open.
    ///
    /// # Errors
    /// As [`Vault::scan_each`].
    pub async fn list(&self, limit: usize) -> Result<Vec<Job>, Error> {
        let rows = self.scan(polykey_storage::all(), limit).await?;
        Ok(rows.into_iter().filter_map(|(_, job)| job).collect())
    }

    /// What each kind of work does.
    #[must_use]
    pub fn work(&self) -> &Ledger {
        &self.work
    }

    /// What waits of each kind, of the first `limit` jobs.
    ///
    /// # Errors
    /// As [`Vault::scan_each`].
    pub async fn waiting(&self, limit: usize) -> Result<BTreeMap<i32, Waiting>, Error> {
        let now = self.vault.clock().now();
        let mut kinds = BTreeMap::<i32, Waiting>::new();
        for job in self.list(limit).await? {
            let waiting = kinds.entry(job.record.kind).or_default();
            let (due, at) = (Time::from_micros(job.record.due), job.at());
            waiting.next = Some(waiting.next.map_or(at, |next| next.min(at)));
            if due <= now {
                waiting.due += 1;
                waiting.since = Some(waiting.since.map_or(due, |since| since.min(due)));
            }
        }
        Ok(kinds)
    }

    /// Rows of the schedule, with the job where the record opens.
    async fn scan(
        &self,
        range: KeyRange,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Option<Job>)>, Error> {
        let rows = self.vault.scan_each::<JobRecord>(range, Direction::Forward, limit).await?;
        let job = |(row, loaded): (Vec<u8>, Result<Loaded<JobRecord>, Error>)| {
            let job = loaded.ok().map(|l| Job { row: row.clone(), record: l.record });
            (row, job)
        };
        Ok(rows.into_iter().map(job).collect())
    }

    /// Whether irreversible jobs are held back because of the clock.
    #[must_use]
    pub fn clock_in_doubt(&self) -> bool {
        self.clock_doubt().is_some()
    }

    /// Why irreversible jobs are held back, if they are.
    #[must_use]
    pub fn clock_doubt(&self) -> Option<Doubt> {
        self.guard.lock().doubt()
    }

    /// An operator says that the clock is right: what was held back goes on. The confirmation is
    /// durable with its event. Returns the time confirmed.
    ///
    /// # Errors
    /// [`Reason::ClockUnconfirmed`] if the clock is behind the store's last commit though it has not
    /// jumped, and so cannot be right; as [`Tx::commit`].
    pub async fn confirm_clock(
        &self,
        event: AuditEvent,
        remember: Option<Remember>,
    ) -> Result<(Time, Receipt), Error> {
        let now = Moment::now(self.vault.clock().now());
        let jumped = self.clock_doubt() == Some(Doubt::Jumped);
        // After a jump the last commit may be what carries the wrong time.
        if !jumped && self.vault.last_time() > now.clock {
            return Err(Error::State(Reason::ClockUnconfirmed));
        }
        let believing = Guard::believing(now);
        let mut tx = self.vault.begin().await?;
        tx.get::<ClockRecord>(meta::CLOCK).await?;
        if let Some(record) = believing.record(now) {
            tx.put(meta::CLOCK, &record)?;
        }
        if let Some(remember) = &remember {
            remember.write(&mut tx).await?;
        }
        tx.event(event);
        let receipt = tx.commit().await?;
        *self.guard.lock() = believing;
        self.alarm.0.notify_one();
        Ok((now.clock, receipt))
    }
}

/// 1 s, 2 s, 4 s … 1 h, more or less by up to a quarter, so that what failed together does not come
/// back together.
fn back_off(attempts: u32) -> Duration {
    let full = FIRST_RETRY.saturating_mul(1 << attempts.saturating_sub(1).min(12)).min(LAST_RETRY);
    let random = random::array::<2>().map_or(0, u16::from_be_bytes);
    full * 3 / 4 + full * u32::from(random) / (2 * u32::from(u16::MAX))
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("guard", &self.guard).finish_non_exhaustive()
    }
}
