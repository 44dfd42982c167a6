//! Reading the log: pages in both directions, following it, and the history of one key.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use futures::Stream;
use polykey_hsm::{MacPurpose, Ring};
use polykey_proto::polykey::record::v1::{AuditBody, AuditEvent, AuditLeaf};
use polykey_storage::Direction;
use serde::Serialize;

use super::archive::{self, Archive};
use super::event::{CLAIMED, Outcome};
use super::trail::Trail;
use super::usage::{is_making, open_body};
use crate::error::Error;
use crate::key::KeyId;
use crate::time::Time;
use crate::vault::{Loaded, Vault};

/// Most events a page looks at, and most leaves: then it returns short, with a token.
const EXAMINED: usize = 50_000;
const LEAVES: usize = 10_000;
/// How often a follower looks for new leaves. The look is one load of an atomic.
const POLL: Duration = Duration::from_millis(100);

/// Which events. One must pass all that is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// At this time or later.
    pub since: Option<Time>,
    /// Before this time.
    pub until: Option<Time>,
    /// Of this client, or of a stranger who claimed to be it; empty = all.
    pub client: String,
    /// This action; `Rotate*` is every one that begins so; empty = all.
    pub action: String,
    /// Of this key.
    pub key: Option<KeyId>,
    /// That ended so.
    pub outcome: Option<Outcome>,
    /// One of whose details has this value: a hash; empty = all.
    pub value_hash: String,
}

impl Filter {
    /// Whether an event passes.
    #[must_use]
    pub fn passes(&self, event: &AuditEvent) -> bool {
        let time = Time::from_micros(event.time);
        let action = self.action.strip_suffix('*').map_or_else(
            || self.action.is_empty() || event.action == self.action,
            |prefix| event.action.starts_with(prefix),
        );
        let client = self.client.is_empty()
            || event.client_id == self.client
            || event.details.get(CLAIMED) == Some(&self.client);
        action
            && client
            && self.since.is_none_or(|since| time >= since)
            && self.until.is_none_or(|until| time < until)
            && self.key.is_none_or(|key| event.key_id.as_ref() == key.bytes())
            && self.outcome.is_none_or(|outcome| event.outcome() == outcome)
            && (self.value_hash.is_empty()
                || event.details.values().any(|value| *value == self.value_hash))
    }

    fn fingerprint(&self) -> Vec<u8> {
        let Self { since, until, client, action, key, outcome, value_hash } = self;
        let mut out = Vec::new();
        for time in [since, until] {
            out.extend_from_slice(&time.map_or(-1, Time::micros).to_be_bytes());
        }
        for text in [client, action, value_hash] {
            out.extend_from_slice(&(text.len() as u64).to_be_bytes());
            out.extend_from_slice(text.as_bytes());
        }
        out.extend_from_slice(&outcome.map_or(-1, i32::from).to_be_bytes());
        out.extend(key.map(|key| key.bytes()).into_iter().flatten());
        out
    }
}

/// The order of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// From the newest backward.
    #[default]
    NewestFirst,
    /// From the start, or from an index, forward.
    OldestFirst,
}

/// An event and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Index of its leaf.
    pub index: u64,
    /// Its place in the leaf.
    pub position: u32,
    /// Whether the leaf is a block of data-plane events.
    pub data_plane: bool,
    /// The event.
    pub event: AuditEvent,
}

/// Some events, and how to go on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// The events, in the order asked.
    pub events: Vec<Entry>,
    /// For the next page; empty after the last one. A page may be short, or empty, and not the last.
    pub next: String,
    /// Archives that have what belongs here and is no longer in the store.
    pub archives: Vec<Archive>,
}

impl Page {
    fn new(events: Vec<Entry>, next: String) -> Self {
        Self { events, next, archives: Vec::new() }
    }
}

/// New events.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The events that pass, oldest first.
    pub events: Vec<Entry>,
    /// The leaf from which to go on after a lost connection.
    pub next_index: u64,
}

/// An event as it is shown: `-o json`.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct EventView {
    /// Index of its leaf.
    pub index: u64,
    /// Its place in the leaf.
    pub position: u32,
    /// RFC 3339.
    pub time: String,
    /// The action.
    pub action: String,
    /// `success`, `denied` or `failed`.
    pub outcome: &'static str,
    /// google.rpc.Code of the answer.
    pub code: i32,
    /// The verified client; empty if there was none.
    pub client_id: String,
    /// The key, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_id: Option<String>,
    /// Its version; 0 if none was named.
    pub version: u32,
    /// The id of the request.
    pub request_id: String,
    /// The caller's own id for it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub correlation_id: String,
    /// The id of the authorization decision.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub decision_id: String,
    /// Without the port.
    pub peer_address: String,
    /// Hexadecimal.
    pub certificate_sha256: String,
    /// How many events this one stands for.
    pub count: u32,
    /// Public facts.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

impl From<&Entry> for EventView {
    fn from(entry: &Entry) -> Self {
        let event = &entry.event;
        let outcome = match event.outcome() {
            Outcome::Unspecified => "unspecified",
            Outcome::Success => "success",
            Outcome::Denied => "denied",
            Outcome::Failed => "failed",
        };
        let key_id = (!event.key_id.is_empty()).then(|| {
            KeyId::from_slice(&event.key_id)
                .map_or_else(|| HEXLOWER.encode(&event.key_id), |id| id.to_string())
        });
        Self {
            index: entry.index,
            position: entry.position,
            time: Time::from_micros(event.time).to_string(),
            action: event.action.clone(),
            outcome,
            code: event.code,
            client_id: event.client_id.clone(),
            key_id,
            version: event.version,
            request_id: event.request_id.clone(),
            correlation_id: event.correlation_id.clone(),
            decision_id: event.decision_id.clone(),
            peer_address: event.peer_address.clone(),
            certificate_sha256: event.certificate_sha256.clone(),
            count: event.count.max(1),
            details: event.details.clone().into_iter().collect(),
        }
    }
}

/// Where to go on: forward from this event on, or backward over the events before it in its leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cursor {
    leaf: u64,
    position: u32,
}

fn token(vault: &Vault, order: Order, filter: &Filter, cursor: Cursor) -> String {
    let mut bytes = vec![u8::from(order == Order::OldestFirst)];
    bytes.extend_from_slice(&cursor.leaf.to_be_bytes());
    bytes.extend_from_slice(&cursor.position.to_be_bytes());
    let mac = vault.ring().mac(MacPurpose::PageToken, &[b"audit", &bytes, &filter.fingerprint()]);
    bytes.extend_from_slice(&mac);
    BASE64URL_NOPAD.encode(&bytes)
}

/// Whether `text` is a token of the whole list, newest first.
pub(crate) fn is_token(ring: &Ring, text: &str) -> bool {
    cursor(ring, Order::NewestFirst, &Filter::default(), text).is_ok()
}

fn cursor(ring: &Ring, order: Order, filter: &Filter, token: &str) -> Result<Cursor, Error> {
    let bad = || Error::invalid("page_token", "not a token of this list");
    let bytes = BASE64URL_NOPAD.decode(token.as_bytes()).map_err(|_| bad())?;
    let (body, mac) = bytes.split_at_checked(13).ok_or_else(bad)?;
    let parts: [&[u8]; 3] = [b"audit", body, &filter.fingerprint()];
    if !ring.verify_mac(MacPurpose::PageToken, &parts, mac) {
        return Err(bad());
    }
    let (kind, rest) = body.split_first().ok_or_else(bad)?;
    if (*kind == 1) != (order == Order::OldestFirst) {
        return Err(bad());
    }
    let (leaf, position) = rest.split_first_chunk::<8>().ok_or_else(bad)?;
    let position = position.try_into().map_err(|_| bad())?;
    Ok(Cursor { leaf: u64::from_be_bytes(*leaf), position: u32::from_be_bytes(position) })
}

pub(super) fn entries(
    index: u64,
    body: AuditBody,
) -> impl DoubleEndedIterator<Item = Entry> + ExactSizeIterator {
    let data_plane = body.data_plane;
    let numbered = body.events.into_iter().enumerate();
    numbered.map(move |(position, event)| Entry {
        index,
        position: u32::try_from(position).unwrap_or(u32::MAX),
        data_plane,
        event,
    })
}

/// Leaves from `from` on, in one direction. Few at a time: a block may be large. One that is archived has
/// no body.
async fn read(
    vault: &Vault,
    from: u64,
    direction: Direction,
    limit: usize,
) -> Result<Vec<(u64, Option<AuditBody>)>, Error> {
    let bound = Bound::Included(from.to_be_bytes().to_vec());
    let range = match direction {
        Direction::Forward => (bound, Bound::Unbounded),
        Direction::Backward => (Bound::Unbounded, bound),
    };
    let rows = vault.scan::<AuditLeaf>(range, direction, limit).await?;
    let body = |(key, leaf): &(Vec<u8>, Loaded<AuditLeaf>)| match key.as_slice().try_into() {
        Ok(key) if leaf.record.archived => Ok((u64::from_be_bytes(key), None)),
        _ => open_body(key, &leaf.record).map(|(index, body)| (index, Some(body))),
    };
    rows.iter().map(body).collect()
}

/// Where the log goes on behind a leaf that is archived.
async fn behind(vault: &Vault, archived: u64) -> Result<u64, Error> {
    let (kept, _) = archive::kept(vault).await?;
    if kept > archived {
        return Ok(kept);
    }
    Err(Error::data_loss(format!("audit leaf {archived} is archived, and no archive has it")))
}

/// A page in the making.
struct Collect<'f> {
    filter: &'f Filter,
    size: usize,
    events: Vec<Entry>,
    examined: usize,
    leaves: usize,
}

impl<'f> Collect<'f> {
    fn new(filter: &'f Filter, size: usize) -> Self {
        Self { filter, size: size.max(1), events: Vec::new(), examined: 0, leaves: 0 }
    }

    fn spent(&self) -> bool {
        self.events.len() >= self.size || self.examined >= EXAMINED || self.leaves >= LEAVES
    }

    /// Takes what passes; `Some` is the first entry there was no more room for.
    fn take(&mut self, entries: impl Iterator<Item = Entry>) -> Option<Entry> {
        self.leaves += 1;
        for entry in entries {
            if self.events.len() >= self.size {
                return Some(entry);
            }
            self.examined += 1;
            if self.filter.passes(&entry.event) {
                self.events.push(entry);
            }
        }
        None
    }
}

/// One step of a walk backward, in small bites where blocks may be large.
const BITE: usize = 16;

impl Trail {
    /// A page of events. `from` is the leaf to begin at, for the first page in the order
    /// [`Order::OldestFirst`]; a token carries its own position.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the token is not of this list and filter; [`Error::DataLoss`] if a leaf
    /// does not open; [`Error::Unavailable`] if the store cannot be read.
    pub async fn list(
        &self,
        filter: &Filter,
        order: Order,
        from: u64,
        size: usize,
        page_token: &str,
    ) -> Result<Page, Error> {
        let vault = self.vault();
        let start = match (page_token, order) {
            ("", Order::OldestFirst) => Cursor { leaf: from, position: 0 },
            ("", Order::NewestFirst) => {
                let Some(leaf) = vault.leaves().checked_sub(1) else {
                    return Ok(Page::default());
                };
                Cursor { leaf, position: u32::MAX }
            }
            (text, _) => cursor(&vault.ring(), order, filter, text)?,
        };
        match order {
            Order::OldestFirst => self.forward(filter, start, size).await,
            Order::NewestFirst => self.backward(filter, start, size, &[]).await,
        }
    }

    /// Archives with leaves from `from` on that may hold what passes.
    async fn elsewhere(&self, filter: &Filter, from: u64) -> Result<Vec<Archive>, Error> {
        let mut archives = archive::list(self.vault()).await?;
        archives.retain(|archive| {
            archive.end > from && filter.since.is_none_or(|since| archive.until >= since)
        });
        Ok(archives)
    }

    async fn forward(&self, filter: &Filter, from: Cursor, size: usize) -> Result<Page, Error> {
        let vault = self.vault();
        let mut page = Collect::new(filter, size);
        let mut at = from;
        let mut archives = Vec::new();
        let on = |at| token(vault, Order::OldestFirst, filter, at);
        loop {
            let bodies = read(vault, at.leaf, Direction::Forward, BITE).await?;
            if bodies.is_empty() {
                return Ok(Page { events: page.events, next: String::new(), archives });
            }
            for (index, body) in bodies {
                let Some(body) = body else {
                    archives = self.elsewhere(filter, at.leaf).await?;
                    at = Cursor { leaf: behind(vault, index).await?, position: 0 };
                    break;
                };
                let skip = if index == at.leaf { at.position } else { 0 };
                let rest = page.take(entries(index, body).filter(|e| e.position >= skip));
                if let Some(Entry { index: leaf, position, .. }) = rest {
                    let next = on(Cursor { leaf, position });
                    return Ok(Page { events: page.events, next, archives });
                }
                at = Cursor { leaf: index + 1, position: 0 };
                if page.spent() {
                    let more = at.leaf < vault.leaves();
                    let next = if more { on(at) } else { String::new() };
                    return Ok(Page { events: page.events, next, archives });
                }
            }
        }
    }

    /// From the newest backward. Where `known` is not empty, all leaves from the least of them on
    /// that can hold something are among them, and the others are passed over.
    async fn backward(
        &self,
        filter: &Filter,
        from: Cursor,
        size: usize,
        known: &[u64],
    ) -> Result<Page, Error> {
        let vault = self.vault();
        let mut page = Collect::new(filter, size);
        let mut at = from;
        let on = |at| token(vault, Order::NewestFirst, filter, at);
        loop {
            let known = known.iter().copied().filter(|leaf| *leaf <= at.leaf).max();
            let bodies = match known {
                Some(leaf) => read(vault, leaf, Direction::Backward, 1).await?,
                None => read(vault, at.leaf, Direction::Backward, BITE).await?,
            };
            if bodies.is_empty() {
                return Ok(Page::new(page.events, String::new()));
            }
            for (index, body) in bodies {
                let Some(body) = body else {
                    behind(vault, index).await?;
                    let archives = self.elsewhere(filter, 0).await?;
                    return Ok(Page { events: page.events, next: String::new(), archives });
                };
                let before = if index == at.leaf { at.position } else { u32::MAX };
                let rest = page.take(entries(index, body).rev().filter(|e| e.position < before));
                if let Some(Entry { index: leaf, position, .. }) = rest {
                    let next = on(Cursor { leaf, position: position + 1 });
                    return Ok(Page::new(page.events, next));
                }
                // Nothing of a key is older than its making.
                let whole =
                    filter.key.is_some() && page.events.last().is_some_and(|e| is_making(&e.event));
                let Some(leaf) = index.checked_sub(1).filter(|_| !whole) else {
                    return Ok(Page::new(page.events, String::new()));
                };
                at = Cursor { leaf, position: u32::MAX };
                if page.spent() {
                    return Ok(Page::new(page.events, on(at)));
                }
            }
        }
    }

    /// What happened to a key, newest first, back to its making. The last events are found by the
    /// key's own index; older ones by walking the log.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub async fn history(&self, key: &KeyId, size: usize, page_token: &str) -> Result<Page, Error> {
        let filter = Filter { key: Some(*key), ..Filter::default() };
        let vault = self.vault();
        let known: Vec<u64> = self.usage(key).await?.recent.iter().map(|e| e.leaf).collect();
        let start = if page_token.is_empty() {
            let Some(leaf) = vault.leaves().checked_sub(1) else {
                return Ok(Page::default());
            };
            Cursor { leaf, position: u32::MAX }
        } else {
            cursor(&vault.ring(), Order::NewestFirst, &filter, page_token)?
        };
        self.backward(&filter, start, size, &known).await
    }

    /// The events that pass, from leaf `from` on (or, without it, those that come next), as they
    /// become durable. It ends after an error.
    pub fn follow(
        self: &Arc<Self>,
        from: Option<u64>,
        filter: Filter,
    ) -> impl Stream<Item = Result<Batch, Error>> + Send + 'static {
        let next = from.unwrap_or_else(|| self.vault().leaves());
        let state = Some((Arc::clone(self), filter, next));
        futures::stream::unfold(state, |state| async move {
            let (trail, filter, mut next) = state?;
            loop {
                while trail.vault().leaves() <= next {
                    if trail.inner.closing.is_cancelled() {
                        return None;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(POLL) => {}
                        () = trail.inner.closing.cancelled() => {}
                    }
                }
                let bodies = match read(trail.vault(), next, Direction::Forward, BITE).await {
                    Ok(bodies) => bodies,
                    Err(error) => return Some((Err(error), None)),
                };
                if bodies.first().is_none_or(|(index, _)| *index != next) {
                    let missing = format!("audit leaf {next} is missing");
                    return Some((Err(Error::data_loss(missing)), None));
                }
                let mut events = Vec::new();
                for (index, body) in bodies {
                    let Some(body) = body else {
                        next = match behind(trail.vault(), index).await {
                            Ok(next) => next,
                            Err(error) => return Some((Err(error), None)),
                        };
                        break;
                    };
                    next = index + 1;
                    events.extend(entries(index, body).filter(|e| filter.passes(&e.event)));
                }
                if !events.is_empty() {
                    let batch = Batch { events, next_index: next };
                    return Some((Ok(batch), Some((trail, filter, next))));
                }
            }
        })
    }
}
