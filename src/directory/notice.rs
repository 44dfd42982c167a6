//! Notices that an API key is about to expire, or has.

use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::client_record::{ApiKey, State};
use polykey_proto::polykey::record::v1::{AuditEvent, ClientRecord, JobRecord, job_record::Kind};

use super::Directory;
use crate::error::Error;
use crate::jobs;
use crate::time::Time;
use crate::vault::Tx;
use crate::webhook::{API_KEY_EXPIRED, API_KEY_EXPIRES};

impl Directory {
    fn notice(&self, client: &str, key: &ApiKey, now: Time) -> Option<JobRecord> {
        let (due, days) = jobs::next_notice(key.expires_at, now)?;
        // No character of a client id or prefix is a line feed.
        let name = self.vault.row_name("api-key-notice", &format!("{client}\n{}", key.prefix));
        let mut job = JobRecord {
            due: due.micros(),
            key_id: name.iter().take(16).copied().collect::<Vec<u8>>().into(),
            version: days,
            client_id: client.to_owned(),
            api_key: key.prefix.clone(),
            ..JobRecord::default()
        };
        job.set_kind(Kind::NotifyExpiry);
        Some(job)
    }

    /// Brings the schedule up to date with the API keys that a client has now.
    pub(super) fn arm_notices(
        &self,
        tx: &mut Tx<'_>,
        before: &[ApiKey],
        after: &ClientRecord,
        now: Time,
    ) -> Result<(), Error> {
        let id = &after.client_id;
        let same = |key: &ApiKey, other: &ApiKey| {
            key.prefix == other.prefix && key.expires_at == other.expires_at
        };
        for key in before.iter().filter(|key| !after.api_keys.iter().any(|other| same(key, other)))
        {
            if let Some(job) = self.notice(id, key, now) {
                jobs::cancel(tx, &job);
            }
        }
        for key in after.api_keys.iter().filter(|key| !before.iter().any(|other| same(key, other)))
        {
            if let Some(job) = self.notice(id, key, now) {
                jobs::schedule(tx, &job)?;
            }
        }
        Ok(())
    }

    /// Tells that an API key expires, if that is still so, and puts the next notice on the schedule.
    ///
    /// # Errors
    /// The schedule tries again later.
    pub async fn notify_expiry(&self, job: &JobRecord, row: &[u8], now: Time) -> Result<(), Error> {
        let mut tx = self.vault.begin().await?;
        if tx.get::<JobRecord>(row).await?.is_none() {
            return Ok(());
        }
        tx.delete::<JobRecord>(row);
        let client_row = self.client_row(&job.client_id);
        let client = tx.get::<ClientRecord>(&client_row).await?.map(|loaded| loaded.record);
        tx.pin::<ClientRecord>(&client_row);
        let client = client.filter(|client| client.state() != State::Removed);
        let key = client.iter().flat_map(|client| &client.api_keys);
        let key = key.into_iter().find(|key| key.prefix == job.api_key);
        if let Some(key) = key
            && let Some(days) = jobs::due_notice(job, key.expires_at, now)
        {
            let mut event = AuditEvent {
                time: now.micros(),
                client_id: "polykey".into(),
                action: if days == 0 { API_KEY_EXPIRED } else { API_KEY_EXPIRES }.into(),
                ..AuditEvent::default()
            };
            event.set_outcome(Outcome::Success);
            event.details.insert("client".into(), job.client_id.clone());
            event.details.insert("api_key".into(), key.prefix.clone());
            let expires_at = Time::from_micros(key.expires_at).to_string();
            event.details.insert("expires_at".into(), expires_at);
            if days > 0 {
                event.details.insert("days".into(), days.to_string());
            }
            tx.event(event);
            if let Some(next) = self.notice(&job.client_id, key, now) {
                jobs::schedule(&mut tx, &next)?;
            }
        }
        tx.commit().await.map(drop)
    }
}
