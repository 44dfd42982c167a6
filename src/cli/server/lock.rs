//! `polykey lock` and `polykey unlock`: over the local socket of a node on this machine.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use serde::Serialize;
use zeroize::Zeroizing;

use super::super::App as Cli;
use super::super::error::{CliError, Exit};
use super::super::output::{Human, View};
use crate::app::AppError;
use crate::app::door::{self, Answer, Ask, With};
use crate::config::Config;
use crate::hardening;

/// Where `polykey dev` has its socket unless told otherwise.
const DEV_SOCKET: &str = "./.polykey/polykey.sock";
/// More than any secret has, with room for what people write around it.
const MAX_BYTES: u64 = 8 * 1024;

/// Which node.
#[derive(Args, Debug)]
#[group(required = false, multiple = false)]
pub struct NodeArgs {
    /// The configuration of the node; its socket is asked.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The socket of the node; without either, that of `polykey dev` in this directory.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

impl NodeArgs {
    fn socket(&self) -> Result<PathBuf, CliError> {
        Ok(match (&self.socket, &self.config) {
            (Some(path), _) => path.clone(),
            (None, Some(file)) => Config::load(file).map_err(AppError::from)?.unlock.socket,
            (None, None) => DEV_SOCKET.into(),
        })
    }
}

/// Arguments of `lock`.
#[derive(Args, Debug)]
pub struct LockArgs {
    /// Which node.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Arguments of `unlock`.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("with").args(["passphrase", "key", "shares", "status"]))]
#[command(after_help = "\
Without --passphrase, --key or --share, the wrappers of the configuration are tried once more: after the
master key is back in its place, the token in its slot, the network up.")]
pub struct UnlockArgs {
    /// Which node.
    #[command(flatten)]
    pub node: NodeArgs,
    /// The file with the passphrase of a slot; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub passphrase: Option<PathBuf>,
    /// The file with the private half of a recovery key; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// A file with a share of it, - for standard input. The node keeps shares until there are enough, so
    /// that people may come one by one.
    #[arg(long = "share", value_name = "FILE")]
    pub shares: Vec<PathBuf>,
    /// Only tell whether the node is locked, and why.
    #[arg(long)]
    pub status: bool,
}

#[derive(Serialize)]
struct LockView {
    locked: bool,
    text: String,
}

impl View for LockView {
    fn human(&self) -> Human {
        Human::Text(format!("{}\n", self.text))
    }
}

/// Locks a node: it forgets its root key and every other key, and serves no more until it is unlocked.
///
/// # Errors
/// [`Exit::Unavailable`] if no node answers.
pub(in crate::cli) fn lock(cli: &Cli, args: &LockArgs) -> Result<(), CliError> {
    told(cli, asked(&args.node, &Ask::Lock)?)
}

/// Unlocks a node, or tells whether it is locked. Exits with 6 while it is.
///
/// # Errors
/// [`Exit::Unavailable`] if no node answers, or it is locked still.
pub(in crate::cli) fn unlock(cli: &Cli, args: &UnlockArgs) -> Result<(), CliError> {
    hardening::private_files();
    let asks: Vec<Ask> = match (&args.passphrase, &args.key) {
        _ if args.status => vec![Ask::Status],
        (Some(file), _) => {
            let mut words = read(file)?;
            // As editors and `echo` leave it.
            for end in *b"\n\r" {
                if words.last() == Some(&end) {
                    words.pop();
                }
            }
            vec![Ask::Unlock(With::Passphrase(words))]
        }
        (None, Some(file)) => vec![Ask::Unlock(With::RecoveryKey(read(file)?))],
        (None, None) if args.shares.is_empty() => vec![Ask::Unlock(With::Configured)],
        (None, None) => {
            let shares = args.shares.iter().map(|file| read(file).map(With::Share));
            shares.map(|share| share.map(Ask::Unlock)).collect::<Result<_, _>>()?
        }
    };
    let mut last = (Answer::Refused, String::new());
    for ask in &asks {
        last = asked(&args.node, ask)?;
        if last.0 != Answer::Locked {
            break;
        }
    }
    let locked = last.0 == Answer::Locked;
    told(cli, last)?;
    if locked { Err(CliError::silent(Exit::Unavailable)) } else { Ok(()) }
}

fn told(cli: &Cli, (answer, text): (Answer, String)) -> Result<(), CliError> {
    match answer {
        Answer::Refused => {
            let mut lines = text.lines();
            let first = CliError::new(Exit::Unavailable, lines.next().unwrap_or_default());
            Err(lines.fold(first, CliError::detail))
        }
        _ => cli.out.print(&LockView { locked: answer == Answer::Locked, text }),
    }
}

fn asked(node: &NodeArgs, ask: &Ask) -> Result<(Answer, String), CliError> {
    let socket = node.socket()?;
    let named = node.config.is_some() || node.socket.is_some();
    door::ask(&socket, ask, named).map_err(|error| {
        let text = format!("{}: {error}", socket.display());
        let hint = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                "No node is running there. Name its configuration with --config, or its socket with \
                 --socket."
            }
            io::ErrorKind::PermissionDenied => {
                "The socket is for the node's own user and root: use sudo, or run as that user."
            }
            _ => "The node's log may say more.",
        };
        CliError::new(Exit::Unavailable, text).hint(hint)
    })
}

fn read(file: &Path) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let failed = |error: io::Error| CliError::usage(format!("{}: {error}", file.display()));
    // Large enough from the start: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(8 * 1024 + 64));
    let input: Box<dyn Read> = match file.as_os_str() == "-" {
        true => Box::new(io::stdin().lock()),
        false => Box::new(std::fs::File::open(file).map_err(failed)?),
    };
    input.take(MAX_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.is_empty() {
        return Err(CliError::usage(format!("{}: it is empty", file.display())));
    }
    Ok(bytes)
}
