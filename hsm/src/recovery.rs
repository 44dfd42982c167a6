//! Recovery keys: an X25519 key pair whose private half is kept off the node, whole or in shares.
//!
//! The node has the public half only, so that it can wrap every new root for recovery without
//! anybody's help, and nothing on the node opens what it wrapped. Wrapping is HPKE (RFC 9180, base
//! mode) with the place of the wrapped key in `info`.

mod shares;

use std::fmt;

use aws_lc_rs::digest;
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::{
    BoxFuture, CryptoFailure, Deadline, KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError,
    WrappedKey, WrapperId, codec, random,
};

pub use shares::{Share, ShareError, combine, split};

const LABEL: &[u8] = b"polykey/recovery/wrap/v1";
const PARAMETERS: u8 = 1;
const PUBLIC: &str = "polykey-recovery-public-";
const PRIVATE: &str = "polykey-recovery-private-";
const CHECK: usize = 4;

/// Bytes and the first four of their SHA-256, in base64url: a slip of the pen shows.
fn checked(prefix: &str, bytes: &[u8]) -> Zeroizing<String> {
    let mut all = Zeroizing::new(bytes.to_vec());
    all.extend_from_slice(&check(prefix, bytes));
    let mut text = Zeroizing::new(String::with_capacity(prefix.len() + all.len() * 2));
    text.push_str(prefix);
    BASE64URL_NOPAD.encode_append(&all, &mut text);
    text
}

fn check(prefix: &str, bytes: &[u8]) -> [u8; CHECK] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(prefix.as_bytes());
    context.update(bytes);
    let mut out = [0; CHECK];
    out.copy_from_slice(context.finish().as_ref().get(..CHECK).unwrap_or_default());
    out
}

/// The bytes of [`checked`] text; blanks and line breaks do not count.
fn unchecked(prefix: &str, text: &str) -> Result<Zeroizing<Vec<u8>>, RecoveryError> {
    let mut bare = Zeroizing::new(String::with_capacity(text.len()));
    bare.extend(text.chars().filter(|c| !c.is_ascii_whitespace()));
    let body = bare.strip_prefix(prefix).ok_or(RecoveryError::NotThis)?;
    let all = BASE64URL_NOPAD.decode(body.as_bytes()).map_err(|_| RecoveryError::Mistyped)?;
    let all = Zeroizing::new(all);
    let split = all.len().checked_sub(CHECK).ok_or(RecoveryError::Mistyped)?;
    let (bytes, sum) = all.split_at(split);
    if check(prefix, bytes) != sum {
        return Err(RecoveryError::Mistyped);
    }
    Ok(Zeroizing::new(bytes.to_vec()))
}

/// Why a text is no recovery key or share. None of these repeats the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecoveryError {
    /// It does not start as one.
    #[error("not a recovery key or share of this kind: it starts otherwise")]
    NotThis,
    /// Its checksum does not fit.
    #[error("mistyped or cut off: its checksum does not fit")]
    Mistyped,
    /// A later release made it.
    #[error("made by a later release")]
    Newer,
    /// A point of low order, or not 32 bytes.
    #[error("not a valid X25519 key")]
    NotAKey,
}

/// The public half of a recovery key: 32 bytes of X25519 (RFC 7748). Not secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryPublicKey([u8; 32]);

impl RecoveryPublicKey {
    /// Takes a raw X25519 public key. One of low order is refused when it is used.
    #[must_use]
    pub const fn from_bytes(raw: [u8; 32]) -> Self {
        Self(raw)
    }

    /// The raw key.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Reads the text that [`fmt::Display`] writes.
    ///
    /// # Errors
    /// [`RecoveryError`].
    pub fn parse(text: &str) -> Result<Self, RecoveryError> {
        let bytes = unchecked(PUBLIC, text)?;
        let raw = <[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| RecoveryError::NotAKey)?;
        Ok(Self(raw))
    }

    /// The first 8 bytes of its SHA-256, which name it.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 8] {
        let mut out = [0; 8];
        let hash = digest::digest(&digest::SHA256, &self.0);
        out.copy_from_slice(hash.as_ref().get(..8).unwrap_or_default());
        out
    }
}

impl fmt::Display for RecoveryPublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&checked(PUBLIC, &self.0))
    }
}

/// The private half: 32 bytes, erased when dropped.
pub struct RecoveryKey(Zeroizing<[u8; 32]>);

impl RecoveryKey {
    /// A new key pair.
    ///
    /// # Errors
    /// When the random generator fails.
    pub fn generate() -> Result<Self, CryptoFailure> {
        let seed = random::secret::<32>()?;
        let (private, _) = X25519HkdfSha256::derive_keypair(seed.as_slice());
        let mut bytes = Zeroizing::new([0; 32]);
        private.write_exact(bytes.as_mut_slice());
        Ok(Self(bytes))
    }

    /// Takes over the raw private key.
    #[must_use]
    pub fn from_bytes(bytes: Zeroizing<[u8; 32]>) -> Self {
        Self(bytes)
    }

    /// Reads what [`Self::to_text`] wrote.
    ///
    /// # Errors
    /// [`RecoveryError`].
    pub fn parse(text: &str) -> Result<Self, RecoveryError> {
        let bytes = unchecked(PRIVATE, text)?;
        let mut raw = Zeroizing::new([0; 32]);
        if bytes.len() != raw.len() {
            return Err(RecoveryError::NotAKey);
        }
        raw.copy_from_slice(&bytes);
        Ok(Self(raw))
    }

    /// The private key with a checksum, to be kept off the node.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        checked(PRIVATE, self.0.as_slice())
    }

    /// Its public half.
    ///
    /// # Errors
    /// [`RecoveryError::NotAKey`] for 32 bytes that are no scalar.
    pub fn public(&self) -> Result<RecoveryPublicKey, RecoveryError> {
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(self.0.as_slice())
            .map_err(|_| RecoveryError::NotAKey)?;
        let mut raw = [0; 32];
        X25519HkdfSha256::sk_to_pk(&private).write_exact(&mut raw);
        Ok(RecoveryPublicKey(raw))
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(..)")
    }
}

/// A recovery key as a [`KeyWrapper`]: with the public half alone it wraps and opens nothing.
#[derive(Debug)]
pub struct RecoveryWrapper {
    id: WrapperId,
    public: RecoveryPublicKey,
    private: Option<RecoveryKey>,
}

impl RecoveryWrapper {
    /// The wrapper of a node, which opens nothing.
    ///
    /// # Errors
    /// When its name cannot be made, which does not happen.
    pub fn to(public: RecoveryPublicKey) -> Result<Self, CryptoFailure> {
        let id = format!("recovery:{}", HEXLOWER.encode(&public.fingerprint()));
        let id = WrapperId::new(id).ok_or(CryptoFailure("unprintable wrapper id"))?;
        Ok(Self { id, public, private: None })
    }

    /// The wrapper of whoever recovers.
    ///
    /// # Errors
    /// [`RecoveryError::NotAKey`].
    pub fn with(private: RecoveryKey) -> Result<Self, RecoveryError> {
        let wrapper = Self::to(private.public()?).map_err(|_| RecoveryError::NotAKey)?;
        Ok(Self { private: Some(private), ..wrapper })
    }

    /// The wrapper that made `wrapped`, without its private half, if a recovery key made it.
    #[must_use]
    pub fn of(wrapped: &WrappedKey) -> Option<Self> {
        if wrapped.kind != SlotKind::Recovery {
            return None;
        }
        let raw = wrapped.parameters.strip_prefix(&[PARAMETERS])?;
        let wrapper = Self::to(RecoveryPublicKey(raw.try_into().ok()?)).ok()?;
        (wrapper.id == wrapped.wrapper).then_some(wrapper)
    }

    /// The public half.
    #[must_use]
    pub const fn public(&self) -> &RecoveryPublicKey {
        &self.public
    }

    fn parameters(&self) -> Vec<u8> {
        let mut out = vec![PARAMETERS];
        out.extend_from_slice(&self.public.0);
        out
    }

    /// HPKE's `info`: the label and the place, each part with its length before it.
    fn info(&self, cx: &WrapContext) -> Vec<u8> {
        let WrapContext { node_id, purpose, slot_id } = cx;
        codec::join(&[LABEL, node_id, purpose.as_bytes(), slot_id, &self.public.0])
    }

    fn wrap(&self, key: &KeyMaterial, cx: &WrapContext) -> Result<WrappedKey, WrapError> {
        let bad = || WrapError::Config("the recovery key is not a valid X25519 key".to_owned());
        let public =
            <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(&self.public.0).map_err(|_| bad())?;
        let sealed = hpke::single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
            &OpModeS::Base,
            &public,
            &self.info(cx),
            key.bytes(),
            &[],
        );
        let (enc, body) = sealed.map_err(|_| bad())?;
        let mut ciphertext = enc.to_bytes().to_vec();
        ciphertext.extend_from_slice(&body);
        let (wrapper, parameters) = (self.id.clone(), self.parameters());
        Ok(WrappedKey { kind: SlotKind::Recovery, wrapper, parameters, ciphertext })
    }

    fn unwrap(&self, wrapped: &WrappedKey, cx: &WrapContext) -> Result<KeyMaterial, WrapError> {
        if wrapped.kind != SlotKind::Recovery || wrapped.wrapper != self.id {
            return Err(WrapError::NotMine);
        }
        let Some(private) = &self.private else { return Err(WrapError::NotMine) };
        if !bool::from(wrapped.parameters.ct_eq(&self.parameters())) {
            return Err(WrapError::Broken);
        }
        let (enc, body) = wrapped.ciphertext.split_at_checked(32).ok_or(WrapError::Broken)?;
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(private.bytes())
            .map_err(|_| WrapError::Broken)?;
        let enc = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(enc)
            .map_err(|_| WrapError::Broken)?;
        let secret = hpke::single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &private,
            &enc,
            &self.info(cx),
            body,
            &[],
        )
        .map_err(|_| WrapError::Broken)?;
        KeyMaterial::from_secret(secret).map_err(|_| WrapError::Broken)
    }
}

impl KeyWrapper for RecoveryWrapper {
    fn id(&self) -> &WrapperId {
        &self.id
    }

    fn kind(&self) -> SlotKind {
        SlotKind::Recovery
    }

    fn opens(&self) -> bool {
        self.private.is_some()
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(async move {
            deadline.check()?;
            self.wrap(key, cx)
        })
    }

    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        Box::pin(async move {
            deadline.check()?;
            self.unwrap(wrapped, cx)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(key: &RecoveryKey) -> RecoveryKey {
        RecoveryKey::parse(&key.to_text()).unwrap()
    }

    #[test]
    fn conforms() {
        let (key, other) = (RecoveryKey::generate().unwrap(), RecoveryKey::generate().unwrap());
        let reopened = RecoveryWrapper::with(again(&key)).unwrap();
        let subject = crate::conformance::Subject {
            wrapper: &RecoveryWrapper::with(key).unwrap(),
            reopened: &reopened,
            other: &RecoveryWrapper::with(other).unwrap(),
            max_key: KeyMaterial::MAX_LEN,
            tamper_every: 1,
        };
        futures::executor::block_on(crate::conformance::run(&subject));
    }

    #[test]
    fn the_public_half_wraps_for_the_private_one_and_opens_nothing() {
        let key = RecoveryKey::generate().unwrap();
        let text = key.public().unwrap().to_string();
        let node = RecoveryWrapper::to(RecoveryPublicKey::parse(&text).unwrap()).unwrap();
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let secret = KeyMaterial::random(49).unwrap();
        let wrapped = node.wrap(&secret, &cx).unwrap();
        assert_eq!(node.unwrap(&wrapped, &cx).err(), Some(WrapError::NotMine));
        assert!(!node.opens());
        // From what is stored alone, as after a restart.
        let stored = WrappedKey::decode(&wrapped.encode()).unwrap();
        let later = RecoveryWrapper::of(&stored).unwrap();
        let wrapped = later.wrap(&secret, &cx).unwrap();
        let opened = RecoveryWrapper::with(key).unwrap().unwrap(&wrapped, &cx).unwrap();
        assert!(opened.bytes() == secret.bytes());
    }

    #[test]
    fn slips_of_the_pen_show() {
        let key = RecoveryKey::generate().unwrap();
        let (private, public) = (key.to_text(), key.public().unwrap().to_string());
        for (text, prefix) in [(private.as_str(), PRIVATE), (public.as_str(), PUBLIC)] {
            for at in prefix.len()..text.len() {
                let mut changed = text.to_owned().into_bytes();
                changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
                let changed = String::from_utf8(changed).unwrap();
                assert_eq!(
                    unchecked(prefix, &changed).err(),
                    Some(RecoveryError::Mistyped),
                    "{at}"
                );
            }
            let spaced = format!(" {}\n{} ", &text[..30], &text[30..]);
            assert!(unchecked(prefix, &spaced).is_ok());
        }
        assert_eq!(RecoveryKey::parse(&public).err(), Some(RecoveryError::NotThis));
        assert!(!format!("{key:?}").contains(&private[PRIVATE.len()..]));
    }

    #[test]
    fn keys_of_low_order_are_refused() {
        let node = RecoveryWrapper::to(RecoveryPublicKey::from_bytes([0; 32])).unwrap();
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let refused = node.wrap(&KeyMaterial::random(32).unwrap(), &cx);
        assert!(matches!(refused, Err(WrapError::Config(_))), "{refused:?}");
    }
}
