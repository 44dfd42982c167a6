//! Opening, opening again, and taking over.

use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::{
    Head, Inner, Outcome, SCHEMA,
    connection::{Cluster, Connection, Purpose},
    failure::{Backoff, Failure, Kind, within},
    group::{self, big},
    schema::{self, Refused},
    statements::Query,
};
use crate::{OpenError, Revision, StoreError};

/// Closes every connection, and begins anew with one that commits. While the database does not
/// answer it is asked again and again, until the time of a call is up.
pub(super) async fn reopen(inner: &Arc<Inner>) -> Result<Revision, OpenError> {
    let deadline = inner.deadline();
    // A group that is being committed ends by its own deadline.
    let Ok(mut writer) = timeout_at(deadline, inner.writer.lock()).await else {
        let error = StoreError::Unreachable("a commit is still waiting for it".into());
        return Err(inner.open_error(error));
    };
    *writer = None;
    let generation = {
        let mut known = inner.known.lock();
        known.generation = known.generation.saturating_add(1);
        known.generation
    };
    inner.readers.close();
    inner.watchers.close();
    let mut backoff = Backoff::new();
    loop {
        let refused = match open(inner, generation, deadline).await {
            Ok(connection) => {
                *writer = Some(connection);
                let mut known = inner.known.lock();
                known.failure = None;
                return match known.fenced_by {
                    None => Ok(known.revision),
                    Some(current) => {
                        let own = known.epoch;
                        Err(inner.open_error(StoreError::Fenced { own, current }))
                    }
                };
            }
            Err(refused) => refused,
        };
        if let Refused::Failed(failure) = &refused
            && matches!(failure.kind, Kind::Serialization | Kind::Lost)
            && backoff.pause(deadline).await
        {
            continue;
        }
        let path = inner.context.target.name.clone().into();
        let error = match refused {
            Refused::Newer(found) => OpenError::NewerFormat { path, found, supported: SCHEMA },
            Refused::Failed(failure) => OpenError::Store { path, error: failure.error },
        };
        let reason = match &error {
            OpenError::Store { error, .. } => error.clone(),
            other => StoreError::Other(other.to_string()),
        };
        inner.known.lock().failure = Some(reason);
        return Err(error);
    }
}

async fn open(
    inner: &Arc<Inner>,
    generation: u64,
    deadline: Instant,
) -> Result<Connection, Refused> {
    let connection =
        Connection::open(&inner.context, Purpose::Writing, generation, deadline).await?;
    check(inner, &connection, deadline).await?;
    let options = inner.options();
    let names = (options.schema.as_str(), options.quoted_schema());
    let prepared = schema::prepare(&connection, (names.0, &names.1), deadline).await;
    prepared.map_err(|refused| match refused {
        Refused::Failed(mut failure) => {
            failure.error = schema::explained(failure.error, &options.schema);
            Refused::Failed(failure)
        }
        newer @ Refused::Newer(_) => newer,
    })?;
    let outcome = settle(inner, &connection, deadline).await?;
    let head = within(deadline, async {
        connection.prepare_all(Purpose::Writing).await?;
        group::head(&connection.query(Query::Head, &[]).await?)
    })
    .await?;
    admit(inner, &connection.cluster, &head)?;
    let mut known = inner.known.lock();
    if outcome.is_some() {
        known.outcome = outcome;
        known.in_doubt = None;
    }
    drop(known);
    Ok(connection)
}

// Finds out what became of the group whose outcome is unknown. The write waits for a transaction that
// may still be committing, and whatever has not committed by then cannot any more: it would change
// a row that has changed.
async fn settle(
    inner: &Inner,
    connection: &Connection,
    deadline: Instant,
) -> Result<Option<Outcome>, Failure> {
    let (in_doubt, epoch) = {
        let known = inner.known.lock();
        (known.in_doubt, known.epoch)
    };
    let Some(in_doubt) = in_doubt else { return Ok(None) };
    within(deadline, async {
        connection.end_earlier_sessions().await?;
        // Touches nothing under a later epoch: raising it did the same.
        connection.query(Query::Settle, &[&big(epoch)?]).await?;
        let found = connection.query(Query::GroupOf, &[&big(in_doubt.revision.0)?]).await?;
        let durable = match found.first() {
            Some(row) => group::column::<&[u8]>(row, 0)? == in_doubt.group,
            None => false,
        };
        Ok(Some(Outcome { revision: in_doubt.revision, durable }))
    })
    .await
}

// Compares the store with the one that was opened before, or notes it if there was none.
fn admit(inner: &Inner, cluster: &Cluster, head: &Head) -> Result<(), Failure> {
    let floor = {
        let mut known = inner.known.lock();
        known.kind = if cluster.cockroach { "cockroachdb" } else { "postgres" };
        if known.id == [0; 16] {
            known.id = head.id;
            known.epoch = inner.options().epoch.unwrap_or(head.epoch);
        }
        known.rows = head.rows;
        known.revision
    };
    inner.check_head(head, floor)
}

/// Whether a connection may commit: who answers is who was opened, and keeps what it acknowledges.
pub(super) async fn check(
    inner: &Inner,
    connection: &Connection,
    deadline: Instant,
) -> Result<(), Failure> {
    check_cluster(inner, &connection.cluster)?;
    let durability = within(deadline, connection.durability()).await?;
    let weaknesses = durability.weaknesses();
    if inner.options().durable && !weaknesses.is_empty() {
        let why =
            format!("{} (ask its administrator, or set durable = false)", weaknesses.join(", "));
        return Err(Failure::answer(StoreError::NotDurable(why)));
    }
    inner.known.lock().durability = durability;
    Ok(())
}

/// Compares the cluster that answers with the one that answered first, or notes it.
pub(super) fn check_cluster(inner: &Inner, found: &Cluster) -> Result<(), Failure> {
    let mut known = inner.known.lock();
    let Some(pinned) = &mut known.cluster else {
        known.cluster = Some(found.clone());
        return Ok(());
    };
    if pinned.system != found.system || pinned.cockroach != found.cockroach {
        return Err(Failure::foreign(
            "another database cluster answers than the one that was opened: its system identifier \
             differs",
        ));
    }
    if let (Some(before), Some(now)) = (pinned.timeline, found.timeline) {
        if now < before {
            return Err(Failure::foreign(format!(
                "the server is on timeline {now}, and timeline {before} was seen: it is the old \
                 primary of a promotion"
            )));
        }
        pinned.timeline = Some(now);
    }
    Ok(())
}

/// Raises the epoch and writes under it.
pub(super) async fn take_over(inner: &Arc<Inner>) -> Result<u64, StoreError> {
    let deadline = inner.deadline();
    let mut writer = timeout_at(deadline, inner.writer.lock())
        .await
        .map_err(|_| StoreError::Unreachable("a commit is still waiting for it".into()))?;
    let mut backoff = Backoff::new();
    loop {
        let connection = group::connection(inner, &mut writer, deadline).await;
        let raised = match connection {
            Ok((connection, _)) => {
                let raised = within(deadline, connection.query(Query::TakeOver, &[])).await;
                *writer = connection.is_usable().then_some(connection);
                raised.and_then(|rows| group::number(rows.first(), 0))
            }
            Err(failure) => Err(failure),
        };
        match raised {
            Ok(epoch) => {
                let mut known = inner.known.lock();
                known.epoch = epoch;
                known.fenced_by = None;
                return Ok(epoch);
            }
            Err(failure)
                if failure.kind == Kind::Serialization && backoff.pause(deadline).await => {}
            Err(failure) => return Err(failure.error),
        }
    }
}
