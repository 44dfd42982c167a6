//! What the command line says when it cannot do what was asked, and the code it exits with.

use std::fmt;
use std::path::Path;

use tonic::Code;

use super::output::clean;
use crate::client::{ClientError, Failure, ProfileError};
use crate::error::Error;
use crate::rpc::status;

/// Exit codes of the process. Scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It did what was asked.
    Ok = 0,
    /// Any other error.
    Other = 1,
    /// The command line, or a value in it, is not as it must be.
    Usage = 2,
    /// There is no such thing, or none that this client may see.
    NotFound = 3,
    /// Not logged in, or not allowed.
    Denied = 4,
    /// The state of the thing forbids it, or it changed meanwhile.
    Conflict = 5,
    /// The server is not reachable, too slow or over a limit; trying again may help.
    Unavailable = 6,
    /// Data is damaged, or a verification failed.
    DataLoss = 7,
}

/// The exit codes for `--help`.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  any other error
  2  the command line or a value in it is wrong
  3  not found
  4  permission denied, or not authenticated
  5  the state forbids it, it changed meanwhile, or a quota of keys is used up
  6  unavailable: not reachable, too slow or over a limit that passes; try again later
  7  data loss, or a verification failed";

impl Exit {
    /// The exit code of a call that ended with `code`.
    #[must_use]
    pub const fn of(code: Code) -> Self {
        match code {
            Code::Ok => Self::Ok,
            Code::InvalidArgument | Code::OutOfRange => Self::Usage,
            Code::NotFound => Self::NotFound,
            Code::PermissionDenied | Code::Unauthenticated => Self::Denied,
            Code::FailedPrecondition | Code::Aborted | Code::AlreadyExists => Self::Conflict,
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Cancelled => Self::Unavailable,
            Code::DataLoss => Self::DataLoss,
            Code::Unknown | Code::Unimplemented | Code::Internal => Self::Other,
        }
    }
}

/// An error of the command line: what happened and where, further lines, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CliError {
    /// The code to exit with.
    pub exit: Exit,
    /// What happened and where, one line. Empty: nothing is printed.
    pub message: String,
    /// Further facts, one a line.
    pub details: Vec<String>,
    /// What to do next. Empty: nothing comes to mind.
    pub hint: String,
}

impl CliError {
    /// An error with this code and text.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), details: Vec::new(), hint: String::new() }
    }

    /// A mistake in the command line that clap cannot see.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// A file that cannot be read or written.
    #[must_use]
    pub fn file(path: &Path, source: &std::io::Error) -> Self {
        let exit =
            if source.kind() == std::io::ErrorKind::NotFound { Exit::Usage } else { Exit::Other };
        Self::new(exit, format!("{}: {source}", path.display()))
    }

    /// An error of a text of several lines: the first one is the message, the others are facts.
    pub fn lines(exit: Exit, text: &str) -> Self {
        let mut lines = text.lines();
        let first = Self::new(exit, lines.next().unwrap_or_default());
        lines.fold(first, Self::detail)
    }

    /// Adds a fact.
    #[must_use]
    pub fn detail(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Ends the process with `exit` and no word, after everything was said on standard output.
    #[must_use]
    pub const fn silent(exit: Exit) -> Self {
        Self { exit, message: String::new(), details: Vec::new(), hint: String::new() }
    }
}

impl fmt::Display for CliError {
    /// As it is printed: the message after `error: `, then details and hint on lines of their own.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", clean(&self.message))?;
        for detail in &self.details {
            write!(f, "\n  {}", clean(detail))?;
        }
        if !self.hint.is_empty() {
            write!(f, "\n  {}", clean(&self.hint))?;
        }
        Ok(())
    }
}

impl std::error::Error for CliError {}

impl From<Failure> for CliError {
    fn from(failure: Failure) -> Self {
        let exit = match failure.reason.as_str() {
            // Trying again does not help.
            status::KEY_QUOTA => Exit::Conflict,
            _ => Exit::of(failure.code),
        };
        let mut error = Self::new(exit, failure.to_string());
        if error.message.is_empty() {
            error.message = failure.code.description().to_owned();
        }
        for violation in &failure.violations {
            error = error.detail(format!("{}: {}", violation.field, violation.description));
        }
        if !failure.reason.is_empty() {
            error = error.detail(format!("reason: {}", failure.reason));
        }
        if !failure.request_id.is_empty() {
            error = error.detail(format!("request id: {}", failure.request_id));
        }
        if failure.alert {
            error.exit = Exit::Denied;
            return error.hint(
                "The server does not take the client certificate of the profile: it is of another \
                 authority, expired or revoked.",
            );
        }
        let hint = match (failure.code, failure.retry_after) {
            (_, Some(wait)) => format!("Try again in {} s.", wait.as_secs().max(1)),
            // The server says nothing more, so that nobody learns by trying.
            (Code::InvalidArgument, _) if failure.message == Error::Crypto.to_string() => {
                "Either the bytes were changed or cut, or this is not the key, the --context or the \
                 --aad-file that they were encrypted with."
                    .to_owned()
            }
            (Code::NotFound, _) => {
                "Check the name; what this client may not see is reported as not found, too."
                    .to_owned()
            }
            (Code::PermissionDenied, _) => {
                "`polykey whoami` shows what this client may do; an administrator can tell why with \
                 `polykey policy explain`."
                    .to_owned()
            }
            (Code::Unauthenticated, _) => LOGIN_HINT.to_owned(),
            (Code::Aborted, _) => "It changed meanwhile: read it again, then repeat.".to_owned(),
            (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled, _) => {
                "Is the server running, and is it ready? `polykey health` tells.".to_owned()
            }
            (Code::DataLoss, _) => {
                "Tell the operator the request id; `polykey store verify` checks the store."
                    .to_owned()
            }
            (Code::Unimplemented, _) => {
                "The server does not offer this; is it older than this command?".to_owned()
            }
            _ => String::new(),
        };
        error.hint(hint)
    }
}

/// Whether the alert of TLS or the end of the connection is seen first is a matter of chance.
const BROKEN_HINT: &str = "The connection broke off: the server is going down, or does not take the \
                           client certificate of the profile.";
const LOGIN_HINT: &str = "Check the client id, API key and certificate of the profile; the client \
                          may be disabled, or the certificate expired or not registered for it.";

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Profile(error) => error.into(),
            ClientError::Files(_) => Self::new(Exit::Usage, message)
                .hint("The files are named in the profile; see `--profile`."),
            ClientError::Address { .. } => Self::usage(message),
            ClientError::Connect { problem, refused, .. } => {
                Self::new(Exit::Unavailable, message).hint(connect_hint(&problem, refused))
            }
            ClientError::ApiKey { .. } => Self::new(Exit::Usage, message)
                .hint("The file is named by `api_key_file` in the profile."),
            ClientError::Login { failure, .. } => {
                let broken = !failure.alert && !failure.causes.is_empty();
                let inner = Self { message, ..Self::from(*failure) };
                if broken { inner.hint(BROKEN_HINT) } else { inner }
            }
            ClientError::Call(failure) => (*failure).into(),
            ClientError::Token(_) => Self::new(Exit::Other, message),
        }
    }
}

/// What may be done about a connection that does not come about.
fn connect_hint(problem: &str, refused: bool) -> &'static str {
    if refused {
        "Is the server running? Its service manager, `polykey serve --config FILE` or `polykey dev` \
         starts it; `--profile` names another one."
    } else if problem.contains("certificate") {
        "Check `ca` and `server_name` in the profile: the server's certificate must come from that \
         authority and carry that name."
    } else if problem.contains("lookup") || problem.contains("resolve") {
        "Check `address` in the profile."
    } else {
        "Check `address` in the profile, and that nothing between here and there blocks the port."
    }
}

impl From<ProfileError> for CliError {
    fn from(error: ProfileError) -> Self {
        let message = error.to_string();
        let hint = match error {
            ProfileError::NotFound(_) => {
                "Name one with `--profile FILE` or POLYKEY_PROFILE: `polykey init` writes that of the \
                 first administrator, `polykey cert issue` those of others. Or start a server for \
                 development with `polykey dev`, which makes one."
            }
            ProfileError::Unreadable { .. } => "Check `--profile` and POLYKEY_PROFILE.",
            ProfileError::Invalid { .. } => {
                "A profile has: address, server_name, ca, certificate, key, client_id, api_key_file."
            }
        };
        Self::lines(Exit::Usage, &message).hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_exit_code() {
        let table = [
            (Code::Ok, 0),
            (Code::Cancelled, 6),
            (Code::Unknown, 1),
            (Code::InvalidArgument, 2),
            (Code::DeadlineExceeded, 6),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 5),
            (Code::PermissionDenied, 4),
            (Code::ResourceExhausted, 6),
            (Code::FailedPrecondition, 5),
            (Code::Aborted, 5),
            (Code::OutOfRange, 2),
            (Code::Unimplemented, 1),
            (Code::Internal, 1),
            (Code::Unavailable, 6),
            (Code::DataLoss, 7),
            (Code::Unauthenticated, 4),
        ];
        for (code, exit) in table {
            assert_eq!(Exit::of(code) as u8, exit, "{code:?}");
            assert!(EXIT_CODES.contains(&format!("\n  {exit}  ")));
            let error = CliError::from(Failure::from(tonic::Status::new(code, "")));
            assert_eq!(error.exit as u8, exit);
            assert!(!error.message.is_empty());
        }
    }

    #[test]
    fn a_refused_connection_says_what_to_do() {
        let error = CliError::from(ClientError::Connect {
            address: "127.0.0.1:50053".into(),
            problem: "connection refused".into(),
            refused: true,
        });
        let text = error.to_string();
        assert!(text.starts_with("error: cannot reach 127.0.0.1:50053: connection refused\n"));
        assert!(text.contains("`polykey dev`"), "{text}");
        assert_eq!(error.exit, Exit::Unavailable);
    }

    #[test]
    fn a_profile_that_is_wrong_is_told_line_by_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("profile.toml");
        std::fs::write(&path, "address = \"a:1\"\nadress = 2\n").unwrap();
        let error = crate::client::Profile::load(&path).unwrap_err();
        let text = CliError::from(error).to_string();
        assert!(!text.contains("\\n") && text.contains("\n  2 | adress = 2\n"), "{text}");
    }

    #[test]
    fn what_a_server_says_cannot_drive_the_terminal() {
        let error = CliError::new(Exit::Other, "a\u{1b}[2Jb").detail("c\nd").to_string();
        assert!(!error.contains('\u{1b}') && error.contains("\\u{1b}[2J"), "{error}");
        assert!(error.contains("c\\nd"), "{error}");
    }
}
