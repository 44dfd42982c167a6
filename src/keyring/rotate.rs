//! New versions: at once, staged, or by themselves.

use std::sync::Arc;

use polykey_hsm::GenerationParams;
use polykey_proto::polykey::record::v1::{KeyRecord, VersionRecord, job_record::Kind};

use super::create::{GENERATED, IMPORTED, Made, supplied};
use super::hardened::is_hardened;
use super::plan::{Done, Planned, Prepared};
use super::resident::is_resident;
use super::rows::{schedule, unschedule};
use super::work::purpose;
use super::{Key, Keyring};
use crate::authz::{Action, Authorized};
use crate::command::{RotateKey, Strategy};
use crate::context::Context;
use crate::error::{Error, Reason};
use crate::key::{self, Version, version_row};
use crate::time::Time;
use crate::vault::Tx;
use crate::webhook::PREVIOUS;

/// Whether a rotation makes a version, as the key stands.
fn makes_version(record: &KeyRecord, strategy: Strategy) -> bool {
    match strategy {
        Strategy::Hot => true,
        // The second call promotes what the first has staged.
        Strategy::Staged { .. } => record.staged_version == 0,
        Strategy::Scheduled { .. } => false,
    }
}

/// Refuses a schedule for a key whose material came from outside: a generated value would take the
/// place of a credential that somebody else knows.
pub(super) fn rotates_itself(record: &KeyRecord, field: &str) -> Result<(), Error> {
    if record.origin == IMPORTED {
        return Err(Error::invalid(
            field,
            "a supplied value cannot be rotated by the server itself",
        ));
    }
    Ok(())
}

/// What a rotation says that the key as it stands cannot honour.
fn check(record: &KeyRecord, command: &RotateKey) -> Result<(), Error> {
    match command.strategy {
        // A call that only promotes would drop these in silence.
        Strategy::Staged { at } if record.staged_version != 0 => {
            let staged = "a version is staged already; promote it first, by a call without this";
            if at.is_some() {
                return Err(Error::invalid("effective_at", staged));
            }
            if command.value.is_some() {
                return Err(Error::invalid("value", staged));
            }
        }
        Strategy::Scheduled { .. } => {
            rotates_itself(record, "generation_params[rotation_period_seconds]")?;
        }
        Strategy::Hot | Strategy::Staged { .. } => {}
    }
    if command.value.is_some() && record.rotation_period_seconds > 0 {
        return Err(Error::invalid(
            "value",
            "the key rotates by itself, which would replace it; end its schedule first",
        ));
    }
    Ok(())
}

impl Keyring {
    pub(super) async fn prepare_rotate(
        &self,
        cx: &Context,
        command: &RotateKey,
    ) -> Result<Prepared, Error> {
        // Nobody makes this node generate an RSA key for nothing.
        let key = self.find(cx, Action::RotateKey, &command.key).await?;
        self.require(cx, key.resource(), command).await?;
        key::may_seal(&key.record, cx.now).map_err(Error::State)?;
        if !makes_version(&key.record, command.strategy) {
            return Ok(Prepared::Nothing);
        }
        if is_hardened(&key.record) {
            // Before anything is generated for nothing.
            self.backends()?.check()?;
        }
        if is_resident(&key.record) {
            let kind = (key.algorithm, purpose(&key.record, key.algorithm));
            return Ok(Prepared::Material(self.make_resident(key.id, kind).await?));
        }
        let generated = self.material_for(cx, &key, command).await?;
        let client = Some(cx.caller.client_id());
        Ok(Prepared::Material(self.made(client, &key, generated).await?))
    }

    async fn material_for(
        &self,
        cx: &Context,
        key: &Key,
        command: &RotateKey,
    ) -> Result<polykey_hsm::Generated, Error> {
        let params = GenerationParams {
            supplied: command.value.as_ref().map(supplied).transpose()?,
            prefix: key.record.generation_params.get("prefix").cloned(),
        };
        self.forge.make(Some(cx.caller.client_id()), key.algorithm, params).await
    }

    pub(super) async fn plan_rotate(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        key: Key,
        permit: Authorized<&RotateKey>,
        prepared: &Prepared,
    ) -> Result<Planned, Error> {
        let command = *permit.command();
        key::may_seal(&key.record, cx.now).map_err(Error::State)?;
        check(&key.record, command)?;
        let mut after = key.record.clone();
        if command.clear_policies {
            after.access_policies.clear();
        }
        let previous = key.record.primary_version;
        let made;
        let new = if makes_version(&key.record, command.strategy) {
            let made = match prepared {
                Prepared::Material(made) => made,
                // The staged version that was to be promoted is gone: somebody was faster. No
                // backend is asked from within a change.
                Prepared::Nothing | Prepared::Key(..)
                    if is_hardened(&key.record) || is_resident(&key.record) =>
                {
                    return Err(Error::Conflict);
                }
                Prepared::Nothing | Prepared::Key(..) => {
                    made = Made::standard(self.material_for(cx, &key, command).await?);
                    &made
                }
            };
            let number = key.record.latest_version.checked_add(1);
            let version = number.and_then(Version::new).filter(|v| v.get() <= i32::MAX as u32);
            let version = version.ok_or(Error::State(Reason::BoundsInvalid))?;
            after.latest_version = version.get();
            let origin = if command.value.is_some() { IMPORTED } else { GENERATED };
            Some(self.new_version_at(tx, &key, version, (made, origin), cx.now)?)
        } else {
            None
        };
        let mut grace_until = None;
        match command.strategy {
            Strategy::Hot => {
                unschedule(tx, Kind::Promote, key.record.staged_promote_at, key.id, 0);
                after.primary_version = after.latest_version;
                after.staged_version = 0;
                after.staged_promote_at = 0;
                grace_until = self.deprecate(tx, &key, previous, command.grace, cx.now).await?;
                self.reschedule_rotation(tx, &key, &mut after, cx.now)?;
            }
            Strategy::Staged { at } if key.record.staged_version == 0 => {
                after.staged_version = after.latest_version;
                after.staged_grace_seconds = command.grace;
                if let Some(at) = at {
                    after.staged_promote_at = at.micros();
                    schedule(tx, Kind::Promote, at, key.id, 0)?;
                }
            }
            Strategy::Staged { .. } => {
                let grace = match command.grace {
                    0 => key.record.staged_grace_seconds,
                    grace => grace,
                };
                grace_until = self.promote(tx, &key, &mut after, grace, cx.now).await?;
            }
            Strategy::Scheduled { period } => {
                after.rotation_period_seconds = period;
                self.reschedule_rotation(tx, &key, &mut after, cx.now)?;
            }
        }
        let about = match command.strategy {
            Strategy::Staged { .. } if after.staged_version != 0 => after.staged_version,
            _ => after.primary_version,
        };
        let mut planned = self.changed(cx, tx, &key, after, &permit).await?;
        planned.event.version = about;
        if planned.done.key.record.primary_version != previous {
            planned.event.details.insert(PREVIOUS.into(), previous.to_string());
        }
        let version = match new {
            Some(version) => Arc::new(version),
            None => self.version_view(tx, &planned.done.key, about).await?,
        };
        planned.done = Done { version: Some(version), previous, grace_until, ..planned.done };
        Ok(planned)
    }

    async fn version_view(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        number: u32,
    ) -> Result<Arc<super::KeyVersion>, Error> {
        let version = Version::new(number).ok_or(Error::State(Reason::VersionNotFound))?;
        let record = self.version_in(tx, key.id, version).await?;
        let blob = self.blob(key, &record)?;
        Ok(Arc::new(super::KeyVersion { record, blob: blob.into() }))
    }

    /// Makes the staged version primary.
    pub(super) async fn promote(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        after: &mut KeyRecord,
        grace: i64,
        now: Time,
    ) -> Result<Option<Time>, Error> {
        unschedule(tx, Kind::Promote, key.record.staged_promote_at, key.id, 0);
        after.primary_version = key.record.staged_version;
        after.staged_version = 0;
        after.staged_promote_at = 0;
        after.staged_grace_seconds = 0;
        let until = self.deprecate(tx, key, key.record.primary_version, grace, now).await?;
        self.reschedule_rotation(tx, key, after, now)?;
        Ok(until)
    }

    /// Gives the version that is replaced its end, if it has one.
    async fn deprecate(
        &self,
        tx: &mut Tx<'_>,
        key: &Key,
        number: u32,
        grace: i64,
        now: Time,
    ) -> Result<Option<Time>, Error> {
        if grace <= 0 {
            return Ok(None);
        }
        let version = Version::new(number).ok_or(Error::State(Reason::VersionNotFound))?;
        let mut record: VersionRecord = self.version_in(tx, key.id, version).await?;
        let until = now.plus_seconds(grace);
        unschedule(tx, Kind::EndGrace, record.grace_until, key.id, number);
        record.grace_until = until.micros();
        tx.put(&version_row(key.id, version), &record)?;
        schedule(tx, Kind::EndGrace, until, key.id, number)?;
        Ok(Some(until))
    }
}
