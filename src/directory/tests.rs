//! Clients and roles over a real vault.

use std::sync::Arc;

use polykey_proto::polykey::record::v1::ClientRecord;

use super::*;
use crate::authn::tests::fixture::{Node, dns};
use crate::error::Reason;

fn state<T: std::fmt::Debug>(result: Result<T, Error>) -> Option<Reason> {
    match result {
        Err(Error::State(reason)) => Some(reason),
        _ => None,
    }
}

fn field<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Invalid(fields)) => fields[0].field.clone(),
        other => panic!("{other:?}"),
    }
}

fn named(id: &str) -> NewClient {
    NewClient {
        id: id.into(),
        identities: vec![dns(&format!("{}.example", id.to_lowercase()))],
        ..NewClient::default()
    }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|&name| name.to_owned()).collect()
}

#[tokio::test]
async fn an_id_is_used_once() {
    let node = Node::new().await;
    node.client("a").await;
    let again = node.directory.create_client(&named("a"), &node.change()).await;
    assert_eq!(state(again), Some(Reason::AlreadyExists));
    node.directory.remove_client("a", &node.change()).await.unwrap();
    let again = node.directory.create_client(&named("a"), &node.change()).await;
    assert_eq!(state(again), Some(Reason::AlreadyExists));
    let tombstone = node.directory.client("a").await.unwrap().unwrap();
    assert_eq!(tombstone.state, ClientState::Removed);
    assert!(tombstone.api_keys.is_empty() && tombstone.identities.is_empty());
    for result in [
        node.directory.enable_client("a", &node.change()).await,
        node.directory.disable_client("a", &node.change()).await,
        node.directory.remove_client("a", &node.change()).await,
        node.directory.update_client("a", &ClientUpdate::default(), &node.change()).await,
    ] {
        assert_eq!(state(result), Some(Reason::ClientState));
    }
    // Its identity is free again, and ids differ by case.
    node.directory.create_client(&named("A"), &node.change()).await.unwrap();
    assert!(node.directory.client("nobody").await.unwrap().is_none());
    let result = node.directory.disable_client("nobody", &node.change()).await;
    assert!(matches!(result, Err(Error::NotFound)));
}

#[tokio::test]
async fn an_identity_belongs_to_one_client() {
    let node = Node::new().await;
    node.client("a").await;
    node.client("b").await;
    let mut c = named("c");
    c.identities.push(dns("a.example"));
    let result = node.directory.create_client(&c, &node.change()).await;
    assert_eq!(state(result), Some(Reason::AlreadyExists));
    assert!(node.directory.client("c").await.unwrap().is_none());
    assert_eq!(node.directory.owner(&dns("c.example")).await.unwrap(), None);
    let take = ClientUpdate { identities_to_add: vec![dns("a.example")], ..Default::default() };
    let result = node.directory.update_client("b", &take, &node.change()).await;
    assert_eq!(state(result), Some(Reason::AlreadyExists));
    let give = ClientUpdate {
        identities_to_add: vec![dns("z.example")],
        identities_to_remove: vec![dns("a.example")],
        ..Default::default()
    };
    node.directory.update_client("a", &give, &node.change()).await.unwrap();
    node.directory.update_client("b", &take, &node.change()).await.unwrap();
    assert_eq!(node.directory.owner(&dns("a.example")).await.unwrap().as_deref(), Some("b"));
    let none = ClientUpdate { identities_to_remove: vec![dns("z.example")], ..Default::default() };
    let result = node.directory.update_client("a", &none, &node.change()).await;
    assert_eq!(field(result), "identities");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_many_wins_an_identity() {
    let node = Arc::new(Node::new().await);
    for round in 0..20 {
        let tasks: Vec<_> = (0..8)
            .map(|i| {
                let node = Arc::clone(&node);
                tokio::spawn(async move {
                    let mut new = named(&format!("c{round}-{i}"));
                    new.identities.push(dns(&format!("shared{round}.example")));
                    node.directory.create_client(&new, &node.change()).await.is_ok()
                })
            })
            .collect();
        let mut won = 0;
        for task in tasks {
            won += usize::from(task.await.unwrap());
        }
        assert_eq!(won, 1);
    }
}

#[tokio::test]
async fn malformed_fields_are_named() {
    let node = Node::new().await;
    let create = async |edit: fn(&mut NewClient)| {
        let mut new = named("ok");
        edit(&mut new);
        field(node.directory.create_client(&new, &node.change()).await)
    };
    assert_eq!(create(|n| n.id = String::new()).await, "client_id");
    assert_eq!(create(|n| n.id = "-a".into()).await, "client_id");
    assert_eq!(create(|n| n.id = "a".repeat(129)).await, "client_id");
    assert_eq!(create(|n| n.id = "a/b".into()).await, "client_id");
    assert_eq!(create(|n| n.id = "ä".into()).await, "client_id");
    assert_eq!(create(|n| n.id = "a\n".into()).await, "client_id");
    assert_eq!(create(|n| n.name = "x".repeat(257)).await, "name");
    assert_eq!(create(|n| n.name = "a\u{7}".into()).await, "name");
    assert_eq!(create(|n| n.description = "x".repeat(1025)).await, "description");
    assert_eq!(create(|n| n.environment = "x".repeat(129)).await, "environment");
    assert_eq!(create(|n| n.tier = 4).await, "tier");
    assert_eq!(create(|n| n.tier = -1).await, "tier");
    assert_eq!(create(|n| n.roles = names(&["nobody"])).await, "roles[0]");
    assert_eq!(create(|n| n.roles = names(&["Admin"])).await, "roles[0]");
    assert_eq!(create(|n| n.permissions = names(&["keys:everything"])).await, "permissions[0]");
    assert_eq!(create(|n| n.permissions = names(&["keys:*"])).await, "permissions[0]");
    assert_eq!(create(|n| n.identities.clear()).await, "identities");
    assert_eq!(
        create(|n| n.identities = (0..21).map(|i| dns(&format!("h{i}.example"))).collect()).await,
        "identities"
    );
    let mut longest = named("a");
    longest.id = "a".repeat(128);
    node.directory.create_client(&longest, &node.change()).await.unwrap();
}

#[tokio::test]
async fn the_last_administrator_stays() {
    let node = Node::new().await;
    node.admin().await;
    node.client("a").await;
    let demote = ClientUpdate { roles_to_remove: names(&["admin"]), ..ClientUpdate::default() };
    let last = Some(Reason::LastAdministrator);
    let change = node.change();
    assert_eq!(state(node.directory.disable_client("admin", &change).await), last);
    assert_eq!(state(node.directory.remove_client("admin", &change).await), last);
    assert_eq!(state(node.directory.update_client("admin", &demote, &change).await), last);
    // By a role of one's own.
    node.directory.put_role("root", &names(&["*"]), "", &change).await.unwrap();
    let promote = ClientUpdate { roles_to_add: names(&["root"]), ..ClientUpdate::default() };
    node.directory.update_client("a", &promote, &change).await.unwrap();
    node.directory.update_client("admin", &demote, &change).await.unwrap();
    let less = node.directory.put_role("root", &names(&["keys:read"]), "", &change).await;
    assert_eq!(state(less), last);
    assert_eq!(state(node.directory.delete_role("root", &change).await), Some(Reason::InUse));
    assert_eq!(state(node.directory.disable_client("a", &change).await), last);
    // By a literal permission.
    let literal = ClientUpdate { permissions_to_add: names(&["*"]), ..ClientUpdate::default() };
    node.directory.update_client("admin", &literal, &change).await.unwrap();
    node.directory.put_role("root", &names(&["keys:read"]), "", &change).await.unwrap();
    node.directory.disable_client("a", &change).await.unwrap();
    assert_eq!(state(node.directory.disable_client("admin", &change).await), last);
}

/// Two administrators who remove each other at once: one of them stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn administrators_cannot_remove_each_other_at_once() {
    let node = Arc::new(Node::new().await);
    node.admin().await;
    for round in 0..20 {
        let mut second = named(&format!("second{round}"));
        second.roles = names(&["admin"]);
        node.directory.create_client(&second, &node.change()).await.unwrap();
        let tasks = ["admin".to_owned(), second.id.clone()].map(|id| {
            let node = Arc::clone(&node);
            tokio::spawn(
                async move { node.directory.disable_client(&id, &node.change()).await.is_ok() },
            )
        });
        let mut done = 0;
        for task in tasks {
            done += usize::from(task.await.unwrap());
        }
        assert_eq!(done, 1);
        node.directory.enable_client("admin", &node.change()).await.unwrap();
        let _ = node.directory.disable_client(&second.id, &node.change()).await;
    }
}

#[tokio::test]
async fn roles_are_defined_used_and_deleted() {
    let node = Node::new().await;
    let change = node.change();
    for bad in ["admin", "operator", "user", "auditor", "", "Root", "1a", "a b", &"a".repeat(65)] {
        let result = node.directory.put_role(bad, &names(&["keys:read"]), "", &change).await;
        assert_eq!(field(result), "name", "{bad}");
        assert_eq!(field(node.directory.delete_role(bad, &change).await), "name", "{bad}");
    }
    let none = node.directory.put_role("r", &[], "", &change).await;
    assert_eq!(field(none), "permissions");
    let unknown = node.directory.put_role("r", &names(&["keys:read", "x"]), "", &change).await;
    assert_eq!(field(unknown), "permissions[1]");
    let absent = Change { expected: Some(0), ..change.clone() };
    let (role, _) =
        node.directory.put_role("r", &names(&["keys:read"]), "d", &absent).await.unwrap();
    let again = node.directory.put_role("r", &names(&["keys:read"]), "d", &absent).await;
    assert!(matches!(again, Err(Error::Conflict)));
    let mut new = named("a");
    new.roles = names(&["r"]);
    node.directory.create_client(&new, &change).await.unwrap();
    let client = node.directory.client("a").await.unwrap().unwrap();
    let set = node.directory.permissions(&client).await.unwrap();
    assert_eq!(set, PermissionSet::parse(["keys:read"]).unwrap());
    node.directory.put_role("r", &names(&["keys:list"]), "d", &change).await.unwrap();
    let set = node.directory.permissions(&client).await.unwrap();
    assert_eq!(set, PermissionSet::parse(["keys:list"]).unwrap());
    let old = Change { expected: Some(role.revision), ..change.clone() };
    assert!(matches!(node.directory.delete_role("r", &old).await, Err(Error::Conflict)));
    assert_eq!(state(node.directory.delete_role("r", &change).await), Some(Reason::InUse));
    let drop = ClientUpdate { roles_to_remove: names(&["r"]), ..ClientUpdate::default() };
    node.directory.update_client("a", &drop, &change).await.unwrap();
    node.directory.delete_role("r", &change).await.unwrap();
    assert!(node.directory.role("r").await.unwrap().is_none());
    let all: Vec<_> = node.directory.roles().await.unwrap().into_iter().map(|r| r.name).collect();
    assert_eq!(all, ["admin", "auditor", "operator", "user"]);
    assert!(matches!(node.directory.delete_role("r", &change).await, Err(Error::NotFound)));
}

/// A role that is deleted while it is given: never both.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_client_keeps_a_role_that_is_gone() {
    let node = Arc::new(Node::new().await);
    for round in 0..30 {
        let role = format!("r{round}");
        node.directory.put_role(&role, &names(&["keys:read"]), "", &node.change()).await.unwrap();
        let giving = {
            let (node, role) = (Arc::clone(&node), role.clone());
            tokio::spawn(async move {
                let mut new = named(&format!("c{round}"));
                new.roles = vec![role];
                node.directory.create_client(&new, &node.change()).await.is_ok()
            })
        };
        let deleted = node.directory.delete_role(&role, &node.change()).await.is_ok();
        let given = giving.await.unwrap();
        assert!(!(given && deleted), "round {round}");
        assert_eq!(node.directory.role(&role).await.unwrap().is_some(), !deleted);
    }
}

#[tokio::test]
async fn changes_are_optimistic_and_audited() {
    let node = Node::new().await;
    node.client("a").await;
    let seen = node.directory.client("a").await.unwrap().unwrap().revision;
    let rename = |name: &str| ClientUpdate { name: Some(name.into()), ..Default::default() };
    let at = |revision| Change { expected: Some(revision), ..node.change() };
    let leaves = node.vault.head().leaves;
    let changed = node.directory.update_client("a", &rename("x"), &at(seen)).await.unwrap();
    assert_eq!(changed.receipt.leaf, Some(leaves));
    assert_eq!(changed.client.name, "x");
    assert_eq!(
        changed.client.revision,
        node.directory.client("a").await.unwrap().unwrap().revision
    );
    let stale = node.directory.update_client("a", &rename("y"), &at(seen)).await;
    assert!(matches!(stale, Err(Error::Conflict)));
    assert_eq!(node.vault.head().leaves, leaves + 1);
    assert_eq!(node.directory.client("a").await.unwrap().unwrap().name, "x");
}

#[tokio::test]
async fn lists_are_in_order_of_ids_and_paged() {
    let node = Node::new().await;
    for i in (0..25).rev() {
        node.client(&format!("c{i:02}")).await;
    }
    node.directory.remove_client("c03", &node.change()).await.unwrap();
    node.directory.disable_client("c04", &node.change()).await.unwrap();
    let mut after = None;
    let mut seen = Vec::new();
    loop {
        let filter = ClientFilter::default();
        let page = node.directory.clients(&filter, after.as_deref(), 7).await.unwrap();
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 7);
        after = Some(last.id.clone());
        seen.extend(page.into_iter().map(|c| c.id));
    }
    let expected: Vec<_> = (0..25).filter(|i| *i != 3).map(|i| format!("c{i:02}")).collect();
    assert_eq!(seen, expected);
    let only = async |filter: ClientFilter| {
        let page = node.directory.clients(&filter, None, 100).await.unwrap();
        page.into_iter().map(|c| c.id).collect::<Vec<_>>()
    };
    let in_state = |state| ClientFilter { state: Some(state), role: None };
    assert_eq!(only(in_state(ClientState::Removed)).await, ["c03"]);
    assert_eq!(only(in_state(ClientState::Disabled)).await, ["c04"]);
    assert_eq!(only(ClientFilter { role: Some("admin".into()), state: None }).await.len(), 0);
    assert_eq!(only(ClientFilter { role: Some("user".into()), state: None }).await.len(), 24);
}

#[tokio::test]
async fn no_api_key_stands_in_a_record() {
    let node = Node::new().await;
    let key = node.client("a").await;
    let row = node.directory.client_row("a");
    let record = node.vault.get::<ClientRecord>(&row).await.unwrap().unwrap().record;
    assert_eq!(record.api_keys[0].mac.len(), 32);
    assert_eq!(record.api_keys[0].prefix, key[..11]);
    assert!(!format!("{record:?}").contains(&key[12..]));
    let client = node.directory.client("a").await.unwrap().unwrap();
    assert!(!format!("{client:?}").contains("mac"));
}

#[tokio::test]
async fn the_expiry_of_an_api_key_is_told_once_and_a_new_one_has_its_own() {
    use polykey_proto::polykey::record::v1::{AuditBody, AuditLeaf, JobRecord};
    use polykey_storage::{Direction, all};
    use prost::Message as _;

    let node = Node::new().await;
    let day = std::time::Duration::from_secs(86_400);
    let later = |days: u32| node.now().plus(day * days);
    let new = NewClient { api_key_expires_at: Some(later(8)), ..named("a") };
    let (made, _) = node.directory.create_client(&new, &node.change()).await.unwrap();
    let first = made.client.api_keys[0].prefix.clone();
    let run = async || {
        let jobs = node.vault.scan::<JobRecord>(all(), Direction::Forward, 99).await.unwrap();
        for (row, job) in jobs {
            if job.record.due <= node.now().micros() {
                node.directory.notify_expiry(&job.record, &row, node.now()).await.unwrap();
            }
        }
    };
    node.clock.advance(day);
    run().await;
    // The old key ends in two days instead, the new one never.
    let rotated = node.directory.rotate_api_key("a", day * 2, None, &node.change()).await.unwrap();
    for _ in 0..10 {
        node.clock.advance(day);
        run().await;
    }
    let leaves = node.vault.scan::<AuditLeaf>(all(), Direction::Forward, 99).await.unwrap();
    let events = leaves
        .iter()
        .flat_map(|(_, leaf)| AuditBody::decode(leaf.record.body.as_ref()).unwrap().events);
    let told: Vec<_> = events
        .filter(|event| event.action.contains("Expir"))
        .map(|event| {
            assert_eq!(event.details["client"], "a");
            (event.details["api_key"].clone(), event.details.get("days").cloned())
        })
        .collect();
    let days = |days: &str| (first.clone(), Some(days.to_owned()));
    assert_eq!(told, [days("7"), days("1"), (first.clone(), None)]);
    assert_ne!(rotated.api_key.prefix(), first);
    let left = node.vault.scan::<JobRecord>(all(), Direction::Forward, 99).await.unwrap();
    assert!(left.is_empty(), "{left:?}");
}
