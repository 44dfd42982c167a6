//! A node that is shipped to PostgreSQL: what is acknowledged is there, whoever is killed or away; and the
//! database, made a store again or promoted.
//!
//! `POLYKEY_FAULTS=full` makes 100,000 changes and 20 kills of either side of the last test's few.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use polykey_storage::replica::Replica;
use polykey_storage::{redb, replica};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

use crate::common::client::Client;
use crate::common::cluster::postgres;
use crate::common::{Options, PATIENCE, POLYKEY, Server};

/// A node, the database it is shipped to, and where the password is.
struct Pair {
    database: postgres::Server,
    schema: String,
    away: TempDir,
}

impl Pair {
    fn new() -> Self {
        let away = tempfile::tempdir().unwrap();
        fs::write(away.path().join("password"), postgres::PASSWORD).unwrap();
        let set = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(away.path().join("password"), set).unwrap();
        Self { database: postgres::Server::start(&[]), schema: postgres::schema(), away }
    }

    fn url(&self) -> String {
        let (role, port) = (postgres::ROLE, self.database.port);
        format!("postgres://{role}@127.0.0.1:{port}/keys?sslmode=disable")
    }

    fn password(&self) -> String {
        self.away.path().join("password").display().to_string()
    }

    /// A `[replication]` section.
    fn section(&self, settings: &str) -> String {
        format!(
            "\n[replication]\ntarget = \"{}\"\npassword = {{ file = \"{}\" }}\nschema = \"{}\"\n{settings}\n",
            self.url(),
            self.password(),
            self.schema,
        )
    }

    fn node(&self, settings: &str) -> Server {
        Server::dev_configured(|text| text + &self.section(settings))
    }

    /// `polykey COMMAND` on the database.
    fn command(&self, command: &[&str]) -> (i32, String) {
        let output = std::process::Command::new(POLYKEY)
            .args(["-o", "json"])
            .args(command)
            .args(["--password", &self.password(), "--schema", &self.schema])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(!text.contains(postgres::PASSWORD));
        (output.status.code().unwrap(), text)
    }

    /// What is left of a node on a blank machine: its configuration and its secrets.
    fn blank(&self, state: &Path, name: &str) -> (std::path::PathBuf, String) {
        let blank = self.away.path().join(name);
        let copied = std::process::Command::new("cp").arg("-a").arg(state).arg(&blank).status();
        assert!(copied.unwrap().success());
        for file in ["polykey.redb", "polykey.redb-journal", "polykey.sock"] {
            drop(fs::remove_file(blank.join(file)));
        }
        let config = blank.join("polykey.toml");
        let text = fs::read_to_string(&config).unwrap();
        let text = text.replace(&state.display().to_string(), &blank.display().to_string());
        fs::write(&config, text.split("\n[replication]").next().unwrap()).unwrap();
        (blank.clone(), config.display().to_string())
    }

    /// Makes a store of the database on a blank machine, and serves it.
    fn restored(&self, state: &Path, name: &str) -> Server {
        let (blank, config) = self.blank(state, name);
        let head = format!("SELECT * FROM {}.head", self.schema);
        let before = self.database.sql(&head);
        let (code, said) = self.command(&["restore", "--config", &config, "--from", &self.url()]);
        assert_eq!(code, 0, "{said}");
        assert_eq!(self.database.sql(&head), before, "a restoration has written to its source");
        Server::serve(&blank, &config, &Options::default())
            .unwrap_or_else(|e| panic!("{}", e.output))
    }

    /// Whether the database is the file, row by row.
    async fn equal(&self, state: &Path) -> u64 {
        let options = redb::Options::default();
        let source = Arc::new(redb::Redb::open(state.join("polykey.redb"), options).unwrap());
        let target = Arc::new(self.database.open(&self.schema));
        let mark = replica::watermark(&*target).await.unwrap().unwrap();
        assert!(mark.whole);
        Replica::new(source, target).verify().await.unwrap().expect("the last revision")
    }
}

async fn replication(admin: &Client) -> Value {
    admin.call("GetStoreStatus", json!({})).await.unwrap()["replication"].clone()
}

async fn until(admin: &Client, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let found = replication(admin).await;
        if holds(&found) {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: {found}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn lag(found: &Value) -> u64 {
    found["lag_revisions"].as_u64().unwrap_or(0)
}

fn caught_up(found: &Value) -> bool {
    found["state"] == "following" && lag(found) == 0
}

/// A key, and something sealed under it.
async fn sealed(admin: &Client) -> (String, Value) {
    let key = admin.create(json!({"description": "shipped"})).await;
    let request = json!({"key_id": key, "plaintext": "aGVsbG8="});
    let sealed = admin.call("Encrypt", request).await.unwrap()["ciphertext"].clone();
    (key, sealed)
}

async fn opens(admin: &Client, (key, sealed): &(String, Value)) {
    let opened = admin.call("Decrypt", json!({"key_id": key, "ciphertext": sealed})).await;
    assert_eq!(opened.unwrap()["plaintext"], "aGVsbG8=");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_asynchronous_target_catches_up_and_gives_every_key_back() {
    let mut pair = Pair::new();
    let node = pair.node("max_lag = \"1s\"");
    let admin = node.admin().await;
    let mut all = Vec::new();
    for _ in 0..10 {
        all.push(sealed(&admin).await);
    }
    until(&admin, "the target follows", caught_up).await;
    // Nobody waits for a target that is away; health says how far it is behind.
    pair.database.crash();
    for _ in 0..10 {
        all.push(sealed(&admin).await);
    }
    let behind = |found: &Value| found["lag_seconds"].as_f64().unwrap_or(0.0) > 1.0;
    let found = until(&admin, "it is behind", behind).await;
    assert_eq!(found["mode"], "async");
    let health = admin.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(health["status"], "HEALTH_STATUS_DEGRADED", "{health}");
    assert!(health["metrics"]["replication_lag_seconds"].as_f64().unwrap() > 1.0, "{health}");
    let (_, out, _) = node.cli(&["health", "--metrics"]);
    assert!(out.contains("replication lag"), "{out}");
    pair.database.restart(&[]);
    until(&admin, "it has caught up", caught_up).await;
    let (code, out, err) = node.cli(&["store", "status"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("following") && out.contains(&pair.schema), "{out}");
    let state = node.state.clone();
    let (status, output, directory) = node.stop();
    assert!(status.success(), "{output}");
    // What was written last was shipped before the node ended.
    assert!(pair.equal(&state).await > 100);

    let restored = pair.restored(&state, "restored");
    let admin = restored.admin().await;
    for each in &all {
        opens(&admin, each).await;
    }
    let (code, out, err) = restored.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
    // Over a store that is there, nothing is restored; and from a schema with nothing in it neither.
    let (_, config) = pair.blank(&state, "again");
    let mut nothing = Pair::new();
    nothing.database.signal_all(rustix::process::Signal::CONT);
    let (code, said) = nothing.command(&["restore", "--config", &config, "--from", &nothing.url()]);
    assert_ne!(code, 0, "{said}");
    nothing.database.crash();
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_synchronous_node_acknowledged_is_on_the_target() {
    let pair = Pair::new();
    let mut node = pair.node("mode = \"sync\"\ntimeout = \"10s\"");
    let mut all = Vec::new();
    for _ in 0..4 {
        let admin = node.admin().await;
        let found = replication(&admin).await;
        assert_eq!(found["synchronous"], true, "{found}");
        for _ in 0..3 {
            all.push(sealed(&admin).await);
        }
        // Others are on their way when it is killed.
        let others: Vec<_> = (0..8)
            .map(|_| {
                let admin = admin.clone();
                tokio::spawn(async move {
                    let body = json!({"key_type": "KEY_TYPE_AES_256"});
                    admin.call("CreateKey", body).await.ok().map(|k| k["key_id"].clone())
                })
            })
            .collect();
        let last = sealed(&admin).await;
        all.push(last);
        node = node.restart(true, &Options::default());
        for other in others {
            drop(other.await);
        }
    }
    // The machine is gone; what it acknowledged is not.
    let admin = node.admin().await;
    let last = admin.create(json!({})).await;
    let pid = rustix::process::Pid::from_raw(i32::try_from(node.pid()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let restored = pair.restored(&node.state, "restored");
    let admin = restored.admin().await;
    for each in &all {
        opens(&admin, each).await;
    }
    admin.call("GetKeyMetadata", json!({"key_id": last})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_target_a_node_refuses_if_it_is_to() {
    let mut pair = Pair::new();
    let node = pair.node("mode = \"sync\"\nwhen_away = \"refuse\"\ntimeout = \"500ms\"");
    let admin = node.admin().await;
    let kept = sealed(&admin).await;
    pair.database.crash();
    // The first may be durable here and not there, and is not acknowledged; the next are not applied.
    let began = Instant::now();
    let once: [(&str, &[u8]); 1] = [("idempotency-key", b"once")];
    let body = json!({"key_type": "KEY_TYPE_AES_256"});
    let refused = admin.call_with("CreateKey", body.clone(), &once).await.unwrap_err();
    assert!(matches!(refused.code, Code::Unknown | Code::Unavailable), "{refused:?}");
    assert!(began.elapsed() < Duration::from_secs(10));
    // Nor is it acknowledged to whoever asks again, and finds it made here.
    let repeated = admin.call_with("CreateKey", body.clone(), &once).await.unwrap_err();
    assert!(matches!(repeated.code, Code::Unknown | Code::Unavailable), "{repeated:?}");
    let refused =
        admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await.unwrap_err();
    assert_eq!(refused.code, Code::Unavailable, "{refused:?}");
    let health = admin.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(health["status"], "HEALTH_STATUS_UNHEALTHY", "{health}");
    pair.database.restart(&[]);
    let began = Instant::now();
    while admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await.is_err() {
        assert!(began.elapsed() < Duration::from_secs(25), "{}", node.output());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    opens(&admin, &kept).await;
    // Asked again, it is one key, however often.
    let made = admin.call_with("CreateKey", body.clone(), &once).await.unwrap();
    let again = admin.call_with("CreateKey", body, &once).await.unwrap();
    assert_eq!(made.body["key_id"], again.body["key_id"]);
    // Nor does it start without it.
    pair.database.crash();
    let state = node.state.clone();
    let directory = node.stop().2;
    let ended = Server::attempt(&state, &Options::default()).err().expect("it does not start");
    assert_eq!(ended.status.code(), Some(6), "{}", ended.output);
    assert!(ended.output.contains("[replication] target"), "{}", ended.output);
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_target_a_node_goes_on_alone_if_it_may() {
    let mut pair = Pair::new();
    let node = pair.node("mode = \"sync\"\nwhen_away = \"degrade\"\ntimeout = \"500ms\"");
    let admin = node.admin().await;
    sealed(&admin).await;
    let found = until(&admin, "it waits", |found| found["synchronous"] == true).await;
    assert_eq!(found["when_away"], "degrade");
    pair.database.crash();
    let alone = sealed(&admin).await;
    let found = replication(&admin).await;
    assert_ne!(found["synchronous"], true, "{found}");
    let health = admin.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(health["status"], "HEALTH_STATUS_DEGRADED", "{health}");
    pair.database.restart(&[]);
    let again = |found: &Value| found["synchronous"] == true && caught_up(found);
    until(&admin, "it waits again", again).await;
    let mut noted = String::new();
    let began = Instant::now();
    while !noted.contains("ReplicationRestored") {
        assert!(began.elapsed() < PATIENCE, "{noted}");
        noted = node.cli(&["audit", "list"]).1;
    }
    assert!(noted.contains("ReplicationDegraded"), "{noted}");
    let state = node.state.clone();
    let directory = node.stop().2;
    let restored = pair.restored(&state, "restored");
    opens(&restored.admin().await, &alone).await;
    drop(directory);
}

/// A target that nobody has asked yet stops nobody who ships as it comes; as an anchor, it is asked first.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_is_refused_by_the_anchor_beside_the_replica() {
    let mut pair = Pair::new();
    let accepting = Options { args: vec!["--accept-rollback".into()], ..Options::default() };
    let section = pair.section("") + "\n[anchor]\nreplication = true\n";
    let node = Server::dev_configured_with(&accepting, |text| text + &section);
    let state = node.state.clone();
    let store = state.join("polykey.redb");
    let key = node.admin().await.create(json!({})).await;
    let directory = node.stop().2;
    let old = fs::read(&store).unwrap();

    let node =
        Server::attempt(&state, &Options::default()).unwrap_or_else(|e| panic!("{}", e.output));
    let admin = node.admin().await;
    let before = admin.call("GetStoreStatus", json!({})).await.unwrap();
    // While the database is away a revocation is not held up for long, and the status says what is missing.
    pair.database.crash();
    admin.call("RevokeKey", json!({"key_id": key, "immediate": true})).await.unwrap();
    let trouble = |told: &Value| told["anchor_trouble"].as_str().is_some_and(|t| !t.is_empty());
    let anchor = async |holds: &dyn Fn(&Value) -> bool| {
        let began = Instant::now();
        loop {
            let told = admin.call("GetStoreStatus", json!({})).await.unwrap();
            if holds(&told) {
                return told;
            }
            assert!(began.elapsed() < PATIENCE, "{told}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    anchor(&trouble).await;
    pair.database.restart(&[]);
    let revision = |told: &Value| {
        told["anchored_revision"].to_string().replace('"', "").parse::<u64>().unwrap()
    };
    let told = anchor(&|told| !trouble(told)).await;
    assert!(revision(&told) > revision(&before), "{told}");
    until(&admin, "the target follows", caught_up).await;
    node.stop();
    let new = fs::read(&store).unwrap();

    let refused = |code, words: &[&str]| {
        let ended = Server::attempt(&state, &Options::default()).err().expect("it does not start");
        assert_eq!(ended.status.code(), Some(code), "{}", ended.output);
        for word in words {
            assert!(ended.output.contains(word), "{word:?} is not in: {}", ended.output);
        }
    };
    let place = format!("in the replication target postgres://{}", postgres::ROLE);
    // The replica is further than the store; without the replica, the anchor is.
    fs::write(&store, &old).unwrap();
    refused(5, &["[replication] target", "older copy"]);
    let gone = ["head", "rows", "changes", "migrations", "nodes"];
    for table in gone {
        pair.database.sql(&format!("DROP TABLE {}.{table}", pair.schema));
    }
    refused(7, &["older than what node", &place, "--accept-rollback"]);
    // Nor does cutting the database off help.
    pair.database.crash();
    refused(6, &[&place, "cannot be read"]);
    pair.database.restart(&[]);
    // What has been shipped of the older copy is not the newer one.
    for table in gone {
        pair.database.sql(&format!("DROP TABLE {}.{table}", pair.schema));
    }
    fs::write(&store, &new).unwrap();
    let node =
        Server::attempt(&state, &Options::default()).unwrap_or_else(|e| panic!("{}", e.output));
    let admin = node.admin().await;
    until(&admin, "the target follows", caught_up).await;
    let refused = admin.call("Encrypt", json!({"key_id": key, "plaintext": "aGVsbG8="})).await;
    assert_eq!(refused.unwrap_err().code, Code::FailedPrecondition);
    node.stop();
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_fences_the_node_that_shipped() {
    let pair = Pair::new();
    let node = pair.node("");
    let admin = node.admin().await;
    let kept = sealed(&admin).await;
    until(&admin, "the target follows", caught_up).await;
    let (_, config) = pair.blank(&node.state, "new");
    let (code, said) = pair.command(&["promote", &pair.url(), "--config", &config]);
    assert_eq!(code, 0, "{said}");
    let promoted: Value = serde_json::from_str(&said).unwrap();
    let epoch = promoted["epoch"].as_u64().unwrap();
    // Again, it says the same and raises nothing.
    let (code, said) = pair.command(&["promote", &pair.url()]);
    assert_eq!(code, 0, "{said}");
    let again: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((again["epoch"].as_u64(), &again["revision"]), (Some(epoch), &promoted["revision"]));

    let began = Instant::now();
    let mut here_alone = 0;
    while admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await.is_ok() {
        here_alone += 1;
        assert!(began.elapsed() < PATIENCE);
    }
    let health = admin.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(health["status"], "HEALTH_STATUS_UNHEALTHY", "{health}");
    let state = node.state.clone();
    let said = node.output();
    assert!(said.contains("fenced"), "{said}");
    let (_, _, directory) = node.stop();
    let ended = Server::attempt(&state, &Options::default()).err().expect("it does not start");
    assert_eq!(ended.status.code(), Some(5), "{}", ended.output);
    assert!(ended.output.contains("was promoted and is the writer"), "{}", ended.output);
    // Whoever takes the section away does not get a second writer by it.
    let config = state.join("polykey.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.split("\n[replication]").next().unwrap()).unwrap();
    let ended = Server::attempt(&state, &Options::default()).err().expect("it does not start");
    assert_eq!(ended.status.code(), Some(5), "{}", ended.output);
    // Reading is another matter, once it is asked for.
    fs::write(&config, text + "when_fenced = \"read\"\n").unwrap();
    let node = Server::serve(&state, &config.display().to_string(), &Options::default());
    let node = node.unwrap_or_else(|ended| panic!("{}", ended.output));
    let admin = node.admin().await;
    opens(&admin, &kept).await;
    let refused =
        admin.call("CreateKey", json!({"key_type": "KEY_TYPE_AES_256"})).await.unwrap_err();
    assert_eq!(refused.code, Code::Unavailable, "{refused:?}");
    let found = replication(&admin).await;
    assert_eq!(found["state"], "fenced", "{found}");
    assert!(lag(&found) >= here_alone, "{found}, {here_alone}");
    let health = admin.call("HealthCheck", json!({})).await.unwrap();
    assert_eq!(health["status"], "HEALTH_STATUS_DEGRADED", "{health}");

    let new = pair.restored(&state, "writer");
    let admin = new.admin().await;
    opens(&admin, &kept).await;
    sealed(&admin).await;
    let listed = new.cli(&["audit", "list", "--limit", "200"]).1;
    assert!(listed.contains("Promote") && listed.contains("Restore"), "{listed}");
    drop(directory);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_of_another_store_is_refused() {
    let pair = Pair::new();
    let node = pair.node("");
    let admin = node.admin().await;
    until(&admin, "the target follows", caught_up).await;
    let _kept = node.stop().2;
    let (status, _, directory) = Server::dev().stop();
    assert!(status.success());
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    let config = state.join("polykey.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text + &pair.section("mode = \"sync\"")).unwrap();
    let ended = Server::attempt(&state, &Options::default()).err().expect("it does not start");
    assert_eq!(ended.status.code(), Some(5), "{}", ended.output);
    assert!(ended.output.contains("replica of another store"), "{}", ended.output);
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_on_either_side_the_target_equals_the_source() {
    let full = std::env::var("POLYKEY_FAULTS").is_ok_and(|value| value == "full");
    let (changes, kills) = if full { (100_000, 20) } else { (400, 2) };
    let mut pair = Pair::new();
    let mut node = pair.node("");
    let began = Instant::now();
    let done = Arc::new(AtomicUsize::new(0));
    let mut worst = (0, 0.0_f64);
    for round in 0..kills * 2 {
        let admin = node.admin().await;
        let stop = Arc::new(AtomicBool::new(false));
        let load: Vec<_> = (0..32)
            .map(|_| {
                let (admin, stop, done) = (admin.clone(), Arc::clone(&stop), Arc::clone(&done));
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let body = json!({"key_type": "KEY_TYPE_AES_256"});
                        match admin.call("CreateKey", body).await {
                            Ok(_) => done.fetch_add(1, Ordering::Relaxed),
                            Err(_) => return,
                        };
                    }
                })
            })
            .collect();
        let goal = changes * (round + 1) / (kills * 2);
        let mut killed = false;
        while done.load(Ordering::Relaxed) < goal {
            assert!(began.elapsed() < PATIENCE * 20, "{}", node.output());
            tokio::time::sleep(Duration::from_millis(20)).await;
            // Half way, one of the two is gone.
            let half = changes * round / (kills * 2) + changes / (kills * 4);
            if round % 2 == 0 && !killed && done.load(Ordering::Relaxed) >= half {
                let found = replication(&admin).await;
                let lag = lag(&found);
                worst =
                    (lag.max(worst.0), found["lag_seconds"].as_f64().unwrap_or(0.0).max(worst.1));
                pair.database.crash();
                pair.database.restart(&[]);
                killed = true;
            }
        }
        if round % 2 == 1 {
            // In the middle of everything.
            node = node.restart(true, &Options::default());
        }
        stop.store(true, Ordering::Relaxed);
        for each in load {
            each.await.unwrap();
        }
    }
    let loaded = began.elapsed();
    let admin = node.admin().await;
    let behind = replication(&admin).await;
    let until_then = Instant::now();
    until(&admin, "the target follows", caught_up).await;
    println!(
        "{} changes in {:.1} s, {kills} kills of either side; at worst {} revisions and {:.1} s behind \
         under load; {} revisions behind at its end, caught up {:.2} s later",
        done.load(Ordering::Relaxed),
        loaded.as_secs_f64(),
        worst.0,
        worst.1,
        lag(&behind),
        until_then.elapsed().as_secs_f64(),
    );
    let state = node.state.clone();
    let (status, output, directory) = node.stop();
    assert!(status.success(), "{output}");
    println!("{} rows are equal", pair.equal(&state).await);
    let restored = pair.restored(&state, "restored");
    let (code, out, err) = restored.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
    drop(directory);
}

// The target is a whole store: once it is promoted, a node serves from it where it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_target_is_served_from() {
    let pair = Pair::new();
    let node = pair.node("mode = \"sync\"");
    let admin = node.admin().await;
    let kept = sealed(&admin).await;
    let state = node.state.clone();
    let kept_directory = node.stop().2;
    let (code, said) = pair.command(&["promote", &pair.url()]);
    assert_eq!(code, 0, "{said}");
    let (blank, config) = pair.blank(&state, "served");
    let text = fs::read_to_string(&config).unwrap();
    let database = format!(
        "kind = \"postgres\"\nurl = \"{}\"\npassword = {{ file = \"{}\" }}\nschema = \"{}\"",
        pair.url(),
        pair.password(),
        pair.schema,
    );
    fs::write(&config, text.replace("path = \"polykey.redb\"", &database)).unwrap();
    let node = Server::serve(&blank, &config, &Options::default());
    let node = node.unwrap_or_else(|ended| panic!("{}", ended.output));
    let admin = node.admin().await;
    opens(&admin, &kept).await;
    sealed(&admin).await;
    let listed = node.cli(&["audit", "list", "--limit", "200"]).1;
    assert!(listed.contains("Promote"), "{listed}");
    let (code, out, err) = node.cli(&["store", "verify"]);
    assert_eq!(code, 0, "{out}{err}");
    // Whoever had shipped to it is not a writer any more.
    let ended = Server::attempt(&state, &Options::default()).err().expect("it does not start");
    assert_eq!(ended.status.code(), Some(5), "{}", ended.output);
    drop(kept_directory);
}
