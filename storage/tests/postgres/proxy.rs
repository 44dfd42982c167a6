//! A TCP proxy before a server that loses connections at the worst moments.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread,
};

/// When a connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Cut {
    Never,
    /// When the next group is about to be committed: its `COMMIT` is not passed on.
    BeforeCommit,
    /// When it is: the answer is not passed on.
    AfterCommit,
}

struct Plan {
    next: AtomicU8,
    closed: AtomicBool,
}

/// Forwards connections until it is dropped.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    plan: Arc<Plan>,
}

impl Proxy {
    pub(crate) fn before(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let plan = Arc::new(Plan { next: AtomicU8::new(0), closed: AtomicBool::new(false) });
        let shared = Arc::clone(&plan);
        thread::spawn(move || {
            for client in listener.incoming() {
                if shared.closed.load(Ordering::Acquire) {
                    return;
                }
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(("127.0.0.1", server)))
                else {
                    continue;
                };
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                forward(client, server, &shared);
            }
        });
        Self { port, plan }
    }

    /// What happens to the next group.
    pub(crate) fn plan(&self, cut: Cut) {
        self.plan.next.store(cut as u8, Ordering::Release);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.plan.closed.store(true, Ordering::Release);
        // Wakes the listener.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn forward(client: TcpStream, server: TcpStream, plan: &Arc<Plan>) {
    let silent = Arc::new(AtomicBool::new(false));
    let (mut from_client, mut to_server) =
        (client.try_clone().unwrap(), server.try_clone().unwrap());
    let (plan, quiet) = (Arc::clone(plan), Arc::clone(&silent));
    thread::spawn(move || {
        let _ = requests(&mut from_client, &mut to_server, &plan, &quiet);
        let _ = to_server.shutdown(Shutdown::Both);
        let _ = from_client.shutdown(Shutdown::Both);
    });
    let (mut from_server, mut to_client) = (server, client);
    thread::spawn(move || {
        let _ = answers(&mut from_server, &mut to_client, &silent);
        let _ = to_client.shutdown(Shutdown::Both);
        let _ = from_server.shutdown(Shutdown::Both);
    });
}

fn requests(
    from: &mut TcpStream,
    to: &mut TcpStream,
    plan: &Plan,
    silent: &AtomicBool,
) -> io::Result<()> {
    // The first message has no type.
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    to.write_all(&length)?;
    let mut rest = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap() - 4];
    from.read_exact(&mut rest)?;
    to.write_all(&rest)?;
    let mut writing = false;
    loop {
        let message = message(from)?;
        if message.starts_with(b"Q") {
            let text = &message[5..message.len() - 1];
            if text.starts_with(b"BEGIN") {
                writing = !text.ends_with(b"READ ONLY");
            }
            if text == b"COMMIT" && writing {
                match plan.next.swap(Cut::Never as u8, Ordering::AcqRel) {
                    cut if cut == Cut::BeforeCommit as u8 => return Ok(()),
                    cut if cut == Cut::AfterCommit as u8 => silent.store(true, Ordering::Release),
                    _ => {}
                }
            }
        }
        to.write_all(&message)?;
    }
}

fn answers(from: &mut TcpStream, to: &mut TcpStream, silent: &AtomicBool) -> io::Result<()> {
    loop {
        let message = message(from)?;
        if !silent.load(Ordering::Acquire) {
            to.write_all(&message)?;
        } else if message == [b'Z', 0, 0, 0, 5, b'I'] {
            // Idle: the transaction is over.
            return Ok(());
        }
    }
}

// A message with its type and length.
fn message(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 5];
    from.read_exact(&mut message)?;
    let length = u32::from_be_bytes(message[1..5].try_into().unwrap());
    message.resize(usize::try_from(length).unwrap() + 1, 0);
    from.read_exact(&mut message[5..])?;
    Ok(message)
}
