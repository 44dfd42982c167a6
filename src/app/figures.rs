//! Every figure of a node, gathered from what exists when somebody asks.
//!
//! Gathering asks nothing that may not answer: what takes a read of the store or of a file system is
//! looked at in the background and remembered in [`Slow`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use super::{App, tasks};
use crate::cache::Counts;
use crate::custody::breaker::Ask;
use crate::custody::signing::{self, Purpose};
use crate::health::State;
use crate::jobs::Waiting;
use crate::metrics::family::Figures;
use crate::metrics::{open_descriptors, process_time, resident_bytes, threads};
use crate::time::Time;

/// How long a look may take before it is given up until the next one.
const PATIENCE: Duration = Duration::from_secs(5);
/// Jobs that are looked at for what waits of each kind.
const JOBS: usize = 1_000;

/// Figures that take a read. 0: not known.
#[derive(Debug, Default)]
pub struct Slow {
    store_bytes: AtomicU64,
    journal_bytes: AtomicU64,
    /// When the key that signs tokens is followed by another, Unix time.
    token_key_until: AtomicI64,
    /// What waits of each kind of job.
    waiting: Mutex<BTreeMap<i32, Waiting>>,
}

fn known<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

impl App {
    /// Looks at what takes a read.
    pub(super) async fn look(&self) {
        if self.config.storage.database.is_none() {
            let path = self.config.storage.path.clone();
            let sizes = tokio::task::spawn_blocking(move || {
                let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |m| m.len());
                let mut journal = path.clone().into_os_string();
                journal.push("-journal");
                (size(&path), size(journal.as_ref()))
            });
            if let Ok((store, journal)) = sizes.await {
                self.slow.store_bytes.store(store, Relaxed);
                self.slow.journal_bytes.store(journal, Relaxed);
            }
        }
        if let Ok(Ok(waiting)) = tokio::time::timeout(PATIENCE, self.jobs.waiting(JOBS)).await {
            *self.slow.waiting.lock() = waiting;
        }
        let keys = signing::list(&self.vault, Purpose::Token);
        if let Ok(Ok(keys)) = tokio::time::timeout(PATIENCE, keys).await {
            let now = self.clock.now();
            let until = keys.iter().find(|key| key.signs(now)).map_or(Time::default(), |key| {
                let old = key.created_at().plus(tasks::SIGNING_KEY_AGE);
                key.active_until().map_or(old, |until| until.min(old))
            });
            self.slow.token_key_until.store(until.seconds(), Relaxed);
        }
    }

    /// All figures.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let mut all = Figures::default();
        self.about_itself(&mut all);
        self.calls.gather(&mut all);
        self.about_network(&mut all);
        self.about_store(&mut all);
        self.about_audit(&mut all);
        self.about_caches(&mut all);
        self.about_quotas(&mut all);
        self.about_wrappers(&mut all);
        self.about_others(&mut all);
        self.about_expiry(&mut all);
        self.about_work(&mut all);
        self.about_webhooks(&mut all);
        self.telemetry.gather(&mut all);
        all
    }

    fn about_itself(&self, all: &mut Figures) {
        let commit = option_env!("POLYKEY_BUILD_COMMIT").unwrap_or("unknown");
        all.gauge("polykey_build_info", "Which build this is; always 1.")
            .at([("version", env!("CARGO_PKG_VERSION")), ("commit", commit)], 1u64);
        let state = self.health.state();
        let mut health =
            all.gauge("polykey_health", "1 for the state that the node is in, 0 for the others.");
        for (word, is) in [
            ("serving", state == State::Serving),
            ("degraded", matches!(state, State::Degraded(_))),
            ("not_serving", matches!(state, State::NotServing(_))),
        ] {
            health.at([("state", word)], is);
        }
        all.gauge("polykey_process_resident_memory_bytes", "Resident memory of the process.")
            .may_be(resident_bytes());
        all.counter("polykey_process_cpu_seconds_total", "Processor time of the process.")
            .is(process_time());
        all.gauge("polykey_process_open_fds", "Open file descriptors.").may_be(open_descriptors());
        let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        all.gauge("polykey_process_max_fds", "File descriptors that may be open.").may_be(most);
        all.gauge("polykey_process_threads", "Threads of the process.").may_be(threads());
        let start = u64::try_from(self.started_at.seconds()).unwrap_or(0);
        all.gauge("polykey_start_timestamp_seconds", "When the node was opened, Unix time.")
            .is(start);
    }

    fn about_network(&self, all: &mut Figures) {
        let Some(seen) = self.network.get().map(|network| network.snapshot()) else { return };
        all.gauge("polykey_connections_open", "Connections, those in their handshake included.")
            .is(seen.connections_open);
        all.gauge("polykey_handshakes_in_flight", "TLS handshakes running.")
            .is(seen.handshakes_in_flight);
        all.counter("polykey_connections_total", "Connections accepted and kept.")
            .is(seen.connections_total);
        let mut refused = all.counter(
            "polykey_refused_total",
            "What was refused before any method was reached, by reason.",
        );
        for (reason, count) in [
            ("connections", seen.connections_refused),
            ("requests_in_flight", seen.requests_refused),
            ("certificate", seen.certificates_refused),
        ] {
            refused.at([("reason", reason)], count);
        }
        let mut handshakes =
            all.counter("polykey_handshakes_failed_total", "TLS handshakes that failed.");
        let rest = seen.handshakes_timed_out.saturating_add(seen.handshakes_evicted);
        for (reason, count) in [
            ("timeout", seen.handshakes_timed_out),
            ("evicted", seen.handshakes_evicted),
            ("other", seen.handshakes_failed.saturating_sub(rest)),
        ] {
            handshakes.at([("reason", reason)], count);
        }
        all.counter("polykey_handshakes_resumed_total", "Handshakes that resumed a session.")
            .is(seen.handshakes_resumed);
        all.counter("polykey_accept_errors_total", "Errors of accepting: no descriptors, memory.")
            .is(seen.accept_errors);
        all.counter("polykey_panics_total", "Requests that panicked: bugs.").is(seen.panics);
    }

    fn about_store(&self, all: &mut Figures) {
        let (_, commits, failed) = self.vault.metrics().read();
        let (latency, sizes) = self.vault.metrics().distributions();
        all.histogram(
            "polykey_commit_duration_seconds",
            "Time in which the store made a group of changes durable.",
        )
        .is(latency);
        all.histogram("polykey_commit_group_size", "Changes in a group.").is(sizes);
        all.counter("polykey_commits_total", "Changes that became durable.").is(commits);
        all.counter("polykey_commit_groups_failed_total", "Groups that did not.").is(failed);
        let (waiting, most) = self.vault.queued();
        let mut queue = all.gauge("polykey_queue_depth", "What waits in a queue.");
        let audit = self.trail.status();
        queue.at([("queue", "commits")], waiting);
        queue.at([("queue", "audit")], audit.queued);
        let mut capacity = all.gauge("polykey_queue_capacity", "What may wait in a queue.");
        capacity.at([("queue", "commits")], most);
        capacity.at([("queue", "audit")], audit.capacity);
        let head = self.vault.head();
        all.gauge("polykey_keys_enabled", "Enabled keys.").is(head.keys);
        all.gauge("polykey_store_rows", "Sealed rows of the store.").is(head.rows);
        let mut size = all.gauge("polykey_store_size_bytes", "Size of the store's files.");
        for (file, bytes) in
            [("store", &self.slow.store_bytes), ("journal", &self.slow.journal_bytes)]
        {
            if let Some(bytes) = known(bytes.load(Relaxed)) {
                size.at([("file", file)], bytes);
            }
        }
        all.gauge("polykey_store_writable", "Whether the store takes changes.")
            .is(self.vault.writable() && self.vault.intact());
        all.gauge("polykey_store_damaged_rows", "Rows that do not open and are left out.")
            .is(self.vault.damaged());
    }

    fn about_audit(&self, all: &mut Figures) {
        let status = self.trail.status();
        all.gauge("polykey_audit_failing", "Whether events cannot be made durable just now.")
            .is(status.failing);
        all.counter("polykey_audit_leaves_total", "Leaves of the audit log, since it began.")
            .is(self.vault.leaves());
        all.gauge("polykey_audit_uncovered_leaves", "Leaves that no checkpoint covers yet.")
            .is(status.uncovered);
        let signed = status.checkpoint.and_then(|time| u64::try_from(time.seconds()).ok());
        all.gauge(
            "polykey_audit_checkpoint_timestamp_seconds",
            "When the last checkpoint was signed, Unix time.",
        )
        .may_be(signed);
        all.gauge("polykey_audit_usage_backlog", "Leaves whose use of keys is not written yet.")
            .is(status.usage_backlog);
    }

    fn about_caches(&self, all: &mut Figures) {
        let counts: Vec<(&str, Counts)> = (self.keyring.cache_counts().into_iter())
            .chain(self.directory.cache_counts())
            .chain([("sessions", self.authenticator.session_counts())])
            .collect();
        let mut lookups = all.counter("polykey_cache_lookups_total", "Look-ups in a cache.");
        for (cache, counts) in &counts {
            lookups.at([("cache", cache), ("result", "hit")], counts.hits);
            lookups.at([("cache", cache), ("result", "miss")], counts.misses);
        }
        let mut entries = all.gauge("polykey_cache_entries", "What a cache holds.");
        for (cache, counts) in &counts {
            entries.at([("cache", cache)], counts.entries);
        }
    }

    fn about_quotas(&self, all: &mut Figures) {
        let mut refused =
            all.counter("polykey_quota_refused_total", "Keys that a quota refused, by its name.");
        for (name, count) in self.keyring.quotas().refused() {
            refused.at([("quota", &*name)], count);
        }
    }

    fn about_wrappers(&self, all: &mut Figures) {
        let mut opened = all.gauge(
            "polykey_root_unwrap_seconds",
            "How long opening the root key took at the start, slots that did not open included.",
        );
        if let Some((slot, took)) = self.custody.opened_in() {
            opened.at([("slot", &*data_encoding::HEXLOWER.encode(&slot))], took);
        }
        let known = self.backends.breakers();
        let each = || {
            let asked = known.iter().flat_map(|(breaker, _)| {
                Ask::ALL
                    .into_iter()
                    .zip(breaker.asked())
                    .map(|(ask, asked)| (breaker.name(), ask, asked.read()))
            });
            asked.map(|(name, ask, read)| ([("wrapper", name), ("operation", ask.name())], read))
        };
        let mut latency = all.histogram(
            "polykey_wrapper_call_duration_seconds",
            "Time of a call to a hardware or cloud wrapper of hardened keys.",
        );
        each().for_each(|(labels, (seen, _, _))| latency.at(labels, seen));
        let mut failed = all.counter("polykey_wrapper_calls_failed_total", "Calls that failed.");
        each().for_each(|(labels, (_, count, _))| failed.at(labels, count));
        let mut refused = all.counter(
            "polykey_wrapper_calls_refused_total",
            "Calls that were not made because the breaker was open.",
        );
        each().for_each(|(labels, (_, _, count))| refused.at(labels, count));
        let mut open = all.gauge(
            "polykey_wrapper_breaker_open",
            "1 while a wrapper is not asked because it does not answer.",
        );
        known.iter().for_each(|(b, _)| open.at([("wrapper", b.name())], b.is_open()));
        if let Some(name) = self.backends.missing() {
            open.at([("wrapper", name)], true);
        }
        let mut refuses =
            all.gauge("polykey_wrapper_refuses", "1 while a wrapper answers and says no.");
        known.iter().for_each(|(b, _)| refuses.at([("wrapper", b.name())], b.refuses()));
        let mut running = all.gauge("polykey_wrapper_calls", "Calls that run or wait.");
        known.iter().for_each(|(b, calls)| running.at([("wrapper", b.name())], *calls));
    }

    fn about_others(&self, all: &mut Figures) {
        let shipping = self.replication.as_ref().map(|replicated| replicated.shipping());
        all.gauge("polykey_replication_lag_revisions", "Changes that the target lacks.")
            .may_be(shipping.as_ref().map(|shipping| shipping.lag()));
        all.gauge(
            "polykey_replication_lag_seconds",
            "How long the target has lacked the oldest of them.",
        )
        .may_be(shipping.as_ref().map(|shipping| shipping.behind));
        all.gauge("polykey_replication_away_seconds", "How long the target has taken nothing.")
            .may_be(shipping.as_ref().map(|shipping| shipping.away));
        all.gauge(
            "polykey_node_lease_seconds",
            "How long this node may serve what it remembers without a look at the store it shares.",
        )
        .may_be(self.vault.lease_left());
    }

    fn about_work(&self, all: &mut Figures) {
        let now = self.clock.now();
        let waiting = self.slow.waiting.lock().clone();
        let each: Vec<_> = (self.jobs.work().all())
            .map(|(kind, work)| {
                let waiting = kind.and_then(|kind| waiting.get(&i32::from(kind)).copied());
                (kind, work.name, work.figures(), waiting.unwrap_or_default())
            })
            .collect();
        let mut runs = all.counter("polykey_background_runs_total", "Background work that ended.");
        for (_, name, seen, _) in &each {
            runs.at([("work", name), ("result", "done")], seen.done);
            runs.at([("work", name), ("result", "failed")], seen.failed);
        }
        let mut running = all.gauge("polykey_background_running", "Background work that runs.");
        each.iter()
            .for_each(|(_, name, seen, _)| running.at([("work", name)], u64::from(seen.running)));
        let mut last = all.gauge(
            "polykey_background_last_run_timestamp_seconds",
            "When background work last ended, Unix time.",
        );
        for (_, name, seen, _) in &each {
            if let Some(at) = seen.last.at.and_then(|at| u64::try_from(at.seconds()).ok()) {
                last.at([("work", name)], at);
            }
        }
        let mut due =
            all.gauge("polykey_background_due", "Jobs that are due, of the first 1,000 scheduled.");
        for (_, name, _, waiting) in each.iter().filter(|(kind, ..)| kind.is_some()) {
            due.at([("work", name)], u64::from(waiting.due));
        }
        let mut behind = all.gauge(
            "polykey_background_behind_seconds",
            "How long the job that waits longest has been due.",
        );
        for (_, name, _, waiting) in each.iter().filter(|(kind, ..)| kind.is_some()) {
            let since = waiting.since.map_or(Duration::ZERO, |since| now.since(since));
            behind.at([("work", name)], since);
        }
    }

    fn about_webhooks(&self, all: &mut Figures) {
        let each = self.webhooks.status();
        let mut tries =
            all.counter("polykey_webhook_deliveries_total", "Tries to deliver events to webhooks.");
        for webhook in &each {
            for (result, count) in [
                ("delivered", webhook.delivered),
                ("failed", webhook.failed),
                ("given_up", webhook.given_up),
            ] {
                tries.at([("webhook", webhook.name.as_str()), ("result", result)], count);
            }
        }
        let mut behind = all.gauge(
            "polykey_webhook_behind_seconds",
            "How old the event is that a webhook is told next; 0 where none waits.",
        );
        each.iter()
            .for_each(|webhook| behind.at([("webhook", webhook.name.as_str())], webhook.behind));
    }

    fn about_expiry(&self, all: &mut Figures) {
        let mut ends = all.gauge(
            "polykey_certificate_not_after_timestamp_seconds",
            "When the first certificate or revocation list of a kind ends, Unix time.",
        );
        ends.at([("certificate", "server")], self.tls.certificate_not_after());
        if let Some(end) = self.tls.client_ca_not_after() {
            ends.at([("certificate", "client_ca")], end);
        }
        if let Some(next) = self.tls.crl_next_update() {
            ends.at([("certificate", "crl")], next);
        }
        let until = known(self.slow.token_key_until.load(Relaxed));
        all.gauge(
            "polykey_token_key_not_after_timestamp_seconds",
            "When another key follows the one that signs tokens, Unix time.",
        )
        .may_be(until.and_then(|until| u64::try_from(until).ok()));
    }
}
