//! The child: the only process that loads a vendor's module. It answers one request at a time, and
//! ends when its parent does.

use std::fs::File;
use std::io;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getppid, set_dumpable_behavior, setrlimit,
};
use rustix::stdio::{dup2_stdin, dup2_stdout, stderr, stdin, stdout};

use super::data;
use super::device::{Device, Fault};
use super::frame::{self, Hello, KeyReply, Reply, Request};
use super::host::{LAST_CALL, PARENT};
use super::resident;
use super::session::{Kek, Opened};

/// Runs the child: what the hidden command `polykey pkcs11-worker` does, and nothing else.
///
/// Call it first thing in `main`: it replaces standard input and output, forbids core images and
/// ends with its parent, but for the call that it is in, which has 5 s. It is of no use to a person.
#[must_use]
pub fn run() -> ExitCode {
    let Ok((mut from, mut to)) = isolate() else {
        return ExitCode::from(2);
    };
    match serve(&mut from, &mut to) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::from(2),
    }
}

/// The two pipes, kept from the module: some read standard input or print to standard output.
fn isolate() -> io::Result<(File, File)> {
    let parent = std::env::var(PARENT).ok();
    let is = getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent.is_none() || parent != is {
        return Err(io::ErrorKind::NotConnected.into());
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let from = fcntl_dupfd_cloexec(stdin(), 3)?;
    let to = fcntl_dupfd_cloexec(stdout(), 3)?;
    dup2_stdin(File::open("/dev/null")?)?;
    dup2_stdout(stderr())?;
    let from: File = from.into();
    watch(from.try_clone()?)?;
    Ok((from, to.into()))
}

/// Ends this process some time after its parent has closed the pipe, whatever the module does. A
/// signal at the parent's death would cut off calls that write: SoftHSM loses a token by that.
fn watch(pipe: File) -> io::Result<()> {
    let watching = move || {
        let mut closed = [PollFd::new(&pipe, PollFlags::empty())];
        while !closed.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)) {
            if poll(&mut closed, None).is_err_and(|e| e != rustix::io::Errno::INTR) {
                break;
            }
        }
        std::thread::sleep(LAST_CALL);
        std::process::exit(2);
    };
    std::thread::Builder::new().name("pkcs11-parent".to_owned()).spawn(watching).map(drop)
}

fn serve(from: &mut File, to: &mut File) -> io::Result<()> {
    let bad = |_| io::Error::from(io::ErrorKind::InvalidData);
    let Some(hello) = frame::read(from)? else { return Ok(()) };
    let mut device = Device::new(Hello::decode(&hello).map_err(bad)?);
    drop(hello);
    while let Some(request) = frame::read(from)? {
        let request = Request::decode(&request).map_err(bad)?;
        let reply = answer(&mut device, &request).unwrap_or_else(|fault| match fault {
            Fault::Sick(text) => Reply::Unavailable(text),
            Fault::Lacking(text) | Fault::Config(text) => Reply::Refused(text),
            Fault::NotThere => Reply::Key(KeyReply::NotThere),
            Fault::Pin { token, text } => Reply::PinRefused { token, text },
        });
        frame::write(to, &reply.encode())?;
        if matches!(reply, Reply::PinRefused { .. } | Reply::Unavailable(_)) {
            break;
        }
    }
    Ok(())
}

fn answer(device: &mut Device, request: &Request) -> Result<Reply, Fault> {
    Ok(match request {
        Request::List => Reply::Slots(device.slots()?),
        Request::Find { key, choice } => device.with(|open| {
            let kek = open.find(key)?;
            let mechanism = open.way(&kek, *choice)?.mechanism;
            let Kek { id, locked_in, .. } = kek;
            Ok(Reply::Found { id, mechanism, locked_in })
        })?,
        Request::Wrap { key, choice, aad, secret } => {
            let (id, sealed) = device.with(|open| open.wrap(key, *choice, aad, secret))?;
            Reply::Wrapped { id, sealed }
        }
        Request::Unwrap { key, choice, expected, aad, sealed } => {
            let (id, opened) =
                device.with(|open| open.unwrap(key, *choice, expected, aad, sealed))?;
            match opened {
                Opened::Secret(secret) => Reply::Secret { id, secret },
                Opened::Broken => Reply::Broken { id },
                Opened::NotMine => Reply::NotMine { id },
            }
        }
        Request::Data { label, value } => {
            Reply::Data(data::answer(device, label, value.as_deref())?)
        }
        Request::Key(request) => Reply::Key(resident::answer(device, request)?),
        Request::Create { key, choice } => {
            device.once(|open| open.create(key, *choice))?;
            answer(device, &Request::Find { key: key.clone(), choice: *choice })?
        }
    })
}
