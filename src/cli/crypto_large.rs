//! Large files: encrypted and decrypted piece by piece, in constant memory, into a file that has its name
//! only once it is whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use polykey_proto::polykey::v2 as pb;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use zeroize::Zeroizing;

use super::crypto_run::SMALL;
use super::error::{CliError, Exit};
use super::output::{is_terminal, write_out};
use super::progress::Bar;
use super::remote::{Remote, next};
use crate::client::{file, rpc};

/// Bytes of a piece.
const PIECE: usize = 256 * 1024;
/// Pieces read ahead.
const AHEAD: usize = 4;
const STREAM_MAGIC: &[u8] = b"PKS";

/// What is read: its first bytes, which tell what it is, and the rest.
pub(super) struct Source {
    begin: Zeroizing<Vec<u8>>,
    rest: Box<dyn Read + Send>,
    size: Option<u64>,
    path: PathBuf,
}

impl Source {
    /// Opens a file, `-` being standard input, and reads what one call could take.
    pub(super) fn open(path: &Path) -> Result<Self, CliError> {
        let failed = |error: io::Error| CliError::file(path, &error);
        let (mut rest, size): (Box<dyn Read + Send>, _) = if path == Path::new("-") {
            (Box::new(io::stdin()), None)
        } else {
            let file = File::open(path).map_err(failed)?;
            let meta = file.metadata().map_err(failed)?;
            (Box::new(file), meta.is_file().then_some(meta.len()))
        };
        let mut begin = Zeroizing::new(Vec::new());
        rest.by_ref().take(SMALL + 1).read_to_end(&mut begin).map_err(failed)?;
        Ok(Self { begin, rest, size, path: path.to_owned() })
    }

    /// Whether one call takes it.
    pub(super) fn is_small(&self) -> bool {
        self.begin.len() as u64 <= SMALL
    }

    /// Whether it is a large ciphertext.
    pub(super) fn is_stream(&self) -> bool {
        self.begin.starts_with(STREAM_MAGIC)
    }

    /// All of it, if it is not larger than that.
    pub(super) fn all(mut self, limit: u64) -> Result<Zeroizing<Vec<u8>>, CliError> {
        let room = limit.saturating_sub(self.begin.len() as u64) + 1;
        let read = self.rest.take(room).read_to_end(&mut self.begin);
        read.map_err(|error| CliError::file(&self.path, &error))?;
        if self.begin.len() as u64 > limit {
            let text = format!("{}: has more than {limit} bytes", self.path.display());
            return Err(CliError::usage(text));
        }
        Ok(self.begin)
    }

    /// All of it, however large.
    pub(super) fn everything(self) -> Result<Zeroizing<Vec<u8>>, CliError> {
        self.all(u64::MAX / 2)
    }

    /// The next piece; empty at the end.
    fn piece(&mut self) -> io::Result<Vec<u8>> {
        if !self.begin.is_empty() {
            return Ok(std::mem::take(&mut *self.begin));
        }
        let mut piece = vec![0; PIECE];
        let mut filled = 0;
        while let Some(room) = piece.get_mut(filled..).filter(|room| !room.is_empty()) {
            match self.rest.read(room) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        piece.truncate(filled);
        Ok(piece)
    }
}

/// Messages made of a source, read on a thread of their own; a reading error ends them early.
struct Pieces<T> {
    receiver: tokio::sync::mpsc::Receiver<T>,
    failed: Arc<Mutex<Option<io::Error>>>,
}

fn pieces<T: Send + 'static>(
    first: T,
    mut source: Source,
    message: impl Fn(bytes::Bytes) -> T + Send + 'static,
) -> Pieces<T> {
    let (sender, receiver) = tokio::sync::mpsc::channel(AHEAD);
    let failed = Arc::new(Mutex::new(None));
    let told = Arc::clone(&failed);
    std::thread::spawn(move || {
        if sender.blocking_send(first).is_err() {
            return;
        }
        loop {
            match source.piece() {
                Ok(piece) if piece.is_empty() => return,
                Ok(piece) => {
                    if sender.blocking_send(message(piece.into())).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    *told.lock() = Some(error);
                    return;
                }
            }
        }
    });
    Pieces { receiver, failed }
}

/// Where the result goes: a file that gets its name at the end, or standard output.
enum Sink {
    File(file::NewFile),
    Out,
}

impl Sink {
    fn open(out: Option<&Path>) -> Result<Self, CliError> {
        match out {
            Some(path) => {
                let file = file::NewFile::create(path);
                Ok(Self::File(file.map_err(|error| CliError::file(path, &error))?))
            }
            None if is_terminal() => {
                let text = "the result is not text and would go to a terminal";
                Err(CliError::usage(text).hint("Add `--out FILE`, or pipe it on."))
            }
            None => Ok(Self::Out),
        }
    }

    fn write(&mut self, bytes: &[u8], out: Option<&Path>) -> Result<(), CliError> {
        match self {
            Self::File(file) => file.write_all(bytes).map_err(|error| named(out, &error)),
            Self::Out => write_out(bytes),
        }
    }

    fn finish(self, out: Option<&Path>) -> Result<(), CliError> {
        match self {
            Self::File(file) => file.finish(file::PRIVATE).map_err(|error| named(out, &error)),
            Self::Out => Ok(()),
        }
    }
}

fn named(out: Option<&Path>, error: &io::Error) -> CliError {
    CliError::file(out.unwrap_or(Path::new("standard output")), error)
}

/// Sends `first` and the pieces of `source`, and writes what comes back.
async fn through<Q, A, F, Fut>(
    remote: &Remote,
    (first, message): (Q, impl Fn(bytes::Bytes) -> Q + Send + 'static),
    source: Source,
    out: Option<&Path>,
    (what, call): (&'static str, F),
    bytes_of: impl Fn(A) -> bytes::Bytes,
) -> Result<(), CliError>
where
    Q: Send + 'static,
    F: Fn(Channel, Request<ReceiverStream<Q>>) -> Fut,
    Fut: Future<Output = Result<tonic::Response<Streaming<A>>, Status>>,
{
    let mut sink = Sink::open(out)?;
    // A stream cannot be sent a second time: the token is looked at before.
    remote.read(pb::WhoAmIRequest {}, rpc!(AdminServiceClient, who_am_i)).await?;
    let total = source.size.unwrap_or(0);
    let path = source.path.clone();
    let Pieces { receiver, failed } = pieces(first, source, message);
    let once = Mutex::new(Some(ReceiverStream::new(receiver)));
    let begin = |channel: Channel, request: Request<()>| {
        let stream = once.lock().take();
        let call = &call;
        async move {
            match stream {
                Some(stream) => call(channel, request.map(|()| stream)).await,
                None => Err(Status::unavailable("the connection broke off; begin again")),
            }
        }
    };
    let mut answers = remote.stream((), begin).await?;
    let mut bar = Bar::new(what);
    let mut done: u64 = 0;
    while let Some(answer) = next(&mut answers).await? {
        let piece = bytes_of(answer);
        done += piece.len() as u64;
        bar.at(done, total);
        sink.write(&piece, out)?;
    }
    if let Some(error) = failed.lock().take() {
        return Err(CliError::file(&path, &error));
    }
    if done == 0 && what == "encrypting" {
        return Err(CliError::new(Exit::Other, "the server sent no ciphertext"));
    }
    sink.finish(out)
}

pub(super) async fn encrypt(
    remote: &Remote,
    header: pb::EncryptStreamHeader,
    source: Source,
    out: Option<&Path>,
) -> Result<(), CliError> {
    use pb::encrypt_stream_request::Part;
    let first = pb::EncryptStreamRequest { part: Some(Part::Header(header)) };
    let message = |b| pb::EncryptStreamRequest { part: Some(Part::Plaintext(b)) };
    let call = rpc!(CryptoServiceClient, encrypt_stream);
    let bytes_of = |answer: pb::EncryptStreamResponse| answer.ciphertext;
    through(remote, (first, message), source, out, ("encrypting", call), bytes_of).await
}

pub(super) async fn decrypt(
    remote: &Remote,
    header: pb::DecryptStreamHeader,
    source: Source,
    out: Option<&Path>,
) -> Result<(), CliError> {
    use pb::decrypt_stream_request::Part;
    if out.is_none() && !is_terminal() {
        super::output::remark(
            "note: what comes before the end may be less than all; look at the exit code",
        );
    }
    let first = pb::DecryptStreamRequest { part: Some(Part::Header(header)) };
    let message = |b| pb::DecryptStreamRequest { part: Some(Part::Ciphertext(b)) };
    let call = rpc!(CryptoServiceClient, decrypt_stream);
    let bytes_of = |answer: pb::DecryptStreamResponse| answer.plaintext;
    through(remote, (first, message), source, out, ("decrypting", call), bytes_of).await
}
