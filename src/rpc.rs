//! The gRPC face: admit, parse, authorize, act, render. It has no rules of its own.

pub(crate) mod admit;
pub(crate) mod batch;
pub(crate) mod convert;
pub(crate) mod key_service;
pub(crate) mod lifecycle;
pub(crate) mod parse;
pub mod status;
pub(crate) mod stream;
pub(crate) mod trailers;
