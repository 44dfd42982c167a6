//! `polykey login|whoami|token`: tokens of this client, and of others.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::admin_view::WhoView;
use super::error::CliError;
use super::output::{Human, View};
use super::remote::Remote;
use super::view::{DoneView, short, time};
use crate::client::{file, rpc};

/// Subcommands of `token`.
#[derive(Subcommand, Debug)]
pub enum TokenCommand {
    /// Revoke the tokens of this login, a given token, or every token of a client.
    Revoke(RevokeArgs),
}

/// Arguments of `token revoke`.
#[derive(Args, Debug)]
pub struct RevokeArgs {
    /// The access or refresh token to revoke is in this file; - for standard input.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The client whose token it is; without --token-file: every token of that client.
    #[arg(long, value_name = "CLIENT")]
    pub client: Option<String>,
}

/// Largest token, in bytes.
const MAX_TOKEN: u64 = 64 * 1024;

/// A login.
#[derive(Serialize)]
struct LoginView {
    client: String,
    node: String,
    access_expires_at: String,
    refresh_expires_at: Option<String>,
    token_file: PathBuf,
}

impl View for LoginView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("client", self.client.clone()),
            ("node", self.node.clone()),
            ("token ends", short(Some(&self.access_expires_at))),
            ("login ends", short(self.refresh_expires_at.as_ref())),
            ("token file", self.token_file.display().to_string()),
        ])
    }
}

/// What was revoked, and from when on.
#[derive(Serialize)]
struct RevokedView {
    client: String,
    revoked_before: Option<String>,
    audit_index: u64,
}

impl View for RevokedView {
    fn human(&self) -> Human {
        let until = short(self.revoked_before.as_ref());
        Human::Text(format!("{}: every token issued before {until} is revoked", self.client))
    }
}

pub(super) async fn login(app: &App) -> Result<(), CliError> {
    let remote = app.connect().await?;
    let waiting = "logging in";
    let token = super::progress::watch(waiting, remote.session.login()).await?;
    let me = remote.read(pb::WhoAmIRequest {}, rpc!(AdminServiceClient, who_am_i)).await?;
    let refreshable = !token.refresh_token().is_empty();
    app.out.print(&LoginView {
        client: me.client_id,
        node: me.node_id,
        access_expires_at: token.access_expires_at().to_string(),
        refresh_expires_at: refreshable.then(|| token.refresh_expires_at().to_string()),
        token_file: remote.session.profile().token_path(),
    })
}

pub(super) async fn whoami(app: &App) -> Result<(), CliError> {
    let remote = app.connect().await?;
    let me = remote.read(pb::WhoAmIRequest {}, rpc!(AdminServiceClient, who_am_i)).await?;
    app.out.print(&WhoView::from(me))
}

pub(super) async fn token(app: &App, command: TokenCommand) -> Result<(), CliError> {
    let TokenCommand::Revoke(args) = command;
    let remote = app.connect().await?;
    match (args.token_file, args.client) {
        (None, None) => revoke_own(app, &remote).await,
        (None, Some(client)) => {
            let request = pb::RevokeClientTokensRequest { client_id: client.clone() };
            let answer =
                remote.mutate(request, rpc!(AdminServiceClient, revoke_client_tokens)).await?;
            app.out.print(&RevokedView {
                client,
                revoked_before: time(answer.revoked_before.as_ref()),
                audit_index: answer.audit_index,
            })
        }
        (Some(path), client) => {
            let token = file::read_secret(&path, MAX_TOKEN)
                .map_err(|error| CliError::file(&path, &error))?;
            let index = revoke(&remote, &token, client.unwrap_or_default()).await?;
            app.out.print(&DoneView::new("the token is revoked", Some(index)))
        }
    }
}

/// Revokes this login: the refresh token takes every token that descends from it.
async fn revoke_own(app: &App, remote: &Remote) -> Result<(), CliError> {
    let Some(token) = remote.session.cached() else {
        return app.out.print(&DoneView::new("not logged in: nothing to revoke", None));
    };
    let secret =
        if token.refresh_token().is_empty() { token.access_token() } else { token.refresh_token() };
    let index = revoke(remote, secret, String::new()).await?;
    remote.session.forget().await.map_err(CliError::from)?;
    app.out.print(&DoneView::new("logged out: the tokens of this login are revoked", Some(index)))
}

async fn revoke(remote: &Remote, token: &str, client_id: String) -> Result<u64, CliError> {
    let request = pb::RevokeTokenRequest { access_token: token.to_owned(), client_id };
    let answer = remote.mutate(request, rpc!(PolykeyServiceClient, revoke_token)).await?;
    Ok(answer.audit_index)
}
