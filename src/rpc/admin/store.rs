//! The store, the schedule and the configuration.

use std::collections::BTreeMap;
use std::ops::Bound;

use data_encoding::HEXLOWER;
use polykey_proto::polykey::record::v1::JobRecord;
use polykey_proto::polykey::record::v1::job_record::Kind;
use polykey_proto::polykey::v2 as pb;
use polykey_storage::replicated::{Link, Mode, Shipping, WhenAway};
use polykey_storage::{Direction, RowKey, Space};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::{AdminService, commands, event, page, parse};
use crate::audit::Outcome;
use crate::authz::{Action, Resource};
use crate::config::show;
use crate::custody::FORMAT;
use crate::error::Error;
use crate::key::KeyId;
use crate::limits::Violations;
use crate::rpc::admit::Admitted;
use crate::rpc::convert::{stored_time, timestamp};
use crate::rpc::key_service::Answers;
use crate::rpc::parse::key_name;
use crate::vault::{Progress, VerifyReport, space};

/// Rows that are counted for a status: beyond them, only the total is told.
const COUNTED: u64 = 200_000;
const STEP: usize = 4096;
/// Rows of the schedule that one page looks at before it returns short.
const LOOKED_AT: usize = 20_000;
/// Jobs that are looked at for what waits of each kind.
const WAITING: usize = 1_000;

const SPACES: [(Space, &str); 19] = [
    (space::KEYS, "keys"),
    (space::VERSIONS, "versions"),
    (space::LIST, "list"),
    (space::ALIASES, "aliases"),
    (space::CLIENTS, "clients"),
    (space::IDENTITIES, "identities"),
    (space::ROLES, "roles"),
    (space::TOKEN_FAMILIES, "token-families"),
    (space::REVOKED_TOKENS, "revoked-tokens"),
    (space::SIGNING_KEYS, "signing-keys"),
    (space::AUDIT, "audit"),
    (space::CHECKPOINTS, "checkpoints"),
    (space::JOBS, "jobs"),
    (space::IDEMPOTENCY, "idempotency"),
    (space::USAGE, "usage"),
    (space::IMPORTS, "imports"),
    (space::COUNTS, "use counts"),
    (space::AUDIT_ARCHIVES, "audit-archives"),
    (space::WEBHOOKS, "webhooks"),
];

fn space_name(space: Space) -> String {
    let named = SPACES.iter().find(|(known, _)| *known == space);
    named.map_or_else(|| "node".to_owned(), |(_, name)| (*name).to_owned())
}

fn replication(shipping: &Shipping) -> pb::ReplicationStatus {
    let (state, detail) = match &shipping.link {
        Link::Connecting => ("connecting", String::new()),
        Link::Copying => ("copying", String::new()),
        Link::Following => ("following", String::new()),
        Link::Away(why) => ("away", why.clone()),
        Link::Refused(why) => ("refused", why.clone()),
        Link::Fenced(fenced) => ("fenced", fenced.to_string()),
    };
    let (mode, when_away) = match shipping.mode {
        Mode::Async => ("async", ""),
        Mode::Sync(WhenAway::Refuse) => ("sync", "refuse"),
        Mode::Sync(WhenAway::Degrade) => ("sync", "degrade"),
    };
    pb::ReplicationStatus {
        target: shipping.target.clone(),
        mode: mode.to_owned(),
        when_away: when_away.to_owned(),
        state: state.to_owned(),
        detail,
        synchronous: shipping.synced,
        shipped_revision: shipping.shipped.0,
        lag_revisions: shipping.lag(),
        lag_seconds: shipping.behind.as_secs_f64(),
    }
}

impl AdminService {
    pub(super) async fn get_store_status(
        &self,
        request: Request<pb::GetStoreStatusRequest>,
    ) -> Result<pb::GetStoreStatusResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        self.look(&cx, commands::ReadNode, &[("what", "store")]).await?;
        let vault = self.directory().vault();
        let (status, head) = (vault.store().status(), vault.head());
        let writable = vault.writable() && vault.intact();
        let read_only_reason = if writable {
            String::new()
        } else if vault.intact() {
            "the store takes no commits until it has been opened again".to_owned()
        } else {
            "the store failed its verification".to_owned()
        };
        let free = status.path.as_ref().and_then(|path| rustix::fs::statvfs(path).ok());
        let verified = *self.0.verified.lock();
        let anchor = self.0.admin.anchor.as_ref().map(|anchor| anchor.status());
        let anchored = anchor.as_ref().and_then(|anchor| anchor.anchored);
        let shipped = self.0.admin.replication.as_ref().map(|replicated| replicated.shipping());
        Ok(pb::GetStoreStatusResponse {
            backend: status.kind.to_owned(),
            revision: status.revision.0,
            size_bytes: status.bytes.unwrap_or(0),
            writable,
            read_only_reason,
            records: self.records(head.rows).await?,
            free_bytes: free.map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize)),
            last_verified_at: verified.map(|(at, _)| timestamp(at)),
            last_verification_ok: verified.is_some_and(|(_, ok)| ok),
            audit_tree_size: head.leaves,
            format: FORMAT,
            node_id: HEXLOWER.encode(&vault.node_id()),
            damaged_records: vault.damaged(),
            anchored_revision: anchored.map_or(0, |(revision, _)| revision.0),
            anchored_at: anchored.map(|(_, at)| timestamp(at)),
            anchor_trouble: anchor.as_ref().and_then(|it| it.trouble.clone()).unwrap_or_default(),
            anchor: anchor.map(|it| it.medium).unwrap_or_default(),
            replication: shipped.as_ref().map(replication),
        })
    }

    /// Rows by space, and all sealed ones as "total".
    async fn records(&self, total: u64) -> Result<BTreeMap<String, u64>, Error> {
        let vault = self.directory().vault();
        let mut records = BTreeMap::from([("total".to_owned(), total)]);
        if total > COUNTED {
            return Ok(records);
        }
        for (space, name) in SPACES {
            let mut count = 0;
            let mut range = polykey_storage::all();
            loop {
                let keys = vault.scan_keys(space, range, STEP).await?;
                count += keys.len() as u64;
                let Some(last) = keys.last().filter(|_| keys.len() == STEP) else { break };
                range = (Bound::Excluded(last.clone()), Bound::Unbounded);
            }
            records.insert(name.to_owned(), count);
        }
        Ok(records)
    }

    pub(super) async fn verify_store(
        &self,
        request: Request<pb::VerifyStoreRequest>,
    ) -> Result<Answers<pb::VerifyStoreResponse>, Error> {
        let (admitted, cx, _) = self.admit(request)?;
        let decision = self.authorize(&cx, Resource::Node, commands::VerifyStore).await?;
        let mut event = event(&cx, Action::VerifyStore, decision, &[]);
        let service = self.clone();
        let (answers, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            let revision = service.directory().vault().store().status().revision.0;
            let report = match service.verified(&admitted, &answers).await {
                Ok(Some(report)) => report,
                Ok(None) => return,
                Err(error) => {
                    // Whoever has gone away needs no reason.
                    answers.send(Err(Status::from(error))).await.ok();
                    return;
                }
            };
            let ok = report.findings.is_empty();
            *service.0.verified.lock() = Some((service.0.deps.clock.now(), ok));
            event.details.insert("rows".into(), report.rows.to_string());
            event.details.insert("findings".into(), report.found.to_string());
            if !ok {
                event.set_outcome(Outcome::Failed);
                event.code = i32::from(tonic::Code::DataLoss);
            }
            if let Err(error) = service.0.deps.trail.record(event).await {
                // A damaged store takes no commits: its finding must be told all the same.
                tracing::error!(%error, "the result of a verification is not in the audit trail");
            }
            let part = pb::verify_store_response::Part::Result(result(&report, revision));
            answers.send(Ok(pb::VerifyStoreResponse { part: Some(part) })).await.ok();
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    /// Verifies and tells the progress. `None` if the reader has gone away.
    async fn verified(
        &self,
        admitted: &Admitted,
        answers: &mpsc::Sender<Result<pb::VerifyStoreResponse, Status>>,
    ) -> Result<Option<VerifyReport>, Error> {
        let vault = std::sync::Arc::clone(self.directory().vault());
        let (tell, mut progress) = tokio::sync::watch::channel(Progress::default());
        let verification = async move {
            // Told for as long as anybody listens.
            vault
                .verify(true, move |now| {
                    tell.send_replace(now);
                })
                .await
        };
        let mut verification = std::pin::pin!(verification);
        loop {
            tokio::select! {
                biased;
                () = answers.closed() => return Ok(None),
                report = &mut verification => return report.map(Some),
                Ok(()) = progress.changed() => {
                    let Progress { rows, expected } = *progress.borrow_and_update();
                    let deps = &self.0.deps;
                    let now = admitted.again(deps).await?;
                    let cx = now.context(None, None)?;
                    self.authorize(&cx, Resource::Node, commands::VerifyStore).await?;
                    let part = pb::verify_store_response::Part::Progress(pb::VerifyStoreProgress {
                        records_checked: rows,
                        records_total: expected,
                    });
                    // A reader that is behind misses some progress.
                    answers.try_send(Ok(pb::VerifyStoreResponse { part: Some(part) })).ok();
                }
            }
        }
    }

    pub(super) async fn list_jobs(
        &self,
        request: Request<pb::ListJobsRequest>,
    ) -> Result<pb::ListJobsResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let size = parse::page_size(&mut v, m.page_size);
        v.check(Kind::try_from(m.kind).is_ok(), "kind", "must be one of the kinds there are");
        let key = (!m.key_id.is_empty()).then(|| key_name(&mut v, "key_id", &m.key_id));
        v.finish()?;
        let vault = self.directory().vault();
        let same = format!("{} {}", m.kind, m.key_id);
        let mut after = page::last(vault, "jobs", &same, &m.page_token)?;
        self.look(&cx, commands::ReadNode, &[("what", "jobs")]).await?;
        let key = match &key {
            None => None,
            Some(name) => Some(self.0.deps.keyring.resolve(name).await?),
        };
        let wanted = |job: &JobRecord| {
            (m.kind == 0 || job.kind == m.kind)
                && key.is_none_or(|key| job.key_id.as_ref() == key.bytes())
        };
        let mut jobs = Vec::new();
        let mut looked_at = 0;
        let mut more = true;
        while more && jobs.len() < size && looked_at < LOOKED_AT {
            let from = after.clone().map_or(Bound::Unbounded, Bound::Excluded);
            let range = (from, Bound::Unbounded);
            let rows = vault.scan_each::<JobRecord>(range, Direction::Forward, 512).await?;
            more = rows.len() == 512;
            looked_at += rows.len();
            for (row, loaded) in rows {
                if jobs.len() == size {
                    more = true;
                    break;
                }
                // Of a damaged one the row key still tells what it was for.
                let (record, damaged) = match loaded {
                    Ok(loaded) => (Some(loaded.record), false),
                    Err(_) => (crate::jobs::from_row(&row), true),
                };
                if let Some(record) = record.filter(wanted) {
                    jobs.push(job(&row, &record, damaged));
                }
                after = Some(row);
            }
        }
        let next_page_token = match &after {
            Some(last) if more => page::token(vault, "jobs", &same, last),
            _ => String::new(),
        };
        let clock_suspended = self.0.admin.jobs.clock_in_doubt();
        let work = if m.page_token.is_empty() { self.work().await? } else { Vec::new() };
        Ok(pb::ListJobsResponse { jobs, next_page_token, clock_suspended, work })
    }

    /// What the node does in the background.
    async fn work(&self) -> Result<Vec<pb::BackgroundWork>, Error> {
        let runner = &self.0.admin.jobs;
        let now = self.directory().vault().clock().now();
        let waiting = runner.waiting(WAITING).await?;
        let mut all = Vec::new();
        let archives = self.0.admin.config.audit.archive.is_some();
        let ledger = runner.work();
        let used = |work| archives || !std::ptr::eq(work, &ledger.archive);
        for (kind, work) in ledger.all().filter(|(_, work)| used(*work)) {
            let seen = work.figures();
            let waiting = kind.and_then(|kind| waiting.get(&i32::from(kind)));
            let waiting = waiting.copied().unwrap_or_default();
            all.push(pb::BackgroundWork {
                name: work.name.to_owned(),
                queued: waiting.due.saturating_sub(seen.running),
                running: seen.running,
                workers: work.workers,
                done: seen.done,
                failed: seen.failed,
                last_run_at: seen.last.at.map(timestamp),
                last_seconds: seen.last.took.as_secs_f64(),
                last_error: seen.last.error.unwrap_or_default(),
                next_due_at: waiting.next.or(seen.next).map(timestamp),
                behind_seconds: waiting.since.map_or(0.0, |since| now.since(since).as_secs_f64()),
            });
        }
        for webhook in self.0.admin.webhooks.status() {
            let (at, took) = webhook.last.unzip();
            all.push(pb::BackgroundWork {
                name: format!("webhook/{}", webhook.name),
                queued: u32::try_from(webhook.queued).unwrap_or(u32::MAX),
                running: 0,
                workers: 1,
                done: webhook.delivered,
                failed: webhook.failed,
                last_run_at: at.map(timestamp),
                last_seconds: took.unwrap_or_default().as_secs_f64(),
                last_error: webhook.trouble.unwrap_or_default(),
                next_due_at: webhook.next.map(timestamp),
                behind_seconds: webhook.behind.as_secs_f64(),
            });
        }
        Ok(all)
    }

    pub(super) async fn confirm_clock(
        &self,
        request: Request<pb::ConfirmClockRequest>,
    ) -> Result<pb::ConfirmClockResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "ConfirmClock", &m);
        let decision = self.authorize(&cx, Resource::Node, commands::ConfirmClock).await?;
        if self.repeated(&cx, key.as_ref()).await? {
            // The clock may have jumped again since: that is not confirmed by it.
            return Ok(pb::ConfirmClockResponse::default());
        }
        let event = event(&cx, Action::ConfirmClock, decision, &[]);
        let remember = key.map(|key| key.noted(self.directory().vault(), &cx, "clock"));
        let (clock, receipt) = self.0.admin.jobs.confirm_clock(event, remember).await?;
        let audit_index = receipt.leaf.unwrap_or(0);
        Ok(pb::ConfirmClockResponse { clock: Some(timestamp(clock)), audit_index })
    }

    pub(super) async fn get_configuration(
        &self,
        request: Request<pb::GetConfigurationRequest>,
    ) -> Result<pb::GetConfigurationResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        self.look(&cx, commands::ReadNode, &[("what", "configuration")]).await?;
        let admin = &self.0.admin;
        let entry = |entry: show::Entry| pb::ConfigurationEntry {
            name: entry.name,
            value: entry.value,
            source: entry.source,
        };
        Ok(pb::GetConfigurationResponse {
            entries: show::entries(&admin.config).into_iter().map(entry).collect(),
            path: admin.config.file.display().to_string(),
            loaded_at: Some(timestamp(admin.loaded_at)),
        })
    }
}

fn job(row: &[u8], record: &JobRecord, damaged: bool) -> pb::JobRecord {
    let due = crate::jobs::Job { row: row.to_vec(), record: record.clone() }.at();
    let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    pb::JobRecord {
        // Stored and shown kinds have the same numbers.
        kind: record.kind,
        due_at: stored_time(due.micros()),
        key_id: match record.client_id.is_empty() {
            true => KeyId::from_slice(&record.key_id).map(|id| id.to_string()).unwrap_or_default(),
            // A MAC stands in its place.
            false => String::new(),
        },
        client_id: record.client_id.clone(),
        api_key_prefix: record.api_key.clone(),
        version: number(record.version),
        attempts: number(record.attempts),
        last_error: match damaged {
            true => "the stored record is damaged: it is not carried out".to_owned(),
            false => record.last_error.clone(),
        },
        damaged,
    }
}

fn result(report: &VerifyReport, revision: u64) -> pb::VerifyStoreResult {
    let problem = |(text, at): (&String, &Option<RowKey>)| pb::StoreProblem {
        space: at.as_ref().map(|row| space_name(row.space)).unwrap_or_default(),
        row: at.as_ref().map(|row| HEXLOWER.encode(&row.key)).unwrap_or_default(),
        problem: text.clone(),
    };
    pb::VerifyStoreResult {
        ok: report.findings.is_empty(),
        records_checked: report.rows,
        records_failed: report.damaged,
        problems: report.findings.iter().zip(&report.at).map(problem).collect(),
        revision,
        set_hash_ok: !report.foreign_rows,
        audit_ok: !report.foreign_log,
        problems_found: report.found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_jobs_have_the_same_numbers_in_the_store_and_on_the_wire() {
        for n in 0..64 {
            let stored = Kind::try_from(n).map(|k| k.as_str_name());
            let shown = pb::JobKind::try_from(n).map(|k| k.as_str_name());
            match (stored, shown) {
                (Ok(stored), Ok(shown)) => assert_eq!(format!("JOB_{stored}"), shown),
                (stored, shown) => assert!(stored.is_err() && shown.is_err(), "{n}"),
            }
        }
    }

    #[test]
    fn every_space_has_a_name() {
        for space in space::ALL {
            assert_eq!(space_name(*space) == "node", *space == space::META, "{space:?}");
        }
    }
}
