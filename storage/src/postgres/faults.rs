//! Serialization failures on demand, for tests.

use parking_lot::Mutex;

type Strikes = Box<dyn FnMut() -> bool + Send>;

/// Decides for each statement whether it fails.
#[derive(Default)]
pub(super) struct Faults(Mutex<Option<Strikes>>);

impl Faults {
    pub(super) fn set(&self, strikes: impl FnMut() -> bool + Send + 'static) {
        *self.0.lock() = Some(Box::new(strikes));
    }

    pub(super) fn strikes(&self) -> bool {
        self.0.lock().as_mut().is_some_and(|strikes| strikes())
    }
}
