//! What somebody meets who sets up a first node by hand, and what the command line says then.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::common::steps::{cli, serve};
use crate::common::{Options, POLYKEY, Server};

/// `polykey ARGS` in a directory: exit code and output.
fn polykey(at: &Path, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(POLYKEY);
    command.args(args).current_dir(at).stdin(Stdio::null());
    command.env_remove("POLYKEY_PROFILE").env("HOME", at).env_remove("XDG_CONFIG_HOME");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text.into_owned())
}

/// A directory with an authority, a server's certificate and a configuration, and no store.
struct Site(TempDir);

impl Site {
    fn new() -> Self {
        let (_, _, directory) = Server::dev().stop();
        let directory = directory.unwrap();
        let site = Self(tempfile::tempdir().unwrap());
        for name in ["ca.pem", "ca.key", "server.pem", "server.key"] {
            fs::copy(directory.path().join("state").join(name), site.path(name)).unwrap();
        }
        site.configure("[master_key]\nsource = { file = \"master.key\" }\n");
        site
    }

    fn at(&self) -> &Path {
        self.0.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.at().join(name)
    }

    fn configure(&self, master: &str) {
        let text = format!(
            "[node]\ndata_dir = \"data\"\n\n[listen]\naddress = \"127.0.0.1:0\"\n\
             certificate = \"server.pem\"\nkey = \"server.key\"\nclient_ca = \"ca.pem\"\n\n\
             [ca]\ncertificate = \"ca.pem\"\nkey = \"ca.key\"\n\n{master}"
        );
        fs::write(self.path("polykey.toml"), text).unwrap();
    }

    fn polykey(&self, args: &[&str]) -> (i32, String) {
        polykey(self.at(), args)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn init_writes_a_profile_that_works() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new();
    let init = ["init", "--config", "polykey.toml", "--generate-master-key"];
    let (code, said) = site.polykey(&init);
    assert_eq!(code, 0, "{said}");
    let profile = site.path("data/admin.profile.toml");
    assert!(said.contains(profile.to_str().unwrap()), "{said}");
    assert_eq!(fs::metadata(&profile).unwrap().permissions().mode() & 0o777, 0o600);
    let server = serve(site.at(), &Options::default()).unwrap_or_else(|e| panic!("{}", e.output));
    // Any port was asked for, which the profile cannot know.
    let text = fs::read_to_string(&profile).unwrap();
    fs::write(&profile, text.replace("127.0.0.1:0", &server.address)).unwrap();
    let (code, said) = site.polykey(&["--profile", "data/admin.profile.toml", "whoami"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("admin"), "{said}");

    // With a certificate of somebody else's it says what the profile needs.
    let site = Site::new();
    let identity = ["--admin-identity", "dns:admin.example"];
    let (code, said) = site.polykey(&[&init[..], &identity].concat());
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("the administrator's certificate in "), "{said}");
}

#[test]
fn an_init_that_failed_does_not_stop_the_next_one() {
    let site = Site::new();
    // A token that is not there.
    let module = site.path("module.so");
    fs::write(&module, "").unwrap();
    polykey::pki::write_file(&site.path("pin"), b"1234", 0o600).unwrap();
    site.configure(&format!(
        "[master_key]\nkind = \"pkcs11\"\nmodule = \"{}\"\ntoken = {{ label = \"t\" }}\n\
         key = {{ label = \"k\" }}\npin = {{ file = \"pin\" }}\n",
        module.display()
    ));
    let init = ["init", "--config", "polykey.toml", "--generate-master-key"];
    let (code, said) = site.polykey(&init);
    assert_ne!(code, 0, "{said}");
    assert!(!site.path("data/polykey.redb").exists(), "{said}");
    site.configure("[master_key]\nsource = { file = \"master.key\" }\n");
    let (code, said) = site.polykey(&init);
    assert_eq!(code, 0, "{said}");
    let (code, said) = site.polykey(&init);
    assert_eq!(code, 5, "{said}");
}

#[test]
fn check_names_every_file_and_says_what_it_did_not_ask() {
    let site = Site::new();
    for name in ["server.pem", "server.key"] {
        fs::remove_file(site.path(name)).unwrap();
    }
    let module = site.path("module.so");
    fs::write(&module, "").unwrap();
    polykey::pki::write_file(&site.path("pin"), b"1234", 0o600).unwrap();
    site.configure(&format!(
        "[master_key]\nkind = \"pkcs11\"\nmodule = \"{}\"\ntoken = {{ label = \"t\" }}\n\
         key = {{ label = \"k\" }}\npin = {{ file = \"pin\" }}\n",
        module.display()
    ));
    let (code, said) = site.polykey(&["check", "--config", "polykey.toml"]);
    assert_eq!(code, 2, "{said}");
    // Whole paths, though the configuration was named by a relative one.
    for name in ["server.pem", "server.key"] {
        assert!(said.contains(site.path(name).to_str().unwrap()), "{name}: {said}");
    }
    assert!(said.contains("was not asked"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_with_what_to_do() {
    let server = Server::dev();
    let here = tempfile::tempdir().unwrap();
    // A profile with a mistake: a line is a line.
    fs::write(here.path().join("p.toml"), "address = \"a:1\"\nadress = 2\n").unwrap();
    let (code, said) = polykey(here.path(), &["--profile", "p.toml", "whoami"]);
    assert_eq!(code, 2, "{said}");
    assert!(!said.contains("\\n"), "{said}");
    assert!(said.contains(here.path().join("p.toml").to_str().unwrap()), "{said}");
    // No server where the profile says.
    let text = fs::read_to_string(server.profile()).unwrap();
    let nobody = server.state.join("nobody.toml");
    fs::write(&nobody, text.replace(&server.address, "127.0.0.1:9")).unwrap();
    let (code, said) = polykey(here.path(), &["--profile", nobody.to_str().unwrap(), "whoami"]);
    assert_eq!(code, 6, "{said}");
    assert!(said.contains("polykey serve --config FILE"), "{said}");
    // The TLS port is no plain one.
    let (code, said) = polykey(here.path(), &["health", "--addr", &server.address]);
    assert_eq!(code, 6, "{said}");
    assert!(said.contains("plain health port") && said.contains("leave --addr away"), "{said}");
    // Slots that are not there, and the last one.
    for verb in ["remove", "test"] {
        let (code, _, said) = server.cli(&["root", "slot", verb, "nobody"]);
        assert_eq!(code, 3, "{said}");
        assert!(said.contains("no slot `nobody`") && said.contains("root slot list"), "{said}");
    }
    let (code, _, said) = server.cli(&["root", "slot", "remove", "main"]);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("the last slot") && said.contains("root slot add"), "{said}");
    // A profile of storage that nobody has configured.
    let hardened = ["key", "create", "--type", "aes-256", "--storage", "hardened"];
    let (code, _, said) = server.cli(&hardened);
    assert_eq!(code, 5, "{said}");
    assert!(said.contains("[hardened]"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_nodes_recovery_key_is_called_that() {
    let (server, other) = (Server::dev(), Server::dev());
    let away = tempfile::tempdir().unwrap();
    let file = |name: &str| away.path().join(name).display().to_string();
    for (node, name) in [(&server, "mine"), (&other, "theirs")] {
        let made = cli(node, &["root", "recovery-key", "--out", &file(name)]);
        let public = made["public_key"].as_str().unwrap();
        cli(node, &["root", "slot", "add", "offline", "--recovery-key", public]);
    }
    let socket = server.state.join("polykey.sock").display().to_string();
    let ask = |args: &[&str]| polykey(away.path(), &[args, &["--socket", &socket]].concat());
    assert_eq!(ask(&["lock"]).0, 0);
    let (code, said) = ask(&["unlock", "--key", &file("theirs")]);
    assert_eq!(code, 6, "{said}");
    assert!(said.contains("this recovery key is of no slot of the store"), "{said}");
    let (code, said) = ask(&["unlock", "--key", &file("mine")]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn the_manuals_certificates_are_good() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manual = fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let recipe = manual.split("<!-- certificates -->").nth(1).unwrap();
    let recipe = recipe.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let site = Site(tempfile::tempdir().unwrap());
    site.configure("[master_key]\nsource = { file = \"master.key\" }\n");
    let made = Command::new("sh").args(["-ec", recipe]).current_dir(site.at()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (code, said) = site.polykey(&["init", "--config", "polykey.toml", "--generate-master-key"]);
    assert_eq!(code, 0, "{said}");
    let (code, said) = site.polykey(&["check", "--config", "polykey.toml"]);
    assert_eq!(code, 0, "{said}");
    let server = serve(site.at(), &Options::default()).unwrap_or_else(|e| panic!("{}", e.output));
    let profile = site.path("data/admin.profile.toml");
    let text = fs::read_to_string(&profile).unwrap();
    fs::write(&profile, text.replace("127.0.0.1:0", &server.address)).unwrap();
    let (code, said) = site.polykey(&["--profile", "data/admin.profile.toml", "whoami"]);
    assert_eq!(code, 0, "{said}");
}
