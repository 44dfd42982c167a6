//! In the child: what a session does with the wrapping key.

use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use data_encoding::HEXLOWER;
use subtle::ConstantTimeEq;

use super::config::{KeySelector, MechanismChoice, WrapMechanism};
use super::device::{Fault, Open};
use super::frame::Sealed;
use super::sealing::{Failure, mechanism_type, rsa_public_key, seal, unseal};
use crate::cipher::Key;
use crate::{PublicKey, random};

/// The modulus of a wrapping key that is made here.
const RSA_BITS: u64 = 3072;

/// The wrapping key: an AES key, or the private half of an RSA pair. Found anew for each request,
/// so that no handle outlives what it names.
pub(super) struct Kek {
    pub(super) key: ObjectHandle,
    /// Of an RSA pair. Encryption to it needs no token, and many do not offer it.
    pub(super) public: Option<PublicKey>,
    /// `pkcs11:TOKEN:KEY`, as wrapped keys record it.
    pub(super) id: String,
    /// Sensitive and not extractable, as the token says.
    pub(super) locked_in: bool,
}

impl Kek {
    pub(super) fn is_rsa(&self) -> bool {
        self.public.is_some()
    }
}

/// A mechanism as it was found to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) mechanism: WrapMechanism,
    /// Whether the token draws the IV of AES-GCM itself and refuses another (AWS CloudHSM).
    pub(super) token_iv: bool,
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
        let wrong = |what| Fault::Sick(format!("C_GetAttributeValue gave a wrong {what}"));
        let id = read(AttributeType::Id)?;
        let (word, bytes) = if id.is_empty() {
            // Not every token finds what has no id, so that this is read twice instead.
            let label = read(AttributeType::Label)?;
            let no_id = read(AttributeType::Id)?.is_empty();
            if !no_id || label.is_empty() || !leads_back(Attribute::Label(label.clone()))? {
                return Err(wrong("CKA_ID or CKA_LABEL"));
            }
            ("label", label)
        } else if leads_back(Attribute::Id(id.clone()))? {
            ("id", id)
        } else {
            return Err(wrong("CKA_ID"));
        };
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
