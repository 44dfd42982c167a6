//! The journal: groups that are durable and not yet in the file of the database.
//!
//! A group is appended and synced once; the database takes it in memory. When the journal is full,
//! the next group goes into the database durably, with everything before it, and the journal begins
//! anew under a new salt, which that same transaction writes down. So the entries that count are
//! those that carry the salt in the database, in order from the revision after the database's own:
//! whatever else stands in the file, from earlier rounds, from another store or torn by a power cut,
//! is none.
//!
//! One entry: length of the payload (4 bytes, big endian) ‖ SHA-256 of the payload ‖ payload; the
//! payload: salt (16) ‖ revision (8) ‖ writes, each as kind (1: 0 = delete, 1 = put) ‖ space (1) ‖
//! length of the key (2) ‖ key, and for a put length of the value (4) ‖ value.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use ::redb::StorageBackend;
use bytes::Bytes;
use rustix::{
    fs::{Advice, OFlags, fadvise},
    io::Errno,
};
use sha2::{Digest, Sha256};

use crate::{Revision, RowKey, Space, Write};

pub(super) const SALT_BYTES: usize = 16;
const DIGEST_BYTES: usize = 32;
const FRAME_BYTES: usize = 4 + DIGEST_BYTES;
/// The file is extended by so many zeros at a time, so that few syncs have a new length to write.
const STEP: u64 = 256 * 1024;
/// A file with more bytes is not read into memory.
const MOST: u64 = 1 << 30;

/// Ties entries to one stay of a database.
pub(super) type Salt = [u8; SALT_BYTES];

/// A group as the journal keeps it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) revision: Revision,
    pub(super) writes: Vec<Write>,
}

/// What a journal stands on.
pub(super) struct Medium {
    pub(super) backend: Box<dyn StorageBackend>,
    /// Its name on the disk, where it has one.
    pub(super) name: Option<Name>,
}

/// The name of a file, and the file that stood there when it was opened.
pub(super) struct Name {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Name {
    /// What is wrong if the name is no longer that of the file.
    fn lost(&self) -> io::Result<Option<String>> {
        let path = self.path.display();
        match fs::symlink_metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == (self.device, self.inode) => Ok(None),
            Ok(_) => Ok(Some(format!("another file was put in the place of the journal {path}"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Some(format!("the journal {path} was removed or renamed")))
            }
            Err(error) => Err(error),
        }
    }
}

/// A journal in force.
pub(super) struct Journal {
    medium: Box<dyn StorageBackend>,
    name: Option<Name>,
    salt: Salt,
    at: u64,
    // How far the medium is written, if only with zeros.
    extent: u64,
    capacity: u64,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("at", &self.at).finish_non_exhaustive()
    }
}

impl Journal {
    /// An empty one: whatever the medium holds does not carry this salt.
    pub(super) fn begin(medium: Medium, salt: Salt, capacity: u64) -> io::Result<Self> {
        let Medium { backend: medium, name } = medium;
        // Entries of a store that stood here before must not be met behind one of this store.
        medium.set_len(0)?;
        Ok(Self { medium, name, salt, at: 0, extent: 0, capacity })
    }

    /// Why an opening after a crash would not find it: what went into a file that has lost its name
    /// is durable and out of reach. Costs one look at the directory.
    pub(super) fn lost(&self) -> io::Result<Option<String>> {
        self.name.as_ref().map_or(Ok(None), Name::lost)
    }

    /// Begins anew. Only once the database holds every entry, and the salt.
    pub(super) fn restart(&mut self, salt: Salt) {
        self.salt = salt;
        self.at = 0;
    }

    /// The entry of a group, or `None` if there is no room for it.
    pub(super) fn entry<'a>(
        &self,
        revision: Revision,
        writes: impl Iterator<Item = (&'a RowKey, Option<&'a Bytes>)>,
    ) -> Option<Vec<u8>> {
        let mut entry = vec![0; FRAME_BYTES];
        entry.extend_from_slice(&self.salt);
        entry.extend_from_slice(&revision.0.to_be_bytes());
        for (row, value) in writes {
            entry.push(u8::from(value.is_some()));
            entry.push(row.space.0);
            entry.extend_from_slice(&u16::try_from(row.key.len()).ok()?.to_be_bytes());
            entry.extend_from_slice(&row.key);
            if let Some(value) = value {
                entry.extend_from_slice(&u32::try_from(value.len()).ok()?.to_be_bytes());
                entry.extend_from_slice(value);
            }
            if entry.len() as u64 > self.capacity {
                return None;
            }
        }
        let (frame, payload) = entry.split_at_mut_checked(FRAME_BYTES)?;
        let (length, digest) = frame.split_at_mut_checked(4)?;
        length.copy_from_slice(&u32::try_from(payload.len()).ok()?.to_be_bytes());
        digest.copy_from_slice(&Sha256::digest(&*payload));
        (self.at + entry.len() as u64 <= self.capacity).then_some(entry)
    }

    /// Appends an entry; durable when this returns.
    pub(super) fn append(&mut self, entry: &[u8]) -> io::Result<()> {
        let end = self.at + entry.len() as u64;
        if end > self.extent {
            let to = end.next_multiple_of(STEP);
            let zeros = vec![0; usize::try_from(to - self.extent).unwrap_or(0)];
            self.medium.set_len(to)?;
            self.medium.write(self.extent, &zeros)?;
            self.extent = to;
        }
        self.medium.write(self.at, entry)?;
        self.medium.sync_data()?;
        self.at = end;
        Ok(())
    }
}

/// The entries of a medium that follow `after`, in order and without a gap.
///
/// An entry that a power cut tore is the last one, and was never acknowledged. Whatever stands in the
/// way of an entry that is whole is damage, and an error: what was acknowledged would be passed over.
pub(super) fn entries(
    medium: &dyn StorageBackend,
    salt: &Salt,
    after: Revision,
) -> io::Result<Vec<Entry>> {
    let length = medium.len()?;
    if length > MOST {
        return Err(damaged(format!("the journal has {length} bytes, more than one ever has")));
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    medium.read(0, &mut bytes)?;
    let mut rest = bytes.as_slice();
    let mut found: Vec<Entry> = Vec::new();
    let mut last = None;
    while let Some((entry, behind)) = entry(rest, Some(salt)) {
        // Within one round revisions follow each other; the first may be older than the database.
        if last.is_some_and(|last: u64| entry.revision.0 != last.saturating_add(1)) {
            return Err(damaged(format!("the journal has a gap before {}", entry.revision)));
        }
        last = Some(entry.revision.0);
        if entry.revision > after {
            found.push(entry);
        }
        rest = behind;
    }
    let at = bytes.len() - rest.len();
    if let Some(entry) = whole_entry(rest, salt) {
        let revision = entry.revision;
        return Err(damaged(format!(
            "the journal is damaged at byte {at}, and {revision} stands behind it"
        )));
    }
    // A round begins over the one before, of which the database holds everything.
    if let (None, Some((foreign, _))) = (last, entry(rest, None))
        && foreign.revision > after
    {
        let revision = foreign.revision;
        return Err(damaged(format!(
            "the journal is not of this file, which ends with {after}: it begins with {revision}"
        )));
    }
    if found.first().is_some_and(|first| first.revision.0 != after.0.saturating_add(1)) {
        return Err(damaged("the journal has a gap after what the file holds".to_owned()));
    }
    Ok(found)
}

fn damaged(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Any entry of this round, wherever it begins.
fn whole_entry(bytes: &[u8], salt: &Salt) -> Option<Entry> {
    let starts = bytes.windows(FRAME_BYTES + SALT_BYTES).enumerate();
    let mut carries = starts.filter(|(_, window)| window.ends_with(salt));
    carries.find_map(|(start, _)| Some(entry(bytes.get(start..)?, Some(salt))?.0))
}

/// The entry that the bytes begin with, of this round if one is given.
fn entry<'a>(bytes: &'a [u8], salt: Option<&Salt>) -> Option<(Entry, &'a [u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (digest, rest) = rest.split_first_chunk::<DIGEST_BYTES>()?;
    let (payload, behind) =
        rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    let (of, body) = payload.split_first_chunk::<SALT_BYTES>()?;
    if salt.is_some_and(|salt| of != salt) || Sha256::digest(payload).as_slice() != digest {
        return None;
    }
    let (revision, mut body) = body.split_first_chunk::<8>()?;
    let mut writes = Vec::new();
    while !body.is_empty() {
        let (write, rest) = write(body)?;
        writes.push(write);
        body = rest;
    }
    Some((Entry { revision: Revision(u64::from_be_bytes(*revision)), writes }, behind))
}

fn write(bytes: &[u8]) -> Option<(Write, &[u8])> {
    let (&[kind, space], rest) = bytes.split_first_chunk::<2>()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let row = RowKey::new(Space(space), key);
    match kind {
        0 => Some((Write::Delete { row }, rest)),
        1 => {
            let (length, rest) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
            let (value, rest) = rest.split_at_checked(length)?;
            Some((Write::Put { row, value: Bytes::copy_from_slice(value) }, rest))
        }
        _ => None,
    }
}

/// The journal of the store in the file `path` stands beside it.
#[must_use]
pub fn path_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("-journal");
    name.into()
}

/// Opens the journal file of the store in the file `path`, as the disk has it. Created with
/// `create`, mode 0600, and durable under its name when this returns; `None` if there is none. A
/// symbolic link is refused, as one in the place of the store is.
pub(super) fn open_file(path: &Path, create: bool) -> io::Result<Option<Medium>> {
    let path = path_of(path);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).mode(0o600);
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let file = match options.open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !create => return Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            let path = path.display();
            let text = format!("its journal {path} is a symbolic link; put the file itself there");
            return Err(io::Error::other(text));
        }
        Err(error) => return Err(error),
    };
    let opened = file.metadata()?;
    file.sync_all()?;
    // After a sync that failed, the page cache may show what never reached the disk.
    fadvise(&file, 0, None, Advice::DontNeed)?;
    if create {
        sync_directory(&path)?;
    }
    let name = Name { path, device: opened.dev(), inode: opened.ino() };
    Ok(Some(Medium { backend: Box::new(JournalFile(file)), name: Some(name) }))
}

/// Removes the journal file of the store in the file `path`, if there is one.
pub(super) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path_of(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

#[derive(Debug)]
struct JournalFile(File);

impl StorageBackend for JournalFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn medium() -> Medium {
        Medium { backend: Box::new(::redb::backends::InMemoryBackend::new()), name: None }
    }

    fn write_of(n: u8) -> (RowKey, Option<Bytes>) {
        (
            RowKey::new(Space(n % 3), [n; 5]),
            (!n.is_multiple_of(4)).then(|| vec![n; usize::from(n)].into()),
        )
    }

    fn as_write((row, value): (RowKey, Option<Bytes>)) -> Write {
        match value {
            Some(value) => Write::Put { row, value },
            None => Write::Delete { row },
        }
    }

    fn append(journal: &mut Journal, revision: u64, rows: &[u8]) -> bool {
        let rows: Vec<_> = rows.iter().map(|&n| write_of(n)).collect();
        let writes = rows.iter().map(|(row, value)| (row, value.as_ref()));
        let Some(entry) = journal.entry(Revision(revision), writes) else { return false };
        journal.append(&entry).unwrap();
        true
    }

    fn revisions(journal: &Journal, after: u64) -> Vec<u64> {
        let found = entries(&*journal.medium, &journal.salt, Revision(after)).unwrap();
        found.iter().map(|entry| entry.revision.0).collect()
    }

    #[test]
    fn what_follows_the_database_comes_back() {
        let mut journal = Journal::begin(medium(), [1; 16], 1 << 20).unwrap();
        for revision in 5..9 {
            assert!(append(&mut journal, revision, &[1, 2, 4, 200]));
        }
        assert_eq!(revisions(&journal, 4), [5, 6, 7, 8]);
        assert_eq!(revisions(&journal, 6), [7, 8]);
        assert_eq!(revisions(&journal, 8), [0; 0]);
        let found = entries(&*journal.medium, &[1; 16], Revision(7)).unwrap();
        let expected: Vec<Write> = [1, 2, 4, 200].map(write_of).map(as_write).into();
        assert_eq!(found, [Entry { revision: Revision(8), writes: expected }]);
        // Entries that do not follow the database prove that something is missing.
        assert!(entries(&*journal.medium, &[1; 16], Revision(2)).is_err());
    }

    #[test]
    fn a_new_round_ends_the_last_one() {
        let mut journal = Journal::begin(medium(), [1; 16], 1 << 20).unwrap();
        for revision in 1..6 {
            assert!(append(&mut journal, revision, &[9]));
        }
        journal.restart([2; 16]);
        assert_eq!(revisions(&journal, 5), [0; 0]);
        assert!(append(&mut journal, 6, &[9]));
        // Right behind it stands an entry of the round before, of the same length.
        assert_eq!(revisions(&journal, 5), [6]);
    }

    #[test]
    fn the_journal_of_a_later_file_is_an_error() {
        let mut journal = Journal::begin(medium(), [1; 16], 1 << 20).unwrap();
        for revision in 4..7 {
            assert!(append(&mut journal, revision, &[9]));
        }
        let error = entries(&*journal.medium, &[2; 16], Revision(3)).unwrap_err();
        assert!(error.to_string().contains("not of this file"), "{error}");
        assert_eq!(entries(&*journal.medium, &[2; 16], Revision(6)).unwrap(), []);
        let huge = medium().backend;
        huge.set_len(MOST + 1).unwrap();
        assert!(entries(&*huge, &[1; 16], Revision(0)).is_err());
    }

    #[test]
    fn a_full_journal_takes_nothing() {
        let mut journal = Journal::begin(medium(), [1; 16], 1000).unwrap();
        assert!(append(&mut journal, 1, &[201; 2]));
        assert!(append(&mut journal, 2, &[201]));
        assert!(!append(&mut journal, 3, &[201; 2]));
        assert_eq!(revisions(&journal, 0), [1, 2]);
    }

    proptest! {
        #[test]
        fn a_torn_entry_ends_the_journal(at in 0_usize..2000, bit in 0_u8..8) {
            let mut journal = Journal::begin(medium(), [1; 16], 1 << 20).unwrap();
            let mut ends = vec![0];
            for revision in 1..6 {
                append(&mut journal, revision, &[150, 7]);
                ends.push(usize::try_from(journal.at).unwrap());
            }
            let at = at % ends[5];
            let mut byte = [0];
            journal.medium.read(at as u64, &mut byte).unwrap();
            journal.medium.write(at as u64, &[byte[0] ^ (1 << bit)]).unwrap();
            let whole = ends.iter().filter(|end| **end <= at).count() - 1;
            if whole == 4 {
                prop_assert_eq!(revisions(&journal, 0), [1, 2, 3, 4]);
            } else {
                // What was acknowledged behind the damage is not passed over in silence.
                let error = entries(&*journal.medium, &[1; 16], Revision(0)).unwrap_err();
                let place = format!("damaged at byte {}", ends[whole]);
                prop_assert!(error.to_string().contains(&place), "{}", error);
            }
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()
        ) {
            let medium = medium().backend;
            let mut content = bytes.clone();
            if framed {
                let payload = [&[1; 16], bytes.as_slice()].concat();
                content = u32::try_from(payload.len()).unwrap().to_be_bytes().to_vec();
                content.extend_from_slice(&Sha256::digest(&payload));
                content.extend_from_slice(&payload);
            }
            medium.set_len(content.len() as u64).unwrap();
            medium.write(0, &content).unwrap();
            drop(entries(&*medium, &[1; 16], Revision(0)));
        }
    }
}
