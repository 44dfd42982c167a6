//! A node that serves, from its first task to its last word.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use polykey_proto::grpc::health::v1::health_server::HealthServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{App, AppError, event, measured, reload, replication, report, store, tasks};
use crate::error::Error;
use crate::health::grpc::HealthService;
use crate::health::plain;
use crate::metrics::port;
use crate::net::{self, DrainReport, Listener, Served};
use crate::{rpc, service_manager};

/// Longest time that a call which is not a stream may take.
const LONGEST_CALL: Duration = Duration::from_secs(60);
/// Time for the audit trail to become durable at the end, beside the drain.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(10);
/// Time for the end of the log to reach the sinks; what is left follows after the next start.
const LAST_COPIES: Duration = Duration::from_secs(2);
impl App {
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
