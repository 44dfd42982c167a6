//! Events: public facts about one thing that happened, each text bounded and printable.

use std::borrow::Cow;
use std::net::SocketAddr;

use data_encoding::HEXLOWER;
use polykey_hsm::{MacPurpose, Ring};
use polykey_proto::polykey::record::v1::AuditEvent;
pub use polykey_proto::polykey::record::v1::audit_event::Outcome;

use crate::context::Context;
use crate::key::KeyId;
use crate::time::Time;

/// Most bytes of one text in an event, after escaping.
pub const TEXT: usize = 256;
/// Most details of one event.
pub const DETAILS: usize = 16;
const CUT: char = '…';
/// The detail under which a client id stands that was claimed and not verified.
pub const CLAIMED: &str = "claimed_client_id";

/// Bytes of the keyed hash of a value, before they are written in hexadecimal.
const VALUE_HASH: usize = 16;

/// What stands in an event for a secret, an API key above all: the first 16 bytes of
/// HMAC-SHA-256 under a key of the node's root, `hmac:` and 32 hexadecimal digits. The same value has the same
/// hash for as long as the node exists, and without the key a guess cannot be tried.
#[must_use]
pub fn value_hash(ring: &Ring, value: &[u8]) -> String {
    let mac = ring.mac(MacPurpose::AuditValue, &[value]);
    let shown = mac.get(..VALUE_HASH).unwrap_or(&mac);
    format!("hmac:{}", HEXLOWER.encode(shown))
}

/// Text as it may stand in an event: control characters and bidirectional overrides escaped, at
/// most [`TEXT`] bytes, an ellipsis where it was cut.
#[must_use]
pub fn bounded(text: &str) -> Cow<'_, str> {
    // Nearly always.
    if is_plain(text) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len().min(TEXT));
    for c in text.chars() {
        let hidden = c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        let escaped = c.escape_unicode();
        let size = if hidden { escaped.len() } else { c.len_utf8() };
        if out.len() + size > TEXT - CUT.len_utf8() {
            // What is left may still fit without the ellipsis, but one rule is easier to rely on.
            out.push(CUT);
            return Cow::Owned(out);
        }
        if hidden { out.extend(escaped) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// Whether text stands in an event as it is.
pub(crate) fn is_plain(text: &str) -> bool {
    text.len() <= TEXT - CUT.len_utf8() && text.bytes().all(|b| matches!(b, b' '..=b'~'))
}

/// Where a request came from, as far as it is known. Texts are bounded when they enter an event.
#[derive(Clone, Debug)]
pub struct Origin<'a> {
    /// When the request came in.
    pub time: Time,
    /// Its id.
    pub request_id: &'a str,
    /// The caller's own id for it.
    pub correlation_id: &'a str,
    /// The verified client; empty where there is none.
    pub client_id: &'a str,
    /// SHA-256 of the certificate, if one was presented.
    pub certificate: Option<&'a [u8; 32]>,
    /// Where the connection comes from, if it came over one.
    pub peer: Option<SocketAddr>,
}

impl Origin<'_> {
    /// An event of this origin.
    #[must_use]
    pub fn event(
        &self,
        action: &str,
        key: Option<(KeyId, Option<u32>)>,
        outcome: Outcome,
        code: i32,
        decision_id: &str,
    ) -> Draft {
        Draft(AuditEvent {
            time: self.time.micros(),
            request_id: bounded(self.request_id).into_owned(),
            client_id: bounded(self.client_id).into_owned(),
            certificate_sha256: self
                .certificate
                .map(|hash| HEXLOWER.encode(hash))
                .unwrap_or_default(),
            peer_address: self
                .peer
                .map(|peer| peer.ip().to_canonical().to_string())
                .unwrap_or_default(),
            action: bounded(action).into_owned(),
            outcome: outcome.into(),
            code,
            key_id: key.map(|(id, _)| id.bytes().to_vec().into()).unwrap_or_default(),
            version: key.and_then(|(_, version)| version).unwrap_or_default(),
            decision_id: bounded(decision_id).into_owned(),
            details: Default::default(),
            correlation_id: bounded(self.correlation_id).into_owned(),
            count: 0,
        })
    }
}

impl<'a> From<&'a Context> for Origin<'a> {
    fn from(cx: &'a Context) -> Self {
        Self {
            time: cx.now,
            request_id: &cx.request_id,
            correlation_id: &cx.correlation_id,
            client_id: cx.caller.client_id(),
            certificate: Some(cx.caller.certificate.thumbprint()),
            peer: Some(cx.peer),
        }
    }
}

/// An event of a verified caller: what it did, or tried to do, to which key and version, and the
/// google.rpc.Code of the answer.
#[must_use]
pub fn event(
    cx: &Context,
    action: &str,
    key: Option<(KeyId, Option<u32>)>,
    outcome: Outcome,
    code: i32,
    decision_id: &str,
) -> Draft {
    Origin::from(cx).event(action, key, outcome, code, decision_id)
}

/// An event without a verified caller: a failed login. What it claimed to be goes into the details,
/// never into `client_id`, so that nobody can put events under another's name.
#[must_use]
pub fn anonymous(origin: &Origin<'_>, claimed: &str, action: &str, code: i32) -> Draft {
    let origin = Origin { client_id: "", ..origin.clone() };
    let draft = origin.event(action, None, Outcome::Denied, code, "");
    if claimed.is_empty() { draft } else { draft.detail(CLAIMED, claimed) }
}

/// An event that is being put together.
#[derive(Clone, Debug, PartialEq)]
pub struct Draft(AuditEvent);

impl Draft {
    /// Adds a public fact: a name, an id, a count; never a secret. Beyond [`DETAILS`] facts, further
    /// ones are left out and counted in `more`.
    #[must_use]
    pub fn detail(mut self, name: &str, value: impl AsRef<str>) -> Self {
        let details = &mut self.0.details;
        if details.len() < DETAILS || details.contains_key(name) {
            details.insert(bounded(name).into_owned(), bounded(value.as_ref()).into_owned());
        } else {
            let more = details.get("more").and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
            details.insert("more".into(), more.saturating_add(1).to_string());
        }
        self
    }

    pub(super) fn as_event(&self) -> &AuditEvent {
        &self.0
    }

    /// The event.
    #[must_use]
    pub fn build(self) -> AuditEvent {
        self.0
    }
}

impl From<Draft> for AuditEvent {
    fn from(draft: Draft) -> Self {
        draft.0
    }
}
