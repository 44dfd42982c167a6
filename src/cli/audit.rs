//! `polykey audit`: who did what, and proof that nobody rewrote it.

use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::export_audit_log_response::Part;
use serde::Serialize;

use super::App;
use super::audit_view::{CheckpointView, EventView, EventsView, events};
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::progress::Bar;
use super::remote::{Remote, next, pages};
use super::value::{self, When, now, timestamp};
use crate::audit::export::{ExportWriter, named_keys, verify_export};
use crate::audit::{Checkpoint, Report, VerifyingKey};
use crate::client::file::{self, NewFile};
use crate::client::rpc;

/// How an event ended, as a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Outcome {
    /// It did what was asked.
    Success,
    /// It was refused.
    Denied,
    /// It failed otherwise.
    Failed,
}

/// Subcommands of `audit`.
#[derive(Subcommand, Debug)]
pub enum AuditCommand {
    /// List events, newest first.
    List(ListArgs),
    /// Verify the log: that of the server, or offline an export or a store.
    Verify(VerifyArgs),
    /// Write the log to a file that can be verified offline.
    Export(ExportArgs),
    /// Show the newest signed checkpoint.
    Checkpoint,
}

/// Arguments of `audit list`.
#[derive(Args, Debug)]
pub struct ListArgs {
    /// Only events at this time or later: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub since: Option<When>,
    /// Only events before this time: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub until: Option<When>,
    /// Only events of this client.
    #[arg(long, value_name = "ID")]
    pub client: Option<String>,
    /// Only this action, such as RotateKey; Rotate* is every one that begins so.
    #[arg(long, value_name = "ACTION")]
    pub action: Option<String>,
    /// Only events of this key: its id, or alias/NAME.
    #[arg(long, value_name = "KEY", value_parser = value::key_name)]
    pub key: Option<String>,
    /// Only events that ended so.
    #[arg(long, value_enum, value_name = "OUTCOME")]
    pub outcome: Option<Outcome>,
    /// Begin at this position of the log, oldest first.
    #[arg(long, value_name = "INDEX")]
    pub from: Option<u64>,
    /// At most so many events.
    #[arg(long, value_name = "N", default_value_t = 100, conflicts_with = "follow")]
    pub limit: usize,
    /// Print events as they come, until interrupted.
    #[arg(long)]
    pub follow: bool,
}

/// Arguments of `audit verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// A file written by `audit export`, instead of the server.
    #[arg(long, value_name = "FILE", conflicts_with = "store")]
    pub export: Option<PathBuf>,
    /// The file of a store that no server has open, instead of the server.
    #[arg(long, value_name = "FILE")]
    pub store: Option<PathBuf>,
    /// A key that signs checkpoints: base64, or a file with it; may be repeated. Without any, the key
    /// that comes with the log is used, which proves only that the log is whole.
    #[arg(long = "public-key", value_name = "KEY")]
    pub public_keys: Vec<String>,
    /// An earlier checkpoint (its note, or from `audit checkpoint -o json`) that the log must
    /// contain; may be repeated.
    #[arg(long = "checkpoint", value_name = "FILE")]
    pub checkpoints: Vec<PathBuf>,
}

/// Arguments of `audit export`.
#[derive(Args, Debug)]
pub struct ExportArgs {
    /// The file to write.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

pub(super) async fn run(app: &App, command: AuditCommand) -> Result<(), CliError> {
    match command {
        AuditCommand::List(args) => {
            let remote = app.connect().await?;
            if args.follow {
                follow(app, &remote, args).await
            } else {
                list(app, &remote, args).await
            }
        }
        AuditCommand::Verify(args) => verify(app, args).await,
        AuditCommand::Export(args) => export(app, &app.connect().await?, &args.file).await,
        AuditCommand::Checkpoint => {
            let remote = app.connect().await?;
            app.out.print(&checkpoint(&remote).await?)
        }
    }
}

fn filter(args: &ListArgs) -> pb::AuditFilter {
    let now = now();
    let outcome = args.outcome.map_or(pb::AuditOutcome::Unspecified, |outcome| match outcome {
        Outcome::Success => pb::AuditOutcome::Success,
        Outcome::Denied => pb::AuditOutcome::Denied,
        Outcome::Failed => pb::AuditOutcome::Failed,
    });
    pb::AuditFilter {
        since: args.since.map(|w| timestamp(w.before(now))),
        until: args.until.map(|w| timestamp(w.before(now))),
        client_id: args.client.clone().unwrap_or_default(),
        action: args.action.clone().unwrap_or_default(),
        key_id: args.key.clone().unwrap_or_default(),
        outcome: outcome.into(),
    }
}

async fn list(app: &App, remote: &Remote, args: ListArgs) -> Result<(), CliError> {
    let filter = filter(&args);
    let found = pages(Some(args.limit), async |page_size, page_token| {
        let request = pb::ListAuditEventsRequest {
            filter: Some(filter.clone()),
            page_size,
            page_token,
            from_index: args.from,
        };
        let page = remote.read(request, rpc!(AdminServiceClient, list_audit_events)).await?;
        Ok((page.events, page.next_page_token))
    })
    .await?;
    app.out.print(&EventsView { events: events(found) })
}

/// Prints events until the stream breaks, and goes on where it broke as long as the server comes back.
async fn follow(app: &App, remote: &Remote, args: ListArgs) -> Result<(), CliError> {
    let filter = Some(filter(&args));
    let mut from_index = args.from;
    loop {
        let request = pb::FollowAuditRequest { filter: filter.clone(), from_index };
        let mut stream = remote.stream(request, rpc!(AdminServiceClient, follow_audit)).await?;
        let mut received = false;
        loop {
            match next(&mut stream).await {
                Ok(Some(message)) => {
                    received = true;
                    from_index = Some(message.next_index);
                    for event in message.events {
                        let view = EventView::from(event);
                        app.out.print_line(&view, &view.line())?;
                    }
                }
                // A drain ends the stream in order; a lost connection or a token's end does not.
                Ok(None) => break,
                Err(error) if error.exit == Exit::Unavailable => break,
                Err(error) if error.exit == Exit::Denied && received => break,
                Err(error) => return Err(error),
            }
        }
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

async fn checkpoint(remote: &Remote) -> Result<CheckpointView, CliError> {
    let request = pb::GetAuditCheckpointRequest {};
    let answer = remote.read(request, rpc!(AdminServiceClient, get_audit_checkpoint)).await?;
    answer.checkpoint.map(CheckpointView::from).ok_or_else(|| {
        CliError::new(Exit::NotFound, "the log has no checkpoint yet")
            .hint("The first one is signed shortly after the first event; try again.")
    })
}

/// What was exported.
#[derive(Serialize)]
struct ExportedView {
    file: PathBuf,
    leaves: u64,
}

impl View for ExportedView {
    fn human(&self) -> Human {
        Human::Text(format!("{}: {} leaves written", self.file.display(), self.leaves))
    }
}

async fn export(app: &App, remote: &Remote, path: &Path) -> Result<(), CliError> {
    let failed = |error: std::io::Error| CliError::file(path, &error);
    let out = BufWriter::new(NewFile::create(path).map_err(failed)?);
    let (out, leaves) = copy(remote, out).await.map_err(|error| error.at(path))?;
    out.into_inner().map_err(|e| failed(e.into_error()))?.finish(file::PRIVATE).map_err(failed)?;
    app.out.print(&ExportedView { file: path.to_owned(), leaves })
}

/// Why a log was not copied.
enum CopyError {
    Read(CliError),
    Write(std::io::Error),
}

impl From<CliError> for CopyError {
    fn from(error: CliError) -> Self {
        Self::Read(error)
    }
}

impl From<std::io::Error> for CopyError {
    fn from(error: std::io::Error) -> Self {
        Self::Write(error)
    }
}

impl CopyError {
    fn at(self, path: &Path) -> CliError {
        match self {
            Self::Read(error) => error,
            Self::Write(error) => CliError::file(path, &error),
        }
    }
}

/// Writes the log of the server as an export, and returns how many leaves it has.
async fn copy<W: Write>(remote: &Remote, out: W) -> Result<(W, u64), CopyError> {
    let newest = checkpoint(remote).await?;
    let broken = |what: &str| CopyError::Read(CliError::new(Exit::DataLoss, what));
    let key = |key: &str| {
        VerifyingKey::parse(key).ok_or_else(|| broken("the checkpoint comes with no public key"))
    };
    let mut writer = ExportWriter::new(out, &newest.origin, &[key(&newest.public_key)?])?;
    let mut bar = Bar::new("leaves");
    let request = pb::ExportAuditLogRequest { from_index: 0, max_leaves: 0 };
    let mut stream = remote.stream(request, rpc!(AdminServiceClient, export_audit_log)).await?;
    let mut count = 0_u64;
    while let Some(message) = next(&mut stream).await? {
        match message.part {
            Some(Part::Leaves(part)) if part.first_index == count => {
                for leaf in &part.leaves {
                    writer.leaf(leaf)?;
                    count += 1;
                }
                bar.at(count, newest.tree_size);
            }
            Some(Part::Leaves(_)) => return Err(broken("the server left leaves out")),
            Some(Part::Checkpoint(checkpoint)) => {
                writer.checkpoint(&checkpoint.note)?;
                return Ok((writer.end()?, count));
            }
            None => {}
        }
    }
    Err(broken("the log ended without a checkpoint"))
}

/// What a verification found.
#[derive(Serialize)]
struct ReportView {
    ok: bool,
    origin: String,
    leaves: u64,
    events: u64,
    root_hash: String,
    checkpoints: u64,
    /// Leaves that a signed checkpoint covers.
    covered: u64,
    public_keys: Vec<String>,
    /// Whether the keys were given by the caller.
    public_keys_pinned: bool,
    findings: Vec<String>,
    notes: Vec<String>,
}

impl View for ReportView {
    fn human(&self) -> Human {
        let result = if self.ok { "the log is whole and signed" } else { "the log is DAMAGED" };
        let mut fields = vec![
            ("result", result.to_owned()),
            ("origin", self.origin.clone()),
            ("leaves", format!("{} ({} signed)", self.leaves, self.covered)),
            ("events", self.events.to_string()),
            ("root hash", self.root_hash.clone()),
        ];
        fields.extend(self.public_keys.iter().map(|key| ("public key", key.clone())));
        if !self.public_keys_pinned {
            let text = "the public key came with the log; pin it with --public-key";
            fields.push(("note", text.to_owned()));
        }
        fields.extend(self.notes.iter().map(|note| ("note", note.clone())));
        fields.extend(self.findings.iter().map(|finding| ("finding", finding.clone())));
        Human::Record(fields)
    }
}

/// Prints what a verification found; `keys` are those given by the caller. A log with findings, or
/// one that nobody signed, ends with the exit code of a failed verification.
pub(super) fn print_report(
    app: &App,
    report: Report,
    keys: &[VerifyingKey],
    pinned: bool,
) -> Result<(), CliError> {
    let ok = report.ok() && (report.covered > 0 || report.leaves == 0);
    app.out.print(&ReportView {
        ok,
        origin: report.origin,
        leaves: report.leaves,
        events: report.events,
        root_hash: report.root,
        checkpoints: report.checkpoints,
        covered: report.covered,
        public_keys: keys.iter().map(ToString::to_string).collect(),
        public_keys_pinned: pinned,
        findings: report.findings,
        notes: report.notes,
    })?;
    if ok { Ok(()) } else { Err(CliError::silent(Exit::DataLoss)) }
}

/// A key that signs checkpoints: base64, or a file with it.
pub(super) fn key(text: &str) -> Result<VerifyingKey, CliError> {
    if let Some(key) = VerifyingKey::parse(text) {
        return Ok(key);
    }
    VerifyingKey::parse(&value::text_file(Path::new(text))?).ok_or_else(|| {
        CliError::usage(format!("{text}: no Ed25519 public key in base64"))
            .hint("`polykey audit checkpoint` prints it.")
    })
}

impl VerifyArgs {
    /// The keys given, each as base64 or as a file with it.
    ///
    /// # Errors
    /// One that is neither.
    pub fn keys(&self) -> Result<Vec<VerifyingKey>, CliError> {
        self.public_keys.iter().map(|text| key(text)).collect()
    }

    /// The checkpoints given, each as its note or as JSON of `audit checkpoint`.
    ///
    /// # Errors
    /// One that is neither.
    pub fn kept(&self) -> Result<Vec<Checkpoint>, CliError> {
        let kept = |path: &PathBuf| {
            let text = value::text_file(path)?;
            let json = serde_json::from_str::<CheckpointView>(&text).ok();
            let note = json.map_or(text, |checkpoint| checkpoint.note);
            Checkpoint::parse(&note).ok_or_else(|| {
                CliError::usage(format!("{}: not a checkpoint", path.display()))
                    .hint("It is written by `polykey audit checkpoint -o json`.")
            })
        };
        self.checkpoints.iter().map(kept).collect()
    }
}

async fn verify(app: &App, args: VerifyArgs) -> Result<(), CliError> {
    let (given, kept) = (args.keys()?, args.kept()?);
    let pinned = !given.is_empty();
    if let Some(path) = &args.export {
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::InvalidData => {
                CliError::new(Exit::DataLoss, format!("{}: {error}", path.display()))
            }
            _ => CliError::file(path, &error),
        };
        let open = || std::fs::File::open(path).map(BufReader::new).map_err(failed);
        let keys = if pinned { given } else { named_keys(&mut open()?).map_err(failed)? };
        let report = verify_export(open()?, &keys, &kept).map_err(failed)?;
        return print_report(app, report, &keys, pinned);
    }
    let remote = app.connect().await?;
    let own = || async {
        let key = checkpoint(&remote).await?.public_key;
        Ok::<_, CliError>(VerifyingKey::parse(&key).into_iter().collect())
    };
    let keys: Vec<VerifyingKey> = if pinned { given } else { own().await? };
    let local = |error: std::io::Error| CliError::file(Path::new("pipe"), &error);
    // The log goes straight from the server into the same verification as that of a file.
    let (reader, writer) = std::io::pipe().map_err(local)?;
    let verification = {
        let keys = keys.clone();
        tokio::task::spawn_blocking(move || verify_export(BufReader::new(reader), &keys, &kept))
    };
    let copied = copy(&remote, BufWriter::new(writer)).await.map(drop);
    let report = verification.await.map_err(|e| local(e.into()))?.map_err(local)?;
    match copied {
        Err(CopyError::Read(error)) => Err(error),
        // The verification may have seen enough before the end.
        Err(CopyError::Write(_)) if !report.ok() => print_report(app, report, &keys, pinned),
        Err(CopyError::Write(error)) => Err(local(error)),
        Ok(()) => print_report(app, report, &keys, pinned),
    }
}
