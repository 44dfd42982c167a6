//! Tokens for the tests: SoftHSM in a directory of its own, behind a shim that injects faults.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::executor::block_on;
use polykey_hsm::pkcs11::{
    KeySelector, MechanismChoice, Pkcs11Config, Pkcs11Token, Pkcs11Wrapper, TokenSelector,
    WorkerCommand,
};
use polykey_hsm::{
    Deadline, KeyMaterial, KeyWrapper, SecretSource, WrapContext, WrapError, WrappedKey,
};
use tempfile::TempDir;

pub const PIN: &str = "1234";
pub const CONTEXT: WrapContext = WrapContext::root_slot([1; 16], [2; 16]);
/// A wrapping key of its own random id is as good as any.
pub const KEK: &str = "kek";

const SOFTHSM: [&str; 4] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
];

/// Tells `make test` of a test that cannot run here.
pub fn skipped(name: &str, reason: &str) {
    println!("SKIPPED {name}: {reason}");
    if let Some(path) = std::env::var_os("POLYKEY_TEST_SKIPS") {
        let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        writeln!(file, "{name}: {reason}").unwrap();
    }
}

pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

pub fn softhsm() -> PathBuf {
    let set = std::env::var_os("POLYKEY_SOFTHSM").map(PathBuf::from);
    let found = set.or_else(|| SOFTHSM.iter().map(PathBuf::from).find(|path| path.exists()));
    found.expect("SoftHSM 2 is missing: make deps, or apt-get install softhsm2")
}

pub fn worker() -> WorkerCommand {
    WorkerCommand {
        program: env!("CARGO_BIN_EXE_pkcs11-worker-for-tests").into(),
        args: Vec::new(),
    }
}

/// The shim, compiled once.
fn shim() -> &'static Path {
    static SHIM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = SHIM.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shim.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pkcs11/shim.c");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .args([&path, &source])
            .arg("-ldl")
            .status()
            .expect("cc is missing: make deps, or apt-get install gcc");
        assert!(compiled.success(), "the shim does not compile");
        (dir, path)
    });
    path
}

pub fn run(command: &mut Command) {
    let name = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{name}: {e} (make deps installs it)"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
}

/// A directory with a SoftHSM token.
pub struct Lab {
    pub dir: TempDir,
    pub config: Pkcs11Config,
    rules: AtomicU32,
}

impl Lab {
    /// A token without keys, behind the shim.
    pub fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tokens")).unwrap();
        let lab = Self::around(dir);
        run(lab
            .util()
            .args(["--init-token", "--free", "--label", "polykey"])
            .args(["--so-pin", "12345678", "--pin", PIN]));
        lab
    }

    /// A token with an AES key, behind the shim.
    pub fn new() -> Self {
        let lab = Self::empty();
        block_on(lab.token().create_kek(&KeySelector::label(KEK), soon())).unwrap();
        fs::remove_file(lab.path("log")).unwrap();
        lab
    }

    /// The directory of a token that exists already.
    pub fn around(dir: TempDir) -> Self {
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let tokens = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            path("tokens")
        );
        fs::write(path("softhsm2.conf"), tokens).unwrap();
        secret_file(Path::new(&path("pin")), &format!("{PIN}\n"));
        fs::write(path("control"), "0\n").unwrap();
        let label = TokenSelector::Label("polykey".to_owned());
        let pin = SecretSource::File(path("pin").into());
        let mut config = Pkcs11Config::new(shim(), label, pin);
        config.environment = vec![
            ("SOFTHSM2_CONF".to_owned(), path("softhsm2.conf")),
            ("SHIM_MODULE".to_owned(), softhsm().to_str().unwrap().to_owned()),
            ("SHIM_CONTROL".to_owned(), path("control")),
            ("SHIM_LOG".to_owned(), path("log")),
        ];
        Self { dir, config, rules: AtomicU32::new(1) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn util(&self) -> Command {
        let mut util = Command::new("softhsm2-util");
        util.env("SOFTHSM2_CONF", self.path("softhsm2.conf"));
        util
    }

    pub fn token(&self) -> Pkcs11Token {
        Pkcs11Token::new(self.config.clone(), worker()).unwrap()
    }

    pub fn wrapper(&self) -> Pkcs11Wrapper {
        self.token().wrapper(KeySelector::label(KEK)).unwrap()
    }

    /// From now on the shim does this, its counters starting anew.
    pub fn rules(&self, rules: &str) {
        let id = self.rules.fetch_add(1, Ordering::Relaxed);
        let new = self.path("control.new");
        fs::write(&new, format!("{id}\n{rules}\n")).unwrap();
        fs::rename(new, self.path("control")).unwrap();
    }

    pub fn heal(&self) {
        self.rules("");
    }

    /// How often the module was called so.
    pub fn calls(&self, name: &str) -> usize {
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().filter(|line| *line == name).count()
    }

    /// Calls by which a key could come to be.
    pub fn minted(&self) -> usize {
        self.calls("C_GenerateKey") + self.calls("C_GenerateKeyPair")
    }
}

/// A Kryoptic token, where a module is named, and the directory that it is in.
pub fn kryoptic(test: &str) -> Option<(TempDir, Pkcs11Config)> {
    let Some(module) = std::env::var_os("POLYKEY_KRYOPTIC") else {
        skipped(test, "POLYKEY_KRYOPTIC names no module (make kryoptic builds one and runs this)");
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let slot = format!("[[slots]]\nslot = 42\ndbtype = \"sqlite\"\ndbargs = \"{}\"\n", path("db"));
    fs::write(path("kryoptic.toml"), slot).unwrap();
    secret_file(Path::new(&path("pin")), PIN);
    let label = TokenSelector::Label("polykey".to_owned());
    let pin = SecretSource::File(path("pin").into());
    let mut config = Pkcs11Config::new(&module, label, pin);
    config.environment = vec![("KRYOPTIC_CONF".to_owned(), path("kryoptic.toml"))];
    let so = ["--so-pin", "12345678"];
    run(kryoptic_tool(&config).args(so).args(["--init-token", "--label", "polykey"]));
    let init = ["--login", "--login-type", "so", "--init-pin", "--pin", PIN];
    run(kryoptic_tool(&config).args(so).args(init));
    Some((dir, config))
}

/// OpenSC's tool on a token of Kryoptic.
pub fn kryoptic_tool(config: &Pkcs11Config) -> Command {
    let mut tool = Command::new("pkcs11-tool");
    tool.envs(config.environment.clone()).arg("--module").arg(&config.module);
    tool.args(["--slot", "42"]);
    tool
}

pub fn secret_file(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

pub fn secret() -> KeyMaterial {
    KeyMaterial::from_secret(b"a secret of this test, 49 bytes long, as roots are".to_vec())
        .unwrap()
}

pub fn wrap(wrapper: &Pkcs11Wrapper) -> Result<WrappedKey, WrapError> {
    block_on(wrapper.wrap_key(&secret(), &CONTEXT, soon()))
}

/// Whether it opens; panics where something else comes out.
pub fn opens(wrapper: &Pkcs11Wrapper, wrapped: &WrappedKey) -> Result<(), WrapError> {
    let opened = block_on(wrapper.unwrap_key(wrapped, &CONTEXT, soon()))?;
    assert!(opened.expose_for_export() == secret().expose_for_export(), "a wrong key came out");
    Ok(())
}

pub fn only(name: &str) -> MechanismChoice {
    MechanismChoice::from_name(name).unwrap()
}
