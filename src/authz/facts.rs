//! What a decision is made from, and the one rule that is not a policy: who may see a key.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use aws_lc_rs::digest;
use uuid::Uuid;

use super::action::{Permission, PermissionSet, Target};
use super::keypolicies::KeyPolicies;

/// Who asks: from the server's own record of the client, never from the request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrincipalFacts {
    /// The client id, exactly as in its record.
    pub client: Arc<str>,
    /// The revision of the client's record: remembered decisions hold for one revision.
    pub revision: u64,
    /// Names of its roles.
    pub roles: Vec<String>,
    /// Literal permissions and those of its roles, as they stand now.
    pub permissions: PermissionSet,
    /// `""`, `free`, `pro` or `enterprise`.
    pub tier: String,
    /// The environment in its record.
    pub environment: String,
}

/// A key, as far as decisions need it. Everything but `aliases` is covered by `revision`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyFacts {
    /// Its id.
    pub id: Uuid,
    /// The revision of its record; access policies are part of the record. 0 = a state that is not
    /// committed and may never be: what is decided on it is not remembered.
    pub revision: u64,
    /// The client that created it.
    pub creator: String,
    /// The clients that may read and use it.
    pub authorized_contexts: Vec<String>,
    /// For instance `aes-256`.
    pub key_type: String,
    /// The one thing it is for, for instance `encrypt`.
    pub purpose: String,
    /// The stored state, for instance `enabled`. What follows from the clock (expiry) is not a stored state.
    pub state: String,
    /// `""`, `public`, `internal`, `confidential` or `secret`.
    pub data_classification: String,
    /// Whether the material may ever leave.
    pub exportable: bool,
    /// Its aliases without `alias/`. Policies that read them are never remembered.
    pub aliases: Vec<String>,
    /// Its tags.
    pub tags: BTreeMap<String, String>,
}

impl KeyFacts {
    /// SHA-256 over everything but the id, each part preceded by its length.
    pub(super) fn digest(&self) -> [u8; 32] {
        let Self {
            id: _,
            revision,
            creator,
            authorized_contexts,
            key_type,
            purpose,
            state,
            data_classification,
            exportable,
            aliases,
            tags,
        } = self;
        let mut digest = digest::Context::new(&digest::SHA256);
        let part = |digest: &mut digest::Context, text: &str| {
            digest.update(&(text.len() as u64).to_be_bytes());
            digest.update(text.as_bytes());
        };
        digest.update(&revision.to_be_bytes());
        digest.update(&[u8::from(*exportable)]);
        for text in [creator, key_type, purpose, state, data_classification] {
            part(&mut digest, text);
        }
        for list in [authorized_contexts, aliases] {
            digest.update(&(list.len() as u64).to_be_bytes());
            list.iter().for_each(|text| part(&mut digest, text));
        }
        for (name, value) in tags {
            part(&mut digest, name);
            part(&mut digest, value);
        }
        let mut out = [0; 32];
        out.copy_from_slice(digest.finish().as_ref());
        out
    }
}

/// A client that is acted on, which need not exist yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClientFacts {
    /// Its id.
    pub client: String,
    /// Names of its roles.
    pub roles: Vec<String>,
    /// What it may do before *and* what it may do after the change: the union of both.
    pub permissions: PermissionSet,
    /// Its tier.
    pub tier: String,
    /// Its environment.
    pub environment: String,
}

/// A role that is acted on, which need not exist yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RoleFacts {
    /// Its name.
    pub name: String,
    /// Its permissions before *and* after the change: the union of both.
    pub permissions: PermissionSet,
}

/// What is acted on.
#[derive(Clone, Copy, Debug)]
pub enum Resource<'a> {
    /// The node.
    Node,
    /// A stored key and its own policies, compiled from the same revision.
    Key {
        /// The key.
        facts: &'a KeyFacts,
        /// Its own policies.
        policies: &'a KeyPolicies,
    },
    /// A key about to be created; its creator is the caller. Remembered by all its facts but the id.
    NewKey(&'a KeyFacts),
    /// A client.
    Client(&'a ClientFacts),
    /// A role.
    Role(&'a RoleFacts),
}

impl Resource<'_> {
    /// Its kind.
    pub const fn target(&self) -> Target {
        match self {
            Self::Node => Target::Node,
            Self::Key { .. } | Self::NewKey(_) => Target::Key,
            Self::Client(_) => Target::Client,
            Self::Role(_) => Target::Role,
        }
    }

    /// What it is, owned: what an [`Authorized`](super::Authorized) may be used on.
    pub fn id(&self) -> ResourceId {
        match self {
            Self::Node => ResourceId::Node,
            Self::Key { facts, .. } | Self::NewKey(facts) => ResourceId::Key(facts.id),
            Self::Client(facts) => ResourceId::Client(facts.client.clone()),
            Self::Role(facts) => ResourceId::Role(facts.name.clone()),
        }
    }
}

/// The name of a resource.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ResourceId {
    /// The node.
    Node,
    /// A key.
    Key(Uuid),
    /// A client.
    Client(String),
    /// A role.
    Role(String),
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("the node"),
            Self::Key(id) => write!(f, "key {id}"),
            Self::Client(id) => write!(f, "client {id}"),
            Self::Role(name) => write!(f, "role {name}"),
        }
    }
}

/// The circumstances of one call. The clock and the decision's id are passed in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContextFacts {
    /// The id that this call's decisions carry.
    pub decision_id: DecisionId,
    /// When the call came in.
    pub now: jiff::Timestamp,
    /// The peer's address; none on a local socket.
    pub source: Option<IpAddr>,
    /// The thumbprint of the verified certificate; empty on a local socket.
    pub certificate: String,
    /// What the caller says of itself. Permits cannot read it.
    pub claimed: Claimed,
}

/// Unverified statements of the caller (`RequesterContext`, `AccessAttributes`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Claimed {
    /// `attributes.environment`
    pub environment: String,
    /// `attributes.network_zone`
    pub network_zone: String,
    /// `attributes.geographic_region`
    pub geographic_region: String,
    /// `attributes.time_window`
    pub time_window: String,
    /// `requester_context.application_id`
    pub application: String,
    /// `attributes.roles`
    pub roles: Vec<String>,
    /// `attributes.permissions`
    pub permissions: Vec<String>,
    /// `attributes.custom_attributes`
    pub custom: BTreeMap<String, String>,
}

/// Names a decision in replies and in the audit trail.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DecisionId(pub Uuid);

impl fmt::Display for DecisionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether the principal may know that the key exists: it created it, is one of its authorized
/// contexts, or holds `keys:all`. Decides lists and NOT_FOUND; no policy widens or narrows it.
pub fn visible(principal: &PrincipalFacts, key: &KeyFacts) -> bool {
    principal.permissions.contains(Permission::KeysAll)
        || *key.creator == *principal.client
        || key.authorized_contexts.iter().any(|c| **c == *principal.client)
}
