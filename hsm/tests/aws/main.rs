//! The wrapper over AWS KMS and secrets from Parameter Store, through the real SDK over HTTP:
//! against moto for what it does as AWS does, and against a fake of our own for faults and refusals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod compat;
mod fake;
mod faults;
mod moto;
mod refusals;
mod secrecy;
mod ssm;
mod support;
mod wrapper;
