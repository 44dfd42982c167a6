//! The real binary, driven over the wire.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    reason = "tests"
)]

#[allow(dead_code, reason = "shared with the other tests of the binary")]
#[path = "../common/mod.rs"]
mod common;

mod anchor;
mod archive;
#[cfg(feature = "aws")]
mod aws;
mod backup;
mod canary;
mod compact;
mod confined;
mod crypto;
mod fields;
mod go_batch;
mod go_lifecycle;
mod go_node;
#[cfg(feature = "aws")]
mod hardened;
#[cfg(feature = "aws")]
mod hsm;
mod limits;
mod lock;
mod metrics;
mod newcomer;
#[cfg(feature = "postgres")]
mod nodes;
mod operator;
mod otlp_sink;
mod reloads;
#[cfg(feature = "postgres")]
mod replication;
mod rights;
mod slots;
#[cfg(feature = "postgres")]
mod store_copy;
mod stubs;
mod telemetry;
mod tokens;
mod tour;
mod webhooks;
