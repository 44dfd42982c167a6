//! What a key is: its id, versions and states, and which state allows what.
//!
//! It knows no store, no caller and no key bytes.

use std::num::NonZeroU32;
use std::time::Duration;

use polykey_hsm::Algorithm;
use polykey_proto::polykey::record::v1::key_record::State;
use polykey_proto::polykey::record::v1::{KeyRecord, VersionRecord};
use uuid::Uuid;

use crate::error::Reason;
use crate::time::Time;

/// The id of a key: any UUID is accepted, only UUIDv7 (RFC 9562) is made, so that ids sort by age.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Uuid);

impl KeyId {
    /// A new id.
    #[must_use]
    pub fn mint(now: Time) -> Self {
        Self(crate::ids::at(now))
    }

    /// The hyphenated form, in either case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // Other spellings of a UUID (braces, URN, no hyphens) would be other names of one key.
        if text.len() != 36 {
            return None;
        }
        Uuid::try_parse(text).ok().map(Self)
    }

    /// From a row key or record.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Uuid::from_slice(bytes).ok().map(Self)
    }

    /// The 16 bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; 16] {
        *self.0.as_bytes()
    }
}

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl std::fmt::Debug for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// How a request names a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeyName {
    /// By id.
    Id(KeyId),
    /// By alias, without the `alias/` in front.
    Alias(String),
}

impl std::fmt::Display for KeyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Alias(name) => write!(f, "alias/{name}"),
        }
    }
}

/// A version of a key, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(NonZeroU32);

impl Version {
    /// The first.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// `None` for 0, which is "the primary" in requests.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number).map(Self)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The row key of a version.
#[must_use]
pub fn version_row(id: KeyId, version: Version) -> Vec<u8> {
    let mut row = id.bytes().to_vec();
    row.extend_from_slice(&version.get().to_be_bytes());
    row
}

/// What a key does at a moment: the stored state, with everything that has come due applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeyState {
    /// In use.
    Enabled,
    /// Past its `expires_at`.
    Expired,
    /// Does nothing until it is enabled again.
    Disabled,
    /// Does nothing, for ever.
    Revoked,
    /// Does nothing and will be destroyed.
    PendingDestruction,
    /// There is no material any more.
    Destroyed,
}

/// What a version does at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum VersionState {
    /// Seals and opens.
    Primary,
    /// Exists, and does nothing until it is promoted.
    Staged,
    /// Opens what it sealed.
    Readable,
    /// Below the minimum decryption version: does nothing while the minimum stands.
    TooOld,
    /// Does nothing, for ever.
    Revoked,
}

/// The algorithm of a stored key.
#[must_use]
pub fn algorithm(record: &KeyRecord) -> Option<Algorithm> {
    Algorithm::from_code(u16::try_from(record.algorithm).ok()?)
}

/// The state of a key now. A revocation or destruction whose time has come counts, whether or not
/// the schedule has got round to it.
#[must_use]
pub fn key_state(record: &KeyRecord, now: Time) -> KeyState {
    let due = |micros: i64| Time::optional(micros).is_some_and(|at| at <= now);
    match record.state() {
        State::Destroyed => KeyState::Destroyed,
        State::PendingDestruction => KeyState::PendingDestruction,
        State::Revoked => KeyState::Revoked,
        State::Enabled | State::Disabled if due(record.revoke_at) => KeyState::Revoked,
        State::Disabled => KeyState::Disabled,
        State::Enabled if due(record.expires_at) => KeyState::Expired,
        State::Enabled => KeyState::Enabled,
        // A record without a state is none of ours: it does nothing.
        State::Unspecified => KeyState::Destroyed,
    }
}

/// The state of a version now, of a key whose own state allows use.
#[must_use]
pub fn version_state(key: &KeyRecord, version: &VersionRecord, now: Time) -> VersionState {
    let due = |micros: i64| Time::optional(micros).is_some_and(|at| at <= now);
    if version.revoked_at != 0 || due(version.grace_until) {
        VersionState::Revoked
    } else if version.version == key.primary_version {
        VersionState::Primary
    } else if version.version == key.staged_version || version.version > key.primary_version {
        VersionState::Staged
    } else if version.version < key.min_decryption_version {
        VersionState::TooOld
    } else {
        VersionState::Readable
    }
}

/// Why a key of this state neither seals nor opens; `None` if it does.
#[must_use]
pub fn refuses(state: KeyState) -> Option<Reason> {
    match state {
        KeyState::Enabled => None,
        KeyState::Expired => Some(Reason::KeyExpired),
        KeyState::Disabled => Some(Reason::KeyDisabled),
        KeyState::Revoked => Some(Reason::KeyRevoked),
        KeyState::PendingDestruction => Some(Reason::KeyPendingDestruction),
        KeyState::Destroyed => Some(Reason::KeyDestroyed),
    }
}

/// Whether the key may be read or opened with now.
///
/// # Errors
/// The reason why not.
pub fn may_open(record: &KeyRecord, now: Time) -> Result<(), Reason> {
    match refuses(key_state(record, now)) {
        Some(Reason::KeyExpired) if record.read_after_expiry => Ok(()),
        Some(reason) => Err(reason),
        None => Ok(()),
    }
}

/// Whether the key may be sealed with or rotated now.
///
/// # Errors
/// The reason why not.
pub fn may_seal(record: &KeyRecord, now: Time) -> Result<(), Reason> {
    refuses(key_state(record, now)).map_or(Ok(()), Err)
}

/// Whether metadata may change now: not of what is revoked or on its way out.
///
/// # Errors
/// The reason why not.
pub fn may_change(record: &KeyRecord, now: Time) -> Result<(), Reason> {
    match key_state(record, now) {
        KeyState::Enabled | KeyState::Expired | KeyState::Disabled => Ok(()),
        KeyState::Revoked => Err(Reason::KeyRevoked),
        KeyState::PendingDestruction => Err(Reason::KeyPendingDestruction),
        KeyState::Destroyed => Err(Reason::KeyDestroyed),
    }
}

/// The version a request means: 0 is the primary.
///
/// # Errors
/// [`Reason::VersionTrimmed`] below what is kept, [`Reason::VersionNotFound`] above the latest.
pub fn pick_version(record: &KeyRecord, asked: u32) -> Result<Version, Reason> {
    let number = if asked == 0 { record.primary_version } else { asked };
    if number < record.min_available_version {
        return Err(Reason::VersionTrimmed);
    }
    if number > record.latest_version {
        return Err(Reason::VersionNotFound);
    }
    Version::new(number).ok_or(Reason::VersionNotFound)
}

/// Whether a version may be read or opened with now, the key's own state apart.
///
/// # Errors
/// The reason why not. A staged version is readable: its holders prepare for it.
pub fn version_opens(key: &KeyRecord, version: &VersionRecord, now: Time) -> Result<(), Reason> {
    match version_state(key, version, now) {
        VersionState::Primary | VersionState::Readable | VersionState::Staged => Ok(()),
        VersionState::TooOld => Err(Reason::VersionTooOld),
        VersionState::Revoked => Err(Reason::VersionRevoked),
    }
}

/// Whether a version may seal now, the key's own state apart: the primary, and older ones from the
/// key's minimum encryption version on, where it has one.
///
/// # Errors
/// The reason why not.
pub fn version_seals(key: &KeyRecord, version: &VersionRecord, now: Time) -> Result<(), Reason> {
    let least = key.min_encryption_version;
    match version_state(key, version, now) {
        VersionState::Primary if version.version >= least => Ok(()),
        VersionState::Readable if least != 0 && version.version >= least => Ok(()),
        VersionState::Primary | VersionState::Readable | VersionState::TooOld => {
            Err(Reason::VersionTooOld)
        }
        VersionState::Staged => Err(Reason::VersionStaged),
        VersionState::Revoked => Err(Reason::VersionRevoked),
    }
}

/// Turns an enabled key off.
///
/// # Errors
/// The reason why not.
pub fn disable(record: &mut KeyRecord, now: Time) -> Result<(), Reason> {
    may_change(record, now)?;
    if record.state() == State::Disabled {
        return Err(Reason::KeyDisabled);
    }
    record.set_state(State::Disabled);
    Ok(())
}

/// Turns a disabled key on.
///
/// # Errors
/// The reason why not.
pub fn enable(record: &mut KeyRecord, now: Time) -> Result<(), Reason> {
    may_change(record, now)?;
    if record.state() != State::Disabled {
        return Err(Reason::KeyWrongState);
    }
    record.set_state(State::Enabled);
    Ok(())
}

/// Revokes a key, now or at a later time; one that is to be revoked already, only earlier than that.
///
/// # Errors
/// The reason why not: what is revoked stays so with its first reason.
pub fn revoke(record: &mut KeyRecord, at: Time, reason: &str, now: Time) -> Result<(), Reason> {
    match key_state(record, now) {
        KeyState::Enabled | KeyState::Expired | KeyState::Disabled => {}
        KeyState::Revoked => return Err(Reason::KeyRevoked),
        KeyState::PendingDestruction => return Err(Reason::KeyPendingDestruction),
        KeyState::Destroyed => return Err(Reason::KeyDestroyed),
    }
    if Time::optional(record.revoke_at).is_some_and(|due| at > due) {
        return Err(Reason::RevocationScheduled);
    }
    record.revocation_reason = reason.to_owned();
    if at <= now {
        settle_revocation(record, now);
    } else {
        record.revoke_at = at.micros();
    }
    Ok(())
}

/// Makes a revocation that is due the stored state.
pub fn settle_revocation(record: &mut KeyRecord, now: Time) {
    record.revoked_at = match Time::optional(record.revoke_at) {
        Some(at) => at.min(now).micros(),
        None => now.micros(),
    };
    record.revoke_at = 0;
    record.next_rotation_at = 0;
    record.staged_promote_at = 0;
    record.set_state(State::Revoked);
}

/// Shortest and longest destruction window, in days.
pub const DESTRUCTION_DAYS: std::ops::RangeInclusive<u32> = 7..=30;

/// Begins the destruction window.
///
/// # Errors
/// The reason why not.
pub fn schedule_destruction(record: &mut KeyRecord, days: u32, now: Time) -> Result<(), Reason> {
    match key_state(record, now) {
        KeyState::PendingDestruction => return Err(Reason::KeyPendingDestruction),
        KeyState::Destroyed => return Err(Reason::KeyDestroyed),
        KeyState::Revoked if record.state() != State::Revoked => settle_revocation(record, now),
        _ => {}
    }
    let before = record.state();
    record.set_before_destruction(before);
    record.set_state(State::PendingDestruction);
    let window = Duration::from_secs(u64::from(days) * 86_400);
    record.destroy_at = now.plus(window).micros();
    record.next_rotation_at = 0;
    Ok(())
}

/// Ends the destruction window: back to the state before it, but never above disabled.
///
/// # Errors
/// The reason why not.
pub fn cancel_destruction(record: &mut KeyRecord, now: Time) -> Result<(), Reason> {
    match record.state() {
        State::PendingDestruction => {}
        State::Destroyed => return Err(Reason::KeyDestroyed),
        _ => return Err(Reason::KeyWrongState),
    }
    // Past its end the window cannot be reopened, even if the schedule is late.
    if Time::optional(record.destroy_at).is_some_and(|at| at <= now) {
        return Err(Reason::KeyDestroyed);
    }
    let back = match record.before_destruction() {
        State::Revoked => State::Revoked,
        _ => State::Disabled,
    };
    record.set_state(back);
    record.set_before_destruction(State::Unspecified);
    record.destroy_at = 0;
    Ok(())
}

/// Checks and sets version bounds, as the Transit engine does: 1 ≤ min_decryption ≤ primary,
/// min_encryption = 0 or min_decryption ≤ min_encryption ≤ latest.
///
/// # Errors
/// [`Reason::BoundsInvalid`], or [`Reason::VersionTrimmed`] below what is kept.
pub fn set_bounds(record: &mut KeyRecord, decryption: u32, encryption: u32) -> Result<(), Reason> {
    if decryption < 1 || decryption > record.latest_version {
        return Err(Reason::BoundsInvalid);
    }
    if decryption > record.primary_version {
        return Err(Reason::BoundsInvalid);
    }
    if encryption != 0 && (encryption < decryption || encryption > record.latest_version) {
        return Err(Reason::BoundsInvalid);
    }
    if decryption < record.min_available_version {
        return Err(Reason::VersionTrimmed);
    }
    record.min_decryption_version = decryption;
    record.min_encryption_version = encryption;
    Ok(())
}

/// Checks a trim: only what neither opens nor seals any more, never backwards.
///
/// # Errors
/// [`Reason::BoundsInvalid`] or [`Reason::VersionTrimmed`].
pub fn check_trim(record: &KeyRecord, min_available: u32) -> Result<(), Reason> {
    if min_available < record.min_available_version {
        return Err(Reason::VersionTrimmed);
    }
    if record.min_encryption_version == 0
        || min_available > record.min_encryption_version
        || min_available > record.min_decryption_version
    {
        return Err(Reason::BoundsInvalid);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> KeyRecord {
        let mut key = KeyRecord {
            primary_version: 1,
            latest_version: 1,
            min_decryption_version: 1,
            min_available_version: 1,
            ..KeyRecord::default()
        };
        key.set_state(State::Enabled);
        key
    }

    #[test]
    fn ids_are_time_ordered_and_parse_in_either_case_only_hyphenated() {
        let a = KeyId::mint(Time::from_seconds(1_000_000));
        let b = KeyId::mint(Time::from_seconds(1_000_001));
        assert!(a < b);
        assert_eq!(KeyId::parse(&a.to_string().to_uppercase()), Some(a));
        for bad in ["", "{}", &a.to_string().replace('-', ""), &format!("urn:uuid:{a}")] {
            assert_eq!(KeyId::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        /// Whatever is done in whatever order: a revoked key never does anything again, a
        /// destroyed one has no way back, and cancelling never enables.
        #[test]
        fn no_sequence_revives_a_key(steps in proptest::collection::vec((0u8..6, 0i64..40), 0..40)) {
            let mut key = key();
            let mut now = Time::from_seconds(1_000_000);
            let mut revoked = false;
            for (step, days) in steps {
                let before = key.clone();
                let was = key_state(&key, now);
                let result = match step {
                    0 => enable(&mut key, now),
                    1 => disable(&mut key, now),
                    2 => revoke(&mut key, now, "r", now),
                    3 => revoke(&mut key, now.plus_seconds(days * 86_400), "later", now),
                    4 => schedule_destruction(&mut key, 7, now),
                    _ => cancel_destruction(&mut key, now),
                };
                if result.is_err() {
                    prop_assert_eq!(&key, &before);
                }
                let is = key_state(&key, now);
                if step == 5 && result.is_ok() {
                    prop_assert!(matches!(is, KeyState::Disabled | KeyState::Revoked));
                    prop_assert_eq!(was, KeyState::PendingDestruction);
                }
                revoked |= is == KeyState::Revoked;
                if revoked {
                    prop_assert!(may_open(&key, now).is_err());
                    prop_assert!(may_seal(&key, now).is_err());
                    prop_assert!(matches!(is, KeyState::Revoked | KeyState::PendingDestruction));
                }
                now = now.plus_seconds(days * 3_600);
                revoked |= key_state(&key, now) == KeyState::Revoked;
            }
        }

        #[test]
        fn bounds_stay_ordered(decryption in 0u32..12, encryption in 0u32..12, trim in 0u32..12) {
            let mut key = key();
            key.latest_version = 8;
            key.primary_version = 7;
            let _ = set_bounds(&mut key, decryption, encryption);
            prop_assert!(1 <= key.min_decryption_version && key.min_decryption_version <= 7);
            let mev = key.min_encryption_version;
            prop_assert!(mev == 0 || (key.min_decryption_version <= mev && mev <= 8));
            if check_trim(&key, trim).is_ok() {
                prop_assert!(trim <= key.min_decryption_version && trim <= mev);
            }
        }
    }
}
