//! What a policy can depend on, read off its JSON form: decides what may be remembered and what is refused.

use cedar_policy::{ActionConstraint, Effect};
use serde_json::Value;

use super::action::{Action, ActionSet};

/// What the conditions of a policy read. Errs towards `true`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Reads {
    /// `context.claimed`, or the context as a whole.
    pub(super) claimed: bool,
    /// The clock.
    pub(super) time: bool,
    /// Any attribute beyond permissions, creator and authorized contexts.
    pub(super) attributes: bool,
    /// Anything that the revisions of client and key do not cover.
    pub(super) volatile: bool,
}

impl Reads {
    /// Of a policy in Cedar's JSON form.
    pub(super) fn of(policy: &Value) -> Self {
        let mut reads = Self::default();
        // Conditions only: a scope holds no expressions. A stack, because nesting is the author's choice.
        let mut rest: Vec<&Value> = policy.get("conditions").into_iter().collect();
        while let Some(value) = rest.pop() {
            match value {
                Value::Array(items) => rest.extend(items),
                Value::Object(fields) => {
                    for (name, inner) in fields {
                        reads.visit(name, inner, &mut rest);
                    }
                }
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        reads
    }

    fn visit<'v>(&mut self, name: &str, inner: &'v Value, rest: &mut Vec<&'v Value>) {
        match name {
            "." | "has" => {
                let left = inner.get("left");
                let attribute = inner.get("attr").and_then(Value::as_str);
                if let Some(attribute) = attribute {
                    self.attribute(attribute);
                    if left.is_some_and(is_context) {
                        self.context(attribute);
                        return;
                    }
                }
                rest.push(inner);
            }
            "Var" if inner.as_str() == Some("context") => {
                self.claimed = true;
                self.time = true;
                self.volatile = true;
            }
            // Tags are attributes by another name, and every extension value comes from one or from a constant.
            "getTag" | "hasTag" => {
                self.attributes = true;
                rest.push(inner);
            }
            _ => rest.push(inner),
        }
    }

    fn attribute(&mut self, name: &str) {
        match name {
            "permissions" | "permission" | "creator" | "authorized_contexts" | "roles" => {}
            // Aliases live in rows of their own, which the key's revision does not cover.
            "aliases" => {
                self.attributes = true;
                self.volatile = true;
            }
            // Wherever it is read from: `(if ... then context else context).claimed` is no way round.
            "claimed" => {
                self.attributes = true;
                self.claimed = true;
                self.volatile = true;
            }
            _ => self.attributes = true,
        }
    }

    fn context(&mut self, attribute: &str) {
        match attribute {
            // A function of the action.
            "permission" => {}
            "now" | "hour" | "weekday" => {
                self.time = true;
                self.volatile = true;
            }
            _ => self.volatile = true,
        }
    }
}

fn is_context(value: &Value) -> bool {
    value.get("Var").and_then(Value::as_str) == Some("context")
}

/// The actions that a policy's scope lets through.
pub(super) fn actions(scope: &ActionConstraint) -> ActionSet {
    match scope {
        ActionConstraint::Any => ActionSet::all(),
        ActionConstraint::Eq(uid) => matching(uid.id().unescaped()),
        ActionConstraint::In(uids) => {
            uids.iter().fold(ActionSet::EMPTY, |set, uid| set.union(matching(uid.id().unescaped())))
        }
    }
}

fn matching(name: &str) -> ActionSet {
    Action::ALL
        .iter()
        .copied()
        .filter(|a| a.name() == name || a.class().name() == name || a.permission().name() == name)
        .collect()
}

/// Why a policy of this effect may not be accepted, if so.
pub(super) fn refusal(effect: Effect, reads: Reads) -> Option<&'static str> {
    (effect == Effect::Permit && reads.claimed).then_some(
        "a permit cannot read context.claimed (or the context as a whole): what callers claim grants nothing",
    )
}
