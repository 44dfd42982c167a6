//! The rule that one enabled client with every permission must remain.

use std::ops::Bound;

use polykey_proto::polykey::record::v1::{ClientRecord, RoleRecord, client_record};
use polykey_storage::{Direction, all};

use super::{Directory, WALK};
use crate::authz::{PermissionSet, built_in};
use crate::error::{Error, Reason};
use crate::vault::space::Record;
use crate::vault::{Loaded, Tx};

/// Walks over the records of a space as the transaction began, until `each` says no.
pub(super) async fn walk<R: Record>(
    tx: &mut Tx<'_>,
    mut each: impl FnMut(Vec<u8>, Loaded<R>) -> bool,
) -> Result<(), Error> {
    let mut from = all();
    loop {
        let page = tx.scan::<R>(from, Direction::Forward, WALK).await?;
        let full = page.len() == WALK;
        let mut last = Vec::new();
        for (key, loaded) in page {
            last.clone_from(&key);
            if !each(key, loaded) {
                return Ok(());
            }
        }
        if !full {
            return Ok(());
        }
        from = (Bound::Excluded(last), Bound::Unbounded);
    }
}

/// Whether the record is of an enabled client with every permission, by itself or by its roles as the
/// transaction sees them. The roles it read are pinned.
pub(super) async fn is_admin(
    directory: &Directory,
    tx: &mut Tx<'_>,
    record: &ClientRecord,
) -> Result<bool, Error> {
    if record.state() != client_record::State::Enabled {
        return Ok(false);
    }
    let parse = |names: &[String]| {
        PermissionSet::parse(names.iter().map(String::as_str))
            .map_err(|_| Error::data_loss("a record names a permission that does not exist"))
    };
    let mut set = parse(&record.permissions)?;
    for name in &record.roles {
        if let Some(role) = built_in(name) {
            set = set.union(role.permissions);
            continue;
        }
        let row = directory.role_row(name);
        if let Some(role) = tx.get::<RoleRecord>(&row).await? {
            set = set.union(parse(&role.record.permissions)?);
            tx.pin::<RoleRecord>(&row);
        }
    }
    Ok(set == PermissionSet::all())
}

/// Finds an administrator other than the client in row `but`, and pins its record: two changes that
/// each count on the other's administrator cannot both be committed.
///
/// # Errors
/// [`Error::State`] if there is none.
pub(super) async fn require_another(
    directory: &Directory,
    tx: &mut Tx<'_>,
    but: Option<&[u8]>,
) -> Result<(), Error> {
    let mut from = all();
    loop {
        let page = tx.scan::<ClientRecord>(from, Direction::Forward, WALK).await?;
        let Some((last, _)) = page.last() else {
            return Err(Error::State(Reason::LastAdministrator));
        };
        from = (Bound::Excluded(last.clone()), Bound::Unbounded);
        for (key, loaded) in &page {
            if but != Some(key.as_slice()) && is_admin(directory, tx, &loaded.record).await? {
                tx.pin::<ClientRecord>(key);
                return Ok(());
            }
        }
    }
}
