//! Certificates, authorities, revocation lists, policies and rates are read again a hundred times under load, every third
//! time broken: no good client notices, and no bad one is served once it is shut out.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use polykey::net::client::ClientFiles;
use polykey::pki::{Authority, KeyKind, Validity, write_file};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

use crate::common::client::{Client, refused};
use crate::common::{Options, Server};

const FORBID: &str = "forbid (principal, action == Action::\"RotateKey\", resource);";
const RATES: &str = "\n[rates.shut]\nclient = \"flooder\"\nper_second = 1\nburst = 1\n";

fn lasting() -> Validity {
    Validity::days(SystemTime::now(), 30).unwrap()
}

/// The files of a node that it reads again.
struct Files {
    state: PathBuf,
    ours: Authority,
    /// Whose clients are good only as long as it is named.
    theirs: Authority,
    their_certificate: String,
    /// The certificate that the list names once it is shut out.
    serial: Vec<u8>,
    config: String,
    number: u64,
}

impl Files {
    fn write(&self, name: &str, text: &str) {
        let mode = if name.ends_with("key") { 0o600 } else { 0o644 };
        write_file(&self.state.join(name), text.as_bytes(), mode).unwrap();
    }

    /// All of them, with a new certificate of the server. `shut`: against those who are bad.
    fn put(&mut self, shut: bool) {
        self.number += 1;
        let names = ["localhost", "127.0.0.1", "::1"];
        let server = self.ours.server(&names, KeyKind::P256, lasting()).unwrap();
        self.write("server.key", server.key.as_ref().unwrap());
        self.write("server.pem", &server.certificate);
        let ours = self.ours.certificate();
        let both = format!("{ours}{}", self.their_certificate);
        self.write("client-ca.pem", if shut { ours } else { &both });
        let revoked = if shut { vec![self.serial.clone()] } else { Vec::new() };
        let list = |authority: &Authority, revoked: &[Vec<u8>]| {
            authority.revocation_list(revoked, self.number, lasting()).unwrap()
        };
        self.write("clients.crl", &(list(&self.ours, &revoked) + &list(&self.theirs, &[])));
        self.write("own.cedar", if shut { FORBID } else { "" });
        self.write("polykey.toml", &format!("{}{}", self.config, if shut { RATES } else { "" }));
    }

    /// Breaks one of them, and names the part of the reload that says so.
    fn break_one(&self, which: usize) -> &'static str {
        match which % 5 {
            0 => {
                self.write("own.cedar", "forbid (principal");
                "policies"
            }
            1 => {
                self.write("polykey.toml", &format!("{}{RATES}burst = 0\n", self.config));
                "settings"
            }
            2 => {
                self.write("clients.crl", "-----BEGIN X509 CRL-----\n?\n-----END X509 CRL-----\n");
                "certificates"
            }
            3 => {
                self.write("client-ca.pem", "");
                "certificates"
            }
            _ => {
                let other = self.ours.server(&["localhost"], KeyKind::P256, lasting()).unwrap();
                self.write("server.key", other.key.as_ref().unwrap());
                "certificates"
            }
        }
    }
}

/// A node with all that can be read again, and nobody shut out.
fn node() -> (Server, Files, TempDir) {
    let (status, output, directory) = Server::dev().stop();
    assert!(status.success(), "{output}");
    let directory = directory.unwrap();
    let state = directory.path().join("state");
    let text = fs::read_to_string(state.join("polykey.toml")).unwrap();
    let config = text
        .replace("client_ca = \"ca.pem\"", "client_ca = \"client-ca.pem\"\ncrl = \"clients.crl\"")
        + "\n[policies]\nfiles = [\"own.cedar\"]\n";
    assert!(config.contains("clients.crl"), "{config}");
    let ours = Authority::load(&state.join("ca.pem"), &state.join("ca.key")).unwrap();
    let (theirs, issued) = Authority::create("Theirs", KeyKind::P256, lasting()).unwrap();
    let their_certificate = issued.certificate.clone();
    let mut files =
        Files { state, ours, theirs, their_certificate, serial: Vec::new(), config, number: 0 };
    files.put(false);
    let server = Server::attempt(&files.state, &Options::default()).unwrap();
    (server, files, directory)
}

/// A client with a certificate that this authority issued, logged in; and its serial number.
async fn client_of(
    server: &Server,
    admin: &Client,
    (authority, id): (&Authority, &str),
    directory: &Path,
) -> (Client, Vec<u8>) {
    let issued = authority.client(id, KeyKind::P256, lasting()).unwrap();
    let (certificate, key) =
        (directory.join(format!("{id}.pem")), directory.join(format!("{id}.key")));
    issued.write(&certificate, &key).unwrap();
    let client = server.stranger(admin, id, json!({"roles": ["user"]})).await;
    let server_ca = client.files.server_ca.clone();
    let mut client = client.with_files(ClientFiles { server_ca, certificate, key });
    client.login().await.unwrap();
    (client, issued.serial)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_reloads_under_load_fail_nobody_and_shut_out_whom_they_should() {
    let (server, mut files, directory) = node();
    let admin = server.admin().await;
    let key = admin.create(json!({})).await;
    let place = directory.path();
    let (revoked, serial) = client_of(&server, &admin, (&files.ours, "revoked"), place).await;
    let (guest, _) = client_of(&server, &admin, (&files.theirs, "guest"), place).await;
    let (flooder, _) = client_of(&server, &admin, (&files.ours, "flooder"), place).await;
    files.serial = serial;

    let done = Arc::new(AtomicBool::new(false));
    let load = (0..5).map(|n| {
        let (admin, key, done) = (admin.clone(), key.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            let mut served = 0_u64;
            while !done.load(Ordering::Relaxed) {
                // One of them comes anew each time.
                let caller = if n == 0 { admin.at(&admin.address) } else { admin.clone() };
                caller.call("GetKey", json!({"key_id": key})).await.unwrap();
                served += 1;
            }
            served
        })
    });
    let load: Vec<_> = load.collect();
    let list = async |client: &Client| client.call("ListKeys", json!({})).await;
    let (mut kept_out, mut let_in) = (0, 0);
    for round in 0..100 {
        let (broken, shut) = (round % 3 == 1, round % 3 != 2);
        let wrong = match broken {
            true => Some(files.break_one(round / 3)),
            false => {
                files.put(shut);
                None
            }
        };
        let answer = admin.call("ReloadConfiguration", json!({})).await.unwrap();
        for part in answer["parts"].as_array().unwrap() {
            let name: &Value = &part["name"];
            let ok = wrong.is_none_or(|wrong| wrong != name);
            assert_eq!(part["ok"] == json!(true), ok, "round {round}: {answer}");
        }
        // From the first request on: over the connection that was open, and over a new one.
        for bad in [&revoked, &guest] {
            if shut {
                for client in [bad.clone(), bad.at(&server.address)] {
                    assert!(list(&client).await.is_err(), "round {round}: {} is served", bad.id);
                    kept_out += 1;
                }
            } else {
                list(&bad.at(&server.address)).await.unwrap();
                // The connection that it had is gone; the next round needs one that is open.
                let _ = list(bad).await;
                list(bad).await.unwrap();
                let_in += 1;
            }
        }
        let rotated = admin.call("RotateKey", json!({"key_id": key})).await;
        let mut refusals = 0;
        for _ in 0..4 {
            let answer = list(&flooder).await.map_err(|fail| fail.code);
            assert!(matches!(answer, Ok(_) | Err(Code::ResourceExhausted)), "{answer:?}");
            refusals += usize::from(answer.is_err());
        }
        if shut {
            refused(rotated, Code::PermissionDenied);
            assert!(refusals > 0, "round {round}: too often, and served");
            kept_out += 2;
        } else {
            rotated.unwrap();
            assert_eq!(refusals, 0, "round {round}");
            let_in += 2;
        }
    }
    done.store(true, Ordering::Relaxed);
    let mut served = 0;
    for task in load {
        let one = task.await.unwrap();
        assert!(one > 0);
        served += one;
    }
    println!(
        "reloads: 100, of which 33 broken; {served} requests of good clients served and 0 failed, {kept_out} of bad \
         ones refused and 0 served, {let_in} served while they were good"
    );
}
