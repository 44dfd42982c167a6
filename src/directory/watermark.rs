//! A time that never runs backwards, so that what has expired stays so when the clock is set back.

use std::time::Instant;

use parking_lot::Mutex;

use crate::time::{Clock, Time};

/// The latest time that was seen, carried on by the monotonic clock. After a restart it continues from
/// the latest time that any commit carried (the head's `last_time`).
#[derive(Debug)]
pub struct Watermark {
    seen: Mutex<(Time, Instant)>,
    // A hand-set clock stands still between its moves.
    monotonic: bool,
}

impl Watermark {
    /// Starts at `last_time`.
    #[must_use]
    pub fn new(clock: &Clock, last_time: Time) -> Self {
        let monotonic = matches!(clock, Clock::System);
        Self { seen: Mutex::new((last_time, Instant::now())), monotonic }
    }

    /// The time to judge by at `now`: never earlier than any it gave before, nor than any passed in.
    pub fn at(&self, now: Time) -> Time {
        let mut seen = self.seen.lock();
        let instant = Instant::now();
        let carried = if self.monotonic {
            seen.0.plus(instant.saturating_duration_since(seen.1))
        } else {
            seen.0
        };
        let latest = carried.max(now);
        *seen = (latest, instant);
        latest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_does_not_follow_a_clock_that_goes_back() {
        let clock = Clock::manual(Time::from_seconds(0));
        let mark = Watermark::new(&clock, Time::from_seconds(100));
        assert_eq!(mark.at(Time::from_seconds(50)), Time::from_seconds(100));
        assert_eq!(mark.at(Time::from_seconds(200)), Time::from_seconds(200));
        assert_eq!(mark.at(Time::from_seconds(150)), Time::from_seconds(200));
        let mark = Watermark::new(&Clock::System, Time::from_seconds(100));
        let first = mark.at(Time::from_seconds(1));
        assert!(first >= Time::from_seconds(100));
        assert!(mark.at(Time::from_seconds(1)) >= first);
    }
}
