//! A closed store that somebody edits: the server refuses it, finds it out, or gives right answers all the same.

use std::collections::BTreeMap;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::{FutureExt, StreamExt};
use polykey::vault::space::{self, KEYS, VERSIONS};
use polykey_proto::polykey::v2 as pb;
use polykey_storage::redb::{Options as StoreOptions, Redb};
use polykey_storage::{Commit, Direction, NoFinish, Space, Store, all};
use serde_json::json;
use tonic::Code;

use crate::common::{Options, PATIENCE, Server};
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

fn locked(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
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
            locked(tally).refused += 1;
            return;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let judged = async {
        let (files, id, key) = server.profile_files();
        let mut admin = crate::common::client::Client::new(&server.address, files, &id, &key);
        if admin.login().await.is_err() {
            locked(tally).refused += 1;
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
        let mut tally = locked(tally);
        if found || odd {
            tally.found += 1;
        } else {
            tally.without_effect += 1;
        }
    };
    // Whatever is wrong with a store, every question about it has an answer.
    let judged = runtime.block_on(async { tokio::time::timeout(PATIENCE, judged).await });
    assert!(judged.is_ok(), "{what}: the server does not come to an end with it");
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
    let wrong = Mutex::new(Vec::new());
    let seeds: Vec<Random> = (0..flips + edits).map(|_| random.fork()).collect();
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let copy_of = prepared.directory.path().join(format!("copy-{worker}"));
            let (next, tally, wrong, seeds, prepared) = (&next, &tally, &wrong, &seeds, &prepared);
            let original: &PathBuf = &original;
            scope.spawn(move || {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    let Some(random) = seeds.get(n) else { return };
                    copy(original, &copy_of);
                    let kind = if n < edits { n % 10 } else { 10 };
                    let what = edit(&copy_of.join(STORE), kind, &mut random.clone(), prepared);
                    let judge = AssertUnwindSafe(|| judge(&copy_of, &what, prepared, tally));
                    if catch_unwind(judge).is_err() {
                        wrong.lock().unwrap().push(format!("copy {n} of kind {kind}: {what}"));
                        return;
                    }
                }
            });
        }
    });
    // Last, so that the end of a long output names them.
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let tally = tally.into_inner().unwrap();
    println!("tampering: {} copies: {tally:?}", flips + edits);
    assert!(tally.refused + tally.found > edits / 2, "hardly anything was found: {tally:?}");
}

/// Cuts the last key of a leaf to its first byte, in the file: it then stands before all others of its
/// table, and the first row of the leaf begins somewhere in the keys.
fn cut_last_key(path: &Path, last: &[u8]) {
    const PAGE: usize = 4096;
    const LEAF: u8 = 1;
    let mut bytes = fs::read(path).unwrap();
    let number = |bytes: &[u8], at: usize| -> usize {
        usize::try_from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())).unwrap()
    };
    let mut cut = 0;
    let whole = bytes.len() / PAGE * PAGE;
    for page in (0..whole).step_by(PAGE) {
        // redb's leaf: type, a byte, the number of pairs, the ends of the keys, the ends of the values, keys, values.
        let pairs = usize::from(u16::from_le_bytes([bytes[page + 2], bytes[page + 3]]));
        if bytes[page] != LEAF || !(2..400).contains(&pairs) {
            continue;
        }
        let place = page + 4 + 4 * (pairs - 1);
        let (from, to) = (page + number(&bytes, place - 4), page + number(&bytes, place));
        if bytes.get(from..to) == Some(last) {
            let end = u32::try_from(to - page - (last.len() - 1)).unwrap();
            bytes[place..place + 4].copy_from_slice(&end.to_le_bytes());
            cut += 1;
        }
    }
    assert!(cut > 0, "the last leaf was not found");
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_page_whose_rows_are_out_of_order_is_found_and_nobody_reads_it_for_ever() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let prepared = runtime.block_on(prepare());
    let state = prepared.directory.path().join("state");
    let (space, key) = prepared.now.keys().next_back().unwrap();
    assert_eq!(*space, space::USAGE.0);
    cut_last_key(&state.join(STORE), key);
    let tally = Mutex::new(Tally::default());
    judge(&state, "the last key of the last leaf is cut", &prepared, &tally);
    let tally = locked(&tally);
    assert_eq!(tally.without_effect, 0, "{tally:?}");
}

/// Turns over the last bit of a row: its header stays, and it does not open.
fn damage(path: &Path, row: &(u8, Vec<u8>), now: &Rows) {
    let mut value = now[row].clone();
    *value.last_mut().unwrap() ^= 1;
    commit(path, Commit::new().put(Space(row.0), row.1.clone(), value));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_damaged_row_is_told_and_stops_nothing_else() {
    let server = Server::dev();
    let state = server.state.clone();
    let mut directory = None;
    let admin = server.admin().await;
    let (damaged, unlisted) = (admin.create(json!({})).await, admin.create(json!({})).await);
    let mut whole = vec![admin.create(json!({})).await, admin.create(json!({})).await];
    whole.sort_unstable();
    for key in [&damaged, &whole[0]] {
        let far = json!({"key_id": key, "effective_at": "2100-01-01T00:00:00Z"});
        admin.call("RevokeKey", far).await.unwrap();
    }
    stop(server, &mut directory);
    let (store, now) = (state.join(STORE), rows(&state.join(STORE)));
    let id = |key: &str| data_encoding::HEXLOWER.decode(key.replace('-', "").as_bytes()).unwrap();
    let (damaged_id, unlisted_id) = (id(&damaged), id(&unlisted));
    let jobs: Vec<_> = now.keys().filter(|k| k.0 == space::JOBS.0).collect();
    let job = jobs.iter().find(|k| k.1[9..25] == damaged_id[..]).unwrap();
    damage(&store, job, &now);
    damage(&store, &(KEYS.0, damaged_id), &now);
    let listed = now.keys().filter(|k| k.0 == space::LIST.0 && k.1[16..] == unlisted_id[..]);
    listed.for_each(|row| damage(&store, row, &now));

    let server = Server::attempt(&state, &Options::default()).unwrap();
    let admin = server.admin().await;
    // The schedule goes on beside the damaged job, and so does writing.
    let soon = admin.create(json!({})).await;
    let at = std::time::SystemTime::now() + std::time::Duration::from_secs(2);
    let at = rfc3339(at);
    admin.call("RevokeKey", json!({"key_id": soon, "effective_at": at})).await.unwrap();
    let done = async {
        loop {
            let body = json!({"key_id": soon, "include_access_history": true});
            let found = admin.call("GetKeyMetadata", body).await.unwrap();
            let history = found["access_history"].as_array().unwrap();
            if history.iter().any(|e| e["client_identity"] == "polykey") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, done).await.unwrap();
    let health = || async { admin.call("HealthCheck", json!({})).await.unwrap()["status"].clone() };
    assert_eq!(health().await, "HEALTH_STATUS_DEGRADED");
    let jobs = admin.call("ListJobs", json!({})).await.unwrap();
    let told = jobs["jobs"].as_array().unwrap().iter().filter(|j| j["damaged"] == true);
    let told: Vec<_> = told.map(|j| j["key_id"].as_str().unwrap()).collect();
    assert_eq!(told, [damaged.as_str()], "{jobs}");

    // Lists leave the damaged ones out and count them; asked for by name they are a loss.
    let page = admin.call("ListKeys", json!({})).await.unwrap();
    let keys = page["keys"].as_array().unwrap().iter().map(|k| k["key_id"].as_str().unwrap());
    let mut keys: Vec<&str> = keys.filter(|key| *key != soon).collect();
    keys.sort_unstable();
    assert_eq!(keys, whole, "{page}");
    assert_eq!(page["damaged_count"], 2);
    let lost = admin.call("GetKey", json!({"key_id": damaged})).await.unwrap_err();
    assert_eq!(lost.code, Code::DataLoss);
    // Of the other one only the row of the list is gone.
    admin.call("GetKey", json!({"key_id": unlisted})).await.unwrap();

    let verified = admin.stream("VerifyStore", vec![json!({})]).await.unwrap();
    let result = &verified.last().unwrap()["result"];
    let spaces =
        result["problems"].as_array().unwrap().iter().map(|p| p["space"].as_str().unwrap());
    let mut spaces: Vec<&str> = spaces.collect();
    spaces.dedup();
    assert_eq!(spaces, ["keys", "list", "jobs"], "{result}");
    assert_eq!((&result["ok"], &result["set_hash_ok"]), (&json!(false), &json!(true)));
    assert_eq!(health().await, "HEALTH_STATUS_DEGRADED");
    admin.create(json!({})).await;
    let output = server.output();
    let lines = output.lines().filter(|l| l.contains("a stored row is damaged")).count();
    assert_eq!(lines, 3, "each is named once:\n{output}");
    stop(server, &mut directory);
}

/// RFC 3339, whole seconds.
fn rfc3339(time: std::time::SystemTime) -> String {
    let seconds = time.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    polykey::time::Time::from_seconds(i64::try_from(seconds).unwrap()).to_string()
}
