//! The tasks behind the trail: each keeps what it holds until that is durable, exactly once.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use polykey_proto::polykey::record::v1::{AuditBody, AuditEvent};

use super::line::{Block, encode};
use super::trail::{Inner, Queued, Waiter};
use super::usage::read_bodies;
use crate::error::Error;

const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Makes data-plane events durable, block by block, until the trail closes and the queue is empty.
pub(super) async fn blocks(inner: Arc<Inner>) {
    loop {
        let closing = inner.closing.is_cancelled();
        let ready = {
            let state = inner.state.lock();
            state.queue.front().map(|q| !q.waiters.is_empty() || q.is_full(&inner.options))
        };
        let Some(ready) = ready else {
            if closing {
                return;
            }
            tokio::select! {
                () = inner.wake.notified() => {}
                () = inner.closing.cancelled() => {}
            }
            continue;
        };
        if !closing && !ready {
            tokio::select! {
                () = tokio::time::sleep(inner.options.linger) => {}
                () = inner.urgent.notified() => {}
                () = inner.closing.cancelled() => {}
            }
        }
        let (block, waiters) = take(&inner);
        let leaf = deliver(&inner, Events::Block(block.encoded())).await;
        {
            let mut state = inner.state.lock();
            state.usage.block(leaf, &block);
            state.in_flight = Arc::default();
            state.floor = None;
            state.bytes = state.bytes.saturating_sub(block.bytes());
        }
        for waiter in waiters {
            // Whoever has gone away has its event all the same.
            let _ = waiter.send(Ok(leaf));
        }
    }
}

fn take(inner: &Inner) -> (Arc<Block>, Vec<Waiter>) {
    let mut state = inner.state.lock();
    let Queued { events, waiters } = state.queue.pop_front().unwrap_or_default();
    let block = Arc::new(events.close());
    state.in_flight = Arc::clone(&block);
    state.floor = Some(inner.vault.leaves());
    (block, waiters)
}

/// What is to become durable.
#[derive(Clone, Copy)]
pub(super) enum Events<'a> {
    /// A block in its encoding: one leaf.
    Block(&'a Bytes),
    /// A leaf each.
    Each(&'a [AuditEvent]),
}

impl Events<'_> {
    /// Whether the first leaf of these has that body.
    fn are_in(&self, body: &AuditBody) -> bool {
        match self {
            Self::Block(encoded) => body.data_plane && encode(&body.events) == **encoded,
            Self::Each(events) => !body.data_plane && body.events.first() == events.first(),
        }
    }
}

/// Commits events until they are durable, and returns the index of their first leaf. After an
/// unknown outcome the log itself is asked whether they are there.
async fn deliver(inner: &Inner, events: Events<'_>) -> u64 {
    let floor = inner.vault.leaves();
    let mut pause = PAUSE;
    loop {
        let result = match events {
            Events::Block(encoded) => inner.vault.record_block(encoded.clone()).await,
            Events::Each(events) => inner.vault.record(events).await,
        };
        let error = match result {
            Ok(receipt) => {
                if let Some(leaf) = receipt.leaf {
                    inner.failing.store(false, Ordering::Relaxed);
                    return leaf;
                }
                Error::internal("events became no leaf")
            }
            Err(error @ Error::OutcomeUnknown { .. }) => {
                inner.failing.store(true, Ordering::Relaxed);
                match landed(inner, floor, events).await {
                    Some(leaf) => {
                        inner.failing.store(false, Ordering::Relaxed);
                        return leaf;
                    }
                    None => error,
                }
            }
            Err(error) => error,
        };
        if !inner.failing.swap(true, Ordering::Relaxed) {
            let cause = error.internal_text().unwrap_or("");
            tracing::error!(%error, cause, "audit events are not durable yet; trying again");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits until the store has been reopened, and looks for the events among the leaves from `floor`
/// on. Their request ids are their own, so equal events are these events.
async fn landed(inner: &Inner, floor: u64, events: Events<'_>) -> Option<u64> {
    let mut pause = PAUSE;
    loop {
        if inner.vault.writable() {
            match find(inner, floor, events).await {
                Ok(found) => return found,
                Err(error) => tracing::warn!(%error, "the audit log cannot be read yet"),
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

pub(super) async fn find(
    inner: &Inner,
    floor: u64,
    events: Events<'_>,
) -> Result<Option<u64>, Error> {
    let to = inner.vault.leaves();
    let mut next = floor;
    while next < to {
        let bodies = read_bodies(&inner.vault, next, to, 16).await?;
        if bodies.is_empty() {
            return Err(Error::data_loss(format!("audit leaf {next} is missing")));
        }
        for (leaf, body) in bodies {
            if events.are_in(&body) {
                return Ok(Some(leaf));
            }
            next = leaf + 1;
        }
    }
    Ok(None)
}

/// Writes counted denials out, until the trail closes and none is left.
pub(super) async fn denials(inner: Arc<Inner>) {
    loop {
        let closing = inner.closing.is_cancelled();
        let (due, waiting) = {
            let denials = &mut inner.state.lock().denials;
            (denials.due(closing, Instant::now()), denials.waiting())
        };
        for events in due.chunks(256) {
            let first = deliver(&inner, Events::Each(events)).await;
            let mut state = inner.state.lock();
            for (leaf, event) in (first..).zip(events) {
                state.usage.observed(leaf, event);
            }
        }
        if closing {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(50)), if waiting => {}
            () = inner.counted.notified(), if !waiting => {}
            () = inner.closing.cancelled() => {}
        }
    }
}

pub(super) async fn usage(inner: &Inner, all: bool) -> Result<(), Error> {
    let _one = inner.folding.lock().await;
    super::usage::flush(inner, all).await
}

/// Writes the use of keys and signs checkpoints, until the trail closes.
pub(super) async fn upkeep(inner: Arc<Inner>) {
    let mut rest = inner.options.usage_interval;
    let mut new_since: Option<Instant> = None;
    loop {
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = inner.closing.cancelled() => return,
        }
        let begun = Instant::now();
        if let Err(error) = usage(&inner, false).await {
            let cause = error.internal_text().unwrap_or("");
            tracing::warn!(%error, cause, "the use of keys was not written; trying again");
        }
        // A fifth of the time at most, so that writing the use never crowds out the use.
        rest = inner.options.usage_interval.max(begun.elapsed() * 4);
        let fresh = inner.vault.leaves().saturating_sub(inner.checkpointed.load(Ordering::Relaxed));
        if fresh == 0 {
            new_since = None;
            continue;
        }
        let since = *new_since.get_or_insert(begun);
        if fresh >= inner.options.checkpoint_leaves
            || since.elapsed() >= inner.options.checkpoint_interval
        {
            match inner.checkpoint().await {
                Ok(_) => new_since = None,
                Err(error) => tracing::warn!(%error, "no checkpoint was signed; trying again"),
            }
        }
    }
}
