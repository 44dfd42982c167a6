//! JSON Web Keys (RFC 7517): elliptic curves and RSA (RFC 7518), secp256k1 (RFC 8812), Ed25519 and X25519 (RFC 8037),
//! ML-DSA (RFC 9964), and symmetric keys. ML-KEM and the hybrid have no registered form.
//!
//! Values are strict: base64url without padding, of the full length. Members that say nothing about the key itself
//! (`kid`, `use`, `key_ops`) are not read. Text is borrowed and never copied, so that no secret stays behind in a
//! buffer of the parser; a member with an escape sequence in it is therefore refused.

use aws_lc_rs::rsa::{KeyPairComponents, PublicKeyComponents};
use data_encoding::BASE64URL_NOPAD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{Algorithm, AlgorithmError, PublicKey, PublicKeyError, curve25519, ec, ml_dsa, rsa};
use crate::KeyMaterial;

/// 65537 as a JWK says it.
const F4: &str = "AQAB";

#[derive(Deserialize)]
struct Jwk<'a> {
    kty: &'a str,
    #[serde(borrow)]
    crv: Option<&'a str>,
    #[serde(borrow)]
    alg: Option<&'a str>,
    #[serde(borrow)]
    x: Option<&'a str>,
    #[serde(borrow)]
    y: Option<&'a str>,
    #[serde(borrow)]
    n: Option<&'a str>,
    #[serde(borrow)]
    e: Option<&'a str>,
    #[serde(borrow, rename = "pub")]
    public: Option<&'a str>,
    #[serde(borrow)]
    d: Option<&'a str>,
    #[serde(borrow)]
    p: Option<&'a str>,
    #[serde(borrow)]
    q: Option<&'a str>,
    #[serde(borrow)]
    dp: Option<&'a str>,
    #[serde(borrow)]
    dq: Option<&'a str>,
    #[serde(borrow)]
    qi: Option<&'a str>,
    #[serde(borrow, rename = "priv")]
    private: Option<&'a str>,
    #[serde(borrow)]
    k: Option<&'a str>,
    /// Further primes, which are not taken.
    oth: Option<IgnoredAny>,
}

/// What `kty` and `crv` (or `alg`) of a key of this type are.
const fn names(algorithm: Algorithm) -> Option<(&'static str, &'static str)> {
    match algorithm {
        Algorithm::EcdsaP256 | Algorithm::EcdhP256 => Some(("EC", "P-256")),
        Algorithm::EcdsaP384 | Algorithm::EcdhP384 => Some(("EC", "P-384")),
        Algorithm::EcdsaP521 | Algorithm::EcdhP521 => Some(("EC", "P-521")),
        Algorithm::EcdsaSecp256k1 => Some(("EC", "secp256k1")),
        Algorithm::Rsa2048 | Algorithm::Rsa3072 | Algorithm::Rsa4096 => Some(("RSA", "")),
        Algorithm::Ed25519 => Some(("OKP", "Ed25519")),
        Algorithm::X25519 => Some(("OKP", "X25519")),
        Algorithm::MlDsa44 => Some(("AKP", "ML-DSA-44")),
        Algorithm::MlDsa65 => Some(("AKP", "ML-DSA-65")),
        Algorithm::MlDsa87 => Some(("AKP", "ML-DSA-87")),
        _ => None,
    }
}

impl Jwk<'_> {
    /// Whether `kty` and `crv` (or `alg`) are those of a key of this type.
    fn is_of(&self, algorithm: Algorithm) -> bool {
        let Some((kty, name)) = names(algorithm) else {
            return !algorithm.is_asymmetric() && self.kty == "oct";
        };
        let named = match kty {
            "RSA" => self.oth.is_none(),
            "AKP" => self.alg == Some(name),
            _ => self.crv == Some(name),
        };
        named && self.kty == kty
    }

    /// The bare public key, as [`PublicKey::raw`] gives it.
    fn raw_public(&self) -> Option<Vec<u8>> {
        match self.kty {
            "EC" => Some([&decode(self.x)?[..], &decode(self.y)?].concat()),
            "RSA" if self.e == Some(F4) => decode(self.n).map(|n| n.to_vec()),
            "OKP" => decode(self.x).map(|x| x.to_vec()),
            "AKP" => decode(self.public).map(|public| public.to_vec()),
            _ => None,
        }
    }

    fn has_secrets(&self) -> bool {
        [self.d, self.p, self.q, self.dp, self.dq, self.qi, self.private, self.k]
            .iter()
            .any(Option::is_some)
            || self.oth.is_some()
    }
}

fn decode(text: Option<&str>) -> Option<Zeroizing<Vec<u8>>> {
    let text = text?.as_bytes();
    let mut out = Zeroizing::new(vec![0; BASE64URL_NOPAD.decode_len(text.len()).ok()?]);
    let len = BASE64URL_NOPAD.decode_mut(text, &mut out).ok()?;
    (len == out.len()).then_some(out)
}

impl PublicKey {
    /// The key as a JSON Web Key: the members that make up the key, and no others.
    ///
    /// # Errors
    /// [`PublicKeyError::NoSuchForm`] for ML-KEM and the hybrid, which have no registered one.
    pub fn to_jwk(&self) -> Result<Value, PublicKeyError> {
        let algorithm = self.algorithm;
        let (kty, name) =
            names(algorithm).ok_or(PublicKeyError::NoSuchForm { algorithm, form: "JWK" })?;
        let raw = self.raw().ok_or(PublicKeyError::Malformed(algorithm))?;
        let text = |bytes: &[u8]| BASE64URL_NOPAD.encode(bytes);
        Ok(match kty {
            "EC" => {
                let (x, y) = raw.split_at(raw.len() / 2);
                json!({ "kty": kty, "crv": name, "x": text(x), "y": text(y) })
            }
            "RSA" => json!({ "kty": kty, "n": text(raw), "e": F4 }),
            "OKP" => json!({ "kty": kty, "crv": name, "x": text(raw) }),
            _ => json!({ "kty": kty, "alg": name, "pub": text(raw) }),
        })
    }

    /// Reads the public key of this type in a JSON Web Key.
    ///
    /// # Errors
    /// As for [`Self::from_spki`]; [`PublicKeyError::NoSuchForm`]; [`PublicKeyError::Private`].
    pub fn from_jwk(algorithm: Algorithm, jwk: &str) -> Result<Self, PublicKeyError> {
        if names(algorithm).is_none() {
            return Err(PublicKeyError::NoSuchForm { algorithm, form: "JWK" });
        }
        let wrong = PublicKeyError::Malformed(algorithm);
        let jwk: Jwk<'_> = serde_json::from_str(jwk).map_err(|_| wrong)?;
        if jwk.has_secrets() {
            return Err(PublicKeyError::Private);
        }
        if !jwk.is_of(algorithm) {
            return Err(wrong);
        }
        let key = jwk.raw_public().and_then(|raw| Self::from_raw(algorithm, &raw)).ok_or(wrong)?;
        Self::from_spki(algorithm, &key.spki_der)
    }
}

/// The material of the private or symmetric key in a JSON Web Key, in the stored form. An RSA key must have all its
/// components, which must belong together, as must the halves of any pair.
pub(crate) fn private(algorithm: Algorithm, jwk: &str) -> Result<KeyMaterial, AlgorithmError> {
    let wrong = AlgorithmError::NotAKey(algorithm);
    let jwk: Jwk<'_> = serde_json::from_str(jwk).map_err(|_| wrong)?;
    if !jwk.is_of(algorithm) {
        return Err(wrong);
    }
    let get = |text| decode(text).ok_or(wrong);
    let public = || jwk.raw_public().ok_or(wrong);
    match jwk.kty {
        "EC" => ec::from_parts(algorithm, &get(jwk.d)?, &public()?),
        "RSA" => {
            let (n, e) = (get(jwk.n)?, get(jwk.e)?);
            let (d, p, q) = (get(jwk.d)?, get(jwk.p)?, get(jwk.q)?);
            let (dp, dq, qi) = (get(jwk.dp)?, get(jwk.dq)?, get(jwk.qi)?);
            let components = KeyPairComponents {
                public_key: PublicKeyComponents { n: &n[..], e: &e[..] },
                d: &d[..],
                p: &p[..],
                q: &q[..],
                dP: &dp[..],
                dQ: &dq[..],
                qInv: &qi[..],
            };
            rsa::from_components(algorithm, &components)
        }
        "OKP" if algorithm == Algorithm::Ed25519 => {
            curve25519::ed25519_from_parts(&get(jwk.d)?, &public()?)
        }
        "OKP" => curve25519::x25519_from_parts(&get(jwk.d)?, &public()?),
        "AKP" => ml_dsa::from_parts(algorithm, &get(jwk.private)?, &public()?),
        _ => Ok(KeyMaterial::from_secret(std::mem::take(&mut *get(jwk.k)?))?),
    }
}
