//! A small certificate authority: for development, and for clients of installations that have no other.
//!
//! Keys are ECDSA P-256 unless P-384 is asked for; serial numbers are 159 random bits (CA/Browser Forum BR 7.1 asks
//! for 64); files appear whole or not at all, private keys with mode 0600.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams,
    CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PublicKeyData, RevokedCertParams, SanType,
    SerialNumber, date_time_ymd,
};
use zeroize::Zeroizing;

use crate::authn::certificate::CertificateIdentity;

/// How far before now a certificate begins, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(300);
/// Longest validity issued, in days.
pub const MAX_DAYS: u32 = 3650;

/// Why nothing was issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file cannot be read or written.
    #[error("{}: {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file to be made exists.
    #[error("{}: exists already; remove it first, or choose another directory", .0.display())]
    Exists(PathBuf),
    /// The validity is out of range.
    #[error("a validity of {0} days is not between 1 and {MAX_DAYS}")]
    Validity(u32),
    /// A name cannot stand in a certificate.
    #[error("{0}: not a DNS name or IP address")]
    ServerName(String),
    /// A client id that does not fit into a SPIFFE ID.
    #[error(
        "{0}: a client id for a certificate has 1 to 255 characters of [a-zA-Z0-9._-] and is not . or .."
    )]
    ClientId(String),
    /// A signing request that cannot be used.
    #[error("the certificate signing request cannot be used: {0}")]
    Request(String),
    /// The authority's files do not fit or are damaged.
    #[error("the certificate authority cannot be used: {0}")]
    Authority(String),
    /// The library or the system's generator refused.
    #[error("the certificate cannot be made: {0}")]
    Library(String),
}

/// The curves offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyKind {
    /// ECDSA over P-256 with SHA-256.
    #[default]
    P256,
    /// ECDSA over P-384 with SHA-384.
    P384,
}

impl KeyKind {
    fn generate(self) -> Result<KeyPair, PkiError> {
        KeyPair::generate_for(match self {
            Self::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
        })
        .map_err(library)
    }
}

/// When a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    not_before: Duration,
    not_after: Duration,
}

impl Validity {
    /// From five minutes before `now` until `days` after it.
    ///
    /// # Errors
    /// [`PkiError::Validity`] outside 1 to [`MAX_DAYS`].
    pub fn days(now: SystemTime, days: u32) -> Result<Self, PkiError> {
        if !(1..=MAX_DAYS).contains(&days) {
            return Err(PkiError::Validity(days));
        }
        let now = now.duration_since(UNIX_EPOCH).map_err(|_| PkiError::Validity(days))?;
        Ok(Self {
            not_before: now.saturating_sub(BACKDATE),
            not_after: now + Duration::from_secs(u64::from(days) * 86_400),
        })
    }

    /// Between two moments since the Unix epoch, whole seconds.
    #[must_use]
    pub fn between(not_before: Duration, not_after: Duration) -> Self {
        Self { not_before, not_after }
    }

    fn apply(self, params: &mut CertificateParams) {
        let epoch = date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(self.not_before.as_secs());
        params.not_after = epoch + Duration::from_secs(self.not_after.as_secs());
    }
}

/// A certificate (chain) and, where it was made here, its private key; both PEM.
pub struct Issued {
    /// The certificate in PEM.
    pub certificate: String,
    /// Its key in PKCS#8 PEM; `None` when the key stayed with whoever sent the request.
    pub key: Option<Zeroizing<String>>,
    /// Serial number, big-endian.
    pub serial: Vec<u8>,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued")
            .field("serial", &data_encoding::HEXLOWER.encode(&self.serial))
            .finish_non_exhaustive()
    }
}

impl Issued {
    /// Writes the certificate (0644) and, if it was made here, the key (0600). Neither may exist.
    ///
    /// # Errors
    /// [`PkiError::Exists`] or [`PkiError::File`]; the key is written first, so a certificate never lacks its key.
    pub fn write(&self, certificate: &Path, key: &Path) -> Result<(), PkiError> {
        if self.key.is_some() && key.exists() {
            return Err(PkiError::Exists(key.to_owned()));
        }
        if certificate.exists() {
            return Err(PkiError::Exists(certificate.to_owned()));
        }
        if let Some(text) = &self.key {
            write_file(key, text.as_bytes(), 0o600)?;
        }
        write_file(certificate, self.certificate.as_bytes(), 0o644)
    }
}

/// A certificate authority with its key.
pub struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a self-signed authority that may issue end-entity certificates only (path length 0).
    ///
    /// # Errors
    /// [`PkiError::Library`] when no key can be made.
    pub fn create(
        name: &str,
        kind: KeyKind,
        validity: Validity,
    ) -> Result<(Self, Issued), PkiError> {
        let key = kind.generate()?;
        let mut params = params(name, validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let serial = serial(&params);
        let certificate = params.self_signed(&key).map_err(library)?.pem();
        let text = Zeroizing::new(key.serialize_pem());
        let authority = Self { certificate: certificate.clone(), issuer: Issuer::new(params, key) };
        Ok((authority, Issued { certificate, key: Some(text), serial }))
    }

    /// Takes an authority from PEM texts.
    ///
    /// # Errors
    /// [`PkiError::Authority`] when either is damaged, the key does not fit, or the certificate is no authority's.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, PkiError> {
        let unusable = |what: &str| PkiError::Authority(what.to_owned());
        let key = KeyPair::from_pem(key)
            .map_err(|_| unusable("the key is not a PKCS#8 PEM private key"))?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(certificate.as_bytes())
            .map_err(|_| unusable("the certificate is not PEM"))?;
        let parsed = pem.parse_x509().map_err(|_| unusable("the certificate is damaged"))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(unusable("the key is not the certificate's"));
        }
        if !parsed.is_ca() {
            return Err(unusable("the certificate is not an authority's"));
        }
        let issuer = Issuer::from_ca_cert_pem(certificate, key)
            .map_err(|error| PkiError::Authority(error.to_string()))?;
        Ok(Self { certificate: certificate.to_owned(), issuer })
    }

    /// Takes an authority from its two files.
    ///
    /// # Errors
    /// As [`from_pem`](Self::from_pem), and [`PkiError::File`].
    pub fn load(certificate: &Path, key: &Path) -> Result<Self, PkiError> {
        let read = |file: &Path| {
            fs::read_to_string(file)
                .map_err(|source| PkiError::File { file: file.to_owned(), source })
        };
        let key = Zeroizing::new(read(key)?);
        Self::from_pem(&read(certificate)?, &key)
    }

    /// The authority's certificate in PEM.
    #[must_use]
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// A server certificate for these DNS names and IP addresses, with a new key.
    ///
    /// # Errors
    /// [`PkiError::ServerName`] for what is neither, or an empty list.
    pub fn server(
        &self,
        names: &[&str],
        kind: KeyKind,
        validity: Validity,
    ) -> Result<Issued, PkiError> {
        let first = names.first().ok_or_else(|| PkiError::ServerName("(no name)".to_owned()))?;
        let mut params = params(first, validity)?;
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => dns(name)?,
            });
        }
        self.leaf(params, ExtendedKeyUsagePurpose::ServerAuth, kind)
    }

    /// A client certificate for `spiffe://polykey.local/client/<id>`, with a new key.
    ///
    /// # Errors
    /// [`PkiError::ClientId`] when `id` does not fit into a SPIFFE ID.
    pub fn client(&self, id: &str, kind: KeyKind, validity: Validity) -> Result<Issued, PkiError> {
        self.leaf(client_params(id, validity)?, ExtendedKeyUsagePurpose::ClientAuth, kind)
    }

    /// A client certificate for the key of a signing request in PEM. The request's signature is verified; its names
    /// and extensions are not used.
    ///
    /// # Errors
    /// [`PkiError::Request`] when it is damaged, wrongly signed or for a weak key, [`PkiError::ClientId`] as above.
    pub fn client_from_request(
        &self,
        request: &str,
        id: &str,
        validity: Validity,
    ) -> Result<Issued, PkiError> {
        self.for_request(request, client_params(id, validity)?)
    }

    /// A client certificate for `identity`, a SPIFFE ID or DNS name, with `id` for its common name. With a signing
    /// request in PEM for that request's key, as [`client_from_request`](Self::client_from_request), otherwise with a
    /// new key.
    ///
    /// # Errors
    /// [`PkiError::ClientId`] for another kind of identity, [`PkiError::Request`] as there.
    pub fn client_as(
        &self,
        identity: &CertificateIdentity,
        id: &str,
        request: Option<&str>,
        validity: Validity,
    ) -> Result<Issued, PkiError> {
        let name = match identity {
            CertificateIdentity::SpiffeUri(uri) => {
                SanType::URI(uri.clone().try_into().map_err(library)?)
            }
            CertificateIdentity::Dns(name) => dns(name)?,
            CertificateIdentity::CommonName(_) | CertificateIdentity::SpkiSha256(_) => {
                return Err(PkiError::ClientId(id.to_owned()));
            }
        };
        let mut params = params(id, validity)?;
        params.subject_alt_names.push(name);
        match request {
            None => self.leaf(params, ExtendedKeyUsagePurpose::ClientAuth, KeyKind::P256),
            Some(request) => self.for_request(request, params),
        }
    }

    fn for_request(&self, request: &str, params: CertificateParams) -> Result<Issued, PkiError> {
        let refused = |error: rcgen::Error| PkiError::Request(error.to_string());
        let mut request = CertificateSigningRequestParams::from_pem(request).map_err(refused)?;
        let algorithms =
            [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
        if !algorithms.contains(&request.public_key.algorithm()) {
            return Err(PkiError::Request(
                "its key is not ECDSA P-256, ECDSA P-384 or Ed25519".to_owned(),
            ));
        }
        request.params = params;
        finish(&mut request.params, ExtendedKeyUsagePurpose::ClientAuth);
        let serial = serial(&request.params);
        let certificate = request.signed_by(&self.issuer).map_err(library)?.pem();
        Ok(Issued { certificate, key: None, serial })
    }

    /// A revocation list in PEM of these serial numbers, to be replaced before `validity` ends. `number` grows with
    /// every list.
    ///
    /// # Errors
    /// [`PkiError::Library`] when the authority may not sign lists.
    pub fn revocation_list(
        &self,
        serials: &[Vec<u8>],
        number: u64,
        validity: Validity,
    ) -> Result<String, PkiError> {
        let mut window = CertificateParams::default();
        validity.apply(&mut window);
        let revoked = |serial: &Vec<u8>| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: window.not_before,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: window.not_before,
            next_update: window.not_after,
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).and_then(|list| list.pem()).map_err(library)
    }

    fn leaf(
        &self,
        mut params: CertificateParams,
        usage: ExtendedKeyUsagePurpose,
        kind: KeyKind,
    ) -> Result<Issued, PkiError> {
        let key = kind.generate()?;
        finish(&mut params, usage);
        let serial = serial(&params);
        let certificate = params.signed_by(&key, &self.issuer).map_err(library)?.pem();
        Ok(Issued { certificate, key: Some(Zeroizing::new(key.serialize_pem())), serial })
    }
}

/// The SPIFFE ID that [`Authority::client`] puts into the certificate of client `id`.
///
/// # Errors
/// [`PkiError::ClientId`] when `id` does not fit into one.
pub fn client_identity(id: &str) -> Result<CertificateIdentity, PkiError> {
    if id.len() > 255 || id.contains('/') {
        return Err(PkiError::ClientId(id.to_owned()));
    }
    CertificateIdentity::spiffe(&format!("spiffe://polykey.local/client/{id}"))
        .map_err(|_| PkiError::ClientId(id.to_owned()))
}

fn client_params(id: &str, validity: Validity) -> Result<CertificateParams, PkiError> {
    let identity = client_identity(id)?.to_string();
    let mut params = params(id, validity)?;
    params.subject_alt_names.push(SanType::URI(identity.try_into().map_err(library)?));
    Ok(params)
}

fn params(common_name: &str, validity: Validity) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    let mut serial = [0; 20];
    aws_lc_rs::rand::fill(&mut serial)
        .map_err(|_| PkiError::Library("no random numbers".to_owned()))?;
    if let Some(first) = serial.first_mut() {
        // Positive, and 20 bytes long always (RFC 5280 §4.1.2.2).
        *first = (*first & 0x7f) | 0x40;
    }
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, shortened(common_name));
    validity.apply(&mut params);
    Ok(params)
}

/// At most 64 characters, the upper bound of RFC 5280 for common names; identities live in the alternative names.
fn shortened(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn finish(params: &mut CertificateParams, usage: ExtendedKeyUsagePurpose) {
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
}

fn serial(params: &CertificateParams) -> Vec<u8> {
    params.serial_number.as_ref().map(SerialNumber::to_bytes).unwrap_or_default()
}

fn dns(name: &str) -> Result<SanType, PkiError> {
    let bad = || PkiError::ServerName(name.to_owned());
    let CertificateIdentity::Dns(name) = CertificateIdentity::dns(name).map_err(|_| bad())? else {
        return Err(bad());
    };
    Ok(SanType::DnsName(name.try_into().map_err(|_| bad())?))
}

fn library(error: rcgen::Error) -> PkiError {
    PkiError::Library(error.to_string())
}

/// Writes a file through a temporary one beside it, durably: it appears whole or not at all.
///
/// # Errors
/// [`PkiError::File`] with what the system said.
pub fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), PkiError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut temporary = path.file_name().unwrap_or_default().to_owned();
    temporary.push(format!(".{}.tmp", uuid::Uuid::now_v7().simple()));
    let temporary = directory.join(temporary);
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|source| {
        // Whatever was left half written goes; the first error is the one to tell.
        fs::remove_file(&temporary).ok();
        PkiError::File { file: path.to_owned(), source }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use x509_parser::prelude::{FromDer, X509Certificate};

    use super::*;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_830_000_000)
    }

    fn authority() -> (Authority, Issued) {
        Authority::create("Test authority", KeyKind::P256, Validity::days(now(), 30).unwrap())
            .unwrap()
    }

    fn der(pem: &str) -> Vec<u8> {
        x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents
    }

    #[test]
    fn what_is_issued_has_our_names_usages_and_times() {
        let (authority, ca) = authority();
        let validity = Validity::days(now(), 7).unwrap();
        let client = authority.client("alice", KeyKind::P384, validity).unwrap();
        let bytes = der(&client.certificate);
        let (_, parsed) = X509Certificate::from_der(&bytes).unwrap();
        let ca_bytes = der(&ca.certificate);
        let (_, ca_parsed) = X509Certificate::from_der(&ca_bytes).unwrap();
        assert_eq!(parsed.issuer().to_string(), ca_parsed.subject().to_string());
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !parsed.is_ca());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(
            format!("{:?}", names.value.general_names),
            r#"[URI("spiffe://polykey.local/client/alice")]"#
        );
        assert_eq!(parsed.validity().not_before.timestamp(), 1_830_000_000 - 300);
        assert_eq!(parsed.validity().not_after.timestamp(), 1_830_000_000 + 7 * 86_400);
        assert_eq!((parsed.raw_serial(), client.serial.len()), (client.serial.as_slice(), 20));
        let constraints = ca_parsed.basic_constraints().unwrap().unwrap().value;
        assert_eq!((constraints.ca, constraints.path_len_constraint), (true, Some(0)));
    }

    #[test]
    fn serial_numbers_differ_and_stay_positive() {
        let (authority, _) = authority();
        let validity = Validity::days(now(), 1).unwrap();
        let serials: std::collections::HashSet<_> = (0..50)
            .map(|_| authority.client("a", KeyKind::P256, validity).unwrap().serial)
            .collect();
        assert_eq!(serials.len(), 50);
        assert!(serials.iter().all(|serial| serial[0] & 0xc0 == 0x40));
    }

    #[test]
    fn nothing_of_a_request_survives_but_its_key() {
        let (authority, _) = authority();
        let key = KeyPair::generate().unwrap();
        let mut wish = CertificateParams::new(vec!["root.example.org".to_owned()]).unwrap();
        wish.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        wish.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        wish.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::Any];
        wish.distinguished_name.push(DnType::CommonName, "root");
        let request = wish.serialize_request(&key).unwrap().pem().unwrap();
        let issued = authority
            .client_from_request(&request, "bob", Validity::days(now(), 1).unwrap())
            .unwrap();
        assert!(issued.key.is_none());
        let bytes = der(&issued.certificate);
        let (_, parsed) = X509Certificate::from_der(&bytes).unwrap();
        assert_eq!(parsed.public_key().raw, key.subject_public_key_info());
        assert!(!parsed.is_ca() && !parsed.key_usage().unwrap().unwrap().value.key_cert_sign());
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any);
        assert_eq!(parsed.subject().to_string(), "CN=bob");
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1);

        let other = KeyPair::generate().unwrap().serialize_pem();
        for bad in ["", "hello", &other, &request.replacen('A', "B", 3)] {
            let refused =
                authority.client_from_request(bad, "bob", Validity::days(now(), 1).unwrap());
            assert!(matches!(refused, Err(PkiError::Request(_))), "{bad:?}");
        }
    }

    #[test]
    fn names_and_times_out_of_range_are_refused() {
        let (authority, _) = authority();
        let validity = Validity::days(now(), 1).unwrap();
        for id in ["", "a/b", "..", ".", "a b", "é", "a\0", &"a".repeat(256)] {
            assert!(
                matches!(authority.client(id, KeyKind::P256, validity), Err(PkiError::ClientId(_))),
                "{id:?}"
            );
        }
        for name in ["", "a b", "*.org", "a/b"] {
            assert!(
                matches!(
                    authority.server(&[name], KeyKind::P256, validity),
                    Err(PkiError::ServerName(_))
                ),
                "{name:?}"
            );
        }
        assert!(authority.server(&[], KeyKind::P256, validity).is_err());
        for days in [0, MAX_DAYS + 1] {
            assert!(matches!(Validity::days(now(), days), Err(PkiError::Validity(_))));
        }
        assert!(Validity::days(now(), MAX_DAYS).is_ok());
    }

    #[test]
    fn files_appear_whole_and_keys_private_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = (directory.path().join("ca.pem"), directory.path().join("ca.key"));
        let (_, issued) = authority();
        issued.write(&certificate, &key).unwrap();
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(
            matches!(issued.write(&certificate, &key), Err(PkiError::Exists(file)) if file == key)
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "no temporary file stays");
        let loaded = Authority::load(&certificate, &key).unwrap();
        assert_eq!(loaded.certificate(), issued.certificate);

        let (_, other) = authority();
        let foreign = Authority::from_pem(&issued.certificate, other.key.as_ref().unwrap());
        assert!(matches!(foreign, Err(PkiError::Authority(_))));
        let leaf =
            loaded.client("alice", KeyKind::P256, Validity::days(now(), 1).unwrap()).unwrap();
        assert!(
            Authority::from_pem(&leaf.certificate, leaf.key.as_ref().unwrap()).is_err(),
            "a leaf is no authority"
        );
        assert!(!format!("{issued:?}{loaded:?}").contains("PRIVATE"));
    }
}
