//! The first administrator of a store.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::{App, AppError, event};
use crate::authn::api_key::ApiKey;
use crate::authn::certificate::CertificateIdentity;
use crate::directory::{Change, ClientFilter, ClientState, NewClient};
use crate::pki;

/// The built-in role with every permission.
const ROLE: &str = "admin";
/// common.v2.ClientTier ENTERPRISE.
const TIER: i32 = 3;

/// Who it is to be.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Its client id.
    pub id: String,
    /// What its certificates have.
    pub identities: Vec<CertificateIdentity>,
}

/// What was done for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bootstrapped {
    /// Client and API key are new.
    Created,
    /// The client was there, and its API key's file was not: there is a new key.
    KeyReplaced,
    /// Everything was there.
    Unchanged,
}

/// Sees to it that the administrator exists and that the file has an API key of its own, mode 0600.
///
/// The store has the key before the file does, so a crash between leaves a client whose key nobody
/// has; the next call replaces that one. A client that is disabled or removed is left as it is.
///
/// # Errors
/// As [`crate::directory::Directory::create_client`]; [`AppError::Setup`] if the file cannot be written.
pub async fn bootstrap(
    app: &App,
    admin: &Admin,
    api_key_file: &Path,
) -> Result<Bootstrapped, AppError> {
    let now = app.clock.now();
    let change = |action| Change { event: event(action, now), now, expected: None, remember: None };
    let (key, done) = match app.directory.client(&admin.id).await? {
        None => {
            let new = NewClient {
                id: admin.id.clone(),
                name: "Administrator".into(),
                tier: TIER,
                roles: vec![ROLE.into()],
                identities: admin.identities.clone(),
                ..NewClient::default()
            };
            let mut change = change("CreateClient");
            change.event.details.insert("client".into(), admin.id.clone());
            let (_, key) = app.directory.create_client(&new, &change).await?;
            (key, Bootstrapped::Created)
        }
        Some(client) if client.state == ClientState::Enabled && !exists(api_key_file)? => {
            let mut change = change("RotateClientApiKey");
            change.event.details.insert("client".into(), admin.id.clone());
            let rotated =
                app.directory.rotate_api_key(&admin.id, Duration::ZERO, None, &change).await?;
            (Some(rotated.api_key), Bootstrapped::KeyReplaced)
        }
        Some(_) => (None, Bootstrapped::Unchanged),
    };
    if let Some(key) = key {
        write_key(api_key_file, &key)?;
    }
    Ok(done)
}

fn exists(path: &Path) -> Result<bool, AppError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(AppError::Unreadable { path: path.to_owned(), source }),
    }
}

fn write_key(path: &Path, key: &ApiKey) -> Result<(), AppError> {
    let mut line = zeroize::Zeroizing::new(String::with_capacity(key.reveal().len() + 1));
    line.push_str(key.reveal());
    line.push('\n');
    Ok(pki::write_file(path, line.as_bytes(), 0o600)?)
}

impl App {
    /// Whether the store has ever had a client.
    ///
    /// # Errors
    /// As [`crate::directory::Directory::clients`].
    pub async fn has_clients(&self) -> Result<bool, AppError> {
        Ok(!self.directory.clients(&ClientFilter::default(), None, 1).await?.is_empty())
    }
}
