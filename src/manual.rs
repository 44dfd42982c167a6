//! The manual: why Polykey is as it is. What it promises to users is in `docs/`.

#[doc = include_str!("manual/threats.md")]
pub mod threats {}

#[doc = include_str!("manual/custody.md")]
pub mod custody {}

#[doc = include_str!("manual/storage.md")]
pub mod storage {}

#[doc = include_str!("manual/authorization.md")]
pub mod authorization {}

#[doc = include_str!("manual/audit.md")]
pub mod audit {}

#[doc = include_str!("manual/defaults.md")]
pub mod defaults {}

#[doc = include_str!("manual/departures.md")]
pub mod departures {}
