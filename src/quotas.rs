//! How many keys a client may have: rules of the operator, each counted for every client it is about.
//!
//! What is counted, and how, is in `keyring::owned`; here is who may have how many.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::context::Caller;
use crate::error::Error;

/// A rule as it is configured: `[quotas.NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Its name.
    pub name: String,
    /// Only clients of this tier: `free`, `pro` or `enterprise`.
    pub tier: Option<String>,
    /// Only this client.
    pub client: Option<String>,
    /// Keys that one client has created and that are not destroyed.
    pub keys: NonZeroU32,
}

impl Quota {
    fn about(&self, caller: &Caller) -> bool {
        let is = |named: &Option<String>, what: &str| named.as_ref().is_none_or(|n| n == what);
        is(&self.tier, &caller.facts.tier) && is(&self.client, caller.client_id())
    }
}

/// The rules in force, and how often each has refused. Without any, a creation costs nothing more.
#[derive(Debug, Default)]
pub struct Quotas {
    rules: ArcSwap<Vec<Quota>>,
    /// By name: a rule that goes and comes back goes on counting.
    refused: Mutex<BTreeMap<String, u64>>,
}

impl Quotas {
    /// The rules in force.
    #[must_use]
    pub fn rules(&self) -> Arc<Vec<Quota>> {
        self.rules.load_full()
    }

    /// Puts rules in force.
    pub(crate) fn limit(&self, rules: &[Quota]) {
        let mut refused = self.refused.lock();
        for rule in rules {
            refused.entry(rule.name.clone()).or_default();
        }
        self.rules.store(Arc::new(rules.to_vec()));
    }

    /// How often each rule has refused a key since the start, by its name.
    #[must_use]
    pub fn refused(&self) -> BTreeMap<String, u64> {
        self.refused.lock().clone()
    }

    /// The rule that gives a caller the fewest keys.
    pub(crate) fn of(&self, caller: &Caller) -> Option<Quota> {
        let rules = self.rules.load();
        rules.iter().filter(|rule| rule.about(caller)).min_by_key(|rule| rule.keys).cloned()
    }

    /// What a caller is told who has all the keys that a rule gives.
    pub(crate) fn refusal(&self, quota: Quota) -> Error {
        *self.refused.lock().entry(quota.name.clone()).or_default() += 1;
        Error::Quota { name: quota.name, keys: quota.keys.get() }
    }
}
