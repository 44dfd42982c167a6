//! The wrapper over AWS KMS, and secrets from AWS Systems Manager's Parameter Store.
//!
//! [`AwsWrapper`] lets KMS encrypt 32 fresh random bytes, bound to node, purpose and slot by an
//! encryption context, and seals the key itself under them in this process. So a key of any length
//! is wrapped by one small call, no answer of the service is believed that does not open what was
//! sealed, and the key never passes through the buffers of an HTTP client.
//!
//! The settings exist in every build; what they configure, in builds with the feature `aws`.

use std::time::Duration;

#[cfg(feature = "aws")]
mod client;
#[cfg(feature = "aws")]
mod failure;
#[cfg(feature = "aws")]
mod key;
#[cfg(feature = "aws")]
mod kms;
#[cfg(feature = "aws")]
pub(crate) mod ssm;

#[cfg(feature = "aws")]
pub use kms::AwsWrapper;

/// Which KMS key, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsKms {
    /// A symmetric key of AWS KMS: its ARN, its id, `alias/NAME`, or the ARN of an alias.
    pub key: String,
    /// How AWS is reached.
    pub connection: AwsConnection,
}

/// How AWS is reached. What is not set is found as every AWS tool finds it: in the environment,
/// in `~/.aws`, from the machine's or the container's role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsConnection {
    /// The Region; that of the key's ARN if there is one.
    pub region: Option<String>,
    /// Where the service is asked instead of at its public address: a VPC endpoint, a test server.
    /// It is not where a role is assumed: `AWS_ENDPOINT_URL_STS` is.
    pub endpoint_url: Option<String>,
    /// The profile in AWS' configuration files.
    pub profile: Option<String>,
    /// The ARN of a role to assume with the credentials that are found.
    pub role_arn: Option<String>,
    /// Only FIPS endpoints. `false` leaves it to the environment and the profile.
    pub fips: bool,
    /// Endpoints with IPv6. `false` leaves it to the environment and the profile.
    pub dual_stack: bool,
    /// How long one connection may take.
    pub connect_timeout: Duration,
    /// How long one try may take, the connection included. There are three at most, within the
    /// deadline of the request.
    pub attempt_timeout: Duration,
}

impl Default for AwsConnection {
    fn default() -> Self {
        Self {
            region: None,
            endpoint_url: None,
            profile: None,
            role_arn: None,
            fips: false,
            dual_stack: false,
            connect_timeout: Duration::from_secs(2),
            attempt_timeout: Duration::from_secs(4),
        }
    }
}
