//! How often a client may call: rules of the operator, each with a bucket for every client it is about.
//!
//! The generic cell rate algorithm (ITU-T I.371), by the `governor` crate. A batch counts as many calls as it has
//! items, everything else once: a stream may last longer than any rule. One that a rule refuses takes nothing
//! from the rules before it but its place there.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};

use crate::context::Caller;
use crate::error::Error;

/// A rule as it is configured: `[rates.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name.
    pub name: String,
    /// Only clients of this tier: `free`, `pro` or `enterprise`.
    pub tier: Option<String>,
    /// Only this client.
    pub client: Option<String>,
    /// Only these methods, such as `CreateKey`. Empty: all.
    pub methods: Vec<String>,
    /// Calls a second of one client.
    pub per_second: NonZeroU32,
    /// Calls at once.
    pub burst: NonZeroU32,
}

type Buckets = RateLimiter<Arc<str>, HashMapStateStore<Arc<str>>, DefaultClock>;

struct Limit {
    rule: Rule,
    buckets: Buckets,
}

/// The rules in force. Without any, a call costs nothing.
#[derive(Default)]
pub struct Rates {
    limits: Vec<Limit>,
    clock: DefaultClock,
}

impl std::fmt::Debug for Rates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rules: Vec<_> = self.limits.iter().map(|limit| &limit.rule).collect();
        f.debug_struct("Rates").field("rules", &rules).finish_non_exhaustive()
    }
}

impl Rule {
    fn about(&self, caller: &Caller, method: &str) -> bool {
        let is = |named: &Option<String>, what: &str| named.as_ref().is_none_or(|n| n == what);
        is(&self.tier, &caller.facts.tier)
            && is(&self.client, caller.client_id())
            && (self.methods.is_empty() || self.methods.iter().any(|name| name == method))
    }
}

impl Rates {
    /// These rules, with full buckets.
    #[must_use]
    pub fn new(rules: &[Rule]) -> Self {
        let limit = |rule: &Rule| {
            let quota = Quota::per_second(rule.per_second).allow_burst(rule.burst);
            Limit {
                rule: rule.clone(),
                buckets: RateLimiter::hashmap_with_clock(quota, DefaultClock::default()),
            }
        };
        Self { limits: rules.iter().map(limit).collect(), clock: DefaultClock::default() }
    }

    /// The rules, in the order of their names.
    #[must_use]
    pub fn rules(&self) -> Vec<Rule> {
        self.limits.iter().map(|limit| limit.rule.clone()).collect()
    }

    /// Forgets clients whose buckets are full again.
    pub fn forget(&self) {
        self.limits.iter().for_each(|limit| limit.buckets.retain_recent());
    }

    /// Counts a call of `path`, `/service/Method`.
    ///
    /// # Errors
    /// [`Error::Exhausted`] with the time until there is room again.
    pub fn admit(&self, caller: &Caller, path: &str) -> Result<(), Error> {
        if self.limits.is_empty() {
            return Ok(());
        }
        self.take(caller, path.rsplit('/').next().unwrap_or_default(), NonZeroU32::MIN, 0)
    }

    /// Counts the items of a batch, which came as the call `method` and was counted as its first item.
    ///
    /// # Errors
    /// [`Error::Invalid`] of `field` if there are more than a rule ever lets through at once,
    /// [`Error::Exhausted`] with the time until there is room again.
    pub fn admit_items(
        &self,
        caller: &Caller,
        method: &str,
        (field, items): (&str, usize),
    ) -> Result<(), Error> {
        let items = u32::try_from(items).unwrap_or(u32::MAX);
        let about = self.limits.iter().filter(|limit| limit.rule.about(caller, method));
        if let Some(most) = about.map(|limit| limit.rule.burst.get()).min().filter(|m| *m < items) {
            let text =
                format!("must have at most {most} items: the rates let no more through at once");
            return Err(Error::invalid(field, text));
        }
        match NonZeroU32::new(items.saturating_sub(1)) {
            Some(more) => self.take(caller, method, more, 1),
            None => Ok(()),
        }
    }

    /// Who comes back takes `first` again before these.
    fn take(
        &self,
        caller: &Caller,
        method: &str,
        calls: NonZeroU32,
        first: u32,
    ) -> Result<(), Error> {
        for limit in self.limits.iter().filter(|limit| limit.rule.about(caller, method)) {
            let wait = match limit.buckets.check_key_n(&caller.facts.client, calls) {
                Ok(Ok(())) => continue,
                Ok(Err(until)) => until.wait_time_from(self.clock.now()),
                // Not reached: no more are asked for than the burst.
                Err(_) => Duration::from_secs(1),
            };
            tracing::debug!(
                client = caller.client_id(),
                rule = limit.rule.name,
                method,
                "too often"
            );
            // At least so long that whoever obeys does not come back too early.
            let again = Duration::from_secs(1) / limit.rule.per_second.get() * first;
            let retry_after = (wait + again).max(Duration::from_millis(1));
            return Err(Error::Exhausted { retry_after });
        }
        Ok(())
    }
}
