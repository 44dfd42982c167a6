//! Access and refresh tokens: PASETO v4.public, each bound to one client certificate.
//!
//! The certificate's thumbprint stands in the claims (`cnf`, RFC 7800 and RFC 8705 §3.1) and is the
//! implicit assertion of the signature, together with the type of the token: with another certificate,
//! or as a token of the other type, the signature itself does not hold.

use std::fmt;

use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use pasetors::Public;
use pasetors::keys::{AsymmetricPublicKey, AsymmetricSecretKey};
use pasetors::token::UntrustedToken;
use pasetors::version4::{PublicToken, V4};
use polykey_proto::polykey::record::v1::SigningKeyRecord;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::time::Time;

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN: usize = 4096;
/// The audience of every token.
pub const AUDIENCE: &str = "polykey";
/// The purpose of token keys in [`SigningKeyRecord`].
pub const PURPOSE: &str = "token";
const MAX_FOOTER: usize = 128;

/// What a token is good for; neither passes for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Sent with requests.
    Access,
    /// Exchanged once for its successors.
    Refresh,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Refresh => "refresh",
        }
    }

    fn assertion(self, certificate: &[u8; 32]) -> Vec<u8> {
        let label: &[u8] = match self {
            Self::Access => b"polykey/token/access/v1",
            Self::Refresh => b"polykey/token/refresh/v1",
        };
        [label, certificate].concat()
    }
}

/// What a token says. Roles and tier are what the client had at issue, for whoever reads a token;
/// authority is always read from the client's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// What it is good for.
    pub kind: Kind,
    /// `iss`: the node's id, in hexadecimal.
    pub issuer: String,
    /// `sub`: the client.
    pub subject: String,
    /// `jti`.
    pub token_id: [u8; 16],
    /// The chain of refresh tokens it descends from.
    pub family: [u8; 16],
    /// Its place in that chain, from 0.
    pub generation: u32,
    /// `iat`.
    pub issued_at: Time,
    /// `nbf`.
    pub not_before: Time,
    /// `exp`: from this moment on it is void.
    pub expires_at: Time,
    /// Role names at issue.
    pub roles: Vec<String>,
    /// common.v2.ClientTier at issue.
    pub tier: i32,
    /// SHA-256 of the certificate it is bound to.
    pub certificate: [u8; 32],
}

/// Why a token is refused. For logs and tests: strangers are told one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum TokenError {
    /// Over [`MAX_TOKEN`].
    #[error("the token is too long")]
    TooLong,
    /// Not a v4.public token with a footer that names a key, or not the claims of one of ours.
    #[error("the token is malformed")]
    Malformed,
    /// Its key is unknown, or verifies no more.
    #[error("the token's key is not known here")]
    UnknownKey,
    /// The signature does not hold, with this certificate and for this type.
    #[error("the token's signature does not hold")]
    Signature,
    /// Of another type than was asked for.
    #[error("the token is of another type")]
    WrongKind,
    /// Of another node.
    #[error("the token is of another issuer")]
    WrongIssuer,
    /// For another audience.
    #[error("the token is for another audience")]
    WrongAudience,
    /// Bound to another certificate.
    #[error("the token is bound to another certificate")]
    WrongCertificate,
    /// Not valid yet.
    #[error("the token is not valid yet")]
    NotYet,
    /// Over.
    #[error("the token has expired")]
    Expired,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    iss: String,
    sub: String,
    aud: String,
    typ: String,
    jti: String,
    iat: String,
    nbf: String,
    exp: String,
    roles: Vec<String>,
    tier: i32,
    cnf: Confirmation,
    fam: String,
    #[serde(rename = "gen")]
    generation: u32,
}

#[derive(Serialize, Deserialize)]
struct Confirmation {
    #[serde(rename = "x5t#S256")]
    thumbprint: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Footer {
    kid: String,
}

/// A key that signs tokens in one window and verifies them in a longer one.
pub struct TokenKey {
    id: [u8; 16],
    secret: AsymmetricSecretKey<V4>,
    public: AsymmetricPublicKey<V4>,
    active_from: Time,
    active_until: Option<Time>,
    verify_until: Option<Time>,
}

impl TokenKey {
    /// From its record.
    ///
    /// # Errors
    /// [`Error::DataLoss`] if the key is not an Ed25519 key pair or the id is not 16 bytes.
    pub fn from_record(record: &SigningKeyRecord) -> Result<Self, Error> {
        let bad = |what: &str| Error::data_loss(format!("a token signing key has a bad {what}"));
        let secret = AsymmetricSecretKey::from(&record.secret).map_err(|_| bad("secret key"))?;
        let public = AsymmetricPublicKey::try_from(&secret).map_err(|_| bad("public key"))?;
        if public.as_bytes() != record.public.as_ref() {
            return Err(bad("public key"));
        }
        Ok(Self {
            id: record.id.as_ref().try_into().map_err(|_| bad("id"))?,
            secret,
            public,
            active_from: Time::from_micros(record.active_from),
            active_until: Time::optional(record.active_until),
            verify_until: Time::optional(record.verify_until),
        })
    }

    /// Its id, 16 bytes: `kid` in the footer, in hexadecimal.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    fn verifies(&self, now: Time) -> bool {
        self.verify_until.is_none_or(|until| now < until)
    }
}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenKey({})", HEXLOWER.encode(&self.id))
    }
}

/// Every key that signs or verifies tokens, as of one moment.
#[derive(Debug, Default)]
pub struct KeySet(Vec<TokenKey>);

impl KeySet {
    /// The token keys among these records.
    ///
    /// # Errors
    /// As [`TokenKey::from_record`].
    pub fn from_records<'r>(
        records: impl IntoIterator<Item = &'r SigningKeyRecord>,
    ) -> Result<Self, Error> {
        let ours = records.into_iter().filter(|r| r.purpose == PURPOSE);
        ours.map(TokenKey::from_record).collect::<Result<_, _>>().map(Self)
    }

    /// The key that signs at `now`: the latest to become active. When all windows are over, the last
    /// one that still verifies: an overdue roll-over must not stop logins.
    #[must_use]
    pub fn signer(&self, now: Time) -> Option<&TokenKey> {
        let usable = || self.0.iter().filter(|k| k.active_from <= now && k.verifies(now));
        let active = usable().filter(|k| k.active_until.is_none_or(|until| now < until));
        active
            .max_by_key(|k| (k.active_from, k.id))
            .or_else(|| usable().max_by_key(|k| (k.active_until, k.active_from, k.id)))
    }

    fn verifier(&self, footer: &[u8], now: Time) -> Result<&TokenKey, TokenError> {
        if footer.len() > MAX_FOOTER {
            return Err(TokenError::Malformed);
        }
        let footer: Footer = serde_json::from_slice(footer).map_err(|_| TokenError::Malformed)?;
        let id = bytes16(&footer.kid).ok_or(TokenError::Malformed)?;
        let key = self.0.iter().find(|k| k.id == id && k.verifies(now));
        key.ok_or(TokenError::UnknownKey)
    }

    /// Signs claims with the key in force at `now`.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no such key, or the token would be over [`MAX_TOKEN`].
    pub fn issue(&self, claims: &Claims, now: Time) -> Result<String, Error> {
        let key =
            self.signer(now).ok_or_else(|| Error::internal("no token signing key is active"))?;
        let payload = Payload {
            iss: claims.issuer.clone(),
            sub: claims.subject.clone(),
            aud: AUDIENCE.into(),
            typ: claims.kind.name().into(),
            jti: HEXLOWER.encode(&claims.token_id),
            iat: claims.issued_at.to_string(),
            nbf: claims.not_before.to_string(),
            exp: claims.expires_at.to_string(),
            roles: claims.roles.clone(),
            tier: claims.tier,
            cnf: Confirmation { thumbprint: BASE64URL_NOPAD.encode(&claims.certificate) },
            fam: HEXLOWER.encode(&claims.family),
            generation: claims.generation,
        };
        let footer = Footer { kid: HEXLOWER.encode(&key.id) };
        let json = |e: serde_json::Error| Error::internal(format!("writing a token: {e}"));
        let payload = serde_json::to_vec(&payload).map_err(json)?;
        let footer = serde_json::to_vec(&footer).map_err(json)?;
        let assertion = claims.kind.assertion(&claims.certificate);
        let token = sign(&key.secret, &payload, &footer, &assertion)?;
        if token.len() > MAX_TOKEN {
            return Err(Error::internal("a token came out too long"));
        }
        Ok(token)
    }

    /// What a genuine token of this kind, issuer and certificate says, if `now` lies in its time.
    ///
    /// `now` must never run backwards: see [`crate::directory::Watermark`].
    ///
    /// # Errors
    /// [`TokenError`]; never panics, whatever the bytes.
    pub fn verify(
        &self,
        token: &str,
        kind: Kind,
        issuer: &str,
        certificate: &[u8; 32],
        now: Time,
    ) -> Result<Claims, TokenError> {
        let untrusted = parse(token)?;
        let claims = self.open(&untrusted, kind, issuer, certificate, now)?;
        if now < claims.not_before || now < claims.issued_at {
            return Err(TokenError::NotYet);
        }
        if claims.expires_at <= now {
            return Err(TokenError::Expired);
        }
        Ok(claims)
    }

    /// What a genuine token of either kind says, with whatever certificate it is bound to and whether
    /// or not its time is over: for revoking it, never for accepting it.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn inspect(&self, token: &str, issuer: &str, now: Time) -> Result<Claims, TokenError> {
        let untrusted = parse(token)?;
        // Read before it is verified: a wrong thumbprint only makes the signature fail.
        let payload: Payload = serde_json::from_slice(untrusted.untrusted_payload())
            .map_err(|_| TokenError::Malformed)?;
        let certificate = thumbprint(&payload.cnf).ok_or(TokenError::Malformed)?;
        let kind = if payload.typ == Kind::Refresh.name() { Kind::Refresh } else { Kind::Access };
        self.open(&untrusted, kind, issuer, &certificate, now)
    }

    fn open(
        &self,
        untrusted: &UntrustedToken<Public, V4>,
        kind: Kind,
        issuer: &str,
        certificate: &[u8; 32],
        now: Time,
    ) -> Result<Claims, TokenError> {
        let key = self.verifier(untrusted.untrusted_footer(), now)?;
        let assertion = kind.assertion(certificate);
        let payload = verified(&key.public, untrusted, &assertion)?;
        let payload: Payload = serde_json::from_str(&payload).map_err(|_| TokenError::Malformed)?;
        check(payload, kind, issuer, certificate)
    }
}

pub(super) fn sign(
    key: &AsymmetricSecretKey<V4>,
    payload: &[u8],
    footer: &[u8],
    assertion: &[u8],
) -> Result<String, Error> {
    PublicToken::sign(key, payload, Some(footer), Some(assertion))
        .map_err(|e| Error::internal(format!("signing a token: {e:?}")))
}

/// The payload, once its signature holds.
pub(super) fn verified(
    key: &AsymmetricPublicKey<V4>,
    untrusted: &UntrustedToken<Public, V4>,
    assertion: &[u8],
) -> Result<String, TokenError> {
    let trusted = PublicToken::verify(key, untrusted, None, Some(assertion));
    trusted.map(|t| t.payload().to_owned()).map_err(|_| TokenError::Signature)
}

pub(super) fn parse(token: &str) -> Result<UntrustedToken<Public, V4>, TokenError> {
    if token.len() > MAX_TOKEN {
        return Err(TokenError::TooLong);
    }
    UntrustedToken::try_from(token).map_err(|_| TokenError::Malformed)
}

/// The claims of a payload whose signature holds.
fn check(
    payload: Payload,
    kind: Kind,
    issuer: &str,
    certificate: &[u8; 32],
) -> Result<Claims, TokenError> {
    if payload.typ != kind.name() {
        return Err(TokenError::WrongKind);
    }
    if payload.iss != issuer {
        return Err(TokenError::WrongIssuer);
    }
    if payload.aud != AUDIENCE {
        return Err(TokenError::WrongAudience);
    }
    if thumbprint(&payload.cnf).as_ref() != Some(certificate) {
        return Err(TokenError::WrongCertificate);
    }
    let time = |text: &str| {
        let timestamp = text.parse::<jiff::Timestamp>().map_err(|_| TokenError::Malformed)?;
        Ok(Time::from_micros(timestamp.as_microsecond()))
    };
    Ok(Claims {
        kind,
        issued_at: time(&payload.iat)?,
        not_before: time(&payload.nbf)?,
        expires_at: time(&payload.exp)?,
        token_id: bytes16(&payload.jti).ok_or(TokenError::Malformed)?,
        family: bytes16(&payload.fam).ok_or(TokenError::Malformed)?,
        generation: payload.generation,
        issuer: payload.iss,
        subject: payload.sub,
        roles: payload.roles,
        tier: payload.tier,
        certificate: *certificate,
    })
}

fn bytes16(hex: &str) -> Option<[u8; 16]> {
    if hex.len() != 32 {
        return None;
    }
    HEXLOWER.decode(hex.as_bytes()).ok()?.try_into().ok()
}

fn thumbprint(confirmation: &Confirmation) -> Option<[u8; 32]> {
    if confirmation.thumbprint.len() != 43 {
        return None;
    }
    BASE64URL_NOPAD.decode(confirmation.thumbprint.as_bytes()).ok()?.try_into().ok()
}
