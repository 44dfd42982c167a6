//! Named policy texts to validated policies with stable ids; errors with file, line and remedy.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use cedar_policy::ffi::DetailedError;
use cedar_policy::{Effect, Policy, PolicySet, ResourceConstraint};
use serde::Serialize;

use super::action::ActionSet;
use super::bounds;
use super::inspect::{self, Reads};
use super::language::{self, LanguageError};

/// The shipped policies.
pub const DEFAULTS: &str = include_str!("defaults.cedar");

/// The most policies, and the most bytes of text, that operators may add.
pub const MAX_OPERATOR_POLICIES: usize = 1000;
/// See [`MAX_OPERATOR_POLICIES`].
pub const MAX_OPERATOR_BYTES: usize = 1 << 20;

/// One file of policies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyFile {
    /// What ids and errors call it: `^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`, unique.
    pub name: String,
    /// Cedar text.
    pub text: String,
}

/// The stable id of a policy: `default/NAME`, `operator/FILE/NAME-OR-NUMBER` or `key/NAME`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct PolicyId(Arc<str>);

impl PolicyId {
    pub(super) fn new(id: &str) -> Self {
        Self(id.into())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(super) fn cedar(&self) -> cedar_policy::PolicyId {
        cedar_policy::PolicyId::new(&*self.0)
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One thing wrong with a policy text. `line` and `column` count from 1; 0 where the whole text is meant.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PolicyError {
    /// The file, or the name of a key's policy.
    pub name: String,
    /// Line in the text.
    pub line: usize,
    /// Column in the line, in characters.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it; may be empty.
    pub remedy: String,
}

impl PolicyError {
    pub(super) fn whole(name: &str, message: impl Into<String>, remedy: &str) -> Self {
        Self {
            name: name.to_owned(),
            line: 0,
            column: 0,
            message: message.into(),
            remedy: remedy.to_owned(),
        }
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        write!(f, ": {}", self.message)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

/// Everything wrong with a set of policy texts; never empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyErrors(pub Vec<PolicyError>);

impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for PolicyErrors {}

impl From<LanguageError> for PolicyErrors {
    fn from(error: LanguageError) -> Self {
        Self(vec![PolicyError::whole("schema", error.to_string(), "this is a fault of the build")])
    }
}

/// What is known of one policy besides Cedar's own form of it.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) id: PolicyId,
    pub(super) effect: Effect,
    pub(super) actions: ActionSet,
    pub(super) reads: Reads,
    pub(super) resource: ResourceConstraint,
    pub(super) text: String,
}

/// Validated policies that are evaluated together.
#[derive(Clone, Debug, Default)]
pub(super) struct Compiled {
    pub(super) set: PolicySet,
    pub(super) known: Vec<Known>,
    /// The actions about which nothing may be remembered.
    pub(super) volatile: ActionSet,
}

impl Compiled {
    pub(super) fn push_known(&mut self, known: Known) {
        if known.reads.volatile {
            self.volatile = self.volatile.union(known.actions);
        }
        self.known.push(known);
    }

    pub(super) fn find(&self, id: &PolicyId) -> Option<&Known> {
        self.known.iter().find(|known| known.id == *id)
    }
}

/// Compiles the default policies (one text) and any number of operator files as one set.
/// Also returns warnings: policies that can never apply, confusable characters.
pub(super) fn compile(
    defaults: &str,
    files: &[PolicyFile],
) -> Result<(Compiled, Vec<PolicyError>), PolicyErrors> {
    let language = language::language()?;
    let mut errors = Vec::new();
    let mut compiled = Compiled::default();
    let mut origins = BTreeMap::new();
    let default_file = PolicyFile { name: "defaults".to_owned(), text: defaults.to_owned() };

    add(&default_file, "default", &mut compiled, &mut origins, &mut errors);
    let shipped = compiled.known.len();
    let mut names = BTreeSet::new();
    let mut bytes = 0usize;
    for file in files {
        bytes = bytes.saturating_add(file.text.len());
        if !is_name(&file.name) {
            errors.push(PolicyError::whole(
                &file.name,
                "not a name for a policy file",
                "use letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit",
            ));
        } else if !names.insert(file.name.as_str()) {
            errors.push(PolicyError::whole(
                &file.name,
                "two policy files have this name",
                "rename one: policy ids contain the file's name",
            ));
        } else if bytes > MAX_OPERATOR_BYTES {
            errors.push(PolicyError::whole(
                &file.name,
                format!("policy files hold more than {MAX_OPERATOR_BYTES} bytes together"),
                "combine policies with sets, roles and tags",
            ));
            break;
        } else {
            let prefix = format!("operator/{}", file.name);
            add(file, &prefix, &mut compiled, &mut origins, &mut errors);
        }
    }
    if compiled.known.len() - shipped > MAX_OPERATOR_POLICIES {
        errors.push(PolicyError::whole(
            "operator policies",
            format!("more than {MAX_OPERATOR_POLICIES} policies"),
            "combine policies with sets, roles and tags",
        ));
    }
    let mut warnings = Vec::new();
    if errors.is_empty() {
        let result = language::validate(&language.everything, &compiled.set);
        let origin = |id: &cedar_policy::PolicyId| {
            let id: &str = id.as_ref();
            origins.get(id).copied().unwrap_or(&default_file)
        };
        for error in result.validation_errors() {
            let file = origin(error.policy_id());
            errors.extend(located(&file.name, &file.text, &DetailedError::from(error)));
        }
        for warning in result.validation_warnings() {
            let file = origin(warning.policy_id());
            warnings.extend(located(&file.name, &file.text, &DetailedError::from(warning)));
        }
    }
    if errors.is_empty() { Ok((compiled, warnings)) } else { Err(PolicyErrors(errors)) }
}

/// Parses one file into the set, giving its policies their stable ids.
fn add<'f>(
    file: &'f PolicyFile,
    prefix: &str,
    compiled: &mut Compiled,
    origins: &mut BTreeMap<String, &'f PolicyFile>,
    errors: &mut Vec<PolicyError>,
) {
    let parsed = match parse(&file.name, &file.text) {
        Ok(parsed) => parsed,
        Err(found) => return errors.extend(found),
    };
    if parsed.templates().next().is_some() {
        errors.push(PolicyError::whole(
            &file.name,
            "a policy with ?principal or ?resource",
            "name the entity; slots are for the policies of a key",
        ));
    }
    let mut policies: Vec<(usize, &Policy)> =
        parsed.policies().map(|policy| (ordinal(policy.id()), policy)).collect();
    policies.sort_by_key(|(n, _)| *n);
    for (n, policy) in policies {
        let name = match policy.annotation("id") {
            None => (n + 1).to_string(),
            Some(id) if is_name(id) && !id.bytes().all(|b| b.is_ascii_digit()) => id.to_owned(),
            Some(id) => {
                errors.push(PolicyError::whole(
                    &file.name,
                    format!("@id({id:?}) is not a name for a policy"),
                    "use letters, digits, '.', '_' and '-', at most 64, not digits alone",
                ));
                continue;
            }
        };
        let id = PolicyId::new(&format!("{prefix}/{name}"));
        let known = match known(id.clone(), policy) {
            Ok(known) => known,
            Err(message) => {
                errors.push(PolicyError::whole(&file.name, format!("{id}: {message}"), ""));
                continue;
            }
        };
        if let Some(why) = inspect::refusal(known.effect, known.reads) {
            errors.push(PolicyError::whole(
                &file.name,
                format!("{id}: {why}"),
                "write a forbid instead",
            ));
        }
        if compiled.set.add(policy.new_id(id.cedar())).is_err() {
            errors.push(PolicyError::whole(
                &file.name,
                format!("two policies are called {name}"),
                "every @id occurs once in a file",
            ));
        }
        origins.insert(id.as_str().to_owned(), file);
        compiled.push_known(known);
    }
}

fn known(id: PolicyId, policy: &Policy) -> Result<Known, String> {
    let json = policy.to_json().map_err(|e| e.to_string())?;
    Ok(Known {
        id,
        effect: policy.effect(),
        actions: inspect::actions(&policy.action_constraint()),
        reads: Reads::of(&json),
        resource: policy.resource_constraint(),
        text: policy.to_cedar().unwrap_or_default(),
    })
}

/// Parses Cedar text, or says where it went wrong.
pub(super) fn parse(name: &str, text: &str) -> Result<PolicySet, Vec<PolicyError>> {
    bounds::check(name, text).map_err(|error| vec![error])?;
    text.parse::<PolicySet>().map_err(|errors| {
        errors.iter().flat_map(|error| located(name, text, &DetailedError::from(error))).collect()
    })
}

/// Cedar's error with its place in the text, and what is related to it.
pub(super) fn located(name: &str, text: &str, error: &DetailedError) -> Vec<PolicyError> {
    let label = error.source_locations.first();
    let (line, column) = label.map_or((0, 0), |label| position(text, label.loc.start));
    let mut message = error.message.clone();
    if let Some(detail) = label.and_then(|label| label.label.as_ref()) {
        message.push_str(": ");
        message.push_str(detail);
    }
    let mut errors = vec![PolicyError {
        name: name.to_owned(),
        line,
        column,
        message,
        remedy: error.help.clone().unwrap_or_default(),
    }];
    for related in &error.related {
        errors.extend(located(name, text, related));
    }
    errors
}

/// Line and column, from 1, of a byte offset.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.char_indices().take_while(|(at, _)| *at < offset).map(|(_, c)| c);
    before.fold((1, 1), |(line, column), c| match c {
        '\n' => (line + 1, 1),
        _ => (line, column + 1),
    })
}

/// Cedar numbers the policies of a text `policy0`, `policy1`, ...
fn ordinal(id: &cedar_policy::PolicyId) -> usize {
    let id: &str = id.as_ref();
    id.strip_prefix("policy").and_then(|n| n.parse().ok()).unwrap_or(usize::MAX - 1)
}

fn is_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= 64
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}
