//! Roles: the built-in ones, and those that an administrator defines.

use polykey_proto::polykey::record::v1::{ClientRecord, RoleRecord};
use polykey_storage::{Revision, all};

use super::client::{self, normalise};
use super::clients::check_expected;
use super::{Change, Directory, admins, retried};
use crate::authz::{BUILT_IN, BuiltIn, PermissionSet, built_in};
use crate::error::{Error, Reason};
use crate::limits::{self, Violations};
use crate::time::Time;
use crate::vault::Receipt;

/// Most roles besides the built-in ones.
pub const MAX_ROLES_DEFINED: usize = 1000;

/// A named set of permissions.
#[derive(Clone, Debug)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// Names of its permissions, sorted; `*` is all.
    pub permissions: Vec<String>,
    /// The same, expanded.
    pub set: PermissionSet,
    /// For people.
    pub description: String,
    /// Whether every node has it and none can change it.
    pub built_in: bool,
    /// When it was defined; none for built-in ones.
    pub created_at: Option<Time>,
    /// When it was last changed; none for built-in ones.
    pub updated_at: Option<Time>,
    /// The revision of its record; 0 for built-in ones.
    pub revision: u64,
}

impl Role {
    pub(super) fn built_in(role: &BuiltIn) -> Self {
        let names = role.permissions.iter().map(|p| p.name().to_owned());
        let mut permissions: Vec<String> = names.collect();
        if role.permissions == PermissionSet::all() {
            permissions = vec!["*".to_owned()];
        }
        normalise(&mut permissions);
        Self {
            name: role.name.into(),
            permissions,
            set: role.permissions,
            description: role.about.into(),
            built_in: true,
            created_at: None,
            updated_at: None,
            revision: 0,
        }
    }

    pub(super) fn from_record(record: &RoleRecord, revision: Revision) -> Result<Self, Error> {
        let set = PermissionSet::parse(record.permissions.iter().map(String::as_str))
            .map_err(|_| Error::data_loss("a role record has a bad permission"))?;
        Ok(Self {
            name: record.name.clone(),
            permissions: record.permissions.clone(),
            set,
            description: record.description.clone(),
            built_in: false,
            created_at: Time::optional(record.created_at),
            updated_at: Time::optional(record.updated_at),
            revision: revision.0,
        })
    }
}

/// Whether `name` is `^[a-z][a-z0-9_-]{0,63}$`.
#[must_use]
pub fn is_role_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    name.len() <= 64
        && bytes.next().is_some_and(|b| b.is_ascii_lowercase())
        && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b))
}

fn check_name(name: &str) -> Result<(), Error> {
    if built_in(name).is_some() {
        return Err(Error::invalid("name", "is the name of a built-in role"));
    }
    if !is_role_name(name) {
        return Err(Error::invalid("name", "must match ^[a-z][a-z0-9_-]{0,63}$"));
    }
    Ok(())
}

impl Directory {
    /// Every role by name, built-in ones included.
    ///
    /// # Errors
    /// As [`crate::vault::Vault::get`].
    pub async fn roles(&self) -> Result<Vec<Role>, Error> {
        let mut roles: Vec<Role> = BUILT_IN.iter().map(Role::built_in).collect();
        self.walk::<RoleRecord>(|_, loaded| {
            roles.push(Role::from_record(&loaded.record, loaded.revision)?);
            Ok(())
        })
        .await?;
        roles.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(roles)
    }

    /// Defines a role or changes one. `change.expected` 0: it must not exist.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad or built-in name and unknown permissions, [`Error::Conflict`] on
    /// another revision, [`Error::State`] if no administrator would be left.
    pub async fn put_role(
        &self,
        name: &str,
        permissions: &[String],
        description: &str,
        change: &Change,
    ) -> Result<(Role, Receipt), Error> {
        let mut v = Violations::new();
        client::permissions(&mut v, permissions);
        v.check(!permissions.is_empty(), "permissions", "must have 1 to 100 entries");
        limits::description(&mut v, "description", description);
        v.finish()?;
        check_name(name)?;
        let mut permissions = permissions.to_vec();
        normalise(&mut permissions);
        retried!(change, self.try_put_role(name, &permissions, description, change))
    }

    async fn try_put_role(
        &self,
        name: &str,
        permissions: &[String],
        description: &str,
        change: &Change,
    ) -> Result<(Role, Receipt), Error> {
        let row = self.role_row(name);
        let mut tx = self.vault.begin().await?;
        let old = tx.get::<RoleRecord>(&row).await?;
        check_expected(change, old.as_ref().map_or(0, |l| l.revision.0))?;
        let record = RoleRecord {
            name: name.to_owned(),
            permissions: permissions.to_vec(),
            description: description.to_owned(),
            created_at: old.as_ref().map_or(change.now.micros(), |l| l.record.created_at),
            updated_at: change.now.micros(),
        };
        tx.put(&row, &record)?;
        if old.is_none() {
            let everything = all();
            let forward = polykey_storage::Direction::Forward;
            let there = tx.scan::<RoleRecord>(everything, forward, MAX_ROLES_DEFINED).await?;
            if there.len() >= MAX_ROLES_DEFINED {
                return Err(Error::invalid("name", "there are 1000 roles already"));
            }
        }
        let grants_all = |names: &[String]| {
            PermissionSet::parse(names.iter().map(String::as_str))
                .is_ok_and(|set| set == PermissionSet::all())
        };
        let granted_all = old.as_ref().is_some_and(|l| grants_all(&l.record.permissions));
        if granted_all && !grants_all(permissions) {
            // Reads the role as it will be.
            admins::require_another(self, &mut tx, None).await?;
        }
        change.accompany(&mut tx).await?;
        let receipt = tx.commit().await?;
        Ok((Role::from_record(&record, receipt.revision)?, receipt))
    }

    /// Deletes a role that no client has.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Conflict`] on another revision, [`Error::State`] with
    /// [`Reason::InUse`] while a client has it, [`Error::Invalid`] for a built-in one.
    pub async fn delete_role(&self, name: &str, change: &Change) -> Result<Receipt, Error> {
        check_name(name)?;
        retried!(change, self.try_delete_role(name, change))
    }

    async fn try_delete_role(&self, name: &str, change: &Change) -> Result<Receipt, Error> {
        let row = self.role_row(name);
        let mut tx = self.vault.begin().await?;
        let Some(old) = tx.get::<RoleRecord>(&row).await? else { return Err(Error::NotFound) };
        check_expected(change, old.revision.0)?;
        let mut used = false;
        // Whoever gives the role to a client meanwhile writes its row: the commit then conflicts.
        admins::walk::<ClientRecord>(&mut tx, |_, loaded| {
            used |= loaded.record.roles.iter().any(|role| role == name);
            !used
        })
        .await?;
        if used {
            return Err(Error::State(Reason::InUse));
        }
        tx.delete::<RoleRecord>(&row);
        change.accompany(&mut tx).await?;
        tx.commit().await
    }
}
