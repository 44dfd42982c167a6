//! Polykey's protobuf contract, on the wire and on disk, as generated code without any logic.
//!
//! The `.proto` files beside this crate are the source. `src/gen` is generated from them and checked
//! in, so that building needs no protobuf compiler; `tests/regenerate.rs` fails when the two differ.
//! Bytes on the wire become [`bytes::Bytes`], which share the buffer they were received in.
#![cfg_attr(
    test,
    allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

mod codec;
mod redact;

#[allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    rustdoc::all,
    clippy::all,
    reason = "generated code: what is documented is decided in the .proto files, and tested there"
)]
mod generated {
    include!("gen/mod.rs");
}

pub use codec::Codec;
pub use generated::*;

/// The serialized `google.protobuf.FileDescriptorSet` of everything on the wire, with its imports,
/// for server reflection and for tests that walk the contract. Records on disk are not in it.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptors.bin");
