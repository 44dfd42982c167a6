//! Who the caller is: the certificate of the connection and the token of the request.

pub mod api_key;
pub mod certificate;
pub mod layer;
pub mod limiter;
pub mod login;
pub mod session;
#[cfg(test)]
pub(crate) mod tests;
pub mod token;

use polykey_hsm::BoxFuture;
use polykey_proto::polykey::record::v1::AuditEvent;

use crate::error::Error;

/// Where refusals of identity are written. What succeeds is audited in the transaction it makes.
pub trait Audit: Send + Sync + 'static {
    /// Makes a refusal durable, aggregated with others like it where there are many.
    fn denied(&self, event: AuditEvent) -> BoxFuture<'_, Result<(), Error>>;
}

impl Audit for crate::audit::Trail {
    fn denied(&self, event: AuditEvent) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(Self::denied(self, event))
    }
}
