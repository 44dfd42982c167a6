//! The network layer over real sockets: certificates, limits, drain, hostile peers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

mod certificates;
mod connections;
mod hostile;
mod support;
