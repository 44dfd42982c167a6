//! The audit log: events, the trail that makes them durable, reading, checkpoints, proofs and
//! verification.
//!
//! Every leaf of the log is either one security-relevant event, durable before the reply, or one
//! block of data-plane events, durable a moment later. Leaves hash salted plaintext and their hashes
//! stand in the clear, so that whoever holds the public key alone can verify that nothing was
//! changed, taken out or put in.

pub mod archive;
pub mod checkpoint;
mod denials;
pub mod event;
pub mod export;
mod flush;
pub(crate) mod line;
pub mod proof;
pub mod read;
mod sink;
mod trail;
mod usage;
pub mod verify;

#[cfg(test)]
mod tests;

pub use crate::config::DataPlane;
pub use archive::{Archive, Claim, Had};
pub use checkpoint::{Checkpoint, MlDsaKey, Signer, Trusted, VerifyingKey};
pub use event::{Draft, Origin, Outcome, anonymous, event};
pub use line::Entry;
pub use read::{EventView, Filter, Order, Page};
pub use sink::{SinkStatus, Sinks};
pub use trail::{Options, Status, Trail};
pub(crate) use usage::RECENT;
pub use usage::{Access, Meaning};
pub use verify::{Report, verify_clear, verify_store};
