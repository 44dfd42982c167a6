//! A soak: two nodes with all that a node can have serve a mixed load while one thing after another fails: the disk, the
//! process, the HSM, the database, a sink, a reload. Errors come while something is wrong and are those of what is wrong;
//! memory, threads and descriptors stay flat; and at the end everything acknowledged is there and verifies.
//!
//! In CI a kill and six other faults, one after the other; with `SOAK_MINUTES` for so long, with a fault every 20 s and
//! each of them before any comes twice. `POLYKEY_SEED` repeats a run.

mod load;
mod watch;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use load::{Caller, Place, Wrong};
use polykey::pki::{Authority, KeyKind, Validity, write_file};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::time::sleep;
use watch::Watched;

use crate::common::client::Client;
use crate::common::cluster::Cluster;
use crate::common::softhsm::{SoftHsm, workers};
use crate::common::{Options, PATIENCE, Server, skip};
use crate::log_mutations::export;
use crate::sinks::{Collector, Disk, complete};
use crate::support::{Random, deadline, no_panic};

/// Caches that a soak fills while it warms up, so that what grows afterwards is a leak.
const LIMITS: &str = "\n[limits]\nkey_cache = 512\ndirectory_cache = 64\ndecision_cache = 512\n";
/// By when both nodes serve again after a fault has ended.
const BACK: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    DiskFull,
    Stopped,
    Killed,
    TokenKilled,
    TokenHangs,
    TokenPulled,
    DatabaseHangs,
    DatabaseCrashes,
    SessionsEnd,
    SinkHangs,
    SinkDeleted,
    SinkUnwritable,
    Reload,
    BrokenReload,
}

const DECK: [Fault; 13] = [
    Fault::DiskFull,
    Fault::Stopped,
    Fault::TokenKilled,
    Fault::TokenHangs,
    Fault::TokenPulled,
    Fault::DatabaseHangs,
    Fault::DatabaseCrashes,
    Fault::SessionsEnd,
    Fault::SinkHangs,
    Fault::SinkDeleted,
    Fault::SinkUnwritable,
    Fault::Reload,
    Fault::BrokenReload,
];

/// How long, and how fast.
struct Pace {
    faults: usize,
    /// From one fault to the next.
    every: Duration,
    /// How long a fault lasts, in milliseconds: so long, and up to so much longer.
    holds: (usize, usize),
    /// How old a process is before its use is looked at.
    warm: Duration,
    calls: usize,
}

impl Pace {
    fn of_environment() -> Self {
        let minutes = std::env::var("SOAK_MINUTES").ok().map(|n| n.parse::<usize>().unwrap());
        match minutes {
            None => Self {
                faults: 7,
                every: Duration::from_millis(900),
                holds: (200, 300),
                warm: Duration::from_secs(2),
                calls: 60,
            },
            Some(minutes) => Self {
                faults: minutes * 3,
                every: Duration::from_secs(20),
                holds: (2_000, 5_000),
                warm: Duration::from_secs(60),
                calls: 30,
            },
        }
    }

    /// What fails, in which order: each once before anything twice, and the process killed early, so that one lives long.
    fn plan(&self, random: &mut Random, full: bool) -> Vec<Fault> {
        let mut plan = Vec::new();
        while plan.len() < self.faults {
            let mut deck: Vec<_> =
                DECK.into_iter().filter(|f| full || *f != Fault::DiskFull).collect();
            while !deck.is_empty() {
                plan.push(deck.swap_remove(random.below(deck.len())));
            }
        }
        plan.truncate(self.faults);
        plan.insert(1, Fault::Killed);
        if plan.len() > 30 {
            plan.insert(plan.len() / 3, Fault::Killed);
        }
        plan.truncate(self.faults);
        plan
    }
}

/// The node with a disk, a token and sinks, and the one on a database.
struct Scene {
    disk: Disk,
    copies: PathBuf,
    collector: Collector,
    token: SoftHsm,
    /// `None` only while it is started again.
    local: Option<Server>,
    cluster: Cluster,
    places: [Arc<Place>; 2],
    in_token: String,
    authority: Authority,
    config: String,
    number: u64,
}

fn hold(random: &mut Random, pace: &Pace) -> Duration {
    let (least, more) = pace.holds;
    Duration::from_millis(u64::try_from(least + random.below(more)).unwrap())
}

fn signal_all(pids: &[Pid], signal: Signal) {
    for pid in pids {
        // One that the node has given up is gone.
        let _ = kill_process(*pid, signal);
    }
}

fn lasting() -> Validity {
    Validity::days(SystemTime::now(), 30).unwrap()
}

impl Scene {
    async fn new(place: &Path) -> Self {
        let disk = Disk::new(place.join("disk"));
        let copies = place.join("copies");
        fs::create_dir(&copies).unwrap();
        let (collector, token) = (Collector::new(), SoftHsm::new());
        let state = disk.path.join("state");
        drop(Server::dev_in(&state, &Options::default(), None).stop());
        let path = state.join("polykey.toml");
        let text = fs::read_to_string(&path).unwrap();
        let config = text
            .replace("[storage]\n", "[storage]\nreserve_mib = 16\n")
            .replace("client_ca = \"ca.pem\"\n", "client_ca = \"ca.pem\"\ncrl = \"ca.crl\"\n")
            + &token.section("wrappers.hsm")
            + &format!(
                "\n[hardened]\nwrapper = \"hsm\"\n[policies]\nfiles = [\"own.cedar\"]\n\
                 [audit.sinks.disk]\nkind = \"file\"\npath = \"{}\"\nmax_mib = 16\nkeep = 1000\n\
                 [audit.sinks.far]\nkind = \"syslog\"\naddress = \"{}\"\n{LIMITS}",
                copies.join("audit.jsonl").display(),
                collector.address
            );
        toml::from_str::<toml::Table>(&config).unwrap();
        let authority = Authority::load(&state.join("ca.pem"), &state.join("ca.key")).unwrap();
        let list = authority.revocation_list(&[], 1, lasting()).unwrap();
        fs::write(state.join("ca.crl"), list).unwrap();
        fs::write(state.join("own.cedar"), "").unwrap();
        fs::write(&path, &config).unwrap();
        token.create_kek(&path, "hsm");
        let local = Server::dev_in(&state, &Options::default(), None);
        let admin = local.admin().await;
        let body = json!({"key_type": "KEY_TYPE_ECDSA_P256", "in_token": true});
        let made = admin.call("CreateKey", body).await.unwrap();
        let in_token = made["key_id"].as_str().unwrap().to_owned();
        let cluster = Cluster::start(1, &format!("call_timeout = \"2s\"\n{LIMITS}"));
        let places = [Place::new(&local.address), Place::new(&cluster.servers[0].address)];
        let local = Some(local);
        Self {
            disk,
            copies,
            collector,
            token,
            local,
            cluster,
            places,
            in_token,
            authority,
            config,
            number: 1,
        }
    }

    fn local(&self) -> &Server {
        self.local.as_ref().unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.local().state.join(name)
    }

    async fn callers(&self, random: &mut Random, pace: &Pace) -> Vec<Caller> {
        let mut callers = Vec::new();
        for (server, place, count) in
            [(self.local(), &self.places[0], 6), (&self.cluster.servers[0], &self.places[1], 3)]
        {
            let admin = server.admin().await;
            for n in 0..count {
                // Each second is somebody of no rights but its own.
                let client = match n % 2 {
                    0 => server.admin().await,
                    _ => server.client(&admin, &format!("soak-{n}"), &["user"]).await,
                };
                let signs = count == 6 && n % 2 == 0;
                let in_token = signs.then(|| self.in_token.clone());
                callers
                    .push(Caller::new(place, client, in_token, (random.fork(), pace.calls)).await);
            }
        }
        callers
    }

    fn signal_local(&self, signal: Signal) {
        let pid = Pid::from_raw(self.local().pid().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Something fails, for a while, and ends; what that is to callers of which node is said before and after.
    async fn strike(&mut self, fault: Fault, held: Duration, random: &mut Random) {
        let (node, wrong) = match fault {
            Fault::DiskFull => (0, Wrong::NoRoom),
            Fault::Stopped => (0, Wrong::Stopped),
            Fault::Killed => (0, Wrong::Killed),
            Fault::TokenKilled | Fault::TokenHangs | Fault::TokenPulled => (0, Wrong::TokenAway),
            Fault::DatabaseHangs | Fault::DatabaseCrashes | Fault::SessionsEnd => {
                (1, Wrong::DatabaseAway)
            }
            _ => (0, Wrong::Nothing),
        };
        self.places[node].is(wrong);
        match fault {
            Fault::DiskFull => {
                self.disk.resize(Some(10 * 1024));
                sleep(held).await;
                self.disk.resize(None);
            }
            Fault::Stopped => {
                self.signal_local(Signal::STOP);
                sleep(held).await;
                self.signal_local(Signal::CONT);
            }
            Fault::Killed => {
                no_panic(&self.local().output());
                let server = self.local.take().unwrap();
                let again = || server.restart(true, &Options::default());
                let server = tokio::task::block_in_place(again);
                self.places[0].address.write().clone_from(&server.address);
                self.local = Some(server);
            }
            Fault::TokenKilled => signal_all(&workers(self.local()), Signal::KILL),
            Fault::TokenHangs => {
                let hanging = workers(self.local());
                signal_all(&hanging, Signal::STOP);
                sleep(held).await;
                signal_all(&hanging, Signal::CONT);
            }
            Fault::TokenPulled => {
                self.token.pull();
                sleep(held).await;
                self.token.insert();
            }
            Fault::DatabaseHangs => {
                self.cluster.database.signal_all(Signal::STOP);
                sleep(held).await;
                self.cluster.database.signal_all(Signal::CONT);
            }
            Fault::DatabaseCrashes => tokio::task::block_in_place(|| {
                self.cluster.database.crash();
                self.cluster.database.restart(&[]);
            }),
            Fault::SessionsEnd => tokio::task::block_in_place(|| {
                let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                           WHERE usename = 'polykey'";
                drop(self.cluster.database.sql(end));
            }),
            Fault::SinkHangs => {
                self.collector.hangs.send_replace(true);
                sleep(held).await;
                self.collector.hangs.send_replace(false);
            }
            Fault::SinkDeleted => {
                // Between two files there is none.
                let _ = fs::remove_file(self.copies.join("audit.jsonl"));
            }
            Fault::SinkUnwritable => {
                let file = self.copies.join("audit.jsonl");
                let mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode));
                let _ = mode(0);
                sleep(held).await;
                let _ = mode(0o600);
            }
            Fault::Reload => self.reload().await,
            Fault::BrokenReload => {
                let which = random.below(4);
                let (name, text) = [
                    ("own.cedar", "forbid ("),
                    ("ca.crl", ""),
                    ("server.pem", "-----BEGIN CERTIFICATE-----\n?\n"),
                    ("polykey.toml", "[listen"),
                ][which];
                fs::write(self.file(name), text).unwrap();
                self.read_again("kept what was in force").await;
                sleep(held).await;
                fs::write(self.file("polykey.toml"), &self.config).unwrap();
                self.reload().await;
            }
        }
        let limit = deadline(BACK);
        for node in 0..2 {
            let token = (node == 0).then_some(self.in_token.as_str());
            let server = [self.local(), &self.cluster.servers[0]][node];
            serves(server, token, fault, limit).await;
        }
        self.places[node].is(Wrong::Nothing);
    }

    /// Sends SIGHUP, and waits until the node says this of it.
    async fn read_again(&self, says: &str) {
        let before = self.local().output().len();
        self.signal_local(Signal::HUP);
        let since = Instant::now();
        loop {
            let output = self.local().output();
            let new = &output[before..];
            // The last part that is read.
            let all = new.lines().any(|line| line.contains("ReloadSettings"));
            if all && new.contains(says) {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "it does not read again: {new}");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// A new certificate, revocation list and policy.
    async fn reload(&mut self) {
        self.number += 1;
        let names = ["localhost", "127.0.0.1", "::1"];
        let server = self.authority.server(&names, KeyKind::P256, lasting()).unwrap();
        let put = |name: &str, text: &str, mode| {
            write_file(&self.file(name), text.as_bytes(), mode).unwrap();
        };
        put("server.key", server.key.as_ref().unwrap(), 0o600);
        put("server.pem", &server.certificate, 0o644);
        put("ca.crl", &self.authority.revocation_list(&[], self.number, lasting()).unwrap(), 0o644);
        put("own.cedar", &format!("// {}\n", self.number), 0o644);
        self.read_again("reloaded").await;
    }
}

/// Waits until a node does everything again, five times in a row, and says that it is well.
async fn serves(server: &Server, in_token: Option<&str>, fault: Fault, limit: Duration) {
    let since = Instant::now();
    let mut good = 0;
    let mut admin: Option<Client> = None;
    while good < 5 {
        let again = async {
            let admin = match &mut admin {
                Some(admin) => admin,
                none => {
                    let (files, id, api_key) = server.profile_files();
                    let mut fresh = Client::new(&server.address, files, &id, &api_key);
                    fresh.login().await?;
                    none.insert(fresh)
                }
            };
            let body = json!({"key_type": "KEY_TYPE_AES_256", "storage_profile": "STORAGE_PROFILE_STANDARD"});
            admin.call("CreateKey", body).await?;
            if let Some(key) = in_token {
                admin.call("Sign", json!({"key_id": key, "message": "AAAA"})).await?;
            }
            admin.call("PolykeyService/HealthCheck", json!({})).await
        };
        let answer = tokio::time::timeout(PATIENCE, again).await.unwrap();
        let well = answer.as_ref().is_ok_and(|health| health["status"] == "HEALTH_STATUS_HEALTHY");
        good = if well { good + 1 } else { 0 };
        assert!(since.elapsed() < limit, "{fault:?}: not back within {limit:?}: {answer:?}");
        if !well {
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_under_one_fault_after_another_stay_flat_and_lose_nothing() {
    let pace = Pace::of_environment();
    let mut random = Random::seeded("soak");
    let place = tempfile::tempdir().unwrap();
    let mut scene = Scene::new(place.path()).await;
    if !scene.disk.mounted {
        skip(
            "nodes_under_one_fault_after_another_stay_flat_and_lose_nothing",
            "no tmpfs can be mounted: the full disk is left out",
        );
    }
    let callers = scene.callers(&mut random, &pace).await;
    let running: Vec<_> = callers.into_iter().map(|caller| tokio::spawn(caller.run())).collect();
    let mut watched = [
        Watched::new("local", scene.local().pid()),
        Watched::new("database", scene.cluster.servers[0].pid()),
    ];
    let begun = Instant::now();
    for fault in pace.plan(&mut random, scene.disk.mounted) {
        let held = hold(&mut random, &pace);
        let calls = scene.places.each_ref().map(|place| place.calls.load(Ordering::SeqCst));
        sleep(pace.every.saturating_sub(held)).await;
        for (place, before) in scene.places.iter().zip(calls) {
            assert!(place.calls.load(Ordering::SeqCst) > before, "the load is no load");
        }
        watched[0].look(scene.local().pid(), pace.warm);
        watched[1].look(scene.cluster.servers[0].pid(), pace.warm);
        let at = begun.elapsed();
        scene.strike(fault, held, &mut random).await;
        println!(
            "soak: {at:.1?}: {fault:?} for {held:.1?}, over after {:.1?}",
            begun.elapsed() - at
        );
        scene.places[0].all_explained("local");
        scene.places[1].all_explained("database");
    }
    sleep(pace.every).await;
    watched[0].look(scene.local().pid(), pace.warm);
    watched[1].look(scene.cluster.servers[0].pid(), pace.warm);
    for place in &scene.places {
        place.done.store(true, Ordering::SeqCst);
    }
    let (mut keys, mut opened) = (0, 0);
    for task in running {
        let (some, more) = task.await.unwrap().verify().await;
        (keys, opened) = (keys + some, opened + more);
    }
    for (place, name) in scene.places.iter().zip(["local", "database"]) {
        place.all_explained(name);
        println!(
            "soak: {name}: {} calls; errors: {:#?}",
            place.calls.load(Ordering::SeqCst),
            place.errors()
        );
    }
    for server in [scene.local(), &scene.cluster.servers[0]] {
        for command in [["store", "verify"], ["audit", "verify"]] {
            let (code, out, err) = tokio::task::block_in_place(|| server.cli(&command));
            assert_eq!(code, 0, "{command:?}: {out}{err}");
        }
        no_panic(&server.output());
    }
    let leaves = export(scene.local(), &place.path().join("export")).0;
    complete(&leaves, &scene.copies, &scene.collector).await;
    println!(
        "soak: {:.0?}: {keys} keys and {opened} ciphertexts open, {} leaves in both sinks, stores and logs verify",
        begun.elapsed(),
        leaves.len()
    );
    watched.iter().for_each(Watched::flat);
    let server = scene.local.take().unwrap();
    drop(tokio::task::block_in_place(|| server.stop()));
    scene.collector.kill().await;
}
