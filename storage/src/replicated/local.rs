//! What a source remembers of its target, in a row of its own that is never shipped.

use futures::executor::block_on;

use super::Fenced;
use crate::{
    Commit, CommitError, NoFinish, ReadError, Revision, Store, StoreError, replica::SPACE,
};

const ROW: &[u8] = b"target";
const FORMAT: u8 = 1;

/// The target that was shipped to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// Its id.
    pub(super) target: [u8; 16],
    /// The epoch it is shipped to under.
    pub(super) epoch: u64,
    /// Set for ever once it was promoted.
    pub(super) fenced: Option<Fenced>,
}

impl Known {
    fn encode(&self) -> Vec<u8> {
        let mut encoded = vec![FORMAT];
        encoded.extend_from_slice(&self.target);
        encoded.extend_from_slice(&self.epoch.to_be_bytes());
        if let Some(Fenced { own: _, current, shipped, last }) = self.fenced {
            for number in [current, shipped.0, last.0] {
                encoded.extend_from_slice(&number.to_be_bytes());
            }
        }
        encoded
    }

    fn decode(encoded: &[u8]) -> Option<Self> {
        let (&[FORMAT], rest) = encoded.split_first_chunk::<1>()? else { return None };
        let (target, rest) = rest.split_first_chunk::<16>()?;
        let (numbers, []) = rest.as_chunks::<8>() else { return None };
        let numbers: Vec<u64> = numbers.iter().map(|number| u64::from_be_bytes(*number)).collect();
        let (epoch, fenced) = match *numbers.as_slice() {
            [epoch] => (epoch, None),
            [own, current, shipped, last] => {
                let (shipped, last) = (Revision(shipped), Revision(last));
                (own, Some(Fenced { own, current, shipped, last }))
            }
            _ => return None,
        };
        Some(Self { target: *target, epoch, fenced })
    }
}

/// Reads it, if there is any.
pub(super) fn read(store: &dyn Store) -> Result<Option<Known>, StoreError> {
    let found = block_on(store.get(SPACE, ROW)).map_err(|error| match error {
        ReadError::Store(error) => error,
        ReadError::NeedsReopen => StoreError::Other(error.to_string()),
    })?;
    let malformed = || StoreError::Damaged("the record of the replication target".into());
    found.map(|row| Known::decode(&row.value).ok_or_else(malformed)).transpose()
}

/// Writes it. Durable on return.
pub(super) fn write(store: &dyn Store, known: &Known) -> Result<Revision, CommitError> {
    let commit = Commit::new().put(SPACE, ROW, known.encode());
    Ok(block_on(store.commit(vec![commit], &mut NoFinish))?.revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_it_was_written() {
        let shipped = Fenced { own: 7, current: 9, shipped: Revision(3), last: Revision(u64::MAX) };
        for fenced in [None, Some(shipped)] {
            let known = Known { target: [5; 16], epoch: 7, fenced };
            assert_eq!(Known::decode(&known.encode()), Some(known));
        }
        for malformed in [&[][..], &[1; 24], &[2; 25], &[1; 26], &[1; 33]] {
            assert_eq!(Known::decode(malformed), None);
        }
    }
}
