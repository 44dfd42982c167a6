//! Large data: pieces in, pieces out, in constant memory. The token and the key are looked at again
//! with every piece, and a piece is taken only when the one before it has been read.

use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use pb::decrypt_stream_request::Part as DecryptPart;
use pb::encrypt_stream_request::Part as EncryptPart;
use polykey_hsm::work::STREAM_HEADER_LEN;
use polykey_proto::polykey::v2 as pb;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::super::admit::Admitted;
use super::super::key_service::{Answers, KeyService};
use super::{CryptoService, number, parse};
use crate::context::Context;
use crate::error::Error;
use crate::keyring::work::{Opening, Sealing};
use crate::share::Place;

/// Answers that wait for a slow reader: pieces of at most a message each.
const AHEAD: usize = 1;
/// How long a message of the caller's is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn answers<T: Send + 'static>(
    stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Response<Answers<T>> {
    Response::new(Box::pin(stream))
}

fn first<T>(missing: Option<T>) -> Result<T, Error> {
    missing.ok_or_else(|| Error::invalid("header", "must be the first message of the stream"))
}

fn again() -> Error {
    Error::invalid("header", "must be the first message alone")
}

async fn next<T>(
    incoming: &mut Streaming<T>,
    answers: &tokio::sync::mpsc::Sender<Result<impl Sized, Status>>,
) -> Option<Result<T, Status>> {
    tokio::select! {
        message = incoming.message() => message.transpose(),
        () = answers.closed() => None,
        // Whoever sends nothing holds a chunk's memory.
        () = tokio::time::sleep(PATIENCE) => Some(Err(Error::DeadlineExceeded.into())),
    }
}

/// A place among the large streams, while it is held.
fn place(service: &CryptoService, cx: &Context) -> Result<Place<String>, Error> {
    let client = cx.caller.client_id().to_owned();
    let none = Error::Exhausted { retry_after: Duration::from_secs(1) };
    service.1.take(Some(&client)).ok_or(none)
}

/// The surroundings of a step, with the authority of its moment.
async fn now(service: &KeyService, admitted: &Admitted) -> Result<Context, Error> {
    admitted.again(&service.0).await?.context(None, None)
}

/// The next message of a body that must not end yet.
async fn opening_message<T>(incoming: &mut Streaming<T>) -> Result<Option<T>, Error> {
    let message = tokio::time::timeout(PATIENCE, incoming.message()).await;
    let message = message.map_err(|_| Error::DeadlineExceeded)?;
    message.map_err(|_| Error::invalid("header", "is not a message of this call"))
}

pub(super) async fn encrypt(
    service: &CryptoService,
    request: Request<Streaming<pb::EncryptStreamRequest>>,
) -> Result<Response<Answers<pb::EncryptStreamResponse>>, Error> {
    let admitted = service.0.admit(&request)?;
    let place = place(service, &admitted.context(None, None)?)?;
    let service = service.0.clone();
    let mut incoming = request.into_inner();
    let header = match opening_message(&mut incoming).await?.and_then(|m| m.part) {
        Some(EncryptPart::Header(header)) => Some(header),
        Some(EncryptPart::Plaintext(_)) | None => None,
    };
    let command = parse::encrypt_stream(first(header)?)?;
    let cx = now(&service, &admitted).await?;
    let (header, sealing) = service.0.keyring.encrypt_stream(&cx, &command).await?;
    let (key, version) = sealing.under();
    let (sender, receiver) = tokio::sync::mpsc::channel(AHEAD);
    let begun = pb::EncryptStreamResponse {
        ciphertext: header.into(),
        key_id: key.to_string(),
        version: number(version),
    };
    tokio::spawn(async move {
        let _place = place;
        if sender.send(Ok(begun)).await.is_err() {
            return;
        }
        let mut sealing = sealing;
        loop {
            let answer = match next(&mut incoming, &sender).await {
                Some(Ok(message)) => {
                    encrypt_piece(&service, &admitted, &mut sealing, message).await
                }
                Some(Err(status)) => Err(status),
                None if sender.is_closed() => return,
                None => {
                    let last = encrypt_end(&service, &admitted, sealing).await;
                    let _ = sender.send(last.map(ciphertext)).await;
                    return;
                }
            };
            let failed = answer.is_err();
            if matches!(&answer, Ok(piece) if piece.is_empty()) {
                continue;
            }
            if sender.send(answer.map(ciphertext)).await.is_err() || failed {
                return;
            }
        }
    });
    Ok(answers(ReceiverStream::new(receiver)))
}

fn ciphertext(bytes: Vec<u8>) -> pb::EncryptStreamResponse {
    pb::EncryptStreamResponse { ciphertext: bytes.into(), ..Default::default() }
}

async fn encrypt_piece(
    service: &KeyService,
    admitted: &Admitted,
    sealing: &mut Sealing,
    message: pb::EncryptStreamRequest,
) -> Result<Vec<u8>, Status> {
    let Some(EncryptPart::Plaintext(plaintext)) = message.part else {
        return Err(again().into());
    };
    let cx = now(service, admitted).await?;
    service.0.keyring.may_go_on_sealing(&cx, sealing).await?;
    Ok(sealing.push(&plaintext)?)
}

async fn encrypt_end(
    service: &KeyService,
    admitted: &Admitted,
    sealing: Sealing,
) -> Result<Vec<u8>, Status> {
    let cx = now(service, admitted).await?;
    service.0.keyring.may_go_on_sealing(&cx, &sealing).await?;
    Ok(sealing.finish()?)
}

pub(super) async fn decrypt(
    service: &CryptoService,
    request: Request<Streaming<pb::DecryptStreamRequest>>,
) -> Result<Response<Answers<pb::DecryptStreamResponse>>, Error> {
    let admitted = service.0.admit(&request)?;
    let place = place(service, &admitted.context(None, None)?)?;
    let service = service.0.clone();
    let mut incoming = request.into_inner();
    let header = match opening_message(&mut incoming).await?.and_then(|m| m.part) {
        Some(DecryptPart::Header(header)) => Some(header),
        Some(DecryptPart::Ciphertext(_)) | None => None,
    };
    let mut command = parse::decrypt_stream(first(header)?)?;
    // The header of the ciphertext may come in pieces too.
    let mut begin: Vec<u8> = Vec::new();
    while begin.len() < STREAM_HEADER_LEN {
        match opening_message(&mut incoming).await?.map(|m| m.part) {
            Some(Some(DecryptPart::Ciphertext(piece))) => begin.extend_from_slice(&piece),
            Some(Some(DecryptPart::Header(_)) | None) => return Err(again()),
            None => {
                return Err(Error::invalid("ciphertext", "is not a large Polykey ciphertext"));
            }
        }
    }
    let mut begin = Bytes::from(begin);
    command.header = begin.split_to(STREAM_HEADER_LEN);
    let cx = now(&service, &admitted).await?;
    let opening = service.0.keyring.decrypt_stream(&cx, &command).await?;
    let (key, version) = opening.under();
    let (sender, receiver) = tokio::sync::mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let _place = place;
        let mut opening = opening;
        let mut named = Some((key.to_string(), number(version)));
        let mut waiting = Some(begin);
        loop {
            let piece = match waiting.take() {
                Some(piece) => Some(Ok(Some(DecryptPart::Ciphertext(piece)))),
                None => next(&mut incoming, &sender).await.map(|m| m.map(|m| m.part)),
            };
            let (answer, last) = match piece {
                Some(Ok(part)) => {
                    (decrypt_piece(&service, &admitted, &mut opening, part).await, false)
                }
                Some(Err(status)) => (Err(status), true),
                None if sender.is_closed() => return,
                None => {
                    let end = decrypt_end(&service, &admitted, &mut opening).await;
                    let _ = sender.send(end.map(|p| plaintext(&p, named.take()))).await;
                    return;
                }
            };
            let last = last || answer.is_err();
            if matches!(&answer, Ok(piece) if piece.is_empty()) {
                continue;
            }
            let answer = answer.map(|piece| plaintext(&piece, named.take()));
            if sender.send(answer).await.is_err() || last {
                return;
            }
        }
    });
    Ok(answers(ReceiverStream::new(receiver)))
}

fn plaintext(bytes: &[u8], named: Option<(String, i32)>) -> pb::DecryptStreamResponse {
    let (key_id, version) = named.unwrap_or_default();
    pb::DecryptStreamResponse { plaintext: Bytes::copy_from_slice(bytes), key_id, version }
}

async fn decrypt_piece(
    service: &KeyService,
    admitted: &Admitted,
    opening: &mut Opening,
    part: Option<DecryptPart>,
) -> Result<zeroize::Zeroizing<Vec<u8>>, Status> {
    let Some(DecryptPart::Ciphertext(ciphertext)) = part else {
        return Err(again().into());
    };
    let cx = now(service, admitted).await?;
    service.0.keyring.may_go_on_opening(&cx, opening).await?;
    let piece = opening.push(&ciphertext);
    Ok(service.0.keyring.piece_opened(&cx, opening, piece).await?)
}

async fn decrypt_end(
    service: &KeyService,
    admitted: &Admitted,
    opening: &mut Opening,
) -> Result<zeroize::Zeroizing<Vec<u8>>, Status> {
    let cx = now(service, admitted).await?;
    service.0.keyring.may_go_on_opening(&cx, opening).await?;
    let end = opening.finish();
    Ok(service.0.keyring.piece_opened(&cx, opening, end).await?)
}
