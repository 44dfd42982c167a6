//! What the subcommands of `polykey key` do.

use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::audit_view::{EventsView, events};
use super::error::CliError;
use super::key::{
    ChangeArgs, CreateArgs, DescribeArgs, DestroyArgs, GetArgs, HistoryArgs, KeyCommand, ListArgs,
    RevokeArgs, RotateArgs, Status, Strategy, UpdateArgs, credential,
};
use super::output::{Human, View, confirm, write_out};
use super::remote::{Remote, pages};
use super::value::{self, now, timestamp};
use super::view::{KeyView, KeysView, RotatedView, WrappedView, pairs, short, time};
use super::{key_export, key_versions};
use crate::client::rpc;

pub(super) async fn run(app: &App, command: KeyCommand) -> Result<(), CliError> {
    // These two need no server.
    let command = match command {
        KeyCommand::OpenExport(args) => return key_export::open(app, &args),
        KeyCommand::ExportKeygen(args) => return key_export::keygen(app, &args),
        other => other,
    };
    let remote = app.connect().await?;
    match command {
        KeyCommand::Create(args) => create(app, &remote, *args).await,
        KeyCommand::Get(args) => get(app, &remote, args).await,
        KeyCommand::List(args) => list(app, &remote, args).await,
        KeyCommand::Describe(args) => describe(app, &remote, args).await,
        KeyCommand::Update(args) => update(app, &remote, *args).await,
        KeyCommand::Rotate(args) => rotate(app, &remote, args).await,
        KeyCommand::Revoke(args) => revoke(app, &remote, args).await,
        KeyCommand::Enable(ChangeArgs { key, expected_revision }) => {
            let request = pb::EnableKeyRequest { key_id: key.key, expected_revision };
            let answer =
                remote.mutate(request, rpc!(KeyLifecycleServiceClient, enable_key)).await?;
            app.out.print(&KeyView::of(answer.metadata))
        }
        KeyCommand::Disable(ChangeArgs { key, expected_revision }) => {
            let request = pb::DisableKeyRequest { key_id: key.key, expected_revision };
            let answer =
                remote.mutate(request, rpc!(KeyLifecycleServiceClient, disable_key)).await?;
            app.out.print(&KeyView::of(answer.metadata))
        }
        KeyCommand::Destroy(args) => destroy(app, &remote, args).await,
        KeyCommand::CancelDestroy(ChangeArgs { key, expected_revision }) => {
            let request = pb::CancelKeyDestructionRequest { key_id: key.key, expected_revision };
            let answer = remote
                .mutate(request, rpc!(KeyLifecycleServiceClient, cancel_key_destruction))
                .await?;
            app.out.print(&KeyView::of(answer.metadata))
        }
        KeyCommand::Export(args) => key_export::export(app, &remote, args).await,
        KeyCommand::History(args) => history(app, &remote, args).await,
        KeyCommand::Alias(command) => key_versions::alias(app, &remote, command).await,
        KeyCommand::Versions(args) => key_versions::versions(app, &remote, args.key).await,
        KeyCommand::Bounds(args) => key_versions::bounds(app, &remote, args).await,
        KeyCommand::Trim(args) => key_versions::trim(app, &remote, args).await,
        KeyCommand::OpenExport(_) | KeyCommand::ExportKeygen(_) => Ok(()),
    }
}

fn create_request(args: CreateArgs) -> Result<pb::CreateKeyRequest, CliError> {
    let now = now();
    if args.value_file.is_some() && args.key_type.0 != polykey_hsm::Algorithm::ApiKey {
        return Err(CliError::usage("--value-file goes with `--type api-key` only"));
    }
    let alias = args.alias.unwrap_or_default();
    Ok(pb::CreateKeyRequest {
        key_type: pb::KeyType::from(args.key_type).into(),
        description: args.description.unwrap_or_default(),
        tags: args.tags.into_iter().collect(),
        expires_at: args.expires.map(|w| timestamp(w.after(now))),
        initial_authorized_contexts: args.contexts,
        access_policies: value::policies(&args.policies)?,
        data_classification: args.classification.map(|c| c.name().to_owned()).unwrap_or_default(),
        exportable: args.exportable,
        value: bytes_of(&credential(args.value_file.as_ref())?),
        alias: alias.strip_prefix("alias/").unwrap_or(&alias).to_owned(),
        read_after_expiry: args.read_after_expiry,
        rotation_period_seconds: args.rotation_period.unwrap_or(0),
        purpose: args.purpose.map_or(0, |p| pb::KeyPurpose::from(p).into()),
        convergent: args.convergent,
        rotate_after_uses: args.rotate_after_uses.unwrap_or(0),
        max_uses: args.max_uses.unwrap_or(0),
        in_token: args.storage == Some(super::key::Storage::Token),
        storage_profile: args.storage.map_or(0, |s| pb::StorageProfile::from(s).into()),
        ..Default::default()
    })
}

fn bytes_of(secret: &[u8]) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(secret)
}

async fn create(app: &App, remote: &Remote, args: CreateArgs) -> Result<(), CliError> {
    let request = create_request(args)?;
    let answer = remote.mutate(request, rpc!(PolykeyServiceClient, create_key)).await?;
    app.out.print(&KeyView::of(answer.metadata))
}

async fn get(app: &App, remote: &Remote, args: GetArgs) -> Result<(), CliError> {
    let GetArgs { key, version, public_key } = args;
    let request = pb::GetKeyRequest { key_id: key.key, version, ..Default::default() };
    if !public_key {
        let answer = remote.read(request, rpc!(PolykeyServiceClient, get_key)).await?;
        return app.out.print(&WrappedView::from(answer));
    }
    let request =
        pb::GetKeyMetadataRequest { key_id: request.key_id, version, ..Default::default() };
    let answer = remote.read(request, rpc!(PolykeyServiceClient, get_key_metadata)).await?;
    let key = KeyView::of(answer.metadata);
    match key.public_key_pem {
        Some(pem) => write_out(pem.as_bytes()),
        None => Err(CliError::usage(format!(
            "{}: a key of type {} has no public key",
            key.id, key.key_type
        ))),
    }
}

fn list_request(args: &ListArgs) -> pb::ListKeysRequest {
    let now = now();
    let status = |status: &Status| {
        i32::from(match status {
            Status::Active => pb::KeyStatus::Active,
            Status::Rotating => pb::KeyStatus::Rotating,
            Status::Deprecated => pb::KeyStatus::Deprecated,
            Status::Revoked => pb::KeyStatus::Revoked,
        })
    };
    pb::ListKeysRequest {
        key_types: args.key_types.iter().map(|t| pb::KeyType::from(*t).into()).collect(),
        statuses: args.statuses.iter().map(status).collect(),
        tag_filters: args.tags.iter().cloned().collect(),
        created_after: args.created_after.map(|w| timestamp(w.before(now))),
        created_before: args.created_before.map(|w| timestamp(w.before(now))),
        ..Default::default()
    }
}

async fn list(app: &App, remote: &Remote, args: ListArgs) -> Result<(), CliError> {
    let request = list_request(&args);
    let (mut total_count, mut filtered_count) = (0, 0);
    let keys = pages(args.limit, async |page_size, page_token| {
        let request = pb::ListKeysRequest { page_size, page_token, ..request.clone() };
        let page = remote.read(request, rpc!(PolykeyServiceClient, list_keys)).await?;
        (total_count, filtered_count) = (page.total_count, page.filtered_count);
        Ok((page.keys, page.next_page_token))
    })
    .await?;
    let keys = keys.into_iter().map(KeyView::from).collect();
    app.out.print(&KeysView { keys, total_count, filtered_count })
}

/// A key with its uses and policies.
#[derive(Serialize)]
pub(super) struct DescriptionView {
    #[serde(flatten)]
    pub(super) key: KeyView,
    pub(super) uses: Option<Vec<UseView>>,
    pub(super) policies: Option<Vec<PolicyView>>,
}

/// One use of a key.
#[derive(Serialize)]
pub(super) struct UseView {
    pub(super) time: Option<String>,
    pub(super) client: String,
    pub(super) action: String,
    pub(super) success: bool,
    pub(super) correlation_id: String,
}

/// A policy that can apply to a key.
#[derive(Serialize)]
pub(super) struct PolicyView {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) params: std::collections::BTreeMap<String, String>,
    pub(super) effective_from: Option<String>,
    pub(super) effective_until: Option<String>,
}

impl View for DescriptionView {
    fn human(&self) -> Human {
        let mut fields = self.key.fields();
        for used in self.uses.iter().flatten() {
            let outcome = if used.success { "" } else { " (failed)" };
            let when = short(used.time.as_ref());
            fields.push(("use", format!("{when}  {}  {}{outcome}", used.client, used.action)));
        }
        for policy in self.policies.iter().flatten() {
            let params = pairs(&policy.params);
            fields.push(("policy", format!("{}  {}  {params}", policy.id, policy.kind)));
        }
        Human::Record(fields)
    }
}

async fn describe(app: &App, remote: &Remote, args: DescribeArgs) -> Result<(), CliError> {
    let request = pb::GetKeyMetadataRequest {
        key_id: args.key.key,
        version: args.version,
        include_access_history: args.uses,
        include_policy_details: args.policies,
        ..Default::default()
    };
    let answer = remote.read(request, rpc!(PolykeyServiceClient, get_key_metadata)).await?;
    let uses = args.uses.then(|| {
        let view = |entry: pb::AccessHistoryEntry| UseView {
            time: time(entry.timestamp.as_ref()),
            client: entry.client_identity,
            action: entry.operation,
            success: entry.success,
            correlation_id: entry.correlation_id,
        };
        answer.access_history.into_iter().map(view).collect()
    });
    let policies = args.policies.then(|| {
        let view = |policy: pb::PolicyDetail| PolicyView {
            id: policy.policy_id,
            kind: policy.policy_type,
            params: policy.policy_params.into_iter().collect(),
            effective_from: time(policy.effective_from.as_ref()),
            effective_until: time(policy.effective_until.as_ref()),
        };
        answer.policy_details.into_values().map(view).collect()
    });
    app.out.print(&DescriptionView { key: KeyView::of(answer.metadata), uses, policies })
}

fn update_request(args: UpdateArgs) -> Result<pb::UpdateKeyMetadataRequest, CliError> {
    let now = now();
    let request = pb::UpdateKeyMetadataRequest {
        key_id: args.change.key.key,
        description: args.description,
        tags_to_add: args.tags.into_iter().collect(),
        tags_to_remove: args.remove_tags,
        contexts_to_add: args.contexts,
        contexts_to_remove: args.remove_contexts,
        policies_to_update: value::policies(&args.policies)?,
        expires_at: args.expires.map(|w| timestamp(w.after(now))),
        data_classification: args.classification.map(|c| c.name().to_owned()),
        policies_to_remove: args.remove_policies,
        clear_expires_at: args.no_expiry,
        rotation_period_seconds: args.rotation_period,
        expected_revision: None,
        requester_context: None,
    };
    let nothing =
        pb::UpdateKeyMetadataRequest { key_id: request.key_id.clone(), ..Default::default() };
    if request == nothing {
        return Err(CliError::usage("nothing to change was given")
            .hint("`polykey key update --help` lists what can be changed."));
    }
    Ok(pb::UpdateKeyMetadataRequest { expected_revision: args.change.expected_revision, ..request })
}

/// The key as it is after a call that answers with nothing. Who may change a key need not be allowed
/// to read it: then only the change is reported.
async fn print_after(
    app: &App,
    remote: &Remote,
    key_id: String,
    done: &str,
) -> Result<(), CliError> {
    let request = pb::GetKeyMetadataRequest { key_id: key_id.clone(), ..Default::default() };
    match remote.read(request, rpc!(PolykeyServiceClient, get_key_metadata)).await {
        Ok(answer) => app.out.print(&KeyView::of(answer.metadata)),
        Err(error) if error.exit == super::Exit::Denied => {
            app.out.print(&super::view::DoneView::new(format!("{key_id}: {done}"), None))
        }
        Err(error) => Err(CliError {
            message: format!("{key_id} was {done}, but cannot be shown: {}", error.message),
            ..error
        }),
    }
}

async fn update(app: &App, remote: &Remote, args: UpdateArgs) -> Result<(), CliError> {
    let request = update_request(args)?;
    let key_id = request.key_id.clone();
    remote.mutate(request, rpc!(PolykeyServiceClient, update_key_metadata)).await?;
    print_after(app, remote, key_id, "updated").await
}

fn rotate_request(args: RotateArgs) -> Result<pb::RotateKeyRequest, CliError> {
    if args.at.is_some() && args.strategy != Strategy::Staged {
        return Err(CliError::usage("--at goes with `--strategy staged` only"));
    }
    if args.period.is_some() && args.strategy != Strategy::Scheduled {
        return Err(CliError::usage("--period goes with `--strategy scheduled` only"));
    }
    let grace = i32::try_from(args.grace.unwrap_or(0))
        .map_err(|_| CliError::usage("--grace is too long; leave it out for no limit"))?;
    let strategy = match args.strategy {
        Strategy::Hot => pb::RotationStrategy::Hot,
        Strategy::Staged => pb::RotationStrategy::Staged,
        Strategy::Scheduled => pb::RotationStrategy::Scheduled,
    };
    let period = args.period.map(|p| ("rotation_period_seconds".to_owned(), p.to_string()));
    Ok(pb::RotateKeyRequest {
        key_id: args.change.key.key,
        strategy: strategy.into(),
        grace_period_seconds: grace,
        generation_params: period.into_iter().collect(),
        expected_revision: args.change.expected_revision,
        clear_access_policies: args.clear_policies,
        value: bytes_of(&credential(args.value_file.as_ref())?),
        effective_at: args.at.map(|w| timestamp(w.after(now()))),
        ..Default::default()
    })
}

async fn rotate(app: &App, remote: &Remote, args: RotateArgs) -> Result<(), CliError> {
    let request = rotate_request(args)?;
    let answer = remote.mutate(request, rpc!(PolykeyServiceClient, rotate_key)).await?;
    app.out.print(&RotatedView::from(answer))
}

async fn revoke(app: &App, remote: &Remote, args: RevokeArgs) -> Result<(), CliError> {
    let request = pb::RevokeKeyRequest {
        key_id: args.change.key.key,
        revocation_reason: args.reason,
        immediate: args.at.is_none(),
        effective_at: args.at.map(|w| timestamp(w.after(now()))),
        notify_external_systems: args.notify,
        expected_revision: args.change.expected_revision,
        ..Default::default()
    };
    let (key_id, done) = (
        request.key_id.clone(),
        if request.immediate { "revoked" } else { "scheduled for revocation" },
    );
    remote.mutate(request, rpc!(PolykeyServiceClient, revoke_key)).await?;
    print_after(app, remote, key_id, done).await
}

async fn destroy(app: &App, remote: &Remote, args: DestroyArgs) -> Result<(), CliError> {
    let ChangeArgs { key, expected_revision } = args.change;
    if !args.yes {
        confirm(&format!(
            "Destroying {}: unusable now, all its material erased for ever in {} days. Go on?",
            key.key, args.days
        ))?;
    }
    let request = pb::ScheduleKeyDestructionRequest {
        key_id: key.key,
        window_days: args.days,
        expected_revision,
    };
    let answer =
        remote.mutate(request, rpc!(KeyLifecycleServiceClient, schedule_key_destruction)).await?;
    app.out.print(&KeyView::of(answer.metadata))
}

async fn history(app: &App, remote: &Remote, args: HistoryArgs) -> Result<(), CliError> {
    let now = now();
    let request = pb::GetKeyHistoryRequest {
        key_id: args.key.key,
        since: args.since.map(|w| timestamp(w.before(now))),
        until: args.until.map(|w| timestamp(w.before(now))),
        ..Default::default()
    };
    let found = pages(Some(args.limit), async |page_size, page_token| {
        let request = pb::GetKeyHistoryRequest { page_size, page_token, ..request.clone() };
        let page = remote.read(request, rpc!(KeyLifecycleServiceClient, get_key_history)).await?;
        Ok((page.events, page.next_page_token))
    })
    .await?;
    app.out.print(&EventsView { events: events(found), archives: Vec::new() })
}
