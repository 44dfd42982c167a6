//! `polykey store compact`: what a store file no longer needs, given back to the file system.

use std::path::PathBuf;

use clap::Args;
use polykey_storage::redb;
use serde::Serialize;

use super::super::App as Cli;
use super::super::error::CliError;
use super::super::output::{Human, View};
use super::copy::is_database;
use crate::app::AppError;
use crate::hardening;

/// Arguments of `store compact`.
#[derive(Args, Debug)]
pub struct CompactArgs {
    /// The store file.
    #[arg(long, value_name = "FILE")]
    pub store: String,
}

/// What was given back.
#[derive(Serialize)]
struct CompactedView {
    store: String,
    bytes_before: u64,
    bytes_after: u64,
}

impl View for CompactedView {
    fn human(&self) -> Human {
        let freed = self.bytes_before.saturating_sub(self.bytes_after);
        Human::Record(vec![
            ("store", self.store.clone()),
            ("before", format!("{} bytes", self.bytes_before)),
            ("after", format!("{} bytes", self.bytes_after)),
            ("given back", format!("{freed} bytes")),
        ])
    }
}

/// Compacts a store file that nobody has open. Records are moved as they are: it takes no key. A crash
/// meanwhile loses nothing.
///
/// # Errors
/// [`Exit::Conflict`](super::super::Exit::Conflict) if the store is in use; [`Exit::Usage`](super::super::Exit::Usage) for a database, which does this
/// by itself.
pub(in crate::cli) fn store_compact(cli: &Cli, args: CompactArgs) -> Result<(), CliError> {
    hardening::private_files();
    if is_database(&args.store) {
        let text = "a database is not compacted by this command";
        return Err(CliError::usage(text).hint(
            "PostgreSQL gives space back by VACUUM, which autovacuum runs by itself; VACUUM FULL gives it \
             to the file system, and has every node wait meanwhile. CockroachDB needs neither. The table \
             `changes` is kept short by each commit.",
        ));
    }
    let path = PathBuf::from(args.store);
    let compacted = redb::Redb::compact(&path, redb::Options::default());
    let redb::Compacted { before, after } = compacted.map_err(AppError::from)?;
    cli.out.print(&CompactedView {
        store: path.display().to_string(),
        bytes_before: before,
        bytes_after: after,
    })
}
