//! `polykey backup verify` and `polykey restore`: backups read back, with no server.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::super::App as Cli;
use super::super::audit_verify;
use super::super::error::CliError;
use super::super::output::{Human, View};
use super::copy::{database, is_database};
use super::recover::recovery_key;
use super::{accept_rollback, runtime};
use crate::app::{self, AppError, BackupView, Origin, Recovery};
use crate::config::Config;
use crate::hardening;
use crate::time::Clock;

/// What opens a backup, where the configuration does not.
#[derive(Args, Debug)]
#[group(multiple = true)]
pub struct RecoveryArgs {
    /// The file with the private half of a recovery key; - for standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "shares", requires = "public_keys")]
    pub key: Option<PathBuf>,
    /// A file with a share of it; as many as it takes.
    #[arg(long = "share", value_name = "FILE", requires = "public_keys")]
    pub shares: Vec<PathBuf>,
    /// With a recovery key: the key that signs the checkpoints of the node's audit log, as `polykey audit
    /// checkpoint` prints it, or a file with it. Anybody can make a backup that the recovery key opens; only
    /// the node's log is signed with this.
    #[arg(long = "public-key", value_name = "KEY")]
    pub public_keys: Vec<String>,
}

impl RecoveryArgs {
    fn given(&self) -> Result<Option<Recovery>, CliError> {
        if self.key.is_none() && self.shares.is_empty() {
            return Ok(None);
        }
        let signers = self
            .public_keys
            .iter()
            .map(|text| audit_verify::key(text))
            .collect::<Result<_, _>>()?;
        let key = recovery_key(self.key.as_deref(), &self.shares)?;
        Ok(Some(Recovery { key, signers }))
    }
}

/// Arguments of `backup verify`.
#[derive(Args, Debug)]
pub struct VerifyBackupArgs {
    /// The configuration of the node: its master key or wrappers open the backup. Its store is left alone.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The backup.
    #[arg(long, value_name = "FILE")]
    pub from: PathBuf,
    /// Where there is room for the store meanwhile [default: beside the backup].
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// What opens it instead.
    #[command(flatten)]
    pub recovery: RecoveryArgs,
}

/// Arguments of `restore`.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// The configuration: the store is made where it says.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The backup; or the database that the store was shipped or copied to:
    /// postgres://USER@HOST:PORT/DATABASE?PARAMETERS without a password.
    #[arg(long, value_name = "FILE|URL")]
    pub from: String,
    /// The file with the password of the database.
    #[arg(long, value_name = "FILE")]
    pub password: Option<PathBuf>,
    /// The schema of the tables in the database.
    #[arg(long, value_name = "NAME", default_value = "polykey")]
    pub schema: String,
    /// With a recovery key: make the master key in the file that the configuration names, if there is none.
    #[arg(long)]
    pub generate_master_key: bool,
    /// Restore a backup that is older than what the node is known to have served by its anchor. It is
    /// audited, and the store is anchored as it is.
    #[arg(long)]
    pub accept_rollback: bool,
    /// What opens it instead of the configuration's wrappers.
    #[command(flatten)]
    pub recovery: RecoveryArgs,
}

/// What a backup holds, or what was made of it.
#[derive(Serialize)]
struct FoundView {
    file: String,
    node_id: String,
    created_at: String,
    revision: u64,
    records: u64,
    bytes: u64,
    enabled_keys: u64,
    audit_leaves: u64,
    damaged_records: u64,
    store: Option<String>,
    slot: Option<String>,
    next: Option<String>,
}

impl FoundView {
    fn new(file: &Path, view: &BackupView) -> Self {
        Self {
            file: file.display().to_string(),
            node_id: data_encoding::HEXLOWER.encode(&view.node_id),
            created_at: view.created_at.to_string(),
            revision: view.contents.revision,
            records: view.contents.rows,
            bytes: view.contents.bytes,
            enabled_keys: view.keys,
            audit_leaves: view.leaves,
            damaged_records: view.damaged,
            store: None,
            slot: None,
            next: None,
        }
    }
}

impl View for FoundView {
    fn human(&self) -> Human {
        let mut lines = vec![
            ("file", self.file.clone()),
            ("node", self.node_id.clone()),
            ("made at", self.created_at.clone()),
            ("revision", self.revision.to_string()),
            ("records", format!("{}, all verified", self.records)),
            ("enabled keys", self.enabled_keys.to_string()),
            ("audit leaves", self.audit_leaves.to_string()),
        ];
        if self.damaged_records > 0 {
            let text =
                format!("{} records, when the backup was made already", self.damaged_records);
            lines.push(("damaged", text));
        }
        let more = [("store", &self.store), ("slot", &self.slot), ("next", &self.next)];
        lines.extend(more.into_iter().filter_map(|(name, text)| Some((name, text.clone()?))));
        Human::Record(lines)
    }
}

/// Opens a backup and verifies every record.
///
/// # Errors
/// See [`AppError`].
pub(in crate::cli) fn backup_verify(cli: &Cli, args: VerifyBackupArgs) -> Result<(), CliError> {
    hardening::private_files();
    let config = Config::load(&args.config).map_err(AppError::from)?;
    let recovery = args.recovery.given()?;
    let beside = args.from.parent().filter(|p| !p.as_os_str().is_empty());
    let scratch = args.scratch.as_deref().or(beside).unwrap_or(Path::new("."));
    let verified = app::verify_backup(&config, &args.from, scratch, recovery, Clock::System);
    let view = runtime()?.block_on(Box::pin(verified))?;
    cli.out.print(&FoundView::new(&args.from, &view))
}

/// Makes a store of a backup or of a database.
///
/// # Errors
/// See [`AppError`].
pub(in crate::cli) fn restore(cli: &Cli, args: RestoreArgs) -> Result<(), CliError> {
    hardening::private_files();
    let mut config = Config::load(&args.config).map_err(AppError::from)?;
    accept_rollback(&mut config, args.accept_rollback)?;
    let recovery = args.recovery.given()?;
    let runtime = runtime()?;
    let file = Path::new(&args.from);
    let database = match is_database(&args.from) {
        true => Some(app::Database {
            name: args.from.split('?').next().unwrap_or_default().to_owned(),
            store: database(&args.from, args.password.as_deref(), &args.schema)?,
        }),
        false => None,
    };
    let origin = database.as_ref().map_or(Origin::File(file), Origin::Database);
    let restored = app::restore(&config, origin, recovery, args.generate_master_key, Clock::System);
    let (view, recovered) = runtime.block_on(Box::pin(restored))?;
    let name = database.as_ref().map_or(file, |database| Path::new(&database.name));
    let mut view = FoundView::new(name, &view);
    view.store = Some(config.storage.path.display().to_string());
    view.slot = recovered.map(|recovered| recovered.slot.label);
    view.next = Some(format!("polykey serve --config {}", config.file.display()));
    cli.out.print(&view)
}
