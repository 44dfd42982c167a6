//! Where the database is and how it is proven to be that one: the connection string.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use tokio_postgres::config::{Config, Host, SslMode, TargetSessionAttrs};
use zeroize::Zeroizing;

use super::tls::TlsFiles;

/// Where the password comes from: asked for each connection, so that a new one needs no restart.
/// The error says which reference gave none, and never what it gave.
pub type PasswordSource = Arc<dyn Fn() -> Result<Zeroizing<String>, String> + Send + Sync>;

/// A parsed connection string.
#[derive(Clone)]
pub(super) struct Target {
    config: Config,
    password: Option<PasswordSource>,
    /// None where the connection is not encrypted, by the operator's word or over a local socket.
    pub(super) tls: Option<TlsFiles>,
    /// What stands for the database in messages.
    pub(super) name: String,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Target {
    /// Reads `postgres://USER@HOST:PORT/DATABASE?…`, with the parameters of libpq as far as
    /// tokio-postgres knows them, and `sslmode`, `sslrootcert`, `sslcert` and `sslkey`.
    ///
    /// The reason of a refusal never repeats the string, which may hold a password.
    pub(super) fn parse(
        url: &str,
        password: Option<PasswordSource>,
        connect_timeout: Duration,
    ) -> Result<Self, String> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err("a connection string has the form postgres://USER@HOST/DATABASE".into());
        }
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        let mut rest = Vec::new();
        let mut files = TlsFiles::default();
        let mut mode = None;
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let path = || decoded(value).map(PathBuf::from);
            match name {
                "sslmode" => mode = Some(value),
                "sslrootcert" if value == "system" => files.roots = None,
                "sslrootcert" => files.roots = Some(path()?),
                "sslcert" => files.certificate = Some(path()?),
                "sslkey" => files.key = Some(path()?),
                _ => rest.push(parameter),
            }
        }
        let plain = match rest.as_slice() {
            [] => base.to_owned(),
            rest => format!("{base}?{}", rest.join("&")),
        };
        let mut config: Config = plain.parse().map_err(|error| {
            let why = std::error::Error::source(&error).map(ToString::to_string);
            format!("the connection string is malformed: {}", why.unwrap_or_default())
        })?;
        if config.get_password().is_some() {
            return Err(
                "the connection string holds a password; name the password by a reference \
                        of its own instead"
                    .into(),
            );
        }
        let user = config.get_user().ok_or("the connection string names no user")?.to_owned();
        if config.get_hosts().is_empty() {
            return Err("the connection string names no host".into());
        }
        let local = config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)));
        let encrypted = match mode {
            None => !local,
            Some("disable") => false,
            // One meaning, the strictest: the chain and the name are verified.
            Some("require" | "verify-ca" | "verify-full") => true,
            Some("allow" | "prefer") => {
                return Err(
                    "sslmode allow and prefer let whoever is on the way decide that nothing \
                            is encrypted; use verify-full, or disable on a network you trust"
                        .into(),
                );
            }
            Some(_) => {
                return Err("sslmode is one of disable, require, verify-ca, verify-full".into());
            }
        };
        if files.certificate.is_some() != files.key.is_some() {
            return Err("sslcert and sslkey go together".into());
        }
        config
            .ssl_mode(if encrypted { SslMode::Require } else { SslMode::Disable })
            // A standby answers reads from the past.
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .connect_timeout(connect_timeout)
            .keepalives_idle(Duration::from_secs(10))
            .keepalives_interval(Duration::from_secs(3))
            .keepalives_retries(3);
        let name = name(&config, &user);
        Ok(Self { config, password, tls: encrypted.then_some(files), name })
    }

    /// What to connect with, this time.
    pub(super) fn config(&self, application: &str) -> Result<Config, String> {
        let mut config = self.config.clone();
        config.application_name(application);
        if let Some(source) = &self.password {
            config.password(source()?.as_bytes());
        }
        Ok(config)
    }
}

// The connection string again, as far as it may be shown.
fn name(config: &Config, user: &str) -> String {
    let ports = config.get_ports();
    let hosts = config.get_hosts().iter().enumerate().map(|(index, host)| {
        let port = ports.get(index).or(ports.first()).copied().unwrap_or(5432);
        match host {
            Host::Tcp(host) => format!("{host}:{port}"),
            Host::Unix(path) => format!("{}:{port}", path.display()),
        }
    });
    let hosts = hosts.collect::<Vec<_>>().join(",");
    format!("postgres://{user}@{hosts}/{}", config.get_dbname().unwrap_or(user))
}

// Undoes %XX.
fn decoded(value: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let byte = digit(rest.next())
            .zip(digit(rest.next()))
            .and_then(|(high, low)| u8::try_from(high * 16 + low).ok());
        bytes.push(byte.ok_or("the connection string has a % without two hexadecimal digits")?);
    }
    String::from_utf8(bytes).map_err(|_| "the connection string is not UTF-8".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> Result<Target, String> {
        Target::parse(url, None, Duration::from_secs(1))
    }

    #[test]
    fn hosts_are_verified_unless_told_otherwise() {
        let tls = |url: &str| parse(url).unwrap().tls.is_some();
        assert!(tls("postgres://p@db/keys"));
        assert!(tls("postgresql://p@db/keys?sslmode=require"));
        assert!(tls("postgres://p@db/keys?sslmode=verify-full&connect_timeout=3"));
        assert!(!tls("postgres://p@db/keys?sslmode=disable"));
        assert!(!tls("postgres://p@%2Frun%2Fpostgresql/keys"));
        for weak in ["allow", "prefer"] {
            assert!(parse(&format!("postgres://p@db/keys?sslmode={weak}")).is_err());
        }
        let files = parse("postgres://p@db/k?sslrootcert=/etc/a%20b.pem").unwrap().tls.unwrap();
        assert_eq!(files.roots, Some(PathBuf::from("/etc/a b.pem")));
        let files = parse("postgres://p@db/k?sslrootcert=system").unwrap().tls.unwrap();
        assert_eq!(files.roots, None);
    }

    #[test]
    fn refusals_repeat_nothing() {
        for url in [
            "postgres://p:hunter2@db/keys",
            "postgres://p@db/keys?password=hunter2",
            "postgres://p:hunter2@db/keys?no_such_option=hunter2",
            "postgres://p:hunter2@db:port/keys",
            "host=db user=p password=hunter2",
            "postgres://p@db/keys?sslcert=hunter2",
            "postgres://p@db/keys?sslmode=hunter2",
            "postgres://db/hunter2",
            "postgres://p@db/keys?sslkey=%hunter2",
        ] {
            let refused = parse(url).unwrap_err();
            assert!(!refused.contains("hunter2"), "{refused}");
        }
    }

    #[test]
    fn the_name_shows_where_without_secrets() {
        let source: PasswordSource = Arc::new(|| Ok(Zeroizing::new("hunter2".into())));
        let url = "postgres://p@a:1,b:2/keys?sslmode=disable";
        let target = Target::parse(url, Some(source), Duration::from_secs(1)).unwrap();
        assert_eq!(target.name, "postgres://p@a:1,b:2/keys");
        let config = target.config("polykey").unwrap();
        assert_eq!(config.get_password(), Some(b"hunter2".as_slice()));
        assert!(!format!("{target:?} {config:?}").contains("hunter2"));
    }
}
