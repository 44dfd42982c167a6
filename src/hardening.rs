//! Makes the process give away less: no core dumps, no tracing by others, private files, and
//! locked memory where that is asked for and possible.
//!
//! Once it knows its configuration it also gives up what it has no use for (`confine`).
//!
//! Nothing here refuses to start the node: what does not work is reported, and logged by whoever
//! asked. What it does not stop: root, and whoever may read this user's memory already.

mod confine;

use rustix::fs::Mode;
use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use crate::config::Config;

/// A measure that could not be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missed {
    /// Which one.
    pub measure: &'static str,
    /// Why, and what to do.
    pub reason: String,
}

/// Applies everything to this process, and returns what did not work.
///
/// `[runtime] lock_memory` locks all memory, now and later, against being swapped out; without an unlimited
/// RLIMIT_MEMLOCK that would make later allocations fail, and it is skipped. `[runtime] sandbox` holds
/// for the thread that calls and those started later: to be called before the first one.
pub fn apply(config: &Config) -> Vec<Missed> {
    let mut missed = process(config.runtime.lock_memory);
    if config.runtime.sandbox {
        // Where it may write must be there.
        std::fs::create_dir_all(&config.node.data_dir).ok();
        missed.extend(confine::confine(config));
    }
    missed
}

/// Why the kernel or the configuration keeps `[runtime] sandbox` from confining a node, if it does.
#[must_use]
pub fn lacking(config: &Config) -> Option<String> {
    confine::lacking(config)
}

/// Whether a process that was confined for one configuration can do what another one needs.
#[must_use]
pub fn fits(was: &Config, is: &Config) -> bool {
    confine::fits(was, is)
}

fn process(lock_memory: bool) -> Vec<Missed> {
    let mut missed = Vec::new();
    let mut attempt = |measure, result: rustix::io::Result<()>| {
        if let Err(error) = result {
            missed.push(Missed { measure, reason: error.to_string() });
        }
    };
    private_files();
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    attempt("no core dumps", rustix::process::setrlimit(Resource::Core, none));
    attempt(
        "no tracing by others",
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable),
    );
    attempt("as many files as are allowed", raise_files());
    if lock_memory {
        match rustix::process::getrlimit(Resource::Memlock).current {
            None => attempt(
                "locked memory",
                rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE),
            ),
            Some(bytes) => missed.push(Missed {
                measure: "locked memory",
                reason: format!(
                    "RLIMIT_MEMLOCK is {} KiB; set it to unlimited (LimitMEMLOCK=infinity)",
                    bytes / 1024
                ),
            }),
        }
    }
    missed
}

/// Files made from now on are their owner's alone, unless they are opened up on purpose.
pub fn private_files() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
}

/// Raises the soft limit on open files to the hard one.
fn raise_files() -> rustix::io::Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit { current: limit.maximum, maximum: limit.maximum },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_hardened() {
        // Of the whole test process: none of it is undone, and no other test minds.
        let missed = process(false);
        assert_eq!(missed, []);
        let core = rustix::process::getrlimit(Resource::Core);
        assert_eq!(core, Rlimit { current: Some(0), maximum: Some(0) });
        let files = rustix::process::getrlimit(Resource::Nofile);
        assert_eq!(files.current, files.maximum);
        let dumpable = rustix::process::dumpable_behavior().unwrap();
        assert_eq!(dumpable, DumpableBehavior::NotDumpable);
        let file = tempfile::tempdir().unwrap().keep().join("private");
        std::fs::write(&file, "x").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&file).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        drop(std::fs::remove_dir_all(file.parent().unwrap()));
        let again = process(true);
        let limited = rustix::process::getrlimit(Resource::Memlock).current.is_some();
        if limited {
            assert!(again.iter().any(|m| m.reason.contains("LimitMEMLOCK")), "{again:?}");
        }
    }
}
