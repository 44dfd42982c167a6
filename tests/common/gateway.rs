//! The network between a node and its database: it can be cut, and lead to another server.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

struct Route {
    port: u16,
    cut: bool,
    closed: bool,
    /// Of the connections that are open, both ends.
    streams: Vec<TcpStream>,
}

struct Shared {
    route: Mutex<Route>,
    changed: Condvar,
}

impl Shared {
    /// The route, once nothing is cut.
    fn whole(&self) -> MutexGuard<'_, Route> {
        let route = self.route.lock().unwrap();
        self.changed.wait_while(route, |route| route.cut && !route.closed).unwrap()
    }
}

/// A port of its own that leads to a server's, until it is dropped.
pub(crate) struct Gateway {
    pub(crate) port: u16,
    shared: Arc<Shared>,
}

impl Gateway {
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().port();
        let route = Route { port, cut: false, closed: false, streams: Vec::new() };
        let shared = Arc::new(Shared { route: Mutex::new(route), changed: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if of_thread.route.lock().unwrap().closed {
                    return;
                }
                let shared = Arc::clone(&of_thread);
                thread::spawn(move || connect(client, &shared));
            }
        });
        Self { port: own, shared }
    }

    /// Nothing passes in either direction and no connection ends, until [`Self::mend`].
    pub(crate) fn cut(&self) {
        self.shared.route.lock().unwrap().cut = true;
    }

    pub(crate) fn mend(&self) {
        self.shared.route.lock().unwrap().cut = false;
        self.shared.changed.notify_all();
    }

    /// Ends every connection; the next ones are to this port.
    pub(crate) fn lead_to(&self, port: u16) {
        let mut route = self.shared.route.lock().unwrap();
        route.port = port;
        for stream in route.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.shared.route.lock().unwrap().closed = true;
        self.lead_to(0);
        self.shared.changed.notify_all();
        // Wakes the listener.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn connect(client: TcpStream, shared: &Arc<Shared>) {
    let mut route = shared.whole();
    let Ok(server) = TcpStream::connect(("127.0.0.1", route.port)) else { return };
    for stream in [&client, &server] {
        stream.set_nodelay(true).unwrap();
        route.streams.push(stream.try_clone().unwrap());
    }
    drop(route);
    let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let of_thread = Arc::clone(shared);
    thread::spawn(move || pass(back.0, back.1, &of_thread));
    pass(client, server, shared);
}

fn pass(mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        drop(shared.whole());
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
