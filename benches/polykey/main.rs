//! Benchmarks of the real binary over mutual TLS, as ratios to floors taken in the same run.
//!
//! `make bench`. Contenders are interleaved: each round gives every one of them a window, and what is reported is
//! the median of the rounds' figures and of their ratios. Environment: `POLYKEY_BENCH_KEYS` (keys in the large
//! store, default 1,000,000), `POLYKEY_BENCH_SECONDS` (a window, default 3), `POLYKEY_BENCH_ROUNDS` (default 3),
//! `POLYKEY_BENCH_WRITE=0` (leaves docs/performance.md alone). The executable is also the bare echo it compares
//! with: `--echo tuned|stock DIR` serves one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::large_futures,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "benchmarks"
)]

#[allow(dead_code, reason = "shared with the tests of the binary")]
#[path = "../../tests/common/mod.rs"]
mod common;

#[cfg(feature = "postgres")]
mod database;
mod echo;
mod floors;
mod large;
mod load;
mod process;
mod report;

use std::time::Duration;

use common::{Options, Server};
use load::{Calls, Figures, Kind};
use process::Process;
use report::Report;

/// A number from the environment.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.replace('_', "").parse().ok()).unwrap_or(default)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--echo", kind, directory] => echo::serve(kind, directory.as_ref()),
        // `cargo test --benches` only wants to know that it runs.
        args if args.contains(&"--test") => {}
        _ => {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(run());
        }
    }
}

/// Requests in flight and connections.
const SHAPES: [(usize, usize); 3] = [(1, 1), (16, 4), (64, 4)];

/// What is measured in each round, in this order.
fn contenders() -> Vec<(Kind, usize, usize)> {
    let mut all = Vec::new();
    for (c, n) in SHAPES {
        all.push((Kind::Echo, c, n));
        all.push((Kind::GetKey, c, n));
        all.push((Kind::Create, c, n));
    }
    all.push((Kind::Encrypt, 1, 1));
    for kind in [
        Kind::Encrypt,
        Kind::Decrypt,
        Kind::Encrypt4KiB,
        Kind::Encrypt64KiB,
        Kind::EncryptBatch,
        Kind::DataKey,
        Kind::SignEd25519,
        Kind::SignP256,
        Kind::SignRsa2048,
        Kind::SignMlDsa65,
    ] {
        let c = if kind == Kind::EncryptBatch { 16 } else { 64 };
        all.push((kind, c, 4));
    }
    all.push((Kind::StockEcho, 64, 4));
    all.push((Kind::Health, 64, 4));
    all
}

async fn run() {
    let window = Duration::from_secs(setting("POLYKEY_BENCH_SECONDS", 3));
    let rounds = setting("POLYKEY_BENCH_ROUNDS", 3) as usize;
    let mut report = Report::new(window, rounds);

    let directory = tempfile::tempdir().unwrap();
    let tuned = Process::echo("tuned", &directory.path().join("tuned"));
    let stock = Process::echo("stock", &directory.path().join("stock"));
    let state = directory.path().join("state");
    let server = Server::attempt(&state, &Options::default()).unwrap();
    report.memory_idle_empty = process::memory(server.pid(), "VmRSS");

    for round in 0..rounds {
        let node = Calls::login(&server).await;
        let mut one: Vec<(Kind, usize, usize, Figures)> = Vec::new();
        for (kind, c, n) in contenders() {
            let (calls, pid) = match kind {
                Kind::Echo => (tuned.calls(), tuned.pid()),
                Kind::StockEcho => (stock.calls(), stock.pid()),
                _ => (node.clone(), server.pid()),
            };
            let before = node.revision().await;
            let figures = load::measure(&calls, kind, c, n, window, pid).await;
            let commits = node.revision().await - before;
            println!("round {round}: {kind:?} c={c} n={n}: {figures}");
            if kind == Kind::Create && c == 64 {
                report.records_per_commit.push(figures.count as f64 / commits.max(1) as f64);
            }
            one.push((kind, c, n, figures));
        }
        let floors = tokio::task::block_in_place(|| floors::take(directory.path()));
        println!("round {round}: {floors:?}");
        report.round(one, floors);
    }
    report.memory_peak = process::memory(server.pid(), "VmHWM");
    drop((tuned, stock));
    let (status, output, _) = server.stop();
    assert!(status.success(), "{output}");

    #[cfg(feature = "postgres")]
    {
        let state = directory.path().join("embedded");
        report.database = Box::pin(database::measure(&state, window, rounds)).await;
    }
    report.cold_empty = large::cold_starts(&directory.path().join("cold"), false, 7).await;
    large::measure(&mut report, &directory.path().join("large"), window).await;
    report.finish();
}
