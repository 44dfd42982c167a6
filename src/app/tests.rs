//! Whole nodes on directories of their own: first starts that break off, restarts, refusals.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;

use super::*;
use crate::net::client::{ClientFiles, ClientTls, ConnectOptions};
use crate::pki;
use crate::setup::dev::{ADMIN, Prepared, prepare, write_profile};
use crate::setup::{SetupError, every_step};

fn ready(dir: &Path) -> Prepared {
    prepare(dir, Some("127.0.0.1:0".parse().unwrap()), SystemTime::now(), &mut every_step).unwrap()
}

fn admin() -> Admin {
    Admin { id: ADMIN.into(), identities: vec![pki::client_identity(ADMIN).unwrap()] }
}

async fn start(prepared: &Prepared) -> (Running, Bootstrapped) {
    let app = App::found(prepared.config.clone(), Clock::System).await.unwrap();
    let done = bootstrap(&app, &admin(), &prepared.directory.api_key()).await.unwrap();
    let running = app.spawn().await.unwrap();
    write_profile(&prepared.directory, running.address()).unwrap();
    (running, done)
}

async fn connect(
    dir: &Path,
    address: SocketAddr,
) -> PolykeyServiceClient<tonic::transport::Channel> {
    let files = ClientFiles {
        server_ca: dir.join("ca.pem"),
        certificate: dir.join("admin.pem"),
        key: dir.join("admin.key"),
    };
    let options = ConnectOptions { server_name: Some("localhost".into()), ..Default::default() };
    let tls = ClientTls::load(&files).unwrap();
    let channel = tls.connect(&format!("https://{address}"), &options).await;
    PolykeyServiceClient::new(channel.unwrap())
}

/// Logs in with the API key of the directory.
async fn login(dir: &Path, address: SocketAddr) -> bool {
    let api_key = fs::read_to_string(dir.join("admin.api-key")).unwrap().trim().to_owned();
    let request = pb::AuthenticateRequest {
        client_id: ADMIN.into(),
        api_key,
        ..pb::AuthenticateRequest::default()
    };
    connect(dir, address).await.authenticate(request).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_serves_stops_and_starts_again() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let prepared = ready(&dir);
    let (running, done) = start(&prepared).await;
    assert_eq!(done, Bootstrapped::Created);
    assert!(login(&dir, running.address()).await);
    let mut client = connect(&dir, running.address()).await;
    let health = client.health_check(()).await.unwrap().into_inner();
    assert_eq!(health.status(), pb::HealthStatus::Healthy);
    let metrics = health.metrics.unwrap();
    // The login, and not yet this call.
    assert_eq!(metrics.total_requests_handled, 1);
    assert_eq!(metrics.active_keys_count, 0);
    let node = running.app().vault.node_id();
    let key = fs::read(prepared.directory.api_key()).unwrap();
    let stopped = running.stop().await;
    assert!(stopped.durable);
    assert_eq!(stopped.drain.requests_aborted, 0);

    let (running, done) = start(&prepared).await;
    assert_eq!(done, Bootstrapped::Unchanged);
    assert_eq!(running.app().vault.node_id(), node);
    assert_eq!(fs::read(prepared.directory.api_key()).unwrap(), key);
    assert!(login(&dir, running.address()).await);
    for entry in fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap()) {
        let name = entry.file_name().into_string().unwrap();
        let mode = entry.metadata().unwrap().mode() & 0o077;
        assert!(mode == 0 || name.ends_with(".pem"), "{name} is open to others: {mode:o}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_that_breaks_off_anywhere_is_completed() {
    // 0 to 5: before each step that needs no store; then after founding, after the client was
    // committed and before its key was written, and before the profile.
    for broken in 0..9 {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("d");
        let mut step = 0;
        let listen = Some("127.0.0.1:0".parse().unwrap());
        let prepared = prepare(&dir, listen, SystemTime::now(), &mut |what| {
            step += 1;
            if step == broken + 1 { Err(SetupError::BrokenOff(what)) } else { Ok(()) }
        });
        if broken < 6 {
            assert!(matches!(prepared, Err(SetupError::BrokenOff(_))), "{broken}");
        } else {
            let prepared = prepared.unwrap();
            let app = App::found(prepared.config.clone(), Clock::System).await.unwrap();
            if broken > 6 {
                bootstrap(&app, &admin(), &prepared.directory.api_key()).await.unwrap();
            }
            if broken == 7 {
                fs::remove_file(prepared.directory.api_key()).unwrap();
            }
            app.close().await.unwrap();
        }
        let prepared = ready(&dir);
        let (running, done) = start(&prepared).await;
        let expected = match broken {
            7 => Bootstrapped::KeyReplaced,
            8 => Bootstrapped::Unchanged,
            _ => Bootstrapped::Created,
        };
        assert_eq!(done, expected, "broken off at {broken}");
        assert!(login(&dir, running.address()).await, "broken off at {broken}");
        assert!(prepared.directory.profile().exists());
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_the_way_is_told_with_a_remedy() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let prepared = ready(&dir);
    let (running, _) = start(&prepared).await;
    // The store is in use.
    let error = App::open(prepared.config.clone(), Clock::System).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Conflict, "{error}");
    assert!(error.hint().unwrap().contains("running"), "{error}");
    // The port is taken.
    let other_dir = parent.path().join("e");
    let other = ready(&other_dir);
    let mut config = other.config.clone();
    config.listen.address = running.address();
    let error = App::found(config, Clock::System).await.unwrap().spawn().await.unwrap_err();
    assert_eq!(error.fault(), Fault::Conflict, "{error}");
    assert!(error.hint().unwrap().contains("--listen"), "{error}");
    // A copy of the store without its journal.
    let mut config = prepared.config.clone();
    config.storage.path = dir.join("copy.redb");
    fs::copy(&prepared.config.storage.path, &config.storage.path).unwrap();
    let error = App::open(config, Clock::System).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Damaged, "{error}");
    assert!(error.to_string().contains("copy.redb-journal is missing"), "{error}");
    running.stop().await;
    // Another master key.
    fs::copy(other_dir.join("master.key"), dir.join("master.key")).unwrap();
    let error = App::open(prepared.config.clone(), Clock::System).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Damaged, "{error}");
    assert!(error.to_string().contains("master.key"), "{error}");
    // Secrets open to others.
    for name in ["master.key", "server.key", "ca.key"] {
        let path = dir.join(name);
        let private = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let error = App::open(prepared.config.clone(), Clock::System).await.unwrap_err();
        assert_eq!(error.fault(), Fault::Given, "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
        let findings = check(&prepared.config).await;
        assert!(findings.iter().any(|f| f.result.is_err()), "{name}");
        fs::set_permissions(&path, private).unwrap();
    }
    // No store, and none is made by opening.
    fs::remove_file(dir.join("polykey.redb")).unwrap();
    let error = App::open(prepared.config.clone(), Clock::System).await.unwrap_err();
    assert!(error.hint().unwrap().contains("init"), "{error}");
    assert!(!dir.join("polykey.redb").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_finds_nothing_in_what_was_made_and_touches_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let prepared = ready(&dir);
    let app = App::found(prepared.config.clone(), Clock::System).await.unwrap();
    let in_use = check(&prepared.config).await;
    assert!(in_use.iter().any(|f| f.result.as_ref().unwrap().contains("in use")), "{in_use:?}");
    app.close().await.unwrap();
    let before = fs::read(dir.join("polykey.redb")).unwrap();
    for finding in check(&prepared.config).await {
        finding.result.unwrap();
    }
    assert!(before == fs::read(dir.join("polykey.redb")).unwrap());
    fs::write(dir.join("polykey.redb"), "not a store").unwrap();
    assert!(check(&prepared.config).await.iter().any(|f| f.result.is_err()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_takes_what_is_good_and_keeps_what_was() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let mut prepared = ready(&dir);
    let policy = dir.join("team.cedar");
    fs::write(&policy, "").unwrap();
    prepared.config.policies = vec![policy.clone()];
    let (running, _) = start(&prepared).await;
    let (app, generation) = (Arc::clone(running.app()), running.app().tls.generation());
    let before = app.authorizer.load_full();
    fs::write(&policy, "permit (").unwrap();
    fs::write(dir.join("server.pem"), "").unwrap();
    let reloaded = app.reload().await;
    assert!(reloaded.certificates.is_err() && reloaded.policies.is_err());
    assert_eq!(app.tls.generation(), generation);
    assert!(Arc::ptr_eq(&before, &app.authorizer.load_full()));
    assert!(login(&dir, running.address()).await);

    fs::write(&policy, "forbid (principal, action, resource);").unwrap();
    drop(app);
    running.stop().await;
    let listen = prepared.config.listen.address;
    drop(prepared);
    // The broken certificate is made anew on the next start.
    let prepared = prepare(&dir, Some(listen), SystemTime::now(), &mut every_step).unwrap();
    assert_eq!(prepared.made, ["server certificate"]);
    let (running, _) = start(&prepared).await;
    let reloaded = running.app().reload().await;
    assert!(reloaded.certificates.is_ok() && reloaded.policies.is_ok());
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_follows_the_facts() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("d");
    let mut prepared = ready(&dir);
    prepared.config.listen.health = Some("127.0.0.1:0".parse().unwrap());
    let (running, _) = start(&prepared).await;
    assert_eq!(running.app().health.state(), State::Serving);
    assert!(running.health_address().is_some());
    let mut watch = running.app().health.watch();
    watch.mark_unchanged();
    running.stop().await;
    assert_eq!(*watch.borrow_and_update(), State::NotServing(crate::health::STOPPING));
}
