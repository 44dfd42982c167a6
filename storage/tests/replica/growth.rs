//! What sources of replicas go through, and the comparison.

use futures::executor::block_on;
use polykey_storage::{
    Applied, Direction, Space, Store, all,
    conformance::{self, Model, Rng},
    replica::SPACE,
};

/// Commits random groups.
pub(crate) fn grow(rng: &mut Rng, store: &dyn Store, model: &mut Model, groups: usize) {
    for _ in 0..groups {
        let group = conformance::group(rng, model);
        let appended = conformance::appended(rng);
        model.commit(&group, &appended);
        let mut finish = |_: &Applied<'_>| Ok(appended.clone());
        block_on(store.commit(group, &mut finish)).unwrap();
    }
}

/// Compares all rows but those of replication.
pub(crate) async fn equal(source: &dyn Store, target: &dyn Store) {
    for space in (0..=u8::MAX).map(Space).filter(|space| *space != SPACE) {
        let rows = async |store: &dyn Store| {
            let rows = store.scan(space, all(), Direction::Forward, usize::MAX).await.unwrap();
            rows.into_iter().map(|row| (row.key, row.value)).collect::<Vec<_>>()
        };
        assert_eq!(rows(source).await, rows(target).await, "{space:?}");
    }
}
