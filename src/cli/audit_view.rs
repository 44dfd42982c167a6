//! Audit events and checkpoints as the command line prints them.

use std::collections::BTreeMap;

use polykey_proto::polykey::v2 as pb;
use serde::{Deserialize, Serialize};

use super::output::{Human, View, clean};
use super::view::{base64, enum_word, pairs, short, time};

/// One event of the audit log.
#[derive(Serialize)]
pub(super) struct EventView {
    pub(super) index: u64,
    pub(super) position: i32,
    pub(super) time: Option<String>,
    pub(super) action: String,
    pub(super) outcome: String,
    /// The canonical code of the answer in capitals.
    pub(super) code: String,
    pub(super) client: String,
    pub(super) key_id: Option<String>,
    pub(super) version: Option<i32>,
    pub(super) request_id: String,
    pub(super) correlation_id: String,
    pub(super) decision_id: String,
    pub(super) certificate_sha256: String,
    pub(super) peer_address: String,
    /// How many events this one stands for.
    pub(super) count: i32,
    pub(super) details: BTreeMap<String, String>,
}

impl From<pb::AuditEvent> for EventView {
    fn from(e: pb::AuditEvent) -> Self {
        let code = polykey_proto::google::rpc::Code::try_from(e.code);
        Self {
            index: e.index,
            position: e.position,
            time: time(e.time.as_ref()),
            action: e.action,
            outcome: enum_word!(AuditOutcome, "AUDIT_OUTCOME_", e.outcome),
            code: code.map_or_else(|_| e.code.to_string(), |code| code.as_str_name().to_owned()),
            client: e.client_id,
            key_id: (!e.key_id.is_empty()).then_some(e.key_id),
            version: (e.version != 0).then_some(e.version),
            request_id: e.request_id,
            correlation_id: e.correlation_id,
            decision_id: e.decision_id,
            certificate_sha256: e.certificate_sha256,
            peer_address: e.peer_address,
            count: e.count.max(1),
            details: e.details.into_iter().collect(),
        }
    }
}

impl EventView {
    fn cells(&self) -> Vec<String> {
        let times = if self.count > 1 { format!(" ×{}", self.count) } else { String::new() };
        let key = match (&self.key_id, self.version) {
            (Some(key), Some(version)) => format!("{key} v{version}"),
            (Some(key), None) => key.clone(),
            (None, _) => String::new(),
        };
        vec![
            self.index.to_string(),
            short(self.time.as_ref()),
            self.client.clone(),
            self.action.clone(),
            format!("{}{times}", self.outcome),
            key,
            pairs(&self.details),
        ]
    }

    /// One line, for events that come one by one.
    pub(super) fn line(&self) -> String {
        let cells: Vec<String> =
            self.cells().iter().filter(|c| !c.is_empty()).map(|c| clean(c)).collect();
        cells.join("  ")
    }
}

/// Several events.
#[derive(Serialize)]
pub(super) struct EventsView {
    pub(super) events: Vec<EventView>,
    /// What has events that belong here and are no longer in the store.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) archives: Vec<ArchiveView>,
}

/// Leaves that were taken out of the store, and the file that has them.
#[derive(Serialize)]
pub(super) struct ArchiveView {
    pub(super) first_leaf: u64,
    /// The one after the last.
    pub(super) end_leaf: u64,
    pub(super) file: String,
    pub(super) host: String,
    /// Hexadecimal.
    pub(super) sha256: String,
    /// Base64.
    pub(super) root_hash: String,
    /// No leaf in it is younger.
    pub(super) until: Option<String>,
    pub(super) archived_at: Option<String>,
}

impl From<pb::AuditArchive> for ArchiveView {
    fn from(a: pb::AuditArchive) -> Self {
        Self {
            first_leaf: a.first_index,
            end_leaf: a.end_index,
            file: a.file,
            host: a.host,
            sha256: data_encoding::HEXLOWER.encode(&a.sha256),
            root_hash: base64(&a.root_hash),
            until: time(a.until.as_ref()),
            archived_at: time(a.archived_at.as_ref()),
        }
    }
}

impl ArchiveView {
    /// One line.
    pub(super) fn line(&self) -> String {
        let last = self.end_leaf.saturating_sub(1);
        let (first, file, host) = (self.first_leaf, clean(&self.file), clean(&self.host));
        format!("leaves {first} to {last} are in the archive {file} ({host})")
    }
}

impl View for ArchiveView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("file", self.file.clone()),
            ("host", self.host.clone()),
            ("leaves", format!("{} to {}", self.first_leaf, self.end_leaf.saturating_sub(1))),
            ("sha256", self.sha256.clone()),
            ("root hash", self.root_hash.clone()),
            ("until", short(self.until.as_ref())),
        ])
    }
}

pub(super) fn events(events: Vec<pb::AuditEvent>) -> Vec<EventView> {
    events.into_iter().map(EventView::from).collect()
}

impl View for EventsView {
    fn human(&self) -> Human {
        Human::Rows(
            &["INDEX", "TIME", "CLIENT", "ACTION", "OUTCOME", "KEY", "DETAILS"],
            self.events.iter().map(EventView::cells).collect(),
        )
    }
}

/// A signed statement of how long the log is and what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CheckpointView {
    pub(super) origin: String,
    pub(super) tree_size: u64,
    /// Base64.
    pub(super) root_hash: String,
    pub(super) time: Option<String>,
    /// The statement with its signature.
    pub(super) note: String,
    /// Base64.
    pub(super) public_key: String,
    /// Base64; absent if there is no second signature.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) ml_dsa_public_key: String,
}

impl From<pb::AuditCheckpoint> for CheckpointView {
    fn from(c: pb::AuditCheckpoint) -> Self {
        Self {
            origin: c.origin,
            tree_size: c.tree_size,
            root_hash: base64(&c.root_hash),
            time: time(c.time.as_ref()),
            note: c.note,
            public_key: base64(&c.public_key),
            ml_dsa_public_key: base64(&c.ml_dsa_public_key),
        }
    }
}

impl View for CheckpointView {
    fn human(&self) -> Human {
        let mut fields = vec![
            ("origin", self.origin.clone()),
            ("tree size", self.tree_size.to_string()),
            ("root hash", self.root_hash.clone()),
            ("time", short(self.time.as_ref())),
            ("public key", self.public_key.clone()),
        ];
        if !self.ml_dsa_public_key.is_empty() {
            fields.push(("ML-DSA-65 public key", self.ml_dsa_public_key.clone()));
        }
        Human::Record(fields)
    }
}
