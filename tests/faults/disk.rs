//! A disk that fails: nothing is acknowledged after a failed sync, health says so, and nothing acknowledged is lost.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use polykey_proto::polykey::v2 as pb;

use crate::common::{Options, PATIENCE, Server};
use crate::first_start::traceable;
use crate::support::{Random, Wire, deadline, lost, no_panic, size};

/// Makes system calls of a running server fail, until it is dropped.
struct Injector {
    child: Child,
    log: PathBuf,
}

impl Injector {
    fn attach(server: &Server, log: &Path, calls: &str, fault: &str) -> Self {
        let mut child = Command::new("strace")
            .args(["-f", "-y", "-s", "0", "-o", &log.display().to_string()])
            .args(["-e", &format!("trace={calls}")])
            .args(["-e", &format!("inject={calls}:{fault}")])
            .args(["-p", &server.pid().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let attached = lines.by_ref().map_while(Result::ok).any(|line| line.contains("attached"));
        assert!(attached, "strace does not attach");
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Self { child, log: log.to_owned() }
    }

    /// Lets go of the server, and names the calls that were made to fail.
    fn release(self) -> Vec<String> {
        let log = self.log.clone();
        drop(self);
        let text = std::fs::read_to_string(log).unwrap();
        text.lines().filter(|line| line.contains("INJECTED")).map(str::to_owned).collect()
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        // SIGTERM makes strace let go of the server; SIGKILL might leave it stopped.
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let _ = self.child.wait();
    }
}

struct Case {
    calls: &'static str,
    error: &'static str,
    at: usize,
    sticky: bool,
}

async fn create(wire: &Wire, name: &str) -> Result<String, tonic::Status> {
    let body = pb::CreateKeyRequest {
        key_type: pb::KeyType::Aes256 as i32,
        description: name.to_owned(),
        tags: [("op".to_owned(), name.to_owned())].into(),
        ..Default::default()
    };
    let reply = tokio::time::timeout(PATIENCE, wire.keys().create_key(wire.once(body, name))).await;
    reply.unwrap().map(|reply| reply.into_inner().key_id)
}

async fn run(server: Server, case: &Case, number: usize) -> Server {
    let what = format!(
        "{} {} at call {}{}",
        case.calls,
        case.error,
        case.at,
        if case.sticky { " and after" } else { "" }
    );
    let admin = server.admin().await;
    let wire = Wire::of(&admin);
    let sticky = if case.sticky { "+" } else { "" };
    let fault = format!("error={}:when={}{sticky}", case.error, case.at);
    let log = server.state.join("strace.log");
    let injector = Injector::attach(&server, &log, case.calls, &fault);
    let mut acknowledged = Vec::new();
    let mut failed = None;
    for n in 0..case.at * 4 + 20 {
        let name = format!("c{number}-{n}");
        match create(&wire, &name).await {
            Ok(id) => acknowledged.push((name, id)),
            Err(status) => {
                assert!(lost(&status), "{what}: {status:?}");
                failed = Some(name);
                break;
            }
        }
    }
    // A single fault may meet the node's own writing instead: events, use of keys, checkpoints.
    assert!(failed.is_some() || !case.sticky, "{what}: no mutation failed");
    if let (true, Some(failed)) = (case.sticky, &failed) {
        // No mutation is acknowledged while the disk fails, and health says so.
        let since = Instant::now();
        loop {
            assert!(create(&wire, failed).await.is_err(), "{what}: acknowledged on a failing disk");
            let health = wire.keys().health_check(()).await.unwrap().into_inner().status;
            if health != pb::HealthStatus::Healthy as i32 {
                break;
            }
            assert!(
                since.elapsed() < deadline(Duration::from_secs(1)),
                "{what}: health is {health}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    let hit = injector.release();
    let met = failed.as_deref().unwrap_or("writing of the node's own");
    println!("disk: {what}: {met} met {hit:?}");
    // Whoever met the fault: it was on the store, and nothing else stands for it.
    assert!(hit.first().is_some_and(|call| call.contains("polykey.redb")), "{what}: {hit:?}");
    // The disk is well again: without a restart the same request has one result.
    let since = Instant::now();
    let again = failed.unwrap_or_else(|| format!("c{number}-after"));
    let id = loop {
        match create(&wire, &again).await {
            Ok(id) => break id,
            Err(status) => {
                assert!(lost(&status), "{what}: {status:?}");
                let limit = deadline(Duration::from_secs(5));
                assert!(since.elapsed() < limit, "{what}: no recovery: {status:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    acknowledged.push((again, id));
    no_panic(&server.output());
    let server = tokio::task::block_in_place(|| server.restart(true, &Options::default()));
    let wire = Wire::of(&admin.at(&server.address));
    for (name, id) in &acknowledged {
        let body = pb::ListKeysRequest {
            tag_filters: [("op".to_owned(), name.clone())].into(),
            ..Default::default()
        };
        let page = wire.keys().list_keys(wire.with(body)).await.unwrap().into_inner();
        let found: Vec<&str> = page.keys.iter().map(|k| k.key_id.as_str()).collect();
        assert_eq!(found, [id], "{what}: {name}");
        assert_eq!(&create(&wire, name).await.unwrap(), id, "{what}: {name} again");
    }
    server
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_disk_loses_and_invents_nothing() {
    if !traceable("a_failing_disk_loses_and_invents_nothing") {
        return;
    }
    let mut random = Random::seeded("disk");
    let mut server = Server::dev();
    for number in 0..size("POLYKEY_DISK_FAULTS", 16, 400) {
        let case = Case {
            calls: ["fdatasync,fsync", "pwrite64", "fdatasync,fsync", "ftruncate,pwrite64"]
                [number % 4],
            error: ["EIO", "ENOSPC"][number / 4 % 2],
            at: 1 + random.below(12),
            sticky: number / 8 % 2 == 1,
        };
        server = run(server, &case, number).await;
    }
    let (code, out, err) = tokio::task::block_in_place(|| server.cli(&["store", "verify"]));
    assert_eq!(code, 0, "{out}{err}");
}
