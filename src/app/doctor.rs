//! `polykey doctor`: what `check` looks at, and the machine beneath: devices and services are asked,
//! and a file is written to learn what a sync costs. Nothing is left behind.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use polykey_hsm::{Deadline, KeyMaterial, SlotKind, WrapContext, random};
use rustix::process::Resource;

use super::{Finding, check, secrets};
use crate::config::Config;
use crate::custody::NamedWrapper;
use crate::net::tls::TlsState;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// Works, and somebody should look.
    Warning,
    /// Does not work, or will not.
    Error,
}

/// One thing that was looked at.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    /// What it was.
    pub subject: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub text: String,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Diagnosis {
    /// As it should be.
    #[must_use]
    pub fn ok(subject: &'static str, text: impl Into<String>) -> Self {
        Self { subject, level: Level::Ok, text: text.into(), remedy: None }
    }

    /// Not so, and what to do.
    #[must_use]
    pub fn not(
        subject: &'static str,
        level: Level,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { subject, level, text: text.into(), remedy: Some(remedy.into()) }
    }
}

const DAY: u64 = 86_400;
/// Days of life below which a certificate is worth a word.
const RENEW: u64 = 30;
const MIB: u64 = 1024 * 1024;
/// Free space below which there is a warning, and below which there is an error.
const SPACE: (u64, u64) = (1024 * MIB, 64 * MIB);
/// Syncs that are timed, and the middle time above which a node is slow.
const SYNCS: usize = 21;
const SLOW: Duration = Duration::from_millis(20);
/// For a device or service to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// File descriptors besides those of connections.
const FILES: u64 = 256;

/// Looks at the configuration, what it names, and the machine.
pub async fn examine(config: &Config) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    for Finding { subject, result } in check(config).await {
        found.push(match result {
            Ok(text) => Diagnosis::ok(subject, text),
            Err(error) => Diagnosis {
                subject,
                level: Level::Error,
                text: error.to_string(),
                remedy: error.hint(),
            },
        });
    }
    found.extend(certificate(config).await);
    found.extend(wrappers(config).await);
    found.extend(permissions(config));
    found.push(clock(config));
    found.extend(disk(config));
    found.push(entropy());
    found.extend(limits(config));
    found.push(kernel(config));
    found
}

async fn certificate(config: &Config) -> Option<Diagnosis> {
    let texts = Box::pin(secrets::tls(config)).await.ok()?;
    let tls = TlsState::load_with(config.listen.tls.clone(), &texts).ok()?;
    let left = tls.certificate_not_after().saturating_sub(tls.now().as_secs()) / DAY;
    let text = format!("{left} days left");
    Some(if left >= RENEW {
        Diagnosis::ok("server certificate", text)
    } else {
        let remedy =
            "Put a new one in its place; the node reads it within 10 s, or on `polykey reload`.";
        Diagnosis::not("server certificate", Level::Warning, text, remedy)
    })
}

/// Each wrapper wraps a key of this moment and opens it again.
async fn wrappers(config: &Config) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    let (opened, _) = NamedWrapper::open_all(config).await;
    for named in opened {
        // Its members are asked one by one.
        if matches!(named.wrapper.kind(), SlotKind::Quorum | SlotKind::Recovery) {
            continue;
        }
        let begun = Instant::now();
        let asked = async {
            let secret = random::array::<32>().map_err(|error| error.to_string())?;
            let key =
                KeyMaterial::from_secret(secret.to_vec()).map_err(|error| error.to_string())?;
            let place = WrapContext { node_id: [0; 16], purpose: "doctor", slot_id: [0; 16] };
            let deadline = Deadline::after(PATIENCE);
            let say = |error: polykey_hsm::WrapError| match named.wrapper.last_failure() {
                Some(why) => format!("{error}: {why}"),
                None => error.to_string(),
            };
            let wrapped = named.wrapper.wrap_key(&key, &place, deadline).await.map_err(say)?;
            named.wrapper.unwrap_key(&wrapped, &place, deadline).await.map_err(say).map(drop)
        };
        let name = &named.name;
        found.push(match asked.await {
            Ok(()) => {
                let took = begun.elapsed().as_secs_f64() * 1e3;
                Diagnosis::ok("wrapper", format!("{name} wraps and opens, {took:.1} ms"))
            }
            Err(why) => Diagnosis::not(
                "wrapper",
                Level::Error,
                format!("{name}: {why}"),
                "The node cannot open its root key, or hardened keys, by this one until it answers.",
            ),
        });
    }
    found
}

/// Whoever can write the configuration or a policy can do anything the node can.
fn permissions(config: &Config) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    let files = std::iter::once(&config.file).chain(&config.policies);
    for path in files.chain([&config.listen.tls.certificate, &config.listen.tls.client_ca]) {
        let us = rustix::process::geteuid().as_raw();
        // Whoever can write the directory can put another file there.
        for place in std::iter::once(path.as_path()).chain(path.parent()) {
            let Ok(meta) = fs::metadata(place) else { continue };
            let (mode, name) = (meta.mode() & 0o7777, place.display());
            let sticky = meta.is_dir() && mode & 0o1000 != 0;
            let mut wrong = |text: String, remedy: String| {
                let one = Diagnosis::not("permissions", Level::Error, text, remedy);
                if !found.iter().any(|other: &Diagnosis| other.text == one.text) {
                    found.push(one);
                }
            };
            if mode & 0o022 != 0 && !sticky {
                wrong(
                    format!("{name} can be written by others (mode {mode:04o})"),
                    format!("chmod go-w {name}"),
                );
            }
            if ![0, us].contains(&meta.uid()) {
                wrong(
                    format!("{name} belongs to user {}", meta.uid()),
                    "It should be root's; or run this as the user of the node.".to_owned(),
                );
            }
        }
    }
    if found.is_empty() {
        found.push(Diagnosis::ok(
            "permissions",
            "what steers the node is its owner's alone to write",
        ));
    }
    found
}

fn clock(config: &Config) -> Diagnosis {
    let now = SystemTime::now();
    let written = fs::metadata(&config.storage.path).and_then(|meta| meta.modified()).ok();
    let ahead = written.and_then(|at| at.duration_since(now).ok()).unwrap_or_default();
    if ahead > Duration::from_secs(60) {
        let text = format!("{} s behind the last write of the store", ahead.as_secs());
        return Diagnosis::not(
            "clock",
            Level::Error,
            text,
            "Set it: nothing comes due until it has caught up.",
        );
    }
    let kept = ["/run/systemd/timesync/synchronized", "/run/chrony/chronyd.pid", "/run/ntpd.pid"];
    let text = match kept.iter().any(|path| Path::new(path).exists()) {
        true => "kept right by a time service",
        false => "plausible; no time service was found that keeps it so",
    };
    Diagnosis::ok("clock", text)
}

fn disk(config: &Config) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    let embedded = config.storage.database.is_none();
    let place = match config.storage.database {
        Some(_) => Some(config.node.data_dir.as_path()),
        None => config.storage.path.parent(),
    };
    let Some(place) = place.filter(|place| place.is_dir()) else { return found };
    if let Ok(fs) = rustix::fs::statvfs(place) {
        let (free, all) = (fs.f_bavail * fs.f_frsize, fs.f_blocks * fs.f_frsize);
        let text = format!("{} of {} MiB free", free / MIB, all / MIB);
        let remedy = "Make room: without space for its records the node refuses changes.";
        found.push(match free {
            free if free < SPACE.1 => Diagnosis::not("disk", Level::Error, text, remedy),
            free if free < SPACE.0 => Diagnosis::not("disk", Level::Warning, text, remedy),
            _ => Diagnosis::ok("disk", text),
        });
    }
    if !embedded {
        return found;
    }
    let kind = rustix::fs::statfs(place).map_or(0, |fs| fs.f_type);
    // linux/magic.h.
    let remedy = "Keep the store on a local disk.";
    let odd = match kind {
        0x0102_1994 => Some("the store is in memory (tmpfs): it is gone when the machine stops"),
        0x6969 => {
            Some("the store is on NFS, where locks and syncs are what the server makes of them")
        }
        _ => None,
    };
    found.extend(odd.map(|text| Diagnosis::not("file system", Level::Warning, text, remedy)));
    found.push(match syncs(place) {
        Ok(middle) => {
            let text = format!("a write is durable after {:.2} ms", middle.as_secs_f64() * 1e3);
            match middle > SLOW {
                true => Diagnosis::not(
                    "fsync",
                    Level::Warning,
                    text,
                    "Every change waits for one: use a faster disk, or one with a protected cache.",
                ),
                false => Diagnosis::ok("fsync", text),
            }
        }
        Err(error) => Diagnosis::not(
            "fsync",
            Level::Error,
            format!("{}: {error}", place.display()),
            "The node must be able to write there; run this as the user it runs as.",
        ),
    });
    found
}

/// The middle time of a write of 4 KiB and its sync, in a file that has no name.
fn syncs(place: &Path) -> std::io::Result<Duration> {
    // O_TMPFILE: there is nothing to be left behind.
    let flags = i32::try_from(rustix::fs::OFlags::TMPFILE.bits()).unwrap_or_default();
    let mut options = fs::OpenOptions::new();
    options.write(true).mode(0o600);
    let mut file = match options.clone().custom_flags(flags).open(place) {
        // NFS and FUSE know no files without a name.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let named = place.join(format!(".doctor-{}", std::process::id()));
            let file = options.create_new(true).open(&named)?;
            fs::remove_file(&named)?;
            file
        }
        file => file?,
    };
    let mut times = Vec::new();
    for _ in 0..SYNCS {
        let begun = Instant::now();
        file.write_all(&[0; 4096])?;
        file.sync_data()?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    Ok(times.get(SYNCS / 2).copied().unwrap_or_default())
}

fn entropy() -> Diagnosis {
    match random::array::<32>() {
        Ok(_) => Diagnosis::ok("entropy", "the system's generator answers"),
        Err(error) => Diagnosis::not(
            "entropy",
            Level::Error,
            error.to_string(),
            "No keys can be made until it does.",
        ),
    }
}

fn limits(config: &Config) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    // The node raises the first to the second itself.
    let files = rustix::process::getrlimit(Resource::Nofile).maximum;
    let needed = config.listen.net.max_connections as u64 + FILES;
    let text = files.map_or("no limit".to_owned(), |files| format!("{files} files in this shell"));
    found.push(match files.is_some_and(|files| files < needed) {
        true => Diagnosis::not(
            "limits",
            Level::Warning,
            format!("{text}, and [listen] max_connections needs {needed}"),
            "Raise LimitNOFILE, or lower max_connections.",
        ),
        false => Diagnosis::ok("limits", text),
    });
    let locked = rustix::process::getrlimit(Resource::Memlock).current;
    if let Some(bytes) = locked.filter(|_| config.runtime.lock_memory) {
        let text =
            format!("[runtime] lock_memory, and {} KiB may be locked in this shell", bytes / 1024);
        let remedy = "The node's unit needs LimitMEMLOCK=infinity; its log says if it lacks it.";
        found.push(Diagnosis::not("limits", Level::Warning, text, remedy));
    }
    found
}

fn kernel(config: &Config) -> Diagnosis {
    const SUBJECT: &str = "confinement";
    if !config.runtime.sandbox {
        let remedy = "Remove `sandbox = false` from [runtime].";
        return Diagnosis::not(SUBJECT, Level::Warning, "switched off", remedy);
    }
    match crate::hardening::lacking(config) {
        None => Diagnosis::ok(SUBJECT, "Landlock and seccomp"),
        Some(why) => Diagnosis::not(
            SUBJECT,
            Level::Warning,
            why,
            "The node works without; a unit's ProtectSystem= and SystemCallFilter= do a part of it.",
        ),
    }
}
