//! Message blobs: one plaintext, sealed whole.

use zeroize::Zeroizing;

use super::aead::{ChunkNonce, TAG_LEN};
use super::cipher::{Bound, CipherKey};
use super::format::{COMMITMENT_LEN, MESSAGE_OVERHEAD, MessageHeader, SALT_LEN};
use super::{Binding, WorkError};
use crate::codec::Reader;
use crate::{CryptoFailure, random};

const LABEL: &str = "polykey/message/v1";

impl CipherKey {
    pub(super) fn seal(
        &self,
        binding: &Binding<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, CryptoFailure> {
        let header = MessageHeader::new(binding, self.algorithm);
        self.seal_with(&header, &Bound::of(binding), &random::salt()?, plaintext)
    }

    pub(super) fn seal_convergent(
        &self,
        binding: &Binding<'_>,
        plaintext: &[u8],
    ) -> Result<Vec<u8>, CryptoFailure> {
        let header = MessageHeader::new(binding, self.algorithm);
        let bound = Bound::of(binding);
        let salt = self.convergent_salt(header.bytes(), &bound, plaintext)?;
        self.seal_with(&header, &bound, &salt, plaintext)
    }

    /// The salt may repeat only with the same plaintext and binding.
    pub(super) fn seal_with(
        &self,
        header: &MessageHeader,
        bound: &Bound,
        salt: &[u8; SALT_LEN],
        plaintext: &[u8],
    ) -> Result<Vec<u8>, CryptoFailure> {
        let (key, commitment) = self.derive(LABEL, header.bytes(), salt, bound)?;
        let mut out = Vec::with_capacity(MESSAGE_OVERHEAD + plaintext.len());
        out.extend_from_slice(header.bytes());
        out.extend_from_slice(salt);
        out.extend_from_slice(&commitment);
        let start = out.len();
        out.extend_from_slice(plaintext);
        let body = out.get_mut(start..).unwrap_or_default();
        let tag = key.seal_chunk(&ChunkNonce::new(0, false), body)?;
        out.extend_from_slice(&tag);
        Ok(out)
    }

    pub(super) fn open(
        &self,
        binding: &Binding<'_>,
        blob: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        let mut r = Reader::new(blob);
        let header = MessageHeader::new(binding, self.algorithm);
        if r.take(header.bytes().len()) != Some(header.bytes()) {
            return Err(WorkError::Failed);
        }
        let salt: [u8; SALT_LEN] = r.array().ok_or(WorkError::Failed)?;
        let stated: [u8; COMMITMENT_LEN] = r.array().ok_or(WorkError::Failed)?;
        let sealed = r.rest();
        let len = sealed.len().checked_sub(TAG_LEN).ok_or(WorkError::Failed)?;
        let key = self
            .derive_committed(LABEL, header.bytes(), &salt, &Bound::of(binding), &stated)?
            .ok_or(WorkError::Failed)?;
        let mut plaintext = Zeroizing::new(vec![0; len]);
        key.open_chunk(&ChunkNonce::new(0, false), sealed, &mut plaintext)
            .map_err(|_| WorkError::Failed)?;
        Ok(plaintext)
    }
}
