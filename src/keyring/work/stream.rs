//! Large data: sealed and opened chunk by chunk, under one decision that is looked at again for each
//! piece.

use polykey_hsm::Purpose;
use polykey_hsm::work::{self, StreamOpener, StreamSealer, WorkError};
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
    sealer: Option<StreamSealer>,
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
}

impl Opening {
    /// The key and the version that it is sealed under.
    #[must_use]
    pub fn under(&self) -> (KeyId, u32) {
        (self.ready.key.id, self.ready.number())
    }
}

/// Pushes a piece, or ends the stream where there is none.
fn step<S, T>(
    stream: &mut Option<S>,
    piece: Option<&[u8]>,
    push: impl FnOnce(&mut S, &[u8]) -> Result<T, WorkError>,
    finish: impl FnOnce(S, &[u8]) -> Result<T, WorkError>,
) -> Result<T, Error> {
    let done = match piece {
        Some(piece) => stream.as_mut().map(|stream| push(stream, piece)),
        None => stream.take().map(|stream| finish(stream, &[])),
    };
    done.ok_or_else(|| Error::internal("a stream that goes on after its end"))?.map_err(failed)
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
        Ok((header, Sealing { ready, command: command.clone(), sealer: Some(sealer) }))
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

    /// The ciphertext of the next piece of plaintext, or with none the end, if the caller, the key and
    /// the version still may. Chunks are held back until they are full.
    ///
    /// # Errors
    /// Why they may not; [`Error::Invalid`] beyond 2^32 chunks.
    pub async fn seal_piece(
        &self,
        cx: &Context,
        sealing: &mut Sealing,
        piece: Option<&[u8]>,
    ) -> Result<Vec<u8>, Error> {
        self.may_go_on(cx, &sealing.ready, Use::Seal, &sealing.command).await?;
        step(&mut sealing.sealer, piece, StreamSealer::push, StreamSealer::finish)
    }

    /// The authentic plaintext of the next piece of ciphertext, or with none the end, likewise. The last
    /// chunk so far is held back.
    ///
    /// # Errors
    /// Why they may not; [`Error::Crypto`] if it does not open or is not whole, which is recorded.
    pub async fn open_piece(
        &self,
        cx: &Context,
        opening: &mut Opening,
        piece: Option<&[u8]>,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        self.may_go_on(cx, &opening.ready, Use::Open, &opening.command).await?;
        let opened = step(&mut opening.opener, piece, StreamOpener::push, StreamOpener::finish);
        self.unopened(cx, &opening.ready, opened).await
    }
}
