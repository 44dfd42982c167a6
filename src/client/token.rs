//! Tokens at rest: one file beside the profile that its owner alone can read, and a lock around it.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::file;
use crate::time::Time;

/// Largest token file that is read, in bytes.
const MAX_BYTES: u64 = 256 * 1024;
/// A token that ends sooner than this is exchanged first.
const MARGIN: Duration = Duration::from_secs(30);

/// The tokens of a login, and what they are good for.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub struct Token {
    /// Server, client and certificate that they were issued to.
    #[zeroize(skip)]
    pub(super) binding: Binding,
    pub(super) access_token: String,
    /// Microseconds since the Unix epoch, by our clock.
    pub(super) access_expires_at: i64,
    pub(super) refresh_token: String,
    /// Microseconds since the Unix epoch, by our clock.
    pub(super) refresh_expires_at: i64,
}

/// What tokens are bound to: with any other server, client or certificate they are useless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Binding {
    pub(super) address: String,
    pub(super) client_id: String,
    /// Of the certificate file, in hexadecimal.
    pub(super) certificate_sha256: String,
}

impl Token {
    /// The access token, for the metadata `authorization: Bearer TOKEN`.
    #[must_use]
    pub fn access_token(&self) -> &str {
        &self.access_token
    }

    /// The refresh token; empty if the server gave none.
    #[must_use]
    pub fn refresh_token(&self) -> &str {
        &self.refresh_token
    }

    /// When the access token ends, by our clock.
    #[must_use]
    pub fn access_expires_at(&self) -> Time {
        Time::from_micros(self.access_expires_at)
    }

    /// When the refresh token ends, by our clock.
    #[must_use]
    pub fn refresh_expires_at(&self) -> Time {
        Time::from_micros(self.refresh_expires_at)
    }

    pub(super) fn is_fresh(&self, now: Time) -> bool {
        now.plus(MARGIN) < self.access_expires_at()
    }

    pub(super) fn can_refresh(&self, now: Time) -> bool {
        !self.refresh_token.is_empty() && now.plus(MARGIN) < self.refresh_expires_at()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("binding", &self.binding)
            .field("access_expires_at", &self.access_expires_at())
            .finish_non_exhaustive()
    }
}

/// A token file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct TokenError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// The token file of a profile.
#[derive(Clone, Debug)]
pub struct TokenCache {
    path: PathBuf,
}

/// While this lives, no other process and no other thread exchanges the tokens of the cache.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct TokenLock {
    _file: File,
}

impl TokenCache {
    /// The cache in this file, which need not exist.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until nobody else has the lock, then takes it. Blocks the thread.
    ///
    /// The lock is on a file of its own, since the token file is replaced by renaming.
    ///
    /// # Errors
    /// [`TokenError`] when the lock file cannot be made.
    pub fn lock(&self) -> Result<TokenLock, TokenError> {
        let path = self.path.with_extension("lock");
        let lock = || -> io::Result<File> {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(file::PRIVATE)
                .open(&path)?;
            loop {
                match rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive) {
                    Ok(()) => return Ok(file),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        };
        match lock() {
            Ok(file) => Ok(TokenLock { _file: file }),
            Err(source) => Err(TokenError { path, source }),
        }
    }

    /// The tokens there. A file that is missing or damaged holds none.
    #[must_use]
    pub fn read(&self) -> Option<Token> {
        let bytes = file::read(&self.path, MAX_BYTES).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Puts `token` in place of what is there, readable by its owner alone.
    ///
    /// # Errors
    /// [`TokenError`] when the file cannot be written.
    pub fn write(&self, _lock: &TokenLock, token: &Token) -> Result<(), TokenError> {
        let error = |source| TokenError { path: self.path.clone(), source };
        let text = serde_json::to_vec(token).map_err(|e| error(e.into()))?;
        let text = zeroize::Zeroizing::new(text);
        file::write(&self.path, &text, file::PRIVATE).map_err(error)
    }

    /// Removes the file.
    ///
    /// # Errors
    /// [`TokenError`] when it is there and cannot be removed.
    pub fn clear(&self, _lock: &TokenLock) -> Result<(), TokenError> {
        match std::fs::remove_file(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(TokenError { path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn token(number: i64) -> Token {
        Token {
            binding: Binding {
                address: "https://localhost:1".into(),
                client_id: "c".into(),
                certificate_sha256: String::new(),
            },
            access_token: format!("v4.public.canary{number}"),
            access_expires_at: number,
            refresh_token: "v4.public.canary".into(),
            refresh_expires_at: i64::MAX,
        }
    }

    #[test]
    fn the_file_is_private_and_debug_shows_no_token() {
        let dir = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(dir.path().join("token.json"));
        assert!(cache.read().is_none());
        let lock = cache.lock().unwrap();
        cache.write(&lock, &token(7)).unwrap();
        assert_eq!(std::fs::metadata(cache.path()).unwrap().mode() & 0o7777, 0o600);
        let read = cache.read().unwrap();
        assert_eq!(read.access_token(), "v4.public.canary7");
        assert!(!format!("{read:?}").contains("canary"));
        std::fs::write(cache.path(), "{damaged").unwrap();
        assert!(cache.read().is_none());
        cache.clear(&lock).unwrap();
        cache.clear(&lock).unwrap();
        assert!(!cache.path().exists());
    }

    #[test]
    fn the_lock_keeps_read_and_write_together() {
        const THREADS: i64 = 2;
        const ROUNDS: i64 = 100;
        let dir = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(dir.path().join("token.json"));
        cache.write(&cache.lock().unwrap(), &token(0)).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..ROUNDS {
                        let lock = cache.lock().unwrap();
                        let before = cache.read().unwrap().access_expires_at;
                        std::thread::yield_now();
                        cache.write(&lock, &token(before + 1)).unwrap();
                    }
                });
            }
        });
        assert_eq!(cache.read().unwrap().access_expires_at, THREADS * ROUNDS);
    }

    #[test]
    fn a_token_is_exchanged_before_it_ends() {
        let now = Time::from_seconds(1_000);
        let ends_in = |seconds| {
            let mut token = token(0);
            token.access_expires_at = now.plus_seconds(seconds).micros();
            token.refresh_expires_at = token.access_expires_at;
            token
        };
        assert!(ends_in(31).is_fresh(now) && ends_in(31).can_refresh(now));
        assert!(!ends_in(30).is_fresh(now) && !ends_in(30).can_refresh(now));
    }
}
