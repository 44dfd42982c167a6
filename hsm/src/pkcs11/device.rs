//! In the child: the module, the token's slot and a session, brought back rung by rung.
//!
//! No return code is believed to say what is wrong, because modules disagree about them. Whatever
//! fails is tried again in the same session, in a new one, and after the module was finalized and
//! initialized; what fails even then is for a new process.

use std::time::Duration;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::RawAuthPin;

use super::config::{SlotListing, TokenListing, TokenSelector};
use super::frame::Hello;
use super::session::Way;

/// Longer than a module takes to write the file of a token.
const BETWEEN_READINGS: Duration = Duration::from_millis(50);

/// Why something was not done.
#[derive(Debug)]
pub(super) enum Fault {
    /// Perhaps the next rung does it.
    Sick(String),
    /// The token is there and lacks the key or the mechanism, unless a rung says otherwise.
    Lacking(String),
    /// The token is there and lacks a key that lives in it, unless a rung says otherwise.
    NotThere,
    /// The token refused the PIN. Nothing may try it again.
    Pin { token: String, text: String },
    /// No rung changes that.
    Config(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Sick(say(&error))
    }
}

/// A call and its code in a few words.
pub(super) fn say(error: &Error) -> String {
    match error {
        Error::Pkcs11(code, function) => format!("C_{function:?} answered {code:?}"),
        other => other.to_string(),
    }
}

pub(super) struct Device {
    hello: Hello,
    module: Option<Pkcs11>,
    open: Option<Open>,
}

/// A read-only session, logged in: it cannot make or change a key of the token.
pub(super) struct Open {
    pub(super) session: Session,
    pub(super) module: Pkcs11,
    pub(super) slot: Slot,
    /// The serial number, or the slot where that cannot be read.
    pub(super) token: String,
    /// What a key, by its name, was found to wrap with.
    pub(super) proven: Option<(String, Way)>,
    /// Whether the token was seen to draw the IVs of AES-GCM itself.
    pub(super) token_iv: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rung {
    AsIs,
    NewSession,
    Reinitialize,
}

impl Device {
    pub(super) fn new(hello: Hello) -> Self {
        Self { hello, module: None, open: None }
    }

    /// Does it, on as many rungs as it takes.
    pub(super) fn with<T>(
        &mut self,
        mut f: impl FnMut(&mut Open) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut last = Fault::Sick("nothing was tried".to_owned());
        for rung in [Rung::AsIs, Rung::NewSession, Rung::Reinitialize] {
            match self.climb(rung).and_then(&mut f) {
                Err(fault @ (Fault::Sick(_) | Fault::Lacking(_) | Fault::NotThere)) => last = fault,
                done => return done,
            }
        }
        Err(last)
    }

    /// Does it once, in a session that was opened and logged in for it.
    pub(super) fn once<T>(
        &mut self,
        f: impl FnOnce(&mut Open) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        self.with(|_| Ok(()))?;
        self.climb(Rung::NewSession).and_then(f)
    }

    fn climb(&mut self, rung: Rung) -> Result<&mut Open, Fault> {
        if rung != Rung::AsIs {
            self.open = None;
        }
        if rung == Rung::Reinitialize {
            self.reinitialize()?;
        }
        if self.open.is_none() {
            let module = self.module()?;
            self.open = Some(open(module, &self.hello)?);
        }
        self.open.as_mut().ok_or_else(|| Fault::Sick("no session".to_owned()))
    }

    fn reinitialize(&mut self) -> Result<(), Fault> {
        self.open = None;
        if let Some(module) = &self.module {
            // Whether it answers well or not: what counts is that it initializes again.
            let _ = module.clone().finalize();
            initialize(module)?;
        }
        Ok(())
    }

    fn module(&mut self) -> Result<Pkcs11, Fault> {
        if let Some(module) = &self.module {
            return Ok(module.clone());
        }
        let module = Pkcs11::new(&self.hello.module).map_err(|e| match e {
            Error::Pkcs11(..) => Fault::from(e),
            other => {
                let path = self.hello.module.display();
                Fault::Config(format!("the PKCS#11 module {path} cannot be loaded: {other}"))
            }
        })?;
        initialize(&module)?;
        self.module = Some(module.clone());
        Ok(module)
    }

    /// Every slot of the module, whatever token is meant: the fullest of three readings. SoftHSM
    /// leaves a token out while another process, logging in, writes its file.
    pub(super) fn slots(&mut self) -> Result<Vec<SlotListing>, Fault> {
        let ready = |slots: &Vec<SlotListing>| {
            slots.iter().filter(|s| s.token.as_ref().is_some_and(|t| t.initialized)).count()
        };
        let mut fullest = self.reading()?;
        for _ in 0..2 {
            std::thread::sleep(BETWEEN_READINGS);
            self.reinitialize()?;
            let again = self.reading()?;
            if ready(&again) > ready(&fullest) {
                fullest = again;
            }
        }
        Ok(fullest)
    }

    fn reading(&mut self) -> Result<Vec<SlotListing>, Fault> {
        let module = self.module()?;
        let list = |slot: Slot| {
            let description = match module.get_slot_info(slot) {
                Ok(info) if !info.token_present() => {
                    let description = info.slot_description().to_owned();
                    return SlotListing { slot: slot.id(), description, token: None };
                }
                Ok(info) => info.slot_description().to_owned(),
                Err(e) => format!("not readable: {}", say(&e)),
            };
            match module.get_token_info(slot) {
                Ok(info) => {
                    SlotListing { slot: slot.id(), description, token: Some(listing(&info)) }
                }
                Err(e) => {
                    let description = format!("{description}; token not readable: {}", say(&e));
                    SlotListing { slot: slot.id(), description, token: None }
                }
            }
        };
        Ok(module.get_all_slots()?.into_iter().map(list).collect())
    }
}

fn listing(info: &TokenInfo) -> TokenListing {
    TokenListing {
        label: info.label().to_owned(),
        serial: info.serial_number().to_owned(),
        manufacturer: info.manufacturer_id().to_owned(),
        model: info.model().to_owned(),
        initialized: info.token_initialized(),
        pin_low: info.user_pin_count_low(),
        pin_locked: info.user_pin_locked(),
    }
}

fn initialize(module: &Pkcs11) -> Result<(), Fault> {
    match module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn open(module: Pkcs11, hello: &Hello) -> Result<Open, Fault> {
    let (slot, info) = find_slot(&module, &hello.token)?;
    let session = module.open_ro_session(slot)?;
    log_in(&session, hello, (slot, info.as_ref()))?;
    let serial = info.as_ref().map(|info| info.serial_number().trim()).unwrap_or_default();
    let printable = !serial.is_empty() && serial.bytes().all(|b| b.is_ascii_graphic());
    let token = if printable { serial.to_owned() } else { format!("slot-{}", slot.id()) };
    Ok(Open { session, module, slot, token, proven: None, token_iv: false })
}

/// The one slot that holds the token. What is known of it is missing where it cannot be read.
fn find_slot(
    module: &Pkcs11,
    selector: &TokenSelector,
) -> Result<(Slot, Option<TokenInfo>), Fault> {
    let mut found = Vec::new();
    let mut unreadable = String::new();
    for slot in module.get_slots_with_token()? {
        let info = match module.get_token_info(slot) {
            Ok(info) => Some(info),
            Err(e @ Error::Pkcs11(..)) => {
                unreadable = format!(" (slot {}: {})", slot.id(), say(&e));
                continue;
            }
            // The module answered and cryptoki does not understand it: opencryptoki's time is such.
            Err(_) => None,
        };
        let meant = match (selector, &info) {
            (TokenSelector::Slot(id), _) => *id == slot.id(),
            (TokenSelector::Label(label), Some(info)) => info.label() == label,
            (TokenSelector::Serial(serial), Some(info)) => info.serial_number().trim() == serial,
            (_, None) => false,
        };
        if meant {
            found.push((slot, info));
        }
    }
    match (found.pop(), found.len()) {
        (None, _) => Err(Fault::Sick(format!("no {selector} is present{unreadable}"))),
        (Some(only), 0) => Ok(only),
        (Some(_), others) => Err(Fault::Config(format!(
            "{} slots hold a {selector}: name it by its serial number",
            others + 1
        ))),
    }
}

/// What a token is called among those that refused a PIN, however the configuration names it.
fn name(hello: &Hello, slot: Slot, info: Option<&TokenInfo>) -> String {
    match info {
        Some(info) => {
            let (maker, model) = (info.manufacturer_id().trim(), info.model().trim());
            format!("{maker}/{model}/{}", info.serial_number().trim())
        }
        None => format!("{} slot {}", hello.module.display(), slot.id()),
    }
}

fn log_in(
    session: &Session,
    hello: &Hello,
    (slot, info): (Slot, Option<&TokenInfo>),
) -> Result<(), Fault> {
    if let Some(info) = info {
        if !info.login_required() {
            return Ok(());
        }
        if info.user_pin_locked() {
            return Err(Fault::Config(
                "the token's user PIN is locked: unlock it with the vendor's tool".to_owned(),
            ));
        }
        // The last try is a person's, who can read what the token says.
        if info.user_pin_final_try() {
            return Err(Fault::Config(
                "one wrong user PIN more locks the token: log in once with the vendor's tool"
                    .to_owned(),
            ));
        }
    }
    let Some(pin) = &hello.pin else {
        return Err(Fault::Config("this takes a PIN, and none is configured".to_owned()));
    };
    let token = name(hello, slot, info);
    if hello.refused_by.contains(&token) {
        return Err(Fault::Pin { token, text: "it has done so before".to_owned() });
    }
    let pin = RawAuthPin::new(Box::new(pin.to_vec()));
    match session.login_with_raw(UserType::User, &pin) {
        Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
        Err(Error::Pkcs11(
            code @ (RvError::PinIncorrect
            | RvError::PinInvalid
            | RvError::PinLenRange
            | RvError::PinExpired
            | RvError::PinLocked
            | RvError::UserPinNotInitialized),
            _,
        )) => Err(Fault::Pin { token, text: format!("C_Login answered {code:?}") }),
        Err(e) => Err(e.into()),
    }
}
