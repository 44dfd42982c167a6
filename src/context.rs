//! Who asks, over what, and when: everything about a request that is not in its message.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::audit::Origin;
use crate::authn::certificate::PeerCertificate;
use crate::authz::{Claimed, ContextFacts, DecisionId, PrincipalFacts};
use crate::time::Time;

/// A caller whose certificate and token have been verified and matched to one client.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Client id, record revision, roles, expanded permissions, tier and environment, all from the
    /// server's own record.
    pub facts: Arc<PrincipalFacts>,
    /// common.v2.ClientTier.
    pub tier: i32,
    /// The verified certificate.
    pub certificate: Arc<PeerCertificate>,
    /// `jti` of the access token.
    pub token_id: [u8; 16],
    /// End of the access token.
    pub token_expires_at: Time,
    /// Security epoch at which all this was verified; see `Directory::epoch`.
    pub epoch: u64,
}

impl Caller {
    /// The client's id.
    #[must_use]
    pub fn client_id(&self) -> &str {
        &self.facts.client
    }
}

/// One request.
#[derive(Clone, Debug)]
pub struct Context {
    /// Who asks.
    pub caller: Arc<Caller>,
    /// Ours, or the caller's own where it is well formed.
    pub request_id: String,
    /// As claimed; goes into audit and access history.
    pub correlation_id: String,
    /// Where the connection comes from.
    pub peer: SocketAddr,
    /// Read once, when the request came in.
    pub now: Time,
    /// What the caller says of itself: never grants anything.
    pub claimed: Claimed,
}

impl Context {
    /// Where the request came from, as the audit trail names it.
    #[must_use]
    pub fn origin(&self) -> Origin<'_> {
        Origin {
            time: self.now,
            request_id: &self.request_id,
            correlation_id: &self.correlation_id,
            client_id: self.caller.client_id(),
            certificate: Some(self.caller.certificate.thumbprint()),
            peer: Some(self.peer),
        }
    }

    /// What decisions are made from besides caller and resource, under a fresh decision id.
    #[must_use]
    pub fn facts(&self) -> ContextFacts {
        ContextFacts {
            decision_id: DecisionId(crate::ids::at(self.now)),
            now: jiff::Timestamp::from_microsecond(self.now.micros()).unwrap_or_default(),
            source: Some(self.peer.ip()),
            certificate: self.caller.certificate.thumbprint_hex(),
            claimed: self.claimed.clone(),
        }
    }
}
