//! Time as a value: the clock is read once, at the edge, and passed in.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Microseconds since the Unix epoch, UTC. 0 stands for "not set" where a record allows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(i64);

/// The last moment that can be written in every time zone before year 10000:
/// 9999-12-30T22:00:00Z.
const LATEST: i64 = 253_402_207_200_000_000;

impl Time {
    /// The latest representable moment.
    pub const MAX: Self = Self(LATEST);

    /// From microseconds since the Unix epoch, clamped to year 9999.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Self {
        Self(if micros > LATEST {
            LATEST
        } else if micros < 0 {
            0
        } else {
            micros
        })
    }

    /// From whole seconds since the Unix epoch.
    #[must_use]
    pub const fn from_seconds(seconds: i64) -> Self {
        Self::from_micros(seconds.saturating_mul(1_000_000))
    }

    /// Microseconds since the Unix epoch.
    #[must_use]
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// Whole seconds since the Unix epoch, rounded down.
    #[must_use]
    pub const fn seconds(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// The stored form of an optional time: 0 is none.
    #[must_use]
    pub const fn optional(micros: i64) -> Option<Self> {
        if micros == 0 { None } else { Some(Self::from_micros(micros)) }
    }

    /// Later by `duration`, clamped.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        Self::from_micros(self.0.saturating_add(micros))
    }

    /// Later by whole seconds (earlier if negative), clamped.
    #[must_use]
    pub const fn plus_seconds(self, seconds: i64) -> Self {
        Self::from_micros(self.0.saturating_add(seconds.saturating_mul(1_000_000)))
    }

    /// How long it is from `earlier` to this; zero if that is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        let micros = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros());
        Self::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }
}

impl std::fmt::Display for Time {
    /// RFC 3339 in UTC with microseconds.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(timestamp) => write!(f, "{timestamp:.6}"),
            Err(_) => write!(f, "{}us", self.0),
        }
    }
}

/// Where the time comes from.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The system's clock.
    System,
    /// A hand-set clock, for tests that must see the future.
    Manual(Arc<AtomicI64>),
}

impl Clock {
    /// A clock that stands at `start` until it is moved.
    #[must_use]
    pub fn manual(start: Time) -> Self {
        Self::Manual(Arc::new(AtomicI64::new(start.micros())))
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Time {
        match self {
            Self::System => SystemTime::now().into(),
            Self::Manual(micros) => Time::from_micros(micros.load(Ordering::SeqCst)),
        }
    }

    /// Moves a hand-set clock; the system's clock stays as it is.
    pub fn advance(&self, by: Duration) {
        if let Self::Manual(micros) = self {
            let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
            micros.fetch_add(by, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_clamp_instead_of_overflowing() {
        assert_eq!(Time::from_seconds(i64::MAX), Time::MAX);
        assert_eq!(Time::MAX.plus(Duration::MAX), Time::MAX);
        assert_eq!(Time::from_seconds(5).plus_seconds(-10), Time::from_micros(0));
        assert_eq!(Time::from_seconds(1).since(Time::from_seconds(2)), Duration::ZERO);
    }

    #[test]
    fn times_print_as_rfc_3339() {
        assert_eq!(Time::from_seconds(0).to_string(), "1970-01-01T00:00:00.000000Z");
        assert_eq!(Time::MAX.to_string(), "9999-12-30T22:00:00.000000Z");
    }
}
