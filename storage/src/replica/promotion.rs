//! A replica made the writer: its source is told by the very rows it would have written next.

use std::sync::Arc;

use super::{Elsewhere, ReplicaError, SPACE, WATERMARK, Watermark};
use crate::{Applied, Commit, Require, Revision, Store};

const PROMOTED: &[u8] = b"promoted";
const FORMAT: u8 = 1;
/// How often a source that goes on shipping may be faster.
const ATTEMPTS: usize = 100;

/// What a replica was when it was promoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promotion {
    /// The store that it was a replica of.
    pub source: [u8; 16],
    /// The revision of that store that it was.
    pub revision: Revision,
    /// The epoch under which that store wrote. The promoted one writes under a later one.
    pub fenced: u64,
}

impl Promotion {
    fn encode(&self) -> Vec<u8> {
        let mut encoded = vec![FORMAT];
        encoded.extend_from_slice(&self.source);
        encoded.extend_from_slice(&self.revision.0.to_be_bytes());
        encoded.extend_from_slice(&self.fenced.to_be_bytes());
        encoded
    }

    fn decode(encoded: &[u8]) -> Option<Self> {
        let (&[FORMAT], rest) = encoded.split_first_chunk::<1>()? else { return None };
        let (source, rest) = rest.split_first_chunk::<16>()?;
        let (revision, rest) = rest.split_first_chunk::<8>()?;
        let fenced: &[u8; 8] = rest.try_into().ok()?;
        Some(Self {
            source: *source,
            revision: Revision(u64::from_be_bytes(*revision)),
            fenced: u64::from_be_bytes(*fenced),
        })
    }
}

/// The promotion of a store, if it was promoted.
///
/// # Errors
/// [`ReplicaError::Target`], [`ReplicaError::Damaged`].
pub async fn promotion(store: &dyn Store) -> Result<Option<Promotion>, ReplicaError> {
    let found = store.get(SPACE, PROMOTED).await.map_err(ReplicaError::Target)?;
    found.map(|row| Promotion::decode(&row.value).ok_or(ReplicaError::Damaged)).transpose()
}

/// Notes in a replica that it is a store of its own from now on, as one change that follows what its
/// source has written: from then on that one ships nothing, whatever the epoch. `fenced` is the epoch it
/// wrote under, which is to be raised next. What was noted before stays.
///
/// # Errors
/// [`ReplicaError::NotAReplica`], [`ReplicaError::Torn`], [`ReplicaError::Contended`] if its source was
/// faster again and again, or that the store was not read or written.
pub async fn promote(store: &Arc<dyn Store>, fenced: u64) -> Result<Promotion, ReplicaError> {
    if let Some(found) = promotion(store.as_ref()).await? {
        return Ok(found);
    }
    for _ in 0..ATTEMPTS {
        let snapshot = store.snapshot().await.map_err(ReplicaError::Target)?;
        let current = snapshot.revision();
        let row = snapshot.get(SPACE, WATERMARK).await.map_err(ReplicaError::Target)?;
        let row = row.ok_or(ReplicaError::NotAReplica)?;
        drop(snapshot);
        let mark = Watermark::decode(&row.value).ok_or(ReplicaError::Damaged)?;
        if row.revision != current {
            return Err(ReplicaError::Diverged { left: row.revision, current });
        }
        if !mark.whole {
            return Err(ReplicaError::Torn);
        }
        let promoted = Promotion { source: mark.source, revision: mark.revision, fenced };
        let commit = Commit::new().require(SPACE, WATERMARK, Require::At(row.revision)).put(
            SPACE,
            PROMOTED,
            promoted.encode(),
        );
        let mut next = Elsewhere::after(current);
        let committed =
            store.commit(vec![commit], &mut |applied: &Applied<'_>| next.check(applied)).await;
        match committed {
            Ok(committed) if committed.any() => return Ok(promoted),
            Ok(_) => {}
            Err(_) if next.found() != current => {}
            Err(error) => return Err(ReplicaError::Commit(error)),
        }
    }
    Err(ReplicaError::Contended)
}
