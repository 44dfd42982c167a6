//! Stores that ship themselves, to targets that fail.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::executor::block_on;
use polykey_storage::{
    Commit, CommitError, NoFinish, OpenError, Space, Store, StoreError,
    conformance::{self, Model, Rng},
    replica,
    replicated::{
        Fenced, Link, Mode, NotReady, Notice, Opened, Opener, Options, Replicated, WhenAway, fenced,
    },
};

use crate::{
    flaky::Flaky,
    growth::{equal, grow},
    memory,
};

const PATIENCE: Duration = Duration::from_secs(30);

fn options(mode: Mode, timeout: Duration) -> Options {
    let probe = Duration::from_millis(10);
    Options { target: "the target".into(), mode, timeout, probe, goes_on: None }
}

fn to(target: &Arc<dyn Store>) -> Opener {
    let target = Arc::clone(target);
    Box::new(move |epoch| Ok(Opened { store: Arc::clone(&target), epoch: epoch.unwrap_or(1) }))
}

fn change(number: u64) -> Vec<Commit> {
    vec![Commit::new().put(Space(1), number.to_be_bytes(), vec![7])]
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn what_is_acknowledged_is_on_a_target_that_fails_again_and_again() {
    let source = memory(100);
    let flaky = Arc::new(Flaky::new(memory(10), conformance::seed()));
    let target = Arc::clone(&flaky) as Arc<dyn Store>;
    let mode = Mode::Sync(WhenAway::Refuse);
    let store =
        Replicated::start(Arc::clone(&source), options(mode, PATIENCE), to(&target)).unwrap();
    // The first contact may be one of the failures.
    until("ready", || store.ready().is_ok());
    let mut rng = Rng::new(conformance::seed());
    for _ in 0..60 {
        let committed = block_on(store.commit(change(rng.number()), &mut NoFinish)).unwrap();
        let mark = block_on(replica::watermark(target.as_ref())).unwrap().unwrap();
        assert!(mark.whole && mark.revision >= committed.revision);
    }
    let seen = flaky.seen();
    assert!(seen.done > 0 && seen.undone > 0, "{seen:?}");
    block_on(equal(source.as_ref(), target.as_ref()));
}

#[test]
fn asynchronous_shipping_follows_a_source_that_forgets() {
    let source = memory(3);
    let flaky = Arc::new(Flaky::new(memory(10), conformance::seed()));
    let target = Arc::clone(&flaky) as Arc<dyn Store>;
    let mut rng = Rng::new(conformance::seed());
    let mut model = Model::default();
    grow(&mut rng, source.as_ref(), &mut model, 50);
    let options = options(Mode::Async, PATIENCE);
    let store = Replicated::start(Arc::clone(&source), options, to(&target)).unwrap();
    for number in 0..200 {
        block_on(store.commit(change(number), &mut NoFinish)).unwrap();
    }
    until("everything is there", || store.shipping().lag() == 0);
    assert_eq!(store.shipping().behind, Duration::ZERO);
    block_on(equal(source.as_ref(), target.as_ref()));
}

// A target that is there while the number is 0.
fn at_times(target: &Arc<dyn Store>, gone: &Arc<AtomicU64>) -> Opener {
    let (target, gone) = (Arc::clone(target), Arc::clone(gone));
    Box::new(move |epoch| match gone.load(Ordering::SeqCst) {
        0 => Ok(Opened { store: Arc::clone(&target), epoch: epoch.unwrap_or(1) }),
        _ => Err(OpenError::Store {
            path: "t".into(),
            error: StoreError::Unreachable("gone".into()),
        }),
    })
}

#[test]
fn without_a_target_each_policy_does_what_it_says() {
    let (target, gone) = (memory(10), Arc::new(AtomicU64::new(1)));
    let short = Duration::from_millis(50);
    let mode = Mode::Sync(WhenAway::Refuse);
    let source = memory(100);
    let before = source.status().revision;
    let store =
        Replicated::start(Arc::clone(&source), options(mode, short), at_times(&target, &gone));
    let store = store.unwrap();
    assert!(matches!(store.ready(), Err(NotReady::Away(_))));
    let refused = block_on(store.commit(change(1), &mut NoFinish)).unwrap_err();
    assert!(matches!(refused, CommitError::Store(StoreError::Unreachable(_))), "{refused}");
    assert_eq!(source.status().revision, before, "nothing was applied");
    assert!(block_on(store.reopen()).is_err());
    gone.store(0, Ordering::SeqCst);
    until("it confirms", || store.shipping().synced);
    block_on(store.commit(change(1), &mut NoFinish)).unwrap();
    drop(store);

    let (target, gone) = (memory(10), Arc::new(AtomicU64::new(1)));
    let mode = Mode::Sync(WhenAway::Degrade);
    let store =
        Replicated::start(memory(100), options(mode, short), at_times(&target, &gone)).unwrap();
    store.ready().unwrap();
    block_on(store.commit(change(1), &mut NoFinish)).unwrap();
    assert!(!store.shipping().synced);
    gone.store(0, Ordering::SeqCst);
    until("it waits again", || store.shipping().synced);
    let notices = store.notices();
    assert!(
        matches!(notices.as_slice(), [Notice::Degraded { .. }, Notice::Restored { .. }]),
        "{notices:?}"
    );
}

#[test]
fn a_promotion_fences_its_source_for_good() {
    let (source, target) = (memory(100), memory(10));
    let options = options(Mode::Async, PATIENCE);
    let store = Replicated::start(Arc::clone(&source), options.clone(), to(&target)).unwrap();
    block_on(store.commit(change(1), &mut NoFinish)).unwrap();
    until("it is there", || store.shipping().lag() == 0);
    let promoted = block_on(replica::promote(&target, 1)).unwrap();
    assert_eq!(promoted.revision, source.status().revision);
    assert_eq!(block_on(replica::promote(&target, 5)).unwrap(), promoted, "once");
    // Both sides go on: what the old one wrote before it knew stays with it.
    let shipped = block_on(store.commit(change(2), &mut NoFinish));
    until("it knows", || matches!(store.shipping().link, Link::Fenced(_)));
    let refused = block_on(store.commit(change(3), &mut NoFinish)).unwrap_err();
    assert!(matches!(refused, CommitError::Store(StoreError::Fenced { .. })), "{refused}");
    let Some(Fenced { own, shipped: there, .. }) = fenced(source.as_ref()).unwrap() else {
        panic!("it is written down");
    };
    assert_eq!((own, there), (1, promoted.revision));
    assert!(shipped.is_ok());
    assert!(block_on(target.get(Space(1), &2_u64.to_be_bytes())).unwrap().is_none());
    drop(store);
    let again = Replicated::start(source, options, to(&target)).unwrap();
    assert!(matches!(again.ready(), Err(NotReady::Fenced(_))));
}

#[test]
fn another_store_and_a_store_that_went_back_are_refused() {
    let (source, target) = (memory(100), memory(10));
    let first = Replicated::start(source, options(Mode::Async, PATIENCE), to(&target)).unwrap();
    until("it is there", || matches!(first.shipping().link, Link::Following));
    drop(first);
    let other =
        Replicated::start(memory(100), options(Mode::Async, PATIENCE), to(&target)).unwrap();
    let Err(NotReady::Refused(why)) = other.ready() else { panic!("it is refused") };
    assert!(why.contains("another store"), "{why}");
}
