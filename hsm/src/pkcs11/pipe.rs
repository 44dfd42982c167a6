//! Writing to a child that may not read: nobody waits for it past a deadline.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::frame;
use crate::Deadline;

/// How long it waits before it lets others see to what they wait for.
const SLICE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A pipe, and by when what is written to it must be taken.
pub(super) struct ByDeadline<'a, P, W> {
    pipe: &'a mut P,
    deadline: Deadline,
    /// Called now and then while it waits.
    waiting: W,
}

/// Writes a frame, by the deadline.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] if the other side does not take it; then part of it may be written.
pub(super) fn write(
    pipe: &mut (impl Write + AsFd),
    frame: &[u8],
    deadline: Deadline,
    waiting: impl FnMut(),
) -> io::Result<()> {
    // The other end is another description, and keeps its mode.
    let mode = fcntl_getfl(&*pipe)?;
    fcntl_setfl(&*pipe, mode | OFlags::NONBLOCK)?;
    frame::write(&mut ByDeadline { pipe, deadline, waiting }, frame)
}

impl<P: Write + AsFd, W: FnMut()> Write for ByDeadline<'_, P, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.pipe.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            (self.waiting)();
            if self.deadline.remaining() == Duration::ZERO {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut room = [PollFd::new(&*self.pipe, PollFlags::OUT)];
            match poll(&mut room, Some(&SLICE)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pipe.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_past_the_deadline_and_frames_arrive_whole() {
        let (mut from, mut to) = io::pipe().unwrap();
        let frame = vec![7; frame::MAX_FRAME];
        let (begun, mut looked) = (Instant::now(), 0);
        let limit = Duration::from_millis(200);
        // A pipe has room for one and not for two.
        let mut written = 0;
        let error = loop {
            match write(&mut to, &frame, Deadline::after(limit), || looked += 1) {
                Ok(()) => written += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(looked > 1 && written > 0, "{looked} {written}");
        assert!((limit..Duration::from_secs(20)).contains(&begun.elapsed()));
        // What was cut off is no frame; what was written before is.
        let reader = std::thread::spawn(move || {
            let mut frames = 0;
            while let Ok(Some(frame)) = frame::read(&mut from) {
                assert!(frame.iter().all(|byte| *byte == 7));
                frames += 1;
            }
            frames
        });
        drop(to);
        assert_eq!(reader.join().unwrap(), written);
        // A reader that is slow gets it all.
        let (mut from, mut to) = io::pipe().unwrap();
        let reader = std::thread::spawn(move || {
            std::iter::from_fn(|| frame::read(&mut from).unwrap()).count()
        });
        for _ in 0..4 {
            write(&mut to, &frame, Deadline::after(Duration::from_secs(60)), || ()).unwrap();
        }
        drop(to);
        assert_eq!(reader.join().unwrap(), 4);
    }
}
