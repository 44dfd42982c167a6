//! Client certificates from the node's own authority.

use std::time::Duration;

use polykey_proto::polykey::v2 as pb;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::Request;

use super::{AdminService, commands, event, parse, settled};
use crate::authn::certificate::{self, CertificateIdentity, PeerCertificate};
use crate::authz::{Action, Resource};
use crate::context::Context;
use crate::directory::{Client, ClientState, ClientUpdate};
use crate::error::{Error, Reason};
use crate::keyring::Idempotency;
use crate::pki::{self, Authority, Issued, PkiError, Validity};
use crate::rpc::convert::timestamp;
use crate::time::Time;

/// How far before now a certificate begins, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(300);

impl AdminService {
    pub(super) async fn issue_certificate(
        &self,
        request: Request<pb::IssueCertificateRequest>,
    ) -> Result<pb::IssueCertificateResponse, Error> {
        let (admitted, cx, m) = self.admit(request)?;
        let key = Self::idempotency(&admitted, "IssueCertificate", &m);
        let seconds = parse::certificate(&m)?;
        settled!(None::<u64>, self.try_issue(&cx, &m, seconds, key.as_ref()))
    }

    async fn try_issue(
        &self,
        cx: &Context,
        m: &pb::IssueCertificateRequest,
        seconds: u64,
        key: Option<&Idempotency>,
    ) -> Result<pb::IssueCertificateResponse, Error> {
        let id = m.client_id.as_str();
        let subject = self.subject(id).await?;
        let name = subject.client.as_ref().and_then(|client| name_of(client));
        let resource = Resource::Client(&subject.facts);
        let command = commands::IssueCertificate { adds: name.is_none() };
        let decision = self.authorize(cx, resource, command).await?;
        let client = subject.known()?;
        if client.state == ClientState::Removed {
            return Err(Error::State(Reason::ClientState));
        }
        // A certificate whose answer was lost is nobody's: whoever repeats the request gets another.
        let key = if self.repeated(cx, key).await? { None } else { key };
        let authority = self.0.admin.authority.as_deref();
        let authority = authority.ok_or(Error::State(Reason::NotConfigured))?;
        let identity = match name {
            Some(name) => name.clone(),
            None => pki::client_identity(id).map_err(refused)?,
        };

        let now = Duration::from_micros(u64::try_from(cx.now.micros()).unwrap_or(0));
        let not_after = now + Duration::from_secs(seconds);
        let validity = Validity::between(now.saturating_sub(BACKDATE), not_after);
        let request = (!m.csr_pem.is_empty()).then_some(m.csr_pem.as_str());
        let issued = issue(authority, &identity, id, request, validity)?;
        let certificate = read(&issued)?;
        let mut identities = client.identities.clone();
        if name.is_none() {
            identities.push(identity.clone());
        }
        // A client that is pinned to a key is served by a certificate for that key alone.
        if certificate::matches(&identities, &certificate, false).is_none() {
            let text = "must be for a key that the client is pinned to";
            return Err(Error::invalid("csr_pem", text));
        }

        let (shown, thumbprint) = (identity.to_string(), certificate.thumbprint_hex());
        let serial = certificate.serial_hex();
        let details = [
            ("client", id),
            ("identity", shown.as_str()),
            ("certificate_sha256", thumbprint.as_str()),
            ("serial", serial.as_str()),
        ];
        let event = event(cx, Action::IssueCertificate, decision, &details);
        let audit_index = if name.is_some() {
            let vault = self.directory().vault();
            let mut tx = vault.begin().await?;
            if let Some(key) = key {
                key.noted(vault, cx, id).write(&mut tx).await?;
            }
            tx.event(event);
            tx.commit().await?.leaf.unwrap_or(0)
        } else {
            let change = self.change(cx, event, client.revision, key, id);
            let identities_to_add = vec![identity];
            let update = ClientUpdate { identities_to_add, ..ClientUpdate::default() };
            let changed = self.directory().update_client(id, &update, &change).await?;
            changed.receipt.leaf.unwrap_or(0)
        };
        let expires = i64::try_from(certificate.not_after()).unwrap_or(i64::MAX);
        Ok(pb::IssueCertificateResponse {
            certificate_chain_pem: issued.certificate.clone(),
            private_key_pem: issued.key.as_ref().map(|key| key.to_string()).unwrap_or_default(),
            not_after: Some(timestamp(Time::from_seconds(expires))),
            certificate_sha256: thumbprint,
            authority_pem: authority.certificate().to_owned(),
            audit_index,
        })
    }
}

/// The first identity that can stand in a certificate as a name.
fn name_of(client: &Client) -> Option<&CertificateIdentity> {
    client
        .identities
        .iter()
        .find(|i| matches!(i, CertificateIdentity::SpiffeUri(_) | CertificateIdentity::Dns(_)))
}

fn issue(
    authority: &Authority,
    identity: &CertificateIdentity,
    id: &str,
    request: Option<&str>,
    validity: Validity,
) -> Result<Issued, Error> {
    authority.client_as(identity, id, request, validity).map_err(refused)
}

fn refused(error: PkiError) -> Error {
    match error {
        PkiError::Request(_) => Error::invalid("csr_pem", error.to_string()),
        PkiError::ClientId(_) => Error::invalid("client_id", error.to_string()),
        other => Error::internal(format!("issuing a certificate: {other}")),
    }
}

fn read(issued: &Issued) -> Result<PeerCertificate, Error> {
    let bad = |e: &dyn std::fmt::Display| Error::internal(format!("an issued certificate: {e}"));
    let der = CertificateDer::from_pem_slice(issued.certificate.as_bytes()).map_err(|e| bad(&e))?;
    PeerCertificate::parse(&[der]).map_err(|e| bad(&e))
}
