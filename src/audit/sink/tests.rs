//! Sinks over real files and sockets.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixDatagram, UnixListener};

use super::file::Writer;
use super::place::{Cursor, Place};
use super::{Batch, Record, Sinks, What};
use crate::audit::Outcome;
use crate::audit::export::verify_export;
use crate::audit::tests::{Key, event, id, in_memory, quick, read, start};
use crate::config;
use crate::config::sinks::{Content, FileTarget, Sink, SyslogTarget, Target, Way};
use crate::health::State;
use crate::time::Time;

fn cursor(leaf: u64) -> Cursor {
    Cursor { leaf, checkpoint: 0 }
}

fn line(leaf: u64) -> String {
    format!("{{\"leaf\":{leaf},\"data\":\"AA==\"}}")
}

/// The leaves from one on up to another, made durable at once.
fn batch(from: u64, to: u64) -> Batch {
    let record = |leaf| Record {
        time: Time::default(),
        what: What::Leaf(leaf),
        line: line(leaf).into_bytes(),
    };
    let records = (from..to).map(record).collect();
    Batch { from: cursor(from), next: cursor(to), last: Some([7; 32]), records, flush: true }
}

/// A file sink and its place, which outlive their writers.
struct Disk {
    directory: tempfile::TempDir,
    target: FileTarget,
}

impl Disk {
    fn new(keep: u32) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        Self { directory, target: FileTarget { path, max_mib: 1, keep } }
    }

    fn saved(&self) -> PathBuf {
        self.directory.path().join("places/disk.json")
    }

    fn writer(&self) -> Writer {
        let place = Place::load(&self.saved()).unwrap();
        let place = place.unwrap_or_else(|| Place::new("polykey/log".into()));
        Writer::new(self.target.clone(), place, self.saved())
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).unwrap()
    }

    /// What the file must hold.
    fn lines(leaves: impl IntoIterator<Item = u64>) -> String {
        leaves.into_iter().map(|leaf| line(leaf) + "\n").collect()
    }
}

fn fails(writer: &mut Writer, batch: &Batch, with: &str) {
    let told = writer.put(batch).unwrap_err();
    assert!(told.contains(with), "{with}: {told}");
}

#[test]
fn a_file_goes_on_where_it_stopped_and_is_for_its_owner_alone() {
    let disk = Disk::new(4);
    let mut writer = disk.writer();
    writer.put(&batch(0, 3)).unwrap();
    // Another process is kept out while this one lives.
    fails(&mut disk.writer(), &batch(3, 4), "written by another process");
    drop(writer);
    let mut writer = disk.writer();
    assert_eq!(writer.place.next, cursor(3));
    writer.put(&batch(3, 5)).unwrap();
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(0..5));
    for file in [&disk.target.path, &disk.saved()] {
        assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600, "{}", file.display());
    }
}

#[test]
fn what_was_written_and_not_kept_comes_twice_and_a_torn_line_is_taken_away() {
    let disk = Disk::new(4);
    let mut writer = disk.writer();
    writer.put(&batch(0, 2)).unwrap();
    // Killed in the middle of the second line, before the place was kept.
    writer.put(&Batch { flush: false, ..batch(2, 3) }).unwrap();
    drop(writer);
    let mut file = fs::OpenOptions::new().append(true).open(&disk.target.path).unwrap();
    file.write_all(b"{\"leaf\":3,\"da").unwrap();
    let mut writer = disk.writer();
    assert_eq!(writer.place.next, cursor(2));
    writer.put(&batch(2, 4)).unwrap();
    assert_eq!(disk.text("audit.jsonl"), Disk::lines([0, 1, 2, 2, 3]));
}

#[test]
fn a_file_that_was_renamed_is_followed_by_another_one() {
    let disk = Disk::new(4);
    let mut writer = disk.writer();
    writer.put(&batch(0, 2)).unwrap();
    fs::rename(&disk.target.path, disk.directory.path().join("yesterday")).unwrap();
    writer.put(&batch(2, 4)).unwrap();
    assert_eq!(disk.text("yesterday"), Disk::lines(0..2));
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(2..4));
    // And with a new one in its place, as logrotate makes it.
    fs::rename(&disk.target.path, disk.directory.path().join("today")).unwrap();
    fs::write(&disk.target.path, "").unwrap();
    writer.put(&batch(4, 5)).unwrap();
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(4..5));
}

#[test]
fn what_a_lost_file_held_is_written_anew() {
    let disk = Disk::new(4);
    let mut writer = disk.writer();
    writer.put(&batch(0, 2)).unwrap();
    fs::rename(&disk.target.path, disk.directory.path().join("kept")).unwrap();
    writer.put(&batch(2, 4)).unwrap();
    let again = |writer: &mut Writer, told: &str| {
        let next = writer.place.next.leaf;
        fails(writer, &batch(next, next + 1), told);
        // Back to where this file began, not to the beginning of the log.
        assert_eq!(writer.place.next, cursor(2), "{told}");
        writer.put(&batch(2, next + 1)).unwrap();
    };
    fs::remove_file(&disk.target.path).unwrap();
    again(&mut writer, "was deleted");
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(2..5));
    // Another file over it.
    fs::write(disk.directory.path().join("forged"), Disk::lines([2])).unwrap();
    fs::rename(disk.directory.path().join("forged"), &disk.target.path).unwrap();
    again(&mut writer, "was deleted");
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(2..6));
    assert_eq!(disk.text("audit.jsonl.1"), Disk::lines([2]), "put aside");
    let cut = fs::OpenOptions::new().write(true).open(&disk.target.path).unwrap();
    cut.set_len(0).unwrap();
    again(&mut writer, "was cut short");
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(2..7));
    // While the node was down.
    drop(writer);
    fs::remove_file(&disk.target.path).unwrap();
    again(&mut disk.writer(), "was gone or empty");
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(2..8));
}

#[test]
fn what_cannot_be_written_is_told_and_taken_up_again() {
    let disk = Disk::new(4);
    let mut writer = disk.writer();
    writer.put(&batch(0, 1)).unwrap();
    let mode = |mode| fs::set_permissions(&disk.target.path, fs::Permissions::from_mode(mode));
    mode(0).unwrap();
    fails(&mut writer, &batch(1, 2), "mode 0000");
    mode(0o600).unwrap();
    writer.put(&batch(1, 2)).unwrap();
    fs::remove_file(&disk.target.path).unwrap();
    fs::create_dir(&disk.target.path).unwrap();
    fails(&mut writer, &batch(2, 3), "was deleted");
    fails(&mut writer, &batch(0, 3), "cannot be opened: Is a directory");
    fs::remove_dir(&disk.target.path).unwrap();
    // A link leads anywhere.
    symlink(disk.directory.path().join("elsewhere"), &disk.target.path).unwrap();
    fails(&mut writer, &batch(0, 3), "cannot be opened");
    fs::remove_file(&disk.target.path).unwrap();
    writer.put(&batch(0, 3)).unwrap();
    assert_eq!(disk.text("audit.jsonl"), Disk::lines(0..3));
    assert!(!disk.directory.path().join("elsewhere").exists());
    // A file that is there before the sink is put aside, not written into.
    let other = Disk::new(4);
    fs::write(&other.target.path, "mine\n").unwrap();
    other.writer().put(&batch(0, 1)).unwrap();
    assert_eq!(
        (other.text("audit.jsonl.1"), other.text("audit.jsonl")),
        ("mine\n".into(), Disk::lines(0..1))
    );
}

#[test]
fn full_files_are_put_aside_and_the_oldest_is_deleted() {
    let mut disk = Disk::new(3);
    // Full with one line.
    disk.target.max_mib = 0;
    let mut writer = disk.writer();
    for leaf in 0..6 {
        writer.put(&batch(leaf, leaf + 1)).unwrap();
    }
    for (name, leaf) in
        [("audit.jsonl", 5), ("audit.jsonl.1", 4), ("audit.jsonl.2", 3), ("audit.jsonl.3", 2)]
    {
        assert_eq!(disk.text(name), Disk::lines([leaf]), "{name}");
    }
    assert!(!disk.directory.path().join("audit.jsonl.4").exists());
}

fn only(name: &str, target: Target, content: Content) -> config::Audit {
    config::Audit {
        ml_dsa: false,
        archive: None,
        data_plane: config::DataPlane::Buffered,
        checkpoint_interval: Duration::from_secs(60),
        sinks: BTreeMap::from([(name.to_owned(), Sink { target, content })]),
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_has_the_lines_of_the_export_and_survives_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let target = || Target::File(FileTarget { path: path.clone(), max_mib: 64, keep: 4 });
    let config = only("disk", target(), Content::Leaves);
    let vault = in_memory().await;
    let trail = Arc::new(start(&vault, quick()).await);
    for round in 0..3_u64 {
        let sinks = Sinks::new(&config, dir.path(), &trail, &BTreeMap::new());
        sinks.start();
        for n in 0..40 {
            trail.record(event(round * 100 + n, None, "login", Outcome::Denied)).await.unwrap();
        }
        trail.data_plane_durable(read(round * 100 + 50, id(1))).await.unwrap();
        trail.checkpoint().await.unwrap();
        until("all is copied", || sinks.status()[0].behind == 0).await;
        assert_eq!(sinks.state(), State::Serving);
        sinks.shutdown(Duration::from_secs(5)).await;
    }
    let mut export = Vec::new();
    trail.export(&mut export, &[Key::new(1).verifying()]).await.unwrap();
    let export = String::from_utf8(export).unwrap();
    let (mut leaves, mut checkpoints) = (Vec::new(), Vec::new());
    for line in export.lines() {
        if line.starts_with("{\"leaf\"") {
            leaves.push(line);
        } else if line.starts_with("{\"checkpoint\"") {
            checkpoints.push(line);
        }
    }
    let copy = fs::read_to_string(&path).unwrap();
    let (copied, signed): (Vec<_>, Vec<_>) = copy.lines().partition(|l| l.starts_with("{\"leaf\""));
    assert_eq!(copied, leaves, "each once, in order: no process was killed");
    assert!(leaves.len() > 120 && signed == checkpoints && signed.len() >= 3, "{signed:?}");
    let report = verify_export(export.as_bytes(), &[Key::new(1).verifying()], &[]).unwrap();
    assert!(report.ok(), "{report:?}");

    // Another store under the same name, as after an older one was put back: all of it, in a file of its own.
    let vault = in_memory().await;
    let other = Arc::new(start(&vault, quick()).await);
    for n in 0..5 {
        other.record(event(n, None, "login", Outcome::Denied)).await.unwrap();
    }
    let sinks = Sinks::new(&config, dir.path(), &other, &BTreeMap::new());
    sinks.start();
    until("all is copied", || {
        path.with_extension("jsonl.1").exists() && sinks.status()[0].copied == 5
    })
    .await;
    sinks.shutdown(Duration::from_secs(5)).await;
    assert_eq!(fs::read_to_string(path.with_extension("jsonl.1")).unwrap(), copy);
    let lines = fs::read_to_string(&path).unwrap();
    assert_eq!(lines.lines().filter(|l| l.starts_with("{\"leaf\"")).count(), 5, "{lines}");
}

/// Messages with octet counting.
fn taken_apart(mut bytes: &[u8]) -> Vec<String> {
    let mut messages = Vec::new();
    while let Some(space) = bytes.iter().position(|b| *b == b' ') {
        let length: usize = std::str::from_utf8(&bytes[..space]).unwrap().parse().unwrap();
        let Some(message) = bytes.get(space + 1..space + 1 + length) else { break };
        messages.push(String::from_utf8(message.to_vec()).unwrap());
        bytes = &bytes[space + 1 + length..];
    }
    messages
}

/// The JSON of a message whose header is as RFC 5424 has it.
fn body(message: &str) -> serde_json::Value {
    let (header, body) = message.split_once(" audit - ").unwrap();
    let header: Vec<&str> = header.split(' ').collect();
    let [first, time, host, name, process] = header[..] else { panic!("{header:?}") };
    assert_eq!((first, name), ("<86>1", "polykey"), "10 * 8 + 6");
    assert!(time.starts_with("2027-01-15T08:00:00.00") && time.ends_with('Z'), "{time}");
    assert!(!host.is_empty() && process.parse::<u32>().is_ok(), "{header:?}");
    serde_json::from_str(body).unwrap()
}

async fn logged(way: Way) -> (Arc<Sinks>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::Syslog(SyslogTarget { way, facility: 10 });
    let vault = in_memory().await;
    let trail = Arc::new(start(&vault, quick()).await);
    for n in 0..3 {
        trail.record(event(n, None, "login", Outcome::Denied)).await.unwrap();
    }
    let sinks =
        Sinks::new(&only("siem", target, Content::Events), dir.path(), &trail, &BTreeMap::new());
    sinks.start();
    (sinks, dir)
}

fn check(bodies: &[serde_json::Value]) {
    assert_eq!(bodies.len(), 3);
    for (n, event) in bodies.iter().enumerate() {
        assert_eq!(event["index"], n, "{event}");
        assert_eq!(
            (event["action"].as_str(), event["request_id"].as_str()),
            (Some("login"), Some(&*format!("request-{n}")))
        );
    }
}

async fn three(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<String> {
    let (mut bytes, mut piece) = (Vec::new(), vec![0; 4096]);
    while taken_apart(&bytes).len() < 3 {
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut piece)).await;
        let read = read.unwrap().unwrap();
        assert!(read > 0, "the sink closed the connection");
        bytes.extend_from_slice(&piece[..read]);
    }
    taken_apart(&bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn syslog_goes_over_unix_sockets_of_both_types() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("datagrams");
    let socket = UnixDatagram::bind(&path).unwrap();
    let (sinks, _dir) = logged(Way::Unix(path)).await;
    let mut bodies = Vec::new();
    for _ in 0..3 {
        let mut message = vec![0; 65_536];
        let received = socket.recv(&mut message);
        let received = tokio::time::timeout(Duration::from_secs(20), received).await;
        message.truncate(received.unwrap().unwrap());
        bodies.push(body(std::str::from_utf8(&message).unwrap()));
    }
    check(&bodies);
    sinks.shutdown(Duration::from_secs(5)).await;

    let path = dir.path().join("stream");
    let listener = UnixListener::bind(&path).unwrap();
    let (sinks, _dir) = logged(Way::Unix(path)).await;
    let (mut stream, _) = listener.accept().await.unwrap();
    let messages = three(&mut stream).await;
    check(&messages.iter().map(|m| body(m)).collect::<Vec<_>>());
    sinks.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn syslog_over_tcp_says_what_is_wrong_and_repeats_what_may_be_lost() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (sinks, _dir) = logged(Way::Tcp(address.to_string())).await;
    let trouble = || sinks.status()[0].trouble.clone();
    until("nobody listens", || trouble().is_some_and(|t| t.contains("cannot be reached"))).await;
    assert!(
        sinks.state().reason().unwrap().starts_with("[audit.sinks.siem]: 127.0.0.1"),
        "{:?}",
        sinks.state()
    );
    let listener = TcpListener::bind(address).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    let first = three(&mut stream).await;
    until("it works", || trouble().is_none()).await;
    // Whether the peer has kept what it was sent, nobody knows.
    drop(stream);
    let (mut stream, _) = listener.accept().await.unwrap();
    assert_eq!(three(&mut stream).await, first);
    sinks.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn syslog_over_tls_goes_to_whom_the_authority_vouches_for() {
    let dir = tempfile::tempdir().unwrap();
    let files = certificates(dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = rustls::ServerConfig::builder_with_provider(crate::net::tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            crate::net::tls::read_certificates(&files.certificate).unwrap(),
            crate::net::tls::read_key(&files.key).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let way = |ca: &Path| Way::Tls { address: address.clone(), ca: ca.to_owned(), client: None };
    let (sinks, _dir) = logged(way(&files.ca)).await;
    let (stream, _) = listener.accept().await.unwrap();
    let mut stream = acceptor.accept(stream).await.unwrap();
    let messages = three(&mut stream).await;
    check(&messages.iter().map(|m| body(m)).collect::<Vec<_>>());
    sinks.shutdown(Duration::from_secs(5)).await;

    let (sinks, _dir) = logged(way(&files.other_ca)).await;
    let (stream, _) = listener.accept().await.unwrap();
    assert!(acceptor.accept(stream).await.is_err(), "the sink takes anybody");
    until("it says so", || {
        sinks.status()[0].trouble.as_ref().is_some_and(|t| t.contains("certificate"))
    })
    .await;
    sinks.shutdown(Duration::from_secs(5)).await;
}

struct Certificates {
    ca: PathBuf,
    other_ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

fn certificates(dir: &Path) -> Certificates {
    use crate::pki::{Authority, KeyKind, Validity};
    let validity = || Validity::days(std::time::SystemTime::now(), 1).unwrap();
    let path = |name: &str| dir.join(name);
    let authority = |name: &str| {
        let (authority, issued) = Authority::create(name, KeyKind::P256, validity()).unwrap();
        issued.write(&path(&format!("{name}.pem")), &path(&format!("{name}.key"))).unwrap();
        authority
    };
    let (ours, _) = (authority("ours"), authority("theirs"));
    let (certificate, key) = (path("server.pem"), path("server.key"));
    let issued = ours.server(&["127.0.0.1"], KeyKind::P256, validity()).unwrap();
    issued.write(&certificate, &key).unwrap();
    Certificates { ca: path("ours.pem"), other_ca: path("theirs.pem"), certificate, key }
}
