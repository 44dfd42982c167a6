//! Public keys: one strict encoding for each algorithm, checked before it is believed.

use aws_lc_rs::agreement;
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_ASN1, ECDSA_P256K1_SHA256_ASN1, ECDSA_P384_SHA384_ASN1,
    ECDSA_P521_SHA512_ASN1, RSA_PSS_2048_8192_SHA256, VerificationAlgorithm,
};
use curve25519_dalek::edwards::CompressedEdwardsY;

use super::{Algorithm, layout, ml_kem};

/// The public part of an asymmetric key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    /// What it is a key of.
    pub algorithm: Algorithm,
    /// A DER SubjectPublicKeyInfo (RFC 5280; elliptic curves uncompressed, RFC 5480 and 8410; ML-KEM, RFC 9935;
    /// ML-DSA, RFC 9881). The hybrid X25519MLKEM768 has no registered one: for it, these are the bare ML-KEM-768
    /// encapsulation key (1184 bytes) ‖ X25519 public key (32 bytes), as in draft-ietf-tls-ecdhe-mlkem.
    pub spki_der: Vec<u8>,
}

/// Why bytes or text are not a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublicKeyError {
    /// Not the strict encoding of a key of this type, or of a key that must not be used: a point off the curve or of
    /// small order, another curve, a modulus of another length, a public exponent other than 65537.
    #[error("not a valid public key of type {0}")]
    Malformed(Algorithm),
    /// Nobody has registered such a form.
    #[error("there is no {form} of a public key of type {algorithm}")]
    NoSuchForm {
        /// The type.
        algorithm: Algorithm,
        /// What was asked for, as `PEM`.
        form: &'static str,
    },
    /// A private key was given where a public one belongs; treat it as disclosed.
    #[error("this is a private key where a public key belongs")]
    Private,
}

const LABEL: &str = "PUBLIC KEY";

impl PublicKey {
    /// Takes over a DER SubjectPublicKeyInfo from outside (the own form of the hybrid, see [`Self::spki_der`]).
    ///
    /// # Errors
    /// [`PublicKeyError::Malformed`].
    pub fn from_spki(algorithm: Algorithm, der: &[u8]) -> Result<Self, PublicKeyError> {
        let key = Self::from_record(algorithm, der)?;
        if key.is_sound() { Ok(key) } else { Err(PublicKeyError::Malformed(algorithm)) }
    }

    /// The same for one that was checked when it was stored: only its form is looked at, which costs next to nothing.
    ///
    /// # Errors
    /// [`PublicKeyError::Malformed`].
    pub fn from_record(algorithm: Algorithm, der: &[u8]) -> Result<Self, PublicKeyError> {
        let key = Self { algorithm, spki_der: der.to_vec() };
        if key.raw().is_some() { Ok(key) } else { Err(PublicKeyError::Malformed(algorithm)) }
    }

    /// The bare key: modulus, x ‖ y, or the bytes of its standard.
    pub(crate) fn raw(&self) -> Option<&[u8]> {
        let layout = layout::spki(self.algorithm)?;
        let raw = self.spki_der.strip_prefix(layout.prefix)?.strip_suffix(layout.suffix)?;
        (raw.len() == layout.raw).then_some(raw)
    }

    /// The key of bare bytes as [`Self::raw`] gives them; not yet known to be sound.
    pub(crate) fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Option<Self> {
        let layout = layout::spki(algorithm)?;
        (raw.len() == layout.raw)
            .then(|| Self { algorithm, spki_der: [layout.prefix, raw, layout.suffix].concat() })
    }

    /// Whether the key of the right form is one that can be used.
    fn is_sound(&self) -> bool {
        let Some(raw) = self.raw() else { return false };
        let parses = |by: &'static dyn VerificationAlgorithm| {
            signature::ParsedPublicKey::new(by, &self.spki_der).is_ok()
        };
        match self.algorithm {
            // An INTEGER of DER is minimal, so that after the zero of the layout the first bit is one: the modulus has
            // exactly so many bits.
            Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096 => {
                parses(&RSA_PSS_2048_8192_SHA256)
            }
            Algorithm::EcdsaP256 | Algorithm::EcdhP256 => parses(&ECDSA_P256_SHA256_ASN1),
            Algorithm::EcdsaP384 | Algorithm::EcdhP384 => parses(&ECDSA_P384_SHA384_ASN1),
            Algorithm::EcdsaP521 | Algorithm::EcdhP521 => parses(&ECDSA_P521_SHA512_ASN1),
            Algorithm::EcdsaSecp256k1 => parses(&ECDSA_P256K1_SHA256_ASN1),
            // aws-lc looks at the point only when it verifies.
            Algorithm::Ed25519 => CompressedEdwardsY::from_slice(raw)
                .ok()
                .and_then(|point| point.decompress())
                .is_some_and(|point| !point.is_small_order()),
            Algorithm::X25519 => has_full_order(raw),
            Algorithm::MlKem768 | Algorithm::MlKem1024 => {
                ml_kem::takes_encapsulation(self.algorithm, raw)
            }
            Algorithm::X25519MlKem768 => raw.split_at_checked(1184).is_some_and(|(kem, curve)| {
                ml_kem::takes_encapsulation(Algorithm::MlKem768, kem) && has_full_order(curve)
            }),
            // Every string of the right length is a key (FIPS 204, 7.2).
            Algorithm::MlDsa44 | Algorithm::MlDsa65 | Algorithm::MlDsa87 => true,
            _ => false,
        }
    }

    /// The key in PEM (RFC 7468), ending in a line feed.
    ///
    /// # Errors
    /// [`PublicKeyError::NoSuchForm`] for the hybrid.
    pub fn to_pem(&self) -> Result<String, PublicKeyError> {
        self.has_standard_form("PEM")?;
        pem_rfc7468::encode_string(LABEL, pem_rfc7468::LineEnding::LF, &self.spki_der)
            .map_err(|_| PublicKeyError::Malformed(self.algorithm))
    }

    /// Reads PEM with the label `PUBLIC KEY`, in lines of 64 characters.
    ///
    /// # Errors
    /// As for [`Self::from_spki`]; [`PublicKeyError::NoSuchForm`] for the hybrid; [`PublicKeyError::Private`].
    pub fn from_pem(algorithm: Algorithm, pem: &str) -> Result<Self, PublicKeyError> {
        Self { algorithm, spki_der: Vec::new() }.has_standard_form("PEM")?;
        if pem.contains("PRIVATE KEY") {
            return Err(PublicKeyError::Private);
        }
        match pem_rfc7468::decode_vec(pem.as_bytes()) {
            Ok((LABEL, der)) => Self::from_spki(algorithm, &der),
            _ => Err(PublicKeyError::Malformed(algorithm)),
        }
    }

    pub(super) fn has_standard_form(&self, form: &'static str) -> Result<(), PublicKeyError> {
        let algorithm = self.algorithm;
        let standard = algorithm.is_asymmetric() && algorithm != Algorithm::X25519MlKem768;
        if standard { Ok(()) } else { Err(PublicKeyError::NoSuchForm { algorithm, form }) }
    }
}

/// Whether a shared secret comes of an X25519 public key: aws-lc refuses one of all zeros (RFC 7748, 6.1).
fn has_full_order(public: &[u8]) -> bool {
    agreement::PrivateKey::generate(&agreement::X25519).is_ok_and(|own| {
        let peer = agreement::UnparsedPublicKey::new(&agreement::X25519, public);
        agreement::agree(&own, peer, (), |_| Ok(())).is_ok()
    })
}
