//! Slots and their table: wrapping, proving, sealing, and trying to open.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use polykey_hsm::recovery::{RecoveryPublicKey, RecoveryWrapper};
use polykey_hsm::{
    Deadline, KeyWrapper, MasterKeySource, Ring, RootError, RootKey, SlotKind, WrapContext,
    WrapError, WrappedKey,
};
use polykey_proto::polykey::record::v1::{AuditEvent, Slot, SlotTable};
use prost::Message;
use tokio::runtime::Handle;

use super::error::{ChangeError, OpenError, Trial, TrialOutcome};
use crate::config::{Pkcs11, Quorum, Wrapper};
use crate::error::Error;
use crate::time::Time;

/// How long one wrapper may take for one slot.
const PATIENCE: Duration = Duration::from_secs(30);

/// The kind of a slot that opens with a recovery key.
pub const RECOVERY: &str = "recovery";

/// What a slot is called and where its secret is found. No secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSpec {
    /// The operator's name for it: 1 to 64 of `a-z A-Z 0-9 . _ -`.
    pub label: String,
    /// "local-file", "local-env", "local-credential", "local-ssm", "local-passphrase",
    /// "pkcs11", "aws", "quorum" or "recovery".
    pub kind: String,
    /// Where the secret is found, e.g. "file /etc/polykey/master.key"; the key of AWS KMS; the
    /// members of the quorum; or the recovery public key.
    pub source: String,
}

impl SlotSpec {
    /// The specification of a slot of the local wrapper.
    #[must_use]
    pub fn local(label: impl Into<String>, source: &MasterKeySource) -> Self {
        let kind = match source {
            MasterKeySource::File(_) => "local-file",
            MasterKeySource::Env(_) => "local-env",
            MasterKeySource::Credential(_) => "local-credential",
            MasterKeySource::Ssm(_) => "local-ssm",
            MasterKeySource::Passphrase { .. } => "local-passphrase",
        };
        Self { label: label.into(), kind: kind.into(), source: source.origin().to_string() }
    }

    /// The specification of a slot of a wrapper of the configuration.
    #[must_use]
    pub fn of_wrapper(label: impl Into<String>, wrapper: &Wrapper) -> Self {
        match wrapper {
            Wrapper::Local(source) => Self::local(label, source),
            Wrapper::Pkcs11(Pkcs11 { token, key }) => Self {
                label: label.into(),
                kind: "pkcs11".into(),
                source: format!("{key}, {}, {}", token.token, token.module.display()),
            },
            Wrapper::Aws(settings) => {
                Self { label: label.into(), kind: "aws".into(), source: settings.key.clone() }
            }
            Wrapper::Quorum(Quorum { threshold, of }) => Self {
                label: label.into(),
                kind: "quorum".into(),
                source: format!("{threshold} of {}", of.join(", ")),
            },
        }
    }

    /// The specification of a slot that opens with a recovery key, whole or in shares.
    #[must_use]
    pub fn recovery(label: impl Into<String>, public: &RecoveryPublicKey) -> Self {
        Self { label: label.into(), kind: RECOVERY.into(), source: public.to_string() }
    }

    /// Whether a text may be a slot's label.
    #[must_use]
    pub fn is_label(text: &str) -> bool {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        (1..=64).contains(&text.len()) && text.bytes().all(allowed)
    }

    pub(super) fn of(slot: &Slot) -> Self {
        let Slot { label, kind, source, .. } = slot.clone();
        Self { label, kind, source }
    }

    pub(super) fn check(&self) -> Result<(), ChangeError> {
        let short = self.kind.len() <= 64 && self.source.len() <= 4096;
        if Self::is_label(&self.label) && short { Ok(()) } else { Err(ChangeError::BadLabel) }
    }

    pub(super) fn record(&self, id: [u8; 16], wrapped: Vec<u8>, now: Time) -> Slot {
        Slot {
            slot_id: id.to_vec().into(),
            label: self.label.clone(),
            kind: self.kind.clone(),
            wrapped: wrapped.into(),
            created_at: now.micros(),
            source: self.source.clone(),
        }
    }
}

impl std::fmt::Display for SlotSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "slot `{}` ({}, {})", self.label, self.kind, self.source)
    }
}

/// The event of a change that concerns one slot.
pub(super) fn describe(mut event: AuditEvent, spec: &SlotSpec) -> AuditEvent {
    for (name, value) in [("slot", &spec.label), ("kind", &spec.kind), ("source", &spec.source)] {
        event.details.insert(name.into(), value.clone());
    }
    event
}

pub(super) fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

pub(super) fn id(slot: &Slot) -> Result<[u8; 16], Error> {
    let id = slot.slot_id.as_ref().try_into();
    id.map_err(|_| Error::data_loss("a slot has no id of 16 bytes"))
}

/// The slot of this label or (32 hexadecimal digits) id.
pub(super) fn find<'a>(table: &'a mut SlotTable, name: &str) -> Result<&'a mut Slot, ChangeError> {
    let by_label = table.slots.iter().position(|slot| slot.label == name);
    let index = by_label.or_else(|| {
        let id = data_encoding::HEXLOWER_PERMISSIVE.decode(name.as_bytes()).ok()?;
        table.slots.iter().position(|slot| slot.slot_id == id)
    });
    let slot = index.and_then(|index| table.slots.get_mut(index));
    slot.ok_or_else(|| ChangeError::NoSuchSlot(name.to_owned()))
}

/// A slot table as it is stored.
pub(super) struct Sealed {
    pub(super) generation: u64,
    pub(super) mac: Vec<u8>,
    pub(super) bytes: Vec<u8>,
}

impl Sealed {
    /// The next generation of a table, with the ring, under this root.
    pub(super) fn new(mut table: SlotTable, root: &RootKey, ring: &Ring) -> Result<Self, Error> {
        let crypto = |e: polykey_hsm::CryptoFailure| Error::internal(e.to_string());
        table.generation += 1;
        table.root_id = root.id().to_vec().into();
        table.ring = ring.seal(root).map_err(crypto)?.into();
        table.mac = Vec::new().into();
        let mac = root.mac_slots(&table.encode_to_vec()).map_err(crypto)?.to_vec();
        table.mac = mac.clone().into();
        Ok(Self { generation: table.generation, mac, bytes: table.encode_to_vec() })
    }
}

/// Whether a table is one that was sealed under this root.
pub(super) fn authentic(table: &SlotTable, root: &RootKey) -> bool {
    let mut bare = table.clone();
    bare.mac = Vec::new().into();
    table.root_id.as_ref() == root.id() && root.verify_slots(&bare.encode_to_vec(), &table.mac)
}

/// Runs a wrapper off the threads of requests: it may compute or wait for long.
async fn off_thread<T: Send + 'static>(
    work: impl Future<Output = Result<T, RootError>> + Send + 'static,
) -> Result<T, RootError> {
    let handle = Handle::current();
    let running = tokio::task::spawn_blocking(move || handle.block_on(work));
    // Whatever a wrapper does with its deadline, whoever asked hears of it.
    let late = Duration::from_secs(2);
    let Ok(result) = tokio::time::timeout(PATIENCE.saturating_add(late), running).await else {
        return Err(WrapError::DeadlineExceeded.into());
    };
    result.unwrap_or_else(|e| Err(WrapError::Config(format!("the wrapper failed: {e}")).into()))
}

async fn unwrap(
    wrapper: &Arc<dyn KeyWrapper>,
    wrapped: WrappedKey,
    node_id: [u8; 16],
    slot_id: [u8; 16],
) -> Result<RootKey, RootError> {
    let opening = Arc::clone(wrapper);
    let cx = WrapContext::root_slot(node_id, slot_id);
    let opened = off_thread(async move {
        RootKey::slot_open(&*opening, &wrapped, &cx, Deadline::after(PATIENCE)).await
    })
    .await;
    opened.inspect_err(|error| tell(&**wrapper, error))
}

/// Why a device does not answer is for the log: the error says only that it does not.
fn tell(wrapper: &dyn KeyWrapper, error: &RootError) {
    let away = matches!(
        error,
        RootError::Wrap(WrapError::Unavailable { .. } | WrapError::DeadlineExceeded)
    );
    if let Some(reason) = wrapper.last_failure().filter(|_| away) {
        tracing::warn!(kind = %wrapper.kind(), reason, "a wrapper does not answer");
    }
}

/// No slot table encodes to this, so its MAC is of no other use.
const PROOF: &[u8] = b"\xffthe same root key";

fn same(a: &RootKey, b: &RootKey) -> bool {
    a.id() == b.id() && a.mac_slots(PROOF).is_ok_and(|mac| b.verify_slots(PROOF, &mac))
}

/// Wraps a root for a slot, and proves that what will be stored opens again as this root, unless the
/// wrapper is one that opens nothing here.
pub(super) async fn wrap(
    root: &Arc<RootKey>,
    wrapper: &Arc<dyn KeyWrapper>,
    node_id: [u8; 16],
    slot_id: [u8; 16],
) -> Result<Vec<u8>, RootError> {
    let cx = WrapContext::root_slot(node_id, slot_id);
    let (wrapping, key) = (Arc::clone(wrapper), Arc::clone(root));
    let wrapped =
        off_thread(
            async move { Ok(key.slot_wrap(&*wrapping, &cx, Deadline::after(PATIENCE)).await?) },
        )
        .await
        .inspect_err(|error| tell(&**wrapper, error))?;
    let bytes = wrapped.encode();
    let decoded = WrappedKey::decode(&bytes).map_err(|e| WrapError::Config(e.to_string()))?;
    if !wrapper.opens() {
        return Ok(bytes);
    }
    let opened = unwrap(wrapper, decoded, node_id, slot_id).await?;
    if same(&opened, root) { Ok(bytes) } else { Err(RootError::NotARoot) }
}

/// Tries wrappers on one slot: those that go by the name of what made it, then all others at once, so
/// that one which does not answer hides no other.
async fn open_slot(
    slot: &Slot,
    wrappers: &[Arc<dyn KeyWrapper>],
    node_id: [u8; 16],
) -> Result<(RootKey, Arc<dyn KeyWrapper>), TrialOutcome> {
    let decoded =
        WrappedKey::decode(&slot.wrapped).map_err(|e| TrialOutcome::Damaged(e.to_string()))?;
    let slot_id = id(slot).map_err(|_| TrialOutcome::Damaged("no slot id".into()))?;
    let mut outcome = match decoded.kind() {
        SlotKind::Recovery => TrialOutcome::Recovery,
        _ => TrialOutcome::NotConfigured,
    };
    let open = |wrapper: &Arc<dyn KeyWrapper>| {
        let (wrapper, decoded) = (Arc::clone(wrapper), decoded.clone());
        async move { (unwrap(&wrapper, decoded, node_id, slot_id).await, wrapper) }
    };
    let made = |wrapper: &&Arc<dyn KeyWrapper>| wrapper.id() == decoded.wrapper();
    let (same, others): (Vec<_>, Vec<_>) = wrappers.iter().partition(made);
    for group in [same, others] {
        let mut trials: FuturesUnordered<_> = group.into_iter().map(open).collect();
        while let Some((opened, wrapper)) = trials.next().await {
            match opened {
                Ok(root) => return Ok((root, wrapper)),
                Err(RootError::Wrap(WrapError::NotMine)) => {}
                Err(error) => outcome = TrialOutcome::Failed(error),
            }
        }
    }
    Err(outcome)
}

/// Opens the root through the first slot that opens.
pub(super) async fn open_any(
    table: &SlotTable,
    wrappers: &[Arc<dyn KeyWrapper>],
    node_id: [u8; 16],
) -> Result<(Arc<RootKey>, [u8; 16]), OpenError> {
    let mut trials: Vec<Trial> = Vec::new();
    for slot in &table.slots {
        match open_slot(slot, wrappers, node_id).await {
            Ok((root, _)) => {
                if !authentic(table, &root) {
                    return Err(OpenError::SlotsChanged { opened: SlotSpec::of(slot) });
                }
                for trial in trials.iter().filter(|t| t.outcome != TrialOutcome::Recovery) {
                    tracing::warn!(%trial, "a slot did not open; another one did");
                }
                return Ok((Arc::new(root), id(slot).map_err(OpenError::Store)?));
            }
            Err(outcome) => trials.push(Trial { slot: SlotSpec::of(slot), outcome }),
        }
    }
    Err(OpenError::NoSlotOpened(trials))
}

/// Whether a slot opens as `root` by one of `wrappers`.
pub(super) async fn opens(
    slot: &Slot,
    wrappers: &[Arc<dyn KeyWrapper>],
    node_id: [u8; 16],
    root: &RootKey,
) -> Result<(), Trial> {
    let outcome = match open_slot(slot, wrappers, node_id).await {
        Ok((opened, _)) if same(&opened, root) => return Ok(()),
        Ok(_) => TrialOutcome::Failed(RootError::NotARoot),
        Err(outcome) => outcome,
    };
    Err(Trial { slot: SlotSpec::of(slot), outcome })
}

/// One of these slots that opens as `root` by one of `wrappers`; all are tried at once. If none
/// does, why each of them does not.
pub(super) async fn any_opens(
    slots: &[Slot],
    wrappers: &[Arc<dyn KeyWrapper>],
    node_id: [u8; 16],
    root: &RootKey,
) -> Result<[u8; 16], Vec<Trial>> {
    let tried = slots.iter().map(|slot| async move {
        opens(slot, wrappers, node_id, root).await.map(|()| id(slot).unwrap_or_default())
    });
    let mut tried: FuturesUnordered<_> = tried.collect();
    let mut trials = Vec::new();
    while let Some(opened) = tried.next().await {
        match opened {
            Ok(opened) => return Ok(opened),
            Err(trial) => trials.push(trial),
        }
    }
    trials.sort_by(|a, b| a.slot.label.cmp(&b.slot.label));
    Err(trials)
}

/// What a slot of a table that is authentic becomes under another root: wrapped by what opens it now.
pub(super) async fn rewrapped(
    slot: &Slot,
    wrappers: &[Arc<dyn KeyWrapper>],
    node_id: [u8; 16],
    (now, next): (&Arc<RootKey>, &Arc<RootKey>),
) -> Result<Vec<u8>, ChangeError> {
    let wrapper = wrapper_of(slot, wrappers, node_id, now).await?;
    let wrapped = wrap(next, &wrapper, node_id, id(slot)?).await;
    wrapped.map_err(|error| ChangeError::Wrap { slot: SlotSpec::of(slot), error })
}

/// The wrapper of a slot of a table that is authentic: the one that opens it as `root`, or the
/// public half of its recovery key.
async fn wrapper_of(
    slot: &Slot,
    wrappers: &[Arc<dyn KeyWrapper>],
    node_id: [u8; 16],
    root: &RootKey,
) -> Result<Arc<dyn KeyWrapper>, ChangeError> {
    if let Ok(wrapped) = WrappedKey::decode(&slot.wrapped)
        && let Some(recovery) = RecoveryWrapper::of(&wrapped)
    {
        return Ok(Arc::new(recovery));
    }
    let unavailable =
        |outcome| ChangeError::SlotUnavailable(Trial { slot: SlotSpec::of(slot), outcome });
    match open_slot(slot, wrappers, node_id).await {
        Ok((opened, wrapper)) if same(&opened, root) => Ok(wrapper),
        Ok(_) => Err(unavailable(TrialOutcome::Failed(RootError::NotARoot))),
        Err(outcome) => Err(unavailable(outcome)),
    }
}
