//! Errors to gRPC statuses: the only file that names a status code.

use std::time::Duration;

use polykey_proto::google::rpc::{
    BadRequest, ErrorInfo, QuotaFailure, RetryInfo, Status as RpcStatus, bad_request, quota_failure,
};
use prost::Message;
use tonic::{Code, Status};

use crate::error::{Error, Reason};

const DOMAIN: &str = "polykey";
/// The reason of a quota of keys that is used up: waiting does not help.
pub(crate) const KEY_QUOTA: &str = "KEY_QUOTA";
/// Bytes of violations in one answer. They travel in headers, in base64, twice; clients take 8 KiB.
const DETAILS: usize = 2048;

/// The code of an error. No `_`: a new error does not compile until somebody has chosen its code.
#[must_use]
pub fn code(error: &Error) -> Code {
    match error {
        Error::Unauthenticated => Code::Unauthenticated,
        Error::Invalid(_) | Error::Crypto => Code::InvalidArgument,
        Error::NotFound => Code::NotFound,
        Error::Denied { .. } => Code::PermissionDenied,
        Error::State(Reason::AlreadyExists) => Code::AlreadyExists,
        Error::State(_) => Code::FailedPrecondition,
        Error::Conflict => Code::Aborted,
        Error::Exhausted { .. } | Error::Quota { .. } | Error::NoRoom => Code::ResourceExhausted,
        Error::Unavailable { .. } => Code::Unavailable,
        Error::OutcomeUnknown { .. } => Code::Unknown,
        Error::DeadlineExceeded => Code::DeadlineExceeded,
        Error::DataLoss { .. } => Code::DataLoss,
        Error::Internal { .. } => Code::Internal,
    }
}

/// The machine-readable reason, where there is one beyond the code.
#[must_use]
pub fn reason(error: &Error) -> &'static str {
    match error {
        Error::State(reason) => reason.name(),
        Error::OutcomeUnknown { .. } => "OUTCOME_UNKNOWN",
        Error::Conflict => "CHANGED_CONCURRENTLY",
        Error::Denied { .. } => "PERMISSION_DENIED",
        Error::NoRoom => "DISK_FULL",
        Error::Quota { .. } => KEY_QUOTA,
        Error::Unauthenticated
        | Error::Invalid(_)
        | Error::NotFound
        | Error::Crypto
        | Error::Exhausted { .. }
        | Error::Unavailable { .. }
        | Error::DeadlineExceeded
        | Error::DataLoss { .. }
        | Error::Internal { .. } => "",
    }
}

fn any<M: Message>(name: &str, message: &M) -> prost_types::Any {
    prost_types::Any {
        type_url: format!("type.googleapis.com/google.rpc.{name}"),
        value: message.encode_to_vec(),
    }
}

fn retry(after: Duration) -> prost_types::Any {
    let delay = prost_types::Duration {
        seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(after.subsec_nanos()).unwrap_or(0),
    };
    any("RetryInfo", &RetryInfo { retry_delay: Some(delay) })
}

fn details(error: &Error) -> Vec<prost_types::Any> {
    let info = |reason: &str, metadata: &[(&str, &str)]| {
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        any("ErrorInfo", &ErrorInfo { reason: reason.into(), domain: DOMAIN.into(), metadata })
    };
    match error {
        Error::Invalid(violations) => {
            let violation = |v: &crate::error::FieldViolation| bad_request::FieldViolation {
                field: v.field.clone(),
                description: v.description.clone(),
                ..Default::default()
            };
            let mut room = DETAILS;
            let field_violations = violations
                .iter()
                .map(violation)
                .take_while(|v| {
                    let left = room.checked_sub(v.encoded_len());
                    room = left.unwrap_or(0);
                    left.is_some()
                })
                .collect();
            vec![any("BadRequest", &BadRequest { field_violations })]
        }
        Error::State(_) | Error::Conflict | Error::OutcomeUnknown { .. } => {
            vec![info(reason(error), &[])]
        }
        Error::Denied { decision_id } => {
            vec![info(reason(error), &[("decision_id", decision_id)])]
        }
        Error::Exhausted { retry_after } | Error::Unavailable { retry_after, .. } => {
            vec![retry(*retry_after)]
        }
        // Without a time to wait: it ends when keys do.
        Error::Quota { name, keys } => {
            let violation = quota_failure::Violation {
                subject: "keys".into(),
                description: error.to_string(),
                quota_id: name.clone(),
                quota_value: i64::from(*keys),
            };
            let failure = QuotaFailure { violations: vec![violation] };
            vec![info(reason(error), &[("quota", name)]), any("QuotaFailure", &failure)]
        }
        Error::NoRoom => vec![info(reason(error), &[]), retry(Duration::from_secs(30))],
        Error::Unauthenticated
        | Error::NotFound
        | Error::Crypto
        | Error::DeadlineExceeded
        | Error::DataLoss { .. }
        | Error::Internal { .. } => Vec::new(),
    }
}

/// Tells operators what strangers are not told.
pub(crate) fn log(error: &Error) {
    if let Some(internal) = error.internal_text() {
        tracing::error!(code = ?code(error), internal, "a request failed");
    }
}

/// The status of an error, with details in `grpc-status-details-bin`. What is for operators goes to
/// the log, not into it.
#[must_use]
pub fn status(error: &Error) -> Status {
    log(error);
    let code = code(error);
    let message = error.to_string();
    let details = details(error);
    if details.is_empty() {
        return Status::new(code, message);
    }
    let status = RpcStatus { code: code as i32, message: message.clone(), details };
    Status::with_details(code, message, status.encode_to_vec().into())
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        status(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_operators_stays_inside() {
        let error = Error::DataLoss { internal: "row 17".into() };
        let status = status(&error);
        assert_eq!(status.code(), Code::DataLoss);
        assert!(!status.message().contains("17") && status.details().is_empty());
    }

    #[tokio::test]
    async fn what_does_not_decode_is_the_senders_mistake_and_no_type_is_named() {
        use polykey_proto::polykey::v2::CreateKeyRequest;
        use tonic::codec::{Codec as _, Streaming};
        let mut codec = polykey_proto::Codec::<(), CreateKeyRequest>::default();
        // One uncompressed message of three bytes: a map entry that ends too soon.
        let bytes = bytes::Bytes::from_static(&[0, 0, 0, 0, 3, 0x22, 0x7f, 0]);
        let body = http_body_util::Full::new(bytes);
        let mut stream = Streaming::new_request(codec.decoder(), body, None, None);
        let status = stream.message().await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(!status.message().contains("CreateKey") && !status.details().is_empty());
    }

    #[test]
    fn whoever_is_not_known_is_told_the_same_at_either_layer() {
        let status = status(&Error::Unauthenticated);
        assert_eq!(status.message(), crate::net::UNAUTHENTICATED_TEXT);
    }

    #[test]
    fn many_violations_fit_into_the_headers_of_every_client() {
        // gRPC's C core refuses more than 8 KiB of metadata, names and overhead counted.
        let mut v = crate::limits::Violations::new();
        for i in 0..64 {
            let name = "\u{7f}%\u{202e}".repeat(40);
            v.add(format!("tags[{}]", crate::limits::shown(&name)), format!("{i} ").repeat(900));
        }
        let error = v.finish().unwrap_err();
        let headers = status(&error).into_http::<String>();
        let size: usize = headers.headers().values().map(|v| v.len()).sum();
        assert!(size < 7 * 1024, "{size}");
        let details = RpcStatus::decode(status(&error).details()).unwrap();
        let bad = BadRequest::decode(details.details[0].value.as_slice()).unwrap();
        assert!(!bad.field_violations.is_empty());
    }

    #[test]
    fn a_bad_field_is_named_in_the_details() {
        let status = status(&Error::invalid("tags[\"a b\"]", "must not have a blank"));
        let decoded = RpcStatus::decode(status.details()).unwrap();
        let bad = BadRequest::decode(decoded.details[0].value.as_slice()).unwrap();
        assert_eq!(bad.field_violations[0].field, "tags[\"a b\"]");
        assert_eq!(decoded.code, 3);
    }
}
