//! The thread that ships: opens the target, steps, and tells what came of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::executor::block_on;

use super::{
    Fenced, Link, Mode, Notice, Opened, Opener, Shared, State, WhenAway,
    local::{self, Known},
};
use crate::{
    CommitError, Health, OpenError, Revision, Store, StoreError,
    replica::{self, Replica, ReplicaError, Step},
};

const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a target that is none is left alone.
const REFUSED: Duration = Duration::from_secs(5);
/// The size at which a group is closed, in bytes: halved where the target is too slow for it.
const GROUP: usize = 8 * 1024 * 1024;
const SMALLEST_GROUP: usize = 256 * 1024;

/// Why there is nothing to ship for a while.
enum Trouble {
    Away(String),
    Refused(String),
    Fenced(Fenced),
}

/// Ships until the store is dropped or fenced.
pub(super) fn run(shared: &Arc<Shared>, opener: &Opener) {
    let mut pause = PAUSE;
    let mut group = GROUP;
    let mut session = None;
    while !shared.state.lock().stopping {
        let opened = match session.take() {
            Some(session) => Ok(session),
            None => Session::open(shared, opener),
        };
        let (kept, trouble) = match opened {
            Ok(open) => {
                let Some(trouble) = open.ship(shared, &mut group, &mut pause) else { return };
                (Some(open), trouble)
            }
            Err(trouble) => (None, trouble),
        };
        let rest = match trouble {
            Trouble::Fenced(fenced) => return shared.fence(fenced),
            Trouble::Refused(why) => {
                shared.stopped(Link::Refused(why));
                REFUSED
            }
            Trouble::Away(why) => {
                shared.stopped(Link::Away(why));
                pause = (pause * 2).min(LONGEST_PAUSE);
                pause
            }
        };
        session = kept;
        shared.rest(rest);
    }
}

/// A target that is open.
struct Session {
    // The store that is shipped.
    source: [u8; 16],
    known: Known,
    target: Arc<dyn Store>,
}

impl Session {
    fn open(shared: &Shared, opener: &Opener) -> Result<Self, Trouble> {
        let here =
            |error: &dyn std::fmt::Display| Trouble::Away(format!("the store here: {error}"));
        let known = local::read(shared.store.as_ref()).map_err(|error| here(&error))?;
        let mut opened = opener(known.map(|known| known.epoch)).map_err(unopened)?;
        let id = opened.store.status().id;
        let known = match known {
            Some(known) if known.target == id => known,
            other => {
                if other.is_some() {
                    // The epoch was that of another target.
                    opened = opener(None).map_err(unopened)?;
                }
                let known =
                    Known { target: opened.store.status().id, epoch: opened.epoch, fenced: None };
                // Before anything is shipped: whoever is fenced later knows by what.
                let written = local::write(shared.store.as_ref(), &known);
                let revision = written.map_err(|error| here(&error))?;
                shared.state.lock().sample(revision);
                known
            }
        };
        let Opened { store: target, .. } = opened;
        let session = Self { source: shared.store.status().id, known, target };
        session.check()?;
        Ok(session)
    }

    // Whether the target may be shipped to by this node.
    fn check(&self) -> Result<(), Trouble> {
        if let Some(current) = self.fenced_by() {
            return Err(Trouble::Fenced(self.fence(current)));
        }
        match block_on(replica::promotion(self.target.as_ref())) {
            Ok(None) => Ok(()),
            Ok(Some(promoted)) => Err(self.promoted(&promoted)),
            Err(error) => Err(self.trouble(&error)),
        }
    }

    // A promotion fences the store that it was a replica of, and no other.
    fn promoted(&self, promotion: &replica::Promotion) -> Trouble {
        if promotion.source == self.source {
            return Trouble::Fenced(self.fence(promotion.fenced.saturating_add(1)));
        }
        let why = "it was promoted, and was a replica of another store; name a schema of its own";
        Trouble::Refused(why.to_owned())
    }

    fn fenced_by(&self) -> Option<u64> {
        match self.target.status().health {
            Health::NeedsReopen(StoreError::Fenced { current, .. }) => Some(current),
            _ => None,
        }
    }

    // What the target has of this store, as far as it still tells.
    fn fence(&self, current: u64) -> Fenced {
        let mark = block_on(replica::watermark(self.target.as_ref())).ok().flatten();
        let shipped = mark.map_or(Revision::EMPTY, |mark| mark.revision);
        Fenced { own: self.known.epoch, current, shipped, last: shipped }
    }

    // None if the store is dropped.
    fn ship(&self, shared: &Shared, group: &mut usize, pause: &mut Duration) -> Option<Trouble> {
        let replica = Replica::new(Arc::clone(&shared.store), Arc::clone(&self.target))
            .with_batch_bytes(*group)
            .remembering();
        while !shared.state.lock().stopping {
            let began = Instant::now();
            let step = block_on(replica.step());
            if let Some(current) = self.fenced_by() {
                return Some(Trouble::Fenced(self.fence(current)));
            }
            let quick = began.elapsed() < shared.options.timeout / 2;
            match step {
                Ok(Step::Copied { .. }) => shared.copying(),
                Ok(Step::Applied { revision, .. }) => shared.shipped(revision, quick),
                Ok(Step::CaughtUp(revision)) => {
                    shared.shipped(revision, quick);
                    if !shared.more_after(revision) {
                        replica.forget();
                    }
                }
                Err(error) => {
                    if matches!(error, ReplicaError::Commit(_)) {
                        *group = (*group / 2).max(SMALLEST_GROUP);
                    }
                    return Some(self.recovered(&error));
                }
            }
            *pause = PAUSE;
            if quick {
                *group = group.saturating_mul(2).min(GROUP);
            }
        }
        None
    }

    fn trouble(&self, error: &ReplicaError) -> Trouble {
        if let Some(current) = self.fenced_by() {
            return Trouble::Fenced(self.fence(current));
        }
        let why = error.to_string();
        match error {
            ReplicaError::NotEmpty
            | ReplicaError::OfAnother
            | ReplicaError::Diverged { .. }
            | ReplicaError::SourceWentBack { .. }
            | ReplicaError::Differs(_)
            | ReplicaError::Damaged
            | ReplicaError::NotAReplica
            | ReplicaError::Torn => match block_on(replica::promotion(self.target.as_ref())) {
                Ok(Some(promoted)) => self.promoted(&promoted),
                _ => Trouble::Refused(why),
            },
            ReplicaError::Commit(CommitError::TooLarge(_)) => Trouble::Refused(why),
            ReplicaError::Contended
            | ReplicaError::Source(_)
            | ReplicaError::Target(_)
            | ReplicaError::Commit(_) => Trouble::Away(why),
        }
    }

    // Opens the target again where it wants that.
    fn recovered(&self, error: &ReplicaError) -> Trouble {
        let trouble = self.trouble(error);
        let Trouble::Away(why) = trouble else { return trouble };
        let unknown = matches!(
            error,
            ReplicaError::Commit(CommitError::OutcomeUnknown(_) | CommitError::ReadOnly)
        );
        match self.target.status().health {
            Health::Ready if !unknown => Trouble::Away(why),
            Health::Ready | Health::NeedsReopen(_) => match block_on(self.target.reopen()) {
                Ok(_) => Trouble::Away(why),
                Err(error) => match self.fenced_by() {
                    Some(current) => Trouble::Fenced(self.fence(current)),
                    None => unopened(error),
                },
            },
        }
    }
}

fn unopened(error: OpenError) -> Trouble {
    match error {
        OpenError::Store { error: StoreError::NotDurable(why), .. } => Trouble::Refused(why),
        OpenError::Store { error, .. } => Trouble::Away(error.to_string()),
        other => Trouble::Refused(other.to_string()),
    }
}

impl Shared {
    // The target is this revision now.
    fn shipped(&self, revision: Revision, quick: bool) {
        let mut state = self.state.lock();
        let State { shipped, samples, since, .. } = &mut *state;
        *shipped = revision.max(*shipped);
        while let Some((sampled, at)) = samples.front().copied().filter(|(r, _)| r <= shipped) {
            debug_assert!(sampled <= *shipped);
            *since = at;
            samples.pop_front();
        }
        state.link = Link::Following;
        state.away = None;
        let in_time = match self.options.mode {
            Mode::Async => false,
            // Nothing is committed meanwhile.
            Mode::Sync(WhenAway::Refuse) => state.shipped >= state.latest,
            // From now on commits wait: that this one took no longer is why they may.
            Mode::Sync(WhenAway::Degrade) => quick,
        };
        if in_time && !state.synced {
            state.synced = true;
            if std::mem::take(&mut state.degraded) {
                let at = state.shipped;
                state.notice(Notice::Restored { at });
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn copying(&self) {
        let mut state = self.state.lock();
        state.link = Link::Copying;
        self.unreached(&mut state);
        drop(state);
        self.changed.notify_all();
    }

    fn stopped(&self, link: Link) {
        let mut state = self.state.lock();
        state.link = link;
        self.unreached(&mut state);
        drop(state);
        self.changed.notify_all();
    }

    // Commits that wait have their own deadline; the next ones need not begin to.
    fn unreached(&self, state: &mut parking_lot::MutexGuard<'_, State>) {
        let since = *state.away.get_or_insert_with(Instant::now);
        if since.elapsed() < self.options.timeout || !state.synced {
            return;
        }
        match self.options.mode {
            Mode::Sync(WhenAway::Degrade) => self.alone(state),
            Mode::Sync(WhenAway::Refuse) | Mode::Async => state.synced = false,
        }
    }

    fn fence(&self, fenced: Fenced) {
        let last = self.store.status().revision;
        let fenced = Fenced { last, ..fenced };
        if let Ok(Some(known)) = local::read(self.store.as_ref()) {
            // If it cannot be written, the target is asked again after a restart.
            drop(local::write(self.store.as_ref(), &Known { fenced: Some(fenced), ..known }));
        }
        let mut state = self.state.lock();
        state.link = Link::Fenced(fenced);
        state.shipped = fenced.shipped;
        state.synced = false;
        state.notice(Notice::Fenced(fenced));
        drop(state);
        self.changed.notify_all();
    }

    // Waits until something is committed after this revision, or it is time to ask the target.
    fn more_after(&self, revision: Revision) -> bool {
        let until = Instant::now() + self.options.probe;
        let mut state = self.state.lock();
        while state.latest <= revision && !state.stopping {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return false;
            }
        }
        true
    }

    fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        let mut state = self.state.lock();
        while !state.stopping {
            if self.changed.wait_until(&mut state, until).timed_out() {
                return;
            }
        }
    }
}
