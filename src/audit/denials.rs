//! Denials: the first of a source in a second stand alone, what comes beyond is counted.
//!
//! A source is the verified client, or the address where there is none: what a stranger claims to be
//! must not give it a fresh allowance.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use polykey_proto::polykey::record::v1::AuditEvent;

/// Most sources that are told apart at once; the others share one allowance.
const SOURCES: usize = 10_000;
const WINDOW: Duration = Duration::from_secs(1);
/// A count is written out so long after its first denial, which leaves the rest of the second for
/// the commit.
pub(crate) const HOLD: Duration = Duration::from_millis(700);

#[derive(Debug)]
struct Allowance {
    since: Instant,
    used: u32,
}

#[derive(Debug)]
struct Aggregate {
    since: Instant,
    event: AuditEvent,
    count: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Denials {
    sources: HashMap<String, Allowance>,
    // By source and action.
    aggregates: HashMap<(String, String), Aggregate>,
}

/// What becomes of a denial.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It is recorded by itself.
    Alone(Box<AuditEvent>),
    /// It has been counted.
    Counted,
}

impl Denials {
    pub(crate) fn admit(&mut self, event: AuditEvent, burst: u32, now: Instant) -> Verdict {
        if self.sources.len() >= SOURCES {
            self.sources.retain(|_, a| now.duration_since(a.since) < WINDOW);
        }
        let mut source = if event.client_id.is_empty() {
            format!("@{}", event.peer_address)
        } else {
            event.client_id.clone()
        };
        if self.sources.len() >= SOURCES && !self.sources.contains_key(&source) {
            source = "*".into();
        }
        let allowance =
            self.sources.entry(source.clone()).or_insert(Allowance { since: now, used: 0 });
        if now.duration_since(allowance.since) >= WINDOW {
            *allowance = Allowance { since: now, used: 0 };
        }
        if allowance.used < burst {
            allowance.used += 1;
            return Verdict::Alone(Box::new(event));
        }
        let stands_for = event.count.max(1);
        match self.aggregates.entry((source, event.action.clone())) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(Aggregate { since: now, event, count: stands_for });
            }
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                let Aggregate { event: kept, count, .. } = entry.get_mut();
                *count = count.saturating_add(stands_for);
                generalise(kept, &event);
            }
        }
        Verdict::Counted
    }

    /// Whether there are counts that have not been taken.
    pub(crate) fn waiting(&self) -> bool {
        !self.aggregates.is_empty()
    }

    /// The counts that have been held long enough, or all.
    pub(crate) fn due(&mut self, all: bool, now: Instant) -> Vec<AuditEvent> {
        let due = self.aggregates.extract_if(|_, a| all || now.duration_since(a.since) >= HOLD);
        due.map(|(_, Aggregate { mut event, count, .. })| {
            event.count = count;
            event
        })
        .collect()
    }
}

/// Leaves in `kept` only what holds for `other` too. The request id stays: it is that of the first.
fn generalise(kept: &mut AuditEvent, other: &AuditEvent) {
    if kept.key_id != other.key_id || kept.version != other.version {
        kept.key_id = Default::default();
        kept.version = 0;
    }
    if kept.client_id != other.client_id {
        kept.client_id.clear();
    }
    if kept.peer_address != other.peer_address {
        kept.peer_address.clear();
    }
    if kept.certificate_sha256 != other.certificate_sha256 {
        kept.certificate_sha256.clear();
    }
    if kept.code != other.code {
        kept.code = 0;
    }
    if kept.correlation_id != other.correlation_id {
        kept.correlation_id.clear();
    }
    kept.decision_id.clear();
    kept.details.retain(|name, value| other.details.get(name) == Some(value));
}
