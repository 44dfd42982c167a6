//! The file of an anchor: read whole, replaced whole.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// An anchor of 2^64 leaves has fewer bytes.
const MAX_BYTES: u64 = 16 * 1024;

/// The text of the anchor at `path`, if there is one.
///
/// # Errors
/// What the system says, or that it is not a text of at most 16 KiB.
pub(crate) fn read(path: &Path) -> io::Result<Option<String>> {
    // A pipe or a device would hold up whoever opens it.
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
        Ok(found) if !found.is_file() => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file"));
        }
        Ok(_) => {}
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes).ok().filter(|text| text.len() as u64 <= MAX_BYTES);
    let text = text.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is no anchor"));
    text.map(Some)
}

/// Puts `text` at `path`, mode 0600, durable when this returns. At every moment there is the old one or the
/// new one, whole. One process at a time: whoever has the store open.
///
/// # Errors
/// What the system says; the old one may be there still.
pub(crate) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Always of the same name, so that a process that is killed leaves one at most.
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".new");
    let temporary = directory.join(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        // A link that somebody put there is not followed.
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}
