//! `polykey promote`: a replica becomes the writer, and the node that shipped to it is fenced.

use std::path::PathBuf;

use clap::Args;
#[cfg(feature = "postgres")]
use serde::Serialize;

use super::super::App as Cli;
use super::super::error::CliError;
#[cfg(feature = "postgres")]
use super::super::output::{Human, View};
use crate::hardening;

/// Arguments of `promote`.
#[derive(Args, Debug)]
pub struct PromoteArgs {
    /// The replication target: postgres://USER@HOST:PORT/DATABASE?PARAMETERS without a password.
    #[arg(value_name = "URL")]
    pub target: String,
    /// The file with its password.
    #[arg(long, value_name = "FILE")]
    pub password: Option<PathBuf>,
    /// The schema of the tables.
    #[arg(long, value_name = "NAME", default_value = "polykey")]
    pub schema: String,
    /// A configuration whose master key or wrappers open the store, to bring the promotion into its audit
    /// log now. Without it, the next node that opens the store does.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What was promoted.
#[cfg(feature = "postgres")]
#[derive(Serialize)]
struct PromotedView {
    target: String,
    source: String,
    revision: u64,
    fenced_epoch: u64,
    epoch: u64,
    audited: bool,
    next: String,
}

#[cfg(feature = "postgres")]
impl View for PromotedView {
    fn human(&self) -> Human {
        let audited = match self.audited {
            true => "yes",
            false => "when a node opens the store",
        };
        Human::Record(vec![
            ("promoted", self.target.clone()),
            ("replica of", self.source.clone()),
            ("revision", format!("{} of that store, whole", self.revision)),
            ("epoch", format!("{}; who writes under {} is fenced", self.epoch, self.fenced_epoch)),
            ("in the audit log", audited.to_owned()),
            ("next", self.next.clone()),
        ])
    }
}

/// Promotes a replica. What was promoted before is told again, and its epoch is not raised twice.
///
/// # Errors
/// [`super::super::error::Exit::Conflict`] if it is no replica, or stands between two revisions.
#[cfg(feature = "postgres")]
pub(in crate::cli) fn promote(cli: &Cli, args: PromoteArgs) -> Result<(), CliError> {
    use std::sync::Arc;

    use polykey_storage::{Store, replica};

    use super::super::error::Exit;
    use super::copy::{failed, postgres};
    use super::runtime;
    use crate::app::{self, AppError};
    use crate::config::Config;
    use crate::time::Clock;

    hardening::private_files();
    let config = args.config.as_deref().map(Config::load).transpose().map_err(AppError::from)?;
    let runtime = runtime()?;
    let store = postgres(&args.target, args.password.as_deref(), &args.schema)?;
    let any: Arc<dyn Store> = Arc::clone(&store) as Arc<dyn Store>;
    // Noted in the replica first, so that it is whole; then whoever wrote to it is fenced.
    let promoted = runtime.block_on(replica::promote(&any, store.epoch())).map_err(failed)?;
    let mut epoch = store.epoch();
    if epoch <= promoted.fenced {
        let raised = runtime.block_on(store.take_over());
        epoch = raised.map_err(|error| {
            CliError::new(Exit::Unavailable, format!("the epoch was not raised: {error}"))
                .hint("Give the same command again: it goes on where it was.")
        })?;
    }
    let audited = match &config {
        Some(config) => {
            let recorded = app::record_promotion(config, Arc::clone(&any), Clock::System);
            runtime.block_on(Box::pin(recorded))?;
            true
        }
        None => false,
    };
    let PromoteArgs { target, schema, .. } = args;
    let place = target.split('?').next().unwrap_or_default();
    cli.out.print(&PromotedView {
        target: format!("{place} (schema {schema})"),
        source: data_encoding::HEXLOWER.encode(&promoted.source),
        revision: promoted.revision.0,
        fenced_epoch: promoted.fenced,
        epoch,
        audited,
        next: format!(
            "serve it with [storage] kind = \"postgres\", url = \"{place}\" and schema = \"{schema}\"; or make a \
             file of it with `polykey restore --config FILE --from {place} --schema {schema}`, and serve that \
             with [replication] to another schema"
        ),
    })
}

/// Refuses: there is no database in this build.
///
/// # Errors
/// Always.
#[cfg(not(feature = "postgres"))]
pub(in crate::cli) fn promote(_: &Cli, args: PromoteArgs) -> Result<(), CliError> {
    hardening::private_files();
    super::copy::database(&args.target, args.password.as_deref(), &args.schema).map(drop)
}
