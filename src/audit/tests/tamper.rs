//! Whoever changes the log, in a file or in the store, is found out.

use std::cell::Cell;
use std::time::Duration;

use polykey_storage::{Commit, NoFinish, RowKey, Write};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::super::checkpoint::origin;
use super::super::export::{ExportWriter, named_keys, verify_export};
use super::{Key, NODE, event, id, in_memory, quick, read, start};
use crate::audit::checkpoint::Checkpoint;
use crate::audit::{Outcome, Signer, VerifyingKey, verify_clear, verify_store};
use crate::time::Time;
use crate::vault::{Vault, space};

/// A log of blocks and single events with checkpoints here and there.
async fn exported(shape: &[u8]) -> (Vec<u8>, Vec<Checkpoint>) {
    let vault = in_memory().await;
    let trail = start(&vault, quick()).await;
    let mut kept = Vec::new();
    for (n, kind) in (0..).zip(shape) {
        match kind % 4 {
            0 => {
                trail.data_plane_durable(read(n, id(1))).await.unwrap();
            }
            1 => kept.extend(trail.checkpoint().await.unwrap()),
            _ => {
                trail.record(event(n, None, "login", Outcome::Denied)).await.unwrap();
            }
        }
    }
    trail.record(event(999, None, "logout", Outcome::Success)).await.unwrap();
    let mut out = Vec::new();
    let keys = [Key::new(1).verifying()];
    trail.export(&mut out, &keys).await.unwrap();
    kept.extend(trail.latest_checkpoint().await.unwrap());
    (out, kept)
}

#[derive(Clone, Debug)]
enum Mutation {
    Edit(usize, u8),
    Delete(usize),
    Swap(usize, usize),
    Duplicate(usize, usize),
    Truncate(usize),
    /// Takes leaves off the end, with the checkpoints over them, and writes a new end.
    TakeOff(usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        (any::<usize>(), 1_u8..=255).prop_map(|(at, x)| Mutation::Edit(at, x)),
        any::<usize>().prop_map(Mutation::Delete),
        (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Mutation::Swap(a, b)),
        (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Mutation::Duplicate(a, b)),
        any::<usize>().prop_map(Mutation::Truncate),
        any::<usize>().prop_map(Mutation::TakeOff),
    ]
}

fn lines(file: &[u8]) -> Vec<Vec<u8>> {
    file.split_inclusive(|b| *b == b'\n').map(<[u8]>::to_vec).collect()
}

fn is_checkpoint(line: &[u8]) -> bool {
    line.starts_with(b"{\"checkpoint\"")
}

/// The changed file, unless nothing changed that means anything.
fn mutate(file: &[u8], mutation: &Mutation) -> Option<Vec<u8>> {
    let mut all = lines(file);
    let n = all.len();
    match *mutation {
        Mutation::Edit(at, x) => {
            let mut out = file.to_vec();
            out[at % file.len()] ^= x;
            return Some(out);
        }
        // Checkpoints are extra witnesses: one more, one less or another order changes nothing.
        Mutation::Delete(at) => {
            if is_checkpoint(&all.remove(at % n)) {
                return None;
            }
        }
        Mutation::Swap(a, b) => {
            let (a, b) = (a % n, b % n);
            if all[a] == all[b] || (is_checkpoint(&all[a]) && is_checkpoint(&all[b])) {
                return None;
            }
            all.swap(a, b);
            // A checkpoint may stand in front of any of its leaves.
            let strip = |l: &[Vec<u8>]| -> Vec<Vec<u8>> {
                l.iter().filter(|l| !is_checkpoint(l)).cloned().collect()
            };
            if strip(&all) == strip(&lines(file)) {
                return None;
            }
        }
        Mutation::Duplicate(from, to) => {
            let line = all[from % n].clone();
            if is_checkpoint(&line) {
                return None;
            }
            all.insert(to % (n + 1), line);
        }
        Mutation::Truncate(at) => return Some(file[..at % file.len()].to_vec()),
        Mutation::TakeOff(count) => {
            let leaves = all.iter().filter(|l| l.starts_with(b"{\"leaf\"")).count();
            let keep = leaves - 1 - count % leaves;
            let mut seen = 0;
            all.retain(|line| {
                let leaf = line.starts_with(b"{\"leaf\"");
                seen += usize::from(leaf);
                let covers_more = is_checkpoint(line) && {
                    let value: serde_json::Value = serde_json::from_slice(line).unwrap();
                    let note = value["checkpoint"].as_str().unwrap();
                    Checkpoint::parse(note).unwrap().size > keep as u64
                };
                !covers_more && !line.starts_with(b"{\"end\"") && (!leaf || seen <= keep)
            });
            all.push(format!("{{\"end\":{keep}}}\n").into_bytes());
        }
    }
    Some(all.concat())
}

#[test]
fn every_mutation_of_an_export_is_detected() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let keys = [Key::new(1).verifying()];
    let (tried, skipped) = (Cell::new(0_u32), Cell::new(0_u32));
    for log in 0_u8..20 {
        // A log of its own for every hundred mutations.
        let shape: Vec<u8> = (0..3 + log).map(|i| i.wrapping_mul(37).wrapping_add(log)).collect();
        let (file, kept) = runtime.block_on(exported(&shape));
        let report = verify_export(file.as_slice(), &keys, &kept).unwrap();
        assert!(report.ok(), "{:?}", report.findings);
        assert_eq!(report.covered, report.leaves);
        let config = Config { cases: 125, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(&mutation(), |mutation| {
                let Some(bad) = mutate(&file, &mutation) else {
                    skipped.set(skipped.get() + 1);
                    return Ok(());
                };
                tried.set(tried.get() + 1);
                let report = verify_export(bad.as_slice(), &keys, &kept).unwrap();
                // An edit of the list of public keys is no edit of the log; it is told as a note.
                let named = bad.split(|b| *b == b'\n').next() != file.split(|b| *b == b'\n').next();
                let told = !report.ok() || (named && !report.notes.is_empty());
                prop_assert!(told, "{:?} was not detected", mutation);
                Ok(())
            })
            .unwrap();
    }
    let (tried, skipped) = (tried.get(), skipped.get());
    assert!(tried >= 2_000, "{tried} tried, {skipped} skipped");
}

#[tokio::test]
async fn a_forged_export_needs_the_key() {
    let (file, kept) = exported(&[0, 2, 1, 2, 3]).await;
    assert_eq!(named_keys(&mut file.as_slice()).unwrap(), [Key::new(1).verifying()]);
    // A whole new log under another key, consistent in itself.
    let forger = Key::new(9);
    let vault = in_memory().await;
    let trail = crate::audit::Trail::start(vault, quick(), Some(forger.clone())).await.unwrap();
    trail.record(event(1, None, "login", Outcome::Success)).await.unwrap();
    let mut forged = Vec::new();
    trail.export(&mut forged, &[forger.verifying()]).await.unwrap();
    let verify = |keys: &[VerifyingKey], kept: &[Checkpoint]| {
        verify_export(forged.as_slice(), keys, kept).unwrap()
    };
    assert!(verify(&[forger.verifying()], &[]).ok());
    assert!(!verify(&[Key::new(1).verifying()], &[]).ok());
    assert!(!verify(&[Key::new(1).verifying(), forger.verifying()], &kept).ok());
    assert!(!verify(&[], &[]).ok());
}

#[test]
fn checkpoints_are_signed_notes() {
    let key = Key::new(1);
    let signed = Checkpoint::sign(origin(&NODE), 3, [5; 32], Time::from_seconds(9), &*key).unwrap();
    let name = "polykey/07070707070707070707070707070707";
    let lines: Vec<&str> = signed.note.split('\n').collect();
    assert_eq!(lines[..2], [name, "3"]);
    assert_eq!(lines[2], data_encoding::BASE64.encode(&[5; 32]));
    assert_eq!(lines[3..5], ["time 9000000", ""]);
    assert!(lines[5].starts_with(&format!("\u{2014} {name} ")));
    assert_eq!((lines[6], lines.len()), ("", 7));
    assert_eq!(Checkpoint::parse(&signed.note).as_ref(), Some(&signed));
    assert!(signed.verify(&[Key::new(2).verifying(), key.verifying()]).is_some());
    assert!(signed.verify(&[Key::new(2).verifying()]).is_none());
    let text = VerifyingKey(key.public_key()).to_string();
    assert_eq!(VerifyingKey::parse(&text), Some(key.verifying()));
    // Every single-byte change of the note is refused.
    for at in 0..signed.note.len() {
        for bit in 0..8 {
            let mut bytes = signed.note.clone().into_bytes();
            bytes[at] ^= 1 << bit;
            let accepted = String::from_utf8(bytes)
                .ok()
                .and_then(|note| Checkpoint::parse(&note))
                .is_some_and(|c| c.verify(&[key.verifying()]).is_some());
            assert!(!accepted, "byte {at} bit {bit}");
        }
    }
}

/// Signs with another key than it names.
struct Broken;

impl Signer for Broken {
    fn public_key(&self) -> [u8; 32] {
        Key::new(1).public_key()
    }
    fn sign(&self, message: &[u8]) -> Result<[u8; 64], crate::error::Error> {
        Key::new(2).sign(message)
    }
}

#[test]
fn a_signature_that_does_not_verify_is_never_kept() {
    assert!(Checkpoint::sign(origin(&NODE), 3, [5; 32], Time::from_seconds(9), &Broken).is_err());
}

async fn overwrite(vault: &Vault, leaf: u64, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
    let row = RowKey::new(space::AUDIT, leaf.to_be_bytes());
    let old = vault.store().get(row.space, &row.key).await.unwrap().unwrap();
    let mut commit = Commit::new();
    commit.writes.push(match change(old.value.to_vec()) {
        Some(value) => Write::Put { row, value: value.into() },
        None => Write::Delete { row },
    });
    vault.store().commit(vec![commit], &mut NoFinish).await.unwrap();
}

#[tokio::test]
async fn a_changed_store_is_found_out() {
    let keys = [Key::new(1).verifying()];
    for case in 0..6 {
        let vault = in_memory().await;
        let trail = start(&vault, quick()).await;
        for n in 0..20 {
            trail.record(event(n, None, "login", Outcome::Success)).await.unwrap();
            if n == 9 {
                trail.checkpoint().await.unwrap();
            }
        }
        trail.shutdown(Duration::from_secs(30)).await.unwrap();
        let store = &**vault.store();
        let before = verify_store(&vault, &keys, &[]).await.unwrap();
        assert!(before.ok(), "{:?}", before.findings);
        assert_eq!((before.leaves, before.events, before.checkpoints), (20, 20, 2));
        let clear = verify_clear(store, NODE, &keys, &[]).await.unwrap();
        assert!(clear.ok(), "{:?}", clear.findings);
        assert_eq!((clear.root, clear.covered), (before.root, 20));
        let other = store.get(space::AUDIT, &4_u64.to_be_bytes()).await.unwrap().unwrap();
        // Whether the clear half alone shows it.
        let clear_shows = match case {
            0 => {
                overwrite(&vault, 3, |mut v| {
                    v[0] ^= 1;
                    Some(v)
                })
                .await;
                true
            }
            1 => {
                overwrite(&vault, 3, |mut v| {
                    let last = v.len() - 1;
                    v[last] ^= 1;
                    Some(v)
                })
                .await;
                false
            }
            2 => {
                overwrite(&vault, 3, |_| None).await;
                true
            }
            3 => {
                overwrite(&vault, 19, |_| None).await;
                true
            }
            4 => {
                overwrite(&vault, 3, |_| Some(other.value.to_vec())).await;
                true
            }
            _ => {
                overwrite(&vault, 3, |_| Some(Vec::new())).await;
                true
            }
        };
        assert!(!verify_store(&vault, &keys, &[]).await.unwrap().ok(), "case {case}");
        let clear = verify_clear(store, NODE, &keys, &[]).await.unwrap();
        assert_eq!(clear.ok(), !clear_shows, "case {case}: {:?}", clear.findings);
    }
}

#[test]
fn an_export_can_be_written_from_what_a_server_sends() {
    let (file, kept) =
        tokio::runtime::Runtime::new().unwrap().block_on(exported(&[2, 2, 0, 2, 1, 3]));
    // Leaves first and the checkpoint last, as a stream brings them.
    let mut writer = ExportWriter::new(Vec::new(), &origin(&NODE), &[]).unwrap();
    for line in lines(&file) {
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        if let Some(data) = value["data"].as_str() {
            writer.leaf(&data_encoding::BASE64.decode(data.as_bytes()).unwrap()).unwrap();
        }
    }
    writer.checkpoint(&kept.last().unwrap().note).unwrap();
    let file = writer.end().unwrap();
    let report = verify_export(file.as_slice(), &[Key::new(1).verifying()], &kept).unwrap();
    assert!(report.ok(), "{:?}", report.findings);
    assert_eq!(report.covered, report.leaves);
}

#[tokio::test]
async fn a_follower_stops_at_a_gap() {
    use futures::StreamExt;
    let vault = in_memory().await;
    let trail = std::sync::Arc::new(start(&vault, quick()).await);
    for n in 0..3 {
        trail.record(event(n, None, "login", Outcome::Success)).await.unwrap();
    }
    overwrite(&vault, 0, |_| None).await;
    let mut all = Box::pin(trail.follow(Some(0), crate::audit::Filter::default()));
    assert!(all.next().await.unwrap().is_err());
    assert!(all.next().await.is_none());
}
