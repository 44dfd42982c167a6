//! Stored Ed25519 keys (RFC 8032) that sign tokens and audit checkpoints, and their roll-over.

mod ml_dsa;

use std::time::Duration;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use polykey_hsm::random;
use polykey_proto::polykey::record::v1::{AuditEvent, SigningKeyRecord};
use polykey_storage::{Direction, all};
use zeroize::{Zeroize, Zeroizing};

use super::slots::hex;
use crate::error::Error;
use crate::time::Time;
use crate::vault::{Loaded, Tx, Vault};

pub use ml_dsa::{MlDsaSigner, ensure as ensure_ml_dsa};

/// What a signing key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Access and refresh tokens.
    Token,
    /// Statements of the audit log's size and root. They verify for ever.
    Checkpoint,
}

impl Purpose {
    /// The word in the record.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// A signing key.
pub struct SigningKey {
    id: [u8; 16],
    secret: Zeroizing<[u8; 64]>,
    public: [u8; 32],
    created_at: Time,
    active_from: Time,
    active_until: Option<Time>,
    verify_until: Option<Time>,
}

impl SigningKey {
    /// Its id: 16 random bytes, public.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// The public key, 32 bytes.
    #[must_use]
    pub fn public(&self) -> &[u8; 32] {
        &self.public
    }

    /// Seed and public key, the form in which PASETO libraries take it.
    #[must_use]
    pub fn secret(&self) -> &[u8; 64] {
        &self.secret
    }

    /// When it was stored.
    #[must_use]
    pub fn created_at(&self) -> Time {
        self.created_at
    }

    /// When it stops signing; `None` while it is not rolled over.
    #[must_use]
    pub fn active_until(&self) -> Option<Time> {
        self.active_until
    }

    /// When what it signed stops counting; `None` is never.
    #[must_use]
    pub fn verify_until(&self) -> Option<Time> {
        self.verify_until
    }

    /// Whether it signs now.
    #[must_use]
    pub fn signs(&self, now: Time) -> bool {
        self.active_from <= now && self.active_until.is_none_or(|until| now < until)
    }

    /// Whether what it signed counts now.
    #[must_use]
    pub fn verifies(&self, now: Time) -> bool {
        self.verify_until.is_none_or(|until| now < until)
    }

    /// Signs a message; 64 bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] if the key is not one, which storing it has excluded.
    pub fn sign(&self, message: &[u8]) -> Result<[u8; 64], Error> {
        let pair = pair(&*self.secret).ok_or_else(|| Error::internal("a stored key is broken"))?;
        let signature = pair.sign(message);
        let bytes = signature.as_ref().try_into();
        bytes.map_err(|_| Error::internal("a signature is not of 64 bytes"))
    }

    /// Whether `signature` is this key's over `message`.
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        verify(&self.public, message, signature)
    }

    fn read(record: SigningKeyRecord) -> Result<Self, Error> {
        let broken = || Error::data_loss("a signing key's record is malformed");
        let mut secret = Zeroizing::new([0; 64]);
        if record.secret.len() != 64 {
            return Err(broken());
        }
        secret.copy_from_slice(&record.secret);
        let public = record.public.as_ref().try_into().map_err(|_| broken())?;
        let key = Self {
            id: record.id.as_ref().try_into().map_err(|_| broken())?,
            secret,
            public,
            created_at: Time::from_micros(record.created_at),
            active_from: Time::from_micros(record.active_from),
            active_until: Time::optional(record.active_until),
            verify_until: Time::optional(record.verify_until),
        };
        forget(record);
        Ok(key)
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").field("id", &hex(&self.id)).finish_non_exhaustive()
    }
}

/// Erases the copy of the secret in a record where nobody else holds it.
fn forget(mut record: SigningKeyRecord) {
    if let Ok(mut secret) = std::mem::take(&mut record.secret).try_into_mut() {
        secret.as_mut().zeroize();
    }
}

fn pair(secret: &[u8]) -> Option<Ed25519KeyPair> {
    let (seed, public) = secret.split_at_checked(32)?;
    Ed25519KeyPair::from_seed_and_public_key(seed, public).ok()
}

/// Verifies an Ed25519 signature under a public key of 32 bytes.
#[must_use]
pub fn verify(public: &[u8], message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, public).verify(message, signature).is_ok()
}

/// Every key of a purpose, the newest first; those that verify no more included.
///
/// # Errors
/// As [`Vault::scan`].
pub async fn list(vault: &Vault, purpose: Purpose) -> Result<Vec<SigningKey>, Error> {
    let rows = vault.scan::<SigningKeyRecord>(all(), Direction::Forward, MOST).await?;
    let rows = rows.into_iter().map(|(_, loaded)| loaded.record);
    let mut keys = Vec::new();
    for record in rows {
        if record.purpose == purpose.name() {
            keys.push(SigningKey::read(record)?);
        } else {
            forget(record);
        }
    }
    keys.sort_by_key(|key| std::cmp::Reverse((key.active_from, key.created_at, key.id)));
    Ok(keys)
}

/// Most signing keys a node keeps: a roll-over a day for 10 years.
const MOST: usize = 4096;

/// The key that signs now; made, with `event`, if there is none.
///
/// # Errors
/// As [`Tx::commit`].
pub async fn ensure(
    vault: &Vault,
    purpose: Purpose,
    event: AuditEvent,
) -> Result<SigningKey, Error> {
    let now = vault.clock().now();
    if let Some(key) = list(vault, purpose).await?.into_iter().find(|key| key.signs(now)) {
        return Ok(key);
    }
    store(vault, purpose, generate()?, None, event).await
}

/// A new key signs from now on; the others stop, and what they signed counts for `verify_for`
/// more (checkpoints: for ever).
///
/// # Errors
/// As [`Tx::commit`]; [`Error::Conflict`] if two do this at once.
pub async fn roll_over(
    vault: &Vault,
    purpose: Purpose,
    verify_for: Duration,
    event: AuditEvent,
) -> Result<SigningKey, Error> {
    store(vault, purpose, generate()?, Some(verify_for), event).await
}

/// As [`roll_over`], to a key that was made elsewhere: a seed of 32 bytes, or seed and public key.
///
/// # Errors
/// [`Error::Invalid`] if it is neither, or if the public key is not that of the seed;
/// [`Error::Conflict`] if it is stored already.
pub async fn import(
    vault: &Vault,
    purpose: Purpose,
    key: &[u8],
    verify_for: Duration,
    event: AuditEvent,
) -> Result<SigningKey, Error> {
    let wrong = || {
        Error::invalid("signing_key", "must be an Ed25519 seed (32 bytes) or seed and public key")
    };
    let mut secret = Zeroizing::new([0; 64]);
    match key.len() {
        32 => *secret = expand(key).ok_or_else(wrong)?,
        64 => {
            pair(key).ok_or_else(wrong)?;
            secret.copy_from_slice(key);
        }
        _ => return Err(wrong()),
    }
    let known = list(vault, purpose).await?;
    if known.iter().any(|known| secret.ends_with(known.public())) {
        return Err(Error::Conflict);
    }
    store(vault, purpose, secret, Some(verify_for), event).await
}

fn expand(seed: &[u8]) -> Option<[u8; 64]> {
    let pair = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
    let mut secret = [0; 64];
    let (left, right) = secret.split_at_mut(32);
    left.copy_from_slice(seed);
    right.copy_from_slice(pair.public_key().as_ref());
    Some(secret)
}

fn generate() -> Result<Zeroizing<[u8; 64]>, Error> {
    let seed = random::secret::<32>().map_err(|e| Error::internal(e.to_string()))?;
    let secret = expand(seed.as_slice()).map(Zeroizing::new);
    secret.ok_or_else(|| Error::internal("Ed25519 refuses a random seed"))
}

async fn store(
    vault: &Vault,
    purpose: Purpose,
    secret: Zeroizing<[u8; 64]>,
    retire_after: Option<Duration>,
    mut event: AuditEvent,
) -> Result<SigningKey, Error> {
    let now = vault.clock().now();
    let id: [u8; 16] = random::array().map_err(|e| Error::internal(e.to_string()))?;
    let mut tx = vault.begin().await?;
    if let Some(verify_for) = retire_after {
        stop_signing(&mut tx, purpose, verify_for, now).await?;
    }
    let (_, public) = secret.split_at(32);
    let record = SigningKeyRecord {
        id: id.to_vec().into(),
        secret: secret.to_vec().into(),
        public: public.to_vec().into(),
        created_at: now.micros(),
        active_from: now.micros(),
        active_until: 0,
        verify_until: 0,
        purpose: purpose.name().into(),
    };
    tx.insert(&id, &record)?;
    event.details.insert("purpose".into(), purpose.name().into());
    event.details.insert("signing_key".into(), hex(&id));
    tx.event(event);
    tx.commit().await?;
    SigningKey::read(record)
}

async fn stop_signing(
    tx: &mut Tx<'_>,
    purpose: Purpose,
    verify_for: Duration,
    now: Time,
) -> Result<(), Error> {
    let rows = tx.scan::<SigningKeyRecord>(all(), Direction::Forward, MOST).await?;
    for (row, Loaded { mut record, .. }) in rows {
        if record.purpose == purpose.name() && record.active_until == 0 {
            record.active_until = now.micros();
            if purpose == Purpose::Token {
                record.verify_until = now.plus(verify_for).micros();
            }
            tx.put(&row, &record)?;
        }
        forget(record);
    }
    Ok(())
}
