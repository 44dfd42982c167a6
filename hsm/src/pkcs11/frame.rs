//! What the two processes say to each other: frames of a stated version, strictly decoded.
//!
//! A frame is a length u32 (of what follows it, at most [`MAX_FRAME`]) ‖ version u8 ‖ kind u8 ‖
//! body, integers big-endian. The parent says one [`Hello`], then one [`Request`] at a time, each
//! of which gets one [`Reply`].

mod key;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use zeroize::Zeroizing;

use super::config::{
    KeySelector, MechanismChoice, SlotListing, TokenListing, TokenSelector, WrapMechanism,
};
use crate::cipher::Key;
use crate::codec::Reader;
pub(super) use key::{KeyReply, KeyRequest, KeyWork};

pub(super) const VERSION: u8 = 2;
/// A hello and a request together fit into a pipe (64 KiB, as a rule), so that writing them seldom waits.
pub(super) const MAX_FRAME: usize = 48 * 1024;

/// The longest value of a data object, in bytes: a frame holds [`MAX_OBJECTS`] of them.
pub(super) const MAX_DATA: usize = 5 * 1024;
/// Data objects of one label: one, and one more for each change that broke off.
pub(super) const MAX_OBJECTS: usize = 8;
/// Most tokens that a hello names.
const MAX_TOKENS: usize = 32;

/// A frame without its length. It may hold a PIN or a secret.
pub(super) type Frame = Zeroizing<Vec<u8>>;

/// The bytes are no frame of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadFrame;

/// Writes a frame and its length.
pub(super) fn write(to: &mut impl Write, frame: &[u8]) -> io::Result<()> {
    if frame.len() > MAX_FRAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let len = u32::try_from(frame.len()).map_err(io::Error::other)?;
    to.write_all(&len.to_be_bytes())?;
    to.write_all(frame)?;
    to.flush()
}

/// Reads a frame; `None` where the other side ended between two.
pub(super) fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut len = [0; 4];
    match from.read(&mut len)? {
        0 => return Ok(None),
        n => from.read_exact(len.get_mut(n..).unwrap_or_default())?,
    }
    let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
    if len > MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut frame = Zeroizing::new(vec![0; len]);
    from.read_exact(&mut frame)?;
    Ok(Some(frame))
}

struct Writer(Frame);

impl Writer {
    /// With room for everything, so that no copy of a secret stays behind by growing.
    fn new(kind: u8, room: usize) -> Self {
        let mut out = Zeroizing::new(Vec::with_capacity(1024 + room));
        out.extend_from_slice(&[VERSION, kind]);
        Self(out)
    }

    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_be_bytes());
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// At most 64 KiB, by the bound of a frame.
    fn bytes(&mut self, bytes: &[u8]) {
        let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&len.to_be_bytes());
        self.0.extend_from_slice(bytes.get(..usize::from(len)).unwrap_or_default());
    }

    /// A text of the other side's, cut to what an operator reads.
    fn text(&mut self, text: &str) {
        let mut end = text.len().min(1024);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(text.get(..end).unwrap_or_default().as_bytes());
    }

    fn option(&mut self, bytes: Option<&[u8]>) {
        self.u8(u8::from(bytes.is_some()));
        if let Some(bytes) = bytes {
            self.bytes(bytes);
        }
    }

    fn key(&mut self, key: &KeySelector) {
        self.option(key.label.as_ref().map(String::as_bytes));
        self.option(key.id.as_deref());
    }

    fn sealed(&mut self, sealed: &Sealed) {
        self.u8(sealed.mechanism.code());
        self.bytes(&sealed.iv);
        self.bytes(&sealed.wrapped);
    }
}

fn bytes<'a>(r: &mut Reader<'a>) -> Option<&'a [u8]> {
    let len = usize::from(r.u16()?);
    r.take(len)
}

fn text(r: &mut Reader<'_>) -> Option<String> {
    Some(std::str::from_utf8(bytes(r)?).ok()?.to_owned())
}

fn flag(r: &mut Reader<'_>) -> Option<bool> {
    match r.u8()? {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn option<'a>(r: &mut Reader<'a>) -> Option<Option<&'a [u8]>> {
    if flag(r)? { bytes(r).map(Some) } else { Some(None) }
}

fn key(r: &mut Reader<'_>) -> Option<KeySelector> {
    let label = match option(r)? {
        Some(label) => Some(std::str::from_utf8(label).ok()?.to_owned()),
        None => None,
    };
    Some(KeySelector { label, id: option(r)?.map(<[u8]>::to_vec) })
}

fn secret(r: &mut Reader<'_>) -> Option<Key> {
    let mut secret = Key::default();
    secret.copy_from_slice(r.take(32)?);
    Some(secret)
}

fn sealed(r: &mut Reader<'_>) -> Option<Sealed> {
    let mechanism = WrapMechanism::from_code(r.u8()?)?;
    Some(Sealed { mechanism, iv: bytes(r)?.to_vec(), wrapped: bytes(r)?.to_vec() })
}

/// The version and kind of a frame, and its body.
fn open(frame: &[u8]) -> Option<(u8, Reader<'_>)> {
    let mut r = Reader::new(frame);
    if r.u8()? != VERSION {
        return None;
    }
    Some((r.u8()?, r))
}

/// A 32-byte secret as a token wrapped it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sealed {
    pub(super) mechanism: WrapMechanism,
    /// Empty where the mechanism has none.
    pub(super) iv: Vec<u8>,
    pub(super) wrapped: Vec<u8>,
}

/// What a child needs before its first request.
pub(super) struct Hello {
    pub(super) module: PathBuf,
    pub(super) token: TokenSelector,
    /// Without one, nothing that takes a login can be asked.
    pub(super) pin: Option<Zeroizing<Vec<u8>>>,
    /// The tokens that have refused this PIN, which none of them is given again.
    pub(super) refused_by: Vec<String>,
}

impl Hello {
    const KIND: u8 = 1;

    pub(super) fn encode(&self) -> Frame {
        let names: usize = self.refused_by.iter().map(|token| token.len() + 2).sum();
        let pin = self.pin.as_ref().map_or(0, |pin| pin.len());
        let room = self.module.as_os_str().len() + pin + names;
        let mut w = Writer::new(Self::KIND, room);
        w.bytes(self.module.as_os_str().as_bytes());
        match &self.token {
            TokenSelector::Label(label) => {
                w.u8(1);
                w.bytes(label.as_bytes());
            }
            TokenSelector::Serial(serial) => {
                w.u8(2);
                w.bytes(serial.as_bytes());
            }
            TokenSelector::Slot(slot) => {
                w.u8(3);
                w.u64(*slot);
            }
        }
        w.option(self.pin.as_ref().map(|pin| pin.as_slice()));
        // As many as fit into a frame; a node has a few tokens.
        let tokens = self.refused_by.get(..MAX_TOKENS).unwrap_or(&self.refused_by);
        w.u8(u8::try_from(tokens.len()).unwrap_or(u8::MAX));
        tokens.iter().for_each(|token| w.text(token));
        w.0
    }

    pub(super) fn decode(frame: &[u8]) -> Result<Self, BadFrame> {
        Self::read(frame).ok_or(BadFrame)
    }

    fn read(frame: &[u8]) -> Option<Self> {
        let (kind, mut r) = open(frame)?;
        if kind != Self::KIND {
            return None;
        }
        let module = std::ffi::OsString::from_vec(bytes(&mut r)?.to_vec()).into();
        let token = match r.u8()? {
            1 => TokenSelector::Label(text(&mut r)?),
            2 => TokenSelector::Serial(text(&mut r)?),
            3 => TokenSelector::Slot(r.u64()?),
            _ => return None,
        };
        let pin = option(&mut r)?.map(|pin| Zeroizing::new(pin.to_vec()));
        let tokens = r.u8()?;
        let refused_by = (0..tokens).map(|_| text(&mut r)).collect::<Option<Vec<_>>>()?;
        r.finish()?;
        Some(Self { module, token, pin, refused_by })
    }
}

/// What a child is asked.
pub(super) enum Request {
    /// Which slots and tokens there are.
    List,
    /// Whether the key is there.
    Find { key: KeySelector, choice: MechanismChoice },
    /// Wrap a secret.
    Wrap { key: KeySelector, choice: MechanismChoice, aad: [u8; 32], secret: Key },
    /// Unwrap one. `expected` is the wrapper's id in what is stored.
    Unwrap {
        key: KeySelector,
        choice: MechanismChoice,
        expected: String,
        aad: [u8; 32],
        sealed: Sealed,
    },
    /// Make the wrapping key, unless one is there.
    Create { key: KeySelector, choice: MechanismChoice },
    /// Something with a key that lives in the token.
    Key(KeyRequest),
    /// What the data objects of this label hold; or put this there instead.
    Data { label: String, value: Option<Vec<u8>> },
}

impl Request {
    /// Whether asking once more does the same and no more.
    pub(super) fn is_repeatable(&self) -> bool {
        match self {
            Self::Create { .. } => false,
            Self::Key(key) => !matches!(key.work, KeyWork::Generate | KeyWork::Destroy),
            _ => true,
        }
    }

    /// Whether a token may take minutes over it.
    pub(super) fn is_slow(&self) -> bool {
        match self {
            Self::Create { .. } => true,
            Self::Key(key) => matches!(key.work, KeyWork::Generate),
            _ => false,
        }
    }

    pub(super) fn encode(&self) -> Frame {
        match self {
            Self::List => Writer::new(16, 0).0,
            Self::Find { key, choice } => {
                let mut w = Writer::new(17, 0);
                w.key(key);
                w.u8(choice.code());
                w.0
            }
            Self::Wrap { key, choice, aad, secret } => {
                let mut w = Writer::new(18, 0);
                w.key(key);
                w.u8(choice.code());
                w.raw(aad);
                w.raw(secret.as_slice());
                w.0
            }
            Self::Unwrap { key, choice, expected, aad, sealed } => {
                let mut w = Writer::new(19, sealed.wrapped.len());
                w.key(key);
                w.u8(choice.code());
                w.text(expected);
                w.raw(aad);
                w.sealed(sealed);
                w.0
            }
            Self::Create { key, choice } => {
                let mut w = Writer::new(20, 0);
                w.key(key);
                w.u8(choice.code());
                w.0
            }
            Self::Key(key) => {
                let mut w = Writer::new(21, key.room());
                key.write(&mut w);
                w.0
            }
            Self::Data { label, value } => {
                let mut w = Writer::new(22, value.as_ref().map_or(0, Vec::len));
                w.text(label);
                w.option(value.as_deref());
                w.0
            }
        }
    }

    pub(super) fn decode(frame: &[u8]) -> Result<Self, BadFrame> {
        Self::read(frame).ok_or(BadFrame)
    }

    fn read(frame: &[u8]) -> Option<Self> {
        let (kind, mut r) = open(frame)?;
        let r = &mut r;
        let request = match kind {
            16 => Self::List,
            17 => Self::Find { key: key(r)?, choice: MechanismChoice::from_code(r.u8()?)? },
            18 => Self::Wrap {
                key: key(r)?,
                choice: MechanismChoice::from_code(r.u8()?)?,
                aad: r.array()?,
                secret: secret(r)?,
            },
            19 => Self::Unwrap {
                key: key(r)?,
                choice: MechanismChoice::from_code(r.u8()?)?,
                expected: text(r)?,
                aad: r.array()?,
                sealed: sealed(r)?,
            },
            21 => Self::Key(KeyRequest::read(r)?),
            20 => Self::Create { key: key(r)?, choice: MechanismChoice::from_code(r.u8()?)? },
            22 => Self::Data { label: text(r)?, value: option(r)?.map(<[u8]>::to_vec) },
            _ => return None,
        };
        r.rest().is_empty().then_some(request)
    }
}

/// What a child answers.
pub(super) enum Reply {
    Slots(Vec<SlotListing>),
    /// The key is there, or has been made.
    Found {
        id: String,
        mechanism: WrapMechanism,
        /// Whether the token says that it never gives the key out.
        locked_in: bool,
    },
    Wrapped {
        id: String,
        sealed: Sealed,
    },
    Secret {
        id: String,
        secret: Key,
    },
    /// The token works, and this does not open.
    Broken {
        id: String,
    },
    /// The key of this id was not asked, because another one wrapped it.
    NotMine {
        id: String,
    },
    /// About a key that lives in the token.
    Key(KeyReply),
    /// What data objects hold.
    Data(Vec<Vec<u8>>),
    /// It cannot work as it is; the child goes on.
    Refused(String),
    /// The token refused the PIN; the child ends.
    PinRefused {
        token: String,
        text: String,
    },
    /// The token is away or does not work; the child ends, and a new one may do better.
    Unavailable(String),
}

impl Reply {
    pub(super) fn encode(&self) -> Frame {
        let only_text = |kind, text: &str| {
            let mut w = Writer::new(kind, 0);
            w.text(text);
            w.0
        };
        match self {
            Self::Slots(slots) => {
                let mut w = Writer::new(32, 0);
                // As many as fit, with room for the longest.
                for slot in slots {
                    if w.0.len() + 6 * 1024 > MAX_FRAME {
                        break;
                    }
                    write_slot(&mut w, slot);
                }
                w.0
            }
            Self::Found { id, mechanism, locked_in } => {
                let mut w = Writer::new(33, 0);
                w.text(id);
                w.u8(mechanism.code());
                w.u8(u8::from(*locked_in));
                w.0
            }
            Self::Wrapped { id, sealed } => {
                let mut w = Writer::new(34, sealed.wrapped.len());
                w.text(id);
                w.sealed(sealed);
                w.0
            }
            Self::Secret { id, secret } => {
                let mut w = Writer::new(35, 0);
                w.text(id);
                w.raw(secret.as_slice());
                w.0
            }
            Self::Broken { id } => only_text(36, id),
            Self::NotMine { id } => only_text(37, id),
            Self::Refused(text) => only_text(38, text),
            Self::PinRefused { token, text } => {
                let mut w = Writer::new(39, 0);
                w.text(token);
                w.text(text);
                w.0
            }
            Self::Unavailable(text) => only_text(40, text),
            Self::Key(key) => {
                let mut w = Writer::new(41, key.room());
                key.write(&mut w);
                w.0
            }
            Self::Data(values) => {
                let mut w = Writer::new(42, values.iter().map(Vec::len).sum());
                w.u8(u8::try_from(values.len()).unwrap_or(u8::MAX));
                values.iter().for_each(|value| w.bytes(value));
                w.0
            }
        }
    }

    pub(super) fn decode(frame: &[u8]) -> Result<Self, BadFrame> {
        Self::read(frame).ok_or(BadFrame)
    }

    fn read(frame: &[u8]) -> Option<Self> {
        let (kind, mut r) = open(frame)?;
        let r = &mut r;
        let reply = match kind {
            32 => {
                let mut slots = Vec::new();
                while let Some(more) = r.u8() {
                    slots.push(read_slot(more, r)?);
                }
                Self::Slots(slots)
            }
            33 => Self::Found {
                id: text(r)?,
                mechanism: WrapMechanism::from_code(r.u8()?)?,
                locked_in: flag(r)?,
            },
            34 => Self::Wrapped { id: text(r)?, sealed: sealed(r)? },
            35 => Self::Secret { id: text(r)?, secret: secret(r)? },
            36 => Self::Broken { id: text(r)? },
            37 => Self::NotMine { id: text(r)? },
            38 => Self::Refused(text(r)?),
            39 => Self::PinRefused { token: text(r)?, text: text(r)? },
            40 => Self::Unavailable(text(r)?),
            41 => Self::Key(KeyReply::read(r)?),
            42 => {
                let values = r.u8()?;
                Self::Data((0..values).map(|_| Some(bytes(r)?.to_vec())).collect::<Option<_>>()?)
            }
            _ => return None,
        };
        r.rest().is_empty().then_some(reply)
    }
}

fn write_slot(w: &mut Writer, slot: &SlotListing) {
    let SlotListing { slot, description, token } = slot;
    w.u8(u8::from(token.is_some()));
    w.u64(*slot);
    w.text(description);
    if let Some(token) = token {
        let TokenListing { label, serial, manufacturer, model, initialized, pin_low, pin_locked } =
            token;
        for text in [label, serial, manufacturer, model] {
            w.text(text);
        }
        for flag in [initialized, pin_low, pin_locked] {
            w.u8(u8::from(*flag));
        }
    }
}

fn read_slot(with_token: u8, r: &mut Reader<'_>) -> Option<SlotListing> {
    let (slot, description) = (r.u64()?, text(r)?);
    let token = match with_token {
        0 => None,
        1 => Some(TokenListing {
            label: text(r)?,
            serial: text(r)?,
            manufacturer: text(r)?,
            model: text(r)?,
            initialized: flag(r)?,
            pin_low: flag(r)?,
            pin_locked: flag(r)?,
        }),
        _ => return None,
    };
    Some(SlotListing { slot, description, token })
}
