//! Why a node does not open, start or get made, in words for operators. No secrets.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::recover::RecoveryFailure;
use super::replication::ReplicationFailure;
use super::restore::RestoreFailure;
use super::secrets::Missing;
use crate::anchor::Unanchored;
use crate::authz::PolicyErrors;
use crate::backup::BackupError;
use crate::config::ConfigErrors;
use crate::custody;
use crate::error::Error;
use crate::net::NetError;
use crate::net::tls::TlsConfigError;
use crate::pki::PkiError;
use crate::setup::SetupError;
use crate::telemetry::TelemetryError;
use crate::webhook;

/// Why there is no node.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppError {
    /// The configuration is not as it must be.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// The log cannot be started.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// A webhook cannot be used.
    #[error(transparent)]
    Webhook(#[from] webhook::Unusable),
    /// Certificates, keys or revocation lists cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsConfigError),
    /// The authority cannot be used.
    #[error(transparent)]
    Authority(#[from] PkiError),
    /// Policies cannot be used.
    #[error(transparent)]
    Policies(#[from] PolicyErrors),
    /// The master key or passphrase cannot be read.
    #[error(transparent)]
    MasterKey(#[from] custody::WrapperError),
    /// References of the configuration give nothing.
    #[error("these settings have no value:{}", lines(.0))]
    Secrets(Vec<Missing>),
    /// None of the wrappers can be used.
    #[error("no wrapper can be used:{}", lines(.0))]
    NoWrapper(Vec<custody::Unusable>),
    /// No slot opens, and some wrappers cannot be used.
    #[error("no slot of the store opens:{}\nand these wrappers cannot be used:{}", lines(.trials), lines(.unusable))]
    Locked {
        /// What became of each slot.
        trials: Vec<custody::Trial>,
        /// The wrappers that could not be tried.
        unusable: Vec<custody::Unusable>,
    },
    /// The recovery key or its shares are not those of any slot.
    #[error("{0}")]
    Recovery(#[from] RecoveryFailure),
    /// A backup gives nothing back.
    #[error("{0}")]
    Restore(#[from] RestoreFailure),
    /// The anchor of the store does not vouch for it.
    #[error("{0}")]
    Anchor(Box<Unanchored>),
    /// A file cannot be written.
    #[error("{} cannot be written: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The replication target is not there, none of this store, or the writer now.
    #[error("{0}")]
    Replication(#[from] ReplicationFailure),
    /// The store file does not open.
    #[error("{0}")]
    Store(#[from] polykey_storage::OpenError),
    /// The store does not open under the master key.
    #[error("{0}")]
    Custody(#[from] custody::OpenError),
    /// The store was not founded.
    #[error("{0}")]
    Init(#[from] custody::InitError),
    /// Something could not be made.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The network cannot be used.
    #[error("{0}")]
    Net(#[from] NetError),
    /// The health port cannot be used.
    #[error("cannot listen on the health port {address}: {source}")]
    HealthPort {
        /// Its address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The port of figures cannot be used.
    #[error("cannot listen on the metrics port {address}: {source}")]
    MetricsPort {
        /// Its address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration asks for what the process cannot do any more.
    #[error(
        "the configuration now needs a file or socket that this process gave up at its start ([runtime] sandbox); \
         nothing of it is in force"
    )]
    NeedsRestart,
    /// The local socket cannot be used.
    #[error("{}: {source}", path.display())]
    Door {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that must be private is not.
    #[error("{}: mode {mode:04o} lets others read this; run `chmod 600 {}`", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The store, once open, failed.
    #[error("{}", words(.0))]
    Vault(#[from] Error),
    /// Initialised already.
    #[error("{} has been initialised already; nothing was changed", .0.display())]
    AlreadyInitialised(PathBuf),
    /// No first administrator can be made.
    #[error("nothing tells the first administrator's certificate from others")]
    NoIdentity,
    /// The system gives no runtime or signal handler.
    #[error("the process cannot be set up: {0}")]
    Process(std::io::Error),
}

impl From<Unanchored> for AppError {
    fn from(refused: Unanchored) -> Self {
        Self::Anchor(Box::new(refused))
    }
}

fn lines<T: std::fmt::Display>(all: &[T]) -> String {
    all.iter().map(|one| format!("\n  {one}")).collect()
}

/// For operators: with what strangers are not told.
fn words(error: &Error) -> String {
    match error.internal_text() {
        Some(text) => format!("{error}: {text}"),
        None => error.to_string(),
    }
}

/// What kind of failure it is; the command line has an exit code for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What was asked for, or a file of the operator's, is not as it must be.
    Given,
    /// Something is in the way: in use, or there already.
    Conflict,
    /// The store or its key is damaged or not the right one.
    Damaged,
    /// The machine did not do its part.
    Machine,
    /// A device or service does not answer; another start may find it.
    Away,
}

/// What to do about an anchor that does not vouch for the store.
fn unanchored(refused: &Unanchored) -> &'static str {
    match refused {
        Unanchored::Older { .. } | Unanchored::Forked { .. } => {
            "Put the newest store back, or restore the newest backup. If this is the newest there is, give \
             --accept-rollback once: it is audited, and what was revoked since then must be revoked again."
        }
        Unanchored::Missing(_) => {
            "Give the medium of [anchor] back. If there was no anchor yet, or it is lost, and this is \
             the newest store, give --accept-rollback once: it makes one, and is audited."
        }
        Unanchored::Unusable { away: true, .. } => {
            "Give the token or the database of [anchor] back; `polykey hsm list` shows what a module sees. If it is lost and \
             this is the newest store, name another place in [anchor] and give --accept-rollback once: it is \
             audited."
        }
        Unanchored::Unusable { .. } | Unanchored::Damaged { .. } => {
            "Mend it, or put back the one that was there. If it is lost and this is the newest store, give \
             --accept-rollback once: it makes another, and is audited."
        }
        Unanchored::OtherNode { .. } => {
            "Correct [anchor] or [storage] path. If this store is to be anchored there from now on, give \
             --accept-rollback once: it is audited."
        }
        Unanchored::NoStore { .. } => {
            "Restore the newest backup, or correct [storage] path. For a new node, name another place or label in \
             [anchor], or move that one away."
        }
    }
}

impl AppError {
    /// What kind of failure it is.
    #[must_use]
    pub fn fault(&self) -> Fault {
        use polykey_storage::{OpenError as Store, StoreError};
        if self.is_away() {
            return Fault::Away;
        }
        match self {
            Self::Anchor(refused) => match **refused {
                Unanchored::Older { .. }
                | Unanchored::Forked { .. }
                | Unanchored::Damaged { .. } => Fault::Damaged,
                Unanchored::Missing(_) | Unanchored::OtherNode { .. } => Fault::Given,
                Unanchored::NoStore { .. } => Fault::Conflict,
                Unanchored::Unusable { away: true, .. } => Fault::Away,
                Unanchored::Unusable { .. } => Fault::Machine,
            },
            Self::Config(_)
            | Self::Telemetry(_)
            | Self::Webhook(_)
            | Self::Tls(_)
            | Self::Authority(_)
            | Self::Policies(_)
            | Self::MasterKey(_)
            | Self::Secrets(_)
            | Self::NoWrapper(_)
            | Self::Recovery(_)
            | Self::Restore(RestoreFailure::File {
                error: BackupError::Io(_) | BackupError::Foreign | BackupError::NewerFormat(_),
                ..
            })
            | Self::Exposed { .. }
            | Self::NoIdentity
            | Self::Store(
                Store::NotFound { .. } | Store::NotAStore { .. } | Store::NewerFormat { .. },
            )
            | Self::Custody(
                custody::OpenError::NotInitialised | custody::OpenError::NewerFormat { .. },
            ) => Fault::Given,
            Self::Replication(
                ReplicationFailure::Refused { .. } | ReplicationFailure::Fenced(_),
            )
            | Self::Store(Store::InUse { .. } | Store::Exists { .. })
            | Self::AlreadyInitialised(_)
            | Self::Restore(RestoreFailure::Exists(_))
            | Self::Init(custody::InitError::AlreadyInitialised)
            | Self::Setup(SetupError::InUse(_))
            | Self::HealthPort { .. }
            | Self::MetricsPort { .. }
            | Self::Door { .. }
            | Self::Net(NetError::Bind { .. }) => Fault::Conflict,
            Self::Custody(
                custody::OpenError::NoSlotOpened(_)
                | custody::OpenError::SlotsChanged { .. }
                | custody::OpenError::Replayed { .. }
                | custody::OpenError::Damaged(_),
            )
            | Self::Locked { .. }
            | Self::Restore(
                RestoreFailure::Records { .. }
                | RestoreFailure::Unproven(_)
                | RestoreFailure::File { error: BackupError::Broken | BackupError::Ring(_), .. },
            )
            | Self::Setup(SetupError::MasterKeyLost { .. })
            | Self::Store(Store::Store { error: StoreError::Damaged(_), .. })
            | Self::Vault(Error::DataLoss { .. }) => Fault::Damaged,
            Self::Setup(
                SetupError::Foreign(_) | SetupError::Owner { .. } | SetupError::Config(_),
            ) => Fault::Given,
            _ => Fault::Machine,
        }
    }

    /// Whether what would open the root key, or another secret, does not answer, so that another start
    /// may find it.
    #[must_use]
    pub fn is_away(&self) -> bool {
        let unusable = |all: &[custody::Unusable]| all.iter().any(|one| one.error.is_away());
        let trials = |all: &[custody::Trial]| all.iter().any(custody::Trial::is_away);
        match self {
            Self::MasterKey(error) => error.is_away(),
            // One that is there to be mended stays so, whoever else answers later.
            Self::Secrets(all) => !all.is_empty() && all.iter().all(|one| one.away),
            Self::NoWrapper(all) => unusable(all),
            Self::Locked { trials: tried, unusable: all } => trials(tried) || unusable(all),
            Self::Custody(custody::OpenError::NoSlotOpened(all)) => trials(all),
            Self::Replication(ReplicationFailure::Away { .. }) => true,
            _ => false,
        }
    }

    /// Whether it is only that nothing opens the root key, now.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        matches!(
            self,
            Self::MasterKey(_)
                | Self::NoWrapper(_)
                | Self::Locked { .. }
                | Self::Custody(custody::OpenError::NoSlotOpened(_))
        )
    }

    /// What to do, where the message does not say.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        use polykey_storage::OpenError as Store;
        Some(match self {
            Self::Store(Store::InUse { .. }) => {
                "A server is running on it. Stop that one, or ask it: `polykey --help` has commands \
                 that talk to a running server."
                    .into()
            }
            Self::Store(Store::NotFound { .. }) => {
                "Run `polykey init --config FILE` to make it, or correct [storage] path.".into()
            }
            Self::Store(Store::NotAStore { .. }) => {
                "Correct [storage] path, or restore the store from a backup.".into()
            }
            Self::Net(NetError::Bind { address, source })
                if source.kind() == std::io::ErrorKind::AddrInUse =>
            {
                format!(
                    "Another process listens there: stop it (`ss -ltnp sport = :{}` names it), or \
                     choose another address with --listen or [listen] address.",
                    address.port()
                )
            }
            Self::Net(NetError::Bind { .. }) => {
                "Choose an address of this machine, and a port above 1023 unless you are root.".into()
            }
            Self::Door { .. } => {
                "Choose another path for [unlock] socket: its directory must exist, and the whole \
                 path have fewer than 108 bytes."
                    .into()
            }
            Self::NeedsRestart => "Restart the node, or take back what is new in it besides what a reload takes.".into(),
            Self::HealthPort { .. } => "Choose another port for [listen] health.".into(),
            Self::MetricsPort { .. } => "Choose another port for [listen] metrics.".into(),
            Self::MasterKey(custody::WrapperError::Local(
                polykey_hsm::LocalError::Unreadable { .. },
            )) => {
                "Make one with `polykey init --generate-master-key`, or correct [master_key]; if the \
                 store exists, it needs the key it was made with."
                    .into()
            }
            Self::Anchor(refused) => unanchored(refused).into(),
            Self::NoWrapper(_) | Self::Locked { .. } => {
                "Give one of the wrappers its secret again, or recover with `polykey recover` if there is \
                 a recovery slot."
                    .into()
            }
            Self::Replication(ReplicationFailure::Fenced(_)) => {
                "Serve from the store that was promoted, or restore from it. To go on reading here, write \
                 when_fenced = \"read\" in [replication]. `polykey store copy` to a new file makes a \
                 store of its own of this one, which has what was not shipped."
                    .into()
            }
            Self::Replication(ReplicationFailure::Refused { .. }) => {
                "If this store is an older copy, put the newest one back. If it is another one, or the older one is \
                 to go on, name an empty [replication] schema."
                    .into()
            }
            Self::NoIdentity => {
                "Configure [ca], and a certificate is issued, or name one with --admin-identity \
                 spiffe-uri:spiffe://… or --admin-identity dns:NAME."
                    .into()
            }
            Self::Restore(RestoreFailure::Exists(_)) => {
                "Move it away, with the files beside it, if the backup is to take its place.".into()
            }
            Self::Restore(RestoreFailure::IntoDatabase) => {
                "Restore into a file, by a configuration with kind = \"redb\", and move it with \
                 `polykey store copy`."
                    .into()
            }
            Self::AlreadyInitialised(_) => {
                "Start it with `polykey serve --config FILE`.".into()
            }
            _ => return None,
        })
    }
}
