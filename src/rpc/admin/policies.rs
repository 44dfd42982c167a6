//! Policies: reading them, checking texts, and explaining decisions.

use std::collections::BTreeMap;
use std::sync::Arc;

use polykey_proto::polykey::v2 as pb;
use tonic::Request;
use uuid::Uuid;

use super::{AdminService, commands, page, parse};
use crate::authz::{
    Action, Authorizer, ClientFacts, DEFAULTS, KeyFacts, KeyPolicies, MAX_OPERATOR_BYTES,
    MAX_POLICY_BYTES, Permission, PermissionSet, PolicyError, PolicyFile, PrincipalFacts,
    Request as Question, Resource, RoleFacts, SCHEMA, Target, visible,
};
use crate::context::Context;
use crate::error::Error;
use crate::keyring::Key;
use crate::limits::Violations;
use crate::rpc::admit::{check_attributes, claimed};
use crate::rpc::parse::key_name;

impl AdminService {
    pub(super) async fn list_policies(
        &self,
        request: Request<pb::ListPoliciesRequest>,
    ) -> Result<pb::ListPoliciesResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        let size = parse::page_size(&mut v, m.page_size);
        v.finish()?;
        let vault = self.directory().vault();
        let after = page::last_name(vault, "policies", "", &m.page_token)?;
        self.look(&cx, commands::ReadPolicies, &[]).await?;
        let authorizer = self.0.deps.keyring.authorizer();
        let mut policies: Vec<_> = authorizer.node_policy_records().collect();
        if let Some(after) = &after {
            // One that is gone by now begins anew: nothing is left out.
            let at = policies.iter().position(|p| p.id.as_str() == after).map_or(0, |i| i + 1);
            policies.drain(..at);
        }
        let more = policies.len() > size;
        policies.truncate(size);
        let next_page_token = match policies.last() {
            Some(last) if more => page::token(vault, "policies", "", last.id.as_str().as_bytes()),
            _ => String::new(),
        };
        let policies = policies.into_iter().map(|policy| pb::PolicyRecord {
            policy_id: policy.id.to_string(),
            policy_type: policy.kind.name().to_owned(),
            source: self.source(policy.id.as_str()),
            text: policy.text,
            annotations: policy.annotations,
        });
        Ok(pb::ListPoliciesResponse {
            policies: policies.collect(),
            next_page_token,
            schema: if after.is_none() { SCHEMA.to_owned() } else { String::new() },
        })
    }

    /// "built-in", or the operator's file.
    fn source(&self, id: &str) -> String {
        let Some(rest) = id.strip_prefix("operator/") else { return "built-in".to_owned() };
        let name = rest.split('/').next().unwrap_or_default();
        let named = |path: &&std::path::PathBuf| {
            path.file_name().is_some_and(|n| n == name)
                || path.file_stem().is_some_and(|n| n == name)
        };
        let path = self.0.admin.config.policies.iter().find(named);
        path.map_or_else(|| name.to_owned(), |path| path.display().to_string())
    }

    pub(super) async fn validate_policy(
        &self,
        request: Request<pb::ValidatePolicyRequest>,
    ) -> Result<pb::ValidatePolicyResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let limit = if m.key_policy { MAX_POLICY_BYTES } else { MAX_OPERATOR_BYTES };
        if m.text.is_empty() || m.text.len() > limit {
            return Err(Error::invalid("text", format!("must have 1 to {limit} bytes")));
        }
        self.look(&cx, commands::ReadPolicies, &[]).await?;
        // A long text takes long to compile.
        let checked = tokio::task::spawn_blocking(move || check(m.text, m.key_policy)).await;
        checked.map_err(|e| Error::internal(format!("checking policies: {e}")))
    }

    pub(super) async fn explain_authorization(
        &self,
        request: Request<pb::ExplainAuthorizationRequest>,
    ) -> Result<pb::ExplainAuthorizationResponse, Error> {
        let (_, cx, m) = self.admit(request)?;
        let mut v = Violations::new();
        parse::client_id(&mut v, &m.client_id);
        let action = action(&m.action);
        v.check(action.is_some(), "action", "must be an action or a permission that there is");
        let on_key = action.is_some_and(|a| a.target() == Target::Key);
        let makes = matches!(action, Some(Action::CreateKey | Action::ImportKey));
        let key = if m.key_id.is_empty() {
            v.check(!on_key || makes, "key_id", "must name a key: the action is about one");
            None
        } else {
            v.check(on_key && !makes, "key_id", "must be empty: the action concerns no key");
            Some(key_name(&mut v, "key_id", &m.key_id))
        };
        if let Some(attributes) = &m.attributes {
            check_attributes(&mut v, attributes);
        }
        v.finish()?;
        let action = action.ok_or_else(|| Error::invalid("action", "is unknown"))?;
        let details = [("client", m.client_id.as_str()), ("about", action.name())];
        self.look(&cx, commands::ExplainDecision, &details).await?;

        let client = self.directory().client(&m.client_id).await?.ok_or(Error::NotFound)?;
        let principal = self.directory().facts(&client).await?;
        let keyring = &self.0.deps.keyring;
        let key: Option<Arc<Key>> = match &key {
            None => None,
            Some(name) => {
                let key = keyring.load(keyring.resolve(name).await?).await?;
                // Asking about a key is no way to learn that there is one.
                if !visible(&cx.caller.facts, key.facts()) {
                    return Err(Error::NotFound);
                }
                Some(key)
            }
        };
        let explained = self.explain(&cx, &principal, action, key.as_deref(), m.attributes);
        let policy_ids = explained.reasons.iter().map(|r| r.policy.to_string()).collect();
        let mut reasons = vec![explained.summary];
        reasons.extend(explained.reasons.into_iter().map(|r| format!("{}: {}", r.policy, r.text)));
        Ok(pb::ExplainAuthorizationResponse {
            allowed: explained.allowed,
            visible: explained.visible,
            policy_ids,
            reasons,
            errors: explained.errors,
        })
    }

    fn explain(
        &self,
        cx: &Context,
        principal: &PrincipalFacts,
        action: Action,
        key: Option<&Key>,
        attributes: Option<pb::AccessAttributes>,
    ) -> crate::authz::Explanation {
        let mut context = cx.facts();
        // Not the asker's own circumstances: those of a call from nowhere, with these claims.
        context.source = None;
        context.certificate = String::new();
        context.claimed = claimed(None, attributes.as_ref());
        let new = new_key(&principal.client);
        // Whoever concerns another client or role is asked about one without any authority.
        let client = ClientFacts {
            client: "some-client".to_owned(),
            roles: Vec::new(),
            permissions: PermissionSet::EMPTY,
            tier: String::new(),
            environment: String::new(),
        };
        let role = RoleFacts { name: "some-role".to_owned(), permissions: PermissionSet::EMPTY };
        let resource = match (action.target(), key) {
            (Target::Key, Some(key)) => {
                Resource::Key { facts: key.facts(), policies: key.policies() }
            }
            (Target::Key, None) => Resource::NewKey(&new),
            (Target::Node, _) => Resource::Node,
            (Target::Client, _) => Resource::Client(&client),
            (Target::Role, _) => Resource::Role(&role),
        };
        let authorizer = self.0.deps.keyring.authorizer();
        authorizer.explain(&Question { principal, action, resource, context: &context })
    }
}

/// An action by its name, or the first one that a permission grants.
fn action(name: &str) -> Option<Action> {
    Action::parse(name).or_else(|| {
        let permission = Permission::parse(name)?;
        Action::ALL.iter().copied().find(|action| action.permission() == permission)
    })
}

fn new_key(creator: &str) -> KeyFacts {
    KeyFacts {
        id: Uuid::nil(),
        revision: 0,
        creator: creator.to_owned(),
        authorized_contexts: Vec::new(),
        key_type: "aes-256".to_owned(),
        purpose: "encrypt".to_owned(),
        state: "enabled".to_owned(),
        data_classification: String::new(),
        exportable: false,
        aliases: Vec::new(),
        tags: BTreeMap::new(),
    }
}

fn check(text: String, of_key: bool) -> pb::ValidatePolicyResponse {
    const NAME: &str = "policy";
    if of_key {
        let texts = BTreeMap::from([(NAME.to_owned(), text)]);
        return match KeyPolicies::compile(Uuid::nil(), &texts) {
            Ok(_) => {
                pb::ValidatePolicyResponse { valid: true, problems: Vec::new(), policy_count: 1 }
            }
            Err(errors) => refused(&errors.0),
        };
    }
    match Authorizer::new(DEFAULTS, &[PolicyFile { name: NAME.to_owned(), text }]) {
        Ok(authorizer) => {
            let own = |id: &str| id.starts_with("operator/");
            let count = authorizer.node_policies().filter(|(id, _)| own(id.as_str())).count();
            pb::ValidatePolicyResponse {
                valid: true,
                problems: authorizer.warnings().iter().map(|w| problem(w, true)).collect(),
                policy_count: i32::try_from(count).unwrap_or(i32::MAX),
            }
        }
        Err(errors) => refused(&errors.0),
    }
}

fn refused(errors: &[PolicyError]) -> pb::ValidatePolicyResponse {
    let problems = errors.iter().take(1000).map(|error| problem(error, false)).collect();
    pb::ValidatePolicyResponse { valid: false, problems, policy_count: 0 }
}

fn problem(error: &PolicyError, warning: bool) -> pb::PolicyProblem {
    let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let message = if error.remedy.is_empty() {
        error.message.clone()
    } else {
        format!("{} ({})", error.message, error.remedy)
    };
    pb::PolicyProblem {
        message,
        line: number(error.line),
        column: number(error.column),
        policy_id: String::new(),
        warning,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_checked_as_the_server_would_take_them() {
        let good = check("forbid (principal, action, resource is Key);".into(), false);
        assert!(good.valid && good.policy_count == 1, "{good:?}");
        let two = "forbid (principal, action, resource is Key);\n\
                   permit (principal, action == Action::\"Fly\", resource);";
        let bad = check(two.into(), false);
        assert!(!bad.valid && !bad.problems.is_empty() && bad.policy_count == 0, "{bad:?}");
        let key = check("forbid (principal, action, resource);".into(), true);
        assert!(key.valid && key.policy_count == 1, "{key:?}");
        assert!(!check("forbid (".into(), true).valid);
    }

    #[test]
    fn actions_have_two_names() {
        assert_eq!(action("RotateKey"), Some(Action::RotateKey));
        assert_eq!(action("keys:rotate"), Some(Action::RotateKey));
        assert_eq!(action("keys:fly"), None);
    }
}
