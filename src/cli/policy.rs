//! `polykey policy` and `polykey role`: what clients may do.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::admin_view::{RoleView, RolesView};
use super::error::CliError;
use super::output::{Human, View};
use super::remote::pages;
use super::value;
use super::view::{DoneView, yes};
use crate::client::rpc;

/// Subcommands of `policy`.
#[derive(Subcommand, Debug)]
pub enum PolicyCommand {
    /// Check policy files against the schema, without a server.
    Check(CheckArgs),
    /// List the policies of the server.
    List {
        /// Show their text.
        #[arg(long)]
        text: bool,
        /// Print the schema instead.
        #[arg(long, conflicts_with = "text")]
        schema: bool,
    },
    /// Tell whether a client may do something, and which policies say so.
    Explain {
        /// The id of the client.
        #[arg(long, value_name = "CLIENT")]
        client: String,
        /// What it would do, such as RotateKey.
        #[arg(long, value_name = "ACTION")]
        action: String,
        /// The key it would do it to: its id, or alias/NAME.
        #[arg(long, value_name = "KEY", value_parser = value::key_name)]
        key: Option<String>,
    },
}

/// Arguments of `policy check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Policy files.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Check each as the access policy of a key: one that speaks of that key alone.
    #[arg(long)]
    pub key_policy: bool,
}

/// Subcommands of `role`.
#[derive(Subcommand, Debug)]
pub enum RoleCommand {
    /// List roles by name.
    List,
    /// Make a role, or replace what it permits.
    Put {
        /// The name of the role.
        #[arg(value_name = "ROLE")]
        name: String,
        /// A permission, such as keys:read; may be repeated. These are all that the role has then.
        #[arg(long = "permission", value_name = "PERMISSION", required = true)]
        permissions: Vec<String>,
        /// A text for people.
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        description: String,
        /// Do nothing unless the role has this revision; 0: unless it is new.
        #[arg(long, value_name = "N")]
        expected_revision: Option<u64>,
    },
    /// Remove a role that no client has.
    Delete {
        /// The name of the role.
        #[arg(value_name = "ROLE")]
        name: String,
        /// Do nothing unless the role has this revision.
        #[arg(long, value_name = "N")]
        expected_revision: Option<u64>,
    },
}

/// A policy of the server.
#[derive(Serialize)]
struct PolicyView {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    source: String,
    text: String,
    annotations: std::collections::BTreeMap<String, String>,
}

/// The policies of the server.
#[derive(Serialize)]
struct PoliciesView {
    policies: Vec<PolicyView>,
    #[serde(skip)]
    text: bool,
}

impl View for PoliciesView {
    fn human(&self) -> Human {
        if self.text {
            let texts = self
                .policies
                .iter()
                .map(|p| format!("// {} ({})\n{}\n", p.id, p.source, p.text.trim()));
            return Human::Text(texts.collect::<Vec<_>>().join("\n"));
        }
        Human::Rows(
            &["ID", "TYPE", "SOURCE"],
            self.policies
                .iter()
                .map(|p| vec![p.id.clone(), p.kind.clone(), p.source.clone()])
                .collect(),
        )
    }
}

/// The schema that policies must fit.
#[derive(Serialize)]
struct SchemaView {
    schema: String,
}

impl View for SchemaView {
    fn human(&self) -> Human {
        Human::Text(self.schema.clone())
    }
}

/// A decision, and why.
#[derive(Serialize)]
struct DecisionView {
    allowed: bool,
    visible: bool,
    policies: Vec<String>,
    reasons: Vec<String>,
    errors: Vec<String>,
}

impl View for DecisionView {
    fn human(&self) -> Human {
        let mut fields = vec![
            ("allowed", yes(self.allowed)),
            ("visible", yes(self.visible)),
            ("policies", self.policies.join(", ")),
        ];
        fields.extend(self.reasons.iter().map(|reason| ("reason", reason.clone())));
        fields.extend(self.errors.iter().map(|error| ("error", error.clone())));
        Human::Record(fields)
    }
}

pub(super) async fn run(app: &App, command: PolicyCommand) -> Result<(), CliError> {
    match command {
        PolicyCommand::Check(args) => super::policy_check::check(app, &args),
        PolicyCommand::List { text, schema } => {
            let remote = app.connect().await?;
            let mut text_of_schema = String::new();
            let policies = pages(None, async |page_size, page_token| {
                let request = pb::ListPoliciesRequest { page_size, page_token };
                let page = remote.read(request, rpc!(AdminServiceClient, list_policies)).await?;
                text_of_schema.push_str(&page.schema);
                Ok((page.policies, page.next_page_token))
            })
            .await?;
            if schema {
                return app.out.print(&SchemaView { schema: text_of_schema });
            }
            let view = |p: pb::PolicyRecord| PolicyView {
                id: p.policy_id,
                kind: p.policy_type,
                source: p.source,
                text: p.text,
                annotations: p.annotations.into_iter().collect(),
            };
            app.out
                .print(&PoliciesView { policies: policies.into_iter().map(view).collect(), text })
        }
        PolicyCommand::Explain { client, action, key } => {
            let remote = app.connect().await?;
            let request = pb::ExplainAuthorizationRequest {
                client_id: client,
                action,
                key_id: key.unwrap_or_default(),
                attributes: None,
            };
            let answer =
                remote.read(request, rpc!(AdminServiceClient, explain_authorization)).await?;
            app.out.print(&DecisionView {
                allowed: answer.allowed,
                visible: answer.visible,
                policies: answer.policy_ids,
                reasons: answer.reasons,
                errors: answer.errors,
            })
        }
    }
}

pub(super) async fn role(app: &App, command: RoleCommand) -> Result<(), CliError> {
    let remote = app.connect().await?;
    match command {
        RoleCommand::List => {
            let roles = pages(None, async |page_size, page_token| {
                let request = pb::ListRolesRequest { page_size, page_token };
                let page = remote.read(request, rpc!(AdminServiceClient, list_roles)).await?;
                Ok((page.roles, page.next_page_token))
            })
            .await?;
            app.out.print(&RolesView { roles: roles.into_iter().map(RoleView::from).collect() })
        }
        RoleCommand::Put { name, permissions, description, expected_revision } => {
            let request = pb::PutRoleRequest { name, permissions, description, expected_revision };
            let answer = remote.mutate(request, rpc!(AdminServiceClient, put_role)).await?;
            app.out.print(&RoleView::from(answer.role.unwrap_or_default()))
        }
        RoleCommand::Delete { name, expected_revision } => {
            let request = pb::DeleteRoleRequest { name: name.clone(), expected_revision };
            let answer = remote.mutate(request, rpc!(AdminServiceClient, delete_role)).await?;
            let done = DoneView::new(format!("role {name}: deleted"), Some(answer.audit_index));
            app.out.print(&done)
        }
    }
}
