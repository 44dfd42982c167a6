//! What the schedule does to keys when its time has come. Everything here is enforced at use
//! anyway; this makes it the stored state, and erases material.

use polykey_hsm::GenerationParams;
use polykey_proto::polykey::record::v1::{
    AuditEvent, JobRecord, KeyRecord, UseCountRecord, VersionRecord, audit_event::Outcome,
    job_record::Kind, key_record::State,
};
use polykey_storage::Direction;

use super::create::{GENERATED, Made};
use super::hardened::is_hardened;
use super::plan::revocation_details;
use super::resident::is_resident;
use super::rows::{release_alias, unschedule, write_list_rows};
use super::work::purpose;
use super::{Key, Keyring};
use crate::error::Error;
use crate::key::{self, KeyId, Version, version_row};
use crate::time::Time;
use crate::vault::Tx;
use crate::webhook::PREVIOUS;

/// Versions erased in one transaction.
const ERASE: usize = 256;
/// What a rotation is called in the audit log.
const ROTATED: &str = "RotateKey";

/// Whether a rotation on the schedule is still meant.
fn rotates(record: &KeyRecord, job: &JobRecord) -> bool {
    // A job that names a version is there because that one has been used so often.
    match job.version {
        0 => record.next_rotation_at == job.due,
        version => version == record.primary_version,
    }
}

/// How a key's material is made once more.
fn again(record: &KeyRecord) -> GenerationParams {
    let prefix = record.generation_params.get("prefix").cloned();
    GenerationParams { supplied: None, prefix }
}

impl Keyring {
    /// Does what a job of the schedule says, and removes its row, in one transaction (erasing many
    /// versions takes several; the last one removes the row). What has been overtaken by events is
    /// removed without effect.
    ///
    /// # Errors
    /// The schedule tries again later.
    pub async fn run_job(&self, job: &JobRecord, row: &[u8], now: Time) -> Result<(), Error> {
        while self.job_step(job, row, now).await? {}
        Ok(())
    }

    /// One transaction of a job; whether it leaves more of it to do.
    async fn job_step(&self, job: &JobRecord, row: &[u8], now: Time) -> Result<bool, Error> {
        let id = KeyId::from_slice(&job.key_id)
            .ok_or_else(|| Error::data_loss("a job without a key"))?;
        let prepared = self.due_material(id, job, now).await?;
        let emptied = self.empty_token(id, job).await?;
        let mut tx = self.vault.begin().await?;
        if tx.get::<JobRecord>(row).await?.is_none() {
            return Ok(false);
        }
        let loaded = tx.get::<KeyRecord>(&id.bytes()).await?;
        let key = match loaded {
            None => None,
            Some(loaded) => Some(self.key(None, loaded.record).await?),
        };
        let (mut more, mut used) = (false, false);
        if let Some(key) = key {
            let effect = match job.kind() {
                Kind::Rotate => {
                    self.due_rotation(&mut tx, &key, prepared.as_ref(), job, now).await?
                }
                Kind::Promote => self.due_promotion(&mut tx, &key, job, now).await?,
                Kind::EndGrace => self.due_end_of_grace(&mut tx, &key, job).await?,
                Kind::Revoke => self.due_revocation(&mut tx, &key, job, now)?,
                Kind::Destroy => {
                    let (effect, left) =
                        self.due_destruction(&mut tx, &key, job, emptied, now).await?;
                    more = left;
                    effect
                }
                Kind::NotifyExpiry => {
                    Self::due_notice(&mut tx, &key, job, now)?;
                    None
                }
                Kind::SweepTokens | Kind::SweepIdempotency | Kind::Reseal | Kind::Unspecified => {
                    return Err(Error::internal("a job that is not about a key"));
                }
            };
            if let Some((action, after)) = effect {
                used = action == ROTATED;
                self.due_change(&mut tx, &key, after, action, job, now)?;
            }
        }
        if !more {
            tx.delete::<JobRecord>(row);
        }
        let keep = |kept| {
            if let Some(made) = &prepared {
                made.keep(kept);
            }
        };
        keep(used);
        let committed = tx.commit().await;
        if matches!(&committed, Err(error) if !matches!(error, Error::OutcomeUnknown { .. })) {
            keep(false);
        }
        let receipt = committed?;
        tracing::debug!(?receipt, kind = ?job.kind(), key = %id, more, "a due job is done");
        Ok(more)
    }

    fn due_change(
        &self,
        tx: &mut Tx<'_>,
        before: &Key,
        mut after: KeyRecord,
        action: &str,
        job: &JobRecord,
        now: Time,
    ) -> Result<(), Error> {
        after.updated_at = now.micros();
        after.revision += 1;
        write_list_rows(tx, Some(&before.record), &after, before.id)?;
        tx.put(&before.id.bytes(), &after)?;
        let mut event = AuditEvent {
            time: now.micros(),
            client_id: "polykey".into(),
            action: action.into(),
            key_id: before.id.bytes().to_vec().into(),
            version: job.version,
            ..AuditEvent::default()
        };
        event.set_outcome(Outcome::Success);
        event.details.insert("due".into(), Time::from_micros(job.due).to_string());
        if after.primary_version != before.record.primary_version {
            event.version = after.primary_version;
            event.details.insert(PREVIOUS.into(), before.record.primary_version.to_string());
        }
        if job.kind() == Kind::Revoke {
            revocation_details(&mut event, &after);
        }
        tx.event(event);
        Ok(())
    }

    /// The material of a hardened key that is to rotate: its backend is asked before there is a
    /// transaction.
    async fn due_material(
        &self,
        id: KeyId,
        job: &JobRecord,
        now: Time,
    ) -> Result<Option<Made>, Error> {
        if job.kind() != Kind::Rotate {
            return Ok(None);
        }
        let key = match self.load(id).await {
            Err(Error::NotFound) => return Ok(None),
            key => key?,
        };
        let outside = is_hardened(&key.record) || is_resident(&key.record);
        let due = outside && rotates(&key.record, job);
        if !due || key::may_seal(&key.record, now).is_err() {
            return Ok(None);
        }
        if is_resident(&key.record) {
            let kind = (key.algorithm, purpose(&key.record, key.algorithm));
            return self.make_resident(key.id, kind).await.map(Some);
        }
        self.backends()?.check()?;
        let generated = self.forge.make(None, key.algorithm, again(&key.record)).await?;
        self.made(None, &key, generated).await.map(Some)
    }

    async fn due_rotation(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        prepared: Option<&Made>,
        job: &JobRecord,
        now: Time,
    ) -> Result<Option<(&'static str, KeyRecord)>, Error> {
        if !rotates(&key.record, job) {
            return Ok(None);
        }
        let used_up = job.version != 0;
        let mut after = key.record.clone();
        if key::may_seal(&key.record, now).is_err() {
            // A disabled key is not rotated; enabling it starts the schedule again.
            if used_up {
                return Ok(None);
            }
            after.next_rotation_at = 0;
            return Ok(Some(("SkipRotation", after)));
        }
        let fresh;
        let made = match prepared {
            Some(made) => made,
            None if is_hardened(&key.record) || is_resident(&key.record) => {
                return Err(Error::Conflict);
            }
            None => {
                let params = again(&key.record);
                fresh = Made::standard(self.forge.make(None, key.algorithm, params).await?);
                &fresh
            }
        };
        let version = Version::new(key.record.latest_version.saturating_add(1))
            .ok_or_else(|| Error::internal("out of versions"))?;
        self.new_version_at(tx, key, version, (made, GENERATED), now)?;
        after.latest_version = version.get();
        after.primary_version = version.get();
        unschedule(tx, Kind::Promote, key.record.staged_promote_at, key.id, 0);
        after.staged_version = 0;
        after.staged_promote_at = 0;
        // Counted from now, not from when it was due: after a long sleep it rotates once.
        self.reschedule_rotation(tx, key, &mut after, now)?;
        Ok(Some((ROTATED, after)))
    }

    async fn due_promotion(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        job: &JobRecord,
        now: Time,
    ) -> Result<Option<(&'static str, KeyRecord)>, Error> {
        if key.record.staged_version == 0 || key.record.staged_promote_at != job.due {
            return Ok(None);
        }
        if key::may_seal(&key.record, now).is_err() {
            // It keeps its time, and is put back on the schedule when the key is usable again.
            return Ok(None);
        }
        let mut after = key.record.clone();
        let grace = key.record.staged_grace_seconds;
        self.promote(tx, key, &mut after, grace, now).await?;
        Ok(Some(("PromoteVersion", after)))
    }

    async fn due_end_of_grace(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        job: &JobRecord,
    ) -> Result<Option<(&'static str, KeyRecord)>, Error> {
        let Some(version) = Version::new(job.version) else { return Ok(None) };
        let row = version_row(key.id, version);
        let Some(loaded) = tx.get::<VersionRecord>(&row).await? else { return Ok(None) };
        let mut record = loaded.record;
        if record.grace_until != job.due || record.revoked_at != 0 {
            return Ok(None);
        }
        record.revoked_at = record.grace_until;
        tx.put(&row, &record)?;
        Ok(Some(("EndGrace", key.record.clone())))
    }

    fn due_revocation(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        job: &JobRecord,
        now: Time,
    ) -> Result<Option<(&'static str, KeyRecord)>, Error> {
        if key.record.revoke_at != job.due
            || !matches!(key.record.state(), State::Enabled | State::Disabled)
        {
            return Ok(None);
        }
        let mut after = key.record.clone();
        unschedule(tx, Kind::Rotate, key.record.next_rotation_at, key.id, 0);
        unschedule(tx, Kind::Promote, key.record.staged_promote_at, key.id, 0);
        key::settle_revocation(&mut after, now);
        Ok(Some(("RevokeKey", after)))
    }

    /// Erases every version of a key, some at a time, and then the key's names.
    async fn due_destruction(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        job: &JobRecord,
        emptied: bool,
        now: Time,
    ) -> Result<(Option<(&'static str, KeyRecord)>, bool), Error> {
        let resident = is_resident(&key.record);
        let destroyed = resident && emptied && key.record.state() == State::Destroyed;
        let pending = key.record.state() == State::PendingDestruction;
        if key.record.destroy_at != job.due || !(pending || destroyed) {
            return Ok((None, false));
        }
        let range = polykey_storage::prefix(key.id.bytes());
        let rows = tx.scan::<VersionRecord>(range, Direction::Forward, ERASE).await?;
        // Of a key in a token the rows say what is to be destroyed there, which nobody may cancel
        // any more: they go in a next step.
        let rows = if resident && pending { Vec::new() } else { rows };
        let more = rows.len() == ERASE;
        for (row, loaded) in &rows {
            let version = loaded.record.version;
            unschedule(tx, Kind::EndGrace, loaded.record.grace_until, key.id, version);
            tx.delete::<VersionRecord>(row);
            tx.delete::<UseCountRecord>(row);
        }
        if more || destroyed {
            return Ok((None, more));
        }
        let mut after = key.record.clone();
        for alias in std::mem::take(&mut after.aliases) {
            release_alias(tx, &alias).await?;
        }
        after.set_state(State::Destroyed);
        after.destroyed_at = now.micros();
        after.access_policies.clear();
        after.staged_version = 0;
        Ok((Some(("DestroyKey", after)), resident))
    }

    /// Destroys in their token some of the versions of a key that is destroyed; whether that is done.
    async fn empty_token(&self, id: KeyId, job: &JobRecord) -> Result<bool, Error> {
        if job.kind() != Kind::Destroy {
            return Ok(false);
        }
        let key = match self.load(id).await {
            Err(Error::NotFound) => return Ok(false),
            key => key?,
        };
        let due = key.record.destroy_at == job.due && key.record.state() == State::Destroyed;
        if !due || !is_resident(&key.record) {
            return Ok(false);
        }
        let range = polykey_storage::prefix(id.bytes());
        for (_, loaded) in
            self.vault.scan::<VersionRecord>(range, Direction::Forward, ERASE).await?
        {
            self.destroy_resident(&key, &loaded.record).await?;
        }
        Ok(true)
    }
}
