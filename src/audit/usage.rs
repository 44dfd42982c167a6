//! How often and when keys are used: derived from the log, one leaf after the other, each once.
//!
//! The stored rows and the mark change in one transaction, so the rows hold exactly the leaves before
//! the mark, whatever happens. What is newer is held in memory, and read again from the log where it
//! is not.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use polykey_hsm::Ring;
use polykey_proto::polykey::record::v1::{
    AuditBody, AuditEvent, AuditLeaf, HistoryEntry, UsageMark, UsageRecord,
};
use polykey_storage::{Direction, Snapshot};
use prost::Message;

use super::event::Outcome;
use super::line::{self, Block};
use crate::authz::{Action, Class};
use crate::error::Error;
use crate::key::KeyId;
use crate::time::Time;
use crate::vault::Vault;
use crate::vault::space::{self, Record, meta};

/// Entries of recent history a key keeps.
pub(crate) const RECENT: usize = 32;
/// Keys whose figures are kept in memory.
const CACHED: NonZeroUsize = NonZeroUsize::MIN.saturating_add(65_535);
/// A step of the write-behind stops at this many touches, or leaves.
const STEP_TOUCHES: usize = 1024;
const STEP_LEAVES: u64 = 4096;
/// Without touches the mark moves only every so many leaves.
const LAZY_MARK: u64 = 1024;

type Key = [u8; 16];

/// How often a key was used, and when last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Successful uses.
    pub count: u64,
    /// The time of the last one.
    pub last: Option<Time>,
}

/// What events mean to one key: one of them, or those before the newest of a block.
#[derive(Clone, Debug)]
pub(crate) struct Touch {
    key: Key,
    /// How many uses it stands for, and the time of the last one.
    uses: u64,
    last: i64,
    /// None where so many newer ones are in the same leaf that no history has room for it.
    entry: Option<HistoryEntry>,
}

/// What an event means to its key, if it is about one.
#[derive(Clone, Copy, Debug)]
pub struct Meaning {
    key: Option<Key>,
    time: i64,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Work with the key or its material, and not a look at its metadata or a change of it.
    Use,
    /// The making of the key.
    Making,
    Other,
}

impl Meaning {
    pub(super) fn new(key: Option<Key>, time: i64, action: Action, outcome: Outcome) -> Self {
        let kind = match action {
            _ if outcome != Outcome::Success => Kind::Other,
            Action::CreateKey | Action::ImportKey => Kind::Making,
            Action::GetKey | Action::ExportKey => Kind::Use,
            action if action.class() == Class::Use => Kind::Use,
            _ => Kind::Other,
        };
        Self { key, time, kind }
    }

    pub(super) fn of(event: &AuditEvent) -> Self {
        let (key, time) = (event.key_id.as_ref().try_into().ok(), event.time);
        match Action::parse(&event.action) {
            Some(action) => Self::new(key, time, action, event.outcome()),
            None => Self { key, time, kind: Kind::Other },
        }
    }

    pub(super) fn is_about(&self, key: &Key) -> bool {
        self.key.as_ref() == Some(key)
    }
}

/// Whether an event is the making of its key.
pub(crate) fn is_making(event: &AuditEvent) -> bool {
    Meaning::of(event).kind == Kind::Making
}

pub(crate) fn touch(event: &AuditEvent, leaf: u64) -> Option<Touch> {
    let meaning = Meaning::of(event);
    // A key that was made and never used has no row: creating keys must not cost two.
    if meaning.kind == Kind::Making {
        return None;
    }
    let uses = u64::from(meaning.kind == Kind::Use);
    Some(Touch {
        key: meaning.key?,
        uses,
        last: if uses > 0 { event.time } else { 0 },
        entry: Some(HistoryEntry {
            time: event.time,
            client_id: event.client_id.clone(),
            action: event.action.clone(),
            success: event.outcome() == Outcome::Success,
            correlation_id: event.correlation_id.clone(),
            leaf,
        }),
    })
}

/// What the events of one leaf mean to their keys. A busy key has thousands of them in a block, of
/// which its history keeps the newest.
fn touches(leaf: u64, block: &Block) -> Vec<Touch> {
    let mut kept: HashMap<Key, usize> = HashMap::new();
    let mut older: BTreeMap<Key, Touch> = BTreeMap::new();
    let mut newest = Vec::new();
    for (meaning, encoded) in block.events().rev() {
        let Some(key) = meaning.key else { continue };
        let kept = kept.entry(key).or_default();
        if *kept < RECENT {
            if let Some(touch) = line::decode(encoded).and_then(|event| touch(&event, leaf)) {
                *kept += 1;
                newest.push(touch);
            }
        } else if meaning.kind == Kind::Use {
            let none = Touch { key, uses: 0, last: 0, entry: None };
            let touch = older.entry(key).or_insert(none);
            touch.uses += 1;
            touch.last = touch.last.max(meaning.time);
        }
    }
    older.into_values().chain(newest.into_iter().rev()).collect()
}

#[derive(Clone, Copy, Debug, Default)]
struct Delta {
    count: u64,
    last: i64,
}

/// What is known beyond the stored rows.
#[derive(Debug)]
pub(crate) struct Usage {
    /// The stored rows hold exactly the leaves before this one.
    mark: u64,
    /// Leaves from the mark on, as far as they have been seen.
    pending: BTreeMap<u64, Arc<[Touch]>>,
    /// Uses that are not in the stored rows: queued, in flight and pending ones.
    deltas: HashMap<Key, Delta>,
    /// Stored figures, as of the mark.
    base: LruCache<Key, Access>,
}

impl Usage {
    pub(crate) fn new(mark: u64) -> Self {
        Self { mark, pending: BTreeMap::new(), deltas: HashMap::new(), base: LruCache::new(CACHED) }
    }

    /// An event has been accepted; it may have no leaf yet.
    pub(super) fn accepted(&mut self, meaning: &Meaning) {
        if let Some(key) = meaning.key
            && meaning.kind == Kind::Use
        {
            let delta = self.deltas.entry(key).or_default();
            delta.count += 1;
            delta.last = delta.last.max(meaning.time);
        }
    }

    /// A block of accepted events has become a leaf.
    pub(super) fn block(&mut self, leaf: u64, block: &Block) {
        let touches = touches(leaf, block);
        if leaf < self.mark {
            // Another node has read it from the log and written it already.
            touches.iter().for_each(|touch| self.settle(touch));
        } else {
            self.pending.insert(leaf, touches.into());
        }
    }

    /// The stored rows hold what had been counted beyond them.
    fn settle(&mut self, touch: &Touch) {
        if touch.uses > 0
            && let Some(delta) = self.deltas.get_mut(&touch.key)
        {
            delta.count = delta.count.saturating_sub(touch.uses);
            if delta.count == 0 {
                self.deltas.remove(&touch.key);
            }
        }
    }

    /// A single event has become a leaf.
    pub(crate) fn observed(&mut self, leaf: u64, event: &AuditEvent) {
        // Before the mark it has been read from the log already.
        if leaf >= self.mark && !self.pending.contains_key(&leaf) {
            let meaning = Meaning::of(event);
            self.accepted(&meaning);
            if let Some(key) = meaning.key.filter(|_| meaning.kind == Kind::Making) {
                // Known without a look at the store, which has no row of it yet.
                self.base.put(key, Access::default());
            }
            self.pending.insert(leaf, touch(event, leaf).into_iter().collect());
        }
    }

    /// The stored rows now hold the leaves before `mark`.
    fn advance(&mut self, mark: u64) {
        let rest = self.pending.split_off(&mark);
        for touch in std::mem::replace(&mut self.pending, rest).values().flat_map(|t| t.iter()) {
            self.settle(touch);
        }
        self.mark = mark;
    }

    /// Another node has written the leaves before `mark`.
    fn follow(&mut self, mark: u64) {
        if mark > self.mark {
            self.advance(mark);
            self.base.clear();
        }
    }

    fn merged(&self, key: &Key, base: Access) -> Access {
        let delta = self.deltas.get(key).copied().unwrap_or_default();
        let last = base.last.max(Time::optional(delta.last));
        Access { count: base.count.saturating_add(delta.count), last }
    }

    pub(crate) fn backlog(&self) -> usize {
        self.pending.len()
    }
}

/// Where the trail keeps its [`Usage`], and how far the log may be read.
pub(crate) trait Held: Sync {
    fn vault(&self) -> &Vault;
    fn with<T>(&self, f: impl FnOnce(&mut Usage) -> T) -> T;
    /// No leaf from this one on is taken from the log: a block in flight may be one of them.
    fn limit(&self) -> u64;
    /// Touches of the newest accepted events that have no leaf yet, in order.
    fn unsettled(&self, key: &Key, out: &mut Vec<Touch>);
}

fn access_of(record: &UsageRecord) -> Access {
    Access { count: record.access_count, last: Time::optional(record.last_accessed_at) }
}

async fn stored(vault: &Vault, key: &Key) -> Result<(u64, Option<UsageRecord>), Error> {
    let mut tx = vault.begin().await?;
    let mark = tx.get::<UsageMark>(meta::USAGE_MARK).await?.map_or(0, |m| m.record.next_leaf);
    Ok((mark, tx.get::<UsageRecord>(key).await?.map(|r| r.record)))
}

/// Reads until the stored rows and the memory are of the same mark.
async fn consistent<T>(
    held: &impl Held,
    key: &Key,
    mut f: impl FnMut(&mut Usage, UsageRecord) -> T,
) -> Result<T, Error> {
    for _ in 0..200 {
        let (mark, record) = stored(held.vault(), key).await?;
        let record = record.unwrap_or_default();
        let done = held.with(|usage| (usage.mark == mark).then(|| f(usage, record)));
        match done {
            Some(value) => return Ok(value),
            // Another node has written the use of keys, from the log.
            None if held.vault().is_shared() => held.with(|usage| usage.follow(mark)),
            // The write-behind is between its commit and its bookkeeping.
            None => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
        }
    }
    Err(Error::unavailable("the usage of keys is being written"))
}

pub(crate) async fn access(held: &impl Held, key: &Key) -> Result<Access, Error> {
    let cached = held.with(|usage| {
        let base = usage.base.get(key).copied()?;
        Some(usage.merged(key, base))
    });
    if let Some(access) = cached {
        return Ok(access);
    }
    Box::pin(consistent(held, key, |usage, record| {
        let base = access_of(&record);
        usage.base.put(*key, base);
        usage.merged(key, base)
    }))
    .await
}

pub(crate) async fn access_many(
    held: &impl Held,
    at: &(Box<dyn Snapshot>, Arc<Ring>),
    keys: &[KeyId],
) -> Result<Vec<Result<Access, Error>>, Error> {
    let vault = held.vault();
    let mark = [meta::USAGE_MARK.to_vec()];
    let mark = vault.get_many::<UsageMark>(at, &mark).await?.pop().transpose()?.flatten();
    let mark = mark.map_or(0, |mark| mark.record.next_leaf);
    let rows: Vec<Vec<u8>> = keys.iter().map(|key| key.bytes().to_vec()).collect();
    let stored = vault.get_many::<UsageRecord>(at, &rows).await?;
    let stored: Vec<Result<Access, Error>> = stored
        .into_iter()
        .map(|row| Ok(row?.map(|row| access_of(&row.record)).unwrap_or_default()))
        .collect();
    let merged = held.with(|usage| {
        let merge = |(key, base): (&KeyId, &Result<Access, Error>)| {
            base.clone().map(|base| usage.merged(&key.bytes(), base))
        };
        (usage.mark == mark).then(|| keys.iter().zip(&stored).map(merge).collect())
    });
    if let Some(merged) = merged {
        return Ok(merged);
    }
    // The use of keys has been written meanwhile.
    let mut all = Vec::with_capacity(keys.len());
    for key in keys {
        all.push(access(held, &key.bytes()).await);
    }
    Ok(all)
}

pub(crate) async fn full(held: &impl Held, key: &Key) -> Result<UsageRecord, Error> {
    // Events move from unsettled to pending, never back: taken in this order none is missed, and
    // what is met twice is known by being equal.
    let mut unsettled = Vec::new();
    held.unsettled(key, &mut unsettled);
    consistent(held, key, |usage, mut record| {
        let access = usage.merged(key, access_of(&record));
        let settled: Vec<&Touch> = usage
            .pending
            .values()
            .flat_map(|touches| touches.iter())
            .filter(|touch| touch.key == *key)
            .collect();
        let same = |a: &HistoryEntry, b: &HistoryEntry| {
            HistoryEntry { leaf: 0, ..a.clone() } == HistoryEntry { leaf: 0, ..b.clone() }
        };
        let since: Vec<HistoryEntry> = settled.iter().filter_map(|t| t.entry.clone()).collect();
        let met = |entry: &HistoryEntry| {
            since.iter().chain(&record.recent).filter(|other| same(entry, other)).count()
        };
        let mut fresh: Vec<HistoryEntry> = Vec::new();
        for entry in unsettled.iter().filter_map(|touch| touch.entry.as_ref()) {
            let before = fresh.iter().filter(|other| same(entry, other)).count();
            if met(entry) <= before {
                fresh.push(entry.clone());
            }
        }
        record.recent.extend(since);
        record.recent.extend(fresh);
        let excess = record.recent.len().saturating_sub(RECENT);
        record.recent.drain(..excess);
        record.access_count = access.count;
        record.last_accessed_at = access.last.map_or(0, Time::micros);
        record
    })
    .await
}

fn fold(record: &mut UsageRecord, touches: &[Touch]) {
    for touch in touches {
        record.access_count = record.access_count.saturating_add(touch.uses);
        record.last_accessed_at = record.last_accessed_at.max(touch.last);
    }
    let entries = || touches.iter().filter_map(|touch| touch.entry.as_ref());
    let older = entries().count().saturating_sub(RECENT);
    record.recent.extend(entries().skip(older).cloned());
    let excess = record.recent.len().saturating_sub(RECENT);
    record.recent.drain(..excess);
}

pub(crate) async fn load_mark(vault: &Vault) -> Result<u64, Error> {
    Ok(vault.get::<UsageMark>(meta::USAGE_MARK).await?.map_or(0, |mark| mark.record.next_leaf))
}

/// The leaves of one step: those in memory as they are, the others from the log.
async fn gather(held: &impl Held, from: u64, limit: u64) -> Result<(u64, Vec<Touch>), Error> {
    let to = limit.min(from.saturating_add(STEP_LEAVES));
    let known: BTreeMap<u64, Arc<[Touch]>> = held
        .with(|usage| usage.pending.range(from..to).map(|(leaf, t)| (*leaf, t.clone())).collect());
    let mut touches = Vec::new();
    let mut read = std::collections::VecDeque::new();
    let mut next = from;
    while next < to {
        if !touches.is_empty() && touches.len() >= STEP_TOUCHES {
            break;
        }
        if let Some(known) = known.get(&next) {
            touches.extend_from_slice(known);
        } else {
            if read.front().is_none_or(|(leaf, _)| *leaf != next) {
                read = read_bodies(held.vault(), next, to, 16).await?.into();
            }
            let Some((leaf, body)) = read.pop_front().filter(|(leaf, _)| *leaf == next) else {
                return Err(Error::data_loss(format!("audit leaf {next} is missing")));
            };
            let of_body = |event| touch(event, leaf);
            touches.extend(body.events.iter().filter_map(of_body));
        }
        next += 1;
    }
    Ok((next, touches))
}

/// At most `limit` leaves of `from..to`, opened.
pub(crate) async fn read_bodies(
    vault: &Vault,
    from: u64,
    to: u64,
    limit: usize,
) -> Result<Vec<(u64, AuditBody)>, Error> {
    use std::ops::Bound;
    let range =
        (Bound::Included(from.to_be_bytes().to_vec()), Bound::Excluded(to.to_be_bytes().to_vec()));
    let rows = vault.scan::<AuditLeaf>(range, Direction::Forward, limit).await?;
    rows.iter().map(|(key, leaf)| open_body(key, &leaf.record)).collect()
}

/// The body of a leaf, which must be the one that belongs to its row.
pub(crate) fn open_body(key: &[u8], leaf: &AuditLeaf) -> Result<(u64, AuditBody), Error> {
    let index = key.try_into().map(u64::from_be_bytes);
    let index = index.map_err(|_| Error::data_loss("an audit row has a malformed key"))?;
    if leaf.archived {
        return Err(Error::data_loss(format!("audit leaf {index} was archived before its time")));
    }
    let body = AuditBody::decode(leaf.body.as_ref())
        .map_err(|e| Error::data_loss(format!("audit leaf {index} failed to decode: {e}")))?;
    if body.index != index {
        return Err(Error::data_loss(format!("audit leaf {index} names itself {}", body.index)));
    }
    Ok((index, body))
}

/// Writes out what is pending. With `all`, the mark moves even where nothing was touched.
pub(crate) async fn flush(held: &impl Held, all: bool) -> Result<(), Error> {
    let vault = held.vault();
    loop {
        let from = held.with(|usage| usage.mark);
        let limit = held.limit();
        if from >= limit {
            return Ok(());
        }
        let (to, touches) = gather(held, from, limit).await?;
        if touches.is_empty() && !all && to - from < LAZY_MARK {
            // Known to touch nothing: not read again.
            held.with(|usage| {
                for leaf in from.max(usage.mark)..to {
                    usage.pending.entry(leaf).or_insert_with(|| Arc::new([]));
                }
            });
            return Ok(());
        }
        let mut by_key: BTreeMap<Key, Vec<Touch>> = BTreeMap::new();
        for touch in touches {
            by_key.entry(touch.key).or_default().push(touch);
        }
        let mut tx = vault.begin().await?;
        let mark = tx.get::<UsageMark>(meta::USAGE_MARK).await?.map_or(0, |m| m.record.next_leaf);
        if mark != from {
            // An earlier step whose outcome was unknown is durable after all.
            held.with(|usage| {
                usage.advance(mark);
                usage.base.clear();
            });
            continue;
        }
        let mut written = Vec::with_capacity(by_key.len());
        for (key, touches) in &by_key {
            let found = tx.get::<UsageRecord>(key).await?;
            // Who asks for keys that do not exist leaves no rows behind.
            if found.is_none() && vault.store().get(space::KEYS, key).await?.is_none() {
                continue;
            }
            let mut record = found.map(|r| r.record).unwrap_or_default();
            fold(&mut record, touches);
            tx.put(key, &record)?;
            written.push((*key, access_of(&record)));
        }
        tx.put(meta::USAGE_MARK, &UsageMark { next_leaf: to })?;
        match tx.commit().await {
            // Another node was faster with these leaves.
            Err(Error::Conflict) if vault.is_shared() => continue,
            result => result?,
        };
        held.with(|usage| {
            usage.advance(to);
            for (key, access) in written {
                usage.base.put(key, access);
            }
        });
    }
}

// The row of a key's use is named by the key itself. Those of logins have longer names.
const _: () = assert!(UsageRecord::SPACE.0 == space::USAGE.0);
