//! `polykey doctor`: everything an operator should know before users do.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::super::App as Cli;
use super::super::error::{CliError, Exit};
use super::super::output::{Human, View};
use super::super::remote::Remote;
use super::runtime;
use crate::app::AppError;
use crate::app::doctor::{Diagnosis, Level, examine};
use crate::authz::Action;
use crate::client::rpc;
use crate::config::Config;
use crate::hardening;

/// Arguments of `doctor`.
#[derive(Args, Debug)]
#[command(after_help = "\
Exit codes: 0 if nothing is wrong, 1 after warnings, 2 after errors")]
pub struct DoctorArgs {
    /// The configuration of the node, on its machine. Without it only the running node is asked.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Do not ask the running node.
    #[arg(long, requires = "config")]
    pub offline: bool,
}

/// Days after which a backup is old.
const BACKUP: i64 = 7;
/// How long the node has to answer.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct DoctorView {
    errors: usize,
    warnings: usize,
    findings: Vec<DiagnosisView>,
}

#[derive(Serialize)]
struct DiagnosisView {
    subject: &'static str,
    level: &'static str,
    text: String,
    remedy: Option<String>,
}

impl View for DoctorView {
    fn human(&self) -> Human {
        let mut text = String::new();
        for finding in &self.findings {
            let word = match finding.level {
                "ok" => "ok     ",
                "warning" => "WARNING",
                _ => "ERROR  ",
            };
            text.push_str(&format!("{word}  {}: {}\n", finding.subject, finding.text));
            if let Some(remedy) = &finding.remedy {
                text.push_str(&format!("         {remedy}\n"));
            }
        }
        text.push_str(&format!("\n{} errors, {} warnings\n", self.errors, self.warnings));
        Human::Text(text)
    }
}

/// Examines a node.
///
/// # Errors
/// [`Exit::Other`] after warnings, [`Exit::Usage`] after errors or for a configuration with mistakes.
pub(in crate::cli) fn doctor(cli: &Cli, args: DoctorArgs) -> Result<(), CliError> {
    hardening::private_files();
    let config = args.config.as_ref().map(|file| Config::load(file).map_err(AppError::from));
    let config = config.transpose()?;
    let mut found = Vec::new();
    if let Some(config) = &config {
        found.push(Diagnosis::ok("configuration", config.file.display().to_string()));
    }
    runtime()?.block_on(Box::pin(async {
        if let Some(config) = &config {
            found.extend(examine(config).await);
        }
        if !args.offline {
            let asked = tokio::time::timeout(PATIENCE, Box::pin(ask(cli))).await;
            found.extend(asked.unwrap_or_else(|_| {
                let text = format!("no answer within {} s", PATIENCE.as_secs());
                vec![Diagnosis::not("node", Level::Error, text, "See its log.")]
            }));
        }
    }));
    let count = |level| found.iter().filter(|found| found.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warning));
    let findings = found.into_iter().map(|found| DiagnosisView {
        subject: found.subject,
        level: match found.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Error => "error",
        },
        text: found.text,
        remedy: found.remedy,
    });
    cli.out.print(&DoctorView { errors, warnings, findings: findings.collect() })?;
    match (errors, warnings) {
        (0, 0) => Ok(()),
        (0, _) => Err(CliError::silent(Exit::Other)),
        _ => Err(CliError::silent(Exit::Usage)),
    }
}

/// What the running node says.
async fn ask(cli: &Cli) -> Vec<Diagnosis> {
    let asked = async {
        let remote = cli.connect().await?;
        let mut found = Vec::new();
        let status = remote
            .read(pb::GetNodeStatusRequest {}, rpc!(AdminServiceClient, get_node_status))
            .await?;
        node(&status, &mut found);
        let root = pb::GetRootStatusRequest {};
        slots(&remote.read(root, rpc!(AdminServiceClient, get_root_status)).await?, &mut found);
        let store = pb::GetStoreStatusRequest {};
        let store = remote.read(store, rpc!(AdminServiceClient, get_store_status)).await?;
        stored(&store, &mut found);
        found.push(backup(&remote, &status).await?);
        Ok::<_, CliError>(found)
    };
    asked.await.unwrap_or_else(|error| {
        let remedy = match error.hint.as_str() {
            "" => "Start it, or name a profile with --profile; --offline leaves it out.",
            hint => hint,
        };
        vec![Diagnosis::not("node", Level::Error, error.message.clone(), remedy)]
    })
}

fn node(status: &pb::GetNodeStatusResponse, found: &mut Vec<Diagnosis>) {
    let health = pb::HealthStatus::try_from(status.health).unwrap_or_default();
    let version = &status.version;
    if health == pb::HealthStatus::Healthy {
        found.push(Diagnosis::ok("health", format!("healthy, version {version}")));
    }
    let level = match health {
        pb::HealthStatus::Unhealthy => Level::Error,
        _ => Level::Warning,
    };
    let remedy = "The log says more; docs/operations.md says what to do.";
    for problem in &status.problems {
        found.push(Diagnosis::not("health", level, problem, remedy));
    }
    let jobs = format!("{} scheduled, {} due", status.jobs, status.jobs_due);
    found.push(match (status.jobs_failing, status.clock_suspended) {
        (0, false) => Diagnosis::ok("jobs", jobs),
        (0, true) => Diagnosis::not(
            "jobs",
            Level::Warning,
            format!("{jobs}; those that cannot be undone wait because the clock is in doubt"),
            "If the clock is right: polykey jobs --confirm-clock",
        ),
        (failing, _) => Diagnosis::not(
            "jobs",
            Level::Warning,
            format!("{jobs}, {failing} failed and are tried again"),
            "`polykey jobs` shows why.",
        ),
    });
    let audit = format!(
        "{} leaves, {} of {} events waiting",
        status.audit_tree_size, status.audit_queued, status.audit_capacity
    );
    found.push(Diagnosis::ok("audit", audit));
}

fn slots(root: &pb::GetRootStatusResponse, found: &mut Vec<Diagnosis>) {
    let kinds: Vec<&str> = root.slots.iter().map(|slot| slot.kind.as_str()).collect();
    let text = format!("{} to open the root key: {}", kinds.len(), kinds.join(", "));
    found.push(match kinds.len() {
        0 | 1 => Diagnosis::not(
            "slots",
            Level::Warning,
            text,
            "If it is lost, every key is: add a recovery slot (`polykey root slot add safe --shares 3 \
             --threshold 2 --out DIR`).",
        ),
        _ => Diagnosis::ok("slots", text),
    });
}

fn stored(store: &pb::GetStoreStatusResponse, found: &mut Vec<Diagnosis>) {
    let text = format!("{}, revision {}", store.backend, store.revision);
    found.push(match (store.writable, store.damaged_records) {
        (true, 0) => Diagnosis::ok("records", text),
        (false, _) => {
            let text = format!("{text}: {}", store.read_only_reason);
            Diagnosis::not("records", Level::Error, text, "Open it again, or restore a backup.")
        }
        (_, damaged) => Diagnosis::not(
            "records",
            Level::Error,
            format!("{text}: {damaged} records are damaged"),
            "`polykey store verify` names them; restore a backup.",
        ),
    });
    if let Some(replication) = &store.replication {
        let text = format!(
            "{}, {} revisions and {:.1} s behind",
            replication.state, replication.lag_revisions, replication.lag_seconds
        );
        found.push(match replication.state.as_str() {
            "following" => Diagnosis::ok("replication", text),
            "connecting" | "copying" => {
                let remedy = "It is on its way: look again.";
                Diagnosis::not("replication", Level::Warning, text, remedy)
            }
            _ => {
                let text = format!("{text}: {}", replication.detail);
                let remedy = "docs/storage.md says what to do.";
                Diagnosis::not("replication", Level::Error, text, remedy)
            }
        });
    }
    if !store.anchor_trouble.is_empty() {
        let remedy = "Until it can be written, an older copy of the store may be served.";
        found.push(Diagnosis::not("anchor", Level::Warning, &store.anchor_trouble, remedy));
    }
}

/// By the audit log: taking a backup is an event.
async fn backup(
    remote: &Remote,
    status: &pb::GetNodeStatusResponse,
) -> Result<Diagnosis, CliError> {
    const SUBJECT: &str = "backup";
    let now = status.now.unwrap_or_default().seconds;
    let since = prost_types::Timestamp { seconds: now - BACKUP * 86_400, nanos: 0 };
    let filter = pb::AuditFilter {
        action: Action::BackupStore.name().to_owned(),
        outcome: pb::AuditOutcome::Success.into(),
        since: Some(since),
        ..Default::default()
    };
    let mut page_token = String::new();
    loop {
        let ask = pb::ListAuditEventsRequest {
            filter: Some(filter.clone()),
            page_size: 1,
            page_token,
            from_index: None,
        };
        let page = remote.read(ask, rpc!(AdminServiceClient, list_audit_events)).await?;
        if let Some(event) = page.events.first() {
            let hours = (now - event.time.unwrap_or_default().seconds) / 3600;
            return Ok(Diagnosis::ok(SUBJECT, format!("taken {hours} hours ago")));
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let text = format!("none in {BACKUP} days");
    Ok(Diagnosis::not(SUBJECT, Level::Warning, text, "polykey backup create --out FILE"))
}
