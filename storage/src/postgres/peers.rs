//! Who else has the store open: the table `nodes`.

use std::sync::Arc;

use futures::future::{BoxFuture, join};
use tokio_postgres::Row;

use super::{
    Inner, Postgres,
    failure::Failure,
    group::{big, column, number},
    joined, snapshot,
    statements::Query,
};
use crate::{Look, Peer, Peers, ReadError, Revision, StoreError};

/// The longest name, in characters.
const MAX_NAME: usize = 255;

impl Peers for Postgres {
    fn id(&self) -> &str {
        &self.inner.context.instance
    }

    fn announce<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ReadError>> {
        let inner = Arc::clone(&self.inner);
        let name: String = name.chars().take(MAX_NAME).collect();
        joined(self.inner.handle.spawn(async move {
            snapshot::with(&inner, &inner.watchers, |lease| {
                let (id, name) = (inner.context.instance.as_str(), name.as_str());
                async move {
                    lease.connection.query(Query::Announce, &[&id, &name]).await?;
                    Ok(())
                }
            })
            .await
        }))
    }

    fn nodes(&self) -> BoxFuture<'_, Result<Vec<Peer>, ReadError>> {
        let inner = Arc::clone(&self.inner);
        joined(self.inner.handle.spawn(async move { nodes(&inner).await }))
    }

    fn look(&self, after: Revision, limit: usize) -> BoxFuture<'_, Result<Look, ReadError>> {
        let inner = Arc::clone(&self.inner);
        joined(self.inner.handle.spawn(async move {
            let changes = Box::pin(snapshot::changes(&inner, &inner.watchers, after, limit));
            let (changes, nodes) = join(changes, Box::pin(nodes(&inner))).await;
            Ok(Look { changes, nodes: nodes? })
        }))
    }

    fn beat(&self, seen: Revision) -> BoxFuture<'_, Result<bool, ReadError>> {
        let inner = Arc::clone(&self.inner);
        joined(self.inner.handle.spawn(async move {
            let seen = big(seen.0).map_err(|failure| ReadError::Store(failure.error))?;
            let told = snapshot::with(&inner, &inner.watchers, |lease| {
                let id = inner.context.instance.as_str();
                async move { lease.connection.query(Query::Beat, &[&id, &seen]).await }
            });
            Ok(!told.await?.is_empty())
        }))
    }

    fn strike<'a>(&'a self, peer: &'a Peer) -> BoxFuture<'a, Result<(), ReadError>> {
        let (inner, id, beats) = (Arc::clone(&self.inner), peer.id.clone(), peer.beats);
        joined(self.inner.handle.spawn(async move {
            let beats = i64::try_from(beats)
                .map_err(|_| ReadError::Store(StoreError::Damaged("the beats of a node".into())))?;
            snapshot::with(&inner, &inner.watchers, |lease| {
                let id = id.as_str();
                async move {
                    lease.connection.query(Query::Strike, &[&id, &beats]).await?;
                    Ok(())
                }
            })
            .await
        }))
    }
}

async fn nodes(inner: &Arc<Inner>) -> Result<Vec<Peer>, ReadError> {
    let rows = snapshot::with(inner, &inner.watchers, |lease| async move {
        let rows = lease.connection.query(Query::Nodes, &[]).await?;
        rows.iter().map(peer).collect::<Result<Vec<_>, Failure>>()
    });
    rows.await
}

fn peer(row: &Row) -> Result<Peer, Failure> {
    Ok(Peer {
        id: column(row, 0)?,
        name: column(row, 1)?,
        seen: Revision(number(Some(row), 2)?),
        beats: number(Some(row), 3)?,
    })
}
