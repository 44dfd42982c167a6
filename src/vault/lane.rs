//! Counters of records on a store that several nodes share: each process has a lane of its own, so that
//! no two records of a row ever carry the same counter and one of them could pass for the other.

use std::sync::atomic::Ordering;

use polykey_proto::polykey::record::v1::LaneRecord;

use super::{Vault, meta};
use crate::error::Error;

/// A lane has 2^44 counters: at 50,000 records a second, 11 years of one process. There are 2^20 lanes.
pub(super) const LANE_BITS: u32 = 44;
/// How many nodes may start at the very same moment.
const ATTEMPTS: usize = 64;

/// Takes the next lane. Before anything else is written through `vault`.
pub(super) async fn take(vault: &Vault) -> Result<(), Error> {
    for _ in 0..ATTEMPTS {
        let mut tx = vault.begin().await?;
        let stored =
            tx.get::<LaneRecord>(meta::LANES).await?.map_or(1, |loaded| loaded.record.next);
        // A store that came from a single node has counters and no lanes.
        let lane = stored.max((vault.head.load().counter >> LANE_BITS) + 1);
        if lane >> (u64::BITS - LANE_BITS) != 0 {
            return Err(Error::internal("the store has been opened more often than it can be"));
        }
        // In the lane already: if it is not to be ours, nothing is written.
        vault.counter.store(lane << LANE_BITS, Ordering::SeqCst);
        tx.put(meta::LANES, &LaneRecord { next: lane + 1 })?;
        match tx.commit().await {
            Ok(_) => return Ok(()),
            Err(Error::Conflict) => vault.follow_head().await?,
            Err(error) => return Err(error),
        }
    }
    Err(Error::unavailable("other nodes open the store at the same time, again and again"))
}
