//! The ways to sign: how a message becomes what is signed, and how a signature is written down.

use std::fmt;

use aws_lc_rs::digest;

use super::WorkError;
use crate::Algorithm;

macro_rules! schemes {
    ($($variant:ident $name:literal $doc:literal)*) => {
        /// How a key signs. The names never change.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum SignatureScheme { $(#[doc = $doc] $variant),* }

        impl SignatureScheme {
            /// Every scheme, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The word for it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The scheme of a word.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }

            /// What it is, in one sentence.
            #[must_use]
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $doc),* }
            }
        }
    };
}

schemes! {
    EcdsaSha256      "ecdsa-sha256"       "ECDSA with SHA-256 over P-256 or secp256k1, a DER Ecdsa-Sig-Value (RFC 3279)."
    EcdsaSha384      "ecdsa-sha384"       "ECDSA with SHA-384 over P-384, a DER Ecdsa-Sig-Value (RFC 3279)."
    EcdsaSha512      "ecdsa-sha512"       "ECDSA with SHA-512 over P-521, a DER Ecdsa-Sig-Value (RFC 3279)."
    EcdsaSha256P1363 "ecdsa-sha256-p1363" "ECDSA with SHA-256 over P-256 or secp256k1, r and s of 32 bytes each (IEEE P1363, as in JWS)."
    EcdsaSha384P1363 "ecdsa-sha384-p1363" "ECDSA with SHA-384 over P-384, r and s of 48 bytes each (IEEE P1363, as in JWS)."
    EcdsaSha512P1363 "ecdsa-sha512-p1363" "ECDSA with SHA-512 over P-521, r and s of 66 bytes each (IEEE P1363, as in JWS)."
    RsaPssSha256     "rsa-pss-sha256"     "RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 bytes (RFC 8017)."
    RsaPssSha384     "rsa-pss-sha384"     "RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes (RFC 8017)."
    RsaPssSha512     "rsa-pss-sha512"     "RSASSA-PSS with SHA-512, MGF1 with SHA-512 and a salt of 64 bytes (RFC 8017)."
    RsaPkcs1Sha256   "rsa-pkcs1-sha256"   "RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017)."
    RsaPkcs1Sha384   "rsa-pkcs1-sha384"   "RSASSA-PKCS1-v1_5 with SHA-384 (RFC 8017)."
    RsaPkcs1Sha512   "rsa-pkcs1-sha512"   "RSASSA-PKCS1-v1_5 with SHA-512 (RFC 8017)."
    Ed25519          "ed25519"            "Ed25519 over the message itself (RFC 8032)."
    MlDsa            "ml-dsa"             "ML-DSA over the message itself with an empty context (FIPS 204, hedged)."
}

impl SignatureScheme {
    /// The scheme of a key where none is asked for; `None` if such keys do not sign.
    #[must_use]
    pub const fn default_for(algorithm: Algorithm) -> Option<Self> {
        match algorithm {
            Algorithm::EcdsaP256 | Algorithm::EcdsaSecp256k1 => Some(Self::EcdsaSha256),
            Algorithm::EcdsaP384 => Some(Self::EcdsaSha384),
            Algorithm::EcdsaP521 => Some(Self::EcdsaSha512),
            Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096 => {
                Some(Self::RsaPssSha256)
            }
            Algorithm::Ed25519 => Some(Self::Ed25519),
            Algorithm::MlDsa44 | Algorithm::MlDsa65 | Algorithm::MlDsa87 => Some(Self::MlDsa),
            _ => None,
        }
    }

    /// Whether a key of this type can sign so.
    #[must_use]
    pub const fn serves(self, algorithm: Algorithm) -> bool {
        match self {
            Self::EcdsaSha256 | Self::EcdsaSha256P1363 => {
                matches!(algorithm, Algorithm::EcdsaP256 | Algorithm::EcdsaSecp256k1)
            }
            Self::EcdsaSha384 | Self::EcdsaSha384P1363 => matches!(algorithm, Algorithm::EcdsaP384),
            Self::EcdsaSha512 | Self::EcdsaSha512P1363 => matches!(algorithm, Algorithm::EcdsaP521),
            Self::RsaPssSha256
            | Self::RsaPssSha384
            | Self::RsaPssSha512
            | Self::RsaPkcs1Sha256
            | Self::RsaPkcs1Sha384
            | Self::RsaPkcs1Sha512 => {
                matches!(algorithm, Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096)
            }
            Self::Ed25519 => matches!(algorithm, Algorithm::Ed25519),
            Self::MlDsa => {
                matches!(algorithm, Algorithm::MlDsa44 | Algorithm::MlDsa65 | Algorithm::MlDsa87)
            }
        }
    }

    /// What digests the message; `None` where the message itself is signed.
    pub(crate) fn digest(self) -> Option<&'static digest::Algorithm> {
        match self {
            Self::EcdsaSha256
            | Self::EcdsaSha256P1363
            | Self::RsaPssSha256
            | Self::RsaPkcs1Sha256 => Some(&digest::SHA256),
            Self::EcdsaSha384
            | Self::EcdsaSha384P1363
            | Self::RsaPssSha384
            | Self::RsaPkcs1Sha384 => Some(&digest::SHA384),
            Self::EcdsaSha512
            | Self::EcdsaSha512P1363
            | Self::RsaPssSha512
            | Self::RsaPkcs1Sha512 => Some(&digest::SHA512),
            Self::Ed25519 | Self::MlDsa => None,
        }
    }

    /// The length of the digest that can be signed in place of a message, in bytes; `None` where there is none.
    #[must_use]
    pub fn digest_len(self) -> Option<usize> {
        self.digest().map(digest::Algorithm::output_len)
    }
}

impl fmt::Display for SignatureScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignInput<'a> {
    /// A message, of any length.
    Message(&'a [u8]),
    /// The digest of a message, by the scheme's hash function.
    Digest(&'a [u8]),
}

/// The two kinds of input as aws-lc takes them.
pub(super) enum Signed<'a> {
    Message(&'a [u8]),
    Digest(digest::Digest),
}

impl<'a> SignInput<'a> {
    pub(super) fn read(self, scheme: SignatureScheme) -> Result<Signed<'a>, WorkError> {
        match self {
            Self::Message(message) => Ok(Signed::Message(message)),
            Self::Digest(bytes) => {
                let by = scheme.digest().ok_or(WorkError::input(
                    "digest",
                    "this scheme signs messages, not digests: send the message",
                ))?;
                digest::Digest::import_less_safe(bytes, by).map(Signed::Digest).map_err(|_| {
                    WorkError::input(
                        "digest",
                        "it must be as long as the output of the scheme's hash function",
                    )
                })
            }
        }
    }
}
