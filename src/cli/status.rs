//! `polykey status|top|reload`: the node on one screen.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::error::{CliError, Exit};
use super::health::MetricsView;
use super::output::{Human, View, write_out};
use super::remote::Remote;
use super::value;
use super::view::{enum_word, short, time, yes};
use crate::client::rpc;

/// Arguments of `top`.
#[derive(Args, Debug)]
pub struct TopArgs {
    /// How often it is asked.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = value::duration)]
    pub interval: Duration,
    /// End after so many screens; without it, Ctrl-C ends it.
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

/// How the node does.
#[derive(Serialize)]
pub(super) struct StatusView {
    pub(super) health: String,
    pub(super) problems: Vec<String>,
    pub(super) version: String,
    pub(super) node: String,
    pub(super) now: Option<String>,
    pub(super) started_at: Option<String>,
    pub(super) certificate_not_after: Option<String>,
    pub(super) crl_next_update: Option<String>,
    pub(super) connections: u64,
    pub(super) requests_in_flight: u64,
    pub(super) requests_refused: u64,
    pub(super) handshakes_failed: u64,
    pub(super) revision: u64,
    pub(super) audit_leaves: u64,
    pub(super) audit_queued: u64,
    pub(super) audit_capacity: u64,
    pub(super) jobs: u32,
    pub(super) jobs_due: u32,
    pub(super) jobs_failing: u32,
    pub(super) next_job_at: Option<String>,
    pub(super) clock_suspended: bool,
    pub(super) metrics: MetricsView,
}

impl From<pb::GetNodeStatusResponse> for StatusView {
    fn from(s: pb::GetNodeStatusResponse) -> Self {
        let metrics = MetricsView::from(pb::HealthCheckResponse {
            status: s.health,
            timestamp: s.now,
            metrics: s.metrics,
            service_version: s.version.clone(),
            build_commit: s.build_commit,
        });
        Self {
            health: enum_word!(HealthStatus, "HEALTH_STATUS_", s.health),
            problems: s.problems,
            version: s.version,
            node: s.node_id,
            now: time(s.now.as_ref()),
            started_at: time(s.started_at.as_ref()),
            certificate_not_after: time(s.certificate_not_after.as_ref()),
            crl_next_update: time(s.crl_next_update.as_ref()),
            connections: s.connections,
            requests_in_flight: s.requests_in_flight,
            requests_refused: s.requests_refused,
            handshakes_failed: s.handshakes_failed,
            revision: s.revision,
            audit_leaves: s.audit_tree_size,
            audit_queued: s.audit_queued,
            audit_capacity: s.audit_capacity,
            jobs: s.jobs,
            jobs_due: s.jobs_due,
            jobs_failing: s.jobs_failing,
            next_job_at: time(s.next_job_at.as_ref()),
            clock_suspended: s.clock_suspended,
            metrics,
        }
    }
}

impl View for StatusView {
    fn human(&self) -> Human {
        let m = &self.metrics;
        let mut fields = vec![("health", self.health.clone())];
        fields.extend(self.problems.iter().map(|problem| ("problem", problem.clone())));
        let due = match self.jobs_failing {
            0 => format!("{} scheduled, {} due", self.jobs, self.jobs_due),
            failing => format!("{} scheduled, {} due, {failing} FAILING", self.jobs, self.jobs_due),
        };
        fields.extend([
            ("node", format!("{}, version {}", self.node, self.version)),
            ("up since", short(self.started_at.as_ref())),
            ("its clock", short(self.now.as_ref())),
            (
                "requests",
                format!("{} per second, {} in all", m.requests_per_second, m.requests_total),
            ),
            ("response time", format!("{:.3} ms", m.average_response_ms)),
            ("errors", format!("{:.2} %", m.error_rate_percent)),
            (
                "in flight",
                format!("{} on {} connections", self.requests_in_flight, self.connections),
            ),
            (
                "turned away",
                format!(
                    "{} requests, {} handshakes",
                    self.requests_refused, self.handshakes_failed
                ),
            ),
            ("processor", format!("{:.1} %", m.cpu_percent)),
            ("memory", format!("{:.1} %", m.memory_percent)),
            ("active keys", m.active_keys.to_string()),
            ("revision", self.revision.to_string()),
            (
                "audit",
                format!(
                    "{} leaves, {} of {} events waiting",
                    self.audit_leaves, self.audit_queued, self.audit_capacity
                ),
            ),
            ("jobs", due),
            ("next job", short(self.next_job_at.as_ref())),
            ("certificate until", short(self.certificate_not_after.as_ref())),
        ]);
        if self.crl_next_update.is_some() {
            fields.push(("revocations until", short(self.crl_next_update.as_ref())));
        }
        if self.clock_suspended {
            fields.push(("clock in doubt", yes(true)));
        }
        if let (Some(revisions), Some(seconds)) =
            (m.replication_lag_revisions, m.replication_lag_seconds)
        {
            fields.push(("replication lag", format!("{revisions} revisions, {seconds:.1} s")));
        }
        Human::Record(fields)
    }
}

async fn look(remote: &Remote) -> Result<StatusView, CliError> {
    let ask = pb::GetNodeStatusRequest {};
    let answer = remote.read(ask, rpc!(AdminServiceClient, get_node_status)).await?;
    Ok(answer.into())
}

pub(super) async fn status(app: &App) -> Result<(), CliError> {
    let remote = app.connect().await?;
    app.out.print(&look(&remote).await?)
}

/// Clears a terminal and goes to its first place (ECMA-48: ED, CUP).
const CLEAR: &[u8] = b"\x1b[2J\x1b[H";

pub(super) async fn top(app: &App, args: TopArgs) -> Result<(), CliError> {
    let remote = app.connect().await?;
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        let view = look(&remote).await?;
        if std::io::stdout().is_terminal() {
            write_out(CLEAR)?;
        }
        app.out.print(&view)?;
        left -= 1;
        if left > 0 {
            tokio::time::sleep(args.interval).await;
        }
    }
    Ok(())
}

/// What was read again.
#[derive(Serialize)]
pub(super) struct ReloadView {
    pub(super) ok: bool,
    pub(super) parts: Vec<PartView>,
}

/// One part of it.
#[derive(Serialize)]
pub(super) struct PartView {
    pub(super) name: String,
    pub(super) ok: bool,
    pub(super) problem: Option<String>,
}

impl From<pb::ReloadConfigurationResponse> for ReloadView {
    fn from(answer: pb::ReloadConfigurationResponse) -> Self {
        let part = |part: pb::ReloadedPart| PartView {
            name: part.name,
            ok: part.ok,
            problem: (!part.ok).then_some(part.problem),
        };
        let parts: Vec<PartView> = answer.parts.into_iter().map(part).collect();
        Self { ok: parts.iter().all(|part| part.ok), parts }
    }
}

impl View for ReloadView {
    fn human(&self) -> Human {
        let mut text = String::new();
        for part in &self.parts {
            match &part.problem {
                None => text.push_str(&format!("ok     {}\n", part.name)),
                Some(problem) => {
                    text.push_str(&format!("WRONG  {}: {problem}\n", part.name));
                    text.push_str("       What was in force before is still.\n");
                }
            }
        }
        Human::Text(text)
    }
}

pub(super) async fn reload(app: &App) -> Result<(), CliError> {
    let remote = app.connect().await?;
    let ask = pb::ReloadConfigurationRequest {};
    let answer = remote.mutate(ask, rpc!(AdminServiceClient, reload_configuration)).await?;
    let view = ReloadView::from(answer);
    app.out.print(&view)?;
    if view.ok { Ok(()) } else { Err(CliError::silent(Exit::Usage)) }
}
