//! How a change is carried out: authorize, plan into one transaction, commit, and again if
//! somebody else was faster.

mod changes;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::{
    AliasRecord, AuditEvent, KeyRecord, UseCountRecord, VersionRecord, job_record::Kind,
    key_record::State,
};
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::create::Made;
use super::idempotency::Idempotency;
use super::owned::Place;
use super::resident::is_resident;
use super::rows::{claim_alias, release_alias, schedule, unschedule, write_list_rows};
use super::{Key, KeyVersion, Keyring};
use crate::authz::{Action, Authorized, Command};
use crate::command::{DeleteAlias, Mutation, SetAlias, SetBounds, TrimVersions, part};
use crate::context::Context;
use crate::error::Error;
use crate::key::{self, KeyId, KeyName, Version, version_row};
use crate::time::Time;
use crate::vault::{Receipt, Tx};
use changes::{destroy, expect, resume_promotion, revoke, update};
pub(super) use changes::{next_rotation, revocation_details};

/// How often a change is tried again when the key changed under it.
const ATTEMPTS: usize = 16;

/// What a change came to.
#[derive(Clone, Debug)]
pub struct Done {
    /// The key afterwards.
    pub key: Arc<Key>,
    /// The version it is about: the new one, or the primary.
    pub version: Option<Arc<KeyVersion>>,
    /// The version that was primary before, where another took its place.
    pub previous: u32,
    /// End of that version's grace.
    pub grace_until: Option<Time>,
    /// When it was done.
    pub at: Time,
    /// Index of its audit leaf.
    pub leaf: Option<u64>,
    /// How many versions a trim erased.
    pub erased: u32,
}

/// What is made once and used by every attempt.
pub(super) enum Prepared {
    Nothing,
    Material(Made),
    /// The id and the material of a new key, and its place in the quota of its client.
    Key(KeyId, Made, Option<Place>),
}

impl Prepared {
    fn made(&self) -> Option<&Made> {
        match self {
            Self::Nothing => None,
            Self::Material(made) | Self::Key(_, made, _) => Some(made),
        }
    }

    /// Whether what was made outside the store stays there from now on.
    fn keep(&self, kept: bool) {
        if let Some(made) = self.made() {
            made.keep(kept);
        }
    }

    /// Keeps what the change has used.
    fn settle(&self, done: &Done) {
        let used = |made: &Made| done.version.as_ref().is_some_and(|v| made.is_of(&v.record));
        self.keep(self.made().is_some_and(used));
        if let Self::Key(_, _, Some(place)) = self {
            place.keep();
        }
    }
}

/// One planned change, before its commit.
pub(super) struct Planned {
    pub(super) done: Done,
    pub(super) event: AuditEvent,
    /// What the change means to another key: an event of its own, behind the first.
    pub(super) beside: Option<AuditEvent>,
}

/// Whoever lost a race for a key waits for its turn, so that any number of callers get theirs in the
/// end. The first attempt needs none: most keys have one writer at a time.
#[derive(Debug)]
pub(super) struct Turns(Box<[Arc<Mutex<()>>]>);

impl Default for Turns {
    fn default() -> Self {
        Self((0..256).map(|_| Arc::default()).collect())
    }
}

impl Turns {
    /// The turns of all keys that are named, always in the same order.
    async fn take(&self, mutations: &[Mutation]) -> Vec<OwnedMutexGuard<()>> {
        let place = |key: KeyName| {
            let mut hasher = DefaultHasher::new();
            key.hash(&mut hasher);
            usize::try_from(hasher.finish() % self.0.len() as u64).unwrap_or(0)
        };
        let places: BTreeSet<usize> =
            mutations.iter().filter_map(Mutation::key).map(place).collect();
        let mut turns = Vec::with_capacity(places.len());
        for lock in places.into_iter().filter_map(|place| self.0.get(place)) {
            turns.push(Arc::clone(lock).lock_owned().await);
        }
        turns
    }
}

impl Keyring {
    /// Carries out one change.
    ///
    /// # Errors
    /// Whatever forbids it; [`Error::Conflict`] if the key has another revision than expected.
    pub async fn mutate(
        &self,
        cx: &Context,
        mutation: &Mutation,
        idempotency: Option<&Idempotency>,
    ) -> Result<Done, Error> {
        let one = std::slice::from_ref(mutation);
        let keys: Vec<Option<&Idempotency>> = vec![idempotency];
        let mut done = self.mutate_all(cx, one, &keys).await.map_err(|(_, error)| error)?;
        done.pop().ok_or_else(|| Error::internal("a change without an outcome"))
    }

    /// Carries out several changes in one transaction: all or none.
    ///
    /// # Errors
    /// The first one that is forbidden, with its index.
    pub async fn mutate_all(
        &self,
        cx: &Context,
        mutations: &[Mutation],
        idempotency: &[Option<&Idempotency>],
    ) -> Result<Vec<Done>, (usize, Error)> {
        // A repeated request must find its first result before anything is generated or refused.
        if let Some(done) = self.recall_all(cx, mutations, idempotency).await? {
            return Ok(done);
        }
        for (i, mutation) in mutations.iter().enumerate() {
            mutation.check_times(cx.now).map_err(|e| (i, e))?;
        }
        match self.carry_out(cx, mutations, idempotency).await {
            Ok(done) => Ok(done),
            // The same request may have come twice at once, and this one have met the other's work.
            Err(refused) => match self.recall_all(cx, mutations, idempotency).await {
                Ok(Some(done)) => Ok(done),
                Err((index, error @ Error::Invalid(_))) => Err((index, error)),
                _ => Err(refused),
            },
        }
    }

    async fn carry_out(
        &self,
        cx: &Context,
        mutations: &[Mutation],
        idempotency: &[Option<&Idempotency>],
    ) -> Result<Vec<Done>, (usize, Error)> {
        let mut prepared = Vec::with_capacity(mutations.len());
        for (i, mutation) in mutations.iter().enumerate() {
            prepared.push(self.prepare(cx, mutation).await.map_err(|e| (i, e))?);
        }
        let mut last = 0;
        let mut turn = Vec::new();
        for _ in 0..ATTEMPTS {
            let mut tx = self.vault.begin().await.map_err(|e| (0, e))?;
            let mut planned = Vec::with_capacity(mutations.len());
            for (i, (mutation, prepared)) in mutations.iter().zip(&prepared).enumerate() {
                last = i;
                let plan = Box::pin(self.plan(cx, &mut tx, mutation, prepared));
                let plan = plan.await.map_err(|e| (i, e))?;
                tx.note(&plan.event);
                if let Some(event) = &plan.beside {
                    tx.note(event);
                }
                if let Some(Some(key)) = idempotency.get(i) {
                    key.remember(&mut tx, cx, &plan.done).await.map_err(|e| (i, e))?;
                }
                planned.push(plan);
            }
            // Whoever breaks off now does not know whether it is used.
            prepared.iter().for_each(|prepared| prepared.keep(true));
            let committed = tx.commit().await;
            match &committed {
                Ok(_) => {
                    let both = prepared.iter().zip(&planned);
                    both.for_each(|(prepared, planned)| prepared.settle(&planned.done));
                }
                Err(Error::OutcomeUnknown { .. }) => {}
                Err(_) => prepared.iter().for_each(|prepared| prepared.keep(false)),
            }
            match committed {
                Ok(receipt) => {
                    return Ok(self.finish(planned, receipt));
                }
                Err(Error::Conflict) => {
                    // Somebody changed a row of ours, or the same request came twice at once.
                    if let Some(done) = self.recall_all(cx, mutations, idempotency).await? {
                        return Ok(done);
                    }
                    if turn.is_empty() {
                        turn = self.turns.take(mutations).await;
                    }
                }
                Err(error) => return Err((last, error)),
            }
        }
        Err((last, Error::Conflict))
    }

    fn finish(&self, planned: Vec<Planned>, receipt: Receipt) -> Vec<Done> {
        let mut leaf = receipt.leaf;
        let mut all = Vec::with_capacity(planned.len());
        for Planned { mut done, event, beside } in planned {
            done.leaf = leaf;
            for event in [Some(event), beside].into_iter().flatten() {
                if let Some(index) = leaf {
                    self.trail.observed(index, &event);
                    leaf = Some(index + 1);
                }
            }
            all.push(done);
        }
        all
    }

    async fn recall_all(
        &self,
        cx: &Context,
        mutations: &[Mutation],
        idempotency: &[Option<&Idempotency>],
    ) -> Result<Option<Vec<Done>>, (usize, Error)> {
        let mut all = Vec::new();
        for (i, mutation) in mutations.iter().enumerate() {
            let Some(Some(key)) = idempotency.get(i) else { return Ok(None) };
            match self.recall(cx, mutation, key).await.map_err(|e| (i, e))? {
                Some(done) => all.push(done),
                None => return Ok(None),
            }
        }
        Ok((!all.is_empty()).then_some(all))
    }

    /// Authorizes what will need material, and makes it, outside any transaction.
    async fn prepare(&self, cx: &Context, mutation: &Mutation) -> Result<Prepared, Error> {
        match mutation {
            Mutation::Create(command) => self.prepare_create(cx, command).await,
            Mutation::Rotate(command) => self.prepare_rotate(cx, command).await,
            _ => Ok(Prepared::Nothing),
        }
    }

    async fn plan(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        mutation: &Mutation,
        prepared: &Prepared,
    ) -> Result<Planned, Error> {
        if let Mutation::Create(command) = mutation {
            return self.plan_create(cx, tx, command, prepared).await;
        }
        let name = mutation.key().ok_or_else(|| Error::internal("a change of no key"))?;
        let found = self.load_in(cx, tx, &name).await;
        let key = self.or_missing(cx, mutation.action(), &name, found).await?;
        let now = cx.now;
        match mutation {
            Mutation::Create(_) => Err(Error::internal("planned twice")),
            Mutation::Rotate(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                expect(&key, command.expected)?;
                self.plan_rotate(cx, tx, key, permit, prepared).await
            }
            Mutation::Revoke(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                expect(&key, command.expected)?;
                let after = revoke(tx, &key, &permit, now)?;
                let mut planned = self.changed(cx, tx, &key, after, &permit).await?;
                revocation_details(&mut planned.event, &planned.done.key.record);
                Ok(planned)
            }
            Mutation::Update(command) if command.shares() && !command.describes() => {
                let part = part::Share(command);
                let permit = self.authorize(cx, key.resource(), part).await?;
                expect(&key, command.expected)?;
                let after = update(tx, &key, permit.command().0, now)?;
                self.check_policies(cx, &key, &after).await?;
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::Update(command) => {
                let permit = self.authorize(cx, key.resource(), &**command).await?;
                expect(&key, command.expected)?;
                let after = update(tx, &key, permit.command(), now)?;
                self.check_policies(cx, &key, &after).await?;
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::Enable(command) => {
                let permit = self.authorize(cx, key.resource(), part::Enable(command)).await?;
                expect(&key, command.expected)?;
                let mut after = key.record.clone();
                key::enable(&mut after, now).map_err(Error::State)?;
                self.reschedule_rotation(tx, &key, &mut after, now)?;
                resume_promotion(tx, &after, key.id)?;
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::Disable(command) => {
                let permit = self.authorize(cx, key.resource(), part::Disable(command)).await?;
                expect(&key, command.expected)?;
                let mut after = key.record.clone();
                key::disable(&mut after, now).map_err(Error::State)?;
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::Destroy(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                expect(&key, command.expected)?;
                let after = destroy(tx, &key, &permit, now)?;
                let mut planned = self.changed(cx, tx, &key, after, &permit).await?;
                let at = Time::from_micros(planned.done.key.record.destroy_at);
                planned.event.details.insert("destroy_at".into(), at.to_string());
                Ok(planned)
            }
            Mutation::CancelDestroy(command) => {
                let part = part::CancelDestruction(command);
                let permit = self.authorize(cx, key.resource(), part).await?;
                expect(&key, command.expected)?;
                let mut after = key.record.clone();
                key::cancel_destruction(&mut after, now).map_err(Error::State)?;
                unschedule(tx, Kind::Destroy, key.record.destroy_at, key.id, 0);
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::SetAlias(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                self.plan_set_alias(cx, tx, key, permit).await
            }
            Mutation::DeleteAlias(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                let mut after = key.record.clone();
                let DeleteAlias { alias } = permit.command();
                after.aliases.retain(|name| name != alias);
                release_alias(tx, alias).await?;
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::SetBounds(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                expect(&key, command.expected)?;
                key::may_change(&key.record, now).map_err(Error::State)?;
                let SetBounds { decryption, encryption, .. } = permit.command();
                let mut after = key.record.clone();
                let decryption = decryption.unwrap_or(after.min_decryption_version);
                let encryption = encryption.unwrap_or(after.min_encryption_version);
                key::set_bounds(&mut after, decryption, encryption).map_err(Error::State)?;
                self.changed(cx, tx, &key, after, &permit).await
            }
            Mutation::Trim(command) => {
                let permit = self.authorize(cx, key.resource(), command).await?;
                expect(&key, command.expected)?;
                self.plan_trim(cx, tx, key, permit).await
            }
        }
    }

    /// Loads a key inside a transaction. An alias that moves meanwhile makes the commit fail.
    pub(super) async fn load_in(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        name: &KeyName,
    ) -> Result<Key, Error> {
        let id = match name {
            KeyName::Id(id) => *id,
            KeyName::Alias(alias) => {
                let row = self.vault.row_name("alias", alias);
                let found = tx.get::<AliasRecord>(&row).await?.ok_or(Error::NotFound)?;
                tx.pin::<AliasRecord>(&row);
                KeyId::from_slice(&found.record.key_id)
                    .ok_or_else(|| Error::data_loss("an alias without a key"))?
            }
        };
        let loaded = tx.get::<KeyRecord>(&id.bytes()).await?.ok_or(Error::NotFound)?;
        let mut key = self.key(Some(cx.caller.client_id()), loaded.record).await?;
        if tx.is_pending::<KeyRecord>(&id.bytes()) {
            key.facts.revision = 0;
        }
        Ok(key)
    }

    /// Whether the policies that a key would have hold together.
    async fn check_policies(
        &self,
        cx: &Context,
        key: &Key,
        after: &KeyRecord,
    ) -> Result<(), Error> {
        let client = Some(cx.caller.client_id());
        let compiled = self.compiled(client, key.id, &after.access_policies).await?;
        compiled.map(drop).map_err(|e| super::create::policy_violations("policies_to_update", &e))
    }

    /// Writes a changed key with the rows that follow from it, and makes its event.
    pub(super) async fn changed<C: Command>(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        before: &Key,
        mut after: KeyRecord,
        permit: &Authorized<C>,
    ) -> Result<Planned, Error> {
        after.updated_at = cx.now.micros();
        after.revision += 1;
        write_list_rows(tx, Some(&before.record), &after, before.id)?;
        tx.put(&before.id.bytes(), &after)?;
        let after = Arc::new(self.key(Some(cx.caller.client_id()), after).await?);
        let event = self.event::<C>(cx, &after, None, permit);
        let done = Done {
            key: after,
            version: None,
            previous: 0,
            grace_until: None,
            at: cx.now,
            leaf: None,
            erased: 0,
        };
        Ok(Planned { done, event, beside: None })
    }

    pub(super) fn event<C: Command>(
        &self,
        cx: &Context,
        key: &Key,
        version: Option<u32>,
        permit: &Authorized<C>,
    ) -> AuditEvent {
        cx.origin()
            .event(
                C::ACTION.name(),
                Some((key.id, version)),
                Outcome::Success,
                0,
                &permit.decision_id().to_string(),
            )
            .build()
    }

    async fn plan_set_alias(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        key: Key,
        permit: Authorized<&SetAlias>,
    ) -> Result<Planned, Error> {
        key::may_change(&key.record, cx.now).map_err(Error::State)?;
        let SetAlias { alias, moves, from, .. } = permit.command();
        let mut after = key.record.clone();
        let mut beside = None;
        if *moves {
            let name = KeyName::Alias(alias.clone());
            let found = self.load_in(cx, tx, &name).await;
            let old = self.or_missing(cx, Action::DeleteAlias, &name, found).await?;
            // Taking the name away from the old key is a change of that key too.
            let gone = DeleteAlias { alias: alias.clone() };
            self.require(cx, old.resource(), &gone).await?;
            if let Some(from) = from {
                // Compared without being loaded: whether another key exists is nobody's business.
                let is_old = match from {
                    KeyName::Id(id) => *id == old.id,
                    KeyName::Alias(name) => old.record.aliases.contains(name),
                };
                if !is_old {
                    return Err(Error::Conflict);
                }
            }
            if old.id == key.id {
                return self.changed(cx, tx, &key, after, &permit).await;
            }
            // Whoever uses a key by its name would use another's: that is the old one's owner's to decide.
            if old.record.creator != key.record.creator {
                self.require(cx, old.resource(), part::TakeAlias(permit.command())).await?;
            }
            if old.algorithm != key.algorithm
                || old.record.purpose != key.record.purpose
                || old.record.convergent != key.record.convergent
            {
                return Err(Error::invalid(
                    "key_id",
                    "an alias moves only between keys of the same type and purpose",
                ));
            }
            let mut stripped = old.record.clone();
            stripped.aliases.retain(|name| name != alias);
            let taken = self.changed(cx, tx, &old, stripped, &permit).await?;
            // Of the key that loses the name, it is the deletion of one.
            let mut event = taken.event;
            event.action = Action::DeleteAlias.name().to_owned();
            beside = Some(event);
            release_alias(tx, alias).await?;
        }
        if after.aliases.len() >= crate::limits::ALIASES {
            return Err(Error::invalid("alias", "the key has 50 aliases, and no more fit"));
        }
        claim_alias(tx, alias, key.id, cx.now).await?;
        after.aliases.push(alias.clone());
        let planned = self.changed(cx, tx, &key, after, &permit).await?;
        Ok(Planned { beside, ..planned })
    }

    async fn plan_trim(
        &self,
        cx: &Context,
        tx: &mut Tx<'_>,
        key: Key,
        permit: Authorized<&TrimVersions>,
    ) -> Result<Planned, Error> {
        key::may_change(&key.record, cx.now).map_err(Error::State)?;
        let to = permit.command().min_available;
        key::check_trim(&key.record, to).map_err(Error::State)?;
        if is_resident(&key.record) {
            let text = "is a key in a token: its versions are destroyed with it, not before";
            return Err(Error::invalid("key_id", text));
        }
        let mut after = key.record.clone();
        let mut erased = 0;
        for number in key.record.min_available_version..to {
            let Some(version) = Version::new(number) else { continue };
            let record = self.version_in(tx, key.id, version).await?;
            unschedule(tx, Kind::EndGrace, record.grace_until, key.id, number);
            tx.delete::<VersionRecord>(&version_row(key.id, version));
            tx.delete::<UseCountRecord>(&version_row(key.id, version));
            erased += 1;
        }
        after.min_available_version = to;
        let mut planned = self.changed(cx, tx, &key, after, &permit).await?;
        planned.done.erased = erased;
        Ok(planned)
    }

    /// The next automatic rotation, counted from now, with jitter; none while it is off.
    pub(super) fn reschedule_rotation(
        &self,
        tx: &mut Tx<'_>,
        before: &Key,
        after: &mut KeyRecord,
        now: Time,
    ) -> Result<(), Error> {
        unschedule(tx, Kind::Rotate, before.record.next_rotation_at, before.id, 0);
        after.next_rotation_at = 0;
        if after.rotation_period_seconds > 0 && after.state() == State::Enabled {
            let due = next_rotation(before.id, after, now);
            after.next_rotation_at = due.micros();
            schedule(tx, Kind::Rotate, due, before.id, 0)?;
        }
        Ok(())
    }
}
