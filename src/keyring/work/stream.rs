//! Large data: sealed and opened chunk by chunk, under one decision that is looked at again for each
//! piece.

use polykey_hsm::Purpose;
use polykey_hsm::work::{self, StreamOpener, StreamSealer};
use zeroize::Zeroizing;

use super::cipher::Owned;
use super::{Keyring, Ready, Use, failed};
use crate::command::crypto::{DecryptStream, EncryptStream};
use crate::context::Context;
use crate::error::Error;
use crate::key::{KeyId, KeyName};

/// Plaintext on its way into a ciphertext.
pub struct Sealing {
    ready: Ready,
    command: EncryptStream,
    sealer: StreamSealer,
}

/// Ciphertext on its way back to the plaintext.
pub struct Opening {
    ready: Ready,
    command: DecryptStream,
    opener: Option<StreamOpener>,
}

impl Sealing {
    /// The key and the version that it is sealed under.
    #[must_use]
    pub fn under(&self) -> (KeyId, u32) {
        (self.ready.key.id, self.ready.number())
    }

    /// The ciphertext of the next piece of plaintext; chunks are held back until they are full.
    ///
    /// # Errors
    /// [`Error::Invalid`] beyond 2^32 chunks.
    pub fn push(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, Error> {
        self.sealer.push(plaintext).map_err(failed)
    }

    /// The end of the ciphertext.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(self) -> Result<Vec<u8>, Error> {
        self.sealer.finish(&[]).map_err(failed)
    }
}

impl Opening {
    /// The key and the version that it is sealed under.
    #[must_use]
    pub fn under(&self) -> (KeyId, u32) {
        (self.ready.key.id, self.ready.number())
    }

    /// The authentic plaintext of the next piece of ciphertext; the last chunk so far is held back.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it does not open.
    pub fn push(&mut self, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        match &mut self.opener {
            Some(opener) => opener.push(ciphertext).map_err(failed),
            None => Err(Error::internal("a stream that goes on after its end")),
        }
    }

    /// The end of the plaintext.
    ///
    /// # Errors
    /// [`Error::Crypto`] if the ciphertext is not whole.
    pub fn finish(&mut self) -> Result<Zeroizing<Vec<u8>>, Error> {
        match self.opener.take() {
            Some(opener) => opener.finish(&[]).map_err(failed),
            None => Err(Error::internal("a stream that was finished twice")),
        }
    }
}

impl Keyring {
    /// Begins to encrypt large data: the header of the ciphertext, and what takes the plaintext.
    ///
    /// # Errors
    /// Whatever forbids it.
    pub async fn encrypt_stream(
        &self,
        cx: &Context,
        command: &EncryptStream,
    ) -> Result<(Vec<u8>, Sealing), Error> {
        let asked = (&[Purpose::Encrypt][..], command.version, Use::Seal);
        let ready = self.ready(cx, &command.key, asked, command).await?;
        if ready.key.algorithm.is_asymmetric() {
            return Err(Error::invalid("key_id", "an RSA key encrypts no large data"));
        }
        if ready.key.record.convergent {
            let text =
                "a convergent key encrypts no large data: its ciphertexts are not repeatable";
            return Err(Error::invalid("key_id", text));
        }
        self.count_use(&ready.key, ready.number()).await?;
        let owned = Owned::of(&ready, &command.bound);
        let chunk = command.chunk;
        let begun =
            self.work(&ready, 0, move |key| key.seal_stream(&owned.binding(), chunk)).await?;
        let (header, sealer) = begun;
        self.used(cx, &ready, &command.bound.context).await?;
        Ok((header, Sealing { ready, command: command.clone(), sealer }))
    }

    /// Begins to decrypt large data.
    ///
    /// # Errors
    /// [`Error::Crypto`] if the header is not of this key; whatever forbids it.
    pub async fn decrypt_stream(
        &self,
        cx: &Context,
        command: &DecryptStream,
    ) -> Result<Opening, Error> {
        let malformed = || Error::invalid("ciphertext", "is not a large Polykey ciphertext");
        let header = work::header(&command.header).map_err(|_| malformed())?;
        if header.kind != work::CiphertextKind::Stream || header.version == 0 {
            return Err(malformed());
        }
        let id = KeyId::from_slice(&header.key_id).ok_or_else(malformed)?;
        let name = command.key.clone().unwrap_or(KeyName::Id(id));
        let asked = (&[Purpose::Encrypt][..], header.version, Use::Open);
        let ready = self.ready(cx, &name, asked, command).await?;
        // Compared once the named key may be seen.
        if ready.key.id != id {
            return self.unopened(cx, &ready, Err(Error::Crypto)).await;
        }
        let owned = Owned::of(&ready, &command.bound);
        let bytes = command.header.clone();
        let opener =
            self.work(&ready, 0, move |key| key.open_stream(&owned.binding(), &bytes)).await;
        let opener = Some(self.unopened(cx, &ready, opener).await?);
        self.used(cx, &ready, &command.bound.context).await?;
        Ok(Opening { ready, command: command.clone(), opener })
    }

    /// Whether large data may go on being sealed: the key and version as they are now.
    ///
    /// # Errors
    /// The reason why not.
    pub async fn may_go_on_sealing(&self, cx: &Context, sealing: &Sealing) -> Result<(), Error> {
        self.may_go_on(cx, &sealing.ready, Use::Seal, &sealing.command).await
    }

    /// Whether large data may go on being opened.
    ///
    /// # Errors
    /// The reason why not.
    pub async fn may_go_on_opening(&self, cx: &Context, opening: &Opening) -> Result<(), Error> {
        self.may_go_on(cx, &opening.ready, Use::Open, &opening.command).await
    }

    /// Records that a piece of large data did not open, and passes the failure on.
    ///
    /// # Errors
    /// The failure, or that of the trail.
    pub async fn piece_opened<T>(
        &self,
        cx: &Context,
        opening: &Opening,
        result: Result<T, Error>,
    ) -> Result<T, Error> {
        self.unopened(cx, &opening.ready, result).await
    }
}
