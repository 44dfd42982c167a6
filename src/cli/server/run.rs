//! `polykey serve`, and what `dev` shares with it: from an opened app to the end of the process.

use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::super::error::{CliError, Exit};
use super::{accept_rollback, accepted};
use crate::app::door::{Answer, Ask, Door, Request, With};
use crate::app::locked::{Locked, StillLocked};
use crate::app::{App, AppError, Running};
use crate::config::Config;
use crate::time::Clock;
use crate::{hardening, service_manager, telemetry};

/// Arguments of `serve`.
#[derive(Args, Debug)]
#[command(after_help = "\
Signals:
  TERM, INT  take no more connections, let requests end within [listen] drain_timeout, then stop;
             the second one stops at once
  HUP        read certificates, revocation lists, policies, the log's level and [telemetry] again; what is
             broken keeps what was

Exit codes: 0 after a stop, 2 for a mistake in the configuration or a file it names, 5 when the address or
the store is in use, 6 when a device or service that it needs does not answer, 7 when the store is damaged
or the master key is not its own, 1 for any other error")]
pub struct ServeArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Serve, this once, a store for which its anchor does not vouch: one that is older than what has been
    /// served, or whose anchor is missing. It is audited, and the store is anchored as it is.
    #[arg(long)]
    pub accept_rollback: bool,
}

/// Serves a configuration until a signal ends it.
///
/// # Errors
/// See [`AppError`].
pub fn serve(args: ServeArgs) -> Result<(), CliError> {
    let mut config = Config::load(&args.config).map_err(AppError::from)?;
    accept_rollback(&mut config, args.accept_rollback)?;
    prepare_process(&config)?;
    super::runtime()?.block_on(Box::pin(async {
        let mut signals = Signals::install()?;
        let door = door(&config)?;
        let opened = tokio::select! {
            opened = App::open(config.clone(), Clock::System) => opened,
            () = either(&mut signals.term, &mut signals.interrupt) => return Ok(()),
        };
        let running = match opened {
            Ok(app) => app.spawn().await?,
            Err(error) if config.unlock.wait && error.is_locked() => {
                let Some(door) = &door else { return Err(error.into()) };
                let locked = Locked::found(config.clone(), &error);
                match until_unlocked(locked, &mut signals, door).await {
                    Some(running) => running,
                    None => return Ok(()),
                }
            }
            Err(error) => return Err(error.into()),
        };
        announce(&running);
        Box::pin(until_signalled(running, accepted(config), signals, door)).await
    }))
}

/// The local socket of a configuration. A default place that is no good is a warning only.
///
/// # Errors
/// [`AppError::Door`].
pub(super) fn door(config: &Config) -> Result<Option<Door>, AppError> {
    let socket = &config.unlock.socket;
    match Door::bind(socket) {
        Ok(door) => Ok(Some(door)),
        Err(source) => {
            let asked = config.unlock.wait || config.written.contains_key("unlock.socket");
            if asked {
                return Err(AppError::Door { path: socket.clone(), source });
            }
            let path = socket.display().to_string();
            tracing::warn!(path, error = %source, "no local socket: `polykey lock` cannot reach this node");
            Ok(None)
        }
    }
}

/// Starts the log and hardens the process, before anything secret is read.
pub(super) fn prepare_process(config: &Config) -> Result<(), AppError> {
    telemetry::start(&config.log)?;
    service_manager::take_socket().map_err(AppError::Process)?;
    for missed in hardening::apply(config) {
        tracing::warn!(measure = missed.measure, reason = missed.reason, "hardening incomplete");
    }
    Ok(())
}

/// Says that it listens, when everything that a client needs is there.
pub(super) fn announce(running: &Running) {
    if let Some(address) = running.health_address() {
        tracing::info!("the health port is {address}");
    }
    if let Some(address) = running.metrics_address() {
        tracing::info!("the metrics port is {address}");
    }
    let address = running.address();
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "listening on {address}");
    service_manager::ready(&format!("listening on {address}"));
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
        service_manager::keep_telling();
        let on = |kind| signal(kind).map_err(AppError::Process);
        Ok(Self {
            hangup: on(SignalKind::hangup())?,
            term: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
        })
    }
}

/// How long a node that waits for a device or service leaves it before it tries again.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(10);

/// Why a node serves no more.
enum End {
    Stop,
    Lock(Request),
}

/// Reloads on HUP, locks and unlocks as the local socket says; drains and stops on TERM or INT, and
/// ends at once on a second one.
pub(super) async fn until_signalled(
    mut running: Running,
    config: Config,
    mut signals: Signals,
    door: Option<Door>,
) -> Result<(), CliError> {
    loop {
        match until_ended(&running, &mut signals, door.as_ref()).await {
            End::Stop => return stop(running, &mut signals).await,
            End::Lock(request) => {
                tracing::warn!(uid = request.uid, "locking");
                if let Err(error) = running.lock(request.uid).await {
                    let text = "the process ends, because something still holds the keys";
                    request.answer(Answer::Refused, text).await;
                    return Err(CliError::new(Exit::Other, text).detail(error.to_string()));
                }
                request.answer(Answer::Locked, "locked").await;
                let Some(door) = &door else { return Ok(()) };
                let locked = Locked::new(config.clone(), "as asked by `polykey lock`");
                match until_unlocked(locked, &mut signals, door).await {
                    Some(unlocked) => running = unlocked,
                    None => return Ok(()),
                }
                announce(&running);
            }
        }
    }
}

async fn until_ended(running: &Running, signals: &mut Signals, door: Option<&Door>) -> End {
    let Signals { hangup, term, interrupt } = signals;
    loop {
        let asked = async {
            match door {
                Some(door) => door.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = hangup.recv() => {
                // Not here: what it reads may not answer for long.
                let (app, address) = (std::sync::Arc::clone(running.app()), running.address());
                drop(tokio::spawn(async move {
                    service_manager::reloading();
                    drop(app.reload().await);
                    service_manager::ready(&format!("listening on {address}"));
                }));
            }
            () = either(term, interrupt) => return End::Stop,
            request = asked => match request.ask {
                Ask::Lock => return End::Lock(request),
                Ask::Status | Ask::Unlock(_) => {
                    let text = format!("not locked: it serves on {}", running.address());
                    request.answer(Answer::Serving, &text).await;
                }
            },
        }
    }
}

/// Waits on the local socket until somebody unlocks the node; `None` if it is to end.
async fn until_unlocked(mut locked: Locked, signals: &mut Signals, door: &Door) -> Option<Running> {
    let socket = door.path().display().to_string();
    tracing::warn!(socket, why = locked.status(), "locked: waiting for `polykey unlock`");
    service_manager::ready("locked: waiting for `polykey unlock`");
    let _refusing = service_manager::turn_away();
    let Signals { hangup, term, interrupt } = signals;
    loop {
        let mut request = tokio::select! {
            _ = hangup.recv() => continue,
            () = either(term, interrupt) => return None,
            () = tokio::time::sleep(AGAIN), if locked.waits() => {
                let us = rustix::process::geteuid().as_raw();
                let opened = tokio::select! {
                    opened = locked.unlock(With::Configured, us) => opened,
                    () = either(term, interrupt) => return None,
                };
                if let Ok(running) = opened {
                    return Some(running);
                }
                continue;
            }
            request = door.next() => request,
        };
        match std::mem::replace(&mut request.ask, Ask::Status) {
            Ask::Status => request.answer(Answer::Locked, &locked.status()).await,
            Ask::Lock => {
                locked.forget();
                request.answer(Answer::Locked, "locked already").await;
            }
            Ask::Unlock(with) => {
                if matches!(with, With::Configured) {
                    // A person asks, who may have set the PIN right in the token.
                    polykey_hsm::pkcs11::retry_pins();
                }
                match tokio::select! {
                    unlocked = locked.unlock(with, request.uid) => unlocked,
                    () = either(term, interrupt) => return None,
                } {
                    Ok(running) => {
                        let text = format!("unlocked: it serves on {}", running.address());
                        request.answer(Answer::Serving, &text).await;
                        return Some(running);
                    }
                    Err(StillLocked::More(text)) => request.answer(Answer::Locked, &text).await,
                    Err(StillLocked::No(text)) => {
                        tracing::warn!(uid = request.uid, why = text, "not unlocked");
                        request.answer(Answer::Refused, &format!("locked still: {text}")).await;
                    }
                }
            }
        }
    }
}

async fn stop(running: Running, signals: &mut Signals) -> Result<(), CliError> {
    let longest = running.app().config.listen.net.drain_timeout.as_secs();
    tracing::info!(
        longest,
        "stopping: what is in flight may end within so many seconds; a second signal stops at once"
    );
    service_manager::stopping();
    tokio::select! {
        stopped = running.stop() => {
            if stopped.durable {
                Ok(())
            } else {
                Err(CliError::new(Exit::Other, "stopped, and the last audit events may be lost")
                    .hint("The log says why; `polykey audit verify --store FILE` says what is there."))
            }
        }
        () = either(&mut signals.term, &mut signals.interrupt) => {
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
