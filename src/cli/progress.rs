//! What is shown on a terminal while something takes longer than a second.

use std::future::Future;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// What is quicker than this shows nothing.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(120);

/// Waits for `work`, and shows a spinner with `what` when that takes long.
pub(super) async fn watch<F: Future>(what: &str, work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    if let Ok(done) = tokio::time::timeout(PATIENCE, work.as_mut()).await {
        return done;
    }
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    bar.enable_steady_tick(TICK);
    let done = work.await;
    bar.finish_and_clear();
    done
}

/// A bar of something with a known length, which appears once it has taken a second.
pub(super) struct Bar {
    bar: Option<ProgressBar>,
    what: &'static str,
    begun: std::time::Instant,
}

impl Bar {
    pub(super) fn new(what: &'static str) -> Self {
        Self { bar: None, what, begun: std::time::Instant::now() }
    }

    pub(super) fn at(&mut self, done: u64, total: u64) {
        if self.bar.is_none() && self.begun.elapsed() >= PATIENCE {
            let style = ProgressStyle::with_template("{msg} [{bar:40}] {pos}/{len}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(total).with_style(style).with_message(self.what);
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(done));
            bar.set_position(done);
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
