//! `polykey dev|init|serve|check` and what else needs the store itself.

use super::error::{CliError, Exit};
use super::{CheckArgs, DevArgs, InitArgs, ServeArgs};

fn absent(command: &str) -> CliError {
    CliError::new(Exit::Other, format!("this build of polykey has no `{command}`"))
}

/// Runs a server for development, and makes what it needs on first use.
///
/// # Errors
/// Where the build has no server.
pub fn dev(args: DevArgs) -> Result<(), CliError> {
    Err(absent("dev").detail(format!("directory: {}", args.dir.display())))
}

/// Makes the store and root key of a configuration.
///
/// # Errors
/// Where the build has no server.
pub fn init(args: InitArgs) -> Result<(), CliError> {
    Err(absent("init").detail(format!("configuration: {}", args.config.display())))
}

/// Serves a configuration.
///
/// # Errors
/// Where the build has no server.
pub fn serve(args: ServeArgs) -> Result<(), CliError> {
    Err(absent("serve").detail(format!("configuration: {}", args.config.display())))
}

/// Checks a configuration, and touches nothing.
///
/// # Errors
/// Where the build has no server.
pub fn check(args: CheckArgs) -> Result<(), CliError> {
    Err(absent("check").detail(format!("configuration: {}", args.config.display())))
}

/// Verifies the audit log in a store that no server has open.
///
/// # Errors
/// Where the build has no server.
pub fn audit_verify_store(args: super::audit::VerifyArgs) -> Result<(), CliError> {
    let store = args.store.unwrap_or_default();
    Err(absent("audit verify --store").detail(format!("store: {}", store.display())))
}
