//! `polykey key alias|versions|bounds|trim`: names of keys, and which of their versions work.

use clap::{Args, Subcommand};
use polykey_proto::polykey::v2 as pb;

use super::App;
use super::error::{CliError, Exit};
use super::key::ChangeArgs;
use super::output::confirm;
use super::remote::{Remote, pages};
use super::value;
use super::view::{AliasView, AliasesView, DoneView, KeyView, VersionsView};
use crate::client::rpc;

/// Subcommands of `key alias`.
#[derive(Subcommand, Debug)]
pub enum AliasCommand {
    /// Give a key a name, or point a name to another key of the same type.
    Set {
        /// The name, with or without alias/ in front.
        #[arg(value_name = "NAME")]
        alias: String,
        /// The key: its id, or alias/NAME.
        #[arg(value_name = "KEY", value_parser = value::key_name)]
        key: String,
        /// Do nothing unless the name is that of the key with this id.
        #[arg(long, value_name = "ID")]
        expected_key: Option<String>,
    },
    /// Remove a name; the key stays.
    Delete {
        /// The name, with or without alias/ in front.
        #[arg(value_name = "NAME")]
        alias: String,
    },
    /// List names.
    List {
        /// Only those of this key.
        #[arg(value_name = "KEY", value_parser = value::key_name)]
        key: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
}

/// Arguments of `key bounds`.
#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("bound").args(["min_decryption", "min_encryption"]).required(true).multiple(true))]
pub struct BoundsArgs {
    /// The key and its expected revision.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// The lowest version that opens data.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub min_decryption: Option<i32>,
    /// The lowest version that may be named to seal data; 0: the primary only.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    pub min_encryption: Option<i32>,
}

/// Arguments of `key trim`.
#[derive(Args, Debug)]
pub struct TrimArgs {
    /// The key and its expected revision.
    #[command(flatten)]
    pub change: ChangeArgs,
    /// The lowest version to keep; all before it are erased for ever.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub min_available: i32,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}

pub(super) async fn alias(
    app: &App,
    remote: &Remote,
    command: AliasCommand,
) -> Result<(), CliError> {
    match command {
        AliasCommand::Set { alias, key, expected_key } => {
            let alias = set(remote, alias, key, expected_key).await?;
            app.out.print(&AliasView::from(alias.unwrap_or_default()))
        }
        AliasCommand::Delete { alias } => {
            let request = pb::DeleteAliasRequest { alias: alias.clone() };
            let answer =
                remote.mutate(request, rpc!(KeyLifecycleServiceClient, delete_alias)).await?;
            let name = alias.strip_prefix("alias/").unwrap_or(&alias);
            app.out
                .print(&DoneView::new(format!("alias/{name}: deleted"), Some(answer.audit_index)))
        }
        AliasCommand::List { key, limit } => {
            let key_id = key.unwrap_or_default();
            let aliases = pages(limit, async |page_size, page_token| {
                let request =
                    pb::ListAliasesRequest { key_id: key_id.clone(), page_size, page_token };
                let page =
                    remote.read(request, rpc!(KeyLifecycleServiceClient, list_aliases)).await?;
                Ok((page.aliases, page.next_page_token))
            })
            .await?;
            let aliases = aliases.into_iter().map(AliasView::from).collect();
            app.out.print(&AliasesView { aliases })
        }
    }
}

/// Creates the alias, or points it elsewhere when there is one. With an expected key it must be there.
async fn set(
    remote: &Remote,
    alias: String,
    key_id: String,
    expected: Option<String>,
) -> Result<Option<pb::KeyAlias>, CliError> {
    if expected.is_none() {
        let request = pb::CreateAliasRequest { alias: alias.clone(), key_id: key_id.clone() };
        match remote.mutate(request, rpc!(KeyLifecycleServiceClient, create_alias)).await {
            Ok(answer) => return Ok(answer.alias),
            // The name may be taken; only the update below can tell whether it may be moved.
            Err(error) if error.exit == Exit::Conflict => {}
            Err(error) => return Err(error),
        }
    }
    let expected_key_id = expected.unwrap_or_default();
    let request = pb::UpdateAliasRequest { alias, key_id, expected_key_id };
    let answer = remote.mutate(request, rpc!(KeyLifecycleServiceClient, update_alias)).await?;
    Ok(answer.alias)
}

pub(super) async fn versions(app: &App, remote: &Remote, key_id: String) -> Result<(), CliError> {
    let versions = pages(None, async |page_size, page_token| {
        let request = pb::ListKeyVersionsRequest { key_id: key_id.clone(), page_size, page_token };
        let page = remote.read(request, rpc!(KeyLifecycleServiceClient, list_key_versions)).await?;
        Ok((page.versions, page.next_page_token))
    })
    .await?;
    app.out.print(&VersionsView::from(versions))
}

pub(super) async fn bounds(app: &App, remote: &Remote, args: BoundsArgs) -> Result<(), CliError> {
    let request = pb::UpdateKeyVersionBoundsRequest {
        key_id: args.change.key.key,
        min_decryption_version: args.min_decryption,
        min_encryption_version: args.min_encryption,
        expected_revision: args.change.expected_revision,
    };
    let answer =
        remote.mutate(request, rpc!(KeyLifecycleServiceClient, update_key_version_bounds)).await?;
    app.out.print(&KeyView::of(answer.metadata))
}

pub(super) async fn trim(app: &App, remote: &Remote, args: TrimArgs) -> Result<(), CliError> {
    let key_id = args.change.key.key;
    if !args.yes {
        confirm(&format!(
            "Erasing every version of {key_id} before {} for ever. Go on?",
            args.min_available
        ))?;
    }
    let request = pb::TrimKeyVersionsRequest {
        key_id,
        min_available_version: args.min_available,
        expected_revision: args.change.expected_revision,
    };
    let answer = remote.mutate(request, rpc!(KeyLifecycleServiceClient, trim_key_versions)).await?;
    app.out.print(&KeyView::of(answer.metadata))
}
