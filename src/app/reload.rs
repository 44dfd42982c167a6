//! What is read again while the node runs: certificates, revocation lists and policies, and of the
//! configuration the level of the log, the rules of rates and quotas and the way of telemetry. What
//! is broken keeps what was in force.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{App, AppError, event, secrets};
use crate::authz::{Authorizer, DEFAULTS, PolicyFile};
use crate::config::Config;
use crate::hardening;
use crate::metrics::port::Gather;
use crate::rpc::admin::Reload;
use crate::telemetry;
use crate::telemetry::otlp::send::Sender;

/// Largest policy file that is read, in bytes.
const MAX_POLICY: u64 = 1024 * 1024;

/// A way of telemetry.
pub(super) type Way = (crate::config::Telemetry, Sender);

/// What a reload did.
#[derive(Debug)]
pub struct Reloaded {
    /// Certificates and lists; what was in force stays after an error.
    pub certificates: Result<(), AppError>,
    /// Policies; the same.
    pub policies: Result<(), AppError>,
    /// Level of the log and way of telemetry; the same.
    pub settings: Result<(), AppError>,
}

/// The policies that a configuration names, compiled with the shipped ones.
pub(super) fn policies(config: &Config) -> Result<Authorizer, AppError> {
    let mut files = Vec::new();
    for path in &config.policies {
        let unreadable = |source| AppError::Unreadable { path: path.clone(), source };
        let size = fs::metadata(path).map_err(unreadable)?.len();
        if size > MAX_POLICY {
            let text = format!("larger than {MAX_POLICY} bytes; name a Cedar policy file");
            return Err(unreadable(std::io::Error::other(text)));
        }
        let text = fs::read_to_string(path).map_err(unreadable)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push(PolicyFile { name, text });
    }
    let authorizer = Authorizer::new(DEFAULTS, &files)?;
    Ok(authorizer.with_memo(config.limits.decision_cache))
}

impl App {
    /// Reads certificates, revocation lists and policies again, and of the configuration what can change
    /// in a node that runs.
    pub async fn reload(self: &Arc<Self>) -> Reloaded {
        let certificates = self.reload_certificates().await;
        self.reloaded("ReloadCertificates", &certificates).await;
        let config = Arc::clone(&self.config);
        let policies = run(move || policies(&config)).await.map(|authorizer| {
            self.authorizer.store(Arc::new(authorizer));
        });
        self.reloaded("ReloadPolicies", &policies).await;
        let settings = self.reload_settings().await;
        self.reloaded("ReloadSettings", &settings).await;
        Reloaded { certificates, policies, settings }
    }

    async fn reload_settings(self: &Arc<Self>) -> Result<(), AppError> {
        let file = self.config.file.clone();
        let fresh = run(move || Ok(Config::load(&file)?)).await?;
        if !hardening::fits(&self.config, &fresh) {
            return Err(AppError::NeedsRestart);
        }
        // All that can fail comes first, so that what is broken changes nothing.
        let to = self.way(&fresh).await?;
        telemetry::set_level(fresh.log.level)?;
        // Also where the section is the same: what it refers to may not be.
        self.lead_to(to);
        // Rules that are the same keep their full and empty buckets.
        if self.authenticator.rates().rules() != fresh.rates {
            self.authenticator.limit(&fresh.rates);
        }
        self.keyring.limit(&fresh.quotas);
        Ok(())
    }

    /// The way that a configuration leads telemetry, if it does.
    pub(super) async fn way(&self, config: &Config) -> Result<Option<Way>, AppError> {
        let Some(settings) = config.telemetry.clone() else { return Ok(None) };
        let sender = Box::pin(secrets::telemetry(config, &settings)).await?;
        Ok(Some((settings, sender)))
    }

    /// Leads telemetry this way from now on.
    pub(super) fn lead_to(self: &Arc<Self>, way: Option<Way>) {
        let app = Arc::downgrade(self);
        let gather: Gather = Arc::new(move || app.upgrade().map(|app| app.figures()));
        self.telemetry.lead_to(way, &gather);
    }

    async fn reload_certificates(&self) -> Result<(), AppError> {
        let texts = Box::pin(secrets::tls(&self.config)).await?;
        let tls = Arc::clone(&self.tls);
        run(move || tls.reload_with(&texts).map_err(AppError::from)).await
    }

    async fn reloaded(&self, action: &str, result: &Result<(), AppError>) {
        match result {
            Ok(()) => {
                tracing::info!(action, "reloaded");
                if let Err(error) = self.trail.record(event(action, self.clock.now())).await {
                    tracing::error!(%error, action, "the reload is not in the audit trail");
                }
            }
            Err(error) => tracing::error!(%error, action, "kept what was in force"),
        }
    }

    /// Reads certificates again if their files have changed since `seen`, which is brought up to
    /// date when that works.
    pub(super) async fn reload_changed(self: &Arc<Self>, seen: &mut Vec<Stamp>) {
        let now = stamps(&self.config);
        if *seen == now {
            return;
        }
        let result = self.reload_certificates().await;
        self.reloaded("ReloadCertificates", &result).await;
        if result.is_ok() {
            *seen = now;
        }
    }
}

/// What a caller who asks for a reload gets done. It keeps no node alive.
pub(super) fn asked_for(app: &Arc<App>) -> Reload {
    let app = Arc::downgrade(app);
    Box::new(move || {
        let app = app.clone();
        Box::pin(async move {
            let Some(app) = app.upgrade() else { return Vec::new() };
            let Reloaded { certificates, policies, settings } = app.reload().await;
            let problem =
                |result: Result<(), AppError>| result.err().map(|error| error.to_string());
            vec![
                ("certificates", problem(certificates)),
                ("policies", problem(policies)),
                ("settings", problem(settings)),
            ]
        })
    })
}

/// Off the threads of requests: files may be on slow disks, and policies take a while to compile.
async fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AppError> + Send + 'static,
) -> Result<T, AppError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(AppError::Process(std::io::Error::other(error))))
}

/// By what a file is told from its successor.
pub(super) type Stamp = (PathBuf, Option<(u64, i64, i64, u64)>);

/// The stamps of all TLS files.
pub(super) fn stamps(config: &Config) -> Vec<Stamp> {
    let files = &config.listen.tls;
    let all =
        [Some(&files.certificate), Some(&files.key), Some(&files.client_ca), files.crl.as_ref()];
    let stamp = |path: &Path| {
        let found = fs::metadata(path).ok();
        found.map(|found| (found.ino(), found.mtime(), found.mtime_nsec(), found.size()))
    };
    all.into_iter().flatten().map(|path| (path.clone(), stamp(path))).collect()
}
