//! Audit sinks that are renamed, deleted, replaced, made unwritable, filled, hung and killed under load: the service goes on,
//! health tells of each and of its end, and afterwards every sink has the log, line for line.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use polykey_proto::polykey::v2 as pb;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::common::client::Client;
use crate::common::{Options, PATIENCE, Server, skip};
use crate::log_mutations::{checkpoint, export, python, verifier};
use crate::support::{Random, Wire, deadline, no_panic, size};

/// What a fault and its end may take to show in health.
const SHOWS: Duration = Duration::from_secs(2);

/// A small file system of its own for a sink, where this user may mount one.
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) mounted: bool,
}

impl Disk {
    pub(crate) fn new(path: PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let mounted = rustix::process::geteuid().is_root()
            && Command::new("mount")
                .args(["-t", "tmpfs", "-o", "size=1g,mode=0700", "tmpfs"])
                .arg(&path)
                .output()
                .is_ok_and(|output| output.status.success());
        Self { path, mounted }
    }

    /// Leaves so many KiB free on it, or as many as it had.
    pub(crate) fn resize(&self, free: Option<u64>) {
        for spare in 0.. {
            let there = rustix::fs::statvfs(&self.path).unwrap();
            let used = (there.f_blocks - there.f_bfree) * there.f_frsize / 1024;
            let size = free.map_or(1 << 20, |free| used + free + 4 * spare);
            let option = format!("remount,size={size}k");
            let done = Command::new("mount").args(["-o", &option]).arg(&self.path).output();
            // It has grown meanwhile.
            if done.unwrap().status.success() {
                return;
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted {
            drop(Command::new("umount").arg("--lazy").arg(&self.path).status());
        }
    }
}

/// A syslog collector over TCP that can hang and be killed. What it has read stays.
pub(crate) struct Collector {
    pub(crate) address: std::net::SocketAddr,
    lines: Arc<Mutex<Vec<String>>>,
    pub(crate) hangs: watch::Sender<bool>,
    task: Option<JoinHandle<()>>,
}

impl Collector {
    pub(crate) fn new() -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut collector = Self {
            address: free,
            lines: Arc::default(),
            hangs: watch::Sender::new(false),
            task: None,
        };
        collector.start();
        collector
    }

    fn start(&mut self) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        // A reader that has stopped shows once this is full.
        socket.set_recv_buffer_size(4096).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(8).unwrap();
        let (lines, hangs) = (Arc::clone(&self.lines), self.hangs.subscribe());
        self.task = Some(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (lines, mut hangs) = (Arc::clone(&lines), hangs.clone());
                connections.spawn(async move {
                    let (mut bytes, mut piece) = (Vec::new(), vec![0; 65_536]);
                    loop {
                        hangs.wait_for(|hangs| !hangs).await.unwrap();
                        match stream.read(&mut piece).await {
                            Ok(read) if read > 0 => bytes.extend_from_slice(&piece[..read]),
                            _ => return,
                        }
                        while let Some(line) = message(&mut bytes) {
                            lines.lock().unwrap().push(line);
                        }
                    }
                });
            }
        }));
    }

    /// With all its connections, and what they had not been read of.
    pub(crate) async fn kill(&mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        drop(task.await);
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}

/// The JSON of the first whole message, taken out.
fn message(bytes: &mut Vec<u8>) -> Option<String> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).unwrap().parse().unwrap();
    let message = bytes.get(space + 1..space + 1 + length)?;
    let message = String::from_utf8(message.to_vec()).unwrap();
    bytes.drain(..space + 1 + length);
    Some(message.split_once(" audit - ").unwrap().1.to_owned())
}

/// Callers that make and use keys; none of their calls may fail.
struct Load {
    done: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    async fn start(admin: &Client) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let mut tasks = Vec::new();
        for _ in 0..4 {
            let (wire, done) = (Wire::another(admin), Arc::clone(&done));
            let body =
                pb::CreateKeyRequest { key_type: pb::KeyType::Aes256 as i32, ..Default::default() };
            tasks.push(tokio::spawn(async move {
                let mut made = Vec::new();
                while !done.load(Ordering::SeqCst) {
                    let reply = wire.keys().create_key(wire.with(body.clone())).await;
                    let id = reply.unwrap().into_inner().key_id;
                    for _ in 0..8 {
                        let used = pb::GetKeyRequest { key_id: id.clone(), ..Default::default() };
                        wire.keys().get_key(wire.with(used)).await.unwrap();
                    }
                    made.push(id);
                }
                made
            }));
        }
        Self { done, tasks }
    }

    /// The keys that were acknowledged.
    async fn stop(self) -> Vec<String> {
        self.done.store(true, Ordering::SeqCst);
        let mut made = Vec::new();
        for task in self.tasks {
            made.extend(task.await.unwrap());
        }
        made
    }
}

/// Waits until health is as said, and asserts that it took no longer than it may.
async fn shows(wire: &Wire, what: &str, degraded: bool) -> Duration {
    let since = Instant::now();
    loop {
        let status = wire.keys().health_check(()).await.unwrap().into_inner().status();
        assert_ne!(status, pb::HealthStatus::Unhealthy, "{what}: a copy stops nothing");
        if (status == pb::HealthStatus::Degraded) == degraded {
            return since.elapsed();
        }
        assert!(since.elapsed() < deadline(SHOWS), "{what}: health says {status:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A fault begins, shows with its reason, ends and is over.
async fn episode(
    server: &Server,
    wire: &Wire,
    (what, sink, told): (&str, &str, &str),
    begin: impl AsyncFnOnce(),
    end: impl AsyncFnOnce(),
) {
    let before = server.output().len();
    begin().await;
    let seen = shows(wire, what, true).await;
    let since = Instant::now();
    // The log names the sink and the reason at once.
    while !server.output()[before..].lines().any(|l| l.contains(sink) && l.contains(told)) {
        assert!(since.elapsed() < deadline(SHOWS), "{what}: {}", &server.output()[before..]);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Long enough for the load to go on without the sink.
    tokio::time::sleep(Duration::from_millis(300)).await;
    end().await;
    let over = shows(wire, what, false).await;
    println!("sinks: {what}: shown after {seen:.2?}, over after {over:.2?}");
}

/// Every leaf of some lines, which may stand there twice but not differ.
fn leaves(lines: impl IntoIterator<Item = String>) -> BTreeMap<u64, String> {
    let mut leaves = BTreeMap::new();
    for line in lines {
        let value: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        if let Some(leaf) = value["leaf"].as_u64() {
            let before = leaves.insert(leaf, line.clone());
            assert!(
                before.is_none_or(|before| before == line),
                "leaf {leaf} stands twice and differs"
            );
        } else {
            assert!(value["checkpoint"].is_string(), "{line}");
        }
    }
    leaves
}

fn copies(directory: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.is_file()).collect();
    files.sort();
    files
}

fn lines_of(files: &[PathBuf]) -> Vec<String> {
    // One that is renamed meanwhile is read the next time.
    let text = files.iter().map(|file| fs::read_to_string(file).unwrap_or_default());
    // A line that is being written is none yet.
    let whole = |text: &str| text.rfind('\n').map_or(0, |end| end + 1);
    text.flat_map(|text| text[..whole(&text)].lines().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

/// Waits until both sinks have what was exported.
pub(crate) async fn complete(exported: &[String], disk: &Path, collector: &Collector) {
    let since = Instant::now();
    loop {
        let copied = [leaves(lines_of(&copies(disk))), leaves(collector.lines())];
        if copied.iter().all(|copied| copied.len() >= exported.len()) {
            for (copied, sink) in copied.iter().zip(["disk", "far"]) {
                for (index, line) in (0..).zip(exported) {
                    assert_eq!(copied.get(&index), Some(line), "{sink}: leaf {index}");
                }
            }
            return;
        }
        let counts: Vec<usize> = copied.iter().map(BTreeMap::len).collect();
        assert!(since.elapsed() < PATIENCE, "{counts:?} of {} leaves", exported.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sinks_fail_hold_up_nothing_and_have_the_whole_log_afterwards() {
    const TEST: &str = "sinks_fail_hold_up_nothing_and_have_the_whole_log_afterwards";
    let mut random = Random::seeded("sinks");
    let place = tempfile::tempdir().unwrap();
    let disk = Disk::new(place.path().join("disk"));
    if !disk.mounted {
        skip(TEST, "no tmpfs can be mounted: the full disk is left out");
    }
    let file = disk.path.join("audit.jsonl");
    let mut collector = Collector::new();
    let server = Server::dev_configured(|text| {
        format!(
            "{text}\n[audit.sinks.disk]\nkind = \"file\"\npath = \"{}\"\nmax_mib = 1\nkeep = 1000\n\
             [audit.sinks.far]\nkind = \"syslog\"\naddress = \"{}\"\n",
            file.display(),
            collector.address
        )
    });
    let admin = server.admin().await;
    let wire = Wire::of(&admin);
    shows(&wire, "the start", false).await;
    let load = Load::start(&admin).await;
    let mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    for round in 0..size("POLYKEY_SINK_FAULTS", 3, 25) {
        // Taken for a rotation by somebody else.
        let (before, renamed) = (server.output().len(), disk.path.join(format!("renamed-{round}")));
        fs::rename(&file, &renamed).unwrap();
        let since = Instant::now();
        while !file.exists() {
            assert!(since.elapsed() < deadline(SHOWS), "no file follows the one that was renamed");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        shows(&wire, "renamed", false).await;
        assert!(!server.output()[before..].contains("was deleted"), "taken for a loss");

        // There must be something to lose.
        let since = Instant::now();
        while fs::metadata(&file).map_or(0, |held| held.len()) < 4096 {
            assert!(since.elapsed() < PATIENCE, "the load is no load");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let deleted = ("deleted", "disk", "was deleted");
        episode(&server, &wire, deleted, async || fs::remove_file(&file).unwrap(), async || {})
            .await;
        let replaced = ("replaced by a directory", "disk", "Is a directory");
        let replace = async || {
            fs::rename(&file, disk.path.join(format!("replaced-{round}"))).unwrap();
            // Unless the sink was faster, which makes a new one.
            for n in 0.. {
                if fs::create_dir(&file).is_ok() {
                    break;
                }
                fs::rename(&file, disk.path.join(format!("between-{round}-{n}"))).unwrap();
            }
        };
        episode(&server, &wire, replaced, replace, async || fs::remove_dir(&file).unwrap()).await;
        let since = Instant::now();
        while !file.exists() {
            assert!(since.elapsed() < deadline(SHOWS), "no file where the directory was");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let unwritable = ("chmod 000", "disk", "mode 0000");
        episode(&server, &wire, unwritable, async || mode(0), async || mode(0o600)).await;
        if disk.mounted {
            let full = ("full", "disk", "No space left on device");
            episode(
                &server,
                &wire,
                full,
                async || disk.resize(Some(16)),
                async || disk.resize(None),
            )
            .await;
        }
        let hangs = ("a collector that hangs", "far", "taken nothing");
        let hang = |hangs| collector.hangs.send_replace(hangs);
        episode(
            &server,
            &wire,
            hangs,
            async || {
                hang(true);
            },
            async || {
                hang(false);
            },
        )
        .await;
        let killed = ("a collector that is killed", "far", "cannot be reached");
        // What lies in its buffers is lost.
        collector.hangs.send_replace(true);
        tokio::time::sleep(Duration::from_millis(u64::try_from(random.below(200)).unwrap())).await;
        collector.kill().await;
        collector.hangs.send_replace(false);
        episode(&server, &wire, killed, async || {}, async || collector.start()).await;
    }
    let mut made = load.stop().await;
    let mut exported = export(&server, &place.path().join("export-0")).0;
    complete(&exported, &disk.path, &collector).await;

    // Killed while it copies: what it is not sure of comes twice.
    let load = Load::start(&admin).await;
    tokio::time::sleep(Duration::from_millis(500 + u64::try_from(random.below(1500)).unwrap()))
        .await;
    made.extend(load.stop().await);
    no_panic(&server.output());
    let server = tokio::task::block_in_place(|| server.restart(true, &Options::default()));
    let admin = admin.at(&server.address);
    let load = Load::start(&admin).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    made.extend(load.stop().await);
    let kept = place.path().join("kept.json");
    let newest = checkpoint(&server, &kept);
    exported = export(&server, &place.path().join("export-1")).0;
    complete(&exported, &disk.path, &collector).await;

    // Each acknowledged key stands in the log once.
    let (code, out, err) = server.cli(&[
        "-o",
        "json",
        "audit",
        "list",
        "--action",
        "CreateKey",
        "--outcome",
        "success",
        "--limit",
        "1000000",
    ]);
    assert_eq!(code, 0, "{err}");
    let listed: Value = serde_json::from_str(&out).unwrap();
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for event in listed["events"].as_array().unwrap() {
        *times.entry(event["key_id"].as_str().unwrap_or_default()).or_default() += 1;
    }
    for id in &made {
        assert_eq!(times.get(id.as_str()), Some(&1), "{id} was acknowledged");
    }
    println!(
        "sinks: {} keys, {} leaves, {} messages",
        made.len(),
        exported.len(),
        collector.lines().len()
    );

    // The copies prove themselves, with the public key and what was kept.
    let files = copies(&disk.path);
    for file in &files {
        assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600, "{}", file.display());
    }
    let key = newest["public_key"].as_str().unwrap().to_owned();
    let mut args =
        vec![verifier(), "--sink".into(), "--public-key".into(), key, "--checkpoint".into()];
    args.push(kept.display().to_string());
    args.extend(files.iter().map(|file| file.display().to_string()));
    let (code, out) = python(&args);
    assert_eq!(code, 0, "{out}");
    no_panic(&server.output());
    drop(tokio::task::block_in_place(|| server.stop()));
    collector.kill().await;
}
