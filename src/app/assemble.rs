//! How a node is put together: opened in the order of what is cheap to find wrong.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arc_swap::ArcSwap;
use polykey_hsm::{BoxFuture, SlotKind};
use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_proto::polykey::record::v1::job_record::Kind;
use polykey_storage::{Revision, RowKey, Store};

use super::archive::Archiver;
use super::{
    App, AppError, FIRST_SLOT, anchor, event, figures, reload, replication, report, room, secrets,
    store, tasks,
};
use crate::audit::{self, MlDsaKey, Sinks, Trail};
use crate::authn::limiter::Allowance;
use crate::authn::session::{Authenticator, Settings};
use crate::config::Config;
use crate::custody::signing::{self, MlDsaSigner, Purpose, SigningKey};
use crate::custody::{
    self, Backends, Custody, InitError, MASTER_KEY, NamedWrapper, Tokens, Unusable,
};
use crate::directory::{Directory, SecurityCaches};
use crate::error::Error;
use crate::health::Health;
use crate::jobs::{Alarm, Handler, Runner};
use crate::keyring::{Forge, KeyCaches, Keyring};
use crate::metrics::calls::Calls;
use crate::net::tls::{self, TlsState};
use crate::nodes::Nodes;
use crate::pki::Authority;
use crate::rpc;
use crate::telemetry::otlp::Telemetry;
use crate::telemetry::otlp::encode::Source;
use crate::time::Clock;
use crate::vault::{Freshness, Invalidate, Room, Witness};
use crate::webhook::Webhooks;

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

/// The wrappers that the configuration names and those that an operator gave, where at least one can
/// be used.
pub(super) async fn wrappers(
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
pub(super) async fn unlock(
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
        keyring.limit(&config.quotas);
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
}

pub(super) fn load_authority(config: &Config) -> Result<Option<Arc<Authority>>, AppError> {
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
