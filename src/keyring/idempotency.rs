//! Requests that are repeated because their answer was lost: the first result is given again.

use polykey_hsm::MacPurpose;
use polykey_proto::polykey::record::v1::IdempotencyRecord;
use subtle::ConstantTimeEq;

use super::plan::Done;
use super::{KeyVersion, Keyring};
use crate::authz::Command;
use crate::command::{Mutation, part};
use crate::context::Context;
use crate::error::Error;
use crate::key::{self, KeyId, KeyName, Version, version_row};
use crate::time::Time;
use crate::vault::{Tx, Vault};
use std::sync::Arc;

const DAY: i64 = 86_400;

/// The key that a caller gave a request, with what it identifies.
#[derive(Clone, Debug)]
pub struct Idempotency {
    /// As the caller wrote it: 1 to 128 printable characters.
    pub key: String,
    /// The full method, so that one key does not answer another method.
    pub method: &'static str,
    /// The item of a batch or stream.
    pub item: u32,
    /// The encoded request (or item), without what identifies only the call.
    pub request: bytes::Bytes,
}

/// What is written down of a request in the transaction of its change.
#[derive(Clone, Debug)]
pub struct Remember {
    rows: [Vec<u8>; 3],
    record: IdempotencyRecord,
}

impl Remember {
    /// Writes it, unless the same key was used within a day: of two such transactions at once only
    /// one is committed, on whichever days they began.
    ///
    /// # Errors
    /// [`Error::Conflict`] if it was.
    pub(crate) async fn write(&self, tx: &mut Tx<'_>) -> Result<(), Error> {
        let now = Time::from_micros(self.record.created_at);
        for row in &self.rows {
            if let Some(found) = tx.get::<IdempotencyRecord>(row).await?
                && counts(&found.record, now)
            {
                return Err(Error::Conflict);
            }
            tx.pin::<IdempotencyRecord>(row);
        }
        let [today, ..] = &self.rows;
        tx.put(today, &self.record)
    }
}

/// Whether a record still answers for its request.
fn counts(record: &IdempotencyRecord, now: Time) -> bool {
    Time::from_micros(record.created_at).plus_seconds(DAY) > now
}

fn row(vault: &Vault, cx: &Context, key: &Idempotency, day: i64) -> Vec<u8> {
    let mac = vault.ring().mac(
        MacPurpose::Idempotency,
        &[b"row", cx.caller.client_id().as_bytes(), key.key.as_bytes(), &key.item.to_be_bytes()],
    );
    let mut row = u32::try_from(day).unwrap_or(0).to_be_bytes().to_vec();
    row.extend_from_slice(&mac);
    row
}

/// The rows of the days under which a record that is less than a day old may stand, that of the
/// present one first. A request that takes long is written under the day on which it began, which may
/// be the one before or (seen from that request) after that of its repetition.
fn rows(vault: &Vault, cx: &Context, key: &Idempotency) -> [Vec<u8>; 3] {
    let today = cx.now.seconds() / DAY;
    [today, today - 1, today + 1].map(|day| row(vault, cx, key, day))
}

fn request_mac(vault: &Vault, key: &Idempotency) -> [u8; 32] {
    vault.ring().mac(MacPurpose::Idempotency, &[b"request", key.method.as_bytes(), &key.request])
}

impl Idempotency {
    /// The row, and what it is to hold, of a request that changes no key; `text` names what it
    /// changed.
    pub(crate) fn noted(&self, vault: &Vault, cx: &Context, text: &str) -> Remember {
        let record = IdempotencyRecord {
            request: request_mac(vault, self).to_vec().into(),
            method: self.method.to_owned(),
            created_at: cx.now.micros(),
            text: text.to_owned(),
            ..IdempotencyRecord::default()
        };
        Remember { rows: rows(vault, cx, self), record }
    }

    /// What became of an earlier request with the same key, if there was one in the last 24 hours.
    ///
    /// # Errors
    /// [`Error::Invalid`] if that was a different request.
    pub(crate) async fn recorded(
        &self,
        vault: &Vault,
        cx: &Context,
    ) -> Result<Option<IdempotencyRecord>, Error> {
        for row in rows(vault, cx, self) {
            let Some(found) = vault.get::<IdempotencyRecord>(&row).await? else { continue };
            let record = found.record;
            if !counts(&record, cx.now) {
                continue;
            }
            if !bool::from(record.request.as_ref().ct_eq(request_mac(vault, self).as_slice())) {
                return Err(Error::invalid(
                    "idempotency-key",
                    "was used for a different request; use a new one",
                ));
            }
            vault.rewitnessed().await?;
            return Ok(Some(record));
        }
        Ok(None)
    }

    /// Writes down what became of the request, in the transaction of its change.
    pub(super) async fn remember(
        &self,
        tx: &mut Tx<'_>,
        cx: &Context,
        done: &Done,
    ) -> Result<(), Error> {
        let record = IdempotencyRecord {
            request: request_mac(tx.vault(), self).to_vec().into(),
            method: self.method.to_owned(),
            created_at: cx.now.micros(),
            key_id: done.key.id.bytes().to_vec().into(),
            version: done.version.as_ref().map_or(0, |v| v.record.version),
            previous_version: done.previous,
            grace_until: done.grace_until.map_or(0, Time::micros),
            text: done.erased.to_string(),
        };
        Remember { rows: rows(tx.vault(), cx, self), record }.write(tx).await
    }
}

impl Keyring {
    /// The result of an earlier request with the same key, if there is one; authorized again and
    /// rendered from what is stored now.
    pub(super) async fn recall(
        &self,
        cx: &Context,
        mutation: &Mutation,
        key: &Idempotency,
    ) -> Result<Option<Done>, Error> {
        let Some(record) = key.recorded(&self.vault, cx).await? else { return Ok(None) };
        let at = Time::from_micros(record.created_at);
        let id = KeyId::from_slice(&record.key_id)
            .ok_or_else(|| Error::data_loss("an idempotency record without a key"))?;
        let found = self.load(id).await?;
        self.authorize_again(cx, &found, mutation).await?;
        let version = match Version::new(record.version) {
            None => None,
            Some(version) => {
                let row = version_row(id, version);
                let loaded = self.vault.get(&row).await?;
                let loaded: crate::vault::Loaded<
                    polykey_proto::polykey::record::v1::VersionRecord,
                > = loaded.ok_or(Error::State(crate::error::Reason::VersionTrimmed))?;
                // What is revoked by now is not given out again, on this path either.
                let opens = key::may_open(&found.record, cx.now)
                    .and_then(|()| key::version_opens(&found.record, &loaded.record, cx.now));
                let blob = match opens {
                    Err(_) => Vec::new(),
                    Ok(()) => self.blob(&found, &loaded.record)?,
                };
                Some(Arc::new(KeyVersion { record: loaded.record, blob: blob.into() }))
            }
        };
        Ok(Some(Done {
            key: found,
            version,
            previous: record.previous_version,
            grace_until: Time::optional(record.grace_until),
            at,
            leaf: None,
            erased: record.text.parse().unwrap_or(0),
        }))
    }

    /// Whoever may no longer do it does not learn what it came to either.
    async fn authorize_again(
        &self,
        cx: &Context,
        key: &super::Key,
        mutation: &Mutation,
    ) -> Result<(), Error> {
        async fn ask<C: Command>(
            keyring: &Keyring,
            cx: &Context,
            key: &super::Key,
            command: C,
        ) -> Result<(), Error> {
            keyring.authorize(cx, key.resource(), command).await.map(drop)
        }
        let name = KeyName::Id(key.id);
        match mutation {
            // Reading what one has made takes no more than seeing it.
            Mutation::Create(_) => ask(self, cx, key, part::Describe(&name)).await,
            Mutation::Rotate(c) => ask(self, cx, key, c).await,
            Mutation::Revoke(c) => ask(self, cx, key, c).await,
            Mutation::Update(c) if c.shares() && !c.describes() => {
                ask(self, cx, key, part::Share(c)).await
            }
            Mutation::Update(c) => ask(self, cx, key, &**c).await,
            Mutation::Enable(c) => ask(self, cx, key, part::Enable(c)).await,
            Mutation::Disable(c) => ask(self, cx, key, part::Disable(c)).await,
            Mutation::Destroy(c) => ask(self, cx, key, c).await,
            Mutation::CancelDestroy(c) => ask(self, cx, key, part::CancelDestruction(c)).await,
            Mutation::SetAlias(c) => ask(self, cx, key, c).await,
            Mutation::DeleteAlias(c) => ask(self, cx, key, c).await,
            Mutation::SetBounds(c) => ask(self, cx, key, c).await,
            Mutation::Trim(c) => ask(self, cx, key, c).await,
        }
    }

    /// Removes what is older than a day, at most `limit` rows; returns whether there is more.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn sweep_idempotency(&self, now: Time, limit: usize) -> Result<bool, Error> {
        let oldest = u32::try_from(now.seconds() / DAY - 1).unwrap_or(0);
        let range =
            (std::ops::Bound::Unbounded, std::ops::Bound::Excluded(oldest.to_be_bytes().to_vec()));
        let mut tx = self.vault.begin().await?;
        let space = crate::vault::space::IDEMPOTENCY;
        let rows = self.vault.scan_keys(space, range, limit).await?;
        for row in &rows {
            tx.delete::<IdempotencyRecord>(row);
        }
        if !rows.is_empty() {
            tx.commit().await?;
        }
        Ok(rows.len() == limit)
    }
}
