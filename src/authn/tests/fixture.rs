//! A node with a vault, a directory, a token key and hand-set time.

use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use pasetors::keys::{AsymmetricKeyPair, Generate};
use pasetors::version4::V4;
use polykey_hsm::{BoxFuture, Ring};
use polykey_proto::polykey::record::v1::{AuditEvent, SigningKeyRecord};
use polykey_storage::Store;
use polykey_storage::memory::Memory;
use rcgen::{CertificateParams, DnType, KeyPair, SanType};

use crate::authn::Audit;
use crate::authn::certificate::{CertificateIdentity, PeerCertificate};
use crate::authn::login::{Credentials, Tokens};
use crate::authn::session::{Attempt, Authenticator, Settings};
use crate::directory::{Change, Directory, NewClient, SecurityCaches};
use crate::error::Error;
use crate::time::{Clock, Time};
use crate::vault::Vault;

pub(crate) const START: Time = Time::from_seconds(1_800_000_000);
pub(crate) const NODE: [u8; 16] = [9; 16];

/// Refusals, in the order they were recorded.
#[derive(Default)]
pub(crate) struct Refusals(pub(crate) Mutex<Vec<AuditEvent>>);

impl Audit for Refusals {
    fn denied(&self, event: AuditEvent) -> BoxFuture<'_, Result<(), Error>> {
        self.0.lock().push(event);
        Box::pin(async { Ok(()) })
    }
}

pub(crate) struct Node {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) vault: Arc<Vault>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) refusals: Arc<Refusals>,
    pub(crate) clock: Clock,
}

impl Node {
    pub(crate) async fn new() -> Self {
        let store = Arc::new(Memory::new().unwrap());
        Self::create(store, Ring::generate(NODE).unwrap(), Settings::default()).await
    }

    pub(crate) async fn with(settings: Settings) -> Self {
        let store = Arc::new(Memory::new().unwrap());
        Self::create(store, Ring::generate(NODE).unwrap(), settings).await
    }

    pub(crate) async fn create(store: Arc<dyn Store>, ring: Ring, settings: Settings) -> Self {
        let caches = Arc::new(SecurityCaches::new(1024));
        let clock = Clock::manual(START);
        let vault = Vault::create(
            Arc::clone(&store),
            ring,
            NODE,
            Vec::new(),
            Arc::clone(&caches) as _,
            clock.clone(),
        )
        .await
        .unwrap();
        let node = Self::over(store, vault, caches, settings, clock);
        node.add_token_key(START, None).await;
        node
    }

    pub(crate) async fn open(store: Arc<dyn Store>, ring: Ring, clock: Clock) -> Self {
        let caches = Arc::new(SecurityCaches::new(1024));
        let vault =
            Vault::open(Arc::clone(&store), ring, NODE, Arc::clone(&caches) as _, clock.clone())
                .await
                .unwrap();
        Self::over(store, vault, caches, Settings::default(), clock)
    }

    fn over(
        store: Arc<dyn Store>,
        vault: Vault,
        caches: Arc<SecurityCaches>,
        settings: Settings,
        clock: Clock,
    ) -> Self {
        let vault = Arc::new(vault);
        let directory = Arc::new(Directory::new(Arc::clone(&vault), caches));
        let refusals = Arc::new(Refusals::default());
        let authenticator =
            Authenticator::new(Arc::clone(&directory), Arc::clone(&refusals) as _, settings);
        Self { store, vault, directory, authenticator: Arc::new(authenticator), refusals, clock }
    }

    /// Adds a key that signs tokens from `from` on.
    pub(crate) async fn add_token_key(&self, from: Time, verify_until: Option<Time>) -> [u8; 16] {
        let record = token_key(from, verify_until);
        let id: [u8; 16] = record.id.as_ref().try_into().unwrap();
        let mut tx = self.vault.begin().await.unwrap();
        tx.insert(&id, &record).unwrap();
        tx.commit().await.unwrap();
        id
    }

    /// An administrator, so that others may be changed freely.
    pub(crate) async fn admin(&self) -> String {
        let new = NewClient {
            id: "admin".into(),
            roles: vec!["admin".into()],
            identities: vec![dns("admin.example")],
            ..NewClient::default()
        };
        let (_, key) = self.directory.create_client(&new, &self.change()).await.unwrap();
        key.unwrap().reveal().to_owned()
    }

    /// A client with role `user` whose certificates are for `NAME.example`; its API key.
    pub(crate) async fn client(&self, name: &str) -> String {
        let new = NewClient {
            id: name.into(),
            roles: vec!["user".into()],
            identities: vec![dns(&format!("{name}.example"))],
            ..NewClient::default()
        };
        let (_, key) = self.directory.create_client(&new, &self.change()).await.unwrap();
        key.unwrap().reveal().to_owned()
    }

    pub(crate) fn change(&self) -> Change {
        Change {
            event: AuditEvent { action: "Test".into(), ..AuditEvent::default() },
            now: self.clock.now(),
            expected: None,
            remember: None,
        }
    }

    pub(crate) fn now(&self) -> Time {
        self.clock.now()
    }

    pub(crate) fn attempt<'a>(&self, peer: &'a Arc<PeerCertificate>) -> Attempt<'a> {
        attempt(peer, self.clock.now())
    }

    pub(crate) async fn login(
        &self,
        id: &str,
        api_key: &str,
        peer: &Arc<PeerCertificate>,
    ) -> Result<Tokens, Error> {
        let credentials = Credentials { client_id: id, api_key, grant_type: "" };
        self.authenticator.login(&credentials, &self.attempt(peer)).await
    }

    pub(crate) async fn who(
        &self,
        token: &str,
        peer: &Arc<PeerCertificate>,
    ) -> Result<String, Error> {
        let session = self.authenticator.authenticate_request(token, &self.attempt(peer)).await?;
        Ok(session.caller.client_id().to_owned())
    }
}

pub(crate) fn attempt(peer: &Arc<PeerCertificate>, now: Time) -> Attempt<'_> {
    Attempt { peer, address: address(1), request_id: "r", now }
}

pub(crate) fn address(host: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, host], 4000))
}

pub(crate) fn token_key(from: Time, verify_until: Option<Time>) -> SigningKeyRecord {
    let pair = AsymmetricKeyPair::<V4>::generate().unwrap();
    let id: [u8; 16] = polykey_hsm::random::array().unwrap();
    SigningKeyRecord {
        id: id.to_vec().into(),
        secret: pair.secret.as_bytes().to_vec().into(),
        public: pair.public.as_bytes().to_vec().into(),
        created_at: from.micros(),
        active_from: from.micros(),
        active_until: 0,
        verify_until: verify_until.map_or(0, Time::micros),
        purpose: "token".into(),
    }
}

pub(crate) fn dns(name: &str) -> CertificateIdentity {
    CertificateIdentity::dns(name).unwrap()
}

/// A certificate with these DNS names (`spiffe://` ones are URIs); a new key each time.
pub(crate) fn certificate(names: &[&str], common_name: Option<&str>) -> Arc<PeerCertificate> {
    let mut params = CertificateParams::default();
    for name in names {
        let text = (*name).to_owned().try_into().unwrap();
        let uri = name.starts_with("spiffe://");
        params.subject_alt_names.push(if uri {
            SanType::URI(text)
        } else {
            SanType::DnsName(text)
        });
    }
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(name) = common_name {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
    Arc::new(PeerCertificate::parse(&[certificate.der().clone()]).unwrap())
}

/// A certificate of the client `name`.
pub(crate) fn peer(name: &str) -> Arc<PeerCertificate> {
    certificate(&[&format!("{name}.example")], None)
}
