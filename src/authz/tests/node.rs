//! The node's own policies, operator files, escalation, proofs and explanations.

use super::*;

fn errors(files: &[PolicyFile]) -> Vec<PolicyError> {
    Authorizer::new(DEFAULTS, files).map(|_| ()).unwrap_err().0
}

#[test]
fn the_shipped_policies_parse_and_validate_without_a_warning() {
    let authorizer = Authorizer::default_only().unwrap();
    assert_eq!(authorizer.warnings(), []);
    let ids: Vec<&str> = authorizer.node_policies().map(|(id, _)| id.as_str()).collect();
    assert!(ids.iter().all(|id| id.starts_with("default/")), "{ids:?}");
    assert!(!DEFAULTS.lines().any(|l| !l.starts_with("//") && l.contains("claimed")));
}

#[test]
fn operator_files_add_permits_and_forbids_under_stable_ids() {
    let files = [
        file(
            "hours.v1",
            "@id(\"night\") forbid (principal, action in Action::\"manage\", resource) when { context.hour < 6 };\n\
             permit (principal == Client::\"ci\", action == Action::\"RotateKey\", resource) when { resource.hasTag(\"env\") };",
        ),
        file(
            "deny",
            "forbid (principal in Role::\"user\", action == Action::\"ExportKey\", resource);",
        ),
    ];
    let authorizer = Authorizer::new(DEFAULTS, &files).unwrap();
    let ids_of: Vec<&str> = authorizer
        .node_policies()
        .map(|(id, _)| id.as_str())
        .filter(|id| id.starts_with("operator/"))
        .collect();
    assert_eq!(ids_of, ["operator/hours.v1/night", "operator/hours.v1/2", "operator/deny/1"]);
    let facts = key(1, "owner", &["ci"]);
    let none = KeyPolicies::none(facts.id);
    let resource = Resource::Key { facts: &facts, policies: &none };
    let ci = client("ci", &[], &[]);
    let decision = ask(&authorizer, &ci, Action::RotateKey, resource);
    assert_eq!((decision.allowed, ids(&decision)), (true, vec!["operator/hours.v1/2"]));
    let owner = client("owner", &["user"], &[]);
    let decision = ask(&authorizer, &owner, Action::ExportKey, resource);
    assert_eq!((decision.allowed, ids(&decision)), (false, vec!["operator/deny/1"]));
    let mut night = call();
    night.now = "2026-01-07T05:59:59Z".parse().unwrap();
    let request =
        Request { principal: &owner, action: Action::RotateKey, resource, context: &night };
    let explained = authorizer.explain(&request);
    assert!(!explained.allowed && !explained.cacheable);
    assert_eq!(explained.reasons[0].policy.as_str(), "operator/hours.v1/night");
    assert!(explained.summary.contains("forbidden by operator/hours.v1/night"), "{explained}");
}

#[test]
fn bad_operator_files_are_refused_whole_with_file_and_line() {
    let good = "forbid (principal, action == Action::\"ExportKey\", resource);";
    let found = errors(&[
        file("good", good),
        file("bad", &format!("{good}\n\nforbid (principal, action, resource) whn {{ true }};")),
    ]);
    assert_eq!((&*found[0].name, found[0].line), ("bad", 3), "{}", found[0]);
    let found = errors(&[file(
        "typo",
        &format!("{good}\nforbid (principal, action == Action::\"ExportKye\", resource);"),
    )]);
    assert_eq!((&*found[0].name, found[0].line), ("typo", 2), "{}", found[0]);
    for files in [
        vec![file("a", good), file("a", good)],
        vec![file("../a", good)],
        vec![file("", good)],
        vec![file(
            "a",
            "@id(\"x\") permit (principal, action, resource); @id(\"x\") permit (principal, action, resource);",
        )],
        vec![file("a", "@id(\"1\") permit (principal, action, resource);")],
        vec![file("a", "@id(\"a/b\") permit (principal, action, resource);")],
        vec![file("a", "permit (principal, action, resource == ?resource);")],
        vec![file(
            "a",
            "permit (principal, action, resource) when { context.claimed.environment == \"lab\" };",
        )],
        vec![file("a", "permit (principal is User, action, resource);")],
        vec![file("a", &good.repeat(MAX_OPERATOR_POLICIES + 1))],
        vec![file("a", &" ".repeat(MAX_OPERATOR_BYTES + 1))],
    ] {
        assert!(!errors(&files).is_empty());
    }
    let odd = Authorizer::new(
        DEFAULTS,
        &[file("odd", "permit (principal, action == Action::\"ReadAudit\", resource is Key);")],
    );
    assert!(odd.map_or_else(|_| true, |a| !a.warnings().is_empty()));
}

#[test]
fn files_are_checked_where_they_lie() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("hours.cedar");
    let bad = dir.path().join("bad.cedar");
    std::fs::write(&good, "forbid (principal, action, resource is Key) when { context.hour < 6 };")
        .unwrap();
    std::fs::write(&bad, "permit (principal, action, resource) when { principal.shoe == 3 };")
        .unwrap();
    let report = check_files(std::slice::from_ref(&good));
    assert!(report.ok, "{report}");
    assert_eq!(report.files[0].policies, ["operator/hours/1"]);
    let report = check_files(&[good.clone(), bad.clone()]);
    assert!(!report.ok);
    assert_eq!(report.errors[0].name, bad.display().to_string());
    assert_eq!(report.errors[0].line, 1);
    let report = check_files(&[good, dir.path().join("absent.cedar")]);
    assert!(report.errors[0].name.ends_with("absent.cedar"), "{report}");
    std::fs::write(&bad, [0xff, 0xfe]).unwrap();
    assert!(!check_files(&[bad]).ok);
}

#[test]
fn nobody_hands_out_more_than_they_have() {
    let authorizer = Authorizer::default_only().unwrap();
    let keeper =
        client("keeper", &[], &["clients:admin", "roles:admin", "certificates:issue", "keys:read"]);
    let target = |names: &[&str]| ClientFacts {
        client: "target".to_owned(),
        roles: Vec::new(),
        permissions: PermissionSet::parse(names.iter().copied()).unwrap(),
        tier: String::new(),
        environment: String::new(),
    };
    for action in Action::ALL.iter().filter(|a| a.class() == Class::Administer) {
        for (names, expected) in [
            (&[][..], true),
            (&["keys:describe", "clients:read"][..], true),
            (&["keys:read", "roles:admin"][..], true),
            (&["keys:all"][..], false),
            (&["*"][..], false),
        ] {
            let facts = target(names);
            let role = RoleFacts { name: "r".to_owned(), permissions: facts.permissions };
            let resource = match action.target() {
                Target::Role => Resource::Role(&role),
                _ => Resource::Client(&facts),
            };
            let decision = ask(&authorizer, &keeper, *action, resource);
            assert_eq!(decision.allowed, expected, "{action} {names:?}");
        }
    }
}

struct Update {
    contexts: bool,
}

impl Command for Update {
    const ACTION: Action = Action::UpdateKeyMetadata;

    fn also(&self) -> ActionSet {
        if self.contexts { ActionSet::EMPTY.with(Action::ShareKey) } else { ActionSet::EMPTY }
    }
}

#[test]
fn a_command_needs_every_right_it_takes() {
    let authorizer = Authorizer::default_only().unwrap();
    let facts = key(1, "owner", &["friend"]);
    let policies = own(&facts, &[("all", "permit (principal, action, resource);")]);
    let resource = Resource::Key { facts: &facts, policies: &policies };
    let friend = client("friend", &["user"], &[]);
    let permit =
        authorizer.authorize(&friend, resource, &call(), Update { contexts: false }).unwrap();
    assert_eq!(permit.decision_id(), call().decision_id);
    assert_eq!(*permit.resource(), ResourceId::Key(facts.id));
    assert_eq!(permit.principal().client, friend.client);
    let (command, parts) = permit.into_parts();
    assert!(!command.contexts);
    assert_eq!(parts.actions, ActionSet::EMPTY.with(Action::UpdateKeyMetadata));
    let refused = authorizer.authorize(&friend, resource, &call(), Update { contexts: true });
    match refused.unwrap_err() {
        Denied::Forbidden { action, decision } => {
            assert_eq!(action, Action::ShareKey);
            assert!(decision.reasons.is_empty());
        }
        Denied::Hidden => panic!("it can see the key"),
    }
    let wrong_kind =
        authorizer.authorize(&friend, Resource::Node, &call(), Update { contexts: false });
    assert!(wrong_kind.is_err());
}

#[test]
fn details_tell_the_kinds_of_policy_apart() {
    let files = [file(
        "ops",
        "forbid (principal, action == Action::\"GetKey\", resource) when { context.weekday > 5 };\n\
         forbid (principal, action, resource == Node::\"node\");\n\
         forbid (principal, action, resource == Key::\"00000000-0000-0000-0000-000000000002\");",
    )];
    let authorizer = Authorizer::new(DEFAULTS, &files).unwrap();
    let facts = key(1, "owner", &["a", "b"]);
    let policies = own(
        &facts,
        &[
            ("tag", "forbid (principal, action, resource) when { resource.hasTag(\"x\") };"),
            ("who", "permit (principal == Client::\"a\", action, resource);"),
        ],
    );
    let found: Vec<(String, &str)> = authorizer
        .policy_details(&facts, &policies)
        .iter()
        .map(|e| (e.id.to_string(), e.kind.name()))
        .collect();
    let expected = [
        ("default/key-permission", "RBAC"),
        ("default/creator", "RBAC"),
        ("default/authorized-context", "RBAC"),
        ("operator/ops/1", "TimeBased"),
        ("key/tag", "ABAC"),
        ("key/who", "RBAC"),
    ];
    assert_eq!(found, expected.map(|(id, kind)| (id.to_owned(), kind)));
    let entries = authorizer.policy_details(&facts, &policies);
    assert_eq!(entries[2].params["contexts"], "a,b");
    assert_eq!(entries[3].params["actions"], "GetKey");
    assert!(entries[4].params["text"].contains("hasTag"));
}
