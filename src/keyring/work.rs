//! Keys at work: find, authorize, look at the state, work, look again, record, release.
//!
//! A key does its work on the state it had when the call came in or on a later one, never on an
//! earlier one: caches forget before a change is acknowledged, and what was decided on a state that
//! has passed meanwhile is decided again. Symmetric keys are unwrapped for each use; parsed private
//! keys are remembered, because parsing them costs more than using them.

mod cipher;
mod exchange;
mod import;
mod sign;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use polykey_hsm::work::{WorkError, WorkingKey, canonical_context};
use polykey_hsm::{Algorithm, Purpose};
use polykey_proto::polykey::record::v1::{KeyRecord, audit_event::Outcome};

use super::hardened::is_hardened;
use super::resident::is_resident;
use super::{Key, KeyVersion, Keyring};
use crate::audit::Draft;
use crate::audit::event::{is_plain, value_hash};
use crate::audit::line::Line;
use crate::authz::{Action, Authorized, Command, DecisionId, Resource};
use crate::command::crypto::GenerateRandom;
use crate::context::Context;
use crate::error::{Error, Reason};
use crate::key::{self, KeyName};

pub use cipher::{DataKeyMade, Decrypted, Encrypted, Rewrapped};
pub use exchange::{PublicPart, Shared, Wrapped};
pub use import::ImportParameters;
pub use sign::{Checked, Coded, Signed};
pub use stream::{Opening, Sealing};

/// The code of "decryption failed" in the audit trail.
const INVALID_ARGUMENT: i32 = 3;
/// Pairs of a context that an event has by name.
const CONTEXT_PAIRS: usize = 12;
/// What is shorter stands in an event as it is, whatever has to be escaped.
const CONTEXT_TEXT: usize = 32;
/// Bytes of a message above which symmetric work leaves the threads of requests.
const LARGE: usize = 64 * 1024;
/// Calls to slow algorithms that wait for a thread.
pub(super) const SLOW_QUEUE: usize = 1024;

/// The parsed private keys of one key, by version. An object that was taken out of the cache by a
/// change may still be filled, and nobody finds it any more.
#[derive(Debug, Default)]
pub(super) struct Parsed(Mutex<HashMap<u32, Arc<WorkingKey>>>);

/// Whether a use seals (needs a key in force and a version that seals) or opens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Seal,
    Open,
}

/// A version that may be worked with, as of one moment.
struct Ready {
    key: Arc<Key>,
    version: Arc<KeyVersion>,
    decision: DecisionId,
    action: Action,
    /// Whose share of slow work it takes.
    client: Arc<str>,
    epoch: u64,
    parsed: Arc<Parsed>,
}

impl Ready {
    fn number(&self) -> u32 {
        self.version.record.version
    }
}

/// The purpose of a stored key.
pub(crate) fn purpose(record: &KeyRecord, algorithm: Algorithm) -> Purpose {
    match record.purpose {
        0 => algorithm.default_purpose(),
        // A code that this version does not know is a purpose that nothing here serves.
        code => Purpose::from_code(code).unwrap_or(Purpose::Credential),
    }
}

/// A failure of the algorithms as the caller hears it.
pub(super) fn failed(error: WorkError) -> Error {
    match error {
        WorkError::Failed => Error::Crypto,
        WorkError::Input { field, problem } => Error::invalid(field, problem),
        WorkError::WrongPurpose { .. } => Error::invalid("key_id", error.to_string()),
        WorkError::Material(_) => Error::data_loss(error.to_string()),
        WorkError::Crypto(_) => Error::internal(error.to_string()),
    }
}

/// The code of an answer in the audit trail.
fn code_of(outcome: Outcome) -> i32 {
    if outcome == Outcome::Success { 0 } else { INVALID_ARGUMENT }
}

/// Whether an event names every pair of a context, so that it needs no hash of the whole.
fn stands_whole(context: &BTreeMap<String, String>) -> bool {
    context.len() <= CONTEXT_PAIRS && context.keys().all(|name| name.len() + 8 <= CONTEXT_TEXT)
}

/// What [`Keyring::work_event`] says, of a plain context.
fn line<'a>(
    cx: &'a Context,
    ready: &Ready,
    context: &'a BTreeMap<String, String>,
    outcome: Outcome,
) -> Line<'a> {
    Line {
        origin: cx.origin(),
        action: ready.action,
        key: ready.key.id,
        version: ready.number(),
        outcome,
        code: code_of(outcome),
        decision: ready.decision,
        context,
        detail: None,
    }
}

impl Keyring {
    /// Finds a key for a use, authorizes the use, and looks at purpose, state and version.
    async fn ready<C: Command>(
        &self,
        cx: &Context,
        name: &KeyName,
        (purposes, version, kind): (&[Purpose], u32, Use),
        command: C,
    ) -> Result<Ready, Error> {
        let epoch = self.epoch();
        let key = self.find(cx, C::ACTION, name).await?;
        let permit: Authorized<C> = self.authorize(cx, key.resource(), command).await?;
        let made_for = purpose(&key.record, key.algorithm);
        if !purposes.contains(&made_for) {
            let does = purposes.iter().map(|p| p.name()).collect::<Vec<_>>().join(" or ");
            let text = format!(
                "is a key of type {} made to {made_for}; this needs one made to {does}",
                key.algorithm
            );
            return Err(Error::invalid("key_id", text));
        }
        match kind {
            Use::Seal => key::may_seal(&key.record, cx.now),
            Use::Open => key::may_open(&key.record, cx.now),
        }
        .map_err(Error::State)?;
        let number = key::pick_version(&key.record, version).map_err(Error::State)?;
        let parsed = self.parsed(&key);
        let version = self.load_version(&key, number).await?;
        match kind {
            Use::Seal => key::version_seals(&key.record, &version.record, cx.now),
            Use::Open => key::version_opens(&key.record, &version.record, cx.now),
        }
        .map_err(Error::State)?;
        let (decision, action) = (permit.decision_id(), C::ACTION);
        let client = Arc::clone(&cx.caller.facts.client);
        Ok(Ready { key, version, decision, action, client, epoch, parsed })
    }

    /// Where the parsed keys of a key are remembered; to be taken before its rows are read.
    fn parsed(&self, key: &Key) -> Arc<Parsed> {
        let cache = &self.caches.parsed;
        if let Some(parsed) = cache.get(&key.id) {
            return parsed;
        }
        let ticket = cache.ticket(&key.id);
        let parsed = Arc::<Parsed>::default();
        if key.algorithm.is_asymmetric() {
            cache.insert(ticket, key.id, Arc::clone(&parsed));
        }
        parsed
    }

    fn unwrapped(&self, ready: &Ready) -> Result<WorkingKey, Error> {
        let Ready { key, version, .. } = ready;
        let opened = self.open_material(key, &version.record)?;
        let purpose = purpose(&key.record, key.algorithm);
        WorkingKey::new(key.algorithm, purpose, &opened.material).map_err(failed)
    }

    /// Has the private part of a key work on so many bytes: on this thread, or on one for slow work.
    async fn work<T: Send + 'static>(
        &self,
        ready: &Ready,
        bytes: usize,
        f: impl FnOnce(&WorkingKey) -> Result<T, WorkError> + Send + 'static,
    ) -> Result<T, Error> {
        if is_hardened(&ready.key.record) {
            return Box::pin(self.work_hardened(ready, bytes, f)).await;
        }
        if is_resident(&ready.key.record) {
            return Err(Error::invalid("key_id", "is a key in a token, which does not do this"));
        }
        if !ready.key.algorithm.is_asymmetric() {
            let working = self.unwrapped(ready)?;
            if bytes <= LARGE {
                return f(&working).map_err(failed);
            }
            let client = Some(&*ready.client);
            return Box::pin(self.slow.run(client, move || f(&working))).await?.map_err(failed);
        }
        let number = ready.number();
        let client = Some(&*ready.client);
        let known = ready.parsed.0.lock().get(&number).cloned();
        let slow = ready.key.algorithm.is_slow();
        let working = match known {
            Some(working) => working,
            None => {
                // Parsing costs as much as work does.
                let opened = self.open_material(&ready.key, &ready.version.record)?;
                let algorithm = ready.key.algorithm;
                let purpose = purpose(&ready.key.record, algorithm);
                let parse = move || WorkingKey::new(algorithm, purpose, &opened.material);
                let parsed =
                    if slow { Box::pin(self.slow.run(client, parse)).await? } else { parse() };
                let working = Arc::new(parsed.map_err(failed)?);
                // What was read before a change must not be remembered after it.
                if self.epoch() == ready.epoch {
                    ready.parsed.0.lock().insert(number, Arc::clone(&working));
                }
                working
            }
        };
        if slow || bytes > LARGE {
            Box::pin(self.slow.run(client, move || f(&working))).await?.map_err(failed)
        } else {
            f(&working).map_err(failed)
        }
    }

    /// As [`Self::work`], by what the key's backend gave or gives.
    async fn work_hardened<T: Send + 'static>(
        &self,
        ready: &Ready,
        bytes: usize,
        f: impl FnOnce(&WorkingKey) -> Result<T, WorkError> + Send + 'static,
    ) -> Result<T, Error> {
        let Ready { key, version, client, .. } = ready;
        let working = self.working(client, key, version).await?;
        if key.algorithm.is_slow() || bytes > LARGE {
            return self.slow.run(Some(client), move || f(&working)).await?.map_err(failed);
        }
        f(&working).map_err(failed)
    }

    /// Whether what was decided still holds, so that its result may be released.
    async fn still(&self, ready: &Ready) -> Result<bool, Error> {
        if self.epoch() == ready.epoch {
            return Ok(true);
        }
        Box::pin(self.unchanged(&ready.key, &ready.version)).await
    }

    /// Looks again at a key whose work goes on: whether the caller may, its state and version.
    async fn may_go_on<C: Command>(
        &self,
        cx: &Context,
        ready: &Ready,
        kind: Use,
        command: C,
    ) -> Result<(), Error> {
        let key = self.load(ready.key.id).await?;
        let _asked_again = self.authorize(cx, key.resource(), command).await?;
        let number = key::pick_version(&key.record, ready.number()).map_err(Error::State)?;
        let version = self.load_version(&key, number).await?;
        match kind {
            // Another primary does not end what was begun under this one; a minimum does.
            Use::Seal if number.get() < key.record.min_encryption_version => {
                Err(Reason::VersionTooOld)
            }
            Use::Seal => key::may_seal(&key.record, cx.now),
            Use::Open => key::may_open(&key.record, cx.now),
        }
        .and_then(|()| key::version_opens(&key.record, &version.record, cx.now))
        .map_err(Error::State)
    }

    /// A context as an event has it: the names in the clear and of each value the keyed hash, since values
    /// may be anything that a caller binds, a patient's number for one.
    fn hidden(&self, context: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let ring = self.vault.ring();
        let pairs = context.iter().take(CONTEXT_PAIRS);
        pairs.map(|(name, value)| (name.clone(), value_hash(&ring, value.as_bytes()))).collect()
    }

    fn work_event(
        &self,
        cx: &Context,
        ready: &Ready,
        context: &BTreeMap<String, String>,
        outcome: Outcome,
    ) -> Draft {
        let about = Some((ready.key.id, Some(ready.number())));
        let decision = ready.decision.to_string();
        let code = code_of(outcome);
        let mut event = cx.origin().event(ready.action.name(), about, outcome, code, &decision);
        for (name, value) in &self.hidden(context) {
            event = event.detail(&format!("context.{name}"), value);
        }
        if !stands_whole(context) {
            let whole = value_hash(&self.vault.ring(), &canonical_context(context));
            event = event.detail("context_hash", whole);
        }
        event
    }

    /// Records an ordinary use.
    async fn used(
        &self,
        cx: &Context,
        ready: &Ready,
        context: &BTreeMap<String, String>,
    ) -> Result<(), Error> {
        if stands_whole(context) && context.keys().all(|name| is_plain(name)) {
            let hidden = self.hidden(context);
            return self.trail.used(line(cx, ready, &hidden, Outcome::Success)).await;
        }
        let event = self.work_event(cx, ready, context, Outcome::Success);
        Box::pin(self.trail.used(event)).await
    }

    /// Records that something was checked, and what came of it: guessing must be seen.
    async fn checked(&self, cx: &Context, ready: &Ready, valid: bool) -> Result<(), Error> {
        let none = BTreeMap::new();
        let valid = Some(("valid", if valid { "yes" } else { "no" }));
        self.trail.used(Line { detail: valid, ..line(cx, ready, &none, Outcome::Success) }).await
    }

    /// Records a use whose result is a secret that leaves the node: durable before it does.
    async fn released(
        &self,
        cx: &Context,
        ready: &Ready,
        context: &BTreeMap<String, String>,
    ) -> Result<u64, Error> {
        self.trail.record(self.work_event(cx, ready, context, Outcome::Success)).await
    }

    /// Records that something did not open, and passes the failure on.
    async fn unopened<T>(
        &self,
        cx: &Context,
        ready: &Ready,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        if matches!(result, Err(Error::Crypto)) {
            self.trail.used(line(cx, ready, &BTreeMap::new(), Outcome::Failed)).await?;
        }
        result
    }

    /// Random bytes.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn random(&self, cx: &Context, command: &GenerateRandom) -> Result<Vec<u8>, Error> {
        let permit = self.authorize(cx, Resource::Node, command).await?;
        let mut bytes = vec![0; command.length];
        polykey_hsm::random::fill(&mut bytes).map_err(|e| Error::internal(e.to_string()))?;
        let decision = permit.decision_id().to_string();
        let action = Action::GenerateRandom.name();
        let event = cx.origin().event(action, None, Outcome::Success, 0, &decision);
        self.trail.used(event.detail("length", command.length.to_string())).await?;
        Ok(bytes)
    }
}

/// Runs `$body` until its decision held to the end.
macro_rules! settled {
    ($keyring:expr, $body:expr) => {{
        for _ in 0..ATTEMPTS {
            if let Some(done) = $body {
                return Ok(done);
            }
        }
        Err(Error::Conflict)
    }};
}
pub(super) use settled;
