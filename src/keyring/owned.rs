//! Which keys of a client there are, for quotas: read from the store once, and followed from then on.
//!
//! Ids are held rather than a number, so that a change that is told twice, or in another order, counts
//! once. A change of a key that is not being made here leaves it in doubt: in doubt it counts, and is
//! read again only where that decides. So a creation costs no read unless its client is near its quota.

use std::collections::{HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use polykey_proto::polykey::record::v1::{KeyRecord, ListRow, key_record::State};
use polykey_storage::{Direction, RowKey};

use super::rows::list_prefix;
use crate::error::Error;
use crate::key::KeyId;
use crate::vault::{Loaded, Vault, space};

/// Rows read at a time.
const STEP: usize = 512;
/// Looks at the store for one key: each after the first because keys have changed during the one before.
const LOOKS: usize = 16;
/// Keys of others that are remembered as such, and how many more may be in doubt than a client has: whatever is
/// shared with it changes its rows, too.
const OTHERS: usize = 10_000;

/// The first part of a client's list rows.
type Prefix = [u8; 16];

/// The keys of each client that a quota is about and that has created one since the start.
#[derive(Debug, Default)]
pub(super) struct Owned {
    owners: RwLock<HashMap<Prefix, Arc<Owner>>>,
}

/// The keys that one client has created.
#[derive(Debug, Default)]
struct Owner {
    keys: Mutex<Keys>,
    /// Held by what reads the store for it, so that one reads for all who wait.
    looking: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Known {
    /// Not read yet, or not any more.
    #[default]
    No,
    /// Being read: changes are noted already.
    Reading,
    /// Followed since it was read.
    Yes,
}

/// No id is in two of the four.
#[derive(Debug, Default)]
struct Keys {
    known: Known,
    /// Not destroyed.
    live: HashSet<KeyId>,
    /// Changed since they were read, by the number of the change.
    doubtful: HashMap<KeyId, u64>,
    /// Being made here, with how many changes were told of each.
    making: HashMap<KeyId, u32>,
    /// Created by somebody else, which no change changes.
    others: HashSet<KeyId>,
    changes: u64,
    /// The making of one in doubt was given up: its commit may be on its way still.
    given_up: bool,
}

impl Keys {
    fn doubt(&mut self, id: KeyId) {
        if self.others.contains(&id) {
            return;
        }
        self.live.remove(&id);
        self.changes += 1;
        self.doubtful.insert(id, self.changes);
        if self.doubtful.len() > self.live.len().saturating_add(OTHERS) {
            // To be read anew costs less than all that.
            self.forget();
        }
    }

    fn changed(&mut self, id: KeyId) {
        match self.making.get_mut(&id) {
            Some(told) => *told = told.saturating_add(1),
            None if self.known == Known::No => {}
            None => self.doubt(id),
        }
    }

    fn forget(&mut self) {
        self.known = Known::No;
        self.live = HashSet::new();
        self.doubtful = HashMap::new();
        self.others = HashSet::new();
    }

    /// Takes in what was read of a key while `change` was the last of it.
    fn settle(&mut self, id: KeyId, change: u64, found: Stored) {
        if self.doubtful.get(&id) == Some(&change) {
            self.doubtful.remove(&id);
            match found {
                Stored::Counts => {
                    self.live.insert(id);
                }
                Stored::OfAnother if self.others.len() < OTHERS => {
                    self.others.insert(id);
                }
                Stored::OfAnother | Stored::No => {}
            }
        }
    }
}

/// Room for a key that is being made. Let go without [`Self::keep`], the key is in doubt: its commit may
/// be on its way still.
#[derive(Debug)]
pub(super) struct Place {
    owner: Arc<Owner>,
    id: KeyId,
}

impl Place {
    /// The key is made.
    pub(super) fn keep(&self) {
        let mut keys = self.owner.keys.lock();
        match keys.making.remove(&self.id) {
            None => {}
            Some(_) if keys.known == Known::No => {}
            Some(0..=1) => {
                keys.live.insert(self.id);
            }
            // It has changed once more than it was made.
            Some(_) => keys.doubt(self.id),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut keys = self.owner.keys.lock();
        if keys.making.remove(&self.id).is_some() {
            keys.given_up = true;
            if keys.known != Known::No {
                keys.doubt(self.id);
            }
        }
    }
}

enum Taken {
    Place(Place),
    Full,
    /// The store has to be read first.
    Unknown,
}

/// What a key is to the count of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Counts,
    OfAnother,
    /// Destroyed, or not there.
    No,
}

/// Whether a stored key counts. One that does not open is known to be nobody's.
fn counts(loaded: Result<Option<Loaded<KeyRecord>>, Error>, client: &str) -> Result<Stored, Error> {
    match loaded {
        Ok(Some(loaded)) if loaded.record.creator != client => Ok(Stored::OfAnother),
        Ok(Some(loaded)) if loaded.record.state() != State::Destroyed => Ok(Stored::Counts),
        Err(error @ Error::Unavailable { .. }) => Err(error),
        Ok(_) | Err(_) => Ok(Stored::No),
    }
}

impl Owner {
    fn take(self: &Arc<Self>, id: KeyId, most: usize) -> Taken {
        let mut keys = self.keys.lock();
        let certain = keys.live.len() + keys.making.len();
        if keys.known != Known::Yes {
            return Taken::Unknown;
        }
        if certain >= most {
            return Taken::Full;
        }
        if certain + keys.doubtful.len() >= most {
            return Taken::Unknown;
        }
        keys.making.insert(id, 0);
        Taken::Place(Place { owner: Arc::clone(self), id })
    }

    /// Reads what is not known. Called by one at a time.
    async fn look(&self, vault: &Vault, client: &str) -> Result<(), Error> {
        let given_up = std::mem::take(&mut self.keys.lock().given_up);
        if given_up && let Err(error) = vault.decided().await {
            self.keys.lock().given_up = true;
            return Err(error);
        }
        let known = {
            let mut keys = self.keys.lock();
            if keys.known != Known::Yes {
                // Before the first row is read, so that no change falls in between.
                keys.known = Known::Reading;
            }
            keys.known
        };
        if known == Known::Reading {
            self.read(vault, client).await?;
        }
        self.resolve(vault, client).await
    }

    /// Reads every key of the client, some at a time.
    async fn read(&self, vault: &Vault, client: &str) -> Result<(), Error> {
        let (mut start, end) = polykey_storage::prefix(list_prefix(vault, client));
        loop {
            let range = (start, end.clone());
            let rows = vault.scan_each::<ListRow>(range, Direction::Forward, STEP).await?;
            let Some((last, _)) = rows.last() else { break };
            let (last, more) = (last.clone(), rows.len() == STEP);
            let listed = rows.iter().filter(|(_, row)| {
                let destroyed = |row: &Loaded<ListRow>| row.record.state == State::Destroyed as i32;
                !row.as_ref().is_ok_and(destroyed)
            });
            let ids = listed.filter_map(|(row, _)| row.get(16..).and_then(KeyId::from_slice));
            let ids: Vec<KeyId> = ids.collect();
            let found = stored(vault, client, &ids).await?;
            let mut keys = self.keys.lock();
            for (id, _) in ids.into_iter().zip(found).filter(|(_, it)| *it == Stored::Counts) {
                if !keys.doubtful.contains_key(&id) && !keys.making.contains_key(&id) {
                    keys.live.insert(id);
                }
            }
            if !more {
                break;
            }
            start = Bound::Excluded(last);
        }
        let mut keys = self.keys.lock();
        match keys.known {
            Known::Reading => keys.known = Known::Yes,
            // Everything may have changed meanwhile.
            Known::No | Known::Yes => keys.forget(),
        }
        Ok(())
    }

    /// Reads the keys that are in doubt.
    async fn resolve(&self, vault: &Vault, client: &str) -> Result<(), Error> {
        let mut doubtful: Vec<(KeyId, u64)> =
            self.keys.lock().doubtful.iter().map(|(id, change)| (*id, *change)).collect();
        doubtful.sort_unstable();
        for some in doubtful.chunks(STEP) {
            let ids: Vec<KeyId> = some.iter().map(|(id, _)| *id).collect();
            let found = stored(vault, client, &ids).await?;
            let mut keys = self.keys.lock();
            for ((id, change), found) in some.iter().zip(found) {
                keys.settle(*id, *change, found);
            }
        }
        Ok(())
    }
}

/// What each of these keys, whose ids ascend, is to the count of a client.
async fn stored(vault: &Vault, client: &str, ids: &[KeyId]) -> Result<Vec<Stored>, Error> {
    let at = vault.steady().await?;
    let rows: Vec<Vec<u8>> = ids.iter().map(|id| id.bytes().to_vec()).collect();
    let loaded = vault.get_many::<KeyRecord>(&at, &rows).await?;
    loaded.into_iter().map(|loaded| counts(loaded, client)).collect()
}

impl Owned {
    fn owner(&self, prefix: Prefix) -> Arc<Owner> {
        if let Some(owner) = self.owners.read().get(&prefix) {
            return Arc::clone(owner);
        }
        Arc::clone(self.owners.write().entry(prefix).or_default())
    }

    /// Room for one more key of a client that may have `most`; `None` if it has them all.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub(super) async fn place(
        &self,
        vault: &Arc<Vault>,
        client: &str,
        most: usize,
        id: KeyId,
    ) -> Result<Option<Place>, Error> {
        let owner = self.owner(list_prefix(vault, client));
        let mut looking = None;
        for _ in 0..LOOKS {
            match owner.take(id, most) {
                Taken::Place(place) => return Ok(Some(place)),
                Taken::Full => return Ok(None),
                Taken::Unknown => {}
            }
            let Some(held) = looking.take() else {
                looking = Some(Arc::clone(&owner.looking).lock_owned().await);
                continue;
            };
            // A task of its own: it ends, and is of use, whoever has gone away meanwhile.
            let (reader, vault, client) =
                (Arc::clone(&owner), Arc::clone(vault), client.to_owned());
            let look = tokio::spawn(async move { (reader.look(&vault, &client).await, held) });
            let (looked, held) = look.await.map_err(|error| Error::internal(error.to_string()))?;
            looked?;
            looking = Some(held);
        }
        Err(Error::unavailable("the keys of a client change faster than they are counted"))
    }

    /// A row has changed.
    pub(super) fn changed(&self, row: &RowKey) {
        if row.space == space::LIST
            && let Some((prefix, id)) = row.key.split_first_chunk::<16>()
            && let Some(owner) = self.owners.read().get(prefix)
            && let Some(id) = KeyId::from_slice(id)
        {
            owner.keys.lock().changed(id);
        }
    }

    /// Anything may have changed. What is being made is counted on.
    pub(super) fn clear(&self) {
        let mut owners = self.owners.write();
        owners.retain(|_, owner| Arc::strong_count(owner) > 1);
        owners.values().for_each(|owner| owner.keys.lock().forget());
    }
}
