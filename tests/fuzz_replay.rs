//! The fuzz targets as plain tests: every file of every corpus, and mutations of them that a seed
//! decides, so that they are the same in every run.
//!
//! `POLYKEY_FUZZ_SEED` and `POLYKEY_FUZZ_MUTATIONS` choose others. What a fuzzer finds goes into
//! `tests/fuzz/corpus/TARGET/` and is replayed here from then on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::print_stdout, reason = "a failing run is repeated from its seed")]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use polykey::fuzzing::{TARGETS, Target};

/// SplitMix64: enough to choose positions, and nothing to depend on.
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// One to eight changes, sometimes with a piece of `other`.
    fn mutate(&mut self, seed: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len() + 1);
            match self.below(7) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.next() as u8,
                2 if at < bytes.len() => drop(bytes.remove(at)),
                3 => bytes.insert(at, self.next() as u8),
                4 => bytes.truncate(at),
                5 => {
                    let from = self.below(other.len() + 1);
                    let piece = &other[from..(from + self.below(32)).min(other.len())];
                    bytes.splice(at..at, piece.iter().copied());
                }
                _ => {
                    let end = (at + self.below(32)).min(bytes.len());
                    let piece = bytes[at.min(end)..end].to_vec();
                    bytes.extend(piece);
                }
            }
        }
        bytes
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect(name))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = folder().join("corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.into_iter().map(|f| (f.display().to_string(), std::fs::read(f).unwrap())).collect()
}

fn run(target: Target, what: &str, data: &[u8]) {
    let (name, function) = target;
    if catch_unwind(AssertUnwindSafe(|| function(data))).is_err() {
        let hex: String = data.iter().map(|b| format!("{b:02x}")).collect();
        panic!("{name} fails on {what}: {hex}");
    }
}

fn replay(name: &str) {
    let target = *TARGETS.iter().find(|(n, _)| *n == name).unwrap();
    let seed = number("POLYKEY_FUZZ_SEED", 1);
    let mutations = number("POLYKEY_FUZZ_MUTATIONS", 3000);
    println!("{name}: seed {seed}, {mutations} mutations");
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    for (file, data) in &corpus {
        run(target, file, data);
    }
    let mut choices = Choices(seed);
    for n in 0..mutations {
        let (one, two) = (choices.below(corpus.len()), choices.below(corpus.len()));
        let data = choices.mutate(&corpus[one].1, &corpus[two].1);
        run(target, &format!("mutation {n} of seed {seed}"), &data);
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { replay(stringify!($name)); })*
        const REPLAYED: &[&str] = &[$(stringify!($name)),*];
    };
}

targets! {
    token record blob wrapped ciphertext page_token config metadata certificate policy audit_export
    request key
}

#[test]
fn every_target_is_fuzzed_and_replayed() {
    let harness: BTreeSet<String> = TARGETS.iter().map(|(n, _)| (*n).to_owned()).collect();
    let replayed: BTreeSet<String> = REPLAYED.iter().map(|n| (*n).to_owned()).collect();
    assert_eq!(harness, replayed);
    let names = |folder: PathBuf| -> BTreeSet<String> {
        let stem = |p: PathBuf| p.file_stem().unwrap().to_str().unwrap().to_owned();
        std::fs::read_dir(folder).unwrap().map(|e| stem(e.unwrap().path())).collect()
    };
    assert_eq!(harness, names(folder().join("targets")));
    assert_eq!(harness, names(folder().join("corpus")));
    let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    for name in &harness {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in Cargo.toml");
    }
}
