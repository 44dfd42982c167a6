//! The audit log as a server sends it.

use std::io::Write;
use std::path::Path;

use bytes::Bytes;
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::export_audit_log_response::Part;

use super::audit_view::CheckpointView;
use super::error::{CliError, Exit};
use super::progress::Bar;
use super::remote::{Remote, next};
use crate::audit::VerifyingKey;
use crate::audit::export::ExportWriter;
use crate::client::rpc;
use crate::vault::tree::{Frontier, Hash};

/// The newest checkpoint.
pub(super) async fn checkpoint(remote: &Remote) -> Result<CheckpointView, CliError> {
    optional_checkpoint(remote).await?.ok_or_else(none_yet)
}

pub(super) async fn optional_checkpoint(
    remote: &Remote,
) -> Result<Option<CheckpointView>, CliError> {
    let request = pb::GetAuditCheckpointRequest {};
    let answer = remote.read(request, rpc!(AdminServiceClient, get_audit_checkpoint)).await?;
    Ok(answer.checkpoint.map(CheckpointView::from))
}

/// Why a log was not copied.
pub(super) enum CopyError {
    Read(CliError),
    Write(std::io::Error),
}

impl From<CliError> for CopyError {
    fn from(error: CliError) -> Self {
        Self::Read(error)
    }
}

impl From<std::io::Error> for CopyError {
    fn from(error: std::io::Error) -> Self {
        Self::Write(error)
    }
}

impl CopyError {
    pub(super) fn at(self, path: &Path) -> CliError {
        match self {
            Self::Read(error) => error,
            Self::Write(error) => CliError::file(path, &error),
        }
    }
}

/// What was copied.
pub(super) struct Copied {
    pub(super) first: u64,
    pub(super) end: u64,
    pub(super) checkpoint: CheckpointView,
    pub(super) root: Bytes,
}

pub(super) fn none_yet() -> CliError {
    CliError::new(Exit::NotFound, "the log has no checkpoint yet")
        .hint("The first one is signed shortly after the first event; try again.")
}

/// Writes the log of the server as an export; `None` if there is nothing to write.
pub(super) async fn copy<W: Write>(
    remote: &Remote,
    request: pb::ExportAuditLogRequest,
    out: W,
) -> Result<Option<(W, Copied)>, CopyError> {
    let Some(own) = optional_checkpoint(remote).await? else { return Ok(None) };
    let broken = |what: &str| CopyError::Read(CliError::new(Exit::DataLoss, what));
    let key = VerifyingKey::parse(&own.public_key);
    let keys = [key.ok_or_else(|| broken("the checkpoint comes with no public key"))?];
    let mut bar = Bar::new("leaves");
    let mut stream = remote.stream(request, rpc!(AdminServiceClient, export_audit_log)).await?;
    let mut out = Some(out);
    let mut writing: Option<(ExportWriter<W>, u64)> = None;
    let mut count = 0_u64;
    while let Some(message) = next(&mut stream).await? {
        match message.part {
            Some(Part::Leaves(part)) => {
                if let Some(out) = out.take() {
                    let root = |root: &Bytes| root.as_ref().try_into().ok();
                    let roots = part.subtrees.iter().map(root).collect::<Option<Vec<Hash>>>();
                    let log = roots.and_then(|roots| Frontier::from_parts(part.first_index, roots));
                    let log = log.ok_or_else(|| broken("the server says not what is before"))?;
                    count = part.first_index;
                    writing = Some((ExportWriter::behind(&log, out, &own.origin, &keys)?, count));
                }
                let Some((writer, _)) = writing.as_mut().filter(|_| part.first_index == count)
                else {
                    return Err(broken("the server left leaves out"));
                };
                for leaf in &part.leaves {
                    writer.leaf(leaf)?;
                    count += 1;
                }
                bar.at(count, own.tree_size);
            }
            Some(Part::Checkpoint(checkpoint)) => {
                let Some((mut writer, first)) = writing else {
                    return Err(broken("the server sent no leaves"));
                };
                writer.checkpoint(&checkpoint.note)?;
                let root = checkpoint.root_hash.clone();
                let checkpoint = CheckpointView::from(checkpoint);
                let copied = Copied { first, end: count, checkpoint, root };
                return Ok(Some((writer.end()?, copied)));
            }
            None => {}
        }
    }
    match writing {
        None => Ok(None),
        Some(_) => Err(broken("the log ended without a checkpoint")),
    }
}
