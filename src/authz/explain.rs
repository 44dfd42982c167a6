//! Decisions in words: which policy allowed or denied, and which policies can apply to a key at all.

use std::collections::BTreeMap;
use std::fmt;

use cedar_policy::{Effect, ResourceConstraint};
use serde::Serialize;

use super::action::{Action, Class, Target};
use super::facts::{KeyFacts, visible};
use super::inspect::Reads;
use super::keypolicies::KeyPolicies;
use super::policies::{Known, PolicyId};
use super::{Authorizer, Request, Resource};

/// A decision for people and for `-o json`. It shows policy texts: for those who may read policies.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Explanation {
    /// Whether the call would succeed, as far as authority goes.
    pub allowed: bool,
    /// Whether the client may know that the key exists; always true for what is not a stored key.
    pub visible: bool,
    /// The decision's id.
    pub decision_id: String,
    /// Who.
    pub client: String,
    /// What.
    pub action: &'static str,
    /// On what.
    pub resource: String,
    /// The permission that the action takes.
    pub permission: &'static str,
    /// Whether the client holds it.
    pub has_permission: bool,
    /// The policies that decided it.
    pub reasons: Vec<Reason>,
    /// Policies that could not be evaluated.
    pub errors: Vec<String>,
    /// Whether the same question has the same answer until client, key or policies change.
    pub cacheable: bool,
    /// One sentence.
    pub summary: String,
}

/// One deciding policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Reason {
    /// Its id.
    pub policy: PolicyId,
    /// `permit` or `forbid`.
    pub effect: &'static str,
    /// Its text.
    pub text: String,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.summary)?;
        for reason in &self.reasons {
            writeln!(f, "\n{} ({})", reason.policy, reason.effect)?;
            for line in reason.text.lines() {
                writeln!(f, "    {line}")?;
            }
        }
        for error in &self.errors {
            writeln!(f, "\ncould not be evaluated: {error}")?;
        }
        Ok(())
    }
}

/// What kind of rule a policy is: `PolicyDetail.policy_type`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Kind {
    /// Reads who one is: permissions, roles, creator, contexts.
    #[serde(rename = "RBAC")]
    Rbac,
    /// Reads other attributes.
    #[serde(rename = "ABAC")]
    Abac,
    /// Reads the clock.
    TimeBased,
}

impl Kind {
    /// As it stands in `PolicyDetail`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rbac => "RBAC",
            Self::Abac => "ABAC",
            Self::TimeBased => "TimeBased",
        }
    }

    fn of(reads: Reads) -> Self {
        if reads.time {
            Self::TimeBased
        } else if reads.attributes {
            Self::Abac
        } else {
            Self::Rbac
        }
    }
}

/// One policy that can apply to a key: `PolicyDetail`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct PolicyEntry {
    /// Its id.
    pub id: PolicyId,
    /// What kind of rule it is.
    pub kind: Kind,
    /// `effect`, `actions` (comma-separated, `*` for all on keys), `text`, and for the rule of
    /// authorized contexts `contexts`.
    pub params: BTreeMap<String, String>,
}

/// A policy of the node, for those who may read policies.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct NodePolicy {
    /// Its id.
    pub id: PolicyId,
    /// What kind of rule it is.
    pub kind: Kind,
    /// As it was written.
    pub text: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
}

impl Authorizer {
    /// Decides like [`Authorizer::authorize`] and says why.
    pub fn explain(&self, request: &Request<'_>) -> Explanation {
        let decision = self.decide(request);
        let Request { principal, action, resource, .. } = *request;
        let (seen, own) = match resource {
            Resource::Key { facts, policies } => (visible(principal, facts), Some(policies)),
            _ => (true, None),
        };
        let permission = action.permission();
        let allowed = decision.allowed && seen;
        let reasons = decision
            .reasons
            .iter()
            .filter_map(|id| {
                let in_key = own.and_then(|own| own.compiled.find(id));
                self.node.find(id).or(in_key).map(reason)
            })
            .collect::<Vec<_>>();
        let may = if allowed { "may" } else { "may not" };
        let why = if !seen {
            "it can see the key neither as creator, nor as authorized context, nor by keys:all: \
             it is told that there is no such key"
                .to_owned()
        } else if !decision.errors.is_empty() {
            "a policy could not be evaluated, which denies".to_owned()
        } else if reasons.is_empty() {
            let holds = if principal.permissions.contains(permission) { "holds" } else { "lacks" };
            format!("no policy permits it (it {holds} {permission})")
        } else {
            let ids: Vec<&str> = reasons.iter().map(|r| r.policy.as_str()).collect();
            let verb = if allowed { "permitted" } else { "forbidden" };
            format!("{verb} by {}", ids.join(", "))
        };
        Explanation {
            allowed,
            visible: seen,
            decision_id: decision.decision_id.to_string(),
            client: principal.client.to_string(),
            action: action.name(),
            resource: resource.id().to_string(),
            permission: permission.name(),
            has_permission: principal.permissions.contains(permission),
            reasons,
            errors: decision.errors.to_vec(),
            cacheable: decision.cacheable,
            summary: format!(
                "client {} {may} {action} on {}: {why}.",
                principal.client,
                resource.id()
            ),
        }
    }

    /// Every policy that can apply to the key, the node's in their order, then its own by name.
    pub fn policy_details(&self, key: &KeyFacts, own: &KeyPolicies) -> Vec<PolicyEntry> {
        let uid = self.language.key_uid(key.id);
        let reaches = |known: &&Known| {
            let resource = match &known.resource {
                ResourceConstraint::Any => true,
                ResourceConstraint::Eq(named) | ResourceConstraint::In(named) => *named == uid,
                ResourceConstraint::Is(kind) => kind.to_string() == Target::Key.entity(),
                ResourceConstraint::IsIn(kind, named) => {
                    kind.to_string() == Target::Key.entity() && *named == uid
                }
            };
            // What is there is not created again.
            let acts = |a: Action| a.target() == Target::Key && a.class() != Class::Create;
            resource && known.actions.iter().any(acts)
        };
        self.node
            .known
            .iter()
            .chain(&own.compiled.known)
            .filter(reaches)
            .map(|known| entry(known, key))
            .collect()
    }

    /// Every policy of the node, in order.
    pub fn node_policy_records(&self) -> impl Iterator<Item = NodePolicy> {
        self.node.known.iter().map(|known| NodePolicy {
            id: known.id.clone(),
            kind: Kind::of(known.reads),
            text: known.text.clone(),
            annotations: self
                .node
                .set
                .policy(&known.id.cedar())
                .map_or_else(BTreeMap::new, |policy| {
                    policy.annotations().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
                }),
        })
    }

    /// Every policy of the node, in order: id and text.
    pub fn node_policies(&self) -> impl Iterator<Item = (&PolicyId, &str)> {
        self.node.known.iter().map(|k| (&k.id, k.text.as_str()))
    }
}

fn reason(known: &Known) -> Reason {
    Reason { policy: known.id.clone(), effect: effect(known.effect), text: known.text.clone() }
}

fn effect(effect: Effect) -> &'static str {
    match effect {
        Effect::Permit => "permit",
        Effect::Forbid => "forbid",
    }
}

fn entry(known: &Known, key: &KeyFacts) -> PolicyEntry {
    let on_keys = |a: &Action| a.target() == Target::Key;
    let all = Action::ALL.iter().filter(|a| on_keys(a)).all(|a| known.actions.contains(*a));
    let actions = if all {
        "*".to_owned()
    } else {
        let names: Vec<&str> = known.actions.iter().filter(on_keys).map(Action::name).collect();
        names.join(",")
    };
    let mut params = BTreeMap::from([
        ("effect".to_owned(), effect(known.effect).to_owned()),
        ("actions".to_owned(), actions),
        ("text".to_owned(), known.text.clone()),
    ]);
    if known.id.as_str() == "default/authorized-context" {
        params.insert("contexts".to_owned(), key.authorized_contexts.join(","));
    }
    PolicyEntry { id: known.id.clone(), kind: Kind::of(known.reads), params }
}
