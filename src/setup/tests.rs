//! First runs that break off anywhere, restarts, renewals, and the permissions of every file.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::dev::{prepare, reachable, write_profile};
use super::*;
use crate::net::client::{ClientFiles, ClientTls};
use crate::net::tls::TlsState;

const DAY: Duration = Duration::from_secs(86_400);

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// What was prepared must be enough to serve by.
fn usable(dir: &Path, prepared: &dev::Prepared) {
    TlsState::load(prepared.config.listen.tls.clone()).unwrap();
    ClientTls::load(&ClientFiles {
        server_ca: dir.join("ca.pem"),
        certificate: dir.join("admin.pem"),
        key: dir.join("admin.key"),
    })
    .unwrap();
    let crate::config::Wrapper::Local(source) = &prepared.config.master_key else { panic!() };
    polykey_hsm::LocalWrapper::open(source).unwrap();
}

#[test]
fn a_first_run_that_breaks_off_anywhere_is_completed() {
    let mut steps = Vec::new();
    let whole = tempfile::tempdir().unwrap();
    let now = SystemTime::now();
    prepare(&whole.path().join("d"), None, now, &mut |what| {
        steps.push(what);
        Ok(())
    })
    .unwrap();
    assert_eq!(steps.len(), 6, "{steps:?}");
    for broken in &steps {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("d");
        let error = prepare(&dir, None, now, &mut |what| {
            if what == *broken { Err(SetupError::BrokenOff(what)) } else { Ok(()) }
        })
        .unwrap_err();
        assert!(matches!(error, SetupError::BrokenOff(_)), "{error}");
        let before = if dir.exists() { files(&dir) } else { BTreeMap::new() };
        let prepared = prepare(&dir, None, now, &mut every_step).unwrap();
        usable(&dir, &prepared);
        let after = files(&dir);
        for (name, bytes) in before {
            assert_eq!(after[&name], bytes, "{name} was made twice after breaking off at {broken}");
        }
    }
}

#[test]
fn a_second_run_changes_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let now = SystemTime::now();
    let first = prepare(&dir, None, now, &mut every_step).unwrap();
    let address = "127.0.0.1:50053".parse().unwrap();
    write_profile(&first.directory, address).unwrap();
    drop(first);
    let before = files(&dir);
    let second = prepare(&dir, None, now + DAY, &mut every_step).unwrap();
    write_profile(&second.directory, address).unwrap();
    assert_eq!(second.made, <[&str; 0]>::default());
    assert_eq!(before, files(&dir));
}

#[test]
fn files_are_private() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    let prepared = prepare(&dir, None, SystemTime::now(), &mut every_step).unwrap();
    write_profile(&prepared.directory, prepared.config.listen.address).unwrap();
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    for entry in fs::read_dir(&dir).unwrap().map(|e| e.unwrap()) {
        let mode = entry.metadata().unwrap().mode() & 0o777;
        let name = entry.file_name().into_string().unwrap();
        // Under whatever umask, a certificate is nobody's secret and a key is its owner's.
        let expected: &[u32] =
            if name.ends_with(".pem") { &[0o644, 0o600, 0o640] } else { &[0o600] };
        assert!(expected.contains(&mode), "{name} has mode {mode:o}");
    }
}

#[test]
fn expiring_certificates_are_renewed_and_keys_of_the_store_are_not() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let now = SystemTime::now();
    drop(prepare(&dir, None, now, &mut every_step).unwrap());
    let first = files(&dir);
    let later = prepare(&dir, None, now + DAY * 340, &mut every_step).unwrap();
    assert_eq!(later.made, ["server certificate", "administrator's certificate"]);
    let second = files(&dir);
    for kept in ["ca.pem", "ca.key", "master.key", "polykey.toml"] {
        assert_eq!(first[kept], second[kept], "{kept}");
    }
    assert_ne!(first["server.pem"], second["server.pem"]);
    drop(later);
    let much_later = prepare(&dir, None, now + DAY * 3640, &mut every_step).unwrap();
    assert_eq!(much_later.made.len(), 3, "{:?}", much_later.made);
    assert_eq!(first["master.key"], files(&dir)["master.key"]);
}

#[test]
fn halves_of_a_pair_are_made_anew() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let now = SystemTime::now();
    drop(prepare(&dir, None, now, &mut every_step).unwrap());
    // As a crash between the two files of a renewal leaves them.
    let other = parent.path().join("e");
    drop(prepare(&other, None, now, &mut every_step).unwrap());
    fs::copy(other.join("server.key"), dir.join("server.key")).unwrap();
    fs::remove_file(dir.join("admin.pem")).unwrap();
    let again = prepare(&dir, None, now, &mut every_step).unwrap();
    assert_eq!(again.made, ["server certificate", "administrator's certificate"]);
    usable(&dir, &again);
    drop(again);
    // A certificate of another authority is none.
    for name in ["server.pem", "server.key"] {
        fs::copy(other.join(name), dir.join(name)).unwrap();
    }
    let again = prepare(&dir, None, now, &mut every_step).unwrap();
    assert_eq!(again.made, ["server certificate"]);
}

#[test]
fn the_server_is_named_by_where_it_listens() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let now = SystemTime::now();
    drop(prepare(&dir, None, now, &mut every_step).unwrap());
    let elsewhere: std::net::SocketAddr = "192.0.2.7:9".parse().unwrap();
    let again = prepare(&dir, Some(elsewhere), now, &mut every_step).unwrap();
    assert_eq!(again.made, ["server certificate"]);
    assert_eq!(again.config.listen.address, elsewhere);
    drop(again);
    let without = prepare(&dir, None, now, &mut every_step).unwrap();
    assert_eq!(without.config.listen.address.port(), 50053);
    assert_eq!(reachable("0.0.0.0:5".parse().unwrap()), "127.0.0.1:5".parse().unwrap());
    assert_eq!(reachable("[::]:5".parse().unwrap()), "[::1]:5".parse().unwrap());
    assert_eq!(reachable(elsewhere), elsewhere);
}

#[test]
fn foreign_directories_and_lost_keys_are_refused() {
    let parent = tempfile::tempdir().unwrap();
    fs::write(parent.path().join("thesis.tex"), "").unwrap();
    let now = SystemTime::now();
    let error = prepare(parent.path(), None, now, &mut every_step).unwrap_err();
    assert!(error.to_string().contains("--dir"), "{error}");
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);

    let dir = parent.path().join("d");
    let held = prepare(&dir, None, now, &mut every_step).unwrap();
    let error = prepare(&dir, None, now, &mut every_step).unwrap_err();
    assert!(matches!(error, SetupError::InUse(_)), "{error}");
    drop(held);
    fs::write(dir.join("polykey.redb"), "x").unwrap();
    fs::remove_file(dir.join("master.key")).unwrap();
    let error = prepare(&dir, None, now, &mut every_step).unwrap_err();
    assert!(matches!(error, SetupError::MasterKeyLost { .. }), "{error}");
    assert!(!dir.join("master.key").exists());
}

#[test]
fn a_master_key_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.key");
    master_key(&path).unwrap();
    let text = fs::read(&path).unwrap();
    assert!(master_key(&path).is_err());
    assert_eq!(fs::read(&path).unwrap(), text);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
}
