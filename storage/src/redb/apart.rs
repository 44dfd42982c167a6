//! Work of redb's on which a damaged file can end the process, on threads that may be given up.
//!
//! redb trusts the pages in which it keeps its own books: damaged ones fail an assertion under a
//! lock, and a destructor that meets the poisoned lock while that panic unwinds panics too, upon
//! which Rust aborts. So the first panic here does not unwind: the thread stays where it is, with
//! all that it holds, and its caller learns of it.

use std::{
    cell::RefCell,
    panic::{set_hook, take_hook},
    sync::{Once, mpsc},
    thread,
};

/// The work panicked. Its thread, and what was handed to it, are gone until the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GivenUp;

type Tell = Box<dyn Fn()>;

thread_local! {
    // How a thread of this module says that it panicked.
    static TELL: RefCell<Option<Tell>> = const { RefCell::new(None) };
}

/// Runs `work` on a thread of its own, and waits for it.
///
/// It is the panic hook that keeps the thread. Whoever replaces the hook of the process and does not
/// call the one before gets a panic that unwinds, and with it the abort; whoever replaces it after
/// such a panic waits for ever.
pub(super) fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<Result<T, GivenUp>> {
    hook();
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("redb".into()).spawn(move || {
        let panicked = sender.clone();
        TELL.set(Some(Box::new(move || drop(panicked.send(Err(GivenUp))))));
        let done = work();
        TELL.set(None);
        drop(sender.send(Ok(done)));
    })?;
    Ok(receiver.recv().unwrap_or(Err(GivenUp)))
}

fn hook() {
    static HOOK: Once = Once::new();
    // A thread that panics may not set hooks.
    if thread::panicking() {
        return;
    }
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            before(panic);
            let tell = TELL.try_with(|tell| tell.take()).ok().flatten();
            if let Some(tell) = tell {
                tell();
                loop {
                    thread::park();
                }
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    struct PanicsTwice;

    impl Drop for PanicsTwice {
        fn drop(&mut self) {
            panic!("a second time: without a hook this ends the process");
        }
    }

    #[test]
    fn a_panic_on_the_way_out_of_a_panic_ends_nothing_but_its_thread() {
        let name =
            "redb::apart::tests::a_panic_on_the_way_out_of_a_panic_ends_nothing_but_its_thread";
        crate::conformance::in_a_process(name, || {
            let outcome = run(|| {
                let _twice = PanicsTwice;
                panic!("a first time");
            });
            assert_eq!(outcome.unwrap(), Err::<(), _>(GivenUp));
            assert_eq!(run(|| 7).unwrap(), Ok(7));
        });
    }
}
