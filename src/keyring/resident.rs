//! Keys that live in a token: made there, used there by a call for each use, and destroyed there.

use polykey_hsm::pkcs11::ResidentKey;
use polykey_hsm::work::SignatureScheme;
use polykey_hsm::{
    Generated, KeyMaterial, PublicKey, ResidentMaterial, SlotKind, WrapperId, random,
};
use polykey_proto::polykey::record::v1::{KeyRecord, VersionRecord};
use zeroize::Zeroizing;

use super::create::Made;
use super::work::purpose;
use super::{Key, KeyVersion, Keyring};
use crate::command::CreateKey;
use crate::command::crypto::ToSign;
use crate::custody::Tokens;
use crate::error::Error;
use crate::key::KeyId;

/// The profile as records say it; on the wire it is HARDENED.
pub(super) const RESIDENT: u32 = 3;
/// Random bytes behind the key's id in the id of a version's object: versions are numbered when they
/// are committed, objects made before.
const NONCE: usize = 8;

/// Whether the versions of a key live in a token.
pub(crate) fn is_resident(record: &KeyRecord) -> bool {
    record.storage_profile == RESIDENT
}

/// Tokens are told apart by the ids of their keys, which no two keys share.
pub(super) fn token_id() -> Result<WrapperId, Error> {
    let id = WrapperId::new(SlotKind::Pkcs11.name());
    id.ok_or_else(|| Error::internal("unprintable wrapper id"))
}

impl Keyring {
    /// With these tokens for keys to live in.
    #[must_use]
    pub fn with_tokens(mut self, tokens: Tokens) -> Self {
        self.tokens = tokens;
        self
    }

    /// Whether a new key may live in a token.
    pub(super) fn check_resident(&self, command: &CreateKey) -> Result<(), Error> {
        let fits = ResidentKey::ALGORITHMS.contains(&command.algorithm)
            && command.algorithm.is_asymmetric()
            && command.algorithm.serves(command.purpose);
        if !fits {
            let text = "a token keeps ECDSA P-256 and P-384, and RSA 2048, 3072 and 4096";
            return Err(Error::invalid("in_token", text));
        }
        self.tokens.wanted().map(drop)
    }

    /// A new object in the token, which goes again unless it is kept. Its id stands for the material.
    pub(super) async fn make_resident(
        &self,
        id: KeyId,
        (algorithm, purpose): (polykey_hsm::Algorithm, polykey_hsm::Purpose),
    ) -> Result<Made, Error> {
        let nonce: [u8; NONCE] = random::array().map_err(|e| Error::internal(e.to_string()))?;
        let object = [&id.bytes()[..], &nonce].concat();
        let (made, placed) = Box::pin(self.tokens.make(&object, algorithm, purpose)).await?;
        let material = KeyMaterial::from_secret(object);
        let material = material.map_err(|e| Error::internal(e.to_string()))?;
        Ok(Made::in_token(Generated { material, public: made.public }, placed))
    }

    /// What is stored of a version that lives in a token.
    pub(super) fn resident_material(
        &self,
        key: &Key,
        version: &VersionRecord,
    ) -> Result<ResidentMaterial, Error> {
        let context = self.material_context(key, version.version);
        self.vault.ring().resident_material(&context, &version.material).map_err(|e| {
            Error::data_loss(format!(
                "what is stored of key {} version {}: {e}",
                key.id, version.version
            ))
        })
    }

    fn resident_key(&self, key: &Key, version: &VersionRecord) -> Result<ResidentKey, Error> {
        let public = PublicKey::from_record(key.algorithm, &version.public_key);
        let public =
            public.map_err(|e| Error::data_loss(format!("the public part of key {}: {e}", key.id)));
        Ok(ResidentKey {
            id: self.resident_material(key, version)?.object,
            algorithm: key.algorithm,
            purpose: purpose(&key.record, key.algorithm),
            public: Some(public?),
        })
    }

    pub(super) async fn sign_resident(
        &self,
        key: &Key,
        version: &KeyVersion,
        scheme: SignatureScheme,
        input: &ToSign,
    ) -> Result<Vec<u8>, Error> {
        let resident = self.resident_key(key, &version.record)?;
        self.tokens.sign(&resident, scheme, input.input()).await
    }

    pub(super) async fn decrypt_resident(
        &self,
        key: &Key,
        version: &KeyVersion,
        ciphertext: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        let resident = self.resident_key(key, &version.record)?;
        self.tokens.decrypt(&resident, ciphertext).await
    }

    /// Destroys the object of a version.
    pub(super) async fn destroy_resident(
        &self,
        key: &Key,
        version: &VersionRecord,
    ) -> Result<(), Error> {
        let resident = self.resident_key(key, version)?;
        self.tokens.destroy(&resident).await
    }
}
