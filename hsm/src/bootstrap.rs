//! Secrets that a node starts with, read from the places that its configuration names.

use std::fmt;

use zeroize::Zeroizing;

use crate::aws::AwsConnection;
use crate::{Deadline, SecretSource};

/// The longest secret, in bytes: certificates with their chains fit.
const MAX_LEN: usize = 64 * 1024;

/// A reference that gives no secret. Names the place and the reason, never a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Problem {
    /// Which of the references it is, counted from 0.
    pub index: usize,
    /// Place and reason, for operators.
    pub text: String,
    /// Whether the place gave no answer, so that another start may find it.
    pub away: bool,
}

impl Problem {
    fn new(index: usize, text: impl fmt::Display) -> Self {
        Self { index, text: text.to_string(), away: false }
    }
}

/// Reads every secret, in the order of the references: files, variables and credentials as a master
/// key is read, but up to 64 KiB; SSM parameters ten a call and all at once, as SecureStrings,
/// decrypted. With SSM parameters among them, await it on a Tokio runtime.
///
/// # Errors
/// Everything that is missing, malformed, empty or not to be had by the deadline, in the order of
/// the references; then there is no secret at all.
pub async fn resolve(
    sources: &[SecretSource],
    aws: &AwsConnection,
    deadline: Deadline,
) -> Result<Vec<Zeroizing<Vec<u8>>>, Vec<Problem>> {
    let mut found: Vec<Option<Zeroizing<Vec<u8>>>> = Vec::new();
    let mut problems = Vec::new();
    let mut parameters = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        let value = match source {
            SecretSource::Ssm(name) => {
                if is_parameter_name(name) {
                    parameters.push((index, name.as_str()));
                } else {
                    let text = format!(
                        "{source} is not the name of a parameter: /PATH/NAME of letters, digits \
                         and . - _, with :VERSION or :LABEL if need be"
                    );
                    problems.push(Problem::new(index, text));
                }
                None
            }
            SecretSource::File(_) | SecretSource::Env(_) | SecretSource::Credential(_) => {
                match source.read(MAX_LEN) {
                    Ok(value) if value.is_empty() => {
                        problems.push(Problem::new(index, format!("{source} is empty")));
                        None
                    }
                    Ok(value) => Some(value),
                    Err(e) => {
                        problems.push(Problem::new(index, e));
                        None
                    }
                }
            }
        };
        found.push(value);
    }
    for (index, value) in from_ssm(aws, &parameters, deadline).await {
        match value {
            Ok(value) => {
                if let Some(slot) = found.get_mut(index) {
                    *slot = Some(value);
                }
            }
            Err((text, away)) => problems.push(Problem { index, text, away }),
        }
    }
    problems.sort_by_key(|problem| problem.index);
    if problems.is_empty() { Ok(found.into_iter().flatten().collect()) } else { Err(problems) }
}

/// Whether this can be the name of an SSM parameter: up to 1,011 of letters, digits and `. - _ /`,
/// then perhaps `:VERSION` or `:LABEL`.
#[must_use]
pub fn is_parameter_name(text: &str) -> bool {
    let (name, selector) = text.split_once(':').map_or((text, None), |(n, s)| (n, Some(s)));
    let word = |text: &str, more: &[u8]| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || more.contains(&b))
    };
    name.len() <= 1011
        && word(name, b".-_/")
        && selector.is_none_or(|selector| selector.len() <= 100 && word(selector, b".-_"))
}

/// A value; or why there is none, and whether that is for want of an answer.
type Found = (usize, Result<Zeroizing<Vec<u8>>, (String, bool)>);

#[cfg(feature = "aws")]
async fn from_ssm(
    aws: &AwsConnection,
    parameters: &[(usize, &str)],
    deadline: Deadline,
) -> Vec<Found> {
    if parameters.is_empty() {
        return Vec::new();
    }
    let names: Vec<&str> = parameters.iter().map(|(_, name)| *name).collect();
    let values = crate::aws::ssm::parameters(aws, &names, deadline).await;
    let give = |(index, name): &(usize, &str)| {
        let value = match values.get(name) {
            Some(Ok(value)) => Ok(value.clone()),
            Some(Err(why)) => Err((format!("SSM parameter {name}: {}", why.reason), why.away)),
            None => Err((format!("SSM parameter {name}: no answer"), true)),
        };
        (*index, value)
    };
    parameters.iter().map(give).collect()
}

#[cfg(not(feature = "aws"))]
async fn from_ssm(_: &AwsConnection, parameters: &[(usize, &str)], _: Deadline) -> Vec<Found> {
    let refuse = |(index, name): &(usize, &str)| {
        let text = format!(
            "SSM parameter {name}: this build reads none; build it with the cargo feature `aws`"
        );
        (*index, Err((text, false)))
    };
    parameters.iter().map(refuse).collect()
}
