//! Starts the real binary on a directory of its own, waits until it says that it listens, and ends it by its pid.

#[cfg(feature = "aws")]
pub(crate) mod aws;
pub(crate) mod client;
#[cfg(feature = "postgres")]
pub(crate) mod cluster;
pub(crate) mod collector;
#[cfg(feature = "postgres")]
pub(crate) mod gateway;
pub(crate) mod receiver;
pub(crate) mod softhsm;
pub(crate) mod steps;
pub(crate) mod wire;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polykey::net::client::ClientFiles;
use serde_json::{Value, json};
use tempfile::TempDir;

use client::Client;

/// Longer than anything here takes on a loaded machine; a test that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// The binary under test.
pub(crate) const POLYKEY: &str = env!("CARGO_BIN_EXE_polykey");

/// Notes that a test cannot run here, and why; it returns then.
pub(crate) fn skip(test: &str, why: &str) {
    use std::io::Write as _;
    if let Some(path) = std::env::var_os("POLYKEY_TEST_SKIPS") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{test}: {why}").unwrap();
    }
}

/// How to start it.
#[derive(Default, Clone)]
pub(crate) struct Options {
    /// Further arguments.
    pub(crate) args: Vec<String>,
    /// Further environment.
    pub(crate) env: Vec<(String, String)>,
    /// A program that runs it, with its arguments; it must leave it our child.
    pub(crate) under: Vec<String>,
}

/// A server that ended before it listened.
#[derive(Debug)]
pub(crate) struct Ended {
    /// How.
    pub(crate) status: ExitStatus,
    /// What it wrote.
    pub(crate) output: String,
}

/// A running `polykey`.
pub(crate) struct Server {
    child: Mutex<Child>,
    output: Arc<Mutex<String>>,
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
    /// Where it keeps everything.
    pub(crate) state: PathBuf,
    directory: Option<TempDir>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies a stream line by line into `all` and to `lines`, until it ends.
fn copy(from: impl Read + Send + 'static, all: Arc<Mutex<String>>, lines: Sender<String>) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            locked(&all).push_str(&text);
            let _ = lines.send(text);
            line.clear();
        }
    });
}

/// The address in a line that says where the server listens.
fn listening(line: &str) -> Option<String> {
    if !line.to_lowercase().contains("listening") {
        return None;
    }
    let at = line.find("127.0.0.1:")?;
    let rest = line.get(at..)?;
    let port: String =
        rest.trim_start_matches("127.0.0.1:").chars().take_while(char::is_ascii_digit).collect();
    (!port.is_empty() && port != "0").then(|| format!("127.0.0.1:{port}"))
}

impl Server {
    /// `polykey dev` in a new directory.
    pub(crate) fn dev() -> Self {
        Self::dev_with(&Options::default())
    }

    /// `polykey dev` in a new directory.
    pub(crate) fn dev_with(options: &Options) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        Self::dev_in(&state, options, Some(directory))
    }

    /// `polykey dev` in this directory.
    pub(crate) fn dev_in(state: &Path, options: &Options, directory: Option<TempDir>) -> Self {
        let mut args = vec!["dev".to_owned(), "--dir".into(), state.display().to_string()];
        args.extend(["--listen".into(), "127.0.0.1:0".into()]);
        args.extend(options.args.iter().cloned());
        Self::start(&args, options, state, directory)
    }

    /// `polykey dev` in a directory that the caller keeps; whether it listens or ends is for the caller to judge.
    pub(crate) fn attempt(state: &Path, options: &Options) -> Result<Self, Ended> {
        let mut args = vec!["dev".to_owned(), "--dir".into(), state.display().to_string()];
        args.extend(["--listen".into(), "127.0.0.1:0".into()]);
        args.extend(options.args.iter().cloned());
        Self::launch(&args, options, state, None)
    }

    /// `polykey serve` with a configuration that `polykey dev` made in `state`, at any port.
    pub(crate) fn serve(state: &Path, config: &str, options: &Options) -> Result<Self, Ended> {
        let text = std::fs::read_to_string(config).unwrap();
        let any = |line: &str| match line.starts_with("address = ") {
            true => "address = \"127.0.0.1:0\"\n".to_owned(),
            false => format!("{line}\n"),
        };
        std::fs::write(config, text.lines().map(any).collect::<String>()).unwrap();
        let mut args = vec!["serve".to_owned(), "--config".into(), config.into()];
        args.extend(options.args.iter().cloned());
        let server = Self::launch(&args, options, state, None)?;
        // The profile is of the node as it was before.
        if let Ok(text) = std::fs::read_to_string(server.profile())
            && let Some(old) = listening(&format!("listening {text}"))
        {
            std::fs::write(server.profile(), text.replace(&old, &server.address)).unwrap();
        }
        Ok(server)
    }

    /// `polykey dev` in a directory that exists; what it wrote if it ends instead of listening.
    pub(crate) fn try_again(state: &Path) -> Result<Self, String> {
        Self::attempt(state, &Options::default()).map_err(|ended| ended.output)
    }

    fn start(args: &[String], options: &Options, state: &Path, directory: Option<TempDir>) -> Self {
        Self::launch(args, options, state, directory).unwrap_or_else(|ended| {
            panic!("polykey {args:?} did not get to listen: {}\n{}", ended.status, ended.output)
        })
    }

    fn launch(
        args: &[String],
        options: &Options,
        state: &Path,
        directory: Option<TempDir>,
    ) -> Result<Self, Ended> {
        let mut command = match options.under.split_first() {
            None => Command::new(POLYKEY),
            Some((program, rest)) => {
                let mut command = Command::new(program);
                command.args(rest).arg(POLYKEY);
                command
            }
        };
        let mut child = command
            .args(args)
            .env_remove("POLYKEY_PROFILE")
            .env_remove("POLYKEY_LOG")
            .env_remove("RUST_LOG")
            .envs(options.env.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        copy(child.stdout.take().unwrap(), Arc::clone(&output), sender.clone());
        copy(child.stderr.take().unwrap(), Arc::clone(&output), sender);
        let address = loop {
            match lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    if let Some(address) = listening(&line) {
                        break address;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = child.wait().unwrap();
                    let output = locked(&output).clone();
                    return Err(Ended { status, output });
                }
                Err(RecvTimeoutError::Timeout) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    panic!("polykey {args:?} neither listens nor ends:\n{}", locked(&output));
                }
            }
        };
        let child = Mutex::new(child);
        Ok(Self { child, output, address, state: state.to_owned(), directory })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        locked(&self.child).id()
    }

    /// Everything it has written so far, to both streams.
    pub(crate) fn output(&self) -> String {
        locked(&self.output).clone()
    }

    /// Waits until it has written this text so many times.
    pub(crate) async fn says(&self, text: &str, times: usize) {
        let said = || self.output().matches(text).count();
        let wait = async {
            while said() < times {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, wait).await;
        assert!(waited.is_ok(), "`{text}` {} of {times} times:\n{}", said(), self.output());
    }

    /// The address in the line of its log that says what this port is. What `dev` says on the other stream may
    /// be read before it.
    pub(crate) fn port(&self, name: &str) -> String {
        let text = format!("the {name} port is ");
        let begun = std::time::Instant::now();
        while !self.output().split(&text).nth(1).is_some_and(|rest| rest.contains('\n')) {
            assert!(begun.elapsed() < PATIENCE, "no {text}\n{}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = self.output();
        let from = output.split(&text).nth(1).unwrap();
        from.split(|c: char| !(c.is_ascii_digit() || c == '.' || c == ':'))
            .next()
            .unwrap()
            .to_owned()
    }

    /// Asks it to stop, waits until it has, and gives back its directory.
    pub(crate) fn stop(mut self) -> (ExitStatus, String, Option<TempDir>) {
        let status = {
            let mut child = locked(&self.child);
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            child.wait().unwrap()
        };
        (status, self.output(), self.directory.take())
    }

    /// `polykey dev` whose configuration, once made, was changed by `edit`.
    pub(crate) fn dev_configured(edit: impl FnOnce(String) -> String) -> Self {
        Self::dev_configured_with(&Options::default(), edit)
    }

    /// As [`Self::dev_configured`], in this environment.
    pub(crate) fn dev_configured_with(
        options: &Options,
        edit: impl FnOnce(String) -> String,
    ) -> Self {
        let (status, output, directory) = Self::dev().stop();
        assert!(status.success(), "{status}: {output}");
        let directory = directory.unwrap();
        let state = directory.path().join("state");
        let path = state.join("polykey.toml");
        let text = edit(std::fs::read_to_string(&path).unwrap());
        toml::from_str::<toml::Table>(&text).unwrap();
        std::fs::write(&path, text).unwrap();
        Self::dev_in(&state, options, Some(directory))
    }

    /// Kills it with SIGKILL or lets it drain, and starts it again on the same directory.
    pub(crate) fn restart(mut self, kill: bool, options: &Options) -> Self {
        let state = self.state.clone();
        let directory = if kill {
            let mut child = locked(&self.child);
            child.kill().unwrap();
            child.wait().unwrap();
            drop(child);
            self.directory.take()
        } else {
            let (status, output, directory) = self.stop();
            assert!(status.success(), "{status}: {output}");
            directory
        };
        Self::dev_in(&state, options, directory)
    }

    /// The profile that `polykey dev` wrote.
    pub(crate) fn profile(&self) -> PathBuf {
        self.state.join("profile.toml")
    }

    /// Its files and names, as the profile tells them.
    pub(crate) fn profile_files(&self) -> (ClientFiles, String, String) {
        let text = std::fs::read_to_string(self.profile()).unwrap();
        let profile: toml::Table = toml::from_str(&text).unwrap();
        let text = |name: &str| profile.get(name).and_then(|v| v.as_str()).unwrap_or_default();
        let files = ClientFiles {
            server_ca: self.state.join(text("ca")),
            certificate: self.state.join(text("certificate")),
            key: self.state.join(text("key")),
        };
        let key = match text("api_key_file") {
            "" => String::new(),
            path => std::fs::read_to_string(self.state.join(path)).unwrap().trim().to_owned(),
        };
        (files, text("client_id").to_owned(), key)
    }

    /// The administrator of `polykey dev`, logged in.
    pub(crate) async fn admin(&self) -> Client {
        let (files, id, api_key) = self.profile_files();
        let mut client = Client::new(&self.address, files, &id, &api_key);
        client.login().await.unwrap();
        client
    }

    /// Adds a client with these roles, and logs it in.
    pub(crate) async fn client(&self, admin: &Client, id: &str, roles: &[&str]) -> Client {
        let mut client = self.stranger(admin, id, json!({"roles": roles})).await;
        client.login().await.unwrap();
        client
    }

    /// Adds a client with these fields of CreateClientRequest, and does not log it in.
    pub(crate) async fn stranger(&self, admin: &Client, id: &str, fields: Value) -> Client {
        let mut request = json!({
            "client_id": id,
            "name": id,
            "identities": [{
                "kind": "CERTIFICATE_IDENTITY_KIND_SPIFFE_URI",
                "value": polykey::pki::client_identity(id).unwrap().to_string(),
            }],
        });
        for (name, value) in fields.as_object().unwrap() {
            request[name] = value.clone();
        }
        let created = admin.call("CreateClient", request).await.unwrap();
        let files = self.certificate(admin, id, id).await;
        Client::new(&self.address, files, id, created["api_key"].as_str().unwrap())
    }

    /// Has a certificate issued for `id` and keeps it under `name`.
    pub(crate) async fn certificate(&self, admin: &Client, id: &str, name: &str) -> ClientFiles {
        let issued = admin.call("IssueCertificate", json!({"client_id": id})).await.unwrap();
        let directory = self.state.parent().unwrap().join("certificates");
        std::fs::create_dir_all(&directory).unwrap();
        let certificate = directory.join(format!("{name}.pem"));
        let key = directory.join(format!("{name}.key"));
        let text = |field: &str| issued[field].as_str().unwrap().to_owned();
        polykey::pki::write_file(&certificate, text("certificate_chain_pem").as_bytes(), 0o644)
            .unwrap();
        polykey::pki::write_file(&key, text("private_key_pem").as_bytes(), 0o600).unwrap();
        let (files, ..) = self.profile_files();
        ClientFiles { server_ca: files.server_ca, certificate, key }
    }

    /// Runs `polykey ARGS` as the administrator, and gives its exit code and output.
    pub(crate) fn cli(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(POLYKEY)
            .args(args)
            .env("POLYKEY_PROFILE", self.profile())
            .env_remove("POLYKEY_LOG")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut child = locked(&self.child);
        let _ = child.kill();
        let _ = child.wait();
        drop(child);
        if std::thread::panicking() {
            let output = self.output();
            let from = output.len().saturating_sub(4000);
            let tail = output.char_indices().find(|(i, _)| *i >= from).map_or(0, |(i, _)| i);
            eprintln!("--- the server's output:\n{}", &output[tail..]);
        }
    }
}
