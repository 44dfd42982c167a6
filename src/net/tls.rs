//! Server TLS: certificate files, the client verifier, and reloading both without losing either.
//!
//! TLS 1.3 only, X25519MLKEM768 first, HTTP/2 only, and a client certificate always. A resumed session carries the
//! client's chain inside the ticket and skips its verification, so the chain is verified again by [`TlsState`]
//! whenever a session is resumed, whenever the certificate authorities or revocation lists have been reloaded, and
//! whenever a certificate of the chain or the revocation list runs out. Each reload takes new ticket keys.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ServerConfig, WebPkiClientVerifier};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use zeroize::Zeroizing;

use crate::authn::certificate::PeerCertificate;

/// The one protocol spoken (RFC 9113 §3.2).
pub(crate) const ALPN_H2: &[u8] = b"h2";

/// Largest file read here, in bytes: revocation lists of large authorities take megabytes.
const MAX_FILE_BYTES: u64 = 32 * 1024 * 1024;

/// Where the server's TLS material lies. All files are PEM. Where [`TlsTexts`] gives a piece, its path is read by
/// nobody and only names the piece in errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, leaf first, then its intermediates.
    pub certificate: PathBuf,
    /// The certificate's private key (PKCS#8, PKCS#1 or SEC1), readable by the server alone.
    pub key: PathBuf,
    /// The authorities whose client certificates are accepted.
    pub client_ca: PathBuf,
    /// Revocation lists of all those authorities. With a file here, a certificate whose status it does not tell is
    /// refused, and so is every certificate once the list's `nextUpdate` has passed.
    pub crl: Option<PathBuf>,
}

/// A PEM text, erased when nobody holds it any more.
pub type PemText = Arc<Zeroizing<Vec<u8>>>;

/// TLS material that comes from somewhere else than a file, PEM.
#[derive(Clone, Default)]
pub struct TlsTexts {
    /// In the place of [`TlsFiles::certificate`].
    pub certificate: Option<PemText>,
    /// In the place of [`TlsFiles::key`].
    pub key: Option<PemText>,
    /// In the place of [`TlsFiles::client_ca`].
    pub client_ca: Option<PemText>,
    /// In the place of [`TlsFiles::crl`].
    pub crl: Option<PemText>,
}

impl fmt::Debug for TlsTexts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsTexts").finish_non_exhaustive()
    }
}

/// Why TLS material cannot be used; each text names the file and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsConfigError {
    /// A file cannot be read.
    #[error("{}: {source}; check the path and that the server's user may read it", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A private key file is open to others.
    #[error("{}: mode {mode:04o} lets others read this private key; run `chmod 600 {}`", file.display(), file.display())]
    KeyExposed {
        /// The key file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A private key file belongs to somebody else.
    #[error("{}: this private key belongs to user {owner}; make the server's user its owner", file.display())]
    KeyOwner {
        /// The key file.
        file: PathBuf,
        /// Its owner's user id.
        owner: u32,
    },
    /// A file is larger than is sensible.
    #[error("{}: larger than {MAX_FILE_BYTES} bytes; this is not the file you mean", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
    },
    /// A file holds none of what it should.
    #[error("{}: no PEM {what} found; expected -----BEGIN {label}-----", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// Its PEM label.
        label: &'static str,
    },
    /// A file holds something that cannot be used.
    #[error("{}: {problem}; {remedy}", file.display())]
    Unusable {
        /// The file.
        file: PathBuf,
        /// What is wrong, without any key material.
        problem: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The library refused the whole.
    #[error("TLS cannot be set up: {0}")]
    Library(String),
}

/// What one reading of the files gave.
pub(crate) struct Loaded {
    pub(crate) server: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    pub(crate) generation: u64,
    crl_next_update: Option<u64>,
    certificate: PeerValidity,
    /// When the first of the clients' authorities ends.
    client_ca_not_after: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct PeerValidity {
    not_before: u64,
    not_after: u64,
}

/// The server's TLS side: the current configuration, and how to read it anew.
pub struct TlsState {
    files: TlsFiles,
    clock: Arc<dyn TimeProvider>,
    current: ArcSwap<Loaded>,
    reloading: Mutex<()>,
}

impl fmt::Debug for TlsState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsState")
            .field("files", &self.files)
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

/// Everything that is wrong with each of the files by itself: a start stops at the first.
#[must_use]
pub fn problems(files: &TlsFiles, texts: &TlsTexts) -> Vec<TlsConfigError> {
    let mut all = Vec::new();
    if texts.certificate.is_none() {
        all.extend(read_certificates(&files.certificate).err());
    }
    if texts.key.is_none() {
        all.extend(read_key(&files.key).err());
    }
    if texts.client_ca.is_none() {
        all.extend(read_roots(&files.client_ca).err());
    }
    if let Some(crl) = files.crl.as_ref().filter(|_| texts.crl.is_none()) {
        all.extend(read_file(crl).err());
    }
    all
}

impl TlsState {
    /// Reads the files, by the system's clock.
    ///
    /// # Errors
    /// See [`TlsConfigError`]: unreadable files, exposed keys, a key that does not fit, expired material.
    pub fn load(files: TlsFiles) -> Result<Self, TlsConfigError> {
        Self::load_with_clock(files, Arc::new(DefaultTimeProvider))
    }

    /// As [`load`](Self::load), with what comes from elsewhere.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with(files: TlsFiles, texts: &TlsTexts) -> Result<Self, TlsConfigError> {
        Self::assemble(files, texts, Arc::new(DefaultTimeProvider))
    }

    /// Reads the files; every check of validity, now and later, uses `clock`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_with_clock(
        files: TlsFiles,
        clock: Arc<dyn TimeProvider>,
    ) -> Result<Self, TlsConfigError> {
        Self::assemble(files, &TlsTexts::default(), clock)
    }

    fn assemble(
        files: TlsFiles,
        texts: &TlsTexts,
        clock: Arc<dyn TimeProvider>,
    ) -> Result<Self, TlsConfigError> {
        let loaded = read_all(&files, texts, &clock, 1)?;
        Ok(Self { files, clock, current: ArcSwap::from_pointee(loaded), reloading: Mutex::new(()) })
    }

    /// Reads the files again. New connections use the new material and new ticket keys at once; connections that
    /// are open have their chain verified again before their next request.
    ///
    /// # Errors
    /// As [`load`](Self::load); what was in use stays in use.
    pub fn reload(&self) -> Result<(), TlsConfigError> {
        self.reload_with(&TlsTexts::default())
    }

    /// As [`reload`](Self::reload), with what comes from elsewhere.
    ///
    /// # Errors
    /// As [`load`](Self::load); what was in use stays in use.
    pub fn reload_with(&self, texts: &TlsTexts) -> Result<(), TlsConfigError> {
        let _one_at_a_time = self.reloading.lock();
        let loaded =
            read_all(&self.files, texts, &self.clock, self.generation().saturating_add(1))?;
        self.current.store(Arc::new(loaded));
        Ok(())
    }

    /// Counts readings of the files, from 1.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.current.load().generation
    }

    /// Last second of the server certificate's validity, Unix time.
    #[must_use]
    pub fn certificate_not_after(&self) -> u64 {
        self.current.load().certificate.not_after
    }

    /// Last second of the first of the clients' authorities to end, Unix time.
    #[must_use]
    pub fn client_ca_not_after(&self) -> Option<u64> {
        self.current.load().client_ca_not_after
    }

    /// When the revocation list must have been replaced, Unix time: from then on every certificate is refused.
    #[must_use]
    pub fn crl_next_update(&self) -> Option<u64> {
        self.current.load().crl_next_update
    }

    /// The clock by which certificates are judged. A clock that cannot be read counts as the end of time, when
    /// nothing is valid.
    #[must_use]
    pub fn now(&self) -> UnixTime {
        self.clock
            .current_time()
            .unwrap_or_else(|| UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::MAX)))
    }

    pub(crate) fn current(&self) -> Arc<Loaded> {
        self.current.load_full()
    }
}

impl Loaded {
    /// Verifies a chain as a full handshake would, and tells until which second that stands.
    pub(crate) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        certificate: &PeerCertificate,
        now: UnixTime,
    ) -> Option<u64> {
        let (leaf, intermediates) = chain.split_first()?;
        self.verifier.verify_client_cert(leaf, intermediates, now).ok()?;
        Some(self.stands_until(certificate, now.as_secs()))
    }

    /// The next second after `now` at which a verification that just succeeded has to be repeated.
    pub(crate) fn stands_until(&self, certificate: &PeerCertificate, now: u64) -> u64 {
        let crl = self.crl_next_update.filter(|at| *at > now).unwrap_or(u64::MAX);
        certificate.next_expiry(now).unwrap_or(u64::MAX).min(crl)
    }
}

/// The cryptography of TLS on either side: aws-lc-rs, post-quantum key exchange preferred.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn read_all(
    files: &TlsFiles,
    texts: &TlsTexts,
    clock: &Arc<dyn TimeProvider>,
    generation: u64,
) -> Result<Loaded, TlsConfigError> {
    let provider = provider();
    let chain = match &texts.certificate {
        Some(text) => certificates(&files.certificate, text)?,
        None => read_certificates(&files.certificate)?,
    };
    let key = match &texts.key {
        Some(text) => private_key(&files.key, text)?,
        None => read_key(&files.key)?,
    };
    let authorities = match &texts.client_ca {
        Some(text) => certificates(&files.client_ca, text)?,
        None => read_certificates(&files.client_ca)?,
    };
    let client_ca_not_after = first_end(&authorities);
    let roots = roots(&files.client_ca, authorities)?;
    let certificate = server_validity(&files.certificate, &chain, clock)?;

    let mut builder =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let mut crl_next_update = None;
    if let Some(path) = &files.crl {
        let (lists, next) = match &texts.crl {
            Some(text) => revocation_lists(path, text, clock)?,
            None => revocation_lists(path, &read_file(path)?.0, clock)?,
        };
        crl_next_update = Some(next);
        builder = builder.with_crls(lists).enforce_revocation_expiration();
    }
    let inner = builder.build().map_err(|error| TlsConfigError::Unusable {
        file: files.crl.clone().unwrap_or_else(|| files.client_ca.clone()),
        problem: error.to_string(),
        remedy: "replace it with what the certificate authority publishes",
    })?;
    let verifier: Arc<dyn ClientCertVerifier> = Arc::new(StrictVerifier { inner });

    // TLS 1.2 is named out here although this crate does not switch it on: another crate's features might.
    let mut server = ServerConfig::builder_with_details(provider, Arc::clone(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsConfigError::Library(error.to_string()))?
        .with_client_cert_verifier(Arc::clone(&verifier))
        .with_single_cert(chain, key)
        .map_err(|error| TlsConfigError::Unusable {
            file: files.key.clone(),
            problem: format!("does not go with {}: {error}", files.certificate.display()),
            remedy: "give the key that this certificate was issued for",
        })?;
    server.alpn_protocols = vec![ALPN_H2.to_vec()];
    server.ticketer =
        aws_lc_rs::Ticketer::new().map_err(|error| TlsConfigError::Library(error.to_string()))?;
    // Early data could be replayed; no request here may run twice.
    server.max_early_data_size = 0;

    Ok(Loaded {
        server: Arc::new(server),
        verifier,
        generation,
        crl_next_update,
        certificate,
        client_ca_not_after,
    })
}

/// When the first of these certificates ends, Unix time.
fn first_end(certificates: &[CertificateDer<'_>]) -> Option<u64> {
    let end = |der: &CertificateDer<'_>| {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).ok()?;
        u64::try_from(parsed.validity().not_after.timestamp()).ok()
    };
    certificates.iter().filter_map(end).min()
}

fn server_validity(
    file: &Path,
    chain: &[CertificateDer<'_>],
    clock: &Arc<dyn TimeProvider>,
) -> Result<PeerValidity, TlsConfigError> {
    let unusable = |problem: String, remedy| TlsConfigError::Unusable {
        file: file.to_owned(),
        problem,
        remedy,
    };
    let parsed = PeerCertificate::parse(chain)
        .map_err(|error| unusable(error.to_string(), "issue a new server certificate"))?;
    let now = clock.current_time().map_or(u64::MAX, |now| now.as_secs());
    let validity = PeerValidity { not_before: parsed.not_before(), not_after: parsed.not_after() };
    if now > validity.not_after {
        return Err(unusable("the server certificate has expired".into(), "issue a new one"));
    }
    if now < validity.not_before {
        return Err(unusable(
            "the server certificate is not valid yet".into(),
            "check the clock or the certificate",
        ));
    }
    Ok(validity)
}

fn read_file(path: &Path) -> Result<(Zeroizing<Vec<u8>>, std::fs::Metadata), TlsConfigError> {
    let unreadable = |source| TlsConfigError::Unreadable { file: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(unreadable(std::io::ErrorKind::IsADirectory.into()));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(
        usize::try_from(metadata.len().min(MAX_FILE_BYTES)).unwrap_or(0),
    ));
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(TlsConfigError::TooLarge { file: path.to_owned() });
    }
    Ok((bytes, metadata))
}

/// Reads every certificate of a PEM file.
pub(crate) fn read_certificates(
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    certificates(path, &read_file(path)?.0)
}

fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsConfigError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|_| TlsConfigError::Unusable {
            file: path.to_owned(),
            problem: "the PEM text is damaged".into(),
            remedy: "copy the file again from where it was issued",
        })?;
    if certificates.is_empty() {
        return Err(TlsConfigError::Missing {
            file: path.to_owned(),
            what: "certificate",
            label: "CERTIFICATE",
        });
    }
    Ok(certificates)
}

/// Reads a private key after checking that nobody else can.
///
/// The rule is PostgreSQL's: the file is ours with mode 0600 at most, or it is root's with mode 0640 at most, as
/// orchestrators mount secrets.
pub(crate) fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
    let (bytes, metadata) = read_file(path)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let us = rustix::process::geteuid().as_raw();
    let forbidden = match owner {
        _ if owner == us => 0o077,
        0 => 0o037,
        _ => return Err(TlsConfigError::KeyOwner { file: path.to_owned(), owner }),
    };
    if mode & forbidden != 0 {
        return Err(TlsConfigError::KeyExposed { file: path.to_owned(), mode });
    }
    private_key(path, &bytes)
}

fn private_key(path: &Path, text: &[u8]) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
    PrivateKeyDer::from_pem_slice(text).map_err(|_| TlsConfigError::Missing {
        file: path.to_owned(),
        what: "private key",
        label: "PRIVATE KEY",
    })
}

/// Reads trust anchors.
pub(crate) fn read_roots(path: &Path) -> Result<RootCertStore, TlsConfigError> {
    roots(path, read_certificates(path)?)
}

/// The authorities in a PEM text that came from `path`.
pub(crate) fn roots_in(path: &Path, text: &[u8]) -> Result<RootCertStore, TlsConfigError> {
    roots(path, certificates(path, text)?)
}

fn roots(
    path: &Path,
    certificates: Vec<CertificateDer<'static>>,
) -> Result<RootCertStore, TlsConfigError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate).map_err(|error| TlsConfigError::Unusable {
            file: path.to_owned(),
            problem: error.to_string(),
            remedy: "remove what is not the certificate of an authority",
        })?;
    }
    Ok(roots)
}

fn revocation_lists(
    path: &Path,
    text: &[u8],
    clock: &Arc<dyn TimeProvider>,
) -> Result<(Vec<CertificateRevocationListDer<'static>>, u64), TlsConfigError> {
    let unusable = |problem: &str| TlsConfigError::Unusable {
        file: path.to_owned(),
        problem: problem.into(),
        remedy: "fetch a new list from the certificate authority, or remove `crl` from the configuration",
    };
    let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|_| unusable("the PEM text is damaged"))?;
    if lists.is_empty() {
        return Err(TlsConfigError::Missing {
            file: path.to_owned(),
            what: "revocation list",
            label: "X509 CRL",
        });
    }
    let now = clock.current_time().map_or(u64::MAX, |now| now.as_secs());
    let mut earliest = u64::MAX;
    for list in &lists {
        let (_, parsed) =
            x509_parser::parse_x509_crl(list).map_err(|_| unusable("not a revocation list"))?;
        let next =
            parsed.next_update().ok_or_else(|| unusable("a revocation list has no nextUpdate"))?;
        earliest = earliest.min(u64::try_from(next.timestamp()).unwrap_or(0));
    }
    if now >= earliest {
        return Err(unusable("a revocation list is past its nextUpdate"));
    }
    Ok((lists, earliest))
}

/// webpki's verification, and then our reading of the names: a certificate that cannot be read is no certificate.
#[derive(Debug)]
struct StrictVerifier {
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for StrictVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let chain: Vec<_> = std::iter::once(end_entity).chain(intermediates).cloned().collect();
        match PeerCertificate::parse(&chain) {
            Ok(_) => Ok(verified),
            Err(_) => {
                Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests;
