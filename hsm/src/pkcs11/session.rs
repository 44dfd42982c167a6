//! In the child: what a session does with the wrapping key.

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
use data_encoding::HEXLOWER;
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, Zeroizing};

use super::config::{KeySelector, MechanismChoice, WrapMechanism};
use super::device::{Fault, Open, say};
use super::frame::Sealed;
use crate::cipher::Key;
use crate::{Algorithm, CryptoFailure, PublicKey, random};

const TAG_BITS: u64 = 128;
const IV: usize = 12;
/// The modulus of a wrapping key that is made here.
const RSA_BITS: u64 = 3072;

/// The wrapping key: an AES key, or the private half of an RSA pair. Found anew for each request,
/// so that no handle outlives what it names.
pub(super) struct Kek {
    key: ObjectHandle,
    /// Of an RSA pair. Encryption to it needs no token, and many do not offer it.
    public: Option<PublicKey>,
    /// `pkcs11:TOKEN:KEY`, as wrapped keys record it.
    pub(super) id: String,
    /// Sensitive and not extractable, as the token says.
    pub(super) locked_in: bool,
}

impl Kek {
    fn is_rsa(&self) -> bool {
        self.public.is_some()
    }
}

/// A mechanism as it was found to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) mechanism: WrapMechanism,
    /// Whether the token draws the IV of AES-GCM itself and refuses another (AWS CloudHSM).
    token_iv: bool,
}

/// How an unwrapping ended on a token that works.
pub(super) enum Opened {
    Secret(Key),
    Broken,
    NotMine,
}

fn template(class: ObjectClass, key: &KeySelector) -> Vec<Attribute> {
    let mut template = vec![Attribute::Token(true), Attribute::Class(class)];
    template.extend(key.label.as_ref().map(|label| Attribute::Label(label.as_bytes().to_vec())));
    template.extend(key.id.as_ref().map(|id| Attribute::Id(id.clone())));
    template
}

impl Open {
    pub(super) fn find(&self, key: &KeySelector) -> Result<Kek, Fault> {
        let search = |class| self.session.find_objects(&template(class, key));
        let secret = search(ObjectClass::SECRET_KEY)?;
        let private = search(ObjectClass::PRIVATE_KEY)?;
        let (handle, class) = match (secret.as_slice(), private.as_slice()) {
            ([], []) => return Err(Fault::Lacking(format!("the token has no {key}"))),
            ([one], []) => (*one, ObjectClass::SECRET_KEY),
            ([], [one]) => (*one, ObjectClass::PRIVATE_KEY),
            _ => return Err(ambiguous(key)),
        };
        let types = [AttributeType::KeyType, AttributeType::Sensitive, AttributeType::Extractable];
        let attributes = self.session.get_attributes(handle, &types)?;
        let is = |kind| attributes.contains(&Attribute::KeyType(kind));
        let public = if class == ObjectClass::PRIVATE_KEY && is(KeyType::RSA) {
            Some(self.rsa_public(key, handle)?)
        } else if class == ObjectClass::SECRET_KEY && is(KeyType::AES) {
            None
        } else {
            // A read that a sick token answers with zeros is no reason to give up.
            return Err(Fault::Lacking(format!("the {key} is neither an AES key nor an RSA pair")));
        };
        let locked_in = attributes.contains(&Attribute::Sensitive(true))
            && attributes.contains(&Attribute::Extractable(false));
        let id = format!("pkcs11:{}:{}", self.token, self.name(class, handle)?);
        Ok(Kek { key: handle, public, id, locked_in })
    }

    /// The public half, from the private object or, where that does not show it, from its own.
    fn rsa_public(&self, key: &KeySelector, private: ObjectHandle) -> Result<PublicKey, Fault> {
        let mut objects = vec![private];
        objects.extend(self.session.find_objects(&template(ObjectClass::PUBLIC_KEY, key))?);
        let types = [AttributeType::Modulus, AttributeType::PublicExponent];
        for object in objects {
            let attributes = self.session.get_attributes(object, &types)?;
            if let Some(public) = rsa_public_key(&attributes) {
                return Ok(public);
            }
        }
        Err(Fault::Lacking(format!(
            "the {key} is no RSA pair of 2048, 3072 or 4096 bits with the exponent 65537"
        )))
    }

    /// What the key calls itself. A name that does not lead back to the key is not believed: the
    /// wrapped keys that record it would be lost.
    fn name(&self, class: ObjectClass, key: ObjectHandle) -> Result<String, Fault> {
        let read = |attribute| -> Result<Vec<u8>, Fault> {
            match self.session.get_attributes(key, &[attribute])?.pop() {
                Some(Attribute::Id(bytes) | Attribute::Label(bytes)) => Ok(bytes),
                _ => Ok(Vec::new()),
            }
        };
        let leads_back = |attribute| -> Result<bool, Fault> {
            let template = [Attribute::Token(true), Attribute::Class(class), attribute];
            Ok(self.session.find_objects(&template)?.contains(&key))
        };
        let (word, bytes) = match read(AttributeType::Id)? {
            id if !leads_back(Attribute::Id(id.clone()))? => {
                return Err(Fault::Sick("C_GetAttributeValue gave a wrong CKA_ID".to_owned()));
            }
            id if !id.is_empty() => ("id", id),
            _ => ("label", read(AttributeType::Label)?),
        };
        if word == "label" && !leads_back(Attribute::Label(bytes.clone()))? {
            return Err(Fault::Sick("C_GetAttributeValue gave a wrong CKA_LABEL".to_owned()));
        }
        let hex = HEXLOWER.encode(&bytes);
        if hex.len() <= 128 {
            return Ok(format!("{word}-{hex}"));
        }
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
        Ok(format!("{word}-sha256-{}", HEXLOWER.encode(hash.as_ref())))
    }

    /// The way for this key: the first candidate with which a secret goes out and comes back.
    pub(super) fn way(&mut self, kek: &Kek, choice: MechanismChoice) -> Result<Way, Fault> {
        if let Some((id, way)) = &self.proven
            && *id == kek.id
            && choice.candidates(kek.is_rsa()).contains(&way.mechanism)
        {
            return Ok(*way);
        }
        let way = self.prove(kek, choice)?;
        self.proven = Some((kek.id.clone(), way));
        Ok(way)
    }

    fn prove(&self, kek: &Kek, choice: MechanismChoice) -> Result<Way, Fault> {
        let offered = self.module.get_mechanism_list(self.slot)?;
        let mut reasons = Vec::new();
        let mut hopeless = true;
        for mechanism in choice.candidates(kek.is_rsa()) {
            if !offered.contains(&mechanism_type(mechanism)) {
                reasons.push(format!("{mechanism}: not offered"));
                continue;
            }
            let ways: &[bool] =
                if mechanism == WrapMechanism::AesGcm { &[false, true] } else { &[false] };
            for &token_iv in ways {
                let way = Way { mechanism, token_iv };
                let secret = random::secret().map_err(|e| Fault::Sick(e.to_string()))?;
                match self.round_trip(kek, way, &[0x5a; 32], &secret) {
                    Ok(_) => return Ok(way),
                    Err(failure) => {
                        hopeless &= failure.unsupported;
                        reasons.push(format!("{mechanism}: {}", failure.text));
                    }
                }
            }
        }
        if reasons.is_empty() {
            let kind = if kek.is_rsa() { "an RSA pair" } else { "an AES key" };
            return Err(Fault::Config(format!(
                "the configured mechanism does not work with {kind}, which the key is"
            )));
        }
        let text = format!("no mechanism works with this key ({})", reasons.join("; "));
        Err(if hopeless { Fault::Lacking(text) } else { Fault::Sick(text) })
    }

    /// Seals a secret, and sees that it opens again to the same.
    fn round_trip(
        &self,
        kek: &Kek,
        way: Way,
        aad: &[u8; 32],
        secret: &Key,
    ) -> Result<Sealed, Failure> {
        let sealed = seal(&self.session, kek, way, aad, secret)?;
        let back = unseal(&self.session, kek, &sealed, aad)?;
        if bool::from(back.as_slice().ct_eq(secret.as_slice())) {
            Ok(sealed)
        } else {
            Err(Failure::new("another secret came back"))
        }
    }

    pub(super) fn wrap(
        &mut self,
        key: &KeySelector,
        choice: MechanismChoice,
        aad: &[u8; 32],
        secret: &Key,
    ) -> Result<(String, Sealed), Fault> {
        let kek = self.find(key)?;
        let way = self.way(&kek, choice)?;
        let sealed = self
            .round_trip(&kek, way, aad, secret)
            .map_err(|failure| Fault::Sick(format!("{}: {}", way.mechanism, failure.text)))?;
        Ok((kek.id, sealed))
    }

    pub(super) fn unwrap(
        &mut self,
        key: &KeySelector,
        choice: MechanismChoice,
        expected: &str,
        aad: &[u8; 32],
        sealed: &Sealed,
    ) -> Result<(String, Opened), Fault> {
        let kek = self.find(key)?;
        // The same key may live in several tokens (a backup, a cluster), another one not.
        let key_of = |id: &str| id.rsplit_once(':').map(|(_, key)| key.to_owned());
        if key_of(&kek.id) != key_of(expected) {
            return Ok((kek.id, Opened::NotMine));
        }
        if let Ok(secret) = unseal(&self.session, &kek, sealed, aad) {
            return Ok((kek.id, Opened::Secret(secret)));
        }
        // The codes do not tell a changed text from a sick token; a secret that makes the way out
        // and back does.
        self.prove(&kek, choice)?;
        let opened = match unseal(&self.session, &kek, sealed, aad) {
            Ok(secret) => Opened::Secret(secret),
            Err(_) => Opened::Broken,
        };
        Ok((kek.id, opened))
    }

    /// Makes what the mechanism needs, an AES-256 key or an RSA pair, which the token never gives
    /// out; refuses where anything of that label or id is there.
    pub(super) fn create(
        &mut self,
        key: &KeySelector,
        choice: MechanismChoice,
    ) -> Result<(), Fault> {
        for one in [key.label.clone().map(KeySelector::label), key.id.clone().map(KeySelector::id)]
            .into_iter()
            .flatten()
        {
            for class in
                [ObjectClass::SECRET_KEY, ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY]
            {
                if !self.session.find_objects(&template(class, &one))?.is_empty() {
                    return Err(Fault::Config(format!(
                        "the token has a {one} already; nothing was made"
                    )));
                }
            }
        }
        let rsa = matches!(choice, MechanismChoice::Only(only) if only.is_rsa());
        let offered = self.module.get_mechanism_list(self.slot)?;
        let gcm = choice.candidates(false).contains(&WrapMechanism::AesGcm)
            && offered.contains(&MechanismType::AES_GCM);
        let id = match &key.id {
            Some(id) => id.clone(),
            None => random::array::<16>().map_err(|e| Fault::Sick(e.to_string()))?.to_vec(),
        };
        let label = key.label.clone().unwrap_or_else(|| "polykey".to_owned());
        let named = [Attribute::Token(true), Attribute::Id(id), Attribute::Label(label.into())];
        let locked =
            [Attribute::Private(true), Attribute::Sensitive(true), Attribute::Extractable(false)];
        // The one session that can write, for as long as this takes.
        let writer = self.module.open_rw_session(self.slot)?;
        if rsa {
            let public = [
                &named[..],
                &[
                    Attribute::Private(false),
                    Attribute::Encrypt(true),
                    Attribute::ModulusBits(RSA_BITS.into()),
                    Attribute::PublicExponent(vec![1, 0, 1]),
                ],
            ]
            .concat();
            let private = [&named[..], &locked, &[Attribute::Decrypt(true)]].concat();
            writer.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private)?;
        } else {
            let usage = [
                Attribute::ValueLen(32.into()),
                Attribute::Encrypt(gcm),
                Attribute::Decrypt(gcm),
                Attribute::Wrap(!gcm),
                Attribute::Unwrap(!gcm),
            ];
            let secret = [&named[..], &locked, &usage].concat();
            writer.generate_key(&Mechanism::AesKeyGen, &secret)?;
        }
        Ok(())
    }
}

fn ambiguous(key: &KeySelector) -> Fault {
    Fault::Config(format!("the token has more than one {key}: name it by label and id"))
}

/// Why one attempt failed, and whether it says that it cannot be done at all.
struct Failure {
    text: String,
    unsupported: bool,
}

impl Failure {
    fn new(text: &str) -> Self {
        Self { text: text.to_owned(), unsupported: false }
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
                        | Code::KeySizeRange,
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

const fn mechanism_type(mechanism: WrapMechanism) -> MechanismType {
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

fn seal(
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
            iv.extend_from_slice(&if token_iv { [0; IV] } else { random::array::<IV>()? });
            let by = Mechanism::AesGcm(GcmParams::new(&mut iv, aad, TAG_BITS.into())?);
            let wrapped = session.encrypt(&by, kek.key, secret.as_slice())?;
            // What was encrypted under a constant IV does not leave this function.
            if iv == [0; IV] {
                return Err(Failure::new("the token drew no IV"));
            }
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
fn rsa_public_key(attributes: &[Attribute]) -> Option<PublicKey> {
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

fn unseal(session: &Session, kek: &Kek, sealed: &Sealed, aad: &[u8; 32]) -> Result<Key, Failure> {
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
            let object =
                session.unwrap_key(&plain(*mechanism), kek.key, wrapped, &session_secret())?;
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
