//! What a configuration refers to in the place of a file: read at the start, and TLS material again
//! with each reload.

use std::collections::BTreeMap;
use std::sync::Arc;

use polykey_hsm::{Deadline, SecretSource, bootstrap, decode_key};
use zeroize::Zeroizing;

use super::{AppError, event};
use crate::config::sinks::Target;
use crate::config::telemetry::Collector;
use crate::config::{Config, Telemetry, TlsReferences};
use crate::custody::signing::{self, Purpose};
use crate::error::Error;
use crate::net::tls::TlsTexts;
use crate::telemetry::otlp::send::{Secrets, Sender};
use crate::time::Clock;
use crate::vault::Vault;
use crate::webhook;

/// A setting whose reference gives nothing, and why. No values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The setting, as in `[listen] key`.
    pub setting: &'static str,
    /// Place and reason.
    pub text: String,
    /// Whether the place gave no answer.
    pub away: bool,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.setting, self.text)
    }
}

async fn resolve(
    config: &Config,
    wanted: &[(&'static str, &SecretSource)],
) -> Result<Vec<Zeroizing<Vec<u8>>>, AppError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let sources: Vec<SecretSource> = wanted.iter().map(|(_, source)| (*source).clone()).collect();
    let deadline = Deadline::after(config.bootstrap.deadline);
    let found = Box::pin(bootstrap::resolve(&sources, &config.bootstrap.aws, deadline)).await;
    found.map_err(|problems| {
        let name = |problem: bootstrap::Problem| Missing {
            setting: wanted.get(problem.index).map_or("a reference", |(setting, _)| setting),
            text: problem.text,
            away: problem.away,
        };
        AppError::Secrets(problems.into_iter().map(name).collect())
    })
}

/// The TLS material that is referred to.
pub(super) async fn tls(config: &Config) -> Result<TlsTexts, AppError> {
    let TlsReferences { certificate, key, client_ca, crl } = &config.listen.references;
    let mut texts = TlsTexts::default();
    let places = [
        ("[listen] certificate", certificate, &mut texts.certificate),
        ("[listen] key", key, &mut texts.key),
        ("[listen] client_ca", client_ca, &mut texts.client_ca),
        ("[listen] crl", crl, &mut texts.crl),
    ];
    let (mut wanted, mut into) = (Vec::new(), Vec::new());
    for (setting, source, place) in places {
        if let Some(source) = source {
            wanted.push((setting, source));
            into.push(place);
        }
    }
    for (place, text) in into.into_iter().zip(resolve(config, &wanted).await?) {
        *place = Some(Arc::new(text));
    }
    Ok(texts)
}

/// The way to the collector of telemetry.
pub(super) async fn telemetry(config: &Config, settings: &Telemetry) -> Result<Sender, AppError> {
    let names = ("[telemetry] ca", "[telemetry] headers");
    let secrets = Box::pin(collector(config, &settings.collector, names)).await?;
    Ok(Sender::new(&settings.collector, secrets)?)
}

/// The ways to the collectors that are sinks of the audit log, by the names of the sinks.
pub(super) async fn sinks(config: &Config) -> Result<BTreeMap<String, Sender>, AppError> {
    let names = ("[audit.sinks] ca", "[audit.sinks] headers");
    let mut senders = BTreeMap::new();
    for (name, sink) in &config.audit.sinks {
        if let Target::Otlp(settings) = &sink.target {
            let secrets = Box::pin(collector(config, settings, names)).await?;
            senders.insert(name.clone(), Sender::new(settings, secrets)?);
        }
    }
    Ok(senders)
}

/// What the settings of a collector refer to.
async fn collector(
    config: &Config,
    settings: &Collector,
    (ca_name, headers_name): (&'static str, &'static str),
) -> Result<Secrets, AppError> {
    let mut secrets = Secrets::default();
    let mut wanted = Vec::new();
    let ca = settings.ca.as_ref().map(|(path, reference)| {
        reference.clone().unwrap_or_else(|| SecretSource::File(path.clone()))
    });
    wanted.extend(ca.as_ref().map(|source| (ca_name, source)));
    wanted.extend(settings.headers.values().map(|source| (headers_name, source)));
    let mut found = resolve(config, &wanted).await?.into_iter();
    if ca.is_some() {
        secrets.ca = found.next();
    }
    for ((name, source), value) in settings.headers.iter().zip(found) {
        let text = std::str::from_utf8(&value).map_err(|_| {
            let text = format!("{source}: not text");
            AppError::Secrets(vec![Missing { setting: headers_name, text, away: false }])
        })?;
        let text = Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned());
        secrets.headers.push((name.clone(), text));
    }
    Ok(secrets)
}

/// The ways to the receivers of webhooks, by their names.
pub(super) async fn webhooks(
    config: &Config,
) -> Result<Vec<(String, Vec<webhook::Kind>, webhook::Sender)>, AppError> {
    const SECRET: &str = "[webhooks] secret";
    const CA: &str = "[webhooks] ca";
    const HEADERS: &str = "[webhooks] headers";
    let mut ways = Vec::new();
    for (name, settings) in &config.webhooks {
        let ca = settings.ca.as_ref().map(|(path, reference)| {
            reference.clone().unwrap_or_else(|| SecretSource::File(path.clone()))
        });
        let mut wanted = vec![(SECRET, &settings.secret)];
        wanted.extend(ca.as_ref().map(|source| (CA, source)));
        wanted.extend(settings.headers.values().map(|source| (HEADERS, source)));
        let mut found = resolve(config, &wanted).await?.into_iter();
        let secret = found.next().unwrap_or_default();
        let ca = if ca.is_some() { found.next() } else { None };
        let headers = settings.headers.keys().cloned().zip(found).collect();
        let secrets = webhook::Secrets { secret, ca, headers };
        let sender = webhook::Sender::new(name, settings, secrets)?;
        ways.push((name.clone(), settings.events.clone(), sender));
    }
    Ok(ways)
}

/// The seed that signs tokens, if one is referred to.
pub(super) async fn signing_key(config: &Config) -> Result<Option<Zeroizing<Vec<u8>>>, AppError> {
    const SETTING: &str = "[tokens] signing_key";
    let Some(source) = &config.tokens.signing_key else { return Ok(None) };
    let found = resolve(config, &[(SETTING, source)]).await?;
    let seed = found.first().and_then(|value| decode_key(value));
    seed.map(Some).ok_or_else(|| {
        let text = format!("{source}: not a seed of 32 bytes, raw, in hexadecimal or in base64");
        AppError::Secrets(vec![Missing { setting: SETTING, text, away: false }])
    })
}

/// What gives the password of a database each time a connection is made. Only a parameter of SSM is
/// read once.
#[cfg(feature = "postgres")]
pub(super) async fn password(
    config: &Config,
    source: &SecretSource,
    setting: &'static str,
) -> Result<polykey_storage::postgres::PasswordSource, AppError> {
    let first = resolve(config, &[(setting, source)]).await?;
    let first = first.into_iter().next().unwrap_or_default();
    let text = |bytes: &[u8]| {
        let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
        Ok(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned()))
    };
    let source = source.clone();
    Ok(match source {
        SecretSource::Ssm(_) => Arc::new(move || text(&first)),
        source => Arc::new(move || {
            let read = source.read_now().map_err(|error| error.to_string())?;
            text(&read)
        }),
    })
}

/// Makes the seed the key that signs tokens, unless the store has seen it before: then the roll-over
/// of keys is the store's business.
pub(super) async fn adopt(
    vault: &Vault,
    config: &Config,
    seed: &[u8],
    clock: &Clock,
) -> Result<(), AppError> {
    let event = event("ImportSigningKey", clock.now());
    let verify_for = config.tokens.refresh_ttl;
    match signing::import(vault, Purpose::Token, seed, verify_for, event).await {
        Ok(_) | Err(Error::Conflict) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
