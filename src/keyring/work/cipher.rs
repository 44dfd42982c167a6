//! Encrypting and decrypting: messages, their rewrapping, and data keys.

use polykey_hsm::work::{self, Binding, WorkError, WorkingKey, canonical_context};
use polykey_hsm::{Algorithm, GenerationParams, Purpose, algorithm, random};
use zeroize::Zeroizing;

use super::super::read::ATTEMPTS;
use super::super::resident::is_resident;
use super::{Keyring, Ready, Use, failed, settled};
use crate::authz::Command;
use crate::command::crypto::{
    Bound, DataKey, Decrypt, Encrypt, Form, GenerateDataKey, Rewrap, Sealed, part,
};
use crate::context::Context;
use crate::error::Error;
use crate::key::{KeyId, KeyName};

const ENCRYPT: &[Purpose] = &[Purpose::Encrypt];

/// A ciphertext and what it is under.
#[derive(Debug)]
pub struct Encrypted {
    /// The ciphertext in the form asked for.
    pub ciphertext: Vec<u8>,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
    /// What the key is.
    pub algorithm: Algorithm,
}

/// A plaintext and what it was under.
pub struct Decrypted {
    /// The plaintext.
    pub plaintext: Zeroizing<Vec<u8>>,
    /// The key.
    pub key: KeyId,
    /// Its version.
    pub version: u32,
    /// What the key is.
    pub algorithm: Algorithm,
}

/// A ciphertext, what it is under and what it was under.
#[derive(Debug)]
pub struct Rewrapped {
    /// The new ciphertext.
    pub now: Encrypted,
    /// The key it was under.
    pub key: KeyId,
    /// The version it was under.
    pub version: u32,
}

/// A data key.
pub struct DataKeyMade {
    /// The key itself, if it was asked for.
    pub plaintext: Option<Zeroizing<Vec<u8>>>,
    /// The key, encrypted.
    pub sealed: Encrypted,
    /// The public part of a pair.
    pub public: Vec<u8>,
    /// The audit leaf, where the plaintext leaves.
    pub leaf: Option<u64>,
}

/// The binding of a message, with its bytes.
pub(super) struct Owned {
    key_id: [u8; 16],
    version: u32,
    context: Vec<u8>,
    aad: bytes::Bytes,
}

impl Owned {
    pub(super) fn of(ready: &Ready, bound: &Bound) -> Self {
        Self {
            key_id: ready.key.id.bytes(),
            version: ready.number(),
            context: canonical_context(&bound.context),
            aad: bound.aad.0.clone(),
        }
    }

    pub(super) fn binding(&self) -> Binding<'_> {
        let Self { key_id, version, context, aad } = self;
        Binding { key_id: *key_id, version: *version, context, aad }
    }
}

/// What cannot be bound or written so, by the algorithm.
fn check(ready: &Ready, bound: &Bound, form: Form) -> Result<(), Error> {
    let rsa = ready.key.algorithm.is_asymmetric();
    if rsa && !bound.context.is_empty() {
        return Err(Error::invalid("context", "an RSA key binds no context"));
    }
    if rsa && !bound.aad.0.is_empty() {
        return Err(Error::invalid("additional_data", "an RSA key binds no additional data"));
    }
    if is_resident(&ready.key.record) && form != Form::Raw {
        return Err(Error::invalid("format", "a key in a token takes RAW ciphertexts"));
    }
    if !rsa && form == Form::Raw {
        let text = "RAW is for RSA keys: other ciphertexts name their key and version";
        return Err(Error::invalid("format", text));
    }
    Ok(())
}

fn seal(
    key: &WorkingKey,
    owned: &Owned,
    (convergent, form): (bool, Form),
    plaintext: &[u8],
) -> Result<Vec<u8>, WorkError> {
    let binding = owned.binding();
    let blob = if convergent {
        key.seal_convergent(&binding, plaintext)?
    } else {
        key.seal(&binding, plaintext)?
    };
    Ok(if form == Form::Text { work::to_text(&blob).into_bytes() } else { blob })
}

/// A ciphertext as bytes, whichever of its two forms it came in.
fn blob(field: &str, ciphertext: &bytes::Bytes) -> Result<bytes::Bytes, Error> {
    let malformed = || Error::invalid(field, "is not a Polykey ciphertext");
    if !work::is_text(ciphertext) {
        return Ok(ciphertext.clone());
    }
    let text = std::str::from_utf8(ciphertext).map_err(|_| malformed())?;
    work::from_text(text).map(Into::into).map_err(|_| malformed())
}

/// The key and version that a message names.
fn named(field: &str, blob: &[u8]) -> Result<(KeyId, u32), Error> {
    let malformed = || Error::invalid(field, "is not a Polykey ciphertext");
    let header = work::header(blob).map_err(|_| malformed())?;
    if header.kind != work::CiphertextKind::Message {
        return Err(Error::invalid(field, "is a large ciphertext: DecryptStream opens it"));
    }
    let id = KeyId::from_slice(&header.key_id).ok_or_else(malformed)?;
    if header.version == 0 {
        return Err(malformed());
    }
    Ok((id, header.version))
}

fn encrypted(ready: &Ready, ciphertext: Vec<u8>) -> Encrypted {
    let (key, version) = (ready.key.id, ready.number());
    Encrypted { ciphertext, key, version, algorithm: ready.key.algorithm }
}

impl Keyring {
    async fn sealed(
        &self,
        ready: &Ready,
        bound: &Bound,
        form: Form,
        plaintext: impl AsRef<[u8]> + Send + 'static,
    ) -> Result<Vec<u8>, Error> {
        check(ready, bound, form)?;
        self.count_use(&ready.key, ready.number()).await?;
        let owned = Owned::of(ready, bound);
        let how = (ready.key.record.convergent, form);
        if ready.key.algorithm.is_asymmetric() {
            // To encrypt takes the public part alone.
            let public = ready.public()?;
            let (algorithm, binding) = (ready.key.algorithm, owned.binding());
            let sealed = match form {
                Form::Raw => work::encrypt_to(algorithm, &public, plaintext.as_ref()),
                Form::Blob | Form::Text => {
                    work::seal_to(algorithm, &public, &binding, plaintext.as_ref())
                }
            };
            let sealed = sealed.map_err(failed)?;
            return Ok(match form {
                Form::Text => work::to_text(&sealed).into_bytes(),
                Form::Blob | Form::Raw => sealed,
            });
        }
        let bytes = plaintext.as_ref().len();
        self.work(ready, bytes, move |key| seal(key, &owned, how, plaintext.as_ref())).await
    }

    /// Encrypts.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn encrypt(&self, cx: &Context, command: &Encrypt) -> Result<Encrypted, Error> {
        settled!(self, {
            let asked = (ENCRYPT, command.version, Use::Seal);
            let ready = self.ready(cx, &command.key, asked, command).await?;
            let plaintext = command.plaintext.0.clone();
            let sealed = self.sealed(&ready, &command.bound, command.form, plaintext).await?;
            if self.still(&ready).await? {
                self.used(cx, &ready, &command.bound.context).await?;
                Some(encrypted(&ready, sealed))
            } else {
                None
            }
        })
    }

    /// The version that a ciphertext is under, and its bytes; ready to be opened.
    async fn to_open<C: Command>(
        &self,
        cx: &Context,
        key: Option<&KeyName>,
        ciphertext: &Sealed,
        command: C,
    ) -> Result<(Ready, bytes::Bytes), Error> {
        match ciphertext {
            Sealed::Raw(bytes, version) => {
                let key = key.ok_or_else(|| {
                    Error::invalid("key_id", "must be set: a RAW ciphertext names no key")
                })?;
                let ready = self.ready(cx, key, (ENCRYPT, *version, Use::Open), command).await?;
                check(&ready, &Bound::default(), Form::Raw)?;
                Ok((ready, bytes.clone()))
            }
            Sealed::Blob(bytes) => {
                let bytes = blob("ciphertext", bytes)?;
                let (id, version) = named("ciphertext", &bytes)?;
                let name = key.cloned().unwrap_or(KeyName::Id(id));
                // The version is of the key that the ciphertext names: of another it says nothing.
                let other = !matches!(self.resolve(&name).await, Ok(named) if named == id);
                let asked = (ENCRYPT, if other { 0 } else { version }, Use::Open);
                let ready = self.ready(cx, &name, asked, command).await?;
                if other {
                    self.unopened::<()>(cx, &ready, Err(Error::Crypto)).await?;
                }
                Ok((ready, bytes))
            }
        }
    }

    async fn opened(
        &self,
        cx: &Context,
        ready: &Ready,
        bound: &Bound,
        ciphertext: bytes::Bytes,
        raw: bool,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        let (owned, bytes) = (Owned::of(ready, bound), ciphertext.len());
        let resident = ciphertext.clone();
        if is_resident(&ready.key.record) && !raw {
            return Err(Error::invalid("format", "a key in a token takes RAW ciphertexts"));
        }
        let open = move |key: &WorkingKey| {
            if raw { key.open_raw(&ciphertext) } else { key.open(&owned.binding(), &ciphertext) }
        };
        let opened = if is_resident(&ready.key.record) {
            let (key, version) = (&ready.key, &ready.version);
            Box::pin(self.decrypt_resident(key, version, &resident)).await
        } else {
            self.work(ready, bytes, open).await
        };
        self.unopened(cx, ready, opened).await
    }

    /// Decrypts.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it does not open, for whatever reason; whatever forbids it.
    pub async fn decrypt(&self, cx: &Context, command: &Decrypt) -> Result<Decrypted, Error> {
        let raw = matches!(command.ciphertext, Sealed::Raw(..));
        settled!(self, {
            let key = command.key.as_ref();
            let (ready, bytes) = self.to_open(cx, key, &command.ciphertext, command).await?;
            check(&ready, &command.bound, if raw { Form::Raw } else { Form::Blob })?;
            let plaintext = self.opened(cx, &ready, &command.bound, bytes, raw).await?;
            if self.still(&ready).await? {
                self.used(cx, &ready, &command.bound.context).await?;
                let (key, version) = (ready.key.id, ready.number());
                Some(Decrypted { plaintext, key, version, algorithm: ready.key.algorithm })
            } else {
                None
            }
        })
    }

    /// Encrypts a ciphertext anew; the plaintext is shown to nobody.
    ///
    /// # Errors
    /// As [`Self::decrypt`] and [`Self::encrypt`].
    pub async fn rewrap(&self, cx: &Context, command: &Rewrap) -> Result<Rewrapped, Error> {
        let sealed = Sealed::Blob(command.ciphertext.clone());
        settled!(self, {
            let (from, bytes) = self.to_open(cx, None, &sealed, command).await?;
            let own = KeyName::Id(from.key.id);
            let name = command.to.as_ref().unwrap_or(&own);
            let asked = (ENCRYPT, command.to_version, Use::Seal);
            // On its own key the right to rewrap is enough.
            let to = match &command.to {
                None => self.ready(cx, name, asked, command).await?,
                Some(_) => self.ready(cx, name, asked, part::EncryptRewrapped(command)).await?,
            };
            check(&from, &command.bound, Form::Blob)?;
            let plaintext = self.opened(cx, &from, &command.bound, bytes, false).await?;
            let bound = command.to_bound.as_ref().unwrap_or(&command.bound);
            let sealed = self.sealed(&to, bound, command.form, plaintext).await?;
            if self.still(&from).await? && self.still(&to).await? {
                self.used(cx, &from, &command.bound.context).await?;
                if command.to.is_some() {
                    self.used(cx, &to, &bound.context).await?;
                }
                let (key, version) = (from.key.id, from.number());
                Some(Rewrapped { now: encrypted(&to, sealed), key, version })
            } else {
                None
            }
        })
    }

    async fn data_key(
        &self,
        client: &str,
        what: DataKey,
    ) -> Result<(Zeroizing<Vec<u8>>, Vec<u8>), Error> {
        match what {
            DataKey::Symmetric(length) => {
                let mut bytes = Zeroizing::new(vec![0; length]);
                random::fill(&mut bytes).map_err(|e| Error::internal(e.to_string()))?;
                Ok((bytes, Vec::new()))
            }
            DataKey::Pair(algorithm) => {
                let params = GenerationParams::default();
                let made: algorithm::Generated =
                    self.forge.make(Some(client), algorithm, params).await?;
                let public = made.public.map(|p| p.spki_der).unwrap_or_default();
                Ok((made.material.expose_for_export(), public))
            }
        }
    }

    /// Makes a data key and encrypts it, showing it only if `shown`.
    ///
    /// # Errors
    /// As [`Self::encrypt`].
    pub async fn generate_data_key(
        &self,
        cx: &Context,
        command: &GenerateDataKey,
        shown: bool,
    ) -> Result<DataKeyMade, Error> {
        settled!(self, {
            let asked = (ENCRYPT, command.version, Use::Seal);
            let ready = if shown {
                self.ready(cx, &command.key, asked, command).await?
            } else {
                self.ready(cx, &command.key, asked, part::WrappedDataKey(command)).await?
            };
            check(&ready, &command.bound, command.form)?;
            let (plaintext, public) = self.data_key(cx.caller.client_id(), command.what).await?;
            let copy = plaintext.clone();
            let sealed = self.sealed(&ready, &command.bound, command.form, copy).await?;
            if self.still(&ready).await? {
                let leaf = if shown {
                    Some(self.released(cx, &ready, &command.bound.context).await?)
                } else {
                    self.used(cx, &ready, &command.bound.context).await?;
                    None
                };
                let plaintext = shown.then_some(plaintext);
                Some(DataKeyMade { plaintext, sealed: encrypted(&ready, sealed), public, leaf })
            } else {
                None
            }
        })
    }
}
