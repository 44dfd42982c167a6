//! Infrastructure that fails: no wrong result, at most three tries, inside the deadline.

use std::time::{Duration, Instant};

use polykey_hsm::aws::AwsWrapper;
use polykey_hsm::{Deadline, KeyWrapper, WrapError, WrappedKey};

use super::fake::{Fake, Fault};
use super::support::{CONTEXT, alone, bytes, material, open, settings, soon};

const SECRET: &[u8] = b"what is wrapped";
const AWAY: WrapError = WrapError::Unavailable { retryable: true };

/// Faults after which the SDK asks again.
const RETRIED: &[Fault] = &[
    Fault::Error(400, "ThrottlingException", "Rate exceeded"),
    Fault::Error(400, "LimitExceededException", ""),
    Fault::Error(429, "TooManyRequestsException", ""),
    Fault::Error(500, "KMSInternalException", ""),
    Fault::Error(500, "KeyUnavailableException", ""),
    Fault::Error(503, "DependencyTimeoutException", ""),
    Fault::Garbage(500, "<html>Internal Server Error</html>"),
    Fault::Garbage(502, ""),
    Fault::Garbage(503, "{"),
    Fault::Reset,
    Fault::ResetMidBody,
    Fault::CutShort,
];

async fn wrap(wrapper: &AwsWrapper, deadline: Deadline) -> Result<WrappedKey, WrapError> {
    wrapper.wrap_key(&material(SECRET), &CONTEXT, deadline).await
}

async fn unwrap(
    wrapper: &AwsWrapper,
    wrapped: &WrappedKey,
    deadline: Deadline,
) -> Result<Vec<u8>, WrapError> {
    wrapper.unwrap_key(wrapped, &CONTEXT, deadline).await.map(bytes)
}

#[test]
fn a_fault_that_stays_is_unavailable_after_three_tries() {
    alone("faults::a_fault_that_stays_is_unavailable_after_three_tries", &[], async || {
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let wrapped = wrap(&wrapper, soon()).await.unwrap();
        for fault in RETRIED {
            fake.always(*fault);
            let before = fake.calls();
            assert_eq!(wrap(&wrapper, soon()).await, Err(AWAY), "{fault:?}");
            assert_eq!(fake.calls() - before, 3, "{fault:?}");
            let before = fake.calls();
            assert_eq!(unwrap(&wrapper, &wrapped, soon()).await, Err(AWAY), "{fault:?}");
            assert_eq!(fake.calls() - before, 3, "{fault:?}");
            fake.always(None);
            assert_eq!(unwrap(&wrapper, &wrapped, soon()).await.unwrap(), SECRET, "{fault:?}");
        }
        // A proxy that answers 200 with a page of its own.
        for body in ["", "{", "[]", "<html>Log in</html>", "{\"KeyId\": 7}"] {
            let before = fake.calls();
            fake.always(Fault::Garbage(200, body));
            let opened = unwrap(&wrapper, &wrapped, soon()).await;
            assert!(
                matches!(opened, Err(WrapError::Unavailable { .. } | WrapError::Refused(_))),
                "{body}: {opened:?}"
            );
            assert!(fake.calls() - before <= 3, "{body}");
        }
    });
}

#[test]
fn a_fault_that_passes_is_not_seen() {
    alone("faults::a_fault_that_passes_is_not_seen", &[], async || {
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        for first in RETRIED {
            for second in [None, Some(Fault::Error(500, "KMSInternalException", ""))] {
                let faults: Vec<_> = [Some(*first), second].into_iter().flatten().collect();
                fake.then(&faults);
                let before = fake.calls();
                let wrapped = wrap(&wrapper, soon()).await.unwrap();
                assert_eq!(fake.calls() - before, faults.len() + 1, "{faults:?}");
                fake.then(&faults);
                let before = fake.calls();
                assert_eq!(unwrap(&wrapper, &wrapped, soon()).await.unwrap(), SECRET);
                assert_eq!(fake.calls() - before, faults.len() + 1, "{faults:?}");
            }
        }
    });
}

#[test]
fn a_silent_service_costs_its_tries_and_never_more_than_the_deadline() {
    let test = "faults::a_silent_service_costs_its_tries_and_never_more_than_the_deadline";
    alone(test, &[], async || {
        let fake = Fake::start().await;
        let mut settings = settings(&fake.url, &fake.key);
        settings.connection.attempt_timeout = Duration::from_millis(300);
        let wrapper = AwsWrapper::open(&settings, soon()).await.unwrap();
        let wrapped = wrap(&wrapper, soon()).await.unwrap();
        fake.always(Fault::Silent);
        let before = fake.calls();
        assert_eq!(unwrap(&wrapper, &wrapped, soon()).await, Err(AWAY));
        assert_eq!(fake.calls() - before, 3);

        for millis in [50, 400] {
            let before = fake.calls();
            let started = Instant::now();
            let deadline = Deadline::after(Duration::from_millis(millis));
            let opened = unwrap(&wrapper, &wrapped, deadline).await;
            assert_eq!(opened, Err(WrapError::DeadlineExceeded));
            let took = started.elapsed();
            assert!(took < Duration::from_millis(5 * millis + 250), "{millis} ms took {took:?}");
            assert!(fake.calls() - before <= 2, "{millis}");
        }
        fake.always(None);
        assert_eq!(unwrap(&wrapper, &wrapped, soon()).await.unwrap(), SECRET);
    });
}

#[test]
fn a_storm_of_faults_gives_no_wrong_result() {
    alone("faults::a_storm_of_faults_gives_no_wrong_result", &[], async || {
        let mut kinds: Vec<Option<Fault>> = RETRIED.iter().copied().map(Some).collect();
        kinds.extend(
            [
                Fault::WrongKeyId,
                Fault::NoKeyId,
                Fault::WrongBytes,
                Fault::FewBytes,
                Fault::NoBytes,
                Fault::Garbage(200, "{}"),
                Fault::Error(400, "DisabledException", ""),
                Fault::Error(400, "ExpiredTokenException", ""),
            ]
            .map(Some),
        );
        // As many calls go well as do not.
        kinds.resize(2 * kinds.len(), None);
        let seed: u64 = std::env::var("POLYKEY_SEED").map_or(4, |seed| seed.parse().unwrap());
        println!("POLYKEY_SEED={seed}");
        let mut state = seed;
        let mut draw = |bound: usize| {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            usize::try_from((z ^ (z >> 31)) % u64::try_from(bound).unwrap()).unwrap()
        };
        let fake = Fake::start().await;
        let wrapper = open(&fake.url, &fake.key).await;
        let (mut opened, mut failed) = (0, 0);
        for round in 0..120_u8 {
            let secret = [round; 32];
            let faults: Vec<_> = (0..3).filter_map(|_| kinds[draw(kinds.len())]).collect();
            fake.then(&faults);
            let before = fake.calls();
            let wrapped = wrapper.wrap_key(&material(&secret), &CONTEXT, soon()).await;
            assert!(fake.calls() - before <= 3, "{round}");
            let Ok(wrapped) = wrapped else {
                failed += 1;
                continue;
            };
            let before = fake.calls();
            let back = wrapper.unwrap_key(&wrapped, &CONTEXT, soon()).await;
            assert!(fake.calls() - before <= 3, "{round}");
            match back {
                Ok(key) => {
                    assert_eq!(bytes(key), secret, "another key came back");
                    opened += 1;
                }
                Err(_) => failed += 1,
            }
        }
        println!("{opened} opened, {failed} failed");
        assert!(opened > 10 && failed > 10, "{opened} opened, {failed} failed");
    });
}
