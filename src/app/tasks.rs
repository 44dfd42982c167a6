//! What a node does in the background.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{App, archive, event, pace, reload, replication, room};
use crate::custody::NamedWrapper;
use crate::custody::breaker::Terms;
use crate::custody::signing::{self, Purpose};
use crate::directory::Directory;
use crate::error::Error;
use crate::keyring::Keyring;
use crate::time::Time;

/// How often figures are sampled and health is told.
const TICK: Duration = Duration::from_secs(1);
/// How often the certificate files, and what figures take a read, are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// How often what has expired is swept away, and it is written down where the clock stands.
const SWEEP: Duration = Duration::from_secs(600);
/// Rows swept in one commit.
const BATCH: usize = 256;
/// Age at which the key that signs tokens is followed by another: 30 days.
pub(super) const SIGNING_KEY_AGE: Duration = Duration::from_secs(30 * 86_400);

/// Starts everything; all of it ends after `stop`.
pub(super) fn start(app: &Arc<App>, tasks: &TaskTracker, stop: &CancellationToken) {
    tasks.spawn(Arc::clone(&app.jobs).run());
    tasks.spawn(Arc::clone(&app.custody).run_reseal(pace(), stop.clone()));
    tasks.spawn(until(stop.clone(), tick(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), watch(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), replication::watch(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), room::watch(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), sweep(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), verify(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), archive::run(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), ask_backends(Arc::clone(app))));
    tasks.spawn(until(stop.clone(), measure(Arc::clone(app))));
}

async fn until(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

async fn tick(app: Arc<App>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        app.metrics.sample();
        app.keyring.forget_expired();
        app.health.refresh();
    }
}

/// Looks at what figures take a read.
async fn measure(app: Arc<App>) {
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        app.look().await;
    }
}

/// Health tells from the start whether the backends of hardened keys are there; one that could not be
/// opened then is tried again.
async fn ask_backends(app: Arc<App>) {
    app.backends.look().await;
    app.health.refresh();
    let mut tries = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
    tries.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while let Some(name) = app.backends.missing() {
        tries.tick().await;
        match Box::pin(NamedWrapper::open_one(&app.config, name)).await {
            Some(Ok(named)) => app.backends.add(name, named.wrapper, Terms::default()),
            Some(Err(error)) => {
                tracing::debug!(%error, "the wrapper of hardened keys is not open yet");
            }
            None => return,
        }
    }
}

async fn watch(app: Arc<App>) {
    let mut seen = reload::stamps(&app.config);
    let mut looks = tokio::time::interval_at(Instant::now() + LOOK, LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        app.reload_changed(&mut seen).await;
    }
}

/// Compares every row with the head once after opening; what is found stops writing, and health
/// says so.
async fn verify(app: Arc<App>) {
    let work = app.vault.verify(false, |_| {});
    match app.jobs.work().verify.track(&app.clock, work).await {
        Ok(report) if report.findings.is_empty() => {
            tracing::debug!(rows = report.rows, leaves = report.leaves, "the store is whole");
        }
        Ok(_) => {}
        Err(error) => {
            let detail = error.internal_text().unwrap_or_default();
            tracing::error!(%error, detail, "the store could not be verified");
        }
    }
    app.health.refresh();
}

async fn sweep(app: Arc<App>) {
    let mut sweeps = tokio::time::interval(SWEEP);
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        sweeps.tick().await;
        app.jobs.note_clock().await;
        app.authenticator.rates().forget();
        // A revocation that is forgotten too early would revive its token.
        if app.jobs.clock_in_doubt() {
            continue;
        }
        let now = app.clock.now();
        let work = async {
            arm_notices(&app, now).await?;
            sweep_tokens(&app.directory, now).await?;
            sweep_idempotency(&app.keyring, now).await?;
            sweep_imports(&app.keyring, now).await?;
            roll_over(&app, now).await
        };
        if let Err(error) = app.jobs.work().sweep.track(&app.clock, work).await {
            let detail = error.internal_text().unwrap_or_default();
            tracing::warn!(%error, detail, "sweeping stopped; trying again later");
        }
    }
}

/// Has a new key sign tokens when the present one is old. What the old one signed counts until it
/// has expired.
async fn roll_over(app: &App, now: Time) -> Result<(), Error> {
    let keys = signing::list(&app.vault, Purpose::Token).await?;
    let old = |key: &signing::SigningKey| now.since(key.created_at()) >= SIGNING_KEY_AGE;
    if !keys.iter().find(|key| key.signs(now)).is_none_or(old) {
        return Ok(());
    }
    let verify_for = app.config.tokens.refresh_ttl.max(app.config.tokens.access_ttl);
    let event = event("RollOverSigningKey", now);
    signing::roll_over(&app.vault, Purpose::Token, verify_for, event).await.map(drop)
}

/// Forgets families and revocations of tokens that have all expired.
pub(super) async fn sweep_tokens(directory: &Directory, now: Time) -> Result<(), Error> {
    loop {
        match directory.sweep(now, BATCH).await {
            Ok(BATCH) => tokio::task::yield_now().await,
            // Another change came first; the next sweep goes on.
            Ok(_) | Err(Error::Conflict) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Puts notices of their expiry on the schedule for what was made before there were any: once for a store.
async fn arm_notices(app: &App, now: Time) -> Result<(), Error> {
    loop {
        match app.keyring.arm_notices(now).await {
            Ok(true) => tokio::task::yield_now().await,
            Ok(false) | Err(Error::Conflict) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Forgets one-time keys for imports that have expired.
pub(super) async fn sweep_imports(keyring: &Keyring, now: Time) -> Result<(), Error> {
    loop {
        match keyring.sweep_imports(now, BATCH).await {
            Ok(true) => tokio::task::yield_now().await,
            Ok(false) | Err(Error::Conflict) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// Forgets idempotency keys older than a day.
pub(super) async fn sweep_idempotency(keyring: &Keyring, now: Time) -> Result<(), Error> {
    loop {
        match keyring.sweep_idempotency(now, BATCH).await {
            Ok(true) => tokio::task::yield_now().await,
            Ok(false) | Err(Error::Conflict) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
