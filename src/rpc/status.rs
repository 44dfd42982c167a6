//! Errors to gRPC statuses: the only file that names a status code.

use std::time::Duration;

use polykey_proto::google::rpc::{
    BadRequest, ErrorInfo, RetryInfo, Status as RpcStatus, bad_request,
};
use prost::Message;
use tonic::{Code, Status};

use crate::error::{Error, Reason};

const DOMAIN: &str = "polykey";

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
        Error::Exhausted { .. } => Code::ResourceExhausted,
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
            let field_violations = violations.iter().map(violation).collect();
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
        Error::Unauthenticated
        | Error::NotFound
        | Error::Crypto
        | Error::DeadlineExceeded
        | Error::DataLoss { .. }
        | Error::Internal { .. } => Vec::new(),
    }
}

/// The status of an error, with details in `grpc-status-details-bin`. What is for operators goes to
/// the log, not into it.
#[must_use]
pub fn status(error: &Error) -> Status {
    if let Some(internal) = error.internal_text() {
        tracing::error!(code = ?code(error), internal, "a request failed");
    }
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

    #[test]
    fn a_bad_field_is_named_in_the_details() {
        let status = status(&Error::invalid("tags[\"a b\"]", "must not have a blank"));
        let decoded = RpcStatus::decode(status.details()).unwrap();
        let bad = BadRequest::decode(decoded.details[0].value.as_slice()).unwrap();
        assert_eq!(bad.field_violations[0].field, "tags[\"a b\"]");
        assert_eq!(decoded.code, 3);
    }
}
