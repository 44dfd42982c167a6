//! Notices that a key is about to expire: 30, 7 and 1 days before, and when it has. One job at a time stands on
//! the schedule for a key, each puts the next there, and a changed expiry takes its place.

use std::ops::Bound;

use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::{
    AuditEvent, JobRecord, KeyRecord, NoticesRecord, job_record::Kind, key_record::State,
};
use polykey_storage::Direction;

use super::rows::{schedule, unschedule};
use super::{Key, Keyring};
use crate::error::Error;
use crate::jobs;
use crate::key::KeyId;
use crate::time::Time;
use crate::vault::Tx;
use crate::vault::space::meta;
use crate::webhook::{KEY_EXPIRED, KEY_EXPIRES};

/// Keys that one step of [`Keyring::arm_notices`] looks at.
const STEP: usize = 256;

/// Puts the first notice that is still to come on the schedule, if there is one.
pub(super) fn arm(tx: &mut Tx<'_>, record: &KeyRecord, id: KeyId, now: Time) -> Result<(), Error> {
    match jobs::next_notice(record.expires_at, now) {
        Some((at, days)) => schedule(tx, Kind::NotifyExpiry, at, id, days),
        None => Ok(()),
    }
}

/// Takes it off again.
pub(super) fn disarm(tx: &mut Tx<'_>, record: &KeyRecord, id: KeyId, now: Time) {
    if let Some((at, days)) = jobs::next_notice(record.expires_at, now) {
        unschedule(tx, Kind::NotifyExpiry, at.micros(), id, days);
    }
}

impl Keyring {
    /// Tells that a key expires, if that is still so. Of several notices that have come due only the
    /// last is given.
    pub(super) fn due_notice(
        tx: &mut Tx<'_>,
        key: &Key,
        job: &JobRecord,
        now: Time,
    ) -> Result<(), Error> {
        let Some(days) = jobs::due_notice(job, key.record.expires_at, now) else { return Ok(()) };
        // What is told is so at the commit.
        tx.pin::<KeyRecord>(&key.id.bytes());
        // What is revoked or destroyed ends no more.
        if matches!(key.record.state(), State::Enabled | State::Disabled) {
            let expires_at = Time::from_micros(key.record.expires_at);
            let mut event = AuditEvent {
                time: now.micros(),
                client_id: "polykey".into(),
                action: if days == 0 { KEY_EXPIRED } else { KEY_EXPIRES }.into(),
                key_id: key.id.bytes().to_vec().into(),
                ..AuditEvent::default()
            };
            event.set_outcome(Outcome::Success);
            event.details.insert("expires_at".into(), expires_at.to_string());
            if days > 0 {
                event.details.insert("days".into(), days.to_string());
            }
            tx.event(event);
        }
        arm(tx, &key.record, key.id, now)
    }

    /// Puts notices on the schedule for some of the keys that were made before there were any. Whether
    /// more are left.
    ///
    /// # Errors
    /// [`Error::Conflict`] if a key changed meanwhile: called again, it goes on there.
    pub async fn arm_notices(&self, now: Time) -> Result<bool, Error> {
        let mut tx = self.vault.begin().await?;
        let done = tx.get::<NoticesRecord>(meta::NOTICES).await?;
        let mut done = done.map(|loaded| loaded.record).unwrap_or_default();
        if done.done {
            return Ok(false);
        }
        let from = match done.cursor.is_empty() {
            true => Bound::Unbounded,
            false => Bound::Excluded(done.cursor.to_vec()),
        };
        let range = (from, Bound::Unbounded);
        let rows = self.vault.scan_each::<KeyRecord>(range, Direction::Forward, STEP).await?;
        done.done = rows.len() < STEP;
        for (row, loaded) in rows {
            // A damaged one is told elsewhere.
            if let (Ok(loaded), Some(id)) = (loaded, KeyId::from_slice(&row))
                && jobs::next_notice(loaded.record.expires_at, now).is_some()
            {
                tx.pin_at::<KeyRecord>(&row, loaded.revision);
                arm(&mut tx, &loaded.record, id, now)?;
            }
            done.cursor = row.into();
        }
        let more = !done.done;
        tx.put(meta::NOTICES, &done)?;
        tx.commit().await?;
        Ok(more)
    }
}
