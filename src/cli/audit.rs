//! `polykey audit`: who did what, and proof that nobody rewrote it.

use std::io::{BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{Context, SHA256};
use clap::{Args, Subcommand, ValueEnum};
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::audit_copy::{Copied, checkpoint, copy, none_yet};
use super::audit_verify::{self, VerifyArgs};
use super::audit_view::{ArchiveView, EventView, EventsView, events};
use super::error::{CliError, Exit};
use super::output::{self, Human, View};
use super::remote::{Remote, next, pages};
use super::value::{self, When, now, timestamp};
use crate::audit::export::verify_export;
use crate::audit::{Report, VerifyingKey};
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
        AuditCommand::Verify(args) => audit_verify::verify(app, args).await,
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
    let given = args.public_key.as_deref().map(audit_verify::key).transpose()?;
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
