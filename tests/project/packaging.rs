//! What is shipped besides the binary: parsed as far as that can be done without running it.

use std::path::PathBuf;
use std::process::Command;

use super::root;

fn python() -> PathBuf {
    let python = std::env::var_os("POLYKEY_PYTHON")
        .map_or_else(|| root().join(".venv/bin/python"), PathBuf::from);
    assert!(python.exists(), "{}: `make deps` makes it", python.display());
    python
}

/// The binary under test.
const POLYKEY: &str = env!("CARGO_BIN_EXE_polykey");

/// Exit code of a script that cannot run here and has said why.
const CANNOT: i32 = 77;

/// Runs `tests/python/NAME` for a test.
fn script(test: &str, name: &str, arguments: &[&str]) {
    let output = Command::new(python())
        .arg(root().join("tests/python").join(name))
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    if output.status.code() == Some(CANNOT) {
        return skipped(test, said.trim());
    }
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn compose_dockerfile_unit_workflows_and_links_hold() {
    let test = "compose_dockerfile_unit_workflows_and_links_hold";
    script(test, "packaging_check.py", &[POLYKEY]);
}

#[test]
fn kubernetes_manifests_fit_their_schemas_and_run_as_in_a_pod() {
    let test = "kubernetes_manifests_fit_their_schemas_and_run_as_in_a_pod";
    script(test, "kubernetes_check.py", &[POLYKEY]);
}

#[test]
fn the_bill_of_materials_is_cyclonedx_and_agrees_with_the_lock_file() {
    let test = "the_bill_of_materials_is_cyclonedx_and_agrees_with_the_lock_file";
    script(test, "sbom_check.py", &[]);
}

/// With the binary under test in it, and `POLYKEY_PREVIOUS_DEB` as the package it is upgraded from.
#[test]
fn the_debian_package_installs_serves_upgrades_and_goes() {
    let test = "the_debian_package_installs_serves_upgrades_and_goes";
    let mut arguments = vec![POLYKEY.to_owned()];
    arguments.extend(std::env::var("POLYKEY_PREVIOUS_DEB"));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    script(test, "debian_package.py", &arguments);
}

#[test]
fn the_python_sample_parses() {
    let script = "import ast, sys; ast.parse(open(sys.argv[1]).read())";
    let output = Command::new(python())
        .args(["-c", script])
        .arg(root().join("examples/client.py"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// systemd itself, where it is there, with the binary's path taken for granted.
#[test]
fn systemd_takes_the_unit() {
    let Ok(output) = Command::new("systemd-analyze")
        .arg("verify")
        .arg(root().join("packaging/polykey.service"))
        .output()
    else {
        skipped("systemd_takes_the_unit", "systemd-analyze is not here");
        return;
    };
    let text = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("polykey.service"))
        .filter(|line| !line.contains("/usr/bin/polykey is not executable"))
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

/// The most that systemd may find open to the unit, in tenths of its points from 0 to 10. What is left is the
/// network, which a server needs, and system calls for locking memory.
const EXPOSURE: &str = "--threshold=15";

/// systemd's own judgement of the sandbox.
#[test]
fn the_unit_is_hardened() {
    let analyze = |arguments: &[&str]| {
        let unit = root().join("packaging/polykey.service");
        Command::new("systemd-analyze").args(arguments).arg(unit).output().ok()
    };
    let help = Command::new("systemd-analyze").arg("--help").output();
    if !help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--offline")) {
        skipped("the_unit_is_hardened", "systemd-analyze 250 or later is not here");
        return;
    }
    let output = analyze(&["security", "--no-pager", "--offline=yes", EXPOSURE]).unwrap();
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{table}{}", String::from_utf8_lossy(&output.stderr));
    assert!(table.contains("exposure level for polykey.service"), "{table}");
    // It does judge: nothing is as closed as that.
    assert!(!analyze(&["security", "--offline=yes", "--threshold=1"]).unwrap().status.success());
}

/// Tells `make test` of a test that cannot run here.
pub(crate) fn skipped(name: &str, reason: &str) {
    use std::io::Write;
    if let Some(path) = std::env::var_os("POLYKEY_TEST_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        writeln!(file, "{name}: {reason}").unwrap();
    }
}

#[test]
fn the_readme_begins_with_its_two_commands_and_has_a_tour() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let screen: String = text.lines().take(24).collect::<Vec<_>>().join("\n");
    assert!(screen.contains("cargo run --release -- dev"), "{screen}");
    assert!(screen.contains("make test"), "{screen}");
    let (begin, end) = (text.find("<!-- tour -->").unwrap(), text.find("<!-- /tour -->").unwrap());
    let tour = &text[begin..end];
    for command in
        ["key create", "encrypt", "decrypt", "sign", "key rotate", "key revoke", "audit list"]
    {
        assert!(tour.contains(&format!("$ polykey {command}")), "the tour has no {command}");
    }
}
