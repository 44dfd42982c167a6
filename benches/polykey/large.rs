//! A store with many keys: filling it, pages of it, and how long it takes to start.

use std::path::Path;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::stream::{self, StreamExt};
use polykey::vault::space;
use polykey_proto::polykey::v2 as pb;
use polykey_proto::polykey::v2::polykey_service_client::PolykeyServiceClient;
use polykey_storage::redb::{Options as StoreOptions, Redb};
use polykey_storage::{Direction, Store, all};
use tonic::transport::Channel;

use crate::common::{Options, Server};
use crate::load::{self, Calls, Kind};
use crate::report::Report;
use crate::{process, setting};

const BATCH: u64 = 500;
const FEW: u64 = 1_000;
const SOME: u64 = 10_000;

async fn batch(channel: Channel, calls: &Calls, from: u64, count: u64) {
    let item = |n: u64| pb::CreateKeyItem {
        key_type: pb::KeyType::Aes256 as i32,
        tags: [("n".to_owned(), (n % 10).to_string())].into(),
        ..Default::default()
    };
    let keys = (from..from + count).map(item).collect();
    let body = pb::BatchCreateKeysRequest { keys, atomic: true, ..Default::default() };
    let mut client = PolykeyServiceClient::new(channel).max_decoding_message_size(64 << 20);
    let reply = client.batch_create_keys(calls.with(body)).await.unwrap().into_inner();
    assert_eq!(reply.successful_count as u64, count, "{:?}", reply.results.first());
}

async fn fill(server: &Server, from: u64, to: u64) -> f64 {
    let started = Instant::now();
    let mut at = from;
    // Tokens last 15 minutes.
    while at < to {
        let upto = to.min(at + 50_000);
        let calls = Calls::login(server).await;
        let channels: Vec<_> = (0..4).map(|_| calls.channel()).collect();
        let starts: Vec<u64> = (at..upto).step_by(BATCH as usize).collect();
        stream::iter(starts.into_iter().enumerate())
            .for_each_concurrent(4, |(n, start)| {
                let channel = channels[n % channels.len()].clone();
                batch(channel, &calls, start, BATCH.min(upto - start))
            })
            .await;
        at = upto;
    }
    (to - from) as f64 / started.elapsed().as_secs_f64()
}

/// Middle times of a page of 100 in milliseconds: the first, one with a filter that a tenth meets, one that none does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pages {
    pub(crate) plain: f64,
    pub(crate) filtered: f64,
    pub(crate) nothing: f64,
}

async fn pages(calls: &Calls) -> Pages {
    let channel = calls.channel();
    let page = async |filter: Option<&str>| {
        let mut times = Vec::new();
        for _ in 0..30 {
            let tag_filters = filter.map(|v| ("n".to_owned(), v.to_owned())).into_iter().collect();
            let body = pb::ListKeysRequest { page_size: 100, tag_filters, ..Default::default() };
            let started = Instant::now();
            let mut client = PolykeyServiceClient::new(channel.clone());
            let reply = client.list_keys(calls.with(body)).await.unwrap().into_inner();
            times.push(started.elapsed());
            let expected = if filter == Some("none") { 0 } else { 100 };
            assert_eq!(reply.keys.len(), expected);
        }
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1e3
    };
    Pages {
        plain: page(None).await,
        filtered: page(Some("7")).await,
        nothing: page(Some("none")).await,
    }
}

/// Seconds to page through everything.
async fn walk(calls: &Calls) -> (u64, f64) {
    let mut client = PolykeyServiceClient::new(calls.channel()).max_decoding_message_size(64 << 20);
    let started = Instant::now();
    let (mut page_token, mut found) = (String::new(), 0);
    loop {
        let body = pb::ListKeysRequest { page_size: 1000, page_token, ..Default::default() };
        let page = client.list_keys(calls.with(body)).await.unwrap().into_inner();
        found += page.keys.len() as u64;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return (found, started.elapsed().as_secs_f64());
        }
    }
}

/// Milliseconds from spawning to the first answer over mutual TLS.
async fn start(state: &Path) -> (f64, Server) {
    let started = Instant::now();
    let server =
        tokio::task::block_in_place(|| Server::attempt(state, &Options::default())).unwrap();
    let (files, ..) = server.profile_files();
    let channel = Calls::bare(&server.address, files).channel();
    PolykeyServiceClient::new(channel).health_check(()).await.unwrap();
    (started.elapsed().as_secs_f64() * 1e3, server)
}

/// Times of `count` starts, in milliseconds, smallest first.
pub(crate) async fn cold_starts(state: &Path, kill: bool, count: usize) -> Vec<f64> {
    let (_, mut server) = start(state).await;
    let mut times = Vec::new();
    for _ in 0..count {
        if kill {
            // Something to recover from.
            drop(Calls::login(&server).await);
            drop(server);
        } else {
            let (status, output, _) = tokio::task::block_in_place(|| server.stop());
            assert!(status.success(), "{output}");
        }
        let (time, next) = start(state).await;
        times.push(time);
        server = next;
    }
    times.sort_by(f64::total_cmp);
    times
}

/// Bytes of all rows, keys and values; and the seconds that a bare scan of the list rows takes.
fn raw(path: &Path) -> (u64, f64) {
    let store = Redb::open(path, StoreOptions::default()).unwrap();
    let (mut bytes, mut listing) = (0, 0.0);
    for &space in space::ALL {
        let started = Instant::now();
        let mut range = all();
        loop {
            let entries = store.scan(space, range, Direction::Forward, 20_000);
            let entries = entries.now_or_never().unwrap().unwrap();
            let Some(last) = entries.last() else { break };
            range = (std::ops::Bound::Excluded(last.key.clone()), std::ops::Bound::Unbounded);
            bytes += entries.iter().map(|e| (e.key.len() + e.value.len()) as u64).sum::<u64>();
        }
        if space == space::LIST {
            listing = started.elapsed().as_secs_f64();
        }
    }
    (bytes, listing)
}

/// Fills a store and measures it.
pub(crate) async fn measure(report: &mut Report, state: &Path, window: Duration) {
    let many = setting("POLYKEY_BENCH_KEYS", 1_000_000);
    let (_, server) = start(state).await;
    fill(&server, 0, FEW).await;
    let calls = Calls::login(&server).await;
    report.create_few = load::measure(&calls, Kind::Create, 64, 4, window, server.pid()).await;
    fill(&server, FEW, SOME).await;
    report.pages_some = pages(&Calls::login(&server).await).await;
    report.fill_rate = fill(&server, SOME, many).await;
    println!("filled with {many} keys, {:.0}/s", report.fill_rate);
    let calls = Calls::login(&server).await;
    report.pages_many = pages(&calls).await;
    let (found, seconds) = walk(&calls).await;
    report.walk_seconds = seconds;
    report.create_many = load::measure(&calls, Kind::Create, 64, 4, window, server.pid()).await;
    report.many = found;
    let (status, output, _) = tokio::task::block_in_place(|| server.stop());
    assert!(status.success(), "{output}");
    let path = state.join("polykey.redb");
    let (bytes, scan) = tokio::task::block_in_place(|| raw(&path));
    report.file_ratio = std::fs::metadata(&path).unwrap().len() as f64 / bytes as f64;
    report.scan_seconds = scan;
    report.cold_many = cold_starts(state, false, 3).await;
    report.cold_killed = cold_starts(state, true, 3).await;
    let (_, server) = start(state).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    report.memory_idle_many = process::memory(server.pid(), "VmRSS");
}
