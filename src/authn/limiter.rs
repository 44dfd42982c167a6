//! How many failures one source may cause before it has to wait.

use std::hash::Hash;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;

use crate::time::Time;

/// How many failures at once, and how long until one of them is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Failures at once, at least 1.
    pub burst: u32,
    /// One failure is forgotten in this time.
    pub interval: Duration,
}

/// Counts failures per source with the generic cell rate algorithm: one time per source. Sources
/// beyond the capacity push out those that failed longest ago.
pub struct Limiter<K> {
    // The moment at which a source will have no failures left to forget.
    clear_at: Mutex<LruCache<K, Time>>,
    allowance: Allowance,
}

impl<K: Hash + Eq> Limiter<K> {
    /// A limiter over at most `sources` sources.
    #[must_use]
    pub fn new(allowance: Allowance, sources: usize) -> Self {
        let sources = NonZeroUsize::new(sources).unwrap_or(NonZeroUsize::MIN);
        Self { clear_at: Mutex::new(LruCache::new(sources)), allowance }
    }

    /// Whether `source` may try at `now`.
    ///
    /// # Errors
    /// How long it has to wait.
    pub fn check(&self, source: &K, now: Time) -> Result<(), Duration> {
        let Some(clear_at) = self.clear_at.lock().peek(source).copied() else { return Ok(()) };
        let limit = self.allowance.interval.saturating_mul(self.allowance.burst.max(1));
        let outstanding = clear_at.since(now);
        // The failure that would fill the last place is still allowed to happen.
        let over = (outstanding + self.allowance.interval).saturating_sub(limit);
        if over.is_zero() { Ok(()) } else { Err(over) }
    }

    /// Notes a failure of `source` at `now`.
    pub fn failed(&self, source: K, now: Time) {
        let mut sources = self.clear_at.lock();
        let from = sources.get(&source).map_or(now, |at| (*at).max(now));
        sources.put(source, from.plus(self.allowance.interval));
    }
}

impl<K> std::fmt::Debug for Limiter<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limiter").field("allowance", &self.allowance).finish_non_exhaustive()
    }
}

/// What counts as one address: an IPv4 address, or the /64 that an IPv6 host has to itself.
#[must_use]
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !u128::from(u64::MAX)).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_waits_after_its_burst_and_others_do_not() {
        let allowance = Allowance { burst: 3, interval: Duration::from_secs(10) };
        let limiter = Limiter::new(allowance, 2);
        let now = Time::from_seconds(1000);
        for _ in 0..3 {
            assert_eq!(limiter.check(&'a', now), Ok(()));
            limiter.failed('a', now);
        }
        assert_eq!(limiter.check(&'a', now), Err(Duration::from_secs(10)));
        assert_eq!(limiter.check(&'b', now), Ok(()));
        assert_eq!(limiter.check(&'a', now.plus_seconds(9)), Err(Duration::from_secs(1)));
        assert_eq!(limiter.check(&'a', now.plus_seconds(10)), Ok(()));
        limiter.failed('a', now.plus_seconds(10));
        assert!(limiter.check(&'a', now.plus_seconds(10)).is_err());
        assert_eq!(limiter.check(&'a', now.plus_seconds(100)), Ok(()));
    }

    #[test]
    fn an_ipv6_host_is_its_network() {
        let of = |text: &str| network(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
