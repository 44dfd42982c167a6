//! Tests of loading and reloading TLS files.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

use super::*;
use crate::pki::{Authority, KeyKind, Validity};

struct Files {
    _directory: tempfile::TempDir,
    files: TlsFiles,
    authority: Authority,
}

fn files() -> Files {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let validity = Validity::days(SystemTime::now(), 10).unwrap();
    let (authority, issued) = Authority::create("Test authority", KeyKind::P256, validity).unwrap();
    fs::write(path("ca.pem"), issued.certificate).unwrap();
    let server = authority.server(&["localhost"], KeyKind::P256, validity).unwrap();
    server.write(&path("server.pem"), &path("server.key")).unwrap();
    let list = authority.revocation_list(&[vec![1, 2, 3]], 1, validity).unwrap();
    fs::write(path("crl.pem"), list).unwrap();
    let files = TlsFiles {
        certificate: path("server.pem"),
        key: path("server.key"),
        client_ca: path("ca.pem"),
        crl: Some(path("crl.pem")),
    };
    Files { _directory: directory, files, authority }
}

#[test]
fn sound_files_load_and_the_post_quantum_group_comes_first() {
    let files = files();
    let state = TlsState::load(files.files).unwrap();
    assert_eq!(state.generation(), 1);
    state.reload().unwrap();
    assert_eq!(state.generation(), 2);
    let loaded = state.current();
    let groups = &loaded.server.crypto_provider().kx_groups;
    assert_eq!(groups[0].name(), rustls::NamedGroup::X25519MLKEM768);
    assert!(state.crl_next_update().is_some());
}

#[test]
fn each_reload_takes_new_ticket_keys() {
    let state = TlsState::load(files().files).unwrap();
    let old = state.current();
    let ticket = old.server.ticketer.encrypt(b"session").unwrap();
    assert_eq!(old.server.ticketer.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
    let keep = files();
    let state = TlsState { files: keep.files.clone(), ..state };
    state.reload().unwrap();
    assert_eq!(state.current().server.ticketer.decrypt(&ticket), None);
}

#[test]
fn every_unusable_file_is_refused_by_name() {
    type Spoil = fn(&Files);
    let cases: [(&str, &str, Spoil); 15] = [
        ("server.pem", "check the path", |f| fs::remove_file(&f.files.certificate).unwrap()),
        ("server.key", "check the path", |f| fs::remove_file(&f.files.key).unwrap()),
        ("ca.pem", "check the path", |f| fs::remove_file(&f.files.client_ca).unwrap()),
        ("crl.pem", "check the path", |f| fs::remove_file(f.files.crl.as_ref().unwrap()).unwrap()),
        ("server.pem", "no PEM certificate", |f| fs::write(&f.files.certificate, "").unwrap()),
        ("server.key", "no PEM private key", |f| fs::write(&f.files.key, "").unwrap()),
        ("ca.pem", "no PEM certificate", |f| fs::write(&f.files.client_ca, "hello").unwrap()),
        ("crl.pem", "no PEM revocation list", |f| {
            fs::write(f.files.crl.as_ref().unwrap(), "").unwrap()
        }),
        ("server.key", "chmod 600", |f| {
            fs::set_permissions(&f.files.key, fs::Permissions::from_mode(0o640)).unwrap()
        }),
        ("server.key", "chmod 600", |f| {
            fs::set_permissions(&f.files.key, fs::Permissions::from_mode(0o604)).unwrap()
        }),
        ("server.key", "issued for", |f| {
            let other = f
                .authority
                .client("a", KeyKind::P256, Validity::days(SystemTime::now(), 1).unwrap())
                .unwrap();
            fs::write(&f.files.key, other.key.unwrap().as_bytes()).unwrap();
        }),
        ("server.pem", "expired", |f| {
            let past = Validity::between(
                std::time::Duration::from_secs(1000),
                std::time::Duration::from_secs(2000),
            );
            let old = f.authority.server(&["localhost"], KeyKind::P256, past).unwrap();
            fs::write(&f.files.certificate, old.certificate).unwrap();
            fs::write(&f.files.key, old.key.unwrap().as_bytes()).unwrap();
        }),
        ("crl.pem", "nextUpdate", |f| {
            let past = Validity::between(
                std::time::Duration::from_secs(1000),
                std::time::Duration::from_secs(2000),
            );
            fs::write(
                f.files.crl.as_ref().unwrap(),
                f.authority.revocation_list(&[], 2, past).unwrap(),
            )
            .unwrap();
        }),
        ("ca.pem", "an authority", |f| {
            let der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
            fs::write(&f.files.client_ca, der).unwrap();
        }),
        ("server.pem", "check the path", |f| {
            fs::remove_file(&f.files.certificate).unwrap();
            fs::create_dir(&f.files.certificate).unwrap();
        }),
    ];
    for (n, (file, remedy, spoil)) in cases.into_iter().enumerate() {
        let files = files();
        let running = TlsState::load(files.files.clone()).unwrap();
        spoil(&files);
        let error = TlsState::load(files.files.clone()).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(remedy), "case {n}: {error}");
        assert!(
            running.reload().is_err() && running.generation() == 1,
            "case {n}: the old material stays"
        );
    }
}
