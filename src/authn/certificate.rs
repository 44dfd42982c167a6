//! What is read out of a verified client certificate, and which registered identity it proves.
//!
//! Path validation is rustls's and webpki's; this module only reads names, and it is strict: a certificate with a
//! name that two readers could understand differently is refused whole, never truncated or repaired.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use x509_parser::asn1_rs::{Tag, oid};
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

/// Largest leaf certificate read, in bytes of DER.
pub const MAX_CERTIFICATE_BYTES: usize = 16 * 1024;
/// Longest presented chain, leaf included.
pub const MAX_CHAIN: usize = 8;
/// Most subject alternative names in a leaf.
pub const MAX_NAMES: usize = 64;
/// Longest URI name in bytes (SPIFFE-ID §2.3).
pub const MAX_URI_BYTES: usize = 2048;
/// Longest DNS name in bytes (RFC 1035 §2.3.4).
pub const MAX_DNS_BYTES: usize = 253;
/// Longest common name in bytes; RFC 5280 says 64 characters, several authorities issue longer ones.
pub const MAX_COMMON_NAME_BYTES: usize = 256;
/// Smallest RSA modulus in bits (NIST SP 800-131A rev. 2).
pub const MIN_RSA_BITS: usize = 2048;

/// Why a certificate is not read. Words for operators: a client is told only that authentication failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// No certificate was presented.
    #[error("the chain is empty")]
    EmptyChain,
    /// More than [`MAX_CHAIN`] certificates were presented.
    #[error("the chain is longer than {MAX_CHAIN} certificates")]
    ChainTooLong,
    /// A certificate is larger than [`MAX_CERTIFICATE_BYTES`].
    #[error("a certificate is larger than {MAX_CERTIFICATE_BYTES} bytes")]
    TooLarge,
    /// Not DER, data after the certificate, or an extension that cannot be read.
    #[error("a certificate is not well-formed DER")]
    Malformed,
    /// An extension appears twice.
    #[error("the certificate repeats an extension")]
    RepeatedExtension,
    /// More than [`MAX_NAMES`] subject alternative names.
    #[error("the certificate has more than {MAX_NAMES} subject alternative names")]
    TooManyNames,
    /// A name is empty, too long, or holds NUL, control or (where ASCII is required) non-ASCII characters.
    #[error("the certificate has a name that cannot be read without doubt")]
    DubiousName,
    /// The subject has several common names.
    #[error("the certificate has several common names")]
    SeveralCommonNames,
    /// The key usage extension does not allow digital signatures.
    #[error("the certificate's key usage does not allow digital signatures")]
    KeyUsage,
    /// An RSA key below [`MIN_RSA_BITS`].
    #[error("an RSA key in the chain is shorter than {MIN_RSA_BITS} bits")]
    WeakKey,
}

/// The readable part of a client certificate whose chain has been verified.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    thumbprint: [u8; 32],
    spki_sha256: [u8; 32],
    uris: Vec<String>,
    dns: Vec<String>,
    common_name: Option<String>,
    spiffe: Option<String>,
    serial: Vec<u8>,
    issuer: String,
    not_before: u64,
    not_after: u64,
    expiries: Vec<u64>,
}

impl PeerCertificate {
    /// Reads a presented chain, leaf first.
    ///
    /// # Errors
    /// Whatever makes a name, a size or a key doubtful: see [`CertificateError`]. Never panics, whatever the bytes.
    pub fn parse(chain: &[CertificateDer<'_>]) -> Result<Self, CertificateError> {
        let (leaf_der, rest) = chain.split_first().ok_or(CertificateError::EmptyChain)?;
        if chain.len() > MAX_CHAIN {
            return Err(CertificateError::ChainTooLong);
        }
        let leaf = read(leaf_der)?;
        let mut expiries = vec![seconds(leaf.validity().not_after.timestamp())?];
        for der in rest {
            expiries.push(seconds(read(der)?.validity().not_after.timestamp())?);
        }
        expiries.sort_unstable();
        expiries.dedup();

        let names = Names::of(&leaf)?;
        Ok(Self {
            thumbprint: sha256(leaf_der),
            spki_sha256: sha256(leaf.tbs_certificate.subject_pki.raw),
            spiffe: names.spiffe(),
            uris: names.uris,
            dns: names.dns,
            common_name: common_name(&leaf)?,
            serial: leaf.raw_serial().to_vec(),
            issuer: leaf.issuer().to_string(),
            not_before: seconds(leaf.validity().not_before.timestamp())?,
            not_after: seconds(leaf.validity().not_after.timestamp())?,
            expiries,
        })
    }

    /// SHA-256 of the leaf's DER (RFC 8705 §3.1, `x5t#S256` before encoding).
    #[must_use]
    pub fn thumbprint(&self) -> &[u8; 32] {
        &self.thumbprint
    }

    /// [`thumbprint`](Self::thumbprint) in lower-case hexadecimal, 64 characters.
    #[must_use]
    pub fn thumbprint_hex(&self) -> String {
        data_encoding::HEXLOWER.encode(&self.thumbprint)
    }

    /// SHA-256 of the leaf's SubjectPublicKeyInfo in DER (RFC 7469 §2.4).
    #[must_use]
    pub fn spki_sha256(&self) -> &[u8; 32] {
        &self.spki_sha256
    }

    /// URI subject alternative names, as they stand.
    #[must_use]
    pub fn uris(&self) -> &[String] {
        &self.uris
    }

    /// DNS subject alternative names in lower case. Wildcards stay listed, but never prove an identity.
    #[must_use]
    pub fn dns_names(&self) -> &[String] {
        &self.dns
    }

    /// The subject's only common name.
    #[must_use]
    pub fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }

    /// The SPIFFE ID, when the certificate has exactly one URI name and that is a valid ID (X.509-SVID §2).
    #[must_use]
    pub fn spiffe_id(&self) -> Option<&str> {
        self.spiffe.as_deref()
    }

    /// Serial number, big-endian as it stands in the certificate.
    #[must_use]
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Serial number in lower-case hexadecimal.
    #[must_use]
    pub fn serial_hex(&self) -> String {
        data_encoding::HEXLOWER.encode(&self.serial)
    }

    /// Issuer's distinguished name, for display and logs only.
    #[must_use]
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// First second of validity, Unix time.
    #[must_use]
    pub fn not_before(&self) -> u64 {
        self.not_before
    }

    /// Last second of the leaf's validity, Unix time.
    #[must_use]
    pub fn not_after(&self) -> u64 {
        self.not_after
    }

    /// The next moment after `now` at which a presented certificate has expired, if any is left.
    #[must_use]
    pub fn next_expiry(&self, now: u64) -> Option<u64> {
        self.expiries.iter().map(|at| at.saturating_add(1)).find(|at| *at > now)
    }
}

impl fmt::Debug for PeerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerCertificate")
            .field("thumbprint", &self.thumbprint_hex())
            .field("uris", &self.uris)
            .field("dns", &self.dns)
            .field("common_name", &self.common_name)
            .field("serial", &self.serial_hex())
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

fn seconds(timestamp: i64) -> Result<u64, CertificateError> {
    u64::try_from(timestamp).map_err(|_| CertificateError::Malformed)
}

/// Reads one certificate of a chain and refuses what no certificate of ours may be.
fn read<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CertificateError> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return Err(CertificateError::TooLarge);
    }
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| CertificateError::Malformed)?;
    if !rest.is_empty() {
        return Err(CertificateError::Malformed);
    }
    match certificate.public_key().parsed() {
        Ok(PublicKey::RSA(rsa)) if rsa.key_size() < MIN_RSA_BITS => {
            return Err(CertificateError::WeakKey);
        }
        Ok(_) => {}
        Err(_) => return Err(CertificateError::Malformed),
    }
    Ok(certificate)
}

struct Names {
    uris: Vec<String>,
    dns: Vec<String>,
}

impl Names {
    fn of(leaf: &X509Certificate<'_>) -> Result<Self, CertificateError> {
        let mut names = Self { uris: Vec::new(), dns: Vec::new() };
        leaf.extensions_map().map_err(|_| CertificateError::RepeatedExtension)?;
        for extension in leaf.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => {
                    if san.general_names.len() > MAX_NAMES {
                        return Err(CertificateError::TooManyNames);
                    }
                    for name in &san.general_names {
                        names.add(name)?;
                    }
                }
                ParsedExtension::KeyUsage(usage) if !usage.digital_signature() => {
                    return Err(CertificateError::KeyUsage);
                }
                ParsedExtension::ParseError { .. } => return Err(CertificateError::Malformed),
                _ => {}
            }
        }
        Ok(names)
    }

    fn add(&mut self, name: &GeneralName<'_>) -> Result<(), CertificateError> {
        match name {
            GeneralName::URI(uri) => {
                plain_ascii(uri, MAX_URI_BYTES)?;
                self.uris.push((*uri).to_owned());
            }
            GeneralName::DNSName(dns) => {
                plain_ascii(dns, MAX_DNS_BYTES)?;
                self.dns.push(dns.to_ascii_lowercase());
            }
            GeneralName::Invalid(..) => return Err(CertificateError::DubiousName),
            // Mail and IP addresses, directory names and the rest prove no identity here.
            _ => {}
        }
        Ok(())
    }

    fn spiffe(&self) -> Option<String> {
        match self.uris.as_slice() {
            [only] if spiffe_id(only).is_ok() => Some(only.clone()),
            _ => None,
        }
    }
}

fn plain_ascii(text: &str, longest: usize) -> Result<(), CertificateError> {
    let graphic = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.is_empty() || text.len() > longest || !graphic {
        return Err(CertificateError::DubiousName);
    }
    Ok(())
}

fn common_name(leaf: &X509Certificate<'_>) -> Result<Option<String>, CertificateError> {
    let common_name = oid!(2.5.4.3);
    let mut found =
        leaf.subject().iter_attributes().filter(|attribute| *attribute.attr_type() == common_name);
    let Some(attribute) = found.next() else { return Ok(None) };
    if found.next().is_some() {
        return Err(CertificateError::SeveralCommonNames);
    }
    let value = attribute.attr_value();
    // The other string types have no single reading (RFC 5280 §4.1.2.4 forbids them for new certificates).
    if ![Tag::Utf8String, Tag::PrintableString, Tag::Ia5String].contains(&value.tag()) {
        return Err(CertificateError::DubiousName);
    }
    let text = std::str::from_utf8(value.data).map_err(|_| CertificateError::DubiousName)?;
    if text.is_empty() || text.len() > MAX_COMMON_NAME_BYTES || text.chars().any(char::is_control) {
        return Err(CertificateError::DubiousName);
    }
    Ok(Some(text.to_owned()))
}

/// Text that is no certificate identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Not `spiffe://trust-domain/path` after the SPIFFE-ID rules.
    #[error(
        "not a SPIFFE ID: spiffe://, a lower-case trust domain, a path of [a-zA-Z0-9._-] segments"
    )]
    Spiffe,
    /// Not a host name.
    #[error("not a DNS name: lower-case labels of letters, digits and inner hyphens, no wildcard")]
    Dns,
    /// Not printable ASCII of a reasonable length.
    #[error(
        "not a common name: 1 to {MAX_COMMON_NAME_BYTES} printable ASCII characters, no space at either end"
    )]
    CommonName,
    /// Not 64 hexadecimal digits.
    #[error("not a key pin: 64 hexadecimal digits")]
    Spki,
    /// None of the known prefixes.
    #[error("an identity starts with spiffe://, dns:, cn: or spki-sha256:")]
    Kind,
}

/// An identity registered for a client, which a certificate must prove exactly.
///
/// Text form: `spiffe://domain/path`, `dns:name`, `cn:name`, `spki-sha256:hex`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CertificateIdentity {
    /// A SPIFFE ID in a URI subject alternative name.
    SpiffeUri(String),
    /// A DNS subject alternative name, lower case.
    Dns(String),
    /// The subject's common name: used only where switched on and where no URI or DNS name is present.
    CommonName(String),
    /// SHA-256 of the SubjectPublicKeyInfo: a pin. Beside names it is a further condition, alone it identifies.
    SpkiSha256([u8; 32]),
}

impl CertificateIdentity {
    /// A SPIFFE ID (SPIFFE-ID §2), which for a client has a path.
    ///
    /// # Errors
    /// [`IdentityError::Spiffe`] for anything else; nothing is normalised, since SPIFFE IDs have one spelling.
    pub fn spiffe(text: &str) -> Result<Self, IdentityError> {
        spiffe_id(text).map(|()| Self::SpiffeUri(text.to_owned()))
    }

    /// A DNS name; upper case and one trailing dot are normalised away.
    ///
    /// # Errors
    /// [`IdentityError::Dns`] for wildcards, empty or long labels, and anything but letters, digits and hyphens.
    pub fn dns(text: &str) -> Result<Self, IdentityError> {
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if is_host_name(&name) { Ok(Self::Dns(name)) } else { Err(IdentityError::Dns) }
    }

    /// A common name, compared byte for byte.
    ///
    /// # Errors
    /// [`IdentityError::CommonName`] unless it is printable ASCII.
    pub fn common_name(text: &str) -> Result<Self, IdentityError> {
        let printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
        if text.is_empty()
            || text.len() > MAX_COMMON_NAME_BYTES
            || !printable
            || text.trim() != text
        {
            return Err(IdentityError::CommonName);
        }
        Ok(Self::CommonName(text.to_owned()))
    }

    /// A key pin in hexadecimal of either case.
    ///
    /// # Errors
    /// [`IdentityError::Spki`] unless there are 64 digits.
    pub fn spki_sha256(hex: &str) -> Result<Self, IdentityError> {
        let bytes = data_encoding::HEXLOWER_PERMISSIVE
            .decode(hex.as_bytes())
            .map_err(|_| IdentityError::Spki)?;
        bytes.try_into().map(Self::SpkiSha256).map_err(|_| IdentityError::Spki)
    }
}

impl FromStr for CertificateIdentity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with("spiffe://") {
            return Self::spiffe(text);
        }
        match text.split_once(':') {
            Some(("dns", name)) => Self::dns(name),
            Some(("cn", name)) => Self::common_name(name),
            Some(("spki-sha256", hex)) => Self::spki_sha256(hex),
            _ => Err(IdentityError::Kind),
        }
    }
}

impl fmt::Display for CertificateIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SpiffeUri(uri) => f.write_str(uri),
            Self::Dns(name) => write!(f, "dns:{name}"),
            Self::CommonName(name) => write!(f, "cn:{name}"),
            Self::SpkiSha256(hash) => {
                write!(f, "spki-sha256:{}", data_encoding::HEXLOWER.encode(hash))
            }
        }
    }
}

/// The registered identity that `peer` proves: URI first, then DNS, then the common name where `allow_common_name`
/// and the certificate has neither a URI nor a DNS name. Exact matches only.
///
/// Key pins beside names are a condition on top of them (a certificate for the same key under another name, or for
/// the name with another key, proves nothing); a client with pins alone is identified by its key.
#[must_use]
pub fn matches<'a>(
    identities: &'a [CertificateIdentity],
    peer: &PeerCertificate,
    allow_common_name: bool,
) -> Option<&'a CertificateIdentity> {
    use CertificateIdentity::{CommonName, Dns, SpiffeUri, SpkiSha256};

    let mut pins =
        identities.iter().filter(|identity| matches!(identity, SpkiSha256(_))).peekable();
    let pinned = pins.peek().is_some();
    let pin =
        pins.find(|identity| matches!(identity, SpkiSha256(hash) if *hash == peer.spki_sha256));
    if pinned && pin.is_none() {
        return None;
    }
    if pinned && identities.iter().all(|identity| matches!(identity, SpkiSha256(_))) {
        return pin;
    }
    let uri = |identity: &&CertificateIdentity| matches!(identity, SpiffeUri(uri) if peer.spiffe_id() == Some(uri));
    let dns =
        |identity: &&CertificateIdentity| matches!(identity, Dns(name) if peer.dns.contains(name));
    let common = |identity: &&CertificateIdentity| matches!(identity, CommonName(name) if peer.common_name() == Some(name));
    let nameless = peer.uris.is_empty() && peer.dns.is_empty();
    identities
        .iter()
        .find(uri)
        .or_else(|| identities.iter().find(dns))
        .or_else(|| identities.iter().find(common).filter(|_| allow_common_name && nameless))
}

fn spiffe_id(text: &str) -> Result<(), IdentityError> {
    let rest = text.strip_prefix("spiffe://").ok_or(IdentityError::Spiffe)?;
    let (domain, path) = rest.split_once('/').ok_or(IdentityError::Spiffe)?;
    let domain_ok = (1..=255).contains(&domain.len())
        && domain
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
    let segment_ok = |segment: &str| {
        !segment.is_empty()
            && segment != "."
            && segment != ".."
            && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    if text.len() <= MAX_URI_BYTES && domain_ok && path.split('/').all(segment_ok) {
        Ok(())
    } else {
        Err(IdentityError::Spiffe)
    }
}

fn is_host_name(name: &str) -> bool {
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    (1..=MAX_DNS_BYTES).contains(&name.len()) && name.split('.').all(label_ok)
}

#[cfg(test)]
mod tests;
