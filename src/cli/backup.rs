//! `polykey backup create`: a backup of a node that serves.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::create_backup_response::Part;
use serde::Serialize;

use super::App;
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::progress::Bar;
use super::remote::next;
use super::server::VerifyBackupArgs;
use crate::client::{file, rpc};

/// Subcommands of `backup`.
#[derive(Subcommand, Debug)]
pub enum BackupCommand {
    /// Write every record of the running node, as of one moment, into a file that only its root key opens.
    Create(CreateBackupArgs),
    /// Open a backup and verify every record in it. No server is asked.
    Verify(VerifyBackupArgs),
}

/// Arguments of `backup create`.
#[derive(Args, Debug)]
pub struct CreateBackupArgs {
    /// The file; it has this name once it is whole.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// What was written.
#[derive(Serialize)]
struct CreatedView {
    file: String,
    revision: u64,
    records: u64,
    bytes: u64,
    audit_index: u64,
}

impl View for CreatedView {
    fn human(&self) -> Human {
        Human::Record(vec![
            ("file", self.file.clone()),
            ("revision", self.revision.to_string()),
            ("records", self.records.to_string()),
            ("bytes", self.bytes.to_string()),
            ("audit event", self.audit_index.to_string()),
            ("next", format!("polykey backup verify --config FILE --from {}", self.file)),
        ])
    }
}

pub(super) async fn create(app: &App, args: CreateBackupArgs) -> Result<(), CliError> {
    let remote = app.connect().await?;
    let failed = |error: std::io::Error| CliError::file(&args.out, &error);
    let mut out = file::NewFile::create(&args.out).map_err(failed)?;
    let status =
        remote.read(pb::GetStoreStatusRequest {}, rpc!(AdminServiceClient, get_store_status));
    let total = status.await?.size_bytes;
    let request = pb::CreateBackupRequest {};
    let mut stream = remote.stream(request, rpc!(AdminServiceClient, create_backup)).await?;
    let mut bar = Bar::new("bytes");
    let mut bytes = 0;
    while let Some(message) = next(&mut stream).await? {
        match message.part {
            Some(Part::Data(data)) => {
                bytes += data.len() as u64;
                out.write_all(&data).map_err(failed)?;
                bar.at(bytes, total);
            }
            Some(Part::Result(result)) if result.size_bytes == bytes => {
                drop(bar);
                out.finish(file::PRIVATE).map_err(failed)?;
                return app.out.print(&CreatedView {
                    file: args.out.display().to_string(),
                    revision: result.revision,
                    records: result.records,
                    bytes,
                    audit_index: result.audit_index,
                });
            }
            Some(Part::Result(_)) | None => break,
        }
    }
    let text = "the backup ended before it was whole; no file was written";
    Err(CliError::new(Exit::Unavailable, text))
}
