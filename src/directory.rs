//! The clients and roles of the node, and what is remembered of them between requests.
//!
//! Everything that decides whether a caller is still who it was (clients, identities, roles, token
//! families, revoked tokens, signing keys) is read here, through [`SecurityCaches`], which the vault
//! tells of every change before the change is acknowledged.

mod admins;
mod caches;
mod client;
mod clients;
mod logins;
mod notice;
mod roles;
#[cfg(test)]
mod tests;
mod watermark;

use std::ops::Bound;
use std::sync::Arc;

use polykey_proto::polykey::record::v1::{
    AuditEvent, ClientRecord, IdentityRecord, RevokedTokenRecord, RoleRecord, SigningKeyRecord,
    TokenFamilyRecord,
};
use polykey_storage::{Direction, Revision, all};
use zeroize::Zeroize;

use crate::authn::certificate::CertificateIdentity;
use crate::authn::token::KeySet;
use crate::authz::{PermissionSet, PrincipalFacts, built_in};
use crate::cache::{Cache, Counts};
use crate::error::Error;
use crate::keyring::Remember;
use crate::time::Time;
use crate::vault::tree::Hash;
use crate::vault::{Tx, Vault};

pub use caches::SecurityCaches;
pub use client::{
    ApiKeyInfo, Client, ClientState, MAX_IDENTITIES, MAX_PERMISSIONS, MAX_ROLES, is_client_id,
};
pub use clients::{Changed, ClientFilter, ClientUpdate, NewClient, RotatedApiKey};
pub use logins::Logins;
pub use roles::{MAX_ROLES_DEFINED, Role, is_role_name};
pub use watermark::Watermark;

/// How often a change is tried again when another one came first.
const ATTEMPTS: usize = 8;
/// Rows read at once in a walk over a space.
const WALK: usize = 512;

/// What goes with every change.
#[derive(Clone, Debug)]
pub struct Change {
    /// Becomes durable with the change, or not at all.
    pub event: AuditEvent,
    /// When it was asked for.
    pub now: Time,
    /// The revision the record is believed to have; `None` = whatever it is.
    pub expected: Option<u64>,
    /// What is written down with the change for whoever repeats the request.
    pub remember: Option<Remember>,
}

impl Change {
    /// Adds to a transaction what goes with the change.
    async fn accompany(&self, tx: &mut Tx<'_>) -> Result<(), Error> {
        if let Some(remember) = &self.remember {
            remember.write(tx).await?;
        }
        tx.event(self.event.clone());
        Ok(())
    }
}

/// A family of tokens as far as requests need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Family {
    pub(crate) revoked: bool,
}

/// Clients and roles.
pub struct Directory {
    vault: Arc<Vault>,
    caches: Arc<SecurityCaches>,
    watermark: Watermark,
}

impl Directory {
    /// Over a vault that was given the same `caches`.
    #[must_use]
    pub fn new(vault: Arc<Vault>, caches: Arc<SecurityCaches>) -> Self {
        let watermark = Watermark::new(vault.clock(), vault.last_time());
        Self { vault, caches, watermark }
    }

    /// The vault underneath.
    #[must_use]
    pub fn vault(&self) -> &Arc<Vault> {
        &self.vault
    }

    /// How well what it remembers does, by name.
    #[must_use]
    pub fn cache_counts(&self) -> [(&'static str, Counts); 4] {
        self.caches.counts()
    }

    /// The security epoch: it differs from a remembered one if anything has changed since that a
    /// caller's identity or authority hangs on.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.caches.epoch()
    }

    /// The time by which tokens are judged at `now`: it never runs backwards.
    #[must_use]
    pub fn time(&self, now: Time) -> Time {
        self.watermark.at(now.max(self.vault.last_time()))
    }

    /// Row key of a client.
    #[must_use]
    pub(crate) fn client_row(&self, client_id: &str) -> Hash {
        self.vault.row_name("client", client_id)
    }

    pub(crate) fn identity_row(&self, identity: &CertificateIdentity) -> Hash {
        self.vault.row_name("identity", &identity.to_string())
    }

    fn role_row(&self, name: &str) -> Hash {
        self.vault.row_name("role", name)
    }

    /// A client, removed ones included.
    ///
    /// # Errors
    /// As [`Vault::get`].
    pub async fn client(&self, client_id: &str) -> Result<Option<Arc<Client>>, Error> {
        self.client_at(&self.client_row(client_id)).await
    }

    pub(crate) async fn client_at(&self, row: &Hash) -> Result<Option<Arc<Client>>, Error> {
        remembered(&self.caches.clients, row, async {
            let loaded = self.vault.get::<ClientRecord>(row).await?;
            loaded.map(|l| Client::from_record(&l.record, l.revision).map(Arc::new)).transpose()
        })
        .await
    }

    /// The client that a certificate identity belongs to.
    ///
    /// # Errors
    /// As [`Vault::get`].
    pub async fn owner(&self, identity: &CertificateIdentity) -> Result<Option<String>, Error> {
        let row = self.identity_row(identity);
        Ok(self.vault.get::<IdentityRecord>(&row).await?.map(|l| l.record.client_id))
    }

    /// A role, built in or defined.
    ///
    /// # Errors
    /// As [`Vault::get`].
    pub async fn role(&self, name: &str) -> Result<Option<Arc<Role>>, Error> {
        if let Some(role) = built_in(name) {
            return Ok(Some(Arc::new(Role::built_in(role))));
        }
        let row = self.role_row(name);
        remembered(&self.caches.roles, &row, async {
            let loaded = self.vault.get::<RoleRecord>(&row).await?;
            loaded.map(|l| Role::from_record(&l.record, l.revision).map(Arc::new)).transpose()
        })
        .await
    }

    /// What a client may do: its own permissions and those of its roles.
    ///
    /// # Errors
    /// As [`Vault::get`]; [`Error::DataLoss`] if a role of the client is missing.
    pub async fn permissions(&self, client: &Client) -> Result<PermissionSet, Error> {
        let mut set = client.own_permissions;
        for name in &client.roles {
            if let Some(role) = built_in(name) {
                set = set.union(role.permissions);
                continue;
            }
            let role = self.role(name).await?;
            let role = role.ok_or_else(|| Error::data_loss("a role of a client is missing"))?;
            set = set.union(role.set);
        }
        Ok(set)
    }

    /// A client as decisions see it.
    ///
    /// # Errors
    /// As [`Self::permissions`].
    pub async fn facts(&self, client: &Client) -> Result<PrincipalFacts, Error> {
        Ok(PrincipalFacts {
            client: client.id.as_str().into(),
            revision: client.revision,
            roles: client.roles.clone(),
            permissions: self.permissions(client).await?,
            tier: client.tier_name().to_owned(),
            environment: client.environment.clone(),
        })
    }

    pub(crate) async fn token_revoked(&self, token_id: &[u8; 16]) -> Result<bool, Error> {
        remembered(&self.caches.revoked, token_id, async {
            Ok(self.vault.get::<RevokedTokenRecord>(token_id).await?.is_some())
        })
        .await
    }

    pub(crate) async fn family(&self, id: &[u8; 16]) -> Result<Option<Family>, Error> {
        remembered(&self.caches.families, id, async {
            let loaded = self.vault.get::<TokenFamilyRecord>(id).await?;
            Ok(loaded.map(|l| Family { revoked: l.record.revoked }))
        })
        .await
    }

    /// The keys that sign and verify tokens.
    ///
    /// # Errors
    /// As [`Vault::get`].
    pub async fn token_keys(&self) -> Result<Arc<KeySet>, Error> {
        remembered(&self.caches.keys, &(), async {
            let mut records = Vec::new();
            self.walk::<SigningKeyRecord>(|_, loaded| {
                records.push(loaded.record);
                Ok(())
            })
            .await?;
            let keys = KeySet::from_records(&records).map(Arc::new);
            records.into_iter().for_each(forget);
            keys
        })
        .await
    }

    /// Walks over every record of a space in pages. One that does not open is left out, and noted by the
    /// vault: what hangs on it is refused, and the others are none the worse for it.
    async fn walk<R: crate::vault::space::Record>(
        &self,
        mut each: impl FnMut(&[u8], crate::vault::Loaded<R>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut from = all();
        loop {
            let page = self.vault.scan_each::<R>(from, Direction::Forward, WALK).await?;
            let full = page.len() == WALK;
            let mut last = Vec::new();
            for (key, loaded) in page {
                match loaded {
                    Ok(loaded) => each(&key, loaded)?,
                    // Of a root that is being opened: whoever asks again finds it.
                    Err(error @ Error::Unavailable { .. }) => return Err(error),
                    Err(_) => {}
                }
                last = key;
            }
            if !full {
                return Ok(());
            }
            from = (Bound::Excluded(last), Bound::Unbounded);
        }
    }

    /// Deletes what has had no meaning since `now`: families and revocations of tokens that have all
    /// expired. Returns how many rows went; call again while it is `limit`.
    ///
    /// # Errors
    /// As [`crate::vault::Tx::commit`]; [`Error::Conflict`] is harmless, the next sweep goes on.
    pub async fn sweep(&self, now: Time, limit: usize) -> Result<usize, Error> {
        let families = self.over::<TokenFamilyRecord>(limit, |r| r.expires_at <= now.micros());
        let families = families.await?;
        let rest = limit.saturating_sub(families.len());
        let revoked = self.over::<RevokedTokenRecord>(rest, |r| r.expires_at <= now.micros());
        let revoked = revoked.await?;
        let swept = families.len() + revoked.len();
        if swept > 0 {
            let mut tx = self.vault.begin().await?;
            for (key, revision) in &families {
                tx.pin_at::<TokenFamilyRecord>(key, *revision);
                tx.delete::<TokenFamilyRecord>(key);
            }
            for (key, revision) in &revoked {
                tx.pin_at::<RevokedTokenRecord>(key, *revision);
                tx.delete::<RevokedTokenRecord>(key);
            }
            tx.commit().await?;
        }
        Ok(swept)
    }

    /// At most `limit` rows of a space that are over, at the revisions at which they were.
    async fn over<R: crate::vault::space::Record>(
        &self,
        limit: usize,
        is_over: impl Fn(&R) -> bool,
    ) -> Result<Vec<(Vec<u8>, Revision)>, Error> {
        let mut rows = Vec::new();
        self.walk::<R>(|key, loaded| {
            if rows.len() < limit && is_over(&loaded.record) {
                rows.push((key.to_vec(), loaded.revision));
            }
            Ok(())
        })
        .await?;
        Ok(rows)
    }
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("caches", &self.caches).finish_non_exhaustive()
    }
}

/// Erases the secret of a record that has been read.
fn forget(mut record: SigningKeyRecord) {
    if let Ok(mut secret) = std::mem::take(&mut record.secret).try_into_mut() {
        secret.as_mut().zeroize();
    }
}

/// From the cache, or loaded and remembered unless the row changes meanwhile.
async fn remembered<K, V>(
    cache: &Cache<K, V>,
    key: &K,
    load: impl Future<Output = Result<V, Error>>,
) -> Result<V, Error>
where
    K: std::hash::Hash + Eq + Clone,
    V: Clone,
{
    if let Some(value) = cache.get(key) {
        return Ok(value);
    }
    let ticket = cache.ticket(key);
    let value = load.await?;
    cache.insert(ticket, key.clone(), value.clone());
    Ok(value)
}

/// Tries `$attempt` again while another change came first, unless the caller named a revision.
macro_rules! retried {
    ($change:expr, $attempt:expr) => {{
        let mut left = $crate::directory::ATTEMPTS;
        loop {
            left -= 1;
            match $attempt.await {
                Err($crate::error::Error::Conflict) if $change.expected.is_none() && left > 0 => {}
                other => break other,
            }
        }
    }};
}
pub(crate) use retried;
