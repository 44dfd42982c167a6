//! `polykey audit`: who did what, and proof that nobody rewrote it.

use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use clap::{Args, Subcommand, ValueEnum};
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::export_audit_log_response::Part;
use serde::Serialize;

use super::App;
use super::audit_view::{ArchiveView, CheckpointView, EventView, EventsView, events};
use super::error::{CliError, Exit};
use super::output::{self, Human, View};
use super::progress::Bar;
use super::remote::{Remote, next, pages};
use super::value::{self, When, now, timestamp};
use crate::audit::export::{ExportWriter, named_keys, verify_export, verify_exports};
use crate::audit::{Checkpoint, MlDsaKey, Report, Trusted, VerifyingKey};
use crate::client::file::{self, NewFile};
use crate::client::rpc;
use crate::vault::tree::{Frontier, Hash};

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
    /// Write old leaves to a file, verify it, and take them out of the server's store.
    Archive(ArchiveArgs),
    /// Print the hash that stands in the log for a value, to list events with.
    Hash(HashArgs),
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
    /// Only events one of whose details has this value: a hash that `audit hash` printed.
    #[arg(long, value_name = "HASH", value_parser = value_hash)]
    pub value_hash: Option<String>,
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

/// A hash as `audit hash` prints it: whoever gives the value itself would find nothing.
fn value_hash(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("hmac:").unwrap_or_default();
    if digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(text.to_owned());
    }
    Err("not a hash: `hmac:` and 32 hexadecimal digits, as `polykey audit hash` prints them"
        .to_owned())
}

/// Arguments of `audit verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// A file written by `audit export` or `audit archive`, instead of the server; or several that follow one
    /// another, the oldest first.
    #[arg(long = "export", value_name = "FILE", num_args = 1.., conflicts_with = "store")]
    pub exports: Vec<PathBuf>,
    /// An archive of what is no longer in the server's store; or several, the oldest first.
    #[arg(long = "archive", value_name = "FILE", num_args = 1.., conflicts_with_all = ["store", "exports"])]
    pub archives: Vec<PathBuf>,
    /// The file of a store that no server has open, instead of the server.
    #[arg(long, value_name = "FILE")]
    pub store: Option<PathBuf>,
    /// A key that signs checkpoints, Ed25519 or ML-DSA-65: base64, or a file with it; may be repeated.
    /// Without any, the key that comes with the log is used, which proves only that the log is whole. With
    /// one of ML-DSA, only checkpoints with both signatures count.
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
    /// Replace what is there. It may be an archive, the only copy of its leaves.
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `audit archive`.
#[derive(Args, Debug)]
pub struct ArchiveArgs {
    /// The file to write, which must not be there.
    #[arg(long, value_name = "FILE")]
    pub to: PathBuf,
    /// Only leaves older than this: RFC 3339, or a duration ago.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub before: Option<When>,
    /// At most so many leaves.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub leaves: Option<u64>,
    /// The key that signs checkpoints: base64, or a file with it. Without it, that of the server is
    /// believed.
    #[arg(long = "public-key", value_name = "KEY")]
    pub public_key: Option<String>,
}

/// Arguments of `audit hash`.
#[derive(Args, Debug)]
pub struct HashArgs {
    /// The file with the value, taken as it is but for one end of line at its end; `-` is standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub value_file: PathBuf,
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
        AuditCommand::Export(args) => export(app, &app.connect().await?, &args).await,
        AuditCommand::Checkpoint => {
            let remote = app.connect().await?;
            app.out.print(&checkpoint(&remote).await?)
        }
        AuditCommand::Archive(args) => archive(app, &app.connect().await?, args).await,
        AuditCommand::Hash(args) => hash(app, &app.connect().await?, &args).await,
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
        value_hash: args.value_hash.clone().unwrap_or_default(),
    }
}

async fn list(app: &App, remote: &Remote, args: ListArgs) -> Result<(), CliError> {
    let filter = filter(&args);
    let mut archives: Vec<ArchiveView> = Vec::new();
    let found = pages(Some(args.limit), async |page_size, page_token| {
        let request = pb::ListAuditEventsRequest {
            filter: Some(filter.clone()),
            page_size,
            page_token,
            from_index: args.from,
        };
        let page = remote.read(request, rpc!(AdminServiceClient, list_audit_events)).await?;
        archives.extend(page.archives.into_iter().map(ArchiveView::from));
        Ok((page.events, page.next_page_token))
    })
    .await?;
    for archive in &archives {
        output::remark(&format!("Not in the store any more: {}.", archive.line()));
    }
    app.out.print(&EventsView { events: events(found), archives })
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
    optional_checkpoint(remote).await?.ok_or_else(none_yet)
}

async fn optional_checkpoint(remote: &Remote) -> Result<Option<CheckpointView>, CliError> {
    let request = pb::GetAuditCheckpointRequest {};
    let answer = remote.read(request, rpc!(AdminServiceClient, get_audit_checkpoint)).await?;
    Ok(answer.checkpoint.map(CheckpointView::from))
}

/// What was exported.
#[derive(Serialize)]
struct ExportedView {
    file: PathBuf,
    leaves: u64,
    /// The first of them.
    first: u64,
}

impl View for ExportedView {
    fn human(&self) -> Human {
        let from = match self.first {
            0 => String::new(),
            first => format!(", from leaf {first} on: those before are in archives"),
        };
        Human::Text(format!("{}: {} leaves written{from}", self.file.display(), self.leaves))
    }
}

async fn export(app: &App, remote: &Remote, args: &ExportArgs) -> Result<(), CliError> {
    let path = args.file.as_path();
    let failed = |error: std::io::Error| CliError::file(path, &error);
    if !args.force && path.try_exists().map_err(failed)? {
        let text = format!("{}: there is something already", path.display());
        return Err(CliError::usage(text).hint(
            "It may be an archive, the only copy of its leaves: name another file, or give --force to replace it.",
        ));
    }
    let out = BufWriter::new(NewFile::create(path).map_err(failed)?);
    let request = pb::ExportAuditLogRequest::default();
    let copied = copy(remote, request, out).await.map_err(|error| error.at(path))?;
    let (out, copied) = copied.ok_or_else(none_yet)?;
    out.into_inner().map_err(|e| failed(e.into_error()))?.finish(file::PRIVATE).map_err(failed)?;
    let Copied { first, end, .. } = copied;
    app.out.print(&ExportedView { file: path.to_owned(), leaves: end - first, first })
}

/// Writes old leaves to a file that did not exist, durable and verified, and then says so to the server,
/// which takes them out of its store.
async fn archive(app: &App, remote: &Remote, args: ArchiveArgs) -> Result<(), CliError> {
    let path = std::path::absolute(&args.to).map_err(|error| CliError::file(&args.to, &error))?;
    let failed = |error: std::io::Error| CliError::file(&path, &error);
    if path.try_exists().map_err(failed)? {
        return Err(CliError::usage(format!("{}: there is something already", path.display()))
            .hint("An archive overwrites nothing: name another file."));
    }
    let request = pb::ExportAuditLogRequest {
        at_checkpoint: true,
        max_leaves: args.leaves.unwrap_or(0),
        before: args.before.map(|when| timestamp(when.before(now()))),
        ..Default::default()
    };
    let out = BufWriter::new(NewFile::create(&path).map_err(failed)?);
    let copied = copy(remote, request, out).await.map_err(|error| error.at(&path));
    let copied = copied.map_err(|error| {
        let least = error.details.iter().find_map(|detail| detail.strip_prefix("max_leaves: "));
        match args.leaves.zip(least) {
            Some((leaves, least)) => CliError::usage(format!("--leaves {leaves}: {least}"))
                .hint("An archive ends at a checkpoint."),
            None => error,
        }
    })?;
    let Some((out, copied)) = copied else {
        return Err(CliError::new(Exit::NotFound, "there is nothing that may be archived")
            .hint("An archive ends with a checkpoint that is old enough, and holds nothing that a sink, a webhook or the replication target lacks."));
    };
    out.into_inner().map_err(|e| failed(e.into_error()))?.finish(file::PRIVATE).map_err(failed)?;
    let own = || VerifyingKey::parse(&copied.checkpoint.public_key);
    let given = args.public_key.as_deref().map(key).transpose()?;
    let keys: Vec<VerifyingKey> = given.or_else(own).into_iter().collect();
    let (report, sha256) = verified(&path, &keys).map_err(failed)?;
    let whole = report.ok() && report.leaves == copied.end && report.covered == copied.end;
    if !whole {
        let finding = report.findings.first().map_or("no trusted key signed it", String::as_str);
        let text = format!("{}: {finding}", path.display());
        return Err(CliError::new(Exit::DataLoss, text)
            .hint("Nothing was taken out of the store. Remove the file, and find out why."));
    }
    let archive = pb::AuditArchive {
        first_index: copied.first,
        end_index: copied.end,
        file: path.display().to_string(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        sha256: sha256.to_vec().into(),
        root_hash: copied.root.clone(),
        ..Default::default()
    };
    let request = pb::ArchiveAuditLogRequest { archive: Some(archive) };
    let answer = remote.mutate(request, rpc!(AdminServiceClient, archive_audit_log)).await;
    let answer = answer.map_err(|error| {
        error.hint(
            "The leaves may be recorded as archived all the same: keep the file unless `polykey audit list --from 0` \
             shows that it is not named.",
        )
    })?;
    app.out.print(&ArchiveView::from(answer.archive.unwrap_or_default()))
}

/// What a verification of a file finds, and its SHA-256.
fn verified(path: &Path, keys: &[VerifyingKey]) -> std::io::Result<(Report, [u8; 32])> {
    struct Hashed(std::fs::File, Context);
    impl Read for Hashed {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let read = self.0.read(into)?;
            self.1.update(into.get(..read).unwrap_or_default());
            Ok(read)
        }
    }
    let mut file = Hashed(std::fs::File::open(path)?, Context::new(&SHA256));
    let report = verify_export(BufReader::new(&mut file), keys, &[])?;
    std::io::copy(&mut file, &mut std::io::sink())?;
    let mut hash = [0; 32];
    hash.copy_from_slice(file.1.finish().as_ref());
    Ok((report, hash))
}

/// A hash as it stands in the log.
#[derive(Serialize)]
struct HashView {
    hash: String,
}

impl View for HashView {
    fn human(&self) -> Human {
        Human::Text(self.hash.clone())
    }
}

/// Most bytes of a value.
const VALUE: u64 = 4096;

async fn hash(app: &App, remote: &Remote, args: &HashArgs) -> Result<(), CliError> {
    let path = &args.value_file;
    let value = file::read(path, VALUE).map_err(|error| CliError::file(path, &error))?;
    let value = value.strip_suffix(b"\n").unwrap_or(&value);
    let value = value.strip_suffix(b"\r").unwrap_or(value);
    let request = pb::HashAuditValueRequest { value: value.to_vec().into() };
    let answer = remote.mutate(request, rpc!(AdminServiceClient, hash_audit_value)).await?;
    app.out.print(&HashView { hash: answer.hash })
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

/// What was copied.
struct Copied {
    first: u64,
    end: u64,
    checkpoint: CheckpointView,
    root: Bytes,
}

fn none_yet() -> CliError {
    CliError::new(Exit::NotFound, "the log has no checkpoint yet")
        .hint("The first one is signed shortly after the first event; try again.")
}

/// Writes the log of the server as an export; `None` if there is nothing to write.
async fn copy<W: Write>(
    remote: &Remote,
    request: pb::ExportAuditLogRequest,
    out: W,
) -> Result<Option<(W, Copied)>, CopyError> {
    let Some(own) = optional_checkpoint(remote).await? else { return Ok(None) };
    let broken = |what: &str| CopyError::Read(CliError::new(Exit::DataLoss, what));
    let key = VerifyingKey::parse(&own.public_key);
    let keys = [key.ok_or_else(|| broken("the checkpoint comes with no public key"))?];
    let mut bar = Bar::new("leaves");
    let mut stream = remote.stream(request, rpc!(AdminServiceClient, export_audit_log)).await?;
    let mut out = Some(out);
    let mut writing: Option<(ExportWriter<W>, u64)> = None;
    let mut count = 0_u64;
    while let Some(message) = next(&mut stream).await? {
        match message.part {
            Some(Part::Leaves(part)) => {
                if let Some(out) = out.take() {
                    let root = |root: &Bytes| root.as_ref().try_into().ok();
                    let roots = part.subtrees.iter().map(root).collect::<Option<Vec<Hash>>>();
                    let log = roots.and_then(|roots| Frontier::from_parts(part.first_index, roots));
                    let log = log.ok_or_else(|| broken("the server says not what is before"))?;
                    count = part.first_index;
                    writing = Some((ExportWriter::behind(&log, out, &own.origin, &keys)?, count));
                }
                let Some((writer, _)) = writing.as_mut().filter(|_| part.first_index == count)
                else {
                    return Err(broken("the server left leaves out"));
                };
                for leaf in &part.leaves {
                    writer.leaf(leaf)?;
                    count += 1;
                }
                bar.at(count, own.tree_size);
            }
            Some(Part::Checkpoint(checkpoint)) => {
                let Some((mut writer, first)) = writing else {
                    return Err(broken("the server sent no leaves"));
                };
                writer.checkpoint(&checkpoint.note)?;
                let root = checkpoint.root_hash.clone();
                let checkpoint = CheckpointView::from(checkpoint);
                let copied = Copied { first, end: count, checkpoint, root };
                return Ok(Some((writer.end()?, copied)));
            }
            None => {}
        }
    }
    match writing {
        None => Ok(None),
        Some(_) => Err(broken("the log ended without a checkpoint")),
    }
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
    /// Whether ML-DSA signatures were checked: only with a key for them.
    ml_dsa_checked: bool,
    /// Whether all that is wrong is that other keys have signed than those given.
    wrong_key: bool,
    findings: Vec<String>,
    notes: Vec<String>,
}

impl View for ReportView {
    fn human(&self) -> Human {
        let result = match (self.ok, self.wrong_key) {
            (true, _) => "the log is whole and signed",
            (false, true) => "NOT VERIFIED: the public key given is not the one that signed",
            (false, false) => "the log is DAMAGED",
        };
        let mut fields = vec![
            ("result", result.to_owned()),
            ("origin", self.origin.clone()),
            ("leaves", format!("{} ({} signed)", self.leaves, self.covered)),
            ("events", self.events.to_string()),
            ("root hash", self.root_hash.clone()),
        ];
        fields.extend(self.public_keys.iter().map(|key| ("public key", key.clone())));
        let second =
            if self.ml_dsa_checked { "checked" } else { "not checked: no key for them was given" };
        fields.push(("ML-DSA-65 signatures", second.to_owned()));
        if self.wrong_key {
            fields.push(("note", WRONG_KEY.to_owned()));
        }
        if !self.public_keys_pinned {
            let text = "the public key came with the log; pin it with --public-key";
            fields.push(("note", text.to_owned()));
        }
        fields.extend(self.notes.iter().map(|note| ("note", note.clone())));
        fields.extend(self.findings.iter().map(|finding| ("finding", finding.clone())));
        Human::Record(fields)
    }
}

/// Of a log that a key that was given has not signed. Whoever writes a log anew signs it with a key of his own.
const WRONG_KEY: &str = "`polykey audit checkpoint` prints the key of the node: compare it with what was noted when the \
     node was set up. Give one --public-key for each key that the node has had. If this is the right key, somebody else \
     has signed the log: it may have been written anew";

/// Prints what a verification found; `keys` are those given by the caller. A log with findings, or
/// one that nobody signed, ends with the exit code of a failed verification.
pub(super) fn print_report(
    app: &App,
    report: Report,
    keys: &[VerifyingKey],
    (pinned, ml_dsa): (bool, bool),
) -> Result<(), CliError> {
    let ok = report.ok() && (report.covered > 0 || report.leaves == 0);
    let wrong_key = pinned && report.wrong_key();
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
        ml_dsa_checked: ml_dsa,
        wrong_key,
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
    pub fn keys(&self) -> Result<(Vec<VerifyingKey>, Vec<MlDsaKey>), CliError> {
        let (mut ed25519, mut ml_dsa) = (Vec::new(), Vec::new());
        for text in &self.public_keys {
            let file = || value::text_file(Path::new(text)).ok();
            let second = MlDsaKey::parse(text);
            match second.or_else(|| MlDsaKey::parse(&file()?)) {
                Some(key) => ml_dsa.push(key),
                None => ed25519.push(key(text)?),
            }
        }
        Ok((ed25519, ml_dsa))
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

/// Opens a file to be verified.
fn open(path: &Path) -> std::io::Result<BufReader<Box<dyn Read + Send>>> {
    let named = |error: std::io::Error| {
        std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))
    };
    let file = std::fs::File::open(path).map_err(named)?;
    Ok(BufReader::new(Box::new(file)))
}

fn unreadable(error: &std::io::Error) -> CliError {
    let exit = match error.kind() {
        std::io::ErrorKind::InvalidData => Exit::DataLoss,
        _ => Exit::Usage,
    };
    CliError::new(exit, error.to_string())
}

async fn verify(app: &App, args: VerifyArgs) -> Result<(), CliError> {
    let ((given, ml_dsa), kept) = (args.keys()?, args.kept()?);
    let pinned = !given.is_empty();
    let how = (pinned, !ml_dsa.is_empty());
    if let Some(first) = args.exports.first() {
        let failed = |error: std::io::Error| unreadable(&error);
        let named = |error: std::io::Error| {
            let text = format!("{}: {error}", first.display());
            CliError::new(Exit::DataLoss, text)
        };
        let keys = if pinned {
            given
        } else {
            named_keys(&mut open(first).map_err(failed)?).map_err(named)?
        };
        let files = args.exports.iter().map(|path| open(path));
        let trusted = Trusted { ed25519: &keys, ml_dsa: &ml_dsa };
        let report = verify_exports(files, trusted, &kept).map_err(failed)?;
        return print_report(app, report, &keys, how);
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
        let (keys, archives) = (keys.clone(), args.archives);
        let live = BufReader::new(Box::new(reader) as Box<dyn Read + Send>);
        tokio::task::spawn_blocking(move || {
            let before = archives.iter().map(|path| open(path));
            let trusted = Trusted { ed25519: &keys, ml_dsa: &ml_dsa };
            verify_exports(before.chain([Ok(live)]), trusted, &kept)
        })
    };
    let request = pb::ExportAuditLogRequest::default();
    let copied = copy(&remote, request, BufWriter::new(writer)).await;
    let copied = match copied {
        Ok(None) => return Err(none_yet()),
        Ok(Some((out, _))) => {
            out.into_inner().map(drop).map_err(|e| CopyError::Write(e.into_error()))
        }
        Err(error) => Err(error),
    };
    let report = verification.await.map_err(|e| local(e.into()))?.map_err(|e| unreadable(&e))?;
    match copied {
        Err(CopyError::Read(error)) => Err(error),
        // The verification may have seen enough before the end.
        Err(CopyError::Write(_)) if !report.ok() => print_report(app, report, &keys, how),
        Err(CopyError::Write(error)) => Err(local(error)),
        Ok(()) => print_report(app, report, &keys, how),
    }
}
