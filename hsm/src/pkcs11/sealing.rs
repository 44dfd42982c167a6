//! In the child: one secret through one mechanism of the token.

use aws_lc_rs::rsa::{
    OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepAlgorithm, OaepPublicEncryptingKey,
    PublicEncryptingKey,
};
use cryptoki::error::Error;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::{Zeroize, Zeroizing};

use super::config::WrapMechanism;
use super::device::{Fault, say};
use super::frame::Sealed;
use super::session::{Kek, Way};
use crate::cipher::Key;
use crate::{Algorithm, CryptoFailure, PublicKey, random};

const TAG_BITS: u64 = 128;
const IV: usize = 12;

/// Why one attempt failed, and whether it says that it cannot be done at all.
pub(super) struct Failure {
    pub(super) text: String,
    pub(super) unsupported: bool,
}

impl Failure {
    pub(super) fn new(text: &str) -> Self {
        Self { text: text.to_owned(), unsupported: false }
    }

    /// One that trying again does not mend.
    pub(super) fn lasting(text: &str) -> Self {
        Self { text: text.to_owned(), unsupported: true }
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self::Sick(failure.text)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        use cryptoki::error::RvError as Code;
        // Believed only where nothing else works either, and only as far as words go.
        let unsupported = matches!(
            error,
            Error::NullFunctionPointer
                | Error::Pkcs11(
                    Code::MechanismInvalid
                        | Code::MechanismParamInvalid
                        | Code::FunctionNotSupported
                        | Code::ArgumentsBad
                        | Code::KeyTypeInconsistent
                        | Code::KeyFunctionNotPermitted
                        | Code::KeySizeRange
                        | Code::CurveNotSupported
                        | Code::DomainParamsInvalid
                        | Code::AttributeTypeInvalid
                        | Code::AttributeValueInvalid
                        | Code::TemplateInconsistent,
                    _
                )
        );
        Self { text: say(&error), unsupported }
    }
}

impl From<CryptoFailure> for Failure {
    fn from(failure: CryptoFailure) -> Self {
        Self::new(&failure.to_string())
    }
}

pub(super) const fn mechanism_type(mechanism: WrapMechanism) -> MechanismType {
    match mechanism {
        WrapMechanism::AesGcm => MechanismType::AES_GCM,
        WrapMechanism::AesKw => MechanismType::AES_KEY_WRAP,
        WrapMechanism::AesKwp => MechanismType::AES_KEY_WRAP_PAD,
        WrapMechanism::RsaOaepSha256 | WrapMechanism::RsaOaepSha1 => MechanismType::RSA_PKCS_OAEP,
    }
}

/// The mechanisms that need no parameters of the message.
fn plain(mechanism: WrapMechanism) -> Mechanism<'static> {
    let oaep =
        |hash, mgf| Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()));
    match mechanism {
        WrapMechanism::AesGcm | WrapMechanism::AesKw => Mechanism::AesKeyWrap,
        WrapMechanism::AesKwp => Mechanism::AesKeyWrapPad,
        WrapMechanism::RsaOaepSha256 => oaep(MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        WrapMechanism::RsaOaepSha1 => oaep(MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
    }
}

/// An object of the session, which ends with it.
fn session_secret() -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
    ]
}

pub(super) fn seal(
    session: &Session,
    kek: &Kek,
    way: Way,
    aad: &[u8; 32],
    secret: &Key,
) -> Result<Sealed, Failure> {
    let Way { mechanism, token_iv } = way;
    let mut iv = Vec::new();
    let wrapped = match mechanism {
        WrapMechanism::AesGcm => {
            let (drawn, wrapped) = gcm_seal(session, kek.key, token_iv, aad, secret.as_slice())?;
            iv = drawn;
            wrapped
        }
        WrapMechanism::AesKw | WrapMechanism::AesKwp => {
            let mut template = session_secret();
            template.push(Attribute::Value(secret.to_vec()));
            let object = session.create_object(&template);
            if let Some(Attribute::Value(mut copy)) = template.pop() {
                copy.zeroize();
            }
            let object = object?;
            let wrapped = session.wrap_key(&plain(mechanism), kek.key, object);
            let destroyed = session.destroy_object(object);
            let wrapped = wrapped?;
            destroyed?;
            wrapped
        }
        WrapMechanism::RsaOaepSha256 => seal_oaep(kek, &OAEP_SHA256_MGF1SHA256, secret)?,
        WrapMechanism::RsaOaepSha1 => seal_oaep(kek, &OAEP_SHA1_MGF1SHA1, secret)?,
    };
    Ok(Sealed { mechanism, iv, wrapped })
}

/// The IV and ciphertext ‖ tag of AES-GCM. Some tokens draw the IV and write it over what they were
/// given; others insist on it.
pub(super) fn gcm_seal(
    session: &Session,
    key: ObjectHandle,
    token_iv: bool,
    aad: &[u8],
    plaintext: &[u8],
) -> Result<(Vec<u8>, Vec<u8>), Failure> {
    let mut iv = if token_iv { vec![0; IV] } else { random::array::<IV>()?.to_vec() };
    let by = Mechanism::AesGcm(GcmParams::new(&mut iv, aad, TAG_BITS.into())?);
    let sealed = session.encrypt(&by, key, plaintext)?;
    // What was encrypted under a constant IV does not leave this function.
    if iv == [0; IV] {
        return Err(Failure::new("the token drew no IV"));
    }
    Ok((iv, sealed))
}

fn seal_oaep(kek: &Kek, by: &'static OaepAlgorithm, secret: &Key) -> Result<Vec<u8>, Failure> {
    let failed = || Failure::new("encryption to the RSA public key failed");
    let spki = kek.public.as_ref().map(|public| &public.spki_der).ok_or_else(failed)?;
    let key = PublicEncryptingKey::from_der(spki).map_err(|_| failed())?;
    let key = OaepPublicEncryptingKey::new(key).map_err(|_| failed())?;
    let mut out = vec![0; key.ciphertext_size()];
    let sealed = key.encrypt(by, secret.as_slice(), &mut out, None).map_err(|_| failed())?;
    let len = sealed.len();
    out.truncate(len);
    Ok(out)
}

fn without_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}

/// The public key of a modulus and an exponent, if both are there and of a length that is used.
pub(super) fn rsa_public_key(attributes: &[Attribute]) -> Option<PublicKey> {
    let modulus = attributes.iter().find_map(|attribute| match attribute {
        Attribute::Modulus(modulus) => Some(modulus.as_slice()),
        _ => None,
    })?;
    let exponent = attributes.iter().find_map(|attribute| match attribute {
        Attribute::PublicExponent(exponent) => Some(exponent.as_slice()),
        _ => None,
    })?;
    if without_zeros(exponent) != [1, 0, 1] {
        return None;
    }
    let modulus = without_zeros(modulus);
    let algorithm = match modulus.len() {
        256 => Algorithm::Rsa2048,
        384 => Algorithm::Rsa3072,
        512 => Algorithm::Rsa4096,
        _ => return None,
    };
    let key = PublicKey::from_raw(algorithm, modulus)?;
    PublicKey::from_spki(algorithm, &key.spki_der).ok()
}

pub(super) fn unseal(
    session: &Session,
    kek: &Kek,
    sealed: &Sealed,
    aad: &[u8; 32],
) -> Result<Key, Failure> {
    let Sealed { mechanism, iv, wrapped } = sealed;
    if mechanism.is_rsa() != kek.is_rsa() {
        return Err(Failure::new("the key is of another type"));
    }
    let opened = match mechanism {
        WrapMechanism::AesGcm => {
            let mut iv = iv.clone();
            let by = Mechanism::AesGcm(GcmParams::new(&mut iv, aad, TAG_BITS.into())?);
            session.decrypt(&by, kek.key, wrapped)?
        }
        WrapMechanism::AesKw | WrapMechanism::AesKwp => {
            // SoftHSM refuses a length, Thales Luna before firmware 7.9.3 insists on one.
            let with_len = [session_secret(), vec![Attribute::ValueLen(32.into())]].concat();
            let unwrap = |template: &[Attribute]| {
                session.unwrap_key(&plain(*mechanism), kek.key, wrapped, template)
            };
            let object = unwrap(&session_secret()).or_else(|_| unwrap(&with_len))?;
            let value = session.get_attributes(object, &[AttributeType::Value]);
            let destroyed = session.destroy_object(object);
            let value = match value?.pop() {
                Some(Attribute::Value(value)) => value,
                _ => Vec::new(),
            };
            destroyed?;
            value
        }
        WrapMechanism::RsaOaepSha256 | WrapMechanism::RsaOaepSha1 => {
            session.decrypt(&plain(*mechanism), kek.key, wrapped)?
        }
    };
    let opened = Zeroizing::new(opened);
    let mut secret = Key::default();
    if opened.len() != secret.len() {
        return Err(Failure::new("a secret of another length came back"));
    }
    secret.copy_from_slice(&opened);
    Ok(secret)
}
