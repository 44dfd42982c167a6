//! The root key and its slots.

use std::path::PathBuf;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use polykey_hsm::bootstrap::is_parameter_name;
use polykey_hsm::{KeyWrapper, MasterKeySource, PassphraseParams, SecretSource};
use polykey_proto::polykey::v2 as pb;
use tonic::Request;

use super::{AdminService, commands, event};
use crate::authz::{Action, Resource};
use crate::config::Wrapper;
use crate::custody::{
    ChangeError, NamedWrapper, RECOVERY, Rewrap, SlotSpec, SlotStatus, Status, Terms,
};
use crate::error::{Error, Reason};
use crate::limits::Violations;
use crate::rpc::convert::timestamp;

/// Bytes of a reference to a secret.
const SOURCE: usize = 4096;
const SOURCES: &str =
    "must be file:/ABSOLUTE/PATH, env:POLYKEY_NAME, credential:NAME or ssm:/PATH/NAME";
const KINDS: [&str; 5] =
    ["local-file", "local-env", "local-credential", "local-ssm", "local-passphrase"];

impl AdminService {
    pub(super) async fn get_root_status(
        &self,
        request: Request<pb::GetRootStatusRequest>,
    ) -> Result<pb::GetRootStatusResponse, Error> {
        let (_, cx, _) = self.admit(request)?;
        self.look(&cx, commands::ReadNode, &[("what", "root")]).await?;
        let custody = &self.0.admin.custody;
        let status = custody.status().await?;
        let Status { root_id, generation, slots, epochs, reseal, created_at, node_id: _ } = status;
        let rows = custody.vault().head().rows;
        let primary = epochs.iter().copied().max().unwrap_or(0);
        let resealed = reseal.as_ref().map_or(0, |r| r.resealed);
        let running = epochs.len() > 1;
        let epoch = |epoch: &u32| {
            let made = if *epoch == 1 {
                Some(created_at)
            } else {
                reseal.filter(|r| r.target_epoch == *epoch).map(|r| r.started_at)
            };
            // What is left stands under the epoch before the primary one, or under older ones.
            let last = epochs.iter().copied().filter(|e| *e != primary).max();
            let left = if last == Some(*epoch) { rows.saturating_sub(resealed) } else { 0 };
            pb::StorageEpoch {
                epoch: *epoch,
                primary: *epoch == primary,
                created_at: made.map(timestamp),
                records_remaining: left,
            }
        };
        Ok(pb::GetRootStatusResponse {
            root_id: HEXLOWER.encode(&root_id),
            slots: slots.iter().map(slot).collect(),
            epochs: epochs.iter().map(epoch).collect(),
            reseal_running: running,
            records_resealed: resealed,
            records_total: if reseal.is_some() { rows } else { 0 },
            // A node whose canary does not open does not start.
            canary_ok: true,
            rotated_at: Some(timestamp(reseal.map_or(created_at, |r| r.started_at))),
            generation,
        })
    }

    pub(super) async fn rotate_root(
        &self,
        request: Request<pb::RotateRootRequest>,
    ) -> Result<pb::RotateRootResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "RotateRoot", &m);
        let expected = if m.expected_root_id.is_empty() {
            None
        } else {
            let id = data_encoding::HEXLOWER_PERMISSIVE.decode(m.expected_root_id.as_bytes()).ok();
            let id: Option<[u8; 16]> = id.and_then(|id| id.try_into().ok());
            let text = "must be 32 hexadecimal digits";
            Some(id.ok_or_else(|| Error::invalid("expected_root_id", text))?)
        };
        let decision = self.authorize(&cx, Resource::Node, commands::RotateRoot).await?;
        let custody = &self.0.admin.custody;
        if self.repeated(&cx, key.as_ref()).await? {
            let status = custody.status().await?;
            let epoch = status.epochs.iter().copied().max().unwrap_or(0);
            let root_id = HEXLOWER.encode(&status.root_id);
            return Ok(pb::RotateRootResponse { root_id, epoch, audit_index: 0 });
        }
        let event = event(&cx, Action::RotateRoot, decision, &[]);
        self.reopen().await;
        let remember = key.map(|key| key.noted(custody.vault(), &cx, "root"));
        let rotated = loop {
            let wrappers = self.wrappers();
            let known = wrappers.len();
            let (event, remember) = (event.clone(), remember.clone());
            match custody.rotate_root_from(expected, wrappers, event, remember).await {
                // While a device took its time, a slot was added by a wrapper that is known since.
                Err(ChangeError::SlotUnavailable(_)) if self.wrappers().len() > known => {}
                rotated => break rotated,
            }
        };
        let (root_id, epoch, leaf) = rotated.map_err(Error::from)?;
        let audit_index = leaf.unwrap_or(0);
        Ok(pb::RotateRootResponse { root_id: HEXLOWER.encode(&root_id), epoch, audit_index })
    }

    pub(super) fn wrappers(&self) -> Vec<Arc<dyn KeyWrapper>> {
        self.0.wrappers.lock().iter().map(|named| Arc::clone(&named.wrapper)).collect()
    }

    pub(super) async fn rewrap_slot(
        &self,
        request: Request<pb::RewrapSlotRequest>,
    ) -> Result<pb::RewrapSlotResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "RewrapSlot", &m);
        let mut v = Violations::new();
        v.check(m.slot_id.len() <= 64, "slot_id", "must have at most 64 bytes");
        let from = source(&mut v, &m.source);
        let kind_ok = m.kind.is_empty() || KINDS.contains(&m.kind.as_str());
        v.check(
            kind_ok,
            "kind",
            "must be local-file, local-env, local-credential, local-ssm or local-passphrase",
        );
        let label_ok = m.label.is_empty() || SlotSpec::is_label(&m.label);
        v.check(label_ok, "label", "must be 1 to 64 of a-z A-Z 0-9 . _ -");
        v.finish()?;
        let decision = self.authorize(&cx, Resource::Node, commands::RewrapRoot).await?;

        let custody = &self.0.admin.custody;
        let status = custody.status().await?;
        if let Some(key) = &key
            && let Some(done) = key.recorded(custody.vault(), &cx).await?
        {
            // It may have another label by now.
            let now = status.slots.iter().find(|slot| HEXLOWER.encode(&slot.id) == done.text);
            let (slot, generation) = (now.map(slot), status.generation);
            return Ok(pb::RewrapSlotResponse { slot, generation, audit_index: 0 });
        }
        let old = find(&status, &m.slot_id)?;
        if old.kind == RECOVERY {
            let text = "must be a slot that a master key or passphrase opens: add another recovery \
                        slot and remove this one";
            return Err(Error::invalid("slot_id", text));
        }
        let named = match self.same_wrapper(from.as_ref(), &m.kind, old) {
            Some(named) => named,
            None => self.local_wrapper(self.master_key(from, &m.kind, old)?, old).await?,
        };
        let spec = named.slot(&old.label);
        let wrapper = Arc::clone(&named.wrapper);
        let rewrap = Rewrap {
            slot: HEXLOWER.encode(&old.id),
            kind: spec.kind,
            source: spec.source,
            label: (!m.label.is_empty()).then(|| m.label.clone()),
            terms: Terms {
                expected: m.expected_generation,
                remember: key.map(|key| key.noted(custody.vault(), &cx, &HEXLOWER.encode(&old.id))),
            },
        };
        let event = event(&cx, Action::RewrapRoot, decision, &[]);
        let leaf = custody.rewrap_slot(rewrap, wrapper, event).await.map_err(Error::from)?;
        self.learn(named);
        let status = custody.status().await?;
        let now = status.slots.iter().find(|slot| slot.id == old.id);
        Ok(pb::RewrapSlotResponse {
            slot: now.map(slot),
            generation: status.generation,
            audit_index: leaf.unwrap_or(0),
        })
    }

    /// The device or service that a slot is of, when it is to wrap anew: under a newer version of
    /// its key, say.
    fn same_wrapper(
        &self,
        from: Option<&SecretSource>,
        kind: &str,
        old: &SlotStatus,
    ) -> Option<NamedWrapper> {
        let same = |named: &&NamedWrapper| {
            let spec = named.slot("");
            let device = !matches!(named.config, None | Some(Wrapper::Local(_)));
            device && spec.kind == old.kind && spec.source == old.source
        };
        let asked = from.is_none() && kind.is_empty();
        self.0.wrappers.lock().iter().find(same).filter(|_| asked).cloned()
    }

    /// A master key or passphrase, under the name that it has or should get in the configuration.
    async fn local_wrapper(
        &self,
        source: MasterKeySource,
        old: &SlotStatus,
    ) -> Result<NamedWrapper, Error> {
        let config = Wrapper::Local(source);
        let name = self
            .0
            .wrappers
            .lock()
            .iter()
            .find(|n| n.config.as_ref() == Some(&config))
            .map(|n| n.name.clone());
        let name = name.unwrap_or_else(|| format!("slot {}", old.label));
        let bootstrap = &self.0.admin.config.bootstrap;
        let opened = Box::pin(NamedWrapper::open(&name, &config, bootstrap)).await;
        opened.map_err(|unusable| Error::invalid("source", unusable.error.to_string()))
    }

    /// Where the new master key is, and what it is.
    fn master_key(
        &self,
        from: Option<SecretSource>,
        kind: &str,
        old: &SlotStatus,
    ) -> Result<MasterKeySource, Error> {
        let from = match from {
            Some(from) => from,
            // As before: found among the sources that this process knows.
            None => {
                let wrappers = self.0.wrappers.lock();
                let known = wrappers.iter().filter_map(|named| match &named.config {
                    Some(Wrapper::Local(source)) => Some(source),
                    _ => None,
                });
                let known = known.into_iter().find(|source| {
                    let spec = SlotSpec::local(old.label.clone(), source);
                    (spec.kind == old.kind || !kind.is_empty()) && spec.source == old.source
                });
                match known {
                    Some(known) => known.origin(),
                    None => return Err(Error::State(Reason::NotConfigured)),
                }
            }
        };
        let passphrase = if kind.is_empty() {
            old.kind == "local-passphrase"
        } else {
            kind == "local-passphrase"
        };
        if passphrase {
            let params = match &self.0.admin.config.master_key {
                Wrapper::Local(MasterKeySource::Passphrase { params, .. }) => *params,
                _ => PassphraseParams::default(),
            };
            return Ok(MasterKeySource::Passphrase { from, params });
        }
        let source = MasterKeySource::from(from);
        let is = SlotSpec::local("", &source).kind;
        if !kind.is_empty() && kind != is {
            let text = format!("must be {is} or local-passphrase for that source");
            return Err(Error::invalid("kind", text));
        }
        Ok(source)
    }
}

fn source(v: &mut Violations, text: &str) -> Option<SecretSource> {
    if text.is_empty() {
        return None;
    }
    let fit = text.len() <= SOURCE && !text.chars().any(char::is_control);
    let parsed = match text.split_once(':') {
        Some(("file", path)) if path.starts_with('/') => {
            Some(SecretSource::File(PathBuf::from(path)))
        }
        // A variable that others know (HOME) would make a secret that anyone can guess.
        Some(("env", name)) if name.starts_with("POLYKEY_") && !name.contains('=') => {
            Some(SecretSource::Env(name.to_owned()))
        }
        Some(("credential", name)) if !name.is_empty() && !name.contains('/') => {
            Some(SecretSource::Credential(name.to_owned()))
        }
        Some(("ssm", name)) if is_parameter_name(name) => Some(SecretSource::Ssm(name.to_owned())),
        _ => None,
    };
    let parsed = parsed.filter(|_| fit);
    if parsed.is_none() {
        v.add("source", SOURCES);
    }
    parsed
}

/// The slot of this id or label, or the only one.
fn find<'s>(status: &'s Status, name: &str) -> Result<&'s SlotStatus, Error> {
    match status.slots.as_slice() {
        [only] if name.is_empty() => Ok(only),
        _ if name.is_empty() => {
            Err(Error::invalid("slot_id", "must be set: there are several slots"))
        }
        slots => slots
            .iter()
            .find(|slot| slot.label == name || HEXLOWER.encode(&slot.id) == name)
            .ok_or(Error::NotFound),
    }
}

pub(super) fn slot(slot: &SlotStatus) -> pb::RootSlot {
    pb::RootSlot {
        slot_id: HEXLOWER.encode(&slot.id),
        label: slot.label.clone(),
        kind: slot.kind.clone(),
        source: slot.source.clone(),
        created_at: Some(timestamp(slot.created_at)),
        in_use: slot.opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_references_and_nothing_else() {
        let read = |text: &str| {
            let mut v = Violations::new();
            let source = source(&mut v, text);
            v.finish().map(|()| source)
        };
        assert_eq!(read("").unwrap(), None);
        assert_eq!(read("file:/a/b").unwrap(), Some(SecretSource::File("/a/b".into())));
        assert_eq!(read("env:POLYKEY_K").unwrap(), Some(SecretSource::Env("POLYKEY_K".into())));
        assert_eq!(read("credential:k").unwrap(), Some(SecretSource::Credential("k".into())));
        for bad in [
            "k",
            "file:",
            "file:a",
            "env:HOME",
            "env:POLYKEY_A=B",
            "credential:a/b",
            "raw:x",
            "env:a\0",
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
