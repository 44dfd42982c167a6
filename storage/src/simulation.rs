//! A disk that loses power and fails on demand, for tests of whatever stands on a redb store.
//!
//! What is modelled: writes reach the medium in any order until a sync returns; a power cut keeps
//! a random subset of what was not synced, torn at sectors of 512 bytes; a change of the length
//! is kept or lost like a write. A sync that fails may have lost any of the writes before it for
//! good, although reads go on showing them: that is how page caches behave. Opening again shows
//! the medium itself.
//!
//! What is not: damage to what was synced, and misdirected writes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "this is a test"
)]

use std::{io, sync::Arc};

use ::redb::StorageBackend;
use parking_lot::Mutex;

use crate::conformance::Rng;

const SECTOR: usize = 512;

/// A disk with two files on it, a database and its journal. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct Disk(Arc<Mutex<State>>);

/// How a [`Disk`] lies, so that a test can show that it would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Honesty {
    /// Not at all.
    Honest,
    /// A sync returns, and makes nothing durable.
    SyncsNothing,
    /// A sync makes durable all but the last write before it.
    SyncsAllButOne,
}

/// What happens to the operations that change the disk: writes, syncs, changes of the length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Work,
    // Power goes during the operation after so many.
    CutAfter(u64),
    // The operation after so many fails; all that follow it too, if `sticky`.
    FailAfter { operations: u64, sticky: bool },
    // All fail.
    Fail,
    Dark,
}

#[derive(Clone, Debug)]
enum Pending {
    Write { offset: usize, data: Vec<u8> },
    Length(usize),
}

#[derive(Debug, Default)]
struct Content {
    // What a power cut cannot take.
    durable: Vec<u8>,
    // What reads show.
    current: Vec<u8>,
    // Raised when the file is handed out; older handles are dead.
    handle: u64,
}

const DATABASE: usize = 0;
const JOURNAL: usize = 1;

#[derive(Debug)]
struct State {
    files: [Content; 2],
    // Of both files, in order.
    pending: Vec<(usize, Pending)>,
    plan: Plan,
    failed: bool,
    honesty: Honesty,
    rng: Rng,
    syncs: u64,
}

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            files: Default::default(),
            pending: Vec::new(),
            plan: Plan::Work,
            failed: false,
            honesty: Honesty::Honest,
            rng: Rng::new(seed),
            syncs: 0,
        })))
    }

    /// From now on the disk lies like this.
    pub fn set_honesty(&self, honesty: Honesty) {
        self.0.lock().honesty = honesty;
    }

    /// Access to the database, for [`crate::redb::Redb::with_backend`]. Earlier handles fail from
    /// then on.
    #[must_use]
    pub fn open(&self) -> Handle {
        self.hand_out(DATABASE)
    }

    /// Access to the journal, for [`crate::redb::Redb::with_journal`]. Earlier handles fail from
    /// then on.
    #[must_use]
    pub fn open_journal(&self) -> Handle {
        self.hand_out(JOURNAL)
    }

    fn hand_out(&self, file: usize) -> Handle {
        let mut state = self.0.lock();
        let State { files, pending, .. } = &mut *state;
        let content = &mut files[file];
        content.handle += 1;
        // Without the page cache: what a failed sync has lost is seen to be lost.
        content.current = content.durable.clone();
        for (_, change) in pending.iter().filter(|(of, _)| *of == file) {
            apply(&mut content.current, change);
        }
        Handle { disk: self.clone(), file, number: content.handle }
    }

    /// Power goes during the operation that follows `operations` others.
    pub fn cut_after(&self, operations: u64) {
        self.0.lock().plan = Plan::CutAfter(operations);
    }

    /// The operation that follows `operations` others fails, and if `sticky` all after it, too.
    pub fn fail_after(&self, operations: u64, sticky: bool) {
        let mut state = self.0.lock();
        state.failed = false;
        state.plan = Plan::FailAfter { operations, sticky };
    }

    /// Whether anything has failed since the last [`Self::fail_after`].
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.0.lock().failed
    }

    /// No more failures and no cut.
    pub fn heal(&self) {
        self.0.lock().plan = Plan::Work;
    }

    /// Cuts the power now if it is not already gone, and restores it. Earlier handles are dead.
    pub fn power_cycle(&self) {
        let mut state = self.0.lock();
        state.cut();
        state.plan = Plan::Work;
    }

    /// How many syncs have been asked for.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }
}

impl State {
    fn cut(&mut self) {
        self.plan = Plan::Dark;
        for (file, change) in std::mem::take(&mut self.pending) {
            let (rng, medium) = (&mut self.rng, &mut self.files[file].durable);
            match rng.below(4) {
                0 => {}
                1 => tear(medium, &change, |_| true),
                2 => tear(medium, &change, |_| rng.chance(50)),
                _ => {
                    let torn_at = rng.below(16);
                    tear(medium, &change, |sector| sector < torn_at);
                }
            }
        }
        for file in &mut self.files {
            file.handle += 1;
            file.current = file.durable.clone();
        }
    }

    // Decides what becomes of an operation; whether it is carried out.
    fn operate(&mut self) -> io::Result<Step> {
        match &mut self.plan {
            Plan::Work => Ok(Step::Done),
            Plan::CutAfter(0) => Ok(Step::Cut),
            Plan::FailAfter { operations: 0, sticky } => {
                self.plan = if *sticky { Plan::Fail } else { Plan::Work };
                self.failed = true;
                Ok(Step::Failed)
            }
            Plan::CutAfter(operations) | Plan::FailAfter { operations, .. } => {
                *operations -= 1;
                Ok(Step::Done)
            }
            Plan::Fail => Ok(Step::Failed),
            Plan::Dark => Err(io::Error::other("no power")),
        }
    }

    fn change(&mut self, file: usize, change: Pending) -> io::Result<()> {
        match self.operate()? {
            Step::Done => {
                apply(&mut self.files[file].current, &change);
                self.pending.push((file, change));
                Ok(())
            }
            Step::Cut => {
                self.pending.push((file, change));
                self.cut();
                Err(io::Error::other("power cut"))
            }
            Step::Failed => {
                // Some of it may have been written all the same.
                if let Pending::Write { offset, mut data } = change
                    && self.rng.chance(50)
                {
                    data.truncate(self.rng.below(data.len() + 1));
                    let part = Pending::Write { offset, data };
                    apply(&mut self.files[file].current, &part);
                    self.pending.push((file, part));
                }
                Err(io::Error::other("simulated failure"))
            }
        }
    }

    fn sync(&mut self, file: usize) -> io::Result<()> {
        self.syncs += 1;
        match self.operate()? {
            Step::Done => {
                let (mut synced, others): (Vec<_>, Vec<_>) =
                    std::mem::take(&mut self.pending).into_iter().partition(|(of, _)| *of == file);
                let kept = match self.honesty {
                    Honesty::Honest => 0,
                    Honesty::SyncsNothing => synced.len(),
                    Honesty::SyncsAllButOne => synced.len().min(1),
                };
                self.pending = others;
                self.pending.extend(synced.split_off(synced.len() - kept));
                for (_, change) in &synced {
                    apply(&mut self.files[file].durable, change);
                }
                Ok(())
            }
            Step::Cut => {
                self.cut();
                Err(io::Error::other("power cut"))
            }
            Step::Failed => {
                let rng = &mut self.rng;
                self.pending.retain(|(of, _)| *of != file || rng.chance(50));
                Err(io::Error::other("simulated failure"))
            }
        }
    }
}

enum Step {
    Done,
    Cut,
    Failed,
}

// Carries out a change.
fn apply(medium: &mut Vec<u8>, change: &Pending) {
    match change {
        Pending::Length(len) => medium.resize(*len, 0),
        Pending::Write { offset, data } => {
            if medium.len() < offset + data.len() {
                medium.resize(offset + data.len(), 0);
            }
            medium[*offset..offset + data.len()].copy_from_slice(data);
        }
    }
}

// Carries out a change, of a write only the sectors that `keep` wants.
fn tear(medium: &mut Vec<u8>, change: &Pending, mut keep: impl FnMut(usize) -> bool) {
    match change {
        Pending::Length(len) => {
            if keep(0) {
                medium.resize(*len, 0);
            }
        }
        Pending::Write { offset, data } => {
            let mut done = 0;
            let mut sector = 0;
            while done < data.len() {
                let at = offset + done;
                let len = (SECTOR - at % SECTOR).min(data.len() - done);
                if keep(sector) {
                    if medium.len() < at + len {
                        medium.resize(at + len, 0);
                    }
                    medium[at..at + len].copy_from_slice(&data[done..done + len]);
                }
                done += len;
                sector += 1;
            }
        }
    }
}

/// An open file on a [`Disk`].
#[derive(Debug)]
pub struct Handle {
    disk: Disk,
    file: usize,
    number: u64,
}

impl Handle {
    fn with<T>(&self, run: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.disk.0.lock();
        if state.files[self.file].handle != self.number {
            return Err(io::Error::other("the disk is gone"));
        }
        run(&mut state)
    }
}

fn position(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        self.with(|state| Ok(u64::try_from(state.files[self.file].current.len()).unwrap()))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(|state| {
            let start = position(offset);
            let stored = state.files[self.file].current.get(start..start + out.len());
            let stored = stored.ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(stored);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with(|state| state.change(self.file, Pending::Length(position(len))))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.with(|state| state.sync(self.file))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.with(|state| {
            let write = Pending::Write { offset: position(offset), data: data.to_vec() };
            state.change(self.file, write)
        })
    }
}
