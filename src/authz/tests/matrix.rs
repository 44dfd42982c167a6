//! Who may do what: a golden file for readers, and an oracle that knows nothing of Cedar.

use std::fmt::Write as _;

use super::*;

const ROLES: [&str; 5] = ["admin", "operator", "user", "auditor", "none"];

/// Per action and role: what it may do with a key that it created, that is shared with it, and
/// that is a stranger's. `+` allowed, `-` denied, `?` hidden.
const KEYS: &[(&str, [&str; 5])] = &[
    //                         admin  operator user  auditor none
    ("GetKey", ["+++", "+++", "++?", "++-", "++?"]),
    ("GetKeyMetadata", ["+++", "+++", "++?", "+++", "++?"]),
    ("Encrypt", ["+++", "++-", "++?", "++-", "++?"]),
    ("Decrypt", ["+++", "++-", "++?", "++-", "++?"]),
    ("Rewrap", ["+++", "++-", "++?", "++-", "++?"]),
    ("GenerateDataKey", ["+++", "++-", "++?", "++-", "++?"]),
    ("GenerateWrappedDataKey", ["+++", "++-", "++?", "++-", "++?"]),
    ("Sign", ["+++", "++-", "++?", "++-", "++?"]),
    ("Verify", ["+++", "++-", "++?", "++-", "++?"]),
    ("GenerateMac", ["+++", "++-", "++?", "++-", "++?"]),
    ("VerifyMac", ["+++", "++-", "++?", "++-", "++?"]),
    ("DeriveKey", ["+++", "++-", "++?", "++-", "++?"]),
    ("Agree", ["+++", "++-", "++?", "++-", "++?"]),
    ("Encapsulate", ["+++", "++-", "++?", "++-", "++?"]),
    ("Decapsulate", ["+++", "++-", "++?", "++-", "++?"]),
    ("WrapKey", ["+++", "++-", "++?", "++-", "++?"]),
    ("UnwrapKey", ["+++", "++-", "++?", "++-", "++?"]),
    ("ReadKeyHistory", ["+++", "+--", "+-?", "+++", "+-?"]),
    ("ReadKeyPolicies", ["+++", "+++", "+-?", "+++", "+-?"]),
    ("ShareKey", ["+++", "+--", "+-?", "+--", "+-?"]),
    ("ExportKey", ["+++", "---", "+-?", "---", "--?"]),
    ("RotateKey", ["+++", "+++", "+-?", "---", "--?"]),
    ("UpdateKeyMetadata", ["+++", "+++", "+-?", "---", "--?"]),
    ("RevokeKey", ["+++", "+++", "+-?", "---", "--?"]),
    ("EnableKey", ["+++", "+++", "+-?", "---", "--?"]),
    ("DisableKey", ["+++", "+++", "+-?", "---", "--?"]),
    ("ScheduleKeyDestruction", ["+++", "+++", "+-?", "---", "--?"]),
    ("CancelKeyDestruction", ["+++", "+++", "+-?", "---", "--?"]),
    ("SetAlias", ["+++", "+++", "+-?", "---", "--?"]),
    ("DeleteAlias", ["+++", "+++", "+-?", "---", "--?"]),
    ("SetVersionBounds", ["+++", "+++", "+-?", "---", "--?"]),
    ("TrimVersions", ["+++", "+++", "+-?", "---", "--?"]),
];

/// Per action and role, on the node, and for a key that is about to be made.
const NODE: &[(&str, &str)] = &[
    ("CreateKey", "+++--"),
    ("ImportKey", "+++--"),
    ("ImportPlaintext", "+----"),
    ("HardenKey", "+++++"),
    ("ListKeys", "++++-"),
    ("GenerateRandom", "+-+--"),
    ("GetImportParameters", "+++--"),
    ("ReadAudit", "+--+-"),
    ("HashAuditValue", "+--+-"),
    ("ReadPolicies", "++-+-"),
    ("ExplainDecision", "++-+-"),
    ("ReadNode", "++---"),
    ("ListClients", "++---"),
    ("RotateRoot", "+----"),
    ("RewrapRoot", "+----"),
    ("RotateTokenKey", "+----"),
    ("ReloadConfiguration", "+----"),
    ("VerifyStore", "+----"),
    ("BackupStore", "+----"),
    ("ArchiveAudit", "+----"),
    ("ManageJobs", "+----"),
    ("ConfirmClock", "+----"),
];

/// Per action and role, on itself, on a client with role `user`, on one with role `admin`.
const CLIENTS: &[(&str, [&str; 5])] = &[
    ("ReadClient", ["+++", "+++", "+--", "+--", "+--"]),
    ("RevokeToken", ["+++", "+++", "+--", "+--", "+--"]),
    ("CreateClient", ["+++", "---", "---", "---", "---"]),
    ("UpdateClient", ["+++", "---", "---", "---", "---"]),
    ("DisableClient", ["+++", "---", "---", "---", "---"]),
    ("EnableClient", ["+++", "---", "---", "---", "---"]),
    ("RotateApiKey", ["+++", "+--", "+--", "+--", "+--"]),
    ("RemoveClient", ["+++", "---", "---", "---", "---"]),
    ("AssignRoles", ["+++", "---", "---", "---", "---"]),
    ("IssueCertificate", ["+++", "---", "---", "---", "---"]),
];

/// Per action and role, on a role without permissions and on one with all.
const ROLE: &[(&str, [&str; 5])] = &[
    ("DefineRole", ["++", "--", "--", "--", "--"]),
    ("DeleteRole", ["++", "--", "--", "--", "--"]),
];

fn caller(role: &str) -> Arc<PrincipalFacts> {
    match role {
        "none" => client("caller", &[], &[]),
        role => client("caller", &[role], &[]),
    }
}

fn relations(target: Target, action: Action) -> &'static [&'static str] {
    match target {
        Target::Key if action.class() == Class::Create => &["new"],
        Target::Key => &["creator", "shared", "stranger"],
        Target::Node => &["node"],
        Target::Client => &["self", "a user", "an admin"],
        Target::Role => &["an empty role", "a role with *"],
    }
}

/// One cell: its sign, and the policies that decided it.
fn cell(authorizer: &Authorizer, role: &str, action: Action, relation: &str) -> (char, String) {
    let principal = caller(role);
    let stranger = match relation {
        "shared" => key(2, "owner", &["friend", "caller"]),
        "stranger" => key(3, "owner", &["Caller", "caller "]),
        _ => key(1, "caller", &[]),
    };
    let none = KeyPolicies::none(stranger.id);
    let facts = |id: &str, role: Option<&str>, permissions| ClientFacts {
        client: id.to_owned(),
        roles: role.iter().map(ToString::to_string).collect(),
        permissions,
        tier: String::new(),
        environment: String::new(),
    };
    let granted = |role| built_in(role).unwrap().permissions;
    let other = match relation {
        "self" => facts("caller", None, principal.permissions),
        "a user" => facts("peer", Some("user"), granted("user")),
        _ => facts("root", Some("admin"), granted("admin")),
    };
    let defined = RoleFacts {
        name: "custom".to_owned(),
        permissions: if relation == "a role with *" {
            PermissionSet::all()
        } else {
            PermissionSet::EMPTY
        },
    };
    let resource = match (action.target(), relation) {
        (Target::Key, "new") => Resource::NewKey(&stranger),
        (Target::Key, _) => Resource::Key { facts: &stranger, policies: &none },
        (Target::Node, _) => Resource::Node,
        (Target::Client, _) => Resource::Client(&other),
        (Target::Role, _) => Resource::Role(&defined),
    };
    let request = Request { principal: &principal, action, resource, context: &call() };
    let explained = authorizer.explain(&request);
    assert!(explained.errors.is_empty(), "{explained}");
    let sign = match (explained.visible, explained.allowed) {
        (false, _) => '?',
        (true, true) => '+',
        (true, false) => '-',
    };
    let reasons: Vec<&str> = match sign {
        '?' => Vec::new(),
        _ => explained.reasons.iter().map(|r| r.policy.as_str()).collect(),
    };
    (sign, reasons.join(" "))
}

#[test]
fn decisions_match_the_oracle() {
    let authorizer = Authorizer::default_only().unwrap();
    let mut seen = ActionSet::EMPTY;
    let mut compare = |name: &str, role: &str, expected: &str| {
        let action = Action::parse(name).unwrap();
        seen = seen.with(action);
        let found: String = relations(action.target(), action)
            .iter()
            .map(|relation| cell(&authorizer, role, action, relation).0)
            .collect();
        assert_eq!(found, expected, "{role} {name}");
    };
    for (name, cells) in KEYS.iter().chain(CLIENTS).chain(ROLE) {
        for (role, expected) in ROLES.iter().zip(cells) {
            compare(name, role, expected);
        }
    }
    for (name, cells) in NODE {
        for (role, expected) in ROLES.iter().zip(cells.chars()) {
            compare(name, role, &expected.to_string());
        }
    }
    assert_eq!(seen, ActionSet::all(), "the oracle has to know every action");
}

#[test]
fn the_golden_matrix_is_current() {
    let authorizer = Authorizer::default_only().unwrap();
    let mut text = String::from(
        "# Who may do what under the shipped policies, and which policy says so.\n\
         # Generated: POLYKEY_REGENERATE=1 cargo test authz. hidden = answered like a key that does not exist.\n\
         # role action relation decision policies\n",
    );
    for role in ROLES {
        for action in Action::ALL {
            for relation in relations(action.target(), *action) {
                let (sign, reasons) = cell(&authorizer, role, *action, relation);
                let word = match sign {
                    '+' => "allow",
                    '-' => "deny",
                    _ => "hidden",
                };
                let row = format!("{role:<9}{:<23}{relation:<14}{word:<7}{reasons}", action.name());
                writeln!(text, "{}", row.trim_end()).unwrap();
            }
        }
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/authorization.txt");
    if std::env::var_os("POLYKEY_REGENERATE").is_some() {
        std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).unwrap();
        std::fs::write(path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        golden == text,
        "tests/golden/authorization.txt differs: regenerate it and read the difference"
    );
}

/// Every permission alone: it allows exactly the actions it names, on one's own keys and the node.
#[test]
fn a_literal_permission_grants_its_actions_and_no_more() {
    let authorizer = Authorizer::default_only().unwrap();
    let mine = key(1, "caller", &[]);
    let shared = key(2, "owner", &["caller"]);
    let foreign = key(3, "owner", &[]);
    for permission in Permission::ALL {
        for all in [false, true] {
            let mut literal = vec![permission.name()];
            if all {
                literal.push("keys:all");
            }
            let principal = client("caller", &[], &literal);
            for action in Action::ALL.iter().filter(|a| a.target() == Target::Key) {
                let holds = principal.permissions.contains(action.permission());
                let everywhere = principal.permissions.contains(Permission::KeysAll);
                let readable = matches!(action.class(), Class::Read | Class::Use);
                // The tier of these clients gives hardened keys.
                let given = action.class() == Class::Govern || *action == Action::HardenKey;
                let inherent = readable || given;
                let cases = [
                    (&mine, holds || inherent),
                    (&shared, (holds && everywhere) || readable),
                    (&foreign, holds && everywhere),
                ];
                for (facts, expected) in cases {
                    let none = KeyPolicies::none(facts.id);
                    let resource = Resource::Key { facts, policies: &none };
                    let found = ask(&authorizer, &principal, *action, resource).allowed;
                    assert_eq!(found, expected, "{permission} {all} {action} {}", facts.id);
                }
            }
            for action in Action::ALL.iter().filter(|a| a.target() == Target::Node) {
                let holds = principal.permissions.contains(action.permission());
                let found = ask(&authorizer, &principal, *action, Resource::Node).allowed;
                assert_eq!(found, holds, "{permission} {action}");
            }
        }
    }
}
