//! The export: the whole log as JSON lines, to be verified anywhere with the public key alone.
//!
//! ```text
//! {"polykey_audit_export":1,"origin":"polykey/…","public_keys":["…"]}
//! {"checkpoint":"…note…"}            anywhere before, or right behind, the leaves it covers
//! {"leaf":0,"data":"base64(salt 32 ‖ body)"}
//! {"end":1}                          the number of leaves
//! ```
//! The hash of a leaf is SHA-256(0x00 ‖ data); the tree is that of RFC 9162 section 2.1; a body is a
//! `polykey.record.v1.AuditBody`.
//!
//! Where leaves before were archived, the format is 2 and the first line says where it begins and names the
//! roots of the complete subtrees over what is before, largest first; an archive but the first is such a file
//! as well. Files that follow one another are verified as one log.
//!
//! ```text
//! {"polykey_audit_export":2,"origin":"polykey/…","public_keys":["…"],"first":7,"subtrees":["…","…","…"]}
//! ```

use std::io::{BufRead, Read, Write};
use std::ops::Bound;

use data_encoding::{BASE64, HEXLOWER};
use polykey_proto::polykey::record::v1::AuditLeaf;
use polykey_storage::Direction;
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Checkpoint, Trusted, VerifyingKey, origin};
use super::trail::Trail;
use super::verify::{Report, Walk};
use crate::error::Error;
use crate::vault::Vault;
use crate::vault::tree::Frontier;

const FORMAT: u32 = 1;
/// That of a file that does not begin with the log.
const LATER: u32 = 2;
/// Bytes of salt in front of a body.
pub const SALT: usize = 32;
/// The longest line that is read: a row of the store in base64, and some.
const LINE: u64 = 12 * 1024 * 1024;

#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(deny_unknown_fields)]
struct HeaderLine {
    polykey_audit_export: u32,
    origin: String,
    public_keys: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subtrees: Option<Vec<String>>,
}

impl HeaderLine {
    /// The tree over the leaves before the first one of the file.
    fn before(&self) -> Option<Frontier> {
        match (self.polykey_audit_export, self.first, &self.subtrees) {
            (FORMAT, None, None) => Some(Frontier::default()),
            (LATER, Some(first), Some(roots)) if (1..=i64::MAX as u64).contains(&first) => {
                let root = |text: &String| BASE64.decode(text.as_bytes()).ok()?.try_into().ok();
                Frontier::from_parts(first, roots.iter().map(root).collect::<Option<_>>()?)
            }
            _ => None,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckpointLine {
    checkpoint: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LeafLine {
    leaf: u64,
    data: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndLine {
    end: u64,
}

/// The line of a leaf, without its end.
pub(super) fn leaf_line(leaf: u64, salt: &[u8], body: &[u8]) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(&LeafLine { leaf, data: BASE64.encode(&[salt, body].concat()) })
}

/// The line of a checkpoint, without its end.
pub(super) fn checkpoint_line(note: &str) -> serde_json::Result<Vec<u8>> {
    serde_json::to_vec(&CheckpointLine { checkpoint: note.to_owned() })
}

/// Writes an export, line by line.
#[derive(Debug)]
pub struct ExportWriter<W> {
    out: W,
    leaves: u64,
}

impl<W: Write> ExportWriter<W> {
    /// Begins one.
    ///
    /// # Errors
    /// Whatever `out` says.
    pub fn new(out: W, origin: &str, keys: &[VerifyingKey]) -> std::io::Result<Self> {
        Self::behind(&Frontier::default(), out, origin, keys)
    }

    /// Begins one with the leaf behind those of this tree.
    ///
    /// # Errors
    /// Whatever `out` says.
    pub fn behind(
        log: &Frontier,
        out: W,
        origin: &str,
        keys: &[VerifyingKey],
    ) -> std::io::Result<Self> {
        let mut writer = Self { out, leaves: log.size() };
        let roots = || log.roots().iter().map(|root| BASE64.encode(root)).collect();
        writer.line(&HeaderLine {
            polykey_audit_export: if log.size() == 0 { FORMAT } else { LATER },
            origin: origin.to_owned(),
            public_keys: keys.iter().map(ToString::to_string).collect(),
            first: (log.size() > 0).then(|| log.size()),
            subtrees: (log.size() > 0).then(roots),
        })?;
        Ok(writer)
    }

    fn line(&mut self, line: &impl Serialize) -> std::io::Result<()> {
        serde_json::to_writer(&mut self.out, line)?;
        self.out.write_all(b"\n")
    }

    /// Adds a checkpoint, at the latest right behind the last leaf it covers.
    ///
    /// # Errors
    /// Whatever the output says.
    pub fn checkpoint(&mut self, note: &str) -> std::io::Result<()> {
        self.line(&CheckpointLine { checkpoint: note.to_owned() })
    }

    /// Adds the next leaf: its salt and its body, one after the other.
    ///
    /// # Errors
    /// Whatever the output says.
    pub fn leaf(&mut self, data: &[u8]) -> std::io::Result<()> {
        self.line(&LeafLine { leaf: self.leaves, data: BASE64.encode(data) })?;
        self.leaves += 1;
        Ok(())
    }

    /// Ends it; an export without an end is no export.
    ///
    /// # Errors
    /// Whatever the output says.
    pub fn end(mut self) -> std::io::Result<W> {
        self.line(&EndLine { end: self.leaves })?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// At most `limit` leaves from `from` on as they were hashed: salt and body, one after the other.
///
/// # Errors
/// [`Error::DataLoss`] if one is missing or fails authentication, [`Error::Unavailable`] if the
/// store cannot be read or one was archived meanwhile.
pub async fn leaves(vault: &Vault, from: u64, limit: usize) -> Result<Vec<Vec<u8>>, Error> {
    let range = (Bound::Included(from.to_be_bytes().to_vec()), Bound::Unbounded);
    let rows = vault.scan::<AuditLeaf>(range, Direction::Forward, limit).await?;
    let mut leaves = Vec::with_capacity(rows.len());
    for (index, (key, leaf)) in (from..).zip(rows) {
        if key != index.to_be_bytes() {
            return Err(Error::data_loss(format!("audit leaf {index} is missing")));
        }
        if leaf.record.archived {
            return Err(Error::unavailable(format!("audit leaf {index} has been archived")));
        }
        leaves.push([leaf.record.salt, leaf.record.body].concat());
    }
    Ok(leaves)
}

impl Trail {
    /// Signs a checkpoint and writes the log up to it, as far as it has not been archived, with every
    /// checkpoint there is over that. `keys` are those that have signed them. Returns the number of leaves.
    ///
    /// # Errors
    /// As [`Self::checkpoint`] and [`leaves`]; [`Error::Internal`] if `out` fails.
    pub async fn export(
        &self,
        out: &mut (dyn Write + Send),
        keys: &[VerifyingKey],
    ) -> Result<u64, Error> {
        let broken = |e: std::io::Error| Error::internal(format!("writing the export: {e}"));
        self.checkpoint().await?;
        let vault = self.vault();
        let size = vault.leaves();
        let (first, log) = self.kept().await?;
        let origin = origin(&vault.node_id());
        let mut writer = ExportWriter::behind(&log, out, &origin, keys).map_err(broken)?;
        for checkpoint in checkpoint::all(&**vault.store()).await? {
            let checkpoint =
                checkpoint.map_err(|e| Error::data_loss(format!("checkpoint: {e}")))?;
            if (first..=size).contains(&checkpoint.size) {
                writer.checkpoint(&checkpoint.note).map_err(broken)?;
            }
        }
        let mut next = first;
        while next < size {
            let limit = usize::try_from(size - next).unwrap_or(usize::MAX).min(16);
            let step = leaves(vault, next, limit).await?;
            if step.is_empty() {
                return Err(Error::data_loss(format!("audit leaf {next} is missing")));
            }
            for leaf in step {
                writer.leaf(&leaf).map_err(broken)?;
                next += 1;
            }
        }
        writer.end().map_err(broken)?;
        Ok(size)
    }
}

fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<Option<()>> {
    line.clear();
    reader.by_ref().take(LINE).read_until(b'\n', line)?;
    if line.is_empty() {
        return Ok(None);
    }
    // A last line without its end, or one that is too long, parses as no line of an export.
    if line.last() == Some(&b'\n') {
        line.pop();
    } else {
        line.push(b'?');
    }
    Ok(Some(()))
}

/// The line as `T`, if it is written exactly as it would be written here.
fn parse<T: Serialize + for<'a> Deserialize<'a>>(line: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(line).ok()?;
    (serde_json::to_vec(&value).ok()? == line).then_some(value)
}

fn node_id(origin: &str) -> Option<[u8; 16]> {
    let hex = origin.strip_prefix("polykey/")?;
    HEXLOWER.decode(hex.as_bytes()).ok()?.try_into().ok()
}

/// The public keys an export names. They prove nothing: whoever forges the file writes others.
///
/// # Errors
/// Whatever `reader` says; `InvalidData` if there is no header.
pub fn named_keys(reader: &mut impl BufRead) -> std::io::Result<Vec<VerifyingKey>> {
    let mut line = Vec::new();
    read_line(reader, &mut line)?;
    let header = parse::<HeaderLine>(&line).ok_or_else(|| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, "not an audit export")
    })?;
    Ok(header.public_keys.iter().filter_map(|key| VerifyingKey::parse(key)).collect())
}

/// Verifies an export: every leaf, the tree, every checkpoint in it and every one of `kept`, which
/// come from elsewhere and show what was taken off the end.
///
/// # Errors
/// Whatever `reader` says. What is wrong with the export is no error but a finding.
pub fn verify_export<'k>(
    reader: impl BufRead,
    keys: impl Into<Trusted<'k>>,
    kept: &[Checkpoint],
) -> std::io::Result<Report> {
    verify_exports([Ok(reader)], keys, kept)
}

/// As [`verify_export`], for archives and an export that follow one another, the oldest first.
///
/// # Errors
/// Whatever the readers say.
pub fn verify_exports<'k, R: BufRead>(
    readers: impl IntoIterator<Item = std::io::Result<R>>,
    keys: impl Into<Trusted<'k>>,
    kept: &[Checkpoint],
) -> std::io::Result<Report> {
    let keys = keys.into();
    let mut so_far: Option<Walk<'_>> = None;
    for reader in readers {
        let mut reader = reader?;
        let mut line = Vec::new();
        read_line(&mut reader, &mut line)?;
        let header = parse::<HeaderLine>(&line);
        let begins = header.as_ref().and_then(|h| Some((h, node_id(&h.origin)?, h.before()?)));
        let Some((header, node, before)) = begins else {
            let mut report = so_far.map_or_else(Report::default, Walk::finish);
            report.find("it does not begin as an audit export of format 1 or 2".into());
            return Ok(report);
        };
        let mut walk = match so_far.take() {
            None => Walk::behind(before, Some(node), keys, kept),
            Some(mut walk) => {
                if walk.report.origin != header.origin {
                    walk.report.find(format!("a file is of {}", header.origin));
                    return Ok(walk.finish());
                }
                if *walk.tree() != before {
                    let (end, next) = (walk.size(), before.size());
                    walk.report.find(format!(
                        "a file that begins with leaf {next} does not go on from the one before, which ends with {end} leaves: give them in order, none left out"
                    ));
                    return Ok(walk.finish());
                }
                walk
            }
        };
        let trusted =
            |name: &String| VerifyingKey::parse(name).is_some_and(|k| keys.ed25519.contains(&k));
        if !header.public_keys.iter().all(trusted) {
            walk.report
                .notes
                .push("the file names public keys that were not given: ignored".into());
        }
        lines(&mut reader, &mut walk)?;
        so_far = Some(walk);
    }
    Ok(so_far.map_or_else(Report::default, Walk::finish))
}

/// Takes the lines behind the first one.
fn lines(reader: &mut impl BufRead, walk: &mut Walk<'_>) -> std::io::Result<()> {
    let mut line = Vec::new();
    let mut ended = false;
    let mut number = 1_u64;
    while read_line(reader, &mut line)?.is_some() {
        number += 1;
        if ended {
            walk.report.find(format!("line {number} stands behind the end"));
            break;
        }
        if let Some(leaf) = parse::<LeafLine>(&line) {
            if leaf.leaf != walk.size() {
                let (found, expected) = (leaf.leaf, walk.size());
                walk.report.find(format!("leaf {found} stands where leaf {expected} belongs"));
            }
            let data = BASE64.decode(leaf.data.as_bytes()).ok();
            match data.as_deref().and_then(|data| data.split_at_checked(SALT)) {
                Some((salt, body)) => {
                    walk.leaf(salt, body);
                }
                None => walk.report.find(format!("line {number} holds no leaf")),
            }
        } else if let Some(line) = parse::<CheckpointLine>(&line) {
            match Checkpoint::parse(&line.checkpoint) {
                Some(checkpoint) => walk.checkpoint(checkpoint),
                None => walk.report.find(format!("line {number} holds a malformed checkpoint")),
            }
        } else if let Some(EndLine { end }) = parse(&line) {
            ended = true;
            if end != walk.size() {
                let found = walk.size();
                walk.report.find(format!("{found} leaves were found, {end} were exported"));
            }
        } else {
            walk.report.find(format!("line {number} is no line of an export"));
        }
    }
    if !ended {
        walk.report.find("the file ends before its end: it was cut off".into());
    }
    Ok(())
}
