//! Who delivers for one webhook: reads the log from its place on, and tries until the receiver has what is told.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use data_encoding::HEXLOWER;
use parking_lot::Mutex;
use polykey_hsm::random;
use polykey_proto::polykey::record::v1::audit_event::Outcome as Ended;
use polykey_proto::polykey::record::v1::{AuditBody, AuditEvent, AuditLeaf};
use polykey_storage::Direction;
use prost::Message;
use tokio_util::sync::CancellationToken;

use super::Status;
use super::event::{self, Kind};
use super::place::{Held, Place, Watch};
use super::send::{Outcome, Sender};
use crate::error::Error;
use crate::health::State;
use crate::time::Time;
use crate::vault::Vault;
use crate::vault::tree::leaf_hash;

/// How often a webhook looks for new leaves. The look is one load of an atomic.
const POLL: Duration = Duration::from_millis(100);
/// How often one that is paused, or that another node delivers, is looked after.
const LOOK: Duration = Duration::from_secs(1);
/// Leaves read at a time; each may be a block of a MiB.
const BITE: usize = 8;
/// Most events that are read and not delivered.
const QUEUE: usize = 64;
/// The first pause after a failure, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));
/// What a receiver has not taken for so long is given up.
pub(super) const GIVE_UP: Duration = Duration::from_secs(3 * 86_400);
/// Failures in a row of which health tells.
const FAILURES: u32 = 3;
/// The place is written down after so many events, or so long; a kill makes those come again.
const SAVE: (u32, Duration) = (32, Duration::from_millis(500));
/// Without events the place is written down after so many leaves.
const LAZY: u64 = 4096;
/// Or so long: leaves that a webhook has not read are not archived.
const LAZY_TIME: Duration = Duration::from_secs(60);

/// An event on its way.
#[derive(Clone, Debug)]
struct Notice {
    kind: Kind,
    id: String,
    time: Time,
    body: Bytes,
    /// Where the log goes on behind it.
    next: (u64, u32),
}

#[derive(Debug, Default)]
struct Seen {
    trouble: Option<String>,
    failures: u32,
    /// Why the log cannot be read.
    unread: Option<String>,
    paused: bool,
    queued: usize,
    oldest: Option<Time>,
    last: Option<(Time, Duration)>,
    /// When it is tried again.
    next: Option<Time>,
}

#[derive(Debug, Default)]
struct Counts {
    delivered: AtomicU64,
    failed: AtomicU64,
    given_up: AtomicU64,
}

/// Delivers to one receiver.
pub(super) struct Courier {
    name: String,
    events: Vec<Kind>,
    sender: Sender,
    vault: Arc<Vault>,
    held: Held,
    seen: Mutex<Seen>,
    counts: Counts,
    closing: CancellationToken,
}

/// The flag of a leaf that is a block of data-plane events, without the events.
#[derive(Clone, PartialEq, Message)]
struct Flag {
    #[prost(bool, tag = "4")]
    data_plane: bool,
}

impl Courier {
    /// One at rest: what it tells and by which way, the name of this process, and the leaf with which a
    /// webhook that is new begins.
    pub(super) fn new(
        vault: &Arc<Vault>,
        name: String,
        (events, sender): (Vec<Kind>, Sender),
        (process, begin): ([u8; 16], u64),
        closing: CancellationToken,
    ) -> Self {
        Self {
            held: Held::new(vault, &name, process, begin),
            name,
            events,
            sender,
            vault: Arc::clone(vault),
            seen: Mutex::default(),
            counts: Counts::default(),
            closing,
        }
    }

    /// Writes down where it begins, if it is new.
    pub(super) async fn begin(&self) -> Result<(), Error> {
        self.held.begin(&self.vault).await
    }

    pub(super) fn status(&self) -> Status {
        let seen = self.seen.lock();
        let now = self.vault.clock().now();
        Status {
            name: self.name.clone(),
            delivered: self.counts.delivered.load(Relaxed),
            failed: self.counts.failed.load(Relaxed),
            given_up: self.counts.given_up.load(Relaxed),
            queued: seen.queued,
            behind: seen.oldest.map_or(Duration::ZERO, |oldest| now.since(oldest)),
            last: seen.last,
            trouble: seen.trouble.clone(),
            next: seen.next,
        }
    }

    pub(super) fn state(&self) -> State {
        let seen = self.seen.lock();
        let webhook = format!("[webhooks.{}]", self.name);
        if seen.paused {
            let text = "its receiver answers 410 Gone; nothing is sent until a node starts again";
            return State::Degraded(format!("{webhook}: {text}").into());
        }
        if let Some(why) = &seen.unread {
            let text = format!("{webhook}: the log cannot be read: {why}");
            return State::Degraded(text.into());
        }
        match &seen.trouble {
            Some(why) if seen.failures >= FAILURES => State::Degraded(
                format!("{webhook} fails: {why}; what happens meanwhile is told afterwards").into(),
            ),
            _ => State::Serving,
        }
    }

    pub(super) async fn run(self: Arc<Self>) {
        let mut queue = VecDeque::new();
        while let Some(mut place) = self.take().await {
            queue.clear();
            match self.deliver(&mut place, &mut queue).await {
                Ok(()) => break,
                Err(error) => {
                    let why = error.internal_text().unwrap_or_default();
                    tracing::debug!(webhook = self.name, %error, why, "a webhook begins anew");
                    // What another process does is told by that one.
                    *self.seen.lock() = Seen::default();
                }
            }
            if self.pause(LOOK).await {
                break;
            }
        }
    }

    /// The place, once this process is the one that delivers; none when it is time to end.
    async fn take(&self) -> Option<Place> {
        let mut watch = Watch::default();
        loop {
            match self.held.take(&self.vault, &mut watch).await {
                Ok(Some(place)) => return Some(place),
                Ok(None) | Err(Error::Conflict) => {}
                // A store that is away says so itself.
                Err(error) => {
                    let why = error.internal_text().unwrap_or_default();
                    tracing::debug!(webhook = self.name, %error, why, "its place was not read");
                }
            }
            if self.pause(LOOK).await {
                return None;
            }
        }
    }

    /// Delivers until it is time to end.
    ///
    /// # Errors
    /// [`Error::Conflict`] if another process has taken over.
    async fn deliver(&self, place: &mut Place, queue: &mut VecDeque<Notice>) -> Result<(), Error> {
        let mut read = place.next();
        while !self.closing.is_cancelled() {
            if place.is_paused() {
                self.note(queue, true);
                self.held.keep(&self.vault, place).await?;
                self.pause(LOOK).await;
                continue;
            }
            if queue.is_empty() {
                let result = self.read(&mut read, queue).await;
                let lost = |error: &Error| matches!(error, Error::DataLoss { .. });
                let unread = result.as_ref().err().filter(|error| lost(error));
                let unread = unread.and_then(|error| error.internal_text()).map(str::to_owned);
                self.seen.lock().unread = unread;
                if result.is_err() {
                    self.pause(LOOK).await;
                    continue;
                }
            }
            self.note(queue, false);
            let Some(notice) = queue.front() else {
                place.move_to(read);
                let far = read.0.saturating_sub(place.saved().0) >= LAZY;
                let long = read != place.saved() && place.since_saved() >= LAZY_TIME;
                if place.unsaved() > 0 || far || long {
                    self.save(place).await?;
                }
                self.held.keep(&self.vault, place).await?;
                self.wait(read.0).await;
                continue;
            };
            if self.attempt(place, notice).await? {
                queue.pop_front();
                let (many, long) = SAVE;
                if place.unsaved() >= many || place.since_saved() >= long {
                    self.save(place).await?;
                }
            }
            self.held.keep(&self.vault, place).await?;
        }
        // Another process goes on at once.
        self.held.release(&self.vault, place).await
    }

    /// Writes the place down. A store that cannot be written just now says so itself; what was delivered
    /// is not sent again for that.
    async fn save(&self, place: &mut Place) -> Result<(), Error> {
        match self.held.save(&self.vault, place, None).await {
            Ok(()) => Ok(()),
            Err(Error::Conflict) => Err(Error::Conflict),
            Err(error) => {
                tracing::debug!(webhook = self.name, %error, "where it stands was not written");
                place.try_later();
                Ok(())
            }
        }
    }

    /// One try; whether the event is done with.
    async fn attempt(&self, place: &mut Place, notice: &Notice) -> Result<bool, Error> {
        let clock = self.vault.clock();
        let begun = Instant::now();
        let outcome = tokio::select! {
            outcome = self.sender.send(&notice.id, &notice.body, clock.now()) => outcome,
            () = self.closing.cancelled() => return Ok(false),
        };
        let now = clock.now();
        self.seen.lock().last = Some((now, begun.elapsed()));
        match outcome {
            Outcome::Taken => {
                self.counts.delivered.fetch_add(1, Relaxed);
                self.tell(None);
                place.delivered(notice.next);
                Ok(true)
            }
            Outcome::Gone => {
                self.counts.failed.fetch_add(1, Relaxed);
                self.tell(Some("HTTP 410 Gone".to_owned()));
                let mut paused = place.clone();
                paused.pause(now);
                let event = self.event("PauseWebhook", now, None);
                self.held.save(&self.vault, &mut paused, Some(event)).await?;
                *place = paused;
                tracing::warn!(webhook = self.name, "a receiver answers 410: nothing more is sent");
                Ok(false)
            }
            Outcome::Refused(why) => {
                self.counts.failed.fetch_add(1, Relaxed);
                let failures = self.tell(Some(why.clone()));
                if place.fails(now) {
                    self.save(place).await?;
                }
                if place.failing(now) >= GIVE_UP && now.since(notice.time) >= GIVE_UP {
                    let mut moved = place.clone();
                    moved.move_to(notice.next);
                    let event = self.event("GiveUpWebhook", now, Some((notice, &why)));
                    self.held.save(&self.vault, &mut moved, Some(event)).await?;
                    *place = moved;
                    self.counts.given_up.fetch_add(1, Relaxed);
                    tracing::error!(
                        webhook = self.name,
                        id = notice.id,
                        why,
                        "an event is given up"
                    );
                    return Ok(true);
                }
                self.rest(place, back_off(failures)).await?;
                Ok(false)
            }
        }
    }

    /// Waits before the next try, and stays the one who delivers.
    async fn rest(&self, place: &mut Place, pause: Duration) -> Result<(), Error> {
        let until = Instant::now() + pause;
        self.seen.lock().next = Some(self.vault.clock().now().plus(pause));
        while Instant::now() < until {
            self.held.keep(&self.vault, place).await?;
            let left = until.saturating_duration_since(Instant::now());
            if self.pause(left.min(LOOK)).await {
                break;
            }
        }
        self.seen.lock().next = None;
        Ok(())
    }

    fn event(&self, action: &str, now: Time, about: Option<(&Notice, &str)>) -> AuditEvent {
        let mut event = AuditEvent {
            time: now.micros(),
            client_id: "polykey".into(),
            action: action.into(),
            ..AuditEvent::default()
        };
        event.set_outcome(Ended::Failed);
        event.details.insert("webhook".into(), self.name.clone());
        if let Some((notice, why)) = about {
            event.details.insert("id".into(), notice.id.clone());
            event.details.insert("type".into(), notice.kind.name().into());
            event.details.insert("why".into(), crate::audit::event::bounded(why).into_owned());
        }
        event
    }

    /// Notes what is wrong, or that nothing is. Returns how often in a row it was.
    fn tell(&self, trouble: Option<String>) -> u32 {
        let mut seen = self.seen.lock();
        let webhook = self.name.as_str();
        match (&trouble, &seen.trouble) {
            (Some(why), before) if before.as_ref() != Some(why) => {
                tracing::warn!(webhook, why, "a webhook fails");
            }
            (None, Some(_)) => tracing::info!(webhook, "a webhook works again"),
            _ => {}
        }
        seen.failures = if trouble.is_some() { seen.failures.saturating_add(1) } else { 0 };
        seen.trouble = trouble;
        seen.failures
    }

    fn note(&self, queue: &VecDeque<Notice>, paused: bool) {
        let mut seen = self.seen.lock();
        seen.queued = queue.len();
        seen.oldest = queue.front().map(|notice| notice.time);
        seen.paused = paused;
    }

    /// Whether it is time to end.
    async fn pause(&self, time: Duration) -> bool {
        tokio::select! {
            () = tokio::time::sleep(time) => false,
            () = self.closing.cancelled() => true,
        }
    }

    /// Returns when the log has grown, or it is time to look after the place.
    async fn wait(&self, leaf: u64) {
        let until = Instant::now() + LOOK;
        while self.vault.leaves() <= leaf && Instant::now() < until {
            if self.pause(POLL).await {
                return;
            }
        }
    }

    /// Reads on in the log until something is to be told, or its end.
    async fn read(&self, next: &mut (u64, u32), queue: &mut VecDeque<Notice>) -> Result<(), Error> {
        while queue.is_empty() && self.vault.leaves() > next.0 {
            let range = polykey_storage::from(next.0.to_be_bytes());
            let rows = self.vault.scan::<AuditLeaf>(range, Direction::Forward, BITE).await?;
            if rows.is_empty() {
                break;
            }
            for (key, leaf) in rows {
                let index = next.0;
                if key != index.to_be_bytes() {
                    return Err(Error::data_loss(format!("audit leaf {index} is missing")));
                }
                if leaf.record.archived {
                    return self.archived(next).await;
                }
                self.leaf(next, &leaf.record, queue)?;
                if queue.len() >= QUEUE {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Goes on behind leaves that were archived while nobody of this name was told of them.
    async fn archived(&self, next: &mut (u64, u32)) -> Result<(), Error> {
        let (kept, _) = crate::audit::archive::kept(&self.vault).await?;
        let mut event = self.event("GiveUpWebhook", self.vault.clock().now(), None);
        event
            .details
            .insert("why".into(), format!("leaves {} to {} are archived", next.0, kept - 1));
        self.vault.record([event]).await?;
        tracing::error!(webhook = self.name, from = next.0, to = kept, "events are in archives");
        *next = (kept, 0);
        Ok(())
    }

    /// The leaf before which its receiver has everything, as it is written down.
    pub(super) async fn has(&self) -> Result<(String, u64), Error> {
        Ok((format!("[webhooks.{}]", self.name), self.held.has(&self.vault).await?))
    }

    fn leaf(
        &self,
        next: &mut (u64, u32),
        leaf: &AuditLeaf,
        queue: &mut VecDeque<Notice>,
    ) -> Result<(), Error> {
        let (index, first) = *next;
        let body = leaf.body.as_ref();
        let broken = |error: prost::DecodeError| {
            Error::data_loss(format!("audit leaf {index} does not decode: {error}"))
        };
        // What is done with keys is nothing that a webhook tells, and most of the log.
        if Flag::decode(body).map_err(broken)?.data_plane {
            *next = (index + 1, 0);
            return Ok(());
        }
        let events = AuditBody::decode(body).map_err(broken)?.events;
        *next = (index + 1, 0);
        // Of the leaf and not of its index: after an older store is put back, that has another leaf.
        let hash = leaf_hash(&leaf.salt, body);
        let hash = HEXLOWER.encode(hash.first_chunk::<16>().unwrap_or(&[0; 16]));
        for (position, event) in (0_u32..).zip(&events).skip_while(|(at, _)| *at < first) {
            let Some(kind) = Kind::of(event).filter(|kind| self.events.contains(kind)) else {
                continue;
            };
            let body = event::body(kind, event, index)
                .map_err(|error| Error::internal(format!("a webhook's message: {error}")))?;
            queue.push_back(Notice {
                kind,
                id: format!("evt_{hash}_{position}"),
                time: Time::from_micros(event.time),
                body: body.into(),
                next: (index, position + 1),
            });
        }
        Ok(())
    }
}

/// 1 s, 2 s, 4 s … 5 min, more or less by up to a quarter.
pub(super) fn back_off(failures: u32) -> Duration {
    let (first, last) = PAUSES;
    let full = first.saturating_mul(1 << failures.saturating_sub(1).min(12)).min(last);
    let random = random::array::<2>().map_or(0, u16::from_be_bytes);
    full * 3 / 4 + full * u32::from(random) / (2 * u32::from(u16::MAX))
}
