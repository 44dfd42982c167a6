//! `polykey store|jobs`: the node beneath the keys.

use clap::{Args, Subcommand, ValueEnum};
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::verify_store_response::Part;
use serde::Serialize;

use super::App;
use super::admin_view::{JobView, JobsView, StoreView, WorkView};
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::progress::Bar;
use super::remote::{next, pages};
use super::server::{CompactArgs, CopyArgs};
use super::value;
use crate::client::rpc;

/// Subcommands of `store`.
#[derive(Subcommand, Debug)]
pub enum StoreCommand {
    /// Show the state of the store.
    Status,
    /// Open and check every record.
    Verify,
    /// Copy a store that no server has open into another file or a database, or back, and compare every
    /// record. An interrupted copy is taken up again.
    Copy(CopyArgs),
    /// Give the free space of a store that no server has open back to the file system. A crash meanwhile
    /// loses nothing.
    Compact(CompactArgs),
}

/// Kinds of jobs, as filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Rotates a key.
    Rotate,
    /// Makes a staged version primary.
    Promote,
    /// Revokes a version whose grace period ends.
    #[value(alias = "end_grace")]
    EndGrace,
    /// Revokes a key.
    Revoke,
    /// Erases the material of a key.
    Destroy,
    /// Forgets revoked tokens that have expired.
    #[value(alias = "sweep_tokens")]
    SweepTokens,
    /// Forgets idempotency keys that have expired.
    #[value(alias = "sweep_idempotency")]
    SweepIdempotency,
    /// Seals records under the primary storage-key epoch.
    Reseal,
    /// Tells that a key or an API key is about to expire, or has expired.
    #[value(alias = "notify_expiry")]
    NotifyExpiry,
}

impl From<Kind> for pb::JobKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Rotate => Self::Rotate,
            Kind::Promote => Self::Promote,
            Kind::EndGrace => Self::EndGrace,
            Kind::Revoke => Self::Revoke,
            Kind::Destroy => Self::Destroy,
            Kind::SweepTokens => Self::SweepTokens,
            Kind::SweepIdempotency => Self::SweepIdempotency,
            Kind::Reseal => Self::Reseal,
            Kind::NotifyExpiry => Self::NotifyExpiry,
        }
    }
}

/// Arguments of `jobs`.
#[derive(Args, Debug)]
pub struct JobsArgs {
    /// Only jobs of this kind.
    #[arg(long, value_enum, value_name = "KIND")]
    pub kind: Option<Kind>,
    /// Only jobs of this key: its id, or alias/NAME.
    #[arg(long, value_name = "KEY", value_parser = value::key_name)]
    pub key: Option<String>,
    /// At most so many.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// First say that the server's clock is right, so that what waits because of it goes on.
    #[arg(long)]
    pub confirm_clock: bool,
}

/// What a check of the store found.
#[derive(Serialize)]
pub(super) struct VerifiedView {
    pub(super) ok: bool,
    pub(super) records_checked: u64,
    pub(super) records_failed: u64,
    pub(super) set_hash_ok: bool,
    pub(super) audit_ok: bool,
    pub(super) revision: u64,
    pub(super) problems_found: u64,
    pub(super) problems: Vec<ProblemView>,
}

/// A record that is damaged or was tampered with.
#[derive(Serialize)]
pub(super) struct ProblemView {
    pub(super) space: String,
    pub(super) row: String,
    pub(super) problem: String,
}

impl From<pb::VerifyStoreResult> for VerifiedView {
    fn from(r: pb::VerifyStoreResult) -> Self {
        let problem =
            |p: pb::StoreProblem| ProblemView { space: p.space, row: p.row, problem: p.problem };
        Self {
            ok: r.ok,
            records_checked: r.records_checked,
            records_failed: r.records_failed,
            set_hash_ok: r.set_hash_ok,
            audit_ok: r.audit_ok,
            revision: r.revision,
            problems_found: r.problems_found,
            problems: r.problems.into_iter().map(problem).collect(),
        }
    }
}

impl View for VerifiedView {
    fn human(&self) -> Human {
        let whole = |ok: bool| if ok { "whole" } else { "DAMAGED" }.to_owned();
        let mut fields = vec![
            ("result", whole(self.ok)),
            (
                "records",
                format!("{} checked, {} damaged", self.records_checked, self.records_failed),
            ),
            ("set of rows", whole(self.set_hash_ok)),
            ("audit log", whole(self.audit_ok)),
            ("revision", self.revision.to_string()),
        ];
        if self.problems_found > self.problems.len() as u64 {
            let (found, named) = (self.problems_found, self.problems.len());
            fields.push(("problems", format!("{found} found, the first {named} are named")));
        }
        fields.extend(
            self.problems
                .iter()
                .map(|p| ("problem", format!("{} {}: {}", p.space, p.row, p.problem))),
        );
        Human::Record(fields)
    }
}

pub(super) async fn store(app: &App, command: StoreCommand) -> Result<(), CliError> {
    let remote = app.connect().await?;
    match command {
        StoreCommand::Status => {
            let request = pb::GetStoreStatusRequest {};
            let answer = remote.read(request, rpc!(AdminServiceClient, get_store_status)).await?;
            app.out.print(&StoreView::from(answer))
        }
        StoreCommand::Verify => {
            let request = pb::VerifyStoreRequest {};
            let mut stream = remote.stream(request, rpc!(AdminServiceClient, verify_store)).await?;
            let mut bar = Bar::new("records");
            while let Some(message) = next(&mut stream).await? {
                match message.part {
                    Some(Part::Progress(p)) => bar.at(p.records_checked, p.records_total),
                    Some(Part::Result(result)) => {
                        drop(bar);
                        let view = VerifiedView::from(result);
                        app.out.print(&view)?;
                        let failed = CliError::silent(Exit::DataLoss);
                        return if view.ok { Ok(()) } else { Err(failed) };
                    }
                    None => {}
                }
            }
            Err(CliError::new(Exit::Unavailable, "the check ended without a result"))
        }
        // Done without a server.
        StoreCommand::Copy(_) | StoreCommand::Compact(_) => Ok(()),
    }
}

pub(super) async fn jobs(app: &App, args: JobsArgs) -> Result<(), CliError> {
    let remote = app.connect().await?;
    if args.confirm_clock {
        let request = pb::ConfirmClockRequest {};
        remote.mutate(request, rpc!(AdminServiceClient, confirm_clock)).await?;
    }
    let kind = args.kind.map_or(pb::JobKind::Unspecified, pb::JobKind::from);
    let key_id = args.key.unwrap_or_default();
    let mut clock_suspended = false;
    let mut work = Vec::new();
    let jobs = pages(args.limit, async |page_size, page_token| {
        let request = pb::ListJobsRequest {
            page_size,
            page_token,
            kind: kind.into(),
            key_id: key_id.clone(),
        };
        let page = remote.read(request, rpc!(AdminServiceClient, list_jobs)).await?;
        clock_suspended = page.clock_suspended;
        work.extend(page.work);
        Ok((page.jobs, page.next_page_token))
    })
    .await?;
    let jobs = jobs.into_iter().map(JobView::from).collect();
    let work = work.into_iter().map(WorkView::from).collect();
    app.out.print(&JobsView { jobs, clock_suspended, work })?;
    if clock_suspended {
        super::output::remark(
            "The server's clock is in doubt: jobs that cannot be undone wait until it is right again \
             or confirmed with `polykey jobs --confirm-clock`.",
        );
    }
    Ok(())
}
