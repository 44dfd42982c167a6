//! The head: log position, record counter and set hash, sealed as the last write of every group.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use polykey_hsm::{MacPurpose, Ring, Sealer};
use polykey_proto::polykey::record::v1::{AuditEvent, AuditLeaf, HeadRecord};
use polykey_storage::{Abort, Applied, Finish, RowKey, Write};
use prost::encoding;

use super::seal::{self, counter_of};
use super::space::{self, Record, meta};
use super::tree::{Frontier, Hash, leaf_hash};
use crate::audit::line;
use crate::error::Error;
use crate::time::Time;

/// The head as the sequencer carries it from group to group.
#[derive(Clone, Debug, Default)]
pub(crate) struct Head {
    pub(crate) frontier: Frontier,
    pub(crate) set_hash: Hash,
    pub(crate) rows: u64,
    pub(crate) keys: u64,
    pub(crate) counter: u64,
    pub(crate) last_time: Time,
}

impl Head {
    /// The head as it is stored.
    pub(crate) fn open(sealer: &Sealer, value: &[u8]) -> Result<Self, Error> {
        let (record, counter) = seal::open::<HeadRecord>(sealer, meta::HEAD, value)?;
        if counter != record.counter {
            return Err(Error::data_loss("the head's counter is not its own"));
        }
        Self::from_record(&record).ok_or_else(|| Error::data_loss("the head is malformed"))
    }

    pub(crate) fn from_record(record: &HeadRecord) -> Option<Self> {
        let roots = record.frontier.iter().map(|h| h.as_ref().try_into().ok());
        let roots = roots.collect::<Option<Vec<Hash>>>()?;
        Some(Self {
            frontier: Frontier::from_parts(record.next_leaf, roots)?,
            set_hash: record.set_hash.as_ref().try_into().ok()?,
            rows: record.rows,
            keys: record.keys,
            counter: record.counter,
            last_time: Time::from_micros(record.last_time),
        })
    }

    pub(crate) fn to_record(&self) -> HeadRecord {
        HeadRecord {
            next_leaf: self.frontier.size(),
            counter: self.counter,
            set_hash: self.set_hash.to_vec().into(),
            frontier: self.frontier.roots().iter().map(|h| h.to_vec().into()).collect(),
            last_time: self.last_time.micros(),
            rows: self.rows,
            keys: self.keys,
        }
    }

    /// Adds or removes a row: exclusive or is its own inverse. Each row stands in the set at most
    /// once, and who does not hold the key cannot tell one contribution from random bytes.
    pub(crate) fn toggle(&mut self, ring: &Ring, row: &RowKey, counter: u64) {
        let mac = set_element(ring, row, counter);
        for (byte, other) in self.set_hash.iter_mut().zip(mac) {
            *byte ^= other;
        }
    }
}

/// The contribution of one row to the set hash.
pub(crate) fn set_element(ring: &Ring, row: &RowKey, counter: u64) -> Hash {
    ring.mac(MacPurpose::SetHash, &[&[row.space.0], &row.key, &counter.to_be_bytes()])
}

/// What the events of one proposal became.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Leaves {
    pub(crate) first: Option<u64>,
}

/// The events of one leaf: all of its body that is known before its index, encoded on the thread of
/// whoever proposes it.
#[derive(Clone)]
pub(crate) struct LeafEvents {
    data_plane: bool,
    encoded: Bytes,
}

impl LeafEvents {
    /// A leaf of one event.
    pub(crate) fn one(event: &AuditEvent) -> Self {
        let encoded = line::encode(std::slice::from_ref(event)).into();
        Self { data_plane: false, encoded }
    }

    /// A leaf of many events of the data plane, encoded.
    pub(crate) fn block(encoded: Bytes) -> Self {
        Self { data_plane: true, encoded }
    }

    /// The encoded [`AuditBody`](polykey_proto::polykey::record::v1::AuditBody) at an index.
    fn body(&self, index: u64, node_id: &[u8; 16]) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.encoded.len() + 32);
        if index != 0 {
            encoding::uint64::encode(1, &index, &mut body);
        }
        encoding::bytes::encode(2, &node_id.to_vec(), &mut body);
        body.extend_from_slice(&self.encoded);
        if self.data_plane {
            encoding::bool::encode(4, &true, &mut body);
        }
        body
    }
}

/// Appends audit leaves and the head to a group inside its transaction.
pub(crate) struct Sealing<'a> {
    pub(crate) ring: &'a Ring,
    pub(crate) sealer: &'a Sealer,
    pub(crate) node_id: [u8; 16],
    pub(crate) counter: &'a Arc<AtomicU64>,
    pub(crate) head: Head,
    /// The events of each proposal, by index in the group.
    pub(crate) events: Vec<Vec<LeafEvents>>,
    /// By how much each proposal changes the number of enabled keys.
    pub(crate) enabled: Vec<i64>,
    pub(crate) leaves: Vec<Leaves>,
    pub(crate) now: Time,
    /// Other nodes may have moved the head.
    pub(crate) shared: bool,
}

/// The head is sealed under a storage key that this node does not hold: another one has rotated the
/// root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RootMoved;

impl std::fmt::Display for RootMoved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another node has rotated the root key")
    }
}

impl std::error::Error for RootMoved {}

fn head_row() -> RowKey {
    RowKey::new(HeadRecord::SPACE, meta::HEAD)
}

impl Sealing<'_> {
    fn leaf(&mut self, events: &LeafEvents) -> Result<Write, Abort> {
        let index = self.head.frontier.size();
        let body = events.body(index, &self.node_id);
        let mut salt = [0_u8; 32];
        polykey_hsm::random::fill(&mut salt).map_err(|e| Abort::new(e.to_string()))?;
        let hash = leaf_hash(&salt, &body);
        let leaf = AuditLeaf { salt: salt.to_vec().into(), body: body.into(), archived: false };
        let row = RowKey::new(space::AUDIT, index.to_be_bytes());
        let counter = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        let mut value = hash.to_vec();
        let sealed = seal::seal(self.sealer, &leaf, &row.key, counter);
        value.extend_from_slice(&sealed.map_err(Abort::new)?);
        self.head.toggle(self.ring, &row, counter);
        self.head.rows += 1;
        self.head.frontier.push(hash);
        Ok(Write::Put { row, value: value.into() })
    }
}

impl Sealing<'_> {
    /// Goes on from the head as it is stored, whoever has put it there.
    fn follow(&mut self, stored: Option<&Bytes>) -> Result<(), Abort> {
        let Some(stored) = stored else {
            // Only a store that is being founded has none.
            let new = self.head.frontier.size() == 0 && self.head.rows == 0;
            return if new { Ok(()) } else { Err(Abort::new("the store has no head any more")) };
        };
        if !seal::known(self.sealer, HeadRecord::SPACE, stored) {
            return Err(Abort::new(RootMoved));
        }
        let head = Head::open(self.sealer, stored).map_err(Abort::new)?;
        if head.frontier.size() < self.head.frontier.size() {
            return Err(Abort::new("the stored head is older than one that this node has seen"));
        }
        self.head = head;
        Ok(())
    }
}

impl Finish for Sealing<'_> {
    fn beneath(&self) -> Vec<RowKey> {
        if self.shared { vec![head_row()] } else { Vec::new() }
    }

    fn finish(&mut self, applied: &Applied<'_>) -> Result<Vec<Write>, Abort> {
        if let Some(stored) = applied.beneath.first() {
            self.follow(stored.as_ref())?;
        }
        for replaced in applied.replaced {
            if !space::counted(&replaced.row) {
                continue;
            }
            if let Some(old) = &replaced.old {
                let counter = counter_of(replaced.row.space, old).map_err(Abort::new)?;
                self.head.toggle(self.ring, &replaced.row, counter);
                self.head.rows = self.head.rows.saturating_sub(1);
            }
            if let Some(new) = &replaced.new {
                let counter = counter_of(replaced.row.space, new).map_err(Abort::new)?;
                self.head.toggle(self.ring, &replaced.row, counter);
                self.head.rows += 1;
            }
        }
        let mut writes = Vec::new();
        for &i in applied.accepted {
            let delta = self.enabled.get(i).copied().unwrap_or(0);
            self.head.keys = self.head.keys.saturating_add_signed(delta);
            let events = self.events.get_mut(i).map(std::mem::take).unwrap_or_default();
            for events in &events {
                let index = self.head.frontier.size();
                writes.push(self.leaf(events)?);
                if let Some(leaves) = self.leaves.get_mut(i) {
                    leaves.first.get_or_insert(index);
                }
            }
        }
        self.head.last_time = self.head.last_time.max(self.now);
        let own = self.counter.fetch_add(1, Ordering::Relaxed) + 1;
        self.head.counter = own;
        let record = self.head.to_record();
        let value = seal::seal(self.sealer, &record, meta::HEAD, own).map_err(Abort::new)?;
        writes.push(Write::Put { row: head_row(), value: value.into() });
        Ok(writes)
    }
}

#[cfg(test)]
mod tests {
    use polykey_proto::polykey::record::v1::AuditBody;
    use prost::Message;

    use super::*;

    #[test]
    fn a_body_put_together_is_the_encoded_message() {
        let event =
            |n: i64| AuditEvent { time: n, action: "n".repeat(200), ..AuditEvent::default() };
        for events in
            [vec![], vec![event(0)], vec![event(1), AuditEvent::default(), event(i64::MIN)]]
        {
            for (index, data_plane) in [(0, false), (1, true), (u64::MAX, true), (300, false)] {
                let node_id = [7; 16];
                let whole = AuditBody {
                    index,
                    node_id: node_id.to_vec().into(),
                    events: events.clone(),
                    data_plane,
                };
                let encoded = line::encode(&events).into();
                let parts = LeafEvents { data_plane, encoded }.body(index, &node_id);
                assert_eq!(parts, whole.encode_to_vec());
            }
        }
    }
}
