//! `polykey.v2.AdminService`: the node and who may use it.

mod audit;
mod backup;
mod certificates;
mod clients;
mod commands;
mod page;
mod parse;
mod policies;
mod roles;
mod root;
mod slots;
mod status;
mod store;

use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};

use governor::clock::DefaultClock;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use parking_lot::Mutex;
use polykey_hsm::BoxFuture;
use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_proto::polykey::v2 as pb;
use polykey_storage::replicated::Replicated;
use prost::Message;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::Deps;
use super::admit::Admitted;
use super::key_service::Answers;
use crate::anchor::Keeper;
use crate::audit::{Outcome, Sinks};
use crate::authz::{Action, Command, DecisionId, Resource};
use crate::config::Config;
use crate::context::Context;
use crate::custody::{Custody, NamedWrapper};
use crate::directory::{Change, Directory};
use crate::error::Error;
use crate::jobs::Runner;
use crate::keyring::Idempotency;
use crate::net::NetMetrics;
use crate::net::tls::TlsState;
use crate::pki::Authority;
use crate::time::Time;
use crate::webhook::Webhooks;

/// What the administration works with besides [`Deps`].
pub struct AdminDeps {
    /// Root key and slots.
    pub custody: Arc<Custody>,
    /// The schedule.
    pub jobs: Arc<Runner>,
    /// Whom the node tells what became of keys.
    pub webhooks: Arc<Webhooks>,
    /// The node's own authority, if it has one.
    pub authority: Option<Arc<Authority>>,
    /// The configuration in effect.
    pub config: Arc<Config>,
    /// When it was read.
    pub loaded_at: Time,
    /// Whoever keeps the anchor of the store, if it has one.
    pub anchor: Option<Arc<Keeper>>,
    /// What may open the root key, and is needed to rotate it.
    pub wrappers: Vec<NamedWrapper>,
    /// The way to the replication target, if there is one.
    pub replication: Option<Arc<Replicated>>,
    /// The copies of the audit log.
    pub sinks: Arc<Sinks>,
    /// Certificates.
    pub tls: Arc<TlsState>,
    /// Counters of the network, once there are any.
    pub network: Arc<OnceLock<Arc<NetMetrics>>>,
    /// Reads files again, and tells of each part what was wrong with it.
    pub reload: Reload,
}

/// Reads the node's files again: the name of each part, and why it is as it was.
pub type Reload =
    Box<dyn Fn() -> BoxFuture<'static, Vec<(&'static str, Option<String>)>> + Send + Sync>;

/// The service.
#[derive(Clone)]
pub(crate) struct AdminService(Arc<Inner>);

struct Inner {
    deps: Arc<Deps>,
    admin: AdminDeps,
    /// Those of the configuration, and those of later rewrappings and additions.
    wrappers: Mutex<Vec<NamedWrapper>>,
    /// When the store was last verified, and whether that found nothing.
    verified: Mutex<Option<(Time, bool)>>,
    /// One backup at a time: each keeps the store from using space again.
    backups: Arc<Semaphore>,
    /// How often each client may ask for the hash of a value, which it may be guessing.
    hashes: RateLimiter<Arc<str>, HashMapStateStore<Arc<str>>, DefaultClock>,
}

/// Hashes of values that a client gets at once, and then a minute.
const HASHES: NonZeroU32 = NonZeroU32::new(10).unwrap();

/// The most times that a change is decided and tried anew because another one came first.
const ATTEMPTS: usize = 8;

impl AdminService {
    pub(crate) fn new(deps: Arc<Deps>, admin: AdminDeps) -> Self {
        let wrappers = Mutex::new(admin.wrappers.clone());
        let (verified, backups) = (Mutex::new(None), Arc::new(Semaphore::new(1)));
        let hashes =
            RateLimiter::hashmap_with_clock(Quota::per_minute(HASHES), DefaultClock::default());
        Self(Arc::new(Inner { deps, admin, wrappers, verified, backups, hashes }))
    }

    fn directory(&self) -> &Arc<Directory> {
        self.0.deps.authenticator.directory()
    }

    fn admit<M>(&self, request: Request<M>) -> Result<(Admitted, Context, M), Error> {
        let admitted = Admitted::of(request.extensions(), request.metadata(), &self.0.deps)?;
        let cx = admitted.context(None, None)?;
        Ok((admitted, cx, request.into_inner()))
    }

    async fn authorize<C: Command>(
        &self,
        cx: &Context,
        resource: Resource<'_>,
        command: C,
    ) -> Result<DecisionId, Error> {
        let permit = self.0.deps.keyring.authorize(cx, resource, command).await?;
        Ok(permit.decision_id())
    }

    /// Authorizes a look at the node, and writes it into the trail.
    async fn look<C: Command>(
        &self,
        cx: &Context,
        command: C,
        details: &[(&str, &str)],
    ) -> Result<(), Error> {
        let decision = self.authorize(cx, Resource::Node, command).await?;
        self.seen(cx, C::ACTION, decision, details).await
    }

    async fn seen(
        &self,
        cx: &Context,
        action: Action,
        decision: DecisionId,
        details: &[(&str, &str)],
    ) -> Result<(), Error> {
        self.0.deps.trail.used(event(cx, action, decision, details)).await
    }

    fn idempotency<M: Message>(
        admitted: &Admitted,
        method: &'static str,
        message: &M,
    ) -> Option<Idempotency> {
        admitted.once(method, 0, message.encode_to_vec())
    }

    /// Whether the request has been carried out before.
    async fn repeated(&self, cx: &Context, key: Option<&Idempotency>) -> Result<bool, Error> {
        match key {
            None => Ok(false),
            Some(key) => Ok(key.recorded(self.directory().vault(), cx).await?.is_some()),
        }
    }

    /// A change of the directory with all that goes with it.
    fn change(
        &self,
        cx: &Context,
        event: AuditEvent,
        expected: u64,
        key: Option<&Idempotency>,
        subject: &str,
    ) -> Change {
        let vault = self.directory().vault();
        let remember = key.map(|key| key.noted(vault, cx, subject));
        Change { event, now: cx.now, expected: Some(expected), remember }
    }
}

fn event(cx: &Context, action: Action, id: DecisionId, details: &[(&str, &str)]) -> AuditEvent {
    let draft = cx.origin().event(action.name(), None, Outcome::Success, 0, &id.to_string());
    details.iter().fold(draft, |draft, (name, value)| draft.detail(name, value)).build()
}

/// Tries again while another change came first, unless the caller named a revision.
macro_rules! settled {
    ($expected:expr, $attempt:expr) => {{
        let mut left = $crate::rpc::admin::ATTEMPTS;
        loop {
            left -= 1;
            match $attempt.await {
                Err($crate::error::Error::Conflict) if $expected.is_none() && left > 0 => {}
                other => break other,
            }
        }
    }};
}
use settled;

type Answer<T> = Result<Response<T>, Status>;

macro_rules! service {
    ({ $($method:ident($Ask:ident) -> $Answer:ident;)* } { $($stream:ident($SAsk:ident) -> $SAnswer:ident as $Type:ident;)* }) => {
        #[tonic::async_trait]
        impl pb::admin_service_server::AdminService for AdminService {
            $(async fn $method(&self, request: Request<pb::$Ask>) -> Answer<pb::$Answer> {
                Ok(Response::new(self.$method(request).await?))
            })*
            $(type $Type = Answers<pb::$SAnswer>;

            async fn $stream(&self, request: Request<pb::$SAsk>) -> Answer<Self::$Type> {
                Ok(Response::new(self.$stream(request).await?))
            })*
        }
    };
}

// Each is a method of its own name in one of the modules.
service! {
    {
    who_am_i(WhoAmIRequest) -> WhoAmIResponse;
    create_client(CreateClientRequest) -> CreateClientResponse;
    get_client(GetClientRequest) -> GetClientResponse;
    list_clients(ListClientsRequest) -> ListClientsResponse;
    update_client(UpdateClientRequest) -> UpdateClientResponse;
    disable_client(DisableClientRequest) -> DisableClientResponse;
    enable_client(EnableClientRequest) -> EnableClientResponse;
    remove_client(RemoveClientRequest) -> RemoveClientResponse;
    rotate_client_api_key(RotateClientApiKeyRequest) -> RotateClientApiKeyResponse;
    revoke_client_tokens(RevokeClientTokensRequest) -> RevokeClientTokensResponse;
    list_roles(ListRolesRequest) -> ListRolesResponse;
    put_role(PutRoleRequest) -> PutRoleResponse;
    delete_role(DeleteRoleRequest) -> DeleteRoleResponse;
    issue_certificate(IssueCertificateRequest) -> IssueCertificateResponse;
    get_root_status(GetRootStatusRequest) -> GetRootStatusResponse;
    rotate_root(RotateRootRequest) -> RotateRootResponse;
    rewrap_slot(RewrapSlotRequest) -> RewrapSlotResponse;
    add_slot(AddSlotRequest) -> AddSlotResponse;
    remove_slot(RemoveSlotRequest) -> RemoveSlotResponse;
    test_slot(TestSlotRequest) -> TestSlotResponse;
    list_policies(ListPoliciesRequest) -> ListPoliciesResponse;
    validate_policy(ValidatePolicyRequest) -> ValidatePolicyResponse;
    explain_authorization(ExplainAuthorizationRequest) -> ExplainAuthorizationResponse;
    list_audit_events(ListAuditEventsRequest) -> ListAuditEventsResponse;
    get_audit_checkpoint(GetAuditCheckpointRequest) -> GetAuditCheckpointResponse;
    archive_audit_log(ArchiveAuditLogRequest) -> ArchiveAuditLogResponse;
    hash_audit_value(HashAuditValueRequest) -> HashAuditValueResponse;
    get_store_status(GetStoreStatusRequest) -> GetStoreStatusResponse;
    list_jobs(ListJobsRequest) -> ListJobsResponse;
    confirm_clock(ConfirmClockRequest) -> ConfirmClockResponse;
    get_node_status(GetNodeStatusRequest) -> GetNodeStatusResponse;
    reload_configuration(ReloadConfigurationRequest) -> ReloadConfigurationResponse;
    get_configuration(GetConfigurationRequest) -> GetConfigurationResponse;
    }
    {
    follow_audit(FollowAuditRequest) -> FollowAuditResponse as FollowAuditStream;
    export_audit_log(ExportAuditLogRequest) -> ExportAuditLogResponse as ExportAuditLogStream;
    verify_store(VerifyStoreRequest) -> VerifyStoreResponse as VerifyStoreStream;
    create_backup(CreateBackupRequest) -> CreateBackupResponse as CreateBackupStream;
    }
}
