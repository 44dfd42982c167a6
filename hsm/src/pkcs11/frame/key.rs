//! The requests about keys that live in the token, and their replies.

use zeroize::Zeroizing;

use super::{Writer, bytes, text};
use crate::codec::Reader;
use crate::work::SignatureScheme;
use crate::{Algorithm, Purpose};

/// Something to do with the key of this id.
pub(in crate::pkcs11) struct KeyRequest {
    pub(in crate::pkcs11) id: Vec<u8>,
    pub(in crate::pkcs11) algorithm: Algorithm,
    pub(in crate::pkcs11) purpose: Purpose,
    pub(in crate::pkcs11) work: KeyWork,
}

pub(in crate::pkcs11) enum KeyWork {
    Generate,
    Find,
    Destroy,
    Sign { scheme: SignatureScheme, digest: Vec<u8> },
    Decrypt { ciphertext: Vec<u8> },
    Seal { aad: Vec<u8>, plaintext: Zeroizing<Vec<u8>> },
    Open { aad: Vec<u8>, sealed: Vec<u8> },
}

impl KeyRequest {
    pub(super) fn room(&self) -> usize {
        match &self.work {
            KeyWork::Generate | KeyWork::Find | KeyWork::Destroy | KeyWork::Sign { .. } => 0,
            KeyWork::Decrypt { ciphertext } => ciphertext.len(),
            KeyWork::Seal { aad, plaintext } => aad.len() + plaintext.len(),
            KeyWork::Open { aad, sealed } => aad.len() + sealed.len(),
        }
    }

    pub(super) fn write(&self, w: &mut Writer) {
        let Self { id, algorithm, purpose, work } = self;
        w.bytes(id);
        w.raw(&algorithm.code().to_be_bytes());
        w.text(purpose.name());
        match work {
            KeyWork::Generate => w.u8(1),
            KeyWork::Find => w.u8(2),
            KeyWork::Destroy => w.u8(3),
            KeyWork::Sign { scheme, digest } => {
                w.u8(4);
                w.text(scheme.name());
                w.bytes(digest);
            }
            KeyWork::Decrypt { ciphertext } => {
                w.u8(5);
                w.bytes(ciphertext);
            }
            KeyWork::Seal { aad, plaintext } => {
                w.u8(6);
                w.bytes(aad);
                w.bytes(plaintext);
            }
            KeyWork::Open { aad, sealed } => {
                w.u8(7);
                w.bytes(aad);
                w.bytes(sealed);
            }
        }
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            id: bytes(r)?.to_vec(),
            algorithm: Algorithm::from_code(r.u16()?)?,
            purpose: Purpose::from_name(&text(r)?)?,
            work: match r.u8()? {
                1 => KeyWork::Generate,
                2 => KeyWork::Find,
                3 => KeyWork::Destroy,
                4 => KeyWork::Sign {
                    scheme: SignatureScheme::from_name(&text(r)?)?,
                    digest: bytes(r)?.to_vec(),
                },
                5 => KeyWork::Decrypt { ciphertext: bytes(r)?.to_vec() },
                6 => KeyWork::Seal {
                    aad: bytes(r)?.to_vec(),
                    plaintext: Zeroizing::new(bytes(r)?.to_vec()),
                },
                7 => KeyWork::Open { aad: bytes(r)?.to_vec(), sealed: bytes(r)?.to_vec() },
                _ => return None,
            },
        })
    }
}

pub(in crate::pkcs11) enum KeyReply {
    /// It is there. The public half as SubjectPublicKeyInfo, if it has one.
    There(Option<Vec<u8>>),
    /// A signature or a ciphertext.
    Public(Vec<u8>),
    /// A plaintext.
    Secret(Zeroizing<Vec<u8>>),
    Destroyed,
    AlreadyThere,
    NotThere,
    /// The token works, and this does not open.
    Failed,
    /// The token cannot do it, and nothing was left in it.
    Unsupported(String),
}

impl KeyReply {
    pub(super) fn room(&self) -> usize {
        match self {
            Self::Public(bytes) => bytes.len(),
            Self::Secret(bytes) => bytes.len(),
            _ => 0,
        }
    }

    pub(super) fn write(&self, w: &mut Writer) {
        match self {
            Self::There(public) => {
                w.u8(1);
                w.option(public.as_deref());
            }
            Self::Public(bytes) => {
                w.u8(2);
                w.bytes(bytes);
            }
            Self::Secret(bytes) => {
                w.u8(3);
                w.bytes(bytes);
            }
            Self::Destroyed => w.u8(4),
            Self::AlreadyThere => w.u8(5),
            Self::NotThere => w.u8(6),
            Self::Failed => w.u8(7),
            Self::Unsupported(text) => {
                w.u8(8);
                w.text(text);
            }
        }
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Option<Self> {
        Some(match r.u8()? {
            1 => Self::There(super::option(r)?.map(<[u8]>::to_vec)),
            2 => Self::Public(bytes(r)?.to_vec()),
            3 => Self::Secret(Zeroizing::new(bytes(r)?.to_vec())),
            4 => Self::Destroyed,
            5 => Self::AlreadyThere,
            6 => Self::NotThere,
            7 => Self::Failed,
            8 => Self::Unsupported(text(r)?),
            _ => return None,
        })
    }
}
