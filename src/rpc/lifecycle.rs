//! `polykey.v2.KeyLifecycleService`: what the public contract has no call for.

use polykey_proto::polykey::record::v1::AliasRecord;
use polykey_proto::polykey::v2 as pb;
use prost::Message;
use tonic::{Request, Response, Status};

use super::admit::Admitted;
use super::key_service::KeyService;
use super::{convert, parse};
use crate::audit::{Filter, Order};
use crate::command::{
    DeleteAlias, Export, Mutation, OnKey, ScheduleDestruction, SetAlias, SetBounds, TrimVersions,
};
use crate::context::Context;
use crate::error::Error;
use crate::key::{DESTRUCTION_DAYS, KeyName, key_state, version_state};
use crate::keyring::{Done, MetadataView};
use crate::limits::{self, Violations};

/// The service; it works on the same keyring, in the same ways.
#[derive(Clone)]
pub(crate) struct LifecycleService(pub(crate) KeyService);

type Changed = (Done, MetadataView);

impl LifecycleService {
    async fn change<M: Message>(
        &self,
        request: Request<M>,
        method: &'static str,
        parsed: impl FnOnce(&mut Violations, M) -> Mutation,
    ) -> Result<Changed, Error> {
        let admitted = self.0.admit(&request)?;
        let message = request.into_inner();
        let cx = admitted.context(None, None)?;
        let bytes = message.encode_to_vec();
        let mut v = Violations::new();
        let mutation = parsed(&mut v, message);
        v.finish()?;
        self.0.change(&cx, &admitted, &mutation, method, bytes).await
    }

    fn reading<M>(&self, request: Request<M>) -> Result<(Admitted, Context, M), Error> {
        let admitted = self.0.admit(&request)?;
        let cx = admitted.context(None, None)?;
        Ok((admitted, cx, request.into_inner()))
    }
}

fn on_key(v: &mut Violations, key_id: &str, expected: Option<u64>) -> OnKey {
    OnKey { key: parse::key_name(v, "key_id", key_id), expected }
}

fn alias_name(v: &mut Violations, text: &str) -> String {
    let name = text.strip_prefix("alias/").unwrap_or(text);
    limits::alias(v, "alias", name);
    name.to_owned()
}

fn page(v: &mut Violations, page_size: i32) -> usize {
    let size = u32::try_from(page_size).unwrap_or(u32::MAX);
    v.check(size <= limits::PAGE, "page_size", "must be 0 (100) to 1000");
    (if size == 0 { limits::PAGE_DEFAULT } else { size }) as usize
}

fn leaf(done: &Done) -> u64 {
    done.leaf.unwrap_or(0)
}

fn shown(record: &AliasRecord, key_id: String) -> pb::KeyAlias {
    pb::KeyAlias {
        alias: format!("alias/{}", record.name),
        key_id,
        created_at: convert::stored_time(record.created_at),
        updated_at: convert::stored_time(record.created_at),
    }
}

#[tonic::async_trait]
impl pb::key_lifecycle_service_server::KeyLifecycleService for LifecycleService {
    async fn enable_key(
        &self,
        request: Request<pb::EnableKeyRequest>,
    ) -> Result<Response<pb::EnableKeyResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::EnableKeyRequest| {
            Mutation::Enable(on_key(v, &m.key_id, m.expected_revision))
        };
        let (done, view) = self.change(request, "EnableKey", parsed).await?;
        let metadata = Some(convert::metadata(&view));
        Ok(Response::new(pb::EnableKeyResponse { metadata, audit_index: leaf(&done) }))
    }

    async fn disable_key(
        &self,
        request: Request<pb::DisableKeyRequest>,
    ) -> Result<Response<pb::DisableKeyResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::DisableKeyRequest| {
            Mutation::Disable(on_key(v, &m.key_id, m.expected_revision))
        };
        let (done, view) = self.change(request, "DisableKey", parsed).await?;
        let metadata = Some(convert::metadata(&view));
        Ok(Response::new(pb::DisableKeyResponse { metadata, audit_index: leaf(&done) }))
    }

    async fn schedule_key_destruction(
        &self,
        request: Request<pb::ScheduleKeyDestructionRequest>,
    ) -> Result<Response<pb::ScheduleKeyDestructionResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::ScheduleKeyDestructionRequest| {
            let days = match m.window_days {
                0 => *DESTRUCTION_DAYS.end(),
                days => u32::try_from(days).unwrap_or(0),
            };
            v.check(
                DESTRUCTION_DAYS.contains(&days),
                "window_days",
                "must be 7 to 30, or 0 for 30",
            );
            let OnKey { key, expected } = on_key(v, &m.key_id, m.expected_revision);
            Mutation::Destroy(ScheduleDestruction { key, days, expected })
        };
        let (done, view) = self.change(request, "ScheduleKeyDestruction", parsed).await?;
        Ok(Response::new(pb::ScheduleKeyDestructionResponse {
            destroy_at: convert::stored_time(view.key.record.destroy_at),
            metadata: Some(convert::metadata(&view)),
            audit_index: leaf(&done),
        }))
    }

    async fn cancel_key_destruction(
        &self,
        request: Request<pb::CancelKeyDestructionRequest>,
    ) -> Result<Response<pb::CancelKeyDestructionResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::CancelKeyDestructionRequest| {
            Mutation::CancelDestroy(on_key(v, &m.key_id, m.expected_revision))
        };
        let (done, view) = self.change(request, "CancelKeyDestruction", parsed).await?;
        let metadata = Some(convert::metadata(&view));
        Ok(Response::new(pb::CancelKeyDestructionResponse { metadata, audit_index: leaf(&done) }))
    }

    async fn export_key(
        &self,
        request: Request<pb::ExportKeyRequest>,
    ) -> Result<Response<pb::ExportKeyResponse>, Status> {
        let (_, cx, m) = self.reading(request)?;
        if m.mode == i32::from(pb::ExportMode::None) {
            let text = "must be EXPORT_MODE_PLAIN or HPKE";
            return Err(Error::invalid("mode", text).into());
        }
        let command = parse::get(&m.key_id, m.version, m.mode, &m.recipient_public_key).map_err(
            |e| match e {
                // The field has another name here.
                Error::Invalid(mut violations) => {
                    for v in &mut violations {
                        if v.field == "export" {
                            v.field = "mode".into();
                        }
                    }
                    Error::Invalid(violations)
                }
                other => other,
            },
        )?;
        debug_assert_ne!(command.export, Export::None);
        let got = self.0.0.keyring.get(&cx, &command).await?;
        Ok(Response::new(pb::ExportKeyResponse {
            key_id: got.metadata.key.id.to_string(),
            version: i32::try_from(got.metadata.version.record.version).unwrap_or(i32::MAX),
            key_material: Some(convert::material(&got)),
            authorization_decision_id: got.decision_id.to_string(),
            audit_index: got.leaf.unwrap_or(0),
        }))
    }

    async fn create_alias(
        &self,
        request: Request<pb::CreateAliasRequest>,
    ) -> Result<Response<pb::CreateAliasResponse>, Status> {
        let alias = request.get_ref().alias.clone();
        let parsed = |v: &mut Violations, m: pb::CreateAliasRequest| {
            let alias = alias_name(v, &m.alias);
            let key = parse::key_name(v, "key_id", &m.key_id);
            Mutation::SetAlias(SetAlias { key, alias, moves: false, from: None })
        };
        let (done, _) = self.change(request, "CreateAlias", parsed).await?;
        let alias = self.alias(&alias, &done).await?;
        Ok(Response::new(pb::CreateAliasResponse { alias, audit_index: leaf(&done) }))
    }

    async fn update_alias(
        &self,
        request: Request<pb::UpdateAliasRequest>,
    ) -> Result<Response<pb::UpdateAliasResponse>, Status> {
        let alias = request.get_ref().alias.clone();
        let parsed = |v: &mut Violations, m: pb::UpdateAliasRequest| {
            let alias = alias_name(v, &m.alias);
            let key = parse::key_name(v, "key_id", &m.key_id);
            let from = (!m.expected_key_id.is_empty())
                .then(|| parse::key_name(v, "expected_key_id", &m.expected_key_id));
            Mutation::SetAlias(SetAlias { key, alias, moves: true, from })
        };
        let (done, _) = self.change(request, "UpdateAlias", parsed).await?;
        let alias = self.alias(&alias, &done).await?;
        Ok(Response::new(pb::UpdateAliasResponse { alias, audit_index: leaf(&done) }))
    }

    async fn delete_alias(
        &self,
        request: Request<pb::DeleteAliasRequest>,
    ) -> Result<Response<pb::DeleteAliasResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::DeleteAliasRequest| {
            Mutation::DeleteAlias(DeleteAlias { alias: alias_name(v, &m.alias) })
        };
        let (done, _) = self.change(request, "DeleteAlias", parsed).await?;
        Ok(Response::new(pb::DeleteAliasResponse { audit_index: leaf(&done) }))
    }

    async fn list_aliases(
        &self,
        request: Request<pb::ListAliasesRequest>,
    ) -> Result<Response<pb::ListAliasesResponse>, Status> {
        let (_, cx, m) = self.reading(request)?;
        let mut v = Violations::new();
        let size = page(&mut v, m.page_size);
        let key = parse::key_name(&mut v, "key_id", &m.key_id);
        let after = match m.page_token.strip_prefix("alias/") {
            Some(name) => name,
            None => {
                v.check(m.page_token.is_empty(), "page_token", "is not one of ours");
                ""
            }
        };
        v.finish()?;
        let key = self.0.0.keyring.describe(&cx, &key).await?;
        let mut names = key.record.aliases.clone();
        names.sort();
        names.retain(|name| name.as_str() > after);
        let more = names.len() > size;
        names.truncate(size);
        let mut aliases = Vec::with_capacity(names.len());
        for name in &names {
            if let Some(record) = self.0.0.keyring.alias(name).await? {
                aliases.push(shown(&record, key.id.to_string()));
            }
        }
        let next_page_token = match names.last() {
            Some(last) if more => format!("alias/{last}"),
            _ => String::new(),
        };
        Ok(Response::new(pb::ListAliasesResponse { aliases, next_page_token }))
    }

    async fn list_key_versions(
        &self,
        request: Request<pb::ListKeyVersionsRequest>,
    ) -> Result<Response<pb::ListKeyVersionsResponse>, Status> {
        let (_, cx, m) = self.reading(request)?;
        let mut v = Violations::new();
        let size = page(&mut v, m.page_size);
        let key = parse::key_name(&mut v, "key_id", &m.key_id);
        let from = match m.page_token.as_str() {
            "" => 0,
            token => token.parse().unwrap_or_else(|_| {
                v.add("page_token", "is not one of ours");
                0
            }),
        };
        v.finish()?;
        let (key, mut records) = self.0.0.keyring.list_versions(&cx, &key, from, size + 1).await?;
        let next = if records.len() > size { records.pop() } else { None };
        let state = key_state(&key.record, cx.now);
        let versions = records.iter().map(|r| {
            let version = version_state(&key.record, r, cx.now);
            let staged = r.version == key.record.staged_version;
            pb::KeyVersion {
                version: i32::try_from(r.version).unwrap_or(i32::MAX),
                state: convert::version_state(state, version).into(),
                status: convert::status(state, version, key.record.read_after_expiry).into(),
                created_at: convert::stored_time(r.created_at),
                expires_at: convert::stored_time(r.grace_until),
                effective_at: convert::stored_time(if staged {
                    key.record.staged_promote_at
                } else {
                    0
                }),
                origin: convert::origin(r.origin).into(),
                public_key_der: r.public_key.clone(),
                key_checksum: r.checksum.clone(),
            }
        });
        Ok(Response::new(pb::ListKeyVersionsResponse {
            versions: versions.collect(),
            next_page_token: next.map(|r| r.version.to_string()).unwrap_or_default(),
        }))
    }

    async fn update_key_version_bounds(
        &self,
        request: Request<pb::UpdateKeyVersionBoundsRequest>,
    ) -> Result<Response<pb::UpdateKeyVersionBoundsResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::UpdateKeyVersionBoundsRequest| {
            let number = |v: &mut Violations, field: &str, least: i32, value: Option<i32>| {
                let value = value?;
                v.check(value >= least, field, "is out of range");
                u32::try_from(value).ok()
            };
            let decryption = number(v, "min_decryption_version", 1, m.min_decryption_version);
            let encryption = number(v, "min_encryption_version", 0, m.min_encryption_version);
            let OnKey { key, expected } = on_key(v, &m.key_id, m.expected_revision);
            Mutation::SetBounds(SetBounds { key, decryption, encryption, expected })
        };
        let (done, view) = self.change(request, "UpdateKeyVersionBounds", parsed).await?;
        let metadata = Some(convert::metadata(&view));
        let audit_index = leaf(&done);
        Ok(Response::new(pb::UpdateKeyVersionBoundsResponse { metadata, audit_index }))
    }

    async fn trim_key_versions(
        &self,
        request: Request<pb::TrimKeyVersionsRequest>,
    ) -> Result<Response<pb::TrimKeyVersionsResponse>, Status> {
        let parsed = |v: &mut Violations, m: pb::TrimKeyVersionsRequest| {
            v.check(m.min_available_version >= 1, "min_available_version", "must be at least 1");
            let min_available = u32::try_from(m.min_available_version).unwrap_or(0);
            let OnKey { key, expected } = on_key(v, &m.key_id, m.expected_revision);
            Mutation::Trim(TrimVersions { key, min_available, expected })
        };
        let (done, view) = self.change(request, "TrimKeyVersions", parsed).await?;
        Ok(Response::new(pb::TrimKeyVersionsResponse {
            metadata: Some(convert::metadata(&view)),
            erased_count: i32::try_from(done.erased).unwrap_or(i32::MAX),
            audit_index: leaf(&done),
        }))
    }

    async fn get_key_history(
        &self,
        request: Request<pb::GetKeyHistoryRequest>,
    ) -> Result<Response<pb::GetKeyHistoryResponse>, Status> {
        let (_, cx, m) = self.reading(request)?;
        let mut v = Violations::new();
        let size = page(&mut v, m.page_size);
        let key: KeyName = parse::key_name(&mut v, "key_id", &m.key_id);
        let since = parse::time(&mut v, "since", m.since.as_ref());
        let until = parse::time(&mut v, "until", m.until.as_ref());
        v.finish()?;
        let key = self.0.0.keyring.for_history(&cx, &key).await?;
        let page = if since.is_none() && until.is_none() {
            self.0.0.trail.history(&key.id, size, &m.page_token).await?
        } else {
            let filter = Filter { key: Some(key.id), since, until, ..Filter::default() };
            self.0.0.trail.list(&filter, Order::NewestFirst, 0, size, &m.page_token).await?
        };
        Ok(Response::new(pb::GetKeyHistoryResponse {
            events: page.events.iter().map(convert::audit_event).collect(),
            next_page_token: page.next,
        }))
    }
}

impl LifecycleService {
    async fn alias(&self, name: &str, done: &Done) -> Result<Option<pb::KeyAlias>, Error> {
        let name = name.strip_prefix("alias/").unwrap_or(name);
        let record = self.0.0.keyring.alias(name).await?;
        Ok(record.map(|r| shown(&r, done.key.id.to_string())))
    }
}
