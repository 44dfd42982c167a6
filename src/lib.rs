//! Polykey.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod app;
pub mod audit;
pub mod authn;
pub mod authz;
pub mod cache;
pub mod cli;
pub mod client;
pub mod command;
pub mod config;
pub mod context;
pub mod custody;
pub mod directory;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod hardening;
pub mod health;
pub mod jobs;
pub mod key;
pub mod keyring;
pub mod limits;
pub mod metrics;
pub mod net;
pub mod pki;
pub mod rpc;
pub mod setup;
pub mod telemetry;
pub mod time;
pub mod vault;
