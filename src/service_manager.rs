//! The service manager, where there is one: told when the node serves, reloads and stops, kept from
//! thinking that it hangs, and asked for a socket that it holds (sd_notify(3), sd_listen_fds(3)).

use std::io;
use std::net::TcpListener;
use std::sync::OnceLock;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::NotifyState;

static SOCKET: OnceLock<Option<TcpListener>> = OnceLock::new();

/// Takes the listening socket that was handed over, if one was. To be called before the first thread starts:
/// it changes the environment.
///
/// # Errors
/// If something else was handed over, or more than one socket.
pub fn take_socket() -> io::Result<()> {
    let mut handed = ListenFd::from_env();
    let refused = |text| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    let socket = match handed.len() {
        0 => None,
        1 => match handed.take_tcp_listener(0) {
            Ok(socket) => socket,
            Err(_) => return refused("the service manager passed something that is no TCP socket"),
        },
        _ => return refused("the service manager passed more than one socket; pass one"),
    };
    SOCKET.set(socket).ok();
    Ok(())
}

/// Another handle on the socket that was handed over.
///
/// # Errors
/// If the process has no file descriptors left.
pub fn socket() -> io::Result<Option<TcpListener>> {
    SOCKET.get().and_then(Option::as_ref).map(TcpListener::try_clone).transpose()
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

/// The node serves, or waits for somebody to unlock it.
pub fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// It reads its files again; [`ready`] follows.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

/// It has begun to stop.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Tells the watchdog, where there is one, that the node's runtime does its work: while it serves, waits to
/// be unlocked, and drains.
pub fn keep_telling() {
    let Some(within) = sd_notify::watchdog_enabled() else { return };
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(within / 2);
        loop {
            ticks.tick().await;
            tell(&[NotifyState::Watchdog]);
        }
    });
}

/// Ends its task when it is dropped.
pub struct TurningAway(Option<tokio::task::JoinHandle<()>>);

impl Drop for TurningAway {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Closes what connects to the socket that was handed over, for as long as this is kept: it listens even
/// while the node is locked.
#[must_use]
pub fn turn_away() -> TurningAway {
    let listener = socket().ok().flatten().and_then(|socket| {
        socket.set_nonblocking(true).ok()?;
        tokio::net::TcpListener::from_std(socket).ok()
    });
    TurningAway(listener.map(|listener| {
        tokio::spawn(async move {
            loop {
                if listener.accept().await.is_err() {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        })
    }))
}
