//! The stored ML-DSA-65 key (FIPS 204) with which checkpoints of the audit log are signed a second time.

use aws_lc_rs::signature::{KeyPair, ML_DSA_65_SIGNING, PqdsaKeyPair};
use polykey_hsm::random;
use polykey_proto::polykey::record::v1::{AuditEvent, SigningKeyRecord};
use polykey_storage::{Direction, all};
use zeroize::Zeroizing;

use super::{MOST, forget};
use crate::custody::slots::hex;
use crate::error::Error;
use crate::vault::Vault;

/// The purpose in the record. Its secret is the seed of 32 bytes, its public key has 1,952.
const PURPOSE: &str = "checkpoint-ml-dsa-65";

/// A key that signs checkpoints for those who do not trust elliptic curves for ever.
pub struct MlDsaSigner {
    pair: PqdsaKeyPair,
    public: Vec<u8>,
}

impl MlDsaSigner {
    fn of_seed(seed: &[u8]) -> Option<Self> {
        let pair = PqdsaKeyPair::from_seed(&ML_DSA_65_SIGNING, seed).ok()?;
        let public = pair.public_key().as_ref().to_vec();
        Some(Self { pair, public })
    }

    /// The public key, 1,952 bytes.
    #[must_use]
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// Signs a message, with an empty context; 3,309 bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] if the library refuses.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let mut signature = vec![0; ML_DSA_65_SIGNING.signature_len()];
        let length = self
            .pair
            .sign(message, &mut signature)
            .map_err(|_| Error::internal("the library refuses to sign with ML-DSA"))?;
        signature.truncate(length);
        Ok(signature)
    }
}

impl std::fmt::Debug for MlDsaSigner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MlDsaSigner").finish_non_exhaustive()
    }
}

/// The key; made, with `event`, if there is none.
///
/// # Errors
/// [`Error::DataLoss`] if the stored one is broken; as [`crate::vault::Tx::commit`].
pub async fn ensure(vault: &Vault, event: AuditEvent) -> Result<MlDsaSigner, Error> {
    match found_or_made(vault, event.clone()).await {
        // Another node was faster: its key is there.
        Err(Error::Conflict) => found_or_made(vault, event).await,
        done => done,
    }
}

async fn found_or_made(vault: &Vault, mut event: AuditEvent) -> Result<MlDsaSigner, Error> {
    let rows = vault.scan::<SigningKeyRecord>(all(), Direction::Forward, MOST).await?;
    let mut found = None;
    for (_, loaded) in rows {
        let record = loaded.record;
        if record.purpose == PURPOSE && found.is_none() {
            let signer = MlDsaSigner::of_seed(&record.secret);
            found = Some(signer.filter(|signer| signer.public == record.public.as_ref()));
        }
        forget(record);
    }
    if let Some(signer) = found {
        return signer.ok_or_else(|| Error::data_loss("the record of the ML-DSA key is malformed"));
    }
    let seed = random::secret::<32>().map_err(|e| Error::internal(e.to_string()))?;
    let seed = Zeroizing::new(seed.as_slice().to_vec());
    let signer = MlDsaSigner::of_seed(&seed);
    let signer = signer.ok_or_else(|| Error::internal("ML-DSA refuses a random seed"))?;
    // One row for all nodes, so that two that start together do not make a key each.
    let row = vault.row_name("signing-key", PURPOSE);
    let id: [u8; 16] = std::array::from_fn(|at| row.get(at).copied().unwrap_or_default());
    let now = vault.clock().now();
    let record = SigningKeyRecord {
        id: id.to_vec().into(),
        secret: seed.to_vec().into(),
        public: signer.public.clone().into(),
        created_at: now.micros(),
        active_from: now.micros(),
        purpose: PURPOSE.into(),
        ..SigningKeyRecord::default()
    };
    event.details.insert("purpose".into(), PURPOSE.into());
    event.details.insert("signing_key".into(), hex(&id));
    let mut tx = vault.begin().await?;
    tx.insert(&id, &record)?;
    tx.event(event);
    tx.commit().await?;
    forget(record);
    Ok(signer)
}
