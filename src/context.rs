//! Who asks, over what, and when: everything about a request that is not in its message.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::authn::certificate::PeerCertificate;
use crate::authz::{Claims, PermissionSet};
use crate::time::Time;

/// A caller whose certificate and token have been verified and matched to one client.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The client.
    pub client_id: String,
    /// The revision of its record that was verified.
    pub client_revision: u64,
    /// Names of its roles.
    pub roles: Vec<String>,
    /// Literal permissions and those of its roles, expanded.
    pub permissions: PermissionSet,
    /// common.v2.ClientTier.
    pub tier: i32,
    /// As in the client's record.
    pub environment: String,
    /// The verified certificate.
    pub certificate: Arc<PeerCertificate>,
    /// `jti` of the access token.
    pub token_id: [u8; 16],
    /// End of the access token.
    pub token_expires_at: Time,
    /// Security epoch at which all this was verified; see `Directory::epoch`.
    pub epoch: u64,
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
    pub claims: Claims,
}
