//! `polykey serve`, and what `dev` shares with it: from an opened app to the end of the process.

use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::super::error::{CliError, Exit};
use crate::app::{App, AppError, Running};
use crate::config::Config;
use crate::time::Clock;
use crate::{hardening, telemetry};

/// Arguments of `serve`.
#[derive(Args, Debug)]
#[command(after_help = "\
Signals:
  TERM, INT  take no more connections, let requests end within [listen] drain_timeout, then stop;
             the second one stops at once
  HUP        read certificates, revocation lists and policies again; what is broken keeps what was

Exit codes: 0 after a stop, 2 for a mistake in the configuration or a file it names, 5 when the address or
the store is in use, 7 when the store is damaged or the master key is not its own, 1 for any other error")]
pub struct ServeArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// Serves a configuration until a signal ends it.
///
/// # Errors
/// See [`AppError`].
pub fn serve(args: ServeArgs) -> Result<(), CliError> {
    let config = Config::load(&args.config).map_err(AppError::from)?;
    prepare_process(&config)?;
    super::runtime()?.block_on(Box::pin(async {
        let signals = Signals::install()?;
        let running = App::open(config, Clock::System).await?.spawn().await?;
        announce(&running);
        until_signalled(running, signals).await
    }))
}

/// Starts the log and hardens the process, before anything secret is read.
pub(super) fn prepare_process(config: &Config) -> Result<(), AppError> {
    telemetry::start(&config.log)?;
    for missed in hardening::apply(config.runtime.lock_memory) {
        tracing::warn!(measure = missed.measure, reason = missed.reason, "hardening incomplete");
    }
    Ok(())
}

/// Says that it listens, when everything that a client needs is there.
pub(super) fn announce(running: &Running) {
    let address = running.address();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "listening on {address}");
    if let Some(address) = running.health_address() {
        tracing::info!("the health port is {address}");
    }
}

/// The signals that steer a node. Installed before it says that it listens: whoever reads that may
/// signal at once, and must not meet the default action.
pub(super) struct Signals {
    hangup: Signal,
    term: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes the signals from their default actions.
    ///
    /// # Errors
    /// [`AppError::Process`].
    pub(super) fn install() -> Result<Self, AppError> {
        let on = |kind| signal(kind).map_err(AppError::Process);
        Ok(Self {
            hangup: on(SignalKind::hangup())?,
            term: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
        })
    }
}

/// Reloads on HUP; drains and stops on TERM or INT, and ends at once on a second one.
pub(super) async fn until_signalled(running: Running, signals: Signals) -> Result<(), CliError> {
    let Signals { mut hangup, mut term, mut interrupt } = signals;
    loop {
        tokio::select! {
            _ = hangup.recv() => {
                drop(running.app().reload().await);
            }
            () = either(&mut term, &mut interrupt) => break,
        }
    }
    tracing::info!("stopping");
    tokio::select! {
        stopped = running.stop() => {
            if stopped.durable {
                Ok(())
            } else {
                Err(CliError::new(Exit::Other, "stopped, and the last audit events may be lost")
                    .hint("The log says why; `polykey audit verify --store FILE` says what is there."))
            }
        }
        () = either(&mut term, &mut interrupt) => {
            Err(CliError::new(Exit::Other, "stopped at once, as asked a second time"))
        }
    }
}

async fn either(a: &mut Signal, b: &mut Signal) {
    tokio::select! {
        _ = a.recv() => {}
        _ = b.recv() => {}
    }
}
