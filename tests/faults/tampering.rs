//! A closed store that somebody edits: the server refuses it, finds it out, or gives right answers all the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::{FutureExt, StreamExt};
use polykey::vault::space::{self, KEYS, VERSIONS};
use polykey_proto::polykey::v2 as pb;
use polykey_storage::redb::{Options as StoreOptions, Redb};
use polykey_storage::{Commit, Direction, NoFinish, Space, Store, all};
use serde_json::json;
use tonic::Code;

use crate::common::{Options, Server};
use crate::support::{Random, Wire, no_panic, size};

const STORE: &str = "polykey.redb";
/// Bits turned over in one copy.
const FLIPS: usize = 5;

/// What a read of one version must say.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Material { plain: Vec<u8>, description: String, status: i32 },
    Refused,
}

type Truth = BTreeMap<(String, i32), Answer>;

fn items(truth: &Truth) -> Vec<pb::KeyRequestItem> {
    let item = |(key_id, version): &(String, i32)| pb::KeyRequestItem {
        key_id: key_id.clone(),
        version: *version,
        export: pb::ExportMode::Plain as i32,
        ..Default::default()
    };
    truth.keys().map(item).collect()
}

/// What the server says now; errors with their code.
async fn read(wire: &Wire, of: &Truth) -> Vec<Result<Answer, Code>> {
    let keys = items(of);
    let count = keys.len();
    let body = pb::BatchGetKeysRequest { keys, continue_on_error: true, ..Default::default() };
    let results = match wire.keys().batch_get_keys(wire.with(body)).await {
        Ok(reply) => reply.into_inner().results,
        Err(status) => return vec![Err(status.code()); count],
    };
    assert_eq!(results.len(), count);
    let answer = |result: pb::BatchGetKeysResult| match result.result {
        Some(pb::batch_get_keys_result::Result::Success(found)) => {
            let metadata = found.metadata.unwrap_or_default();
            let material = found.key_material.unwrap_or_default();
            Ok(Answer::Material {
                plain: material.plaintext.to_vec(),
                description: metadata.description,
                status: metadata.status,
            })
        }
        _ => Err(Code::from_i32(result.error_code)),
    };
    results.into_iter().map(answer).collect()
}

struct Prepared {
    directory: tempfile::TempDir,
    truth: Truth,
    /// The rows as they were half-way.
    old: Rows,
    now: Rows,
}

type Rows = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

fn open(path: &Path) -> Redb {
    Redb::open(path, StoreOptions::default()).unwrap()
}

fn rows(path: &Path) -> Rows {
    let store = open(path);
    let mut found = Rows::new();
    for &space in space::ALL {
        let entries = store.scan(space, all(), Direction::Forward, usize::MAX);
        for entry in entries.now_or_never().unwrap().unwrap() {
            found.insert((space.0, entry.key), entry.value.to_vec());
        }
    }
    found
}

fn stop(server: Server, directory: &mut Option<tempfile::TempDir>) {
    let (status, output, kept) = server.stop();
    assert!(status.success(), "{status}: {output}");
    *directory = kept.or_else(|| directory.take());
}

/// A store with something of everything, and what it must answer.
async fn prepare() -> Prepared {
    let server = Server::dev();
    let state = server.state.clone();
    let mut directory = None;
    let mut admin = server.admin().await;
    let mut keys = Vec::new();
    for n in 0..12 {
        let body = json!({"exportable": true, "description": format!("key {n}"), "alias": format!("a{n}")});
        let key = admin.create(body).await;
        for _ in 0..n % 3 {
            admin.call("RotateKey", json!({"key_id": key})).await.unwrap();
        }
        keys.push(key);
    }
    server.client(&admin, "somebody", &["user"]).await;
    stop(server, &mut directory);
    let old = rows(&state.join(STORE));
    let server = Server::attempt(&state, &Options::default()).unwrap();
    admin = admin.at(&server.address);
    for (n, key) in keys.iter().enumerate() {
        let done = match n % 6 {
            0 => admin.call("RevokeKey", json!({"key_id": key})).await,
            1 => admin.call("RotateKey", json!({"key_id": key})).await,
            2 => {
                let body = json!({"key_id": key, "description": format!("changed {n}")});
                admin.call("UpdateKeyMetadata", body).await
            }
            3 => admin.call("DisableKey", json!({"key_id": key})).await,
            4 => admin.call("DeleteAlias", json!({"alias": format!("a{n}")})).await,
            _ => continue,
        };
        done.unwrap();
    }
    admin.call("DisableClient", json!({"client_id": "somebody"})).await.unwrap();
    let wire = Wire::of(&admin);
    let mut truth = Truth::new();
    for key in keys {
        let body = pb::ListKeyVersionsRequest { key_id: key.clone(), ..Default::default() };
        let versions = wire.lifecycle().list_key_versions(wire.with(body)).await.unwrap();
        for version in versions.into_inner().versions {
            truth.insert((key.clone(), version.version), Answer::Refused);
        }
    }
    let answers = read(&wire, &truth).await;
    for (place, answer) in truth.values_mut().zip(answers) {
        match answer {
            Ok(answer) => *place = answer,
            Err(code) => assert_eq!(code, Code::FailedPrecondition),
        }
    }
    let served = truth.values().filter(|a| **a != Answer::Refused).count();
    assert!(served >= 8 && served < truth.len(), "{served} of {}", truth.len());
    stop(server, &mut directory);
    let now = rows(&state.join(STORE));
    Prepared { directory: directory.unwrap(), truth, old, now }
}

fn commit(path: &Path, commit: Commit) {
    let store = open(path);
    let outcome = store.commit(vec![commit], &mut NoFinish).now_or_never().unwrap().unwrap();
    assert!(outcome.any());
}

/// Edits the copy at `path`, and says how.
fn edit(path: &Path, kind: usize, random: &mut Random, prepared: &Prepared) -> String {
    let keys: Vec<&(u8, Vec<u8>)> = prepared.now.keys().collect();
    let any = |random: &mut Random| keys[random.below(keys.len())].clone();
    let of = |random: &mut Random, spaces: &[Space]| {
        let some: Vec<_> = keys.iter().filter(|k| spaces.iter().any(|s| s.0 == k.0)).collect();
        (*some[random.below(some.len())]).clone()
    };
    let put = |commit: Commit, row: &(u8, Vec<u8>), value: &[u8]| {
        commit.put(Space(row.0), row.1.clone(), value.to_vec())
    };
    let new = Commit::new;
    let name =
        |row: &(u8, Vec<u8>)| format!("{}/{}", row.0, data_encoding::HEXLOWER.encode(&row.1));
    match kind {
        // Rows exchanged: any two, two of one space, two versions, a key and a version.
        0..=3 => {
            let (a, b) = match kind {
                0 => (any(random), any(random)),
                1 => {
                    let a = any(random);
                    (a.clone(), of(random, &[Space(a.0)]))
                }
                2 => (of(random, &[VERSIONS]), of(random, &[VERSIONS])),
                _ => (of(random, &[KEYS]), of(random, &[VERSIONS, KEYS])),
            };
            let exchanged = put(put(new(), &a, &prepared.now[&b]), &b, &prepared.now[&a]);
            commit(path, exchanged);
            format!("{} and {} exchanged", name(&a), name(&b))
        }
        4 => {
            let row = any(random);
            commit(path, new().delete(Space(row.0), row.1.clone()));
            format!("{} deleted", name(&row))
        }
        5 => {
            // A row as it was before; also one that has been deleted since.
            let changed: Vec<_> =
                prepared.old.iter().filter(|(k, v)| prepared.now.get(*k) != Some(*v)).collect();
            let (row, value) = changed[random.below(changed.len())];
            commit(path, put(new(), row, value));
            format!("{} replayed", name(row))
        }
        6 => {
            // Everything of one space as it was before.
            let row = any(random);
            let mut edit = new();
            for (k, _) in prepared.now.iter().filter(|(k, _)| k.0 == row.0) {
                if !prepared.old.contains_key(k) {
                    edit = edit.delete(Space(k.0), k.1.clone());
                }
            }
            for (k, v) in prepared.old.iter().filter(|(k, _)| k.0 == row.0) {
                edit = put(edit, k, v);
            }
            commit(path, edit);
            format!("space {} replayed", row.0)
        }
        7 => {
            let row = any(random);
            let mut value = prepared.now[&row].clone();
            let at = random.below(value.len());
            value[at] ^= 1 << random.below(8);
            commit(path, put(new(), &row, &value));
            format!("a bit of {} at {at}", name(&row))
        }
        8 => {
            let row = any(random);
            let length = random.below(prepared.now[&row].len());
            commit(path, put(new(), &row, &prepared.now[&row][..length]));
            format!("{} cut to {length}", name(&row))
        }
        9 => {
            let row = any(random);
            let mut to = row.clone();
            match to.1.last_mut() {
                Some(last) => *last ^= 1,
                None => to.1.push(0),
            }
            commit(path, put(new(), &to, &prepared.now[&row]));
            format!("{} copied to {}", name(&row), name(&to))
        }
        _ => {
            let mut bytes = fs::read(path).unwrap();
            let mut places = Vec::new();
            for _ in 0..FLIPS {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
                places.push(at);
            }
            fs::write(path, bytes).unwrap();
            format!("bits at {places:?}")
        }
    }
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        // Permissions go along; what is not a plain file does not matter.
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    let mode = fs::metadata(from).unwrap().permissions();
    fs::set_permissions(to, mode).unwrap();
}

#[derive(Debug, Default)]
struct Tally {
    refused: usize,
    found: usize,
    without_effect: usize,
}

/// Whether a verification asked for finds the store whole.
async fn whole(wire: &Wire) -> bool {
    let Ok(reply) = wire.admin().verify_store(wire.with(pb::VerifyStoreRequest {})).await else {
        return false;
    };
    let mut parts = reply.into_inner();
    while let Some(part) = parts.next().await {
        match part.map(|p| p.part) {
            Ok(Some(pb::verify_store_response::Part::Result(result))) => return result.ok,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
    false
}

fn judge(state: &Path, what: &str, prepared: &Prepared, tally: &Mutex<Tally>) {
    let server = match Server::attempt(state, &Options::default()) {
        Ok(server) => server,
        Err(ended) => {
            no_panic(&ended.output);
            assert!(ended.status.code().is_some(), "{what}: {}\n{}", ended.status, ended.output);
            tally.lock().unwrap().refused += 1;
            return;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (files, id, key) = server.profile_files();
        let mut admin = crate::common::client::Client::new(&server.address, files, &id, &key);
        if admin.login().await.is_err() {
            tally.lock().unwrap().refused += 1;
            return;
        }
        let wire = Wire::of(&admin);
        let found = !whole(&wire).await;
        let mut odd = false;
        for ((place, right), answer) in
            prepared.truth.iter().zip(read(&wire, &prepared.truth).await)
        {
            match (right, answer) {
                (right, Ok(answer)) if *right == answer => {}
                (Answer::Refused, Err(Code::FailedPrecondition)) => {}
                (_, Err(Code::DataLoss | Code::Unavailable)) => odd = true,
                // What the verification has found is told; other material is wrong whatever is told.
                (Answer::Material { plain, .. }, Ok(Answer::Material { plain: got, .. })) => {
                    assert!(*plain == got, "{what}: {place:?} has the material of another");
                    assert!(found, "{what}: {place:?} is not as it was, and nobody has seen it");
                }
                (right, answer) => {
                    assert!(found, "{what}: {place:?} should be {right:?}, is {answer:?}");
                }
            }
        }
        if found {
            let health = wire.keys().health_check(()).await.unwrap().into_inner();
            assert_ne!(health.status, pb::HealthStatus::Healthy as i32, "{what}: health is silent");
        }
        let mut tally = tally.lock().unwrap();
        if found || odd {
            tally.found += 1;
        } else {
            tally.without_effect += 1;
        }
    });
    no_panic(&server.output());
}

#[test]
fn a_tampered_store_gives_no_wrong_answer() {
    let mut random = Random::seeded("tampering");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let prepared = runtime.block_on(prepare());
    let original = prepared.directory.path().join("state");
    let flips = size("POLYKEY_BIT_FLIPS", 300, 20_000) / FLIPS;
    let edits = size("POLYKEY_ROW_EDITS", 100, 5000);
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    let seeds: Vec<Random> = (0..flips + edits).map(|_| random.fork()).collect();
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let copy_of = prepared.directory.path().join(format!("copy-{worker}"));
            let (next, tally, seeds, prepared) = (&next, &tally, &seeds, &prepared);
            let original: &PathBuf = &original;
            scope.spawn(move || {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    let Some(random) = seeds.get(n) else { return };
                    copy(original, &copy_of);
                    let kind = if n < edits { n % 10 } else { 10 };
                    let what = edit(&copy_of.join(STORE), kind, &mut random.clone(), prepared);
                    judge(&copy_of, &what, prepared, tally);
                }
            });
        }
    });
    let tally = tally.into_inner().unwrap();
    println!("tampering: {} copies: {tally:?}", flips + edits);
    assert!(tally.refused + tally.found > edits / 2, "hardly anything was found: {tally:?}");
}
