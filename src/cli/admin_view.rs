//! Clients, roles, the root key, the store and jobs as the command line prints them.

use std::collections::BTreeMap;

use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::output::{Human, View};
use super::view::{enum_word, short, time, yes};

/// What a client's certificates must have.
#[derive(Serialize)]
pub(super) struct IdentityView {
    pub(super) kind: String,
    pub(super) value: String,
}

impl From<pb::CertificateIdentity> for IdentityView {
    fn from(identity: pb::CertificateIdentity) -> Self {
        let kind = enum_word!(CertificateIdentityKind, "CERTIFICATE_IDENTITY_KIND_", identity.kind);
        Self { kind, value: identity.value }
    }
}

impl std::fmt::Display for IdentityView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.kind, self.value)
    }
}

/// An API key without its secret.
#[derive(Serialize)]
pub(super) struct ApiKeyView {
    pub(super) prefix: String,
    pub(super) created_at: Option<String>,
    pub(super) expires_at: Option<String>,
    pub(super) last_used_at: Option<String>,
}

impl From<pb::ApiKeyInfo> for ApiKeyView {
    fn from(info: pb::ApiKeyInfo) -> Self {
        Self {
            prefix: info.key_prefix,
            created_at: time(info.created_at.as_ref()),
            expires_at: time(info.expires_at.as_ref()),
            last_used_at: time(info.last_used_at.as_ref()),
        }
    }
}

/// A client.
#[derive(Serialize)]
pub(super) struct ClientView {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) description: String,
    pub(super) environment: String,
    pub(super) state: String,
    pub(super) tier: String,
    pub(super) roles: Vec<String>,
    pub(super) permissions: Vec<String>,
    pub(super) identities: Vec<IdentityView>,
    pub(super) api_keys: Vec<ApiKeyView>,
    pub(super) created_at: Option<String>,
    pub(super) created_by: String,
    pub(super) updated_at: Option<String>,
    pub(super) last_used_at: Option<String>,
    pub(super) revision: u64,
}

pub(super) fn tier(value: i32) -> String {
    polykey_proto::common::v2::ClientTier::try_from(value)
        .map_or_else(|_| value.to_string(), |t| super::view::word(t.as_str_name(), "CLIENT_TIER_"))
}

impl From<pb::ClientRecord> for ClientView {
    fn from(c: pb::ClientRecord) -> Self {
        Self {
            id: c.client_id,
            name: c.name,
            description: c.description,
            environment: c.environment,
            state: enum_word!(ClientState, "CLIENT_STATE_", c.state),
            tier: tier(c.tier),
            roles: c.roles,
            permissions: c.permissions,
            identities: c.identities.into_iter().map(IdentityView::from).collect(),
            api_keys: c.api_keys.into_iter().map(ApiKeyView::from).collect(),
            created_at: time(c.created_at.as_ref()),
            created_by: c.created_by,
            updated_at: time(c.updated_at.as_ref()),
            last_used_at: time(c.last_used_at.as_ref()),
            revision: c.revision,
        }
    }
}

impl ClientView {
    pub(super) fn of(client: Option<pb::ClientRecord>) -> Self {
        client.unwrap_or_default().into()
    }

    pub(super) fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("id", self.id.clone()),
            ("name", self.name.clone()),
            ("description", self.description.clone()),
            ("environment", self.environment.clone()),
            ("state", self.state.clone()),
            ("tier", self.tier.clone()),
            ("roles", self.roles.join(", ")),
            ("permissions", self.permissions.join(", ")),
        ];
        fields.extend(self.identities.iter().map(|i| ("identity", i.to_string())));
        fields.extend(self.api_keys.iter().map(|k| {
            let end =
                k.expires_at.as_ref().map(|_| format!(", ends {}", short(k.expires_at.as_ref())));
            (
                "api key",
                format!(
                    "{}… of {}{}",
                    k.prefix,
                    short(k.created_at.as_ref()),
                    end.unwrap_or_default()
                ),
            )
        }));
        fields.extend([
            ("created", short(self.created_at.as_ref())),
            ("created by", self.created_by.clone()),
            ("updated", short(self.updated_at.as_ref())),
            ("last login", short(self.last_used_at.as_ref())),
            ("revision", self.revision.to_string()),
        ]);
        fields
    }
}

impl View for ClientView {
    fn human(&self) -> Human {
        Human::Record(self.fields())
    }
}

/// Several clients.
#[derive(Serialize)]
pub(super) struct ClientsView {
    pub(super) clients: Vec<ClientView>,
}

impl View for ClientsView {
    fn human(&self) -> Human {
        Human::Rows(
            &["ID", "STATE", "TIER", "ROLES", "CREATED", "LAST LOGIN", "NAME"],
            self.clients
                .iter()
                .map(|c| {
                    vec![
                        c.id.clone(),
                        c.state.clone(),
                        c.tier.clone(),
                        c.roles.join(","),
                        short(c.created_at.as_ref()),
                        short(c.last_used_at.as_ref()),
                        c.name.clone(),
                    ]
                })
                .collect(),
        )
    }
}

/// A named set of permissions.
#[derive(Serialize)]
pub(super) struct RoleView {
    pub(super) name: String,
    pub(super) description: String,
    pub(super) permissions: Vec<String>,
    pub(super) built_in: bool,
    pub(super) created_at: Option<String>,
    pub(super) updated_at: Option<String>,
    pub(super) revision: u64,
}

impl From<pb::RoleRecord> for RoleView {
    fn from(r: pb::RoleRecord) -> Self {
        Self {
            name: r.name,
            description: r.description,
            permissions: r.permissions,
            built_in: r.built_in,
            created_at: time(r.created_at.as_ref()),
            updated_at: time(r.updated_at.as_ref()),
            revision: r.revision,
        }
    }
}

impl View for RoleView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("name", self.name.clone()),
            ("description", self.description.clone()),
            ("permissions", self.permissions.join(", ")),
            ("built in", yes(self.built_in)),
            ("revision", self.revision.to_string()),
        ])
    }
}

/// Several roles.
#[derive(Serialize)]
pub(super) struct RolesView {
    pub(super) roles: Vec<RoleView>,
}

impl View for RolesView {
    fn human(&self) -> Human {
        Human::Rows(
            &["NAME", "BUILT IN", "PERMISSIONS", "DESCRIPTION"],
            self.roles
                .iter()
                .map(|r| {
                    vec![
                        r.name.clone(),
                        yes(r.built_in),
                        r.permissions.join(","),
                        r.description.clone(),
                    ]
                })
                .collect(),
        )
    }
}

/// Who the caller is.
#[derive(Serialize)]
pub(super) struct WhoView {
    pub(super) client: String,
    pub(super) name: String,
    pub(super) environment: String,
    pub(super) tier: String,
    pub(super) roles: Vec<String>,
    pub(super) permissions: Vec<String>,
    pub(super) identity: Option<IdentityView>,
    pub(super) certificate_sha256: String,
    pub(super) certificate_expires_at: Option<String>,
    pub(super) token_expires_at: Option<String>,
    pub(super) node: String,
}

impl From<pb::WhoAmIResponse> for WhoView {
    fn from(w: pb::WhoAmIResponse) -> Self {
        Self {
            client: w.client_id,
            name: w.name,
            environment: w.environment,
            tier: tier(w.tier),
            roles: w.roles,
            permissions: w.permissions,
            identity: w.identity.map(IdentityView::from),
            certificate_sha256: w.certificate_sha256,
            certificate_expires_at: time(w.certificate_expires_at.as_ref()),
            token_expires_at: time(w.token_expires_at.as_ref()),
            node: w.node_id,
        }
    }
}

impl View for WhoView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("client", self.client.clone()),
            ("name", self.name.clone()),
            ("environment", self.environment.clone()),
            ("tier", self.tier.clone()),
            ("roles", self.roles.join(", ")),
            ("permissions", self.permissions.join(", ")),
            ("identity", self.identity.as_ref().map(ToString::to_string).unwrap_or_default()),
            ("certificate ends", short(self.certificate_expires_at.as_ref())),
            ("token ends", short(self.token_expires_at.as_ref())),
            ("node", self.node.clone()),
        ])
    }
}

/// One way to open the root key.
#[derive(Serialize)]
pub(super) struct SlotView {
    pub(super) id: String,
    pub(super) label: String,
    pub(super) kind: String,
    pub(super) source: String,
    pub(super) created_at: Option<String>,
    pub(super) in_use: bool,
}

impl From<pb::RootSlot> for SlotView {
    fn from(s: pb::RootSlot) -> Self {
        Self {
            id: s.slot_id,
            label: s.label,
            kind: s.kind,
            source: s.source,
            created_at: time(s.created_at.as_ref()),
            in_use: s.in_use,
        }
    }
}

impl std::fmt::Display for SlotView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let in_use = if self.in_use { ", in use" } else { "" };
        write!(f, "{} {} ({} {}{in_use})", self.id, self.label, self.kind, self.source)
    }
}

/// A key that records are sealed under.
#[derive(Serialize)]
pub(super) struct EpochView {
    pub(super) epoch: u32,
    pub(super) primary: bool,
    pub(super) created_at: Option<String>,
    pub(super) records_remaining: u64,
}

/// The state of the root key.
#[derive(Serialize)]
pub(super) struct RootView {
    pub(super) root_id: String,
    pub(super) rotated_at: Option<String>,
    pub(super) generation: u64,
    pub(super) canary_ok: bool,
    pub(super) slots: Vec<SlotView>,
    pub(super) epochs: Vec<EpochView>,
    pub(super) reseal_running: bool,
    pub(super) records_resealed: u64,
    pub(super) records_total: u64,
}

impl From<pb::GetRootStatusResponse> for RootView {
    fn from(r: pb::GetRootStatusResponse) -> Self {
        let epoch = |e: pb::StorageEpoch| EpochView {
            epoch: e.epoch,
            primary: e.primary,
            created_at: time(e.created_at.as_ref()),
            records_remaining: e.records_remaining,
        };
        Self {
            root_id: r.root_id,
            rotated_at: time(r.rotated_at.as_ref()),
            generation: r.generation,
            canary_ok: r.canary_ok,
            slots: r.slots.into_iter().map(SlotView::from).collect(),
            epochs: r.epochs.into_iter().map(epoch).collect(),
            reseal_running: r.reseal_running,
            records_resealed: r.records_resealed,
            records_total: r.records_total,
        }
    }
}

impl View for RootView {
    fn human(&self) -> Human {
        let reseal = if self.reseal_running {
            format!("{} of {} records", self.records_resealed, self.records_total)
        } else {
            "done".to_owned()
        };
        let mut fields = vec![
            ("root key", self.root_id.clone()),
            ("made", short(self.rotated_at.as_ref())),
            ("generation", self.generation.to_string()),
            ("canary", if self.canary_ok { "opened" } else { "DID NOT OPEN" }.to_owned()),
        ];
        fields.extend(self.slots.iter().map(|s| ("slot", s.to_string())));
        fields.extend(self.epochs.iter().map(|e| {
            let left = if e.primary {
                "primary".to_owned()
            } else {
                format!("{} records left", e.records_remaining)
            };
            ("epoch", format!("{} of {} ({left})", e.epoch, short(e.created_at.as_ref())))
        }));
        fields.push(("reseal", reseal));
        Human::Record(fields)
    }
}

/// How the store is shipped to its replication target.
#[derive(Serialize)]
pub(super) struct ReplicationView {
    pub(super) target: String,
    pub(super) mode: String,
    pub(super) when_away: Option<String>,
    pub(super) state: String,
    pub(super) detail: Option<String>,
    pub(super) synchronous: bool,
    pub(super) shipped_revision: u64,
    pub(super) lag_revisions: u64,
    pub(super) lag_seconds: f64,
}

impl From<pb::ReplicationStatus> for ReplicationView {
    fn from(r: pb::ReplicationStatus) -> Self {
        Self {
            target: r.target,
            mode: r.mode,
            when_away: (!r.when_away.is_empty()).then_some(r.when_away),
            state: r.state,
            detail: (!r.detail.is_empty()).then_some(r.detail),
            synchronous: r.synchronous,
            shipped_revision: r.shipped_revision,
            lag_revisions: r.lag_revisions,
            lag_seconds: r.lag_seconds,
        }
    }
}

/// The state of the store.
#[derive(Serialize)]
pub(super) struct StoreView {
    pub(super) backend: String,
    pub(super) format: u32,
    pub(super) node: String,
    pub(super) revision: u64,
    pub(super) writable: bool,
    pub(super) read_only_reason: Option<String>,
    pub(super) size_bytes: u64,
    pub(super) free_bytes: Option<u64>,
    pub(super) records: BTreeMap<String, u64>,
    pub(super) audit_leaves: u64,
    pub(super) last_verified_at: Option<String>,
    pub(super) last_verification_ok: bool,
    pub(super) damaged_records: u64,
    pub(super) anchor: Option<AnchorView>,
    pub(super) replication: Option<ReplicationView>,
}

/// What the node is known to have served.
#[derive(Serialize)]
pub(super) struct AnchorView {
    file: String,
    revision: Option<u64>,
    written_at: Option<String>,
    trouble: Option<String>,
}

impl From<pb::GetStoreStatusResponse> for StoreView {
    fn from(s: pb::GetStoreStatusResponse) -> Self {
        Self {
            backend: s.backend,
            format: s.format,
            node: s.node_id,
            revision: s.revision,
            writable: s.writable,
            read_only_reason: (!s.read_only_reason.is_empty()).then_some(s.read_only_reason),
            size_bytes: s.size_bytes,
            free_bytes: (s.free_bytes != 0).then_some(s.free_bytes),
            records: s.records.into_iter().collect(),
            audit_leaves: s.audit_tree_size,
            last_verified_at: time(s.last_verified_at.as_ref()),
            last_verification_ok: s.last_verification_ok,
            damaged_records: s.damaged_records,
            anchor: (!s.anchor.is_empty()).then(|| AnchorView {
                file: s.anchor,
                revision: (s.anchored_revision != 0).then_some(s.anchored_revision),
                written_at: time(s.anchored_at.as_ref()),
                trouble: (!s.anchor_trouble.is_empty()).then_some(s.anchor_trouble),
            }),
            replication: s.replication.map(ReplicationView::from),
        }
    }
}

impl View for StoreView {
    fn human(&self) -> Human {
        let writable = match &self.read_only_reason {
            Some(reason) => format!("{} ({reason})", yes(self.writable)),
            None => yes(self.writable),
        };
        let verified = self.last_verified_at.as_ref().map(|_| {
            let result = if self.last_verification_ok { "whole" } else { "DAMAGED" };
            format!("{} ({result})", short(self.last_verified_at.as_ref()))
        });
        let mut fields = vec![
            ("backend", self.backend.clone()),
            ("format", self.format.to_string()),
            ("node", self.node.clone()),
            ("revision", self.revision.to_string()),
            ("writable", writable),
            (
                "size",
                match self.size_bytes {
                    0 => "known to the database".to_owned(),
                    bytes => format!("{bytes} bytes"),
                },
            ),
            ("free", self.free_bytes.map(|b| format!("{b} bytes")).unwrap_or_default()),
            ("audit leaves", self.audit_leaves.to_string()),
            ("verified", verified.unwrap_or_else(|| "never".to_owned())),
        ];
        if self.damaged_records > 0 {
            fields.push(("damaged records", self.damaged_records.to_string()));
        }
        fields.push(match &self.anchor {
            None => ("anchor", "none: an older copy would be served".to_owned()),
            Some(anchor) => {
                let at = short(anchor.written_at.as_ref());
                let stands =
                    anchor.revision.map(|revision| format!(", revision {revision} at {at}"));
                ("anchor", anchor.file.clone() + &stands.unwrap_or_default())
            }
        });
        if let Some(trouble) = self.anchor.as_ref().and_then(|anchor| anchor.trouble.clone()) {
            fields.push(("anchor", format!("CANNOT BE WRITTEN: {trouble}")));
        }
        if let Some(r) = &self.replication {
            let mode = match &r.when_away {
                Some(when_away) => format!("{}, or {when_away}", r.mode),
                None => r.mode.clone(),
            };
            let waits =
                if r.synchronous { "changes wait for it" } else { "no change waits for it" };
            fields.extend([
                ("replication", format!("{} ({mode}): {}; {waits}", r.target, r.state)),
                (
                    "shipped",
                    format!(
                        "up to revision {}; {} behind, {:.1} s",
                        r.shipped_revision, r.lag_revisions, r.lag_seconds
                    ),
                ),
            ]);
            fields.extend(r.detail.iter().map(|detail| ("because", detail.clone())));
        }
        fields.extend(self.records.iter().map(|(space, n)| ("records", format!("{space}: {n}"))));
        Human::Record(fields)
    }
}

/// Something to be done at a time.
#[derive(Serialize)]
pub(super) struct JobView {
    pub(super) kind: String,
    pub(super) due_at: Option<String>,
    pub(super) key_id: Option<String>,
    pub(super) version: Option<i32>,
    pub(super) attempts: i32,
    pub(super) last_error: Option<String>,
    pub(super) damaged: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) client_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) api_key: Option<String>,
}

impl From<pb::JobRecord> for JobView {
    fn from(j: pb::JobRecord) -> Self {
        Self {
            kind: enum_word!(JobKind, "JOB_KIND_", j.kind),
            due_at: time(j.due_at.as_ref()),
            key_id: (!j.key_id.is_empty()).then_some(j.key_id),
            version: (j.version != 0).then_some(j.version),
            attempts: j.attempts,
            last_error: (!j.last_error.is_empty()).then_some(j.last_error),
            damaged: j.damaged,
            client_id: (!j.client_id.is_empty()).then_some(j.client_id),
            api_key: (!j.api_key_prefix.is_empty()).then_some(j.api_key_prefix),
        }
    }
}

/// What a kind of work in the background does.
#[derive(Serialize)]
pub(super) struct WorkView {
    pub(super) name: String,
    pub(super) queued: u32,
    pub(super) running: u32,
    pub(super) workers: u32,
    pub(super) done: u64,
    pub(super) failed: u64,
    pub(super) last_run_at: Option<String>,
    pub(super) last_seconds: f64,
    pub(super) last_error: Option<String>,
    pub(super) next_due_at: Option<String>,
    pub(super) behind_seconds: f64,
}

impl From<pb::BackgroundWork> for WorkView {
    fn from(w: pb::BackgroundWork) -> Self {
        Self {
            name: w.name,
            queued: w.queued,
            running: w.running,
            workers: w.workers,
            done: w.done,
            failed: w.failed,
            last_run_at: time(w.last_run_at.as_ref()),
            last_seconds: w.last_seconds,
            last_error: (!w.last_error.is_empty()).then_some(w.last_error),
            next_due_at: time(w.next_due_at.as_ref()),
            behind_seconds: w.behind_seconds,
        }
    }
}

/// What is scheduled.
#[derive(Serialize)]
pub(super) struct JobsView {
    pub(super) jobs: Vec<JobView>,
    /// Whether jobs that cannot be undone wait because the clock has jumped.
    pub(super) clock_suspended: bool,
    /// What the node does in the background.
    pub(super) work: Vec<WorkView>,
}

impl View for JobsView {
    fn human(&self) -> Human {
        let about = |job: &JobView| match (&job.client_id, &job.api_key) {
            (Some(client), Some(key)) => format!("{client} {key}"),
            _ => job.key_id.clone().unwrap_or_default(),
        };
        let jobs = self.jobs.iter().map(|j| {
            vec![
                short(j.due_at.as_ref()),
                j.kind.clone(),
                about(j),
                j.version.map(|v| v.to_string()).unwrap_or_default(),
                j.attempts.to_string(),
                j.last_error.clone().unwrap_or_default(),
            ]
        });
        let work = self.work.iter().map(|w| {
            let ran = w.last_run_at.is_some();
            vec![
                w.name.clone(),
                w.queued.to_string(),
                format!("{}/{}", w.running, w.workers),
                w.done.to_string(),
                w.failed.to_string(),
                short(w.last_run_at.as_ref()),
                if ran { format!("{:.3} s", w.last_seconds) } else { String::new() },
                short(w.next_due_at.as_ref()),
                format!("{:.0} s", w.behind_seconds),
                w.last_error.clone().unwrap_or_default(),
            ]
        });
        Human::Parts(vec![
            Human::Rows(
                &["DUE", "KIND", "KEY", "VERSION", "ATTEMPTS", "LAST ERROR"],
                jobs.collect(),
            ),
            Human::Rows(
                &[
                    "WORK",
                    "QUEUED",
                    "RUNNING",
                    "DONE",
                    "FAILED",
                    "LAST RUN",
                    "TOOK",
                    "NEXT",
                    "BEHIND",
                    "LAST ERROR",
                ],
                work.collect(),
            ),
        ])
    }
}
