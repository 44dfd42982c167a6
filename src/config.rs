//! The configuration of a node: a TOML file in, domain values or every mistake at once out.
//!
//! Reading is pure: it touches the file it is given and no other. The text is parsed by the `toml`
//! crate, and each section is then taken apart key by key instead of through a derived
//! deserialiser, which would stop at the first mistake. Unknown keys are refused all the same.
//!
//! Secrets never stand in a configuration. Where one is needed there is a reference: `{ file = "…" }`,
//! `{ env = "…" }`, `{ credential = "…" }` or `{ ssm = "…" }`. No value is ever repeated in an error, in case
//! somebody wrote a secret where its reference belongs.

mod read;
pub mod replication;
mod sections;
pub mod show;
pub mod sinks;
mod storage;
pub mod telemetry;
#[cfg(test)]
mod tests;
pub mod webhooks;
mod wrapper;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polykey_hsm::aws::{AwsConnection, AwsKms};
use polykey_hsm::pkcs11::{KeySelector, Pkcs11Config};
use polykey_hsm::{MasterKeySource, SecretSource};

use crate::net::NetConfig;
use crate::net::tls::TlsFiles;
use crate::quotas::Quota;
use crate::rates::Rule;

pub use read::{ConfigErrors, Problem};
pub use replication::Replication;
pub(crate) use sections::DEFAULT_ADDRESS;
pub use sinks::Sink;
pub use telemetry::Telemetry;
pub use webhooks::Webhook;

/// Largest configuration file that is read, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// All that a node is told before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file it was read from.
    pub file: PathBuf,
    /// The settings that stand in it, by their names with dots, and their lines.
    pub written: BTreeMap<String, usize>,
    /// `[node]`
    pub node: Node,
    /// `[listen]`
    pub listen: Listen,
    /// `[storage]`
    pub storage: Storage,
    /// `[anchor]`
    pub anchor: Option<Anchor>,
    /// `[replication]`
    pub replication: Option<Replication>,
    /// `[master_key]`
    pub master_key: Wrapper,
    /// `[wrappers.NAME]`: what else may open the root key, by its name.
    pub wrappers: BTreeMap<String, Wrapper>,
    /// `[hardened]`
    pub hardened: Option<Hardened>,
    /// `[bootstrap]`
    pub bootstrap: Bootstrap,
    /// `[unlock]`
    pub unlock: Unlock,
    /// `[tokens]`
    pub tokens: Tokens,
    /// `[login]`
    pub login: Login,
    /// `[audit]`
    pub audit: Audit,
    /// `[policies]`: Cedar files of the operator's, in their order.
    pub policies: Vec<PathBuf>,
    /// `[limits]`
    pub limits: Limits,
    /// `[rates.NAME]`: how often clients may call.
    pub rates: Vec<Rule>,
    /// `[quotas.NAME]`: how many keys clients may have.
    pub quotas: Vec<Quota>,
    /// `[webhooks.NAME]`: whom the node tells what became of keys.
    pub webhooks: BTreeMap<String, Webhook>,
    /// `[log]`
    pub log: Log,
    /// `[telemetry]`
    pub telemetry: Option<Telemetry>,
    /// `[ca]`
    pub ca: Option<Ca>,
    /// `[runtime]`
    pub runtime: Runtime,
}

/// `[master_key]` or `[wrappers.NAME]`: something that opens the root key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrapper {
    /// A master key or a passphrase.
    Local(MasterKeySource),
    /// A key of a PKCS#11 token.
    Pkcs11(Pkcs11),
    /// A key of AWS KMS.
    Aws(AwsKms),
    /// Some of several other wrappers together.
    Quorum(Quorum),
}

/// A token and which of its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pkcs11 {
    /// The token.
    pub token: Pkcs11Config,
    /// The key.
    pub key: KeySelector,
}

/// Wrappers of which some must open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quorum {
    /// How many.
    pub threshold: u8,
    /// Their names.
    pub of: Vec<String>,
}

/// `[unlock]`: locking and unlocking a node on its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unlock {
    /// The socket on which `polykey lock` and `polykey unlock` reach it.
    pub socket: PathBuf,
    /// Whether a node whose root key does not open at the start waits to be unlocked instead of
    /// ending.
    pub wait: bool,
}

/// `[bootstrap]`: how references to secrets are resolved that lie in AWS Parameter Store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bootstrap {
    /// How it is reached.
    pub aws: AwsConnection,
    /// For all references together.
    pub deadline: Duration,
}

/// `[hardened]`: keys that lie under a hardware or cloud wrapper as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardened {
    /// The NAME of a `[wrappers.NAME]` that new ones lie under, or `master_key`.
    pub wrapper: String,
    /// How long one that was opened is remembered; zero: not at all.
    pub cache: Duration,
}

/// `[node]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The directory that holds what the node writes.
    pub data_dir: PathBuf,
}

/// `[listen]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Where the gRPC services are, mutual TLS only.
    pub address: SocketAddr,
    /// Certificate, key, client authorities and revocation lists.
    pub tls: TlsFiles,
    /// Which of them come from a reference; the path then only names it.
    pub references: TlsReferences,
    /// Limits and times of connections.
    pub net: NetConfig,
    /// Whether the common name of a certificate without alternative names identifies a client.
    pub allow_common_name: bool,
    /// A loopback address that tells probes without TLS whether the node serves.
    pub health: Option<SocketAddr>,
    /// A loopback address that gives its figures to a Prometheus without TLS.
    pub metrics: Option<SocketAddr>,
}

/// TLS material that is referred to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsReferences {
    /// The server's certificate.
    pub certificate: Option<SecretSource>,
    /// Its private key.
    pub key: Option<SecretSource>,
    /// The authorities of clients.
    pub client_ca: Option<SecretSource>,
    /// Revocation lists.
    pub crl: Option<SecretSource>,
}

/// `[storage]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// The store file; of no meaning where there is a database.
    pub path: PathBuf,
    /// `kind = "postgres"`: the store is in a database.
    pub database: Option<Database>,
    /// Memory for cached pages, in MiB.
    pub cache_mib: usize,
    /// How many revisions the change log goes back.
    pub changes: u64,
    /// Room on the disk of the store file, in MiB, with less of which changes are refused; 0 = none. Of no
    /// meaning where there is a database.
    pub reserve_mib: u64,
}

/// `[anchor]`: what the node is known to have served, kept outside the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// Where it is.
    pub place: AnchorPlace,
    /// What the operator accepts at this start. No setting: it is said on the command line.
    pub tolerate: Tolerate,
}

/// Where an anchor is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnchorPlace {
    /// In a file.
    File(PathBuf),
    /// In a data object of a PKCS#11 token.
    Token {
        /// [`MASTER_KEY`](crate::custody::MASTER_KEY), or the NAME of `[wrappers.NAME]`.
        wrapper: String,
        /// `CKA_LABEL` of the object.
        label: String,
    },
    /// Beside the replica in the database of `[replication]`.
    Target,
}

impl Anchor {
    /// Its file, if that is what it is in.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match &self.place {
            AnchorPlace::File(file) => Some(file),
            AnchorPlace::Token { .. } | AnchorPlace::Target => None,
        }
    }
}

/// What is accepted of a store for which its anchor does not vouch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tolerate {
    /// Nothing.
    #[default]
    Nothing,
    /// That there is no anchor yet.
    Missing,
    /// Everything; it is audited, and the store anchored as it is.
    Rollback,
}

/// What a node does once another one was promoted in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WhenFenced {
    /// It serves nothing.
    #[default]
    Refuse,
    /// It goes on answering what takes no commit.
    Read,
}

/// `[storage]` of `kind = "postgres"`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    /// Where it is, without a password.
    pub url: String,
    /// The password.
    pub password: Option<SecretSource>,
    /// The schema of the tables.
    pub schema: String,
    /// The most connections that read.
    pub connections: usize,
    /// By when each call ends.
    pub call_timeout: Duration,
    /// Whether a pooler gives each transaction another session.
    pub transaction_pooler: bool,
    /// Whether a database that would lose acknowledged commits is refused.
    pub durable: bool,
    /// What this node is called among those of the store.
    /// None: the name of the machine.
    pub name: Option<String>,
    /// How long what is remembered is served without a look at the store.
    pub freshness: Duration,
    /// Whether every request looks.
    pub strict: bool,
    /// What happens once another node was promoted.
    pub when_fenced: WhenFenced,
}

/// `[tokens]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Life of an access token.
    pub access_ttl: Duration,
    /// Life of a refresh token.
    pub refresh_ttl: Duration,
    /// An Ed25519 seed that signs tokens from the start on at which it is first seen.
    pub signing_key: Option<SecretSource>,
}

/// `[login]`: how many failures a source may cause before it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Login {
    /// Failures of one address at once.
    pub address_burst: u32,
    /// In this time one of them is forgotten.
    pub address_interval: Duration,
    /// Failures of one client at once, counted only once its certificate matches.
    pub client_burst: u32,
    /// In this time one of them is forgotten.
    pub client_interval: Duration,
}

/// `[audit]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    /// When data-plane events are durable.
    pub data_plane: DataPlane,
    /// How often the head of the log is signed while it grows.
    pub checkpoint_interval: Duration,
    /// Whether checkpoints have an ML-DSA-65 signature beside that of Ed25519.
    pub ml_dsa: bool,
    /// How long leaves are kept in the store, and the directory of the archives that they go to then.
    pub archive: Option<Archiving>,
    /// `[audit.sinks.NAME]`: copies of the log, by their names.
    pub sinks: BTreeMap<String, Sink>,
}

/// `[audit] keep` and `archive`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archiving {
    /// How long leaves are kept in the store.
    pub keep: Duration,
    /// The directory of the archives.
    pub directory: PathBuf,
}

/// When events of the data plane are durable. Security-relevant ones always are before the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPlane {
    /// Within 100 ms.
    Buffered,
    /// Before the reply.
    Durable,
}

/// `[limits]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Keys, and versions, remembered between requests.
    pub key_cache: usize,
    /// Clients, roles, tokens and token families remembered between requests, each.
    pub directory_cache: usize,
    /// Decisions of policies remembered.
    pub decision_cache: usize,
    /// Key pairs generated at once.
    pub key_generations: usize,
    /// Key pairs waiting for their generation.
    pub key_generation_queue: usize,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The least that is logged.
    pub level: tracing::level_filters::LevelFilter,
    /// How lines look.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// `[ca]`: the authority of `polykey cert issue`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ca {
    /// Its certificate.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// `[runtime]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtime {
    /// Whether all memory of the process is locked against swapping.
    pub lock_memory: bool,
    /// Whether the process gives up what it has no use for.
    pub sandbox: bool,
    /// Directories in which it may write besides its own, for PKCS#11 modules.
    pub writable: Vec<PathBuf>,
}

impl Config {
    /// Whether a secret or certificate is a parameter of AWS Parameter Store.
    #[must_use]
    pub fn refers_to_parameters(&self) -> bool {
        let ssm = |source: &SecretSource| matches!(source, SecretSource::Ssm(_));
        let wrapper = |wrapper: &Wrapper| match wrapper {
            Wrapper::Local(MasterKeySource::Ssm(_)) => true,
            Wrapper::Local(MasterKeySource::Passphrase { from, .. }) => ssm(from),
            Wrapper::Pkcs11(token) => ssm(&token.token.pin),
            Wrapper::Local(_) | Wrapper::Aws(_) | Wrapper::Quorum(_) => false,
        };
        let TlsReferences { certificate, key, client_ca, crl } = &self.listen.references;
        let named = [certificate, key, client_ca, crl, &self.tokens.signing_key];
        let database = self.storage.database.as_ref().and_then(|d| d.password.as_ref());
        let replica = self.replication.as_ref().and_then(|r| r.password.as_ref());
        let sinks = self.audit.sinks.values().filter_map(|sink| match &sink.target {
            sinks::Target::Otlp(collector) => Some(&**collector),
            sinks::Target::File(_) | sinks::Target::Syslog(_) => None,
        });
        let collectors = self.telemetry.iter().map(|telemetry| &telemetry.collector).chain(sinks);
        let told = collectors.flat_map(telemetry::Collector::references);
        let hooks = self.webhooks.values().flat_map(|webhook| {
            let ca = webhook.ca.iter().filter_map(|(_, reference)| reference.as_ref());
            webhook.headers.values().chain(ca).chain([&webhook.secret])
        });
        let named = named.into_iter().flatten();
        named.chain(database).chain(replica).chain(told).chain(hooks).any(ssm)
            || std::iter::once(&self.master_key).chain(self.wrappers.values()).any(wrapper)
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// Every mistake in it, each with its place and its remedy.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        // So that every message names a place and not a way there.
        let file = &std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
        let bytes = read::bytes(file, MAX_BYTES)?;
        let text = String::from_utf8(bytes).map_err(|error| {
            let good = error.utf8_error().valid_up_to();
            let before = error.as_bytes().get(..good).unwrap_or_default();
            ConfigErrors::not_utf8(file, before)
        })?;
        Self::parse(file, &text)
    }

    /// Checks a text as if it stood in `file`. Relative paths are relative to the file's directory.
    ///
    /// # Errors
    /// Every mistake in it, each with its place and its remedy.
    pub fn parse(file: &Path, text: &str) -> Result<Self, ConfigErrors> {
        sections::config(file, text)
    }
}
