//! The comparison of every row with the head: a row that was replayed, dropped or added shows.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use polykey_proto::polykey::record::v1::{
    AliasRecord, AuditArchiveRecord, AuditLeaf, CanaryRecord, ClientRecord, ClockRecord,
    HeadRecord, IdempotencyRecord, IdentityRecord, ImportRecord, JobRecord, KeyRecord, LaneRecord,
    ListRow, NoticesRecord, ResealRecord, RevokedTokenRecord, RoleRecord, SigningKeyRecord,
    TokenFamilyRecord, UsageMark, UsageRecord, UseCountRecord, VersionRecord, WebhookRecord,
};
use polykey_storage::{Direction, RowKey, Space};

use super::head::{Head, set_element};
use super::space::{self, Record, meta};
use super::tree::{Frontier, leaf_hash};
use super::{Vault, damage, seal};
use crate::error::Error;

/// How far a verification is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows looked at.
    pub rows: u64,
    /// Rows there should be, by the head.
    pub expected: u64,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Rows looked at.
    pub rows: u64,
    /// Audit leaves among them.
    pub leaves: u64,
    /// What is wrong; empty if nothing is. The first 100 lines.
    pub findings: Vec<String>,
    /// How many there are in all.
    pub found: u64,
    /// The row that each finding is about, where it is about one.
    pub at: Vec<Option<RowKey>>,
    /// Rows that are damaged, those beyond the findings kept included.
    pub damaged: u64,
    /// The first 1,000 of them.
    pub rows_damaged: BTreeSet<RowKey>,
    /// Whether the rows are not those the head counts.
    pub foreign_rows: bool,
    /// Whether the audit log is not the one the head names, or a leaf of it does not open.
    pub foreign_log: bool,
}

impl VerifyReport {
    fn damage(&mut self, row: &RowKey, text: String) {
        self.damaged += 1;
        self.found += 1;
        if self.rows_damaged.len() < damage::MOST {
            self.rows_damaged.insert(row.clone());
        }
        if self.findings.len() < FINDINGS {
            self.findings.push(text);
            self.at.push(Some(row.clone()));
        }
    }

    /// Whether the rows as a whole are not those that were written. A row that merely does not open is
    /// known for what it is and never served.
    fn stops(&self) -> bool {
        self.foreign_rows || self.foreign_log
    }

    fn find(&mut self, text: String) {
        self.found += 1;
        if self.findings.len() < FINDINGS {
            self.findings.push(text);
            self.at.push(None);
        }
    }
}

/// Rows read at a time. Audit leaves may have a MiB each.
const fn step(space: Space) -> usize {
    if space.0 == space::AUDIT.0 { 32 } else { 1024 }
}
/// Findings that are named; the others are counted.
const FINDINGS: usize = 100;

impl Vault {
    /// Compares every row of one snapshot with the head of that snapshot. With `open`, every row
    /// is opened too, and every audit leaf hashed again; without it only the headers are read.
    /// Rows other than those the head counts, another log, or pages that make no sense stop writing;
    /// rows of the right counter that do not open are [`Self::damaged`].
    ///
    /// # Errors
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn verify(
        &self,
        open: bool,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<VerifyReport, Error> {
        let report = self.verify_rows(open, &mut progress).await;
        self.unread.store(report.is_err(), Ordering::Release);
        let report = report?;
        if open {
            self.damage.settle(report.rows_damaged.clone(), report.damaged);
        }
        if report.stops() {
            self.intact.store(false, Ordering::Release);
        }
        for finding in &report.findings {
            tracing::error!(finding, "the store failed its verification");
        }
        if report.found > report.findings.len() as u64 {
            let (found, named) = (report.found, report.findings.len());
            tracing::error!(
                found,
                named,
                "the store failed its verification in more places than are named"
            );
        }
        Ok(report)
    }

    async fn verify_rows(
        &self,
        open: bool,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<VerifyReport, Error> {
        let (snapshot, ring) = self.steady().await?;
        let sealer = ring.sealer();
        let mut report = VerifyReport::default();
        let entry = match self.read(snapshot.get(HeadRecord::SPACE, meta::HEAD).await) {
            Err(Error::DataLoss { .. }) => None,
            read => read?,
        };
        if let Some(entry) = &entry {
            // The head is of the newest epoch of its snapshot.
            self.not_ahead(HeadRecord::SPACE, &entry.value)?;
        }
        let head = entry
            .as_ref()
            .and_then(|e| seal::open::<HeadRecord>(&sealer, meta::HEAD, &e.value).ok())
            .and_then(|(record, _)| Head::from_record(&record));
        let Some(head) = head else {
            report.damage(
                &RowKey::new(HeadRecord::SPACE, meta::HEAD),
                "the head is missing or does not open".into(),
            );
            (report.foreign_rows, report.foreign_log) = (true, true);
            return Ok(report);
        };
        let mut seen = Head::default();
        let mut frontier = Frontier::default();
        for &space in space::ALL {
            let mut range = polykey_storage::all();
            loop {
                let scanned = snapshot.scan(space, range, Direction::Forward, step(space)).await;
                let entries = match self.read(scanned) {
                    Ok(entries) => entries,
                    // Damaged pages are a finding; a disk that is away is none.
                    Err(Error::DataLoss { internal }) => {
                        (report.foreign_rows, report.foreign_log) = (true, true);
                        report.find(format!("space {} cannot be read: {internal}", space.0));
                        return Ok(report);
                    }
                    Err(error) => return Err(error),
                };
                let Some(last) = entries.last() else { break };
                range = (std::ops::Bound::Excluded(last.key.clone()), std::ops::Bound::Unbounded);
                for entry in &entries {
                    let row = RowKey::new(space, entry.key.clone());
                    if !space::counted(&row) {
                        continue;
                    }
                    report.rows += 1;
                    let mut wrong = None;
                    match seal::counter_of(space, &entry.value) {
                        Ok(counter) => {
                            let element = set_element(&ring, &row, counter);
                            for (byte, other) in seen.set_hash.iter_mut().zip(element) {
                                *byte ^= other;
                            }
                        }
                        Err(text) => wrong = Some(text),
                    }
                    if open && let Err(error) = open_any(&sealer, &row, &entry.value) {
                        wrong = Some(error.internal_text().unwrap_or("does not open").to_owned());
                        report.foreign_log |= space == space::AUDIT;
                    }
                    if let Some(text) = wrong {
                        report.damage(&row, format!("row {row:?}: {text}"));
                    }
                    if space == space::AUDIT {
                        if entry.key != report.leaves.to_be_bytes() {
                            report.foreign_log = true;
                            report.find(format!("audit leaf {} is missing", report.leaves));
                        }
                        if let Some(hash) = entry.value.first_chunk::<32>() {
                            frontier.push(*hash);
                        }
                        report.leaves += 1;
                    }
                }
                progress(Progress { rows: report.rows, expected: head.rows });
                // Long reads must let others in between.
                tokio::task::yield_now().await;
            }
        }
        if seen.set_hash != head.set_hash || report.rows != head.rows {
            report.foreign_rows = true;
            report.find(format!(
                "the rows are not those the head counts ({} found, {} expected): rows were \
                 replayed, removed or added",
                report.rows, head.rows
            ));
        }
        if frontier != head.frontier {
            report.foreign_log = true;
            report.find("the audit log is not the one the head names".into());
        }
        Ok(report)
    }
}

type Check = fn(&polykey_hsm::Sealer, &RowKey, &[u8]) -> Result<(), Error>;

fn open_any(sealer: &polykey_hsm::Sealer, row: &RowKey, value: &[u8]) -> Result<(), Error> {
    fn check<R: Record>(
        sealer: &polykey_hsm::Sealer,
        row: &RowKey,
        value: &[u8],
    ) -> Result<(), Error> {
        seal::open::<R>(sealer, &row.key, value).map(drop)
    }
    let table: &[(Space, Check)] = &[
        (space::KEYS, check::<KeyRecord>),
        (space::VERSIONS, check::<VersionRecord>),
        (space::LIST, check::<ListRow>),
        (space::ALIASES, check::<AliasRecord>),
        (space::CLIENTS, check::<ClientRecord>),
        (space::IDENTITIES, check::<IdentityRecord>),
        (space::ROLES, check::<RoleRecord>),
        (space::TOKEN_FAMILIES, check::<TokenFamilyRecord>),
        (space::REVOKED_TOKENS, check::<RevokedTokenRecord>),
        (space::SIGNING_KEYS, check::<SigningKeyRecord>),
        (space::JOBS, check::<JobRecord>),
        (space::IDEMPOTENCY, check::<IdempotencyRecord>),
        (space::USAGE, check::<UsageRecord>),
        (space::IMPORTS, check::<ImportRecord>),
        (space::COUNTS, check::<UseCountRecord>),
        (space::AUDIT_ARCHIVES, check::<AuditArchiveRecord>),
        (space::WEBHOOKS, check::<WebhookRecord>),
    ];
    if row.space == space::AUDIT {
        let (leaf, _) = seal::open::<AuditLeaf>(sealer, &row.key, value)?;
        if leaf.archived {
            // What was hashed is elsewhere; the hash is one of those under the head's root.
            return Ok(());
        }
        let hash = value.first_chunk::<32>().copied().unwrap_or_default();
        if leaf_hash(&leaf.salt, &leaf.body) != hash {
            return Err(Error::data_loss("the leaf hash is not that of the leaf"));
        }
        return Ok(());
    }
    if row.space == space::META {
        return match row.key.as_slice() {
            meta::CANARY => check::<CanaryRecord>(sealer, row, value),
            meta::USAGE_MARK => check::<UsageMark>(sealer, row, value),
            meta::RESEAL => check::<ResealRecord>(sealer, row, value),
            meta::CLOCK => check::<ClockRecord>(sealer, row, value),
            meta::LANES => check::<LaneRecord>(sealer, row, value),
            meta::NOTICES => check::<NoticesRecord>(sealer, row, value),
            _ => Err(Error::data_loss("no such row belongs there")),
        };
    }
    match table.iter().find(|(space, _)| *space == row.space) {
        Some((_, check)) => check(sealer, row, value),
        None => Err(Error::data_loss("no record belongs there")),
    }
}
