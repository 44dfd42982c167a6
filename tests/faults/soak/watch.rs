//! What processes use, looked at over time.

use std::fs;
use std::time::{Duration, Instant};

/// By how much memory may have grown at the end: a tenth, and what an allocator keeps.
const SLACK_KIB: usize = 24 * 1024;
/// Blocking threads come and go; so do connections.
const SLACK_COUNT: usize = 16;

/// What a process uses.
#[derive(Clone, Copy, Debug)]
struct Use {
    kib: usize,
    threads: usize,
    descriptors: usize,
}

impl Use {
    fn of(pid: u32) -> Self {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| -> usize {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        Self { kib: field("VmRSS:"), threads: field("Threads:"), descriptors }
    }
}

/// A process, and what it used, from when it was warm on.
pub(super) struct Watched {
    name: &'static str,
    pid: u32,
    since: Instant,
    uses: Vec<(Duration, Use)>,
}

impl Watched {
    pub(super) fn new(name: &'static str, pid: u32) -> Self {
        Self { name, pid, since: Instant::now(), uses: Vec::new() }
    }

    pub(super) fn look(&mut self, pid: u32, warm: Duration) {
        if pid != self.pid {
            *self = Self::new(self.name, pid);
        }
        if self.since.elapsed() >= warm {
            self.uses.push((self.since.elapsed(), Use::of(pid)));
        }
    }

    pub(super) fn flat(&self) {
        let [(at, first), .., (till, last)] = self.uses.as_slice() else {
            panic!("{}: no two looks at one process", self.name)
        };
        println!("soak: {}: after {at:.0?} {first:?}, after {till:.0?} {last:?}", self.name);
        let most = first.kib + first.kib / 10 + SLACK_KIB;
        assert!(last.kib <= most, "{}: more memory than {most} KiB: {:#?}", self.name, self.uses);
        for (what, first, last) in [
            ("threads", first.threads, last.threads),
            ("descriptors", first.descriptors, last.descriptors),
        ] {
            assert!(last <= first + SLACK_COUNT, "{}: {what}: {:#?}", self.name, self.uses);
        }
    }
}
