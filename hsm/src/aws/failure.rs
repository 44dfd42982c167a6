//! Why AWS did not do what was asked, told apart by type, error code and HTTP status, in words that
//! an operator can act on. What AWS says is quoted only where it cannot hold a credential.

use std::error::Error;

use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ConnectorError, ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::assume_role::AssumeRoleError;
use aws_sdk_sts::operation::assume_role_with_web_identity::AssumeRoleWithWebIdentityError;

use super::client::InTheClear;
use crate::WrapError;

/// What was asked of AWS.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    /// As in an IAM policy.
    pub(super) action: &'static str,
    /// A key, a role, parameters.
    pub(super) subject: &'a str,
    pub(super) region: &'a str,
}

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// KMS does not open the ciphertext: changed bytes, or another encryption context.
    Broken,
    /// Infrastructure: asking again later can help.
    Unavailable(String),
    /// AWS answered, and said no.
    Refused(String),
    /// It can never work as configured.
    Config(String),
}

impl Failure {
    /// As a wrapper tells it; why there is no answer goes to the log.
    pub(super) fn into_wrap_error(self, asked: &Asked<'_>) -> WrapError {
        match self {
            Self::Broken => WrapError::Broken,
            Self::Unavailable(reason) => {
                let Asked { action, subject, region } = asked;
                tracing::warn!(action, key = subject, region, reason, "AWS KMS gave no answer");
                WrapError::Unavailable { retryable: true }
            }
            Self::Refused(words) => WrapError::Refused(words),
            Self::Config(words) => WrapError::Config(words),
        }
    }
}

pub(super) fn classify<E>(error: &SdkError<E, HttpResponse>, asked: &Asked<'_>) -> Failure
where
    E: Error + ProvideErrorMetadata + 'static,
{
    if let Some(refused) = find::<InTheClear>(error) {
        return Failure::Config(refused.to_string());
    }
    match error {
        SdkError::ConstructionFailure(_) => Failure::Config(chain(error)),
        SdkError::DispatchFailure(_) => dispatch(error, asked),
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            service(answer.err().code(), answer.err().message(), status, asked)
        }
        // Time-outs, answers that are cut short or no answers at all, and what may be added.
        _ => Failure::Unavailable(chain(error)),
    }
}

/// Nothing was sent, or nothing came back.
fn dispatch(error: &(dyn Error + 'static), asked: &Asked<'_>) -> Failure {
    if let Some(found) = find::<CredentialsError>(error) {
        return credentials(found, asked);
    }
    match find::<ConnectorError>(error) {
        Some(connector) if connector.is_user() => Failure::Config(chain(error)),
        _ => Failure::Unavailable(chain(error)),
    }
}

fn credentials(error: &CredentialsError, asked: &Asked<'_>) -> Failure {
    let sts = Asked { action: "sts:AssumeRole", subject: "the configured role", ..*asked };
    if let Some(found) = find::<SdkError<AssumeRoleError, HttpResponse>>(error) {
        return classify(found, &sts);
    }
    if let Some(found) = find::<SdkError<AssumeRoleWithWebIdentityError, HttpResponse>>(error) {
        return classify(found, &Asked { action: "sts:AssumeRoleWithWebIdentity", ..sts });
    }
    let away = find::<ConnectorError>(error).is_some_and(|e| e.is_timeout() || e.is_io());
    match error {
        CredentialsError::CredentialsNotLoaded(_) => Failure::Refused(
            "no AWS credentials: give this machine or container a role, or set AWS_PROFILE, or \
             AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                .to_owned(),
        ),
        CredentialsError::ProviderTimedOut(_) => Failure::Unavailable(chain(error)),
        _ if away => Failure::Unavailable(chain(error)),
        CredentialsError::InvalidConfiguration(_) => {
            Failure::Config(format!("the AWS configuration is not valid: {}", chain(error)))
        }
        _ => Failure::Refused(format!("no AWS credentials: {}", chain(error))),
    }
}

/// Codes that mean "slower": the SDK's list, and what KMS adds.
const THROTTLED: &[&str] = &[
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "LimitExceededException",
    "TooManyRequestsException",
    "ProvisionedThroughputExceededException",
    "TransactionInProgressException",
    "PriorRequestNotComplete",
    "SlowDown",
    "EC2ThrottledException",
    "RequestTimeout",
    "RequestTimeoutException",
    "DependencyTimeoutException",
    "KMSInternalException",
    "KeyUnavailableException",
];

fn service(code: Option<&str>, message: Option<&str>, status: u16, asked: &Asked<'_>) -> Failure {
    let Asked { action, subject, region } = asked;
    let says = || {
        let message = message.map(plain).filter(|text| !text.is_empty());
        message.map_or_else(String::new, |text| format!(" (AWS says: {text})"))
    };
    let refused = Failure::Refused;
    match code {
        Some("InvalidCiphertextException") => Failure::Broken,
        Some("IncorrectKeyException") => refused(format!(
            "wrong key: AWS KMS says that {subject} did not encrypt this; configure the key that \
             did"
        )),
        Some("DisabledException") => {
            refused(format!("{subject} is disabled: `aws kms enable-key` enables it"))
        }
        Some("KMSInvalidStateException") => refused(format!(
            "{subject} cannot be used in the state it is in{}; if its deletion is pending, run \
             `aws kms cancel-key-deletion` and `aws kms enable-key` before it is gone for good",
            says()
        )),
        Some("NotFoundException") => {
            refused(format!("{subject} was not found in {region}: check key, Region and account"))
        }
        Some("InvalidKeyUsageException") => Failure::Config(format!(
            "{subject} is not a symmetric key for encryption (SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT)"
        )),
        Some("AccessDeniedException" | "AccessDenied") => refused(format!(
            "AWS denies {action} on {subject}: allow it in the policies of the caller and of the \
             resource, conditions included{}",
            says()
        )),
        Some("ExpiredTokenException" | "ExpiredToken") => refused(
            "the AWS credentials have expired: renew the session, or use a role that renews itself"
                .to_owned(),
        ),
        // Their messages may repeat what was signed, a session token included.
        Some(
            code @ ("InvalidSignatureException"
            | "SignatureDoesNotMatch"
            | "RequestExpired"
            | "IncompleteSignature"),
        ) => refused(format!(
            "AWS does not accept the signature ({code}): check the secret access key, and the \
             clock of this machine"
        )),
        Some(
            code @ ("UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "InvalidAccessKeyId"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "AuthFailure"),
        ) => refused(format!("AWS does not know the credentials ({code}): renew them")),
        Some(code) if THROTTLED.contains(&code) || status == 429 || status >= 500 => {
            Failure::Unavailable(format!("{code}, HTTP {status}{}", says()))
        }
        None if status == 429 || status >= 500 => Failure::Unavailable(format!("HTTP {status}")),
        _ if status < 300 => Failure::Unavailable("an answer that is not one of AWS".to_owned()),
        Some(code) => {
            refused(format!("AWS refuses {action} on {subject} with {}{}", plain(code), says()))
        }
        None if matches!(status, 401 | 403) => refused(format!(
            "AWS refuses {action} on {subject} (HTTP {status}, without a reason): check the \
             credentials, and what stands between"
        )),
        None => refused(format!(
            "{action} on {subject} was answered with HTTP {status} and no error of AWS: check \
             `endpoint_url` and proxies"
        )),
    }
}

/// The first error of type `T` in a chain.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    std::iter::successors(Some(error), |error| Error::source(*error))
        .find_map(|error| error.downcast_ref::<T>())
}

/// A chain of errors as one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for error in std::iter::successors(Some(error), |error| Error::source(*error)) {
        let one = plain(&error.to_string());
        if !text.ends_with(&one) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&one);
        }
    }
    plain(&text)
}

/// Somebody else's words: one line of at most 300 characters.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}
