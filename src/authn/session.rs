//! From a token and a certificate to a [`Caller`], for every request.
//!
//! A verified token is remembered for a minute, bound to its certificate. What it was accepted on
//! (client, roles, revocations, identity) is looked at again whenever the security epoch has moved, so
//! nothing that was acknowledged as revoked is accepted afterwards.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;

use super::Audit;
use super::certificate::{self, PeerCertificate};
use super::limiter::{Allowance, Limiter, network};
use super::token::{Claims, Kind, MAX_TOKEN, TokenError};
use crate::cache::{Cache, Counts};
use crate::context::Caller;
use crate::directory::{Client, ClientState, Directory};
use crate::error::Error;
use crate::rates::{Rates, Rule};
use crate::time::Time;
use crate::vault::tree::Hash;

/// How tokens live and how much failing is borne.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Life of an access token.
    pub access: Duration,
    /// Life of a refresh token; at least that of an access token.
    pub refresh: Duration,
    /// How long a refresh token that was exchanged gives the same successor again.
    pub reuse: Duration,
    /// How long the signature of an access token is not verified again.
    pub remember: Duration,
    /// How many access tokens are remembered.
    pub remembered: usize,
    /// Whether a certificate without URI and DNS names may prove a common name.
    pub common_name: bool,
    /// Failed logins per address.
    pub login_per_address: Allowance,
    /// Failed logins per client, counted once the certificate matches.
    pub login_per_client: Allowance,
    /// Tokens that are not ours, per address.
    pub tokens_per_address: Allowance,
    /// How many addresses and clients are counted.
    pub sources: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let allow = |burst, millis| Allowance { burst, interval: Duration::from_millis(millis) };
        Self {
            access: Duration::from_secs(15 * 60),
            refresh: Duration::from_secs(24 * 3600),
            reuse: Duration::from_secs(10),
            remember: Duration::from_secs(60),
            remembered: 16 * 1024,
            common_name: false,
            login_per_address: allow(20, 3_000),
            login_per_client: allow(10, 6_000),
            tokens_per_address: allow(100, 100),
            sources: 16 * 1024,
        }
    }
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    /// The verified certificate of the connection.
    pub peer: &'a Arc<PeerCertificate>,
    /// Its address.
    pub address: SocketAddr,
    /// For the audit trail.
    pub request_id: &'a str,
    /// Read once, when the request came in.
    pub now: Time,
}

/// A verified access token.
#[derive(Debug)]
struct Verified {
    claims: Claims,
    client_row: Hash,
    at: Time,
}

/// A caller and the token it came by; long streams ask again with every message.
#[derive(Clone, Debug)]
pub struct Session {
    /// The caller.
    pub caller: Arc<Caller>,
    verified: Arc<Verified>,
}

/// Tells callers by token and certificate, and lets clients log in.
pub struct Authenticator {
    pub(super) directory: Arc<Directory>,
    pub(super) audit: Arc<dyn Audit>,
    pub(super) settings: Settings,
    pub(super) issuer: String,
    sessions: Cache<Hash, Session>,
    pub(super) logins_by_address: Limiter<std::net::IpAddr>,
    pub(super) logins_by_client: Limiter<Hash>,
    rates: ArcSwap<Rates>,
    tokens_by_address: Limiter<std::net::IpAddr>,
}

impl Authenticator {
    /// Over a directory; refusals go to `audit`.
    #[must_use]
    pub fn new(directory: Arc<Directory>, audit: Arc<dyn Audit>, settings: Settings) -> Self {
        let mut settings = settings;
        settings.refresh = settings.refresh.max(settings.access);
        Self {
            issuer: HEXLOWER.encode(&directory.vault().node_id()),
            sessions: Cache::new(settings.remembered),
            logins_by_address: Limiter::new(settings.login_per_address, settings.sources),
            logins_by_client: Limiter::new(settings.login_per_client, settings.sources),
            tokens_by_address: Limiter::new(settings.tokens_per_address, settings.sources),
            rates: ArcSwap::default(),
            directory,
            audit,
            settings,
        }
    }

    /// Puts rules in force, with full buckets.
    pub fn limit(&self, rules: &[Rule]) {
        self.rates.store(Arc::new(Rates::new(rules)));
    }

    /// How often clients may call.
    #[must_use]
    pub fn rates(&self) -> arc_swap::Guard<Arc<Rates>> {
        self.rates.load()
    }

    /// Clients and roles.
    #[must_use]
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    pub(crate) fn audit(&self) -> &Arc<dyn Audit> {
        &self.audit
    }

    /// Who sends this access token over this connection.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] for every fault of the token, certificate or client alike,
    /// [`Error::Exhausted`] after too many tokens that are not ours from one address,
    /// [`Error::Unavailable`] if the store cannot be read.
    pub async fn authenticate_request(
        &self,
        token: &str,
        attempt: &Attempt<'_>,
    ) -> Result<Session, Error> {
        self.directory.vault().fresh().await?;
        let now = self.directory.time(attempt.now);
        if token.len() > MAX_TOKEN {
            self.tokens_by_address.failed(network(attempt.address.ip()), now);
            return Err(Error::Unauthenticated);
        }
        let mut name = Hash::default();
        name.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        if let Some(session) = self.sessions.get(&name) {
            let claims = &session.verified.claims;
            if claims.certificate != *attempt.peer.thumbprint() || claims.expires_at <= now {
                return Err(Error::Unauthenticated);
            }
            if now.since(session.verified.at) < self.settings.remember {
                if session.caller.epoch == self.directory.epoch() {
                    return Ok(session);
                }
                let caller = Box::pin(self.resolve(&session.verified, attempt.peer)).await?;
                let session = Session { caller, verified: session.verified };
                self.remember(name, &session);
                return Ok(session);
            }
        }
        Box::pin(self.verified(token, name, attempt, now)).await
    }

    /// Verifies a token that is not remembered, and remembers it.
    async fn verified(
        &self,
        token: &str,
        name: Hash,
        attempt: &Attempt<'_>,
        now: Time,
    ) -> Result<Session, Error> {
        let source = network(attempt.address.ip());
        if let Err(retry_after) = self.tokens_by_address.check(&source, now) {
            return Err(Error::Exhausted { retry_after });
        }
        let keys = self.directory.token_keys().await?;
        let certificate = attempt.peer.thumbprint();
        let claims = match keys.verify(token, Kind::Access, &self.issuer, certificate, now) {
            Ok(claims) => claims,
            Err(error) => {
                tracing::debug!(%error, request_id = attempt.request_id, "refused a token");
                // Honest clients send tokens that have run out, many at once.
                if error != TokenError::Expired {
                    self.tokens_by_address.failed(source, now);
                }
                return Err(Error::Unauthenticated);
            }
        };
        let client_row = self.directory.client_row(&claims.subject);
        let verified = Arc::new(Verified { claims, client_row, at: now });
        let caller = self.resolve(&verified, attempt.peer).await?;
        let session = Session { caller, verified };
        self.remember(name, &session);
        Ok(session)
    }

    fn remember(&self, name: Hash, session: &Session) {
        // Nothing is ever invalidated here: the epoch in the session decides.
        let ticket = self.sessions.ticket(&name);
        self.sessions.insert(ticket, name, session.clone());
    }

    /// How well what it remembers of tokens does.
    #[must_use]
    pub fn session_counts(&self) -> Counts {
        self.sessions.counts()
    }

    /// The same session at a later moment, for streams: the caller as it is by now.
    ///
    /// # Errors
    /// As [`Self::authenticate_request`].
    pub async fn recheck(&self, session: &Session, now: Time) -> Result<Arc<Caller>, Error> {
        self.directory.vault().fresh().await?;
        if session.verified.claims.expires_at <= self.directory.time(now) {
            return Err(Error::Unauthenticated);
        }
        if session.caller.epoch == self.directory.epoch() {
            return Ok(Arc::clone(&session.caller));
        }
        self.resolve(&session.verified, &session.caller.certificate).await
    }

    /// As [`Self::recheck`], for work that was begun with a token in force and lasts longer than one: the
    /// client, its certificate and revocations are looked at, the end of the token is not.
    ///
    /// # Errors
    /// As [`Self::authenticate_request`].
    pub async fn recheck_begun(&self, session: &Session) -> Result<Arc<Caller>, Error> {
        self.directory.vault().fresh().await?;
        if session.caller.epoch == self.directory.epoch() {
            return Ok(Arc::clone(&session.caller));
        }
        self.resolve(&session.verified, &session.caller.certificate).await
    }

    /// The client behind a verified token, if it is still all that it must be.
    async fn resolve(
        &self,
        verified: &Verified,
        peer: &Arc<PeerCertificate>,
    ) -> Result<Arc<Caller>, Error> {
        // Read before the rows: what changes from here on makes this epoch an old one.
        let epoch = self.directory.epoch();
        let claims = &verified.claims;
        let client = self.directory.client_at(&verified.client_row).await?;
        let client = client.ok_or(Error::Unauthenticated)?;
        self.may_be(&client, claims, peer)?;
        if self.directory.token_revoked(&claims.token_id).await?
            || self.directory.family(&claims.family).await?.is_none_or(|family| family.revoked)
        {
            return Err(Error::Unauthenticated);
        }
        Ok(Arc::new(Caller {
            facts: Arc::new(self.directory.facts(&client).await?),
            tier: client.tier,
            certificate: Arc::clone(peer),
            token_id: claims.token_id,
            token_expires_at: claims.expires_at,
            epoch,
        }))
    }

    /// Whether the client may use a token with these claims over this certificate.
    pub(super) fn may_be(
        &self,
        client: &Client,
        claims: &Claims,
        peer: &PeerCertificate,
    ) -> Result<(), Error> {
        let ok = client.state == ClientState::Enabled
            && client.id == claims.subject
            && claims.issued_at >= client.tokens_valid_from
            && self.proves(client, peer);
        if ok { Ok(()) } else { Err(Error::Unauthenticated) }
    }

    pub(super) fn proves(&self, client: &Client, peer: &PeerCertificate) -> bool {
        certificate::matches(&client.identities, peer, self.settings.common_name).is_some()
    }
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authenticator")
            .field("settings", &self.settings)
            .field("remembered", &self.sessions.len())
            .finish_non_exhaustive()
    }
}
