//! A remembered decision equals a fresh one, whatever the policies read.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;

/// Conditions of every kind: covered by revisions, volatile, disguised, failing.
const CONDITIONS: &[&str] = &[
    "true",
    "principal.tier == \"pro\"",
    "principal in Role::\"user\"",
    "principal.permissions.contains(context.permission)",
    "resource.exportable",
    "resource.creator == principal",
    "resource.hasTag(\"env\") && resource.getTag(\"env\") == \"prod\"",
    "resource.data_classification == \"secret\"",
    "resource.aliases.contains(\"x\")",
    "context.hour < 12",
    "context.weekday == 1",
    "context.now > datetime(\"2026-01-01\")",
    "context has source",
    "context has source && context.source.isLoopback()",
    "context.certificate == \"c1\"",
    "{permission: context.hour}.permission < 12",
    "[context.hour].contains(3)",
    "context.hour * 4000000000000000000 > 0",
    "(if resource.exportable then 1 else 2) * 9000000000000000000 > 0",
];

/// Only a forbid may read these.
const CLAIMS: &[&str] = &[
    "context.claimed.network_zone == \"dmz\"",
    "(if context.hour < 12 then context else context).certificate == \"c1\"",
    "context.claimed.custom.hasTag(\"k\")",
    "[context.claimed.environment].contains(\"lab\")",
];

fn policy() -> impl Strategy<Value = String> {
    let scope = select(vec![
        "action",
        "action == Action::\"GetKey\"",
        "action in Action::\"read\"",
        "action in [Action::\"manage\", Action::\"keys:describe\"]",
        "action == Action::\"ExportKey\"",
    ]);
    let permit = vec(select(CONDITIONS.to_vec()), 0..3);
    let forbid = vec(select([CONDITIONS, CLAIMS].concat()), 1..3);
    (any::<bool>(), scope, permit, forbid, select(vec!["&&", "||"]), any::<bool>()).prop_map(
        |(permits, scope, permit, forbid, join, not)| {
            let (effect, parts) = if permits { ("permit", permit) } else { ("forbid", forbid) };
            let clause = if not { "unless" } else { "when" };
            let body: Vec<String> = parts.iter().map(|c| format!("({c})")).collect();
            let condition = if body.is_empty() { "true".to_owned() } else { body.join(join) };
            format!("{effect} (principal, {scope}, resource is Key) {clause} {{ {condition} }};")
        },
    )
}

fn context() -> impl Strategy<Value = ContextFacts> {
    (0i64..200, select(vec![None, Some("127.0.0.1"), Some("10.0.0.1")]), 0u8..3, 0u8..3).prop_map(
        |(hour, source, certificate, claim)| {
            let mut context = call();
            context.now = jiff::Timestamp::from_second(1_767_225_600 + hour * 3600).unwrap();
            context.source = source.map(|a| a.parse().unwrap());
            context.certificate = format!("c{certificate}");
            if claim == 1 {
                context.claimed.network_zone = "dmz".to_owned();
                context.claimed.environment = "lab".to_owned();
            }
            if claim == 2 {
                context.claimed.custom.insert("k".to_owned(), "v".to_owned());
            }
            context
        },
    )
}

/// One of a few principals; the revision names the record, permissions may change without it.
fn principal() -> impl Strategy<Value = Arc<PrincipalFacts>> {
    (0u64..3, select(vec!["user", "auditor", "admin"])).prop_map(|(revision, role)| {
        let mut facts = (*client("svc", &["user"], &[])).clone();
        facts.revision = revision;
        facts.tier = if revision == 1 { "pro" } else { "free" }.to_owned();
        facts.permissions = built_in(role).unwrap().permissions;
        Arc::new(facts)
    })
}

/// One of a few revisions of one key; aliases change without a new one.
fn stored() -> impl Strategy<Value = KeyFacts> {
    (0u64..6, any::<bool>()).prop_map(|(revision, alias)| {
        let owner = if revision % 2 == 0 { "svc" } else { "owner" };
        let mut facts = key(1, owner, &["svc"]);
        facts.revision = revision;
        facts.exportable = revision % 3 == 0;
        facts.data_classification = if revision == 2 { "secret" } else { "" }.to_owned();
        if revision == 4 {
            facts.tags.clear();
        }
        facts.aliases = if alias { vec!["x".to_owned()] } else { Vec::new() };
        facts
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn memory_never_changes_an_answer(
        node in vec(policy(), 0..3),
        own in vec(policy(), 0..3),
        calls in vec((principal(), stored(), context(), select(Action::ALL.to_vec())), 1..60),
    ) {
        let files = [file("f", &node.join("\n"))];
        let own: BTreeMap<String, String> =
            own.into_iter().enumerate().map(|(n, text)| (format!("p{n}"), text)).collect();
        let own = KeyPolicies::compile(Uuid::from_u128(1), &own);
        // Refused at write time, for instance a permit of nothing grantable.
        prop_assume!(own.is_ok());
        let own = own.unwrap();
        let fresh = Authorizer::new(DEFAULTS, &files).unwrap().with_memo(0);
        let small = Authorizer::new(DEFAULTS, &files).unwrap().with_memo(16);
        let large = Authorizer::new(DEFAULTS, &files).unwrap();
        for (principal, facts, context, action) in &calls {
            let resource = match action.target() {
                Target::Key => Resource::Key { facts, policies: &own },
                _ => Resource::Node,
            };
            let request = Request { principal, action: *action, resource, context };
            let expected = fresh.decide(&request);
            prop_assert_eq!(&large.decide(&request), &expected);
            prop_assert_eq!(&small.decide(&request), &expected);
        }
        prop_assert_eq!(fresh.memo.len(), 0);
        prop_assert!(small.memo.len() <= 16);
    }
}

#[test]
fn what_is_cacheable_is_remembered_and_new_revisions_are_not_mistaken_for_old() {
    let authorizer = Authorizer::default_only().unwrap();
    let mut facts = key(1, "owner", &["friend"]);
    let friend = client("friend", &["user"], &[]);
    let none = KeyPolicies::none(facts.id);
    let get = |facts: &KeyFacts| {
        let resource = Resource::Key { facts, policies: &none };
        ask(&authorizer, &friend, Action::GetKey, resource)
    };
    let first = get(&facts);
    assert!(first.allowed && first.cacheable);
    assert_eq!(authorizer.memo.len(), 1);
    assert_eq!(get(&facts), first);
    assert_eq!(authorizer.memo.len(), 1);
    facts.revision += 1;
    facts.authorized_contexts.clear();
    assert!(!get(&facts).allowed);
    assert_eq!(authorizer.memo.len(), 2);
    // Shows that the memory is really asked: the same revision with other contents is answered from it.
    facts.authorized_contexts.push("friend".to_owned());
    assert!(!get(&facts).allowed);
}
