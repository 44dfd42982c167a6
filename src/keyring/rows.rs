//! The rows that go with a key: list rows, aliases, jobs.

use std::collections::BTreeSet;

use polykey_hsm::MacPurpose;
use polykey_proto::polykey::record::v1::{
    AliasRecord, JobRecord, KeyRecord, ListRow, job_record, key_record::State,
};

use crate::error::{Error, Reason};
use crate::jobs;
use crate::key::KeyId;
use crate::time::Time;
use crate::vault::{Tx, Vault};

/// The pseudo-principal under which every key is listed, for callers that see all keys. No client
/// id begins with `*`.
pub(super) const EVERYONE: &str = "*";

/// The first part of a principal's list rows, 16 bytes.
pub(super) fn list_prefix(vault: &Vault, principal: &str) -> [u8; 16] {
    let mac = vault.ring().mac(MacPurpose::Principal, &[principal.as_bytes()]);
    let mut prefix = [0; 16];
    prefix.copy_from_slice(mac.first_chunk::<16>().unwrap_or(&[0; 16]));
    prefix
}

fn list_row(vault: &Vault, principal: &str, id: KeyId) -> Vec<u8> {
    let mut row = list_prefix(vault, principal).to_vec();
    row.extend_from_slice(&id.bytes());
    row
}

/// The short form of a tag in list rows: filters compare these.
fn tag_hash(vault: &Vault, key: &str, value: &str) -> u64 {
    let mac = vault.ring().mac(MacPurpose::RowName, &[b"tag", key.as_bytes(), value.as_bytes()]);
    u64::from_be_bytes(*mac.first_chunk::<8>().unwrap_or(&[0; 8]))
}

/// What a list row holds of a tag: one hash for the tag with its value, one for its name with any.
pub(super) fn tag_hashes(vault: &Vault, key: &str, value: &str) -> [u64; 2] {
    let mac = vault.ring().mac(MacPurpose::RowName, &[b"tag-name", key.as_bytes()]);
    let name = u64::from_be_bytes(*mac.first_chunk::<8>().unwrap_or(&[0; 8]));
    [tag_hash(vault, key, value), name]
}

fn grantees(record: &KeyRecord) -> BTreeSet<&str> {
    let contexts = record.authorized_contexts.iter().map(String::as_str);
    contexts.chain([EVERYONE, record.creator.as_str()]).collect()
}

/// Writes the list rows of a key as it is now, and removes those of who no longer sees it. Only if
/// something that lists show has changed.
pub(super) fn write_list_rows(
    tx: &mut Tx<'_>,
    before: Option<&KeyRecord>,
    after: &KeyRecord,
    id: KeyId,
) -> Result<(), Error> {
    let vault = tx.vault();
    let row = narrow(vault, after);
    let old: BTreeSet<&str> = before.map(grantees).unwrap_or_default();
    let new = grantees(after);
    let enabled = |record: &KeyRecord| i64::from(record.state() == State::Enabled);
    tx.count_enabled(enabled(after) - before.map_or(0, enabled));
    let changed = before.is_none_or(|b| narrow(vault, b) != row);
    for principal in &new {
        if changed || !old.contains(principal) {
            tx.set(&list_row(vault, principal, id), &row)?;
        }
    }
    for principal in old.difference(&new) {
        tx.delete::<ListRow>(&list_row(vault, principal, id));
    }
    Ok(())
}

fn narrow(vault: &Vault, record: &KeyRecord) -> ListRow {
    ListRow {
        algorithm: record.algorithm,
        state: record.state,
        created_at: record.created_at,
        tags: record.tags.iter().flat_map(|(k, v)| tag_hashes(vault, k, v)).collect(),
        rotating: record.staged_version != 0,
        expires_at: record.expires_at,
        revoke_at: record.revoke_at,
        read_after_expiry: record.read_after_expiry,
    }
}

/// Makes a free name point at a key.
pub(super) async fn claim_alias(
    tx: &mut Tx<'_>,
    alias: &str,
    id: KeyId,
    now: Time,
) -> Result<(), Error> {
    let row = tx.vault().row_name("alias", alias);
    if tx.get::<AliasRecord>(&row).await?.is_some() {
        return Err(Error::State(Reason::AlreadyExists));
    }
    let record = AliasRecord {
        name: alias.to_owned(),
        key_id: id.bytes().to_vec().into(),
        created_at: now.micros(),
    };
    tx.insert(&row, &record)
}

/// Frees a name.
pub(super) async fn release_alias(tx: &mut Tx<'_>, alias: &str) -> Result<(), Error> {
    let row = tx.vault().row_name("alias", alias);
    tx.get::<AliasRecord>(&row).await?;
    tx.delete::<AliasRecord>(&row);
    Ok(())
}

fn job(kind: job_record::Kind, due: Time, id: KeyId, version: u32) -> JobRecord {
    JobRecord {
        kind: kind.into(),
        due: due.micros(),
        key_id: id.bytes().to_vec().into(),
        version,
        ..JobRecord::default()
    }
}

/// Puts something into the schedule.
pub(super) fn schedule(
    tx: &mut Tx<'_>,
    kind: job_record::Kind,
    due: Time,
    id: KeyId,
    version: u32,
) -> Result<(), Error> {
    jobs::schedule(tx, &job(kind, due, id, version))
}

/// Takes something out of the schedule; `due` in microseconds, 0 = it was not in it.
pub(super) fn unschedule(
    tx: &mut Tx<'_>,
    kind: job_record::Kind,
    due: i64,
    id: KeyId,
    version: u32,
) {
    if let Some(due) = Time::optional(due) {
        jobs::cancel(tx, &job(kind, due, id, version));
    }
}
