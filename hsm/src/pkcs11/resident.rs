//! In the child: keys that live in the token, never leave it and work there.

use aws_lc_rs::digest;
use cryptoki::error::Error;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use zeroize::Zeroizing;

use super::ResidentKey;
use super::device::{Device, Fault, Open};
use super::frame::{KeyReply, KeyRequest, KeyWork};
use super::sealing::{Failure, gcm_seal, rsa_public_key};
use crate::work::{SignInput, SignatureScheme, encrypt_to, verify};
use crate::{Algorithm, PublicKey, Purpose};

/// Marks what was made here: nothing else is found, used or destroyed.
const LABEL: &[u8] = ResidentKey::LABEL;
const IV: usize = 12;
const SAMPLE: &[u8; 32] = b"polykey pairwise consistency 32b";

const P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];

/// A key of the token, found for one request.
struct Found {
    key: ObjectHandle,
    public: Option<PublicKey>,
}

pub(super) fn answer(device: &mut Device, request: &KeyRequest) -> Result<KeyReply, Fault> {
    match &request.work {
        KeyWork::Generate => device.once(|open| open.generate(request)),
        KeyWork::Destroy => device.once(|open| open.destroy(request)),
        // It may be one that was made just before its process ended, so it is looked at like a new one.
        KeyWork::Find => device.with(|open| {
            let found = open.resident(request)?;
            open.check(found, request)
        }),
        KeyWork::Sign { scheme, digest } => device.with(|open| {
            let found = open.resident(request)?;
            let signature = open.sign(&found, *scheme, digest)?;
            Ok(KeyReply::Public(signature))
        }),
        KeyWork::Decrypt { ciphertext } => device.with(|open| {
            let found = open.resident(request)?;
            open.or_failed(&found, request, |open| open.decrypt(&found, ciphertext))
        }),
        KeyWork::Seal { aad, plaintext } => device.with(|open| {
            let found = open.resident(request)?;
            Ok(KeyReply::Public(open.seal(&found, aad, plaintext)?))
        }),
        KeyWork::Open { aad, sealed } => device.with(|open| {
            let found = open.resident(request)?;
            open.or_failed(&found, request, |open| open.open_sealed(&found, aad, sealed))
        }),
    }
}

/// The class of the object that is secret, and the type of the key.
fn kind(algorithm: Algorithm) -> Option<(ObjectClass, KeyType)> {
    match algorithm {
        Algorithm::EcdsaP256 | Algorithm::EcdsaP384 => {
            Some((ObjectClass::PRIVATE_KEY, KeyType::EC))
        }
        Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096 => {
            Some((ObjectClass::PRIVATE_KEY, KeyType::RSA))
        }
        Algorithm::Aes256Gcm => Some((ObjectClass::SECRET_KEY, KeyType::AES)),
        _ => None,
    }
}

fn unsupported(algorithm: Algorithm) -> Fault {
    Fault::Config(format!("keys of type {algorithm} do not live in tokens"))
}

impl Open {
    fn objects(
        &self,
        class: ObjectClass,
        request: &KeyRequest,
    ) -> Result<Vec<ObjectHandle>, Fault> {
        Ok(self.session.find_objects(&[
            Attribute::Token(true),
            Attribute::Class(class),
            Attribute::Id(request.id.clone()),
            Attribute::Label(LABEL.to_vec()),
        ])?)
    }

    fn resident(&self, request: &KeyRequest) -> Result<Found, Fault> {
        let (class, _) = kind(request.algorithm).ok_or_else(|| unsupported(request.algorithm))?;
        let key = match self.objects(class, request)?.as_slice() {
            [] => return Err(Fault::NotThere),
            [one] => *one,
            _ => return Err(Fault::Config("the token has several keys of this id".to_owned())),
        };
        if class == ObjectClass::SECRET_KEY {
            return Ok(Found { key, public: None });
        }
        let mut objects = self.objects(ObjectClass::PUBLIC_KEY, request)?;
        objects.push(key);
        for object in objects {
            if let Some(public) = self.public_key(request.algorithm, object)? {
                return Ok(Found { key, public: Some(public) });
            }
        }
        Err(Fault::Sick(format!("the token shows no public key of type {}", request.algorithm)))
    }

    fn public_key(
        &self,
        algorithm: Algorithm,
        object: ObjectHandle,
    ) -> Result<Option<PublicKey>, Fault> {
        let types = match algorithm {
            Algorithm::EcdsaP256 | Algorithm::EcdsaP384 => &[AttributeType::EcPoint][..],
            _ => &[AttributeType::Modulus, AttributeType::PublicExponent],
        };
        let attributes = self.session.get_attributes(object, types)?;
        let key = match attributes.as_slice() {
            [Attribute::EcPoint(point)] => ec_public_key(algorithm, point),
            _ => rsa_public_key(&attributes),
        };
        Ok(key.filter(|key| key.algorithm == algorithm))
    }

    /// Makes the key, and lets it work once before it counts.
    fn generate(&mut self, request: &KeyRequest) -> Result<KeyReply, Fault> {
        let KeyRequest { id, algorithm, purpose, .. } = request;
        for class in [ObjectClass::SECRET_KEY, ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
            let same = [Attribute::Token(true), Attribute::Class(class), Attribute::Id(id.clone())];
            if !self.session.find_objects(&same)?.is_empty() {
                return Ok(KeyReply::AlreadyThere);
            }
        }
        let writer = self.module.open_rw_session(self.slot)?;
        if let Err(error) = make(&writer, id, *algorithm, *purpose) {
            let failure = Failure::from(error);
            return if failure.unsupported {
                Ok(KeyReply::Unsupported(failure.text))
            } else {
                Err(Fault::Sick(failure.text))
            };
        }
        drop(writer);
        let made = self.resident(request).and_then(|found| self.check(found, request));
        if !matches!(made, Ok(KeyReply::There(_))) {
            self.destroy(request)?;
        }
        made
    }

    /// Whether the key is as it was asked for and works.
    fn check(&mut self, found: Found, request: &KeyRequest) -> Result<KeyReply, Fault> {
        match self.check_locked_in(&found).and_then(|()| self.works(&found, request)) {
            Ok(()) => Ok(KeyReply::There(found.public.map(|public| public.spki_der))),
            Err(failure) if failure.unsupported => Ok(KeyReply::Unsupported(failure.text)),
            Err(failure) => Err(failure.into()),
        }
    }

    fn check_locked_in(&self, found: &Found) -> Result<(), Failure> {
        let types = [AttributeType::Sensitive, AttributeType::Extractable];
        let attributes = self.session.get_attributes(found.key, &types)?;
        let locked_in = attributes.contains(&Attribute::Sensitive(true))
            && attributes.contains(&Attribute::Extractable(false));
        if locked_in {
            Ok(())
        } else {
            Err(Failure::lasting("the token does not keep the key to itself"))
        }
    }

    /// Lets both halves work on the same thing (FIPS 140-3 IG 10.3.A).
    fn works(&mut self, found: &Found, request: &KeyRequest) -> Result<(), Failure> {
        let KeyRequest { algorithm, purpose, .. } = request;
        let not_so = || Failure::lasting("keys of this type do not do this");
        let works = match (&found.public, purpose) {
            (None, _) => {
                let sealed = self.seal(found, b"", SAMPLE)?;
                self.open_sealed(found, b"", &sealed)?.as_slice() == SAMPLE
            }
            (Some(public), Purpose::Sign) => {
                let scheme = SignatureScheme::default_for(*algorithm).ok_or_else(not_so)?;
                let by = scheme.digest().ok_or_else(not_so)?;
                let digest = digest::digest(by, SAMPLE);
                let signature = self.sign(found, scheme, digest.as_ref())?;
                let input = SignInput::Digest(digest.as_ref());
                verify(*algorithm, scheme, public, input, &signature) == Ok(true)
            }
            (Some(public), _) => {
                let sealed = encrypt_to(*algorithm, public, SAMPLE)
                    .map_err(|e| Failure::new(&e.to_string()))?;
                self.decrypt(found, &sealed)?.as_slice() == SAMPLE
            }
        };
        if works { Ok(()) } else { Err(Failure::lasting("the token's key does not work")) }
    }

    /// A plaintext; or that it does not open, if the key works on something else.
    fn or_failed(
        &mut self,
        found: &Found,
        request: &KeyRequest,
        mut f: impl FnMut(&mut Self) -> Result<Zeroizing<Vec<u8>>, Failure>,
    ) -> Result<KeyReply, Fault> {
        if let Ok(plaintext) = f(self) {
            return Ok(KeyReply::Secret(plaintext));
        }
        self.works(found, request)?;
        Ok(f(self).map_or(KeyReply::Failed, KeyReply::Secret))
    }

    fn sign(
        &self,
        found: &Found,
        scheme: SignatureScheme,
        digest: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        use SignatureScheme as S;
        let pss = |hash_alg, mgf, len: u64| {
            Mechanism::RsaPkcsPss(PkcsPssParams { hash_alg, mgf, s_len: len.into() })
        };
        let (mechanism, prefix) = match scheme {
            S::EcdsaSha256 | S::EcdsaSha384 => (Mechanism::Ecdsa, &[][..]),
            S::RsaPssSha256 => (pss(MechanismType::SHA256, PkcsMgfType::MGF1_SHA256, 32), &[][..]),
            S::RsaPssSha384 => (pss(MechanismType::SHA384, PkcsMgfType::MGF1_SHA384, 48), &[][..]),
            S::RsaPssSha512 => (pss(MechanismType::SHA512, PkcsMgfType::MGF1_SHA512, 64), &[][..]),
            S::RsaPkcs1Sha256 => (Mechanism::RsaPkcs, SHA256_INFO),
            S::RsaPkcs1Sha384 => (Mechanism::RsaPkcs, SHA384_INFO),
            S::RsaPkcs1Sha512 => (Mechanism::RsaPkcs, SHA512_INFO),
            _ => return Err(Failure::lasting("a token does not sign so")),
        };
        let input = [prefix, digest].concat();
        let signature = self.session.sign(&mechanism, found.key, &input)?;
        if matches!(scheme, S::EcdsaSha256 | S::EcdsaSha384) {
            return ecdsa_der(&signature)
                .ok_or_else(|| Failure::new("C_Sign gave no ECDSA signature"));
        }
        Ok(signature)
    }

    fn decrypt(&self, found: &Found, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let oaep = PkcsOaepParams::new(
            MechanismType::SHA256,
            PkcsMgfType::MGF1_SHA256,
            PkcsOaepSource::empty(),
        );
        let by = Mechanism::RsaPkcsOaep(oaep);
        Ok(Zeroizing::new(self.session.decrypt(&by, found.key, ciphertext)?))
    }

    /// IV 12 ‖ ciphertext ‖ tag 16, opened once before it counts.
    fn seal(&mut self, found: &Found, aad: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, Failure> {
        let ways: &[bool] = if self.token_iv { &[true] } else { &[false, true] };
        let mut first = None;
        for &token_iv in ways {
            match gcm_seal(&self.session, found.key, token_iv, aad, plaintext) {
                Err(failure) => first = first.or(Some(failure)),
                Ok((iv, ciphertext)) => {
                    let sealed = [iv, ciphertext].concat();
                    let opened = self.open_sealed(found, aad, &sealed)?;
                    if opened.as_slice() != plaintext {
                        return Err(Failure::new("another plaintext came back"));
                    }
                    self.token_iv = token_iv;
                    return Ok(sealed);
                }
            }
        }
        Err(first.unwrap_or_else(|| Failure::new("nothing was tried")))
    }

    fn open_sealed(
        &self,
        found: &Found,
        aad: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let too_short = || Failure::new("too short for a ciphertext");
        let (iv, ciphertext) = sealed.split_at_checked(IV).ok_or_else(too_short)?;
        let mut iv = iv.to_vec();
        let by = Mechanism::AesGcm(GcmParams::new(&mut iv, aad, 128.into())?);
        Ok(Zeroizing::new(self.session.decrypt(&by, found.key, ciphertext)?))
    }

    fn destroy(&mut self, request: &KeyRequest) -> Result<KeyReply, Fault> {
        let writer = self.module.open_rw_session(self.slot)?;
        let mut any = false;
        // The public half last: without it the private one would be found and be of no use.
        for class in [ObjectClass::PRIVATE_KEY, ObjectClass::SECRET_KEY, ObjectClass::PUBLIC_KEY] {
            for object in self.objects(class, request)? {
                writer.destroy_object(object)?;
                any = true;
            }
            if !self.objects(class, request)?.is_empty() {
                return Err(Fault::Sick("C_DestroyObject left the key where it is".to_owned()));
            }
        }
        Ok(if any { KeyReply::Destroyed } else { KeyReply::NotThere })
    }
}

fn make(writer: &Session, id: &[u8], algorithm: Algorithm, purpose: Purpose) -> Result<(), Error> {
    let signs = purpose == Purpose::Sign;
    let named =
        [Attribute::Token(true), Attribute::Id(id.to_vec()), Attribute::Label(LABEL.to_vec())];
    // Tokens differ in what they add unasked, so that what a key may not do is said as well.
    let locked = [
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Sign(signs),
        Attribute::Decrypt(!signs),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
    ];
    if algorithm == Algorithm::Aes256Gcm {
        let usage = [
            Attribute::ValueLen(32.into()),
            Attribute::Encrypt(true),
            Attribute::Wrap(false),
            Attribute::Verify(false),
        ];
        let template = [&named[..], &locked, &usage].concat();
        return writer.generate_key(&Mechanism::AesKeyGen, &template).map(drop);
    }
    let private = [&named[..], &locked].concat();
    let (mechanism, specific) = match algorithm {
        Algorithm::EcdsaP256 => {
            (Mechanism::EccKeyPairGen, vec![Attribute::EcParams(P256.to_vec())])
        }
        Algorithm::EcdsaP384 => {
            (Mechanism::EccKeyPairGen, vec![Attribute::EcParams(P384.to_vec())])
        }
        other => {
            let bits = match other {
                Algorithm::Rsa2048 => 2048,
                Algorithm::Rsa3072 => 3072,
                _ => 4096,
            };
            let modulus = Attribute::ModulusBits(bits.into());
            (Mechanism::RsaPkcsKeyPairGen, vec![modulus, Attribute::PublicExponent(vec![1, 0, 1])])
        }
    };
    let usage = [
        Attribute::Private(false),
        Attribute::Verify(signs),
        Attribute::Encrypt(!signs),
        Attribute::Wrap(false),
    ];
    let public = [&named[..], &usage, &specific].concat();
    writer.generate_key_pair(&mechanism, &public, &private).map(drop)
}

/// CKA_EC_POINT is an OCTET STRING around the point; some tokens leave that away.
fn ec_public_key(algorithm: Algorithm, point: &[u8]) -> Option<PublicKey> {
    let bare = match point {
        [0x04, len, bare @ ..] if usize::from(*len) == bare.len() => bare,
        bare => bare,
    };
    let key = PublicKey::from_raw(algorithm, bare.strip_prefix(&[4])?)?;
    PublicKey::from_spki(algorithm, &key.spki_der).ok()
}

/// r ‖ s as a DER Ecdsa-Sig-Value (RFC 3279), up to P-384 in the short form of lengths.
fn ecdsa_der(signature: &[u8]) -> Option<Vec<u8>> {
    let half = signature.len() / 2;
    if !signature.len().is_multiple_of(2) || !(32..=48).contains(&half) {
        return None;
    }
    let mut body = Vec::with_capacity(2 * (half + 3));
    for number in [signature.get(..half)?, signature.get(half..)?] {
        let zeros = number.iter().take_while(|byte| **byte == 0).count();
        let number = number.get(zeros..)?;
        let sign = usize::from(number.first()? & 0x80 != 0);
        body.extend_from_slice(&[0x02, u8::try_from(number.len() + sign).ok()?]);
        body.extend(std::iter::repeat_n(0, sign));
        body.extend_from_slice(number);
    }
    let mut out = vec![0x30, u8::try_from(body.len()).ok().filter(|len| *len < 0x80)?];
    out.extend_from_slice(&body);
    Some(out)
}

/// DigestInfo up to the digest (RFC 8017, 9.2, note 1).
const SHA256_INFO: &[u8] = &[
    0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05,
    0x00, 0x04, 0x20,
];
const SHA384_INFO: &[u8] = &[
    0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05,
    0x00, 0x04, 0x30,
];
const SHA512_INFO: &[u8] = &[
    0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05,
    0x00, 0x04, 0x40,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_der_with_minimal_numbers() {
        let mut raw = vec![0; 64];
        raw[31] = 0x7f;
        raw[32] = 0x80;
        let der = ecdsa_der(&raw).unwrap();
        assert_eq!(der[..5], [0x30, 38, 0x02, 1, 0x7f]);
        assert_eq!(der[5..9], [0x02, 33, 0, 0x80]);
        assert_eq!(der.len(), 40);
        assert_eq!(ecdsa_der(&[0; 64]), None, "neither is ever zero");
        assert_eq!(ecdsa_der(&raw[1..]), None);
        assert_eq!(ecdsa_der(&raw[..32]), None);
        assert_eq!(ecdsa_der(&[0xff; 96]).unwrap().len(), 2 + 2 * 51);
    }
}
