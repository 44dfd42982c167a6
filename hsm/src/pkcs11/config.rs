//! What an operator says of a token, and the names that mechanisms have.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use data_encoding::HEXLOWER;

use crate::SecretSource;

/// The longest `CKA_LABEL` or `CKA_ID` that is looked for, in bytes.
pub(super) const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4096;

/// Which token of a module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSelector {
    /// The token with this label, 1 to 32 bytes.
    Label(String),
    /// The token with this serial number, 1 to 16 bytes.
    Serial(String),
    /// Whatever token is in the slot of this number. Some modules number slots anew each time.
    Slot(u64),
}

impl fmt::Display for TokenSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "token labelled {label:?}"),
            Self::Serial(serial) => write!(f, "token with serial number {serial:?}"),
            Self::Slot(slot) => write!(f, "token in slot {slot}"),
        }
    }
}

/// Which key of a token: both where both are given, at least one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeySelector {
    /// Its `CKA_LABEL`, 1 to 255 bytes.
    pub label: Option<String>,
    /// Its `CKA_ID`, 1 to 255 bytes.
    pub id: Option<Vec<u8>>,
}

impl KeySelector {
    /// The key of this label.
    #[must_use]
    pub fn label(label: impl Into<String>) -> Self {
        Self { label: Some(label.into()), id: None }
    }

    /// The key of this id.
    #[must_use]
    pub fn id(id: impl Into<Vec<u8>>) -> Self {
        Self { label: None, id: Some(id.into()) }
    }

    pub(super) fn check(&self) -> Result<(), Pkcs11Error> {
        let fits = |len: usize| (1..=MAX_NAME).contains(&len);
        let label = self.label.as_ref().is_none_or(|label| fits(label.len()));
        let id = self.id.as_ref().is_none_or(|id| fits(id.len()));
        if label && id && (self.label.is_some() || self.id.is_some()) {
            Ok(())
        } else {
            Err(Pkcs11Error::config("a key is named by a label or an id of 1 to 255 bytes"))
        }
    }
}

impl fmt::Display for KeySelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("key")?;
        if let Some(label) = &self.label {
            write!(f, " labelled {label:?}")?;
        }
        if let Some(id) = &self.id {
            write!(f, " with id {}", HEXLOWER.encode(id))?;
        }
        Ok(())
    }
}

macro_rules! mechanisms {
    ($($variant:ident $code:literal $name:literal $doc:literal)*) => {
        /// How a token wraps. The codes are stored.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum WrapMechanism { $(#[doc = $doc] $variant),* }

        impl WrapMechanism {
            /// Every mechanism, in the order in which they are preferred.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The stored code.
            #[must_use]
            pub const fn code(self) -> u8 {
                match self { $(Self::$variant => $code),* }
            }

            /// The mechanism of a stored code.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// The word for it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
        }
    };
}

mechanisms! {
    AesGcm        1 "aes-gcm"         "AES-GCM (NIST SP 800-38D) with the place bound as additional data: CKM_AES_GCM."
    AesKw         2 "aes-kw"          "AES key wrap (RFC 3394): CKM_AES_KEY_WRAP."
    AesKwp        3 "aes-kwp"         "AES key wrap with padding: CKM_AES_KEY_WRAP_PAD, whose padding is the vendor's choice."
    RsaOaepSha256 4 "rsa-oaep-sha256" "RSA-OAEP with SHA-256 (RFC 8017): CKM_RSA_PKCS_OAEP."
    RsaOaepSha1   5 "rsa-oaep-sha1"   "RSA-OAEP with SHA-1, for tokens that know no other; only when asked for."
}

impl WrapMechanism {
    /// Whether its key is an RSA pair, not an AES key.
    #[must_use]
    pub const fn is_rsa(self) -> bool {
        matches!(self, Self::RsaOaepSha256 | Self::RsaOaepSha1)
    }
}

impl fmt::Display for WrapMechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which mechanism new wrapped keys are made with. What is stored says how it opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MechanismChoice {
    /// The first that the token and the key can do, in the order of [`WrapMechanism::ALL`] and
    /// without RSA-OAEP with SHA-1.
    #[default]
    Auto,
    /// This one or none.
    Only(WrapMechanism),
}

impl MechanismChoice {
    /// The choice of a word: `auto` or the name of a mechanism.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "auto" {
            return Some(Self::Auto);
        }
        WrapMechanism::ALL.iter().find(|m| m.name() == name).copied().map(Self::Only)
    }

    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Auto => 0,
            Self::Only(mechanism) => mechanism.code(),
        }
    }

    pub(super) fn from_code(code: u8) -> Option<Self> {
        if code == 0 {
            return Some(Self::Auto);
        }
        WrapMechanism::from_code(code).map(Self::Only)
    }

    /// What may be tried with an AES key, or with an RSA pair.
    pub(super) fn candidates(self, rsa: bool) -> Vec<WrapMechanism> {
        let all = WrapMechanism::ALL.iter().copied();
        all.filter(|m| m.is_rsa() == rsa)
            .filter(|m| match self {
                Self::Auto => *m != WrapMechanism::RsaOaepSha1,
                Self::Only(only) => *m == only,
            })
            .collect()
    }
}

/// A token as an operator describes it. No secret is in it, only where the PIN is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pkcs11Config {
    /// The vendor's module, an absolute path. It is loaded in a process of its own.
    pub module: PathBuf,
    /// Which of its tokens.
    pub token: TokenSelector,
    /// Where the user PIN is; a line break at its end is not part of it.
    pub pin: SecretSource,
    /// How keys are wrapped from now on.
    pub mechanism: MechanismChoice,
    /// How long one call may take before the process is ended and replaced: 100 ms to 60 s.
    pub call_timeout: Duration,
    /// How many calls may wait for the token: 1 to 4096. More are refused at once.
    pub queue: usize,
    /// Variables for the module, such as `SOFTHSM2_CONF`, above the few that are passed on.
    pub environment: Vec<(String, String)>,
}

impl Pkcs11Config {
    /// Calls take 5 s at most unless set otherwise.
    pub const CALL_TIMEOUT: Duration = Duration::from_secs(5);
    /// So many calls wait at most unless set otherwise.
    pub const QUEUE: usize = 64;

    /// A token of a module, with everything else as it usually is.
    #[must_use]
    pub fn new(module: impl Into<PathBuf>, token: TokenSelector, pin: SecretSource) -> Self {
        Self {
            module: module.into(),
            token,
            pin,
            mechanism: MechanismChoice::Auto,
            call_timeout: Self::CALL_TIMEOUT,
            queue: Self::QUEUE,
            environment: Vec::new(),
        }
    }

    /// Looks at what can be told without the device.
    ///
    /// # Errors
    /// [`Pkcs11Error::Config`].
    pub fn check(&self) -> Result<(), Pkcs11Error> {
        let refuse = |text: &str| Err(Pkcs11Error::config(text));
        check_module(&self.module)?;
        match &self.token {
            TokenSelector::Label(label) if !(1..=32).contains(&label.len()) => {
                return refuse("the label of a token is 1 to 32 bytes");
            }
            TokenSelector::Serial(serial) if !(1..=16).contains(&serial.len()) => {
                return refuse("the serial number of a token is 1 to 16 bytes");
            }
            _ => {}
        }
        if !(Duration::from_millis(100)..=Duration::from_secs(60)).contains(&self.call_timeout) {
            return refuse("the timeout of a PKCS#11 call is 100 ms to 60 s");
        }
        if !(1..=4096).contains(&self.queue) {
            return refuse("the queue of a PKCS#11 token holds 1 to 4096 calls");
        }
        check_environment(&self.environment)
    }
}

pub(super) fn check_module(module: &std::path::Path) -> Result<(), Pkcs11Error> {
    if module.is_absolute() && module.as_os_str().len() <= MAX_PATH {
        Ok(())
    } else {
        Err(Pkcs11Error::config("the path of a PKCS#11 module is absolute, at most 4096 bytes"))
    }
}

pub(super) fn check_environment(environment: &[(String, String)]) -> Result<(), Pkcs11Error> {
    let sound = |(name, value): &(String, String)| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    };
    match environment.iter().find(|pair| !sound(pair)) {
        None => Ok(()),
        Some((name, _)) => {
            Err(Pkcs11Error::Config(format!("{name:?} is no environment variable for a module")))
        }
    }
}

/// The program that runs [`super::worker::run`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCommand {
    /// Its path.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl Default for WorkerCommand {
    /// This program with `pkcs11-worker`, even after its file was replaced.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), args: vec!["pkcs11-worker".into()] }
    }
}

/// What a module may see of the server's environment, which may hold master keys.
pub(super) const PASSED_ON: [&str; 16] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "SOFTHSM2_CONF",
    "KRYOPTIC_CONF",
    "YUBIHSM_PKCS11_CONF",
    "ChrystokiConfigurationPath",
    "TPM2_PKCS11_STORE",
    "TPM2_PKCS11_TCTI",
    "DBUS_SESSION_BUS_ADDRESS",
];

/// Why there is no token to speak to. No device was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Pkcs11Error {
    /// It can never work as configured.
    #[error("{0}")]
    Config(String),
    /// The system gave no thread.
    #[error("no thread for the PKCS#11 token: {0}")]
    Thread(String),
}

impl Pkcs11Error {
    fn config(text: &str) -> Self {
        Self::Config(text.to_owned())
    }
}

impl From<Pkcs11Error> for crate::WrapError {
    fn from(error: Pkcs11Error) -> Self {
        match error {
            Pkcs11Error::Config(text) => Self::Config(text),
            Pkcs11Error::Thread(_) => Self::Unavailable { retryable: true },
        }
    }
}

/// A slot of a module, as [`super::Pkcs11Token::list`] finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotListing {
    /// Its number.
    pub slot: u64,
    /// What the module calls it, or why it could not be read.
    pub description: String,
    /// The token in it.
    pub token: Option<TokenListing>,
}

/// A token in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenListing {
    /// Its label.
    pub label: String,
    /// Its serial number.
    pub serial: String,
    /// Who made it.
    pub manufacturer: String,
    /// What it is.
    pub model: String,
    /// Whether it has been set up.
    pub initialized: bool,
    /// Whether a wrong user PIN has been given since the last right one.
    pub pin_low: bool,
    /// Whether the user PIN is locked.
    pub pin_locked: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_lead_back() {
        for &mechanism in WrapMechanism::ALL {
            let only = MechanismChoice::Only(mechanism);
            assert_eq!(WrapMechanism::from_code(mechanism.code()), Some(mechanism));
            assert_eq!(MechanismChoice::from_name(mechanism.name()), Some(only));
            assert_eq!(MechanismChoice::from_code(only.code()), Some(only));
            assert_eq!(only.candidates(mechanism.is_rsa()), [mechanism]);
            assert_eq!(only.candidates(!mechanism.is_rsa()), []);
        }
        assert_eq!(MechanismChoice::from_name("auto"), Some(MechanismChoice::Auto));
        assert_eq!(MechanismChoice::from_name("aes"), None);
        assert_eq!(WrapMechanism::from_code(0), None);
        assert_eq!(MechanismChoice::from_code(6), None);
        assert_eq!(MechanismChoice::Auto.candidates(true), [WrapMechanism::RsaOaepSha256]);
    }

    #[test]
    fn what_can_never_work_is_refused_without_a_device() {
        let good = Pkcs11Config::new(
            "/lib/module.so",
            TokenSelector::Label("polykey".to_owned()),
            SecretSource::Env("PIN".to_owned()),
        );
        assert_eq!(good.check(), Ok(()));
        let label = |label: &str| TokenSelector::Label(label.to_owned());
        let variable = |name: &str| vec![(name.to_owned(), String::new())];
        for bad in [
            Pkcs11Config { module: "module.so".into(), ..good.clone() },
            Pkcs11Config { token: label(""), ..good.clone() },
            Pkcs11Config { token: label(&"x".repeat(33)), ..good.clone() },
            Pkcs11Config { token: TokenSelector::Serial("x".repeat(17)), ..good.clone() },
            Pkcs11Config { call_timeout: Duration::from_millis(99), ..good.clone() },
            Pkcs11Config { call_timeout: Duration::from_secs(61), ..good.clone() },
            Pkcs11Config { queue: 0, ..good.clone() },
            Pkcs11Config { environment: variable("A=B"), ..good.clone() },
            Pkcs11Config { environment: variable(""), ..good.clone() },
        ] {
            assert!(matches!(bad.check(), Err(Pkcs11Error::Config(_))), "{bad:?}");
        }
        assert!(KeySelector::default().check().is_err());
        assert!(KeySelector::label("").check().is_err());
        assert!(KeySelector::id(vec![0; 256]).check().is_err());
        assert!(KeySelector { id: Some(vec![]), ..KeySelector::label("kek") }.check().is_err());
        assert_eq!(KeySelector::label("kek").check(), Ok(()));
    }
}
