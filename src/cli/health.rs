//! `polykey health`: for probes and for people; it needs no token.

use std::time::Duration;

use clap::Args;
use polykey_proto::grpc::health::v1 as grpc;
use polykey_proto::grpc::health::v1::health_check_response::ServingStatus;
use polykey_proto::grpc::health::v1::health_client::HealthClient;
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;
use serde::Serialize;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use super::App;
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::value;
use super::view::{enum_word, short, time, word};
use crate::client::Failure;

/// Arguments of `health`.
#[derive(Args, Debug)]
pub struct HealthArgs {
    /// Ask the plain health port at this address (HOST:PORT) instead of the server of the profile.
    #[arg(long, value_name = "ADDR", conflicts_with = "metrics")]
    pub addr: Option<String>,
    /// Ask about this service, such as polykey.v2.PolykeyService; without it, the whole server.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub service: String,
    /// Add the server's figures.
    #[arg(long)]
    pub metrics: bool,
    /// How long to wait for the answer.
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = value::duration)]
    pub timeout: Duration,
}

/// Figures of the node, over its last minute.
#[derive(Serialize)]
pub(super) struct MetricsView {
    pub(super) health: String,
    pub(super) version: String,
    pub(super) build_commit: String,
    pub(super) up_since: Option<String>,
    pub(super) average_response_ms: f64,
    pub(super) requests_per_second: i64,
    pub(super) error_rate_percent: f64,
    pub(super) cpu_percent: f64,
    pub(super) memory_percent: f64,
    pub(super) active_keys: i64,
    pub(super) requests_total: i64,
    pub(super) replication_lag_revisions: Option<i64>,
    pub(super) replication_lag_seconds: Option<f64>,
}

impl From<pb::HealthCheckResponse> for MetricsView {
    fn from(answer: pb::HealthCheckResponse) -> Self {
        let m = answer.metrics.unwrap_or_default();
        Self {
            health: enum_word!(HealthStatus, "HEALTH_STATUS_", answer.status),
            version: answer.service_version,
            build_commit: answer.build_commit,
            up_since: time(m.uptime_since.as_ref()),
            average_response_ms: m.average_response_time_ms,
            requests_per_second: m.requests_per_second,
            error_rate_percent: m.error_rate_percent,
            cpu_percent: m.cpu_usage_percent,
            memory_percent: m.memory_usage_percent,
            active_keys: m.active_keys_count,
            requests_total: m.total_requests_handled,
            replication_lag_revisions: m.replication_lag_revisions,
            replication_lag_seconds: m.replication_lag_seconds,
        }
    }
}

/// Whether the server serves.
#[derive(Serialize)]
pub(super) struct HealthView {
    pub(super) status: String,
    pub(super) serving: bool,
    pub(super) metrics: Option<MetricsView>,
}

impl View for HealthView {
    fn human(&self) -> Human {
        let mut fields = vec![("status", self.status.clone())];
        if let Some(m) = &self.metrics {
            fields.extend([
                ("health", m.health.clone()),
                ("version", m.version.clone()),
                ("up since", short(m.up_since.as_ref())),
                (
                    "requests",
                    format!("{} per second, {} in all", m.requests_per_second, m.requests_total),
                ),
                ("response time", format!("{:.3} ms", m.average_response_ms)),
                ("errors", format!("{:.2} %", m.error_rate_percent)),
                ("processor", format!("{:.1} %", m.cpu_percent)),
                ("memory", format!("{:.1} %", m.memory_percent)),
                ("active keys", m.active_keys.to_string()),
            ]);
            if let (Some(revisions), Some(seconds)) =
                (m.replication_lag_revisions, m.replication_lag_seconds)
            {
                let text = format!("{revisions} revisions, {seconds:.1} s");
                fields.push(("replication lag", text));
            }
        }
        Human::Record(fields)
    }
}

pub(super) async fn run(app: &App, args: HealthArgs) -> Result<(), CliError> {
    let timeout = args.timeout;
    let view = tokio::time::timeout(timeout, ask(app, args)).await.unwrap_or_else(|_| {
        Err(CliError::new(
            Exit::Unavailable,
            format!("no answer within {} s", timeout.as_secs_f64()),
        ))
    })?;
    app.out.print(&view)?;
    if view.serving { Ok(()) } else { Err(CliError::silent(Exit::Unavailable)) }
}

async fn plain(addr: &str) -> Result<Channel, CliError> {
    let bad = || {
        CliError::usage(format!("--addr {addr}: not HOST:PORT"))
            .hint("It is the plain health port of the server's configuration.")
    };
    if addr.contains("://") || !addr.contains(':') {
        return Err(bad());
    }
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|_| bad())?;
    endpoint.connect().await.map_err(|error| {
        let beneath = crate::client::causes(&error);
        let problem = if beneath.refused {
            Some("connection refused".to_owned())
        } else {
            beneath.texts.into_iter().next_back()
        };
        CliError::new(
            Exit::Unavailable,
            format!("cannot reach {addr}: {}", problem.unwrap_or_else(|| error.to_string())),
        )
        .hint("Is the server running, and does its configuration have this health port?")
    })
}

async fn ask(app: &App, args: HealthArgs) -> Result<HealthView, CliError> {
    let channel = match &args.addr {
        Some(addr) => plain(addr).await?,
        None => app.connect().await?.session.channel(),
    };
    let request = Request::new(grpc::HealthCheckRequest { service: args.service });
    let answer = HealthClient::new(channel.clone()).check(request).await.map_err(Failure::from);
    let answer = answer.map_err(|failure| match &args.addr {
        // Nothing came back that is an answer: whoever listens there does not speak plain text.
        Some(addr) if !failure.causes.is_empty() && !failure.refused => CliError::new(
            Exit::Unavailable,
            format!("{addr} does not answer as a plain health port: {failure}"),
        )
        .hint(
            "If it is the TLS port of the server, leave --addr away: the profile names it. The plain \
             port is `health` of [listen] in the server's configuration.",
        ),
        _ => failure.into(),
    })?;
    let status = answer.into_inner().status;
    let metrics = if args.metrics {
        let answer =
            PolykeyServiceClient::new(channel).health_check(()).await.map_err(Failure::from)?;
        Some(MetricsView::from(answer.into_inner()))
    } else {
        None
    };
    let status_word = ServingStatus::try_from(status)
        .map_or_else(|_| status.to_string(), |status| word(status.as_str_name(), ""));
    let serving = status == i32::from(ServingStatus::Serving);
    Ok(HealthView { status: status_word, serving, metrics })
}
