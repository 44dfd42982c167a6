//! `polykey store copy`: a store that nobody has open, into another one, and back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use polykey_storage::replica::{self, ReplicaError, Step};
use polykey_storage::{OpenError, Revision, Store, redb};
use serde::Serialize;

use super::super::App as Cli;
use super::super::error::{CliError, Exit};
use super::super::output::{Human, View};
use super::super::progress::Bar;
use super::runtime;
use crate::app::AppError;
use crate::hardening;

/// How a database is named.
const SCHEMES: [&str; 2] = ["postgres://", "postgresql://"];

/// Arguments of `store copy`.
#[derive(Args, Debug)]
pub struct CopyArgs {
    /// The store: a file, or postgres://USER@HOST:PORT/DATABASE?PARAMETERS without a password.
    #[arg(long, value_name = "STORE")]
    pub from: String,
    /// Where it goes: a file that is made, or a database, in whose schema there is nothing, or what an
    /// interrupted copy has left.
    #[arg(long, value_name = "STORE")]
    pub to: String,
    /// The file with the password of --from.
    #[arg(long, value_name = "FILE")]
    pub from_password: Option<PathBuf>,
    /// The file with the password of --to.
    #[arg(long, value_name = "FILE")]
    pub to_password: Option<PathBuf>,
    /// The schema of the tables in a database.
    #[arg(long, value_name = "NAME", default_value = "polykey")]
    pub schema: String,
}

/// What was copied.
#[derive(Serialize)]
struct CopiedView {
    from: String,
    to: String,
    records: u64,
    revision: u64,
}

impl View for CopiedView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("from", self.from.clone()),
            ("to", self.to.clone()),
            ("records", format!("{}, each compared", self.records)),
            ("revision", self.revision.to_string()),
        ])
    }
}

/// Copies a store and compares every record. Records are sealed: it takes no key, and learns nothing.
///
/// # Errors
/// [`Exit::Conflict`] where the target is something else, or a store is in use; [`Exit::Unavailable`]
/// where a database is; then the copy may be taken up again.
pub(in crate::cli) fn store_copy(cli: &Cli, args: CopyArgs) -> Result<(), CliError> {
    hardening::private_files();
    if args.from == args.to && args.from_password == args.to_password {
        return Err(CliError::usage("--from and --to are one store"));
    }
    let runtime = runtime()?;
    let from = open(&args.from, args.from_password.as_deref(), &args.schema, false)?;
    let revision = from.status().revision;
    if revision == Revision::EMPTY {
        return Err(CliError::usage(format!("{}: there is no store in it", args.from)));
    }
    let to = open(&args.to, args.to_password.as_deref(), &args.schema, true)?;
    let mut bar = Bar::new("records");
    let (mut done, total) = (0, from.status().rows.unwrap_or(0));
    let progress = |step| {
        if let Step::Applied { rows, .. } | Step::Copied { rows } = step {
            done += rows as u64;
            bar.at(done, total.max(done));
        }
    };
    let copied = runtime.block_on(replica::copy(from, to, progress));
    drop(bar);
    let records = copied.map_err(failed)?;
    let CopyArgs { from, to, .. } = args;
    cli.out.print(&CopiedView { from, to, records, revision: revision.0 })
}

/// Whether a store is named that is no file.
pub(super) fn is_database(place: &str) -> bool {
    SCHEMES.iter().any(|scheme| place.starts_with(scheme))
}

fn open(
    place: &str,
    password: Option<&Path>,
    schema: &str,
    make: bool,
) -> Result<Arc<dyn Store>, CliError> {
    if is_database(place) {
        return database(place, password, schema);
    }
    let options = redb::Options::default();
    let opened = match make {
        true => redb::Redb::open_or_create(place, options),
        false => redb::Redb::open(place, options),
    };
    Ok(Arc::new(opened.map_err(refused)?))
}

fn refused(error: OpenError) -> CliError {
    AppError::Store(error).into()
}

/// The store in a database.
pub(super) fn database(
    url: &str,
    password: Option<&Path>,
    schema: &str,
) -> Result<Arc<dyn Store>, CliError> {
    Ok(postgres(url, password, schema)?)
}

#[cfg(feature = "postgres")]
pub(super) fn postgres(
    url: &str,
    password: Option<&Path>,
    schema: &str,
) -> Result<Arc<polykey_storage::postgres::Postgres>, CliError> {
    use polykey_storage::postgres::{Options, Postgres};
    use zeroize::Zeroizing;

    use crate::client::file;

    let mut options = Options::new(url);
    schema.clone_into(&mut options.schema);
    if let Some(path) = password {
        let path = path.to_owned();
        options.password = Some(Arc::new(move || {
            let failed = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
            let bytes = file::read(&path, 4096).map_err(|error| failed(&error))?;
            let text = std::str::from_utf8(&bytes).map_err(|error| failed(&error))?;
            Ok(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned()))
        }));
    }
    Ok(Arc::new(Postgres::open(options).map_err(refused)?))
}

#[cfg(not(feature = "postgres"))]
pub(super) fn postgres(
    _: &str,
    _: Option<&Path>,
    _: &str,
) -> Result<Arc<polykey_storage::memory::Memory>, CliError> {
    let text = "this build knows no databases; run one with the cargo feature `postgres`";
    Err(CliError::usage(text))
}

pub(super) fn failed(error: ReplicaError) -> CliError {
    let exit = match &error {
        ReplicaError::NotEmpty
        | ReplicaError::NotAReplica
        | ReplicaError::Torn
        | ReplicaError::OfAnother
        | ReplicaError::Diverged { .. }
        | ReplicaError::SourceWentBack { .. }
        | ReplicaError::Contended => Exit::Conflict,
        ReplicaError::Differs(_) | ReplicaError::Damaged => Exit::DataLoss,
        ReplicaError::Source(_) | ReplicaError::Target(_) | ReplicaError::Commit(_) => {
            Exit::Unavailable
        }
    };
    let failed = CliError::new(exit, error.to_string());
    match exit {
        Exit::Unavailable => failed.hint("Give the same command again: it goes on where it was."),
        _ => failed,
    }
}
