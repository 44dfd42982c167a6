//! A PostgreSQL of the tests' own: Debian's binaries, a cluster in a temporary directory, on loopback.

use std::{
    fs,
    io::Write,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use polykey_storage::postgres::{Options, Postgres};
use rustix::process::{Pid, Signal, kill_process};

/// The role that nodes log in as, and its password.
pub(crate) const ROLE: &str = "polykey";
pub(crate) const PASSWORD: &str = "correct horse";

/// A running server, stopped when it is dropped.
pub(crate) struct Server {
    directory: tempfile::TempDir,
    pub(crate) port: u16,
    child: Child,
}

static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
static SCHEMAS: AtomicU32 = AtomicU32::new(0);

impl Server {
    /// The server that tests share which do no harm to it.
    pub(crate) fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap();
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start(&["fsync=off"]));
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// A server with these settings besides. Each has TLS, with the certificate `ca.pem` vouches for.
    pub(crate) fn start(settings: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        own(directory.path());
        let data = directory.path().join("data");
        let mut initdb = as_postgres("initdb");
        initdb.args([
            "--no-sync",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "-U",
            "postgres",
        ]);
        let made = initdb.arg("-D").arg(&data).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        certify(directory.path());
        let hba = "local all,replication all trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        fs::write(data.join("pg_hba.conf"), hba).unwrap();
        let started = Self::launch(directory, settings);
        started.sql(&format!("CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'"));
        started.sql(&format!("CREATE DATABASE keys OWNER {ROLE}"));
        started
    }

    #[allow(dead_code, reason = "of the tests of whole nodes")]
    /// A standby that follows this server, synchronous once this server names it.
    pub(crate) fn standby(&self) -> Self {
        let directory = tempfile::tempdir().unwrap();
        own(directory.path());
        let mut copy = as_postgres("pg_basebackup");
        copy.args(["-U", "postgres", "-R", "-X", "stream", "-c", "fast", "--no-sync", "-h"]);
        copy.arg(self.directory.path()).args(["-p", &self.port.to_string(), "-D"]);
        let made = copy.arg(directory.path().join("data")).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        certify(directory.path());
        Self::launch(directory, &[])
    }

    #[allow(dead_code, reason = "of the tests of whole nodes")]
    /// Makes a primary of a standby; back when it takes writes.
    pub(crate) fn promote(&self) {
        assert_eq!(self.sql_in("postgres", "SELECT pg_promote(true, 60)").as_deref(), Ok("t"));
    }

    fn launch(directory: tempfile::TempDir, settings: &[&str]) -> Self {
        for _ in 0..5 {
            if let Some((port, child)) = Self::try_launch(directory.path(), settings) {
                return Self { directory, port, child };
            }
        }
        let log = fs::read_to_string(directory.path().join("log")).unwrap();
        panic!("the server does not start: {log}");
    }

    // Fails if somebody else takes the port that was free a moment ago.
    fn try_launch(directory: &Path, settings: &[&str]) -> Option<(u16, Child)> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(directory.join("data"));
        let socket = format!("unix_socket_directories={}", directory.display());
        let certificate = format!("ssl_cert_file={}/server.pem", directory.display());
        let key = format!("ssl_key_file={}/server.key", directory.display());
        let port_setting = format!("port={port}");
        let own = [
            "listen_addresses=127.0.0.1",
            "ssl=on",
            "max_connections=60",
            "log_min_messages=fatal",
            &port_setting,
            &socket,
            &certificate,
            &key,
        ];
        for setting in own.iter().chain(settings) {
            command.args(["-c", setting]);
        }
        let log = fs::File::create(directory.join("log")).unwrap();
        let mut child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        let status = directory.join("data/postmaster.pid");
        while !accepts(&status) {
            if child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(Instant::now() < until, "the server does not start");
            thread::sleep(Duration::from_millis(20));
        }
        Some((port, child))
    }

    /// Ends it as a crash would.
    pub(crate) fn crash(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }

    /// Starts it again after [`Self::crash`].
    pub(crate) fn restart(&mut self, settings: &[&str]) {
        let status = self.directory.path().join("data/postmaster.pid");
        let _ = fs::remove_file(&status);
        let until = Instant::now() + Duration::from_secs(30);
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(self.directory.path().join("data"));
        let options = [
            "listen_addresses=127.0.0.1".to_owned(),
            "max_connections=60".to_owned(),
            format!("port={}", self.port),
            format!("unix_socket_directories={}", self.directory.path().display()),
        ];
        for setting in options.iter().map(String::as_str).chain(settings.iter().copied()) {
            command.args(["-c", setting]);
        }
        loop {
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            self.child = child;
            while self.child.try_wait().unwrap().is_none() {
                if accepts(&status) {
                    return;
                }
                thread::sleep(Duration::from_millis(20));
            }
            // Backends of the one before still hold its shared memory.
            assert!(Instant::now() < until, "the server does not start again");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Runs SQL as the administrator, and returns what it prints.
    pub(crate) fn sql(&self, text: &str) -> String {
        self.sql_in("keys", text).or_else(|_| self.sql_in("postgres", text)).unwrap()
    }

    fn sql_in(&self, database: &str, text: &str) -> Result<String, String> {
        let output = Command::new(binary("psql"))
            .args(["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres"])
            .args(["-d", database, "-p", &self.port.to_string(), "-h"])
            .arg(self.directory.path())
            .args(["-c", text])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(said);
        }
        Ok(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }

    /// Stops or continues every process of the server.
    pub(crate) fn signal_all(&self, signal: Signal) {
        let parent = i32::try_from(self.child.id()).unwrap();
        let children = format!("/proc/{parent}/task/{parent}/children");
        let children = fs::read_to_string(children).unwrap();
        let all = children.split_whitespace().map(|pid| pid.parse().unwrap());
        for pid in all.chain([parent]) {
            // One that has ended meanwhile needs no signal.
            let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        let _ = kill_process(pid, signal);
    }

    /// The certificate of the authority that vouches for the server.
    pub(crate) fn authority(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Options for a schema, over the network and without TLS. Nothing is synced in these tests.
    pub(crate) fn options(&self, schema: &str) -> Options {
        self.options_at(self.port, schema)
    }

    /// As [`Self::options`], through another port.
    pub(crate) fn options_at(&self, port: u16, schema: &str) -> Options {
        let mut options =
            Options::new(format!("postgres://{ROLE}@127.0.0.1:{port}/keys?sslmode=disable"));
        options.password = Some(Arc::new(|| Ok(PASSWORD.to_owned().into())));
        options.schema = schema.to_owned();
        options.durable = false;
        options
    }

    pub(crate) fn open(&self, schema: &str) -> Postgres {
        Postgres::open(self.options(schema)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal_all(Signal::CONT);
        // Ends sessions and stops at once; the data is of no more use to anybody.
        self.signal(Signal::QUIT);
        let _ = self.child.wait();
    }
}

/// A schema that nothing has used.
pub(crate) fn schema() -> String {
    format!("s{}", SCHEMAS.fetch_add(1, Ordering::Relaxed))
}

// By its `postmaster.pid`: a primary is ready, a standby says that it is one.
fn accepts(status: &Path) -> bool {
    fs::read_to_string(status).is_ok_and(|text| text.contains("ready") || text.contains("standby"))
}

fn binary(name: &str) -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|version| {
            let number = version.file_name().to_str()?.parse().ok()?;
            let binary = version.path().join("bin").join(name);
            binary.exists().then_some((number, binary))
        })
        .collect();
    found.sort();
    match found.pop() {
        Some((version, binary)) if version >= 14 => binary,
        _ => panic!(
            "{name} of PostgreSQL 14 or later is missing (Debian and Ubuntu: apt-get install \
             postgresql)"
        ),
    }
}

/// PgBouncer before a server, in transaction mode; stopped when it is dropped.
pub(crate) struct Pooler {
    pub(crate) port: u16,
    child: Child,
    _directory: tempfile::TempDir,
}

impl Pooler {
    pub(crate) fn before(server: &Server) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let path = |name: &str| directory.path().join(name);
        let users = path("users");
        fs::write(&users, format!("\"{ROLE}\" \"{PASSWORD}\"\n")).unwrap();
        let text = format!(
            "[databases]\nkeys = host=127.0.0.1 port={}\n\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
             pool_mode = transaction\ndefault_pool_size = 20\n",
            server.port,
            users.display(),
        );
        fs::write(path("pgbouncer.ini"), text).unwrap();
        own(directory.path());
        let program = Path::new("/usr/sbin/pgbouncer");
        assert!(program.exists(), "PgBouncer is missing: make deps, or apt-get install pgbouncer");
        let mut command = unprivileged(program.to_owned());
        command.arg("-q").arg(path("pgbouncer.ini"));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(child.try_wait().unwrap().is_none(), "the pooler does not start");
            assert!(Instant::now() < until, "the pooler does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Self { port, child, _directory: directory }
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn as_postgres(name: &str) -> Command {
    unprivileged(binary(name))
}

// PostgreSQL and its pooler refuse to run as root.
fn unprivileged(binary: PathBuf) -> Command {
    if !rustix::process::getuid().is_root() {
        return Command::new(binary);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(binary);
    command.current_dir("/");
    command
}

fn own(path: &Path) {
    if rustix::process::getuid().is_root() {
        let done = Command::new("chown").args(["-R", "postgres:"]).arg(path).status().unwrap();
        assert!(done.success());
    }
}

fn certify(directory: &Path) {
    let (ca, key, certificate) = authority();
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        let mut file = fs::File::create(&path).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        own(&path);
    };
    write("ca.pem", &ca);
    write("server.key", &key);
    write("server.pem", &certificate);
}

/// An authority, and a key and certificate for `localhost` that it vouches for, as PEM.
pub(crate) fn authority() -> (String, String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(params, key);
    let server_key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let server = params.signed_by(&server_key, &issuer).unwrap();
    (certificate.pem(), server_key.serialize_pem(), server.pem())
}
