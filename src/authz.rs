//! Who may do what: facts in, a decision out. No clock, no store, no network.
//!
//! Two questions, in this order. *May the caller know that the key exists?* is a rule over facts
//! ([`visible`]): no policy widens or narrows it, and no is NOT_FOUND. *May the caller do this?* is
//! asked of Cedar policies: the shipped ones ([`DEFAULTS`]), the operator's files and the key's own
//! ([`KeyPolicies`]). Nothing is allowed without a permit, any forbid wins, and a policy that fails
//! to evaluate denies. Yes is an [`Authorized`] command, the only thing the keyring accepts.
//!
//! The node's policies and those of a key are evaluated apart and combined here, which is what
//! keeps a key's permit within its reach ([`KeyPolicyReach`]) whatever its text says.

mod action;
mod bounds;
mod check;
mod explain;
mod facts;
mod inspect;
mod keypolicies;
mod language;
mod memo;
mod policies;
mod proof;
mod roles;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use cedar_policy::{Decision as CedarDecision, Response};

pub use action::{
    Action, ActionSet, Class, KeyPolicyReach, Permission, PermissionSet, Target, UnknownPermission,
    schema_actions,
};
pub use bounds::{MAX_CONDITIONALS, MAX_NESTING, MAX_OPERATORS};
pub use check::{FileReport, Report, check_files, load_files};
pub use explain::{Explanation, Kind, NodePolicy, PolicyEntry, Reason};
pub use facts::{
    Claimed, ClientFacts, ContextFacts, DecisionId, KeyFacts, PrincipalFacts, Resource, ResourceId,
    RoleFacts, visible,
};
pub use keypolicies::{KeyPolicies, MAX_KEY_BYTES, MAX_POLICIES, MAX_POLICY_BYTES, is_policy_name};
pub use language::{LanguageError, SCHEMA};
pub use policies::{
    DEFAULTS, MAX_OPERATOR_BYTES, MAX_OPERATOR_POLICIES, PolicyError, PolicyErrors, PolicyFile,
    PolicyId,
};
pub use proof::{Authorized, Command, Permit};
pub use roles::{BUILT_IN, BuiltIn, built_in};

use language::Language;
use memo::{About, Memo, MemoKey};
use policies::Compiled;

/// How many verdicts an [`Authorizer`] remembers unless told otherwise (about 200 bytes each).
pub const DEFAULT_MEMO: usize = 32 << 10;

/// A question to the policies.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Who asks.
    pub principal: &'a PrincipalFacts,
    /// For which right.
    pub action: Action,
    /// On what.
    pub resource: Resource<'a>,
    /// When and from where.
    pub context: &'a ContextFacts,
}

/// The answer to a [`Request`]. Visibility is not part of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The id from [`ContextFacts`].
    pub decision_id: DecisionId,
    /// The permits that allow it, or the forbids that deny it; empty when nothing permits it.
    pub reasons: Arc<[PolicyId]>,
    /// What could not be evaluated. Never empty together with `allowed`. For operators, not for callers.
    pub errors: Arc<[String]>,
    /// Whether it holds for every request with the same revisions of client and key.
    pub cacheable: bool,
}

/// The part of a decision that can be remembered.
#[derive(Debug)]
struct Verdict {
    allowed: bool,
    reasons: Arc<[PolicyId]>,
    errors: Arc<[String]>,
}

/// Why a command was not authorized.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Denied {
    /// The caller may not know that the key exists: to be answered exactly like one that does not.
    #[error("no such key, as far as the caller may know")]
    Hidden,
    /// The caller may know, and may not do it.
    #[error("{action} is not permitted (decision {})", decision.decision_id)]
    Forbidden {
        /// The right that was refused first.
        action: Action,
        /// The decision, for the audit trail.
        decision: Decision,
    },
}

/// Decides. Immutable: new policies make a new one, whose memo starts empty.
pub struct Authorizer {
    cedar: cedar_policy::Authorizer,
    language: &'static Language,
    node: Compiled,
    warnings: Vec<PolicyError>,
    memo: Memo,
}

impl fmt::Debug for Authorizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorizer")
            .field("policies", &self.node.known.len())
            .field("remembered", &self.memo.len())
            .finish_non_exhaustive()
    }
}

impl Authorizer {
    /// An authorizer over the policies of `defaults` (normally [`DEFAULTS`]) and the operator's
    /// files, validated together against [`SCHEMA`].
    ///
    /// # Errors
    /// Everything wrong with any of them, with file and line.
    pub fn new(defaults: &str, files: &[PolicyFile]) -> Result<Self, PolicyErrors> {
        let (node, warnings) = policies::compile(defaults, files)?;
        Ok(Self {
            cedar: cedar_policy::Authorizer::new(),
            language: language::language()?,
            node,
            warnings,
            memo: Memo::new(DEFAULT_MEMO),
        })
    }

    /// An authorizer over the shipped policies alone.
    ///
    /// # Errors
    /// Never in a build that passed its tests.
    pub fn default_only() -> Result<Self, PolicyErrors> {
        Self::new(DEFAULTS, &[])
    }

    /// Remembers about this many verdicts; 0 asks the policies each time.
    #[must_use]
    pub fn with_memo(mut self, capacity: usize) -> Self {
        self.memo = Memo::new(capacity);
        self
    }

    /// How well what is remembered of decisions does.
    #[must_use]
    pub fn memo_counts(&self) -> crate::cache::Counts {
        self.memo.counts()
    }

    /// What is odd about the policies without being wrong, for instance one that can never apply.
    pub fn warnings(&self) -> &[PolicyError] {
        &self.warnings
    }

    /// Turns a command into an authorized one: visibility first, then every right it takes.
    /// `resource` must be what the command is about to act on, as loaded.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn authorize<C: Command>(
        &self,
        principal: &Arc<PrincipalFacts>,
        resource: Resource<'_>,
        context: &ContextFacts,
        command: C,
    ) -> Result<Authorized<C>, Denied> {
        if let Resource::Key { facts, .. } = resource
            && !visible(principal, facts)
        {
            return Err(Denied::Hidden);
        }
        let ask = |action| {
            let decision = self.decide(&Request { principal, action, resource, context });
            if decision.allowed {
                Ok(decision)
            } else {
                Err(Denied::Forbidden { action, decision })
            }
        };
        let main = ask(C::ACTION)?;
        let also = command.also();
        for action in also.iter() {
            ask(action)?;
        }
        let permit = Permit {
            principal: Arc::clone(principal),
            resource: resource.id(),
            actions: also.with(C::ACTION),
            decision_id: main.decision_id,
            reasons: main.reasons,
        };
        Ok(Authorized::new(command, permit))
    }

    /// Asks the policies. To act on the answer, use [`Self::authorize`], which asks for visibility first.
    pub fn decide(&self, request: &Request<'_>) -> Decision {
        let Request { principal, action, resource, context } = *request;
        let volatile = self.node.volatile.contains(action)
            || matches!(resource, Resource::Key { policies, .. }
                if policies.compiled.volatile.contains(action));
        let remembered = match resource {
            Resource::Node => Some(About::Node),
            // Another state may be committed under the revision that this one would get.
            Resource::Key { facts, .. } if facts.revision == 0 => None,
            Resource::Key { facts, .. } => Some(About::Key(facts.id, facts.revision)),
            Resource::NewKey(facts) => Some(About::New(facts.digest())),
            // Nothing numbers the revisions of these.
            Resource::Client(_) | Resource::Role(_) => None,
        };
        let memo_key = remembered.filter(|_| !volatile).map(|about| MemoKey {
            client: Arc::clone(&principal.client),
            client_revision: principal.revision,
            permissions: principal.permissions,
            action,
            about,
        });
        let verdict = match memo_key {
            None => Arc::new(self.evaluate(request, true)),
            Some(key) => self.memo.get(&key).unwrap_or_else(|| {
                let verdict = Arc::new(self.evaluate(request, false));
                if verdict.errors.is_empty() {
                    self.memo.put(key, Arc::clone(&verdict));
                }
                verdict
            }),
        };
        Decision {
            allowed: verdict.allowed,
            decision_id: context.decision_id,
            reasons: Arc::clone(&verdict.reasons),
            errors: Arc::clone(&verdict.errors),
            cacheable: remembered.is_some() && !volatile && verdict.errors.is_empty(),
        }
    }

    fn evaluate(&self, request: &Request<'_>, whole_context: bool) -> Verdict {
        let Request { principal, action, resource, context } = *request;
        if action.target() != resource.target() {
            return Verdict::failed(format!("{action} is not about {}", resource.id()));
        }
        if let Resource::Key { facts, policies } = resource
            && facts.id != policies.key
        {
            return Verdict::failed(format!("key {} came with the policies of another", facts.id));
        }
        let asked = self.language.request(principal, action, &resource, context, whole_context);
        let (asked, entities) = match asked {
            Ok(asked) => asked,
            Err(error) => return Verdict::failed(error.to_string()),
        };
        let node = self.cedar.is_authorized(&asked, &self.node.set, &entities);
        let reach = action.class().key_policies();
        let own = match resource {
            Resource::Key { policies, .. }
                if reach != KeyPolicyReach::None && !policies.is_empty() =>
            {
                Some(self.cedar.is_authorized(&asked, &policies.compiled.set, &entities))
            }
            _ => None,
        };
        let may_grant = match reach {
            KeyPolicyReach::Grant => true,
            KeyPolicyReach::GrantWithPermission => {
                principal.permissions.contains(action.permission())
            }
            KeyPolicyReach::Restrict | KeyPolicyReach::None => false,
        };
        combine(&node, own.as_ref(), may_grant)
    }
}

impl Verdict {
    fn failed(error: String) -> Self {
        Self { allowed: false, reasons: Arc::default(), errors: Arc::new([error]) }
    }
}

/// Default deny; an error denies; a forbid of either set wins; the key's permit counts if it may grant.
fn combine(node: &Response, own: Option<&Response>, own_may_grant: bool) -> Verdict {
    let both = || [Some(node), own].into_iter().flatten();
    let errors: Arc<[String]> = both()
        .flat_map(|response| response.diagnostics().errors())
        .map(ToString::to_string)
        .collect();
    let reasons = |wanted: &[&Response]| -> Arc<[PolicyId]> {
        let mut ids: Vec<PolicyId> = wanted
            .iter()
            .flat_map(|response| response.diagnostics().reason())
            .map(|id| PolicyId::new(id.as_ref()))
            .collect();
        ids.sort();
        ids.into()
    };
    let permits = |response: &Response| response.decision() == CedarDecision::Allow;
    // Cedar names reasons for a denial only when a forbid applied.
    let forbids: Vec<&Response> =
        both().filter(|r| !permits(r) && r.diagnostics().reason().next().is_some()).collect();
    let granting: Vec<&Response> =
        [Some(node).filter(|r| permits(r)), own.filter(|r| permits(r) && own_may_grant)]
            .into_iter()
            .flatten()
            .collect();
    let allowed = errors.is_empty() && forbids.is_empty() && !granting.is_empty();
    Verdict {
        allowed,
        reasons: if allowed { reasons(&granting) } else { reasons(&forbids) },
        errors,
    }
}
