//! Profiles: where a server is and who we are to it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::file;
use crate::net::client::ClientFiles;

/// Largest profile that is read, in bytes.
const MAX_BYTES: u64 = 64 * 1024;

/// A profile as it stands in its TOML file. Relative paths are relative to that file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileText {
    /// `host:port`, or `https://host:port`.
    pub address: String,
    /// The name the server's certificate must have. Absent: the host of the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// The authorities that may have issued the server's certificate, PEM.
    pub ca: PathBuf,
    /// Our certificate, leaf first, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM, readable by its user alone.
    pub key: PathBuf,
    /// Our client id. May be absent without an API key, when the certificate alone tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    /// The file with our API key, readable by its user alone. Absent: the certificate alone logs in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
}

/// A profile with its paths resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The file it was read from.
    pub path: PathBuf,
    /// `https://host:port`.
    pub address: String,
    /// The name the server's certificate must have; `None` = the host of the address.
    pub server_name: Option<String>,
    /// Certificate files.
    pub files: ClientFiles,
    /// Our client id; empty when the certificate alone tells.
    pub client_id: String,
    /// The file with our API key; `None` = the certificate alone logs in.
    pub api_key_file: Option<PathBuf>,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// There is none in any of the usual places.
    #[error("no profile found; looked for {}", .0.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
    NotFound(Vec<PathBuf>),
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not as it must be.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its line.
        problem: String,
    },
}

impl Profile {
    /// Finds and reads the profile: the file named here, else `./.polykey/profile.toml`, else
    /// `polykey/profile.toml` in `$XDG_CONFIG_HOME` or `~/.config`.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn find(named: Option<&Path>) -> Result<Self, ProfileError> {
        if let Some(path) = named {
            // So that every message names a place and not a way there.
            return Self::load(&std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        }
        let here = std::env::current_dir().unwrap_or_else(|_| ".".into());
        let places = places(
            &here,
            std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from),
            std::env::var_os("HOME").map(PathBuf::from),
        );
        match places.iter().find(|path| path.exists()) {
            Some(path) => Self::load(path),
            None => Err(ProfileError::NotFound(places)),
        }
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// [`ProfileError::Unreadable`] or [`ProfileError::Invalid`].
    pub fn load(path: &Path) -> Result<Self, ProfileError> {
        let bytes = file::read(path, MAX_BYTES)
            .map_err(|source| ProfileError::Unreadable { path: path.to_owned(), source })?;
        let invalid = |problem| ProfileError::Invalid { path: path.to_owned(), problem };
        let text = std::str::from_utf8(&bytes).map_err(|_| invalid("not UTF-8 text".to_owned()))?;
        let text: ProfileText = toml::from_str(text)
            .map_err(|error| invalid(error.to_string().trim_end().to_owned()))?;
        Self::resolve(path, text)
    }

    /// A profile of these values, as if they stood in the file `path`.
    ///
    /// # Errors
    /// [`ProfileError::Invalid`].
    pub fn resolve(path: &Path, text: ProfileText) -> Result<Self, ProfileError> {
        let invalid = |problem: &str| ProfileError::Invalid {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        let directory = path.parent().unwrap_or(Path::new("."));
        let at = |relative: &Path| directory.join(relative);
        let address = match text.address.split_once("://") {
            None => format!("https://{}", text.address),
            Some(("https", _)) => text.address.clone(),
            Some(_) => return Err(invalid("`address` is neither host:port nor https://host:port")),
        };
        let host = address.strip_prefix("https://").unwrap_or_default();
        if host.is_empty() || host.contains('/') || host.contains(char::is_whitespace) {
            return Err(invalid("`address` is neither host:port nor https://host:port"));
        }
        let client_id = text.client_id.clone().unwrap_or_default();
        if client_id.is_empty() && text.api_key_file.is_some() {
            return Err(invalid("`api_key_file` needs `client_id`"));
        }
        Ok(Self {
            path: path.to_owned(),
            address,
            server_name: text.server_name.clone(),
            files: ClientFiles {
                server_ca: at(&text.ca),
                certificate: at(&text.certificate),
                key: at(&text.key),
            },
            client_id,
            api_key_file: text.api_key_file.as_deref().map(at),
        })
    }

    /// The address without its scheme, as people write it.
    #[must_use]
    pub fn host_port(&self) -> &str {
        self.address.strip_prefix("https://").unwrap_or(&self.address)
    }

    /// Where tokens are cached: `token.json` beside `profile.toml`, `NAME.token.json` beside `NAME.toml`.
    #[must_use]
    pub fn token_path(&self) -> PathBuf {
        match self.path.file_stem().and_then(std::ffi::OsStr::to_str) {
            None | Some("profile") => self.path.with_file_name("token.json"),
            Some(stem) => self.path.with_file_name(format!("{stem}.token.json")),
        }
    }
}

/// Where a profile may be, in the order in which it is looked for.
fn places(here: &Path, xdg: Option<PathBuf>, home: Option<PathBuf>) -> Vec<PathBuf> {
    // The base directory specification: a relative value is to be ignored.
    let configuration = xdg
        .filter(|p| p.is_absolute())
        .or_else(|| home.filter(|p| p.is_absolute()).map(|home| home.join(".config")));
    let mut places = vec![here.join(".polykey/profile.toml")];
    places.extend(configuration.map(|directory| directory.join("polykey/profile.toml")));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "address = \"localhost:50053\"\nca = \"ca.pem\"\ncertificate = \"c.pem\"\nkey = \"/k.pem\"\n";

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn places_come_in_order() {
        let here = Path::new("/here");
        let at = |xdg: Option<&str>, home: Option<&str>| {
            places(here, xdg.map(PathBuf::from), home.map(PathBuf::from))
        };
        let near = PathBuf::from("/here/.polykey/profile.toml");
        assert_eq!(at(Some("/x"), Some("/h")), [near.clone(), "/x/polykey/profile.toml".into()]);
        let home: PathBuf = "/h/.config/polykey/profile.toml".into();
        assert_eq!(at(None, Some("/h")), [near.clone(), home.clone()]);
        assert_eq!(at(Some("relative"), Some("/h")), [near.clone(), home]);
        assert_eq!(at(None, None), [near]);
    }

    #[test]
    fn paths_are_relative_to_the_profile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/profile.toml");
        write(&path, TEXT);
        let profile = Profile::find(Some(&path)).unwrap();
        assert_eq!(profile.address, "https://localhost:50053");
        assert_eq!(profile.host_port(), "localhost:50053");
        assert_eq!(profile.files.server_ca, dir.path().join("sub/ca.pem"));
        assert_eq!(profile.files.key, Path::new("/k.pem"));
        assert_eq!(profile.token_path(), dir.path().join("sub/token.json"));
        let other = dir.path().join("prod.toml");
        write(&other, TEXT);
        assert_eq!(Profile::load(&other).unwrap().token_path(), dir.path().join("prod.token.json"));
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profile.toml");
        for (text, expected) in [
            (format!("{TEXT}adress = 1\n"), "adress"),
            (TEXT.replace("ca =", "#"), "ca"),
            (TEXT.replace("localhost:50053", "http://localhost:1"), "https://"),
            (TEXT.replace("localhost:50053", ""), "address"),
            (format!("{TEXT}api_key_file = \"k\"\n"), "client_id"),
        ] {
            write(&path, &text);
            let error = Profile::load(&path).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("profile.toml"), "{error}");
        }
        assert!(matches!(
            Profile::load(&dir.path().join("none")),
            Err(ProfileError::Unreadable { .. })
        ));
    }

    #[test]
    fn what_is_written_is_read() {
        let text: ProfileText = toml::from_str(TEXT).unwrap();
        let again: ProfileText = toml::from_str(&toml::to_string(&text).unwrap()).unwrap();
        assert_eq!(text, again);
    }
}
