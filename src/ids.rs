//! UUIDv7 (RFC 9562 §5.7), minted without a system call: several are on the path of each request.
//!
//! The 12 bits after the millisecond hold its fraction (§6.2, method 3), so that ids sort by age to a
//! quarter of a microsecond, and 62 bits are random.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::{Builder, NoContext, Timestamp, Uuid};

use crate::time::Time;

/// A new id of that moment.
pub(crate) fn at(now: Time) -> Uuid {
    let micros = u64::try_from(now.micros()).unwrap_or(0);
    let (millis, fraction) = (micros / 1000, micros % 1000 * 4096 / 1000);
    match polykey_hsm::random::id::<10>() {
        Ok(mut rest) => {
            let [.., high, low] = fraction.to_be_bytes();
            [rest[0], rest[1]] = [high, low];
            Builder::from_unix_timestamp_millis(millis, &rest).into_uuid()
        }
        // The other generator panics if it fails too: without randomness there are no ids.
        Err(_) => {
            #[expect(clippy::cast_possible_truncation, reason = "below 10^9")]
            let nanos = ((micros % 1_000_000) * 1000) as u32;
            Uuid::new_v7(Timestamp::from_unix(NoContext, micros / 1_000_000, nanos))
        }
    }
}

/// A new id of now, by the clock of the system.
pub(crate) fn now() -> Uuid {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    at(Time::from_micros(i64::try_from(since.as_micros()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_version_7_of_their_moment_and_sort_by_it() {
        let mut last = Uuid::nil();
        let mut seen = HashSet::new();
        for micros in (1_700_000_000_123_000..1_700_000_000_125_000).step_by(7) {
            let id = at(Time::from_micros(micros));
            assert_eq!(id.get_version_num(), 7);
            assert_eq!(id.get_variant(), uuid::Variant::RFC4122);
            let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
            assert_eq!(seconds, 1_700_000_000);
            assert_eq!(i64::from(nanos / 1_000_000), micros / 1000 % 1000);
            assert!(id > last, "{id} after {last}");
            last = id;
        }
        for _ in 0..10_000 {
            assert!(seen.insert(at(Time::from_micros(5))));
        }
    }
}
