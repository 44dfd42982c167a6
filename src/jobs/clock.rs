//! Whether the clock is believed: while it is not, what cannot be undone waits.
//!
//! The clock is compared with the time since boot, which nobody sets. Where both were last believed
//! stands in the store, so that a restart of the server does not take a clock as it finds it:
//!
//! * **In the same boot** of the machine the two must agree to within an hour, however long the server
//!   was off. If they do not, somebody or something has set the clock: an operator confirms it, or it
//!   is set right.
//! * **After another boot** nothing tells a machine that was off for a week from a clock that was set a
//!   week ahead. The clock is given an hour to be put right by whatever synchronises it; if it then
//!   still stands where it stood, it is believed. An operator may confirm it earlier.

use std::time::Duration;

use polykey_proto::polykey::record::v1::ClockRecord;

use crate::time::Time;

/// The clock may run ahead by this much before it is doubted.
const JUMP: Duration = Duration::from_secs(3600);
/// After another boot the clock must stand for so long, undisturbed.
const SETTLING: Duration = Duration::from_secs(3600);

/// A reading of everything that tells the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// Which boot of the machine this is; `None` where the system does not tell.
    pub(super) boot: Option<[u8; 16]>,
    /// Sleep included, so that a laptop that wakes is not mistaken for a changed clock.
    pub(super) since_boot: Duration,
    pub(super) clock: Time,
}

impl Moment {
    pub(super) fn now(clock: Time) -> Self {
        Self { boot: boot_id(), since_boot: since_boot(), clock }
    }

    fn same_boot(&self, other: &Self) -> bool {
        self.boot.is_some() && self.boot == other.boot
    }

    /// What the clock should say at `other` in the same boot.
    fn expected_at(&self, other: &Self) -> Time {
        self.clock.plus(other.since_boot.saturating_sub(self.since_boot))
    }

    /// How far the clock at `other` is from where it should be: (ahead, behind).
    fn off_at(&self, other: &Self) -> (Duration, Duration) {
        let expected = self.expected_at(other);
        (other.clock.since(expected), expected.since(other.clock))
    }
}

fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn boot_id() -> Option<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(uuid::Uuid::parse_str(text.trim()).ok()?.into_bytes())
}

/// Why what cannot be undone waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// The clock has left the time since boot behind: until it is confirmed or set right.
    Jumped,
    /// The machine was booted since, and the clock is far ahead of the last time known: until it has
    /// stood for an hour.
    Settling,
}

#[derive(Clone, Copy, Debug)]
enum Belief {
    /// Believed, at the anchor.
    Whole,
    Jumped,
    /// Another boot: `known` is the last time believed before it, counted on from the first reading in
    /// this one; `since` is when the clock last moved.
    Settling {
        known: Moment,
        since: Duration,
    },
}

/// The clock as far as it is believed.
#[derive(Debug)]
pub(super) struct Guard {
    /// The last reading by which the next one is judged, in this boot.
    anchor: Moment,
    belief: Belief,
    held: bool,
}

impl Guard {
    /// A clock that is believed at this reading.
    pub(super) fn believing(anchor: Moment) -> Self {
        Self { anchor, belief: Belief::Whole, held: false }
    }

    /// Goes on from what is stored. Without that (a new store, or one of an earlier version), the time
    /// of the last commit is the last one known.
    pub(super) fn resume(stored: Option<&ClockRecord>, last_commit: Time, now: Moment) -> Self {
        let stored_boot = stored.and_then(|s| <[u8; 16]>::try_from(s.boot_id.as_ref()).ok());
        let clock = stored.map_or(last_commit, |s| Time::from_micros(s.clock));
        let micros = u64::try_from(stored.map_or(0, |s| s.since_boot)).unwrap_or(0);
        let last = Moment { boot: stored_boot, since_boot: Duration::from_micros(micros), clock };
        let mut guard = if stored.is_some_and(|stored| stored.jumped) {
            Self { anchor: last, belief: Belief::Jumped, held: false }
        } else if last.same_boot(&now) {
            Self::believing(last)
        } else {
            let known = Moment { clock, ..now };
            let belief = Belief::Settling { known, since: now.since_boot };
            Self { anchor: now, belief, held: false }
        };
        guard.check(now);
        guard
    }

    /// Whether what cannot be undone is held back at this reading.
    pub(super) fn check(&mut self, now: Moment) -> bool {
        let before = self.held;
        let (ahead, behind) = self.anchor.off_at(&now);
        match self.belief {
            Belief::Whole if ahead > JUMP => self.belief = Belief::Jumped,
            Belief::Whole => {}
            // Back where the time since boot says it should be. After another boot nothing says so.
            Belief::Jumped if self.anchor.same_boot(&now) && ahead <= JUMP && behind <= JUMP => {
                *self = Self::believing(now);
            }
            Belief::Jumped => {}
            Belief::Settling { known, since } => {
                if ahead > JUMP || behind > JUMP {
                    // Put right, or put wrong: it must stand again from here.
                    self.anchor = now;
                    self.belief = Belief::Settling { known, since: now.since_boot };
                } else if now.since_boot.saturating_sub(since) >= SETTLING {
                    *self = Self::believing(now);
                }
            }
        }
        self.held = match self.belief {
            Belief::Whole => false,
            Belief::Jumped => true,
            Belief::Settling { known, .. } => known.off_at(&now).0 > JUMP,
        };
        self.tell(before, now);
        self.held
    }

    fn tell(&self, before: bool, now: Moment) {
        match (before, self.doubt()) {
            (false, Some(Doubt::Jumped)) => tracing::error!(
                clock = %now.clock, expected = %self.anchor.expected_at(&now),
                "the clock has jumped ahead: destruction, scheduled revocations and the end of \
                 grace periods wait until it is set right or confirmed with \
                 `polykey jobs --confirm-clock` (use is refused meanwhile)"
            ),
            (false, Some(Doubt::Settling)) => tracing::warn!(
                clock = %now.clock,
                "the machine was started again and the clock is more than an hour ahead of the last \
                 time known: destruction, scheduled revocations and the end of grace periods wait \
                 until it has stood for an hour, or is confirmed with `polykey jobs --confirm-clock`"
            ),
            (true, None) => tracing::info!(clock = %now.clock, "the clock is believed again"),
            _ => {}
        }
    }

    /// Why work is held back, as of the last reading.
    pub(super) fn doubt(&self) -> Option<Doubt> {
        match self.belief {
            _ if !self.held => None,
            Belief::Settling { .. } => Some(Doubt::Settling),
            _ => Some(Doubt::Jumped),
        }
    }

    /// What is to stand in the store after a reading; nothing while that is not known.
    pub(super) fn record(&self, now: Moment) -> Option<ClockRecord> {
        let (moment, jumped) = match self.belief {
            Belief::Whole => (now, false),
            // Where it was believed: from there a clock that was set right agrees again.
            Belief::Jumped => (self.anchor, true),
            // As good as believed, unless it is far ahead: then what was known before goes on to count.
            Belief::Settling { .. } if !self.held => (now, false),
            Belief::Settling { .. } => return None,
        };
        Some(ClockRecord {
            boot_id: moment.boot.map_or_else(Vec::new, |id| id.to_vec()).into(),
            since_boot: i64::try_from(moment.since_boot.as_micros()).unwrap_or(i64::MAX),
            clock: moment.clock.micros(),
            jumped,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const START: Time = Time::from_seconds(1_700_000_000);

    fn at(boot: u8, running: Duration, clock: Duration) -> Moment {
        Moment { boot: Some([boot; 16]), since_boot: running, clock: START.plus(clock) }
    }

    fn stored(moment: Moment) -> ClockRecord {
        Guard::believing(moment).record(moment).unwrap()
    }

    #[test]
    fn a_jump_while_the_server_was_off_is_seen_in_the_same_boot() {
        let before = stored(at(1, HOUR, HOUR));
        // A week off, and both have gone on.
        let week = 7 * 24 * HOUR;
        let guard = Guard::resume(Some(&before), START, at(1, HOUR + week, HOUR + week));
        assert_eq!(guard.doubt(), None);
        let ahead = at(1, 2 * HOUR, week);
        let guard = Guard::resume(Some(&before), START, ahead);
        assert_eq!(guard.doubt(), Some(Doubt::Jumped));
        // A further restart does not forget it, in this boot or another one.
        let kept = guard.record(ahead).unwrap();
        let again = at(1, 3 * HOUR, week + HOUR);
        assert_eq!(Guard::resume(Some(&kept), START, again).doubt(), Some(Doubt::Jumped));
        let mut other = Guard::resume(Some(&kept), START, at(2, HOUR, week));
        assert_eq!(other.doubt(), Some(Doubt::Jumped));
        assert!(other.check(at(2, 9 * HOUR, week + 8 * HOUR)));
        // Set right, it agrees again.
        let mut right = Guard::resume(Some(&kept), START, again);
        assert!(!right.check(at(1, 4 * HOUR, 4 * HOUR)));
    }

    #[test]
    fn after_another_boot_a_clock_far_ahead_must_stand_for_an_hour() {
        let before = stored(at(1, 100 * HOUR, HOUR));
        let week = 7 * 24 * HOUR;
        let minute = HOUR / 60;
        let mut guard = Guard::resume(Some(&before), START, at(2, minute, week));
        assert_eq!(guard.doubt(), Some(Doubt::Settling));
        assert_eq!(guard.record(at(2, minute, week)), None, "what was known goes on to count");
        assert!(guard.check(at(2, HOUR, week + HOUR)));
        assert!(!guard.check(at(2, HOUR + minute, week + HOUR)));
        // From then on it is an ordinary clock.
        assert!(guard.check(at(2, HOUR + 2 * minute, 2 * week)));
        assert_eq!(guard.doubt(), Some(Doubt::Jumped));
    }

    #[test]
    fn a_clock_that_is_put_right_after_a_boot_needs_nobody() {
        let before = stored(at(1, 100 * HOUR, HOUR));
        let minute = HOUR / 60;
        // Wrong by years at first, then synchronised: a quarter of an hour after the last time known.
        let mut guard = Guard::resume(Some(&before), START, at(2, minute, 9999 * HOUR));
        assert_eq!(guard.doubt(), Some(Doubt::Settling));
        assert!(!guard.check(at(2, 2 * minute, HOUR + 15 * minute)));
        // A machine without a clock of its own begins where it was, and is put ahead by the network.
        let mut guard = Guard::resume(Some(&before), START, at(2, minute, HOUR));
        assert_eq!(guard.doubt(), None);
        assert!(guard.check(at(2, 2 * minute, 50 * HOUR)));
        assert_eq!(guard.doubt(), Some(Doubt::Settling));
        assert!(guard.check(at(2, HOUR, 51 * HOUR - 2 * minute)));
        assert!(!guard.check(at(2, HOUR + 2 * minute, 51 * HOUR)));
    }

    #[test]
    fn a_store_without_a_record_goes_by_its_last_commit() {
        assert_eq!(Guard::resume(None, START, at(1, HOUR, HOUR / 2)).doubt(), None);
        let guard = Guard::resume(None, START, at(1, HOUR, 3 * HOUR));
        assert_eq!(guard.doubt(), Some(Doubt::Settling));
    }
}
