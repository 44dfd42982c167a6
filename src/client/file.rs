//! Files that appear whole or not at all, and secrets that only their owner can read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;
use zeroize::Zeroizing;

/// Mode of a file with a secret.
pub(crate) const PRIVATE: u32 = 0o600;
/// Mode of a file without.
pub(crate) const PUBLIC: u32 = 0o644;

/// A file being written beside the place it will have. Dropped before [`Self::finish`], it is gone.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: Option<File>,
    temporary: PathBuf,
    path: PathBuf,
}

impl NewFile {
    /// Begins a file that only its owner can read until it is finished.
    ///
    /// What is there and no file (a device, a pipe) is written to as it is: a rename would put a file in
    /// its place, and its mode is not ours to set.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            let file = OpenOptions::new().write(true).open(path)?;
            return Ok(Self { file: Some(file), temporary: PathBuf::new(), path: path.to_owned() });
        }
        let name = path
            .file_name()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", Uuid::now_v7().simple()));
        let temporary = path.with_file_name(hidden);
        let file =
            OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(&temporary)?;
        Ok(Self { file: Some(file), temporary, path: path.to_owned() })
    }

    /// Makes it durable and puts it in its place, over whatever was there.
    pub(crate) fn finish(mut self, mode: u32) -> io::Result<()> {
        if let Some(file) = self.file.take() {
            if self.temporary.as_os_str().is_empty() {
                return Ok(());
            }
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()?;
            drop(file);
            fs::rename(&self.temporary, &self.path)?;
            let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            self.temporary = PathBuf::new();
        }
        Ok(())
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.as_mut().map_or(Ok(0), |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            drop(fs::remove_file(&self.temporary));
        }
    }
}

/// Writes a whole file.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes)?;
    file.finish(mode)
}

/// Reads at most `limit` bytes of a file, or of standard input for `-`.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    if path == Path::new("-") {
        take(io::stdin().lock(), limit)
    } else {
        take(File::open(path)?, limit)
    }
}

fn take(source: impl Read, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    // Room for all of it, so that no copy is left behind by growing.
    let room = usize::try_from(limit.min(64 * 1024)).unwrap_or(0);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room + 1));
    source.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("larger than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

/// Reads a text secret without the white space around it; others must not be able to read the file.
pub(crate) fn read_secret(path: &Path, limit: u64) -> io::Result<Zeroizing<String>> {
    if path != Path::new("-") {
        let mode = fs::metadata(path)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "mode {mode:04o} lets others read this secret; run `chmod 600 {}`",
                    path.display()
                ),
            ));
        }
    }
    let bytes = read(path, limit)?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not text"))?;
    Ok(Zeroizing::new(text.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_written_to_and_left_as_it_is() {
        use std::os::unix::fs::FileTypeExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        let mode = fs::metadata("/dev/null").unwrap().mode();
        write(&path, b"gone", PRIVATE).unwrap();
        assert!(path.is_symlink(), "nothing takes its place");
        let device = fs::metadata("/dev/null").unwrap();
        assert!(device.file_type().is_char_device() && device.mode() == mode);
    }

    #[test]
    fn a_file_appears_whole_and_private_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let mut file = NewFile::create(&path).unwrap();
        file.write_all(b"half").unwrap();
        drop(file);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        write(&path, b"whole", PRIVATE).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        write(&path, b"other", PUBLIC).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        assert_eq!(fs::read(&path).unwrap(), b"other");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write(&path, b" pk_secret\n", PUBLIC).unwrap();
        let refused = read_secret(&path, 100).unwrap_err().to_string();
        assert!(refused.contains("chmod 600") && !refused.contains("pk_secret"), "{refused}");
        write(&path, b" pk_secret\n", PRIVATE).unwrap();
        assert_eq!(&**read_secret(&path, 100).unwrap(), "pk_secret");
        assert!(read_secret(&path, 5).unwrap_err().to_string().contains("larger than 5 bytes"));
    }
}
