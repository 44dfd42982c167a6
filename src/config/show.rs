//! The configuration in effect as names and values, with the source of each. Secrets show as the
//! references they are.

use std::path::Path;
use std::time::Duration;

use polykey_hsm::MasterKeySource;
use polykey_hsm::aws::AwsConnection;

use super::{
    Anchor, AnchorPlace, Bootstrap, Config, DataPlane, Database, LogFormat, Storage, WhenFenced,
    Wrapper,
};
use crate::custody::SlotSpec;
use crate::quotas::Quota;
use crate::rates::Rule;

/// One setting in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, with dots.
    pub name: String,
    /// Its value.
    pub value: String,
    /// "default", or the file and line it stands in.
    pub source: String,
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn time(duration: Duration) -> String {
    match (duration.as_secs(), duration.subsec_millis()) {
        (seconds, 0) => format!("{seconds}s"),
        (_, _) => format!("{}ms", duration.as_millis()),
    }
}

fn place(wrapper: &Wrapper) -> String {
    SlotSpec::of_wrapper("", wrapper).source
}

fn optional<T>(value: Option<T>, text: impl FnOnce(T) -> String) -> String {
    value.map(text).unwrap_or_default()
}

/// How AWS is reached.
fn connection(section: &str, connection: &AwsConnection) -> Vec<(String, String)> {
    let AwsConnection {
        region,
        endpoint_url,
        profile,
        role_arn,
        fips,
        dual_stack,
        connect_timeout,
        attempt_timeout,
    } = connection;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let all = [
        ("region", text(region)),
        ("endpoint_url", text(endpoint_url)),
        ("profile", text(profile)),
        ("role_arn", text(role_arn)),
        ("fips", fips.to_string()),
        ("dual_stack", dual_stack.to_string()),
        ("connect_timeout", time(*connect_timeout)),
        ("attempt_timeout", time(*attempt_timeout)),
    ];
    all.into_iter().map(|(name, value)| (format!("{section}.{name}"), value)).collect()
}

/// Where the store is.
fn stored(storage: &Storage) -> Vec<(String, String)> {
    let Storage { path: file, database, cache_mib, changes, reserve_mib } = storage;
    let mut all = vec![("changes", changes.to_string())];
    match database {
        None => all.extend([
            ("kind", "redb".to_owned()),
            ("path", path(file)),
            ("cache_mib", cache_mib.to_string()),
            ("reserve_mib", reserve_mib.to_string()),
        ]),
        Some(database) => {
            let Database {
                url,
                password,
                schema,
                connections,
                call_timeout,
                transaction_pooler,
                durable,
                name,
                freshness,
                strict,
                when_fenced,
            } = database;
            let when_fenced = match when_fenced {
                WhenFenced::Refuse => "refuse",
                WhenFenced::Read => "read",
            };
            all.extend([
                ("kind", "postgres".to_owned()),
                ("url", url.clone()),
                ("password", optional(password.as_ref(), |source| source.to_string())),
                ("schema", schema.clone()),
                ("connections", connections.to_string()),
                ("call_timeout", time(*call_timeout)),
                ("transaction_pooler", transaction_pooler.to_string()),
                ("durable", durable.to_string()),
                ("name", name.clone().unwrap_or_default()),
                ("freshness", time(*freshness)),
                ("strict", strict.to_string()),
                ("when_fenced", when_fenced.to_owned()),
            ]);
        }
    }
    all.into_iter().map(|(name, value)| (format!("storage.{name}"), value)).collect()
}

/// Every setting, by name.
#[must_use]
pub fn entries(config: &Config) -> Vec<Entry> {
    // Taken apart whole, so that a new section does not compile until it is shown.
    let Config {
        file,
        written,
        node,
        listen,
        storage,
        anchor,
        replication,
        master_key,
        wrappers,
        hardened,
        bootstrap,
        unlock,
        tokens,
        login,
        audit,
        policies,
        limits,
        rates,
        quotas,
        webhooks,
        log,
        telemetry,
        ca,
        runtime,
    } = config;
    let net = &listen.net;
    let (key_kind, key_setting) = match master_key {
        Wrapper::Local(MasterKeySource::Passphrase { .. }) => ("local", "master_key.passphrase"),
        Wrapper::Local(_) => ("local", "master_key.source"),
        Wrapper::Pkcs11(_) => ("pkcs11", "master_key.module"),
        Wrapper::Aws(_) => ("aws", "master_key.key"),
        Wrapper::Quorum(_) => ("quorum", "master_key.of"),
    };
    let in_token = anchor.as_ref().and_then(|anchor| match &anchor.place {
        AnchorPlace::Token { wrapper, label } => Some((wrapper, label)),
        AnchorPlace::File(_) | AnchorPlace::Target => None,
    });
    let in_target = anchor.as_ref().is_some_and(|anchor| anchor.place == AnchorPlace::Target);
    let others = wrappers.iter().map(|(name, wrapper)| {
        let place = place(wrapper);
        match wrapper {
            Wrapper::Local(MasterKeySource::Passphrase { .. }) => {
                format!("{name} (passphrase, {place})")
            }
            Wrapper::Local(_) => format!("{name} ({place})"),
            Wrapper::Pkcs11(_) => format!("{name} (PKCS#11, {place})"),
            Wrapper::Aws(_) => format!("{name} (AWS KMS, {place})"),
            Wrapper::Quorum(_) => format!("{name} (quorum, {place})"),
        }
    });
    let mut all = vec![
        ("node.data_dir", path(&node.data_dir)),
        ("listen.address", listen.address.to_string()),
        ("listen.certificate", path(&listen.tls.certificate)),
        ("listen.key", path(&listen.tls.key)),
        ("listen.client_ca", path(&listen.tls.client_ca)),
        ("listen.crl", optional(listen.tls.crl.as_deref(), path)),
        ("listen.health", optional(listen.health, |health| health.to_string())),
        ("listen.metrics", optional(listen.metrics, |metrics| metrics.to_string())),
        ("listen.allow_common_name", listen.allow_common_name.to_string()),
        ("listen.max_connections", net.max_connections.to_string()),
        ("listen.max_handshakes", net.max_handshakes.to_string()),
        (
            "listen.max_connections_per_address",
            optional(net.max_connections_per_address, |n| n.to_string()),
        ),
        ("listen.handshake_timeout", time(net.handshake_timeout)),
        ("listen.max_in_flight", net.max_requests.to_string()),
        ("listen.max_concurrent_streams", net.max_streams.to_string()),
        ("listen.keepalive_interval", time(net.keepalive_interval)),
        ("listen.keepalive_timeout", time(net.keepalive_timeout)),
        ("listen.connection_age", time(net.max_age.unwrap_or_default())),
        ("listen.connection_age_grace", time(net.max_age_grace)),
        ("listen.drain_timeout", time(net.drain_timeout)),
        ("master_key.kind", key_kind.to_owned()),
        ("anchor.file", optional(anchor.as_ref().and_then(Anchor::file), path)),
        ("anchor.wrapper", optional(in_token, |(wrapper, _)| wrapper.clone())),
        ("anchor.label", optional(in_token, |(_, label)| label.clone())),
        ("anchor.replication", in_target.to_string()),
        (key_setting, place(master_key)),
        ("wrappers", others.collect::<Vec<_>>().join(", ")),
        ("hardened.wrapper", optional(hardened.as_ref(), |h| h.wrapper.clone())),
        ("hardened.cache", optional(hardened.as_ref(), |h| time(h.cache))),
        ("unlock.socket", path(&unlock.socket)),
        ("unlock.when_locked", if unlock.wait { "wait" } else { "exit" }.to_owned()),
        ("tokens.access_ttl", time(tokens.access_ttl)),
        ("tokens.refresh_ttl", time(tokens.refresh_ttl)),
        ("tokens.signing_key", optional(tokens.signing_key.as_ref(), |source| source.to_string())),
        ("login.address_burst", login.address_burst.to_string()),
        ("login.address_interval", time(login.address_interval)),
        ("login.client_burst", login.client_burst.to_string()),
        ("login.client_interval", time(login.client_interval)),
        (
            "audit.data_plane",
            match audit.data_plane {
                DataPlane::Buffered => "buffered".to_owned(),
                DataPlane::Durable => "durable".to_owned(),
            },
        ),
        ("audit.checkpoint_interval", time(audit.checkpoint_interval)),
        (
            "audit.checkpoint_signatures",
            if audit.ml_dsa { "ed25519, ml-dsa-65" } else { "ed25519" }.to_owned(),
        ),
        ("audit.keep", optional(audit.archive.as_ref(), |archive| time(archive.keep))),
        ("audit.archive", optional(audit.archive.as_ref(), |archive| path(&archive.directory))),
        (
            "audit.sinks",
            audit
                .sinks
                .iter()
                .map(|(name, sink)| format!("{name} ({})", sink.place()))
                .collect::<Vec<_>>()
                .join(", "),
        ),
        ("policies.files", policies.iter().map(|p| path(p)).collect::<Vec<_>>().join(", ")),
        ("limits.key_cache", limits.key_cache.to_string()),
        ("limits.directory_cache", limits.directory_cache.to_string()),
        ("limits.decision_cache", limits.decision_cache.to_string()),
        ("limits.key_generations", limits.key_generations.to_string()),
        ("limits.key_generation_queue", limits.key_generation_queue.to_string()),
        ("log.level", log.level.to_string()),
        (
            "log.format",
            match log.format {
                LogFormat::Json => "json".to_owned(),
                LogFormat::Pretty => "pretty".to_owned(),
            },
        ),
        ("ca.certificate", optional(ca.as_ref(), |ca| path(&ca.certificate))),
        ("ca.key", optional(ca.as_ref(), |ca| path(&ca.key))),
        ("runtime.lock_memory", runtime.lock_memory.to_string()),
        ("runtime.sandbox", runtime.sandbox.to_string()),
        (
            "runtime.writable",
            runtime.writable.iter().map(|p| path(p)).collect::<Vec<_>>().join(", "),
        ),
        ("runtime.threads", optional(net.workers, |n| n.to_string())),
        ("runtime.blocking_threads", net.blocking_threads.to_string()),
    ];
    if let Wrapper::Local(MasterKeySource::Passphrase { params, .. }) = master_key {
        let cost = format!(
            "memory_kib = {}, passes = {}, lanes = {}",
            params.memory_kib, params.passes, params.lanes
        );
        all.push(("master_key.argon2", cost));
    }
    all.extend(telemetry.iter().flat_map(|telemetry| telemetry.entries(time)));
    all.extend(replication.iter().flat_map(|replication| replication.entries(time)));
    let mut all: Vec<(String, String)> =
        all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    if let Wrapper::Aws(settings) = master_key {
        all.extend(connection("master_key", &settings.connection));
    }
    all.extend(stored(storage));
    all.extend(rates.iter().flat_map(limited));
    all.extend(quotas.iter().flat_map(counted));
    all.extend(webhooks.iter().flat_map(|(name, webhook)| webhook.entries(name, time)));
    let Bootstrap { aws, deadline } = bootstrap;
    all.extend(connection("bootstrap", aws));
    all.push(("bootstrap.deadline".to_owned(), time(*deadline)));
    all.sort_unstable();
    let source = |name: &str| {
        written
            .get(name)
            .map_or_else(|| "default".to_owned(), |line| format!("{}:{line}", file.display()))
    };
    let entry = |(name, value): (String, String)| Entry { source: source(&name), name, value };
    all.into_iter().map(entry).collect()
}

fn limited(rule: &Rule) -> Vec<(String, String)> {
    let Rule { name, tier, client, methods, per_second, burst } = rule;
    let mut all = vec![("per_second", per_second.to_string()), ("burst", burst.to_string())];
    all.extend(tier.iter().map(|tier| ("tier", tier.clone())));
    all.extend(client.iter().map(|client| ("client", client.clone())));
    if !methods.is_empty() {
        all.push(("methods", methods.join(", ")));
    }
    all.into_iter().map(|(key, value)| (format!("rates.{name}.{key}"), value)).collect()
}

fn counted(quota: &Quota) -> Vec<(String, String)> {
    let Quota { name, tier, client, keys } = quota;
    let mut all = vec![("keys", keys.to_string())];
    all.extend(tier.iter().map(|tier| ("tier", tier.clone())));
    all.extend(client.iter().map(|client| ("client", client.clone())));
    all.into_iter().map(|(key, value)| (format!("quotas.{name}.{key}"), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "[node]\ndata_dir = \"d\"\n\n[listen]\ncertificate = \"c\"\nkey = \"k\"\n\
        client_ca = \"a\"\n\n[master_key]\nsource = { env = \"CANARY_NAME\" }\n\n[log]\n\
        level = \"warn\"\n";

    #[test]
    fn each_setting_shows_its_value_and_where_it_stands() {
        let config = Config::parse(Path::new("/x/p.toml"), TEXT).unwrap();
        let entries = entries(&config);
        let of = |name: &str| entries.iter().find(|e| e.name == name).unwrap();
        assert_eq!(
            (of("log.level").value.as_str(), of("log.level").source.as_str()),
            ("warn", "/x/p.toml:13")
        );
        assert_eq!(of("log.format").source, "default");
        assert_eq!(of("listen.certificate").value, "/x/c");
        assert_eq!(of("master_key.source").value, "environment variable CANARY_NAME");
        let shown: Vec<&str> = config.written.keys().map(String::as_str).collect();
        assert!(shown.iter().all(|name| entries.iter().any(|e| e.name == *name)), "{shown:?}");
        assert!(entries.is_sorted_by_key(|e| &e.name));
    }
}
