//! The one table of algorithms: stored code, name, what a key of it may be made for, and how slow it is.
//! The API reference is generated from it.

use std::fmt;

/// What a key is made for. It does this one thing and nothing else (NIST SP 800-57 part 1, 5.2). The codes are
/// stored and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// Kept for somebody else's service: it leaves, and does no work here.
    Credential,
    /// Encrypt and Decrypt, data keys and large data.
    Encrypt,
    /// Sign and Verify.
    Sign,
    /// GenerateMac and VerifyMac.
    Mac,
    /// DeriveKey.
    Derive,
    /// WrapKey and UnwrapKey.
    Wrap,
    /// Agree.
    Agree,
    /// Encapsulate and Decapsulate.
    Encapsulate,
}

impl Purpose {
    /// Every purpose, in the order of their codes.
    pub const ALL: [Self; 8] = [
        Self::Credential,
        Self::Encrypt,
        Self::Sign,
        Self::Mac,
        Self::Derive,
        Self::Wrap,
        Self::Agree,
        Self::Encapsulate,
    ];

    /// The stored code, from 1; a record written before purposes had none means the default of its algorithm.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Credential => 1,
            Self::Encrypt => 2,
            Self::Sign => 3,
            Self::Mac => 4,
            Self::Derive => 5,
            Self::Wrap => 6,
            Self::Agree => 7,
            Self::Encapsulate => 8,
        }
    }

    /// The purpose of a stored code.
    #[must_use]
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.code() == code)
    }

    /// The word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Credential => "credential",
            Self::Encrypt => "encrypt",
            Self::Sign => "sign",
            Self::Mac => "mac",
            Self::Derive => "derive",
            Self::Wrap => "wrap",
            Self::Agree => "agree",
            Self::Encapsulate => "encapsulate",
        }
    }

    /// The purpose of a word.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.name() == name)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

macro_rules! algorithms {
    ($($variant:ident $code:literal $name:literal $public:literal $slow:literal [$($purpose:ident)+] $doc:literal)*) => {
        /// What a key is. The codes are stored and never change.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Algorithm { $(#[doc = $doc] $variant),* }

        impl Algorithm {
            /// Every algorithm, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The stored code.
            #[must_use]
            pub const fn code(self) -> u16 {
                match self { $(Self::$variant => $code),* }
            }

            /// The algorithm of a stored code.
            #[must_use]
            pub const fn from_code(code: u16) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// The word for it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// The algorithm of a word.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }

            /// Whether it has a public part.
            #[must_use]
            pub const fn is_asymmetric(self) -> bool {
                match self { $(Self::$variant => $public),* }
            }

            /// Whether parsing its private part, or working with it, takes more than 100 µs of CPU: run it off the
            /// threads of requests. Making any asymmetric key takes as long, and RSA up to seconds.
            #[must_use]
            pub const fn is_slow(self) -> bool {
                match self { $(Self::$variant => $slow),* }
            }

            /// What a key of it may be made for; the first unless something else is asked for.
            #[must_use]
            pub const fn purposes(self) -> &'static [Purpose] {
                match self { $(Self::$variant => &[$(Purpose::$purpose),+]),* }
            }

            /// What it is, in one sentence.
            #[must_use]
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $doc),* }
            }
        }
    };
}

algorithms! {
    // variant         code  name                public slow  purposes
    Aes256             1     "aes-256"           false  false [Encrypt Wrap] "A 256-bit AES key: AES-256-GCM-SIV (RFC 8452), or AES-KWP (RFC 5649) where it wraps."
    ApiKey             2     "api-key"           false  false [Credential]   "A credential: opaque bytes for somebody else's service, or a token made here."
    EcdsaP384          3     "ecdsa-p384"        true   true  [Sign]         "ECDSA over NIST P-384 with SHA-384 (FIPS 186-5), as PKCS#8."
    Rsa4096            4     "rsa-4096"          true   true  [Sign Encrypt Wrap] "RSA with a modulus of 4096 bits (RFC 8017): PSS, PKCS#1 v1.5 signatures, OAEP; as PKCS#8."
    Aes128             16    "aes-128"           false  false [Encrypt Wrap] "A 128-bit AES key: AES-128-GCM-SIV (RFC 8452), or AES-KWP (RFC 5649) where it wraps."
    Aes256Gcm          17    "aes-256-gcm"       false  false [Encrypt]      "AES-256-GCM (NIST SP 800-38D), with a key derived for each message."
    Aes128Gcm          18    "aes-128-gcm"       false  false [Encrypt]      "AES-128-GCM (NIST SP 800-38D), with a key derived for each message."
    ChaCha20Poly1305   19    "chacha20-poly1305" false  false [Encrypt]      "ChaCha20-Poly1305 (RFC 8439), with a key derived for each message."
    XChaCha20Poly1305  20    "xchacha20-poly1305" false false [Encrypt]      "XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha), with a key derived for each message."
    HmacSha256         32    "hmac-sha256"       false  false [Mac]          "HMAC with SHA-256 (FIPS 198-1) and a key of 32 bytes."
    HmacSha384         33    "hmac-sha384"       false  false [Mac]          "HMAC with SHA-384 (FIPS 198-1) and a key of 48 bytes."
    HmacSha512         34    "hmac-sha512"       false  false [Mac]          "HMAC with SHA-512 (FIPS 198-1) and a key of 64 bytes."
    HkdfSha256         40    "hkdf-sha256"       false  false [Derive]       "A secret of 32 bytes from which keys are derived with HKDF-SHA-256 (RFC 5869)."
    Rsa2048            48    "rsa-2048"          true   true  [Sign Encrypt Wrap] "RSA with a modulus of 2048 bits (RFC 8017): PSS, PKCS#1 v1.5 signatures, OAEP; as PKCS#8."
    Rsa3072            49    "rsa-3072"          true   true  [Sign Encrypt Wrap] "RSA with a modulus of 3072 bits (RFC 8017): PSS, PKCS#1 v1.5 signatures, OAEP; as PKCS#8."
    EcdsaP256          56    "ecdsa-p256"        true   false [Sign]         "ECDSA over NIST P-256 with SHA-256 (FIPS 186-5), as PKCS#8."
    EcdsaP521          57    "ecdsa-p521"        true   true  [Sign]         "ECDSA over NIST P-521 with SHA-512 (FIPS 186-5), as PKCS#8."
    EcdsaSecp256k1     58    "ecdsa-secp256k1"   true   true  [Sign]         "ECDSA over secp256k1 with SHA-256 (SEC 2), as PKCS#8."
    Ed25519            59    "ed25519"           true   false [Sign]         "Ed25519 (RFC 8032), as PKCS#8."
    X25519             64    "x25519"            true   false [Agree]        "X25519 (RFC 7748), as PKCS#8."
    EcdhP256           65    "ecdh-p256"         true   false [Agree]        "ECDH over NIST P-256 (NIST SP 800-56A), as PKCS#8."
    EcdhP384           66    "ecdh-p384"         true   true  [Agree]        "ECDH over NIST P-384 (NIST SP 800-56A), as PKCS#8."
    EcdhP521           67    "ecdh-p521"         true   true  [Agree]        "ECDH over NIST P-521 (NIST SP 800-56A), as PKCS#8."
    MlKem768           72    "ml-kem-768"        true   false [Encapsulate]  "ML-KEM-768 (FIPS 203)."
    MlKem1024          73    "ml-kem-1024"       true   false [Encapsulate]  "ML-KEM-1024 (FIPS 203)."
    X25519MlKem768     74    "x25519-ml-kem-768" true   false [Encapsulate]  "The hybrid X25519MLKEM768 (draft-ietf-tls-ecdhe-mlkem): secure while either part is."
    MlDsa44            80    "ml-dsa-44"         true   true  [Sign]         "ML-DSA-44 (FIPS 204), as PKCS#8."
    MlDsa65            81    "ml-dsa-65"         true   true  [Sign]         "ML-DSA-65 (FIPS 204), as PKCS#8."
    MlDsa87            82    "ml-dsa-87"         true   true  [Sign]         "ML-DSA-87 (FIPS 204), as PKCS#8."
}

impl Algorithm {
    /// The purpose of a key that was made for none in particular.
    #[must_use]
    pub fn default_purpose(self) -> Purpose {
        self.purposes().first().copied().unwrap_or(Purpose::Credential)
    }

    /// Whether verifying a signature takes more than 100 µs of CPU (measured), as [`Self::is_slow`] says of the
    /// private part.
    #[must_use]
    pub const fn verifies_slowly(self) -> bool {
        matches!(self, Self::EcdsaP384 | Self::EcdsaP521 | Self::EcdsaSecp256k1 | Self::Rsa4096)
    }

    /// Whether a key of it may be made for this.
    #[must_use]
    pub fn serves(self, purpose: Purpose) -> bool {
        self.purposes().contains(&purpose)
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_and_names_are_unique_and_lead_back() {
        let codes: BTreeSet<u16> = Algorithm::ALL.iter().map(|a| a.code()).collect();
        assert_eq!(codes.len(), Algorithm::ALL.len());
        for &algorithm in Algorithm::ALL {
            assert_eq!(Algorithm::from_code(algorithm.code()), Some(algorithm));
            assert_eq!(Algorithm::from_name(algorithm.name()), Some(algorithm));
            assert!(algorithm.serves(algorithm.default_purpose()));
        }
        for purpose in Purpose::ALL {
            assert_eq!(Purpose::from_code(purpose.code()), Some(purpose));
            assert_eq!(Purpose::from_name(purpose.name()), Some(purpose));
        }
        assert_eq!(Algorithm::from_code(0), None);
        assert_eq!(Purpose::from_code(0), None);
    }
}
