//! Large data: pieces in, pieces out, in constant memory. The token and the key are looked at again
//! with every piece, and a piece is taken only when the one before it has been read.

use std::time::Duration;

use bytes::Bytes;
use pb::decrypt_stream_request::Part as DecryptPart;
use pb::encrypt_stream_request::Part as EncryptPart;
use polykey_hsm::work::STREAM_HEADER_LEN;
use polykey_proto::polykey::v2 as pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::super::admit::Admitted;
use super::super::key_service::{Answers, KeyService};
use super::{CryptoService, number, parse};
use crate::context::Context;
use crate::error::Error;
use crate::keyring::Keyring;
use crate::keyring::work::{Opening, Sealing};
use crate::share::Place;

/// Answers that wait for a slow reader: pieces of at most a message each.
const AHEAD: usize = 1;
/// How long a message of the caller's is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of the two directions: how its messages carry pieces, and what is done with those.
#[tonic::async_trait]
trait Direction: Send + 'static {
    type Ask: Send + 'static;
    type Answer: Send + 'static;

    /// The piece in a message that is not the first.
    fn piece(ask: Self::Ask) -> Option<Bytes>;

    /// Works on a piece, or with none on the end. No answer: nothing has come of it yet.
    async fn step(
        &mut self,
        keyring: &Keyring,
        cx: &Context,
        piece: Option<&[u8]>,
    ) -> Result<Option<Self::Answer>, Error>;
}

/// A large stream: who asks, and what it holds while it is there.
struct Large<D: Direction> {
    service: KeyService,
    admitted: Admitted,
    incoming: Streaming<D::Ask>,
    _place: Place<String>,
}

fn first<T>(missing: Option<T>) -> Result<T, Error> {
    missing.ok_or_else(|| Error::invalid("header", "must be the first message of the stream"))
}

fn again() -> Error {
    Error::invalid("header", "must be the first message alone")
}

impl<D: Direction> Large<D> {
    /// Takes a place among the large streams.
    fn of(service: &CryptoService, request: Request<Streaming<D::Ask>>) -> Result<Self, Error> {
        let admitted = service.0.admit(&request)?;
        let client = admitted.context(None, None)?.caller.client_id().to_owned();
        let none = Error::Exhausted { retry_after: Duration::from_secs(1) };
        let place = service.1.take(Some(&client)).ok_or(none)?;
        let incoming = request.into_inner();
        Ok(Self { service: service.0.clone(), admitted, incoming, _place: place })
    }

    /// The surroundings of a step, with the authority of its moment.
    async fn now(&self) -> Result<Context, Error> {
        self.admitted.again(&self.service.0).await?.context(None, None)
    }

    /// A message before there is an answer.
    async fn opening_message(&mut self) -> Result<Option<D::Ask>, Error> {
        let message = tokio::time::timeout(PATIENCE, self.incoming.message()).await;
        let message = message.map_err(|_| Error::DeadlineExceeded)?;
        message.map_err(|_| Error::invalid("header", "is not a message of this call"))
    }

    /// The next piece, none at the end of the body.
    async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        // Whoever sends nothing holds a chunk's memory.
        let message = tokio::time::timeout(PATIENCE, self.incoming.message()).await;
        match message.map_err(|_| Error::DeadlineExceeded)?? {
            Some(message) => Ok(Some(D::piece(message).ok_or_else(again)?)),
            None => Ok(None),
        }
    }

    async fn step(&self, work: &mut D, piece: Option<&[u8]>) -> Result<Option<D::Answer>, Status> {
        let cx = self.now().await?;
        Ok(work.step(&self.service.0.keyring, &cx, piece).await?)
    }

    /// Answers piece after piece. `begun` goes before them; `waiting` has been read already.
    fn run(
        mut self,
        mut work: D,
        begun: Option<D::Answer>,
        mut waiting: Option<Bytes>,
    ) -> Response<Answers<D::Answer>> {
        let (answers, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            if let Some(begun) = begun
                && answers.send(Ok(begun)).await.is_err()
            {
                return;
            }
            loop {
                let piece = match waiting.take() {
                    Some(piece) => Ok(Some(piece)),
                    None => tokio::select! {
                        piece = self.next() => piece,
                        () = answers.closed() => return,
                    },
                };
                let (answer, ended) = match piece {
                    Ok(piece) => (self.step(&mut work, piece.as_deref()).await, piece.is_none()),
                    Err(status) => (Err(status), true),
                };
                let last = ended || answer.is_err();
                if let Some(answer) = answer.transpose()
                    && answers.send(answer).await.is_err()
                {
                    return;
                }
                if last {
                    return;
                }
            }
        });
        Response::new(Box::pin(ReceiverStream::new(receiver)))
    }
}

/// Plaintext in, ciphertext out.
struct Encrypting(Sealing);

#[tonic::async_trait]
impl Direction for Encrypting {
    type Ask = pb::EncryptStreamRequest;
    type Answer = pb::EncryptStreamResponse;

    fn piece(ask: Self::Ask) -> Option<Bytes> {
        match ask.part {
            Some(EncryptPart::Plaintext(piece)) => Some(piece),
            Some(EncryptPart::Header(_)) | None => None,
        }
    }

    async fn step(
        &mut self,
        keyring: &Keyring,
        cx: &Context,
        piece: Option<&[u8]>,
    ) -> Result<Option<Self::Answer>, Error> {
        let ciphertext = keyring.seal_piece(cx, &mut self.0, piece).await?;
        let answer =
            pb::EncryptStreamResponse { ciphertext: ciphertext.into(), ..Default::default() };
        Ok((!answer.ciphertext.is_empty()).then_some(answer))
    }
}

pub(super) async fn encrypt(
    service: &CryptoService,
    request: Request<Streaming<pb::EncryptStreamRequest>>,
) -> Result<Response<Answers<pb::EncryptStreamResponse>>, Error> {
    let mut large = Large::<Encrypting>::of(service, request)?;
    let header = match large.opening_message().await?.and_then(|m| m.part) {
        Some(EncryptPart::Header(header)) => Some(header),
        Some(EncryptPart::Plaintext(_)) | None => None,
    };
    let command = parse::encrypt_stream(first(header)?)?;
    let cx = large.now().await?;
    let (header, sealing) = service.0.0.keyring.encrypt_stream(&cx, &command).await?;
    let (key, version) = sealing.under();
    let begun = pb::EncryptStreamResponse {
        ciphertext: header.into(),
        key_id: key.to_string(),
        version: number(version),
    };
    Ok(large.run(Encrypting(sealing), Some(begun), None))
}

/// Ciphertext in, plaintext out; the first answer names the key and its version.
struct Decrypting {
    opening: Opening,
    named: bool,
}

#[tonic::async_trait]
impl Direction for Decrypting {
    type Ask = pb::DecryptStreamRequest;
    type Answer = pb::DecryptStreamResponse;

    fn piece(ask: Self::Ask) -> Option<Bytes> {
        match ask.part {
            Some(DecryptPart::Ciphertext(piece)) => Some(piece),
            Some(DecryptPart::Header(_)) | None => None,
        }
    }

    async fn step(
        &mut self,
        keyring: &Keyring,
        cx: &Context,
        piece: Option<&[u8]>,
    ) -> Result<Option<Self::Answer>, Error> {
        let plaintext = keyring.open_piece(cx, &mut self.opening, piece).await?;
        // Nothing may be all there is to say at the end.
        if plaintext.is_empty() && piece.is_some() {
            return Ok(None);
        }
        let plaintext = Bytes::copy_from_slice(&plaintext);
        let mut answer = pb::DecryptStreamResponse { plaintext, ..Default::default() };
        if !std::mem::replace(&mut self.named, true) {
            let (key, version) = self.opening.under();
            (answer.key_id, answer.version) = (key.to_string(), number(version));
        }
        Ok(Some(answer))
    }
}

pub(super) async fn decrypt(
    service: &CryptoService,
    request: Request<Streaming<pb::DecryptStreamRequest>>,
) -> Result<Response<Answers<pb::DecryptStreamResponse>>, Error> {
    let mut large = Large::<Decrypting>::of(service, request)?;
    let header = match large.opening_message().await?.and_then(|m| m.part) {
        Some(DecryptPart::Header(header)) => Some(header),
        Some(DecryptPart::Ciphertext(_)) | None => None,
    };
    let mut command = parse::decrypt_stream(first(header)?)?;
    // The header of the ciphertext may come in pieces too.
    let mut begin: Vec<u8> = Vec::new();
    while begin.len() < STREAM_HEADER_LEN {
        match large.opening_message().await? {
            Some(message) => {
                let piece = Decrypting::piece(message).ok_or_else(again)?;
                begin.extend_from_slice(&piece);
            }
            None => {
                return Err(Error::invalid("ciphertext", "is not a large Polykey ciphertext"));
            }
        }
    }
    let mut begin = Bytes::from(begin);
    command.header = begin.split_to(STREAM_HEADER_LEN);
    let cx = large.now().await?;
    let opening = service.0.0.keyring.decrypt_stream(&cx, &command).await?;
    Ok(large.run(Decrypting { opening, named: false }, None, Some(begin)))
}
