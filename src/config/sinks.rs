//! `[audit.sinks.NAME]`: where copies of the audit log go.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::read::{Section, refuse, string};
use super::telemetry::{self, Collector};

/// One copy of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sink {
    /// Where it goes.
    pub target: Target,
    /// What its lines are.
    pub content: Content,
}

/// Where a copy goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `kind = "file"`
    File(FileTarget),
    /// `kind = "syslog"`
    Syslog(SyslogTarget),
    /// `kind = "otlp"`
    Otlp(Box<Collector>),
}

/// A file, with its own rotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileTarget {
    /// The file that is written; full ones are beside it, with `.1` (the newest), `.2` and so on.
    pub path: PathBuf,
    /// Size at which it is full, in MiB, at least 1.
    pub max_mib: u64,
    /// How many full ones are kept, at least 1.
    pub keep: u32,
}

/// A syslog collector (RFC 5424).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyslogTarget {
    /// How it is reached.
    pub way: Way,
    /// The facility, 0 to 23.
    pub facility: u8,
}

/// How a syslog collector is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// A Unix socket: one datagram a message, or a stream with octet counting.
    Unix(PathBuf),
    /// `HOST:PORT` over TCP, with octet counting (RFC 6587).
    Tcp(String),
    /// The same over TLS (RFC 5425).
    Tls {
        /// `HOST:PORT`
        address: String,
        /// The authorities of its certificate.
        ca: PathBuf,
        /// This node's certificate and private key, if the collector asks for one.
        client: Option<(PathBuf, PathBuf)>,
    },
}

/// What the lines of a copy are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Leaves and checkpoints as `polykey audit export` writes them, which can be verified.
    Leaves,
    /// One JSON object an event, which can be read.
    Events,
}

impl Sink {
    /// Where it goes, in words.
    #[must_use]
    pub fn place(&self) -> String {
        let path = |path: &Path| path.display().to_string();
        match &self.target {
            Target::File(file) => path(&file.path),
            Target::Syslog(syslog) => match &syslog.way {
                Way::Unix(socket) => path(socket),
                Way::Tcp(address) => format!("tcp://{address}"),
                Way::Tls { address, .. } => format!("tls://{address}"),
            },
            Target::Otlp(collector) => collector.endpoint.to_string(),
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    File,
    Syslog,
    Otlp,
}

/// All `[audit.sinks.NAME]`.
pub(super) fn sections(section: &Section<'_, '_>) -> BTreeMap<String, Sink> {
    let mut found: BTreeMap<String, Sink> = BTreeMap::new();
    for (name, at, inner) in section.each() {
        let fit = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        if !fit {
            section.document.note(
                at,
                "[audit.sinks]: a section whose name is none of a sink",
                "name it with 1 to 64 of a-z A-Z 0-9 _ -",
            );
        }
        let Some(sink) = inner.and_then(self::section) else { continue };
        let file = |sink: &Sink| match &sink.target {
            Target::File(file) => Some(file.path.clone()),
            Target::Syslog(_) | Target::Otlp(_) => None,
        };
        if file(&sink).is_some_and(|path| found.values().any(|o| file(o).as_ref() == Some(&path))) {
            section.document.note(
                at,
                format!("[audit.sinks.{name}]: another sink writes the same file"),
                "give each sink a file of its own",
            );
        }
        found.insert(name, sink);
    }
    found
}

fn section(section: Section<'_, '_>) -> Option<Sink> {
    const WORDS: &str = "write \"file\", \"syslog\" or \"otlp\"";
    let kind = section.need("kind", "\"file\"", |value| match string(value)? {
        "file" => Ok(Kind::File),
        "syslog" => Ok(Kind::Syslog),
        "otlp" => Ok(Kind::Otlp),
        _ => refuse("not a kind of sink", WORDS),
    })?;
    let words = [("leaves", Content::Leaves), ("events", Content::Events)];
    let content = section.word("content", &words, Content::Leaves);
    let target = match kind {
        Kind::File => file(&section).map(Target::File),
        Kind::Syslog => syslog(&section).map(Target::Syslog),
        Kind::Otlp => telemetry::collector(&section).map(|to| Target::Otlp(Box::new(to))),
    };
    section.finish();
    target.map(|target| Sink { target, content })
}

fn file(section: &Section<'_, '_>) -> Option<FileTarget> {
    let path = section.need_path("path", "\"/var/log/polykey/audit.jsonl\"");
    let max_mib = section.integer("max_mib", 1..=1_048_576, 64);
    let keep = section.integer("keep", 1..=10_000, 16);
    Some(FileTarget { path: path?, max_mib, keep })
}

fn syslog(section: &Section<'_, '_>) -> Option<SyslogTarget> {
    let socket = section.path("socket");
    let address = section.get("address", |value| {
        let address = string(value)?;
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0) => {
                Ok(address.to_owned())
            }
            _ => refuse(
                "not a host with a port",
                "write \"HOST:PORT\", such as \"log.example:6514\"",
            ),
        }
    });
    let ca = section.path("ca");
    let certificate = section.path("certificate");
    let key = section.path("key");
    let facility = section.integer("facility", 0..=23, 13);
    let complain = |key, what: &str, remedy: &str| {
        section.complain(key, (what.to_owned(), remedy.to_owned()));
    };
    if section.has("socket") == section.has("address") {
        let what = if section.has("socket") { "there is an `address` as well" } else { "missing" };
        complain("socket", what, "write either `socket` or `address`");
    }
    if ca.is_some() && !section.has("address") {
        complain("ca", "TLS is spoken to an `address` alone", "remove it");
    }
    if ca.is_none() && !section.has("ca") && (certificate.is_some() || key.is_some()) {
        complain("certificate", "without `ca` no TLS is spoken", "add `ca`, or remove it");
    }
    if certificate.is_some() != key.is_some() {
        complain("certificate", "a certificate and its key go together", "write both, or neither");
    }
    let way = match (socket, address, ca) {
        (Some(socket), ..) => Way::Unix(socket),
        (None, Some(address), Some(ca)) => Way::Tls { address, ca, client: certificate.zip(key) },
        (None, Some(address), None) => Way::Tcp(address),
        (None, None, _) => return None,
    };
    Some(SyslogTarget { way, facility })
}
