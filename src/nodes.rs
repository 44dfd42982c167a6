//! Several nodes on one store: each follows what the others change, and waits with its own
//! acknowledgements until they know.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use polykey_hsm::{BoxFuture, KeyWrapper};
use polykey_storage::{ChangesError, Health, Peer, Peers, Revision, RowKey, Store, StoreError};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::WhenFenced;
use crate::custody::Custody;
use crate::error::Error;
use crate::vault::freshness::{LONGEST_LEASE, Moment};
use crate::vault::space::{META, meta};
use crate::vault::{Freshness, Invalidate, Vault, Witness};

/// How often a node looks.
const LOOK: Duration = Duration::from_millis(50);
/// How often it does while somebody waits for others.
const EAGER: Duration = Duration::from_millis(10);
/// A node that has nothing to tell says so this often.
const BEAT: Duration = Duration::from_secs(2);
/// A node that could not say anything for so long serves nothing.
const SILENT: Duration = Duration::from_secs(5);
/// A node that has said nothing for so long, as another one sees it, has no lease any more.
const LAPSED: Duration = Duration::from_secs(10);
/// After so long it is struck out.
const GONE: Duration = Duration::from_secs(60);
/// Clocks of two machines run at the same speed but for this part of a lease.
const DRIFT: Duration = Duration::from_millis(50);
/// Revisions read in one look.
const REVISIONS: usize = 1_000;

/// The nodes of a store, as this one sees them.
pub struct Nodes {
    store: Arc<dyn Store>,
    vault: Arc<Vault>,
    custody: Arc<Custody>,
    wrappers: Vec<Arc<dyn KeyWrapper>>,
    caches: Arc<dyn Invalidate>,
    freshness: Arc<Freshness>,
    name: String,
    when_fenced: WhenFenced,
    /// When each other node has last shown itself, and by which beat.
    shown: Mutex<HashMap<String, (u64, Instant)>>,
    /// The last revision that all others have seen, as of a moment ago.
    seen: tokio::sync::Mutex<Option<(Instant, Revision)>>,
    announced: AtomicBool,
}

/// Where a node is in following the others.
#[derive(Default)]
struct Following {
    /// Nothing remembered is older than this. None before the first look.
    seen: Option<Revision>,
    told: Option<(Revision, Moment)>,
}

impl Nodes {
    /// The nodes of the vault's store, if it can have several. `caches` remember its rows.
    #[must_use]
    pub fn new(
        custody: &Arc<Custody>,
        wrappers: Vec<Arc<dyn KeyWrapper>>,
        caches: Arc<dyn Invalidate>,
        (name, when_fenced): (String, WhenFenced),
        freshness: Arc<Freshness>,
    ) -> Option<Arc<Self>> {
        let vault = Arc::clone(custody.vault());
        let store = Arc::clone(vault.store());
        store.peers()?;
        Some(Arc::new(Self {
            store,
            vault,
            custody: Arc::clone(custody),
            wrappers,
            caches,
            freshness,
            name,
            when_fenced,
            shown: Mutex::default(),
            seen: tokio::sync::Mutex::default(),
            announced: AtomicBool::new(false),
        }))
    }

    fn peers(&self) -> Result<&dyn Peers, Error> {
        self.store.peers().ok_or_else(|| Error::internal("a store without nodes"))
    }

    /// The announced nodes, this one among them, and which of them is this one.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn list(&self) -> Result<(Vec<Peer>, String), Error> {
        let peers = self.peers()?;
        Ok((peers.nodes().await?, peers.id().to_owned()))
    }

    /// Returns when this node knows what the others have changed, or after 10 s: it refuses then what
    /// it cannot answer for.
    pub async fn ready(&self) {
        if tokio::time::timeout(LAPSED, self.freshness.first_look()).await.is_err() {
            tracing::warn!("this node listens, and cannot tell yet what others have changed");
        }
    }

    /// Follows the other nodes until `stop`, and leaves.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut following = Following::default();
        let mut failing = false;
        while !stop.is_cancelled() {
            let result = tokio::select! {
                result = self.look(&mut following) => result,
                () = stop.cancelled() => break,
            };
            match result {
                Ok(()) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!("this node knows what others change again");
                    }
                }
                Err(error) => {
                    let why =
                        error.internal_text().map_or_else(|| error.to_string(), str::to_owned);
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(why, "this node cannot tell what others change");
                    }
                    self.freshness.failed(why);
                }
            }
            let pause = if failing { LOOK * 2 } else { LOOK };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.freshness.wanted(), if !failing => {}
                () = stop.cancelled() => {}
            }
        }
        self.leave().await;
    }

    /// Serves nothing any more, and says so.
    async fn leave(&self) {
        self.freshness.end("it has left");
        if !self.announced.load(Ordering::SeqCst) {
            return;
        }
        let left = async {
            let (nodes, id) = self.list().await?;
            if let Some(own) = nodes.iter().find(|node| node.id == id) {
                self.peers()?.strike(own).await?;
            }
            Ok::<_, Error>(())
        };
        // Nobody waits for longer than a lease if this fails.
        let left = tokio::time::timeout(LONGEST_LEASE, left).await;
        if !matches!(left, Ok(Ok(()))) {
            tracing::debug!("this node is still announced, and will be struck out by another");
        }
    }

    /// One look: forgets what others have changed, and renews the lease.
    async fn look(&self, following: &mut Following) -> Result<(), Error> {
        let peers = self.peers()?;
        self.not_fenced()?;
        if !self.announced.load(Ordering::SeqCst) {
            peers.announce(&self.name).await?;
            self.announced.store(true, Ordering::SeqCst);
            *following = Following::default();
        }
        let began = Moment::now();
        let seen = match following.seen {
            Some(seen) => seen,
            None => self.begin_anew().await?,
        };
        let look = peers.look(seen, REVISIONS).await?;
        if look.nodes.iter().all(|node| node.id != peers.id()) {
            // Struck out, because it was silent for long: nobody waits for it.
            self.announced.store(false, Ordering::SeqCst);
            self.freshness.end("it was silent for long, and begins anew");
            return Err(Error::unavailable("another node has struck this one out"));
        }
        self.note(&look.nodes, peers.id()).await;
        let changes = match look.changes {
            Ok(changes) => changes,
            Err(ChangesError::Trimmed { .. }) => {
                following.seen = None;
                return Err(Error::unavailable(
                    "more has changed than is listed; reading it again",
                ));
            }
            Err(ChangesError::Ahead { current }) => {
                return Err(Error::unavailable(format!(
                    "the database is back at revision {current}, and {seen} was seen"
                )));
            }
            Err(ChangesError::Read(error)) => return Err(error.into()),
        };
        let whole = changes.len() < REVISIONS;
        let last = changes.last().map_or(seen, |(revision, _)| *revision);
        let rows: Vec<&RowKey> = changes.iter().flat_map(|(_, rows)| rows).collect();
        if last > seen {
            // The root first: what cannot be opened yet is not to be remembered as missing.
            if rows.iter().any(|row| row.space == META && row.key == meta::SLOTS) {
                self.custody.follow(&self.wrappers).await?;
                self.caches.clear();
            } else {
                self.caches.invalidate(&rows);
            }
            self.vault.follow_head().await?;
        }
        following.seen = Some(last);
        if !whole {
            self.freshness.looked(Moment::default());
            return Ok(());
        }
        // Others wait only for a node that has shown itself a short while ago.
        let heard =
            |told: Option<(Revision, Moment)>| told.is_some_and(|(_, at)| at.elapsed() < SILENT);
        if heard(following.told) {
            self.freshness.looked(began);
        }
        let due = |(told, at): (Revision, Moment)| told < last || at.elapsed() >= BEAT;
        if following.told.is_none_or(due) {
            // Before it is sent: it may be committed at once and answered late.
            let at = Moment::now();
            if !peers.beat(last).await? {
                self.announced.store(false, Ordering::SeqCst);
                return Ok(());
            }
            // The next look, begun when others count on this node again, gives the lease.
            following.told = Some((last, at));
        }
        Ok(())
    }

    /// Forgets everything, and begins with the store as it is now.
    async fn begin_anew(&self) -> Result<Revision, Error> {
        let revision = self.store.snapshot().await?.revision();
        self.caches.clear();
        self.custody.follow(&self.wrappers).await?;
        self.vault.follow_head().await?;
        Ok(revision)
    }

    fn not_fenced(&self) -> Result<(), Error> {
        let Health::NeedsReopen(StoreError::Fenced { own, current }) = self.store.status().health
        else {
            return Ok(());
        };
        if self.when_fenced == WhenFenced::Read {
            return Ok(());
        }
        let why =
            format!("another node was promoted: epoch {current} writes, and this node had {own}");
        self.freshness.end(&why);
        Err(Error::unavailable(why))
    }

    /// Notes who has shown itself, and strikes out who has not for long.
    async fn note(&self, nodes: &[Peer], own: &str) {
        let gone: Vec<Peer> = {
            let now = Instant::now();
            let mut shown = self.shown.lock();
            shown.retain(|id, _| nodes.iter().any(|node| node.id == *id));
            let mut gone = Vec::new();
            for node in nodes.iter().filter(|node| node.id != own) {
                let at = shown.entry(node.id.clone()).or_insert((node.beats, now));
                if at.0 != node.beats {
                    *at = (node.beats, now);
                }
                if at.1.elapsed() >= GONE {
                    gone.push(node.clone());
                }
            }
            gone
        };
        for node in gone {
            tracing::warn!(node = node.id, name = node.name, "a node has been silent for long");
            if let Ok(peers) = self.peers()
                && let Err(error) = peers.strike(&node).await
            {
                tracing::debug!(%error, "a node that is gone could not be struck out");
            }
        }
    }

    /// The last revision that every other node has seen whose lease may not have ended.
    async fn seen_by_all(&self, wanted: Revision) -> Option<Revision> {
        let mut known = self.seen.lock().await;
        if let Some((at, seen)) = *known {
            if seen >= wanted {
                return Some(seen);
            }
            tokio::time::sleep_until(at + EAGER).await;
        }
        let peers = self.peers().ok()?;
        let nodes = peers.nodes().await.ok()?;
        self.note(&nodes, peers.id()).await;
        let shown = self.shown.lock();
        let lapsed =
            |node: &Peer| shown.get(&node.id).is_some_and(|(_, at)| at.elapsed() >= LAPSED);
        let others = nodes.iter().filter(|node| node.id != peers.id() && !lapsed(node));
        // One that joins later begins with what is committed by then.
        let seen = others.map(|node| node.seen).min().unwrap_or(wanted).min(wanted);
        *known = Some((Instant::now(), seen));
        Some(seen)
    }
}

impl Witness for Nodes {
    fn witness(&self, revision: Revision, urgent: bool) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if !urgent {
                return Ok(());
            }
            // Whatever lease another node has without having seen this began before now.
            let lapsed = Instant::now() + LONGEST_LEASE + DRIFT;
            let seen = async {
                while self.seen_by_all(revision).await.is_none_or(|seen| seen < revision) {
                    tokio::time::sleep(EAGER).await;
                }
            };
            // Late, every node has looked since or serves nothing.
            let _ = tokio::time::timeout_at(lapsed, seen).await;
            Ok(())
        })
    }
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nodes").field("name", &self.name).finish_non_exhaustive()
    }
}
