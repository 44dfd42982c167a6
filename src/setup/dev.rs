//! The directory of `polykey dev`: everything a node for one laptop needs, made on first use and kept.
//!
//! ```text
//! DIR/            0700
//!   .lock         whoever has it locked is the node of this directory
//!   ca.pem        ca.key       the authority of both sides; cert issue uses it too
//!   server.pem    server.key   for localhost and where the node listens
//!   admin.pem     admin.key    the administrator's certificate
//!   admin.api-key              its API key, made once the store knows it
//!   master.key                 opens the store
//!   polykey.toml               what `polykey dev` serves by; yours to edit
//!   polykey.redb               the store
//!   profile.toml               what the other commands find the node by; last of all
//! ```
//! This file makes what needs no store. Certificates that expire within a month are renewed.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::leaf::Pair;
use super::{SetupError, Step, lock, master_key, private_directory, remove};
use crate::config::{Config, DEFAULT_ADDRESS};
use crate::pki::{self, Authority, Issued, KeyKind, Validity};

/// The client that `polykey dev` makes.
pub const ADMIN: &str = "admin";

const AUTHORITY_DAYS: u32 = pki::MAX_DAYS;
const LEAF_DAYS: u32 = 365;
/// A certificate with less left than this is renewed.
const RENEW: Duration = Duration::from_secs(30 * 86_400);
const LOCK: &str = ".lock";

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevDirectory(PathBuf);

impl DevDirectory {
    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// One of its files.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The administrator's API key.
    #[must_use]
    pub fn api_key(&self) -> PathBuf {
        self.file("admin.api-key")
    }

    /// The connection for the other commands.
    #[must_use]
    pub fn profile(&self) -> PathBuf {
        self.file("profile.toml")
    }
}

/// A directory that is ready up to the store, and locked.
#[derive(Debug)]
pub struct Prepared {
    /// Where everything is.
    pub directory: DevDirectory,
    /// What to serve by.
    pub config: Config,
    /// What was made or renewed just now.
    pub made: Vec<&'static str>,
    // Released when this is dropped, or by the system when the process is gone.
    _lock: File,
}

/// Makes what is missing in `dir`. `listen` wins over the configuration's address, for this run.
///
/// # Errors
/// See [`SetupError`]; running again goes on where this broke off.
pub fn prepare(
    dir: &Path,
    listen: Option<SocketAddr>,
    now: SystemTime,
    step: Step<'_>,
) -> Result<Prepared, SetupError> {
    let directory = DevDirectory(dir.to_owned());
    let mut made = Vec::new();
    let mut step = |what| {
        step(what)?;
        made.push(what);
        Ok::<_, SetupError>(())
    };
    if !directory.file(LOCK).exists() {
        refuse_foreign(dir)?;
        step("directory")?;
    }
    private_directory(dir)?;
    let lock = lock(&directory.file(LOCK))?;

    let config = directory.file("polykey.toml");
    if !config.exists() {
        step("configuration")?;
        let text = configuration(listen.unwrap_or(DEFAULT_ADDRESS));
        pki::write_file(&config, text.as_bytes(), 0o600)?;
    }
    let mut config = Config::load(&config)?;
    if let Some(listen) = listen {
        config.listen.address = listen;
    }

    let key = directory.file("master.key");
    if !key.exists() {
        let store = directory.file("polykey.redb");
        if store.exists() {
            return Err(SetupError::MasterKeyLost { key, store });
        }
        step("master key")?;
        master_key(&key)?;
    }
    certificates(&directory, config.listen.address, now, &mut step)?;
    Ok(Prepared { directory, config, made, _lock: lock })
}

/// Refuses a directory that holds anything at all, so that no typing error fills a home directory.
fn refuse_foreign(dir: &Path) -> Result<(), SetupError> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(SetupError::file(dir)(error)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(SetupError::Foreign(dir.to_owned())),
        },
    }
}

fn certificates(
    directory: &DevDirectory,
    listen: SocketAddr,
    now: SystemTime,
    step: Step<'_>,
) -> Result<(), SetupError> {
    let files = |name: &str| {
        (directory.file(&format!("{name}.pem")), directory.file(&format!("{name}.key")))
    };
    let (certificate, key) = files("ca");
    let authority = Pair::read(&certificate, &key)
        .filter(|ca| ca.subject_key.is_some() && ca.lasts(now, RENEW));
    if authority.is_none() {
        step("certificate authority")?;
        // Nothing that an earlier authority issued may outlive it.
        for name in ["server", ADMIN] {
            let (certificate, key) = files(name);
            remove(&certificate)?;
            remove(&key)?;
        }
        let validity = Validity::days(now, AUTHORITY_DAYS)?;
        let (_, issued) = Authority::create("Polykey development CA", KeyKind::P256, validity)?;
        write_pair(&issued, &certificate, &key)?;
    }
    let authority = Pair::read(&certificate, &key).ok_or_else(|| {
        SetupError::file(&certificate)(std::io::Error::other("cannot be read back"))
    })?;
    let issuer = || Authority::load(&certificate, &key);
    let good = |name: &str, names: &[String]| {
        let (certificate, key) = files(name);
        let pair = Pair::read(&certificate, &key);
        pair.is_some_and(|p| p.issued_by(&authority) && p.lasts(now, RENEW) && p.has(names))
    };

    let names = server_names(listen);
    if !good("server", &names) {
        step("server certificate")?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let validity = Validity::days(now, LEAF_DAYS)?;
        let issued = issuer()?.server(&names, KeyKind::P256, validity)?;
        let (certificate, key) = files("server");
        write_pair(&issued, &certificate, &key)?;
    }
    if !good(ADMIN, &[pki::client_identity(ADMIN)?.to_string()]) {
        step("administrator's certificate")?;
        let validity = Validity::days(now, LEAF_DAYS)?;
        let issued = issuer()?.client(ADMIN, KeyKind::P256, validity)?;
        let (certificate, key) = files(ADMIN);
        write_pair(&issued, &certificate, &key)?;
    }
    Ok(())
}

/// Writes both files, each whole. A crash between them leaves a pair that does not belong together,
/// which counts as none.
fn write_pair(issued: &Issued, certificate: &Path, key: &Path) -> Result<(), SetupError> {
    if let Some(text) = &issued.key {
        pki::write_file(key, text.as_bytes(), 0o600)?;
    }
    Ok(pki::write_file(certificate, issued.certificate.as_bytes(), 0o644)?)
}

/// The names a server at this address needs.
fn server_names(listen: SocketAddr) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    let address = listen.ip();
    if !address.is_unspecified() && !names.contains(&address.to_string()) {
        names.push(address.to_string());
    }
    if address.is_unspecified() {
        let host = rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase();
        let usable = crate::authn::certificate::CertificateIdentity::dns(&host).is_ok();
        if usable && !names.contains(&host) {
            names.push(host);
        }
    }
    names
}

fn configuration(listen: SocketAddr) -> String {
    format!(
        r#"# Written by `polykey dev` on first use; yours to edit. packaging/polykey.example.toml has every option.
[node]
data_dir = "."

[listen]
address = "{listen}"
certificate = "server.pem"
key = "server.key"
client_ca = "ca.pem"

[storage]
path = "polykey.redb"

[master_key]
source = {{ file = "master.key" }}

[ca]
certificate = "ca.pem"
key = "ca.key"

[log]
format = "pretty"
"#
    )
}

/// The address by which this machine reaches a node that listens on `listen`.
#[must_use]
pub fn reachable(listen: SocketAddr) -> SocketAddr {
    if !listen.ip().is_unspecified() {
        return listen;
    }
    let loopback: std::net::IpAddr = if listen.is_ipv4() {
        std::net::Ipv4Addr::LOCALHOST.into()
    } else {
        std::net::Ipv6Addr::LOCALHOST.into()
    };
    SocketAddr::new(loopback, listen.port())
}

/// Writes the profile for a node that listens on `listen`, unless it says so already.
///
/// # Errors
/// [`SetupError::Pki`] with the file.
pub fn write_profile(directory: &DevDirectory, listen: SocketAddr) -> Result<(), SetupError> {
    let text = format!(
        r#"# Written by `polykey dev` at every start.
address = "{}"
server_name = "localhost"
ca = "ca.pem"
certificate = "admin.pem"
key = "admin.key"
client_id = "{ADMIN}"
api_key_file = "admin.api-key"
"#,
        reachable(listen)
    );
    let path = directory.profile();
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(());
    }
    Ok(pki::write_file(&path, text.as_bytes(), 0o600)?)
}
