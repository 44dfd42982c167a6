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
mod assemble;
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
mod running;
mod secrets;
pub mod store;
mod tasks;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arc_swap::ArcSwap;
use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_storage::replicated::Replicated;

use crate::anchor::Keeper;
use crate::audit::{Sinks, Trail};
use crate::authn::session::Authenticator;
use crate::authz::Authorizer;
use crate::config::Config;
use crate::custody::{Backends, Custody, NamedWrapper, Pace};
use crate::directory::Directory;
use crate::health::{Health, State};
use crate::jobs::Runner;
use crate::keyring::Keyring;
use crate::metrics::RequestMetrics;
use crate::metrics::calls::Calls;
use crate::net::tls::TlsState;
use crate::net::{Connections, NetMetrics};
use crate::nodes::Nodes;
use crate::pki::Authority;
use crate::telemetry::otlp::Telemetry;
use crate::time::{Clock, Time};
use crate::vault::Vault;
use crate::webhook::Webhooks;
use archive::Archiver;
use assemble::{load_authority, unlock, wrappers};

pub use bootstrap::{Admin, Bootstrapped, bootstrap};
pub use check::{Finding, check};
pub use draw::Database;
pub use error::{AppError, Fault};
pub use recover::{Recovered, RecoveryFailure, recover};
pub use reload::Reloaded;
pub use replication::{ReplicationFailure, record_promotion};
pub use restore::{BackupView, Origin, Recovery, RestoreFailure, restore, verify_backup};
pub use running::{Running, Stopped};
pub use secrets::Missing;

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
