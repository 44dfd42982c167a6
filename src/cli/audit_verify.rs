//! `polykey audit verify`: the log of a server, of a store or in files, against keys and checkpoints.

use std::io::{BufReader, BufWriter, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use polykey_proto::polykey::v2 as pb;
use serde::Serialize;

use super::App;
use super::audit_copy::{CopyError, checkpoint, copy, none_yet};
use super::audit_view::CheckpointView;
use super::error::{CliError, Exit};
use super::output::{Human, View};
use super::value;
use crate::audit::export::{named_keys, verify_exports};
use crate::audit::{Checkpoint, MlDsaKey, Report, Trusted, VerifyingKey};

/// Arguments of `audit verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// A file written by `audit export` or `audit archive`, instead of the server; or several that follow one
    /// another, the oldest first.
    #[arg(long = "export", value_name = "FILE", num_args = 1.., conflicts_with = "store")]
    pub exports: Vec<PathBuf>,
    /// An archive of what is no longer in the server's store; or several, the oldest first.
    #[arg(long = "archive", value_name = "FILE", num_args = 1.., conflicts_with_all = ["store", "exports"])]
    pub archives: Vec<PathBuf>,
    /// The file of a store that no server has open, instead of the server.
    #[arg(long, value_name = "FILE")]
    pub store: Option<PathBuf>,
    /// A key that signs checkpoints, Ed25519 or ML-DSA-65: base64, or a file with it; may be repeated.
    /// Without any, the key that comes with the log is used, which proves only that the log is whole. With
    /// one of ML-DSA, only checkpoints with both signatures count.
    #[arg(long = "public-key", value_name = "KEY")]
    pub public_keys: Vec<String>,
    /// An earlier checkpoint (its note, or from `audit checkpoint -o json`) that the log must
    /// contain; may be repeated.
    #[arg(long = "checkpoint", value_name = "FILE")]
    pub checkpoints: Vec<PathBuf>,
}

/// What a verification found.
#[derive(Serialize)]
struct ReportView {
    ok: bool,
    origin: String,
    leaves: u64,
    events: u64,
    root_hash: String,
    checkpoints: u64,
    /// Leaves that a signed checkpoint covers.
    covered: u64,
    public_keys: Vec<String>,
    /// Whether the keys were given by the caller.
    public_keys_pinned: bool,
    /// Whether ML-DSA signatures were checked: only with a key for them.
    ml_dsa_checked: bool,
    /// Whether all that is wrong is that other keys have signed than those given.
    wrong_key: bool,
    /// Whether all that is wrong is that leaves were not given.
    incomplete: bool,
    #[serde(skip)]
    second: bool,
    findings: Vec<String>,
    notes: Vec<String>,
}

impl View for ReportView {
    fn human(&self) -> Human {
        let result = match self {
            Self { ok: true, .. } => "the log is whole and signed",
            Self { wrong_key: true, .. } => {
                "NOT VERIFIED: the public key given is not the one that signed"
            }
            Self { incomplete: true, .. } => "NOT VERIFIED: leaves were not given",
            _ => "the log is DAMAGED",
        };
        let mut fields = vec![
            ("result", result.to_owned()),
            ("origin", self.origin.clone()),
            ("leaves", format!("{} ({} signed)", self.leaves, self.covered)),
            ("events", self.events.to_string()),
            ("root hash", self.root_hash.clone()),
        ];
        fields.extend(self.public_keys.iter().map(|key| ("public key", key.clone())));
        match (self.ml_dsa_checked, self.second) {
            (true, _) => fields.push(("ML-DSA-65", "signatures checked".to_owned())),
            (false, true) => {
                let text = "signatures not checked: no key for them was given";
                fields.push(("ML-DSA-65", text.to_owned()));
            }
            (false, false) => {}
        }
        if self.wrong_key {
            fields.push(("note", WRONG_KEY.to_owned()));
        }
        if !self.public_keys_pinned {
            let text = "the public key came with the log; pin it with --public-key";
            fields.push(("note", text.to_owned()));
        }
        fields.extend(self.notes.iter().map(|note| ("note", note.clone())));
        fields.extend(self.findings.iter().map(|finding| ("finding", finding.clone())));
        Human::Record(fields)
    }
}

/// Of a log that a key that was given has not signed. Whoever writes a log anew signs it with a key of his own.
const WRONG_KEY: &str = "`polykey audit checkpoint` prints the key of the node: compare it with what was noted when the \
     node was set up. Give one --public-key for each key that the node has had. If this is the right key, somebody else \
     has signed the log: it may have been written anew";

/// Prints what a verification found; `keys` are those given by the caller. A log with findings, or
/// one that nobody signed, ends with the exit code of a failed verification.
pub(super) fn print_report(
    app: &App,
    report: Report,
    keys: &[VerifyingKey],
    (pinned, ml_dsa): (bool, bool),
) -> Result<(), CliError> {
    let ok = report.ok() && (report.covered > 0 || report.leaves == 0);
    let wrong_key = pinned && report.wrong_key();
    let incomplete = report.incomplete();
    app.out.print(&ReportView {
        ok,
        origin: report.origin,
        leaves: report.leaves,
        events: report.events,
        root_hash: report.root,
        checkpoints: report.checkpoints,
        covered: report.covered,
        public_keys: keys.iter().map(ToString::to_string).collect(),
        public_keys_pinned: pinned,
        ml_dsa_checked: ml_dsa,
        wrong_key,
        incomplete,
        second: report.second,
        findings: report.findings,
        notes: report.notes,
    })?;
    if ok { Ok(()) } else { Err(CliError::silent(Exit::DataLoss)) }
}

/// A key that signs checkpoints: base64, or a file with it.
pub(super) fn key(text: &str) -> Result<VerifyingKey, CliError> {
    if let Some(key) = VerifyingKey::parse(text) {
        return Ok(key);
    }
    let no_key = |what: &str| {
        CliError::usage(format!("{text}: {what}")).hint("`polykey audit checkpoint` prints it.")
    };
    let path = Path::new(text);
    if !path.exists() {
        return Err(no_key(
            "neither a public key in base64 (44 characters for Ed25519) nor a file",
        ));
    }
    VerifyingKey::parse(&value::text_file(path)?)
        .ok_or_else(|| no_key("no Ed25519 public key in base64"))
}

impl VerifyArgs {
    /// The keys given, each as base64 or as a file with it.
    ///
    /// # Errors
    /// One that is neither.
    pub fn keys(&self) -> Result<(Vec<VerifyingKey>, Vec<MlDsaKey>), CliError> {
        let (mut ed25519, mut ml_dsa) = (Vec::new(), Vec::new());
        for text in &self.public_keys {
            let file = || value::text_file(Path::new(text)).ok();
            let second = MlDsaKey::parse(text);
            match second.or_else(|| MlDsaKey::parse(&file()?)) {
                Some(key) => ml_dsa.push(key),
                None => ed25519.push(key(text)?),
            }
        }
        Ok((ed25519, ml_dsa))
    }

    /// The checkpoints given, each as its note or as JSON of `audit checkpoint`.
    ///
    /// # Errors
    /// One that is neither.
    pub fn kept(&self) -> Result<Vec<Checkpoint>, CliError> {
        let kept = |path: &PathBuf| {
            let text = value::text_file(path)?;
            let json = serde_json::from_str::<CheckpointView>(&text).ok();
            let note = json.map_or(text, |checkpoint| checkpoint.note);
            Checkpoint::parse(&note).ok_or_else(|| {
                CliError::usage(format!("{}: not a checkpoint", path.display()))
                    .hint("It is written by `polykey audit checkpoint -o json`.")
            })
        };
        self.checkpoints.iter().map(kept).collect()
    }
}

/// Opens a file to be verified.
fn open(path: &Path) -> std::io::Result<BufReader<Box<dyn Read + Send>>> {
    let named = |error: std::io::Error| {
        std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))
    };
    let file = std::fs::File::open(path).map_err(named)?;
    Ok(BufReader::new(Box::new(file)))
}

fn unreadable(error: &std::io::Error) -> CliError {
    let exit = match error.kind() {
        std::io::ErrorKind::InvalidData => Exit::DataLoss,
        _ => Exit::Usage,
    };
    CliError::new(exit, error.to_string())
}

pub(super) async fn verify(app: &App, args: VerifyArgs) -> Result<(), CliError> {
    let ((given, ml_dsa), kept) = (args.keys()?, args.kept()?);
    let pinned = !given.is_empty();
    let how = (pinned, !ml_dsa.is_empty());
    if let Some(first) = args.exports.first() {
        let failed = |error: std::io::Error| unreadable(&error);
        let named = |error: std::io::Error| {
            let text = format!("{}: {error}", first.display());
            CliError::new(Exit::DataLoss, text)
        };
        let keys = if pinned {
            given
        } else {
            named_keys(&mut open(first).map_err(failed)?).map_err(named)?
        };
        let files = args.exports.iter().map(|path| open(path));
        let trusted = Trusted { ed25519: &keys, ml_dsa: &ml_dsa };
        let report = verify_exports(files, trusted, &kept).map_err(failed)?;
        return print_report(app, report, &keys, how);
    }
    let remote = app.connect().await?;
    let own = || async {
        let key = checkpoint(&remote).await?.public_key;
        Ok::<_, CliError>(VerifyingKey::parse(&key).into_iter().collect())
    };
    let keys: Vec<VerifyingKey> = if pinned { given } else { own().await? };
    let local = |error: std::io::Error| CliError::file(Path::new("pipe"), &error);
    // The log goes straight from the server into the same verification as that of a file.
    let (reader, writer) = std::io::pipe().map_err(local)?;
    let verification = {
        let (keys, archives) = (keys.clone(), args.archives);
        let live = BufReader::new(Box::new(reader) as Box<dyn Read + Send>);
        tokio::task::spawn_blocking(move || {
            let before = archives.iter().map(|path| open(path));
            let trusted = Trusted { ed25519: &keys, ml_dsa: &ml_dsa };
            verify_exports(before.chain([Ok(live)]), trusted, &kept)
        })
    };
    let request = pb::ExportAuditLogRequest::default();
    let copied = copy(&remote, request, BufWriter::new(writer)).await;
    let copied = match copied {
        Ok(None) => return Err(none_yet()),
        Ok(Some((out, _))) => {
            out.into_inner().map(drop).map_err(|e| CopyError::Write(e.into_error()))
        }
        Err(error) => Err(error),
    };
    let report = verification.await.map_err(|e| local(e.into()))?.map_err(|e| unreadable(&e))?;
    match copied {
        Err(CopyError::Read(error)) => Err(error),
        // The verification may have seen enough before the end.
        Err(CopyError::Write(_)) if !report.ok() => print_report(app, report, &keys, how),
        Err(CopyError::Write(error)) => Err(local(error)),
        Ok(()) => print_report(app, report, &keys, how),
    }
}
