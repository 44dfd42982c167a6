//! Slots: adding, removing and testing them.

use std::sync::Arc;

use data_encoding::HEXLOWER;
use polykey_hsm::KeyWrapper;
use polykey_hsm::recovery::{RecoveryPublicKey, RecoveryWrapper};
use polykey_proto::polykey::v2 as pb;
use tonic::Request;

use super::root::slot;
use super::{AdminService, commands, event};
use crate::authz::{Action, Resource};
use crate::config::Config;
use crate::custody::{ChangeError, NamedWrapper, Removal, SlotSpec, Terms};
use crate::error::Error;
use crate::limits::Violations;

/// Bytes of a public recovery key as text, with room for line breaks.
const PUBLIC_KEY: usize = 256;

/// What a new slot is wrapped by.
enum By {
    Configured(String),
    Recovery(RecoveryPublicKey),
}

impl AdminService {
    pub(super) async fn add_slot(
        &self,
        request: Request<pb::AddSlotRequest>,
    ) -> Result<pb::AddSlotResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "AddSlot", &m);
        let mut v = Violations::new();
        v.check(SlotSpec::is_label(&m.label), "label", "must be 1 to 64 of a-z A-Z 0-9 . _ -");
        let by = by(&mut v, &m);
        v.finish()?;
        let by = by.ok_or_else(|| Error::internal("nothing to wrap by"))?;
        let decision = self.authorize(&cx, Resource::Node, commands::RewrapRoot).await?;

        let custody = &self.0.admin.custody;
        if self.repeated(&cx, key.as_ref()).await? {
            let status = custody.status().await?;
            let now = status.slots.iter().find(|slot| slot.label == m.label).map(slot);
            let generation = status.generation;
            return Ok(pb::AddSlotResponse { slot: now, generation, audit_index: 0 });
        }
        let mut learnt = None;
        let (wrapper, spec): (Arc<dyn KeyWrapper>, SlotSpec) = match by {
            By::Configured(name) => {
                let named = self.wrapper_named(name).await?;
                let both = (Arc::clone(&named.wrapper), named.slot(&m.label));
                learnt = Some(named);
                both
            }
            By::Recovery(public) => {
                let wrapper = RecoveryWrapper::to(public);
                let wrapper = wrapper.map_err(|e| Error::internal(e.to_string()))?;
                (Arc::new(wrapper), SlotSpec::recovery(&m.label, &public))
            }
        };
        let event = event(&cx, Action::RewrapRoot, decision, &[("change", "add")]);
        let remember = key.map(|key| key.noted(custody.vault(), &cx, &m.label));
        let terms = Terms { expected: m.expected_generation, remember };
        let added = custody.add_slot(wrapper, spec, terms, event).await;
        let (id, leaf) = added.map_err(Error::from)?;
        if let Some(named) = learnt {
            self.learn(named);
        }
        let status = custody.status().await?;
        Ok(pb::AddSlotResponse {
            slot: status.slots.iter().find(|slot| slot.id == id).map(slot),
            generation: status.generation,
            audit_index: leaf.unwrap_or(0),
        })
    }

    pub(super) async fn remove_slot(
        &self,
        request: Request<pb::RemoveSlotRequest>,
    ) -> Result<pb::RemoveSlotResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "RemoveSlot", &m);
        named_slot(&m.slot_id)?;
        let decision = self.authorize(&cx, Resource::Node, commands::RewrapRoot).await?;
        let custody = &self.0.admin.custody;
        if self.repeated(&cx, key.as_ref()).await? {
            let generation = custody.status().await?.generation;
            return Ok(pb::RemoveSlotResponse { generation, audit_index: 0 });
        }
        self.reopen().await;
        let event = event(&cx, Action::RewrapRoot, decision, &[("change", "remove")]);
        let remember = key.map(|key| key.noted(custody.vault(), &cx, &m.slot_id));
        let terms = Terms { expected: m.expected_generation, remember };
        let removal = Removal { slot: m.slot_id, wrappers: self.wrappers(), terms };
        let (_, leaf) = custody.remove_slot(removal, event).await.map_err(Error::from)?;
        let generation = custody.status().await?.generation;
        Ok(pb::RemoveSlotResponse { generation, audit_index: leaf.unwrap_or(0) })
    }

    pub(super) async fn test_slot(
        &self,
        request: Request<pb::TestSlotRequest>,
    ) -> Result<pb::TestSlotResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        named_slot(&m.slot_id)?;
        let decision = self.authorize(&cx, Resource::Node, commands::RewrapRoot).await?;
        let custody = &self.0.admin.custody;
        self.reopen().await;
        let tested = custody.test_slot(&m.slot_id, &self.wrappers()).await;
        let problem = match tested {
            Ok(_) => String::new(),
            Err(ChangeError::SlotUnavailable(trial)) => trial.to_string(),
            Err(error) => return Err(error.into()),
        };
        let opens = problem.is_empty();
        let result = if opens { "opens" } else { "does not open" };
        let details = [("change", "test"), ("slot", m.slot_id.as_str()), ("result", result)];
        self.seen(&cx, Action::RewrapRoot, decision, &details).await?;
        let status = custody.status().await?;
        let is = |slot: &&crate::custody::SlotStatus| {
            slot.label == m.slot_id || HEXLOWER.encode(&slot.id) == m.slot_id.to_lowercase()
        };
        let slot = status.slots.iter().find(is).map(slot);
        Ok(pb::TestSlotResponse { slot, opens, problem })
    }

    /// A wrapper of the configuration: one that this process has, or one that has been written there
    /// since.
    async fn wrapper_named(&self, name: String) -> Result<NamedWrapper, Error> {
        let known = self.0.wrappers.lock().iter().find(|known| known.name == name).cloned();
        let file = self.0.admin.config.file.clone();
        let read = tokio::task::spawn_blocking(move || Config::load(&file)).await;
        let refused = |text: String| Error::invalid("wrapper", text);
        let config = read
            .map_err(|e| Error::internal(format!("reading the configuration: {e}")))?
            .map_err(|e| refused(e.to_string()))?;
        // The section may say something else by now.
        let wanted = NamedWrapper::wanted(&config, &name);
        if let Some(known) = known
            && known.complete
            && (wanted.is_none() || known.config.as_ref() == wanted)
        {
            return Ok(known);
        }
        match Box::pin(NamedWrapper::open_one(&config, &name)).await {
            Some(opened) => opened.map_err(|unusable| refused(unusable.to_string())),
            None => {
                let place = config.file.display();
                Err(refused(format!("there is no section [wrappers.{name}] in {place}")))
            }
        }
    }

    /// Keeps a wrapper at hand, in the place of an older one of its name.
    pub(super) fn learn(&self, named: NamedWrapper) {
        let mut wrappers = self.0.wrappers.lock();
        wrappers.retain(|known| known.name != named.name);
        wrappers.push(named);
        // A quorum holds its members: it must not go on with one that was replaced.
        NamedWrapper::rebuild_quorums(&mut wrappers);
    }

    /// Opens what the configuration names and could not be opened before: a secret may be back.
    pub(super) async fn reopen(&self) {
        let file = self.0.admin.config.file.clone();
        let read = tokio::task::spawn_blocking(move || Config::load(&file)).await;
        let Ok(Ok(config)) = read else { return };
        for name in NamedWrapper::names(&config) {
            let known =
                self.0.wrappers.lock().iter().any(|known| known.name == name && known.complete);
            if !known
                && let Some(Ok(named)) = Box::pin(NamedWrapper::open_one(&config, &name)).await
            {
                self.learn(named);
            }
        }
    }
}

fn by(v: &mut Violations, m: &pb::AddSlotRequest) -> Option<By> {
    let fit = m.recovery_public_key.len() <= PUBLIC_KEY;
    match (m.wrapper.is_empty(), m.recovery_public_key.is_empty()) {
        (false, true) => {
            let named = m.wrapper.len() <= 64 && !m.wrapper.chars().any(char::is_control);
            v.check(named, "wrapper", "must be the name of a wrapper of the configuration");
            Some(By::Configured(m.wrapper.clone()))
        }
        (true, false) => match RecoveryPublicKey::parse(&m.recovery_public_key) {
            Ok(public) if fit => Some(By::Recovery(public)),
            Ok(_) => {
                v.add("recovery_public_key", "must have at most 256 bytes");
                None
            }
            Err(error) => {
                v.add("recovery_public_key", error.to_string());
                None
            }
        },
        (true, true) => {
            v.add("wrapper", "must be set, or recovery_public_key");
            None
        }
        (false, false) => {
            v.add("wrapper", "must not be set together with recovery_public_key");
            None
        }
    }
}

fn named_slot(name: &str) -> Result<(), Error> {
    let mut v = Violations::new();
    v.check((1..=64).contains(&name.len()), "slot_id", "must have 1 to 64 bytes");
    v.finish()
}
