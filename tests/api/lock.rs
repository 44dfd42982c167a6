//! Locking and unlocking a node on its machine, quorums, and what is left in memory.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::common::client::Client;
use crate::common::steps::{TEXT, cli, opens, seal, secret};
use crate::common::{Options, PATIENCE, POLYKEY, Server, skip};

/// `polykey ARGS --socket` of the node in `state`.
fn door(state: &Path, args: &[&str]) -> (i32, String) {
    let (verb, rest) = args.split_first().unwrap();
    let socket = state.join("polykey.sock");
    let mut command = Command::new(POLYKEY);
    command.arg(verb).arg("--socket").arg(socket).args(rest).stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text.into_owned())
}

/// `polykey serve`, ended with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves what is in `state`, which is to wait when it is locked.
fn waiting(state: &Path) -> Process {
    let file = state.join("polykey.toml");
    let text = fs::read_to_string(&file).unwrap();
    if !text.contains("when_locked") {
        fs::write(&file, format!("{text}\n[unlock]\nwhen_locked = \"wait\"\n")).unwrap();
    }
    let mut command = Command::new(POLYKEY);
    command.args(["serve", "--config"]).arg(&file).stdin(Stdio::null());
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let process = Process(child);
    let until = std::time::Instant::now() + PATIENCE;
    while door(state, &["unlock", "--status"]).1.contains("No node is running") {
        assert!(std::time::Instant::now() < until, "no socket");
        std::thread::yield_now();
    }
    process
}

/// A client of the node at the address that its status tells.
async fn admin_of(server: &Server, said: &str) -> Client {
    let at = said.find("127.0.0.1:").unwrap_or_else(|| panic!("{said}"));
    let address: String = said[at..].split_whitespace().next().unwrap().to_owned();
    let (files, id, api_key) = server.profile_files();
    let mut client = Client::new(&address, files, &id, &api_key);
    client.login().await.unwrap();
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_node_serves_nobody_until_it_is_unlocked() {
    let server = Server::dev();
    let state = server.state.clone();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let kept = seal(&admin, &key).await;
    let (code, said) = door(&state, &["unlock", "--status"]);
    assert_eq!((code, said.contains("not locked")), (0, true), "{said}");
    let (code, said) = door(&state, &["lock"]);
    assert_eq!((code, said.trim()), (0, "locked"), "{said}");
    let refused = admin.call("WhoAmI", json!({})).await;
    assert!(refused.is_err(), "{refused:?}");
    assert!(std::net::TcpStream::connect(&server.address).is_err(), "it listens still");
    let (code, said) = door(&state, &["unlock", "--status"]);
    assert_eq!((code, said.contains("polykey lock")), (6, true), "{said}");
    // Not with its master key gone, and the reason is told; then as it was.
    let master = state.join("master.key");
    let away = state.join("away.key");
    fs::rename(&master, &away).unwrap();
    let (code, said) = door(&state, &["unlock"]);
    assert_eq!(code, 6, "{said}");
    assert!(said.contains("master.key") && said.contains("cannot be read"), "{said}");
    fs::rename(&away, &master).unwrap();
    // Nor with a passphrase of no slot, whatever else could open it.
    let words = secret(&state, "words", "correct horse battery stable").display().to_string();
    let (code, said) = door(&state, &["unlock", "--passphrase", &words]);
    assert_eq!((code, said.contains("locked still")), (6, true), "{said}");
    let (code, said) = door(&state, &["unlock"]);
    assert_eq!(code, 0, "{said}");
    let admin = admin_of(&server, &said).await;
    opens(&admin, &kept).await;
    let events = admin.call("ListAuditEvents", json!({"page_size": 50})).await.unwrap().to_string();
    assert!(events.contains("LockNode") && events.contains("UnlockNode"), "{events}");
    // Again, and then an end: nothing of it hangs.
    assert_eq!(door(&state, &["lock"]).0, 0);
    let (status, output, _) = server.stop();
    assert!(status.success(), "{status}: {output}");
    assert!(!state.join("polykey.sock").exists());
    let (code, said) = door(&state, &["lock"]);
    assert_eq!((code, said.contains("No node is running")), (6, true), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn people_unlock_with_a_passphrase_a_recovery_key_or_shares_one_by_one() {
    let words = "correct horse battery staple";
    let server = Server::dev_configured(|text| {
        format!(
            "{text}\n[wrappers.words]\npassphrase = {{ file = \"words.txt\" }}\n\
             argon2 = {{ memory_kib = 19456, passes = 2, lanes = 1 }}\n"
        )
    });
    let state = server.state.clone();
    let file = secret(&state, "words.txt", &format!("{words}\n"));
    cli(&server, &["root", "slot", "add", "words", "--wrapper", "words"]);
    let away = tempfile::tempdir().unwrap();
    let out = away.path().display().to_string();
    let shares = cli(
        &server,
        &["root", "slot", "add", "s", "--shares", "3", "--threshold", "2", "--out", &out],
    );
    let share = |n: usize| shares["shares"][n].as_str().unwrap().to_owned();
    let whole = away.path().join("whole").display().to_string();
    let made = cli(&server, &["root", "recovery-key", "--out", &whole]);
    let public = made["public_key"].as_str().unwrap();
    cli(&server, &["root", "slot", "add", "whole", "--recovery-key", public]);
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let kept = seal(&admin, &key).await;
    let directory = server.stop().2;
    // No secret is left on the machine.
    let typed = away.path().join("typed").display().to_string();
    fs::rename(&file, &typed).unwrap();
    fs::remove_file(state.join("master.key")).unwrap();

    let node = waiting(&state);
    let (code, said) = door(&state, &["unlock", "--status"]);
    assert_eq!((code, said.contains("master.key")), (6, true), "{said}");
    let wrong = secret(away.path(), "wrong", "correct horse battery stable").display().to_string();
    let (code, said) = door(&state, &["unlock", "--passphrase", &wrong]);
    assert_eq!((code, said.contains("locked still")), (6, true), "{said}");
    assert!(!said.contains("stable"), "{said}");
    let (code, said) = door(&state, &["unlock", "--passphrase", &typed]);
    assert_eq!(code, 0, "{said}");
    let profile = Profile { state: &state };
    let admin = profile.admin(&said).await;
    opens(&admin, &kept).await;
    // Its words are kept, so that the root can be rotated.
    admin.call("RotateRoot", json!({})).await.unwrap_err();

    assert_eq!(door(&state, &["lock"]).0, 0);
    let (code, said) = door(&state, &["unlock", "--share", &share(2)]);
    assert_eq!((code, said.contains("1 of 2 shares")), (6, true), "{said}");
    let (code, said) = door(&state, &["unlock", "--share", &share(2)]);
    assert_eq!((code, said.contains("1 of 2 shares")), (6, true), "{said}");
    let (code, said) = door(&state, &["unlock", "--share", &share(0)]);
    assert_eq!(code, 0, "{said}");
    opens(&profile.admin(&said).await, &kept).await;

    // Shares are not kept beyond the try that they were given for, nor beyond a lock.
    assert_eq!(door(&state, &["lock"]).0, 0);
    assert_eq!(door(&state, &["unlock", "--share", &share(1)]).0, 6);
    assert_eq!(door(&state, &["lock"]).0, 0);
    let (code, said) = door(&state, &["unlock", "--share", &share(0)]);
    assert_eq!((code, said.contains("1 of 2 shares")), (6, true), "{said}");
    let (server_cert, away_cert) = (state.join("server.pem"), state.join("server.away"));
    fs::rename(&server_cert, &away_cert).unwrap();
    let (code, said) = door(&state, &["unlock", "--share", &share(1)]);
    assert_eq!((code, said.contains("server.pem")), (6, true), "{said}");
    fs::rename(&away_cert, &server_cert).unwrap();
    let (code, said) = door(&state, &["unlock", "--share", &share(2)]);
    assert_eq!((code, said.contains("1 of 2 shares")), (6, true), "{said}");
    assert_eq!(door(&state, &["lock"]).0, 0);
    let (code, said) = door(&state, &["unlock", "--share", &share(1), "--share", &share(0)]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(door(&state, &["lock"]).0, 0);
    let (code, said) = door(&state, &["unlock", "--key", &whole]);
    assert_eq!(code, 0, "{said}");
    opens(&profile.admin(&said).await, &kept).await;
    drop((node, directory));
}

/// The files of `polykey dev` in a directory whose node is another process by now.
struct Profile<'a> {
    state: &'a Path,
}

impl Profile<'_> {
    async fn admin(&self, said: &str) -> Client {
        let text = fs::read_to_string(self.state.join("profile.toml")).unwrap();
        let profile: toml::Table = toml::from_str(&text).unwrap();
        let text = |name: &str| profile[name].as_str().unwrap().to_owned();
        let files = polykey::net::client::ClientFiles {
            server_ca: self.state.join(text("ca")),
            certificate: self.state.join(text("certificate")),
            key: self.state.join(text("key")),
        };
        let api_key = fs::read_to_string(self.state.join(text("api_key_file"))).unwrap();
        let at = said.find("127.0.0.1:").unwrap_or_else(|| panic!("{said}"));
        let address = said[at..].split_whitespace().next().unwrap();
        let mut client = Client::new(address, files, &text("client_id"), api_key.trim());
        client.login().await.unwrap();
        client
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quorum_opens_with_any_two_of_three_and_not_with_one() {
    let server = Server::dev_configured(|text| {
        format!(
            "{text}\n[wrappers.a]\nsource = {{ file = \"a.key\" }}\n[wrappers.b]\n\
             source = {{ file = \"b.key\" }}\n[wrappers.c]\nsource = {{ file = \"c.key\" }}\n\
             [wrappers.two]\nkind = \"quorum\"\nof = [\"a\", \"b\", \"c\"]\nthreshold = 2\n"
        )
    });
    let state = server.state.clone();
    let names = ["a.key", "b.key", "c.key"];
    for name in &names[..2] {
        secret(&state, name, &polykey_hsm::generate_master_key().unwrap());
    }
    // A quorum that lacks a member is not made.
    let (code, _, said) = server.cli(&["root", "slot", "add", "two", "--wrapper", "two"]);
    assert_ne!(code, 0, "{said}");
    assert!(said.contains("member"), "{said}");
    secret(&state, names[2], &polykey_hsm::generate_master_key().unwrap());
    let added = cli(&server, &["root", "slot", "add", "two", "--wrapper", "two"]);
    assert_eq!(added["slot"]["source"], "2 of a, b, c", "{added}");
    cli(&server, &["root", "slot", "remove", "main"]);
    cli(&server, &["root", "rotate"]);
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let kept = seal(&admin, &key).await;
    let directory = server.stop().2;
    fs::remove_file(state.join("master.key")).unwrap();
    let config = state.join("polykey.toml").display().to_string();
    for missing in names {
        let (path, hidden) = (state.join(missing), state.join("hidden"));
        fs::rename(&path, &hidden).unwrap();
        let server = Server::serve(&state, &config, &Options::default());
        let server = server.unwrap_or_else(|ended| panic!("{missing}: {}", ended.output));
        opens(&server.admin().await, &kept).await;
        server.stop();
        fs::rename(&hidden, &path).unwrap();
    }
    // A member whose secret was replaced is a member no more, and the node knows it at once.
    let server = Server::serve(&state, &config, &Options::default()).unwrap();
    let made = polykey_hsm::generate_master_key().unwrap();
    secret(&state, "main.key", &made);
    let text = fs::read_to_string(&config).unwrap();
    let more = "\n[wrappers.other]\nsource = { file = \"main.key\" }\n";
    fs::write(&config, text + more).unwrap();
    cli(&server, &["root", "slot", "add", "other", "--wrapper", "other"]);
    for name in &names[1..] {
        fs::remove_file(state.join(name)).unwrap();
        secret(&state, name, &polykey_hsm::generate_master_key().unwrap());
        let source = format!("file:{}", state.join(name).display());
        cli(&server, &["root", "slot", "rotate", "other", "--source", &source]);
    }
    let (code, said, _) = server.cli(&["root", "slot", "test", "two"]);
    assert_eq!(code, 7, "{said}");
    // What is left may not go.
    let (code, _, said) = server.cli(&["root", "slot", "remove", "other"]);
    assert_ne!(code, 0, "{said}");
    server.stop();
    for missing in &names[1..] {
        fs::remove_file(state.join(missing)).unwrap();
    }
    let ended = Server::serve(&state, &config, &Options::default()).err().unwrap();
    assert_eq!(ended.status.code(), Some(7), "{}", ended.output);
    assert!(ended.output.contains("1 of its 3 members"), "{}", ended.output);
    drop(directory);
}

/// Shows every writable mapping of a process; `None` where its memory cannot be read.
pub(crate) fn each_mapping(pid: u32, mut show: impl FnMut(&[u8])) -> Option<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut memory = fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    for line in maps.lines().filter(|line| line.contains(" rw") && !line.contains("[v")) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        let mut bytes = vec![0; usize::try_from(to - from).ok()?];
        memory.seek(SeekFrom::Start(from)).ok()?;
        // A mapping may be gone by now, or have no memory behind it.
        if memory.read_exact(&mut bytes).is_ok() {
            show(&bytes);
        }
    }
    Some(())
}

/// How often each of these stands in the memory of a process; `None` where that cannot be read.
fn in_memory(pid: u32, needles: &[&[u8]]) -> Option<Vec<usize>> {
    let mut found = vec![0; needles.len()];
    each_mapping(pid, |bytes| {
        for (needle, count) in needles.iter().zip(&mut found) {
            *count += bytes.windows(needle.len()).filter(|window| window == needle).count();
        }
    })?;
    Some(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_is_in_memory_after_use_and_nothing_after_a_lock() {
    let test = "api lock::no_key_is_in_memory_after_use_and_nothing_after_a_lock";
    let server = Server::dev();
    let state = server.state.clone();
    let admin = server.admin().await;
    let keys = [
        admin.create(json!({"exportable": true})).await,
        admin.create(json!({"key_type": "KEY_TYPE_ED25519", "exportable": true})).await,
    ];
    // What they are is asked of another process, so that no answer's buffer holds them.
    let mut known: Vec<Vec<u8>> = Vec::new();
    for key in &keys {
        let body = json!({"key_id": key, "mode": "EXPORT_MODE_PLAIN"});
        let got = admin.call("ExportKey", body).await.unwrap();
        let text = got["key_material"]["plaintext"].as_str().unwrap();
        let bytes = data_encoding::BASE64.decode(text.as_bytes()).unwrap();
        // Of the PKCS #8 structure (RFC 8410), the seed, which stands after its two lengths.
        let at =
            bytes.windows(4).position(|w| w == [0x04, 0x22, 0x04, 0x20]).map_or(0, |at| at + 4);
        known.push(bytes[at..at + 32].to_vec());
    }
    let master = fs::read_to_string(state.join("master.key")).unwrap();
    let master_raw = data_encoding::BASE64.decode(master.trim().as_bytes()).unwrap();
    let server = server.restart(false, &Options::default());
    let admin = server.admin().await;
    let sealed = seal(&admin, &keys[0]).await;
    opens(&admin, &sealed).await;
    let sign = json!({"key_id": keys[1], "message": TEXT});
    admin.call("Sign", sign).await.unwrap();
    let needles: Vec<&[u8]> = vec![&known[0], &known[1], &master_raw, master.trim().as_bytes()];
    // A node's cached private keys may be there; the symmetric key of the call may not.
    let Some(found) = in_memory(server.pid(), &needles) else {
        return skip(test, "needs root: the memory of a hardened process is private");
    };
    assert_eq!(found[0], 0, "the data key is in memory after its use");
    assert_eq!(found[3], 0, "the master key's text is in memory");
    // The search finds what is there: the parsed key, or the master key that rotation needs.
    assert!(found[1] + found[2] > 0, "the search finds nothing at all");
    assert_eq!(door(&state, &["lock"]).0, 0);
    let found = in_memory(server.pid(), &needles).unwrap();
    assert_eq!(found, [0, 0, 0, 0], "keys are in memory after the lock");
}
