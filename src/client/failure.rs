//! What a server's refusal says: the status, and the details it carries beside its text.

use std::time::Duration;

use polykey_proto::google::rpc;
use prost::Message;
use tonic::{Code, Status};

/// One field that the server finds malformed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field as in the protobuf.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

/// A call that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The code.
    pub code: Code,
    /// What the server, or the transport, said.
    pub message: String,
    /// Malformed fields, with INVALID_ARGUMENT.
    pub violations: Vec<Violation>,
    /// Why, in capitals, with FAILED_PRECONDITION; empty when not said.
    pub reason: String,
    /// How long to wait before trying again, when said.
    pub retry_after: Option<Duration>,
    /// The id of the request, as in the server's logs and audit log; empty when there is none.
    pub request_id: String,
    /// What lies beneath a failure of the transport, from the outside in.
    pub causes: Vec<String>,
    /// Whether the failure beneath is that nobody listens at the address.
    pub refused: bool,
    /// Whether the server broke TLS off, as it does with a certificate it does not take.
    pub alert: bool,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        match self.causes.last() {
            Some(cause) if !self.message.contains(cause.as_str()) => write!(f, ": {cause}"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

/// What lies beneath an error.
pub(crate) struct Beneath {
    /// Its texts from the outside in, without repetition.
    pub(crate) texts: Vec<String>,
    /// Whether a refused connection is among it.
    pub(crate) refused: bool,
    /// Whether an alert of TLS is among it.
    pub(crate) alert: bool,
}

/// Looks beneath an error.
pub(crate) fn causes(error: &(dyn std::error::Error + 'static)) -> Beneath {
    let mut found = Beneath { texts: Vec::new(), refused: false, alert: false };
    let mut next = error.source();
    while let Some(cause) = next {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            found.refused |= io.kind() == std::io::ErrorKind::ConnectionRefused;
        }
        let text = cause.to_string();
        // HTTP/2 keeps nothing of the error of TLS but its text; a test fails when that changes.
        found.alert |= text.contains("received fatal alert");
        if found.texts.last() != Some(&text) {
            found.texts.push(text);
        }
        next = cause.source();
    }
    found
}

impl From<&Status> for Failure {
    fn from(status: &Status) -> Self {
        let Beneath { texts, refused, alert } = causes(status);
        let mut failure = Self {
            code: status.code(),
            message: status.message().to_owned(),
            violations: Vec::new(),
            reason: String::new(),
            retry_after: None,
            request_id: status
                .metadata()
                .get("polykey-request-id")
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned(),
            causes: texts,
            refused,
            alert,
        };
        // Details that do not decode are left out: the status stands without them.
        if let Ok(details) = rpc::Status::decode(status.details()) {
            for detail in &details.details {
                failure.add(&detail.type_url, &detail.value);
            }
        }
        failure
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::from(&status)
    }
}

impl Failure {
    fn add(&mut self, type_url: &str, value: &[u8]) {
        match type_url.rsplit('/').next().unwrap_or_default() {
            "google.rpc.BadRequest" => {
                if let Ok(bad) = rpc::BadRequest::decode(value) {
                    self.violations.extend(
                        bad.field_violations
                            .into_iter()
                            .map(|v| Violation { field: v.field, description: v.description }),
                    );
                }
            }
            "google.rpc.ErrorInfo" => {
                if let Ok(info) = rpc::ErrorInfo::decode(value) {
                    self.reason = info.reason;
                }
            }
            "google.rpc.RetryInfo" => {
                if let Ok(retry) = rpc::RetryInfo::decode(value) {
                    self.retry_after =
                        retry.retry_delay.and_then(|delay| Duration::try_from(delay).ok());
                }
            }
            "google.rpc.RequestInfo" => {
                if let Ok(info) = rpc::RequestInfo::decode(value) {
                    self.request_id = info.request_id;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any<M: Message>(name: &str, message: &M) -> prost_types::Any {
        prost_types::Any {
            type_url: format!("type.googleapis.com/google.rpc.{name}"),
            value: message.encode_to_vec(),
        }
    }

    #[test]
    fn details_are_read_and_damage_is_survived() {
        let details = rpc::Status {
            code: 3,
            message: "bad".into(),
            details: vec![
                any(
                    "BadRequest",
                    &rpc::BadRequest {
                        field_violations: vec![rpc::bad_request::FieldViolation {
                            field: "tags[\"a b\"]".into(),
                            description: "has a space".into(),
                            ..Default::default()
                        }],
                    },
                ),
                any(
                    "ErrorInfo",
                    &rpc::ErrorInfo { reason: "KEY_REVOKED".into(), ..Default::default() },
                ),
                any(
                    "RetryInfo",
                    &rpc::RetryInfo {
                        retry_delay: Some(prost_types::Duration { seconds: 2, nanos: 0 }),
                    },
                ),
                any(
                    "RequestInfo",
                    &rpc::RequestInfo { request_id: "r-1".into(), ..Default::default() },
                ),
                any("Unheard", &rpc::RetryInfo { retry_delay: None }),
            ],
        };
        let bytes = details.encode_to_vec();
        let failure =
            Failure::from(Status::with_details(Code::InvalidArgument, "bad", bytes.clone().into()));
        assert_eq!(failure.violations[0].field, "tags[\"a b\"]");
        assert_eq!(failure.reason, "KEY_REVOKED");
        assert_eq!(failure.retry_after, Some(Duration::from_secs(2)));
        assert_eq!(failure.request_id, "r-1");
        for cut in 0..bytes.len() {
            let cut = Status::with_details(Code::Internal, "x", bytes[..cut].to_vec().into());
            assert_eq!(Failure::from(cut).message, "x");
        }
    }
}
