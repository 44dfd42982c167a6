//! A client as the rest of the server sees it: without its MACs.

use polykey_proto::polykey::record::v1::ClientRecord;
use polykey_proto::polykey::record::v1::client_record::{self, CertificateIdentity as Stored};
use polykey_storage::Revision;

use crate::authn::certificate::CertificateIdentity;
use crate::authz::PermissionSet;
use crate::error::Error;
use crate::limits::{self, Violations, shown};
use crate::time::Time;

/// Most certificate identities of a client.
pub const MAX_IDENTITIES: usize = 20;
/// Most roles of a client.
pub const MAX_ROLES: usize = 20;
/// Most permissions in a client or role.
pub const MAX_PERMISSIONS: usize = 100;
const NAME: usize = 256;
const ENVIRONMENT: usize = 128;

/// Whether a client may log in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClientState {
    /// It may.
    Enabled,
    /// It may not, until it is enabled.
    Disabled,
    /// It may never again; its id stays taken.
    Removed,
}

/// What is known of an API key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiKeyInfo {
    /// The public part.
    pub prefix: String,
    /// When it was made.
    pub created_at: Time,
    /// When it stops working.
    pub expires_at: Option<Time>,
}

/// A client of the node.
#[derive(Clone, Debug)]
pub struct Client {
    /// Its id.
    pub id: String,
    /// Its name for people.
    pub name: String,
    /// For people.
    pub description: String,
    /// The environment it belongs to.
    pub environment: String,
    /// common.v2.ClientTier.
    pub tier: i32,
    /// Its roles, sorted.
    pub roles: Vec<String>,
    /// Names of the permissions it has by itself, sorted; `*` is all.
    pub permissions: Vec<String>,
    /// The same, expanded.
    pub own_permissions: PermissionSet,
    /// What its certificates must have.
    pub identities: Vec<CertificateIdentity>,
    /// Its API keys, expired ones included until the next rotation.
    pub api_keys: Vec<ApiKeyInfo>,
    /// Whether it may log in.
    pub state: ClientState,
    /// When it was added.
    pub created_at: Time,
    /// When it was last changed.
    pub updated_at: Time,
    /// By which client.
    pub created_by: String,
    /// Tokens issued before are void.
    pub tokens_valid_from: Time,
    /// The revision of its record.
    pub revision: u64,
}

impl Client {
    /// The tier in a word; empty if it has none.
    #[must_use]
    pub const fn tier_name(&self) -> &'static str {
        match self.tier {
            1 => "free",
            2 => "pro",
            3 => "enterprise",
            _ => "",
        }
    }

    pub(crate) fn from_record(record: &ClientRecord, revision: Revision) -> Result<Self, Error> {
        let bad = |what: &str| Error::data_loss(format!("a client record has a bad {what}"));
        let identities = record.identities.iter().map(identity_from_record);
        let permissions = record.permissions.iter().map(String::as_str);
        Ok(Self {
            id: record.client_id.clone(),
            name: record.name.clone(),
            description: record.description.clone(),
            environment: record.environment.clone(),
            tier: i32::try_from(record.tier).map_err(|_| bad("tier"))?,
            roles: record.roles.clone(),
            own_permissions: PermissionSet::parse(permissions).map_err(|_| bad("permission"))?,
            permissions: record.permissions.clone(),
            identities: identities.collect::<Option<_>>().ok_or_else(|| bad("identity"))?,
            api_keys: record.api_keys.iter().map(api_key_info).collect(),
            state: match record.state() {
                client_record::State::Enabled => ClientState::Enabled,
                client_record::State::Disabled => ClientState::Disabled,
                client_record::State::Removed => ClientState::Removed,
                client_record::State::Unspecified => return Err(bad("state")),
            },
            created_at: Time::from_micros(record.created_at),
            updated_at: Time::from_micros(record.updated_at),
            created_by: record.created_by.clone(),
            tokens_valid_from: Time::from_micros(record.tokens_valid_from),
            revision: revision.0,
        })
    }
}

fn api_key_info(key: &client_record::ApiKey) -> ApiKeyInfo {
    ApiKeyInfo {
        prefix: key.prefix.clone(),
        created_at: Time::from_micros(key.created_at),
        expires_at: Time::optional(key.expires_at),
    }
}

pub(super) fn identity_to_record(identity: &CertificateIdentity) -> Stored {
    let (kind, value) = match identity {
        CertificateIdentity::SpiffeUri(uri) => ("spiffe", uri.clone()),
        CertificateIdentity::Dns(name) => ("dns", name.clone()),
        CertificateIdentity::CommonName(name) => ("cn", name.clone()),
        CertificateIdentity::SpkiSha256(hash) => ("spki", data_encoding::HEXLOWER.encode(hash)),
    };
    Stored { kind: kind.into(), value }
}

pub(super) fn identity_from_record(stored: &Stored) -> Option<CertificateIdentity> {
    match stored.kind.as_str() {
        "spiffe" => CertificateIdentity::spiffe(&stored.value).ok(),
        "dns" => CertificateIdentity::dns(&stored.value).ok(),
        "cn" => CertificateIdentity::common_name(&stored.value).ok(),
        "spki" => CertificateIdentity::spki_sha256(&stored.value).ok(),
        _ => None,
    }
}

/// Whether `id` is `^[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,127}$`. Ids are case-sensitive; nothing is trimmed.
#[must_use]
pub fn is_client_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    id.len() <= 128
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"._:@-".contains(&b))
}

/// Checks everything of a record that does not depend on other records.
pub(super) fn check(record: &ClientRecord) -> Result<(), Error> {
    let mut v = Violations::new();
    v.check(
        is_client_id(&record.client_id),
        "client_id",
        "must match ^[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,127}$",
    );
    v.check(
        plain(&record.name, NAME),
        "name",
        "must have at most 256 bytes, no control characters",
    );
    limits::description(&mut v, "description", &record.description);
    v.check(
        plain(&record.environment, ENVIRONMENT),
        "environment",
        "must have at most 128 bytes, no control characters",
    );
    v.check((1..=3).contains(&record.tier), "tier", "must be FREE, PRO or ENTERPRISE");
    v.check(record.roles.len() <= MAX_ROLES, "roles", "must have at most 20 entries");
    permissions(&mut v, &record.permissions);
    v.check(
        (1..=MAX_IDENTITIES).contains(&record.identities.len()),
        "identities",
        "must have 1 to 20 entries",
    );
    v.finish()
}

/// Checks names of permissions.
pub(super) fn permissions(v: &mut Violations, names: &[String]) {
    v.check(names.len() <= MAX_PERMISSIONS, "permissions", "must have at most 100 entries");
    for (i, name) in names.iter().enumerate().take(MAX_PERMISSIONS) {
        if let Err(unknown) = PermissionSet::parse([name.as_str()]) {
            v.add(
                format!("permissions[{i}]"),
                format!("there is no permission {}", shown(&unknown.0)),
            );
        }
    }
}

fn plain(text: &str, longest: usize) -> bool {
    text.len() <= longest && !text.chars().any(char::is_control)
}

/// Sorted, each once.
pub(super) fn normalise(names: &mut Vec<String>) {
    names.sort_unstable();
    names.dedup();
}
