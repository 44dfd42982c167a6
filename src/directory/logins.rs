//! When clients last logged in: rows of their own beside the use of keys, outside the client's record
//! and its revision, written blindly in the transaction of the login.

use polykey_proto::polykey::record::v1::UsageRecord;

use super::{Client, Directory};
use crate::error::Error;
use crate::time::Time;
use crate::vault::Tx;
use crate::vault::tree::Hash;

/// When a client last logged in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Logins {
    /// By whatever grant.
    pub last: Option<Time>,
    /// With each of its API keys, in the order of [`Client::api_keys`].
    pub by_api_key: Vec<Option<Time>>,
}

impl Directory {
    fn login_row(&self, client_id: &str) -> Hash {
        self.vault.row_name("login", client_id)
    }

    fn api_key_row(&self, client_id: &str, prefix: &str) -> Hash {
        // A client id has no blank.
        self.vault.row_name("login-key", &format!("{client_id} {prefix}"))
    }

    /// Notes a login, with the prefix of the API key if it was by one.
    pub(crate) fn note_login(
        &self,
        tx: &mut Tx<'_>,
        client_id: &str,
        api_key: Option<&str>,
        now: Time,
    ) -> Result<(), Error> {
        let record = UsageRecord { last_accessed_at: now.micros(), ..UsageRecord::default() };
        tx.set(&self.login_row(client_id), &record)?;
        if let Some(prefix) = api_key {
            tx.set(&self.api_key_row(client_id, prefix), &record)?;
        }
        Ok(())
    }

    /// Forgets when an API key that is no more was used.
    pub(super) fn forget_api_key(&self, tx: &mut Tx<'_>, client_id: &str, prefix: &str) {
        tx.delete::<UsageRecord>(&self.api_key_row(client_id, prefix));
    }

    /// When a client last logged in. What is damaged is as if it had never been: it is noted, and
    /// nothing is decided by it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn logins(&self, client: &Client) -> Result<Logins, Error> {
        let last = self.last(&self.login_row(&client.id)).await?;
        let mut by_api_key = Vec::with_capacity(client.api_keys.len());
        for key in &client.api_keys {
            by_api_key.push(self.last(&self.api_key_row(&client.id, &key.prefix)).await?);
        }
        Ok(Logins { last, by_api_key })
    }

    async fn last(&self, row: &Hash) -> Result<Option<Time>, Error> {
        match self.vault.get::<UsageRecord>(row).await {
            Ok(found) => Ok(found.and_then(|f| Time::optional(f.record.last_accessed_at))),
            Err(Error::DataLoss { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
