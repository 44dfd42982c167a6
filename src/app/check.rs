//! `polykey check`: everything that a start would find wrong, found without touching anything.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use polykey_hsm::SlotKind;
use rustix::fs::FlockOperation;

use super::{AppError, anchor, load_authority, reload, secrets};
use crate::config::sinks::{Target, Way};
use crate::config::{Config, Telemetry};
use crate::custody::{MASTER_KEY, NamedWrapper};
use crate::net::tls::{self, TlsState};

/// The first bytes of every store file: redb's magic number.
const MAGIC: &[u8] = b"redb\x1a\x0a\xa9\x0d\x0a";

/// Said of what lies elsewhere.
const NOT_ASKED: &str = "which was not asked: a start does";

/// One thing that was looked at.
#[derive(Debug)]
pub struct Finding {
    /// What it was.
    pub subject: &'static str,
    /// What is to be known of it, or what is wrong.
    pub result: Result<String, AppError>,
}

/// Refuses a file that others may read.
fn private(path: &Path) -> Result<(), AppError> {
    let unreadable = |source| AppError::Unreadable { path: path.to_owned(), source };
    let mode = fs::metadata(path).map_err(unreadable)?.mode() & 0o7777;
    if mode & 0o077 == 0 { Ok(()) } else { Err(AppError::Exposed { path: path.to_owned(), mode }) }
}

/// Looks at everything a start needs, with the code that a start uses.
#[must_use]
pub async fn check(config: &Config) -> Vec<Finding> {
    let mut more = Vec::new();
    let certificates = match Box::pin(secrets::tls(config)).await {
        Ok(texts) => {
            let files = &config.listen.tls;
            TlsState::load_with(files.clone(), &texts).map_err(|error| {
                let mut each = tls::problems(files, &texts).into_iter();
                let first = each.next().unwrap_or(error);
                more.extend(each.map(AppError::from));
                first.into()
            })
        }
        Err(error) => Err(error),
    };
    let certificates = certificates.map(|tls| {
        let day = |seconds: u64| {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            crate::time::Time::from_seconds(seconds).to_string()
        };
        let mut text = format!("valid until {}", day(tls.certificate_not_after()));
        if let Some(next) = tls.crl_next_update() {
            text.push_str(&format!("; the revocation list until {}", day(next)));
        }
        text
    });
    let authority = load_authority(config).map(|authority| {
        let text = if authority.is_some() { "usable" } else { "none: `cert issue` is refused" };
        text.to_owned()
    });
    let policies = reload::policies(config).map(|authorizer| {
        let warnings: String =
            authorizer.warnings().iter().map(|warning| format!("\n  {warning}")).collect();
        format!("{} files of yours, all valid{warnings}", config.policies.len())
    });
    let (opened, unusable) = NamedWrapper::open_all(config).await;
    let told = |named: &NamedWrapper| match named.wrapper.kind() {
        SlotKind::Passphrase => "a passphrase".to_owned(),
        SlotKind::MasterKey | SlotKind::Recovery => named.wrapper.id().as_str().to_owned(),
        // A check makes no calls: a PIN may be wrong, and a call may cost.
        SlotKind::Pkcs11 => format!("a PKCS#11 token, {NOT_ASKED}"),
        SlotKind::Aws => format!("{}, {NOT_ASKED}", named.wrapper.id().as_str()),
        SlotKind::Quorum => format!("a quorum, {NOT_ASKED}"),
    };
    let (first, others): (Vec<_>, Vec<_>) =
        opened.iter().partition(|named| named.name == MASTER_KEY);
    let (failed, failures): (Vec<_>, Vec<_>) =
        unusable.into_iter().partition(|unusable| unusable.name == MASTER_KEY);
    let master_key = match (first.first(), failed.into_iter().next()) {
        (Some(named), _) => Ok(told(named)),
        (None, Some(failed)) => Err(AppError::MasterKey(failed.error)),
        (None, None) => Err(AppError::NoWrapper(Vec::new())),
    };
    let further = match (others.is_empty(), failures.is_empty()) {
        (true, true) => None,
        (_, false) => Some(Err(AppError::NoWrapper(failures))),
        (false, true) => {
            let told = |named: &&NamedWrapper| format!("{} ({})", named.name, told(named));
            Some(Ok(others.iter().map(told).collect::<Vec<_>>().join(", ")))
        }
    };
    let signing_key = match Box::pin(secrets::signing_key(config)).await {
        Ok(None) => None,
        Ok(Some(_)) => Some(Ok("a seed of 32 bytes".to_owned())),
        Err(error) => Some(Err(error)),
    };
    let telemetry = match &config.telemetry {
        None => None,
        Some(settings) => Some(way(config, settings).await),
    };
    let mut findings = vec![Finding { subject: "certificates", result: certificates }];
    let more = more.into_iter();
    findings.extend(more.map(|error| Finding { subject: "certificates", result: Err(error) }));
    findings.extend([
        Finding { subject: "authority", result: authority },
        Finding { subject: "policies", result: policies },
        Finding { subject: "master key", result: master_key },
    ]);
    findings.extend(signing_key.map(|result| Finding { subject: "token signing key", result }));
    findings.extend(telemetry.map(|result| Finding { subject: "telemetry", result }));
    if !config.webhooks.is_empty() {
        findings.push(Finding { subject: "webhooks", result: webhooks(config).await });
    }
    findings.extend(further.map(|result| Finding { subject: "wrappers", result }));
    findings.extend([
        Finding { subject: "data directory", result: data_directory(&config.node.data_dir) },
        Finding { subject: "store", result: store(config) },
        Finding { subject: "anchor", result: anchor::look(config) },
    ]);
    if let Some(archive) = &config.audit.archive {
        let result = writable(&archive.directory).map(|()| archive.directory.display().to_string());
        findings.push(Finding { subject: "audit archive", result });
    }
    if !config.audit.sinks.is_empty() {
        findings.push(Finding { subject: "audit sinks", result: sinks(config).await });
    }
    findings
}

/// The way to the collector, which is not asked.
async fn way(config: &Config, settings: &Telemetry) -> Result<String, AppError> {
    Box::pin(secrets::telemetry(config, settings)).await?;
    Ok(format!("{}, {NOT_ASKED}", settings.collector.endpoint))
}

/// The ways to the receivers of webhooks, which are not asked.
async fn webhooks(config: &Config) -> Result<String, AppError> {
    Box::pin(secrets::webhooks(config)).await?;
    let told = config.webhooks.iter().map(|(name, webhook)| format!("{name} ({})", webhook.url));
    Ok(format!("{}, {NOT_ASKED}", told.collect::<Vec<_>>().join(", ")))
}

fn data_directory(path: &Path) -> Result<String, AppError> {
    let unreadable = |source| AppError::Unreadable { path: path.to_owned(), source };
    let found = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(format!("{} is made by `polykey init`", path.display()));
        }
        found => found.map_err(unreadable)?,
    };
    if !found.is_dir() {
        return Err(unreadable(io::Error::new(io::ErrorKind::NotADirectory, "not a directory")));
    }
    private(path)?;
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
        .map_err(|error| unreadable(error.into()))?;
    Ok(path.display().to_string())
}

/// Whether files can be made in a directory.
fn writable(directory: &Path) -> Result<(), AppError> {
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(directory, access)
        .map_err(|error| AppError::Unreadable { path: directory.to_owned(), source: error.into() })
}

/// A sink that cannot be written is no hindrance to a start: what no node could write is.
async fn sinks(config: &Config) -> Result<String, AppError> {
    Box::pin(secrets::sinks(config)).await?;
    let mut told = Vec::new();
    for (name, sink) in &config.audit.sinks {
        match &sink.target {
            Target::File(file) => {
                let directory = file.path.parent().filter(|p| !p.as_os_str().is_empty());
                let directory = directory.unwrap_or(Path::new("."));
                writable(directory)?;
                told.push(format!("{name} ({})", sink.place()));
            }
            Target::Syslog(syslog) => {
                if let Way::Tls { ca, client, .. } = &syslog.way {
                    tls::read_roots(ca)?;
                    if let Some((certificate, key)) = client {
                        tls::read_certificates(certificate)?;
                        tls::read_key(key)?;
                    }
                }
                told.push(format!("{name} ({}, {NOT_ASKED})", sink.place()));
            }
            Target::Otlp(_) => told.push(format!("{name} ({}, {NOT_ASKED})", sink.place())),
        }
    }
    Ok(told.join(", "))
}

/// Opening a store may repair it, which would be touching it: only the outside is looked at.
fn store(config: &Config) -> Result<String, AppError> {
    if config.storage.database.is_some() {
        let name = super::store::name(config);
        return Ok(format!("{name}, which is asked when the node is started"));
    }
    let path = config.storage.path.as_path();
    use polykey_storage::OpenError;
    let unreadable = |source| AppError::Unreadable { path: path.to_owned(), source };
    let refused = |reason: &str| {
        AppError::Store(OpenError::NotAStore { path: path.to_owned(), reason: reason.into() })
    };
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(format!("{} is made by `polykey init`", path.display()));
        }
        file => file.map_err(unreadable)?,
    };
    if !file.metadata().map_err(unreadable)?.is_file() {
        return Err(refused("it is not a regular file"));
    }
    private(path)?;
    let mut start = [0; MAGIC.len()];
    if file.read_exact(&mut start).is_err() || start != MAGIC {
        return Err(refused("it does not start as a redb file does"));
    }
    // A shared lock is refused while a server has it, and gone with the descriptor.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Ok(format!("{} is in use by a running server", path.display()))
        }
        _ => Ok(format!("{} is there and not in use", path.display())),
    }
}
