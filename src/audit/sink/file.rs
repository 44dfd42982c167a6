//! A copy of the log in a file, on a thread of its own: a disk that hangs holds up nothing else.
//!
//! The file is looked at before each write and when nothing is written. Renamed, it is taken for
//! rotated by somebody, and a new one is begun. Deleted, replaced or cut short, what it held is written
//! anew: the log has it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, StatVfsMountFlags};
use tokio::sync::{mpsc, oneshot};

use super::Batch;
use super::place::{Current, Cursor, Place};
use crate::config::sinks::FileTarget;

/// How often what was written is made durable, and how far that is.
const SYNC: Duration = Duration::from_secs(1);
/// How much is read at a time to find the last whole line.
const PIECE: u64 = 64 * 1024;

struct Work {
    batch: Batch,
    answer: oneshot::Sender<(Result<(), String>, Place)>,
}

/// The way to the thread.
pub(super) struct Outlet {
    target: FileTarget,
    saved: PathBuf,
    place: Place,
    thread: Option<mpsc::Sender<Work>>,
}

impl Outlet {
    pub(super) fn new(target: FileTarget, place: Place, saved: PathBuf) -> Self {
        Self { target, saved, place, thread: None }
    }

    pub(super) fn next(&self) -> Cursor {
        self.place.next
    }

    fn thread(&mut self) -> Result<mpsc::Sender<Work>, String> {
        if let Some(thread) = &self.thread {
            return Ok(thread.clone());
        }
        let (thread, mut work) = mpsc::channel::<Work>(1);
        let (target, saved) = (self.target.clone(), self.saved.clone());
        let mut writer = Writer::new(target, self.place.clone(), saved);
        std::thread::Builder::new()
            .name("polykey-sink".into())
            .spawn(move || {
                while let Some(Work { batch, answer }) = work.blocking_recv() {
                    let result = writer.put(&batch);
                    // Nobody waits any more when the node ends.
                    drop(answer.send((result, writer.place.clone())));
                }
            })
            .map_err(|error| format!("no thread can be started for it: {error}"))?;
        self.thread = Some(thread.clone());
        Ok(thread)
    }

    pub(super) async fn put(&mut self, batch: Batch) -> Result<(), String> {
        let thread = self.thread()?;
        let (answer, answered) = oneshot::channel();
        if thread.send(Work { batch, answer }).await.is_ok()
            && let Ok((result, place)) = answered.await
        {
            self.place = place;
            return result;
        }
        self.thread = None;
        Err("its thread has ended; the log says why".to_owned())
    }
}

struct Open {
    file: File,
    device: u64,
    inode: u64,
    /// Where the last whole line ends.
    written: u64,
    /// A piece of a line stands behind that and cannot be taken away.
    torn: bool,
}

/// Writes the file.
pub(super) struct Writer {
    target: FileTarget,
    /// Where `place` is kept.
    saved: PathBuf,
    /// How far it has come, durable or not.
    pub(super) place: Place,
    /// How far it has come for good.
    durable: Place,
    open: Option<Open>,
    synced: Instant,
}

impl Writer {
    pub(super) fn new(target: FileTarget, place: Place, saved: PathBuf) -> Self {
        let durable = place.clone();
        Self { target, saved, place, durable, open: None, synced: Instant::now() }
    }

    pub(super) fn put(&mut self, batch: &Batch) -> Result<(), String> {
        self.look()?;
        if !batch.records.is_empty() && batch.from == self.place.next {
            self.append(batch)?;
        }
        if self.place != self.durable && (batch.flush || self.synced.elapsed() >= SYNC) {
            self.settle()?;
        }
        Ok(())
    }

    fn failed(&self, what: &str, error: &io::Error) -> String {
        format!("{} {what}: {error}", self.target.path.display())
    }

    /// Whether the file that is open is the one that lies there, whole and writable.
    fn look(&mut self) -> Result<(), String> {
        let Some(open) = &self.open else { return self.open() };
        match fs::symlink_metadata(&self.target.path) {
            Ok(there) if (there.dev(), there.ino()) == (open.device, open.inode) => {}
            Ok(_) => return self.moved(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.moved(),
            Err(error) => return Err(self.failed("cannot be reached", &error)),
        }
        self.fit(&open.file)?;
        let length = open.file.metadata().map(|held| held.len());
        let length = length.map_err(|error| self.failed("cannot be looked at", &error))?;
        if length < open.written {
            self.open = None;
            self.place.rewind();
            self.place.current.size = length;
            self.durable = self.place.clone();
            return Err(self.told("was cut short: what it held is written anew"));
        }
        Ok(())
    }

    fn told(&self, what: &str) -> String {
        format!("{} {what}", self.target.path.display())
    }

    /// Whether a file may be written, by its owner and on its file system.
    fn fit(&self, file: &File) -> Result<(), String> {
        let held = file.metadata().map_err(|error| self.failed("cannot be looked at", &error))?;
        if !held.is_file() {
            return Err(self.told("is not a regular file"));
        }
        // Root and a file that is open already would not notice.
        if held.mode() & 0o200 == 0 {
            let mode = held.mode() & 0o7777;
            return Err(self.told(&format!("has mode {mode:04o}, which lets nobody write")));
        }
        match rustix::fs::fstatvfs(file) {
            Ok(system) if system.f_flag.contains(StatVfsMountFlags::RDONLY) => {
                Err(self.told("is on a file system that is read-only"))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed("cannot be looked at", &error.into())),
        }
    }

    /// Another file lies in the place of the one that is open, or none.
    fn moved(&mut self) -> Result<(), String> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let kept = open.file.metadata().is_ok_and(|held| held.nlink() > 0);
        if !kept || open.file.sync_data().is_err() {
            self.place.rewind();
            self.place.current = Current { first: self.place.next, ..Current::default() };
            self.durable = self.place.clone();
            return Err(self.told("was deleted: what it held is written anew"));
        }
        self.place.current = Current { first: self.place.next, ..Current::default() };
        self.open()
    }

    /// Opens the file that lies there if it is the one that was left, and begins a new one otherwise.
    fn open(&mut self) -> Result<(), String> {
        loop {
            let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let file = OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .mode(0o600)
                .custom_flags(flags.bits().cast_signed())
                .open(&self.target.path)
                .map_err(|error| self.failed("cannot be opened", &error))?;
            self.fit(&file)?;
            let lock = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            if lock == Err(rustix::io::Errno::WOULDBLOCK) {
                return Err(self.told("is written by another process"));
            }
            let held =
                file.metadata().map_err(|error| self.failed("cannot be looked at", &error))?;
            let (device, inode, length) = (held.dev(), held.ino(), held.len());
            let left = self.place.current;
            let lost = left.size > 0;
            if length > 0 && inode == left.inode && length >= left.size {
                let (written, torn) =
                    mend(&file, length).map_err(|error| self.failed("cannot be read", &error))?;
                self.place.current.size = written;
                self.open = Some(Open { file, device, inode, written, torn });
                return Ok(());
            }
            // What was in the file that was left is not in this one.
            self.place.rewind();
            self.place.current = Current { first: self.place.next, size: 0, inode };
            if length > 0 {
                // Not ours to write into, and not ours to delete.
                drop(file);
                self.shift().map_err(|error| self.failed("cannot be put aside", &error))?;
                if lost {
                    let what =
                        "was another file: that is put aside, and what ours held is written anew";
                    return Err(self.told(what));
                }
                continue;
            }
            self.open = Some(Open { file, device, inode, written: 0, torn: false });
            self.sync_directory().map_err(|error| self.failed("cannot be kept", &error))?;
            // So that it is known again after a crash.
            self.settle()?;
            return if lost {
                Err(self.told("was gone or empty: what it held is written anew"))
            } else {
                Ok(())
            };
        }
    }

    fn append(&mut self, batch: &Batch) -> Result<(), String> {
        let mut bytes = Vec::new();
        for record in &batch.records {
            bytes.extend_from_slice(&record.line);
            bytes.push(b'\n');
        }
        let added = bytes.len() as u64;
        let most = self.target.max_mib.saturating_mul(1024 * 1024);
        if self.open.as_ref().is_some_and(|o| o.written > 0 && o.written + added > most) {
            self.rotate()?;
        }
        let Some(open) = &mut self.open else { return Err(self.told("is not open")) };
        let mut result = Ok(());
        if open.torn {
            // The piece stays behind as a line that is none.
            result = open.file.write_all(b"\n");
            if result.is_ok() {
                open.torn = false;
                open.written = open.file.metadata().map_or(open.written, |held| held.len());
            }
        }
        if let Err(error) = result.and_then(|()| open.file.write_all(&bytes)) {
            // What got through is a piece of a line.
            if open.file.set_len(open.written).is_err() {
                open.torn = true;
            }
            return Err(self.failed("cannot be written", &error));
        }
        open.written += added;
        self.place.current.size = open.written;
        self.place.advance(batch.next, batch.last);
        Ok(())
    }

    /// Makes durable what was written, and then how far that is.
    fn settle(&mut self) -> Result<(), String> {
        if let Some(open) = &self.open
            && let Err(error) = open.file.sync_data()
        {
            // What was written since the last time may be gone, and the system tells it once.
            self.open = None;
            self.place = self.durable.clone();
            return Err(self.failed("cannot be made durable", &error));
        }
        self.synced = Instant::now();
        self.place.save(&self.saved)?;
        self.durable = self.place.clone();
        Ok(())
    }

    /// Puts the full file aside and begins another one.
    fn rotate(&mut self) -> Result<(), String> {
        self.settle()?;
        self.open = None;
        self.shift().map_err(|error| self.failed("cannot be put aside", &error))?;
        self.place.current = Current { first: self.place.next, ..Current::default() };
        self.open()
    }

    fn full(&self, number: u32) -> PathBuf {
        let mut name = self.target.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    /// Renames the file to `.1`, that to `.2` and so on; the oldest one is deleted.
    fn shift(&self) -> io::Result<()> {
        let there = |number: &u32| fs::symlink_metadata(self.full(*number)).is_ok();
        let full = (1..self.target.keep).take_while(there).last().unwrap_or(0);
        for number in (1..=full).rev() {
            fs::rename(self.full(number), self.full(number + 1))?;
        }
        fs::rename(&self.target.path, self.full(1))?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> io::Result<()> {
        let parent = self.target.path.parent().filter(|p| !p.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

/// Takes away what a process that was killed wrote of a line. Returns where the last whole line ends,
/// and whether a piece is left behind it.
fn mend(file: &File, length: u64) -> io::Result<(u64, bool)> {
    let mut end = length;
    while end > 0 {
        let from = end.saturating_sub(PIECE);
        let mut piece = vec![0; usize::try_from(end - from).unwrap_or(0)];
        file.read_exact_at(&mut piece, from)?;
        if let Some(at) = piece.iter().rposition(|byte| *byte == b'\n') {
            end = from + at as u64 + 1;
            break;
        }
        end = from;
    }
    if end == length {
        return Ok((length, false));
    }
    // An append-only file lets nobody.
    Ok(if file.set_len(end).is_ok() { (end, false) } else { (length, true) })
}
