//! Taking archived leaves out of the audit log: salt and body go, the hash stays where it stands.

use std::ops::{Bound, Range};

use polykey_proto::polykey::record::v1::AuditLeaf;
use polykey_storage::{Commit, Direction, Require, RowKey, Write};

use super::space::{self, clear_prefix};
use super::{Vault, seal};
use crate::error::Error;

impl Vault {
    /// Takes salt and body out of the first leaves of a range, at most `limit` of them, and gives the leaf
    /// to go on with. Those without are passed over. They must be safe elsewhere.
    ///
    /// # Errors
    /// [`Error::DataLoss`] if a leaf is missing or does not open, [`Error::Conflict`] if one was written
    /// meanwhile; as [`super::Tx::commit`].
    pub(crate) async fn trim_leaves(&self, range: Range<u64>, limit: usize) -> Result<u64, Error> {
        let (snapshot, ring) = self.steady().await?;
        let from = Bound::Included(range.start.to_be_bytes().to_vec());
        let to = Bound::Excluded(range.end.to_be_bytes().to_vec());
        let scanned = snapshot.scan(space::AUDIT, (from, to), Direction::Forward, limit).await;
        let entries = self.read(scanned)?;
        drop(snapshot);
        let (opener, current) = (ring.sealer(), self.ring());
        let mut commit = Commit::new();
        let mut next = range.start;
        for entry in entries {
            if entry.key != next.to_be_bytes() {
                return Err(Error::data_loss(format!("audit leaf {next} is missing")));
            }
            next += 1;
            if self.opened::<AuditLeaf>(&opener, &entry.key, &entry.value)?.archived {
                continue;
            }
            let blank = AuditLeaf { archived: true, ..AuditLeaf::default() };
            let hash = entry.value.get(..clear_prefix(space::AUDIT)).unwrap_or_default();
            let sealed = seal::seal(&current.sealer(), &blank, &entry.key, self.next_counter())?;
            let row = RowKey::new(space::AUDIT, entry.key);
            commit.requires.push((row.clone(), Require::At(entry.revision)));
            commit.writes.push(Write::Put { row, value: [hash, &sealed].concat().into() });
        }
        if next == range.start && next < range.end {
            return Err(Error::data_loss(format!("audit leaf {next} is missing")));
        }
        if !commit.writes.is_empty() {
            self.submit(commit, Vec::new(), 0, current.primary_epoch()).await?;
        }
        Ok(next)
    }
}
