//! What an error of the database means for the store.

use std::{error::Error as _, fmt::Write as _, future::Future, time::Duration};

use tokio::time::{Instant, timeout_at};
use tokio_postgres::{Error, error::SqlState};

use super::tls::TlsError;
use crate::StoreError;

/// What may be concluded from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The transaction was rolled back, and may well succeed the next time.
    Serialization,
    /// The connection is of no more use, and the database may be away for everybody.
    Lost,
    /// Who answers is not who was opened.
    Foreign,
    /// An answer, which would be the same the next time.
    Answer,
}

/// An error of the database, translated.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    pub(super) error: StoreError,
    pub(super) code: Option<SqlState>,
}

impl Failure {
    pub(super) fn lost(why: impl Into<String>) -> Self {
        Self { kind: Kind::Lost, error: StoreError::Unreachable(why.into()), code: None }
    }

    pub(super) fn foreign(why: impl Into<String>) -> Self {
        Self { kind: Kind::Foreign, error: StoreError::Other(why.into()), code: None }
    }

    pub(super) fn answer(error: StoreError) -> Self {
        Self { kind: Kind::Answer, error, code: None }
    }

    pub(super) fn damaged(what: impl Into<String>) -> Self {
        Self::answer(StoreError::Damaged(what.into()))
    }

    /// Whether the store serves nothing more until it is opened again.
    pub(super) fn latches(&self) -> bool {
        matches!(self.kind, Kind::Lost | Kind::Foreign)
    }

    pub(super) fn is(&self, code: &SqlState) -> bool {
        self.code.as_ref() == Some(code)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let Some(answer) = error.as_db_error() else { return without_answer(&error) };
        // Neither detail nor context: they may hold rows.
        let said = format!("{} ({})", answer.message(), answer.code().code());
        let (kind, said) = match *answer.code() {
            SqlState::T_R_SERIALIZATION_FAILURE
            | SqlState::T_R_DEADLOCK_DETECTED
            // The head had moved, and left no revision.
            | SqlState::NOT_NULL_VIOLATION => (Kind::Serialization, StoreError::Contended(said)),
            SqlState::LOCK_NOT_AVAILABLE => (Kind::Answer, StoreError::Contended(said)),
            SqlState::INVALID_PASSWORD
            | SqlState::INVALID_AUTHORIZATION_SPECIFICATION
            | SqlState::INVALID_CATALOG_NAME
            | SqlState::INSUFFICIENT_PRIVILEGE => (Kind::Answer, StoreError::Refused(said)),
            SqlState::QUERY_CANCELED
            | SqlState::READ_ONLY_SQL_TRANSACTION
            | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => {
                (Kind::Lost, StoreError::Unreachable(said))
            }
            SqlState::UNDEFINED_TABLE | SqlState::INVALID_SCHEMA_NAME => {
                (Kind::Answer, StoreError::Damaged(said))
            }
            SqlState::INVALID_SQL_STATEMENT_NAME | SqlState::DUPLICATE_PSTATEMENT => {
                let why = "a pooler gives each transaction another session; set transaction_pooler";
                (Kind::Answer, StoreError::Other(format!("the database said: {said}: {why}")))
            }
            // Connection exceptions, too few resources, an operator's intervention, a failing system.
            ref code if ["08", "53", "57", "58", "XX"].iter().any(|class| code.code().starts_with(class)) => {
                (Kind::Lost, StoreError::Unreachable(said))
            }
            _ => (Kind::Answer, StoreError::Other(format!("the database said: {said}"))),
        };
        Self { kind, error: said, code: Some(answer.code().clone()) }
    }
}

// The server has said nothing: what the driver says instead, with all its reasons.
fn without_answer(error: &Error) -> Failure {
    let mut text = error.to_string();
    let (mut tls, mut io) = (false, false);
    let mut source = error.source();
    while let Some(cause) = source {
        tls |= cause.is::<TlsError>();
        io |= cause.is::<std::io::Error>();
        let reason = cause.to_string();
        if !text.contains(&reason) {
            // Writing to a string does not fail.
            let _ = write!(text, ": {reason}");
        }
        source = cause.source();
    }
    if tls {
        Failure::answer(StoreError::Tls(text))
    } else if io || error.is_closed() {
        Failure::lost(text)
    } else {
        Failure::answer(StoreError::Other(text))
    }
}

/// What `work` comes to, if it does before `deadline`.
pub(super) async fn within<T>(
    deadline: Instant,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let started = Instant::now();
    match timeout_at(deadline, work).await {
        Ok(done) => done,
        Err(_) => {
            let waited = started.elapsed().as_millis();
            Err(Failure::lost(format!("no answer in {waited} ms")))
        }
    }
}

/// Pauses that grow from none to 200 ms, and are never the same for two nodes.
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(Duration::ZERO)
    }

    /// Waits. False, and no wait, if there is no time for one before `deadline`.
    pub(super) async fn pause(&mut self, deadline: Instant) -> bool {
        let whole = self.0;
        self.0 = (whole * 2).clamp(Duration::from_millis(2), Duration::from_millis(200));
        // Half of it and a random part of the other half.
        let part = getrandom::u32().map_or(1.0, |random| f64::from(random) / f64::from(u32::MAX));
        let pause = whole.mul_f64(0.5 + part / 2.0);
        if Instant::now() + pause >= deadline {
            return false;
        }
        tokio::time::sleep(pause).await;
        true
    }
}
