//! Files of earlier formats, brought to the present one in a single transaction.
//!
//! Format 1 kept the rows of all spaces in one table, `rows`, under the space byte and the key.

use ::redb::{Database, ReadableTable, TableDefinition};

use super::{
    FORMAT, META, META_FORMAT,
    failure::Failure,
    opening::{begin_write, commit},
    table, table_name,
};
use crate::Space;

const ROWS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("rows");

/// Brings a database of `format` to [`FORMAT`]; whether there was anything to do.
pub(super) fn run(database: &Database, format: u32) -> Result<bool, Failure> {
    if format == FORMAT {
        return Ok(false);
    }
    let transaction = begin_write(database)?;
    {
        let old = transaction.open_table(ROWS)?;
        for space in 0..=u8::MAX {
            let start = [space];
            let end = space.checked_add(1).map(|next| [next]);
            let mut rows = match &end {
                Some(end) => old.range::<&[u8]>(start.as_slice()..end.as_slice())?,
                None => old.range::<&[u8]>(start.as_slice()..)?,
            }
            .peekable();
            if rows.peek().is_none() {
                continue;
            }
            let mut new = transaction.open_table(table(&table_name(Space(space))))?;
            for row in rows {
                let (key, stored) = row?;
                new.insert(key.value().get(1..).unwrap_or_default(), stored.value())?;
            }
        }
    }
    transaction.delete_table(ROWS)?;
    transaction.open_table(META)?.insert(META_FORMAT, FORMAT.to_be_bytes().as_slice())?;
    commit(transaction)?;
    Ok(true)
}
