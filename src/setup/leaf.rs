//! Looks at a certificate and its key as files: whether they belong together, to an authority and to
//! now. It decides what is made anew; what is trusted is decided by TLS.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

/// What is known of a certificate.
pub(super) struct Leaf {
    /// Key id of the certificate's own key, where it is an authority.
    pub(super) subject_key: Option<Vec<u8>>,
    /// Key id of its issuer's key.
    pub(super) issuer_key: Option<Vec<u8>>,
    /// DNS names, addresses and URIs, as text.
    pub(super) names: Vec<String>,
    not_before: u64,
    not_after: u64,
}

/// A certificate and its key, which belong together.
pub(super) struct Pair;

impl Pair {
    /// Reads both; `None` if either is missing or damaged or the key is not the certificate's.
    pub(super) fn read(certificate: &Path, key: &Path) -> Option<Leaf> {
        let der = CertificateDer::from_pem_file(certificate).ok()?;
        let key = Zeroizing::new(std::fs::read_to_string(key).ok()?);
        let key = KeyPair::from_pem(&key).ok()?;
        let (_, found) = X509Certificate::from_der(&der).ok()?;
        if found.public_key().raw != key.subject_public_key_info() {
            return None;
        }
        Leaf::of(&found)
    }
}

impl Leaf {
    /// Reads the first certificate of a file; `None` if it is missing or damaged.
    pub(super) fn read(certificate: &Path) -> Option<Self> {
        let der = CertificateDer::from_pem_file(certificate).ok()?;
        let (_, found) = X509Certificate::from_der(&der).ok()?;
        Self::of(&found)
    }

    fn of(found: &X509Certificate<'_>) -> Option<Self> {
        let mut pair = Self {
            subject_key: None,
            issuer_key: None,
            names: Vec::new(),
            not_before: u64::try_from(found.validity().not_before.timestamp()).ok()?,
            not_after: u64::try_from(found.validity().not_after.timestamp()).ok()?,
        };
        for extension in found.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => pair.subject_key = Some(id.0.to_vec()),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    pair.issuer_key = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                }
                ParsedExtension::SubjectAlternativeName(names) => {
                    pair.names.extend(names.general_names.iter().filter_map(name));
                }
                _ => {}
            }
        }
        Some(pair)
    }

    /// Whether it is valid now and for `ahead` more.
    pub(super) fn lasts(&self, now: SystemTime, ahead: Duration) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.not_before <= now && now.saturating_add(ahead.as_secs()) < self.not_after
    }

    /// Whether `authority` issued it.
    pub(super) fn issued_by(&self, authority: &Self) -> bool {
        self.issuer_key.is_some() && self.issuer_key == authority.subject_key
    }

    /// Whether it has all these names.
    pub(super) fn has(&self, names: &[String]) -> bool {
        names.iter().all(|name| self.names.contains(name))
    }
}

fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(text) | GeneralName::URI(text) => Some((*text).to_owned()),
        GeneralName::IPAddress(bytes) => {
            if let Ok(v4) = <[u8; 4]>::try_from(*bytes) {
                return Some(std::net::IpAddr::from(v4).to_string());
            }
            <[u8; 16]>::try_from(*bytes).ok().map(|v6| std::net::IpAddr::from(v6).to_string())
        }
        _ => None,
    }
}
