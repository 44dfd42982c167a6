//! Acknowledged operations and the records of them in the audit log, one for one.

use std::collections::HashMap;

use polykey_proto::polykey::v2 as pb;

use super::Worker;
use crate::support::Wire;

/// Every event of the log, by the id of its request.
async fn events(wire: &Wire) -> HashMap<String, Vec<pb::AuditEvent>> {
    let mut all: HashMap<String, Vec<pb::AuditEvent>> = HashMap::new();
    let mut page_token = String::new();
    loop {
        let body = pb::ListAuditEventsRequest {
            page_size: 1000,
            from_index: Some(0),
            page_token,
            ..Default::default()
        };
        let page = wire.admin().list_audit_events(wire.with(body)).await.unwrap().into_inner();
        for event in page.events {
            all.entry(event.request_id.clone()).or_default().push(event);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return all;
        }
    }
}

/// Each acknowledged operation stands in the log once, at the leaf that its answer named, and no change does that was
/// not acknowledged in the end. How many operations, and how many records.
pub(super) async fn recorded_once(wire: &Wire, workers: &[Worker]) -> (usize, usize) {
    let mut log = events(wire).await;
    let (mut operations, mut records) = (0, 0);
    for worker in workers {
        for (pending, made) in &worker.acknowledged {
            let (action, outcome) = pending.op.recorded();
            let found = log.remove(&pending.name).unwrap_or_default();
            let (mut there, other): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|e| e.action == action && e.outcome() == outcome);
            assert!(other.is_empty(), "{pending:?}: also {other:?}");
            for (id, _, leaf) in made {
                let at = there.iter().position(|event| event.key_id == *id);
                let at = at.unwrap_or_else(|| panic!("{pending:?}: {id} is not in {there:?}"));
                let event = there.swap_remove(at);
                assert!(*leaf == 0 || *leaf == event.index, "{pending:?}: {leaf} is {event:?}");
                assert!(event.count <= 1, "{pending:?}: {event:?}");
            }
            assert!(there.is_empty(), "{pending:?}: recorded twice: {there:?}");
            (operations, records) = (operations + 1, records + made.len());
        }
    }
    // What nobody was told of changed nothing.
    let ours = |id: &str| id.starts_with('w') && id.contains('-');
    for (id, events) in log.iter().filter(|(id, _)| ours(id)) {
        let known = |e: &pb::AuditEvent| matches!(&*e.action, "GenerateDataKey" | "Authenticate");
        let changed = |e: &&pb::AuditEvent| e.outcome() == pb::AuditOutcome::Success && !known(e);
        let changed: Vec<_> = events.iter().filter(changed).collect();
        assert!(changed.is_empty(), "{id} was never acknowledged: {changed:?}");
    }
    (operations, records)
}
