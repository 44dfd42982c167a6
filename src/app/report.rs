//! What the node says of its health: which facts count, and HealthCheck's answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use polykey_proto::polykey::v2 as pb;
use polykey_storage::replicated::Replicated;
use prost_types::Timestamp;

use super::App;
use crate::anchor::Keeper;
use crate::audit::Trail;
use crate::custody::backends::{self, Backends, Trouble};
use crate::health::{Check, Health, STOPPING, State};
use crate::jobs::{Doubt, Runner};
use crate::metrics::RequestMetrics;
use crate::net::NetMetrics;
use crate::net::tls::TlsState;
use crate::time::Time;
use crate::vault::Vault;

/// A server certificate with less left than this, in seconds, wants attention: 7 days.
const EXPIRES_SOON: u64 = 7 * 86_400;

/// The facts, worst first.
pub(super) fn checks(
    vault: &Arc<Vault>,
    trail: &Arc<Trail>,
    tls: &Arc<TlsState>,
    jobs: &Arc<Runner>,
    backends: &Arc<Backends>,
    stopping: &Arc<AtomicBool>,
    anchor: &Option<Arc<Keeper>>,
) -> Vec<Check> {
    let stopping = Arc::clone(stopping);
    let anchor = anchor.clone();
    let (store, written) = (Arc::clone(vault), Arc::clone(trail));
    let (tls, jobs, behind) = (Arc::clone(tls), Arc::clone(jobs), Arc::clone(backends));
    vec![
        Box::new(move || {
            if stopping.load(Ordering::SeqCst) {
                State::NotServing(STOPPING)
            } else {
                State::Serving
            }
        }),
        Box::new(move || {
            if !store.intact() {
                State::NotServing("the store failed its verification; writing has stopped")
            } else if !store.writable() {
                State::NotServing("the store takes no commits")
            } else if store.behind().is_some() {
                State::NotServing("this node cannot tell what others change: the log says why")
            } else if store.unread() {
                State::Degraded(
                    "the store could not be read to the end by its last verification".into(),
                )
            } else if store.damaged() > 0 {
                State::Degraded(
                    "stored rows are damaged and left out: `polykey store verify` counts them and \
                     names the first 100"
                        .into(),
                )
            } else {
                State::Serving
            }
        }),
        Box::new(move || {
            let status = written.status();
            if status.failing {
                State::NotServing("the audit trail cannot be written")
            } else if status.queued.saturating_mul(10) >= status.capacity.saturating_mul(9) {
                State::Degraded("the audit queue is nearly full".into())
            } else {
                State::Serving
            }
        }),
        Box::new(move || anchor.as_ref().map_or(State::Serving, |anchor| anchor.state())),
        Box::new(move || certificates(&tls)),
        Box::new(move || match behind.trouble() {
            None => State::Serving,
            Some((name, trouble)) => {
                let does = match trouble {
                    Trouble::Away => "does not answer",
                    Trouble::Refuses => "refuses (the log says why)",
                };
                let text = format!(
                    "{} {does}: hardened keys under it that are not open already cannot be used, \
                     and no new ones made",
                    backends::section(&name)
                );
                State::Degraded(text.into())
            }
        }),
        Box::new(move || match jobs.clock_doubt() {
            None => State::Serving,
            Some(Doubt::Jumped) => State::Degraded(
                "the clock has jumped: destruction and the end of grace wait for an operator"
                    .into(),
            ),
            Some(Doubt::Settling) => State::Degraded(
                "the clock is far ahead after a start of the machine: destruction and the end of \
                     grace wait until it has stood for an hour"
                    .into(),
            ),
        }),
    ]
}

fn certificates(tls: &TlsState) -> State {
    let now = tls.now().as_secs();
    let expires = tls.certificate_not_after();
    if expires < now {
        return State::NotServing("the server's certificate has expired");
    }
    if tls.crl_next_update().is_some_and(|next| next < now) {
        return State::NotServing(
            "the revocation list is out of date: every client certificate is refused",
        );
    }
    if expires < now.saturating_add(EXPIRES_SOON) {
        return State::Degraded("the server's certificate expires within 7 days".into());
    }
    State::Serving
}

/// HealthCheck's answer, from what is true.
pub(super) struct Report {
    health: Arc<Health>,
    metrics: Arc<RequestMetrics>,
    network: Arc<OnceLock<Arc<NetMetrics>>>,
    vault: Arc<Vault>,
    replication: Option<Arc<Replicated>>,
    started_at: Time,
}

impl Report {
    pub(super) fn of(app: &App) -> Self {
        Self {
            health: Arc::clone(&app.health),
            metrics: Arc::clone(&app.metrics),
            network: Arc::clone(&app.network),
            vault: Arc::clone(&app.vault),
            replication: app.replication.clone(),
            started_at: app.started_at,
        }
    }
}

fn timestamp(time: Time) -> Timestamp {
    let micros = time.micros();
    Timestamp {
        seconds: micros.div_euclid(1_000_000),
        nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap_or(0),
    }
}

impl crate::rpc::Health for Report {
    fn problems(&self) -> Vec<String> {
        self.health.problems()
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "figures")]
    fn report(&self, now: Time) -> pb::HealthCheckResponse {
        let figures = self.metrics.figures();
        let panics = self.network.get().map_or(0, |network| network.snapshot().panics);
        let all = figures.requests.saturating_add(panics);
        let percent = if panics > 0 && all > 0 {
            // Panics never reach the counters of requests; they count since the start.
            figures.error_percent.max(100.0 * panics as f64 / all as f64)
        } else {
            figures.error_percent
        };
        let shipping = self.replication.as_ref().map(|replicated| replicated.shipping());
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        pb::HealthCheckResponse {
            status: self.health.state().wire().into(),
            timestamp: Some(timestamp(now)),
            metrics: Some(pb::ServiceMetrics {
                average_response_time_ms: figures.mean_ms,
                requests_per_second: figures.per_second.round() as i64,
                error_rate_percent: percent,
                cpu_usage_percent: figures.cpu_percent,
                memory_usage_percent: figures.memory_percent,
                active_keys_count: signed(self.vault.enabled_keys()),
                total_requests_handled: signed(all),
                uptime_since: Some(timestamp(self.started_at)),
                replication_lag_revisions: shipping.as_ref().map(|shipping| signed(shipping.lag())),
                replication_lag_seconds: shipping.as_ref().map(|s| s.behind.as_secs_f64()),
            }),
            service_version: env!("CARGO_PKG_VERSION").into(),
            build_commit: option_env!("POLYKEY_BUILD_COMMIT").unwrap_or("unknown").into(),
        }
    }
}
