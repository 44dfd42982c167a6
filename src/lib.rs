//! Polykey: a key management service in one binary.
//!
//! The story of a request, from bytes to bytes:
//!
//! 1. [`net`] accepts a connection over mutual TLS and deals it to a thread; [`authn`] reads the certificate once.
//! 2. [`authn::layer`] takes the token and finds the session, before a body is decoded.
//! 3. [`rpc`] decodes the message and parses it into a [`command`], every limit of [`limits`] applied.
//! 4. [`authz`] decides. What it returns, [`authz::Authorized`], *is* the permission: operations take
//!    nothing else.
//! 5. [`keyring`] and [`directory`] work on rows that [`vault`] seals, and `polykey_hsm` does whatever touches
//!    key bytes.
//! 6. One transaction carries the change, its [`audit`] event and its idempotency record. When it is durable and
//!    every cache has forgotten the old state, the caller is answered.
//!
//! [`app`] puts the parts together from a [`config`]; [`custody`] opens the root key; [`jobs`] does what
//! comes due. [`cli`] and [`client`] are the other end. Why all this is as it is: [`manual`].
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod anchor;
pub mod app;
pub mod audit;
pub mod authn;
pub mod authz;
pub mod backup;
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
mod ids;
pub mod jobs;
pub mod key;
pub mod keyring;
pub mod limits;
pub mod manual;
pub mod metrics;
pub mod net;
pub mod nodes;
pub mod pki;
pub mod quotas;
pub mod rates;
pub mod rpc;
pub mod service_manager;
pub mod setup;
mod share;
pub mod telemetry;
pub mod time;
pub mod vault;
pub mod webhook;
