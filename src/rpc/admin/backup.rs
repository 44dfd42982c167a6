//! Backups of a store that serves.

use std::sync::Arc;
use std::time::Duration;

use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::create_backup_response::Part;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::{AdminService, commands, event};
use crate::authz::{Action, Resource};
use crate::backup::{self, Contents};
use crate::error::Error;
use crate::rpc::admit::Admitted;
use crate::rpc::key_service::Answers;

/// A caller that takes nothing for so long is given up: the store keeps what is replaced meanwhile.
const STALL: Duration = Duration::from_secs(60);
/// When another one may be tried.
const LATER: Duration = Duration::from_secs(10);

type Piece = Result<pb::CreateBackupResponse, Status>;

fn piece(part: Part) -> Piece {
    Ok(pb::CreateBackupResponse { part: Some(part) })
}

impl AdminService {
    pub(super) async fn create_backup(
        &self,
        request: Request<pb::CreateBackupRequest>,
    ) -> Result<Answers<pb::CreateBackupResponse>, Error> {
        let (admitted, cx, _) = self.admit(request)?;
        let decision = self.authorize(&cx, Resource::Node, commands::BackupStore).await?;
        let place = Arc::clone(&self.0.backups).try_acquire_owned();
        let place = place.map_err(|_| Error::Exhausted { retry_after: LATER })?;
        let event = event(&cx, Action::BackupStore, decision, &[]);
        if !self.directory().vault().intact() {
            let text = "the store failed its verification: a backup of it would not be one";
            return Err(Error::data_loss(text));
        }
        let leaf = self.0.deps.trail.record(event).await?;
        // Whoever restores it with a recovery key asks for a signed checkpoint.
        self.0.deps.trail.checkpoint().await?;
        let service = self.clone();
        let (answers, receiver) = mpsc::channel(2);
        tokio::spawn(async move {
            let last = match service.send(&admitted, &answers).await {
                Ok(Some(Contents { revision, rows, bytes })) => {
                    piece(Part::Result(pb::CreateBackupResult {
                        revision,
                        records: rows,
                        size_bytes: bytes,
                        audit_index: leaf,
                    }))
                }
                Ok(None) => return,
                Err(error) => Err(Status::from(error)),
            };
            drop(place);
            // Whoever has gone away, or takes nothing, has no whole file.
            tokio::time::timeout(STALL, answers.send(last)).await.ok();
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    /// Sends all pieces. `None` if the reader has gone away.
    async fn send(
        &self,
        admitted: &Admitted,
        answers: &mpsc::Sender<Piece>,
    ) -> Result<Option<Contents>, Error> {
        let vault = Arc::clone(self.directory().vault());
        let now = self.0.deps.now();
        let (pieces, mut ready) = mpsc::channel::<Vec<u8>>(2);
        // On a thread of its own: requests do not wait behind it.
        let written = tokio::task::spawn_blocking(move || {
            let sink = |piece| pieces.blocking_send(piece).is_ok();
            futures::executor::block_on(backup::write(&vault, now, sink))
        });
        while let Some(data) = ready.recv().await {
            let still = admitted.still(&self.0.deps).await?;
            let cx = still.context(None, None)?;
            self.authorize(&cx, Resource::Node, commands::BackupStore).await?;
            let sent = answers.send(piece(Part::Data(data.into())));
            match tokio::time::timeout(STALL, sent).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(None),
                Err(_) => return Err(Error::DeadlineExceeded),
            }
        }
        written.await.map_err(|error| Error::internal(format!("the backup ended: {error}")))?
    }
}
