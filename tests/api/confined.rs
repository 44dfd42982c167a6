//! What a node gives up after its start, and what the service manager is told.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::common::{Options, PATIENCE, POLYKEY, Server};

fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.rsplit('\t').next().unwrap().to_owned()
}

fn signal(server: &Server, signal: Signal) {
    kill_process(Pid::from_raw(server.pid().try_into().unwrap()).unwrap(), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_thread_is_confined_unless_it_is_switched_off() {
    let server = Server::dev();
    assert!(!server.output().contains("hardening incomplete"), "{}", server.output());
    for thread in fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap() {
        let text = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(text.contains("Seccomp:\t2") && text.contains("NoNewPrivs:\t1"), "{text}");
    }
    // What it is there for goes on, on files that are replaced under it as well.
    let admin = server.admin().await;
    admin.create(json!({})).await;
    signal(&server, Signal::HUP);
    let (status_, output, directory) = server.stop();
    assert!(status_.success(), "{output}");
    let state = directory.as_ref().unwrap().path().join("state");
    let config = state.join("polykey.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}\n[runtime]\nsandbox = false\n")).unwrap();
    let open = Server::attempt(&state, &Options::default()).unwrap();
    assert_eq!(status(open.pid(), "Seccomp:"), "0");
}

/// Run by the test below in a process of its own, which it confines for good.
#[test]
fn inside() {
    let Some(state) = std::env::var_os("POLYKEY_TEST_CONFINED").map(std::path::PathBuf::from)
    else {
        return;
    };
    let config = polykey::config::Config::load(&state.join("polykey.toml")).unwrap();
    let missed = polykey::hardening::apply(&config);
    // The harness of the tests has threads of its own, and only this one is confined.
    assert!(missed.iter().all(|missed| missed.measure.contains("first thread")), "{missed:?}");
    fs::write(state.join("inside"), "x").unwrap();
    fs::rename(state.join("inside"), state.join("renamed")).unwrap();
    fs::write("/dev/null", "x").unwrap();
    let outside = state.parent().unwrap().join("outside");
    assert!(fs::write(&outside, "x").is_err());
    assert!(fs::remove_file(state.parent().unwrap().join("victim")).is_err());
    assert!(fs::read(state.parent().unwrap().join("victim")).is_ok());
    assert!(Command::new("/bin/sh").arg("-c").arg("true").status().is_err());
    assert!(Command::new("/proc/self/exe").arg("--list").stdout(Stdio::null()).status().is_err());
    let address = std::env::var("POLYKEY_TEST_ADDRESS").unwrap();
    assert!(std::net::TcpStream::connect(address).is_err());
    let free = std::env::var("POLYKEY_TEST_FREE").unwrap();
    assert!(std::net::TcpListener::bind(free).is_err());
    assert!(std::net::UdpSocket::bind("127.0.0.1:0").is_err());
    let loader = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    for loader in loader.iter().filter(|path| fs::exists(path).unwrap()) {
        assert!(Command::new(loader).arg("/bin/true").status().is_err(), "{loader}");
    }
    // Root may, and only there does it say something.
    let name = rustix::system::uname().nodename().to_bytes().to_vec();
    assert!(rustix::system::sethostname(&name).is_err());
    let parent = rustix::process::getppid().unwrap();
    assert!(kill_process(parent, Signal::URG).is_err());
    println!("confined");
}

#[test]
fn outside_of_its_places_it_can_do_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let server = Server::attempt(&state, &Options::default()).unwrap();
    let address = server.address.clone();
    fs::write(directory.path().join("victim"), "x").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "confined::inside", "--nocapture", "--test-threads", "1"]);
    command.env("POLYKEY_TEST_CONFINED", &state).env("POLYKEY_TEST_ADDRESS", &address);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    command.env("POLYKEY_TEST_FREE", free.to_string());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("confined\n"), "{said}");
}

/// What the service manager is told, one message a line.
struct Manager {
    socket: UnixDatagram,
    options: Options,
    _directory: tempfile::TempDir,
}

impl Manager {
    fn new(env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut options = Options::default();
        options.env.push(("NOTIFY_SOCKET".into(), path.display().to_string()));
        options.env.extend(env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
        Self { socket, options, _directory: directory }
    }

    /// The next message with this in it.
    fn told(&self, what: &str) -> String {
        let mut buffer = [0; 4096];
        loop {
            let n = self.socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{what}: {e}"));
            let text = String::from_utf8_lossy(&buffer[..n]).into_owned();
            if text.contains(what) {
                return text;
            }
        }
    }
}

#[test]
fn the_service_manager_is_told_of_start_reload_and_stop() {
    let manager = Manager::new(&[("WATCHDOG_USEC", "400000")]);
    let server = Server::dev_with(&manager.options);
    let ready = manager.told("READY=1");
    assert!(ready.contains(&format!("STATUS=listening on {}", server.address)), "{ready}");
    manager.told("WATCHDOG=1");
    manager.told("WATCHDOG=1");
    signal(&server, Signal::HUP);
    assert!(manager.told("RELOADING=1").contains("MONOTONIC_USEC="));
    manager.told("READY=1");
    let stopped = std::thread::spawn(move || server.stop());
    manager.told("STOPPING=1");
    assert!(stopped.join().unwrap().0.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_of_the_service_manager_is_served_from() {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    // A shell becomes the server: only it knows the process id that LISTEN_PID names.
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$@\" 3<&0 0</dev/null";
    let mut child = Command::new("/bin/sh")
        .args(["-c", script, "sh", POLYKEY, "dev", "--dir"])
        .arg(&state)
        .stdin(Stdio::from(OwnedFd::from(socket.try_clone().unwrap())))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let profile = state.join("profile.toml");
    let begun = std::time::Instant::now();
    let written = || fs::read_to_string(&profile).is_ok_and(|text| text.contains(&address));
    while !written() && begun.elapsed() < PATIENCE {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut health = Command::new(POLYKEY);
    health.arg("health").env("POLYKEY_PROFILE", &profile);
    let healthy = health.output().unwrap();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(healthy.status.success(), "{}", String::from_utf8_lossy(&healthy.stderr));
}
