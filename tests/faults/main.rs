//! Faults on the real binary: kills, failing disks, tampered stores, revocations under load, races, cancelled calls.
//!
//! Sizes suit a CI run; `POLYKEY_FAULTS=full` (which `make faults` sets) takes the large ones and holds the
//! deadlines exactly instead of five times over. `POLYKEY_SEED` repeats a run that failed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::print_stdout,
    reason = "tests"
)]

#[allow(dead_code, reason = "shared with the other tests of the binary")]
#[path = "../common/mod.rs"]
mod common;

mod cancel;
mod disk;
mod first_start;
mod kill;
mod log_mutations;
#[cfg(feature = "aws")]
mod migration;
#[cfg(feature = "postgres")]
mod nodes;
mod races;
mod revocation;
mod room;
mod sinks;
#[cfg(feature = "postgres")]
mod soak;
mod support;
mod tampering;
