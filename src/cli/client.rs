//! `polykey client` and `polykey cert`: who may use the server.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use polykey_proto::common::v2::ClientTier;
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::admin_view::{ApiKeyView, ClientView, ClientsView};
use super::error::CliError;
use super::output::{Human, View, confirm, remark};
use super::remote::{Remote, pages};
use super::value::{self, When, now, timestamp};
use super::view::{short, time};
use crate::client::{ProfileText, file, rpc};

/// Tiers of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// Free.
    Free,
    /// Pro.
    Pro,
    /// Enterprise.
    Enterprise,
}

impl From<Tier> for i32 {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Free => ClientTier::Free,
            Tier::Pro => ClientTier::Pro,
            Tier::Enterprise => ClientTier::Enterprise,
        }
        .into()
    }
}

/// States of clients, as filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// It may log in and call.
    Enabled,
    /// It may not.
    Disabled,
    /// It is gone for ever.
    Removed,
}

/// What a client's certificates must have; one of several is enough.
#[derive(Args, Debug, Default)]
pub struct Identities {
    /// A SPIFFE ID in a URI name of the certificate; may be repeated.
    #[arg(long, value_name = "URI")]
    pub spiffe: Vec<String>,
    /// A DNS name of the certificate; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub dns: Vec<String>,
    /// The common name of the certificate, where the server allows it; may be repeated.
    #[arg(long, value_name = "NAME")]
    pub common_name: Vec<String>,
    /// SHA-256 of the certificate's public key, hexadecimal; may be repeated.
    #[arg(long, value_name = "HEX")]
    pub spki_sha256: Vec<String>,
}

impl Identities {
    fn wire(self) -> Vec<pb::CertificateIdentity> {
        use pb::CertificateIdentityKind as Kind;
        let of = |kind: Kind, values: Vec<String>| {
            values
                .into_iter()
                .map(move |value| pb::CertificateIdentity { kind: kind.into(), value })
        };
        of(Kind::SpiffeUri, self.spiffe)
            .chain(of(Kind::Dns, self.dns))
            .chain(of(Kind::CommonName, self.common_name))
            .chain(of(Kind::SpkiSha256, self.spki_sha256))
            .collect()
    }
}

/// Names one client whose record is to change.
#[derive(Args, Debug)]
pub struct ClientChange {
    /// The id of the client.
    #[arg(value_name = "CLIENT")]
    pub client: String,
    /// Do nothing unless its record has this revision.
    #[arg(long, value_name = "N")]
    pub expected_revision: Option<u64>,
}

/// Subcommands of `client`.
#[derive(Subcommand, Debug)]
pub enum ClientCommand {
    /// Add a client, and print its first API key.
    Add(Box<AddArgs>),
    /// List clients by id.
    List {
        /// Only clients with this role.
        #[arg(long, value_name = "ROLE")]
        role: Option<String>,
        /// Only clients in this state; without it, all that are not removed.
        #[arg(long, value_enum, value_name = "STATE")]
        state: Option<State>,
        /// At most so many.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
    /// Show a client.
    Describe {
        /// The id of the client.
        #[arg(value_name = "CLIENT")]
        client: String,
    },
    /// Change a client, at once for tokens already out.
    Update(Box<UpdateArgs>),
    /// Disable a client: it may not log in, and its tokens do not work.
    Disable(ClientChange),
    /// Enable a client.
    Enable(ClientChange),
    /// Give a client a new API key, and print it; the old ones work a while longer.
    RotateApiKey(RotateArgs),
    /// Remove a client for ever. Its keys stay.
    Remove {
        /// The client.
        #[command(flatten)]
        change: ClientChange,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

/// Arguments of `client add`.
#[derive(Args, Debug)]
pub struct AddArgs {
    /// The id of the client, which was never used before.
    #[arg(value_name = "CLIENT")]
    pub client: String,
    /// A name for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub name: String,
    /// A text for people.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub description: String,
    /// The environment it belongs to.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub environment: String,
    /// Its tier.
    #[arg(long, value_enum, default_value_t = Tier::Free)]
    pub tier: Tier,
    /// A role; may be repeated.
    #[arg(long = "role", value_name = "ROLE")]
    pub roles: Vec<String>,
    /// A permission besides those of its roles; may be repeated.
    #[arg(long = "permission", value_name = "PERMISSION")]
    pub permissions: Vec<String>,
    /// What its certificates must have. Without any: the SPIFFE ID that `cert issue` gives it.
    #[command(flatten)]
    pub identities: Identities,
    /// Make no API key: the client logs in by its certificate alone.
    #[arg(long)]
    pub no_api_key: bool,
    /// When the API key stops working: a time (RFC 3339) or a duration from now.
    #[arg(long, value_name = "WHEN", value_parser = value::when, conflicts_with = "no_api_key")]
    pub api_key_expires: Option<When>,
    /// Write the API key to this file, readable by you alone, instead of standard output.
    #[arg(long, value_name = "FILE", conflicts_with = "no_api_key")]
    pub api_key_out: Option<PathBuf>,
}

/// Arguments of `client update`.
#[derive(Args, Debug)]
pub struct UpdateArgs {
    /// The client and its expected revision.
    #[command(flatten)]
    pub change: ClientChange,
    /// The new name for people.
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// The new text for people.
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// The new environment.
    #[arg(long, value_name = "TEXT")]
    pub environment: Option<String>,
    /// The new tier.
    #[arg(long, value_enum)]
    pub tier: Option<Tier>,
    /// A role to give; may be repeated.
    #[arg(long = "role", value_name = "ROLE")]
    pub roles: Vec<String>,
    /// A role to take; may be repeated.
    #[arg(long = "remove-role", value_name = "ROLE")]
    pub remove_roles: Vec<String>,
    /// A permission to give; may be repeated.
    #[arg(long = "permission", value_name = "PERMISSION")]
    pub permissions: Vec<String>,
    /// A permission to take; may be repeated.
    #[arg(long = "remove-permission", value_name = "PERMISSION")]
    pub remove_permissions: Vec<String>,
    /// Identities to accept.
    #[command(flatten)]
    pub identities: Identities,
    /// An identity to accept no more: spiffe-uri:URI, dns:NAME, common-name:NAME or
    /// spki-sha256:HEX; may be repeated.
    #[arg(long = "remove-identity", value_name = "KIND:VALUE", value_parser = identity)]
    pub remove_identities: Vec<pb::CertificateIdentity>,
}

/// Arguments of `client rotate-api-key`.
#[derive(Args, Debug)]
pub struct RotateArgs {
    /// The id of the client.
    #[arg(value_name = "CLIENT")]
    pub client: String,
    /// How long the old keys still work.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = value::seconds)]
    pub overlap: i64,
    /// When the new key stops working: a time (RFC 3339) or a duration from now.
    #[arg(long, value_name = "WHEN", value_parser = value::when)]
    pub expires: Option<When>,
    /// Write the API key to this file, readable by you alone, instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub api_key_out: Option<PathBuf>,
}

/// Subcommands of `cert`.
#[derive(Subcommand, Debug)]
pub enum CertCommand {
    /// Issue a certificate to a client, with a profile that uses it, for those without a PKI.
    Issue(IssueArgs),
}

/// Arguments of `cert issue`.
#[derive(Args, Debug)]
pub struct IssueArgs {
    /// The id of the client.
    #[arg(value_name = "CLIENT")]
    pub client: String,
    /// The directory for client.pem, client.key (unless --csr), ca.pem and profile.toml; made if
    /// need be.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// A certificate signing request (PEM): the private key stays where it is.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub csr: Option<PathBuf>,
    /// With --csr: where the private key is, for the profile.
    #[arg(long, value_name = "FILE", requires = "csr")]
    pub key: Option<PathBuf>,
    /// How long it is valid, 1 to 400 days.
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(i64).range(1..=400))]
    pub days: i64,
    /// Replace files that are there.
    #[arg(long)]
    pub force: bool,
}

fn identity(text: &str) -> Result<pb::CertificateIdentity, String> {
    use pb::CertificateIdentityKind as Kind;
    let wrong =
        || format!("`{text}` is not KIND:VALUE with spiffe-uri, dns, common-name or spki-sha256");
    let (kind, value) = text.split_once(':').ok_or_else(wrong)?;
    let kind = match kind {
        "spiffe-uri" => Kind::SpiffeUri,
        "dns" => Kind::Dns,
        "common-name" => Kind::CommonName,
        "spki-sha256" => Kind::SpkiSha256,
        _ => return Err(wrong()),
    };
    Ok(pb::CertificateIdentity { kind: kind.into(), value: value.to_owned() })
}

/// A client and its new API key.
#[derive(Serialize)]
struct AddedView {
    client: ClientView,
    /// Absent when it was written to a file, or none was made.
    api_key: Option<String>,
}

impl View for AddedView {
    fn human(&self) -> Human {
        let mut fields = self.client.fields();
        fields.extend(self.api_key.iter().map(|key| ("API key", key.clone())));
        Human::Record(fields)
    }
}

/// A new API key.
#[derive(Serialize)]
struct RotatedView {
    client: String,
    /// Absent when it was written to a file.
    api_key: Option<String>,
    info: ApiKeyView,
    old_keys_expire_at: Option<String>,
}

impl View for RotatedView {
    fn human(&self) -> Human {
        let mut fields = vec![
            ("client", self.client.clone()),
            ("expires", short(self.info.expires_at.as_ref())),
            ("old keys end", short(self.old_keys_expire_at.as_ref())),
        ];
        fields.extend(self.api_key.iter().map(|key| ("API key", key.clone())));
        Human::Record(fields)
    }
}

/// What was issued, and where it is.
#[derive(Serialize)]
struct IssuedView {
    certificate: PathBuf,
    certificate_sha256: String,
    key: PathBuf,
    ca: PathBuf,
    profile: PathBuf,
    expires_at: Option<String>,
}

impl View for IssuedView {
    fn human(&self) -> Human {
        let shown = |path: &Path| path.display().to_string();
        Human::Record(vec![
            ("certificate", shown(&self.certificate)),
            ("key", shown(&self.key)),
            ("ca", shown(&self.ca)),
            ("profile", shown(&self.profile)),
            ("expires", short(self.expires_at.as_ref())),
        ])
    }
}

/// Writes the API key where it was asked for; what is left is to be printed.
fn keep(key: String, out: Option<&Path>) -> Result<Option<String>, CliError> {
    let key = zeroize::Zeroizing::new(key);
    match out {
        _ if key.is_empty() => Ok(None),
        None => {
            remark("The API key is shown this once: keep it safe.");
            Ok(Some((*key).clone()))
        }
        Some(path) => {
            let line = zeroize::Zeroizing::new(format!("{}\n", *key));
            file::write(path, line.as_bytes(), file::PRIVATE)
                .map_err(|error| CliError::file(path, &error))?;
            remark(&format!("The API key is in {}.", path.display()));
            Ok(None)
        }
    }
}

/// Fails before anything is done when the file could not be written after it.
fn writable(out: Option<&PathBuf>) -> Result<(), CliError> {
    match out {
        None => Ok(()),
        Some(path) => {
            file::NewFile::create(path).map(drop).map_err(|error| CliError::file(path, &error))
        }
    }
}

pub(super) async fn run(app: &App, command: ClientCommand) -> Result<(), CliError> {
    let remote = app.connect().await?;
    let changed = match command {
        ClientCommand::Add(args) => return add(app, &remote, *args).await,
        ClientCommand::List { role, state, limit } => {
            let state = state.map_or(pb::ClientState::Unspecified, |state| match state {
                State::Enabled => pb::ClientState::Enabled,
                State::Disabled => pb::ClientState::Disabled,
                State::Removed => pb::ClientState::Removed,
            });
            let role = role.unwrap_or_default();
            let clients = pages(limit, async |page_size, page_token| {
                let request = pb::ListClientsRequest {
                    page_size,
                    page_token,
                    role: role.clone(),
                    state: state.into(),
                };
                let page = remote.read(request, rpc!(AdminServiceClient, list_clients)).await?;
                Ok((page.clients, page.next_page_token))
            })
            .await?;
            let clients = clients.into_iter().map(ClientView::from).collect();
            return app.out.print(&ClientsView { clients });
        }
        ClientCommand::Describe { client } => {
            let request = pb::GetClientRequest { client_id: client };
            remote.read(request, rpc!(AdminServiceClient, get_client)).await?.client
        }
        ClientCommand::Update(args) => {
            let request = update_request(*args)?;
            remote.mutate(request, rpc!(AdminServiceClient, update_client)).await?.client
        }
        ClientCommand::Disable(ClientChange { client, expected_revision }) => {
            let request = pb::DisableClientRequest { client_id: client, expected_revision };
            remote.mutate(request, rpc!(AdminServiceClient, disable_client)).await?.client
        }
        ClientCommand::Enable(ClientChange { client, expected_revision }) => {
            let request = pb::EnableClientRequest { client_id: client, expected_revision };
            remote.mutate(request, rpc!(AdminServiceClient, enable_client)).await?.client
        }
        ClientCommand::RotateApiKey(args) => return rotate(app, &remote, args).await,
        ClientCommand::Remove { change: ClientChange { client, expected_revision }, yes } => {
            if !yes {
                confirm(&format!(
                    "Removing {client} for ever; its id is never used again. Go on?"
                ))?;
            }
            let request = pb::RemoveClientRequest { client_id: client, expected_revision };
            remote.mutate(request, rpc!(AdminServiceClient, remove_client)).await?.client
        }
    };
    app.out.print(&ClientView::of(changed))
}

async fn add(app: &App, remote: &Remote, args: AddArgs) -> Result<(), CliError> {
    writable(args.api_key_out.as_ref())?;
    let mut identities = args.identities.wire();
    if identities.is_empty() {
        use crate::authn::certificate::CertificateIdentity;
        let Ok(CertificateIdentity::SpiffeUri(value)) = crate::pki::client_identity(&args.client)
        else {
            return Err(CliError::usage(format!(
                "{}: this id does not fit into a SPIFFE ID",
                args.client
            ))
            .hint(
                "Name what its certificates have with --spiffe, --dns, --common-name or \
                 --spki-sha256.",
            ));
        };
        let kind = pb::CertificateIdentityKind::SpiffeUri.into();
        identities.push(pb::CertificateIdentity { kind, value });
    }
    let request = pb::CreateClientRequest {
        client_id: args.client,
        name: args.name,
        description: args.description,
        environment: args.environment,
        tier: args.tier.into(),
        roles: args.roles,
        permissions: args.permissions,
        identities,
        without_api_key: args.no_api_key,
        api_key_expires_at: args.api_key_expires.map(|w| timestamp(w.after(now()))),
    };
    let answer = remote.mutate(request, rpc!(AdminServiceClient, create_client)).await?;
    let api_key = keep(answer.api_key, args.api_key_out.as_deref())?;
    app.out.print(&AddedView { client: ClientView::of(answer.client), api_key })
}

fn update_request(args: UpdateArgs) -> Result<pb::UpdateClientRequest, CliError> {
    let ClientChange { client, expected_revision } = args.change;
    let request = pb::UpdateClientRequest {
        client_id: client,
        name: args.name,
        description: args.description,
        environment: args.environment,
        tier: args.tier.map(i32::from),
        roles_to_add: args.roles,
        roles_to_remove: args.remove_roles,
        permissions_to_add: args.permissions,
        permissions_to_remove: args.remove_permissions,
        identities_to_add: args.identities.wire(),
        identities_to_remove: args.remove_identities,
        expected_revision: None,
    };
    let nothing =
        pb::UpdateClientRequest { client_id: request.client_id.clone(), ..Default::default() };
    if request == nothing {
        return Err(CliError::usage("nothing to change was given")
            .hint("`polykey client update --help` lists what can be changed."));
    }
    Ok(pb::UpdateClientRequest { expected_revision, ..request })
}

async fn rotate(app: &App, remote: &Remote, args: RotateArgs) -> Result<(), CliError> {
    writable(args.api_key_out.as_ref())?;
    let overlap_seconds =
        i32::try_from(args.overlap).map_err(|_| CliError::usage("--overlap is at most 30d"))?;
    let request = pb::RotateClientApiKeyRequest {
        client_id: args.client.clone(),
        overlap_seconds,
        expires_at: args.expires.map(|w| timestamp(w.after(now()))),
    };
    let answer = remote.mutate(request, rpc!(AdminServiceClient, rotate_client_api_key)).await?;
    let api_key = keep(answer.api_key, args.api_key_out.as_deref())?;
    app.out.print(&RotatedView {
        client: args.client,
        api_key,
        info: answer.info.unwrap_or_default().into(),
        old_keys_expire_at: time(answer.old_keys_expire_at.as_ref()),
    })
}

pub(super) async fn cert(app: &App, command: CertCommand) -> Result<(), CliError> {
    let CertCommand::Issue(args) = command;
    let at = |name: &str| args.out.join(name);
    let (certificate, ca, profile) = (at("client.pem"), at("ca.pem"), at("profile.toml"));
    let key = match &args.key {
        None => at("client.key"),
        Some(path) => std::path::absolute(path).map_err(|error| CliError::file(path, &error))?,
    };
    std::fs::create_dir_all(&args.out).map_err(|error| CliError::file(&args.out, &error))?;
    let made = [Some(&certificate), Some(&ca), Some(&profile), args.csr.is_none().then_some(&key)];
    if let Some(path) = made.into_iter().flatten().find(|path| path.exists())
        && !args.force
    {
        return Err(CliError::usage(format!("{}: exists already", path.display()))
            .hint("Choose another directory, or add --force to replace it."));
    }
    let csr_pem = args.csr.as_deref().map(value::text_file).transpose()?.unwrap_or_default();
    let remote = app.connect().await?;
    let request = pb::IssueCertificateRequest {
        client_id: args.client.clone(),
        csr_pem,
        validity_seconds: args.days * 86_400,
    };
    let answer = remote.mutate(request, rpc!(AdminServiceClient, issue_certificate)).await?;
    let private = zeroize::Zeroizing::new(answer.private_key_pem);
    let put = |path: &Path, text: &str, mode| {
        file::write(path, text.as_bytes(), mode).map_err(|error| CliError::file(path, &error))
    };
    if args.csr.is_none() {
        put(&key, &private, file::PRIVATE)?;
    }
    put(&certificate, &answer.certificate_chain_pem, file::PUBLIC)?;
    // The authority of clients need not be that of the server: the profile trusts what ours trusts.
    let here = remote.session.profile();
    let trusted = value::text_file(&here.files.server_ca)?;
    put(&ca, &trusted, file::PUBLIC)?;
    let text = ProfileText {
        address: here.host_port().to_owned(),
        server_name: here.server_name.clone(),
        ca: "ca.pem".into(),
        certificate: "client.pem".into(),
        key: if args.csr.is_none() { "client.key".into() } else { key.clone() },
        client_id: Some(args.client),
        api_key_file: None,
    };
    let text = toml::to_string(&text)
        .map_err(|error| CliError::new(super::Exit::Other, error.to_string()))?;
    put(&profile, &text, file::PUBLIC)?;
    app.out.print(&IssuedView {
        certificate,
        certificate_sha256: answer.certificate_sha256,
        key,
        ca,
        profile,
        expires_at: time(answer.not_after.as_ref()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_read_as_they_are_printed() {
        for text in
            ["spiffe-uri:spiffe://a/b", "dns:a.example", "common-name:a b", "spki-sha256:00ff"]
        {
            let view = super::super::admin_view::IdentityView::from(identity(text).unwrap());
            assert_eq!(view.to_string(), text);
        }
        assert!(identity("dns").is_err() && identity("ip:1.2.3.4").is_err());
    }
}
