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

use std::io::{BufRead, Read, Write};
use std::ops::Bound;

use data_encoding::{BASE64, HEXLOWER};
use polykey_proto::polykey::record::v1::AuditLeaf;
use polykey_storage::Direction;
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Checkpoint, VerifyingKey, origin};
use super::trail::Trail;
use super::verify::{Report, Walk};
use crate::error::Error;
use crate::vault::Vault;

const FORMAT: u32 = 1;
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
        let mut writer = Self { out, leaves: 0 };
        writer.line(&HeaderLine {
            polykey_audit_export: FORMAT,
            origin: origin.to_owned(),
            public_keys: keys.iter().map(ToString::to_string).collect(),
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
/// store cannot be read.
pub async fn leaves(vault: &Vault, from: u64, limit: usize) -> Result<Vec<Vec<u8>>, Error> {
    let range = (Bound::Included(from.to_be_bytes().to_vec()), Bound::Unbounded);
    let rows = vault.scan::<AuditLeaf>(range, Direction::Forward, limit).await?;
    let mut leaves = Vec::with_capacity(rows.len());
    for (index, (key, leaf)) in (from..).zip(rows) {
        if key != index.to_be_bytes() {
            return Err(Error::data_loss(format!("audit leaf {index} is missing")));
        }
        leaves.push([leaf.record.salt, leaf.record.body].concat());
    }
    Ok(leaves)
}

impl Trail {
    /// Signs a checkpoint and writes the log up to it, with every checkpoint there is. `keys` are
    /// those that have signed them. Returns the number of leaves.
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
        let mut writer = ExportWriter::new(out, &origin(&vault.node_id()), keys).map_err(broken)?;
        for checkpoint in checkpoint::all(&**vault.store()).await? {
            let checkpoint =
                checkpoint.map_err(|e| Error::data_loss(format!("checkpoint: {e}")))?;
            if checkpoint.size <= size {
                writer.checkpoint(&checkpoint.note).map_err(broken)?;
            }
        }
        let mut next = 0;
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
pub fn verify_export(
    mut reader: impl BufRead,
    keys: &[VerifyingKey],
    kept: &[Checkpoint],
) -> std::io::Result<Report> {
    let mut line = Vec::new();
    read_line(&mut reader, &mut line)?;
    let header = parse::<HeaderLine>(&line).filter(|h| h.polykey_audit_export == FORMAT);
    let node = header.as_ref().and_then(|h| node_id(&h.origin));
    let (Some(header), Some(node)) = (header, node) else {
        let mut report = Report::default();
        report.find("it does not begin as an audit export of format 1".into());
        return Ok(report);
    };
    let mut walk = Walk::new(Some(node), keys, kept);
    let trusted = |name: &String| VerifyingKey::parse(name).is_some_and(|k| keys.contains(&k));
    if !header.public_keys.iter().all(trusted) {
        walk.report.notes.push("the file names public keys that were not given: ignored".into());
    }
    let mut ended = false;
    let mut number = 1_u64;
    while read_line(&mut reader, &mut line)?.is_some() {
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
    Ok(walk.finish())
}
