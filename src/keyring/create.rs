//! Making a key.

use std::sync::Arc;

use polykey_hsm::{
    Algorithm, BlobKey, Generated, GenerationParams, HardenedBlobKey, KeyMaterial, key_checksum,
};
use polykey_proto::polykey::record::v1::{
    KeyRecord, VersionRecord, job_record::Kind, key_record::State,
};
use zeroize::Zeroize;

use super::hardened::{HARDENED, STANDARD, is_hardened};
use super::notice;
use super::owned::Place;
use super::plan::{Done, Planned, Prepared, next_rotation};
use super::resident::{RESIDENT, is_resident, token_id};
use super::rows::{claim_alias, schedule, write_list_rows};
use super::{Key, KeyVersion, Keyring, wrapped_blob};
use crate::authz::{PolicyErrors, Resource};
use crate::command::{CreateKey, Value, part};
use crate::context::Context;
use crate::custody::Placed;
use crate::error::{Error, FieldViolation};
use crate::key::{KeyId, Version, version_row};
use crate::time::Time;
use crate::vault::Tx;

/// Where material came from, as records say it.
pub(super) const GENERATED: u32 = 1;
pub(super) const IMPORTED: u32 = 2;

/// Errors of policies as violations of the field that carried them.
pub(super) fn policy_violations(field: &str, errors: &PolicyErrors) -> Error {
    let violation = |e: &crate::authz::PolicyError| {
        FieldViolation::new(format!("{field}[{}]", crate::limits::shown(&e.name)), e.to_string())
    };
    Error::Invalid(errors.0.iter().take(16).map(violation).collect())
}

/// A supplied value as key material; the copy in the command dies with the command.
pub(super) fn supplied(value: &Value) -> Result<KeyMaterial, Error> {
    let mut copy = value.0.to_vec();
    KeyMaterial::from_secret(std::mem::take(&mut copy)).map_err(|e| {
        copy.zeroize();
        Error::invalid("value", e.to_string())
    })
}

/// Material that was made, and what it lies under if its key is hardened.
pub(super) struct Made {
    generated: Generated,
    hardened: Option<HardenedBlobKey>,
    /// The key in its token.
    placed: Option<Placed>,
}

impl Made {
    /// Of a key that is not hardened.
    pub(super) fn standard(generated: Generated) -> Self {
        Self { generated, hardened: None, placed: None }
    }

    /// Of a key in a token.
    pub(super) fn in_token(generated: Generated, placed: Placed) -> Self {
        Self { generated, hardened: None, placed: Some(placed) }
    }

    /// Whether what was made in a token stays there from now on.
    pub(super) fn keep(&self, kept: bool) {
        if let Some(placed) = &self.placed {
            placed.keep(kept);
        }
    }

    /// Whether a version is of this material, by its public half.
    pub(super) fn is_of(&self, version: &VersionRecord) -> bool {
        let public = self.generated.public.as_ref();
        public.is_some_and(|public| public.spki_der.as_slice() == version.public_key.as_ref())
    }
}

impl Keyring {
    /// Material with what it lies under, if its key is hardened.
    pub(super) async fn made(
        &self,
        client: Option<&str>,
        key: &Key,
        generated: Generated,
    ) -> Result<Made, Error> {
        if !is_hardened(&key.record) {
            return Ok(Made::standard(generated));
        }
        let hardened = Box::pin(self.harden(client, key.id)).await?;
        Ok(Made { generated, hardened: Some(hardened), placed: None })
    }

    fn draft(cx: &Context, command: &CreateKey, id: KeyId, profile: u32) -> KeyRecord {
        let CreateKey {
            algorithm,
            purpose,
            convergent,
            rotate_after_uses,
            max_uses,
            import: _,
            description,
            tags,
            expires_at,
            contexts,
            policies,
            classification,
            exportable,
            value: _,
            alias,
            read_after_expiry,
            rotation_period,
            profile: _,
            in_token: _,
            prefix,
        } = command;
        let mut record = KeyRecord {
            key_id: id.bytes().to_vec().into(),
            algorithm: u32::from(algorithm.code()),
            created_at: cx.now.micros(),
            updated_at: cx.now.micros(),
            expires_at: expires_at.map_or(0, |t| t.micros()),
            creator: cx.caller.client_id().to_owned(),
            authorized_contexts: contexts.clone(),
            access_policies: policies.clone(),
            description: description.clone(),
            tags: tags.clone(),
            data_classification: classification.clone(),
            exportable: exportable.unwrap_or(*algorithm == Algorithm::ApiKey),
            read_after_expiry: *read_after_expiry,
            storage_profile: profile,
            origin: if command.comes_from_outside() { IMPORTED } else { GENERATED },
            aliases: alias.iter().cloned().collect(),
            primary_version: 1,
            latest_version: 1,
            min_decryption_version: 1,
            min_available_version: 1,
            rotation_period_seconds: rotation_period.unwrap_or(0),
            revision: 1,
            // What every key of its algorithm is for is not written down.
            purpose: if *purpose == algorithm.default_purpose() { 0 } else { purpose.code() },
            convergent: *convergent,
            rotate_after_uses: *rotate_after_uses,
            max_uses: *max_uses,
            correlation_id: cx.correlation_id.clone(),
            ..KeyRecord::default()
        };
        if let Some(prefix) = prefix {
            record.generation_params.insert("prefix".into(), prefix.clone());
        }
        record.set_state(State::Enabled);
        record
    }

    pub(super) async fn prepare_create(
        &self,
        cx: &Context,
        command: &CreateKey,
    ) -> Result<Prepared, Error> {
        let id = KeyId::mint(cx.now);
        let profile = if command.in_token { RESIDENT } else { STANDARD };
        let draft = Self::draft(cx, command, id, profile);
        self.authorize_create(cx, command, &draft).await?;
        let facts = super::facts(&draft, id, command.algorithm);
        let hardens = self.hardens(cx, command, Resource::NewKey(&facts))?;
        if command.in_token {
            self.check_resident(command)?;
        }
        let client = Some(cx.caller.client_id());
        self.compiled(client, id, &command.policies)
            .await?
            .map_err(|e| policy_violations("access_policies", &e))?;
        // Nobody makes this node generate what it has no place for.
        let place = self.place(cx, id).await?;
        if command.in_token {
            let kind = (command.algorithm, command.purpose);
            return Ok(Prepared::Key(id, self.make_resident(id, kind).await?, place));
        }
        let generated = if let Some(import) = &command.import {
            self.imported(cx, command.algorithm, import).await?
        } else {
            let params = GenerationParams {
                supplied: command.value.as_ref().map(supplied).transpose()?,
                prefix: command.prefix.clone(),
            };
            self.forge.make(client, command.algorithm, params).await?
        };
        let hardened = if hardens { Some(Box::pin(self.harden(client, id)).await?) } else { None };
        Ok(Prepared::Key(id, Made { generated, hardened, placed: None }, place))
    }

    /// The place of a new key in the quota of its client, where there is one.
    async fn place(&self, cx: &Context, id: KeyId) -> Result<Option<Place>, Error> {
        let Some(quota) = self.quotas.of(&cx.caller) else { return Ok(None) };
        let most = usize::try_from(quota.keys.get()).unwrap_or(usize::MAX);
        let owned = &self.caches.owned;
        match owned.place(&self.vault, cx.caller.client_id(), most, id).await? {
            Some(place) => Ok(Some(place)),
            None => Err(self.quotas.refusal(quota)),
        }
    }

    async fn authorize_create(
        &self,
        cx: &Context,
        command: &CreateKey,
        draft: &KeyRecord,
    ) -> Result<(String, &'static str), Error> {
        let id = KeyId::from_slice(&draft.key_id).ok_or_else(|| Error::internal("a bad id"))?;
        let facts = super::facts(draft, id, command.algorithm);
        let resource = Resource::NewKey(&facts);
        Ok(if command.comes_from_outside() {
            let permit = self.authorize(cx, resource, part::Import(command)).await?;
            (permit.decision_id().to_string(), "ImportKey")
        } else {
            let permit = self.authorize(cx, resource, part::Generate(command)).await?;
            (permit.decision_id().to_string(), "CreateKey")
        })
    }

    pub(super) async fn plan_create(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        command: &CreateKey,
        prepared: &Prepared,
    ) -> Result<Planned, Error> {
        let Prepared::Key(id, made, _) = prepared else {
            return Err(Error::internal("no material was made"));
        };
        let id = *id;
        let profile = match (&made.hardened, command.in_token) {
            (Some(_), _) => HARDENED,
            (None, true) => RESIDENT,
            (None, false) => STANDARD,
        };
        let mut record = Self::draft(cx, command, id, profile);
        let (decision, action) = self.authorize_create(cx, command, &record).await?;
        if let Some(import) = &command.import {
            self.use_up(tx, cx, import).await?;
        }
        if record.rotation_period_seconds > 0 {
            let due = next_rotation(id, &record, cx.now);
            record.next_rotation_at = due.micros();
            schedule(tx, Kind::Rotate, due, id, 0)?;
        }
        notice::arm(tx, &record, id, cx.now)?;
        if let Some(alias) = &command.alias {
            claim_alias(tx, alias, id, cx.now).await?;
        }
        let key = self.key(Some(cx.caller.client_id()), record).await?;
        tx.insert(&id.bytes(), &key.record)?;
        write_list_rows(tx, None, &key.record, id)?;
        let made = (made, key.record.origin);
        let version = self.new_version_at(tx, &key, Version::FIRST, made, cx.now)?;
        let event = cx.origin().event(
            action,
            Some((id, Some(1))),
            polykey_proto::polykey::record::v1::audit_event::Outcome::Success,
            0,
            &decision,
        );
        let done = Done {
            key: Arc::new(key),
            version: Some(Arc::new(version)),
            previous: 0,
            grace_until: None,
            at: cx.now,
            leaf: None,
            erased: 0,
        };
        Ok(Planned { done, event: event.into(), beside: None })
    }

    /// Wraps material into a new version row.
    pub(super) fn new_version_at(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        version: Version,
        (made, origin): (&Made, u32),
        now: Time,
    ) -> Result<KeyVersion, Error> {
        let failed = |e: polykey_hsm::CryptoFailure| Error::internal(e.to_string());
        let Made { generated: made, hardened, placed } = made;
        let context = self.material_context(key, version.get());
        let (material, blob, checksum) = if is_hardened(&key.record) {
            // An alias that has moved since it was made names another key.
            let blob_key = hardened.as_ref().filter(|blob_key| blob_key.is_of(&context));
            let blob_key = blob_key.ok_or(Error::Conflict)?;
            let checksum = blob_key.checksum(&made.material).map_err(failed)?;
            let ring = self.vault.ring();
            let hardened = ring.harden_material(&context, &made.material, blob_key);
            let (material, blob) = hardened.map_err(failed)?;
            (material, blob, checksum)
        } else if is_resident(&key.record) {
            let blob_key = BlobKey::generate().map_err(failed)?;
            let checksum = key_checksum(&blob_key, &made.material).map_err(failed)?;
            let blob = wrapped_blob(key, version.get(), (&made.material, &blob_key))?;
            let object = placed.as_ref().ok_or(Error::Conflict)?.id();
            let ring = self.vault.ring();
            let material = ring.place_material(&context, &token_id()?, object, &blob_key);
            (material.map_err(failed)?, blob, checksum)
        } else {
            let blob_key = BlobKey::generate().map_err(failed)?;
            let checksum = key_checksum(&blob_key, &made.material).map_err(failed)?;
            let ring = self.vault.ring();
            let material = ring.wrap_material(&context, &made.material, &blob_key);
            let blob = wrapped_blob(key, version.get(), (&made.material, &blob_key))?;
            (material.map_err(failed)?, blob, checksum)
        };
        let record = VersionRecord {
            key_id: key.id.bytes().to_vec().into(),
            version: version.get(),
            created_at: now.micros(),
            material: material.into(),
            public_key: made.public.as_ref().map(|p| p.spki_der.clone().into()).unwrap_or_default(),
            algorithm: u32::from(key.algorithm.code()),
            checksum,
            origin,
            ..VersionRecord::default()
        };
        tx.insert(&version_row(key.id, version), &record)?;
        Ok(KeyVersion { record, blob: blob.into() })
    }
}
