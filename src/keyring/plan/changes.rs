//! What a change makes of a key's record, and of the schedule beside it.

use polykey_proto::polykey::record::v1::{
    AuditEvent, KeyRecord, job_record::Kind, key_record::State,
};

use crate::authz::Authorized;
use crate::command::{Expiry, RevokeKey, ScheduleDestruction, UpdateKey};
use crate::error::Error;
use crate::key::{self, KeyId};
use crate::keyring::rotate::rotates_itself;
use crate::keyring::rows::{schedule, unschedule};
use crate::keyring::{Key, notice};
use crate::time::Time;
use crate::vault::Tx;
use crate::webhook::{EFFECTIVE_AT, NOTIFIES};

/// When a key rotates next: a period after its newest version was due, spread by up to a
/// twentieth of the period so that keys made together do not rotate together.
pub(in crate::keyring) fn next_rotation(id: KeyId, record: &KeyRecord, now: Time) -> Time {
    let period = record.rotation_period_seconds;
    let [.., a, b] = id.bytes();
    let spread = period / 20 * i64::from(u16::from_be_bytes([a, b])) / 65_536;
    now.plus_seconds(period - spread)
}

/// Puts the promotion of a staged version back on the schedule: its time may have come while the
/// key could not be used, and then it is due at once.
pub(super) fn resume_promotion(tx: &mut Tx<'_>, after: &KeyRecord, id: KeyId) -> Result<(), Error> {
    match Time::optional(after.staged_promote_at) {
        Some(at) if after.staged_version != 0 => schedule(tx, Kind::Promote, at, id, 0),
        _ => Ok(()),
    }
}

pub(super) fn expect(key: &Key, revision: Option<u64>) -> Result<(), Error> {
    match revision {
        Some(expected) if expected != key.record.revision => Err(Error::Conflict),
        _ => Ok(()),
    }
}

pub(super) fn revoke(
    tx: &mut Tx<'_>,
    key: &Key,
    permit: &Authorized<&RevokeKey>,
    now: Time,
) -> Result<KeyRecord, Error> {
    let RevokeKey { reason, at, notify, .. } = permit.command();
    let mut after = key.record.clone();
    unschedule(tx, Kind::Revoke, key.record.revoke_at, key.id, 0);
    let at = at.unwrap_or(now);
    key::revoke(&mut after, at, reason, now).map_err(Error::State)?;
    // Who has asked for it once is not to be left out because of somebody who was faster.
    after.revocation_notifies |= notify;
    if after.state() == State::Revoked {
        unschedule(tx, Kind::Rotate, key.record.next_rotation_at, key.id, 0);
        unschedule(tx, Kind::Promote, key.record.staged_promote_at, key.id, 0);
    } else {
        schedule(tx, Kind::Revoke, at, key.id, 0)?;
    }
    Ok(after)
}

/// What the event of a revocation tells: when it takes effect, if not at once, and to the systems that are told
/// the reason.
pub(in crate::keyring) fn revocation_details(event: &mut AuditEvent, after: &KeyRecord) {
    if after.state() != State::Revoked
        && let Some(at) = Time::optional(after.revoke_at)
    {
        event.details.insert(EFFECTIVE_AT.into(), at.to_string());
    }
    if after.revocation_notifies {
        event.details.insert(NOTIFIES.into(), "yes".into());
        let reason = crate::audit::event::bounded(&after.revocation_reason).into_owned();
        event.details.insert("reason".into(), reason);
    }
}

pub(super) fn destroy(
    tx: &mut Tx<'_>,
    key: &Key,
    permit: &Authorized<&ScheduleDestruction>,
    now: Time,
) -> Result<KeyRecord, Error> {
    let mut after = key.record.clone();
    key::schedule_destruction(&mut after, permit.command().days, now).map_err(Error::State)?;
    unschedule(tx, Kind::Rotate, key.record.next_rotation_at, key.id, 0);
    schedule(tx, Kind::Destroy, Time::from_micros(after.destroy_at), key.id, 0)?;
    Ok(after)
}

pub(super) fn update(
    tx: &mut Tx<'_>,
    key: &Key,
    command: &UpdateKey,
    now: Time,
) -> Result<KeyRecord, Error> {
    key::may_change(&key.record, now).map_err(Error::State)?;
    let UpdateKey {
        key: _,
        description,
        tags_set,
        tags_removed,
        contexts_added,
        contexts_removed,
        policies_set,
        policies_removed,
        expires_at,
        classification,
        rotation_period,
        expected: _,
    } = command;
    let mut after = key.record.clone();
    if let Some(description) = description {
        after.description.clone_from(description);
    }
    for name in tags_removed {
        after.tags.remove(name);
    }
    after.tags.extend(tags_set.clone());
    after.authorized_contexts.retain(|c| !contexts_removed.contains(c));
    for context in contexts_added {
        if !after.authorized_contexts.contains(context) {
            after.authorized_contexts.push(context.clone());
        }
    }
    for name in policies_removed {
        after.access_policies.remove(name);
    }
    after.access_policies.extend(policies_set.clone());
    match expires_at {
        Some(Expiry::At(at)) => after.expires_at = at.micros(),
        Some(Expiry::Never) => after.expires_at = 0,
        None => {}
    }
    if after.expires_at != key.record.expires_at {
        notice::disarm(tx, &key.record, key.id, now);
        notice::arm(tx, &after, key.id, now)?;
    }
    if let Some(classification) = classification {
        after.data_classification.clone_from(classification);
    }
    if expires_at.is_some() && after.state() == State::Enabled {
        // What came due while the key was expired was left out.
        resume_promotion(tx, &after, key.id)?;
        if after.rotation_period_seconds > 0 && after.next_rotation_at == 0 {
            let due = next_rotation(key.id, &after, now);
            after.next_rotation_at = due.micros();
            schedule(tx, Kind::Rotate, due, key.id, 0)?;
        }
    }
    if let Some(period) = rotation_period {
        if *period > 0 {
            rotates_itself(&after, "rotation_period_seconds")?;
        }
        after.rotation_period_seconds = *period;
        unschedule(tx, Kind::Rotate, after.next_rotation_at, key.id, 0);
        unschedule(tx, Kind::Rotate, key.record.next_rotation_at, key.id, 0);
        after.next_rotation_at = 0;
        if *period > 0 && after.state() == State::Enabled {
            let due = next_rotation(key.id, &after, now);
            after.next_rotation_at = due.micros();
            schedule(tx, Kind::Rotate, due, key.id, 0)?;
        }
    }
    // The limits hold for the result, not for the request alone.
    let mut v = crate::limits::Violations::new();
    crate::limits::tags(&mut v, "tags_to_add", &after.tags);
    crate::limits::contexts(&mut v, "contexts_to_add", &after.authorized_contexts);
    v.finish()?;
    Ok(after)
}
