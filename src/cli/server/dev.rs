//! `polykey dev`: a node for a laptop that keeps everything in one directory.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;

use super::super::error::CliError;
use super::super::output::write_out;
use super::run::{Signals, announce, door, prepare_process, until_signalled};
use super::{accept_rollback, accepted, runtime};
use crate::app::{Admin, App, AppError, Bootstrapped, Running, bootstrap};
use crate::hardening;
use crate::pki;
use crate::setup::dev::{ADMIN, Prepared, prepare, write_profile};
use crate::setup::every_step;
use crate::time::Clock;

/// Where everything is kept unless told otherwise; the other commands look here by themselves.
const DIRECTORY: &str = "./.polykey";

/// Arguments of `dev`.
#[derive(Args, Debug)]
pub struct DevArgs {
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", default_value = DIRECTORY)]
    pub dir: PathBuf,
    /// Where to listen, this time; without it where DIR/polykey.toml says, at first 127.0.0.1:50053.
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// Where DIR/polykey.toml has an [anchor]: as for `polykey serve`.
    #[arg(long)]
    pub accept_rollback: bool,
}

/// Serves from a directory, and makes what is missing in it first.
///
/// # Errors
/// See [`AppError`]; running again goes on where this broke off.
pub fn dev(args: DevArgs) -> Result<(), CliError> {
    hardening::private_files();
    let mut prepared = prepare(&args.dir, args.listen, SystemTime::now(), &mut every_step)
        .map_err(AppError::from)?;
    accept_rollback(&mut prepared.config, args.accept_rollback)?;
    prepare_process(&prepared.config)?;
    runtime()?.block_on(Box::pin(async {
        let signals = Signals::install()?;
        let first = !prepared.directory.profile().exists();
        let door = door(&prepared.config)?;
        let running = start(&prepared).await?;
        announce(&running);
        write_out(greeting(&args.dir, running.address(), first).as_bytes())?;
        Box::pin(until_signalled(running, accepted(prepared.config.clone()), signals, door)).await
    }))
}

/// From a prepared directory to a node that serves, with its administrator and its profile.
pub(crate) async fn start(prepared: &Prepared) -> Result<Running, AppError> {
    let directory = &prepared.directory;
    let app = App::found(prepared.config.clone(), Clock::System).await?;
    let admin = Admin { id: ADMIN.into(), identities: vec![pki::client_identity(ADMIN)?] };
    if bootstrap(&app, &admin, &directory.api_key()).await? == Bootstrapped::KeyReplaced {
        tracing::warn!("the administrator's API key was missing and has been replaced");
    }
    let running = app.spawn().await?;
    write_profile(directory, running.address())?;
    Ok(running)
}

/// What to type next.
fn greeting(dir: &Path, address: SocketAddr, first: bool) -> String {
    let polykey = std::env::args_os().next().map_or_else(
        || "polykey".to_owned(),
        |program| PathBuf::from(program).display().to_string(),
    );
    let made = if first { "made just now; it is " } else { "" };
    let mut text = format!(
        "\nPolykey is listening on {address}. Everything is {made}kept in {}.\n\
         In another terminal:\n\n",
        dir.display()
    );
    if dir != Path::new(DIRECTORY) {
        let profile = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        text.push_str(&format!(
            "  export POLYKEY_PROFILE={}\n",
            quoted(&profile.join("profile.toml"))
        ));
    }
    text.push_str(&format!(
        "  {polykey} key create --type aes-256 --alias demo\n  \
         {polykey} key list\n\nCtrl-C stops it.\n\n"
    ));
    text
}

/// As a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_respects_directory_and_address() {
        let address = "127.0.0.1:7".parse().unwrap();
        let usual = greeting(Path::new(DIRECTORY), address, true);
        assert!(usual.contains("127.0.0.1:7") && !usual.contains("POLYKEY_PROFILE"), "{usual}");
        let other = greeting(Path::new("/tmp/it's"), address, false);
        assert!(other.contains(r"POLYKEY_PROFILE='/tmp/it'\''s/profile.toml'"), "{other}");
    }
}
