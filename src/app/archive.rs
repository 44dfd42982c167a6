//! The archiving of old leaves of the audit log into files of a directory, as `[audit] keep` and `archive`
//! say.
//!
//! A file is written beside its place, made durable, put there, read again and verified; only then are its
//! leaves recorded as archived and taken out of the store. A file that lies there already, as after a crash
//! between the two, is taken if it is what it should be.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{Context, SHA256};
use parking_lot::Mutex;
use polykey_storage::replicated::Replicated;
use rustix::fs::FlockOperation;
use tokio::time::MissedTickBehavior;

use super::{App, event};
use crate::audit::event::bounded;
use crate::audit::export::{ExportWriter, leaves, verify_export};
use crate::audit::{Archive, Checkpoint, Claim, Had, Sinks, Trail, VerifyingKey};
use crate::config::Archiving;
use crate::custody::signing::{self, Purpose};
use crate::error::Error;
use crate::health::State;
use crate::jobs::Runner;
use crate::time::Time;
use crate::vault::tree::{Frontier, Hash};
use crate::webhook::Webhooks;

/// How often it is looked whether something is to be archived, at most and at least.
const LOOKS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// Into how many files the leaves of the time that they are kept go.
const FILES: u32 = 30;
/// Leaves read at a time: some may have a MiB.
const BITE: usize = 16;

/// Archives what is older than it is to be kept.
pub(super) struct Archiver {
    settings: Option<Archiving>,
    trail: Arc<Trail>,
    sinks: Arc<Sinks>,
    webhooks: Arc<Webhooks>,
    jobs: Arc<Runner>,
    replication: Option<Arc<Replicated>>,
    /// The directory as it was at the start; a sandbox lets the node write in no other.
    confined: Option<Option<Identity>>,
    trouble: Mutex<Option<String>>,
}

/// By what a directory is told from another at its place: device and inode.
type Identity = (u64, u64);

fn identity(directory: &Path) -> Option<Identity> {
    let found = fs::metadata(directory).ok()?;
    Some((found.dev(), found.ino()))
}

/// What keeps leaves from being archived.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{path}: {1}", path = .0.display())]
    File(PathBuf, io::Error),
    #[error("{path}: {1}; move it away, and it is written anew", path = .0.display())]
    Foreign(PathBuf, String),
    #[error(
        "{path}: {1}. It must be there before the node starts, which writes in no directory that is made later \
         ([runtime] sandbox): restart the node",
        path = .0.display()
    )]
    Late(PathBuf, io::Error),
    #[error("{0}: {text}", text = .0.internal_text().unwrap_or_default())]
    Log(#[from] Error),
}

impl Archiver {
    pub(super) fn new(
        (settings, sandbox): (Option<Archiving>, bool),
        trail: &Arc<Trail>,
        (sinks, webhooks): (&Arc<Sinks>, &Arc<Webhooks>),
        jobs: &Arc<Runner>,
        replication: Option<&Arc<Replicated>>,
    ) -> Arc<Self> {
        let confined = settings.as_ref().filter(|_| sandbox);
        let confined = confined.map(|settings| identity(&settings.directory));
        Arc::new(Self {
            settings,
            confined,
            trail: Arc::clone(trail),
            sinks: Arc::clone(sinks),
            webhooks: Arc::clone(webhooks),
            jobs: Arc::clone(jobs),
            replication: replication.map(Arc::clone),
            trouble: Mutex::new(None),
        })
    }

    /// For health.
    pub(super) fn state(&self) -> State {
        match &*self.trouble.lock() {
            None => State::Serving,
            Some(why) => {
                let text =
                    format!("[audit] archive: {why}; the leaves stay in the store until then");
                State::Degraded(text.into())
            }
        }
    }

    fn tell(&self, trouble: Option<String>) {
        let mut told = self.trouble.lock();
        if *told != trouble {
            match &trouble {
                Some(why) => tracing::warn!(why, "the audit log cannot be archived"),
                None => tracing::info!("the audit log can be archived again"),
            }
            *told = trouble;
        }
    }

    /// Archives what is due now.
    async fn due(&self, settings: &Archiving) -> Result<Option<Archive>, Trouble> {
        let (trail, vault) = (&self.trail, self.trail.vault());
        // By a clock that may be wrong, everything might be old.
        if self.jobs.clock_in_doubt() {
            return Ok(None);
        }
        let now = vault.clock().now();
        let step = settings.keep / FILES;
        let work = &self.jobs.work().archive;
        let due = trail.oldest().await?.map(|oldest| oldest.plus(settings.keep + step));
        let look = now.plus(looks(settings.keep));
        work.expect(Some(due.map_or(look, |due| due.max(look))));
        if due.is_none_or(|due| due > now) {
            return Ok(None);
        }
        let shipped = self.replication.as_ref().map(|target| target.shipping().shipped);
        let had = self.sinks.had(shipped).await?.and(self.webhooks.least().await?);
        let keep = i64::try_from(settings.keep.as_micros()).unwrap_or(i64::MAX);
        let before = Some(Time::from_micros(now.micros().saturating_sub(keep)));
        let Some(checkpoint) = trail.archivable(&had, None, before).await? else {
            return Ok(None);
        };
        let archived = Box::pin(self.put_away(settings, checkpoint, &had, now));
        let words = |trouble: &Trouble| trouble.to_string();
        work.track_as(vault.clock(), archived, words).await
    }

    /// Brings everything before a checkpoint into a file.
    async fn put_away(
        &self,
        settings: &Archiving,
        checkpoint: Checkpoint,
        had: &Had,
        now: Time,
    ) -> Result<Option<Archive>, Trouble> {
        let (trail, vault) = (&self.trail, self.trail.vault());
        let (first, log) = trail.kept().await?;
        let keys = signing::list(vault, Purpose::Checkpoint).await?;
        let work = Work {
            trail: Arc::clone(trail),
            directory: settings.directory.clone(),
            log,
            checkpoint: checkpoint.clone(),
            keys: keys.iter().map(|key| VerifyingKey(*key.public())).collect(),
        };
        let runtime = tokio::runtime::Handle::current();
        let written = tokio::task::spawn_blocking(move || runtime.block_on(work.file())).await;
        let written = written.map_err(|e| Error::internal(e.to_string()))?;
        let written = written.map_err(|trouble| self.late(&settings.directory, trouble))?;
        // The directory is this process's until what is in the file is recorded, or the file gone.
        let Some(Written { path, sha256, made, lock: _lock }) = written else { return Ok(None) };
        let claim = Claim {
            first,
            end: checkpoint.size,
            root: checkpoint.root,
            file: path.display().to_string(),
            host: host(),
            sha256,
        };
        let mut event = event("ArchiveAudit", now);
        let detail = |(name, text): (&str, String)| (name.to_owned(), bounded(&text).into_owned());
        event.details = claim.details().into_iter().map(detail).collect();
        match trail.archive(claim, had, event).await {
            Ok(archive) => Ok(Some(archive)),
            Err(Error::Conflict) => {
                // Another node was faster: once is enough.
                let name = path.display().to_string();
                if made && trail.archives().await?.iter().all(|archive| archive.file != name) {
                    fs::remove_file(&path).map_err(|error| Trouble::File(path, error))?;
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

impl Archiver {
    /// Says of a directory that is not the one of the start why it cannot be written in.
    fn late(&self, directory: &Path, trouble: Trouble) -> Trouble {
        let other = self.confined.is_some_and(|then| then.is_none() || then != identity(directory));
        match trouble {
            Trouble::File(_, error)
                if other
                    && matches!(
                        error.kind(),
                        io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound
                    ) =>
            {
                Trouble::Late(directory.to_owned(), error)
            }
            trouble => trouble,
        }
    }
}

/// How often it is looked for what has come due.
fn looks(keep: Duration) -> Duration {
    (keep / FILES).clamp(LOOKS.0, LOOKS.1)
}

/// Finishes what a crash left undone, and archives what comes due, for ever.
pub(super) async fn run(app: Arc<App>) {
    let archiver = &app.archiver;
    let keep = archiver.settings.as_ref().map_or(LOOKS.1, |settings| settings.keep);
    let mut looks = tokio::time::interval(looks(keep));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let result = match archiver.trail.trim().await {
            Ok(()) => match &archiver.settings {
                Some(settings) => Box::pin(archiver.due(settings)).await,
                None => Ok(None),
            },
            Err(error) => Err(error.into()),
        };
        match &result {
            Ok(Some(Archive { first, end, file, .. })) => {
                tracing::info!(first, end, file, "a part of the audit log was archived");
            }
            Ok(None) => {}
            // A store that is away says so itself.
            Err(Trouble::Log(Error::Unavailable { .. } | Error::OutcomeUnknown { .. })) => continue,
            Err(_) => {}
        }
        archiver.tell(result.err().map(|trouble| trouble.to_string()));
    }
}

/// The name of the machine.
fn host() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().chars().filter(char::is_ascii_graphic).take(255).collect()
}

/// A file that was verified.
struct Written {
    path: PathBuf,
    sha256: Hash,
    /// Whether it was not there before.
    made: bool,
    /// Of the directory.
    lock: File,
}

/// What is to be in a file.
struct Work {
    trail: Arc<Trail>,
    directory: PathBuf,
    /// The tree over the leaves before.
    log: Frontier,
    checkpoint: Checkpoint,
    keys: Vec<VerifyingKey>,
}

impl Work {
    /// The file, durable and verified; `None` while another process archives into the same directory.
    async fn file(&self) -> Result<Option<Written>, Trouble> {
        let at = |path: &Path| {
            let path = path.to_owned();
            move |error| Trouble::File(path.clone(), error)
        };
        let (first, end) = (self.log.size(), self.checkpoint.size);
        let path = self.directory.join(format!("audit-{first:012}-{end:012}.jsonl"));
        let lock = File::open(&self.directory).map_err(at(&self.directory))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            locked => locked.map_err(|error| at(&self.directory)(error.into()))?,
        }
        let made = !path.try_exists().map_err(at(&path))?;
        if made {
            let beside = self.directory.join(".archive.partial");
            self.write(&beside).await?;
            fs::rename(&beside, &path).map_err(at(&path))?;
            lock.sync_all().map_err(at(&self.directory))?;
        } else {
            // Whether it was made durable is not known.
            File::open(&path).and_then(|file| file.sync_all()).map_err(at(&path))?;
            lock.sync_all().map_err(at(&self.directory))?;
        }
        let sha256 = self.verify(&path)?;
        Ok(Some(Written { path, sha256, made, lock }))
    }

    async fn write(&self, path: &Path) -> Result<(), Trouble> {
        let failed = |error| Trouble::File(path.to_owned(), error);
        let options =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        let out = BufWriter::new(options.map_err(failed)?);
        let mut writer = ExportWriter::behind(&self.log, out, &self.checkpoint.origin, &self.keys)
            .map_err(failed)?;
        let (mut next, end) = (self.log.size(), self.checkpoint.size);
        while next < end {
            let limit = usize::try_from(end - next).unwrap_or(BITE).min(BITE);
            let step = leaves(self.trail.vault(), next, limit).await?;
            if step.is_empty() {
                return Err(Error::data_loss(format!("audit leaf {next} is missing")).into());
            }
            for leaf in step {
                writer.leaf(&leaf).map_err(failed)?;
                next += 1;
            }
        }
        writer.checkpoint(&self.checkpoint.note).map_err(failed)?;
        let mut out = writer.end().map_err(failed)?;
        out.flush().map_err(failed)?;
        out.get_ref().sync_all().map_err(failed)
    }

    /// Reads the file as whoever audits it will, and gives its SHA-256.
    fn verify(&self, path: &Path) -> Result<Hash, Trouble> {
        let failed = |error| Trouble::File(path.to_owned(), error);
        let foreign = |why: String| Trouble::Foreign(path.to_owned(), why);
        let mut digest = Digest(File::open(path).map_err(failed)?, Context::new(&SHA256));
        let kept = std::slice::from_ref(&self.checkpoint);
        let report =
            verify_export(BufReader::new(&mut digest), &self.keys, kept).map_err(failed)?;
        if let Some(finding) = report.findings.first() {
            return Err(foreign(finding.clone()));
        }
        let (end, first) = (self.checkpoint.size, self.log.size());
        if report.leaves != end || report.covered != end || report.read != end - first {
            return Err(foreign(format!("it does not hold the leaves from {first} to {end}")));
        }
        io::copy(&mut digest, &mut io::sink()).map_err(failed)?;
        let mut hash = [0; 32];
        hash.copy_from_slice(digest.1.finish().as_ref());
        Ok(hash)
    }
}

/// A file whose bytes are hashed as they are read.
struct Digest(File, Context);

impl Read for Digest {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(into)?;
        self.1.update(into.get(..read).unwrap_or_default());
        Ok(read)
    }
}
