//! Events as they wait: encoded where they are accepted, into the leaf that they will share.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::Range;

use bytes::Bytes;
use polykey_proto::polykey::record::v1::{AuditBody, AuditEvent};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};

use super::event::{Draft, Origin, Outcome, bounded};
use super::usage::Meaning;
use crate::authz::{Action, DecisionId};
use crate::key::KeyId;

/// The field of an `AuditBody` that events are.
pub(crate) const EVENTS: u32 = 3;
/// Where a byte of tag and two of length usually end.
const HEADER: usize = 3;

/// An event on its way into the trail.
pub trait Entry {
    /// Appends it as one of the events of an `AuditBody`.
    fn append(&self, out: &mut Vec<u8>);
    /// What it means to its key.
    fn meaning(&self) -> Meaning;
}

impl Entry for AuditEvent {
    fn append(&self, out: &mut Vec<u8>) {
        prost::encoding::message::encode(EVENTS, self, out);
    }

    fn meaning(&self) -> Meaning {
        Meaning::of(self)
    }
}

impl Entry for Draft {
    fn append(&self, out: &mut Vec<u8>) {
        self.as_event().append(out);
    }

    fn meaning(&self) -> Meaning {
        Meaning::of(self.as_event())
    }
}

/// The ordinary use of a key, by reference: the same event as a [`Draft`], without a text of its own.
pub(crate) struct Line<'a> {
    pub(crate) origin: Origin<'a>,
    pub(crate) action: Action,
    pub(crate) key: KeyId,
    pub(crate) version: u32,
    pub(crate) outcome: Outcome,
    pub(crate) code: i32,
    pub(crate) decision: DecisionId,
    /// Pairs that stand in the event as they are ([`is_plain`](super::event::is_plain)), as `context.NAME`.
    pub(crate) context: &'a BTreeMap<String, String>,
    /// One more detail, whose name sorts behind those.
    pub(crate) detail: Option<(&'static str, &'a str)>,
}

impl Entry for Line<'_> {
    fn append(&self, out: &mut Vec<u8>) {
        framed(out, EVENTS, |out| self.fields(out));
    }

    fn meaning(&self) -> Meaning {
        Meaning::new(Some(self.key.bytes()), self.origin.time.micros(), self.action, self.outcome)
    }
}

impl Line<'_> {
    /// In the order of the fields, defaults left out, as prost writes them.
    fn fields(&self, out: &mut Vec<u8>) {
        let Origin { time, request_id, correlation_id, client_id, certificate, peer } = self.origin;
        number(out, 1, time.micros().cast_unsigned());
        text(out, 2, &bounded(request_id));
        text(out, 3, &bounded(client_id));
        if let Some(hash) = certificate {
            let mut hex = [0; 64];
            data_encoding::HEXLOWER.encode_mut(hash, &mut hex);
            bytes(out, 4, &hex);
        }
        if let Some(peer) = peer {
            framed(out, 5, |out| {
                // Writing into a Vec does not fail.
                let _ = write!(out, "{}", peer.ip().to_canonical());
            });
        }
        text(out, 6, self.action.name());
        number(out, 7, i64::from(i32::from(self.outcome)).cast_unsigned());
        number(out, 8, i64::from(self.code).cast_unsigned());
        bytes(out, 9, &self.key.bytes());
        number(out, 10, u64::from(self.version));
        let mut decision = uuid::Uuid::encode_buffer();
        text(out, 11, self.decision.0.hyphenated().encode_lower(&mut decision));
        for (name, value) in self.context {
            detail(out, ("context.", name), value);
        }
        if let Some((name, value)) = self.detail {
            detail(out, ("", name), value);
        }
        text(out, 13, &bounded(correlation_id));
    }
}

fn number(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        encode_key(field, WireType::Varint, out);
        encode_varint(value, out);
    }
}

fn bytes(out: &mut Vec<u8>, field: u32, value: &[u8]) {
    if !value.is_empty() {
        encode_key(field, WireType::LengthDelimited, out);
        encode_varint(value.len() as u64, out);
        out.extend_from_slice(value);
    }
}

fn text(out: &mut Vec<u8>, field: u32, value: &str) {
    bytes(out, field, value.as_bytes());
}

fn detail(out: &mut Vec<u8>, (prefix, name): (&str, &str), value: &str) {
    framed(out, 12, |out| {
        encode_key(1, WireType::LengthDelimited, out);
        encode_varint((prefix.len() + name.len()) as u64, out);
        out.extend_from_slice(prefix.as_bytes());
        out.extend_from_slice(name.as_bytes());
        text(out, 2, value);
    });
}

/// A field whose length is known once it is written.
fn framed(out: &mut Vec<u8>, field: u32, write: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER]);
    write(out);
    let length = out.len() - start - HEADER;
    let mut header = [0; 16];
    let mut rest = &mut header[..];
    encode_key(field, WireType::LengthDelimited, &mut rest);
    encode_varint(length as u64, &mut rest);
    let used = 16 - rest.len();
    if let (HEADER, Some(place)) = (used, out.get_mut(start..start + HEADER)) {
        place.copy_from_slice(&header[..HEADER]);
    } else {
        out.splice(start..start + HEADER, header.into_iter().take(used));
    }
}

/// Events that wait for the log or are on their way to it, and what each means to its key.
#[derive(Debug, Default)]
pub(super) struct Block<B = Bytes> {
    encoded: B,
    marks: Vec<Mark>,
}

/// A block that still takes events.
pub(super) type Filling = Block<Vec<u8>>;

#[derive(Clone, Debug)]
struct Mark {
    meaning: Meaning,
    /// Where its encoding is.
    at: Range<usize>,
}

impl Filling {
    /// An empty one with room for so many bytes.
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Self { encoded: Vec::with_capacity(bytes), marks: Vec::new() }
    }

    /// Takes one more. Returns its bytes and what it means.
    pub(super) fn push(&mut self, event: &impl Entry) -> (usize, Meaning) {
        let start = self.encoded.len();
        event.append(&mut self.encoded);
        let (meaning, at) = (event.meaning(), start..self.encoded.len());
        let bytes = at.len();
        self.marks.push(Mark { meaning, at });
        (bytes, meaning)
    }

    /// No more.
    pub(super) fn close(self) -> Block {
        Block { encoded: self.encoded.into(), marks: self.marks }
    }
}

impl<B: AsRef<[u8]>> Block<B> {
    /// All events, as they stand in the body of their leaf.
    pub(super) fn encoded(&self) -> &B {
        &self.encoded
    }

    pub(super) fn bytes(&self) -> usize {
        self.encoded.as_ref().len()
    }

    pub(super) fn len(&self) -> usize {
        self.marks.len()
    }

    /// The events in order: what each means, and its encoding.
    pub(super) fn events(&self) -> impl DoubleEndedIterator<Item = (Meaning, &[u8])> {
        let encoded = |at: &Range<usize>| self.encoded.as_ref().get(at.clone()).unwrap_or_default();
        self.marks.iter().map(move |mark| (mark.meaning, encoded(&mark.at)))
    }
}

/// The event of an encoding that [`Entry::append`] made.
pub(super) fn decode(encoded: &[u8]) -> Option<AuditEvent> {
    AuditBody::decode(encoded).ok()?.events.pop()
}

/// Events as they stand in the body of their leaf.
pub(crate) fn encode(events: &[AuditEvent]) -> Vec<u8> {
    let mut encoded = Vec::new();
    for event in events {
        event.append(&mut encoded);
    }
    encoded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::time::Time;

    fn texts() -> impl Strategy<Value = String> {
        prop_oneof!["[ -~]{0,40}", ".{0,300}", Just(String::new())]
    }

    proptest! {
        /// By reference or as a draft, encoded here or by prost: the same bytes, the same meaning.
        #[test]
        fn a_line_is_the_event_that_a_draft_makes(
            (request, correlation, client) in (texts(), texts(), texts()),
            context in prop::collection::btree_map("[ -~]{1,24}", "[ -~]{0,32}", 0..12),
            (micros, version, code) in (any::<i64>(), 0_u32.., -1_i32..20),
            peer in prop::option::of(any::<std::net::IpAddr>()),
            certificate in prop::option::of(any::<[u8; 32]>()),
            (success, detail, before) in (any::<bool>(), any::<bool>(), 0_usize..4),
        ) {
            let origin = Origin {
                time: Time::from_micros(micros),
                request_id: &request,
                correlation_id: &correlation,
                client_id: &client,
                certificate: certificate.as_ref(),
                peer: peer.map(|ip| (ip, 4711).into()),
            };
            let key = KeyId::from_slice(&[7; 16]).unwrap();
            let outcome = if success { Outcome::Success } else { Outcome::Failed };
            let decision = DecisionId(uuid::Uuid::from_u128(u128::from(version)));
            let detail = detail.then_some(("valid", "yes"));
            let line = Line {
                origin: origin.clone(),
                action: Action::Encrypt,
                key,
                version,
                outcome,
                code,
                decision,
                context: &context,
                detail,
            };
            let about = Some((key, Some(version)));
            let decision = decision.to_string();
            let mut draft = origin.event("Encrypt", about, outcome, code, &decision);
            for (name, value) in &context {
                draft = draft.detail(&format!("context.{name}"), value);
            }
            if let Some((name, value)) = detail {
                draft = draft.detail(name, value);
            }
            let mut block = Filling::default();
            for _ in 0..before {
                block.push(&AuditEvent::default());
            }
            let (bytes, meaning) = block.push(&line);
            prop_assert_eq!(format!("{meaning:?}"), format!("{:?}", draft.meaning()));
            let event = draft.build();
            let encoded = encode(std::slice::from_ref(&event));
            prop_assert_eq!(bytes, encoded.len());
            let block = block.close();
            let (_, last) = block.events().next_back().unwrap();
            prop_assert_eq!(last, encoded);
            prop_assert_eq!(decode(last), Some(event));
            prop_assert_eq!(block.len(), before + 1);
        }
    }
}
