//! Tokens, sessions, logins and the layer, over a real vault.

pub(crate) mod fixture;
mod layer;
mod logins;
mod sessions;
mod tokens;
