//! A client's configuration: settings over what every AWS tool finds, and deadlines.

use std::net::IpAddr;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::sts::AssumeRoleProvider;
use aws_config::timeout::TimeoutConfig;
use aws_config::{AppName, BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_kms::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_kms::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_kms::error::BoxError;

use super::AwsConnection;
use crate::{Deadline, WrapError};

/// The first try included.
const TRIES: u32 = 3;
/// Waits between tries are random, up to this and up to twice this.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(1);

impl AwsConnection {
    /// Finds Region and credentials' sources; no service is asked, except the machine's metadata
    /// when no Region is set anywhere.
    pub(super) async fn load(
        &self,
        region: Option<&str>,
        deadline: Deadline,
    ) -> Result<SdkConfig, WrapError> {
        let Self {
            region: set_region,
            endpoint_url, // of one service, so it is set on that service's client
            profile,
            role_arn,
            fips,
            dual_stack,
            connect_timeout,
            attempt_timeout,
        } = self;
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(*connect_timeout)
            .operation_attempt_timeout(*attempt_timeout)
            .build();
        let retries = RetryConfig::standard()
            .with_max_attempts(TRIES)
            .with_initial_backoff(FIRST_BACKOFF)
            .with_max_backoff(MAX_BACKOFF);
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .timeout_config(timeouts)
            .retry_config(retries);
        if let Ok(name) = AppName::new("polykey") {
            loader = loader.app_name(name);
        }
        if let Some(region) = set_region.as_deref().or(region) {
            loader = loader.region(Region::new(region.to_owned()));
        }
        if let Some(profile) = profile {
            loader = loader.profile_name(profile);
        }
        if *fips {
            loader = loader.use_fips(true);
        }
        if *dual_stack {
            loader = loader.use_dual_stack(true);
        }
        let config = within(deadline, loader.load()).await?;
        // A role is assumed with the credentials that are found, at an address of its own.
        let role_at = std::env::var("AWS_ENDPOINT_URL_STS").ok().filter(|_| role_arn.is_some());
        let urls = [endpoint_url.as_deref(), config.endpoint_url(), role_at.as_deref()];
        for url in urls.into_iter().flatten() {
            check_endpoint(url)?;
        }
        if config.region().is_none() {
            return Err(WrapError::Config(
                "no AWS Region: set `region`, AWS_REGION or the profile's region".to_owned(),
            ));
        }
        let Some(role) = role_arn else { return Ok(config) };
        if !role.starts_with("arn:") || !role.contains(":role/") {
            return Err(WrapError::Config(format!(
                "`{role}` is not the ARN of a role: arn:aws:iam::ACCOUNT:role/NAME"
            )));
        }
        let role =
            AssumeRoleProvider::builder(role.as_str()).session_name("polykey").configure(&config);
        let role = within(deadline, role.build()).await?;
        Ok(config.into_builder().credentials_provider(SharedCredentialsProvider::new(role)).build())
    }
}

/// Secrets travel in what is sent, so only this machine is spoken to in the clear.
fn check_endpoint(url: &str) -> Result<(), WrapError> {
    let host = |rest: &str| {
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        // A name before `@` would hide the host.
        let plain = !authority.contains('@');
        let name = match authority.split_once(']') {
            Some((name, _)) => name.trim_start_matches('[').to_owned(),
            None => authority.split(':').next().unwrap_or_default().to_owned(),
        };
        let local = |ip: IpAddr| ip.is_loopback();
        plain && (name == "localhost" || name.parse().is_ok_and(local))
    };
    let lower = url.to_ascii_lowercase();
    if lower.starts_with("https://") || lower.strip_prefix("http://").is_some_and(host) {
        return Ok(());
    }
    Err(WrapError::Config(format!(
        "the AWS endpoint `{url}` must be https:// (http:// on this machine alone)"
    )))
}

/// Something was to be sent in the clear.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct InTheClear(String);

/// Refuses to send anything in the clear to another machine, wherever the endpoint was found: the SDK
/// also finds one for a single service, in its own variable or in the profile.
#[derive(Debug)]
pub(super) struct NothingInTheClear;

impl Intercept for NothingInTheClear {
    fn name(&self) -> &'static str {
        "NothingInTheClear"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        check_endpoint(context.request().uri())
            .map_err(|error| InTheClear(error.to_string()).into())
    }
}

/// The Region a loaded configuration asks in.
pub(super) fn region(config: &SdkConfig) -> String {
    config.region().map_or_else(String::new, |region| region.as_ref().to_owned())
}

/// Waits no longer than the deadline; what waits then is dropped, tries and all.
pub(super) async fn within<T>(
    deadline: Deadline,
    work: impl Future<Output = T>,
) -> Result<T, WrapError> {
    deadline.check()?;
    // Boxed: the SDK's futures are large.
    tokio::time::timeout_at(deadline.0.into(), Box::pin(work))
        .await
        .map_err(|_| WrapError::DeadlineExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_spoken_to_in_the_clear() {
        for (url, accepted) in [
            ("https://kms.eu-west-1.amazonaws.com", true),
            ("HTTPS://vpce-1.kms.eu-west-1.vpce.amazonaws.com/", true),
            ("http://127.0.0.1:5000", true),
            ("http://localhost:4566/", true),
            ("http://[::1]:4566", true),
            ("http://kms.eu-west-1.amazonaws.com", false),
            ("http://10.0.0.1:4566", false),
            ("http://127.0.0.1.example.com", false),
            ("http://localhost:x@example.com", false),
            ("http://[::1]@example.com", false),
            ("http://", false),
            ("kms.eu-west-1.amazonaws.com", false),
            ("file:///tmp/x", false),
        ] {
            assert_eq!(check_endpoint(url).is_ok(), accepted, "{url}");
        }
    }
}
