//! `polykey root`: the root key and what opens it.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand};
use polykey_hsm::recovery::{self, RecoveryKey, RecoveryPublicKey};
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::admin_view::{RootView, SlotView};
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::remote::Remote;
use crate::client::rpc;

/// Subcommands of `root`.
#[derive(Subcommand, Debug)]
pub enum RootCommand {
    /// Show the root key's slots, storage-key epochs and the progress of resealing.
    Status,
    /// Make a new root key and seal every record anew in the background.
    Rotate {
        /// Do nothing unless this is the id of the root key.
        #[arg(long, value_name = "ID")]
        expected_root: Option<String>,
    },
    /// Replace the master key that wraps the root key in a slot; also `root slot rotate`.
    Rewrap(RewrapArgs),
    /// Ways to open the root key: list, add, test, remove them.
    #[command(subcommand)]
    Slot(SlotCommand),
    /// Make a recovery key: the private half in a file that is kept off the node, the public half
    /// printed for `root slot add --recovery-key`.
    RecoveryKey {
        /// Where the private half is written, mode 0600. Nothing is overwritten.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
}

/// Subcommands of `root slot`.
#[derive(Subcommand, Debug)]
pub enum SlotCommand {
    /// List the slots, in the order in which they are tried.
    List,
    /// Add a slot for the same root key.
    Add(AddArgs),
    /// Prove that slots open, all at once, and change nothing. Exits with 7 if one does not.
    Test {
        /// The slots, by id or label.
        #[arg(value_name = "SLOT", required = true)]
        slots: Vec<String>,
    },
    /// Remove a slot; never the last one that the node can open.
    Remove {
        /// The slot, by id or label.
        #[arg(value_name = "SLOT")]
        slot: String,
        /// Do nothing unless the slots have this generation.
        #[arg(long, value_name = "N")]
        expected_generation: Option<u64>,
    },
    /// Replace the master key that wraps the root key in a slot.
    Rotate(RewrapArgs),
}

/// Arguments of `root slot add`.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("by").required(true).args(["wrapper", "recovery_key", "shares"]))]
pub struct AddArgs {
    /// Its name.
    #[arg(value_name = "LABEL")]
    pub label: String,
    /// A wrapper of the server's configuration: the NAME of its section [wrappers.NAME], or
    /// master_key.
    #[arg(long, value_name = "NAME")]
    pub wrapper: Option<String>,
    /// The public half of a recovery key, as `root recovery-key` prints it.
    #[arg(long, value_name = "PUBLIC", value_parser = public_key)]
    pub recovery_key: Option<RecoveryPublicKey>,
    /// Make a recovery key here, and split it into so many shares; the server gets its public half.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(2..=255), requires = "threshold", requires = "out")]
    pub shares: Option<u8>,
    /// So many of the shares recover.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u8).range(2..=255), requires = "shares")]
    pub threshold: Option<u8>,
    /// The directory that the shares are written into, one file each, mode 0600.
    #[arg(long, value_name = "DIR", requires = "shares")]
    pub out: Option<PathBuf>,
    /// Do nothing unless the slots have this generation.
    #[arg(long, value_name = "N")]
    pub expected_generation: Option<u64>,
}

fn public_key(text: &str) -> Result<RecoveryPublicKey, String> {
    RecoveryPublicKey::parse(text).map_err(|error| error.to_string())
}

/// Arguments of `root rewrap`.
#[derive(Args, Debug)]
pub struct RewrapArgs {
    /// The slot, by id or label; may be left out when there is one.
    #[arg(value_name = "SLOT", default_value = "", hide_default_value = true)]
    pub slot: String,
    /// Where the new master key is found on the server: file:PATH, env:POLYKEY_NAME, credential:NAME or
    /// ssm:/PATH/NAME. Without it: where it was, read again; a device or service wraps anew.
    #[arg(long, value_name = "REFERENCE", value_parser = reference)]
    pub source: Option<String>,
    /// What shall wrap the root key, such as local-file or local-passphrase; without it, as before.
    #[arg(long, value_name = "KIND", default_value = "", hide_default_value = true)]
    pub kind: String,
    /// A new label for the slot.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub label: String,
    /// Do nothing unless the slots have this generation.
    #[arg(long, value_name = "N")]
    pub expected_generation: Option<u64>,
}

/// A reference to a secret: never the secret itself, which others see in the list of processes.
fn reference(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some(("file" | "env" | "credential" | "ssm", place)) if !place.is_empty() => {
            Ok(text.to_owned())
        }
        _ => {
            Err("a master key is named by file:PATH, env:NAME, credential:NAME or ssm:/PATH"
                .to_owned())
        }
    }
}

/// A new root key.
#[derive(Serialize)]
struct RotatedView {
    root_id: String,
    epoch: u32,
    audit_index: u64,
}

impl View for RotatedView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("root key", self.root_id.clone()),
            ("epoch", self.epoch.to_string()),
            ("resealing", "in the background; `polykey root status` shows how far".to_owned()),
        ])
    }
}

/// A slot that was added or rewrapped.
#[derive(Serialize)]
struct ChangedView {
    slot: SlotView,
    generation: u64,
    audit_index: u64,
    /// The files with the shares of its recovery key.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    shares: Vec<String>,
}

impl View for ChangedView {
    fn human(&self) -> Human {
        let mut fields =
            vec![("slot", self.slot.to_string()), ("generation", self.generation.to_string())];
        fields.extend(self.shares.iter().map(|file| ("share", file.clone())));
        if !self.shares.is_empty() {
            let next = "give each share to another person and remove the files; `polykey recover` \
                        takes enough of them";
            fields.push(("next", next.to_owned()));
        }
        Human::Record(fields)
    }
}

/// A slot that is gone.
#[derive(Serialize)]
struct RemovedView {
    slot: String,
    generation: u64,
    audit_index: u64,
}

impl View for RemovedView {
    fn human(&self) -> Human {
        let generation = self.generation.to_string();
        Human::Record(vec![("removed", self.slot.clone()), ("generation", generation)])
    }
}

/// A slot after its trial.
#[derive(Serialize)]
struct TestedView {
    slot: SlotView,
    opens: bool,
    problem: Option<String>,
}

impl View for TestedView {
    fn human(&self) -> Human {
        let mut fields = vec![
            ("slot", self.slot.to_string()),
            ("opens", if self.opens { "yes" } else { "NO" }.to_owned()),
        ];
        fields.extend(self.problem.iter().map(|problem| ("problem", problem.clone())));
        Human::Record(fields)
    }
}

/// Several slots after their trials.
#[derive(Serialize)]
struct TestsView {
    tests: Vec<TestedView>,
}

impl View for TestsView {
    fn human(&self) -> Human {
        let row = |tested: &TestedView| {
            let opens = if tested.opens { "yes" } else { "NO" }.to_owned();
            vec![tested.slot.label.clone(), opens, tested.problem.clone().unwrap_or_default()]
        };
        Human::Rows(&["SLOT", "OPENS", "PROBLEM"], self.tests.iter().map(row).collect())
    }
}

/// The slots.
#[derive(Serialize)]
struct SlotsView {
    slots: Vec<SlotView>,
    generation: u64,
}

impl View for SlotsView {
    fn human(&self) -> Human {
        Human::Record(self.slots.iter().map(|slot| ("slot", slot.to_string())).collect())
    }
}

/// A recovery key that was made.
#[derive(Serialize)]
struct RecoveryKeyView {
    public_key: String,
    private_file: String,
}

impl View for RecoveryKeyView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("public key", self.public_key.clone()),
            ("private key", self.private_file.clone()),
            (
                "next",
                "polykey root slot add LABEL --recovery-key PUBLIC; keep the file off the node"
                    .to_owned(),
            ),
        ])
    }
}

pub(super) async fn root(app: &App, command: RootCommand) -> Result<(), CliError> {
    if let RootCommand::RecoveryKey { out } = &command {
        return recovery_key(app, out);
    }
    let remote = app.connect().await?;
    match command {
        RootCommand::Status => {
            let request = pb::GetRootStatusRequest {};
            let answer = remote.read(request, rpc!(AdminServiceClient, get_root_status)).await?;
            app.out.print(&RootView::from(answer))
        }
        RootCommand::Rotate { expected_root } => {
            let request =
                pb::RotateRootRequest { expected_root_id: expected_root.unwrap_or_default() };
            let answer = remote.mutate(request, rpc!(AdminServiceClient, rotate_root)).await?;
            app.out.print(&RotatedView {
                root_id: answer.root_id,
                epoch: answer.epoch,
                audit_index: answer.audit_index,
            })
        }
        RootCommand::Rewrap(args) | RootCommand::Slot(SlotCommand::Rotate(args)) => {
            rewrap(app, &remote, args).await
        }
        RootCommand::Slot(command) => slot(app, &remote, command).await,
        // Done without a server.
        RootCommand::RecoveryKey { .. } => Ok(()),
    }
}

async fn rewrap(app: &App, remote: &Remote, args: RewrapArgs) -> Result<(), CliError> {
    let request = pb::RewrapSlotRequest {
        slot_id: args.slot,
        source: args.source.unwrap_or_default(),
        kind: args.kind,
        label: args.label,
        expected_generation: args.expected_generation,
    };
    let slot = request.slot_id.clone();
    let answer = remote.mutate(request, rpc!(AdminServiceClient, rewrap_slot)).await;
    let answer = answer.map_err(|error| advised(error, &slot))?;
    app.out.print(&ChangedView {
        slot: answer.slot.unwrap_or_default().into(),
        generation: answer.generation,
        audit_index: answer.audit_index,
        shares: Vec::new(),
    })
}

/// What to do about a slot that is not there, or is the last one.
fn advised(mut error: CliError, slot: &str) -> CliError {
    if error.exit == Exit::NotFound {
        error.message = format!("there is no slot `{slot}`");
        return error.hint("`polykey root slot list` shows labels and ids.");
    }
    if error.details.iter().any(|line| line == "reason: LAST_SLOT") {
        return error.hint(
            "`polykey root slot add` adds one, `polykey root slot test` tells whether it opens; the \
             server's log says why the others do not. Recovery slots do not count: no node opens them.",
        );
    }
    error
}

async fn slot(app: &App, remote: &Remote, command: SlotCommand) -> Result<(), CliError> {
    match command {
        SlotCommand::List => {
            let request = pb::GetRootStatusRequest {};
            let answer = remote.read(request, rpc!(AdminServiceClient, get_root_status)).await?;
            let slots = answer.slots.into_iter().map(SlotView::from).collect();
            app.out.print(&SlotsView { slots, generation: answer.generation })
        }
        SlotCommand::Add(args) => add(app, remote, args).await,
        SlotCommand::Test { slots } => {
            let test = |slot_id| async move {
                let request = pb::TestSlotRequest { slot_id };
                let answer =
                    remote.read(request.clone(), rpc!(AdminServiceClient, test_slot)).await;
                answer.map_err(|error| advised(error, &request.slot_id))
            };
            let answers = futures::future::try_join_all(slots.into_iter().map(test)).await?;
            let view = |answer: pb::TestSlotResponse| TestedView {
                slot: answer.slot.unwrap_or_default().into(),
                opens: answer.opens,
                problem: (!answer.opens).then_some(answer.problem),
            };
            let mut tests: Vec<_> = answers.into_iter().map(view).collect();
            let all = tests.iter().all(|tested| tested.opens);
            match (tests.pop(), tests.is_empty()) {
                (Some(only), true) => app.out.print(&only)?,
                (last, _) => {
                    tests.extend(last);
                    app.out.print(&TestsView { tests })?;
                }
            }
            if all { Ok(()) } else { Err(CliError::silent(Exit::DataLoss)) }
        }
        SlotCommand::Remove { slot, expected_generation } => {
            let request = pb::RemoveSlotRequest { slot_id: slot.clone(), expected_generation };
            let answer = remote.mutate(request, rpc!(AdminServiceClient, remove_slot)).await;
            let answer = answer.map_err(|error| advised(error, &slot))?;
            let (generation, audit_index) = (answer.generation, answer.audit_index);
            app.out.print(&RemovedView { slot, generation, audit_index })?;
            super::output::remark(
                "Old copies of the store still open with the removed slot's secret: \
                 `polykey root rotate` makes what is sealed from now on, and in time everything, \
                 safe from it.",
            );
            Ok(())
        }
        // Done by the caller.
        SlotCommand::Rotate(args) => rewrap(app, remote, args).await,
    }
}

async fn add(app: &App, remote: &Remote, args: AddArgs) -> Result<(), CliError> {
    let mut shares = Vec::new();
    let public = match (args.recovery_key, args.shares, args.threshold, args.out) {
        (Some(public), ..) => Some(public),
        (None, Some(count), Some(threshold), Some(out)) => {
            let (public, files) = split(count, threshold, &out, &args.label)?;
            shares = files;
            Some(public)
        }
        _ => None,
    };
    let request = pb::AddSlotRequest {
        label: args.label,
        wrapper: args.wrapper.unwrap_or_default(),
        recovery_public_key: public.map(|public| public.to_string()).unwrap_or_default(),
        expected_generation: args.expected_generation,
    };
    let added = remote.mutate(request, rpc!(AdminServiceClient, add_slot)).await;
    let answer = added.map_err(|error| match shares.is_empty() {
        true => error,
        false => error.detail("The shares that were written open nothing: remove them."),
    })?;
    app.out.print(&ChangedView {
        slot: answer.slot.unwrap_or_default().into(),
        generation: answer.generation,
        audit_index: answer.audit_index,
        shares: shares.iter().map(|file| file.display().to_string()).collect(),
    })
}

/// Makes a recovery key and writes its shares; the key is forgotten here.
fn split(
    count: u8,
    threshold: u8,
    out: &Path,
    label: &str,
) -> Result<(RecoveryPublicKey, Vec<PathBuf>), CliError> {
    let failed = |error: String| CliError::new(Exit::Other, error);
    let key = RecoveryKey::generate().map_err(|e| failed(e.to_string()))?;
    let public = key.public().map_err(|e| failed(e.to_string()))?;
    let shares = recovery::split(&key, threshold, count)
        .map_err(|error| CliError::usage(error.to_string()))?;
    std::fs::create_dir_all(out).map_err(|e| failed(format!("{}: {e}", out.display())))?;
    // A label has no `/`; one of two dots would be a directory.
    let file = |n: u8| out.join(format!("{label}-share-{n}-of-{count}.txt"));
    let mut files = Vec::with_capacity(shares.len());
    for share in &shares {
        let path = file(share.number());
        private_file(&path, &share.to_text())?;
        files.push(path);
    }
    Ok((public, files))
}

/// Writes a text and a line break to a new file, mode 0600, durably.
fn private_file(path: &Path, text: &str) -> Result<(), CliError> {
    let failed =
        |error: std::io::Error| CliError::new(Exit::Other, format!("{}: {error}", path.display()));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.write_all(b"\n").map_err(failed)?;
    file.sync_all().map_err(failed)
}

fn recovery_key(app: &App, out: &Path) -> Result<(), CliError> {
    let failed = |error: String| CliError::new(Exit::Other, error);
    let key = RecoveryKey::generate().map_err(|e| failed(e.to_string()))?;
    let public = key.public().map_err(|e| failed(e.to_string()))?;
    private_file(out, &key.to_text())?;
    let private_file = out.display().to_string();
    app.out.print(&RecoveryKeyView { public_key: public.to_string(), private_file })
}
