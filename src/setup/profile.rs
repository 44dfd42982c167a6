//! The profile of the first administrator, which `polykey init` writes beside its API key.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::leaf::Leaf;
use super::{SetupError, dev};
use crate::client::ProfileText;
use crate::config::Config;
use crate::pki;

/// What the administrator logs in with.
#[derive(Clone, Debug)]
pub struct Credentials<'a> {
    /// The client id.
    pub id: &'a str,
    /// The certificate, leaf first, PEM.
    pub certificate: &'a Path,
    /// Its private key.
    pub key: &'a Path,
    /// The file with the API key.
    pub api_key: &'a Path,
}

/// Writes the profile `ID.profile.toml`, mode 0600, for a node of this configuration; gives its path and
/// whether the authority in it is known to be that of the server's certificate.
///
/// # Errors
/// [`SetupError::Pki`] with the file.
pub fn write(
    config: &Config,
    credentials: &Credentials<'_>,
    directory: &Path,
) -> Result<(PathBuf, bool), SetupError> {
    let tls = &config.listen.tls;
    let server = config.listen.references.certificate.is_none().then_some(&tls.certificate);
    let server = server.and_then(|path| Leaf::read(path));
    let issued_server = |path: &Path| {
        let authority = Leaf::read(path);
        server.as_ref().zip(authority).is_some_and(|(server, ca)| server.issued_by(&ca))
    };
    let own = config.ca.as_ref().map(|ca| ca.certificate.clone());
    let clients = config.listen.references.client_ca.is_none().then(|| tls.client_ca.clone());
    let candidates: Vec<PathBuf> = own.into_iter().chain(clients).collect();
    let known = candidates.iter().find(|path| issued_server(path));
    let ca = known.or(candidates.first()).cloned().unwrap_or_else(|| "ca.pem".into());
    let address = dev::reachable(config.listen.address);
    let text = ProfileText {
        address: address.to_string(),
        server_name: server.and_then(|server| server_name(&server.names, address.ip())),
        ca,
        certificate: credentials.certificate.to_owned(),
        key: credentials.key.to_owned(),
        client_id: Some(credentials.id.to_owned()),
        api_key_file: Some(credentials.api_key.to_owned()),
    };
    let path = directory.join(format!("{}.profile.toml", credentials.id));
    let text = toml::to_string(&text)
        .map_err(|error| SetupError::file(&path)(std::io::Error::other(error)))?;
    pki::write_file(&path, text.as_bytes(), 0o600)?;
    Ok((path, known.is_some()))
}

/// A name that the server's certificate has, unless it has the address itself.
fn server_name(names: &[String], address: IpAddr) -> Option<String> {
    if names.contains(&address.to_string()) {
        return None;
    }
    // A wildcard stands for names that nobody has told.
    names.iter().find(|name| !name.contains("://") && !name.contains('*')).cloned()
}
