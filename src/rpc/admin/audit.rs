//! The audit trail: reading, following and exporting it.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use governor::clock::{Clock, DefaultClock};
use polykey_proto::polykey::v2 as pb;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::{AdminService, commands, event, parse};
use crate::audit::event::value_hash;
use crate::audit::{Archive, Checkpoint, Claim, Had, Order, VerifyingKey, export};
use crate::authz::{Action, Resource};
use crate::custody::signing::{self, Purpose};
use crate::error::Error;
use crate::key::{KeyId, KeyName};
use crate::limits::{self, Violations};
use crate::rpc::admit::Admitted;
use crate::rpc::convert::{audit_event, timestamp};
use crate::rpc::key_service::Answers;
use crate::rpc::parse::time;

/// Messages that wait for a slow reader.
const AHEAD: usize = 4;
/// Events in one message of a stream.
const EVENTS: usize = 256;
/// Leaves read at once, and bytes of leaves in one message.
const LEAVES: usize = 16;
const BYTES: usize = 1024 * 1024;
/// How often a follower's authority is looked at while nothing happens.
const RECHECK: Duration = Duration::from_secs(1);

type Sender<T> = tokio::sync::mpsc::Sender<Result<T, Status>>;

impl AdminService {
    pub(super) async fn list_audit_events(
        &self,
        request: Request<pb::ListAuditEventsRequest>,
    ) -> Result<pb::ListAuditEventsResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let size = parse::page_size(&mut v, m.page_size);
        let (mut filter, key) = parse::audit_filter(&mut v, m.filter.as_ref());
        v.finish()?;
        self.look(&cx, commands::ReadAudit, &[]).await?;
        filter.key = self.named(key).await?;
        let order = if m.from_index.is_some() { Order::OldestFirst } else { Order::NewestFirst };
        let from = m.from_index.unwrap_or(0);
        let page = self.0.deps.trail.list(&filter, order, from, size, &m.page_token).await?;
        Ok(pb::ListAuditEventsResponse {
            events: page.events.iter().map(audit_event).collect(),
            next_page_token: page.next,
            archives: page.archives.iter().map(shown_archive).collect(),
        })
    }

    /// The key that a filter names, by id or alias.
    async fn named(&self, key: Option<KeyName>) -> Result<Option<KeyId>, Error> {
        match key {
            None => Ok(None),
            Some(name) => self.0.deps.keyring.resolve(&name).await.map(Some),
        }
    }

    /// Whether whoever opened a stream may still read on.
    async fn may_read(&self, first: &Admitted) -> Result<(), Error> {
        let deps = &self.0.deps;
        let admitted = first.again(deps).await?;
        let cx = admitted.context(None, None)?;
        self.authorize(&cx, Resource::Node, commands::ReadAudit).await.map(drop)
    }

    pub(super) async fn follow_audit(
        &self,
        request: Request<pb::FollowAuditRequest>,
    ) -> Result<Answers<pb::FollowAuditResponse>, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let (mut filter, key) = parse::audit_filter(&mut v, m.filter.as_ref());
        v.finish()?;
        self.look(&cx, commands::ReadAudit, &[("what", "follow")]).await?;
        filter.key = self.named(key).await?;
        let batches = self.0.deps.trail.follow(m.from_index, filter);
        let service = self.clone();
        let (answers, receiver) = tokio::sync::mpsc::channel(AHEAD);
        tokio::spawn(async move {
            let mut batches = std::pin::pin!(batches);
            loop {
                let batch = tokio::select! {
                    batch = batches.next() => batch,
                    () = answers.closed() => return,
                    () = tokio::time::sleep(RECHECK) => {
                        match service.may_read(&admitted).await {
                            Ok(()) => continue,
                            Err(error) => return refuse(&answers, error).await,
                        }
                    }
                };
                let batch = match batch {
                    None => return,
                    Some(Err(error)) => return refuse(&answers, error).await,
                    Some(Ok(batch)) => batch,
                };
                let mut chunks = batch.events.chunks(EVENTS).peekable();
                while let Some(chunk) = chunks.next() {
                    if let Err(error) = service.may_read(&admitted).await {
                        return refuse(&answers, error).await;
                    }
                    // Whoever goes on in the middle of a batch sees its first events again.
                    let next = chunks.peek().and_then(|chunk| chunk.first());
                    let next_index = next.map_or(batch.next_index, |entry| entry.index);
                    let events = chunk.iter().map(audit_event).collect();
                    let answer = pb::FollowAuditResponse { events, next_index };
                    if answers.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    pub(super) async fn get_audit_checkpoint(
        &self,
        request: Request<pb::GetAuditCheckpointRequest>,
    ) -> Result<pb::GetAuditCheckpointResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        self.look(&cx, commands::ReadAudit, &[("what", "checkpoint")]).await?;
        let checkpoint = self.0.deps.trail.checkpoint().await?;
        let checkpoint = match checkpoint {
            Some(checkpoint) => Some(self.shown_checkpoint(&checkpoint).await?),
            None => None,
        };
        Ok(pb::GetAuditCheckpointResponse { checkpoint })
    }

    /// A checkpoint and the key of this node that verifies it.
    async fn shown_checkpoint(&self, c: &Checkpoint) -> Result<pb::AuditCheckpoint, Error> {
        let mut keys: Vec<VerifyingKey> = self.0.deps.trail.verifying_key().into_iter().collect();
        let all = signing::list(self.directory().vault(), Purpose::Checkpoint).await?;
        keys.extend(all.iter().map(|key| VerifyingKey(*key.public())));
        let key = c.verify(&keys);
        let second = self.0.deps.trail.ml_dsa_key();
        let second = second.filter(|key| c.verify_ml_dsa(std::slice::from_ref(key)) == Some(true));
        Ok(pb::AuditCheckpoint {
            tree_size: c.size,
            root_hash: c.root.to_vec().into(),
            time: Some(timestamp(c.time)),
            note: c.note.clone(),
            public_key: key.map(|key| key.0.to_vec()).unwrap_or_default().into(),
            origin: c.origin.clone(),
            ml_dsa_public_key: second.map(|key| key.bytes().to_vec()).unwrap_or_default().into(),
        })
    }

    pub(super) async fn export_audit_log(
        &self,
        request: Request<pb::ExportAuditLogRequest>,
    ) -> Result<Answers<pb::ExportAuditLogResponse>, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let before = time(&mut v, "before", m.before.as_ref());
        v.finish()?;
        self.look(&cx, commands::ReadAudit, &[("what", "export")]).await?;
        let trail = &self.0.deps.trail;
        let most = (m.max_leaves > 0).then_some(m.max_leaves);
        let checkpoint = if m.at_checkpoint {
            let had = self.had().await?;
            let found = trail.archivable(&had, most, before).await?;
            if found.is_none()
                && most.is_some()
                && let Some(least) = trail.smallest(&had, before).await?
            {
                let text = format!("must be at least {least}: the next checkpoint covers so many");
                return Err(Error::invalid("max_leaves", text));
            }
            found
        } else {
            // Signed first: what is exported is what it covers.
            trail.checkpoint().await?
        };
        let size = checkpoint.as_ref().map_or(0, |c| c.size);
        let (kept, mut log) = trail.kept().await?;
        if checkpoint.is_some() && m.from_index > size {
            let text = format!("must be at most {size}, the size of the log");
            return Err(Error::invalid("from_index", text));
        }
        let from = m.from_index.max(kept);
        let end = match most {
            Some(most) if !m.at_checkpoint => size.min(from.saturating_add(most)),
            _ => size,
        };
        let from = from.min(end);
        self.directory().vault().grow(&mut log, from).await?;
        let subtrees = log.roots().iter().map(|root| root.to_vec().into()).collect();
        let first = pb::AuditLeaves { first_index: from, leaves: Vec::new(), subtrees };
        let service = self.clone();
        let (answers, receiver) = tokio::sync::mpsc::channel(AHEAD);
        tokio::spawn(async move {
            let sent = service.send_leaves(&admitted, first, end, &answers).await;
            let last = match (sent, &checkpoint) {
                (Err(error), _) => Err(error),
                (Ok(false), _) | (Ok(true), None) => return,
                (Ok(true), Some(checkpoint)) => service.shown_checkpoint(checkpoint).await,
            };
            match last {
                Err(error) => refuse(&answers, error).await,
                Ok(checkpoint) => {
                    let part = pb::export_audit_log_response::Part::Checkpoint(checkpoint);
                    let answer = pb::ExportAuditLogResponse { part: Some(part) };
                    // Whoever has gone away does not want it.
                    answers.send(Ok(answer)).await.ok();
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    /// Whether the reader is still there.
    async fn send_leaves(
        &self,
        admitted: &Admitted,
        mut part: pb::AuditLeaves,
        end: u64,
        answers: &Sender<pb::ExportAuditLogResponse>,
    ) -> Result<bool, Error> {
        let mut next = part.first_index;
        let mut bytes = 0;
        while next < end {
            let most = usize::try_from(end - next).unwrap_or(usize::MAX).min(LEAVES);
            let leaves = export::leaves(self.directory().vault(), next, most).await?;
            if leaves.is_empty() {
                return Err(Error::data_loss(format!("audit leaf {next} is missing")));
            }
            for leaf in leaves {
                next += 1;
                bytes += leaf.len();
                part.leaves.push(leaf.into());
                if bytes >= BYTES || next == end {
                    self.may_read(admitted).await?;
                    let then = pb::AuditLeaves { first_index: next, ..Default::default() };
                    let full = std::mem::replace(&mut part, then);
                    bytes = 0;
                    let part = Some(pb::export_audit_log_response::Part::Leaves(full));
                    let answer = pb::ExportAuditLogResponse { part };
                    if answers.send(Ok(answer)).await.is_err() {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }
}

impl AdminService {
    /// How far the others have the log.
    async fn had(&self) -> Result<Had, Error> {
        let admin = &self.0.admin;
        let shipped = admin.replication.as_ref().map(|target| target.shipping().shipped);
        Ok(admin.sinks.had(shipped).await?.and(admin.webhooks.least().await?))
    }

    pub(super) async fn archive_audit_log(
        &self,
        request: Request<pb::ArchiveAuditLogRequest>,
    ) -> Result<pb::ArchiveAuditLogResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let m = m.archive.unwrap_or_default();
        let hash = |v: &mut Violations, field: &str, bytes: &[u8]| {
            bytes.try_into().unwrap_or_else(|_| {
                v.add(format!("archive.{field}"), "must have 32 bytes");
                [0; 32]
            })
        };
        let named = |text: &str| !text.is_empty() && text.len() <= 4096 && !text.contains('\0');
        v.check(named(&m.file), "archive.file", "must have 1 to 4096 bytes");
        v.check(m.host.len() <= 255, "archive.host", "must have at most 255 bytes");
        v.check(m.until.is_none(), "archive.until", "is the server's to say");
        v.check(m.archived_at.is_none(), "archive.archived_at", "is the server's to say");
        let (sha256, root) =
            (hash(&mut v, "sha256", &m.sha256), hash(&mut v, "root_hash", &m.root_hash));
        let decision = self.authorize(&cx, Resource::Node, commands::ArchiveAudit).await?;
        v.finish()?;
        let claim = Claim {
            first: m.first_index,
            end: m.end_index,
            root,
            file: m.file,
            host: m.host,
            sha256,
        };
        let told = claim.details();
        let told: Vec<(&str, &str)> = told.iter().map(|(n, v)| (*n, v.as_str())).collect();
        let event = event(&cx, Action::ArchiveAudit, decision, &told);
        let archive = self.0.deps.trail.archive(claim, &self.had().await?, event).await?;
        Ok(pb::ArchiveAuditLogResponse { archive: Some(shown_archive(&archive)) })
    }

    pub(super) async fn hash_audit_value(
        &self,
        request: Request<pb::HashAuditValueRequest>,
    ) -> Result<pb::HashAuditValueResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let decision = self.authorize(&cx, Resource::Node, commands::HashAuditValue).await?;
        let fits = (1..=limits::VALUE).contains(&m.value.len());
        let mut v = Violations::new();
        v.check(fits, "value", "must have 1 to 4096 bytes");
        v.finish()?;
        let hash = value_hash(&self.directory().vault().ring(), &m.value);
        let limit = &self.0.hashes;
        if let Err(early) = limit.check_key(&Arc::<str>::from(cx.caller.client_id())) {
            let retry_after = early.wait_time_from(DefaultClock::default().now());
            return Err(Error::Exhausted { retry_after });
        }
        // Who asks for values that he guesses shows in the trail, before he has the answer.
        let event = event(&cx, Action::HashAuditValue, decision, &[("hash", &hash)]);
        self.0.deps.trail.record(event).await?;
        Ok(pb::HashAuditValueResponse { hash })
    }
}

fn shown_archive(archive: &Archive) -> pb::AuditArchive {
    pb::AuditArchive {
        first_index: archive.first,
        end_index: archive.end,
        file: archive.file.clone(),
        host: archive.host.clone(),
        sha256: archive.sha256.to_vec().into(),
        root_hash: archive.log.root().to_vec().into(),
        until: Some(timestamp(archive.until)),
        archived_at: Some(timestamp(archive.archived_at)),
    }
}

/// Ends a stream.
async fn refuse<T>(answers: &Sender<T>, error: Error) {
    // Whoever has gone away needs no reason.
    answers.send(Err(Status::from(error))).await.ok();
}
