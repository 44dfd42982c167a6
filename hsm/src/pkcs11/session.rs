//! In the child: what a session does with the wrapping key.

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
use crate::{CryptoFailure, random};

const TAG_BITS: u64 = 128;
const IV: usize = 12;
/// The modulus of a wrapping key that is made here.
const RSA_BITS: u64 = 3072;

/// The wrapping key: one object of AES, or the two of an RSA pair. Found anew for each request, so
/// that no handle outlives what it names.
pub(super) struct Kek {
    seals: ObjectHandle,
    opens: ObjectHandle,
    rsa: bool,
    /// `pkcs11:TOKEN:KEY`, as wrapped keys record it.
    pub(super) id: String,
    /// Sensitive and not extractable, as the token says.
    pub(super) locked_in: bool,
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
        let (seals, opens, rsa, class) = match (secret.as_slice(), private.as_slice()) {
            ([], []) => return Err(Fault::Lacking(format!("the token has no {key}"))),
            ([one], []) => (*one, *one, false, ObjectClass::SECRET_KEY),
            ([], [opens]) => match search(ObjectClass::PUBLIC_KEY)?.as_slice() {
                [seals] => (*seals, *opens, true, ObjectClass::PRIVATE_KEY),
                [] => {
                    return Err(Fault::Lacking(format!(
                        "the token has no public half of the {key}"
                    )));
                }
                _ => return Err(ambiguous(key)),
            },
            _ => return Err(ambiguous(key)),
        };
        let expected = if rsa { KeyType::RSA } else { KeyType::AES };
        let types = [AttributeType::KeyType, AttributeType::Sensitive, AttributeType::Extractable];
        let attributes = self.session.get_attributes(opens, &types)?;
        if attributes.iter().any(|a| matches!(a, Attribute::KeyType(t) if *t != expected)) {
            // A read that a sick token answers with zeros is no reason to give up.
            return Err(Fault::Lacking(format!("the {key} is neither an AES key nor an RSA pair")));
        }
        let locked_in = attributes.contains(&Attribute::Sensitive(true))
            && attributes.contains(&Attribute::Extractable(false));
        let id = format!("pkcs11:{}:{}", self.token, self.name(class, opens)?);
        Ok(Kek { seals, opens, rsa, id, locked_in })
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

    /// The mechanism for this key: the first candidate with which a secret goes out and comes back.
    pub(super) fn mechanism(
        &mut self,
        kek: &Kek,
        choice: MechanismChoice,
    ) -> Result<WrapMechanism, Fault> {
        if let Some((id, mechanism)) = &self.proven
            && *id == kek.id
            && choice.candidates(kek.rsa).contains(mechanism)
        {
            return Ok(*mechanism);
        }
        let mechanism = self.prove(kek, choice)?;
        self.proven = Some((kek.id.clone(), mechanism));
        Ok(mechanism)
    }

    fn prove(&self, kek: &Kek, choice: MechanismChoice) -> Result<WrapMechanism, Fault> {
        let offered = self.module.get_mechanism_list(self.slot)?;
        let candidates = choice.candidates(kek.rsa);
        let mut reasons = Vec::new();
        let mut hopeless = true;
        for mechanism in candidates {
            if !offered.contains(&mechanism_type(mechanism)) {
                reasons.push(format!("{mechanism}: not offered"));
                continue;
            }
            let secret = random::secret().map_err(|e| Fault::Sick(e.to_string()))?;
            match self.round_trip(kek, mechanism, &[0x5a; 32], &secret) {
                Ok(_) => return Ok(mechanism),
                Err(failure) => {
                    hopeless &= failure.unsupported;
                    reasons.push(format!("{mechanism}: {}", failure.text));
                }
            }
        }
        if reasons.is_empty() {
            let kind = if kek.rsa { "an RSA pair" } else { "an AES key" };
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
        mechanism: WrapMechanism,
        aad: &[u8; 32],
        secret: &Key,
    ) -> Result<Sealed, Failure> {
        let sealed = seal(&self.session, kek, mechanism, aad, secret)?;
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
        let mechanism = self.mechanism(&kek, choice)?;
        let sealed = self
            .round_trip(&kek, mechanism, aad, secret)
            .map_err(|failure| Fault::Sick(format!("{mechanism}: {}", failure.text)))?;
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
    mechanism: WrapMechanism,
    aad: &[u8; 32],
    secret: &Key,
) -> Result<Sealed, Failure> {
    let mut iv = Vec::new();
    let wrapped = match mechanism {
        WrapMechanism::AesGcm => {
            // Some tokens draw their own and write it here.
            iv.extend_from_slice(&random::array::<IV>()?);
            let by = Mechanism::AesGcm(GcmParams::new(&mut iv, aad, TAG_BITS.into())?);
            session.encrypt(&by, kek.seals, secret.as_slice())?
        }
        WrapMechanism::AesKw | WrapMechanism::AesKwp => {
            let mut template = session_secret();
            template.push(Attribute::Value(secret.to_vec()));
            let object = session.create_object(&template);
            if let Some(Attribute::Value(mut copy)) = template.pop() {
                copy.zeroize();
            }
            let object = object?;
            let wrapped = session.wrap_key(&plain(mechanism), kek.seals, object);
            let destroyed = session.destroy_object(object);
            let wrapped = wrapped?;
            destroyed?;
            wrapped
        }
        WrapMechanism::RsaOaepSha256 | WrapMechanism::RsaOaepSha1 => {
            session.encrypt(&plain(mechanism), kek.seals, secret.as_slice())?
        }
    };
    Ok(Sealed { mechanism, iv, wrapped })
}

fn unseal(session: &Session, kek: &Kek, sealed: &Sealed, aad: &[u8; 32]) -> Result<Key, Failure> {
    let Sealed { mechanism, iv, wrapped } = sealed;
    if mechanism.is_rsa() != kek.rsa {
        return Err(Failure::new("the key is of another type"));
    }
    let opened = match mechanism {
        WrapMechanism::AesGcm => {
            let mut iv = iv.clone();
            let by = Mechanism::AesGcm(GcmParams::new(&mut iv, aad, TAG_BITS.into())?);
            session.decrypt(&by, kek.opens, wrapped)?
        }
        WrapMechanism::AesKw | WrapMechanism::AesKwp => {
            let object =
                session.unwrap_key(&plain(*mechanism), kek.opens, wrapped, &session_secret())?;
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
            session.decrypt(&plain(*mechanism), kek.opens, wrapped)?
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
