//! Logging in, exchanging refresh tokens, and revoking tokens.
//!
//! Every login and exchange is one transaction: it requires that the client's record is still the one
//! that was judged, writes the token family and carries its audit event.

use polykey_hsm::MacPurpose;
use polykey_proto::polykey::record::v1::audit_event::Outcome;
use polykey_proto::polykey::record::v1::{
    AuditEvent, CanaryRecord, ClientRecord, RevokedTokenRecord, TokenFamilyRecord,
};

use super::api_key;
use super::certificate::{CertificateIdentity, PeerCertificate};
use super::limiter::network;
use super::session::{Attempt, Authenticator};
use super::token::{Claims, Kind};
use crate::audit::event::{CLAIMED, Origin, value_hash};
use crate::directory::{Client, ClientState, is_client_id};
use crate::error::{Error, FieldViolation};
use crate::time::Time;
use crate::vault::space::meta;
use crate::vault::{Receipt, Tx};

/// Longest client id and API key that are looked at, in bytes.
const MAX_CLIENT_ID: usize = 256;
const MAX_API_KEY: usize = 512;
/// How often a change is tried again when another one came first.
const ATTEMPTS: usize = 8;
/// google.rpc.Code.
const UNAUTHENTICATED: i32 = 16;
const RESOURCE_EXHAUSTED: i32 = 8;

/// What a login says of itself.
#[derive(Clone, Copy)]
pub struct Credentials<'a> {
    /// The client; may be empty with `mtls`.
    pub client_id: &'a str,
    /// Its API key; not looked at with `mtls`.
    pub api_key: &'a str,
    /// Empty or `api_key`, or `mtls`.
    pub grant_type: &'a str,
}

impl std::fmt::Debug for Credentials<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("grant_type", &self.grant_type).finish_non_exhaustive()
    }
}

/// The tokens of a login or exchange.
#[derive(Clone)]
pub struct Tokens {
    /// Sent with requests.
    pub access: String,
    /// Exchanged for the next tokens, once.
    pub refresh: String,
    /// Seconds until the access token expires.
    pub expires_in: i64,
    /// Seconds until the refresh token expires.
    pub refresh_expires_in: i64,
    /// When they were issued.
    pub issued_at: Time,
    /// The client.
    pub client_id: String,
    /// Names of everything it may do, sorted.
    pub permissions: Vec<&'static str>,
    /// common.v2.ClientTier.
    pub tier: i32,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

/// A token that has been verified, of whatever client: the only thing that can be revoked.
#[derive(Clone, Debug)]
pub struct GenuineToken(Claims);

impl GenuineToken {
    /// The client it belongs to.
    #[must_use]
    pub fn client_id(&self) -> &str {
        &self.0.subject
    }
}

/// What became of a revocation.
#[derive(Clone, Copy, Debug)]
pub struct Revocation {
    /// When it was revoked, the first time; its end, if that came before.
    pub revoked_at: Time,
    /// Where it stands.
    pub receipt: Receipt,
}

enum Grant {
    ApiKey,
    Mtls,
}

impl Authenticator {
    /// Lets a client log in.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`], with the same text and the same work, for an unknown or disabled
    /// client, a wrong key and a certificate of someone else; [`Error::Exhausted`] after too many of
    /// them from one address or, once the certificate matches, for one client; [`Error::Invalid`] for
    /// fields out of range.
    pub async fn login(
        &self,
        credentials: &Credentials<'_>,
        attempt: &Attempt<'_>,
    ) -> Result<Tokens, Error> {
        let grant = check(credentials)?;
        let now = self.directory.time(attempt.now);
        let source = network(attempt.address.ip());
        let mut event = event("Authenticate", attempt);
        event.details.insert("grant_type".into(), grant.name().into());
        if is_client_id(credentials.client_id) {
            event.details.insert(CLAIMED.into(), api_key::claimed_id(credentials.client_id).into());
        }
        if matches!(grant, Grant::ApiKey) {
            // Which logins were made with a key that has leaked can be asked with the key alone.
            let hash = value_hash(&self.directory.vault().ring(), credentials.api_key.as_bytes());
            event.details.insert("api_key".into(), hash);
        }
        if let Err(retry_after) = self.logins_by_address.check(&source, now) {
            return self.refuse(event, Error::Exhausted { retry_after }).await;
        }
        let mut left = ATTEMPTS;
        let result = loop {
            left -= 1;
            match self.try_login(&grant, credentials, attempt, now, &event).await {
                Err(Error::Conflict) if left > 0 => {}
                other => break other,
            }
        };
        match result {
            Err(Error::Unauthenticated) => {
                self.logins_by_address.failed(source, now);
                self.refuse(event, Error::Unauthenticated).await
            }
            Err(Error::Exhausted { retry_after }) => {
                self.refuse(event, Error::Exhausted { retry_after }).await
            }
            other => other,
        }
    }

    /// Writes a refusal down, then refuses.
    async fn refuse<T>(&self, mut event: AuditEvent, error: Error) -> Result<T, Error> {
        event.set_outcome(Outcome::Denied);
        event.code = match error {
            Error::Exhausted { .. } => RESOURCE_EXHAUSTED,
            _ => UNAUTHENTICATED,
        };
        self.audit.denied(event).await?;
        Err(error)
    }

    async fn try_login(
        &self,
        grant: &Grant,
        credentials: &Credentials<'_>,
        attempt: &Attempt<'_>,
        now: Time,
        event: &AuditEvent,
    ) -> Result<Tokens, Error> {
        let mut tx = self.directory.vault().begin().await?;
        let named = match grant {
            Grant::Mtls if credentials.client_id.is_empty() => {
                self.owner_of(attempt.peer).await?.unwrap_or_default()
            }
            _ => credentials.client_id.to_owned(),
        };
        let row = self.directory.client_row(&named);
        let loaded = tx.get::<ClientRecord>(&row).await?;
        if loaded.is_none() {
            // As many records are opened as for a client that exists.
            self.directory.vault().get::<CanaryRecord>(meta::CANARY).await?;
        }
        let record = loaded.as_ref().map(|l| l.record.clone()).unwrap_or_default();
        let client = loaded
            .map(|l| Client::from_record(&l.record, l.revision))
            .transpose()?
            .filter(|client| client.state == ClientState::Enabled);
        let proven = client.as_ref().is_some_and(|client| self.proves(client, attempt.peer));
        if proven && let Err(retry_after) = self.logins_by_client.check(&row, now) {
            return Err(Error::Exhausted { retry_after });
        }
        // What the client is known by: nothing but its certificate, or the API key with this prefix.
        let known = match grant {
            Grant::Mtls => Some(None),
            Grant::ApiKey => self.known_key(&named, credentials.api_key, &record, now).map(Some),
        };
        let (Some(client), Some(api_key)) = (client.filter(|_| proven), known) else {
            if proven {
                self.logins_by_client.failed(row, now);
            }
            return Err(Error::Unauthenticated);
        };
        tx.pin::<ClientRecord>(&row);
        self.directory.note_login(&mut tx, &client.id, api_key, now)?;
        self.open_family(tx, &client, attempt, now, event.clone()).await
    }

    /// The prefix of the client's API key, if it is one.
    fn known_key<'r>(
        &self,
        client_id: &str,
        key: &str,
        record: &'r ClientRecord,
        now: Time,
    ) -> Option<&'r str> {
        let ring = self.directory.vault().ring();
        // Something to compare with, whoever is asked for.
        let dummy = ring.mac(MacPurpose::LoginDummy, &[client_id.as_bytes()]);
        let mut live =
            record.api_keys.iter().filter(|k| k.expires_at == 0 || k.expires_at > now.micros());
        let macs = live.clone().map(|k| k.mac.as_ref()).chain([dummy.as_slice()]);
        let at = api_key::position(&ring, client_id, key, macs)?;
        live.nth(at).map(|k| k.prefix.as_str())
    }

    /// The only client that the certificate proves to be.
    async fn owner_of(&self, peer: &PeerCertificate) -> Result<Option<String>, Error> {
        let mut candidates = Vec::new();
        candidates.extend(peer.spiffe_id().and_then(|uri| CertificateIdentity::spiffe(uri).ok()));
        candidates.extend(peer.dns_names().iter().filter_map(|n| CertificateIdentity::dns(n).ok()));
        if self.settings.common_name {
            candidates
                .extend(peer.common_name().and_then(|n| CertificateIdentity::common_name(n).ok()));
        }
        candidates.push(CertificateIdentity::SpkiSha256(*peer.spki_sha256()));
        let mut found: Option<String> = None;
        for identity in &candidates {
            let Some(owner) = self.directory.owner(identity).await? else { continue };
            if found.as_ref() == Some(&owner) {
                continue;
            }
            let Some(client) = self.directory.client(&owner).await? else { continue };
            if !self.proves(&client, peer) {
                continue;
            }
            if found.is_some() {
                return Ok(None);
            }
            found = Some(owner);
        }
        Ok(found)
    }

    async fn open_family(
        &self,
        mut tx: Tx<'_>,
        client: &Client,
        attempt: &Attempt<'_>,
        now: Time,
        mut event: AuditEvent,
    ) -> Result<Tokens, Error> {
        let id: [u8; 16] = polykey_hsm::random::array()
            .map_err(|e| Error::internal(format!("naming a token family: {e}")))?;
        let issued = now.max(client.tokens_valid_from);
        let family = TokenFamilyRecord {
            family_id: id.to_vec().into(),
            client_id: client.id.clone(),
            certificate: attempt.peer.thumbprint().to_vec().into(),
            created_at: issued.micros(),
            expires_at: issued.plus(self.settings.refresh).micros(),
            generation: 0,
            exchanged_at: issued.micros(),
            revoked: false,
        };
        tx.insert(&id, &family)?;
        let tokens = self.issue(client, &family, attempt.peer, now).await?;
        event.client_id.clone_from(&client.id);
        event.details.remove(CLAIMED);
        event.set_outcome(Outcome::Success);
        tx.event(event);
        tx.commit().await?;
        Ok(tokens)
    }

    /// The tokens of the family's generation: the same ones however often they are asked for, while
    /// the same key signs and the client has not changed.
    async fn issue(
        &self,
        client: &Client,
        family: &TokenFamilyRecord,
        peer: &PeerCertificate,
        now: Time,
    ) -> Result<Tokens, Error> {
        let keys = self.directory.token_keys().await?;
        let permissions = self.directory.permissions(client).await?;
        let id = family_id(family)?;
        let issued_at = Time::from_micros(family.exchanged_at);
        let claims = |kind: Kind, life| Claims {
            kind,
            issuer: self.issuer.clone(),
            subject: client.id.clone(),
            token_id: self.token_id(kind, &id, family.generation),
            family: id,
            generation: family.generation,
            issued_at,
            not_before: issued_at,
            expires_at: issued_at.plus(life),
            roles: client.roles.clone(),
            tier: client.tier,
            certificate: *peer.thumbprint(),
        };
        let access = claims(Kind::Access, self.settings.access);
        let refresh = claims(Kind::Refresh, self.settings.refresh);
        let mut names: Vec<_> = permissions.iter().map(|p| p.name()).collect();
        names.sort_unstable();
        let left = |at: Time| i64::try_from(at.since(now).as_secs()).unwrap_or(i64::MAX);
        Ok(Tokens {
            access: keys.issue(&access, now)?,
            refresh: keys.issue(&refresh, now)?,
            expires_in: left(access.expires_at),
            refresh_expires_in: left(refresh.expires_at),
            issued_at,
            client_id: client.id.clone(),
            permissions: names,
            tier: client.tier,
        })
    }

    /// Derived, so that an exchange that is repeated gives the tokens it gave before.
    fn token_id(&self, kind: Kind, family: &[u8; 16], generation: u32) -> [u8; 16] {
        let kind: &[u8] = match kind {
            Kind::Access => b"access",
            Kind::Refresh => b"refresh",
        };
        let ring = self.directory.vault().ring();
        let parts: [&[u8]; 4] = [b"token", kind, family, &generation.to_be_bytes()];
        let mac = ring.mac(MacPurpose::RowName, &parts);
        let mut id = [0; 16];
        for (to, from) in id.iter_mut().zip(mac) {
            *to = from;
        }
        id
    }

    /// Exchanges a refresh token for its successors. A second exchange within
    /// [`super::session::Settings::reuse`] gives the same ones; a later one revokes the family.
    ///
    /// # Errors
    /// As [`Self::login`].
    pub async fn refresh(&self, token: &str, attempt: &Attempt<'_>) -> Result<Tokens, Error> {
        let now = self.directory.time(attempt.now);
        let source = network(attempt.address.ip());
        let event = event("RefreshToken", attempt);
        if let Err(retry_after) = self.logins_by_address.check(&source, now) {
            return self.refuse(event, Error::Exhausted { retry_after }).await;
        }
        let keys = self.directory.token_keys().await?;
        let certificate = attempt.peer.thumbprint();
        let claims = match keys.verify(token, Kind::Refresh, &self.issuer, certificate, now) {
            Ok(claims) => claims,
            Err(error) => {
                tracing::debug!(%error, request_id = attempt.request_id, "refused a refresh token");
                self.logins_by_address.failed(source, now);
                return self.refuse(event, Error::Unauthenticated).await;
            }
        };
        let mut event = event;
        event.details.insert(CLAIMED.into(), claims.subject.clone());
        let mut left = ATTEMPTS;
        let result = loop {
            left -= 1;
            match self.try_refresh(&claims, attempt, now, &event).await {
                Err(Error::Conflict) if left > 0 => {}
                other => break other,
            }
        };
        match result {
            Ok(Some(tokens)) => Ok(tokens),
            // A token used again: that stands in the log already.
            Ok(None) => {
                self.logins_by_address.failed(source, now);
                Err(Error::Unauthenticated)
            }
            Err(Error::Unauthenticated) => {
                self.logins_by_address.failed(source, now);
                self.refuse(event, Error::Unauthenticated).await
            }
            Err(error) => Err(error),
        }
    }

    /// `None`: the token was used before, and its family is now revoked.
    async fn try_refresh(
        &self,
        claims: &Claims,
        attempt: &Attempt<'_>,
        now: Time,
        event: &AuditEvent,
    ) -> Result<Option<Tokens>, Error> {
        let mut tx = self.directory.vault().begin().await?;
        let row = self.directory.client_row(&claims.subject);
        let client = tx.get::<ClientRecord>(&row).await?.ok_or(Error::Unauthenticated)?;
        let client = Client::from_record(&client.record, client.revision)?;
        self.may_be(&client, claims, attempt.peer)?;
        let family = tx.get::<TokenFamilyRecord>(&claims.family).await?;
        let mut family = family.ok_or(Error::Unauthenticated)?.record;
        let ours = family.client_id == client.id
            && family.certificate.as_ref() == attempt.peer.thumbprint().as_slice();
        if family.revoked || !ours || claims.generation > family.generation {
            return Err(Error::Unauthenticated);
        }
        let mut event = event.clone();
        event.client_id.clone_from(&client.id);
        event.details.remove(CLAIMED);
        let exchanged = Time::from_micros(family.exchanged_at);
        if claims.generation == family.generation {
            family.generation = family.generation.checked_add(1).ok_or(Error::Unauthenticated)?;
            family.exchanged_at = now.max(client.tokens_valid_from).micros();
            family.expires_at =
                Time::from_micros(family.exchanged_at).plus(self.settings.refresh).micros();
            tx.put(&claims.family, &family)?;
        } else if claims.generation.checked_add(1) == Some(family.generation)
            && now.since(exchanged) <= self.settings.reuse
        {
            event.details.insert("repeated".into(), "true".into());
            tx.pin::<TokenFamilyRecord>(&claims.family);
        } else {
            tracing::warn!(
                client_id = client.id,
                "a refresh token was used again; every token of its login is revoked"
            );
            family.revoked = true;
            tx.put(&claims.family, &family)?;
            event.details.insert("family_revoked".into(), "true".into());
            event.set_outcome(Outcome::Denied);
            event.code = UNAUTHENTICATED;
            tx.event(event);
            tx.commit().await?;
            return Ok(None);
        }
        tx.pin::<ClientRecord>(&row);
        let tokens = self.issue(&client, &family, attempt.peer, now).await?;
        event.set_outcome(Outcome::Success);
        tx.event(event);
        tx.commit().await?;
        Ok(Some(tokens))
    }

    /// Verifies a token of any client, of either kind, over or not, so that it may be revoked. Whether
    /// the caller may do that is decided after this and before [`Self::revoke`].
    ///
    /// # Errors
    /// [`Error::Invalid`] unless this node signed it.
    pub async fn genuine(&self, token: &str, now: Time) -> Result<GenuineToken, Error> {
        let now = self.directory.time(now);
        let keys = self.directory.token_keys().await?;
        let claims = keys.inspect(token, &self.issuer, now);
        claims.map(GenuineToken).map_err(|error| {
            Error::Invalid(vec![FieldViolation {
                field: "access_token".into(),
                description: format!("is no token of this node: {error}"),
            }])
        })
    }

    /// Revokes a token and every token of the same login. In force, and durable with `event`, before
    /// this returns.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn revoke(
        &self,
        token: &GenuineToken,
        event: AuditEvent,
        now: Time,
    ) -> Result<Revocation, Error> {
        let now = self.directory.time(now);
        let mut left = ATTEMPTS;
        loop {
            left -= 1;
            match self.try_revoke(&token.0, &event, now).await {
                Err(Error::Conflict) if left > 0 => {}
                other => return other,
            }
        }
    }

    async fn try_revoke(
        &self,
        claims: &Claims,
        event: &AuditEvent,
        now: Time,
    ) -> Result<Revocation, Error> {
        let mut tx = self.directory.vault().begin().await?;
        let mut revoked_at = now;
        let row = claims.token_id;
        let known = tx.get::<RevokedTokenRecord>(&row).await?;
        if let Some(known) = &known {
            revoked_at = Time::from_micros(known.record.revoked_at);
        } else if claims.expires_at <= now {
            revoked_at = claims.expires_at;
        } else {
            tx.insert(
                &row,
                &RevokedTokenRecord {
                    token_id: row.to_vec().into(),
                    client_id: claims.subject.clone(),
                    revoked_at: now.micros(),
                    expires_at: claims.expires_at.micros(),
                },
            )?;
        }
        if let Some(mut family) = tx.get::<TokenFamilyRecord>(&claims.family).await?
            && !family.record.revoked
        {
            family.record.revoked = true;
            tx.put(&claims.family, &family.record)?;
        }
        tx.event(event.clone());
        let receipt = tx.commit().await?;
        // What was revoked by an earlier call may not be known everywhere yet.
        self.directory.vault().rewitnessed().await?;
        Ok(Revocation { revoked_at, receipt })
    }
}

impl Grant {
    const fn name(&self) -> &'static str {
        match self {
            Self::ApiKey => "api_key",
            Self::Mtls => "mtls",
        }
    }
}

fn check(credentials: &Credentials<'_>) -> Result<Grant, Error> {
    let mut v = crate::limits::Violations::new();
    let long = credentials.client_id.len() > MAX_CLIENT_ID;
    v.check(!long, "client_id", "must have at most 256 bytes");
    v.check(credentials.api_key.len() <= MAX_API_KEY, "api_key", "must have at most 512 bytes");
    let grant = match credentials.grant_type {
        "" | "api_key" => {
            v.check(!credentials.client_id.is_empty(), "client_id", "must not be empty");
            v.check(!credentials.api_key.is_empty(), "api_key", "must not be empty");
            Grant::ApiKey
        }
        "mtls" => Grant::Mtls,
        _ => {
            v.add("grant_type", "must be empty, api_key or mtls");
            Grant::Mtls
        }
    };
    v.finish()?;
    Ok(grant)
}

fn family_id(family: &TokenFamilyRecord) -> Result<[u8; 16], Error> {
    let id = family.family_id.as_ref().try_into();
    id.map_err(|_| Error::data_loss("a token family has a bad id"))
}

/// The event of a refusal or success, as far as it is known before the outcome.
pub(crate) fn event(action: &str, attempt: &Attempt<'_>) -> AuditEvent {
    let origin = Origin {
        time: attempt.now,
        request_id: attempt.request_id,
        correlation_id: "",
        client_id: "",
        certificate: Some(attempt.peer.thumbprint()),
        peer: Some(attempt.address),
    };
    origin.event(action, None, Outcome::Unspecified, 0, "").into()
}
