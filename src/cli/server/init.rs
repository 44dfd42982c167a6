//! `polykey init`: the store, its root key and first slot, and the first administrator.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::Args;
use polykey_hsm::MasterKeySource;
use serde::Serialize;

use super::super::App as Cli;
use super::super::error::CliError;
use super::super::output::{Human, View};
use super::runtime;
use crate::app::{Admin, App, AppError, bootstrap, store};
use crate::authn::certificate::CertificateIdentity;
use crate::config::{Config, Tolerate, Wrapper};
use crate::pki::{self, Authority, KeyKind, Validity};
use crate::setup::profile::Credentials;
use crate::time::Clock;
use crate::{hardening, setup};

/// While this file is in the data directory, `init` has not come to its end.
const PENDING: &str = "init.pending";
/// Validity of a certificate that `init` issues, in days.
const DAYS: u32 = 365;

/// Arguments of `init`.
#[derive(Args, Debug)]
pub struct InitArgs {
    /// The configuration.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Make the master key in the file that the configuration names, if there is none.
    #[arg(long)]
    pub generate_master_key: bool,
    /// The client id of the first administrator.
    #[arg(long, value_name = "ID", default_value = "admin")]
    pub admin: String,
    /// What the administrator's certificate has: spiffe-uri:URI, dns:NAME, common-name:NAME or
    /// spki-sha256:HEX; may be repeated. Without any, the authority of [ca] issues a certificate.
    #[arg(long = "admin-identity", value_name = "KIND:VALUE", value_parser = identity)]
    pub identities: Vec<CertificateIdentity>,
    /// Where the administrator's API key, certificate and profile are written; without it the data
    /// directory.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

fn identity(text: &str) -> Result<CertificateIdentity, String> {
    let wrong =
        || format!("`{text}` is not KIND:VALUE with spiffe-uri, dns, common-name or spki-sha256");
    let (kind, value) = text.split_once(':').ok_or_else(wrong)?;
    let read = match kind {
        "spiffe-uri" => CertificateIdentity::spiffe(value),
        "dns" => CertificateIdentity::dns(value),
        "common-name" => CertificateIdentity::common_name(value),
        "spki-sha256" => CertificateIdentity::spki_sha256(value),
        _ => return Err(wrong()),
    };
    read.map_err(|error| error.to_string())
}

/// What was made.
#[derive(Serialize)]
struct InitView {
    store: String,
    node_id: String,
    master_key_made: bool,
    admin: String,
    api_key_file: String,
    certificate: Option<String>,
    key: Option<String>,
    profile: String,
    /// What is to be done about the profile before it works.
    profile_needs: Vec<String>,
    next: String,
}

impl View for InitView {
    fn human(&self) -> Human {
        let mut fields = vec![
            ("store", self.store.clone()),
            ("node", self.node_id.clone()),
            ("administrator", self.admin.clone()),
            ("API key", self.api_key_file.clone()),
        ];
        fields.extend(self.certificate.iter().map(|file| ("certificate", file.clone())));
        fields.extend(self.key.iter().map(|file| ("private key", file.clone())));
        fields.push(("profile", self.profile.clone()));
        fields.extend(self.profile_needs.iter().map(|need| ("it needs", need.clone())));
        fields.push(("next", self.next.clone()));
        Human::Record(fields)
    }
}

/// Makes store, root key, first slot and first administrator. One that broke off is completed.
///
/// # Errors
/// See [`AppError`]; [`AppError::AlreadyInitialised`] when everything was there.
pub(in crate::cli) fn init(cli: &Cli, args: InitArgs) -> Result<(), CliError> {
    hardening::private_files();
    let config = Config::load(&args.config).map_err(AppError::from)?;
    let view = runtime()?.block_on(Box::pin(make(config, args)))?;
    cli.out.print(&view)
}

async fn make(mut config: Config, args: InitArgs) -> Result<InitView, AppError> {
    let directory = config.node.data_dir.clone();
    let out = args.out.unwrap_or_else(|| directory.clone());
    let out = std::path::absolute(&out).unwrap_or(out);
    let issue = args.identities.is_empty();
    if issue && config.ca.is_none() {
        return Err(AppError::NoIdentity);
    }
    setup::private_directory(&directory)?;
    let pending = directory.join(PENDING);
    let exists = store::exists(&config).await?;
    if !exists {
        pki::write_file(&pending, b"polykey init has not come to its end\n", 0o600)?;
    }
    if !pending.exists() {
        return Err(AppError::AlreadyInitialised(store::name(&config).into()));
    }
    if let Some(parent) = config.storage.path.parent().filter(|p| !p.as_os_str().is_empty()) {
        setup::private_directory(parent)?;
    }
    setup::private_directory(&out)?;
    let master_key_made = match &config.master_key {
        Wrapper::Local(MasterKeySource::File(path))
            if args.generate_master_key && !path.exists() =>
        {
            if exists {
                let store = store::name(&config).into();
                return Err(setup::SetupError::MasterKeyLost { key: path.clone(), store }.into());
            }
            setup::master_key(path)?;
            true
        }
        _ => false,
    };
    let mut identities = args.identities;
    if issue {
        identities.push(pki::client_identity(&args.admin)?);
    }
    if let Some(anchor) = &mut config.anchor {
        // One that broke off may have made the store and not its anchor.
        anchor.tolerate = Tolerate::Missing;
    }
    let app = App::found(config, Clock::System).await?;
    let admin = Admin { id: args.admin, identities };
    let api_key = out.join(format!("{}.api-key", admin.id));
    bootstrap(&app, &admin, &api_key).await?;
    let files = match &app.authority {
        Some(authority) if issue => Some(certificate(authority, &admin.id, &out)?),
        _ => None,
    };
    let (profile, profile_needs) = profile(&app.config, &admin.id, (&api_key, &out), issue)?;
    let (store, file) = (store::name(&app.config), app.config.file.clone());
    let node_id = data_encoding::HEXLOWER.encode(&app.vault.node_id());
    app.close().await?;
    std::fs::remove_file(&pending)
        .map_err(|source| AppError::Unreadable { path: pending, source })?;
    let shown = |path: &Path| path.display().to_string();
    Ok(InitView {
        store,
        node_id,
        master_key_made,
        admin: admin.id,
        api_key_file: shown(&api_key),
        certificate: files.as_ref().map(|(certificate, _)| shown(certificate)),
        key: files.as_ref().map(|(_, key)| shown(key)),
        profile: shown(&profile),
        profile_needs,
        next: format!(
            "polykey serve --config {}; then, with POLYKEY_PROFILE={}, polykey whoami",
            file.display(),
            profile.display()
        ),
    })
}

/// Writes the administrator's profile; gives what it lacks, in words.
fn profile(
    config: &Config,
    id: &str,
    (api_key, out): (&Path, &Path),
    issued: bool,
) -> Result<(PathBuf, Vec<String>), AppError> {
    let (certificate, key) = pair(id, out);
    let credentials = Credentials { id, certificate: &certificate, key: &key, api_key };
    let (path, trusted) = setup::profile::write(config, &credentials, out)?;
    let mut needs = Vec::new();
    if !issued {
        needs.push(format!(
            "the administrator's certificate in {} and its key in {}, or their places in it",
            certificate.display(),
            key.display()
        ));
    }
    if !trusted {
        needs.push("as `ca` the authority of the server's certificate".to_owned());
    }
    Ok((path, needs))
}

/// Where an administrator's certificate and key are.
fn pair(id: &str, out: &Path) -> (PathBuf, PathBuf) {
    (out.join(format!("{id}.pem")), out.join(format!("{id}.key")))
}

/// Issues the administrator's certificate, over what a broken run may have left.
fn certificate(
    authority: &Authority,
    id: &str,
    out: &Path,
) -> Result<(PathBuf, PathBuf), AppError> {
    let issued = authority.client(id, KeyKind::P256, Validity::days(SystemTime::now(), DAYS)?)?;
    let (certificate, key) = pair(id, out);
    if let Some(text) = &issued.key {
        pki::write_file(&key, text.as_bytes(), 0o600)?;
    }
    pki::write_file(&certificate, issued.certificate.as_bytes(), 0o644)?;
    Ok((certificate, key))
}
