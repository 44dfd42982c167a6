//! Keys that live in a token: made there, never outside it, and used through it.

use aws_lc_rs::digest;
use zeroize::Zeroizing;

use super::frame::{KeyReply, KeyRequest, KeyWork, Reply, Request};
use super::{Pkcs11Token, misunderstood};
use crate::work::{SignInput, SignatureScheme, WorkError, verify};
use crate::{Algorithm, Deadline, PublicKey, Purpose, WrapError};

/// A key that lives in a token, as whoever uses it remembers it. Not secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResidentKey {
    /// Its `CKA_ID`, 16 to 64 bytes, chosen by whoever made it and never used twice.
    pub id: Vec<u8>,
    /// What it is: one of [`ResidentKey::ALGORITHMS`].
    pub algorithm: Algorithm,
    /// What it was made for.
    pub purpose: Purpose,
    /// Its public half, if it has one.
    pub public: Option<PublicKey>,
}

/// Why a token did not do something with a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResidentError {
    /// A key of this id is there, perhaps from a call whose answer was lost. None was made.
    #[error("the token has a key of this id already")]
    AlreadyThere,
    /// It was destroyed, or this is another token.
    #[error("the token has no key of this id")]
    NotThere,
    /// This token cannot do it; nothing was left in it.
    #[error("the token cannot do this: {0}")]
    Unsupported(String),
    /// About the request, or [`WorkError::Failed`]: it does not open.
    #[error(transparent)]
    Work(#[from] WorkError),
    /// About the token: away, too slow, set up wrongly.
    #[error(transparent)]
    Token(#[from] WrapError),
}

impl ResidentKey {
    /// What can live in a token, if the token can do it: ECDSA and RSA to sign, RSA to decrypt with OAEP and
    /// SHA-256, AES-256-GCM.
    pub const ALGORITHMS: [Algorithm; 6] = [
        Algorithm::EcdsaP256,
        Algorithm::EcdsaP384,
        Algorithm::Rsa2048,
        Algorithm::Rsa3072,
        Algorithm::Rsa4096,
        Algorithm::Aes256Gcm,
    ];
    /// The `CKA_LABEL` of every object that is made for one.
    pub const LABEL: &[u8] = b"polykey resident key";
    /// The longest plaintext and the longest additional data of a call, in bytes each.
    pub const MAX_DATA: usize = 16 * 1024;
}

const ID: WorkError = WorkError::input("id", "the id of a key in a token is 16 to 64 bytes");
const TOO_LONG: WorkError =
    WorkError::input("plaintext", "a token takes at most 16 KiB of it, and of additional data");

impl Pkcs11Token {
    /// Makes a key in the token that never leaves it, and lets it work once. `id` becomes its `CKA_ID`: 16 to 64 bytes.
    ///
    /// The token's time for it is the deadline's, not the configured limit: RSA takes some tokens minutes.
    /// After [`WrapError::Unavailable`] or [`WrapError::DeadlineExceeded`] the key may be there or
    /// not: ask again with the same id, and take [`ResidentError::AlreadyThere`] for
    /// [`Self::find_resident`].
    ///
    /// # Errors
    /// [`ResidentError`].
    pub async fn generate_resident(
        &self,
        id: &[u8],
        algorithm: Algorithm,
        purpose: Purpose,
        deadline: Deadline,
    ) -> Result<ResidentKey, ResidentError> {
        let key = ResidentKey { id: id.to_vec(), algorithm, purpose, public: None };
        self.there(key, KeyWork::Generate, deadline).await
    }

    /// The key of this id, with its public half.
    ///
    /// # Errors
    /// [`ResidentError`].
    pub async fn find_resident(
        &self,
        id: &[u8],
        algorithm: Algorithm,
        purpose: Purpose,
        deadline: Deadline,
    ) -> Result<ResidentKey, ResidentError> {
        let key = ResidentKey { id: id.to_vec(), algorithm, purpose, public: None };
        self.there(key, KeyWork::Find, deadline).await
    }

    async fn there(
        &self,
        key: ResidentKey,
        work: KeyWork,
        deadline: Deadline,
    ) -> Result<ResidentKey, ResidentError> {
        let KeyReply::There(spki) = self.ask_key(&key, work, deadline).await? else {
            return Err(misunderstood().into());
        };
        let public = match spki {
            None => None,
            Some(spki) => {
                Some(PublicKey::from_spki(key.algorithm, &spki).map_err(|_| misunderstood())?)
            }
        };
        if public.is_some() != key.algorithm.is_asymmetric() {
            return Err(misunderstood().into());
        }
        Ok(ResidentKey { public, ..key })
    }

    /// Destroys the key and its public half for good.
    ///
    /// # Errors
    /// [`ResidentError`]; [`ResidentError::NotThere`] where there is none.
    pub async fn destroy_resident(
        &self,
        key: &ResidentKey,
        deadline: Deadline,
    ) -> Result<(), ResidentError> {
        match self.ask_key(key, KeyWork::Destroy, deadline).await? {
            KeyReply::Destroyed => Ok(()),
            _ => Err(misunderstood().into()),
        }
    }

    /// Signs a message, which is hashed here, or its digest; ECDSA in DER. The signature is verified before it is
    /// returned, so that neither a faulty token nor another one's key signs for this.
    ///
    /// # Errors
    /// [`ResidentError`].
    pub async fn sign_resident(
        &self,
        key: &ResidentKey,
        scheme: SignatureScheme,
        input: SignInput<'_>,
        deadline: Deadline,
    ) -> Result<Vec<u8>, ResidentError> {
        let (Purpose::Sign, Some(public)) = (key.purpose, &key.public) else {
            return Err(wrong_purpose(key));
        };
        let scheme_error =
            WorkError::input("scheme", "a token's key of this type does not sign so");
        let by = scheme.digest().filter(|_| scheme.serves(key.algorithm)).ok_or(scheme_error)?;
        let digest = match input {
            SignInput::Message(message) => digest::digest(by, message).as_ref().to_vec(),
            SignInput::Digest(digest) if digest.len() == by.output_len() => digest.to_vec(),
            SignInput::Digest(_) => {
                return Err(WorkError::input(
                    "digest",
                    "it must be as long as the output of the scheme's hash function",
                )
                .into());
            }
        };
        let work = KeyWork::Sign { scheme, digest: digest.clone() };
        let KeyReply::Public(signature) = self.ask_key(key, work, deadline).await? else {
            return Err(misunderstood().into());
        };
        if verify(key.algorithm, scheme, public, SignInput::Digest(&digest), &signature)? {
            return Ok(signature);
        }
        let text = "the token's signature is not one by the key that was recorded for this id";
        Err(WrapError::Config(text.to_owned()).into())
    }

    /// Opens RSA-OAEP with SHA-256 and an empty label, as [`crate::work::encrypt_to`] makes it.
    ///
    /// # Errors
    /// [`ResidentError`].
    pub async fn decrypt_resident(
        &self,
        key: &ResidentKey,
        ciphertext: &[u8],
        deadline: Deadline,
    ) -> Result<Zeroizing<Vec<u8>>, ResidentError> {
        let rsa =
            matches!(key.algorithm, Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096);
        if !rsa || key.purpose == Purpose::Sign {
            return Err(wrong_purpose(key));
        }
        if ciphertext.len() > 512 {
            return Err(WorkError::Failed.into());
        }
        let work = KeyWork::Decrypt { ciphertext: ciphertext.to_vec() };
        self.opened(key, work, deadline).await
    }

    /// Encrypts with AES-256-GCM (NIST SP 800-38D): IV 12 ‖ ciphertext ‖ tag 16. The IV is random, so that a
    /// key is good for 2^32 calls.
    ///
    /// # Errors
    /// [`ResidentError`].
    pub async fn seal_resident(
        &self,
        key: &ResidentKey,
        aad: &[u8],
        plaintext: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<u8>, ResidentError> {
        if key.algorithm != Algorithm::Aes256Gcm {
            return Err(wrong_purpose(key));
        }
        if plaintext.len().max(aad.len()) > ResidentKey::MAX_DATA {
            return Err(TOO_LONG.into());
        }
        let plaintext = Zeroizing::new(plaintext.to_vec());
        let work = KeyWork::Seal { aad: aad.to_vec(), plaintext };
        match self.ask_key(key, work, deadline).await? {
            KeyReply::Public(sealed) => Ok(sealed),
            _ => Err(misunderstood().into()),
        }
    }

    /// Opens what [`Self::seal_resident`] made with the same additional data.
    ///
    /// # Errors
    /// [`ResidentError`].
    pub async fn open_resident(
        &self,
        key: &ResidentKey,
        aad: &[u8],
        sealed: &[u8],
        deadline: Deadline,
    ) -> Result<Zeroizing<Vec<u8>>, ResidentError> {
        if key.algorithm != Algorithm::Aes256Gcm {
            return Err(wrong_purpose(key));
        }
        if aad.len() > ResidentKey::MAX_DATA
            || !(28..=ResidentKey::MAX_DATA + 28).contains(&sealed.len())
        {
            return Err(WorkError::Failed.into());
        }
        let work = KeyWork::Open { aad: aad.to_vec(), sealed: sealed.to_vec() };
        self.opened(key, work, deadline).await
    }

    async fn opened(
        &self,
        key: &ResidentKey,
        work: KeyWork,
        deadline: Deadline,
    ) -> Result<Zeroizing<Vec<u8>>, ResidentError> {
        match self.ask_key(key, work, deadline).await? {
            KeyReply::Secret(plaintext) => Ok(plaintext),
            _ => Err(misunderstood().into()),
        }
    }

    async fn ask_key(
        &self,
        key: &ResidentKey,
        work: KeyWork,
        deadline: Deadline,
    ) -> Result<KeyReply, ResidentError> {
        let ResidentKey { id, algorithm, purpose, .. } = key;
        if !(16..=64).contains(&id.len()) {
            return Err(ID.into());
        }
        if !ResidentKey::ALGORITHMS.contains(algorithm) {
            return Err(ResidentError::Unsupported(format!(
                "keys of type {algorithm} do not live in tokens"
            )));
        }
        if !algorithm.serves(*purpose) {
            return Err(wrong_purpose(key));
        }
        let request = KeyRequest { id: id.clone(), algorithm: *algorithm, purpose: *purpose, work };
        match self.host.ask(&Request::Key(request), deadline).await? {
            Reply::Key(KeyReply::AlreadyThere) => Err(ResidentError::AlreadyThere),
            Reply::Key(KeyReply::NotThere) => Err(ResidentError::NotThere),
            Reply::Key(KeyReply::Failed) => Err(WorkError::Failed.into()),
            Reply::Key(KeyReply::Unsupported(text)) => Err(ResidentError::Unsupported(text)),
            Reply::Key(reply) => Ok(reply),
            _ => Err(misunderstood().into()),
        }
    }
}

fn wrong_purpose(key: &ResidentKey) -> ResidentError {
    WorkError::WrongPurpose { algorithm: key.algorithm, purpose: key.purpose }.into()
}
