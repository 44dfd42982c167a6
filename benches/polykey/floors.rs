//! Floors of the disk and of the bare store, taken next to the figures that are compared with them.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::FutureExt;
use polykey_storage::redb::{Options, Redb};
use polykey_storage::{Commit, NoFinish, Space, Store};

const WINDOW: Duration = Duration::from_millis(1500);
/// About what a key's own row takes.
const ROW: usize = 400;

/// Records a second, and the middle time of a commit.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Floors {
    /// Bare commits of one row: records a second.
    pub(crate) r1: f64,
    /// Middle time of one, in microseconds.
    pub(crate) r1_p50: f64,
    /// Of 64 rows: records a second.
    pub(crate) r64: f64,
    /// Appends of 64 records and a sync: records a second.
    pub(crate) d64: f64,
}

fn timed(mut once: impl FnMut(u64)) -> (f64, f64) {
    let started = Instant::now();
    let mut times = Vec::new();
    let mut n = 0;
    while started.elapsed() < WINDOW {
        let at = Instant::now();
        once(n);
        times.push(at.elapsed());
        n += 1;
    }
    let rate = n as f64 / started.elapsed().as_secs_f64();
    times.sort_unstable();
    (rate, times[times.len() / 2].as_secs_f64() * 1e6)
}

/// Takes them in `directory`, which is on the disk that the stores are on.
pub(crate) fn take(directory: &Path) -> Floors {
    let path = directory.join("floor.redb");
    let _ = std::fs::remove_file(&path);
    // Without the journal: what is compared with is redb's own commit.
    let options = Options { journal_bytes: 0, ..Options::default() };
    let store = Redb::create(&path, options).unwrap();
    let mut next = 0_u64;
    let mut commit = |rows: u64| {
        let group = (0..rows)
            .map(|_| {
                next += 1;
                Commit::new().put(Space(1), next.to_be_bytes(), vec![7; ROW])
            })
            .collect();
        store.commit(group, &mut NoFinish).now_or_never().unwrap().unwrap();
    };
    let (r1, r1_p50) = timed(|_| commit(1));
    let (r64, _) = timed(|_| commit(64));
    drop(store);
    std::fs::remove_file(&path).unwrap();

    let path = directory.join("floor.log");
    let mut file = OpenOptions::new().create(true).append(true).open(&path).unwrap();
    let block = vec![7; ROW * 64];
    let (d64, _) = timed(|_| {
        file.write_all(&block).unwrap();
        file.sync_data().unwrap();
    });
    std::fs::remove_file(&path).unwrap();
    Floors { r1, r1_p50, r64: r64 * 64.0, d64: d64 * 64.0 }
}
