//! The wrapper over AWS KMS.

use std::collections::HashMap;
use std::fmt;

use aws_lc_rs::digest;
use aws_sdk_kms::Client;
use aws_sdk_kms::primitives::Blob;
use zeroize::Zeroizing;

use super::AwsKms;
use super::client::{self, within};
use super::failure::{Asked, classify};
use super::key::{KeyArn, KeyName};
use crate::codec::{self, Reader};
use crate::{
    BoxFuture, Deadline, KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError, WrappedKey,
    WrapperId, cipher, random,
};

const LABEL: &str = "polykey/aws/wrap/v1";
const PARAMETERS: u8 = 1;
/// What KMS wraps.
const SECRET_LEN: usize = 32;
/// The longest ciphertext that KMS makes and takes.
const MAX_BLOB: usize = 6144;

/// Wraps keys with a symmetric key of AWS KMS.
///
/// Parameters: 1 ‖ SHA-256 of the KMS ciphertext ‖ ARN of the KMS key. Ciphertext: length u16 ‖ KMS
/// ciphertext of 32 random bytes ‖ the key, sealed under them with a commitment. Everything is bound
/// to node, purpose, slot and wrapper, once in the encryption context, which KMS checks and
/// CloudTrail shows, and once here.
///
/// Poll it on a Tokio runtime with IO and time.
pub struct AwsWrapper {
    id: WrapperId,
    key: KeyName,
    /// `key` as text.
    name: String,
    region: String,
    client: Client,
}

/// What a wrapped key holds.
struct Stored<'a> {
    key: KeyArn,
    blob: &'a [u8],
    sealed: &'a [u8],
}

impl<'a> Stored<'a> {
    fn read(wrapped: &'a WrappedKey) -> Option<Self> {
        let mut r = Reader::new(&wrapped.parameters);
        (r.u8()? == PARAMETERS).then_some(())?;
        let sha256: [u8; 32] = r.array()?;
        let key = KeyArn::parse(std::str::from_utf8(r.rest()).ok()?)?;
        let mut r = Reader::new(&wrapped.ciphertext);
        let len = usize::from(r.u16()?);
        let (blob, sealed) = (r.take(len)?, r.rest());
        // Damage is found here, without a call. Against intent there is the seal.
        let whole = checksum(blob).as_ref() == sha256 && sealed.len() > cipher::COMMITTED_OVERHEAD;
        whole.then_some(Self { key, blob, sealed })
    }
}

fn checksum(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}

impl AwsWrapper {
    /// Reads settings and finds Region and credentials' sources. KMS is not asked, so this works
    /// while AWS is away.
    ///
    /// # Errors
    /// [`WrapError::Config`] when settings are malformed or contradict one another, or no Region is
    /// known; [`WrapError::DeadlineExceeded`].
    pub async fn open(settings: &AwsKms, deadline: Deadline) -> Result<Self, WrapError> {
        let AwsKms { key: name, connection } = settings;
        let key = KeyName::parse(name)?;
        let id = key
            .wrapper_id()
            .ok_or_else(|| WrapError::Config(format!("`{name}` is too long a name")))?;
        let config = connection.load(key.region(), deadline).await?;
        let region = client::region(&config);
        if key.region().is_some_and(|of_key| of_key != region) {
            return Err(WrapError::Config(format!(
                "the key {name} is not in the Region {region}: remove `region`, or name the key's \
                 replica there"
            )));
        }
        let mut config =
            aws_sdk_kms::config::Builder::from(&config).interceptor(client::NothingInTheClear);
        if let Some(url) = &connection.endpoint_url {
            config = config.endpoint_url(url);
        }
        let client = Client::from_conf(config.build());
        Ok(Self { id, key, name: name.clone(), region, client })
    }

    fn asked<'a>(&'a self, action: &'static str, subject: &'a str) -> Asked<'a> {
        Asked { action, subject, region: &self.region }
    }

    async fn wrap(
        &self,
        key: &KeyMaterial,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<WrappedKey, WrapError> {
        let secret = random::secret::<SECRET_LEN>()?;
        let request = self
            .client
            .encrypt()
            .key_id(&self.name)
            .plaintext(Blob::new(secret.as_slice()))
            .set_encryption_context(Some(context(cx)));
        let asked = self.asked("kms:Encrypt", &self.name);
        let answer = within(deadline, request.send())
            .await?
            .map_err(|e| classify(&e, &asked).into_wrap_error(&asked))?;
        let used = answer.key_id().and_then(KeyArn::parse);
        let Some(used) = used.filter(|used| self.key.stands_for(used, &self.region)) else {
            return Err(self.wrong_key(answer.key_id()));
        };
        let blob = answer.ciphertext_blob.map(Blob::into_inner).unwrap_or_default();
        let len = u16::try_from(blob.len()).ok().filter(|_| (1..=MAX_BLOB).contains(&blob.len()));
        // An answer without what was asked for is as good as none.
        let len = len.ok_or(WrapError::Unavailable { retryable: true })?;

        let mut parameters = vec![PARAMETERS];
        parameters.extend_from_slice(checksum(&blob).as_ref());
        parameters.extend_from_slice(used.to_string().as_bytes());
        let mut ciphertext = len.to_be_bytes().to_vec();
        ciphertext.extend_from_slice(&blob);
        let sealed = bind(cx, &self.id, &parameters, &blob, |context| {
            cipher::seal_committed(secret.as_slice(), LABEL, context, key.bytes())
        })?;
        ciphertext.extend_from_slice(&sealed);
        Ok(WrappedKey { kind: self.kind(), wrapper: self.id.clone(), parameters, ciphertext })
    }

    async fn unwrap(
        &self,
        wrapped: &WrappedKey,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<KeyMaterial, WrapError> {
        let WrappedKey { kind, wrapper, parameters, .. } = wrapped;
        let stored = Stored::read(wrapped).filter(|s| self.key.admits(&s.key, wrapper));
        let stored = match stored {
            _ if *kind != self.kind() => return Err(WrapError::NotMine),
            Some(stored) => stored,
            None if *wrapper == self.id => return Err(WrapError::Broken),
            None => return Err(WrapError::NotMine),
        };
        // The recorded key, named: KMS must not choose one by the ciphertext.
        let Some(named) = stored.key.within_region(&self.region) else {
            return Err(WrapError::Config(format!(
                "{} wrapped it, and {} is asked in {}: set `region`",
                stored.key, self.name, self.region
            )));
        };
        let name = named.to_string();
        let request = self
            .client
            .decrypt()
            .key_id(&name)
            .ciphertext_blob(Blob::new(stored.blob))
            .set_encryption_context(Some(context(cx)));
        let asked = self.asked("kms:Decrypt", &name);
        let answer = within(deadline, request.send())
            .await?
            .map_err(|e| classify(&e, &asked).into_wrap_error(&asked))?;
        let used = answer.key_id.clone();
        let secret = Zeroizing::new(answer.plaintext.map(Blob::into_inner).unwrap_or_default());
        if used.as_deref().and_then(KeyArn::parse).is_none_or(|used| used != named) {
            return Err(self.wrong_key(used.as_deref()));
        }
        if secret.len() != SECRET_LEN {
            return Err(WrapError::Broken);
        }
        let key = bind(cx, wrapper, parameters, stored.blob, |context| {
            cipher::open_committed(&secret, LABEL, context, stored.sealed)
        });
        key.ok().and_then(|key| KeyMaterial::from_opened(key).ok()).ok_or(WrapError::Broken)
    }

    fn wrong_key(&self, used: Option<&str>) -> WrapError {
        // Only what is an ARN is repeated.
        let used = used.and_then(KeyArn::parse);
        let used = used.map_or_else(|| "a key without an ARN".to_owned(), |used| used.to_string());
        WrapError::Refused(format!(
            "wrong key: AWS KMS was asked for {} in {} and answers that it used {used}; nothing of \
             the answer was taken; check what answers at the endpoint",
            self.name, self.region
        ))
    }
}

/// What KMS binds, as CloudTrail shows it and policies can require it.
fn context(cx: &WrapContext) -> HashMap<String, String> {
    let WrapContext { node_id, purpose, slot_id } = cx;
    let hex = |id: &[u8]| data_encoding::HEXLOWER.encode(id);
    [
        ("polykey:node", hex(node_id)),
        ("polykey:purpose", (*purpose).to_owned()),
        ("polykey:slot", hex(slot_id)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn bind<T>(
    cx: &WrapContext,
    wrapper: &WrapperId,
    parameters: &[u8],
    blob: &[u8],
    f: impl FnOnce(&[&[u8]]) -> T,
) -> T {
    let WrapContext { node_id, purpose, slot_id } = cx;
    let wrapper = codec::join(&[&SlotKind::Aws.code().to_be_bytes(), wrapper.as_str().as_bytes()]);
    f(&[node_id, purpose.as_bytes(), slot_id, &wrapper, parameters, blob])
}

impl KeyWrapper for AwsWrapper {
    fn id(&self) -> &WrapperId {
        &self.id
    }

    fn kind(&self) -> SlotKind {
        SlotKind::Aws
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(self.wrap(key, cx, deadline))
    }

    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        Box::pin(self.unwrap(wrapped, cx, deadline))
    }
}

impl fmt::Debug for AwsWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsWrapper")
            .field("key", &self.name)
            .field("region", &self.region)
            .finish_non_exhaustive()
    }
}
