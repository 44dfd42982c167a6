//! When it is told that something expires.

use std::time::Duration;

use polykey_proto::polykey::record::v1::JobRecord;

use crate::time::Time;

/// Days before an expiry at which it is told, and the expiry itself.
const DAYS: [u32; 4] = [30, 7, 1, 0];

fn before(expires: Time, days: u32) -> Time {
    let ahead = Duration::from_secs(u64::from(days) * 86_400);
    Time::from_micros(
        expires.since(Time::default().plus(ahead)).as_micros().try_into().unwrap_or(0),
    )
}

/// The first notice that is still to come of what expires at `expires_at` (µs; 0 = never), and how many days
/// it is ahead.
#[must_use]
pub fn next_notice(expires_at: i64, now: Time) -> Option<(Time, u32)> {
    let expires = Time::optional(expires_at)?;
    DAYS.into_iter().map(|days| (before(expires, days), days)).find(|(at, _)| *at > now)
}

/// What a job has to tell at `now`: how many days ahead, 0 = it has expired. Of several notices that have
/// come due, the last. `None` if the expiry has changed since.
#[must_use]
pub fn due_notice(job: &JobRecord, expires_at: i64, now: Time) -> Option<u32> {
    let expires = Time::optional(expires_at)?;
    if !DAYS.contains(&job.version) || before(expires, job.version).micros() != job.due {
        return None;
    }
    let mut passed = DAYS.into_iter().filter(|days| before(expires, *days) <= now);
    passed.next_back().map(|last| last.min(job.version))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    fn at(days: i64) -> Time {
        Time::from_seconds(1_700_000_000 + days * DAY)
    }

    #[test]
    fn each_threshold_follows_the_one_before_and_what_was_missed_is_left_out() {
        let expires = at(100).micros();
        assert_eq!(next_notice(expires, at(0)), Some((at(70), 30)));
        assert_eq!(next_notice(expires, at(70)), Some((at(93), 7)));
        assert_eq!(next_notice(expires, at(95)), Some((at(99), 1)));
        assert_eq!(next_notice(expires, at(99)), Some((at(100), 0)));
        assert_eq!((next_notice(expires, at(100)), next_notice(0, at(0))), (None, None));
        let job = JobRecord { due: at(70).micros(), version: 30, ..JobRecord::default() };
        assert_eq!(due_notice(&job, expires, at(70)), Some(30));
        assert_eq!(due_notice(&job, expires, at(94)), Some(7), "after a long sleep");
        assert_eq!(due_notice(&job, expires, at(200)), Some(0));
        assert_eq!(due_notice(&job, at(101).micros(), at(70)), None, "it expires later now");
        assert_eq!(due_notice(&job, 0, at(70)), None, "it expires no more");
    }
}
