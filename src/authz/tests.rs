//! Tests of decisions: the matrix of who may do what, limits and refusals, memory against no memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use uuid::Uuid;

use super::*;

mod keys;
mod matrix;
mod memory;
mod node;

/// A client with these roles and literal permissions.
fn client(id: &str, roles: &[&str], literal: &[&str]) -> Arc<PrincipalFacts> {
    let permissions = roles
        .iter()
        .filter_map(|role| built_in(role))
        .map(|role| role.permissions)
        .fold(PermissionSet::parse(literal.iter().copied()).unwrap(), PermissionSet::union);
    Arc::new(PrincipalFacts {
        client: id.into(),
        revision: 1,
        roles: roles.iter().map(ToString::to_string).collect(),
        permissions,
        tier: "pro".to_owned(),
        environment: "production".to_owned(),
    })
}

/// A key of `owner`, shared with `shared`.
fn key(id: u128, owner: &str, shared: &[&str]) -> KeyFacts {
    KeyFacts {
        id: Uuid::from_u128(id),
        revision: 7,
        creator: owner.to_owned(),
        authorized_contexts: shared.iter().map(ToString::to_string).collect(),
        key_type: "aes-256".to_owned(),
        purpose: "encrypt".to_owned(),
        state: "enabled".to_owned(),
        data_classification: "internal".to_owned(),
        exportable: true,
        aliases: vec!["billing".to_owned()],
        tags: BTreeMap::from([("env".to_owned(), "prod".to_owned())]),
    }
}

/// A call at noon UTC on Wednesday, 2026-01-07, from 10.0.0.9.
fn call() -> ContextFacts {
    ContextFacts {
        decision_id: DecisionId(Uuid::from_u128(1)),
        now: "2026-01-07T12:00:00Z".parse().unwrap(),
        source: Some("10.0.0.9".parse().unwrap()),
        certificate: "ab".repeat(32),
        claimed: Claimed::default(),
    }
}

fn texts(policies: &[(&str, &str)]) -> BTreeMap<String, String> {
    policies.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect()
}

fn own(key: &KeyFacts, policies: &[(&str, &str)]) -> KeyPolicies {
    KeyPolicies::compile(key.id, &texts(policies)).unwrap_or_else(|e| panic!("{e}"))
}

fn file(name: &str, text: &str) -> PolicyFile {
    PolicyFile { name: name.to_owned(), text: text.to_owned() }
}

fn ask(
    authorizer: &Authorizer,
    principal: &PrincipalFacts,
    action: Action,
    resource: Resource<'_>,
) -> Decision {
    authorizer.decide(&Request { principal, action, resource, context: &call() })
}

fn ids(decision: &Decision) -> Vec<&str> {
    decision.reasons.iter().map(PolicyId::as_str).collect()
}

#[test]
fn the_schema_lists_the_table_of_actions() {
    let marker =
        "// Below: generated from the table of actions (POLYKEY_REGENERATE=1 cargo test).\n";
    let (types, actions) = SCHEMA.split_once(marker).unwrap();
    let expected = schema_actions();
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/authz/schema.cedarschema");
        std::fs::write(path, format!("{types}{marker}{expected}")).unwrap();
    } else {
        assert_eq!(actions, expected);
    }
}

#[test]
fn facts_conform_to_the_schema_for_every_action() {
    let language = language::language().unwrap();
    let schema = language.everything.schema();
    let principal = client("svc", &["admin"], &[]);
    let key = key(9, "svc", &["other"]);
    let none = KeyPolicies::none(key.id);
    let target = ClientFacts {
        client: "other".to_owned(),
        roles: vec!["user".to_owned()],
        permissions: PermissionSet::EMPTY,
        tier: String::new(),
        environment: String::new(),
    };
    let role = RoleFacts { name: "custom".to_owned(), permissions: PermissionSet::all() };
    let mut context = call();
    context.claimed.custom.insert("k".to_owned(), "v".to_owned());
    let without = ContextFacts { source: None, ..context.clone() };
    for action in Action::ALL {
        let resource = match action.target() {
            Target::Key => Resource::Key { facts: &key, policies: &none },
            Target::Node => Resource::Node,
            Target::Client => Resource::Client(&target),
            Target::Role => Resource::Role(&role),
        };
        for context in [&context, &without] {
            let (request, entities) =
                language.request(&principal, *action, &resource, context, true).unwrap();
            cedar_policy::Entities::from_entities(entities.iter().cloned(), Some(schema))
                .unwrap_or_else(|e| panic!("{action}: {e}"));
            cedar_policy::Request::new(
                request.principal().unwrap().clone(),
                request.action().unwrap().clone(),
                request.resource().unwrap().clone(),
                request.context().unwrap().clone(),
                Some(schema),
            )
            .unwrap_or_else(|e| panic!("{action}: {e}"));
        }
    }
}

#[test]
fn names_of_permissions_roles_and_actions_are_exact() {
    for permission in Permission::ALL {
        assert_eq!(Permission::parse(permission.name()), Some(*permission));
    }
    for action in Action::ALL {
        assert_eq!(Action::parse(action.name()), Some(*action));
        assert!(ActionSet::all().contains(*action));
    }
    for name in ["ADMIN", " admin", "admin ", "\u{430}dmin", "", "admin\0", "*"] {
        assert!(built_in(name).is_none(), "{name:?}");
    }
    for name in ["keys:*", "KEYS:READ", "keys:read ", "", "**", "keys", "crypto:*"] {
        assert_eq!(PermissionSet::parse([name]), Err(UnknownPermission(name.to_owned())));
    }
    assert_eq!(PermissionSet::parse(["*"]), Ok(PermissionSet::all()));
    let read = PermissionSet::parse(["keys:read"]).unwrap();
    assert!(read.contains(Permission::KeysDescribe));
    assert!(!read.contains(Permission::KeysAll));
}
