//! The wrapper that needs no device: a master key or a passphrase from a file, the environment or
//! a systemd credential.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use argon2::{Argon2, Block, Params, Version};
use zeroize::Zeroizing;

use crate::cipher::{self, Key};
use crate::codec::{self, Reader};
use crate::{
    BoxFuture, CryptoFailure, Deadline, KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError,
    WrappedKey, WrapperId, random,
};

const LABEL: &str = "polykey/local/wrap/v1";
const ID_LABEL: &str = "polykey/local/id/v1";
const PARAMETERS: u8 = 1;
const MAX_SOURCE_LEN: usize = 4096;
const MIN_PASSPHRASE_CHARS: usize = 8;
const ARGON_SALT_LEN: usize = 16;

/// Where a secret is read from. Only the place is ever shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A regular file that its owner alone can read.
    File(PathBuf),
    /// An environment variable.
    Env(String),
    /// A systemd credential: a file of this name in `$CREDENTIALS_DIRECTORY`, whose permissions
    /// are systemd's business (or that of whatever mounts a secret there).
    Credential(String),
    /// A SecureString in AWS Systems Manager's Parameter Store, by name; see [`crate::bootstrap`].
    Ssm(String),
}

/// Where a wrapper's secret comes from, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MasterKeySource {
    /// A master key in a file.
    File(PathBuf),
    /// A master key in an environment variable.
    Env(String),
    /// A master key in a systemd credential.
    Credential(String),
    /// A master key in an SSM parameter; see [`crate::bootstrap`].
    Ssm(String),
    /// A passphrase.
    Passphrase {
        /// Where it is.
        from: SecretSource,
        /// What stretching it costs, for keys that are wrapped from now on.
        params: PassphraseParams,
    },
}

/// The cost of Argon2id (RFC 9106): 64 MiB, 3 passes, 4 lanes unless chosen otherwise, some 0.2 s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassphraseParams {
    /// Memory in KiB: 19,456 to 1,048,576.
    pub memory_kib: u32,
    /// Passes over it: 2 to 16.
    pub passes: u32,
    /// Lanes: 1 to 16.
    pub lanes: u32,
}

impl Default for PassphraseParams {
    fn default() -> Self {
        Self { memory_kib: 64 * 1024, passes: 3, lanes: 4 }
    }
}

impl PassphraseParams {
    /// The least that is accepted: the floor of the OWASP password storage recommendations.
    pub const MIN: Self = Self { memory_kib: 19_456, passes: 2, lanes: 1 };
    /// The most. It also bounds what a forged slot can make this process spend.
    pub const MAX: Self = Self { memory_kib: 1024 * 1024, passes: 16, lanes: 16 };

    /// Whether every cost lies between [`Self::MIN`] and [`Self::MAX`].
    #[must_use]
    pub fn is_acceptable(&self) -> bool {
        (Self::MIN.memory_kib..=Self::MAX.memory_kib).contains(&self.memory_kib)
            && (Self::MIN.passes..=Self::MAX.passes).contains(&self.passes)
            && (Self::MIN.lanes..=Self::MAX.lanes).contains(&self.lanes)
    }
}

/// Why there is no local wrapper. Names the source, never the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// It cannot be read.
    #[error("{origin} cannot be read: {reason}")]
    Unreadable {
        /// The source.
        origin: String,
        /// What the system says.
        reason: String,
    },
    /// Others can read it.
    #[error("{path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`")]
    TooOpen {
        /// The file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// Not 32 bytes, nor their hexadecimal or base64 form.
    #[error("{origin} holds no master key: 32 bytes, raw or as 64 hexadecimal digits or base64")]
    NotAMasterKey {
        /// The source.
        origin: String,
    },
    /// One byte repeated is a placeholder, not a key.
    #[error("{origin} holds a placeholder, not a random master key")]
    Placeholder {
        /// The source.
        origin: String,
    },
    /// Fewer than 8 characters, or not text.
    #[error("{origin} holds no passphrase: UTF-8 text of at least 8 characters")]
    NotAPassphrase {
        /// The source.
        origin: String,
    },
    /// Outside [`PassphraseParams::MIN`] to [`PassphraseParams::MAX`].
    #[error(
        "the cost of the passphrase must be 19456 to 1048576 KiB, 2 to 16 passes, 1 to 16 lanes"
    )]
    Cost,
    /// The cryptographic library failed.
    #[error(transparent)]
    Crypto(#[from] CryptoFailure),
}

impl From<LocalError> for WrapError {
    fn from(error: LocalError) -> Self {
        Self::Config(error.to_string())
    }
}

impl MasterKeySource {
    /// Where the secret lies.
    #[must_use]
    pub fn origin(&self) -> SecretSource {
        match self {
            Self::File(path) => SecretSource::File(path.clone()),
            Self::Env(name) => SecretSource::Env(name.clone()),
            Self::Credential(name) => SecretSource::Credential(name.clone()),
            Self::Ssm(name) => SecretSource::Ssm(name.clone()),
            Self::Passphrase { from, .. } => from.clone(),
        }
    }
}

impl From<SecretSource> for MasterKeySource {
    /// A master key that lies there.
    fn from(source: SecretSource) -> Self {
        match source {
            SecretSource::File(path) => Self::File(path),
            SecretSource::Env(name) => Self::Env(name),
            SecretSource::Credential(name) => Self::Credential(name),
            SecretSource::Ssm(name) => Self::Ssm(name),
        }
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::Credential(name) => write!(f, "credential {name}"),
            Self::Ssm(name) => write!(f, "SSM parameter {name}"),
        }
    }
}

impl SecretSource {
    fn unreadable(&self, reason: impl fmt::Display) -> LocalError {
        LocalError::Unreadable { origin: self.to_string(), reason: reason.to_string() }
    }

    /// The secret as it is now, up to 64 KiB.
    ///
    /// # Errors
    /// [`LocalError`] if it is not to be had, with the reason; SSM parameters are to be
    /// [resolved](crate::bootstrap::resolve) instead.
    pub fn read_now(&self) -> Result<Zeroizing<Vec<u8>>, LocalError> {
        self.read(64 * 1024)
    }

    /// The secret bytes, at most `limit` of them.
    pub(crate) fn read(&self, limit: usize) -> Result<Zeroizing<Vec<u8>>, LocalError> {
        let read = |path, private| self.read_file(path, private, limit);
        match self {
            Self::File(path) => read(path.clone(), true),
            Self::Credential(name) => {
                if name.is_empty() || name.starts_with('.') || name.contains('/') {
                    return Err(self.unreadable("not the name of a credential"));
                }
                match std::env::var_os("CREDENTIALS_DIRECTORY") {
                    Some(directory) => read(PathBuf::from(directory).join(name), false),
                    None => Err(self.unreadable("CREDENTIALS_DIRECTORY is not set")),
                }
            }
            Self::Env(name) => {
                if name.is_empty() || name.contains(['=', '\0']) {
                    return Err(self.unreadable("not the name of a variable"));
                }
                let value = std::env::var_os(name).ok_or_else(|| self.unreadable("not set"))?;
                let value = Zeroizing::new(value.into_encoded_bytes());
                if value.len() > limit {
                    return Err(self.too_long(limit));
                }
                Ok(value)
            }
            Self::Ssm(_) => Err(self.unreadable("a network service: resolve it first")),
        }
    }

    fn too_long(&self, limit: usize) -> LocalError {
        self.unreadable(format_args!("longer than {} KiB", limit / 1024))
    }

    fn read_file(
        &self,
        path: PathBuf,
        private: bool,
        limit: usize,
    ) -> Result<Zeroizing<Vec<u8>>, LocalError> {
        let fail = |e: io::Error| self.unreadable(e);
        // Without this, opening a pipe would wait for its writer.
        if !std::fs::metadata(&path).map_err(fail)?.is_file() {
            return Err(self.unreadable("not a regular file"));
        }
        let file = File::open(&path).map_err(fail)?;
        // Of what was opened, whatever the name has come to mean since.
        let metadata = file.metadata().map_err(fail)?;
        if !metadata.is_file() {
            return Err(self.unreadable("not a regular file"));
        }
        let mode = metadata.permissions().mode() & 0o7777;
        if private && mode & 0o077 != 0 {
            return Err(LocalError::TooOpen { path: path.display().to_string(), mode });
        }
        // Large enough from the start: growing would leave copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 64));
        let most = u64::try_from(limit + 1).unwrap_or(u64::MAX);
        file.take(most).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() > limit {
            return Err(self.too_long(limit));
        }
        Ok(bytes)
    }
}

/// Without the line break that editors and `echo` put at the end.
pub(crate) fn without_newline(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    bytes.strip_suffix(b"\r").unwrap_or(bytes)
}

/// 32 bytes as people keep them: raw, in hexadecimal or in base64, with or without a line break.
#[must_use]
pub fn decode_key(raw: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    use data_encoding::{BASE64, BASE64_NOPAD, BASE64URL, BASE64URL_NOPAD, HEXLOWER_PERMISSIVE};
    let text = without_newline(raw);
    let decoded = match (raw.len(), text.len()) {
        (32, _) => Some(Zeroizing::new(raw.to_vec())),
        (_, 64) => HEXLOWER_PERMISSIVE.decode(text).ok().map(Zeroizing::new),
        (_, 43 | 44) => [BASE64, BASE64_NOPAD, BASE64URL, BASE64URL_NOPAD]
            .iter()
            .find_map(|encoding| encoding.decode(text).ok())
            .map(Zeroizing::new),
        _ => None,
    };
    decoded.filter(|bytes| bytes.len() == 32)
}

fn master_key(source: &SecretSource, raw: &[u8]) -> Result<Box<Key>, LocalError> {
    let origin = || source.to_string();
    let decoded = decode_key(raw).ok_or_else(|| LocalError::NotAMasterKey { origin: origin() })?;
    if decoded.iter().all(|b| Some(b) == decoded.first()) {
        return Err(LocalError::Placeholder { origin: origin() });
    }
    // In its place from the start: moving it would leave copies behind.
    let mut key = Box::<Key>::default();
    key.copy_from_slice(&decoded);
    Ok(key)
}

fn passphrase(source: &SecretSource, raw: &[u8]) -> Result<Zeroizing<Vec<u8>>, LocalError> {
    let text = without_newline(raw);
    let long_enough =
        std::str::from_utf8(text).is_ok_and(|t| t.chars().count() >= MIN_PASSPHRASE_CHARS);
    if !long_enough {
        return Err(LocalError::NotAPassphrase { origin: source.to_string() });
    }
    Ok(Zeroizing::new(text.to_vec()))
}

/// A new master key as the text of its file: base64 and a line break.
///
/// # Errors
/// When the random generator fails.
pub fn generate_master_key() -> Result<Zeroizing<String>, CryptoFailure> {
    let key = random::secret::<32>()?;
    let mut text = Zeroizing::new(String::with_capacity(48));
    data_encoding::BASE64.encode_append(key.as_slice(), &mut text);
    text.push('\n');
    Ok(text)
}

enum Secret {
    MasterKey(Box<Key>),
    Passphrase { passphrase: Zeroizing<Vec<u8>>, params: PassphraseParams },
}

/// A master key or a passphrase as a [`KeyWrapper`].
///
/// With a passphrase, wrapping and unwrapping compute for some 0.2 s on the thread that polls.
pub struct LocalWrapper {
    id: WrapperId,
    secret: Secret,
}

impl LocalWrapper {
    /// Reads the secret and checks it.
    ///
    /// # Errors
    /// See [`LocalError`].
    pub fn open(source: &MasterKeySource) -> Result<Self, LocalError> {
        let from = source.origin();
        Self::of(source, &from.read(MAX_SOURCE_LEN)?)
    }

    /// The wrapper of a secret that was read already, by [`crate::bootstrap::resolve`].
    ///
    /// # Errors
    /// See [`LocalError`].
    pub fn of(source: &MasterKeySource, value: &[u8]) -> Result<Self, LocalError> {
        match source {
            MasterKeySource::Passphrase { from, params } => {
                Self::of_passphrase(from, value, *params)
            }
            _ => Self::of_master_key(&source.origin(), value),
        }
    }

    /// The wrapper of a passphrase that was read already, by [`crate::bootstrap::resolve`], from
    /// `origin`.
    ///
    /// # Errors
    /// See [`LocalError`].
    pub fn of_passphrase(
        origin: &SecretSource,
        value: &[u8],
        params: PassphraseParams,
    ) -> Result<Self, LocalError> {
        if !params.is_acceptable() {
            return Err(LocalError::Cost);
        }
        let secret = Secret::Passphrase { passphrase: passphrase(origin, value)?, params };
        Self::new("passphrase".to_owned(), secret)
    }

    /// The wrapper of a master key that was read already, by [`crate::bootstrap::resolve`], from
    /// `origin`.
    ///
    /// # Errors
    /// See [`LocalError`].
    pub fn of_master_key(origin: &SecretSource, value: &[u8]) -> Result<Self, LocalError> {
        let key = master_key(origin, value)?;
        // A random key may be named by a hash of itself, so that a slot of another master key is
        // recognised as such. A passphrase must not: the name would confirm guesses.
        let id = cipher::derive::<8>(key.as_slice(), &[], ID_LABEL, &[])?;
        let id = format!("master-key:{}", data_encoding::HEXLOWER.encode(id.as_slice()));
        Self::new(id, Secret::MasterKey(key))
    }

    fn new(id: String, secret: Secret) -> Result<Self, LocalError> {
        let id = WrapperId::new(id).ok_or(CryptoFailure("unprintable wrapper id"))?;
        Ok(Self { id, secret })
    }

    /// Public parameters for a new wrapped key.
    fn parameters(&self) -> Result<Vec<u8>, CryptoFailure> {
        let mut out = vec![PARAMETERS];
        if let Secret::Passphrase { params, .. } = &self.secret {
            let PassphraseParams { memory_kib, passes, lanes } = params;
            out.extend_from_slice(&memory_kib.to_be_bytes());
            out.extend_from_slice(&passes.to_be_bytes());
            out.extend_from_slice(&lanes.to_be_bytes());
            out.extend_from_slice(&random::array::<ARGON_SALT_LEN>()?);
        }
        Ok(out)
    }

    /// The key of a wrapped key with these parameters, in a place of its own: what is returned by value
    /// leaves copies on the stack.
    fn key(&self, parameters: &[u8]) -> Result<Box<Key>, WrapError> {
        let mut r = Reader::new(parameters);
        if r.u8() != Some(PARAMETERS) {
            return Err(WrapError::Broken);
        }
        match &self.secret {
            Secret::MasterKey(key) => {
                r.finish().ok_or(WrapError::Broken)?;
                let mut copy = Box::<Key>::default();
                copy.copy_from_slice(key.as_slice());
                Ok(copy)
            }
            Secret::Passphrase { passphrase, .. } => {
                let read = |r: &mut Reader<'_>| {
                    let params = PassphraseParams {
                        memory_kib: r.u32()?,
                        passes: r.u32()?,
                        lanes: r.u32()?,
                    };
                    Some((params, r.array()?))
                };
                let (params, salt) = read(&mut r).ok_or(WrapError::Broken)?;
                r.finish().ok_or(WrapError::Broken)?;
                if !params.is_acceptable() {
                    return Err(WrapError::Broken);
                }
                stretch(passphrase, params, salt)
            }
        }
    }

    fn wrap(&self, key: &KeyMaterial, cx: &WrapContext) -> Result<WrappedKey, WrapError> {
        let parameters = self.parameters()?;
        let wrapping = self.key(&parameters)?;
        let ciphertext = self.bind(cx, &parameters, |context| {
            cipher::seal_committed(wrapping.as_slice(), LABEL, context, key.bytes())
        })?;
        Ok(WrappedKey { kind: self.kind(), wrapper: self.id.clone(), parameters, ciphertext })
    }

    fn unwrap(&self, wrapped: &WrappedKey, cx: &WrapContext) -> Result<KeyMaterial, WrapError> {
        let WrappedKey { kind, wrapper, parameters, ciphertext } = wrapped;
        if *kind != self.kind() || *wrapper != self.id {
            return Err(WrapError::NotMine);
        }
        let wrapping = self.key(parameters)?;
        let secret = self
            .bind(cx, parameters, |context| {
                cipher::open_committed(wrapping.as_slice(), LABEL, context, ciphertext)
            })
            .map_err(|_| WrapError::Broken)?;
        KeyMaterial::from_opened(secret).map_err(|_| WrapError::Broken)
    }

    fn bind<T>(&self, cx: &WrapContext, parameters: &[u8], f: impl FnOnce(&[&[u8]]) -> T) -> T {
        let WrapContext { node_id, purpose, slot_id } = cx;
        let wrapper =
            codec::join(&[&self.kind().code().to_be_bytes(), self.id.as_str().as_bytes()]);
        f(&[node_id, purpose.as_bytes(), slot_id, &wrapper, parameters])
    }
}

fn stretch(
    passphrase: &[u8],
    params: PassphraseParams,
    salt: [u8; ARGON_SALT_LEN],
) -> Result<Box<Key>, WrapError> {
    let PassphraseParams { memory_kib, passes, lanes } = params;
    let failed = || WrapError::Config("Argon2id failed: is there enough memory?".to_owned());
    let params = Params::new(memory_kib, passes, lanes, Some(32)).map_err(|_| failed())?;
    let mut memory: Zeroizing<Vec<Block>> = Zeroizing::new(Vec::new());
    memory.try_reserve_exact(params.block_count()).map_err(|_| failed())?;
    memory.resize(params.block_count(), Block::default());
    let mut key = Box::<Key>::default();
    Argon2::new(argon2::Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(
            passphrase,
            &salt,
            key.as_mut_slice(),
            memory.as_mut_slice(),
        )
        .map_err(|_| failed())?;
    Ok(key)
}

impl KeyWrapper for LocalWrapper {
    fn id(&self) -> &WrapperId {
        &self.id
    }

    fn kind(&self) -> SlotKind {
        match self.secret {
            Secret::MasterKey(_) => SlotKind::MasterKey,
            Secret::Passphrase { .. } => SlotKind::Passphrase,
        }
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(async move {
            deadline.check()?;
            let wrapped = self.wrap(key, cx)?;
            deadline.check()?;
            Ok(wrapped)
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
            let key = self.unwrap(wrapped, cx)?;
            deadline.check()?;
            Ok(key)
        })
    }
}

impl fmt::Debug for LocalWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalWrapper").field("id", &self.id.as_str()).finish_non_exhaustive()
    }
}
