//! `polykey recover`: a store that nothing else opens, opened with its recovery key.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use polykey_hsm::recovery::{self, RecoveryKey, Share};
use serde::Serialize;
use zeroize::Zeroizing;

use super::super::App as Cli;
use super::super::error::{CliError, Exit};
use super::super::output::{Human, View};
use super::runtime;
use crate::app::{self, AppError};
use crate::config::Config;
use crate::hardening;
use crate::time::Clock;

/// More than any share or key, with room for what people write around it.
const MAX_BYTES: u64 = 4096;

/// Arguments of `recover`.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("with").required(true).args(["key", "shares"]))]
pub struct RecoverArgs {
    /// The configuration: its store is opened, and its master key wraps the root key from now on.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The file with the private half of the recovery key; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// A file with a share of it; as many as it takes.
    #[arg(long = "share", value_name = "FILE")]
    pub shares: Vec<PathBuf>,
    /// Make the master key in the file that the configuration names, if there is none.
    #[arg(long)]
    pub generate_master_key: bool,
}

/// What was recovered.
#[derive(Serialize)]
struct RecoveredView {
    node_id: String,
    slot: String,
    kind: String,
    source: String,
    changed: bool,
    master_key_made: bool,
    next: String,
}

impl View for RecoveredView {
    fn human(&self) -> Human {
        let state = match self.changed {
            true => "opens with the master key from now on",
            false => "opens with the master key as it is; nothing was changed",
        };
        Human::Record(vec![
            ("node", self.node_id.clone()),
            ("slot", format!("{} ({} {}) {state}", self.slot, self.kind, self.source)),
            ("next", self.next.clone()),
        ])
    }
}

/// Opens the store with a recovery key, and gives its root key back to the master key.
///
/// # Errors
/// See [`AppError`]; [`Exit::Usage`] for shares that are not enough or not genuine.
pub(in crate::cli) fn recover(cli: &Cli, args: RecoverArgs) -> Result<(), CliError> {
    hardening::private_files();
    let config = Config::load(&args.config).map_err(AppError::from)?;
    let key = recovery_key(args.key.as_deref(), &args.shares)?;
    let make = args.generate_master_key;
    let recovered = app::recover(&config, key, make, Clock::System);
    let recovered = runtime()?.block_on(Box::pin(recovered))?;
    let slot = recovered.slot;
    cli.out.print(&RecoveredView {
        node_id: data_encoding::HEXLOWER.encode(&recovered.node_id),
        slot: slot.label,
        kind: slot.kind,
        source: slot.source,
        changed: !recovered.unchanged,
        master_key_made: recovered.master_key_made,
        next: format!("polykey serve --config {}", config.file.display()),
    })
}

/// The recovery key of a file, or of its shares.
pub(super) fn recovery_key(
    file: Option<&Path>,
    shares: &[PathBuf],
) -> Result<RecoveryKey, CliError> {
    match file {
        Some(file) => RecoveryKey::parse(&read(file)?).map_err(|error| named(file, &error)),
        None => combined(shares),
    }
}

fn named(file: &Path, error: &dyn std::fmt::Display) -> CliError {
    CliError::usage(format!("{}: {error}", file.display()))
}

fn combined(files: &[PathBuf]) -> Result<RecoveryKey, CliError> {
    let mut shares = Vec::with_capacity(files.len());
    for file in files {
        shares.push(Share::parse(&read(file)?).map_err(|error| named(file, &error))?);
    }
    recovery::combine(&shares).map_err(|error| CliError::usage(error.to_string()))
}

fn read(file: &Path) -> Result<Zeroizing<String>, CliError> {
    let failed =
        |error: std::io::Error| CliError::new(Exit::Usage, format!("{}: {error}", file.display()));
    // Large enough from the start: growing would leave copies behind.
    let mut text = Zeroizing::new(String::with_capacity(8192));
    let input: Box<dyn Read> = match file.as_os_str() == "-" {
        true => Box::new(std::io::stdin().lock()),
        false => Box::new(std::fs::File::open(file).map_err(failed)?),
    };
    input.take(MAX_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}
