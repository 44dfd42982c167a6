//! The command line: what is typed, and which part of it does the work.
//!
//! One file holds each group of subcommands with its arguments; [`error`] has the exit codes, [`output`] everything
//! that is printed. Commands that talk to a server do so through [`crate::client`], on a small runtime of their own;
//! `dev`, `init`, `serve` and `check` are in [`server`] and bring theirs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod access;
mod admin_view;
pub mod audit;
mod audit_copy;
mod audit_verify;
mod audit_view;
pub mod backup;
pub mod client;
pub mod crypto;
mod crypto_large;
mod crypto_run;
pub mod error;
pub mod health;
pub mod key;
pub mod key_export;
mod key_run;
pub mod key_versions;
pub mod node;
pub mod output;
pub mod policy;
mod policy_check;
mod progress;
mod remote;
mod root;
pub mod server;
pub mod shell;
pub mod status;
pub mod value;
mod view;

#[cfg(test)]
mod golden;
#[cfg(test)]
mod parse_tests;

pub use access::{RevokeArgs, TokenCommand};
pub use error::{CliError, Exit};
pub use server::{
    CheckArgs, DevArgs, DoctorArgs, HsmCommand, InitArgs, LockArgs, PromoteArgs, RecoverArgs,
    RestoreArgs, ServeArgs, UnlockArgs,
};

use output::{Format, Output};
use remote::Remote;

/// A key management service in one binary.
#[derive(Parser, Debug)]
#[command(name = "polykey", version, propagate_version = false, after_help = error::EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    /// The connection to use; without it ./.polykey/profile.toml, then polykey/profile.toml in the
    /// user's configuration directory.
    #[arg(long, global = true, value_name = "FILE", env = "POLYKEY_PROFILE", display_order = 900)]
    pub profile: Option<PathBuf>,
    /// The form in which data is printed.
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        value_name = "FORMAT",
        default_value_t,
        display_order = 901
    )]
    pub output: Format,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a server for development; everything it needs is made on first use.
    Dev(DevArgs),
    /// Make the store and root key of a configuration.
    Init(InitArgs),
    /// Run the server.
    Serve(ServeArgs),
    /// Check a configuration; nothing is touched.
    Check(CheckArgs),
    /// Examine a node and its machine: devices, disk, limits, health; each finding says what to do.
    Doctor(DoctorArgs),
    /// Open a store with a recovery key or its shares, and put its root key under the master key of the
    /// configuration again. No server may have it open.
    Recover(RecoverArgs),
    /// Backups of the node.
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// Make a store of a backup or of a database, where the configuration has its store and there is none.
    Restore(RestoreArgs),
    /// Make a replication target the writer, and fence the node that ships to it.
    Promote(PromoteArgs),
    /// Have a node on this machine forget its root key and all others, and serve no more.
    Lock(LockArgs),
    /// Unlock a node on this machine.
    Unlock(UnlockArgs),
    /// PKCS#11 tokens.
    #[command(subcommand)]
    Hsm(HsmCommand),
    /// Keys: create, read, change, rotate, revoke, destroy, export.
    #[command(subcommand)]
    Key(key::KeyCommand),
    /// Work with keys.
    #[command(flatten)]
    Work(crypto::WorkCommand),
    /// Clients of the server.
    #[command(subcommand)]
    Client(client::ClientCommand),
    /// Roles of clients.
    #[command(subcommand)]
    Role(policy::RoleCommand),
    /// Certificates from the server's own authority.
    #[command(subcommand)]
    Cert(client::CertCommand),
    /// Log in anew. Other commands log in by themselves.
    Login,
    /// Show who the server takes you for.
    Whoami,
    /// Tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// The root key.
    #[command(subcommand)]
    Root(root::RootCommand),
    /// Policies: check files, list, explain a decision.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// The audit log.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// The store.
    #[command(subcommand)]
    Store(node::StoreCommand),
    /// List what is scheduled, by time.
    Jobs(node::JobsArgs),
    /// Show how the node does, on one screen.
    Status,
    /// Show it again and again.
    Top(status::TopArgs),
    /// Have the server read certificates, revocation lists, policies, rates, quotas, the log's level and the way of
    /// telemetry again. Exits with 2 if one of them is wrong: what was in force before is still.
    Reload,
    /// Tell whether the server serves; for probes. Exits with 0 if it does, else with 6.
    Health(health::HealthArgs),
    /// Print the completion script for a shell.
    Completion {
        /// The shell.
        #[arg(value_enum)]
        shell: shell::Shell,
    },
    /// Write man pages into a directory.
    #[command(hide = true)]
    Man {
        /// The directory.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Print the version.
    Version,
}

/// What every command needs.
struct App {
    out: Output,
    profile: Option<PathBuf>,
}

impl App {
    async fn connect(&self) -> Result<Remote, CliError> {
        Remote::connect(self.profile.as_deref()).await
    }
}

/// Parses the arguments of the process, does what they say and returns the code to exit with.
#[must_use]
pub fn main() -> ExitCode {
    // Started by the node alone, for a module that it does not load itself.
    if std::env::args_os().nth(1).is_some_and(|word| word == "pkcs11-worker") {
        return polykey_hsm::pkcs11::worker::run();
    }
    let result = match Cli::try_parse() {
        Ok(cli) => run(cli),
        Err(error) => {
            // A reader that has gone away is no reason to fail.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8));
        }
    };
    match result {
        Ok(()) => ExitCode::from(Exit::Ok as u8),
        Err(error) => {
            if !error.message.is_empty() {
                output::remark(&error.to_string());
            }
            ExitCode::from(error.exit as u8)
        }
    }
}

/// Does what was asked.
///
/// # Errors
/// See [`CliError`].
pub fn run(cli: Cli) -> Result<(), CliError> {
    let Cli { profile, output, command } = cli;
    let app = App { out: Output { format: output }, profile };
    match command {
        Command::Dev(args) => server::dev(args),
        Command::Init(args) => server::init(&app, args),
        Command::Serve(args) => server::serve(args),
        Command::Check(args) => server::check(&app, args),
        Command::Doctor(args) => server::doctor(&app, args),
        Command::Recover(args) => server::recover(&app, args),
        Command::Restore(args) => server::restore(&app, args),
        Command::Promote(args) => server::promote(&app, args),
        Command::Backup(backup::BackupCommand::Verify(args)) => server::backup_verify(&app, args),
        Command::Store(node::StoreCommand::Copy(args)) => server::store_copy(&app, args),
        Command::Store(node::StoreCommand::Compact(args)) => server::store_compact(&app, args),
        Command::Lock(args) => server::lock(&app, &args),
        Command::Unlock(args) => server::unlock(&app, &args),
        Command::Hsm(command) => server::hsm(&app, command),
        Command::Audit(audit::AuditCommand::Verify(args)) if args.store.is_some() => {
            server::audit_verify_store(&app, args)
        }
        Command::Completion { shell } => shell::completion(shell),
        Command::Man { directory } => shell::man(&directory),
        Command::Version => shell::version(&app),
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|error| shell::no_runtime(&error))?;
            runtime.block_on(Box::pin(talk(&app, command)))
        }
    }
}

/// Commands that talk to a server, or may.
async fn talk(app: &App, command: Command) -> Result<(), CliError> {
    match command {
        Command::Key(command) => key_run::run(app, command).await,
        Command::Work(command) => crypto_run::run(app, command).await,
        Command::Client(command) => client::run(app, command).await,
        Command::Role(command) => policy::role(app, command).await,
        Command::Cert(command) => client::cert(app, command).await,
        Command::Login => access::login(app).await,
        Command::Whoami => access::whoami(app).await,
        Command::Token(command) => access::token(app, command).await,
        Command::Root(command) => root::root(app, command).await,
        Command::Policy(command) => policy::run(app, command).await,
        Command::Audit(command) => audit::run(app, command).await,
        Command::Store(command) => node::store(app, command).await,
        Command::Backup(backup::BackupCommand::Create(args)) => backup::create(app, args).await,
        Command::Jobs(args) => node::jobs(app, args).await,
        Command::Health(args) => health::run(app, args).await,
        Command::Status => status::status(app).await,
        Command::Top(args) => status::top(app, args).await,
        Command::Reload => status::reload(app).await,
        // Done by `run` without a runtime.
        Command::Dev(_)
        | Command::Init(_)
        | Command::Serve(_)
        | Command::Check(_)
        | Command::Doctor(_)
        | Command::Recover(_)
        | Command::Restore(_)
        | Command::Promote(_)
        | Command::Backup(backup::BackupCommand::Verify(_))
        | Command::Lock(_)
        | Command::Unlock(_)
        | Command::Hsm(_)
        | Command::Completion { .. }
        | Command::Man { .. }
        | Command::Version => Ok(()),
    }
}
