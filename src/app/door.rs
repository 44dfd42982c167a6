//! The local socket of a node, for `polykey lock` and `polykey unlock`: mode 0600, and only its own
//! user and root are heard (their ids come from the kernel).
//!
//! One request a connection, then one answer: length u32 ‖ version 1 ‖ code u8 ‖ body, big-endian, 16 KiB
//! at most. Secrets come as they are typed or kept in files and are erased after use, so the bytes
//! pass through no message library.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as Blocking;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use zeroize::Zeroizing;

const VERSION: u8 = 1;
/// Bytes of a request or answer: a share or a passphrase is far shorter.
const MOST: usize = 16 * 1024;
/// Whoever says nothing for so long is not listened to.
const HEARING: Duration = Duration::from_secs(5);
/// Unlocking asks devices and services.
const PATIENCE: Duration = Duration::from_secs(180);

/// What somebody on this machine asks for.
pub enum Ask {
    /// Whether the node is locked.
    Status,
    /// To lock it.
    Lock,
    /// To unlock it.
    Unlock(With),
}

/// By what a node is unlocked.
pub enum With {
    /// What is configured, tried once more.
    Configured,
    /// The passphrase of a slot.
    Passphrase(Zeroizing<Vec<u8>>),
    /// The private half of a recovery key, as text.
    RecoveryKey(Zeroizing<Vec<u8>>),
    /// A share of it, as text.
    Share(Zeroizing<Vec<u8>>),
}

impl With {
    /// The word for it in the audit trail.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Configured => "configured wrappers",
            Self::Passphrase(_) => "a passphrase",
            Self::RecoveryKey(_) => "a recovery key",
            Self::Share(_) => "shares of a recovery key",
        }
    }
}

impl Ask {
    fn parts(&self) -> (u8, &[u8]) {
        match self {
            Self::Status => (1, &[]),
            Self::Lock => (2, &[]),
            Self::Unlock(With::Configured) => (3, &[]),
            Self::Unlock(With::Passphrase(bytes)) => (4, bytes),
            Self::Unlock(With::RecoveryKey(bytes)) => (5, bytes),
            Self::Unlock(With::Share(bytes)) => (6, bytes),
        }
    }

    fn read(code: u8, body: Zeroizing<Vec<u8>>) -> Option<Self> {
        Some(match (code, body.is_empty()) {
            (1, true) => Self::Status,
            (2, true) => Self::Lock,
            (3, true) => Self::Unlock(With::Configured),
            (4, false) => Self::Unlock(With::Passphrase(body)),
            (5, false) => Self::Unlock(With::RecoveryKey(body)),
            (6, false) => Self::Unlock(With::Share(body)),
            _ => return None,
        })
    }
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The node serves.
    Serving,
    /// The node is locked.
    Locked,
    /// It was not done; the text says why.
    Refused,
}

impl Answer {
    const fn code(self) -> u8 {
        match self {
            Self::Serving => 0,
            Self::Locked => 1,
            Self::Refused => 2,
        }
    }

    const fn read(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Serving),
            1 => Some(Self::Locked),
            2 => Some(Self::Refused),
            _ => None,
        }
    }
}

fn frame(code: u8, body: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut out = Zeroizing::new(Vec::with_capacity(body.len() + 6));
    let len = u32::try_from(body.len() + 2).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(&[VERSION, code]);
    out.extend_from_slice(body);
    out
}

/// The body's length, if the head is one.
fn length(head: [u8; 4]) -> Option<usize> {
    let len = usize::try_from(u32::from_be_bytes(head)).ok()?;
    (2..=MOST).contains(&len).then_some(len)
}

fn split(frame: &[u8]) -> Option<(u8, Zeroizing<Vec<u8>>)> {
    let [VERSION, code, body @ ..] = frame else { return None };
    Some((*code, Zeroizing::new(body.to_vec())))
}

/// The socket, bound. Its file goes with it.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

/// A request that waits for its answer.
pub struct Request {
    /// What is asked.
    pub ask: Ask,
    /// The user who asks.
    pub uid: u32,
    stream: UnixStream,
}

impl Request {
    /// Answers. Whoever has gone away is not waited for.
    pub async fn answer(mut self, answer: Answer, text: &str) {
        let cut = text.char_indices().map(|(at, _)| at).find(|at| *at > MOST - 8);
        let text = text.get(..cut.unwrap_or(text.len())).unwrap_or_default();
        let bytes = frame(answer.code(), text.as_bytes());
        let write = async {
            self.stream.write_all(&bytes).await?;
            self.stream.shutdown().await
        };
        drop(tokio::time::timeout(HEARING, write).await);
    }
}

/// A path that a socket's address holds (107 bytes): from the working directory, if it is long.
fn reachable(path: &Path) -> PathBuf {
    let long = path.as_os_str().len() > 107;
    let here = std::env::current_dir().ok().filter(|_| long);
    let near = here.and_then(|here| path.strip_prefix(here).ok());
    near.unwrap_or(path).to_owned()
}

impl Door {
    /// Binds the socket, over one that a process left behind which is no more.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::AddrInUse`] while another node has it.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let at = &reachable(path);
        let listener = match UnixListener::bind(at) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                use std::os::unix::fs::FileTypeExt;
                let socket = fs::symlink_metadata(path)?.file_type().is_socket();
                let deserted = matches!(Blocking::connect(at),
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused);
                if !(socket && deserted) {
                    return Err(error);
                }
                fs::remove_file(path)?;
                UnixListener::bind(at)?
            }
            bound => bound?,
        };
        // The process's umask has seen to it already; this is for whoever embeds the library.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next request of somebody who may ask.
    pub async fn next(&self) -> Request {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let heard = tokio::time::timeout(HEARING, hear(stream)).await;
                    if let Ok(Some(request)) = heard {
                        return request;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the local socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

async fn hear(mut stream: UnixStream) -> Option<Request> {
    let uid = stream.peer_cred().ok()?.uid();
    let us = rustix::process::geteuid().as_raw();
    if uid != us && uid != 0 {
        tracing::warn!(uid, "somebody else spoke to the local socket");
        return None;
    }
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.ok()?;
    let mut bytes = Zeroizing::new(vec![0; length(head)?]);
    stream.read_exact(&mut bytes).await.ok()?;
    let (code, body) = split(&bytes)?;
    let ask = Ask::read(code, body)?;
    Some(Request { ask, uid, stream })
}

/// Asks the node behind a socket, which is root's or this user's; for root, if somebody has `named` the
/// socket, anybody's.
///
/// # Errors
/// What the system says; [`io::ErrorKind::PermissionDenied`] if somebody else listens there; [`io::ErrorKind::InvalidData`] if what answers is no node of this version.
pub fn ask(path: &Path, ask: &Ask, named: bool) -> io::Result<(Answer, String)> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "this is no answer of a node");
    let mut stream = Blocking::connect(path)?;
    // What is sent may be the recovery key: not to whoever has put a socket there.
    let (peer, us) =
        (rustix::net::sockopt::socket_peercred(&stream)?.uid, rustix::process::geteuid());
    let trusted = peer.is_root() || peer == us || (us.is_root() && named);
    if !trusted {
        let text = format!("user {} listens there, not the node's own user", peer.as_raw());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    stream.set_write_timeout(Some(HEARING))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let (code, body) = ask.parts();
    if body.len() > MOST - 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "longer than 16 KiB"));
    }
    stream.write_all(&frame(code, body))?;
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let mut bytes = vec![0; length(head).ok_or_else(wrong)?];
    stream.read_exact(&mut bytes)?;
    let (code, text) = split(&bytes).ok_or_else(wrong)?;
    let answer = Answer::read(code).ok_or_else(wrong)?;
    Ok((answer, String::from_utf8_lossy(&text).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("sock")
    }

    async fn asked(path: &Path, what: Ask) -> io::Result<(Answer, String)> {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || ask(&path, &what, false)).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn requests_and_answers_pass_and_the_socket_is_its_owners() {
        let dir = tempfile::tempdir().unwrap();
        let door = Door::bind(&path(&dir)).unwrap();
        let mode = fs::metadata(path(&dir)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let serve = async {
            let first = door.next().await;
            assert!(matches!(first.ask, Ask::Status));
            first.answer(Answer::Locked, "ein Schloß").await;
            let second = door.next().await;
            let Ask::Unlock(With::Passphrase(words)) = &second.ask else { panic!() };
            assert_eq!(words.as_slice(), b"correct horse");
            second.answer(Answer::Refused, &"ß".repeat(MOST)).await;
        };
        let words = Zeroizing::new(b"correct horse".to_vec());
        let path = path(&dir);
        let asking = async {
            let told = asked(&path, Ask::Status).await.unwrap();
            assert_eq!(told, (Answer::Locked, "ein Schloß".to_owned()));
            let told = asked(&path, Ask::Unlock(With::Passphrase(words))).await.unwrap();
            assert!(told.0 == Answer::Refused && told.1.starts_with("ßß"));
        };
        tokio::join!(serve, asking);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nonsense_is_not_answered_and_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let door = Door::bind(&path(&dir)).unwrap();
        let (_, body) = (0, [0_u8; 0]);
        let mut nonsense: Vec<Vec<u8>> = vec![
            Vec::new(),
            vec![0, 0, 0],
            vec![0, 0, 0, 0],
            vec![0, 0, 0, 1, 1],
            vec![255, 255, 255, 255],
            frame(9, &body).to_vec(),
            frame(1, b"x").to_vec(),
            frame(4, b"").to_vec(),
        ];
        let mut newer = frame(1, b"").to_vec();
        newer[4] = 2;
        nonsense.push(newer);
        for bytes in nonsense {
            let mut stream = Blocking::connect(path(&dir)).unwrap();
            stream.write_all(&bytes).unwrap();
        }
        let path = path(&dir);
        let asking = asked(&path, Ask::Lock);
        let serve = async {
            let request = door.next().await;
            assert!(matches!(request.ask, Ask::Lock));
            request.answer(Answer::Locked, "").await;
        };
        let (told, ()) = tokio::join!(asking, serve);
        assert_eq!(told.unwrap().0, Answer::Locked);
    }

    #[tokio::test]
    async fn a_socket_in_use_stays_and_a_deserted_one_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir);
        let door = Door::bind(&path).unwrap();
        assert_eq!(Door::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(door);
        assert!(!path.exists());
        // As a process leaves it that was killed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Door::bind(&path).unwrap());
        // A file of somebody's is not taken for one.
        fs::write(&path, "mine").unwrap();
        assert!(Door::bind(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
