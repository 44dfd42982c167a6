//! The keys of the node and everything that can be done with them.
//!
//! Each operation loads the key, turns the command into an [`Authorized`] one, and acts on that
//! alone. A change is one transaction with its audit event; a read is checked against the epoch of
//! revocations once more before its result is released.

mod create;
mod due;
mod forge;
mod hardened;
mod idempotency;
pub(crate) mod list;
mod notice;
mod owned;
mod plan;
mod read;
mod resident;
mod rotate;
mod rows;
#[cfg(test)]
mod tests;
mod uses;
pub mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use polykey_hsm::{
    Algorithm, BlobHeader, BlobKey, KeyMaterial, MaterialContext, UnwrappedMaterial, WrappedBlob,
};
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::{AliasRecord, KeyRecord, VersionRecord};
use polykey_storage::RowKey;
use uuid::Uuid;

use crate::audit::Trail;
use crate::authz::{
    Action, Authorized, Authorizer, Command, Denied, KeyFacts, KeyPolicies, Permission,
    PolicyErrors, Resource,
};
use crate::cache::{Cache, Counts};
use crate::context::Context;
use crate::custody::{Backends, Tokens};
use crate::error::{Error, Reason};
use crate::key::{self, KeyId, KeyName, KeyState, Version, VersionState, version_row};
use crate::quotas::{Quota, Quotas};
use crate::telemetry::trace::{self, Stage};
use crate::time::Time;
use crate::vault::{Invalidate, Room, Tx, Vault, space};

pub use forge::Forge;
pub use idempotency::{Idempotency, Remember};
pub use list::Page;
pub use plan::Done;
pub use read::{Got, KeyMaterialView, MetadataView, PolicyView};
pub(crate) use resident::is_resident;

/// A key as loaded: its record and its own policies, compiled.
#[derive(Debug)]
pub struct Key {
    /// Its id.
    pub id: KeyId,
    /// What it is for.
    pub algorithm: Algorithm,
    /// What is stored.
    pub record: KeyRecord,
    facts: KeyFacts,
    policies: Arc<KeyPolicies>,
}

/// What a stored key is, before its policies are compiled.
type Known = (KeyId, Algorithm, KeyFacts);

fn known(record: &KeyRecord) -> Result<Known, Error> {
    let id = KeyId::from_slice(&record.key_id)
        .ok_or_else(|| Error::data_loss("a key record without an id"))?;
    let algorithm = key::algorithm(record)
        .ok_or_else(|| Error::data_loss("a key record of an unknown algorithm"))?;
    Ok((id, algorithm, facts(record, id, algorithm)))
}

impl Key {
    /// The key as authorization sees it.
    #[must_use]
    pub fn facts(&self) -> &KeyFacts {
        &self.facts
    }

    /// Its own policies.
    #[must_use]
    pub fn policies(&self) -> &KeyPolicies {
        &self.policies
    }

    pub(crate) fn resource(&self) -> Resource<'_> {
        Resource::Key { facts: &self.facts, policies: &self.policies }
    }
}

/// The stored state by name, as policies and people read it.
#[must_use]
pub fn state_name(record: &KeyRecord) -> &'static str {
    use polykey_proto::polykey::record::v1::key_record::State;
    match record.state() {
        State::Enabled => "enabled",
        State::Disabled => "disabled",
        State::Revoked => "revoked",
        State::PendingDestruction => "pending-destruction",
        State::Destroyed => "destroyed",
        State::Unspecified => "unspecified",
    }
}

fn facts(record: &KeyRecord, id: KeyId, algorithm: Algorithm) -> KeyFacts {
    KeyFacts {
        id: Uuid::from_bytes(id.bytes()),
        revision: record.revision,
        creator: record.creator.clone(),
        authorized_contexts: record.authorized_contexts.clone(),
        key_type: algorithm.name().to_owned(),
        purpose: work::purpose(record, algorithm).name().to_owned(),
        state: state_name(record).to_owned(),
        data_classification: record.data_classification.clone(),
        exportable: record.exportable,
        aliases: record.aliases.clone(),
        tags: record.tags.clone(),
    }
}

/// A version as loaded, with the wrapped form that clients hold; nothing secret in the clear.
#[derive(Debug)]
pub struct KeyVersion {
    /// What is stored.
    pub record: VersionRecord,
    /// The wrapped blob.
    pub blob: bytes::Bytes,
}

/// Keys whose parsed private parts are remembered, and keys whose compiled policies are.
const PARSED: usize = 1024;

/// What the keyring remembers of rows.
#[derive(Debug)]
pub struct KeyCaches {
    keys: Cache<KeyId, Arc<Key>>,
    versions: Cache<(KeyId, u32), Arc<KeyVersion>>,
    /// Parsed private keys: few, because each is a secret in memory.
    parsed: Cache<KeyId, Arc<work::Parsed>>,
    /// What backends opened of hardened keys: secrets in memory too, for a while.
    opened: Cache<KeyId, Arc<hardened::Opened>>,
    /// Compiled policies. They hold for as long as the texts are the same, whatever else changes.
    policies: Cache<KeyId, Arc<KeyPolicies>>,
    /// Which keys clients with a quota have.
    owned: owned::Owned,
    epoch: AtomicU64,
}

impl KeyCaches {
    /// Caches for about `capacity` keys and as many versions.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            keys: Cache::new(capacity),
            versions: Cache::new(capacity),
            parsed: Cache::new(capacity.min(PARSED)),
            opened: Cache::new(capacity.min(PARSED)),
            policies: Cache::new(capacity.min(PARSED)),
            owned: owned::Owned::default(),
            epoch: AtomicU64::new(0),
        }
    }

    /// Entries held: keys, versions.
    #[must_use]
    pub fn len(&self) -> (usize, usize) {
        (self.keys.len(), self.versions.len())
    }

    /// How well each does, by name.
    #[must_use]
    pub fn counts(&self) -> [(&'static str, Counts); 5] {
        [
            ("keys", self.keys.counts()),
            ("versions", self.versions.counts()),
            ("parsed_keys", self.parsed.counts()),
            ("opened_keys", self.opened.counts()),
            ("key_policies", self.policies.counts()),
        ]
    }

    /// Whether nothing is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == (0, 0)
    }
}

impl Invalidate for KeyCaches {
    fn invalidate(&self, rows: &[&RowKey]) {
        let mut any = false;
        for row in rows {
            if row.space == space::KEYS {
                if let Some(id) = KeyId::from_slice(&row.key) {
                    self.keys.invalidate(&id);
                    self.parsed.invalidate(&id);
                    self.opened.invalidate(&id);
                    any = true;
                }
            } else if row.space == space::VERSIONS
                && let Some((id, number)) = row.key.split_first_chunk::<16>()
                && let (Some(id), Ok(number)) = (KeyId::from_slice(id), number.try_into())
            {
                self.versions.invalidate(&(id, u32::from_be_bytes(number)));
                self.parsed.invalidate(&id);
                self.opened.invalidate(&id);
                any = true;
            } else {
                self.owned.changed(row);
            }
        }
        if any {
            self.epoch.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn clear(&self) {
        self.keys.clear();
        self.versions.clear();
        self.parsed.clear();
        self.opened.clear();
        self.policies.clear();
        self.owned.clear();
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }
}

/// The keys of the node.
pub struct Keyring {
    vault: Arc<Vault>,
    caches: Arc<KeyCaches>,
    authorizer: Arc<ArcSwap<Authorizer>>,
    trail: Arc<Trail>,
    forge: Forge,
    /// Where slow algorithms work.
    slow: Forge,
    uses: uses::Uses,
    turns: plan::Turns,
    quotas: Quotas,
    /// What hardened keys lie under.
    backends: Option<Arc<Backends>>,
    tokens: Tokens,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring").field("vault", &self.vault).finish_non_exhaustive()
    }
}

impl Keyring {
    /// How well what it remembers does, by name.
    #[must_use]
    pub fn cache_counts(&self) -> Vec<(&'static str, Counts)> {
        let decisions = ("decisions", self.authorizer.load().memo_counts());
        self.caches.counts().into_iter().chain([decisions]).collect()
    }

    /// A keyring over an open vault; `caches` must be the ones the vault invalidates.
    #[must_use]
    pub fn new(
        vault: Arc<Vault>,
        caches: Arc<KeyCaches>,
        authorizer: Arc<ArcSwap<Authorizer>>,
        trail: Arc<Trail>,
        forge: Forge,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let slow = Forge::new(cores, work::SLOW_QUEUE);
        let (uses, turns) = (uses::Uses::default(), plan::Turns::default());
        Self {
            vault,
            caches,
            authorizer,
            trail,
            forge,
            slow,
            uses,
            turns,
            quotas: Quotas::default(),
            backends: None,
            tokens: Tokens::default(),
        }
    }

    /// How many keys clients may have.
    #[must_use]
    pub fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Puts rules of quotas in force. Where they differ from those before, what clients have is counted anew:
    /// it was followed only for those that a rule was about.
    pub fn limit(&self, rules: &[Quota]) {
        if *self.quotas.rules() != rules {
            self.quotas.limit(rules);
            self.caches.owned.clear();
        }
    }

    /// The vault underneath.
    #[must_use]
    pub fn vault(&self) -> &Arc<Vault> {
        &self.vault
    }

    /// The policies in force.
    #[must_use]
    pub fn authorizer(&self) -> Arc<Authorizer> {
        self.authorizer.load_full()
    }

    /// The only way to an authorized command. A refusal is in the audit trail before it is told.
    pub(crate) async fn authorize<C: Command>(
        &self,
        cx: &Context,
        resource: Resource<'_>,
        command: C,
    ) -> Result<Authorized<C>, Error> {
        let context = cx.facts();
        let id = context.decision_id;
        let key = match &resource {
            Resource::Key { facts, .. } => KeyId::from_slice(facts.id.as_bytes()),
            _ => None,
        };
        let stage = trace::begin(Stage::Authorize);
        let result =
            self.authorizer.load().authorize(&cx.caller.facts, resource, &context, command);
        drop(stage);
        match result {
            // What adds is refused while there is still room to record what is done.
            Ok(_) if C::ACTION.adds() && self.vault.room() != Room::Enough => Err(Error::NoRoom),
            Ok(permit) => Ok(permit),
            Err(denied) => {
                let (action, error) = match denied {
                    Denied::Hidden => (C::ACTION, Error::NotFound),
                    Denied::Forbidden { action, decision } => {
                        if !decision.errors.is_empty() {
                            tracing::warn!(
                                request_id = cx.request_id,
                                errors = ?decision.errors,
                                "a policy failed to evaluate"
                            );
                        }
                        (action, Error::Denied { decision_id: id.to_string() })
                    }
                };
                let code = if matches!(error, Error::NotFound) { 5 } else { 7 };
                let event = cx.origin().event(
                    action.name(),
                    key.map(|key| (key, None)),
                    Outcome::Denied,
                    code,
                    &id.to_string(),
                );
                Box::pin(self.trail.denied(event)).await?;
                Err(error)
            }
        }
    }

    /// As [`Self::authorize`], where the right is one among several that an operation takes.
    pub(crate) async fn require<C: Command>(
        &self,
        cx: &Context,
        resource: Resource<'_>,
        command: C,
    ) -> Result<(), Error> {
        self.authorize(cx, resource, command).await.map(drop)
    }

    /// Loads a key by name for an action. That there is none is recorded as a refusal to see one
    /// is: neither the answer nor the work for it tells the two apart.
    pub(crate) async fn find(
        &self,
        cx: &Context,
        action: Action,
        name: &KeyName,
    ) -> Result<Arc<Key>, Error> {
        let client = Some(cx.caller.client_id());
        let found = async { self.load_for(client, self.resolve(name).await?).await };
        self.or_missing(cx, action, name, found.await).await
    }

    /// Records [`Error::NotFound`] of a name as [`Self::authorize`] records a key that is hidden.
    pub(crate) async fn or_missing<T>(
        &self,
        cx: &Context,
        action: Action,
        name: &KeyName,
        found: Result<T, Error>,
    ) -> Result<T, Error> {
        if matches!(found, Err(Error::NotFound)) {
            let decision = cx.facts().decision_id.to_string();
            // The name is no key of ours: nothing is kept of it but this event.
            let event = cx.origin().event(action.name(), None, Outcome::Denied, 5, &decision);
            Box::pin(self.trail.denied(event.detail("key", name.to_string()))).await?;
        }
        found
    }

    /// Has something done that takes longer than the threads of requests are kept: on one for slow
    /// work, of which a client has a share.
    ///
    /// # Errors
    /// As [`Forge::run`].
    pub(crate) async fn apart<T: Send + 'static>(
        &self,
        client: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        self.slow.run(Some(client), work).await
    }

    /// The policies of a key, compiled: for a client, of whose share of slow work it is, or for the
    /// node. The outer error is of the work, the inner one of the texts.
    pub(super) async fn compiled(
        &self,
        client: Option<&str>,
        id: KeyId,
        texts: &BTreeMap<String, String>,
    ) -> Result<Result<Arc<KeyPolicies>, PolicyErrors>, Error> {
        let uuid = Uuid::from_bytes(id.bytes());
        if texts.is_empty() {
            return Ok(Ok(Arc::new(KeyPolicies::none(uuid))));
        }
        let cache = &self.caches.policies;
        if let Some(policies) = cache.get(&id).filter(|policies| policies.are(texts)) {
            return Ok(Ok(policies));
        }
        let ticket = cache.ticket(&id);
        let texts = texts.clone();
        let compiled = self.slow.run(client, move || KeyPolicies::compile(uuid, &texts)).await?;
        Ok(compiled.map(|policies| {
            let policies = Arc::new(policies);
            cache.insert(ticket, id, Arc::clone(&policies));
            policies
        }))
    }

    /// A stored key with its policies compiled.
    pub(crate) async fn key(&self, client: Option<&str>, record: KeyRecord) -> Result<Key, Error> {
        let known = known(&record)?;
        self.key_of(client, record, known).await
    }

    async fn key_of(
        &self,
        client: Option<&str>,
        record: KeyRecord,
        (id, algorithm, facts): Known,
    ) -> Result<Key, Error> {
        // They were validated when they were written; an upgrade of the language must not make
        // a key unreadable in silence.
        let policies = self.compiled(client, id, &record.access_policies).await?.map_err(|e| {
            Error::data_loss(format!("the policies of key {id} do not compile: {e}"))
        })?;
        Ok(Key { id, algorithm, record, facts, policies })
    }

    /// Loads a key through the cache.
    pub(crate) async fn load(&self, id: KeyId) -> Result<Arc<Key>, Error> {
        self.load_for(None, id).await
    }

    /// As [`Self::load`], for a client.
    async fn load_for(&self, client: Option<&str>, id: KeyId) -> Result<Arc<Key>, Error> {
        if let Some(key) = self.caches.keys.get(&id) {
            return Ok(key);
        }
        let ticket = self.caches.keys.ticket(&id);
        let row = id.bytes();
        let loaded = Box::pin(self.vault.get::<KeyRecord>(&row)).await?.ok_or(Error::NotFound)?;
        let key = Arc::new(Box::pin(self.key(client, loaded.record)).await?);
        self.caches.keys.insert(ticket, id, Arc::clone(&key));
        Ok(key)
    }

    /// Resolves a name to an id. An alias is read from the store each time: it may move.
    pub(crate) async fn resolve(&self, name: &KeyName) -> Result<KeyId, Error> {
        match name {
            KeyName::Id(id) => Ok(*id),
            KeyName::Alias(alias) => {
                let row = self.vault.row_name("alias", alias);
                let alias = Box::pin(self.vault.get::<AliasRecord>(&row)).await?;
                let alias = alias.ok_or(Error::NotFound)?;
                KeyId::from_slice(&alias.record.key_id)
                    .ok_or_else(|| Error::data_loss("an alias without a key"))
            }
        }
    }

    /// Loads a version through the cache.
    pub(crate) async fn load_version(
        &self,
        key: &Key,
        version: Version,
    ) -> Result<Arc<KeyVersion>, Error> {
        let name = (key.id, version.get());
        if let Some(found) = self.caches.versions.get(&name) {
            return Ok(found);
        }
        let ticket = self.caches.versions.ticket(&name);
        let row = version_row(key.id, version);
        let loaded = Box::pin(self.vault.get::<VersionRecord>(&row)).await?;
        let loaded = loaded.ok_or(Error::State(Reason::VersionNotFound))?;
        let blob = self.blob(key, &loaded.record)?;
        let found = Arc::new(KeyVersion { record: loaded.record, blob: blob.into() });
        self.caches.versions.insert(ticket, name, Arc::clone(&found));
        Ok(found)
    }

    /// Loads a version of a key with the consistency of a transaction.
    pub(crate) async fn version_in(
        &self,
        tx: &mut Tx<'_>,
        id: KeyId,
        version: Version,
    ) -> Result<VersionRecord, Error> {
        let row = version_row(id, version);
        let loaded = tx.get::<VersionRecord>(&row).await?;
        loaded.map(|l| l.record).ok_or(Error::State(Reason::VersionNotFound))
    }

    pub(crate) fn material_context(&self, key: &Key, version: u32) -> MaterialContext {
        MaterialContext {
            node: self.vault.node_id(),
            key_id: key.id.bytes(),
            version,
            algorithm: key.algorithm,
            exportable: key.record.exportable,
        }
    }

    /// The wrapped form of a version that clients hold. That of a hardened one is stored, so that no
    /// backend is asked for what is not secret.
    pub(crate) fn blob(&self, key: &Key, version: &VersionRecord) -> Result<Vec<u8>, Error> {
        if hardened::is_hardened(&key.record) {
            return Ok(self.hardened_material(key, version)?.blob);
        }
        if is_resident(&key.record) {
            let resident = self.resident_material(key, version)?;
            // Where the material is stands for it: a client opens neither.
            let object = KeyMaterial::from_secret(resident.object);
            let object = object.map_err(|e| Error::data_loss(e.to_string()))?;
            return wrapped_blob(key, version.version, (&object, &resident.blob_key));
        }
        let opened = self.open_material(key, version)?;
        wrapped_blob(key, version.version, (&opened.material, &opened.blob_key))
    }

    /// Unwraps the material of a version that is not hardened, for this use only.
    pub(crate) fn open_material(
        &self,
        key: &Key,
        version: &VersionRecord,
    ) -> Result<UnwrappedMaterial, Error> {
        let context = self.material_context(key, version.version);
        self.vault.ring().unwrap_material(&context, &version.material).map_err(|e| {
            Error::data_loss(format!(
                "the material of key {} version {} does not open: {e}",
                key.id, version.version
            ))
        })
    }

    /// Moves with every change of a key or version.
    pub(crate) fn epoch(&self) -> u64 {
        self.caches.epoch.load(Ordering::SeqCst)
    }

    /// Whether the caller sees every key.
    pub(crate) fn sees_all(cx: &Context) -> bool {
        cx.caller.facts.permissions.contains(Permission::KeysAll)
    }
}

/// The wrapped form of a version that clients hold.
pub(crate) fn wrapped_blob(
    key: &Key,
    version: u32,
    (material, blob_key): (&KeyMaterial, &BlobKey),
) -> Result<Vec<u8>, Error> {
    let header = BlobHeader { key_id: key.id.bytes(), version, algorithm: key.algorithm };
    WrappedBlob::seal(blob_key, &header, material)
        .map_err(|e| Error::internal(format!("wrapping a version: {e}")))
}

/// The state of key and version at a moment, as answers show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The key's.
    pub key: KeyState,
    /// The version's.
    pub version: VersionState,
}

impl Shown {
    /// The states of `version` of `key` at `now`.
    #[must_use]
    pub fn at(key: &KeyRecord, version: &VersionRecord, now: Time) -> Self {
        Self { key: key::key_state(key, now), version: key::version_state(key, version, now) }
    }
}
