//! The in-memory store against the conformance suite.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use futures::executor::block_on;
use polykey_storage::{conformance, memory::Memory};

#[test]
fn conforms() {
    block_on(conformance::suite(|| Memory::new().unwrap()));
}

#[test]
fn conforms_with_few_changes_kept() {
    block_on(conformance::suite(|| Memory::with_changes(7).unwrap()));
}
