//! Secrets from Parameter Store: SecureStrings, decrypted by the service.

use std::collections::HashMap;

use aws_sdk_ssm::Client;
use aws_sdk_ssm::types::{Parameter, ParameterType};
use zeroize::Zeroizing;

use super::AwsConnection;
use super::client::{self, within};
use super::failure::{Asked, Failure, classify};
use crate::{Deadline, WrapError};

/// As many names as GetParameters takes.
const BATCH: usize = 10;

/// Why there is no value.
#[derive(Clone)]
pub(crate) struct Missing {
    pub(crate) reason: String,
    /// Whether AWS gave no answer, so that asking again may help.
    pub(crate) away: bool,
}

impl Missing {
    fn answered(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), away: false }
    }

    fn of(error: &WrapError) -> Self {
        let away = matches!(error, WrapError::Unavailable { .. } | WrapError::DeadlineExceeded);
        let reason = match error {
            WrapError::DeadlineExceeded => "AWS did not answer within the deadline".to_owned(),
            other => other.to_string(),
        };
        Self { reason, away }
    }

    fn after(failure: Failure) -> Self {
        match failure {
            Failure::Broken => Self::answered("AWS cannot decrypt it"),
            Failure::Unavailable(reason) => {
                Self { reason: format!("AWS gave no answer: {reason}"), away: true }
            }
            Failure::Refused(reason) | Failure::Config(reason) => Self::answered(reason),
        }
    }
}

pub(crate) type Value = Result<Zeroizing<Vec<u8>>, Missing>;

/// The value of each name, or why there is none. Names are asked for ten at a time, all at once.
pub(crate) async fn parameters<'n>(
    connection: &AwsConnection,
    names: &[&'n str],
    deadline: Deadline,
) -> HashMap<&'n str, Value> {
    // Asked for twice in one call, AWS refuses all.
    let mut distinct = names.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    let config = match connection.load(None, deadline).await {
        Ok(config) => config,
        Err(e) => return distinct.into_iter().map(|name| (name, Err(Missing::of(&e)))).collect(),
    };
    let region = client::region(&config);
    let mut config =
        aws_sdk_ssm::config::Builder::from(&config).interceptor(client::NothingInTheClear);
    if let Some(url) = &connection.endpoint_url {
        config = config.endpoint_url(url);
    }
    let client = Client::from_conf(config.build());
    let batches = batches(&distinct);
    let answers = batches.iter().map(|names| batch(&client, &region, names, deadline));
    futures::future::join_all(answers).await.into_iter().flatten().collect()
}

/// The name without `:VERSION` or `:LABEL`, which is all that an answer is sure to repeat.
fn base(name: &str) -> &str {
    name.split_once(':').map_or(name, |(base, _)| base)
}

/// Calls that each ask for one version of a parameter, so that answers are told apart by name.
fn batches<'n>(names: &[&'n str]) -> Vec<Vec<&'n str>> {
    let mut batches: Vec<Vec<&str>> = Vec::new();
    for name in names {
        let fits = |batch: &&mut Vec<&str>| {
            batch.len() < BATCH && batch.iter().all(|other| base(other) != base(name))
        };
        match batches.iter_mut().find(fits) {
            Some(batch) => batch.push(name),
            None => batches.push(vec![name]),
        }
    }
    batches
}

async fn batch<'n>(
    client: &Client,
    region: &str,
    names: &[&'n str],
    deadline: Deadline,
) -> Vec<(&'n str, Value)> {
    let all = |why: &Missing| names.iter().map(|name| (*name, Err(why.clone()))).collect();
    let request = client
        .get_parameters()
        .set_names(Some(names.iter().map(|name| (*name).to_owned()).collect()))
        .with_decryption(true);
    let answer = match within(deadline, request.send()).await {
        Err(e) => return all(&Missing::of(&e)),
        Ok(Err(e)) => {
            let asked = Asked { action: "ssm:GetParameters", subject: "it", region };
            return all(&Missing::after(classify(&e, &asked)));
        }
        Ok(Ok(answer)) => answer,
    };
    let missing = || Err(Missing::answered(format!("there is no such parameter in {region}")));
    let mut found: HashMap<String, Value> = HashMap::new();
    for parameter in answer.parameters.unwrap_or_default() {
        found.insert(parameter.name.clone().unwrap_or_default(), value(parameter));
    }
    names.iter().map(|name| (*name, found.remove(base(name)).unwrap_or_else(missing))).collect()
}

fn value(parameter: Parameter) -> Value {
    let value = parameter.value.map(|text| Zeroizing::new(text.into_bytes()));
    match (parameter.r#type, value) {
        (Some(ParameterType::SecureString), Some(value)) if !value.is_empty() => Ok(value),
        (Some(ParameterType::SecureString), _) => Err(Missing::answered("it is empty")),
        (_, value) => {
            drop(value);
            Err(Missing::answered(
                "it is not a SecureString, so that it is stored in the clear: put it again with \
                 --type SecureString",
            ))
        }
    }
}
