//! The nodes that have one store open at once.
//!
//! A node that keeps rows in memory is *announced*, looks at what others have changed, forgets what
//! it remembered of that, and then says which revision it has *seen*. Whoever must be sure that a
//! change is known everywhere waits until every announced node has seen it. What a node may serve
//! while it cannot look, and for how long another waits for one that says nothing, is the callers'
//! business; nothing here goes by a clock.

use futures::future::BoxFuture;

use crate::{Changes, ChangesError, ReadError, Revision};

/// A node that has the store open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Drawn at random at each opening.
    pub id: String,
    /// What its operator calls it.
    pub name: String,
    /// The last revision it has seen.
    pub seen: Revision,
    /// Raised each time it says so: a number that stays the same for long is of a node that is gone.
    pub beats: u64,
}

/// What a node sees when it looks at the store.
#[derive(Debug)]
pub struct Look {
    /// What was written after the revision that was asked about.
    pub changes: Result<Changes, ChangesError>,
    /// Every announced node, this one included if it is.
    pub nodes: Vec<Peer>,
}

/// The nodes of a store, as one of them sees them.
pub trait Peers: Send + Sync {
    /// The id of this one.
    fn id(&self) -> &str;

    /// Announces this node, which has seen nothing yet. Durable on return; done again, it changes
    /// nothing.
    ///
    /// # Errors
    /// [`ReadError`]; it may be announced all the same.
    fn announce<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ReadError>>;

    /// Every announced node, as it is after the call has begun.
    ///
    /// # Errors
    /// [`ReadError`].
    fn nodes(&self) -> BoxFuture<'_, Result<Vec<Peer>, ReadError>>;

    /// What has changed after `after`, at most `limit` revisions of it, and who is announced. All of it
    /// is read after the call has begun.
    ///
    /// # Errors
    /// [`ReadError`].
    fn look(&self, after: Revision, limit: usize) -> BoxFuture<'_, Result<Look, ReadError>>;

    /// Says that this node remembers nothing that a revision up to `seen` has changed. False if it is
    /// not announced.
    ///
    /// # Errors
    /// [`ReadError`]; it may have been said all the same.
    fn beat(&self, seen: Revision) -> BoxFuture<'_, Result<bool, ReadError>>;

    /// Strikes out a node that is as it was when it was read.
    ///
    /// # Errors
    /// [`ReadError`]; it may be gone all the same.
    fn strike<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<(), ReadError>>;
}
