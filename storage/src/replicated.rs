//! A store that ships what is committed to it to another one, while it serves.
//!
//! A thread of its own keeps the target a [`Replica`](crate::replica::Replica): it goes on from what is
//! durable there, after whatever interruption, and never holds more than one group of rows in memory.
//! [`Mode`] says whether a commit waits for it.
//!
//! **Fencing.** The epoch under which the target was first shipped to stands in the source, in a row of
//! [`SPACE`](crate::replica::SPACE), and is pinned from then on. Once the target is under another one, or
//! was promoted, this store is *fenced*: it notes so durably, ships nothing any more and takes nothing any
//! more but what [`Options::goes_on`] lets through. What it had committed and not shipped is a history of
//! its own, and stays here.

mod local;
mod shipping;

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::{
    Changes, ChangesError, Commit, CommitError, Committed, Direction, Entry, Finish, Health,
    KeyRange, OpenError, ReadError, ReopenError, Revision, RowKey, Snapshot, Space, Store,
    StoreError, StoreStatus,
};

/// How far apart the times are that lag is measured by.
const SAMPLE: Duration = Duration::from_millis(50);
/// Most of them, and most notices that wait to be taken.
const KEPT: usize = 4096;

/// When a commit is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// When it is durable here. The target follows.
    Async,
    /// When it is durable here and on the target.
    Sync(WhenAway),
}

/// What a synchronous store does while its target takes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenAway {
    /// Refuses commits, before anything is applied.
    Refuse,
    /// Goes on alone, and returns to waiting once the target has caught up.
    Degrade,
}

/// How a store is shipped. None of it is part of the store.
#[derive(Clone, Debug)]
pub struct Options {
    /// The target, for messages.
    pub target: String,
    /// When a commit is acknowledged.
    pub mode: Mode,
    /// How long a commit waits for the target; after as long without it, the target is away.
    pub timeout: Duration,
    /// How often a target is asked to which there is nothing to ship: by then a promotion is noticed.
    pub probe: Duration,
    /// The rows that are written here even when this store is fenced, to keep on reading; none if absent.
    /// They are shipped no more than the others.
    pub goes_on: Option<fn(&RowKey) -> bool>,
}

/// A target that was opened.
pub struct Opened {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The epoch that it is written under.
    pub epoch: u64,
}

/// Opens the target, to be written under this epoch, or under the one it has.
pub type Opener = Box<dyn Fn(Option<u64>) -> Result<Opened, OpenError> + Send>;

/// A store whose target was promoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fenced {
    /// The epoch that this store wrote under.
    pub own: u64,
    /// The epoch of the target.
    pub current: u64,
    /// The last revision that the target has of this store.
    pub shipped: Revision,
    /// The last revision of this store when it learned so. What is between the two is here alone.
    pub last: Revision,
}

impl Fenced {
    /// How many revisions are in no other store.
    #[must_use]
    pub fn diverged(&self) -> u64 {
        self.last.0.saturating_sub(self.shipped.0)
    }
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { own, current, shipped, last } = self;
        write!(
            f,
            "this node is fenced: its replication target was promoted and is the writer now (epoch \
             {current}; this node wrote under {own})"
        )?;
        match self.diverged() {
            0 => write!(f, ". Nothing that it acknowledged is missing there"),
            n => write!(
                f,
                ". The target has its revision {shipped}; the {n} after that, up to {last}, are here \
                 alone and are not shipped"
            ),
        }
    }
}

/// How the target is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Not asked yet.
    Connecting,
    /// A first copy or a long backlog is being shipped: the target stands between two revisions.
    Copying,
    /// It is a revision of this store, and follows.
    Following,
    /// It takes nothing, for this reason. Tried again and again.
    Away(String),
    /// It is no target for this store, for this reason.
    Refused(String),
    /// It is the writer now.
    Fenced(Fenced),
}

/// How shipping stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shipping {
    /// The target, for messages.
    pub target: String,
    /// When commits are acknowledged.
    pub mode: Mode,
    /// How the target is.
    pub link: Link,
    /// Whether commits wait for the target. Never in [`Mode::Async`].
    pub synced: bool,
    /// Whether reading goes on when this store is fenced.
    pub reads_on: bool,
    /// The last revision of this store.
    pub revision: Revision,
    /// The last revision that the target has been, whole.
    pub shipped: Revision,
    /// How long the oldest revision that is not on the target has been here, or since the start if it
    /// is older. Zero if there is none.
    pub behind: Duration,
    /// How long the target has taken nothing, or not been a revision of this store.
    pub away: Duration,
}

impl Shipping {
    /// How many revisions the target lacks.
    #[must_use]
    pub fn lag(&self) -> u64 {
        self.revision.0.saturating_sub(self.shipped.0)
    }
}

/// What an operator will want to find in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Commits are acknowledged without the target, which [`WhenAway::Degrade`] allows.
    Degraded {
        /// From after this revision on.
        after: Revision,
        /// Why.
        reason: String,
    },
    /// Commits wait for the target again, which has everything up to this revision.
    Restored {
        /// The revision.
        at: Revision,
    },
    /// The target was promoted.
    Fenced(Fenced),
}

/// Why a store does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The target takes nothing, and nothing may be committed without it.
    #[error("{0}")]
    Away(String),
    /// The target is none for this store.
    #[error("{0}")]
    Refused(String),
    /// This store is fenced.
    #[error("{0}")]
    Fenced(Fenced),
    /// The store here cannot be read.
    #[error("{0}")]
    Store(StoreError),
}

/// Whether a store has learned that its target was promoted, whether or not it is shipped now.
///
/// # Errors
/// [`StoreError`] if it is not read.
pub fn fenced(store: &dyn Store) -> Result<Option<Fenced>, StoreError> {
    Ok(local::read(store)?.and_then(|known| known.fenced))
}

/// A store, and the thread that ships it. Dropped, it ships no more.
pub struct Replicated {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn Store>,
    options: Options,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    link: Link,
    synced: bool,
    degraded: bool,
    stopping: bool,
    latest: Revision,
    shipped: Revision,
    // Since when the target takes nothing.
    away: Option<Instant>,
    // When revisions were committed, oldest first, of those that are not shipped.
    samples: VecDeque<(Revision, Instant)>,
    // When the last one was committed that is shipped.
    since: Instant,
    notices: VecDeque<Notice>,
}

impl State {
    fn notice(&mut self, notice: Notice) {
        self.notices.truncate(KEPT - 1);
        self.notices.push_back(notice);
    }

    fn sample(&mut self, revision: Revision) {
        self.latest = self.latest.max(revision);
        let now = Instant::now();
        let far = self.samples.back().is_none_or(|(_, last)| now.duration_since(*last) >= SAMPLE);
        if far && self.samples.len() < KEPT {
            self.samples.push_back((revision, now));
        }
    }
}

impl fmt::Debug for Replicated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicated").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

impl Replicated {
    /// Ships `store` from now on. Nothing is asked of the target yet.
    ///
    /// # Errors
    /// [`NotReady::Store`] if the store is not read or the system gives no thread.
    pub fn start(
        store: Arc<dyn Store>,
        options: Options,
        opener: Opener,
    ) -> Result<Self, NotReady> {
        let latest = store.status().revision;
        let known = local::read(store.as_ref()).map_err(NotReady::Store)?;
        let fenced = known.and_then(|known| known.fenced);
        let mut samples = VecDeque::new();
        samples.push_back((latest, Instant::now()));
        let state = State {
            link: fenced.map_or(Link::Connecting, Link::Fenced),
            synced: false,
            degraded: false,
            stopping: false,
            latest,
            shipped: fenced.map_or(Revision::EMPTY, |fenced| fenced.shipped),
            away: None,
            samples,
            since: Instant::now(),
            notices: VecDeque::new(),
        };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { store, options, state, changed });
        if fenced.is_none() {
            let shipped = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("polykey-replication".into())
                .spawn(move || shipping::run(&shipped, &opener))
                .map_err(|error| NotReady::Store(error.into()))?;
        }
        Ok(Self { shared })
    }

    /// Whether a revision that is durable here may be acknowledged: waits for the target as the commit of
    /// it does. For a request that finds its change made by a call that was not answered. Blocks for the
    /// timeout at most.
    ///
    /// # Errors
    /// [`CommitError::OutcomeUnknown`].
    pub fn confirmed(&self, revision: Revision) -> Result<(), CommitError> {
        self.shared.confirm(revision, false)
    }

    /// Waits until commits can be taken as the mode wants it. Blocks: for as long as a first copy or a
    /// backlog takes, where nothing may be committed without the target.
    ///
    /// # Errors
    /// [`NotReady`].
    pub fn ready(&self) -> Result<(), NotReady> {
        let Shared { options, changed, .. } = &*self.shared;
        let until = Instant::now() + options.timeout;
        let mut state = self.shared.state.lock();
        loop {
            match (&state.link, options.mode) {
                (Link::Fenced(fenced), _) if options.goes_on.is_none() => {
                    return Err(NotReady::Fenced(*fenced));
                }
                (Link::Refused(why), _) => return Err(NotReady::Refused(why.clone())),
                (Link::Away(why), Mode::Sync(WhenAway::Refuse)) => {
                    return Err(NotReady::Away(why.clone()));
                }
                (Link::Fenced(_), _)
                | (Link::Away(_) | Link::Copying | Link::Following, Mode::Async) => return Ok(()),
                (Link::Away(_) | Link::Copying, Mode::Sync(WhenAway::Degrade)) => {
                    self.shared.alone(&mut state);
                    return Ok(());
                }
                (Link::Following, Mode::Sync(_)) if state.synced => return Ok(()),
                (Link::Connecting, Mode::Async) => {
                    if changed.wait_until(&mut state, until).timed_out() {
                        return Ok(());
                    }
                }
                (Link::Connecting | Link::Copying | Link::Following, _) => changed.wait(&mut state),
            }
        }
    }

    /// Waits until the target has everything, as long as it takes something, and at most so long. Blocks.
    pub fn settle(&self, at_most: Duration) {
        let until = Instant::now() + at_most;
        let mut state = self.shared.state.lock();
        while matches!(state.link, Link::Following | Link::Copying) && state.shipped < state.latest
        {
            if self.shared.changed.wait_until(&mut state, until).timed_out() {
                return;
            }
        }
    }

    /// How shipping stands.
    #[must_use]
    pub fn shipping(&self) -> Shipping {
        let state = self.shared.state.lock();
        let behind = if state.shipped >= state.latest {
            Duration::ZERO
        } else {
            state.samples.front().map_or(state.since, |(_, at)| *at).elapsed()
        };
        Shipping {
            target: self.shared.options.target.clone(),
            reads_on: self.shared.options.goes_on.is_some(),
            away: state.away.map_or(Duration::ZERO, |since| since.elapsed()),
            mode: self.shared.options.mode,
            link: state.link.clone(),
            synced: state.synced,
            revision: state.latest,
            shipped: state.shipped,
            behind,
        }
    }

    /// What has happened since the last call.
    pub fn notices(&self) -> Vec<Notice> {
        self.shared.state.lock().notices.drain(..).collect()
    }

    /// Why this commit would be refused now, before anything of it is applied.
    #[must_use]
    pub fn refuses(&self, commit: &Commit) -> Option<StoreError> {
        self.shared.refuses(std::slice::from_ref(commit)).err()
    }
}

impl Drop for Replicated {
    fn drop(&mut self) {
        self.shared.state.lock().stopping = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    // Whether all of it may be written once this node is fenced.
    fn goes_on(&self, group: &[Commit]) -> bool {
        self.options.goes_on.is_some_and(|goes_on| {
            group.iter().flat_map(|commit| &commit.writes).all(|write| goes_on(write.row()))
        })
    }

    fn refuses(&self, group: &[Commit]) -> Result<(), StoreError> {
        let state = self.state.lock();
        if let Link::Fenced(Fenced { own, current, .. }) = state.link {
            let fenced = StoreError::Fenced { own, current };
            return if self.goes_on(group) { Ok(()) } else { Err(fenced) };
        }
        if self.options.mode == Mode::Sync(WhenAway::Refuse) && !state.synced {
            return Err(self.missing(&state, "nothing is committed without it"));
        }
        Ok(())
    }

    fn missing(&self, state: &State, then: &str) -> StoreError {
        let target = &self.options.target;
        let why = match &state.link {
            Link::Connecting => "it was not reached yet",
            Link::Copying | Link::Following => "it is still catching up",
            Link::Away(why) | Link::Refused(why) => why,
            Link::Fenced(_) => "it was promoted",
        };
        StoreError::Unreachable(format!("the replication target {target}: {why}; {then}"))
    }

    // A commit is durable here: whether it may be acknowledged.
    // `goes_on`: what it wrote may be written once this node is fenced.
    fn confirm(&self, revision: Revision, goes_on: bool) -> Result<(), CommitError> {
        let mut state = self.state.lock();
        state.sample(revision);
        self.changed.notify_all();
        let Mode::Sync(when_away) = self.options.mode else { return Ok(()) };
        let until = Instant::now() + self.options.timeout;
        loop {
            match state.link {
                _ if state.shipped >= revision => return Ok(()),
                Link::Fenced(_) if goes_on => return Ok(()),
                Link::Fenced(Fenced { own, current, .. }) => {
                    state.synced = false;
                    let fenced = StoreError::Fenced { own, current };
                    return Err(CommitError::OutcomeUnknown(fenced));
                }
                _ if when_away == WhenAway::Degrade && !state.synced => return Ok(()),
                _ => {}
            }
            if self.changed.wait_until(&mut state, until).timed_out() && state.shipped < revision {
                state.synced = false;
                if when_away == WhenAway::Degrade {
                    self.alone(&mut state);
                    return Ok(());
                }
                let then = "the commit is durable here, and not known to be there";
                return Err(CommitError::OutcomeUnknown(self.missing(&state, then)));
            }
        }
    }

    // From now on commits do not wait.
    fn alone(&self, state: &mut MutexGuard<'_, State>) {
        state.synced = false;
        if !state.degraded {
            state.degraded = true;
            let reason = self.missing(state, "commits do not wait for it").to_string();
            let after = state.shipped;
            state.notice(Notice::Degraded { after, reason });
        }
        self.changed.notify_all();
    }
}

impl Store for Replicated {
    fn snapshot(&self) -> BoxFuture<'_, Result<Box<dyn Snapshot>, ReadError>> {
        self.shared.store.snapshot()
    }

    fn commit<'a>(
        &'a self,
        group: Vec<Commit>,
        finish: &'a mut dyn Finish,
    ) -> BoxFuture<'a, Result<Committed, CommitError>> {
        Box::pin(async move {
            self.shared.refuses(&group).map_err(CommitError::Store)?;
            let goes_on = self.shared.goes_on(&group);
            let committed = self.shared.store.commit(group, finish).await?;
            if committed.any() {
                self.shared.confirm(committed.revision, goes_on)?;
            }
            Ok(committed)
        })
    }

    fn changes(
        &self,
        after: Revision,
        limit: usize,
    ) -> BoxFuture<'_, Result<Changes, ChangesError>> {
        self.shared.store.changes(after, limit)
    }

    // A store that is sound is not closed because its target is away: that is waited for.
    fn reopen(&self) -> BoxFuture<'_, Result<Revision, ReopenError>> {
        Box::pin(async move {
            let store = &self.shared.store;
            let revision = match store.status() {
                StoreStatus { health: Health::Ready, revision, .. } => revision,
                _ => store.reopen().await?,
            };
            let Shared { options, changed, .. } = &*self.shared;
            let refused =
                |error| Err(OpenError::Store { path: options.target.clone().into(), error });
            let until = Instant::now() + options.timeout;
            let mut state = self.shared.state.lock();
            state.latest = state.latest.max(revision);
            loop {
                match state.link {
                    Link::Fenced(Fenced { own, current, .. }) if options.goes_on.is_none() => {
                        return refused(StoreError::Fenced { own, current });
                    }
                    Link::Fenced(_) => return Ok(revision),
                    _ if options.mode != Mode::Sync(WhenAway::Refuse) || state.synced => {
                        return Ok(revision);
                    }
                    _ => {}
                }
                if changed.wait_until(&mut state, until).timed_out() && !state.synced {
                    let missing = self.shared.missing(&state, "nothing is committed without it");
                    return refused(missing);
                }
            }
        })
    }

    fn status(&self) -> StoreStatus {
        self.shared.store.status()
    }

    fn get<'a>(
        &'a self,
        space: Space,
        key: &'a [u8],
    ) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        self.shared.store.get(space, key)
    }

    fn scan(
        &self,
        space: Space,
        range: KeyRange,
        direction: Direction,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Entry>, ReadError>> {
        self.shared.store.scan(space, range, direction, limit)
    }
}
