//! The `access_policies` of one key: Cedar templates on `?resource`, linked to that key alone.

use std::collections::{BTreeMap, HashMap};

use cedar_policy::ffi::DetailedError;
use cedar_policy::{Effect, PolicySet, SlotId, Template};
use serde_json::{Value, json};
use uuid::Uuid;

use super::inspect::{self, Reads};
use super::language;
use super::policies::{self, Compiled, Known, PolicyError, PolicyErrors, PolicyId};
use super::{KeyPolicyReach, PolicyErrors as Errors};

/// The most bytes of one policy.
pub const MAX_POLICY_BYTES: usize = 4 << 10;
/// The most bytes of all policies of a key, names not counted.
pub const MAX_KEY_BYTES: usize = 32 << 10;
/// The most policies of a key.
pub const MAX_POLICIES: usize = 50;

const SHAPE: &str =
    "write one permit or forbid with `resource` or `resource == ?resource` as its resource";

/// A key's own policies, ready to evaluate. Belongs to one revision of one key; keep it with the key.
#[derive(Clone, Debug)]
pub struct KeyPolicies {
    pub(super) key: Uuid,
    pub(super) compiled: Compiled,
}

impl KeyPolicies {
    /// Of a key without policies.
    pub fn none(key: Uuid) -> Self {
        Self { key, compiled: Compiled::default() }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.compiled.known.is_empty()
    }

    /// Whether these are what it was compiled from.
    pub(crate) fn are(&self, texts: &BTreeMap<String, String>) -> bool {
        let known = self.compiled.known.iter();
        let known = known.map(|k| (k.id.as_str().strip_prefix("key/"), k.text.as_str()));
        known.eq(texts.iter().map(|(name, text)| (Some(name.as_str()), text.as_str())))
    }

    /// Compiles name → Cedar text for this key. Each text is exactly one `permit` or `forbid`
    /// whose resource is `resource`, `resource is Key` or `resource == ?resource`; whichever it
    /// is, it becomes a template on `?resource`, linked to this key: no text can reach another.
    ///
    /// Such a permit counts only for clients that can see the key, and stands in for being its
    /// creator: to rotate, update, revoke or export, the client needs the permission as well.
    /// Sharing, and what else a key's own policies cannot grant, is refused here.
    ///
    /// # Errors
    /// Every limit, name, parse and validation error, with its line and column.
    pub fn compile(key: Uuid, texts: &BTreeMap<String, String>) -> Result<Self, Errors> {
        let mut errors = Vec::new();
        let total = texts.values().map(String::len).fold(0, usize::saturating_add);
        if texts.len() > MAX_POLICIES {
            errors.push(PolicyError::whole(
                "access_policies",
                format!("more than {MAX_POLICIES} policies"),
                "combine them",
            ));
        } else if total > MAX_KEY_BYTES {
            errors.push(PolicyError::whole(
                "access_policies",
                format!("more than {MAX_KEY_BYTES} bytes together"),
                "shorten them, or make them policies of the node",
            ));
        } else {
            let mut policies = Self::none(key);
            for (name, text) in texts {
                if let Err(found) = policies.add(name, text) {
                    errors.extend(found);
                }
            }
            if errors.is_empty() {
                return Ok(policies);
            }
        }
        Err(PolicyErrors(errors))
    }

    fn add(&mut self, name: &str, text: &str) -> Result<(), Vec<PolicyError>> {
        let wrong = |message: String, remedy: &str| vec![PolicyError::whole(name, message, remedy)];
        if !is_policy_name(name) {
            return Err(wrong(
                "not a name for a policy".to_owned(),
                "names match ^[a-zA-Z][a-zA-Z0-9_-]{0,63}$",
            ));
        }
        if text.len() > MAX_POLICY_BYTES {
            return Err(wrong(format!("more than {MAX_POLICY_BYTES} bytes"), "split it in two"));
        }
        let language = language::language().map_err(|e| PolicyErrors::from(e).0)?;
        let parsed = policies::parse(name, text)?;
        let (mut policy, effect, scope) = single(&parsed).map_err(|m| wrong(m, SHAPE))?;

        // As it was written, so that errors point into the author's own text.
        let result = language::validate(&language.keys, &parsed);
        let found: Vec<_> = result
            .validation_errors()
            .flat_map(|e| policies::located(name, text, &DetailedError::from(e)))
            .collect();
        if !found.is_empty() {
            return Err(found);
        }

        let reads = Reads::of(&policy);
        if let Some(why) = inspect::refusal(effect, reads) {
            return Err(wrong(why.to_owned(), "write a forbid instead"));
        }
        let reach = |wanted: fn(KeyPolicyReach) -> bool| {
            scope.iter().any(|a| wanted(a.class().key_policies()))
        };
        let effective = match effect {
            Effect::Permit => {
                reach(|r| matches!(r, KeyPolicyReach::Grant | KeyPolicyReach::GrantWithPermission))
            }
            Effect::Forbid => reach(|r| r != KeyPolicyReach::None),
        };
        if !effective {
            return Err(wrong(
                "a key's own policy has no say in these actions".to_owned(),
                "permit reading, use, rotation, update, revocation or export; forbid these or \
                 enabling, destruction, aliases and version bounds",
            ));
        }

        let narrowed =
            policy.get_mut("resource").ok_or_else(|| wrong("has no resource".to_owned(), SHAPE))?;
        if !is_own(narrowed) {
            return Err(wrong("names another resource than its own key".to_owned(), SHAPE));
        }
        *narrowed = json!({"op": "==", "slot": "?resource"});
        self.link(name, policy).map_err(|m| wrong(m, SHAPE))?;
        self.compiled.push_known(Known {
            id: PolicyId::new(&format!("key/{name}")),
            effect,
            actions: scope,
            reads,
            resource: cedar_policy::ResourceConstraint::Eq(language.key_uid(self.key)),
            text: text.to_owned(),
        });
        Ok(())
    }

    fn link(&mut self, name: &str, policy: Value) -> Result<(), String> {
        let language = language::language().map_err(|e| e.to_string())?;
        let template = cedar_policy::PolicyId::new(format!("template/{name}"));
        let linked = cedar_policy::PolicyId::new(format!("key/{name}"));
        let made =
            Template::from_json(Some(template.clone()), policy).map_err(|e| e.to_string())?;
        self.compiled.set.add_template(made).map_err(|e| e.to_string())?;
        let key = HashMap::from([(SlotId::resource(), language.key_uid(self.key))]);
        self.compiled.set.link(template, linked, key).map_err(|e| e.to_string())
    }
}

/// The one policy of a text: its JSON form, effect and the actions in its scope.
fn single(parsed: &PolicySet) -> Result<(Value, Effect, super::ActionSet), String> {
    let found = parsed.num_of_policies() + parsed.num_of_templates();
    if found != 1 {
        return Err(format!("holds {found} policies instead of one"));
    }
    if let Some(policy) = parsed.policies().next() {
        let json = policy.to_json().map_err(|e| e.to_string())?;
        let scope = inspect::actions(&policy.action_constraint());
        return Ok((json, policy.effect(), scope));
    }
    let template = parsed.templates().next().ok_or_else(|| "holds no policy".to_owned())?;
    if template.slots().any(|slot| *slot != SlotId::resource()) {
        return Err("has another slot than ?resource".to_owned());
    }
    let json = template.to_json().map_err(|e| e.to_string())?;
    let scope = inspect::actions(&template.action_constraint());
    Ok((json, template.effect(), scope))
}

/// Whether a resource scope names nothing but the policy's own key.
fn is_own(scope: &Value) -> bool {
    *scope == json!({"op": "All"})
        || *scope == json!({"op": "==", "slot": "?resource"})
        || *scope == json!({"op": "is", "entity_type": "Key"})
}

/// Whether a key's policy may have this name: `^[a-zA-Z][a-zA-Z0-9_-]{0,63}$`.
#[must_use]
pub fn is_policy_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.len() <= 64
        && bytes.first().is_some_and(u8::is_ascii_alphabetic)
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}
