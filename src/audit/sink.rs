//! Copies of the log in files, and at syslog and OpenTelemetry collectors.
//!
//! The store is the authority and the only buffer: each sink reads the log for itself, from where it
//! has come to, a batch at a time. So a sink that is slow, hangs or fails holds up neither requests
//! nor other sinks, takes no memory meanwhile, and goes on where it stopped. How far it has come is
//! kept in the data directory once the copy is safe: after a crash some leaves come twice, none is
//! left out, and each line names its leaf.
//!
//! Where several nodes share a store they share its log: each node with a sink copies all of it.

mod file;
mod otlp;
mod place;
mod syslog;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polykey_proto::polykey::record::v1::{AuditBody, AuditLeaf};
use polykey_storage::{Direction, Revision};
use prost::Message;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::archive::{self, Had};
use super::checkpoint::{self, origin};
use super::export::{checkpoint_line, leaf_line};
use super::proof::LeafHashes;
use super::read::{EventView, entries};
use super::trail::Trail;
use crate::config::sinks::{Content, Target};
use crate::config::{self, Sink};
use crate::error::Error;
use crate::health::State;
use crate::telemetry::otlp::encode::Source;
use crate::telemetry::otlp::send::Sender;
use crate::time::Time;
use crate::vault::tree::{Hash, leaf_hash};
use crate::vault::{Vault, space};
use place::{Cursor, Place};

/// How often a sink looks for new leaves. The look is two loads of atomics.
const POLL: Duration = Duration::from_millis(100);
/// How often a sink that has nothing to write is looked after, and one that failed is tried again.
const LOOK: Duration = Duration::from_millis(400);
/// A sink that takes longer for a batch hangs, says health.
const HANGS: Duration = Duration::from_secs(1);
/// A sink that has not been level with the log for so long is told in health.
const BEHIND: Duration = Duration::from_secs(60);
/// Most leaves read at a time: fewer where they are blocks of events, which may have a MiB each.
const BITE: usize = 16;
/// Bytes that a sink may be given at a time without hanging for that.
const BYTES: usize = 1024 * 1024;
/// Checkpoints read at a time.
const CHECKPOINTS: usize = 64;

/// What is to be written next, and how far that brings the sink.
#[derive(Debug)]
struct Batch {
    from: Cursor,
    next: Cursor,
    /// The hash of the last leaf before `next`, if it is among these.
    last: Option<Hash>,
    records: Vec<Record>,
    /// Nothing follows: what is written is made safe now.
    flush: bool,
}

/// One line, without its end.
#[derive(Debug)]
struct Record {
    time: Time,
    what: What,
    line: Vec<u8>,
}

/// What a line is.
#[derive(Clone, Copy, Debug)]
enum What {
    Leaf(u64),
    /// A leaf, and the place in it.
    Event(u64, u32),
    /// Its size.
    Checkpoint(u64),
}

impl Batch {
    fn empty(from: Cursor) -> Self {
        Self { from, next: from, last: None, records: Vec::new(), flush: false }
    }
}

enum Outlet {
    File(file::Outlet),
    Syslog(Box<syslog::Outlet>),
    Otlp(Box<otlp::Outlet>),
}

impl Outlet {
    fn new(copier: &Copier, place: Place) -> Self {
        let saved = copier.saved.clone();
        match &copier.sink.target {
            Target::File(target) => Self::File(file::Outlet::new(target.clone(), place, saved)),
            Target::Syslog(target) => {
                Self::Syslog(Box::new(syslog::Outlet::new(target.clone(), place, saved)))
            }
            Target::Otlp(_) => {
                let (at, source) = (copier.sink.place(), copier.source.clone());
                let sender = copier.sender.clone();
                Self::Otlp(Box::new(otlp::Outlet::new(at, sender, source, place, saved)))
            }
        }
    }

    /// From where on the sink wants the log.
    fn next(&self) -> Cursor {
        match self {
            Self::File(outlet) => outlet.next(),
            Self::Syslog(outlet) => outlet.next(),
            Self::Otlp(outlet) => outlet.next(),
        }
    }

    /// Writes a batch if it begins at [`Self::next`], which a loss that is found may have put back, and
    /// looks after the sink.
    async fn put(&mut self, batch: Batch) -> Result<(), String> {
        match self {
            Self::File(outlet) => outlet.put(batch).await,
            Self::Syslog(outlet) => Box::pin(outlet.put(batch)).await,
            Self::Otlp(outlet) => Box::pin(outlet.put(batch)).await,
        }
    }
}

/// What is to be known of a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Leaves of the log that it has.
    pub copied: u64,
    /// Leaves that it has not.
    pub behind: u64,
    /// What is wrong with it.
    pub trouble: Option<String>,
}

#[derive(Debug)]
struct Seen {
    copied: u64,
    level: Instant,
    trouble: Option<String>,
}

/// Copies the log to one sink.
struct Copier {
    name: String,
    sink: Sink,
    /// The way to it, if it is a collector of OpenTelemetry's.
    sender: Option<Sender>,
    source: Source,
    saved: PathBuf,
    trail: Arc<Trail>,
    seen: Mutex<Seen>,
    closing: CancellationToken,
}

impl Copier {
    fn status(&self) -> SinkStatus {
        let seen = self.seen.lock();
        SinkStatus {
            name: self.name.clone(),
            copied: seen.copied,
            behind: self.trail.vault().leaves().saturating_sub(seen.copied),
            trouble: seen.trouble.clone(),
        }
    }

    fn state(&self) -> State {
        let status = self.status();
        let sink = format!("[audit.sinks.{}]", self.name);
        if let Some(trouble) = status.trouble {
            let text =
                format!("{sink}: {trouble}; what it lacks is copied from the log afterwards");
            return State::Degraded(text.into());
        }
        if self.seen.lock().level.elapsed() >= BEHIND && status.behind > 0 {
            return State::Degraded(
                format!("{sink} is {} leaves behind the log", status.behind).into(),
            );
        }
        State::Serving
    }

    fn tell(&self, trouble: Option<String>) {
        let mut seen = self.seen.lock();
        if seen.trouble == trouble {
            return;
        }
        let sink = self.name.as_str();
        match &trouble {
            Some(why) => tracing::warn!(sink, why, "an audit sink fails"),
            None => tracing::info!(sink, "an audit sink works again"),
        }
        seen.trouble = trouble;
    }

    async fn run(self: Arc<Self>) {
        let place = loop {
            match self.place().await {
                Ok(place) => break place,
                Err(why) => self.tell(Some(why)),
            }
            if self.pause(LOOK).await {
                return;
            }
        };
        let mut outlet = Outlet::new(&self, place);
        let mut bite = BITE;
        loop {
            let next = outlet.next();
            let mut unread = None;
            let mut batch = match self.read(next, bite).await {
                Ok(batch) => batch,
                Err(error) => {
                    let why = error.internal_text().unwrap_or_default();
                    // A store that is away says so itself.
                    if matches!(error, Error::DataLoss { .. }) {
                        unread = Some(format!("the log cannot be read: {why}"));
                    }
                    tokio::time::sleep(POLL).await;
                    Batch::empty(next)
                }
            };
            let bytes: usize = batch.records.iter().map(|record| record.line.len()).sum();
            bite = if bytes > BYTES { bite.div_ceil(2) } else { (bite * 2).min(BITE) };
            let level = batch.records.is_empty() && self.trail.vault().leaves() <= next.leaf;
            let last = level && self.closing.is_cancelled();
            batch.flush = last;
            let idle = batch.records.is_empty();
            let result = self.watched(outlet.put(batch)).await;
            self.tell(result.as_ref().err().cloned().or(unread));
            let next = outlet.next();
            {
                let mut seen = self.seen.lock();
                seen.copied = next.leaf;
                if level {
                    seen.level = Instant::now();
                }
            }
            if last {
                return;
            }
            match result {
                Ok(()) if idle => self.wait(next).await,
                Ok(()) => {}
                // The trail is closed already: what is missing is copied after the next start.
                Err(_) if self.pause(LOOK).await => return,
                Err(_) => {}
            }
        }
    }

    /// The result of a call, and in health whether it takes long.
    async fn watched(&self, put: impl Future<Output = Result<(), String>>) -> Result<(), String> {
        let mut put = std::pin::pin!(put);
        tokio::select! {
            result = &mut put => result,
            () = tokio::time::sleep(HANGS) => {
                let place = self.sink.place();
                self.tell(Some(format!("{place} has taken nothing for over {} s", HANGS.as_secs())));
                put.await
            }
        }
    }

    /// Whether it is time to end.
    async fn pause(&self, time: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(time) => false,
            () = self.closing.cancelled() => true,
        }
    }

    /// Returns when there is something to write, or it is time to look after the sink.
    async fn wait(&self, next: Cursor) {
        let until = Instant::now() + LOOK;
        while !self.pause(POLL).await && Instant::now() < until {
            if self.trail.vault().leaves() > next.leaf || self.signed_beyond(next) {
                return;
            }
        }
    }

    fn signed_beyond(&self, next: Cursor) -> bool {
        self.sink.content == Content::Leaves && self.trail.checkpointed() > next.checkpoint
    }

    /// Where the sink stands, if that is a place of this log; else its beginning.
    async fn place(&self) -> Result<Place, String> {
        let log = origin(&self.trail.vault().node_id());
        let saved = self.saved.clone();
        let loaded = tokio::task::spawn_blocking(move || Place::load(&saved)).await;
        let loaded = loaded.map_err(|e| e.to_string())?.map_err(|error| {
            format!(
                "{}, which says how far it has come, cannot be read: {error}",
                self.saved.display()
            )
        })?;
        let Some(place) = loaded else { return Ok(Place::new(log)) };
        let sink = self.name.as_str();
        if place.log != log {
            tracing::warn!(
                sink,
                "an audit sink was that of another log: all of this one is copied"
            );
            return Ok(Place::new(log));
        }
        let next = place.next.leaf;
        let (Some(index), Some(last)) = (next.checked_sub(1), place.last()) else {
            return Ok(place);
        };
        // The leaf itself may be in an archive.
        let hash = LeafHashes::new(&**self.trail.vault().store(), index).step(1).await;
        match hash {
            Ok(hash) if hash.first() == Some(&last) => return Ok(place),
            Ok(_) | Err(Error::DataLoss { .. }) => {}
            Err(error) => {
                let why = error.internal_text().unwrap_or_default();
                return Err(format!("the log cannot be read: {why}"));
            }
        }
        tracing::warn!(
            sink,
            next,
            "an audit sink has leaves that are not of this log, as after an older store was put \
             back: all of it is copied again"
        );
        Ok(Place::new(log))
    }

    /// The next records.
    async fn read(&self, from: Cursor, bite: usize) -> Result<Batch, Error> {
        let vault = self.trail.vault();
        let mut batch = Batch::empty(from);
        if vault.leaves() > from.leaf {
            let rows = async |from: u64| {
                let range = polykey_storage::from(from.to_be_bytes());
                vault.scan::<AuditLeaf>(range, Direction::Forward, bite).await
            };
            let mut leaves = rows(from.leaf).await?;
            if leaves.first().is_some_and(|(_, leaf)| leaf.record.archived) {
                let (kept, _) = archive::kept(vault).await?;
                let (sink, first) = (self.name.as_str(), from.leaf);
                tracing::warn!(
                    sink,
                    first,
                    kept,
                    "an audit sink goes on behind what was archived: the leaves before are in the archives"
                );
                batch.next.leaf = kept.max(from.leaf);
                leaves = rows(batch.next.leaf).await?;
            }
            for (key, leaf) in leaves {
                if key != batch.next.leaf.to_be_bytes() {
                    let missing = batch.next.leaf;
                    return Err(Error::data_loss(format!("audit leaf {missing} is missing")));
                }
                self.leaf(&mut batch, &leaf.record)?;
            }
        }
        let new = !batch.records.is_empty() && vault.is_shared() || self.signed_beyond(from);
        if self.sink.content == Content::Leaves && new && batch.next.leaf > from.checkpoint {
            let after = Bound::Excluded(from.checkpoint.to_be_bytes().to_vec());
            let range = (after, Bound::Included(batch.next.leaf.to_be_bytes().to_vec()));
            let (space, forward) = (space::CHECKPOINTS, Direction::Forward);
            for row in vault.store().scan(space, range, forward, CHECKPOINTS).await? {
                let checkpoint = checkpoint::decode(&row.key, &row.value)
                    .map_err(|why| Error::data_loss(format!("a stored checkpoint: {why}")))?;
                batch.next.checkpoint = checkpoint.size;
                let line = checkpoint_line(&checkpoint.note).map_err(unwritten)?;
                let what = What::Checkpoint(checkpoint.size);
                batch.records.push(Record { time: checkpoint.time, what, line });
            }
        }
        Ok(batch)
    }

    fn leaf(&self, batch: &mut Batch, leaf: &AuditLeaf) -> Result<(), Error> {
        let index = batch.next.leaf;
        if leaf.archived {
            return Err(Error::unavailable(format!("audit leaf {index} is being archived")));
        }
        let body = AuditBody::decode(leaf.body.as_ref())
            .map_err(|e| Error::data_loss(format!("audit leaf {index} does not decode: {e}")))?;
        match self.sink.content {
            Content::Leaves => {
                let time = body
                    .events
                    .first()
                    .map_or_else(Time::default, |event| Time::from_micros(event.time));
                let line = leaf_line(index, &leaf.salt, &leaf.body).map_err(unwritten)?;
                let what = What::Leaf(index);
                batch.records.push(Record { time, what, line });
            }
            Content::Events => {
                for entry in entries(index, body) {
                    let time = Time::from_micros(entry.event.time);
                    let line = serde_json::to_vec(&EventView::from(&entry));
                    let what = What::Event(index, entry.position);
                    batch.records.push(Record { time, what, line: line.map_err(unwritten)? });
                }
            }
        }
        batch.last = Some(leaf_hash(&leaf.salt, &leaf.body));
        batch.next.leaf = index + 1;
        Ok(())
    }
}

fn unwritten(error: serde_json::Error) -> Error {
    Error::internal(format!("a line of an audit sink: {error}"))
}

/// All sinks of a node.
pub struct Sinks {
    each: Vec<Arc<Copier>>,
    vault: Arc<Vault>,
    closing: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Sinks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Sinks").field(&self.status()).finish()
    }
}

impl Sinks {
    /// Those that the configuration names, at rest, with the ways to those that are collectors. How far each has come is kept in `audit-sinks` of
    /// the data directory.
    #[must_use]
    pub fn new(
        config: &config::Audit,
        data_dir: &Path,
        trail: &Arc<Trail>,
        senders: &BTreeMap<String, Sender>,
    ) -> Arc<Self> {
        let node_id = trail.vault().node_id();
        let source = Source {
            instance: data_encoding::HEXLOWER.encode(&node_id),
            since: Duration::default(),
        };
        let closing = CancellationToken::new();
        let each = config.sinks.iter().map(|(name, sink)| {
            Arc::new(Copier {
                name: name.clone(),
                sink: sink.clone(),
                sender: senders.get(name).cloned(),
                source: source.clone(),
                saved: data_dir.join("audit-sinks").join(format!("{name}.json")),
                trail: Arc::clone(trail),
                seen: Mutex::new(Seen { copied: 0, level: Instant::now(), trouble: None }),
                closing: closing.clone(),
            })
        });
        let each = each.collect();
        let vault = Arc::clone(trail.vault());
        Arc::new(Self { each, vault, closing, tasks: Mutex::default() })
    }

    /// Starts copying, on the current runtime.
    pub fn start(&self) {
        let tasks = self.each.iter().map(|copier| tokio::spawn(Arc::clone(copier).run()));
        self.tasks.lock().extend(tasks);
    }

    /// What is to be known of each.
    #[must_use]
    pub fn status(&self) -> Vec<SinkStatus> {
        self.each.iter().map(|copier| copier.status()).collect()
    }

    /// The sink that has least of the log for good, and how many leaves that is. What it may have beyond that
    /// is not counted.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if that cannot be read.
    pub async fn least(&self) -> Result<Option<(String, u64)>, Error> {
        let log = origin(&self.vault.node_id());
        let saved = self.each.iter().map(|copier| (copier.name.clone(), copier.saved.clone()));
        let saved: Vec<(String, PathBuf)> = saved.collect();
        let look = move || {
            let mut least: Option<(String, u64)> = None;
            for (name, path) in saved {
                let place = Place::load(&path).map_err(|error| {
                    Error::unavailable(format!("{} cannot be read: {error}", path.display()))
                })?;
                let has = place.filter(|place| place.log == log).map_or(0, |place| place.next.leaf);
                if least.as_ref().is_none_or(|(_, least)| has < *least) {
                    least = Some((name, has));
                }
            }
            Ok(least)
        };
        tokio::task::spawn_blocking(look).await.map_err(|e| Error::internal(e.to_string()))?
    }

    /// How far those have the log who are to have all that is archived: the sinks, and the replication
    /// target up to a revision.
    ///
    /// # Errors
    /// As [`Self::least`].
    pub async fn had(&self, shipped: Option<Revision>) -> Result<Had, Error> {
        let least = self.least().await?;
        let least = least.map(|(name, has)| (format!("[audit.sinks.{name}]"), has));
        Ok(Had { least, shipped })
    }

    /// For health: the first one that fails.
    #[must_use]
    pub fn state(&self) -> State {
        let states = self.each.iter().map(|copier| copier.state());
        states.into_iter().find(|state| *state != State::Serving).unwrap_or(State::Serving)
    }

    /// Copies the end of the log, which must be closed, as far as that goes within `limit`. The rest
    /// follows after the next start.
    pub async fn shutdown(&self, limit: Duration) {
        self.closing.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let ended = tokio::time::timeout(limit, futures::future::join_all(tasks)).await;
        for abort in aborts {
            abort.abort();
        }
        if ended.is_err() {
            tracing::warn!(
                "an audit sink did not take the end of the log; it follows after a start"
            );
        }
    }
}
