//! `polykey dev|init|serve|check`, and what else needs the store itself: they bring a runtime of their own.

mod backup;
mod compact;
mod copy;
mod dev;
mod doctor;
mod hsm;
mod init;
mod lock;
mod promote;
mod recover;
mod run;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use polykey_proto::polykey::record::v1::NodeRecord;
use polykey_storage::{Store, redb};
use prost::Message;
use serde::Serialize;

use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::{App as Cli, audit_verify};
use crate::app::{self, AppError, Fault};
use crate::audit::{Trusted, verify_clear};
use crate::config::{Config, Tolerate};
use crate::error::Error;
use crate::vault::space::{META, meta};

pub use backup::{RestoreArgs, VerifyBackupArgs};
pub(super) use backup::{backup_verify, restore};
pub use compact::CompactArgs;
pub(super) use compact::store_compact;
pub use copy::CopyArgs;
pub(super) use copy::store_copy;
pub use dev::{DevArgs, dev};
pub use doctor::DoctorArgs;
pub(super) use doctor::doctor;
pub use hsm::HsmCommand;
pub(super) use hsm::hsm;
pub use init::InitArgs;
pub(super) use init::init;
pub use lock::{LockArgs, UnlockArgs};
pub(super) use lock::{lock, unlock};
pub use promote::PromoteArgs;
pub(super) use promote::promote;
pub use recover::RecoverArgs;
pub(super) use recover::recover;
pub use run::{ServeArgs, serve};

impl From<AppError> for CliError {
    fn from(error: AppError) -> Self {
        let exit = match error.fault() {
            Fault::Given => Exit::Usage,
            Fault::Conflict => Exit::Conflict,
            Fault::Damaged => Exit::DataLoss,
            Fault::Machine => Exit::Other,
            Fault::Away => Exit::Unavailable,
        };
        let out = Self::lines(exit, &error.to_string());
        match error.hint() {
            Some(hint) => out.hint(hint),
            None => out,
        }
    }
}

/// Has a configuration accept, this once, a store for which its anchor does not vouch.
fn accept_rollback(config: &mut Config, accept: bool) -> Result<(), CliError> {
    match &mut config.anchor {
        Some(anchor) if accept => anchor.tolerate = Tolerate::Rollback,
        None if accept => {
            let text =
                "--accept-rollback: the configuration has no [anchor], so that no store is refused";
            return Err(CliError::usage(text));
        }
        _ => {}
    }
    Ok(())
}

/// The configuration for the next opening: what was accepted was accepted once.
fn accepted(mut config: Config) -> Config {
    if let Some(anchor) = &mut config.anchor {
        anchor.tolerate = Tolerate::Nothing;
    }
    config
}

/// A runtime for the node's own tasks; requests run on threads of the network layer.
fn runtime() -> Result<tokio::runtime::Runtime, AppError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("polykey-node")
        .enable_all()
        .build()
        .map_err(AppError::Process)
}

/// Arguments of `check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// What was looked at.
#[derive(Serialize)]
struct CheckView {
    ok: bool,
    configuration: String,
    findings: Vec<FindingView>,
}

#[derive(Serialize)]
struct FindingView {
    subject: &'static str,
    ok: bool,
    text: String,
    hint: Option<String>,
}

impl View for CheckView {
    fn human(&self) -> Human {
        let mut text = format!("ok     configuration: {}\n", self.configuration);
        for finding in &self.findings {
            let word = if finding.ok { "ok   " } else { "WRONG" };
            text.push_str(&format!("{word}  {}: {}\n", finding.subject, finding.text));
            if let Some(hint) = &finding.hint {
                text.push_str(&format!("       {hint}\n"));
            }
        }
        Human::Text(text)
    }
}

/// Checks a configuration and everything it names, and touches nothing.
///
/// # Errors
/// The mistakes of the configuration; [`Exit::Usage`] after printing, if anything else is wrong.
pub(super) fn check(cli: &Cli, args: CheckArgs) -> Result<(), CliError> {
    let config = Config::load(&args.config).map_err(AppError::from)?;
    let view = |finding: app::Finding| match finding.result {
        Ok(text) => FindingView { subject: finding.subject, ok: true, text, hint: None },
        Err(error) => FindingView {
            subject: finding.subject,
            ok: false,
            text: error.to_string(),
            hint: error.hint(),
        },
    };
    let findings = runtime()?.block_on(Box::pin(app::check(&config)));
    let findings: Vec<_> = findings.into_iter().map(view).collect();
    let ok = findings.iter().all(|finding| finding.ok);
    let configuration = config.file.display().to_string();
    cli.out.print(&CheckView { ok, configuration, findings })?;
    if ok { Ok(()) } else { Err(CliError::silent(Exit::Usage)) }
}

/// Verifies the audit log in a store that no server has open. It takes no master key: leaf hashes
/// and checkpoints stand in the clear.
///
/// # Errors
/// [`Exit::DataLoss`] if the log is not whole, [`Exit::Conflict`] if the store is in use.
pub(super) fn audit_verify_store(
    cli: &Cli,
    args: audit_verify::VerifyArgs,
) -> Result<(), CliError> {
    let ((keys, ml_dsa), kept) = (args.keys()?, args.kept()?);
    let path = args.store.unwrap_or_default();
    if keys.is_empty() {
        let text = "a store says nothing by itself about who signed its log";
        return Err(CliError::usage(text).hint(
            "Name the key with --public-key KEY; `polykey audit checkpoint` prints it while the \
             server runs.",
        ));
    }
    let runtime = runtime()?;
    let report = runtime.block_on(async {
        let store = redb::Redb::open(&path, redb::Options::default())?;
        let store: Arc<dyn Store> = Arc::new(store);
        let node = store.get(META, meta::NODE).await.map_err(Error::from)?;
        let node = node.ok_or(crate::custody::OpenError::NotInitialised)?;
        let node = NodeRecord::decode(node.value.as_ref())
            .map_err(|_| Error::data_loss("the node's record is malformed"))?;
        let node_id: [u8; 16] = (node.node_id.as_ref().try_into())
            .map_err(|_| Error::data_loss("the node's record has no node id"))?;
        Ok::<_, AppError>(
            {
                let trusted = Trusted { ed25519: &keys, ml_dsa: &ml_dsa };
                verify_clear(&*store, node_id, trusted, &kept)
            }
            .await?,
        )
    })?;
    audit_verify::print_report(cli, report, &keys, (true, !ml_dsa.is_empty()))
}
