//! Keys in a token that a PKCS#11 module drives (OASIS PKCS#11 v2.40 and later): a security module,
//! a smart card, SoftHSM.
//!
//! A vendor's module may hang, crash, print and leak. It is loaded in a child process
//! ([`worker::run`]) that knows the PIN and sees the secrets that it wraps, but no key of Polykey
//! and nothing of the server's environment. The parent ends a child that takes too long and starts
//! another; [`Pkcs11Token`] is its side, with a bounded queue and deadlines.
//!
//! Wrapping is the same for every mechanism: a fresh 32-byte secret is wrapped by the token, and
//! the key is sealed under that secret with its place, the wrapper's name and everything that the
//! token returned bound to it. So the place is bound even where a mechanism has no additional
//! data, and a token that returns another secret than it was given is noticed.
//!
//! Keys of callers can live in the token as well ([`ResidentKey`]): made there, used there, never
//! outside it.
//!
//! Nothing here makes a key because one was not found: sessions are read-only, except where a key
//! is made or destroyed by the operation of that name.

mod config;
mod data;
mod device;
mod frame;
mod host;
mod keys;
mod pipe;
mod refused;
mod resident;
mod sealing;
mod session;
pub mod worker;

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use aws_lc_rs::digest;
use zeroize::Zeroizing;

pub use config::{
    KeySelector, MechanismChoice, Pkcs11Config, Pkcs11Error, SlotListing, TokenListing,
    TokenSelector, WorkerCommand, WrapMechanism,
};
pub use keys::{ResidentError, ResidentKey};

use crate::codec::{self, Reader};
use crate::{
    BoxFuture, Deadline, KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError, WrappedKey,
    WrapperId, cipher, random,
};
use frame::{Reply, Request, Sealed};
use host::{Host, Setup};

const LABEL: &str = "polykey/pkcs11/wrap/v1";
const AAD_LABEL: &[u8] = b"polykey/pkcs11/aad/v1";
const PARAMETERS: u8 = 1;
/// RSA of 16,384 bits.
const MAX_WRAPPED: usize = 2048;

/// A token and the process that speaks to it. Clones share both; the last one ends the process.
#[derive(Clone)]
pub struct Pkcs11Token {
    host: Arc<Host>,
    config: Arc<Pkcs11Config>,
}

/// A wrapping key of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KekInfo {
    /// `pkcs11:SERIAL:id-HEX` as wrapped keys record it, or `pkcs11:SERIAL:label-HEX` for a key
    /// without `CKA_ID`.
    pub id: WrapperId,
    /// What it wraps with now.
    pub mechanism: WrapMechanism,
    /// Whether the token says that it never gives the key out (`CKA_SENSITIVE`, and not
    /// `CKA_EXTRACTABLE`).
    pub locked_in: bool,
}

impl Pkcs11Token {
    /// A token that may be away: nothing is asked of it, and the PIN is not read, until the first
    /// call. `worker` is what runs [`worker::run`].
    ///
    /// # Errors
    /// [`Pkcs11Error`].
    pub fn new(config: Pkcs11Config, worker: WorkerCommand) -> Result<Self, Pkcs11Error> {
        Self::start(config, None, worker)
    }

    /// As [`Self::new`], with the PIN that [`crate::bootstrap::resolve`] read from the configured
    /// source.
    ///
    /// # Errors
    /// [`Pkcs11Error`].
    pub fn with_pin(
        config: Pkcs11Config,
        pin: Zeroizing<Vec<u8>>,
        worker: WorkerCommand,
    ) -> Result<Self, Pkcs11Error> {
        Self::start(config, Some(pin), worker)
    }

    fn start(
        config: Pkcs11Config,
        resolved: Option<Zeroizing<Vec<u8>>>,
        worker: WorkerCommand,
    ) -> Result<Self, Pkcs11Error> {
        config.check()?;
        let host = start(Setup {
            module: config.module.clone(),
            token: config.token.clone(),
            pin: Some(config.pin.clone()),
            resolved,
            call_timeout: config.call_timeout,
            queue: config.queue,
            environment: config.environment.clone(),
            worker,
        })?;
        Ok(Self { host: Arc::new(host), config: Arc::new(config) })
    }

    /// The slots and tokens of a module, for an operator who configures one. Takes no PIN.
    ///
    /// # Errors
    /// [`WrapError`]; the text of [`WrapError::Config`] says why a module does not load.
    pub async fn list(
        module: impl Into<PathBuf>,
        environment: Vec<(String, String)>,
        worker: WorkerCommand,
        deadline: Deadline,
    ) -> Result<Vec<SlotListing>, WrapError> {
        let module = module.into();
        config::check_module(&module)?;
        config::check_environment(&environment)?;
        let host = start(Setup {
            module,
            token: TokenSelector::Slot(0),
            pin: None,
            resolved: None,
            call_timeout: Duration::from_secs(60),
            queue: 1,
            environment,
            worker,
        })?;
        match host.ask(&Request::List, deadline).await? {
            Reply::Slots(slots) => Ok(slots),
            _ => Err(misunderstood()),
        }
    }

    /// A wrapper over one of the token's keys.
    ///
    /// # Errors
    /// [`Pkcs11Error::Config`].
    pub fn wrapper(&self, key: KeySelector) -> Result<Pkcs11Wrapper, Pkcs11Error> {
        key.check()?;
        let unknown = WrapperId::new(Pkcs11Wrapper::UNKNOWN)
            .ok_or_else(|| Pkcs11Error::Config("unprintable wrapper id".to_owned()))?;
        Ok(Pkcs11Wrapper { token: self.clone(), key, unknown, id: OnceLock::new() })
    }

    /// Makes a wrapping key that the token never gives out: AES-256, or RSA-3072 where the
    /// configured mechanism is RSA-OAEP. Without an id it gets a random one of 16 bytes.
    ///
    /// Nothing else here ever makes a wrapping key. After [`WrapError::Unavailable`] or
    /// [`WrapError::DeadlineExceeded`] it may have been made or not; asking again tells.
    ///
    /// # Errors
    /// [`WrapError::Config`] where a key of that label or id is there already.
    pub async fn create_kek(
        &self,
        key: &KeySelector,
        deadline: Deadline,
    ) -> Result<KekInfo, WrapError> {
        key.check()?;
        let choice = self.config.mechanism;
        let request = Request::Create { key: key.clone(), choice };
        self.kek_info(&request, deadline).await
    }

    async fn kek_info(&self, request: &Request, deadline: Deadline) -> Result<KekInfo, WrapError> {
        match self.host.ask(request, deadline).await? {
            Reply::Found { id, mechanism, locked_in } => {
                Ok(KekInfo { id: wrapper_id(id)?, mechanism, locked_in })
            }
            _ => Err(misunderstood()),
        }
    }

    /// What last went wrong, in words for an operator: names of calls and codes, no secret.
    #[must_use]
    pub fn last_failure(&self) -> Option<String> {
        self.host.last_failure()
    }

    /// The process that has the module loaded, while there is one.
    #[must_use]
    pub fn worker_pid(&self) -> Option<u32> {
        self.host.pid()
    }

    /// Lets a PIN that the token refused be tried once more, as after it was set in the token. A
    /// PIN that has changed where it is read from is tried without this.
    pub fn retry_pin(&self) {
        self.host.forget_refused_pin();
    }
}

/// Lets every PIN that a token has refused to this process be tried once more by tokens that are opened
/// from now on. For a person's word alone: many tokens lock after three wrong PINs.
pub fn retry_pins() {
    refused::forget_all();
}

impl fmt::Debug for Pkcs11Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pkcs11Token")
            .field("module", &self.config.module)
            .field("token", &self.config.token)
            .finish_non_exhaustive()
    }
}

fn start(setup: Setup) -> Result<Host, Pkcs11Error> {
    Host::start(setup).map_err(|e| Pkcs11Error::Thread(e.to_string()))
}

fn misunderstood() -> WrapError {
    WrapError::Config("the PKCS#11 worker process answered something else than asked".to_owned())
}

fn wrapper_id(id: String) -> Result<WrapperId, WrapError> {
    WrapperId::new(id).ok_or_else(misunderstood)
}

/// A key of a token as a [`KeyWrapper`].
///
/// Its id, `pkcs11:SERIAL:id-HEX`, is the token's and the key's own, so that it survives any
/// renaming of the configuration. It is learned at the first contact: until then [`KeyWrapper::id`]
/// is [`Self::UNKNOWN`], and whether a wrapped key is this wrapper's is told by asking the token.
/// A key that was copied to another token under the same `CKA_ID` (a backup, a member of a
/// cluster) opens what the first one wrapped.
pub struct Pkcs11Wrapper {
    token: Pkcs11Token,
    key: KeySelector,
    unknown: WrapperId,
    id: OnceLock<WrapperId>,
}

impl Pkcs11Wrapper {
    /// The id before the token was first spoken to. Nothing is ever wrapped under it.
    pub const UNKNOWN: &'static str = "pkcs11";

    /// The token.
    #[must_use]
    pub fn token(&self) -> &Pkcs11Token {
        &self.token
    }

    /// Which key it is.
    #[must_use]
    pub fn key(&self) -> &KeySelector {
        &self.key
    }

    /// Whether the key is there and works, and with which mechanism: a secret is wrapped and
    /// unwrapped once.
    ///
    /// # Errors
    /// [`WrapError`].
    pub async fn contact(&self, deadline: Deadline) -> Result<KekInfo, WrapError> {
        let choice = self.token.config.mechanism;
        let request = Request::Find { key: self.key.clone(), choice };
        let info = self.token.kek_info(&request, deadline).await?;
        self.learn(&info.id)?;
        Ok(info)
    }

    /// The mechanism that a wrapped key records; `None` if it is none of a token's.
    #[must_use]
    pub fn mechanism_of(wrapped: &WrappedKey) -> Option<WrapMechanism> {
        if wrapped.kind != SlotKind::Pkcs11 {
            return None;
        }
        read_parameters(&wrapped.parameters).map(|sealed| sealed.mechanism)
    }

    /// Takes the id at the first contact; another one later is another token or key.
    fn learn(&self, id: &WrapperId) -> Result<(), WrapError> {
        let known = self.id.get_or_init(|| id.clone());
        if known == id {
            return Ok(());
        }
        Err(WrapError::Config(format!(
            "the token or its key was exchanged: it is {id} and was {known}; restart to wrap with it"
        )))
    }

    async fn wrap(
        &self,
        key: &KeyMaterial,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<WrappedKey, WrapError> {
        let secret = random::secret::<32>()?;
        let request = Request::Wrap {
            key: self.key.clone(),
            choice: self.token.config.mechanism,
            aad: aad(cx),
            secret: secret.clone(),
        };
        let Reply::Wrapped { id, sealed } = self.token.host.ask(&request, deadline).await? else {
            return Err(misunderstood());
        };
        let wrapper = wrapper_id(id)?;
        self.learn(&wrapper)?;
        let parameters = parameters(&sealed).ok_or_else(|| {
            WrapError::Config(format!("the token's {} is longer than can be", sealed.mechanism))
        })?;
        let ciphertext = cipher::seal_committed(
            secret.as_slice(),
            LABEL,
            &context(cx, &bound_name(&wrapper), &parameters),
            key.bytes(),
        )?;
        Ok(WrappedKey { kind: SlotKind::Pkcs11, wrapper, parameters, ciphertext })
    }

    async fn unwrap(
        &self,
        wrapped: &WrappedKey,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<KeyMaterial, WrapError> {
        let WrappedKey { kind, wrapper, parameters, ciphertext } = wrapped;
        if *kind != SlotKind::Pkcs11 {
            return Err(WrapError::NotMine);
        }
        let request = Request::Unwrap {
            key: self.key.clone(),
            choice: self.token.config.mechanism,
            expected: wrapper.as_str().to_owned(),
            aad: aad(cx),
            sealed: read_parameters(parameters).ok_or(WrapError::Broken)?,
        };
        let (id, secret) = match self.token.host.ask(&request, deadline).await? {
            Reply::Secret { id, secret } => (id, Some(secret)),
            Reply::Broken { id } | Reply::NotMine { id } => (id, None),
            _ => return Err(misunderstood()),
        };
        let id = wrapper_id(id)?;
        // Another token's key that did not open it is just another key.
        let not = if id == *wrapper { WrapError::Broken } else { WrapError::NotMine };
        self.id.get_or_init(|| id);
        let Some(secret) = secret else { return Err(not) };
        let name = bound_name(wrapper);
        let context = context(cx, &name, parameters);
        let Ok(key) = cipher::open_committed(secret.as_slice(), LABEL, &context, ciphertext) else {
            return Err(not);
        };
        KeyMaterial::from_opened(key).map_err(|_| WrapError::Broken)
    }
}

impl fmt::Debug for Pkcs11Wrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pkcs11Wrapper")
            .field("id", &self.id().as_str())
            .field("token", &self.token)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// What a token with additional data binds: a hash of the place, since tokens limit its length.
/// The wrapper's name is bound around it, where it is known.
fn aad(cx: &WrapContext) -> [u8; 32] {
    let WrapContext { node_id, purpose, slot_id } = cx;
    let kind = SlotKind::Pkcs11.code().to_be_bytes();
    let place = codec::join(&[AAD_LABEL, node_id, purpose.as_bytes(), slot_id, &kind]);
    let mut out = [0; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, &place).as_ref());
    out
}

fn bound_name(wrapper: &WrapperId) -> Vec<u8> {
    codec::join(&[&SlotKind::Pkcs11.code().to_be_bytes(), wrapper.as_str().as_bytes()])
}

fn context<'a>(cx: &'a WrapContext, name: &'a [u8], parameters: &'a [u8]) -> [&'a [u8]; 5] {
    let WrapContext { node_id, purpose, slot_id } = cx;
    [node_id, purpose.as_bytes(), slot_id, name, parameters]
}

/// Version 1 u8 ‖ mechanism u8 ‖ IV length u8 ‖ IV ‖ length u16 ‖ the wrapped secret. `None` where
/// a token returned more than that holds.
fn parameters(sealed: &Sealed) -> Option<Vec<u8>> {
    let Sealed { mechanism, iv, wrapped } = sealed;
    let mut out = vec![PARAMETERS, mechanism.code(), u8::try_from(iv.len()).ok()?];
    out.extend_from_slice(iv);
    out.extend_from_slice(&u16::try_from(wrapped.len()).ok()?.to_be_bytes());
    out.extend_from_slice(wrapped);
    read_parameters(&out).map(|_| out)
}

fn read_parameters(parameters: &[u8]) -> Option<Sealed> {
    let mut r = Reader::new(parameters);
    if r.u8()? != PARAMETERS {
        return None;
    }
    let mechanism = WrapMechanism::from_code(r.u8()?)?;
    let len = usize::from(r.u8()?);
    let iv = r.take(len)?.to_vec();
    let len = usize::from(r.u16()?);
    let wrapped = r.take(len)?.to_vec();
    r.finish()?;
    let has_iv = mechanism == WrapMechanism::AesGcm;
    let sound = iv.is_empty() != has_iv && (1..=MAX_WRAPPED).contains(&wrapped.len());
    sound.then_some(Sealed { mechanism, iv, wrapped })
}

impl KeyWrapper for Pkcs11Wrapper {
    fn id(&self) -> &WrapperId {
        self.id.get().unwrap_or(&self.unknown)
    }

    fn kind(&self) -> SlotKind {
        SlotKind::Pkcs11
    }

    fn last_failure(&self) -> Option<String> {
        self.token.last_failure()
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(async move {
            deadline.check()?;
            self.wrap(key, cx, deadline).await
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
            self.unwrap(wrapped, cx, deadline).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_read_whole_or_not_at_all() {
        for (mechanism, iv) in [(WrapMechanism::AesGcm, 12), (WrapMechanism::AesKw, 0)] {
            let sealed = Sealed { mechanism, iv: vec![7; iv], wrapped: vec![8; 48] };
            let written = parameters(&sealed).unwrap();
            assert_eq!(read_parameters(&written).as_ref(), Some(&sealed));
            for cut in 0..written.len() {
                assert_eq!(read_parameters(&written[..cut]), None);
            }
            assert_eq!(read_parameters(&[&written[..], &[0]].concat()), None);
            let other = Sealed { iv: vec![7; 12 - iv], ..sealed.clone() };
            assert_eq!(
                parameters(&other),
                None,
                "an IV where none belongs, or none where one does"
            );
            assert_eq!(parameters(&Sealed { wrapped: vec![], ..sealed.clone() }), None);
            assert_eq!(parameters(&Sealed { wrapped: vec![1; 2049], ..sealed }), None);
        }
        assert_eq!(read_parameters(&[2, 2, 0, 0, 1, 9]), None);
        assert_eq!(read_parameters(&[1, 9, 0, 0, 1, 9]), None);
    }

    #[test]
    fn a_place_is_bound_by_every_part() {
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let others = [
            WrapContext { node_id: [3; 16], ..cx.clone() },
            WrapContext { slot_id: [3; 16], ..cx.clone() },
            WrapContext { purpose: "other", ..cx.clone() },
        ];
        assert!(others.iter().all(|other| aad(other) != aad(&cx)));
    }
}
