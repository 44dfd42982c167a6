//! When it opens, when it closes, what it notes.

use super::*;
use crate::custody::device::{Device, Mode};

const PLACE: WrapContext = WrapContext { node_id: [1; 16], purpose: "test", slot_id: [2; 16] };

/// Looks so seldom that no test sees one, unless it says otherwise.
const SELDOM: Terms = Terms {
    failures: 3,
    look: Duration::from_secs(3600),
    patience: Duration::from_secs(3600),
    again: Duration::from_secs(3600),
};
const OFTEN: Terms =
    Terms { look: Duration::from_millis(10), again: Duration::from_millis(10), ..SELDOM };

fn of(device: &Arc<Device>, terms: Terms) -> Arc<Breaker> {
    Breaker::new("dev", Arc::clone(device) as _, terms, [1; 16], Handle::current())
}

async fn ask_within(breaker: &Breaker, time: Duration) -> Result<(), WrapError> {
    let key = KeyMaterial::from_secret(vec![7; 32]).unwrap();
    breaker.wrap_key(&key, &PLACE, Deadline::after(time)).await.map(drop)
}

async fn ask(breaker: &Breaker) -> Result<(), WrapError> {
    ask_within(breaker, Duration::from_secs(60)).await
}

/// Waits for the breaker to close by itself.
async fn closed(breaker: &Breaker) {
    let wait = async {
        while breaker.is_open() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
}

#[tokio::test]
async fn it_opens_after_failures_in_a_row_and_then_asks_nobody() {
    let device = Device::new();
    let breaker = of(&device, SELDOM);
    device.away();
    for _ in 0..2 {
        ask(&breaker).await.unwrap_err();
    }
    // An answer in between begins the count again.
    device.set(Mode::Up);
    ask(&breaker).await.unwrap();
    device.away();
    for _ in 0..3 {
        assert!(!breaker.is_open());
        ask(&breaker).await.unwrap_err();
    }
    assert!(breaker.is_open());
    let asked = device.asked();
    for _ in 0..5 {
        let refused = ask(&breaker).await.unwrap_err();
        assert_eq!(refused, WrapError::Unavailable { retryable: true });
    }
    assert_eq!(device.asked(), asked, "nobody is asked");
}

#[tokio::test]
async fn answers_that_are_refusals_never_open_it() {
    let device = Device::new();
    let breaker = of(&device, SELDOM);
    for answer in [
        WrapError::NotMine,
        WrapError::Broken,
        WrapError::Refused("disabled".into()),
        WrapError::Config("none".into()),
    ] {
        device.set(Mode::Fails(answer.clone()));
        for _ in 0..10 {
            assert_eq!(ask(&breaker).await.unwrap_err(), answer);
        }
        assert!(!breaker.is_open(), "{answer:?}");
    }
}

#[tokio::test]
async fn a_refusal_is_noted_until_the_backend_takes_it_back() {
    let device = Device::new();
    let seldom = of(&device, SELDOM);
    for (answer, refuses) in [
        (Mode::Fails(WrapError::Refused("disabled".into())), true),
        // These say nothing of it.
        (Mode::Fails(WrapError::Broken), true),
        (Mode::Fails(WrapError::NotMine), true),
        (Mode::Up, false),
        (Mode::Fails(WrapError::Broken), false),
        (Mode::Fails(WrapError::Config("no such key".into())), true),
    ] {
        device.set(answer.clone());
        let _ = ask(&seldom).await;
        assert_eq!(seldom.refuses(), refuses, "{answer:?}");
    }
    // Nobody uses it, and it finds out by itself.
    let often = of(&device, OFTEN);
    device.set(Mode::Fails(WrapError::Refused("denied".into())));
    often.look().await;
    assert!(often.refuses() && !often.is_open());
    device.asked_for(device.asked() + 2).await;
    assert!(often.refuses());
    device.set(Mode::Up);
    let wait = async {
        while often.refuses() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap();
    // One that goes away while it refuses is away.
    device.set(Mode::Fails(WrapError::Refused("denied".into())));
    ask(&often).await.unwrap_err();
    device.away();
    tokio::time::timeout(Duration::from_secs(30), async {
        while !often.is_open() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(!often.refuses());
}

#[tokio::test]
async fn it_closes_by_itself_when_the_backend_is_back() {
    for (gone, back) in [
        (WrapError::Unavailable { retryable: false }, Mode::Up),
        // A refusal is an answer.
        (WrapError::DeadlineExceeded, Mode::Fails(WrapError::Refused("disabled".into()))),
    ] {
        let device = Device::new();
        let breaker = of(&device, OFTEN);
        device.set(Mode::Fails(gone));
        for _ in 0..3 {
            ask(&breaker).await.unwrap_err();
        }
        assert!(breaker.is_open());
        let asked = device.asked();
        device.asked_for(asked + 2).await;
        assert!(breaker.is_open(), "it has looked in vain");
        device.set(back);
        closed(&breaker).await;
    }
}

#[tokio::test]
async fn a_backend_that_hangs_is_away_and_a_look_that_hangs_hides_nothing() {
    let device = Device::new();
    let breaker = of(&device, OFTEN);
    device.set(Mode::Hangs);
    for _ in 0..3 {
        let late = ask_within(&breaker, Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(late, WrapError::DeadlineExceeded);
    }
    assert!(breaker.is_open());
    // Each look hangs for an hour, and others follow all the same.
    device.asked_for(device.asked() + 3).await;
    device.set(Mode::Up);
    closed(&breaker).await;
    ask(&breaker).await.unwrap();
}

#[tokio::test]
async fn what_began_before_it_opened_does_not_open_it_again() {
    let device = Device::new();
    let breaker = of(&device, OFTEN);
    device.set(Mode::Hangs);
    let late: Vec<_> = (0..4)
        .map(|_| {
            let breaker = Arc::clone(&breaker);
            tokio::spawn(async move { ask_within(&breaker, Duration::from_millis(300)).await })
        })
        .collect();
    device.asked_for(4).await;
    for _ in 0..3 {
        ask_within(&breaker, Duration::from_millis(1)).await.unwrap_err();
    }
    assert!(breaker.is_open());
    // The looks are answered, and the calls of before fail after that.
    breaker.answered(&Ok(()));
    for call in late {
        assert_eq!(call.await.unwrap(), Err(WrapError::DeadlineExceeded));
    }
    assert!(!breaker.is_open());
}

#[tokio::test]
async fn one_look_at_the_start_tells() {
    let device = Device::new();
    let breaker = of(&device, SELDOM);
    breaker.look().await;
    assert!(!breaker.is_open());
    device.away();
    breaker.look().await;
    assert!(breaker.is_open());
}
