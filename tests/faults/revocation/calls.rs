//! Every form in which a key is used: alone, in batches, and over streams that stay open.

use bytes::Bytes;
use futures::StreamExt;
use pb::{crypto_operation, crypto_result};
use pb::{decrypt_stream_request, encrypt_stream_request};
use polykey_proto::polykey::v2 as pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Response, Status, Streaming};

use crate::support::Wire;

/// The header of large data, and a chunk of it in plaintext and in ciphertext; in bytes.
const HEADER: usize = 91;
const CHUNK: usize = 4096;
const SEALED_CHUNK: usize = CHUNK + 16;
/// Chunks of the large data that is opened.
const CHUNKS: usize = 64;
/// Pieces of two chunks, so that each is answered: the last chunk so far is held back.
const PIECES: usize = CHUNKS / 2;

/// What is used at the moment, and by which token.
#[derive(Clone, Default)]
pub(super) struct Target {
    pub(super) round: usize,
    /// Its primary version is 2; version 1 may still seal and open.
    pub(super) key: String,
    /// A message and large data, both under version 1.
    pub(super) sealed: Bytes,
    pub(super) large: Bytes,
    pub(super) tokens: Vec<String>,
}

/// What a call does with the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Does {
    Describe,
    Read,
    Seal,
    SealUnderOld,
    OpenOld,
}

/// A form of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    GetKey,
    BatchGetKeys,
    StreamGetKeys,
    StreamGetKeyMetadata,
    Encrypt,
    BatchEncrypt,
    StreamEncrypt,
    EncryptStream,
    Decrypt,
    BatchDecrypt,
    DecryptStream,
}

impl Form {
    pub(super) const ALL: [Self; 11] = [
        Self::GetKey,
        Self::BatchGetKeys,
        Self::StreamGetKeys,
        Self::StreamGetKeyMetadata,
        Self::Encrypt,
        Self::BatchEncrypt,
        Self::StreamEncrypt,
        Self::EncryptStream,
        Self::Decrypt,
        Self::BatchDecrypt,
        Self::DecryptStream,
    ];

    pub(super) fn does(self) -> Does {
        match self {
            Self::GetKey | Self::BatchGetKeys | Self::StreamGetKeys => Does::Read,
            Self::StreamGetKeyMetadata => Does::Describe,
            Self::Encrypt | Self::BatchEncrypt => Does::Seal,
            Self::StreamEncrypt | Self::EncryptStream => Does::SealUnderOld,
            Self::Decrypt | Self::BatchDecrypt | Self::DecryptStream => Does::OpenOld,
        }
    }
}

/// A refusal must be one that was meant, not a server that is out of order.
fn judged<T>(result: Result<T, Status>) -> Option<T> {
    let meant =
        [Code::NotFound, Code::PermissionDenied, Code::FailedPrecondition, Code::Unauthenticated];
    match result {
        Ok(done) => Some(done),
        Err(status) if meant.contains(&status.code()) => None,
        Err(status) => panic!("{status:?}"),
    }
}

/// A stream that stays open while it is asked one thing after another.
struct Open<Q, A> {
    ask: mpsc::Sender<Q>,
    answers: Streaming<A>,
    round: usize,
    asked: usize,
}

impl<Q: Send + 'static, A> Open<Q, A> {
    /// `first` goes before all that is asked.
    async fn begin(
        round: usize,
        first: Vec<Q>,
        call: impl AsyncFnOnce(ReceiverStream<Q>) -> Result<Response<Streaming<A>>, Status>,
    ) -> Option<Self> {
        let (ask, asked) = mpsc::channel(2);
        for message in first {
            ask.try_send(message).unwrap();
        }
        let answers = judged(call(ReceiverStream::new(asked)).await)?.into_inner();
        Some(Self { ask, answers, round, asked: 0 })
    }

    /// The next answer, without which the stream has ended.
    async fn answer(held: &mut Option<Self>) -> Option<A> {
        let answer = held.as_mut()?.answers.next().await.and_then(judged);
        if answer.is_none() {
            *held = None;
        }
        answer
    }

    async fn ask(held: &mut Option<Self>, message: impl FnOnce(usize) -> Q) -> Option<A> {
        let open = held.as_mut()?;
        let sent = open.ask.send(message(open.asked)).await;
        open.asked += 1;
        if sent.is_err() {
            *held = None;
        }
        Self::answer(held).await
    }

    fn is_of(held: Option<&Self>, round: usize) -> bool {
        held.is_some_and(|open| open.round == round)
    }
}

/// The streams that a connection holds open.
#[derive(Default)]
pub(super) struct Streams {
    metadata: Option<Open<pb::StreamGetKeyMetadataRequest, pb::StreamGetKeyMetadataResponse>>,
    work: Option<Open<pb::CryptoOperation, pb::CryptoResult>>,
    sealing: Option<Open<pb::EncryptStreamRequest, pb::EncryptStreamResponse>>,
    opening: Option<Open<pb::DecryptStreamRequest, pb::DecryptStreamResponse>>,
}

impl Streams {
    /// Makes a call; whether it gave what was asked for.
    pub(super) async fn call(&mut self, form: Form, wire: &Wire, target: &Target) -> bool {
        match form {
            Form::GetKey => get_key(wire, target).await,
            Form::BatchGetKeys => batch_get_keys(wire, target).await,
            Form::StreamGetKeys => stream_get_keys(wire, target).await,
            Form::StreamGetKeyMetadata => self.metadata(wire, target).await,
            Form::Encrypt => {
                judged(wire.work().encrypt(wire.with(encrypting(target, 0))).await).is_some()
            }
            Form::BatchEncrypt => batch(wire, encrypt_operation(target, 0)).await,
            Form::StreamEncrypt => self.encrypt(wire, target).await,
            Form::EncryptStream => self.seal_large(wire, target).await,
            Form::Decrypt => {
                judged(wire.work().decrypt(wire.with(decrypting(target))).await).is_some()
            }
            Form::BatchDecrypt => {
                let operation = crypto_operation::Operation::Decrypt(decrypting(target));
                let operation = Some(operation);
                batch(wire, pb::CryptoOperation { operation, ..Default::default() }).await
            }
            Form::DecryptStream => self.open_large(wire, target).await,
        }
    }

    async fn metadata(&mut self, wire: &Wire, target: &Target) -> bool {
        if !Open::is_of(self.metadata.as_ref(), target.round) {
            let call = async |asked| wire.keys().stream_get_key_metadata(wire.with(asked)).await;
            self.metadata = Open::begin(target.round, Vec::new(), call).await;
        }
        let ask = |_| {
            let request =
                pb::GetKeyMetadataRequest { key_id: target.key.clone(), ..Default::default() };
            pb::StreamGetKeyMetadataRequest { request: Some(request) }
        };
        use pb::stream_get_key_metadata_response::Result as Metadata;
        let answer = Open::ask(&mut self.metadata, ask).await;
        answer.is_some_and(|a| matches!(a.result, Some(Metadata::Success(_))))
    }

    async fn encrypt(&mut self, wire: &Wire, target: &Target) -> bool {
        if !Open::is_of(self.work.as_ref(), target.round) {
            let call = async |asked| wire.work().stream_crypto(wire.with(asked)).await;
            self.work = Open::begin(target.round, Vec::new(), call).await;
        }
        let answer = Open::ask(&mut self.work, |_| encrypt_operation(target, 1)).await;
        answer.is_some_and(|answer| worked(&answer))
    }

    /// To begin large data is a use of the key already.
    async fn seal_large(&mut self, wire: &Wire, target: &Target) -> bool {
        if Open::is_of(self.sealing.as_ref(), target.round) {
            let answer = Open::ask(&mut self.sealing, |_| plaintext(2)).await;
            return answer.is_some_and(|answer| !answer.ciphertext.is_empty());
        }
        let call = async |asked| wire.work().encrypt_stream(wire.with(asked)).await;
        let first = vec![large_header(&target.key, 1)];
        self.sealing = Open::begin(target.round, first, call).await;
        Open::answer(&mut self.sealing).await.is_some()
    }

    async fn open_large(&mut self, wire: &Wire, target: &Target) -> bool {
        let ciphertext = |piece: Bytes| pb::DecryptStreamRequest {
            part: Some(decrypt_stream_request::Part::Ciphertext(piece)),
        };
        // One that has been read to its end begins again.
        if self.opening.as_ref().is_some_and(|o| o.round == target.round && o.asked < PIECES) {
            let piece = |asked: usize| {
                let at = HEADER + asked * 2 * SEALED_CHUNK;
                ciphertext(target.large.slice(at..at + 2 * SEALED_CHUNK))
            };
            let answer = Open::ask(&mut self.opening, piece).await;
            return answer.is_some_and(|answer| !answer.plaintext.is_empty());
        }
        let header = decrypt_stream_request::Part::Header(pb::DecryptStreamHeader::default());
        let header = pb::DecryptStreamRequest { part: Some(header) };
        let call = async |asked| wire.work().decrypt_stream(wire.with(asked)).await;
        let first = vec![header, ciphertext(target.large.slice(..HEADER))];
        self.opening = Open::begin(target.round, first, call).await;
        self.opening.is_some()
    }
}

async fn get_key(wire: &Wire, target: &Target) -> bool {
    let body = pb::GetKeyRequest { key_id: target.key.clone(), ..Default::default() };
    judged(wire.keys().get_key(wire.with(body)).await).is_some()
}

async fn batch_get_keys(wire: &Wire, target: &Target) -> bool {
    let item = pb::KeyRequestItem { key_id: target.key.clone(), ..Default::default() };
    let keys = vec![item; 3];
    let body = pb::BatchGetKeysRequest { keys, continue_on_error: true, ..Default::default() };
    let reply = judged(wire.keys().batch_get_keys(wire.with(body)).await);
    use pb::batch_get_keys_result::Result as Got;
    reply.is_some_and(|reply| {
        reply.get_ref().results.iter().any(|r| matches!(r.result, Some(Got::Success(_))))
    })
}

async fn stream_get_keys(wire: &Wire, target: &Target) -> bool {
    let body = pb::StreamGetKeysRequest { key_id: target.key.clone(), ..Default::default() };
    let Some(answers) = judged(wire.keys().stream_get_keys(wire.with(body)).await) else {
        return false;
    };
    let mut answers = answers.into_inner();
    let mut any = false;
    use pb::stream_get_keys_response::Result as Got;
    while let Some(answer) = answers.next().await.and_then(judged) {
        any |= matches!(answer.result, Some(Got::Success(_)));
    }
    any
}

fn encrypting(target: &Target, version: i32) -> pb::EncryptRequest {
    pb::EncryptRequest {
        key_id: target.key.clone(),
        version,
        plaintext: b"x".as_slice().into(),
        ..Default::default()
    }
}

fn encrypt_operation(target: &Target, version: i32) -> pb::CryptoOperation {
    let operation = crypto_operation::Operation::Encrypt(encrypting(target, version));
    pb::CryptoOperation { operation: Some(operation), ..Default::default() }
}

fn decrypting(target: &Target) -> pb::DecryptRequest {
    pb::DecryptRequest { ciphertext: target.sealed.clone(), ..Default::default() }
}

fn worked(result: &pb::CryptoResult) -> bool {
    !matches!(result.result, None | Some(crypto_result::Result::Error(_)))
}

async fn batch(wire: &Wire, operation: pb::CryptoOperation) -> bool {
    let body = pb::BatchCryptoRequest { operations: vec![operation; 3], continue_on_error: true };
    let reply = judged(wire.work().batch_crypto(wire.with(body)).await);
    reply.is_some_and(|reply| reply.get_ref().results.iter().any(worked))
}

fn large_header(key: &str, version: i32) -> pb::EncryptStreamRequest {
    let header = pb::EncryptStreamHeader {
        key_id: key.to_owned(),
        version,
        chunk_size: i32::try_from(CHUNK).unwrap(),
        ..Default::default()
    };
    pb::EncryptStreamRequest { part: Some(encrypt_stream_request::Part::Header(header)) }
}

fn plaintext(chunks: usize) -> pb::EncryptStreamRequest {
    let piece = vec![7; chunks * CHUNK].into();
    pb::EncryptStreamRequest { part: Some(encrypt_stream_request::Part::Plaintext(piece)) }
}

/// A message and large data under the primary version of a key.
pub(super) async fn sealed(wire: &Wire, key: &str) -> (Bytes, Bytes) {
    let target = Target { key: key.to_owned(), ..Target::default() };
    let message = wire.work().encrypt(wire.with(encrypting(&target, 0))).await.unwrap();
    let pieces = vec![large_header(key, 0), plaintext(CHUNKS)];
    let pieces = wire.with(tokio_stream::iter(pieces));
    let mut answers = wire.work().encrypt_stream(pieces).await.unwrap().into_inner();
    let mut large = Vec::new();
    while let Some(answer) = answers.next().await {
        large.extend_from_slice(&answer.unwrap().ciphertext);
    }
    assert_eq!(large.len(), HEADER + CHUNKS * SEALED_CHUNK);
    (message.into_inner().ciphertext, large.into())
}
