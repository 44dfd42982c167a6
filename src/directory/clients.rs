//! Adding, changing and removing clients.

use std::collections::BTreeMap;
use std::time::Duration;

use polykey_proto::polykey::record::v1::client_record::{ApiKey as StoredKey, State};
use polykey_proto::polykey::record::v1::{ClientRecord, IdentityRecord, RoleRecord};

use super::client::{self, identity_from_record, identity_to_record, normalise};
use super::{Change, Client, ClientState, Directory, admins, retried};
use crate::authn::api_key::ApiKey;
use crate::authn::certificate::CertificateIdentity;
use crate::authz::built_in;
use crate::error::{Error, Reason};
use crate::limits::{Violations, shown};
use crate::time::Time;
use crate::vault::{Receipt, Tx};

/// Longest time that old API keys keep working beside a new one: 30 days.
pub(crate) const MAX_OVERLAP: Duration = Duration::from_secs(30 * 24 * 3600);
/// Most API keys of a client that work at once.
const MAX_API_KEYS: usize = 8;

/// A client to be added.
#[derive(Clone, Debug, Default)]
pub struct NewClient {
    /// Its id: `^[a-zA-Z0-9][a-zA-Z0-9._:@-]{0,127}$`, never used before.
    pub id: String,
    /// Its name for people, ≤ 256 bytes.
    pub name: String,
    /// For people, ≤ 1,024 bytes.
    pub description: String,
    /// The environment it belongs to, ≤ 128 bytes.
    pub environment: String,
    /// common.v2.ClientTier; 0 = FREE.
    pub tier: i32,
    /// Names of its roles, which must exist.
    pub roles: Vec<String>,
    /// Names of permissions besides those of its roles.
    pub permissions: Vec<String>,
    /// What its certificates must have, 1 to 20.
    pub identities: Vec<CertificateIdentity>,
    /// Makes no API key: the client logs in by its certificate alone.
    pub without_api_key: bool,
    /// When the API key stops working.
    pub api_key_expires_at: Option<Time>,
}

/// A change of a client; what is `None` or empty stays.
#[derive(Clone, Debug, Default)]
pub struct ClientUpdate {
    /// The new name.
    pub name: Option<String>,
    /// The new description.
    pub description: Option<String>,
    /// The new environment.
    pub environment: Option<String>,
    /// The new tier.
    pub tier: Option<i32>,
    /// Roles to give.
    pub roles_to_add: Vec<String>,
    /// Roles to take.
    pub roles_to_remove: Vec<String>,
    /// Permissions to give.
    pub permissions_to_add: Vec<String>,
    /// Permissions to take.
    pub permissions_to_remove: Vec<String>,
    /// Identities to accept.
    pub identities_to_add: Vec<CertificateIdentity>,
    /// Identities to accept no more.
    pub identities_to_remove: Vec<CertificateIdentity>,
}

/// Which clients a list shows.
#[derive(Clone, Debug, Default)]
pub struct ClientFilter {
    /// Only those with this role.
    pub role: Option<String>,
    /// Only those in this state; `None` = all that are not removed.
    pub state: Option<ClientState>,
}

/// A client as it is after a change.
#[derive(Clone, Debug)]
pub struct Changed {
    /// The client.
    pub client: Client,
    /// Where the change stands.
    pub receipt: Receipt,
}

/// A new API key and what became of the old ones.
#[derive(Debug)]
pub struct RotatedApiKey {
    /// The key: shown this once.
    pub api_key: ApiKey,
    /// The client with the new key.
    pub changed: Changed,
    /// When the last of the old keys stops working; none if there were none.
    pub old_keys_expire_at: Option<Time>,
}

enum Edit<'a> {
    Update(&'a ClientUpdate),
    Disable,
    Enable,
    Remove,
    RotateApiKey { new: &'a ApiKey, expires_at: Option<Time>, overlap: Duration },
    RevokeTokens { from: Time },
}

pub(super) fn check_expected(change: &Change, revision: u64) -> Result<(), Error> {
    match change.expected {
        Some(expected) if expected != revision => Err(Error::Conflict),
        _ => Ok(()),
    }
}

impl Directory {
    /// Adds a client and its API key.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is malformed or unknown, [`Error::State`] with
    /// [`Reason::AlreadyExists`] if the id was ever used or an identity belongs to another client.
    pub async fn create_client(
        &self,
        new: &NewClient,
        change: &Change,
    ) -> Result<(Changed, Option<ApiKey>), Error> {
        let now = change.now.micros();
        let mut record = ClientRecord {
            client_id: new.id.clone(),
            name: new.name.clone(),
            description: new.description.clone(),
            environment: new.environment.clone(),
            tier: u32::try_from(if new.tier == 0 { 1 } else { new.tier }).unwrap_or(u32::MAX),
            roles: new.roles.clone(),
            permissions: new.permissions.clone(),
            identities: Vec::new(),
            created_at: now,
            updated_at: now,
            created_by: change.event.client_id.clone(),
            ..ClientRecord::default()
        };
        record.set_state(State::Enabled);
        for identity in new.identities.iter().map(identity_to_record) {
            if !record.identities.contains(&identity) {
                record.identities.push(identity);
            }
        }
        normalise(&mut record.roles);
        normalise(&mut record.permissions);
        if new.api_key_expires_at.is_some_and(|at| at <= change.now) {
            return Err(Error::invalid("api_key_expires_at", "must be in the future"));
        }
        client::check(&record)?;
        let api_key = if new.without_api_key { None } else { Some(ApiKey::generate()?) };
        if let Some(key) = &api_key {
            record.api_keys.push(self.stored_key(key, &new.id, change.now, new.api_key_expires_at));
        }
        let changed = retried!(change, self.try_create(&record, change))?;
        Ok((changed, api_key))
    }

    fn stored_key(&self, key: &ApiKey, id: &str, now: Time, expires: Option<Time>) -> StoredKey {
        StoredKey {
            prefix: key.prefix().to_owned(),
            mac: key.mac(&self.vault.ring(), id).to_vec().into(),
            created_at: now.micros(),
            expires_at: expires.map_or(0, Time::micros),
        }
    }

    async fn try_create(&self, record: &ClientRecord, change: &Change) -> Result<Changed, Error> {
        let row = self.client_row(&record.client_id);
        let mut tx = self.vault.begin().await?;
        if tx.get::<ClientRecord>(&row).await?.is_some() {
            return Err(Error::State(Reason::AlreadyExists));
        }
        self.hold_roles(&mut tx, &record.roles).await?;
        for identity in &identities(record)? {
            self.claim(&mut tx, identity, &record.client_id).await?;
        }
        tx.insert(&row, record)?;
        self.arm_notices(&mut tx, &[], record, change.now)?;
        change.accompany(&mut tx).await?;
        let receipt = tx.commit().await?;
        Ok(Changed { client: Client::from_record(record, receipt.revision)?, receipt })
    }

    /// Requires that the roles exist and stay until the commit. Defined ones are written again as they
    /// are, so that deleting one at the same time conflicts.
    async fn hold_roles(&self, tx: &mut Tx<'_>, names: &[String]) -> Result<(), Error> {
        let mut v = Violations::new();
        for (i, name) in names.iter().enumerate() {
            if built_in(name).is_some() {
                continue;
            }
            let row = self.role_row(name);
            match tx.get::<RoleRecord>(&row).await? {
                Some(role) => tx.put(&row, &role.record)?,
                None => v.add(format!("roles[{i}]"), format!("there is no role {}", shown(name))),
            }
        }
        v.finish()
    }

    async fn claim(
        &self,
        tx: &mut Tx<'_>,
        identity: &CertificateIdentity,
        client_id: &str,
    ) -> Result<(), Error> {
        let row = self.identity_row(identity);
        match tx.get::<IdentityRecord>(&row).await? {
            Some(owner) if owner.record.client_id != client_id => {
                Err(Error::State(Reason::AlreadyExists))
            }
            Some(_) => Ok(()),
            None => tx.insert(&row, &IdentityRecord { client_id: client_id.to_owned() }),
        }
    }

    async fn release(&self, tx: &mut Tx<'_>, identity: &CertificateIdentity) -> Result<(), Error> {
        let row = self.identity_row(identity);
        if tx.get::<IdentityRecord>(&row).await?.is_some() {
            tx.delete::<IdentityRecord>(&row);
        }
        Ok(())
    }

    /// Changes a client.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Invalid`], [`Error::Conflict`] on another revision,
    /// [`Error::State`] for a removed client, an identity of another client, or the last administrator.
    pub async fn update_client(
        &self,
        id: &str,
        update: &ClientUpdate,
        change: &Change,
    ) -> Result<Changed, Error> {
        self.edit(id, &Edit::Update(update), change).await
    }

    /// Lets a client log in no more; its tokens stop working at once.
    ///
    /// # Errors
    /// As [`Self::update_client`].
    pub async fn disable_client(&self, id: &str, change: &Change) -> Result<Changed, Error> {
        self.edit(id, &Edit::Disable, change).await
    }

    /// Lets a disabled client log in again. Tokens from before stay void.
    ///
    /// # Errors
    /// As [`Self::update_client`].
    pub async fn enable_client(&self, id: &str, change: &Change) -> Result<Changed, Error> {
        self.edit(id, &Edit::Enable, change).await
    }

    /// Removes a client for ever: API keys and identities go, the id stays taken.
    ///
    /// # Errors
    /// As [`Self::update_client`].
    pub async fn remove_client(&self, id: &str, change: &Change) -> Result<Changed, Error> {
        self.edit(id, &Edit::Remove, change).await
    }

    /// Makes a new API key; the old ones work for `overlap` (at most 30 days) longer.
    ///
    /// # Errors
    /// As [`Self::update_client`].
    pub async fn rotate_api_key(
        &self,
        id: &str,
        overlap: Duration,
        expires_at: Option<Time>,
        change: &Change,
    ) -> Result<RotatedApiKey, Error> {
        let mut v = Violations::new();
        v.check(overlap <= MAX_OVERLAP, "overlap_seconds", "must be 0 to 2592000");
        let future = expires_at.is_none_or(|at| at > change.now);
        v.check(future, "expires_at", "must be in the future");
        v.finish()?;
        let api_key = ApiKey::generate()?;
        let edit = Edit::RotateApiKey { new: &api_key, expires_at, overlap };
        let changed = self.edit(id, &edit, change).await?;
        let old = changed.client.api_keys.iter().filter(|k| k.prefix != api_key.prefix());
        let old_keys_expire_at = old.filter_map(|k| k.expires_at).max();
        Ok(RotatedApiKey { api_key, changed, old_keys_expire_at })
    }

    /// Voids every token of a client that was issued before now. Returns that time, too.
    ///
    /// # Errors
    /// As [`Self::update_client`].
    pub async fn revoke_client_tokens(
        &self,
        id: &str,
        change: &Change,
    ) -> Result<(Changed, Time), Error> {
        let from = self.next_moment(change.now);
        let changed = self.edit(id, &Edit::RevokeTokens { from }, change).await?;
        Ok((changed, from))
    }

    /// A time after every token issued so far and not after any that will be.
    fn next_moment(&self, now: Time) -> Time {
        let next = Time::from_micros(self.time(now).micros().saturating_add(1));
        self.watermark.at(next)
    }

    async fn edit(&self, id: &str, edit: &Edit<'_>, change: &Change) -> Result<Changed, Error> {
        retried!(change, self.try_edit(id, edit, change))
    }

    async fn try_edit(&self, id: &str, edit: &Edit<'_>, change: &Change) -> Result<Changed, Error> {
        let row = self.client_row(id);
        let mut tx = self.vault.begin().await?;
        let Some(old) = tx.get::<ClientRecord>(&row).await? else { return Err(Error::NotFound) };
        check_expected(change, old.revision.0)?;
        if old.record.state() == State::Removed {
            return Err(Error::State(Reason::ClientState));
        }
        let mut record = old.record.clone();
        self.apply(&mut record, edit, change.now)?;
        record.updated_at = change.now.micros();
        if record.state() != State::Removed {
            client::check(&record)?;
        }
        let gained = record.roles.iter().filter(|r| !old.record.roles.contains(r));
        let gained: Vec<String> = gained.cloned().collect();
        self.hold_roles(&mut tx, &gained).await?;

        let (before, after) = (identities(&old.record)?, identities(&record)?);
        for identity in before.iter().filter(|i| !after.contains(i)) {
            self.release(&mut tx, identity).await?;
        }
        for identity in after.iter().filter(|i| !before.contains(i)) {
            self.claim(&mut tx, identity, id).await?;
        }
        let gone = |key: &&StoredKey| record.api_keys.iter().all(|kept| kept.prefix != key.prefix);
        for key in old.record.api_keys.iter().filter(gone) {
            self.forget_api_key(&mut tx, id, &key.prefix);
        }
        tx.put(&row, &record)?;
        self.arm_notices(&mut tx, &old.record.api_keys, &record, change.now)?;
        if admins::is_admin(self, &mut tx, &old.record).await?
            && !admins::is_admin(self, &mut tx, &record).await?
        {
            admins::require_another(self, &mut tx, Some(&row)).await?;
        }
        change.accompany(&mut tx).await?;
        let receipt = tx.commit().await?;
        Ok(Changed { client: Client::from_record(&record, receipt.revision)?, receipt })
    }

    fn apply(&self, record: &mut ClientRecord, edit: &Edit<'_>, now: Time) -> Result<(), Error> {
        match edit {
            Edit::Update(update) => apply_update(record, update)?,
            Edit::Disable => {
                record.set_state(State::Disabled);
                record.tokens_valid_from = self.next_moment(now).micros();
            }
            Edit::Enable => record.set_state(State::Enabled),
            Edit::Remove => {
                record.set_state(State::Removed);
                record.tokens_valid_from = self.next_moment(now).micros();
                record.api_keys.clear();
                record.identities.clear();
                record.roles.clear();
                record.permissions.clear();
            }
            Edit::RotateApiKey { new, expires_at, overlap } => {
                let until = now.plus(*overlap).micros();
                for key in &mut record.api_keys {
                    let expires = if key.expires_at == 0 { i64::MAX } else { key.expires_at };
                    key.expires_at = expires.min(until);
                }
                record.api_keys.retain(|key| key.expires_at > now.micros());
                let id = record.client_id.clone();
                record.api_keys.push(self.stored_key(new, &id, now, *expires_at));
                let over = record.api_keys.len().saturating_sub(MAX_API_KEYS);
                record.api_keys.drain(..over);
            }
            Edit::RevokeTokens { from } => {
                record.tokens_valid_from = record.tokens_valid_from.max(from.micros());
            }
        }
        Ok(())
    }

    /// At most `limit` clients in order of their ids, after the id `after`.
    ///
    /// # Errors
    /// As [`crate::vault::Vault::get`].
    pub async fn clients(
        &self,
        filter: &ClientFilter,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Client>, Error> {
        // Rows stand in the order of MACs, so each page walks over all of them and keeps the least.
        let mut page = BTreeMap::new();
        self.walk::<ClientRecord>(|_, loaded| {
            let id = &loaded.record.client_id;
            let removed = loaded.record.state() == State::Removed;
            let beyond = page.len() >= limit
                && page.last_key_value().is_none_or(|(last, _): (&String, _)| last <= id);
            if beyond
                || after.is_some_and(|after| id.as_str() <= after)
                || filter.role.as_ref().is_some_and(|role| !loaded.record.roles.contains(role))
                || (filter.state.is_none() && removed)
            {
                return Ok(());
            }
            let client = Client::from_record(&loaded.record, loaded.revision)?;
            if filter.state.is_none_or(|state| state == client.state) {
                page.insert(client.id.clone(), client);
                if page.len() > limit {
                    page.pop_last();
                }
            }
            Ok(())
        })
        .await?;
        Ok(page.into_values().collect())
    }
}

fn identities(record: &ClientRecord) -> Result<Vec<CertificateIdentity>, Error> {
    let all = record.identities.iter().map(identity_from_record).collect::<Option<_>>();
    all.ok_or_else(|| Error::data_loss("a client record has a bad identity"))
}

fn apply_update(record: &mut ClientRecord, update: &ClientUpdate) -> Result<(), Error> {
    let set = |to: &mut String, from: &Option<String>| {
        if let Some(text) = from {
            to.clone_from(text);
        }
    };
    set(&mut record.name, &update.name);
    set(&mut record.description, &update.description);
    set(&mut record.environment, &update.environment);
    if let Some(tier) = update.tier {
        record.tier = u32::try_from(tier).unwrap_or(u32::MAX);
    }
    let edit = |names: &mut Vec<String>, add: &[String], remove: &[String], field: &str| {
        if add.iter().any(|name| remove.contains(name)) {
            return Err(Error::invalid(field, "adds and removes the same entry"));
        }
        names.retain(|name| !remove.contains(name));
        names.extend_from_slice(add);
        normalise(names);
        Ok(())
    };
    edit(&mut record.roles, &update.roles_to_add, &update.roles_to_remove, "roles_to_add")?;
    edit(
        &mut record.permissions,
        &update.permissions_to_add,
        &update.permissions_to_remove,
        "permissions_to_add",
    )?;
    let add: Vec<_> = update.identities_to_add.iter().map(identity_to_record).collect();
    let remove: Vec<_> = update.identities_to_remove.iter().map(identity_to_record).collect();
    if add.iter().any(|identity| remove.contains(identity)) {
        return Err(Error::invalid("identities_to_add", "adds and removes the same entry"));
    }
    record.identities.retain(|identity| !remove.contains(identity));
    for identity in add {
        if !record.identities.contains(&identity) {
            record.identities.push(identity);
        }
    }
    Ok(())
}
