//! Streams: every message is one single operation, looked at with the authority of its moment.

use std::sync::Arc;

use futures::{Stream, StreamExt};
use polykey_proto::polykey::v2 as pb;
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::admit::Admitted;
use super::batch::Item;
use super::key_service::{Answers, KeyService, after_commit};
use super::{convert, parse, twins};
use crate::command::Mutation;
use crate::error::Error;
use crate::keyring::{Done, MetadataView};

/// Answers that wait for a slow reader before the next message is taken.
const AHEAD: usize = 16;
/// And their bytes; one more answer may be on its way into the queue.
const AHEAD_BYTES: u32 = 4 * 1024 * 1024;

/// What a stream of changes or reads does with a message.
#[tonic::async_trait]
pub(super) trait Operation: Send + 'static {
    type Ask: Send + 'static;
    type Answer: Message + 'static;

    async fn act(
        service: &KeyService,
        admitted: &Admitted,
        ask: Self::Ask,
        sequence: i64,
    ) -> (String, Item<Self::Done>)
    where
        Self::Done: Send;

    type Done: Send;

    fn answer(id: String, item: Item<Self::Done>, sequence: i64) -> Self::Answer;
}

/// Where the answers of a stream wait for their reader.
struct Ahead<T> {
    answers: mpsc::Sender<(Result<T, Status>, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
}

impl<T: Message + 'static> Ahead<T> {
    fn new() -> (Self, impl Stream<Item = Result<T, Status>> + Send + 'static) {
        let (answers, receiver) = mpsc::channel(AHEAD);
        // An answer's bytes are free again once it has been taken.
        let taken = ReceiverStream::new(receiver).map(|(answer, _bytes)| answer);
        (Self { answers, room: Arc::new(Semaphore::new(AHEAD_BYTES as usize)) }, taken)
    }

    /// Puts an answer into the queue, once there is room; whether there is a reader still.
    async fn send(&self, answer: Result<T, Status>) -> bool {
        let bytes = answer.as_ref().map_or(0, Message::encoded_len);
        let bytes = u32::try_from(bytes).unwrap_or(AHEAD_BYTES).min(AHEAD_BYTES);
        match Arc::clone(&self.room).acquire_many_owned(bytes).await {
            Ok(room) => self.answers.send((answer, room)).await.is_ok(),
            Err(_) => false,
        }
    }
}

/// Answers each message in order. A failed message is answered, and the stream goes on; a caller
/// who may no longer call ends it.
pub(super) fn run<O: Operation>(
    service: &KeyService,
    request: Request<Streaming<O::Ask>>,
) -> Result<Response<Answers<O::Answer>>, Error> {
    let first = service.admit(&request)?;
    let twins: [&[&str]; 3] = [&twins::OF_ONE_KEY, &twins::OF_EXPORTS, &[twins::EXPORTABLE]];
    twins::refuse_twins(request.metadata(), &twins)?;
    let mut incoming = request.into_inner();
    let service = service.clone();
    let (ahead, answers) = Ahead::new();
    tokio::spawn(async move {
        let mut sequence = 0;
        loop {
            // A reader that has gone ends the stream, also while no message comes.
            let message = tokio::select! {
                message = incoming.message() => message.transpose(),
                () = ahead.answers.closed() => return,
            };
            let answer = match message {
                None => return,
                Some(Err(status)) => Err(status),
                Some(Ok(ask)) => {
                    sequence += 1;
                    match first.again(&service.0).await {
                        Err(error) => Err(Status::from(error)),
                        Ok(admitted) => {
                            let acted = O::act(&service, &admitted, ask, sequence).await;
                            Ok(O::answer(acted.0, acted.1, sequence))
                        }
                    }
                }
            };
            let last = answer.is_err();
            if !ahead.send(answer).await || last {
                return;
            }
        }
    });
    Ok(Response::new(Box::pin(answers)))
}

type Changed = (Done, MetadataView);

async fn change(
    service: &KeyService,
    admitted: &Admitted,
    requester: Option<&pb::RequesterContext>,
    (slow, parsed): (
        bool,
        impl FnOnce(crate::time::Time) -> Result<Mutation, Error> + Send + 'static,
    ),
    method: &'static str,
    request: Vec<u8>,
    sequence: i64,
) -> Item<Changed> {
    let attempt = async {
        let cx = admitted.context(requester, None)?;
        let from = admitted.times_from();
        let mutation = service.read(&cx, slow, move || parsed(from)).await??;
        let key = admitted.once(method, u32::try_from(sequence).unwrap_or(u32::MAX), request);
        let done = Box::pin(service.0.keyring.mutate(&cx, &mutation, key.as_ref())).await?;
        let view = service.0.keyring.view_done(&cx, &done).await.map_err(after_commit)?;
        Ok::<_, Error>((done, view))
    };
    match attempt.await {
        Ok(changed) => Item::Done(changed),
        Err(error) => Item::Failed(error),
    }
}

fn missing<T>() -> Item<T> {
    Item::Failed(Error::invalid("request", "must be set"))
}

macro_rules! operation {
    ($name:ident, $Ask:ident, $Answer:ident, $oneof:ident, $id:ident, $method:literal,
     |$sequence:ident, $key:ident| $ident:expr,
     |$m:ident, $now:ident| $parse:expr, slow if $slow:expr,
     |$done:ident| $success:expr) => {
        /// The stream of this operation.
        pub(super) struct $name;

        #[tonic::async_trait]
        impl Operation for $name {
            type Ask = pb::$Ask;
            type Answer = pb::$Answer;
            type Done = Changed;

            async fn act(
                service: &KeyService,
                admitted: &Admitted,
                ask: Self::Ask,
                sequence: i64,
            ) -> (String, Item<Changed>) {
                let Some(mut $m) = ask.request else { return (String::new(), missing()) };
                let requester = $m.requester_context.take();
                let bytes = $m.encode_to_vec();
                let $key = &$m;
                let id: String = operation!(@id $name $key);
                let item = change(
                    service,
                    admitted,
                    requester.as_ref(),
                    ($slow, move |$now| $parse),
                    $method,
                    bytes,
                    sequence,
                )
                .await;
                (id, item)
            }

            fn answer(id: String, item: Item<Changed>, sequence: i64) -> Self::Answer {
                let ($sequence, $key) = (sequence, id);
                let mut answer = pb::$Answer { $id: $ident, sequence, ..Default::default() };
                if let Some((text, code, reason)) = item.failure() {
                    answer.result = Some(pb::$oneof::Result::Error(text));
                    answer.error_code = code;
                    answer.error_reason = reason;
                }
                if let Item::Done($done) = &item {
                    answer.result = Some(pb::$oneof::Result::Success($success));
                }
                answer
            }
        }
    };
    (@id Create $key:ident) => {{ let _ = $key; String::new() }};
    (@id $name:ident $key:ident) => { $key.key_id.clone() };
}

operation!(
    Create,
    StreamCreateKeysRequest,
    StreamCreateKeysResponse,
    stream_create_keys_response,
    request_sequence,
    "StreamCreateKeys",
    |sequence, _key| i32::try_from(sequence).unwrap_or(i32::MAX),
    |m, now| parse::create(m, now).map(|c| Mutation::Create(Box::new(c))),
    slow if false,
    |done| convert::create_response(&done.0, &done.1, done.0.at)
);
operation!(
    Rotate,
    StreamRotateKeysRequest,
    StreamRotateKeysResponse,
    stream_rotate_keys_response,
    key_id,
    "StreamRotateKeys",
    |_sequence, key| key,
    |m, now| parse::rotate(m, now).map(Mutation::Rotate),
    slow if false,
    |done| convert::rotate_response(&done.0, &done.1)
);
operation!(
    Revoke,
    StreamRevokeKeysRequest,
    StreamRevokeKeysResponse,
    stream_revoke_keys_response,
    key_id,
    "StreamRevokeKeys",
    |_sequence, key| key,
    |m, now| parse::revoke(m, now).map(Mutation::Revoke),
    slow if false,
    |_done| true
);
operation!(
    Update,
    StreamUpdateKeyMetadataRequest,
    StreamUpdateKeyMetadataResponse,
    stream_update_key_metadata_response,
    key_id,
    "StreamUpdateKeyMetadata",
    |_sequence, key| key,
    |m, now| parse::update(m, now).map(|c| Mutation::Update(Box::new(c))),
    slow if !m.policies_to_update.is_empty(),
    |_done| true
);

/// The stream of metadata reads.
pub(super) struct Metadata;

#[tonic::async_trait]
impl Operation for Metadata {
    type Ask = pb::StreamGetKeyMetadataRequest;
    type Answer = pb::StreamGetKeyMetadataResponse;
    type Done = (MetadataView, crate::time::Time);

    async fn act(
        service: &KeyService,
        admitted: &Admitted,
        ask: Self::Ask,
        _sequence: i64,
    ) -> (String, Item<Self::Done>) {
        let Some(m) = ask.request else { return (String::new(), missing()) };
        let id = m.key_id.clone();
        let attempt = async {
            let cx = admitted.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
            let (history, policies) = (m.include_access_history, m.include_policy_details);
            let command = parse::get_metadata(&m.key_id, m.version, history, policies)?;
            Ok::<_, Error>((service.0.keyring.metadata(&cx, &command).await?, cx.now))
        };
        match attempt.await {
            Ok(done) => (id, Item::Done(done)),
            Err(error) => (id, Item::Failed(error)),
        }
    }

    fn answer(id: String, item: Item<Self::Done>, sequence: i64) -> Self::Answer {
        let mut answer =
            pb::StreamGetKeyMetadataResponse { key_id: id, sequence, ..Default::default() };
        if let Some((text, code, reason)) = item.failure() {
            answer.result = Some(pb::stream_get_key_metadata_response::Result::Error(text));
            answer.error_code = code;
            answer.error_reason = reason;
        }
        if let Item::Done((view, now)) = &item {
            let success = convert::metadata_response(view, *now);
            answer.result = Some(pb::stream_get_key_metadata_response::Result::Success(success));
        }
        answer
    }
}

/// One version of a key, or all it can read, oldest first, each looked at again when it is sent.
pub(super) async fn get_keys(
    service: &KeyService,
    request: Request<pb::StreamGetKeysRequest>,
) -> Result<Response<Answers<pb::StreamGetKeysResponse>>, Error> {
    let first = service.admit(&request)?;
    let (metadata, _, mut m) = request.into_parts();
    parse::export_twins(&mut m.export, &mut m.recipient_public_key, &metadata)?;
    let cx = first.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
    let command = parse::get(&m.key_id, m.version, m.export, &m.recipient_public_key)?;
    let versions = match command.version {
        0 => service.0.keyring.readable_versions(&cx, &command).await?,
        one => vec![one],
    };
    let service = service.clone();
    let skip = m.skip_metadata.unwrap_or(false);
    let answers =
        futures::stream::iter(versions.into_iter().enumerate()).then(move |(i, version)| {
            let (service, first, command) = (service.clone(), first.clone(), command.clone());
            let (requester, attributes) = (m.requester_context.clone(), m.attributes.clone());
            let key_id = m.key_id.clone();
            async move {
                let admitted = first.again(&service.0).await?;
                let cx = admitted.context(requester.as_ref(), attributes.as_ref())?;
                let command = crate::command::GetKey { version, ..command };
                let result = service.0.keyring.get(&cx, &command).await;
                let number = i64::try_from(i).unwrap_or(i64::MAX - 1) + 1;
                let mut answer = pb::StreamGetKeysResponse {
                    key_id,
                    sequence_number: i32::try_from(number).unwrap_or(i32::MAX),
                    sequence: number,
                    ..Default::default()
                };
                match result {
                    Ok(got) => {
                        let success = convert::get_response(&got, skip, cx.now);
                        answer.result =
                            Some(pb::stream_get_keys_response::Result::Success(success));
                    }
                    Err(error) => {
                        let item: Item<()> = Item::Failed(error);
                        let (text, code, reason) = item.failure().unwrap_or_default();
                        answer.result = Some(pb::stream_get_keys_response::Result::Error(text));
                        answer.error_code = code;
                        answer.error_reason = reason;
                    }
                }
                Ok(answer)
            }
        });
    Ok(Response::new(Box::pin(answers)))
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn answers_wait_within_a_bound_of_number_and_of_bytes() {
        for (bytes, waiting) in [(1024 * 1024 - 64, 4), (4 * 1024 * 1024, 1), (10, AHEAD)] {
            let (ahead, answers) = Ahead::new();
            let mut answers = std::pin::pin!(answers);
            let answer = || {
                let random = pb::GenerateRandomResponse { random: vec![7; bytes].into() };
                ahead.send(Ok(random))
            };
            let sent = std::iter::repeat_with(|| answer().now_or_never());
            assert_eq!(sent.take_while(|sent| *sent == Some(true)).count(), waiting, "{bytes}");
            // One that is read makes room for the next.
            assert!(answers.next().now_or_never().unwrap().unwrap().is_ok());
            assert_eq!(answer().now_or_never(), Some(true), "{bytes}");
            assert_eq!(answer().now_or_never(), None, "{bytes}");
        }
        // A reader that goes away is noticed by whoever waits for room.
        let (ahead, answers) = Ahead::new();
        let full = || {
            let random = vec![7; AHEAD_BYTES as usize].into();
            ahead.send(Ok(pb::GenerateRandomResponse { random }))
        };
        assert_eq!(full().now_or_never(), Some(true));
        let mut next = Box::pin(full());
        assert_eq!((&mut next).now_or_never(), None);
        drop(answers);
        assert_eq!(next.now_or_never(), Some(false));
    }
}
