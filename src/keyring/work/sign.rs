//! Signatures and message authentication codes.

use std::collections::BTreeMap;

use polykey_hsm::work::{self, SignatureScheme, WorkingKey};
use polykey_hsm::{Algorithm, PublicKey, Purpose};

use super::super::read::ATTEMPTS;
use super::super::resident::is_resident;
use super::{Keyring, Ready, Use, failed, settled};
use crate::command::crypto::{GenerateMac, Sign, Verify, VerifyMac};
use crate::context::Context;
use crate::error::Error;
use crate::key::KeyId;

/// A signature and what made it.
#[derive(Debug)]
pub struct Signed {
    /// The signature.
    pub signature: Vec<u8>,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
    /// How.
    pub scheme: SignatureScheme,
}

/// A code and what made it.
#[derive(Debug)]
pub struct Coded {
    /// The code.
    pub mac: Vec<u8>,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
}

/// Whether something is valid.
#[derive(Debug)]
pub struct Checked {
    /// Whether it is.
    pub valid: bool,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
}

impl Ready {
    /// The public part of the version.
    pub(super) fn public(&self) -> Result<PublicKey, Error> {
        PublicKey::from_record(self.key.algorithm, &self.version.record.public_key)
            .map_err(|e| Error::data_loss(format!("the public part of key {}: {e}", self.key.id)))
    }

    fn checked(&self, valid: bool) -> Checked {
        Checked { valid, key: self.key.id, version: self.number() }
    }
}

fn scheme(algorithm: Algorithm, asked: Option<SignatureScheme>) -> Result<SignatureScheme, Error> {
    let scheme = asked.or_else(|| SignatureScheme::default_for(algorithm));
    match scheme {
        Some(scheme) if scheme.serves(algorithm) => Ok(scheme),
        _ => {
            let text = format!("does not go with a key of type {algorithm}");
            Err(Error::invalid("scheme", text))
        }
    }
}

impl Keyring {
    /// Signs.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn sign(&self, cx: &Context, command: &Sign) -> Result<Signed, Error> {
        settled!(self, {
            let asked = (&[Purpose::Sign][..], command.version, Use::Seal);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let scheme = scheme(ready.key.algorithm, command.scheme)?;
            self.count_use(&ready.key, ready.number()).await?;
            let input = command.input.clone();
            let bytes = input.len();
            let signature = if is_resident(&ready.key.record) {
                let (key, version) = (&ready.key, &ready.version);
                Box::pin(self.sign_resident(key, version, scheme, &input)).await?
            } else {
                self.work(&ready, bytes, move |key| key.sign(scheme, input.input())).await?
            };
            if self.still(&ready).await? {
                self.used(cx, &ready, &BTreeMap::new()).await?;
                let (key, version) = (ready.key.id, ready.number());
                Some(Signed { signature, key, version, scheme })
            } else {
                None
            }
        })
    }

    /// Verifies a signature, which takes the public part alone.
    ///
    /// # Errors
    /// Whatever forbids it; a signature that is not valid is no error.
    pub async fn verify(&self, cx: &Context, command: &Verify) -> Result<Checked, Error> {
        settled!(self, {
            let asked = (&[Purpose::Sign][..], command.version, Use::Open);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let algorithm = ready.key.algorithm;
            let scheme = scheme(algorithm, command.scheme)?;
            let public = ready.public()?;
            let (input, signature) = (command.input.clone(), command.signature.clone());
            let large = input.len() > super::LARGE;
            let verify =
                move || work::verify(algorithm, scheme, &public, input.input(), &signature);
            let valid = if algorithm.verifies_slowly() || large {
                self.slow.run(Some(&*ready.client), verify).await?
            } else {
                verify()
            };
            let valid = valid.map_err(failed)?;
            if self.still(&ready).await? {
                self.checked(cx, &ready, valid).await?;
                Some(ready.checked(valid))
            } else {
                None
            }
        })
    }

    /// Makes a message authentication code.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn mac(&self, cx: &Context, command: &GenerateMac) -> Result<Coded, Error> {
        settled!(self, {
            let asked = (&[Purpose::Mac][..], command.version, Use::Seal);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            self.count_use(&ready.key, ready.number()).await?;
            let message = command.message.0.clone();
            let mac = self.work(&ready, message.len(), move |key| key.mac(&message)).await?;
            if self.still(&ready).await? {
                self.used(cx, &ready, &BTreeMap::new()).await?;
                Some(Coded { mac, key: ready.key.id, version: ready.number() })
            } else {
                None
            }
        })
    }

    /// Verifies a message authentication code, in constant time.
    ///
    /// # Errors
    /// Whatever forbids it; a code that is not valid is no error.
    pub async fn verify_mac(&self, cx: &Context, command: &VerifyMac) -> Result<Checked, Error> {
        settled!(self, {
            let asked = (&[Purpose::Mac][..], command.version, Use::Open);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let (message, mac) = (command.message.0.clone(), command.mac.clone());
            let check = move |key: &WorkingKey| key.verify_mac(&message, &mac);
            let valid = self.work(&ready, command.message.0.len(), check).await?;
            if self.still(&ready).await? {
                self.checked(cx, &ready, valid).await?;
                Some(ready.checked(valid))
            } else {
                None
            }
        })
    }
}
