//! Verification: every leaf hashed again, every checkpoint checked where it stands.

use std::collections::BTreeMap;

use data_encoding::BASE64;
use polykey_proto::polykey::record::v1::{AuditBody, AuditLeaf};
use polykey_storage::{Direction, Store};
use prost::Message;
use serde::Serialize;

use super::archive;
use super::checkpoint::{self, Checkpoint, Trusted, VerifyingKey, origin};
use super::proof::LeafHashes;
use crate::error::Error;
use crate::vault::tree::{Frontier, Hash, leaf_hash};
use crate::vault::{Vault, space};

/// Most findings that are kept.
const FINDINGS: usize = 100;

/// What a verification found.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Report {
    /// The name of the log.
    pub origin: String,
    /// Leaves there are.
    pub leaves: u64,
    /// Leaves whose bodies were read.
    #[serde(skip)]
    pub read: u64,
    /// Events in them; 0 where bodies were not read.
    pub events: u64,
    /// The root over them, base64.
    pub root: String,
    /// Checkpoints whose signature and root hold.
    pub checkpoints: u64,
    /// Leaves that a valid checkpoint covers: those behind it are vouched for by nobody.
    pub covered: u64,
    /// What is wrong; empty if nothing is. The first 100 lines.
    pub findings: Vec<String>,
    /// How many there are in all.
    pub found: usize,
    /// Checkpoints that none of the given keys has signed: each is a finding.
    #[serde(skip)]
    pub foreign: usize,
    /// Checkpoints of leaves that were not given: each is a finding.
    #[serde(skip)]
    pub missing: usize,
    /// Whether a checkpoint has a second signature.
    #[serde(skip)]
    pub second: bool,
    /// Worth knowing, and no fault of the log.
    pub notes: Vec<String>,
}

impl Report {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.findings.is_empty()
    }

    /// Whether all that is wrong is that other keys have signed the log than those that were given, which have
    /// signed nothing of it.
    #[must_use]
    pub fn wrong_key(&self) -> bool {
        self.foreign > 0 && self.found == self.foreign && self.covered == 0
    }

    /// Whether all that is wrong is that leaves were not given.
    #[must_use]
    pub fn incomplete(&self) -> bool {
        self.missing > 0 && self.found == self.missing
    }

    pub(super) fn find(&mut self, text: String) {
        self.found += 1;
        if self.findings.len() < FINDINGS {
            self.findings.push(text);
        }
    }
}

/// Takes leaves in order, and compares the tree with each checkpoint of its size.
pub(super) struct Walk<'k> {
    pub(super) report: Report,
    keys: Trusted<'k>,
    /// Checkpoints that hold and have no second signature of a given key.
    single: u64,
    tree: Frontier,
    /// Checkpoints still ahead, by size.
    ahead: BTreeMap<u64, Vec<Checkpoint>>,
    node_id: Option<[u8; 16]>,
    /// Leaves before this one were not given.
    first: u64,
}

impl<'k> Walk<'k> {
    /// `kept` are checkpoints from elsewhere: the log must contain what they cover.
    pub(super) fn new(
        node_id: Option<[u8; 16]>,
        keys: impl Into<Trusted<'k>>,
        kept: &[Checkpoint],
    ) -> Self {
        Self::behind(Frontier::default(), node_id, keys, kept)
    }

    /// As [`Self::new`], with the tree over leaves that are not here. Nothing vouches for it but the
    /// checkpoints that follow.
    pub(super) fn behind(
        tree: Frontier,
        node_id: Option<[u8; 16]>,
        keys: impl Into<Trusted<'k>>,
        kept: &[Checkpoint],
    ) -> Self {
        let keys = keys.into();
        let report = Report {
            origin: node_id.as_ref().map(origin).unwrap_or_default(),
            ..Report::default()
        };
        let (first, ahead) = (tree.size(), BTreeMap::new());
        let mut walk = Self { report, keys, single: 0, tree, ahead, node_id, first };
        if first > 0 {
            walk.report.notes.push(format!(
                "the leaves before {first} were not given: they are in archives, and what is here goes on from them"
            ));
        }
        for checkpoint in kept {
            walk.checkpoint(checkpoint.clone());
        }
        walk
    }

    /// Expects a checkpoint; its signature is checked at once, its root when the tree has its size.
    pub(super) fn checkpoint(&mut self, checkpoint: Checkpoint) {
        let size = checkpoint.size;
        self.report.second |= checkpoint.has_second_signature();
        if checkpoint.origin != self.report.origin {
            self.report.find(format!("the checkpoint at {size} is of {}", checkpoint.origin));
        } else if checkpoint.verify(self.keys.ed25519).is_none() {
            self.report.foreign += 1;
            self.report.find(format!("the checkpoint at {size} is signed by no trusted key"));
        } else if checkpoint.verify_ml_dsa(self.keys.ml_dsa) == Some(false) {
            self.report
                .find(format!("the ML-DSA signature of the checkpoint at {size} is not its key's"));
        } else if size < self.first {
            let first = self.first;
            self.report.missing += 1;
            self.report.find(format!(
                "the checkpoint at {size} cannot be compared: the leaves before {first} were not given; give their archives as well"
            ));
        } else if size < self.tree.size() {
            self.report.find(format!("the checkpoint at {size} stands behind its leaves"));
        } else if size == self.tree.size() {
            self.compare(&checkpoint);
        } else {
            self.ahead.entry(size).or_default().push(checkpoint);
        }
    }

    fn compare(&mut self, checkpoint: &Checkpoint) {
        if checkpoint.root == self.tree.root() {
            self.report.checkpoints += 1;
            let second = checkpoint.verify_ml_dsa(self.keys.ml_dsa);
            if self.keys.ml_dsa.is_empty() || second == Some(true) {
                self.report.covered = self.report.covered.max(checkpoint.size);
            } else {
                self.single += 1;
            }
        } else {
            self.report.find(format!(
                "the first {} leaves are not those that were signed then",
                checkpoint.size
            ));
        }
    }

    pub(super) fn hash(&mut self, hash: Hash) {
        self.tree.push(hash);
        for checkpoint in self.ahead.remove(&self.tree.size()).unwrap_or_default() {
            self.compare(&checkpoint);
        }
    }

    /// A leaf with its salt and body.
    pub(super) fn leaf(&mut self, salt: &[u8], bytes: &[u8]) -> Hash {
        let index = self.tree.size();
        self.report.read += 1;
        match AuditBody::decode(bytes) {
            Ok(body) => {
                if body.index != index {
                    self.report.find(format!("leaf {index} names itself {}", body.index));
                }
                if self.node_id.is_some_and(|id| body.node_id.as_ref() != id.as_slice()) {
                    self.report.find(format!("leaf {index} is of another node"));
                }
                let events = u64::try_from(body.events.len()).unwrap_or(u64::MAX);
                self.report.events = self.report.events.saturating_add(events);
            }
            Err(_) => self.report.find(format!("leaf {index} does not decode")),
        }
        let hash = leaf_hash(salt, bytes);
        self.hash(hash);
        hash
    }

    pub(super) fn size(&self) -> u64 {
        self.tree.size()
    }

    pub(super) fn root(&self) -> Hash {
        self.tree.root()
    }

    /// The tree so far.
    pub(super) fn tree(&self) -> &Frontier {
        &self.tree
    }

    pub(super) fn finish(mut self) -> Report {
        let size = self.tree.size();
        if self.single > 0 {
            self.report.notes.push(format!(
                "{} checkpoints have no signature of a given ML-DSA key, and vouch for nothing here",
                self.single
            ));
        }
        for ahead in self.ahead.keys() {
            let text = format!(
                "a checkpoint covers {ahead} leaves, and there are {size}: the log was truncated"
            );
            self.report.find(text);
        }
        let (found, named) = (self.report.found, self.report.findings.len());
        if found > named {
            self.report
                .notes
                .push(format!("{found} findings, of which the first {named} are named"));
        }
        self.report.leaves = size;
        self.report.root = BASE64.encode(&self.tree.root());
        let bare = size - self.report.covered.min(size);
        if bare > 0 {
            self.report
                .notes
                .push(format!("the last {bare} leaves are not covered by a checkpoint yet"));
        }
        self.report
    }
}

async fn expect_stored(walk: &mut Walk<'_>, store: &dyn Store) -> Result<(), Error> {
    for checkpoint in checkpoint::all(store).await? {
        match checkpoint {
            Ok(checkpoint) => walk.checkpoint(checkpoint),
            Err(text) => walk.report.find(format!("a stored checkpoint: {text}")),
        }
    }
    Ok(())
}

/// Verifies the log in an opened store: leaves, leaf hashes, head and checkpoints. A log that grows
/// meanwhile is verified up to where it was.
///
/// # Errors
/// [`Error::Unavailable`] if the store cannot be read. What is wrong with the log is no error but a
/// finding.
pub async fn verify_store(
    vault: &Vault,
    keys: &[VerifyingKey],
    kept: &[Checkpoint],
) -> Result<Report, Error> {
    let head = vault.head();
    let mut walk = Walk::new(Some(vault.node_id()), keys, kept);
    // Read before the leaves, so that none covers more than is walked... unless the log is short.
    for checkpoint in checkpoint::all(&**vault.store()).await? {
        match checkpoint {
            // Signed after the head was read.
            Ok(checkpoint) if checkpoint.size > head.leaves && vault.leaves() > head.leaves => {}
            Ok(checkpoint) => walk.checkpoint(checkpoint),
            Err(text) => walk.report.find(format!("a stored checkpoint: {text}")),
        }
    }
    let (kept, _) = archive::kept(vault).await?;
    let mut archived = 0_u64;
    while walk.size() < head.leaves {
        let from = walk.size();
        let range = polykey_storage::from(from.to_be_bytes().to_vec());
        let rows = vault.store().scan(space::AUDIT, range, Direction::Forward, 16).await?;
        if rows.is_empty() {
            break;
        }
        for row in rows {
            let index = walk.size();
            if index == head.leaves {
                break;
            }
            if row.key != index.to_be_bytes() {
                walk.report.find(format!("leaf {index} is missing"));
                return Ok(walk.finish());
            }
            let clear = row.value.first_chunk::<32>().copied().unwrap_or_default();
            match vault.get::<AuditLeaf>(&row.key).await {
                Ok(Some(leaf)) if leaf.record.archived => {
                    if index >= kept {
                        walk.report
                            .find(format!("leaf {index} is archived, and no archive has it"));
                    }
                    archived += 1;
                    walk.hash(clear);
                }
                Ok(Some(leaf)) => {
                    if walk.leaf(&leaf.record.salt, &leaf.record.body) != clear {
                        walk.report.find(format!("the hash of leaf {index} is not its own"));
                    }
                }
                Ok(None) => {
                    walk.report.find(format!("leaf {index} is missing"));
                    walk.hash(clear);
                }
                Err(Error::DataLoss { .. }) => {
                    walk.report.find(format!("leaf {index} does not open"));
                    walk.hash(clear);
                }
                Err(error) => return Err(error),
            }
        }
        tokio::task::yield_now().await;
    }
    if archived > 0 {
        walk.report.notes.push(format!(
            "{archived} leaves are in archives: their hashes were verified here, they themselves are with `polykey audit verify --export ARCHIVE`"
        ));
    }
    if walk.size() != head.leaves || walk.root() != head.root {
        let (found, expected) = (walk.size(), head.leaves);
        walk.report.find(format!(
            "the log is not the one the head names ({found} leaves found, {expected} expected)"
        ));
    }
    Ok(walk.finish())
}

/// Verifies what stands in the clear alone, with nothing but the public keys: leaf hashes against
/// checkpoints. It needs no root key.
///
/// # Errors
/// [`Error::Unavailable`] if the store cannot be read.
pub async fn verify_clear<'k>(
    store: &dyn Store,
    node_id: [u8; 16],
    keys: impl Into<Trusted<'k>>,
    kept: &[Checkpoint],
) -> Result<Report, Error> {
    let mut walk = Walk::new(Some(node_id), keys, kept);
    expect_stored(&mut walk, store).await?;
    let mut hashes = LeafHashes::new(store, 0);
    loop {
        match hashes.step(64).await {
            Ok(step) if step.is_empty() => return Ok(walk.finish()),
            Ok(step) => step.into_iter().for_each(|hash| walk.hash(hash)),
            Err(error @ Error::DataLoss { .. }) => {
                walk.report.find(error.internal_text().unwrap_or_default().to_owned());
                return Ok(walk.finish());
            }
            Err(error) => return Err(error),
        }
        tokio::task::yield_now().await;
    }
}
