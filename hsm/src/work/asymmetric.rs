//! Work with asymmetric keys: with a [`Pair`], and with a public key alone.

use std::fmt;

use aws_lc_rs::agreement;
use aws_lc_rs::kem::{Ciphertext, DecapsulationKey};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{
    OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey, PublicEncryptingKey,
};
use aws_lc_rs::signature::{
    self, EcdsaKeyPair, Ed25519KeyPair, ParsedPublicKey, PqdsaKeyPair, RsaKeyPair,
    RsaSignatureEncoding, VerificationAlgorithm,
};
use zeroize::Zeroizing;

use super::scheme::Signed;
use super::{SignInput, SignatureScheme, WorkError};
use crate::algorithm::{Family, curve25519, ec, ml_dsa, ml_kem, rsa};
use crate::{Algorithm, CryptoFailure, KeyMaterial, PublicKey, Purpose};

/// The ciphertext of ML-KEM-768 in the hybrid's, which X25519's ephemeral public key follows.
const HYBRID_CIPHERTEXT: usize = 1088;
const PUBLIC_KEY: WorkError = WorkError::input("public_key", "not a valid public key of this type");

/// A private key at work with its public part: parsed once, erased when dropped.
pub struct Pair {
    algorithm: Algorithm,
    purpose: Purpose,
    key: Key,
}

enum Key {
    Ecdsa(EcdsaKeyPair),
    Rsa(RsaKeyPair),
    Oaep { private: OaepPrivateDecryptingKey, public: OaepPublicEncryptingKey },
    Ed25519(Ed25519KeyPair),
    MlDsa(PqdsaKeyPair),
    Agreement(agreement::PrivateKey),
    MlKem(DecapsulationKey),
    Hybrid { kem: DecapsulationKey, curve: agreement::PrivateKey },
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pair({} to {})", self.algorithm, self.purpose)
    }
}

impl Pair {
    /// Parses stored material.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`] where such keys are not made for this or have no private half;
    /// [`WorkError::Material`].
    pub fn new(
        algorithm: Algorithm,
        purpose: Purpose,
        material: &KeyMaterial,
    ) -> Result<Self, WorkError> {
        let wrong = |_| WorkError::Material(algorithm);
        if !algorithm.serves(purpose) {
            return Err(WorkError::WrongPurpose { algorithm, purpose });
        }
        let key = match (Family::of(algorithm), purpose) {
            (Family::Rsa, Purpose::Sign) => {
                Key::Rsa(rsa::parse(algorithm, material).map_err(wrong)?)
            }
            (Family::Rsa, _) => {
                let key = rsa::parse_decrypting(algorithm, material).map_err(wrong)?;
                let unusable = |_| WorkError::Material(algorithm);
                Key::Oaep {
                    public: OaepPublicEncryptingKey::new(key.public_key()).map_err(unusable)?,
                    private: OaepPrivateDecryptingKey::new(key).map_err(unusable)?,
                }
            }
            (Family::Ec, Purpose::Sign) => {
                Key::Ecdsa(ec::parse(algorithm, material).map_err(wrong)?)
            }
            (Family::Ec, _) => {
                Key::Agreement(ec::parse_agreement(algorithm, material).map_err(wrong)?)
            }
            (Family::Ed25519, _) => {
                Key::Ed25519(curve25519::parse_ed25519(material).map_err(wrong)?)
            }
            (Family::X25519, _) => {
                Key::Agreement(curve25519::parse_x25519(material).map_err(wrong)?)
            }
            (Family::MlKem, _) => {
                let kem = ml_kem::parse(algorithm, material).map_err(wrong)?;
                if algorithm == Algorithm::X25519MlKem768 {
                    Key::Hybrid { kem, curve: ml_kem::parse_curve(material).map_err(wrong)? }
                } else {
                    Key::MlKem(kem)
                }
            }
            (Family::MlDsa, _) => Key::MlDsa(ml_dsa::parse(algorithm, material).map_err(wrong)?),
            (Family::Credential | Family::Symmetric, _) => {
                return Err(WorkError::WrongPurpose { algorithm, purpose });
            }
        };
        Ok(Self { algorithm, purpose, key })
    }

    /// What the key is.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// What it was made for.
    #[must_use]
    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    fn wrong_purpose(&self) -> WorkError {
        WorkError::WrongPurpose { algorithm: self.algorithm, purpose: self.purpose }
    }

    /// Signs a message or its digest.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Input`] for a scheme of other keys and for a digest of a wrong length
    /// or where the scheme takes none.
    pub fn sign(
        &self,
        scheme: SignatureScheme,
        input: SignInput<'_>,
    ) -> Result<Vec<u8>, WorkError> {
        if self.purpose != Purpose::Sign {
            return Err(self.wrong_purpose());
        }
        check_scheme(self.algorithm, scheme)?;
        let failed = |_| CryptoFailure("signing failed");
        match (&self.key, input.read(scheme)?) {
            (Key::Ecdsa(pair), signed) => {
                let signature = match signed {
                    Signed::Message(message) => pair.sign(&SystemRandom::new(), message),
                    Signed::Digest(digest) => pair.sign_digest(&digest),
                };
                let signature = signature.map_err(failed)?;
                match field_len(scheme) {
                    None => Ok(signature.as_ref().to_vec()),
                    Some(len) => to_p1363(signature.as_ref(), len)
                        .ok_or(CryptoFailure("signing failed").into()),
                }
            }
            (Key::Rsa(pair), signed) => {
                let encoding = rsa_encoding(scheme).ok_or(SCHEME)?;
                let mut signature = vec![0; pair.public_modulus_len()];
                match signed {
                    Signed::Message(message) => {
                        pair.sign(encoding, &SystemRandom::new(), message, &mut signature)
                    }
                    Signed::Digest(digest) => pair.sign_digest(encoding, &digest, &mut signature),
                }
                .map_err(failed)?;
                Ok(signature)
            }
            (Key::Ed25519(pair), Signed::Message(message)) => {
                Ok(pair.try_sign(message).map_err(failed)?.as_ref().to_vec())
            }
            (Key::MlDsa(pair), Signed::Message(message)) => {
                let mut signature = vec![0; pair.algorithm().signature_len()];
                pair.sign(message, &mut signature).map_err(failed)?;
                Ok(signature)
            }
            _ => Err(self.wrong_purpose()),
        }
    }

    fn oaep(
        &self,
        purpose: Purpose,
    ) -> Result<(&OaepPrivateDecryptingKey, &OaepPublicEncryptingKey), WorkError> {
        match &self.key {
            Key::Oaep { private, public } if self.purpose == purpose => Ok((private, public)),
            _ => Err(self.wrong_purpose()),
        }
    }

    /// Encrypts with RSA-OAEP, SHA-256 and MGF1 with SHA-256, and an empty label (RFC 8017): the bare ciphertext, as
    /// long as the modulus.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Input`] for a plaintext longer than the modulus less 66 bytes.
    pub fn seal_raw(&self, plaintext: &[u8]) -> Result<Vec<u8>, WorkError> {
        seal_oaep(self.oaep(Purpose::Encrypt)?.1, "plaintext", plaintext)
    }

    /// Opens what [`Self::seal_raw`], or anyone with the public key, encrypted.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Failed`].
    pub fn open_raw(&self, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        open_oaep(self.oaep(Purpose::Encrypt)?.0, ciphertext)
    }

    /// Encrypts key material as [`Self::seal_raw`] does a plaintext.
    ///
    /// # Errors
    /// As for [`Self::seal_raw`].
    pub fn wrap(&self, key: &KeyMaterial) -> Result<Vec<u8>, WorkError> {
        seal_oaep(self.oaep(Purpose::Wrap)?.1, "key_material", key.bytes())
    }

    /// Opens what [`Self::wrap`], or anyone with the public key, encrypted.
    ///
    /// # Errors
    /// As for [`Self::open_raw`].
    pub fn unwrap(&self, wrapped: &[u8]) -> Result<KeyMaterial, WorkError> {
        let opened = open_oaep(self.oaep(Purpose::Wrap)?.0, wrapped)?;
        KeyMaterial::from_opened(opened).map_err(|_| WorkError::Failed)
    }

    /// The secret shared with the holder of a peer's public key: the x coordinate at the full length of the field (NIST
    /// SP 800-56A, 5.7.1.2), or the output of X25519 (RFC 7748). Derive keys from it with both public keys in the
    /// context, never use it as a key.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Input`] for anything but a valid public key of the same type, as
    /// SubjectPublicKeyInfo; X25519 keys of small order are none.
    pub fn agree(&self, peer_spki: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        let Key::Agreement(private) = &self.key else { return Err(self.wrong_purpose()) };
        let peer = PublicKey::from_record(self.algorithm, peer_spki).map_err(|_| PUBLIC_KEY)?;
        agree_with(private, &peer.spki_der, PUBLIC_KEY)
    }

    /// The secret that a ciphertext of [`encapsulate`] encloses. A changed one of the right length gives another secret
    /// (FIPS 203, 6.3): only what is made with the secret tells.
    ///
    /// # Errors
    /// [`WorkError::WrongPurpose`]; [`WorkError::Input`] for a wrong length; [`WorkError::Failed`] where the hybrid's
    /// X25519 part is of small order.
    pub fn decapsulate(&self, ciphertext: &[u8]) -> Result<Zeroizing<Vec<u8>>, WorkError> {
        const LENGTH: WorkError = WorkError::input(
            "ciphertext",
            "its length is not that of a ciphertext of this type of key",
        );
        let open = |kem: &DecapsulationKey, ciphertext: &[u8]| {
            let secret =
                kem.decapsulate(Ciphertext::from(ciphertext)).map_err(|_| WorkError::Failed)?;
            Ok(Zeroizing::new(secret.as_ref().to_vec()))
        };
        match &self.key {
            Key::MlKem(kem) => {
                if Some(ciphertext.len()) != ciphertext_len(self.algorithm) {
                    return Err(LENGTH);
                }
                open(kem, ciphertext)
            }
            Key::Hybrid { kem, curve } => {
                let (lattice, point) =
                    ciphertext.split_at_checked(HYBRID_CIPHERTEXT).ok_or(LENGTH)?;
                if point.len() != 32 {
                    return Err(LENGTH);
                }
                let mut secret = open(kem, lattice)?;
                let other = agree_with(curve, point, WorkError::Failed)?;
                Ok(join_secrets(&mut secret, &other))
            }
            _ => Err(self.wrong_purpose()),
        }
    }

    /// Whether both halves come to the same result.
    pub(crate) fn belongs_to(&self, public: &PublicKey) -> Result<bool, WorkError> {
        const MESSAGE: &[u8] = b"polykey pairwise consistency";
        match &self.key {
            Key::Agreement(private) => {
                let failed = |_| CryptoFailure("key agreement failed");
                let other = agreement::PrivateKey::generate(private.algorithm()).map_err(failed)?;
                let other_public = other.compute_public_key().map_err(failed)?;
                let here = agree_with(private, other_public.as_ref(), WorkError::Failed)?;
                let there = agree_with(&other, &public.spki_der, WorkError::Failed)?;
                Ok(here == there)
            }
            Key::MlKem(_) | Key::Hybrid { .. } => {
                let (ciphertext, secret) = encapsulate(self.algorithm, public)?;
                Ok(self.decapsulate(&ciphertext)? == secret)
            }
            Key::Oaep { .. } => Ok(false),
            _ => {
                let scheme =
                    SignatureScheme::default_for(self.algorithm).ok_or(self.wrong_purpose())?;
                let signature = self.sign(scheme, SignInput::Message(MESSAGE))?;
                verify(self.algorithm, scheme, public, SignInput::Message(MESSAGE), &signature)
            }
        }
    }
}

const SCHEME: WorkError = WorkError::input("scheme", "keys of this type do not sign so");

fn check_scheme(algorithm: Algorithm, scheme: SignatureScheme) -> Result<(), WorkError> {
    if scheme.serves(algorithm) { Ok(()) } else { Err(SCHEME) }
}

/// The length of r and of s where a signature is these two; `None` where it is DER.
const fn field_len(scheme: SignatureScheme) -> Option<usize> {
    match scheme {
        SignatureScheme::EcdsaSha256P1363 => Some(32),
        SignatureScheme::EcdsaSha384P1363 => Some(48),
        SignatureScheme::EcdsaSha512P1363 => Some(66),
        _ => None,
    }
}

/// r ‖ s of a DER signature that aws-lc made.
fn to_p1363(der: &[u8], len: usize) -> Option<Vec<u8>> {
    let body = match der {
        [0x30, 0x81, _, body @ ..] => body,
        [0x30, _, body @ ..] => body,
        _ => return None,
    };
    let mut out = Vec::with_capacity(2 * len);
    let mut rest = body;
    for _ in 0..2 {
        let [0x02, length, tail @ ..] = rest else { return None };
        let (number, tail) = tail.split_at_checked(usize::from(*length))?;
        let number = number.strip_prefix(&[0]).unwrap_or(number);
        out.resize(out.len() + len.checked_sub(number.len())?, 0);
        out.extend_from_slice(number);
        rest = tail;
    }
    rest.is_empty().then_some(out)
}

const fn rsa_encoding(scheme: SignatureScheme) -> Option<&'static RsaSignatureEncoding> {
    match scheme {
        SignatureScheme::RsaPssSha256 => Some(&signature::RSA_PSS_SHA256),
        SignatureScheme::RsaPssSha384 => Some(&signature::RSA_PSS_SHA384),
        SignatureScheme::RsaPssSha512 => Some(&signature::RSA_PSS_SHA512),
        SignatureScheme::RsaPkcs1Sha256 => Some(&signature::RSA_PKCS1_SHA256),
        SignatureScheme::RsaPkcs1Sha384 => Some(&signature::RSA_PKCS1_SHA384),
        SignatureScheme::RsaPkcs1Sha512 => Some(&signature::RSA_PKCS1_SHA512),
        _ => None,
    }
}

fn verification(
    algorithm: Algorithm,
    scheme: SignatureScheme,
) -> Option<&'static dyn VerificationAlgorithm> {
    use SignatureScheme as S;
    Some(match (algorithm, scheme) {
        (Algorithm::EcdsaP256, S::EcdsaSha256) => &signature::ECDSA_P256_SHA256_ASN1,
        (Algorithm::EcdsaP256, S::EcdsaSha256P1363) => &signature::ECDSA_P256_SHA256_FIXED,
        (Algorithm::EcdsaSecp256k1, S::EcdsaSha256) => &signature::ECDSA_P256K1_SHA256_ASN1,
        (Algorithm::EcdsaSecp256k1, S::EcdsaSha256P1363) => &signature::ECDSA_P256K1_SHA256_FIXED,
        (Algorithm::EcdsaP384, S::EcdsaSha384) => &signature::ECDSA_P384_SHA384_ASN1,
        (Algorithm::EcdsaP384, S::EcdsaSha384P1363) => &signature::ECDSA_P384_SHA384_FIXED,
        (Algorithm::EcdsaP521, S::EcdsaSha512) => &signature::ECDSA_P521_SHA512_ASN1,
        (Algorithm::EcdsaP521, S::EcdsaSha512P1363) => &signature::ECDSA_P521_SHA512_FIXED,
        (_, S::RsaPssSha256) => &signature::RSA_PSS_2048_8192_SHA256,
        (_, S::RsaPssSha384) => &signature::RSA_PSS_2048_8192_SHA384,
        (_, S::RsaPssSha512) => &signature::RSA_PSS_2048_8192_SHA512,
        (_, S::RsaPkcs1Sha256) => &signature::RSA_PKCS1_2048_8192_SHA256,
        (_, S::RsaPkcs1Sha384) => &signature::RSA_PKCS1_2048_8192_SHA384,
        (_, S::RsaPkcs1Sha512) => &signature::RSA_PKCS1_2048_8192_SHA512,
        (_, S::Ed25519) => &signature::ED25519,
        (Algorithm::MlDsa44, S::MlDsa) => &signature::ML_DSA_44,
        (Algorithm::MlDsa65, S::MlDsa) => &signature::ML_DSA_65,
        (Algorithm::MlDsa87, S::MlDsa) => &signature::ML_DSA_87,
        _ => return None,
    })
}

/// A public key of this type, which no other type's key passes for.
fn expect(algorithm: Algorithm, public: &PublicKey) -> Result<&[u8], WorkError> {
    if public.algorithm != algorithm {
        return Err(PUBLIC_KEY);
    }
    public.raw().ok_or(PUBLIC_KEY)
}

/// Whether a signature is one of this input by the holder of this key: `false` for a wrong one and for anything that is
/// no signature at all.
///
/// # Errors
/// [`WorkError::Input`] for a public key of another type, a scheme of other keys, and a digest of a wrong length or
/// where the scheme takes none.
pub fn verify(
    algorithm: Algorithm,
    scheme: SignatureScheme,
    public: &PublicKey,
    input: SignInput<'_>,
    signature: &[u8],
) -> Result<bool, WorkError> {
    check_scheme(algorithm, scheme)?;
    expect(algorithm, public)?;
    let signed = input.read(scheme)?;
    let by = verification(algorithm, scheme).ok_or(SCHEME)?;
    let key = ParsedPublicKey::new(by, &public.spki_der).map_err(|_| PUBLIC_KEY)?;
    let verified = match signed {
        Signed::Message(message) => key.verify_sig(message, signature),
        Signed::Digest(digest) => key.verify_digest_sig(&digest, signature),
    };
    Ok(verified.is_ok())
}

/// Encrypts to an RSA public key, as [`Pair::seal_raw`] does.
///
/// # Errors
/// [`WorkError::Input`] for a public key of another type, and for a plaintext longer than the modulus less 66 bytes.
pub fn encrypt_to(
    algorithm: Algorithm,
    public: &PublicKey,
    plaintext: &[u8],
) -> Result<Vec<u8>, WorkError> {
    expect(algorithm, public)?;
    if Family::of(algorithm) != Family::Rsa {
        return Err(PUBLIC_KEY);
    }
    let key = PublicEncryptingKey::from_der(&public.spki_der).map_err(|_| PUBLIC_KEY)?;
    let key = OaepPublicEncryptingKey::new(key).map_err(|_| PUBLIC_KEY)?;
    seal_oaep(&key, "plaintext", plaintext)
}

fn seal_oaep(
    key: &OaepPublicEncryptingKey,
    field: &'static str,
    plaintext: &[u8],
) -> Result<Vec<u8>, WorkError> {
    if plaintext.len() > key.max_plaintext_size(&OAEP_SHA256_MGF1SHA256) {
        return Err(WorkError::input(
            field,
            "RSA-OAEP with SHA-256 takes at most as many bytes as the modulus has, less 66",
        ));
    }
    let mut out = vec![0; key.ciphertext_size()];
    let written = key
        .encrypt(&OAEP_SHA256_MGF1SHA256, plaintext, &mut out, None)
        .map_err(|_| CryptoFailure("RSA encryption failed"))?
        .len();
    out.truncate(written);
    Ok(out)
}

pub(crate) fn open_oaep(
    key: &OaepPrivateDecryptingKey,
    ciphertext: &[u8],
) -> Result<Zeroizing<Vec<u8>>, WorkError> {
    let mut out = Zeroizing::new(vec![0; key.min_output_size()]);
    let written = key
        .decrypt(&OAEP_SHA256_MGF1SHA256, ciphertext, &mut out, None)
        .map_err(|_| WorkError::Failed)?
        .len();
    out.truncate(written);
    Ok(out)
}

fn agree_with(
    private: &agreement::PrivateKey,
    peer: &[u8],
    refusal: WorkError,
) -> Result<Zeroizing<Vec<u8>>, WorkError> {
    let peer = agreement::UnparsedPublicKey::new(private.algorithm(), peer);
    agreement::agree(private, peer, refusal, |secret| Ok(Zeroizing::new(secret.to_vec())))
}

const fn ciphertext_len(algorithm: Algorithm) -> Option<usize> {
    match algorithm {
        Algorithm::MlKem768 => Some(HYBRID_CIPHERTEXT),
        Algorithm::MlKem1024 => Some(1568),
        _ => None,
    }
}

/// ML-KEM's secret ‖ X25519's, without leaving either behind in a buffer that has grown.
fn join_secrets(kem: &mut Zeroizing<Vec<u8>>, curve: &[u8]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new([&kem[..], curve].concat())
}

/// A new secret and the ciphertext from which only the holder of this key takes it: 32 bytes, or ML-KEM's 32 ‖ X25519's
/// 32 of the hybrid, whose ciphertext is ML-KEM's 1088 bytes ‖ an ephemeral X25519 public key
/// (draft-ietf-tls-ecdhe-mlkem, as the server sends it). Derive keys from the hybrid's secret with the ciphertext and
/// the public key in the context, as TLS does.
///
/// # Errors
/// [`WorkError::Input`] for a public key of another type or one that is not sound.
pub fn encapsulate(
    algorithm: Algorithm,
    public: &PublicKey,
) -> Result<(Vec<u8>, Zeroizing<Vec<u8>>), WorkError> {
    let raw = expect(algorithm, public)?;
    let to = |raw: &[u8]| {
        let key = ml_kem::encapsulation_key(algorithm, raw).ok_or(PUBLIC_KEY)?;
        let (ciphertext, secret) = key.encapsulate().map_err(|_| PUBLIC_KEY)?;
        Ok((ciphertext.as_ref().to_vec(), Zeroizing::new(secret.as_ref().to_vec())))
    };
    if algorithm != Algorithm::X25519MlKem768 {
        return to(raw);
    }
    let (kem, curve) = raw.split_at_checked(1184).ok_or(PUBLIC_KEY)?;
    let (mut ciphertext, mut secret) = to(kem)?;
    let failed = |_| CryptoFailure("X25519 key generation failed");
    let ephemeral = agreement::PrivateKey::generate(&agreement::X25519).map_err(failed)?;
    let other = agree_with(&ephemeral, curve, PUBLIC_KEY)?;
    ciphertext.extend_from_slice(ephemeral.compute_public_key().map_err(failed)?.as_ref());
    Ok((ciphertext, join_secrets(&mut secret, &other)))
}

#[cfg(test)]
mod tests;
