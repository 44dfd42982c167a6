//! Reading keys: wrapped material, exports, metadata, versions.

use std::sync::Arc;

use polykey_hsm::MacPurpose;
use polykey_hsm::{ExportInfo, HpkeExport, export_hpke};
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::{
    AliasRecord, HistoryEntry, KeyRecord, UsageRecord, VersionRecord, key_record::State,
};
use polykey_storage::Direction;
use prost::Message;
use zeroize::Zeroizing;

use super::create::IMPORTED;
use super::{Key, KeyVersion, Keyring, Shown};
use crate::audit::{Access, RECENT};
use crate::authz::{Action, Authorized, Command, DecisionId};
use crate::command::{Export, GetKey, GetMetadata, part};
use crate::context::Context;
use crate::error::{Error, Reason};
use crate::key::{self, KeyName, Version};
use crate::time::Time;

/// The making of a key as its history shows it.
fn made(record: &KeyRecord) -> HistoryEntry {
    let action = if record.origin == IMPORTED { Action::ImportKey } else { Action::CreateKey };
    HistoryEntry {
        time: record.created_at,
        client_id: record.creator.clone(),
        action: action.name().to_owned(),
        success: true,
        correlation_id: record.correlation_id.clone(),
        leaf: 0,
    }
}

/// How often a read begins again because keys were changing under it.
pub(super) const ATTEMPTS: usize = 8;

/// Material as it is given to a caller.
#[derive(Debug)]
pub enum KeyMaterialView {
    /// The wrapped blob; only this node opens it.
    Wrapped,
    /// The material itself.
    Plain(Zeroizing<Vec<u8>>),
    /// Encrypted to the caller's key.
    Hpke(HpkeExport),
}

/// A key and one of its versions, as answers show them.
#[derive(Debug)]
pub struct MetadataView {
    /// The key.
    pub key: Arc<Key>,
    /// The version.
    pub version: Arc<KeyVersion>,
    /// Their states.
    pub shown: Shown,
    /// How much it was used.
    pub usage: Access,
    /// A MAC over the record, hex.
    pub checksum: String,
    /// The last 32 things that happened to it, newest first, if asked for.
    pub history: Vec<HistoryEntry>,
    /// The policies that can apply to it, if asked for.
    pub policies: Vec<PolicyView>,
}

/// A policy that can apply to a key.
pub type PolicyView = crate::authz::PolicyEntry;

/// A key's material with what goes with it.
#[derive(Debug)]
pub struct Got {
    /// Key and version.
    pub metadata: MetadataView,
    /// The material.
    pub material: KeyMaterialView,
    /// The decision that allowed it.
    pub decision_id: DecisionId,
    /// The audit leaf, where the event is durable already.
    pub leaf: Option<u64>,
}

impl Keyring {
    /// Reads a key's material and metadata.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn get(&self, cx: &Context, command: &GetKey) -> Result<Got, Error> {
        for _ in 0..ATTEMPTS {
            let epoch = self.epoch();
            let key = self.find(cx, Action::GetKey, &command.key).await?;
            let permit = self.authorize(cx, key.resource(), command).await?;
            key::may_open(&key.record, cx.now).map_err(Error::State)?;
            let version = key::pick_version(&key.record, command.version).map_err(Error::State)?;
            let version = self.load_version(&key, version).await?;
            key::version_opens(&key.record, &version.record, cx.now).map_err(Error::State)?;
            let got = self.release(cx, command, &key, &version, &permit).await?;
            // Nothing is released that was decided on a state that has passed meanwhile.
            if self.epoch() == epoch || Box::pin(self.unchanged(&key, &version)).await? {
                return Ok(got);
            }
        }
        Err(Error::Conflict)
    }

    /// Whether key and version are still what they were when they were loaded.
    pub(super) async fn unchanged(&self, key: &Key, version: &KeyVersion) -> Result<bool, Error> {
        let now = self.load(key.id).await?;
        if now.record.revision != key.record.revision {
            return Ok(false);
        }
        let number = Version::new(version.record.version).ok_or(Error::NotFound)?;
        let again = self.load_version(&now, number).await?;
        Ok(again.record == version.record)
    }

    async fn release(
        &self,
        cx: &Context,
        command: &GetKey,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
        permit: &Authorized<&GetKey>,
    ) -> Result<Got, Error> {
        let mut leaf = None;
        let material = if command.export == Export::None {
            let event = self.read_event(cx, key, version.record.version, permit);
            self.trail.used(event).await?;
            KeyMaterialView::Wrapped
        } else {
            let permit = self.authorize(cx, key.resource(), part::ExportKey(command)).await?;
            let exported = Box::pin(self.export(cx, key, version, &permit)).await?;
            let (material, index) = exported;
            leaf = index;
            material
        };
        let metadata = self.view(cx, key, version).await?;
        Ok(Got { metadata, material, decision_id: permit.decision_id(), leaf })
    }

    fn read_event<C: Command>(
        &self,
        cx: &Context,
        key: &Key,
        version: u32,
        permit: &Authorized<C>,
    ) -> polykey_proto::polykey::record::v1::AuditEvent {
        let decision = permit.decision_id().to_string();
        let about = Some((key.id, Some(version)));
        cx.origin().event(C::ACTION.name(), about, Outcome::Success, 0, &decision).build()
    }

    /// Material that leaves the node: recorded durably before it is released.
    async fn export(
        &self,
        cx: &Context,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
        permit: &Authorized<part::ExportKey<'_>>,
    ) -> Result<(KeyMaterialView, Option<u64>), Error> {
        let number = version.record.version;
        if !key.record.exportable {
            return Err(Error::State(Reason::NotExportable));
        }
        let exported = self.material(cx.caller.client_id(), key, version).await?;
        let mut event = self.read_event(cx, key, number, permit);
        let material = match &permit.command().0.export {
            Export::None => return Err(Error::internal("an export of nothing")),
            Export::Plain => {
                event.details.insert("export".into(), "plain".into());
                KeyMaterialView::Plain(exported.expose_for_export())
            }
            Export::Hpke(recipient) => {
                let info = ExportInfo {
                    node: self.vault.node_id(),
                    key_id: key.id.bytes(),
                    version: number,
                    principal: cx.caller.client_id().to_owned(),
                };
                let sealed = export_hpke(recipient, &info, &exported)
                    .map_err(|e| Error::invalid("recipient_public_key", e.to_string()))?;
                let hash = data_encoding::HEXLOWER.encode(&sealed.recipient_key_sha256);
                event.details.insert("export".into(), "hpke".into());
                event.details.insert("recipient_key_sha256".into(), hash);
                KeyMaterialView::Hpke(sealed)
            }
        };
        let leaf = self.trail.record(event).await?;
        Ok((material, Some(leaf)))
    }

    /// What is shown of a key and a version.
    pub(crate) async fn view(
        &self,
        cx: &Context,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
    ) -> Result<MetadataView, Error> {
        let usage = self.trail.access(&key.id).await?;
        Ok(self.view_with(cx, key, version, usage))
    }

    pub(super) fn view_with(
        &self,
        cx: &Context,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
        usage: Access,
    ) -> MetadataView {
        MetadataView {
            shown: Shown::at(&key.record, &version.record, cx.now),
            usage,
            checksum: self.metadata_checksum(&key.record),
            key: Arc::clone(key),
            version: Arc::clone(version),
            history: Vec::new(),
            policies: Vec::new(),
        }
    }

    /// A MAC over the stored record: two answers with the same checksum show the same metadata.
    fn metadata_checksum(&self, record: &KeyRecord) -> String {
        let mac = self.vault.ring().mac(MacPurpose::MetadataChecksum, &[&record.encode_to_vec()]);
        data_encoding::HEXLOWER.encode(&mac)
    }

    /// What is shown of the result of a change.
    ///
    /// # Errors
    /// As [`Self::metadata`].
    pub async fn view_done(&self, cx: &Context, done: &super::Done) -> Result<MetadataView, Error> {
        let version = match &done.version {
            Some(version) => Arc::clone(version),
            None => self.shown_version(&done.key, 0).await?,
        };
        self.view(cx, &done.key, &version).await
    }

    /// The version that metadata is shown of. Where there is none any more (destroyed), an empty
    /// one stands in.
    pub(super) async fn shown_version(
        &self,
        key: &Key,
        asked: u32,
    ) -> Result<Arc<KeyVersion>, Error> {
        let version = key::pick_version(&key.record, asked).map_err(Error::State)?;
        match self.load_version(key, version).await {
            Err(Error::State(Reason::VersionNotFound))
                if matches!(key.record.state(), State::Destroyed | State::PendingDestruction) =>
            {
                // Many versions go in several steps, between which the key is still pending.
                let gone = Time::optional(key.record.destroyed_at);
                let record = VersionRecord {
                    key_id: key.id.bytes().to_vec().into(),
                    version: version.get(),
                    algorithm: u32::from(key.algorithm.code()),
                    revoked_at: gone.map_or(key.record.destroy_at, Time::micros),
                    ..VersionRecord::default()
                };
                Ok(Arc::new(KeyVersion { record, blob: bytes::Bytes::new() }))
            }
            other => other,
        }
    }

    /// Reads a key's metadata, whatever its state.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn metadata(
        &self,
        cx: &Context,
        command: &GetMetadata,
    ) -> Result<MetadataView, Error> {
        let key = self.find(cx, Action::GetKeyMetadata, &command.key).await?;
        let permit = self.authorize(cx, key.resource(), command).await?;
        if command.history {
            self.require(cx, key.resource(), part::ReadHistory(&command.key)).await?;
        }
        if command.policies {
            self.require(cx, key.resource(), part::ReadPolicies(&command.key)).await?;
        }
        let version = self.shown_version(&key, command.version).await?;
        let mut view = self.view(cx, &key, &version).await?;
        if command.history {
            let usage: UsageRecord = self.trail.usage(&key.id).await?;
            view.history = usage.recent.into_iter().rev().collect();
            // The making of a key is the first of its events, and stands in its record: where the
            // last ones are not all, it is not among them.
            if view.history.len() < RECENT {
                view.history.push(made(&key.record));
            }
        }
        if command.policies {
            view.policies = self.authorizer().policy_details(key.facts(), key.policies());
        }
        let event = self.read_event(cx, &key, version.record.version, &permit);
        self.trail.used(event).await?;
        Ok(view)
    }

    /// Every readable version of a key, oldest first, for a stream: each is then read with
    /// [`Self::get`], which checks it again.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn readable_versions(
        &self,
        cx: &Context,
        command: &GetKey,
    ) -> Result<Vec<u32>, Error> {
        let key = self.find(cx, Action::GetKey, &command.key).await?;
        self.require(cx, key.resource(), command).await?;
        key::may_open(&key.record, cx.now).map_err(Error::State)?;
        let mut readable = Vec::new();
        for record in self.versions(&key).await? {
            if key::version_opens(&key.record, &record, cx.now).is_ok() {
                readable.push(record.version);
            }
        }
        Ok(readable)
    }

    async fn versions(&self, key: &Key) -> Result<Vec<VersionRecord>, Error> {
        let range = polykey_storage::prefix(key.id.bytes());
        let rows = self.vault.scan::<VersionRecord>(range, Direction::Forward, 10_000).await?;
        Ok(rows.into_iter().map(|(_, loaded)| loaded.record).collect())
    }

    /// The versions of a key from `from` on, at most `limit`, oldest first.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn list_versions(
        &self,
        cx: &Context,
        name: &KeyName,
        from: u32,
        limit: usize,
    ) -> Result<(Arc<Key>, Vec<VersionRecord>), Error> {
        let key = self.find(cx, Action::GetKeyMetadata, name).await?;
        let permit = self.authorize(cx, key.resource(), part::Describe(name)).await?;
        let mut start = key.id.bytes().to_vec();
        start.extend_from_slice(&from.to_be_bytes());
        let mut end = key.id.bytes().to_vec();
        end.extend_from_slice(&u32::MAX.to_be_bytes());
        let range = (std::ops::Bound::Included(start), std::ops::Bound::Included(end));
        let rows = self.vault.scan::<VersionRecord>(range, Direction::Forward, limit).await?;
        let event = self.read_event(cx, &key, 0, &permit);
        self.trail.used(event).await?;
        Ok((key, rows.into_iter().map(|(_, loaded)| loaded.record).collect()))
    }

    /// Authorizes and loads a key for reading its history.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn for_history(&self, cx: &Context, name: &KeyName) -> Result<Arc<Key>, Error> {
        let key = self.find(cx, Action::ReadKeyHistory, name).await?;
        self.require(cx, key.resource(), part::ReadHistory(name)).await?;
        Ok(key)
    }

    /// Authorizes and loads a key for reading what it is.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn describe(&self, cx: &Context, name: &KeyName) -> Result<Arc<Key>, Error> {
        let key = self.find(cx, Action::GetKeyMetadata, name).await?;
        self.require(cx, key.resource(), part::Describe(name)).await?;
        Ok(key)
    }

    /// Reads an alias.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn alias(&self, name: &str) -> Result<Option<AliasRecord>, Error> {
        let row = self.vault.row_name("alias", name);
        Ok(self.vault.get::<AliasRecord>(&row).await?.map(|loaded| loaded.record))
    }

    /// Loads a key without asking who wants it, to explain decisions about it.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn load_unchecked(&self, name: &KeyName) -> Result<Arc<Key>, Error> {
        self.load(self.resolve(name).await?).await
    }
}
