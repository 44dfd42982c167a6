//! The policies of a key: how far they reach, and what is refused.

use super::*;

fn refused(text: &str) -> PolicyError {
    let errors =
        KeyPolicies::compile(Uuid::from_u128(1), &texts(&[("p", text)])).map(|_| ()).unwrap_err();
    assert_eq!(errors.0[0].name, "p", "{errors}");
    errors.0[0].clone()
}

fn at<'a>(facts: &'a KeyFacts, policies: &'a KeyPolicies) -> Resource<'a> {
    Resource::Key { facts, policies }
}

#[test]
fn every_way_to_say_this_key_is_the_same() {
    let authorizer = Authorizer::default_only().unwrap();
    let facts = key(1, "owner", &["friend"]);
    let friend = client("friend", &["user"], &[]);
    for resource in ["resource", "resource == ?resource", "resource is Key"] {
        let text = format!(
            "// rotation by a friend\npermit (principal == Client::\"friend\", action == Action::\"RotateKey\", {resource});"
        );
        let policies = own(&facts, &[("rotate", &text)]);
        let decision = ask(&authorizer, &friend, Action::RotateKey, at(&facts, &policies));
        assert!(decision.allowed);
        assert_eq!(ids(&decision), ["key/rotate"]);
        assert!(decision.cacheable);
        let others = ask(&authorizer, &friend, Action::RevokeKey, at(&facts, &policies));
        assert!(!others.allowed);
    }
}

#[test]
fn a_key_policy_never_reaches_another_key() {
    let authorizer = Authorizer::default_only().unwrap();
    let mine = key(1, "owner", &["friend"]);
    let other = key(2, "owner", &["friend"]);
    let friend = client("friend", &["user"], &[]);
    let policies = own(&mine, &[("all", "permit (principal, action, resource);")]);
    assert!(ask(&authorizer, &friend, Action::RotateKey, at(&mine, &policies)).allowed);
    let crossed = ask(&authorizer, &friend, Action::RotateKey, at(&other, &policies));
    assert!(!crossed.allowed && !crossed.errors.is_empty());
    for scope in [
        "resource == Key::\"00000000-0000-0000-0000-000000000001\"",
        "resource == Key::\"x\"",
        "resource in Key::\"x\"",
        "resource is Key in Key::\"x\"",
        "resource is Node",
        "resource in ?resource",
        "resource is Key in ?resource",
    ] {
        refused(&format!("permit (principal, action, {scope});"));
    }
}

#[test]
fn a_permit_stands_in_for_the_creator_but_not_for_the_permission_or_sight() {
    let authorizer = Authorizer::default_only().unwrap();
    let facts = key(1, "owner", &["friend", "bare"]);
    let policies = own(&facts, &[("all", "permit (principal, action, resource);")]);
    let user = client("friend", &["user"], &[]);
    let bare = client("bare", &[], &[]);
    let exporter = client("bare", &[], &["keys:export"]);
    for action in Action::ALL.iter().filter(|a| a.target() == Target::Key) {
        let may = |who| ask(&authorizer, who, *action, at(&facts, &policies)).allowed;
        let class = action.class();
        let readable = matches!(class, Class::Read | Class::Use);
        assert_eq!(may(&user), readable || class == Class::Manage, "{action}");
        assert_eq!(may(&bare), readable, "{action}");
        assert_eq!(may(&exporter), readable || *action == Action::ExportKey);
    }
    struct Get;
    impl Command for Get {
        const ACTION: Action = Action::GetKey;
    }
    let stranger = client("stranger", &["user"], &[]);
    let hidden = authorizer.authorize(&stranger, at(&facts, &policies), &call(), Get);
    assert_eq!(hidden.map(|_| ()).unwrap_err(), Denied::Hidden);
}

#[test]
fn a_forbid_binds_everyone_except_whoever_repairs_the_policies() {
    let authorizer = Authorizer::default_only().unwrap();
    let facts = key(1, "owner", &[]);
    let policies = own(&facts, &[("none", "forbid (principal, action, resource);")]);
    for who in [client("owner", &["user"], &[]), client("root", &["admin"], &[])] {
        for action in Action::ALL.iter().filter(|a| a.target() == Target::Key) {
            if action.class() == Class::Create {
                continue;
            }
            let decision = ask(&authorizer, &who, *action, at(&facts, &policies));
            let repair = action.class() == Class::Govern;
            assert_eq!(decision.allowed, repair, "{} {action}", who.client);
            if !repair {
                assert_eq!(ids(&decision), ["key/none"]);
            }
        }
    }
}

#[test]
fn conditions_on_time_place_and_tags_hold() {
    let authorizer = Authorizer::default_only().unwrap();
    let mut facts = key(1, "owner", &[]);
    let owner = client("owner", &["user"], &[]);
    let table = [
        ("context.hour >= 9 && context.hour < 17", true),
        ("context.hour == 11", false),
        ("context.weekday == 3", true),
        ("context.now < datetime(\"2026-01-07T12:00:00.001Z\")", true),
        ("context.now < datetime(\"2026-01-07\")", false),
        ("context has source && context.source.isInRange(ip(\"10.0.0.0/8\"))", true),
        ("context has source && context.source.isLoopback()", false),
        ("resource.hasTag(\"env\") && resource.getTag(\"env\") == \"prod\"", true),
        ("resource.hasTag(\"team\") && resource.getTag(\"team\") == \"x\"", false),
        ("resource.type == \"aes-256\" && resource.exportable", true),
        ("principal in Role::\"user\"", true),
        ("principal in Role::\"admin\"", false),
        ("principal.tier == \"pro\" && principal.id like \"own*\"", true),
        ("context.certificate == \"00\"", false),
        ("resource.aliases.contains(\"billing\")", true),
    ];
    for (condition, expected) in table {
        facts.revision += 1; // policies are part of the record
        let text = format!(
            "forbid (principal, action in Action::\"read\", resource) unless {{ {condition} }};"
        );
        let policies = own(&facts, &[("rule", &text)]);
        let decision = ask(&authorizer, &owner, Action::GetKey, at(&facts, &policies));
        assert!(decision.errors.is_empty(), "{condition}: {:?}", decision.errors);
        assert_eq!(decision.allowed, expected, "{condition}");
        let covered = !condition.contains("context") && !condition.contains("aliases");
        assert_eq!(decision.cacheable, covered, "{condition}");
        // The rule is about reading: what is remembered of other actions stays remembered.
        let other = ask(&authorizer, &owner, Action::RotateKey, at(&facts, &policies));
        assert!(other.cacheable && other.allowed);
    }
    // A dual-stack listener reports IPv4 peers as mapped addresses.
    let policies = own(
        &facts,
        &[(
            "net",
            "forbid (principal, action, resource) unless { context has source && context.source.isIpv4() };",
        )],
    );
    let mut context = call();
    for (source, expected) in
        [(Some("::ffff:10.1.1.1"), true), (Some("fe80::1"), false), (None, false)]
    {
        context.source = source.map(|a| a.parse().unwrap());
        let request = Request {
            principal: &owner,
            action: Action::GetKey,
            resource: at(&facts, &policies),
            context: &context,
        };
        assert_eq!(authorizer.decide(&request).allowed, expected, "{source:?}");
    }
}

#[test]
fn an_evaluation_error_denies_and_is_not_remembered() {
    let authorizer = Authorizer::default_only().unwrap();
    let facts = key(1, "owner", &[]);
    let owner = client("owner", &["admin"], &[]);
    let policies = own(
        &facts,
        &[(
            "sum",
            "permit (principal, action, resource) when { 9223372036854775807 + (if resource.exportable then 1 else 0) > 0 };",
        )],
    );
    let decision = ask(&authorizer, &owner, Action::GetKey, at(&facts, &policies));
    assert!(!decision.allowed && !decision.cacheable);
    assert!(decision.errors[0].contains("key/sum"), "{:?}", decision.errors);
    let mut context = call();
    context.now = jiff::Timestamp::MIN;
    let rule =
        own(&facts, &[("t", "permit (principal, action, resource) when { context.hour > 0 };")]);
    let decision = authorizer.decide(&Request {
        principal: &owner,
        action: Action::GetKey,
        resource: at(&facts, &rule),
        context: &context,
    });
    assert!(!decision.allowed && decision.errors.len() == 1);
}

#[test]
fn refusals_name_place_and_remedy() {
    let error = refused("permit (principal,\n  acton, resource);");
    assert_eq!((error.line, error.column), (2, 3), "{error}");
    let error =
        refused("forbid (principal, action, resource)\nwhen { resource.colour == \"red\" };");
    assert_eq!((error.line, error.column), (2, 8), "{error}");
    assert!(error.message.contains("colour"), "{error}");
    let error = refused("permit (principal, action == Action::\"RotateKeys\", resource);");
    assert!(error.to_string().contains("RotateKey"), "{error}");
    for text in [
        "",
        "// nothing",
        "permit (principal, action, resource); permit (principal, action, resource);",
        "permit (principal == ?principal, action, resource);",
        "permit (principal, action, resource) when { resource.creator.tier == \"pro\" };",
        "permit (principal, action, resource) when { Client::\"x\".tier == \"pro\" };",
        "permit (principal, action, resource) when { principal.tier == 3 };",
        "permit (principal, action == Action::\"ReadAudit\", resource);",
        "permit (principal, action == Action::\"ShareKey\", resource);",
        "permit (principal, action in Action::\"govern\", resource);",
        "permit (principal, action == Action::\"ScheduleKeyDestruction\", resource);",
        "forbid (principal, action == Action::\"ShareKey\", resource);",
        "permit (principal, action, resource) when { context.claimed.network_zone == \"lan\" };",
        "permit (principal, action, resource) when { (if principal.tier == \"pro\" then context else context).claimed.network_zone == \"lan\" };",
        "permit (principal, action, resource) unless { context.claimed.custom.hasTag(\"x\") };",
        "permit (principal, action, resource) when { context == context };",
    ] {
        let error = refused(text);
        assert!(!error.message.is_empty(), "{text}");
    }
    // What is claimed may take away.
    let facts = key(1, "owner", &[]);
    own(
        &facts,
        &[(
            "zone",
            "forbid (principal, action, resource) unless { context.claimed.network_zone == \"lan\" };",
        )],
    );
}

#[test]
fn limits_hold_exactly() {
    let id = Uuid::from_u128(1);
    let base = "permit (principal, action, resource);";
    let padded = |len: usize| format!("{base}{}", " ".repeat(len - base.len()));
    let fits = |map: &BTreeMap<String, String>| KeyPolicies::compile(id, map).is_ok();
    for (len, expected) in
        [(MAX_POLICY_BYTES - 1, true), (MAX_POLICY_BYTES, true), (MAX_POLICY_BYTES + 1, false)]
    {
        assert_eq!(fits(&texts(&[("p", &padded(len))])), expected, "{len}");
    }
    let many = |count: usize, len: usize| -> BTreeMap<String, String> {
        (0..count).map(|n| (format!("p{n}"), padded(len))).collect()
    };
    assert!(fits(&many(MAX_POLICIES - 1, 60)) && fits(&many(MAX_POLICIES, 60)));
    assert!(!fits(&many(MAX_POLICIES + 1, 60)));
    assert!(fits(&many(8, 4096)) && fits(&many(8, 4095)));
    let mut over = many(8, 4096);
    over.insert("q".to_owned(), base.to_owned());
    assert!(!fits(&over));
    for (name, expected) in [
        ("a", true),
        ("A-b_9", true),
        (&*"a".repeat(64), true),
        (&*"a".repeat(65), false),
        ("", false),
        ("9a", false),
        ("a b", false),
        ("a/b", false),
        ("\u{e9}", false),
    ] {
        assert_eq!(fits(&texts(&[(name, base)])), expected, "{name:?}");
    }
}

/// Text of the largest size, and the deepest that is let through, on a worker thread's stack.
#[test]
fn deep_nesting_is_an_answer_and_not_an_overflow() {
    let facts = key(1, "owner", &[]);
    let shell = "permit (principal, action, resource) when {  };";
    let rule = |(open, core, close): (&str, &str, &str), times: usize| {
        let (open, close) = (open.repeat(times), close.repeat(times));
        format!("permit (principal, action, resource) when {{ {open}{core}{close} }};")
    };
    let shapes = [
        ("(", "true", ")"),
        ("!", "true", ""),
        ("-", "1", ""),
        ("[", "1", "]"),
        ("{a:", "1", "}"),
        ("{\"(\":", "1", "}"),
        ("", "true", "&&true"),
        ("", "true", "||true"),
        ("", "1", "+1"),
        ("", "1", "*1"),
        ("", "principal", ".a"),
        ("", "principal", "[\"a\"]"),
        ("", "principal has a", ".a"),
        ("if true then ", "true", " else true"),
        ("if(", "true", ")then true else true"),
        ("", "true", "\nif true then true else true"),
        ("[1].contains(", "1", ")"),
        ("ip(", "1", ")"),
        ("1==", "1", ""),
        ("(true||(true&&", "true", "))"),
        ("\")\"==(", "true", ")"),
        ("(;", "true", ")"),
        ("(//)\n", "true", ")"),
        ("", "principal", " in principal"),
    ];
    let worker = std::thread::Builder::new()
        .stack_size(2 << 20)
        .spawn(move || {
            let authorizer = Authorizer::default_only().unwrap();
            let owner = client("owner", &["user"], &[]);
            for shape in shapes {
                let size = shape.0.len() + shape.2.len();
                let most = (MAX_POLICY_BYTES - shell.len() - shape.1.len()) / size;
                for times in [1, 2, 4, 6, 8, 14, 15, 20, 26, 39, 40, 76, 77, 78, most] {
                    let text = rule(shape, times.min(most));
                    let compiled = KeyPolicies::compile(facts.id, &texts(&[("p", &text)]));
                    match compiled {
                        Ok(own) => {
                            assert!(times < most, "{text}");
                            let _answer =
                                ask(&authorizer, &owner, Action::GetKey, at(&facts, &own));
                        }
                        Err(errors) => assert!(!errors.0.is_empty()),
                    }
                }
            }
        })
        .unwrap();
    worker.join().unwrap();
}

#[test]
fn bounds_on_nesting_hold_exactly_and_ignore_strings_and_comments() {
    let id = Uuid::from_u128(1);
    let fits = |body: &str| {
        let text = format!("permit (principal, action, resource) when {{ {body} }};");
        KeyPolicies::compile(id, &texts(&[("p", &text)])).is_ok()
    };
    let nested = |n: usize| format!("{}true{}", "(".repeat(n), ")".repeat(n));
    // The braces of `when` are one level.
    assert!(fits(&nested(MAX_NESTING - 2)) && fits(&nested(MAX_NESTING - 1)));
    assert!(!fits(&nested(MAX_NESTING)));
    let chain = |n: usize| format!("true{}", " && true".repeat(n));
    // The parenthesis of the scope and the brace of `when` are two.
    assert!(fits(&chain(MAX_OPERATORS - 3)) && fits(&chain(MAX_OPERATORS - 2)));
    assert!(!fits(&chain(MAX_OPERATORS - 1)));
    let ifs = |n: usize| format!("{}true", "if true then true else ".repeat(n));
    assert!(fits(&ifs(MAX_CONDITIONALS - 1)) && fits(&ifs(MAX_CONDITIONALS)));
    assert!(!fits(&ifs(MAX_CONDITIONALS + 1)));
    assert!(fits(&format!("principal.id == \"{}\\\"{}\"", "(".repeat(99), "if ".repeat(99))));
    assert!(fits(&format!("// {}\n true", "([{.".repeat(99))));
    assert!(!fits(&format!("// x\n {}", nested(MAX_NESTING))));
    let files = [file(
        "many",
        &"permit (principal, action, resource) when { principal.id == \"a\" };\n".repeat(100),
    )];
    assert!(Authorizer::new(DEFAULTS, &files).is_ok());
}

proptest::proptest! {
    #[test]
    fn any_text_is_compiled_or_refused(text in "\\PC{0,200}", core in "[a-z.(){}\\[\\]=&|!<>\"?:; 0-9]{0,80}") {
        let id = Uuid::from_u128(1);
        let _outcome = KeyPolicies::compile(id, &texts(&[("p", &text)]));
        let nested = format!("permit (principal, action, resource) when {{ {core} }};");
        let _outcome = KeyPolicies::compile(id, &texts(&[("p", &nested)]));
    }
}
