//! A node whose store is shipped to a database: how that begins, what health says of it, and what goes
//! into the audit trail.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polykey_proto::polykey::record::v1::AuditEvent;
#[cfg(feature = "postgres")]
use polykey_storage::postgres::{Options, Postgres};
use polykey_storage::replica::{self, Promotion, SPACE};
use polykey_storage::replicated::{Link, Mode, NotReady, Notice, Replicated, Shipping, WhenAway};
use polykey_storage::{RowKey, Store, replicated};

use super::{App, AppError, event};
use crate::anchor;
use crate::config::Config;
use crate::error::Error;
use crate::health::{Check, State};
use crate::time::Time;
use crate::vault::space::{self, meta};
use crate::vault::{Confirms, Vault};

/// Time for the last changes to be shipped when the node stops.
const LAST_SHIPMENT: Duration = Duration::from_secs(3);
/// How often notices are looked for.
const LOOK: Duration = Duration::from_millis(500);
/// The row of [`SPACE`] that says that a promotion stands in the audit log.
const AUDITED: &[u8] = b"promotion-audited";

/// Why a node does not start with its replication.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationFailure {
    /// The target is away, and nothing may be committed without it.
    #[error("[replication] target {target}: {why}")]
    Away {
        /// The database.
        target: String,
        /// Why.
        why: String,
    },
    /// The target is none for this store.
    #[error("[replication] target {target}: {why}")]
    Refused {
        /// The database.
        target: String,
        /// Why.
        why: String,
    },
    /// The target was promoted.
    #[error("{0}")]
    Fenced(replicated::Fenced),
}

/// The rows that a fenced node writes so that those who only use keys can go on: logins, the log of what
/// is done, and how often.
fn goes_on(row: &RowKey) -> bool {
    let spaces = [space::TOKEN_FAMILIES, space::USAGE, space::CHECKPOINTS, space::AUDIT];
    let rows = [meta::HEAD, meta::USAGE_MARK, meta::CLOCK];
    spaces.contains(&row.space) || (row.space == space::META && rows.contains(&row.key.as_slice()))
}

/// The store, shipped from now on if the configuration says so. Waits until changes can be taken.
///
/// # Errors
/// [`ReplicationFailure`].
pub(super) async fn start(
    config: &Config,
    store: Arc<dyn Store>,
) -> Result<(Arc<dyn Store>, Option<Arc<Replicated>>), AppError> {
    let path = || config.storage.path.clone();
    let failed = |error| AppError::Store(polykey_storage::OpenError::Store { path: path(), error });
    let Some(settings) = &config.replication else {
        return match replicated::fenced(store.as_ref()).map_err(failed)? {
            Some(fenced) => Err(ReplicationFailure::Fenced(fenced).into()),
            None => Ok((store, None)),
        };
    };
    let target = format!("{} (schema {})", place(&settings.target), settings.schema);
    let mode = match settings.mode {
        crate::config::replication::Mode::Async => Mode::Async,
        crate::config::replication::Mode::SyncOrRefuse => Mode::Sync(WhenAway::Refuse),
        crate::config::replication::Mode::SyncOrDegrade => Mode::Sync(WhenAway::Degrade),
    };
    let options = replicated::Options {
        target: target.clone(),
        mode,
        timeout: settings.timeout,
        probe: Duration::from_secs(1),
        goes_on: settings.reads_when_fenced.then_some(goes_on as fn(&RowKey) -> bool),
    };
    let opener = Box::pin(opener(config, settings)).await?;
    let started = Replicated::start(store, options, opener);
    let replicated = Arc::new(started.map_err(|error| failed_to_start(error, &target, path()))?);
    let waiting = Arc::clone(&replicated);
    let ready = tokio::task::spawn_blocking(move || waiting.ready()).await;
    let ready = ready.map_err(|error| AppError::Process(std::io::Error::other(error)))?;
    ready.map_err(|error| failed_to_start(error, &target, path()))?;
    tracing::info!(target, mode = ?settings.mode, "replication has begun");
    Ok((Arc::clone(&replicated) as Arc<dyn Store>, Some(replicated)))
}

fn failed_to_start(error: NotReady, target: &str, store: PathBuf) -> AppError {
    let target = target.to_owned();
    match error {
        NotReady::Away(why) => ReplicationFailure::Away { target, why }.into(),
        NotReady::Refused(why) => ReplicationFailure::Refused { target, why }.into(),
        NotReady::Fenced(fenced) => ReplicationFailure::Fenced(fenced).into(),
        NotReady::Store(error) => {
            AppError::Store(polykey_storage::OpenError::Store { path: store, error })
        }
    }
}

/// A connection string as messages and the audit log have it: without its parameters.
fn place(url: &str) -> &str {
    url.split_once('?').map_or(url, |(place, _)| place)
}

/// The database that the store is shipped to, as a place for notes.
///
/// # Errors
/// See [`AppError`]; not that it is away, which is found out when it is asked.
pub(super) async fn notes(config: &Config) -> Result<anchor::Target, AppError> {
    let Some(settings) = &config.replication else {
        // The configuration was refused before.
        let error = std::io::Error::other("[anchor] replication needs a [replication]");
        return Err(AppError::Process(error));
    };
    let name = format!("{} (schema {})", place(&settings.target), settings.schema);
    Ok(anchor::Target::new(name, Box::pin(notes_opener(config, settings)).await?))
}

#[cfg(feature = "postgres")]
async fn notes_opener(
    config: &Config,
    settings: &crate::config::Replication,
) -> Result<anchor::Open, AppError> {
    let options = options(config, settings).await?;
    Ok(Box::new(move || Ok(Box::new(Postgres::open(options.clone())?))))
}

#[cfg(not(feature = "postgres"))]
async fn notes_opener(
    config: &Config,
    _: &crate::config::Replication,
) -> Result<anchor::Open, AppError> {
    Err(without_postgres(config))
}

#[cfg(feature = "postgres")]
async fn opener(
    config: &Config,
    settings: &crate::config::Replication,
) -> Result<replicated::Opener, AppError> {
    let options = options(config, settings).await?;
    Ok(Box::new(move |epoch| {
        let opened = Postgres::open(Options { epoch, ..options.clone() })?;
        let epoch = opened.epoch();
        Ok(replicated::Opened { store: Arc::new(opened), epoch })
    }))
}

#[cfg(feature = "postgres")]
async fn options(
    config: &Config,
    settings: &crate::config::Replication,
) -> Result<Options, AppError> {
    let mut options = Options::new(settings.target.clone());
    settings.schema.clone_into(&mut options.schema);
    options.connections = 2;
    options.transaction_pooler = settings.transaction_pooler;
    options.durable = settings.durable;
    if let Some(source) = &settings.password {
        options.password =
            Some(super::secrets::password(config, source, "[replication] password").await?);
    }
    Ok(options)
}

#[cfg(not(feature = "postgres"))]
async fn opener(
    config: &Config,
    _: &crate::config::Replication,
) -> Result<replicated::Opener, AppError> {
    Err(without_postgres(config))
}

/// The configuration was refused before.
#[cfg(not(feature = "postgres"))]
fn without_postgres(config: &Config) -> AppError {
    let path = config.file.clone();
    let error =
        polykey_storage::StoreError::Other("this build lacks the cargo feature `postgres`".into());
    AppError::Store(polykey_storage::OpenError::Store { path, error })
}

/// What health says of it. `max_lag`: from when on being behind counts.
pub(super) fn check(replicated: &Arc<Replicated>, max_lag: Duration) -> Check {
    let replicated = Arc::clone(replicated);
    Box::new(move || state(&replicated.shipping(), max_lag))
}

fn state(shipping: &Shipping, max_lag: Duration) -> State {
    match (&shipping.link, shipping.mode) {
        (Link::Fenced(_), _) if !shipping.reads_on => State::NotServing(
            "this node is fenced: its replication target was promoted and is the writer now",
        ),
        (Link::Fenced(fenced), _) => State::Degraded(fenced.to_string().into()),
        (_, Mode::Sync(WhenAway::Refuse)) if !shipping.synced => State::NotServing(
            "the replication target does not confirm, and no change is taken without it",
        ),
        (_, Mode::Sync(WhenAway::Degrade)) if !shipping.synced => State::Degraded(
            "changes are acknowledged without the replication target: `polykey store status` says \
             since when and why"
                .into(),
        ),
        (Link::Refused(why), _) => {
            State::Degraded(format!("the replication target is none for this store: {why}").into())
        }
        _ if shipping.behind.max(shipping.away) > max_lag => State::Degraded(
            "the replication target is too far behind: `polykey store status` says how far and why"
                .into(),
        ),
        _ => State::Serving,
    }
}

/// Brings what happens to replication into log and audit trail.
pub(super) async fn watch(app: Arc<App>) {
    let Some(replicated) = app.replication.clone() else { return };
    let mut looks = tokio::time::interval(LOOK);
    let mut told = replicated.shipping().link;
    let mut waiting: Vec<AuditEvent> = Vec::new();
    loop {
        looks.tick().await;
        let link = replicated.shipping().link;
        if link != told {
            match &link {
                Link::Away(why) if matches!(told, Link::Away(_)) => {
                    tracing::debug!(why, "the replication target is still away");
                }
                Link::Away(why) => tracing::warn!(why, "the replication target is away"),
                Link::Refused(why) => tracing::error!(why, "the replication target is refused"),
                Link::Fenced(fenced) => tracing::error!("{fenced}"),
                Link::Connecting | Link::Copying => {}
                Link::Following => tracing::info!("the replication target follows"),
            }
            told = link;
            app.health.refresh();
        }
        waiting.extend(replicated.notices().into_iter().map(|n| noted(n, app.clock.now())));
        if !waiting.is_empty() && app.vault.record(&waiting).await.is_ok() {
            waiting.clear();
        }
    }
}

fn noted(notice: Notice, now: Time) -> AuditEvent {
    let (action, details) = match notice {
        Notice::Degraded { after, reason } => {
            tracing::warn!(reason, "changes are acknowledged without the replication target");
            ("ReplicationDegraded", vec![("after", after.to_string()), ("reason", reason)])
        }
        Notice::Restored { at } => {
            tracing::info!(revision = at.0, "changes wait for the replication target again");
            ("ReplicationRestored", vec![("revision", at.to_string())])
        }
        Notice::Fenced(fenced) => {
            let details = vec![
                ("epoch", fenced.own.to_string()),
                ("fenced_by", fenced.current.to_string()),
                ("shipped_revision", fenced.shipped.to_string()),
                ("revisions_here_alone", fenced.diverged().to_string()),
            ];
            ("ReplicationFenced", details)
        }
    };
    let mut event = event(action, now);
    event.details.extend(details.into_iter().map(|(name, text)| (name.to_owned(), text)));
    event
}

/// Waits a little until the target has everything, when the node stops.
pub(super) async fn settle(replicated: Option<&Arc<Replicated>>) {
    if let Some(replicated) = replicated.cloned() {
        let settled = tokio::task::spawn_blocking(move || replicated.settle(LAST_SHIPMENT));
        drop(settled.await);
    }
}

/// Waits for the target with what a request finds made already.
pub(super) fn confirms(replicated: &Arc<Replicated>) -> Confirms {
    let replicated = Arc::clone(replicated);
    Box::new(move |revision| {
        let replicated = Arc::clone(&replicated);
        Box::pin(async move {
            let waited = tokio::task::spawn_blocking(move || replicated.confirmed(revision)).await;
            match waited {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(Error::OutcomeUnknown { internal: error.to_string() }),
                Err(error) => Err(Error::internal(error.to_string())),
            }
        })
    })
}

/// Brings the promotion of a store into its audit log, once.
///
/// # Errors
/// [`Error`]; the promotion stands all the same.
pub(super) async fn audit_promotion(vault: &Vault) -> Result<Option<Promotion>, Error> {
    let found = replica::promotion(vault.store().as_ref()).await;
    let found = found.map_err(|error| Error::unavailable(error.to_string()))?;
    let Some(promoted) = found else { return Ok(None) };
    if vault.get_clear(SPACE, AUDITED).await?.is_some() {
        return Ok(Some(promoted));
    }
    let mut event = event("Promote", vault.clock().now());
    let details = [
        ("source", data_encoding::HEXLOWER.encode(&promoted.source)),
        ("revision", promoted.revision.to_string()),
        ("fenced_epoch", promoted.fenced.to_string()),
    ];
    event.details.extend(details.map(|(name, text)| (name.to_owned(), text)));
    let mut tx = vault.begin().await?;
    tx.insert_clear(SPACE, AUDITED.to_vec(), Vec::new());
    tx.event(event);
    match tx.commit().await {
        // Another node was faster.
        Ok(_) | Err(Error::Conflict) => Ok(Some(promoted)),
        Err(error) => Err(error),
    }
}

/// Opens a promoted store with what the configuration names, and brings the promotion into its audit log.
///
/// # Errors
/// See [`AppError`]; the promotion stands all the same.
pub async fn record_promotion(
    config: &Config,
    store: Arc<dyn Store>,
    clock: crate::time::Clock,
) -> Result<(), AppError> {
    let (named, unusable) = super::wrappers(config, Vec::new()).await?;
    let nobody = Arc::new(Vec::<Arc<dyn crate::vault::Invalidate>>::new());
    let custody = super::unlock(store, (&named, unusable), nobody, clock).await?;
    audit_promotion(custody.vault()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use polykey_storage::Revision;

    use super::*;

    #[test]
    fn health_tells_what_each_policy_makes_of_a_target_that_is_away() {
        let away = Link::Away("gone".into());
        let with = |mode, link: &Link, synced, behind| {
            let shipping = Shipping {
                target: "t".into(),
                mode,
                link: link.clone(),
                synced,
                reads_on: false,
                revision: Revision(9),
                shipped: Revision(4),
                behind: Duration::from_secs(behind),
                away: Duration::ZERO,
            };
            state(&shipping, Duration::from_secs(60))
        };
        let refuse = Mode::Sync(WhenAway::Refuse);
        let degrade = Mode::Sync(WhenAway::Degrade);
        assert!(!with(refuse, &away, false, 1).serves());
        assert!(matches!(with(degrade, &away, false, 1), State::Degraded(_)));
        assert_eq!(with(degrade, &Link::Following, true, 0), State::Serving);
        assert_eq!(with(Mode::Async, &away, false, 59), State::Serving);
        assert!(matches!(with(Mode::Async, &away, false, 61), State::Degraded(_)));
        assert!(matches!(
            with(Mode::Async, &Link::Refused("x".into()), false, 0),
            State::Degraded(_)
        ));
    }

    #[test]
    fn a_fenced_node_writes_no_key_no_client_and_no_policy() {
        for space in [space::KEYS, space::VERSIONS, space::CLIENTS, space::ROLES, space::JOBS] {
            assert!(!goes_on(&RowKey::new(space, *b"x")));
        }
        assert!(!goes_on(&RowKey::new(space::META, meta::SLOTS)));
        assert!(goes_on(&RowKey::new(space::TOKEN_FAMILIES, *b"x")));
    }
}
