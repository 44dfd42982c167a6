//! Tokens in directories of their own: SoftHSM, and Kryoptic where a module of it is named.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Pid;
use tempfile::TempDir;

use super::{POLYKEY, Server};

pub(crate) const PIN: &str = "PIN-canary-73519";

const PLACES: [&str; 4] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
];

/// A token that is set up; it goes with the value.
pub(crate) struct SoftHsm {
    dir: TempDir,
    module: PathBuf,
}

fn run(command: &mut Command) -> String {
    let name = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{name}: {e}; `make deps` installs softhsm2"));
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {text}");
    text.into_owned()
}

impl SoftHsm {
    /// A token labelled `polykey`, without keys.
    pub(crate) fn new() -> Self {
        let set = std::env::var_os("POLYKEY_SOFTHSM").map(PathBuf::from);
        let module = set.or_else(|| PLACES.iter().map(PathBuf::from).find(|path| path.exists()));
        let module = module.expect("SoftHSM 2 is missing: make deps, or apt-get install softhsm2");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tokens")).unwrap();
        let token = Self { dir, module };
        let tokens = token.path("tokens");
        let text = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            tokens.display()
        );
        fs::write(token.path("softhsm2.conf"), text).unwrap();
        polykey::pki::write_file(&token.path("pin"), PIN.as_bytes(), 0o600).unwrap();
        run(Command::new("softhsm2-util")
            .env("SOFTHSM2_CONF", token.path("softhsm2.conf"))
            .args(["--init-token", "--free", "--label", "polykey"])
            .args(["--so-pin", "12345678", "--pin", PIN]));
        token
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The section of a wrapper by its key `kek`.
    pub(crate) fn section(&self, name: &str) -> String {
        format!(
            "\n[{name}]\nkind = \"pkcs11\"\nmodule = \"{}\"\ntoken = {{ label = \"polykey\" }}\n\
             key = {{ label = \"kek\" }}\npin = {{ file = \"{}\" }}\ntimeout = \"2s\"\n\
             environment = {{ SOFTHSM2_CONF = \"{}\" }}\n",
            self.module.display(),
            self.path("pin").display(),
            self.path("softhsm2.conf").display()
        )
    }

    /// Makes the key, as an operator does.
    pub(crate) fn create_kek(&self, config: &Path, wrapper: &str) -> String {
        let mut command = Command::new(POLYKEY);
        command.args(["hsm", "create-kek", "--config"]).arg(config);
        run(command.args(["--wrapper", wrapper]))
    }

    /// What `polykey hsm list` says of it.
    pub(crate) fn list(&self) -> String {
        let conf = format!("SOFTHSM2_CONF={}", self.path("softhsm2.conf").display());
        let mut command = Command::new(POLYKEY);
        command.args(["hsm", "list", "--module"]).arg(&self.module);
        run(command.args(["--env", &conf]))
    }

    /// Takes the token away: its files are gone, as a device is that was pulled out.
    pub(crate) fn pull(&self) {
        fs::rename(self.path("tokens"), self.path("away")).unwrap();
        fs::create_dir(self.path("tokens")).unwrap();
    }

    /// Puts it back.
    pub(crate) fn insert(&self) {
        fs::remove_dir_all(self.path("tokens")).unwrap();
        fs::rename(self.path("away"), self.path("tokens")).unwrap();
    }
}

impl SoftHsm {
    /// How many objects are in it: a pair counts twice.
    pub(crate) fn objects(&self) -> usize {
        let tokens = fs::read_dir(self.path("tokens")).unwrap();
        let files = tokens.flat_map(|token| fs::read_dir(token.unwrap().path()).unwrap());
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let object = |name: &std::ffi::OsString| {
            name.to_string_lossy().ends_with(".object") && name != "token.object"
        };
        files.map(name).filter(object).count()
    }
}

/// The processes that have the module loaded.
pub(crate) fn workers(server: &Server) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let children = tasks
        .filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().map(|p| p.parse().unwrap()).collect::<Vec<i32>>());
    let workers: Vec<Pid> = children.filter_map(Pid::from_raw).collect();
    assert!(!workers.is_empty());
    workers
}

/// A token of Kryoptic that is set up; it goes with the value.
pub(crate) struct Kryoptic {
    dir: TempDir,
    module: PathBuf,
}

impl Kryoptic {
    /// One labelled `polykey`, where POLYKEY_KRYOPTIC names a module.
    pub(crate) fn new() -> Option<Self> {
        let module = PathBuf::from(std::env::var_os("POLYKEY_KRYOPTIC")?);
        let token = Self { dir: tempfile::tempdir().unwrap(), module };
        let path = |name: &str| token.dir.path().join(name);
        let database = path("db").display().to_string();
        let slot = format!("[[slots]]\nslot = 42\ndbtype = \"sqlite\"\ndbargs = \"{database}\"\n");
        fs::write(path("kryoptic.toml"), slot).unwrap();
        polykey::pki::write_file(&path("pin"), PIN.as_bytes(), 0o600).unwrap();
        let tool = |args: &[&str]| {
            let mut tool = Command::new("pkcs11-tool");
            tool.env("KRYOPTIC_CONF", path("kryoptic.toml")).arg("--module").arg(&token.module);
            run(tool.args(["--slot", "42", "--so-pin", "12345678"]).args(args));
        };
        tool(&["--init-token", "--label", "polykey"]);
        tool(&["--login", "--login-type", "so", "--init-pin", "--pin", PIN]);
        Some(token)
    }

    /// The section of a wrapper by its key `kek`.
    pub(crate) fn section(&self, name: &str) -> String {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        format!(
            "\n[{name}]\nkind = \"pkcs11\"\nmodule = \"{}\"\ntoken = {{ label = \"polykey\" }}\n\
             key = {{ label = \"kek\" }}\npin = {{ file = \"{}\" }}\ntimeout = \"20s\"\n\
             environment = {{ KRYOPTIC_CONF = \"{}\" }}\n",
            self.module.display(),
            path("pin"),
            path("kryoptic.toml")
        )
    }
}
