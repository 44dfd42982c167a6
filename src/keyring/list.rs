//! Lists: one narrow row per key and grantee, so that a page costs the same in a store of any size.

use std::ops::Bound;
use std::sync::Arc;

use polykey_hsm::{MacPurpose, Ring};
use polykey_proto::polykey::record::v1::{KeyRecord, ListRow, VersionRecord};
use polykey_storage::Direction;
use prost::Message;

use super::rows::{EVERYONE, list_prefix, tag_hashes};
use super::{Key, KeyVersion, Keyring, MetadataView};
use crate::authz::Resource;
use crate::command::{ListKeys, ListStatus};
use crate::context::Context;
use crate::error::Error;
use crate::key::{self, KeyId, KeyState, Version, key_state, version_row};
use crate::limits::{COUNT, PAGE_DEFAULT, PAGE_SCAN};
use crate::time::Time;
use crate::vault::{Loaded, space};
use polykey_proto::polykey::record::v1::audit_event::Outcome;

/// Rows read at a time.
const STEP: usize = 512;
/// Keys loaded at a time: each may be large.
const SHOWN_STEP: usize = 100;
/// Bytes of rows that one page looks at before it returns short.
const PAGE_BYTES: usize = 2 * 1024 * 1024;

/// Bytes of keys that one page gives before it returns short: many clients take 4 MiB at most.
const ANSWER_BYTES: usize = 2 * 1024 * 1024;

/// A page of keys.
#[derive(Debug)]
pub struct Page {
    /// The keys, in order of their ids.
    pub keys: Vec<MetadataView>,
    /// Where the next page begins; empty = this was the last.
    pub next: String,
    /// Keys the caller may see, exact up to 10,000, damaged ones included.
    pub total: u32,
    /// Those of them that match, exact up to 10,000. A damaged list row matches no filter.
    pub filtered: u32,
    /// Keys that stand where this page does and are left out, because what is stored of them is damaged.
    pub damaged: u32,
}

/// The keys whose list rows make a page.
#[derive(Default)]
struct Place {
    ids: Vec<KeyId>,
    /// The last one looked at, if there is more behind it.
    last: Option<KeyId>,
    /// List rows that do not open.
    damaged: u32,
}

struct Filter {
    algorithms: Vec<u32>,
    statuses: Vec<ListStatus>,
    tags: Vec<u64>,
    after: Option<i64>,
    before: Option<i64>,
}

impl Filter {
    fn is_open(&self) -> bool {
        self.algorithms.is_empty()
            && self.statuses.is_empty()
            && self.tags.is_empty()
            && self.after.is_none()
            && self.before.is_none()
    }

    fn takes(&self, row: &ListRow, now: Time) -> bool {
        (self.algorithms.is_empty() || self.algorithms.contains(&row.algorithm))
            && self.after.is_none_or(|t| row.created_at >= t)
            && self.before.is_none_or(|t| row.created_at < t)
            && self.tags.iter().all(|t| row.tags.contains(t))
            && (self.statuses.is_empty() || self.statuses.iter().any(|s| has(row, *s, now)))
    }
}

/// Whether a key counts under a status: one with a staged version counts under two.
fn has(row: &ListRow, status: ListStatus, now: Time) -> bool {
    let record = KeyRecord {
        state: row.state,
        expires_at: row.expires_at,
        revoke_at: row.revoke_at,
        ..KeyRecord::default()
    };
    let is = match key_state(&record, now) {
        KeyState::Enabled => ListStatus::Active,
        KeyState::Expired if row.read_after_expiry => ListStatus::Deprecated,
        KeyState::Expired
        | KeyState::Disabled
        | KeyState::Revoked
        | KeyState::PendingDestruction
        | KeyState::Destroyed => ListStatus::Revoked,
    };
    is == status || (status == ListStatus::Rotating && is == ListStatus::Active && row.rotating)
}

/// What a page token says: where the page ended, and the counts of the first page.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) last: KeyId,
    pub(crate) total: u32,
    pub(crate) filtered: u32,
}

impl Keyring {
    /// One page of the keys the caller may see.
    ///
    /// # Errors
    /// [`Error::Denied`], or [`Error::Invalid`] for a page token that is not of this query.
    pub async fn list(&self, cx: &Context, query: &ListKeys) -> Result<Page, Error> {
        let permit = self.authorize(cx, Resource::Node, query).await?;
        let principal = if Self::sees_all(cx) { EVERYONE } else { cx.caller.client_id() };
        let prefix = list_prefix(&self.vault, principal);
        let filter = self.filter(query);
        let digest = self.query_digest(cx, principal, query);
        let cursor = match query.page_token.as_str() {
            "" => None,
            token => Some(Cursor::open(&self.vault.ring(), token, &digest)?),
        };
        let size = if query.page_size == 0 { PAGE_DEFAULT } else { query.page_size } as usize;

        let (total, filtered) = match &cursor {
            Some(cursor) => (cursor.total, cursor.filtered),
            None => self.count(&prefix, &filter, cx.now).await?,
        };
        let mut start = prefix.to_vec();
        let start = match &cursor {
            None => Bound::Included(start),
            Some(cursor) => {
                start.extend_from_slice(&cursor.last.bytes());
                Bound::Excluded(start)
            }
        };
        let Place { ids, mut last, mut damaged } =
            self.page(&prefix, start, &filter, size, cx.now).await?;
        let mut keys = Vec::with_capacity(ids.len());
        let (mut seen, mut bytes) = (0, 0);
        'steps: for step in ids.chunks(SHOWN_STEP) {
            for (view, id) in self.listed(cx, step).await?.into_iter().zip(step) {
                seen += 1;
                let view = match view {
                    Ok(Some(view)) => view,
                    Ok(None) => continue,
                    Err(Error::DataLoss { internal }) => {
                        // The vault has named a row that does not open; this may be what stands in one.
                        tracing::debug!(key = %id, internal, "left a damaged key out of a list");
                        damaged += 1;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                bytes += view.key.record.encoded_len();
                keys.push(view);
                if bytes >= ANSWER_BYTES && seen < ids.len() {
                    last = Some(*id);
                    break 'steps;
                }
            }
        }
        let next = match last {
            Some(last) => Cursor { last, total, filtered }.seal(&self.vault.ring(), &digest),
            None => String::new(),
        };
        let decision = permit.decision_id().to_string();
        let event = cx.origin().event("ListKeys", None, Outcome::Success, 0, &decision);
        self.trail.used(event).await?;
        Ok(Page { keys, next, total, filtered, damaged })
    }

    fn filter(&self, query: &ListKeys) -> Filter {
        Filter {
            algorithms: query.algorithms.iter().map(|a| u32::from(a.code())).collect(),
            statuses: query.statuses.clone(),
            tags: query
                .tags
                .iter()
                .map(|(k, v)| {
                    let [tag, name] = tag_hashes(&self.vault, k, v);
                    // An empty value asks for any value.
                    if v.is_empty() { name } else { tag }
                })
                .collect(),
            after: query.created_after.map(Time::micros),
            before: query.created_before.map(Time::micros),
        }
    }

    /// What is shown of several keys, whose ids ascend, each for itself; nothing of those that are
    /// not there or not visible. Read from one snapshot past the caches, which a walk over all keys
    /// must not empty.
    async fn listed(
        &self,
        cx: &Context,
        ids: &[KeyId],
    ) -> Result<Vec<Result<Option<MetadataView>, Error>>, Error> {
        let at = self.vault.steady().await?;
        let rows: Vec<Vec<u8>> = ids.iter().map(|id| id.bytes().to_vec()).collect();
        let mut keys = Vec::with_capacity(ids.len());
        for loaded in self.vault.get_many::<KeyRecord>(&at, &rows).await? {
            keys.push(self.seen(cx, loaded).await);
        }
        let there = || keys.iter().flatten().flatten();
        let rows: Vec<Vec<u8>> = there().map(|(key, v)| version_row(key.id, *v)).collect();
        let versions = self.vault.get_many::<VersionRecord>(&at, &rows).await?;
        let shown: Vec<KeyId> = there().map(|(key, _)| key.id).collect();
        let usage = self.trail.access_many(&at, &shown).await?;
        drop(at);
        let mut versions = versions.into_iter().zip(usage);
        let mut views = Vec::with_capacity(ids.len());
        for key in keys {
            let key = match key {
                Ok(Some((key, _))) => Arc::new(key),
                Ok(None) => {
                    views.push(Ok(None));
                    continue;
                }
                Err(error) => {
                    views.push(Err(error));
                    continue;
                }
            };
            let Some((version, usage)) = versions.next() else { break };
            let version = match version {
                // A list shows nothing of the material.
                Ok(Some(Loaded { record, .. })) => {
                    Ok(Arc::new(KeyVersion { record, blob: bytes::Bytes::new() }))
                }
                Ok(None) => self.shown_version(&key, 0).await,
                Err(error) => Err(error),
            };
            views.push(
                version.and_then(|version| Ok(Some(self.view_with(cx, &key, &version, usage?)))),
            );
        }
        Ok(views)
    }

    /// A key of a list, and its primary version. The list row and the key may be of different moments:
    /// visibility is asked of the key, before anything is done for it.
    async fn seen(
        &self,
        cx: &Context,
        loaded: Result<Option<Loaded<KeyRecord>>, Error>,
    ) -> Result<Option<(Key, Version)>, Error> {
        let Some(Loaded { record, .. }) = loaded? else { return Ok(None) };
        let known = super::known(&record)?;
        if !crate::authz::visible(&cx.caller.facts, &known.2) {
            return Ok(None);
        }
        let key = self.key_of(Some(cx.caller.client_id()), record, known).await?;
        let version = key::pick_version(&key.record, 0).map_err(Error::State)?;
        Ok(Some((key, version)))
    }

    /// The keys of a page.
    async fn page(
        &self,
        prefix: &[u8; 16],
        mut start: Bound<Vec<u8>>,
        filter: &Filter,
        size: usize,
        now: Time,
    ) -> Result<Place, Error> {
        let end = end_of(prefix);
        let mut place = Place::default();
        let (mut seen, mut bytes) = (0, 0);
        loop {
            let range = (start, end.clone());
            // Where every row counts, one more than are still wanted tell whether there is more.
            let wanted = size.saturating_sub(place.ids.len()).saturating_add(1);
            let step = if filter.is_open() { wanted.min(STEP) } else { STEP };
            let rows = self.vault.scan_each::<ListRow>(range, Direction::Forward, step).await?;
            let more = rows.len() == step;
            let mut last = None;
            let total = rows.len();
            for (i, (row, loaded)) in rows.into_iter().enumerate() {
                seen += 1;
                bytes += row.len();
                let Some(id) = row.get(16..).and_then(KeyId::from_slice) else { continue };
                match loaded {
                    Ok(loaded) => {
                        bytes += loaded.record.encoded_len();
                        if filter.takes(&loaded.record, now) {
                            place.ids.push(id);
                        }
                    }
                    Err(_) => place.damaged += 1,
                }
                last = Some(row);
                let full = place.ids.len() == size || seen >= PAGE_SCAN || bytes >= PAGE_BYTES;
                if full {
                    let behind = more || i + 1 < total;
                    place.last = behind.then_some(id);
                    return Ok(place);
                }
            }
            match last {
                Some(row) if more => start = Bound::Excluded(row),
                _ => return Ok(place),
            }
        }
    }

    /// How many rows there are and how many match, both exact up to [`COUNT`].
    async fn count(
        &self,
        prefix: &[u8; 16],
        filter: &Filter,
        now: Time,
    ) -> Result<(u32, u32), Error> {
        let end = end_of(prefix);
        let mut start = Bound::Included(prefix.to_vec());
        let clamp = |n: usize| u32::try_from(n.min(COUNT)).unwrap_or(0);
        if filter.is_open() {
            let total = self.vault.count(space::LIST, (start, end), COUNT).await?;
            return Ok((clamp(total), clamp(total)));
        }
        let (mut total, mut filtered) = (0_usize, 0_usize);
        for _ in 0..PAGE_SCAN.div_ceil(STEP) {
            let range = (start, end.clone());
            let rows = self.vault.scan_each::<ListRow>(range, Direction::Forward, STEP).await?;
            let opened = rows.iter().filter_map(|(_, loaded)| loaded.as_ref().ok());
            filtered += opened.filter(|loaded| filter.takes(&loaded.record, now)).count();
            total += rows.len();
            let more = rows.len() == STEP && (total < COUNT || filtered < COUNT);
            match rows.into_iter().next_back() {
                Some((last, _)) if more => start = Bound::Excluded(last),
                _ => break,
            }
        }
        Ok((clamp(total), clamp(filtered)))
    }

    fn query_digest(&self, cx: &Context, principal: &str, query: &ListKeys) -> [u8; 32] {
        let ListKeys {
            page_size: _,
            page_token: _,
            algorithms,
            statuses,
            tags,
            created_after,
            created_before,
        } = query;
        let text =
            format!("{algorithms:?}|{statuses:?}|{tags:?}|{created_after:?}|{created_before:?}");
        self.vault.ring().mac(
            MacPurpose::PageToken,
            &[b"query", cx.caller.client_id().as_bytes(), principal.as_bytes(), text.as_bytes()],
        )
    }
}

impl Cursor {
    /// The token of this place in the list that `digest` tells apart.
    pub(crate) fn seal(&self, ring: &Ring, digest: &[u8; 32]) -> String {
        let mut token = vec![1];
        token.extend_from_slice(&self.last.bytes());
        token.extend_from_slice(&self.total.to_be_bytes());
        token.extend_from_slice(&self.filtered.to_be_bytes());
        let mac = ring.mac(MacPurpose::PageToken, &[b"token", &token, digest]);
        token.extend_from_slice(&mac);
        data_encoding::BASE64URL_NOPAD.encode(&token)
    }

    /// The place that a token of this list names.
    pub(crate) fn open(ring: &Ring, token: &str, digest: &[u8; 32]) -> Result<Self, Error> {
        let bad =
            || Error::invalid("page_token", "is not one of this query's; begin again without it");
        let bytes = data_encoding::BASE64URL_NOPAD.decode(token.as_bytes()).map_err(|_| bad())?;
        let (body, mac) = bytes.split_last_chunk::<32>().ok_or_else(bad)?;
        if !ring.verify_mac(MacPurpose::PageToken, &[b"token", body, digest], mac) {
            return Err(bad());
        }
        let &[1, ref rest @ ..] = body else { return Err(bad()) };
        let (id, rest) = rest.split_first_chunk::<16>().ok_or_else(bad)?;
        let (total, rest) = rest.split_first_chunk::<4>().ok_or_else(bad)?;
        let filtered: [u8; 4] = rest.try_into().map_err(|_| bad())?;
        Ok(Self {
            last: KeyId::from_slice(id).ok_or_else(bad)?,
            total: u32::from_be_bytes(*total),
            filtered: u32::from_be_bytes(filtered),
        })
    }
}

fn end_of(prefix: &[u8; 16]) -> Bound<Vec<u8>> {
    let mut end = prefix.to_vec();
    end.extend_from_slice(&[0xff; 17]);
    Bound::Excluded(end)
}

/// What the list is about, for tests.
#[cfg(test)]
mod tests {
    use super::*;
    use polykey_proto::polykey::record::v1::key_record::State;

    #[test]
    fn a_key_counts_under_what_is_true_of_it_now() {
        let now = Time::from_seconds(1_000);
        let row = |state: State, expires: i64, revoke: i64, after: bool, rotating| ListRow {
            state: state.into(),
            expires_at: expires * 1_000_000,
            revoke_at: revoke * 1_000_000,
            read_after_expiry: after,
            rotating,
            ..ListRow::default()
        };
        let all =
            [ListStatus::Active, ListStatus::Rotating, ListStatus::Deprecated, ListStatus::Revoked];
        let under = |row: &ListRow| -> Vec<ListStatus> {
            all.into_iter().filter(|s| has(row, *s, now)).collect()
        };
        assert_eq!(under(&row(State::Enabled, 0, 0, false, false)), [ListStatus::Active]);
        assert_eq!(
            under(&row(State::Enabled, 0, 0, false, true)),
            [ListStatus::Active, ListStatus::Rotating]
        );
        assert_eq!(under(&row(State::Enabled, 999, 0, false, false)), [ListStatus::Revoked]);
        assert_eq!(under(&row(State::Enabled, 999, 0, true, true)), [ListStatus::Deprecated]);
        assert_eq!(under(&row(State::Enabled, 0, 1000, false, false)), [ListStatus::Revoked]);
        assert_eq!(under(&row(State::Disabled, 0, 0, false, false)), [ListStatus::Revoked]);
        assert_eq!(under(&row(State::Destroyed, 0, 0, false, false)), [ListStatus::Revoked]);
    }
}
