//! The schedule: order, back-off, the clock guard.

use std::sync::atomic::{AtomicUsize, Ordering};

use polykey_hsm::Ring;
use polykey_storage::memory::Memory;

use super::*;
use crate::time::Clock;

const HOUR: Duration = Duration::from_secs(3600);

async fn vault(alarm: &Arc<Alarm>) -> Arc<Vault> {
    let ring = Ring::generate([7; 16]).unwrap();
    let store = Arc::new(Memory::new().unwrap());
    let clock = Clock::manual(Time::from_seconds(1_700_000_000));
    let alarm = Arc::clone(alarm);
    Arc::new(Vault::create(store, ring, [7; 16], vec![], alarm, clock).await.unwrap())
}

fn job(kind: Kind, due: Time, version: u32) -> JobRecord {
    let mut job = JobRecord { due: due.micros(), version, ..JobRecord::default() };
    job.key_id = vec![9; 16].into();
    job.set_kind(kind);
    job
}

async fn put(vault: &Vault, jobs: &[JobRecord]) {
    let mut tx = vault.begin().await.unwrap();
    for job in jobs {
        schedule(&mut tx, job).unwrap();
    }
    tx.commit().await.unwrap();
}

/// A handler that notes the versions it saw and fails as `fails` says.
fn noting(
    fails: impl Fn(u32) -> bool + Send + Sync + Copy + 'static,
) -> (Handler, Arc<Mutex<Vec<u32>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&seen);
    let handler: Handler = Arc::new(move |job: Job| {
        let notes = Arc::clone(&notes);
        Box::pin(async move {
            notes.lock().push(job.record.version);
            assert_ne!(job.record.version, 666, "a job that panics");
            if fails(job.record.version) { Err(Error::internal("no")) } else { Ok(()) }
        })
    });
    (handler, seen)
}

#[tokio::test]
async fn what_is_due_runs_once_and_the_rest_stays() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    let jobs: Vec<_> = (0..600).map(|i| job(Kind::Rotate, now, i)).collect();
    put(&vault, &jobs).await;
    let later = job(Kind::Rotate, now.plus(HOUR), 1000);
    let gone = job(Kind::Rotate, now, 7);
    put(&vault, &[later]).await;
    let mut tx = vault.begin().await.unwrap();
    cancel(&mut tx, &gone);
    tx.commit().await.unwrap();

    let (handler, seen) = noting(|_| false);
    let runner = Runner::new(Arc::clone(&vault), alarm, handler);
    let report = runner.run_due(now).await.unwrap();
    assert_eq!(report, Report { done: 599, ..Report::default() });
    let mut versions = std::mem::take(&mut *seen.lock());
    versions.sort_unstable();
    assert_eq!(versions, (0..600).filter(|&i| i != 7).collect::<Vec<_>>());
    assert_eq!(runner.run_due(now).await.unwrap(), Report::default());
    let left = runner.list(10).await.unwrap();
    assert_eq!(left.len(), 1);
    // Catching up after a sleep.
    vault.clock().advance(HOUR * 2);
    assert_eq!(runner.run_due(vault.clock().now()).await.unwrap().done, 1);
}

#[tokio::test]
async fn a_failing_job_stops_nothing_and_keeps_its_due_time() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    put(&vault, &[job(Kind::Promote, now, 1), job(Kind::Promote, now, 666)]).await;
    put(&vault, &[job(Kind::Promote, now, 3)]).await;
    let (handler, _) = noting(|version| version == 1);
    let runner = Runner::new(Arc::clone(&vault), alarm, handler);
    let report = runner.run_due(now).await.unwrap();
    assert_eq!(report, Report { done: 1, failed: 2, ..Report::default() });
    let mut at = now;
    for attempt in 1..20 {
        let left = runner.list(10).await.unwrap();
        assert_eq!(left.len(), 2);
        for job in &left {
            assert_eq!(job.record.attempts, attempt);
            assert_eq!(job.record.due, now.micros());
            assert!(!job.record.last_error.is_empty());
            let wait = job.at().since(at);
            let full = back_off_bounds(attempt);
            assert!(wait >= full * 3 / 4 && wait <= full * 5 / 4, "{attempt}: {wait:?}");
        }
        assert_eq!(runner.run_due(at).await.unwrap(), Report::default(), "not before its time");
        at = left.iter().map(Job::at).max().unwrap();
        assert_eq!(runner.run_due(at).await.unwrap().failed, 2);
    }
}

fn back_off_bounds(attempts: u32) -> Duration {
    Duration::from_secs(1_u64 << (attempts - 1).min(20)).min(HOUR)
}

#[tokio::test]
async fn a_jump_of_the_clock_holds_back_what_cannot_be_undone() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    let due = now.plus(HOUR * 48);
    put(&vault, &[job(Kind::Destroy, due, 1), job(Kind::EndGrace, due, 2)]).await;
    put(&vault, &[job(Kind::Rotate, due, 3)]).await;
    let (handler, seen) = noting(|_| false);
    let runner = Runner::new(Arc::clone(&vault), alarm, handler);
    let start = Moment::now(now);
    let at = |clock: Time, running: Duration| Moment {
        clock,
        since_boot: start.since_boot + running,
        ..start
    };
    *runner.guard.lock() = Guard::believing(start);
    // The clock and the time since boot go together: two days have passed.
    let report = runner.run_due_at(due, at(due, HOUR * 47)).await.unwrap();
    assert_eq!(report.done, 3, "within an hour");
    assert_eq!(std::mem::take(&mut *seen.lock()).len(), 3);

    put(&vault, &[job(Kind::Destroy, due, 1), job(Kind::EndGrace, due, 2)]).await;
    put(&vault, &[job(Kind::Rotate, due, 3)]).await;
    let late = due.plus(HOUR * 2);
    let report = runner.run_due_at(late, at(late, HOUR * 48)).await.unwrap();
    assert_eq!(report, Report { done: 1, held: 2, ..Report::default() });
    assert_eq!(runner.clock_doubt(), Some(Doubt::Jumped));
    vault.clock().advance(HOUR * 50);
    runner.confirm_clock(AuditEvent::default(), None).await.unwrap();
    assert_eq!(runner.run_due(vault.clock().now()).await.unwrap().done, 2);
    assert_eq!(runner.list(1).await.unwrap(), []);
}

#[tokio::test]
async fn a_restart_does_not_believe_a_clock_that_jumped() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let due = vault.clock().now().plus(HOUR * 48);
    put(&vault, &[job(Kind::Destroy, due, 1)]).await;
    let (handler, seen) = noting(|_| false);
    let start = async || {
        let runner = Runner::new(Arc::clone(&vault), Arc::clone(&alarm), Arc::clone(&handler));
        runner.resume().await.unwrap();
        runner
    };
    assert_eq!(start().await.clock_doubt(), None);
    // The clock is set ahead while the server is off, in one boot of the machine.
    vault.clock().advance(HOUR * 50);
    for restart in 0..2 {
        let runner = start().await;
        assert_eq!(runner.clock_doubt(), Some(Doubt::Jumped), "restart {restart}");
        let report = runner.run_due(vault.clock().now()).await.unwrap();
        assert_eq!(report, Report { held: 1, ..Report::default() });
    }
    assert!(seen.lock().is_empty());
    start().await.confirm_clock(AuditEvent::default(), None).await.unwrap();
    let runner = start().await;
    assert_eq!(runner.clock_doubt(), None);
    assert_eq!(runner.run_due(vault.clock().now()).await.unwrap().done, 1);
}

#[tokio::test]
async fn a_damaged_job_is_left_where_it_is_and_stops_no_other() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    let jobs: Vec<_> = (0..300).map(|i| job(Kind::Rotate, now, i)).collect();
    put(&vault, &jobs).await;
    // One in the middle, and one at the end of a page.
    let damaged = [row(&jobs[100]), row(&jobs[PAGE - 1])];
    for row in &damaged {
        let entry = vault.store().get(JOBS, row).await.unwrap().unwrap();
        let mut value = entry.value.to_vec();
        *value.last_mut().unwrap() ^= 1;
        let commit = polykey_storage::Commit::new().put(JOBS, row.clone(), value);
        let done = vault.store().commit(vec![commit], &mut polykey_storage::NoFinish).await;
        assert!(done.unwrap().any());
    }
    let (handler, seen) = noting(|_| false);
    let runner = Runner::new(Arc::clone(&vault), alarm, handler);
    let report = runner.run_due(now).await.unwrap();
    assert_eq!(report, Report { done: 298, damaged: 2, ..Report::default() });
    assert_eq!(seen.lock().len(), 298);
    assert_eq!(vault.damaged(), 2);
    for row in &damaged {
        assert!(vault.store().get(JOBS, row).await.unwrap().is_some());
        let told = from_row(row).unwrap();
        assert!(jobs.contains(&told), "{told:?}");
    }
    assert!(runner.turn().await.unwrap() > Duration::ZERO, "it does not spin on what is damaged");
    let report = vault.verify(true, |_| ()).await.unwrap();
    assert_eq!(report.findings.len(), 2, "{report:?}");
    assert!(vault.writable(), "the others are as they were");
}

#[tokio::test]
async fn the_runner_wakes_for_an_earlier_job_and_finishes_what_it_began() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    put(&vault, &[job(Kind::Rotate, now.plus(HOUR), 1)]).await;
    let count = Arc::new(AtomicUsize::new(0));
    let (begun, finish) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (counter, told, wait) = (Arc::clone(&count), Arc::clone(&begun), Arc::clone(&finish));
    let handler: Handler = Arc::new(move |_| {
        let (count, begun, finish) = (Arc::clone(&counter), Arc::clone(&told), Arc::clone(&wait));
        Box::pin(async move {
            begun.notify_one();
            finish.notified().await;
            count.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
    });
    let runner = Runner::new(Arc::clone(&vault), alarm, handler);
    let running = tokio::spawn(Arc::clone(&runner).run());
    put(&vault, &[job(Kind::Rotate, now, 2)]).await;
    begun.notified().await;
    runner.shutdown();
    finish.notify_one();
    running.await.unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert_eq!(runner.list(10).await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_comes_due_during_a_turn_does_not_wait_for_a_nap() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    put(&vault, &[job(Kind::Rotate, now, 1), job(Kind::Rotate, now.plus_seconds(5), 2)]).await;
    let clock = vault.clock().clone();
    let slow: Handler = Arc::new(move |_| {
        clock.advance(Duration::from_secs(10));
        Box::pin(async { Ok(()) })
    });
    let runner = Runner::new(vault, alarm, slow);
    assert_eq!(runner.turn().await.unwrap(), Duration::ZERO);
}

#[tokio::test]
async fn a_scheduled_revocation_is_not_made_final_by_a_clock_in_doubt() {
    let alarm = Arc::new(Alarm::default());
    let vault = vault(&alarm).await;
    let now = vault.clock().now();
    put(&vault, &[job(Kind::Revoke, now, 1)]).await;
    let (handler, seen) = noting(|_| false);
    let runner = Runner::new(vault, alarm, handler);
    let report = runner.run_due(now.plus(2 * HOUR)).await.unwrap();
    assert_eq!(report, Report { held: 1, ..Report::default() });
    assert!(seen.lock().is_empty());
}
