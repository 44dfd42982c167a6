//! The suite every store must pass: random groups of random commits, compared with a map.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "this is a test"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use bytes::Bytes;

use crate::{
    Abort, Applied, ChangesError, Commit, CommitError, Direction, Entry, Finish, MAX_KEY_BYTES,
    MAX_VALUE_BYTES, Replaced, Require, Revision, RowKey, Snapshot, Space, Store, TooLarge, Write,
    all, prefix,
};

/// How many commits [`suite`] makes at least.
pub const COMMITS: usize = 10_000;

/// The seed of a test: the environment variable `POLYKEY_SEED`, or else drawn at random. Printed,
/// so that a failure can be repeated.
#[must_use]
pub fn seed() -> u64 {
    let seed = match std::env::var("POLYKEY_SEED") {
        Ok(seed) => seed.parse().expect("POLYKEY_SEED is a number"),
        Err(_) => getrandom::u64().expect("the system has random bytes"),
    };
    println!("POLYKEY_SEED={seed}");
    seed
}

/// Runs the `#[test]` named `test`, whose body is `body`, in a process of its own that ends with it.
///
/// For tests on which redb may panic: the thread on which it does is kept inside the panic hook,
/// and the harness would wait for the hook before it exits.
///
/// # Panics
/// If the body does, or the process cannot be started.
pub fn in_a_process(test: &str, body: impl FnOnce()) {
    const INSIDE: &str = "POLYKEY_TEST_INSIDE";
    const DONE: i32 = 42;
    if std::env::var(INSIDE).as_deref() == Ok(test) {
        body();
        std::process::exit(DONE);
    }
    let this = std::env::current_exe().expect("the test knows its file");
    let output = std::process::Command::new(this)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, test)
        .output()
        .expect("the test starts once more");
    print!("{}", String::from_utf8_lossy(&output.stdout));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(DONE), "{}\n{errors}", output.status);
}

/// Numbers that repeat with their seed (SplitMix64). Not for secrets.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `n` - 1.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.number() % u64::try_from(n).unwrap()).unwrap()
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of `choices`.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

// The rows of a group that is not committed yet.
const PENDING: Revision = Revision(u64::MAX);

/// What a store should contain, kept without any of its code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// The last revision.
    pub revision: Revision,
    /// Every row.
    pub rows: BTreeMap<RowKey, (Revision, Bytes)>,
    /// Every revision, with the rows it wrote.
    pub changes: BTreeMap<Revision, BTreeSet<RowKey>>,
}

/// What a group should come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// The indexes of the accepted commits.
    pub accepted: Vec<usize>,
    /// For each commit, the requirement that fails.
    pub conflicts: Vec<Option<(RowKey, Require)>>,
    /// The writes of the accepted commits.
    pub replaced: Vec<Replaced>,
}

impl Model {
    /// Applies a group and what is appended to it, and tells what should come of it.
    pub fn commit(&mut self, group: &[Commit], appended: &[Write]) -> Expected {
        let mut expected = Expected::default();
        let mut written = BTreeSet::new();
        for (index, commit) in group.iter().enumerate() {
            let failing = commit.requires.iter().find(|(row, require)| {
                let found = self.rows.get(row).map(|(revision, _)| *revision);
                match require {
                    Require::Absent => found.is_some(),
                    Require::Present => found.is_none(),
                    Require::At(revision) => found != Some(*revision) || found == Some(PENDING),
                }
            });
            expected.conflicts.push(failing.cloned());
            if failing.is_none() {
                expected.accepted.push(index);
                for write in &commit.writes {
                    written.insert(write.row().clone());
                    expected.replaced.push(Replaced {
                        row: write.row().clone(),
                        old: self.write(write),
                        new: write.value().cloned(),
                    });
                }
            }
        }
        if !expected.accepted.is_empty() {
            for write in appended {
                written.insert(write.row().clone());
                self.write(write);
            }
            self.revision.0 += 1;
            for row in &written {
                if let Some((revision, _)) = self.rows.get_mut(row) {
                    *revision = self.revision;
                }
            }
            self.changes.insert(self.revision, written);
        }
        expected
    }

    fn write(&mut self, write: &Write) -> Option<Bytes> {
        let old = match write {
            Write::Put { row, value } => self.rows.insert(row.clone(), (PENDING, value.clone())),
            Write::Delete { row } => self.rows.remove(row),
        };
        old.map(|(_, value)| value)
    }

    fn scan(&self, space: Space, keep: impl Fn(&[u8]) -> bool) -> Vec<Entry> {
        let rows = self.rows.iter();
        rows.filter(|(row, _)| row.space == space && keep(&row.key))
            .map(|(row, (revision, value))| Entry {
                key: row.key.clone(),
                value: value.clone(),
                revision: *revision,
            })
            .collect()
    }

    /// Compares everything a store contains with the model.
    ///
    /// # Errors
    /// The first difference, or the first error.
    pub async fn compare(&self, store: &dyn Store) -> Result<(), String> {
        let snapshot = store.snapshot().await.map_err(|e| e.to_string())?;
        self.compare_snapshot(snapshot.as_ref()).await?;
        let mut after = Revision::EMPTY;
        loop {
            match store.changes(after, 100).await {
                Ok(listed) => {
                    let Some((last, _)) = listed.last() else { break };
                    let last = *last;
                    for (revision, rows) in listed {
                        after.0 += 1;
                        let expected = self.changes.get(&revision).cloned().unwrap_or_default();
                        if revision != after || !rows.iter().eq(expected.iter()) {
                            return Err(format!("changes of {revision}: {rows:?}, {expected:?}"));
                        }
                    }
                    after = last;
                }
                Err(ChangesError::Trimmed { oldest })
                    if oldest.0 > after.0 + 1 && oldest.0 <= self.revision.0 + 1 =>
                {
                    after = Revision(oldest.0 - 1);
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        if after != self.revision {
            return Err(format!("changes end at {after}, not at {}", self.revision));
        }
        Ok(())
    }

    /// Compares everything a snapshot contains with the model.
    ///
    /// # Errors
    /// The first difference, or the first error.
    pub async fn compare_snapshot(&self, snapshot: &dyn Snapshot) -> Result<(), String> {
        if snapshot.revision() != self.revision {
            let (found, expected) = (snapshot.revision(), self.revision);
            return Err(format!("revision {found}, not {expected}"));
        }
        let mut spaces: BTreeSet<Space> = SPACES.map(Space).into();
        spaces.extend(self.rows.keys().map(|row| row.space));
        for space in spaces {
            let found = snapshot.scan(space, all(), Direction::Forward, usize::MAX);
            let found = found.await.map_err(|e| e.to_string())?;
            let expected = self.scan(space, |_| true);
            if found != expected {
                return Err(format!("{space:?}: {found:?}, not {expected:?}"));
            }
        }
        Ok(())
    }
}

const SPACES: [u8; 5] = [0, 1, 2, 254, 255];
const BYTES: [u8; 5] = [0x00, 0x01, 0x61, 0xfe, 0xff];

fn key(rng: &mut Rng) -> Vec<u8> {
    let len = match rng.below(200) {
        0 => MAX_KEY_BYTES,
        n => n % 5,
    };
    (0..len).map(|_| *rng.pick(&BYTES)).collect()
}

fn row(rng: &mut Rng) -> RowKey {
    RowKey::new(Space(*rng.pick(&SPACES)), key(rng))
}

fn write(rng: &mut Rng) -> Write {
    let row = row(rng);
    if rng.chance(35) {
        return Write::Delete { row };
    }
    let len = match rng.below(100) {
        0 => 20_000,
        n => n * n / 50,
    };
    Write::Put { row, value: rng.bytes(len).into() }
}

/// Writes to append to a group: none to three.
pub fn appended(rng: &mut Rng) -> Vec<Write> {
    (0..rng.below(4)).map(|_| write(rng)).collect()
}

/// A group for a store that is as `model` says: one commit to eight, at times 64.
pub fn group(rng: &mut Rng, model: &Model) -> Vec<Commit> {
    let len = if rng.chance(1) { 64 } else { 1 + rng.below(8) };
    (0..len)
        .map(|_| {
            let mut commit = Commit::new();
            for _ in 0..rng.below(3) {
                let mut row = row(rng);
                if rng.chance(50) && !model.rows.is_empty() {
                    let at = rng.below(model.rows.len());
                    row = model.rows.keys().nth(at).unwrap().clone();
                }
                let found = model.rows.get(&row).map(|(revision, _)| *revision);
                let require = match (rng.below(10), found) {
                    (0..3, _) => Require::Present,
                    (3..6, _) | (6..9, None) => Require::Absent,
                    (6..9, Some(revision)) => Require::At(revision),
                    // Of the past, of this very group, or impossible.
                    _ => Require::At(*rng.pick(&[
                        Revision(rng.clone().number() % (model.revision.0 + 1)),
                        Revision(model.revision.0 + 1),
                        Revision(u64::MAX),
                    ])),
                };
                commit.requires.push((row, require));
            }
            commit.writes = (0..rng.below(4)).map(|_| write(rng)).collect();
            commit
        })
        .collect()
}

/// Checks an empty store that `make` returns.
///
/// # Panics
/// If the store differs from the model in anything.
pub async fn suite<S: Store>(make: impl Fn() -> S) {
    let seed = seed();
    fixed_cases(&make()).await;
    let store = make();
    let mut run =
        Run { rng: Rng::new(seed), model: Model::default(), held: Vec::new(), commits: 0 };
    run.model.compare(&store).await.unwrap();
    let mut steps = 0;
    while run.commits < COMMITS {
        run.step(&store).await;
        steps += 1;
        if steps % 100 == 0 {
            run.model.compare(&store).await.unwrap();
        }
    }
    store.reopen().await.unwrap();
    run.model.compare(&store).await.unwrap();
}

type MakeBound = fn(Vec<u8>) -> Bound<Vec<u8>>;

struct Run {
    rng: Rng,
    model: Model,
    // Snapshots and what they must go on showing.
    held: Vec<(Box<dyn Snapshot>, Model)>,
    commits: usize,
}

impl Run {
    async fn step(&mut self, store: &dyn Store) {
        match self.rng.below(100) {
            0..75 => self.commit(store).await,
            75..78 => self.aborted(store).await,
            78..80 => self.too_large(store).await,
            80..85 => {
                if self.held.len() < 3 {
                    let snapshot = store.snapshot().await.unwrap();
                    self.held.push((snapshot, self.model.clone()));
                }
            }
            85..90 => {
                if let Some((snapshot, model)) = self.held.pop() {
                    model.compare_snapshot(snapshot.as_ref()).await.unwrap();
                }
            }
            90..98 => self.read(store).await,
            98 => self.changes(store).await,
            _ => {
                self.held.clear();
                assert_eq!(store.reopen().await.unwrap(), self.model.revision);
            }
        }
        let status = store.status();
        assert_eq!(status.revision, self.model.revision);
        assert_eq!(status.rows, Some(u64::try_from(self.model.rows.len()).unwrap()));
    }

    async fn commit(&mut self, store: &dyn Store) {
        let group = group(&mut self.rng, &self.model);
        let appended = appended(&mut self.rng);
        self.commits += group.len();
        // Some that the group writes, some that it does not, and some that are not there.
        let mut asked: Vec<RowKey> = (0..self.rng.below(4)).map(|_| row(&mut self.rng)).collect();
        let written = group.iter().flat_map(|commit| &commit.writes).map(|w| w.row().clone());
        asked.extend(written.take(self.rng.below(2)));
        let value = |row| self.model.rows.get(row).map(|(_, value)| value.clone());
        let beneath: Vec<_> = asked.iter().map(value).collect();
        let expected = self.model.commit(&group, &appended);
        let mut calls = 0;
        let finish = |applied: &Applied<'_>| {
            calls += 1;
            assert_eq!(applied.revision, self.model.revision);
            assert_eq!(applied.accepted, expected.accepted);
            assert_eq!(applied.replaced, expected.replaced);
            assert_eq!(applied.beneath, beneath);
            Ok(appended.clone())
        };
        let mut finish = Asking(asked, finish);
        let committed = store.commit(group, &mut finish).await.unwrap();
        assert_eq!(calls, usize::from(!expected.accepted.is_empty()));
        assert_eq!(committed.revision, self.model.revision);
        assert_eq!(committed.any(), !expected.accepted.is_empty());
        let conflicts = committed.outcomes.into_iter().map(|outcome| match outcome {
            Ok(()) => None,
            Err(conflict) => Some((conflict.row, conflict.require)),
        });
        assert_eq!(conflicts.collect::<Vec<_>>(), expected.conflicts);
    }

    async fn aborted(&mut self, store: &dyn Store) {
        let group = group(&mut self.rng, &self.model);
        let any = !self.model.clone().commit(&group, &[]).accepted.is_empty();
        let mut finish = |_: &Applied<'_>| Err(Abort::new("not now"));
        match store.commit(group, &mut finish).await {
            Ok(committed) => assert!(!any && committed.revision == self.model.revision),
            Err(CommitError::Aborted(abort)) => assert!(any && abort.to_string() == "not now"),
            Err(other) => panic!("{other}"),
        }
        self.model.compare(store).await.unwrap();
    }

    async fn too_large(&mut self, store: &dyn Store) {
        let mut group = group(&mut self.rng, &self.model);
        let (space, key) = (Space(1), vec![1; MAX_KEY_BYTES + 1]);
        let mut finish = |_: &Applied<'_>| Ok(Vec::new());
        let expected = if self.rng.chance(50) {
            group.push(Commit::new().put(space, key, Bytes::new()));
            TooLarge::Key(MAX_KEY_BYTES + 1)
        } else {
            group.push(Commit::new().put(space, [1], vec![0; MAX_VALUE_BYTES + 1]));
            TooLarge::Value(MAX_VALUE_BYTES + 1)
        };
        match store.commit(group, &mut finish).await {
            Err(CommitError::TooLarge(found)) => assert_eq!(found, expected),
            other => panic!("{other:?}"),
        }
        // What is appended has the same limits.
        let key = vec![1; MAX_KEY_BYTES + 1];
        let mut finish =
            |_: &Applied<'_>| Ok(vec![Write::Delete { row: RowKey::new(space, key.clone()) }]);
        let group = vec![Commit::new().put(space, [1], vec![1])];
        match store.commit(group, &mut finish).await {
            Err(CommitError::TooLarge(TooLarge::Key(_))) => {}
            other => panic!("{other:?}"),
        }
        self.model.compare(store).await.unwrap();
    }

    async fn read(&mut self, store: &dyn Store) {
        let sought = row(&mut self.rng);
        let found = store.get(sought.space, &sought.key).await.unwrap();
        let expected = self.model.scan(sought.space, |key| key == sought.key.as_slice());
        assert_eq!(found.as_ref(), expected.first());

        let (space, one, other) = (sought.space, key(&mut self.rng), key(&mut self.rng));
        let limit = *self.rng.pick(&[0, 1, 2, 5, usize::MAX]);
        let mut scans =
            vec![(prefix(one.clone()), self.model.scan(space, |key| key.starts_with(&one)))];
        let bounds: [MakeBound; 3] = [Bound::Included, Bound::Excluded, |_| Bound::Unbounded];
        for start in bounds {
            for end in bounds {
                let range = (start(one.clone()), end(other.clone()));
                let expected = self.model.scan(space, |key| {
                    let after = match &range.0 {
                        Bound::Included(start) => key >= start.as_slice(),
                        Bound::Excluded(start) => key > start.as_slice(),
                        Bound::Unbounded => true,
                    };
                    let before = match &range.1 {
                        Bound::Included(end) => key <= end.as_slice(),
                        Bound::Excluded(end) => key < end.as_slice(),
                        Bound::Unbounded => true,
                    };
                    after && before
                });
                scans.push((range, expected));
            }
        }
        for (range, mut expected) in scans {
            for direction in [Direction::Forward, Direction::Backward] {
                let found = store.scan(space, range.clone(), direction, limit).await;
                let first: Vec<Entry> = expected.iter().take(limit).cloned().collect();
                assert_eq!(found.unwrap(), first, "{range:?} {direction:?} {limit}");
                expected.reverse();
            }
        }
    }

    async fn changes(&mut self, store: &dyn Store) {
        let current = self.model.revision;
        let ahead = store.changes(Revision(current.0 + 1), 1).await;
        assert_eq!(ahead, Err(ChangesError::Ahead { current }));
        assert_eq!(store.changes(current, 9).await, Ok(Vec::new()));
        if current > Revision::EMPTY {
            let last = store.changes(Revision(current.0 - 1), 9).await.unwrap();
            let rows: Vec<RowKey> = self.model.changes[&current].iter().cloned().collect();
            assert_eq!(last, [(current, rows)]);
        }
    }
}

// What random groups might miss.
async fn fixed_cases<S: Store>(store: &S) {
    let (space, key) = (Space(3), b"k".as_slice());
    let mut model = Model::default();
    let mut never = |_: &Applied<'_>| -> Result<Vec<Write>, Abort> { panic!("not to be called") };

    // Nothing accepted: no transaction.
    for group in [vec![], vec![Commit::new().require(space, key, Require::Present)]] {
        let committed = store.commit(group, &mut never).await.unwrap();
        assert_eq!(committed.revision, Revision::EMPTY);
        model.compare(store).await.unwrap();
    }

    // Later commits of a group see the earlier ones.
    let put = |require| Commit::new().require(space, key, require).put(space, key, "v");
    let group = vec![
        put(Require::Absent),
        put(Require::Absent),
        put(Require::At(Revision(1))),
        put(Require::Present).delete(space, key),
        put(Require::Present),
        put(Require::Absent),
        // Accepted without a write.
        Commit::new().require(space, key, Require::Present),
    ];
    let outcomes = [true, false, false, true, false, true, true];
    let mut none = |_: &Applied<'_>| Ok(Vec::new());
    let committed = store.commit(group.clone(), &mut none).await.unwrap();
    let found: Vec<bool> = committed.outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(found, outcomes);
    model.commit(&group, &[]);
    model.compare(store).await.unwrap();

    // A commit that only requires is a revision of its own, with no rows.
    let group = vec![Commit::new().require(space, key, Require::At(Revision(1)))];
    let committed = store.commit(group.clone(), &mut none).await.unwrap();
    assert_eq!(committed.revision, Revision(2));
    model.commit(&group, &[]);
    model.compare(store).await.unwrap();

    // An appended write replaces what a commit wrote.
    let group = vec![put(Require::Present)];
    let write = Write::Put { row: RowKey::new(space, key), value: "head".into() };
    let mut finish = |_: &Applied<'_>| Ok(vec![write.clone()]);
    store.commit(group.clone(), &mut finish).await.unwrap();
    model.commit(&group, std::slice::from_ref(&write));
    model.compare(store).await.unwrap();
}

// A finish that wants to know what some rows were before the group.
struct Asking<F>(Vec<RowKey>, F);

impl<F> Finish for Asking<F>
where
    F: FnMut(&Applied<'_>) -> Result<Vec<Write>, Abort> + Send,
{
    fn beneath(&self) -> Vec<RowKey> {
        self.0.clone()
    }

    fn finish(&mut self, applied: &Applied<'_>) -> Result<Vec<Write>, Abort> {
        (self.1)(applied)
    }
}
