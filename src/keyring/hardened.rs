//! Hardened keys: which keys are, and how their versions are opened by a call of the backend, which is
//! made once for all who wait for it and remembered for a while.
//!
//! What is remembered is the key of a version's blob. The material is opened with it for each use, as
//! that of other keys is with the ring, except that parsed private keys are kept beside it for as
//! long. Whatever changes the key forgets it, and so does its time, whether anybody asks or not.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::Shared;
use parking_lot::Mutex;
use polykey_hsm::{BlobKey, BoxFuture, HardenedBlobKey, HardenedMaterial, KeyMaterial, WorkingKey};
use polykey_proto::polykey::record::v1::{KeyRecord, VersionRecord};

use super::{Key, KeyCaches, KeyVersion, Keyring};
use crate::authz::Resource;
use crate::command::{CreateKey, Profile, part};
use crate::context::Context;
use crate::custody::{BackendError, Backends};
use crate::error::{Error, Reason};
use crate::key::KeyId;

/// The profiles as records say them.
pub(super) const STANDARD: u32 = 1;
pub(super) const HARDENED: u32 = 2;

/// Versions of one key that are remembered.
const VERSIONS: usize = 64;

/// Whether the material of a key lies under a backend.
pub(super) fn is_hardened(record: &KeyRecord) -> bool {
    record.storage_profile == HARDENED
}

/// What the backend gave of one version.
pub(super) struct OpenKey {
    blob_key: BlobKey,
    /// The private key, parsed.
    parsed: OnceLock<Arc<WorkingKey>>,
}

/// A call that any number of callers wait for.
type Flight = Shared<BoxFuture<'static, Result<Arc<OpenKey>, BackendError>>>;

enum Slot {
    Flying(Flight),
    Open { key: Arc<OpenKey>, until: Instant },
}

/// The versions of one key that are open or being opened. A change of the key takes the whole out of
/// the cache: what comes in then is found by nobody who comes later.
#[derive(Default)]
pub(super) struct Opened(Mutex<HashMap<u32, Slot>>);

impl Opened {
    fn get(&self, version: u32, now: Instant) -> Option<Arc<OpenKey>> {
        match self.0.lock().get(&version) {
            Some(Slot::Open { key, until }) if now < *until => Some(Arc::clone(key)),
            _ => None,
        }
    }

    /// The call that is under way for a version, or the one that `begin` starts.
    fn join(
        &self,
        version: u32,
        begin: impl FnOnce() -> Result<Flight, BackendError>,
    ) -> Result<Flight, BackendError> {
        let mut slots = self.0.lock();
        match slots.get(&version) {
            Some(Slot::Flying(flight)) => return Ok(flight.clone()),
            // It has come in since.
            Some(Slot::Open { key, until }) if Instant::now() < *until => {
                return Ok(futures::future::ready(Ok(Arc::clone(key))).boxed().shared());
            }
            Some(Slot::Open { .. }) | None => {}
        }
        let flight = begin()?;
        slots.insert(version, Slot::Flying(flight.clone()));
        Ok(flight)
    }

    fn landed(&self, version: u32, key: Option<(Arc<OpenKey>, Instant)>) {
        let mut slots = self.0.lock();
        slots.remove(&version);
        let Some((key, until)) = key else { return };
        if slots.len() >= VERSIONS {
            let oldest = slots.iter().filter_map(|(version, slot)| match slot {
                Slot::Open { until, .. } => Some((*until, *version)),
                Slot::Flying(_) => None,
            });
            match oldest.min() {
                Some((_, oldest)) => drop(slots.remove(&oldest)),
                None => return,
            }
        }
        slots.insert(version, Slot::Open { key, until });
    }

    /// Forgets what is over; whether anything is left.
    fn sweep(&self, now: Instant) -> bool {
        let mut slots = self.0.lock();
        slots.retain(|_, slot| match slot {
            Slot::Open { until, .. } => now < *until,
            Slot::Flying(_) => true,
        });
        !slots.is_empty()
    }

    fn open(&self) -> usize {
        self.0.lock().values().filter(|slot| matches!(slot, Slot::Open { .. })).count()
    }
}

/// The end of a call, whatever it is: nobody joins one that is over.
struct Landing {
    entry: Arc<Opened>,
    version: u32,
    key: Option<(Arc<OpenKey>, Instant)>,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.entry.landed(self.version, self.key.take());
    }
}

impl KeyCaches {
    /// Forgets the hardened keys whose time is over.
    pub fn sweep(&self, now: Instant) {
        self.opened.retain(|entry| entry.sweep(now));
    }

    /// Versions of hardened keys that are open.
    #[must_use]
    pub fn opened(&self) -> usize {
        let mut open = 0;
        self.opened.each(|entry| open += entry.open());
        open
    }
}

impl Keyring {
    /// Over these backends; without them, nothing is hardened.
    #[must_use]
    pub fn with_backends(mut self, backends: Arc<Backends>) -> Self {
        self.backends = Some(backends);
        self
    }

    /// Forgets the hardened keys whose time is over.
    pub fn forget_expired(&self) {
        self.caches.sweep(Instant::now());
    }

    pub(super) fn backends(&self) -> Result<&Backends, BackendError> {
        self.backends.as_deref().ok_or(BackendError::NotOffered)
    }

    /// Whether a new key is hardened: what its creator asks for and may have, and otherwise what the
    /// tier in the creator's record gives.
    pub(super) fn hardens(
        &self,
        cx: &Context,
        command: &CreateKey,
        resource: Resource<'_>,
    ) -> Result<bool, Error> {
        let offered = self.backends().is_ok_and(Backends::offered);
        let facts = &cx.caller.facts;
        let hardens = match command.profile {
            Some(Profile::Standard) => false,
            // The right to it was asked with that to create.
            Some(Profile::Hardened) if offered => true,
            Some(Profile::Hardened) => return Err(Error::State(Reason::ProfileUnavailable)),
            None => {
                let given = offered && matches!(&*facts.tier, "pro" | "enterprise");
                let ask = || part::Harden(command);
                let authorizer = self.authorizer.load();
                given && authorizer.authorize(facts, resource, &cx.facts(), ask()).is_ok()
            }
        };
        if hardens {
            // Before anything is generated for nothing.
            self.backends()?.check()?;
        }
        Ok(hardens)
    }

    /// A blob key for a new version of a hardened key.
    pub(super) async fn harden(
        &self,
        client: Option<&str>,
        id: KeyId,
    ) -> Result<HardenedBlobKey, Error> {
        Ok(self.backends()?.make(client, id.bytes()).await?)
    }

    /// What is stored of a hardened version.
    pub(super) fn hardened_material(
        &self,
        key: &Key,
        version: &VersionRecord,
    ) -> Result<HardenedMaterial, Error> {
        let context = self.material_context(key, version.version);
        self.vault.ring().hardened_material(&context, &version.material).map_err(|e| {
            Error::data_loss(format!(
                "the material of key {} version {} does not open: {e}",
                key.id, version.version
            ))
        })
    }

    /// The material of a version, for this use only.
    pub(super) async fn material(
        &self,
        client: &str,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
    ) -> Result<KeyMaterial, Error> {
        if !is_hardened(&key.record) {
            return Ok(self.open_material(key, &version.record)?.material);
        }
        let open = Box::pin(self.open_key(client, key, version)).await?;
        self.of_blob(key, version, &open)
    }

    /// The private part of a hardened version.
    pub(super) async fn working(
        &self,
        client: &str,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
    ) -> Result<Arc<WorkingKey>, Error> {
        let open = self.open_key(client, key, version).await?;
        if let Some(parsed) = open.parsed.get() {
            return Ok(Arc::clone(parsed));
        }
        let material = self.of_blob(key, version, &open)?;
        let (algorithm, purpose) =
            (key.algorithm, super::work::purpose(&key.record, key.algorithm));
        let parse = move || WorkingKey::new(algorithm, purpose, &material);
        let parsed = if algorithm.is_slow() {
            Box::pin(self.slow.run(Some(client), parse)).await?
        } else {
            parse()
        };
        let working = Arc::new(parsed.map_err(super::work::failed)?);
        if algorithm.is_asymmetric() {
            // Parsing costs more than using.
            let _ = open.parsed.set(Arc::clone(&working));
        }
        Ok(working)
    }

    fn of_blob(
        &self,
        key: &Key,
        version: &KeyVersion,
        open: &OpenKey,
    ) -> Result<KeyMaterial, Error> {
        let number = version.record.version;
        let opened = self.material_context(key, number).open_blob(&open.blob_key, &version.blob);
        opened.map_err(|e| {
            Error::data_loss(format!("the blob of key {} version {number}: {e}", key.id))
        })
    }

    /// The key of a hardened version's blob: remembered, or by a call of the backend that all who want
    /// it now wait for.
    async fn open_key(
        &self,
        client: &str,
        key: &Arc<Key>,
        version: &Arc<KeyVersion>,
    ) -> Result<Arc<OpenKey>, Error> {
        let number = version.record.version;
        let remembered = self.backends()?.remembered();
        let mut entry = Arc::<Opened>::default();
        if !remembered.is_zero() {
            let found = self.caches.opened.get_or_insert(&key.id, Arc::default);
            if let Some(open) = found.get(number, Instant::now()) {
                return Ok(open);
            }
            // The entry was there before this look: what changes after it takes the entry away. And
            // what was changed before is not remembered, nor shared with anybody.
            if self.unchanged(key, version).await? {
                entry = found;
            }
        }
        let hardened = self.hardened_material(key, &version.record)?;
        let flight = entry.join(number, || {
            let context = self.material_context(key, number);
            let backends = self.backends()?;
            let opening = backends.opening(Some(client), hardened, context)?;
            let entry = Arc::clone(&entry);
            Ok(backends.spawn(fly(opening, entry, number, remembered)).shared())
        })?;
        Ok(flight.await?)
    }
}

async fn fly(
    opening: BoxFuture<'static, Result<BlobKey, BackendError>>,
    entry: Arc<Opened>,
    version: u32,
    remembered: Duration,
) -> Result<Arc<OpenKey>, BackendError> {
    let mut landing = Landing { entry, version, key: None };
    let key = Arc::new(OpenKey { blob_key: opening.await?, parsed: OnceLock::new() });
    if let Some(until) = Instant::now().checked_add(remembered).filter(|_| !remembered.is_zero()) {
        landing.key = Some((Arc::clone(&key), until));
    }
    Ok(key)
}
