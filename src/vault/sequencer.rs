//! One thread that forms commit groups: it drains the queue, lets the store commit what holds, and
//! tells the caches before it tells the callers.
//!
//! There is no timer: while one group is being synced to disk the next one gathers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use polykey_hsm::Ring;
use polykey_storage::{Abort, Commit, CommitError, Committed, Health, Revision, RowKey, Store};
use tokio::sync::{mpsc, oneshot};

use super::head::{Head, LeafEvents, Leaves, RootMoved, Sealing};
use super::{Invalidate, Metrics, load_head, publish};
use crate::error::Error;
use crate::time::Clock;

/// Most commits in one group; the queue holds four groups before callers are refused.
const GROUP: usize = 256;
const QUEUE: usize = 4 * GROUP;
/// A group stops growing here, in bytes, far below what the store takes.
const GROUP_BYTES: usize = 8 * 1024 * 1024;

/// The largest single commit, in bytes: together with a group that has just not stopped growing it
/// stays below what the store takes, so that it cannot take others with it.
const COMMIT_BYTES: usize = 48 * 1024 * 1024;

/// How often a group is formed anew because another node was faster.
const OVERTAKEN: usize = 8;

/// Whether another node was faster than a group, which was not applied.
fn overtaken(error: &CommitError) -> bool {
    #[cfg(feature = "postgres")]
    if let CommitError::Aborted(reason) = error {
        return reason.downcast_ref::<polykey_storage::postgres::Overtaken>().is_some();
    }
    let _ = error;
    false
}

/// A change that waits for its group.
pub(crate) struct Proposal {
    pub(crate) commit: Commit,
    /// What becomes a leaf each.
    pub(crate) events: Vec<LeafEvents>,
    /// By how much it changes the number of enabled keys.
    pub(crate) enabled: i64,
    /// The oldest epoch under which it has sealed or wrapped anything.
    pub(crate) oldest_epoch: u32,
    pub(crate) reply: oneshot::Sender<Result<Receipt, Error>>,
}

/// What an acknowledged change became.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The revision that holds it.
    pub revision: Revision,
    /// Index of its first audit leaf, if it had events.
    pub leaf: Option<u64>,
}

/// The way to the writer thread.
#[derive(Clone)]
pub(crate) struct Sequencer {
    queue: mpsc::Sender<Proposal>,
    nudged: Arc<AtomicBool>,
}

pub(crate) struct Writer {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) ring: Arc<ArcSwap<Ring>>,
    pub(crate) node_id: [u8; 16],
    pub(crate) counter: Arc<AtomicU64>,
    pub(crate) head: Head,
    pub(crate) published: Arc<ArcSwap<Head>>,
    pub(crate) caches: Arc<dyn Invalidate>,
    pub(crate) writable: Arc<AtomicBool>,
    /// Nothing is written under an epoch below this one any more.
    pub(crate) fence: Arc<AtomicU32>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) clock: Clock,
    /// Whether a proposal of [`Sequencer::nudge`] waits.
    pub(crate) nudged: Arc<AtomicBool>,
    /// Other nodes write to the store.
    pub(crate) shared: bool,
}

impl Sequencer {
    /// Starts the writer thread; it ends when the last `Sequencer` is dropped, after committing
    /// what is queued.
    pub(crate) fn start(writer: Writer) -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let nudged = Arc::clone(&writer.nudged);
        let thread = std::thread::Builder::new()
            .name("polykey-writer".into())
            .spawn(move || writer.run(receiver))?;
        Ok((Self { queue, nudged }, thread))
    }

    /// Changes that wait, and how many may.
    pub(crate) fn queued(&self) -> (usize, usize) {
        let most = self.queue.max_capacity();
        (most.saturating_sub(self.queue.capacity()), most)
    }

    /// Has the writer find out whether the store must be reopened. Only the writer reopens it, and
    /// after a failed read nothing else would reach it, where every change begins with a read.
    pub(crate) fn nudge(&self) {
        if self.nudged.swap(true, Ordering::AcqRel) {
            return;
        }
        let (reply, _) = oneshot::channel();
        let commit = Commit::new();
        let empty = Proposal { commit, events: vec![], enabled: 0, oldest_epoch: u32::MAX, reply };
        if self.queue.try_send(empty).is_err() {
            self.nudged.store(false, Ordering::Release);
        }
    }

    pub(crate) async fn submit(
        &self,
        commit: Commit,
        events: Vec<LeafEvents>,
        enabled: i64,
        oldest_epoch: u32,
    ) -> Result<Receipt, Error> {
        // A commit over the store's limits would take its group with it.
        let size = commit.size().map_err(|e| Error::invalid("request", e.to_string()))?;
        if size > COMMIT_BYTES {
            return Err(Error::invalid("request", "changes more than 48 MiB at once"));
        }
        let (reply, answer) = oneshot::channel();
        self.queue.try_send(Proposal { commit, events, enabled, oldest_epoch, reply }).map_err(
            |e| match e {
                mpsc::error::TrySendError::Full(_) => {
                    Error::Exhausted { retry_after: Duration::from_millis(100) }
                }
                mpsc::error::TrySendError::Closed(_) => {
                    Error::unavailable("the writer has stopped")
                }
            },
        )?;
        answer.await.map_err(|_| Error::OutcomeUnknown {
            internal: "the writer stopped before it answered".into(),
        })?
    }
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Proposal>) {
        while let Some(first) = queue.blocking_recv() {
            let mut bytes = first.commit.size().unwrap_or(0);
            let mut group = vec![first];
            while group.len() < GROUP && bytes < GROUP_BYTES {
                let Ok(next) = queue.try_recv() else { break };
                bytes = bytes.saturating_add(next.commit.size().unwrap_or(0));
                group.push(next);
            }
            self.nudged.store(false, Ordering::Release);
            self.commit(group);
            if !self.writable.load(Ordering::Acquire) {
                self.recover(&mut queue);
            }
        }
    }

    fn commit(&mut self, group: Vec<Proposal>) {
        let mut commits = Vec::with_capacity(group.len());
        let mut events = Vec::with_capacity(group.len());
        let mut enabled = Vec::with_capacity(group.len());
        let mut replies = Vec::with_capacity(group.len());
        let mut oldest = u32::MAX;
        let fence = self.fence.load(Ordering::SeqCst);
        for Proposal { commit, events: of_commit, enabled: delta, oldest_epoch, reply } in group {
            if oldest_epoch < fence {
                // It began before the last rotation and would outlive the key it is sealed under.
                let _ = reply.send(Err(Error::Conflict));
                continue;
            }
            oldest = oldest.min(oldest_epoch);
            commits.push(commit);
            events.push(of_commit);
            enabled.push(delta);
            replies.push(reply);
        }
        if commits.is_empty() {
            return;
        }
        let rows: Vec<Vec<RowKey>> =
            commits.iter().map(|c| c.writes.iter().map(|w| w.row().clone()).collect()).collect();
        let began = Instant::now();
        let (result, head, leaves) = self.attempt(commits, events, (enabled, oldest));
        let took = began.elapsed();
        match result {
            Ok(committed) => {
                if committed.any() {
                    self.head = head;
                    publish(&self.published, &self.head);
                    let commits = committed.outcomes.iter().filter(|o| o.is_ok()).count();
                    self.metrics.group(commits, took);
                }
                // Every cache forgets before any caller hears: what starts after the answer
                // cannot meet the old row.
                let accepted = committed.outcomes.iter().zip(&rows).filter(|(o, _)| o.is_ok());
                let written: Vec<&RowKey> = accepted.flat_map(|(_, rows)| rows).collect();
                self.caches.invalidate(&written);
                for ((outcome, leaves), reply) in
                    committed.outcomes.into_iter().zip(leaves).zip(replies)
                {
                    let answer = match outcome {
                        Ok(()) => Ok(Receipt { revision: committed.revision, leaf: leaves.first }),
                        Err(_) => Err(Error::Conflict),
                    };
                    // A caller that has gone away has its change all the same.
                    let _ = reply.send(answer);
                }
            }
            Err(error) => {
                let answer = self.failed(&error);
                for reply in replies {
                    let _ = reply.send(Err(answer.clone()));
                }
            }
        }
    }

    /// Commits a group; again where another node was faster, as long as that takes.
    fn attempt(
        &self,
        commits: Vec<Commit>,
        events: Vec<Vec<LeafEvents>>,
        (enabled, oldest): (Vec<i64>, u32),
    ) -> (Result<Committed, CommitError>, Head, Vec<Leaves>) {
        let mut again = self.shared.then(|| (commits.clone(), events.clone()));
        let mut group = (commits, events);
        for _ in 0..OVERTAKEN {
            let (commits, events) = group;
            let (result, head, leaves) = self.once(commits, events, (enabled.clone(), oldest));
            let overtaken = matches!(&result, Err(error) if overtaken(error));
            match again.clone().filter(|_| overtaken) {
                Some(next) => group = next,
                None => return (result, head, leaves),
            }
        }
        let (commits, events) = again.take().unwrap_or_default();
        self.once(commits, events, (enabled, oldest))
    }

    fn once(
        &self,
        commits: Vec<Commit>,
        events: Vec<Vec<LeafEvents>>,
        (enabled, oldest): (Vec<i64>, u32),
    ) -> (Result<Committed, CommitError>, Head, Vec<Leaves>) {
        let ring = self.ring.load_full();
        // After the ring: on top of a head of its epoch nothing of an earlier one comes.
        if self.shared && oldest < self.fence.load(Ordering::SeqCst) {
            let moved = CommitError::Aborted(Abort::new(RootMoved));
            return (Err(moved), self.head.clone(), vec![Leaves::default(); events.len()]);
        }
        let sealer = ring.sealer();
        let mut sealing = Sealing {
            ring: &ring,
            sealer: &sealer,
            node_id: self.node_id,
            counter: &self.counter,
            head: self.head.clone(),
            leaves: vec![Leaves::default(); events.len()],
            events,
            enabled,
            now: self.clock.now(),
            shared: self.shared,
        };
        let result = futures::executor::block_on(self.store.commit(commits, &mut sealing));
        let Sealing { head, leaves, .. } = sealing;
        (result, head, leaves)
    }

    /// What callers hear of a group that failed; stops writing where the store must be reopened.
    fn failed(&self, error: &CommitError) -> Error {
        self.metrics.failed();
        match error {
            CommitError::OutcomeUnknown(cause) => {
                tracing::error!(%cause, "the outcome of a commit is unknown; reopening the store");
                self.writable.store(false, Ordering::Release);
                Error::OutcomeUnknown { internal: cause.to_string() }
            }
            CommitError::ReadOnly | CommitError::Store(_) => {
                // What closed it may have failed nothing: then nobody else has told of it.
                let cause = match self.store.status().health {
                    Health::NeedsReopen(cause) => cause.to_string(),
                    Health::Ready => String::new(),
                };
                tracing::error!(%error, cause, "the store refused a commit; reopening it");
                self.writable.store(false, Ordering::Release);
                Error::unavailable(error.to_string())
            }
            CommitError::TooLarge(_) => Error::invalid("request", error.to_string()),
            // Nothing was applied.
            CommitError::Aborted(reason) if reason.downcast_ref::<RootMoved>().is_some() => {
                Error::unavailable("another node has rotated the root key; it is being opened here")
            }
            CommitError::Aborted(_) if overtaken(error) => {
                Error::unavailable("other nodes were faster again and again")
            }
            CommitError::Aborted(reason) => Error::data_loss(format!("group aborted: {reason}")),
        }
    }

    /// Reopens the store, drops every cache and reads the head again; until that has worked, each
    /// proposal is refused. Nothing is guessed.
    fn recover(&mut self, queue: &mut mpsc::Receiver<Proposal>) {
        let mut pause = Duration::from_millis(20);
        loop {
            match self.reload() {
                Ok(()) => {
                    self.writable.store(true, Ordering::Release);
                    tracing::info!("the store is open again");
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "the store cannot be reopened yet");
                    // What is unknown may be in force, and this may take long.
                    self.caches.clear();
                }
            }
            let until = Instant::now() + pause;
            while Instant::now() < until {
                match queue.try_recv() {
                    Ok(proposal) => {
                        let away = Error::unavailable("the store is being reopened");
                        let _ = proposal.reply.send(Err(away));
                    }
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                    Err(mpsc::error::TryRecvError::Empty) => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    fn reload(&mut self) -> Result<(), String> {
        futures::executor::block_on(async {
            self.store.reopen().await.map_err(|e| e.to_string())?;
            self.caches.clear();
            let ring = self.ring.load_full();
            let head = load_head(&*self.store, &ring.sealer())
                .await
                .map_err(|e| e.internal_text().map_or_else(|| e.to_string(), str::to_owned))?;
            if !self.shared {
                self.counter.fetch_max(head.counter, Ordering::SeqCst);
            }
            self.head = head;
            self.published.store(Arc::new(self.head.clone()));
            Ok(())
        })
    }
}
