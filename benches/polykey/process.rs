//! Processes that are measured: the echoes, and what the system says about any of them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use polykey::net::client::ClientFiles;

use crate::load::Calls;

/// An echo in a process of its own, ended when dropped.
pub(crate) struct Process {
    child: Child,
    address: String,
    directory: PathBuf,
}

impl Process {
    pub(crate) fn echo(kind: &str, directory: &Path) -> Self {
        std::fs::create_dir_all(directory).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--echo", kind])
            .arg(directory)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, address: line.trim().to_owned(), directory: directory.to_owned() }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn calls(&self) -> Calls {
        let path = |name: &str| self.directory.join(name);
        let files = ClientFiles {
            server_ca: path("ca.pem"),
            certificate: path("client.pem"),
            key: path("client.key"),
        };
        Calls::bare(&self.address, files)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time of a process so far, in microseconds; the system counts in ticks of 10 ms.
pub(crate) fn cpu(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name may have blanks and parentheses; what follows the last one has not.
    let rest = text.rsplit_once(')').unwrap().1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    ticks * 1_000_000 / rustix::param::clock_ticks_per_second()
}

/// A line of /proc/PID/status in MiB.
pub(crate) fn memory(pid: u32, line: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':')).unwrap();
    let kib: f64 = found.trim().trim_end_matches(" kB").parse().unwrap();
    kib / 1024.0
}
