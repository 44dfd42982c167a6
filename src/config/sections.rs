//! What each section of the configuration may say, in which range, and what holds when it is silent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use polykey_hsm::aws::AwsConnection;
use toml::de::DeValue;
use tracing::level_filters::LevelFilter;

use super::read::{ConfigErrors, Document, Refused, Section, days, path, refuse, string};
use super::{
    Anchor, AnchorPlace, Archiving, Audit, Bootstrap, Ca, Config, DataPlane, Hardened, Limits,
    Listen, Log, LogFormat, Login, Node, Runtime, Storage, TlsReferences, Tokens, Tolerate, Unlock,
    Wrapper, replication, sinks, wrapper,
};
use crate::authn::layer::WITHOUT_TOKEN;
use crate::custody::MASTER_KEY;
use crate::net::NetConfig;
use crate::net::tls::TlsFiles;
use crate::quotas::Quota;
use crate::rates::Rule;
use crate::rpc::methods::METHODS;

/// Where a node listens unless it is told otherwise.
pub(crate) const DEFAULT_ADDRESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 50053);

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

pub(super) fn config(file: &Path, text: &str) -> Result<Config, ConfigErrors> {
    let document = Document::new(file, text);
    let table = document.parse();
    let root = Section::root(&document, &table);
    let node = node(root.section("node"));
    let listen = listen(root.section("listen"));
    let storage = super::storage::storage(root.section("storage"), node.as_ref());
    let replicated = root.section("replication");
    if replicated.present() && storage.as_ref().is_some_and(|storage| storage.database.is_some()) {
        replicated.note(
            "[replication]: the store is in a database, which replicates it by its own means",
            "remove the section",
        );
    }
    let replication = replication::section(replicated);
    let master_key = wrapper::section(root.section("master_key"));
    let others = root.section("wrappers");
    let wrappers = wrapper::sections(&others);
    let is_quorum = |wrapper: &Wrapper| matches!(wrapper, Wrapper::Quorum(_));
    let known = |name: &str| match name {
        MASTER_KEY => Some(master_key.as_ref().is_some_and(is_quorum)),
        _ => wrappers.get(name).map(is_quorum),
    };
    let first = master_key.as_ref().map(|wrapper| (MASTER_KEY, wrapper));
    for quorum in first.into_iter().chain(wrappers.iter().map(|(n, w)| (n.as_str(), w))) {
        wrapper::check_quorums(&others, quorum, known);
    }
    let unlock = unlock(root.section("unlock"), node.as_ref());
    let replicated = root.has("replication");
    let keys = (master_key.as_ref(), &wrappers);
    let anchor = anchor(root.section("anchor"), storage.as_ref(), keys, replicated);
    let hardened = hardened(root.section("hardened"), master_key.as_ref(), &wrappers);
    let bootstrap = bootstrap(root.section("bootstrap"));
    let tokens = tokens(root.section("tokens"));
    let login = login(root.section("login"));
    let audit = audit(root.section("audit"));
    let policies = policies(root.section("policies"));
    let limits = limits(root.section("limits"));
    let rates = rates(&root.section("rates"));
    let quotas = quotas(&root.section("quotas"));
    let webhooks = super::webhooks::sections(&root.section("webhooks"));
    let log = log(root.section("log"));
    let telemetry = super::telemetry::section(root.section("telemetry"));
    let ca = ca(root.section("ca"));
    let (runtime, workers, blocking_threads) = runtime(root.section("runtime"));
    root.finish();
    let problems = document.problems();
    let (Some(node), Some(mut listen), Some(storage), Some(master_key), Some(unlock), true) =
        (node, listen, storage, master_key, unlock, problems.is_empty())
    else {
        return Err(ConfigErrors(problems));
    };
    listen.net.workers = workers;
    listen.net.blocking_threads = blocking_threads;
    Ok(Config {
        file: file.to_owned(),
        written: document.written(&table),
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
    })
}

fn node(section: Section<'_, '_>) -> Option<Node> {
    let data_dir = section.need_path("data_dir", "\"/var/lib/polykey\"");
    section.finish();
    Some(Node { data_dir: data_dir? })
}

fn address(value: &DeValue<'_>) -> Result<SocketAddr, Refused> {
    string(value)?.parse().or_else(|_| {
        refuse(
            "not an address with a port",
            "write an IP address and a port, such as \"127.0.0.1:50053\" or \"[::]:50053\"",
        )
    })
}

fn loopback(value: &DeValue<'_>) -> Result<SocketAddr, Refused> {
    match address(value)? {
        found if found.ip().is_loopback() => Ok(found),
        _ => refuse(
            "this port speaks no TLS and must be on loopback",
            "write 127.0.0.1 or [::1] and a port",
        ),
    }
}

fn listen(section: Section<'_, '_>) -> Option<Listen> {
    let defaults = NetConfig::default();
    let certificate = section.need_pem("certificate", "\"server.pem\"");
    let key = section.need_pem("key", "\"server.key\"");
    let client_ca = section.need_pem("client_ca", "\"client-ca.pem\"");
    let crl = section.pem("crl");
    let socket = section.get("address", address).unwrap_or(DEFAULT_ADDRESS);
    let health = section.get("health", loopback);
    let metrics = section.get("metrics", loopback);
    let same = |one: SocketAddr, other: SocketAddr| one == other && one.port() != 0;
    for (key, port, others) in [
        ("health", health, [("address", Some(socket)), ("metrics", None)]),
        ("metrics", metrics, [("address", Some(socket)), ("health", health)]),
    ] {
        for (name, other) in others {
            if port.zip(other).is_some_and(|(port, other)| same(port, other)) {
                let remedy = "give it another port".to_owned();
                section.complain(key, (format!("the same as `{name}`"), remedy));
            }
        }
    }
    let max_age =
        section.duration("connection_age", ("0s", "168h"), defaults.max_age.unwrap_or_default());
    let net = NetConfig {
        max_connections: section.integer(
            "max_connections",
            1..=1_000_000,
            defaults.max_connections,
        ),
        max_handshakes: section.integer("max_handshakes", 1..=1_000_000, defaults.max_handshakes),
        max_connections_per_address: section
            .get("max_connections_per_address", |v| super::read::integer(v, &(1..=1_000_000))),
        handshake_timeout: section.duration(
            "handshake_timeout",
            ("100ms", "5m"),
            defaults.handshake_timeout,
        ),
        max_requests: section.integer("max_in_flight", 1..=1_000_000, defaults.max_requests),
        max_streams: section.integer("max_concurrent_streams", 1..=65_536, defaults.max_streams),
        keepalive_interval: section.duration(
            "keepalive_interval",
            ("1s", "1h"),
            defaults.keepalive_interval,
        ),
        keepalive_timeout: section.duration(
            "keepalive_timeout",
            ("1s", "1h"),
            defaults.keepalive_timeout,
        ),
        max_age: (!max_age.is_zero()).then_some(max_age),
        max_age_grace: section.duration(
            "connection_age_grace",
            ("0s", "24h"),
            defaults.max_age_grace,
        ),
        drain_timeout: section.duration("drain_timeout", ("0s", "10m"), defaults.drain_timeout),
        ..defaults
    };
    if net.max_handshakes > net.max_connections {
        section.complain(
            "max_handshakes",
            ("more than `max_connections`".to_owned(), "make it at most as large".to_owned()),
        );
    }
    let allow_common_name = section.boolean("allow_common_name", false);
    section.finish();
    let (certificate, key, client_ca) = (certificate?, key?, client_ca?);
    let (crl, crl_reference) = crl.unzip();
    let references = TlsReferences {
        certificate: certificate.1,
        key: key.1,
        client_ca: client_ca.1,
        crl: crl_reference.flatten(),
    };
    let tls = TlsFiles { certificate: certificate.0, key: key.0, client_ca: client_ca.0, crl };
    Some(Listen { address: socket, tls, references, net, allow_common_name, health, metrics })
}

fn anchor(
    section: Section<'_, '_>,
    storage: Option<&Storage>,
    (master_key, wrappers): (Option<&Wrapper>, &BTreeMap<String, Wrapper>),
    replicated: bool,
) -> Option<Anchor> {
    let wrapper = section.get("wrapper", |value| {
        let name = string(value)?;
        let remedy = "name the [wrappers.NAME] of a PKCS#11 token, or give a file instead";
        match if name == MASTER_KEY { master_key } else { wrappers.get(name) } {
            Some(Wrapper::Pkcs11(_)) => Ok(name.to_owned()),
            Some(_) => refuse("not the wrapper of a PKCS#11 token", remedy),
            None => refuse("there is no wrapper of this name", remedy),
        }
    });
    let label = section.get("label", |value| {
        let label = string(value)?;
        let fine = (1..=64).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_graphic());
        match fine {
            true => Ok(label.to_owned()),
            false => refuse("not a label", "write 1 to 64 printable ASCII characters, no spaces"),
        }
    });
    let in_token = section.has("wrapper");
    let in_target = section.boolean("replication", false);
    let file = match section.present() && !in_token && !in_target {
        true => section.need_path("file", "\"/mnt/other-medium/polykey.anchor\""),
        false => None,
    };
    let refused = |what: &str, remedy: &str| (what.to_owned(), remedy.to_owned());
    if file.as_ref().is_some_and(|file| storage.is_some_and(|storage| storage.path == *file)) {
        section.complain("file", refused("the store itself", "name a file on another medium"));
    }
    if in_token && section.has("file") {
        section.complain("file", refused("there is a wrapper, too", "keep one of the two"));
    }
    if in_target && (in_token || section.has("file")) {
        section.complain("replication", refused("there is another place, too", "keep one of them"));
    }
    if in_target && !replicated {
        let remedy = "add [replication], or name another place";
        section.complain("replication", refused("there is no [replication]", remedy));
    }
    if !in_token && label.is_some() {
        section.complain("label", refused("of an object in a token", "name its wrapper as well"));
    }
    section.finish();
    let place = match wrapper {
        Some(wrapper) => {
            let label = label.unwrap_or_else(|| "polykey-anchor".to_owned());
            AnchorPlace::Token { wrapper, label }
        }
        None if in_target => AnchorPlace::Target,
        None => AnchorPlace::File(file?),
    };
    Some(Anchor { place, tolerate: Tolerate::Nothing })
}

/// How AWS is reached: the same keys wherever it is.
pub(super) fn connection(section: &Section<'_, '_>) -> AwsConnection {
    let text = |key| section.get(key, |value| string(value).map(str::to_owned));
    let default = AwsConnection::default();
    AwsConnection {
        region: text("region"),
        endpoint_url: text("endpoint_url"),
        profile: text("profile"),
        role_arn: text("role_arn"),
        fips: section.boolean("fips", false),
        dual_stack: section.boolean("dual_stack", false),
        connect_timeout: section.duration(
            "connect_timeout",
            ("100ms", "30s"),
            default.connect_timeout,
        ),
        attempt_timeout: section.duration(
            "attempt_timeout",
            ("100ms", "30s"),
            default.attempt_timeout,
        ),
    }
}

fn bootstrap(section: Section<'_, '_>) -> Bootstrap {
    let aws = connection(&section);
    let deadline = section.duration("deadline", ("100ms", "5m"), Duration::from_secs(15));
    section.finish();
    Bootstrap { aws, deadline }
}

fn hardened(
    section: Section<'_, '_>,
    master_key: Option<&Wrapper>,
    wrappers: &BTreeMap<String, Wrapper>,
) -> Option<Hardened> {
    if !section.present() {
        return None;
    }
    let wrapper = section.need("wrapper", "\"NAME\"", |value| {
        let name = string(value)?;
        let remedy = "name the [wrappers.NAME] of a hardware module or cloud service";
        let named = if name == MASTER_KEY { master_key } else { wrappers.get(name) };
        match named {
            Some(Wrapper::Local(_)) => {
                refuse("a key file or passphrase, which protects nothing more", remedy)
            }
            Some(Wrapper::Quorum(_)) => refuse("a quorum, which wraps the root key alone", remedy),
            Some(Wrapper::Aws(_) | Wrapper::Pkcs11(_)) => Ok(name.to_owned()),
            None => refuse("there is no wrapper of this name", remedy),
        }
    });
    let cache = section.duration("cache", ("0s", "24h"), 5 * MINUTE);
    section.finish();
    wrapper.map(|wrapper| Hardened { wrapper, cache })
}

fn unlock(section: Section<'_, '_>, node: Option<&Node>) -> Option<Unlock> {
    let socket = section.path("socket");
    let words = [("exit", false), ("wait", true)];
    let wait = section.word("when_locked", &words, false);
    section.finish();
    Some(Unlock { socket: socket.or_else(|| Some(node?.data_dir.join("polykey.sock")))?, wait })
}

fn tokens(section: Section<'_, '_>) -> Tokens {
    let tokens = Tokens {
        access_ttl: section.duration("access_ttl", ("1m", "24h"), 15 * MINUTE),
        refresh_ttl: section.duration("refresh_ttl", ("5m", "2160h"), 24 * HOUR),
        signing_key: section.reference("signing_key"),
    };
    if tokens.refresh_ttl <= tokens.access_ttl {
        let key = if section.get("refresh_ttl", |_| Ok(())).is_some() {
            "refresh_ttl"
        } else {
            "access_ttl"
        };
        section.complain(
            key,
            (
                "refresh tokens would not outlive access tokens".to_owned(),
                "make `refresh_ttl` longer than `access_ttl`".to_owned(),
            ),
        );
    }
    section.finish();
    tokens
}

fn login(section: Section<'_, '_>) -> Login {
    let login = Login {
        address_burst: section.integer("address_burst", 1..=10_000, 20),
        address_interval: section.duration(
            "address_interval",
            ("10ms", "1h"),
            Duration::from_secs(3),
        ),
        client_burst: section.integer("client_burst", 1..=10_000, 10),
        client_interval: section.duration(
            "client_interval",
            ("10ms", "1h"),
            Duration::from_secs(6),
        ),
    };
    section.finish();
    login
}

fn audit(section: Section<'_, '_>) -> Audit {
    let words = [("buffered", DataPlane::Buffered), ("durable", DataPlane::Durable)];
    let audit = Audit {
        data_plane: section.word("data_plane", &words, DataPlane::Buffered),
        checkpoint_interval: section.duration("checkpoint_interval", ("1s", "24h"), MINUTE),
        ml_dsa: section.get("checkpoint_signatures", signatures).unwrap_or(false),
        archive: archiving(&section),
        sinks: section.inner("sinks").map(|sinks| sinks::sections(&sinks)).unwrap_or_default(),
    };
    section.finish();
    audit
}

/// Whether ML-DSA-65 is among the signatures of checkpoints; Ed25519 always is.
fn signatures(value: &DeValue<'_>) -> Result<bool, Refused> {
    const REMEDY: &str = "write [\"ed25519\"], or [\"ed25519\", \"ml-dsa-65\"]";
    let Some(list) = value.as_array() else {
        return refuse(format!("a {}, not a list", value.type_str()), REMEDY);
    };
    let words: Vec<Option<&str>> = list.iter().map(|item| item.get_ref().as_str()).collect();
    match words.as_slice() {
        [Some("ed25519")] => Ok(false),
        [Some("ed25519"), Some("ml-dsa-65")] | [Some("ml-dsa-65"), Some("ed25519")] => Ok(true),
        _ => refuse("not the signatures that a checkpoint may have", REMEDY),
    }
}

/// Leaves go nowhere but into archives: nothing is ever just deleted.
fn archiving(section: &Section<'_, '_>) -> Option<Archiving> {
    let keep = section.get("keep", |value| days(value, ("1s", "36500d")));
    let directory = section.path("archive");
    let complain = |key, what: &str, remedy: &str| {
        section.complain(key, (what.to_owned(), remedy.to_owned()));
    };
    if section.has("keep") && !section.has("archive") {
        complain(
            "keep",
            "leaves are never just deleted",
            "name the directory for what is older in `archive`, or remove it",
        );
    }
    if section.has("archive") && !section.has("keep") {
        complain("archive", "nothing is archived without `keep`", "add `keep`, or remove it");
    }
    Some(Archiving { keep: keep?, directory: directory? })
}

fn policies(section: Section<'_, '_>) -> Vec<PathBuf> {
    let files = paths(&section, "files", "files, such as [\"policies/team.cedar\"]");
    section.finish();
    files
}

fn paths(section: &Section<'_, '_>, key: &'static str, of: &str) -> Vec<PathBuf> {
    let files = section.get(key, |value| {
        let remedy = format!("write a list of {of}");
        let Some(list) = value.as_array() else {
            return refuse(format!("a {}, not a list", value.type_str()), &remedy);
        };
        let mut files = Vec::new();
        for item in list.iter() {
            let file = path(section.document, item.get_ref())?;
            if files.contains(&file) {
                return refuse("a path stands in it twice", "name each one once");
            }
            files.push(file);
        }
        Ok(files)
    });
    files.unwrap_or_default()
}

fn limits(section: Section<'_, '_>) -> Limits {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let limits = Limits {
        key_cache: section.integer("key_cache", 16..=10_000_000, 65_536),
        directory_cache: section.integer("directory_cache", 16..=10_000_000, 16_384),
        decision_cache: section.integer("decision_cache", 0..=10_000_000, 32_768),
        key_generations: section.integer("key_generations", 1..=1_024, cores),
        key_generation_queue: section.integer("key_generation_queue", 0..=100_000, 64),
    };
    section.finish();
    limits
}

/// Every rule by its name, in the order of their names.
fn rates(section: &Section<'_, '_>) -> Vec<Rule> {
    let mut rules = Vec::new();
    for (name, _, section) in section.each() {
        let Some(section) = section else { continue };
        let per_second = section.need("per_second", "100", some);
        let burst = section.get("burst", some).or(per_second);
        let (tier, client) = about(&section);
        let methods = section.get("methods", methods).unwrap_or_default();
        section.finish();
        if let (Some(per_second), Some(burst)) = (per_second, burst) {
            rules.push(Rule { name, tier, client, methods, per_second, burst });
        }
    }
    rules.sort_by(|a, b| a.name.cmp(&b.name));
    rules
}

fn some(value: &DeValue<'_>) -> Result<NonZeroU32, Refused> {
    let number: u32 = super::read::integer(value, &(1..=1_000_000))?;
    NonZeroU32::new(number)
        .map_or_else(|| refuse("zero", "write a whole number from 1 to 1000000"), Ok)
}

/// The tier and the client that a rule is about, where it names them.
fn about(section: &Section<'_, '_>) -> (Option<String>, Option<String>) {
    let tier = section.get("tier", |value| match string(value)? {
        tier @ ("free" | "pro" | "enterprise") => Ok(tier.to_owned()),
        _ => refuse("no tier", "write \"free\", \"pro\" or \"enterprise\""),
    });
    (tier, section.get("client", |value| string(value).map(str::to_owned)))
}

/// Every quota by its name, in the order of their names.
fn quotas(section: &Section<'_, '_>) -> Vec<Quota> {
    let mut quotas = Vec::new();
    for (name, _, section) in section.each() {
        let Some(section) = section else { continue };
        let keys = section.need("keys", "1000", some);
        let (tier, client) = about(&section);
        section.finish();
        quotas.extend(keys.map(|keys| Quota { name, tier, client, keys }));
    }
    quotas.sort_by(|a, b| a.name.cmp(&b.name));
    quotas
}

fn methods(value: &DeValue<'_>) -> Result<Vec<String>, Refused> {
    let remedy = "write a list of methods, such as [\"CreateKey\", \"Encrypt\"]";
    let Some(list) = value.as_array() else {
        return refuse(format!("a {}, not a list", value.type_str()), remedy);
    };
    // What is asked before a token is looked at is limited by [login] and [listen].
    let counted = METHODS.iter().filter(|method| !WITHOUT_TOKEN.contains(&method.path));
    let known =
        |name: &str| counted.clone().any(|method| method.path.rsplit('/').next() == Some(name));
    let mut methods = Vec::new();
    for item in list.iter() {
        match string(item.get_ref())? {
            name if known(name) => methods.push(name.to_owned()),
            _ => return refuse("no method, or one that needs no token", remedy),
        }
    }
    Ok(methods)
}

fn log(section: Section<'_, '_>) -> Log {
    let levels = [
        ("off", LevelFilter::OFF),
        ("error", LevelFilter::ERROR),
        ("warn", LevelFilter::WARN),
        ("info", LevelFilter::INFO),
        ("debug", LevelFilter::DEBUG),
        ("trace", LevelFilter::TRACE),
    ];
    let formats = [("json", LogFormat::Json), ("pretty", LogFormat::Pretty)];
    let log = Log {
        level: section.word("level", &levels, LevelFilter::INFO),
        format: section.word("format", &formats, LogFormat::Json),
    };
    section.finish();
    log
}

fn ca(section: Section<'_, '_>) -> Option<Ca> {
    let ca = if section.present() {
        let certificate = section.need_path("certificate", "\"ca.pem\"");
        let key = section.need_path("key", "\"ca.key\"");
        certificate.zip(key).map(|(certificate, key)| Ca { certificate, key })
    } else {
        None
    };
    section.finish();
    ca
}

fn runtime(section: Section<'_, '_>) -> (Runtime, Option<usize>, usize) {
    let workers = section.get("threads", |v| super::read::integer(v, &(1..=1_024)));
    let blocking =
        section.integer("blocking_threads", 1..=4_096, NetConfig::default().blocking_threads);
    let runtime = Runtime {
        lock_memory: section.boolean("lock_memory", false),
        sandbox: section.boolean("sandbox", true),
        writable: paths(&section, "writable", "directories, such as [\"/var/lib/softhsm\"]"),
    };
    section.finish();
    (runtime, workers, blocking)
}
