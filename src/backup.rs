//! Backups: every row of one snapshot, sealed as it stands in the store, in a file that only the node's
//! root key opens.
//!
//! ```text
//! "PKBK" ‖ format 1 ‖ header length u32 ‖ header ‖ stream
//! ```
//! The header ([`BackupHeader`]) is in the clear: it has the slots, through which the root key is opened on
//! a machine where nothing else is left. All that stands before the stream is its additional data. The
//! stream is a ciphertext as `EncryptStream` makes them, in chunks of 1 MiB, of
//! `space u8 ‖ key length u16 ‖ key ‖ value length u32 ‖ value` for each row and at the end
//! `255 ‖ rows u64`. It is written and read in constant memory.

use std::io::{self, Read};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use polykey_hsm::work::{Binding, ChunkSize, STREAM_HEADER_LEN, StreamSealer};
use polykey_hsm::{Ring, RingError};
use polykey_proto::polykey::record::v1::BackupHeader;
use polykey_storage::memory::Memory;
use polykey_storage::{Commit, CommitError, Direction, NoFinish, Snapshot, Space, Store};
use prost::Message;

use crate::error::Error;
use crate::time::Time;
use crate::vault::Vault;
use crate::vault::space::{self, META, meta};

const MAGIC: &[u8; 4] = b"PKBK";
const FORMAT: u8 = 1;
const PREFIX: usize = MAGIC.len() + 1 + 4;
/// Longest header: a slot table has far less.
const HEADER: u32 = 16 * 1024 * 1024;
/// Where a space would stand: the rows are over.
const END: u8 = u8::MAX;
/// Bytes of a chunk.
const CHUNK: usize = 1024 * 1024;
/// Rows read at a time. Audit leaves may have a MiB each.
const fn step(space: Space) -> usize {
    if space.0 == space::AUDIT.0 { 16 } else { 256 }
}
/// Bytes of rows in a commit of what is read back.
const GROUP: usize = 16 * 1024 * 1024;

/// Why a file gives nothing back.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// Something else.
    #[error("is not a backup")]
    Foreign,
    /// A newer version made it.
    #[error("is a backup of format {0}, which is newer than this version knows")]
    NewerFormat(u8),
    /// It does not authenticate.
    #[error("was changed or cut short since it was made")]
    Broken,
    /// Its node's ring has no such key.
    #[error("cannot be opened: {0}")]
    Ring(#[from] RingError),
    /// The rows cannot be written.
    #[error("its records cannot be written: {0}")]
    Store(#[from] CommitError),
}

impl From<io::ErrorKind> for BackupError {
    fn from(kind: io::ErrorKind) -> Self {
        Self::Io(kind.into())
    }
}

/// What a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// The revision that it is of.
    pub revision: u64,
    /// Its rows.
    pub rows: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// Writes a backup of the rows as they are now, piece by piece, for as long as `sink` takes them. `None`
/// if it did not. The snapshot is held until the end: meanwhile the store's file keeps what is replaced.
///
/// # Errors
/// [`Error::Unavailable`] or [`Error::DataLoss`] if the store cannot be read.
pub async fn write(
    vault: &Vault,
    now: Time,
    mut sink: impl FnMut(Vec<u8>) -> bool,
) -> Result<Option<Contents>, Error> {
    let (snapshot, ring) = vault.steady().await?;
    let revision = snapshot.revision().0;
    let header = header(&*snapshot, &ring, now).await?;
    let epoch = header.epoch;
    let prefix = prefix(&header);
    let failed = |error: &dyn std::fmt::Display| Error::internal(format!("backup: {error}"));
    let key = ring.backup_key(epoch).map_err(|error| failed(&error))?;
    let binding = binding(ring.node_id(), &prefix);
    let size = ChunkSize::from_bytes(CHUNK).unwrap_or_default();
    let (begin, sealer) = key.seal_stream(&binding, size).map_err(|error| failed(&error))?;
    let mut out = Pieces { sealer, plain: Vec::new(), bytes: 0, sink: &mut sink };
    let mut rows: u64 = 0;
    if !out.send(prefix) || !out.send(begin) {
        return Ok(None);
    }
    for &space in space::ALL {
        let mut range = polykey_storage::all();
        let step = step(space);
        loop {
            let entries = snapshot.scan(space, range, Direction::Forward, step).await?;
            let last = entries.last().filter(|_| entries.len() == step).map(|e| e.key.clone());
            for entry in entries {
                rows += 1;
                row(&mut out.plain, space, &entry.key, &entry.value);
                if out.plain.len() >= CHUNK && !out.flush().map_err(|error| failed(&error))? {
                    return Ok(None);
                }
            }
            let Some(last) = last else { break };
            range = (Bound::Excluded(last), Bound::Unbounded);
        }
    }
    out.plain.push(END);
    out.plain.extend_from_slice(&rows.to_be_bytes());
    let Pieces { sealer, plain, mut bytes, .. } = out;
    let end = sealer.finish(&plain).map_err(|error| failed(&error))?;
    bytes += end.len() as u64;
    Ok(sink(end).then_some(Contents { revision, rows, bytes }))
}

struct Pieces<'a, S> {
    sealer: StreamSealer,
    plain: Vec<u8>,
    bytes: u64,
    sink: &'a mut S,
}

impl<S: FnMut(Vec<u8>) -> bool> Pieces<'_, S> {
    fn send(&mut self, piece: Vec<u8>) -> bool {
        self.bytes += piece.len() as u64;
        piece.is_empty() || (self.sink)(piece)
    }

    fn flush(&mut self) -> Result<bool, polykey_hsm::work::WorkError> {
        let sealed = self.sealer.push(&self.plain)?;
        self.plain.clear();
        Ok(self.send(sealed))
    }
}

async fn header(snapshot: &dyn Snapshot, ring: &Ring, now: Time) -> Result<BackupHeader, Error> {
    let read = async |key: &[u8]| {
        let entry = snapshot.get(META, key).await?;
        let missing = || Error::data_loss("the store lacks a row that every store has");
        Ok::<_, Error>(entry.ok_or_else(missing)?.value)
    };
    Ok(BackupHeader {
        node_id: ring.node_id().to_vec().into(),
        epoch: ring.primary_epoch(),
        created_at: now.micros(),
        revision: snapshot.revision().0,
        node: read(meta::NODE).await?,
        slots: read(meta::SLOTS).await?,
        canary: read(meta::CANARY).await?,
        head: read(meta::HEAD).await?,
        software: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

fn prefix(header: &BackupHeader) -> Vec<u8> {
    let header = header.encode_to_vec();
    let mut prefix = Vec::with_capacity(PREFIX + header.len());
    prefix.extend_from_slice(MAGIC);
    prefix.push(FORMAT);
    prefix.extend_from_slice(&u32::try_from(header.len()).unwrap_or(u32::MAX).to_be_bytes());
    prefix.extend_from_slice(&header);
    prefix
}

fn binding(node_id: [u8; 16], prefix: &[u8]) -> Binding<'_> {
    Binding { key_id: node_id, version: 1, context: &[], aad: prefix }
}

fn row(out: &mut Vec<u8>, space: Space, key: &[u8], value: &[u8]) {
    out.push(space.0);
    // The store takes keys of 1 KiB and values of 8 MiB at most.
    out.extend_from_slice(&u16::try_from(key.len()).unwrap_or(u16::MAX).to_be_bytes());
    out.extend_from_slice(key);
    out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(value);
}

/// A backup of which the header has been read, and nothing is believed yet.
pub struct Backup<R> {
    header: BackupHeader,
    node_id: [u8; 16],
    prefix: Vec<u8>,
    rest: R,
}

impl<R> std::fmt::Debug for Backup<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backup").field("revision", &self.header.revision).finish_non_exhaustive()
    }
}

impl<R: Read> Backup<R> {
    /// Begins to read.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn open(mut file: R) -> Result<Self, BackupError> {
        let mut prefix = vec![0; PREFIX];
        file.read_exact(&mut prefix).map_err(short(BackupError::Foreign))?;
        let Some((&format, length)) = prefix.strip_prefix(MAGIC).and_then(<[u8]>::split_first)
        else {
            return Err(BackupError::Foreign);
        };
        if format != FORMAT {
            return Err(BackupError::NewerFormat(format));
        }
        let length = length.try_into().map(u32::from_be_bytes).unwrap_or(u32::MAX);
        if length > HEADER {
            return Err(BackupError::Broken);
        }
        (&mut file).take(length.into()).read_to_end(&mut prefix)?;
        let encoded = prefix.get(PREFIX..).unwrap_or_default();
        if encoded.len() != usize::try_from(length).unwrap_or(usize::MAX) {
            return Err(BackupError::Broken);
        }
        let header = BackupHeader::decode(encoded).map_err(|_| BackupError::Broken)?;
        let node_id = header.node_id.as_ref().try_into().map_err(|_| BackupError::Broken)?;
        Ok(Self { header, node_id, prefix, rest: file })
    }

    /// When it was made.
    #[must_use]
    pub fn created_at(&self) -> Time {
        Time::from_micros(self.header.created_at)
    }

    /// The rows through which its root key is opened and proved, in a store of their own.
    ///
    /// # Errors
    /// [`BackupError::Store`].
    pub async fn root_rows(&self) -> Result<Arc<dyn Store>, BackupError> {
        let store = Memory::new().map_err(CommitError::Store)?;
        let BackupHeader { node, slots, canary, head, .. } = &self.header;
        let commit = Commit::new()
            .put(META, meta::NODE, node.clone())
            .put(META, meta::SLOTS, slots.clone())
            .put(META, meta::CANARY, canary.clone())
            .put(META, meta::HEAD, head.clone());
        store.commit(vec![commit], &mut NoFinish).await?;
        Ok(Arc::new(store))
    }

    /// Writes its rows into an empty store. Nothing in that store may be believed before this returns.
    ///
    /// # Errors
    /// [`BackupError`].
    pub async fn unpack(mut self, ring: &Ring, into: &dyn Store) -> Result<Contents, BackupError> {
        let mut begin = vec![0; STREAM_HEADER_LEN];
        self.rest.read_exact(&mut begin).map_err(short(BackupError::Broken))?;
        let key = ring.backup_key(self.header.epoch)?;
        let binding = binding(self.node_id, &self.prefix);
        let mut opener = key.open_stream(&binding, &begin).map_err(|_| BackupError::Broken)?;
        let mut rows = Rows::default();
        let mut bytes = (self.prefix.len() + begin.len()) as u64;
        let mut piece = vec![0; CHUNK];
        loop {
            let read = self.rest.read(&mut piece)?;
            bytes += read as u64;
            if read == 0 {
                break;
            }
            let sealed = piece.get(..read).unwrap_or_default();
            let opened = opener.push(sealed).map_err(|_| BackupError::Broken)?;
            rows.take(&opened, into).await?;
        }
        let last = opener.finish(&[]).map_err(|_| BackupError::Broken)?;
        rows.take(&last, into).await?;
        let rows = rows.finish(into).await?;
        Ok(Contents { revision: self.header.revision, rows, bytes })
    }
}

/// A file that ends too early is one of another kind, or not whole.
fn short(instead: BackupError) -> impl FnOnce(io::Error) -> BackupError {
    move |error| match error.kind() {
        io::ErrorKind::UnexpectedEof => instead,
        _ => BackupError::Io(error),
    }
}

/// Rows on their way into a store.
#[derive(Default)]
struct Rows {
    plain: Vec<u8>,
    group: Commit,
    bytes: usize,
    count: u64,
    stated: Option<u64>,
}

impl Rows {
    async fn take(&mut self, opened: &[u8], into: &dyn Store) -> Result<(), BackupError> {
        self.plain.extend_from_slice(opened);
        let mut at = 0;
        while self.stated.is_none() {
            let rest = self.plain.get(at..).unwrap_or_default();
            let Some((used, row)) = parse(rest) else { break };
            at += used;
            match row {
                Parsed::Row(space, key, value) => {
                    self.bytes += key.len() + value.len();
                    self.group = std::mem::take(&mut self.group).put(space, key, value);
                    self.count += 1;
                    if self.bytes >= GROUP {
                        self.flush(into).await?;
                    }
                }
                Parsed::End(rows) => self.stated = Some(rows),
            }
        }
        self.plain.drain(..at);
        Ok(())
    }

    async fn flush(&mut self, into: &dyn Store) -> Result<(), BackupError> {
        self.bytes = 0;
        into.commit(vec![std::mem::take(&mut self.group)], &mut NoFinish).await?;
        Ok(())
    }

    async fn finish(mut self, into: &dyn Store) -> Result<u64, BackupError> {
        if self.stated != Some(self.count) || !self.plain.is_empty() {
            return Err(BackupError::Broken);
        }
        self.flush(into).await?;
        Ok(self.count)
    }
}

enum Parsed {
    Row(Space, Vec<u8>, Bytes),
    End(u64),
}

/// The first row and how many bytes it took, once all of it is there.
fn parse(plain: &[u8]) -> Option<(usize, Parsed)> {
    let (&space, rest) = plain.split_first()?;
    if space == END {
        let (rows, _) = rest.split_first_chunk::<8>()?;
        return Some((9, Parsed::End(u64::from_be_bytes(*rows))));
    }
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (key, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into())?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let value = rest.get(..length)?;
    let used = 1 + 2 + key.len() + 4 + value.len();
    Some((used, Parsed::Row(Space(space), key.to_vec(), Bytes::copy_from_slice(value))))
}

#[cfg(test)]
mod tests {
    use polykey_proto::polykey::record::v1::KeyRecord;
    use polykey_storage::conformance::Rng;

    use super::*;
    use crate::time::Clock;

    const NODE: [u8; 16] = [7; 16];

    /// Gives a few bytes at a time.
    struct Slow<'a>(&'a [u8], Rng);

    impl Read for Slow<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let most = 1 + self.1.below(300_000);
            (&mut self.0).take(most as u64).read(out)
        }
    }

    async fn vault(values: usize) -> Vault {
        let clear = vec![
            (META, meta::NODE.to_vec(), b"node".to_vec()),
            (META, meta::SLOTS.to_vec(), b"slots".to_vec()),
        ];
        let nobody = Arc::new(Vec::<Arc<dyn crate::vault::Invalidate>>::new());
        let (store, ring) = (Memory::new().unwrap(), Ring::generate(NODE).unwrap());
        let clock = Clock::manual(Time::from_seconds(1_800_000_000));
        let vault = Vault::create(Arc::new(store), ring, NODE, clear, nobody, clock).await.unwrap();
        let mut tx = vault.begin().await.unwrap();
        for n in 0..values {
            let record = KeyRecord { description: "d".repeat(n * 4001), ..KeyRecord::default() };
            tx.insert(&[u8::try_from(n % 256).unwrap(); 16], &record).unwrap();
        }
        tx.commit().await.unwrap();
        vault
    }

    async fn rows(store: &dyn Store) -> Vec<(u8, Vec<u8>, Bytes)> {
        let mut all = Vec::new();
        for &space in space::ALL {
            let entries = store.scan(space, polykey_storage::all(), Direction::Forward, 1 << 20);
            all.extend(entries.await.unwrap().into_iter().map(|e| (space.0, e.key, e.value)));
        }
        all
    }

    async fn written(vault: &Vault) -> (Vec<u8>, Contents) {
        let mut file = Vec::new();
        let sink = |piece: Vec<u8>| {
            assert!(piece.len() < 12 * CHUNK, "a piece of {} bytes", piece.len());
            file.extend(piece);
            true
        };
        let contents = write(vault, Time::from_micros(5), sink).await.unwrap().unwrap();
        (file, contents)
    }

    #[tokio::test]
    async fn rows_of_any_size_come_back_and_under_no_other_ring() {
        let seed = u64::from_be_bytes(polykey_hsm::random::array().unwrap());
        println!("seed {seed}");
        let vault = vault(90).await;
        let (file, contents) = written(&vault).await;
        assert!(file.len() > 10 * CHUNK, "{}", file.len());
        assert_eq!(contents.bytes, file.len() as u64);
        let target = Memory::new().unwrap();
        let backup = Backup::open(Slow(&file, Rng::new(seed))).unwrap();
        assert_eq!(backup.created_at(), Time::from_micros(5));
        assert_eq!(backup.unpack(&vault.ring(), &target).await.unwrap(), contents);
        assert_eq!(rows(&target).await, rows(vault.store().as_ref()).await);

        let other = Ring::generate(NODE).unwrap();
        let opened = Backup::open(&file[..]).unwrap();
        let refused = opened.unpack(&other, &Memory::new().unwrap()).await;
        assert!(matches!(refused, Err(BackupError::Broken)), "{refused:?}");
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_ends_it() {
        let vault = vault(90).await;
        for pieces in 0..4 {
            let mut left = pieces;
            let sink = |_| {
                left -= 1;
                left >= 0
            };
            assert_eq!(write(&vault, Time::default(), sink).await.unwrap(), None, "{pieces}");
        }
    }

    #[tokio::test]
    async fn what_is_no_backup_or_a_newer_one_is_told_apart() {
        let (file, _) = written(&vault(1).await).await;
        let newer = [&file[..4], &[2], &file[5..]].concat();
        assert!(matches!(Backup::open(&newer[..]), Err(BackupError::NewerFormat(2))));
        for other in [&b""[..], b"PKB", b"PKBX\x01\0\0\0\0", &[0; 100]] {
            assert!(matches!(Backup::open(other), Err(BackupError::Foreign)), "{other:?}");
        }
        // A length that nothing follows takes no memory.
        let long = [&file[..5], &u32::MAX.to_be_bytes(), &file[9..]].concat();
        assert!(matches!(Backup::open(&long[..]), Err(BackupError::Broken)));
        let short = &file[..20];
        assert!(matches!(Backup::open(short), Err(BackupError::Broken)));
    }
}
