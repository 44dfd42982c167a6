//! Material from outside: one-time keys that protect it on its way, each used once.

use std::ops::Bound;

use data_encoding::HEXLOWER;
use polykey_hsm::import as protection;
use polykey_hsm::{KeyMaterial, PublicKey, algorithm, random};
use polykey_proto::polykey::record::v1::{ImportRecord, audit_event};
use zeroize::Zeroizing;

use super::super::idempotency::Idempotency;
use super::super::read::ATTEMPTS;
use super::Keyring;
use crate::authz::{DecisionId, Resource};
use crate::command::crypto::{GetImportParameters, Import, Protection};
use crate::context::Context;
use crate::error::Error;
use crate::time::Time;
use crate::vault::{Tx, space};

/// Seconds for which a one-time key can be used: an hour.
const LIFE: i64 = 3600;
/// One-time keys that wait for their import, at most.
const WAITING: usize = 10_000;
/// The row of a one-time key: when it expires (u64 BE, µs) ‖ 16 random bytes.
type Row = [u8; 24];

fn row(expires_at: Time) -> Result<Row, Error> {
    let random: [u8; 16] = random::array().map_err(|e| Error::internal(e.to_string()))?;
    let mut row = [0; 24];
    let expires_at = u64::try_from(expires_at.micros()).unwrap_or(0).to_be_bytes();
    for (to, from) in row.iter_mut().zip(expires_at.into_iter().chain(random)) {
        *to = from;
    }
    Ok(row)
}

/// A one-time public key.
#[derive(Debug)]
pub struct ImportParameters {
    /// SubjectPublicKeyInfo (RSA) or 32 raw bytes (X25519).
    pub public: Vec<u8>,
    /// Names it in the import.
    pub id: Row,
    /// Until when.
    pub expires_at: Time,
    /// What HPKE must bind.
    pub info: Vec<u8>,
}

fn wrapping(protection: Protection) -> protection::ImportWrapping {
    match protection {
        Protection::RsaAes => protection::ImportWrapping::RsaAes,
        Protection::Hpke => protection::ImportWrapping::Hpke,
    }
}

fn code(protection: Protection) -> u32 {
    match protection {
        Protection::RsaAes => 1,
        Protection::Hpke => 2,
    }
}

/// One text for every token that is of no use: unknown, used, expired, of another client.
fn no_token() -> Error {
    Error::invalid("import_token", "is unknown, used up, expired or another client's")
}

impl Keyring {
    /// Makes a one-time key for an import by this client, or gives that of the same request again.
    ///
    /// # Errors
    /// [`Error::Invalid`] if that one can be used no longer; whatever forbids it.
    pub async fn import_parameters(
        &self,
        cx: &Context,
        command: &GetImportParameters,
        idempotency: Option<&Idempotency>,
    ) -> Result<ImportParameters, Error> {
        let decision = self.authorize(cx, Resource::Node, command).await?.decision_id();
        let kind = command.protection;
        for _ in 0..ATTEMPTS {
            if let Some(key) = idempotency
                && let Some(first) = key.recorded(&self.vault, cx).await?
            {
                return self.one_time_key_again(cx, kind, &first.text).await;
            }
            match self.one_time_key(cx, kind, decision, idempotency).await {
                // The same request came twice at once.
                Err(Error::Conflict) => {}
                made => return made,
            }
        }
        Err(Error::Conflict)
    }

    async fn one_time_key(
        &self,
        cx: &Context,
        kind: Protection,
        decision: DecisionId,
        idempotency: Option<&Idempotency>,
    ) -> Result<ImportParameters, Error> {
        let all = polykey_storage::all();
        if self.vault.count(space::IMPORTS, all, WAITING).await? >= WAITING {
            return Err(Error::Exhausted { retry_after: std::time::Duration::from_secs(60) });
        }
        let make = move || protection::generate_one_time_key(wrapping(kind));
        let made = self
            .forge
            .run(Some(cx.caller.client_id()), make)
            .await?
            .map_err(|e| Error::internal(e.to_string()))?;
        let expires_at = cx.now.plus_seconds(LIFE);
        let id = row(expires_at)?;
        let record = ImportRecord {
            wrapping: code(kind),
            private_key: made.material.expose_for_export().to_vec().into(),
            client_id: cx.caller.client_id().to_owned(),
            expires_at: expires_at.micros(),
        };
        let mut tx = self.vault.begin().await?;
        tx.insert(&id, &record)?;
        if let Some(key) = idempotency {
            key.noted(&self.vault, cx, &HEXLOWER.encode(&id)).write(&mut tx).await?;
        }
        let about = decision.to_string();
        let outcome = audit_event::Outcome::Success;
        let action = crate::authz::Action::GetImportParameters.name();
        tx.event(cx.origin().event(action, None, outcome, 0, &about).build());
        tx.commit().await?;
        Ok(self.parameters(kind, made.public, id, expires_at))
    }

    /// What a request came to the first time.
    async fn one_time_key_again(
        &self,
        cx: &Context,
        kind: Protection,
        noted: &str,
    ) -> Result<ImportParameters, Error> {
        let damaged = |what: &str| Error::data_loss(format!("{what} without a one-time key"));
        let id = HEXLOWER.decode(noted.as_bytes()).ok().and_then(|id| Row::try_from(id).ok());
        let id = id.ok_or_else(|| damaged("an idempotency record"))?;
        let record = self.vault.get::<ImportRecord>(&id).await?.map(|l| l.record);
        let record = record.filter(|r| usable(r, cx, kind)).ok_or_else(|| {
            let text = "gave a one-time key that is used up or has expired; use a new one";
            Error::invalid("idempotency-key", text)
        })?;
        let private = KeyMaterial::from_secret(record.private_key.to_vec())
            .map_err(|_| damaged("an import record"))?;
        let public = move || algorithm::public_key(wrapping(kind).algorithm(), &private);
        let public = self.slow.run(Some(cx.caller.client_id()), public).await?;
        let public = public.map_err(|_| damaged("an import record"))?;
        Ok(self.parameters(kind, public, id, Time::from_micros(record.expires_at)))
    }

    fn parameters(
        &self,
        kind: Protection,
        public: Option<PublicKey>,
        id: Row,
        expires_at: Time,
    ) -> ImportParameters {
        let public = public.map(|p| p.spki_der).unwrap_or_default();
        match kind {
            Protection::RsaAes => ImportParameters { public, id, expires_at, info: Vec::new() },
            Protection::Hpke => {
                // Its key stands at the end of the SubjectPublicKeyInfo.
                let raw = public.last_chunk::<32>().copied().unwrap_or_default();
                let info = self.import_info(id).encode(&raw);
                ImportParameters { public: raw.to_vec(), id, expires_at, info }
            }
        }
    }

    /// Opens imported material.
    pub(in crate::keyring) async fn imported(
        &self,
        cx: &Context,
        key_algorithm: polykey_hsm::Algorithm,
        import: &Import,
    ) -> Result<algorithm::Generated, Error> {
        let refused = |e: algorithm::AlgorithmError| match e {
            algorithm::AlgorithmError::Crypto(_) => Error::internal(e.to_string()),
            _ => Error::invalid("material", e.to_string()),
        };
        let client = Some(cx.caller.client_id());
        let material = match import {
            Import::Plain(bytes) => {
                if let Some(jwk) = jwk(key_algorithm, bytes) {
                    let take = move || protection::import_jwk(key_algorithm, &jwk);
                    return self.forge.run(client, take).await?.map_err(refused);
                }
                KeyMaterial::from_secret(bytes.to_vec())
                    .map_err(|e| Error::invalid("material", e.to_string()))?
            }
            Import::Wrapped { protection: kind, id, bytes } => {
                let record = self.vault.get::<ImportRecord>(id).await?.map(|l| l.record);
                let record = record.filter(|r| usable(r, cx, *kind)).ok_or_else(no_token)?;
                let private = KeyMaterial::from_secret(record.private_key.to_vec())
                    .map_err(|_| Error::data_loss("an import record without a key"))?;
                let (kind, bytes, info) = (*kind, bytes.clone(), self.import_info(*id));
                let open = move || match kind {
                    Protection::RsaAes => protection::unwrap_rsa_aes(&private, &bytes),
                    Protection::Hpke => protection::unwrap_hpke(&private, &info, &bytes),
                };
                match self.slow.run(client, open).await? {
                    Ok(material) => material,
                    Err(_) => {
                        let action = crate::authz::Action::ImportKey.name();
                        let outcome = audit_event::Outcome::Failed;
                        let event = cx.origin().event(action, None, outcome, 3, "");
                        self.trail.used(event).await?;
                        return Err(Error::Crypto);
                    }
                }
            }
        };
        let take = move || algorithm::import(key_algorithm, material);
        self.forge.run(client, take).await?.map_err(refused)
    }

    fn import_info(&self, id: Row) -> protection::ImportInfo {
        protection::ImportInfo { node: self.vault.node_id(), token: id.to_vec() }
    }

    /// Uses a one-time key up, in the transaction of the import.
    pub(in crate::keyring) async fn use_up(
        &self,
        tx: &mut Tx<'_>,
        cx: &Context,
        import: &Import,
    ) -> Result<(), Error> {
        let Import::Wrapped { protection: kind, id, .. } = import else { return Ok(()) };
        let found = tx.get::<ImportRecord>(id).await?.map(|l| l.record);
        found.filter(|r| usable(r, cx, *kind)).ok_or_else(no_token)?;
        tx.delete::<ImportRecord>(id);
        Ok(())
    }

    /// Removes one-time keys that have expired, at most `limit`; returns whether there may be more.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn sweep_imports(&self, now: Time, limit: usize) -> Result<bool, Error> {
        let now = u64::try_from(now.micros()).unwrap_or(0);
        let range = (Bound::Unbounded, Bound::Excluded(now.to_be_bytes().to_vec()));
        let mut tx = self.vault.begin().await?;
        let rows = self.vault.scan_keys(space::IMPORTS, range, limit).await?;
        for row in &rows {
            tx.delete::<ImportRecord>(row);
        }
        if !rows.is_empty() {
            tx.commit().await?;
        }
        Ok(rows.len() == limit)
    }
}

fn usable(record: &ImportRecord, cx: &Context, kind: Protection) -> bool {
    record.client_id == cx.caller.client_id()
        && record.expires_at > cx.now.micros()
        && record.wrapping == code(kind)
}

/// A private JSON Web Key, where the bytes are one.
fn jwk(algorithm: polykey_hsm::Algorithm, bytes: &[u8]) -> Option<Zeroizing<String>> {
    let text = std::str::from_utf8(bytes).ok()?.trim();
    let is = text.starts_with('{') && algorithm != polykey_hsm::Algorithm::ApiKey;
    is.then(|| Zeroizing::new(text.to_owned()))
}
