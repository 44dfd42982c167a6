//! A node: from a configuration to something that serves, and back to rest.
//!
//! ```text
//! Config ─ open ─▶ App ─ spawn ─▶ Running ─ stop ─▶ Stopped
//!          files, store, root,     tasks, then the     drain, audit, checkpoint,
//!          canary, policies        listener            and the store is closed
//! ```
//! Nothing binds a port before the store's canary has opened under the root key.

mod anchor;
mod archive;
mod bootstrap;
mod check;
pub mod doctor;
pub mod door;
mod draw;
#[cfg(feature = "postgres")]
mod epoch;
mod error;
mod figures;
pub mod locked;
mod measured;
mod recover;
mod reload;
mod replication;
mod report;
mod restore;
mod room;
mod secrets;
pub mod store;
mod tasks;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use polykey_hsm::{BoxFuture, SlotKind};
use polykey_proto::grpc::health::v1::health_server::HealthServer;
use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::job_record::Kind;
use polykey_storage::replicated::Replicated;
use polykey_storage::{Revision, RowKey, Store};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::anchor::Keeper;
use crate::audit::{self, MlDsaKey, Sinks, Trail};
use crate::authn::limiter::Allowance;
use crate::authn::session::{Authenticator, Settings};
use crate::authz::Authorizer;
use crate::config::Config;
use crate::custody::signing::{self, MlDsaSigner, Purpose, SigningKey};
use crate::custody::{
    self, Backends, Custody, InitError, MASTER_KEY, NamedWrapper, Pace, Tokens, Unusable,
};
use crate::directory::{Directory, SecurityCaches};
use crate::error::Error;
use crate::health::grpc::HealthService;
use crate::health::{Health, State, plain};
use crate::jobs::{Alarm, Handler, Runner};
use crate::keyring::{Forge, KeyCaches, Keyring};
use crate::metrics::calls::Calls;
use crate::metrics::{RequestMetrics, port};
use crate::net::tls::{self, TlsState};
use crate::net::{self, Connections, DrainReport, Listener, NetMetrics, Served};
use crate::nodes::Nodes;
use crate::pki::Authority;
use crate::rpc;
use crate::service_manager;
use crate::telemetry::otlp::Telemetry;
use crate::telemetry::otlp::encode::Source;
use crate::time::{Clock, Time};
use crate::vault::{Freshness, Invalidate, Room, Vault, Witness};
use crate::webhook::Webhooks;
use archive::Archiver;

pub use bootstrap::{Admin, Bootstrapped, bootstrap};
pub use check::{Finding, check};
pub use draw::Database;
pub use error::{AppError, Fault};
pub use recover::{Recovered, RecoveryFailure, recover};
pub use reload::Reloaded;
pub use replication::{ReplicationFailure, record_promotion};
pub use restore::{BackupView, Origin, Recovery, RestoreFailure, restore, verify_backup};
pub use secrets::Missing;

/// Longest time that a call which is not a stream may take.
const LONGEST_CALL: Duration = Duration::from_secs(60);
/// Time for the audit trail to become durable at the end, beside the drain.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Time for the end of the log to reach the sinks; what is left follows after the next start.
const LAST_COPIES: Duration = Duration::from_secs(2);
/// The label of the slot that `init` makes.
pub const FIRST_SLOT: &str = "main";

/// An event of the node's own doing.
#[must_use]
pub fn event(action: &str, now: Time) -> AuditEvent {
    let mut event = AuditEvent {
        time: now.micros(),
        client_id: "polykey".into(),
        action: action.into(),
        ..AuditEvent::default()
    };
    event.set_outcome(Outcome::Success);
    event
}

/// Everybody who remembers rows.
struct Rememberers(Vec<Arc<dyn Invalidate>>);

impl Invalidate for Rememberers {
    fn invalidate(&self, rows: &[&RowKey]) {
        self.0.iter().for_each(|each| each.invalidate(rows));
    }
    fn clear(&self) {
        self.0.iter().for_each(|each| each.clear());
    }
}

/// Refusals of identity go into the trail.
struct Refusals(Arc<Trail>);

impl crate::authn::Audit for Refusals {
    fn denied(&self, event: AuditEvent) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.0.denied(event))
    }
}

struct CheckpointSigner(SigningKey, Option<MlDsaSigner>);

impl audit::Signer for CheckpointSigner {
    fn public_key(&self) -> [u8; 32] {
        *self.0.public()
    }
    fn sign(&self, message: &[u8]) -> Result<[u8; 64], Error> {
        self.0.sign(message)
    }
    fn ml_dsa_key(&self) -> Option<MlDsaKey> {
        self.1.as_ref().and_then(|key| MlDsaKey::new(key.public()))
    }
    fn sign_ml_dsa(&self, message: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.1.as_ref().map(|key| key.sign(message)).transpose()
    }
}

/// The nodes of a store that several may share. From here on nothing is served that others may have
/// revoked.
fn nodes(
    config: &Config,
    custody: &Arc<Custody>,
    wrappers: &[NamedWrapper],
    caches: Arc<dyn Invalidate>,
) -> Option<Arc<Nodes>> {
    let database = config.storage.database.as_ref()?;
    let freshness = Arc::new(Freshness::new(database.freshness, database.strict));
    let named = database.name.clone();
    let machine = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let wrappers = wrappers.iter().map(|named| Arc::clone(&named.wrapper)).collect();
    let who = (named.unwrap_or_else(machine), database.when_fenced);
    let nodes = Nodes::new(custody, wrappers, caches, who, Arc::clone(&freshness))?;
    custody.vault().set_freshness(freshness);
    Some(nodes)
}

/// Everything of a node that is open, without tasks and without a listener.
pub struct App {
    /// What it was told.
    pub config: Arc<Config>,
    /// The clock it goes by.
    pub clock: Clock,
    /// Root key, slots, signing keys.
    pub custody: Arc<Custody>,
    /// The sealed store.
    pub vault: Arc<Vault>,
    /// Whoever keeps its anchor, if it has one.
    pub anchor: Option<Arc<Keeper>>,
    /// Clients and roles.
    pub directory: Arc<Directory>,
    /// Who callers are.
    pub authenticator: Arc<Authenticator>,
    /// The policies in force.
    pub authorizer: Arc<ArcSwap<Authorizer>>,
    /// The audit trail.
    pub trail: Arc<Trail>,
    /// Copies of the log.
    pub sinks: Arc<Sinks>,
    /// What brings its old leaves into archives.
    archiver: Arc<Archiver>,
    /// Whom it tells what became of keys.
    pub webhooks: Arc<Webhooks>,
    /// The keys.
    pub keyring: Arc<Keyring>,
    /// What hardened keys lie under.
    pub backends: Arc<Backends>,
    /// The other nodes of a store that several share.
    pub nodes: Option<Arc<Nodes>>,
    /// The schedule.
    pub jobs: Arc<Runner>,
    /// Certificates.
    pub tls: Arc<TlsState>,
    /// The authority of `cert issue`, where there is one.
    pub authority: Option<Arc<Authority>>,
    /// What may open the root key.
    pub wrappers: Vec<NamedWrapper>,
    /// Figures of requests.
    pub metrics: Arc<RequestMetrics>,
    /// Requests by method and code.
    pub calls: Arc<Calls>,
    /// Where telemetry goes.
    pub telemetry: Arc<Telemetry>,
    /// Figures that take a read.
    pub slow: figures::Slow,
    /// Figures of the network, once there is one.
    pub network: Arc<std::sync::OnceLock<Arc<NetMetrics>>>,
    /// The open connections, once there are any.
    pub connections: Arc<std::sync::OnceLock<Arc<Connections>>>,
    /// The way to the replication target, where there is one.
    pub replication: Option<Arc<Replicated>>,
    /// Whether it serves.
    pub health: Arc<Health>,
    /// When it was opened.
    pub started_at: Time,
    stopping: Arc<AtomicBool>,
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("health", &self.health).finish_non_exhaustive()
    }
}

/// The wrappers that the configuration names and those that an operator gave, where at least one can
/// be used.
async fn wrappers(
    config: &Config,
    given: Vec<NamedWrapper>,
) -> Result<(Vec<NamedWrapper>, Vec<Unusable>), AppError> {
    let (mut opened, mut unusable) = NamedWrapper::open_all(config).await;
    opened.extend(given);
    match (opened.is_empty(), unusable.pop()) {
        (true, Some(only)) if unusable.is_empty() => Err(AppError::MasterKey(only.error)),
        (true, Some(last)) => {
            unusable.push(last);
            Err(AppError::NoWrapper(unusable))
        }
        (_, last) => {
            unusable.extend(last);
            Ok((opened, unusable))
        }
    }
}

/// Opens the root key by the first slot that one of these opens.
async fn unlock(
    store: Arc<dyn Store>,
    (wrappers, unusable): (&[NamedWrapper], Vec<Unusable>),
    caches: Arc<dyn Invalidate>,
    clock: Clock,
) -> Result<Arc<Custody>, AppError> {
    let by: Vec<_> = wrappers.iter().map(|named| Arc::clone(&named.wrapper)).collect();
    let shared = store.peers().is_some();
    let mut left = if shared { 5 } else { 1 };
    let opened = loop {
        left -= 1;
        let opened = Custody::open(Arc::clone(&store), &by, Arc::clone(&caches), clock.clone());
        match opened.await {
            // Rows that another node was changing do not fit together.
            Err(custody::OpenError::Damaged(_) | custody::OpenError::Replayed { .. })
                if left > 0 =>
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            opened => break opened,
        }
    };
    match opened {
        Ok(custody) => {
            for unusable in unusable {
                tracing::warn!(%unusable, "a wrapper cannot be used; another one opened the root key");
            }
            Ok(custody)
        }
        Err(custody::OpenError::NoSlotOpened(trials)) if !unusable.is_empty() => {
            Err(AppError::Locked { trials, unusable })
        }
        Err(error) => Err(error.into()),
    }
}

fn missing_master_key(unusable: Vec<Unusable>) -> AppError {
    let master_key = unusable.into_iter().find(|unusable| unusable.name == MASTER_KEY);
    master_key.map_or(AppError::NoWrapper(Vec::new()), |only| AppError::MasterKey(only.error))
}

fn settings(config: &Config) -> Settings {
    let login = &config.login;
    Settings {
        access: config.tokens.access_ttl,
        refresh: config.tokens.refresh_ttl,
        remembered: config.limits.directory_cache,
        common_name: config.listen.allow_common_name,
        login_per_address: Allowance {
            burst: login.address_burst,
            interval: login.address_interval,
        },
        login_per_client: Allowance { burst: login.client_burst, interval: login.client_interval },
        ..Settings::default()
    }
}

impl App {
    /// Opens everything a node needs, in the order of what is cheap to find wrong.
    ///
    /// # Errors
    /// See [`AppError`]; the store is untouched unless signing keys or a first trail had to be made.
    pub async fn open(config: Config, clock: Clock) -> Result<Self, AppError> {
        Self::assemble(config, clock, false, Vec::new()).await
    }

    /// As [`Self::open`], by what an operator gave alone, if that is anything. A recovery key is not kept.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_given(
        config: Config,
        clock: Clock,
        given: Vec<NamedWrapper>,
    ) -> Result<Self, AppError> {
        Self::assemble(config, clock, false, given).await
    }

    /// As [`Self::open`], and founds the store (file, root key, first slot) where there is none or
    /// an empty one.
    ///
    /// # Errors
    /// See [`AppError`].
    pub async fn found(config: Config, clock: Clock) -> Result<Self, AppError> {
        Self::assemble(config, clock, true, Vec::new()).await
    }

    async fn assemble(
        config: Config,
        clock: Clock,
        found: bool,
        given: Vec<NamedWrapper>,
    ) -> Result<Self, AppError> {
        let texts = Box::pin(secrets::tls(&config)).await?;
        let tls = Arc::new(TlsState::load_with(config.listen.tls.clone(), &texts)?);
        drop(texts);
        let signing_key = Box::pin(secrets::signing_key(&config)).await?;
        let authority = load_authority(&config)?;
        let policies = reload::policies(&config)?;
        let ways = Box::pin(secrets::webhooks(&config)).await?;
        for warning in policies.warnings() {
            tracing::warn!(%warning, "a policy is odd");
        }
        let authorizer = Arc::new(ArcSwap::from_pointee(policies));
        // What an operator gave opens the store or nothing does, so that the audit log is right.
        let only_given = given.clone();
        let (mut wrappers, unusable) = Box::pin(wrappers(&config, given)).await?;
        let (store, replication) = store::open(&config, found).await?;
        store::whole(&config, store.as_ref()).await?;

        let keys = Arc::new(KeyCaches::new(config.limits.key_cache));
        let security = Arc::new(SecurityCaches::new(config.limits.directory_cache));
        let alarm = Arc::new(Alarm::default());
        let rememberers: Vec<Arc<dyn Invalidate>> = vec![
            Arc::clone(&security) as Arc<dyn Invalidate>,
            Arc::clone(&keys) as Arc<dyn Invalidate>,
            Arc::clone(&alarm) as Arc<dyn Invalidate>,
        ];
        let caches: Arc<dyn Invalidate> = Arc::new(Rememberers(rememberers));
        let founding = found && store.status().revision == Revision::EMPTY;
        let custody = if founding {
            if let Err(refused) = Box::pin(anchor::founding(&config, &wrappers)).await {
                store::unmake(&config);
                return Err(refused);
            }
            // The first slot is that of the master key, whatever else could open it.
            let first = match wrappers.first().filter(|named| named.name == MASTER_KEY) {
                Some(first) => first,
                None => return Err(missing_master_key(unusable)),
            };
            let (slot, wrapper) = (first.slot(FIRST_SLOT), Arc::clone(&first.wrapper));
            let event = event("InitialiseStore", clock.now());
            let founded = Custody::init(
                Arc::clone(&store),
                wrapper,
                slot,
                event,
                Arc::clone(&caches),
                clock.clone(),
            )
            .await;
            if matches!(&founded, Err(InitError::Wrap { .. } | InitError::BadLabel)) {
                // Nothing is in it. It is ours still, and left there it would look like a store.
                store::unmake(&config);
            }
            founded?
        } else {
            let by = if only_given.is_empty() { &wrappers } else { &only_given };
            unlock(store, (by, unusable), Arc::clone(&caches), clock.clone()).await?
        };
        wrappers.retain(|named| named.wrapper.kind() != SlotKind::Recovery);
        let vault = Arc::clone(custody.vault());
        let anchor = Box::pin(anchor::admit(&config, &wrappers, &vault, &clock, founding)).await?;

        let nodes = nodes(&config, &custody, &wrappers, caches);
        let others = nodes.iter().map(|nodes| Arc::clone(nodes) as Arc<dyn Witness>);
        let anchors = anchor.iter().map(|anchor| Arc::clone(anchor) as Arc<dyn Witness>);
        vault.set_witnesses(others.chain(anchors).collect());
        if let Some(replicated) = replication.clone() {
            vault.confirm_by(replication::confirms(&replicated));
            vault.refuse_by(Box::new(move |commit| replicated.refuses(commit)));
        }
        replication::audit_promotion(&vault).await?;

        let now = clock.now();
        if let Some(seed) = signing_key {
            secrets::adopt(&vault, &config, &seed, &clock).await?;
        }
        signing::ensure(&vault, Purpose::Token, event("CreateSigningKey", now)).await?;
        let signer =
            signing::ensure(&vault, Purpose::Checkpoint, event("CreateSigningKey", now)).await?;
        let second = match config.audit.ml_dsa {
            true => Some(signing::ensure_ml_dsa(&vault, event("CreateSigningKey", now)).await?),
            false => None,
        };
        let signer: Arc<dyn audit::Signer> = Arc::new(CheckpointSigner(signer, second));
        let options = audit::Options::from(&config.audit);
        let trail = Arc::new(Trail::start(Arc::clone(&vault), options, Some(signer)).await?);
        let senders = Box::pin(secrets::sinks(&config)).await?;
        let sinks = Sinks::new(&config.audit, &config.node.data_dir, &trail, &senders);
        let webhooks = Webhooks::new(&vault, ways).await?;

        let directory = Arc::new(Directory::new(Arc::clone(&vault), security));
        let refusals = Arc::new(Refusals(Arc::clone(&trail)));
        let authenticator =
            Arc::new(Authenticator::new(Arc::clone(&directory), refusals, settings(&config)));
        authenticator.limit(&config.rates);
        let forge = Forge::new(config.limits.key_generations, config.limits.key_generation_queue);
        let backends =
            Arc::new(Backends::new(config.hardened.as_ref(), &wrappers, vault.node_id()));
        let keyring = Keyring::new(
            Arc::clone(&vault),
            keys,
            Arc::clone(&authorizer),
            Arc::clone(&trail),
            forge,
        );
        let tokens = Tokens::new(config.hardened.as_ref(), &wrappers);
        let keyring = keyring.with_backends(Arc::clone(&backends)).with_tokens(tokens);
        keyring.quotas().limit(&config.quotas);
        let keyring = Arc::new(keyring);
        let jobs = Runner::new(Arc::clone(&vault), alarm, handler(&keyring, &directory, &clock));
        jobs.resume().await?;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut checks = report::checks(&vault, &trail, &tls, &jobs, &backends, &stopping, &anchor);
        if let (Some(replicated), Some(settings)) = (&replication, &config.replication) {
            // Before what follows from it.
            checks.insert(1, replication::check(replicated, settings.max_lag));
        }
        let store = Arc::clone(&vault);
        checks.push(Box::new(move || room::state(&store)));
        let settings = (config.audit.archive.clone(), config.runtime.sandbox);
        let archiver =
            Archiver::new(settings, &trail, (&sinks, &webhooks), &jobs, replication.as_ref());
        let copies = Arc::clone(&sinks);
        checks.push(Box::new(move || copies.state()));
        let archives = Arc::clone(&archiver);
        checks.push(Box::new(move || archives.state()));
        let told = Arc::clone(&webhooks);
        checks.push(Box::new(move || told.state()));
        let health = Health::new(checks);
        let source = Source {
            instance: data_encoding::HEXLOWER.encode(&vault.node_id()),
            since: Duration::from_micros(u64::try_from(now.micros()).unwrap_or(0)),
        };
        Ok(Self {
            config: Arc::new(config),
            telemetry: Arc::new(Telemetry::new(source)),
            started_at: now,
            clock,
            custody,
            vault,
            anchor,
            directory,
            authenticator,
            authorizer,
            trail,
            sinks,
            archiver,
            webhooks,
            keyring,
            backends,
            nodes,
            jobs,
            tls,
            authority,
            wrappers,
            metrics: Arc::default(),
            calls: Arc::new(Calls::new(rpc::methods::METHODS.iter().map(|m| (m.path, m.lasts)))),
            slow: figures::Slow::default(),
            network: Arc::default(),
            connections: Arc::default(),
            replication,
            health,
            stopping,
        })
    }

    /// Starts the tasks, and last of all listens.
    ///
    /// # Errors
    /// [`AppError::Net`], [`AppError::HealthPort`] or [`AppError::MetricsPort`]; everything is at rest again then.
    pub async fn spawn(self) -> Result<Running, AppError> {
        let prepared = async { Ok((self.way(&self.config).await?, self.listen().await?)) };
        let (way, listening) = match Box::pin(prepared).await {
            Ok((way, listening)) => (way, Ok(listening)),
            Err(error) => (None, Err(error)),
        };
        let (listener, health_port, metrics_port) = match listening {
            Ok(all) => all,
            Err(error) => {
                self.close().await.ok();
                return Err(error);
            }
        };
        let app = Arc::new(self);
        app.lead_to(way);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let health_address = match health_port {
            Some(port) => {
                let address = port.local_addr().ok();
                tasks.spawn(plain::serve(port, Arc::clone(&app.health), stop.clone()));
                address
            }
            None => None,
        };
        let metrics_address = metrics_port.as_ref().and_then(|port| port.local_addr().ok());
        if let Some(port) = metrics_port {
            let app = Arc::downgrade(&app);
            let gather = Arc::new(move || app.upgrade().map(|app| app.figures()));
            tasks.spawn(port::serve(port, gather, stop.clone()));
        }
        if let Some(nodes) = &app.nodes {
            // Before anything is said of its health.
            tasks.spawn(Arc::clone(nodes).follow(stop.clone()));
            nodes.ready().await;
        }
        tasks::start(&app, &tasks, &stop);
        app.sinks.start();
        app.webhooks.start();
        let drain = CancellationToken::new();
        let served = app.serve(listener, drain.clone());
        let served = match served {
            Ok(served) => served,
            Err(error) => {
                stop.cancel();
                tasks.close();
                tasks.wait().await;
                app.rest().await.ok();
                app.telemetry.end().await;
                return Err(error);
            }
        };
        app.network.set(Arc::clone(served.metrics())).ok();
        app.connections.set(Arc::clone(served.connections())).ok();
        let address = served.local_addr();
        app.health.refresh();
        Ok(Running { app, address, health_address, metrics_address, served, drain, stop, tasks })
    }

    async fn listen(
        &self,
    ) -> Result<(Listener, Option<TcpListener>, Option<TcpListener>), AppError> {
        let health_port = match self.config.listen.health {
            Some(address) => Some(
                plain::bind(address)
                    .await
                    .map_err(|source| AppError::HealthPort { address, source })?,
            ),
            None => None,
        };
        let metrics_port = match self.config.listen.metrics {
            Some(address) => Some(
                plain::bind(address)
                    .await
                    .map_err(|source| AppError::MetricsPort { address, source })?,
            ),
            None => None,
        };
        let handed = service_manager::socket().map_err(AppError::Process)?;
        let listener = match handed {
            Some(socket) => Listener::from_std(socket).map_err(AppError::Process)?,
            None => Listener::bind(self.config.listen.address)?,
        };
        Ok((listener, health_port, metrics_port))
    }

    fn serve(
        self: &Arc<Self>,
        listener: Listener,
        drain: CancellationToken,
    ) -> Result<Served, AppError> {
        let deps = Arc::new(rpc::Deps {
            keyring: Arc::clone(&self.keyring),
            trail: Arc::clone(&self.trail),
            authenticator: Arc::clone(&self.authenticator),
            clock: self.clock.clone(),
            health: Arc::new(report::Report::of(self)),
            longest_call: LONGEST_CALL,
        });
        let health = HealthServer::new(HealthService(Arc::clone(&self.health)));
        let admin = rpc::admin::AdminDeps {
            custody: Arc::clone(&self.custody),
            jobs: Arc::clone(&self.jobs),
            webhooks: Arc::clone(&self.webhooks),
            authority: self.authority.clone(),
            config: Arc::clone(&self.config),
            loaded_at: self.started_at,
            anchor: self.anchor.clone(),
            wrappers: self.wrappers.clone(),
            replication: self.replication.clone(),
            sinks: Arc::clone(&self.sinks),
            tls: Arc::clone(&self.tls),
            network: Arc::clone(&self.network),
            reload: reload::asked_for(self),
        };
        let service = rpc::service(deps, admin, |routes| routes.add_service(health));
        let (metrics, calls) = (Arc::clone(&self.metrics), Arc::clone(&self.calls));
        let telemetry = Arc::clone(&self.telemetry);
        let service = measured::Measured::new(service, metrics, calls, telemetry);
        let net = self.config.listen.net.clone();
        Ok(net::serve(listener, net, Arc::clone(&self.tls), service, drain)?)
    }

    /// Makes what is not durable so and closes the store: for an app that was opened and not spawned.
    ///
    /// # Errors
    /// As [`Trail::shutdown`].
    pub async fn close(self) -> Result<(), Error> {
        let result = self.rest().await;
        let config = Arc::clone(&self.config);
        drop(self);
        store::closed(&config).await;
        result
    }

    /// Makes what is not durable so.
    async fn rest(&self) -> Result<(), Error> {
        self.jobs.shutdown();
        self.jobs.note_clock().await;
        self.webhooks.shutdown(LAST_COPIES).await;
        let durable = self.trail.shutdown(LAST_WORDS).await;
        self.sinks.shutdown(LAST_COPIES).await;
        replication::settle(self.replication.as_ref()).await;
        if let Some(anchor) = &self.anchor
            && let Err(error) = anchor.settle().await
        {
            tracing::warn!(%error, detail = error.internal_text(), "the last changes are not anchored");
        }
        durable
    }
}

fn load_authority(config: &Config) -> Result<Option<Arc<Authority>>, AppError> {
    let Some(ca) = &config.ca else { return Ok(None) };
    // By the rule of the server's own key: root's may be open to its group, as orchestrators mount secrets.
    tls::read_key(&ca.key)?;
    Ok(Some(Arc::new(Authority::load(&ca.certificate, &ca.key)?)))
}

/// Does what has come due.
fn handler(keyring: &Arc<Keyring>, directory: &Arc<Directory>, clock: &Clock) -> Handler {
    let (keyring, directory, clock) = (Arc::clone(keyring), Arc::clone(directory), clock.clone());
    Arc::new(move |job| {
        let (keyring, directory, clock) =
            (Arc::clone(&keyring), Arc::clone(&directory), clock.clone());
        Box::pin(async move {
            let now = clock.now();
            match job.record.kind() {
                Kind::SweepTokens => tasks::sweep_tokens(&directory, now).await,
                Kind::SweepIdempotency => tasks::sweep_idempotency(&keyring, now).await,
                // A rotation wakes the resealing itself; it also runs at every start.
                Kind::Reseal => Ok(()),
                Kind::NotifyExpiry if !job.record.client_id.is_empty() => {
                    directory.notify_expiry(&job.record, &job.row, now).await
                }
                // A new version waits for room; what ends or destroys does not.
                Kind::Rotate if keyring.vault().room() != Room::Enough => Err(Error::NoRoom),
                _ => keyring.run_job(&job.record, &job.row, now).await,
            }
        })
    })
}

/// A node that serves.
#[derive(Debug)]
pub struct Running {
    app: Arc<App>,
    address: SocketAddr,
    health_address: Option<SocketAddr>,
    metrics_address: Option<SocketAddr>,
    served: Served,
    drain: CancellationToken,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// How a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// What the drain cut off.
    pub drain: DrainReport,
    /// Whether everything that was accepted is durable.
    pub durable: bool,
}

impl Running {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where its health port is.
    #[must_use]
    pub fn health_address(&self) -> Option<SocketAddr> {
        self.health_address
    }

    /// Where its metrics port is.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// What it consists of.
    #[must_use]
    pub fn app(&self) -> &Arc<App> {
        &self.app
    }

    /// As [`Self::stop`], after a word in the audit trail, and waits until nothing of the node's keys
    /// is left in this process.
    ///
    /// # Errors
    /// If something holds on to them: the process must end then.
    pub async fn lock(self, uid: u32) -> Result<Stopped, Error> {
        let mut event = event("LockNode", self.app.clock.now());
        event.details.insert("uid".into(), uid.to_string());
        if let Err(error) = self.app.trail.record(event).await {
            tracing::error!(%error, "the locking is not in the audit trail");
        }
        let custody = Arc::downgrade(&self.app.custody);
        let keyring = Arc::downgrade(&self.app.keyring);
        let stopped = self.stop().await;
        let gone = async {
            while custody.strong_count() + keyring.strong_count() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let gone = tokio::time::timeout(LAST_WORDS, gone).await;
        gone.map_err(|_| Error::internal("something still holds the keys"))?;
        Ok(stopped)
    }

    /// Takes no more connections, lets requests end within the drain's time, makes the audit trail
    /// durable, signs a last checkpoint and closes.
    pub async fn stop(self) -> Stopped {
        self.app.stopping.store(true, Ordering::SeqCst);
        self.app.health.refresh();
        self.drain.cancel();
        let drain = self.served.drained().await;
        self.app.jobs.shutdown();
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let last = self.app.rest().await;
        self.app.telemetry.end().await;
        let config = Arc::clone(&self.app.config);
        // Whoever else still holds the app closes the store when it lets go.
        if let Some(app) = Arc::into_inner(self.app) {
            drop(app);
            store::closed(&config).await;
        }
        if let Err(error) = &last {
            let detail = error.internal_text().unwrap_or_default();
            tracing::error!(%error, detail, "the end of the audit trail may not be durable");
        }
        tracing::info!(
            aborted = drain.requests_aborted,
            millis = u64::try_from(drain.elapsed.as_millis()).unwrap_or(u64::MAX),
            "stopped"
        );
        Stopped { drain, durable: last.is_ok() }
    }
}

impl State {
    /// As HealthCheck tells it.
    fn wire(&self) -> polykey_proto::polykey::v2::HealthStatus {
        use polykey_proto::polykey::v2::HealthStatus;
        match self {
            Self::Serving => HealthStatus::Healthy,
            Self::Degraded(_) => HealthStatus::Degraded,
            Self::NotServing(_) => HealthStatus::Unhealthy,
        }
    }
}

/// Background work is this slow, so that requests do not notice it.
fn pace() -> Pace {
    Pace::default()
}
