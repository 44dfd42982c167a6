//! A wire to a service on this machine that can be cut and mended.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Forwards connections while it is whole. Cut, its port refuses them, and those there were are closed.
pub(crate) struct Wire {
    to: SocketAddr,
    port: u16,
    whole: Option<Whole>,
}

struct Whole {
    stop: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    acceptor: JoinHandle<()>,
}

impl Wire {
    /// To what answers at `http://ADDRESS`.
    pub(crate) fn to(url: &str) -> Self {
        let to = url.trim_start_matches("http://").parse().unwrap();
        let mut wire = Self { to, port: 0, whole: None };
        wire.mend();
        wire
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(crate) fn mend(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).unwrap();
        self.port = listener.local_addr().unwrap().port();
        let (stop, streams) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Vec<_>>>::default());
        let (to, stopped, held) = (self.to, Arc::clone(&stop), Arc::clone(&streams));
        let acceptor = std::thread::spawn(move || {
            for near in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(to)) else { continue };
                held.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                for (mut from, mut into) in
                    [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)]
                {
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut into);
                        let _ = into.shutdown(Shutdown::Both);
                        let _ = from.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        self.whole = Some(Whole { stop, streams, acceptor });
    }

    pub(crate) fn cut(&mut self) {
        let Some(Whole { stop, streams, acceptor }) = self.whole.take() else { return };
        stop.store(true, Ordering::SeqCst);
        // Wakes the acceptor, which lets go of the port.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        acceptor.join().unwrap();
        for stream in streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.cut();
    }
}
