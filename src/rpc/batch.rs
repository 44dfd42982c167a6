//! Batches: the same single operations, item by item, with one answer each in the order asked.

use futures::{StreamExt, stream};
use polykey_proto::polykey::v2 as pb;
use prost::Message;
use tonic::{Request, Response};

use super::admit::Admitted;
use super::key_service::{KeyService, after_commit};
use super::{convert, parse, status, twins};
use crate::command::Mutation;
use crate::context::Context;
use crate::error::{Error, FieldViolation};
use crate::keyring::{Done, Idempotency, MetadataView};
use crate::limits::{BATCH, Violations};

/// Items of a batch worked on at the same time; they meet again in commit groups.
const PARALLEL: usize = 64;
/// Bytes of answers after which a batch reads no further: with one more of the largest they stay below
/// the 4 MiB that a client takes unless it is told to take more.
const ANSWER_BYTES: usize = (4 * 1024 - 256) * 1024;

/// How a batch goes on after a failure.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// All or nothing.
    Atomic,
    /// Every item is tried.
    Continue,
    /// The first failure ends it.
    Stop,
}

/// What an item came to.
pub(super) enum Item<T> {
    Done(T),
    Failed(Error),
    /// An earlier item failed first.
    NotTried,
    /// The items before it have filled the answer.
    NoRoom,
}

impl<T> Item<T> {
    /// Text, code and reason of a failure.
    pub(super) fn failure(&self) -> Option<(String, i32, String)> {
        match self {
            Self::Done(_) => None,
            Self::Failed(error) => {
                let code = status::code(error);
                Some((error.to_string(), code as i32, status::reason(error).to_owned()))
            }
            Self::NotTried => {
                let text = "not attempted: an earlier item failed".to_owned();
                Some((text, tonic::Code::Aborted as i32, "NOT_ATTEMPTED".to_owned()))
            }
            Self::NoRoom => {
                let text =
                    "not attempted: the answer is full; ask for it in another call".to_owned();
                Some((text, tonic::Code::ResourceExhausted as i32, "ANSWER_FULL".to_owned()))
            }
        }
    }
}

fn mode(atomic: bool, continue_on_error: bool) -> Result<Mode, Error> {
    match (atomic, continue_on_error) {
        (true, true) => Err(Error::invalid("atomic", "contradicts continue_on_error")),
        (true, false) => Ok(Mode::Atomic),
        (false, true) => Ok(Mode::Continue),
        (false, false) => Ok(Mode::Stop),
    }
}

/// Refuses a batch of too many items, and counts them in the rates of their caller.
fn check_count(
    service: &KeyService,
    admitted: &Admitted,
    method: &str,
    count: usize,
) -> Result<(), Error> {
    if !(1..=BATCH).contains(&count) {
        return Err(Error::invalid("keys", "must have 1 to 1000 items"));
    }
    service.count_items(admitted, method, ("keys", count))
}

/// Puts the item in front of the fields of its violations.
fn in_item(error: Error, index: usize) -> Error {
    match error {
        Error::Invalid(violations) => Error::Invalid(
            violations
                .into_iter()
                .map(|v| FieldViolation { field: format!("keys[{index}].{}", v.field), ..v })
                .collect(),
        ),
        other => other,
    }
}

fn counts<T>(items: &[Item<T>]) -> (i32, i32) {
    let done = items.iter().filter(|item| matches!(item, Item::Done(_))).count();
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    (count(done), count(items.len() - done))
}

type Changed = (Done, MetadataView);

impl KeyService {
    async fn change_all(
        &self,
        cx: &Context,
        admitted: &Admitted,
        mode: Mode,
        method: &'static str,
        items: Vec<(Result<Mutation, Error>, Vec<u8>)>,
    ) -> Vec<Item<Changed>> {
        let key = |index: usize, request: Vec<u8>| {
            // Item 0 is that of single calls.
            admitted.once(method, u32::try_from(index + 1).unwrap_or(u32::MAX), request)
        };
        let parsed = items.into_iter().enumerate().map(|(i, (item, bytes))| (item, key(i, bytes)));
        match mode {
            Mode::Atomic => self.change_atomically(cx, parsed.collect()).await,
            Mode::Continue => {
                type One = (usize, (Result<Mutation, Error>, Option<Idempotency>));
                let run = |(i, (item, key)): One| async move {
                    match self.change_one(cx, item, key.as_ref()).await {
                        Ok(changed) => Item::Done(changed),
                        Err(error) => Item::Failed(in_item(error, i)),
                    }
                };
                stream::iter(parsed.enumerate().map(run)).buffered(PARALLEL).collect().await
            }
            Mode::Stop => {
                let mut results = Vec::new();
                let mut stopped = false;
                for (i, (item, key)) in parsed.enumerate() {
                    if stopped {
                        results.push(Item::NotTried);
                        continue;
                    }
                    results.push(match self.change_one(cx, item, key.as_ref()).await {
                        Ok(changed) => Item::Done(changed),
                        Err(error) => {
                            stopped = true;
                            Item::Failed(in_item(error, i))
                        }
                    });
                }
                results
            }
        }
    }

    async fn change_one(
        &self,
        cx: &Context,
        mutation: Result<Mutation, Error>,
        key: Option<&Idempotency>,
    ) -> Result<Changed, Error> {
        let done = Box::pin(self.0.keyring.mutate(cx, &mutation?, key)).await?;
        let view = self.0.keyring.view_done(cx, &done).await.map_err(after_commit)?;
        Ok((done, view))
    }

    async fn change_atomically(
        &self,
        cx: &Context,
        items: Vec<(Result<Mutation, Error>, Option<Idempotency>)>,
    ) -> Vec<Item<Changed>> {
        let count = items.len();
        let none = |index: usize, error: Error| -> Vec<Item<Changed>> {
            let mut error = Some(error);
            (0..count)
                .map(|i| match error.take_if(|_| i == index) {
                    Some(error) => Item::Failed(in_item(error, i)),
                    None => Item::NotTried,
                })
                .collect()
        };
        let mut mutations = Vec::with_capacity(count);
        let mut keys = Vec::with_capacity(count);
        for (i, (item, key)) in items.into_iter().enumerate() {
            match item {
                Ok(mutation) => mutations.push(mutation),
                Err(error) => return none(i, error),
            }
            keys.push(key);
        }
        let keys: Vec<Option<&Idempotency>> = keys.iter().map(Option::as_ref).collect();
        match Box::pin(self.0.keyring.mutate_all(cx, &mutations, &keys)).await {
            Err((index, error)) => none(index, error),
            Ok(all) => {
                let mut results = Vec::with_capacity(count);
                for done in all {
                    results.push(match self.0.keyring.view_done(cx, &done).await {
                        Ok(view) => Item::Done((done, view)),
                        Err(error) => Item::Failed(after_commit(error)),
                    });
                }
                results
            }
        }
    }

    /// Reads, in order; stops at the first failure unless told to go on, and anyway when the answer is
    /// full: what is not sent is not read, so that the trail tells of no export that nobody got.
    async fn read_all<C, T: Message, F>(
        &self,
        continue_on_error: bool,
        commands: Vec<Result<C, Error>>,
        read: impl Fn(C) -> F,
    ) -> Vec<Item<T>>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut results = Vec::with_capacity(commands.len());
        let mut stopped = false;
        let mut bytes = 0;
        for (i, command) in commands.into_iter().enumerate() {
            if stopped {
                results.push(Item::NotTried);
                continue;
            }
            if bytes >= ANSWER_BYTES {
                stopped = !continue_on_error;
                results.push(Item::NoRoom);
                continue;
            }
            let result = match command {
                Ok(command) => read(command).await,
                Err(error) => Err(in_item(error, i)),
            };
            results.push(match result {
                Ok(done) => {
                    bytes += done.encoded_len();
                    Item::Done(done)
                }
                Err(error) => {
                    stopped = !continue_on_error;
                    Item::Failed(error)
                }
            });
        }
        results
    }
}

macro_rules! results {
    ($items:expr, $ids:expr, $Result:ident, $oneof:ident, $id_field:ident, |$done:ident| $success:expr) => {{
        let mut results = Vec::with_capacity($items.len());
        for (index, (item, id)) in $items.into_iter().zip($ids).enumerate() {
            let index = i32::try_from(index).unwrap_or(i32::MAX);
            let mut result = pb::$Result { $id_field: id, index, ..Default::default() };
            match item {
                Item::Done($done) => {
                    result.result = Some(pb::$oneof::Result::Success($success));
                }
                failed => {
                    if let Some((text, code, reason)) = failed.failure() {
                        result.result = Some(pb::$oneof::Result::Error(text));
                        result.error_code = code;
                        result.error_reason = reason;
                    }
                }
            }
            results.push(result);
        }
        results
    }};
}

pub(super) async fn get_keys(
    service: &KeyService,
    request: Request<pb::BatchGetKeysRequest>,
) -> Result<Response<pb::BatchGetKeysResponse>, Error> {
    let admitted = service.admit(&request)?;
    let (metadata, _, m) = request.into_parts();
    let cx = admitted.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
    check_count(service, &admitted, "BatchGetKeys", m.keys.len())?;
    let ids: Vec<String> = m.keys.iter().map(|k| k.key_id.clone()).collect();
    let mut commands = Vec::with_capacity(m.keys.len());
    for mut k in m.keys {
        parse::export_twins(&mut k.export, &mut k.recipient_public_key, &metadata)?;
        let command = parse::get(&k.key_id, k.version, k.export, &k.recipient_public_key);
        commands.push(command.map(|c| (c, k.skip_metadata)));
    }
    let keyring = &service.0.keyring;
    let cx_ref = &cx;
    let items = service
        .read_all(m.continue_on_error, commands, |(command, skip)| async move {
            let got = keyring.get(cx_ref, &command).await?;
            Ok(convert::get_response(&got, skip, cx_ref.now))
        })
        .await;
    let (successful_count, failed_count) = counts(&items);
    Ok(Response::new(pb::BatchGetKeysResponse {
        results: results!(items, ids, BatchGetKeysResult, batch_get_keys_result, key_id, |done| {
            done
        }),
        response_timestamp: Some(convert::timestamp(cx.now)),
        successful_count,
        failed_count,
    }))
}

pub(super) async fn get_metadata(
    service: &KeyService,
    request: Request<pb::BatchGetKeyMetadataRequest>,
) -> Result<Response<pb::BatchGetKeyMetadataResponse>, Error> {
    let admitted = service.admit(&request)?;
    let m = request.into_inner();
    let cx = admitted.context(m.requester_context.as_ref(), m.attributes.as_ref())?;
    check_count(service, &admitted, "BatchGetKeyMetadata", m.keys.len())?;
    let ids: Vec<String> = m.keys.iter().map(|k| k.key_id.clone()).collect();
    let parse = |k: pb::GetKeyMetadataItem| {
        let (history, policies) = (k.include_access_history, k.include_policy_details);
        parse::get_metadata(&k.key_id, k.version, history, policies)
    };
    let commands = m.keys.into_iter().map(parse).collect();
    let keyring = &service.0.keyring;
    let cx_ref = &cx;
    let items = service
        .read_all(m.continue_on_error, commands, |command| async move {
            let view = keyring.metadata(cx_ref, &command).await?;
            Ok(convert::metadata_response(&view, cx_ref.now))
        })
        .await;
    let (successful_count, failed_count) = counts(&items);
    Ok(Response::new(pb::BatchGetKeyMetadataResponse {
        results: results!(
            items,
            ids,
            BatchGetKeyMetadataResult,
            batch_get_key_metadata_result,
            key_id,
            |done| done
        ),
        response_timestamp: Some(convert::timestamp(cx.now)),
        successful_count,
        failed_count,
    }))
}

pub(super) async fn create_keys(
    service: &KeyService,
    request: Request<pb::BatchCreateKeysRequest>,
) -> Result<Response<pb::BatchCreateKeysResponse>, Error> {
    let admitted = service.admit(&request)?;
    let (metadata, _, mut m) = request.into_parts();
    let cx = admitted.context(m.requester_context.as_ref(), None)?;
    twins::refuse_twins(&metadata, &[&twins::OF_ONE_KEY, &twins::OF_EXPORTS])?;
    let mut v = Violations::new();
    if let Some(exportable) = twins::exportable_twin(&mut v, &metadata) {
        m.keys.iter_mut().for_each(|key| key.exportable = Some(exportable));
    }
    v.finish()?;
    let mode = mode(m.atomic, m.continue_on_error)?;
    check_count(service, &admitted, "BatchCreateKeys", m.keys.len())?;
    let indexes: Vec<i32> = (0..m.keys.len()).map(|i| i32::try_from(i).unwrap_or(0)).collect();
    let item = |k: pb::CreateKeyItem| {
        let bytes = k.encode_to_vec();
        let parsed = parse::create(unary_create(k), admitted.times_from());
        (parsed.map(|c| Mutation::Create(Box::new(c))), bytes)
    };
    let items = m.keys.into_iter().map(item).collect();
    let items = service.change_all(&cx, &admitted, mode, "BatchCreateKeys", items).await;
    let (successful_count, failed_count) = counts(&items);
    Ok(Response::new(pb::BatchCreateKeysResponse {
        results: results!(
            items,
            indexes,
            BatchCreateKeysResult,
            batch_create_keys_result,
            request_index,
            |done| convert::create_response(&done.0, &done.1, cx.now)
        ),
        response_timestamp: Some(convert::timestamp(cx.now)),
        successful_count,
        failed_count,
    }))
}

pub(super) async fn rotate_keys(
    service: &KeyService,
    request: Request<pb::BatchRotateKeysRequest>,
) -> Result<Response<pb::BatchRotateKeysResponse>, Error> {
    let admitted = service.admit(&request)?;
    let (metadata, _, m) = request.into_parts();
    let cx = admitted.context(m.requester_context.as_ref(), None)?;
    twins::refuse_twins(&metadata, &[&twins::OF_ONE_KEY, &twins::OF_EXPORTS])?;
    let mode = mode(m.atomic, m.continue_on_error)?;
    check_count(service, &admitted, "BatchRotateKeys", m.keys.len())?;
    let ids: Vec<String> = m.keys.iter().map(|k| k.key_id.clone()).collect();
    let item = |k: pb::RotateKeyItem| {
        let bytes = k.encode_to_vec();
        (parse::rotate(unary_rotate(k), admitted.times_from()).map(Mutation::Rotate), bytes)
    };
    let items = m.keys.into_iter().map(item).collect();
    let items = service.change_all(&cx, &admitted, mode, "BatchRotateKeys", items).await;
    let (successful_count, failed_count) = counts(&items);
    Ok(Response::new(pb::BatchRotateKeysResponse {
        results: results!(
            items,
            ids,
            BatchRotateKeysResult,
            batch_rotate_keys_result,
            key_id,
            |done| convert::rotate_response(&done.0, &done.1)
        ),
        response_timestamp: Some(convert::timestamp(cx.now)),
        successful_count,
        failed_count,
    }))
}

pub(super) async fn revoke_keys(
    service: &KeyService,
    request: Request<pb::BatchRevokeKeysRequest>,
) -> Result<Response<pb::BatchRevokeKeysResponse>, Error> {
    let admitted = service.admit(&request)?;
    let (metadata, _, m) = request.into_parts();
    let cx = admitted.context(m.requester_context.as_ref(), None)?;
    twins::refuse_twins(&metadata, &[&twins::OF_ONE_KEY, &twins::OF_EXPORTS])?;
    let mode = mode(m.atomic, m.continue_on_error)?;
    check_count(service, &admitted, "BatchRevokeKeys", m.keys.len())?;
    let ids: Vec<String> = m.keys.iter().map(|k| k.key_id.clone()).collect();
    let item = |k: pb::RevokeKeyItem| {
        let bytes = k.encode_to_vec();
        (parse::revoke(unary_revoke(k), admitted.times_from()).map(Mutation::Revoke), bytes)
    };
    let items = m.keys.into_iter().map(item).collect();
    let items = service.change_all(&cx, &admitted, mode, "BatchRevokeKeys", items).await;
    let (successful_count, failed_count) = counts(&items);
    Ok(Response::new(pb::BatchRevokeKeysResponse {
        results: results!(
            items,
            ids,
            BatchRevokeKeysResult,
            batch_revoke_keys_result,
            key_id,
            |_done| true
        ),
        response_timestamp: Some(convert::timestamp(cx.now)),
        successful_count,
        failed_count,
    }))
}

pub(super) async fn update_metadata(
    service: &KeyService,
    request: Request<pb::BatchUpdateKeyMetadataRequest>,
) -> Result<Response<pb::BatchUpdateKeyMetadataResponse>, Error> {
    let admitted = service.admit(&request)?;
    let (metadata, _, m) = request.into_parts();
    let cx = admitted.context(m.requester_context.as_ref(), None)?;
    twins::refuse_twins(&metadata, &[&twins::OF_ONE_KEY, &twins::OF_EXPORTS])?;
    let mode = mode(m.atomic, m.continue_on_error)?;
    check_count(service, &admitted, "BatchUpdateKeyMetadata", m.keys.len())?;
    let ids: Vec<String> = m.keys.iter().map(|k| k.key_id.clone()).collect();
    let slow = m.keys.iter().any(|k| !k.policies_to_update.is_empty());
    let from = admitted.times_from();
    let item = move |k: pb::UpdateKeyMetadataItem| {
        let bytes = k.encode_to_vec();
        let parsed = parse::update(unary_update(k), from);
        (parsed.map(|c| Mutation::Update(Box::new(c))), bytes)
    };
    let items = service.read(&cx, slow, move || m.keys.into_iter().map(item).collect()).await?;
    let method = "BatchUpdateKeyMetadata";
    let items = service.change_all(&cx, &admitted, mode, method, items).await;
    let (successful_count, failed_count) = counts(&items);
    Ok(Response::new(pb::BatchUpdateKeyMetadataResponse {
        results: results!(
            items,
            ids,
            BatchUpdateKeyMetadataResult,
            batch_update_key_metadata_result,
            key_id,
            |_done| true
        ),
        response_timestamp: Some(convert::timestamp(cx.now)),
        successful_count,
        failed_count,
    }))
}

fn unary_create(item: pb::CreateKeyItem) -> pb::CreateKeyRequest {
    let pb::CreateKeyItem {
        key_type,
        description,
        tags,
        expires_at,
        initial_authorized_contexts,
        access_policies,
        data_classification,
        generation_params,
        exportable,
        value,
        alias,
        read_after_expiry,
        rotation_period_seconds,
        storage_profile,
        purpose,
        convergent,
        rotate_after_uses,
        max_uses,
        in_token,
    } = item;
    pb::CreateKeyRequest {
        key_type,
        requester_context: None,
        description,
        tags,
        expires_at,
        initial_authorized_contexts,
        access_policies,
        data_classification,
        generation_params,
        exportable,
        value,
        alias,
        read_after_expiry,
        rotation_period_seconds,
        storage_profile,
        purpose,
        convergent,
        rotate_after_uses,
        max_uses,
        in_token,
    }
}

fn unary_rotate(item: pb::RotateKeyItem) -> pb::RotateKeyRequest {
    let pb::RotateKeyItem {
        key_id,
        strategy,
        grace_period_seconds,
        generation_params,
        preserve_access_policies,
        expected_revision,
        clear_access_policies,
        value,
        effective_at,
    } = item;
    pb::RotateKeyRequest {
        key_id,
        requester_context: None,
        strategy,
        grace_period_seconds,
        generation_params,
        preserve_access_policies,
        expected_revision,
        clear_access_policies,
        value,
        effective_at,
    }
}

fn unary_revoke(item: pb::RevokeKeyItem) -> pb::RevokeKeyRequest {
    let pb::RevokeKeyItem {
        key_id,
        revocation_reason,
        immediate,
        effective_at,
        notify_external_systems,
        expected_revision,
    } = item;
    pb::RevokeKeyRequest {
        key_id,
        requester_context: None,
        revocation_reason,
        immediate,
        effective_at,
        notify_external_systems,
        expected_revision,
    }
}

fn unary_update(item: pb::UpdateKeyMetadataItem) -> pb::UpdateKeyMetadataRequest {
    let pb::UpdateKeyMetadataItem {
        key_id,
        description,
        tags_to_add,
        tags_to_remove,
        contexts_to_add,
        contexts_to_remove,
        policies_to_update,
        expires_at,
        data_classification,
        expected_revision,
        policies_to_remove,
        clear_expires_at,
        rotation_period_seconds,
    } = item;
    pb::UpdateKeyMetadataRequest {
        key_id,
        requester_context: None,
        description,
        tags_to_add,
        tags_to_remove,
        contexts_to_add,
        contexts_to_remove,
        policies_to_update,
        expires_at,
        data_classification,
        expected_revision,
        policies_to_remove,
        clear_expires_at,
        rotation_period_seconds,
    }
}
