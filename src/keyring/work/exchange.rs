//! Secrets that two sides come to share, wrapped keys and public keys.

use std::collections::BTreeMap;
use std::sync::Arc;

use polykey_hsm::algorithm::PublicKeyError;
use polykey_hsm::work::{self, SignatureScheme, canonical_context};
use polykey_hsm::{Algorithm, KeyMaterial, PublicKey, Purpose};
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use zeroize::Zeroizing;

use super::super::read::ATTEMPTS;
use super::{Key, KeyVersion, Keyring, Ready, Use, failed, purpose, settled};
use crate::authz::Action;
use crate::command::crypto::{
    Agree, Decapsulate, Derivation, DeriveKey, Encapsulate, GetPublicKey, PublicForm, ToWrap,
    UnwrapKey, WrapKey, part,
};
use crate::command::{GetKey, part::ExportKey};
use crate::context::Context;
use crate::error::{Error, Reason};
use crate::key::{self, KeyId};

/// A secret that leaves, and what it came from.
pub struct Shared {
    /// The secret.
    pub secret: Zeroizing<Vec<u8>>,
    /// What the other side needs to get it; empty where nothing.
    pub ciphertext: Vec<u8>,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
    /// The audit leaf.
    pub leaf: u64,
}

/// Wrapped material, and what it is under.
#[derive(Debug)]
pub struct Wrapped {
    /// The material.
    pub bytes: Vec<u8>,
    /// The wrapping key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
    /// How.
    pub algorithm: &'static str,
    /// The audit leaf, where a key of the node was wrapped.
    pub leaf: Option<u64>,
}

/// A public key, and whose it is.
#[derive(Debug)]
pub struct PublicPart {
    /// The public key in the form asked for.
    pub bytes: Vec<u8>,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
    /// What the key is.
    pub algorithm: Algorithm,
    /// What it is for.
    pub purpose: Purpose,
    /// How it signs.
    pub schemes: Vec<SignatureScheme>,
}

impl Keyring {
    async fn shared(
        &self,
        cx: &Context,
        ready: &Ready,
        context: &BTreeMap<String, String>,
        (secret, ciphertext): (Zeroizing<Vec<u8>>, Vec<u8>),
    ) -> Result<Option<Shared>, Error> {
        if !self.still(ready).await? {
            return Ok(None);
        }
        let leaf = self.released(cx, ready, context).await?;
        let (key, version) = (ready.key.id, ready.number());
        Ok(Some(Shared { secret, ciphertext, key, version, leaf }))
    }

    /// Derives a key.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn derive(&self, cx: &Context, command: &DeriveKey) -> Result<Shared, Error> {
        settled!(self, {
            let asked = (&[Purpose::Derive][..], command.version, Use::Open);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let info = canonical_context(&command.context);
            let (salt, length) = (command.salt.clone(), command.length);
            let secret = self.work(&ready, 0, move |key| key.derive(&salt, &info, length)).await?;
            self.shared(cx, &ready, &command.context, (secret, Vec::new())).await?
        })
    }

    /// Agrees on a shared secret.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the other side's key is none of the same kind; whatever forbids it.
    pub async fn agree(&self, cx: &Context, command: &Agree) -> Result<Shared, Error> {
        settled!(self, {
            let asked = (&[Purpose::Agree][..], command.version, Use::Open);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let algorithm = ready.key.algorithm;
            let peer = public_key(algorithm, "peer_public_key", &command.peer)?;
            let derivation = command.derivation.clone();
            let agreed = self.work(&ready, 0, move |key| {
                let secret = key.agree(&peer.spki_der)?;
                match derivation {
                    Derivation::None => Ok(secret),
                    Derivation::Hkdf { salt, info, length } => {
                        work::hkdf_sha256(&secret, &salt, &info, length)
                    }
                }
            });
            self.shared(cx, &ready, &BTreeMap::new(), (agreed.await?, Vec::new())).await?
        })
    }

    /// Makes a shared secret for a key, which takes its public part alone.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn encapsulate(&self, cx: &Context, command: &Encapsulate) -> Result<Shared, Error> {
        settled!(self, {
            let asked = (&[Purpose::Encapsulate][..], command.version, Use::Seal);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let public = ready.public()?;
            let made = work::encapsulate(ready.key.algorithm, &public).map_err(failed)?;
            let (ciphertext, secret) = made;
            self.shared(cx, &ready, &BTreeMap::new(), (secret, ciphertext)).await?
        })
    }

    /// Gets the shared secret from a ciphertext.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn decapsulate(&self, cx: &Context, command: &Decapsulate) -> Result<Shared, Error> {
        settled!(self, {
            let asked = (&[Purpose::Encapsulate][..], command.version, Use::Open);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let ciphertext = command.ciphertext.clone();
            let secret = self.work(&ready, 0, move |key| key.decapsulate(&ciphertext)).await;
            let secret = self.unopened(cx, &ready, secret).await?;
            self.shared(cx, &ready, &BTreeMap::new(), (secret, Vec::new())).await?
        })
    }

    /// The material of an exportable key that is to be wrapped, with the right to export it.
    async fn to_wrap(
        &self,
        cx: &Context,
        command: &GetKey,
    ) -> Result<(KeyMaterial, (Arc<Key>, Arc<KeyVersion>, String)), Error> {
        let key = self.find(cx, Action::ExportKey, &command.key).await?;
        let permit = self.authorize(cx, key.resource(), ExportKey(command)).await?;
        key::may_open(&key.record, cx.now).map_err(Error::State)?;
        let version = key::pick_version(&key.record, command.version).map_err(Error::State)?;
        let version = self.load_version(&key, version).await?;
        key::version_opens(&key.record, &version.record, cx.now).map_err(Error::State)?;
        if !key.record.exportable {
            return Err(Error::State(Reason::NotExportable));
        }
        let material = self.material(cx.caller.client_id(), &key, &version).await?;
        Ok((material, (key, version, permit.decision_id().to_string())))
    }

    /// Wraps key material.
    ///
    /// # Errors
    /// Whatever forbids it; that of a key which was created not to be exported.
    pub async fn wrap(&self, cx: &Context, command: &WrapKey) -> Result<Wrapped, Error> {
        settled!(self, {
            let asked = (&[Purpose::Wrap][..], command.version, Use::Seal);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let (material, target) = match &command.target {
                ToWrap::Material(bytes) => {
                    let material = KeyMaterial::from_secret(bytes.0.to_vec())
                        .map_err(|e| Error::invalid("key_material", e.to_string()))?;
                    (material, None)
                }
                ToWrap::Key(get) => {
                    let (material, target) = self.to_wrap(cx, get).await?;
                    (material, Some(target))
                }
            };
            self.count_use(&ready.key, ready.number()).await?;
            let rsa = ready.key.algorithm.is_asymmetric();
            let bytes = if rsa {
                let public = ready.public()?;
                work::wrap_to(ready.key.algorithm, &public, &material).map_err(failed)?
            } else {
                self.work(&ready, 0, move |key| key.wrap(&material)).await?
            };
            let holds = match &target {
                Some((key, version, _)) => {
                    self.still(&ready).await?
                        && (self.epoch() == ready.epoch || self.unchanged(key, version).await?)
                }
                None => self.still(&ready).await?,
            };
            if holds {
                self.used(cx, &ready, &BTreeMap::new()).await?;
                // That its material leaves stands with the key that it is of.
                let leaf = match target {
                    Some((key, version, decision)) => {
                        let about = Some((key.id, Some(version.record.version)));
                        let name = Action::ExportKey.name();
                        let event = cx.origin().event(name, about, Outcome::Success, 0, &decision);
                        let event = event.detail("export", "wrapped");
                        let by = format!("{} version {}", ready.key.id, ready.number());
                        Some(self.trail.record(event.detail("wrapping_key", by)).await?)
                    }
                    None => None,
                };
                let algorithm = if rsa { "RSA-OAEP-SHA256" } else { "AES-KWP" };
                let (key, version) = (ready.key.id, ready.number());
                Some(Wrapped { bytes, key, version, algorithm, leaf })
            } else {
                None
            }
        })
    }

    /// Unwraps key material.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it does not open; whatever forbids it.
    pub async fn unwrap(&self, cx: &Context, command: &UnwrapKey) -> Result<Shared, Error> {
        settled!(self, {
            let asked = (&[Purpose::Wrap][..], command.version, Use::Open);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let wrapped = command.wrapped.clone();
            let material = self.work(&ready, 0, move |key| key.unwrap(&wrapped)).await;
            let material = self.unopened(cx, &ready, material).await?;
            let secret = material.expose_for_export();
            self.shared(cx, &ready, &BTreeMap::new(), (secret, Vec::new())).await?
        })
    }

    /// The public part of a key, whatever the key's state.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the key has none; whatever forbids it.
    pub async fn public(&self, cx: &Context, command: &GetPublicKey) -> Result<PublicPart, Error> {
        let key = self.find(cx, Action::GetKeyMetadata, &command.key).await?;
        let permit = self.authorize(cx, key.resource(), part::PublicKey(command)).await?;
        let algorithm = key.algorithm;
        if !algorithm.is_asymmetric() {
            let text = format!("is a key of type {algorithm}, which has no public part");
            return Err(Error::invalid("key_id", text));
        }
        let version = key::pick_version(&key.record, command.version).map_err(Error::State)?;
        let version = self.load_version(&key, version).await?;
        let public = PublicKey::from_record(algorithm, &version.record.public_key)
            .map_err(|e| Error::data_loss(format!("the public part of key {}: {e}", key.id)))?;
        let form = |e: PublicKeyError| Error::invalid("format", e.to_string());
        let bytes = match command.form {
            PublicForm::Der => public.spki_der,
            PublicForm::Pem => public.to_pem().map_err(form)?.into_bytes(),
            PublicForm::Jwk => public.to_jwk().map_err(form)?.to_string().into_bytes(),
        };
        let number = version.record.version;
        let about = Some((key.id, Some(number)));
        let decision = permit.decision_id().to_string();
        let name = Action::GetKeyMetadata.name();
        self.trail.used(cx.origin().event(name, about, Outcome::Success, 0, &decision)).await?;
        let purpose = purpose(&key.record, algorithm);
        let schemes = match purpose {
            Purpose::Sign => {
                SignatureScheme::ALL.iter().copied().filter(|s| s.serves(algorithm)).collect()
            }
            _ => Vec::new(),
        };
        Ok(PublicPart { bytes, key: key.id, version: number, algorithm, purpose, schemes })
    }
}

/// A public key of this algorithm in any of its forms.
fn public_key(algorithm: Algorithm, field: &str, bytes: &[u8]) -> Result<PublicKey, Error> {
    let text = std::str::from_utf8(bytes).ok().map(str::trim);
    let parsed = match text {
        Some(text) if text.starts_with("-----") => PublicKey::from_pem(algorithm, text),
        Some(text) if text.starts_with('{') => PublicKey::from_jwk(algorithm, text),
        _ => PublicKey::from_spki(algorithm, bytes),
    };
    parsed.map_err(|_| {
        let text = format!("must be the public key of a key of type {algorithm}: DER, PEM or JWK");
        Error::invalid(field, text)
    })
}
