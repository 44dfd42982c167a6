//! The trail: takes events in, answers when they are durable, and refuses when it cannot.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use polykey_hsm::Ring;
use polykey_proto::polykey::record::v1::{AuditEvent, UsageRecord};
use polykey_storage::Snapshot;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::checkpoint::Signer;
use super::denials::{Denials, Verdict};
use super::line::{self, Block, Entry, Filling};
use super::usage::{self, Access, Held, Touch, Usage};
use super::{checkpoint, flush};
use crate::config;
use crate::config::DataPlane;
use crate::error::Error;
use crate::key::KeyId;
use crate::time::Time;
use crate::vault::{Room, Vault};

/// Bytes of events at which a block is full, far below what a row takes.
pub(super) const BLOCK_BYTES: usize = 1024 * 1024;
/// Bytes of events that wait at which no more are taken.
const QUEUE_BYTES: usize = 64 * 1024 * 1024;

/// How the trail works.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// When an ordinary use of a key is answered.
    pub data_plane: DataPlane,
    /// How long the first event of a block waits for others; at most 50 ms. Default 20 ms: a commit
    /// costs as much for one event as for hundreds, and 100 ms are promised.
    pub linger: Duration,
    /// Most events that wait to become durable, at least 1. Default 65,536.
    pub queue: usize,
    /// Most events in one block, 1 to 2,048. Default 2,048.
    pub block: usize,
    /// Denials of one source within a second that are recorded each by itself. Default 20.
    pub denial_burst: u32,
    /// How often the use of keys is written. Default 1 s.
    pub usage_interval: Duration,
    /// New leaves after which a checkpoint is signed, at least 1. Default 1,000.
    pub checkpoint_leaves: u64,
    /// Age of the first new leaf after which a checkpoint is signed. Default 60 s.
    pub checkpoint_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            data_plane: DataPlane::Buffered,
            linger: Duration::from_millis(20),
            queue: 65_536,
            block: 2_048,
            denial_burst: 20,
            usage_interval: Duration::from_secs(1),
            checkpoint_leaves: 1_000,
            checkpoint_interval: Duration::from_secs(60),
        }
    }
}

impl From<&config::Audit> for Options {
    fn from(config: &config::Audit) -> Self {
        Self {
            data_plane: config.data_plane,
            checkpoint_interval: config.checkpoint_interval,
            ..Self::default()
        }
    }
}

/// What the trail says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Events that wait to become durable.
    pub queued: usize,
    /// How many may wait.
    pub capacity: usize,
    /// Whether the last attempt to make events durable failed.
    pub failing: bool,
    /// Leaves whose use of keys has not been written yet.
    pub usage_backlog: usize,
    /// Leaves that no checkpoint covers yet.
    pub uncovered: u64,
    /// When the last checkpoint was signed.
    pub checkpoint: Option<Time>,
}

pub(super) type Waiter = oneshot::Sender<Result<u64, Error>>;

/// Events that wait to become one leaf, and whoever waits for that.
#[derive(Default)]
pub(super) struct Queued {
    pub(super) events: Filling,
    pub(super) waiters: Vec<Waiter>,
}

pub(super) struct State {
    /// Blocks in order; the last one takes what comes.
    pub(super) queue: VecDeque<Queued>,
    /// Bytes of queued events and of those in flight.
    pub(super) bytes: usize,
    /// The events taken from the queue that are not known to be durable.
    pub(super) in_flight: Arc<Block>,
    /// The block in flight can be no leaf before this one.
    pub(super) floor: Option<u64>,
    pub(super) closed: bool,
    pub(super) usage: Usage,
    pub(super) denials: Denials,
}

impl State {
    /// Events that wait to become durable.
    fn waiting(&self) -> usize {
        self.queue.iter().map(|q| q.events.len()).sum::<usize>() + self.in_flight.len()
    }

    /// The block that takes the next event, out of the queue.
    fn filling(&mut self, options: &Options) -> Queued {
        match self.queue.pop_back() {
            Some(last) if !last.is_full(options) => return last,
            full => self.queue.extend(full),
        }
        // Blocks that follow one another are of one size.
        let events = Filling::with_capacity(self.in_flight.bytes());
        Queued { events, waiters: Vec::new() }
    }
}

impl Queued {
    pub(super) fn is_full(&self, options: &Options) -> bool {
        self.events.len() >= options.block || self.events.bytes() >= BLOCK_BYTES
    }
}

pub(super) struct Inner {
    pub(super) vault: Arc<Vault>,
    pub(super) options: Options,
    pub(super) signer: Option<Arc<dyn Signer>>,
    pub(super) state: Mutex<State>,
    /// There is something in the queue.
    pub(super) wake: Notify,
    /// It should not linger: someone waits, or a block is full.
    pub(super) urgent: Notify,
    /// There are counted denials.
    pub(super) counted: Notify,
    pub(super) closing: CancellationToken,
    pub(super) failing: AtomicBool,
    /// Size of the last checkpoint.
    pub(super) checkpointed: AtomicU64,
    /// When it was signed, in microseconds; 0 if there is none.
    pub(super) checkpointed_at: AtomicI64,
    /// One checkpoint at a time.
    pub(super) signing: tokio::sync::Mutex<()>,
    /// One write-behind of usage at a time.
    pub(super) folding: tokio::sync::Mutex<()>,
    /// One trimming at a time.
    pub(super) trimming: tokio::sync::Mutex<()>,
    /// Before this leaf, all are known to be trimmed.
    pub(super) trimmed: AtomicU64,
}

impl Held for Inner {
    fn vault(&self) -> &Vault {
        &self.vault
    }

    fn with<T>(&self, f: impl FnOnce(&mut Usage) -> T) -> T {
        f(&mut self.state.lock().usage)
    }

    fn limit(&self) -> u64 {
        // The head first: a block that takes off between the two reads lands at or after it, and
        // one that lands between them is pending already.
        let leaves = self.vault.leaves();
        self.state.lock().floor.map_or(leaves, |floor| floor.min(leaves))
    }

    fn unsettled(&self, key: &[u8; 16], out: &mut Vec<Touch>) {
        let newest: Vec<Vec<u8>> = {
            let state = self.state.lock();
            let queued = state.queue.iter().flat_map(|q| q.events.events());
            let all = state.in_flight.events().chain(queued);
            let of_key = all.rev().filter(|(meaning, _)| meaning.is_about(key));
            of_key.take(usage::RECENT).map(|(_, encoded)| encoded.to_vec()).collect()
        };
        // Decoded while nobody waits for the lock.
        let events = newest.iter().rev().filter_map(|encoded| line::decode(encoded));
        out.extend(events.filter_map(|event| usage::touch(&event, u64::MAX)));
    }
}

/// The trail of one node. Dropped without [`Self::shutdown`], it forgets what is not durable, as a
/// killed process does.
pub struct Trail {
    pub(super) inner: Arc<Inner>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Trail {
    /// Applies what the log holds beyond the stored usage, and starts the tasks that make events
    /// durable, on the current runtime. There may be one trail for a vault.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::DataLoss`] if the log cannot be read.
    pub async fn start(
        vault: Arc<Vault>,
        options: Options,
        signer: Option<Arc<dyn Signer>>,
    ) -> Result<Self, Error> {
        let mark = usage::load_mark(&vault).await?;
        let latest = checkpoint::latest(&vault).await?;
        let (checkpointed, checkpointed_at) =
            latest.map_or((0, 0), |latest| (latest.size, latest.time.micros()));
        let options = Options {
            linger: options.linger.min(Duration::from_millis(50)),
            queue: options.queue.max(1),
            block: options.block.clamp(1, 2_048),
            checkpoint_leaves: options.checkpoint_leaves.max(1),
            ..options
        };
        let state = State {
            queue: VecDeque::new(),
            bytes: 0,
            in_flight: Arc::default(),
            floor: None,
            closed: false,
            usage: Usage::new(mark),
            denials: Denials::default(),
        };
        let inner = Arc::new(Inner {
            vault,
            options,
            signer,
            state: Mutex::new(state),
            wake: Notify::new(),
            urgent: Notify::new(),
            counted: Notify::new(),
            closing: CancellationToken::new(),
            failing: AtomicBool::new(false),
            checkpointed: AtomicU64::new(checkpointed),
            checkpointed_at: AtomicI64::new(checkpointed_at),
            signing: tokio::sync::Mutex::new(()),
            folding: tokio::sync::Mutex::new(()),
            trimming: tokio::sync::Mutex::new(()),
            trimmed: AtomicU64::new(0),
        });
        usage::flush(&*inner, false).await?;
        let tasks = vec![
            tokio::spawn(flush::blocks(Arc::clone(&inner))),
            tokio::spawn(flush::denials(Arc::clone(&inner))),
            tokio::spawn(flush::upkeep(Arc::clone(&inner))),
        ];
        Ok(Self { inner, tasks: Mutex::new(tasks) })
    }

    /// The vault underneath.
    #[must_use]
    pub fn vault(&self) -> &Arc<Vault> {
        &self.inner.vault
    }

    fn push(&self, event: &impl Entry, waiter: Option<Waiter>) -> Result<(), Error> {
        let inner = &*self.inner;
        let waits = waiter.is_some();
        let mut state = inner.state.lock();
        if state.closed {
            return Err(Error::unavailable("the audit trail is closed"));
        }
        if inner.vault.room() == Room::None {
            return Err(Error::NoRoom);
        }
        if state.waiting() >= inner.options.queue || state.bytes >= QUEUE_BYTES {
            return Err(Error::Exhausted { retry_after: Duration::from_millis(100) });
        }
        let idle = state.queue.is_empty();
        let mut block = state.filling(&inner.options);
        let (bytes, meaning) = block.events.push(event);
        block.waiters.extend(waiter);
        let full = block.is_full(&inner.options);
        state.queue.push_back(block);
        state.bytes += bytes;
        state.usage.accepted(&meaning);
        drop(state);
        if idle {
            inner.wake.notify_one();
        }
        if waits || full {
            inner.urgent.notify_one();
        }
        Ok(())
    }

    /// Accepts the event of an ordinary use of a key. It is durable a moment later; it is never
    /// dropped.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if too many events wait already, [`Error::NoRoom`] if the disk is full,
    /// [`Error::Unavailable`] after [`Self::shutdown`]: the use must be refused then.
    pub fn data_plane(&self, event: impl Entry) -> Result<(), Error> {
        self.push(&event, None)
    }

    /// As [`Self::data_plane`], and waits until the event is durable. Returns the index of its leaf.
    ///
    /// # Errors
    /// As [`Self::data_plane`]; [`Error::OutcomeUnknown`] if the trail ended before it could tell.
    pub async fn data_plane_durable(&self, event: impl Entry) -> Result<u64, Error> {
        let (waiter, durable) = oneshot::channel();
        self.push(&event, Some(waiter))?;
        durable.await.map_err(|_| Error::OutcomeUnknown {
            internal: "the audit trail ended before the event was known to be durable".into(),
        })?
    }

    /// The event of an ordinary use of a key, waiting or not as the configuration says.
    ///
    /// # Errors
    /// As [`Self::data_plane_durable`].
    pub async fn used(&self, event: impl Entry + Send) -> Result<(), Error> {
        match self.inner.options.data_plane {
            DataPlane::Buffered => self.data_plane(event),
            DataPlane::Durable => Box::pin(self.data_plane_durable(event)).await.map(drop),
        }
    }

    /// Records a security-relevant event that changes nothing (a login, an export, material leaving
    /// in the clear): durable when this returns. Returns the index of its leaf.
    ///
    /// # Errors
    /// As [`Vault::record`]; the operation must be refused then.
    pub async fn record(&self, event: impl Into<AuditEvent> + Send) -> Result<u64, Error> {
        let event = event.into();
        let receipt = self.inner.vault.record(std::slice::from_ref(&event)).await?;
        let leaf = receipt.leaf.ok_or_else(|| Error::internal("an event became no leaf"))?;
        self.observed(leaf, &event);
        Ok(leaf)
    }

    /// Records a denial. Within the burst of its source it is durable when this returns; beyond it
    /// it is counted, and the count is durable within a second.
    ///
    /// # Errors
    /// As [`Self::record`]; the call is refused one way or the other.
    pub async fn denied(&self, event: impl Into<AuditEvent> + Send) -> Result<(), Error> {
        let burst = self.inner.options.denial_burst;
        let verdict = {
            let mut state = self.inner.state.lock();
            if state.closed {
                return Err(Error::unavailable("the audit trail is closed"));
            }
            state.denials.admit(event.into(), burst, Instant::now())
        };
        match verdict {
            Verdict::Alone(event) => self.record(*event).await.map(drop),
            Verdict::Counted => {
                self.inner.counted.notify_one();
                Ok(())
            }
        }
    }

    /// To be called with the event of a committed mutation and the index of its leaf
    /// ([`crate::vault::Receipt::leaf`], one more for each further event of the same transaction),
    /// so that [`Self::usage`] shows it at once. If it is not, the log is read a moment later.
    pub fn observed(&self, leaf: u64, event: &AuditEvent) {
        self.inner.state.lock().usage.observed(leaf, event);
    }

    /// How often and when a key was used, every accepted event included. Usually answered from
    /// memory.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn access(&self, key: &KeyId) -> Result<Access, Error> {
        usage::access(&*self.inner, &key.bytes()).await
    }

    /// As [`Self::access`], for several keys whose ids ascend, each for itself, with the stored figures of the rows
    /// that `at` shows.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub(crate) async fn access_many(
        &self,
        at: &(Box<dyn Snapshot>, Arc<Ring>),
        keys: &[KeyId],
    ) -> Result<Vec<Result<Access, Error>>, Error> {
        usage::access_many(&*self.inner, at, keys).await
    }

    /// As [`Self::access`], with the last 32 events of the key, oldest first. An event that has no
    /// leaf yet has `u64::MAX` for its index. That a key was made is not among them: its record says it,
    /// so that creating a key need not write a row more.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn usage(&self, key: &KeyId) -> Result<UsageRecord, Error> {
        usage::full(&*self.inner, &key.bytes()).await
    }

    /// The size of the newest checkpoint that this node has signed or found at its start.
    pub(super) fn checkpointed(&self) -> u64 {
        self.inner.checkpointed.load(Ordering::Relaxed)
    }

    /// What the trail says about itself, for health and metrics.
    #[must_use]
    pub fn status(&self) -> Status {
        let signed = self.inner.checkpointed.load(Ordering::Relaxed);
        let uncovered = self.inner.vault.leaves().saturating_sub(signed);
        let state = self.inner.state.lock();
        Status {
            queued: state.waiting(),
            capacity: self.inner.options.queue,
            failing: self.inner.failing.load(Ordering::Relaxed),
            usage_backlog: state.usage.backlog(),
            uncovered,
            checkpoint: Time::optional(self.inner.checkpointed_at.load(Ordering::Relaxed)),
        }
    }

    /// Refuses further events, makes those that wait durable, writes the use of keys and signs a
    /// last checkpoint.
    ///
    /// # Errors
    /// [`Error::DeadlineExceeded`] if that took longer than `limit`; whatever the store said.
    pub async fn shutdown(&self, limit: Duration) -> Result<(), Error> {
        self.inner.state.lock().closed = true;
        self.inner.closing.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
        let finish = async {
            for task in tasks {
                task.await.map_err(|e| Error::internal(format!("a task of the trail: {e}")))?;
            }
            flush::usage(&self.inner, true).await?;
            self.checkpoint().await.map(drop)
        };
        let result = tokio::time::timeout(limit, finish).await;
        for abort in aborts {
            abort.abort();
        }
        result.map_err(|_| Error::DeadlineExceeded)?
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        for task in self.tasks.lock().drain(..) {
            task.abort();
        }
    }
}

impl std::fmt::Debug for Trail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trail").field("status", &self.status()).finish_non_exhaustive()
    }
}
